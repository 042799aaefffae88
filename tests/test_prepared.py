"""The interpreter that prepares once computes what it always did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_values_and_the_language_are_as_before() -> None:
    code = """
import torch, triton.language as tl
from normops import functional as F
from normops.testing import prepare_once
x, w, b = torch.randn(3, 8, 5, 7, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(8)
def call():
    y = F.group_norm(x, 2, w, b, activation="gelu")
    return y, *torch.autograd.grad(y.square().sum(), (x, w))
before, language = call(), dict(vars(tl.core)) | dict(vars(tl))
for _ in range(2):
    prepare_once()
    assert all(torch.equal(a, b) for a, b in zip(before, call()))
    assert dict(vars(tl.core)) | dict(vars(tl)) == language, "what a launch prepared was left behind"
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
