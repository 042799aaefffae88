"""The formula in plain PyTorch: the specification, the oracle of the tests, and what a plain CPU tensor runs on.

s = x + pre_add      mean = E[s]      rstd = 1/sqrt(E[(s - mean)^2] + eps)      (RMS: mean = 0)
y = act((s - mean) * rstd * weight + bias + post_add)

Its gradient and its tangent too, of operations that PyTorch differentiates again: second derivatives come from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.01),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    """Phi(z) + z phi(z)."""
    return 0.5 * (1 + torch.erf(z * sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / sqrt(2 * pi)


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    k, c = sqrt(2 / pi), 0.044715
    t = torch.tanh(k * (z + c * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * c * z * z)


# Of all but identity.  Not those of ATen (silu_backward ...): some of them have no derivative of their own.
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: (z > 0).to(z.dtype),
    "leaky_relu": lambda z: torch.ones_like(z).masked_fill(z <= 0, 0.01),
    "silu": _silu_derivative,
    "gelu": _gelu_derivative,
    "gelu_tanh": _gelu_tanh_derivative,
    "sigmoid": lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z)),
    "tanh": lambda z: 1 - torch.tanh(z).square(),
    "hardswish": lambda z: torch.where(z <= -3, 0, torch.where(z < 3, z / 3 + 0.5, 1)).to(z.dtype),
}


def check_activation(name: str | None) -> None:
    """Raises ValueError, naming the known ones, unless `name` is None or an activation."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected None or one of {', '.join(ACTIVATIONS)}")


