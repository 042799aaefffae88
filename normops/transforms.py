"""The derivatives of the registered operators: reverse and forward mode of any order, and vmap.

The first derivative is ``backward``, our kernels.  Derivatives of that one, and tangents, are compositions of PyTorch
operations (:mod:`normops.reference`).  A vmap is no loop: its axis is one more kept axis of the same norm, and with
it each sample may have parameters, or gradients of parameters, of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import composed, operators, sharding
from .form import Form
from .plan import accumulator

Tensors = Sequence[Tensor | None]
Dims = tuple[int | None, ...]

CONSTANT = (
    "running_mean and running_var are constants where they stand in for the statistics of x: expected tensors that "
    "require no gradient and have no tangent"
)

# No views are tracked either: an output that is a view inside would count as one outside.
_below = torch._C._AutoDispatchBelowADInplaceOrView
_transforms_active = torch._C._are_functorch_transforms_active


class Forward(torch.autograd.Function):
    """``operators.forward``: gradients flow through y and sum, not through mean and rstd."""

    @staticmethod
    def forward(*inputs: Any) -> operators.Four:
        sharding.meet(inputs[0])  # here for vmap
        with _below():
            found: operators.Four = operators.forward(*inputs)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: operators.Four) -> None:
        x, weight, bias, pre_add, post_add, mean, var, *options = inputs
        _, total, at_mean, rstd = output
        if any(ctx.needs_input_grad[5:7]):
            raise RuntimeError(CONSTANT)
        ctx.options, ctx.given = options, var is not None
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, pre_add, post_add))
        ctx.set_materialize_grads(False)
        summed = ctx.needs_input_grad[0] or ctx.needs_input_grad[3] or forward_ad._current_level >= 0
        ctx.mark_non_differentiable(at_mean, rstd, *(() if pre_add is not None and summed else (total,)))
        kept = None if options[5] == "identity" else post_add
        ctx.save_for_backward(x if pre_add is None else total, weight, bias, kept, at_mean, rstd)
        ctx.save_for_forward(x, weight, bias, pre_add, post_add, mean, var)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Any, ...]:
        total, weight, bias, post_add, mean, rstd = ctx.saved_tensors
        found = gradients(
            dy, dsum, total, weight, bias, post_add, mean, rstd, ctx.options[:-1], ctx.given, ctx.dtypes,
            ctx.needs_input_grad[:5],
        )  # fmt: skip
        return *found, *(None,) * (2 + len(ctx.options))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        if any(t is not None for t in tangents[5:7]):
            raise RuntimeError(CONSTANT)
        with forward_ad._set_fwd_grad_enabled(True):
            return Forward._jvp(ctx, *tangents[:5])

    @staticmethod
    def _jvp(
        ctx: Any, tx: Tensor | None, tw: Tensor | None, tb: Tensor | None, tpre: Tensor | None, tpost: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, pre_add, post_add, mean, var = _primals(ctx.saved_tensors)
        pattern, affine, lengths, center, eps, activation, out_dtype = ctx.options
        s, ts = x, tx
        if pre_add is not None:
            s = x + pre_add
            ts = tpre if tx is None else tx if tpre is None else tx + tpre
            # Not the tangent of an operand itself: outputs may be modified.
            ts = torch.zeros_like(s) if ts is None else ts.to(s.dtype, copy=tx is None or tpre is None)
        rstd = None if var is None else torch.rsqrt(var.to(accumulator(s.dtype)) + eps)
        spec = operators.spec_of(s, pattern, affine, lengths, center, activation)
        ty = composed.tangent(spec, eps, s, weight, bias, post_add, (ts, tw, tb, tpost), mean, rstd, ctx.given)
        return ty.to(out_dtype or x.dtype), None if pre_add is None else ts, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any, run: Any = None) -> tuple[operators.Four, Dims]:
        pattern, affine, *options = inputs[7:]
        own = in_dims[1] is not None or in_dims[2] is not None
        every = (True, own, own, True, True, True, True)
        tensors = _batched(inputs[:7], in_dims[:7], every, info.batch_size)
        form = Form.read(pattern, affine).batched(own)
        out = (run or Forward.apply)(*tensors, *form.strings, *options)
        return out, (0, None if inputs[3] is None else 0, 0 if options[1] else None, 0)


class Backward(torch.autograd.Function):
    """``operators.backward``: gradients flow through all four outputs to everything but mean and rstd, which are
    functions of x here."""

    @staticmethod
    def forward(*inputs: Any) -> operators.Four:
        with _below():
            found: operators.Four = operators.backward(*inputs)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: operators.Four) -> None:
        ctx.options = inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, wanted in zip(output, inputs[-1], strict=True) if not wanted))
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        function, primals = _gradient(ctx.saved_tensors, ctx.options)
        found = _pullback(function, primals, cotangents, ctx.needs_input_grad[:6])
        return *found, *(None,) * (2 + len(ctx.options))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True):
            function, primals = _gradient(_primals(ctx.saved_tensors), ctx.options)
            found = _pushforward(function, primals, tangents[:6])
        return tuple(t if wanted else None for t, wanted in zip(found, ctx.options[-1], strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any, run: Any = None) -> tuple[operators.Four, Dims]:
        pattern, affine, *options = inputs[8:]
        mask = options[-1]
        # Each sample has gradients of parameters of its own, also of parameters that all share.
        own = in_dims[3] is not None or in_dims[4] is not None or mask[1] or mask[2]
        every = (True, True, True, own, own, True, True, True)
        tensors = _batched(inputs[:8], in_dims[:8], every, info.batch_size)
        form = Form.read(pattern, affine).batched(own)
        out = (run or Backward.apply)(*tensors, *form.strings, *options)
        return out, tuple(0 if wanted else None for wanted in mask)


def gradients(
    dy: Tensor | None, dsum: Tensor | None, total: Tensor, weight: Tensor | None, bias: Tensor | None,
    post_add: Tensor | None, mean: Tensor | None, rstd: Tensor, options: Sequence[Any], given: bool,
    dtypes: Sequence[torch.dtype | None], needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias, pre_add and post_add, differentiable, where they are needed.

    options: pattern, affine, lengths, center, eps, activation; dtypes: of x, pre_add and post_add.
    """
    need_x, need_w, need_b, need_pre, need_post = needs
    if dy is None:
        return gradients_of_sum(dsum, dtypes, needs)
    *form, eps, activation = options
    plain = activation == "identity"  # then g is dy
    mask = (need_x or need_pre, need_w, need_b, need_post and not plain)
    found: Tensors = (None,) * 4
    if any(mask):
        run: Any = operators.backward if is_dynamo_compiling() else Backward.apply
        found = run(
            dy, dsum, total, weight, bias, None if plain else post_add, total.new_empty(0) if mean is None else mean,
            rstd, *form, given, eps, activation, mask,
        )  # fmt: skip
    dx, dw, db, dpost = (t if wanted else None for t, wanted in zip(found, mask, strict=True))
    return (
        dx.to(dtypes[0]) if need_x and dx is not None else None, dw, db,
        dx.to(dtypes[1]) if need_pre and dx is not None else None,
        dy.to(dtypes[2]) if need_post and plain else dpost,
    )  # fmt: skip


