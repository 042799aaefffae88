"""Instruments: bytes that kernels move, and programs at the same time, in Triton's interpreter; what they compile to on
a named device.

All work for any Triton kernel, not only for those of normops.
"""

from .hardware import HARDWARE, Hardware
from .plans import Planned, plans
from .prepared import prepare_once
from .race import Race, race
from .traffic import Traffic, traffic
from .virtual import VirtualDevice, VirtualLaunch, virtual_device

__all__ = [
    "HARDWARE",
    "Hardware",
    "Planned",
    "Race",
    "Traffic",
    "VirtualDevice",
    "VirtualLaunch",
    "plans",
    "prepare_once",
    "race",
    "traffic",
    "virtual_device",
]
