"""Random calls of real sizes, compiled for devices that are not there: which of their kernels spill registers.

    python -m tests.spills [--number N] [--seed N] [--device NAME ...]

Prints each launch that spills and exits with 1 if one does.  The same seed gives the same calls.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read by normops

from normops import functional as F
from normops import normalize
from normops.testing import virtual_device

ACTIVATIONS = (None, None, None, "relu", "silu", "silu", "gelu", "leaky_relu")
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


class Call(NamedTuple):
    norm: str
    shape: tuple[int, ...]
    groups: int
    options: dict[str, Any]
    dtype: torch.dtype
    channels_last: bool


def drawn(r: random.Random) -> Call:
    """Sizes as networks have them, and odd ones, of up to 64M elements."""
    norm = r.choice(("batch", "batch", "group", "group", "instance", "layer", "rms", "layer2d"))
    groups = 0
    while True:
        if norm in ("layer", "rms"):
            shape: tuple[int, ...] = (r.choice((1, 3, 64, 4096, 16384)), r.choice((64, 96, 100, 768, 1001, 1152, 2048,
                                      4096, 5120, 8192, 12288, 32768, 65536)))  # fmt: skip
        else:
            side = r.choice((7, 8, 13, 14, 16, 24, 28, 32, 40, 48, 56, 64, 90, 112, 128, 180, 224, 256))
            groups = r.choice((4, 8, 16, 32))
            shape = (r.choice((1, 2, 8, 32, 64)), groups * r.choice((1, 2, 3, 4, 8, 10, 16, 20, 40)), side, side)
        if prod(shape) <= 1 << 26:
            break
    options: dict[str, Any] = {"activation": r.choice(ACTIVATIONS)}
    for name in ("pre_add", "post_add"):
        if r.random() < 0.15:
            options[name] = True
    return Call(norm, shape, groups, options, r.choice(DTYPES), len(shape) == 4 and r.random() < 0.4)


def run(call: Call) -> Callable[[], Any]:
    """The call and its gradient, on tensors whose memory nobody reads."""

    def empty() -> Tensor:
        t = torch.empty(call.shape, dtype=call.dtype)
        return (t.contiguous(memory_format=torch.channels_last) if call.channels_last else t).requires_grad_()

    def both() -> None:
        x, shape = empty(), call.shape
        options = {name: empty() if value is True else value for name, value in call.options.items()}
        wide = shape[1]
        w, b = (torch.empty(wide, dtype=call.dtype, requires_grad=True) for _ in range(2))
        y: Any = {
            "batch": lambda: F.batch_norm(x, None, None, w, b, training=True, **options),
            "instance": lambda: F.instance_norm(x, None, None, w, b, **options),
            "group": lambda: F.group_norm(x, call.groups, w, b, **options),
            "layer": lambda: F.layer_norm(x, (wide,), w, b, **options),
            "rms": lambda: F.rms_norm(x, (wide,), w, **options),
            "layer2d": lambda: normalize(x, "n c h w -> n h w", w, b, affine="c", **options),
        }[call.norm]()
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.empty_like(y))

    return both


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", nargs="*", default=["a100", "h100", "b200"])
    given = parser.parse_args(arguments)
    r, spilt, launches = random.Random(given.seed), 0, 0
    for _ in range(given.number):
        call = drawn(r)
        both = run(call)
        for device in given.device:
            with virtual_device(device) as gpu:
                both()
            launches += len(gpu.launches)
            for launch in gpu.launches:
                if launch.spills:
                    spilt += 1
                    print(f"{device}: {launch.name} spills {launch.spills} bytes: {call}", flush=True)
    print(f"{given.number} calls, {launches} launches, {spilt} of them spill")
    return int(spilt > 0)


if __name__ == "__main__":
    sys.exit(main())
