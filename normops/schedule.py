"""Which tile, and how far an engine goes: the only file with tuned numbers, and all of it pure functions of facts.

Nothing here was timed yet: each number stands with the reason it starts from (register counts come from compiling
the kernels for sm_80, sm_90 and sm_100).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import gcd, log2
from typing import Any

from .gpus import Device
from .layout import Layout
from .tile import Tile, across, along_m, kept_bound, line_groups, next_power_of_2, sideways, vector


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: part of the key of every call
class Limits:
    """Sizes of tiles in elements of 4 accumulator bytes (half as many for fp64)."""

    # The engine that every call takes, whatever the sizes below say: one of ENGINES, or "" for the one that suits.
    engine: str = ""
    # 16 warps hold 48k elements of x as they came (96 a thread, in bf16) without spilling, some groups a third more:
    # forward_groups(). Groups side by side take no larger tiles than were measured: they would be few.
    forward: int = 49152
    forward_sideways: int = 16384
    # x, dy and what is made of them live at once; twice as many where that is made twice: backward_groups().
    backward: int = 16384
    # As above, and dw and db of every element too.
    backward_affine: int = 8192
    # 8 KB of bf16 per program: several programs per SM keep enough loads in flight.
    tile: int = 4096
    grad_tile: int = 2048
    # Warps of an SM that walk for statistics: as many as it runs at once, by their registers.
    stream_warps: int = 32
    # Of L2, as many bytes of x as images may have for which a launch for each visit is predicted faster than tickets:
    # they cross at 42 to 51 MB forward on an H100, at 26 MB backward, with an exponential in it at 52 to 67 MB.
    cached: float = 0.85
    grad_cached: float = 0.5
    grad_cached_activated: float = 1.1
    # Partial results per group: more would make the finish a single slow program.
    chunks: int = 256
    # A tile should cover a whole 128-byte line along the innermost axis: narrower reads waste DRAM bursts.
    line_bytes: int = 128
    # 16 KB of bf16 per program of a ticketed launch (x, or x and dy), 4 warps: four programs live on an SM.
    ticket_tile: int = 8192
    grad_ticket_tile: int = 8192
    # Of these, elements of a warp: 64 a thread, which spreads what a program does once.
    ticket_warp: int = 2048
    grad_ticket_warp: int = 2048
    # Bytes that a ticketed launch may read before it comes back to the first of them; 0: Device.window.
    window: int = 0
    # Tiles that statistics run ahead of the apply phase beyond a unit, per SM: of the four or five programs that it
    # holds at once all but one or two, for statistics are done in the first half of a program.
    ahead: int = 3
    # How many warps of a persistent kernel one SM runs at once (at about 100 registers a thread).
    warps_per_sm: int = 16
    # Of columns side by side: 8 loads of 16 bytes a thread of 4 warps, of x and of dy.
    column_tile: int = 8192
    # Programs of an SM that walk along columns: about as many as it runs at once, by their registers.
    column_programs: int = 3
    grad_column_programs: int = 6


CHEAP = ("identity", "relu", "leaky_relu")
"""Activations of an instruction or two."""
HEAVY = ("gelu", "gelu_tanh")
"""Those that take many registers."""
MADE_TWICE = ("identity", "relu", "silu")
"""Those whose derivative may be made twice beside x and dy; others spill."""

ENGINES = ("resident", "ticketed", "split")
_limits = Limits()


def limits() -> Limits:
    return _limits


_POWERS = (
    "tile", "grad_tile", "ticket_tile", "grad_ticket_tile", "ticket_warp", "grad_ticket_warp", "column_tile",
)  # fmt: skip
_LEAST = {"chunks": 1, "ahead": 0, "line_bytes": 1, "warps_per_sm": 1, "stream_warps": 1, "window": 0, "cached": 0,
          "grad_cached": 0, "grad_cached_activated": 0, "column_programs": 1, "grad_column_programs": 1}  # fmt: skip


@contextmanager
def forced(**changes: Any) -> Iterator[None]:
    """Change limits inside a with-block; ``forced(engine="split")`` splits every group.

    Raises ValueError for an engine that is not among ENGINES, a tile that is no power of two, and numbers too small to
    mean anything.
    """
    global _limits
    for name, value in changes.items():
        if name in _POWERS and (value < 1 or value & (value - 1)):
            raise ValueError(f"{name} must be a power of 2, got {value}")
        if name in _LEAST and value < _LEAST[name]:
            raise ValueError(f"{name} must be at least {_LEAST[name]}, got {value}")
    if changes.get("engine", "") not in ("", *ENGINES):
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {changes['engine']!r}")
    before, _limits = _limits, replace(_limits, **changes)
    try:
        yield
    finally:
        _limits = before


def column_blocks(layout: Layout, itemsize: int) -> list[tuple[int, int]]:
    """(lanes, columns used) of blocks of whole groups of a folded layout, the best first.

    Blocks begin where 16 bytes do.  Best: a line of memory or more with at most a tenth of the lanes idle, the fewest
    lanes; then the fewest idle; blocks of at least half a line follow, for groups that would not fit otherwise.
    """
    step = layout.fold * (vector(layout, itemsize) // gcd(vector(layout, itemsize), layout.fold))
    line = limits().line_bytes // itemsize
    found = []
    for lanes in (32, 64, 128, 256, 512, 1024):
        columns = min(lanes // step * step, -(-layout.runs[-1].size // layout.fold) * layout.fold)
        if columns * 2 >= line:
            found.append((lanes, columns))
    best = [b for b in found if b[1] >= line and 10 * b[1] >= 9 * b[0]][:1]
    best = best or sorted(found, key=lambda b: (b[1] < line, -b[1] / b[0], b[0]))[:1]
    return best + [b for b in reversed(found) if b[0] < best[0][0]] if best else []


def warps(elements: int, per_warp: int, most: int = 16) -> int:
    return max(1, min(most, elements // per_warp))


def whole_groups(
    layout: Layout, itemsize: int, acc_bytes: int, limit: int, pack: int, per_warp: int, extra: bool = False,
    most_warps: int = 16,
) -> Tile | None:  # fmt: skip
    """A tile of whole groups, or None if they do not fit.  It does not depend on the batch: neither do a row's bits.

    `extra`: more lives beside x at once (another tensor of its size, an activation's derivative); `most_warps`: of a
    program.
    """
    # fp64 takes two registers a value, and its arithmetic as many again.
    room = 1 if acc_bytes == 4 else 4
    limit, pack = limit // room, pack * 2 // itemsize if acc_bytes == 4 else pack // 2
    if extra:
        limit //= 2
    # Where elements are loaded one by one (a 7 × 7 plane), so are their addresses held.
    if vector(layout, itemsize) == 1:
        limit //= 4
    m = along_m(layout)
    bound = kept_bound(layout, "m" if m else "c")
    a, s = next_power_of_2(layout.extent("a")), next_power_of_2(layout.extent("s"))
    # Parameters run across the vectors of x: they are spread anew, through shared memory, and held in full.
    if a > 1 and layout.runs and not layout.runs[-1].reduced:
        limit //= 2
    if layout.fold > 1:
        # The sums of every column are held, and spread over those of its group.
        for lanes, columns in column_blocks(layout, itemsize):
            if 2 * lanes * s <= limit:
                return Tile(m, lanes, 1, s, warps(lanes * s * room, per_warp, most_warps), columns, layout.fold)
        return None
    k = min(bound, line_groups(layout, itemsize, limits().line_bytes))
    narrow = min(k, max(1, k // 2))
    # Of an outer axis, what lies beyond its end takes no registers.
    held = layout.extent("a") * s if layout.letters[-1:] == "s" else a * s
    while k > narrow and k * held > limit:
        k //= 2
    if k * held > limit:
        return None
    while k < bound and 2 * k * a * s <= pack:
        k *= 2
    return Tile(m, k, a, s, warps(k * a * s * room, per_warp, most_warps))


def whole_planes(layout: Layout, itemsize: int, least: int, most: int) -> Tile | None:
    """A tile of one group that is planes of a power of two: one or more of them are a piece, so that no lane idles and
    little lives beside x.  None for groups of up to `least` elements, which a single block loads sooner, and beyond
    `most`."""
    a, s = layout.extent("a"), layout.extent("s")
    width = max(1, 512 * 16 // itemsize // s)  # 16 bytes a lane of 16 warps
    m = along_m(layout)
    if layout.letters[-1:] != "s" or s & (s - 1) or s > 8192 or a % width or not least < a * s <= most:
        return None
    if 0 in layout.sizes("m" if m else "c"):
        return None  # a mask for groups would be one too many
    return Tile(m, 1, width, s, 16, pieces=a // width, along_a=True)


def forward_groups(
    layout: Layout, itemsize: int, acc_bytes: int, device: Device, extra: bool, activation: str
) -> Tile | None:
    """A tile of whole groups for a forward program, which holds x as it came: a register an element in fp32, half of
    one in bf16.  `extra`: another tensor is added."""
    limit = limits().forward // (2 if itemsize == 4 else 1)
    heavy = activation in HEAVY
    pure = not (extra or heavy or acc_bytes > 4)
    tile = whole_planes(layout, itemsize, limit * 2 // 3, limit * 4 // 3) if pure else None
    if tile is not None:
        return tile
    if sideways(layout):
        limit = limits().forward_sideways
    elif heavy:
        limit //= 3
    elif layout.extent("a") > 1:
        limit = limit * 5 // 6
    elif pure and vector(layout, itemsize) * itemsize == 16 and device.capability == (9, 0):
        limit = limit * 4 // 3  # elsewhere ptxas spills a few bytes
    return whole_groups(layout, itemsize, acc_bytes, limit, limits().tile, 1024, extra, 16)


def holds_columns(layout: Layout, itemsize: int, tile: Tile) -> bool:
    """Whether a forward program should hold this tile of groups that lie side by side in columns: one group, or small
    ones of a small call.  Else three launches are predicted up to twice as fast, whose programs walk along columns and
    leave the groups to the finish."""
    most = 8192 if layout.extent("a") > 1 else 16384
    return tile.k == 1 or (tile.elements <= most and layout.numel * itemsize <= 4 << 20)


def enough(layout: Layout, device: Device) -> bool:
    """Whether a program for each group keeps more than half of the device busy, or has not much to do."""
    return layout.group <= 24576 or 2 * layout.groups > device.num_sms


def backward_groups(
    layout: Layout, itemsize: int, acc_bytes: int, device: Device, activation: str, affine: bool, single: bool
) -> Tile | None:
    """A tile of whole groups for a backward program, which holds x, dy and what is made of them (`affine`: and dw and
    db of every element); or, where these do not fit and `single`, one group with x and dy as they came."""
    activated, pack = activation != "identity", limits().grad_tile
    limit = limits().backward_affine if affine else limits().backward
    if itemsize == 4 and sideways(layout):
        limit //= 2  # x and dy as they came take twice the registers, and addresses of columns theirs
    # With 16 warps ptxas aims at 64 registers a thread, and the derivative of SiLU spills there.
    tile = whole_groups(layout, itemsize, acc_bytes, limit, pack, 512, activated, 8 if activated else 16)
    if tile is None and single and not affine and itemsize == 2 and activation in MADE_TWICE:
        a, s = layout.extent("a"), layout.extent("s")
        # Several planes a piece spill beyond 32k, as do all but for sm_90; and masks along s beside parameters and a
        # derivative.
        most = limit * 5 // 2 if s >= 4096 and device.capability == (9, 0) else 2 * limit
        tile = whole_planes(layout, itemsize, limit * 3 // 2, most)
        if tile is None and not (activated and a > 1 and s & (s - 1)):
            tile = whole_groups(layout, itemsize, acc_bytes, 2 * limit, pack, 512)
        tile = replace(tile, single=True) if tile is not None and tile.k == 1 else None
    return tile


def stream(layout: Layout, itemsize: int, acc_bytes: int, elements: int, per_warp: int) -> Tile:
    """A tile that walks through memory: filled from the innermost axis outwards."""
    elements = elements * 4 // acc_bytes
    m = along_m(layout)
    letter = "m" if m else "c"
    block = {"k": 1, "a": 1, "s": 1}
    room = elements
    first = line_groups(layout, itemsize, limits().line_bytes)
    bound = {"k": kept_bound(layout, letter), **{x: next_power_of_2(layout.extent(x)) for x in "as"}}
    order = list(dict.fromkeys("k" if x == letter else x for x in reversed(layout.letters) if x == letter or x in "as"))
    if not layout.kept:
        order.append("k")  # a single row is a batch of one
    for axis in order:
        want = first if axis == "k" else bound[axis]
        block[axis] = max(1, min(bound[axis], room, want))
        room //= block[axis]
    if room > 1 and "k" in order:
        block["k"] *= min(room, max(1, bound["k"] // block["k"]))
    total = block["k"] * block["a"] * block["s"]
    return Tile(m, block["k"], block["a"], block["s"], warps(total * acc_bytes // 4, per_warp))


def plane_tile(layout: Layout, itemsize: int, acc_bytes: int, streams: int) -> Tile | None:
    """A tile of several planes (they are a, see Layout.of_planes()): pieces of a line of memory or more that a plane
    divides into, as large as 64 elements a thread and 256 bytes of all streams allow; None where it divides into no
    such pieces, or is one itself."""
    n = layout.extent("s")
    most = min(8192, 32768 // (streams * itemsize)) * 4 // acc_bytes
    if n == min(n & -n, 2048):
        return None
    tiles = [
        Tile(False, 1, 1 << (most // (s * pieces)).bit_length() - 1, s, 4, pieces=pieces)
        for s in (2048, 1024, 512, 256, 128, 64, 32, 16) if n % s == 0 and s * itemsize >= 128
        for pieces in range(1, 15) if n // s % pieces == 0 and s * pieces <= most
    ]  # fmt: skip
    return max(tiles, key=lambda tile: (tile.length, tile.s), default=None)


def column_tile(layout: Layout, itemsize: int, device: Device) -> Tile:
    """A tile of columns, which lie side by side in memory: 16 bytes a lane of 4 warps in each of its pieces; with few
    idle lanes, about as wide as a line of memory, and small enough that there are two for each SM."""
    elements = limits().column_tile * 2 // itemsize
    each = 32 * vector(layout, itemsize)
    warps = max(1, min(4, elements // each))
    lanes = warps * each
    most = max(1, min(8, elements // lanes))
    rows = next_power_of_2(layout.extent("s"))  # of a batch, too: roughly

    def cost(tile: Tile) -> tuple[float, ...]:
        idle = -(-layout.runs[-1].size // tile.k) * tile.k / layout.runs[-1].size * max(1, tile.length / rows)
        return round(4 * idle), -tile.pieces, abs(log2(tile.k * itemsize / limits().line_bytes))

    widths = [k for k in (16, 32, 64, 128, 256, 512, 1024) if k <= lanes]
    m, counts = along_m(layout), (most, -(-most // 2))
    tile = min((Tile(m, k, 1, lanes // k, warps, pieces=p) for k in widths for p in counts), key=cost)
    while tile.pieces > 2 and across(layout, tile) * -(-layout.extent("s") // tile.length) < 2 * device.num_sms:
        tile = replace(tile, pieces=tile.pieces // 2)
    return tile


def column_finish_tile(partials: int, n_a: int) -> tuple[int, int, int]:
    """(groups, columns of each, partials) that a finish of columns takes at once: all partials of a group, up to 1024,
    and as many groups and columns as fill a program."""
    p = max(32, min(1024, next_power_of_2(partials)))
    a = min(next_power_of_2(n_a), 32)
    return max(1, min(8, 4096 // (a * p))), a, p


def finish_group_tile(kept_first: bool, n_a: int = 1) -> tuple[int, int, int]:
    """(groups, columns of each, partials) that a finishing program takes at once: a square where partials of
    neighbouring groups lie side by side, else few groups with all their partials (see Limits.chunks) in one step."""
    a = min(next_power_of_2(n_a), 32)
    return (max(1, 32 // a), a, 32) if kept_first else (max(1, 4 // a), a, max(32, 256 // a))


def sum_rows_tile(columns: int, rows: int) -> tuple[int, int]:
    """(rows, columns) of partial dw, db taken at once: about as many rows as there are, a sector of fp32 of each or
    more, so that many programs share the columns and none waits for more than a few loads one after the other."""
    p = 4 if rows <= 4 else 16 if rows <= 16 else 256
    return p, min(2048 // p, next_power_of_2(columns))


def rows(layout: Layout, itemsize: int, acc_bytes: int, room: int, most_warps: int, each: int = 1) -> Tile | None:
    """A tile of whole rows with room for so many values a thread, or None where a row is too long.

    A row is one warp's as far as that goes, and its sums need no barrier; or that of several.  These have `each` rows,
    so that w and b are read once for all of them.  It is cut to pieces of one access a lane, so that no lane idles
    beyond the last; where all warps have the same rows, of 16 bytes.
    """
    lane, share = 16 // itemsize, 1 if acc_bytes == 4 else 4
    n = layout.extent("a")
    if n <= 32 * lane:
        a = next_power_of_2(n)
        k = max(1, 128 * (32 if room >= 32 else 16) // share // max(a, lane))
        return Tile(True, min(k, kept_bound(layout, "m")), a, 1, 4)
    access, across = vector(layout, itemsize), 1  # warps of a row
    while -(-n // (32 * across * access)) * access * each > room // share:
        across *= 2
    if across > most_warps:
        return None
    a = 32 * across * (access if across < 4 else lane)
    while 8 * (-n % a) > n and a > 64 * across:  # an eighth may idle; a thread has two elements, a register of them
        if each > 1 < across:
            return None  # rows would be those of different warps after all
        a //= 2
    k = min(max(1, 4 // across), kept_bound(layout, "m"))
    return Tile(True, each * k, a, 1, k * across, pieces=-(-n // a), along_a=True)


def forward_rows(
    layout: Layout, itemsize: int, acc_bytes: int, summed: bool, extra: bool, activation: str
) -> Tile | None:
    """rows() of a forward program: two of a warp, or of several, as far as registers go; else one.  `summed`: x is made
    of two tensors; `extra`: another one is added to y."""
    share = 2 if extra or activation in HEAVY else 1
    sizes = [(2, 48 if summed else 80), (1, 64)]
    if itemsize == 2 and share == 1 and not summed and vector(layout, itemsize) == 8:
        sizes.append((1, 128))
    tiles = (rows(layout, itemsize, acc_bytes, room // share, 16, each) for each, room in sizes)
    return next((tile for tile in tiles if tile is not None), None)


def column_groups(layout: Layout, itemsize: int, acc_bytes: int, most: int, most_warps: int) -> Tile | None:
    """A tile of whole groups that are columns, whose parameters run along them, in pieces along a, no more than `most`
    of them, of 16 bytes a lane, or of eight elements where they are accessed one by one: a line of memory wide, or half
    of one, or a sector; None where a group is too long for all of these."""
    lane = vector(layout, itemsize)
    if layout.letters[-2:] not in ("am", "ac") or layout.extent("s") > 1 or acc_bytes > 4:
        return None
    narrow = lane * itemsize < 8
    for share, warps in ((8, 4), (8, 8), (8, 16)) if narrow else ((1, 4), (2, 4), (2, 8), (2, 16), (4, 8), (4, 16)):
        k = 64 // share if narrow else max(lane, limits().line_bytes // itemsize // share)
        a = 32 * (8 if narrow else lane) * warps // k
        pieces = -(-layout.extent("a") // a)
        if pieces <= (most // 2 if narrow else most) and warps <= most_warps:
            return Tile(along_m(layout), k, a, 1, warps, pieces=pieces, along_a=True)
    return None


def row_chunk(layout: Layout, itemsize: int) -> Tile:
    """A tile of rows too long for one program: 16 bytes a lane of one warp, of four rows."""
    return Tile(True, min(4, kept_bound(layout, "m")), 32 * 16 // itemsize, 1, 1)
