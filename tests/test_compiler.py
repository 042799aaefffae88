"""torch.compile, torch.export and AOTInductor: no graph break, one compilation for every batch, and eager's numbers."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import normops
from normops import calls, nn
from normops import functional as F

SHAPE = (6, 3, 5)
MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm2d(6, activation="relu"),
    "BatchNorm, cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "BatchNorm, eval": lambda: nn.BatchNorm2d(6).eval(),
    "InstanceNorm, tracking": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 6, activation="silu"),
    "LayerNorm": lambda: nn.LayerNorm(SHAPE[1:]),
    "RMSNorm": lambda: nn.RMSNorm(5),
    "LayerNorm2d": lambda: nn.LayerNorm2d(6),
    "Normalize": lambda: nn.Normalize("n (g c) h w -> n g", affine="(g c)", g=2, c=3, activation="gelu"),
}
modules = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(n: int, device: torch.device, channels_last: bool = False) -> Tensor:
    x = torch.randn(n, *SHAPE, device=device)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


def results(module: Any, x: Tensor, adds: dict[str, Tensor]) -> list[Tensor]:
    """y, sum, and every gradient."""
    out = module(x, **adds)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [x, *adds.values(), *module.parameters()]
    return [*out, *torch.autograd.grad(out, leaves, [t.detach() for t in out])]


def same(got: list[Tensor], expected: list[Tensor], exact: bool) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        if exact:
            assert torch.equal(a, b), "the same kernels run"
        else:  # sums in another order: some ulps of fp32
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@modules
@pytest.mark.parametrize(
    ("fused", "decomposed"), [(True, False), (False, True)], ids=["fused, channels_last", "plain, decomposed"]
)
def test_one_compilation_for_all_batches(
    build: Callable[[], torch.nn.Module], fused: bool, decomposed: bool, device: torch.device
) -> None:
    """Forward and backward, without a graph break; with our operators the bits of eager calls."""
    module = build().to(device)
    reference = copy.deepcopy(module)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with normops.decompose(decomposed):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
        counts = []
        for n in (2, 5):
            x = batch(n, device, fused)
            adds = {name: batch(n, device, fused) for name in ("pre_add", "post_add")} if fused else {}
            same(results(compiled, x, adds), results(reference, x, adds), not decomposed)
            counts.append(counter.frame_count)
    assert len(set(counts)) == 1, "another batch was compiled again"
    for name, t in reference.named_buffers():
        # The variance comes back from rstd, with an error of some ulps of var + eps.
        torch.testing.assert_close(module.get_buffer(name), t, rtol=1e-5, atol=1e-6)
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("normops" in node for node in nodes) != decomposed


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: F.instance_norm(x),
    "group_norm": lambda x: F.group_norm(x, 3, pre_add=x),
    "layer_norm": lambda x: F.layer_norm(x, (5,), out_dtype=torch.float64),
    "rms_norm": lambda x: F.rms_norm(x, (3, 5), activation="tanh"),
    "normalize": lambda x: F.normalize(x, (0, -1), x[0], post_add=x[:1], return_stats=True),
    "pattern": lambda x: normops.normalize(x, "n (g c) ... -> g n", g=2, return_stats=True),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_compile(function: Callable[[Tensor], Any], device: torch.device) -> None:
    """Static shapes first, which PyTorch makes dynamic when a second batch comes; no warning on the way."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (2, 3, 5, 9):
            x = torch.randn(n, *SHAPE, device=device)
            torch.testing.assert_close(compiled(x), function(x), rtol=0, atol=0)
    assert counter.frame_count == 2


def test_errors_reach_the_user_of_a_compiled_function(device: torch.device) -> None:
    compiled = torch.compile(lambda x: F.layer_norm(x, (7,)), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="normalized_shape"):
        compiled(torch.randn(2, 5, device=device))
    with pytest.raises(Exception, match="activation"):
        torch.compile(lambda x: F.layer_norm(x, (5,), activation="swoosh"), fullgraph=True, backend="eager")(
            torch.randn(2, 5, device=device)
        )


