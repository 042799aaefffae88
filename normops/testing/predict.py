"""How long launches take, predicted from what their warps execute: a model that was calibrated on measured times.

A launch is held by one of several things, and by the others a little; a norm of high order (``sharpness``) says so:

    issue     instructions of all warps on the busiest quarter of an SM, one a cycle; beside them the special functions
              (16 a cycle and SM), accesses to memory and shuffles (a turn at the one port of an SM each)
    memory    bytes to and from DRAM, others that come from L2, and what the busy SMs can draw together
    latency   the chain of one program (rounds of loads and of atomic operations, barriers, cycles) x their generations
    tickets   additions to one counter come one after the other

A call takes these, a start of each launch and one of its own.  Programs that wait for others (tickets) wait for some
chains more, and for what the last of a group to arrive does.  ``python -m bench calibrate`` fits the model's numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .hardware import HARDWARE, Hardware

if TYPE_CHECKING:
    from .virtual import VirtualLaunch

CALIBRATED = Path(__file__).with_name("calibrated.json")
"""Device -> parameters that were fitted to times measured on it, and where they come from."""
FALLBACK = "h100"
"""Whose parameters stand for a device that has none of its own."""


class Demand(NamedTuple):
    """What one launch asks of a device.  Numbers, or arrays of as many launches.

    >>> import torch, normops
    >>> from normops.testing import Demand, virtual_device
    >>> x = torch.empty(64, 4096, dtype=torch.bfloat16)
    >>> with virtual_device("h100") as gpu:
    ...     y = normops.functional.rms_norm(x, (4096,))
    >>> demand: Demand = Demand.of(gpu.launches[0], dram_bytes=2 * x.nbytes)
    >>> demand.tickets, demand.rounds, demand.sectors >= 2 * x.nbytes / 32
    (0, 1.0, True)
    """

    programs: Any
    warps: Any
    """Of a program."""
    resident: Any
    """Programs that one SM holds at once."""
    instructions: Any
    """Of a warp, like the next three."""
    mufu: Any
    wavefronts: Any
    barriers: Any
    rounds: Any
    """Of a program, like the next four."""
    atomic_rounds: Any
    cycles: Any
    further_rounds: Any
    further_cycles: Any
    sectors: Any
    """Of all programs, each 32 bytes."""
    dram_bytes: Any
    tickets: Any
    """1 where programs draw tickets, else 0."""

    @staticmethod
    def of(launch: VirtualLaunch, dram_bytes: float) -> Demand:
        """Of a launch that moves so many bytes to and from DRAM.  Raises NotImplementedError on AMD."""
        done = launch.executed
        return Demand(
            done.programs, done.warps, launch.resident, done["instructions"], done["mufu"], done.wavefronts,
            done["barriers"], done.rounds, done.atomic_rounds, done.cycles, done.further_rounds, done.further_cycles,
            done.sectors, dram_bytes, int(done.tickets),
        )  # fmt: skip


class Time(NamedTuple):
    """Microseconds of one launch: all together, and what each thing alone would take.

    >>> from normops.testing import Time
    >>> time = Time(us=9.0, start=1.0, issue=2.0, mufu=0.0, shared=1.0, memory=8.0, latency=3.0, tickets=0.0, wait=0.0)
    >>> time.bound
    'memory'
    """

    us: float
    start: float
    issue: float
    mufu: float
    shared: float
    memory: float
    latency: float
    tickets: float
    wait: float

    @property
    def bound(self) -> str:
        """What holds the launch most: "issue", "memory", "latency" or "launches"."""
        held = {
            "issue": max(self.issue, self.mufu, self.shared), "memory": self.memory,
            "latency": max(self.latency, self.tickets) + self.wait, "launches": self.start,
        }  # fmt: skip
        return max(held, key=lambda name: held[name])


@dataclass(frozen=True)
class Model:
    """The numbers of the model."""

    call: float
    """Microseconds of a call beside its launches, and of each launch."""
    launch: float
    mufu: float
    """Cycles of a quarter of an SM that a special function takes, and a turn of shared memory."""
    wavefront: float
    dram: float
    """Bandwidth of DRAM and of L2, as multiples of that of a large copy."""
    l2: float
    sm_bytes: float
    """Bytes that one SM can draw in a nanosecond."""
    round: float
    """Microseconds of a round of loads from DRAM, of one from L2, and of atomic operations."""
    near_round: float
    atomic_round: float
    barrier: float
    """Cycles of a barrier, and how many a cycle of a warp alone on its SM becomes."""
    cycle: float
    sharpness: float
    wait: float
    """Chains that programs which draw tickets wait beside their own; share of the longer ways that data may take."""
    further: float
    ticket: float
    """Microseconds between two tickets."""

    def launch_times(self, d: Demand, hardware: Hardware) -> dict[str, Any]:
        """The fields of Time, of one launch or of arrays of them."""
        sms, cycles = hardware.facts.num_sms, hardware.clock / 1e6
        copy = hardware.copy_bandwidth / 1e6
        busy = np.minimum(sms, d.programs)
        quarter = d.programs * d.warps / (4 * busy) / cycles
        issue, mufu = quarter * d.instructions, quarter * d.mufu * self.mufu
        shared = quarter * d.wavefronts * self.wavefront
        touched = 32 * d.sectors
        near = np.maximum(0, touched - d.dram_bytes)
        memory = np.maximum(
            d.dram_bytes / (copy * self.dram) + near / (copy * self.l2),
            np.maximum(touched, d.dram_bytes) / (busy * self.sm_bytes * 1e3),
        )
        far = np.minimum(1, d.dram_bytes / np.maximum(1, touched))
        one_round = self.near_round + far * (self.round - self.near_round)
        chain = d.rounds * one_round + d.atomic_rounds * self.atomic_round
        chain = chain + (d.barriers * self.barrier + d.cycles * self.cycle) / cycles
        latency = np.maximum(1, d.programs / (sms * np.maximum(1, d.resident))) * chain
        tickets = d.tickets * d.programs * self.ticket
        late = d.further_rounds * self.near_round + d.further_cycles * self.cycle / cycles
        wait = d.tickets * (self.wait * chain + self.further * late)
        p = self.sharpness
        parts = (issue, mufu, shared, memory, latency, tickets)
        us = self.launch + sum(part**p for part in parts) ** (1 / p) + wait
        return dict(zip(Time._fields, (us, self.launch, *parts, wait), strict=True))


@dataclass(frozen=True)
class Prediction:
    """The time of a call, predicted.

    >>> from normops.testing import HARDWARE, Prediction, predict
    >>> nothing: Prediction = predict([], HARDWARE["a100"])
    >>> nothing.calibrated, len(nothing.launches)
    (False, 0)
    """

    us: float
    launches: tuple[Time, ...]
    calibrated: bool
    """Whether the model was fitted to times of this device; else its numbers are those of an H100, with the clock, the
    SMs and the bandwidth of this one."""

    @property
    def bound(self) -> str:
        """What holds the call for most of its time: "issue", "memory", "latency" or "launches"."""
        shares = {"launches": self.us - sum(time.us - time.start for time in self.launches)}
        for time in self.launches:
            shares[time.bound] = shares.get(time.bound, 0.0) + time.us - time.start
        return max(shares, key=lambda name: shares[name])


@lru_cache
def calibrated() -> Mapping[str, Mapping[str, Any]]:
    """Device -> "parameters" of a Model, and "source"."""
    found: dict[str, Any] = json.loads(CALIBRATED.read_text())
    return found


@lru_cache
def model_of(device: str) -> tuple[Model, bool]:
    """The model for a device, and whether it was calibrated on it."""
    known = calibrated()
    return Model(**known[device if device in known else FALLBACK]["parameters"]), device in known


def predict(demands: Sequence[Demand], hardware: Hardware = HARDWARE[FALLBACK]) -> Prediction:
    """The time of one call: of launches that run one after the other.

    >>> import torch, normops
    >>> from normops.testing import Demand, predict, virtual_device
    >>> x = torch.empty(8192, 4096, dtype=torch.bfloat16)
    >>> with virtual_device("h100") as gpu:
    ...     y = normops.functional.rms_norm(x, (4096,))
    >>> time = predict([Demand.of(gpu.launches[0], dram_bytes=2 * x.nbytes)])
    >>> time.bound, 0.8 < gpu.hardware.copy_us(2 * x.nbytes) / time.us < 1.1
    ('memory', True)
    """
    model, fitted = model_of(hardware.name)
    times = tuple(Time(**{k: float(v) for k, v in model.launch_times(d, hardware).items()}) for d in demands)
    return Prediction(model.call + sum(time.us for time in times), times, fitted)
