"""More than 2^31 elements: offsets are right in the interpreter, and 64 bits wide in compiled code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and __name__ != "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from normops import calls, counters, launch, plan, schedule
from normops import functional as F
from normops.kernels.bundles import APPLY, BOTH, STATISTICS
from normops.testing import plans, virtual_device
from tests.large import Sampled, SparseTorch, flat, give_back, sampled, sparse, value
from tests.tolerance import check

ROOT = Path(__file__).resolve().parents[1]


def batch(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return F.batch_norm(x, None, None, w, b, training=True)


def instance(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return F.instance_norm(x, None, None, w, b)


def group(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return F.group_norm(x, 35, w, b)


def layer(x: Tensor, w: Tensor, b: Tensor) -> Any:
    return F.layer_norm(x, x.shape[1:], w, b)


class Large(NamedTuple):
    shape: tuple[int, ...]
    call: Callable[..., Any]
    channels: int
    engine: str = ""
    channels_last: bool = False
    sms: int = 1 << 17
    """Of the device: the more, the fewer elements a program of a statistics launch has."""

    def meta(self, shape: tuple[int, ...] = ()) -> Tensor:
        form = torch.empty(shape or self.shape, dtype=torch.bfloat16, device="meta")
        return form.to(memory_format=torch.channels_last) if self.channels_last else form


LARGE = {
    "rows past 2^32": Large((4_200_001, 1031), layer, 1031),
    "batch, ticketed": Large((1025, 1024, 32, 65), batch, 1024, "ticketed"),
    "batch, split": Large((1025, 1024, 32, 65), batch, 1024, "split"),
    "batch, channels_last": Large((1025, 1024, 32, 65), batch, 1024, "split", True),
    "batch past 2^32, channels_last, a sum of more than 2^31": Large((131073, 2, 256, 64), batch, 2, "split", True),
    "instance": Large((1025, 32, 256, 257), instance, 32),
    "instance, channels_last": Large((1025, 32, 256, 257), instance, 32, "", True),
    "groups": Large((3000, 700, 32, 32), group, 700, sms=132),
}
KERNELS = {"normalize", "grad_normalize", "grad_group", "stream", "grad_stream", "finish", "grad_finish", "sum_rows"}
ran: dict[str, set[str]] = {}


@pytest.fixture(autouse=True)
def gives_back() -> Iterator[None]:
    yield
    give_back()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is sparse, in place of NaN."""
    for module in (calls, launch):
        monkeypatch.setattr(module, "torch", SparseTorch())


def run(large: Large, monkeypatch: pytest.MonkeyPatch) -> list[Sampled]:
    monkeypatch.setattr(calls, "_IN_INTERPRETER", replace(calls._IN_INTERPRETER, num_sms=large.sms))
    form = large.meta()
    x, dy = (sparse(form.shape, form.stride(), torch.bfloat16) for _ in range(2))
    w, b = ((torch.rand(large.channels) + 0.5).requires_grad_() for _ in range(2))
    calls.known.clear()
    try:
        with schedule.forced(engine=large.engine), sampled(form.numel()) as found:
            y = large.call(x.requires_grad_(), w, b)
            torch.autograd.grad(y, (x, w, b), dy)
    finally:
        counters.forget(torch.device("cpu"))
        calls.known.clear()
    return found


def at(model: Any, t: Tensor | None, elements: list[Any], strides: Any, absent: float = 0.0) -> Tensor:
    """What a tensor holds there, in float64."""
    if t is None:
        return torch.full((len(elements),), absent, dtype=torch.float64)
    return flat(t)[model.offsets(elements, strides)].double()


