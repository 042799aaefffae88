"""``python -m bench report``: committed results of GPU runs as the README's table and as pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import records, workers
from .console import console
from .gpu import FIRST

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- results -->", "<!-- /results -->"
NOTHING = "Not measured yet: no run of `python -m bench gpu` is committed, so this page makes no claim about speed."
OWN, BASELINES = "normops", ("torch", "torch.compile")
DIRECTIONS = ("forward", "backward")
LEGEND = (
    "Of copy floor: the time of a copy of the bytes that a fused call must move, over the time of the call. Others: "
    "their time over that of normops. –: it does not do the call, or was not there. ✗: it failed, or its results were "
    "out of their bound. A star: not captured in a CUDA graph, so the time may be the host's."
)
Content = dict[str, Any]
Row = dict[str, Any]
Call = tuple[str, str, str]
"""Case, memory format, dtype."""


def latest(runs: Sequence[Content]) -> dict[str, list[Content]]:
    """For each GPU the runs of its newest commit: numbers of two commits never stand side by side."""
    found: dict[str, list[Content]] = {}
    for run in runs:
        where = run["environment"]
        kept = found.setdefault(where["device"], [])
        if kept and kept[0]["environment"]["commit"] != where["commit"]:
            kept.clear()
        kept.append(run)
    return found


def timed(runs: Sequence[Content]) -> list[Row]:
    """Rows with times; of a call that was timed in several runs the newest."""
    rows = {}
    for run in runs:
        for row in run.get("timing", []):
            if row["ok"]:
                key = (row["case"], row["format"], row["dtype"], row["provider"], row["direction"])
                rows[key] = row
    return list(rows.values())


def key_of(row: Row) -> Call:
    return row["case"], row["format"], row["dtype"]


def calls(rows: Sequence[Row]) -> dict[Call, dict[tuple[str, str], Row]]:
    """(case, format, dtype) -> (direction, provider) -> row; the most telling cases first."""
    place = {name: i for i, name in enumerate(FIRST)}
    found: dict[Call, dict[tuple[str, str], Row]] = {}
    for row in sorted(rows, key=lambda row: place.get(row["case"], len(place))):
        found.setdefault(key_of(row), {})[row["direction"], row["provider"]] = row
    return found


def failures(runs: Sequence[Content]) -> dict[Call, dict[str, str]]:
    """call -> provider ("any": all of them) -> the first line of why it failed; not where another run timed it."""
    good = {(key_of(row), row["provider"]) for row in timed(runs)}
    found: dict[Call, dict[str, str]] = {}
    for row in (row for run in runs for row in run.get("timing", []) if "error" in row):
        if row["error"] != workers.CUT_OFF and (key_of(row), row["provider"]) not in good:
            found.setdefault(key_of(row), {})[row["provider"]] = row["error"].splitlines()[0][:200]
    return found


def ratio(call: dict[tuple[str, str], Row], direction: str, provider: str) -> str:
    other = call.get((direction, provider))
    if other is None:
        return "–"
    host = "" if other["graph"] else "*"
    return f"{other['us'] / call[direction, OWN]['us']:.2f}×{host}"


def best(call: dict[tuple[str, str], Row], direction: str) -> str:
    """The fastest library beside PyTorch."""
    others = [r for (d, p), r in call.items() if d == direction and p not in (OWN, *BASELINES) and r["graph"]]
    if not others:
        return "–"
    fastest = min(others, key=lambda row: row["us"])
    return f"{ratio(call, direction, fastest['provider'])} {fastest['provider']}"


def table(rows: Sequence[Row], failed: dict[Call, dict[str, str]]) -> list[str]:
    lines = [
        "| case | format | dtype | direction | µs (quartiles) | of copy floor | torch | torch.compile | best other |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (case, memory_format, dtype), call in calls(rows).items():
        for direction in DIRECTIONS:
            mine = call.get((direction, OWN))
            if mine is not None:
                bad = failed.get((case, memory_format, dtype), {})
                others = ("✗" if name in bad else ratio(call, direction, name) for name in BASELINES)
                time = f"{mine['us']:.1f} ({mine['us_low']:.1f}–{mine['us_high']:.1f})"
                cells = (case, memory_format, dtype, direction, time, f"{mine['of_floor']:.0%}", *others)
                lines.append(f"| {' | '.join((*cells, best(call, direction)))} |")
    return lines


def describe(device: str, runs: Sequence[Content]) -> str:
    where, machine = runs[-1]["environment"], runs[-1]["machine"] or {}
    commit = (where["commit"] or "unknown")[:7] + (" with changes" if where["dirty"] else "")
    driver = f", driver {machine['driver_version']}" if "driver_version" in machine else ""
    return f"{device}{driver}, torch {where['torch']}, Triton {where['triton']}, {where['date'][:10]}, commit {commit}"


def states(runs: Sequence[Content]) -> str:
    """What was checked in the same runs, and what there was no time for."""
    verified = [r for run in runs for r in run.get("verify", []) if r["provider"] == OWN]
    repeated = [r for run in runs for r in run.get("repeats", [])]
    finished = [r for r in repeated if "error" not in r]
    left = {name for run in runs for name in run["not_run"].get("timing", [])}
    left |= {", ".join(key_of(r)) for run in runs for r in run["timing"] if r.get("error") == workers.CUT_OFF}
    done = {key_of(row) for row in timed(runs) if row["provider"] == OWN}
    lost = [key for key, bad in failures(runs).items() if key not in done and bad.keys() & {OWN, "any"}]
    left -= {", ".join(key) for key in (*done, *lost)}
    parts = [f"{sum(r['ok'] for r in verified)} of {len(verified)} calls within their bounds of float64",
             f"{sum(r['ok'] for r in finished)} of {len(finished)} with the same bits on every run",
             f"{len(done)} timed"]  # fmt: skip
    if lost:
        parts.append(f"{len(lost)} failed")
    if left:
        parts.append(f"no time for {len(left)}")
    return "; ".join(parts)


def notes(runs: Sequence[Content]) -> list[str]:
    """What those who made the runs say of them."""
    return [f"Note: {run['environment']['note']}\n" for run in runs if run["environment"].get("note")]


def page(device: str, runs: Sequence[Content]) -> str:
    """Everything that was timed on a GPU, and what was not for a failure."""
    failed = failures(runs)
    lines = [f"# {describe(device, runs)}", "", f"{states(runs)}.", "", *notes(runs), *table(timed(runs), failed), ""]
    lines += [LEGEND, f"\n![times of every provider over the copy floor]({records.slug(device)}.svg)\n"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, bad in failed.items():
        for provider, why in bad.items():
            reasons.setdefault((provider, why), []).append(", ".join(key))
    if reasons:
        lines += ["## Failed", "", "`any` stands for all providers of a call.", ""]
        lines += [f"- **{provider}**: {'; '.join(where)}: `{why}`" for (provider, why), where in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"


def section(runs: Sequence[Content], names: Sequence[str] = FIRST) -> str:
    """What stands between the markers."""
    found = {device: group for device, group in latest(runs).items() if timed(group)}
    if not found:
        return NOTHING
    lines = []
    for device, group in found.items():
        rows = [row for row in timed(group) if row["case"] in names]
        more = f"[All of it, and what failed](bench/results/{records.slug(device)}.md)."
        lines += [f"**{describe(device, group)}.** {states(group)}. {more}", "", *notes(group)]
        lines += [*table(rows, failures(group)), ""]
    return "\n".join([*lines, LEGEND, "What is in the files: [bench/results](bench/results/README.md)."])


def placed(text: str, content: str) -> str:
    """The README with its section replaced.  Raises ValueError where it has no markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the README must hold {START} and {END}")
    return f"{before}{START}\n{content}\n{END}{after}"


def report(folder: Path, readme: Path) -> bool:
    """Write the section and the pictures; True if anything changed in the README."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    runs = records.read(folder)
    old = readme.read_text(encoding="utf-8")
    new = placed(old, section(runs))
    if new != old:
        readme.write_text(new, encoding="utf-8")
    for device, group in latest(runs).items():
        rows = timed(group)
        if rows:
            from .plot import plot_run

            title = describe(device, group)
            plot_run(rows, title, folder / f"{records.slug(device)}.svg")
            (folder / f"{records.slug(device)}.md").write_text(page(device, group), encoding="utf-8")
    return new != old


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench report", description="The README's table from committed results.")
    parser.add_argument("--results", type=Path, default=records.FOLDER, help="folder of results files")
    parser.add_argument("--readme", type=Path, default=README)
    given = parser.parse_args(arguments)
    try:
        changed = report(given.results, given.readme)
    except (OSError, ValueError) as error:
        print(f"python -m bench report: {error}", file=sys.stderr)
        return 2
    console.print(f"{given.readme}: {'written' if changed else 'unchanged'}", markup=False, soft_wrap=True)
    return 0
