"""Bytes that kernels move, counted in Triton's interpreter: "reads x once" is a test, not a claim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

from normops import calls, schedule
from normops import functional as F
from normops.testing import Planned, Traffic, cost, plans, traffic

pytestmark = pytest.mark.skipif(not calls.INTERPRETED, reason="counts in the interpreter: TRITON_INTERPRET=1")

SHAPE = (2, 6, 5, 7)
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
Norm = Callable[..., Any]


def batch_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.batch_norm(x, None, None, w, b, training=True, **kw)


def instance_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.instance_norm(x, None, None, w, b, **kw)


def group_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.group_norm(x, 2, w, b, **kw)


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.layer_norm(x, SHAPE[-1:], w, b, **kw)


def rms_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.rms_norm(x, SHAPE[-1:], w, **kw)


GROUPS: dict[Norm, Callable[[Tensor], Tensor]] = {
    batch_norm: lambda x: x.transpose(0, 1).flatten(2), instance_norm: lambda x: x.flatten(2).unsqueeze(2),
    group_norm: lambda x: x.unflatten(1, (2, -1)).flatten(3), layer_norm: lambda x: x.unsqueeze(-2),
    rms_norm: lambda x: x[:0].unsqueeze(-2),
}  # fmt: skip
"""x as [groups, rows, columns].  Three elements of each group, whose median means are less of, are read beside its
tiles, by each of its programs."""


def check_reads(t: Traffic, name: str, x: Tensor, norm: Norm, times: int, planned: Planned) -> None:
    """Each element was read so many times, but for three of each group, which were read more often; of columns those
    of a block that overlaps another, and three of each column, by walks and by the finish."""
    statistics, _, _ = planned.plan.launches
    layout = planned.plan.streamed
    if not layout.runs[-1].reduced:
        blocks = -(-layout.runs[-1].size // statistics.form.BLOCK_K)
        overlap = (blocks * statistics.form.BLOCK_K - layout.runs[-1].size) * layout.numel // layout.runs[-1].size
        beside = statistics.grid * statistics.form.BLOCK_K + dict(planned.plan.scratch)["part_m2"] + 2 * layout.groups
        again = (times * overlap + 3 * beside) * x.element_size()
        assert times * x.nbytes < t.loads[name] <= times * x.nbytes + again
        return
    groups = GROUPS[norm](x)
    a, s = (prod(sizes) or groups.shape[-2] for sizes in statistics.form.SPACE[2:])
    columns = groups.shape[-1]
    places = [divmod(i * (a // 3) * s + i * (s // 3), columns) for i in range(3)]
    begins = {groups[(*i, *at)].data_ptr() for at in places for i in product(*map(range, groups.shape[:-2]))}
    read = [t.bytes_in(begin, begin + x.element_size())[0] for begin in begins]
    assert t.loads[name] - sum(read) == times * (x.nbytes - len(begins) * x.element_size())
    assert all(n > times * x.element_size() for n in read)


def check_ticketed_reads(t: Traffic, name: str, x: Tensor, planned: Planned) -> None:
    """Twice, but for three elements of each group, read once more for each tile, and for tiles at the ends of the
    launch: where there is one to begin or one to apply, the other is read for nothing."""
    launch = planned.plan.launches[0]
    tile = prod(launch.tile)
    nothing = 2 * launch.given["number"] * tile
    again = 6 * launch.grid * launch.form.BLOCK_K
    assert 2 * x.nbytes <= t.loads[name] <= 2 * x.nbytes + (nothing + again) * x.element_size()


# Parameters run along axis 1, or along the last for the norms over last axes.
CASES = [
    pytest.param(batch_norm, 1, CONTIGUOUS, id="BatchNorm"),
    pytest.param(batch_norm, 1, CHANNELS_LAST, id="BatchNorm-channels_last"),
    pytest.param(instance_norm, 1, CONTIGUOUS, id="InstanceNorm"),
    pytest.param(instance_norm, 1, CHANNELS_LAST, id="InstanceNorm-channels_last"),
    pytest.param(group_norm, 1, CONTIGUOUS, id="GroupNorm"),
    pytest.param(group_norm, 1, CHANNELS_LAST, id="GroupNorm-channels_last"),
    pytest.param(layer_norm, 3, CONTIGUOUS, id="LayerNorm"),
    pytest.param(rms_norm, 3, CONTIGUOUS, id="RMSNorm"),
]
TICKETS = {"ticket_tile": 64, "grad_ticket_tile": 64, "ahead": 0,
           "line_bytes": 16}  # fmt: skip
SPLIT = {"engine": "split", "tile": 64, "grad_tile": 64}
# Columns are never visited in a launch of tickets: channels_last, and the odd planes of this BatchNorm.
TICKETED = [case for case in CASES if case.values[0] is not batch_norm and case.values[2] is CONTIGUOUS]


def tensor(fmt: torch.memory_format = CONTIGUOUS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE).to(dtype).contiguous(memory_format=fmt)


def parameters(axis: int, affine: bool = True) -> tuple[Tensor | None, Tensor | None]:
    if not affine:
        return None, None
    n = SHAPE[axis]
    return torch.randn(n, requires_grad=True), torch.randn(n, requires_grad=True)


def gradients(y: Any, inputs: list[Tensor | None], *dy: Tensor) -> tuple[Tensor, ...]:
    present = [t for t in inputs if t is not None]
    return torch.autograd.grad(y, present, dy, allow_unused=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize(("norm", "axis", "fmt"), CASES)
def test_a_group_on_chip_is_read_once(norm: Norm, axis: int, fmt: Any, affine: bool, dtype: torch.dtype) -> None:
    x, dy = tensor(fmt, dtype).requires_grad_(), tensor(fmt, dtype)
    w, b = parameters(axis, affine)
    with traffic(x=x) as t:
        y = norm(x, w, b)
    # Tiles hold several groups here: the mean of each comes first, and its first element is read but once.
    assert t.loads["x"] == x.nbytes
    assert t.stores["x"] == 0 and t.bytes_of(y) == (0, y.nbytes)
    assert (t.launches, t.atomics) == (1, 0)
    with traffic(x=x, dy=dy) as t:
        dx, *_ = gradients(y, [x, w, b], dy)
    assert (t.loads["x"], t.loads["dy"]) == (x.nbytes, dy.nbytes)
    assert (t.stores["x"], t.stores["dy"]) == (0, 0)
    assert t.bytes_of(dx) == (0, dx.nbytes)
    assert t.launches <= 2 and t.atomics == 0


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize(("norm", "axis", "fmt"), CASES)
def test_a_split_group_is_read_twice(norm: Norm, axis: int, fmt: Any, affine: bool) -> None:
    x, dy = tensor(fmt).requires_grad_(), tensor(fmt)
    w, b = parameters(axis, affine)
    with schedule.forced(**SPLIT):
        with traffic(x=x) as t, plans() as planned:
            y = norm(x, w, b)
        check_reads(t, "x", x, norm, 2, planned[0])
        assert t.stores["x"] == 0 and t.bytes_of(y) == (0, y.nbytes)
        assert (t.launches, t.atomics) == (3, 0)
        with traffic(x=x, dy=dy) as t:
            dx, *_ = gradients(y, [x, w, b], dy)
    assert (t.loads["x"], t.loads["dy"]) == (2 * x.nbytes, 2 * dy.nbytes)
    assert (t.stores["x"], t.stores["dy"]) == (0, 0)
    assert t.bytes_of(dx) == (0, dx.nbytes)
    assert t.atomics == 0


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize(("norm", "axis", "fmt"), TICKETED)
def test_a_ticketed_group_is_read_again_inside_its_window(norm: Norm, axis: int, fmt: Any, affine: bool) -> None:
    """One launch (and a finish of dw and db); the second read comes no later than the plan says.  Backward, rows are
    split where parameters run along them."""
    x, dy = tensor(fmt).requires_grad_(), tensor(fmt)
    w, b = parameters(axis, affine)
    with schedule.forced(engine="ticketed", **TICKETS), plans() as planned:
        with traffic(x=x) as t:
            y = norm(x, w, b)
        assert t.stores["x"] == 0 and t.bytes_of(y) == (0, y.nbytes)
        assert t.launches == 1
        with traffic(x=x, dy=dy) as back:
            dx, *_ = gradients(y, [x, w, b], dy)
    forward, backward = (cost.hbm(p.plan, p.itemsizes, 2**40).window for p in planned)
    rows = affine and norm in (layer_norm, rms_norm)
    assert [p.plan.engine for p in planned] == ["ticketed", "split" if rows else "ticketed"]
    assert 0 < t.reuse_distance(x) <= forward <= x.nbytes
    check_ticketed_reads(t, "x", x, planned[0])
    if not rows:
        check_ticketed_reads(back, "x", x, planned[1])
    assert back.loads["x"] == back.loads["dy"] >= 2 * x.nbytes
    assert (back.stores["x"], back.stores["dy"]) == (0, 0)
    assert back.bytes_of(dx) == (0, dx.nbytes)
    if not rows:
        assert back.launches <= 2
        assert 0 < back.reuse_distance(x) == back.reuse_distance(dy) <= backward // 2


def test_the_window_is_what_goes_by_between_two_reads() -> None:
    """Many units, whole tiles: the plan's figure is the interpreter's to the byte, far below the size of x."""
    x = torch.randn(8, 16, 16, 16).requires_grad_()
    with schedule.forced(engine="ticketed", **TICKETS | {"ticket_tile": 512, "grad_ticket_tile": 256}):
        with plans() as planned, traffic(x=x) as t:
            y = batch_norm(x, None, None)
        with plans() as back, traffic(x=x) as g:
            torch.autograd.grad(y, x, torch.randn_like(x))
    for (call,), distance, streams in ((planned, t.reuse_distance(x), 1), (back, g.reuse_distance(x), 2)):
        assert streams * distance == cost.hbm(call.plan, call.itemsizes, 2**40).window < streams * x.nbytes / 2


@pytest.mark.parametrize(("norm", "axis", "fmt"), CASES)
@pytest.mark.parametrize("split", [False, True], ids=["resident", "split"])
def test_pre_add_is_read_once_and_the_sum_written_once(norm: Norm, axis: int, fmt: Any, split: bool) -> None:
    x, pre, dy, dsum = tensor(fmt).requires_grad_(), tensor(fmt), tensor(fmt), tensor(fmt)
    w, b = parameters(axis)
    with schedule.forced(**SPLIT) if split else nullcontext():
        with traffic(x=x, pre=pre) as t, plans() as planned:
            y, total = norm(x, w, b, pre_add=pre)
        if split:
            check_reads(t, "x", x, norm, 1, planned[0])
            check_reads(t, "pre", pre, norm, 1, planned[0])
        else:
            assert (t.loads["x"], t.loads["pre"]) == (x.nbytes, pre.nbytes)
        assert t.bytes_of(total) == (total.nbytes if split else 0, total.nbytes)
        assert t.bytes_of(y) == (0, y.nbytes)
        assert (t.launches, t.atomics) == (3 if split else 1, 0)
        with traffic(x=x, pre=pre, total=total, dy=dy, dsum=dsum) as t:
            dx, *_ = gradients([y, total], [x, w, b], dy, dsum)
    times = 2 if split else 1
    assert (t.loads["total"], t.loads["dy"], t.loads["dsum"]) == (times * x.nbytes, times * x.nbytes, x.nbytes)
    assert (t.loads["x"], t.loads["pre"]) == (0, 0)
    assert t.bytes_of(dx) == (0, dx.nbytes)
    assert t.atomics == 0


@pytest.mark.parametrize(("norm", "axis", "fmt"), CASES)
@pytest.mark.parametrize("split", [False, True], ids=["resident", "split"])
def test_post_add_is_read_once_per_pass(norm: Norm, axis: int, fmt: Any, split: bool) -> None:
    x, post, dy = tensor(fmt).requires_grad_(), tensor(fmt).requires_grad_(), tensor(fmt)
    w, b = parameters(axis)
    with schedule.forced(**SPLIT) if split else nullcontext():
        with traffic(post=post) as t:
            y = norm(x, w, b, post_add=post, activation="relu")
        assert t.loads["post"] == post.nbytes
        with traffic(x=x, post=post) as t:
            dx, dpost, *_ = gradients(y, [x, post, w, b], dy)
    times = 2 if split else 1
    assert (t.loads["x"], t.loads["post"]) == (times * x.nbytes, times * post.nbytes)
    assert t.bytes_of(dx) == (0, dx.nbytes) and t.bytes_of(dpost) == (0, dpost.nbytes)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize(("norm", "axis", "fmt"), CASES)
@pytest.mark.parametrize("split", [False, True], ids=["resident", "split"])
def test_an_activation_moves_nothing(norm: Norm, axis: int, fmt: Any, activation: str, split: bool) -> None:
    """Of x's size; the partial sums of the backward may be more, for its tiles are smaller."""
    x, dy = tensor(fmt).requires_grad_(), tensor(fmt)
    w, b = parameters(axis)
    seen = []
    with schedule.forced(**SPLIT) if split else nullcontext():
        for name in (None, activation):
            with traffic(x=x, dy=dy) as forward:
                y = norm(x, w, b, activation=name)
            with traffic(x=x, dy=dy) as backward:
                dx, *_ = gradients(y, [x, w, b], dy)
            seen.append(
                (forward.loads, forward.stores, forward.launches, backward.launches, backward.loads["x"],
                 backward.loads["dy"], backward.stores["x"], backward.stores["dy"], backward.bytes_of(dx))
            )  # fmt: skip
            assert forward.atomics == backward.atomics == 0
    assert seen[0] == seen[1]


