"""Norms of a model taken over and given back: the same numbers, names, objects; and what may not be taken is left."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as theirs

import normops
from normops import conversion, nn
from normops.fusing import taken
from tests import foreign, networks, unfused
from tests.networks import Basic

TOLERANCE = 1e-4
"""Of fp32 results after a few layers, relative to their size: sums in another order."""

NORMS: dict[str, Callable[[], theirs.Module]] = {
    "BatchNorm1d": lambda: theirs.BatchNorm1d(6), "BatchNorm2d": lambda: theirs.BatchNorm2d(6),
    "BatchNorm3d": lambda: theirs.BatchNorm3d(6), "cumulative": lambda: theirs.BatchNorm2d(6, momentum=None),
    "untracked": lambda: theirs.BatchNorm2d(6, track_running_stats=False, affine=False),
    "InstanceNorm1d": lambda: theirs.InstanceNorm1d(6), "InstanceNorm2d": lambda: theirs.InstanceNorm2d(6, affine=True),
    "InstanceNorm3d": lambda: theirs.InstanceNorm3d(6, track_running_stats=True),
    "GroupNorm": lambda: theirs.GroupNorm(2, 6), "LayerNorm": lambda: theirs.LayerNorm(5, bias=False),
    "RMSNorm": lambda: theirs.RMSNorm(5), "RMSNorm, eps": lambda: theirs.RMSNorm((6, 5), eps=1e-3),
}  # fmt: skip


def input_of(norm: theirs.Module, device: torch.device) -> Tensor:
    rank = {"1": 3, "2": 4, "3": 5}.get(type(norm).__name__[-2], 3)
    return torch.randn(*(3, 6, 4, 5)[: rank - 1], 5, device=device)


def near(got: Any, expected: Any, what: str = "") -> None:
    """Tensors relative to the size of each; one whose true value is 0 to the size of all of them."""
    least = 1e-3 * max(float(e.detach().float().norm()) for e in expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape
        error = ((a - b).norm() / (b.norm() + least)).item()
        assert error < TOLERANCE, f"{what}, tensor {i}: {error:.1e}"


def results(model: theirs.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, gradients, buffers."""
    model.zero_grad()
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = model(*inputs)
    (y * torch.linspace(-1, 2, y.numel(), device=y.device).reshape(y.shape)).sum().backward()
    gradients = [t.grad for t in (*inputs, *model.parameters()) if t.grad is not None]
    return [y, *gradients, *(b.clone() for b in model.buffers())]


