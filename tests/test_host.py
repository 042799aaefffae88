"""The measurement of host time: it runs, its parts add up, and its arithmetic is right."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench import host

ROOT = Path(__file__).resolve().parents[1]
NORMS = {"LayerNorm", "RMSNorm", "add + RMSNorm", "BatchNorm", "BatchNorm, ticketed", "GroupNorm", "InstanceNorm"}


def test_the_command_measures_every_norm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "host", "--blocks", "1", "--calls", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "host.json").read_text())
    found = {(row["norm"], row["provider"]): row for row in result["rows"]}
    assert {norm for norm, provider in found if provider == "normops"} == NORMS
    assert {provider for _, provider in found} >= {"normops", "normops.nn", "torch"}
    assert ("Liger" in {provider for _, provider in found}) != ("Liger" in result["skipped"])
    for row in found.values():
        assert 0 < row["forward_min_us"] <= row["forward_us"] < 1e6 and 0 < row["both_min_us"] <= row["both_us"] < 1e6
    engines = {part["norm"]: part["engine"] for part in result["stages"]}
    assert engines == {norm: "ticketed" if "ticketed" in norm else "resident" for norm in NORMS}
    assert not result["environment"]["interpreter"] and result["sum_us"] >= 0
    assert all(0 < time < 1e6 for time in result["empties_us"].values())
    for part in result["stages"]:
        assert all(0 < time < 1e6 for time in part["boundaries"].values())
        assert all(set(part[direction]) == set(host.STAGES) for direction in ("forward", "backward"))
        forward = found[part["norm"], "normops"]["forward_us"]
        assert sum(part["forward"].values()) == pytest.approx(forward), "the stages do not add up to the call"


def test_blocks_take_turns_and_the_median_counts() -> None:
    turns: list[str] = []
    rests: list[int] = []
    functions = {name: lambda name=name: turns.append(name) for name in "ab"}
    times = host.interleaved(functions, blocks=3, calls=2, rest=lambda: rests.append(len(turns)))
    assert turns == [*"aaaaabbbbb", *"aabb" * 3]
    assert rests == [12, 14, 16, 18, 20, 22]
    assert all(0 <= smallest <= middle for middle, smallest in times.values())
    assert gc.isenabled()


def test_medians_are_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 10, 0, 30, 0, 20])  # seconds at the start and the end of each block
    monkeypatch.setattr(host, "perf_counter", lambda: next(ticks))
    assert host.interleaved({"a": int}, blocks=3, calls=10) == {"a": (2e6, 1e6)}


def test_a_breakdown_is_differences_of_what_encloses_what() -> None:
    medians = {
        "lookup": 1.0, "apply": 4.0, "forward": 5.0, "forward launch": 3.0, "backward": 8.0, "backward launch": 6.0,
    }  # fmt: skip
    found = host.breakdown({name: (t, t) for name, t in medians.items()}, (11.0, 33.0))
    assert found["forward"] == {
        "checks and plan": 1.0, "autograd": 4.0, "allocation": 2.0, "launch": 3.0, "rest": 1.0,
    }  # fmt: skip
    assert found["backward"] == {
        "checks and plan": 0.0, "autograd": 14.0, "allocation": 2.0, "launch": 6.0, "rest": 0.0,
    }  # fmt: skip


def test_verdicts_hold_normops_to_half_of_liger() -> None:
    def row(norm: str, provider: str, forward: float, both: float) -> dict[str, object]:
        return {"norm": norm, "provider": provider} | {
            f"{direction}{kind}_us": time
            for direction, time in (("forward", forward), ("both", both)) for kind in ("", "_min")
        }  # fmt: skip

    rows = [row(norm, "normops", 10, 30) for norm in host.TARGET]
    assert all("not judged" in line for line in host.verdicts(rows))
    rows += [row("LayerNorm", "Liger", 20, 62), row("RMSNorm", "Liger", 19, 100)]
    lines = host.verdicts(rows)
    assert [line.split(":")[0] for line in lines] == ["LayerNorm", "RMSNorm", "BatchNorm"]
    assert [", met in" in line for line in lines] == [True, False, True]
    # Two sums of Liger's LayerNorm: 30 of 62 - 2 * 1.5 is more than half.
    assert [", met in" in line for line in host.verdicts(rows, 1.5)] == [False, False, False]
    rows[0]["both_min_us"] = 40
    assert [", met in" in line for line in host.verdicts(rows)] == [False, False, True]


LATER = """
import gc, json, sys
from time import perf_counter
import torch
from bench.host import silent
from normops import calls, functional
from normops.testing import virtual_device

def timed(function):
    start = perf_counter()
    function()
    return perf_counter() - start

def smallest():
    return min(timed(call) for _ in range(300))

def events(call):
    count = 0
    def seen(*_):
        nonlocal count
        count += 1
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count

w = torch.ones(64, requires_grad=True)
x = torch.empty(16, 64, requires_grad=True)
call = lambda: functional.layer_norm(x, (64,), w)
with virtual_device("h200"), silent():
    first, early, steps = timed(call), smallest(), events(call)
    gc.disable()
    for rows in range(32, 32 + 16 * 2000, 16):
        functional.layer_norm(torch.empty(rows, 64), (64,), w)
    late, later = smallest(), events(call)
    known = len(calls.known)
    unplanned = torch.empty(8, 16, 64, requires_grad=True)
    planning = events(lambda: functional.layer_norm(unplanned, (64,), w))
print(json.dumps(dict(first=first, planning=planning, early=early, late=late, steps=steps, later=later, known=known)))
"""


def test_a_call_that_was_planned_costs_little_however_many_were_planned_since() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LATER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["known"] > 2000, "the plans in between were not distinct"
    assert found["early"] < found["first"] / 20, "a planned call costs what the first one does"
    assert found["steps"] < found["planning"] / 4, "a planned call is planned again"
    # The same Python steps, and no search among 2000 plans inside one of them, which takes many times a call.
    assert found["later"] == found["steps"]
    assert found["late"] < 3 * found["early"]
