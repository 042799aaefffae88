"""The oracle of the tests, the formula in float64 and plain torch, and how far from it a result may lie.

The error of a tensor is measured against the RMS of the oracle: its own RMS (systematic errors), and its largest
element (one wrong element in a large tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as TF
from torch import Tensor

from normops import calls, schedule

# (RMS, largest) error over the RMS of the oracle.
TOLERANCE = {
    # Sums of at most a few thousand terms: rounding of 2^-53 grows to about 1e-14; erf and tanh add a few ulp.
    torch.float64: (1e-12, 1e-11),
    # eps = 1.2e-7: a handful of roundings in a row; terms of a sum are up to 5 times its RMS.
    torch.float32: (2e-6, 1e-5),
    # Arithmetic is fp32, so the one rounding of the result counts: half an ulp is 2^-11, relative to elements that
    # are up to 8 RMS large.
    torch.float16: (2.0**-11, 2.0**-8),
    # As fp16, with half an ulp of 2^-8 on a GPU; Triton's interpreter cuts bfloat16 off instead of rounding it to the
    # nearest: a whole ulp, 2^-7.
    torch.bfloat16: (2.0**-7, 2.0**-4) if calls.INTERPRETED else (2.0**-8, 2.0**-5),
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": TF.relu,
    "leaky_relu": partial(TF.leaky_relu, negative_slope=0.01),
    "silu": TF.silu,
    "gelu": TF.gelu,
    "gelu_tanh": partial(TF.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": TF.hardswish,
}


def errors(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """(RMS, largest) error over the RMS of `expected`."""
    difference = got.detach().double().cpu() - expected.detach().double().cpu()
    rms = expected.detach().double().cpu().square().mean().sqrt().clamp_min(1e-30)
    return float(difference.square().mean().sqrt() / rms), float(difference.abs().max() / rms)


def check(
    name: str, got: Tensor | None, expected: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None
) -> None:  # fmt: skip
    """Assert that `got` is `expected` within the tolerance of its dtype (or a coarser `dtype`), times `scale`."""
    assert got is not None, f"{name} is missing"
    assert got.shape == expected.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    rms, largest = errors(got, expected)
    limit_rms, limit_largest = TOLERANCE[dtype or got.dtype]
    assert rms <= limit_rms * scale, f"{name}: RMS error {rms:.2e} > {limit_rms * scale:.2e}"  # NaN fails as well
    assert largest <= limit_largest * scale, f"{name}: largest error {largest:.2e} > {limit_largest * scale:.2e}"


def oracle(
    x: Tensor, axes: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5,
    center: bool = True, activation: str | None = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
    groups: int | None = None, mean: Tensor | None = None, var: Tensor | None = None, 
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, s) in float64; weight, bias, mean and var broadcast.  With `groups`, axes count (N, g, C/g, *).

    `total` is the rounded sum that a call returned (to be checked on its own): the statistics are those of that one,
    while the gradient is that of the plain sum.
    """
    s = x if pre_add is None else x + pre_add
    if total is not None:
        s = s + (total.double() - s).detach()
    h = s if groups is None else s.reshape(s.shape[0], groups, s.shape[1] // groups, *s.shape[2:])
    if mean is None and center:
        mean = h.mean(tuple(axes), keepdim=True)
    h = h if mean is None else h - mean
    h = h / (h.square().mean(tuple(axes), keepdim=True) if var is None else var).add(eps).sqrt()
    h = h.reshape(x.shape)
    h = h if weight is None else h * weight
    for term in (bias, post_add):
        h = h if term is None else h + term
    return ACTIVATIONS[activation or "identity"](h), s


def leaf(t: Tensor | None) -> Tensor | None:
    """A float64 copy for the oracle to differentiate."""
    return None if t is None else t.detach().double().clone().requires_grad_()


FORMATS = ("contiguous", "channels_last", "channels_last_3d", "permuted", "sliced")


def laid_out(shape: Sequence[int], layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random tensor of a shape in a memory layout."""
    rank = len(shape)
    if layout == "sliced":  # every second element of an axis, from a larger tensor
        return torch.randn(*shape[:-2], shape[-2] + 2, 2 * shape[-1]).to(device, dtype)[..., 1:-1, ::2]
    t = torch.randn(*shape).to(device, dtype)
    if layout == "contiguous":
        return t
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last_3d":
        return t.contiguous(memory_format=torch.channels_last_3d)
    order = (*range(1, rank), 0) if rank != 4 else (2, 0, 3, 1)  # permuted
    back = sorted(range(rank), key=lambda i: order[i])
    return t.permute(order).contiguous().permute(back)


ENGINES = schedule.ENGINES
TINY = {
    "tile": 64, "grad_tile": 64, "ticket_tile": 64, "grad_ticket_tile": 64, "ahead": 0, "column_tile": 64,
}  # fmt: skip
"""Tiles so small that every group has several, and blocks of chunks."""


@contextmanager
def engine(name: str, **sizes: int) -> Iterator[None]:
    """All but "resident" send every group through several programs, in tiny tiles unless `sizes` say otherwise;
    "resident" leaves it to the schedule."""
    if name == "resident":
        yield
    else:
        with schedule.forced(engine=name, **TINY | sizes):
            yield
