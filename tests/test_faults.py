"""Kernels that cannot run: the error names the call, nothing is half-written, and ``fallback`` computes the formula."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from normops import calls, counters, nn, schedule
from normops import functional as F
from tests.ticketed_calls import SMALL

interpreted = pytest.mark.skipif(not calls.INTERPRETED, reason="in Triton's interpreter")

PROGRAM = """
import warnings
import torch
import normops
from normops import calls, compiled, faults, launch, nn, schedule
from normops import functional as F
from normops.testing import virtual_device

T = torch.nn.functional
loaded, workspace = compiled.loaded, launch.Step.workspace
x = torch.randn(64, 8, 20, 20)

class Broken(Exception):
    pass

def broken(after=0, kind=Broken):
    left = [after]
    def load(kernel, *arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise kind("no compiler")
        return loaded(kernel, *arguments, **options)
    compiled.loaded = load

def caught(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("expected an error")

with virtual_device("h100") as gpu:
{0}
print("right")
"""


def checked(plain: Callable[[str], str], body: str) -> None:
    """The kernels of a virtual device are compiled, and broken; launches are recorded and compute nothing."""
    assert plain(PROGRAM.format("\n".join("    " + line for line in body.splitlines()))).endswith("right")


def test_the_error_names_the_call(plain: Callable[[str], str]) -> None:
    checked(plain, """
broken()
error = caught(lambda: F.group_norm(x, 2))
assert type(error) is normops.KernelError and type(error.__cause__) is Broken
for part in ("(64, 8, 20, 20)", "torch.float32", "'d0 (d1 d2) d3 d4 -> d0 d1'", "h100", "no compiler", "fallback()"):
    assert part in str(error), error
compiled.loaded = loaded
leaf = x.clone().requires_grad_()
y = F.group_norm(leaf, 2)  # the forward is there, the backward fails
broken()
assert type(caught(lambda: y.sum().backward())) is normops.KernelError and leaf.grad is None
""")  # fmt: skip


def test_a_call_that_fails_has_launched_nothing(plain: Callable[[str], str]) -> None:
    """Not even the kernels that there were: statistics, which move running ones, come before what applies them."""
    checked(plain, """
with schedule.forced(engine="split"):
    F.batch_norm(x, torch.zeros(8), torch.ones(8), training=True)
    assert len(gpu.launches) == 3
    gpu.launches.clear()
    for after in range(3):
        calls.known.clear()
        broken(after)
        error = caught(lambda: F.batch_norm(x, torch.zeros(8), torch.ones(8), training=True))
        assert type(error) is normops.KernelError and not gpu.launches
""")


def test_fallback_computes_the_formula_with_one_warning(plain: Callable[[str], str]) -> None:
    checked(plain, """
broken()
leaf, weight = x.clone().requires_grad_(), torch.rand(8).requires_grad_()
mean, var = torch.zeros(8), torch.ones(8)
with warnings.catch_warnings(record=True) as seen, normops.fallback():
    warnings.simplefilter("always")
    for _ in range(2):
        y = F.batch_norm(leaf, mean, var, weight, training=True, activation="relu", momentum=0.5)
    y.square().sum().backward()
    F.layer_norm(x, (20,))
    nn.GroupNorm(2, 8)(x)
assert [w.category for w in seen] == [RuntimeWarning] and "no compiler" in str(seen[0].message), seen
other, scale = x.clone().requires_grad_(), weight.detach().clone().requires_grad_()
expected, theirs = torch.zeros(8), torch.ones(8)
for _ in range(2):
    z = T.relu(T.batch_norm(other, expected, theirs, scale, training=True, momentum=0.5))
z.square().sum().backward()
for a, b in ((y, z), (mean, expected), (var, theirs)):
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
assert torch.allclose(leaf.grad, other.grad, rtol=1e-3, atol=1e-4)
assert torch.allclose(weight.grad, scale.grad, rtol=1e-4)
assert not gpu.launches
assert type(caught(lambda: F.layer_norm(x, (20,)))) is normops.KernelError, "the mode is over"
compiled.loaded = loaded
F.layer_norm(x, (20,))
assert gpu.launches, "what failed is tried again"
""")  # fmt: skip


def test_fallback_of_a_backward_and_of_the_operators(plain: Callable[[str], str]) -> None:
    checked(plain, """
leaf = x.clone().requires_grad_()
y = F.rms_norm(leaf, (20,), eps=1e-6)
node = y.grad_fn
saved = node.saved_tensors[-1]
saved.data.copy_(x.double().square().mean(-1).add(1e-6).rsqrt().flatten())  # nothing was computed
broken()
other = x.clone().requires_grad_()
(expected,) = torch.autograd.grad(T.rms_norm(other, (20,), eps=1e-6).square().sum(), other)
with warnings.catch_warnings(record=True) as seen, normops.fallback():
    warnings.simplefilter("always")
    (found,) = torch.autograd.grad(y, leaf, 2 * T.rms_norm(x, (20,), eps=1e-6))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    doubled = torch.func.grad(lambda x: F.rms_norm(x, (20,), eps=1e-6).square().sum())(x)
    assert torch.allclose(doubled, expected, rtol=1e-4, atol=1e-5)
assert len(seen) == 1, seen
assert type(caught(lambda: torch.func.grad(lambda x: F.rms_norm(x, (20,)).sum())(x))) is normops.KernelError
""")  # fmt: skip


def test_no_memory_is_an_error_of_memory(plain: Callable[[str], str]) -> None:
    """So that whoever halves a batch on torch.OutOfMemoryError goes on doing so."""
    checked(plain, """
def workspace(self, like):
    raise torch.OutOfMemoryError("tried to allocate")
launch.Step.workspace = workspace
error = caught(lambda: F.group_norm(x, 2))
assert isinstance(error, torch.OutOfMemoryError) and isinstance(error, normops.KernelError)
assert "(64, 8, 20, 20)" in str(error) and "tried to allocate" in str(error)
""")


@pytest.mark.parametrize(("versions", "expected"), [
    ({"triton": "3.4.0"}, "expected triton >= 3.5, found 3.4.0"),
    ({"triton": "3.6.0", "numpy": "2.4.1"}, "expected numpy < 2.4, for the interpreter of triton 3.6.0"),
])  # fmt: skip
def test_versions_that_cannot_run_kernels(plain: Callable[[str], str], versions: dict[str, str], expected: str) -> None:
    """They are refused by name when kernels are asked for; what needs none works."""
    found = plain(f"""
import os, warnings
os.environ["TRITON_INTERPRET"] = "1"
import numpy, torch, triton
for name, version in {versions}.items():
    globals()[name].__version__ = version
import normops
from normops import calls, functional as F

calls._stand_in = calls.H200  # as a CUDA tensor would
x = torch.randn(4, 8)
try:
    F.layer_norm(x, (8,))
except ImportError as error:
    print(error)
with warnings.catch_warnings(record=True) as seen, normops.fallback():
    warnings.simplefilter("always")
    y = F.layer_norm(x, (8,))
assert len(seen) == 1 and torch.allclose(y, torch.nn.functional.layer_norm(x, (8,)), atol=1e-6)
""")
    assert expected in found


@interpreted
def test_ctrl_c_in_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt as it is, no dirty words, and the next call is right."""
    x = torch.randn(4, 8, 9, 9)
    with schedule.forced(engine="ticketed", **SMALL):
        expected = F.instance_norm(x)
        left, original = [3], interpreter.InterpreterBuilder.create_atomic_rmw

        def atomic(self: Any, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            return original(self, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(interpreter.InterpreterBuilder, "create_atomic_rmw", atomic)
            with pytest.raises((KeyboardInterrupt, interpreter.InterpreterError)) as caught:
                F.instance_norm(x)
        assert left[0] <= 0 and caught.type is KeyboardInterrupt
        assert torch.device("cpu") not in counters._words
        assert torch.equal(F.instance_norm(x), expected)


def _item(index: int) -> torch.Tensor:
    return F.layer_norm(torch.arange(8.0) + index, (8,), activation="gelu")


class _Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return _item(index)


@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())))
def test_workers_of_a_loader(method: str) -> None:
    """Processes that began as copies of one that has called norms, and such that import them anew."""
    expected = torch.stack([_item(i) for i in range(6)])
    loader = torch.utils.data.DataLoader(_Data(), batch_size=3, num_workers=1, multiprocessing_context=method)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-6, atol=1e-6)


