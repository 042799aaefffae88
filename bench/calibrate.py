"""``python -m bench calibrate``: fits the model of times to measured points, and says how far off it is.

Points are rows of files in bench/results: a time that was measured, and what the launches behind it executed and
moved (``bench gpu`` and ``bench time`` store it beside each time, so that a fit needs no old kernels).
The fit minimises the mean of |log(predicted / measured)|, cut at 0.8, by Nelder and Mead's method from several starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from normops import testing
from normops.testing.explain import ENGINES
from normops.testing.predict import CALIBRATED, Model, calibrated, model_of

from .common import console, print_table, progress_bar
from .figures import Row, demand

FOLDER = Path(__file__).parent / "results"
FOLDS, CUT, ROUNDS, EVALUATIONS = 8, 0.8, 3, 2500
RANGES = {
    "call": (0, 3), "launch": (0.3, 3), "mufu": (4, 16), "wavefront": (2, 8), "dram": (0.95, 1.05), "l2": (1, 5),
    "sm_bytes": (20, 80), "round": (0.2, 1.2), "near_round": (0.1, 0.8), "atomic_round": (0.2, 2), "barrier": (0, 250),
    "cycle": (0.5, 3), "sharpness": (1, 8), "wait": (0, 4), "further": (0, 2), "ticket": (0, 0.006),
}  # fmt: skip
"""What a parameter may be: times its hardware allows (8 cycles of a quarter of an SM for 32 special functions, ...)."""
LOW, HIGH = (np.array([RANGES[field.name][i] for field in fields(Model)], float) for i in (0, 1))
SIZES = ((0, "below 8 MB"), (8e6, "8 to 64 MB"), (64e6, "64 MB and more"))


@dataclass(frozen=True)
class Points:
    """Measured calls of one device: launches side by side in arrays, `call` says whose each is."""

    rows: Sequence[Row]
    us: Any
    call: Any
    demands: testing.Demand

    def of(self, model: Model, hardware: testing.Hardware) -> Any:
        """Predicted microseconds of each call."""
        with np.errstate(over="ignore"):
            each = model.launch_times(self.demands, hardware)["us"]
        return model.call + np.bincount(self.call, weights=each, minlength=len(self.rows))


def gathered(rows: Sequence[Row]) -> Points:
    launches = [(i, launch) for i, row in enumerate(rows) for launch in row["launches"]]
    arrays = zip(*(demand(launch) for _, launch in launches), strict=True)
    return Points(
        rows, np.array([row["us"] for row in rows]), np.array([i for i, _ in launches]),
        testing.Demand(*(np.array(values, float) for values in arrays)),
    )  # fmt: skip


def read_points(device: str, folder: Path = FOLDER) -> tuple[list[Row], list[str]]:
    """Rows that were measured on a device, of all files of results that hold what their launches execute; the files."""
    rows, names = [], []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        kind = "rows" if content.get("kind") == "points" else "timing"
        found = [row for row in content.get(kind, ()) if measured_on(device, content, row)]
        if found:
            rows += found
            names.append(path.name)
    return rows, names


def measured_on(device: str, content: Row, row: Row) -> bool:
    """Whether the row is a point of this device; rows of engines that are gone stay in files, and are left out."""
    named = content.get("machine", {}).get("name", "") if isinstance(content.get("machine"), dict) else ""
    same = testing.hardware_of(named) == device and row.get("engine") in ENGINES
    return same and bool(row.get("us")) and bool(row.get("launches")) and row.get("direction") != "both"


def model_from(u: Any) -> Model:
    inside = LOW + (HIGH - LOW) / (1 + np.exp(-np.clip(u, -30, 30)))
    return Model(*(float(f"{v:.4g}") for v in inside)) if np.ndim(u) else Model(*inside)


def fit(points: Points, hardware: testing.Hardware, start: Model, kept: Any = None) -> Model:
    """The model that fits best; `kept`: which calls count."""
    kept = np.ones(len(points.rows), bool) if kept is None else kept
    inside = np.clip((np.array(list(asdict(start).values())) - LOW) / (HIGH - LOW), 0.02, 0.98)

    def loss(u: Any) -> float:
        model = Model(*(LOW + (HIGH - LOW) / (1 + np.exp(-np.clip(u, -30, 30)))))
        return float(np.minimum(np.abs(np.log(points.of(model, hardware) / points.us))[kept], CUT).mean())

    u = np.log(inside / (1 - inside))
    for _ in range(ROUNDS):
        u = minimize(loss, u, method="Nelder-Mead",
                     options={"maxiter": EVALUATIONS, "maxfev": EVALUATIONS, "adaptive": True}).x  # fmt: skip
    return model_from(u)


def unseen(points: Points, hardware: testing.Hardware, start: Model, each: Callable[[], None]) -> Any:
    """Predictions of calls that the model was not fitted to: each share of the cases by a fit to the others."""
    cases = sorted({row["case"] for row in points.rows})
    fold = np.array([cases.index(row["case"]) % FOLDS for row in points.rows])
    found = np.zeros(len(points.rows))
    for k in range(FOLDS):
        model = fit(points, hardware, start, fold != k)
        found[fold == k] = points.of(model, hardware)[fold == k]
        each()
    return found


def kinds(row: Row) -> Iterator[tuple[str, str]]:
    yield "all", "all"
    yield "engine", row["engine"]
    yield "direction", row["direction"]
    size = row.get("x_bytes") or 0
    yield "size of x", next(name for least, name in reversed(SIZES) if size >= least)


def error_table(rows: Sequence[Row], errors: dict[str, Any]) -> list[list[str]]:
    """Median, nine of ten, and share within 35 %, by kind; `errors`: name of a column -> relative errors."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        for kind in kinds(row):
            groups.setdefault(kind, []).append(i)
    order = ["all", "engine", "direction", "size of x"]
    lines = []
    for (kind, name), members in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        line = [kind if kind != name else "", name, str(len(members))]
        for values in errors.values():
            mine = values[members]
            line += [f"{np.median(mine):.1%}", f"{np.quantile(mine, 0.9):.1%}", f"{(mine <= 0.35).mean():.0%}"]
        lines.append(line)
    return lines


