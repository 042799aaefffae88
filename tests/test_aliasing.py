"""What a backward needs, and whose memory is whose: what is saved, what may be changed in place, which tensors share
memory, and computing again under checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from normops import calls
from normops import functional as F
from tests.pairs import SHAPE, build, equal, norms, operands, run
from tests.tolerance import ACTIVATIONS, check, laid_out

MODIFIED = "modified by an inplace operation"


@pytest.fixture(params=["kernels", "formula"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels, and what runs where kernels cannot."""
    calls.known.clear()
    if request.param == "formula":
        monkeypatch.setattr(calls, "uses_kernels", lambda x: False)
    yield request.param
    calls.known.clear()


def places(*tensors: Tensor | None) -> list[int]:
    """The memory of each tensor; of an empty one too."""
    return [t.untyped_storage()._cdata for t in tensors if t is not None]


def exact(theirs: Any, tensors: list[Tensor], activation: str | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """(leaves, y, sum) in float64, of torch's norm on x + pre_add, with post_add and the activation after it."""
    x, pre, post = (t.detach().double().requires_grad_() for t in tensors[:3])
    total = x + pre
    y = ACTIVATIONS[activation or "identity"](theirs.double()(total) + post)
    return [x, pre, post, *theirs.parameters()], y, total


def right(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        check(f"{name} {i}", g, e, scale=4)


@norms
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("adds", [False, True], ids=["", "adds"])
def test_what_is_saved(name: str, training: bool, activation: str | None, adds: bool, device: torch.device) -> None:
    """x or the sum, the parameters, the statistics, and post_add where an activation follows: each at most once."""
    norm = build(name, device, activation=activation)[0].train(training)
    x, pre, post, _ = operands(device)
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        out = norm(x, **({"pre_add": pre, "post_add": post} if adds else {}))
    places = [t.data_ptr() for t in seen]
    assert len(set(places)) == len(places), "saved twice"
    known = {(out[1] if adds else x).data_ptr(), *(p.data_ptr() for p in norm.parameters())}
    known |= {post.data_ptr()} if adds and activation else set()
    assert known >= {p for p, t in zip(places, seen, strict=True) if t.shape == x.shape}
    statistics = [t for p, t in zip(places, seen, strict=True) if p not in known]
    assert len(statistics) == 1 and statistics[0].dtype == torch.float32


@norms
@pytest.mark.parametrize(("kind", "layout"), [
    ("moved to the CPU", "sliced"), ("cloned", "channels_last"), ("cloned", "sliced"), ("dense", "channels_last"),
])  # fmt: skip
def test_saved_tensors_may_come_back_elsewhere(name: str, layout: str, kind: str, device: torch.device) -> None:
    """save_on_cpu, and hooks that give back the same values in other memory with other strides (a clone of a sliced
    tensor is dense, pinned memory is contiguous): all of torch's norms read the strides they are given."""
    norm, _ = build(name, device, activation="silu")
    args = operands(device, layout=layout)
    expected = run(copy.deepcopy(norm), *args)
    hooks = {
        "moved to the CPU": lambda: save_on_cpu(),
        "cloned": lambda: saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t),
        "dense": lambda: saved_tensors_hooks(lambda t: t.detach().contiguous().clone(), lambda t: t),
    }[kind]
    with hooks():
        found = run(norm, *args)
    for got, e in zip(found, expected, strict=True):
        check("gradient", got, e)  # another order of memory is another order of sums


@norms
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
def test_checkpoint(name: str, reentrant: bool, device: torch.device) -> None:
    """Gradients of a checkpointed norm are the bits of those without."""
    norm, _ = build(name, device, activation="silu")
    x, pre, post, dy = operands(device)
    expected = run(copy.deepcopy(norm), x, pre, post, dy)

    def leaves() -> list[Tensor]:
        return [x, pre, post, *norm.parameters()]

    y, total = checkpoint(
        lambda x, pre, post: norm(x, pre_add=pre, post_add=post), x, pre, post, use_reentrant=reentrant
    )
    torch.autograd.backward((y, total), (dy, dy))  # the reentrant kind knows no autograd.grad
    equal([y, total, *(t.grad for t in leaves())], expected)


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])
@pytest.mark.parametrize("momentum", [0.3, None], ids=["momentum", "cumulative"])
def test_running_statistics_under_checkpointing(
    name: str, reentrant: bool, momentum: float | None, device: torch.device
) -> None:
    """The recomputation leaves running statistics and the count of batches alone: they are those of torch's norm
    without a checkpoint."""
    if name == "InstanceNorm2d" and momentum is None:
        pytest.skip("torch's InstanceNorm takes None for 0")
    pair = build(name, device)
    for norm in pair:
        norm.momentum = momentum
    for _ in range(3):
        x = torch.randn(SHAPE, device=device) * 2 + 1
        checkpoint(pair[0], x.clone().requires_grad_(), use_reentrant=reentrant).square().sum().backward()
        pair[1](x)
    for (key, a), b in zip(pair[0].named_buffers(), pair[1].buffers(), strict=True):
        if a.is_floating_point():
            check(key, a, b, scale=5)
        else:
            assert a == b, f"{key} is {a}, torch's {b}"


