"""The launches of a backward call: resident, ticketed, split, or what is left without a gradient of statistics or x."""

from __future__ import annotations

import torch

from . import schedule, walks
from .gpus import Device
from .kernels.bundles import APPLY, BOTH, STATISTICS, Form
from .kernels.finish import grad_finish, sum_rows
from .kernels.grad_stream import grad_stream
from .kernels.resident import grad_group, grad_normalize
from .norm import Needs, Norm
from .plan import Launch, Plan, Planner, alike, cdiv, cut, fold, kept_blocks, kept_first, named
from .schedule import Limits
from .ticketing import Tickets, ticketed
from .tile import Tile, along_m, in_rows, next_power_of_2, sideways, vector
from .views import Shapes, View

Names = tuple[str, str]
READS = ("x", "dy", "w", "b", "post", "mean", "rstd")
WRITES = ("dsum", "dx", "dpost")
NONE = ("", "")


def plan_backward(
    spec: Norm, shapes: Shapes, itemsize: int, acc: torch.dtype, given: bool, needs: Needs, limits: Limits,
    device: Device,
) -> Plan:  # fmt: skip
    """Launches of a backward call; needs = (dx, dw, db, dpost); given: the statistics were constants."""
    planner = _Backward(spec, shapes, itemsize, acc, limits, device, needs)
    return planner.rest() if given or not needs[0] else planner.choose()


