"""The ticketed engine with programs that run at the same time: its results, its counters, its order.

Races run in Triton's interpreter, see normops/testing/race.py for what they can find; a GPU runs the calls themselves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from normops import schedule
from normops.compiled import INTERPRETED
from normops.kernels.bundles import ABSENT, Operands
from normops.kernels.grad_stream import grad_stream
from normops.kernels.stream import stream
from normops.kernels.tickets import leave, pair
from normops.launch import Step
from normops.plan import Launch, Plan
from normops.testing import Planned, plans, race
from tests.ticketed_calls import CASES, EPS, MOMENTUM, SMALL, Call, bits, rows_alone, within

ROOT = Path(__file__).resolve().parents[1]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="races in the interpreter: TRITON_INTERPRET=1")

WRITES = {
    stream: {"sum", "y", "mean", "rstd", "part_mean", "part_m2"},
    grad_stream: {"dx", "dpost", "dw", "db", "c1", "c0", "p1", "p0"},
}
UPDATES = {"running_mean", "running_var"}
GUARD = -(1 << 20)
"""Stands in the words behind those of a launch: nobody may count there."""


def ticketed_launch(plan: Plan) -> Launch:
    assert plan.engine == "ticketed"
    return plan.launches[0]  # a second one adds up dw and db


def chunks(plan: Plan) -> int:
    """Along s, of a group."""
    return -(-plan.streamed.extent("s") // ticketed_launch(plan).tile[2])


def unit_tiles(plan: Plan) -> int:
    return -(-plan.streamed.extent("a") // ticketed_launch(plan).tile[1]) * chunks(plan)


def all_tiles(plan: Plan) -> int:
    launch = ticketed_launch(plan)
    return launch.grid - launch.given["number"]


class Raced:
    """The ticketed launch of one direction, as it ran in the sequential interpreter, to run again in many ways."""

    def __init__(self, planned: Planned, running: dict[str, Tensor]) -> None:
        self.plan, self.launch = planned.plan, ticketed_launch(planned.plan)
        self.unit, self.tiles = unit_tiles(self.plan), all_tiles(self.plan)
        given = self.launch.operands.items()
        self.operands = {name: planned.operands[call] for name, call in given if call in planned.operands}
        self.writes = WRITES[self.launch.kernel] & self.operands.keys()
        self.updates = UPDATES & self.operands.keys()
        self.before = {name: running[name] for name in self.updates}
        self.expected = {name: self.operands[name].detach().clone() for name in self.writes | self.updates}
        self.words = torch.full((self.plan.words + 64,), GUARD, dtype=torch.int32)
        self.words[: self.plan.words] = 0
        self.operands["tickets"] = self.words

    @torch.no_grad()
    def poison(self) -> None:
        for name in self.writes:
            self.operands[name].fill_(torch.nan)
        for name, t in self.before.items():
            self.operands[name].copy_(t)

    def verify(self, launches: int) -> None:
        words = self.words[: self.plan.words]
        assert not words.any(), f"dirty after launch {launches}: {words.tolist()}"
        assert (self.words[self.plan.words :] == GUARD).all(), "counted outside its words"
        for name, t in self.expected.items():
            assert torch.equal(bits(self.operands[name]), bits(t)), f"{name} differs after launch {launches}"

    def race(self, lead: int, repeats: int, **kw: Any) -> None:
        def between(launches: int) -> None:
            self.verify(launches)
            self.poison()

        scalars = {"eps": EPS, "momentum": MOMENTUM, "number": lead}
        names = self.launch.kernel.arg_names[1:-1]
        args = [scalars.get(name, value) for name, value in zip(names, self.launch.scalars, strict=True)]
        operands = Operands(**self.operands)
        self.poison()
        race(
            self.launch.kernel, self.tiles + lead, [operands, *args, self.launch.form],
            {"num_warps": self.launch.num_warps}, repeats=repeats, between=between,
            timeout=10,  # the longest launch takes a second
            **kw,
        )  # fmt: skip
        self.verify(repeats)


def planned_only(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """From now on calls are planned and not launched."""
    found: list[Plan] = []
    monkeypatch.setattr(Step, "launch", lambda self, *_: found.append(self.plan))
    return found


@interpreted
def test_the_cases_cover_every_way_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned_only(monkeypatch)
    with schedule.forced(engine="ticketed", **SMALL):
        for name in CASES:
            Call(name).run()
    for kernel in WRITES:
        mine = [(p, p.launches[0]) for p in found if p.engine == "ticketed" and p.launches[0].kernel is kernel]
        seen = {
            "one unit": sum(unit_tiles(p) == all_tiles(p) for p, _ in mine),
            "several units": sum(1 < unit_tiles(p) < all_tiles(p) for p, _ in mine),
            "groups side by side": sum(one.form.BLOCK_K > 1 for _, one in mine),
            "along m": sum(one.form.ALONG_M for _, one in mine),
            "activation": sum(one.form.ACT != "identity" for _, one in mine),
        }
        for key in ("POST", "SUM" if kernel is stream else "DPOST"):
            seen[key] = sum(getattr(one.form, key) != ABSENT for _, one in mine)
        if kernel is grad_stream:
            seen |= {f"DIRECT {on}": sum(one.form.DIRECT is on for _, one in mine) for on in (True, False)}
        assert min(seen.values()) >= 2, seen


@interpreted
def test_statistics_run_ahead_by_a_unit_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an apply would wait for a ticket after its own; and by no more than there are."""
    found = planned_only(monkeypatch)
    none = dict.fromkeys(("forward", "backward", "backward_affine"), 0)  # whole groups fit nowhere
    limits = [{"engine": "ticketed", **sizes, "ahead": ahead} for ahead in (0, 1, 1000) for sizes in (SMALL, {})]
    limits += [{**none, **SMALL, "window": window, "ahead": 1000} for window in (1 << 10, 1 << 12)]
    for changed in limits:
        with schedule.forced(**changed):
            for name in CASES:
                Call(name).run()
    found = [plan for plan in found if plan.engine == "ticketed"]
    directions = sum(1 if rows_alone(name) else 2 for name in CASES)
    assert len(found) > 6 * directions  # all that were forced, and some that fit the windows
    for plan in found:
        assert unit_tiles(plan) <= ticketed_launch(plan).given["number"] <= all_tiles(plan)
        assert all_tiles(plan) % unit_tiles(plan) == 0
        assert not ticketed_launch(plan).form.KEPT_FIRST, "tiles of a unit do not follow one another"


