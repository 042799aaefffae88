"""What warps execute: kernels whose counts are known beforehand, on three generations of GPUs.

Run as a program (the compiler needs a process without the interpreter), this file prints the figures as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from normops import functional, testing
from normops.testing.executed import sampled
from normops.testing.machine import walk

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("a100", "h100", "b200")


@triton.jit
def looped(x_ptr, y_ptr, steps, n, BLOCK: tl.constexpr):
    """The trips of the loop are known when it is launched; each loads after it has used what the one before loaded."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    place = 0
    for _ in range(steps):
        x = tl.load(x_ptr + place + i, mask=i < n, other=0.0)
        total += x
        place += BLOCK + (tl.sum(x, 0) * 0.0).to(tl.int32)
    tl.store(y_ptr + i, total)


@triton.jit
def together(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Four loads that do not depend on one another."""
    i = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + i)
    b = tl.load(x_ptr + BLOCK + i)
    c = tl.load(x_ptr + 2 * BLOCK + i)
    d = tl.load(x_ptr + 3 * BLOCK + i)
    tl.store(y_ptr + i, (a + b) + (c + d))


@triton.jit
def halves(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Programs from n on have nothing to do."""
    p = tl.program_id(0)
    if p < n:
        i = p * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i)
        for _ in range(8):
            x = tl.exp2(x)
        tl.store(y_ptr + i, x)