def as_like(t: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
    """t in a dtype and with the strides of ``torch.empty_like(x)``, differentiably."""
    t = t.to(dtype)
    if t.stride() == torch.empty_like(x, device="meta").stride():
        return t
    return torch.empty_like(x, dtype=dtype).copy_(t)


def normalize(
    x: Tensor,
    axes: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    center: bool = True,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Normalise x over `axes`; autograd flows to x, weight, bias, pre_add and post_add.

    Statistics and all arithmetic are float32 (float64 where s is), the variance is the biased one.

    Args:
        x: any shape and strides.
        axes: axes to average over, negative ones allowed.
        weight, bias, pre_add, post_add: broadcast against x.
        center: False for RMS: no mean is subtracted and the second moment is E[s^2].
        mean, var: statistics to use instead of x's, broadcastable against x.
        out_dtype: the dtype of y, x's without.

    Returns:
        ``(y, s, mean, rstd)``: y with x's memory format; s = x + pre_add, rounded to
        ``torch.result_type(x, pre_add)`` before the statistics (x itself without pre_add); mean (None unless `center`)
        and rstd with the averaged axes kept as size 1.

    Raises:
        ValueError: unknown activation, a pre_add or parameter that is larger than x, or no axes and no statistics.
    """
    check_activation(activation)
    operands = {"weight": weight, "bias": bias, "pre_add": pre_add, "post_add": post_add, "mean": mean, "var": var}
    for name, t in operands.items():
        if t is not None and not _fits(t.shape, x.shape):
            raise ValueError(f"{name} of shape {tuple(t.shape)} does not broadcast to x's shape {tuple(x.shape)}")
    if not axes and (var is None or (center and mean is None)):
        raise ValueError("axes is empty: nothing to average over")
    axes = tuple(axes)
    s = x if pre_add is None else as_like(total := x + pre_add, total.dtype, x)
    work = _work(s)
    h = s.to(work)
    if center:
        mean, h = _centred(h, axes) if mean is None else (mean.to(work), h - mean.to(work))
    else:
        mean = None
    var = h.square().mean(axes, keepdim=True) if var is None else var.to(work)
    rstd = torch.rsqrt(var + eps)
    y = ACTIVATIONS[activation or "identity"](_affine(h * rstd, weight, bias, post_add))
    return as_like(y, out_dtype or x.dtype, x), s, mean, rstd


def gradients(
    dy: Tensor,
    s: Tensor,
    axes: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    center: bool = True,
    activation: str | None = None,
    post_add: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    given: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """-> ds, dweight, dbias, dpost_add (g, in the dtype of the statistics) of :func:`normalize`, for one of y.

        g = dy act'(z)      dweight = sum g xhat      dbias = sum g
        ds = rstd (g weight - E[g weight] - xhat E[g weight xhat])

    `mean` and `rstd`: those of s, computed again (and differentiable) where they are None; with `given` they are no
    functions of s, which leaves rstd g weight.  Other arguments as in `normalize`.
    """
    work = _work(s)
    xhat, scale = _standardised(s.to(work), axes, eps, center, mean, rstd)
    g = _through(dy.to(work), xhat, weight, bias, post_add, activation)
    dweight = None if weight is None else (g * xhat).sum_to_size(weight.shape).to(weight.dtype)
    dbias = None if bias is None else g.sum_to_size(bias.shape).to(bias.dtype)
    h = g if weight is None else g * weight.to(work)
    return as_like(_projected(h, xhat, scale, axes, center, given), s.dtype, s), dweight, dbias, g


def tangent(
    s: Tensor,
    axes: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    post_add: Tensor | None,
    tangents: Sequence[Tensor | None],
    *,
    eps: float = 1e-5,
    center: bool = True,
    activation: str | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    given: bool = False,
) -> Tensor:
    """The tangent of y, in the dtype of the statistics, for those of s, weight, bias and post_add.

    z' = xhat' weight + xhat weight' + bias' + post_add'      y' = act'(z) z'
    xhat' = rstd (s' - E[s'] - xhat E[xhat s'])
    """
    work = _work(s)
    ds, dweight, dbias, dpost = (None if t is None else t.to(work) for t in tangents)
    xhat, scale = _standardised(s.to(work), axes, eps, center, mean, rstd)
    dz = torch.zeros_like(xhat)
    if ds is not None:
        dz = _projected(ds, xhat, scale, axes, center, given)
        dz = dz if weight is None else dz * weight.to(work)
    for term in (None if dweight is None else xhat * dweight, dbias, dpost):
        if term is not None:
            dz = dz + term
    return _through(dz, xhat, weight, bias, post_add, activation)


def _work(s: Tensor) -> torch.dtype:
    return torch.float64 if s.dtype == torch.float64 else torch.float32


def _centred(h: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """mean, h - mean.

    Of the differences from a number near the mean, which is found from the differences from the first element: numbers
    far from 0 lose nothing, and of equal ones all differences are 0.  Neither depends on the number, so that it may be
    a constant to autograd.
    """
    axes = tuple(axes)
    reduced = {axis % h.dim() for axis in axes}
    plain = h.detach()
    first = plain[tuple(slice(0, 1) if i in reduced else slice(None) for i in range(h.dim()))]
    first = first.mean(axes, keepdim=True)  # itself; NaN where there is none
    near = first + (plain - first).mean(axes, keepdim=True)
    h = h - near
    rest = h.mean(axes, keepdim=True)
    return near + rest, h - rest


def _standardised(
    h: Tensor, axes: Sequence[int], eps: float, center: bool, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """xhat and rstd."""
    axes = tuple(axes)
    if center:
        h = _centred(h, axes)[1] if mean is None else h - mean
    if rstd is None:
        rstd = torch.rsqrt(h.square().mean(axes, keepdim=True) + eps)
    return h * rstd, rstd


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, post_add: Tensor | None) -> Tensor:
    if weight is not None:
        xhat = xhat * weight.to(xhat.dtype)
    for term in (bias, post_add):
        if term is not None:
            xhat = xhat + term.to(xhat.dtype)
    return xhat


def _through(
    g: Tensor, xhat: Tensor, weight: Tensor | None, bias: Tensor | None, post_add: Tensor | None, activation: str | None
) -> Tensor:
    """g act'(z)"""
    if activation in (None, "identity"):
        return g
    return g * DERIVATIVES[activation](_affine(xhat, weight, bias, post_add))


def _projected(h: Tensor, xhat: Tensor, rstd: Tensor, axes: Sequence[int], center: bool, given: bool) -> Tensor:
    """rstd (h - E[h] - xhat E[h xhat]): the derivative of xhat, a symmetric map."""
    if given:
        return rstd * h
    axes = tuple(axes)
    c1 = (h * xhat).mean(axes, keepdim=True)
    return rstd * ((h - h.mean(axes, keepdim=True) if center else h) - xhat * c1)


def _fits(shape: Sequence[int], target: Sequence[int]) -> bool:
    trailing = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(n in (1, m) for n, m in trailing)
