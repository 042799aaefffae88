"""From tensors to launches: plans a call once for its shapes, allocates its workspace, launches its kernels.

The only file that allocates workspace and launches; thresholds live in ``schedule``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import schedule
from .kernels import backward as kb
from .kernels import finish as kf
from .kernels import forward as kw
from .kernels.activations import ACTIVATIONS
from .layout import Layout, coalesce, dense_strides, follows, split
from .schedule import Device, Limits, Tile

INTERPRETED = not isinstance(kw.normalize, triton.JITFunction)

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


@dataclass(frozen=True)
class Launch:
    """One kernel launch: names of its pointers and scalars, looked up in the call; numbers stand for themselves."""

    kernel: Any
    grid: int
    pointers: tuple[str, ...]
    scalars: tuple[str | int, ...]
    constants: dict[str, Any]
    num_warps: int


@dataclass(frozen=True)
class Plan:
    """The launches of one direction of one call, and the fp32/fp64 workspace they need: name -> elements."""

    layout: Layout
    engine: str
    launches: tuple[Launch, ...]
    workspace: tuple[tuple[str, int], ...]

    def run(self, operands: dict[str, Any], acc: torch.dtype, device: torch.device) -> None:
        """Allocate the workspace in one piece and launch everything."""
        if self.workspace:
            pieces = torch.empty(sum(n for _, n in self.workspace), dtype=acc, device=device)
            for (name, _), piece in zip(self.workspace, pieces.split([n for _, n in self.workspace]), strict=True):
                operands[name] = piece
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(operands)
        else:
            self._launch(operands)

    def _launch(self, operands: dict[str, Any]) -> None:
        for launch in self.launches:
            launch.kernel[(launch.grid,)](
                *(operands.get(name) for name in launch.pointers),
                *(operands[v] if isinstance(v, str) else v for v in launch.scalars),
                **launch.constants,
                num_warps=launch.num_warps,
            )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: fp32, or fp64 for fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device(properties.name, properties.multi_processor_count, (properties.major, properties.minor))
    return schedule.H200


def _weight_strides(spec: Spec) -> tuple[int, ...]:
    shape = spec.shape
    sizes = tuple(shape[i] for i in spec.affine)
    strides = dict(zip(spec.affine, dense_strides(sizes), strict=True))
    return tuple(strides.get(i, 0) for i in range(len(shape)))


def _aligned(t: Tensor | None, like: Tensor) -> Tensor | None:
    """t itself, or a copy in like's memory format where t walks memory in another order (or overlaps itself)."""
    if t is None or t.stride() == like.stride() or follows(t.stride(), like.stride(), like.shape):
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def _strides(t: Tensor | None, spec: Spec) -> tuple[int, ...] | None:
    return None if t is None else split(t.stride(), spec.factors)


def _kernel_tile(tile: Tile, layout: Layout) -> dict[str, Any]:
    wide = layout.reach() + tile.elements >= 2**31 or layout.numel + tile.elements >= 2**31
    return {"ALONG_M": tile.along_m, "BLOCK_K": tile.k, "BLOCK_A": tile.a, "BLOCK_S": tile.s, "WIDE": wide}


def _kept_blocks(layout: Layout, along_m: bool, block: int) -> int:
    inside, outside = ("m", "c") if along_m else ("c", "m")
    return cdiv(layout.extent(inside), block) * layout.extent(outside)


def _kept_first(layout: Layout) -> bool:
    return bool(layout.runs) and not layout.runs[-1].reduced


class _Shapes(NamedTuple):
    """Strides (in the split shape) of every operand that a direction touches; None where it is absent."""

    order: tuple[int, ...]
    operands: tuple[tuple[str, tuple[int, ...] | None], ...]

    def layout(self, spec: Spec, affine: tuple[int, ...]) -> tuple[Layout, dict[str, Any]]:
        """The layout over all operands, and each operand's strides as kernels take them."""
        present = [(name, strides) for name, strides in self.operands if strides is not None]
        layout = coalesce(spec.shape, (self.order, *(strides for _, strides in present)), spec.reduced, affine)
        given = {name: layout.operand(i + 1) for i, (name, _) in enumerate(present)}
        return layout, {name: given.get(name, ABSENT) for name, _ in self.operands}


@lru_cache(maxsize=4096)
def plan_forward(
    spec: Spec, shapes: _Shapes, itemsize: int, acc: torch.dtype, given: str, limits: Limits, device: Device
) -> Plan:
    """Launches of a forward call; `given` is "" (statistics of x), "var" or "rstd" (statistics given)."""
    layout, operands = shapes.layout(spec, spec.affine)
    acc_bytes = acc.itemsize
    common = {"ACC": tl.float64 if acc_bytes == 8 else tl.float32}
    act = ACTIVATIONS[spec.activation][0]
    stats = (("mean", layout.groups), ("rstd", layout.groups)) if spec.center else (("rstd", layout.groups),)
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
        return Plan(layout, "resident", (launch,), stats)

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
        launches.append(Launch(
            kw.statistics, _kept_blocks(grouped, tile.along_m, tile.k) * chunks,
            ("x", "pre", "sum", "part_mean", "part_m2"), (grouped.outer, chunks_s, steps),
            {**constants, "KEPT_FIRST": _kept_first(grouped),
             **{name: inputs[name] for name in ("X", "PRE", "SUM")}},
            tile.warps,
        ))  # fmt: skip
        block_k, block_p = schedule.finish_group_tile(_kept_first(grouped))
        launches.append(Launch(
            kf.finish_statistics, _kept_blocks(grouped, tile.along_m, block_k),
            ("part_mean", "part_m2", "mean", "rstd", "running_mean", "running_var"),
            (grouped.outer, chunks, chunks_s, steps, "eps", "momentum"),
            {**constants, "BLOCK_K": block_k, "BLOCK_P": block_p}, 4,
        ))  # fmt: skip
        workspace = (("part_mean", chunks * layout.groups if spec.center else 0), ("part_m2", chunks * layout.groups))
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
    return Plan(layout, "apply" if given else "split", tuple(launches), workspace if given else (*stats, *workspace))


