"""Doubles for what `python -m bench gpu` works with: the device, other programs, processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench import workers
from bench.cases import CASES, Case
from bench.device import Replay
from bench.shell import Ran

BY_NAME = {case.name: case for case in CASES}
TINY = "image instance"


class FakeDevice:
    """Shrunken shapes on the CPU; each provider takes as many microseconds as its replay was the nth to be made."""

    rotates = False

    def __init__(self) -> None:
        self.made: list[Replay] = []
        self.captures = 0

    def shape(self, case: Case) -> tuple[int, ...]:
        return case.small

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield

    def capture(self, calls: Sequence[Callable[[], Any]]) -> Replay:
        kept = [call() for call in calls]
        self.made.append(Replay(lambda: None, kept, len(kept) > 0))
        return self.made[-1]

    def elapsed(self, replay: Replay) -> float:
        return 1e4 + 1.0 * next(i for i, made in enumerate(self.made) if made is replay)

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def release(self) -> None:
        pass


class FakeShell:
    """No program is there but nvidia-smi and those named; what they print."""

    def __init__(self, **outputs: str) -> None:
        self.outputs = {"nvidia-smi": "NVIDIA H200, 580.1, 345 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 80 W, 700 W, 30, P0"}
        self.outputs |= {name.replace("_", "-"): text for name, text in outputs.items()}
        self.commands: list[list[str]] = []

    def which(self, name: str) -> str | None:
        return name if name in self.outputs else None

    def run(self, command: Sequence[str], seconds: float, **environment: str) -> Ran:
        self.commands.append(list(command))
        name = "pytest" if "pytest" in command else command[0]
        return Ran(0, self.outputs.get(name, ""), 1.0)


def serial(function: Callable[[Any], Any], tasks: Sequence[Any], **_: Any) -> Iterator[tuple[int, Any]]:
    for index, task in enumerate(tasks):
        try:
            yield index, function(task)
        except Exception as error:
            yield index, workers.Failed(f"{type(error).__name__}: {error}")
