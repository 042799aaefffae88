"""The table of ``python -m bench evidence``: one line a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normops.testing import Hardware
from normops.testing.predict import calibrated

from .cases import CASES
from .common import console, print_table
from .figures import IDLE, LARGE, OVER_FLOOR, Row, problems, summary, worst

COLUMNS = (
    "case", "call", "engine", "n", "bytes", "win", "regs", "bits", "idle", "KB", "instr", "mufu", "rounds", "bars",
    "pred us", "of floor", "bound",
)  # fmt: skip
CALLS = {"forward": "fwd", "backward": "bwd"}
FORMATS = {"contiguous": "", "channels_last": " cl", "channels_last_3d": " cl"}
LEGEND = (
    "cl: channels_last. n: launches. bytes: to and from DRAM / the least possible; win: MB that must stay in L2 for "
    "it. regs: of a thread, + bytes spilled. bits: narrowest access to tensors of x's size, and / what the shape "
    "allows where that is more. idle (SMs without a program), KB under way at once per SM: of launches that touch such "
    "tensors. instr, mufu: instructions executed for each element of x, and special functions among them. rounds: of "
    "loads that a program waits for one after the other; bars: barriers of a program; of the worst launch. pred us: "
    "predicted, not measured; of floor: the share of it that copying the least bytes would take; bound: what holds the "
    "call for most of its time."
)


def megabytes(n: int) -> str:
    return f"{n / 1e6:.1f}" if n else ""


def number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def cells(row: Row) -> list[str]:
    """The figures of a call, as they are printed; what is a problem in red."""
    figures, wrong = worst(row), problems(row)

    def mark(text: str, problem: str) -> str:
        return f"[red]{text}" if problem in wrong else text

    bits = "?" if figures["narrowest_bits"] is None else str(figures["narrowest_bits"])
    if "narrow" in wrong:
        bits += f"/{row['allowed_bits']}"
    return [
        CALLS[row["direction"]] + FORMATS[row["format"]], row["engine"], str(len(row["launches"])),
        mark(f"{row['over_floor']:.2f}", "over floor"), megabytes(row["l2_window_bytes"]),
        mark(f"{figures['registers']}" + f"+{figures['spills']}" * bool(figures["spills"]), "spills"),
        mark(bits, "narrow"),
        mark(f"{figures['idle']:.0%}" if figures["idle"] else "", "idle"),
        f"{figures['in_flight_bytes'] / 1e3:.0f}", number(row["instructions_per_element"], 1),
        number(row["mufu_per_element"], 1), number(row["rounds"], 0), number(row["barriers"], 0),
        number(row["predicted_us"], 1), number(row["of_floor"], 2), row["bound"] or "?",
    ]  # fmt: skip


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cases of one norm together, under its name; a case is named once."""
    norms = {case.name: case.norm for case in CASES}
    order = list(dict.fromkeys(norms.values()))
    found: list[list[str]] = []
    norm = case = None
    for row in sorted(rows, key=lambda row: order.index(norms[row["case"]])):
        if norms[row["case"]] != norm:
            norm = norms[row["case"]]
            found.append([f"[bold]{norm}", *[""] * (len(COLUMNS) - 1)])
        found.append([row["case"] if row["case"] != case else "", *cells(row)])
        case = row["case"]
    return found


def sentence(counts: dict[str, Any]) -> str:
    engines = ", ".join(f"{n} {engine}" for engine, n in counts["engines"].items())
    return (
        f"{counts['calls']} calls ({engines}): {counts['spills']} spill, {counts['over_floor']} move over "
        f"{OVER_FLOOR} x floor, {counts['narrow']} have accesses narrower than their shape allows, {counts['idle']} "
        f"leave over {IDLE:.0%} of the SMs idle with x above {LARGE / 1e6:.0f} MB."
    )


def print_calls(rows: Sequence[Row], hardware: Hardware, dtype: str, force: Mapping[str, Any]) -> None:
    forced = f", forced: {', '.join(f'{name}={value}' for name, value in force.items())}" if force else ""
    title = f"{hardware.title}, {dtype}: compiled, not run{forced}"
    print_table(title, COLUMNS, lines(rows))
    console.print(LEGEND, markup=False, highlight=False)
    console.print(basis(hardware), markup=False, highlight=False)
    console.print(sentence(summary(rows)), markup=False, highlight=False, style="bold")


def basis(hardware: Hardware) -> str:
    """Where predicted times and the floor come from."""
    known = calibrated()
    model = "none, machine code is read for NVIDIA GPUs only" if hardware.target.backend != "cuda" else (
        f"model calibrated on {known[hardware.name]['source']}" if hardware.name in known else
        f"uncalibrated: the model of another device with the clock, SMs and bandwidth of {hardware.title}"
    )  # fmt: skip
    return (
        f"Predicted times: {model}. Floor: {hardware.copy_start * 1e6:.1f} us ({hardware.copy_start_source}) + bytes / "
        f"{hardware.copy_bandwidth / 1e12:.2f} TB/s ({hardware.bandwidth_source})."
    )


def print_variants(rows: Sequence[Row], variants: Mapping[str, int]) -> None:
    """How often Triton compiles for all these calls, by kernel."""
    launches, each = sum(len(row["launches"]) for row in rows), ", ".join(f"{n} {k}" for k, n in variants.items())
    console.print(
        f"{sum(variants.values())} compiled variants for {launches} launches of {len(rows)} calls: {each}.",
        markup=False, highlight=False,
    )  # fmt: skip
