"""Predicted bytes are those that the interpreter counts, launch by launch and operand by operand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from bench import providers, verify
from bench.cases import CASES, Case
from normops import calls, gpus, launch, schedule
from normops import functional as F
from normops import norm as norms
from normops.kernels.resident import grad_normalize
from normops.layout import dense_strides
from normops.plan import Plan
from normops.plan_backward import plan_backward
from normops.plan_forward import plan_forward
from normops.testing import Planned, Traffic, cost, plans, traffic
from normops.views import Shapes

ROOT = Path(__file__).resolve().parents[1]

counts = pytest.mark.skipif(not calls.INTERPRETED, reason="counts in the interpreter: TRITON_INTERPRET=1")

ALL_SPLIT = {"engine": "split"}
# Tiles that divide nothing, several blocks of everything, and loops.
ODD = {
    "odd": {"tile": 64, "grad_tile": 32, "line_bytes": 16, "warps_per_sm": 1},
    "odd split": {**ALL_SPLIT, "tile": 64, "grad_tile": 32, "line_bytes": 16, "chunks": 1, "warps_per_sm": 1,
                  "column_tile": 64, "column_programs": 1},
    "odd ticketed": {"engine": "ticketed", "ticket_tile": 64, "grad_ticket_tile": 32, "line_bytes": 16,
                     "ahead": 0, "warps_per_sm": 1},
}  # fmt: skip
MB = 2**20


@contextmanager
def counted() -> Iterator[tuple[list[Planned], list[Traffic]]]:
    """The plans that run inside, and what each of their launches moved."""
    found: list[Traffic] = []
    call = interpreter.GridExecutor.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        with traffic() as t:
            call(self, *args, **kwargs)
        found.append(t)

    interpreter.GridExecutor.__call__ = counting
    try:
        with plans() as planned:
            yield planned, found
    finally:
        interpreter.GridExecutor.__call__ = call


def addresses(t: Tensor) -> tuple[int, int]:
    """From the first element to past the last."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def check(planned: list[Planned], found: list[Traffic]) -> None:
    counts = iter(found)
    for plan, itemsizes, _, operands in planned:
        for step, predicted in zip(plan.launches, cost.traffic(plan, itemsizes), strict=True):
            count = next(counts)
            moved = {name: cost.Moved(*count.bytes_in(*addresses(t))) for name, t in operands.items()}
            assert predicted == {name: m for name, m in moved.items() if any(m)}, (plan.engine, step)
            # Nothing but operands was touched.
            everything = sum(m.loads for m in moved.values()), sum(m.stores for m in moved.values())
            assert everything == (count.loads["other"], count.stores["other"])
        # Where L2 holds everything, only what must be read and written is.
        assert cost.hbm(plan, itemsizes, 2**60).bytes == cost.floor(plan, itemsizes)
        assert cost.hbm(plan, itemsizes, 0).cached == 0
    assert next(counts, None) is None


def run(case: Case, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    inputs = providers.make_inputs(case, case.small, memory_format, dtype)
    with counted() as (planned, found):
        outputs = providers.by_normops(case, inputs)
        torch.autograd.grad(outputs, providers.leaves(inputs), providers.output_gradients(inputs))
    assert len(planned) == 2
    check(planned, found)


def named(case: Case) -> str:
    return case.name.replace(" ", "-")


TABLE = [pytest.param(case, fmt, id=f"{named(case)}-{name}") for case in CASES for name, fmt in case.formats.items()]
# Of rows that are many or long one kind: they cost seconds each here, and are alike.
ALIKE = {"many-long-rows-contiguous", "long-row-131072-contiguous", "rows-of-14336-contiguous"}
SPLIT = [
    case for case in TABLE
    if not isinstance(verify.schedule_of(case.values[0]), nullcontext) and case.id not in ALIKE
]  # fmt: skip
# Every norm, with and without operands that are added.
SAMPLE = [
    pytest.param(case, fmt, id=f"{named(case)}-{name}")
    for case in {(c.norm, c.pre_add, c.post_add): c for c in CASES}.values() for name, fmt in case.formats.items()
]  # fmt: skip


@counts
@pytest.mark.parametrize(("case", "fmt"), TABLE)
def test_every_case_as_it_is_scheduled(case: Case, fmt: torch.memory_format) -> None:
    run(case, fmt, torch.bfloat16)


@counts
@pytest.mark.parametrize(("case", "fmt"), SPLIT)
def test_every_case_split_as_at_its_real_shape(case: Case, fmt: torch.memory_format) -> None:
    with verify.schedule_of(case):
        run(case, fmt, torch.bfloat16)


@counts
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=["fp16", "fp32", "fp64"])
@pytest.mark.parametrize(("case", "fmt"), SAMPLE)
def test_dtypes(case: Case, fmt: torch.memory_format, dtype: torch.dtype) -> None:
    with schedule.forced(**ALL_SPLIT) if dtype is torch.float32 else nullcontext():
        run(case, fmt, dtype)


