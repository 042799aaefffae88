"""Bytes to and from DRAM of every launch, by Nsight Compute, beside what normops.testing.cost predicts.

Run as a program (``python -m bench.ncu SPEC…``) it is what ncu watches: calls over rotating inputs, after markers.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from . import providers
from .cases import CASES
from .shell import Shell
from .timing import Job, Row, gradient

READ, WRITE, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
METRICS = (READ, WRITE, TIME)
MARKER = "spin_kernel"
"""Kernel of torch.cuda._sleep."""
CALLS = 4
"""Calls of each direction; the first is left out: what was in L2 before it is another's."""
DIRECTIONS = ("forward", "backward")
BETWEEN = "|"
L2_WINDOW = 20_000_000
"""Assumed where the instruments do not know the device."""


def number(text: str) -> float:
    return float(text.replace(",", ""))


def parse(text: str) -> list[Row]:
    """Launches in order, {"kernel": name, metric: value}, from ncu's CSV (a line a metric, or with --page raw a line a
    launch).  Raises ValueError where there is none."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu wrote no table: " + (" ".join(lines[-3:]) or "nothing at all"))
    table = list(csv.reader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))))
    head, launches = table[0], {}
    for line in table[1:]:
        cell = dict(zip(head, line, strict=False))
        if not cell["ID"]:  # units, the second line of the raw page
            continue
        launch = launches.setdefault(int(cell["ID"]), {"kernel": cell["Kernel Name"].rsplit("(", 1)[0]})
        if "Metric Name" in cell:
            launch[cell["Metric Name"]] = number(cell["Metric Value"])
        else:
            launch.update({metric: number(cell[metric]) for metric in METRICS if cell.get(metric)})
    return [launches[i] for i in sorted(launches)]


def split(launches: Sequence[Row]) -> list[list[Row]]:
    """Launches after each marker."""
    groups: list[list[Row]] = []
    for launch in launches:
        if MARKER in launch["kernel"]:
            groups.append([])
        elif groups:
            groups[-1].append(launch)
    return groups


def averaged(calls: Sequence[Sequence[Row]]) -> list[Row]:
    """One call's launches: means over the calls.  Raises ValueError where they launched different kernels."""
    names = {tuple(launch["kernel"] for launch in call) for call in calls}
    if len(names) != 1:
        raise ValueError(f"calls must launch the same kernels, launched {sorted(names)}")
    mean = {READ: "read_bytes", WRITE: "write_bytes", TIME: "ns"}
    return [
        {"kernel": same[0]["kernel"]} | {n: sum(launch[m] for launch in same) / len(same) for m, n in mean.items()}
        for same in zip(*calls, strict=True)
    ]


def predicted(job: Job, shape: tuple[int, ...]) -> dict[str, Row]:
    """What normops.testing.cost says of each direction."""
    from normops import testing
    from normops.testing import cost

    device = testing.hardware_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    window = L2_WINDOW if device is None else testing.HARDWARE[device].l2_window
    inputs = job.inputs(shape, job.seed)
    found = {}
    with testing.plans() as plans:
        outputs = providers.by_normops(job.case, inputs)
        found["forward"] = plans[-1]
        gradient(outputs, inputs)
        found["backward"] = plans[-1]
    answers = {}
    for direction, planned in found.items():
        hbm = cost.hbm(planned.plan, planned.itemsizes, window)
        answers[direction] = {
            "engine": planned.plan.engine, "predicted_bytes": hbm.bytes, "l2_window": window,
            "predicted": [list(moved) for moved in hbm.launches],
        }  # fmt: skip
    return answers


def measure(jobs: Sequence[Job], shell: Shell, seconds: float) -> list[Row]:
    """A row for each job and direction.  Raises RuntimeError with a reason where nothing could be measured."""
    program = shell.which("ncu")
    if program is None:
        raise RuntimeError("ncu is not on the PATH")
    specs = [BETWEEN.join((job.case.name, job.format, job.dtype)) for job in jobs]
    # Clocks and caches are left as they are: a later kernel of a call may find in L2 what an earlier one left there.
    command = [
        program, "--csv", "--print-units", "base", "--metrics", ",".join(METRICS), "--clock-control", "none",
        "--cache-control", "none", "--profile-from-start", "off", "--target-processes", "all",
        sys.executable, "-m", "bench.ncu", *specs,
    ]  # fmt: skip
    ran = shell.run(command, seconds)
    try:
        groups = split(parse(ran.output))
    except ValueError as error:
        raise RuntimeError(f"{error} (exit code {ran.code}): {ran.tail[-600:]}") from error
    rows = []
    for place, (job, direction) in enumerate((job, direction) for job in jobs for direction in DIRECTIONS):
        calls = groups[place * CALLS : (place + 1) * CALLS]
        row = job.key | {"direction": direction}
        if len(calls) < CALLS:
            rows.append(row | {"ok": False, "error": "ncu did not get this far"})
            continue
        try:
            launches = averaged(calls[1:])
        except ValueError as error:
            rows.append(row | {"ok": False, "error": str(error)})
            continue
        moved = {"read_bytes": sum(n["read_bytes"] for n in launches)}
        moved["write_bytes"] = sum(n["write_bytes"] for n in launches)
        rows.append(row | moved | {"ok": True, "launches": launches})
    return rows


def main(specs: Sequence[str]) -> None:
    from torch.cuda import profiler

    by_name = {case.name: case for case in CASES}
    for spec in specs:
        name, memory_format, dtype = spec.split(BETWEEN)
        job = Job(by_name[name], memory_format, dtype)
        sets = [job.inputs(job.case.shape, i) for i in range(CALLS)]
        outputs = [providers.by_normops(job.case, i) for i in sets]
        gradient(outputs[0], sets[0])  # compiled and warm
        calls: dict[str, Any] = {
            "forward": [partial(providers.by_normops, job.case, i) for i in sets],
            "backward": [partial(gradient, y, i) for y, i in zip(outputs, sets, strict=True)],
        }
        for direction in DIRECTIONS:
            torch.cuda.synchronize()
            profiler.start()
            for call in calls[direction]:
                torch.cuda._sleep(1)
                call()
            torch.cuda.synchronize()
            profiler.stop()
        del sets, outputs, calls
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
