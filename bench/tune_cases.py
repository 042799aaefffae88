"""What ``python -m bench tune`` asks: calls around every threshold of ``normops.schedule.Limits``, and values to try.

Each question is one comparison: the schedule as it is against others, on one call.  The most decisive come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import isqrt
from typing import Any

from normops.gpus import Device
from normops.schedule import ENGINES, Limits

from .cases import CASES, Case
from .gpu import FIRST
from .timing import Job

MIB = 1 << 20
SWEEP_ELEMENTS = 32 * MIB
"""Of x in a call of the sweep: 64 MiB in bf16, more than stays in L2 while sets of inputs rotate."""
RESIDENT = ("forward", "forward_sideways", "backward", "backward_affine")
"""Limits up to which groups are held on chip."""
THRESHOLDS = (*RESIDENT, "window")
"""Limits that choose an engine; of all other fields values are tried."""
ALTERNATIVES = {
    "ticket_tile": (0.5, 2), "grad_ticket_tile": (0.5, 2), "tile": (0.5, 2), "grad_tile": (0.5, 2),
    "ticket_warp": (0.5, 2), "grad_ticket_warp": (0.5, 2),
    "ahead": (0.5, 2), "warps_per_sm": (0.5, 2), "stream_warps": (0.5, 2),
    "cached": (0, 0.75, 1.5), "grad_cached": (0, 0.75, 1.5), "grad_cached_activated": (0, 0.75, 1.5),
    "chunks": (0.5, 2), "line_bytes": (0.5, 2), "column_tile": (0.5, 2), "column_programs": (1 / 3, 2),
    "grad_column_programs": (0.5, 2),
}  # fmt: skip
"""Limit -> values to try, as multiples of the one that stands."""
PAST_LIMIT = 2
"""How far past its limit a group may be to be held on chip for the comparison: further on registers spill at length."""


@dataclass(frozen=True)
class Question:
    """Schedules that take turns with the one that stands; `name`: "engine", or the limit whose values they are."""

    name: str
    changes: tuple[tuple[Any, dict[str, Any]], ...]
    """(engine or value, what to force)"""


@dataclass(frozen=True)
class Task:
    """One question about one call."""

    job: Job
    question: Question

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.job.case.name, self.job.format, self.job.dtype, self.question.name

    @property
    def name(self) -> str:
        return f"{self.question.name}: {self.job.name}"


def questions(limits: Limits, device: Device) -> list[Question]:
    """The engines first, then values by how many calls they touch; last what is looked for again in L2."""
    now = asdict(limits)
    wide = {name: PAST_LIMIT * now[name] for name in RESIDENT}
    engines = ((e, {"engine": e, **(wide if e == "resident" else {})}) for e in ENGINES)
    found = [Question("engine", tuple(engines))]
    for name, factors in ALTERNATIVES.items():
        values = [now[name] * factor for factor in factors]
        if isinstance(now[name], int):
            values = [max(1, int(value)) for value in values]
        found.append(Question(name, tuple((value, {name: value}) for value in values if value != now[name])))
    windows = [share * device.l2_bytes // 8 for share in (2, 4, 6) if device.l2_bytes]
    found.append(Question("window", tuple((n, {"window": n}) for n in windows if n != window(limits, device))))
    return found


def window(limits: Limits, device: Device) -> int:
    """Bytes of L2 that are planned with."""
    return limits.window or device.window


def _sizes(low: int, high: int) -> Iterator[int]:
    """Powers of two, and where the step is a threshold's neighbourhood, one and a half times them."""
    size = low
    while size <= high:
        yield size
        if 2 * size <= high:
            yield size * 3 // 2
        size *= 2


def sweep() -> list[Case]:
    """Calls of about SWEEP_ELEMENTS whose groups grow from well below every threshold to well above it."""
    found = []
    for n in _sizes(4096, 1 << 17):
        rows = max(1, SWEEP_ELEMENTS // n)
        found.append(Case(f"sweep layer {n}", "layer", (rows, n), (3, 200), "sweep over long rows"))
        found.append(Case(f"sweep rms {n}", "rms", (rows, n), (3, 200), "sweep over long rows", pre_add=True))
    for n in _sizes(4096, 1 << 17):
        side = isqrt(n) // 8 * 8  # accesses of 16 bytes
        c = max(1, SWEEP_ELEMENTS // (16 * side * side))
        name = f"instance {side}x{side}"
        found.append(Case(f"sweep {name}", "instance", (16, c, side, side), (2, 5, 8, 8), "sweep over planes"))
        group = Case(f"sweep group {side}x{side}", "group", (8, 256, side, side), (2, 64, 4, 4), "sweep over planes")
        found.append(replace(group, shape=(max(1, SWEEP_ELEMENTS // (256 * side * side)), 256, side, side)))
    for n in _sizes(4, 64):
        shape = (n, max(1, SWEEP_ELEMENTS // (n * 32 * 32)), 32, 32)
        found.append(Case(f"sweep batch {n * 1024}", "batch", shape, (3, 9, 8, 8), "sweep over batches"))
    return found


SWEEP = sweep()


def chosen(only: str | None) -> list[Case]:
    """Cases whose name, norm or origin contains the text: the most telling, the sweep, the rest."""
    text, first = (only or "").lower(), {name: i for i, name in enumerate(FIRST)}
    table = sorted(CASES, key=lambda case: first.get(case.name, len(first)))
    cases = [*table[: len(first)], *SWEEP, *table[len(first) :]]
    return [case for case in cases if text in f"{case.name} {case.norm} {case.origin}".lower()]


def tasks(
    cases: Sequence[Case], dtype: str, seed: int, limits: Limits, device: Device, asked: Callable[[str], bool]
) -> list[Task]:
    """Every question that is `asked`, about every call, question by question."""
    jobs = [Job(case, name, dtype, seed) for case in cases for name in case.formats]
    return [Task(job, question) for question in questions(limits, device) if asked(question.name) for job in jobs]