Norm = Callable[..., Any]


def batch_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.batch_norm(x, None, None, w, b, training=True, **kw)


def frozen(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    c = x.shape[1]
    return F.batch_norm(x, torch.zeros(c), torch.ones(c), w, b, training=False, **kw)


def group_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.group_norm(x, 1, w, b, **kw)


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.layer_norm(x, x.shape[-1:], w, b, **kw)


def rms_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.rms_norm(x, x.shape[-1:], w, **kw)


@counts
@pytest.mark.parametrize("limits", ODD.values(), ids=ODD)
@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (3, 1, 1, 11)], ids=str)
@pytest.mark.parametrize("norm", [batch_norm, frozen, group_norm, layer_norm, rms_norm])
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_odd_tiles_and_what_is_asked_for(norm: Norm, shape: tuple[int, ...], fmt: Any, limits: dict[str, int]) -> None:
    """One of the operands is broadcast, parameters of one element occur, and gradients are left out in turn."""
    n = shape[-1] if norm in (layer_norm, rms_norm) else shape[1]
    # So few programs that walks over the batch take several steps, the last ones past its end.
    few = replace(gpus.H200, num_sms=3, ptx=False)
    with calls.standing_in(few), schedule.forced(**limits), counted() as (planned, found):
        for needs, options in (
            ((True, True, True), {"activation": "silu", "post_add": torch.randn(shape[-1]).expand(shape)}),
            ((True, False, False), {"pre_add": torch.randn(shape)}),
            ((False, True, norm is not rms_norm), {}),
            ((False, False, norm is not rms_norm), {"activation": "relu"}),
            ((True, False, False), {"plain": True}),
        ):
            x = torch.randn(shape).contiguous(memory_format=fmt).requires_grad_(needs[0])
            w, b = (torch.randn(n, requires_grad=need) for need in needs[1:])
            if options.pop("plain", False):
                w = b = None
            y = norm(x, w, b, **options)
            outputs = y if isinstance(y, tuple) else (y,)
            wanted = [t for t in (x, w, b) if t is not None and t.requires_grad and not (t is b and norm is rms_norm)]
            if wanted:
                torch.autograd.grad([y.sum() for y in outputs], wanted)  # gradients of a sum are broadcast
    assert len(planned) >= 8
    check(planned, found)


# What reaches DRAM, by hand.  bf16 [n, c, s] with fp32 parameters; plans are made, nothing runs.

SIZES = dict.fromkeys(("x", "pre", "sum", "y", "dy", "dx"), 2)
SIZES |= dict.fromkeys(("w", "b", "dw", "db", "mean", "rstd", "part_mean", "part_m2"), 4)
SIZES |= dict.fromkeys(("p1", "p0", "t1", "t0", "c1", "c0", "tickets"), 4)
BATCH, ROWS = ((0, 2), (1,)), ((2,), (2,))


def planned(axes: tuple[tuple[int, ...], ...], shape: tuple[int, int, int], *operands: str) -> Plan:
    """The plan of a norm with parameters and these operands beside them (the backward's if dy is one)."""
    n, c, s = shape
    norm = norms.Norm(((n,), (c,), (s,)), *axes)
    dense = dense_strides(shape)
    backward = "dy" in operands
    names = ("X", "DY", "W", "POST", "DSUM", "DX", "DPOST") if backward else ("X", "PRE", "SUM", "W", "POST", "Y")
    strides = {"W": norm.weight_strides, **dict.fromkeys(map(str.upper, operands), dense)}
    shapes = Shapes(dense, tuple((name, strides.get(name)) for name in names))
    given = (schedule.limits(), gpus.H200)
    if backward:
        return plan_backward(norm, shapes, 2, torch.float32, False, (True, True, True, False), *given)
    return plan_forward(norm, shapes, 2, torch.float32, "", *given)


