"""Modules with an out_dtype: y has it, whatever else they take; cumulative averages in a compiled module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from normops import nn

MODULES: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "BatchNorm1d": ((4,), (5, 4)), "BatchNorm2d": ((4,), (2, 4, 3, 3)), "BatchNorm3d": ((4,), (2, 4, 2, 2, 2)),
    "InstanceNorm1d": ((4,), (4, 5)), "InstanceNorm2d": ((4,), (2, 4, 3, 3)), "InstanceNorm3d": ((4,), (4, 2, 2, 3)),
    "GroupNorm": ((2, 4), (2, 4, 3)), "LayerNorm": ((4,), (2, 4)), "RMSNorm": ((4,), (2, 4)),
    "LayerNorm2d": ((4,), (2, 4, 3)), "Normalize": (("n c -> n",), (2, 4)),
}  # fmt: skip
names = pytest.mark.parametrize("name", MODULES)


def build(name: str, device: torch.device, **options: Any) -> Any:
    return getattr(nn, name)(*MODULES[name][0], **options).to(device)


@names
def test_y_is_what_it_would_be_before_it_is_rounded_to_the_dtype_of_x(name: str, device: torch.device) -> None:
    x = torch.randn(MODULES[name][1], device=device, dtype=torch.float16)
    y, plain = (build(name, device, out_dtype=dtype, activation="silu")(x) for dtype in (torch.float32, None))
    assert y.dtype == torch.float32 and plain.dtype == torch.float16
    torch.testing.assert_close(y.half(), plain)  # to one unit in the last place: the schedules may differ
    assert not torch.equal(y, plain.float())


@names
def test_copies_keep_it_and_repr_shows_it(name: str, device: torch.device) -> None:
    module = build(name, device, activation="relu", out_dtype=torch.float64)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.half()):
        assert same.out_dtype == torch.float64
        assert repr(same).endswith("activation=relu, out_dtype=torch.float64)")
    assert "out_dtype" not in repr(build(name, device))


@names
def test_a_module_pickled_before_there_was_an_out_dtype_works(name: str, device: torch.device) -> None:
    module = build(name, device)
    del module.__dict__["out_dtype"]
    x = torch.randn(MODULES[name][1], device=device)
    assert pickle.loads(pickle.dumps(module))(x).dtype == x.dtype


@names
def test_no_module_is_built_with_another_dtype(name: str, device: torch.device) -> None:
    with pytest.raises(TypeError, match=r"out_dtype must be None, float16, .* or float64, got torch\.int32"):
        build(name, device, out_dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_cumulative_average_is_the_eager_one(dtype: torch.dtype, device: torch.device) -> None:
    """No graph break, and one compilation for all steps.  torch's module breaks the graph: it reads its counter."""
    torch._dynamo.reset()
    eager = nn.BatchNorm2d(3, momentum=None, device=device, dtype=dtype)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, device=device, dtype=dtype) + 1
        assert torch.equal(compiled(x), eager(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert module.num_batches_tracked.item() == 3
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), buffer)
