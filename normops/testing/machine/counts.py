"""What a walk counts: instructions, rounds of loads, cycles, bytes under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from . import lanes
from .code import Instruction
from .lanes import Value
from .operands import size
from .steps import Code, Step
from .warp import Warp

READ = 8
"""Cycles, nominal, until an instruction has read its operands and they may be overwritten."""
NEAR = 256
"""Pieces of 32 bytes of its last loads that a warp finds in L1: 32 warps share a little over 256 KB."""


@dataclass
class Count:
    """What a warp did.  ``visits``, ``maybe``: how often each instruction was executed, and would be more if data went
    the other way."""

    visits: list[int]
    maybe: list[int]
    endless: bool = False
    branches: set[int] = field(default_factory=set)
    """Instructions where data decides."""
    loops: set[int] = field(default_factory=set)
    accesses: set[int] = field(default_factory=set)
    """Accesses to global memory of which data decides whether they are made: counted as made."""
    cycles: float = 0
    """Of the warp alone, if global memory answered at once."""
    rounds: int = 0
    """Loads from global memory that begin only after a wait for others, one after the other."""
    atomic_rounds: int = 0
    further_cycles: float = 0
    further_rounds: int = 0
    """What the longer ways would add, where data decides."""
    loaded: int = 0
    stored: int = 0
    """Bytes of all lanes that are not masked out."""
    sectors: int = 0
    """Pieces of 32 bytes that the accesses touch, those left out that the warp's last ones touched: L1 has them."""
    wavefronts: int = 0
    """Turns that accesses to memory and shuffles take at the SM's one port: 128 bytes each, fewer where lanes want
    different words of a bank of shared memory, or different lines of global memory."""
    in_flight: int = 0
    """Bytes of loads that were under way at once, at most."""

    def add(self, least: Count, most: Count) -> None:
        """Two ways that data chooses between: the shorter one is taken, the other one is possible."""
        for k, n in enumerate(least.visits):
            self.visits[k] += n
            self.maybe[k] += least.maybe[k] + most.visits[k] + most.maybe[k]
        self.further_cycles += most.cycles - least.cycles + least.further_cycles + most.further_cycles
        self.further_rounds += most.rounds - least.rounds + least.further_rounds + most.further_rounds
        for name in ("cycles", "rounds", "atomic_rounds"):
            setattr(self, name, getattr(least, name))
        for name in ("loaded", "stored", "sectors", "wavefronts"):
            setattr(self, name, getattr(self, name) + getattr(least, name))
        self.in_flight = max(self.in_flight, least.in_flight)
        for way in (least, most):
            self.endless |= way.endless
            self.branches |= way.branches
            self.loops |= way.loops
            self.accesses |= way.accesses

    def beside(self) -> Count:
        """The start of a count of one of several ways."""
        n = len(self.visits)
        return Count([0] * n, [0] * n, cycles=self.cycles, rounds=self.rounds, atomic_rounds=self.atomic_rounds)