def split(axes: tuple[tuple[int, ...], ...], shape: tuple[int, int, int], *operands: str) -> Plan:
    with schedule.forced(engine="split"):
        return planned(axes, shape, *operands)


def sizes(*absent: str) -> dict[str, int]:
    return {name: size for name, size in SIZES.items() if name not in absent}


def workspace(plan: Plan, *names: str) -> int:
    return sum(4 * n for name, n in plan.scratch if name in names)


def test_a_resident_call_moves_its_floor_whatever_l2_holds() -> None:
    rows, n = 64 * 512, 1024
    forward, backward = planned(ROWS, (64, 512, n), "x", "y"), planned(ROWS, (64, 512, n), "x", "dy", "dx")
    assert (forward.engine, backward.engine) == ("resident", "resident")
    for window in (0, 20 * MB):
        done = cost.hbm(forward, sizes("pre", "sum"), window)
        assert done.bytes == cost.floor(forward, sizes("pre", "sum")) == 2 * (2 * rows * n) + 4 * (2 * n + 2 * rows)
        assert (done.cached, done.window) == (0, 0)
    # x, dy, dx; w and b (read for the gradient, b is not), dw, db; mean and rstd.
    least = 3 * (2 * rows * n) + 4 * (3 * n + 2 * rows)
    partials = workspace(backward, "t1", "t0")
    assert cost.floor(backward, SIZES) == least
    assert cost.hbm(backward, SIZES, 20 * MB) == cost.Hbm(
        least, partials, partials, (cost.Moved(2 * (2 * rows * n) + 4 * (n + 2 * rows), 2 * rows * n),
                                    cost.Moved(0, 4 * 2 * n)),
    )  # fmt: skip
    assert cost.hbm(backward, SIZES, 0).bytes == least + 2 * partials  # written and read again


@pytest.mark.parametrize("operands", [("x", "y"), ("x", "dy", "dx"), ("x", "pre", "sum", "y")], ids=str)
def test_a_ticketed_call_moves_its_floor_where_its_window_fits(operands: tuple[str, ...]) -> None:
    c, tensor = 64, 2 * 256 * 64 * 3136
    plan = planned(BATCH, (256, c, 3136), *operands)
    given = {name: size for name, size in SIZES.items() if size == 4 or name in operands}
    assert plan.engine == "ticketed" and tensor > 20 * MB
    done = cost.hbm(plan, given, gpus.H200.window)
    again = 2 if "dy" in operands else 1
    assert done.bytes == cost.floor(plan, given)
    assert done.cached >= again * tensor and tensor // c < done.window <= gpus.H200.window < 20e6
    assert cost.hbm(plan, given, done.window - 1).bytes == done.bytes + again * tensor


def test_a_split_call_moves_three_passes_less_the_window() -> None:
    c, tensor = 64, 2 * 256 * 64 * 3136
    plan, given = split(BATCH, (256, c, 3136), "x", "y"), sizes("pre", "sum")
    small = 4 * 4 * c  # w, b, mean, rstd
    partials = workspace(plan, "part_mean", "part_m2")
    assert plan.engine == "split" and tensor > 20 * MB
    done = cost.hbm(plan, given, 20 * MB)
    assert done.bytes == 3 * tensor - 20 * MB + small
    assert (done.cached, done.window) == (20 * MB + partials + 4 * 2 * c, 20 * MB)
    assert [sum(moved) for moved in done.launches] == [tensor, 4 * 2 * c, 2 * tensor - 20 * MB + 4 * 2 * c]
    assert cost.floor(plan, given) == 2 * tensor + small
    assert cost.hbm(plan, given, 0).bytes == 3 * tensor + small + 2 * partials + 4 * 2 * c


def test_a_split_backward_reads_x_and_dy_again_less_the_window() -> None:
    c, tensor = 64, 2 * 256 * 64 * 3136
    plan = split(BATCH, (256, c, 3136), "x", "dy", "dx")
    done = cost.hbm(plan, SIZES, 20 * MB)
    assert plan.engine == "split"
    assert done.bytes == 5 * tensor - 20 * MB + 4 * 5 * c  # mean, rstd, w, dw, db
    assert done.window == 20 * MB
    assert cost.floor(plan, SIZES) == 3 * tensor + 4 * 5 * c


