"""Norms of normops beside torch's own, with the same parameters, and calls of them: what several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from normops import nn
from tests.tolerance import laid_out

SHAPE = (2, 4, 3, 3)


class Channels(torch.nn.LayerNorm):
    """What torch has for LayerNorm2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "BatchNorm2d": (lambda **k: nn.BatchNorm2d(4, **k), lambda: torch.nn.BatchNorm2d(4)),
    "InstanceNorm2d": (
        lambda **k: nn.InstanceNorm2d(4, affine=True, track_running_stats=True, **k),
        lambda: torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "GroupNorm": (lambda **k: nn.GroupNorm(2, 4, **k), lambda: torch.nn.GroupNorm(2, 4)),
    "LayerNorm": (lambda **k: nn.LayerNorm(3, **k), lambda: torch.nn.LayerNorm(3)),
    "RMSNorm": (lambda **k: nn.RMSNorm(3, eps=1e-5, **k), lambda: torch.nn.RMSNorm(3, eps=1e-5)),
    "LayerNorm2d": (lambda **k: nn.LayerNorm2d(4, **k), lambda: Channels(4)),
    "Normalize": (
        lambda **k: nn.Normalize("n (g c) h w -> n g", affine="(g c)", g=2, c=2, **k),
        lambda: torch.nn.GroupNorm(2, 4)),
}  # fmt: skip
norms = pytest.mark.parametrize("name", NORMS)


def build(name: str, device: torch.device, **options: Any) -> tuple[Any, Any]:
    """(ours, torch's) with the same random parameters."""
    ours, theirs = NORMS[name][0](**options).to(device), NORMS[name][1]().to(device)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def operands(device: torch.device, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    """x, pre_add, post_add and dy."""
    x, *others = (laid_out(SHAPE, layout, dtype, device) for _ in range(4))
    return [(x * 3 + 2).requires_grad_(), *(t.requires_grad_() for t in others[:2]), others[2]]


def run(norm: Any, x: Tensor, pre: Tensor, post: Tensor, dy: Tensor) -> list[Tensor]:
    """y, sum and all gradients of a call with both additions."""
    y, total = norm(x, pre_add=pre, post_add=post)
    wanted = [x, pre, post, *norm.parameters()]
    return [y, total, *torch.autograd.grad((y, total), wanted, (dy.to(y.dtype), dy.to(total.dtype)))]


def equal(got: Any, expected: Any) -> None:
    """The same bits."""
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def alike(got: Any, expected: Any) -> None:
    """The same shapes, dtypes and strides."""
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
