"""Running statistics move as torch.lerp does: by no difference that cancels, whatever momentum and their size, in every
engine and layout, with kernels and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normops import functional as F
from normops import nn, reference
from normops.norm import parse
from tests.tolerance import ENGINES, engine

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE = (5, 8, 6, 6)


def near(found: Tensor, exact: Tensor, what: str) -> None:
    """To some roundings of fp32: of the mean of the deviations, of their squares, of the step itself."""
    worst = ((found.double() - exact) / exact).abs().max().item()
    assert worst < 2e-6, f"{what}: {worst:.1e} of it"


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("momentum", [1.0, 0.9, 0.1])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_batch_norm(how: str, layout: str, momentum: float, scale: float, device: torch.device) -> None:
    """From a running variance of 1 to one that is 1e8 times smaller or larger."""
    x = (torch.randn(SHAPE, device=device) * scale).contiguous(memory_format=FORMATS[layout])
    mean, var = torch.zeros(8, device=device), torch.ones(8, device=device)
    with engine(how):
        F.batch_norm(x, mean, var, training=True, momentum=momentum)
    exact = x.double().var((0, 2, 3))
    near(var, 1 + momentum * (exact - 1), "running_var")
    assert torch.allclose(mean.double(), momentum * x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6 * scale)


def test_the_first_batch_of_a_cumulative_average(device: torch.device) -> None:
    norm = nn.BatchNorm1d(4, momentum=None).to(device)
    x = torch.randn(64, 4, device=device) * 1e-4
    norm(x)
    assert norm.running_var is not None
    near(norm.running_var, x.double().var(0), "running_var")


def test_a_variance_far_below_eps_without_kernels() -> None:
    """The variance is that of the deviations, and not taken back from 1/sqrt(var + eps), which has lost it."""
    x = torch.randn(64, 4) * 1e-6 + 3
    found = reference.variance(parse("n c -> c", x.shape, None, None), x)
    near(found, x.double().var(0, correction=0), "variance")


PLAIN = """
import torch
from normops import nn
for make, axes, ranks in ((nn.BatchNorm1d, (0,), (64, 4)), (nn.InstanceNorm1d, (2,), (3, 4, 64))):
    for affine in (True, False):
        x = torch.randn(ranks) * 1e-6
        norm = make(4, momentum=1.0, affine=affine, track_running_stats=True)
        norm(x)
        exact = x.double().var(axes).reshape(-1, 4).mean(0)
        worst = ((norm.running_var - exact) / exact).abs().max().item()
        assert worst < 2e-6, (make, worst)
print("right")
"""


def test_without_kernels(plain: Callable[[str], str]) -> None:
    assert plain(PLAIN) == "right"


def test_refused_batches_move_nothing(device: torch.device) -> None:
    norm = nn.BatchNorm1d(4).to(device)
    x, running = torch.randn(3, 4, device=device), [t for t in norm.buffers() if t.dim()]
    with pytest.raises(RuntimeError, match="weight"):
        F.batch_norm(x, *running, torch.ones(3, device=device), training=True)
    assert torch.equal(torch.stack(running), torch.tensor([[0.0], [1.0]], device=device).expand(2, 4))