def test_a_split_call_of_a_small_tensor_moves_its_floor() -> None:
    plan = split(BATCH, (4, 64, 3136), "x", "y")
    tensor = 2 * 4 * 64 * 3136
    done = cost.hbm(plan, sizes("pre", "sum"), 20 * MB)
    assert plan.engine == "split"
    assert done.bytes == cost.floor(plan, sizes("pre", "sum")) == 2 * tensor + 4 * 4 * 64
    assert done.window == tensor


def test_streams_that_are_not_read_again_take_their_share_of_the_window() -> None:
    """x, pre and the sum go through L2, but only the sum is read again."""
    c, tensor = 64, 2 * 256 * 64 * 3136
    plan = split(BATCH, (256, c, 3136), "x", "pre", "sum", "y")
    assert cost.hbm(plan, SIZES, 21 * MB).bytes == 5 * tensor - 7 * MB + 4 * 4 * c
    assert cost.floor(plan, SIZES) == 4 * tensor + 4 * 4 * c


@pytest.mark.parametrize("n", [64, 768, 2048, 3584, 8192, 16384, 65536, 262144])
def test_the_finish_of_rows_moves_no_more_than_the_walk(n: int) -> None:
    for rows in (1, 2, 3, 7, 64, 100, 133, 256, 600, 4096, 100_000):
        plan = planned(ROWS, (1, rows, n), "x", "dy", "dx")
        launches = cost.traffic(plan, SIZES)
        streams = sum(sum(moved) for launch in launches for name, moved in launch.items() if name in cost.STREAMS)
        finishes = [launch for launch in launches if not launch.keys() & set(cost.STREAMS)]
        finish = sum(sum(moved) for launch in finishes for moved in launch.values())
        assert finish <= streams, (rows, plan.engine, finish, streams)


def test_a_second_walk_from_the_start_finds_all_or_nothing() -> None:
    plan = split(ROWS, (2, 8, 262144), "x", "dy", "dx")
    tensor, last = 2 * 16 * 262144, plan.launches[-1]
    assert (plan.engine, last.kernel) == ("split", grad_normalize)
    fits, just_not = (cost.hbm(plan, SIZES, window).launches[-1].loads for window in (2 * tensor, 2 * tensor - 1))
    assert just_not - fits == 2 * tensor


def test_an_operand_that_is_broadcast_counts_once() -> None:
    plan = planned(ROWS, (64, 512, 1024), "x", "y")
    first = replace(plan.launches[0], form=plan.launches[0].form._replace(X=((0,), (), (), ())))
    assert cost.hbm(plan, SIZES, 0).bytes - cost.hbm(replace(plan, launches=(first,)), SIZES, 0).bytes == (
        2 * (64 * 512 * 1024 - 1)
    )


def test_errors() -> None:
    plan = planned(BATCH, (256, 64, 3136), "x", "y")
    with pytest.raises(ValueError, match="part_mean, part_m2 missing"):
        cost.traffic(plan, sizes("part_mean", "part_m2"))
    with pytest.raises(ValueError, match=r"l2_window must be .* got -1"):
        cost.hbm(plan, SIZES, -1)
    strange = replace(plan, launches=(replace(plan.launches[0], kernel=print),))
    with pytest.raises(ValueError, match=r"known of those of normops.kernels only; got .*print"):
        cost.floor(strange, SIZES)


def test_plans_end_with_their_block() -> None:
    before = launch.Step.launch
    with pytest.raises(KeyError), plans():
        raise KeyError
    assert launch.Step.launch is before


def test_plans_of_a_virtual_device() -> None:
    code = """
import torch
from normops import functional as F
from normops.testing import cost, plans, virtual_device
x, w = torch.randn(4, 8, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True)
with virtual_device("h200"), plans() as planned:
    for _ in range(2):  # through Triton's binder, then directly
        F.batch_norm(x, None, None, w, None, training=True).backward(torch.randn_like(x))
first, second = planned[:2], planned[2:]
assert [p.plan for p in first] == [p.plan for p in second] and len(first) == 2, planned
for p in planned:
    assert p.nbytes["x"] == x.nbytes and p.itemsizes["rstd"] == 4 and p.nbytes["mean"] == 32, p
    assert cost.hbm(p.plan, p.itemsizes, 2**30).bytes == cost.floor(p.plan, p.itemsizes)
assert first[0].operands["y"].shape == x.shape and first[1].operands["dw"].shape == w.shape
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
