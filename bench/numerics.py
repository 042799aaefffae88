"""Errors of every norm against exact results, beside PyTorch's own functions on the very same adversarial data.

The error of a result is the largest one of its elements, over half a step of its dtype at the largest exact element of
its group: 1 is what rounding alone may cost, in any dtype.  The largest, for one wrong element is a wrong result; over
that of the largest, for what cancels to nearly 0 has no digits of its own.  Where the exact result is small by chance
or as a difference, that counts of which it is made, whose rounding nobody undoes: dy · w · rstd for dx; for a sum the
root of the sum of its squares, and |db| for dw, which a mean that is off by a rounding moves by as much; for a running
mean the deviation, beside which it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from normops import calls, schedule
from normops.testing import plans, prepare_once

from . import numerics_page
from .common import console, environment, run_all, save
from .numerics_cases import BATCHES, DATA, LONG, LONG_DATA, MOMENTA, NORMS, RUNNING, Data, Norm
from .numerics_page import WAYS, Errors, Row
from .providers import DTYPES, statistic
from .workers import Failed

Array = np.ndarray[Any, Any]
Result = tuple[Array, Array]
"""Exact, and how large it is in each group."""
TILES = {"tile": 256, "grad_tile": 256, "ticket_tile": 256, "grad_ticket_tile": 256, "column_tile": 4096}
"""Small ones, of which a group has several."""
LONG_TILES = {"tile": 1 << 15, "grad_tile": 1 << 15, "ticket_tile": 1 << 15, "grad_ticket_tile": 1 << 15}
"""Large ones, for the interpreter's time goes by programs."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def plainly() -> Iterator[None]:
    """CPU tensors take the way without kernels."""
    before, calls.INTERPRETED = calls.INTERPRETED, False
    calls.known.clear()  # they hold what was chosen before
    try:
        yield
    finally:
        calls.INTERPRETED = before
        calls.known.clear()


def extended(t: Tensor) -> Array:
    """t in the precision of the exact results: of fp64, wider than that."""
    return t.detach().cpu().double().numpy().astype(np.longdouble if t.dtype == torch.float64 else np.float64)


def exact(norm: Norm, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, eps: float) -> dict[str, Result]:
    """y, dx, dw and db by the formula, in the split shape."""
    h, g = (extended(t).reshape(norm.sizes) for t in (x, dy))
    shape = [n if i in norm.affine else 1 for i, n in enumerate(norm.sizes)]
    weight, bias = (extended(t).reshape(shape).astype(h.dtype) for t in (w, b))

    def mean(t: Array) -> Array:
        return t.mean(norm.reduced, keepdims=True)

    h = h - mean(h) if norm.center else h
    rstd = 1 / np.sqrt(mean(h * h) + h.dtype.type(eps))
    xhat, s = h * rstd, g * weight
    dx = rstd * ((s - mean(s) if norm.center else s) - xhat * mean(s * xhat))
    y = xhat * weight + bias if norm.center else xhat * weight
    found: dict[str, Result] = {
        "y": (y, np.abs(y).max(norm.reduced, keepdims=True)),
        "dx": (dx, np.maximum(np.abs(dx), np.abs(rstd * s)).max(norm.reduced, keepdims=True)),
    }
    others = tuple(i for i in range(len(norm.sizes)) if i not in norm.affine)
    sums = {"dw": g * xhat, "db": g} if norm.center else {"dw": g * xhat}
    for name, t in sums.items():
        found[name] = t.sum(others), np.maximum(np.sqrt((t * t).sum(others)), np.abs(t.sum(others))).max()
    if norm.center:
        found["dw"] = found["dw"][0], np.maximum(found["dw"][1], np.abs(found["db"][0]).max())
    return found


