"""How a call looks at memory: the same operands in the layouts that its launches are cut from."""

from __future__ import annotations

from typing import Any, NamedTuple

from .kernels.bundles import ABSENT
from .layout import Layout, coalesce
from .schedule import column_blocks, plane_tile
from .tile import Tile, vector


class View(NamedTuple):
    """A layout, and the strides of each operand in it as kernels take them."""

    layout: Layout
    operands: dict[str, Any]


class Shapes(NamedTuple):
    """Strides (in the split shape) of every operand that a direction touches; None where it is absent."""

    order: tuple[int, ...]
    operands: tuple[tuple[str, tuple[int, ...] | None], ...]

    def has(self, name: str) -> bool:
        return dict(self.operands)[name] is not None

    @property
    def places(self) -> dict[str, int]:
        """Which of a run's strides are those of an operand."""
        return {name: i + 1 for i, name in enumerate(name for name, strides in self.operands if strides is not None)}

    def of(self, layout: Layout, **others: Any) -> View:
        """A layout with its operands; `others` in place of what it says of them."""
        given = {name: layout.operand(i) for name, i in self.places.items()} | others
        return View(layout, {name: given.get(name, ABSENT) for name, _ in self.operands})

    def view(self, shape: tuple[int, ...], reduced: tuple[int, ...], affine: tuple[int, ...]) -> View:
        """The layout over all operands."""
        present = (strides for _, strides in self.operands if strides is not None)
        layout = coalesce(shape, (self.order, *present), reduced, affine)
        if layout.kept:
            return self.of(layout)
        # A single row, in tiles of several as a batch of them: addresses have the shape of the tile all the same.
        rows = {name: ((0,), *layout.operand(i)[1:]) for name, i in self.places.items() if name != "W"}
        return self.of(layout, **rows)

    def planes(self, base: View, itemsize: int, acc_bytes: int, streams: int) -> tuple[Tile, View] | None:
        """With the batch counted as a, where planes of a batch are averaged over, and the tile: a piece of several
        planes, at constant distances; see Layout.of_planes()."""
        planes = base.layout.of_planes()
        tile = None if planes is None else plane_tile(planes, itemsize, acc_bytes, streams)
        return None if planes is None or tile is None else (tile, self.of(planes))

    def folded(self, base: View, itemsize: int) -> View | None:
        """Folded, see Layout.folded(); planes only where it allows wider accesses and they cannot be read 8 bytes at a
        time: else a tile of planes has no idle lanes."""
        places = self.places
        params = places.get("W")
        found = base.layout.folded([0, *(i for name, i in places.items() if name != "W")], params)
        if found is None:
            return None
        if not found.shared:
            return self.of(found)
        narrow = vector(base.layout, itemsize)
        if vector(found, itemsize) <= narrow or narrow * itemsize >= 8:
            return None
        return self.of(found, **({} if params is None else {"W": (*base.layout.operand(params), found.divisors)}))

    def of_groups(self, base: View, itemsize: int) -> View:
        """For programs that hold whole groups: folded, where it allows wider accesses, and blocks of whole groups."""
        found = self.folded(base, itemsize)
        if found is None or vector(found.layout, itemsize) <= vector(base.layout, itemsize):
            return base
        return found if column_blocks(found.layout, itemsize) else base

    def of_columns(self, base: View, itemsize: int) -> View | None:
        """With kept points side by side in memory and all that is averaged over around them, so that a program can walk
        along a block of columns; None where memory does not run so."""
        if not base.layout.runs:
            return None
        found = self.folded(base, itemsize) if base.layout.runs[-1].reduced else base
        if found is None:
            return None
        layout, columns = found.layout, found.layout.runs[-1]
        # Columns that are a batch themselves are rows that lie across memory: their bits do not depend on others.
        if columns.reduced or layout.runs_of(columns.letter) != (columns,) or layout.batch == columns.letter:
            return None
        return found if layout.extent("a") == 1 < layout.extent("s") else None
