"""Calls whose forward the ticketed engine takes, of every pattern; a seed chooses their shapes, odd ones among them."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normops import functional as F
from tests.tolerance import TINY, check, leaf, oracle

EPS, MOMENTUM = 1e-5, 0.3
SMALL = TINY
"""Tiles so small that a few hundred elements have several units of several tiles."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: Tensor) -> Tensor:
    return t.detach().view(BITS[t.element_size()])


@dataclass(frozen=True)
class Norm:
    call: Callable[..., Any]
    weight: Callable[[tuple[int, ...]], tuple[int, ...]]
    """The shape of weight and bias that broadcasts against x."""
    axes: tuple[int, ...]
    flat: bool = True
    """Whether the call takes weight and bias as one axis."""
    groups: int | None = None
    center: bool = True
    running: bool = False


def channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1],) + (1,) * (len(shape) - 2)


def batch(x: Tensor, w: Tensor, b: Tensor, rm: Tensor, rv: Tensor, **extras: Any) -> Any:
    return F.batch_norm(x, rm, rv, w, b, True, MOMENTUM, **extras)


BATCH = Norm(batch, channel, (0, 2, 3), running=True)
INSTANCE = Norm(lambda x, w, b, **k: F.instance_norm(x, None, None, w, b, **k), channel, (2, 3))
GROUP = Norm(lambda x, w, b, **k: F.group_norm(x, 4, w, b, **k), channel, (2, 3, 4), groups=4)
ROWS = Norm(lambda x, w, b, **k: F.layer_norm(x, x.shape[-1:], w, b, **k), lambda s: s[-1:], (-1,), flat=False)
WHOLE = Norm(lambda x, w, b, **k: F.layer_norm(x, x.shape[1:], w, b, **k), lambda s: s[1:], (1, 2, 3), flat=False)
CHANNELS = Norm(lambda x, w, b, **k: F.normalize(x, (1,), w, b, **k), channel, (1,), flat=False)
PLATES = Norm(lambda x, w, b, **k: F.normalize(x, (1, 2), w, b, **k), lambda s: (*s[:2], 1, 1), (1, 2), flat=False)
RMS = Norm(lambda x, w, b, **k: F.rms_norm(x, x.shape[-1:], w, EPS, **k), lambda s: s[-1:], (-1,), False, center=False)

# Bounds of each extent of x, both included; "last": channels_last.
PLANES = ((2, 3), (2, 3), (4, 7), (9, 13))
CASES = {
    "batch": (BATCH, PLANES, "", torch.float32, ()),
    "batch, activation": (BATCH, PLANES, "", torch.bfloat16, ("pre", "post", "act")),
    "instance": (INSTANCE, ((1, 2), (2, 2), (7, 9), (10, 15)), "", torch.bfloat16, ("act",)),
    "instance, sum": (INSTANCE, ((1, 2), (2, 2), (5, 7), (7, 9)), "", torch.float64, ("pre", "post", "act")),
    "group": (GROUP, ((1, 1), (8, 8), (4, 7), (9, 13)), "", torch.float32, ("pre",)),
    "rows": (ROWS, ((3, 4), (70, 120)), "", torch.float32, ("pre",)),
    "rows, activation": (ROWS, ((3, 4), (70, 120)), "", torch.bfloat16, ("post", "act")),
    "rows, double": (ROWS, ((2, 3), (35, 70)), "", torch.float64, ("pre", "post")),
    "whole": (WHOLE, ((3, 5), (2, 3), (3, 4), (7, 9)), "", torch.float32, ("act",)),
    "whole, last": (WHOLE, ((3, 4), (2, 3), (3, 4), (7, 9)), "last", torch.bfloat16, ("pre",)),
    "channels": (CHANNELS, ((2, 3), (5, 9), (2, 4), (3, 5)), "", torch.float32, ("pre",)),
    "channels, activation": (CHANNELS, ((1, 3), (9, 15), (2, 4), (3, 5)), "", torch.bfloat16, ("act", "post")),
    "channels, last": (CHANNELS, ((1, 1), (50, 80), (1, 1), (2, 3)), "last", torch.float64, ()),
    "plates": (PLATES, ((1, 3), (3, 5), (9, 13), (3, 9)), "", torch.float32, ("post", "act")),
    "plates, sum": (PLATES, ((1, 2), (3, 5), (9, 13), (5, 9)), "", torch.bfloat16, ("pre",)),
    "one channel": (BATCH, ((2, 3), (1, 1), (4, 7), (9, 13)), "", torch.float32, ("post", "act")),
    "rms": (RMS, ((3, 4), (70, 110)), "", torch.float32, ("pre", "act")),
    "rms, activation": (RMS, ((3, 4), (70, 110)), "", torch.bfloat16, ("post", "act")),
}  # fmt: skip