def error(got: Tensor, expected: Array, scale: Array) -> float:
    """The largest error in half steps of got's dtype at `scale`; infinite where `got` is not finite and the exact
    result is."""
    info, mine = torch.finfo(got.dtype), extended(got).reshape(expected.shape)
    counts = np.isfinite(expected) & (np.abs(expected) <= info.max)  # others are no numbers of the dtype
    off = np.abs(np.where(counts, mine, 0) - np.where(counts, expected, 0))
    off = np.where(np.isfinite(off), off, np.inf)
    return float((off / np.maximum(scale * (info.eps / 2), info.smallest_normal * info.eps / 2))[counts].max(initial=0))


def results(
    call: Callable[..., Tensor], norm: Norm, tensors: Sequence[Tensor], dy: Tensor, eps: float
) -> dict[str, Tensor]:
    x, w, b = (t.detach().requires_grad_() for t in tensors)
    leaves = {"dx": x, "dw": w} | ({"db": b} if norm.center else {})
    y = call(x, w, b, eps)
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def measured(call: Callable[[str], Errors], ways: Sequence[str], tiles: dict[str, int]) -> dict[str, Errors]:
    """Errors of every way, by the engine that the forward took: another one stands in where a call cannot take it."""
    found: dict[str, Errors] = {}
    seen = set()
    for way in ways:
        if way == "plain":
            with plainly():
                found[way] = call("cpu")
            continue
        with schedule.forced(engine=way, **tiles), plans() as planned:
            errors = call(DEVICE)
        taken = tuple(one.plan.engine for one in planned)
        if taken not in seen:
            found[taken[0]] = errors
        seen.add(taken)
    return found


def normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())), dtype=torch.float64)


def measure(
    norm: Norm, layout: str, dtype: str, data: Data, ways: Sequence[str] = WAYS, tiles: dict[str, int] = TILES,
) -> Row:  # fmt: skip
    """Errors of y, dx, dw and db of PyTorch and of every way of ours."""
    kept = DTYPES[dtype]
    z = normal(norm.name + data.name, 2, norm.groups, norm.elements)
    x, dy = (norm.spread(t, layout).to(kept) for t in (data.x(z[0], torch.finfo(kept)), z[1] + data.dy))
    scale, shift = 1 + 0.3 * normal("w", norm.parameters), 0.1 + 0.3 * normal("b", norm.parameters)
    w, b = (norm.parameter(t.to(statistic(kept) if norm.wide else kept)) for t in (scale, shift))
    expected = exact(norm, x, w, b, dy, data.eps)

    def errors(call: Callable[..., Tensor], device: str) -> Errors:
        found = results(call, norm, [t.to(device) for t in (x, w, b)], dy.to(device), data.eps)
        return {name: error(t, *expected[name]) for name, t in found.items()}

    row = {"norm": norm.name, "layout": layout, "dtype": dtype, "data": data.name}
    try:
        row["torch"] = errors(norm.torchs, DEVICE)
    except (ValueError, RuntimeError) as refusal:  # as ours does
        return row | {"refused": str(refusal)}
    return row | measured(lambda device: errors(norm.ours, device), ways, tiles)


def measure_running(
    norm: Norm, layout: str, dtype: str, data: Data, momentum: float, ways: Sequence[str] = WAYS
) -> Row:
    """Errors of running_mean and running_var, which began as 0 and 1, after several batches."""
    kept = DTYPES[dtype]
    z = normal(norm.name + data.name, BATCHES, norm.groups, norm.elements)
    batches = [norm.spread(data.x(one, torch.finfo(kept)), layout).to(kept) for one in z]
    n, channels = norm.elements, norm.shape[1]
    mean, var = np.zeros(channels), np.ones(channels)
    for x in batches:
        h = extended(x)
        at = h.mean(norm.reduced, keepdims=True)
        of_batch = np.square(h - at).sum(norm.reduced) / (n - 1)
        mean = (1 - momentum) * mean + momentum * at.reshape(-1, channels).mean(0)
        var = (1 - momentum) * var + momentum * of_batch.reshape(-1, channels).mean(0)
    expected = {"running_mean": (mean, np.maximum(np.abs(mean), np.sqrt(var)).max()), "running_var": (var, var.max())}

    def errors(call: Callable[..., Any], device: str) -> Errors:
        running = [make(channels, dtype=statistic(kept), device=device) for make in (torch.zeros, torch.ones)]
        with torch.no_grad():
            for x in batches:
                call(x.to(device), *running, None, None, True, momentum)
        return {
            name: error(t, *result) for t, (name, result) in zip(running, expected.items(), strict=True)
        }  # fmt: skip

    ours, torchs = RUNNING[norm.name]
    row = {"norm": norm.name, "layout": layout, "dtype": dtype, "data": data.name, "momentum": momentum}
    return row | {"torch": errors(torchs, DEVICE)} | measured(lambda device: errors(ours, device), ways, TILES)


