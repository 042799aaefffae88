"""What fresh memory holds: a number that we choose, so that what is read before it was written shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from normops import calls, launch


class Filled:
    """torch, but its empty tensors of floats hold one number."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return self._filled(found) if name in ("empty", "empty_like", "empty_strided") else found

    def _filled(self, empty: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            t: torch.Tensor = empty(*args, **kwargs)
            return t.fill_(self._value) if t.is_floating_point() else t

        return filled


@contextmanager
def filled(value: float) -> Iterator[None]:
    """Memory that normops allocates for kernels holds this number at first."""
    with ExitStack() as stack:
        for module in (calls, launch):
            stack.enter_context(mock.patch.object(module, "torch", Filled(value)))
        yield
