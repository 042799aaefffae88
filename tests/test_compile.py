"""A sample of the layouts that tests/compile_layouts.py compiles, with the Triton that is installed."""

from __future__ import annotations

import ast
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


def test_constants_stay_constants() -> None:
    """min() and max() of constants make a tensor of them in Triton 3.5: kernels take a ``constexpr_function``."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or "constexpr_function" in ast.dump(function):
                continue
            called = {n.func.id for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            assert not called & {"min", "max"}, f"{path.name}: {function.name}"
