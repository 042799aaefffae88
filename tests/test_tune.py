"""``python -m bench tune``: what made-up records say, and what is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune, tune_propose
from bench.tune_cases import SWEEP, THRESHOLDS, chosen, questions, tasks
from bench.tune_propose import Choice, best_value, comment, crossover, furthest, groups, proposals
from normops.gpus import H200
from normops.schedule import Limits

ROOT = Path(__file__).resolve().parents[1]
LIMITS = asdict(Limits()) | {"window": H200.window}


def content(rows: Sequence[dict[str, Any]], **where: Any) -> dict[str, Any]:
    environment = {"device": "NVIDIA Made-up", "commit": "abcdef0123", "dirty": False, "torch": "2", "triton": "3",
                   "date": "2030-01-02T00:00:00+00:00"}  # fmt: skip
    return {"kind": "tune", "schema": 1, "environment": environment | where, "limits": LIMITS, "rows": list(rows),
            "done": []}  # fmt: skip


def row(case: str, question: str, value: Any, us: float, engine: str = "resident", **facts: Any) -> dict[str, Any]:
    return {
        "case": case, "format": "contiguous", "dtype": "bf16", "direction": "forward", "question": question,
        "value": value, "engine": engine, "ok": True, "us": us, "us_low": 0.99 * us, "us_high": 1.01 * us,
    } | facts  # fmt: skip


def call(size: int, resident: float, ticketed: float, **facts: Any) -> list[dict[str, Any]]:
    """The engines of a call that takes the ticketed one."""
    facts = {"field": "forward", "need": size, "window_need": size} | facts
    return [
        row(f"rows of {size}", "engine", "current", ticketed, "ticketed", **facts),
        row(f"rows of {size}", "engine", "resident", resident, "resident", **facts),
        row(f"rows of {size}", "engine", "split", 2 * ticketed, "split", **facts),
    ]


def proposed(limit: str, *contents: dict[str, Any]) -> tune_propose.Proposal:
    (group,) = groups(contents)
    (found,) = (p for p in proposals(group) if p.limit == limit)
    return found


SIZES = [2**i for i in range(11, 19)]


def test_a_crossover_is_found() -> None:
    """On chip is faster up to 65536, where the limit says 49152."""
    rows = [r for n in SIZES for r in call(n, resident=8.0 if n <= 65536 else 14.0, ticketed=10.0)]
    found = proposed("forward", content(rows))
    assert (found.current, found.value) == (49152, 65536)
    assert (found.agree, found.decided, found.changed, found.slower) == (8, 8, 1, ())
    assert found.gain == pytest.approx(1.25), "of the call that would change"
    (group,) = groups([content(rows)])
    assert comment(group, found) == (
        "forward: # measured: NVIDIA Made-up, abcdef0: 65536, 1.25x faster than 49152 over 1 calls, 8 of 8 calls agree"
    )


def test_a_crossover_below_the_limit_too_and_who_becomes_slower() -> None:
    """Only 4096 and less are faster on chip, but for one call that disagrees."""
    rows = [r for n in SIZES for r in call(n, resident=8.0 if n <= 4096 or n == 16384 else 14.0, ticketed=10.0)]
    found = proposed("forward", content(rows))
    assert (found.value, found.agree, found.decided) == (16384, 7, 8), "the nearer of two that as many agree with"
    rows += call(12000, resident=14.0, ticketed=10.0)
    found = proposed("forward", content(rows))
    assert (found.value, found.agree, found.decided) == (4096, 8, 9)
    assert found.slower == (("rows of 16384, contiguous, bf16, forward", 0.8),)


def test_a_limit_that_is_right_stands() -> None:
    rows = [r for n in SIZES for r in call(n, resident=8.0 if n <= 32768 else 14.0, ticketed=10.0)]
    found = proposed("forward", content(rows))
    assert (found.value, found.current, found.agree, found.changed) == (49152, 49152, 8, 0)
    assert "49152 stands, 8 of 8 calls agree" in comment(groups([content(rows)])[0], found)


def test_noise_gives_no_answer() -> None:
    """Times whose quartiles overlap decide nothing, however many there are."""
    rows = [r for n in SIZES for r in call(n, resident=9.9 if n % 3 else 10.1, ticketed=10.0)]
    found = proposed("forward", content(rows))
    assert (found.value, found.decided, found.note) == (None, 0, "0 of 8 calls decide")
    assert comment(groups([content(rows)])[0], found) == ""


def test_calls_that_disagree_give_no_answer() -> None:
    rows = [r for i, n in enumerate(SIZES) for r in call(n, resident=8.0 if i % 2 else 14.0, ticketed=10.0)]
    found = proposed("forward", content(rows))
    assert found.value is None and found.note == "calls disagree" and found.agree < found.decided == 8


def test_a_missing_engine_decides_nothing() -> None:
    """Resident that does not compile, or no engine to compare it with."""
    rows = [r for n in SIZES for r in call(n, 8.0, 10.0) if r["value"] != "resident"]
    failed = [r | {"ok": False, "error": "wrong"} for n in SIZES for r in call(n, 8.0, 10.0)[1:2]]
    assert proposed("forward", content(rows + failed)).note == "0 of 0 calls decide"
    alone = [r for n in SIZES for r in call(n, 8.0, 10.0)[1:2]]
    assert proposed("forward", content(alone)).note == "0 of 0 calls decide"
    never = [r | {"need": None} for n in SIZES for r in call(n, 8.0, 10.0)]
    assert proposed("forward", content(never)).note == "0 of 0 calls decide"


def test_the_end_of_what_was_seen_is_said() -> None:
    rows = [r for n in SIZES for r in call(n, resident=8.0, ticketed=10.0)]
    found = proposed("forward", content(rows))
    assert found.value == SIZES[-1] and found.note == f"inside wins up to {SIZES[-1]}, the largest seen"
    rows = [r for n in SIZES for r in call(n, resident=12.0, ticketed=10.0)]
    found = proposed("forward", content(rows))
    assert found.value == SIZES[0] // 2 and found.note == f"inside wins nowhere from {SIZES[0]} on"


def test_each_threshold_looks_at_its_own_calls() -> None:
    rows = [r for n in SIZES for r in call(n, 8.0, 10.0, field="backward_affine", direction="backward")]
    assert proposed("backward_affine", content(rows)).decided == 8
    assert proposed("backward", content(rows)).decided == 0
    window = proposed("window", content(rows))
    assert window.current == H200.window and window.decided == 8, "ticketed against split"
    assert window.value is None, "all calls are far below the window: that says nothing about where it should end"


def test_devices_and_commits_are_kept_apart() -> None:
    early = [r for n in SIZES for r in call(n, 8.0 if n <= 4096 else 14.0, 10.0)]
    late = [r for n in SIZES for r in call(n, 8.0 if n <= 65536 else 14.0, 10.0)]
    found = groups([content(early), content(late, device="Other"), content(late, commit="0123456")])
    assert [(g.device, g.commit) for g in found] == [
        ("NVIDIA Made-up", "abcdef0"), ("Other", "abcdef0"), ("NVIDIA Made-up", "0123456"),
    ]  # fmt: skip
    values = [next(p.value for p in proposals(g) if p.limit == "forward") for g in found]
    assert values == [4096, 65536, 65536]


def test_the_newer_of_two_comparisons_counts() -> None:
    old = content([r for n in SIZES for r in call(n, 8.0 if n <= 4096 else 14.0, 10.0)])
    new = content([r for n in SIZES for r in call(n, 8.0 if n <= 65536 else 14.0, 10.0)], date="2030-01-03")
    assert proposed("forward", new, old).value == 65536


def value_rows(limit: str, ratios: dict[int, Sequence[float]]) -> list[dict[str, Any]]:
    """Calls for which a value takes `ratio` times less time than what stands."""
    calls = range(len(next(iter(ratios.values()))))
    now = [row(f"call {i}", limit, "current", 10.0) for i in calls]
    return now + [row(f"call {i}", limit, value, 10.0 / ratios[value][i]) for value in ratios for i in calls]


def test_the_value_with_the_best_mean_wins() -> None:
    rows = value_rows("tile", {2048: [0.9] * 6, 8192: [1.1, 1.2, 1.1, 1.05, 1.3, 0.9]})
    found = proposed("tile", content(rows))
    assert (found.current, found.value, found.agree, found.decided, found.changed) == (4096, 8192, 5, 6, 6)
    assert found.gain == pytest.approx((1.1 * 1.2 * 1.1 * 1.05 * 1.3 * 0.9) ** (1 / 6))
    assert [name for name, _ in found.slower] == ["call 5, contiguous, bf16, forward"]
    assert found.slower[0][1] == pytest.approx(0.9)


@pytest.mark.parametrize(("ratios", "note"), [
    ([1.005] * 6, "0 calls faster with 8192, 0 slower, 6 within noise"),
    ([1.3, 1.3, 1.3, 0.9, 0.9, 0.9], "3 calls faster with 8192, 3 slower, 0 within noise"),
    ([1.3], "1 calls faster with 8192, 0 slower, 0 within noise"),
])  # fmt: skip
def test_values_without_a_clear_answer(ratios: Sequence[float], note: str) -> None:
    found = proposed("tile", content(value_rows("tile", {8192: ratios})))
    assert found.value is None and found.note == note


def test_a_value_that_all_others_lose_to_stands() -> None:
    found = proposed("tile", content(value_rows("tile", {2048: [0.8] * 5, 8192: [0.9] * 5})))
    assert found.value == found.current == 4096


def test_schedules_that_launch_the_same_are_not_counted() -> None:
    rows = [r | {"us": None} for r in value_rows("tile", {8192: [1.5] * 6}) if r["value"] == "current"]
    untimed = [{k: v for k, v in r.items() if k != "us"} | {"same": True, "value": 8192} for r in rows]
    assert best_value("tile", 4096, tune_propose.tried(groups([content(untimed)])[0], "tile")).value is None


def test_a_gain_too_small_changes_no_threshold() -> None:
    choices = [Choice(f"{n}", 10.0, 10.1, True, n) for n in SIZES]
    found = crossover("forward", 16384, choices)
    assert found.value == 16384 and found.changed == 0 and "nothing to win" in found.note


def test_runs_of_bench_gpu_say_where_there_is_most_to_win() -> None:
    key = {"format": "contiguous", "dtype": "bf16", "provider": "normops", "ok": True, "us": 5.0}
    rows = [key | {"case": f"c{i}", "direction": "forward", "of_floor": 0.9 - 0.1 * i} for i in range(3)]
    rows += [key | {"case": "c9", "direction": "both", "of_floor": 0.1}, key | {"case": "e", "ok": False}]
    run = content([]) | {"kind": "gpu", "timing": rows}
    assert [r["case"] for r in furthest([run, content([])])] == ["c2", "c1", "c0"] and groups([run]) == []


def test_files_in_proposals_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [r for n in SIZES for r in call(n, 8.0 if n <= 65536 else 14.0, 10.0)]
    path = tmp_path / "tune.json"
    path.write_text(json.dumps(content(rows)))
    before = (ROOT / "normops" / "schedule.py").read_bytes()
    assert tune.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "forward: # measured: NVIDIA Made-up, abcdef0: 65536, 1.25x faster than 49152" in out
    assert "no clear answer" in out and (ROOT / "normops" / "schedule.py").read_bytes() == before
    path.write_text('{"kind": "other"}')
    assert tune.main([str(path)]) == 2 and "must be a record of" in capsys.readouterr().err
    assert tune.main([str(tmp_path / "none.json")]) == 2 and "cannot be read" in capsys.readouterr().err


def test_nothing_without_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2 and "proposes nothing without times" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert tune.main(["--measure"]) == 2 and "needs a CUDA device" in capsys.readouterr().err


def test_every_limit_is_asked_about_and_the_engines_first() -> None:
    names = [question.name for question in questions(Limits(), H200)]
    assert names[0] == "engine"
    assert {*names, *THRESHOLDS} == set(asdict(Limits()))
    todo = tasks(chosen(None), "bf16", 0, Limits(), H200, lambda name: True)
    order = [task.question.name for task in todo]
    assert order == sorted(order, key=names.index) and len({task.key for task in todo}) == len(todo)


def test_the_sweep_straddles_every_threshold() -> None:
    """For each limit that holds groups on chip there are calls on both sides, and about as large ones."""
    limits = Limits()
    for case in SWEEP:
        elements = torch.Size(case.shape).numel()
        assert 0.4 < elements / (32 * 2**20) < 1.6, case
    for norm, limit in (("layer", limits.forward), ("layer", limits.backward_affine), ("rms", limits.forward),
                        ("instance", limits.forward), ("instance", limits.backward),
                        ("batch", limits.forward)):  # fmt: skip
        sizes = [case.group for case in SWEEP if case.norm == norm]
        assert min(sizes) < limit < max(sizes) and len(sizes) >= 8, norm


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rich", "typer", "matplotlib", "sklearn", "hypothesis", "pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = ["bench", "tune"]
import runpy
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


def test_needs_nothing_but_torch_and_triton() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "proposes nothing without times" in done.stderr, done.stderr