@lru_cache(maxsize=4096)
def plan_backward(
    spec: Spec, shapes: _Shapes, itemsize: int, acc: torch.dtype, given: bool,
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
        tile = schedule.stream(layout, itemsize, acc_bytes, limits.grad_tile, 512)
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
    tile = schedule.whole_groups(layout, itemsize, acc_bytes, limit, limits.grad_tile, 512, extra=grad is not None)
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
        merged[name] = max(size, merged.get(name, 0))
    return Plan(layout, engine, tuple(launches), tuple(merged.items()))


def forward(
    spec: Spec, x: Tensor, w: Tensor | None, b: Tensor | None, pre: Tensor | None, post: Tensor | None, *,
    eps: float, mean: Tensor | None = None, var: Tensor | None = None, rstd: Tensor | None = None,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """-> y, s = x + pre (or x), mean, rstd; the statistics flat, in the order of the kept axes in memory.

    Given `mean` and `var` (or `rstd`) stand in for the statistics of x and are returned as they are.
    """
    y = torch.empty_like(x)
    total = torch.empty_like(x, dtype=torch.result_type(x, pre)) if pre is not None else None
    given = "var" if var is not None else "rstd" if rstd is not None else ""
    if given and pre is not None:
        total, pre = torch.add(x, pre, out=total), None
        x = total
    source, pre, post = _aligned(x, y), _aligned(pre, y), _aligned(post, y)
    shapes = _Shapes(split(y.stride(), spec.factors), (
        ("X", _strides(source, spec)), ("PRE", _strides(pre, spec)),
        ("SUM", _strides(total, spec) if pre is not None else None),
        ("W", _weight_strides(spec) if w is not None or b is not None else None),
        ("POST", _strides(post, spec)), ("Y", _strides(y, spec)),
    ))  # fmt: skip
    acc = accumulator(x.dtype, (total if total is not None else x).dtype)
    plan = plan_forward(
        spec, shapes, x.element_size(), acc, given, schedule.limits(), device_facts(x.device)
    )
    operands: dict[str, Any] = {
        "x": source, "pre": pre, "sum": total if pre is not None else None, "w": w, "b": b, "post": post, "y": y,
        "mean": mean, "var": var, "rstd": rstd, "running_mean": running_mean, "running_var": running_var,
        "eps": float(eps), "momentum": float(momentum),
    }  # fmt: skip
    plan.run(operands, acc, x.device)
    return y, x if total is None else total, operands["mean"], operands["rstd"]


def backward(
    spec: Spec, dy: Tensor, dsum: Tensor | None, x: Tensor, w: Tensor | None, b: Tensor | None, post: Tensor | None,
    mean: Tensor | None, rstd: Tensor, *, given: bool, needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, dw, db, dpost, each None where not needed; x is the normalised input (x + pre where there was one)."""
    order = torch.empty_like(x)
    need_dx, need_dw, need_db, need_dpost = needs
    dx = order if need_dx else None
    dpost = torch.empty_like(x, dtype=post.dtype) if need_dpost and post is not None else None
    dw = torch.empty_like(w, memory_format=torch.contiguous_format) if need_dw and w is not None else None
    db = torch.empty_like(b, memory_format=torch.contiguous_format) if need_db and b is not None else None
    source = _aligned(x, order)
    dy = dy if follows(dy.stride(), order.stride(), x.shape) else torch.empty_like(order, dtype=dy.dtype).copy_(dy)
    dsum, post = _aligned(dsum, order), _aligned(post, order)
    if spec.activation == "identity":
        post = None
    shapes = _Shapes(split(order.stride(), spec.factors), (
        ("X", _strides(source, spec)), ("DY", _strides(dy, spec)),
        ("W", _weight_strides(spec) if w is not None or b is not None else None),
        ("POST", _strides(post, spec)), ("DSUM", _strides(dsum, spec)), ("DX", _strides(dx, spec)),
        ("DPOST", _strides(dpost, spec)),
    ))  # fmt: skip
    acc = rstd.dtype
    exact = (dx is not None, dw is not None, db is not None, dpost is not None)
    plan = plan_backward(
        spec, shapes, x.element_size(), acc, given, exact, schedule.limits(), device_facts(x.device)
    )
    operands: dict[str, Any] = {
        "x": source, "dy": dy, "w": w, "b": b, "post": post, "mean": mean, "rstd": rstd, "dsum": dsum,
        "dx": dx, "dpost": dpost, "dw": dw, "db": db,
    }  # fmt: skip
    plan.run(operands, acc, x.device)
    return dx, dw, db, dpost
