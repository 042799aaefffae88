"""Calls that PyTorch looks into: under compilers, exporters and transforms, or of tensors that stand for others.

They go through the registered operators, or, where :class:`decompose` is on, through the formula in PyTorch's own
operations, which a compiler fuses with what stands before and after.

The operators' derivatives are here too: reverse and forward mode of any order, and vmap.  The first derivative is
``backward``, our kernels; derivatives of that one, and tangents, are compositions of PyTorch operations.  A vmap is no
loop: its axis is one more kept axis of the same norm, and with it each sample may have parameters, or gradients of
parameters, of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import native, operators, rules, sharding
from .norm import Norm, Operands, batched, laid_out
from .rules import Rule

Tensors = Sequence[Tensor | None]
Dims = tuple[int | None, ...]
Function = Callable[..., operators.Four]

CONSTANT = (
    "running_mean and running_var are constants where they stand in for the statistics of x: expected tensors that "
    "require no gradient and have no tangent"
)

# No views are tracked either: an output that is a view inside would count as one outside.
_below = torch._C._AutoDispatchBelowADInplaceOrView
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state  # torch.jit.trace


decomposing = False


class decompose:
    """Whether compiled and exported programs hold PyTorch's operations in place of our operators; off by default.

    A function, or a context manager that puts back what was before; what counts is its state when a program is traced
    (a change has ``torch.compile`` trace anew).  Eager calls run the kernels either way.

    >>> import torch, normops
    >>> program = torch.compile(normops.functional.layer_norm, fullgraph=True, backend="eager")
    >>> with normops.decompose():
    ...     program(torch.randn(2, 4), (4,)).shape
    torch.Size([2, 4])
    """

    def __init__(self, mode: bool = True) -> None:
        global decomposing
        self._before, self._mode, decomposing = decomposing, mode, mode

    def __enter__(self) -> None:
        global decomposing
        decomposing = self._mode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global decomposing
        decomposing = self._before


def watched() -> bool:
    """Whether PyTorch traces or transforms what is computed now."""
    return (
        is_dynamo_compiling() or _transforms_active() or _dispatch_modes() > 0 or forward_ad._current_level >= 0
        or _tracing() is not None
    )  # fmt: skip


def exporting() -> bool:
    """Whether ``torch.onnx.export`` looks into what is computed now."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def exported(
    rule: Rule, norm: Norm, operands: Operands, arguments: tuple[Any, ...], eps: float,
    out_dtype: torch.dtype | None, momentum: float | Tensor | None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """-> y and x + pre_add by the function of ``torch.nn.functional`` that has the rule's name; None without one."""
    x, weight, bias, pre_add, *_, running_mean, running_var = operands
    if rule is rules.normalize or norm.round_first or (rule is rules.rms_norm and _tracing() is not None):
        return None  # the exporter of torch.jit knows no RMSNorm
    total = x if pre_add is None else x + pre_add
    function = getattr(torch.nn.functional, rule.__name__)
    if any(t is not None and t.dtype != total.dtype for t in (weight, bias)):
        return None  # which it refuses
    if rule in (rules.batch_norm, rules.instance_norm):
        y = function(total, running_mean, running_var, weight, bias, *arguments, momentum, eps)
    elif rule is rules.rms_norm:
        y = function(total, arguments[0], weight, eps)
    else:
        y = function(total, arguments[0], weight, bias, eps)
    return _cast(native.finished(y, norm, operands), out_dtype or x.dtype), total


