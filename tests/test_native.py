"""Where a CPU has no kernels, PyTorch's own norms run; where these lose digits, the formula does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

PROGRAM = """
import torch
from normops import functional as F
from torch.nn import functional as T

torch.set_num_threads(1)
{0}
print("right")
"""

CASES = """
C, shapes = 8, [(6, 8, 5, 3), (6, 8, 5), (6, 8, 2, 3, 3)]
ORDERS = {3: [None], 4: [None, torch.channels_last], 5: [None, torch.channels_last_3d]}
NORMS = {
    "layer": (lambda f, x, w, b: f.layer_norm(x, x.shape[1:], w, b), lambda x: tuple(range(1, x.dim()))),
    "rms": (lambda f, x, w, b: f.rms_norm(x, x.shape[1:], w, 1e-5), lambda x: tuple(range(1, x.dim()))),
    "group": (lambda f, x, w, b: f.group_norm(x, 2, w, b), None),
    "batch": (lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True), lambda x: (0, *range(2, x.dim()))),
    "instance": (lambda f, x, w, b: f.instance_norm(x, None, None, w, b), lambda x: tuple(range(2, x.dim()))),
}

def inputs(name, shape, order, dtype):
    x = torch.randn(shape, dtype=dtype).to(memory_format=order or torch.contiguous_format)
    size = x.shape[1:] if name in ("layer", "rms") else (C,)
    return x, torch.rand(size, dtype=dtype) + 0.5, torch.randn(size, dtype=dtype)

def gradients(f, call, tensors, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = call(f, *leaves)
    g = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().reshape(y.shape).to(dtype)
    found = torch.autograd.grad(y, leaves, g, allow_unused=True)
    return [y, *(torch.zeros_like(t) if d is None else d for t, d in zip(leaves, found))]

def near(found, exact, ulps, what):
    for i, (a, e) in enumerate(zip(found, exact)):
        worst = (a.double() - e).abs().max() / e.abs().max().clamp_min(1)
        assert worst <= ulps * torch.finfo(a.dtype).eps, (what, i, worst.item())
"""


def test_values_and_gradients(plain: Callable[[str], str]) -> None:
    """Of PyTorch's own float64 about a mean of 0, for data as networks have it (32 ulps of the largest: sums of
    hundreds; float64 is no better than its oracle, 256) and for means of 1e4 deviations, where PyTorch's float32 is
    off by thousands; strides are those of x."""
    assert plain(PROGRAM.format(CASES + """
for name, (call, _) in NORMS.items():
    for shape in shapes:
        for order in ORDERS[len(shape)]:
            for dtype in (torch.float32, torch.float64):
                for far in (0, 2, 1e4):
                    x, w, b = inputs(name, shape, order, dtype)
                    tensors = x + far, w, b
                    near_zero = (tensors[0].double() - (far if name != "rms" else 0), w, b)  # which is exact
                    found, exact = gradients(F, call, tensors, dtype), gradients(T, call, near_zero, torch.float64)
                    assert found[0].stride() == x.stride()
                    near(found, exact, 32 if dtype == torch.float32 else 256, (name, shape, order, dtype, far))
                    with torch.no_grad():
                        assert torch.equal(call(F, *tensors), found[0])
""")) == "right"  # fmt: skip


def test_it_is_pytorch_s_own(plain: Callable[[str], str]) -> None:
    """By the node that autograd records; with additions and activations PyTorch's own follow it."""
    assert plain(PROGRAM.format(CASES + """
names = {"layer": "NativeLayerNorm", "rms": "Mul", "group": "NativeGroupNorm", "batch": "NativeBatchNorm",
         "instance": "UnsafeView|View|Reshape"}
for name, (call, _) in NORMS.items():
    tensors = inputs(name, shapes[0], None, torch.float32)
    found = call(F, *(t.requires_grad_() for t in tensors)).grad_fn.name()
    assert any(found.startswith(n) for n in names[name].split("|")), (name, found)
x, w, b = inputs("group", shapes[0], None, torch.float32)
y, total = F.group_norm(x.requires_grad_(), 2, w, b, activation="silu", pre_add=x * 2, post_add=x)
assert y.grad_fn.name() == "SiluBackward0" and total.grad_fn.name() == "AddBackward0"
want = T.silu(T.group_norm(x * 3, 2, w, b) + x)
assert torch.allclose(y, want, rtol=1e-6, atol=1e-6)
""")) == "right"  # fmt: skip


