"""The engine "cooperative": its launches raced, as many processes as programs, and what they compile to.  A GPU runs
them itself.

Run as a program (the compiler needs a process without the interpreter), this file prints figures of the compiled
kernels as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl

from normops import compiled, cost, launch, schedule
from normops import functional as F
from normops.kernels import cooperative as kc
from normops.launch import Step
from normops.plan import Plan
from normops.testing import plans, race, virtual_device
from tests.test_cost import check as check_counts
from tests.test_cost import counted
from tests.tolerance import check, laid_out, leaf, oracle

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("h200",)
REPEATS = 2
RESULTS = ("sum", "y", "running_mean", "running_var", "dx", "dpost", "t1", "t0")
PARTIALS = ("part_mean", "part_m2", "q1", "q0")

SMALL = schedule.Device("small", 5, (9, 0), schedule.MIB)

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="races in the interpreter: TRITON_INTERPRET=1")


def batch_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.batch_norm(x, None, None, w, b, training=True, **kw)


def instance_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.instance_norm(x, None, None, w, b, **kw)


def group_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.group_norm(x, 2, w, b, **kw)


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.layer_norm(x, x.shape[1:], w, b, **kw)


def rms_norm(x: Tensor, w: Tensor | None, b: Tensor | None, **kw: Any) -> Any:
    return F.rms_norm(x, x.shape[1:], w, **kw)


# norm, shape, memory format, elements of a tile (one team or two of many programs; more of few), axes that are averaged
# over, groups (whose axes are those of (N, g, C/g, H, W)): odd sizes, more units than teams.
CASES = {
    "BatchNorm": (batch_norm, (3, 5, 9, 7), "contiguous", (64, 256), (0, 2, 3), None),
    "BatchNorm-channels_last": (batch_norm, (2, 37, 5, 3), "channels_last", (128, 256), (0, 2, 3), None),
    "GroupNorm": (group_norm, (3, 6, 7, 5), "contiguous", (64, 128), (2, 3, 4), 2),
    "GroupNorm-channels_last": (group_norm, (5, 6, 7, 5), "channels_last", (256, 1024), (2, 3, 4), 2),
    "LayerNorm": (layer_norm, (11, 203), "contiguous", (512, 1024), (1,), None),
    "RMSNorm": (rms_norm, (7, 120), "contiguous", (128, 256), (1,), None),
    "InstanceNorm": (instance_norm, (3, 5, 9, 13), "contiguous", (64, 128), (2, 3), None),
    "InstanceNorm-channels_last": (instance_norm, (3, 5, 9, 7), "channels_last", (256, 512), (2, 3), None),
}


class Raced:
    """What stands for Step._bind: launches that wait are raced, with a process for each program, REPEATS times."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def bind(self, step: Step, tensors: tuple[Tensor | None, ...], scalars: tuple[float, ...]) -> None:
        self.plans.append(step.plan)
        operands = step.operands(tensors, scalars)
        for one in step.plan.launches:
            args = [operands.get(name) for name in one.pointers]
            args += [operands[v] if isinstance(v, str) else v for v in one.scalars]
            if "launch_cooperative_grid" not in one.options:
                one.kernel[(one.grid,)](*args, **one.constants)
                continue
            forward = one.kernel.__name__ == "cooperative"
            given = {name: operands.get(name) for name in one.pointers}
            results = {name: given[name] for name in (*RESULTS, *(("mean", "rstd") if forward else ()))
                       if given.get(name) is not None}  # fmt: skip
            partials = [given[name] for name in PARTIALS if given.get(name) is not None]
            start = {name: t.clone() for name, t in results.items()}
            seen: list[dict[str, Tensor]] = []

            def between(
                n: int, given: Any = given, results: Any = results, partials: Any = partials, start: Any = start,
                seen: Any = seen,
            ) -> None:  # fmt: skip
                assert not given["tickets"].any(), f"counters are dirty after launch {n}"
                seen.append({name: t.clone() for name, t in results.items()})
                for name, t in results.items():
                    assert torch.equal(t, seen[0][name]), f"{name} has other bits in launch {n}"
                    if n < REPEATS:
                        t.copy_(start[name]) if name.startswith("running") else t.fill_(torch.nan)
                if n < REPEATS:
                    for t in partials:
                        t.fill_(torch.nan)

            race(
                one.kernel, one.grid, args, one.constants, processes=one.grid, repeats=REPEATS, between=between,
                seed=len(self.plans),
            )  # fmt: skip
            between(REPEATS)


class Run(Raced):
    """The same where a GPU runs the launches."""

    def __init__(self) -> None:
        super().__init__()
        self._bind = Step._bind

    def bind(self, step: Step, tensors: tuple[Tensor | None, ...], scalars: tuple[float, ...]) -> None:
        self.plans.append(step.plan)
        self._bind(step, tensors, scalars)


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Raced]:
    found = Raced() if launch.INTERPRETED else Run()
    monkeypatch.setattr(Step, "_bind", lambda step, *args: found.bind(step, *args))
    if not launch.INTERPRETED:  # a GPU, planned for as if it had few SMs
        small = replace(SMALL, capability=torch.cuda.get_device_capability())
        monkeypatch.setattr(launch, "_properties", lambda _: small)
    with launch.standing_in(SMALL):
        yield found


