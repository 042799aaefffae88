"""Inline assembly against its plain twin, on a GPU: to the last bit, or within the error that its docstring gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from normops.compiled import INTERPRETED
from normops.kernels import elements
from normops.kernels.bundles import Form

on_gpu = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"
)

TWINS = {ptx: Form(SPACE=((1,), (1,), (1,), (1,)), ACC=tl.float32, PTX=ptx, ACCESS=8) for ptx in (False, True)}


@triton.jit
def widened(x_ptr, y_ptr, N: tl.constexpr, F: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, elements.widen(tl.load(x_ptr + i), F))


@triton.jit
def widened_anew(x_ptr, y_ptr, N: tl.constexpr, F: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, elements.widen(tl.load(x_ptr + i), F, False))


@triton.jit
def sigmoids(x_ptr, y_ptr, N: tl.constexpr, F: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, elements.fast_sigmoid(tl.load(x_ptr + i), F))


@triton.jit
def exact_sigmoids(x_ptr, y_ptr, N: tl.constexpr, F: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, elements.exact_sigmoid(tl.load(x_ptr + i), F))


@triton.jit
def selected(z_ptr, e_ptr, y_ptr, N: tl.constexpr, F: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, elements.where_negative(0.0 - tl.load(z_ptr + i), tl.load(e_ptr + i), F))


def every(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).cuda()


def both(kernel: Any, *operands: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the plain twin gives, and the assembly."""
    found = []
    for form in TWINS.values():
        y = torch.full(operands[0].shape, torch.nan, device="cuda")
        kernel[(1,)](*operands, y, operands[0].numel(), form, num_warps=8)
        found.append(y)
    return found[0], found[1]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32)


@on_gpu
@pytest.mark.parametrize("kernel", [widened, widened_anew], ids=["widen", "anew"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_number_is_widened_to_the_same_bits(kernel: Any, dtype: torch.dtype) -> None:
    x = every(dtype)
    plain, assembly = both(kernel, x)
    there = ~x.isnan()
    assert torch.equal(bits(plain)[there], bits(assembly)[there])
    assert plain[~there].isnan().all() and assembly[~there].isnan().all()


@on_gpu
def test_fast_sigmoid_is_within_its_error() -> None:
    z = every(torch.bfloat16).float()
    _, assembly = both(sigmoids, z)
    there = ~z.isnan()
    exact = torch.sigmoid(z[there].double())
    # Below 2 ** -126 the approximations flush to 0.
    bound = (5e-7 + 2e-7 * z[there].abs().clamp(max=100).double()) * exact  # beyond, it is 0 or 1
    assert ((assembly[there] - exact).abs() <= bound + 2.0**-126).all()
    assert assembly[~there].isnan().all()


@on_gpu
def test_exact_sigmoid_is_within_six_steps() -> None:
    every_kind = torch.tensor([0.0, -0.0, 1e-45, torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 88.0, -88.0, 1e30])
    z = torch.cat([torch.linspace(-100, 100, (1 << 16) - every_kind.numel()), every_kind]).cuda()
    _, assembly = both(exact_sigmoids, z)
    there = ~z.isnan()
    exact = torch.sigmoid(z[there].double())
    assert ((assembly[there] - exact).abs() <= 6 * 2.0**-23 * exact + 1e-38).all()
    assert assembly[~there].isnan().all()


def test_the_formula_of_exact_sigmoid() -> None:
    """Step by step in fp32, with the errors that PTX's manual gives ex2 and rcp: within six steps of its value.

    Without the correction by r the rounding of z · log2(e) costs ten and more.
    """
    z = np.linspace(-87, 87, 200_001).astype(np.float32)
    minus_log2_e, minus_ln_2 = (np.array(b, np.uint32).view(np.float32) for b in (0xBFB8AA3B, 0xBF317218))
    t = z * minus_log2_e
    r = (t.astype(np.float64) * minus_ln_2 - z).astype(np.float32)
    exact = 1 / (1 + np.exp(-z.astype(np.float64)))
    for ex2, rcp in ((1 + 2.0**-22, 1 - 2.0**-23), (1 - 2.0**-22, 1 + 2.0**-23)):
        power = (np.exp2(t.astype(np.float64)) * ex2).astype(np.float32)
        errors = []
        for e in (power, (power.astype(np.float64) * r + power).astype(np.float32)):
            s = 1 / (1 + e).astype(np.float64) * rcp
            errors.append(float(np.abs(s / exact - 1).max() / 2.0**-23))
        assert errors[1] <= 6 < 10 <= errors[0], errors


@on_gpu
def test_every_bfloat16_is_selected_by_sign() -> None:
    """Zeros of both signs, infinities and the smallest numbers too; where z is NaN either is right."""
    dy = every(torch.bfloat16)
    for z in (0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, 1e-45, -1e-45):
        plain, assembly = both(selected, torch.full(dy.shape, z, device="cuda"), dy)
        there = ~dy.isnan()
        assert torch.equal(bits(plain)[there], bits(assembly)[there]), z
        assert torch.equal(plain.isnan(), assembly.isnan()), z
    z = every(torch.bfloat16).float()
    plain, assembly = both(selected, z, torch.full_like(dy, 3.0))
    assert torch.equal(plain[~z.isnan()], assembly[~z.isnan()])
    assert set(assembly.unique().tolist()) == {0.0, 3.0}