def compare(model: theirs.Module, *inputs: Tensor, fused: int, converted: int | None = None) -> None:
    """Converted it gives the same; restored it is what it was."""
    reference = copy.deepcopy(model)
    before = {module: dict(module.__dict__) for module in model.modules()}
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert normops.convert(model) is model
    rows = normops.report(model)
    assert sum(bool(row.fused) for row in rows) == fused, str(rows)
    assert sum(bool(row.now) for row in rows) == (len(rows) if converted is None else converted), str(rows)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for training in (True, False):
        got, expected = results(model.train(training), *inputs), results(reference.train(training), *inputs)
        near(got, expected, f"training={training}")
    again = normops.convert(normops.restore(model))  # as often as one likes
    assert normops.report(again) == rows and normops.restore(model) is model
    reference.load_state_dict(model.state_dict())
    for (module, was), other in zip(before.items(), reference.modules(), strict=True):
        assert type(module) is type(other) and module.__dict__.keys() == was.keys()
    assert list(model.modules()) == list(before)
    torch.testing.assert_close(model(*inputs), reference(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, device: torch.device) -> None:
    norm = NORMS[name]().to(device)
    before = type(norm)
    compare(norm, input_of(norm, device), fused=0)
    normops.convert(norm)
    assert type(norm) is getattr(nn, before.__name__) and normops.report(norm)[0].was == f"torch.nn.{before.__name__}"


ACTIVATIONS = (
    theirs.ReLU(inplace=True), theirs.SiLU(), theirs.GELU(), theirs.GELU("tanh"), theirs.Sigmoid(), theirs.Tanh(),
    theirs.Hardswish(), theirs.LeakyReLU(),
)  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_in_a_sequence(activation: theirs.Module, device: torch.device) -> None:
    model = theirs.Sequential(theirs.Linear(5, 6), theirs.LayerNorm(6), activation, theirs.Linear(6, 2)).to(device)
    compare(model, torch.randn(4, 5, device=device), fused=1)
    normops.convert(model)
    assert model[2] is activation and len(model) == 4
    x = torch.randn(4, 5, device=device)
    near([model(x)], [model[3](activation(model[1](model[0](x))))], "one by one it is the same")


def test_what_may_not_be_fused_in_a_sequence(device: torch.device) -> None:
    def sequence(act: theirs.Module) -> theirs.Sequential:
        return theirs.Sequential(theirs.LayerNorm(6), act).to(device)

    seen: list[Tensor] = []
    hooked = sequence(theirs.ReLU())
    hooked[0].register_forward_hook(lambda module, args, y: seen.append(y))
    for model in (hooked, sequence(theirs.LeakyReLU(0.2)), sequence(theirs.Softplus())):
        compare(model, torch.randn(4, 6, device=device), fused=0)
    assert normops.report(normops.convert(hooked))[0].reason == unfused.OTHERS
    hooked(torch.randn(4, 6, device=device))
    assert seen[-1].min() < 0, "the hook saw what the activation made of it"


@pytest.mark.parametrize("name", networks.BLOCKS)
def test_blocks(name: str, device: torch.device) -> None:
    """Blocks as networks have them, by what is joined in each."""
    make, shapes, fused = networks.BLOCKS[name]
    torch.manual_seed(1)
    model = make().to(device)
    compare(model, *(torch.randn(shape, device=device) for shape in shapes), fused=len(fused))
    rows = normops.report(normops.convert(model))
    assert {row.path: row.fused for row in rows if row.fused} == fused


@pytest.mark.parametrize("name", unfused.LEFT)
def test_blocks_that_are_left(name: str, device: torch.device) -> None:
    """Converted, and not fused, with the reason in the report."""
    make, shapes, reason = unfused.LEFT[name]
    model = make().to(device)
    compare(model, *(torch.randn(shape, device=device) for shape in shapes), fused=0)
    assert {row.reason for row in normops.report(normops.convert(model))} == {reason}, normops.report(model)


def test_sums_of_other_shapes_and_types(device: torch.device) -> None:
    """What the kernels add has the shape and dtype of x; whatever else comes is added as it was."""
    model = networks.BLOCKS["sum before, by hand"][0]().to(device)
    reference = copy.deepcopy(model)
    normops.convert(model)
    x = torch.randn(2, 6, 5, device=device)
    for y in (torch.randn(5, device=device), 2.0):
        near([model(x, y)], [reference(x, y)])
    block = normops.convert(Basic(4)).to(device)
    plain = normops.restore(copy.deepcopy(block))
    block.downsample = plain.downsample = theirs.AdaptiveAvgPool2d(1)  # what is added is (N, C, 1, 1) now
    x = torch.randn(2, 4, 3, 3, device=device)
    near([block(x)], [plain(x)])


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_that_changes_the_input_in_place(training: bool, device: torch.device) -> None:
    """No norm reads its input later than it did: without gradients PyTorch lets others write to it."""
    block = unfused.InPlace(4).to(device).train(training)
    reference = copy.deepcopy(block)
    x = torch.randn(2, 4, 5, 3, device=device)
    with torch.no_grad():
        near([normops.convert(block)(x)], [reference(x)])
    assert not any(row.fused for row in normops.report(block))


def test_three_steps_of_an_optimiser_that_knows_the_parameters(device: torch.device) -> None:
    torch.manual_seed(2)
    model = theirs.Sequential(theirs.Conv2d(3, 4, 1), theirs.GroupNorm(2, 4), theirs.SiLU(), Basic(4)).to(device)
    reference = copy.deepcopy(model)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, reference)]
    normops.convert(model)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, device=device)
        for m, optimiser in zip((model, reference), optimisers, strict=True):
            optimiser.zero_grad()
            m(x).square().mean().backward()
            optimiser.step()
    near(model.state_dict().values(), reference.state_dict().values())


