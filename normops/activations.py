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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NAMES", "check"]


class Activation(NamedTuple):
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
    "identity": Activation(lambda z: z, torch.ones_like),
    "relu": Activation(F.relu, lambda z: (z > 0).to(z.dtype)),
    "leaky_relu": Activation(
        partial(F.leaky_relu, negative_slope=0.01), lambda z: torch.ones_like(z).masked_fill(z <= 0, 0.01)
    ),
    "silu": Activation(F.silu, _silu_derivative),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "gelu_tanh": Activation(partial(F.gelu, approximate="tanh"), _gelu_tanh_derivative),
    "sigmoid": Activation(torch.sigmoid, lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z))),
    "tanh": Activation(torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "hardswish": Activation(
        F.hardswish, lambda z: torch.where(z <= -3, 0, torch.where(z < 3, z / 3 + 0.5, 1)).to(z.dtype)
    ),
}
NAMES = tuple(ACTIVATIONS)


def check(name: str | None) -> str:
    """The name of an activation; None is identity.  ValueError for any other.

    >>> from normops import activations
    >>> activations.check("relu"), activations.check(None)
    ('relu', 'identity')
    """
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected None or one of {', '.join(NAMES)}")
    return name or "identity"
