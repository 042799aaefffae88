"""What a plan is: the launches of one direction of a call, and the workspace they share.  Made by plan_forward and
plan_backward, pure functions of shapes, strides, dtypes and facts about the device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
import triton.language as tl

from .kernels.bundles import ABSENT, Form
from .layout import Layout, coalesce, dense_strides
from .schedule import Device, Limits, Tile, column_blocks, plane_tile, vector
from .ticketing import Tickets

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
    """One kernel launch: names of its operands and scalars, looked up in the call; numbers stand for themselves."""

    kernel: Any
    grid: int
    operands: dict[str, str]
    """The kernel's own names of its operands -> names in the call."""
    scalars: tuple[str | int, ...]
    form: Form
    num_warps: int

    @property
    def given(self) -> dict[str, Any]:
        """The kernel's own names of its other arguments -> values (names in the call, of scalars that vary)."""
        return dict(zip(self.kernel.arg_names[1:-1], self.scalars, strict=True)) | self.form._asdict()

    @property
    def tile(self) -> tuple[int, int, int]:
        """Blocks of k, a and s."""
        return self.form.BLOCK_K, self.form.WIDTH_A, self.form.WIDTH_S


def named(**operands: str) -> dict[str, str]:
    """Operands of a launch that another name is given to; those named "" are not there."""
    return {name: given for name, given in operands.items() if given}


def alike(*names: str) -> dict[str, str]:
    """Operands that the kernel and the call give the same name."""
    return {name: name for name in names if name}


@dataclass(frozen=True)
class Plan:
    """The launches of one direction of one call, and the fp32/fp64 memory they share: (name, elements)."""

    layout: Layout
    streamed: Layout
    """The layout that tiles are cut from: `layout`, or the same folded."""
    engine: str
    launches: tuple[Launch, ...]
    saved: tuple[tuple[str, int], ...]
    """Statistics, which outlive the call."""
    scratch: tuple[tuple[str, int], ...]
    """Partial results, which do not."""
    words: int = 0
    """32-bit words that a ticketed launch counts in: 0 before it and after it."""

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


def form(layout: Layout, operands: dict[str, Any], spec: Spec, acc: torch.dtype, device: Device) -> Form:
    """What is known of every launch of a direction, whatever its tile."""
    return Form(
        SPACE=layout.space, ACC=tl.float64 if acc is torch.float64 else tl.float32, STAT=layout.statistics(),
        CENTER=spec.center, ACT=spec.activation, PTX=device.ptx, **operands,
    )  # fmt: skip


def cut(form: Form, tile: Tile, layout: Layout, **more: Any) -> Form:
    """The form of a launch whose programs take such tiles of the layout."""
    wide = layout.reach() + tile.elements >= 2**31 or layout.numel + tile.elements >= 2**31
    kept, batch = ("m" if tile.along_m else "c"), 0 in layout.sizes("m" if tile.along_m else "c")
    return form._replace(**{
        "ALONG_M": tile.along_m, "BLOCK_K": tile.k, "BLOCK_A": tile.a, "BLOCK_S": tile.s,
        "FOLD": fold(layout, tile.columns, tile.groups), "WIDE": wide,
        "PIECES": tile.pieces, "PIECES_A": tile.along_a, "WIDTH_A": tile.width, "WIDTH_S": tile.length,
        # Not of the batch: another one compiles nothing.
        "FULL_K": not batch and tile.columns == tile.k and layout.extent(kept) % tile.k == 0,
        "FULL_A": 0 if 0 in layout.sizes("a") else tile.full("a", layout.extent("a")),
        # Of a batch that is averaged over, too: masks cost more than a second compilation.
        "FULL_S": tile.full("s", layout.extent("s")),
        "SHARED_A": not form.W[2],
        **more,
    })  # fmt: skip


def cut_columns(form: Form, tile: Tile, layout: Layout, itemsize: int, **more: Any) -> Form:
    """cut() for columns that lie side by side; the last block overlaps the one before it, where they do not divide."""
    n = layout.runs[-1].size
    whole = 0 not in layout.sizes("m" if tile.along_m else "c") and n >= tile.k
    clamp = vector(layout, itemsize) if whole and n % tile.k else 0
    return cut(form, tile, layout, **{"KEPT_FIRST": True, "FULL_K": whole, "CLAMP_K": clamp} | more)


def fold(layout: Layout, columns: int, groups: int) -> tuple[int, int, int, int]:
    """FOLD as kernels take it, for blocks of so many columns in so many lanes of groups."""
    return layout.fold, columns, groups, layout.fold if layout.shared else 1


def kept_blocks(layout: Layout, along_m: bool, columns: int) -> int:
    inside, outside = ("m", "c") if along_m else ("c", "m")
    return cdiv(layout.extent(inside), columns) * layout.extent(outside)


