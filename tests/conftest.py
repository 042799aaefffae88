"""Kernels run on the GPU where there is one, in Triton's interpreter elsewhere; fresh memory is NaN either way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated: before anything imports normops

from normops.testing import prepare_once
from tests.fresh_memory import filled

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # pytest -n shares out the cores


prepare_once()  # without it tests of values take four times as long


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What a kernel forgets to write, or reads before it is written, shows as NaN."""
    with filled(float("nan")):
        yield


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def plain() -> Callable[[str], str]:
    """Runs a program where a CPU has no kernels, and returns what it prints."""

    def run(program: str) -> str:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
        env |= {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
