"""A virtual GPU: the real launch path compiles every kernel for a named device, on a machine without one."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .. import calls
from .binary import Binary, Parameter
from .executed import Executed, execute
from .hardware import HARDWARE, Hardware

# Triton keeps compiled kernels per number of a device: no two virtual devices may share one, nor a real one have it.
_numbers = count(1 << 20)

_known: dict[Any, Binary] = {}
"""Kernels by their code: what was once read out of it stands for every block that compiles it again."""

_MOST = {"cuda": (2**31 - 1, 65535, 65535)}
"""Programs that a grid may have along its axes; past that the driver refuses a launch."""


class Argument(NamedTuple):
    """An argument of a kernel, or a field of one that is a NamedTuple."""

    name: str
    place: tuple[int, ...]
    """Where it stands among the arguments of the kernel, and inside of that one."""
    kind: Any
    """Triton's name of its type, "constexpr" where it is compiled in; of a tuple, those of its elements."""

    def of(self, values: Any) -> Any:
        """Its value, among all that the kernel is called with."""
        for i in self.place:
            values = values[i]
        return values


class VirtualLaunch:
    """One launch that the device would have run.

    >>> import torch, normops
    >>> from normops.testing import VirtualLaunch, virtual_device
    >>> with virtual_device("a100") as gpu:
    ...     y = normops.functional.rms_norm(torch.empty(64, 64), (64,))
    >>> launched: VirtualLaunch = gpu.launches[0]
    >>> launched.num_warps >= 1, launched.spills, "x" in launched.arguments
    (True, 0, True)
    """

    __slots__ = ("_arguments", "_executed", "_values", "binary", "grid", "hardware")

    def __init__(
        self, hardware: Hardware, binary: Binary, grid: tuple[int, int, int], arguments: tuple[Argument, ...],
        values: Sequence[Any],
    ) -> None:  # fmt: skip
        self.hardware = hardware
        self.binary = binary
        """The compiled kernel; launches of the same one share it."""
        self.grid = grid
        self._arguments = arguments
        self._values = values
        self._executed: Executed | None = None

    @property
    def name(self) -> str:
        return self.binary.name

    @property
    def num_warps(self) -> int:
        return self.binary.num_warps

    @property
    def arguments(self) -> dict[str, Any]:
        """What the kernel is called with, by its own names: tensors (or addresses), integers, floats, tuples.

        Of a NamedTuple each field is one, by its own name (``"argument.field"`` where another has the same).  Neither
        ``tl.constexpr`` nor None is among them; an integer that was compiled in because it is 1 is.
        """
        pairs = ((argument.name, argument.of(self._values)) for argument in self._arguments)
        return {name: value for name, value in pairs if value is not None}

    @property
    def asm(self) -> Any:
        """The stages of compilation: "ttir", "ttgir", "llir", "ptx", "cubin" ("amdgcn", "hsaco" on AMD)."""
        return self.binary.asm

    @property
    def registers(self) -> int:
        """Per thread."""
        return self.binary.usage.registers

    @property
    def stack(self) -> int:
        """Bytes of local memory per thread."""
        return self.binary.usage.stack

    @property
    def spills(self) -> int:
        """Bytes of local memory per thread that hold what did not fit into registers."""
        return self.binary.usage.spills

    @property
    def shared(self) -> int:
        """Bytes of shared memory per program."""
        return self.binary.shared

    @property
    def barriers(self) -> int:
        """Instructions in the code that wait for other warps; how often they run, ``executed`` says."""
        return self.binary.barriers

    @property
    def atomics(self) -> int:
        """Instructions in the code that are atomic on global memory; how often they run, ``executed`` says."""
        return self.binary.atomics

    @property
    def executed(self) -> Executed:
        """What its warps execute, walked through the machine code: instructions, barriers, rounds of loads, ...

        Raises NotImplementedError on AMD.
        """
        if self._executed is None:
            pairs = (pair for a in self._arguments for pair in passed(a.kind, a.of(self._values)))
            self._executed = execute(self.binary, self.grid, [value for _, value in pairs])
        return self._executed

    @property
    def in_flight(self) -> float:
        """Bytes that the loads of all programs on one SM have under way at once, at most."""
        x, y, z = self.grid
        together = min(self.resident, -(-x * y * z // self.hardware.facts.num_sms))
        return self.executed.in_flight * self.executed.warps * together

    def accesses(self, argument: str | None = None, without: Any = None) -> dict[tuple[str, int], int]:
        """("load" or "store", bits) -> instructions on global memory, through one pointer argument or all.

        Arguments are named as in ``arguments``; a tuple stands for all its elements.  `without`: a jit function whose
        accesses do not count, nor those of functions that it calls.

        Asynchronous copies into shared memory are loads; bulk copies (TMA) have no width and are not counted.  An
        address that may come from two arguments counts for both, one that was itself loaded from memory for none.

        Raises NotImplementedError for one argument or function on AMD, or for an argument where tensor descriptors are
        passed, ValueError for a name that the kernel does not have.
        """
        names = [a.name for a in self._arguments]
        if argument is not None and argument not in names:
            raise ValueError(f"argument must be one that {self.name} is passed ({', '.join(names)}), got {argument!r}")
        return self.binary.accesses(argument, frozenset() if without is None else _lines(without))

    @property
    def resident(self) -> int:
        """Programs that one SM holds at once."""
        return self.hardware.resident(self.registers, self.shared, self.binary.threads)

    @property
    def waves(self) -> float:
        """How often the programs of the grid fill the device; infinite where not even one fits on an SM."""
        x, y, z = self.grid
        at_once = self.resident * self.hardware.facts.num_sms
        return x * y * z * self.binary.num_ctas / at_once if at_once else float("inf")

    def __repr__(self) -> str:
        return f"VirtualLaunch({self.name}, grid={self.grid}, num_warps={self.num_warps})"


def _lines(function: Any) -> frozenset[str]:
    """The lines of a jit function, as "file:line"."""
    source, first = inspect.getsourcelines(function.fn)
    name = Path(inspect.getsourcefile(function.fn) or "").name
    return frozenset(f"{name}:{first + i}" for i in range(len(source)))


class VirtualDevice:
    """What would have run: ``launches``, in order; clear the list to start over.

    >>> import torch, normops
    >>> from normops.testing import VirtualDevice, virtual_device
    >>> with virtual_device("a100") as gpu:
    ...     y = normops.functional.rms_norm(torch.empty(64, 64), (64,))
    >>> isinstance(gpu, VirtualDevice), gpu.hardware.title, len(gpu.launches)
    (True, 'NVIDIA A100 SXM 80 GB', 1)
    """

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.launches: list[VirtualLaunch] = []
        self._number = next(_numbers)
        self._open = True
        self._binaries: list[tuple[Binary, tuple[Argument, ...]]] = []
        self._source: Any = None
        self._metadata: Any = None
        self._files: dict[str, Any] = {}

    def _load(self, name: str, code: bytes, shared: int) -> int:
        """Take up a kernel that was compiled: its source and its files came just before."""
        source, metadata = self._source, self._metadata
        kinds = source.signature
        function = getattr(source, "fn", None)  # none where compilation started from a file of Triton's IR
        names = tuple(function.arg_names) if function is not None else tuple(f"argument {i}" for i in range(len(kinds)))
        signature = {names[i] if isinstance(i, int) else i: kind for i, kind in kinds.items()}
        declared = {p.name for p in function.params if p.is_constexpr} if function is not None else set()
        arguments = _arguments([(None if n in declared else n, signature.get(n, "constexpr")) for n in names])
        parameters = _parameters(arguments)
        key = (self.hardware.target, name, code, metadata.num_warps, parameters)
        binary = _known.get(key)
        if binary is None:
            files = [Path(path) for path in self._files.values() if not str(path).endswith(".json")]
            asm = {
                f.suffix[1:]: f.read_bytes() if f.suffix in (".cubin", ".hsaco") else f.read_text() for f in files
            }  # fmt: skip
            binary = _known[key] = Binary(
                name, self.hardware.target, asm, shared, metadata.num_warps, metadata.num_ctas, parameters
            )
        self._binaries.append((binary, arguments))
        return len(self._binaries) - 1

    def _launch(self, grid: tuple[int, int, int], function: int, values: Sequence[Any]) -> None:
        if not self._open:
            raise RuntimeError(f"a kernel compiled for a virtual {self.hardware.name} was launched after its block")
        if 0 in grid:
            return  # as the real launcher
        most = _MOST.get(self.hardware.target.backend, grid)
        if any(n > limit for n, limit in zip(grid, most, strict=True)):
            raise RuntimeError(f"a grid must be at most {most} on {self.hardware.name}, got {grid}")
        binary, arguments = self._binaries[function]
        self.launches.append(VirtualLaunch(self.hardware, binary, grid, arguments, values))

    def _loading(self, module: Any, function: Any, name: str, metadata_group: dict[str, Any], hash: str) -> None:
        self._files = metadata_group

    def _driver(self) -> Any:
        """What Triton asks of a driver; launching records."""
        device, hardware = self, self.hardware

        class Utils:
            @staticmethod
            def get_device_properties(_: int) -> dict[str, int]:
                return {
                    "max_shared_mem": hardware.max_shared, "max_num_regs": hardware.registers_per_sm,
                    "multiprocessor_count": hardware.facts.num_sms, "warpSize": hardware.target.warp_size,
                }  # fmt: skip

            @staticmethod
            def load_binary(name: str, code: bytes, shared: int, *_: Any) -> tuple[int, int, None, None, int]:
                # module, function, registers and spills (read only when asked for), threads of a program at most
                return 0, device._load(name, code, shared), None, None, 1024

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                device._source, device._metadata = source, metadata

            def __call__(
                self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any,
                enter: Any, leave: Any, *arguments: Any,
            ) -> None:  # fmt: skip
                if enter is not None:
                    enter(metadata)
                device._launch((x, y, z), function, arguments)
                if leave is not None:
                    leave(metadata)

        class Driver:
            utils = Utils
            launcher_cls = Launcher

            def get_current_target(self) -> GPUTarget:
                return hardware.target

            def get_current_device(self) -> int:
                return device._number

            def get_current_stream(self, _: int = 0) -> int:
                return 0

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

            def get_device_interface(self) -> Any:
                return torch.cpu

            def get_benchmarker(self) -> Any:
                raise RuntimeError(
                    "autotuning times kernels, and a virtual device runs none: give the kernel a single config, or "
                    "launch what it wraps, kernel.fn[grid](..., **config.all_kwargs())"
                )

        return Driver()


def _arguments(given: Sequence[tuple[str | None, Any]]) -> tuple[Argument, ...]:
    """The arguments of a kernel whose names and types are given; no name: it is none to launch it with."""
    found: list[tuple[tuple[str, ...], tuple[int, ...], Any]] = []

    def add(path: tuple[str, ...], place: tuple[int, ...], kind: Any) -> None:
        fields = getattr(kind, "_fields", None)
        if fields is None:
            found.append((path, place, kind))
        for i, field in enumerate(fields or ()):
            add((*path, field), (*place, i), kind[i])

    for i, (name, kind) in enumerate(given):
        if name is not None:
            add((name,), (i,), kind)
    alike = Counter(path[-1] for path, _, _ in found)
    return tuple(Argument(p[-1] if alike[p[-1]] == 1 else ".".join(p), place, kind) for p, place, kind in found)


def passed(kind: Any, value: Any = None) -> Iterator[tuple[str, Any]]:
    """(type, value) of all that an argument is passed as: a tuple is its elements, and what is compiled in is not."""
    if isinstance(kind, tuple | list):
        for i, element in enumerate(kind):
            yield from passed(element, None if value is None else value[i])
    elif kind != "constexpr":
        yield kind, value


def _parameters(arguments: Sequence[Argument]) -> tuple[Parameter, ...]:
    """The parameters of the compiled kernel, in order."""
    found = []
    for argument in arguments:
        for kind, _ in passed(argument.kind):
            block = re.match(r"tensordesc<[^\[]*\[([^\]]*)", str(kind))
            rank = block[1].count(",") + 1 if block else 0
            found.append(Parameter(argument.name, str(kind).startswith("*"), rank))
    return tuple(found)


@contextmanager
def virtual_device(name: str) -> Iterator[VirtualDevice]:
    """Compile for the named device what the block launches: normops' kernels and any others.

    CPU tensors stand for tensors of the device and take normops' CUDA path.  Each launch is compiled with the
    parameters that it would have there and recorded in ``launches``; nothing is executed, so outputs hold no values.
    Devices: the names of ``HARDWARE``.

    Raises ValueError for an unknown name, RuntimeError in Triton's interpreter, which compiles nothing.

    >>> import torch, normops
    >>> from normops.testing import virtual_device
    >>> with virtual_device("a100") as gpu:
    ...     y = normops.functional.rms_norm(torch.empty(64, 64), (64,))
    >>> 0 < gpu.launches[0].registers <= 255
    True
    """
    if name not in HARDWARE:
        raise ValueError(f"device must be one of {', '.join(HARDWARE)}, got {name!r}")
    if calls.INTERPRETED:
        raise RuntimeError("a virtual device compiles kernels: unset TRITON_INTERPRET before importing triton")
    device = VirtualDevice(HARDWARE[name])
    before = driver.__dict__.get("_active")  # reading driver.active would look for a GPU
    driver.set_active(device._driver())
    knobs.runtime.kernel_load_start_hook.add(device._loading)
    try:
        with calls.standing_in(device.hardware.facts):
            yield device
    finally:
        device._open = False
        knobs.runtime.kernel_load_start_hook.remove(device._loading)
        driver.set_active(before)  # None: looked for at the next launch