def forced(tile: int) -> Any:
    return schedule.forced(
        engine="cooperative", cooperative_tile=tile, grad_cooperative_tile=tile, line_bytes=16, rows=2
    )


def run(
    case: str, tile: int, device: torch.device, dtype: torch.dtype = torch.float32, added: bool = False,
    activation: str | None = None,
) -> None:  # fmt: skip
    """A call, forward and backward, against float64."""
    norm, shape, layout, _, axes, groups = CASES[case]
    x, dy = (laid_out(shape, layout, dtype, device) for _ in range(2))
    pre, post = (laid_out(shape, layout, dtype, device) if added else None for _ in range(2))
    w, b = torch.randn(2, shape[1], dtype=torch.promote_types(dtype, torch.float32), device=device).unbind()
    leaves = {"x": x, "w": w.clone(), "b": b.clone(), "pre": pre, "post": post}
    if norm is rms_norm:
        leaves["b"] = None
    leaves = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    w, b = leaves["w"], leaves.get("b")
    exact = {name: leaf(t) for name, t in leaves.items()}
    with forced(tile):
        y = norm(x, w, b, pre_add=pre, post_add=post, activation=activation, eps=1e-5)
        y, total = y if added else (y, None)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    broadcast = (-1,) if norm in (layer_norm, rms_norm) else (1, -1, 1, 1)
    want, _ = oracle(
        exact["x"], axes, exact["w"].view(broadcast), None if b is None else exact["b"].view(broadcast), eps=1e-5,
        center=norm is not rms_norm, activation=activation, pre_add=exact.get("pre"), post_add=exact.get("post"),
        groups=groups, total=total,
    )  # fmt: skip
    check("y", y, want, 4)
    wants = torch.autograd.grad(want, list(exact.values()), dy.double())
    for name, got, expected in zip(leaves, gradients, wants, strict=True):
        check(f"d{name}", got, expected, 8, dtype)


