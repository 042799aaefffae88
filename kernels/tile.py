"""Addressing: coordinates of a tile, their masks, and where an operand's elements lie."""

import triton
import triton.language as tl

# Hints to L2: to hold what is read or written for a second read, to drop it after the last one, none.
EVICT_LAST = tl.constexpr("evict_last")
EVICT_FIRST = tl.constexpr("evict_first")
ANY = tl.constexpr("")


@triton.jit
def times(n, SIZE: tl.constexpr):
    return n * SIZE


@triton.jit
def extent(SPACE: tl.constexpr, AXIS: tl.constexpr, N0):
    """Number of points along coordinate AXIS (0 to 3: m, c, a, s); the size written 0 is N0."""
    # Elements of a nested tuple are constexpr again only once they are declared so: by a name, or, in a loop, whose
    # names cannot be declared twice, by the parameter of a function.
    SIZES: tl.constexpr = SPACE[AXIS]
    if SIZES[0] == 0:
        n = N0
    else:
        OUTER: tl.constexpr = SIZES[0]
        n = OUTER
    for d in tl.static_range(1, len(SIZES)):
        n = times(n, SIZES[d])
    return n


@triton.jit
def out_of_run(o, i, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """o with the place of point i in its innermost run added, and i along the runs around that one."""
    return o + (i % SIZE) * STRIDE, i // SIZE


@triton.jit
def offset(i, SPACE: tl.constexpr, STRIDES: tl.constexpr, AXIS: tl.constexpr):
    """Where point i along coordinate AXIS lies in an operand; 0 where the operand does not vary."""
    SIZES: tl.constexpr = SPACE[AXIS]
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
def offsets(at, SPACE: tl.constexpr, STRIDES: tl.constexpr):
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
    return (
        offset(m, SPACE, STRIDES, 0)
        + offset(c, SPACE, STRIDES, 1)
        + offset(at[2], SPACE, STRIDES, 2)
        + offset(at[3], SPACE, STRIDES, 3)
    )


@triton.jit
def lanes(start, BLOCK: tl.constexpr, WIDE: tl.constexpr, STEP: tl.constexpr = 1):
    """start, start + STEP, ...: 64-bit where an operand's offsets need it."""
    i = tl.arange(0, BLOCK) * STEP
    if WIDE:
        i = i.to(tl.int64)
    return start + i


@triton.jit
def widened(i, WIDE: tl.constexpr):
    return i.to(tl.int64) if WIDE else i


@triton.jit
def kept(
    m_start, c_start, SPACE: tl.constexpr, N0, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr = 1,
):  # fmt: skip
    """m, c and their mask for the first axis of a tile; the coordinate it does not run along is a scalar.

    Of the BLOCK_K lanes, STEP apart, those inside the first COLUMNS count.
    """
    if ALONG_M:
        m = lanes(m_start, BLOCK_K, WIDE, STEP)[:, None, None]
        c = c_start
        mk = m < extent(SPACE, 0, N0)
    else:
        m = m_start
        c = lanes(c_start, BLOCK_K, WIDE, STEP)[:, None, None]
        mk = c < extent(SPACE, 1, N0)
    if COLUMNS < BLOCK_K * STEP:
        mk = mk & (lanes(0, BLOCK_K, False, STEP)[:, None, None] < COLUMNS)
    return m, c, mk


@triton.jit
def block_starts(i, SPACE: tl.constexpr, N0, ALONG_M: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Where the i-th block begins along m and c; blocks are counted along the tile's axis first."""
    i = widened(i, WIDE)
    if ALONG_M:
        inside = tl.cdiv(extent(SPACE, 0, N0), COLUMNS)
        m_start = (i % inside) * COLUMNS
        c_start = i // inside
    else:
        inside = tl.cdiv(extent(SPACE, 1, N0), COLUMNS)
        m_start = i // inside
        c_start = (i % inside) * COLUMNS
    return m_start, c_start


@triton.jit
def kept_blocks(SPACE: tl.constexpr, N0, ALONG_M: tl.constexpr, FOLD: tl.constexpr):
    """How many blocks there are, as block_starts() counts them."""
    COLUMNS: tl.constexpr = FOLD[1]
    if ALONG_M:
        n = tl.cdiv(extent(SPACE, 0, N0), COLUMNS) * extent(SPACE, 1, N0)
    else:
        n = tl.cdiv(extent(SPACE, 1, N0), COLUMNS) * extent(SPACE, 0, N0)
    return n


@triton.jit
def kept_block(
    i, SPACE: tl.constexpr, N0, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr
):
    """kept() of the i-th block: its columns, all of one group or of several (see FOLD in kernels/__init__.py)."""
    COLUMNS: tl.constexpr = FOLD[1]
    m_start, c_start = block_starts(i, SPACE, N0, ALONG_M, COLUMNS, WIDE)
    return kept(m_start, c_start, SPACE, N0, ALONG_M, BLOCK_K, WIDE, COLUMNS)


@triton.jit
def group_block(i, SPACE: tl.constexpr, N0, ALONG_M: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr):
    """kept() of the i-th block: the first column of each of its groups."""
    COLUMNS: tl.constexpr = FOLD[1]
    STEP: tl.constexpr = FOLD[0]
    GROUPS: tl.constexpr = FOLD[2]
    m_start, c_start = block_starts(i, SPACE, N0, ALONG_M, COLUMNS, WIDE)
    return kept(m_start, c_start, SPACE, N0, ALONG_M, GROUPS, WIDE, COLUMNS, STEP)


@triton.jit
def first_columns(m, c, mk, ALONG_M: tl.constexpr, FOLD: tl.constexpr):
    """Those of a tile's lanes that stand for their group."""
    PER: tl.constexpr = FOLD[0]
    if PER > 1:
        mk = mk & ((m if ALONG_M else c) % PER == 0)
    return mk


@triton.jit
def reduced_a(start, SPACE: tl.constexpr, N0, BLOCK_A: tl.constexpr, WIDE: tl.constexpr):
    a = lanes(start, BLOCK_A, WIDE)[None, :, None]
    return a, a < extent(SPACE, 2, N0)


@triton.jit
def reduced_s(start, SPACE: tl.constexpr, N0, BLOCK_S: tl.constexpr, WIDE: tl.constexpr):
    s = lanes(start, BLOCK_S, WIDE)[None, None, :]
    return s, s < extent(SPACE, 3, N0)


@triton.jit
def load(ptr, o, mask, ACC: tl.constexpr, KEEP: tl.constexpr = ANY):
    """Elements at offsets o, 0 outside the mask; o may be smaller than the mask where the operand does not vary.

    KEEP: EVICT_LAST, EVICT_FIRST or ANY.
    """
    p, m = tl.broadcast(ptr + o, mask)
    return tl.load(p, mask=m, other=0.0, eviction_policy=KEEP).to(ACC)


@triton.jit
def load_shared(ptr, o, mask):
    """What another program of the same launch stored: past L1, which is not coherent."""
    return tl.load(ptr + o, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """value in another type; to bfloat16 by way of fp32: the interpreter makes nonsense of fp64."""
    if value.dtype == tl.float64 and dtype == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def store(ptr, o, value, mask, KEEP: tl.constexpr = ANY):
    p, m = tl.broadcast(ptr + o, mask)
    tl.store(p, rounded(value, ptr.dtype.element_ty), mask=m, eviction_policy=KEEP)


@triton.jit
def total(t):
    """Sum of a tile over a and s: [BLOCK_K, BLOCK_A, BLOCK_S] -> [BLOCK_K, 1, 1]."""
    return tl.sum(tl.sum(t, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def by_group(v, BLOCK_K: tl.constexpr, FOLD: tl.constexpr):
    """[BLOCK_K, 1, 1] of columns -> at every column, the sum over the columns of its group."""
    PER: tl.constexpr = FOLD[0]
    GROUPS: tl.constexpr = FOLD[2]
    if PER > 1:
        here = tl.arange(0, BLOCK_K)[:, None, None] // PER == tl.arange(0, GROUPS)[None, :, None]
        sums = tl.sum(tl.where(here, v, 0.0), 0, keep_dims=True)
        v = tl.sum(tl.where(here, sums, 0.0), 1, keep_dims=True)
    return v


@triton.jit
def group_size(SPACE: tl.constexpr, N0, FOLD: tl.constexpr, ACC: tl.constexpr):
    """Number of elements that share a mean, as the accumulator's type."""
    PER: tl.constexpr = FOLD[0]
    return tl.full((), extent(SPACE, 2, N0), ACC) * tl.full((), extent(SPACE, 3, N0), ACC) * PER


@triton.jit
def number_of_groups(SPACE: tl.constexpr, N0, FOLD: tl.constexpr):
    PER: tl.constexpr = FOLD[0]
    return extent(SPACE, 0, N0) * extent(SPACE, 1, N0) // PER