def gradients_of_sum(
    dsum: Tensor | None, dtypes: Sequence[torch.dtype | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias, pre_add and post_add where nothing flows back through y."""
    dx, dpre = (
        dsum.to(dtype) if dsum is not None and dtype is not None and needed else None
        for dtype, needed in ((dtypes[0], needs[0]), (dtypes[1], needs[3]))
    )
    return dx, None, None, dpre, None


def _primals(saved: Tensors) -> list[Any]:
    """What was saved, without the tangents of this level.  PyTorch calls jvp with forward mode off, which loses the
    tangents of the levels around it too (a jvp of a jvp would be 0): it is on here, and only this level's are taken
    away."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in saved]


def _gradient(saved: Tensors, options: Sequence[Any]) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor | None]]:
    """``backward`` as a differentiable function of dy, dsum, x, weight, bias and post_add, and its arguments here."""
    *primals, mean, rstd = saved
    given = options[4]

    def function(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        arguments: list[Any] = [*tensors, mean if given else None, rstd if given else None, *options]
        return operators.decomposed_backward(*arguments)

    return function, primals


def _along(
    function: Callable[..., tuple[Tensor, ...]], primals: Tensors, places: Sequence[int]
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of those at some places, the others as they are."""

    def along(*tensors: Tensor) -> tuple[Tensor, ...]:
        operands = list(primals)
        for i, t in zip(places, tensors, strict=True):
            operands[i] = t
        return function(*operands)

    return along


def _pullback(
    function: Callable[..., tuple[Tensor, ...]], primals: Tensors, cotangents: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    wanted = [i for i, (t, needed) in enumerate(zip(primals, needs, strict=True)) if needed and t is not None]
    flowing = [i for i, t in enumerate(cotangents) if t is not None]
    found: list[Tensor | None] = [None] * len(primals)
    if not wanted or not flowing:
        return found

    of_wanted = _along(function, primals, wanted)

    def through(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = of_wanted(*tensors)
        return tuple(out[i] for i in flowing)

    arguments: list[Any] = [primals[i] for i in wanted]
    given = tuple(t for t in cotangents if t is not None)
    if _transforms_active():
        gradients = torch.func.vjp(through, *arguments)[1](given)
    else:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: some are outputs of the very node that is busy now.
            arguments = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in arguments]
            # A gradient of a parameter is a function of dy alone, say: nothing flows back from it where dy is constant.
            pairs = [(o, g) for o, g in zip(through(*arguments), given, strict=True) if o.requires_grad]
            if not pairs:
                return found
            outputs, given = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, arguments, given, create_graph=again, allow_unused=True)
    for i, t in zip(wanted, gradients, strict=True):
        found[i] = t
    return found


def _pushforward(
    function: Callable[..., tuple[Tensor, ...]], primals: Tensors, tangents: Tensors
) -> tuple[Tensor, ...]:
    moving = [i for i, t in enumerate(tangents) if t is not None]
    along = _along(function, primals, moving)
    arguments: Any = tuple(primals[i] for i in moving)
    given: Any = tuple(tangents[i] for i in moving)
    found: tuple[Tensor, ...]
    if _transforms_active():
        found = torch.func.jvp(along, arguments, given)[1]
    else:  # one level of forward mode exists outside torch.func, and it is in use: J v = d/du <J^T u, v>.
        found = torch.autograd.functional.jvp(along, arguments, given, create_graph=torch.is_grad_enabled())[1]
    return found


def _batched(tensors: Tensors, dims: Sequence[int | None], every: Sequence[bool], size: int) -> list[Tensor | None]:
    """Tensors with the axis of a vmap in front; those that have none get it where `every` says so."""
    return [
        t if t is None or (dim is None and not wanted)
        else t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim, wanted in zip(tensors, dims, every, strict=True)
    ]  # fmt: skip


def _register(name: str, function: Any, operator: Any, composed: Callable[..., operators.Four], count: int) -> None:
    """Autograd, and vmap where it meets the operator itself."""

    def autograd(*inputs: Any) -> Any:
        sharding.meet(inputs[0])  # here for compiled programs
        if _transforms_active():  # torch.func met the operator itself, and not the Function before it
            return composed(*inputs)
        needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:count])
        if needed or forward_ad._current_level >= 0:
            return function.apply(*inputs)
        with _below():
            return operator(*inputs)

    operators.library.impl(name, autograd, "Autograd")
    rule = partial(function.vmap, run=operator)  # where the operator was met, a Function cannot be run any more
    torch.library.register_vmap(f"{operators.NAMESPACE}::{name}", rule, lib=operators.library)


_register("forward", Forward, operators.forward, operators.decomposed_forward, 7)
_register("backward", Backward, operators.backward, operators.decomposed_backward, 8)