def normalize(
    norm: Norm, operands: Operands, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """-> y, sum, mean (None for RMS) and rstd."""
    if not is_dynamo_compiling():
        sharding.register_for(operands.x)
    arguments = _arguments(norm, operands, eps, out_dtype)
    # The transforms of torch.func that are on.  All but functionalize, which has no rule for them, want Functions.
    levels = set()
    if not is_dynamo_compiling() and _transforms_active():
        levels = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    if decomposing or exporting() or (len(levels) > 1 and TransformType.Functionalize in levels):
        y, total, mean, rstd = operators.decomposed_forward(*arguments)
    elif not levels or TransformType.Functionalize in levels:
        y, total, mean, rstd = operators.forward(*arguments)
    else:
        y, total, mean, rstd = Forward.apply(*arguments)  # type: ignore[no-untyped-call]
    return y, total, mean if norm.center else None, rstd


def recorded(
    norm: Norm, operands: Operands, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The same of an eager call, with a history: of tensors for which there are no kernels."""
    arguments = _arguments(norm, operands, eps, out_dtype)
    y, total, mean, rstd = Forward.apply(*arguments)  # type: ignore[no-untyped-call]
    return y, total, mean if norm.center else None, rstd


def _arguments(norm: Norm, operands: Operands, eps: float, out_dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Of ``operators.forward``."""
    laid = laid_out(norm, operands)
    given = laid[5:] if norm.given else (None, None)
    return *laid[:5], *given, *norm.written, eps, norm.activation, out_dtype, norm.round_first


class Forward(torch.autograd.Function):
    """``operators.forward``: gradients flow through y and sum, not through mean and rstd."""

    @staticmethod
    def forward(*inputs: Any) -> operators.Four:
        sharding.register_for(inputs[0])  # here for vmap
        with _below():
            found: operators.Four = operators.forward(*inputs)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: operators.Four) -> None:
        a = operators.Forward(*inputs)
        _, total, at_mean, rstd = output
        if any(ctx.needs_input_grad[5:7]):
            raise RuntimeError(CONSTANT)
        ctx.options, ctx.given = inputs[7:], a.given
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (a.x, a.pre_add, a.post_add))
        ctx.set_materialize_grads(False)
        summed = ctx.needs_input_grad[0] or ctx.needs_input_grad[3] or forward_ad._current_level >= 0
        ctx.mark_non_differentiable(at_mean, rstd, *(() if a.pre_add is not None and summed else (total,)))
        post_add = None if a.activation == "identity" else a.post_add
        ctx.save_for_backward(a.x if a.pre_add is None else total, a.weight, a.bias, post_add, at_mean, rstd)
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *form, eps, activation, _, _ = ctx.options
        run, plain = partial(by_operator, (*form, ctx.given, eps, activation)), activation == "identity"
        found = gradients(run, ctx.saved_tensors, dy, dsum, ctx.dtypes, ctx.needs_input_grad[:5], plain)
        return *found, *(None,) * (2 + len(ctx.options))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        if any(t is not None for t in tangents[5:7]):
            raise RuntimeError(CONSTANT)
        with forward_ad._set_fwd_grad_enabled(True):
            function = lambda *tensors: operators.decomposed_forward(*tensors, *ctx.options)  # noqa: E731
            ty, ts, *_ = _pushforward(function, _primals(ctx.saved_tensors), tangents[:7])
            return ty, None if ctx.saved_tensors[3] is None else ts, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any, run: Any = None) -> tuple[operators.Four, Dims]:
        a = operators.Forward(*inputs)
        own = in_dims[1] is not None or in_dims[2] is not None
        out = (run or Forward.apply)(*_batched(inputs, in_dims, (1, 2), own, info.batch_size))
        return out, (0, None if a.pre_add is None else 0, 0 if a.center else None, 0)


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
        function = _gradient(ctx.saved_tensors, ctx.options)
        found = _pullback(function, ctx.saved_tensors[:6], cotangents, ctx.needs_input_grad[:6])
        return *found, *(None,) * (2 + len(ctx.options))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        with forward_ad._set_fwd_grad_enabled(True):
            primals = _primals(ctx.saved_tensors)
            found = _pushforward(_gradient(primals, ctx.options), primals[:6], tangents[:6])
        return tuple(t if wanted else None for t, wanted in zip(found, ctx.options[-1], strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any, run: Any = None) -> tuple[operators.Four, Dims]:
        mask = inputs[-1]
        # Each sample has gradients of parameters of its own, also of parameters that all share.
        own = in_dims[3] is not None or in_dims[4] is not None or mask[1] or mask[2]
        out = (run or Backward.apply)(*_batched(inputs, in_dims, (3, 4), own, info.batch_size))
        return out, tuple(0 if wanted else None for wanted in mask)


def gradients(
    run: Callable[..., Tensors], kept: Tensors, dy: Tensor | None, dsum: Tensor | None,
    dtypes: Sequence[torch.dtype | None], needs: Sequence[bool], plain: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias, pre_add and post_add, where they are needed.

    `run` takes what was kept, dy, dsum and which of dx, dw, db and dpost are wanted, and returns these; dtypes: of x,
    pre_add and post_add; `plain`: no activation follows post_add.
    """
    need_x, need_w, need_b, need_pre, need_post = needs
    mask = (need_x or need_pre, need_w, need_b, need_post and not plain)
    if dy is None:  # nothing flows back through y
        dx, dw, db, dpost = dsum, None, None, None
    else:
        dx, dw, db, dpost = run(kept, dy, dsum, mask) if any(mask) else (None, None, None, None)
        dpost = dy if plain else dpost
    return (
        _cast(dx, dtypes[0]) if need_x else None, dw, db, _cast(dx, dtypes[1]) if need_pre else None,
        _cast(dpost, dtypes[2]) if need_post else None,
    )  # fmt: skip


def _cast(t: Any, dtype: torch.dtype | None) -> Any:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def by_operator(
    options: Sequence[Any], kept: Tensors, dy: Tensor, dsum: Tensor | None, mask: tuple[bool, ...]
) -> Tensors:
    """dx, dw, db, dpost, differentiable.

    options: pattern, affine, lengths, center, given, eps, activation; kept: what was normalised, weight, bias,
    post_add, mean, rstd.
    """
    total, weight, bias, post_add, mean, rstd = kept
    run: Any = operators.backward if is_dynamo_compiling() else Backward.apply
    mean = total.new_empty(0) if mean is None else mean  # type: ignore[union-attr]
    found = run(dy, dsum, total, weight, bias, post_add, mean, rstd, *options, mask)
    return [t if wanted else None for t, wanted in zip(found, mask, strict=True)]


def _primals(saved: Tensors) -> list[Any]:
    """What was saved, without the tangents of this level.  PyTorch calls jvp with forward mode off, which loses the
    tangents of the levels around it too (a jvp of a jvp would be 0): it is on here, and only this level's are taken
    away."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in saved]


def _gradient(saved: Tensors, options: Sequence[Any]) -> Function:
    """``backward`` as a differentiable function of dy, dsum, x, weight, bias and post_add."""
    statistics = saved[6:] if options[4] else (None, None)  # constants, or functions of x
    return lambda *tensors: operators.decomposed_backward(*tensors, *statistics, *options)


def _pullback(
    function: Function, primals: Tensors, cotangents: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    wanted = [i for i, (t, needed) in enumerate(zip(primals, needs, strict=True)) if needed and t is not None]
    flowing = [i for i, t in enumerate(cotangents) if t is not None]
    found: list[Tensor | None] = [None] * len(primals)
    if not wanted or not flowing:
        return found

    def through(*tensors: Tensor) -> tuple[Tensor, ...]:
        moving = dict(zip(wanted, tensors, strict=True))
        out = function(*(moving.get(i, t) for i, t in enumerate(primals)))
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


def _pushforward(function: Function, primals: Tensors, tangents: Tensors) -> list[Tensor]:
    """Tangents of what a function returns, by dual numbers of the level that is on."""
    duals = [
        t if t is None or tangent is None else forward_ad.make_dual(t, tangent)
        for t, tangent in zip(primals, tangents, strict=True)
    ]
    found = (forward_ad.unpack_dual(t) for t in function(*duals))
    return [torch.zeros_like(t) if tangent is None else tangent for t, tangent in found]


def _batched(inputs: Sequence[Any], dims: Dims, parameters: tuple[int, int], own: bool, size: int) -> list[Any]:
    """Arguments of an operator for all samples of a vmap, whose axis comes first.  Parameters, which stand at two
    places, get it where each sample has its `own`."""
    at = next(i for i, value in enumerate(inputs) if isinstance(value, str))  # tensors, pattern, affine, options
    found: list[Any] = []
    for i, (t, dim) in enumerate(zip(inputs[:at], dims[:at], strict=True)):
        if t is not None and dim is not None:
            t = t.movedim(dim, 0)
        elif t is not None and (own or i not in parameters):
            t = t.expand(size, *t.shape)
        found.append(t)
    return [*found, *batched(inputs[at], inputs[at + 1], own), *inputs[at + 2 :]]


def _register(name: str, function: Any, operator: Any, composed: Callable[..., operators.Four], count: int) -> None:
    """Autograd, and vmap where it meets the operator itself."""

    def autograd(*inputs: Any) -> Any:
        sharding.register_for(inputs[0])  # here for compiled programs
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
