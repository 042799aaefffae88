"""A tile, and what a layout says of tiles whatever their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from .layout import Layout


@dataclass(frozen=True, slots=True)
class Tile:
    along_m: bool
    k: int
    a: int
    s: int
    warps: int
    used: int = 0
    """Lanes of k that stand for a column of a folded layout; 0: all."""
    fold: int = 1
    pieces: int = 1
    """Blocks that it is made of, neighbours along a (`along_a`) or along s."""
    along_a: bool = False
    single: bool = False
    """Whether a backward program has no other: grad_group."""

    @property
    def width(self) -> int:
        """Points along a."""
        return self.a * self.pieces if self.along_a else self.a

    @property
    def length(self) -> int:
        """Points along s."""
        return self.s if self.along_a else self.s * self.pieces

    @property
    def elements(self) -> int:
        return self.k * self.width * self.length

    def full(self, letter: str, n: int) -> int:
        """Of how many pieces all points along a or s are there, whichever the tile."""
        each, pieced = (self.a, self.along_a) if letter == "a" else (self.s, not self.along_a)
        whole = each * (self.pieces if pieced else 1)
        if n % whole == 0:
            return self.pieces
        return n // each if pieced and n < whole else 0

    @property
    def columns(self) -> int:
        return self.used or self.k

    @property
    def groups(self) -> int:
        """Lanes for the groups of a block."""
        return next_power_of_2(self.columns // self.fold)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def along_m(layout: Layout) -> bool:
    """A tile runs along the kept coordinate that lies further inside."""
    kept = [letter for letter in layout.letters if letter in "mc"]
    return not kept or kept[-1] == "m"


def kept_bound(layout: Layout, letter: str) -> int:
    """How far a block may grow along a kept coordinate; the batch sets no bound, for it compiles nothing."""
    if letter == layout.batch or 0 in layout.sizes(letter) or not layout.kept:
        return 1 << 30  # a single row is a batch of one
    return next_power_of_2(layout.extent(letter))


def vector(layout: Layout, itemsize: int) -> int:
    """Elements of one access to the output: what 16 bytes hold, as far as its innermost extent and strides allow."""
    inner = layout.runs[-1] if layout.runs else None
    if inner is None:
        return 1
    return gcd(16 // itemsize, inner.size, *(abs(run.strides[0]) for run in layout.runs[:-1]))


def sideways(layout: Layout) -> bool:
    """Whether groups, or parameters inside them, lie side by side along a line of memory: a tile holds several."""
    return layout.letters[-1:] in ("m", "c") or (layout.letters[-1:] == "a" and layout.extent("s") > 1)


def in_rows(layout: Layout) -> bool:
    """Whether the kept points are rows, parameters run along them and nothing else is averaged over."""
    return layout.letters[-1:] == "a" and layout.extent("s") == 1 and len(layout.runs_of("a")) == 1 and along_m(layout)


def line_groups(layout: Layout, itemsize: int, line_bytes: int) -> int:
    """Groups side by side that a tile needs to cover a line of memory."""
    if not layout.runs:
        return 1
    inner = layout.runs[-1]
    line = line_bytes // itemsize
    if not inner.reduced:
        return line
    if len(layout.runs) > 2 and not layout.runs[-2].reduced and inner.size < line:
        return next_power_of_2(-(-line // inner.size))
    return 1


def across(layout: Layout, tile: Tile) -> int:
    """Tiles side by side: of all groups, and along a."""
    inside, outside = ("m", "c") if tile.along_m else ("c", "m")
    return -(-layout.extent(inside) // tile.columns) * layout.extent(outside) * -(-layout.extent("a") // tile.width)
