"""What records of ``python -m bench tune --measure`` say about each limit: pure functions, nothing is measured here.

Records of different devices or commits are never mixed.  A call decides between two schedules where the quartiles of
their times, taken in turns, do not overlap; other differences are noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import exp, log
from pathlib import Path
from typing import Any

from normops.schedule import Limits

from .timing import DIRECTIONS
from .tune_cases import THRESHOLDS

KIND, SCHEMA = "tune", 1
CURRENT = "current"
LEAST_CALLS, LEAST_AGREE, LEAST_GAIN = 4, 0.8, 1.02
"""For an answer: calls that decide, the share of them that agree with it, and what it must win over what stands."""
Content = dict[str, Any]
Row = dict[str, Any]
Key = tuple[str, str, str, str, str]
Comparison = dict[Any, Row]


@dataclass(frozen=True)
class Choice:
    """One call that shows two schedules: `inside` is the one up to a threshold, or a new value; `outside` the other."""

    name: str
    inside: float
    outside: float
    clear: bool
    """Whether the quartiles do not overlap."""
    need: int = 0
    """The least limit with which a call would be inside."""

    @property
    def ratio(self) -> float:
        """How much longer the outside takes."""
        return self.outside / self.inside


@dataclass(frozen=True)
class Proposal:
    limit: str
    current: int
    value: int | None
    """None: no clear answer."""
    gain: float = 1.0
    """Geometric mean, over the calls that would change, of the time now over the time then."""
    changed: int = 0
    """Calls that would change."""
    agree: int = 0
    decided: int = 0
    slower: tuple[tuple[str, float], ...] = ()
    """Calls that would become slower beyond noise, and the time now over the time then."""
    note: str = ""


@dataclass
class Group:
    """All that one commit showed on one device."""

    device: str
    commit: str
    limits: dict[str, Any]
    comparisons: dict[Key, Comparison] = field(default_factory=dict)


def read(path: Path) -> Content:
    """A record of ``tune --measure`` or of ``bench gpu``.  Raises ValueError for any other file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    known = isinstance(content, dict) and (content.get("kind"), content.get("schema")) in ((KIND, SCHEMA), ("gpu", 1))
    if not known:
        raise ValueError(f"{path} must be a record of `bench tune --measure` or `bench gpu`, version {SCHEMA}")
    return content


def groups(contents: Sequence[Content]) -> list[Group]:
    """By device and commit; of a comparison that was made twice the newer one counts."""
    found: dict[tuple[str, str, str], Group] = {}
    for content in sorted(contents, key=lambda c: c["environment"]["date"]):
        if content["kind"] != KIND:
            continue
        where = content["environment"]
        commit = (where["commit"] or "unknown")[:7] + (" with changes" if where.get("dirty") else "")
        limits = content["limits"]
        group = found.setdefault((where["device"], commit, json.dumps(limits, sort_keys=True)),
                                 Group(where["device"], commit, limits))  # fmt: skip
        fresh: dict[Key, Comparison] = {}
        for row in content["rows"]:
            if "direction" in row:
                key = (row["case"], row["format"], row["dtype"], row["question"], row["direction"])
                fresh.setdefault(key, {})[row["value"]] = row
        group.comparisons |= fresh
    return list(found.values())


def geometric(ratios: Iterable[float]) -> float:
    logs = [log(ratio) for ratio in ratios]
    return exp(sum(logs) / len(logs)) if logs else 1.0


def apart(a: Row, b: Row) -> bool:
    return a["us_high"] < b["us_low"] or b["us_high"] < a["us_low"]


def times(comparison: Comparison) -> dict[Any, Row]:
    """Rows with times."""
    return {value: row for value, row in comparison.items() if row.get("ok") and "us" in row}


def title(key: Key) -> str:
    case, memory_format, dtype, _, direction = key
    return f"{case}, {memory_format}, {dtype}, {direction}"


# Thresholds between engines


def engines(comparison: Comparison) -> dict[str, Row]:
    """Engine -> its row; the schedule that stands speaks for the engine it takes."""
    rows = times(comparison)
    return {row["engine"]: row for value, row in rows.items() if value != CURRENT} | {
        row["engine"]: row for value, row in rows.items() if value == CURRENT
    }


def choices(group: Group, limit: str) -> list[Choice]:
    """Calls on which both sides of a threshold were timed; resident against the better of the others, or ticketed
    against split."""
    inside, others = ("ticketed", ("split",)) if limit == "window" else ("resident", ("ticketed", "split"))
    found = []
    for key, comparison in group.comparisons.items():
        if key[3] != "engine":
            continue
        by_engine = engines(comparison)
        facts: Row = next(iter(comparison.values()))
        need = facts.get("window_need" if limit == "window" else "need")
        if need is None or inside not in by_engine or (limit != "window" and facts["field"] != limit):
            continue
        outside = [by_engine[engine] for engine in others if engine in by_engine]
        if outside:
            a, b = by_engine[inside], min(outside, key=lambda row: row["us"])
            found.append(Choice(title(key), a["us"], b["us"], apart(a, b), need))
    return found


def agreeing(decided: Sequence[Choice], threshold: int) -> int:
    return sum((choice.need <= threshold) == (choice.ratio > 1) for choice in decided)


