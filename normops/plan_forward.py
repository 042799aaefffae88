"""The launches of a forward call: resident, ticketed, split, apply alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from . import schedule
from .kernels import finish as kf
from .kernels import forward as kw
from .kernels import ticketed as kt
from .kernels.activations import ACTIVATIONS
from .layout import Layout
from .plan import ABSENT, Launch, Plan, Shapes, Spec, cdiv, fold, kept_blocks, kept_first, kernel_tile
from .schedule import Device, Limits, Tile
from .ticketing import Tickets, ticketed


def plan_forward(
    spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: str, limits: Limits, device: Device
) -> Plan:
    """Launches of a forward call; `given` is "" (statistics of x), "var" or "rstd" (statistics given)."""
    planner = _Forward(spec, shapes, itemsize, acc, given, limits, device)
    if given:
        return planner.plan("apply", (planner.apply(),))
    tile = planner.resident_tile()
    if tile is not None:
        return planner.plan("resident", (planner.normalize(tile),))
    tickets = planner.tickets()
    if tickets is not None:
        return planner.ticketed(tickets)
    return planner.split()


class _Forward:
    """What the launches of one call have in common."""

    def __init__(
        self, spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: str, limits: Limits, device: Device
    ) -> None:
        self.spec, self.shapes, self.itemsize, self.given = spec, shapes, itemsize, given
        self.acc_bytes = acc.itemsize
        self.limits, self.device = limits, device
        self.base, base = shapes.layout(spec, spec.affine)
        self.layout, self.operands = shapes.columns(self.base, itemsize) or (self.base, base)
        self.summed = self.operands["SUM"] is not ABSENT
        self.common = {"ACC": tl.float64 if self.acc_bytes == 8 else tl.float32}
        self.inputs = {name: self.operands[name] for name in ("X", "PRE", "SUM")}
        self.out = {
            "W": self.operands["W"], "POST": self.operands["POST"], "Y": self.operands["Y"],
            "ACT": ACTIVATIONS[spec.activation][0],
        }  # fmt: skip

    def plan(
        self, engine: str, launches: tuple[Launch, ...], scratch: tuple[tuple[str, int], ...] = (), words: int = 0
    ) -> Plan:
        saved = () if self.given else self.spec.statistics
        return Plan(self.base, self.layout, engine, launches, saved, scratch, words)

    def partials(self, rows: int) -> tuple[tuple[str, int], ...]:
        names = ("part_mean", "part_m2") if self.spec.center else ("part_m2",)
        return tuple((name, rows * self.layout.groups) for name in names)

    def moments(self, layout: Layout) -> dict[str, Any]:
        return {**self.common, "CENTER": self.spec.center, "SPACE": layout.space, "STAT": layout.statistics()}

    # Resident

    def resident_tile(self) -> Tile | None:
        limits = self.limits
        if limits.engine not in ("", "resident"):
            return None
        extra = self.operands["POST"] is not ABSENT

        def whole(limit: int, warps: int) -> Tile | None:
            return schedule.whole_groups(
                self.layout, self.itemsize, self.acc_bytes, limit, limits.tile, 1024, extra, warps
            )

        # 64 elements a thread, beyond 8192: two programs of 8 warps live on an SM where one of 16 would.
        tile = whole(limits.forward, 8)
        if tile is None and (limits.engine or self.layout.averaged):
            tile = whole(limits.forward_batch, 16)
            blocks = 0 if tile is None else kept_blocks(self.layout, tile.along_m, tile.columns)
            if not limits.engine and not schedule.fills(blocks, self.device):
                return None
        return tile

    def normalize(self, tile: Tile) -> Launch:
        return Launch(
            kw.normalize, kept_blocks(self.layout, tile.along_m, tile.columns),
            ("x", "pre", "sum", "w", "b", "post", "y", "mean", "rstd", "running_mean", "running_var"),
            (self.layout.outer, "eps", "momentum"),
            {**self.moments(self.layout), **self.inputs, **self.out, **kernel_tile(tile, self.layout)}, tile.warps,
        )  # fmt: skip

    # Ticketed

    def tickets(self) -> Tickets | None:
        if self.limits.engine not in ("", "ticketed"):
            return None
        # x, or where something is added what goes through L2 meanwhile: x, pre and their sum.
        streams = 3 if self.summed else 1
        # Parameters that run across the vectors of x are spread anew, and held in full; so are sums of a fold.
        across = self.layout.letters[-1:] == "a" and self.layout.extent("s") > 1
        fewer = 2 if across or self.layout.fold > 1 else 1
        return ticketed(
            self.layout, self.itemsize, self.acc_bytes, streams, self.limits.ticket_tile // fewer, 1024,
            self.limits.rows, self.limits, self.device,
        )  # fmt: skip

    def ticketed(self, tickets: Tickets) -> Plan:
        tile = tickets.tile
        launch = Launch(
            kt.ticketed, 2 * tickets.units * tickets.tiles,
            ("x", "pre", "sum", "w", "b", "post", "y", "mean", "rstd", "running_mean", "running_var",
             "part_mean" if self.spec.center else "", "part_m2", "tickets"),
            (self.layout.outer, tickets.chunks_s, tickets.lead, "eps", "momentum"),
            {**self.moments(self.layout), **self.inputs, **self.out, **kernel_tile(tile, self.layout),
             "BLOCK_P": tickets.merge_p, "FAN": tickets.fan},
            tile.warps,
        )  # fmt: skip
        return self.plan("ticketed", (launch,), self.partials(tickets.rows(tickets.tiles)), tickets.words)

    # Split

    def split(self) -> Plan:
        # Statistics do not see the affine axes: fewer, longer runs. Only a short innermost one stays apart, so that
        # a tile covers neighbouring groups along a line of memory.
        grouped, inputs = self.shapes.layout(self.spec, ())
        runs = grouped.runs
        if self.layout.fold > 1:
            grouped, inputs = self.layout, self.operands
        elif len(runs) > 2 and runs[-1].reduced and not runs[-2].reduced:
            grouped = replace(grouped, runs=(*runs[:-1], runs[-1]._replace(affine=True)))
            names = [name for name, strides in self.shapes.operands if strides is not None]
            inputs = {**inputs, **{name: grouped.operand(i + 1) for i, name in enumerate(names)}}
        tile = schedule.stream(grouped, self.itemsize, self.acc_bytes, self.limits.tile, 1024)
        steps = schedule.steps(grouped, tile)
        chunks_s = cdiv(grouped.extent("s"), tile.s * steps)
        chunks = chunks_s * cdiv(grouped.extent("a"), tile.a)
        constants = {**self.moments(grouped), **kernel_tile(tile, grouped)}
        merging = {name: value for name, value in constants.items() if name != "BLOCK_K"}
        part_mean = "part_mean" if self.spec.center else ""
        statistics = Launch(
            kw.statistics, kept_blocks(grouped, tile.along_m, tile.columns) * chunks,
            ("x", "pre", "sum", part_mean, "part_m2"), (grouped.outer, chunks_s, steps),
            {**constants, "KEPT_FIRST": kept_first(grouped), **{name: inputs[name] for name in self.inputs}},
            tile.warps,
        )  # fmt: skip
        block_k, _, block_p = schedule.finish_group_tile(kept_first(grouped))
        columns = block_k * grouped.fold
        finish = Launch(
            kf.finish_statistics, kept_blocks(grouped, tile.along_m, columns),
            (part_mean, "part_m2", "mean", "rstd", "running_mean", "running_var"),
            (grouped.outer, chunks, chunks_s, steps, "eps", "momentum"),
            {**merging, "FOLD": fold(grouped, columns, block_k), "BLOCK_P": block_p}, 4,
        )  # fmt: skip
        return self.plan("split", (statistics, finish, self.apply()), self.partials(chunks))

    def apply(self) -> Launch:
        layout = self.layout
        tile = schedule.stream(layout, self.itemsize, self.acc_bytes, self.limits.tile, 1024)
        chunks_s = cdiv(layout.extent("s"), tile.s)
        return Launch(
            kw.apply, kept_blocks(layout, tile.along_m, tile.columns) * cdiv(layout.extent("a"), tile.a) * chunks_s,
            ("sum" if self.summed else "x", "w", "b", "post", "y", "mean", "var" if self.given == "var" else "rstd"),
            (layout.outer, chunks_s, "eps"),
            {**self.common, **self.out, **kernel_tile(tile, layout), "SPACE": layout.space,
             "STAT": layout.statistics(), "X": self.operands["SUM" if self.summed else "X"],
             "FROM_VAR": self.given == "var", "KEPT_FIRST": kept_first(layout)},
            tile.warps,
        )  # fmt: skip