@norms
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
def test_selective_checkpoint(name: str, saved: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.ops.normops.forward.default is an operator of a policy: what must be saved is not computed again."""
    norm, _ = build(name, device, activation="silu")
    args = operands(device)
    expected = run(copy.deepcopy(norm), *args)
    forwards: list[int] = []
    kernels = calls.Call.forward
    monkeypatch.setattr(calls.Call, "forward", lambda *a, **k: (forwards.append(1), kernels(*a, **k))[1])

    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        keep = saved and op == torch.ops.normops.forward.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.MUST_RECOMPUTE

    x, pre, post, dy = args
    y, total = checkpoint(
        lambda x, pre, post: norm(x.clone(), pre_add=pre, post_add=post), x, pre, post, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    found = [y, total, *torch.autograd.grad((y, total), [x, pre, post, *norm.parameters()], (dy, dy))]
    equal(found, expected)
    assert len(forwards) == (1 if saved else 2)




@norms
@pytest.mark.parametrize("which", ["x", "weight", "post_add"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_changed_operand_that_is_saved_raises(name: str, which: str, training: bool, device: torch.device) -> None:
    norm = build(name, device, activation="silu")[0].train(training)
    x, _, post, _ = operands(device)
    y = norm(x, post_add=post)
    with torch.no_grad():
        {"x": x, "weight": norm.weight, "post_add": post}[which].add_(1)
    with pytest.raises(RuntimeError, match=MODIFIED):
        y.sum().backward()


@norms
@pytest.mark.parametrize("which", ["x", "pre_add", "post_add", "statistics", "bias"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_changed_operand_that_is_not_needed_does_no_harm(
    name: str, which: str, training: bool, device: torch.device
) -> None:
    """x and pre_add behind their sum, post_add where no activation follows, running statistics ever.  bias is not
    needed either without an activation: it is saved with the other parameters, and may raise, as in torch's LayerNorm
    (not in its BatchNorm and GroupNorm).  torch's BatchNorm raises for running statistics."""
    norm = build(name, device)[0].train(training)
    x, pre, post, dy = operands(device)
    wanted = [x, pre, post, *norm.parameters()]
    expected = run(copy.deepcopy(norm), x, pre, post, dy)[2:]
    changed = {"x": [x], "pre_add": [pre], "post_add": [post], "statistics": list(norm.buffers())}.get(which)
    if changed is None:
        changed = [t for t in [getattr(norm, "bias", None)] if t is not None]
    if not changed:
        pytest.skip(f"{name} has no {which}")
    out = norm(x, pre_add=pre, post_add=post)
    with torch.no_grad():
        for t in changed:
            t.add_(1)
    try:
        found = torch.autograd.grad(out, wanted, (dy, dy))
    except RuntimeError as error:
        assert which == "bias" and MODIFIED in str(error)
    else:
        equal(list(found), expected)


@norms
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("which", ["y", "sum", "both"])
def test_results_changed_in_place(
    name: str, activation: str | None, which: str, way: str, device: torch.device
) -> None:
    """y is not saved: what is done to it in place has its gradient.  The sum is: a change raises, or has its own.
    In the formula PyTorch may need y, and says so."""
    ours, theirs = build(name, device, activation=activation)
    x, pre, post, dy = operands(device)
    leaves, ref, total = exact(theirs, [x, pre, post], activation)
    y, s = ours(x, pre_add=pre, post_add=post)
    if which != "sum":
        y, ref = y.mul_(dy).relu_(), (ref * dy.double()).relu()
    if which != "y":
        s, total = s.mul_(3), total * 3
    wanted = [x, pre, post, *ours.parameters()]
    try:
        found = torch.autograd.grad((y.square().sum(), s.square().sum()), wanted)
    except RuntimeError as error:
        assert MODIFIED in str(error) and (which != "y" or way == "formula")
    else:
        right("gradient", list(found), list(torch.autograd.grad((ref.square().sum(), total.square().sum()), leaves)))


CALLS: dict[str, Callable[..., Any]] = {
    "batch_norm": lambda x, **k: F.batch_norm(x, None, None, training=True, **k),
    "batch_norm, eval": lambda x, **k: F.batch_norm(
        x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), eps=0.0, **k),
    "instance_norm": lambda x, **k: F.instance_norm(x, **k),
    "group_norm": lambda x, **k: F.group_norm(x, 2, **k),
    "layer_norm": lambda x, **k: F.layer_norm(x, x.shape[1:], **k),
    "rms_norm": lambda x, **k: F.rms_norm(x, x.shape[-1:], **k),
    "normalize": lambda x, **k: F.normalize(x, (0, 1), **k),
    "normalize, one element": lambda x, **k: F.normalize(x[:, :1], (1,), center=False, eps=0.0, **k),
}  # fmt: skip
SHAPES = {"": SHAPE, "no samples": (0, 4, 3, 3), "no pixels": (2, 4, 0, 3)}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("layout", "shape", "recorded"), [
    ("contiguous", "", True), ("contiguous", "", False), ("channels_last", "", True), ("sliced", "", True),
    ("expanded", "", False), ("contiguous", "no samples", True), ("contiguous", "no pixels", False),
])  # fmt: skip
def test_results_have_memory_of_their_own(
    name: str, layout: str, shape: str, recorded: bool, way: str, device: torch.device
) -> None:
    """Where y equals x too (mean 0, variance 1, eps 0): neither y nor the sum is an operand, a view of one, or of
    each other, and what is written to them shows in no operand."""
    size = SHAPES[shape]
    if layout == "expanded":
        x, pre, post = (torch.randn(size[1:], device=device).expand(size) for _ in range(3))
    else:
        x, pre, post = (laid_out(size, layout, torch.float32, device) for _ in range(3))
    x = x.requires_grad_(recorded)
    y = CALLS[name](x)
    assert not {*places(y)} & {*places(x)} and y is not x
    pre, post = (t[:, :1] if "one element" in name else t for t in (pre, post))
    out = CALLS[name](x, pre_add=pre, post_add=post)
    assert len({*places(*out, x, pre, post)}) == 5
    before = [t.detach().clone() for t in (x, pre, post)]
    for t in out:
        t.detach().fill_(7)
    equal([t.detach() for t in (x, pre, post)], before)


