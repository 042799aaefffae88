"""Sums over a tile."""

import triton
import triton.language as tl

from .elements import add_pairs, least


@triton.jit
def plus(s, v):
    """s + v, where s may be None: nothing was added up yet."""
    return v if s is None else s + v


@triton.jit
def halves(v, A: tl.constexpr, K: tl.constexpr):
    """[A, K] -> [A, 1]: a sum of what different warps hold.

    Not tl.sum: on its way through shared memory all lanes of a warp would meet in few banks.
    """
    if K == 1:
        w = v
    else:
        p, q = tl.split(tl.reshape(v, (A, K // 2, 2)))
        w = halves(p + q, A, K // 2)
    return w


@triton.jit
def of_lanes(v, F: tl.constexpr):
    """[BLOCK_K, A, 1] -> [BLOCK_K / LANE, A, 1]: sums of the neighbours that a lane holds."""
    if F.LANE > 1:
        v = tl.sum(tl.reshape(v, (F.BLOCK_K // F.LANE, F.LANE, F.BLOCK_A)), 1)
        v = tl.reshape(v, (F.BLOCK_K // F.LANE, F.BLOCK_A, 1))  # not v[:, :, None], which costs a change of layout
    return v


@triton.jit
def joined(v, N: tl.constexpr):
    """A tuple of up to N tensors of one shape -> one of N times the elements, counted by further axes of 2, with zeros
    for those that are not there; N: a power of two.  A lane keeps what it has."""
    if N == 1:
        w = v[0]
    else:
        pairs = ()
        for i in tl.static_range(N // 2):
            if i + N // 2 < len(v):
                pairs = pairs + (tl.join(v[i], v[i + N // 2]),)
            else:
                pairs = pairs + (tl.join(v[i], tl.zeros_like(v[i])),)
        w = joined(pairs, N // 2)
    return w


@triton.jit
def side_by_side(v, F: tl.constexpr):
    """A tuple of pieces [K, A, 1] -> [K, A, P], P the next power of two."""
    P: tl.constexpr = triton.next_power_of_2(F.PIECES)
    return tl.reshape(joined(v, P), (v[0].shape[0], v[0].shape[1], P))


@triton.jit
def over_rows(v, P: tl.constexpr, F: tl.constexpr):
    """[BLOCK_K / LANE, BLOCK_A, P] -> [1, BLOCK_A, P]: the sum over rows, which are those of different warps, or over
    the lanes of each warp."""
    if F.LANE > 1:
        v = tl.sum(v, 0, keep_dims=True)
    else:
        v = halves(tl.trans(tl.reshape(v, (F.BLOCK_K, F.BLOCK_A * P))), F.BLOCK_A * P, F.BLOCK_K)
        v = tl.reshape(v, (1, F.BLOCK_A, P))
    return v


@triton.jit
def along_columns(v, K: tl.constexpr, S: tl.constexpr):
    """[K, 1, S] -> [K, 1, 1], the sum along columns: by each of four warps for itself, then over these."""
    if S > 4:
        v = tl.sum(tl.reshape(v, (K, 4, S // 4)), 2)
    WARPS: tl.constexpr = least(S, 4)
    return tl.reshape(halves(tl.reshape(v, (K, WARPS)), K, WARPS), (K, 1, 1))


@triton.jit
def total(v, K: tl.constexpr):
    """Sum over all but the first axis: [K, A, S] -> [K, 1, 1], or a number where K is 1."""
    if K == 1:
        v = tl.sum(v)
    else:
        v = tl.sum(tl.sum(v, 2, keep_dims=True), 1, keep_dims=True)
    return v


@triton.jit
def sum_along(v, AXIS: tl.constexpr, F: tl.constexpr):
    """Sum over an axis of a tile."""
    if F.KEPT_FIRST and F.BLOCK_K > 1 and (F.BLOCK_S if AXIS == 1 else F.BLOCK_A) == 1:
        v = along_columns(v, F.BLOCK_K, F.BLOCK_A if AXIS == 1 else F.BLOCK_S)
    else:
        v = tl.sum(v, AXIS, keep_dims=True)
    return v


@triton.jit
def sums_along(v, u, AXIS: tl.constexpr, F: tl.constexpr):
    """Sums of both along an axis: one round of shuffles and barriers for two."""
    if F.PTX and not (F.KEPT_FIRST and (F.BLOCK_S if AXIS == 1 else F.BLOCK_A) == 1):
        v, u = tl.reduce((v, u), AXIS, add_pairs, keep_dims=True)
    else:
        v = sum_along(v, AXIS, F)
        u = sum_along(u, AXIS, F)
    return v, u


@triton.jit
def tile_total(v, F: tl.constexpr):
    """total() of a tile."""
    if F.BLOCK_K == 1:
        v = tl.sum(v)
    else:
        if F.BLOCK_S > 1:
            v = sum_along(v, 2, F)
        if F.BLOCK_A > 1:
            v = sum_along(v, 1, F)
    return v


@triton.jit
def totals(v, u, F: tl.constexpr):
    """tile_total() of two tiles."""
    if F.BLOCK_K > 1:
        if F.BLOCK_S > 1:
            v, u = sums_along(v, u, 2, F)
        if F.BLOCK_A > 1:
            v, u = sums_along(v, u, 1, F)
    elif F.PTX:
        v, u = tl.reduce((v, u), None, add_pairs)
    else:
        v = tl.sum(v)
        u = tl.sum(u)
    return v, u


@triton.jit
def by_group(v, F: tl.constexpr):
    """[BLOCK_K, 1, 1] of columns -> at every column, the sum over the columns of its group."""
    PER: tl.constexpr = F.FOLD[0]
    GROUPS: tl.constexpr = F.FOLD[2]
    if PER > 1:
        here = tl.arange(0, F.BLOCK_K)[:, None, None] // PER == tl.arange(0, GROUPS)[None, :, None]
        sums = tl.sum(tl.where(here, v, 0.0), 0, keep_dims=True)
        v = tl.sum(tl.where(here, sums, 0.0), 1, keep_dims=True)
    return v
