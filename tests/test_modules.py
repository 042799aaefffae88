"""Modules in the hands of PyTorch's tools: checkpoints, initialisation, parametrisations, hooks, optimisers,
conversions, tracing; beside torch.nn's own with the same parameters."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.nn.utils import parametrize

from normops import functional as F
from normops import nn
from tests.pairs import NORMS, SHAPE, alike, build, equal, norms, operands
from tests.tolerance import check

KINDS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "BatchNorm2d": (nn.BatchNorm2d, (4,), {}),
    "InstanceNorm2d": (nn.InstanceNorm2d, (4,), {"affine": True, "track_running_stats": True}),
    "GroupNorm": (nn.GroupNorm, (2, 4), {}),
    "LayerNorm": (nn.LayerNorm, (3,), {}),
    "RMSNorm": (nn.RMSNorm, (3,), {"eps": 1e-5}),
    "LayerNorm2d": (nn.LayerNorm2d, (4,), {}),
    "Normalize": (nn.Normalize, ("n (g c) h w -> n g",), {"affine": "(g c)", "g": 2, "c": 2}),
}
"""What the entries of NORMS are built from."""


def state(module: Any) -> list[Tensor]:
    return [t.detach() for t in module.state_dict().values()]


def trained(name: str, device: torch.device) -> tuple[Any, Any]:
    """(ours, torch's) after a step, so that running statistics are not those of a new module."""
    ours, theirs = build(name, device)
    theirs(torch.randn(SHAPE, device=device) + 1)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@norms
def test_skip_init(name: str, device: torch.device) -> None:
    """Parameters without values, which reset_parameters then makes those of a new module.  PyTorch looks for a
    `device` in the signature of the class."""
    kind, args, options = KINDS[name]
    norm = torch.nn.utils.skip_init(kind, *args, device=device, **options)
    fresh = kind(*args, device=device, **options)
    assert all(p.device == fresh.weight.device for p in norm.parameters())
    alike(state(norm), state(fresh))
    norm.reset_parameters()
    equal(state(norm), state(fresh))


@norms
def test_to_empty(name: str, device: torch.device) -> None:
    """A module of the meta device gets memory, and then the state of another."""
    source, _ = trained(name, device)
    norm = NORMS[name][0](activation="silu", device="meta")
    assert all(t.is_meta for t in state(norm))
    norm.to_empty(device=device).load_state_dict(source.state_dict())
    equal(state(norm), state(source))
    x = torch.randn(SHAPE, device=device)
    check("y", norm.eval()(x), torch.nn.functional.silu(source.eval()(x)), scale=5)
    assert norm.activation == "silu"


@norms
def test_assign(name: str, device: torch.device) -> None:
    """load_state_dict(assign=True) into a module of the meta device takes the tensors themselves."""
    source, _ = trained(name, device)
    norm = NORMS[name][0](device="meta")
    assert not any(norm.load_state_dict(source.state_dict(), assign=True))
    for a, b in zip(norm.state_dict().values(), source.state_dict().values(), strict=True):
        assert a.data_ptr() == b.data_ptr()
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in norm.parameters())
    x = torch.randn(SHAPE, device=device)
    equal(norm.eval()(x), source.eval()(x))


