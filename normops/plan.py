"""What a plan is: the launches of one direction of a call, and the workspace they share.  Made by plan_forward and
plan_backward, pure functions of shapes, strides, dtypes and facts about the device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton.language as tl

from . import schedule, walks
from .gpus import Device
from .kernels.bundles import Form
from .layout import Layout
from .norm import Norm
from .schedule import Limits
from .ticketing import Tickets
from .tile import Tile, vector
from .views import Shapes, View


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


def cut(form: Form, tile: Tile, layout: Layout, **more: Any) -> Form:
    """The form of a launch whose programs take such tiles of the layout."""
    wide = layout.reach() + tile.elements >= 2**31 or layout.numel + tile.elements >= 2**31
    kept, batch = ("m" if tile.along_m else "c"), 0 in layout.sizes("m" if tile.along_m else "c")
    return form._replace(**{
        "ALONG_M": tile.along_m, "BLOCK_K": tile.k, "BLOCK_A": tile.a, "BLOCK_S": tile.s,
        "FOLD": fold(layout, tile.columns, tile.groups), "WIDE": wide,
        "PIECES": tile.pieces, "PIECES_A": tile.along_a, "WIDTH_A": tile.width, "WIDTH_S": tile.length,
        # Not of the batch: another one compiles nothing.  A single group is there.
        "FULL_K": tile.k == 1 or (not batch and tile.columns == tile.k and layout.extent(kept) % tile.k == 0),
        "FULL_A": full(layout, tile, "a"), "FULL_S": full(layout, tile, "s"),
        "SHARED_A": not form.W[2],
        **more,
    })  # fmt: skip


def full(layout: Layout, tile: Tile, letter: str) -> int:
    """Tile.full() along a or s; where the batch lies along it, whatever the batch."""
    if 0 not in layout.sizes(letter):
        return tile.full(letter, layout.extent(letter))
    whole = tile.width if letter == "a" else tile.length
    return tile.pieces if prod(n or 1 for n in layout.sizes(letter)) % whole == 0 else 0


def fold(layout: Layout, columns: int, groups: int) -> tuple[int, int, int, int]:
    """FOLD as kernels take it, for blocks of so many columns in so many lanes of groups."""
    return layout.fold, columns, groups, layout.fold if layout.shared else 1


def kept_blocks(layout: Layout, along_m: bool, columns: int) -> int:
    inside, outside = ("m", "c") if along_m else ("c", "m")
    return cdiv(layout.extent(inside), columns) * layout.extent(outside)


def kept_first(layout: Layout) -> bool:
    return bool(layout.runs) and not layout.runs[-1].reduced


class Planner:
    """What both directions know of a call, and the order in which they try engines."""

    streams: int
    """Operands of the size of x that are read."""
    cached: float
    """Bytes of x, as a share of L2, up to which a launch for each visit is predicted faster than one for both."""

    def __init__(
        self, spec: Norm, shapes: Shapes, itemsize: int, acc: torch.dtype, limits: Limits, device: Device
    ) -> None:
        self.spec, self.shapes, self.itemsize, self.acc, self.acc_bytes = spec, shapes, itemsize, acc, acc.itemsize
        self.limits, self.device = limits, device
        self.base = shapes.view(spec.shape, spec.reduced, spec.affine)
        self.groups = shapes.of_groups(self.base, itemsize)
        self.columns = shapes.of_columns(self.base, itemsize)
        self.plane_tile: Tile | None
        self.plane_tile, self.tiled = (
            shapes.planes(self.base, itemsize, self.acc_bytes, self.streams) or (None, self.base)
        )

    @property
    def streamed(self) -> Layout:
        return (self.columns or self.groups).layout

    @property
    def images(self) -> bool:
        """Not rows, whose bits no batch may decide."""
        layout = self.base.layout
        return bool(layout.runs_of("c")) or layout.batch in ("a", "s")

    @property
    def small(self) -> bool:
        """Whether they are images of which L2 holds much when another launch reads them again."""
        return self.images and self.base.layout.numel * self.itemsize <= self.cached * self.device.l2_bytes

    def steps(self, layout: Layout, tile: Tile) -> int:
        """Tiles along s that a program of a statistics kernel walks."""
        least = walks.least_steps(layout, tile)
        programs = self.limits.stream_warps // tile.warps
        return max(least, walks.steps(layout, tile, self.device, programs)) if self.images else least

    def form(self, view: View) -> Form:
        """What is known of every launch over a view, whatever its tile."""
        return Form(
            SPACE=view.layout.space, ACC=tl.float64 if self.acc is torch.float64 else tl.float32,
            STAT=view.layout.statistics(), CENTER=self.spec.center, ROUND=self.spec.round_first,
            ACT=self.spec.activation, PTX=self.device.ptx,
            ACCESS=vector(view.layout, self.itemsize), **view.operands,
        )  # fmt: skip

    def group_form(self, tile: Tile, **more: Any) -> Form:
        """Of launches whose programs have whole groups, or whole rows of pieces of them."""
        layout = self.groups.layout
        return cut(self.form(self.groups), tile, layout, KEPT_FIRST=tile.along_a and kept_first(layout), **more)

    def column_form(self, form: Form, tile: Tile, layout: Layout) -> Form:
        """Of launches that walk along columns; the last block of them overlaps the one before it, where they do not
        divide."""
        n = layout.runs[-1].size
        whole = 0 not in layout.sizes("m" if tile.along_m else "c") and n >= tile.k
        clamp = vector(layout, self.itemsize) if whole and n % tile.k else 0
        # Whether tiles are whole is asked of the batch, too: masks cost more than a second compilation.
        full_s = tile.full("s", layout.extent("s"))
        return cut(form, tile, layout, KEPT_FIRST=True, FULL_K=whole, CLAMP_K=clamp, FULL_S=full_s)

    def streaming(self, elements: int, per_warp: int) -> tuple[View, Tile, Form]:
        """What a launch for each visit walks through, its tile (columns have one of their own size), its form."""
        view = self.columns or self.base
        if self.columns is not None:
            tile = schedule.column_tile(view.layout, self.itemsize, self.device)
            return view, tile, self.column_form(self.form(view), tile, view.layout)
        tile = schedule.stream(view.layout, self.itemsize, self.acc_bytes, elements, per_warp)
        return view, tile, cut(self.form(view), tile, view.layout, KEPT_FIRST=kept_first(view.layout))

    def choose(self) -> Plan:
        """One launch that holds whole groups, else one that visits each tile twice, else a launch for each visit.

        Columns are visited in launches of their own: in one, a tile would have to form groups of them.  So are small
        calls: what statistics have read is in L2 all the same, and nobody waits for a unit.
        """
        engine = self.limits.engine
        tile = self.resident_tile() if engine in ("", "resident") else None
        if tile is not None:
            return self.resident(tile)
        ticketed = self.columns is None and (engine == "ticketed" or (not engine and not self.small))
        tickets = self.tickets() if ticketed else None
        return self.split() if tickets is None else self.ticketed(tickets)

    def resident_tile(self) -> Tile | None:
        raise NotImplementedError

    def resident(self, tile: Tile) -> Plan:
        raise NotImplementedError

    def tickets(self) -> Tickets | None:
        raise NotImplementedError

    def ticketed(self, tickets: Tickets) -> Plan:
        raise NotImplementedError

    def split(self) -> Plan:
        raise NotImplementedError
