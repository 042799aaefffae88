"""The launches of the engine "cooperative", an experiment: see kernels/cooperative.py.

No call takes it unless it is forced: a default needs measurements in bench/results, and there are none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import schedule
from .kernels import cooperative as kc
from .layout import Layout
from .plan import Launch, cdiv, kept_blocks, kernel_tile
from .schedule import Device, Tile
from .ticketing import FIRST_STATE, long_rows

COOPERATIVE = "launch_cooperative_grid"
"""The compiler's option that makes of a launch one whose programs all run at once, or that fails."""


def budget(layout: Layout) -> tuple[int, int]:
    """(warps that an SM runs at once, registers that a thread may have for that): so many fill the registers of an SM
    of every NVIDIA architecture since Maxwell, and the compiler is told to use no more."""
    # The sums of a fold are spread over its columns, and take as many registers as x for a moment.
    return (8, 255) if layout.fold > 1 else (16, 128)


def options(layout: Layout) -> dict[str, Any]:
    return {COOPERATIVE: True, "maxnreg": budget(layout)[1]}


@dataclass(frozen=True, slots=True)
class Together:
    """A cooperative launch: the tile, how many there are in a unit, and how many teams of so many programs."""

    tile: Tile
    chunks_s: int
    tiles: int
    teams: int
    merge_p: int
    """Partial results that a tile of a merge holds per group."""

    @property
    def rows(self) -> int:
        """Rows of partial results: one for each tile of a unit, and another where merged ones pass through memory."""
        return self.tiles * (2 if self.tile.k > 1 else 1)

    @property
    def programs(self) -> int:
        return self.teams * self.tiles

    @property
    def words(self) -> int:
        """Words that the launch counts in: a line of memory for each team."""
        return self.teams * FIRST_STATE


def at_once(layout: Layout, tile: Tile, device: Device) -> int:
    """Programs that the device surely runs at the same time.  0 where that is not known: AMD's devices, told by
    their lack of an L2 that all share."""
    return device.num_sms * (budget(layout)[0] // tile.warps) if device.l2_bytes else 0


def together(
    layout: Layout, itemsize: int, acc_bytes: int, elements: int, extra: bool, rows: int, device: Device
) -> Together | None:
    """How a cooperative launch walks, or None where not even one unit is held by all programs that run at once.

    `elements`: of a tile of 8 warps; `extra`: more lives beside x at once (another tensor of its size, an activation's
    derivative); `rows`: side by side in a tile of long rows, so that parameters are read for several at once.
    """
    # As do parameters, sums and addresses of several groups or of every element,
    crowded = (2 if extra else 1) * (2 if layout.letters[-1:] != "s" and layout.fold == 1 else 1)
    # and addresses of narrow accesses.
    crowded *= max(1, min(4, 8 // (itemsize * schedule.vector(layout, itemsize))))
    # fp64 takes two registers a value, and its arithmetic as many again.
    crowded *= 1 if acc_bytes == 4 else 2
    elements = max(1, elements // crowded)
    tile = schedule.stream(layout, itemsize, acc_bytes, elements, max(1, elements * 4 // acc_bytes // 8))
    letter = "m" if tile.along_m else "c"
    if long_rows(layout):
        k = rows if 0 in layout.sizes(letter) or not layout.kept else min(
            rows, schedule.next_power_of_2(layout.extent(letter))
        )  # fmt: skip
        a = min(schedule.next_power_of_2(layout.extent("a")), max(1, tile.elements // k))
        tile = replace(tile, k=k, a=a)
    chunks_s = cdiv(layout.extent("s"), tile.s)
    tiles = chunks_s * cdiv(layout.extent("a"), tile.a)
    teams = min(at_once(layout, tile, device) // tiles, kept_blocks(layout, tile.along_m, tile.columns))
    if not teams:
        return None
    return Together(tile, chunks_s, tiles, teams, max(4, min(128, 512 // tile.groups)))


def plan_normalize(
    layout: Layout, found: Together, center: bool, constants: dict[str, Any]
) -> tuple[Launch, tuple[tuple[str, int], ...]]:
    """The launch of a forward and its partial results; `constants`: those of its operands."""
    names = ("part_mean", "part_m2") if center else ("", "part_m2")
    launch = Launch(
        kc.cooperative, found.programs,
        ("x", "pre", "sum", "w", "b", "post", "y", "mean", "rstd", "running_mean", "running_var", *names, "tickets"),
        (layout.outer, found.chunks_s, "eps", "momentum"),
        {**constants, **kernel_tile(found.tile, layout), "BLOCK_P": found.merge_p}, found.tile.warps,
        options(layout),
    )  # fmt: skip
    return launch, tuple((name, found.rows * layout.groups) for name in names if name)


def plan_gradient(
    layout: Layout, found: Together, center: bool, rows: bool, outer: int, columns: int, reads: tuple[str, ...],
    totals: tuple[str, str], constants: dict[str, Any],
) -> tuple[Launch, tuple[tuple[str, int], ...], int]:  # fmt: skip
    """The launch of a backward, its partial results, and how many rows of them `totals` hold: of dw and db, each as
    large as those; "" where they are not asked for.

    `rows`: dw and db are added up along m, for sums over s, of a single point, are as large as x; outer, columns: the
    extents of m and of (c, a).
    """
    partials = found.teams if rows else found.chunks_s * outer
    names = ("q1", "q0" if center else "")
    launch = Launch(
        kc.grad_cooperative, found.programs,
        (*reads, "dsum", "dx", "dpost", *totals, *names, "tickets"), (layout.outer, found.chunks_s),
        {**constants, **kernel_tile(found.tile, layout), "CENTER": center, "ROWS": rows, "BLOCK_P": found.merge_p},
        found.tile.warps, options(layout),
    )  # fmt: skip
    scratch = [(name, partials * columns) for name in totals] + [(name, found.rows * layout.groups) for name in names]
    return launch, tuple(piece for piece in scratch if piece[0]), partials

