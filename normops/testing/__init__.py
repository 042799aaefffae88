"""Instruments: bytes that kernels move, counted in Triton's interpreter, and what they compile to on a named device.

Both work for any Triton kernel, not only for those of normops.
"""

from .hardware import HARDWARE, Hardware
from .plans import Planned, plans
from .traffic import Traffic, traffic
from .virtual import VirtualDevice, VirtualLaunch, virtual_device

__all__ = [
    "HARDWARE",
    "Hardware",
    "Planned",
    "Traffic",
    "VirtualDevice",
    "VirtualLaunch",
    "plans",
    "traffic",
    "virtual_device",
]
