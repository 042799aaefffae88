"""Compiles calls for a device in processes without one, and counts what their launches execute and move: for the
evidence, and beside measured times.  Needs only torch and triton."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from normops import schedule, testing

from . import providers, workers
from .cases import CASES, Case
from .common import run_all
from .figures import Row, describe_call
from .variants import Variant, variants
from .verify import shape_of

LIMIT = 600.0
"""Seconds that the kernels of one case may take to compile."""
_DEVICES = ExitStack()
Task = tuple[Case, str, str, str, dict[str, Any], Path | None, bool]
BESIDE = ("engine", "x_bytes", "hbm_bytes", "predicted_us", "instructions_per_element", "launches")
"""What is kept beside a measured time."""


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
    case, format_name, dtype, device, force, folder, walk = task
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
            rows.append(describe_call(key, planned[0], gpu.launches, gpu.hardware, walk))
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
    force: Mapping[str, Any] | None = None, walk: bool = True,
) -> tuple[list[Row], list[Variant], list[str]]:
    """Rows of all cases in their order, the variants compiled in all processes together, and what went wrong."""
    tasks: list[Task] = [
        (case, name, dtype, device, dict(force or {}), folder, walk) for case in cases for name in case.formats
    ]
    with compiling():
        done = dict(run_all(measure, tasks, f"compile for {device}", processes, LIMIT))
    failed = {i: answer for i, answer in done.items() if isinstance(answer, workers.Failed)}
    failures = [f"{tasks[i][0].name} {tasks[i][1]}: {answer.reason}" for i, answer in sorted(failed.items())]
    good = [done[i] for i in sorted(done.keys() - failed.keys())]
    found = [variant for _, compiled in good for variant in compiled]
    return [row for rows, _ in good for row in rows], found, failures


def count_beside(rows: Sequence[Row], title: str) -> None:
    """Put into measured rows of normops what their launches execute and move on the device of that name.

    So each run adds points that the model of times can be fitted to (bench/calibrate.py).  Rows of a device that is not
    in testing.HARDWARE stay as they are.
    """
    device = testing.hardware_of(title)
    mine = [row for row in rows if row["provider"] == "normops" and row.get("direction") in ("forward", "backward")]
    wanted = {(row["case"], row["format"], row["dtype"]) for row in mine if row.get("us")}
    if device is None or not wanted:
        return
    cases = {case.name: replace(case, shape=shape_of(case)) for case in CASES}
    tasks: list[Task] = [(cases[name], form, dtype, device, {}, None, True) for name, form, dtype in sorted(wanted)]
    found: dict[tuple[str, ...], Row] = {}
    with compiling():
        for _, answer in run_all(measure, tasks, "count what was timed", min(os.cpu_count() or 1, 8), LIMIT):
            if not isinstance(answer, workers.Failed):
                found |= {(r["case"], r["format"], r["dtype"], r["direction"]): r for r in answer[0]}
    for row in mine:
        counted = found.get((row["case"], row["format"], row["dtype"], row["direction"]))
        if counted is not None and row.get("us"):
            row |= {name: counted[name] for name in BESIDE}
