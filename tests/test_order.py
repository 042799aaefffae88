"""The bits of a call do not depend on the order in which the programs of its launches run: a GPU promises none.

Those of launches whose programs wait for one another are raced in test_ticketed.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from normops import schedule
from normops.compiled import INTERPRETED
from normops.kernels.bundles import APPLY, BOTH, STATISTICS
from normops.kernels.finish import finish, grad_finish, sum_rows
from normops.kernels.grad_stream import grad_stream
from normops.kernels.resident import grad_group, grad_normalize, normalize
from normops.kernels.stream import stream
from normops.testing import Planned, plans
from normops.testing.counting import KERNELS
from tests.test_values import ADDS, BY_NAME, DTYPES, NORMS, Norm, compare
from tests.ticketed_calls import bits
from tests.tolerance import ACTIVATIONS, FORMATS, TINY

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="orders of the interpreter: TRITON_INTERPRET=1")


@contextmanager
def order(of: str, seed: int) -> Iterator[None]:
    """Programs run "reversed", or "shuffled" anew in each launch."""
    builder, random = interpreter.InterpreterBuilder, np.random.default_rng(seed)
    ids: list[int] = []

    def begin(self: interpreter.InterpreterBuilder, *grid: int) -> None:
        begun(self, *grid)
        ids[:] = range(grid[0])[::-1] if of == "reversed" else random.permutation(grid[0]).tolist()

    def go(self: interpreter.InterpreterBuilder, x: int, y: int, z: int) -> None:
        gone(self, ids[x], y, z)

    with pytest.MonkeyPatch.context() as patch:
        begun, gone = builder.set_grid_dim, builder.set_grid_idx
        patch.setattr(builder, "set_grid_dim", begin)
        patch.setattr(builder, "set_grid_idx", go)
        yield


@triton.jit
def turns(turn_ptr, counter_ptr):
    tl.store(turn_ptr + tl.atomic_add(counter_ptr, 1), tl.program_id(0))


@pytest.mark.parametrize("of", ["reversed", "shuffled"])
def test_an_order_has_every_program_once(of: str) -> None:
    found = []
    with order(of, seed=0):
        for _ in range(2):
            turn = torch.full((20,), -1, dtype=torch.int32)
            turns[(20,)](turn, torch.zeros(1, dtype=torch.int32))
            found.append(turn.tolist())
    if of == "reversed":
        assert found == [[*range(20)][::-1]] * 2
    else:
        assert sorted(found[0]) == sorted(found[1]) == [*range(20)] and found[0] != found[1]


class Case(NamedTuple):
    norm: Norm
    layout: str
    dtype: torch.dtype
    activation: str
    adds: str
    limits: dict[str, Any]
    shape: tuple[int, ...] | None = None

    def run(self) -> list[Planned]:
        """Both directions, whose values and gradients are those of float64."""
        torch.manual_seed(0)
        with schedule.forced(**self.limits), plans() as planned:
            compare(
                self.norm, self.layout, self.dtype, torch.device("cpu"), activation=self.activation, adds=self.adds,
                shape=self.shape,
            )  # fmt: skip
        return planned


def table(layouts: tuple[str, ...], **limits: Any) -> list[Case]:
    """Every norm in these layouts; dtypes, activations and additions go round."""
    return [
        Case(norm, layout, DTYPES[turn % 4], [*ACTIVATIONS][turn % 9], ADDS[turn // 3 % 4], limits)
        for turn, (norm, layout) in enumerate(product(NORMS, layouts))
    ]


CASES = {
    "resident": [
        *table(FORMATS),
        # Sums for dw and db that several programs add up.
        Case(BY_NAME["layer"], "contiguous", torch.float32, "silu", "pre", {}, (2, 2, 3, 600)),
        # Groups that fill a program of the backward: here of 64 elements.
        Case(BY_NAME["batch"], "contiguous", torch.float16, "relu", "none", {"backward": 64, "grad_tile": 64},
             (1, 80, 8, 8)),
    ],
    "split": table(("contiguous", "channels_last"), engine="split", **TINY),
}  # fmt: skip
LAUNCHED = {
    "resident": {(normalize, BOTH), (grad_normalize, BOTH), (grad_group, BOTH), (sum_rows, BOTH)},
    "split": {
        (stream, STATISTICS), (stream, APPLY), (finish, BOTH), (grad_normalize, STATISTICS), (grad_normalize, APPLY),
        (grad_stream, STATISTICS), (grad_stream, APPLY), (grad_finish, BOTH),
    },
}  # fmt: skip
"""All kernels, and what they do in a launch."""


@pytest.mark.parametrize("which", CASES)
def test_programs_in_another_order_give_the_same_bits(which: str) -> None:
    """Of all that a launch is given: outputs, statistics, running ones, partial results."""
    launched = set()
    for i, case in enumerate(CASES[which]):
        expected = case.run()
        with order(("reversed", "shuffled")[(i + i // 2) % 2], seed=i):  # of a layout this and that, too
            found = case.run()
        for one, other in zip(found, expected, strict=True):
            launched |= {(launch.kernel, launch.form.PHASE) for launch in one.plan.launches if launch.grid > 1}
            for name, t in one.operands.items():
                assert torch.equal(bits(t), bits(other.operands[name])), f"{name}: {case}"
    assert launched == LAUNCHED[which]


def test_every_kernel_is_launched() -> None:
    assert {kernel for launched in LAUNCHED.values() for kernel, _ in launched} == {*KERNELS}
