"""What a kernel compiles to on a device that is not there: figures of kernels written for the purpose.

Run as a program (the compiler needs a process without the interpreter), this file prints the figures as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.runtime import driver

from normops import calls, functional, gpus
from normops.kernels.norm import elements
from normops.testing import HARDWARE, VirtualLaunch, virtual_device

ROOT = Path(__file__).resolve().parents[1]


@triton.jit
def mixed(wide_ptr, absent_ptr, narrow_ptr, sum_ptr, pair, n, one, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(wide_ptr + i)
    narrow = tl.load(narrow_ptr + i * n + one).to(tl.float32)
    tl.store(pair[0] + i, wide + narrow)
    tl.store(pair[1] + 2 * i, wide)
    tl.atomic_add(sum_ptr, tl.sum(wide, 0))


@triton.jit
def either(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    source = x_ptr if tl.program_id(0) < n else y_ptr
    tl.store(out_ptr + i, tl.load(source + i))


@triton.jit
def held(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Every element lives across the sum."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x / tl.sum(x, 0))


class Operand(NamedTuple):
    ptr: Any
    step: Any = 1


class Operands(NamedTuple):
    wide: Any
    absent: Any
    narrow: Any
    out: Any
    n: Any


@triton.jit
def bundled(o, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for k in range(o.n):
        wide = tl.load(o.wide + k * BLOCK + i)
        narrow = tl.load(o.narrow.ptr + i * o.narrow.step).to(tl.float32)
        tl.store(o.out[0].ptr + n + k * BLOCK + i, wide + narrow)
        tl.store(o.out[1].ptr + k * BLOCK + i, wide)


@triton.jit
def value_of(x):
    return tl.load(x.ptr)


@triton.jit
def first_of(x):
    return value_of(x)


@triton.jit
def paired(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y.ptr + i * y.step, tl.load(x.ptr + i * x.step) + first_of(x))


@triton.autotune([triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 256})], key=[])
@triton.jit
def tuned(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


def figures(launched: VirtualLaunch) -> dict[str, Any]:
    def accesses(argument: str | None) -> Any:
        try:
            return {f"{kind} {bits}": n for (kind, bits), n in launched.accesses(argument).items()}
        except NotImplementedError as error:
            return str(error)

    names = ("registers", "stack", "spills", "shared", "barriers", "atomics", "resident", "waves", "name", "grid")
    return {name: getattr(launched, name) for name in names} | {
        "arguments": {k: type(v).__name__ for k, v in launched.arguments.items()},
        "accesses": {str(name): accesses(name) for name in (None, *launched.arguments)},
        "parameters": [parameter.argument for parameter in launched.binary.parameters],
        "asm": sorted(launched.asm), "target": launched.binary.target.arch, "warps": launched.num_warps,
    }  # fmt: skip


def error(call: Any) -> str:
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def compile_all() -> dict[str, Any]:
    found: dict[str, Any] = {}
    f = [torch.empty(1 << 15) for _ in range(4)]
    half, total = torch.empty(1 << 15, dtype=torch.bfloat16), torch.empty(1)

    def launch_mixed(grid: Any, **options: Any) -> Any:
        return mixed[grid](f[0], None, half, total, (f[1], f[2]), 3, 1, BLOCK=1024, **options)

    found["hooks"] = [len(triton.knobs.runtime.kernel_load_start_hook.calls)]
    with virtual_device("h200") as gpu:
        kernel = launch_mixed((264, 2))
        launch_mixed(lambda meta: (4 * meta["BLOCK"],), num_warps=8)
        either[(1,)](*f[:3], 5, BLOCK=1024)
        held[(1,)](f[0], f[1], BLOCK=4096, num_warps=1)
        held[(1,)](f[0], f[1], BLOCK=4096, num_warps=1, maxnreg=64)
        either[(4,)](*f[:3], 5, BLOCK=1024, num_ctas=2)
        held[(0,)](f[0], f[1], BLOCK=4096)
        single = tuned.fn[(3,)](f[0], BLOCK=128)
        arguments = (f[0], None, half, total, (f[1], f[2]), 3, 1, 1024)
        kernel.run(7, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
        found["h200"] = [figures(launched) for launched in gpu.launches]
        first, last = gpu.launches[0], gpu.launches[-1]
        found["shared binary"] = first.binary is last.binary
        found["tensor"] = first.arguments["wide_ptr"] is f[0] and first.arguments["one"] == 1
        found["errors"] = {
            "autotuned": error(lambda: tuned[(1,)](f[0])),
            "grid": error(lambda: held[(1, 65536)](f[0], f[1], BLOCK=4096)),
            "argument": error(lambda: first.accesses("nothing")),
        }
        o = Operands(f[0], None, Operand(half, 3), (Operand(f[1]), Operand(f[2])), 5)
        bundled[(1,)](o, 16, BLOCK=1024)
        kernel = bundled[(1,)](o, 16, BLOCK=1024)
        plain = ((f[0], None, (half, 3), ((f[1], 1), (f[2], 1)), 5), 16, 1024)
        kernel.run(1, 1, 1, 0, kernel.function, kernel.packed_metadata, None, None, None, *plain)
        paired[(1,)](Operand(f[0]), Operand(half, 2), BLOCK=1024)
        found["bundled"] = [figures(launched) for launched in gpu.launches[-4:]]
        found["trips"] = [launched.executed["loads"] for launched in gpu.launches[-4:]]
        last = gpu.launches[-1]
        found["without"] = [[*last.accesses(name, first_of).items()] for name in ("x.ptr", None)]
        found["field"] = gpu.launches[-2].arguments["wide"] is f[0] and gpu.launches[-1].arguments["x.ptr"] is f[0]
        before = len(gpu.launches)
        with virtual_device("mi300x") as other:
            launch_mixed((2,))
            found["mi300x"] = [figures(launched) for launched in other.launches]
        held[(1,)](f[0], f[1], BLOCK=4096)
        functional.layer_norm(torch.empty(64, 4096, dtype=torch.bfloat16), (4096,))
        found["tile"] = [*gpu.launches[-1].accesses("x", elements)]
        found["after"] = [launched.name for launched in gpu.launches[before:]]
        found["normops"] = figures(gpu.launches[-1])
    found["errors"]["closed"] = error(lambda: single.run(
        1, 1, 1, 0, single.function, single.packed_metadata, None, None, None, f[0], 128
    ))  # fmt: skip
    found["errors"]["unknown"] = error(lambda: virtual_device("h20").__enter__())

    class Driver:
        """Stands for the driver of a GPU."""

    mine = Driver()
    driver.set_active(mine)
    found["raised"] = error(lambda: raise_inside("b200"))
    found["restored"] = driver.active is mine
    found["hooks"].append(len(triton.knobs.runtime.kernel_load_start_hook.calls))
    found["cpu again"] = not calls.uses_kernels(f[0])
    with virtual_device("h200") as again:
        launch_mixed((1,))
        found["known"] = again.launches[0].binary is first.binary
    return found


def raise_inside(name: str) -> None:
    with virtual_device(name):
        raise KeyError(name)


if __name__ == "__main__":
    json.dump(compile_all(), sys.stdout)
    sys.exit()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_virtual"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_launches_are_recorded_as_they_were_made(found: dict[str, Any]) -> None:
    made = [(row["name"], tuple(row["grid"]), row["warps"]) for row in found["h200"]]
    assert made == [
        ("mixed", (264, 2, 1), 4), ("mixed", (4096, 1, 1), 8), ("either", (1, 1, 1), 4), ("held", (1, 1, 1), 1),
        ("held", (1, 1, 1), 1), ("either", (4, 1, 1), 4), ("tuned", (3, 1, 1), 4), ("mixed", (7, 1, 1), 4),
    ]  # fmt: skip
    given = {"wide_ptr": "Tensor", "narrow_ptr": "Tensor", "sum_ptr": "Tensor", "pair": "tuple", "n": "int"}
    assert found["h200"][0]["arguments"] == {**given, "one": "int"}
    assert found["tensor"] and found["shared binary"]


def test_figures_of_the_machine_code(found: dict[str, Any]) -> None:
    for row in found["h200"]:
        assert 0 < row["registers"] <= 255 and row["target"] == 90
        assert {"ttir", "ttgir", "llir", "ptx", "cubin"} <= set(row["asm"])
    first, *_ = found["h200"]
    assert first["spills"] == first["stack"] == 0
    assert first["shared"] > 0 and first["barriers"] > 0, "a sum over four warps"
    assert first["atomics"] == 1


def test_what_does_not_fit_into_registers_is_told(found: dict[str, Any]) -> None:
    free, forced = found["h200"][3:5]
    assert free["spills"] == 0 and free["registers"] > 128
    assert forced["spills"] > 0 and forced["registers"] <= 64


def test_accesses_are_told_apart_by_argument(found: dict[str, Any]) -> None:
    accesses = found["h200"][0]["accesses"]
    assert accesses["wide_ptr"] == {"load 128": 2}
    assert accesses["narrow_ptr"] == {"load 16": 8}
    assert accesses["pair"] == {"store 128": 2, "store 32": 8}
    assert accesses["n"] == accesses["one"] == {}
    assert accesses["None"] == {"load 128": 2, "load 16": 8, "store 128": 2, "store 32": 8}


def test_an_address_from_either_of_two_arguments_counts_for_both(found: dict[str, Any]) -> None:
    accesses = found["h200"][2]["accesses"]
    assert accesses["x_ptr"] == accesses["y_ptr"] == {"load 128": 2}
    assert accesses["out_ptr"] == {"store 128": 2}


def test_fields_of_named_tuples_are_arguments_of_their_own(found: dict[str, Any]) -> None:
    """By their own names, but where two have the same; whether a tuple or a named one is launched with."""
    first, _, plain, pair = found["bundled"]
    assert first["parameters"] == plain["parameters"] == ["wide", "ptr", "step", "out", "out", "o.n", "n"]
    given = {"wide": "Tensor", "ptr": "Tensor", "step": "int", "out": "tuple", "o.n": "int", "n": "int"}
    assert first["arguments"] == plain["arguments"] == given
    for row in (first, plain):
        assert row["accesses"]["wide"] == {"load 128": 2} and row["accesses"]["ptr"] == {"load 16": 8}
        assert row["accesses"]["out"] == {"store 128": 4} and row["accesses"]["n"] == {}
    assert pair["parameters"] == ["x.ptr", "y.ptr", "y.step"], "the step of x is 1, and compiled in"
    assert pair["accesses"]["x.ptr"] == {"load 128": 2, "load 32": 1} and pair["accesses"]["y.ptr"] == {"store 16": 8}
    assert found["field"] and found["trips"] == [5 * 10, 5 * 10, 5 * 10, 3], "an integer inside decides about a loop"


def test_accesses_of_a_function_can_be_left_out(found: dict[str, Any]) -> None:
    assert found["without"] == [[[["load", 128], 2]], [[["load", 128], 2], [["store", 16], 8]]]


def test_waves(found: dict[str, Any]) -> None:
    first, clustered = found["h200"][0], found["h200"][5]
    assert first["waves"] == 264 * 2 / (first["resident"] * 132)
    assert clustered["waves"] == 4 * 2 / (clustered["resident"] * 132), "two programs of a cluster run a tile"


def test_two_devices_in_one_process(found: dict[str, Any]) -> None:
    (row,) = found["mi300x"]
    assert row["target"] == "gfx942" and {"amdgcn", "hsaco"} <= set(row["asm"])
    assert 0 < row["registers"] <= 512 and row["spills"] == 0
    assert row["atomics"] == 1 and row["barriers"] > 0
    assert row["accesses"]["None"]["load 128"] > 0 and row["accesses"]["None"]["load 16"] > 0
    assert "NVIDIA only" in row["accesses"]["wide_ptr"]
    assert found["after"] == ["held", "normalize"], "the outer device goes on when the inner one is left"


def test_kernels_of_normops(found: dict[str, Any]) -> None:
    row = found["normops"]
    assert row["spills"] == 0 and row["accesses"]["y"] == {"store 128": row["accesses"]["y"]["store 128"]}
    assert row["accesses"]["x"].keys() == {"load 128", "load 16"} and found["tile"] == [["load", 128]], (
        "the first element of each row is read beside it"
    )


def test_everything_is_put_back(found: dict[str, Any]) -> None:
    assert found["raised"] == "KeyError: 'b200'"
    assert found["restored"] and found["cpu again"]
    assert found["hooks"] == [found["hooks"][0]] * 2
    assert found["known"], "a second block compiles to the same code, and reads it no second time"


def test_errors(found: dict[str, Any]) -> None:
    errors = found["errors"]
    assert errors["autotuned"].startswith("RuntimeError: autotuning times kernels")
    assert errors["grid"].startswith("RuntimeError: a grid must be at most (2147483647, 65535, 65535) on h200, got")
    assert errors["argument"].startswith("ValueError: argument must be one that mixed is passed (wide_ptr, ")
    assert errors["closed"].startswith("RuntimeError: a kernel compiled for a virtual h200 was launched after")
    assert errors["unknown"].startswith("ValueError: device must be one of a100, h100, h200, ")


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), virtual_device("h200"):
        pass


@pytest.mark.parametrize(
    ("name", "registers", "shared", "threads", "programs"),
    [
        ("h200", 32, 0, 128, 16),  # 2048 threads
        ("h200", 33, 0, 128, 12),  # 40 registers × 32 lanes: 12 warps in each quarter's 16384
        ("h200", 255, 0, 256, 1),  # 8 warps of 8192 registers fill the SM
        ("h200", 255, 0, 512, 0),
        ("h200", 16, 0, 32, 32),  # the most programs of an SM
        ("h200", 32, 50 << 10, 128, 4),  # 51 KiB each of 228
        ("h200", 32, 227 << 10, 128, 1),
        ("h200", 32, (227 << 10) + 1, 128, 0),
        ("a100", 32, 50 << 10, 128, 3),
        ("rtx4090", 32, 0, 128, 12),  # 1536 threads
        ("mi300x", 128, 0, 256, 4),  # 512 registers of a lane of each SIMD: 4 wavefronts
        ("mi300x", 64, 33 << 10, 256, 1),
    ],
)
def test_resident(name: str, registers: int, shared: int, threads: int, programs: int) -> None:
    assert HARDWARE[name].resident(registers, shared, threads) == programs


def test_hardware() -> None:
    assert list(HARDWARE) == ["a100", "h100", "h200", "b200", "rtx4090", "mi300x"] == list(gpus.KNOWN)
    for name, hardware in HARDWARE.items():
        assert hardware.name == hardware.facts.name == name and hardware.facts is gpus.KNOWN[name]
        assert hardware.bandwidth_source.startswith(("measured: ", "assumed: "))
        assert hardware.copy_start_source.startswith("measured: " if name == "h100" else "assumed: ")
        assert hardware.copy_us(0) == 1e6 * hardware.copy_start and 1e9 < hardware.clock < 3e9
        assert 0 < hardware.l2_window < hardware.l2_bytes
    assert HARDWARE["h200"].copy_bandwidth == 4.3e12 and HARDWARE["h200"].l2_window == 20 << 20
