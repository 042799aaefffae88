# ruff: noqa: E501  (tables)
"""Modules beside torch.nn's: the same seed and state_dict, the same outputs, statistics, repr and copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from normops import nn
from tests.tolerance import check, oracle

CASES: list[tuple[str, tuple[Any, ...], tuple[int, ...]]] = [
    ("BatchNorm1d", (4,), (5, 4)), ("BatchNorm1d", (4,), (3, 4, 5)), ("BatchNorm2d", (4,), (2, 4, 3, 3)),
    ("BatchNorm3d", (4,), (2, 4, 2, 2, 3)), ("InstanceNorm1d", (4,), (2, 4, 5)), ("InstanceNorm2d", (4,), (2, 4, 3, 3)),
    ("InstanceNorm3d", (4,), (2, 4, 2, 2, 3)), ("InstanceNorm2d", (4,), (4, 3, 3)), ("InstanceNorm1d", (4,), (4, 5)),
    ("GroupNorm", (2, 4), (2, 4, 3, 3)), ("GroupNorm", (2, 8), (2, 8)), ("LayerNorm", (5,), (2, 3, 5)),
    ("LayerNorm", ((3, 5),), (2, 3, 5)), ("RMSNorm", (5,), (2, 3, 5)), ("RMSNorm", ((3, 5),), (2, 3, 5)),
]  # fmt: skip
IDS = [f"{name}{shape}" for name, _, shape in CASES]


def pair(name: str, args: tuple[Any, ...], device: torch.device, **options: Any) -> tuple[Any, Any]:
    """(ours, torch's) with the same state."""
    theirs = getattr(torch.nn, name)(*args, **options).to(device)
    ours = getattr(nn, name)(*args, **options).to(device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), "built alike"
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def same(ours: Any, theirs: Any, shape: tuple[int, ...], device: torch.device, steps: int = 2) -> None:
    for _ in range(steps):
        x = torch.randn(shape, device=device) * 2 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, ref = ours(a), theirs(b)
        # torch computes in fp32 too: twice the tolerance of one implementation, and a few ulp for another algorithm
        check("y", y, ref, scale=5)
        dy = torch.randn_like(y)
        if ref.requires_grad:
            got = torch.autograd.grad(y, [a, *ours.parameters()], dy)
            for g, e in zip(got, torch.autograd.grad(ref, [b, *theirs.parameters()], dy), strict=True):
                check("gradient", g, e, scale=5)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if a.is_floating_point():
            check(name, a, b, scale=5)
        else:
            assert a == b, name


@pytest.mark.parametrize(("name", "args", "shape"), CASES, ids=IDS)
def test_train_and_eval(name: str, args: Any, shape: Any, device: torch.device) -> None:
    options = {"affine": True, "track_running_stats": True} if name.startswith("Instance") else {}
    ours, theirs = pair(name, args, device, **options)
    same(ours, theirs, shape, device)
    same(ours.eval(), theirs.eval(), shape, device, steps=1)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("options", [
    {"track_running_stats": False}, {"momentum": None}, {"affine": False}, {"eps": 0.1, "momentum": 0.5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("name", "args", "shape"), [c for c in CASES if "Batch" in c[0] or "Instance" in c[0]][:6])
def test_options(name: str, args: Any, shape: Any, options: Any, device: torch.device) -> None:
    if name.startswith("Instance"):
        options = {"track_running_stats": True, **options}
    ours, theirs = pair(name, args, device, **options)
    same(ours, theirs, shape, device, steps=3)
    same(ours.eval(), theirs.eval(), shape, device, steps=1)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize(("name", "args", "shape"), [c for c in CASES if c[0] in ("GroupNorm", "LayerNorm", "RMSNorm")])
def test_without_parameters(name: str, args: Any, shape: Any, device: torch.device) -> None:
    ours, theirs = pair(name, args, device, **{"affine" if name == "GroupNorm" else "elementwise_affine": False})
    same(ours, theirs, shape, device, steps=1)
    assert repr(ours) == repr(theirs)


def test_layer_norm_without_bias(device: torch.device) -> None:
    ours, theirs = pair("LayerNorm", (5,), device, bias=False)
    assert ours.bias is None
    same(ours, theirs, (2, 5), device, steps=1)


BUILT = [(getattr(nn, name), args, shape) for name, args, shape in CASES[::2]] + [(nn.LayerNorm2d, (4,), (2, 4, 3, 3))]


@pytest.mark.parametrize(("kind", "args", "shape"), BUILT, ids=lambda v: getattr(v, "__name__", None))
def test_copies(kind: Any, args: Any, shape: Any, device: torch.device) -> None:
    module = kind(*args, activation="silu").to(device)
    x = torch.randn(shape, device=device)
    module(x)  # moves running statistics
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is kind and repr(other) == repr(module) and "activation=silu" in repr(other)
        for a, b in zip(other.state_dict().values(), module.state_dict().values(), strict=True):
            assert torch.equal(a, b) and (a.numel() == 0 or a.data_ptr() != b.data_ptr())
        assert torch.equal(other.eval()(x), copy.deepcopy(module).eval()(x))


def test_extras(device: torch.device) -> None:
    bn = nn.BatchNorm2d(4, activation="relu").to(device)
    x, pre, post = (torch.randn(2, 4, 3, 3, device=device) for _ in range(3))
    y, total = bn(x, pre_add=pre, post_add=post)
    check("sum", total, x.double() + pre.double())
    check("y", y, oracle(total.double(), (0, 2, 3), post_add=post.double(), activation="relu")[0])
    assert isinstance(bn(x, post_add=post), torch.Tensor)


def test_unbatched_instance_norm_extras(device: torch.device) -> None:
    norm = nn.InstanceNorm2d(4)
    x, pre = (torch.randn(4, 3, 3, device=device) for _ in range(2))
    y, total = norm(x, pre_add=pre)
    assert y.shape == total.shape == x.shape
    check("y", y, oracle(total.double(), (1, 2))[0])


def test_layer_norm_2d(device: torch.device) -> None:
    norm = nn.LayerNorm2d(6).to(device)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias).permute(0, 3, 1, 2)
    y = norm(x)
    check("y", y, expected, scale=5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert repr(norm) == "LayerNorm2d(6, eps=1e-05, affine=True, bias=True)"
    assert not list(nn.LayerNorm2d(6, affine=False).parameters())


def test_normalize_module(device: torch.device) -> None:
    group, named = nn.Normalize("n (g c) h w -> n g", affine="(g c)", g=2, c=2).to(device), nn.GroupNorm(2, 4).to(device)
    torch.nn.init.normal_(named.weight)
    group.load_state_dict(named.state_dict())
    x = torch.randn(2, 4, 3, 3, device=device)
    assert torch.equal(group(x), named(x))
    rms = nn.Normalize("b ... d -> b ...", affine="d", center=False, bias=False, d=5)
    assert rms.bias is None
    check("rms", rms.to(device)(torch.ones(2, 3, 5, device=device) * 2), torch.ones(2, 3, 5).double(), scale=10)
    assert "'b ... d -> b ...'" in repr(rms) and "d=5" in repr(rms)


def test_the_rest_is_torch_nn() -> None:
    for name in ("Linear", "Module", "functional", "Conv2d", "Sequential", "Parameter", "init", "ModuleList", "utils"):
        assert getattr(nn, name) is getattr(torch.nn, name)
    assert set(dir(torch.nn)) <= set(dir(nn))
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        nn.Nonsense  # noqa: B018
    for name in ("BatchNorm2d", "GroupNorm", "LayerNorm", "RMSNorm", "InstanceNorm1d"):
        assert issubclass(getattr(nn, name), getattr(torch.nn, name)) and getattr(nn, name) is not getattr(torch.nn, name)


def test_a_network_trains(device: torch.device) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, activation="relu"), nn.Flatten(), nn.Linear(36, 2)).to(device)
    before = net[1].weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x, target = torch.randn(4, 1, 5, 5, device=device), torch.tensor([0, 1, 0, 1], device=device)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(before, net[1].weight)
    assert net[1].num_batches_tracked == 4
