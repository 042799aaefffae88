"""What is done to a tile once its statistics are known, forward and backward."""

import triton
import triton.language as tl

from .tile import ANY, load, offsets, store


@triton.jit
def read_input(
    x_ptr, pre_ptr, sum_ptr, at, mask,
    SPACE: tl.constexpr, X: tl.constexpr, PRE: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr,
    KEEP: tl.constexpr = ANY,
):  # fmt: skip
    """x, or x + pre_add rounded to (and stored in) the type of the sum, so that the backward sees the same numbers."""
    if pre_ptr is None:
        x = load(x_ptr, offsets(at, SPACE, X), mask, ACC, KEEP)
    else:
        x = load(x_ptr, offsets(at, SPACE, X), mask, ACC)
        x = (x + load(pre_ptr, offsets(at, SPACE, PRE), mask, ACC)).to(sum_ptr.dtype.element_ty).to(ACC)
        store(sum_ptr, offsets(at, SPACE, SUM), x, mask, KEEP)
    return x


@triton.jit
def affine(xhat, w_ptr, b_ptr, at, mask, SPACE: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr):
    """xhat * w + b; w and b are loaded in their own shape, here, after the statistics (or the tile spills)."""
    if w_ptr is not None:
        xhat = xhat * load(w_ptr, offsets(at, SPACE, W), mask, ACC)
    if b_ptr is not None:
        xhat = xhat + load(b_ptr, offsets(at, SPACE, W), mask, ACC)
    return xhat


@triton.jit
def write_output(
    xhat, w_ptr, b_ptr, post_ptr, y_ptr, at, wmask, mask,
    SPACE: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, Y: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    KEEP: tl.constexpr = ANY,
):  # fmt: skip
    """y = act(xhat * w + b + post)"""
    z = affine(xhat, w_ptr, b_ptr, at, wmask, SPACE, W, ACC)
    if post_ptr is not None:
        z += load(post_ptr, offsets(at, SPACE, POST), mask, ACC)
    store(y_ptr, offsets(at, SPACE, Y), ACT(z), mask, KEEP)


@triton.jit
def read_gradient(
    x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean, rstd, at, wmask, mask,
    SPACE: tl.constexpr, X: tl.constexpr, DY: tl.constexpr, W: tl.constexpr, POST: tl.constexpr,
    ACT_GRAD: tl.constexpr, ACC: tl.constexpr, KEEP: tl.constexpr = ANY,
):  # fmt: skip
    """xhat and g = dy * act'(z); z is computed again. Lanes outside hold g = 0, so that sums of g need no mask."""
    x = load(x_ptr, offsets(at, SPACE, X), mask, ACC, KEEP)
    g = load(dy_ptr, offsets(at, SPACE, DY), mask, ACC, KEEP)
    xhat = (x - mean) * rstd
    if ACT_GRAD is not None:
        z = affine(xhat, w_ptr, b_ptr, at, wmask, SPACE, W, ACC)
        if post_ptr is not None:
            z += load(post_ptr, offsets(at, SPACE, POST), mask, ACC, KEEP)
        g = g * ACT_GRAD(z)
    return xhat, g


@triton.jit
def write_gradient(
    xhat, g, c1, c0, rstd, w_ptr, dsum_ptr, dx_ptr, dpost_ptr, at, wmask, mask,
    SPACE: tl.constexpr, W: tl.constexpr, DSUM: tl.constexpr, DX: tl.constexpr, DPOST: tl.constexpr, ACC: tl.constexpr,
    KEEP: tl.constexpr = ANY,
):  # fmt: skip
    """dx = rstd * (w * g - xhat * c1 - c0) + dsum; dpost = g"""
    if dpost_ptr is not None:
        store(dpost_ptr, offsets(at, SPACE, DPOST), g, mask, KEEP)
    if dx_ptr is not None:
        dx = rstd * (affine(g, w_ptr, None, at, wmask, SPACE, W, ACC) - xhat * c1 - c0)
        if dsum_ptr is not None:
            dx += load(dsum_ptr, offsets(at, SPACE, DSUM), mask, ACC)
        store(dx_ptr, offsets(at, SPACE, DX), dx, mask, KEEP)
