"""The autograd Function behind every call, and the choice between kernels and reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import launch, reference
from .launch import Call, Spec
from .layout import split

NOTHING = (None,) * 8


class Normalize(torch.autograd.Function):
    """y, or (y, sum) with pre_add.  Saves x (or the sum), the parameters and the statistics: the pre-activation is
    computed again in the backward.  The statistics are left in ``options["saved"]``: no gradient flows through them."""

    @staticmethod
    def forward(  # type: ignore[override]
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
        return y if pre_add is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None = None) -> tuple[Any, ...]:  # type: ignore[override]
        call = ctx.call
        total, weight, bias, saved, post_add = ctx.saved_tensors
        need_x, need_w, need_b, need_pre, need_post = ctx.needs_input_grad[:5]
        x_dtype, pre_dtype, post_dtype = call.dtypes
        if dy is None:
            if dsum is None:
                return NOTHING
            dy = torch.zeros((), dtype=x_dtype, device=total.device).expand(total.shape)
        if torch.is_grad_enabled():  # create_graph: the gradient itself must be differentiable
            return _differentiable_backward(ctx, dy, dsum)
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


# torch.autograd.graph.increment_version without its own checks.
_increment_version = torch._C._increment_version
# Function.apply looks for transforms of torch.func first and costs as much again as what it calls.
_apply = super(torch.autograd.Function, Normalize).apply


def _given(call: Call, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Given statistics in the form of those of x.  A copy, as running statistics may move on before the backward."""
    saved = torch.empty(call.saved_elements, dtype=call.acc, device=mean.device)
    n = mean.numel()
    saved[:n].copy_(mean)
    torch.rsqrt(var.to(call.acc) + eps, out=saved[call.rstd_at : call.rstd_at + n])
    return saved


def _differentiable_backward(ctx: Any, dy: Tensor, dsum: Tensor | None) -> tuple[Any, ...]:
    """The backward as a composition of PyTorch operations, through the reference: for second derivatives."""
    call = ctx.call
    total, weight, bias, saved, post_add = ctx.saved_tensors
    need_x, need_w, need_b, need_pre, need_post = ctx.needs_input_grad[:5]
    x_dtype, pre_dtype, post_dtype = call.dtypes
    given = {}
    if call.given:
        mean, rstd = statistics(call, saved)
        given = {"mean": mean, "var": rstd.double() ** -2 - ctx.eps}
    needed = {"x": need_x or need_pre, "weight": need_w, "bias": need_b, "post": need_post}
    with torch.enable_grad():
        # Aliases: x + pre_add is an output of this very node, which is busy while it runs.
        alias: dict[str, Any] = {
            name: None if t is None else t.view_as(t)
            for name, t in (("x", total), ("weight", weight), ("bias", bias), ("post", post_add))
        }
        y = _reference(alias["x"], alias["weight"], alias["bias"], None, alias["post"], call.spec, ctx.eps, **given)[0]
        wanted = {name: t for name, t in alias.items() if needed[name] and t is not None}
        found = torch.autograd.grad(y, tuple(wanted.values()), dy.to(y.dtype), create_graph=True)
        gradients = dict(zip(wanted, found, strict=True))
        dx = gradients.get("x")
        if dx is not None and dsum is not None:
            dx = dx + dsum
    dpost = gradients.get("post")
    if need_post and post_add is None:  # identity: g is dy
        dpost = dy.to(post_dtype)
    return (
        dx.to(x_dtype) if need_x and dx is not None else None, gradients.get("weight"), gradients.get("bias"),
        dx.to(pre_dtype) if need_pre and dx is not None else None, dpost, None, None, None,
    )  # fmt: skip


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
        out, total, *options["saved"] = _reference(x, weight, bias, pre_add, post_add, call.spec, eps, **options)
        return out if pre_add is None else (out, total)
    if not call.dense:
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if torch._C._are_functorch_transforms_active():
        y = Normalize.apply(x, weight, bias, pre_add, post_add, call, eps, options)
    elif forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and (x.requires_grad or _needed(weight, bias, pre_add, post_add))
    ):
        y = _apply(x, weight, bias, pre_add, post_add, call, eps, options)
    else:
        out, total, options["saved"] = launch.forward(call, x, weight, bias, pre_add, post_add, eps, **options)
        y = out if pre_add is None else (out, total)
    if "running_mean" in options:
        _increment_version((options["running_mean"], options["running_var"]))
    return y


def _needed(*tensors: Tensor | None) -> bool:
    """Whether any gradient may be asked for."""
    return any(t is not None and t.requires_grad for t in tensors)


def statistics(call: Call, saved: Any) -> tuple[Tensor | None, Tensor]:
    """mean (None for RMS) and rstd in the split shape with reduced axes of size 1, from ``options["saved"]``."""
    if isinstance(saved, list):  # the reference's
        mean, rstd = saved
        return mean, rstd
    spec, shape = call.spec, call.spec.shape
    order = split(call.order, spec.factors)
    strides = [0] * len(shape)
    step = 1
    for i in sorted((i for i, n in enumerate(shape) if n != 1 and i not in spec.reduced), key=lambda i: order[i]):
        strides[i] = step
        step *= shape[i]
    sizes = tuple(1 if i in spec.reduced else n for i, n in enumerate(shape))
    mean = saved.as_strided(sizes, strides, saved.storage_offset()) if spec.center else None
    return mean, saved.as_strided(sizes, strides, saved.storage_offset() + call.rstd_at)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None,
    spec: Spec, eps: float, **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    shape = spec.shape
    sizes = [1] * len(shape)
    for i in spec.affine:
        sizes[i] = shape[i]
    order = sorted(range(len(spec.affine)), key=lambda i: spec.affine[i])

    def placed(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t.reshape([shape[i] for i in spec.affine]).permute(order).reshape(sizes)

    kept = [1 if i in spec.reduced else n for i, n in enumerate(shape)]
    given_mean, given_var = (
        None if (t := options.get(name)) is None else t.reshape(kept) for name in ("mean", "var")
    )  # fmt: skip
    y, total, mean, rstd = reference.normalize(
        x.reshape(shape), spec.reduced, placed(weight), placed(bias), eps=eps, center=spec.center,
        activation=spec.activation, pre_add=None if pre_add is None else pre_add.reshape(shape),
        post_add=None if post_add is None else post_add.reshape(shape), mean=given_mean, var=given_var,
    )  # fmt: skip
    running_mean, running_var = options.get("running_mean"), options.get("running_var")
    if running_mean is not None and running_var is not None and mean is not None and x.numel() > 0:
        n = x.numel() // running_mean.numel()
        var = (rstd.double() ** -2 - eps) * (n / (n - 1))
        with torch.no_grad():
            for running, value in ((running_mean, mean), (running_var, var)):
                running.lerp_(value.reshape(-1).to(running.dtype), options["momentum"])
    y = y.reshape(x.shape)
    like = torch.empty_like(x)
    if y.stride() != like.stride():
        y = like.copy_(y)
    sums = None if pre_add is None else total.reshape(x.shape)
    return (y, sums, None, None) if given_var is not None else (y, sums, mean, rstd)
