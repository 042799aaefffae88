"""Printing: through rich where it is installed, plainly where it is not (a bare machine with a GPU)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
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


class PlainProgress:
    """The little of rich's Progress that is used here: it shows nothing."""

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_task(self, description: str, total: int | None = None) -> int:
        return 0

    def advance(self, task: int) -> None:
        pass

    def track(self, items: Iterable[Any], description: str = "") -> Iterable[Any]:
        return items


console: Any = Console(width=None if sys.stdout.isatty() else 120) if Console else PlainConsole()


def progress_bar() -> Any:
    if not Console:
        return PlainProgress()
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
