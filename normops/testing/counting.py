"""What each kernel loads and stores: lanes by operand, one function for each jit function that moves something.

Counts are sums over all programs of a launch, formed as products: along each axis of the tiles [BLOCK_K, BLOCK_A,
BLOCK_S] the lanes that a mask lets through add up to the extent, and where there is no mask every tile counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

from ..kernels import backward as kb
from ..kernels import finish as kf
from ..kernels import forward as kw
from ..kernels import ticketed as kt
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

    def looped(self, steps: int) -> _Tiles:
        """The tiles inside a loop along s."""
        return self._replace(s=self.s._replace(tiles=self.s.tiles * steps))


class Counted:
    """A launch as its kernel sees it: arguments by the kernel's own names; counts the lanes it moves."""

    def __init__(self, launch: Launch, itemsizes: Mapping[str, int]) -> None:
        self.pointers, self.given = launch.operands, launch.given
        self.grid = launch.grid
        self.itemsizes = itemsizes
        n_m, self.n_c, self.n_a, self.n_s = (prod(n or self["N0"] for n in sizes) for sizes in self["SPACE"])
        self.points = n_m * self.n_c
        self.along = n_m if self.given.get("ALONG_M") else self.n_c
        """Points of the kept coordinates; a fold makes a group of several."""
        self.per, self.block, self.group_lanes, self.per_sum = self.given.get("FOLD", (1, 1, 1, 1))
        """How many of them a sum of a backward stands for."""
        self.groups, self.columns = self.points // self.per, self.n_c * self.n_a // self.per_sum
        self.lanes: dict[str, Moved] = {}
        self.again: dict[str, int] = {}
        """Of the lanes loaded, those that this launch has loaded or stored before."""
        self.between: dict[str, int] = {}
        """Lanes of streams that the launch touches before it comes back to the first of them."""

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def has(self, pointer: str) -> bool:
        return self.pointers[pointer] in self.itemsizes

    def load(self, pointer: str, lanes: int, again: bool = False) -> None:
        self._add(pointer, Moved(lanes, 0))
        if again and self.has(pointer):
            name = self.pointers[pointer]
            self.again[name] = self.again.get(name, 0) + lanes

    def ahead(self, tiles: _Tiles, *pointers: str) -> None:
        """What a ticketed launch touches of these streams before it reads the first element again: at most the lanes
        of `lead` tiles in a row, most of them in whole units."""
        k, a, s = min(self.block, self.along), min(tiles.a.block, self.n_a), min(tiles.s.block, self.n_s)
        unit = k * self.n_a * self.n_s
        units, rest = divmod(self["lead"], tiles.a.tiles * tiles.s.tiles)
        lanes = min(units * unit + min(rest * k * a * s, unit), tiles.lanes())
        self.between |= {self.pointers[pointer]: lanes for pointer in pointers if self.has(pointer)}

    def store(self, pointer: str, lanes: int) -> None:
        self._add(pointer, Moved(0, lanes))

    def _add(self, pointer: str, lanes: Moved) -> None:
        if self.has(pointer):
            name = self.pointers[pointer]
            self.lanes[name] = Moved(*map(sum, zip(self.lanes.get(name, Moved()), lanes, strict=True)))

    def tiles(self, chunks_s: int = 1, steps_m: int = 1, visits: int = 1) -> _Tiles:
        """The tiles of a grid over blocks of groups, blocks of a and chunks of s; steps_m: of a loop along m; visits:
        programs of one tile."""
        blocks_a = cdiv(self.n_a, self["BLOCK_A"])
        return _Tiles(
            _Axis(self.points, self.grid // visits // (blocks_a * chunks_s) * steps_m, self["BLOCK_K"]),
            _Axis(self.n_a, blocks_a, self["BLOCK_A"]),
            _Axis(self.n_s, chunks_s, self["BLOCK_S"]),
        )

    def affine(self, tiles: _Tiles, *pointers: str) -> None:
        """epilogue.affine: parameters, under `wmask`."""
        m, c, a, s = self["W"][:4]
        varies = {"k": m if self["ALONG_M"] else c, "a": a, "s": s}
        lanes = tiles.lanes("a" if self["ALONG_M"] else "ka", "".join(x for x, strides in varies.items() if strides))
        for pointer in pointers:
            self.load(pointer, lanes)

    def elements(self, pointer: str) -> int | None:
        """Different elements of an operand, by its strides; None where the kernel is given none."""
        name = pointer.removesuffix("_ptr").upper()
        coordinates = self.given.get({"B": "W", "DW": "W", "DB": "W", "MEAN": "STAT", "RSTD": "STAT"}.get(name, name))
        if coordinates is None:
            return None
        varying = ((n, step) for sizes, steps in zip(self["SPACE"], coordinates[:4], strict=True)
                   for n, step in zip(sizes, steps, strict=bool(steps)) if step)  # fmt: skip
        count: int = prod(n or self["N0"] for n, _ in varying) // (self.per if len(coordinates) == 5 else 1)
        return count


# One function for each jit function that moves something, in the kernels' own order.


def _read_input(call: Counted, tiles: _Tiles) -> None:
    call.load("x_ptr", tiles.lanes())
    if call.has("pre_ptr"):
        call.load("pre_ptr", tiles.lanes())
        call.store("sum_ptr", tiles.lanes())


def _write_output(call: Counted, tiles: _Tiles) -> None:
    call.affine(tiles, "w_ptr", "b_ptr")
    call.load("post_ptr", tiles.lanes())
    call.store("y_ptr", tiles.lanes())


def _read_gradient(call: Counted, tiles: _Tiles, again: bool = False) -> None:
    call.load("x_ptr", tiles.lanes(), again)
    call.load("dy_ptr", tiles.lanes(), again)
    if call["ACT_GRAD"] is not None:
        call.affine(tiles, "w_ptr", "b_ptr")
        call.load("post_ptr", tiles.lanes(), again)


def _write_gradient(call: Counted, tiles: _Tiles) -> None:
    call.store("dpost_ptr", tiles.lanes())
    if call.has("dx_ptr"):
        call.affine(tiles, "w_ptr")
        call.load("dsum_ptr", tiles.lanes())
        call.store("dx_ptr", tiles.lanes())


def _finish_moments(call: Counted) -> None:
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.store(pointer, call.groups)
    for pointer in ("running_mean_ptr", "running_var_ptr"):
        call.load(pointer, call.groups)
        call.store(pointer, call.groups)


def _normalize(call: Counted) -> None:
    tiles = call.tiles()
    _read_input(call, tiles)
    _finish_moments(call)
    _write_output(call, tiles)


def _statistics(call: Counted) -> None:
    tiles = call.tiles(call["chunks_s"])
    _read_input(call, tiles.looped(call["steps"]))
    if call["CENTER"]:
        call.store("mean_ptr", tiles.lanes("k") // call.per)
    call.store("m2_ptr", tiles.lanes("k") // call.per)


def _apply(call: Counted) -> None:
    tiles = call.tiles(call["chunks_s"])
    call.load("x_ptr", tiles.lanes())
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.load(pointer, tiles.lanes("k"))
    _write_output(call, tiles)


def _grad_normalize(call: Counted) -> None:
    tiles = call.tiles(steps_m=call["steps"])
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.load(pointer, tiles.lanes("k"))
    _read_gradient(call, tiles)
    if call.has("c1_ptr"):
        for pointer in ("c1_ptr", "c0_ptr"):
            call.load(pointer, tiles.lanes("k"))
    else:
        call.affine(tiles, *["w_ptr"] * (2 if call["CENTER"] else 1))
    _write_gradient(call, tiles)
    across = tiles.a.tiles * cdiv(call.n_c, 1 if call["ALONG_M"] else call.block)
    for pointer in ("dw_ptr", "db_ptr"):
        call.store(pointer, call.grid // across * call.columns)


def _grad_statistics(call: Counted) -> None:
    tiles = call.tiles(call["chunks_s"])
    inside = tiles.looped(call["steps"])
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.load(pointer, tiles.lanes("k"))
    _read_gradient(call, inside)
    _write_gradient(call, inside)
    if not call["PER_A"]:
        call.affine(tiles, *["w_ptr"] * (2 if call.has("p0_ptr") else 1))
    for pointer in ("p1_ptr", "p0_ptr"):
        call.store(pointer, tiles.lanes("ka" if call["PER_A"] else "k") // call.per_sum)


def _grad_apply(call: Counted) -> None:
    tiles = call.tiles(call["chunks_s"])
    for pointer in ("mean_ptr", "rstd_ptr", "c1_ptr", "c0_ptr"):
        call.load(pointer, tiles.lanes("k"))
    _read_gradient(call, tiles)
    _write_gradient(call, tiles)


def _merge_moments(call: Counted, chunks: int, again: bool = False) -> None:
    if call["CENTER"]:
        call.load("part_mean_ptr", 2 * call.groups * chunks, again)
    call.load("part_m2_ptr", call.groups * chunks, again)


def _finish_statistics(call: Counted) -> None:
    _merge_moments(call, call["chunks"])
    _finish_moments(call)


def _merge_group(call: Counted, chunks: int, blocks: int, again: bool = False) -> None:
    """`blocks`: of groups."""
    columns = call.groups * call["A"]
    tiles = _Tiles(_Axis(call.groups, blocks, call.group_lanes), _Axis(call["A"], 1, call["A"]), _Axis(1, 1, 1))
    for p, c in (("p1_ptr", "c1_ptr"), ("p0_ptr", "c0_ptr")):
        call.load(p, columns * chunks, again)
        call.store(c, call.groups)
    if not call.given.get("ROWS"):
        call.affine(tiles, *["w_ptr"] * (2 if call.has("p0_ptr") else 1))
        for pointer in ("dw_ptr", "db_ptr"):
            call.store(pointer, columns)


def _finish_group(call: Counted) -> None:
    _merge_group(call, call["chunks"], call.grid)


def _words(call: Counted, tiles: int, units: int, blocks: int) -> None:
    """tickets.py where programs run one after the other, so that none waits; blocks: of chunks, merged first."""
    draw, arrive, publish, wait, leave = 2 * tiles + 1, tiles + 2 * blocks, units, tiles, tiles + units
    lanes = draw + arrive + publish + wait + leave
    call.load("tickets_ptr", lanes, again=True)
    call.store("tickets_ptr", lanes)


def _ticketed(call: Counted) -> None:
    tiles = call.tiles(call["chunks_s"], visits=2)
    units, chunks = tiles.k.tiles, tiles.a.tiles * tiles.s.tiles
    blocks = cdiv(chunks, call["FAN"]) if call["FAN"] else 0
    call.ahead(tiles, "x_ptr", "pre_ptr", "sum_ptr")
    _words(call, units * chunks, units, units * blocks)
    _read_input(call, tiles)
    for pointer in ("part_mean_ptr", "part_m2_ptr"):
        call.store(pointer, call.groups * (chunks + blocks))
    for rows in (chunks, blocks) if blocks else (chunks,):
        _merge_moments(call, rows, again=True)
    _finish_moments(call)
    call.load("sum_ptr" if call.has("sum_ptr") else "x_ptr", tiles.lanes(), again=True)
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.load(pointer, tiles.lanes("k"), again=True)
    _write_output(call, tiles)


def _grad_ticketed(call: Counted) -> None:
    tiles = call.tiles(call["chunks_s"], visits=2)
    units, each = tiles.k.tiles, tiles.a.tiles * tiles.s.tiles
    chunks = each if call["ROWS"] else tiles.s.tiles
    blocks = cdiv(chunks, call["FAN"]) if call["FAN"] else 0
    streams = ("x_ptr", "dy_ptr", "post_ptr") if call["ACT_GRAD"] is not None else ("x_ptr", "dy_ptr")
    call.ahead(tiles, *streams)
    _words(call, units * each, units, units * blocks)
    _read_gradient(call, tiles)
    if call["ROWS"]:
        call.affine(tiles, "w_ptr")
        for pointer in ("dw_ptr", "db_ptr"):
            call.store(pointer, units * call.n_a)
    for pointer in ("p1_ptr", "p0_ptr"):
        call.store(pointer, call.groups * call["A"] * (chunks + blocks))
        if blocks:
            call.load(pointer, call.groups * call["A"] * chunks, again=True)
    _merge_group(call, blocks or chunks, units, again=True)
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.load(pointer, 2 * tiles.lanes("k"))
    _read_gradient(call, tiles, again=True)
    for pointer in ("c1_ptr", "c0_ptr"):
        call.load(pointer, tiles.lanes("k"), again=True)
    _write_gradient(call, tiles)


def _finish_affine(call: Counted) -> None:
    for p, d in (("p1_ptr", "dw_ptr"), ("p0_ptr", "db_ptr")):
        if call.has(d):
            call.load(p, call["rows"] * call.columns)
            call.store(d, call.columns)


KERNELS: dict[Any, Callable[[Counted], None]] = {
    kw.normalize: _normalize,
    kw.statistics: _statistics,
    kw.apply: _apply,
    kb.grad_normalize: _grad_normalize,
    kb.grad_statistics: _grad_statistics,
    kb.grad_apply: _grad_apply,
    kf.finish_statistics: _finish_statistics,
    kf.finish_group: _finish_group,
    kf.finish_affine: _finish_affine,
    kt.ticketed: _ticketed,
    kt.grad_ticketed: _grad_ticketed,
}
