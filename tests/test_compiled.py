"""The machine code of every launch that the case table makes on a GPU: no spills, accesses as wide as they can be."""

import json
import os
import subprocess
import sys
from math import gcd
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def compiled(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("device", ["a100", "h200", "b200"])
def test_no_launch_of_the_case_table_spills(device: str) -> None:
    rows = compiled(device, *(["--code"] if device == "h200" else []))
    assert {row["kernel"] for row in rows} >= {"normalize", "statistics", "apply", "grad_normalize", "grad_apply"}
    spilled = [f"{r['case']} {r['format']} {r['kernel']}: {r['spills']} bytes" for r in rows if r["spills"]]
    assert not spilled, spilled
    if device == "h200":
        narrow = [
            f"{r['case']} {r['format']} {r['kernel']}: loads {r['loads']}, stores {r['stores']} bits"
            for r in rows
            if r["stream"] and not wide_enough(r)
        ]
        assert not narrow, narrow


def wide_enough(row: dict) -> bool:
    """bf16: 128 bits where the innermost extent divides by 8, 64 where by 4, ..."""
    bits = 16 * gcd(8, row["inner"])
    writes = row["kernel"] not in ("statistics", "grad_statistics")
    return row["loads"] >= bits and (not writes or row["stores"] >= bits)