class Waits:
    """The six counters by which a warp waits: when what they stand for is there, in cycles and in rounds, and the bytes
    of loads that are under way."""

    def __init__(self) -> None:
        self.ready = [0.0] * 6
        self.rounds, self.atomic_rounds, self.bytes = [0] * 6, [0] * 6, [0] * 6
        self.copies: list[list[int]] = [[] for _ in range(6)]
        """Rounds of groups of asynchronous copies that have not been waited for."""
        self.under_way = self.copying = 0
        self.near: dict[int, None] = {}
        self.announced: dict[int | None, tuple[int, int]] = {}
        """Barrier in shared memory -> round and bytes of the bulk copies that arrive there."""

    def state(self) -> Any:
        lists = [list(c) for c in (self.ready, self.rounds, self.atomic_rounds, self.bytes)]
        return lists, self.under_way, dict(self.announced)

    def restore(self, state: Any) -> None:
        lists, self.under_way, announced = state
        self.announced = dict(announced)
        self.ready, self.rounds, self.atomic_rounds, self.bytes = (list(c) for c in lists)

    def wait(self, count: Count, counters: tuple[int, ...]) -> None:
        for b in counters:
            count.cycles = max(count.cycles, self.ready[b])
            count.rounds = max(count.rounds, self.rounds[b])
            count.atomic_rounds = max(count.atomic_rounds, self.atomic_rounds[b])
            self.under_way -= self.bytes[b]
            self.bytes[b] = 0
            self.copies[b].clear()

    def begin(self, count: Count, step: Step) -> None:
        """A load or an atomic operation sets out; one that nobody waits for by a counter is no round."""
        b = step.i.sets
        if b is None:
            return
        if step.far == "atomics":
            self.atomic_rounds[b] = count.atomic_rounds + 1
        else:
            self.rounds[b] = count.rounds + 1

    def note(self, count: Count, step: Step) -> None:
        """When the result of what stays on the SM is there, and operands may be overwritten."""
        i = step.i
        if i.sets is not None and not step.far:
            self.ready[i.sets] = max(self.ready[i.sets], count.cycles + step.latency)
        if i.frees is not None:
            self.ready[i.frees] = max(self.ready[i.frees], count.cycles + READ)

    def copies_set_out(self, count: Count, i: Instruction) -> None:
        """LDGDEPBAR: the asynchronous copies so far are one group."""
        if i.sets is not None:
            self.rounds[i.sets] = count.rounds + 1
            self.copies[i.sets].append(count.rounds + 1)
            self.bytes[i.sets] += self.copying
            self.copying = 0

    def wait_for_all_but(self, count: Count, i: Instruction) -> None:
        """DEPBAR: until no more than so many groups are under way."""
        number = next((int(o[2:]) for o in i.operands if o.startswith("SB")), None)
        most = next((int(o, 16) for o in i.operands if o.startswith("0x")), 0)
        if number is None:
            return
        groups = self.copies[number]
        done, groups[:] = groups[: len(groups) - most], groups[len(groups) - most :]
        if done:
            count.rounds = max(count.rounds, done[-1])
            share = self.bytes[number] * len(done) // (len(done) + len(groups))
            self.bytes[number] -= share
            self.under_way -= share

    def tile(self, count: Count, step: Step, warp: Warp, stored: int) -> None:
        """A copy of a whole tile: announced at a barrier in shared memory and awaited there, or stored."""
        if step.access == "tile":
            count.stored += stored
            count.sectors += stored // 32
            return
        here, at, announced = warp.active_lanes(), step.address(warp), warp.of_lanes(step.i.operands[-1])
        barrier = None if at is None else int(lanes.array(at)[here[0]])
        if step.access == "awaited":
            rounds, moved = self.announced.pop(barrier, (0, 0))
            count.rounds = max(count.rounds, rounds)
            self.under_way -= moved
        elif announced is not None:
            moved = int(lanes.array(announced)[here].sum())
            self.announced[barrier] = count.rounds + 1, self.announced.get(barrier, (0, 0))[1] + moved
            count.loaded += moved
            count.sectors += moved // 32
            self.under_way += moved
            count.in_flight = max(count.in_flight, self.under_way)

    def access(self, count: Count, step: Step, warp: Warp, code: Code) -> None:
        """An access to global or shared memory, or a shuffle."""
        i = step.i
        if step.access == "shared":
            at = step.address(warp)
            if isinstance(at, np.ndarray) and isinstance(warp.mask, np.ndarray):
                at = at[warp.mask]
            count.wavefronts += code.wavefronts(at, i.width // 8)
        elif step.access in ("announced", "awaited", "tile"):
            self.tile(count, step, warp, code.tile)
        elif step.access != "global":
            count.wavefronts += 1 if step.access == "shuffle" else size(i)
        else:
            width = i.width // 8
            moved = len(warp.active_lanes()) * width
            loads = i.head != "STG"
            at = step.address(warp)
            count.wavefronts += _lines(at, warp, width)
            count.sectors += self._touched(at, warp, width, moved, loads)
            if not loads:
                count.stored += moved
                return
            count.loaded += moved
            self.under_way += moved
            if i.sets is not None:
                self.bytes[i.sets] += moved
            else:
                self.copying += moved
            count.in_flight = max(count.in_flight, self.under_way)

    def _touched(self, at: Value, warp: Warp, width: int, moved: int, loads: bool) -> int:
        """Pieces of 32 bytes of an access, those left out that L1 still has."""
        if at is None:
            return -(-moved // 32)
        first = np.unique(at[warp.active_lanes()] >> 5).tolist() if isinstance(at, np.ndarray) else [at >> 5]
        pieces = [*first, *(n + 1 for n in first)] if width > 32 else first
        if not loads:
            return len(pieces)
        new = [n for n in pieces if n not in self.near]
        for n in new:
            self.near[n] = None
        for n in list(islice(self.near, max(0, len(self.near) - NEAR))):
            del self.near[n]
        return len(new)


def _lines(at: Value, warp: Warp, width: int) -> int:
    """Turns of an access to global memory: one for each line of 128 bytes, and no more than 128 bytes in one."""
    lines = len(np.unique(at[warp.active_lanes()] >> 7)) if isinstance(at, np.ndarray) else 1
    return max(lines, width // 4 if isinstance(at, np.ndarray) else 1)
