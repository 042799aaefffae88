"""``python -m bench gpu`` without a GPU: its whole flow with doubles for device, programs and processes; its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import checks, common, gpu, ncu, records, timing, workers
from bench.cases import CASES
from bench.peers import PROVIDERS
from bench.shell import Shell
from bench.timing import Job
from tests.bench_doubles import BY_NAME, TINY, FakeDevice, FakeShell, serial

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def launch_lines(start: int, kernels: Sequence[str]) -> str:
    lines = []
    for i, kernel in enumerate(kernels, start):
        for metric, unit, value in ((ncu.READ, "byte", "1,000"), (ncu.WRITE, "byte", "500"), (ncu.TIME, "ns", "10")):
            lines.append(f'"{i}","1","python","host","{kernel}","1","7","(1,1,1)","(1,1,1)","0","9.0","","{metric}",'
                         f'"{unit}","{value}"')  # fmt: skip
    return "\n".join(lines)


HEAD = ('"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
        '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"')  # fmt: skip


def profile(calls: int) -> str:
    kernels = ["at::cuda::(anonymous namespace)::spin_kernel(long)", "normalize"] * calls
    return f"==PROF== Connected to process 1\n{HEAD}\n{launch_lines(0, kernels)}\n==PROF== Disconnected"


def started(tmp_path: Path, shell: FakeShell, **changes: Any) -> gpu.Run:
    head = records.head(shell, "abcdef0123")
    device, offered = FakeDevice(), [p for p in PROVIDERS if p.name not in ("torch.compile", "liger")]
    options: dict[str, Any] = {
        "only": TINY, "dtype": "fp32", "head": head, "shell": shell, "pool": serial,
        "time_job": partial(timing.time_job, device=device, offered=offered),
    }  # fmt: skip
    return gpu.Run(gpu.Budget(540), records.claim(tmp_path, head), **options | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the real thing runs")
def test_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.checks.PROVIDERS", [p for p in PROVIDERS if p.name in ("normops", "torch")])
    monkeypatch.setattr(checks, "REPEATS", 3)
    # The prediction plans for the real shape, which the interpreter would run; any shape does here.
    predicted = ncu.predicted
    monkeypatch.setattr(ncu, "predicted", lambda job, shape: predicted(job, job.case.small))
    shell = FakeShell(pytest="3 passed", ncu=profile(4 * ncu.CALLS), compute_sanitizer="ERROR SUMMARY: 0 errors")
    run = started(tmp_path, shell)
    content = run.go()
    assert {name: stage["status"] for name, stage in content["stages"].items()} == dict.fromkeys(gpu.STAGES, "done")
    assert json.loads(run.path.read_text())["stages"].keys() == gpu.STAGES.keys()
    assert content["suite"]["status"] in ("passed", "skipped")  # skipped without hypothesis
    jobs = [f"{TINY}, {name}, fp32" for name in BY_NAME[TINY].formats]
    assert [job.name for job in run.jobs] == jobs
    values = [row for row in content["verify"] if row["provider"] == "normops"]
    assert len(values) == 4 * len(jobs) and all(row["ok"] for row in values)
    assert [row["ok"] for row in content["repeats"]] == [True] * len(jobs)
    assert content["repeats"][0]["repeats"] == 3
    timed = [row for row in content["timing"] if row["ok"]]
    key = {(row["format"], row["provider"], row["direction"]) for row in timed}
    assert key >= {(f, p, d) for f in BY_NAME[TINY].formats for p in ("normops", "torch") for d in timing.DIRECTIONS}
    assert all(row["us_low"] <= row["us"] <= row["us_high"] and row["of_floor"] > 0 for row in timed)
    assert {row["skipped"] for row in content["timing"] if row["provider"] == "apex groupbn"} == {
        "BatchNorm in fp16 and channels_last only"
    }
    assert len(content["ncu"]) == 2 and all(row["ok"] for row in content["ncu"])
    assert all(row["predicted_bytes"] > 0 for row in content["ncu"]), content["ncu"]
    assert content["ncu"][0]["read_bytes"] == 1000 and content["ncu"][0]["write_bytes"] == 500
    assert [row["status"] for row in content["sanitizer"]] == ["passed", "passed"]
    assert content["not_run"] == {} and records.good(content)
    timing.print_rows(content["timing"])


def test_a_failed_stage_does_not_stop_the_others(tmp_path: Path) -> None:
    run = started(tmp_path, FakeShell(), stages=("sanitizer", "timing", "ncu"), time_job=lambda job: 1 / 0)
    content = run.go()
    assert content["stages"]["ncu"]["status"] == "failed"
    assert "ncu is not on the PATH" in content["stages"]["ncu"]["error"]
    assert content["sanitizer"][0]["reason"] == "compute-sanitizer is not on the PATH"
    assert {row["error"] for row in content["timing"]} == {"ZeroDivisionError: division by zero"}
    assert not records.good(content)


def test_jobs_travel_to_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = SimpleNamespace(repeat=partial(checks.repeat, repeats=3), WAITING=checks.WAITING)
    monkeypatch.setattr(gpu, "checks", few)  # fifty take the interpreter half a minute a job
    content = started(tmp_path, FakeShell(), stages=("repeats",), pool=workers.run).go()
    repeated = [(row.get("error"), row["repeats"]) for row in content["repeats"]]
    assert repeated == [(None, 3)] * len(BY_NAME[TINY].formats)
    assert records.good(content)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    def one(function: Any, tasks: Sequence[Any], **_: Any) -> Iterator[tuple[int, Any]]:
        yield 0, []

    run = started(tmp_path, FakeShell(), stages=("timing",), pool=one, only="image")
    content = run.go()
    assert content["not_run"]["timing"] == [job.name for job in run.jobs[1:]]


def test_the_most_telling_cases_are_in_the_table() -> None:
    assert {case.name for case in CASES} >= set(gpu.FIRST)


def test_budget_hands_on_what_a_stage_leaves() -> None:
    clock = Clock()
    budget = gpu.Budget(100, clock, {"verify": gpu.STAGES["verify"], "timing": gpu.STAGES["timing"]})
    share = gpu.STAGES["verify"] / (gpu.STAGES["verify"] + gpu.STAGES["timing"])
    assert budget.until("verify") == pytest.approx(100 * share)
    clock.now = 10
    assert budget.until("timing") == pytest.approx(100)


def test_a_late_stage_gets_no_time() -> None:
    clock = Clock()
    budget = gpu.Budget(10, clock, {"ncu": gpu.STAGES["ncu"]})
    clock.now = 30
    assert budget.until("ncu") == 30


def test_turns_alternate_and_warm_up_first() -> None:
    order = []

    def elapsed(name: str) -> float:
        order.append(name)
        return 100.0

    times = timing.take_turns(elapsed, ("a", "b"), 4)
    assert order[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(order) - 8 == 2 * timing.WARM_TURNS and times == {"a": [100.0] * 4, "b": [100.0] * 4}


def test_spread_is_quartiles() -> None:
    assert timing.spread([5, 1, 2, 3, 4]) == (2, 3, 4)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_names_are_never_taken_twice(tmp_path: Path) -> None:
    content = records.head(FakeShell(), "abcdef0123")
    content["environment"] |= {"device": "NVIDIA H100 80GB HBM3", "commit": "abcdef0123", "dirty": False}
    content["environment"]["date"] = "2030-01-02T03:04:05+00:00"
    names = [records.claim(tmp_path, content).name for _ in range(3)]
    stem = "h100-80gb-hbm3-2030-01-02-abcdef0"
    assert names == [f"{stem}.json", f"{stem}-2.json", f"{stem}-3.json"]
    assert [run["file"] for run in records.read(tmp_path)] == sorted(names)


def test_a_repository_around_the_checkout_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("one")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert len(common.environment()["commit"]) == 40 and records.dirty() is False
    (tmp_path / "inner" / "file").write_text("two")
    assert records.dirty() is True
    monkeypatch.setattr(common, "ROOT", tmp_path / "inner")
    assert common.environment()["commit"] is None and records.dirty() is None


def test_poison_fills_fresh_memory() -> None:
    with checks.poisoned():
        assert torch.empty(8).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_ncu_table_by_launch() -> None:
    wide = ('"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"\n"","","byte","byte"\n'
            '"0","apply(float*)","2,048","1,024"')  # fmt: skip
    assert ncu.parse(wide) == [{"kernel": "apply", ncu.READ: 2048.0, ncu.WRITE: 1024.0}]
    with pytest.raises(ValueError, match="ERR_NVGPUCTRPERM"):
        ncu.parse("==ERROR== ERR_NVGPUCTRPERM")


def test_ncu_that_stops_early_says_what_is_missing() -> None:
    jobs = [Job(BY_NAME[TINY], "contiguous", "bf16")]
    rows = ncu.measure(jobs, FakeShell(ncu=profile(ncu.CALLS)), 10)
    assert [row["ok"] for row in rows] == [True, False] and rows[1]["error"] == "ncu did not get this far"


def work(task: str) -> str:
    with workers.at_work("the beginning"):
        pass
    if task == "raise":
        raise ValueError("no")
    with workers.at_work("the end"):
        if task == "die":
            os._exit(3)
        if task == "hang":
            time.sleep(60)
    return task.upper()


def test_processes_that_die_or_hang_cost_only_themselves() -> None:
    tasks = ["a", "die", "raise", "hang", "b"]
    began = time.monotonic()
    found = dict(workers.run(work, tasks, workers=2, until=began + 60, limit=10))
    assert found[0] == "A" and found[4] == "B"
    assert found[1] == workers.Failed("the process died (exit code 3)", "the end")
    assert found[2] == workers.Failed("ValueError: no")
    assert found[3] == workers.Failed("hung for 10 s", "the end")


def test_no_task_begins_without_time() -> None:
    assert list(workers.run(work, ["a"], workers=1, until=time.monotonic(), limit=5)) == []


def test_a_program_is_stopped_at_its_limit() -> None:
    ran = Shell().run([sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"], 4)
    assert ran.code is None and ran.output.startswith("x") and ran.seconds < 20


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rich", "typer", "matplotlib", "sklearn", "hypothesis", "pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
sys.argv = ["bench", "gpu", "--minutes", "1"]
import bench.gpu, bench.report
import runpy
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin a run")
def test_needs_nothing_but_torch_and_triton_and_says_that_there_is_no_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("python -m bench gpu needs a CUDA device")
