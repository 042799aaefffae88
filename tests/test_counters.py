"""The words that ticketed launches count in: whose they are, when they are fresh, and what a failed launch leaves."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from normops import counters, schedule
from normops.compiled import INTERPRETED
from normops.testing import plans
from tests.ticketed_calls import SMALL, Call, bits, within

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter: TRITON_INTERPRET=1")


CPU = (torch.device("cpu"), 0)


class Device:
    """torch as counters.py sees it: devices with streams, whose memory is the CPU's."""

    int32 = torch.int32
    Tensor = Tensor

    def __init__(self) -> None:
        self.stream, self.capturing, self.current = 7, False, 0
        self.cuda = SimpleNamespace(
            current_stream=lambda device: SimpleNamespace(cuda_stream=self.stream),
            is_current_stream_capturing=lambda: self.capturing,
            device=lambda device: nullcontext(),
            current_device=lambda: self.current,
        )  # fmt: skip

    @staticmethod
    def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    monkeypatch.setattr(counters, "torch", fake)
    monkeypatch.setattr(counters, "_words", {})
    return fake


FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def test_words_belong_to_a_device_and_a_stream(gpu: Device) -> None:
    mine = counters.words(100, FIRST)
    assert mine.numel() >= 100 and mine.dtype == torch.int32 and not mine.any()
    assert counters.words(100, FIRST) is mine and counters.words(3, FIRST) is mine
    other = counters.words(100, SECOND)
    gpu.stream = 8
    third = counters.words(100, FIRST)
    assert len({t.data_ptr() for t in (mine, other, third)}) == 3
    gpu.stream = 7
    assert counters.words(100, FIRST) is mine and counters.words(1, SECOND) is other


def test_words_grow(gpu: Device) -> None:
    """Into zeroes: what the smaller ones hold may not be known."""
    small = counters.words(100, FIRST)
    small.fill_(5)
    large = counters.words(small.numel() + 1, FIRST)
    assert large.numel() > small.numel() and not large.any()
    assert counters.words(100, FIRST) is large
    assert counters.words(10 * large.numel(), FIRST).numel() >= 10 * large.numel()


def test_a_capture_has_words_of_its_own(gpu: Device) -> None:
    """Zeroed by the graph, at each replay: never those that launches outside it share, and not kept either."""
    shared = counters.words(100, FIRST)
    shared.fill_(5)
    gpu.capturing = True
    first, second = counters.words(100, FIRST), counters.words(100, FIRST)
    assert len({t.data_ptr() for t in (shared, first, second)}) == 3
    assert all(t.numel() >= 100 and not t.any() for t in (first, second))
    gpu.stream = 9
    counters.words(100, FIRST)
    gpu.capturing = False
    assert counters.words(100, FIRST) is not first
    gpu.stream = 7
    assert counters.words(100, FIRST) is shared


def test_a_failure_drops_the_words_of_its_stream_alone(gpu: Device) -> None:
    mine, other = counters.words(100, FIRST), counters.words(100, SECOND)
    gpu.stream = 8
    third = counters.words(100, FIRST)
    counters.forget(FIRST)
    assert counters.words(100, FIRST) is not third
    counters.forget(torch.device("cuda", 2))  # there are none
    gpu.stream = 7
    assert counters.words(100, FIRST) is mine and counters.words(100, SECOND) is other


@interpreted
def test_calls_inside_a_capture_count_in_words_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with schedule.forced(engine="ticketed", **SMALL), within(30):
        call = Call("instance, sum")
        call.run()
        shared = counters._words[CPU]
        monkeypatch.setattr(counters, "_capturing", lambda device: True)
        with plans() as planned:
            call.run()
    words = [one.operands["tickets"] for one in planned]
    assert len({t.data_ptr() for t in (shared, *words)}) == 3
    assert all(t.numel() >= one.plan.words and not t.any() for t, one in zip(words, planned, strict=True))


class Halt(Exception):
    pass


def halting(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The interpreter raises in place of an atomic operation, after so many of them."""
    builder = interpreter.InterpreterBuilder
    original, left = builder.create_atomic_rmw, [after]

    def method(self: Any, *args: Any) -> Any:
        if not left[0]:
            raise Halt
        left[0] -= 1
        return original(self, *args)

    monkeypatch.setattr(builder, "create_atomic_rmw", method)


@interpreted
@pytest.mark.parametrize("after", [1, 9, 14, 22])
def test_a_launch_after_one_that_failed_is_right(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left but running statistics, where a channel has moved, once, or has not."""
    with schedule.forced(engine="ticketed", **{**SMALL, "ahead": 0}), within(30):
        call = Call("batch")
        undisturbed = call.run()
        before, words = Call("batch").running, counters._words[CPU]
        assert not words.any()
        for name, t in before.items():
            call.running[name].copy_(t)
        with monkeypatch.context() as patched:
            halting(patched, after)
            with pytest.raises(interpreter.InterpreterError, match="Halt"):
                call.run()
        assert words.any() and CPU not in counters._words
        for name, t in before.items():
            moved = call.running[name] != t
            assert torch.equal(call.running[name], torch.where(moved, undisturbed[name], t))
            t.copy_(call.running[name])
            call.running[name].copy_(Call("batch").running[name])
        again = call.run()
    assert again.keys() == undisturbed.keys()
    for name, t in undisturbed.items():
        assert torch.equal(bits(again[name]), bits(t)), name
    assert not counters._words[CPU].any()


@interpreted
def test_a_failed_backward_drops_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with schedule.forced(engine="ticketed", **SMALL), within(30):
        call = Call("instance")
        undisturbed = call.run()
        y, _ = call.forward()
        words = counters._words[CPU]
        with monkeypatch.context() as patched:
            halting(patched, 5)
            with pytest.raises(interpreter.InterpreterError, match="Halt"):
                torch.autograd.grad(y, call.leaves, call.dy)
        assert words.any() and CPU not in counters._words
        again = call.run()
    assert all(torch.equal(bits(again[name]), bits(t)) for name, t in undisturbed.items())