def test_the_switch_is_heeded_by_what_was_compiled(device: torch.device) -> None:
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(any("normops" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(lambda x: F.rms_norm(x, (5,)), fullgraph=True, backend=backend)
    x = torch.randn(2, 5, device=device)
    compiled(x)
    with normops.decompose():
        compiled(x)
    compiled(x)
    assert seen == [True, False]
    normops.decompose(True)
    assert normops.traced.decomposing
    normops.decompose(False)
    assert not normops.traced.decomposing


def test_torch_func_inside_a_compiled_function(device: torch.device) -> None:
    model = nn.GroupNorm(2, 6, activation="silu").to(device)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 2, *SHAPE, device=device)

    def samples(p: dict[str, Tensor], x: Tensor) -> Any:
        return vmap(grad(lambda p, x: functional_call(model, p, (x,)).square().sum()), (None, 0))(p, x)

    compiled = torch.compile(samples, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(parameters, x), samples(parameters, x))
    jacobian = torch.compile(jacrev(lambda x: F.layer_norm(x, (5,))), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(jacobian(x[0, 0, 0]), jacrev(lambda x: F.layer_norm(x, (5,)))(x[0, 0, 0]))


def network(device: torch.device) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, activation="relu"), nn.LayerNorm2d(6), torch.nn.SiLU(),
        nn.RMSNorm(5),
    ).to(device)  # fmt: skip


@pytest.mark.parametrize("decomposed", [False, True], ids=["operators", "decomposed"])
def test_inductor(decomposed: bool, device: torch.device) -> None:
    model = network(device)
    reference = copy.deepcopy(model)
    with normops.decompose(decomposed):
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for n in (2, 5):
            x = batch(n, device, channels_last=True)
            got, expected = results(compiled, x, {}), results(reference, x, {})
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the convolution's sums too
    torch.testing.assert_close(model[1].running_var, reference[1].running_var, rtol=1e-4, atol=1e-5)


@modules
def test_export(build: Callable[[], torch.nn.Module], device: torch.device) -> None:
    """With a batch of any size; the program holds our operator, and the decompositions take it away again."""
    module = build().eval().to(device)
    shapes = ({0: torch.export.Dim("n", min=2)},)
    x = batch(5, device).detach()
    expected = module(x)
    for strict in (True, False):
        program = torch.export.export(module, (batch(2, device).detach(),), dynamic_shapes=shapes, strict=strict)
        assert [str(node.target) for node in program.graph.nodes].count("normops.forward.default") == 1
        torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)
    composed = program.run_decompositions(normops.decompositions())
    assert not any("normops" in str(node.target) for node in composed.graph.nodes)
    torch.testing.assert_close(composed.module()(x), expected, rtol=2e-5, atol=2e-5)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), expected, rtol=0, atol=0)


def test_an_exported_program_trains(device: torch.device) -> None:
    module = nn.BatchNorm2d(6).to(device)
    reference = copy.deepcopy(module)
    program = torch.export.export(
        module, (batch(2, device).detach(),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},)
    ).module()
    x = batch(4, device)
    same(results(program, x, {}), results(reference, x, {}), True)
    torch.testing.assert_close(program.get_buffer("running_var"), reference.running_var)


def test_aot_inductor(device: torch.device, tmp_path: Path) -> None:
    """A package calls our operators through PyTorch's dispatcher: a process that loads it imports normops first."""
    model = network(device).eval()
    with torch.no_grad():
        x = batch(2, device).detach()
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        x = batch(5, device).detach()
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x), rtol=1e-4, atol=1e-4)


OPERATORS: dict[str, tuple[str, str, list[int] | None, bool, int, bool, torch.dtype, bool]] = {
    # pattern, affine, lengths, center, elements of a parameter, bias, dtype, fused
    "channels, bf16": ("d0 d1 d2 d3 -> d1", "d1", None, True, 6, True, torch.bfloat16, False),
    "groups, both adds": ("d0 (d1 d2) d3 d4 -> d0 d1", "d1 d2", [2], True, 6, True, torch.float32, True),
    "rows, RMS, fp64": ("d0 d1 d2 d3 -> d0 d1 d2", "d3", None, False, 5, False, torch.float64, False),
}


@pytest.mark.parametrize("case", OPERATORS.values(), ids=OPERATORS)
def test_opcheck(case: tuple[Any, ...], device: torch.device) -> None:
    """Schemas, autograd registration, fake kernels (shapes, dtypes, strides), tracing with dynamic shapes."""
    pattern, affine, lengths, center, n, biased, dtype, fused = case

    def tensor(*shape: int) -> Tensor:
        t = torch.randn(shape, device=device).to(dtype)
        return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()

    x, w, b = tensor(2, *SHAPE), tensor(n), tensor(n) if biased else None
    pre, post, activation = (tensor(2, *SHAPE), tensor(2, *SHAPE), "silu") if fused else (None, None, "identity")
    form = (pattern, affine, lengths, center)
    given = (x, w, b, pre, post, None, None, *form, 1e-5, activation, None, False)
    torch.library.opcheck(torch.ops.normops.forward.default, given)
    y, total, mean, rstd = torch.ops.normops.forward.default(*given)
    dy, dsum, s = (t.detach().clone().requires_grad_() for t in (y, total, total if fused else x))
    backward = (
        dy, dsum if fused else None, s, w, b, post, mean, rstd, *form, False, 1e-5, activation,
        (True, True, biased, fused),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.normops.backward.default, backward)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_forward_and_backward(mode: str, device: torch.device) -> None:
    def gradients(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.layer_norm(x, (5,), w).pow(3).sum(), (x, w))

    x, w = torch.randn(2, 5, device=device, requires_grad=True), torch.ones(5, device=device, requires_grad=True)
    graph = make_fx(gradients, tracing_mode=mode)(x, w)
    assert "normops.forward" in graph.code and "normops.backward" in graph.code
    same(list(graph(x, w)), list(gradients(x, w)), True)


