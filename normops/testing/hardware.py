"""Facts of the devices that kernels can be compiled for without having them.

Sizes are the vendors' (CUDA C++ Programming Guide, "Compute Capabilities"; LLVM's AMDGPU guide and the CDNA3 ISA);
clocks are the vendors' boost clocks; bandwidths say themselves where they come from.

>>> from normops.testing import HARDWARE
>>> sorted(HARDWARE)
['a100', 'b200', 'h100', 'h200', 'mi300x', 'rtx4090']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget

from .. import gpus

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Hardware:
    """One device.  AMD's compute units are called SMs here, its wavefronts warps.

    >>> from normops.testing import HARDWARE, Hardware
    >>> device: Hardware = HARDWARE["h200"]
    >>> device.resident(registers=64, shared=0, threads=256)
    4
    """

    name: str
    title: str
    facts: gpus.Device
    target: GPUTarget
    registers_per_sm: int
    """32-bit registers."""
    shared_per_sm: int
    max_shared: int
    """Bytes of shared memory that one program may have."""
    threads_per_sm: int
    programs_per_sm: int
    l2_bytes: int
    """What one SM can find in L2 (of an MI300X: the L2 of its own die)."""
    copy_bandwidth: float
    """Bytes read plus bytes written per second by a large copy."""
    bandwidth_source: str
    clock: float
    """Cycles of an SM a second, at its highest."""
    copy_start: float = 1.9e-6
    """Seconds that a copy takes beside those for its bytes."""
    copy_start_source: str = "assumed: as measured on an H100"

    def copy_us(self, bytes: int) -> float:
        """Microseconds that a copy takes which reads and writes so many bytes together: the floor of any call."""
        return (self.copy_start + bytes / self.copy_bandwidth) * 1e6

    @property
    def l2_window(self) -> int:
        """Bytes that one may plan to find again in L2: 0.4 of it.

        A large L2 is split in halves that may both hold a line, and what is written in between passes through it too.
        """
        return 2 * self.l2_bytes // 5

    def resident(self, registers: int, shared: int, threads: int) -> int:
        """Programs that one SM holds at once, given registers per thread, bytes of shared memory, threads.

        The largest shared memory that the SM can be configured for is assumed.  0: not even one fits.
        """
        warp: int = self.target.warp_size
        warps = -(-threads // warp)
        # Registers go to whole warps, 8 to a thread at a time; each quarter of an SM owns a quarter of them.
        each = -(-max(registers, 1) // 8) * 8 * warp
        by_registers = self.registers_per_sm // 4 // each * 4 // warps
        # NVIDIA's driver keeps 1 KiB per program for itself; LDS comes in blocks of 512 bytes, shared memory of 128.
        cuda = self.target.backend == "cuda"
        unit, own = (128, KIB) if cuda else (512, 0)
        bytes_each = -(-(shared + own) // unit) * unit
        by_shared = self.shared_per_sm // bytes_each if bytes_each else self.programs_per_sm
        if shared > self.max_shared:
            by_shared = 0
        return min(by_registers, by_shared, self.threads_per_sm // (warps * warp), self.programs_per_sm)


def _cuda(facts: gpus.Device, title: str, shared_per_sm: int, threads: int, programs: int, l2: int,
          clock: float, bandwidth: float, source: str, **measured: Any) -> Hardware:  # fmt: skip
    major, minor = facts.capability
    return Hardware(
        facts.name, title, facts, GPUTarget("cuda", 10 * major + minor, 32), registers_per_sm=64 * KIB,
        shared_per_sm=shared_per_sm, max_shared=shared_per_sm - KIB, threads_per_sm=threads, programs_per_sm=programs,
        l2_bytes=l2, clock=clock, copy_bandwidth=bandwidth, bandwidth_source=source, **measured,
    )  # fmt: skip


_LOCAL = "measured: local copy of CUDA's p2pBandwidthLatencyTest, "

_ALL = (
    _cuda(gpus.A100, "NVIDIA A100 SXM 80 GB", 164 * KIB, 2048, 32, 40 * MIB, 1.41e9, 1.60e12,
          _LOCAL + "github.com/LLMServe/DistServe/issues/3 (2.04 TB/s in the specification)"),
    _cuda(gpus.H100, "NVIDIA H100 SXM 80 GB", 228 * KIB, 2048, 32, 50 * MIB, 1.98e9, 2.96e12,
          "measured: copies of 1 to 800 MB on one H100, bench/results (3.35 TB/s in the specification)",
          copy_start_source="measured: the same copies"),
    _cuda(gpus.H200, "NVIDIA H200 SXM", 228 * KIB, 2048, 32, 50 * MIB, 1.98e9, 4.3e12,
          "measured: PyTorch device-to-device copy on one H200 (4.8 TB/s in the specification)"),
    _cuda(gpus.B200, "NVIDIA B200", 228 * KIB, 2048, 32, 126 * MIB, 1.965e9, 6.0e12,
          "measured: device-to-device copy of the CUDA samples, \"over 6,000 GB/s\", newmind.ai/journal/18 "
          "(8 TB/s in the specification)"),
    _cuda(gpus.RTX4090, "NVIDIA GeForce RTX 4090", 100 * KIB, 1536, 24, 72 * MIB, 2.52e9, 0.92e12,
          _LOCAL + "github.com/tinygrad/open-gpu-kernel-modules/issues/6 (1.01 TB/s in the specification)"),
    Hardware(
        "mi300x", "AMD Instinct MI300X", gpus.MI300X, GPUTarget("hip", "gfx942", 64),
        registers_per_sm=128 * KIB, shared_per_sm=64 * KIB, max_shared=64 * KIB, threads_per_sm=2048,
        programs_per_sm=32, l2_bytes=4 * MIB, clock=2.1e9, copy_bandwidth=4.2e12,
        bandwidth_source="measured: ROCm's roofline benchmark (not a copy), github.com/ROCm/legacy-rocm-build/issues/"
        "5070 (5.3 TB/s in the specification)",
    ),
)  # fmt: skip
HARDWARE: dict[str, Hardware] = {hardware.name: hardware for hardware in _ALL}


def hardware_of(title: str) -> str | None:
    """The key in HARDWARE of a device by the name that its driver gives it; None where it is not there.

    >>> from normops.testing import hardware_of
    >>> hardware_of("NVIDIA H100 80GB HBM3"), hardware_of("NVIDIA GeForce RTX 4090"), hardware_of("Tesla T4")
    ('h100', 'rtx4090', None)
    """
    short = title.lower().replace(" ", "")
    return next((name for name in HARDWARE if name in short), None)
