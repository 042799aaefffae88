"""Two processes: DistributedDataParallel, FSDP2 and DTensor work with these norms as they do with torch's.

The processes run once, tests/distributed_training.py; the tests judge what came out of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerance import check, errors

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds for all of the two processes' work; a quiet machine needs a tenth

# A step is some twenty layers, there and back, and rounds to 2^-24 in each.  Four steps leave the losses and the RMS of
# a parameter up to 6e-7 apart, so this is a margin of 7, and far below what one wrong gradient does (1e-3).
LOSS, PARAMETER, ELEMENT = 4e-6, 4e-6, 2e-5

TRAININGS = (
    "ddp",
    "ddp accumulating",
    "ddp static graph",
    "ddp unused parameters",
    "fsdp",
    "fsdp accumulating",
    "fsdp checkpointed",
    "ddp without batch norm",
    "fsdp without batch norm",
)

# The axis that is sharded before and after.
SHARDED = {
    "layer_norm by batch": 0,
    "layer_norm by sequence": 1,
    "layer_norm by uneven sequence": 1,
    "layer_norm without parameters": 1,
    "rms_norm by batch": 0,
    "rms_norm by sequence": 1,
    "rms_norm with every extra": 1,
    "normalize with statistics": 1,
    "gradient of a gradient": 1,
    "group_norm by batch": 0,
    "instance_norm by batch": 0,
    "instance_norm by channels": 1,
    "batch_norm by channels": 1,
    "batch_norm_given by batch": 0,
    "batch_norm_given by channels": 1,
    "n c l -> n": 0,
    "n c l -> n c": 0,
}
GATHERED = (
    "layer_norm by features",
    "rms_norm by features",
    "group_norm by channels",
    "batch_norm by batch",
    "n c l -> c",
)

Results = dict[str, Any]


def start(backend: str, folder: Path) -> str:
    """Run both processes to their end; what they printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    if backend == "gloo":  # the kernels in the interpreter, also where there is a GPU
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [folder / f"log{rank}" for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.distributed_training", backend, str(rank), folder / "init"]
        with log.open("w") as out:
            processes.append(
                subprocess.Popen([*command, folder / "results"], cwd=ROOT, env=environment, stdout=out, stderr=out)
            )
    end = time.monotonic() + LIMIT
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return "\n".join(log.read_text() for log in logs)


@pytest.fixture(
    scope="module",
    params=[
        "gloo",
        pytest.param(
            "nccl", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
        ),
    ],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one run for all workers: who makes the folder does it
        base = base.parent
    folder = base / f"distributed-{request.param}"
    done = folder / "done"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + LIMIT + 30
        while not done.exists() and time.monotonic() < end:
            time.sleep(0.1)
    else:
        said = start(request.param, folder)
        (folder / "said").write_text(said)
        (folder / "said").rename(done)
    if not (folder / "results").exists():
        pytest.fail(f"the two processes did not finish\n{done.read_text() if done.exists() else ''}")
    found: Results = torch.load(folder / "results")
    return found


def of(results: Results, name: str) -> Any:
    found = results[name]
    if "error" in found:
        pytest.fail(f"{name}\n{found['error']}")
    return found


def near(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert got[name].shape == t.shape and got[name].dtype == t.dtype, name
        rms, largest = errors(got[name], t)
        assert rms <= PARAMETER and largest <= ELEMENT, f"{name}: RMS error {rms:.2e}, largest {largest:.2e}"


def test_kernels_ran(results: Results) -> None:
    """Not PyTorch's operations in their place."""
    assert results["kernels ran"]


@pytest.mark.parametrize("training", TRAININGS)
def test_trains_as_with_torchs_norms(results: Results, training: str) -> None:
    """The same loss at every step, and the same parameters and running statistics after the last."""
    expected, got = of(results, f"{training}, torch"), of(results, f"{training}, normops")
    assert min(abs(a - b) for a, b in zip(expected["losses"], expected["losses"][1:], strict=False)) > 1e-2, "it learns"
    assert got["losses"] == pytest.approx(expected["losses"], rel=LOSS)
    near(got["parameters"], expected["parameters"])
    # A recomputation moves torch's running statistics once more, and ours not.
    without = of(results, f"{training.removesuffix(' checkpointed')}, torch")
    near(got["buffers"], without["buffers"])


@pytest.mark.parametrize("training", ["ddp without batch norm", "fsdp without batch norm"])
def test_a_split_batch_trains_as_the_whole(results: Results, training: str) -> None:
    """LayerNorm, RMSNorm and GroupNorm: torch's in one process, on the batches of both."""
    expected, got = of(results, "one process, torch"), of(results, f"{training}, normops")
    assert got["losses"] == pytest.approx(expected["losses"], rel=LOSS)
    near(got["parameters"], expected["parameters"])


@pytest.mark.parametrize("name", [*SHARDED, *GATHERED])
def test_dtensors_give_the_values_of_plain_tensors(results: Results, name: str) -> None:
    """y, x + pre_add, the statistics, and the gradients of all operands."""
    found = of(results, name)
    for i, (got, expected) in enumerate(zip(found["got"], found["expected"], strict=True)):
        check(f"output {i}", got, expected)
    assert found["gradients"].keys() == found["expected gradients"].keys()
    for operand, expected in found["expected gradients"].items():
        check(f"gradient of {operand}", found["gradients"][operand], expected)


@pytest.mark.parametrize("name", SHARDED)
def test_shards_of_a_kept_axis_stay_where_they_are(results: Results, name: str) -> None:
    """No process sends anything, forward or backward: y is sharded as x is, and so are the gradients of x, pre_add and
    post_add; those of parameters are partial sums, or sharded where the parameters vary along the axis.

    torch's LayerNorm, RMSNorm and InstanceNorm do so too; its GroupNorm raises in the backward of a sharded batch, and
    its BatchNorm gathers x in evaluation as well.
    """
    found, shard = of(results, name), f"shard {SHARDED[name]}"
    assert set(found["outputs"]) == {shard}
    for operand, placement in found["placements"].items():
        if operand in ("weight", "bias"):
            assert placement == ("shard 0" if name.endswith("by channels") else "partial"), operand
        else:
            assert placement == shard, operand
    assert found["collectives"] == 0


@pytest.mark.parametrize("name", GATHERED)
def test_shards_of_an_averaged_axis_are_gathered(results: Results, name: str) -> None:
    """Also where the pattern alone says that an axis is averaged over: another norm of the same operand, sharded, ran
    before.  An axis that the pattern splits, as GroupNorm's channels, counts as averaged over."""
    found = of(results, name)
    assert set(found["outputs"]) == {"replicate"}
    assert found["collectives"] > 0


@pytest.mark.parametrize("case", ["compiled", "sequence parallel"])
def test_dtensors_as_with_torchs_norms(results: Results, case: str) -> None:
    """In a compiled program, and under a plan of SequenceParallel: each process has a part of axis 1 and keeps it."""
    expected, got = of(results, f"{case}, torch"), of(results, f"{case}, normops")
    assert got["placement"] == expected["placement"] == "shard 1"
    assert got["got"].keys() == expected["got"].keys()
    for name, t in expected["got"].items():
        check(name, got["got"][name], t)


def test_import_leaves_dtensor_alone() -> None:
    """torch.distributed.tensor takes a second to import: only a call with a DTensor needs it."""
    code = "import sys, normops.nn; print('torch.distributed.tensor' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
