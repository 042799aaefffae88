"""Calls that PyTorch looks into: under compilers, exporters and transforms, or of tensors that stand for others.

They go through the registered operators, or, where :class:`decompose` is on, through the formula in PyTorch's own
operations, which a compiler fuses with what stands before and after.
"""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import operators, sharding, transforms
from .norm import Norm, Operands, laid_out

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


class Result(NamedTuple):
    y: Tensor
    sum: Tensor
    mean: Tensor | None
    """None for RMS; both statistics are shaped like the kept axes of the split shape."""
    rstd: Tensor


def normalize(norm: Norm, operands: Operands, eps: float, out_dtype: torch.dtype | None, plain: bool) -> Result:
    """`plain`: an eager call of plain tensors, for which there are no kernels."""
    if not is_dynamo_compiling():
        sharding.register_for(operands.x)
    laid = laid_out(norm, operands)
    arguments = (
        *laid[:5], *(laid[5:] if norm.given else (None, None)), *norm.written, eps, norm.activation, out_dtype
    )  # fmt: skip
    levels = set() if is_dynamo_compiling() else _levels()
    if not plain and (decomposing or (len(levels) > 1 and TransformType.Functionalize in levels)):
        y, total, mean, rstd = operators.decomposed_forward(*arguments)
    elif not plain and (not levels or TransformType.Functionalize in levels):
        y, total, mean, rstd = operators.forward(*arguments)
    else:  # torch.func must meet the Function, not the operator that holds it
        y, total, mean, rstd = transforms.Forward.apply(*arguments)  # type: ignore[no-untyped-call]
    return Result(y, total, mean if norm.center else None, rstd)


def _levels() -> set[TransformType]:
    """The transforms of torch.func that are on.  All but functionalize want autograd Functions, which it has no rule
    for."""
    if not _transforms_active():
        return set()
    return {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
