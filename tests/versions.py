"""Compile the layouts of the tests, and run the fast part of the suite, with several versions of Triton and PyTorch.

    python3 tests/versions.py [VERSION ...]

3.x is a version of Triton, beside the PyTorch of constraints.txt; 2.x one of PyTorch, beside the Triton of
constraints.txt, of which a build for CPUs must be had.  Makes .venv-VERSION in the checkout where it is missing, runs
tests/compile_layouts.py and the tests of values and layouts in it.  The exit code is 0 only if every version that
could be had did all of it.  Needs nothing but Python with venv.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.5", "3.6", "3.7", "3.9", "2.9", "2.11", "2.14")
INDEX = "https://download.pytorch.org/whl/cpu"
FAST = ("tests/test_values.py", "tests/test_layout.py", "tests/test_exact_statistics.py")
PINNED = dict(re.findall(r"^(\w+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))


class Absent(Exception):
    """A version that is nowhere to be had."""


def wanted(version: str) -> tuple[str, list[str]]:
    """PyTorch, and what is installed after it: a build for CUDA asks for a Triton of its own, which that replaces."""
    torch, triton = PINNED["torch"], PINNED["triton"]
    if version.startswith("3."):
        triton = f"{version}.*"
    else:
        command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--extra-index-url", INDEX]
        found = subprocess.run(command, capture_output=True, text=True).stdout
        builds = re.findall(rf"\b{re.escape(version)}\.\d+\+cpu", found)
        if not builds:
            raise Absent(f"no build of torch {version} for CPUs")
        torch = builds[0]
    # The interpreter of Triton before 3.7 needs an older NumPy.
    numpy = "numpy<2.4" if version in ("3.5", "3.6") else "numpy"
    return f"torch=={torch}", [f"triton=={triton}", numpy, "pytest", "pytest-xdist", "hypothesis"]


def environment(version: str) -> Path:
    """The Python of the environment; CalledProcessError where pip cannot make it."""
    folder = ROOT / f".venv-{version}"
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    torch, others = wanted(version)
    described = "\n".join([torch, *others])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != described:
        print(f"making {folder.name}: {torch} {' '.join(others)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        for packages in ([torch], others):
            command = [python, "-m", "pip", "install", "-q", "--extra-index-url", INDEX, *packages]
            subprocess.run(command, check=True)
        stamp.write_text(described, encoding="utf-8")
    return python


def passes(version: str) -> str:
    """What came of one version, in some words."""
    try:
        python = environment(version)
    except Absent as reason:
        return f"not run: {reason}"
    except subprocess.CalledProcessError:
        return "FAILED: pip could not make its environment"
    runs = {
        "compilation": ["-m", "tests.compile_layouts"],
        "tests": ["-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *FAST],
    }
    failed = [name for name, command in runs.items() if subprocess.run([python, *command], cwd=ROOT).returncode]
    return f"FAILED: {' and '.join(failed)}" if failed else "ok"


def main(versions: tuple[str, ...]) -> int:
    verdicts = []
    for version in versions:
        start = time.perf_counter()
        name = f"{'Triton' if version.startswith('3.') else 'PyTorch'} {version}"
        print(f"== {name}", flush=True)
        verdicts.append(f"{name}: {passes(version)}, {time.perf_counter() - start:.0f} s")
        print(f"== {verdicts[-1]}", flush=True)
    print("\n".join(["", *verdicts]))
    return int(any("FAILED" in verdict for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or VERSIONS))
