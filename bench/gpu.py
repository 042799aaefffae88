"""``python -m bench gpu``: one run on a machine with a GPU, in minutes, with nothing but Python, torch and triton.

Correctness comes first: the test suite, every case against float64 at its real shape, the same bits every time,
compute-sanitizer.  Then times against others and a copy, and DRAM bytes by ncu.  Every stage has a share of the time;
what it does not use goes to the next ones, what does not fit is listed as not run.  The file of results
(bench/results/README.md) is written again after each step, so that a run that is killed loses nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from . import checks, counting, ncu, records, timing, workers
from .cases import Case, select
from .console import console, progress_bar
from .device import healthy
from .peers import COMPILED
from .providers import DTYPES
from .shell import Shell
from .timing import Job, Row
from .verify import COPIES

STAGES = {"suite": 0.2, "verify": 0.24, "repeats": 0.06, "sanitizer": 0.08, "timing": 0.34, "ncu": 0.08}
"""Shares of the time."""
FIRST = (
    "resnet 256x56 b256", "llama 4096", "vit-b", "unet 320x64 b16", "convnext 128x56", "cyclegan 64x256", "dit adaln",
    "nnunet 32x128", "long row 131072", "head norm 128", "resnet 64x56 b32", "vae 128x512", "image batch",
)  # fmt: skip
"""The most telling cases, one for each pattern: these are run first."""
CONTEXT = 700e6
"""Bytes of GPU memory that a process costs."""
LIMITS = {"verify": 120.0, "repeats": 60.0, "timing": 75.0}
"""Seconds that one task may take."""
COMPILED_FIRST = 8
"""Jobs that are compiled for the timing even if the stage `verify` did not get that far."""
LEAST_NCU = 16 * 2**20
"""Bytes of x from which on DRAM traffic is worth counting: smaller ones stay in L2."""
RESERVE = 5.0
"""Seconds kept for the end."""


@dataclass
class Budget:
    """Shares out what is left of the time."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    left: dict[str, float] = field(default_factory=lambda: dict(STAGES))

    def __post_init__(self) -> None:
        self.end = self.clock() + self.seconds

    def until(self, stage: str) -> float:
        """When a stage that begins now must end: its share, among the stages still to come, of what is left."""
        now = self.clock()
        share = self.left.pop(stage) / (sum(self.left.values()) + STAGES[stage])
        return now + max(0.0, self.end - now) * share


def ordered(cases: Sequence[Case]) -> list[Case]:
    place = {name: i for i, name in enumerate(FIRST)}
    return sorted(cases, key=lambda case: place.get(case.name, len(place)))


def timing_jobs(cases: Sequence[Case], dtype: str | None, seed: int) -> list[Job]:
    """The most telling first; BatchNorm also in fp16, where PyTorch gives it to cuDNN."""
    cases = ordered(cases)

    def jobs(which: Sequence[Case], name: str) -> list[Job]:
        return [Job(case, memory_format, name, seed) for case in which for memory_format in case.formats]

    if dtype:
        return jobs(cases, dtype)
    first, rest = [c for c in cases if c.name in FIRST], [c for c in cases if c.name not in FIRST]
    batch = partial(filter, lambda case: case.norm == "batch")
    return jobs(first, "bf16") + jobs(list(batch(first)), "fp16") + jobs(rest, "bf16") + jobs(list(batch(rest)), "fp16")