def test_copies_and_pickles(device: torch.device) -> None:
    model = theirs.Sequential(Basic(4), foreign.LlamaRMSNorm(4), theirs.LayerNorm(3), theirs.ReLU()).to(device)
    normops.convert(model)
    x = torch.randn(2, 4, 3, 3, device=device)
    expected = model[0](x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(model.state_dict())
        assert torch.equal(other[0].eval()(x), model[0].eval()(x)) and expected.shape == x.shape
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert normops.report(other) == normops.report(model)
        assert type(normops.restore(other)[0]) is Basic and type(model[0]) is not Basic


def test_compiled(device: torch.device) -> None:
    model = theirs.Sequential(theirs.Conv2d(3, 4, 1), Basic(4), theirs.GroupNorm(2, 4), theirs.SiLU()).to(device)
    x = torch.randn(2, 3, 4, 4, device=device)
    expected = results(copy.deepcopy(model), x)
    near(results(torch.compile(normops.convert(model), backend="aot_eager", fullgraph=True), x), expected)


@pytest.mark.parametrize("name", foreign.FOREIGN)
def test_norms_of_other_libraries(name: str, device: torch.device) -> None:
    """Known by what they compute; they stay what they are to isinstance, and keep their names."""
    make, shape = foreign.FOREIGN[name]
    norm = make().to(device)
    before = type(norm)
    compare(norm, torch.randn(shape, device=device), fused=0)
    assert isinstance(normops.convert(norm), before) and type(norm).__name__ == before.__name__


@pytest.mark.parametrize("name", foreign.OTHER_FORMULAS)
def test_other_formulas_are_left_alone(name: str, device: torch.device) -> None:
    make, reason = foreign.OTHER_FORMULAS[name]
    norm = make()
    before = type(norm)
    (row,) = normops.report(normops.convert(norm))
    assert type(norm) is before and row.now == "" and reason in row.reason and taken(norm) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_llama_rounds_before_the_weight(dtype: torch.dtype, device: torch.device) -> None:
    """As its own code does, to the bit where the rounding of fp32 sums allows: not one of a hundred differs."""
    norm = foreign.LlamaRMSNorm(256).to(device, dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(16, 256, device=device).to(dtype)
    expected = norm(x)
    got = normops.convert(norm)(x)
    if dtype == torch.float16:
        assert (got != expected).double().mean() < 0.01
        once = normops.functional.rms_norm(x, (256,), norm.weight, norm.variance_epsilon)
        assert (once != expected).double().mean() > 0.1, "it makes no difference"
    else:
        near([got], [expected])


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["LlamaRMSNorm", "GemmaRMSNorm"])
def test_dtypes_of_other_libraries(name: str, parameters: torch.dtype, device: torch.device) -> None:
    """A product with fp32 weights is fp32, where the library's is."""
    norm = foreign.FOREIGN[name][0]().to(device, parameters)
    x = torch.randn(4, 8, device=device, dtype=torch.bfloat16)
    expected = norm(x)
    got = normops.convert(norm)(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=2.0**-6, atol=2.0**-7)


@pytest.mark.usefixtures("converters")
def test_a_converter_that_raises_converts_nothing() -> None:
    def refuse(module: theirs.Module) -> None:
        raise KeyError("no")

    normops.register_converter(foreign.Scaled, refuse)
    model = theirs.Sequential(theirs.LayerNorm(4), foreign.Scaled(4))
    with pytest.raises(KeyError, match="no"):
        normops.convert(model)
    assert type(model[0]) is theirs.LayerNorm and taken(model[0]) is None


def test_a_transformer_layer_and_its_fast_path(device: torch.device) -> None:
    layer = theirs.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(device)
    x = torch.randn(2, 5, 8, device=device)
    compare(layer, x, fused=0)
    normops.convert(layer.eval())
    with torch.no_grad():
        near([layer(x)], [normops.restore(copy.deepcopy(layer))(x)])


@pytest.fixture
def converters() -> Iterator[None]:
    before = dict(conversion._converters)
    yield
    conversion._converters.clear()
    conversion._converters.update(before)


@pytest.mark.usefixtures("converters")
@pytest.mark.parametrize("by", ["class", "name"])
def test_converters_of_users(by: str) -> None:
    class Ours(foreign.Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return normops.functional.layer_norm(x, (4,), self.weight * 2)

    name = f"{foreign.Scaled.__module__}.Scaled"
    normops.register_converter(foreign.Scaled if by == "class" else name, lambda module: Ours)
    x, norm = torch.randn(3, 4), foreign.Scaled(4)
    expected = norm(x)
    near([normops.convert(norm)(x)], [expected])
    assert type(norm) is Ours and type(normops.restore(norm)) is foreign.Scaled
    with pytest.raises(TypeError, match="expected a class or its name, and a function, got 3"):
        normops.register_converter(3, lambda module: None)  # type: ignore[arg-type]


def test_what_would_drop_an_activation_is_refused() -> None:
    """By PyTorch's own conversions, which replace a norm by its class alone; of fused ones nothing is lost."""
    model = theirs.Sequential(theirs.Linear(3, 4), nn.BatchNorm1d(4, activation="relu"))
    with pytest.raises(RuntimeError, match=r"a BatchNorm1d with activation='relu' is about to be replaced"):
        theirs.SyncBatchNorm.convert_sync_batchnorm(model)
    fused = normops.convert(theirs.Sequential(theirs.Linear(3, 4), theirs.BatchNorm1d(4), theirs.ReLU())).eval()
    x = torch.randn(5, 3)
    expected = fused(x)
    synced = theirs.SyncBatchNorm.convert_sync_batchnorm(fused).eval()
    assert type(synced[1]) is theirs.SyncBatchNorm
    near([synced(x)], [expected])
    norm = nn.BatchNorm1d(4)
    assert not hasattr(norm, "qconfig")
    norm.qconfig = "some"
    assert norm.qconfig == "some"
    del norm.qconfig
    assert not hasattr(norm, "qconfig")


def test_what_is_put_in_the_place_of_a_child_counts(device: torch.device) -> None:
    """Another norm, another activation, a hook, a text that says another kind: whatever is there when it is called."""
    x = torch.randn(2, 4, 5, 3, device=device)
    model = normops.convert(theirs.Sequential(theirs.GroupNorm(2, 4), theirs.ReLU())).to(device)
    block = normops.convert(Basic(4)).to(device).eval()
    for module in (model, block):
        assert module(x).min() >= 0
    model[1], block.relu = theirs.Tanh(), theirs.Tanh()
    for module in (model, block):
        assert module(x).min() < 0
    near([model(x)], [torch.tanh(model[0](x))])
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, y: seen.append(args[0]))
    model(x)
    near(seen, [model[0](x)])
    model[0] = theirs.Identity()
    assert torch.equal(model(x), torch.tanh(x))
    changing = networks.Changing(3).to(device)  # another activation in evaluation
    other = copy.deepcopy(changing)
    normops.convert(changing)
    for training in (True, False):
        near([changing.train(training)(x, x)], [other.train(training)(x, x)])
    temb, denoising = torch.randn(2, 5, device=device), networks.Denoising(4).to(device)
    other = copy.deepcopy(denoising)
    normops.convert(denoising)
    denoising.kind = other.kind = "scale"
    near([denoising(x, temb)], [other(x, temb)])


def test_graphs_of_fx(device: torch.device) -> None:
    """What torch.fx traces of an edited method is the same network."""
    model = theirs.Sequential(Basic(4), theirs.BatchNorm2d(4), theirs.ReLU()).to(device).eval()
    x = torch.randn(2, 4, 5, 3, device=device)
    expected = model(x)
    near([torch.fx.symbolic_trace(normops.convert(model))(x)], [expected])


def test_what_was_parametrized_since_is_not_given_back() -> None:
    model = normops.convert(theirs.Sequential(theirs.LayerNorm(4), theirs.LayerNorm(4)))
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", theirs.Identity())
    with pytest.raises(RuntimeError, match="1 became a ParametrizedLayerNorm after it was converted"):
        normops.restore(model)
    assert type(model[0]) is nn.LayerNorm


def test_threads(plain: Callable[[str], str]) -> None:
    """Two calls of one block at a time, one of which adds what broadcasts, take nothing from each other."""
    found = plain("""
import sys
from concurrent.futures import ThreadPoolExecutor
import torch, normops
from tests import foreign, networks, unfused
sys.setswitchinterval(1e-6)
block = normops.convert(networks.Summing(4)).eval()
x, small = torch.randn(1, 4, 3, 3), torch.randn(4, 1, 1)
expected = torch.cat([block(x, x), block(x, small)])
with torch.no_grad(), ThreadPoolExecutor(4) as pool:
    for got in pool.map(lambda i: torch.cat([block(x, x), block(x, small)]), range(300)):
        assert torch.allclose(got, expected, atol=1e-5)
print("alike")
""")
    assert found == "alike"


def test_attributes_of_the_same_name() -> None:
    norm = theirs.LayerNorm(4)
    norm.activation = "relu"  # type: ignore[assignment]
    assert type(normops.convert(norm)) is theirs.LayerNorm
    assert normops.report(norm)[0].reason == "it has activation of its own"


def test_bad_input() -> None:
    for function in (normops.convert, normops.restore):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
            function([])  # type: ignore[arg-type]


def test_what_is_ours_is_left_and_reported() -> None:
    model = theirs.Sequential(nn.LayerNorm(4), theirs.ReLU())
    normops.convert(model)
    assert type(model[0]) is nn.LayerNorm and isinstance(model[1], theirs.ReLU)
    assert [row.reason for row in normops.report(model)] == ["it is ours"]
