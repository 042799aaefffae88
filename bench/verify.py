"""Forward and backward of every case against the same composition of torch functions in float64."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from normops import gpus, schedule
from normops.testing import prepare_once

from . import providers, workers
from .cases import Case
from .common import console, print_table, run_all, save

COPIES = 24
"""Tensors of x's size in float64 that verifying a call holds at most: operands, both results, gradients, errors, and
what kinks need."""


def shape_of(case: Case) -> tuple[int, ...]:
    """The shrunken shape in the interpreter; on a GPU the real one, its batch cut where memory would not hold it."""
    if not torch.cuda.is_available():
        return case.small
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    sample = prod(case.shape[1:]) * COPIES * 8
    return (max(1, min(case.shape[0], int(0.9 * memory) // sample)), *case.shape[1:])


def schedule_of(case: Case) -> Any:
    """Shrunken calls take the engine of the real ones, in tiny tiles: ticketed what does not fit on chip there, split
    what does not fit L2 either."""
    if torch.cuda.is_available():
        return nullcontext()
    limits = schedule.limits()
    if case.group <= limits.backward_affine:
        return nullcontext()
    engine = "split" if 2 * case.group > gpus.H200.window else "ticketed"
    return schedule.forced(engine=engine, tile=512, grad_tile=256, ticket_tile=512, grad_ticket_tile=256, ahead=1)


def verify_one(case: Case, memory_format: torch.memory_format, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    inputs = providers.make_inputs(case, shape_of(case), memory_format, dtype, seed)
    with schedule_of(case):
        actual, errors, kinks = providers.errors_of(partial(providers.by_normops, case), case, inputs, dtype)
    for name in ("y", "dx"):
        if actual[name].stride() != inputs["x"].stride():
            raise AssertionError(f"{name} has strides {actual[name].stride()}, x has {inputs['x'].stride()}")
    worst = max(errors, key=lambda name: errors[name]["share"])
    return {"worst": worst, **errors[worst], "kinks": kinks, "ok": errors[worst]["share"] <= 1, "errors": errors}


def verify_case(task: tuple[Case, int]) -> list[dict[str, Any]]:
    prepare_once()
    case, seed = task
    rows = []
    for format_name, memory_format in case.formats.items():
        for dtype_name, dtype in providers.DTYPES.items():
            row = {"case": case.name, "norm": case.norm, "origin": case.origin, "shape": shape_of(case)}
            row |= {"real_shape": case.shape, "format": format_name, "dtype": dtype_name}
            try:
                row |= verify_one(case, memory_format, dtype, seed)
            except Exception as error:  # a broken call is a result: the others still run
                row |= {"worst": type(error).__name__, "share": None, "ok": False, "error": str(error)}
            rows.append(row)
    return rows


def answered(case: Case, answer: Any) -> list[dict[str, Any]]:
    """Rows of a case, also where its process died or hung."""
    if not isinstance(answer, workers.Failed):
        return answer
    return [{"case": case.name, "format": format_name, "dtype": dtype, "worst": "process", "share": None, "ok": False,
             "error": answer.reason} for format_name in case.formats for dtype in providers.DTYPES]  # fmt: skip


def verify(cases: Sequence[Case], out: Path, seed: int) -> bool:
    """Verify the cases, print a table, write verify.json; True if everything is within its bound."""
    done = dict(run_all(verify_case, [(case, seed) for case in cases], "verify"))
    rows = [row for index in sorted(done) for row in answered(cases[index], done[index])]
    save(out, "verify", {"reason": providers.REASON, "rows": rows})

    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cell = row["worst"] if row["share"] is None else f"{row['share']:.2f} {row['worst']}"
        line = lines.setdefault((row["case"], row["format"]), [])
        line.append(cell if row["ok"] else f"[red]{cell}")
    title = "Largest error, 1 = bound, and the tensor it is in"
    print_table(title, ("case", "format", *providers.DTYPES), ((*key, *cells) for key, cells in lines.items()))
    failed = [row for row in rows if not row["ok"]]
    problems: dict[tuple[str, str], list[str]] = {}
    for row in failed:
        problem = row.get("error") or f"{row['worst']} exceeds its bound ({row['share']:.3g} times)"
        problems.setdefault((row["case"], problem), []).append(f"{row['format']} {row['dtype']}")
    for (case, problem), calls in problems.items():
        console.print(f"FAILED {case} ({', '.join(calls)}): {problem}", markup=False, style="red")
    where = "on the GPU" if torch.cuda.is_available() else "in Triton's CPU interpreter, at shrunken shapes"
    console.print(f"{len(rows) - len(failed)} of {len(rows)} calls, forward and backward, within their bounds {where}.")
    return not failed
