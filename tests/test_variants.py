"""How often Triton compiles: once for each kernel of a call, whatever the batch; and nothing is tuned while it is used.

Run as a program (Triton needs a process without the interpreter), this file prints the variants of many calls as JSON.
Nothing is compiled for that: Triton is asked what it would compile.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

from bench import providers
from bench.cases import CASES, Case
from bench.variants import variants
from normops import schedule, testing
from normops.testing.explain import phase_of

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("", *schedule.ENGINES)
BATCHES = (2, 3, 17, 64, 129, 1000)
SWEPT = (
    "resnet 256x56 b32", "resnet 1024x14 b32", "resnet 2048x7 b32", "resnet frozen", "convnext 128x56",
    "convnext 1024x7", "unet 320x64", "unet 1280x8", "unet attention", "cyclegan 256x64", "cyclegan 64x256",
    "nnunet 320x8", "vit-b", "vit-b add", "llama 4096", "llama 16384", "head norm 64", "dit adaln",
    "long row 131072", "long row 262144", "image layer", "image group",
)  # fmt: skip
ACTIVATIONS = (None, "relu", "silu")
DTYPES = ("bf16", "fp16", "fp32")
Row = dict[str, Any]


def launches(case: Case, memory_format: str, dtype: str = "bf16") -> Iterator[Row]:
    """Every launch of a call forward and backward, and the variant of its kernel."""
    x = case.formats[memory_format]
    inputs = providers.make_inputs(case, case.shape, x, providers.DTYPES[dtype], empty=True)
    outputs: Any = ()
    for direction in ("forward", "backward"):
        with testing.plans() as planned, variants(compile=False) as found:
            if direction == "forward":
                outputs = providers.by_normops(case, inputs)
            else:
                torch.autograd.grad(outputs, providers.leaves(inputs), providers.output_gradients(inputs))
        (call,) = planned
        assert found[: len(found) // 2] == found[len(found) // 2 :], "all are asked for, and then launched"
        for launch, variant in zip(call.plan.launches, found[: len(found) // 2], strict=True):
            phase = phase_of(launch)
            yield {
                "case": case.name, "norm": case.norm, "format": memory_format, "dtype": dtype, "direction": direction,
                "planned": call.plan.engine, "kernel": variant.kernel, "key": variant.key,
                "tile": [*launch.tile, launch.form.BLOCK_A, launch.form.BLOCK_S, launch.form.BLOCK_P,
                         launch.form.FULL_S, launch.num_warps],
                "wide": launch.form.WIDE,
                "phase": phase, "sums": any(name in launch.operands.values() for name in ("t1", "t0")),
            }  # fmt: skip


def batched(case: Case, batch: int) -> Case:
    """The case with another batch, and shorter sequences: even memory that is never touched can run out."""
    rows = case.norm in ("layer", "rms") and case.dims == 1 and len(case.shape) == 3
    return replace(case, shape=(batch, *((16, case.shape[-1]) if rows else case.shape[1:])))


def sweep() -> Iterator[Row]:
    for case in (case for case in CASES if case.name in SWEPT):
        for memory_format in case.formats:
            for engine in ENGINES:
                for batch in BATCHES:
                    with schedule.forced(engine=engine):
                        for row in launches(batched(case, batch), memory_format):
                            yield row | {"engine": engine, "batch": batch}


def program() -> dict[str, list[Row]]:
    table = [(case, memory_format) for case in CASES for memory_format in case.formats]
    (group,) = (case for case in CASES if case.name == "unet 320x64")
    found = {
        "table": [row | {"batch": c.shape[0], "like": repr(replace(c, name="", origin="", small=(), shape=c.shape[1:]))}
                  for c, f in table for row in launches(c, f)],
        "sweep": list(sweep()), "variety": [],
    }  # fmt: skip
    for engine in schedule.ENGINES[1:]:
        with schedule.forced(engine=engine):
            for dtype in DTYPES:
                for activation in ACTIVATIONS:
                    for row in launches(replace(group, activation=activation), "contiguous", dtype):
                        found["variety"].append(row | {"engine": engine, "activation": activation})
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[Row]]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def by(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def keys(rows: list[Row]) -> set[tuple[str, str]]:
    return {(row["kernel"], row["key"]) for row in rows}


def test_the_case_table_compiles_no_more_than_it_must(found: dict[str, list[Row]]) -> None:
    """A case in one format needs three kernels: one forward, one backward, one that adds up dw and db; columns need
    six, and are a third of them.  What shares kernels with others makes room for the rest of what is split, and for
    large groups, which have forms of their own."""
    rows = found["table"]
    assert len(keys(rows)) <= 3.6 * sum(len(case.formats) for case in CASES)
    assert len(keys(rows)) < len(rows), "nothing is shared"


def test_cases_that_differ_in_their_batch_share_kernels(found: dict[str, list[Row]]) -> None:
    groups = by(found["table"], "like", "format", "direction", "planned")
    several = {place: rows for place, rows in groups.items() if len({row["case"] for row in rows}) > 1}
    assert len(several) > 10
    for place, rows in several.items():
        for kernel, same in by(rows, "kernel", "phase").items():
            tiles = {tuple(row["tile"]) for row in same}
            assert len(keys(same)) == len(tiles), (place, kernel)


def test_the_batch_does_not_recompile(found: dict[str, list[Row]]) -> None:
    """Each kernel of a call is compiled once for six batches.  Five things may set variants apart:

    - A single part of dw and db is written as the result, by the same kernel with other pointers; whether there is one
      depends on how many programs the batch gives.
    - The groups of BatchNorm hold the batch, so that a tile which holds a group, or is larger than it, grows with it.
    - From 2 ** 31 elements on, offsets have 64 bits.
    - Of 16 rows or fewer, sum_rows takes 16 at a time (so do programs of grad_finish).
    - Columns: a small batch has smaller tiles, so that there are enough of them; whether tiles are whole is told of the
      batch, if it is averaged over; and a finish takes as many partial results at once as there are.

    A batch of one is an axis of size 1, which a layout does not have: it is compiled apart, and not among these.
    """
    swept = {(case.name, f) for case in CASES if case.name in SWEPT for f in case.formats}
    assert {(row["case"], row["format"]) for row in found["sweep"]} == swept
    assert {row["planned"] for row in found["sweep"]} == {*schedule.ENGINES, "apply", "rows"}
    for place, rows in by(found["sweep"], "case", "format", "engine", "direction", "kernel", "phase").items():
        sums, tiles = {row["sums"] for row in rows}, {tuple(row["tile"]) for row in rows}
        several = len(sums) > 1 and not place[-2].startswith("grad_")
        assert not several, (place, "sums")
        whole = place[-2] in ("normalize", "grad_normalize", "grad_group")
        columns = place[1].startswith("channels_last") and rows[0]["norm"] != "layer2d" and not whole
        if columns:
            assert len(tiles) <= 4, (place, tiles)
        else:
            adds = place[-2] in ("sum_rows", "grad_finish")
            assert len(tiles) == 1 or rows[0]["norm"] == "batch" or adds, (place, tiles)
        assert {row["wide"] for row in rows if row["batch"] < 1000} != {True, False}, place
        apart = len(by([row | {"tile": tuple(row["tile"])} for row in rows], "sums", "tile", "wide"))
        assert len(keys(rows)) == apart, (place, len(keys(rows)), apart)


def test_tiles_of_batch_norm_grow_by_doubling_until_they_are_full(found: dict[str, list[Row]]) -> None:
    """Five variants of a kernel at most from batch 2 to 1000; one where a sample of one channel fills the tile."""
    rows = [row for row in found["sweep"] if row["norm"] == "batch"]
    for place, same in by(rows, "case", "format", "engine", "kernel", "phase").items():
        assert len(keys(same)) <= 5, place
        if place[0].startswith("resnet 256x56") and place[2] in ("ticketed", "split") and place[1] == "contiguous":
            large = [row for row in same if row["batch"] > 3]
            assert len(keys(large)) == 1, place


def test_activations_and_dtypes_count_apart_and_nothing_else_does(found: dict[str, list[Row]]) -> None:
    """Only launches that apply an activation are compiled for each."""
    count = {place: len(keys(rows)) for place, rows in by(found["variety"], "engine", "kernel", "phase").items()}
    both, statistics = len(ACTIVATIONS) * len(DTYPES), len(DTYPES)
    assert count == {
        ("ticketed", "stream", "both"): both, ("ticketed", "grad_stream", "both"): both,
        ("ticketed", "sum_rows", None): statistics,
        ("split", "stream", "statistics"): statistics, ("split", "finish", None): statistics,
        ("split", "stream", "apply"): both,
        ("split", "grad_stream", "statistics"): both, ("split", "grad_finish", None): statistics,
        ("split", "grad_stream", "apply"): both,
    }  # fmt: skip


def test_the_command_prints_the_same_number_whatever_the_processes(found: dict[str, list[Row]], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "evidence", "--only", "feature maps", "--workers", "2", "--compile-only"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    expected: dict[str, int] = defaultdict(int)
    names = {case.name for case in CASES if "feature maps" in case.origin}
    for kernel, _ in keys([row for row in found["table"] if row["case"] in names]):
        expected[kernel] += 1
    summary = json.loads((tmp_path / "evidence.json").read_text())["summary"]
    assert summary["variants"] == expected
    assert f"{sum(expected.values())} compiled variants for " in done.stdout


SOURCES = [*(ROOT / "kernels").glob("*.py"), *(p for p in (ROOT / "normops").rglob("*.py") if "kernels" not in p.parts)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_tuned_while_it_is_used(path: Path) -> None:
    """No kernel tries configurations, no module times anything or asks the benchmark: schedules are pure functions."""
    forbidden = {"autotune", "Config", "do_bench", "do_bench_cudagraph", "elapsed_time"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {getattr(node, "id", None), getattr(node, "attr", None)}
        modules: set[str] = set()
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
            modules = {node.module or ""}
        elif isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
        assert not names & forbidden, f"line {getattr(node, 'lineno', 0)}"
        assert not any(module.split(".")[0] == "bench" for module in modules), f"line {getattr(node, 'lineno', 0)}"


if __name__ == "__main__":
    with testing.virtual_device("h200"):
        print(json.dumps(program()))