def test_equal_numbers_give_zero(plain: Callable[[str], str]) -> None:
    """In every norm that subtracts a mean, also beside groups that are not constant."""
    assert plain(PROGRAM.format(CASES + """
for name in ("layer", "group", "batch", "instance"):
    call = NORMS[name][0]
    for order in ORDERS[4]:
        for constant in (0.0, 1e-4, 0.0123, 0.1, 100.1, 254.9, 12345.7):
            x, w, _ = inputs(name, shapes[0], order, torch.float32)
            x[0], x[:, :4] = constant, constant
            x = x if name in ("layer", "instance", "group") else x[:, :4]
            w = w if name != "batch" else w[:4]
            y = call(F, x.contiguous(memory_format=order or torch.contiguous_format), w, None)
            assert not y[0, :4].any() and not (y[:, :4].any() and name != "layer"), (name, order, constant)
""")) == "right"  # fmt: skip


def test_rows_do_not_depend_on_others(plain: Callable[[str], str]) -> None:
    """Neither does it matter that one of them is taken from PyTorch and one from the formula."""
    assert plain(PROGRAM.format("""
for n in (7, 64, 1001):
    x = torch.randn(9, n)
    x[2], x[5] = x[2] + 1e4, 3.3
    w, b, g = torch.randn(n), torch.randn(n), torch.randn(9, n)
    def run(rows):
        leaf = x[rows].requires_grad_()
        y = F.layer_norm(leaf, (n,), w, b)
        return y, torch.autograd.grad(y, leaf, g[rows])[0]
    together = run(range(9))
    for rows in ([0], [2], [5], [3, 4], [4, 2, 7]):
        for a, all_of_them in zip(run(rows), together):
            assert torch.equal(a, all_of_them[rows]), (n, rows)
""")) == "right"  # fmt: skip


@pytest.mark.parametrize("far", [0.0, 1e3])
def test_running_statistics_move_once(plain: Callable[[str], str], far: float) -> None:
    """By PyTorch or by the formula; and not where a momentum of the wrong kind is refused."""
    assert plain(PROGRAM.format(f"""
x = torch.randn(16, 8, 5) + {far}
mean, var = torch.zeros(8), torch.ones(8)
F.batch_norm(x, mean, var, training=True, momentum=0.3)
exact = x.double()
assert torch.allclose(mean.double(), 0.3 * exact.mean((0, 2)), rtol=1e-5, atol=1e-6)
assert torch.allclose(var.double(), 0.7 + 0.3 * exact.var((0, 2)), rtol=1e-5)
before = mean.clone(), var.clone()
try:
    F.batch_norm(x, mean, var, training=True, momentum="0.3x")
except (TypeError, ValueError):
    pass
assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
y = F.batch_norm(x, mean, var)
assert torch.allclose(y.double(), T.batch_norm(exact, mean.double(), var.double()), rtol=1e-5, atol=1e-5)
""")) == "right"  # fmt: skip


def test_an_evaluation_keeps_its_statistics(plain: Callable[[str], str]) -> None:
    """Its backward is right after they moved on, which also shows in their versions; so is one in training."""
    assert plain(PROGRAM.format("""
x, mean, var = torch.randn(4, 8, 5, requires_grad=True), torch.zeros(8), torch.ones(8)
w = torch.rand(8, requires_grad=True)
found = torch.autograd.grad(F.batch_norm(x, mean, var, w, None, True).square().sum(), (x, w))
theirs = torch.autograd.grad(T.batch_norm(x, None, None, w, None, True).square().sum(), (x, w))
assert all(torch.equal(a, b) for a, b in zip(found, theirs))
y = F.batch_norm(x, mean, var)
(before,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
version = var._version
F.batch_norm(7 * x.detach(), mean, var, training=True)
assert var._version > version
(after,) = torch.autograd.grad(y.sum(), x)
assert torch.equal(before, after)
""")) == "right"  # fmt: skip


def test_derivatives_of_derivatives(plain: Callable[[str], str]) -> None:
    assert plain(PROGRAM.format("""
from torch.autograd import gradgradcheck
x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
w = torch.randn(4, dtype=torch.float64, requires_grad=True)
far = (x.detach() + torch.tensor([0.0, 100.0, 0.0], dtype=torch.float64).reshape(3, 1, 1)).requires_grad_()
for t in (x, far):
    assert gradgradcheck(lambda x, w: F.layer_norm(x.transpose(1, 2).contiguous(), (4,), w), (t, w))
    assert gradgradcheck(lambda x, w: F.group_norm(x, 2, w), (t, w))
    assert gradgradcheck(lambda x, w: F.batch_norm(x, None, None, w, None, True), (t, w))
    assert gradgradcheck(lambda x, w: F.instance_norm(x, None, None, w), (t, w))
""")) == "right"  # fmt: skip
