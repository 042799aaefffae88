"""Faults in the accesses of kernels, found by Triton's interpreter: what compute-sanitizer looks for on a GPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import traced
from ..calls import INTERPRETED
from .accesses import STORE, Access, Method, around, around_launches, lanes, parts

KINDS = ("outside", "unwritten", "overlapping")
_BITS = 48
"""Bits of an address that machines use; an argument's number is in those above."""
_NOT_KERNELS = (Path(triton.__file__).parent, Path(np.__file__).parent, Path(__file__).parent)
"""Where frames are those of the interpreter, or ours."""


class Fault(RuntimeError):
    """An access that :func:`sanitize` lets no kernel make.

    >>> from normops.testing import Fault
    >>> fault = Fault("outside", "copy", (3, 0, 0), "x_ptr", "load", 100, 400, 400, "softmax.py:10")
    >>> print(fault)
    copy: program 3 loads element 100 of x_ptr, outside: byte 400 of a storage of 400, at softmax.py:10
    """

    def __init__(
        self, kind: str, kernel: str, program: tuple[int, int, int], argument: str, access: str, element: int,
        offset: int, extent: int, line: str, other: tuple[int, int, int] | None = None,
    ) -> None:  # fmt: skip
        self.kind = kind
        """One of "outside", "unwritten" and "overlapping"."""
        self.kernel = kernel
        self.program = program
        self.argument = argument
        """The parameter of the kernel that the address was made from; of a tuple, the field."""
        self.access = access
        """"load", "store" or "atomic"."""
        self.element = element
        """Counted from where the argument points to."""
        self.offset = offset
        """In bytes, from the start of the tensor's storage."""
        self.extent = extent
        """Bytes of that storage."""
        self.line = line
        self.other = other
        """Of an overlap, the program that wrote before."""
        what = "overlapping program " + _spelled(other) if other is not None else kind
        does = {"load": "loads", "store": "stores to", "atomic": "does an atomic operation on"}[access]
        super().__init__(
            f"{kernel}: program {_spelled(program)} {does} element {element} of {argument}, {what}: "
            f"byte {offset} of a storage of {extent}, at {line}"
        )


def _spelled(program: tuple[int, int, int] | None) -> str:
    x, y, z = program or (0, 0, 0)
    return f"({x}, {y}, {z})" if y or z else str(x)


