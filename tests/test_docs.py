"""The programs in docs/*.md run, and what they assert holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
PINNED = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.M))
HEAD = re.compile(r"# (\w+\.py)(?:, run (with|without) TRITON_INTERPRET(?:=1)?)?\n")


def programs(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if programs(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_programs_run(page: Path, tmp_path: Path) -> None:
    """Each block is a file; its first line names it, and says of a program whether the interpreter must be on."""
    for text in programs(page):
        head = HEAD.match(text)
        assert head, f"the first line must name the file: {text[:60]!r}"
        file = tmp_path / head[1]
        file.write_text(text, encoding="utf-8")
        if head[2]:
            path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
            environment = {**os.environ, "TRITON_INTERPRET": str(int(head[2] == "with")), "PYTHONPATH": path}
            done = subprocess.run(
                [sys.executable, file.name], cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{page.name}, {file.name}: {done.stderr[-2000:]}"
            shown = page.read_text(encoding="utf-8").partition(text)[2].lstrip("`\n")
            if shown.startswith("text\n") and triton.__version__ == PINNED["triton"]:
                assert done.stdout == shown.removeprefix("text\n").partition("```")[0], "the page shows another output"


def test_there_are_programs() -> None:
    assert "instruments.md" in [page.name for page in PAGES]
