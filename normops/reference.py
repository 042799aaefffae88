"""The formula in plain PyTorch: the specification, the oracle of the tests, and what a plain CPU tensor runs on.

s = x + pre_add      mean = E[s]      rstd = 1/sqrt(E[(s - mean)^2] + eps)      (RMS: mean = 0)
y = act((s - mean) * rstd * weight + bias + post_add)

Its gradient too, of operations that PyTorch differentiates again: tangents and second derivatives come from them.
Statistics and all arithmetic are float32 (float64 where s is), the variance is the biased one.  Operands are as
:func:`normops.norm.laid_out` leaves them; mean and rstd have the shape ``norm.kept_shape``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .norm import Norm, Operands, Sizes, accumulator


def as_like(t: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
    """t in x's shape, in a dtype and with the strides of ``torch.empty_like(x)``, differentiably."""
    t = t.reshape(x.shape).to(dtype)
    if t.stride() == torch.empty_like(x, device="meta").stride():
        return t
    return torch.empty_like(x, dtype=dtype).copy_(t)


def normalize(
    norm: Norm, eps: float, operands: Operands, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """-> y, s, mean and rstd; autograd flows to x, weight, bias, pre_add and post_add.

    y has x's memory format and dtype, or `out_dtype`; s = x + pre_add is rounded to ``torch.result_type(x, pre_add)``
    before the statistics (x itself without pre_add); mean is None for RMS.
    """
    x, _, _, pre_add, _, given_mean, given_var = operands
    s = x if pre_add is None else as_like(total := x + pre_add, total.dtype, x)
    h = _split(s, norm, accumulator(s.dtype))
    mean = None
    if norm.center:
        mean, h = _centred(h, norm.reduced, _statistic(given_mean, norm, h.dtype))
    var = _statistic(given_var, norm, h.dtype)
    rstd = torch.rsqrt((h.square().mean(norm.reduced, keepdim=True) if var is None else var) + eps)
    xhat = h * rstd
    if norm.round_first:
        xhat = xhat.to(s.dtype).to(h.dtype)
    y = ACTIVATIONS[norm.activation].function(_affine(xhat, norm, operands))
    mean = None if mean is None else mean.reshape(norm.kept_shape)
    return as_like(y, out_dtype or x.dtype, x), s, mean, rstd.reshape(norm.kept_shape)


def gradients(
    norm: Norm, eps: float, operands: Operands, dy: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """-> ds, dweight, dbias, dpost_add (g, in the dtype of the statistics) of :func:`normalize`, for one of y.

        g = dy act'(z)      dweight = sum g xhat      dbias = sum g
        ds = rstd (g weight - E[g weight] - xhat E[g weight xhat])

    operands.x is s.  `mean` and `rstd`: those of s, computed again (and differentiable) where rstd is None; where they
    were given they are no functions of s, which leaves rstd g weight.
    """
    s, weight, bias, *_ = operands
    xhat, scale = _standardised(norm, eps, s, mean, rstd)
    g = _through(_split(dy, norm, xhat.dtype), xhat, norm, operands)
    h = g if weight is None else g * _parameter(weight, norm, g.dtype)
    ds = as_like(_projected(h, xhat, scale, norm), s.dtype, s)
    return ds, _summed(g * xhat, weight, norm), _summed(g, bias, norm), as_like(g, g.dtype, s)


def variance(norm: Norm, s: Tensor) -> Tensor:
    """The biased variance of s, of deviations from its mean."""
    s = _split(s.detach(), norm, accumulator(s.dtype))
    return torch.var(s, norm.reduced, correction=0).reshape(norm.kept_shape)


def track(operands: Operands, mean: Tensor, var: Tensor, momentum: float | Tensor) -> None:
    """Move running statistics towards mean and var of x, the biased one, made unbiased; the mean over the batch where
    x has several for each."""
    n = operands.x.numel() // mean.numel()
    with torch.no_grad():
        for running, value in ((operands.running_mean, mean), (operands.running_var, var * (n / (n - 1)))):
            assert running is not None
            value = value.reshape(-1, running.numel()).mean(0).to(running.dtype)
            running.lerp_(value, momentum.to(running.dtype) if isinstance(momentum, Tensor) else float(momentum))


def _split(t: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    return t.reshape(norm.shape).to(dtype)


def _statistic(t: Tensor | None, norm: Norm, dtype: torch.dtype) -> Tensor | None:
    """mean or rstd with averaged axes of size 1."""
    sizes = [1 if i in norm.reduced else n for i, n in enumerate(norm.shape)]
    return None if t is None else t.reshape(sizes).to(dtype)


def _parameter(t: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """weight or bias along its axes of the split shape."""
    shape, affine = norm.shape, norm.affine
    order = sorted(range(len(affine)), key=lambda i: affine[i])
    sizes = [n if i in affine else 1 for i, n in enumerate(shape)]
    return t.reshape([shape[i] for i in affine]).permute(order).reshape(sizes).to(dtype)


def _summed(t: Tensor, like: Tensor | None, norm: Norm) -> Tensor | None:
    """The sum over all axes along which a parameter does not vary, in the parameter's shape and dtype."""
    if like is None:
        return None
    others = [i for i in range(t.dim()) if i not in norm.affine]
    t = t.sum(others) if others else t
    order = [sorted(norm.affine).index(i) for i in norm.affine]
    return t.permute(order).reshape(like.shape).to(like.dtype).contiguous()


def _centred(h: Tensor, axes: Sizes, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """mean, h - mean.

    Of the differences from a number near the mean, which is found from the differences from the first element: numbers
    far from 0 lose nothing, and of equal ones all differences are 0.  Neither depends on the number, so that it may be
    a constant to autograd.
    """
    if mean is not None:
        return mean, h - mean
    plain = h.detach()
    first = plain[tuple(slice(0, 1) if i in axes else slice(None) for i in range(h.dim()))]
    first = first.mean(axes, keepdim=True)  # itself; NaN where there is none
    near = first + (plain - first).mean(axes, keepdim=True)
    h = h - near
    rest = h.mean(axes, keepdim=True)
    return near + rest, h - rest


def _standardised(
    norm: Norm, eps: float, s: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """xhat and rstd."""
    h = _split(s, norm, accumulator(s.dtype))
    if norm.center:
        _, h = _centred(h, norm.reduced, _statistic(mean, norm, h.dtype))
    scale = _statistic(rstd, norm, h.dtype)
    if scale is None:
        scale = torch.rsqrt(h.square().mean(norm.reduced, keepdim=True) + eps)
    return h * scale, scale


def _affine(xhat: Tensor, norm: Norm, operands: Operands) -> Tensor:
    _, weight, bias, _, post_add, *_ = operands
    if weight is not None:
        xhat = xhat * _parameter(weight, norm, xhat.dtype)
    if bias is not None:
        xhat = xhat + _parameter(bias, norm, xhat.dtype)
    return xhat if post_add is None else xhat + _split(post_add, norm, xhat.dtype)


def _through(g: Tensor, xhat: Tensor, norm: Norm, operands: Operands) -> Tensor:
    """g act'(z)"""
    if norm.activation == "identity":
        return g
    return g * ACTIVATIONS[norm.activation].derivative(_affine(xhat, norm, operands))


def _projected(h: Tensor, xhat: Tensor, rstd: Tensor, norm: Norm) -> Tensor:
    """rstd (h - E[h] - xhat E[h xhat]): the derivative of xhat, a symmetric map."""
    if norm.given:
        return rstd * h
    c1 = (h * xhat).mean(norm.reduced, keepdim=True)
    return rstd * ((h - h.mean(norm.reduced, keepdim=True) if norm.center else h) - xhat * c1)
