"""A sample of the layouts that tests/compile_layouts.py compiles, with the Triton that is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVERY = 37  # for time; `make versions` takes them all


def test_layouts_compile() -> None:
    command = [sys.executable, "-m", "tests.compile_layouts", "--every", str(EVERY), "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    summary = re.search(r"(\d+) launches, (\d+) folded, (\d+) runs along one coordinate, .* 0 failed", done.stdout)
    assert summary, done.stdout
    launches, folded, runs = map(int, summary.groups())
    assert launches > 20 and folded > 0 and runs >= 3, "the sample holds what the compiler may refuse"
