"""Moments: rstd, and the merge of partial means and squares."""

import triton
import triton.language as tl

from .tile import rounded


@triton.jit
def reciprocal_root(v):
    # rsqrt of fp64 is an approximation on the device.
    if v.dtype == tl.float64:
        r = 1.0 / tl.sqrt(v)
    else:
        r = tl.rsqrt(v)
    return r


@triton.jit
def count(n, ACC: tl.constexpr):
    """An extent as a number of the accumulator's type."""
    return tl.full((), n, ACC)


@triton.jit
def update_running(ptr, i, value, momentum, mask, ACC: tl.constexpr):
    """running[i] = (1 - momentum) * running[i] + momentum * value"""
    old = tl.load(ptr + i, mask=mask, other=0.0).to(ACC)
    f = tl.full((), momentum, ACC)
    tl.store(ptr + i, rounded(old + f * (value - old), ptr.dtype.element_ty), mask=mask)
