"""PyTorch's own samples of its norms, and what it says of its errors, run against ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from normops import functional as F

NORMS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAMPLES = {op.name.rpartition(".")[2]: op for op in op_db if op.name in {f"nn.functional.{n}" for n in NORMS}}


def results(function: Any, sample: Any, dtype: torch.dtype) -> list[Tensor]:
    """y, the gradients of what requires one, and the operands after the call, running statistics among them."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().to(dtype).requires_grad_(value.requires_grad)

    x, arguments, named = own(sample.input), list(map(own, sample.args)), {k: own(v) for k, v in sample.kwargs.items()}
    operands = [t for t in (x, *arguments, *named.values()) if isinstance(t, Tensor)]
    y = function(x, *arguments, **named)
    leaves = [t for t in operands if t.requires_grad]
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(dtype)
    return [y, *torch.autograd.grad(y, leaves, dy, allow_unused=True), *operands]


def faults(norm: str, dtype: torch.dtype) -> Iterator[str]:
    """Where ours is further from float64 than twice PyTorch and 32 units in the last place of the largest."""
    op, ours, theirs = SAMPLES[norm], getattr(F, norm), getattr(torch.nn.functional, norm)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        told = f"{norm}, {dtype}, {tuple(sample.input.shape)}, {sample.args}, {sample.kwargs}"
        exact = results(theirs, sample, torch.float64)
        for i, (a, b, e) in enumerate(
            zip(results(ours, sample, dtype), results(theirs, sample, dtype), exact, strict=True)
        ):
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                if a is not b:
                    yield f"{told}: result {i} is {a}, and not {b}"
                continue
            if not a.numel():
                continue
            limit = 32 * torch.finfo(dtype).eps * max(1.0, float(e.abs().max()))
            error, torch_s = (float((t.double() - e).abs().max()) for t in (a, b))
            if not error <= 2 * torch_s + limit:
                yield f"{told}: result {i} is off by {error}, PyTorch's by {torch_s}"


def errors(norm: str) -> Iterator[str]:
    """Where PyTorch says what it raises, and ours raises something else."""
    op = SAMPLES[norm]
    for wrong in op.error_inputs("cpu") if op.error_inputs_func else ():
        sample = wrong.sample_input
        try:
            getattr(F, norm)(sample.input, *sample.args, **sample.kwargs)
        except Exception as found:
            if not isinstance(found, wrong.error_type):
                yield f"{norm}: {found!r}, expected {wrong.error_type}"
        else:
            yield f"{norm}: no error, expected {wrong.error_regex}"
