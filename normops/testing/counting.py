"""What each kernel loads and stores: lanes by operand, one function for each jit function that moves something.

Counts are sums over all programs of a launch, formed as products: along each axis of the tiles [BLOCK_K, WIDTH_A,
WIDTH_S] the lanes that a mask lets through add up to the extent, and where there is no mask every tile counts.

What data decides is left out: the statistics of stream() read a chunk of several tiles again where squares cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

from ..kernels.bundles import APPLY, BOTH, STATISTICS
from ..kernels.finish import finish, grad_finish, sum_rows
from ..kernels.grad_stream import grad_stream
from ..kernels.resident import grad_group, grad_normalize, normalize
from ..kernels.stream import stream
from ..plan import Launch, cdiv


class Moved(NamedTuple):
    """Bytes read and written."""

    loads: int = 0
    stores: int = 0


class _Axis(NamedTuple):
    """The tiles of a launch along one of their axes."""

    points: int
    """Points inside the masks of all tiles."""
    tiles: int
    block: int

    def lanes(self, masked: bool, varies: bool) -> int:
        """Lanes of an access; without a mask along this axis those of whole tiles, or one where it does not vary."""
        return self.points if masked else self.tiles * (self.block if varies else 1)


class _Tiles(NamedTuple):
    k: _Axis
    a: _Axis
    s: _Axis

    def lanes(self, mask: str = "kas", varies: str = "") -> int:
        """Lanes of one access by every tile, under a mask along the axes named; `varies`: axes of the address."""
        return prod(axis.lanes(x in mask, x in varies) for x, axis in zip("kas", self, strict=True))

    def looped(self, points: int) -> _Tiles:
        """The tiles inside a loop along s, which ends where its points do."""
        return self._replace(s=self.s._replace(tiles=cdiv(points, self.s.block)))


class Counted:
    """A launch as its kernel sees it: arguments by the kernel's own names; counts the lanes it moves."""

    def __init__(self, launch: Launch, itemsizes: Mapping[str, int]) -> None:
        self.pointers, self.given = launch.operands, launch.given
        self.grid = launch.grid
        self.itemsizes = itemsizes
        n_m, self.n_c, self.n_a, self.n_s = (prod(n or self["n0"] for n in sizes) for sizes in self["SPACE"])
        self.points = n_m * self.n_c
        self.along = n_m if self.given.get("ALONG_M") else self.n_c
        """Points of the kept coordinates; a fold makes a group of several."""
        self.per, self.block, self.group_lanes, self.per_sum = self.given.get("FOLD", (1, 1, 1, 1))
        """How many of them a sum of a backward stands for."""
        self.groups, self.columns = self.points // self.per, self.n_c * self.n_a // self.per_sum
        self.lanes: dict[str, Moved] = {}
        self.again: dict[str, int] = {}
        """Of the lanes loaded, those that this launch has loaded or stored before."""
        self.aside: dict[str, int] = {}
        """Of the lanes loaded, those whose lines of memory are read anyway: elements that means are less of, and what
        programs read for nothing."""
        self.between: dict[str, int] = {}
        """Lanes of streams that the launch touches before it comes back to the first of them."""

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def has(self, pointer: str) -> bool:
        return self.pointers.get(pointer) in self.itemsizes

    def load(self, pointers: str, lanes: int, again: bool = False) -> None:
        """Of each of these operands, named with blanks between them."""
        self._add(pointers, Moved(lanes, 0))
        for name in self.named(pointers) if again else ():
            self.again[name] = self.again.get(name, 0) + lanes

    def load_aside(self, pointers: str, lanes: int) -> None:
        self.load(pointers, lanes)
        for name in self.named(pointers):
            self.aside[name] = self.aside.get(name, 0) + lanes

    def read(self, pointer: str, tiles: _Tiles, again: bool = False) -> None:
        """memory.load: past the end of a, where CLAMP_A, its last point again."""
        self.load(pointer, tiles.lanes(), again)
        if self["CLAMP_A"]:
            self.load_aside(pointer, tiles.lanes("ks", "a") - tiles.lanes())

    def ahead(self, tiles: _Tiles, pointers: str) -> None:
        """What a ticketed launch touches of these streams before it reads the first element again: at most the lanes
        of `lead` tiles in a row, most of them in whole units, and of the one that is read beside the first again."""
        k, a, s = min(self.block, self.along), min(tiles.a.block, self.n_a), min(tiles.s.block, self.n_s)
        unit = k * self.n_a * self.n_s
        units, rest = divmod(self["number"] + 1, tiles.a.tiles * tiles.s.tiles)
        lanes = min(units * unit + min(rest * k * a * s, unit), tiles.lanes())
        self.between |= dict.fromkeys(self.named(pointers), lanes)

    def store(self, pointers: str, lanes: int) -> None:
        self._add(pointers, Moved(0, lanes))

    def named(self, pointers: str) -> list[str]:
        """The names in the call of those that there are."""
        return [self.pointers[pointer] for pointer in pointers.split() if self.has(pointer)]

    def _add(self, pointers: str, lanes: Moved) -> None:
        for name in self.named(pointers):
            self.lanes[name] = Moved(*map(sum, zip(self.lanes.get(name, Moved()), lanes, strict=True)))

    def tiles(self, chunks_s: int = 1, steps_m: int = 1, more: int = 0) -> _Tiles:
        """The tiles of a grid over blocks of groups, blocks of a and chunks of s; steps_m: of a loop along m; more:
        programs than tiles."""
        blocks_a = cdiv(self.n_a, self["WIDTH_A"])
        blocks_k = (self.grid - more) // (blocks_a * chunks_s) * steps_m
        return _Tiles(
            _Axis(blocks_k * self["BLOCK_K"] if self["CLAMP_K"] else self.points, blocks_k, self["BLOCK_K"]),
            _Axis(self.n_a, blocks_a, self["WIDTH_A"]),
            _Axis(self.n_s, chunks_s, self["WIDTH_S"]),
        )

    def affine(self, tiles: _Tiles, pointers: str) -> None:
        """memory.load_parameter: by each of rows for itself, where these are cut to pieces."""
        m, c, a, s = self["W"][:4]
        rows = self["PIECES_A"] and self["BLOCK_S"] == 1 and not self["KEPT_FIRST"]
        varies = {"k": rows or (m if self["ALONG_M"] else c), "a": a, "s": s}
        lanes = tiles.lanes("a" if self["ALONG_M"] else "ka", "".join(x for x, strides in varies.items() if strides))
        self.load(pointers, lanes)

    def elements(self, pointer: str) -> int | None:
        """Different elements of an operand, by its strides; None where the kernel is given none."""
        name = pointer.upper()
        coordinates = self.given.get({"B": "W", "DW": "W", "DB": "W", "MEAN": "STAT", "RSTD": "STAT"}.get(name, name))
        if coordinates is None:
            return None
        varying = ((n, step) for sizes, steps in zip(self["SPACE"], coordinates[:4], strict=True)
                   for n, step in zip(sizes, steps, strict=bool(steps)) if step)  # fmt: skip
        count: int = prod(n or self["n0"] for n, _ in varying) // prod(coordinates[4] if len(coordinates) == 5 else ())
        return count


