"""Loads and stores of the elements of a tile."""

import triton
import triton.language as tl

from .elements import widen
from .tile import Tile, both, coordinates, mask_of, mask_parameters, offsets, zeros

# Hints to L2: to hold what is read or written for a second read, to drop it after the last one, none.
EVICT_LAST = tl.constexpr("evict_last")
EVICT_FIRST = tl.constexpr("evict_first")
ANY = tl.constexpr("")


@triton.jit
def clamped(t, F: tl.constexpr):
    """The tile as it is read: past the end of a, where CLAMP_A, the last point again, which costs no mask."""
    at = t.at
    if F.CLAMP_A:
        at = (at[0], at[1], tl.minimum(at[2], t.n_a - 1), at[3])
    return Tile(at=at, mk=t.mk, n_a=t.n_a, n_s=t.n_s)


@triton.jit
def mask_read(t, PIECE: tl.constexpr, F: tl.constexpr):
    """Which elements of a piece are read."""
    return both(None, None) if F.CLAMP_A else mask_of(t, PIECE, F)


@triton.jit
def pointers(ptr, t, PIECE: tl.constexpr, STRIDES: tl.constexpr, F: tl.constexpr):
    """Where the elements of a piece lie: at a constant distance from the first piece's, where there is one."""
    STEPS: tl.constexpr = STRIDES[2 if F.PIECES_A else 3]
    if len(STEPS) == 1:
        DISTANCE: tl.constexpr = STEPS[0] * PIECE * (F.BLOCK_A if F.PIECES_A else F.BLOCK_S)
        p = (ptr + offsets(t.at, STRIDES, F)) + DISTANCE
    else:
        p = ptr + offsets(coordinates(t, PIECE, F), STRIDES, F)
    return p


@triton.jit
def load(ptr, t, PIECE: tl.constexpr, STRIDES: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr = ANY):
    """Elements of a piece as they are in memory, 0 outside (or anything, where CLAMP_A).

    KEEP: EVICT_LAST, EVICT_FIRST or ANY.
    """
    p = pointers(ptr, clamped(t, F), PIECE, STRIDES, F)
    # Where the operand does not vary, too, there is one for each lane.
    p, _ = tl.broadcast(p, zeros(F.BLOCK_K, F.BLOCK_A, F.BLOCK_S, tl.int1))
    mask = mask_read(t, PIECE, F)
    if mask is None:
        v = tl.load(p, eviction_policy=KEEP)
    else:
        p, mask = tl.broadcast(p, mask)
        v = tl.load(p, mask=mask, other=0.0, eviction_policy=KEEP)
    return v


@triton.jit
def save(ptr, value, t, PIECE: tl.constexpr, STRIDES: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr = ANY):
    """Store the elements of a piece."""
    store(pointers(ptr, t, PIECE, STRIDES, F), 0, value, mask_of(t, PIECE, F), KEEP)


@triton.jit
def load_at(ptr, at, STRIDES: tl.constexpr, mask, F: tl.constexpr, SHARED: tl.constexpr = False):
    """Elements in their own shape, which may be smaller than the mask's where the operand does not vary.

    SHARED: they were stored by a program of this launch, so past L1, which is not coherent.
    """
    return load_from(ptr + offsets(at, STRIDES, F), mask, SHARED).to(F.ACC)


@triton.jit
def load_from(p, mask, SHARED: tl.constexpr = False):
    if mask is None:
        v = tl.load(p, cache_modifier=".cg" if SHARED else "")
    else:
        p, mask = tl.broadcast(p, mask)
        v = tl.load(p, mask=mask, other=0.0, cache_modifier=".cg" if SHARED else "")
    return v


@triton.jit
def load_parameter(ptr, t, PIECE: tl.constexpr, F: tl.constexpr):
    """w or b of a piece."""
    W: tl.constexpr = F.W
    ROWS: tl.constexpr = F.PIECES_A and F.BLOCK_S == 1 and not F.KEPT_FIRST
    p = ptr + offsets(coordinates(t, PIECE, F), W, F)
    if ROWS:
        # A warp that has rows of its own reads w and b for itself, as it reads x: no way through shared memory.
        BYTES: tl.constexpr = F.ACCESS * ptr.dtype.element_ty.primitive_bitwidth // 8
        p, _ = tl.broadcast(tl.multiple_of(p, (1, BYTES, 1)), zeros(F.BLOCK_K, F.BLOCK_A, 1, tl.int1))
    v = load_from(p, mask_parameters(t, PIECE, F))
    # In pairs where each thread has two for certain: of 16 warps, if rows are no pieces.
    return widen(v, F) if ROWS or (F.BLOCK_A >= 1024 and F.BLOCK_S == 1) else v.to(F.ACC)


@triton.jit
def load_kept(ptr, t, F: tl.constexpr, SHARED: tl.constexpr = False):
    """A statistic of a tile's groups."""
    STAT: tl.constexpr = F.STAT
    return load_at(ptr, (t.at[0], t.at[1], 0, 0), STAT, None if F.FULL_K else t.mk, F, SHARED)


@triton.jit
def load_shared(ptr, o, mask):
    """What another program of the same launch stored."""
    return tl.load(ptr + o, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """value in another type; to bfloat16 by way of fp32: the interpreter makes nonsense of fp64."""
    if value.dtype == tl.float64 and dtype == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def store(ptr, o, value, mask, KEEP: tl.constexpr = ANY):
    p, value = tl.broadcast(ptr + o, rounded(value, ptr.dtype.element_ty))
    if mask is None:
        tl.store(p, value, eviction_policy=KEEP)
    else:
        p, m = tl.broadcast(p, mask)
        tl.store(p, value, mask=m, eviction_policy=KEEP)
