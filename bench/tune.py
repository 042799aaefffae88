"""``python -m bench tune``: thresholds of normops/schedule.py from measured times.

``--measure``, on a GPU, times calls under other schedules beside the present one and writes a record, again after each
comparison: a run that is killed loses nothing, and one that is started again with the same folder goes on.  With files,
records are read and values proposed.  No file of normops is changed, and no call of normops ever comes here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from normops import calls
from normops.gpus import H200
from normops.schedule import Limits

from . import records, timing, tune_measure, workers
from .console import console, print_table, progress_bar
from .device import healthy
from .providers import DTYPES
from .shell import Shell
from .tune_cases import Task, chosen, questions, tasks, window
from .tune_propose import KIND, SCHEMA, Content, Group, Proposal, comment, furthest, groups, proposals, read

LIMIT = 90.0
"""Seconds that one comparison may take."""
SAME = ("device", "commit", "torch", "triton")
"""What must be as it was for a record to be gone on with."""
NOTHING = (
    "python -m bench tune proposes nothing without times: give it records (FILE.json ...), or --measure them on a "
    "CUDA device"
)


def claim(folder: Path, head: Content) -> tuple[Path, Content]:
    """The record to go on with, or a new one.  One with changes beside its commit is never gone on with: which changes
    they were is not known."""
    where = head["environment"]
    commit = (where["commit"] or "nocommit")[:7] + ("-dirty" if where["dirty"] else "")
    stem = f"tune-{records.slug(where['device'])}-{commit}"
    for counter in range(1, 10_000):
        path = folder / (f"{stem}.json" if counter == 1 else f"{stem}-{counter}.json")
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            content = head | {"rows": [], "done": []}
            records.write(path, content)
            return path, content
        old = json.loads(path.read_text())
        known = where["commit"] and not where["dirty"] and old["limits"] == head["limits"]
        if known and all(old["environment"][name] == where[name] for name in SAME):
            return path, old
    raise RuntimeError(f"{folder} holds too many records named {stem}")


@dataclass
class Run:
    """One run of the measurement; tests put doubles in place of the last three."""

    path: Path
    content: Content
    tasks: Sequence[Task]
    until: float
    pool: Callable[..., Iterator[tuple[int, Any]]] = workers.run
    measure: Callable[[Task], list[dict[str, Any]]] = tune_measure.measure
    clock: Callable[[], float] = field(default=time.monotonic)

    def go(self) -> Content:
        """Make the comparisons that are not in the record yet, in order, while there is time."""
        done = {tuple(key) for key in self.content["done"]}
        left = [task for task in self.tasks if task.key not in done]
        if len(left) < len(self.tasks):
            console.print(f"{len(self.tasks) - len(left)} comparisons are there already", markup=False)
        found = self.pool(self.measure, left, workers=1, until=self.until, limit=LIMIT, healthy=healthy)
        with progress_bar() as progress:
            bar = progress.add_task("comparisons", total=len(left))
            for index, answer in found:
                progress.advance(bar)
                task = left[index]
                if isinstance(answer, workers.Failed):
                    console.print(f"{task.name}: {answer.reason}", markup=False, style="red", soft_wrap=True)
                    if self.clock() >= self.until:
                        continue  # cut off: to be made by the next run
                    error = {"question": task.question.name, "ok": False, "error": answer.reason}
                    answer = [task.job.key | error]
                self.content["rows"] += answer
                self.content["done"].append(list(task.key))
                records.write(self.path, self.content)
        done = {tuple(key) for key in self.content["done"]}
        self.content["not_run"] = [task.name for task in self.tasks if task.key not in done]
        records.write(self.path, self.content)
        if self.content["not_run"]:
            console.print(f"no time for {len(self.content['not_run'])} of {len(self.tasks)}", markup=False)
        return self.content


def line(proposal: Proposal) -> list[str]:
    p = proposal
    value = "no clear answer" if p.value is None else "stands" if p.value == p.current else f"[bold]{p.value}"
    gain = f"{p.gain:.3f}x" if p.changed else ""
    slower = "; ".join(f"{name} {ratio:.2f}x" for name, ratio in p.slower[:3])
    slower += f" and {len(p.slower) - 3} more" if len(p.slower) > 3 else ""
    return [p.limit, str(p.current), value, gain, str(p.changed), f"{p.agree}/{p.decided}", slower, p.note]


def show(found: Sequence[Group], contents: Sequence[Content]) -> None:
    """Tables of what is proposed, and lines to put beside the fields in normops/schedule.py."""
    for group in found:
        made = proposals(group)
        columns = ("limit", "now", "proposed", "gain", "calls", "agree", "slower", "")
        print_table(f"{group.device}, commit {group.commit}", columns, [line(proposal) for proposal in made])
        for text in filter(None, (comment(group, proposal) for proposal in made)):
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if rows := furthest(contents):
        names = ("device", "case", "format", "dtype", "direction")
        cells = ([*(row[name] for name in names), f"{row['us']:.1f}", f"{row['of_floor']:.0%}"] for row in rows)
        print_table(
            "Furthest from a copy, in runs of `bench gpu`, which compare no schedules",
            (*names, "us", "of copy floor"),
            cells,
        )


def measured(given: argparse.Namespace) -> Content:
    """The run on the GPU that is there."""
    limits = Limits()
    head = records.head(Shell(), given.commit) | {"kind": KIND, "schema": SCHEMA, "method": timing.__doc__}
    device = calls.device_facts(torch.device("cuda", torch.cuda.current_device()))
    present = asdict(limits) | {"window": window(limits, device)}
    path, content = claim(given.out, head | {"limits": present, "facts": asdict(device)})
    asked = set(filter(None, given.ask.split(",")))
    todo = tasks(chosen(given.only), given.dtype, given.seed, limits, device, lambda name: not asked or name in asked)
    content = Run(path, content, todo, time.monotonic() + 60 * given.minutes).go()
    console.print(f"record: {path}", markup=False, soft_wrap=True)
    return content


def main(arguments: Sequence[str]) -> int:
    """The command: 0, or 2 where there is nothing to work with."""
    names = [question.name for question in questions(Limits(), H200)]
    parser = argparse.ArgumentParser("python -m bench tune", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="records of earlier runs, of `bench gpu` too")
    parser.add_argument("--measure", action="store_true", help="time schedules on this machine's GPU")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder of the record (default: bench/out)")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long measuring may take (default: 20)")
    parser.add_argument("--only", help="cases whose name, norm or origin contains this text")
    parser.add_argument("--ask", default="", help=f"questions, of {', '.join(names)}; default: all, in this order")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--commit", help="commit to record where the checkout has no git")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if unknown := set(filter(None, given.ask.split(","))) - set(names):
        parser.error(f"--ask must be of {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if not chosen(given.only):
        parser.error(f"no case has {given.only!r} in its name, norm or origin")
    if not (given.files or given.measure):
        print(NOTHING, file=sys.stderr)
        return 2
    if given.measure and not torch.cuda.is_available():
        message = "python -m bench tune --measure needs a CUDA device, and torch sees none: nothing was run"
        print(message, file=sys.stderr)
        return 2
    try:
        contents = [read(path) for path in given.files]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if given.measure:
        contents.append(measured(given))
    show(groups(contents), contents)
    return 0
