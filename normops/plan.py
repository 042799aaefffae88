"""From shapes to launches: which kernels a call runs, over which grids and tiles, and the workspace they share.

Pure functions of shapes, strides, dtypes and facts about the device: nothing is allocated or launched here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import triton.language as tl

from . import schedule
from .kernels import backward as kb
from .kernels import finish as kf
from .kernels import forward as kw
from .kernels.activations import ACTIVATIONS
from .layout import Layout, coalesce, dense_strides
from .schedule import Device, Limits, Tile

# Strides of an operand that is not there.
ABSENT: tuple[tuple[int, ...], ...] = ((), (), (), ())

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Spec(NamedTuple):
    """What is normalised, free of sizes of memory: the hashable part of a call."""

    factors: tuple[tuple[int, ...], ...]
    """For each axis of x the sizes it splits into."""
    reduced: tuple[int, ...]
    """Axes of the split shape that are averaged over."""
    affine: tuple[int, ...]
    """Axes of the split shape along which weight and bias vary, in the order of the weight's axes."""
    center: bool
    activation: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(n for sizes in self.factors for n in sizes)

    @property
    def statistics(self) -> tuple[tuple[str, int], ...]:
        """(name, elements) of what a forward leaves for the backward, in the memory order of the kept axes of y."""
        groups = prod(n for i, n in enumerate(self.shape) if i not in self.reduced)
        return (("mean", groups), ("rstd", groups)) if self.center else (("rstd", groups),)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: names of its pointers and scalars, looked up in the call; numbers stand for themselves."""

    kernel: Any
    grid: int
    pointers: tuple[str, ...]
    scalars: tuple[str | int, ...]
    constants: dict[str, Any]
    num_warps: int

    @property
    def operands(self) -> dict[str, str]:
        """The kernel's own names of its pointers -> names in the call ("" where absent)."""
        return dict(zip(self.kernel.arg_names, self.pointers, strict=False))

    @property
    def given(self) -> dict[str, Any]:
        """The kernel's own names of its other arguments -> values (names in the call, of scalars that vary)."""
        return dict(zip(self.kernel.arg_names[len(self.pointers) :], self.scalars, strict=False)) | self.constants


@dataclass(frozen=True)
class Plan:
    """The launches of one direction of one call, and the fp32/fp64 memory they share: (name, elements)."""

    layout: Layout
    engine: str
    launches: tuple[Launch, ...]
    saved: tuple[tuple[str, int], ...]
    """Statistics, which outlive the call."""
    scratch: tuple[tuple[str, int], ...]
    """Partial results, which do not."""

    @property
    def workspace(self) -> tuple[tuple[str, int], ...]:
        return self.saved + self.scratch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: fp32, or fp64 for fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def weight_strides(spec: Spec) -> tuple[int, ...]:
    shape = spec.shape
    sizes = tuple(shape[i] for i in spec.affine)
    strides = dict(zip(spec.affine, dense_strides(sizes), strict=True))
    return tuple(strides.get(i, 0) for i in range(len(shape)))


def _kernel_tile(tile: Tile, layout: Layout) -> dict[str, Any]:
    wide = layout.reach() + tile.elements >= 2**31 or layout.numel + tile.elements >= 2**31
    return {"ALONG_M": tile.along_m, "BLOCK_K": tile.k, "BLOCK_A": tile.a, "BLOCK_S": tile.s, "WIDE": wide}


def _kept_blocks(layout: Layout, along_m: bool, block: int) -> int:
    inside, outside = ("m", "c") if along_m else ("c", "m")
    return cdiv(layout.extent(inside), block) * layout.extent(outside)


def _kept_first(layout: Layout) -> bool:
    return bool(layout.runs) and not layout.runs[-1].reduced