def test_compiled_autograd(device: torch.device) -> None:
    """The backward of eager calls, traced by Dynamo."""
    model = torch.nn.Sequential(nn.LayerNorm(5), torch.nn.Linear(5, 5), nn.RMSNorm(5, activation="silu")).to(device)
    x = torch.randn(2, 6, 5, device=device, requires_grad=True)
    leaves = [x, *model.parameters()]
    model(x).pow(3).sum().backward()
    expected = [t.grad for t in leaves]
    for t in leaves:
        t.grad = None
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        model(x).pow(3).sum().backward()
    same([t.grad for t in leaves], expected, False)  # type: ignore[arg-type]


def test_eager_calls_do_not_pass_the_dispatcher(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward of plain tensors: an operator costs the host more than the call does."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an eager call went through the registered operators")

    monkeypatch.setattr(normops.traced, "normalize", refuse)
    monkeypatch.setattr(normops.traced.Backward, "apply", refuse)
    ran: list[str] = []
    original = calls.Call.backward
    monkeypatch.setattr(calls.Call, "backward", lambda *a, **k: (ran.append("backward"), original(*a, **k))[1])
    for build in MODULES.values():
        results(build().to(device), batch(2, device), {})
    assert len(ran) == len(MODULES)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_sizes_that_depend_on_data(norm: str, device: torch.device) -> None:
    """Tokens chosen by a mask, as experts get them.  torch's own batch_norm (training) and group_norm, and ours, look
    at the number of elements to refuse a single one, and so cannot be traced with such a size."""

    def chosen(x: Tensor) -> Tensor:
        return getattr(F, norm)(x[x[:, 0] > 0], (5,), activation="silu")  # type: ignore[no-any-return]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
        x = torch.randn(9, 5, device=device, requires_grad=True)
        same([compiled(x)], [chosen(x)], True)
        same(*(torch.autograd.grad(f(x).pow(3).sum(), x) for f in (compiled, chosen)), True)  # type: ignore[arg-type]


def test_vmap_inside_a_compiled_function(device: torch.device) -> None:
    """Where the operator itself is met, without a gradient around it."""
    x, w = torch.randn(3, 4, 6, device=device), torch.randn(6, device=device)
    compiled = torch.compile(lambda x: vmap(lambda x: F.layer_norm(x, (6,), w))(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.layer_norm(x, (6,), w))


def test_a_transform_of_a_compiled_function(device: torch.device) -> None:
    """Dynamo leaves it alone, and must not look into our launches instead."""
    x = torch.randn(4, 6, device=device)
    loss = lambda x: F.layer_norm(x, (6,)).pow(3).sum()  # noqa: E731
    torch.testing.assert_close(grad(torch.compile(loss, backend="eager"))(x), grad(loss)(x))


def test_jit_trace(device: torch.device) -> None:
    module = nn.GroupNorm(2, 6, activation="silu").to(device).requires_grad_(False)
    traced = torch.jit.trace(module, torch.randn(2, 6, 5, device=device))
    x = torch.randn(3, 6, 7, device=device)
    torch.testing.assert_close(traced(x), module(x))


def test_the_switch_can_be_kept_and_used_again() -> None:
    switch = normops.decompose()
    for _ in range(2):
        switch.__exit__(None, None, None)
        with switch:
            assert normops.traced.decomposing
        assert not normops.traced.decomposing


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_size_that_is_not_known_yet_is_normalised_over(dynamic: bool | None, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: F.layer_norm(x, x.shape[1:]), fullgraph=True, backend="eager", dynamic=dynamic
    )
    for n in (4, 5, 6):
        x = torch.randn(3, n, device=device)
        torch.testing.assert_close(compiled(x), torch.nn.functional.layer_norm(x, (n,)))