@triton.jit
def decided(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """What x holds decides."""
    i = tl.arange(0, BLOCK)
    if tl.load(x_ptr) > 0:
        tl.store(y_ptr + i, tl.exp2(tl.load(x_ptr + i)))
    tl.store(y_ptr + BLOCK + i, 1.0)


@triton.jit
def far(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """What x holds decides about a loop of 64 trips."""
    i = tl.arange(0, BLOCK)
    if tl.load(x_ptr) > 0:
        y = tl.load(x_ptr + i)
        for k in range(64):
            y = tl.exp2(y) + tl.load(x_ptr + BLOCK * k + i)
        tl.store(y_ptr + i, y)


@triton.jit(noinline=True)
def apart(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """What x holds decides inside a function that is called."""
    i = tl.arange(0, BLOCK)
    if tl.load(x_ptr) > 0:
        y = tl.load(x_ptr + i)
        for k in range(64):
            y = tl.exp2(y) + tl.load(x_ptr + BLOCK * k + i)
        tl.store(y_ptr + i, y)


@triton.jit
def called(x_ptr, y_ptr, BLOCK: tl.constexpr):
    apart(x_ptr, y_ptr, BLOCK)
    apart(x_ptr + 1, y_ptr + BLOCK, BLOCK)
    tl.store(y_ptr + 2 * BLOCK + tl.arange(0, BLOCK), 1.0)


@triton.jit
def ragged(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Rows of n elements by programs of BLOCK: the last warps have nothing to do."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + i, mask=i < n)
    tl.store(y_ptr + tl.program_id(0) * n + i, x, mask=i < n)


@triton.jit
def tiled(a, b, c, n, M: tl.constexpr, N: tl.constexpr):
    """n tiles of each program by tensor descriptors: bulk copies, where the device has them."""
    row = tl.program_id(0) * M
    for k in range(n):
        x = a.load([row, k * N])
        b.store([row, k * N], x * 2)
        if c is not None:
            c.store([row, k * N // 2], tl.sum(tl.reshape(x, (M, N // 2, 2)), 2))


@triton.jit
def unknown(x_ptr, y_ptr, n_ptr, BLOCK: tl.constexpr):
    """What is in memory decides about the trips of a loop that may not be entered at all, and about its accesses."""
    n = tl.load(n_ptr)
    for k in range(n):
        i = k * n + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def endless(y_ptr, n):
    s = 0.0
    for k in range(0, n):
        s = s * 0.5 + k
    tl.store(y_ptr, s)


@triton.jit
def halved(x_ptr, y_ptr):
    """As often as it takes until 2**k is no more than x; and as often as n = 1000 is halved."""
    n = 1000
    k = 0
    while n > 0:
        n = n // 2
        k += 1
    x = tl.load(x_ptr)
    while x > 1:
        x = x * 0.5
    tl.store(y_ptr, k + x)


@triton.jit
def drawn(x_ptr, y_ptr, ticket_ptr, done_ptr, BLOCK: tl.constexpr):
    """Even tickets load twice as much as odd ones; then all wait for the first one."""
    ticket = tl.atomic_add(ticket_ptr, 1)
    i = ticket * 2 * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if ticket % 2 == 0:
        x += tl.load(x_ptr + i + BLOCK)
    tl.store(y_ptr + i, x)
    if ticket == 0:
        tl.atomic_add(done_ptr, 1, sem="release")
    while tl.atomic_add(done_ptr, 0, sem="acquire") < 1:
        pass


@triton.jit
def transposed(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    """A transposition through shared memory."""
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i * N + j)
    tl.store(y_ptr + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(x))


@triton.jit
def divided(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Rows of 3 n: integer division by what only the launch knows decides how often a program loads."""
    p = tl.program_id(0)
    for k in range((p * 7) // n % 3 + 1):
        i = (p * 3 + k) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i))


def figures(launch: testing.VirtualLaunch) -> dict[str, Any]:
    done = launch.executed
    most = done.at_most["instructions"]
    return {
        **done.counts, "most": most if most < inf else None, "rounds": done.rounds, "loaded": done.loaded,
        "stored": done.stored, "sectors": done.sectors, "unsure": done.unsure, "in_flight": done.in_flight,
        "wavefronts": done.wavefronts, "tickets": done.tickets, "code": done.size, "warps": done.warps,
    }  # fmt: skip


def walk_all(device: str) -> dict[str, Any]:
    x, y = torch.empty(1 << 22), torch.empty(1 << 22)
    words = torch.zeros(2, dtype=torch.int32)
    found: dict[str, Any] = {}

    def note(name: str, kernel: Any, grid: int, *arguments: Any, **constants: Any) -> None:
        gpu.launches.clear()
        kernel[(grid,)](*arguments, **constants)
        found[name] = figures(gpu.launches[0])

    with testing.virtual_device(device) as gpu:
        for steps in (0, 2, 3, 50, 51):
            note(f"looped {steps}", looped, 1, x, y, steps, 500, BLOCK=512, num_warps=4)
        note("together", together, 1, x, y, BLOCK=512, num_warps=4)
        note("decided", decided, 1, x, y, BLOCK=128, num_warps=1)
        note("far", far, 1, x, y, BLOCK=128, num_warps=1)
        note("called", called, 1, x, y, BLOCK=128, num_warps=1)
        for ctas in (1, 2) if device != "a100" else (1,):
            note(f"ragged {ctas}", ragged, 40, x, y, 600, BLOCK=1024, num_warps=8, num_ctas=ctas)
        note("unknown", unknown, 16, x, y, words, BLOCK=1024, num_warps=4)
        wide, tall, half = (torch.empty(256, n, dtype=torch.bfloat16) for n in (512, 512, 256))
        tiles = [TensorDescriptor.from_tensor(wide, [64, 128]), TensorDescriptor.from_tensor(tall, [64, 128])]
        note("tiled", tiled, 4, *tiles, None, 4, M=64, N=128, num_warps=4)
        note("tiles", tiled, 4, *tiles, TensorDescriptor.from_tensor(half, [64, 64]), 4, M=64, N=128, num_warps=4)
        if device == "h100":  # for time, what does not depend on the device
            for n in (0, 1, 50, 100):
                note(f"halves {n}", halves, 100, x, y, n, BLOCK=128, num_warps=1)
            note("halved", halved, 1, x, y)
            note("drawn", drawn, 1000, x, y, words, words[1:], BLOCK=128, num_warps=1)
            note("transposed", transposed, 1, x, y, M=64, N=64, num_warps=4)
            for n in (5, 7):
                note(f"divided {n}", divided, 60, x, y, n, BLOCK=128, num_warps=1)
            for n in (600, 1536, 5000):
                gpu.launches.clear()
                functional.rms_norm(torch.empty(512, n, dtype=torch.bfloat16), (n,))
                found[f"rms_norm {n}"] = figures(gpu.launches[0])
            walk.LIMIT, most = 20_000, walk.LIMIT
            note("endless", endless, 1, y, 50_000, num_warps=1)
            walk.LIMIT = most
        gpu.launches.clear()
        rows = torch.empty(4096, 1024, dtype=torch.bfloat16)
        functional.rms_norm(rows, (1024,))
        found["rms_norm"] = figures(gpu.launches[0])
    with testing.virtual_device("mi300x") as gpu:
        functional.layer_norm(rows, (1024,))
        try:
            _ = gpu.launches[0].executed
        except NotImplementedError as error:
            found["amd"] = str(error)
    return found


@pytest.fixture(scope="module")
def all_found() -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, __file__], env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def h100(all_found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return all_found["h100"]


@pytest.fixture(params=DEVICES)
def found(all_found: dict[str, dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return all_found[request.param]


def test_a_loop_counts_by_its_trips(found: dict[str, Any]) -> None:
    none, two, three, many, more = (found[f"looped {steps}"] for steps in (0, 2, 3, 50, 51))
    assert not many["unsure"] and many["most"] == pytest.approx(many["instructions"])
    each = more["instructions"] - many["instructions"]
    assert each > 10 and three["instructions"] - two["instructions"] == pytest.approx(each, rel=0.35), (
        "the compiler may unroll, or begin a loop with what belongs to its end"
    )
    assert many["loads"] == 50 * more["loads"] / 51 and none["loads"] == 0
    assert many["loaded"] == 50 * 500 * 4, "500 of 512 lanes, fp32; the rest is masked"
    assert none["stored"] == many["stored"] == 512 * 4
    assert many["barriers"] >= 50, "a sum over four warps meets at least once"


def test_rounds_are_loads_that_begin_after_a_wait(found: dict[str, Any]) -> None:
    assert found["looped 50"]["rounds"] == 50 and found["looped 51"]["rounds"] == 51
    assert found["together"]["rounds"] == 1 and found["together"]["loads"] == 4
    assert found["together"]["in_flight"] == 4 * 512 * 4 / 4, "a quarter of all four for each of four warps"
    assert found["looped 50"]["in_flight"] <= 512 * 4 / 4


def test_programs_that_do_less_count_for_what_they_do(h100: dict[str, Any]) -> None:
    none, one, half, whole = (h100[f"halves {n}"] for n in (0, 1, 50, 100))
    assert none["mufu"] == 0 and whole["mufu"] == pytest.approx(8 * 128 / 32), "32 elements an instruction"
    assert half["mufu"] == pytest.approx(whole["mufu"] / 2, rel=0.15), "of a sample of programs"
    assert one["mufu"] == pytest.approx(whole["mufu"] / 100), "the first program is always in the sample"
    assert whole["loaded"] == pytest.approx(100 * 128 * 4) and whole["sectors"] == pytest.approx(200 * 128 * 4 / 32)


def test_what_data_decides_is_bounded(found: dict[str, Any]) -> None:
    one = found["decided"]
    assert 0 < one["loads"] < 2 + 1 and one["stores"] <= 2 and one["most"] >= one["instructions"]
    assert one["unsure"] and all("test_executed.py" in text for text in one["unsure"])
    far = found["far"]
    assert far["instructions"] < 150 and far["most"] > 64 * 4, "the loop is long, and it may be left out"
    assert len(far["unsure"]) == 1 and far["unsure"][0].startswith("data decides a branch in test_executed.py:")


def test_warps_beyond_the_end_of_a_row_load_nothing(found: dict[str, Any], h100: dict[str, Any]) -> None:
    for ctas in (1, 2):
        one = found.get(f"ragged {ctas}", found["ragged 1"])
        assert one["loaded"] == one["stored"] == pytest.approx(40 * 600 * 4), "all of a cluster count"
    for n in (600, 1536, 5000):
        one = h100[f"rms_norm {n}"]
        assert one["loaded"] == pytest.approx(512 * n * 2)
        assert one["sectors"] * 32 == pytest.approx(2 * 512 * n * 2, rel=0.06), "and statistics; lines that rows share"


def test_bulk_copies_count_with_their_tiles(all_found: dict[str, dict[str, Any]]) -> None:
    for device, found in all_found.items():
        one, two = found["tiled"], found["tiles"]
        assert one["loaded"] == two["loaded"] == one["stored"] == 256 * 512 * 2 and two["stored"] == 1.5 * one["stored"]
        if device == "a100":  # which has none
            continue
        assert not one["unsure"] and not two["unsure"], "each copy out is of 64 x 64 elements"
        assert one["sectors"] == (one["loaded"] + one["stored"]) / 32
        assert one["rounds"] == 4 and one["in_flight"] == 64 * 128 * 2 / 4, "a tile at a time, for each of four warps"


def test_data_that_decides_of_everything_takes_no_longer(found: dict[str, Any]) -> None:
    one = found["unknown"]
    assert one["most"] is None and one["instructions"] < 100 and any("a loop in" in text for text in one["unsure"])


def test_a_walk_that_is_cut_off_says_so(h100: dict[str, Any]) -> None:
    assert any("was not walked through" in text for text in h100["endless"]["unsure"])
    assert h100["endless"]["most"] is None


def test_functions_that_are_called_return(found: dict[str, Any]) -> None:
    one = found["called"]
    assert one["stored"] == 128 * 4, "what follows the second call, at least"
    assert one["loads"] == 2 and one["most"] > 2 * 64 * 4, "each call decides by a load of its own"
    assert len(one["unsure"]) >= 1


def test_a_loop_that_data_decides_has_no_bound(h100: dict[str, Any]) -> None:
    one = h100["halved"]
    assert one["most"] is None and any("loop" in text for text in one["unsure"])


def test_tickets_are_drawn_in_order_and_waits_are_unsure(h100: dict[str, Any]) -> None:
    one = h100["drawn"]
    assert one["tickets"] and "tickets" in one["unsure"][0]
    assert one["loaded"] == pytest.approx(1000 * 1.5 * 128 * 4, rel=0.01), "neighbours take turns"
    assert any("loop" in text for text in one["unsure"][1:]) and one["most"] is None
    assert not h100["decided"]["tickets"] and not h100["rms_norm"]["tickets"]


def test_turns_at_the_port_of_memory(h100: dict[str, Any]) -> None:
    assert h100["together"]["wavefronts"] == 5 * 512 / 128, "512 bytes an access of a warp"
    one = h100["transposed"]
    least = one["shared_loads"] + one["shared_stores"] + 2 * 64 * 64 * 4 / 128 / 4
    assert one["wavefronts"] >= least > 32, "one for each access, and one for every 128 bytes of global memory"


def test_integers_are_divided_exactly(h100: dict[str, Any]) -> None:
    for n in (5, 7):
        trips = [p * 7 // n % 3 + 1 for p in range(60)]
        share = h100[f"divided {n}"]["loaded"] / (sum(trips) * 128 * 4)
        assert share == pytest.approx(1, rel=0.25), "of a sample of programs"
        assert not [text for text in h100[f"divided {n}"]["unsure"] if "loop" in text]


def test_a_norm_reads_and_writes_its_rows_once(found: dict[str, Any]) -> None:
    one = found["rms_norm"]
    assert one["loaded"] == 4096 * 1024 * 2 and not one["unsure"]
    assert one["rounds"] <= 2, "the compiler may use a row before it loads the last one"
    assert one["stored"] == pytest.approx(4096 * 1024 * 2, rel=0.01), "and 4 bytes of statistics a row"


def test_amd_is_refused(found: dict[str, Any]) -> None:
    assert "NVIDIA GPUs only" in found["amd"]


@pytest.mark.parametrize(("programs", "most"), [(1, 18), (4, 4), (5, 4), (18, 18), (19, 18), (1000, 18), (10**6, 5)])
def test_a_sample_stands_for_all_programs(programs: int, most: int) -> None:
    found = sampled(programs, most)
    numbers = [program for program, _ in found]
    assert len(set(numbers)) == len(numbers) <= max(most, 4) and {0, programs - 1} <= set(numbers)
    assert all(0 <= n < programs for n in numbers)
    assert sum(share for _, share in found) == pytest.approx(1)


if __name__ == "__main__":
    print(json.dumps({device: walk_all(device) for device in DEVICES}))
