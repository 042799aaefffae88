"""Instruments: bytes that kernels move, faulty accesses, and programs at the same time, in Triton's interpreter; what
they compile to on a named device, what they execute there, and how long that should take.

`explain`, `plans` and the module `cost` are about calls of normops; all others work for any Triton kernel.
"""

from .executed import Executed
from .explain import Direction, Explanation, explain
from .hardware import HARDWARE, Hardware, hardware_of
from .plans import Planned, plans
from .predict import Demand, Prediction, Time, predict
from .prepared import prepare_once
from .race import Race, race
from .sanitize import Fault, Sanitizer, sanitize
from .traffic import Traffic, traffic
from .virtual import VirtualDevice, VirtualLaunch, virtual_device

__all__ = [
    "HARDWARE",
    "Demand",
    "Direction",
    "Executed",
    "Explanation",
    "Fault",
    "Hardware",
    "Planned",
    "Prediction",
    "Race",
    "Sanitizer",
    "Time",
    "Traffic",
    "VirtualDevice",
    "VirtualLaunch",
    "explain",
    "hardware_of",
    "plans",
    "predict",
    "prepare_once",
    "race",
    "sanitize",
    "traffic",
    "virtual_device",
]