class _Argument(TensorWrapper):  # type: ignore[misc]  # Triton has no types
    """A tensor, as a kernel takes it; its number is in the upper bits of its address, and so in all that are made of
    it."""

    def __init__(self, name: str, tensor: Tensor, dtype: Any, number: int) -> None:
        super().__init__(tensor, dtype)
        self.name, self.number = name, number
        storage = tensor.untyped_storage()
        self.key, self.start, self.extent = storage._cdata, storage.data_ptr(), storage.nbytes()

    def data_ptr(self) -> int:
        return int(self.base.data_ptr()) | self.number << _BITS

    def holds(self, address: int) -> bool:
        return self.start <= address < self.start + self.extent

    def memory(self) -> np.ndarray:
        """The bytes of the storage."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.extent).from_address(self.start))


class _Fresh(TorchDispatchMode):
    """Which bytes nobody wrote: of storages that came from empty() and its like inside the block."""

    MAKERS = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: dict[int, tuple[StorageWeakRef, np.ndarray]] = {}

    def written(self, key: int) -> np.ndarray | None:
        """Of a storage, whether each byte was written; None where all of it counts as such."""
        return self._written[key][1] if key in self._written else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and name in self.MAKERS and isinstance(out, Tensor) and out.device.type == "cpu":
            self._written = {k: v for k, v in self._written.items() if not v[0].expired()}
            storage = out.untyped_storage()
            # As long as there is a reference no other storage has its number.
            self._written[storage._cdata] = StorageWeakRef(storage), np.zeros(storage.nbytes(), bool)
        elif name == "resize_" and (storage := args[0].untyped_storage())._cdata in self._written:
            kept, before = self._written[storage._cdata]
            written = np.zeros(storage.nbytes(), bool)
            written[: before.size] = before[: written.size]
            self._written[storage._cdata] = kept, written
        elif torch.Tag.inplace_view not in func.tags:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = kwargs.get(argument.name, args[i] if i < len(args) else None)
                    for t in given if isinstance(given, list | tuple) else (given,):
                        self._write(t)
        return out

    def _write(self, t: Any) -> None:
        if not isinstance(t, Tensor) or t.device.type != "cpu" or t.layout != torch.strided:
            return
        written = self.written(t.untyped_storage()._cdata)
        if written is not None and t.numel():
            size = t.element_size()
            np.lib.stride_tricks.as_strided(
                written[t.storage_offset() * size :], (*t.shape, size), (*(s * size for s in t.stride()), 1)
            )[...] = True


class _Launch:
    """A grid that runs: its arguments, and which program wrote which byte."""

    def __init__(self, kernel: str, reached: Sequence[Tensor]) -> None:
        self.kernel = kernel
        self.fault: Fault | None = None
        self.owners: dict[int, np.ndarray] = {}
        self.arguments: list[_Argument] = []
        self._reached = [_Argument(f"reached[{i}]", t, t.dtype, 0) for i, t in enumerate(reached)]

    def take(self, name: str, value: Any) -> Any:
        """What stands for an argument, and is converted as it would be."""
        if isinstance(value, Tensor | TensorWrapper):
            tensor = getattr(value, "base", value) if isinstance(value, TensorWrapper) else value
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU, for the interpreter works on copies; got {tensor.device}")
            self.arguments.append(_Argument(name, tensor, value.dtype, len(self.arguments) + 1))
            return self.arguments[-1]
        if isinstance(value, TensorDescriptor):
            return replace(value, base=self.take(name, value.base))
        if isinstance(value, tuple):
            found = [self.take(n, v) for n, v in zip(parts(name, value), value, strict=True)]
            return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
        return value

    def of(self, number: int, address: int) -> _Argument:
        """The argument that an address was made from; one that was loaded from memory has no number."""
        if 0 < number <= len(self.arguments):
            return self.arguments[number - 1]
        for a in (*self._reached, *self.arguments):
            if a.holds(address):
                return a
        return _Argument("no argument", torch.empty(0, dtype=torch.uint8), torch.uint8, 0)


class Sanitizer:
    """What was looked at inside a :func:`sanitize` block so far.

    >>> import torch, normops
    >>> from normops.testing import Sanitizer, sanitize
    >>> with sanitize() as looked:
    ...     y = normops.functional.rms_norm(torch.randn(2, 64), (64,))
    >>> isinstance(looked, Sanitizer), looked.launches, looked.elements  # x, y and two statistics
    (True, 1, 258)
    """

    launches: int
    elements: int
    """That were read or written, each time."""
    repeated: int
    """Elements that another program of a launch had stored, to which the same bits were stored again; where these are
    allowed."""

    def __init__(self, reached: Sequence[Tensor], identical: bool) -> None:
        self.launches = self.elements = self.repeated = 0
        self._reached, self._identical = reached, identical
        self._fresh = _Fresh()
        self._launch = _Launch("", ())
        self._atomic = False

    def _launching(self, original: Method) -> Method:
        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            outer, self._launch = self._launch, _Launch(executor.fn.__name__, self._reached)
            self.launches += 1
            try:
                return original(executor, *args, **kwargs)
            except Exception:  # the interpreter's, once for each function of the kernel
                if self._launch.fault is not None:
                    raise self._launch.fault from None
                raise
            finally:
                self._launch = outer

        return launch

    def _arguments(self, executor: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """In place of copies."""
        taken = [self._launch.take(name, value) for name, value in zip(executor.arg_names, args, strict=False)]
        return taken, {name: self._launch.take(name, value) for name, value in kwargs.items()}

    def _accessing(self, access: Access, original: Method) -> Method:
        def method(builder: Any, *args: Any, **kwargs: Any) -> Any:
            if access.inner:
                self._atomic = True
                try:
                    return original(builder, *args, **kwargs)
                finally:
                    self._atomic = False
            self._look(access, args)
            ptr = args[access.ptr]
            real = interpreter.TensorHandle(np.asarray(ptr.data) & np.uint64((1 << _BITS) - 1), ptr.dtype)
            return original(builder, *args[: access.ptr], real, *args[access.ptr + 1 :], **kwargs)

        return method

    def _look(self, access: Access, args: tuple[Any, ...]) -> None:
        addresses, size = lanes(access, args)
        self.elements += addresses.size
        bits = _bits(args, size) if access is STORE else np.empty((addresses.size, 0), np.uint8)
        if access.atomic and args[0] == interpreter._ir.ATOMIC_OP.XCHG:
            access = access._replace(reads=False)  # whatever was there
        while addresses.size:
            number, address = divmod(int(addresses[0]), 1 << _BITS)
            argument = self._launch.of(number, address)
            places = addresses - (number << _BITS)
            same = addresses >> _BITS == number
            if not number:
                same &= (places >= argument.start) & (places < argument.start + argument.extent)
                same[0] = True
            self._check(access, argument, places[same] - argument.start, size)
            if access.writes and not access.atomic and not self._atomic:
                self._own(access, argument, places[same] - argument.start, size, bits[same])
            addresses, bits = addresses[~same], bits[~same]

    def _check(self, access: Access, argument: _Argument, offsets: np.ndarray, size: int) -> None:
        self._find("outside", access, argument, offsets, size, (offsets < 0) | (offsets + size > argument.extent))
        written = self._fresh.written(argument.key)
        if written is not None:
            places = offsets[:, None] + np.arange(size)
            if access.reads:
                self._find("unwritten", access, argument, offsets, size, np.logical_not(written[places]).any(1))
            if access.writes:
                written[places] = True

    def _own(self, access: Access, argument: _Argument, offsets: np.ndarray, size: int, bits: np.ndarray) -> None:
        """Note that the program stores these bits."""
        owners = self._launch.owners.get(argument.start)
        if owners is None:
            owners = self._launch.owners[argument.start] = np.zeros(argument.extent, np.int32)
        builder = interpreter.interpreter_builder
        (x, y, z), (nx, ny, _) = builder.grid_idx, builder.grid_dim
        mine = 1 + x + nx * (y + ny * z)
        places = offsets[:, None] + np.arange(size)
        before = owners[places].max(1)
        met = (before > 0) & (before != mine)
        if self._identical and met.any():
            same = met & (argument.memory()[places] == bits).all(1)
            self.repeated += int(same.sum())
            met &= ~same
        self._find("overlapping", access, argument, offsets, size, met, before - 1)
        owners[places] = mine

    def _find(
        self, kind: str, access: Access, argument: _Argument, offsets: np.ndarray, size: int, wrong: np.ndarray,
        others: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Raise a Fault for the first lane that is wrong."""
        if not wrong.any():
            return
        i = int(wrong.argmax())
        builder = interpreter.interpreter_builder
        other = None
        if others is not None:
            nx, ny, _ = builder.grid_dim
            other = (int(others[i] % nx), int(others[i] // nx % ny), int(others[i] // nx // ny))
        offset = int(offsets[i])
        element = (offset + argument.start - argument.base.data_ptr()) // size
        self._launch.fault = Fault(
            kind, self._launch.kernel, builder.grid_idx, argument.name, str(access), element, offset, argument.extent,
            _line(), other,
        )  # fmt: skip
        raise self._launch.fault


def _bits(args: tuple[Any, ...], size: int) -> np.ndarray:
    """What a store stores, as bytes of each lane that is not masked out."""
    shape = np.asarray(args[0].data).shape
    values = np.broadcast_to(np.asarray(args[1].data), shape)[np.broadcast_to(np.asarray(args[2].data, bool), shape)]
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)


def _line() -> str:
    """Where in the kernel it is, or in a function that it calls."""
    frame = sys._getframe()
    while frame.f_back is not None and any(p in Path(frame.f_code.co_filename).parents for p in _NOT_KERNELS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@contextmanager
def sanitize(*reached: Tensor, identical: bool = False) -> Iterator[Sanitizer]:
    """Inside the block no kernel makes a faulty access: the first one raises :class:`Fault`.

    Three kinds are found, in loads, stores and atomic operations, by lanes that are not masked out:

    - "outside": of the storage of the tensor whose argument the address was made from, however far, also where it lies
      in another tensor.
    - "unwritten": a read of memory that came from ``torch.empty`` or its like inside the block, and that neither a
      kernel nor torch wrote since.
    - "overlapping": a store of a byte that another program of the same launch stored to, whatever comes between.
      Atomic operations may meet.  `identical`: so may stores of the bits that are there already.

    `reached`: tensors that kernels find by addresses that they load from memory; all others must be arguments.

    Raises RuntimeError outside Triton's interpreter (``TRITON_INTERPRET=1``), ValueError for tensors on other devices.

    >>> import torch, triton
    >>> import triton.language as tl
    >>> from normops.testing import Fault, sanitize
    >>> @triton.jit
    ... def double(x_ptr, BLOCK: tl.constexpr):
    ...     i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ...     tl.store(x_ptr + i, 2 * tl.load(x_ptr + i))
    >>> with sanitize() as looked:
    ...     double[(2,)](torch.ones(8), BLOCK=4)
    >>> looked.elements
    16
    >>> try:
    ...     with sanitize():
    ...         double[(2,)](torch.ones(7), BLOCK=4)
    ... except Fault as fault:
    ...     print(fault.kind, fault.program, fault.argument, fault.element)
    outside (1, 0, 0) x_ptr 7
    """
    if not INTERPRETED:
        raise RuntimeError("sanitize() works in Triton's interpreter: set TRITON_INTERPRET=1 before importing normops")
    looked = Sanitizer(reached, identical)
    modes = traced._dispatch_modes
    with ExitStack() as stack:
        stack.enter_context(around_launches(looked._launching))
        stack.enter_context(around(looked._accessing))
        executor = interpreter.GridExecutor
        stack.enter_context(patch.object(executor, "_init_args_hst", lambda *args: looked._arguments(*args)))
        stack.enter_context(patch.object(executor, "_restore_args_dev", lambda *args: None))
        # It only looks on: calls of normops go the way of eager ones.
        stack.enter_context(patch.object(traced, "_dispatch_modes", lambda: modes() - 1))
        stack.enter_context(looked._fresh)
        yield looked
