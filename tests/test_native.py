"""Where a CPU has no kernels, PyTorch's own norms run; where these lose digits, the formula does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from normops import calls

if torch.cuda.is_available():
    pytest.skip("CPU tensors have kernels here, in no test", allow_module_level=True)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[str], str]]:
    """As the other fixture of this name, but in this process: some seconds less a program."""

    def run(program: str) -> str:
        exec(compile(program, "program", "exec"), {})
        return capsys.readouterr().out.strip()

    monkeypatch.setattr(calls, "INTERPRETED", False)
    calls.known.clear()
    yield run
    calls.known.clear()


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
    """Of PyTorch's own float64 about a mean of 0, for data as networks have it (64 ulps of the largest: sums of
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
                    near(found, exact, 64 if dtype == torch.float32 else 256, (name, shape, order, dtype, far))
                    with torch.no_grad():
                        assert torch.equal(call(F, *tensors), found[0])
""")) == "right"  # fmt: skip


def test_it_is_pytorch_s_own(plain: Callable[[str], str]) -> None:
    """By the node that autograd records, but where means are far away (of LayerNorm each row takes its own way, and
    RMSNorm has none); with additions and activations PyTorch's own follow it."""
    assert plain(PROGRAM.format(CASES + """
for name, (call, _) in NORMS.items():
    x, w, b = inputs(name, shapes[0], None, torch.float32)
    for far, node in ((0, "NativeBackward"), (1e4, "ForwardBackward")):
        found = call(F, (x + far).requires_grad_(), w, b).grad_fn.name()
        assert found == (node if name not in ("layer", "rms") else "NativeBackward"), (name, far, found)
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
assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, theirs))
y = F.batch_norm(x, mean, var)
(before,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
version = var._version
F.batch_norm(7 * x.detach(), mean, var, training=True)
assert var._version > version
(after,) = torch.autograd.grad(y.sum(), x)
assert torch.equal(before, after)
""")) == "right"  # fmt: skip


def test_dy_in_another_order_of_memory(plain: Callable[[str], str]) -> None:
    """PyTorch's backward of BatchNorm, hence of InstanceNorm, takes such a dy for one that lies as x does."""
    assert plain(PROGRAM.format(CASES + """
from itertools import permutations
for shape in ((2, 8, 2, 1), (2, 8, 3, 2), (2, 8, 1, 1), (3, 8, 4), (2, 8, 2, 2, 2)):
    for name in ("layer", "group", "batch", "instance"):
        call = NORMS[name][0]
        if name == "instance" and shape[2:] == (1, 1):
            continue
        x, w, b = (t.requires_grad_() for t in inputs(name, shape, None, torch.float32))
        y, g = call(F, x, w, b), torch.randn(shape)
        dense = torch.autograd.grad(y, (x, w, b), g, retain_graph=True)
        for order in permutations(range(len(shape))):
            places = sorted(range(len(shape)), key=lambda i: order[i])
            dy = g.permute(order).contiguous().permute(places)
            found = torch.autograd.grad(y, (x, w, b), dy, retain_graph=True)
            assert all(torch.allclose(a, d, rtol=1e-5, atol=1e-5) for a, d in zip(found, dense)), (name, shape, order)
        exact = gradients(T, call, (x, w, b), torch.float64)[1:]
        ours = gradients(F, call, (x, w, b), torch.float32)[1:]
        near(ours, exact, 64, (name, shape))
""")) == "right"  # fmt: skip


def test_strides_of_axes_of_one(plain: Callable[[str], str]) -> None:
    """Where they may mean several memory orders, PyTorch's GroupNorm takes but one of them."""
    assert plain(PROGRAM.format("""
for x in (torch.randn(8, 16, 32).mT.unsqueeze(-1), torch.randn(4).as_strided((1, 2, 2, 1), (4, 1, 2, 2))):
    for f in (lambda f, x: f.group_norm(x, 2), lambda f, x: f.batch_norm(x, None, None, training=True)):
        assert torch.allclose(f(F, x), f(T, x.double()).float(), atol=1e-5)
    y, total = F.group_norm(x, 2, pre_add=torch.ones(x.shape[::-1]).permute(3, 2, 1, 0))
    assert torch.allclose(total, x + 1)
""")) == "right"  # fmt: skip


def test_recomputed_under_a_checkpoint(plain: Callable[[str], str]) -> None:
    """It saves as many tensors, though no running statistics are given to it."""
    assert plain(PROGRAM.format("""
from normops import nn
from torch.utils.checkpoint import checkpoint
for norm in (nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.InstanceNorm1d(4, track_running_stats=True)):
    for far in (0, 1e4):
        x = (torch.randn(8, 4, 5) + far).requires_grad_()
        before = [t.clone() for t in norm.buffers()]
        (found,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False).square().sum(), x)
        moved = [t.clone() for t in norm.buffers()]
        for t, old in zip(norm.buffers(), before):
            t.copy_(old)
        (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
        assert torch.equal(found, expected) and all(map(torch.equal, moved, norm.buffers()))
""")) == "right"  # fmt: skip


def test_a_meta_tensor_stays_one(plain: Callable[[str], str]) -> None:
    assert plain(PROGRAM.format("""
x = torch.empty(2, 4, 5, device="meta", requires_grad=True)
for y in (F.layer_norm(x, (5,)), F.group_norm(x, 2), F.batch_norm(x, None, None, training=True), F.instance_norm(x)):
    assert y.device.type == "meta" and y.shape == x.shape
""")) == "right"  # fmt: skip


def test_large_and_small_numbers(plain: Callable[[str], str]) -> None:
    """rstd³, of which a derivative by PyTorch's operations is made, is not in range."""
    assert plain(PROGRAM.format("""
for size in (1e-13, 1e-6, 1.0, 1e6, 1e15):
    for call in (lambda f, x: f.rms_norm(x, (8,), None, 1e-30), lambda f, x: f.layer_norm(x, (8,), None, None, 1e-30)):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            x, dy = (torch.randn(4, 8) * size).to(dtype).requires_grad_(), (torch.randn(4, 8) * size).to(dtype)
            other = x.detach().double().requires_grad_()
            (found,) = torch.autograd.grad(call(F, x), x, dy)
            (exact,) = torch.autograd.grad(call(T, other), other, dy.double())
            assert (found.double() - exact).abs().max() < bound * exact.abs().max(), (size, dtype)
""")) == "right"  # fmt: skip


def test_derivatives_of_derivatives(plain: Callable[[str], str]) -> None:
    """The third one too, which PyTorch's norms have wrong."""
    assert plain(PROGRAM.format("""
x = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
v = torch.randn(6, dtype=torch.float64)
def third(f):
    y = (f(x) * v).sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        y = (g * v.flip(0)).sum()
    return y.item()
def formula(x):
    d = x - x.mean()
    return d * (d.square().mean() + 1e-5).rsqrt()
for norm in (lambda x: F.layer_norm(x, (6,)), lambda x: F.instance_norm(x[None])[0], lambda x: F.group_norm(x, 1),
             lambda x: F.batch_norm(x.T, None, None, training=True).T):
    assert abs(third(norm) - third(formula)) < 1e-8 * abs(third(formula))
""")) == "right"  # fmt: skip
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
