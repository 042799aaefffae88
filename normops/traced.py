"""The way of calls that PyTorch looks into: compilers, exporters, transforms, tensors that stand for others.

They go through the registered operators, or, where :class:`decompose` is on, through the formula in PyTorch's own
operations, which a compiler fuses with what stands before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.compiler import is_dynamo_compiling

from . import calls, checks, operators, sharding, transforms
from .checks import Axes, Operands

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


class Result(NamedTuple):
    y: Tensor
    sum: Tensor | None
    mean: Tensor | None
    rstd: Tensor


def normalize(
    check: Callable[..., Axes], options: tuple[Any, ...], activation: str | None, out_dtype: torch.dtype | None,
    eps: float, operands: Operands, center: bool, given: bool,
) -> tuple[Axes, Result]:  # fmt: skip
    """What a call means, and y, sum (None without pre_add), mean (None for RMS) and rstd, shaped like the kept axes of
    the split shape.  With `given`, running statistics stand in for those of x."""
    if not is_dynamo_compiling():
        sharding.meet(operands.x)
    axes = calls.checked(check, options, activation, out_dtype, operands)
    x, weight, bias, pre_add, post_add, mean, var = operands
    if not given:
        mean = var = None
    sizes = [n for parts in axes.factors for n in parts]
    weight, bias = (_dense(t, axes, sizes) for t in (weight, bias))
    pre_add, post_add = (None if t is None else t.expand(x.shape) for t in (pre_add, post_add))
    tensors = (x, weight, bias, pre_add, post_add, mean, var)
    form = (*checks.written(axes), center, float(eps), activation or "identity", out_dtype)
    levels = set() if is_dynamo_compiling() else _levels()
    if decomposing or (len(levels) > 1 and TransformType.Functionalize in levels):
        found = operators.decomposed_forward(*tensors, *form)
    elif not levels or TransformType.Functionalize in levels:
        found = operators.forward(*tensors, *form)
    else:  # torch.func must meet the Function, not the operator that holds it
        found = transforms.Forward.apply(*tensors, *form)  # type: ignore[no-untyped-call]
    y, total, at_mean, rstd = found
    return axes, Result(y, None if pre_add is None else total, at_mean if center else None, rstd)


def _levels() -> set[TransformType]:
    """The transforms of torch.func that are on.  All but functionalize want autograd Functions, which it has no rule
    for."""
    if not torch._C._are_functorch_transforms_active():
        return set()
    return {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}


def _dense(t: Tensor | None, axes: Axes, sizes: list[int]) -> Tensor | None:
    """A parameter as operators take it."""
    if t is None:
        return None
    if axes.weight_shape is not None:
        t = t.expand(axes.weight_shape).reshape([sizes[i] for i in axes.affine])
    return t.contiguous()
