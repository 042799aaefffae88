"""The autograd Function behind every call, and the choice between kernels and reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch, reference
from .launch import Spec


def uses_kernels(x: Tensor) -> bool:
    """CUDA tensors run the Triton kernels, CPU tensors only in Triton's interpreter."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and launch.INTERPRETED)


class Normalize(torch.autograd.Function):
    """(y, sum, mean, rstd) of one call.  Saves x (or the sum), the parameters and the statistics: the pre-activation
    is computed again in the backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None,
        post_add: Tensor | None, spec: Spec, eps: float, options: dict[str, Any],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.given = options.get("var") is not None
        needed = any(ctx.needs_input_grad)
        if ctx.given and needed:
            # Copies, as running statistics may move on before the backward.
            acc = launch.accumulator(x.dtype)
            options = dict(options)
            options["mean"] = options["mean"].to(acc, copy=True)
            options["rstd"] = torch.rsqrt(options.pop("var").to(acc) + eps)
        y, total, mean, rstd = launch.forward(spec, x, weight, bias, pre_add, post_add, eps=eps, **options)
        ctx.spec, ctx.eps = spec, eps
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x.dtype, None if pre_add is None else pre_add.dtype)
        if needed:
            plain = spec.activation == "identity"
            ctx.has_post = post_add is not None
            ctx.save_for_backward(total, weight, bias, None if plain else post_add, mean, rstd)
            ctx.post_dtype = None if post_add is None else post_add.dtype
        stats = (None, None) if ctx.given else (mean, rstd)
        ctx.mark_non_differentiable(*(t for t in stats if t is not None))
        return y, None if pre_add is None else total, *stats  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        total, weight, bias, post_add, mean, rstd = ctx.saved_tensors
        need_x, need_w, need_b, need_pre, need_post = ctx.needs_input_grad[:5]
        x_dtype, pre_dtype = ctx.dtypes
        if dy is None:
            if dsum is None:
                return (None,) * 8
            dy = torch.zeros((), dtype=total.dtype, device=total.device).expand(total.shape)
        identity = ctx.spec.activation == "identity"
        if torch.is_grad_enabled():  # create_graph: the gradient itself must be differentiable
            return _differentiable_backward(ctx, dy, dsum)
        dx, dw, db, dpost = launch.backward(
            ctx.spec, dy, dsum, total, weight, bias, post_add, mean, rstd,
            given=ctx.given, needs=(need_x or need_pre, need_w, need_b, need_post and not identity),
        )  # fmt: skip
        if need_post and identity:
            dpost = dy.to(ctx.post_dtype)
        return (
            dx.to(x_dtype) if need_x and dx is not None else None, dw, db,
            dx.to(pre_dtype) if need_pre and dx is not None else None, dpost, None, None, None,
        )  # fmt: skip


def _differentiable_backward(ctx: Any, dy: Tensor, dsum: Tensor | None) -> tuple[Any, ...]:
    """The backward as a composition of PyTorch operations, through the reference: for second derivatives."""
    total, weight, bias, post_add, mean, rstd = ctx.saved_tensors
    need_x, need_w, need_b, need_pre, need_post = ctx.needs_input_grad[:5]
    x_dtype, pre_dtype = ctx.dtypes
    given = {"mean": mean, "var": rstd.double() ** -2 - ctx.eps} if ctx.given else {}
    needed = {"x": need_x or need_pre, "weight": need_w, "bias": need_b, "post": need_post}
    with torch.enable_grad():
        # Aliases: x + pre_add is an output of this very node, which is busy while it runs.
        alias: dict[str, Any] = {
            name: None if t is None else t.view_as(t)
            for name, t in (("x", total), ("weight", weight), ("bias", bias), ("post", post_add))
        }
        y = _reference(alias["x"], alias["weight"], alias["bias"], None, alias["post"], ctx.spec, ctx.eps, **given)[0]
        wanted = {name: t for name, t in alias.items() if needed[name] and t is not None}
        found = torch.autograd.grad(y, tuple(wanted.values()), dy.to(y.dtype), create_graph=True)
        gradients = dict(zip(wanted, found, strict=True))
        dx = gradients.get("x")
        if dx is not None and dsum is not None:
            dx = dx + dsum
    dpost = gradients.get("post")
    if need_post and post_add is None:  # identity: g is dy
        dpost = dy.to(ctx.post_dtype)
    return (
        dx.to(x_dtype) if need_x and dx is not None else None, gradients.get("weight"), gradients.get("bias"),
        dx.to(pre_dtype) if need_pre and dx is not None else None, dpost, None, None, None,
    )  # fmt: skip


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None,
    spec: Spec, eps: float, **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> y, sum (None without pre_add), mean, rstd (None where given, mean None for RMS), statistics in the split
    shape with reduced axes of size 1."""
    shape = spec.shape
    if not uses_kernels(x) or x.numel() == 0:
        return _reference(x, weight, bias, pre_add, post_add, spec, eps, **options)
    contiguous = (t if t is None or t.is_contiguous() else t.contiguous() for t in (weight, bias))
    y, total, mean, rstd = Normalize.apply(x, *contiguous, pre_add, post_add, spec, eps, options)
    running = (options.get("running_mean"), options.get("running_var"))
    for t in running:
        if t is not None:
            torch.autograd.graph.increment_version(t)
    return y, total, _statistic(mean, y, shape, spec), _statistic(rstd, y, shape, spec)


def _statistic(t: Tensor | None, y: Tensor, shape: tuple[int, ...], spec: Spec) -> Tensor | None:
    """Kernels write statistics in the memory order of the kept axes: give them their shape."""
    if t is None:
        return None
    order = launch.split(y.stride(), spec.factors)
    strides = [0] * len(shape)
    step = 1
    for i in sorted((i for i, n in enumerate(shape) if n != 1 and i not in spec.reduced), key=lambda i: order[i]):
        strides[i] = step
        step *= shape[i]
    sizes = tuple(1 if i in spec.reduced else n for i, n in enumerate(shape))
    return t.as_strided(sizes, strides)


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
