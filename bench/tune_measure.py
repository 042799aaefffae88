"""Times of one call under several schedules, in turns with the schedule that stands and with a copy.

A schedule that launches just what the present one launches is not timed; one whose results are not within their bounds
of float64 is reported as wrong.  How times are taken: bench/timing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any

from normops import schedule
from normops.launch import Step
from normops.plan import Plan
from normops.tile import sideways

from . import providers
from .device import Cuda
from .peers import PROVIDERS
from .timing import ROTATE, Row, check, gradient, own, passes, spread, take_turns
from .tune_cases import RESIDENT, Task

(OWN,) = (provider for provider in PROVIDERS if provider.name == "normops")
CURRENT = "current"
DIRECTIONS = ("forward", "backward")
NEEDS = tuple(1 << i for i in range(6, 19))
"""Limits tried, in elements, to see from which one on a group is held on chip."""
UNCACHED = {"cached": 0.0, "grad_cached": 0.0, "grad_cached_activated": 0.0}
"""With which no call is so small that launches of their own are preferred to tickets."""
WINDOWS = tuple(1 << i for i in range(14, 31))
"""The same in bytes, for a unit of a ticketed launch."""


@contextmanager
def planned() -> Iterator[list[Plan]]:
    """Yields a list that takes up plans; nothing is launched inside the block."""
    found: list[Plan] = []
    launch = Step.launch

    def recorded(self: Step, *_: Any) -> None:
        found.append(self.plan)

    Step.launch = recorded  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Step.launch = launch  # type: ignore[method-assign]


def plans(task: Task, inputs: providers.Inputs, changes: dict[str, Any]) -> dict[str, Plan]:
    """The plan of each direction under a schedule."""
    with schedule.forced(**changes), planned() as found:
        gradient(providers.by_normops(task.job.case, inputs), inputs)
    if len(found) != 2:
        raise RuntimeError(f"a call must be one plan forward and one backward, got {len(found)}")
    return dict(zip(DIRECTIONS, found, strict=True))


def same(a: Plan, b: Plan) -> bool:
    """Whether two plans launch the same."""

    def launches(plan: Plan) -> list[Any]:
        return [(n.kernel, n.grid, n.operands, n.scalars, n.form, n.num_warps) for n in plan.launches]

    return launches(a) == launches(b)


def needs(task: Task, inputs: providers.Inputs) -> dict[str, Row]:
    """For each direction the limit of its own that decides whether the group is held on chip (`field`), the least value
    with which it would be (`need`), and the least window with which it would be ticketed; None: not even the largest,
    or rows that no limit decides about.
    """
    found: dict[str, Row] = {direction: {"need": None, "window_need": None} for direction in DIRECTIONS}
    for name, engine, tried in (("need", "resident", NEEDS), ("window_need", "ticketed", WINDOWS)):
        for value in tried:
            held = dict.fromkeys(RESIDENT, value if engine == "resident" else 1)
            changes = {**held, "engine": "resident"} if engine == "resident" else {**held, **UNCACHED, "window": value}
            for direction, plan in plans(task, inputs, changes).items():
                if found[direction][name] is None and plan.engine == engine:
                    found[direction][name] = value
            if all(found[direction][name] is not None for direction in DIRECTIONS):
                break
    layout = plans(task, inputs, {})["forward"].layout
    rows = layout.extent("s") == 1 and layout.extent("a") > 1
    fields = {"forward": "forward_sideways" if sideways(layout) else "forward",
              "backward": "backward_affine" if rows else "backward"}  # fmt: skip
    for row in found.values():
        if row["need"] is not None and row["need"] < layout.group:  # whole rows in pieces, whatever the limit
            row["need"] = None
    return {d: row | {"field": fields[d], "group": layout.group, "pattern": layout.pattern} for d, row in found.items()}


def distinct(task: Task, inputs: providers.Inputs) -> tuple[dict[Any, dict[str, Any]], list[Row]]:
    """Schedules that differ from the present one somewhere, by name; and rows of those that do not, by direction.

    An engine that a call cannot take is left out: another one would stand in for it.
    """
    present = plans(task, inputs, {})
    kept: dict[Any, dict[str, Any]] = {}
    rows: list[Row] = []
    for name, changes in task.question.changes:
        for direction, plan in plans(task, inputs, changes).items():
            row = {"direction": direction, "value": name, "engine": plan.engine}
            if task.question.name == "engine" and plan.engine != name:
                rows.append(row | {"ok": False, "skipped": f"takes no part: the call would be {plan.engine}"})
            elif same(plan, present[direction]):
                rows.append(row | {"ok": True, "same": True})
            else:
                kept.setdefault(name, changes)
    return kept, rows


def right(task: Task, device: Any, kept: dict[Any, dict[str, Any]]) -> tuple[dict[Any, dict[str, Any]], list[Row]]:
    """Of the schedules those whose results are right, the present one among them; rows for the others."""
    found, rows = {}, []
    call = OWN.build(task.job.case)
    for name, changes in {CURRENT: {}, **kept}.items():
        try:
            with schedule.forced(**changes):
                check(task.job, OWN, call, device.shape(task.job.case))
        except Exception as error:  # wrong, or it does not compile: the others still run
            text = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            rows += [{"direction": d, "value": name, "ok": False, "error": text[:500]} for d in DIRECTIONS]
        else:
            found[name] = changes
        device.release()
    return found, rows


def measure(task: Task, device: Any = None) -> list[Row]:
    """Rows of one task: for each direction the present schedule (`value` "current") and those of the question."""
    device = device or Cuda()
    job, question = task.job, task.question
    shape = device.shape(job.case)
    first = job.inputs(shape, job.seed)
    about = needs(task, first) if question.name == "engine" else {}
    kept, rows = distinct(task, first)
    known = {(row["direction"], row["value"]) for row in rows}
    if kept:
        found, wrong = right(task, device, kept)
        rows += [row for row in wrong if (row["direction"], row["value"]) not in known]
        if CURRENT in found:
            count = max(1, ceil(ROTATE / (first["x"].numel() * first["x"].element_size()))) if device.rotates else 2
            inputs = [first, *(job.inputs(shape, job.seed + i) for i in range(1, count))]
            for direction in DIRECTIONS:
                there = {name: c for name, c in found.items() if (direction, name) not in known}
                if len(there) > 1:
                    rows += timed(task, device, direction, there, inputs)
    shared = job.key | {"question": question.name, "x_bytes": first["x"].untyped_storage().nbytes()}
    return [shared | about.get(row["direction"], {}) | row for row in rows]


def timed(
    task: Task, device: Any, direction: str, schedules: dict[Any, dict[str, Any]], inputs: Sequence[providers.Inputs]
) -> list[Row]:
    """Times of one direction under several schedules that take turns, and of a copy in the same turns."""
    call, rows = OWN.build(task.job.case), []
    replays = {"copy": device.capture([i["x"].detach().clone for i in inputs])}
    engines: dict[Any, str] = {}
    for name, changes in schedules.items():
        try:
            engines[name] = plans(task, inputs[0], changes)[direction].engine
            with schedule.forced(**changes):  # limits are read when a plan is made, that of a backward included
                sets = [own(i) for i in inputs]
                made: list[Callable[[], Any]]
                if direction == "forward":
                    made = [partial(call, i) for i in sets]
                else:
                    with device.stream():
                        made = [partial(gradient, call(i), i) for i in sets]
                replays[name] = device.capture(made)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"[:500]
            rows.append({"direction": direction, "value": name, "ok": False, "error": text})
    times = take_turns(lambda name: device.elapsed(replays[name]), tuple(replays))
    copy = spread(times["copy"]).median / len(inputs)
    floor = copy * passes(task.job.case)[direction] / 2
    for name in schedules.keys() & replays.keys():
        low, median, high = (value / len(inputs) for value in spread(times[name]))
        rows.append({
            "direction": direction, "value": name, "engine": engines[name], "ok": True, "us": median, "us_low": low,
            "us_high": high, "copy_us": copy, "floor_us": floor, "of_floor": floor / median, "sets": len(inputs),
            "graph": replays[name].graph, "why_no_graph": replays[name].why,
        })  # fmt: skip
    replays.clear()
    device.release()
    return sorted(rows, key=lambda row: str(row["value"]))
