# ruff: noqa: E501  (tables)
"""Shapes, strides and values at the border of what a norm is defined for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import normops
from normops import functional as F
from normops import nn
from tests.tolerance import ENGINES, check, engine, laid_out, leaf, oracle


def gradients(call: Any, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, ref: Any, scale: float = 1.0) -> None:
    """`call(x, w, b)` and its backward against `ref` of float64 leaves."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    exact = [leaf(t) for t in (x, w, b)]
    y, expected = call(*leaves), ref(*exact)
    check("y", y, expected, scale)
    dy = torch.randn(y.shape, device=y.device, dtype=y.dtype)
    got = torch.autograd.grad(y, leaves, dy)
    for name, g, e in zip(("dx", "dw", "db"), got, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        check(name, g, e, scale)


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize(("shape", "groups"), [
    ((2, 6, 5), 2), ((2, 10, 3, 3), 2), ((1, 14, 1, 1), 2), ((2, 6, 7, 7), 3), ((3, 6, 1, 5), 6), ((2, 3, 3, 3, 3), 1),
    ((2, 6), 2), ((2, 6, 2, 2, 2, 2), 2),
], ids=str)  # fmt: skip
def test_group_norm_shapes(shape: tuple[int, ...], groups: int, which: str, device: torch.device) -> None:
    """Ranks, channels per group not a power of two, odd planes and planes of one pixel."""
    c, view = shape[1], (shape[1],) + (1,) * (len(shape) - 2)
    x, w, b = torch.randn(shape, device=device), torch.randn(c, device=device), torch.randn(c, device=device)
    with engine(which):
        gradients(
            lambda x, w, b: F.group_norm(x, groups, w, b), x, w, b,
            lambda x, w, b: oracle(x, range(2, x.dim() + 1), w.view(view), b.view(view), groups=groups)[0],
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 37), (4, 1, 9), (1, 1, 2, 8)], ids=str)
def test_one_row(shape: tuple[int, ...], device: torch.device) -> None:
    x, w, b = torch.randn(shape, device=device), torch.randn(shape[-1], device=device), torch.randn(shape[-1], device=device)
    gradients(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), x, w, b, lambda x, w, b: oracle(x, (-1,), w, b)[0])


def test_one_column(device: torch.device) -> None:
    """A group of one element: y is the bias, and no gradient reaches x."""
    x = torch.randn(5, 1, device=device, requires_grad=True)
    w, b = (torch.randn(1, device=device, requires_grad=True) for _ in range(2))
    y = F.layer_norm(x, (1,), w, b)
    dx, dw, db = torch.autograd.grad(y, [x, w, b], torch.ones_like(y))
    assert torch.equal(y, b.expand_as(y)) and not dx.any() and not dw.any()
    check("db", db, torch.full((1,), 5.0))


def test_long_row(device: torch.device) -> None:
    n = 40009
    x, w, b = torch.randn(2, n, device=device), torch.randn(n, device=device), torch.randn(n, device=device)
    gradients(lambda x, w, b: F.layer_norm(x, (n,), w, b), x, w, b, lambda x, w, b: oracle(x, (1,), w, b)[0])


def test_many_rows(device: torch.device) -> None:
    """More rows than a CUDA grid's second axis holds, over two axes."""
    shape = (2, 2)
    x, w, b = torch.randn(65600, 2, 2, device=device), torch.randn(shape, device=device), torch.randn(shape, device=device)
    # Among 65600 groups of 4 some have a deviation far below their mean, which costs digits: dx is a difference there.
    gradients(lambda x, w, b: F.layer_norm(x, shape, w, b), x, w, b, lambda x, w, b: oracle(x, (1, 2), w, b)[0], scale=50)


