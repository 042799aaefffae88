"""The launches of a forward call: resident, ticketed, split, apply alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from . import schedule
from .kernels.bundles import ABSENT, APPLY, STATISTICS, Form
from .kernels.finish import finish
from .kernels.resident import normalize
from .kernels.stream import stream
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

READS = ("x", "pre", "sum")
RESULTS = ("mean", "rstd", "running_mean", "running_var")
OUT = ("w", "b", "post", "y")


def plan_forward(
    spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: str, limits: Limits, device: Device
) -> Plan:
    """Launches of a forward call; `given` is "" (statistics of x), "var" or "rstd" (statistics given)."""
    planner = _Forward(spec, shapes, itemsize, acc, given, limits, device)
    return planner.plan("apply", (planner.apply(),)) if given else ladder(planner)


class _Forward:
    """What the launches of one call have in common."""

    def __init__(
        self, spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: str, limits: Limits, device: Device
    ) -> None:
        self.spec, self.shapes, self.itemsize, self.given = spec, shapes, itemsize, given
        self.acc, self.acc_bytes = acc, acc.itemsize
        self.limits, self.device = limits, device
        self.base, base = shapes.layout(spec, spec.affine)
        self.layout, self.operands = shapes.columns(self.base, itemsize) or (self.base, base)
        self.form = form(self.layout, self.operands, spec, acc, device)
        self.by_column = shapes.by_column(self.base, base, itemsize)
        found = shapes.planes(self.layout, itemsize, self.acc_bytes)
        self.planes: Tile | None
        self.planes, self.tiled, tiled = found or (None, self.layout, self.operands)
        self.tiled_form = form(self.tiled, tiled, spec, acc, device)._replace(CLAMP_A=self.planes is not None)
        self.summed = self.operands["SUM"] is not ABSENT
        self.parts = ("part_mean", "part_m2") if spec.center else ("part_m2",)

    def plan(self, engine: str, launches: tuple[Launch, ...], rows: int = 0, words: int = 0) -> Plan:
        """`rows`: of partial results."""
        saved = () if self.given else self.spec.statistics
        scratch = tuple((name, rows * self.layout.groups) for name in self.parts if rows)
        return Plan(self.base, self.layout, engine, launches, saved, scratch, words)

    # Resident

    def resident_tile(self) -> Tile | None:
        limits = self.limits
        extra = self.operands["POST"] is not ABSENT
        n = self.layout.group
        # Pieces leave no lane idle; where a power of two is less than an eighth too long, one block loads sooner.
        if schedule.in_rows(self.layout) and 8 * schedule.next_power_of_2(n) > 9 * n:
            tile = schedule.rows(self.layout, self.itemsize, self.acc_bytes, 32 if extra else 64, 16)
            if tile is not None:
                return tile
        # x as it came takes a register an element in fp32, half of one in bf16.
        limit = limits.forward // 2 if self.itemsize == 4 else limits.forward
        if schedule.sideways(self.layout):
            limit = limits.forward_sideways
        return schedule.whole_groups(
            self.layout, self.itemsize, self.acc_bytes, limit, limits.tile, 1024, extra, 16
        )

    def resident(self, tile: Tile) -> Plan:
        launch = Launch(
            normalize, kept_blocks(self.layout, tile.along_m, tile.columns), alike(*READS, *OUT, *RESULTS),
            (self.layout.outer, "eps", "momentum"), cut(self.form, tile, self.layout), tile.warps,
        )  # fmt: skip
        return self.plan("resident", (launch,))

    # Ticketed

    def tickets(self) -> Tickets | None:
        # x, or where something is added what goes through L2 meanwhile: x, pre and their sum.
        streams = 3 if self.summed else 1
        # Parameters that run across the vectors of x are spread anew, and held in full; so are sums of a fold.
        across = self.layout.letters[-1:] == "a" and self.layout.extent("s") > 1
        fewer = 2 if across or self.layout.fold > 1 else 1
        # Columns side by side need more registers a lane, and more lanes that merge them.
        sideways = schedule.sideways(self.layout)
        return ticketed(
            self.tiled, self.itemsize, self.acc_bytes, streams, self.limits.ticket_tile // fewer,
            self.limits.ticket_warp // (2 if sideways else 1), self.limits.rows, self.limits, self.device,
            self.planes,
        )  # fmt: skip

    def ticketed(self, tickets: Tickets) -> Plan:
        launch = Launch(
            stream, tickets.programs, alike(*READS, *OUT, *RESULTS, *self.parts, "tickets"),
            (self.layout.outer, tickets.lead, "eps", "momentum"),
            cut(self.tiled_form, tickets.tile, self.tiled, BLOCK_P=tickets.merge_p, FAN=tickets.fan),
            tickets.tile.warps,
        )  # fmt: skip
        return self.plan("ticketed", (launch,), tickets.rows(tickets.tiles), tickets.words)

    # Split

    def split(self) -> Plan:
        if self.by_column is not None:
            return self.split_columns(*self.by_column)
        # Statistics do not see the affine axes: fewer, longer runs. Only a short innermost one stays apart, so that
        # a tile covers neighbouring groups along a line of memory.
        grouped, inputs = self.shapes.layout(self.spec, ())
        runs = grouped.runs
        if len(runs) > 2 and runs[-1].reduced and not runs[-2].reduced:
            grouped = replace(grouped, runs=(*runs[:-1], runs[-1]._replace(affine=True)))
            names = [name for name, strides in self.shapes.operands if strides is not None]
            inputs = {**inputs, **{name: grouped.operand(i + 1) for i, name in enumerate(names)}}
        tile = schedule.stream(grouped, self.itemsize, self.acc_bytes, self.limits.tile, 1024)
        steps = schedule.steps(grouped, tile)
        formed = cut(self.reading(grouped, inputs), tile, grouped)
        block_k, _, block_p = schedule.finish_group_tile(kept_first(grouped))
        finished = formed._replace(FOLD=fold(grouped, block_k, block_k), BLOCK_P=block_p)
        formed = formed._replace(KEPT_FIRST=kept_first(grouped))
        return self.visits(grouped, tile, steps, formed, finished)

    def split_columns(self, layout: Layout, operands: dict[str, Any]) -> Plan:
        tile = schedule.column_tile(layout, self.itemsize, self.limits.column_tile)
        programs = self.limits.column_programs
        steps = schedule.column_steps(layout, tile, self.device, programs)
        # A program walks along columns; those of a group meet in the finish.
        read = self.reading(layout, operands)
        formed = cut_columns(read, tile, layout, self.itemsize, FOLD=(1, tile.k, tile.k, 1))
        block_k, _, block_p = schedule.column_finish_tile(layout, tile, self.device, programs, 1, layout.fold)
        finished = cut(
            read, tile, layout, FOLD=fold(layout, block_k * layout.fold, block_k), BLOCK_P=block_p, APART=layout.fold
        )
        return self.visits(layout, tile, steps, formed, finished)

    def reading(self, layout: Layout, operands: dict[str, Any]) -> Form:
        """The form of launches that read x and make no y of it."""
        inputs = {name: operands[name] for name in ("X", "PRE", "SUM")}
        return form(layout, inputs, self.spec, self.acc, self.device)._replace(ACT="identity")

    def visits(self, layout: Layout, tile: Tile, steps: int, formed: Form, finished: Form) -> Plan:
        """Statistics of chunks of `steps` tiles, their merge, the apply."""
        chunks = cdiv(layout.extent("s"), tile.length * steps) * cdiv(layout.extent("a"), tile.width)
        statistics = Launch(
            stream, kept_blocks(layout, tile.along_m, tile.columns) * chunks, alike(*READS, *self.parts),
            (layout.outer, steps, "eps", "momentum"), formed._replace(PHASE=STATISTICS), tile.warps,
        )  # fmt: skip
        finishing = Launch(
            finish, kept_blocks(layout, tile.along_m, finished.FOLD[1]), alike(*READS, *self.parts, *RESULTS),
            (layout.outer, steps, "eps", "momentum"), finished, 16,
        )  # fmt: skip
        return self.plan("split", (statistics, finishing, self.apply()), chunks * finished.APART)

    def apply(self) -> Launch:
        if self.by_column is None:
            layout, operands = self.layout, self.operands
            tile = schedule.stream(layout, self.itemsize, self.acc_bytes, self.limits.tile, 1024)
            formed = cut(self.form, tile, layout, KEPT_FIRST=kept_first(layout))
        else:
            layout, operands = self.by_column
            tile = schedule.column_tile(layout, self.itemsize, self.limits.column_tile)
            formed = cut_columns(
                form(layout, operands, self.spec, self.acc, self.device), tile, layout, self.itemsize
            )
        tiles = kept_blocks(layout, tile.along_m, tile.columns) * cdiv(layout.extent("a"), tile.width)
        source = "sum" if self.summed else "x"
        formed = formed._replace(PHASE=APPLY, FROM_VAR=self.given == "var", X=operands[source.upper()])
        return Launch(
            stream, tiles * cdiv(layout.extent("s"), tile.length),
            named(x=source, mean="mean", rstd="var" if self.given == "var" else "rstd") | alike(*OUT),
            (layout.outer, 1, "eps", "momentum"), formed, tile.warps,
        )  # fmt: skip
