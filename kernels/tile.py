"""Addressing: coordinates of a tile, their masks, and where an operand's elements lie."""

import triton
import triton.language as tl


@triton.jit
def extent(SIZES: tl.constexpr, N0):
    """Number of points of an index space; the size written 0 is N0."""
    n = N0 if SIZES[0] == 0 else SIZES[0]
    for d in tl.static_range(1, len(SIZES)):
        n = n * SIZES[d]
    return n


@triton.jit
def offset(i, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    """Where point i of an index space lies in an operand; 0 where the operand does not vary."""
    if len(STRIDES) == 0:
        return 0
    if len(STRIDES) == 1:
        return i * STRIDES[0]
    o = (i % SIZES[len(SIZES) - 1]) * STRIDES[len(SIZES) - 1]
    for d in tl.static_range(1, len(SIZES) - 1):
        i = i // SIZES[len(SIZES) - d]
        o += (i % SIZES[len(SIZES) - 1 - d]) * STRIDES[len(SIZES) - 1 - d]
    return o + (i // SIZES[1]) * STRIDES[0]


@triton.jit
def offsets(at, SPACE: tl.constexpr, STRIDES: tl.constexpr):
    """Where the elements at (m, c, a, s) lie in an operand."""
    return (
        offset(at[0], SPACE[0], STRIDES[0])
        + offset(at[1], SPACE[1], STRIDES[1])
        + offset(at[2], SPACE[2], STRIDES[2])
        + offset(at[3], SPACE[3], STRIDES[3])
    )


@triton.jit
def lanes(start, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """start, start + 1, ...: 64-bit where an operand's offsets need it."""
    i = tl.arange(0, BLOCK)
    if WIDE:
        i = i.to(tl.int64)
    return start + i


@triton.jit
def widened(i, WIDE: tl.constexpr):
    return i.to(tl.int64) if WIDE else i


@triton.jit
def kept(
    m_start, c_start, SPACE: tl.constexpr, N0, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr
):
    """m, c and their mask for the first axis of a tile; the coordinate it does not run along is a scalar."""
    if ALONG_M:
        m = lanes(m_start, BLOCK_K, WIDE)[:, None, None]
        return m, c_start, m < extent(SPACE[0], N0)
    c = lanes(c_start, BLOCK_K, WIDE)[:, None, None]
    return m_start, c, c < extent(SPACE[1], N0)


@triton.jit
def kept_block(i, SPACE: tl.constexpr, N0, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr):
    """kept() of the i-th block; blocks are counted along the tile's axis first."""
    i = widened(i, WIDE)
    if ALONG_M:
        inside = tl.cdiv(extent(SPACE[0], N0), BLOCK_K)
        return kept((i % inside) * BLOCK_K, i // inside, SPACE, N0, ALONG_M, BLOCK_K, WIDE)
    inside = tl.cdiv(extent(SPACE[1], N0), BLOCK_K)
    return kept(i // inside, (i % inside) * BLOCK_K, SPACE, N0, ALONG_M, BLOCK_K, WIDE)


@triton.jit
def reduced_a(start, SPACE: tl.constexpr, N0, BLOCK_A: tl.constexpr, WIDE: tl.constexpr):
    a = lanes(start, BLOCK_A, WIDE)[None, :, None]
    return a, a < extent(SPACE[2], N0)


@triton.jit
def reduced_s(start, SPACE: tl.constexpr, N0, BLOCK_S: tl.constexpr, WIDE: tl.constexpr):
    s = lanes(start, BLOCK_S, WIDE)[None, None, :]
    return s, s < extent(SPACE[3], N0)


@triton.jit
def load(ptr, o, mask, ACC: tl.constexpr):
    return tl.load(ptr + o, mask=mask, other=0.0).to(ACC)


@triton.jit
def store(ptr, o, value, mask):
    tl.store(ptr + o, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def total(t):
    """Sum of a tile over a and s: [BLOCK_K, BLOCK_A, BLOCK_S] -> [BLOCK_K, 1, 1]."""
    return tl.sum(tl.sum(t, 2, keep_dims=True), 1, keep_dims=True)
