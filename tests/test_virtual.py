"""What a kernel compiles to on a device that is not there: figures of kernels written for the purpose.

Run as a program (the compiler needs a process without the interpreter), this file prints the figures as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.runtime import driver

from normops import functional, launch, schedule
from normops.testing import HARDWARE, VirtualLaunch, amdgcn, ptx, virtual_device

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
        before = len(gpu.launches)
        with virtual_device("mi300x") as other:
            launch_mixed((2,))
            found["mi300x"] = [figures(launched) for launched in other.launches]
        held[(1,)](f[0], f[1], BLOCK=4096)
        functional.layer_norm(torch.empty(64, 4096, dtype=torch.bfloat16), (4096,))
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
    found["cpu again"] = not launch.uses_kernels(f[0])
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
    assert row["spills"] == 0 and row["accesses"]["x_ptr"] == {"load 128": row["accesses"]["x_ptr"]["load 128"]}


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
    monkeypatch.setattr(launch, "INTERPRETED", True)
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
    assert list(HARDWARE) == ["a100", "h100", "h200", "b200", "rtx4090", "mi300x"] == list(schedule.KNOWN)
    for name, hardware in HARDWARE.items():
        assert hardware.name == hardware.facts.name == name and hardware.facts is schedule.KNOWN[name]
        assert hardware.bandwidth_source.startswith(("measured: ", "assumed: "))
        assert hardware.copy_start_source.startswith("measured: " if name == "h100" else "assumed: ")
        assert hardware.copy_us(0) == 1e6 * hardware.copy_start and 1e9 < hardware.clock < 3e9
        assert 0 < hardware.l2_window < hardware.l2_bytes
    assert HARDWARE["h200"].copy_bandwidth == 4.3e12 and HARDWARE["h200"].l2_window == 20 << 20


PTX = """
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u64 k_param_1, .param .u32 k_param_2)
.reqntid 256
{
\t.local .align 8 .b8 \t__local_depot0[24];
\t.reg .b64 %rd<9>;
\tld.param.b64 \t%rd1, [k_param_0];
$L__BB0_1: // st.global.b32 [%rd1], %r1;
\tld.param.u64 %rd2, [k_param_1];
\tmul.wide.s32 \t%rd3, %r2, 4; add.s64 %rd4, %rd1, %rd3;
\tsetp.lt.u64 %p2, %rd2, %rd1;
\t@%p1 ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 16 ], %rd9;
\t@!%p1 ld.volatile.global.v2.u64 {%rd5, %rd6}, [%rd2+8];
\tcp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
\tcp.async.commit_group;
\tst.shared.b64 [%r5], %rd2; ld.shared.b64 %rd7, [%r5];
\tst.global.cs.b8 [%rd7], %rs1;
\tst.global.b16 [%rd5], %rs1; // an address out of memory
\tatom.global.gpu.acq_rel.add.f32 %f1, [%rd4], %f2; atom.shared.add.u32 %r7, [%r5], 1; redux.sync.add.s32 %r8, %r7, -1;
\tred.global.add.f32 [%rd2], %f1;
\tbar.sync 0; bar.warp.sync -1; mbarrier.init.b64 [%r5], 1;
\tbarrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
\tret;
}
"""


def test_ptx() -> None:
    none, first, second = frozenset(), frozenset([0]), frozenset([1])
    assert ptx.accesses(PTX, frozenset([0, 1])) == (
        ("load", 128, first), ("load", 128, second), ("load", 128, first), ("store", 8, second), ("store", 16, none),
    )  # fmt: skip
    assert ptx.barriers(PTX) == 2 and ptx.atomics(PTX) == 2
    assert ptx.arrays(PTX) == 24 and ptx.threads(PTX) == 256


AMDGCN = """
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tbuffer_load_ushort v5, v4, s[4:7], 0 offen
\tglobal_load_short_d16_hi v5, v4, s[0:1]
\tbuffer_store_byte v5, v4, s[4:7], 0 offen
\tflat_store_b64 v[0:1], v[2:3]
\tds_read_b128 v[0:3], v4
\tglobal_atomic_add_f32 v4, v5, s[0:1]
\ts_barrier
    .vgpr_count:     12
"""


def test_amdgcn() -> None:
    assert amdgcn.accesses(AMDGCN) == (("load", 128), ("load", 16), ("load", 16), ("store", 8), ("store", 64))
    assert amdgcn.barriers(AMDGCN) == amdgcn.atomics(AMDGCN) == 1
    assert amdgcn.figure(AMDGCN, "vgpr_count") == 12
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        amdgcn.figure(AMDGCN, "vgpr_spill_count")
    with pytest.raises(ValueError, match="format"):
        amdgcn.accesses("\tbuffer_load_format_xyzw v[0:3], v4, s[4:7], 0 idxen\n")
