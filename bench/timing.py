"""Time of cases at their real shapes, against others and against a copy of the same run.

CUDA graphs are replayed, so host time does not count. A graph calls a provider once for each of several input sets that
together exceed every L2 cache, and all outputs stay alive, so reads and writes go to DRAM. Graphs of all providers and
of the copy take turns, in another order every turn; medians and quartiles are reported. What cannot be captured is
called from Python, and marked: its time may be the host's.

A provider is timed where its results, at the same shape, are as near to float64 as its bound allows.  Where the process
of a job dies, hangs or loses its device, the job runs again without the provider that was at work.

Floor: a fused call cannot take less time than copying as many bytes as it must read and write (`passes` over x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch

from . import providers, workers
from .cases import Case, select
from .common import console, print_table, run_all, save
from .counting import count_beside
from .device import Cuda, Replay
from .peers import COMPILED, PROVIDERS, Provider
from .workers import at_work

ROTATE = 200 * 2**20
"""Bytes of x in all input sets together: more than the L2 cache of any GPU."""
REPLAYS = 25
LIMIT = 300.0
"""Seconds that `bench time` gives one job."""
WARM_US, WARM_TURNS = 30_000, 30
"""Turns that do not count: until they took so long together (clocks rise under load), or so many."""
DIRECTIONS = ("forward", "backward", "both")
Row = dict[str, Any]
Call = Callable[[providers.Inputs], providers.Outputs]


@dataclass(frozen=True)
class Job:
    """One case in one memory format and dtype."""

    case: Case
    format: str
    dtype: str
    seed: int = 0
    compile: str | None = None
    """Why torch.compile is left out; None: it is not."""
    lost: tuple[tuple[str, str], ...] = ()
    """(provider, how) of those that a process died, hung or lost its device with: they are left out."""

    @property
    def key(self) -> Row:
        c = self.case
        return {"case": c.name, "norm": c.norm, "shape": c.shape, "format": self.format, "dtype": self.dtype}

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.format}, {self.dtype}"

    def inputs(self, shape: tuple[int, ...], seed: int) -> providers.Inputs:
        return providers.make_inputs(
            self.case, shape, self.case.formats[self.format], providers.DTYPES[self.dtype], seed
        )


def spared(job: Job, failed: workers.Failed) -> Job | None:
    """The job without the provider that was at work when it failed; None where none was."""
    return replace(job, lost=(*job.lost, (failed.at, failed.reason))) if failed.at else None


class Spread(NamedTuple):
    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Quartiles."""
    if len(values) == 1:
        return Spread(*values * 3)
    return Spread(*quantiles(values, n=4, method="inclusive"))


def passes(case: Case) -> dict[str, float]:
    """How often an array of x's size must be read or written."""
    forward = 2 + 2 * case.pre_add + case.post_add  # x, y; pre_add, sum; post_add
    # x, dy, dx; dsum; post_add read again for the activation, its gradient written (without one it is dy itself)
    backward = 3 + case.pre_add + 2 * (case.post_add and case.activation is not None)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def take_turns(elapsed: Callable[[str], float], names: Sequence[str], turns: int = REPLAYS) -> dict[str, list[float]]:
    """`elapsed` of every name, `turns` times, after turns that do not count; each turn starts one name further on."""
    times: dict[str, list[float]] = {name: [] for name in names}
    warmed, turn = 0.0, 0
    while turn < 3 or (warmed < WARM_US and turn < WARM_TURNS):
        warmed += sum(elapsed(name) for name in names)
        turn += 1
    for turn in range(turns):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(elapsed(name))
    return times


def gradient(outputs: providers.Outputs, inputs: providers.Inputs, retain: bool = True) -> tuple[torch.Tensor, ...]:
    gradients = providers.output_gradients(inputs)
    return torch.autograd.grad(outputs, providers.leaves(inputs), gradients, retain_graph=retain)


def step(call: Call, inputs: providers.Inputs) -> Any:
    outputs = call(inputs)
    return outputs, gradient(outputs, inputs, retain=False)


def own(inputs: providers.Inputs) -> providers.Inputs:
    """The same operands with running statistics of their own: these are written to."""
    copies = {n: t.clone() for n, t in inputs.items() if n.startswith("running") and t is not None}
    return inputs | copies


def check(job: Job, provider: Provider, call: Call, shape: tuple[int, ...]) -> Row:
    """The worst error of a provider as a share of its bound, and `kinks` (bench/providers.py).  Raises AssertionError
    where it is not within its bound."""
    inputs, dtype = job.inputs(shape, job.seed), providers.DTYPES[job.dtype]
    _, errors, kinks = providers.errors_of(call, job.case, inputs, dtype, provider.slack)
    worst = max(errors, key=lambda name: errors[name]["share"])
    share = errors[worst]["share"]
    if not share <= 1:
        raise AssertionError(f"wrong: {worst} is off by {share:.3g} times its bound")
    return {"share": share, "kinks": kinks}


