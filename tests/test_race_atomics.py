"""Atomic operations of programs at the same time: none is lost, whatever their type, width and ordering."""

from __future__ import annotations

import inspect
import os
import time
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

from normops.compiled import INTERPRETED
from normops.testing import race
from tests.test_race import no_process_is_left as no_process_is_left

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="races in the interpreter: TRITON_INTERPRET=1")


@triton.jit
def contended(p_ptr, out_ptr, OP: tl.constexpr, SEM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if OP == "add":
        tl.atomic_add(p_ptr + 0 * i, (i % 2 * 2 - 1).to(p_ptr.dtype.element_ty), sem=SEM)
    elif OP == "xor":
        tl.atomic_xor(p_ptr + 0 * i, 1 << (i % 8), sem=SEM)
    elif OP == "xchg":
        lane = tl.program_id(0) * BLOCK + i
        tl.store(out_ptr + lane, tl.atomic_xchg(p_ptr + 0 * i, lane + 1, sem=SEM))
    else:
        for _ in range(20):
            old = tl.load(p_ptr)
            while tl.atomic_cas(p_ptr, old, old + 1, sem=SEM) != old:
                old = tl.load(p_ptr)


@triton.jit
def increments(p_ptr, TIMES: tl.constexpr):
    for _ in range(TIMES):
        tl.atomic_add(p_ptr, 1.0)


@triton.jit
def contended_in_all_orderings(p_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    """Programs of all four orderings meet at one address."""
    which = tl.program_id(0) % 4
    if which == 0:
        contended(p_ptr, out_ptr, OP, "relaxed", BLOCK)
    elif which == 1:
        contended(p_ptr, out_ptr, OP, "acquire", BLOCK)
    elif which == 2:
        contended(p_ptr, out_ptr, OP, "release", BLOCK)
    else:
        contended(p_ptr, out_ptr, OP, "acq_rel", BLOCK)


def test_narrow_atomics_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter's own are nothing of the kind: a load, a pause and a store."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    plain = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store")}

    def slow(self: Any, op: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        old = plain["create_masked_load"](self, ptr, mask, None, None, *(None,) * EXTRA)
        time.sleep(1e-4)
        plain["create_masked_store"](self, ptr, type(ptr)(old.data + value.data, old.dtype), mask, *(None,) * EXTRA)
        return old

    EXTRA = len(inspect.signature(plain["create_masked_store"]).parameters) - 4
    monkeypatch.setattr(builder, "create_atomic_rmw", slow)
    sums = {}
    for dtype in (torch.float16, torch.float32):
        sums[dtype] = torch.zeros(1, dtype=dtype)
        race(increments, 16, (sums[dtype],), {"TIMES": 10}, jitter=0.0)
    assert sums[torch.float16] == 160 > sums[torch.float32]


@pytest.mark.parametrize(
    ("op", "dtype", "block"),
    [
        ("add", torch.int32, 8192), ("add", torch.int64, 8192), ("add", torch.float32, 8192),
        ("add", torch.float64, 8192), ("add", torch.float16, 1024), ("xor", torch.int32, 8192),
        ("xchg", torch.int32, 8192), ("cas", torch.int32, 1),
    ],
)  # fmt: skip
def test_atomics_are_atomic_between_processes(op: str, dtype: torch.dtype, block: int) -> None:
    programs, repeats = 16, {"xchg": 1, "add": 6}.get(op, 3)
    p, out = torch.zeros(1, dtype=dtype), torch.zeros(programs * block, dtype=torch.int32)
    race(contended_in_all_orderings, programs, (p, out), {"OP": op, "BLOCK": block}, repeats=repeats, jitter=0.0)
    if op == "xchg":  # each value is handed on once
        assert sorted([*out.tolist(), int(p)]) == list(range(programs * block + 1))
    else:
        assert p.item() == (20 * programs * repeats if op == "cas" else 0)


@triton.jit
def narrow(x_ptr, old_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    old = tl.atomic_add(x_ptr + i, i.to(tl.float16), mask=i < n)
    tl.store(old_ptr + i, old, mask=i < n)
    tl.store(old_ptr + n, tl.atomic_add(x_ptr + n, 0.5))


def test_atomics_that_take_the_lock_return_what_was_there() -> None:
    x, old = torch.arange(100, 109).half(), torch.full((9,), torch.nan).half()
    before = x.clone()
    race(narrow, 1, (x, old, 7), {"BLOCK": 8})
    assert torch.equal(old[:8], before[:8]) and old[8].isnan()
    assert x.tolist() == [*range(100, 113, 2), 107.5, 108]
