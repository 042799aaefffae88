"""PyTorch's own norms for tensors of a CPU that no kernel runs on: many times faster than the formula.

They lose digits where a mean is many deviations away from 0, and of equal numbers they may leave something.  Their own
statistics tell: where they do, the formula is taken, so that values are as good as anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from . import reference, rules
from .activations import ACTIVATIONS
from .norm import Norm, Operands, laid_out
from .rules import Rule

FAR = 8.0
"""Deviations that a mean may be away from 0: PyTorch's functions then lose three of float32's 24 bits."""
_MOST = FAR * (1 + 4 * torch.finfo(torch.float32).eps)
"""sqrt(eps) times 1 / sqrt(eps), each rounded, is 1 but for a few ulps."""


def normalize(
    rule: Rule, norm: Norm, operands: Operands, arguments: tuple[Any, ...], eps: float, momentum: float | Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """-> y and x + pre_add; running statistics have moved.  None, and nothing has, where PyTorch's function is not as
    good as the formula, or has no such case.  Operands: those of a call that is `suitable`.
    """
    x, pre_add = operands.x, operands.pre_add
    total = x if pre_add is None else x + pre_add
    y = _OWN[rule](norm, operands._replace(x=total, pre_add=None, post_add=None), arguments, eps, momentum)
    return None if y is None else (finished(y, norm, operands), total)


def suitable(rule: Rule, norm: Norm, operands: Operands, out_dtype: torch.dtype | None) -> bool:
    """Whether PyTorch has a function for such operands whose arithmetic is the formula's: in float32 or float64
    throughout, for half precision rounds in between; and whether it keeps the strides of x."""
    x = operands.x
    dense = x.is_contiguous() or (rule in (rules.batch_norm, rules.group_norm) and any(
        x.dim() == rank and x.is_contiguous(memory_format=order)
        for rank, order in ((4, torch.channels_last), (5, torch.channels_last_3d))
    ))  # fmt: skip
    return (
        rule in _OWN and dense and x.numel() > 0 and not norm.round_first
        and x.dtype in (torch.float32, torch.float64) and out_dtype in (None, x.dtype)
        and all(t is None or t.dtype == x.dtype for t in operands)
    )  # fmt: skip


def finished(y: Tensor, norm: Norm, operands: Operands) -> Tensor:
    """act(y + post_add)"""
    if operands.post_add is not None:
        y = y + operands.post_add
    return ACTIVATIONS[norm.activation].function(y)


def sizes(normalized_shape: int | tuple[int, ...]) -> list[int]:
    """As PyTorch's operators take it."""
    given = normalized_shape if isinstance(normalized_shape, tuple) else (normalized_shape,)
    return [int(n) for n in given]


def _lost(mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """Of each group, more than _MOST where its mean is FAR or its numbers are equal (rstd is 1 / sqrt(eps)), but for
    0."""
    return mean.detach().abs().add_(FAR * sqrt(max(eps, 0.0))).mul_(rstd.detach())


def _sound(mean: Tensor, rstd: Tensor, eps: float) -> bool:
    return _lost(mean, rstd, eps).max().item() <= _MOST  # not where it is NaN


def _layer(norm: Norm, o: Operands, arguments: tuple[Any, ...], eps: float, _: Any) -> Tensor:
    shape = sizes(arguments[0])
    y, mean, rstd = torch.native_layer_norm(o.x, shape, o.weight, o.bias, eps)
    if _sound(mean, rstd, eps):
        return y
    # Row by row, for the bits of none depend on the others.
    rows = o.x.reshape(-1, *shape)
    sound = (_lost(mean, rstd, eps) <= _MOST).flatten()
    by_ours = o._replace(x=rows[~sound])
    ours = rules.layer_norm(by_ours, tuple(shape))
    parts = (
        torch.native_layer_norm(rows[sound], shape, o.weight, o.bias, eps)[0],
        reference.normalize(ours, eps, laid_out(ours, by_ours))[0],
    )
    order = torch.argsort(~sound, stable=True)
    return torch.cat(parts)[torch.argsort(order)].reshape(o.x.shape)


def _rms(norm: Norm, o: Operands, arguments: tuple[Any, ...], eps: float, _: Any) -> Tensor:
    return torch.rms_norm(o.x, sizes(arguments[0]), o.weight, eps)


def _group(norm: Norm, o: Operands, arguments: tuple[Any, ...], eps: float, _: Any) -> Tensor | None:
    batch, channels, *spatial = o.x.shape
    y, mean, rstd = torch.native_group_norm(
        o.x, o.weight, o.bias, batch, channels, prod(spatial), int(arguments[0]), eps
    )
    return y if _sound(mean, rstd, eps) else None


def _batch(norm: Norm, o: Operands, arguments: tuple[Any, ...], eps: float, momentum: Any) -> Tensor | None:
    running = o[5:]
    if norm.given:
        mean, var = running
        assert mean is not None and var is not None
        if not _sound(mean, torch.rsqrt(var + eps), 0.0):
            return None
        if torch.is_grad_enabled():  # a copy: running statistics may move on before the backward
            mean, var = mean.clone(), var.clone()
        return torch.native_batch_norm(o.x, o.weight, o.bias, mean, var, False, 0.0, eps)[0]
    # Copies: PyTorch would keep these for the backward, and not tell that it moved them.
    moved_mean, moved_var = (t if t is None else t.clone() for t in running)
    step = 0.0 if momentum is None else float(momentum)
    y, mean, rstd = torch.native_batch_norm(o.x, o.weight, o.bias, moved_mean, moved_var, True, step, eps)
    if not _sound(mean, rstd, eps):
        return None
    for t, value in zip(running, (moved_mean, moved_var), strict=True):
        if t is not None and value is not None:
            t.copy_(value)
    return y


def _instance(norm: Norm, o: Operands, arguments: tuple[Any, ...], eps: float, momentum: Any) -> Tensor | None:
    if norm.given:
        return _batch(norm, o, arguments, eps, momentum)
    if o.running_mean is not None:
        return None
    samples, channels, *spatial = o.x.shape
    weight, bias = (t if t is None else t.repeat(samples) for t in (o.weight, o.bias))
    planes = o.x.reshape(1, samples * channels, *spatial)
    y = _batch(norm, Operands(planes, weight, bias), arguments, eps, None)
    return None if y is None else y.reshape(o.x.shape)


_OWN: dict[Rule, Callable[..., Tensor | None]] = {
    rules.layer_norm: _layer, rules.rms_norm: _rms, rules.group_norm: _group, rules.batch_norm: _batch,
    rules.instance_norm: _instance,
}  # fmt: skip
