"""``torch.onnx.export`` as users call it: ONNX's own nodes, and the numbers of the model in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normops
from normops import functional as F
from normops import nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
if torch.cuda.is_available():
    pytest.skip("exports CPU models", allow_module_level=True)


class Called(torch.nn.Module):
    """A function of x, a weight and a bias."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = torch.nn.Parameter(torch.rand(8) + 0.5), torch.nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function(x, self.weight, self.bias)
        return found


PATTERN = {"affine": "(g c)", "g": 2, "activation": "gelu"}
# name: (model, shape of x, nodes that must be there)
MODELS: dict[str, tuple[torch.nn.Module, tuple[int, ...], set[str]]] = {
    "layer": (nn.LayerNorm(8), (4, 5, 8), {"LayerNormalization"}),
    "rms": (nn.RMSNorm(8, eps=1e-6), (4, 8), {"RMSNormalization"}),
    "group, silu": (nn.GroupNorm(2, 8, activation="silu"), (2, 8, 5, 3), {"GroupNormalization", "Sigmoid"}),
    "batch, relu": (nn.BatchNorm2d(8, activation="relu"), (2, 8, 5, 3), {"BatchNormalization", "Relu"}),
    "instance": (nn.InstanceNorm2d(8, affine=True), (2, 8, 5, 3), {"InstanceNormalization"}),
    "instance, running": (nn.InstanceNorm1d(8, track_running_stats=True), (2, 8, 5), {"BatchNormalization"}),
    "channels": (nn.LayerNorm2d(8), (2, 8, 5, 3), set()),
    "pattern": (
        Called(lambda x, w, b: normops.normalize(x, "n (g c) h w -> n g", w, b, **PATTERN)), (2, 8, 5, 3), {"Gelu"}
    ),
    "additions": (
        Called(lambda x, w, b: torch.cat(F.layer_norm(x, (8,), w, b, pre_add=2 * x, post_add=x, activation="tanh"))),
        (4, 8), {"LayerNormalization", "Tanh"},
    ),
    "rounded first": (Called(lambda x, w, b: F.rms_norm(x, (8,), w, 1e-6, round_first=True)), (4, 8), set()),
    "mixed dtypes": (Called(lambda x, w, b: F.layer_norm(x.half(), (8,), w, b)), (4, 8), set()),
    "other dtype": (
        Called(lambda x, w, b: F.layer_norm(x, (8,), w, b, out_dtype=torch.float16)), (4, 8), {"LayerNormalization"}
    ),
    "converted": (
        normops.convert(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.GroupNorm(4, 8), torch.nn.SiLU())),
        (2, 8, 5, 5), {"Conv", "GroupNormalization", "Sigmoid"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_exported(name: str, tmp_path: Path) -> None:
    model, shape, nodes = MODELS[name]
    model, x, file = torch.nn.Sequential(model).eval(), torch.randn(shape), str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=True, opset_version=23, verbose=False)
    assert nodes <= {node.op_type for node in onnx.load(file).graph.node}
    agree(file, model, x)


@pytest.mark.parametrize("name", ["layer", "rms", "group, silu", "batch, relu", "pattern"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exported_by_torch_jit(name: str, tmp_path: Path) -> None:
    model, shape, _ = MODELS[name]
    model, x, file = torch.nn.Sequential(model).eval(), torch.randn(shape), str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=False)
    agree(file, model, x)


def agree(file: str, model: torch.nn.Module, x: Tensor) -> None:
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    # two libraries' sums and exponentials; of float16 a rounding
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=tolerance, atol=tolerance)
