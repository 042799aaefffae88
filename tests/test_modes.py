"""PyTorch's modes around a norm: autocast, inference, meta and fake tensors, functionalization, subclasses, dispatch
modes, CUDA graphs and streams.  What torch's own norms do there is the oracle, or float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from normops import functional as F
from normops import nn
from tests.pairs import NORMS, SHAPE, alike, build, equal, norms, operands, run
from tests.tolerance import ACTIVATIONS, ENGINES, check, engine, errors

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_no_bit(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """y keeps x's dtype; torch's norms return float32 or bfloat16 by a list of autocast's."""
    norm, _ = build(name, device, activation="silu")
    args = operands(device, dtype)
    plain = run(copy.deepcopy(norm), *args)
    with torch.autocast(device.type, torch.bfloat16):
        cast = run(norm, *args)
    assert cast[0].dtype == dtype
    equal(cast, plain)


@norms
def test_autocast_loses_nothing_that_torch_keeps(name: str, device: torch.device) -> None:
    """Statistics of a bfloat16 x are float32: y and dx are as near to float64 as those of torch's norm, rounded.
    An ulp of float32 may tip a rounding to bfloat16, hence 5 %; out_dtype as the interpreter cuts bfloat16 off."""
    ours, theirs = build(name, device, out_dtype=torch.float32)
    exact = copy.deepcopy(theirs).double()
    x = (torch.randn(4, 4, 6, 3, device=device) * 3 + 8).bfloat16()
    reference = exact(x.double())
    with torch.autocast(device.type, torch.bfloat16):
        got, torchs = (norm(x).to(torch.bfloat16) for norm in (ours, theirs))
    assert errors(got, reference)[0] <= 1.05 * errors(torchs, reference)[0]
    for a, b in zip(ours.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


@norms
@pytest.mark.parametrize(("dtype", "out"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float64),
], ids=str)  # fmt: skip
def test_out_dtype(name: str, dtype: torch.dtype, out: torch.dtype, device: torch.device) -> None:
    """y in another dtype; the sum, and the gradient of each operand, keep theirs."""
    ours, theirs = build(name, device, activation="gelu", out_dtype=out)
    x, pre, post, dy = operands(device, dtype)
    y, total, *gradients = run(ours, x, pre, post, dy)
    assert y.dtype == out and total.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in (x, pre, post)]
    theirs.double()
    summed = exact[0] + exact[1]
    summed = summed + (total.double() - summed).detach()  # statistics are those of the rounded sum
    ref = ACTIVATIONS["gelu"](theirs(summed) + exact[2])
    check("y", y, ref, dtype=torch.float32 if out == torch.float64 else out)
    wanted = [*exact, *theirs.parameters()]
    for g, e, leaf in zip(
        gradients, torch.autograd.grad((ref, summed), wanted, (dy.to(out).double(), dy.double())),
        (x, pre, post, *ours.parameters()), strict=True,
    ):  # fmt: skip
        assert g.dtype == leaf.dtype
        check("gradient", g, e, scale=2, dtype=torch.bfloat16 if out == torch.bfloat16 else None)


@pytest.mark.parametrize("bad", [torch.int32, torch.complex64, "float32", torch.float8_e5m2], ids=str)
def test_out_dtype_is_one_of_four(bad: Any, device: torch.device) -> None:
    x = torch.randn(SHAPE, device=device)
    for function in (
        lambda: F.layer_norm(x, (3,), out_dtype=bad), lambda: F.rms_norm(x, (3,), out_dtype=bad),
        lambda: F.batch_norm(x, None, None, training=True, out_dtype=bad), lambda: F.instance_norm(x, out_dtype=bad),
        lambda: F.group_norm(x, 2, out_dtype=bad), lambda: F.normalize(x, 1, out_dtype=bad),
        lambda: nn.LayerNorm(3, out_dtype=bad), lambda: nn.BatchNorm2d(4, out_dtype=bad),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="out_dtype must be None, float16, bfloat16, float32 or float64"):
            function()