@norms
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_have_memory_of_their_own(name: str, activation: str | None, way: str, device: torch.device) -> None:
    """What is done to one .grad shows in no other, and not in dy: PyTorch copies a gradient that goes to several
    leaves, but not where each gets a view of its own (x.view(6) + p.view(6) has one memory for dy and both gradients,
    x + p has three).  dy and the gradient of the sum are left as they were."""
    norm, _ = build(name, device, activation=activation)
    x, pre, post, dy = operands(device)
    dsum = torch.randn_like(dy)
    before = [dy.clone(), dsum.clone()]
    torch.autograd.backward(norm(x, pre_add=pre, post_add=post), (dy, dsum))
    gradients = [t.grad for t in (x, pre, post, *norm.parameters())]
    assert len({*places(*gradients, dy, dsum)}) == len(gradients) + 2
    equal([dy, dsum], before)
    assert torch.equal(x.grad, pre.grad)


@norms
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced", "one stride"])
def test_strides_of_both_gradients(name: str, activation: str | None, kind: str, device: torch.device) -> None:
    """The gradients of y and of the sum, in other memory orders than theirs, give what dense ones give."""
    norm, _ = build(name, device, activation=activation)
    x, pre, post, _ = operands(device)
    dy, dsum = ({
        "expanded": lambda: torch.randn((), device=device).expand(SHAPE),
        "transposed": lambda: torch.randn(SHAPE, device=device).transpose(2, 3),
        "sliced": lambda: laid_out(SHAPE, "sliced", torch.float32, device),
        "one stride": lambda: torch.randn(3, 1, device=device).expand(SHAPE),
    }[kind]() for _ in range(2))  # fmt: skip
    wanted = [x, pre, post, *norm.parameters()]
    out = norm(x, pre_add=pre, post_add=post)
    found = torch.autograd.grad(out, wanted, (dy, dsum), retain_graph=True)
    expected = torch.autograd.grad(out, wanted, (dy.contiguous(), dsum.contiguous()))
    for got, e in zip(found, expected, strict=True):
        check("gradient", got, e)  # another order of memory may be another order of sums


