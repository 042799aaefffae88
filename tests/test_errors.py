# ruff: noqa: E501  (tables)
"""Bad input: PyTorch's exception type, a message that names argument, value and expectation, nothing modified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import normops
from normops import functional as F

X = torch.zeros(2, 6, 3, 3)
META = torch.zeros(6, device="meta")

# name: (call, exception, what the message contains)
BAD: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception], tuple[str, ...]]] = {
    "groups do not divide": (lambda x: F.group_norm(x, 4), RuntimeError, ("divisible by num_groups", "4", "6")),
    "no groups": (lambda x: F.group_norm(x, 0), RuntimeError, ("num_groups", "greater than 0", "0")),
    "group weight": (lambda x: F.group_norm(x, 2, x.new_ones(5)), RuntimeError, ("weight", "(6,)", "(5,)")),
    "group bias": (lambda x: F.group_norm(x, 2, None, x.new_ones(5)), RuntimeError, ("bias", "(6,)", "(5,)")),
    "batch weight": (lambda x: F.batch_norm(x, None, None, x.new_ones(5), None, True), RuntimeError, ("weight", "(6,)", "(5,)")),
    "instance bias": (lambda x: F.instance_norm(x, bias=x.new_ones(6, 1)), RuntimeError, ("bias", "(6,)", "(6, 1)")),
    "layer shape": (lambda x: F.layer_norm(x, (4,)), RuntimeError, ("normalized_shape", "[4]", "[2, 6, 3, 3]")),
    "layer weight": (lambda x: F.layer_norm(x, (3,), x.new_ones(2)), RuntimeError, ("weight", "(3,)", "(2,)")),
    "rms weight": (lambda x: F.rms_norm(x, (3,), x.new_ones(2)), RuntimeError, ("weight", "(3,)", "(2,)")),
    "weight does not broadcast": (lambda x: normops.normalize(x, (1,), x.new_ones(5)), RuntimeError, ("weight", "(5,)", "(2, 6, 3, 3)")),
    "axis out of range": (lambda x: normops.normalize(x, (4,)), IndexError, ("axes", "[-4, 3]", "4")),
    "axis below range": (lambda x: normops.normalize(x, -5), IndexError, ("axes", "[-4, 3]", "-5")),
    "repeated axis": (lambda x: normops.normalize(x, (1, -3)), RuntimeError, ("axes", "distinct", "(1, -3)")),
    "no axes": (lambda x: normops.normalize(x, ()), ValueError, ("axes", "()")),
    "axis is no int": (lambda x: normops.normalize(x, (1.5,)), TypeError, ("axes", "1.5")),
    "lengths with ints": (lambda x: normops.normalize(x, (1,), g=3), TypeError, ("'g'", "pattern")),
    "integer tensor": (lambda x: normops.normalize(x.long(), (1,)), TypeError, ("x", "float32", "torch.int64")),
    "integer weight": (lambda x: F.group_norm(x, 2, x.new_ones(6).long()), TypeError, ("weight", "float32", "torch.int64")),
    "no tensor": (lambda x: F.layer_norm([1.0], (1,)), TypeError, ("x", "Tensor", "list")),
    "pattern rank": (lambda x: normops.normalize(x, "n c l -> n"), ValueError, ("'n c l -> n'", "3 axes", "4")),
    "pattern length": (lambda x: normops.normalize(x, "n (g c) h w -> n g", g=4), ValueError, ("size 6", "multiple of 4", "g=4")),
    "pattern name": (lambda x: normops.normalize(x, "n c h w -> k"), ValueError, ("'k'", "right side")),
    "pattern affine": (lambda x: normops.normalize(x, "n c h w -> n", x.new_ones(5), affine="c"), RuntimeError, ("weight", "(6,)", "(5,)")),
    "one value per channel": (lambda x: F.batch_norm(x[:1, :, :1, :1], None, None, training=True), ValueError, ("more than 1 value per channel", "[1, 6, 1, 1]")),
    "one value per instance": (lambda x: F.instance_norm(x[..., :1, :1]), ValueError, ("more than 1 spatial element", "[2, 6, 1, 1]")),
    "one value per group": (lambda x: F.group_norm(x[:1, :, :1, :1], 6), ValueError, ("more than 1 value per channel", "[1, 6, 1, 1]")),
    "weight elsewhere": (lambda x: F.group_norm(x, 2, META), RuntimeError, ("weight", "device", "meta", "cpu")),
    "running statistics elsewhere": (lambda x: F.batch_norm(x, META, META, training=True), RuntimeError, ("running_mean", "device", "meta")),
    "pre_add elsewhere": (lambda x: F.layer_norm(x, (3,), pre_add=META[:3]), RuntimeError, ("pre_add", "device", "meta")),
    "one running statistic": (lambda x: F.batch_norm(x, x.new_zeros(6), None, training=True), RuntimeError, ("running_mean", "running_var", "both")),
    "no running statistics in eval": (lambda x: F.batch_norm(x, None, None), RuntimeError, ("running_mean", "training=False")),
    "unknown activation": (lambda x: F.group_norm(x, 2, activation="swich"), ValueError, ("activation", "'swich'", "silu")),
    "pre_add does not broadcast": (lambda x: F.group_norm(x, 2, pre_add=x.new_ones(5, 1, 1)), RuntimeError, ("pre_add", "(2, 6, 3, 3)", "(5, 1, 1)")),
    "post_add is larger": (lambda x: F.layer_norm(x, (3,), post_add=x.new_ones(1, 2, 6, 3, 3)), RuntimeError, ("post_add", "(2, 6, 3, 3)", "(1, 2, 6, 3, 3)")),
    "pattern without affine": (lambda x: normops.normalize(x, "n c h w -> c", x.new_ones(3)), ValueError, ("'n c h w -> c'", "affine", "None")),
    "bias in the place of eps": (lambda x: F.rms_norm(x, (3,), x.new_ones(3), x.new_ones(3)), TypeError, ("rms_norm", "eps", "float", "(3,)")),
    "groups are no int": (lambda x: F.group_norm(x, 2.0), TypeError, ("num_groups", "int", "2.0")),
    "normalized_shape is no int": (lambda x: F.layer_norm(x, (3.0,)), TypeError, ("normalized_shape", "int", "3.0")),
    "length is no int": (lambda x: normops.normalize(x, "n (g c) h w -> n g", g="2"), TypeError, ("g", "int", "'2'")),
    "misspelt, with a pattern": (lambda x: normops.normalize(x, "n c h w -> n", esp=1e-5), ValueError, ("esp=1e-05", "did you mean eps")),
    "misspelt, with axes": (lambda x: normops.normalize(x, 1, activaton="relu"), TypeError, ("'activaton'", "did you mean activation")),
    "batch rank": (lambda x: F.batch_norm(x[0, 0, 0], None, None, training=True), RuntimeError, ("input", "2 axes", "(3,)")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_message(name: str, device: torch.device) -> None:
    call, kind, parts = BAD[name]
    with pytest.raises(kind) as caught:
        call(X.to(device))
    assert caught.type is kind
    for part in parts:
        assert part.replace("cpu", device.type) in str(caught.value)


TORCH = torch.nn.functional


@pytest.mark.parametrize(("ours", "theirs"), [
    (lambda x: F.group_norm(x, 4), lambda x: TORCH.group_norm(x, 4)),
    (lambda x: F.group_norm(x, 2, x.new_ones(5)), lambda x: TORCH.group_norm(x, 2, x.new_ones(5))),
    (lambda x: F.layer_norm(x, (4,)), lambda x: TORCH.layer_norm(x, (4,))),
    (lambda x: F.layer_norm(x, (3,), x.new_ones(2)), lambda x: TORCH.layer_norm(x, (3,), x.new_ones(2))),
    (lambda x: F.batch_norm(x, None, None), lambda x: TORCH.batch_norm(x, None, None)),
    (lambda x: F.batch_norm(x, x.new_ones(5), x.new_ones(5)), lambda x: TORCH.batch_norm(x, x.new_ones(5), x.new_ones(5))),
    (lambda x: F.batch_norm(x[:1, :, :1, :1], None, None, training=True), lambda x: TORCH.batch_norm(x[:1, :, :1, :1], None, None, training=True)),
    (lambda x: F.instance_norm(x[..., :1, :1]), lambda x: TORCH.instance_norm(x[..., :1, :1])),
    (lambda x: normops.normalize(x, (4,)), lambda x: x.mean((4,))),
    (lambda x: normops.normalize(x, (1, -3)), lambda x: x.mean((1, -3))),
    (lambda x: F.group_norm(x, 2, pre_add=x.new_ones(5, 1, 1)), lambda x: x + x.new_ones(5, 1, 1)),
])  # fmt: skip
def test_type_is_torch_s(ours: Any, theirs: Any) -> None:
    with pytest.raises(Exception) as expected:
        theirs(X)
    with pytest.raises(expected.type) as caught:
        ours(X)
    assert caught.type is expected.type


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("bad", [
    {"weight": torch.ones(5)}, {"bias": torch.ones(5)}, {"activation": "swich"}, {"pre_add": torch.ones(5, 1, 1)},
    {"post_add": torch.ones(7)}, {"weight": META}, {"momentum": None}, {"small": True}, {"integer": True},
], ids=lambda d: next(iter(d)))  # fmt: skip
def test_running_statistics_are_untouched(norm: str, bad: dict[str, Any], device: torch.device) -> None:
    bad = {k: v.to(device) if isinstance(v, torch.Tensor) and v.device.type != "meta" else v for k, v in bad.items()}
    x = torch.randn(2, 6, 3, 3, device=device)
    x = x[:1, :, :1, :1] if bad.pop("small", False) else x
    x = x.long() if bad.pop("integer", False) else x
    rm, rv = torch.randn(6, device=device), torch.rand(6, device=device)
    before = rm.clone(), rv.clone()
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        if norm == "batch":
            F.batch_norm(x, rm, rv, training=True, **bad)
        else:
            F.instance_norm(x, rm, rv, **bad)
    assert torch.equal(rm, before[0]) and torch.equal(rv, before[1])


@pytest.mark.parametrize("training", [True, False])
def test_running_mean_of_the_wrong_size(training: bool, device: torch.device) -> None:
    rm, rv = torch.zeros(5, device=device), torch.ones(5, device=device)
    with pytest.raises(RuntimeError, match=r"running_mean must have shape \(6,\).*got \(5,\)"):
        F.batch_norm(X.to(device), rm, rv, training=training)
    assert torch.equal(rm, torch.zeros_like(rm)) and torch.equal(rv, torch.ones_like(rv))


def test_module_leaves_no_trace(device: torch.device) -> None:
    bn = normops.nn.BatchNorm2d(6).to(device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn(torch.zeros(1, 6, 1, 1, device=device))
    with pytest.raises(ValueError, match="expected 4D input"):
        bn(torch.zeros(2, 6, 3, device=device))
    assert bn.num_batches_tracked == 0 and not bn.running_mean.any() and torch.equal(bn.running_var, torch.ones_like(bn.running_var))


def test_module_arguments() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swich'"):
        normops.nn.GroupNorm(2, 6, activation="swich")
    with pytest.raises(ValueError, match=r"unknown activation LeakyReLU\(negative_slope=0.2\)"):
        normops.nn.GroupNorm(2, 6, activation=torch.nn.LeakyReLU(0.2))
    with pytest.raises(ValueError, match=r"num_channels \(6\) must be divisible by num_groups \(4\)"):
        normops.nn.GroupNorm(4, 6)
    with pytest.raises(ValueError, match="needs the lengths"):
        normops.nn.Normalize("n c -> n", affine="c")
    with pytest.raises(ValueError, match=r"expected input of shape \(N, 6, ...\)"):
        normops.nn.LayerNorm2d(6)(torch.zeros(2, 5, 3, 3))
