"""Tasks in processes of their own: one that crashes, hangs or loses its CUDA context costs only itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

CUT_OFF = "cut off: no time left"


@dataclass(frozen=True)
class Failed:
    """In place of a result."""

    reason: str
    at: str | None = None
    """The part of its work (`at_work`) that the task was at."""


@dataclass(frozen=True)
class At:
    """What a worker says before it begins a part of its work: if it dies, this is the last that is heard of it."""

    part: str | None


_home: Connection | None = None
"""In a worker: the way to the process that gives the tasks."""
_part: str | None = None


def _begin(part: str | None) -> None:
    global _part
    _part = part
    if _home is not None:
        _home.send(At(part))


@contextmanager
def at_work(part: str | None) -> Iterator[None]:
    """A part of a task: named in `Failed` where the process dies or hangs in the block, or the block raises."""
    _begin(part)
    yield
    _begin(None)


def serve(connection: Connection, function: Callable[[Any], Any], healthy: Callable[[], None]) -> None:
    """A worker: takes tasks until it is told to stop; answers (answer, whether this process is of no more use)."""
    global _home, _part
    _home = connection
    while (task := connection.recv()) is not None:
        _part = None
        try:
            answer = function(task[0])
        except Exception as error:
            answer = Failed(f"{type(error).__name__}: {error}", _part)
        try:
            healthy()
        except Exception as error:
            if not isinstance(answer, Failed):
                answer = Failed(f"the device is lost: {type(error).__name__}: {error}")
            connection.send((answer, True))
            return
        connection.send((answer, False))


def nothing() -> None:
    """The health of a process that has no device."""


class Worker:
    def __init__(self, function: Callable[[Any], Any], healthy: Callable[[], None]) -> None:
        context = get_context("spawn")  # CUDA does not survive a fork
        self.connection, far = context.Pipe()
        self.process = context.Process(target=serve, args=(far, function, healthy), daemon=True)
        self.process.start()
        far.close()
        self.index: int | None = None
        self.until = 0.0
        self.at: str | None = None

    def give(self, index: int, task: Any, until: float) -> None:
        self.index, self.until, self.at = index, until, None
        self.connection.send((task,))

    def heard(self) -> tuple[Any, bool] | None:
        """(answer, whether the process is of no more use); None where it only said what it is at."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if not isinstance(message, At):
                    return message
                self.at = message.part
        except (EOFError, OSError):
            self.process.join(5)
            return Failed(f"the process died (exit code {self.process.exitcode})", self.at), True
        return None

    def stop(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        else:
            with suppress(OSError):
                self.connection.send(None)
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.connection.close()


def run(
    function: Callable[[Any], Any], tasks: Sequence[Any], *, workers: int, until: float, limit: float,
    weights: Sequence[float] = (), capacity: float = float("inf"), healthy: Callable[[], None] = nothing,
    again: Callable[[Any, Failed], Any] = lambda task, failed: None,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """(index, function(task) or Failed) as they finish, in the order given as far as room allows.

    A task runs `limit` seconds at most; none begins or goes on after `until` (of time.monotonic()): those that did not
    begin are not yielded.  `weights` of the tasks that run side by side add up to `capacity` at most; a heavier one
    runs alone.  Where a task failed, `again` may return another one to run at once in its place.
    """
    tasks = list(tasks)
    weights = weights or [0.0] * len(tasks)
    waiting, crew, load = list(range(len(tasks))), [], 0.0
    try:
        while True:
            for index in list(waiting):
                busy = [w for w in crew if w.index is not None]
                if len(busy) >= workers or time.monotonic() >= until:
                    break
                if busy and load + weights[index] > capacity:
                    continue
                idle = next((w for w in crew if w.index is None), None)
                if idle is None:
                    crew.append(idle := Worker(function, healthy))
                waiting.remove(index)
                load += weights[index]
                idle.give(index, tasks[index], min(until, time.monotonic() + limit))
            busy = [w for w in crew if w.index is not None]
            if not busy:
                return
            patience = max(0.0, min(w.until for w in busy) - time.monotonic())
            ready = wait([w.connection for w in busy], patience)
            for worker in busy:
                answered = worker.heard() if worker.connection in ready else None
                now = time.monotonic()
                if answered is None and now < worker.until:
                    continue
                late = Failed(CUT_OFF) if now >= until else Failed(f"hung for {limit:.0f} s", worker.at)
                answer, gone = answered or (late, True)
                index, worker.index = worker.index, None
                load -= weights[index]
                if gone:
                    crew.remove(worker)
                    worker.stop(kill=True)
                task = again(tasks[index], answer) if isinstance(answer, Failed) and now < until else None
                if task is None:
                    yield index, answer
                else:
                    tasks[index] = task
                    waiting.insert(0, index)
    finally:
        for worker in crew:
            worker.stop(kill=worker.index is not None)