@norms
@pytest.mark.parametrize("kind", ["returns", "in place", "other memory", "on the node"])
def test_hooks_on_the_gradient(name: str, kind: str, device: torch.device) -> None:
    """What a hook makes of dy is what the backward gets: twice the dy, twice the gradients, to the bit."""
    norm, _ = build(name, device, activation="silu")
    x, _, post, dy = operands(device)
    wanted = [x, post, *norm.parameters()]
    y = norm(x, post_add=post)
    expected = [2 * t for t in torch.autograd.grad(y, wanted, dy, retain_graph=True)]
    if kind == "on the node":
        y.grad_fn.register_prehook(lambda g: (g[0] * 2,))
    else:
        y.register_hook({
            "returns": lambda g: g * 2,
            "in place": lambda g: g.mul_(2),
            "other memory": lambda g: (g * 2).movedim(1, 3).contiguous().movedim(3, 1),
        }[kind])  # fmt: skip
    equal(list(torch.autograd.grad(y, wanted, dy.clone())), expected)


@norms
@pytest.mark.parametrize("activation", [None, "silu"])
def test_one_tensor_for_all_operands(name: str, activation: str | None, device: torch.device) -> None:
    """act(norm(x + x) + x): all three gradients of x add up."""
    ours, theirs = build(name, device, activation=activation)
    x, _, _, dy = operands(device)
    y, total = ours(x, pre_add=x, post_add=x)
    e = x.detach().double().requires_grad_()
    s = e + e
    ref = ACTIVATIONS[activation or "identity"](theirs.double()(s) + e)
    right("y", [y, total], [ref, s])
    right("gradient", list(torch.autograd.grad((y, total), [x, *ours.parameters()], (dy, dy))), list(
        torch.autograd.grad((ref, s), [e, *theirs.parameters()], (dy.double(), dy.double()))))  # fmt: skip


@norms
def test_one_weight_in_two_norms(name: str, device: torch.device) -> None:
    """A module called twice, on its own result: both gradients of its parameters add up."""
    ours, theirs = build(name, device, activation="silu")
    x, _, _, dy = operands(device)
    e = x.detach().double().requires_grad_()
    theirs.double()
    ref = ACTIVATIONS["silu"](theirs(ACTIVATIONS["silu"](theirs(e))))
    found = torch.autograd.grad(ours(ours(x)), [x, *ours.parameters()], dy)
    right("gradient", list(found), list(torch.autograd.grad(ref, [e, *theirs.parameters()], dy.double())))


@norms
@pytest.mark.parametrize("activation", [None, "silu"])
def test_two_backwards(name: str, activation: str | None, device: torch.device) -> None:
    """With retain_graph the same bits twice; without it, PyTorch's own error."""
    norm, _ = build(name, device, activation=activation)
    x, pre, post, dy = operands(device)
    wanted = [x, pre, post, *norm.parameters()]
    out = norm(x, pre_add=pre, post_add=post)
    first, second = (torch.autograd.grad(out, wanted, (dy, dy), retain_graph=again) for again in (True, False))
    equal(list(first), list(second))
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(out, wanted, (dy, dy))
