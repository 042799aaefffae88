"""Compile the layouts of the tests with the Triton that is installed, for devices that are not there.

    python -m tests.compile_layouts [--every N] [--workers N]

The interpreter takes what the compiler refuses, and each version of the compiler refuses something else: this program
needs only torch, Triton and pytest, and says what fails.  `make versions` runs it with several versions of Triton.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # read by normops, here and in every worker

import triton

from normops.testing import plans, virtual_device
from tests.test_values import ADDS, BY_NAME, DTYPES, shape_of
from tests.tolerance import ACTIVATIONS, ENGINES, FORMATS, TINY, engine, laid_out

DEVICES = ("a100", "h100", "b200")  # sm_80, sm_90, sm_100
KINDS = (*BY_NAME, "batch eval", "instance eval")
LAYOUTS = (*FORMATS, "expanded", "sliced volume", "odd planes", "odd groups")
GRADIENTS = ("contiguous", "like x", "expanded", "one stride", "sliced")


class Case(NamedTuple):
    """A norm and the layout of its input."""

    kind: str
    layout: str


class Outcome(NamedTuple):
    launches: int
    runs: int
    """The most runs along one coordinate."""
    folded: int
    """Launches whose tiles are columns."""
    spilling: int
    failures: list[str]


CASES = [Case(kind, layout) for kind in KINDS for layout in LAYOUTS]
CPU = torch.device("cpu")


def operand(layout: str, dtype: torch.dtype) -> Tensor:
    """An input in one of the LAYOUTS."""
    if layout == "expanded":
        return torch.randn(2, 1, 3, 5).to(dtype).expand(2, 6, 3, 5)
    if layout == "sliced volume":  # no two of its three spatial axes lie in memory like one
        return torch.randn(2, 6, 4, 6, 7).to(dtype)[..., 1:-1, 1:-1, 1:-1]
    if layout == "odd planes":
        return torch.randn(9, 24, 7, 7).to(dtype)
    if layout == "odd groups":  # ten channels to a group of two
        return torch.randn(3, 20, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    return laid_out(shape_of(layout), layout, dtype, CPU)


def gradient(y: Tensor, layout: str) -> Tensor:
    """A gradient of y in one of the GRADIENTS."""
    return {
        "contiguous": lambda: torch.randn(y.shape).to(y.dtype),
        "like x": lambda: torch.randn_like(y),
        "expanded": lambda: torch.ones((), dtype=y.dtype).expand(y.shape),
        "one stride": lambda: torch.randn(y.shape[-2], 1).to(y.dtype).expand(y.shape),
        "sliced": lambda: laid_out(tuple(y.shape), "sliced", y.dtype, CPU),
    }[layout]()


def compile_call(case: Case, which: str, turn: int) -> None:
    """Forward and backward through one engine.  What else a call has goes round with the turn: dtype, layout of dy,
    additions, activation."""
    norm = BY_NAME[case.kind.split()[0]]
    dtype = DTYPES[turn % 4]
    x = operand(case.layout, dtype)
    w = torch.randn(norm.weight(tuple(x.shape))).to(dtype).requires_grad_()
    b = torch.randn_like(w).requires_grad_() if norm.bias else None
    adds = ADDS[turn // 4 % 4]
    pre = operand(case.layout, dtype).requires_grad_() if adds in ("pre", "both") else None
    post = torch.randn(x.shape).to(dtype).requires_grad_() if adds in ("post", "both") else None
    options = {"pre_add": pre, "post_add": post, "activation": list(ACTIVATIONS)[turn % 9]}
    if norm.running:
        channels = x.shape[1]
        options |= {"rm": torch.zeros(channels), "rv": torch.ones(channels), "train": not case.kind.endswith("eval")}
    x.requires_grad_()
    folds = case.layout.startswith("odd") and which != "resident"
    wider = {name: 8 * size for name, size in TINY.items() if "tile" in name} if folds else {}
    with engine(which, **wider):
        out = norm.call(x, norm.given(w), None if b is None else norm.given(b), **options)
        y, total = out if isinstance(out, tuple) else (out, None)
        outs = [y] if total is None else [y, total]
        grads = [gradient(t, GRADIENTS[(turn + i) % 5]) for i, t in enumerate(outs)]
        torch.autograd.grad(outs, [t for t in (x, w, b, pre, post) if t is not None], grads)


def innermost(error: BaseException) -> str:
    """What was refused: Triton tells it last, after the calls that led there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()}"


def compile_case(case: Case) -> Outcome:
    """All engines, each for another of the devices; the next layout and the next norm change places."""
    place = KINDS.index(case.kind) + LAYOUTS.index(case.layout)
    launches = runs = folded = spilling = 0
    failures = []
    for i, which in enumerate(ENGINES):
        device = DEVICES[(place + i) % len(DEVICES)]
        with virtual_device(device) as gpu, plans() as planned:
            try:
                compile_call(case, which, CASES.index(case) + 7 * i)
            except Exception as error:
                failures.append(f"{which} on {device}: {innermost(error)}")
            launches += len(gpu.launches)
            spilling += sum(k.spills > 0 for k in gpu.launches)
        forms = [one.form for p in planned for one in p.plan.launches]
        runs = max([runs, *(len(sizes) for form in forms for sizes in form.SPACE)])
        folded += sum(form.FOLD[0] > 1 for form in forms)
    return Outcome(launches, runs, folded, spilling, failures)


def program(cases: Sequence[Case], workers: int) -> bool:
    """Whether all compile; tells what is done while it goes on."""
    start = time.perf_counter()
    print(f"Triton {triton.__version__}, torch {torch.__version__}: {len(cases)} norms in layouts", flush=True)
    outcomes = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for i, (case, outcome) in enumerate(zip(cases, pool.map(compile_case, cases), strict=True)):
            verdict = f"{len(outcome.failures)} of {len(ENGINES)} FAILED" if outcome.failures else "ok"
            print(f"{i + 1:3} {case.kind}, {case.layout}: {outcome.launches} launches, {verdict}", flush=True)
            for failure in outcome.failures:
                print("    " + failure.replace("\n", "\n    "), flush=True)
            outcomes.append(outcome)
    failed = sum(len(o.failures) for o in outcomes)
    print(
        f"Triton {triton.__version__}: {sum(o.launches for o in outcomes)} launches, "
        f"{sum(o.folded for o in outcomes)} folded, {max(o.runs for o in outcomes)} runs along one coordinate, "
        f"{sum(o.spilling for o in outcomes)} spill, {failed} failed, {time.perf_counter() - start:.0f} s"
    )
    return not failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th norm and layout")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    given = parser.parse_args()
    sys.exit(0 if program(CASES[:: given.every], given.workers) else 1)
