"""Coordinates of a tile, their masks, and where an operand's elements lie."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """A tile: PIECES neighbours [BLOCK_K, BLOCK_A, BLOCK_S] along a or along s, of which this places the first."""

    at: Any
    """m, c, a, s; the kept coordinate that the tile does not run along is a scalar."""
    mk: Any
    """Which kept points there are."""
    n_a: Any
    """Where a ends, and s."""
    n_s: Any


@triton.jit
def zeros(K: tl.constexpr, A: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr):
    return tl.zeros((K, A, S), DTYPE)


@triton.jit
def times(n, SIZE: tl.constexpr):
    return n * SIZE


@triton.jit
def extent(AXIS: tl.constexpr, n0, F: tl.constexpr):
    """Number of points along coordinate AXIS (0 to 3: m, c, a, s); the size written 0 is n0."""
    # Elements of a nested tuple are constexpr again only once they are declared so: by a name, or, in a loop, whose
    # names cannot be declared twice, by the parameter of a function.
    SIZES: tl.constexpr = F.SPACE[AXIS]
    if SIZES[0] == 0:
        n = n0
    else:
        OUTER: tl.constexpr = SIZES[0]
        # Of this size Triton makes an unsigned number, which goes with no other.
        n = OUTER if OUTER >> 31 != 1 else tl.full((), OUTER, tl.int64)
    for d in tl.static_range(1, len(SIZES)):
        n = times(n, SIZES[d])
    return n


@triton.jit
def out_of_run(o, i, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """o with the place of point i in its innermost run added, and i along the runs around that one."""
    return o + (i % SIZE) * STRIDE, i // SIZE


@triton.jit
def offset(i, STRIDES: tl.constexpr, AXIS: tl.constexpr, F: tl.constexpr):
    """Where point i along coordinate AXIS lies in an operand; 0 where the operand does not vary."""
    SIZES: tl.constexpr = F.SPACE[AXIS]
    STEPS: tl.constexpr = STRIDES[AXIS]
    if len(STEPS) == 0:
        o = 0
    elif len(STEPS) == 1:
        STEP: tl.constexpr = STEPS[0]
        o = i * STEP
    else:
        o = i * 0
        for d in tl.static_range(len(STEPS) - 1):
            o, i = out_of_run(o, i, SIZES[len(STEPS) - 1 - d], STEPS[len(STEPS) - 1 - d])
        OUTER: tl.constexpr = STEPS[0]
        o += i * OUTER
    return o


@triton.jit
def offsets(at, STRIDES: tl.constexpr, F: tl.constexpr):
    """Where the elements at (m, c, a, s) lie in an operand; STRIDES[4]: how many neighbours along m, c share one."""
    m = at[0]
    c = at[1]
    if len(STRIDES) == 5:
        SHARED: tl.constexpr = STRIDES[4]
        SHARED_M: tl.constexpr = SHARED[0]
        SHARED_C: tl.constexpr = SHARED[1]
        if SHARED_M > 1:
            m = m // SHARED_M
        if SHARED_C > 1:
            c = c // SHARED_C
    kept_offset = offset(m, STRIDES, 0, F) + offset(c, STRIDES, 1, F)
    return kept_offset + offset(at[2], STRIDES, 2, F) + offset(at[3], STRIDES, 3, F)


@triton.jit
def widened(i, F: tl.constexpr):
    return i.to(tl.int64) if F.WIDE else i


@triton.jit
def lanes(start, BLOCK: tl.constexpr, F: tl.constexpr, STEP: tl.constexpr = 1):
    """start, start + STEP, ...: 64-bit where an operand's offsets need it."""
    return start + widened(tl.arange(0, BLOCK) * STEP, F)


