"""What a call is about: its norm, which says the axes that are averaged over, and its operands.

A norm is written as a pattern: ``"n (g c) h w -> n g"`` names the axes of x on the left and those that keep a mean on
the right; all the others are averaged over.  Parentheses split an axis (left) or join axes (right, affine), ``1`` is an
axis of size one, ``...`` stands for any number of axes.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from operator import index
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .layout import dense_strides, split

ELLIPSIS = "..."
OPTIONS = (
    "affine", "eps", "center", "activation", "pre_add", "post_add", "return_stats", "out_dtype", "weight", "bias",
    "device", "dtype",
)  # fmt: skip
"""What else stands beside lengths in a call: what a misspelt one may have meant."""
_TOKEN = re.compile(r"\([^()]*\)|\.\.\.|[^\s().]+|[().]")
Sizes = tuple[int, ...]
Groups = tuple[tuple[str, ...], ...]
Needs = tuple[bool, bool, bool, bool]
"""Which of dx, dw, db and dpost are wanted."""


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PIECE = 32
"""Pieces of a workspace start at multiples of this many elements: aligned alike, whatever the shape."""


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: fp32, or fp64 for fp64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def placed(pieces: tuple[tuple[str, int], ...]) -> tuple[dict[str, int], int]:
    """Where each piece of a workspace starts, and the elements of all of them."""
    starts, end = {}, 0
    for name, elements in pieces:
        starts[name] = end
        end += -(-elements // PIECE) * PIECE
    return starts, end


class Operands(NamedTuple):
    """The tensors of a call."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    pre_add: Tensor | None = None
    post_add: Tensor | None = None
    running_mean: Tensor | None = None
    """These two stand in for the statistics of x where a norm is `given` them, and move towards those elsewhere."""
    running_var: Tensor | None = None


class Norm(NamedTuple):
    """All that is meant by a norm.  Axes count the split shape: that of x with every axis split into its factors."""

    factors: tuple[Sizes, ...]
    """For each axis of x the sizes it splits into; ``(size,)`` where it is not split."""
    reduced: Sizes
    """Axes that are averaged over, in ascending order."""
    affine: Sizes
    """Axes along which weight and bias vary, in the order of their own axes."""
    center: bool = True
    """False for RMS: the mean stays."""
    activation: str = "identity"
    given: bool = False
    """Statistics are given, and are not those of x."""
    affine_shape: Sizes | None = None
    """What weight and bias broadcast to; None where only the number of their elements counts."""
    round_first: bool = False
    """Whether xhat is rounded to the dtype of x before it is multiplied by weight."""
    kept: tuple[Sizes, ...] = ()
    """Axes that keep a statistic, as the right side of the pattern orders and joins them."""

    @property
    def shape(self) -> Sizes:
        return tuple(n for sizes in self.factors for n in sizes)

    @property
    def kept_shape(self) -> Sizes:
        """The shape of mean and rstd, in the order of x's axes."""
        return tuple(n for i, n in enumerate(self.shape) if i not in self.reduced)

    def kept_strides(self, order: Sequence[int]) -> Sizes:
        """Strides of mean and rstd: dense, in the order in which their axes lie in y, whose strides are `order`."""
        sizes = self.shape
        kept = [i for i in range(len(sizes)) if i not in self.reduced]
        if len(kept) < 2:
            return (1,) * len(kept)  # without a look at a size that may not be known yet
        where = split(order, self.factors)
        strides, step = {}, 1
        for i in sorted(kept, key=lambda i: (where[i], -i)):
            strides[i] = step
            step *= sizes[i]
        return tuple(strides[i] for i in kept)

    @property
    def statistics(self) -> tuple[tuple[str, int], ...]:
        """(name, elements) of what a forward leaves for the backward, in the memory order of the kept axes of y."""
        groups = prod(self.kept_shape)
        return (("mean", groups), ("rstd", groups)) if self.center else (("rstd", groups),)

    @property
    def weight_strides(self) -> Sizes:
        """Of weight and bias, which are dense, in the split shape; 0 where they do not vary."""
        strides = dict(zip(self.affine, dense_strides(tuple(self.shape[i] for i in self.affine)), strict=True))
        return tuple(strides.get(i, 0) for i in range(len(self.shape)))

    @property
    def written(self) -> tuple[str, str, Sizes | None, bool]:
        """pattern, affine, lengths and center: how operators are told.  No size of x is in them, so that they serve
        every batch, and any part of a tensor that is cut along a kept axis."""
        names = [f"d{i}" for i in range(len(self.shape))]
        left, at = [], 0
        for sizes in self.factors:
            inner = " ".join(names[at : at + len(sizes)])
            left.append(inner if len(sizes) == 1 else f"({inner})")
            at += len(sizes)
        kept = [name for i, name in enumerate(names) if i not in self.reduced]
        empty = any(n.__class__ is int and n == 0 for sizes in self.factors for n in sizes[:-1])
        known = [sizes if empty and len(sizes) > 1 else sizes[:-1] for sizes in self.factors]  # of 0 none is inferred
        lengths = tuple(n for sizes in known for n in sizes)
        affine = " ".join(names[i] for i in self.affine)
        return f"{' '.join(left)} -> {' '.join(kept)}", affine, lengths or None, self.center