def rows_alone(name: str) -> bool:
    """Whether parameters vary along all that is averaged over: the sums for them are as large as x, and such a
    backward is split."""
    return CASES[name][0] in (ROWS, WHOLE, CHANNELS, RMS)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A program of the sequential interpreter that waits for a later one waits for ever."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds:g} s: a program waits for one after it")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Call:
    """One call of a case, its shape chosen by the seed."""

    def __init__(self, name: str, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.norm, bounds, layout, dtype, extras = CASES[name]
        self.random = random.Random(f"{name} {seed}")
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        shape = tuple(self.random.randint(*b) for b in bounds)

        def operand(size: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
            t = torch.randn(size, generator=generator).mul(scale).add(shift).to(device, dtype)
            if layout == "last" and size == shape:
                t = t.contiguous(memory_format=torch.channels_last)
            return t.requires_grad_()

        sizes = self.norm.weight(shape)
        self.x, self.w = operand(shape, shift=2.0), operand(sizes, 0.5, 1.0)
        self.b = operand(sizes) if self.norm.center else None
        self.pre = operand(shape) if "pre" in extras else None
        self.post = operand(shape) if "post" in extras else None
        self.activation = "silu" if "act" in extras else None
        self.dy = operand(shape).detach()
        self.running = {
            "running_mean": torch.zeros(shape[1], device=device), "running_var": torch.ones(shape[1], device=device),
        }  # fmt: skip
        self.leaves = [t for t in (self.x, self.w, self.b, self.pre, self.post) if t is not None]

    def forward(self) -> tuple[Tensor, Tensor | None]:
        w, b = (t.flatten() if self.norm.flat and t is not None else t for t in (self.w, self.b))
        given = (*self.running.values(),) if self.norm.running else ()
        extras = {"pre_add": self.pre, "post_add": self.post, "activation": self.activation}
        out = self.norm.call(self.x, w, b, *given, **extras)
        return out if isinstance(out, tuple) else (out, None)

    def run(self) -> dict[str, Tensor]:
        """Forward and backward: everything that comes out, by name."""
        y, total = self.forward()
        grads = torch.autograd.grad(y, self.leaves, self.dy)
        found = {"y": y, **{f"gradient {i}": g for i, g in enumerate(grads)}}
        found |= {} if total is None else {"sum": total}
        return {name: t.detach().clone() for name, t in (found | self.running).items()}

    def check(self, found: dict[str, Tensor]) -> None:
        """Against the formula in float64."""
        exact = {id(t): leaf(t) for t in self.leaves}
        operands = (self.x, self.w, self.b, self.pre, self.post)
        x, w, b, pre, post = (None if t is None else exact[id(t)] for t in operands)
        ref, s = oracle(
            x, self.norm.axes, w, b, eps=EPS, center=self.norm.center, activation=self.activation, pre_add=pre,
            post_add=post, groups=self.norm.groups, total=found.get("sum"),
        )  # fmt: skip
        check("y", found["y"], ref)
        if "sum" in found:
            check("sum", found["sum"], x + pre)
        for i, g in enumerate(torch.autograd.grad(ref, list(exact.values()), self.dy.double())):
            # A parameter's gradient is a sum of up to some hundreds of terms that partly cancel.
            check(f"gradient {i}", found[f"gradient {i}"], g, scale=4)
        if self.norm.running:
            s = s.detach()
            check("running_mean", found["running_mean"], MOMENTUM * s.mean(self.norm.axes))
            check("running_var", found["running_var"], 1 - MOMENTUM + MOMENTUM * s.var(self.norm.axes))
