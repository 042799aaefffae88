"""Compiles every launch of the case table for one device, at the real sizes, and prints what the machine code says.

Run as a program without the interpreter: ``python -m tests.compiled h200``.
"""

from __future__ import annotations

import json
import os
import sys

import torch

os.environ["TRITON_INTERPRET"] = "0"  # bench would turn it on, on a machine without a GPU

from bench.cases import CASES, Case
from bench.providers import by_normops
from normops.testing import VirtualLaunch, virtual_device

# Kernels that read and write tensors of x's size; the finishing kernels touch partial results only.
STREAMS = ("normalize", "statistics", "apply", "grad_normalize", "grad_statistics", "grad_apply")


def inputs(case: Case, memory_format: torch.memory_format, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """Operands of the real size that hold nothing: memory that is never touched is never there."""
    shape = case.shape

    def like_x(present: bool = True) -> torch.Tensor | None:
        x = torch.empty(shape, dtype=dtype, memory_format=memory_format)
        return x.requires_grad_() if present else None

    sizes = {"layer": shape[-case.dims :], "rms": shape[-case.dims :], "adaln": (shape[0], 1, shape[-1])}
    size = sizes.get(case.norm, (shape[1],))
    found = {"x": like_x(), "pre_add": like_x(case.pre_add), "post_add": like_x(case.post_add)}
    found["weight"] = torch.empty(size, requires_grad=True)
    found["bias"] = None if case.norm == "rms" else torch.empty(size, requires_grad=True)
    running = "batch" in case.norm
    found["running_mean"] = torch.zeros(size) if running else None
    found["running_var"] = torch.ones(size) if running else None
    return found


def describe(case: Case, fmt: str, inner: int, launch: VirtualLaunch, code: bool) -> dict[str, object]:
    binary = launch.binary
    row: dict[str, object] = {
        "case": case.name, "format": fmt, "kernel": launch.name, "grid": launch.grid[0], "warps": launch.num_warps,
        "registers": binary.registers, "spills": binary.spills, "inner": inner, "stream": launch.name in STREAMS,
    }  # fmt: skip
    if code and launch.name in STREAMS:
        row["loads"], row["stores"] = max(binary.accesses("LDG")), max(binary.accesses("STG"))
    return row


def main(name: str, code: bool) -> None:
    rows = []
    with virtual_device(name) as gpu:
        for case in CASES:
            for fmt, memory_format in case.formats.items():
                gpu.launches.clear()
                operands = inputs(case, memory_format, torch.bfloat16)
                outputs = by_normops(case, operands)
                torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
                x = operands["x"]
                assert x is not None
                inner = next(n for n, s in zip(x.shape, x.stride(), strict=True) if s == 1)
                if case.norm == "group" and fmt != "contiguous":
                    inner //= case.groups  # channels of a group: the innermost run
                rows.extend(describe(case, fmt, inner, launch, code) for launch in gpu.launches)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], "--code" in sys.argv)