@pytest.mark.parametrize("fmt", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_given_statistics_need_one_pass(fmt: Any, affine: bool) -> None:
    x, dy = tensor(fmt).requires_grad_(), tensor(fmt)
    w, b = parameters(1, affine)
    with traffic(x=x) as t:
        y = F.batch_norm(x, torch.randn(SHAPE[1]), torch.rand(SHAPE[1]) + 0.5, w, b, training=False)
    assert t.loads["x"] == x.nbytes and t.bytes_of(y) == (0, y.nbytes)
    assert (t.launches, t.atomics) == (1, 0)
    with traffic(x=x, dy=dy) as t:
        dx, *_ = gradients(y, [x, w, b], dy)
    assert (t.loads["x"], t.loads["dy"]) == (x.nbytes, dy.nbytes)
    assert t.bytes_of(dx) == (0, dx.nbytes)
    assert t.atomics == 0


@triton.jit
def counted(x_ptr, n_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(x_ptr + i, v, mask=i < n)
    tl.atomic_add(n_ptr + 0 * i, 1, mask=i < n)
    tl.store(n_ptr + 1, tl.load(n_ptr + 1) + 1)


def test_traffic_counts() -> None:
    x, n = torch.randn(7).half(), torch.zeros(2, dtype=torch.int32)
    original = triton.runtime.interpreter.InterpreterBuilder.create_masked_load
    with traffic(x=x) as outer:
        counted[(2,)](x, n, 7, BLOCK=4)
        assert outer.loads["x"] == 14
        with traffic(n=n) as inner:
            counted[(2,)](x, n, 7, BLOCK=4)
    counted[(2,)](x, n, 7, BLOCK=4)
    assert triton.runtime.interpreter.InterpreterBuilder.create_masked_load is original
    one = {"x": 14, "other": 7 * 4 + 2 * 4}
    assert outer.loads == outer.stores == {k: 2 * v for k, v in one.items()}
    assert inner.loads == inner.stores == {"n": one["other"], "other": one["x"]}
    assert (outer.launches, outer.atomics, inner.launches, inner.atomics) == (2, 14, 1, 7)
    assert outer.bytes_of(n) == (72, 72) and inner.bytes_of(x) == (14, 14)
    assert n.tolist() == [21, 6]


def test_traffic_is_restored_after_an_error() -> None:
    original = triton.runtime.interpreter.InterpreterBuilder.create_masked_store
    with pytest.raises(KeyError), traffic():
        raise KeyError
    assert triton.runtime.interpreter.InterpreterBuilder.create_masked_store is original


def test_traffic_refuses_what_it_cannot_tell_apart() -> None:
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="x and y share one storage"), traffic(x=x, y=x[1:]):
        pass
    with pytest.raises(ValueError, match="other"), traffic(other=x):
        pass
    with pytest.raises(ValueError, match="CPU"), traffic(x=torch.empty(2, device="meta")):
        pass


def test_traffic_needs_the_interpreter() -> None:
    code = "import torch, normops.testing as t\nwith t.traffic(x=torch.zeros(1)): pass"
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode and "RuntimeError" in done.stderr and "TRITON_INTERPRET=1" in done.stderr
