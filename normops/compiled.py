"""Launching a compiled kernel directly: ``kernel[grid](...)`` binds, specialises and looks up again at every call.

Everything that Triton keeps to itself is used here and nowhere else.  Where a version of Triton offers something else,
``handle`` returns None and the caller goes on through ``kernel[grid]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

# Versions whose launcher takes (grid, stream, function, metadata, launch metadata, enter hook, exit hook, *arguments).
KNOWN = {"3.5", "3.6", "3.7", "3.8", "3.9"}
_KNOWN = ".".join(triton.__version__.split(".")[:2]) in KNOWN

INTERPRETED = bool(knobs.runtime.interpret)


Handle = tuple[Callable[..., None], Any, Any]
"""A kernel that is loaded on its device: run, function and metadata, to be launched by
``run(x, y, z, stream, function, metadata, None, None, None, *args)``."""


def handle(kernel: Any) -> Handle | None:
    """What ``kernel[grid](...)`` returned, ready to be launched again with arguments of the same specialisation."""
    if not _KNOWN or not all(hasattr(kernel, name) for name in ("run", "function", "packed_metadata")):
        return None
    return kernel.run, kernel.function, kernel.packed_metadata


def loaded(kernel: Any, grid: int, *arguments: Any, **options: Any) -> Handle | None:
    """The kernel, compiled for such arguments and loaded on the current device, but not launched."""
    compiled = kernel.warmup(*arguments, grid=(grid,), **options)
    if hasattr(compiled, "_init_handles"):
        compiled._init_handles()
    return handle(compiled)


def hooked() -> bool:
    """Whether someone watches launches (a profiler): they must go through ``kernel[grid]``, which tells them."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def current() -> tuple[int, Any]:
    """The current device and its stream, as Triton sees them."""
    active = driver.active
    device = active.get_current_device()
    return device, active.get_current_stream(device)
