"""What a call will do, in words and figures: every public function and module, both directions, and other code.

Run as a program (the compiler needs a process without the interpreter), this file prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import normops
from normops import functional as F
from normops import nn, schedule
from normops.testing import Explanation, explain

ROOT = Path(__file__).resolve().parents[1]
BOUNDS = {"issue", "memory", "latency", "launches"}


def images(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape or (4, 64, 32, 32), dtype=torch.bfloat16, requires_grad=grad)


X, ROWS, VOLUME = images(), images(512, 256), images(2, 16, 8, 8, 8)
C, D = torch.empty(64, requires_grad=True), torch.empty(256, requires_grad=True)
RUNNING = torch.empty(64), torch.empty(64)

CALLS: dict[str, Callable[[], Any]] = {
    "batch_norm": lambda: F.batch_norm(X, *RUNNING, C, C, training=True, activation="relu"),
    "batch_norm in evaluation": lambda: F.batch_norm(X, *RUNNING, C, C),
    "instance_norm": lambda: F.instance_norm(X, None, None, C, C),
    "group_norm": lambda: F.group_norm(X, 8, C, C),
    "layer_norm": lambda: F.layer_norm(ROWS, (256,), D, D),
    "rms_norm": lambda: F.rms_norm(ROWS, (256,), D),
    "normalize": lambda: normops.normalize(X, "n c h w -> n h w", C, C, affine="c", activation="silu", pre_add=X),
    "BatchNorm1d": lambda: nn.BatchNorm1d(256)(ROWS),
    "BatchNorm2d": lambda: nn.BatchNorm2d(64)(X.to(memory_format=torch.channels_last)),
    "BatchNorm3d": lambda: nn.BatchNorm3d(16)(VOLUME),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(64, affine=True)(X),
    "InstanceNorm3d": lambda: nn.InstanceNorm3d(16)(VOLUME),
    "GroupNorm": lambda: nn.GroupNorm(8, 64)(X),
    "LayerNorm": lambda: nn.LayerNorm(256)(ROWS),
    "LayerNorm2d": lambda: nn.LayerNorm2d(64)(X),
    "RMSNorm": lambda: nn.RMSNorm(256)(ROWS),
    "Normalize": lambda: nn.Normalize("n (g c) h w -> n g", affine="(g c)", g=8, c=8)(X),
    "a model": lambda: torch.nn.Sequential(torch.nn.Linear(256, 256), nn.LayerNorm(256), nn.RMSNorm(256))(ROWS.float()),
}


FORWARD_ONLY = {"BatchNorm3d", "InstanceNorm3d", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm2d", "Normalize"}
"""Their backward is left out, for time: other calls show one of the same kind."""


def figures(found: Explanation) -> list[dict[str, Any]]:
    return [
        {
            "name": d.name, "engine": d.engine, "floor_us": d.floor_us, "predicted_us": d.predicted_us,
            "bound": d.bound, "of_floor": d.of_floor, "per_element": d.per_element(), "passes": d.passes,
            "mufu": d.per_element("mufu"),
            "hbm": d.hbm.bytes, "floor": d.floor_bytes, "launches": [launch.name for launch in d.launches],
            "others": d.others, "text": str(d), "calibrated": None if d.prediction is None else d.prediction.calibrated,
        }
        for d in found
    ]  # fmt: skip


def error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def backward_and_return() -> torch.Tensor:
    y = F.layer_norm(ROWS, (256,))
    y.sum().backward()
    return y


def explain_all() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, call in CALLS.items():
        with torch.set_grad_enabled(name not in FORWARD_ONLY):
            found[name] = figures(explain(call))
    found["without gradients"] = figures(explain(lambda: F.layer_norm(ROWS.detach(), (256,))))
    found["its own backward"] = figures(explain(lambda: F.layer_norm(ROWS, (256,)).sum().backward()))
    found["returned after its own backward"] = figures(explain(backward_and_return))
    hidden = ROWS.float().exp().bfloat16()
    for _ in range(2):
        found["of a graph"] = figures(explain(lambda: F.layer_norm(hidden, (256,))))
    hidden.sum().backward()  # the graph is still there
    found["a list"] = figures(explain(lambda: {"y": [F.layer_norm(ROWS, (256,)), None, 3]}))
    found["empty"] = figures(explain(lambda: F.layer_norm(images(0, 256), (256,))))
    with schedule.forced(engine="split"):
        found["split"] = figures(explain(CALLS["group_norm"], device="b200"))
    found["compared"] = figures(explain(CALLS["group_norm"], compare=True))
    found["amd"] = figures(explain(CALLS["group_norm"], device="mi300x"))
    ROWS.grad = None
    explain(CALLS["layer_norm"])
    return found | {
        "no gradient is left": ROWS.grad is None and D.grad is None,
        "nothing": str(explain(lambda: X)),
        "whole": str(explain(CALLS["layer_norm"])),
        "nested": error(lambda: explain(lambda: explain(CALLS["layer_norm"]))),
        "meta": error(lambda: explain(lambda: F.layer_norm(ROWS.to("meta"), (256,)))),
        "unknown": error(lambda: explain(CALLS["layer_norm"], device="h1000")),
        "fails": error(lambda: explain(lambda: F.layer_norm(ROWS, (255,)))),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, __file__], env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CALLS)
def test_every_function_and_module_is_explained(name: str, found: dict[str, Any]) -> None:
    calls = found[name]
    want = ["forward", "backward"] if name != "a model" else ["forward", "forward", "backward", "backward"]
    want = want[:1] if name in FORWARD_ONLY else want
    assert [call["name"] for call in calls] == want
    for call in calls:
        assert call["bound"] in BOUNDS and call["calibrated"] and call["launches"]
        assert call["of_floor"] == pytest.approx(call["floor_us"] / call["predicted_us"]) and 0 < call["of_floor"] < 1.3
        assert call["hbm"] >= call["floor"] > 0 and call["passes"] >= 1
        assert call["per_element"] > call["mufu"] >= 0
        lines = call["text"].splitlines()
        assert lines[0].startswith(f"{call['name']}: {call['engine']}, ") and len(lines) == len(call["launches"]) + 4
        assert f"{call['predicted_us']:.1f} us, {call['of_floor']:.2f} of the floor" in lines[-1]
        assert lines[-1].endswith(f"bound by {call['bound']}") and "predicted on NVIDIA H100" in lines[-1]


def test_directions_that_ran_are_explained(found: dict[str, Any]) -> None:
    assert [call["name"] for call in found["without gradients"]] == ["forward"]
    for name in ("its own backward", "a list", "returned after its own backward", "of a graph"):
        assert [call["name"] for call in found[name]] == ["forward", "backward"]
    assert found["empty"] == [] and found["nothing"] == "no call of normops launched anything"
    assert found["no gradient is left"]


def test_the_whole_is_the_text_of_its_directions(found: dict[str, Any]) -> None:
    assert found["whole"] == "\n".join(call["text"] for call in found["layer_norm"])


def test_other_schedules_and_devices(found: dict[str, Any]) -> None:
    forward, backward = found["split"]
    assert forward["engine"] == backward["engine"] == "split" and len(forward["launches"]) == 3
    assert not forward["calibrated"] and "predicted, uncalibrated on NVIDIA B200" in forward["text"]
    forward, _ = found["amd"]
    assert forward["predicted_us"] is forward["bound"] is forward["per_element"] is None
    assert "predicted" not in forward["text"] and "floor on AMD Instinct MI300X" in forward["text"]


def test_other_engines_are_compared(found: dict[str, Any]) -> None:
    for alone, compared in zip(found["group_norm"], found["compared"], strict=True):
        assert not alone["others"] and compared["predicted_us"] == alone["predicted_us"]
        assert {compared["engine"], *compared["others"]} == set(schedule.ENGINES)
        lines = compared["text"].splitlines()
        assert "\n".join(lines[:-2]) == alone["text"]
        for line, (engine, us) in zip(lines[-2:], compared["others"].items(), strict=True):
            factor = us / compared["predicted_us"]
            assert line == f"  by the engine {engine}: {us:.1f} us, {factor:.2f} times as long"


def test_errors(found: dict[str, Any]) -> None:
    assert found["unknown"].startswith("ValueError: device must be one of a100, ")
    assert found["meta"] == (
        "ValueError: call must compute with CPU tensors (torch.empty costs nothing), got a result on meta"
    )
    assert found["nested"].startswith("RuntimeError: call must not explain")
    assert found["fails"].startswith("RuntimeError: ") and "255" in found["fails"]


def test_the_interpreter_compiles_nothing() -> None:
    if normops.calls.INTERPRETED:
        with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
            explain(lambda: F.layer_norm(torch.randn(2, 4), (4,)))


if __name__ == "__main__":
    print(json.dumps(explain_all()))
