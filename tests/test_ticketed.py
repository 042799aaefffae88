"""The ticketed engine with programs that run at the same time: its results, its counters, its order.

Races run in Triton's interpreter, see normops/testing/race.py for what they can find; a GPU runs the calls themselves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from normops import schedule
from normops.compiled import INTERPRETED
from normops.kernels import ticketed as kt
from normops.kernels.tickets import turn
from normops.launch import Step
from normops.plan import Launch, Plan
from normops.testing import Planned, plans, race
from tests.ticketed_calls import CASES, EPS, MOMENTUM, SMALL, Call, bits, within

interpreted = pytest.mark.skipif(not INTERPRETED, reason="races in the interpreter: TRITON_INTERPRET=1")

WRITES = {
    kt.ticketed: {"sum", "y", "mean", "rstd", "part_mean", "part_m2"},
    kt.grad_ticketed: {"dx", "dpost", "dw", "db", "t1", "t0", "c1", "c0", "p1", "p0"},
}
UPDATES = {"running_mean", "running_var"}
GUARD = -(1 << 20)
"""Stands in the words behind those of a launch: nobody may count there."""


def ticketed_launch(plan: Plan) -> Launch:
    assert plan.engine == "ticketed"
    return plan.launches[0]  # a second one adds up dw and db


def unit_tiles(plan: Plan, launch: Launch) -> int:
    blocks_a = -(-plan.streamed.extent("a") // launch.constants["BLOCK_A"])
    return blocks_a * launch.given["chunks_s"]


class Raced:
    """The ticketed launch of one direction, as it ran in the sequential interpreter, to run again in many ways."""

    def __init__(self, planned: Planned, running: dict[str, Tensor]) -> None:
        self.plan, self.launch, self.operands = planned.plan, ticketed_launch(planned.plan), dict(planned.operands)
        self.writes = WRITES[self.launch.kernel] & set(self.operands) & set(self.launch.pointers)
        self.updates = UPDATES & set(self.operands) & set(self.launch.pointers)
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

        scalars = {"eps": EPS, "momentum": MOMENTUM}
        given = self.launch.given | {"lead": lead}
        names = self.launch.kernel.arg_names[len(self.launch.pointers) :]
        args = [self.operands.get(name) for name in self.launch.pointers]
        args += [scalars.get(given[name], given[name]) for name in names[: len(self.launch.scalars)]]
        kwargs = {**self.launch.constants, "num_warps": self.launch.num_warps}
        self.poison()
        # The longest launch takes a second.
        race(self.launch.kernel, self.launch.grid, args, kwargs, repeats=repeats, between=between, timeout=10, **kw)
        self.verify(repeats)


def planned_only(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """From now on calls are planned and not launched."""
    found: list[Plan] = []
    monkeypatch.setattr(Step, "run", lambda self, *_: found.append(self.plan))
    return found


@interpreted
def test_the_cases_cover_every_way_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned_only(monkeypatch)
    with schedule.forced(engine="ticketed", **SMALL):
        for name in CASES:
            Call(name).run()
    launches = [ticketed_launch(plan) for plan in found]
    for kernel in WRITES:
        mine = [(plan, launch) for plan, launch in zip(found, launches, strict=True) if launch.kernel is kernel]
        seen = {
            "several units": sum(1 < unit_tiles(p, one) < one.grid // 2 for p, one in mine),
            "blocks of chunks": sum(one.constants["FAN"] > 0 and one.given["chunks_s"] > 2 for _, one in mine),
            "all chunks at once": sum(one.constants["FAN"] == 0 and unit_tiles(p, one) > 1 for p, one in mine),
            "folded": sum(one.constants["FOLD"][0] > 1 for _, one in mine),
            "along m": sum(one.constants["ALONG_M"] for _, one in mine),
        }
        if kernel is kt.grad_ticketed:
            for key in ("ROWS", "DIRECT"):
                seen |= {f"{key} {on}": sum(one.constants[key] is on for _, one in mine) for on in (True, False)}
        assert min(seen.values()) >= 2, seen


@interpreted
def test_statistics_run_ahead_by_a_unit_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an apply would wait for a ticket after its own; and by no more than there are."""
    found = planned_only(monkeypatch)
    none = dict.fromkeys(("forward", "forward_batch", "backward", "backward_affine"), 0)  # whole groups fit nowhere
    limits = [{"engine": "ticketed", **sizes, "ahead": ahead} for ahead in (0, 1, 1000) for sizes in (SMALL, {})]
    limits += [{**none, **SMALL, "window": window, "ahead": 1000} for window in (1 << 10, 1 << 12)]
    for changed in limits:
        with schedule.forced(**changed):
            for name in CASES:
                Call(name).run()
    found = [plan for plan in found if plan.engine == "ticketed"]
    assert len(found) > 6 * 2 * len(CASES)  # all that were forced, and some that fit the windows
    for plan in found:
        launch = ticketed_launch(plan)
        assert unit_tiles(plan, launch) <= launch.given["lead"] <= launch.grid // 2


@triton.jit
def turns(applies_ptr, tile_ptr, lead):
    ticket = tl.program_id(0)
    applies, tile = turn(ticket, lead)
    tl.store(applies_ptr + ticket, applies)
    tl.store(tile_ptr + ticket, tile)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 6])
def test_no_apply_waits_for_a_later_ticket(tiles: int, device: torch.device) -> None:
    """Each tile has one ticket of either kind, and the statistics of its unit have tickets before that of its apply."""
    applies, tile = (torch.empty(2 * tiles, dtype=torch.int32, device=device) for _ in range(2))
    for lead in range(1, tiles + 1):
        turns[(2 * tiles,)](applies, tile, lead)
        order = [*zip(applies.tolist(), tile.tolist(), strict=True)]
        assert sorted(order) == [(kind, i) for kind in (0, 1) for i in range(tiles)]
        at = {one: ticket for ticket, one in enumerate(order)}
        assert [i for kind, i in order if kind] == sorted(range(tiles))  # in order, each as soon as it may
        for unit in (u for u in range(1, lead + 1) if tiles % u == 0):
            for i in range(tiles):
                first = i // unit * unit
                assert all(at[0, j] < at[1, i] for j in range(first, first + unit)), (lead, unit, i)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_races_end_with_the_bits_of_one_program_after_the_other(name: str) -> None:
    """In whatever order programs run, and however far statistics run ahead."""
    call = Call(name)
    before = {key: t.clone() for key, t in call.running.items()}
    with schedule.forced(engine="ticketed", **SMALL), plans() as planned, within(20):
        found = call.run()
    call.check(found)
    assert len(planned) == 2
    for direction, one in enumerate(planned):
        raced = Raced(one, before)
        unit, tiles = unit_tiles(raced.plan, raced.launch), raced.launch.grid // 2
        assert unit <= tiles
        seed = call.random.getrandbits(16)
        raced.race(unit, 3, processes=4 + direction, seed=seed)
        raced.race(call.random.randint(unit, tiles), 2, processes=5 - direction, seed=seed + 1, jitter=0.3)


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
    assert {one.plan.engine for one in planned} == {"ticketed"}
