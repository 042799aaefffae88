"""Blocks that are converted and not fused, or in part, and why, for tests of conversion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import IMAGE, ROWS, Basic, ByHand


class Super(ByHand):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(super().forward(x, y))


class Between(ByHand):
    """Something looks at what lies between a norm and its activation."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(x)
        scale = h.abs().mean()
        h = F.relu(h)
        return h * scale + y


class FusedProperty(ByHand):
    """A property is counted, and left what it is."""

    @property
    def width(self) -> Tensor:
        return F.relu(self.norm(self.norm.weight * 2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.width + y


class Doubled(ByHand):
    """What is added to the norm's result is that result."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(x)
        h += h
        h = F.relu(h)
        return h + y


class Kept(ByHand):
    """The result of the norm is used again, beside the activation's."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.norm(x)
        r = h
        h = F.relu(h)
        return h + r * y


class InPlace(nn.Module):
    """Whose norm reads what a branch then changes in place."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.branch = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.norm(x)
        shortcut = self.branch(x)
        out += shortcut
        out = F.relu(out)
        x = self.first(out)
        return F.relu(self.last(x) + self.branch(x))


class Shadowed(ByHand):
    """Whose F is no module of PyTorch's."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        F = Doubling
        return F.relu(self.norm(x)) + y


class Doubling:
    @staticmethod
    def relu(x: Tensor) -> Tensor:
        return x * 2


class Private(ByHand):
    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.__scale = 2.0

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(x)) * self.__scale + y


class Leaving(nn.Module):
    """Between the norm and the sum it may be left."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        self.calls += 1
        if self.calls % 2:
            return x * self.conv.bias.sum() + self.norm.bias.sum() * 0 + self.conv(x)
        out += x
        return F.relu(out)


class Copied(nn.Module):
    """What the norm reads has another name, by which it is changed in place."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        skip = out
        out = self.norm(out)
        skip = F.relu(skip)
        out = out + skip
        return F.relu(out)


def patched() -> nn.Module:
    """As accelerate does it."""
    block: Any = Basic(4)
    for norm in (block.bn1, block.bn2):
        norm.forward = partial(type(norm).forward, norm)
    return block


def replaced() -> nn.Module:
    """Whose forward is the instance's own, as hooks of accelerate make it."""
    block: Any = Basic(4)
    block.forward = MethodType(Basic.forward, block)
    return block


def hooked() -> nn.Module:
    block = Basic(4)
    for norm in (block.bn1, block.bn2):
        norm.register_forward_hook(lambda module, args, y: None)
    return block


OTHERS = "it has a hook, a forward of its own, or an activation"


LEFT: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], str]] = {
    "super": (lambda: Super(5), ROWS, "forward calls super(), or what is around it"),
    "a name of its own": (lambda: Shadowed(5), ROWS, ""),
    "looked at": (lambda: Between(5), ROWS, ""),
    "doubled": (lambda: Doubled(5), ROWS, ""),
    "kept": (lambda: Kept(5), ROWS, ""),
    "in a property": (lambda: FusedProperty(5), ROWS, ""),
    "private": (lambda: Private(5), ROWS, "forward uses private names"),
    "leaving": (lambda: Leaving(4), [IMAGE], ""),
    "copied": (lambda: Copied(4), [IMAGE], ""),
    "a forward of its own": (replaced, [IMAGE], "forward is the instance's own"),
    "hooked": (hooked, [IMAGE], OTHERS),
    "a norm with a forward of its own": (patched, [IMAGE], OTHERS),
}