class Shapes(NamedTuple):
    """Strides (in the split shape) of every operand that a direction touches; None where it is absent."""

    order: tuple[int, ...]
    operands: tuple[tuple[str, tuple[int, ...] | None], ...]

    def layout(self, spec: Spec, affine: tuple[int, ...]) -> tuple[Layout, dict[str, Any]]:
        """The layout over all operands, and each operand's strides as kernels take them."""
        present = [(name, strides) for name, strides in self.operands if strides is not None]
        layout = coalesce(spec.shape, (self.order, *(strides for _, strides in present)), spec.reduced, affine)
        given = {name: layout.operand(i + 1) for i, (name, _) in enumerate(present)}
        return layout, {name: given.get(name, ABSENT) for name, _ in self.operands}


def plan_forward(
    spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: str, limits: Limits, device: Device
) -> Plan:
    """Launches of a forward call; `given` is "" (statistics of x), "var" or "rstd" (statistics given)."""
    layout, operands = shapes.layout(spec, spec.affine)
    acc_bytes = acc.itemsize
    common = {"ACC": tl.float64 if acc_bytes == 8 else tl.float32}
    act = ACTIVATIONS[spec.activation][0]
    out = {"W": operands["W"], "POST": operands["POST"], "Y": operands["Y"], "ACT": act}
    moments = {"CENTER": spec.center, "STAT": layout.statistics()}

    extra = operands["POST"] is not ABSENT
    tile = None
    if not given:
        tile = schedule.whole_groups(layout, itemsize, acc_bytes, limits.forward, limits.tile, 1024, extra)
    if tile is not None:
        launch = Launch(
            kw.normalize, _kept_blocks(layout, tile.along_m, tile.k),
            ("x", "pre", "sum", "w", "b", "post", "y", "mean", "rstd", "running_mean", "running_var"),
            (layout.outer, "eps", "momentum"),
            {**common, **moments, **out, **_kernel_tile(tile, layout), "SPACE": layout.space,
             **{name: operands[name] for name in ("X", "PRE", "SUM")}},
            tile.warps,
        )  # fmt: skip
        return Plan(layout, "resident", (launch,), spec.statistics, ())

    launches: list[Launch] = []
    workspace: tuple[tuple[str, int], ...] = ()
    if not given:
        # Statistics do not see the affine axes: fewer, longer runs. Only a short innermost one stays apart, so that
        # a tile covers neighbouring groups along a line of memory.
        grouped, inputs = shapes.layout(spec, ())
        runs = grouped.runs
        if len(runs) > 2 and runs[-1].reduced and not runs[-2].reduced:
            grouped = Layout((*runs[:-1], runs[-1]._replace(affine=True)))
            names = [name for name, strides in shapes.operands if strides is not None]
            inputs = {**inputs, **{name: grouped.operand(i + 1) for i, name in enumerate(names)}}
        tile = schedule.stream(grouped, itemsize, acc_bytes, limits.tile, 1024)
        steps = schedule.steps(grouped, tile)
        chunks_s = cdiv(grouped.extent("s"), tile.s * steps)
        chunks = chunks_s * cdiv(grouped.extent("a"), tile.a)
        constants = {**common, "CENTER": spec.center, "SPACE": grouped.space, "STAT": grouped.statistics(),
                     **_kernel_tile(tile, grouped)}  # fmt: skip
        part_mean = "part_mean" if spec.center else ""
        launches.append(Launch(
            kw.statistics, _kept_blocks(grouped, tile.along_m, tile.k) * chunks,
            ("x", "pre", "sum", part_mean, "part_m2"), (grouped.outer, chunks_s, steps),
            {**constants, "KEPT_FIRST": _kept_first(grouped),
             **{name: inputs[name] for name in ("X", "PRE", "SUM")}},
            tile.warps,
        ))  # fmt: skip
        block_k, block_p = schedule.finish_group_tile(_kept_first(grouped))
        launches.append(Launch(
            kf.finish_statistics, _kept_blocks(grouped, tile.along_m, block_k),
            (part_mean, "part_m2", "mean", "rstd", "running_mean", "running_var"),
            (grouped.outer, chunks, chunks_s, steps, "eps", "momentum"),
            {**constants, "BLOCK_K": block_k, "BLOCK_P": block_p}, 4,
        ))  # fmt: skip
        workspace = tuple((name, chunks * layout.groups) for name in (part_mean, "part_m2") if name)
    tile = schedule.stream(layout, itemsize, acc_bytes, limits.tile, 1024)
    chunks_s = cdiv(layout.extent("s"), tile.s)
    summed = operands["SUM"] is not ABSENT
    source = "sum" if summed else "x"
    launches.append(Launch(
        kw.apply, _kept_blocks(layout, tile.along_m, tile.k) * cdiv(layout.extent("a"), tile.a) * chunks_s,
        (source, "w", "b", "post", "y", "mean", "var" if given == "var" else "rstd"), (layout.outer, chunks_s, "eps"),
        {**common, **out, **_kernel_tile(tile, layout), "SPACE": layout.space, "STAT": layout.statistics(),
         "X": operands["SUM" if summed else "X"], "FROM_VAR": given == "var",
         "KEPT_FIRST": _kept_first(layout)},
        tile.warps,
    ))  # fmt: skip
    return Plan(layout, "apply" if given else "split", tuple(launches), () if given else spec.statistics, workspace)


