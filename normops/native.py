"""PyTorch's own norms for tensors of a CPU that no kernel runs on: many times faster than the formula.

They lose digits where a mean is many deviations away from 0, and of equal numbers they may leave something.  Their own
statistics tell: where they do, the formula is taken, so that values are as good as anywhere.  Their backward is given a
dy that lies in memory as x does, for it is wrong about some others; derivatives of that are the formula's.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, rules
from .activations import ACTIVATIONS
from .norm import Norm, Operands, laid_out
from .rules import Rule

aten: Any = torch.ops.aten

FAR = 8.0
"""Deviations that a mean may be away from 0: PyTorch's functions then lose three of float32's 24 bits."""
_MOST = FAR * (1 + 4 * torch.finfo(torch.float32).eps)
"""sqrt(eps) times 1 / sqrt(eps), each rounded, is 1 but for a few ulps."""


class Found(NamedTuple):
    """Of a forward."""

    y: Tensor
    mean: Tensor | None
    rstd: Tensor


class Given(NamedTuple):
    """All but tensors that a call is made of: its norm, without the activation, that norm's rule and what it takes."""

    rule: Rule
    norm: Norm
    arguments: tuple[Any, ...]
    eps: float


Three = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dx, dw and db."""
Mask = tuple[bool, bool, bool]


def suitable(rule: Rule, norm: Norm, operands: Operands, out_dtype: torch.dtype | None) -> bool:
    """Whether PyTorch has a function for such operands whose arithmetic is the formula's: in float32 or float64
    throughout, for half precision rounds in between; and whether it keeps the strides of x."""
    x = operands.x
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    dense = x.is_contiguous()
    if last and rule in (rules.batch_norm, rules.group_norm) and min(x.shape[1:]) > 1:  # else it means several orders
        dense = dense or x.is_contiguous(memory_format=last)
    return (
        rule in _OWN and dense and x.device.type == "cpu" and x.numel() > 0 and not norm.round_first
        and x.dtype in (torch.float32, torch.float64) and out_dtype in (None, x.dtype)
        and all(t is None or t.dtype == x.dtype for t in operands)
    )  # fmt: skip


def finished(y: Tensor, norm: Norm, operands: Operands) -> Tensor:
    """act(y + post_add)"""
    if operands.post_add is not None:
        y = y + operands.post_add
    return ACTIVATIONS[norm.activation].function(y)


def forward(given: Given, o: Operands, momentum: float | Tensor | None) -> Found | None:
    """Running statistics have moved; None, and they have not, where the formula is better or PyTorch has no such
    case.  Operands: x, weight, bias and running statistics of a call that is `suitable`."""
    return _OWN[given.rule][0](given, o, 0.0 if momentum is None else float(momentum))


def gradients(given: Given, dy: Tensor, o: Operands, mean: Tensor | None, rstd: Tensor, mask: Mask) -> Three:
    """The first derivative, of mean and rstd as a forward found them."""
    if dy.stride() != o.x.stride():
        dy = torch.empty_like(o.x).copy_(dy)
    return _OWN[given.rule][1](given, dy, o, mean, rstd, mask)


def _formula(given: Given, dy: Tensor, o: Operands, mean: Tensor | None, rstd: Tensor, mask: Mask) -> Three:
    dx, dw, db, _ = reference.gradients(given.norm, given.eps, laid_out(given.norm, Operands(*o[:3])), dy, None, None)
    return dx, dw, db


def _lost(mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """Of each group, more than _MOST where its mean is FAR or its numbers are equal (rstd is 1 / sqrt(eps)), but for
    0."""
    return mean.abs().add_(FAR * sqrt(max(eps, 0.0))).mul_(rstd)


def _sound(mean: Tensor, rstd: Tensor, eps: float) -> bool:
    return _lost(mean, rstd, eps).max().item() <= _MOST  # not where it is NaN


class _Rows(NamedTuple):
    """Rows of which PyTorch's function is as good as the formula, and the others, for the bits of a row depend on no
    other."""

    sound: Tensor

    def each(self, t: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        t = t.reshape(-1, *shape)
        return t[self.sound], t[~self.sound]

    def joined(self, sound: Tensor, others: Tensor, like: Tensor) -> Tensor:
        found = like.new_empty(self.sound.numel(), *sound.shape[1:])
        found[self.sound], found[~self.sound] = sound, others
        return found.reshape(like.shape)


def _layer(given: Given, o: Operands, _: float) -> Found:
    shape = given.arguments[0]
    y, mean, rstd = torch.native_layer_norm(o.x, shape, o.weight, o.bias, given.eps)
    if not _sound(mean, rstd, given.eps):
        rows = _Rows((_lost(mean, rstd, given.eps) <= _MOST).flatten())
        x, others = rows.each(o.x, shape)
        by_ours = Operands(others, o.weight, o.bias)
        norm = rules.layer_norm(by_ours, shape)
        ours = reference.normalize(norm, given.eps, laid_out(norm, by_ours))[0]
        y = rows.joined(torch.native_layer_norm(x, shape, o.weight, o.bias, given.eps)[0], ours, o.x)
    return Found(y, mean, rstd)


def _layer_back(given: Given, dy: Tensor, o: Operands, mean: Tensor | None, rstd: Tensor, mask: Mask) -> Three:
    assert mean is not None
    shape = given.arguments[0]

    def native(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Any:
        return aten.native_layer_norm_backward(dy, x, shape, mean, rstd, o.weight, o.bias, mask)

    if _sound(mean, rstd, given.eps):
        dx, dw, db = native(dy, o.x, mean, rstd)
        return dx, dw, db
    rows = _Rows((_lost(mean, rstd, given.eps) <= _MOST).flatten())
    (x, others), (dy, dy_others) = rows.each(o.x, shape), rows.each(dy, shape)
    ones = (1,) * len(shape)
    sound = native(dy, x, rows.each(mean, ones)[0], rows.each(rstd, ones)[0])
    by_ours = Operands(others, o.weight, o.bias)
    ours = _formula(given._replace(norm=rules.layer_norm(by_ours, shape)), dy_others, by_ours, None, rstd, mask)
    dw, db = (a if a is None or b is None else a + b for a, b in zip(sound[1:], ours[1:], strict=True))
    return rows.joined(sound[0], ours[0], o.x) if mask[0] else None, dw, db  # type: ignore[arg-type]


def _rms(given: Given, o: Operands, _: float) -> Found:
    y, rstd = aten._fused_rms_norm(o.x, given.arguments[0], o.weight, given.eps)
    return Found(y, None, rstd)


def _group(given: Given, o: Operands, _: float) -> Found | None:
    batch, channels, *spatial = o.x.shape
    groups = given.arguments[0]
    found = torch.native_group_norm(o.x, o.weight, o.bias, batch, channels, prod(spatial), groups, given.eps)
    return Found(*found) if _sound(*found[1:], given.eps) else None


def _group_back(given: Given, dy: Tensor, o: Operands, mean: Tensor | None, rstd: Tensor, mask: Mask) -> Three:
    batch, channels, *spatial = o.x.shape
    groups = given.arguments[0]
    dx, dw, db = aten.native_group_norm_backward(
        dy, o.x, mean, rstd, o.weight, batch, channels, prod(spatial), groups, mask
    )
    return dx, dw, db


def _batch(given: Given, o: Operands, momentum: float) -> Found | None:
    running, eps = o[5:], given.eps
    if given.norm.given:
        mean, var = running
        assert mean is not None and var is not None
        rstd = torch.rsqrt(var + eps)
        if not _sound(mean, rstd, 0.0):
            return None
        y = torch.native_batch_norm(o.x, o.weight, o.bias, mean, var, False, 0.0, eps)[0]
        return Found(y, mean.clone(), rstd)  # running statistics may move on before the backward
    # Copies, for it may turn out that they should not have moved; PyTorch does not tell that they did, either.
    moved_mean, moved_var = (t if t is None else t.clone() for t in running)
    found = torch.native_batch_norm(o.x, o.weight, o.bias, moved_mean, moved_var, True, momentum, eps)
    if not _sound(*found[1:], eps):
        return None
    for t, value in zip(running, (moved_mean, moved_var), strict=True):
        if t is not None and value is not None:
            t.copy_(value)
    return Found(*found)


def _batch_back(given: Given, dy: Tensor, o: Operands, mean: Tensor | None, rstd: Tensor, mask: Mask) -> Three:
    if given.norm.given:  # rstd · g · weight, of a mean and rstd that are no functions of x
        dx, dw, db, _ = reference.gradients(given.norm, given.eps, Operands(*o[:3]), dy, mean, rstd)
        return dx, dw, db
    dx, dw, db = aten.native_batch_norm_backward(dy, o.x, o.weight, None, None, mean, rstd, True, given.eps, mask)
    return dx, dw, db


def _planes(x: Tensor) -> Tensor:
    """The instances of a batch, as channels of one sample."""
    samples, channels, *spatial = x.shape
    return x.reshape(1, samples * channels, *spatial)


def _instance(given: Given, o: Operands, momentum: float) -> Found | None:
    if given.norm.given:
        return _batch(given, o, momentum)
    weight, bias = (t if t is None else t.repeat(o.x.shape[0]) for t in (o.weight, o.bias))
    found = _batch(given, Operands(_planes(o.x), weight, bias), momentum)
    if found is None:
        return None
    if o.running_mean is not None:
        mean = found.mean.reshape(given.norm.kept_shape)  # type: ignore[union-attr]
        reference.track(o, mean, reference.variance(given.norm, o.x), momentum)
    return found._replace(y=found.y.reshape(o.x.shape))


def _instance_back(given: Given, dy: Tensor, o: Operands, mean: Tensor | None, rstd: Tensor, mask: Mask) -> Three:
    if given.norm.given:
        return _batch_back(given, dy, o, mean, rstd, mask)
    weight = o.weight if o.weight is None else o.weight.repeat(o.x.shape[0])
    dx, dw, db = _batch_back(given, _planes(dy), Operands(_planes(o.x), weight), mean, rstd, mask)
    per_instance = (t if t is None else t.reshape(o.x.shape[:2]).sum(0) for t in (dw, db))
    return dx if dx is None else dx.reshape(o.x.shape), *per_instance  # type: ignore[return-value]


_OWN: dict[Rule, tuple[Callable[..., Found | None], Callable[..., Three]]] = {
    rules.layer_norm: (_layer, _layer_back), rules.rms_norm: (_rms, _formula), rules.group_norm: (_group, _group_back),
    rules.batch_norm: (_batch, _batch_back), rules.instance_norm: (_instance, _instance_back),
}  # fmt: skip
