"""The formula in plain PyTorch: the specification, the oracle of the tests, and what a plain CPU tensor runs on.

s = x + pre_add      mean = E[s]      rstd = 1/sqrt(E[(s - mean)^2] + eps)      (RMS: mean = 0)
y = act((s - mean) * rstd * weight + bias + post_add)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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


def check_activation(name: str | None) -> None:
    """Raises ValueError, naming the known ones, unless `name` is None or an activation."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected None or one of {', '.join(ACTIVATIONS)}")


def _as(t: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Normalise x over `axes`; autograd flows to x, weight, bias, pre_add and post_add.

    Statistics and all arithmetic are float32 (float64 where s is), the variance is the biased one.

    Args:
        x: any shape and strides.
        axes: axes to average over, negative ones allowed.
        weight, bias, pre_add, post_add: broadcast against x.
        center: False for RMS: no mean is subtracted and the second moment is E[s^2].
        mean, var: statistics to use instead of x's, broadcastable against x.

    Returns:
        ``(y, s, mean, rstd)``: y with x's dtype and memory format; s = x + pre_add, rounded to
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
    s = x if pre_add is None else _as(x + pre_add, torch.result_type(x, pre_add), x)
    work = torch.float64 if s.dtype == torch.float64 else torch.float32
    h = s.to(work)
    if center:
        mean = h.mean(axes, keepdim=True) if mean is None else mean.to(work)
        h = h - mean
    else:
        mean = None
    var = h.square().mean(axes, keepdim=True) if var is None else var.to(work)
    rstd = torch.rsqrt(var + eps)
    h = h * rstd
    if weight is not None:
        h = h * weight.to(work)
    for term in (bias, post_add):
        if term is not None:
            h = h + term.to(work)
    return _as(ACTIVATIONS[activation or "identity"](h), x.dtype, x), s, mean, rstd


def _fits(shape: Sequence[int], target: Sequence[int]) -> bool:
    trailing = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(n in (1, m) for n, m in trailing)
