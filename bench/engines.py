"""Which engine a call takes, by the size of its groups and their number, and what every engine is predicted to take.

Writes engines.json and engines.svg; with ``--baseline`` to bench/results and docs too, where tests hold the rules of
the schedule against them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from normops import functional as F
from normops import schedule
from normops.testing import explain
from normops.testing.predict import calibrated

from .common import ROOT, console, print_table, run_all, save, text
from .counting import LIMIT, compiling
from .evidence import head
from .figures import Row
from .workers import Failed

BASELINE = ROOT / "bench/results/engines.json"
PICTURE = ROOT / "docs/engines.svg"
SIZES = tuple(4**k for k in range(5, 12))
"""Elements of a group."""
GROUPS = (32, 256, 2048, 16384)
LEAST, MOST = 1 << 19, 1 << 27
"""Elements of x: 1 MB to 256 MB in bf16."""
IMAGE, CHANNELS = 32, 4
"""Groups of an image, and channels of a group; of an InstanceNorm they are one."""


class Cell(NamedTuple):
    layout: str
    group: int
    groups: int


def cells() -> list[Cell]:
    return [
        Cell(layout, group, groups)
        for layout in LAYOUTS for group in SIZES for groups in GROUPS if LEAST <= group * groups <= MOST
    ]  # fmt: skip


def leaf(*shape: int, channels_last: bool = False) -> Tensor:
    t = torch.empty(shape, dtype=torch.bfloat16)
    return (t.contiguous(memory_format=torch.channels_last) if channels_last else t).requires_grad_()


def rows(group: int, groups: int) -> Tensor:
    return F.layer_norm(leaf(groups, group), (group,), leaf(group), leaf(group))


def planes(group: int, groups: int) -> Tensor:
    x = leaf(groups // IMAGE, IMAGE, isqrt(group), isqrt(group))
    return F.instance_norm(x, None, None, leaf(IMAGE), leaf(IMAGE), activation="relu")


def images(group: int, groups: int, channels_last: bool = False) -> Tensor:
    side, c = isqrt(group // CHANNELS), IMAGE * CHANNELS
    x = leaf(groups // IMAGE, c, side, side, channels_last=channels_last)
    return F.group_norm(x, IMAGE, leaf(c), leaf(c), activation="silu")


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "LayerNorm, rows": rows,
    "InstanceNorm + ReLU, contiguous": planes,
    "GroupNorm + SiLU, contiguous": images,
    "GroupNorm + SiLU, channels_last": lambda group, groups: images(group, groups, True),
}


def predicted(cell: Cell, device: str) -> list[Row]:
    """The predicted time of each direction by the engine that the schedule chooses, and by each that can be forced."""
    found = explain(lambda: LAYOUTS[cell.layout](cell.group, cell.groups), device, compare=True)
    return [
        {**cell._asdict(), "direction": one.name, "chosen": one.engine,
         "us": {engine: round(us, 2) for engine, us in ((one.engine, one.predicted_us or 0.0), *one.others.items())}}
        for one in found
    ]  # fmt: skip


def regret(row: Row) -> float:
    """How much longer the chosen engine is predicted to take than the fastest, as a share of the latter."""
    return float(row["us"][row["chosen"]] / min(row["us"].values()) - 1)


def engines(device: str, out: Path, baseline: bool = False, processes: int = 0) -> bool:
    """Predict every cell, print where another engine would be faster, draw the map; True if every cell compiled."""
    todo = cells()
    with compiling():
        done = dict(run_all(partial(predicted, device=device), todo, f"compile for {device}", processes, LIMIT))
    failures = [f"{todo[i]}: {a.reason}" for i, a in sorted(done.items()) if isinstance(a, Failed)]
    rows = [row for _, answer in sorted(done.items()) if not isinstance(answer, Failed) for row in answer]
    shared = {name: value for name, value in head(device, "bf16").items() if name != "force"}
    save(out, "engines", shared | {"rows": rows})
    print_regrets(rows)
    paths = [out / "engines.svg"]
    if baseline and not failures:
        BASELINE.write_text(text(shared | {"rows": rows}))
        paths.append(PICTURE)
    for path in paths:
        draw(rows, f"predicted for {shared['title']}, {'' if device in calibrated() else 'un'}calibrated model", path)
        console.print(f"picture: {path}", soft_wrap=True)
    for failure in failures:
        console.print(f"FAILED {failure}", markup=False, style="red")
    return not failures


def print_regrets(rows: Sequence[Row], least: float = 0.05) -> None:
    behind = sorted((row for row in rows if regret(row) > least), key=regret, reverse=True)
    lines = [
        (row["layout"], row["direction"], f"{row['groups']} x {row['group']}", row["chosen"],
         ", ".join(f"{engine} {us:.1f}" for engine, us in row["us"].items()), f"{regret(row):.0%}")
        for row in behind
    ]  # fmt: skip
    title = f"predicted more than {least:.0%} slower than another engine: {len(behind)} of {len(rows)}"
    print_table(title, ("layout", "direction", "groups", "chosen", "us", "slower"), lines)


def panels(rows: Sequence[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    for layout in LAYOUTS:
        for way in ("forward", "backward"):
            yield layout, way, [r for r in rows if (r["layout"], r["direction"]) == (layout, way)]


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """A panel for each layout and direction: the engine of each cell, and by how much its choice wins or loses."""
    import matplotlib  # takes half a second, which only who draws should wait for

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(schedule.ENGINES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    with plt.rc_context({"svg.hashsalt": "normops", "svg.fonttype": "none"}):
        figure, grid = plt.subplots(len(LAYOUTS), 2, figsize=(11, 14), layout="constrained", sharex=True, sharey=True)
        for axes, (layout, way, found) in zip(grid.flat, panels(rows), strict=True):
            for row in found:
                others = [us for engine, us in row["us"].items() if engine != row["chosen"]]
                factor = min(others) / row["us"][row["chosen"]] if others else None
                colour = colours[row["chosen"]]
                axes.scatter(row["group"], row["groups"], s=420, marker="s", color=colour, alpha=0.8)
                told = "only" if factor is None else f"{factor:.2f}"
                axes.annotate(told, (row["group"], row["groups"]), ha="center", va="center", fontsize=6.5)
            axes.set(xscale="log", yscale="log", title=f"{layout}, {way}", xlabel="elements of a group")
            axes.set_ylabel("groups")
            axes.margins(0.12)
        handles = [plt.Line2D([], [], color=c, marker="s", linestyle="", label=e) for e, c in colours.items()]
        grid[0, 0].legend(handles=handles, fontsize=8, loc="upper right")
        figure.suptitle(f"engine chosen, and how many times as long the best other one takes ({title})", fontsize=10)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
