"""The engine "cluster": whole groups on several programs that reduce together; forced, never chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from normops import compiled, launch, schedule
from normops import functional as F
from normops.testing import plans
from tests.tolerance import check, leaf, oracle

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"cluster": 64, "grad_cluster": 64, "tile": 64, "grad_tile": 64}


@pytest.fixture
def clusters(device: torch.device) -> None:
    if not (launch.INTERPRETED or compiled.CLUSTERS):
        pytest.skip("Triton before 3.9 does not reduce across the programs of a cluster")
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer"])
def test_values(norm: str, fmt: Any, device: torch.device) -> None:
    """The tile is that of several programs; how it is spread over them is the compiler's business."""
    x = torch.randn(3, 8, 4, 8, device=device).contiguous(memory_format=fmt).requires_grad_()
    w, b = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    with schedule.forced(engine="cluster", line_bytes=16, **SMALL), plans() as planned:
        y = {
            "batch": lambda: F.batch_norm(x, None, None, w, b, training=True),
            "instance": lambda: F.instance_norm(x, None, None, w, b),
            "group": lambda: F.group_norm(x, 2, w, b),
            "layer": lambda: F.layer_norm(x, (8,), w, b),
        }[norm]()
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, w, b), dy)
    assert [p.plan.engine for p in planned] == ["cluster", "cluster"]
    programs = [p.plan.launches[0].options.get("num_ctas", 1) for p in planned]
    if norm in ("batch", "group"):
        assert all(1 < n <= schedule.CLUSTER for n in programs), programs
    exact = [leaf(t) for t in (x, w, b)]
    along = (1, 1, 1, 8) if norm == "layer" else (1, 8, 1, 1)
    axes = {"batch": (0, 2, 3), "instance": (2, 3), "group": (2, 3, 4), "layer": (3,)}[norm]
    groups = 2 if norm == "group" else None
    ref, _ = oracle(exact[0], axes, *(t.reshape(along) for t in exact[1:]), groups=groups)
    check("y", y, ref)
    for name, g, e in zip(("dx", "dw", "db"), got, torch.autograd.grad(ref, exact, dy.double()), strict=True):
        check(name, g, e, scale=4)  # sums over a few hundred elements


def test_no_call_takes_it_by_itself_and_what_is_too_large_is_split(device: torch.device) -> None:
    x = torch.randn(2, 3, 40, 40, device=device)
    with plans() as planned:
        F.instance_norm(x)
        with schedule.forced(engine="cluster", **SMALL):
            F.instance_norm(x)
    assert [p.plan.engine for p in planned] == ["resident", "split"]


def test_compiled() -> None:
    """Where Triton can: a cluster for each block of groups, without a spill.  Else an error that says so."""
    code = """
import torch, triton
from normops import compiled, functional as F, schedule
from normops.testing import virtual_device
x = torch.empty(64, 65536, dtype=torch.bfloat16)
with virtual_device("h200") as gpu, schedule.forced(engine="cluster"):
    try:
        F.rms_norm(x, (65536,))
    except RuntimeError as error:
        assert not compiled.CLUSTERS and "needs Triton 3.9" in str(error) and triton.__version__ in str(error), error
        assert not gpu.launches
    else:
        (launch,) = gpu.launches
        assert compiled.CLUSTERS and launch.binary.num_ctas == 4 and launch.grid == (64, 1, 1) and launch.spills == 0
with virtual_device("a100") as gpu, schedule.forced(engine="cluster"):
    F.rms_norm(x, (65536,))
    assert len(gpu.launches) == 3, "compute capability 8.0 has no clusters: split"
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
