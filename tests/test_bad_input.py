"""Wrong arguments of every public function (tests/bad_input.py): refused as by PyTorch, named, without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import normops
from normops import conversion, nn
from tests import bad_input
from tests.bad_input import DEVICE, FUNCTIONS, THING, Function


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_functions(function: Function) -> None:
    assert bad_input.found(function) == []


def test_functions_without_kernels(plain: Callable[[str], str]) -> None:
    printed = plain("import runpy; runpy.run_module('tests.bad_input', run_name='__main__')")
    assert printed.endswith(" cases") and printed.count("\n") == 0, printed


MODULES: dict[str, Callable[..., torch.nn.Module]] = {
    "BatchNorm2d": lambda **k: nn.BatchNorm2d(6, **k),
    "InstanceNorm2d": lambda **k: nn.InstanceNorm2d(6, affine=True, track_running_stats=True, **k),
    "GroupNorm": lambda **k: nn.GroupNorm(2, 6, **k),
    "LayerNorm": lambda **k: nn.LayerNorm(3, **k),
    "RMSNorm": lambda **k: nn.RMSNorm(3, **k),
    "LayerNorm2d": lambda **k: nn.LayerNorm2d(6, **k),
    "Normalize": lambda **k: nn.Normalize("n (g c) h w -> n g", affine="(g c)", g=2, c=3, **k),
}
modules = pytest.mark.parametrize("name", MODULES)


@modules
def test_module_is_not_built(name: str) -> None:
    for keyword in inspect.signature(getattr(nn, name)).parameters:
        if keyword not in ("lengths", "num_features", "num_groups", "num_channels", "normalized_shape", "pattern"):
            with pytest.raises((TypeError, ValueError), match=keyword + keyword[-1]) as caught:
                MODULES[name](**{keyword + keyword[-1]: None})
            if name == "Normalize" and keyword not in ("device", "dtype"):
                assert f"did you mean {keyword}" in str(caught.value)
    for value in bad_input.WRONG["activation"].values():
        with pytest.raises(ValueError, match="unknown activation"):
            MODULES[name](activation=value)
    for value in bad_input.WRONG["dtype"].values():
        with pytest.raises(TypeError, match="out_dtype must be"):
            MODULES[name](out_dtype=value)


@modules
def test_a_refused_call_leaves_a_module_alone(name: str) -> None:
    x = bad_input.made(2, 6, 3, 3)
    norm, other = MODULES[name]().to(DEVICE), MODULES[name]().to(DEVICE)
    norm(x), other(x)
    before = {key: t.clone() for key, t in norm.state_dict().items()}
    wrong = [({"pre_add": t}, "pre_add") for _, t in bad_input._tensors(None, x)]
    wrong += [({"post_add": t}, "post_add") for _, t in bad_input._tensors(None, x)]
    wrong += [({"activation": a}, "activation") for a in bad_input.WRONG["activation"].values()]
    for keywords, named in wrong:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=named):
            norm(x, **keywords)
    for label, t in bad_input._tensors(x, x):
        found = bad_input.outcome(norm, {next(iter(inspect.signature(norm.forward).parameters)): t})
        assert isinstance(found, (TypeError, ValueError, RuntimeError, AttributeError)), label
    assert all(torch.equal(t, before[key]) for key, t in norm.state_dict().items())
    assert torch.equal(norm(x), other(x)) and norm.state_dict().keys() == before.keys()


@pytest.mark.parametrize("function", [normops.convert, normops.restore, normops.report], ids=lambda f: f.__name__)
@pytest.mark.parametrize("model", [None, "model", 1, THING, torch.nn.LayerNorm, [torch.nn.LayerNorm(3)]], ids=str)
def test_models(function: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module, got {type(model).__name__}"):
        function(model)


@pytest.mark.parametrize(("kind", "converter"), [
    (1, lambda m: None), (None, lambda m: None), (torch.nn.LayerNorm, None), (torch.nn.LayerNorm(3), lambda m: None),
    ("a.b", "text"),
])  # fmt: skip
def test_converters(kind: Any, converter: Any) -> None:
    before = dict(conversion._converters)
    with pytest.raises(TypeError, match="expected a class or its name, and a function, got"):
        normops.register_converter(kind, converter)
    assert conversion._converters == before
