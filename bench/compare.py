"""Two sets of rows of ``python -m bench evidence``: what changed, and what of it is worse."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .common import text
from .figures import SCHEMA, Row

KEY = ("case", "format", "dtype", "direction")
BASELINE = Path(__file__).parent / "results" / "evidence.json"
REFRESH = "python -m bench evidence --baseline"
CLASSES = (32, 16, 8)
"""Occupancy classes, named by the warps that an SM holds at least: half as many hide half as much latency."""
ROUNDING = 1.001
"""Partial sums may shift between workspace and registers by this much without counting as traffic."""
MORE = 1.02
"""Instructions and rounds may grow by this much without counting as worse: a sample of programs is walked."""
CALL_FIGURES = ("pattern", "engine", "workspace_bytes", "floor_bytes", "l2_bytes", "l2_window_bytes", "allowed_bits")
LAUNCH_FIGURES = (
    "programs", "tile", "warps", "registers", "stack", "shared", "resident", "wide_loads", "wide_stores",
    "instructions", "mufu", "wavefronts", "barriers", "atomics", "atomic_rounds", "sectors", "moved_bytes",
    "in_flight_bytes",
)  # fmt: skip


class Change(NamedTuple):
    case: str
    format: str
    dtype: str
    direction: str
    kernel: str
    """Empty for figures of the whole call."""
    figure: str
    before: Any
    after: Any
    worse: bool | None
    """None: neither better nor worse by itself."""

    def __str__(self) -> str:
        where = " ".join(part for part in (*self[:5],) if part)
        return f"{where}: {self.figure} {_text(self.before)} -> {_text(self.after)}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}{n}" for name, n in value.items())
    return "none" if value is None else f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def occupancy(launch: Row) -> str:
    """The class of a launch: how many warps one SM holds."""
    warps = launch["resident"] * launch["warps"]
    return next((f"{least}+ warps" for least in CLASSES if warps >= least), f"under {CLASSES[-1]} warps")


def _class_rank(launch: Row) -> int:
    return sum(launch["resident"] * launch["warps"] >= least for least in CLASSES)


def _named(launches: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """(kernel, how many of its kind came before) -> launch."""
    seen: Counter[str] = Counter()
    found = {}
    for launch in launches:
        found[launch["kernel"], seen[launch["kernel"]]] = launch
        seen[launch["kernel"]] += 1
    return found


def _call(before: Row, after: Row, exact: bool) -> Iterator[tuple[str, str, Any, Any, bool | None]]:
    def numbers(figure: str, old: Any, new: Any) -> tuple[str, str, Any, Any, bool | None]:
        return "", figure, old, new, new > old

    counts = len(before["launches"]), len(after["launches"])
    if counts[0] != counts[1]:
        yield numbers("launches", *counts)
    old, new = before["hbm_bytes"], after["hbm_bytes"]
    if not old / ROUNDING <= new <= old * ROUNDING:
        yield numbers("hbm_bytes", old, new)
    if exact:
        yield from _more("", "instructions_per_element", before, after)
    for figure in CALL_FIGURES:
        if before[figure] != after[figure]:
            yield "", figure, before[figure], after[figure], None
    known, now = _named(before["launches"]), _named(after["launches"])
    widths = [launch["narrowest_bits"] for launch in before["launches"] if launch["narrowest_bits"]]
    for name, launch in now.items():
        # A kernel that the call did not launch before is held against none that spills, and the narrowest there was.
        old_launch = known.get(name)
        yield from _launch(name[0], old_launch, launch, exact, min(widths, default=None))
    for name in known.keys() - now.keys():
        yield name[0], "kernel", "launched", None, None


def _more(kernel: str, figure: str, before: Row, after: Row) -> Iterator[tuple[str, str, Any, Any, bool | None]]:
    """A count that is worse where it grew; figures that are not known are not compared."""
    old, new = before[figure], after[figure]
    if old is not None and new is not None and not old / MORE <= new <= old * MORE:
        yield kernel, figure, old, new, new > old


def _launch(
    kernel: str, before: Row | None, after: Row, exact: bool, narrowest: int | None
) -> Iterator[tuple[str, str, Any, Any, bool | None]]:
    if before is None:
        yield kernel, "kernel", None, "launched", None
    old, new = before["spills"] if before else 0, after["spills"]
    if old != new and (exact or not (old and new)):
        yield kernel, "spills", old, new, new > old
    if not exact:
        return
    width = before["narrowest_bits"] if before else narrowest
    if width and after["narrowest_bits"] and after["narrowest_bits"] != width:
        worse = after["narrowest_bits"] < width
        if before or worse:
            yield kernel, "narrowest_bits", width, after["narrowest_bits"], worse
    if before is None:
        return
    if occupancy(before) != occupancy(after):
        yield kernel, "occupancy", occupancy(before), occupancy(after), _class_rank(after) < _class_rank(before)
    yield from _more(kernel, "rounds", before, after)
    for figure in LAUNCH_FIGURES:
        if before[figure] != after[figure] and None not in (before[figure], after[figure]):
            yield kernel, figure, before[figure], after[figure], None


def compare(before: Sequence[Row], after: Sequence[Row], exact: bool = True) -> list[Change]:
    """Changes from one set of rows to the other, in the order of the newer one.

    Worse are: bytes to and from DRAM, launches, spills, executed instructions or rounds of loads that went up; a
    narrower narrowest access to a stream; a lower occupancy class; a call that is gone; a new call that spills.
    `exact` is False between versions of Triton: then of the machine code only spills from none to some (or back) are
    compared.
    """
    key = {tuple(row[name] for name in KEY): row for row in before}
    changes = []
    for row in after:
        name = tuple(row[part] for part in KEY)
        old = key.pop(name, None)
        if old is None:
            changes.append(Change(*name, "", "call", None, "present", None))
            found = [("", "spills", 0, max(n["spills"] for n in row["launches"]), True)]
            changes += [Change(*name, *c) for c in found if c[3]]
        else:
            changes += [Change(*name, *change) for change in _call(old, row, exact)]
    changes += [Change(*name, "", "call", "present", None, True) for name in key]
    return changes


def write_baseline(path: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """JSON that differs where a figure does: sorted, one call a line, without dates, paths and machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(head | {"rows": sorted(rows, key=lambda row: [row[name] for name in KEY])}))


def read_rows(path: Path) -> dict[str, Any]:
    """What ``evidence`` or :func:`write_baseline` wrote.  Raises ValueError for another version of the schema."""
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}, has {content.get('schema')}: write it anew ({REFRESH})")
    return content


@contextmanager
def worktree(repository: Path, revision: str) -> Iterator[Path]:
    """A checkout of another commit in a temporary folder, gone afterwards whatever happens.

    Raises ValueError where git knows no such commit.
    """
    git = ["git", "-C", str(repository)]
    with tempfile.TemporaryDirectory(prefix="normops-") as folder:
        path = Path(folder, "tree")
        made = subprocess.run(
            [*git, "worktree", "add", "--detach", "--quiet", path, revision], capture_output=True, text=True
        )
        try:
            if made.returncode:
                raise ValueError(f"base must name a commit, got {revision!r}: {made.stderr.strip()}")
            yield path
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", path], capture_output=True)
            subprocess.run([*git, "worktree", "prune"], capture_output=True)
