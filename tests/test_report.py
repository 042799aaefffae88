"""The README's results are what ``python -m bench report`` makes of the committed files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import records, report

KEY = {"norm": "layer", "format": "contiguous", "dtype": "bf16"}
TIMES = {"normops": 10.0, "torch": 25.0, "torch.compile": 12.0, "liger": 11.0, "quack": 10.5}


def content(commit: str = "abcdef0123", date: str = "2030-01-02T00:00:00+00:00", factor: float = 1.0) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        KEY | {"case": "vit-b", "provider": name, "direction": direction, "ok": True, "us": us * factor,
               "us_low": us * factor - 1, "us_high": us * factor + 1, "floor_us": 9.0, "copy_us": 9.0,
               "of_floor": 9.0 / (us * factor), "graph": name != "quack"}
        for direction in ("forward", "backward", "both") for name, us in TIMES.items()
    ]  # fmt: skip
    rows.append(KEY | {"case": "vit-b", "provider": "apex", "ok": False, "skipped": "not installed: apex"})
    where = {"device": "NVIDIA Made-up", "commit": commit, "dirty": False, "date": date, "torch": "2", "triton": "3"}
    return {
        "kind": "gpu", "schema": 1, "environment": where, "machine": None, "stages": {}, "timing": rows,
        "not_run": {"timing": ["vit-l, contiguous, bf16"]}, "verify": [KEY | {"provider": "normops", "ok": True}],
    }  # fmt: skip


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    return path


def test_the_readme_is_up_to_date() -> None:
    text = report.README.read_text(encoding="utf-8")
    assert report.placed(text, report.section(records.read(records.FOLDER))) == text, "run: python -m bench report"


def test_the_pages_of_the_gpus_are_up_to_date() -> None:
    for device, runs in report.latest(records.read(records.FOLDER)).items():
        path = records.FOLDER / f"{records.slug(device)}.md"
        assert path.read_text(encoding="utf-8") == report.page(device, runs), "run: python -m bench report"


def test_nothing_measured_is_said(tmp_path: Path, readme: Path) -> None:
    assert report.report(tmp_path, readme)
    assert readme.read_text() == f"before\n{report.START}\n{report.NOTHING}\n{report.END}\nafter\n"


def test_table_from_results(tmp_path: Path, readme: Path) -> None:
    pytest.importorskip("matplotlib")
    records.claim(tmp_path, content())
    assert report.report(tmp_path, readme)
    text = readme.read_text()
    line = "| vit-b | contiguous | bf16 | forward | 10.0 (9.0–11.0) | 90% | 2.50× | 1.20× | 1.10× liger |"
    assert line in text.splitlines() and "1 of 1 calls within their bounds of float64; 0 of 0 " in text
    assert "1 timed; no time for 1. [All of it, and what failed](bench/results/made-up.md)" in text
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"made-up.svg", "made-up.md", "made-up-2030-01-02-abcdef0.json"} <= before.keys()
    assert not report.report(tmp_path, readme), "a second run changes nothing"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_failed_and_what_was_noted_is_said(tmp_path: Path, readme: Path) -> None:
    pytest.importorskip("matplotlib")
    made = content()
    made["environment"]["note"] = "the fan was off"
    made["timing"] = [row for row in made["timing"] if row["provider"] not in ("torch", "liger")]
    made["timing"] += [
        KEY | {"case": "vit-b", "provider": "torch", "ok": False, "error": "wrong: y is off by 3 times its bound"},
        KEY | {"case": "llama 4096", "provider": "any", "ok": False, "error": "the process died\nwith many words"},
        KEY | {"case": "dit adaln", "provider": "any", "ok": False, "error": "cut off: no time left"},
    ]
    made["repeats"] = [{"ok": True}, {"ok": False, "error": "cut off: no time left"}]
    records.claim(tmp_path, made)
    report.report(tmp_path, readme)
    text, page = readme.read_text(), (tmp_path / "made-up.md").read_text()
    for found in (text, page):
        assert "Note: the fan was off" in found and "1 of 1 with the same bits" in found
        assert "1 timed; 1 failed; no time for 2" in found
        assert "| vit-b | contiguous | bf16 | forward | 10.0 (9.0–11.0) | 90% | ✗ | 1.20× | – |" in found.splitlines()
    assert "- **torch**: vit-b, contiguous, bf16: `wrong: y is off by 3 times its bound`" in page
    assert "- **any**: llama 4096, contiguous, bf16: `the process died`" in page and "dit adaln" not in page
    assert "](made-up.svg)" in page and (tmp_path / "made-up.svg").exists()


def test_commits_are_not_mixed_and_the_newest_time_of_a_commit_counts() -> None:
    old, first = content("0ld", "2030-01-01"), content("new", "2030-01-02")
    second = content("new", "2030-01-03", factor=2.0)
    assert [run["environment"]["commit"] for run in report.latest([old, first])["NVIDIA Made-up"]] == ["new"]
    rows = report.timed(report.latest([old, first, second])["NVIDIA Made-up"])
    assert {row["us"] for row in rows if row["provider"] == "normops"} == {20.0} and len(rows) == 15


def test_other_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "evidence.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"kind": "other"}')
    assert records.read(tmp_path) == []


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold <!-- results -->"):
        report.placed("nothing here", "x")
