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
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

from tests.equivalents import EQUIVALENT

ROOT = Path(__file__).resolve().parents[1]

EXACT, FOLD, RACES = "tests/test_exact_statistics.py", "tests/test_fold.py", "tests/test_ticketed.py"
# The file, and what pytest runs: one after the other until one fails.
MODULES = {
    "tickets": ("kernels/tickets.py", [RACES]),
    "sums": ("kernels/sums.py", ["tests/test_sums.py"]),
    "layout": ("normops/layout.py", ["tests/test_layout.py", "tests/test_schedule.py", FOLD]),
    "ticketing": ("normops/ticketing.py", ["tests/test_schedule.py", RACES]),
    "finish": ("kernels/finish.py", [FOLD, EXACT]),
    "schedule": ("normops/schedule.py", ["tests/test_schedule.py", FOLD, EXACT]),
}
OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Not: ("not ", ""), ast.USub: ("-", ""),
}  # fmt: skip
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


class Mutant(NamedTuple):
    line: int
    before: str
    after: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Each with one operator changed, in the order of the source."""
    data = source.encode()  # ast counts columns in bytes
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]

    def begin(node: ast.expr) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        return starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)

    found: list[tuple[int, str, str]] = []  # a place that the old text follows soon, that text, the new one
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            found.append((end(node.left), *OPERATORS[type(node.op)]))
        elif isinstance(node, ast.Compare):
            known = zip(node.ops, [node.left, *node.comparators], strict=False)
            found += [(end(left), *OPERATORS[type(op)]) for op, left in known if type(op) in OPERATORS]
        elif isinstance(node, ast.BoolOp):
            found += [(end(left), *OPERATORS[type(node.op)]) for left in node.values[:-1]]
        elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            found.append((begin(node), *OPERATORS[type(node.op)]))
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in EXTREMES:
                found.append((end(node.func) - len(name), name, EXTREMES[name]))
    for place, old, new in sorted(found):
        at = data.index(old.encode(), place)
        changed = (data[:at] + new.encode() + data[at + len(old) :]).decode()
        ast.parse(changed)
        line = data.count(b"\n", 0, at)
        yield Mutant(line + 1, source.split("\n")[line].strip(), changed.split("\n")[line].strip(), changed)


def run(tree: Path, tests: str) -> None:
    """In a process of its own."""
    import pytest

    os.setsid()  # what it starts ends with it
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests.split()])
    os._exit(code if Path(sys.modules["normops"].__file__ or "").is_relative_to(tree) else 9)


def passes(tree: Path, tests: Sequence[str], seconds: float) -> bool:
    context = multiprocessing.get_context("fork")
    for some in tests:
        process = context.Process(target=run, args=(tree, some))
        process.start()
        try:
            process.join(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
        if process.exitcode:
            return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[[], *MODULES], metavar="MODULE", help=", ".join(MODULES))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    os.environ |= {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
    sys.dont_write_bytecode = True  # two mutants of one size in one second look the same to Python
    import hypothesis  # noqa: F401  here: processes start in a second
    import torch
    import triton.language  # noqa: F401

    torch.set_num_threads(1)
    summary, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__"))
        for module in given.modules or MODULES:
            name, tests = MODULES[module]
            start = time.perf_counter()
            assert passes(tree, tests, 600), f"the tests of {module} fail without a mutant"
            longest = 3 * (time.perf_counter() - start) + 30
            source = (ROOT / name).read_text(encoding="utf-8")
            every = [one for one in mutants(source) if one.after not in EQUIVALENT.get(module, {})]
            chosen = random.Random(given.seed).sample(every, -(-len(every) // given.every))
            survived = 0
            for one in sorted(chosen):
                (tree / name).write_text(one.source, encoding="utf-8")
                if passes(tree, tests, longest):
                    survived += 1
                    print(f"{name}:{one.line}: {one.before} -> {one.after}", flush=True)
            (tree / name).write_text(source, encoding="utf-8")
            summary.append(f"{module}: {len(chosen)} mutants, {len(chosen) - survived} killed, {survived} survived")
            print(f"== {summary[-1]}, {time.perf_counter() - start:.0f} s", flush=True)
            failed += survived
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