# One function for each jit function that moves something, in the kernels' own order.


def _read_input(call: Counted, tiles: _Tiles) -> None:
    call.read("x", tiles)
    if call.has("pre"):
        call.read("pre", tiles)
        call.store("sum", tiles.lanes())


def _elements(call: Counted, lanes: int) -> None:
    if call["CENTER"]:
        call.load_aside("x pre", lanes)


def _medians(call: Counted, lanes: int) -> None:
    _elements(call, 3 * lanes)


def _write_output(call: Counted, tiles: _Tiles) -> None:
    call.affine(tiles, "w b")
    call.read("post", tiles)
    call.store("y", tiles.lanes())


def _read_gradient(call: Counted, tiles: _Tiles, again: bool = False) -> None:
    call.read("x", tiles, again)
    call.read("dy", tiles, again)
    if call["ACT"] != "identity":
        call.read("post", tiles, again)


def _parameters(call: Counted, tiles: _Tiles) -> None:
    call.affine(tiles, "w b" if call["ACT"] != "identity" else "w")


def _write_gradient(call: Counted, tiles: _Tiles) -> None:
    call.store("dpost", tiles.lanes())
    if call.has("dx"):
        call.read("dsum", tiles)
        call.store("dx", tiles.lanes())


def _keep_moments(call: Counted, groups: int) -> None:
    call.store("mean rstd", groups)
    call.load("running_mean running_var", call.groups)
    call.store("running_mean running_var", call.groups)