def test_many_threads_at_the_first_call(plain: Callable[[str], str]) -> None:
    """Each launches the kernels of its call, compiled by whoever came first, once."""
    checked(plain, """
from threading import Barrier, Thread
start, errors = Barrier(8), []
norm = nn.GroupNorm(2, 8, activation="silu")
def first():
    start.wait()
    try:
        for size in (5, 6, 5):
            leaf = torch.randn(4, 8, size, size, requires_grad=True)
            norm(leaf).sum().backward()
    except Exception as error:
        errors.append(error)
threads = [Thread(target=first) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not errors, errors
one = len(gpu.launches)
assert one % 24 == 0 and one >= 48, one
""")


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under shapes and gradients that never come twice."""
    monkeypatch.setattr(calls, "KNOWN", 8)
    calls.known.clear()
    for size in range(1, 20):
        F.layer_norm(torch.randn(2, size), (size,))
        assert len(calls.known) <= 8
    norm = nn.RMSNorm(4)
    for gap in range(1, 90):
        leaf = torch.randn(2, 4, requires_grad=True)
        norm(leaf).backward(torch.randn(2, 4 * gap)[:, ::gap])
    for call in calls.known.values():
        assert len(call._forward) <= calls.STEPS and len(call._backward) <= calls.STEPS
