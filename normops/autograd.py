"""The autograd Function behind every eager call that runs kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import native, traced
from .calls import Call
from .faults import KernelError
from .norm import Norm, Operands
from .rules import Rule


class Normalize(torch.autograd.Function):
    """Gives y (and the sum of a call with pre_add) a history.  Saves x or the sum, the parameters and the statistics:
    the pre-activation is computed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, eps: float, found: tuple[Tensor, Tensor | None, Tensor], x: Tensor,
        weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None,
    ) -> Any:  # fmt: skip
        """found: what ``call.forward`` returned."""
        y, total, saved = found
        ctx.call, ctx.eps = call, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if total is None else total, weight, bias, None if call.plain else post_add, saved
        )
        if total is None:
            return y
        if not (ctx.needs_input_grad[3] or ctx.needs_input_grad[6]):
            ctx.mark_non_differentiable(total)  # as x + pre_add is
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Any, ...]:
        call, kept = ctx.call, ctx.saved_tensors
        asked = call.dtypes, ctx.needs_input_grad[3:], call.plain
        # create_graph: the gradient must be differentiable.
        found = None
        if call.kernels and not (torch.is_grad_enabled() or _looked_into(dy, dsum) or call.restrided(*kept)):
            try:
                found = traced.gradients(call.backward, kept, dy, dsum, *asked)
            except KernelError as error:
                call.fall_back(error)
        if found is None:
            norm = call.norm
            run = partial(traced.by_operator, (*norm.written, norm.given, ctx.eps, norm.activation))
            found = traced.gradients(run, (*kept[:4], *call.statistics(kept[4])), dy, dsum, *asked)
        return None, None, None, *found


class Native(torch.autograd.Function):
    """Gives y of ``native.forward`` a history."""

    @staticmethod
    def forward(
        ctx: Any, given: native.Given, found: native.Found, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.given = given
        ctx.save_for_backward(x, weight, bias, *found[1:])
        return found.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        given, (x, weight, bias, mean, rstd) = ctx.given, ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or _looked_into(dy):  # the gradient must be differentiable
            norm = given.norm
            options = (*norm.written, norm.given, given.eps, norm.activation)
            kept = (x, weight, bias, None, mean, rstd)
            dx, dw, db, _ = traced.by_operator(options, kept, dy, None, (*needs, False))
        else:
            dx, dw, db = native.gradients(given, dy, Operands(x, weight, bias), mean, rstd, needs)
        return None, None, *(t if needed else None for t, needed in zip((dx, dw, db), needs, strict=True))


def by_native(
    rule: Rule, norm: Norm, operands: Operands, arguments: tuple[Any, ...], eps: float,
    momentum: float | Tensor | None, needed: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """-> y and x + pre_add, of a call that ``native`` has a function for; None where the formula is better."""
    x, pre_add = operands.x, operands.pre_add
    total = x if pre_add is None else x + pre_add
    if total.stride() != x.stride():
        return None
    given = native.Given(rule, norm._replace(activation="identity"), arguments, eps)
    o = operands._replace(x=total, pre_add=None, post_add=None)
    with torch.no_grad():
        found = native.forward(given, o, momentum)
    if found is None:
        return None
    y = native_apply(given, found, *o[:3]) if needed else found.y
    return native.finished(y, norm, operands), total


# Function.apply looks for transforms of torch.func first and costs as much again as what it calls.
apply: Any = super(torch.autograd.Function, Normalize).apply
native_apply: Any = super(torch.autograd.Function, Native).apply


def _looked_into(*gradients: Tensor | None) -> bool:
    """Whether PyTorch traces or transforms a backward, or gradients have no memory of their own (is_grads_batched)."""
    if traced.watched():
        return True
    for g in gradients:
        if g is not None and (g.__class__ is not Tensor or g.is_neg() or is_legacy_batchedtensor(g)):
            return True
    return False
