# ruff: noqa: E501  (tables)
"""Values and gradients of every norm against the formula in float64: layouts, dtypes, modes, fusions, engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import normops
from normops import functional as F
from tests.tolerance import ACTIVATIONS, ENGINES, FORMATS, check, engine, laid_out, leaf, oracle

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ADDS = ("none", "pre", "post", "both")


@dataclass(frozen=True)
class Norm:
    """How a norm is called, and what it means: parameters' shapes, reduced axes."""

    name: str
    call: Callable[..., Any]
    weight: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Shape of weight and bias that broadcasts against x."""
    given: Callable[[Tensor], Tensor]
    """That weight as the call takes it."""
    axes: Callable[[int], tuple[int, ...]]
    groups: int | None = None
    center: bool = True
    bias: bool = True
    running: bool = False


def _channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1],) + (1,) * (len(shape) - 2)


def _same(w: Tensor) -> Tensor:
    return w


def _spatial(rank: int) -> tuple[int, ...]:
    return tuple(range(2, rank))


NORMS = (
    Norm("batch", lambda x, w, b, **k: F.batch_norm(x, k.pop("rm", None), k.pop("rv", None), w, b, k.pop("train", True), 0.3, **k),
         _channel, torch.flatten, lambda r: (0, *range(2, r)), running=True),
    Norm("instance", lambda x, w, b, **k: F.instance_norm(x, k.pop("rm", None), k.pop("rv", None), w, b, k.pop("train", True), 0.3, **k),
         _channel, torch.flatten, _spatial, running=True),
    Norm("group", lambda x, w, b, **k: F.group_norm(x, 2, w, b, **k),
         _channel, torch.flatten, lambda r: tuple(range(2, r + 1)), groups=2),
    Norm("layer", lambda x, w, b, **k: F.layer_norm(x, x.shape[-1:], w, b, **k),
         lambda s: s[-1:], _same, lambda r: (r - 1,)),
    Norm("rms", lambda x, w, b, **k: F.rms_norm(x, x.shape[-2:], w, 1e-5, **k),
         lambda s: s[-2:], _same, lambda r: (r - 2, r - 1), center=False, bias=False),
    Norm("layer2d", lambda x, w, b, **k: F.normalize(x, (1,), w, b, **k), _channel, _same, lambda r: (1,)),
    Norm("adaln", lambda x, w, b, **k: F.normalize(x, (-1,), w, b, **k),
         lambda s: (s[0],) + (1,) * (len(s) - 2) + (s[-1],), _same, lambda r: (r - 1,)),
    Norm("adain", lambda x, w, b, **k: F.normalize(x, _spatial(x.dim()), w, b, **k),
         lambda s: (*s[:2], *(1,) * (len(s) - 2)), _same, _spatial),
)  # fmt: skip
BY_NAME = {norm.name: norm for norm in NORMS}


def shape_of(layout: str) -> tuple[int, ...]:
    return (2, 6, 2, 3, 4) if layout == "channels_last_3d" else (2, 6, 3, 5)


def compare(
    norm: Norm, layout: str, dtype: torch.dtype, device: torch.device, *, train: bool = True,
    activation: str | None = None, adds: str = "none", weight_dtype: torch.dtype | None = None,
    leaves: tuple[str, ...] = ("x", "weight", "bias", "pre_add", "post_add"), shape: tuple[int, ...] | None = None,
) -> None:  # fmt: skip
    """One call and its backward, everything that comes out against the oracle."""
    shape = shape or shape_of(layout)
    x = laid_out(shape, layout, dtype, device)
    sizes = norm.weight(shape)
    tensors: dict[str, Tensor | None] = {
        "x": x,
        "weight": (torch.randn(sizes) * 0.5 + 1).to(device, weight_dtype or dtype),
        "bias": torch.randn(sizes).to(device, weight_dtype or dtype) if norm.bias else None,
        "pre_add": laid_out(shape, layout, dtype, device) if adds in ("pre", "both") else None,
        "post_add": torch.randn(shape).to(device, dtype) if adds in ("post", "both") else None,
    }
    for name, t in tensors.items():
        if t is not None and name in leaves:
            t.requires_grad_()
    exact = {name: leaf(t) for name, t in tensors.items()}

    options: dict[str, Any] = {"pre_add": tensors["pre_add"], "post_add": tensors["post_add"], "activation": activation}
    known: dict[str, Any] = {}
    if norm.running:
        rm, rv = torch.randn(shape[1], device=device), torch.rand(shape[1], device=device) + 0.5
        before = (rm.double(), rv.double())
        options |= {"rm": rm, "rv": rv, "train": train}
        if not train:
            view = _channel(shape)
            known = {"mean": rm.double().view(view), "var": rv.double().view(view)}
    w, b = (None if t is None else norm.given(t) for t in (tensors["weight"], tensors["bias"]))
    out = norm.call(x, w, b, **options)
    y, total = out if isinstance(out, tuple) else (out, None)
    assert (total is not None) == (adds in ("pre", "both"))
    ref, s = oracle(
        exact["x"], norm.axes(len(shape)), exact["weight"], exact["bias"], activation=activation,
        center=norm.center, groups=norm.groups, pre_add=exact["pre_add"], post_add=exact["post_add"],
        total=total, **known,
    )  # fmt: skip
    assert y.dtype == dtype and y.stride() == torch.empty_like(x).stride(), "y keeps dtype and memory format"
    check("y", y, ref)
    if total is not None:
        check("sum", total, exact["x"] + exact["pre_add"])
        assert total.dtype == dtype
    if norm.running:
        axes = norm.axes(len(shape))
        if train:
            mean, var = s.mean(axes), s.var(axes, unbiased=True)
            if norm.name == "instance":
                mean, var = mean.mean(0), var.mean(0)
            check("running_mean", rm, 0.7 * before[0] + 0.3 * mean)
            check("running_var", rv, 0.7 * before[1] + 0.3 * var)
        else:
            assert torch.equal(rm.double(), before[0]) and torch.equal(rv.double(), before[1])

    dy = torch.randn(shape).to(device, dtype)
    outs, grads, refs = [y], [dy], [ref]
    if total is not None:
        assert total.requires_grad == bool({"x", "pre_add"} & set(leaves)), "as x + pre_add does"
    if total is not None and total.requires_grad:
        dsum = torch.randn(shape).to(device, dtype)
        outs, grads, refs = [y, total], [dy, dsum], [ref, s]
    wanted = [name for name, t in tensors.items() if t is not None and name in leaves]
    got = torch.autograd.grad(outs, [tensors[n] for n in wanted], grads)
    expected = torch.autograd.grad(refs, [exact[n] for n in wanted], [g.double() for g in grads])
    for name, g, e in zip(wanted, got, expected, strict=True):
        assert g.dtype == tensors[name].dtype
        # A parameter finer than x gets a gradient of fp32 sums over exact inputs: fp32's tolerance, or fp64's.
        floor = torch.float32 if g.dtype == torch.float64 and dtype != torch.float64 else None
        check(f"gradient of {name}", g, e, dtype=floor)
        if name == "x":
            assert g.stride() == torch.empty_like(x).stride(), "dx keeps the memory format"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_layouts_and_dtypes(norm: Norm, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Activation and additions go round so that each meets each layout and dtype."""
    turn = NORMS.index(norm) + 3 * FORMATS.index(layout) + 7 * DTYPES.index(dtype)
    compare(norm, layout, dtype, device, activation=list(ACTIVATIONS)[turn % 9], adds=ADDS[turn % 4])


