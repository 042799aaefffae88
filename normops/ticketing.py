"""How a ticketed launch walks: its tiles, its units, and how far statistics run ahead.  Pure functions of facts; the
numbers stand in schedule.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .gpus import Device
from .layout import Layout
from .schedule import Limits, stream
from .tile import Tile, line_groups, next_power_of_2, vector

FIRST_STATE = 32
"""Where the states of units begin, as in kernels/tickets.py."""


@dataclass(frozen=True, slots=True)
class Tickets:
    """A ticketed launch: the tile, how many there are in a unit and in all, and how many statistics run ahead."""

    tile: Tile
    chunks_s: int
    tiles: int
    units: int
    lead: int
    merge_p: int
    """Partial results that a tile of a merge holds per group."""

    @property
    def programs(self) -> int:
        return self.units * self.tiles + self.lead

    @property
    def words(self) -> int:
        """Words that the launch counts in, see kernels/tickets.py."""
        return FIRST_STATE + self.units


def ticketed(
    layout: Layout, itemsize: int, acc_bytes: int, streams: int, elements: int, per_warp: int, limits: Limits,
    device: Device, planes: Tile | None,
) -> Tickets | None:  # fmt: skip
    """How a ticketed launch walks, or None where no unit fits the window; `streams`: operands of the size of x that it
    reads twice; `planes`: the tile of a layout of planes."""
    window = limits.window or device.window
    if limits.engine == "ticketed":
        window = max(window, 1 << 40)
    if vector(layout, itemsize) == 1 or itemsize >= 4:  # see whole_groups; and tiles are counted in bytes of bf16
        elements, per_warp = elements // 2, per_warp // 2
    streamed = stream(layout, itemsize, acc_bytes, elements, per_warp)
    for tile in _tiles(layout, streamed, itemsize, limits) if planes is None else [planes]:
        # Of a batch a tile counts in full, though it be smaller: a row's tile must not depend on it.
        side = tile.columns if tile.along_m else min(tile.columns, layout.extent("c"))
        unit = side * layout.group * itemsize * streams
        if 4 * unit <= 3 * window:  # statistics must run ahead by more than a unit
            return _tickets(layout, tile, unit, window, limits, device)
    return None


def _tiles(layout: Layout, tile: Tile, itemsize: int, limits: Limits) -> Iterator[Tile]:
    """Tiles for units of less and less memory."""
    yield tile
    if tile.k > 1 and line_groups(layout, itemsize, limits.line_bytes) > 1:
        # Half a line of memory for each group of channels: better than a third pass over x.
        yield replace(tile, k=tile.k // 2, s=min(next_power_of_2(layout.extent("s")), 2 * tile.s))


def _tickets(layout: Layout, tile: Tile, unit: int, window: int, limits: Limits, device: Device) -> Tickets:
    chunks_s = -(-layout.extent("s") // tile.length)
    blocks_a = -(-layout.extent("a") // tile.width)
    tiles = chunks_s * blocks_a
    inside, outside = ("m", "c") if tile.along_m else ("c", "m")
    units = -(-layout.extent(inside) // tile.columns) * layout.extent(outside)
    # Beside the tile that is applied a program reads the next one: one more goes by than statistics run ahead.
    lead = max(tiles, min(tiles + limits.ahead * device.num_sms, window * tiles // unit - 1))
    return Tickets(tile, chunks_s, tiles, units, min(lead, units * tiles), max(8, min(512, 1024 // tile.k)))
