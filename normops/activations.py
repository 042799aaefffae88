"""Names of the activations that a call may end with."""

from __future__ import annotations

from .kernels.activations import ACTIVATIONS

NAMES = tuple(ACTIVATIONS)


def check(name: str | None) -> str:
    """The name of an activation; None is identity.  ValueError for any other."""
    if name is None:
        return "identity"
    if name not in NAMES:
        raise ValueError(f"activation must be None or one of {', '.join(NAMES)}, got {name!r}")
    return name