@triton.jit
def pairs(out_ptr, lead):
    ticket = tl.program_id(0)
    begins, tile, applies, applied = pair(ticket, lead)
    tl.store(out_ptr + 4 * ticket, begins)
    tl.store(out_ptr + 4 * ticket + 1, tile)
    tl.store(out_ptr + 4 * ticket + 2, applies)
    tl.store(out_ptr + 4 * ticket + 3, applied)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 6, 12])
def test_no_apply_waits_for_a_later_ticket(tiles: int, device: torch.device) -> None:
    """Each tile has its statistics and its apply in one ticket each, and no statistics of its unit come after that
    apply; nor does a program touch memory outside the tiles for what it does not do."""
    for lead in range(1, tiles + 1):
        out = torch.empty(tiles + lead, 4, dtype=torch.int32, device=device)
        pairs[(tiles + lead,)](out, lead)
        order = out.tolist()
        statistics = {tile: ticket for ticket, (begins, tile, _, _) in enumerate(order) if begins}
        apply = {tile: ticket for ticket, (_, _, applies, tile) in enumerate(order) if applies}
        assert sum(row[0] for row in order) == sum(row[2] for row in order) == tiles
        assert [*statistics] == [*apply] == [*range(tiles)]  # in order, each as soon as it may
        assert all(row[0] or row[2] for row in order)
        assert all(0 <= tile < tiles for row in order for tile in (row[1], row[3]))
        for unit in (u for u in range(1, lead + 1) if tiles % u == 0):
            for i in range(tiles):
                first = i // unit * unit
                assert all(statistics[j] < apply[i] for j in range(first, first + unit)), (lead, unit, i)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_races_end_with_the_bits_of_one_program_after_the_other(name: str) -> None:
    """In whatever order programs run, however many at a time, and however far statistics run ahead."""
    call = Call(name)
    before = {key: t.clone() for key, t in call.running.items()}
    with schedule.forced(engine="ticketed", **SMALL), plans() as planned, within(20):
        found = call.run()
    call.check(found)
    assert [one.plan.engine for one in planned] == ["ticketed", "split" if rows_alone(name) else "ticketed"]
    for direction, one in enumerate(one for one in planned if one.plan.engine == "ticketed"):
        raced = Raced(one, before)
        unit, tiles = raced.unit, raced.tiles
        seed = call.random.getrandbits(16)
        raced.race(unit, 2, processes=4 + direction, seed=seed)
        # A single program at a time would wait for ever, if it waited for one that has not begun.
        raced.race(unit, 1, processes=1, seed=seed, jitter=0.0)
        # Up to a unit further: the first applies of the unit where statistics end come before that end, others after.
        further = call.random.randint(unit, min(2 * unit, tiles))
        raced.race(further, 1, processes=5 - direction, seed=seed + 1, jitter=0.3)
        raced.race(tiles, 1, processes=4, seed=seed + 2)


