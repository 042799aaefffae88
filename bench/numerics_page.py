"""The bar of ``python -m bench numerics``, its tables, and the page docs/numerics.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

import torch

from normops import schedule

from .common import ROOT, print_table
from .numerics_cases import DATA, LONG, NORMS
from .providers import DTYPES, statistic
from .report import placed

RESULTS = ROOT / "bench/results/numerics.json"
PAGE = ROOT / "docs/numerics.md"
Row = dict[str, Any]
Errors = dict[str, float]
WAYS = ("plain", *schedule.ENGINES)
QUANTITIES = ("y", "dx", "dw", "db", "running_mean", "running_var")
TWICE = 2.0
ARITHMETIC = 16.0
"""Half steps of the statistics' dtype: three bits that a variance may lose before it is made again, twice the rounding
of a result."""
WIDE = [norm.name for norm in (*NORMS, *LONG) if norm.wide]
BY_NAME = {data.name: data for data in DATA}


def stored(row: Row, quantity: str) -> torch.dtype:
    """The dtype of a result."""
    kept = DTYPES[row["dtype"]]
    wide = quantity.startswith("running") or (quantity in ("dw", "db") and row["norm"] in WIDE)
    return statistic(kept) if wide else kept


def allowed(row: Row, way: str, quantity: str, interpreter: bool) -> float | None:
    """The largest error within the bar; None where none is asked for.  The interpreter cuts bf16 off: a whole step."""
    if judged_by_none(row):
        return None
    dtype, kept = stored(row, quantity), DTYPES[row["dtype"]]
    rounding = 2.0 if dtype == torch.bfloat16 and way != "plain" and interpreter else 1.0
    steps = ARITHMETIC + BY_NAME[row["data"]].away
    return TWICE * row["torch"][quantity] + rounding + steps * torch.finfo(statistic(kept)).eps / torch.finfo(dtype).eps


def judged_by_none(row: Row) -> bool:
    """Whether squares overflow, or PyTorch refuses the call."""
    return row["dtype"] in BY_NAME[row["data"]].overflow or "torch" not in row


def broken(row: Row, interpreter: bool) -> Iterator[str]:
    """Where the bar is broken."""
    for way in (way for way in WAYS if way in row):
        for quantity, mine in row[way].items():
            bar = allowed(row, way, quantity, interpreter)
            if bar is not None and not mine <= bar:
                told = f"{quantity} {number(mine)}, PyTorch {number(row['torch'][quantity])}, allowed {number(bar)}"
                yield f"{named(row)}, {way}: {told}"


def named(row: Row) -> str:
    """A row in words."""
    momentum = f", momentum {row['momentum']}" if "momentum" in row else ""
    return f"{row['norm']}, {row['layout']}, {row['dtype']}, {row['data']}{momentum}"


def number(error: float) -> str:
    return f"{error:.1f}" if error < 100 else f"{error:.0e}" if isfinite(error) else "not finite"


def largest(rows: Sequence[Row], ways: Sequence[str], quantity: str) -> float | None:
    """Of the errors of these ways in all rows."""
    return max((row[way][quantity] for row in rows for way in ways if quantity in row.get(way, ())), default=None)


def pair(rows: Sequence[Row], quantity: str, ways: Sequence[str] = WAYS) -> str:
    """Our largest error and PyTorch's."""
    errors = (largest(rows, who, quantity) for who in (ways, ["torch"]))
    return " / ".join("–" if e is None else number(e) for e in errors)


Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, columns, rows."""


def by_data(rows: Sequence[Row]) -> Iterator[Table]:
    """For each dtype a line for each kind of data."""
    for dtype in DTYPES:
        lines = []
        for data in DATA:
            found = [r for r in rows if (r["dtype"], r["data"]) == (dtype, data.name)]
            if found and dtype not in data.overflow:
                lines.append([data.name, *(pair(found, q) for q in QUANTITIES[:4])])
        yield f"{dtype}: ours / PyTorch, the largest of all norms, layouts and ways", ("data", *QUANTITIES[:4]), lines


def by_norm(rows: Sequence[Row]) -> Table:
    """y of fp32, of the norms one by one."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    lines = []
    for data in DATA:
        found = [r for r in rows if (r["dtype"], r["data"]) == ("fp32", data.name)]
        if found and "fp32" not in data.overflow:
            lines.append([data.name, *(pair([r for r in found if r["norm"] == n], "y") for n in norms)])
    return "y of fp32, norm by norm: ours / PyTorch", ("data", *norms), lines