@norms
def test_grad_scaler(name: str, device: torch.device) -> None:
    """Unscaled gradients are the bits of those of the plain loss; a step with an infinite gradient is skipped."""
    norm, _ = build(name, device, activation="silu")
    x, _, post, dy = (t.detach() for t in operands(device))
    parameters = list(norm.parameters())
    expected = torch.autograd.grad((norm(x, post_add=post) * dy).sum(), parameters)
    optimizer = torch.optim.SGD(parameters, 0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    scaler.scale((norm(x, post_add=post) * dy).sum()).backward()
    scaler.unscale_(optimizer)
    equal([p.grad for p in parameters], expected)
    before = [p.detach().clone() for p in parameters]
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    before = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    scaler.scale((norm(x, post_add=post) * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    equal([p.detach() for p in parameters], before)
    assert scaler.get_scale() == 2.0**9


@norms
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name: str, training: bool, mode: Any, device: torch.device) -> None:
    """The values, and the running statistics, of a call that records gradients."""
    norm = build(name, device, activation="silu")[0].train(training)
    again = copy.deepcopy(norm)
    x, pre, post, _ = operands(device)
    expected = norm(x, pre_add=pre, post_add=post)
    with mode():
        got = again(x, pre_add=pre, post_add=post)
    assert not any(t.requires_grad for t in got) and expected[0].requires_grad
    assert all(t.is_inference() == (mode is torch.inference_mode) for t in got)
    equal([*got, *again.buffers()], [*expected, *norm.buffers()])


@norms
def test_inference_tensors(name: str, device: torch.device) -> None:
    """x, parameters and running statistics made in inference mode serve where nothing is recorded; where something
    is, PyTorch's own error says so."""
    plain, _ = build(name, device)
    x = torch.randn(SHAPE, device=device)
    expected = copy.deepcopy(plain)(x)
    with torch.inference_mode():
        norm, inferred = NORMS[name][0]().to(device), x.clone()
        norm.load_state_dict(plain.state_dict())
        equal(norm(inferred), expected)
    with torch.no_grad():
        equal(norm.eval()(inferred), copy.deepcopy(norm).eval()(x))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        plain.eval()(inferred)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        norm(x.clone().requires_grad_())


@norms
def test_deterministic_algorithms(name: str, device: torch.device) -> None:
    norm, _ = build(name, device, activation="silu")
    args = operands(device)
    expected = run(copy.deepcopy(norm), *args)
    torch.use_deterministic_algorithms(True)
    try:
        found = [run(copy.deepcopy(norm), *args) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for f in found:
        equal(f, expected)


@norms
@pytest.mark.parametrize(("layout", "training"), [
    ("contiguous", True), ("channels_last", True), ("channels_last", False), ("permuted", True), ("sliced", True),
], ids=str)
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_memory(name: str, layout: str, training: bool, kind: str, device: torch.device) -> None:
    """Shapes, dtypes and strides, forward and backward, are those of a call with memory."""
    norm = build(name, device, activation="silu", out_dtype=torch.float64)[0].train(training)
    args = operands(device, layout=layout)
    expected = run(copy.deepcopy(norm), *args)
    if kind == "meta":
        found = run(norm.to("meta"), *(t.detach().to("meta").requires_grad_() for t in args))
        assert all(t.is_meta for t in (*found, *norm.buffers()))
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        for module in norm.modules():
            for table in (module._parameters, module._buffers):
                table.update({k: None if t is None else mode.from_tensor(t) for k, t in table.items()})
        args = [mode.from_tensor(t) for t in args]
        with mode:
            found = run(norm, *args)
        assert all(isinstance(t, FakeTensor) and t.device.type == device.type for t in (*found, *norm.buffers()))
    alike(found, expected)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "batch_norm": lambda f, x, **k: f.batch_norm(x, None, None, training=True, **k),
    "instance_norm": lambda f, x, **k: f.instance_norm(x, **k),
    "group_norm": lambda f, x, **k: f.group_norm(x, 2, **k),
    "layer_norm": lambda f, x, **k: f.layer_norm(x, (3,), **k),
    "rms_norm": lambda f, x, **k: f.rms_norm(x, (3,), **k),
}


@norms
def test_functionalize(name: str, device: torch.device) -> None:
    """A function of a norm, and its gradient, under torch.func.functionalize, which all of torch's norms go through."""
    x = torch.randn(SHAPE, device=device)
    for norm in reversed(build(name, device)):

        def function(state: dict[str, Tensor], x: Tensor, norm: Any = norm) -> tuple[Tensor, dict[str, Tensor]]:
            moved = {k: t.clone() for k, t in state.items()}
            return torch.func.functional_call(norm, moved, x), moved

        state = {k: t.detach() for k, t in norm.state_dict().items()}
        torch.testing.assert_close(torch.func.functionalize(function)(state, x), function(state, x))
        gradient = torch.func.grad(lambda state, x, function=function: function(state, x)[0].pow(3).sum(), argnums=1)
        # The plain path against kernels, which sum in another order: 16 roundings of the largest gradient, from which
        # the others are what is left of a difference.
        found, expected = torch.func.functionalize(gradient)(state, x), gradient(state, x)
        atol = 16 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_functionalize_refuses_captured_statistics(name: str, device: torch.device) -> None:
    """functionalize(module)(x) must not write to running statistics that are no arguments of it.  PyTorch does not see
    that torch's norms do; it sees ours, and refuses, which leaves them as they were."""
    norm = build(name, device)[0]
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(RuntimeError, match="non-functional tensor"):
        torch.func.functionalize(norm)(torch.randn(SHAPE, device=device))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


class Operators(TorchDispatchMode):
    """Writes down what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **kwargs or {})


DIRECTIONS = [torch.ops.normops.forward.default, torch.ops.normops.backward.default]


@norms
def test_dispatch_modes_see_the_operators(name: str, device: torch.device) -> None:
    """One forward and one backward, whose values are those of the kernels."""
    norm, _ = build(name, device, activation="silu")
    args = operands(device)
    expected = run(copy.deepcopy(norm), *args)
    with Operators() as mode:
        found = run(norm, *args)
    assert [op for op in mode.seen if op in DIRECTIONS] == DIRECTIONS
    equal(found, expected)


def test_flop_counter(device: torch.device) -> None:
    """Norms count nothing and hide nothing: two matrix products, three in the backward (x needs no gradient)."""
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 6), nn.RMSNorm(6)).to(device)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(3, 4, device=device)).sum().backward()
    first, second = 2 * 3 * 4 * 5, 2 * 3 * 5 * 6
    assert counter.get_total_flops() == first + second + first + 2 * second


class Named(Tensor):
    """A subclass that writes down the functions it meets."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("which", ["x", "pre_add", "post_add"])
def test_torch_function(name: str, which: str, device: torch.device) -> None:
    """A subclass, wherever it stands, sees normops' function, and what comes back is of its class."""
    operands = {key: torch.randn(SHAPE, device=device) for key in ("x", "pre_add", "post_add")}
    expected = FUNCTIONS[name](F, **operands)
    operands[which] = operands[which].as_subclass(Named)
    Named.seen.clear()
    found = FUNCTIONS[name](F, **operands)
    assert Named.seen == [getattr(F, name)]
    assert all(type(t) is Named for t in found)
    equal([t.as_subclass(Tensor) for t in found], expected)


class Wrapper(Tensor):
    """A tensor that holds another one."""

    seen: list[Any] = []  # noqa: RUF012
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=held.device, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held.detach()
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"Wrapper({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        args, kwargs = tree_map_only(Wrapper, lambda t: t.held, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapper, func(*args, **kwargs))


@norms
def test_wrapper_subclasses(name: str, device: torch.device) -> None:
    """x wrapped: __torch_dispatch__ gets the two operators, and y, the sum and all gradients come back wrapped."""
    norm, _ = build(name, device, activation="silu")
    args = operands(device)
    expected = run(copy.deepcopy(norm), *args)
    Wrapper.seen.clear()
    found = run(norm, *(Wrapper(t) for t in args))
    assert [op for op in Wrapper.seen if op in DIRECTIONS] == DIRECTIONS
    assert all(type(t) is Wrapper for t in found)
    equal([t.held for t in found], expected)


@cuda
@pytest.mark.parametrize("which", ENGINES)
@norms
def test_cuda_graphs(name: str, which: str, device: torch.device) -> None:
    """A captured step, forward and backward, gives the bits of an eager one at each replay, and moves statistics."""
    norm, _ = build(name, device, activation="silu")
    args = operands(device)
    with engine(which):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run(norm, *args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(norm, *args)
        eager = copy.deepcopy(norm)
        for _ in range(3):
            with torch.no_grad():
                args[0].copy_(torch.randn(SHAPE, device=device) + 1)
            graph.replay()
            equal([*found, *norm.buffers()], [*run(eager, *args), *eager.buffers()])


@cuda
@pytest.mark.parametrize("which", ENGINES)
@norms
def test_streams(name: str, which: str, device: torch.device) -> None:
    """Calls of several streams at once do not meet in scratch memory or counters."""
    norm, _ = build(name, device, activation="silu")
    many = [operands(device) for _ in range(4)]
    with engine(which):
        expected = [run(norm, *args) for args in many]
        streams = [torch.cuda.Stream() for _ in many]
        torch.cuda.synchronize()
        found = []
        for stream, args in zip(streams, many, strict=True):
            with torch.cuda.stream(stream):
                found.append([run(norm, *args) for _ in range(5)])
        torch.cuda.synchronize()
    for runs, e in zip(found, expected, strict=True):
        for r in runs:
            equal(r, e)


@cuda
@norms
def test_second_device(name: str) -> None:
    """A tensor of another device than the current one is computed where it lies."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    norm, _ = build(name, first, activation="silu")
    args = operands(first)
    expected = run(copy.deepcopy(norm), *args)
    found = run(norm.to(second), *(t.detach().to(second).requires_grad_() for t in args))
    assert all(t.device == second for t in (*found, *norm.buffers()))
    equal([t.to(first) for t in found], expected)
