"""``python -m bench numerics``: a slice of it holds the bar, its judge can fail, its page is up to date."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import numerics, numerics_page, report
from bench.numerics_cases import DATA, FORMATS, NORMS, Data, Norm
from bench.providers import DTYPES
from normops.schedule import ENGINES

INTERPRETER = not torch.cuda.is_available()
BY_NAME = {norm.name: norm for norm in NORMS}
ALL = {data.name: data for data in DATA}
HARD = ("mean 1e+04", "first by 1e+04", "middle by 1e+04", "constant 100.1, eps 1e-12", "steps of 256")
"""Where squares cancel, the mean or one element is far away or the merge of tiles loses digits, and eps is tiny."""
LAYOUTS = list(FORMATS)
SLICE = [
    *((norm.name, "fp32", LAYOUTS[i % 2], numerics_page.WAYS[1 + i % 3]) for i, norm in enumerate(NORMS)),
    *((norm.name, ("bf16", "fp16", "fp64")[i % 3], LAYOUTS[1 - i % 2], "resident") for i, norm in enumerate(NORMS)),
]


def held(rows: list[numerics_page.Row]) -> list[str]:
    return [told for row in rows for told in numerics_page.broken(row, INTERPRETER)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", BY_NAME)
def test_the_bar_is_held_without_kernels(norm: str, dtype: str) -> None:
    rows = [
        numerics.measure(BY_NAME[norm], layout, dtype, data, ("plain",))
        for layout in (LAYOUTS if dtype == "fp32" else LAYOUTS[:1])
        for data in DATA if dtype in data.dtypes and dtype not in data.overflow
    ]  # fmt: skip
    assert not held(rows) and len(rows) > 20


@np.errstate(over="ignore")  # beyond fp16
@pytest.mark.parametrize(("norm", "dtype", "layout", "way"), SLICE)
def test_the_bar_is_held_by_kernels(norm: str, dtype: str, layout: str, way: str) -> None:
    rows = [numerics.measure(BY_NAME[norm], layout, dtype, ALL[name], (way,)) for name in HARD]
    assert not held(rows) and all(set(ENGINES) & row.keys() for row in rows)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("data", ["mean 1e+04", "deviation 1e+04", "deviation 1e-04", "constant 100.1"])
@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_the_bar_is_held_by_running_statistics(norm: str, data: str, momentum: float) -> None:
    row = numerics.measure_running(BY_NAME[norm], "contiguous", "fp32", ALL[data], momentum, ("plain", "resident"))
    assert not held([row]) and row["resident"].keys() == row["plain"].keys() == {"running_mean", "running_var"}


def one_pass(h: Tensor, eps: float) -> Tensor:
    """By E[x²] - E[x]²."""
    mean = h.mean(1, keepdim=True)
    var = h.square().mean(1, keepdim=True) - mean.square()
    return (h - mean) / (var + eps).sqrt()


def unrefined(h: Tensor, eps: float) -> Tensor:
    """By two passes about a mean that was summed up one element after the other, and has all its roundings."""
    total = torch.zeros(len(h), dtype=h.dtype)
    for column in h.unbind(1):
        total = total + column
    d = h - (total / h.shape[1])[:, None]
    return d / (d.square().mean(1, keepdim=True) + eps).sqrt()


def judged(how: Callable[[Tensor, float], Tensor], name: str) -> list[str]:
    """What the judge says of a LayerNorm that computes so."""

    def call(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
        return how(x.flatten(1), eps).view(x.shape) * w + b

    layer = BY_NAME["LayerNorm"]
    bad = Norm(layer.name, layer.sizes, layer.reduced, layer.affine, call, layer.torchs)
    return held([numerics.measure(bad, "contiguous", "fp32", ALL[name], ("plain",))])


@pytest.mark.parametrize(("how", "bad", "good"), [
    (one_pass, ("mean 1e+02", "mean 1e+04", "constant 254.9", "mean -1e+04, deviation 0.01"), ("normal",)),
    (unrefined, ("constant 100.1, eps 1e-12", "constant 0.1"), ("normal", "deviation 1e-04")),
])  # fmt: skip
def test_the_judge_finds_bad_algorithms_bad(
    how: Callable[[Tensor, float], Tensor], bad: tuple[str, ...], good: tuple[str, ...]
) -> None:
    for name in bad:
        assert judged(how, name), f"{how.__name__} passes on {name}"
    for name in good:
        assert not judged(how, name), f"{how.__name__} fails on {name}"


@pytest.mark.parametrize(("wrong", "expected"), [(0.0, 0.0), (2.0**-24, 1.0), (float("nan"), float("inf"))])
def test_errors_are_in_half_steps(wrong: float, expected: float) -> None:
    got, exact = torch.ones(4), np.ones(4)
    got[1] = np.nan if np.isnan(wrong) else 1
    exact[1] += wrong if np.isfinite(wrong) else 0
    assert numerics.error(got, exact, np.float64(1.0)) == expected
    beyond = numerics.error(torch.full((2,), float("inf")), np.full(2, 1e39), np.float64(1e39))
    assert beyond == 0, "what is beyond the dtype has no number that would be right"


def test_the_page_is_up_to_date() -> None:
    content, page = json.loads(numerics_page.RESULTS.read_text()), numerics_page.PAGE.read_text(encoding="utf-8")
    section = numerics_page.section(content)
    assert report.placed(page, section) == page, "run: python -m bench numerics --baseline"
    measured = [(r["norm"], r["layout"], r["dtype"], r["data"], r.get("momentum")) for r in content["rows"]]
    listed = [(*task, data.name, momentum) for task in numerics.tasks() for data, momentum in numerics.cases(task)]
    assert sorted(measured, key=str) == sorted(listed, key=str), "run: python -m bench numerics --baseline"


def test_data_are_what_their_names_say() -> None:
    """Of the dtypes that they are for: finite, constant, and as far from 0 as they say."""
    for data in DATA:
        for dtype in data.dtypes:
            x = made(data, dtype)
            assert x.isfinite().all(), (data.name, dtype)
            if "constant" in data.name:
                assert (x == x[:, :1]).all(), data.name
            if dtype == "fp64" and data.away:
                assert x.mean().abs() / x.std() > data.away / 2, data.name


def made(data: Data, dtype: str) -> Tensor:
    kept = DTYPES[dtype]
    return data.x(numerics.normal(data.name, 2, 512), torch.finfo(kept)).to(kept)
