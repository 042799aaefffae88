"""The device that is measured: CUDA graphs, events, memory.  Tests put a double in its place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Case


@dataclass(frozen=True)
class Replay:
    """Calls that can be run again and again, one after another."""

    run: Callable[[], Any]
    kept: Any
    """What a graph reads and writes, alive as long as it is replayed: the calls with all they hold (autograd's saved
    tensors among it), and what they returned, so that no two of them write the same memory."""
    graph: bool
    """Whether a CUDA graph is replayed; else the calls are made from Python, whose time may show."""
    why: str | None = None
    """Why there is no graph."""


class Cuda:
    """The current CUDA device."""

    rotates = True
    """Whether inputs rotate so that none is left in its caches."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def shape(self, case: Case) -> tuple[int, ...]:
        return case.shape

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Autograd runs a backward on its forward's stream: what is captured later must be called in here."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Replay:
        """A graph of the calls; what cannot be captured is called from Python instead."""
        with self.stream():
            for _ in range(3):
                calls[0]()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                kept = [call() for call in calls]
        except Exception as error:
            torch.cuda.synchronize()  # raises in turn where the device is lost
            self._call(calls)
            return Replay(lambda: self._call(calls), None, False, f"{type(error).__name__}: {error}"[:300])
        return Replay(graph.replay, (graph, list(calls), kept), True)

    def _call(self, calls: Sequence[Callable[[], Any]]) -> None:
        with torch.cuda.stream(self._stream):
            for call in calls:
                call()

    def elapsed(self, replay: Replay) -> float:
        """Microseconds of one run."""
        stream = torch.cuda.current_stream() if replay.graph else self._stream
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        replay.run()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def allocated(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Most bytes allocated since the last call of this."""
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def release(self) -> None:
        """Give memory back.  Raises where the device is lost."""
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()


def healthy() -> None:
    """Raises if the CUDA context of this process is lost; gives memory back for the processes beside it."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
