"""``python -m bench tune --measure`` without a GPU: doubles for device and processes, kernels in the interpreter."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import records, tune, tune_measure, workers
from bench.cases import Case
from bench.timing import Job
from bench.tune_cases import Task, questions, tasks
from bench.tune_propose import groups
from normops import gpus, schedule
from normops.gpus import H200
from normops.schedule import Limits
from tests.bench_doubles import BY_NAME, FakeDevice, FakeShell, serial
from tests.test_tune import LIMITS, row


def a_task(question: str, case: Case = BY_NAME["image group"], device: gpus.Device = H200) -> Task:
    (asked,) = (q for q in questions(Limits(), device) if q.name == question)
    return Task(Job(case, "contiguous", "fp32"), asked)


def test_engines_of_a_call_are_timed_in_turns() -> None:
    """At its small shape the call is held on chip; the two others are forced."""
    rows = tune_measure.measure(a_task("engine"), FakeDevice())
    timed = {(r["direction"], r["value"]): r for r in rows if "us" in r}
    assert {place: r["engine"] for place, r in timed.items()} == {
        (d, value): engine
        for d in ("forward", "backward")
        for value, engine in (("current", "resident"), ("ticketed", "ticketed"), ("split", "split"))
    }
    for r in timed.values():
        assert r["us_low"] <= r["us"] <= r["us_high"] and r["copy_us"] > 0 and r["graph"]
    (same,) = (r for r in rows if r["direction"] == "forward" and r["value"] == "resident")
    assert same["same"] and "us" not in same, "it launches what the present schedule launches"
    assert {r["direction"]: r["field"] for r in rows} == {"forward": "forward", "backward": "backward"}


def test_the_limit_that_a_call_needs_is_the_one_that_decides() -> None:
    task = a_task("engine")
    inputs = task.job.inputs((3, 256, 8, 8), 0)
    for direction, facts in tune_measure.needs(task, inputs).items():
        name, engines = facts["field"], []
        for value in (facts["need"] // 2, facts["need"]):
            changes = {name: value}
            engines.append(tune_measure.plans(task, inputs, changes)[direction].engine == "resident")
        assert engines == [False, True], direction
        held = dict.fromkeys(("forward", "backward", "backward_affine"), 1)
        for value in (facts["window_need"] // 2, facts["window_need"]):
            plan = tune_measure.plans(task, inputs, held | tune_measure.UNCACHED | {"window": value})[direction]
            engines.append(plan.engine == "ticketed")
        assert engines[2:] == [False, True], direction


def test_groups_past_their_limit_are_held_on_chip_for_the_comparison() -> None:
    """Else nobody would see that a limit is too low; far past it nobody is asked."""
    for side, held in ((230, True), (512, False)):
        task = a_task("engine", BY_NAME["cyclegan 256x64"])
        kept, rows = tune_measure.distinct(task, task.job.inputs((1, 8, side, side), 0))
        assert ("resident" in kept) == held
        skipped = [r["direction"] for r in rows if "skipped" in r and r["value"] == "resident"]
        assert skipped == (["backward"] if held else ["forward", "backward"]), "no limit holds such planes backward"


def test_planning_launches_nothing() -> None:
    task = a_task("engine")
    inputs = task.job.inputs(task.job.case.small, 0)
    before = {name: None if t is None else t.detach().clone() for name, t in inputs.items()}
    tune_measure.needs(task, inputs)
    assert all(t is None or torch.equal(t, before[name]) for name, t in inputs.items())
    assert schedule.limits() is schedule.limits() and asdict(schedule.limits()) == asdict(Limits())


def test_a_value_that_changes_nothing_is_not_timed() -> None:
    """How far statistics run ahead is nothing to a call that is held on chip."""
    device = FakeDevice()
    rows = tune_measure.measure(a_task("ahead"), device)
    assert all(r["same"] for r in rows) and len(rows) == 4 and not device.made


def test_a_value_that_matters_is() -> None:
    rows = tune_measure.measure(a_task("warps_per_sm", BY_NAME["vit-b"]), FakeDevice())
    assert all(r["ok"] for r in rows)
    timed = {(r["direction"], r["value"]) for r in rows if "us" in r}
    untouched = {(r["direction"], r["value"]) for r in rows if r.get("same")}
    assert ("forward", 8) in untouched and len(timed | untouched) >= 4


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = tune_measure.check

    def check(*given: Any) -> float:
        if schedule.limits().engine == "split":
            raise AssertionError("wrong: y is off by 9 times its bound")
        return checked(*given)

    monkeypatch.setattr(tune_measure, "check", check)
    rows = tune_measure.measure(a_task("engine"), FakeDevice())
    wrong = [r for r in rows if not r["ok"]]
    assert [(r["value"], r["error"]) for r in wrong] == [("split", "wrong: y is off by 9 times its bound")] * 2
    assert {r["value"] for r in rows if "us" in r} == {"current", "ticketed"}


def started(tmp_path: Path, measure: Callable[[Task], Any], pool: Any = serial, **where: Any) -> tune.Run:
    head = records.head(FakeShell(), "abcdef0123") | {"kind": "tune", "schema": 1, "limits": LIMITS}
    head["environment"] |= {"device": "NVIDIA Made-up", "commit": "abcdef0123", "dirty": False} | where
    path, content = tune.claim(tmp_path, head)
    todo = tasks([BY_NAME["image layer"]], "fp32", 0, Limits(), H200, lambda name: name in ("engine", "tile", "ahead"))
    return tune.Run(path, content, todo, time.monotonic() + 600, pool, measure)


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = started(tmp_path, partial(tune_measure.measure, device=FakeDevice()))
    content = run.go()
    assert json.loads(run.path.read_text()) == json.loads(json.dumps(content)) and content["not_run"] == []
    assert [key[3] for key in content["done"]] == ["engine", "tile", "ahead"]
    assert {r["question"] for r in content["rows"]} == {"engine", "tile", "ahead"}
    assert tune.main([str(run.path)]) == 0 and "Made-up, commit abcdef0" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    def one(function: Callable[[Any], Any], given: Sequence[Any], **_: Any) -> Iterator[tuple[int, Any]]:
        yield 0, function(given[0])

    def measure(task: Task) -> list[dict[str, Any]]:
        made.append(task.question.name)
        return [row("image layer", task.question.name, "current", 1.0)]

    made: list[str] = []
    first = started(tmp_path, measure, one).go()
    assert made == ["engine"] and len(first["not_run"]) == 2
    again = started(tmp_path, measure)
    assert again.go()["not_run"] == [] and made == ["engine", "tile", "ahead"], "none twice"
    assert len(list(tmp_path.glob("*.json"))) == 1
    changed = started(tmp_path, measure, commit="0123456789", dirty=True)
    assert changed.path.name == "tune-made-up-0123456-dirty.json"
    assert started(tmp_path, measure, commit="0123456789", dirty=True).path.name.endswith("-dirty-2.json")
    assert started(tmp_path, measure, triton="0").path.name == "tune-made-up-abcdef0-2.json"


def on_a_double(task: Task) -> list[dict[str, Any]]:
    return tune_measure.measure(task, FakeDevice())


def test_tasks_travel_to_other_processes(tmp_path: Path) -> None:
    content = started(tmp_path, on_a_double, workers.run).go()
    assert [r["error"] for r in content["rows"] if "error" in r] == [] and len(content["done"]) == 3


def test_failures_cost_only_themselves(tmp_path: Path) -> None:
    content = started(tmp_path, lambda task: 1 / 0).go()
    assert {r["error"] for r in content["rows"]} == {"ZeroDivisionError: division by zero"}
    assert len(content["done"]) == 3
    tune.show(groups([content]), [content])


def test_what_is_cut_off_is_left_for_the_next_run(tmp_path: Path) -> None:
    def cut(function: Any, given: Sequence[Any], **_: Any) -> Iterator[tuple[int, Any]]:
        yield 0, workers.Failed("cut off: no time left")

    run = replace(started(tmp_path, lambda task: []), pool=cut, until=0.0)
    content = run.go()
    assert content["rows"] == content["done"] == [] and len(content["not_run"]) == 3
