"""Correctness on a GPU beyond single values: the test suite, the same bits every time, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from . import providers
from .device import healthy
from .peers import PROVIDERS
from .shell import Shell
from .timing import Job, Row, check, own
from .verify import schedule_of, shape_of, verify_one
from .workers import at_work

WAITING = frozenset({"ticketed"})
"""Engines whose programs wait for others of their launch."""
REPEATS, REPEATS_WAITING = 50, 1000
"""Runs that must give the same bits; programs that wait can race, and rare orders show only in many."""
SAMPLE = ("resnet 64x56 b32", "unet 320x64", "llama 2048")
"""Cases that compute-sanitizer watches, at shrunken shapes."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN: what a kernel forgets to write, or reads before it is written, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def examine(task: tuple[str, Job]) -> list[Row]:
    """One task of the stage `verify`: "values" of normops against float64, or all "providers" in turn.

    The second also fills the caches of compilers, for the timing to come.
    """
    kind, job = task
    case, shape = job.case, shape_of(job.case)
    row = job.key | {"real_shape": case.shape, "shape": shape}
    if kind == "values":
        with poisoned():
            found = verify_one(case, case.formats[job.format], providers.DTYPES[job.dtype], job.seed)
        return [row | {"provider": "normops"} | {k: v for k, v in found.items() if k != "errors"}]
    rows, lost = [], dict(job.lost)
    for provider in PROVIDERS[1:]:
        mine = row | {"provider": provider.name}
        if provider.reason(case, job.format, providers.DTYPES[job.dtype]):
            continue
        if provider.name in lost:
            rows.append(mine | {"ok": False, "error": lost[provider.name]})
            continue
        with at_work(provider.name):
            try:
                rows.append(mine | check(job, provider, provider.build(case), shape) | {"ok": True})
            except Exception as error:  # said here and again where it would be timed
                rows.append(mine | {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]})
            healthy()
    return rows


def bits(job: Job, inputs: providers.Inputs) -> dict[str, torch.Tensor]:
    found = providers.results(providers.by_normops(job.case, inputs), inputs)
    return {name: t.detach().clone() for name, t in found.items()}


def engines(job: Job, inputs: providers.Inputs) -> set[str]:
    """The engines of a call, forward and backward."""
    from normops import testing

    with testing.plans() as found:
        providers.results(providers.by_normops(job.case, own(inputs)), inputs)
    return {planned.plan.engine for planned in found}


def repeat(job: Job, repeats: int = 0) -> Row:
    """The same call again and again in poisoned memory: every result must have the bits of the first."""
    inputs = job.inputs(shape_of(job.case), job.seed)
    differ: set[str] = set()
    with poisoned(), schedule_of(job.case):
        repeats = repeats or (REPEATS_WAITING if engines(job, inputs) & WAITING else REPEATS)
        first = bits(job, own(inputs))
        for _ in range(repeats - 1):
            again = bits(job, own(inputs))
            differ |= {name for name, t in again.items() if not torch.equal(t, first[name])}
    unwritten = {name for name, t in first.items() if t.isnan().any().item()}
    return job.key | {
        "repeats": repeats, "differ": sorted(differ), "nan": sorted(unwritten), "ok": not differ and not unwritten,
    }  # fmt: skip


def suite(shell: Shell, seconds: float) -> Row:
    """The test suite in a process of its own."""
    if importlib.util.find_spec("pytest") is None:
        return {"status": "skipped", "reason": "pytest is not installed"}
    if importlib.util.find_spec("hypothesis") is None:
        return {"status": "skipped", "reason": "hypothesis is not installed"}
    many = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *many]
    ran = shell.run(command, seconds)
    status = {None: "not finished", 0: "passed"}.get(ran.code, "failed")
    return {"status": status, "seconds": ran.seconds, "limit": seconds, "tail": ran.tail}


def sanitize(shell: Shell, seconds: float) -> list[Row]:
    """memcheck and racecheck of the sample."""
    tools = ("memcheck", "racecheck")
    program = shell.which("compute-sanitizer")
    if program is None:
        return [{"tool": tool, "status": "skipped", "reason": "compute-sanitizer is not on the PATH"} for tool in tools]
    rows = []
    for tool in tools:
        command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "bench.checks", *SAMPLE]
        # Without the caching allocator, so that each tensor has bounds of its own.
        ran = shell.run(command, seconds / len(tools), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        status = {None: "not finished", 0: "passed"}.get(ran.code, "failed")
        rows.append({"tool": tool, "sample": SAMPLE, "status": status, "seconds": ran.seconds, "tail": ran.tail})
    return rows


def main(names: list[str]) -> None:
    """Run cases at their shrunken shapes, forward and backward: what compute-sanitizer watches."""
    from .cases import CASES

    for case in CASES:
        for memory_format in case.formats.values() if case.name in names else ():
            inputs: Any = providers.make_inputs(case, case.small, memory_format, torch.bfloat16)
            providers.results(partial(providers.by_normops, case)(inputs), inputs)
            print(case.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
