"""Compile the layouts of the tests with several versions of Triton, each in an environment of its own.

    python3 tests/versions.py [VERSION ...]

Makes .venv-triton-VERSION in the checkout where it is missing (torch as in constraints.txt, the latest release of that
version of Triton, pytest) and runs tests/compile_layouts.py in it.  The exit code is 0 only if every version that was
asked for was there and compiled everything.  Needs nothing but Python with venv.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.5", "3.6", "3.7", "3.9")


def environment(version: str) -> Path:
    """The Python of the environment; CalledProcessError where pip cannot make it."""
    folder = ROOT / f".venv-triton-{version}"
    python, stamp = folder / "bin" / "python", folder / ".stamp"
    (torch,) = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    # The interpreter of Triton before 3.7 needs an older NumPy: so that the tests run there too.
    wanted = [f"triton=={version}.*", "numpy<2.4" if version in ("3.5", "3.6") else "numpy", "pytest"]
    described = "\n".join([torch, *wanted])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != described:
        print(f"making {folder.name}: {torch} {' '.join(wanted)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        # One after the other: a build of torch for CUDA asks for a Triton of its own, which the second step replaces.
        for packages in ([torch], wanted):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        stamp.write_text(described, encoding="utf-8")
    return python


def compiles(version: str) -> str:
    """What came of one version, in a word or two."""
    try:
        python = environment(version)
    except subprocess.CalledProcessError:
        return "FAILED: pip could not make its environment"
    done = subprocess.run([python, "-m", "tests.compile_layouts"], cwd=ROOT)
    return "FAILED" if done.returncode else "ok"


def main(versions: tuple[str, ...]) -> int:
    verdicts = []
    for version in versions:
        start = time.perf_counter()
        print(f"== Triton {version}", flush=True)
        verdict = compiles(version)
        verdicts.append(verdict)
        print(f"== Triton {version}: {verdict}, {time.perf_counter() - start:.0f} s", flush=True)
    print("\n".join(["", *(f"Triton {v}: {verdict}" for v, verdict in zip(versions, verdicts, strict=True))]))
    return int(any(verdict != "ok" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or VERSIONS))
