"""Activations that a call may end with: y = act(xhat * weight + bias + post_add).

Each is what PyTorch calls so (``torch.nn.functional``): leaky_relu with slope 0.01, gelu with erf, gelu_tanh with the
tanh approximation.  They run in the dtype of the statistics, on tensors of any shape.

>>> from normops import activations
>>> "silu" in activations.NAMES
True
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import pi, sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NAMES", "check"]

Act = str | torch.nn.Module | type[torch.nn.Module] | Callable[..., Tensor] | None
"""How a call may spell one: its name, or what PyTorch has by that name: ``F.silu``, ``nn.SiLU()``, ``nn.SiLU``; None
is identity."""


class Pair(NamedTuple):
    """f(z) and its derivative, of operations that PyTorch differentiates again (silu_backward, say, it does not).
    The kernels' pair of the same name stands in ``kernels/activations.py``."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    """Phi(z) + z phi(z)."""
    return 0.5 * (1 + torch.erf(z * sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / sqrt(2 * pi)


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    k, c = sqrt(2 / pi), 0.044715
    t = torch.tanh(k * (z + c * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * c * z * z)


ACTIVATIONS = {
    "identity": Pair(lambda z: z, torch.ones_like),
    "relu": Pair(F.relu, lambda z: (z > 0).to(z.dtype)),
    "leaky_relu": Pair(
        partial(F.leaky_relu, negative_slope=0.01), lambda z: torch.ones_like(z).masked_fill(z <= 0, 0.01)
    ),
    "silu": Pair(F.silu, _silu_derivative),
    "gelu": Pair(F.gelu, _gelu_derivative),
    "gelu_tanh": Pair(partial(F.gelu, approximate="tanh"), _gelu_tanh_derivative),
    "sigmoid": Pair(torch.sigmoid, lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z))),
    "tanh": Pair(torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "hardswish": Pair(
        F.hardswish, lambda z: torch.where(z <= -3, 0, torch.where(z < 3, z / 3 + 0.5, 1)).to(z.dtype)
    ),
}
NAMES = tuple(ACTIVATIONS)


_SPELLINGS: dict[Any, str] = {
    "swish": "silu", "linear": "identity",
    F.relu: "relu", torch.relu: "relu", F.leaky_relu: "leaky_relu", F.silu: "silu", F.gelu: "gelu",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.tanh: "tanh", torch.tanh: "tanh", F.hardswish: "hardswish",
}  # fmt: skip
_MODULES: dict[type, str] = {
    torch.nn.Identity: "identity", torch.nn.ReLU: "relu", torch.nn.SiLU: "silu", torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh", torch.nn.Hardswish: "hardswish",
}  # fmt: skip


def _spelled(activation: Any) -> str | None:
    """The name of what PyTorch has by it; None where it has none, or other numbers in it."""
    if isinstance(activation, type) and issubclass(activation, torch.nn.Module):
        activation = activation() if activation in (*_MODULES, torch.nn.GELU, torch.nn.LeakyReLU) else None
    kind = type(activation)
    if kind is torch.nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if kind is torch.nn.LeakyReLU:
        return "leaky_relu" if activation.negative_slope == 0.01 else None
    if kind in _MODULES:
        return _MODULES[kind]
    try:
        return _SPELLINGS.get(activation) if isinstance(activation, str) or callable(activation) else None
    except TypeError:  # no key of anything
        return None


def check(activation: Act) -> str:
    """The name of an activation, which may be spelt as PyTorch's function or module; None is identity.  ValueError for
    any other.

    >>> import torch
    >>> from normops import activations
    >>> activations.check("relu"), activations.check(torch.nn.SiLU()), activations.check(None)
    ('relu', 'silu', 'identity')
    """
    if activation is None:
        return "identity"
    name = activation if isinstance(activation, str) and activation in ACTIVATIONS else _spelled(activation)
    if name is None:
        raise ValueError(f"unknown activation {activation!r}; expected None or one of {', '.join(NAMES)}")
    return name
