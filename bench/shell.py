"""Other programs, with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TAIL = 6000
"""Characters of a program's output that are kept in a results file."""


class Ran(NamedTuple):
    code: int | None
    """None: it was stopped at its limit."""
    output: str
    seconds: float

    @property
    def tail(self) -> str:
        return self.output[-TAIL:]


class Shell:
    def which(self, name: str) -> str | None:
        return shutil.which(name)

    def run(self, command: Sequence[str], seconds: float, **environment: str) -> Ran:
        """Run in the checkout; at the limit it is interrupted, so that it can still say what it knows, then killed."""
        began = time.monotonic()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            list(command), cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        grace = min(15.0, seconds / 4)
        code: int | None = None
        try:
            output, _ = process.communicate(timeout=seconds - grace)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                output, _ = process.communicate(timeout=grace)
            except subprocess.TimeoutExpired:
                output = self._kill(process)
        finally:
            if process.poll() is None:  # an exception of ours: leave nothing behind
                self._kill(process)
        return Ran(code, output or "", time.monotonic() - began)

    @staticmethod
    def _kill(process: subprocess.Popen[str]) -> str:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=10)[0]
        return ""
