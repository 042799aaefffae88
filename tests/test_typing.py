"""normops is typed: mypy finds nothing in strict mode, and code that uses normops gets precise types."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normops

ROOT = Path(__file__).resolve().parents[1]

USER = """\
import torch
from torch import Tensor
from typing_extensions import assert_type

import normops
from normops import functional as F
from normops import nn

x, w = torch.randn(2, 4), torch.ones(4)
pair = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, activation="silu", out_dtype=torch.float32)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor, update: Tensor) -> pair:
        y, x = self.norm(x, pre_add=update)
        return nn.functional.relu(y), x


assert_type(normops.normalize(x, 1), Tensor)
assert_type(normops.normalize(x, "n (g c) -> n g", g=2, pre_add=x), pair)
assert_type(normops.normalize(x, (0, 1), return_stats=True), tuple[Tensor, Tensor | None, Tensor])
assert_type(normops.normalize(x, 1, pre_add=x, return_stats=True), tuple[Tensor, Tensor, Tensor | None, Tensor])

assert_type(F.batch_norm(x, None, None, training=True), Tensor)
assert_type(F.batch_norm(x, w, w, w, w, pre_add=x), pair)
assert_type(F.instance_norm(x.unsqueeze(0), activation="relu"), Tensor)
assert_type(F.instance_norm(x.unsqueeze(0), pre_add=x), pair)
assert_type(F.layer_norm(x, [4], w, w, post_add=x), Tensor)
assert_type(F.layer_norm(x, x.shape[1:], pre_add=x), pair)
assert_type(F.rms_norm(x, 4, w, out_dtype=torch.float32), Tensor)
assert_type(F.rms_norm(x, (4,), pre_add=x), pair)
assert_type(F.group_norm(x, 2, w, w), Tensor)
assert_type(F.group_norm(x, 2, pre_add=x), pair)
maybe: Tensor | None = w if torch.is_grad_enabled() else None
assert_type(F.layer_norm(x, (4,), maybe, maybe, pre_add=maybe), Tensor | pair)

assert_type(F.group_norm(x, 2, activation=torch.relu), Tensor)
assert_type(nn.BatchNorm1d(4, activation=nn.SiLU())(x), Tensor)
assert_type(nn.InstanceNorm1d(4)(x, post_add=x), Tensor)
assert_type(nn.GroupNorm(2, 4)(x, pre_add=x), pair)
assert_type(nn.LayerNorm(4)(input=x), Tensor)
assert_type(nn.LayerNorm2d(4)(x), Tensor)
assert_type(nn.Normalize("n c -> n")(x, pre_add=x, post_add=x), pair)
assert_type(nn.LayerNorm(4).activation, str | None)
assert_type(nn.Linear(4, 4).in_features, int)
torch_module: torch.nn.LayerNorm = nn.LayerNorm(4)

# What is wrong is found: each line has the error that stands in it, and strict mode rejects an ignore without one.
F.layer_norm(x, (4,), actvation="relu")  # type: ignore[call-overload]
F.rms_norm(x, 4, w, "1e-6")  # type: ignore[call-overload]
normops.normalize([1.0], 0)  # type: ignore[call-overload]
nn.LayerNorm(4, activation=1)  # type: ignore[arg-type]
nn.GroupNorm(2, 4)(x, pre_add=1.0)  # type: ignore[call-overload]
nn.LayerNorm2d("4")  # type: ignore[arg-type]
"""


def mypy(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("mypy", "typing_extensions"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    tested = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    if torch.__version__.split("+")[0] != tested.removeprefix("torch=="):
        pytest.skip(f"the annotations of torch {torch.__version__} are others than those of {tested}")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def test_mypy_finds_nothing_in_strict_mode() -> None:
    done = mypy("--strict", "normops", cwd=ROOT)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_code_that_uses_normops_gets_precise_types(tmp_path: Path) -> None:
    """torch.nn's modules return Any when called, whatever they are called with; these return what they return."""
    file = tmp_path / "user.py"
    file.write_text(USER, encoding="utf-8")
    # Errors of normops itself are the test's above, as where it is installed.
    options = ("--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}")
    done = mypy(*options, file.name, cwd=tmp_path, MYPYPATH=str(ROOT))
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(normops.__file__).parent / "py.typed").is_file()
