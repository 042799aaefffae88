"""Sums over a tile."""

import triton
import triton.language as tl

from .elements import add_pairs


@triton.jit
def plus(s, v):
    """s + v, where s may be None: nothing was added up yet."""
    return v if s is None else s + v


@triton.jit
def total(v, K: tl.constexpr):
    """Sum over all but the first axis: [K, A, S] -> [K, 1, 1], or a number where K is 1."""
    if K == 1:
        v = tl.sum(v)
    else:
        v = tl.sum(tl.sum(v, 2, keep_dims=True), 1, keep_dims=True)
    return v


@triton.jit
def sums_along(v, u, AXIS: tl.constexpr, F: tl.constexpr):
    """Sums of both along an axis: one round of shuffles and barriers for two."""
    if F.PTX:
        v, u = tl.reduce((v, u), AXIS, add_pairs, keep_dims=True)
    else:
        v = tl.sum(v, AXIS, keep_dims=True)
        u = tl.sum(u, AXIS, keep_dims=True)
    return v, u


@triton.jit
def totals(v, u, F: tl.constexpr):
    """total() of two tiles."""
    if F.BLOCK_K > 1:
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
