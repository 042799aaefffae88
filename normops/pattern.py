"""einops-style patterns: which axes keep a statistic, and along which the parameters vary.  Standard library only.

``"n (g c) h w -> n g"`` names the axes of x on the left and those that keep a mean on the right; all the others are
averaged over.  Parentheses split an axis (left) or join axes (right, affine), ``1`` is an axis of size one, ``...``
stands for any number of axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from operator import index
from typing import NoReturn

ELLIPSIS = "..."
_TOKEN = re.compile(r"\s*(\.\.\.|[()]|[^\s().]+|\.)")
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern applied to a shape.  "Axes" count the unflattened tensor: the one whose axes are all the factors."""

    factors: tuple[tuple[int, ...], ...]
    """For each axis of x the sizes it splits into; ``(size,)`` where it is not split."""
    reduced: tuple[int, ...]
    """Axes that are averaged over, in ascending order."""
    affine_axes: tuple[int, ...]
    """Axes along which the parameters vary, in the order of their atomic dimensions."""
    affine_shape: tuple[int, ...]
    """The shape of weight and bias, joined axes multiplied; () without affine."""
    stat_shape: tuple[int, ...]
    """The shape of mean and rstd as the right side spells it."""
    stat_axes: tuple[int, ...]
    """Axes that keep a statistic, in the order of the right side."""


@dataclass(frozen=True, slots=True)
class _Syntax:
    left: Groups  # one group per axis of x; `1` is an empty group, `...` a group of its own
    right: Groups
    affine: Groups

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for group in self.left for name in group) - {ELLIPSIS}


def _fail(pattern: str, shape: tuple[int, ...] | None, message: str) -> NoReturn:
    where = f"pattern {pattern!r}" if shape is None else f"pattern {pattern!r} on shape {shape}"
    raise ValueError(f"{where}: {message}")


def parse_groups(text: str, side: str, pattern: str, shape: tuple[int, ...] | None = None) -> Groups:
    """``"n (g c) 1 ..."`` -> ``(("n",), ("g", "c"), (), ("...",))``; names are valid and occur once."""
    found: list[tuple[str, ...]] = []
    inner: list[str] | None = None
    for token in _TOKEN.findall(text):
        if token == "(":
            if inner is not None:
                _fail(pattern, shape, f"nested parentheses in {side} {text.strip()!r}; expected one level, as in (g c)")
            inner = []
        elif token == ")":
            if inner is None:
                _fail(pattern, shape, f"unbalanced parentheses in {side} {text.strip()!r}: ')' without '('")
            found.append(tuple(inner))
            inner = None
        elif token == "1":
            if inner is None:
                found.append(())
        elif token == ELLIPSIS and inner is not None:
            _fail(pattern, shape, f"'...' inside parentheses in {side} {text.strip()!r}; expected it outside")
        elif token != ELLIPSIS and not token.isidentifier():
            _fail(pattern, shape, f"{token!r} in {side} {text.strip()!r}; expected a name, 1, '...', '(' or ')'")
        elif inner is not None:
            inner.append(token)
        else:
            found.append((token,))
    if inner is not None:
        _fail(pattern, shape, f"unbalanced parentheses in {side} {text.strip()!r}: '(' without ')'")
    names = [name for group in found for name in group]
    for name in names:
        if names.count(name) > 1:
            _fail(pattern, shape, f"{name!r} is repeated in {side} {text.strip()!r}; expected each name once")
    return tuple(found)


def _syntax(
    pattern: str, affine: str | None, lengths: tuple[tuple[str, int], ...], shape: tuple[int, ...] | None
) -> _Syntax:
    sides = pattern.split("->")
    if len(sides) != 2:
        _fail(pattern, shape, f"expected one '->' as in 'n c h w -> n', got {len(sides) - 1}")
    left = parse_groups(sides[0], "left side", pattern, shape)
    right = parse_groups(sides[1], "right side", pattern, shape)
    params = () if affine is None else parse_groups(affine, "affine", pattern, shape)
    known = {name for group in left for name in group}
    for side, groups in (("right side", right), ("affine", params)):
        for name in (name for group in groups for name in group):
            if name not in known:
                _fail(pattern, shape, f"unknown name {name!r} in {side}; expected one of {sorted(known)}")
    if not known - {name for group in right for name in group}:
        _fail(pattern, shape, "nothing is reduced; expected a name of the left side to be missing on the right")
    for name, length in lengths:
        if name not in known:
            _fail(pattern, shape, f"length {name}={length} is not used; expected one of {sorted(known - {ELLIPSIS})}")
        if length < 0:
            _fail(pattern, shape, f"length {name}={length}; expected a size of at least 0")
    return _Syntax(left, right, params)