class _Backward(Planner):
    """The launches of one call as they come, and the workspace that they ask for."""

    streams = 2

    def __init__(
        self, spec: Norm, shapes: Shapes, itemsize: int, acc: torch.dtype, limits: Limits, device: Device, needs: Needs
    ) -> None:
        super().__init__(spec, shapes, itemsize, acc, limits, device)
        _, self.dw, self.db, _ = needs
        self.n_m, self.n_c, self.n_a, self.n_s = (self.base.layout.extent(letter) for letter in "mcas")
        self.sums_wide = self.n_c * self.n_a
        self.activated = spec.activation != "identity"
        cheap = spec.activation in schedule.CHEAP
        self.cached = limits.grad_cached if cheap else limits.grad_cached_activated
        self.added = shapes.has("POST")
        if self.activated and self.added:  # three streams, not two
            self.cached *= 2 / 3
        # Where s is a single point, the sums over s are as large as x: dw and db are added up along m instead.
        self.along_rows = self.n_s == 1 and self.n_a > 1
        self.launches: list[Launch] = []
        self.scratch: dict[str, int] = {}

    def plan(self, engine: str, words: int = 0) -> Plan:
        scratch = tuple((name, size) for name, size in self.scratch.items() if size)
        return Plan(self.base.layout, self.streamed, engine, tuple(self.launches), (), scratch, words)

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
            self.take(names, rows * self.sums_wide)
        return names

    def sums(self) -> Names:
        """c1, c0 as results; RMS norms have no c0."""
        names = ("c1", "c0" if self.spec.center else "")
        self.take(names, self.base.layout.groups)
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
        chunks = self.statistics(write=True)
        if self.apart > 1:
            self.grad_finish(chunks, self.n_a, NONE, self.totals(self.n_m == 1, self.n_m))
        else:
            self.sum_rows(("p1", "p0"), chunks * self.n_m)
        return self.plan("apply")

    # The whole gradient

    def resident_tile(self) -> Tile | None:
        layout = self.groups.layout
        affine = self.along_rows and (self.dw or self.db)
        if affine and in_rows(layout):
            # Beside a third stream, or a derivative that takes many registers, half as many fit.
            few = self.activated and (self.added or self.spec.activation not in (*schedule.CHEAP, "silu"))
            return schedule.rows(layout, self.itemsize, self.acc_bytes, 16 if few else 32, 8)
        if affine and along_m(layout):
            tile = schedule.column_groups(layout, self.itemsize, self.acc_bytes, 4 if self.activated else 8, 8)
            if tile is not None:
                return tile
        # With a third stream one large group would spill; of images there must be enough of them.
        single = not (self.activated and self.added)
        single = single and (not self.images or schedule.enough(self.base.layout, self.device))
        return schedule.backward_groups(
            layout, self.itemsize, self.acc_bytes, self.device, self.spec.activation, affine, single
        )

    def resident(self, tile: Tile) -> Plan:
        self.walk(tile, BOTH, NONE)
        return self.plan("resident")

    def tickets(self) -> Tickets | None:
        if self.along_rows:
            return None
        again = 3 if self.activated and self.added else 2
        # Parameters of every a live beside an activation's derivative, or a third stream: half as many fit.
        fewer = 2 if (self.activated and self.n_a > 1) or again > 2 else 1
        # Masks along s, columns side by side, or a third stream: half as many elements a thread, or some spill.
        layout = self.tiled.layout
        masked = 0 in layout.sizes("s") or sideways(self.base.layout) or again > 2
        return ticketed(
            layout, self.itemsize, self.acc_bytes, again, self.limits.grad_ticket_tile // fewer,
            self.limits.grad_ticket_warp // (2 if masked else 1), self.limits, self.device, self.plane_tile,
        )  # fmt: skip

    def ticketed(self, tickets: Tickets) -> Plan:
        direct = self.n_m == 1
        totals = self.totals(direct, self.n_m)
        p0 = "p0" if self.spec.center or self.db else ""
        chunks = tickets.chunks_s if self.plane_tile is None else tickets.tiles
        layout = self.tiled.layout
        self.take(("p1", p0), chunks * self.base.layout.groups * self.n_a)
        merge_a = min(32, next_power_of_2(self.n_a))
        formed = self.form(self.tiled)._replace(
            CLAMP_A=self.plane_tile is not None, A=self.n_a, DIRECT=direct, MERGE_A=merge_a,
            BLOCK_P=max(8, tickets.merge_p // merge_a),
        )  # fmt: skip
        self.launches.append(Launch(
            grad_stream, tickets.programs,
            alike(*READS, *WRITES, *self.sums(), "p1", p0, "tickets") | named(dw=totals[0], db=totals[1]),
            (layout.outer, tickets.lead), cut(formed, tickets.tile, layout), tickets.tile.warps,
        ))  # fmt: skip
        if not direct:
            self.sum_rows(totals, self.n_m)
        return self.plan("ticketed", tickets.words)

    def split(self) -> Plan:
        if self.along_rows:
            tile = self.chunk()
            partials, rows = self.walk(tile, STATISTICS, ("p1", "p0" if self.spec.center else ""))
            self.grad_finish(cdiv(self.n_a, tile.width), 1, self.sums(), partials=partials, rows=rows)
            self.walk(tile, APPLY, self.sums())
            return self.plan("split")
        chunks = self.statistics(write=False)
        if self.n_m == 1:
            self.grad_finish(chunks, self.n_a, self.sums(), self.totals(True, 1))
        else:
            self.grad_finish(chunks, self.n_a, self.sums(), partials=self.asked("p1", "p0"), rows=chunks * self.n_m)
        self.apply(self.sums())
        return self.plan("split")

    # Launches

    def chunk(self) -> Tile:
        """A tile of long rows: one warp owns a chunk of columns, so that their sums need no barrier."""
        if in_rows(self.base.layout):
            return schedule.row_chunk(self.base.layout, self.itemsize)
        return schedule.stream(self.base.layout, self.itemsize, self.acc_bytes, self.limits.grad_tile, 512)

    def walk(self, tile: Tile, phase: str, sums: Names) -> tuple[Names, int]:
        """grad_normalize or grad_group; `sums`: of rows, written (STATISTICS) or given.

        A single part writes dw and db at once.  Several leave rows of them: returned of STATISTICS, else added up here.
        """
        layout = self.groups.layout
        adds = phase != APPLY or not any(sums)  # given sums come from a launch that has added up dw and db
        count, steps = walks.parts(layout, tile, self.device, adds * (self.dw + self.db))
        direct = count == 1
        names = self.totals(direct, count) if adds else NONE
        blocks = cdiv(layout.extent("c"), 1 if tile.along_m else tile.columns)
        blocks *= cdiv(layout.extent("a"), tile.width)
        operands = alike(*READS, *sums) | named(dw=names[0], db=names[1])
        if phase == STATISTICS:
            self.take(sums, cdiv(self.n_a, tile.width) * layout.groups)
        else:
            operands |= alike(*WRITES)
        lane = min(tile.k, vector(layout, self.itemsize)) if tile.along_a and kept_first(layout) else 1
        formed = self.group_form(tile, PHASE=phase, DIRECT=direct and adds, LANE=lane)
        kernel, scalars = (grad_group, ()) if tile.single else (grad_normalize, (steps,))
        self.launches.append(Launch(kernel, blocks * count, operands, (layout.outer, *scalars), formed, tile.warps))
        if direct:
            return NONE, 0
        if phase != STATISTICS:
            self.sum_rows(names, count)
        return names, count

    def statistics(self, write: bool) -> int:
        """p1 and p0 of chunks; returns how many there are of a group."""
        # Sums are kept for every element: with an activation's derivative beside them, half as many fit.
        fewer = 2 if self.activated else 1
        view, tile, formed = self.streaming(self.limits.grad_tile // fewer, 512 // fewer)
        layout = view.layout
        if self.columns is None:
            steps = self.steps(layout, tile)
        else:
            steps = walks.steps(layout, tile, self.device, self.limits.grad_column_programs)
            formed = formed._replace(FOLD=(1, tile.k, tile.k, 1))
        chunks = cdiv(layout.extent("s"), tile.length * steps)
        programs = kept_blocks(layout, tile.along_m, tile.columns) * cdiv(layout.extent("a"), tile.width) * chunks
        p0 = "p0" if self.spec.center or self.db else ""
        self.launches.append(Launch(
            grad_stream, programs, alike(*READS, *(WRITES if write else ()), "p1", p0), (layout.outer, steps),
            formed._replace(PHASE=STATISTICS), tile.warps,
        ))  # fmt: skip
        self.take(("p1", p0), chunks * layout.extent("m") * layout.extent("c") * layout.extent("a"))
        return chunks

    @property
    def apart(self) -> int:
        """Columns of a group that share their parameters and whose sums are kept apart all the same."""
        return self.columns.layout.fold if self.columns is not None and self.columns.layout.shared else 1

    def grad_finish(
        self, chunks: int, wide: int, sums: Names, totals: Names = NONE, partials: Names = NONE, rows: int = 0
    ) -> None:
        """c1 and c0; and where partials are kept apart along a, dw and db: of every m (`totals`), or as the sums of so
        many rows of `partials`."""
        layout = self.base.layout
        m = along_m(layout)
        if self.columns is None:
            block_k, block_a, block_p = schedule.finish_group_tile(kept_first(layout), wide)
            warps = 4
        else:
            block_k, block_a, block_p = schedule.column_finish_tile(chunks * self.apart, wide)
            warps = schedule.warps(block_k * block_a * block_p, 256, 8)
        formed = self.merging._replace(
            A=wide, DIRECT=self.n_m == 1, ALONG_M=m, FOLD=fold(layout, block_k, block_k), MERGE_A=block_a,
            BLOCK_P=block_p, APART=self.apart,
        )  # fmt: skip
        programs = kept_blocks(layout, m, block_k)
        p0 = "p0" if self.spec.center or totals[1] else ""
        affine = named(dw=totals[0], db=totals[1])
        if any(partials):
            across, formed = self.adding(formed, rows)
            programs += across
            affine = named(t1=partials[0], t0=partials[1]) | alike(*self.asked("dw", "db"))
        self.launches.append(Launch(
            grad_finish, programs, alike("p1", p0, "" if self.along_rows else "w", *sums) | affine,
            (layout.outer, chunks, rows), formed, warps,
        ))  # fmt: skip

    def adding(self, form: Form, rows: int) -> tuple[int, Form]:
        """Programs that add up so many rows of partial dw and db, and their form."""
        block_s, block_a = schedule.sum_rows_tile(self.sums_wide, rows)
        return cdiv(self.sums_wide, block_a), form._replace(BLOCK_S=block_s, BLOCK_A=block_a)

    @property
    def merging(self) -> Form:
        """What finishes know of: groups and their parameters."""
        return self.form(View(self.base.layout, {"W": self.base.operands["W"]}))._replace(ACT="identity")

    def sum_rows(self, partials: Names, rows: int) -> None:
        if not any(partials):
            return
        programs, formed = self.adding(self.merging, rows)
        self.launches.append(Launch(
            sum_rows, programs, named(t1=partials[0], t0=partials[1]) | alike(*self.asked("dw", "db")),
            (self.base.layout.outer, rows), formed, 4,
        ))  # fmt: skip

    def apply(self, sums: Names) -> None:
        view, tile, formed = self.streaming(self.limits.grad_tile, 512)
        layout = view.layout
        tiles = kept_blocks(layout, tile.along_m, tile.columns) * cdiv(layout.extent("a"), tile.width)
        self.launches.append(Launch(
            grad_stream, tiles * cdiv(layout.extent("s"), tile.length), alike(*READS, *sums, *WRITES),
            (layout.outer, 1), formed._replace(PHASE=APPLY), tile.warps,
        ))  # fmt: skip
