"""What lets programs of Triton's interpreter run in several processes: their tensors in shared memory, pauses before
accesses to it, and atomics that are atomic between processes."""

from __future__ import annotations

import ctypes
import inspect
import math
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from .accesses import LOAD, Access, Method, around

_WAITING = 50e-6
"""Seconds that a process sleeps where a program reads one address again and again."""
_PAUSES = (-6.0, -1.5)
"""Decimal logarithms of the shortest and of the longest pause, in seconds: from one access to a whole program."""


class Memory:
    """The storages of all tensors, each once, in memory that forked processes share.

    They are copied: share_memory_() would free the memory under numpy's views of a tensor, and needs room in /dev/shm.
    """

    def __init__(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self._tensors = [t for _, t in tensors if t.untyped_storage().nbytes()]
        self._shared: dict[int, Tensor] = {}
        spans: dict[int, tuple[int, str]] = {}
        for name, t in tensors:
            if t.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU, where the processes run; got {t.device}")
            storage = t.untyped_storage()
            if storage.nbytes():
                spans.setdefault(storage.data_ptr(), (storage.data_ptr() + storage.nbytes(), name))
        end, before = 0, ""
        for start, (stop, name) in sorted(spans.items()):
            if start < end:
                raise ValueError(f"{before} and {name} overlap and must then be views of one storage; got two storages")
            end, before = stop, name
            self._shared[start] = torch.frombuffer(mmap.mmap(-1, stop - start), dtype=torch.uint8)
        self.load()

    def load(self) -> None:
        """From the caller's tensors."""
        for address, shared in self._shared.items():
            ctypes.memmove(shared.data_ptr(), address, shared.nbytes)

    def store(self) -> None:
        """To the caller's tensors."""
        for address, shared in self._shared.items():
            ctypes.memmove(address, shared.data_ptr(), shared.nbytes)

    def adopt(self) -> None:
        """Have the tensors themselves lie in shared memory: in a process of the race, where they are its own copies."""
        moved = []
        for t in self._tensors:
            storage = self._shared[t.untyped_storage().data_ptr()].untyped_storage()
            there = torch.empty(0, dtype=t.dtype).set_(storage, t.storage_offset(), t.size(), t.stride())
            moved.append((t, there))
        for t, there in moved:
            t.data = there


class Jitter:
    """Pauses before accesses to memory, and gives the core away where a program waits."""

    def __init__(self, probability: float, seed: str) -> None:
        self._probability = probability
        self._random = random.Random(seed)
        self._parent = os.getppid()
        self._last: int | None = None
        self._atomic = False

    def __call__(self, ptr: Any = None, atomic: bool = False) -> None:
        if os.getppid() != self._parent:  # the caller was killed: a program that waits would outlive it
            os._exit(1)
        address = int(ptr.data.flat[0]) if ptr is not None and ptr.data.size == 1 else None
        # What an atomic operation told, others act on at once: a store that comes too late is late enough there.
        probability = self._probability**0.5 if self._atomic else self._probability
        self._atomic = atomic
        if self._random.random() < probability:
            time.sleep(10 ** self._random.uniform(*_PAUSES))
        elif address is not None and address == self._last:
            time.sleep(_WAITING)
        elif atomic:
            os.sched_yield()
        self._last = address


def _lane_by_lane(original: Callable[..., Any], lock: Any) -> Callable[..., Any]:
    """An atomic operation as many, each under a lock: the lanes of a block are not atomic together on a GPU either."""

    def method(self: Any, *args: Any) -> Any:
        handle = interpreter.TensorHandle
        shape = next(a for a in args if isinstance(a, handle)).data.shape
        flat = [np.broadcast_to(a.data, shape).ravel() if isinstance(a, handle) else None for a in args]
        results = []
        for i in range(math.prod(shape)):
            lane = [
                a if values is None else handle(values[i : i + 1].copy(), a.dtype)
                for a, values in zip(args, flat, strict=True)
            ]
            with lock:
                results.append(original(self, *lane))
        if not results or results[0] is None:
            return None
        return handle(np.concatenate([r.data for r in results]).reshape(shape), results[0].dtype)

    return method


@contextmanager
def jittered(jitter: Jitter, lock: Any) -> Iterator[None]:
    """Jitter before every access; atomics of less than 32 bits made atomic between processes.

    The interpreter's atomics are the machine's, hence atomic between processes, but for float16: that sum is guarded by
    a mutex of the process.  All narrow ones take the lock, so that different operations on one address exclude each
    other.
    """

    def wrap(access: Access, original: Method) -> Method | None:
        if access.inner == LOAD.method:
            return None
        guarded = _lane_by_lane(original, lock)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            ptr = args[access.ptr]
            jitter(ptr, access.atomic)
            narrow = access.atomic and ptr.get_element_ty().primitive_bitwidth < 32
            return (guarded if narrow else original)(self, *args, **kwargs)

        return method

    with around(wrap):
        yield


class Programs:
    """Stands where the interpreter expects a kernel's function: called once, it runs programs until told to end."""

    def __init__(self, function: Any, run: Callable[[Callable[[], Any]], None]) -> None:
        self.__name__, self.__annotations__ = function.__name__, function.__annotations__
        self.__globals__, self.__signature__ = function.__globals__, inspect.signature(function)
        self._function, self._run = function, run

    def __call__(self, **arguments: Any) -> None:
        self._run(lambda: self._function(**arguments))


class Executor(interpreter.GridExecutor):  # type: ignore[misc]  # Triton's interpreter has no types
    def _restore_args_dev(self, *_: Any) -> None:
        """Nothing to copy back."""
