"""The model of times: what it predicts of made-up launches, what it was fitted to, and how far off it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")

from bench import calibrate
from bench.counting import count_beside
from bench.figures import demand
from normops.testing import HARDWARE, Demand, hardware_of, predict
from normops.testing.predict import CALIBRATED, Model, calibrated, model_of

PLAIN = Demand(
    programs=10000, warps=4, resident=8, instructions=200.0, mufu=0.0, wavefronts=32.0, barriers=2.0, rounds=1.0,
    atomic_rounds=0.0, cycles=400.0, further_rounds=0.0, further_cycles=0.0, sectors=5e6, dram_bytes=160_000_000,
    tickets=0,
)  # fmt: skip


def us(**changes: Any) -> float:
    return predict([PLAIN._replace(**changes)]).us


def test_a_large_copy_takes_what_memory_takes() -> None:
    prediction = predict([PLAIN])
    assert prediction.bound == "memory" == prediction.launches[0].bound
    assert prediction.us == pytest.approx(HARDWARE["h100"].copy_us(160_000_000), rel=0.15)


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({"instructions": 5000.0}, "issue"),
        ({"mufu": 600.0}, "issue"),
        ({"wavefronts": 1200.0}, "issue"),
        ({"rounds": 60.0, "cycles": 4000.0}, "latency"),
        ({"barriers": 400.0}, "latency"),
        ({"dram_bytes": 16_000_000_000, "sectors": 5e8}, "memory"),
        ({"programs": 64, "sectors": 100.0, "dram_bytes": 3200, "rounds": 0.0, "cycles": 100.0}, "launches"),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, dict) else v,
)
def test_what_a_launch_has_most_of_holds_it(change: dict[str, float], bound: str) -> None:
    time = predict([PLAIN._replace(**change)])
    assert time.launches[0].bound == bound == time.bound


@pytest.mark.parametrize("field", [f for f in Demand._fields if f not in ("warps", "resident", "tickets")])
def test_more_of_anything_never_takes_less(field: str) -> None:
    value = getattr(PLAIN, field)
    more = {field: 1000.0 if value == 0 else value * 30}
    for tickets in (0, 1):
        assert us(tickets=tickets, **more) >= us(tickets=tickets) > 0
    assert us(resident=1) > us() and us(tickets=1) > us()


def test_launches_follow_one_another() -> None:
    one, two = predict([PLAIN]), predict([PLAIN, PLAIN])
    assert two.us - one.us == pytest.approx(one.launches[0].us)
    assert len(two.launches) == 2 and one.us > one.launches[0].us
    parts = one.launches[0]
    assert max(parts.issue, parts.memory, parts.latency) + parts.start <= parts.us <= sum(parts[1:])


def test_few_programs_cannot_draw_at_full_speed() -> None:
    few = {"programs": 30, "sectors": 5e5, "dram_bytes": 16_000_000, "rounds": 1.0}
    assert us(**few) > 1.5 * us(**few | {"programs": 3000}), "16 MB by 30 of 132 SMs"


def test_other_devices_take_their_own_clock_and_bandwidth() -> None:
    h100, h200, a100 = (predict([PLAIN], HARDWARE[name]) for name in ("h100", "h200", "a100"))
    assert h100.calibrated and not h200.calibrated and not a100.calibrated
    assert h200.us < h100.us < a100.us
    busy = PLAIN._replace(instructions=20000.0)
    ratio = predict([busy], HARDWARE["a100"]).us / predict([busy], HARDWARE["h100"]).us
    assert ratio == pytest.approx(1.98 / 1.41 * 132 / 108, rel=0.02)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"), ("AMD Instinct MI300X", "mi300x"), ("Tesla T4", None), ("", None),
    ],
)  # fmt: skip
def test_devices_by_the_name_of_their_driver(title: str, name: str | None) -> None:
    assert hardware_of(title) == name


@pytest.fixture(scope="module")
def points() -> calibrate.Points:
    rows, files = calibrate.read_points("h100")
    assert files and all(name.endswith(".json") for name in files)
    return calibrate.gathered(rows)


def test_points_hold_all_that_a_fit_needs(points: calibrate.Points) -> None:
    assert len(points.rows) >= 280
    for row in points.rows:
        assert row["us"] > 0 and row["direction"] in ("forward", "backward") and row["launches"]
        assert all(np.isfinite(demand(launch)).all() for launch in row["launches"])
    content = json.loads((calibrate.FOLDER / calibrate.read_points("h100")[1][-1]).read_text())
    assert {"commit", "triton", "device"} <= content["environment"].keys() and content["method"]


def test_what_is_committed_fits_the_points(points: calibrate.Points) -> None:
    """And says how well: 12 % in the median and 35 % for nine of ten are what a prediction is good for."""
    model, fitted = model_of("h100")
    off = np.abs(points.of(model, HARDWARE["h100"]) / points.us - 1)
    assert fitted and np.median(off) < 0.07 and np.quantile(off, 0.9) < 0.25
    source = json.loads(CALIBRATED.read_text())["h100"]["source"]
    assert f"{len(off)} calls" in source and f"median error {np.median(off):.1%}" in source
    for name, value in asdict(model).items():
        low, high = calibrate.RANGES[name]
        assert low <= value <= high, name


def test_a_sum_over_arrays_is_the_prediction_of_each(points: calibrate.Points) -> None:
    model, _ = model_of("h100")
    together = points.of(model, HARDWARE["h100"])
    for i in range(0, len(points.rows), 37):
        alone = predict([demand(launch) for launch in points.rows[i]["launches"]])
        assert together[i] == pytest.approx(alone.us)


def test_a_fit_finds_a_model_that_made_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of made-up launches by known numbers: the fit comes back to them as far as times can tell."""
    monkeypatch.setattr(calibrate, "EVALUATIONS", 800)
    rng = np.random.default_rng(0)
    truth = Model(**json.loads(CALIBRATED.read_text())["h100"]["parameters"])
    rows = []
    for _ in range(60):
        changes = {f: getattr(PLAIN, f) * float(rng.uniform(0.05, 5)) for f in ("instructions", "cycles", "sectors")}
        changes |= {"programs": int(rng.integers(100, 20000)), "rounds": float(rng.integers(1, 60))}
        changes |= {"dram_bytes": int(changes["sectors"] * 20), "tickets": int(rng.integers(2)), "mufu": 3.0}
        rows.append({"case": "", "us": 1.0, "launches": [PLAIN._replace(**changes)._asdict()]})
    made = calibrate.gathered(rows)
    times = made.of(truth, HARDWARE["h100"])
    made = calibrate.gathered([row | {"us": us} for row, us in zip(rows, times, strict=True)])
    start = Model(**{n: v * 1.25 if n not in ("dram", "l2", "mufu") else v for n, v in asdict(truth).items()})
    found = calibrate.fit(made, HARDWARE["h100"], start)
    off = np.abs(made.of(found, HARDWARE["h100"]) / times - 1)
    before = np.abs(made.of(start, HARDWARE["h100"]) / times - 1)
    assert np.median(off) < 0.02 < np.median(before)