def by_way(rows: Sequence[Row]) -> Table:
    """The largest errors of each way."""
    lines = [
        [dtype, quantity, *("–" if e is None else number(e) for e in (
            largest([r for r in rows if r["dtype"] == dtype and not judged_by_none(r)], [way], quantity)
            for way in (*WAYS, "torch")
        ))] for dtype in DTYPES for quantity in QUANTITIES[:4]
    ]  # fmt: skip
    return "the largest errors of each way", ("dtype", "result", *WAYS, "PyTorch"), lines


def of_running(rows: Sequence[Row]) -> Table:
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["norm"], row["data"], str(row["momentum"])), []).append(row)
    columns = ("norm", "data", "momentum", *QUANTITIES[4:])
    return "running statistics: ours / PyTorch", columns, [
        [*key, *(pair(found, q) for q in QUANTITIES[4:])] for key, found in lines.items()
    ]  # fmt: skip


def of_overflow(rows: Sequence[Row]) -> Table:
    """What becomes of numbers whose squares overflow."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for row in rows if row["dtype"] in BY_NAME[row["data"]].overflow):
        lines.setdefault((row["norm"], row["dtype"]), []).append(row)
    columns = ("norm", "dtype", *(f"{q}, {way}" for q in ("y", "dx") for way in ("PyTorch", "plain", "kernels")))
    return "numbers whose squares overflow", columns, [
        [*key, *("–" if e is None else number(e) for e in (
            largest(found, who, q) for q in ("y", "dx") for who in (["torch"], ["plain"], schedule.ENGINES)
        ))] for key, found in lines.items()
    ]  # fmt: skip


def tables(rows: Sequence[Row]) -> list[Table]:
    long = [row for row in rows if row["norm"] in [norm.name for norm in LONG]]
    running = [row for row in rows if "momentum" in row]
    short = [row for row in rows if row not in long and row not in running]
    of_long = [[row["norm"], row["data"], *(pair([row], q) for q in QUANTITIES[:4])] for row in long]
    found = [*by_data(short), by_norm([r for r in short if r["dtype"] == "fp32"]), by_way(short), of_running(running)]
    found += [("long groups of fp32: ours / PyTorch", ("norm", "data", *QUANTITIES[:4]), of_long), of_overflow(short)]
    return [table for table in found if table[2]]


def summary(rows: Sequence[Row], interpreter: bool) -> str:
    """How many results there are, how many break the bar, and how many are worse or better than PyTorch's."""
    judged = [
        (row[way][q], row["torch"][q], allowed(row, way, q, interpreter))
        for row in rows for way in WAYS for q in row.get(way, ()) if allowed(row, way, q, interpreter) is not None
    ]  # fmt: skip
    over = sum(not mine <= bar for mine, _, bar in judged if bar is not None)
    strictly = sum(mine <= TWICE * torchs + 1 for mine, torchs, _ in judged)
    better = sum(torchs > 10 * max(mine, 1.0) for mine, torchs, _ in judged)
    return (
        f"{len(judged)} results of {len(rows)} calls, each in every way: {over} break the bar; "
        f"{strictly / max(1, len(judged)):.1%} are within twice PyTorch's error and half a step; PyTorch's error is "
        f"more than ten times ours in {better}."
    )


def section(content: Row) -> str:
    """What stands between the markers of the page."""
    where, rows = content["environment"], content["rows"]
    lines = [
        f"Measured on {where['device']}{', kernels in Triton’s interpreter' if where['interpreter'] else ''}, torch "
        f"{where['torch']}, Triton {where['triton']}. {summary(rows, where['interpreter'])}",
    ]  # fmt: skip
    for title, columns, found in tables(rows):
        lines += ["", f"### {title[0].upper()}{title[1:]}", ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(line)} |" for line in found]
    wrong = [told for row in rows for told in broken(row, where["interpreter"])]
    if wrong:
        lines += ["", "### Broken", "", *(f"- {told}" for told in wrong)]
    return "\n".join(lines)


def print_all(rows: Sequence[Row]) -> None:
    for table in tables(rows):
        print_table(*table)


def write() -> None:
    """The page, from the committed results."""
    content = json.loads(RESULTS.read_text())
    PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), section(content)), encoding="utf-8")
