"""Random calls of ``normalize``: how they are drawn and run, and what float64 says of them.

The form of a call is drawn; its values are random numbers of a seed, so that hypothesis shrinks shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import normops
from normops import schedule
from tests.tolerance import ACTIVATIONS, ENGINES, TINY, check, leaf, oracle

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
"""Where a derivative jumps: a rounding of z decides which one an element takes."""
Axes = tuple[int, ...]
Tensors = dict[str, Tensor]


class Placed(NamedTuple):
    """A tensor in memory."""

    shape: Axes
    dtype: torch.dtype
    order: Axes = ()
    """Its axes, the outermost first; () for a contiguous tensor."""
    steps: Axes = ()
    """Of each axis: every how many elements of memory one is taken."""
    expanded: frozenset[int] = frozenset()
    offset: int = 0
    """Elements before the first."""
    times: float = 1.0
    middle: float = 0.0
    """Values are `times` a random number, plus this."""
    whole: bool = False
    """Whether those numbers are integers, of a deviation of 4; else it is 1."""

    def tensor(self) -> Tensor:
        if not self.order:
            return self._values(self.shape)
        steps = [1 if i in self.expanded else step for i, step in enumerate(self.steps)]
        sizes = [1 if i in self.expanded else n * steps[i] for i, n in enumerate(self.shape)]
        memory = self._values((self.offset + prod(sizes),))[self.offset :]
        t = memory.view([sizes[i] for i in self.order]).permute([self.order.index(i) for i in range(len(sizes))])
        return t[tuple(slice(None, None, step) for step in steps)].expand(self.shape)

    def _values(self, shape: Axes) -> Tensor:
        t = torch.randn(shape)
        return ((4 * t).round() if self.whole else t).mul(self.times).add(self.middle).to(DEVICE, self.dtype)


@dataclass(frozen=True)
class Call:
    """A call of ``normalize``, with what it means."""

    factors: tuple[Axes, ...]
    """The sizes that each axis of x splits into."""
    reduced: Axes
    """Of the axes of the split shape, as all that follow."""
    kept: tuple[Axes, ...]
    """Axes that keep a statistic, in the order of its own axes."""
    varying: Axes | None
    """Axes of the parameters, in the order of their own; None where they broadcast."""
    axes: Any
    options: dict[str, Any]
    operands: dict[str, Placed]
    leaves: frozenset[str]
    limits: dict[str, Any] = field(default_factory=dict)
    """What the schedule is forced to."""
    seed: int = 0

    @property
    def shape(self) -> Axes:
        return tuple(prod(sizes) for sizes in self.factors)

    @property
    def split(self) -> Axes:
        return tuple(n for sizes in self.factors for n in sizes)

    def tensors(self) -> Tensors:
        torch.manual_seed(self.seed)
        return {name: placed.tensor() for name, placed in self.operands.items()}

    def run(self, made: Tensors, back: Callable[[Tensors], Tensors] | None = None, **options: Any) -> Tensors:
        """All that comes out, with the gradients of the leaves as "dx", "dweight", …; `back` says what flows back, into
        "y" and "sum" (random numbers without)."""
        made = {name: t.detach().requires_grad_(name in self.leaves) for name, t in made.items()}
        with schedule.forced(**self.limits) if self.limits else nullcontext():
            found = normops.normalize(**made, axes=self.axes, **self.options | options)
            names = ["y", *["sum"] * ("pre_add" in made), *["mean", "rstd"] * self.options["return_stats"]]
            out = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))
            out = {name: t for name, t in out.items() if t is not None}
            flowing = [name for name in ("y", "sum") if name in out and out[name].requires_grad]
            wanted = [name for name in made if name in self.leaves]
            if flowing:
                torch.manual_seed(self.seed + 1)
                given = (back or (lambda out: {name: torch.randn_like(out[name]) for name in flowing}))(out)
                gradients = torch.autograd.grad(
                    [out[n] for n in flowing], [made[n] for n in wanted], [given[n] for n in flowing]
                )
                out |= {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}
        return {name: t.detach() for name, t in out.items()}

    def spread(self, name: str, t: Tensor) -> Tensor:
        """An operand in the split shape, of every element."""
        split = self.split
        if name not in ("weight", "bias") or self.varying is None:
            return t.expand(self.shape).reshape(split)
        order = sorted(range(len(self.varying)), key=self.varying.__getitem__)
        t = t.reshape([split[a] for a in self.varying]).permute(order)
        return t.reshape([n if a in self.varying else 1 for a, n in enumerate(split)]).expand(split)


def expected(call: Call, made: Tensors, out: Tensors, flowing: Tensors) -> dict[str, tuple[Tensor, Tensor]]:
    """What float64 says of all that came out, and how large the terms are that it is a sum of: roundings are relative
    to these, where terms cancel.  They follow from the formula and its gradient, with sizes in place of numbers."""
    options, split, axes = call.options, call.split, call.reduced
    exact = {name: leaf(t) for name, t in made.items()}
    whole = {name: call.spread(name, t) for name, t in exact.items()}
    x, w, b, pre, post = (whole.get(name) for name in ("x", "weight", "bias", "pre_add", "post_add"))
    total = None if "sum" not in out else out["sum"].reshape(split)
    y, s = oracle(
        x, axes, w, b, eps=options["eps"], center=options["center"], activation=options["activation"], pre_add=pre,
        post_add=post, total=total,
    )  # fmt: skip
    used = s.detach() if total is None else total.double()
    mean = used.mean(axes, keepdim=True)
    less = mean if options["center"] else torch.zeros_like(mean)
    rstd = ((used - less).square().mean(axes, keepdim=True) + options["eps"]).rsqrt()
    xhat = ((used - less).abs() + used.abs() + less.abs()) * rstd
    scale = torch.ones_like(xhat) if w is None else w.detach().abs()
    z = xhat * scale + sum(t.detach().abs() for t in (b, post) if t is not None)
    found = {"y": (y, z), "sum": (s, s.abs()), "mean": (mean, used.abs().mean(axes, keepdim=True))}
    found["rstd"] = rstd, rstd * (1 + xhat.square().mean(axes, keepdim=True))
    for name in ("mean", "rstd"):
        order = [a for group in call.kept for a in group]
        sizes = [prod(split[a] for a in group) for group in call.kept]
        found[name] = tuple(t.permute(*order, *axes).reshape(sizes) for t in found[name])  # type: ignore[assignment]
    for name in ("y", "sum"):
        found[name] = tuple(t.detach().reshape(call.shape) for t in found[name])  # type: ignore[assignment]

    wanted = [name for name in made if f"d{name}" in out]
    if wanted:
        given = {name: t.double().reshape(split) for name, t in flowing.items()}
        pairs = [(t, given[name]) for name, t in (("y", y), ("sum", s)) if name in given and t.requires_grad]
        outputs, cotangents = zip(*pairs, strict=True)
        values = torch.autograd.grad(outputs, [exact[name] for name in wanted], cotangents)
        g = given["y"].abs() * (1 + z)
        h = g * scale
        dx = rstd * (h + h.mean(axes, keepdim=True) + xhat * (h * xhat).mean(axes, keepdim=True))
        dx = dx + (given["sum"].abs() if "sum" in given else 0)
        terms = {"x": dx, "pre_add": dx, "weight": g * xhat, "bias": g, "post_add": g}
        for name, value in zip(wanted, values, strict=True):  # what is spread over elements adds theirs up
            (size,) = torch.autograd.grad(call.spread(name, exact[name]), exact[name], terms[name])
            found[f"d{name}"] = value, size
    return found


def flowing_back(call: Call, made: Tensors) -> Callable[[Tensors], Tensors]:
    """Random numbers, but 0 into elements of y that roundings may send to the other side of a kink."""

    def back(out: Tensors) -> Tensors:
        given = {name: torch.randn_like(out[name]) for name in ("y", "sum") if name in out}
        kinks = KINKS.get(call.options["activation"], ())
        if kinks:
            flat = replace(call, options=call.options | {"activation": None})
            z, size = expected(flat, made, {name: t.detach() for name, t in out.items()}, {})["y"]
            for kink in kinks:
                given["y"][(z - kink).abs() < 1e-5 * (1 + size)] = 0
        return given

    return back


def close(call: Call, name: str, got: Tensor, value: Tensor, size: Tensor, scale: float = 1.0) -> None:
    """Whether `got` is `value` up to the roundings of terms of this size, in the precision of the statistics."""
    of_value, of_terms = (float(t.square().mean().sqrt()) for t in (value, size))
    double = torch.float64 in (call.operands["x"].dtype, *(p.dtype for n, p in call.operands.items() if n == "pre_add"))
    coarser = torch.float32 if got.dtype == torch.float64 and not double else None
    check(name, got, value, scale * max(1.0, of_terms / max(of_value, 1e-30)), coarser)


def agrees(call: Call) -> None:
    """Everything that comes out of a call is what float64 says."""
    made = call.tensors()
    back, flowing = flowing_back(call, made), {}
    out = call.run(made, lambda out: flowing.update(back(out)) or flowing)
    y = out["y"]
    assert y.shape == call.shape and y.stride() == torch.empty_like(made["x"]).stride()
    assert y.dtype == (call.options["out_dtype"] or made["x"].dtype)
    for name in call.leaves:
        assert out[f"d{name}"].dtype == made[name].dtype and out[f"d{name}"].shape == made[name].shape
    if y.numel():
        found = expected(call, made, out, flowing)
        for name, got in out.items():
            close(call, name, got, *found[name])
    else:
        assert not any(out[f"d{name}"].any() for name in call.leaves), "nothing adds nothing"


def joined(draw: Any, names: Sequence[str], stands: dict[str, Axes]) -> tuple[str, tuple[Axes, ...]]:
    """Names in any order, some of them joined by parentheses; with the axes of each that comes of it."""
    groups: list[list[str]] = []
    for name in draw(st.permutations(names)):
        if groups and "..." not in (name, *groups[-1]) and draw(st.integers(0, 3)) == 0:
            groups[-1].append(name)
        else:
            groups.append([name])
    axes: list[Axes] = []
    for group in groups:
        found = tuple(a for name in group for a in stands[name])
        axes += [(a,) for a in found] if group == ["..."] else [found]
    return " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups), tuple(axes)


def pattern(draw: Any, factors: tuple[Axes, ...], reduced: set[int]) -> tuple[str, dict[str, Any], Any, Any]:
    """-> pattern, affine and lengths, axes that keep a statistic, axes of parameters."""
    split = [n for sizes in factors for n in sizes]
    ones = any(split[a] > 1 for a in reduced) and draw(st.booleans())
    spread = draw(st.integers(0, 2 * len(factors)))  # where "..." begins, if that axis is not split
    names, left = iter("abcdefghijklmno"), []
    stands: dict[str, Axes] = {}
    keywords: dict[str, Any] = {}
    at = 0
    for i, sizes in enumerate(factors):
        here = range(at, at + len(sizes))
        at += len(sizes)
        last = stands.get("...", (-2,))[-1]
        if len(sizes) == 1 and last + 1 == at - 1 and (last in reduced) == (at - 1 in reduced):
            stands["..."] += (at - 1,)
        elif len(sizes) == 1 and i == spread:
            stands["..."] = (at - 1,)
            left.append("...")
        elif sizes == (1,) and at - 1 in reduced and ones:
            left.append("1")
        else:
            group = [next(names) for _ in sizes]
            stands |= {name: (axis,) for name, axis in zip(group, here, strict=True)}
            free = None if 0 in sizes else draw(st.sampled_from([*group, None]))
            keywords |= {name: n for name, n in zip(group, sizes, strict=True) if name != free}
            left.append(" ".join(group) if len(group) == 1 else f"({' '.join(group)})")
    right, kept = joined(draw, [name for name, axes in stands.items() if not reduced.issuperset(axes)], stands)
    keywords["affine"], varying = joined(draw, [name for name in stands if draw(st.booleans())], stands)
    return f"{' '.join(left)} -> {right}", keywords, kept, varying


@st.composite
def placements(draw: Any, shape: Axes, dtype: torch.dtype) -> Placed:
    if draw(st.booleans()):
        return Placed(shape, dtype)
    order = tuple(draw(st.permutations(range(len(shape)))))
    steps = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in shape)
    expanded = frozenset(i for i, n in enumerate(shape) if n and draw(st.integers(0, 5)) == 0)
    return Placed(shape, dtype, order, steps, expanded, draw(st.sampled_from([0, 1, 3, 8])))


@st.composite
def broadcasts(draw: Any, shape: Axes) -> Axes:
    """A shape that broadcasts to another one."""
    kept = [n if draw(st.booleans()) else 1 for n in shape]
    return tuple(kept[draw(st.integers(0, next((i for i, n in enumerate(kept) if n != 1), len(kept)))) :])


@st.composite
def shapes(draw: Any, most: int) -> tuple[Axes, ...]:
    """One to five axes, each as the factors that it splits into, of at most so many elements, sometimes none."""
    found = []
    for _ in range(draw(st.sampled_from((3, 2, 4, 5, 1)))):
        sizes = []
        for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
            sizes.append(draw(st.sampled_from([n for n in (5, 3, 7, 2, 4, 9, 1, 8, 17, 16, 33) if n <= most])))
            most //= sizes[-1]
        found.append(tuple(sizes))
    if draw(st.integers(0, 15)) == 15:
        found[0] = (*found[0][:-1], 0)
    return tuple(draw(st.permutations(found)))


schedules = st.one_of(st.just({}), st.builds(
    lambda name, size: {"engine": name} | {limit: tile and size for limit, tile in TINY.items()},
    st.sampled_from(ENGINES), st.sampled_from([64, 128, 256]),
))  # fmt: skip


@st.composite
def calls(draw: Any, dtypes: Sequence[torch.dtype] = DTYPES, patterns: bool = True) -> Call:
    """Any call of x of at most 600 elements."""
    factors = draw(shapes(600))
    written = patterns and draw(st.booleans())
    if not written:
        factors = tuple((prod(sizes),) for sizes in factors)
    split = tuple(n for sizes in factors for n in sizes)
    shape = tuple(prod(sizes) for sizes in factors)
    reduced = {i for i in range(len(split)) if draw(st.booleans())} or {draw(st.integers(0, len(split) - 1))}
    axes: Any
    keywords: dict[str, Any] = {}
    if written:
        axes, keywords, kept, varying = pattern(draw, factors, reduced)
    else:
        axes = [i - len(split) * draw(st.booleans()) for i in draw(st.permutations(sorted(reduced)))]
        axes = axes[0] if len(axes) == 1 and draw(st.booleans()) else draw(st.sampled_from([tuple, list]))(axes)
        kept, varying = tuple((i,) for i in range(len(split)) if i not in reduced), None
    x = draw(placements(shape, draw(st.sampled_from(dtypes))))._replace(middle=draw(st.sampled_from([0.0, 1.0, -9.0])))
    near = st.one_of(st.just(x.dtype), st.sampled_from(dtypes))
    operands = {"x": x}
    for name in ("weight", "bias", "pre_add", "post_add"):
        if draw(st.booleans()):
            own = draw(broadcasts(shape)) if varying is None or name.endswith("add") else None
            own = tuple(prod(split[a] for a in group) for group in varying) if own is None else own
            operands[name] = draw(placements(own, draw(near)))
    options = {
        "eps": draw(st.sampled_from([1e-2, 1e-1, 1.0])),
        "center": draw(st.booleans()),
        "activation": draw(st.sampled_from([None, *ACTIVATIONS])),
        "return_stats": draw(st.booleans()),
        "out_dtype": draw(st.one_of(st.none(), st.sampled_from(dtypes))),
    }
    flat = None if varying is None else tuple(a for group in varying for a in group)
    leaves = frozenset(name for name in operands if draw(st.integers(0, 3)))
    return Call(
        factors, tuple(sorted(reduced)), kept, flat, axes, options | keywords, operands, leaves, draw(schedules),
        draw(st.integers(0, 99)),
    )  # fmt: skip
