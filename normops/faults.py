"""What becomes of a call whose kernels cannot run: an error that names the call, or the formula and a warning.

Before any kernel of a call is launched all of them are compiled and loaded, so that a call that fails has written
nothing: no running statistics have moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType

import torch

falling_back = False


class KernelError(RuntimeError):
    """The kernels of a call could not be compiled, loaded or launched; ``__cause__`` says why.

    >>> import normops
    >>> issubclass(normops.KernelError, RuntimeError)
    True
    """


class KernelMemoryError(KernelError, torch.OutOfMemoryError):
    """There was no memory for the workspace of a call."""


class fallback:
    """Whether calls whose kernels cannot run are computed by PyTorch's operations, with a warning; off by default.

    A function, or a context manager that puts back what was before.  Without it such a call raises
    :class:`KernelError`, a RuntimeError (also torch.OutOfMemoryError where memory for its workspace is missing).  What
    failed once is not tried again until the mode changes.  An error on the GPU itself, which comes later and ends the
    process's use of it, is not caught.

    >>> import torch, normops
    >>> with normops.fallback():
    ...     normops.functional.layer_norm(torch.ones(2, 4), (4,)).sum()
    tensor(0.)
    """

    def __init__(self, mode: bool = True) -> None:
        self._before, self._mode = falling_back, mode
        _switch(mode)

    def __enter__(self) -> None:
        _switch(self._mode)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._before)


def _switch(mode: bool) -> None:
    global falling_back
    falling_back = mode
    _warned.clear()
    for forget in changed:
        forget()


changed: list[Callable[[], None]] = []
"""What else is done when the mode changes."""
_warned: set[str] = set()


def error_of(what: str, cause: Exception) -> KernelError:
    kind = KernelMemoryError if isinstance(cause, torch.OutOfMemoryError) else KernelError
    hint = "" if falling_back else "; normops.fallback() computes such calls by PyTorch's operations"
    return kind(f"no kernels for {what}: {type(cause).__name__}: {cause}{hint}")


def warn(error: Exception) -> None:
    """Once for each cause."""
    cause = str(error.__cause__ or error)
    if cause not in _warned:
        _warned.add(cause)
        warnings.warn(f"{error}; computed by PyTorch's operations", RuntimeWarning, stacklevel=3)
