"""What a plan moves, without running it: bytes by launch and operand, those that reach DRAM, and the least possible.

Counts are sums over all programs of a launch, formed as products: along each axis of the tiles [BLOCK_K, BLOCK_A,
BLOCK_S] the lanes that a mask lets through add up to the extent, and where there is no mask every tile counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from .kernels import backward as kb
from .kernels import finish as kf
from .kernels import forward as kw
from .plan import Launch, Plan, cdiv


class Moved(NamedTuple):
    """Bytes read and written."""

    loads: int = 0
    stores: int = 0


@dataclass(frozen=True)
class Hbm:
    """What of a plan's traffic reaches DRAM, see :func:`hbm`."""

    bytes: int
    """Read from and written to DRAM."""
    cached: int
    """Read a second time by a later launch, and assumed to be found in L2."""
    window: int
    """The most bytes that must stay in L2 between two launches for that."""
    launches: tuple[Moved, ...]
    """`bytes`, launch by launch."""


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


class _Call:
    """A launch as its kernel sees it: arguments by the kernel's own names; counts the lanes it moves."""

    def __init__(self, launch: Launch, itemsizes: Mapping[str, int]) -> None:
        self.pointers, self.given = launch.operands, launch.given
        self.grid = launch.grid
        self.itemsizes = itemsizes
        n_m, self.n_c, self.n_a, self.n_s = (prod(n or self["N0"] for n in sizes) for sizes in self["SPACE"])
        self.groups, self.columns = n_m * self.n_c, self.n_c * self.n_a
        self.lanes: dict[str, Moved] = {}

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def has(self, pointer: str) -> bool:
        return self.pointers[pointer] in self.itemsizes

    def load(self, pointer: str, lanes: int) -> None:
        self._add(pointer, Moved(lanes, 0))

    def store(self, pointer: str, lanes: int) -> None:
        self._add(pointer, Moved(0, lanes))

    def _add(self, pointer: str, lanes: Moved) -> None:
        if self.has(pointer):
            name = self.pointers[pointer]
            self.lanes[name] = Moved(*map(sum, zip(self.lanes.get(name, Moved()), lanes, strict=True)))

    def tiles(self, chunks_s: int = 1, steps_m: int = 1) -> _Tiles:
        """The tiles of a grid over blocks of groups, blocks of a and chunks of s; steps_m: of a loop along m."""
        blocks_a = cdiv(self.n_a, self["BLOCK_A"])
        return _Tiles(
            _Axis(self.groups, self.grid // (blocks_a * chunks_s) * steps_m, self["BLOCK_K"]),
            _Axis(self.n_a, blocks_a, self["BLOCK_A"]),
            _Axis(self.n_s, chunks_s, self["BLOCK_S"]),
        )

    def affine(self, tiles: _Tiles, *pointers: str) -> None:
        """epilogue.affine: parameters, under `wmask`."""
        m, c, a, s = self["W"]
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
        varying = ((n, step) for sizes, steps in zip(self["SPACE"], coordinates, strict=True)
                   for n, step in zip(sizes, steps, strict=bool(steps)) if step)  # fmt: skip
        return prod(n or self["N0"] for n, _ in varying)


# One function for each jit function that moves something, in the kernels' own order.


def _read_input(call: _Call, tiles: _Tiles) -> None:
    call.load("x_ptr", tiles.lanes())
    if call.has("pre_ptr"):
        call.load("pre_ptr", tiles.lanes())
        call.store("sum_ptr", tiles.lanes())


def _write_output(call: _Call, tiles: _Tiles) -> None:
    call.affine(tiles, "w_ptr", "b_ptr")
    call.load("post_ptr", tiles.lanes())
    call.store("y_ptr", tiles.lanes())


def _read_gradient(call: _Call, tiles: _Tiles) -> None:
    call.load("x_ptr", tiles.lanes())
    call.load("dy_ptr", tiles.lanes())
    if call["ACT_GRAD"] is not None:
        call.affine(tiles, "w_ptr", "b_ptr")
        call.load("post_ptr", tiles.lanes())


def _write_gradient(call: _Call, tiles: _Tiles) -> None:
    call.store("dpost_ptr", tiles.lanes())
    if call.has("dx_ptr"):
        call.affine(tiles, "w_ptr")
        call.load("dsum_ptr", tiles.lanes())
        call.store("dx_ptr", tiles.lanes())


def _finish_moments(call: _Call) -> None:
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.store(pointer, call.groups)
    for pointer in ("running_mean_ptr", "running_var_ptr"):
        call.load(pointer, call.groups)
        call.store(pointer, call.groups)


def _normalize(call: _Call) -> None:
    tiles = call.tiles()
    _read_input(call, tiles)
    _finish_moments(call)
    _write_output(call, tiles)


def _statistics(call: _Call) -> None:
    tiles = call.tiles(call["chunks_s"])
    _read_input(call, tiles.looped(call["steps"]))
    if call["CENTER"]:
        call.store("mean_ptr", tiles.lanes("k"))
    call.store("m2_ptr", tiles.lanes("k"))


def _apply(call: _Call) -> None:
    tiles = call.tiles(call["chunks_s"])
    call.load("x_ptr", tiles.lanes())
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.load(pointer, tiles.lanes("k"))
    _write_output(call, tiles)


def _grad_normalize(call: _Call) -> None:
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
    across = tiles.a.tiles * cdiv(call.n_c, 1 if call["ALONG_M"] else call["BLOCK_K"])
    for pointer in ("dw_ptr", "db_ptr"):
        call.store(pointer, call.grid // across * call.columns)


def _grad_statistics(call: _Call) -> None:
    tiles = call.tiles(call["chunks_s"])
    inside = tiles.looped(call["steps"])
    for pointer in ("mean_ptr", "rstd_ptr"):
        call.load(pointer, tiles.lanes("k"))
    _read_gradient(call, inside)
    _write_gradient(call, inside)
    if not call["PER_A"]:
        call.affine(tiles, *["w_ptr"] * (2 if call.has("p0_ptr") else 1))
    for pointer in ("p1_ptr", "p0_ptr"):
        call.store(pointer, tiles.lanes("ka" if call["PER_A"] else "k"))


def _grad_apply(call: _Call) -> None:
    tiles = call.tiles(call["chunks_s"])
    for pointer in ("mean_ptr", "rstd_ptr", "c1_ptr", "c0_ptr"):
        call.load(pointer, tiles.lanes("k"))
    _read_gradient(call, tiles)
    _write_gradient(call, tiles)


def _finish_statistics(call: _Call) -> None:
    partials = call.groups * call["chunks"]
    if call["CENTER"]:
        call.load("part_mean_ptr", 2 * partials)
    call.load("part_m2_ptr", partials)
    _finish_moments(call)


def _finish_group(call: _Call) -> None:
    partials = call.groups * call["chunks"] * call["A"]
    for p, c in (("p1_ptr", "c1_ptr"), ("p0_ptr", "c0_ptr")):
        if call.has(c):
            call.load(p, partials)
            call.store(c, call.groups)
    call.load("w_ptr", partials)


def _finish_affine(call: _Call) -> None:
    for p, d in (("p1_ptr", "dw_ptr"), ("p0_ptr", "db_ptr")):
        if call.has(d):
            call.load(p, call["rows"] * call.columns)
            call.store(d, call.columns)


_KERNELS: dict[Any, Callable[[_Call], None]] = {
    kw.normalize: _normalize,
    kw.statistics: _statistics,
    kw.apply: _apply,
    kb.grad_normalize: _grad_normalize,
    kb.grad_statistics: _grad_statistics,
    kb.grad_apply: _grad_apply,
    kf.finish_statistics: _finish_statistics,
    kf.finish_group: _finish_group,
    kf.finish_affine: _finish_affine,
}
_REVERSED = (kw.apply, kb.grad_apply)
"""Kernels that walk from the last tile to the first."""
STREAMS = ("x", "pre", "sum", "post", "y", "dy", "dsum", "dx", "dpost")
"""Operands of the size of x: what a launch reads of these last is what it leaves in L2."""


def _calls(plan: Plan, itemsizes: Mapping[str, int]) -> list[_Call]:
    missing = [name for name, elements in plan.workspace if elements and name not in itemsizes]
    if missing:
        raise ValueError(f"itemsizes must give the bytes of an element of workspace too: {', '.join(missing)} missing")
    calls = []
    for launch in plan.launches:
        if launch.kernel not in _KERNELS:
            raise ValueError(f"what a kernel moves is known of those of normops.kernels only; got {launch.kernel}")
        call = _Call(launch, itemsizes)
        _KERNELS[launch.kernel](call)
        calls.append(call)
    return calls


def traffic(plan: Plan, itemsizes: Mapping[str, int]) -> tuple[dict[str, Moved], ...]:
    """For each launch of a plan, name of operand -> bytes its kernel loads and stores.

    Every access of every lane inside the masks counts, as in ``normops.testing.traffic``: there are no caches.
    `itemsizes`: bytes of an element of each operand that is present, workspace included; absent ones move nothing.

    Raises ValueError for a kernel that is not known, and where `itemsizes` leaves out workspace.
    """
    return tuple({name: _bytes(n, itemsizes[name]) for name, n in c.lanes.items()} for c in _calls(plan, itemsizes))


def _bytes(lanes: Moved, itemsize: int) -> Moved:
    return Moved(lanes.loads * itemsize, lanes.stores * itemsize)


def _distinct(plan: Plan, itemsizes: Mapping[str, int]) -> list[dict[str, Moved]]:
    """As traffic(), but within a launch each element of an operand counts once, however often it is accessed."""
    sizes = dict(plan.workspace)

    def once(call: _Call, pointer: str, name: str) -> Moved:
        elements = sizes.get(name) or call.elements(pointer)
        lanes = call.lanes[name]
        return _bytes(lanes if elements is None else Moved(*(min(n, elements) for n in lanes)), itemsizes[name])

    return [
        {name: once(call, pointer, name) for pointer, name in call.pointers.items() if name in call.lanes}
        for call in _calls(plan, itemsizes)
    ]


def hbm(plan: Plan, itemsizes: Mapping[str, int], l2_window: int) -> Hbm:
    """What of a plan's traffic reaches DRAM where `l2_window` bytes can be found again in L2.  A model; it assumes:

    - nothing the call reads is in L2 when it starts, and everything it writes for its caller goes to DRAM;
    - within a launch each element is read from DRAM once: parameters and statistics that tiles share come from caches;
    - of the streams (operands of the size of x) a launch leaves the `l2_window` bytes that it touched last in L2, in
      equal shares.  A later launch that walks in reverse (apply, grad_apply) finds these, and reads the rest from DRAM;
      one that walks forward finds everything where all the streams of that launch fit, else nothing;
    - parameters, statistics and partial sums that an earlier launch touched are found where those read together fit
      `l2_window`; workspace that fits is overwritten or freed before it goes to DRAM.

    Raises ValueError as :func:`traffic` does, and for a negative window.
    """
    if l2_window < 0:
        raise ValueError(f"l2_window must be a number of bytes, 0 or more; got {l2_window}")
    scratch = dict(plan.scratch)
    touched: dict[str, int] = {}  # operand -> streams of the last launch that touched it, in bytes
    cached = window = 0
    launches = []
    for launch, moved in zip(plan.launches, _distinct(plan, itemsizes), strict=True):
        again = sum(m.loads for name, m in moved.items() if name in touched and name not in STREAMS)
        spilled = sum(m.stores for name, m in moved.items() if name in scratch) > l2_window
        loads = stores = 0
        for name, m in moved.items():
            found = 0
            if m.loads and name in touched:
                held = touched[name] if name in STREAMS else again
                if held <= l2_window or (name in STREAMS and launch.kernel in _REVERSED):
                    found = m.loads * min(held, l2_window) // held
                    window = max(window, min(held, l2_window))
            cached += found
            loads += m.loads - found
            stores += m.stores if spilled or name not in scratch else 0
        streams = sum(max(m) for name, m in moved.items() if name in STREAMS)
        touched.update(dict.fromkeys(moved, streams))
        launches.append(Moved(loads, stores))
    return Hbm(sum(map(sum, launches)), cached, window, tuple(launches))


def floor(plan: Plan, itemsizes: Mapping[str, int]) -> int:
    """The least bytes of a call: each operand that is read before it is written read once, each that is written
    written once.  Workspace counts only where it is a result (mean and rstd of a forward).

    Raises ValueError as :func:`traffic` does.
    """
    scratch = dict(plan.scratch)
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    for moved in _distinct(plan, itemsizes):
        for name, (loads, stores) in moved.items():
            if name not in scratch:
                if loads and name not in written:
                    read[name] = loads
                if stores:
                    written[name] = stores
    return sum(read.values()) + sum(written.values())
