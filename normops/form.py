"""What a norm does whatever the sizes, as two strings: how the registered operators and the transforms are told.

``"d0 (d1 d2) d3 -> d0 d1"`` is a pattern (see :mod:`normops.pattern`) with names in order; of an axis that is split,
all names but the last have a length.  ``"d1 d2"`` names what weight and bias vary along.  No size of x is in it, so
one form serves every batch, and any part of a tensor that is cut along a kept axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from .layout import split
from .pattern import parse_groups

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    ranks: tuple[int, ...]
    """How many axes each axis of x splits into."""
    reduced: tuple[int, ...]
    """Axes of the split shape that are averaged over."""
    affine: tuple[int, ...]
    """Axes of the split shape along which weight and bias vary, in the order of the weight's axes."""

    @property
    def strings(self) -> tuple[str, str]:
        """(pattern, affine)."""
        names = [f"d{i}" for i in range(sum(self.ranks))]
        left, at = [], 0
        for rank in self.ranks:
            inner = names[at : at + rank]
            left.append(inner[0] if rank == 1 else f"({' '.join(inner)})")
            at += rank
        kept = [name for i, name in enumerate(names) if i not in self.reduced]
        return f"{' '.join(left)} -> {' '.join(kept)}", " ".join(names[i] for i in self.affine)

    @staticmethod
    def read(pattern: str, affine: str) -> Form:
        """The form that these strings are of.  ValueError for a malformed pattern."""
        sides = pattern.split("->")
        if len(sides) != 2:
            raise ValueError(f"pattern must have one '->', got {pattern!r}")
        left, right, params = (
            parse_groups(text, side, pattern)
            for text, side in ((sides[0], "left side"), (sides[1], "right side"), (affine, "affine"))
        )
        place = {name: i for i, name in enumerate(name for group in left for name in group)}
        kept = {name for group in right for name in group}
        unknown = {name for group in (*right, *params) for name in group} - place.keys()
        if unknown or () in left:
            raise ValueError(
                f"pattern {pattern!r}, affine {affine!r}: unknown names {sorted(unknown)}, or an axis without a name"
            )
        reduced = tuple(i for name, i in place.items() if name not in kept)
        return Form(tuple(map(len, left)), reduced, tuple(place[name] for group in params for name in group))

    def batched(self, params: bool) -> Form:
        """With one more kept axis before all others, along which weight and bias vary too or not."""
        shift = (i + 1 for i in self.affine)
        return Form((1, *self.ranks), tuple(i + 1 for i in self.reduced), (0, *shift) if params else tuple(shift))

    def factors(self, shape: Sequence[int], lengths: Iterable[int] | None) -> tuple[Sizes, ...]:
        """For each axis of x the sizes that it splits into.  ValueError where shape and lengths do not fit."""
        if len(shape) != len(self.ranks):
            raise ValueError(
                f"x must have {len(self.ranks)} axes, as {self.strings[0]!r} says, got shape {tuple(shape)}"
            )
        given = list(lengths or ())
        if len(given) != sum(self.ranks) - len(self.ranks):
            raise ValueError(
                f"lengths must be one for each name but the last of a split axis in {self.strings[0]!r}, got {given}"
            )
        found, at = [], 0
        for size, rank in zip(shape, self.ranks, strict=True):
            known = given[at : at + rank - 1]
            at += rank - 1
            if rank > 1 and (size % prod(known)):
                raise ValueError(f"an axis of size {size} must be a multiple of {prod(known)}, the product of {known}")
            found.append((*known, size // prod(known) if known else size))
        return tuple(found)

    def kept(self, factors: Sequence[Sizes]) -> Sizes:
        """The shape of mean and rstd: the sizes of the axes that are not averaged over."""
        return tuple(n for i, n in enumerate(n for sizes in factors for n in sizes) if i not in self.reduced)


def kept_strides(factors: Sequence[Sizes], order: Sequence[int], reduced: Iterable[int]) -> Sizes:
    """Strides of mean and rstd along the kept axes of the split shape: dense, in the order in which those lie in y,
    whose strides are `order`."""
    sizes = [n for parts in factors for n in parts]
    kept = [i for i in range(len(sizes)) if i not in set(reduced)]
    if len(kept) < 2:
        return (1,) * len(kept)  # without a look at a size that may not be known yet
    where = split(order, factors)
    strides, step = {}, 1
    for i in sorted(kept, key=lambda i: (where[i], -i)):
        strides[i] = step
        step *= sizes[i]
    return tuple(strides[i] for i in kept)