def plan_backward(
    spec: Spec, shapes: Shapes, itemsize: int, acc: torch.dtype, given: bool,
    needs: tuple[bool, bool, bool, bool], limits: Limits, device: Device,
) -> Plan:  # fmt: skip
    """Launches of a backward call; needs = (dx, dw, db, dpost); given: the statistics were constants."""
    layout, operands = shapes.layout(spec, spec.affine)
    dx, dw, db, _ = needs
    acc_bytes = acc.itemsize
    common = {
        "SPACE": layout.space, "ACC": tl.float64 if acc_bytes == 8 else tl.float32, "STAT": layout.statistics(),
    }  # fmt: skip
    grad = ACTIVATIONS[spec.activation][1] if spec.activation != "identity" else None
    streams = {**operands, "ACT_GRAD": grad}
    reads = ("x", "dy", "w", "b", "post", "mean", "rstd")
    writes = ("dsum", "dx", "dpost")
    n_a, n_s, n_m = layout.extent("a"), layout.extent("s"), layout.extent("m")
    columns = layout.extent("c") * n_a
    launches: list[Launch] = []
    workspace: list[tuple[str, int]] = []

    def sum_names(given: bool) -> tuple[str, str]:
        return ("c1" if given else "", "c0" if given and spec.center else "")

    def finish_affine(rows: int) -> None:
        block_j, block_i = schedule.finish_affine_tile(columns)
        launches.append(Launch(
            kf.finish_affine, cdiv(columns, block_i), ("p1", "p0", "dw", "db"), (layout.outer, rows),
            {"SPACE": common["SPACE"], "ACC": common["ACC"], "W": operands["W"],
             "BLOCK_J": block_j, "BLOCK_I": block_i}, 4,
        ))  # fmt: skip

    def walk(tile: Tile, sums: bool) -> None:
        """grad_normalize; a single part writes dw and db at once."""
        count, steps = schedule.parts(layout, tile, device)
        direct = count == 1
        names = ("dw", "db") if direct else ("p1" if dw else "", "p0" if db else "")
        blocks = cdiv(layout.extent("c"), 1 if tile.along_m else tile.k) * cdiv(n_a, tile.a)
        launches.append(Launch(
            kb.grad_normalize, blocks * count, (*reads, *sum_names(sums), *writes, *names),
            (layout.outer, steps),
            {**common, **streams, **_kernel_tile(tile, layout), "CENTER": spec.center, "DIRECT": direct}, tile.warps,
        ))  # fmt: skip
        if not direct and (dw or db):
            workspace.extend((("p1", count * columns if dw else 0), ("p0", count * columns if db else 0)))
            finish_affine(count)

    def statistics(per_a: bool, write: bool) -> int:
        """grad_statistics; returns the number of partials of a group (and of a, where they are kept apart)."""
        # Sums are kept for every element: with an activation's derivative beside them, half as many fit.
        fewer = 1 if grad is None else 2
        tile = schedule.stream(layout, itemsize, acc_bytes, limits.grad_tile // fewer, 512 // fewer)
        steps = schedule.steps(layout, tile)
        chunks_s = cdiv(n_s, tile.s * steps)
        blocks_a = cdiv(n_a, tile.a)
        both = spec.center or (per_a and db)
        launches.append(Launch(
            kb.grad_statistics, _kept_blocks(layout, tile.along_m, tile.k) * blocks_a * chunks_s,
            (*reads, *(writes if write else ("", "", "")), "p1", "p0" if both else ""),
            (layout.outer, chunks_s, steps),
            {**common, **streams, **_kernel_tile(tile, layout), "PER_A": per_a, "KEPT_FIRST": _kept_first(layout)},
            tile.warps,
        ))  # fmt: skip
        partials = chunks_s if per_a else chunks_s * blocks_a
        elements = partials * layout.groups * (n_a if per_a else 1)
        workspace.extend((("p1", elements), ("p0", elements if both else 0)))
        return partials

    def finish_group(partials: int, per_a: bool) -> None:
        block_k, block_p = schedule.finish_group_tile(_kept_first(layout))
        m = schedule.along_m(layout)
        constants = {
            **common, "W": operands["W"], "A": n_a if per_a else 1,
            "ALONG_M": m, "BLOCK_K": block_k, "BLOCK_P": block_p,
            "WIDE": False,
        }  # fmt: skip
        launches.append(Launch(
            kf.finish_group, _kept_blocks(layout, m, block_k),
            ("p1", "p0", "w" if per_a else "", "c1", "c0" if spec.center else ""),
            (layout.outer, partials), constants, 4,
        ))  # fmt: skip
        workspace.extend((("c1", layout.groups), ("c0", layout.groups if spec.center else 0)))

    def apply(sums: bool) -> None:
        tile = schedule.stream(layout, itemsize, acc_bytes, limits.grad_tile, 512)
        chunks_s = cdiv(n_s, tile.s)
        launches.append(Launch(
            kb.grad_apply, _kept_blocks(layout, tile.along_m, tile.k) * cdiv(n_a, tile.a) * chunks_s,
            (*reads, *sum_names(sums), *writes),
            (layout.outer, chunks_s),
            {**common, **streams, **_kernel_tile(tile, layout), "KEPT_FIRST": _kept_first(layout)}, tile.warps,
        ))  # fmt: skip

    # Where s is a single point, the sums over s are as large as x: dw and db are added up along m instead.
    along_rows = n_s == 1 and n_a > 1
    limit = limits.backward_affine if along_rows and (dw or db) else limits.backward
    # With 16 warps ptxas aims at 64 registers a thread, and the derivative of SiLU spills there.
    most = 16 if grad is None else 8
    tile = schedule.whole_groups(layout, itemsize, acc_bytes, limit, limits.grad_tile, 512, grad is not None, most)
    engine = "split"
    if given or not dx:
        if not (dw or db):
            engine = "apply"
            apply(sums=False)
        elif not given and (along_rows or tile is not None):
            engine = "rows"
            walk(tile or schedule.stream(layout, itemsize, acc_bytes, limits.grad_tile, 512), sums=False)
        else:
            engine = "apply"
            finish_affine(statistics(per_a=True, write=True) * n_m)
    elif tile is not None:
        engine = "resident"
        walk(tile, sums=False)
    elif along_rows:
        finish_group(statistics(per_a=False, write=False), per_a=False)
        if dw or db:
            # p1 and p0 are free again once c1 and c0 are formed, but their sizes differ: partials get their own.
            walk(schedule.stream(layout, itemsize, acc_bytes, limits.grad_tile, 512), sums=True)
        else:
            apply(sums=True)
    else:
        partials = statistics(per_a=True, write=False)
        finish_group(partials, per_a=True)
        if dw or db:
            finish_affine(partials * n_m)
        apply(sums=True)
    merged: dict[str, int] = {}
    for name, size in workspace:
        if size:
            merged[name] = max(size, merged.get(name, 0))
    return Plan(layout, engine, tuple(launches), (), tuple(merged.items()))


