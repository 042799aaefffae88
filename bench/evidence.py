"""What every case compiles to, executes and moves on a device that need not be there: nothing is run, so nothing is
timed.

The public functions are called with tensors of the real sizes on a virtual device, forward and backward apart; plans
say how many bytes move, machine code says the rest (bench/figures.py, bench/schema.md).  Times are predictions.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton

from normops import testing
from normops.testing.predict import calibrated

from .cases import Case
from .common import console, save
from .compare import BASELINE, REFRESH, compare, read_rows, worktree, write_baseline
from .counting import compiling, gather
from .evidence_table import print_calls, print_variants
from .figures import SCHEMA, Row, summary
from .variants import counted

ROOT = Path(__file__).resolve().parents[1]
def head(device: str, dtype: str, force: Mapping[str, Any] | None = None) -> Row:
    """What the rows of a file have in common."""
    hardware = testing.HARDWARE[device]
    return {
        "schema": SCHEMA, "device": device, "title": hardware.title, "dtype": dtype, "force": dict(force or {}),
        "triton": triton.__version__, "sms": hardware.facts.num_sms, "clock": hardware.clock,
        "copy_bandwidth": hardware.copy_bandwidth, "bandwidth_source": hardware.bandwidth_source,
        "copy_start": hardware.copy_start, "copy_start_source": hardware.copy_start_source,
        "l2_window": hardware.l2_window, "calibrated": device in calibrated(),
    }  # fmt: skip


def rows_of(revision: str, device: str, cases: Sequence[Case], only: str | None, dtype: str, processes: int) -> Row:
    """The evidence of another commit, made by that commit's own command.

    Raises ValueError where there is no such commit, RuntimeError where its command fails.
    """
    with worktree(ROOT, revision) as tree, tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bench", "evidence", "--device", device, "--dtype", dtype]
        command += ["--workers", str(processes), "--out", out]
        command += ["--only", only] if only else ["--case", cases[0].name] if len(cases) == 1 else []
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        written = Path(out, "evidence.json")
        if not written.exists():
            raise RuntimeError(f"evidence of {revision} failed: {(done.stderr or done.stdout)[-2000:]}")
        return read_rows(written)


def evidence(
    device: str, cases: Sequence[Case], dtype: str, out: Path, *, only: str | None = None, folder: Path | None = None,
    base: str | None = None, baseline: bool = False, processes: int = 0, force: Mapping[str, Any] | None = None,
    walk: bool = True,
) -> bool:  # fmt: skip
    """Compile the cases, print a table (of what changed since `base`), write evidence.json and evidence.png; True if
    every case compiled.

    `folder`: where to keep the code of every launch; `baseline`: write bench/results/evidence.json too; `force`: limits
    of the schedule other than those that stand; `walk`: through the machine code, for what is executed and predicted.
    """
    processes = processes or min(os.cpu_count() or 1, 8)
    before = rows_of(base, device, cases, only, dtype, processes) if base else None
    rows, found, failures = gather(device, cases, dtype, processes, folder, force, walk)
    shared, compiled = head(device, dtype, force), counted(found)
    with compiling():
        save(out, "evidence", shared | {"summary": summary(rows) | {"variants": compiled}, "rows": rows})
    if before is not None:
        names = {case.name for case in cases}
        print_changes(base or "", [row for row in before["rows"] if row["case"] in names], rows)
    elif rows:
        print_calls(rows, testing.HARDWARE[device], dtype, force or {})
        print_variants(rows, compiled)
        from .evidence_plot import plot  # takes half a second, which only who draws should wait for

        console.print(f"JSON and picture: {plot(rows, shared, out).parent}", soft_wrap=True)
    if baseline and not failures:
        write_baseline(BASELINE, shared, rows)
        console.print(f"baseline: {BASELINE.relative_to(ROOT)}")
    for failure in failures:
        console.print(f"FAILED {failure}", markup=False, style="red")
    return not failures


def print_changes(base: str, before: Sequence[Row], after: Sequence[Row]) -> None:
    changes = compare(before, after)
    styles = {True: "red", False: "green", None: ""}
    for change in changes:
        console.print(str(change), markup=False, highlight=False, style=styles[change.worse], soft_wrap=True)
    counts = {kind: sum(change.worse is kind for change in changes) for kind in (True, False)}
    console.print(
        f"{len(after)} calls, {len(changes)} figures changed since {base}: {counts[True]} worse, {counts[False]} better"
    )


def against_baseline(device: str, dtype: str, rows: Sequence[Row], path: Path = BASELINE) -> tuple[list[str], str]:
    """(what of these cases is worse than in the baseline, how far it is out of date: empty where nothing changed).

    Raises ValueError where the baseline is of another device or dtype.
    """
    content = read_rows(path)
    if (content["device"], content["dtype"]) != (device, dtype):
        raise ValueError(f"{path.name} holds {content['device']} {content['dtype']}, not {device} {dtype}")
    cases = {row["case"] for row in rows}
    known = [row for row in content["rows"] if row["case"] in cases]
    changes = compare(known, rows, exact=content["triton"] == triton.__version__)
    worse = [str(change) for change in changes if change.worse]
    better = sum(change.worse is False for change in changes)
    other = len(changes) - len(worse) - better
    stale = f"{better} figures better, {other} different from {path.name}: refresh it with `{REFRESH}`"
    return worse, stale if better or other else ""
