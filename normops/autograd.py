"""The autograd Function behind every eager call that runs kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from . import traced
from .calls import Call
from .faults import KernelError


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


# Function.apply looks for transforms of torch.func first and costs as much again as what it calls.
apply: Any = super(torch.autograd.Function, Normalize).apply


def _looked_into(*gradients: Tensor | None) -> bool:
    """Whether PyTorch traces or transforms a backward, or gradients have no memory of their own (is_grads_batched)."""
    if traced.watched():
        return True
    for g in gradients:
        if g is not None and (g.__class__ is not Tensor or g.is_neg() or is_legacy_batchedtensor(g)):
            return True
    return False
