"""Figures of a call that was compiled but not run: from its plan, its launches and facts of the device.

Their names and meanings are listed in bench/schema.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from normops import cost, schedule
from normops.plan import Launch
from normops.testing import Hardware, VirtualLaunch

SCHEMA = 1
OVER_FLOOR, IDLE, LARGE = 1.05, 0.1, 4e6
"""From where on a call counts as wasteful: bytes by floor, share of idle SMs, and how many bytes x must have for it."""
Row = dict[str, Any]


def tile(planned: Launch) -> dict[str, int]:
    return {name.removeprefix("BLOCK_"): n for name, n in planned.constants.items() if name.startswith("BLOCK_")}


def points(planned: Launch) -> int:
    """Elements of x in one tile: no more along an axis than x has."""
    given, block = planned.given, tile(planned)
    m, c, a, s = (prod(n or given["N0"] for n in sizes) for sizes in given["SPACE"])
    extents = {"K": m if given["ALONG_M"] else c, "A": a, "S": s}
    return prod(min(block[axis], extent) for axis, extent in extents.items())


def allowed_bits(layout: Any, itemsize: int) -> int:
    """The widest access that every tile of x allows: what the innermost run in memory, and steps to its next piece,
    divide by, up to 128 bits."""
    return 8 * itemsize * schedule.vector(layout, itemsize)


def wide_share(accesses: Mapping[tuple[str, int], int], kind: str) -> float | None:
    """Share of 128-bit (or wider) accesses among the instructions of a kind; None where there are none."""
    counts = {bits: n for (k, bits), n in accesses.items() if k == kind}
    total = sum(counts.values())
    return round(sum(n for bits, n in counts.items() if bits >= 128) / total, 3) if total else None


def narrowest(launch: VirtualLaunch, pointers: Iterable[str]) -> int | None:
    """Bits of the narrowest access through the pointers named; None where no access can be told to be theirs."""
    try:
        found = [bits for pointer in pointers for _, bits in launch.accesses(pointer)]
    except NotImplementedError:  # no way to tell on this device
        return None
    return min(found, default=None)


def describe_launch(
    launch: VirtualLaunch, planned: Launch, moved: Mapping[str, cost.Moved], itemsizes: Mapping[str, int], sms: int
) -> Row:
    """One launch; `moved`: operand -> bytes as ``cost.traffic`` counts them."""
    streams = {pointer: name for pointer, name in planned.operands.items() if name in cost.STREAMS and name in moved}
    grid = prod(launch.grid)
    row = {
        "kernel": launch.name, "grid": grid, "tile": tile(planned), "warps": launch.num_warps,
        "registers": launch.registers, "spills": launch.spills, "stack": launch.stack, "shared": launch.shared,
        "resident": launch.resident, "waves": round(launch.waves, 3), "idle": round(max(0.0, 1 - grid / sms), 3),
    }  # fmt: skip
    accesses = launch.accesses()
    row |= {
        "moved_bytes": sum(map(sum, moved.values())),
        "wide_loads": wide_share(accesses, "load"), "wide_stores": wide_share(accesses, "store"),
        "narrowest_bits": narrowest(launch, streams) if streams else None,
        "barriers": launch.barriers, "atomics": launch.atomics, "streams": bool(streams), "in_flight_bytes": None,
    }  # fmt: skip
    if streams:
        loaded = sum(itemsizes[name] for name in streams.values() if moved[name].loads)
        row["in_flight_bytes"] = min(launch.resident, -(-grid // sms)) * points(planned) * loaded
    return row


def describe_call(key: Row, planned: Any, launches: Sequence[VirtualLaunch], hardware: Hardware) -> Row:
    """One direction of one call: `key` names it, `planned` is its entry in ``testing.plans()``."""
    plan, itemsizes = planned.plan, planned.itemsizes
    names = [launch.kernel.__name__ for launch in plan.launches]
    if names != [launch.name for launch in launches]:
        raise RuntimeError(f"the plan launches {names}, the device saw {[launch.name for launch in launches]}")
    hbm = cost.hbm(plan, itemsizes, hardware.l2_window)
    floor = cost.floor(plan, itemsizes)
    described = [
        describe_launch(launch, entry, moved, itemsizes, hardware.facts.num_sms)
        for launch, entry, moved in zip(launches, plan.launches, cost.traffic(plan, itemsizes), strict=True)
    ]
    seconds = hbm.bytes / hardware.copy_bandwidth + len(launches) * hardware.launch_floor
    return key | {
        "pattern": plan.layout.pattern, "engine": plan.engine, "x_bytes": plan.layout.numel * itemsizes["x"],
        "workspace_bytes": sum(elements * itemsizes[name] for name, elements in plan.workspace if elements),
        "hbm_bytes": hbm.bytes, "floor_bytes": floor, "over_floor": round(hbm.bytes / max(floor, 1), 3),
        "l2_bytes": hbm.cached, "l2_window_bytes": hbm.window,
        "predicted_us": round(seconds * 1e6, 2),
        "allowed_bits": allowed_bits(plan.streamed, itemsizes["x"]), "launches": described,
    }  # fmt: skip


def streaming(row: Row) -> list[Row]:
    """Launches that touch operands of the size of x."""
    return [launch for launch in row["launches"] if launch["streams"]]


def worst(row: Row) -> Row:
    """One number per figure for the whole call: the worst launch's."""
    streams = streaming(row)
    widths = [launch["narrowest_bits"] for launch in streams if launch["narrowest_bits"] is not None]
    return {
        "registers": max((launch["registers"] for launch in row["launches"]), default=0),
        "spills": max((launch["spills"] for launch in row["launches"]), default=0),
        "narrowest_bits": min(widths, default=None),
        "waves": min((launch["waves"] for launch in streams), default=0.0),
        "idle": max((launch["idle"] for launch in streams), default=0.0),
        "in_flight_bytes": min((launch["in_flight_bytes"] for launch in streams), default=0),
    }


def problems(row: Row) -> list[str]:
    """Which of "spills", "over floor", "narrow", "idle" a call has."""
    figures = worst(row)
    found = {
        "spills": figures["spills"] > 0,
        "over floor": row["over_floor"] > OVER_FLOOR,
        "narrow": (figures["narrowest_bits"] or 128) < row["allowed_bits"],
        "idle": figures["idle"] > IDLE and row["x_bytes"] > LARGE,
    }
    return [name for name, is_so in found.items() if is_so]


def summary(rows: Sequence[Row]) -> Row:
    """Counts over all calls: by engine, and of each problem."""
    counts = Counter(problem for row in rows for problem in problems(row))
    return {
        "calls": len(rows), "engines": dict(sorted(Counter(row["engine"] for row in rows).items())),
        "spills": counts["spills"], "over_floor": counts["over floor"], "narrow": counts["narrow"],
        "idle": counts["idle"],
    }  # fmt: skip
