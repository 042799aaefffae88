"""The facts about a device that a schedule depends on, and those of the devices that are planned for without one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """The facts a schedule depends on."""

    name: str
    num_sms: int
    capability: tuple[int, int]
    l2_bytes: int = 0
    """What all SMs share; 0: they share none, and a second read is never planned to be found there."""

    ptx: bool = True
    """Whether kernels may use NVIDIA's inline assembly there."""

    @property
    def window(self) -> int:
        """Bytes that a launch may plan to find again in L2 while it goes on reading and writing: 3/8 of it.

        A large L2 is split in halves that may both hold a line, and what is written passes through it too.
        """
        return 3 * self.l2_bytes // 8


MIB = 1 << 20
A100 = Device("a100", 108, (8, 0), 40 * MIB)
H100 = Device("h100", 132, (9, 0), 50 * MIB)
H200 = Device("h200", 132, (9, 0), 50 * MIB)
B200 = Device("b200", 148, (10, 0), 126 * MIB)
RTX4090 = Device("rtx4090", 128, (8, 9), 72 * MIB)
MI300X = Device("mi300x", 304, (9, 4), ptx=False)  # eight dies, each with an L2 of its own
KNOWN = {device.name: device for device in (A100, H100, H200, B200, RTX4090, MI300X)}
