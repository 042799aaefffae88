"""Where Triton's interpreter touches memory: the methods that instruments put themselves in the way of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

Method = Callable[..., Any]


class Access(NamedTuple):
    """A method of the interpreter's builder.  All others that touch memory come down to these: unmasked loads and
    stores, block pointers, tensor descriptors."""

    method: str
    ptr: int = 0
    """Place of the pointers among its arguments."""
    mask: int | None = None
    reads: bool = True
    writes: bool = True
    atomic: bool = False
    inner: str = ""
    """What it comes down to itself."""

    def __str__(self) -> str:
        return "atomic" if self.atomic else "load" if self.reads else "store"


LOAD = Access("create_masked_load", mask=1, writes=False)
STORE = Access("create_masked_store", mask=2, reads=False)
ACCESSES = (
    LOAD,
    STORE,
    Access("create_atomic_rmw", ptr=1, mask=3, atomic=True),
    Access("create_atomic_cas", atomic=True),
    # From Triton 3.9 on.
    Access("create_atomic_poll", writes=False, atomic=True, inner=LOAD.method),
    Access("create_atomic_load", mask=1, writes=False, atomic=True, inner=LOAD.method),
    Access("create_atomic_store", mask=2, reads=False, atomic=True, inner=STORE.method),
)


def lanes(access: Access, args: tuple[Any, ...]) -> tuple[np.ndarray, int]:
    """Addresses of the lanes that are not masked out, and the size of an element."""
    ptr = args[access.ptr]
    addresses = np.asarray(ptr.data).astype(np.int64)
    size = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
    mask = None if access.mask is None else args[access.mask]
    if mask is None:
        return addresses.ravel(), size
    return addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)], size


@contextmanager
def around(wrap: Callable[[Access, Method], Method | None]) -> Iterator[None]:
    """Inside the block `wrap(access, method)` stands for each method; None leaves it alone.

    Nests: who comes later is asked first.
    """
    builder = interpreter.InterpreterBuilder
    with ExitStack() as stack:
        for access in ACCESSES:
            original = getattr(builder, access.method, None)  # not in every version of Triton
            method = original and wrap(access, original)
            if method is not None:
                stack.enter_context(patch.object(builder, access.method, method))
        yield


@contextmanager
def around_launches(wrap: Callable[[Method], Method]) -> Iterator[None]:
    """Inside the block `wrap(launch)` stands for what runs a grid."""
    executor = interpreter.GridExecutor
    with patch.object(executor, "__call__", wrap(executor.__call__)):
        yield


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in an argument: in tuples, tensor descriptors and reinterpreted tensors, too."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for part, element in zip(parts(name, value), value, strict=True):
            yield from tensors_in(part, element)
    elif isinstance(getattr(value, "base", None), Tensor):
        yield name, value.base


def parts(name: str, value: tuple[Any, ...] | list[Any]) -> list[str]:
    """Names of the elements of an argument."""
    fields = getattr(value, "_fields", None)
    return [f"{name}.{f}" for f in fields] if fields else [f"{name}[{i}]" for i in range(len(value))]
