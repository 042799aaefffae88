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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from normops import schedule, testing

from . import providers, workers
from .cases import Case
from .common import console, run_all, save
from .compare import BASELINE, REFRESH, compare, read_rows, worktree, write_baseline
from .evidence_plot import plot
from .evidence_table import print_calls, print_variants
from .figures import SCHEMA, Row, describe_call, summary
from .variants import Variant, counted, variants

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600.0
"""Seconds that the kernels of one case may take to compile."""
_DEVICES = ExitStack()
Task = tuple[Case, str, str, str, dict[str, Any], Path | None]


@contextmanager
def compiling() -> Iterator[None]:
    """Processes that start in here compile kernels, whatever this one does."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@lru_cache
def entered(device: str) -> testing.VirtualDevice:
    """The virtual device of this worker process: never left, so that cases share compiled kernels and their figures."""
    return _DEVICES.enter_context(testing.virtual_device(device))


def measure(task: Task) -> tuple[list[Row], list[Variant]]:
    """Forward and backward of one case in one memory format, and what this process had to compile for them."""
    case, format_name, dtype, device, force, folder = task
    gpu, rows = entered(device), []
    gpu.launches.clear()
    with schedule.forced(**force), testing.plans() as planned, variants() as found:
        inputs = providers.make_inputs(case, case.shape, case.formats[format_name], providers.DTYPES[dtype], empty=True)
        outputs = providers.by_normops(case, inputs)
        for direction in ("forward", "backward"):
            if direction == "backward":
                torch.autograd.grad(outputs, providers.leaves(inputs), providers.output_gradients(inputs))
            if len(planned) != 1:
                raise RuntimeError(f"a {direction} must be one plan, {case.name} made {len(planned)}")
            key = {"case": case.name, "format": format_name, "dtype": dtype, "direction": direction}
            rows.append(describe_call(key, planned[0], gpu.launches, gpu.hardware))
            if folder is not None:
                keep(folder, key, gpu.launches)
            gpu.launches.clear()
            planned.clear()
    return rows, found


def keep(folder: Path, key: Row, launches: Sequence[testing.VirtualLaunch]) -> None:
    """Write machine code, the virtual assembly it is made from, and Triton's IR of each launch."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, launch in enumerate(launches):
        name = "-".join([*(str(part).replace(" ", "_") for part in key.values()), str(i), launch.name])
        for kind in ("ttgir", "ptx", "cubin", "amdgcn", "hsaco"):
            if kind in launch.asm:
                code = launch.asm[kind]
                Path(folder, f"{name}.{kind}").write_bytes(code if isinstance(code, bytes) else code.encode())
        if "cubin" in launch.asm:
            Path(folder, f"{name}.sass").write_text(launch.binary.cuobjdump("-sass"))


def gather(
    device: str, cases: Sequence[Case], dtype: str, processes: int, folder: Path | None = None,
    force: Mapping[str, Any] | None = None,
) -> tuple[list[Row], list[Variant], list[str]]:
    """Rows of all cases in their order, the variants compiled in all processes together, and what went wrong."""
    tasks: list[Task] = [
        (case, name, dtype, device, dict(force or {}), folder) for case in cases for name in case.formats
    ]
    with compiling():
        done = dict(run_all(measure, tasks, f"compile for {device}", processes, LIMIT))
    failed = {i: answer for i, answer in done.items() if isinstance(answer, workers.Failed)}
    failures = [f"{tasks[i][0].name} {tasks[i][1]}: {answer.reason}" for i, answer in sorted(failed.items())]
    good = [done[i] for i in sorted(done.keys() - failed.keys())]
    found = [variant for _, compiled in good for variant in compiled]
    return [row for rows, _ in good for row in rows], found, failures


def head(device: str, dtype: str, force: Mapping[str, Any] | None = None) -> Row:
    """What the rows of a file have in common."""
    hardware = testing.HARDWARE[device]
    return {
        "schema": SCHEMA, "device": device, "title": hardware.title, "dtype": dtype, "force": dict(force or {}),
        "triton": triton.__version__, "sms": hardware.facts.num_sms, "clock": hardware.clock,
        "copy_bandwidth": hardware.copy_bandwidth, "bandwidth_source": hardware.bandwidth_source,
        "copy_start": hardware.copy_start, "copy_start_source": hardware.copy_start_source,
        "l2_window": hardware.l2_window, "calibrated": device in testing.calibrated(),
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
) -> bool:  # fmt: skip
    """Compile the cases, print a table (of what changed since `base`), write evidence.json and evidence.png; True if
    every case compiled.

    `folder`: where to keep the code of every launch; `baseline`: write bench/results/evidence.json too; `force`: limits
    of the schedule other than those that stand.
    """
    processes = processes or min(os.cpu_count() or 1, 8)
    before = rows_of(base, device, cases, only, dtype, processes) if base else None
    rows, found, failures = gather(device, cases, dtype, processes, folder, force)
    shared, compiled = head(device, dtype, force), counted(found)
    with compiling():
        save(out, "evidence", shared | {"summary": summary(rows) | {"variants": compiled}, "rows": rows})
    if before is not None:
        names = {case.name for case in cases}
        print_changes(base or "", [row for row in before["rows"] if row["case"] in names], rows)
    elif rows:
        print_calls(rows, testing.HARDWARE[device], dtype, force or {})
        print_variants(rows, compiled)
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
    """(what is worse than in the baseline, how far it is out of date: empty where nothing changed).

    Raises ValueError where the baseline is of another device or dtype.
    """
    content = read_rows(path)
    if (content["device"], content["dtype"]) != (device, dtype):
        raise ValueError(f"{path.name} holds {content['device']} {content['dtype']}, not {device} {dtype}")
    changes = compare(content["rows"], rows, exact=content["triton"] == triton.__version__)
    worse = [str(change) for change in changes if change.worse]
    better = sum(change.worse is False for change in changes)
    other = len(changes) - len(worse) - better
    stale = f"{better} figures better, {other} different from {path.name}: refresh it with `{REFRESH}`"
    return worse, stale if better or other else ""
