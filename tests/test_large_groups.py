"""Groups that fill a program: held on chip as they came, forward and backward, at their real size."""

from __future__ import annotations

import pytest
import torch

import normops
from normops import functional as F
from normops.kernels.resident import grad_group, grad_normalize
from normops.testing import plans
from tests.tolerance import check, leaf, oracle

# (groups of a GroupNorm, or 0 for a BatchNorm; shape; activation): more than half as many groups as SMs.
LARGE = [
    (35, (2, 700, 32, 32), "silu"),  # 20 planes, a tile in one piece
    (35, (2, 350, 64, 64), "silu"),  # ten planes of one access
    (0, (25, 70, 28, 28), "relu"),
    (0, (1, 70, 150, 150), None),
]


@pytest.mark.parametrize(("groups", "shape", "activation"), LARGE, ids=str)
def test_large_groups_stay_on_chip(
    groups: int, shape: tuple[int, ...], activation: str | None, device: torch.device
) -> None:
    x = torch.randn(shape, device=device).add(3).to(torch.bfloat16).requires_grad_()
    w, b = (torch.randn(shape[1], device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(shape, device=device).to(torch.bfloat16)
    with plans() as planned:
        if groups:
            y = F.group_norm(x, groups, w, b, activation=activation)
        else:
            y = F.batch_norm(x, None, None, w, b, training=True, activation=activation)
        got = torch.autograd.grad(y, (x, w, b), dy)
    assert [p.plan.engine for p in planned] == ["resident", "resident"]
    assert planned[1].plan.launches[0].kernel is grad_group
    exact = [leaf(t) for t in (x, w, b)]
    parameters = (t.reshape(1, -1, 1, 1) for t in exact[1:])
    axes = (2, 3, 4) if groups else (0, 2, 3)
    ref, _ = oracle(exact[0], axes, *parameters, activation=activation, groups=groups or None)
    # Of a million elements the largest lie further out, and are rounded as much more coarsely.
    check("y", y, ref, scale=2)
    for name, ours, theirs in zip("xwb", got, torch.autograd.grad(ref, exact, dy.double()), strict=True):
        check("d" + name, ours, theirs, scale=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
# Whole lanes and not, a batch that sticks out, more channels than a piece and fewer, odd ones.
@pytest.mark.parametrize(
    "shape", [(3, 96, 8, 8), (5, 40, 12, 12), (2, 130, 28, 12), (3, 248, 14, 14), (1, 9, 8, 40), (3, 150, 7, 7),
              (2, 40, 5, 9)], ids=str,
)  # fmt: skip
def test_channels_across_memory(
    shape: tuple[int, ...], activation: str | None, dtype: torch.dtype, device: torch.device
) -> None:
    """LayerNorm over the channels of contiguous images: dw and db are kept of each lane."""
    x = torch.randn(shape, device=device).add(1).to(dtype).requires_grad_()
    w, b = (torch.randn(shape[1], device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    dy = torch.randn(shape, device=device).to(dtype)
    with plans() as planned:
        y = normops.normalize(x, "n c h w -> n h w", w, b, affine="c", activation=activation)
        got = torch.autograd.grad(y, (x, w, b), dy)
    (launch,) = (n for n in planned[1].plan.launches if n.kernel is grad_normalize)
    assert launch.form.PIECES_A and (launch.form.LANE > 1) == (shape[2] * shape[3] % 4 == 0)
    exact = [leaf(t) for t in (x, w, b)]
    parameters = (t.reshape(1, -1, 1, 1) for t in exact[1:])
    ref, _ = oracle(exact[0], (1,), *parameters, activation=activation)
    check("y", y, ref, scale=2)
    for name, ours, theirs in zip("xwb", got, torch.autograd.grad(ref, exact, dy.double()), strict=True):
        check("d" + name, ours, theirs, scale=2)
