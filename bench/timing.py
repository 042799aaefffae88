"""Time of every case at its real shape: normops, torch eager and torch.compile against a copy of the same run.

CUDA graphs are replayed, so host time does not count. A graph calls a provider once for each of several input sets that
together exceed every L2 cache, and all outputs stay alive, so reads and writes go to DRAM. Graphs of all providers and
of the copy take turns; medians are reported.

Floor: a fused call cannot take less time than copying as many bytes as it must read and write (`passes` over x).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import providers
from .cases import Case, select
from .common import console, progress_bar, save
from .verify import shape_of

ROTATE = 200 * 2**20
"""Bytes of x in all input sets together: more than the L2 cache of any GPU."""
REPLAYS = 21
SLACK = 4.0
"""How far from float64 the others may be, in bounds of normops: a composition rounds between its functions."""
Graph = tuple[torch.cuda.CUDAGraph, Any]


def passes(case: Case) -> dict[str, float]:
    """How often an array of x's size must be read or written."""
    forward = 2 + 2 * case.pre_add + case.post_add  # x, y; pre_add, sum; post_add
    # x, dy, dx; dsum; post_add read again for the activation, its gradient written (without one it is dy itself)
    backward = 3 + case.pre_add + 2 * (case.post_add and case.activation is not None)
    return {"forward": forward, "backward": backward}


def compiled(case: Case) -> Callable[[providers.Inputs], providers.Outputs]:
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is called more than once
    return torch.compile(partial(providers.by_torch, case), dynamic=False)


def capture(calls: list[Callable[[], Any]], stream: torch.cuda.Stream) -> Graph:
    """A graph of the calls, one after another, and their outputs, kept so that no two calls write the same memory."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    return graph, kept


def interleaved(graphs: dict[str, Graph], calls: int) -> dict[str, float]:
    """Microseconds of one call of each: medians over replays that take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(REPLAYS + 2):
        for name, (graph, _) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: median(values) for name, values in times.items()}


def gradient(outputs: providers.Outputs, inputs: providers.Inputs) -> tuple[torch.Tensor, ...]:
    gradients = providers.output_gradients(inputs)
    return torch.autograd.grad(outputs, providers.leaves(inputs), gradients, retain_graph=True)


def check(
    case: Case, call: Callable[..., Any], memory_format: torch.memory_format, dtype: torch.dtype, slack: float
) -> float:
    """The worst error of a provider as a share of its bound, on a smaller batch of the real shape."""
    inputs = providers.make_inputs(case, shape_of(case), memory_format, dtype)
    _, errors = providers.errors_of(call, case, inputs, dtype, slack)
    return max(error["share"] for error in errors.values())


def time_case(case: Case, format_name: str, dtype_name: str, seed: int) -> list[dict[str, Any]]:
    memory_format, dtype = case.formats[format_name], providers.DTYPES[dtype_name]
    key = {"case": case.name, "norm": case.norm, "shape": case.shape, "format": format_name, "dtype": dtype_name}
    candidates = {"normops": partial(providers.by_normops, case), "torch": partial(providers.by_torch, case)}
    candidates["torch.compile"] = compiled(case)
    rows: list[dict[str, Any]] = []
    right: dict[str, Callable[..., Any]] = {}
    for name, call in candidates.items():
        try:
            share = check(case, call, memory_format, dtype, 1.0 if name == "normops" else SLACK)
        except Exception as error:  # a provider that cannot do a case is reported as such
            rows.append(key | {"provider": name, "ok": False, "error": f"{type(error).__name__}: {error}"})
            continue
        if share <= 1:
            right[name] = call
        else:
            rows.append(key | {"provider": name, "ok": False, "error": f"wrong: {share:.3g} times the bound"})
    if not right:
        return rows

    first = providers.make_inputs(case, case.shape, memory_format, dtype, seed)
    sets = max(1, ceil(ROTATE / (first["x"].numel() * dtype.itemsize)))
    inputs = [first, *(providers.make_inputs(case, case.shape, memory_format, dtype, seed + i) for i in range(1, sets))]
    stream = torch.cuda.Stream()
    for direction, count in passes(case).items():
        graphs = {"copy": capture([i["x"].detach().clone for i in inputs], stream)}
        for name, call in right.items():
            if direction == "forward":
                calls = [partial(call, i) for i in inputs]
            else:
                with torch.cuda.stream(stream):  # autograd runs a backward on its forward's stream
                    calls = [partial(gradient, call(i), i) for i in inputs]
            graphs[name] = capture(calls, stream)
        times = interleaved(graphs, sets)
        floor = times["copy"] * count / 2
        for name in right:
            row = {"provider": name, "direction": direction, "us": times[name], "copy_us": times["copy"]}
            rows.append(key | row | {"floor_us": floor, "of_floor": floor / times[name], "sets": sets, "ok": True})
        del graphs
    return rows


def time_all(only: str | None, out: Path, seed: int, dtype: str) -> bool:
    """Time the selected cases, print a table, write timing.json; True if every call of normops was right."""
    if not torch.cuda.is_available():
        console.print("no CUDA device: nothing was timed")
        return True
    rows: list[dict[str, Any]] = []
    tasks = [(case, format_name) for case in select(only) for format_name in case.formats]
    with progress_bar() as progress:
        for case, format_name in progress.track(tasks, description="time"):
            try:
                rows += time_case(case, format_name, dtype, seed)
            except Exception as error:  # out of memory, say: the others still run
                problem = f"{type(error).__name__}: {error}"
                row = {"case": case.name, "format": format_name, "provider": "all"}
                rows.append(row | {"ok": False, "error": problem})
            torch.cuda.empty_cache()
    save(out, "timing", {"method": __doc__, "rows": rows})

    names = ("normops", "torch", "torch.compile")
    title = f"Microseconds ({dtype}), and share of the copy floor reached"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("case", "format", "direction", "floor", *names):
        table.add_column(column, no_wrap=True)
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if row["ok"]:
            line = lines.setdefault((row["case"], row["format"], row["direction"]), {"floor": f"{row['floor_us']:.1f}"})
            line[row["provider"]] = f"{row['us']:.1f} ({row['of_floor']:.0%})"
    for key, line in lines.items():
        table.add_row(*key, line["floor"], *(line.get(name, "") for name in names))
    console.print(table)
    for row in rows:
        if not row["ok"]:
            text = f"not timed: {row['case']} {row['format']} {row['provider']}: {row['error']}"
            console.print(text, markup=False, style="red")
    return all(row["ok"] for row in rows if row["provider"] in ("normops", "all"))
