"""How far a program walks: along s for statistics, along m for dw and db."""

from __future__ import annotations

from .gpus import Device
from .layout import Layout
from .schedule import limits
from .tile import Tile, across, in_rows


def steps(layout: Layout, tile: Tile, device: Device, programs: int) -> int:
    """Tiles that a program of a statistics kernel walks along s: so many programs for each SM, if there are as many
    tiles; with all that they have on their way memory is busy."""
    tiles = -(-layout.extent("s") // tile.length)
    return -(-tiles // max(1, min(tiles, programs * device.num_sms // across(layout, tile))))


def least_steps(layout: Layout, tile: Tile) -> int:
    """As few of these as leave a finish no more than Limits.chunks; a function of the group alone."""
    tiles = -(-layout.extent("s") // tile.length)
    return max(1, -(-tiles * -(-layout.extent("a") // tile.width) // limits().chunks))


def parts(layout: Layout, tile: Tile, device: Device, sums: int) -> tuple[int, int]:
    """(programs that share the walk over m, blocks of m each walks): as many programs as the device runs at once.
    `sums`: how many of dw and db each leaves a part of."""
    blocks_a = -(-layout.extent("a") // tile.width)
    blocks_a *= layout.extent("c") if tile.along_m else -(-layout.extent("c") // tile.columns)
    blocks = -(-layout.extent("m") // tile.columns) if tile.along_m else layout.extent("m")
    warps = limits().warps_per_sm
    if tile.pieces > 1:
        each = tile.elements // (32 * tile.warps)
        kept = (1 + sums) * each  # rows keep w, dw and db of every element of a thread; columns one for each lane
        warps = (8 if kept > 64 else 12 if kept > 40 else 16) if in_rows(layout) else 512 // each
    if tile.single:
        return blocks, 1
    wanted = max(1, device.num_sms * max(1, warps // tile.warps) // blocks_a)
    if layout.extent("s") == 1:
        # Partial dw and db are 8 bytes a column and part: of 8 rows each, they are a fifth of x, dy and dx.  Of few
        # rows they may be more, down to 2 each, rather than that SMs idle.
        m = layout.extent("m")
        wanted = max(1, min(wanted, max(m // 8, min(m // 2, device.num_sms // blocks_a))))
    walked = -(-blocks // min(wanted, blocks))
    return -(-blocks // walked), walked