def test_errors_are_told_by_engine_direction_and_size(points: calibrate.Points) -> None:
    lines = calibrate.error_table(points.rows, {"fitted": np.full(len(points.rows), 0.1)})
    assert lines[0][1:] == ["all", str(len(points.rows)), "10.0%", "10.0%", "100%"]
    assert {line[0] for line in lines} == {"", "engine", "direction", "size of x"}
    assert {"ticketed", "split", "resident", "forward", "backward", "8 to 64 MB"} <= {line[1] for line in lines}


def test_other_devices_other_engines_and_rows_without_counts_are_passed_over(tmp_path: Path) -> None:
    launches = [PLAIN._asdict()]
    row = {"case": "vit-b", "us": 5.0, "launches": launches, "direction": "forward", "engine": "resident"}
    others = [row | {"direction": "both"}, row | {"engine": "one of long ago"}]
    files = {
        "a": {"kind": "points", "machine": {"name": "NVIDIA H100 PCIe"}, "rows": [row, *others]},
        "b": {"kind": "points", "machine": {"name": "NVIDIA A100"}, "rows": [row]},
        "c": {"kind": "gpu", "machine": {"name": "NVIDIA H100"}, "timing": [row, {"case": "x", "us": 1.0}]},
        "d": {"schema": 2, "device": "h100", "rows": [row]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    rows, names = calibrate.read_points("h100", tmp_path)
    assert names == ["a.json", "c.json"] and rows == [row, row]


def test_measured_rows_get_what_their_launches_execute() -> None:
    key = {"case": "image instance", "format": "contiguous", "dtype": "bf16", "ok": True}
    rows = [
        key | {"provider": "normops", "direction": "forward", "us": 5.0},
        key | {"provider": "normops", "direction": "both", "us": 9.0},
        key | {"provider": "torch", "direction": "forward", "us": 50.0},
        key | {"provider": "normops", "direction": "backward", "error": "none"},
    ]
    before = [dict(row) for row in rows]
    count_beside(rows, "Tesla T4")
    assert rows == before, "nothing is known of this device"
    count_beside(rows, "NVIDIA H100 80GB HBM3")
    assert rows[1:] == before[1:]
    made = calibrate.gathered(rows[:1])
    predicted = made.of(model_of("h100")[0], HARDWARE["h100"])
    assert rows[0]["engine"] == "resident" and predicted == pytest.approx(rows[0]["predicted_us"], rel=0.01)


def test_the_command_says_how_far_off_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "EVALUATIONS", 2)
    assert calibrate.calibrate("h100")
    text = capsys.readouterr().out
    assert "points of" in text and "ticketed" in text and "unseen" in text and "sharpness" in text
    assert not calibrate.calibrate("b200")
    assert "measured on NVIDIA B200" in capsys.readouterr().out
    assert calibrated().keys() == {"h100"}