@norms
@pytest.mark.parametrize("direction", ["from torch's", "to torch's"])
def test_checkpoints(name: str, direction: str, device: torch.device, tmp_path: Path) -> None:
    """A state_dict goes through a file, weights only, into torch's module and back, strictly."""
    ours, theirs = trained(name, device)
    fresh = [NORMS[name][i]().to(device) for i in (0, 1)]
    source, target = (theirs, fresh[0]) if direction == "from torch's" else (ours, fresh[1])
    torch.save(source.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(loaded) == list(theirs.state_dict()), "names, in torch's order"
    assert not any(target.load_state_dict(loaded, strict=True))
    equal(state(target), state(source))
    assert target.state_dict()._metadata == theirs.state_dict()._metadata


@norms
def test_missing_and_unexpected_keys(name: str, device: torch.device) -> None:
    """A strict load names them as torch's modules do."""
    errors = []
    for norm in build(name, device):
        wrong = {"nonsense": torch.zeros(1), **{k: v for k, v in norm.state_dict().items() if k != "weight"}}
        with pytest.raises(RuntimeError) as caught:
            norm.load_state_dict(wrong)
        errors.append(str(caught.value).split(":", 1)[1])
    assert errors[0] == errors[1] and '"weight"' in errors[0]


@norms
def test_a_whole_module_goes_through_a_file(name: str, device: torch.device) -> None:
    """With activation, out_dtype and mode, and memory of its own (deepcopy and pickle: test_nn.py)."""
    norm = NORMS[name][0](activation="silu", out_dtype=torch.float64).to(device).eval()
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = torch.randn(SHAPE, device=device)
    equal(other(x), norm(x))
    assert (repr(other), other.training, type(other)) == (repr(norm), False, type(norm))
    assert not {t.data_ptr() for t in state(other)} & {t.data_ptr() for t in state(norm)}


class Doubled(torch.nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2 * t


@norms
def test_parametrize(name: str, device: torch.device) -> None:
    """A weight that is computed: as in torch's norm, forward and gradient."""
    found = []
    x, *_, dy = operands(device)
    for norm in build(name, device):
        parametrize.register_parametrization(norm, "weight", Doubled())
        y = norm(x)
        found.append([y, *torch.autograd.grad(y, [x, *norm.parameters()], dy)])
        parametrize.remove_parametrizations(norm, "weight")
        found[-1].append(norm.weight)
    for got, expected in zip(*found, strict=True):
        check("result", got, expected, scale=5)


@norms
def test_weight_norm(name: str, device: torch.device) -> None:
    """torch.nn.utils.parametrizations.weight_norm, whose magnitude and direction get gradients."""
    x, *_, dy = operands(device)
    found = []
    for norm in build(name, device):
        torch.nn.utils.parametrizations.weight_norm(norm, dim=None)
        found.append(torch.autograd.grad(norm(x), list(norm.parameters()), dy))
    for got, expected in zip(*found, strict=True):
        check("gradient", got, expected, scale=5)


@norms
def test_hooks(name: str, device: torch.device) -> None:
    """All kinds of hooks, with extras as keywords: what they see, and what they change."""
    norm, _ = build(name, device, activation="silu")
    x, pre, post, dy = operands(device)
    seen: list[str] = []

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        assert module is norm and args[0] is x and kwargs == {"pre_add": pre, "post_add": post}
        seen.append("pre")
        return (args[0] * 2,), kwargs

    def after(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        assert module is norm and len(out) == 2 and kwargs["post_add"] is post
        seen.append("forward")
        return out[0] * 4, out[1]

    expected = copy.deepcopy(norm)(2 * x, pre_add=pre, post_add=post)
    handles = [
        norm.register_forward_pre_hook(before, with_kwargs=True),
        norm.register_forward_hook(after, with_kwargs=True),
    ]
    y, total = norm(x, pre_add=pre, post_add=post)
    equal([y, total], [4 * expected[0], expected[1]])
    assert seen == ["pre", "forward"]
    for handle in handles:
        handle.remove()

    norm.register_full_backward_pre_hook(lambda module, g: (g[0] * 2, g[1]))
    norm.register_full_backward_hook(lambda module, into, out: (into[0] * 8,) if out[0] is not None else None)
    plain = copy.deepcopy(norm)
    plain._backward_hooks.clear()
    plain._backward_pre_hooks.clear()
    y, total = norm(x, pre_add=pre)
    found = torch.autograd.grad((y, total), [x, *norm.parameters()], (dy, dy))
    y, total = plain(x, pre_add=pre)
    dx, *others = torch.autograd.grad((y, total), [x, *plain.parameters()], (2 * dy, dy))
    equal(list(found), [8 * dx, *others])


OPTIMIZERS: dict[str, Any] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 0.05, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
}


@norms
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(name: str, optimizer: str, device: torch.device) -> None:
    """Steps, with clipping of the gradients' norm, take parameters and statistics where torch's norm takes them."""
    x, *_, target = (t.detach() for t in operands(device))
    pair = build(name, device)
    for norm in pair:
        steps = OPTIMIZERS[optimizer](norm.parameters())
        for _ in range(3):
            steps.zero_grad()
            (norm(x) - target).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(norm.parameters(), 0.5, foreach=True)
            steps.step()
    # Adam divides by the root of a mean of squares: the error of a small gradient grows.
    for (key, a), b in zip(pair[0].state_dict().items(), pair[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_sync_batch_norm(device: torch.device) -> None:
    """convert_sync_batchnorm takes our BatchNorm for torch's, with its parameters; what it cannot carry is an
    activation, as SyncBatchNorm has none."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)).to(device)
    x = torch.randn(SHAPE, device=device)
    net(x)
    expected = net.eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert [type(m) for m in converted] == [
        torch.nn.Conv2d, torch.nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm
    ]  # fmt: skip
    check("y", converted.eval()(x), expected, scale=5)


def test_running_statistics_can_be_dropped_for_vmap(device: torch.device) -> None:
    """torch.func.replace_all_batch_norm_modules_ finds our BatchNorm; per-sample models then normalise alone."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, activation="relu")).to(device)
    replace_all_batch_norm_modules_(net)
    assert net[1].running_mean is None and net[1].num_batches_tracked is None and not net[1].track_running_stats
    x = torch.randn(3, 1, 4, 3, 3, device=device)
    found = torch.func.vmap(net)(x)
    check("y", found, torch.stack([net(t) for t in x]), scale=5)


@norms
def test_fx(name: str, device: torch.device) -> None:
    """symbolic_trace keeps our modules whole, with their keywords, as it keeps torch's."""
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = build(name, device, activation="silu")[0]

        def forward(self, x: Tensor, r: Tensor) -> Any:
            y, total = self.norm(x, pre_add=r)
            return y * 2 + total

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    x, r, *_ = operands(device)
    equal(traced(x, r), copy.deepcopy(model)(x, r))


@norms
def test_functional_call(name: str, device: torch.device) -> None:
    """Parameters and statistics come from outside: a call moves those given, and leaves the module's alone."""
    ours, theirs = trained(name, device)
    x, pre, post, _ = operands(device)
    before = [t.clone() for t in state(ours)]
    given = {k: t.detach().clone() for k, t in theirs.state_dict().items()}
    y, total = functional_call(ours, given, (x,), {"pre_add": pre, "post_add": post})
    check("y", y, theirs(x + pre) + post, scale=5)
    equal(state(ours), before)
    for (key, a), b in zip(given.items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(total, x + pre)


@norms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_converted_models(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """half(), bfloat16() and double() convert parameters and statistics, and leave the counter."""
    ours, theirs = trained(name, device)
    convert = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    getattr(ours, convert)()
    exact = getattr(theirs, convert)().double()  # of the rounded parameters
    assert all(t.dtype == (dtype if t.is_floating_point() else torch.int64) for t in state(ours))
    x = torch.randn(SHAPE, device=device).to(dtype)
    y = ours(x)
    assert y.dtype == dtype
    check("y", y, exact(x.double()), scale=2)
    for a, b in zip(state(ours), state(exact), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    check("y", ours.eval()(x), copy.deepcopy(ours).double()(x.double()), scale=2)


@norms
def test_train_and_eval_switch(name: str, device: torch.device) -> None:
    """eval() uses running statistics and leaves them; train() moves them again: as torch's, there and back."""
    ours, theirs = trained(name, device)
    for training in (True, False, True, False, False):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(SHAPE, device=device) * 2 + 1
        before = [t.clone() for t in state(ours)]
        check("y", ours(x), theirs(x), scale=5)
        if not training:
            equal(state(ours), before)
        for a, b in zip(state(ours), state(theirs), strict=True):
            torch.testing.assert_close(a, b)


@norms
def test_requires_grad(name: str, device: torch.device) -> None:
    """A frozen norm passes gradients on and gets none."""
    norm = build(name, device)[0].requires_grad_(False)
    x, *_, dy = operands(device)
    norm(x).backward(dy)
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in norm.parameters())
    assert not norm(x.detach()).requires_grad


def test_functions_are_those_of_the_modules(device: torch.device) -> None:
    """functional_call with another bias is the function with that bias: nothing is remembered of a module."""
    norm = nn.GroupNorm(2, 4).to(device)
    x, bias = torch.randn(SHAPE, device=device), torch.randn(4, device=device)
    equal(functional_call(norm, {"bias": bias}, x), F.group_norm(x, 2, norm.weight, bias))