def waits(plan: Plan) -> list[tuple[int, int]]:
    """(programs of a team, teams) of each launch that waits."""
    found = []
    for one in plan.launches:
        if "launch_cooperative_grid" in one.options:
            tiles = -(-plan.streamed.extent("a") // one.given["BLOCK_A"]) * one.given["chunks_s"]
            found.append((tiles, one.grid // tiles))
    return found


@pytest.mark.parametrize("many", [True, False], ids=["large teams", "small teams"])
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, many: bool, raced: Raced, device: torch.device) -> None:
    run(case, CASES[case][3][0 if many else 1], device)
    assert [plan.engine for plan in raced.plans] == ["cooperative"] * 2
    for plan in raced.plans:
        ((programs, teams),) = waits(plan)
        assert programs >= 4 if many else programs >= 2 and teams >= 2


@pytest.mark.parametrize("case", ["BatchNorm", "GroupNorm-channels_last", "LayerNorm"])
def test_operands_that_are_added(case: str, raced: Raced, device: torch.device) -> None:
    run(case, 2 * CASES[case][3][0], device, added=True, activation="silu")
    assert [plan.engine for plan in raced.plans] == ["cooperative"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["BatchNorm-channels_last", "RMSNorm"])
def test_dtypes(case: str, dtype: torch.dtype, raced: Raced, device: torch.device) -> None:
    run(case, 4 * CASES[case][3][1], device, dtype)  # narrower accesses, or more registers an element: less fits
    assert [plan.engine for plan in raced.plans] == ["cooperative"] * 2


def test_running_statistics(raced: Raced, device: torch.device) -> None:
    x, mean, var = (torch.randn(shape, device=device) for shape in ((3, 5, 9, 7), 5, 5))
    var.abs_()
    ours, theirs = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    with forced(64):
        F.batch_norm(x, *ours, training=True, momentum=0.3)
    torch.nn.functional.batch_norm(x, *theirs, training=True, momentum=0.3)
    assert [plan.engine for plan in raced.plans] == ["cooperative"]
    for ran, expected in zip(ours, theirs, strict=True):
        check("running", ran, expected.double(), 4)


@interpreted
def test_the_interpreter_raises_instead_of_waiting_for_ever() -> None:
    with schedule.forced(engine="cooperative"), pytest.raises(RuntimeError, match=r"'cooperative'.* wait for one"):
        F.layer_norm(torch.randn(2, 64), (64,))


def test_what_the_programs_of_a_device_cannot_hold_is_split(raced: Raced) -> None:
    x = torch.randn(2, 3000)
    with forced(64), plans() as planned:
        raced.bind = lambda step, *_: raced.plans.append(step.plan)  # type: ignore[method-assign]
        F.layer_norm(x, (3000,))
    assert [p.plan.engine for p in planned] == ["split"]


def test_no_call_takes_it_unless_it_is_forced(raced: Raced) -> None:
    raced.bind = lambda step, *_: raced.plans.append(step.plan)  # type: ignore[method-assign]
    x = torch.empty(4, 8, 512, 512)
    with launch.standing_in(schedule.H200):
        F.batch_norm(x, None, None, training=True)
        with schedule.forced(engine="cooperative"):
            F.batch_norm(x, None, None, training=True)
    assert [plan.engine for plan in raced.plans] == ["ticketed", "cooperative"]


@interpreted
@pytest.mark.parametrize("many", [True, False], ids=["large teams", "small teams"])
@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_those_counted(case: str, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program after the other, and none waits: values are wrong, what is moved is not."""

    @triton.jit
    def look(word_ptr, expected):
        tl.atomic_add(word_ptr, 0, sem="acquire")

    monkeypatch.setattr(kc, "wait", look)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    norm, shape, layout, tiles, _, _ = CASES[case]
    x, dy = (laid_out(shape, layout, torch.float32, torch.device("cpu")) for _ in range(2))
    w, b = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)
    leaves = [x.requires_grad_(), w] if norm is rms_norm else [x.requires_grad_(), w, b]
    with launch.standing_in(SMALL), forced(tiles[0 if many else 1]), counted() as (planned, found):
        torch.autograd.grad(norm(x, w, b, activation=None if many else "relu"), leaves, dy)
    assert [p.plan.engine for p in planned] == ["cooperative"] * 2
    check_counts(planned, found)
    for p in planned:
        streams = [name for name in ("x", "dy", "y", "dx") if name in p.nbytes]
        moved = cost.traffic(p.plan, p.itemsizes)[0]
        assert all(sum(moved[name]) == p.nbytes[name] for name in streams), "each is read or written once"


BIG = {
    "BatchNorm": ((256, 256, 56, 56), torch.contiguous_format, lambda x, w, b, **kw: batch_norm(x, w, b, **kw)),
    "GroupNorm": ((16, 320, 64, 64), torch.channels_last, lambda x, w, b, **kw: F.group_norm(x, 32, w, b, **kw)),
    "LayerNorm 65536": ((1024, 65536), torch.contiguous_format, layer_norm),
    "LayerNorm 131072": ((1024, 131072), torch.contiguous_format, layer_norm),
}  # fmt: skip


def compile_all() -> dict[str, Any]:
    """For each device and call: figures of its kernels; whether Triton's launcher was told to launch cooperatively."""
    found: dict[str, Any] = {}
    told: list[bool] = []
    handle = compiled.handle

    def noted(kernel: Any) -> Any:
        told.append(kernel.metadata.launch_cooperative_grid)
        return handle(kernel)

    compiled.handle = noted  # type: ignore[assignment]
    for name in DEVICES:
        for case, (shape, memory_format, norm) in BIG.items():
            told.clear()
            x = torch.empty(shape, dtype=torch.bfloat16, device="cpu").contiguous(memory_format=memory_format)
            w, b = torch.empty(shape[1], requires_grad=True), torch.empty(shape[1], requires_grad=True)
            with virtual_device(name) as gpu, schedule.forced(engine="cooperative"), plans() as planned:
                for _ in range(2):  # the second time launched directly
                    norm(x.requires_grad_(), w, b).backward(x)
            launched = gpu.launches
            found[f"{name} {case}"] = {
                "engines": [p.plan.engine for p in planned], "told": list(told),
                "launches": [
                    {"name": k.name, "registers": k.registers, "spills": k.spills, "waves": k.waves,
                     "widths": {a: [bits for _, bits in k.accesses(a)] for a in ("x_ptr", "dy_ptr", "y_ptr", "dx_ptr")
                                if a in k.arguments}}
                    for k in launched
                ],
            }  # fmt: skip
    compiled.handle = handle
    return found


if __name__ == "__main__":
    json.dump(compile_all(), sys.stdout)
    sys.exit()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_cooperative"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", BIG)
@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str, case: str, found: dict[str, Any]) -> None:
    row = found[f"{device} {case}"]
    half = len(row["launches"]) // 2
    assert row["launches"][:half] == row["launches"][half:], "launched directly, the same kernels"
    waiting = [kernel for kernel in row["launches"][:half] if "cooperative" in kernel["name"]]
    assert row["told"] == ["cooperative" in kernel["name"] for kernel in row["launches"][:half]]
    assert row["engines"] == ["cooperative"] * 4 and len(waiting) == 2
    for kernel in waiting:
        assert kernel["spills"] == 0
        assert kernel["waves"] <= 1, "all programs run at once"
        assert kernel["widths"] and all(widths == [128] for widths in kernel["widths"].values())