@pytest.mark.parametrize("kind", ["expanded", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("name", ["batch", "group"])
def test_strides_of_dy(kind: str, which: str, name: str, device: torch.device) -> None:
    shape = (2, 4, 3, 3)
    x, w = torch.randn(shape, device=device, requires_grad=True), torch.randn(4, device=device, requires_grad=True)
    dy = {
        "expanded": torch.ones((), device=device).expand(shape),
        "channels_last": torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(shape, device=device).transpose(2, 3),
        "sliced": torch.randn(2, 4, 6, 6, device=device)[..., ::2, ::2],
    }[kind]
    ex, ew = leaf(x), leaf(w)
    with engine(which):
        if name == "batch":
            y = F.batch_norm(x, None, None, w, None, True, activation="silu")
            ref, _ = oracle(ex, (0, 2, 3), ew.view(4, 1, 1), activation="silu")
        else:
            y = F.group_norm(x, 2, w, activation="silu")
            ref, _ = oracle(ex, (2, 3, 4), ew.view(4, 1, 1), groups=2, activation="silu")
        got = torch.autograd.grad(y, [x, w], dy)
    for n, g, e in zip(("dx", "dw"), got, torch.autograd.grad(ref, [ex, ew], dy.double()), strict=True):
        check(n, g, e)


def test_sum_backward(device: torch.device) -> None:
    x, b = torch.randn(3, 8, device=device, requires_grad=True), torch.zeros(8, device=device, requires_grad=True)
    F.layer_norm(x, (8,), None, b, activation="silu").sum().backward()
    ex, eb = leaf(x), leaf(b)
    oracle(ex, (1,), None, eb, activation="silu")[0].sum().backward()
    check("dx", x.grad, ex.grad)
    check("db", b.grad, eb.grad)


@pytest.mark.parametrize("axes", [(1,), (0, 2), (1, 2)], ids=str)
def test_expanded_x(axes: tuple[int, ...], device: torch.device) -> None:
    base = torch.randn(3, 1, 5, device=device, requires_grad=True)
    x = base.expand(3, 4, 5)
    w = torch.randn(4, 1, device=device)
    y = normops.normalize(x, axes, w, eps=1e-1)
    exact = leaf(base)
    ref, _ = oracle(exact.expand(3, 4, 5), axes, w.double(), eps=1e-1)
    dy = torch.randn(3, 4, 5, device=device)
    check("y", y, ref, scale=10)  # over (1,) x is its mean: y is the rounding of the mean, times rstd = 3
    (g,), (e,) = torch.autograd.grad(y, base, dy), torch.autograd.grad(ref, exact, dy.double())
    assert (g.double() - e).abs().max() < 1e-4  # over (1,) the gradient vanishes: absolute, at terms of about 10


def test_without_running_statistics(device: torch.device) -> None:
    x = torch.randn(4, 3, 5, device=device)
    check("batch", F.batch_norm(x, None, None, training=True), oracle(x.double(), (0, 2))[0])
    check("instance", F.instance_norm(x), oracle(x.double(), (2,))[0])


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (0, 4)], ids=str)
def test_empty_batch(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    w, b = (torch.ones(4, device=device, requires_grad=True) for _ in range(2))
    rm, rv = torch.randn(4, device=device), torch.rand(4, device=device)
    before = rm.clone(), rv.clone()
    calls = [
        lambda: F.batch_norm(x, rm, rv, w, b, True, 0.5), lambda: F.batch_norm(x, rm, rv, w, b, False),
        lambda: F.group_norm(x, 2, w, b), lambda: normops.normalize(x, (1,), w.view(4, *(1,) * (len(shape) - 2))),
    ]  # fmt: skip
    if len(shape) == 4:
        calls.append(lambda: F.instance_norm(x, rm, rv, w, b))
    for call in calls:
        y = call()
        assert y.shape == shape and y.dtype == x.dtype
        grads = torch.autograd.grad(y.sum(), [x, w, b], allow_unused=True)
        assert grads[0] is not None and grads[0].shape == shape
        for g in grads[1:]:
            assert g is None or (g.shape == (4,) and not g.any()), "zero gradients"
        assert torch.equal(rm, before[0]) and torch.equal(rv, before[1]), "an empty batch has no statistics"


@pytest.mark.parametrize(("shape", "axes"), [((0, 5), (1,)), ((3, 0, 2), (2,)), ((0, 3), (1,)), ((2, 0), (0,))], ids=str)
def test_no_groups(shape: tuple[int, ...], axes: tuple[int, ...], device: torch.device) -> None:
    y, mean, rstd = normops.normalize(torch.empty(shape, device=device), axes, return_stats=True)
    kept = tuple(n for i, n in enumerate(shape) if i not in axes)
    assert y.shape == shape and mean.shape == kept and rstd.shape == kept


def test_an_axis_that_splits_into_none_of_something(device: torch.device) -> None:
    """Sizes of 0 in a split axis, from which no other one can be inferred."""
    x = torch.empty(9, 0, 3, device=device, requires_grad=True)
    w = torch.ones(4, device=device, requires_grad=True)
    y = normops.normalize(x, "a (b c d) e -> a b", w, affine="d", b=3, c=0, d=4)
    dx, dw = torch.autograd.grad(y.sum(), [x, w])
    assert y.shape == dx.shape == x.shape and dw.shape == (4,) and not dw.any()


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_input(value: float, which: str, device: torch.device) -> None:
    x = torch.full((3, 4, 8), value, device=device, requires_grad=True)
    with engine(which):
        y = F.layer_norm(x, (8,))
        assert not y.any(), "an exactly constant group has no deviation"
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.isfinite().all()


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("axes", [(1,), (0,), (0, 1)], ids=str)
def test_large_mean(axes: tuple[int, ...], which: str, device: torch.device) -> None:
    """The mean is 1e5 deviations.  x is exact in both; the mean is rounded to fp32, off by up to an ulp, 1.2e-7 · 1e5
    = 0.012 deviations, which is the condition of x - mean; a one-pass E[x²] - E[x]² would be off by 1e3 deviations."""
    x = torch.randn(8, 40, device=device) + 1e5
    with engine(which):
        y = normops.normalize(x, axes)
    ref, _ = oracle(x.double(), axes)
    assert (y.double() - ref).abs().max() < 1.2e-7 * 1e5 * 2


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(bad: float, which: str, device: torch.device) -> None:
    x = torch.randn(6, 3, 5, device=device)
    x[2, 1, 3] = bad
    x.requires_grad_()
    with engine(which):
        y = F.layer_norm(x, (3, 5))
        (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    others = [0, 1, 3, 4, 5]
    for t in (y, dx):
        assert t[2].isnan().any() and t[others].isfinite().all()


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)], ids=str)
def test_axes_of_size_one(axes: tuple[int, ...], device: torch.device) -> None:
    for shape in ((1, 4, 1, 5), (3, 1, 1, 1)):
        x = torch.randn(shape, device=device, requires_grad=True)
        exact = leaf(x)
        y, mean, _ = normops.normalize(x, axes, return_stats=True)
        ref, _ = oracle(exact, axes)
        dy = torch.randn(shape, device=device)
        assert mean.shape == tuple(n for i, n in enumerate(shape) if i not in axes)
        assert torch.allclose(y.double(), ref, atol=1e-5)
        (g,), (e,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(ref, exact, dy.double())
        assert torch.allclose(g.double(), e, atol=1e-4)


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("axes", [(0, 2), (1,), (1, 2)], ids=str)
def test_deterministic(axes: tuple[int, ...], which: str, device: torch.device) -> None:
    x = torch.randn(5, 6, 7, device=device, requires_grad=True)
    w = torch.randn(6, 1, device=device, requires_grad=True)
    dy = torch.randn(5, 6, 7, device=device)
    runs = []
    with engine(which):
        for _ in range(2):
            y = normops.normalize(x, axes, w, activation="gelu")
            runs.append((y, *torch.autograd.grad(y, [x, w], dy)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("width", [8, 37, 300])
def test_batch_invariance(width: int, which: str, device: torch.device) -> None:
    """The bits of a row do not depend on how many other rows there are, or what they hold."""
    x = torch.randn(9, width, device=device)
    dy = torch.randn(9, width, device=device)

    def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = x[rows].clone().requires_grad_()
        y = F.layer_norm(part, (width,))
        return y, torch.autograd.grad(y, part, dy[rows])[0]

    with engine(which):
        whole = run(slice(0, 9))
        for rows in (slice(0, 1), slice(4, 5), slice(3, 8)):
            for all_rows, few in zip(whole, run(rows), strict=True):
                assert torch.equal(all_rows[rows], few)


def test_in_place_modification_raises(device: torch.device) -> None:
    base = torch.randn(3, 8, device=device, requires_grad=True)
    x = base * 1
    y = F.layer_norm(x, (8,))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_grad(device: torch.device) -> None:
    x = torch.randn(3, 8, device=device, requires_grad=True)
    with torch.no_grad():
        y = F.layer_norm(x, (8,))
    assert not y.requires_grad and torch.equal(y, F.layer_norm(x, (8,)))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("constant_dy", [True, False])
def test_second_derivative(activation: str | None, constant_dy: bool, device: torch.device) -> None:
    """A gradient penalty, with pre_add and post_add, against float64."""
    leaves = [torch.randn(s, device=device, dtype=torch.float64) for s in ((3, 8), (8,), (8,), (3, 8), (3, 8), (3, 8))]

    def penalty(norm: Any) -> list[torch.Tensor]:
        x, w, b, pre, post, dy = (t.clone().requires_grad_() for t in leaves)
        y, total = norm(x, w, b, pre, post)
        g = torch.autograd.grad(
            [y, total], [x, w, post], [dy.detach() if constant_dy else dy, torch.ones_like(total)], create_graph=True
        )
        loss = x.square().sum() + sum(t.square().sum() for t in g)
        return list(torch.autograd.grad(loss, [x, w, pre] + ([] if constant_dy else [dy])))

    def ours(x: Any, w: Any, b: Any, pre: Any, post: Any) -> Any:
        return F.layer_norm(x, (8,), w, b, pre_add=pre, post_add=post, activation=activation)

    def torchs(x: Any, w: Any, b: Any, pre: Any, post: Any) -> Any:
        y = torch.nn.functional.layer_norm(x + pre, (8,), w, b) + post
        return (torch.nn.functional.silu(y) if activation else y), x + pre

    for name, got, expected in zip(("x", "weight", "pre_add", "dy"), penalty(ours), penalty(torchs), strict=False):
        check(name, got, expected)


def test_given_statistics_of_any_stride(device: torch.device) -> None:
    x = torch.randn(5, 4, 3, device=device)
    both = torch.rand(4, 2, device=device) + 0.5
    for t in (x, x.clone().requires_grad_()):
        got = F.batch_norm(t, both[:, 0], both[:, 1])
        torch.testing.assert_close(got, torch.nn.functional.batch_norm(x, both[:, 0], both[:, 1]))


def test_inputs_are_left_alone(device: torch.device) -> None:
    x, pre, post = (laid_out((2, 4, 3, 3), f, torch.float32, device) for f in ("sliced", "permuted", "channels_last"))
    w = torch.randn(4, device=device)
    before = [t.clone() for t in (x, pre, post, w)]
    F.group_norm(x, 2, w, w, activation="silu", pre_add=pre, post_add=post)
    assert all(torch.equal(a, b) for a, b in zip((x, pre, post, w), before, strict=True))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("which", ENGINES)
def test_batch_invariance_of_rows_that_lie_across_memory(which: str, affine: bool, device: torch.device) -> None:
    """(B, T, D) in the memory of (B, D, T): a batch of one drops an axis, and keeps the tiles of a larger one."""
    x = torch.randn(2, 100, 3, device=device).transpose(1, 2)
    w, b = (torch.randn(100, device=device) if affine else None for _ in range(2))
    dy = torch.randn_like(x)
    found = []
    for n in (2, 1):
        leaf_x = x[:n].clone(memory_format=torch.preserve_format).requires_grad_()
        with engine(which):
            y = F.layer_norm(leaf_x, (100,), w, b)
            found.append((y[:1], torch.autograd.grad(y, leaf_x, dy[:n])[0][:1]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_bfloat16_beside_float64(device: torch.device) -> None:
    """Sums of fp64 are rounded to parameters, gradients and running statistics of bfloat16."""
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, device=device).requires_grad_()
    w, b = (torch.randn(4, device=device).bfloat16().requires_grad_() for _ in range(2))
    mean, var = torch.zeros(4, device=device).bfloat16(), torch.ones(4, device=device).bfloat16()
    y = F.batch_norm(x + 5, mean, var, w, b, training=True, momentum=0.5)
    dy = torch.randn_like(y)
    exact = [leaf(t) for t in (x, w, b)]
    ref, _ = oracle(exact[0] + 5, (0, 2, 3), *(t.reshape(1, 4, 1, 1) for t in exact[1:]))
    got = torch.autograd.grad(y, (x, w, b), dy)
    for name, g, e in zip(("dx", "dw", "db"), got, torch.autograd.grad(ref, exact, dy), strict=True):
        check(name, g, e, scale=4)
    check("running_mean", mean, 0.5 * (x.detach() + 5).mean((0, 2, 3)))
    check("running_var", var, 0.5 + 0.5 * x.detach().var((0, 2, 3)))


def test_integers_of_numpy(device: torch.device) -> None:
    """They are integers where PyTorch takes them for such; and a call that came with some serves those without."""
    x = torch.randn(3, 6, 5, 7, device=device)
    two, last, three = np.int64(2), np.int32(-1), np.uint8(3)
    for _ in range(2):
        assert torch.equal(F.group_norm(x, two), F.group_norm(x, 2))
        assert torch.equal(F.layer_norm(x, np.int64(7)), F.layer_norm(x, 7))
        assert torch.equal(F.rms_norm(x, [np.int64(5), np.int64(7)]), F.rms_norm(x, (5, 7)))
        assert torch.equal(normops.normalize(x, last), normops.normalize(x, -1))
        assert torch.equal(normops.normalize(x, (last, two)), normops.normalize(x, (-1, 2)))
        pattern = "n (g c) h w -> n g"
        assert torch.equal(normops.normalize(x, pattern, g=three), normops.normalize(x, pattern, g=3))
    assert nn.Normalize(pattern, affine="(g c)", g=three, c=two)(x).shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_empty_input_without_channels(training: bool, device: torch.device) -> None:
    """PyTorch takes it, with running statistics or without."""
    x = torch.empty(0, device=device)
    for running in ((None, None), (torch.empty(0, device=device), torch.empty(0, device=device))):
        if training or running[0] is not None:
            assert F.batch_norm(x, *running, training=training).shape == (0,)
            assert torch.nn.functional.batch_norm(x, *running, training=training).shape == (0,)


def test_layer_norm_2d_is_a_layer_norm() -> None:
    """What treats norms by their class, or by the names of their attributes, finds it."""
    norm = nn.LayerNorm2d(6, eps=1e-6, bias=False)
    assert isinstance(norm, torch.nn.LayerNorm) and norm.normalized_shape == (6,) and norm.num_channels == 6
    assert norm.elementwise_affine and norm.bias is None and list(norm.state_dict()) == ["weight"]
    assert not list(nn.LayerNorm2d(6, affine=False).parameters())


def test_inference_tensors(device: torch.device) -> None:
    with torch.inference_mode():
        x, norm = torch.randn(3, 6, 4, device=device), nn.GroupNorm(2, 6).to(device)
    assert not norm(x).requires_grad
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        norm(torch.randn(3, 6, 4, device=device))