def laid_out(norm: Norm, operands: Operands) -> Operands:
    """The operands as kernels and operators take them: parameters dense, the others of x's shape."""
    x, weight, bias, pre_add, post_add, *running = operands
    wanted = norm.affine_shape

    def parameter(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if wanted is not None and t.shape != wanted:
            t = t.expand(wanted)
        if wanted is not None and len(wanted) > len(norm.affine):
            t = t.reshape([norm.shape[i] for i in norm.affine])
        return t.contiguous()

    adds = (t if t is None or t.shape == x.shape else t.expand(x.shape) for t in (pre_add, post_add))
    return Operands(x, parameter(weight), parameter(bias), *adds, *running)


def whole(n: Any, name: str) -> int:
    """n as an int, as which NumPy's integers and others count too (none of which a norm may hold)."""
    if isinstance(n, (int, torch.SymInt)):
        return n  # type: ignore[return-value]
    try:
        return index(n)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {n!r}") from None


def real(n: Any, name: str) -> float:
    """n as a float, as which integers and NumPy's numbers count too, but no text."""
    known = isinstance(n, (float, int, torch.SymFloat, torch.SymInt))  # compilers look at no attributes of theirs
    if not known and (isinstance(n, str) or not hasattr(n, "__float__")):
        raise TypeError(f"{name} must be a float, got {n!r}")
    return float(n)


def flag(value: Any, name: str) -> bool:
    """value as a bool, as which only what equals one counts."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, Hashable) or value not in (True, False):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return bool(value)


def _fail(pattern: str, message: str, shape: Sequence[int] | None = None) -> NoReturn:
    raise ValueError(f"pattern {pattern!r}{'' if shape is None else f' on shape {tuple(shape)}'}: {message}")


def _groups(text: str, side: str, pattern: str) -> Groups:
    """``"n (g c) 1 ..."`` -> ``(("n",), ("g", "c"), (), ("...",))``; names are valid and occur once."""
    text, found = text.strip(), []
    for token in _TOKEN.findall(text):
        if token in ("(", ")"):
            _fail(pattern, f"unbalanced or nested parentheses in {side} {text!r}; expected one level, as in (g c)")
        inner = token[0] == "("
        names = token[1:-1].split() if inner else [token]
        for name in names:
            if not (name.isidentifier() or name == "1" or (name == ELLIPSIS and not inner)):
                expected = "a name or 1 inside parentheses" if inner else "a name, 1, '...', '(' or ')'"
                _fail(pattern, f"{name!r} in {side} {text!r}; expected {expected}")
        found.append(tuple(name for name in names if name != "1"))
    names = [name for group in found for name in group]
    for name in names:
        if names.count(name) > 1:
            _fail(pattern, f"{name!r} is repeated in {side} {text!r}; expected each name once")
    return tuple(found)


def _syntax(pattern: str, affine: str | None) -> tuple[Groups, Groups, Groups]:
    """The left side, the right side and what parameters vary along."""
    if affine is not None and not isinstance(affine, str):
        raise TypeError(f"affine must be a str or None, got {affine!r}")
    sides = pattern.split("->")
    if len(sides) != 2:
        _fail(pattern, f"expected one '->' as in 'n c h w -> n', got {len(sides) - 1}")
    left, right = _groups(sides[0], "left side", pattern), _groups(sides[1], "right side", pattern)
    params = _groups(affine or "", "affine", pattern)
    known = {name for group in left for name in group}
    for side, groups in (("right side", right), ("affine", params)):
        for name in (name for group in groups for name in group):
            if name not in known:
                _fail(pattern, f"unknown name {name!r} in {side}; expected one of {sorted(known)}")
    if not known - {name for group in right for name in group}:
        _fail(pattern, "nothing is reduced; expected a name of the left side to be missing on the right")
    return left, right, params


# As torch.compiler.assume_constant_result says it, without the import of Dynamo: a compiler need not look inside.
_syntax._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _lengths(left: Groups, lengths: Mapping[str, int] | Sequence[int] | None, pattern: str) -> dict[str, int]:
    """The length of each name that has one."""
    if not isinstance(lengths, Mapping):
        names = [name for group in left for name in group[:-1]]
        every = [name for group in left for name in group if len(group) > 1]
        if len(lengths or ()) not in (len(names), len(every)):
            _fail(pattern, f"lengths must be one for each name but the last of a split axis, {names}, got {lengths}")
        return dict(zip(every if len(lengths or ()) == len(every) else names, lengths or (), strict=True))
    known = {name for group in left for name in group} - {ELLIPSIS}
    for name, length in lengths.items():
        if name not in known:
            near = get_close_matches(name, [*known, *OPTIONS], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            _fail(pattern, f"length {name}={length} is not used; expected one of {sorted(known)}{hint}")
        if whole(length, f"length {name}") < 0:
            _fail(pattern, f"length {name}={length}; expected a size of at least 0")
    return {name: whole(length, name) for name, length in lengths.items()}


def _split(
    group: tuple[str, ...], axis: int, given: dict[str, int], pattern: str, shape: Sequence[int]
) -> Sizes:
    """The sizes of the names that an axis of x splits into, at most one of them inferred."""
    size = shape[axis]
    if not group:
        if size != 1:
            _fail(pattern, f"axis {axis} has size {size}; expected 1", shape)
        return (1,)
    unknown = [name for name in group if name not in given]
    if len(group) == 1 and unknown:
        return (size,)  # which a compiler may not know yet
    spelled = f"({' '.join(group)})" if len(group) > 1 else group[0]
    if len(unknown) > 1:
        _fail(pattern, f"lengths of {unknown} in {spelled} are unknown; expected all but one, as {unknown[0]}=…", shape)
    known = prod([given[name] for name in group if name in given])
    if (known == 0 or size % known) if unknown else known != size:
        told = ", ".join(f"{name}={given[name]}" for name in group if name in given)
        expected = f"a multiple of {known}" if unknown else known
        _fail(pattern, f"axis {axis} {spelled} has size {size}; expected {expected} ({told})", shape)
    return tuple(given[name] if name in given else size // known for name in group)


def parse(
    pattern: str, shape: Sequence[int], affine: str | None, lengths: Mapping[str, int] | Sequence[int] | None
) -> Norm:
    """Apply a pattern to the shape of x.

    Args:
        pattern: ``"n (g c) h w -> n g"``.  Left: a name, ``1`` or a group ``(g c)`` for each axis of x, at most one
            ``...``.  Right: the names that keep a statistic, in any order; what is missing is averaged over, ``...``
            too.
        shape: the shape of x.
        affine: the names that weight and bias vary along, ``"(g c)"`` for one of shape ``(g·c,)``; None without.
        lengths: sizes by name, all but one of a group; or in order, those of all names of split axes, or of all but
            the last of each.

    Raises:
        ValueError: the pattern is malformed, does not fit the shape, reduces nothing, or a length is not used.
    """
    left, right, params = _syntax(pattern, affine)
    given = _lengths(left, lengths, pattern)
    spread = (ELLIPSIS,) in left
    rank = len(left) - spread
    if len(shape) < rank or (len(shape) > rank and not spread):
        _fail(pattern, f"expected {'at least ' if spread else ''}{rank} axes, got {len(shape)}", shape)

    factors: list[Sizes] = []
    sizes: list[int] = []  # of the split shape
    axes: dict[str, Sizes] = {}  # what a name stands for: one axis, or those of the ellipsis
    for group in left:
        first, at = len(sizes), len(factors)
        if group == (ELLIPSIS,):
            found: list[Sizes] = [(n,) for n in shape[at : at + len(shape) - rank]]
            axes[ELLIPSIS] = tuple(range(first, first + len(found)))
        else:
            found = [_split(group, at, given, pattern, shape)]
            axes.update((name, (first + i,)) for i, name in enumerate(group))
        factors += found
        sizes += [n for parts in found for n in parts]

    def places(groups: Groups) -> tuple[Sizes, ...]:
        found: list[Sizes] = []
        for group in groups:
            inner = tuple(a for name in group for a in axes[name])
            found += [(a,) for a in inner] if group == (ELLIPSIS,) else [inner]
        return tuple(found)

    kept, varying = places(right), places(params)
    flat = [a for group in kept for a in group]
    if len({a for found in axes.values() for a in found}.difference(flat)) == 0:
        _fail(pattern, "nothing is reduced: '...' stands for no axis here; expected at least one reduced axis", shape)
    return Norm(
        tuple(factors), tuple(a for a in range(len(sizes)) if a not in flat), tuple(a for g in varying for a in g),
        affine_shape=tuple(prod([sizes[a] for a in group]) for group in varying), kept=kept,
    )  # fmt: skip


def affine_shape(pattern: str, affine: str | None, lengths: Mapping[str, int]) -> Sizes:
    """The shape of weight and bias from the lengths alone, before any x is seen; checks the pattern's syntax too.

    Raises:
        ValueError: as `parse`, or a name in `affine` has no length.
    """
    left, _, params = _syntax(pattern, affine)
    given = _lengths(left, lengths, pattern)
    missing = sorted({name for group in params for name in group} - given.keys())
    if missing:
        _fail(pattern, f"affine {affine!r} needs the lengths of all its names; expected {missing} as well")
    return tuple(prod(index(given[name]) for name in group) for group in params)


def batched(pattern: str, affine: str, params: bool) -> tuple[str, str]:
    """A pattern with one more kept axis before all others, along which weight and bias vary too or not."""
    left, right = pattern.split("->")
    name = f"v{len(pattern)}"  # longer than any inside
    return f"{name} {left}-> {name} {right}", f"{name} {affine}" if params else affine
