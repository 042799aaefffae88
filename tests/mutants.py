"""Change one operator at a time, in a copy of the tree: does a test fail?

    python -m tests.mutants [MODULE ...] [--every N] [--seed S]

A mutant that no test of its module notices survives: it is printed, and the exit code is 1, unless
tests/equivalents.py says why it does the same.  An endless loop is noticed too.  --every N: one mutant in N.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch  # noqa: F401  here, once: the processes start sooner

from tests.equivalents import EQUIVALENT

ROOT = Path(__file__).resolve().parents[1]
# The file, and what pytest runs until one fails.
MODULES = {
    "tickets": ("kernels/tickets.py", ["tests/test_ticketed.py"]),
    "sums": ("kernels/sums.py", ["tests/test_sums.py"]),
    "layout": ("normops/layout.py", ["tests/test_layout.py"]),
    "ticketing": ("normops/ticketing.py", ["tests/test_schedule.py"]),
    "finish": ("kernels/finish.py", ["tests/test_fold.py", "tests/test_exact_statistics.py"]),
    "schedule": ("normops/schedule.py", ["tests/test_schedule.py"]),
}
CHANGED: dict[type[ast.AST] | str, tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Not: ("not ", ""), ast.USub: ("-", ""), "min": ("min", "max"), "max": ("max", "min"),
    "minimum": ("minimum", "maximum"), "maximum": ("maximum", "minimum"),
}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[int, str, str, str]]:
    """With one operator changed each: the number of the line, the line before and after, the whole source."""
    data, lines = source.encode(), source.split("\n")  # ast counts columns in bytes
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]

    def end(node: ast.expr) -> int:
        return starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)

    found: list[tuple[int, type[ast.AST] | str]] = []  # a place that an operator follows, and which
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            found.append((end(node.left), type(node.op)))
        elif isinstance(node, ast.Compare):
            found += zip(map(end, [node.left, *node.comparators]), map(type, node.ops), strict=False)
        elif isinstance(node, ast.BoolOp):
            found += [(end(left), type(node.op)) for left in node.values[:-1]]
        elif isinstance(node, ast.UnaryOp):
            found.append((starts[node.lineno - 1] + node.col_offset, type(node.op)))
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.append((end(node.func) - len(name), name))
    for place, old, new in sorted((place, *CHANGED[key]) for place, key in found if key in CHANGED):
        at = data.index(old.encode(), place)
        changed = (data[:at] + new.encode() + data[at + len(old) :]).decode()
        line = data.count(b"\n", 0, at)
        yield line + 1, lines[line].strip(), changed.split("\n")[line].strip(), changed


def run(tree: Path, tests: Sequence[str]) -> None:
    """In a process of its own."""
    os.setsid()  # what it starts ends with it
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    os._exit(code if Path(sys.modules["normops"].__file__ or "").is_relative_to(tree) else 9)


def passes(tree: Path, tests: Sequence[str], seconds: float) -> bool:
    process = multiprocessing.get_context("fork").Process(target=run, args=(tree, tests))
    process.start()
    try:
        process.join(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return process.exitcode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[[], *MODULES], metavar="MODULE", help=", ".join(MODULES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # Two mutants of one size in one second look the same to Python.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    all_survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__"))
        for module in given.modules or MODULES:
            name, tests = MODULES[module]
            start = time.perf_counter()
            assert passes(tree, tests, 600), f"the tests of {module} fail without a mutant"
            longest = 3 * (time.perf_counter() - start) + 30
            source = (ROOT / name).read_text()
            known, every, survived = EQUIVALENT.get(module, {}), list(mutants(source)), 0
            assert known.keys() <= {after for _, _, after, _ in every}, f"equivalents that {module} has no longer"
            wanted = [one for one in every if one[2] not in known]
            chosen = random.Random(given.seed).sample(wanted, -(-len(wanted) // given.every))
            for line, before, after, changed in sorted(chosen):
                (tree / name).write_text(changed)
                if passes(tree, tests, longest):
                    survived += 1
                    print(f"{name}:{line}: {before} -> {after}", flush=True)
            (tree / name).write_text(source)
            print(f"== {module}: {len(chosen)} mutants, {survived} survived", flush=True)
            all_survived += survived
    return int(all_survived > 0)


if __name__ == "__main__":
    sys.exit(main())