def _parse(pattern: str, shape: tuple[int, ...], affine: str | None, lengths: tuple[tuple[str, int], ...]) -> Pattern:
    syntax, given = _syntax(pattern, affine, lengths, shape), dict(lengths)
    spread = (ELLIPSIS,) in syntax.left
    rank = len(syntax.left) - spread
    if len(shape) < rank or (len(shape) > rank and not spread):
        _fail(pattern, shape, f"expected {'at least ' if spread else ''}{rank} axes, got {len(shape)}")

    factors: list[tuple[int, ...]] = []
    sizes: list[int] = []  # of the unflattened axes
    axes: dict[str, tuple[int, ...]] = {}  # what a name stands for: one axis, or those of the ellipsis
    for group in syntax.left:
        first, at = len(sizes), len(factors)
        if group == (ELLIPSIS,):
            extra = shape[at : at + len(shape) - rank]
            factors += [(n,) for n in extra]
            axes[ELLIPSIS] = tuple(range(first, first + len(extra)))
            sizes += extra
        else:
            split = _split(group, shape[at], at, given, pattern, shape)
            factors.append(split)
            axes.update((name, (first + i,)) for i, name in enumerate(group))
            sizes += split

    def expand(groups: Groups) -> tuple[tuple[int, ...], tuple[int, ...]]:
        flat = tuple(a for group in groups for name in group for a in axes[name])
        joined: list[int] = []
        for group in groups:
            members = [sizes[a] for name in group for a in axes[name]]
            joined += members if group == (ELLIPSIS,) else [prod(members)]
        return flat, tuple(joined)

    stat_axes, stat_shape = expand(syntax.right)
    affine_axes, affine_shape = expand(syntax.affine)
    if len({a for found in axes.values() for a in found} - set(stat_axes)) == 0:
        _fail(pattern, shape, "nothing is reduced: '...' stands for no axis here; expected at least one reduced axis")
    reduced = tuple(a for a in range(len(sizes)) if a not in stat_axes)
    return Pattern(tuple(factors), reduced, affine_axes, affine_shape, stat_shape, stat_axes)


def _split(
    group: tuple[str, ...], size: int, axis: int, given: dict[str, int], pattern: str, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The sizes of the names that an axis of x splits into, at most one of them inferred."""
    spelled = f"({' '.join(group)})" if len(group) > 1 else group[0] if group else "1"
    if not group:
        if size != 1:
            _fail(pattern, shape, f"axis {axis} has size {size}; expected 1")
        return (1,)
    unknown = [name for name in group if name not in given]
    if len(unknown) > 1:
        _fail(pattern, shape, f"lengths of {unknown} in {spelled} are unknown; expected all but one, as {unknown[0]}=…")
    known = prod([given[name] for name in group if name in given])
    told = ", ".join(f"{name}={given[name]}" for name in group if name in given)
    if unknown:
        if len(group) > 1 and (known == 0 or size % known):
            _fail(pattern, shape, f"axis {axis} {spelled} has size {size}; expected a multiple of {known} ({told})")
        given = {**given, unknown[0]: size // known}
    elif known != size:
        _fail(pattern, shape, f"axis {axis} {spelled} has size {size}; expected {known} ({told})")
    return tuple(given[name] for name in group)


def _key(lengths: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, index(n)) for name, n in lengths.items())) if lengths else ()


def parse(pattern: str, shape: tuple[int, ...], affine: str | None, lengths: Mapping[str, int]) -> Pattern:
    """Apply a pattern to the shape of x.

    Args:
        pattern: ``"n (g c) h w -> n g"``.  Left: a name, ``1`` or a group ``(g c)`` for each axis of x, at most one
            ``...``.  Right: the names that keep a statistic, in any order; what is missing is averaged over, ``...``
            too.
        shape: the shape of x.
        affine: the names that weight and bias vary along, ``"(g c)"`` for one of shape ``(g·c,)``; None without.
        lengths: sizes of names; all but one of a group must be known.

    Raises:
        ValueError: the pattern is malformed, does not fit the shape, reduces nothing, or a length is not used.
    """
    return _parse(pattern, tuple(shape), affine, _key(lengths))


def affine_shape(pattern: str, affine: str | None, lengths: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of weight and bias from the lengths alone, before any x is seen; checks the pattern's syntax too.

    Raises:
        ValueError: as `parse`, or a name in `affine` has no length.
    """
    syntax = _syntax(pattern, affine, _key(lengths), None)
    missing = sorted({name for group in syntax.affine for name in group} - lengths.keys())
    if missing:
        _fail(pattern, None, f"affine {affine!r} needs the lengths of all its names; expected {missing} as well")
    return tuple(prod(index(lengths[name]) for name in group) for group in syntax.affine)
