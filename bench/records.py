"""Files of results of runs on GPUs, bench/results/README.md says what is in them: names, writing, reading."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .common import environment, git, text

FOLDER = Path(__file__).parent / "results"
KIND, SCHEMA = "gpu", 1
LIBRARIES = ("liger-kernel", "quack-kernels", "nvidia-cudnn-frontend", "apex", "numpy")
QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "pstate",
)  # fmt: skip
Content = dict[str, Any]


def clocks(shell: Any) -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU now."""
    program = shell.which("nvidia-smi")
    if program is None:
        return None
    ran = shell.run([program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"], 20)
    line = ran.output.strip().splitlines()[:1]
    return dict(zip(QUERY, (cell.strip() for cell in line[0].split(",")), strict=False)) if line else None


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def dirty() -> bool | None:
    """Whether tracked files differ from the commit; None where git does not say."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def head(shell: Any, commit: str | None = None) -> Content:
    where = environment()
    where |= {"commit": where["commit"] or commit, "dirty": dirty(), "libraries": versions()}
    return {"kind": KIND, "schema": SCHEMA, "environment": where, "machine": clocks(shell)}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower().removeprefix("nvidia ")).strip("-")


def claim(folder: Path, content: Content) -> Path:
    """A new file <gpu>-<date>-<commit>.json, with a counter where that name is taken: none is ever overwritten."""
    where = content["environment"]
    commit = (where["commit"] or "nocommit")[:7] + ("-dirty" if where["dirty"] else "")
    stem = f"{slug(where['device'])}-{where['date'][:10]}-{commit}"
    folder.mkdir(parents=True, exist_ok=True)
    counter = 1
    while True:
        path = folder / (f"{stem}.json" if counter == 1 else f"{stem}-{counter}.json")
        try:
            path.open("x").close()
        except FileExistsError:
            counter += 1
        else:
            write(path, content)
            return path


def write(path: Path, content: Content) -> None:
    """All at once: whoever reads it, or is cut off, finds the old file or the new one."""
    beside = path.with_suffix(".partial")
    beside.write_text(text(content))
    os.replace(beside, path)


def read(folder: Path) -> list[Content]:
    """Runs in a folder, oldest first; other files are passed over."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.get("kind") == KIND and content.get("schema") == SCHEMA:
            found.append(content | {"file": path.name})
    return sorted(found, key=lambda content: (content["environment"]["date"], content["file"]))


def good(content: Content) -> bool:
    """Whether everything of normops that ran was right."""

    def mine(rows: Sequence[Content]) -> bool:
        return not any("error" in row or row.get("ok") is False for row in rows if row.get("provider") == "normops")

    checked = [row["ok"] for row in content.get("repeats", [])]
    statuses = [content.get("suite", {}).get("status"), *(row["status"] for row in content.get("sanitizer", []))]
    whole = not any(row.get("provider") == "any" for row in content.get("timing", []))
    return mine(content.get("verify", [])) and mine(content.get("timing", [])) and all(checked) and (
        "failed" not in statuses and whole
    )  # fmt: skip