@triton.jit
def kept(m_start, c_start, n0, F: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr = 1):
    """m, c and their mask for LANES columns, STEP apart; the coordinate that tiles do not run along is a scalar.

    So is everything else that belongs to a single column: a program then needs no layout and no barrier for it.
    """
    COLUMNS: tl.constexpr = F.FOLD[1]
    if LANES == 1:
        m = m_start
        c = c_start
        mk = (m < extent(0, n0, F)) & (c < extent(1, n0, F))
    elif F.ALONG_M:
        m = lanes(m_start, LANES, F, STEP)[:, None, None]
        c = c_start
        mk = m < extent(0, n0, F)
    else:
        m = m_start
        c = lanes(c_start, LANES, F, STEP)[:, None, None]
        mk = c < extent(1, n0, F)
    if COLUMNS < LANES * STEP:
        mk = mk & ((tl.arange(0, LANES) * STEP)[:, None, None] < COLUMNS)
    return m, c, mk


@triton.jit
def block_starts(i, n0, F: tl.constexpr):
    """Where the i-th block begins along m and c; blocks are counted along the tile's axis first."""
    COLUMNS: tl.constexpr = F.FOLD[1]
    i = widened(i, F)
    n = extent(0 if F.ALONG_M else 1, n0, F)
    inside = tl.cdiv(n, COLUMNS)
    start = (i % inside) * COLUMNS
    if F.CLAMP_K > 0:  # in vectors, so that the compiler sees that blocks begin where these do
        start = tl.minimum(start // F.CLAMP_K, (n - COLUMNS) // F.CLAMP_K) * F.CLAMP_K
    return (start, i // inside) if F.ALONG_M else (i // inside, start)


@triton.jit
def kept_blocks(n0, F: tl.constexpr):
    """How many blocks there are, as block_starts() counts them."""
    COLUMNS: tl.constexpr = F.FOLD[1]
    if F.ALONG_M:
        n = tl.cdiv(extent(0, n0, F), COLUMNS) * extent(1, n0, F)
    else:
        n = tl.cdiv(extent(1, n0, F), COLUMNS) * extent(0, n0, F)
    return n


@triton.jit
def group_block(i, n0, F: tl.constexpr):
    """kept() of the i-th block: the first column of each of its groups."""
    PER: tl.constexpr = F.FOLD[0]
    GROUPS: tl.constexpr = F.FOLD[2]
    m_start, c_start = block_starts(i, n0, F)
    return kept(m_start, c_start, n0, F, GROUPS, PER)


@triton.jit
def first_columns(t, F: tl.constexpr):
    """Those of a tile's columns that stand for their group."""
    PER: tl.constexpr = F.FOLD[0]
    mk = t.mk
    if PER > 1:
        mk = mk & (t.at[0 if F.ALONG_M else 1] % PER == 0)
    return mk


@triton.jit
def both(p, q):
    """Both masks, either of which may be None."""
    if p is None:
        r = q
    elif q is None:
        r = p
    else:
        r = p & q
    return r


@triton.jit
def tile_at(m, c, mk, a_start, s_start, n0, F: tl.constexpr):
    """The tile of these kept points that begins at a_start and s_start."""
    a = lanes(a_start, F.BLOCK_A, F)[None, :, None]
    s = lanes(s_start, F.BLOCK_S, F)[None, None, :]
    return Tile(at=(m, c, a, s), mk=mk, n_a=extent(2, n0, F), n_s=extent(3, n0, F))


@triton.jit
def tile_of(block, block_a, block_s, n0, F: tl.constexpr):
    """The tile of the block-th block of groups, the block_a-th along a and the block_s-th along s."""
    m_start, c_start = block_starts(block, n0, F)
    m, c, mk = kept(m_start, c_start, n0, F, F.BLOCK_K)
    return tile_at(m, c, mk, block_a * F.WIDTH_A, block_s * F.WIDTH_S, n0, F)


@triton.jit
def coordinates(t, PIECE: tl.constexpr, F: tl.constexpr):
    """m, c, a, s of a piece."""
    if F.PIECES_A:
        at = (t.at[0], t.at[1], t.at[2] + PIECE * F.BLOCK_A, t.at[3])
    else:
        at = (t.at[0], t.at[1], t.at[2], t.at[3] + PIECE * F.BLOCK_S)
    return at


@triton.jit
def mask_a(t, PIECE: tl.constexpr, F: tl.constexpr):
    """Which points of a a piece holds; None where all of them are there."""
    # Through both(): before Triton 3.7 a function returns no None of its own.
    return both(None if F.FULL_A > PIECE else coordinates(t, PIECE, F)[2] < t.n_a, None)


@triton.jit
def mask_of(t, PIECE: tl.constexpr, F: tl.constexpr):
    """Which elements of a piece there are."""
    ms = None if F.FULL_S > PIECE else coordinates(t, PIECE, F)[3] < t.n_s
    return both(both(None if F.FULL_K else t.mk, mask_a(t, PIECE, F)), ms)


@triton.jit
def mask_parameters(t, PIECE: tl.constexpr, F: tl.constexpr):
    return both(None if F.FULL_K or F.ALONG_M else t.mk, None if F.SHARED_A else mask_a(t, PIECE, F))


@triton.jit
def quotient(i, n):
    """i // n and i % n of numbers of 32 bits that are not negative: of unsigned ones half as many instructions."""
    q = (i.to(tl.uint32) // tl.full((), n, tl.uint32)).to(tl.int32)
    return q, i - q * n


@triton.jit
def place(i, chunks_s, n0, F: tl.constexpr):
    """The i-th tile or chunk -> block of groups, block of a, chunk of s.

    They are counted along the innermost axis in memory first: KEPT_FIRST says that it is a kept one.
    """
    chunks = tl.cdiv(extent(2, n0, F), F.WIDTH_A) * chunks_s
    if F.KEPT_FIRST:
        chunk, block = quotient(i, kept_blocks(n0, F))
    else:
        block, chunk = quotient(i, chunks)
    block_a, chunk_s = quotient(chunk, chunks_s)
    return block, block_a, chunk_s


@triton.jit
def numbered_tile(i, steps, n0, F: tl.constexpr):
    """The first tile of the i-th chunk of `steps` tiles along s, and what place() says of it."""
    block, block_a, chunk_s = place(i, tl.cdiv(extent(3, n0, F), F.WIDTH_S * steps), n0, F)
    return tile_of(block, block_a, chunk_s * steps, n0, F), block, block_a, chunk_s


@triton.jit
def tiles_of(chunk_s, steps, n0, F: tl.constexpr):
    """How many tiles a chunk of `steps` along s has: the last one may have fewer."""
    return tl.minimum(steps, tl.cdiv(extent(3, n0, F), F.WIDTH_S) - chunk_s * steps)


@triton.jit
def inside(v, t, PIECE: tl.constexpr, F: tl.constexpr):
    """v, 0 outside the piece."""
    mask = mask_of(t, PIECE, F)
    return v if mask is None else tl.where(mask, v, 0.0)


@triton.jit
def count(n, F: tl.constexpr):
    """An extent as a number of the accumulator's type."""
    return tl.full((), n, F.ACC)


@triton.jit
def group_size(n0, F: tl.constexpr):
    """Number of elements that share a mean, as the accumulator's type."""
    PER: tl.constexpr = F.FOLD[0]
    return count(extent(2, n0, F), F) * count(extent(3, n0, F), F) * PER


@triton.jit
def number_of_groups(n0, F: tl.constexpr):
    PER: tl.constexpr = F.FOLD[0]
    return extent(0, n0, F) * extent(1, n0, F) // PER


@triton.jit
def group_number(m, c, n0, F: tl.constexpr):
    """Which of all groups (m, c) belongs to, as partial results are counted."""
    PER: tl.constexpr = F.FOLD[0]
    g = m * extent(1, n0, F) + c
    return g // PER if PER > 1 else g
