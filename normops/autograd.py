"""The autograd Function behind every call, and the choice between kernels and reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.compiler import is_dynamo_compiling

from . import composed, launch, transforms
from .checks import Operands
from .launch import Call


class Normalize(torch.autograd.Function):
    """y, or (y, sum) with pre_add.  Saves x (or the sum), the parameters and the statistics: the pre-activation is
    computed again in the backward.  The statistics are left in ``options["saved"]``: no gradient flows through them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None,
        post_add: Tensor | None, call: Call, eps: float, options: dict[str, Any],
    ) -> Any:  # fmt: skip
        if call.given:
            options = {"saved": _given(call, options["mean"], options["var"], eps)}
        y, total, saved = launch.forward(call, x, weight, bias, pre_add, post_add, eps, **options)
        options["saved"] = saved
        ctx.call, ctx.eps = call, eps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, bias, saved, None if call.plain else post_add)
        if pre_add is not None and not (ctx.needs_input_grad[0] or ctx.needs_input_grad[3]):
            ctx.mark_non_differentiable(total)  # as x + pre_add is
        return y if pre_add is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Any, ...]:
        call = ctx.call
        total, weight, bias, saved, post_add = ctx.saved_tensors
        need_x, need_w, need_b, need_pre, need_post = ctx.needs_input_grad[:5]
        x_dtype, pre_dtype, post_dtype = call.dtypes
        # create_graph: the gradient must be differentiable.
        if torch.is_grad_enabled() or _looked_into(dy, dsum) or call.restrided(total, weight, bias, saved, post_add):
            found = transforms.gradients(
                dy, dsum, total, weight, bias, post_add, *statistics(call, saved),
                (*call.form, ctx.eps, call.spec.activation), call.given, call.dtypes, ctx.needs_input_grad[:5],
            )  # fmt: skip
            return *found, None, None, None
        if dy is None:
            return *transforms.gradients_of_sum(dsum, call.dtypes, ctx.needs_input_grad), None, None, None
        plain = call.plain
        dx, dw, db, dpost = launch.backward(
            call, dy, dsum, total, weight, bias, post_add, saved,
            (need_x or need_pre, need_w, need_b, need_post and not plain),
        )  # fmt: skip
        if need_post and plain:  # g is dy
            dpost = dy.to(post_dtype)
        dpre = None if dx is None or not need_pre else dx.to(pre_dtype)
        if not need_x:
            dx = None
        elif pre_dtype is not None and dx is not None:
            dx = dx.to(x_dtype)
        return dx, dw, db, dpre, dpost, None, None, None


_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
# torch.autograd.graph.increment_version without its own checks.
_increment_version = torch._C._increment_version
# Function.apply looks for transforms of torch.func first and costs as much again as what it calls.
_apply: Any = super(torch.autograd.Function, Normalize).apply


def _given(call: Call, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Given statistics in the form of those of x.  A copy, as running statistics may move on before the backward."""
    saved = torch.empty(call.saved_elements, dtype=call.acc, device=mean.device)
    n = mean.numel()
    saved[:n].copy_(mean)
    torch.rsqrt(var.to(call.acc) + eps, out=saved[call.rstd_at : call.rstd_at + n])
    return saved


def normalize(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None,
    post_add: Tensor | None, eps: float, options: dict[str, Any],
) -> Any:  # fmt: skip
    """-> y, or (y, sum) with pre_add; the statistics of x are left in ``options["saved"]``, see :func:`statistics`.

    Options: `mean` and `var` (of a call with given statistics), or `running_mean`, `running_var` and `momentum`.
    """
    eps = float(eps)
    if call.reshaped:
        shapes = (call.axes.weight_shape, call.axes.weight_shape, x.shape, x.shape)
        weight, bias, pre_add, post_add = (
            t if t is None or shape is None else t.expand(shape)
            for t, shape in zip((weight, bias, pre_add, post_add), shapes, strict=True)
        )
    if not call.kernels:
        return _composed(call, x, weight, bias, pre_add, post_add, eps, options)
    if not call.dense:
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if torch.is_grad_enabled() and (x.requires_grad or _needed(weight, bias, pre_add, post_add)):
        y = _apply(x, weight, bias, pre_add, post_add, call, eps, options)
    else:
        out, total, options["saved"] = launch.forward(call, x, weight, bias, pre_add, post_add, eps, **options)
        y = out if pre_add is None else (out, total)
    if "running_mean" in options:
        _increment_version((options["running_mean"], options["running_var"]))
    return y


def _looked_into(*gradients: Tensor | None) -> bool:
    """Whether PyTorch traces or transforms a backward, or gradients have no memory of their own (is_grads_batched)."""
    if is_dynamo_compiling() or _transforms_active() or _dispatch_modes():
        return True
    for g in gradients:
        if g is not None and (g.__class__ is not Tensor or g.is_neg() or is_legacy_batchedtensor(g)):
            return True
    return False


def _needed(*tensors: Tensor | None) -> bool:
    """Whether any gradient may be asked for."""
    return any(t is not None and t.requires_grad for t in tensors)


def _composed(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None,
    post_add: Tensor | None, eps: float, options: dict[str, Any],
) -> Any:  # fmt: skip
    """normalize() where kernels cannot run."""
    y, total, mean, rstd = transforms.Forward.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, pre_add, post_add, options.get("mean"), options.get("var"), *call.form, eps,
        call.spec.activation, call.out_dtype,
    )  # fmt: skip
    mean = mean if call.spec.center else None
    options["saved"] = mean, rstd
    if "momentum" in options:
        operands = Operands(x, running_mean=options["running_mean"], running_var=options["running_var"])
        composed.track(operands, mean, rstd, eps, options["momentum"])
    return y if pre_add is None else (y, total)


def statistics(call: Call, saved: Any) -> tuple[Tensor | None, Tensor]:
    """mean (None for RMS) and rstd, shaped like the kept axes of the split shape, from ``options["saved"]``."""
    if isinstance(saved, tuple):  # of a call without kernels
        mean, rstd = saved
        return mean, rstd
    mean = saved.as_strided(call.kept, call.kept_strides) if call.spec.center else None
    return mean, saved[call.rstd_at :].as_strided(call.kept, call.kept_strides)
