"""Statistics of fp32 data, held against float64 of the same data, wherever squares may cancel or a merge lose bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from normops import functional as F
from normops import norm as norms
from normops import reference, schedule
from normops.testing import plans
from tests import tolerance
from tests.tolerance import TINY

EPS = 2.0**-40
"""1/sqrt(EPS) is a number of every type."""
BIAS, WEIGHT = 0.7, 1.3


@dataclass(frozen=True)
class Norm:
    pattern: str
    affine: str
    shape: tuple[int, ...]
    """Of x, with its second axis split, if the pattern splits it."""
    reduced: tuple[int, ...]
    affine_axes: tuple[int, ...]
    split: int = 0


NORMS = {
    "batch": Norm("n c h w -> c", "c", (3, 12, 4, 16), (0, 2, 3), (1,)),
    "batch of odd planes": Norm("n c h w -> c", "c", (9, 12, 5, 5), (0, 2, 3), (1,)),
    "instance": Norm("n c h w -> n c", "c", (2, 10, 12, 16), (2, 3), (1,)),
    "group": Norm("n (g c) h w -> n g", "(g c)", (3, 4, 4, 6, 8), (2, 3, 4), (1, 2), 4),
    "group of odd pieces": Norm("n (g c) h w -> n g", "(g c)", (5, 2, 10, 3, 7), (2, 3, 4), (1, 2), 2),
    "layer": Norm("n c h w -> n", "c h w", (10, 6, 5, 7), (1, 2, 3), (1, 2, 3)),
    "channels": Norm("n c h w -> n h w", "c", (2, 210, 2, 3), (1,), (1,)),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "last": torch.channels_last}
COLUMNS = {
    "contiguous": {"batch of odd planes"},
    "last": {"batch", "batch of odd planes", "instance", "group", "group of odd pieces"},
}
"""Norms whose groups are columns that lie side by side."""


class Case:
    """A norm over x in one layout: made of groups × elements, a group's in the order in which they lie in memory."""

    def __init__(self, norm: str, layout: str) -> None:
        self.norm, self.format = NORMS[norm], LAYOUTS[layout]
        sizes = self.norm.shape
        self.whole = (sizes[0], sizes[1] * sizes[2], *sizes[3:]) if self.norm.split else sizes
        order = torch.empty(self.whole).contiguous(memory_format=self.format).view(sizes).stride()
        kept = [i for i in range(len(sizes)) if i not in self.norm.reduced]
        self.walk = kept + sorted(self.norm.reduced, key=lambda i: -order[i])
        self.sizes = sizes
        self.groups, self.elements = prod(sizes[i] for i in kept), prod(sizes[i] for i in self.norm.reduced)
        self.lengths = {"g": self.norm.split} if self.norm.split else {}

    def spread(self, data: Tensor) -> Tensor:
        """x, of data[group, element]."""
        t = data.view([self.sizes[i] for i in self.walk])
        return t.permute([self.walk.index(i) for i in range(len(self.sizes))]).reshape(self.whole).contiguous(
            memory_format=self.format
        )  # fmt: skip

    def gathered(self, x: Tensor) -> Tensor:
        return x.reshape(self.sizes).permute(self.walk).reshape(self.groups, self.elements)

    def parameter(self, value: float) -> Tensor:
        sizes = [self.sizes[i] for i in self.norm.affine_axes]
        return torch.full([prod(sizes)] if self.norm.split else sizes, value)

    def forward(self, data: Tensor) -> Found:
        with torch.no_grad():
            y, mean, rstd = self._call(self.spread(data), self.parameter(WEIGHT), self.parameter(BIAS))
        return Found(self.gathered(y), mean.flatten(), rstd.flatten())

    def backward(self, data: Tensor, dy: Tensor) -> tuple[Found, Gradients]:
        leaves = [t.requires_grad_() for t in (self.spread(data), self.parameter(WEIGHT), self.parameter(BIAS))]
        y, mean, rstd = self._call(*leaves)
        dx, dw, db = torch.autograd.grad(y, leaves, self.spread(dy))
        return Found(self.gathered(y), mean.flatten(), rstd.flatten()), Gradients(self.gathered(dx), dw, db)

    def _call(self, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.normalize(
            x, self.norm.pattern, w, b, affine=self.norm.affine, eps=EPS, return_stats=True, **self.lengths
        )

    def plain(self, data: Tensor) -> Found:
        """The same of normops.reference."""
        norm = norms.Norm(tuple((n,) for n in self.sizes), self.norm.reduced, self.norm.affine_axes)
        operands = norms.Operands(self.spread(data).view(self.sizes), self.parameter(WEIGHT), self.parameter(BIAS))
        y, _, mean, rstd = reference.normalize(norm, EPS, operands)
        return Found(self.gathered(y), mean.flatten(), rstd.flatten())

    def summed(self, data: Tensor) -> Tensor:
        """Over all but the axes of parameters, of data[group, element]."""
        x = self.spread(data).view(self.sizes)
        return x.sum([i for i in range(x.dim()) if i not in self.norm.affine_axes])


class Found(NamedTuple):
    """Of groups."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """dx of groups, dw and db as the parameters are."""

    dx: Tensor
    dw: Tensor
    db: Tensor


def levels(n: int, length: int) -> Tensor:
    """Each `length` elements at another level, 1e4 deviations or more from the one before."""
    steps = torch.arange(n) // length
    return torch.randn(n) + 1e4 * (steps % 3 + steps % 2)


def far(n: int, by: float, *places: int) -> Tensor:
    """Some elements `by` deviations away from the others."""
    data = torch.randn(n)
    data[list(places)] += by
    return data


CONSTANTS = (3.14, 1e4, -7e-3)
Maker = Callable[[int], Tensor]
DATA: dict[str, Maker] = {
    **{f"constant {c}": lambda n, c=c: torch.full((n,), c) for c in CONSTANTS},
    "normal": torch.randn,
    "normal far from 0": lambda n: 1e4 + 0.01 * torch.randn(n),
    "normal farther from 0": lambda n: -1e6 + torch.randn(n),
    "ramp": lambda n: torch.arange(n) * 0.37 + 5,
    "falling ramp": lambda n: 1e3 - torch.arange(n) * 2.9,
    "levels of 8": lambda n: levels(n, 8),
    "levels of 32": lambda n: levels(n, 32),
    "levels of 64": lambda n: levels(n, 64),
    "first by 100": lambda n: far(n, 1e2, 0),
    "first by 1e4": lambda n: far(n, 1e4, 0),
    "first by 1e6": lambda n: far(n, 1e6, 0),
    "middle by 1e6": lambda n: far(n, -1e6, n // 2),
    "last by 1e6": lambda n: far(n, 1e6, n - 1),
    "first, middle, last": lambda n: far(n, 1e6, 0, n // 2, n - 1),
    "first 64 by 1e4": lambda n: far(n, 1e4, *range(64)),
    "first 32 by 1e4": lambda n: far(n, 1e4, *range(32)),
    "first 8 by 1e4": lambda n: far(n, 1e4, *range(8)),
}


HALFWAY = ("first 64 by 1e4", "first 32 by 1e4", "first 8 by 1e4")
"""The first element lies up to sqrt(7) deviations away there: three bits of the squares about it may cancel."""


def side_by_side(groups: int, elements: int) -> Iterator[tuple[list[str], Tensor]]:
    """All data, a group each, as many calls as that takes: neighbours have nothing to do with each other."""
    names = [*DATA]
    random.Random(groups).shuffle(names)
    for start in range(0, len(names), groups):
        here = [names[(start + i) % len(names)] for i in range(groups)]
        yield here, torch.stack([DATA[name](elements).float() for name in here])


def exact(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of groups, in float64."""
    var, mean = torch.var_mean(data.double(), 1, correction=0)
    return mean, var


def excess(found: Found, data: Tensor) -> dict[str, Tensor]:
    """By how much each group exceeds the limit of its mean, rstd and variance: 1 is at the limit."""
    mean, var = exact(data)
    mine, rstd = found.mean.double(), found.rstd.double()
    ulp = torch.finfo(torch.float32).eps * mean.abs()
    return {
        "mean": (mine - mean).abs() / (ulp + 2e-7 * var.sqrt()),
        "rstd": (rstd * (var + EPS).sqrt() - 1).abs() / 1e-6,
        "variance": (rstd**-2 - EPS - var).abs() / (1e-6 * var).clamp_min(1e-300),
    }


def forced(way: str) -> AbstractContextManager[None]:
    return schedule.forced(engine=way, **TINY | {"ticket_tile": 128, "grad_ticket_tile": 128})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("way", ["plain", *schedule.ENGINES])
def test_statistics_are_those_of_float64(way: str, norm: str, layout: str) -> None:
    case, seen = Case(norm, layout), set()
    for names, data in side_by_side(case.groups, case.elements):
        if way == "plain":
            found = case.plain(data)
        else:
            with forced(way), plans() as planned:
                found = case.forward(data)
            columns = norm in COLUMNS[layout]  # which no launch of tickets takes
            assert planned[0].plan.engine == ("split" if way == "ticketed" and columns else way)
            assert way == "resident" or planned[0].plan.launches[0].grid > 1
        wrong = excess(found, data)
        for i, name in enumerate(names):
            for what, values in wrong.items():
                limit = 2 if what == "variance" and name in HALFWAY else 1
                assert values[i] <= limit, f"{what} of {name}: {values[i]:.2f} times the limit"
            if name.startswith("constant"):
                assert found.rstd[i] == EPS**-0.5, f"{name}: a variance of {found.rstd[i] ** -2 - EPS:.3g}"
                assert (found.y[i] == found.y.new_tensor(BIAS)).all(), name
            seen.add(name)
    assert seen == DATA.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer"])
@pytest.mark.parametrize("way", schedule.ENGINES)
def test_gradients_far_from_0_are_those_of_float64(way: str, norm: str, layout: str) -> None:
    """Given the mean and rstd that were saved."""
    case = Case(norm, layout)
    data = torch.stack([DATA["normal far from 0"](case.elements) for _ in range(case.groups)])
    dy = torch.randn(case.groups, case.elements)
    with forced(way), plans() as planned:
        found, got = case.backward(data, dy)
    columns = norm in COLUMNS[layout]
    if way == "ticketed":
        wanted = ["split" if columns else way, "split" if columns or norm == "layer" else way]
    else:
        wanted = [way, way]
    assert [one.plan.engine for one in planned] == wanted
    mean, rstd, h = found.mean.double()[:, None], found.rstd.double()[:, None], dy.double() * WEIGHT
    xhat = (data.double() - mean) * rstd
    dx = rstd * (h - h.mean(1, keepdim=True) - xhat * (h * xhat).mean(1, keepdim=True))
    tolerance.check("dx", got.dx, dx)
    tolerance.check("dw", got.dw.flatten(), case.summed(dy.double() * xhat).flatten(), scale=2)
    tolerance.check("db", got.db.flatten(), case.summed(dy.double()).flatten(), scale=2)