def calibrate(device: str, write: bool = False) -> bool:
    """Fit, print the parameters and errors; `write`: keep them.  False where there are no points."""
    hardware = testing.HARDWARE[device]
    rows, files = read_points(device)
    if not rows:
        console.print(f"no file in {FOLDER} holds points that were measured on {hardware.title}", markup=False)
        return False
    points = gathered(rows)
    console.print(f"{len(rows)} points of {', '.join(files)}, in {FOLDS + 1} fits", markup=False)
    start, _ = model_of(device)
    with progress_bar() as progress:
        bar = progress.add_task("fit", total=FOLDS + 1)
        model = fit(points, hardware, start)
        progress.advance(bar)
        apart = unseen(points, hardware, model, lambda: progress.advance(bar))
    errors = {"fitted": np.abs(points.of(model, hardware) / points.us - 1), "unseen": np.abs(apart / points.us - 1)}
    columns = ("by", "kind", "calls", "median", "9 of 10", "in 35 %", "unseen: median", "9 of 10", "in 35 %")
    print_table("Errors; unseen: of cases that the model was not fitted to", columns, error_table(rows, errors))
    named = zip(asdict(model).items(), RANGES.values(), strict=True)
    print_table("Parameters", ("name", "value", "range"), [[n, f"{v:.4g}", f"{low} to {high}"] for (n, v), (low, high)
                                                          in named])  # fmt: skip
    seen, others = errors["fitted"], errors["unseen"]
    source = (
        f"{len(rows)} calls of {', '.join(files)}; median error {np.median(seen):.1%}, of cases "
        f"left out of the fit {np.median(others):.1%} (nine of ten within {np.quantile(others, 0.9):.0%})"
    )
    console.print(source, markup=False)
    if write:
        content = dict(calibrated()) | {device: {"source": source, "parameters": asdict(model)}}
        CALIBRATED.write_text(json.dumps(content, indent=1) + "\n")
        console.print(f"written: {CALIBRATED.name}", markup=False)
    return True