def crossover(limit: str, current: int, found: Sequence[Choice]) -> Proposal:
    """The threshold that most calls agree with."""
    decided = [choice for choice in found if choice.clear]
    if len(decided) < LEAST_CALLS:
        return Proposal(limit, current, None, decided=len(decided), note=f"{len(decided)} of {len(found)} calls decide")
    sizes = sorted({choice.need for choice in decided})
    candidates = {sizes[0] // 2, *sizes, current}
    best = max(candidates, key=lambda t: (agreeing(decided, t), -abs(log(max(t, 1) / current)), t))
    agree = agreeing(decided, best)
    seen = [choice.ratio > 1 for choice in decided]
    notes = []
    if all(seen):
        notes.append(f"inside wins up to {sizes[-1]}, the largest seen")
    elif not any(seen):
        notes.append(f"inside wins nowhere from {sizes[0]} on")
    if agree < LEAST_AGREE * len(decided):
        return Proposal(limit, current, None, agree=agree, decided=len(decided), note="calls disagree")
    if best == current and len({choice.need <= current for choice in decided}) == 1:
        notes = notes or ["no call beyond the limit decides"]
        return Proposal(limit, current, None, agree=agree, decided=len(decided), note="; ".join(notes))
    low, high = sorted((best, current))
    moved = [choice for choice in found if low < choice.need <= high]
    ratios = {c.name: c.ratio if best > current else 1 / c.ratio for c in moved}
    clear = {choice.name for choice in moved if choice.clear}
    slower = tuple((name, ratio) for name, ratio in ratios.items() if ratio < 1 and name in clear)
    gain = geometric(ratios.values())
    if best != current and gain < LEAST_GAIN:
        best = current
        notes.append(f"nothing to win: {gain:.3f}x")
        agree, gain, moved, slower = agreeing(decided, current), 1.0, [], ()
    return Proposal(limit, current, best, gain, len(moved), agree, len(decided), slower, "; ".join(notes))


# Values


def tried(group: Group, limit: str) -> dict[Any, list[Choice]]:
    """Value -> calls that it changes."""
    found: dict[Any, list[Choice]] = {}
    for key, comparison in group.comparisons.items():
        rows = times(comparison)
        if key[3] == limit and CURRENT in rows:
            now = rows.pop(CURRENT)
            for value, row in rows.items():
                found.setdefault(value, []).append(Choice(title(key), row["us"], now["us"], apart(row, now)))
    return found


def best_value(limit: str, current: int, found: dict[Any, list[Choice]]) -> Proposal:
    """The value with the best geometric mean, if enough calls say so beyond noise."""
    if not found:
        return Proposal(limit, current, None, note="not timed, or no call changes")
    gains = {value: geometric(choice.ratio for choice in calls) for value, calls in found.items()}
    value = max(gains, key=lambda v: gains[v])
    calls = found[value]
    decided = [choice for choice in calls if choice.clear]
    agree = sum(choice.ratio > 1 for choice in decided)
    against = sum(choice.ratio < 1 for choice in decided)
    slower = tuple((choice.name, choice.ratio) for choice in decided if choice.ratio < 1)
    if gains[value] >= LEAST_GAIN and len(decided) >= LEAST_CALLS and agree >= LEAST_AGREE * len(decided):
        return Proposal(limit, current, value, gains[value], len(calls), agree, len(decided), slower)
    worse = [sum(c.clear and c.ratio < 1 for c in calls) for calls in found.values()]
    total = [sum(c.clear for c in calls) for calls in found.values()]
    if all(n >= LEAST_CALLS and w >= LEAST_AGREE * n for w, n in zip(worse, total, strict=True)):
        return Proposal(limit, current, current, 1.0, 0, against, len(decided), note="every other value is slower")
    note = f"{agree} calls faster with {value}, {against} slower, {len(calls) - len(decided)} within noise"
    return Proposal(limit, current, None, gains[value], len(calls), agree, len(decided), slower, note)


def proposals(group: Group) -> list[Proposal]:
    """One for each limit that was asked about."""
    asked = {key[3] for key in group.comparisons}
    found = []
    for limit, current in group.limits.items():
        if limit in THRESHOLDS and "engine" in asked:
            found.append(crossover(limit, current, choices(group, limit)))
        if limit in asked - {"engine"}:
            found.append(best_value(limit, current, tried(group, limit)))
    return found


def comment(group: Group, proposal: Proposal) -> str:
    """The line for beside the field in normops/schedule.py; empty without a clear answer."""
    p, today = proposal, asdict(Limits()).get(proposal.limit)
    if p.value is None:
        return ""
    where = f"# measured: {group.device}, {group.commit}: "
    agree = f"{p.agree} of {p.decided} calls agree"
    if p.value == p.current:
        line = f"{where}{p.current} stands, {agree}"
    else:
        line = f"{where}{p.value}, {p.gain:.2f}x faster than {p.current} over {p.changed} calls, {agree}"
    if p.slower:
        line += f", slower: {len(p.slower)}"
    stale = f" (the file says {today} today)" if today not in (p.current, p.value, 0, None) else ""
    return f"{p.limit}: {line}{stale}"


def furthest(contents: Sequence[Content], most: int = 10) -> list[Row]:
    """Calls of ``bench gpu`` runs that come least near to the copy floor: there a schedule has most to win."""
    rows = {}
    for content in sorted(contents, key=lambda c: c["environment"]["date"]):
        for row in content.get("timing", []) if content["kind"] == "gpu" else []:
            if row.get("ok") and row["provider"] == "normops" and row["direction"] in DIRECTIONS[:2]:
                device = content["environment"]["device"]
                rows[device, row["case"], row["format"], row["dtype"], row["direction"]] = row | {"device": device}
    return sorted(rows.values(), key=lambda row: row["of_floor"])[:most]
