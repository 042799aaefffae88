"""What a warp holds while it is walked: registers, predicates, what it knows of shared and local memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import lanes
from .lanes import M32, Value


class Warp:
    """One warp of one program.  ``constants``: known words of the constant bank; ``ticket``: what the program's first
    atomic addition returns, None where that is unknown; ``told``: what the program's first warp had left in shared
    memory at each barrier.

    ``mask`` says which lanes an instruction is for: True for all, None where data decides.
    """

    def __init__(
        self, specials: Mapping[str, Any], constants: Mapping[int, int], warp: int, ticket: int | None = None,
        told: Sequence[dict[int, Value]] = (),
    ) -> None:  # fmt: skip
        self.constants, self.ticket, self.told = constants, ticket, told
        thread = lanes.LANES + 32 * warp
        self.specials = {**specials, "SR_TID.X": thread, "SR_LANEID": lanes.LANES, "SR_LTMASK": (1 << lanes.LANES) - 1}
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, Value] = {}
        self.packed: dict[str, dict[str, Value]] = {}
        self.partly: dict[str, tuple[Value, int]] = {}
        """Register of which not all lanes are known -> lanes that last wrote it, and what."""
        self.memory: dict[str, dict[int, Value]] = {"shared": {}, "local": {}}
        self.barriers: list[dict[int, Value]] = []
        self.mask: Value = True
        self.gone: Value = False
        self.calls: list[int] = []
        self.first_atomic: tuple[int, int] | None = None

    def special(self, name: str) -> Value:
        return self.specials.get(name)

    def active_lanes(self) -> Any:
        return lanes.LANES.astype(np.int64) if not isinstance(self.mask, np.ndarray) else np.flatnonzero(self.mask)

    def put(self, name: str, v: Value, wide: bool = False) -> None:
        if name in ("RZ", "URZ"):
            return
        if wide:
            high = name[: len(name.rstrip("0123456789"))] + str(int(name.lstrip("UR")) + 1)
            self.put(high, None if v is None else v >> 32)
            v = None if v is None else v & M32
        if self.partly:
            self.partly.pop(name, None)
        if self.mask is not True:
            written, v = v, lanes.select(self.mask, v, self.registers.get(name, 0))
            if v is None and isinstance(written, int) and isinstance(self.mask, np.ndarray):
                self.partly[name] = self.mask, written
        self.registers[name] = v

    def of_lanes(self, name: str) -> Value:
        """A register as the lanes that are here have it, where those that are not may hold anything."""
        v = self.registers.get(name, 0)
        if v is None and name in self.partly and isinstance(self.mask, np.ndarray):
            mask, written = self.partly[name]
            return written if mask[self.mask].all() else None
        return v

    def set(self, name: str, p: Value) -> None:
        if name in ("PT", "UPT"):
            return
        p = lanes.settled(p, self.mask if isinstance(self.mask, np.ndarray) else True)
        if self.mask is not True:
            old = self.predicates.get(name, False)
            p = lanes.select(self.mask, p, old)
            p = p.astype(np.bool_) if isinstance(p, np.ndarray) else p
        self.predicates[name] = p

    def drawn(self, address: Value, addend: Value) -> Value:
        """What an atomic addition returns: a ticket, if it is the program's first one and of a single lane."""
        if self.first_atomic is not None:
            return None
        active = self.active_lanes()
        if len(active) != 1 or address is None or addend is None:
            self.first_atomic = (-1, -1)
            return None
        self.first_atomic = tuple(int(lanes.array(v)[active[0]]) for v in (address, addend))  # type: ignore[assignment]
        return self.ticket

    def remember(self, memory: str, at: Value, offset: int, v: Value) -> None:
        known = self.memory[memory]
        if at is None or self.mask is None:
            return known.clear()
        if memory == "local":
            if isinstance(at, np.ndarray):
                return known.clear()
            known[at + offset] = v if self.mask is True else lanes.select(self.mask, v, known.get(at + offset))
            return
        if v is None:
            if known:
                for a in np.unique(lanes.array(at)[self.active_lanes()]):
                    known.pop(int(a) + offset, None)
            return
        values = lanes.array(v)
        for lane in self.active_lanes():
            known[int(at if isinstance(at, int) else at[lane]) + offset] = int(values[lane])

    def remembered(self, memory: str, at: Value, offset: int) -> Value:
        known = self.memory[memory]
        if memory == "local":
            return known.get(at + offset) if isinstance(at, int) else None
        if self.told and self.barriers:
            known = self.told[min(len(self.barriers), len(self.told)) - 1] | known
        if not known or at is None:
            return None
        if isinstance(at, int):
            return known.get(at + offset)
        found = [known.get(int(at[lane]) + offset) for lane in self.active_lanes()]
        if any(v is None for v in found):
            return None
        values = np.zeros(32, np.uint64)
        values[self.active_lanes()] = np.array(found, np.uint64)
        return lanes.collapsed(values) if self.mask is True else values

    def state(self) -> Any:
        """A copy of all that instructions change."""
        memory = {name: dict(known) for name, known in self.memory.items()}
        return (dict(self.registers), dict(self.predicates), memory, self.mask, self.gone, list(self.calls),
                list(self.barriers))  # fmt: skip

    def restore(self, state: Any) -> None:
        registers, predicates, memory, self.mask, self.gone, calls, barriers = state
        self.registers, self.predicates = dict(registers), dict(predicates)
        self.memory = {name: dict(known) for name, known in memory.items()}
        self.calls, self.barriers = list(calls), list(barriers)
        self.partly.clear()

    def forget_what_differs(self, other: Any) -> None:
        """Keep what is the same in another state; the rest is unknown."""
        for mine, theirs, absent in ((self.registers, other[0], 0), (self.predicates, other[1], False)):
            for name in mine.keys() | theirs.keys():
                if not lanes.same(mine.get(name, absent), theirs.get(name, absent)):
                    mine[name] = None
        for kind, known in self.memory.items():
            for at in list(known):
                if not lanes.same(known[at], other[2][kind].get(at)):
                    del known[at]
