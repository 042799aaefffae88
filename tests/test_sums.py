"""Each sum of kernels/sums.py for itself, of whole numbers: every order of adding up gives the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from normops.kernels import sums
from normops.kernels.bundles import Form

Sizes = tuple[int, int, int]


@triton.jit
def summed(v_ptr, u_ptr, p_ptr, q_ptr, WHAT: tl.constexpr, AXIS: tl.constexpr, F: tl.constexpr):
    """p, q = sums of v, u, each at all elements that it is the sum of."""
    k, a, s = tl.arange(0, F.BLOCK_K), tl.arange(0, F.BLOCK_A), tl.arange(0, F.BLOCK_S)
    at = (k[:, None, None] * F.BLOCK_A + a[None, :, None]) * F.BLOCK_S + s[None, None, :]
    v, u = tl.load(v_ptr + at), tl.load(u_ptr + at)
    if WHAT == "total":
        p, q = sums.total(v, F.BLOCK_K), sums.total(u, F.BLOCK_K)
    elif WHAT == "tile_total":
        p, q = sums.tile_total(v, F), sums.tile_total(u, F)
    elif WHAT == "totals":
        p, q = sums.totals(v, u, F)
    elif WHAT == "sum_along":
        p, q = sums.sum_along(v, AXIS, F), sums.sum_along(u, AXIS, F)
    elif WHAT == "sums_along":
        p, q = sums.sums_along(v, u, AXIS, F)
    elif WHAT == "by_group":
        p, q = sums.by_group(v, F), sums.by_group(u, F)
    else:
        p, q = sums.plus(None, v), sums.plus(v, u)
    if F.BLOCK_K == 1 and (WHAT == "total" or WHAT == "totals" or WHAT == "tile_total"):
        tl.static_assert(len(p.shape) == 0 and len(q.shape) == 0)  # of one group: a number
    tl.store(p_ptr + at, p + 0.0 * v)
    tl.store(q_ptr + at, q + 0.0 * u)


@triton.jit
def side(v_ptr, p_ptr, ROWS: tl.constexpr, F: tl.constexpr):
    """p[a, piece] = sums over rows of v[piece, row, a], or p[row, a, piece] of those of each lane."""
    PIECES: tl.constexpr = F.PIECES
    P: tl.constexpr = triton.next_power_of_2(PIECES)
    k, a = tl.arange(0, F.BLOCK_K)[:, None, None], tl.arange(0, F.BLOCK_A)[None, :, None]
    v = ()
    for p in tl.static_range(PIECES):
        v = v + (sums.of_lanes(tl.load(v_ptr + (p * F.BLOCK_K + k) * F.BLOCK_A + a), F),)  # noqa: RUF005  (on the device)
    found = sums.side_by_side(v, F)
    if ROWS == 1:
        found = sums.over_rows(found, P, F)
    row = tl.arange(0, ROWS)[:, None, None]
    tl.store(p_ptr + (row * F.BLOCK_A + a) * P + tl.arange(0, P)[None, None, :], found)


def form(sizes: Sizes, **given: Any) -> Form:
    k, a, s = sizes
    return Form(SPACE=((1,), (1,), (1,), (1,)), ACC=tl.float32, BLOCK_K=k, BLOCK_A=a, BLOCK_S=s, **given)


def whole(device: torch.device, *sizes: int) -> Tensor:
    return torch.randint(-99, 100, sizes, device=device).float()


def run(what: str, sizes: Sizes, axis: int, device: torch.device, **given: Any) -> list[tuple[Tensor, Tensor]]:
    """Two tiles, and the sums of each."""
    v, u = whole(device, *sizes), whole(device, *sizes)
    p, q = torch.full_like(v, torch.nan), torch.full_like(u, torch.nan)
    summed[(1,)](v, u, p, q, what, axis, form(sizes, **given))
    return [(v, p), (u, q)]


SIZES = [sizes for sizes in product((1, 2, 4), (1, 4, 16), (1, 2, 8)) if max(sizes) > 1]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kept_first", [True, False])
@pytest.mark.parametrize("what", ["total", "tile_total", "totals", "sum_along", "sums_along"])
def test_sums_over_a_tile(what: str, sizes: Sizes, kept_first: bool, device: torch.device) -> None:
    for axis in (1, 2) if "along" in what else (0,):
        for v, found in run(what, sizes, axis, device, KEPT_FIRST=kept_first):
            expected = v.sum(axis or (1, 2), keepdim=True)
            assert torch.equal(found, expected.expand_as(found))


COMPILED = """
import json, torch
from normops.testing import virtual_device
from tests.test_sums import run

for sizes, axis, kept_first in json.loads('SIZES'):
    found = []
    for what in ("sum_along", "sums_along"):
        with virtual_device("h200") as gpu:
            run(what, sizes, axis, torch.device("cpu"), PTX=True, KEPT_FIRST=kept_first)
        found += [gpu.launches[0].asm["ptx"].count(word) for word in ("bar.sync", "shfl")]
    print(json.dumps(found))
"""


def test_two_sums_pass_warps_once_and_columns_take_few_shuffles(plain: Callable[[str], str]) -> None:
    """Two sums along rows meet as often as one; along columns that lie side by side each goes along_columns()."""
    cases = [((1, 1, 512), 2, False), ((32, 1, 32), 2, False), ((32, 1, 32), 2, True), ((32, 32, 1), 1, True)]
    found = [json.loads(line) for line in plain(COMPILED.replace("SIZES", json.dumps(cases))).splitlines()]
    (barriers, _, fewer, _), (_, many, *_), *columns = found
    assert 0 < fewer < barriers
    for one_by_one, shuffles, both, at_once in columns:
        assert (one_by_one, shuffles) == (both, at_once) and 0 < shuffles < many, found


def test_plus_begins_with_nothing(device: torch.device) -> None:
    (v, first), (u, both) = run("plus", (4, 1, 8), 0, device)
    assert torch.equal(first, v) and torch.equal(both, v + u)


@pytest.mark.parametrize(("columns", "per", "groups"), [(8, 1, 8), (8, 2, 4), (16, 3, 4), (16, 5, 2), (32, 32, 1)])
def test_every_column_gets_the_sum_of_its_group(columns: int, per: int, groups: int, device: torch.device) -> None:
    for v, found in run("by_group", (columns, 1, 1), 0, device, FOLD=(per, groups * per, groups, 1)):
        for i in range(groups):
            here = slice(i * per, i * per + per)
            assert (found[here] == v[here].sum()).all()


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize(("k", "lane"), [(1, 1), (8, 1), (8, 2), (16, 8)])
@pytest.mark.parametrize("whole_tile", [True, False], ids=["all rows", "each row"])
def test_pieces_side_by_side(pieces: int, k: int, lane: int, whole_tile: bool, device: torch.device) -> None:
    """And zeros for those that a power of two has more."""
    a, rows = 4, 1 if whole_tile else k // lane
    v = whole(device, pieces, k, a)
    found = torch.full((rows, a, triton.next_power_of_2(pieces)), torch.nan, device=device)
    side[(1,)](v, found, rows, form((k, a, 1), PIECES=pieces, LANE=lane))
    expected = v.sum(1, keepdim=True) if whole_tile else v.unflatten(1, (rows, lane)).sum(2)
    assert torch.equal(found[..., :pieces], expected.permute(1, 2, 0))
    assert not found[..., pieces:].any()
