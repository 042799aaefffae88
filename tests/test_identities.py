"""Norms that must agree with each other, whatever the oracle says."""

from __future__ import annotations

import pytest
import torch

import normops
from normops import functional as F
from tests.tolerance import ENGINES, check, engine


@pytest.fixture(params=ENGINES, autouse=True)
def every_engine(request: pytest.FixtureRequest):
    with engine(request.param):
        yield


@pytest.fixture
def x(device: torch.device) -> torch.Tensor:
    return torch.randn(3, 4, 3, 5, device=device)


def test_one_group_is_layer_norm(x: torch.Tensor) -> None:
    check("y", F.group_norm(x, 1), F.layer_norm(x, x.shape[1:]).double())
    group = normops.normalize(x, "n (g c) h w -> n g", g=1, return_stats=True)
    layer = normops.normalize(x, (1, 2, 3), return_stats=True)
    check("mean", group[1].flatten(), layer[1].double(), scale=20)  # a mean of about a tenth of the deviation
    check("rstd", group[2].flatten(), layer[2].double())


def test_a_group_per_channel_is_instance_norm(x: torch.Tensor) -> None:
    w, b = torch.randn(4, device=x.device), torch.randn(4, device=x.device)
    check("y", F.group_norm(x, 4, w, b), F.instance_norm(x, weight=w, bias=b).double())


def test_batch_of_one_is_instance_norm(x: torch.Tensor) -> None:
    w, b = torch.randn(4, device=x.device), torch.randn(4, device=x.device)
    batch = F.batch_norm(x[:1], None, None, w, b, training=True)
    check("y", batch, F.instance_norm(x[:1], weight=w, bias=b).double())


def test_rms_of_centred_input_is_layer_norm(x: torch.Tensor) -> None:
    centred = (x.double() - x.double().mean(-1, keepdim=True)).float()
    check("y", F.rms_norm(centred, (5,), eps=1e-5), F.layer_norm(centred, (5,), eps=1e-5).double(), scale=5)


def test_layer_norm_2d_is_layer_norm_of_the_transpose(x: torch.Tensor) -> None:
    check("y", normops.normalize(x, (1,)), F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2).double())


def test_eval_with_the_batch_s_statistics_is_train(x: torch.Tensor) -> None:
    var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
    check("y", F.batch_norm(x, mean, var), F.batch_norm(x, None, None, training=True).double(), scale=5)


def test_scale_and_shift_cancel(x: torch.Tensor) -> None:
    """norm(4 x) = norm(x) exactly, with eps scaled along: powers of two round alike."""
    assert torch.equal(normops.normalize(4 * x, (0, 2), eps=16e-5), normops.normalize(x, (0, 2), eps=1e-5))


def test_gradient_is_orthogonal(x: torch.Tensor) -> None:
    """dx sums to zero over a group, and nearly so against x_hat (eps = 0)."""
    x = x.requires_grad_()
    y = normops.normalize(x, (1, 2), eps=0.0)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    scale = dx.abs().sum((1, 2)).double()
    assert (dx.double().sum((1, 2)).abs() < 1e-5 * scale).all()
    assert ((dx.double() * y.detach().double()).sum((1, 2)).abs() < 1e-5 * scale).all()