@pytest.mark.parametrize("which", ["ticketed", "split"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_groups_of_several_programs(norm: Norm, layout: str, which: str, device: torch.device) -> None:
    turn = NORMS.index(norm) + FORMATS.index(layout) + (which == "ticketed")
    with engine(which):
        compare(norm, layout, DTYPES[turn % 4], device, activation=list(ACTIVATIONS)[turn % 9], adds=ADDS[turn % 4])


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_fusions(norm: Norm, activation: str, adds: str, device: torch.device) -> None:
    compare(norm, "contiguous", torch.float32, device, activation=activation, adds=adds, shape=(2, 4, 3, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_eval(norm: str, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """Running statistics stand in; the backward treats them as constants."""
    turn = FORMATS.index(layout) + 3 * DTYPES.index(dtype) + (norm == "batch")
    compare(BY_NAME[norm], layout, dtype, device, train=False, activation=list(ACTIVATIONS)[turn % 9], adds=ADDS[turn % 4])


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("activation", ["identity", "silu", "hardswish"])
@pytest.mark.parametrize("which", ENGINES)
def test_eval_fusions(activation: str, adds: str, which: str, device: torch.device) -> None:
    with engine(which):
        compare(BY_NAME["batch"], "contiguous", torch.float32, device, train=False, activation=activation, adds=adds)


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
                                    (torch.float16, torch.float64), (torch.float64, torch.float32)], ids=str)  # fmt: skip
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "rms"])
def test_weights_of_another_dtype(norm: str, dtypes: Any, which: str, device: torch.device) -> None:
    with engine(which):
        compare(BY_NAME[norm], "contiguous", dtypes[0], device, weight_dtype=dtypes[1], shape=(2, 4, 3, 3))


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("leaves", [("weight",), ("bias",), ("x",), ("x", "weight"), ("x", "bias"), ("weight", "bias"),
                                    ("pre_add",), ("post_add",), ("bias", "post_add")], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_some_gradients(norm: str, leaves: tuple[str, ...], which: str, device: torch.device) -> None:
    with engine(which):
        compare(BY_NAME[norm], "contiguous", torch.float32, device, leaves=leaves, activation="silu",
                adds="both" if leaves[-1].endswith("add") else "none", shape=(2, 4, 3, 3))  # fmt: skip


@pytest.mark.parametrize("leaves", [("weight",), ("bias",), ("x",), ("weight", "bias")], ids="+".join)
def test_some_gradients_in_eval(leaves: tuple[str, ...], device: torch.device) -> None:
    compare(BY_NAME["batch"], "contiguous", torch.float32, device, train=False, leaves=leaves, activation="gelu")


def any_axes(
    shape: tuple[int, ...], axes: tuple[int, ...], varying: tuple[int, ...] | None, layout: str, device: torch.device
) -> None:
    """normalize() over `axes` with parameters along `varying`, forward and backward."""
    x = laid_out(shape, layout, torch.float32, device).requires_grad_()
    sizes = None if varying is None else [n if i in varying else 1 for i, n in enumerate(shape)]
    params = [] if sizes is None else [torch.randn(sizes, device=device, requires_grad=True) for _ in range(2)]
    y = normops.normalize(x, axes, *params, eps=1e-2)
    exact = [leaf(t) for t in (x, *params)]
    ref, _ = oracle(exact[0], axes, *exact[1:], eps=1e-2)
    check("y", y, ref)
    dy = torch.randn(shape, device=device)
    got = torch.autograd.grad(y, [x, *params], dy)
    for name, g, e in zip(("x", "weight", "bias"), got, torch.autograd.grad(ref, exact, dy.double()), strict=False):
        # A group of two or three nearly cancels its gradient (eps = 1e-2 leaves a part): a few more roundings count.
        check(f"gradient of {name}", g, e, scale=10)
    assert y.stride() == torch.empty_like(x).stride() == got[0].stride()


SUBSETS = [axes for n in range(1, 5) for axes in combinations(range(4), n)]


@pytest.mark.parametrize("layout", [f for f in FORMATS if f != "channels_last_3d"])
@pytest.mark.parametrize("axes", SUBSETS, ids=str)
def test_every_subset_of_axes(axes: tuple[int, ...], layout: str, device: torch.device) -> None:
    for varying in (None, (1,), (1, 3), (0, 2)):
        any_axes((2, 3, 4, 3), axes, varying, layout, device)


@pytest.mark.parametrize("which", ["ticketed", "split"])
@pytest.mark.parametrize("axes", SUBSETS[::2], ids=str)
def test_subsets_of_axes_in_several_programs(axes: tuple[int, ...], which: str, device: torch.device) -> None:
    with engine(which):
        any_axes((2, 3, 4, 5), axes, (1, 2), "contiguous", device)
        any_axes((2, 3, 4, 5), axes, (0, 1), "permuted", device)


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize(("shape", "axes", "varying"), [
    ((7,), (0,), (0,)), ((7,), (0,), None), ((3, 5), (1,), (1,)), ((3, 5), (0,), (1,)), ((3, 5), (0, 1), (0,)),
    ((2, 3, 5), (0, 2), (1,)), ((2, 3, 5), (1,), (1, 2)), ((2, 3, 4, 3, 2), (0, 2, 4), (1,)),
    ((2, 3, 4, 3, 2), (0, 2, 4), (0, 3)), ((2, 3, 4, 3, 2), (1, 3), (1, 2, 4)), ((2, 2, 2, 2, 2, 3), (0, 2, 4), (1, 5)),
], ids=str)  # fmt: skip
def test_ranks(shape: Any, axes: Any, varying: Any, which: str, device: torch.device) -> None:
    with engine(which):
        any_axes(shape, axes, varying, "permuted" if len(shape) > 1 else "contiguous", device)


PATTERNS: list[tuple[str, dict[str, int], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    # pattern, lengths, the shape it splits (2, 6, 3, 4) into, reduced axes of that, shape of the statistics
    ("n c h w -> c", {}, (2, 6, 3, 4), (0, 2, 3), (6,)),
    ("n c h w -> n", {}, (2, 6, 3, 4), (1, 2, 3), (2,)),
    ("n c h w -> n c", {}, (2, 6, 3, 4), (2, 3), (2, 6)),
    ("n c h w -> c n", {}, (2, 6, 3, 4), (2, 3), (6, 2)),
    ("n c h w -> n h w", {}, (2, 6, 3, 4), (1,), (2, 3, 4)),
    ("n c h w -> w h n", {}, (2, 6, 3, 4), (1,), (4, 3, 2)),
    ("n c h w ->", {}, (2, 6, 3, 4), (0, 1, 2, 3), ()),
    ("n (g c) h w -> n g", {"g": 3}, (2, 3, 2, 3, 4), (2, 3, 4), (2, 3)),
    ("n (c g) h w -> (g n)", {"g": 3}, (2, 2, 3, 3, 4), (1, 3, 4), (6,)),
    ("n ... w -> n ...", {}, (2, 6, 3, 4), (3,), (2, 6, 3)),
    ("n ... -> n", {"n": 2}, (2, 6, 3, 4), (1, 2, 3), (2,)),
    ("n c h (a b) -> a c", {"a": 2}, (2, 6, 3, 2, 2), (0, 2, 4), (2, 6)),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize(("pattern", "lengths", "split", "reduced", "stats"), PATTERNS, ids=[p[0] for p in PATTERNS])
def test_patterns(
    pattern: str, lengths: Any, split: Any, reduced: Any, stats: Any, layout: str, device: torch.device
) -> None:
    x = laid_out((2, 6, 3, 4), layout, torch.float32, device)
    y, mean, rstd = normops.normalize(x, pattern, return_stats=True, **lengths)
    parts = x.double().reshape(split)
    ref, _ = oracle(parts, reduced)
    check("y", y, ref.reshape(x.shape))
    expected_mean = parts.mean(reduced)
    expected_rstd = (parts.var(reduced, unbiased=False) + 1e-5).rsqrt()
    assert mean.shape == stats and rstd.shape == stats
    assert mean.dtype == rstd.dtype == torch.float32
    # Axes kept, in the order in which the right side names them.
    order = {"n c h w -> c n": (1, 0), "n c h w -> w h n": (2, 1, 0), "n (c g) h w -> (g n)": (1, 0),
             "n c h (a b) -> a c": (1, 0)}.get(pattern)  # fmt: skip
    if order is not None:
        expected_mean, expected_rstd = expected_mean.permute(order), expected_rstd.permute(order)
    check("mean", mean, expected_mean.reshape(stats), scale=10)  # a mean is small beside what it is the mean of
    check("rstd", rstd, expected_rstd.reshape(stats))
    if split == tuple(x.shape):
        assert torch.equal(y, normops.normalize(x, reduced)), "int axes say the same"


def test_pattern_affine(device: torch.device) -> None:
    """Joined and swapped axes of the parameters."""
    x = torch.randn(2, 6, 3, device=device)
    for affine, shape, order in (("c", (6,), (1, 6, 1)), ("c l", (6, 3), (1, 6, 3)), ("(c l)", (18,), (1, 6, 3))):
        w, b = torch.randn(shape, device=device), torch.randn(shape, device=device)
        ref, _ = oracle(x.double(), (1, 2), w.double().reshape(order), b.double().reshape(order))
        check("y", normops.normalize(x, "n c l -> n", w, b, affine=affine), ref)
    w = torch.randn(3, 6, device=device, requires_grad=True)
    y = normops.normalize(x, "n c l -> n", w, affine="l c")
    exact = leaf(w)
    ref, _ = oracle(x.double(), (1, 2), exact.t())
    check("swapped", y, ref)
    dy = torch.randn_like(y)
    check("its gradient", torch.autograd.grad(y, w, dy)[0], torch.autograd.grad(ref, exact, dy.double())[0])


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("which", ENGINES)
def test_return_stats(axes: tuple[int, ...], which: str, device: torch.device) -> None:
    x = laid_out((3, 4, 5), "permuted", torch.bfloat16, device).requires_grad_()
    with engine(which):
        y, mean, rstd = normops.normalize(x, axes, return_stats=True)
        rms = normops.normalize(x, axes, center=False, return_stats=True)
    kept = tuple(n for i, n in enumerate(x.shape) if i not in axes)
    exact = x.detach().double()
    assert mean.shape == rstd.shape == kept and mean.dtype == rstd.dtype == torch.float32
    check("mean", mean, exact.mean(axes), scale=10)
    check("rstd", rstd, (exact.var(axes, unbiased=False) + 1e-5).rsqrt())
    assert rms[1] is None
    check("rms", rms[2], (exact.square().mean(axes) + 1e-5).rsqrt())
    assert y.requires_grad and not mean.requires_grad and not rstd.requires_grad


def test_broadcast_additions(device: torch.device) -> None:
    """pre_add and post_add smaller than x, in another dtype: gradients have their shape, the sum x's promoted dtype."""
    x = torch.randn(2, 4, 5, device=device, dtype=torch.bfloat16).requires_grad_()
    pre = torch.randn(4, 1, device=device, requires_grad=True)
    post = torch.randn(2, 1, 5, device=device, requires_grad=True)
    y, total = normops.normalize(x, (1, 2), pre_add=pre, post_add=post, activation="silu")
    exact = [leaf(t) for t in (x, pre, post)]
    ref, _ = oracle(exact[0], (1, 2), pre_add=exact[1], post_add=exact[2], activation="silu", total=total)
    assert total.dtype == torch.float32 and y.dtype == torch.bfloat16
    check("y", y, ref)
    check("sum", total, exact[0] + exact[1])
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, pre, post], dy)
    for name, g, e in zip(("x", "pre_add", "post_add"), got, torch.autograd.grad(ref, exact, dy.double()), strict=True):
        check(name, g, e)


def test_only_the_sum_is_used(device: torch.device) -> None:
    x, pre = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    w = torch.randn(8, device=device, requires_grad=True)
    _, total = F.layer_norm(x, (8,), w, pre_add=pre)
    dsum = torch.randn_like(total)
    dx, dpre, dw = torch.autograd.grad(total, [x, pre, w], dsum, allow_unused=True)
    check("dx", dx, dsum)
    check("dpre", dpre, dsum)
    assert dw is None or not dw.any()
