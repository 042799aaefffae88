"""The picture of ``python -m bench evidence``: bytes, instructions, and the predicted share of the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from .figures import OVER_FLOOR, Row, worst

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")
MANY = 60
"""Instructions an element from which on a call is named."""
MARKERS = {"forward": "o", "backward": "s"}


def _scatter(axes: plt.Axes, rows: Sequence[Row], heights: Sequence[float], colours: dict[str, str]) -> None:
    for row, y in zip(rows, heights, strict=True):
        spilled = worst(row)["spills"] > 0
        axes.scatter(
            row["x_bytes"], y, s=34, marker=MARKERS[row["direction"]], color=colours[row["engine"]], alpha=0.75,
            edgecolors="red" if spilled else "white", linewidths=1.8 if spilled else 0.4, zorder=3 if spilled else 2,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="bytes of x")
    axes.grid(alpha=0.25)


def _name(axes: plt.Axes, rows: Sequence[Row], heights: Sequence[float], least: float, most: int = 8) -> None:
    """Names of the highest points, as far as there is room: one line for each height."""
    room = (max(heights) - min(heights)) / 30
    named: dict[str, float] = {}
    for row, y in sorted(zip(rows, heights, strict=True), key=lambda pair: -pair[1]):
        clear = row["case"] not in named and all(abs(y - other) > room for other in named.values())
        if clear and len(named) < most and y > least:
            named[row["case"]] = y
            axes.annotate(
                row["case"], (row["x_bytes"], y), (-6, -2), textcoords="offset points", fontsize=7, ha="right"
            )


def plot(rows: Sequence[Row], shared: Row, out: Path) -> Path:
    """Write evidence.png; `shared` is what the rows have in common (device, names)."""
    colours = dict(zip(sorted({row["engine"] for row in rows}), COLOURS, strict=False))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(18, 5.5), layout="constrained")
    over = [row["over_floor"] for row in rows]
    _scatter(left, rows, over, colours)
    _name(left, rows, over, OVER_FLOOR)
    left.axhline(1, color="black", linewidth=1)
    left.set(ylabel="bytes to and from DRAM / least possible", title="traffic (1 = nothing moves twice)")
    if known := [row for row in rows if row["predicted_us"] is not None]:
        executed = [row["instructions_per_element"] for row in known]
        _scatter(middle, known, executed, colours)
        _name(middle, known, executed, MANY)
        middle.set(yscale="log", ylabel="instructions for each element of x", title="executed instructions")
        _scatter(right, known, [row["of_floor"] for row in known], colours)
        right.axhline(1, color="black", linewidth=1)
    right.set(ylim=(0, 1.15), ylabel="floor / predicted time", title="predicted share of the copy floor, not measured")
    handles = [Line2D([], [], color=c, marker="o", linestyle="", label=engine) for engine, c in colours.items()]
    handles += [Line2D([], [], color="grey", marker=m, linestyle="", label=d) for d, m in MARKERS.items()]
    ring = {"marker": "o", "linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.8}
    handles.append(Line2D([], [], color="red", label="spills", **ring))
    left.legend(handles=handles, fontsize=8)
    model = "calibrated" if shared["calibrated"] else "uncalibrated"
    figure.suptitle(f"normops {shared['dtype']}, compiled for {shared['title']}, not run; {model} model", fontsize=9)
    path = out / "evidence.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
