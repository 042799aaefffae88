"""Printing: through rich where it is installed, plainly where it is not (a bare machine with a GPU)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from time import monotonic
from typing import Any

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    Console = None  # type: ignore[assignment, misc]

STYLE = re.compile(r"\[/?[a-z]+\]")


class PlainConsole:
    """The little of rich's Console that is used here, as bare text."""

    def print(self, *parts: Any, markup: bool = True, **_: Any) -> None:
        text = " ".join(map(str, parts))
        print(STYLE.sub("", text) if markup else text, flush=True)


INTERVAL = 10.0
"""Seconds between lines of a progress that is no bar."""


@dataclass
class Task:
    label: str
    total: int | None
    done: int = 0


class LineProgress:
    """The little of rich's Progress that is used here, as lines, for logs and pipes: one at the start, one at the first
    that is done, and one every ten seconds."""

    def __enter__(self) -> LineProgress:
        self._tasks: list[Task] = []
        self._began, self._over = monotonic(), Event()
        self._clock = Thread(target=self._tick, daemon=True)
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._clock.join()

    def _tick(self) -> None:
        while not self._over.wait(INTERVAL):
            for task in list(self._tasks):
                self._print(task)

    def _print(self, task: Task) -> None:
        so_far = "" if task.total is None else f"{task.done} of {task.total}, "
        console.print(f"{task.label}: {so_far}{monotonic() - self._began:.0f} s", markup=False, highlight=False)

    def add_task(self, description: str, total: int | None = None) -> int:
        self._tasks.append(Task(description, total))
        self._print(self._tasks[-1])
        return len(self._tasks) - 1

    def advance(self, task: int) -> None:
        self._tasks[task].done += 1
        if self._tasks[task].done == 1:
            self._print(self._tasks[task])

    def track(self, items: Sequence[Any], description: str = "done") -> Iterator[Any]:
        task = self.add_task(description, len(items))
        for item in items:
            yield item
            self.advance(task)


console: Any = Console(width=None if sys.stdout.isatty() else 120) if Console else PlainConsole()


def progress_bar() -> Any:
    """A bar on a terminal, lines elsewhere."""
    if not Console or not console.is_terminal:
        return LineProgress()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Cells may carry rich's styles: "[red]text"."""
    if Console:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        (console if console.is_terminal else Console(width=240)).print(table)  # in a log nothing is cut
        return
    lines = [[STYLE.sub("", cell) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    console.print(title, markup=False)
    for line in lines:
        console.print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip(), markup=False)
