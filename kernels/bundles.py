"""The two values that every kernel takes: its operands, and the form of a call, what is known when it is compiled."""

from typing import Any, NamedTuple

STATISTICS, APPLY, BOTH = "statistics", "apply", "both"
"""Phases of a call: what a launch does with each tile."""

ABSENT: tuple[tuple[int, ...], ...] = ((), (), (), ())
"""Strides of an operand that is not there."""


class Operands(NamedTuple):
    """Pointers; None where absent."""

    x: Any = None
    pre: Any = None
    sum: Any = None
    """x + pre, which is what is normalised where there is a pre."""
    w: Any = None
    b: Any = None
    post: Any = None
    y: Any = None
    mean: Any = None
    rstd: Any = None
    running_mean: Any = None
    running_var: Any = None
    part_mean: Any = None
    """Of each chunk of a group: its mean, less median_elements() of the group."""
    part_m2: Any = None
    """Of each chunk of a group: the sum of squares about its mean."""
    dy: Any = None
    dsum: Any = None
    dx: Any = None
    dpost: Any = None
    c1: Any = None
    c0: Any = None
    dw: Any = None
    db: Any = None
    p1: Any = None
    p0: Any = None
    t1: Any = None
    """Rows whose sum is dw, t0: db."""
    t0: Any = None
    tickets: Any = None


class Form(NamedTuple):
    """What a kernel is compiled for.  The grammar of sizes, strides and tiles stands in ``kernels/__init__.py``."""

    SPACE: Any
    ACC: Any
    """Type of statistics and sums."""
    X: Any = ABSENT
    PRE: Any = ABSENT
    SUM: Any = ABSENT
    W: Any = ABSENT
    POST: Any = ABSENT
    Y: Any = ABSENT
    DY: Any = ABSENT
    DSUM: Any = ABSENT
    DX: Any = ABSENT
    DPOST: Any = ABSENT
    STAT: Any = ABSENT
    CENTER: Any = True
    ROUND: Any = False
    """Whether xhat is rounded to the type of x before the affine."""
    ACT: Any = "identity"
    PTX: Any = False
    """Whether inline assembly of NVIDIA may be used; its plain twins stand beside it, in elements.py."""
    ACCESS: Any = 1
    """Elements of an access to x."""
    ALONG_M: Any = True
    BLOCK_K: Any = 1
    BLOCK_A: Any = 1
    BLOCK_S: Any = 1
    FOLD: Any = (1, 1, 1, 1)
    WIDE: Any = False
    """Whether offsets need 64 bits."""
    PIECES: Any = 1
    """Blocks that a tile is made of, neighbours along a (PIECES_A) or along s."""
    PIECES_A: Any = False
    WIDTH_A: Any = 1
    """Points of a tile along a, all pieces, and along s."""
    WIDTH_S: Any = 1
    FULL_K: Any = False
    """Whether no tile sticks out along k."""
    FULL_A: Any = 0
    """Of how many pieces of a tile, whichever it is, all points of a are there; FULL_S: of s."""
    FULL_S: Any = 0
    CLAMP_K: Any = 0
    """Elements of an access, where the last block of columns begins so that it ends where they do: some of the one
    before it are done twice, to the same results, and no block needs a mask."""
    CLAMP_A: Any = False
    """Whether tiles may stick out along a alone, and with whole lanes: they read its last point again, which costs no
    mask, and leave it out of sums."""
    SHARED_A: Any = False
    """Whether a is averaged over as s is: no parameter runs along it.  A tile of planes has two axes of s so."""
    PHASE: Any = BOTH
    KEPT_FIRST: Any = False
    """Whether kept coordinates are the innermost in memory: the grid is counted along them first, and sums pass across
    them from lane to lane (see along_columns())."""
    LANE: Any = 1
    """Neighbours along m that a lane holds, where sums for dw and db are kept of each lane, not of each row."""
    FROM_VAR: Any = False
    """Whether rstd points to variances."""
    DIRECT: Any = False
    """Whether sums for dw and db are whole: they are stored as dw, db[c, a]."""
    A: Any = 1
    """Extent of a in p1 and p0."""
    MERGE_A: Any = 1
    """Columns of p1 and p0 that a merge takes at once."""
    BLOCK_P: Any = 1
    """Partial results that a merge takes at once."""
    APART: Any = 1
    """Columns of a group whose partial results a finish finds apart."""