def _normalize(call: Counted) -> None:
    tiles = call.tiles()
    _read_input(call, tiles)
    if call["BLOCK_K"] == 1:
        _elements(call, tiles.lanes("k"))
    _keep_moments(call, tiles.lanes("k") if call["CLAMP_K"] else call.groups)
    _write_output(call, tiles)


def _stream(call: Counted) -> None:
    {STATISTICS: _statistics, APPLY: _apply, BOTH: _paired}[call["PHASE"]](call)


def _chunks(call: Counted) -> int:
    return cdiv(call.n_s, call["WIDTH_S"] * (call["number"] if call["PHASE"] == STATISTICS else 1))


def _statistics(call: Counted) -> None:
    tiles = call.tiles(_chunks(call))
    _read_input(call, tiles.looped(call.n_s))
    _medians(call, tiles.lanes("k"))
    call.store("part_mean part_m2", tiles.lanes("k") // call.per)


def _apply(call: Counted) -> None:
    tiles = call.tiles(_chunks(call))
    call.read("x", tiles)
    call.load("mean rstd", tiles.lanes("k"))
    _write_output(call, tiles)


def _grad_normalize(call: Counted) -> None:
    tiles = call.tiles(steps_m=call.given.get("steps", 1))
    across = tiles.a.tiles * cdiv(call.n_c, 1 if call["ALONG_M"] else call.block)
    call.load("mean rstd", tiles.lanes("k"))
    _read_gradient(call, tiles)
    # Parameters stay for the walk: of the first block of m.
    parts = call.grid // across
    _parameters(call, tiles._replace(k=_Axis(parts * call.n_c, parts * call.n_c, call["BLOCK_K"])))
    if call["PHASE"] == APPLY:
        call.load("c1 c0", tiles.lanes("k"))
    if call["PHASE"] == STATISTICS:
        call.store("p1 p0", tiles.lanes("k"))
    else:
        _write_gradient(call, tiles)
    call.store("dw db", parts * call.columns)


def _grad_group(call: Counted) -> None:
    _grad_normalize(call)
    call.load("w", call.groups * (call.n_a if call["W"][2] else 1))


def _grad_stream(call: Counted) -> None:
    {STATISTICS: _grad_statistics, APPLY: _grad_apply, BOTH: _grad_paired}[call["PHASE"]](call)


def _grad_statistics(call: Counted) -> None:
    tiles = call.tiles(_chunks(call))
    inside = tiles.looped(call.n_s)
    call.load("mean rstd", tiles.lanes("k"))
    _read_gradient(call, inside)
    _parameters(call, tiles)
    _write_gradient(call, inside)
    call.store("p1 p0", tiles.lanes("k" if call["SHARED_A"] else "ka") // call.per_sum)


def _grad_apply(call: Counted) -> None:
    tiles = call.tiles(_chunks(call))
    call.load("mean rstd c1 c0", tiles.lanes("k"))
    _read_gradient(call, tiles)
    _parameters(call, tiles)
    _write_gradient(call, tiles)


def _merge_moments(call: Counted, chunks: int, again: bool = False) -> None:
    partials = call.groups * chunks * call["APART"]
    # The first BLOCK_P of a group are kept until its mean is known.
    further = call.groups * max(0, chunks * call["APART"] - call["BLOCK_P"])
    if call["CENTER"]:
        call.load("part_mean", partials + further, again)
    call.load("part_m2", partials, again)
    if call["APART"] > 1:  # those of groups, and of columns
        _medians(call, call.groups + partials + further)


def _finish(call: Counted) -> None:
    _merge_moments(call, cdiv(call.n_s, call["WIDTH_S"] * call["steps"]) * cdiv(call.n_a, call["WIDTH_A"]))
    _medians(call, call.groups)
    _keep_moments(call, call.groups)


def _merge_group(call: Counted, chunks: int, blocks: int, again: bool = False, affine: bool = True) -> None:
    """`blocks`: of groups."""
    columns, partials = call.groups * call["A"], call.groups * call["A"] * call["APART"] * chunks
    tiles = _Tiles(_Axis(call.groups, blocks, call.group_lanes), _Axis(call["A"], 1, call["A"]), _Axis(1, 1, 1))
    for p, c in (("p1", "c1"), ("p0", "c0")):
        call.load(p, partials, again)
        call.store(c, call.groups)
    call.affine(tiles, "w")
    if affine:
        call.store("dw db", columns)


def _grad_finish(call: Counted) -> None:
    rows = call.has("t1") or call.has("t0")
    blocks = call.grid - (cdiv(call.columns, call["BLOCK_A"]) if rows else 0)
    _merge_group(call, call["chunks"], blocks, affine=not rows)
    if rows:
        _sum_rows(call)


def _words(call: Counted, tiles: int, units: int) -> None:
    """tickets.py where programs run one after the other, so that none waits."""
    draw, arrive, publish, wait, leave = call.grid + 1, tiles, units, tiles, tiles + units
    lanes = draw + arrive + publish + wait + leave
    call.load("tickets", lanes, again=True)
    call.store("tickets", lanes)


def _ends(call: Counted, tiles: _Tiles) -> tuple[_Tiles, _Tiles]:
    """What is read for nothing at the ends of a ticketed launch, where there is a single tile to work on: the first
    tile by programs that only begin one, the last tile by those that only apply one."""
    extents = (call.along, call.block), (call.n_a, tiles.a.block), (call.n_s, tiles.s.block)

    def read(points: Callable[[int, int], int]) -> _Tiles:
        k, a, s = (_Axis(points(n, block), 1, axis.block) for (n, block), axis in zip(extents, tiles, strict=True))
        lead = call["number"]
        return _Tiles(k._replace(points=lead * k.points, tiles=lead), a, s)

    return read(min), read(lambda n, block: (n - 1) % block + 1)


def _paired(call: Counted) -> None:
    tiles = call.tiles(_chunks(call), more=call["number"])
    units, chunks = tiles.k.tiles, tiles.a.tiles * tiles.s.tiles
    call.ahead(tiles, "x pre sum")
    first, last = _ends(call, tiles)
    call.load_aside("x", last.lanes() + (0 if call.has("pre") else first.lanes()))
    call.load_aside("pre", last.lanes())
    _words(call, units * chunks, units)
    _read_input(call, tiles)
    _medians(call, tiles.lanes("k") + call.groups)
    call.store("part_mean part_m2", call.groups * chunks)
    _merge_moments(call, chunks, again=True)
    _keep_moments(call, call.groups)
    call.read("sum" if call.has("sum") else "x", tiles, again=True)
    call.load("mean rstd", tiles.lanes("k"), again=True)
    _write_output(call, tiles)


def _grad_paired(call: Counted) -> None:
    tiles = call.tiles(_chunks(call), more=call["number"])
    units, each = tiles.k.tiles, tiles.a.tiles * tiles.s.tiles
    chunks = each if call["SHARED_A"] else tiles.s.tiles
    streams = "x dy post" if call["ACT"] != "identity" else "x dy"
    call.ahead(tiles, streams)
    first, last = _ends(call, tiles)
    call.load_aside(streams, first.lanes() + last.lanes())
    _words(call, units * each, units)
    _read_gradient(call, tiles)
    call.store("p1 p0", call.groups * call["A"] * chunks)
    _merge_group(call, chunks, units, again=True)
    _read_gradient(call, tiles, again=True)
    # Numbers are loaded before it is known whether there is a tile to apply.
    numbers = call["BLOCK_K"] == 1 and call["SHARED_A"]
    for visited in (tiles, last, tiles, *([first] if numbers else [])):
        call.load("mean rstd", visited.lanes("k"))
        _parameters(call, visited)
    call.load("c1 c0", tiles.lanes("k"), again=True)
    _write_gradient(call, tiles)


def _sum_rows(call: Counted) -> None:
    for t, d in (("t1", "dw"), ("t0", "db")):
        if call.has(d):
            call.load(t, call["rows"] * call.columns)
            call.store(d, call.columns)


KERNELS: dict[Any, Callable[[Counted], None]] = {
    normalize: _normalize,
    stream: _stream,
    finish: _finish,
    grad_normalize: _grad_normalize,
    grad_group: _grad_group,
    grad_stream: _grad_stream,
    grad_finish: _grad_finish,
    sum_rows: _sum_rows,
}
