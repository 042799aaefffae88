"""The launches of a backward call: resident, ticketed, split, or what is left without a gradient of statistics or x."""

from __future__ import annotations

from typing import Any

import torch

from . import schedule
from .kernels.bundles import APPLY, BOTH, STATISTICS, Form
from .kernels.finish import grad_finish, sum_rows
from .kernels.grad_stream import grad_stream
from .kernels.resident import grad_normalize
from .layout import Layout
from .plan import (
    Launch,
    Plan,
    Shapes,
    Spec,
    alike,
    cdiv,
    cut,
    cut_columns,
    fold,
    form,
    kept_blocks,
    kept_first,
    ladder,
    named,
)
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
    return planner.rest() if given or not needs[0] else ladder(planner)


class _Backward:
    """The launches of one call as they come, and the workspace that they ask for."""

    def __init__(
        self, spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: bool, needs: Needs, limits: Limits,
        device: Device,
    ) -> None:  # fmt: skip
        self.spec, self.itemsize, self.acc, self.given = spec, itemsize, acc, given
        self.acc_bytes, self.limits, self.device = acc.itemsize, limits, device
        _, self.dw, self.db, _ = needs
        self.base, base = shapes.layout(spec, spec.affine)
        self.layout, operands = shapes.columns(self.base, itemsize) or (self.base, base)
        self.n_m, self.n_c, self.n_a, self.n_s = (self.base.extent(letter) for letter in "mcas")
        self.columns = self.n_c * self.n_a
        self.form = form(self.layout, operands, spec, acc, device)
        self.by_column = shapes.by_column(self.base, base, itemsize)
        found = shapes.planes(self.layout, itemsize, self.acc_bytes)
        self.planes: Tile | None
        self.planes, self.tiled, tiled = found or (None, self.layout, operands)
        self.tiled_form = form(self.tiled, tiled, spec, acc, device)._replace(CLAMP_A=self.planes is not None)
        # What finishes know of: groups.
        self.grouped = form(self.base, {"W": base["W"]}, spec, acc, device)._replace(ACT="identity")
        self.activated = spec.activation != "identity"
        self.added = shapes.has("POST")
        # Where s is a single point, the sums over s are as large as x: dw and db are added up along m instead.
        self.along_rows = self.n_s == 1 and self.n_a > 1
        self.launches: list[Launch] = []
        self.scratch: dict[str, int] = {}

    def plan(self, engine: str, words: int = 0) -> Plan:
        scratch = tuple((name, size) for name, size in self.scratch.items() if size)
        return Plan(self.base, self.layout, engine, tuple(self.launches), (), scratch, words)

    def take(self, names: Names, size: int) -> None:
        """Workspace; what launches of one plan ask for under one name is the same memory."""
        for name in names:
            if name:
                self.scratch[name] = max(size, self.scratch.get(name, 0))

    def asked(self, dw: str, db: str) -> Names:
        return (dw if self.dw else "", db if self.db else "")

    def totals(self, whole: bool, rows: int) -> Names:
        """Where sums for dw and db go: to dw and db if they are whole, else to so many rows of workspace."""
        names = self.asked("dw", "db") if whole else self.asked("t1", "t0")
        if not whole:
            self.take(names, rows * self.columns)
        return names

    def sums(self) -> Names:
        """c1, c0 as results; RMS norms have no c0."""
        names = ("c1", "c0" if self.spec.center else "")
        self.take(names, self.layout.groups)
        return names

    # What is left where statistics were constants, or x needs no gradient

    def rest(self) -> Plan:
        if not (self.dw or self.db):
            self.apply(NONE)
            return self.plan("apply")
        tile = self.resident_tile()
        if self.along_rows or tile is not None:
            self.walk(tile or self.chunk(), APPLY, NONE)
            return self.plan("rows")
        self.finish_affine(self.statistics(write=True))
        return self.plan("apply")

    # The whole gradient

    def resident_tile(self) -> Tile | None:
        limits = self.limits
        affine = self.along_rows and (self.dw or self.db)
        if affine and schedule.in_rows(self.layout):
            return schedule.rows(self.layout, self.itemsize, self.acc_bytes, 32, 8)
        limit = limits.backward_affine if affine else limits.backward
        # With 16 warps ptxas aims at 64 registers a thread, and the derivative of SiLU spills there.
        most = 8 if self.activated else 16
        return schedule.whole_groups(
            self.layout, self.itemsize, self.acc_bytes, limit, limits.grad_tile, 512, self.activated, most
        )

    def resident(self, tile: Tile) -> Plan:
        self.walk(tile, BOTH, NONE)
        return self.plan("resident")

    def tickets(self) -> Tickets | None:
        if self.along_rows:
            return None
        again = 3 if self.activated and self.added else 2
        # Parameters of every a live beside an activation's derivative: half as many fit.
        fewer = 2 if self.activated and self.n_a > 1 else 1
        # Masks along s, columns side by side, or a third stream: half as many elements a thread, or some spill.
        masked = 0 in self.tiled.sizes("s") or schedule.sideways(self.layout) or again > 2
        return ticketed(
            self.tiled, self.itemsize, self.acc_bytes, again, self.limits.grad_ticket_tile // fewer,
            self.limits.grad_ticket_warp // (2 if masked else 1), self.limits.rows, self.limits, self.device,
            self.planes,
        )  # fmt: skip

    def ticketed(self, tickets: Tickets) -> Plan:
        direct = self.n_m == 1
        totals = self.totals(direct, self.n_m)
        p0 = "p0" if self.spec.center or self.db else ""
        chunks = tickets.chunks_s if self.planes is None else tickets.tiles
        self.take(("p1", p0), tickets.rows(chunks) * self.layout.groups * self.n_a)
        merge_a = min(32, schedule.next_power_of_2(self.n_a))
        self.launches.append(Launch(
            grad_stream, tickets.programs,
            alike(*READS, *WRITES, *self.sums(), "p1", p0, "tickets") | named(dw=totals[0], db=totals[1]),
            (self.layout.outer, tickets.lead),
            cut(self.tiled_form, tickets.tile, self.tiled, A=self.n_a, DIRECT=direct, MERGE_A=merge_a,
                BLOCK_P=max(8, tickets.merge_p // merge_a), FAN=tickets.fan),
            tickets.tile.warps,
        ))  # fmt: skip
        if not direct:
            self.sum_rows(totals, self.n_m)
        return self.plan("ticketed", tickets.words)

    def split(self) -> Plan:
        if self.along_rows:
            tile = self.chunk()
            self.walk(tile, STATISTICS, ("p1", "p0" if self.spec.center else ""))
            self.grad_finish(cdiv(self.n_a, tile.width), NONE, 1, self.sums())
            self.walk(tile, APPLY, self.sums())
            return self.plan("split")
        chunks = self.statistics(write=False)
        totals = self.totals(self.n_m == 1, self.n_m)
        self.grad_finish(chunks, totals, self.n_a, self.sums())
        if self.n_m > 1:
            self.sum_rows(totals, self.n_m)
        self.apply(self.sums())
        return self.plan("split")

    # Launches

    def chunk(self) -> Tile:
        """A tile of long rows: one warp owns a chunk of columns, so that their sums need no barrier."""
        if schedule.in_rows(self.layout):
            return schedule.row_chunk(self.layout, self.itemsize)
        return self.stream()

    def stream(self, fewer: int = 1) -> Tile:
        tile = self.limits.grad_tile // fewer
        return schedule.stream(self.layout, self.itemsize, self.acc_bytes, tile, 512 // fewer)

    def walk(self, tile: Tile, phase: str, sums: Names) -> None:
        """grad_normalize; a single part writes dw and db at once.  `sums`: of rows, written (STATISTICS) or given."""
        adds = phase != APPLY or not any(sums)  # given sums come from a launch that has added up dw and db
        count, steps = schedule.parts(self.layout, tile, self.device, adds and (self.dw or self.db))
        direct = count == 1
        names = self.totals(direct, count) if adds else NONE
        blocks = cdiv(self.layout.extent("c"), 1 if tile.along_m else tile.columns)
        blocks *= cdiv(self.layout.extent("a"), tile.width)
        operands = alike(*READS, *sums) | named(dw=names[0], db=names[1])
        if phase == STATISTICS:
            self.take(sums, cdiv(self.n_a, tile.width) * self.layout.groups)
        else:
            operands |= alike(*WRITES)
        self.launches.append(Launch(
            grad_normalize, blocks * count, operands, (self.layout.outer, steps),
            cut(self.form, tile, self.layout, PHASE=phase, DIRECT=direct and adds), tile.warps,
        ))  # fmt: skip
        if not direct:
            self.sum_rows(names, count)

    def statistics(self, write: bool) -> int:
        """p1 and p0 of chunks; returns how many there are of a group."""
        if self.by_column is None:
            # Sums are kept for every element: with an activation's derivative beside them, half as many fit.
            layout, tile = self.layout, self.stream(2 if self.activated else 1)
            steps = schedule.steps(layout, tile)
            formed = cut(self.form, tile, layout, KEPT_FIRST=kept_first(layout))
        else:
            layout, tile, formed = self.columned()
            steps = schedule.column_steps(layout, tile, self.device, self.limits.grad_column_programs)
            formed = formed._replace(FOLD=(1, tile.k, tile.k, 1))
        formed = formed._replace(PHASE=STATISTICS)
        chunks = cdiv(layout.extent("s"), tile.length * steps)
        blocks_a = cdiv(layout.extent("a"), tile.width)
        p0 = "p0" if self.spec.center or self.db else ""
        self.launches.append(Launch(
            grad_stream, kept_blocks(layout, tile.along_m, tile.columns) * blocks_a * chunks,
            alike(*READS, *(WRITES if write else ()), "p1", p0), (layout.outer, steps), formed, tile.warps,
        ))  # fmt: skip
        self.take(("p1", p0), chunks * layout.extent("m") * layout.extent("c") * layout.extent("a"))
        return chunks

    def columned(self) -> tuple[Layout, Tile, Form]:
        """The layout of columns, its tile, and the form of a launch over it."""
        assert self.by_column is not None
        layout, operands = self.by_column
        tile = schedule.column_tile(layout, self.itemsize, self.limits.grad_column_tile)
        formed = form(layout, operands, self.spec, self.acc, self.device)
        return layout, tile, cut_columns(formed, tile, layout, self.itemsize)

    def finish_affine(self, chunks: int) -> None:
        """dw and db from p1 and p0, where nothing else is made of them."""
        if self.apart > 1:
            self.grad_finish(chunks, self.totals(self.n_m == 1, self.n_m), self.n_a, NONE)
            if self.n_m > 1:
                self.sum_rows(("t1", "t0"), self.n_m)
        else:
            self.sum_rows(("p1", "p0"), chunks * self.n_m)

    @property
    def apart(self) -> int:
        """Columns of a group that share their parameters and whose sums are kept apart all the same."""
        return self.by_column[0].fold if self.by_column is not None and self.by_column[0].shared else 1

    def grad_finish(self, chunks: int, totals: Names, wide: int, sums: Names) -> None:
        """c1 and c0; and where partials are kept apart along a, dw and db (of every m, if there are several)."""
        along_m = schedule.along_m(self.base)
        if self.by_column is None:
            block_k, block_a, block_p = schedule.finish_group_tile(kept_first(self.base), wide)
        else:
            layout, tile, _ = self.columned()
            block_k, block_a, block_p = schedule.column_finish_tile(
                layout, tile, self.device, self.limits.grad_column_programs, wide, self.apart
            )
        p0 = "p0" if self.spec.center or totals[1] else ""
        formed: dict[str, Any] = {
            "A": wide, "DIRECT": self.n_m == 1, "ALONG_M": along_m, "FOLD": fold(self.base, block_k, block_k),
            "MERGE_A": block_a, "BLOCK_P": block_p, "APART": self.apart,
        }  # fmt: skip
        self.launches.append(Launch(
            grad_finish, kept_blocks(self.base, along_m, block_k),
            alike("p1", p0, "" if self.along_rows else "w", *sums) | named(dw=totals[0], db=totals[1]),
            (self.base.outer, chunks), self.grouped._replace(**formed), 4,
        ))  # fmt: skip

    def sum_rows(self, partials: Names, rows: int) -> None:
        if not any(partials):
            return
        block_p, block_a = schedule.sum_rows_tile(self.columns, rows)
        self.launches.append(Launch(
            sum_rows, cdiv(self.columns, block_a),
            named(p1=partials[0], p0=partials[1]) | alike(*self.asked("dw", "db")), (self.base.outer, rows),
            self.grouped._replace(BLOCK_P=block_p, BLOCK_A=block_a), 4,
        ))  # fmt: skip

    def apply(self, sums: Names) -> None:
        if self.by_column is None:
            layout, tile = self.layout, self.stream()
            formed = cut(self.form, tile, layout, KEPT_FIRST=kept_first(layout))
        else:
            layout, tile, formed = self.columned()
        tiles = kept_blocks(layout, tile.along_m, tile.columns) * cdiv(layout.extent("a"), tile.width)
        self.launches.append(Launch(
            grad_stream, tiles * cdiv(layout.extent("s"), tile.length), alike(*READS, *sums, *WRITES),
            (layout.outer, 1), formed._replace(PHASE=APPLY), tile.warps,
        ))  # fmt: skip
