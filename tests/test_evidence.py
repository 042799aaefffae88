"""What the case table compiles to: no spills, accesses as wide as shapes allow, nothing worse than the baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from math import prod
from pathlib import Path
from typing import Any

import pytest

from bench.cases import CASES, select
from bench.compare import BASELINE, read_rows
from bench.evidence import against_baseline
from bench.figures import (
    problems,
    worst,
)
from normops.gpus import H100
from normops.schedule import CHEAP, Limits

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {"normalize", "stream", "finish", "grad_normalize", "grad_group", "grad_stream", "grad_finish", "sum_rows"}


def measured(out: Path, *options: str) -> list[dict[str, Any]]:
    """Rows of the command, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "evidence", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads((out / "evidence.json").read_text())["rows"]


TOO_LARGE = {"four rows", "resnet 2048x7 b256"}
"""Large calls of contiguous memory with a launch for each visit: a unit of 32 MB, and odd planes."""


def inner_extent(row: dict[str, Any]) -> int:
    """Elements of x that follow one another in memory before a kept and a reduced axis meet, whatever is normalised."""
    (case,) = (case for case in CASES if case.name == row["case"])
    if case.norm in ("layer", "rms", "adaln"):
        return prod(case.shape[-case.dims :])
    return case.shape[1] if row["format"] != "contiguous" else prod(case.shape[2:])


def name(row: dict[str, Any]) -> str:
    return f"{row['case']} {row['format']} {row['direction']}"


def test_the_baseline_holds_the_case_table() -> None:
    rows = read_rows(BASELINE)["rows"]
    calls = {(c.name, fmt, d) for c in CASES for fmt in c.formats for d in ("forward", "backward")}
    assert {(r["case"], r["format"], r["direction"]) for r in rows} == calls and len(rows) == len(calls)
    assert {launch["kernel"] for row in rows for launch in row["launches"]} == KERNELS, "it shows every kernel"


@pytest.mark.parametrize(("device", "only"), [("h100", "resnet"), ("h100", "row"), ("b200", "unet 1280")])
def test_the_case_table(device: str, only: str, tmp_path: Path) -> None:
    """A part of it, for time; `python -m bench evidence --base HEAD` compares all of it with another commit."""
    rows = measured(tmp_path, "--device", device, "--compile-only", "--only", only)
    calls = [(c.name, fmt, d) for c in select(only) for fmt in c.formats for d in ("forward", "backward")]
    assert [(r["case"], r["format"], r["direction"]) for r in rows] == calls
    launches = [(row, launch) for row in rows for launch in row["launches"]]
    spilled = [f"{name(row)} {n['kernel']}: {n['spills']} bytes" for row, n in launches if n["spills"]]
    assert not spilled, spilled
    unknown = [f"{name(row)} {n['kernel']}" for row, n in launches if n["streams"] and not n["narrowest_bits"]]
    assert not unknown, f"accesses of these could not be found: {unknown}"
    narrow = [
        f"{name(row)} {n['kernel']}: {n['narrowest_bits']} bits where the shape allows {row['allowed_bits']}"
        for row, n in launches
        if n["streams"] and n["narrowest_bits"] < row["allowed_bits"]
    ]
    assert not narrow, narrow
    short = [
        f"{name(row)} {n['kernel']}: {n['narrowest_bits']} bits"
        for row, n in launches
        if n["streams"] and n["narrowest_bits"] < 64 and inner_extent(row) % 4 == 0
    ]
    assert not short, f"accesses of less than 8 bytes where the inner extent divides by 4: {short}"
    # 64 rows are 64 programs: predicted faster than tiles that fill the device and wait for one another.
    few = {"long row 32768 contiguous forward"}
    found = [row for row in rows if "idle" in problems(row) and name(row) not in few]
    idle = [f"{name(row)}: {worst(row)['idle']:.0%}" for row in found]
    assert not idle, f"idle SMs with x above 4 MB: {idle}"
    # Partial dw and db of very long rows are 8 bytes a column for every 32 rows of 6 bytes.
    wasteful = [name(row) for row in rows if row["over_floor"] > (1.67 if row["engine"] == "split" else 1.1)]
    assert not wasteful, f"bytes over 1.67 of the floor where split, 1.1 elsewhere: {wasteful}"
    if device == "h100":
        windows = {name(row): row["l2_window_bytes"] for row in rows if row["engine"] == "ticketed"}
        assert max(windows.values()) <= 20e6, windows
        # Small calls, columns (channels_last, odd planes), long rows backward, whose parameters run along them; and
        # rows of 32 MB.
        limits, activations = Limits(), {c.name: c.activation or "identity" for c in CASES}

        def small(row: dict[str, Any]) -> float:
            if row["direction"] == "forward":
                return limits.cached * H100.l2_bytes
            cheap = activations[row["case"]] in CHEAP
            return (limits.grad_cached if cheap else limits.grad_cached_activated) * H100.l2_bytes

        rows_backward = {c.name for c in CASES if c.norm in ("layer", "rms", "adaln")}
        large = [
            row for row in rows
            if row["engine"] == "split" and row["format"] == "contiguous" and row["x_bytes"] > small(row)
            and not (row["direction"] == "backward" and row["case"] in rows_backward)
        ]  # fmt: skip
        assert {row["case"] for row in large} <= TOO_LARGE
        worse, stale = against_baseline(device, "bf16", rows)
        assert not worse, "worse than bench/results/evidence.json:\n" + "\n".join(worse)
        if stale:
            warnings.warn(stale, stacklevel=1)


@pytest.mark.parametrize("only", ["resnet 64x56 b32", "llama 4096"])  # all, for time, by --baseline
def test_what_is_executed(only: str, tmp_path: Path) -> None:
    """A sample of the table is walked through: nothing executes more than in the baseline."""
    rows = measured(tmp_path, "--only", only)
    assert len(rows) >= 2
    worse, _ = against_baseline("h100", "bf16", rows)
    assert not worse
    for row in rows:
        assert 5 < row["instructions_per_element"] < 300 and row["of_floor"] < 1.1 and row["rounds"] >= 1
