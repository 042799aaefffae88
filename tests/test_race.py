"""Programs of one grid at the same time: what a race runs, and what it finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

from normops.compiled import INTERPRETED
from normops.testing import race

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="races in the interpreter: TRITON_INTERPRET=1")


def children(pid: int) -> set[int]:
    return {int(n) for file in Path(f"/proc/{pid}/task").glob("*/children") for n in file.read_text().split()}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children(os.getpid())
    yield
    assert children(os.getpid()) <= before


@triton.jit
def places(count_ptr, seen_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny, nz = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    p = x + nx * (y + ny * z)
    tl.atomic_add(count_ptr + p, 1)
    tl.store(seen_ptr + p, ((x * 10 + y) * 10 + z) * 1000 + (nx * 10 + ny) * 10 + nz)


@pytest.mark.parametrize(
    ("grid", "dims"), [(7, (7, 1, 1)), ((7,), (7, 1, 1)), ((5, 3), (5, 3, 1)), ((2, 3, 4), (2, 3, 4))], ids=str
)
@pytest.mark.parametrize("order", ["shuffled", "launch"])
def test_every_program_runs_once(grid: Any, dims: tuple[int, int, int], order: str) -> None:
    nx, ny, nz = dims
    n = nx * ny * nz
    count, seen = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    done = race(places, grid, (count, seen), {"num_warps": 4}, processes=3, repeats=5, order=order)
    assert count.tolist() == [5] * n
    expected = [
        ((x * 10 + y) * 10 + z) * 1000 + (nx * 10 + ny) * 10 + nz
        for z in range(nz) for y in range(ny) for x in range(nx)
    ]  # fmt: skip
    assert seen.tolist() == expected
    assert (done.launches, done.programs, sum(done.share)) == (5, n, 5 * n)
    assert len(done.share) == 3 and min(done.share) > 0 and 2 <= done.together <= 3


@triton.jit
def arrivals(at_ptr, counter_ptr):
    place = tl.program_id(0) + 10 * tl.program_id(1) + 100 * tl.program_id(2)
    tl.store(at_ptr + tl.atomic_add(counter_ptr, 1), place)


def test_in_launch_order_the_first_axis_is_fastest() -> None:
    at = torch.empty(12, dtype=torch.int32)
    race(arrivals, (2, 3, 2), (at, torch.zeros(1, dtype=torch.int32)), processes=1, order="launch")
    assert at.tolist() == [0, 1, 10, 11, 20, 21, 100, 101, 110, 111, 120, 121]


def test_the_order_is_shuffled_by_the_seed_and_by_the_launch() -> None:
    def orders(**kw: Any) -> list[list[int]]:
        at, counter, found = torch.empty(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), []

        def note(_: int) -> None:
            found.append(at.tolist())
            counter.zero_()

        race(arrivals, 16, (at, counter), processes=1, repeats=2, between=note, **kw)
        note(2)
        return found

    assert orders(order="launch") == [list(range(16))] * 2
    first, second = orders(seed=1)
    assert sorted(first) == list(range(16)) and len({tuple(o) for o in (range(16), first, second)}) == 3
    assert orders(seed=1) == [first, second] != orders(seed=2)


@triton.jit
def reads(x_ptr, n: tl.constexpr):
    for i in range(n):
        tl.load(x_ptr + i)


def test_jitter_makes_programs_pause() -> None:
    def seconds(jitter: float) -> float:
        start = time.perf_counter()
        race(reads, 1, (torch.zeros(400), 400), processes=1, jitter=jitter)
        return time.perf_counter() - start

    assert seconds(1.0) > min(seconds(0.0) for _ in range(3)) + 0.05  # 400 pauses of 3 ms in the mean


@triton.jit
def total(x_ptr, out_ptr, sum_ptr, counter_ptr, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr, RESET: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.sum(tl.load(x_ptr + i, mask=i < n, other=0), 0)
    if ATOMIC:
        tl.atomic_add(sum_ptr, s, sem="relaxed")
    else:
        tl.store(sum_ptr, tl.load(sum_ptr) + s)
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(out_ptr, tl.atomic_xchg(sum_ptr, 0))
        if RESET:
            tl.atomic_xchg(counter_ptr, 0, sem="relaxed")


def totals(repeats: int, **kw: Any) -> list[int]:
    """The sum of 0 … 999 as each launch found it; -1 where nobody wrote it."""
    x, (out, acc, counter) = torch.arange(1000), torch.tensor([[-1], [0], [0]]).unbind()
    found = []

    def note(_: int) -> None:
        found.append(int(out))
        out.fill_(-1)

    race(total, 32, (x, out, acc, counter, 1000), {"BLOCK": 32, **kw}, repeats=repeats, between=note)
    note(repeats)
    return found


def test_atomic_sums_are_exact() -> None:
    assert totals(60, ATOMIC=True, RESET=True) == [499500] * 60


def test_increments_without_atomics_are_lost() -> None:
    found = totals(10, ATOMIC=False, RESET=True)
    assert len(found) == 10 and any(s < 499500 for s in found)


def test_a_counter_that_is_left_behind_spoils_the_next_launch() -> None:
    assert totals(3, ATOMIC=True, RESET=False) == [499500, -1, -1]


@triton.jit
def centre(
    x_ptr, y_ptr, mean_ptr, part_ptr, ticket_ptr, end_ptr, arrived_ptr, ready_ptr, rows, n, tiles, BLOCK: tl.constexpr,
    TILES: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    """y = x - mean(x, 1): the first half of the tickets sums tiles of rows, the second half waits for means."""
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    if FAULT == "program id":
        ticket = tl.program_id(0)
    half = rows * tiles
    if FAULT == "later":
        ticket = 2 * half - 1 - ticket
    tile = ticket % half
    row = tile // tiles
    i = (tile % tiles) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, mask=i < n, other=0.0)
    if ticket < half:
        tl.store(part_ptr + tile, tl.sum(x, 0))
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == tiles - 1:
            if FAULT == "early":
                tl.atomic_xchg(ready_ptr + row, tiles, sem="release")
            t = tl.arange(0, TILES)
            parts = tl.load(part_ptr + row * tiles + t, mask=t < tiles, other=0.0)
            tl.store(mean_ptr + row, tl.sum(parts, 0) / n)
            tl.store(arrived_ptr + row, 0)
            if FAULT != "early":
                tl.atomic_xchg(ready_ptr + row, tiles, sem="release")
    else:
        while tl.atomic_add(ready_ptr + row, 0, sem="acquire") == 0:
            pass
        mean = tl.load(mean_ptr + row)
        tl.store(y_ptr + row * n + i, x - mean, mask=i < n)
    if tl.atomic_add(end_ptr, 1, sem="acq_rel") == 2 * half - 1:
        tl.store(end_ptr, 0)
        if FAULT != "dirty":
            tl.store(ticket_ptr, 0)
        for r in range(rows):
            tl.store(ready_ptr + r, 0)


def centred(rows: int, n: int, repeats: int, fault: str = "", **kw: Any) -> None:
    """Race the kernel above; after each launch its result must be right and its counters zero."""
    block = 16
    tiles = triton.cdiv(n, block)
    x = torch.randn(rows, n) + 100 * torch.randn(rows, 1)
    y, mean, part = (torch.full(size, torch.nan) for size in ((rows, n), (rows,), (rows * tiles,)))
    workspace = torch.zeros(2 + 2 * rows, dtype=torch.int32)
    counters = workspace.split([1, 1, rows, rows])

    def check(launch: int) -> None:
        torch.testing.assert_close(y, x - x.mean(1, keepdim=True), rtol=0, atol=1e-3, msg=f"wrong in launch {launch}")
        assert not workspace.any(), f"dirty after launch {launch}: {workspace.tolist()}"
        for t in (y, mean, part):
            t.fill_(torch.nan)

    args = (x, y, mean, part, *counters, rows, n, tiles)
    kwargs = {"BLOCK": block, "TILES": triton.next_power_of_2(tiles), "FAULT": fault}
    race(centre, 2 * rows * tiles, args, kwargs, repeats=repeats, between=check, **kw)
    check(repeats)


@pytest.mark.parametrize(
    ("rows", "n", "repeats", "processes"),
    [(1, 1, 20, 2), (1, 50, 30, 3), (3, 17, 30, 4), (5, 37, 20, 4), (2, 130, 10, 5)],
)
def test_tickets(rows: int, n: int, repeats: int, processes: int) -> None:
    centred(rows, n, repeats, processes=processes)


def test_waiting_for_a_later_ticket_is_found() -> None:
    with pytest.raises(TimeoutError) as found:
        centred(3, 40, 3, "later", timeout=1.0)
    message = str(found.value)
    assert "centre: no program ended for 1 s in launch 0; 0 of 18 had ended" in message
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "while tl.atomic_add" in text)
    running, begun = message.split("running: ")[1].split("; not begun: ")
    assert running.count("at line") == 4 and f"at line {line}" in running
    names = [int(part.split(" ")[0]) for part in running.split(", ")]
    assert len(names) == 4 and begun.endswith("(14 in all)") and not {*names} & {int(n) for n in begun.split(", ")[:12]}


def test_relying_on_launch_order_is_found() -> None:
    centred(3, 40, 5, "program id", order="launch")
    with pytest.raises(TimeoutError, match=r"running: .* at line"):
        centred(3, 40, 5, "program id", timeout=1.0)


def test_reading_before_publication_is_found() -> None:
    with pytest.raises(AssertionError, match="wrong in launch"):
        centred(1, 60, 50, "early", jitter=0.5)


def test_a_dirty_workspace_is_found() -> None:
    with pytest.raises(AssertionError, match=r"dirty after launch 1: \[18, 0"):
        centred(3, 40, 5, "dirty")


class Parts(NamedTuple):
    x: Any
    out: Any
    absent: Any = None


@triton.jit
def double(parts, n, scale: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stride, y_ptr = parts.out
    x = tl.load(parts.x + i * stride, mask=i < n, other=0.0).to(scale[0][1])
    if parts.absent is not None:
        x += tl.load(parts.absent + i)
    tl.store(y_ptr + i, (x * scale[0][0]).to(y_ptr.dtype.element_ty), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_and_strides(dtype: torch.dtype) -> None:
    """Tensors in tuples, with names and without.

    x is a column, y a piece of the same storage; nothing else changes, and x needs a gradient.
    """
    whole = torch.arange(64, dtype=dtype)
    before = whole.clone()
    x, y = whole[:32].view(8, 4)[:, 1].requires_grad_(), whole[40:48]
    address = whole.data_ptr()
    race(double, 4, (Parts(x, (x.stride(0), y)), 8), {"scale": ((2.0, tl.float32), "other"), "BLOCK": 2})
    assert torch.equal(y, 2 * before[1:32:4]) and whole.data_ptr() == address
    before[40:48] = y
    assert torch.equal(whole, before)


@triton.jit
def fails(x_ptr, MODE: tl.constexpr):
    tl.store(x_ptr + tl.program_id(0) * 3 + tl.program_id(1), 1.0)
    if tl.program_id(0) + tl.program_id(1) == 3:
        if MODE == "raise":
            raise KeyError("what was asked for")
        os._exit(7)
    while tl.atomic_add(x_ptr, 0.0) < 2:
        pass


def test_an_exception_in_a_program_is_raised_with_its_traceback() -> None:
    x = torch.zeros(9)
    with pytest.raises(RuntimeError) as found:
        race(fails, (2, 3), (x,), {"MODE": "raise"}, processes=6)
    assert str(found.value).startswith("fails: program (1, 2) of launch 0 raised\nTraceback")
    assert 'raise KeyError("what was asked for")' in str(found.value)
    assert x[5] == 1  # what was written until then is there


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"fails: program \(1, 2\) of launch 0 ended its process, exit code 7"):
        race(fails, (2, 3), (torch.zeros(9),), {"MODE": "exit"}, processes=6)


def test_wrong_arguments_of_the_kernel_are_reported() -> None:
    with pytest.raises(RuntimeError, match="missing 1 required positional argument: 'MODE'"):
        race(fails, 1, (torch.zeros(9),))


def test_what_between_raises_ends_the_race() -> None:
    def between(launch: int) -> None:
        raise LookupError(launch)

    with pytest.raises(LookupError, match="1"):
        race(arrivals, 2, (torch.zeros(9, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)), repeats=2,
             between=between)  # fmt: skip


def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(
        "import torch, triton, triton.language as tl\nfrom normops.testing import race\n"
        "@triton.jit\ndef stuck(p):\n    while tl.atomic_add(p, 0) == 0:\n        pass\n"
        "print('here', flush=True)\nrace(stuck, 1, (torch.zeros(1, dtype=torch.int32),), processes=2)\n"
    )
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[1]))))
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    with subprocess.Popen([sys.executable, "stuck.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE) as caller:
        assert caller.stdout and caller.stdout.readline() == b"here\n"
        deadline = time.monotonic() + 10
        while len(started := children(caller.pid)) < 2:
            assert time.monotonic() < deadline, "did not start"
            time.sleep(0.05)
        time.sleep(0.5)
        caller.send_signal(signal.SIGKILL)

    def alive(pid: int) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in started):
        assert time.monotonic() < deadline, "outlived their parent"
        time.sleep(0.05)


def overlapping() -> tuple[Tensor, Tensor]:
    memory = torch.zeros(8).numpy()
    return torch.from_numpy(memory), torch.from_numpy(memory[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 0}, "processes must be at least 1; got 0"),
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
        ({"order": "random"}, "order must be one of shuffled, launch; got 'random'"),
        ({"jitter": 1.5}, r"jitter must be a probability, from 0 to 1; got 1\.5"),
        ({"timeout": 0}, "timeout must be more than 0 seconds; got 0"),
        ({"grid": (1, 2, 3, 4)}, r"grid must be one to three positive integers; got \(1, 2, 3, 4\)"),
        ({"grid": 0}, "grid must be one to three positive integers; got 0"),
        ({"kernel": len}, "kernel must be a @triton.jit function, without decorators around it; got <built-in"),
        ({"args": (torch.empty(1, device="meta"), 1)}, "at_ptr must be on the CPU, where the processes run; got meta"),
        ({"args": overlapping()}, "at_ptr and counter_ptr overlap and must then be views of one storage; got two"),
    ],
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    given = {"kernel": arrivals, "grid": 1, "args": (torch.zeros(1), torch.zeros(1)), **change}
    with pytest.raises(ValueError, match=message):
        race(**given)


def test_race_needs_the_interpreter() -> None:
    code = "import normops.testing as t\nt.race(None, 1, ())"
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode and "RuntimeError" in done.stderr and "TRITON_INTERPRET=1" in done.stderr


def test_race_needs_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(RuntimeError, match="fork, which this platform lacks"):
        race(arrivals, 1, ())
