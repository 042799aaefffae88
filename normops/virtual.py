"""A virtual GPU: the real launch path compiles every kernel for a named device, on a machine without one.

Inside ``virtual_device("h200")`` CPU tensors take the CUDA path.  Each launch is compiled with the parameters that it
would have on that device; nothing is executed, so outputs hold no values.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import launch, schedule


@dataclass(frozen=True)
class Binary:
    """A compiled kernel, and what its machine code says."""

    name: str
    cubin: bytes
    shared: int

    def _dump(self, option: str) -> str:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel.cubin")
            path.write_bytes(self.cubin)
            return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout

    @cached_property
    def _usage(self) -> dict[str, int]:
        return {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", self._dump("-res-usage"))}

    @property
    def registers(self) -> int:
        return self._usage["REG"]

    @property
    def spills(self) -> int:
        """Bytes of stack per thread: registers that did not fit."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @cached_property
    def _code(self) -> str:
        return self._dump("-sass")

    def accesses(self, kind: str) -> dict[int, int]:
        """Bits of an access -> how many of the instructions LDG or STG have it."""
        found: dict[int, int] = {}
        for modifiers in re.findall(rf"\b{kind}((?:\.[A-Z0-9]+)*)", self._code):
            width = next((int(m) for m in modifiers.split(".") if m in ("64", "128", "256")), 32)
            width = 8 if re.search(r"\.[US]8\b", modifiers) else 16 if re.search(r"\.[US]16\b", modifiers) else width
            found[width] = found.get(width, 0) + 1
        return found


@dataclass(frozen=True)
class VirtualLaunch:
    """One launch that the device would have run."""

    binary: Binary
    grid: tuple[int, int, int]
    num_warps: int

    @property
    def name(self) -> str:
        return self.binary.name


@dataclass
class VirtualDevice:
    facts: schedule.Device
    launches: list[VirtualLaunch] = field(default_factory=list)
    _binaries: list[Binary] = field(default_factory=list)

    def driver(self) -> Any:
        """What Triton asks of a driver; launching records."""
        device = self
        major, minor = self.facts.capability

        class Utils:
            @staticmethod
            def get_device_properties(_: int) -> dict[str, int]:
                return {
                    "max_shared_mem": 232448 if major >= 9 else 166912, "max_num_regs": 65536, "warpSize": 32,
                    "multiprocessor_count": device.facts.num_sms, "sm_clock_rate": 1, "mem_clock_rate": 1,
                    "mem_bus_width": 1,
                }  # fmt: skip

            @staticmethod
            def load_binary(name: str, cubin: bytes, shared: int, *_: Any) -> tuple[int, int, int, int, int]:
                device._binaries.append(Binary(name, cubin, shared))
                return 0, len(device._binaries) - 1, 0, 0, 1024

        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.num_warps = metadata.num_warps

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *_: Any) -> None:
                device.launches.append(VirtualLaunch(device._binaries[function], (x, y, z), self.num_warps))

        class Driver:
            utils = Utils
            launcher_cls = Launcher

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", 10 * major + minor, 32)

            def get_current_device(self) -> int:
                # A number of its own: JITFunction keeps compiled kernels per device.
                return id(device)

            def get_current_stream(self, _: int = 0) -> int:
                return 0

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        return Driver()


@contextmanager
def virtual_device(name: str) -> Iterator[VirtualDevice]:
    """Compile for the named device (a100, h200, b200) what the calls inside would launch there.

    Raises ValueError for an unknown name, RuntimeError in Triton's interpreter (which compiles nothing).
    """
    if name not in schedule.KNOWN:
        raise ValueError(f"device must be one of {', '.join(schedule.KNOWN)}, got {name!r}")
    if launch.INTERPRETED:
        raise RuntimeError("a virtual device compiles kernels: unset TRITON_INTERPRET before importing normops")
    device = VirtualDevice(schedule.KNOWN[name])
    before = driver.__dict__.get("_active")  # reading driver.active would look for a GPU
    driver.set_active(device.driver())
    try:
        with launch.standing_in(device.facts):
            yield device
    finally:
        driver.set_active(before)  # None: looked for at the next launch
