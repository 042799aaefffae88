"""The algebra of axis groups: shapes and strides in, runs of memory out.  Pure Python.

Every axis of x is kept (K) or reduced (R), and the affine parameters vary along it (a) or not.  Sorted by stride,
axes of size 1 dropped and neighbours merged that lie in memory like one axis, they spell the *pattern* of a call:
``RKaR`` is BatchNorm of a contiguous tensor, ``KRKaRa`` GroupNorm of a channels_last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple


class Run(NamedTuple):
    """Axes that lie in memory like one: its size, its kind, and its stride in each operand."""

    size: int
    reduced: bool
    affine: bool
    strides: tuple[int, ...]

    @property
    def letter(self) -> str:
        """The coordinate of the kernels it belongs to: m, c, a or s."""
        return {(False, False): "m", (False, True): "c", (True, True): "a", (True, False): "s"}[
            self.reduced, self.affine
        ]


@dataclass(frozen=True)
class Layout:
    """Runs from the outermost to the innermost in memory; neighbours differ in kind or do not join."""

    runs: tuple[Run, ...]
    fold: int = 1
    """Neighbours along the innermost run, a kept one, that share a mean all the same, see :meth:`folded`."""
    shared: bool = False
    """Whether those share their parameters too."""
    batch: str = ""
    """The coordinate of the first axis of x, though its size be 1: what a tile may not depend on, if it is kept."""

    @cached_property
    def pattern(self) -> str:
        return "".join(("R" if r.reduced else "K") + ("a" if r.affine else "") for r in self.runs) or "1"

    @cached_property
    def letters(self) -> str:
        return "".join(r.letter for r in self.runs)

    def runs_of(self, letter: str) -> tuple[Run, ...]:
        return tuple(r for r in self.runs if r.letter == letter)

    def extent(self, letter: str) -> int:
        return prod(r.size for r in self.runs_of(letter))

    @property
    def group(self) -> int:
        """Number of elements that share a mean."""
        return self.extent("a") * self.extent("s") * self.fold

    @property
    def kept(self) -> bool:
        """Whether any axis is kept; a single group has none."""
        return any(not run.reduced for run in self.runs)

    @property
    def groups(self) -> int:
        return self.extent("m") * self.extent("c") // self.fold

    @property
    def numel(self) -> int:
        return self.group * self.groups

    def sizes(self, letter: str) -> tuple[int, ...]:
        """Sizes of a coordinate's runs; the outermost run of the layout is written 0, for its size is given at run
        time (unless it is the innermost too: then its divisibility decides the width of every access)."""
        outer = self.runs[0] if len(self.runs) > 1 else None
        return tuple(0 if r is outer else r.size for r in self.runs_of(letter)) or (1,)

    def strides(self, operand: int, letter: str) -> tuple[int, ...]:
        """Strides of a coordinate's runs in an operand; () where the operand does not vary along it."""
        strides = tuple(r.strides[operand] for r in self.runs_of(letter))
        return strides if any(strides) else ()

    @property
    def space(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.sizes(letter) for letter in "mcas")

    @property
    def outer(self) -> int:
        """The extent that the kernels take at run time."""
        return self.runs[0].size if self.runs else 1

    def folded(self, streams: Iterable[int], params: int | None) -> Layout | None:
        """This layout with its innermost reduced run counted among the kept one around it, whose pieces are short and
        odd: the channels of a GroupNorm of a channels_last tensor, the pixels of a BatchNorm of 7 x 7 planes.

        Both are then one run of columns that lies in memory without gaps, and `fold` columns make a group.  None where
        they are not one run in every operand of x's size (`streams`), or nothing else is averaged over.
        """
        if len(self.runs) < 3:
            return None
        kept, inner = self.runs[-2:]
        if kept.reduced or not inner.reduced or self.runs_of(kept.letter) != (kept,) or self.batch == kept.letter:
            return None
        shared = inner.letter == "s"
        others = self.extent("s") // (inner.size if shared else 1)
        if others == 1 or (self.groups != kept.size if shared else self.runs_of("a") != (inner,)):
            return None
        operands = [*streams, *((params,) if params is not None and not shared else ())]
        if any(kept.strides[o] != inner.size * inner.strides[o] for o in operands):
            return None
        columns = Run(kept.size * inner.size, False, kept.affine, inner.strides)
        return Layout((*self.runs[:-2], columns), inner.size, shared, self.batch)

    def of_planes(self) -> Layout | None:
        """This layout with the outer run of s counted as a, along which no parameter runs, where s is the planes of a
        batch: a BatchNorm of a contiguous tensor."""
        if self.fold > 1 or self.letters not in ("scs", "sms"):
            return None
        return Layout((self.runs[0]._replace(affine=True), *self.runs[1:]), batch="a")

    @property
    def divisors(self) -> tuple[int, int]:
        """How many neighbours along m and along c share what each group has one of."""
        return (self.fold, 1) if self.letters[-1:] == "m" else (1, self.fold)

    def operand(self, operand: int) -> tuple[tuple[int, ...], ...]:
        """The strides of an operand as kernels take them; a constant operand has one stride, 0."""
        strides = tuple(self.strides(operand, letter) for letter in "mcas")
        if any(strides):
            return strides
        return ((0,) * max(1, len(self.runs_of("m"))), (), (), ())

    def statistics(self) -> tuple[tuple[int, ...], ...]:
        """Strides of mean and rstd, which are dense in the order of the kept runs in memory."""
        found: dict[Run, int] = {}
        step = 1
        for run in reversed(self.runs):
            if not run.reduced:
                found[run] = step
                step *= run.size // (self.fold if run is self.runs[-1] else 1)
        result = (*(tuple(found[r] for r in self.runs_of(letter)) for letter in "mc"), (), ())
        if self.fold > 1:
            return (*result, self.divisors)
        return result if any(result) else ((0,), (), (), ())

    def reach(self) -> int:
        """The largest offset of an element in any operand."""
        operands = range(len(self.runs[0].strides)) if self.runs else ()
        return max((sum((r.size - 1) * abs(r.strides[o]) for r in self.runs) for o in operands), default=0)


