"""The command line of the benchmark: progress where there is no terminal, and refusals that say what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import console

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "bench"]


def test_progress_comes_through_a_pipe_before_the_result(tmp_path: Path) -> None:
    command = [*COMMAND, "verify", "--only", "64 rows of 32768", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": ""}
    )
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(2)]
    assert process.poll() is None and not any(tmp_path.iterdir()), "it came with the result only"
    process.send_signal(signal.SIGINT)  # the result takes half a minute
    process.communicate()
    assert lines[0].startswith("python -m bench verify --only 64") and lines[1] == "verify: 0 of 1, 0 s"


@pytest.mark.parametrize("rich", [True, False])
def test_lines_at_the_start_at_the_first_and_now_and_then(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setattr(console, "Console", None)
        monkeypatch.setattr(console, "console", console.PlainConsole())
    with console.progress_bar() as progress:
        bar = progress.add_task("work", total=3)
        for _ in range(2):
            progress.advance(bar)
    assert capsys.readouterr().out.splitlines() == ["work: 0 of 3, 0 s", "work: 1 of 3, 0 s"]
    monkeypatch.setattr(console, "INTERVAL", 0.02)
    with console.progress_bar() as progress:
        progress.add_task("a long one")
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and all(line in ("a long one: 0 s", "a long one: 1 s") for line in lines)
    with console.progress_bar() as progress:
        bar = progress.add_task("work", total=3)
        for _ in range(2):
            progress.advance(bar)
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("work: 2 of 3, ") and len(lines) > 3
    monkeypatch.setattr(console, "INTERVAL", 10.0)
    with console.progress_bar() as progress:
        assert list(progress.track("abc", description="letters")) == ["a", "b", "c"]
    assert capsys.readouterr().out.splitlines() == ["letters: 0 of 3, 0 s", "letters: 1 of 3, 0 s"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--dtype", "fp32", "--out", "A", "evidence"], "--out, --dtype must come after the command evidence"),
    (["--only", "vit", "host"], "--only must come after the command host"),
    (["report", "--readme", "missing.md"], "python -m bench report: [Errno 2] No such file or directory: 'missing.md'"),
    (["report", "--results", "missing"], "python -m bench report: no folder missing"),
    (["time"], "python -m bench time needs a CUDA device, and torch sees none: nothing was timed"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments == ["time"] and torch.cuda.is_available():
        pytest.skip("there it can be done")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == f"python -m bench {' '.join(arguments)}\n" and not any(tmp_path.iterdir())
