"""The launches of a forward call: resident, ticketed, split, apply alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from . import schedule, walks
from .gpus import Device
from .kernels.bundles import APPLY, STATISTICS, Form
from .kernels.finish import finish
from .kernels.resident import normalize
from .kernels.stream import stream
from .layout import Layout
from .norm import Norm
from .plan import Launch, Plan, Planner, alike, cdiv, cut, fold, kept_blocks, kept_first, named
from .schedule import Limits
from .ticketing import Tickets, ticketed
from .tile import Tile, in_rows, sideways, vector
from .views import Shapes, View

READS = ("x", "pre", "sum")
RESULTS = ("mean", "rstd", "running_mean", "running_var")
OUT = ("w", "b", "post", "y")


def plan_forward(
    spec: Norm, shapes: Shapes, itemsize: int, acc: torch.dtype, given: str, limits: Limits, device: Device
) -> Plan:
    """Launches of a forward call; `given` is "" (statistics of x), "var" or "rstd" (statistics given)."""
    planner = _Forward(spec, shapes, itemsize, acc, limits, device, given)
    return planner.plan("apply", (planner.apply(),)) if given else planner.choose()


class _Forward(Planner):
    """What the launches of one call have in common."""

    streams = 1

    def __init__(
        self, spec: Norm, shapes: Shapes, itemsize: int, acc: torch.dtype, limits: Limits, device: Device, given: str
    ) -> None:
        super().__init__(spec, shapes, itemsize, acc, limits, device)
        self.given = given
        self.cached = limits.cached
        self.summed = shapes.has("SUM")
        self.parts = ("part_mean", "part_m2") if spec.center else ("part_m2",)

    def plan(self, engine: str, launches: tuple[Launch, ...], rows: int = 0, words: int = 0) -> Plan:
        """`rows`: of partial results."""
        saved = () if self.given else self.spec.statistics
        scratch = tuple((name, rows * self.base.layout.groups) for name in self.parts if rows)
        return Plan(self.base.layout, self.streamed, engine, launches, saved, scratch, words)

    # Resident

    def resident_tile(self) -> Tile | None:
        layout = self.groups.layout
        extra = self.shapes.has("POST")
        if in_rows(layout):
            tile = schedule.forward_rows(
                layout, self.itemsize, self.acc_bytes, self.summed, extra, self.spec.activation
            )
        else:
            tile = schedule.column_groups(layout, self.itemsize, self.acc_bytes, 8, 16)
        if tile is not None:
            return tile
        tile = schedule.forward_groups(layout, self.itemsize, self.acc_bytes, self.device, extra, self.spec.activation)
        if tile is None or self.columns is None or self.limits.engine:
            return tile
        return tile if schedule.holds_columns(layout, self.itemsize, tile) else None

    def resident(self, tile: Tile) -> Plan:
        layout = self.groups.layout
        formed = self.group_form(tile)
        n = layout.extent("m" if tile.along_m else "c")
        if layout.batch == ("m" if tile.along_m else "c") and n >= tile.k == tile.columns:
            # As column_form(): no block needs a mask.  Of a batch alone, which moves no running statistics.
            formed = formed._replace(FULL_K=True, CLAMP_K=vector(layout, self.itemsize) if kept_first(layout) else 1)
        launch = Launch(
            normalize, kept_blocks(layout, tile.along_m, tile.columns), alike(*READS, *OUT, *RESULTS),
            (layout.outer, "eps", "momentum"), formed, tile.warps,
        )  # fmt: skip
        return self.plan("resident", (launch,))

    # Ticketed

    def tickets(self) -> Tickets | None:
        # x, or where something is added what goes through L2 meanwhile: x, pre and their sum.
        streams = 3 if self.summed else 1
        # Parameters that run across the vectors of x are spread anew, and held in full.
        across = self.base.layout.letters[-1:] == "a" and self.base.layout.extent("s") > 1
        # Columns side by side need more registers a lane, and more lanes that merge them.
        beside = sideways(self.base.layout)
        return ticketed(
            self.tiled.layout, self.itemsize, self.acc_bytes, streams, self.limits.ticket_tile // (2 if across else 1),
            self.limits.ticket_warp // (2 if beside else 1), self.limits, self.device, self.plane_tile,
        )  # fmt: skip

    def ticketed(self, tickets: Tickets) -> Plan:
        layout = self.tiled.layout
        formed = self.form(self.tiled)._replace(CLAMP_A=self.plane_tile is not None, BLOCK_P=tickets.merge_p)
        launch = Launch(
            stream, tickets.programs, alike(*READS, *OUT, *RESULTS, *self.parts, "tickets"),
            (layout.outer, tickets.lead, "eps", "momentum"), cut(formed, tickets.tile, layout), tickets.tile.warps,
        )  # fmt: skip
        return self.plan("ticketed", (launch,), tickets.tiles, tickets.words)

    # Split

    def split(self) -> Plan:
        if self.columns is not None:
            return self.split_columns(self.columns)
        # Statistics do not see the affine axes: fewer, longer runs. Only a short innermost one stays apart, so that
        # a tile covers neighbouring groups along a line of memory.
        grouped = self.shapes.view(self.spec.shape, self.spec.reduced, ())
        runs = grouped.layout.runs
        if len(runs) > 2 and runs[-1].reduced and not runs[-2].reduced:
            grouped = self.shapes.of(replace(grouped.layout, runs=(*runs[:-1], runs[-1]._replace(affine=True))))
        layout = grouped.layout
        tile = schedule.stream(layout, self.itemsize, self.acc_bytes, self.limits.tile, 1024)
        formed = cut(self.reading(grouped), tile, layout)
        block_k, _, block_p = schedule.finish_group_tile(kept_first(layout))
        finished = formed._replace(FOLD=fold(layout, block_k, block_k), BLOCK_P=block_p)
        formed = formed._replace(KEPT_FIRST=kept_first(layout))
        return self.visits(layout, tile, self.steps(layout, tile), formed, finished, 4)

    def split_columns(self, columns: View) -> Plan:
        """A program walks along columns; those of a group meet in the finish."""
        layout = columns.layout
        tile = schedule.column_tile(layout, self.itemsize, self.device)
        steps = walks.steps(layout, tile, self.device, self.limits.column_programs)
        chunks = cdiv(layout.extent("s"), tile.length * steps)
        block_k, _, block_p = schedule.column_finish_tile(chunks * layout.fold, 1)
        read = self.reading(columns)
        formed = self.column_form(read, tile, layout)._replace(FOLD=(1, tile.k, tile.k, 1))
        finished = cut(
            read, tile, layout, FOLD=fold(layout, block_k * layout.fold, block_k), BLOCK_P=block_p, APART=layout.fold
        )
        return self.visits(layout, tile, steps, formed, finished, schedule.warps(block_k * block_p, 512))

    def reading(self, view: View) -> Form:
        """The form of launches that read x and make no y of it."""
        inputs = {name: view.operands[name] for name in ("X", "PRE", "SUM")}
        return self.form(View(view.layout, inputs))._replace(ACT="identity")

    def visits(self, layout: Layout, tile: Tile, steps: int, formed: Form, finished: Form, warps: int) -> Plan:
        """Statistics of chunks of `steps` tiles, their merge by so many `warps`, the apply."""
        chunks = cdiv(layout.extent("s"), tile.length * steps) * cdiv(layout.extent("a"), tile.width)
        scalars = (layout.outer, steps, "eps", "momentum")
        statistics = Launch(
            stream, kept_blocks(layout, tile.along_m, tile.columns) * chunks, alike(*READS, *self.parts), scalars,
            formed._replace(PHASE=STATISTICS), tile.warps,
        )  # fmt: skip
        finishing = Launch(
            finish, kept_blocks(layout, tile.along_m, finished.FOLD[1]), alike(*READS, *self.parts, *RESULTS), scalars,
            finished, warps,
        )  # fmt: skip
        return self.plan("split", (statistics, finishing, self.apply()), chunks * finished.APART)

    def apply(self) -> Launch:
        view, tile, formed = self.streaming(self.limits.tile, 1024)
        layout = view.layout
        tiles = kept_blocks(layout, tile.along_m, tile.columns) * cdiv(layout.extent("a"), tile.width)
        source = "sum" if self.summed else "x"
        formed = formed._replace(PHASE=APPLY, FROM_VAR=self.given == "var", X=view.operands[source.upper()])
        return Launch(
            stream, tiles * cdiv(layout.extent("s"), tile.length),
            named(x=source, mean="mean", rstd="var" if self.given == "var" else "rstd") | alike(*OUT),
            (layout.outer, 1, "eps", "momentum"), formed, tile.warps,
        )  # fmt: skip