def split(strides: Sequence[int], factors: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Strides of a tensor whose axes are split into factors: stride s of (g, c) becomes (c·s, s)."""
    out: list[int] = []
    for stride, sizes in zip(strides, factors, strict=True):
        for i in range(len(sizes)):
            out.append(stride * prod(sizes[i + 1 :]))
    return tuple(out)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def follows(strides: Sequence[int], order: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether strides never grow where `order` (the strides of another operand) shrinks: both walk memory alike."""
    axes = sorted((i for i, n in enumerate(shape) if n != 1), key=lambda i: -order[i])
    seen = [strides[i] for i in axes if strides[i] != 0]
    return all(s > 0 for s in seen) and all(a >= b for a, b in pairwise(seen))


@lru_cache(maxsize=4096)
def coalesce(
    shape: tuple[int, ...],
    operands: tuple[tuple[int, ...], ...],
    reduced: tuple[int, ...],
    affine: tuple[int, ...] = (),
) -> Layout:
    """The layout of a call.  `operands` are strides; the first sorts the axes (the output's: it has no overlaps)."""
    runs: list[Run] = []
    axes: Iterable[int] = (i for i, n in enumerate(shape) if n != 1)
    for i in sorted(axes, key=lambda i: -abs(operands[0][i])):
        run = Run(shape[i], i in reduced, i in affine, tuple(strides[i] for strides in operands))
        last = runs[-1] if runs else None
        if (
            last
            and (last.reduced, last.affine) == (run.reduced, run.affine)
            and all(o == run.size * n for o, n in zip(last.strides, run.strides, strict=True))
        ):
            runs[-1] = Run(last.size * run.size, run.reduced, run.affine, run.strides)
        else:
            runs.append(run)
    first = Run(1, 0 in reduced, 0 in affine, ()).letter
    return Layout(tuple(runs), batch=first)
