"""A provider that takes its process with it costs its own row, and no other."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import checks, gpu, records, timing, workers
from bench.peers import PROVIDERS, Provider
from bench.providers import Inputs, Outputs, by_torch
from bench.timing import DIRECTIONS, Job
from tests.bench_doubles import BY_NAME, TINY, FakeDevice, FakeShell

JOB = Job(BY_NAME[TINY], "contiguous", "fp32")
(TORCH,) = (provider for provider in PROVIDERS if provider.name == "torch")


def other(name: str, call: Any = None) -> Provider:
    return Provider(name, lambda case: call or partial(by_torch, case))


class Lost(FakeDevice):
    """A device that is lost once a call has raised."""

    lost = False

    def release(self) -> None:
        if self.lost:
            raise RuntimeError("the device is lost")


def die(inputs: Inputs) -> Outputs:
    os._exit(7)


def with_one_that_dies(job: Job) -> list[timing.Row]:
    return timing.time_job(job, FakeDevice(), [other("first"), other("dies", die), TORCH])


def with_two_that_die(job: Job) -> list[timing.Row]:
    return timing.time_job(job, FakeDevice(), [other("dies", die), other("first"), other("dies too", die)])


def with_one_that_loses_the_device(job: Job) -> list[timing.Row]:
    device = Lost()

    def lose(inputs: Inputs) -> Outputs:
        device.lost = True
        raise RuntimeError("illegal memory access")

    return timing.time_job(job, device, [other("first"), other("loses it", lose), TORCH])


class DiesInTurns(FakeDevice):
    def elapsed(self, replay: Any) -> float:
        if replay is self.made[2]:  # the copy, the first and the second provider
            os._exit(9)
        return super().elapsed(replay)


def with_one_that_dies_while_it_is_timed(job: Job) -> list[timing.Row]:
    device = FakeDevice() if job.lost else DiesInTurns()
    return timing.time_job(job, device, [other("first"), other("second"), TORCH])


def apart(task: tuple[Any, Job]) -> list[timing.Row]:
    function, job = task
    return function(job)


def test_a_lost_process_costs_the_rows_of_the_provider_at_work() -> None:
    died = "the process died (exit code 7)"
    expected: dict[Any, dict[str, str]] = {
        with_two_that_die: {"dies": died, "dies too": died},
        with_one_that_loses_the_device: {"loses it": "RuntimeError: the device is lost"},
        with_one_that_dies_while_it_is_timed: {"second": "the process died (exit code 9)"},
    }

    def again(task: tuple[Any, Job], failed: workers.Failed) -> tuple[Any, Job] | None:
        job = timing.spared(task[1], failed)
        return job and (task[0], job)

    tasks = [(function, JOB) for function in expected]
    found = dict(workers.run(apart, tasks, workers=2, until=time.monotonic() + 300, limit=100, again=again))
    for index, lost in enumerate(expected.values()):
        rows = found[index]
        assert {row["provider"]: row["error"] for row in rows if not row["ok"]} == lost
        right = {row["provider"] for row in rows} - lost.keys()
        good = [(row["provider"], row["direction"]) for row in rows if row["ok"]]
        assert right and sorted(good) == sorted((name, direction) for name in right for direction in DIRECTIONS)


def test_an_exception_costs_only_its_own_rows_in_the_same_process() -> None:
    def full(inputs: Inputs) -> Outputs:
        raise MemoryError("out of memory")

    rows = timing.time_job(JOB, FakeDevice(), [other("first"), other("full", full), TORCH])
    assert [row["error"] for row in rows if row["provider"] == "full"] == ["MemoryError: out of memory"]
    assert [row["provider"] for row in rows if row["ok"]] == ["first"] * 3 + ["torch"] * 3


def test_the_run_on_a_gpu_and_the_command_time_go_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = records.head(FakeShell(), "abcdef0123")
    run = gpu.Run(gpu.Budget(540), records.claim(tmp_path, head), TINY, "fp32", stages=("timing",), head=head,
                  shell=FakeShell(), time_job=with_one_that_dies)  # fmt: skip
    run.jobs = [JOB]
    rows = run.go()["timing"]
    assert [row["provider"] for row in rows if row["ok"]] == ["first"] * 3 + ["torch"] * 3
    assert [row["provider"] for row in rows if not row["ok"]] == ["dies"]

    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "time_job", with_one_that_dies)
    monkeypatch.setattr(timing, "run_all", partial(timing.run_all, processes=1))
    monkeypatch.setattr(timing.torch.cuda, "get_device_name", lambda *_: "made up")
    monkeypatch.setattr(timing, "save", lambda *_: None)
    assert timing.time_all("64 rows", tmp_path, 0, "fp32"), "normops was not wrong"
    assert "not timed: dies, long row 32768: the process died (exit code 7)" in capsys.readouterr().out


def examined(task: tuple[str, Job]) -> list[timing.Row]:
    checks.PROVIDERS = (other("normops"), other("dies", die), TORCH)
    return checks.examine(task)


def test_results_of_the_others_are_judged_without_it(tmp_path: Path) -> None:
    head = records.head(FakeShell(), "abcdef0123")
    run = gpu.Run(gpu.Budget(540), records.claim(tmp_path, head), TINY, "fp32", stages=("verify",), head=head,
                  shell=FakeShell(), examine=examined, crew=1)  # fmt: skip
    run.jobs = [JOB]
    rows = [row for row in run.go()["verify"] if row["provider"] != "normops"]
    assert [(row["provider"], row["ok"]) for row in rows] == [("dies", False), ("torch", True)]


def test_what_is_cut_off_is_listed_as_not_run(tmp_path: Path) -> None:
    def cut(function: Any, tasks: Any, **_: Any) -> Iterator[tuple[int, Any]]:
        yield 0, []
        yield 1, workers.Failed(workers.CUT_OFF)

    head = records.head(FakeShell(), "abcdef0123")
    run = gpu.Run(gpu.Budget(540), records.claim(tmp_path, head), TINY, "fp32", stages=("timing", "repeats"),
                  head=head, shell=FakeShell(), pool=cut)  # fmt: skip
    content = run.go()
    assert content["not_run"]["timing"] == [run.jobs[1].name] and content["timing"] == []


def test_nobody_is_blamed_where_none_was_at_work() -> None:
    assert timing.spared(JOB, workers.Failed("the process died (exit code 7)")) is None
    failed = workers.Failed("hung", "a")
    assert timing.spared(replace(JOB, lost=(("b", "died"),)), failed).lost == (("b", "died"), ("a", "hung"))