@dataclass
class Run:
    """One run, its options, and what it works with: tests put doubles in place of the last four."""

    budget: Budget
    path: Path
    only: str | None = None
    dtype: str | None = None
    seed: int = 0
    stages: Sequence[str] = tuple(STAGES)
    head: Row = field(default_factory=dict)
    crew: int = min(12, max(1, (os.cpu_count() or 2) - 2))
    capacity: float = 60e9
    shell: Any = field(default_factory=Shell)
    pool: Callable[..., Iterator[tuple[int, Any]]] = workers.run
    time_job: Callable[[Job], list[Row]] = timing.time_job
    examine: Callable[[Any], list[Row]] = checks.examine

    def __post_init__(self) -> None:
        self.content: Row = {**self.head, "method": timing.__doc__, "stages": {}, "not_run": {}}
        self.jobs = timing_jobs(select(self.only), self.dtype, self.seed)

    def save(self) -> None:
        records.write(self.path, self.content)

    def go(self) -> Row:
        for stage in STAGES:
            if stage not in self.stages:
                self.budget.left.pop(stage)
        for stage in STAGES:
            if stage not in self.stages:
                continue
            began = self.budget.clock()
            until = self.budget.until(stage)
            console.print(f"{stage}: {until - began:.0f} s at most", markup=False)
            note = {"limit_s": round(until - began, 1), "status": "done"}
            self.content["stages"][stage] = note
            try:
                getattr(self, stage)(until)
            except Exception as error:  # the other stages still run
                note |= {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
                console.print(f"{stage} failed: {note['error']}", markup=False, style="red", soft_wrap=True)
            note["seconds"] = round(self.budget.clock() - began, 1)
            self.save()
        return self.content

    def each(
        self, stage: str, function: Callable[[Any], Any], tasks: Sequence[Any], names: Sequence[str], until: float,
        crew: int = 1, weights: Sequence[float] = (), **options: Any,
    ) -> Iterator[tuple[int, Any]]:  # fmt: skip
        """(index, result or Failed) of tasks in processes of their own; lists those that there was no time for."""
        left = dict(enumerate(names))
        found = self.pool(
            function, tasks, workers=crew, until=until, limit=LIMITS[stage], weights=weights, capacity=self.capacity,
            healthy=healthy, **options,
        )  # fmt: skip
        with progress_bar() as progress:
            bar = progress.add_task(stage, total=len(tasks))
            for index, answer in found:
                if answer == workers.Failed(workers.CUT_OFF):
                    continue
                del left[index]
                if isinstance(answer, workers.Failed):
                    text = f"{stage}: {names[index]}: {answer.reason}"
                    console.print(text, markup=False, style="red", soft_wrap=True)
                yield index, answer
                progress.advance(bar)
        if left:
            self.content["not_run"][stage] = list(left.values())
            console.print(f"{stage}: no time for {len(left)} of {len(tasks)}", markup=False)

    def suite(self, until: float) -> None:
        with progress_bar() as progress:
            progress.add_task("suite", total=None)
            self.content["suite"] = found = checks.suite(self.shell, until - self.budget.clock())
        console.print(f"test suite: {found['status']}", found.get("reason", ""), markup=False)
        console.print(found.get("tail", "")[-1500:], markup=False, soft_wrap=True)

    def verify(self, until: float) -> None:
        """Values in all dtypes; in the same processes the results of the others, which also compiles them."""
        mine = [job for job in self.jobs if job.dtype == self.main_dtype]
        others = [name for name in DTYPES if name != self.main_dtype]
        tasks = [(kind, job) for kind, jobs in (("values", mine), ("providers", self.jobs)) for job in jobs]
        tasks += [("values", replace(job, dtype=name)) for name in others for job in mine]
        names = [f"{kind}: {job.name}" for kind, job in tasks]
        weights = [prod(job.case.shape) * 8 * COPIES + CONTEXT for _, job in tasks]
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # for the processes that start now: there are many
        rows: list[Row] = []
        self.content["verify"] = rows

        def again(task: tuple[str, Job], failed: workers.Failed) -> tuple[str, Job] | None:
            job = timing.spared(task[1], failed)
            return job and (task[0], job)

        try:
            found = self.each("verify", self.examine, tasks, names, until, self.crew, weights, again=again)
            for index, answer in found:
                kind, job = tasks[index]
                if isinstance(answer, workers.Failed):
                    provider = "normops" if kind == "values" else "any"
                    answer = [job.key | {"provider": provider, "ok": False, "error": answer.reason}]
                rows += answer
                self.save()
        finally:
            del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
        own = [row for row in rows if row["provider"] == "normops"]
        good = sum(row["ok"] for row in own)
        console.print(f"{good} of {len(own)} calls of normops, forward and backward, within their bounds")
        for row in own:
            if not row["ok"]:
                what = row.get("error") or f"{row['worst']} is off by {row['share']:.3g} times its bound"
                text = f"FAILED {row['case']}, {row['format']}, {row['dtype']}: {what}"
                console.print(text, markup=False, style="red", soft_wrap=True)

    @property
    def main_dtype(self) -> str:
        return self.dtype or "bf16"

    def repeats(self, until: float) -> None:
        jobs = [job for job in self.jobs if job.dtype == self.main_dtype]
        self.content["repeats"] = rows = []
        for index, answer in self.each("repeats", checks.repeat, jobs, [job.name for job in jobs], until):
            failed = isinstance(answer, workers.Failed)
            rows.append(jobs[index].key | {"ok": False, "error": answer.reason} if failed else answer)
            if not rows[-1]["ok"] and not failed:
                text = f"FAILED {jobs[index].name}: bits differ in {answer['differ']}, NaN in {answer['nan']}"
                console.print(text, markup=False, style="red", soft_wrap=True)
        waiting = ", ".join(sorted(checks.WAITING)) or "none"
        console.print(f"same bits: {sum(r['ok'] for r in rows)} of {len(rows)}; engines that wait: {waiting}")

    def sanitizer(self, until: float) -> None:
        self.content["sanitizer"] = rows = checks.sanitize(self.shell, until - self.budget.clock())
        for row in rows:
            console.print(f"{row['tool']}: {row['status']}", row.get("reason", ""), markup=False)
            if row["status"] == "failed":
                console.print(row["tail"][-1500:], markup=False, soft_wrap=True)

    def timing(self, until: float) -> None:
        warmed = {(r["case"], r["format"], r["dtype"]) for r in self.content.get("verify", [])
                  if r["provider"] == COMPILED}  # fmt: skip
        why = None if "verify" not in self.stages else "not compiled beforehand: no time"
        jobs = [
            job if i < COMPILED_FIRST or (job.case.name, job.format, job.dtype) in warmed else replace(job, compile=why)
            for i, job in enumerate(self.jobs)
        ]
        self.content["timing"] = rows = []
        self.content["clocks_before"] = records.clocks(self.shell)
        for index, answer in self.each(
            "timing", self.time_job, jobs, [job.name for job in jobs], until, again=timing.spared
        ):
            if isinstance(answer, workers.Failed):
                answer = [jobs[index].key | {"provider": "any", "ok": False, "error": answer.reason}]
            rows += answer
            self.save()
        self.content["clocks_after"] = records.clocks(self.shell)
        timing.print_rows(rows)
        counting.count_beside(rows, self.head.get("environment", {}).get("device", ""))

    def ncu(self, until: float) -> None:
        jobs = [job for job in self.jobs if job.dtype == self.main_dtype and job.case.name in FIRST]
        jobs = [job for job in jobs if prod(job.case.shape) * DTYPES[job.dtype].itemsize >= LEAST_NCU] or self.jobs[:1]
        self.content["ncu"] = rows = ncu.measure(jobs, self.shell, until - self.budget.clock())
        predicted: dict[str, Any] = {}
        for job in jobs:
            try:
                predicted[job.name] = ncu.predicted(job, job.case.shape)
            except Exception as error:
                predicted[job.name] = {d: {"no_prediction": f"{type(error).__name__}: {error}"} for d in ncu.DIRECTIONS}
        by_key = {(job.case.name, job.format, job.dtype): job.name for job in jobs}
        for row in rows:
            row |= predicted[by_key[row["case"], row["format"], row["dtype"]]][row["direction"]]
            if row["ok"]:
                total, said = row["read_bytes"] + row["write_bytes"], row.get("predicted_bytes")
                beside = f"{total / said:.2f} of the prediction" if said else "no prediction"
                where = f"{row['case']}, {row['format']}, {row['direction']}"
                console.print(f"DRAM {where}: {total / 1e6:.1f} MB, {beside}", markup=False)


def main(arguments: Sequence[str]) -> int:
    """The command: 0 if all that ran was right, 1 if not, 2 where it cannot run."""
    parser = argparse.ArgumentParser("python -m bench gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="how long it may take (default: 9)")
    parser.add_argument("--only", help="cases whose name, norm or origin contains this text")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16, and fp16 for BatchNorm")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder of the results file")
    parser.add_argument("--commit", help="commit to record where the checkout has no git")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    stages = tuple(filter(None, given.stages.split(",")))
    if unknown := set(stages) - STAGES.keys():
        parser.error(f"stages must be of {', '.join(STAGES)}; got {', '.join(sorted(unknown))}")
    if not select(given.only):
        parser.error(f"no case has {given.only!r} in its name, norm or origin")
    if not torch.cuda.is_available():
        print("python -m bench gpu needs a CUDA device, and torch sees none: nothing was run", file=sys.stderr)
        return 2
    budget = Budget(max(1.0, given.minutes * 60 - RESERVE))
    console.print(f"{len(select(given.only))} cases, {given.minutes:g} minutes at most", markup=False)
    shell = Shell()
    head = records.head(shell, given.commit) | {"options": {k: str(v) for k, v in vars(given).items() if k != "out"}}
    run = Run(
        budget, records.claim(given.out, head), given.only, given.dtype, given.seed, stages, head, shell=shell,
        capacity=0.85 * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
    )  # fmt: skip
    content = run.go()
    console.print(f"results: {run.path}", markup=False, soft_wrap=True)
    return 0 if records.good(content) else 1

