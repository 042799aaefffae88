"""The four norms on (5, 256, 32, 32), as patterns and as modules, beside the formula in plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import normops
from normops import nn

SHAPE = (5, 256, 32, 32)
NORMS = {
    # pattern, its lengths, module, reduced axes, groups
    "batch": ("n c h w -> c", {}, lambda: nn.BatchNorm2d(256), (0, 2, 3)),
    "layer": ("n c h w -> n", {}, lambda: nn.LayerNorm(SHAPE[1:]), (1, 2, 3)),
    "instance": ("n c h w -> n c", {}, lambda: nn.InstanceNorm2d(256, affine=True), (2, 3)),
    "group": ("n (g c) h w -> n g", {"g": 32}, lambda: nn.GroupNorm(32, 256), (2, 3, 4)),
}


def formula(x: torch.Tensor, name: str) -> torch.Tensor:
    h = x.reshape(5, 32, 8, 32, 32) if name == "group" else x
    axes = NORMS[name][3]
    var, mean = torch.var_mean(h, axes, unbiased=False, keepdim=True)
    return ((h - mean) / torch.sqrt(var + 1e-5)).reshape(x.shape)


@pytest.mark.parametrize("name", NORMS)
def test_pattern(name: str, device: torch.device) -> None:
    x = torch.randn(SHAPE, device=device)
    pattern, lengths, _, _ = NORMS[name]
    assert torch.allclose(normops.normalize(x, pattern, **lengths), formula(x, name), atol=1e-5)


@pytest.mark.parametrize("name", NORMS)
def test_module(name: str, device: torch.device) -> None:
    x = torch.randn(SHAPE, device=device)
    module = NORMS[name][2]().to(device)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    view = SHAPE[1:] if name == "layer" else (256, 1, 1)
    expected = formula(x, name) * module.weight.view(view) + module.bias.view(view)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, atol=1e-5)
