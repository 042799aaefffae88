"""Activations: how they may be spelt, and what they are at the ends of the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from normops import activations, nn
from normops import functional as F

INF = float("inf")

SPELLINGS: dict[str, tuple[Any, ...]] = {
    "identity": (None, torch.nn.Identity(), torch.nn.Identity),
    "relu": (torch.relu, torch.nn.functional.relu, torch.nn.ReLU(), torch.nn.ReLU(inplace=True), torch.nn.ReLU),
    "leaky_relu": (torch.nn.functional.leaky_relu, torch.nn.LeakyReLU(0.01), torch.nn.LeakyReLU),
    "silu": ("swish", torch.nn.functional.silu, torch.nn.SiLU(), torch.nn.SiLU),
    "gelu": (torch.nn.functional.gelu, torch.nn.GELU(), torch.nn.GELU),
    "gelu_tanh": (torch.nn.GELU(approximate="tanh"),),
    "sigmoid": (torch.sigmoid, torch.nn.functional.sigmoid, torch.nn.Sigmoid(), torch.nn.Sigmoid),
    "tanh": (torch.tanh, torch.nn.functional.tanh, torch.nn.Tanh(), torch.nn.Tanh),
    "hardswish": (torch.nn.functional.hardswish, torch.nn.Hardswish(), torch.nn.Hardswish),
}


@pytest.mark.parametrize("name", activations.NAMES)
def test_spellings(name: str, device: torch.device) -> None:
    """What PyTorch has by a name is that name, for functions and for modules, which remember the name."""
    x = torch.randn(2, 6, device=device)
    expected = F.layer_norm(x, (6,), activation=name)
    assert SPELLINGS[name]
    for spelling in SPELLINGS[name]:
        assert activations.check(spelling) == name
        assert torch.equal(F.layer_norm(x, (6,), activation=spelling), expected)
        assert nn.LayerNorm(6, activation=spelling).activation == (None if spelling is None else name)


class Own(torch.nn.SiLU):
    """May compute anything."""


@pytest.mark.parametrize("activation", [
    torch.nn.LeakyReLU(0.2), torch.nn.Softplus(), torch.nn.PReLU(), torch.nn.PReLU, torch.exp, "", "swich", 1, True,
    Own(), Own, torch.nn.Linear, [],
], ids=lambda a: getattr(a, "__name__", repr(a)))  # fmt: skip
def test_others_are_refused(activation: Any, device: torch.device) -> None:
    with pytest.raises(ValueError, match="unknown activation"):
        F.layer_norm(torch.randn(2, 6, device=device), (6,), activation=activation)
    with pytest.raises(ValueError, match="unknown activation"):
        nn.LayerNorm(6, activation=activation)


# f(inf), f(-inf); None: no limit, or 0 times infinity, which PyTorch makes NaN.
ENDS: dict[str, tuple[float, float | None]] = {
    "identity": (INF, -INF), "relu": (INF, 0.0), "leaky_relu": (INF, -INF), "silu": (INF, None), "gelu": (INF, None),
    "gelu_tanh": (INF, None), "sigmoid": (1.0, 0.0), "tanh": (1.0, -1.0), "hardswish": (INF, None),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", activations.NAMES)
def test_infinities(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Infinities that come with post_add stay in their element, as do NaN."""
    x = torch.tensor([[-1.0, 1.0, -1.0, 1.0]] * 4, device=device, dtype=dtype)
    post = torch.zeros_like(x)
    post[:, 0] = torch.tensor([INF, -INF, float("nan"), 0.0])
    y = F.layer_norm(x, (4,), post_add=post, activation=name)
    clean = F.layer_norm(x, (4,), activation=name)
    assert torch.equal(y[:, 1:], clean[:, 1:]) and y[3, 0] == clean[3, 0]
    above, below = ENDS[name]
    assert y[0, 0] == above and y[2, 0].isnan()
    assert y[1, 0].isnan() or y[1, 0] == -INF if below is None else y[1, 0] == below


def test_plain_infinities(plain: Callable[[str], str]) -> None:
    """Without kernels they are PyTorch's own."""
    found = plain("""
import torch
from normops import activations, functional as F
import torch.nn.functional as theirs
x, post = torch.randn(1, 4), torch.tensor([[float("inf"), -float("inf"), float("nan"), 0.0]])
for name in ("silu", "sigmoid", "tanh", "relu", "gelu", "hardswish"):
    expected, found = getattr(theirs, name)(post), F.layer_norm(x, (4,), post_add=post, activation=name)
    assert torch.equal(found[0, :3].nan_to_num(7), expected[0, :3].nan_to_num(7)), name
print("PyTorch's")
""")
    assert found == "PyTorch's"
