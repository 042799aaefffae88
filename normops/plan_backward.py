"""The launches of a backward call: resident, ticketed, split, or what is left without a gradient of statistics or x."""

from __future__ import annotations

import torch
import triton.language as tl

from . import schedule
from .kernels import backward as kb
from .kernels import finish as kf
from .kernels import ticketed as kt
from .kernels.activations import ACTIVATIONS
from .plan import ABSENT, Launch, Plan, Shapes, Spec, cdiv, fold, kept_blocks, kept_first, kernel_tile
from .schedule import Device, Limits, Tile
from .ticketing import Tickets, ticketed

Needs = tuple[bool, bool, bool, bool]
Names = tuple[str, str]
READS = ("x", "dy", "w", "b", "post", "mean", "rstd")
WRITES = ("dsum", "dx", "dpost")
NONE = ("", "")


def plan_backward(
    spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: bool, needs: Needs, limits: Limits,
    device: Device,
) -> Plan:  # fmt: skip
    """Launches of a backward call; needs = (dx, dw, db, dpost); given: the statistics were constants."""
    planner = _Backward(spec, shapes, itemsize, acc, given, needs, limits, device)
    return planner.parts() if given or not needs[0] else planner.whole()


class _Backward:
    """The launches of one call as they come, and the workspace that they ask for."""

    def __init__(
        self, spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: bool, needs: Needs, limits: Limits,
        device: Device,
    ) -> None:  # fmt: skip
        self.spec, self.itemsize, self.acc_bytes, self.given = spec, itemsize, acc.itemsize, given
        self.limits, self.device = limits, device
        _, self.dw, self.db, _ = needs
        base, operands = shapes.layout(spec, spec.affine)
        layout, self.operands = shapes.columns(base, itemsize) or (base, operands)
        self.base, self.layout = base, layout
        self.n_m, self.n_c, self.n_a, self.n_s = (base.extent(letter) for letter in "mcas")
        self.columns = self.n_c * self.n_a
        acc_type = {"ACC": tl.float64 if self.acc_bytes == 8 else tl.float32}
        self.common = {"SPACE": layout.space, "STAT": layout.statistics(), **acc_type}
        # What finishes knows of groups only.
        self.grouped = {"SPACE": base.space, "W": operands["W"], **acc_type}
        self.grad = ACTIVATIONS[spec.activation][1] if spec.activation != "identity" else None
        self.streams = {**self.operands, "ACT_GRAD": self.grad}
        # Where s is a single point, the sums over s are as large as x: dw and db are added up along m instead.
        self.along_rows = self.n_s == 1 and self.n_a > 1
        self.launches: list[Launch] = []
        self.scratch: dict[str, int] = {}

    def plan(self, engine: str, words: int = 0) -> Plan:
        scratch = tuple((name, size) for name, size in self.scratch.items() if size)
        return Plan(self.base, self.layout, engine, tuple(self.launches), (), scratch, words)

    def take(self, names: Names, sizes: tuple[int, int]) -> None:
        """Workspace; what launches of one plan ask for under one name is the same memory."""
        for name, size in zip(names, sizes, strict=True):
            if name:
                self.scratch[name] = max(size, self.scratch.get(name, 0))

    def asked(self, dw: str, db: str) -> Names:
        return (dw if self.dw else "", db if self.db else "")

    def sums(self) -> Names:
        """c1, c0 as results; RMS norms have no c0."""
        names = ("c1", "c0" if self.spec.center else "")
        self.take(names, (self.layout.groups, self.layout.groups))
        return names

    # What is left where statistics were constants, or x needs no gradient

    def parts(self) -> Plan:
        if not (self.dw or self.db):
            self.apply(NONE)
            return self.plan("apply")
        tile = self.resident_tile()
        if not self.given and (self.along_rows or tile is not None):
            self.walk(tile or schedule.stream(
                self.layout, self.itemsize, self.acc_bytes, self.limits.grad_tile, 512
            ), NONE)  # fmt: skip
            return self.plan("rows")
        self.finish_affine(("p1", "p0"), self.statistics(per_a=True, write=True) * self.n_m)
        return self.plan("apply")

    # The whole gradient

    def whole(self) -> Plan:
        engine = self.limits.engine
        tile = self.resident_tile() if engine in ("", "resident") else None
        if tile is not None:
            self.walk(tile, NONE)
            return self.plan("resident")
        tickets = self.tickets() if engine in ("", "ticketed") else None
        if tickets is not None:
            self.ticketed(tickets)
            return self.plan("ticketed", tickets.words)
        self.split()
        return self.plan("split")

    def resident_tile(self) -> Tile | None:
        limits = self.limits
        limit = limits.backward_affine if self.along_rows and (self.dw or self.db) else limits.backward
        # With 16 warps ptxas aims at 64 registers a thread, and the derivative of SiLU spills there.
        most = 16 if self.grad is None else 8
        return schedule.whole_groups(
            self.layout, self.itemsize, self.acc_bytes, limit, limits.grad_tile, 512, self.grad is not None, most
        )

    def tickets(self) -> Tickets | None:
        if self.along_rows and not schedule.along_m(self.layout):
            return None  # dw and db of a tile of one m would be as large as it is
        again = 2 if self.grad is None or self.operands["POST"] is ABSENT else 3
        # Parameters of every a live beside an activation's derivative: half as many fit.
        fewer = 2 if self.grad is not None and self.n_a > 1 else 1
        return ticketed(
            self.layout, self.itemsize, self.acc_bytes, again, self.limits.grad_ticket_tile // fewer, 512 // fewer,
            self.limits.grad_rows, self.limits, self.device,
        )  # fmt: skip

    def ticketed(self, tickets: Tickets) -> None:
        tile = tickets.tile
        m_blocks = cdiv(self.n_m, tile.k) if self.along_rows else self.n_m
        direct = m_blocks == 1
        wide = 1 if self.along_rows else self.n_a
        totals = self.asked("dw", "db") if direct else self.asked("t1", "t0")
        if not direct:
            self.take(totals, (m_blocks * self.columns,) * 2)
        p0 = "p0" if self.spec.center or (self.db and not self.along_rows) else ""
        chunks = tickets.tiles if self.along_rows else tickets.chunks_s
        self.take(("p1", p0), (tickets.rows(chunks) * self.layout.groups * wide,) * 2)
        merge_a = min(32, schedule.next_power_of_2(wide))
        self.launches.append(Launch(
            kt.grad_ticketed, 2 * tickets.units * tickets.tiles,
            (*READS, *self.sums(), *WRITES, *totals, "p1", p0, "tickets"),
            (self.layout.outer, tickets.chunks_s, tickets.lead),
            {**self.common, **self.streams, **kernel_tile(tile, self.layout), "ROWS": self.along_rows, "A": wide,
             "DIRECT": direct, "MERGE_A": merge_a, "BLOCK_P": max(8, tickets.merge_p // merge_a),
             "FAN": tickets.fan},
            tile.warps,
        ))  # fmt: skip
        if not direct and any(totals):
            self.finish_affine(totals, m_blocks)

    def split(self) -> None:
        if self.along_rows:
            self.finish_group(self.statistics(per_a=False, write=False), per_a=False)
            if self.dw or self.db:
                tile = schedule.stream(self.layout, self.itemsize, self.acc_bytes, self.limits.grad_tile, 512)
                self.walk(tile, self.sums())
            else:
                self.apply(self.sums())
            return
        totals = self.finish_group(self.statistics(per_a=True, write=False), per_a=True)
        if self.n_m > 1 and any(totals):
            self.finish_affine(totals, self.n_m)
        self.apply(self.sums())

    # Launches

    def walk(self, tile: Tile, sums: Names) -> None:
        """grad_normalize; a single part writes dw and db at once."""
        count, steps = schedule.parts(self.layout, tile, self.device, self.dw or self.db)
        direct = count == 1
        names = self.asked("dw", "db") if direct else self.asked("t1", "t0")
        blocks = cdiv(self.layout.extent("c"), 1 if tile.along_m else tile.columns)
        blocks *= cdiv(self.layout.extent("a"), tile.a)
        self.launches.append(Launch(
            kb.grad_normalize, blocks * count, (*READS, *sums, *WRITES, *names), (self.layout.outer, steps),
            {**self.common, **self.streams, **kernel_tile(tile, self.layout), "CENTER": self.spec.center,
             "DIRECT": direct},
            tile.warps,
        ))  # fmt: skip
        if not direct and any(names):
            self.take(names, (count * self.columns,) * 2)
            self.finish_affine(names, count)

    def statistics(self, per_a: bool, write: bool) -> int:
        """grad_statistics; returns the number of partials of a group (and of a, where they are kept apart)."""
        # Sums are kept for every element: with an activation's derivative beside them, half as many fit.
        fewer = 1 if self.grad is None else 2
        tile = schedule.stream(self.layout, self.itemsize, self.acc_bytes, self.limits.grad_tile // fewer, 512 // fewer)
        steps = schedule.steps(self.layout, tile)
        chunks_s = cdiv(self.layout.extent("s"), tile.s * steps)
        blocks_a = cdiv(self.layout.extent("a"), tile.a)
        p0 = "p0" if self.spec.center or (per_a and self.db) else ""
        self.launches.append(Launch(
            kb.grad_statistics, kept_blocks(self.layout, tile.along_m, tile.columns) * blocks_a * chunks_s,
            (*READS, *(WRITES if write else ("", "", "")), "p1", p0), (self.layout.outer, chunks_s, steps),
            {**self.common, **self.streams, **kernel_tile(tile, self.layout), "PER_A": per_a,
             "KEPT_FIRST": kept_first(self.layout)},
            tile.warps,
        ))  # fmt: skip
        partials = chunks_s if per_a else chunks_s * blocks_a
        self.take(("p1", p0), (partials * self.layout.groups * (self.n_a if per_a else 1),) * 2)
        return partials

    def finish_group(self, partials: int, per_a: bool) -> Names:
        """c1 and c0; and where partials are kept apart along a, dw and db (of every m, if there are several)."""
        direct = self.n_m == 1
        totals = NONE if not per_a else self.asked("dw", "db") if direct else self.asked("t1", "t0")
        if not direct:
            self.take(totals, (self.layout.groups * self.n_a,) * 2)
        wide = self.n_a if per_a else 1
        along_m = schedule.along_m(self.base)
        block_k, block_a, block_p = schedule.finish_group_tile(kept_first(self.base), wide)
        p0 = "p0" if self.spec.center or totals[1] else ""
        self.launches.append(Launch(
            kf.finish_group, kept_blocks(self.base, along_m, block_k),
            ("p1", p0, "w" if per_a else "", *self.sums(), *totals), (self.base.outer, partials),
            {**self.grouped, "STAT": self.base.statistics(),
             "A": wide, "DIRECT": direct, "ALONG_M": along_m, "FOLD": fold(self.base, block_k, block_k),
             "BLOCK_A": block_a, "BLOCK_P": block_p, "WIDE": False},
            4,
        ))  # fmt: skip
        return totals

    def finish_affine(self, partials: Names, rows: int) -> None:
        block_j, block_i = schedule.finish_affine_tile(self.columns)
        self.launches.append(Launch(
            kf.finish_affine, cdiv(self.columns, block_i), (*partials, "dw", "db"), (self.base.outer, rows),
            {**self.grouped, "BLOCK_J": block_j, "BLOCK_I": block_i}, 4,
        ))  # fmt: skip

    def apply(self, sums: Names) -> None:
        tile = schedule.stream(self.layout, self.itemsize, self.acc_bytes, self.limits.grad_tile, 512)
        chunks_s = cdiv(self.layout.extent("s"), tile.s)
        blocks_a = cdiv(self.layout.extent("a"), tile.a)
        self.launches.append(Launch(
            kb.grad_apply, kept_blocks(self.layout, tile.along_m, tile.columns) * blocks_a * chunks_s,
            (*READS, *sums, *WRITES), (self.layout.outer, chunks_s),
            {**self.common, **self.streams, **kernel_tile(tile, self.layout), "KEPT_FIRST": kept_first(self.layout)},
            tile.warps,
        ))  # fmt: skip
