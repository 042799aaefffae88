"""Tasks in processes of their own: one that crashes, hangs or loses its CUDA context costs only itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass(frozen=True)
class Failed:
    """In place of a result."""

    reason: str


def serve(connection: Connection, function: Callable[[Any], Any], healthy: Callable[[], None]) -> None:
    """A worker: takes tasks until it is told to stop; answers (answer, whether this process is of no more use)."""
    while (task := connection.recv()) is not None:
        try:
            answer = function(task[0])
        except Exception as error:
            answer = Failed(f"{type(error).__name__}: {error}")
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

    def give(self, index: int, task: Any, until: float) -> None:
        self.index, self.until = index, until
        self.connection.send((task,))

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
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """(index, function(task) or Failed) as they finish, in the order given as far as room allows.

    A task runs `limit` seconds at most; none begins or goes on after `until` (of time.monotonic()): those that did not
    begin are not yielded.  `weights` of the tasks that run side by side add up to `capacity` at most; a heavier one
    runs alone.
    """
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
                late = time.monotonic() >= worker.until
                if worker.connection not in ready and not late:
                    continue
                index, worker.index = worker.index, None
                load -= weights[index]
                if worker.connection in ready:
                    try:
                        answer, gone = worker.connection.recv()
                    except (EOFError, OSError):
                        worker.process.join(5)
                        answer, gone = Failed(f"the process died (exit code {worker.process.exitcode})"), True
                else:
                    answer = Failed("cut off: no time left" if time.monotonic() >= until else f"hung for {limit:.0f} s")
                    gone = True
                if gone:
                    crew.remove(worker)
                    worker.stop(kill=True)
                yield index, answer
    finally:
        for worker in crew:
            worker.stop(kill=worker.index is not None)
