"""Figures of a call that was compiled but not run: from its plan, its machine code and facts of the device.

Their names and meanings are listed in bench/schema.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import inf, prod
from typing import Any

from normops.kernels.norm import elements
from normops.plan import Launch
from normops.testing import Demand, Hardware, Time, VirtualLaunch, cost
from normops.testing.explain import direction, phase_of
from normops.tile import vector

SCHEMA = 2
OVER_FLOOR, IDLE, LARGE = 1.05, 0.1, 4e6
"""From where on a call counts as wasteful: bytes by floor, share of idle SMs, and how many bytes x must have for it."""
Row = dict[str, Any]


def allowed_bits(layout: Any, itemsize: int) -> int:
    """The widest access that every tile of x allows: what the innermost run in memory, and steps to its next piece,
    divide by, up to 128 bits."""
    return 8 * itemsize * vector(layout, itemsize)


def wide_share(accesses: Mapping[tuple[str, int], int], kind: str) -> float | None:
    """Share of 128-bit (or wider) accesses among the instructions of a kind; None where there are none."""
    counts = {bits: n for (k, bits), n in accesses.items() if k == kind}
    total = sum(counts.values())
    return round(sum(n for bits, n in counts.items() if bits >= 128) / total, 3) if total else None


def narrowest(launch: VirtualLaunch, pointers: Iterable[str]) -> int | None:
    """Bits of the narrowest access through the pointers named; None where no access can be told to be theirs.

    The first elements of groups, which are read one by one beside the tiles, are left out.
    """
    try:
        found = [bits for pointer in pointers for _, bits in launch.accesses(pointer, elements)]
    except NotImplementedError:  # no way to tell on this device
        return None
    return min(found, default=None)


def rounded(value: float) -> float:
    """Four digits, so that a file stays readable and does not change with the order of a sum."""
    return float(f"{value:.4g}")


def features(launch: VirtualLaunch, dram_bytes: int) -> Row:
    """What the model of times knows of a launch, by the names of ``testing.Demand``."""
    return {name: rounded(value) if isinstance(value, float) else value
            for name, value in Demand.of(launch, dram_bytes)._asdict().items()}  # fmt: skip


def demand(launch: Row) -> Demand:
    """The same, from a row of a file."""
    return Demand(**{name: launch[name] for name in Demand._fields})


EXECUTED = ("shuffles", "shared_loads", "shared_stores", "atomics", "fences", "local")
"""Kinds of instructions that are listed beside those of the model."""


def executed(launch: VirtualLaunch, dram_bytes: int, time: Time | None) -> Row:
    """What the warps of a launch execute, and the time that the model gives it; none of it is known without a time."""
    if time is None:
        names = (*Demand._fields, *EXECUTED, "instructions_at_most", "unsure", "in_flight_bytes", "bound", "parts_us")
        return dict.fromkeys(names) | {
            "programs": prod(launch.grid), "warps": launch.num_warps, "resident": launch.resident,
            "dram_bytes": dram_bytes, "tickets": 0, "predicted_us": None,
        }  # fmt: skip
    done = launch.executed
    most = done.at_most["instructions"]
    return features(launch, dram_bytes) | {
        **{kind: rounded(done[kind]) for kind in EXECUTED},
        "instructions_at_most": rounded(most) if most < inf else None, "unsure": len(done.deciding),
        "in_flight_bytes": round(launch.in_flight), "bound": time.bound, "predicted_us": round(time.us, 2),
        "parts_us": {name: rounded(us) for name, us in time._asdict().items() if name != "us"},
    }  # fmt: skip


def describe_launch(
    launch: VirtualLaunch, planned: Launch, moved: Mapping[str, cost.Moved], dram_bytes: int, time: Time | None
) -> Row:
    """One launch; `moved`: operand -> bytes as ``cost.traffic`` counts them."""
    phase = phase_of(planned)
    operands = {} if phase is None else planned.operands  # what finishes has to do with streams is a few elements
    streams = [pointer for pointer, name in operands.items() if name in cost.STREAMS and name in moved]
    idle = max(0.0, 1 - prod(launch.grid) / launch.hardware.facts.num_sms)
    accesses = launch.accesses()
    return {"kernel": launch.name, "phase": phase, "tile": dict(zip("KAS", planned.tile, strict=True))} | {
        **executed(launch, dram_bytes, time),
        "registers": launch.registers, "spills": launch.spills, "stack": launch.stack, "shared": launch.shared,
        "waves": round(launch.waves, 3), "idle": round(idle, 3), "moved_bytes": sum(map(sum, moved.values())),
        "wide_loads": wide_share(accesses, "load"), "wide_stores": wide_share(accesses, "store"),
        "narrowest_bits": narrowest(launch, streams) if streams else None, "streams": bool(streams),
    }  # fmt: skip


def describe_call(
    key: Row, planned: Any, launches: Sequence[VirtualLaunch], hardware: Hardware, walk: bool = True
) -> Row:
    """One direction of one call: `key` names it, `planned` is its entry in ``testing.plans()``; `walk`: through the
    machine code, for what is executed and predicted."""
    call = direction(planned, launches, hardware, walk)
    plan, itemsizes, hbm, floor = call.plan, planned.itemsizes, call.hbm, call.floor_bytes
    times = call.prediction.launches if call.prediction else [None] * len(launches)
    described = [
        describe_launch(launch, entry, moved, sum(dram), time)
        for launch, entry, moved, dram, time in zip(
            launches, plan.launches, call.moved, hbm.launches, times, strict=True
        )
    ]
    known = call.prediction is not None
    return key | {
        "pattern": plan.layout.pattern, "engine": plan.engine, "x_bytes": call.x_bytes,
        "workspace_bytes": sum(elements * itemsizes[name] for name, elements in plan.workspace if elements),
        "hbm_bytes": hbm.bytes, "floor_bytes": floor, "over_floor": round(hbm.bytes / max(floor, 1), 3),
        "l2_bytes": hbm.cached, "l2_window_bytes": hbm.window,
        "instructions_per_element": rounded(call.per_element()) if known else None,
        "mufu_per_element": rounded(call.per_element("mufu")) if known else None,
        "rounds": max((n["rounds"] for n in described), default=0.0) if known else None,
        "barriers": max((n["barriers"] for n in described), default=0.0) if known else None,
        "floor_us": round(call.floor_us, 2), "predicted_us": round(call.predicted_us, 2) if known else None,
        "of_floor": round(call.of_floor, 3) if known else None, "bound": call.bound,
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
        "in_flight_bytes": min((launch["in_flight_bytes"] or 0 for launch in streams), default=0),
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
