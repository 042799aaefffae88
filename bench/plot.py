"""One picture of the evidence in a folder: bench.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .common import load

COLOURS = {"bf16": "tab:blue", "fp16": "tab:orange", "fp32": "tab:green", "fp64": "tab:red"}


def plot_errors(axes: plt.Axes, rows: list[dict]) -> None:
    labels = list(dict.fromkeys((row["case"], row["format"]) for row in rows))
    place = {label: i for i, label in enumerate(labels)}
    for dtype, colour in COLOURS.items():
        points = [r for r in rows if r["dtype"] == dtype and r["share"] is not None]
        y = [place[r["case"], r["format"]] for r in points]
        axes.scatter([max(r["share"], 1e-4) for r in points], y, s=14, color=colour, label=dtype, alpha=0.8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="largest error / bound", title="error against float64, forward and backward")
    short = {"contiguous": "", "channels_last": " · cl", "channels_last_3d": " · cl3d"}
    axes.set_yticks(range(len(labels)), [case + short[form] for case, form in labels], fontsize=6)
    axes.set_ylim(len(labels), -1)
    axes.legend(loc="lower left", fontsize=7)


def plot_losses(axes: plt.Axes, rows: list[dict]) -> None:
    for row, colour in zip(rows, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        axes.plot(row["torch"], color=colour, linewidth=4, alpha=0.3, label=f"{row['model']}, torch.nn")
        if "normops" in row:
            axes.plot(row["normops"], color=colour, linewidth=1, marker=".", label=f"{row['model']}, normops.nn")
    axes.set(yscale="log", xlabel="step", ylabel="loss", title="training on digits, same seed")
    axes.legend(fontsize=7)


MARKERS = {"normops": "o", "torch": "x", "torch.compile": "+"}


def plot_times(axes: plt.Axes, rows: list[dict]) -> None:
    rows = [row for row in rows if row["ok"]]
    labels = list(dict.fromkeys((row["case"], row["format"], row["dtype"], row["direction"]) for row in rows))
    place = {label: i for i, label in enumerate(labels)}
    for provider in dict.fromkeys((*MARKERS, *sorted(row["provider"] for row in rows))):
        points = [row for row in rows if row["provider"] == provider]
        y = [place[r["case"], r["format"], r["dtype"], r["direction"]] for r in points]
        x = [r["us"] / r["floor_us"] for r in points]
        ends = [[(r["us"] - r["us_low"]) / r["floor_us"] for r in points],
                [(r["us_high"] - r["us"]) / r["floor_us"] for r in points]]  # fmt: skip
        marker = MARKERS.get(provider, ".")
        axes.errorbar(x, y, xerr=ends, fmt=marker, markersize=4, linewidth=0.8, label=provider)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="time / copy floor (median, quartiles)", title="time")
    axes.set_yticks(range(len(labels)), [" · ".join(label) for label in labels], fontsize=4)
    axes.set_ylim(len(labels), -1)
    axes.legend(fontsize=7)


def plot_run(rows: list[dict], title: str, path: Path) -> None:
    """Times of a run as SVG: the same bytes from the same rows."""
    rows = [row for row in rows if row["direction"] != "both"]
    lines = {(row["case"], row["format"], row["dtype"], row["direction"]) for row in rows}
    with plt.rc_context({"svg.hashsalt": "normops"}):
        figure, axes = plt.subplots(figsize=(8, 1.5 + 0.09 * len(lines)), layout="constrained")
        plot_times(axes, rows)
        axes.set_title(title, fontsize=7)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def plot(out: Path) -> Path | None:
    """Draw what the folder has; None if that is nothing."""
    drawers = {"verify": plot_errors, "train": plot_losses, "timing": plot_times}
    found = {name: content for name in drawers if (content := load(out, name))}
    if not found:
        return None
    # One commit and one device: an older file of another machine would lend its numbers to this picture.
    newest = max((content["environment"] for content in found.values()), key=lambda e: e["date"])
    same = ("commit", "device", "interpreter")
    found = {n: c for n, c in found.items() if all(c["environment"][k] == newest[k] for k in same)}
    verified = "verified in Triton's CPU interpreter" if newest["interpreter"] else f"verified on {newest['device']}"
    titles = [verified] if "verify" in found else []
    if "timing" not in found:
        titles.append("nothing timed")
    figure, panels = plt.subplots(1, len(found), figsize=(6.5 * len(found), 10), squeeze=False, layout="constrained")
    for axes, (name, content) in zip(panels[0], found.items(), strict=True):
        drawers[name](axes, content["rows"])
    versions = f"torch {newest['torch']}, triton {newest['triton']}, {newest['date'][:10]}"
    figure.suptitle(f"normops: {', '.join(titles)}\n{versions}")
    path = out / "bench.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
