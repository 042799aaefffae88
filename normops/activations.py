"""Names of the activations that a call may end with: y = act(xhat * weight + bias + post_add).

Each is what PyTorch calls so (``torch.nn.functional``): leaky_relu with slope 0.01, gelu with erf, gelu_tanh with the
tanh approximation.  They run in the dtype of the statistics, on tensors of any shape.

>>> from normops import activations
>>> activations.NAMES
('identity', 'relu', 'leaky_relu', 'silu', 'gelu', 'gelu_tanh', 'sigmoid', 'tanh', 'hardswish')
"""

from __future__ import annotations

from .kernels.activations import NAMES

__all__ = ["NAMES", "check"]


def check(name: str | None) -> str:
    """The name of an activation; None is identity.  ValueError for any other.

    >>> from normops import activations
    >>> activations.check("relu"), activations.check(None)
    ('relu', 'identity')
    """
    if name is None:
        return "identity"
    if name not in NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(NAMES)}, got {name!r}")
    return name