def kept_first(layout: Layout) -> bool:
    return bool(layout.runs) and not layout.runs[-1].reduced


class Shapes(NamedTuple):
    """Strides (in the split shape) of every operand that a direction touches; None where it is absent."""

    order: tuple[int, ...]
    operands: tuple[tuple[str, tuple[int, ...] | None], ...]

    def has(self, name: str) -> bool:
        return dict(self.operands)[name] is not None

    def layout(self, spec: Spec, affine: tuple[int, ...]) -> tuple[Layout, dict[str, Any]]:
        """The layout over all operands, and each operand's strides as kernels take them."""
        present = [(name, strides) for name, strides in self.operands if strides is not None]
        layout = coalesce(spec.shape, (self.order, *(strides for _, strides in present)), spec.reduced, affine)
        given = {name: layout.operand(i + 1) for i, (name, _) in enumerate(present)}
        if not layout.kept:
            # A single row, in tiles of several as a batch of them: addresses have the shape of the tile all the same.
            given = {name: steps if name == "W" else ((0,), *steps[1:]) for name, steps in given.items()}
        return layout, {name: given.get(name, ABSENT) for name, _ in self.operands}

    def planes(self, layout: Layout, itemsize: int, acc_bytes: int) -> tuple[Tile, Layout, dict[str, Any]] | None:
        """A tile, the layout, and its operands, with the batch counted as a, where planes of a batch are averaged over:
        the tile is a piece of several planes, at constant distances; see Layout.of_planes()."""
        planes = layout.of_planes()
        tile = None if planes is None else plane_tile(planes, itemsize, acc_bytes)
        if planes is None or tile is None:
            return None
        places = {name: i + 1 for i, name in enumerate(n for n, strides in self.operands if strides is not None)}
        given = {name: planes.operand(i) for name, i in places.items()}
        return tile, planes, {name: given.get(name, ABSENT) for name, _ in self.operands}

    def folded(self, layout: Layout, itemsize: int) -> tuple[Layout, dict[str, Any]] | None:
        """The folded layout and its operands, see Layout.folded; of planes only where it allows wider accesses and they
        cannot be read 8 bytes at a time: else a tile of planes has no idle lanes."""
        places = {name: i + 1 for i, name in enumerate(n for n, strides in self.operands if strides is not None)}
        params = places.get("W")
        found = layout.folded([0, *(i for name, i in places.items() if name != "W")], params)
        if found is None:
            return None
        narrow = vector(layout, itemsize)
        if found.shared and (vector(found, itemsize) <= narrow or narrow * itemsize >= 8):
            return None
        given = {name: found.operand(i) for name, i in places.items()}
        if params is not None and found.shared:
            given["W"] = (*layout.operand(params), found.divisors)
        return found, {name: given.get(name, ABSENT) for name, _ in self.operands}

    def columns(self, layout: Layout, itemsize: int) -> tuple[Layout, dict[str, Any]] | None:
        """The folded layout and its operands, where it allows wider accesses and blocks of whole groups."""
        found = self.folded(layout, itemsize)
        if found is None or vector(found[0], itemsize) <= vector(layout, itemsize):
            return None
        return found if column_blocks(found[0], itemsize) else None

    def by_column(
        self, layout: Layout, operands: dict[str, Any], itemsize: int
    ) -> tuple[Layout, dict[str, Any]] | None:
        """A layout and its operands whose kept points lie side by side in memory, all that is averaged over outside of
        them, so that a program can walk along a block of columns; None where memory does not run so."""
        found = (layout, operands)
        if layout.runs and layout.runs[-1].reduced:
            folded = self.folded(layout, itemsize)
            if folded is None:
                return None
            found = folded
        columns = found[0].runs[-1]
        alone = not columns.reduced and found[0].runs_of(columns.letter) == (columns,)
        # Columns that are a batch themselves are rows that lie across memory: their bits do not depend on others.
        if not alone or found[0].batch == columns.letter or not found[0].extent("a") == 1 < found[0].extent("s"):
            return None
        return found


class Planner(Protocol):
    """What each direction knows to do with its groups."""

    limits: Limits
    by_column: tuple[Layout, dict[str, Any]] | None

    def resident_tile(self) -> Tile | None: ...
    def resident(self, tile: Tile) -> Plan: ...
    def tickets(self) -> Tickets | None: ...
    def ticketed(self, tickets: Tickets) -> Plan: ...
    def split(self) -> Plan: ...


def ladder(planner: Planner) -> Plan:
    """One launch that holds whole groups, else one that visits each tile twice, else a launch for each visit."""
    engine = planner.limits.engine
    tile = planner.resident_tile() if engine in ("", "resident") else None
    if tile is not None:
        return planner.resident(tile)
    tickets = planner.tickets() if engine == "ticketed" or (not engine and planner.by_column is None) else None
    return planner.split() if tickets is None else planner.ticketed(tickets)
