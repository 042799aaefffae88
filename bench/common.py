"""What every part of the evidence shares: where it came from, JSON, workers behind a progress bar."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from .console import console as console
from .console import print_table as print_table
from .console import progress_bar as progress_bar


def environment() -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "cuda": torch.version.cuda if cuda else None,
        "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        "commit": commit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save(out: Path, name: str, content: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"environment": environment()} | content, indent=1) + "\n")


def load(out: Path, name: str) -> dict[str, Any] | None:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run_all(function: Callable[[Any], Any], tasks: Sequence[Any], label: str) -> Iterator[tuple[int, Any]]:
    """(index, function(task)) as they finish: here on a GPU, in one process per core in the interpreter."""
    with progress_bar() as progress:
        bar = progress.add_task(label, total=len(tasks))
        if torch.cuda.is_available():
            for index, task in enumerate(tasks):
                yield index, function(task)
                progress.advance(bar)
            return
        workers = max(1, min(os.cpu_count() or 1, len(tasks), 16))
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            futures = {pool.submit(function, task): index for index, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
                progress.advance(bar)
