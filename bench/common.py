"""What every part of the evidence shares: where it came from, JSON, workers behind a progress bar."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from . import workers
from .console import console as console
from .console import print_table as print_table
from .console import progress_bar as progress_bar
from .device import healthy

ROOT = Path(__file__).resolve().parents[1]


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None where it has no git of its own: a repository around it is another one."""

    def said(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return said(*arguments) if Path(said("rev-parse", "--show-toplevel")).samefile(ROOT) else None
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "cuda": torch.version.cuda if cuda else None,
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "commit": git("rev-parse", "HEAD"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def text(content: dict[str, Any]) -> str:
    """JSON with a line for each row of each list, so that a diff shows the rows that changed."""
    parts = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            rows = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(name)}: [\n  {rows}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def save(out: Path, name: str, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(text({"environment": environment()} | content))


def load(out: Path, name: str) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_all(
    function: Callable[[Any], Any], tasks: Sequence[Any], label: str, processes: int = 0, limit: float = 1800.0,
    **options: Any,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """(index, function(task) or workers.Failed) as they finish, behind a progress bar.

    One process a core (16 at most) unless `processes` says otherwise, one on a GPU; a task has `limit` seconds.
    `options`: those of workers.run.
    """
    processes = processes or (1 if torch.cuda.is_available() else min(os.cpu_count() or 1, 16))
    until = time.monotonic() + limit * len(tasks)
    with progress_bar() as progress:
        bar = progress.add_task(label, total=len(tasks))
        alone = partial(single_threaded, function)
        for index, answer in workers.run(
            alone, tasks, workers=processes, until=until, limit=limit, healthy=healthy, **options
        ):
            yield index, answer
            progress.advance(bar)


def single_threaded(function: Callable[[Any], Any], task: Any) -> Any:
    torch.set_num_threads(1)  # processes share out the cores
    return function(task)