def backend(outputs: providers.Outputs) -> str | None:
    """cuDNN where autograd's graph shows that PyTorch called it."""
    seen, todo = set(), [outputs[0].grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("Cudnn"):
            return "cuDNN"
        todo += [child for child, _ in node.next_functions]
    return None


def memory(device: Any, name: str, call: Call, inputs: providers.Inputs) -> Row:
    """Bytes of one forward and backward: what stays allocated between the two beside the outputs, the peaks, and what
    autograd was given to keep (operands included; not seen through torch.compile)."""
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    if name != COMPILED:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call(inputs)
    device.release()
    before = device.allocated()
    device.peak()
    outputs = call(inputs)
    peak = device.peak()
    kept = device.allocated() - before - sum(t.untyped_storage().nbytes() for t in outputs)
    gradients = gradient(outputs, inputs, retain=False)
    both = max(peak, device.peak())
    del gradients
    return {
        "x_bytes": inputs["x"].untyped_storage().nbytes(), "kept_bytes": kept, "peak_forward_bytes": peak - before,
        "peak_bytes": both - before, "saved_bytes": None if name == COMPILED else sum(saved.values()),
        "backend": backend(outputs),
    }  # fmt: skip


def right(job: Job, device: Any, offered: Sequence[Provider]) -> tuple[dict[str, tuple[Call, Row]], list[Row]]:
    """Providers whose results are right, with facts about them; and rows that say what is wrong with the others."""
    found: dict[str, tuple[Call, Row]] = {}
    rows: list[Row] = []
    shape, dtype, lost = device.shape(job.case), providers.DTYPES[job.dtype], dict(job.lost)
    for provider in offered:
        row = job.key | {"provider": provider.name, "ok": False}
        reason = provider.reason(job.case, job.format, dtype)
        if provider.name == COMPILED:
            reason = reason or job.compile
        if reason:
            rows.append(row | {"skipped": reason})
            continue
        if provider.name in lost:
            rows.append(row | {"error": lost[provider.name]})
            continue
        with at_work(provider.name):
            try:
                call = provider.build(job.case)
                checked = check(job, provider, call, shape)
                device.release()
                facts = memory(device, provider.name, call, job.inputs(shape, job.seed))
            except Exception as error:  # a provider that cannot do a case is reported as such
                known = isinstance(error, AssertionError) and str(error).startswith("wrong")
                rows.append(row | {"error": str(error) if known else f"{type(error).__name__}: {error}"[:500]})
            else:
                found[provider.name] = call, facts | checked
            device.release()
    return found, rows


def one_turn(device: Any, replays: dict[str, Replay], name: str) -> float:
    with at_work(None if name == "copy" else name):
        return device.elapsed(replays[name])


def time_job(job: Job, device: Any = None, offered: Sequence[Provider] = PROVIDERS) -> list[Row]:
    """Rows of one job, one for each provider and direction; one for each provider that is not timed."""
    device = device or Cuda()
    calls, rows = right(job, device, offered)
    if not calls:
        return rows
    shape = device.shape(job.case)
    first = job.inputs(shape, job.seed)
    count = max(1, ceil(ROTATE / (first["x"].numel() * first["x"].element_size()))) if device.rotates else 2
    inputs = [first, *(job.inputs(shape, job.seed + i) for i in range(1, count))]
    for direction, units in passes(job.case).items():
        replays = {"copy": device.capture([i["x"].detach().clone for i in inputs])}
        for name, (call, _) in calls.items():
            with at_work(name):
                try:
                    sets = [own(i) for i in inputs]
                    if direction == "backward":
                        with device.stream():
                            made = [partial(gradient, call(i), i) for i in sets]
                    else:
                        made = [partial(call if direction == "forward" else partial(step, call), i) for i in sets]
                    replays[name] = device.capture(made)
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"[:500]
                    rows.append(job.key | {"provider": name, "ok": False, "direction": direction, "error": problem})
                    device.release()
        times = take_turns(partial(one_turn, device, replays), tuple(replays))
        copy = spread(times["copy"]).median / count
        for name in replays.keys() - {"copy"}:
            low, median, high = (value / count for value in spread(times[name]))
            floor = copy * units / 2
            rows.append(job.key | calls[name][1] | {
                "provider": name, "direction": direction, "ok": True, "us": median, "us_low": low, "us_high": high,
                "copy_us": copy, "floor_us": floor, "of_floor": floor / median, "sets": count,
                "graph": replays[name].graph, "why_no_graph": replays[name].why,
            })  # fmt: skip
        replays.clear()
        device.release()
    order = {provider.name: i for i, provider in enumerate(offered)}
    return sorted(rows, key=lambda row: order[row["provider"]])


def print_rows(rows: Sequence[Row]) -> None:
    """A table of what was timed, and what was not and why."""
    timed = [row for row in rows if row["ok"]]
    names = list(dict.fromkeys(row["provider"] for row in sorted(timed, key=lambda r: r["provider"] != "normops")))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in timed:
        key = (row["case"], row["format"], row["dtype"], row["direction"])
        line = lines.setdefault(key, {"floor": f"{row['floor_us']:.1f}"})
        line[row["provider"]] = f"{row['us']:.1f} ({row['of_floor']:.0%}){'' if row['graph'] else ' host'}"
    columns = ("case", "format", "dtype", "direction", "floor", *names)
    title = "Microseconds, and share of the copy floor reached; host: called from Python, whose time may show"
    print_table(title, columns, ((*key, *(line.get(n, "") for n in columns[4:])) for key, line in lines.items()))
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row["ok"] and "error" in row:
            reasons.setdefault((row["provider"], row["error"]), []).append(row["case"])
    for (provider, error), cases in reasons.items():
        names = ", ".join(dict.fromkeys(cases))
        console.print(f"not timed: {provider}, {names}: {error}", markup=False, style="red", soft_wrap=True)


def time_all(only: str | None, out: Path, seed: int, dtype: str) -> bool:
    """Time the selected cases, print a table, write timing.json; True if every call of normops was right."""
    jobs = [Job(case, name, dtype, seed) for case in select(only) for name in case.formats]
    rows: list[Row] = []
    for index, answer in run_all(time_job, jobs, "time", limit=LIMIT, again=spared):
        failed = isinstance(answer, workers.Failed)
        rows += [jobs[index].key | {"provider": "any", "ok": False, "error": answer.reason}] if failed else answer
    count_beside(rows, torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    save(out, "timing", {"method": __doc__, "rows": rows})
    print_rows(rows)
    return not any(row["provider"] in ("normops", "any") and "error" in row for row in rows)