def group_means(model: Any, elements: list[Any], values: Tensor) -> Tensor:
    """Of each element the mean over those of its group, all of which are there."""
    fold = model.form.FOLD[0]
    keys = torch.tensor([(m * model.c + c) // fold for m, c, _, _ in elements])
    _, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
    return (torch.zeros(len(counts), dtype=torch.float64).index_add(0, inverse, values) / counts)[inverse]


def check_values(r: Sampled) -> None:
    """What the programs that ran stored, from what they were given; groups that are not whole have statistics that were
    put there."""
    o, f, model = r.o, r.form, r.model
    for i, elements in zip(r.programs, r.elements, strict=True):
        if f.PHASE == STATISTICS and r.kernel in ("stream", "grad_stream"):
            check_sums(r, i, elements)
            continue
        if f.PHASE == BOTH and r.kernel in ("stream", "grad_stream"):
            if i < r.number:
                continue  # applies nothing
            elements = model.numbered(i - r.number)
        offsets = model.offsets(elements, f.X)
        x = torch.tensor([value(k) for k in offsets], dtype=torch.float64)
        mean, rstd = at(model, o.mean, elements, f.STAT), at(model, o.rstd, elements, f.STAT)
        if r.kernel == "normalize":
            exact = group_means(model, elements, x)
            assert (mean - exact).abs().max() <= 2e-6, "a few roundings of elements up to 2; means nearly cancel"
            check("rstd", rstd.float(), (group_means(model, elements, (x - exact) ** 2) + 1e-5).rsqrt())
        xhat, w = (x - mean) * rstd, at(model, o.w, elements, f.W, 1.0)
        if o.y is not None:
            y = flat(o.y)[model.offsets(elements, f.Y)]
            check_rounded(y, xhat * w + at(model, o.b, elements, f.W))
            continue
        g = torch.tensor([value(k) for k in model.offsets(elements, f.DY)], dtype=torch.float64) * w
        if r.kernel in ("grad_normalize", "grad_group"):
            c1, c0 = group_means(model, elements, g * xhat), group_means(model, elements, g)
        else:
            c1, c0 = at(model, o.c1, elements, f.STAT), at(model, o.c0, elements, f.STAT)
        dx = flat(o.dx)[model.offsets(elements, f.DX)]
        check_rounded(dx, rstd * (g - c0 - xhat * c1))


def check_rounded(got: Tensor, exact: Tensor) -> None:
    """Each element by itself, for scales differ between columns: cut off to bfloat16 (a whole ulp, 2^-7), after a few
    roundings in fp32 of terms as large as any."""
    assert ((got.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-5 * exact.abs().max()).all()


def check_sums(r: Sampled, program: int, elements: list[Any]) -> None:
    """The partial results of one chunk, a column at a time."""
    model, f = r.model, r.form
    _, block_a, chunk_s = model.place(program, r.number)
    chunk = block_a * plan.cdiv(model.s, f.WIDTH_S * r.number) + chunk_s
    for m, c in {e[:2] for e in elements}:
        column = [e for e in elements if e[:2] == (m, c)]
        x, dy = ([value(k) for k in model.offsets(column, s)] for s in (f.X, f.X if r.o.dy is None else f.DY))
        x, dy = (torch.tensor(v, dtype=torch.float64) for v in (x, dy))
        place = (chunk * model.m + m) * model.c + c
        if r.kernel == "stream":
            check("part_m2", r.o.part_m2[place], ((x - x.mean()) ** 2).sum(), scale=4)
        else:
            # Terms nearly cancel: measured against the sum of their sizes.
            assert abs(float(r.o.p0[place]) - float(dy.sum())) <= 1e-5 * float(dy.abs().sum())


@pytest.mark.skipif(not calls.INTERPRETED, reason="runs in the interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", LARGE)
def test_programs_reach_what_they_should(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No integer overflows; x is read, and y and dx are written, just where Python's integers say."""
    found = run(LARGE[name], monkeypatch)
    ran[name] = {r.kernel for r in found}
    for r in found:
        model, f, o = r.model, r.form, r.o
        if not r.elements:
            continue
        assert f.WIDE and max(r.programs) == r.grid - 1
        every = [e for elements in r.elements for e in elements]
        assert max(model.offsets(every, f.X)) >= LARGE[name].meta().numel() - 1 > 2**31
        expected = set(model.offsets(every, f.X))
        thirds = [(i * (model.a // 3), i * (model.s // 3)) for i in range(3)]  # what means are less the median of
        beside = set(model.offsets([(*kept, *at) for kept in {e[:2] for e in every} for at in thirds], f.X))
        read = r.read[o.x.data_ptr()]
        assert expected <= read <= expected | beside, (r.kernel, f.PHASE)
        if o.dy is not None:
            assert r.read[o.dy.data_ptr()] == set(model.offsets(every, f.DY))
        written = [e for i, elements in zip(r.programs, r.elements, strict=True) for e in applied(r, i, elements)]
        for t, strides in ((o.y, f.Y), (o.dx, f.DX)):
            if t is not None and written:
                assert r.stored[t.data_ptr()] == set(model.offsets(written, strides))
        check_values(r)


def applied(r: Sampled, program: int, elements: list[Any]) -> list[Any]:
    """Elements of y or dx that a program writes."""
    if r.kernel not in ("stream", "grad_stream") or r.form.PHASE == APPLY:
        return elements
    return r.model.numbered(program - r.number) if r.form.PHASE == BOTH and program >= r.number else []


@pytest.mark.skipif(not calls.INTERPRETED, reason="runs in the interpreter: TRITON_INTERPRET=1")
def test_every_kernel_was_there() -> None:
    if set(ran) != set(LARGE):
        pytest.skip("only where all tests before it ran")
    assert set().union(*ran.values()) == KERNELS


@pytest.mark.skipif(not calls.INTERPRETED, reason="runs in the interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", ["rows past 2^32", "batch, channels_last"])
def test_offsets_of_32_bits_would_be_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = plan.cut
    for module in (plan, sys.modules["normops.plan_forward"], sys.modules["normops.plan_backward"]):
        monkeypatch.setattr(module, "cut", lambda *args, **more: cut(*args, **more | {"WIDE": False}))
    with pytest.raises(Exception, match="overflow"):
        run(LARGE[name], monkeypatch)


def compiled() -> list[dict[str, Any]]:
    """Of each launch of LARGE, and of some of them with a 64th of the batch: the offsets in its code."""
    found = []
    for name, large in LARGE.items():
        # One case of each engine is enough where offsets are small.
        below = (large.shape[0] // 64, *large.shape[1:])
        for shape in (large.shape, *([below] if name in ("rows past 2^32", "batch, split") else [])):
            form = large.meta(shape)
            with virtual_device("h100") as gpu, plans() as planned, schedule.forced(engine=large.engine):
                x, dy = (torch.empty(form.shape, dtype=form.dtype).as_strided(shape, form.stride()) for _ in range(2))
                w, b = (torch.empty(large.channels, requires_grad=True) for _ in range(2))
                torch.autograd.grad(large.call(x.requires_grad_(), w, b), (x, w, b), dy)
            launches = [launch for p in planned for launch in p.plan.launches]
            for made, wanted in zip(gpu.launches, launches, strict=True):
                found.append({
                    "name": name, "kernel": made.name, "numel": form.numel(), "wide": wanted.form.WIDE,
                    "ttir": offsets_of(made.asm["ttir"]),
                })  # fmt: skip
    return found


def offsets_of(ttir: str) -> dict[str, int]:
    """Width of what is added to pointers to bfloat16 -> how often; constants apart."""
    constants = set(re.findall(r"^\s*(%\S+) = arith\.constant", ttir, re.M))
    found: dict[str, int] = {}
    for offset, width in re.findall(r"tt\.addptr %\S+, (%\S+) : \S*!tt\.ptr<bf16>>?, \S*?(i32|i64)>?", ttir):
        width = "constant" if offset in constants else width
        found[width] = found.get(width, 0) + 1
    return found


def test_compiled_offsets_have_64_bits_where_they_need_them() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert {row["name"] for row in rows} == set(LARGE)
    assert {row["kernel"] for row in rows if row["ttir"]} == KERNELS - {"grad_finish", "sum_rows"}
    for row in rows:
        if row["ttir"]:  # it has pointers to x or what is as large
            assert row["wide"] == (row["numel"] > 2**31)
            assert {"i32", "i64"} & set(row["ttir"]) == {"i64" if row["wide"] else "i32"}, row


if __name__ == "__main__":
    print(json.dumps(compiled()))