LAST = ("BatchNorm", "GroupNorm")
"""Norms that are measured in channels_last too, where their groups are columns side by side."""
Task = tuple[str, str, str]
"""A norm, a layout, a dtype."""


def tasks() -> list[Task]:
    plain = [(norm.name, "contiguous", dtype) for norm in NORMS for dtype in DTYPES]
    last = [(norm.name, "channels_last", "fp32") for norm in NORMS if norm.name in LAST]
    return [*plain, *last, *((norm.name, "contiguous", "fp32") for norm in LONG)]


def cases(task: Task) -> Iterator[tuple[Data, float | None]]:
    """Its data; and the momenta of those that running statistics are made of."""
    norm, _, dtype = task
    yield from ((one, None) for one in LONG_DATA.get(norm, DATA) if dtype in one.dtypes)
    if norm in RUNNING and dtype == "fp32":
        yield from ((one, m) for one in DATA if dtype in one.dtypes for m in MOMENTA.get(one.name, ()))


@np.errstate(all="ignore")  # numbers overflow on purpose
def measure_all(task: Task, only: Sequence[str] | None = None) -> list[Row]:
    """All rows of a task, or those of some data."""
    prepare_once()
    name, layout, dtype = task
    (norm,) = (one for one in (*NORMS, *LONG) if one.name == name)
    rows: list[Row] = []
    # What engines do differently are sums in the type of the statistics: of fp32 they are all measured.
    ways = WAYS if dtype == "fp32" else WAYS[:2]
    ways = ways if uses_kernels() else WAYS[:1]
    tiles = LONG_TILES if norm in LONG else TILES
    for data, momentum in cases(task):
        if only is not None and data.name not in only:
            continue
        if momentum is None:
            rows.append(measure(norm, layout, dtype, data, ways, tiles))
            if "refused" not in rows[-1]:
                ways = [way for way in ways if way in rows[-1]]  # the others are these by another name
        else:
            rows.append(measure_running(norm, layout, dtype, data, momentum, ways))
    return rows


def uses_kernels() -> bool:
    return calls.uses_kernels(torch.empty(1, device=DEVICE))


def numerics(only: str | None, out: Path, baseline: bool) -> bool:
    """Measure, print, write numerics.json, with `baseline` the page too; True if the bar holds everywhere."""
    todo = [task for task in tasks() if (only or "").lower() in " ".join(task).lower()]
    done: dict[int, Any] = {}
    rows: list[Row] = []
    for index, answer in run_all(measure_all, todo, "numerics"):
        done[index] = answer
        rows = [row for _, one in sorted(done.items()) if not isinstance(one, Failed) for row in one]
        save(out, "numerics", {"rows": rows})
    failures = [f"{' '.join(todo[i])}: {a.reason}" for i, a in sorted(done.items()) if isinstance(a, Failed)]
    numerics_page.print_all(rows)
    if baseline and not failures and not only:
        save(numerics_page.RESULTS.parent, "numerics", {"rows": rows})
        numerics_page.write()
    interpreter = environment()["interpreter"]
    broken = [told for row in rows for told in numerics_page.broken(row, interpreter)]
    for line in (*failures, *broken):
        console.print(f"FAILED {line}", markup=False, style="red")
    console.print(numerics_page.summary(rows, interpreter), markup=False, highlight=False)
    return not failures and not broken
