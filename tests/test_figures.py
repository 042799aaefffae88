"""Figures of launches and calls, what is worse in them, and the baseline: on made-up figures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from bench.compare import compare, read_rows, write_baseline
from bench.evidence import against_baseline
from bench.evidence_table import COLUMNS, lines
from bench.figures import (
    SCHEMA,
    allowed_bits,
    demand,
    describe_call,
    describe_launch,
    narrowest,
    problems,
    summary,
    wide_share,
    worst,
)
from normops import functional, testing
from normops.kernels.bundles import Form
from normops.kernels.finish import finish
from normops.kernels.resident import normalize
from normops.layout import coalesce, dense_strides
from normops.plan import Launch, alike
from normops.testing.cost import Moved
from normops.testing.machine.code import KINDS


def launch_row(kernel: str = "normalize", **changes: Any) -> dict[str, Any]:
    row = {
        "kernel": kernel, "phase": "both", "programs": 1000, "tile": {"K": 1, "A": 1024, "S": 1}, "warps": 4,
        "registers": 40, "spills": 0, "stack": 0, "shared": 64, "resident": 8, "waves": 0.95, "idle": 0.0,
        "moved_bytes": 10, "wide_loads": 1.0, "wide_stores": 1.0, "narrowest_bits": 128, "streams": True,
        "in_flight_bytes": 16384,
        "instructions": 500.0, "mufu": 4.0, "wavefronts": 20.0, "barriers": 2.0, "atomics": 0.0, "atomic_rounds": 0.0,
        "rounds": 2.0, "sectors": 1e5,
    }  # fmt: skip
    return row | changes


def call_row(*launches: dict[str, Any], **changes: Any) -> dict[str, Any]:
    row = {
        "case": "vit-b", "format": "contiguous", "dtype": "bf16", "direction": "forward", "pattern": "KRa",
        "engine": "resident", "x_bytes": 10**7, "workspace_bytes": 100, "hbm_bytes": 2 * 10**7,
        "floor_bytes": 2 * 10**7, "over_floor": 1.0, "l2_bytes": 0, "l2_window_bytes": 0, "predicted_us": 10.0,
        "floor_us": 9.0, "of_floor": 0.9, "bound": "memory", "instructions_per_element": 12.0, "mufu_per_element": 0.1,
        "rounds": 2.0, "barriers": 2.0, "allowed_bits": 128, "launches": list(launches) or [launch_row()],
    }  # fmt: skip
    return row | changes


def first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row["launches"][0].update(changes)


WORSE = {
    "spills": (first(spills=16), "spills 0 -> 16"),
    "narrowest": (first(narrowest_bits=16), "narrowest_bits 128 -> 16"),
    "rounds": (first(rounds=3.0), "rounds 2.0 -> 3.0"),
    "occupancy": (first(resident=7), "occupancy 32+ warps -> 16+ warps"),
    "occupancy, warps": (first(resident=1, warps=4), "occupancy 32+ warps -> under 8 warps"),
}


@pytest.mark.parametrize("kind", WORSE)
def test_a_worse_launch_is_named_with_both_figures(kind: str) -> None:
    spoil, figures = WORSE[kind]
    before, after = call_row(), call_row()
    spoil(after)
    (worse,) = [str(change) for change in compare([before], [after]) if change.worse]
    assert worse == f"vit-b contiguous bf16 forward normalize: {figures}"
    assert [str(c) for c in compare([after], [before]) if c.worse] == [], "the way back is better, not worse"
    assert [c for c in compare([after], [before]) if c.worse is False]


def test_more_launches_and_more_bytes_are_worse() -> None:
    before = call_row()
    after = call_row(launch_row("stream"), launch_row("stream"), hbm_bytes=3 * 10**7)
    worse = [str(change) for change in compare([before], [after]) if change.worse]
    call = "vit-b contiguous bf16 forward"
    assert worse == [f"{call}: launches 1 -> 2", f"{call}: hbm_bytes 20 000 000 -> 30 000 000"]
    assert [c for c in compare([before], [call_row(hbm_bytes=20_010_000)]) if c.worse is not None] == []


def test_a_kernel_that_is_new_to_a_call_may_not_spill_or_be_narrower() -> None:
    before = call_row(launch_row("normalize", narrowest_bits=64))
    fine = compare([before], [call_row(launch_row("stream", narrowest_bits=64))])
    assert {change.worse for change in fine} == {None}
    worse = compare([before], [call_row(launch_row("stream", narrowest_bits=16, spills=4))])
    assert [(c.kernel, c.figure, c.before, c.after) for c in worse if c.worse] == [
        ("stream", "spills", 0, 4),
        ("stream", "narrowest_bits", 64, 16),
    ]


def test_more_instructions_are_worse_beyond_what_a_sample_may_shift() -> None:
    before = call_row()
    (more,) = compare([before], [call_row(instructions_per_element=13.0)])
    assert str(more) == "vit-b contiguous bf16 forward: instructions_per_element 12.0 -> 13.0" and more.worse
    (fewer,) = compare([before], [call_row(instructions_per_element=11.0)])
    assert fewer.worse is False
    assert compare([before], [call_row(instructions_per_element=12.1)]) == []
    unknown = call_row(launch_row(rounds=None), instructions_per_element=None)
    assert compare([unknown], [before]) == [] == compare([before], [unknown]), "nothing is known on AMD"


def test_kernels_that_a_call_launches_twice_are_told_apart() -> None:
    before = call_row(launch_row("stream", registers=32), launch_row("stream", registers=64))
    after = copy.deepcopy(before)
    after["launches"][1]["registers"] = 65
    assert [(c.figure, c.before, c.after, c.worse) for c in compare([before], [after])] == [("registers", 64, 65, None)]


def test_calls_that_come_and_go() -> None:
    spilling = call_row(launch_row(spills=8), case="new")
    changes = compare([call_row(case="gone")], [spilling])
    assert [(c.case, c.figure, c.before, c.after, c.worse) for c in changes] == [
        ("new", "call", None, "present", None),
        ("new", "spills", 0, 8, True),
        ("gone", "call", "present", None, True),
    ]
    assert [c.worse for c in compare([], [call_row()])] == [None]


def test_between_versions_of_triton_only_plans_and_new_spills_count() -> None:
    before, after = call_row(launch_row(spills=0)), call_row(launch_row(spills=8))
    assert compare([before], [call_row(launch_row(spills=0), instructions_per_element=99.0)], exact=False) == []
    for figures in ({"narrowest_bits": 16}, {"resident": 1}, {"registers": 255}, {"rounds": 9.0}):
        assert compare([before], [call_row(launch_row(**figures))], exact=False) == []
    assert [c.figure for c in compare([before], [after], exact=False)] == ["spills"]
    more = call_row(launch_row(spills=80))
    assert compare([after], [more], exact=False) == []
    assert [c.figure for c in compare([before], [call_row(hbm_bytes=10**8)], exact=False)] == ["hbm_bytes"]


def head(**changes: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "device": "h100", "dtype": "bf16", "triton": triton.__version__} | changes


def test_a_baseline_comes_back_sorted_and_the_same_every_time(tmp_path: Path) -> None:
    rows = [call_row(case="b"), call_row(case="a", direction="backward"), call_row(case="a")]
    path = tmp_path / "results" / "evidence.json"
    write_baseline(path, head(), rows)
    text = path.read_text()
    assert text.count("\n") <= len(rows) + 8, "one line a call, so that a diff shows the calls that changed"
    content = read_rows(path)
    assert content["rows"] == [rows[1], rows[2], rows[0]]
    write_baseline(path, head(), rows[::-1])
    assert path.read_text() == text


def test_a_baseline_says_what_is_worse_and_what_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    write_baseline(path, head(), [call_row(launch_row(spills=8))])
    assert against_baseline("h100", "bf16", [call_row(launch_row(spills=8))], path) == ([], "")
    worse, stale = against_baseline("h100", "bf16", [call_row(launch_row(spills=0))], path)
    assert worse == [] and "1 figures better" in stale and "--baseline" in stale
    worse, _ = against_baseline("h100", "bf16", [call_row(launch_row(spills=12))], path)
    assert worse == ["vit-b contiguous bf16 forward normalize: spills 8 -> 12"]
    write_baseline(path, head(triton="1.0"), [call_row(launch_row(spills=8))])
    assert against_baseline("h100", "bf16", [call_row(launch_row(spills=12))], path) == ([], "")
    with pytest.raises(ValueError, match="holds h100 bf16, not a100 bf16"):
        against_baseline("a100", "bf16", [], path)
    write_baseline(path, head(schema=SCHEMA + 1), [])
    with pytest.raises(ValueError, match=f"must have schema {SCHEMA}, has {SCHEMA + 1}"):
        read_rows(path)


class Launched:
    """What a virtual device says of a launch."""

    num_warps, registers, spills, stack, shared = 4, 40, 0, 0, 64
    resident, in_flight, hardware = 12, 4096.0, testing.HARDWARE["h100"]
    executed = testing.Executed(
        programs=100, warps=4, walked=18, counts=dict.fromkeys(KINDS, 8.0),
        at_most=dict.fromkeys(KINDS, math.inf), rounds=2.0,
        atomic_rounds=0.0, cycles=500.0, further_rounds=0.0, further_cycles=0.0, loaded=1e6, stored=1e6,
        sectors=62500.0, in_flight=1024.0, wavefronts=20.0, size=100.0,
        tickets=False, uncounted=(), deciding=(), binary=None,  # type: ignore[arg-type]
    )  # fmt: skip

    def __init__(self, name: str, grid: int, widths: dict[str | None, dict[tuple[str, int], int]]) -> None:
        self.name, self.grid, self.waves = name, (grid, 1, 1), grid / (12 * 132)
        self.widths = widths

    def accesses(self, argument: str | None = None, without: Any = None) -> dict[tuple[str, int], int]:
        return self.widths.get(argument, {})


def planned_launch(kernel: Any, grid: int, **form: int) -> Launch:
    return Launch(kernel, grid, alike("x", "post", "y", "w"), (3,), Form((), None, **form), 4)


def test_shares_of_wide_accesses() -> None:
    accesses = {("load", 128): 2, ("load", 256): 1, ("load", 16): 1, ("store", 64): 5}
    assert wide_share(accesses, "load") == 0.75
    assert wide_share(accesses, "store") == 0
    assert wide_share({}, "load") is None


def test_the_narrowest_access_is_that_of_the_pointers_asked_for() -> None:
    launch: Any = Launched(
        "n", 1, {"x": {("load", 128): 4}, "y": {("store", 64): 2}, "w": {("load", 16): 1}}
    )
    assert narrowest(launch, ["x", "y"]) == 64
    assert narrowest(launch, ["x"]) == 128
    assert narrowest(launch, ["post"]) is None

    def cannot(argument: str | None = None, without: Any = None) -> dict[tuple[str, int], int]:
        raise NotImplementedError

    launch.accesses = cannot
    assert narrowest(launch, ["x"]) is None


def test_a_launch_in_figures() -> None:
    planned = planned_launch(normalize, 100, BLOCK_A=512, PIECES=2, WIDTH_A=1024)
    launch: Any = Launched("normalize", 100, {None: {("load", 128): 1}, "x": {("load", 32): 1}})
    moved = {"x": Moved(153600, 0), "post": Moved(153600, 0), "y": Moved(0, 153600), "w": Moved(1536, 0)}
    asked = testing.Demand.of(launch, 5000)
    (time,) = testing.predict([asked]).launches
    row = describe_launch(launch, planned, moved, 5000, time)
    assert row["idle"] == round(32 / 132, 3) and row["tile"] == {"K": 1, "A": 1024, "S": 1}
    assert row["kernel"] == "normalize" and row["phase"] == "both"
    assert row["moved_bytes"] == 3 * 153600 + 1536 and row["dram_bytes"] == 5000
    assert row["narrowest_bits"] == 32 and row["wide_loads"] == 1.0 and row["wide_stores"] is None
    assert row["instructions"] == 8 and row["instructions_at_most"] is None and row["rounds"] == 2
    assert row["in_flight_bytes"] == 4096 and row["bound"] == time.bound and row["unsure"] == 0
    assert demand(row) == asked, "a file holds all that a prediction needs"
    assert sum(row["parts_us"].values()) > row["predicted_us"] == round(time.us, 2)
    partial = describe_launch(launch, planned, {"w": Moved(4, 4)}, 0, time)
    assert not partial["streams"] and partial["narrowest_bits"] is None
    finishing = describe_launch(launch, planned_launch(finish, 100), {"x": Moved(4, 0)}, 0, time)
    assert finishing["phase"] is None and not finishing["streams"], "it reads the first elements of groups alone"
    unknown = describe_launch(launch, planned, moved, 5000, None)
    assert unknown.keys() == row.keys() and unknown["instructions"] is None and unknown["dram_bytes"] == 5000


@pytest.mark.parametrize(
    ("shape", "reduced", "itemsize", "bits"),
    [
        ((32, 2048, 7, 7), (0, 2, 3), 2, 16),  # planes of 49
        ((32, 1024, 14, 14), (0, 2, 3), 2, 64),  # of 196
        ((64, 197, 768), (2,), 2, 128),
        ((64, 197, 770), (2,), 4, 64),
        ((2, 64, 32, 30), (1, 3), 2, 32),  # channels_last GroupNorm, 30 channels a group
    ],
)
def test_the_widest_access_that_a_shape_allows(
    shape: tuple[int, ...], reduced: tuple[int, ...], itemsize: int, bits: int
) -> None:
    assert allowed_bits(coalesce(shape, (dense_strides(shape),), reduced), itemsize) == bits


def test_problems_of_calls_and_their_counts() -> None:
    rows = [
        call_row(),
        call_row(launch_row(spills=4), engine="split", over_floor=1.5),
        call_row(launch_row(narrowest_bits=64), launch_row("finish", streams=False, narrowest_bits=None, idle=0.9)),
        call_row(launch_row(idle=0.5)),
        call_row(launch_row(idle=0.5), x_bytes=1000),
        call_row(launch_row(narrowest_bits=64), allowed_bits=64),
    ]
    assert [problems(row) for row in rows] == [[], ["spills", "over floor"], ["narrow"], ["idle"], [], []]
    assert summary(rows) == {
        "calls": 6, "engines": {"resident": 5, "split": 1}, "spills": 1, "over_floor": 1, "narrow": 1, "idle": 1,
    }  # fmt: skip
    assert worst(rows[2])["idle"] == 0, "finishing kernels are small by nature"
    assert worst(rows[2])["registers"] == 40
    table = lines(rows[:2])
    assert [line[0] for line in table] == ["[bold]layer", "vit-b", ""] and "[red]1.50" in table[2]
    assert {len(line) for line in table} == {len(COLUMNS)}


def test_a_call_in_figures() -> None:
    x = torch.randn(6, 64, requires_grad=True)
    with testing.plans() as planned:
        functional.layer_norm(x, (64,))
    (call,) = planned
    launched: list[Any] = [
        Launched(launch.kernel.__name__, launch.grid, {"x": {("load", 128): 1}}) for launch in call.plan.launches
    ]
    hardware = testing.HARDWARE["h100"]
    row = describe_call({"case": "made up"}, call, launched, hardware)
    assert row["engine"] == "resident" and row["pattern"] == "KR" and row["x_bytes"] == x.nbytes
    assert row["floor_bytes"] == row["hbm_bytes"] == 2 * x.nbytes + 2 * 6 * 4, "x, y, mean, rstd"
    assert row["workspace_bytes"] == 2 * 6 * 4 and row["over_floor"] == 1
    assert row["floor_us"] == round(1.9 + row["floor_bytes"] / 2.96e6, 2)
    executed = 8.0 * 4 * 100 * 32 / (6 * 64)
    assert row["instructions_per_element"] == row["mufu_per_element"] == float(f"{executed:.4g}")
    (launch,) = row["launches"]
    assert row["predicted_us"] > launch["predicted_us"] > 0 and row["bound"] in ("launches", launch["bound"])
    assert row["of_floor"] == pytest.approx(row["floor_us"] / row["predicted_us"], abs=0.002)
    other = describe_call({}, call, launched, testing.HARDWARE["mi300x"])
    assert other.keys() | {"case"} == row.keys() and other["predicted_us"] is None and other["bound"] is None
    with pytest.raises(RuntimeError, match=r"the plan launches \['normalize'\], the device saw \[\]"):
        describe_call({}, call, [], hardware)
