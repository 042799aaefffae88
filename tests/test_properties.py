"""What holds of every call, whatever its form: on random shapes, axes, memory layouts, dtypes, fusions and schedules.

The calls are the same in every run.  ``NORMOPS_EXAMPLES=20`` has twenty times as many, and others each time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from normops import calls as known_calls
from normops import functional as F
from normops import schedule
from tests.fresh_memory import filled
from tests.random_calls import DEVICE, Call, Tensors, agrees, calls, close, expected, flowing_back, schedules

TIMES = int(os.environ.get("NORMOPS_EXAMPLES", "1"))


def examples(count: int) -> settings:
    return settings(max_examples=count * TIMES, deadline=None, derandomize=TIMES == 1, database=None)


@contextmanager
def no_kernels() -> Iterator[None]:
    """CPU tensors take the formula in PyTorch's operations, as where there is no interpreter."""
    with mock.patch.object(known_calls, "INTERPRETED", False):
        known_calls.known.clear()
        try:
            yield
        finally:
            known_calls.known.clear()


WAYS = [nullcontext] if DEVICE.type == "cuda" else [nullcontext, no_kernels]
ways = pytest.mark.parametrize("way", WAYS, ids=["kernels", "formula"][: len(WAYS)])


def same(got: Tensors, wanted: Tensors) -> None:
    """The same bits, or NaN both."""
    assert got.keys() == wanted.keys()
    for name, t in got.items():
        assert t.dtype == wanted[name].dtype, name
        equal = (t == wanted[name]) | (t.isnan() & wanted[name].isnan())
        assert t.shape == wanted[name].shape and bool(equal.all()), f"{name}: {int((~equal).sum())} elements differ"


@examples(40)
@given(calls())
def test_kernels_equal_float64(call: Call) -> None:
    agrees(call)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="CUDA tensors always run kernels")
@examples(50)
@given(calls())
def test_formula_equals_float64(call: Call) -> None:
    with no_kernels():
        agrees(replace(call, limits={}))


def scaled(call: Call, a: float, sign: int = 1, shift: float = 0.0) -> Call:
    """The call of a · s + shift, with eps · a²."""
    more = {name: placed._replace(times=a * placed.times, middle=a * placed.middle)
            for name, placed in call.operands.items() if name in ("x", "pre_add")}  # fmt: skip
    more["x"] = more["x"]._replace(middle=more["x"].middle + shift)
    if "weight" in call.operands:
        more["weight"] = call.operands["weight"]._replace(times=float(sign))
    return replace(call, operands=call.operands | more, options=call.options | {"eps": call.options["eps"] * a * a})


def times(tensors: Tensors, a: float, sign: int = 1, shift: float = 0.0) -> Tensors:
    """What comes out of it, from what came out before."""
    factors = dict.fromkeys(("sum", "mean"), a) | dict.fromkeys(("dx", "dpre_add"), 1 / a)
    factors |= {"rstd": 1 / abs(a), "dweight": sign}
    found = {name: t * factors.get(name, 1) for name, t in tensors.items()}
    return {name: t + shift if name in ("sum", "mean") else t for name, t in found.items()}


@ways
@examples(8)
@given(calls(dtypes=(torch.float32, torch.float64, torch.bfloat16)), st.integers(-6, 6), st.booleans())
def test_powers_of_two_change_no_bit(way: Any, call: Call, power: int, negative: bool) -> None:
    """norm(a s; a² eps) = norm(s; eps), dx and rstd are 1/a of those: no rounding depends on an exponent, while none
    leaves the range of its type (as in fp16).  A negative a turns xhat around, which a negative weight undoes."""
    sign = -1 if negative and "weight" in call.operands else 1
    a = sign * 2.0**power
    other = scaled(call, a, sign)

    def back(out: Tensors) -> Tensors:
        torch.manual_seed(0)
        return {name: torch.randn_like(out[name]) for name in ("y", "sum") if name in out}

    def less(out: Tensors) -> Tensors:
        return {name: t / a if name == "sum" else t for name, t in back(out).items()}

    with way():
        same(other.run(other.tensors(), less), times(call.run(call.tensors(), back), a, sign))


@ways
@examples(10)
@given(calls(), st.sampled_from([3.0, -5.0, 0.5]), st.sampled_from([20.0, -11.0]))
def test_shift_and_scale_cancel(way: Any, call: Call, a: float, shift: float) -> None:
    """norm(a s + b; a² eps) = norm(s; eps) where the mean is taken away, up to roundings.  s holds integers, so that
    a s + b is exact in bfloat16."""
    sign = -1 if a < 0 else 1
    assume(sign > 0 or "weight" in call.operands)
    whole = {name: p._replace(whole=name in ("x", "pre_add"), middle=0.0) for name, p in call.operands.items()}
    call = replace(call, operands=whole, options=call.options | {"center": True})
    other = scaled(call, a, sign, shift)
    made = other.tensors()
    draw, flowing = flowing_back(other, made), {}
    assume(made["x"].numel())
    with way():
        found = other.run(made, lambda out: flowing.update(draw(out)) or flowing)
        unscaled = {name: t * a if name == "sum" else t for name, t in flowing.items()}
        before = call.run(call.tensors(), lambda out: unscaled)
    sizes = expected(other, made, found, flowing)
    for name, value in times(before, a, sign, shift).items():
        close(other, name, found[name], value, sizes[name][1], scale=2)  # roundings of both