@pytest.mark.skipif(INTERPRETED, reason="runs the programs of a launch one after the other; races vary that")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_ends_with_the_same_bits_each_time(name: str, device: torch.device) -> None:
    call = Call(name, device=device)
    before = {key: t.clone() for key, t in call.running.items()}
    with schedule.forced(engine="ticketed", **SMALL), plans() as planned:
        found = call.run()
        call.check(found)
        for n in range(100):
            for key, t in before.items():
                call.running[key].copy_(t)
            for key, t in call.run().items():
                assert torch.equal(bits(t), bits(found[key])), f"{key} differs after launch {n}"
    assert {one.plan.engine for one in planned} == ({"ticketed", "split"} if rows_alone(name) else {"ticketed"})


COMPILED = """
import re, torch
from normops import functional as F, schedule
from normops.testing import virtual_device

KINDS = {
    "stored": r"st\\.global", "barrier": r"bar\\.sync", "arrive": r"@%p\\d+ atom\\.global\\.gpu\\.acq_rel\\.add",
    "publish": r"@%p\\d+ atom\\.global\\.gpu\\.release\\.add",
    "wait": r"ld\\.acquire\\.gpu", "loaded": r"ld\\.global\\.cg", "leave": r"red\\.relaxed\\.gpu\\.global\\.inc",
}
x, w = torch.randn(8, 64, 28, 28, dtype=torch.bfloat16), torch.ones(64)
with virtual_device("h200") as gpu, schedule.forced(engine="ticketed"):
    leaves = [x.requires_grad_(), w.requires_grad_()]
    y = F.batch_norm(x, None, None, w, None, True)
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    for launch in gpu.launches:
        lines = launch.asm["ptx"].splitlines()
        print(launch.name, *(kind for line in lines for kind, text in KINDS.items() if re.search(text, line)))
"""


def test_barriers_stand_where_a_single_thread_speaks_for_all() -> None:
    """In PTX: between what all threads did, and what thread 0 tells of it, once, in the order that the source names;
    races have one thread in a program, and the model of test_protocol.py has what it says here of threads."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in launches] == ["stream", "grad_stream"]
    for name, *kinds in launches:
        text = " ".join(kinds)
        for told in ("arrive", "publish"):
            after_all = re.findall(rf"stored( loaded)* barrier( barrier| loaded)* {told}", text)
            assert text.count(told) == len(after_all) == 1, (name, text)
        assert text.count("arrive barrier") == 1, (name, text)
        assert re.search(r"wait( loaded)+( stored)+ barrier leave$", text), (name, text)


@triton.jit
def left(word_ptr, TILES: tl.constexpr, F: tl.constexpr):
    leave(word_ptr, TILES, F)


LEFT = """
import torch
import triton.language as tl
from normops.kernels.bundles import Form
from normops.testing import virtual_device
from tests.test_ticketed import left

with virtual_device("h200") as gpu:
    left[(1,)](torch.zeros(1, dtype=torch.int32), 21, Form(SPACE=((1,),) * 4, ACC=tl.float32, PTX=True))
print(gpu.launches[0].asm["ptx"])
"""


def test_in_ptx_the_last_apply_of_a_unit_resets_its_state(plain: Callable[[str], str]) -> None:
    """``inc`` counts to its bound and then from 0: tiles + 1 when published, 2 tiles when the last of them leaves."""
    ptx = plain(LEFT)
    (bound,) = re.findall(r"red\.relaxed\.gpu\.global\.inc\.u32 \[\S+\], (%r\d+);", ptx)
    assert re.findall(rf"mov\.[bsu]32\s+{bound}, (\d+);", ptx) == ["42"], ptx
