"""The reference on the operands of a call: plain PyTorch, which everything that PyTorch has can look into.

It runs where kernels cannot (CPU tensors without Triton's interpreter, empty tensors), where second derivatives are
asked for, and where a compiler is to see the formula.  Operands are as the operators take them, see ``operators``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import Operands
from .plan import Spec

Statistic = Tensor | None


def _kept(spec: Spec) -> list[int]:
    return [1 if i in spec.reduced else n for i, n in enumerate(spec.shape)]


def _parameter(t: Tensor | None, spec: Spec) -> Tensor | None:
    """A parameter along its axes of the split shape."""
    if t is None:
        return None
    shape, affine = spec.shape, spec.affine
    sizes = [n if i in affine else 1 for i, n in enumerate(shape)]
    order = sorted(range(len(affine)), key=lambda i: affine[i])
    return t.reshape([shape[i] for i in affine]).permute(order).reshape(sizes)


def _flat(t: Tensor | None, like: Tensor | None, spec: Spec) -> Tensor | None:
    """What is along a parameter's axes of the split shape, in the parameter's shape."""
    if t is None or like is None:
        return None
    order = sorted(range(len(spec.affine)), key=lambda i: spec.affine[i])
    back = sorted(range(len(order)), key=lambda i: order[i])
    return t.reshape([spec.shape[spec.affine[i]] for i in order]).permute(back).reshape(like.shape).contiguous()


def _split(t: Tensor | None, spec: Spec) -> Tensor | None:
    return None if t is None else t.reshape(spec.shape)


def _statistic(t: Tensor | None, spec: Spec) -> Tensor | None:
    return None if t is None else t.reshape(_kept(spec))


def forward(
    spec: Spec, eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None,
    post_add: Tensor | None, mean: Statistic = None, var: Statistic = None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Statistic, Tensor]:  # fmt: skip
    """-> y, s, mean (None for RMS) and rstd, with averaged axes of size 1 in the split shape."""
    y, s, mean, rstd = reference.normalize(
        x.reshape(spec.shape), spec.reduced, _parameter(weight, spec), _parameter(bias, spec), eps=eps,
        center=spec.center, activation=spec.activation, pre_add=_split(pre_add, spec), post_add=_split(post_add, spec),
        mean=_statistic(mean, spec), var=_statistic(var, spec), out_dtype=out_dtype,
    )  # fmt: skip
    return _joined(y, x), x if pre_add is None else _joined(s, x), mean, rstd


def gradients(
    spec: Spec, eps: float, dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, bias: Tensor | None,
    post_add: Tensor | None, mean: Statistic = None, rstd: Statistic = None, given: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """-> dx, dw, db, dpost (g in the dtype of the statistics); statistics as in :func:`reference.gradients`."""
    dx, dw, db, g = reference.gradients(
        dy.reshape(spec.shape), s.reshape(spec.shape), spec.reduced, _parameter(weight, spec), _parameter(bias, spec),
        eps=eps, center=spec.center, activation=spec.activation, post_add=_split(post_add, spec),
        mean=_statistic(mean, spec), rstd=_statistic(rstd, spec), given=given,
    )  # fmt: skip
    dx = _joined(dx, s)
    return dx if dsum is None else dx + dsum, _flat(dw, weight, spec), _flat(db, bias, spec), _joined(g, s)


def tangent(
    spec: Spec, eps: float, s: Tensor, weight: Tensor | None, bias: Tensor | None, post_add: Tensor | None,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None], mean: Statistic = None,
    rstd: Statistic = None, given: bool = False,
) -> Tensor:  # fmt: skip
    """The tangent of y, for those of s, weight, bias and post_add."""
    ds, dw, db, dpost = tangents
    dy = reference.tangent(
        s.reshape(spec.shape), spec.reduced, _parameter(weight, spec), _parameter(bias, spec), _split(post_add, spec),
        (_split(ds, spec), _parameter(dw, spec), _parameter(db, spec), _split(dpost, spec)), eps=eps,
        center=spec.center, activation=spec.activation, mean=_statistic(mean, spec), rstd=_statistic(rstd, spec),
        given=given,
    )  # fmt: skip
    return _joined(dy, s)


def track(operands: Operands, mean: Statistic, rstd: Tensor, eps: float, momentum: float | Tensor | None) -> None:
    """Move running statistics towards those of x; the mean over the batch where x has several for each.

    The unbiased variance is taken back from rstd, in float64, for eps may be large beside it.
    """
    running_mean, running_var = operands.running_mean, operands.running_var
    assert running_mean is not None and running_var is not None and mean is not None and momentum is not None
    if operands.x.numel() == 0:
        return
    n = operands.x.numel() // mean.numel()
    with torch.no_grad():
        var = (rstd.double().pow(-2) - eps).clamp_min(0) * (n / (n - 1))
        for running, value in ((running_mean, mean), (running_var, var)):
            value = value.reshape(-1, running.numel()).mean(0).to(running.dtype)
            running.lerp_(value, momentum.to(running.dtype) if isinstance(momentum, Tensor) else float(momentum))


def _joined(t: Tensor, like: Tensor) -> Tensor:
    """From the split shape to x's, in the memory format of empty_like(x)."""
    return reference.as_like(t.reshape(like.shape), t.dtype, like)