@ways
@examples(10)
@given(calls(patterns=False), st.randoms(use_true_random=False))
def test_the_order_of_axes_does_not_matter(way: Any, call: Call, random: Any) -> None:
    """norm of x with its axes in another order, kept ones or averaged ones: in the same memory, or in memory of its
    own.  Up to roundings: sums go along memory, and axis 0 is taken for the batch."""
    order = list(range(len(call.shape)))
    random.shuffle(order)
    back_to = [order.index(i) for i in range(len(order))]

    def turned(t: torch.Tensor, axes: list[int] = order) -> torch.Tensor:
        return t.reshape((1,) * (len(axes) - t.dim()) + tuple(t.shape)).permute(axes)

    made = call.tensors()
    assume(made["x"].numel())
    draw, flowing = flowing_back(call, made), {}
    reduced = tuple(order.index(i) for i in call.reduced)
    factors = tuple(call.factors[i] for i in order)
    other = replace(call, factors=factors, axes=reduced, options=call.options | {"return_stats": False})
    with way():
        found = call.run(made, lambda out: flowing.update(draw(out)) or flowing)
        dense = random.random() < 0.5
        again = {name: turned(t).contiguous() if dense else turned(t) for name, t in made.items()}
        there = other.run(again, lambda out: {name: turned(t) for name, t in flowing.items()})
    sizes = expected(call, made, found, flowing)
    for name, t in there.items():
        close(call, name, turned(t, back_to).reshape(found[name].shape), found[name], sizes[name][1], scale=2)


@ways
@examples(10)
@given(calls(), st.randoms(use_true_random=False))
def test_the_order_along_averaged_axes_does_not_matter(way: Any, call: Call, random: Any) -> None:
    """Elements of a group in another order, with all that belongs to them, come out in that order: up to roundings."""
    call = replace(call, operands={name: p for name, p in call.operands.items() if name not in ("weight", "bias")})
    call = replace(call, leaves=call.leaves & call.operands.keys())
    axis = random.choice(call.reduced)
    order = torch.tensor(random.sample(range(call.split[axis]), call.split[axis]), dtype=torch.int64, device=DEVICE)

    def mixed(t: torch.Tensor) -> torch.Tensor:
        return t.expand(call.shape).reshape(call.split).index_select(axis, order).reshape(call.shape)

    made = call.tensors()
    made = {name: t.expand(call.shape) for name, t in made.items()}
    assume(made["x"].numel())
    draw, flowing = flowing_back(call, made), {}
    with way():
        found = call.run(made, lambda out: flowing.update(draw(out)) or flowing)
        again = {name: mixed(t) for name, t in made.items()}
        there = call.run(again, lambda out: {name: mixed(t) for name, t in flowing.items()})
    sizes = expected(call, made, found, flowing)
    for name, t in found.items():
        value = t if name in ("mean", "rstd") else mixed(t)
        size = sizes[name][1] if name in ("mean", "rstd") else mixed(sizes[name][1])
        close(call, name, there[name], value, size, scale=2)


@dataclass(frozen=True)
class Rows:
    """Batches of rows, for a norm over the last axes."""

    counts: tuple[int, ...]
    shape: tuple[int, ...]
    norm: Any
    dtype: torch.dtype
    operands: frozenset[str]
    activation: str
    limits: dict[str, Any]

    def run(self, made: Tensors, part: slice) -> Tensors:
        parts = {name: t.detach() if name == "weight" else t[part].detach() for name, t in made.items()}
        leaves = [t.requires_grad_() for name, t in parts.items() if name not in ("dy", "weight")]
        given = {name: t for name, t in parts.items() if name not in ("x", "dy")}
        with schedule.forced(**self.limits) if self.limits else nullcontext():
            y = self.norm(parts["x"], self.shape, **given, activation=self.activation)
            y, *total = y if isinstance(y, tuple) else (y,)
            gradients = torch.autograd.grad([y, *total], leaves, [parts["dy"]] * (1 + len(total)))
        return {str(i): t.detach() for i, t in enumerate([y, *total, *gradients])}


rows = st.builds(
    Rows, st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([(1,), (5,), (8,), (33,), (64,), (100,), (3, 7), (2, 3, 4)]),
    st.sampled_from([F.layer_norm, F.rms_norm]), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.frozensets(st.sampled_from(["weight", "pre_add", "post_add"])), st.sampled_from(["identity", "silu", "gelu"]),
    schedules,
)  # fmt: skip


@ways
@examples(10)
@given(rows)
def test_a_row_does_not_depend_on_others(way: Any, case: Rows) -> None:
    """Norms over the last axes, of rows that lie one after the other in memory: y, the sum, dx and the gradients of
    additions of a batch are those of its parts, bit for bit.  The formula ends in PyTorch's activations, which compute
    the last elements of a tensor otherwise than those before."""
    if way is no_kernels:
        case = replace(case, activation="identity")
    torch.manual_seed(0)
    whole = (sum(case.counts), *case.shape)
    made = {name: torch.randn(case.shape if name == "weight" else whole).to(DEVICE, case.dtype)
            for name in ("x", "dy", *sorted(case.operands))}  # fmt: skip
    with way():
        together = case.run(made, slice(None))
        first = 0
        for count in case.counts:
            part = slice(first, first + count)
            same(case.run(made, part), {name: t[part] for name, t in together.items()})
            first += count


@ways
@examples(6)
@given(calls())
def test_bits_do_not_depend_on_fresh_memory(way: Any, call: Call) -> None:
    """Nor on which run it is."""
    made = call.tensors()
    with way():
        runs = []
        for value in (float("nan"), 3e4, 0.0, 0.0):  # 3e4: as large as fp16 goes
            with filled(value):
                runs.append(call.run(made))
    for run in runs[1:]:
        same(run, runs[0])
