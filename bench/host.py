"""Host time of an eager call: what Python spends until the last launch is out, forward and backward.

Without a GPU the calls run on a virtual device: CPU tensors take the real launch path, and the driver's launch does
nothing.  Missing then, for everyone alike: Triton's launcher, the CUDA driver, the thread that autograd keeps for a
GPU, and PyTorch's CUDA allocator (its CPU allocator stands in and keeps what was freed, see "empties_us").  torch's
own functions are called on eight elements, where a CPU's arithmetic costs next to nothing; backward comes with it.

Liger's functions run unpatched.  On CPU tensors they take one SM for granted, ask no device for its properties and
enter no device context, so their time is a little low; and they sum one row of partial sums per parameter on the CPU
itself: that arithmetic (the same sum over 4096 and over 8 elements) is taken off before normops is held to them.

One thread, no garbage collection.  Blocks of calls of all subjects take turns; the median and the smallest block
count.  Stages are differences of medians at the boundaries calls.find, autograd.apply, Call.forward (backward),
Step.launch: "checks and plan" is the lookup of what the first call checked and planned, "allocation" makes outputs and
workspace and finds the step to run, "autograd" is the Function, and PyTorch's engine in the backward.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor
from triton.runtime import driver

from normops import autograd, calls, functional, launch, nn
from normops.testing import virtual_device

from .common import console, print_table, save
from .console import LineProgress

DEVICE = "h200"
TARGET = {"LayerNorm": "LayerNorm", "RMSNorm": "RMSNorm", "BatchNorm": "LayerNorm"}
"""Of each norm, the one of Liger's whose host time it is held to: at most half of it."""
SUMS = {"LayerNorm": 2, "RMSNorm": 1, "add + RMSNorm": 1}
"""Sums over partial sums in Liger's backward."""
STAGES = ("checks and plan", "autograd", "allocation", "launch", "rest")


class Subject(NamedTuple):
    norm: str
    provider: str
    call: Callable[[], Any]
    leaves: tuple[Tensor, ...]


def tensors(device: torch.device) -> dict[str, Tensor]:
    """Rows of 4096 in bf16 for norms over the last axis, small feature maps for the others."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    return {
        "rows": random(64, 4096), "residual": random(64, 4096), "w": random(4096), "b": random(4096),
        "maps": random(8, 64, 16, 16), "large": random(64, 160, 56, 56), "cw": random(64, dtype=torch.float32),
        "cb": random(64, dtype=torch.float32), "lw": random(160, dtype=torch.float32),
        "lb": random(160, dtype=torch.float32), "cw16": random(64), "cb16": random(64),
    }  # fmt: skip


def by_normops(t: dict[str, Tensor]) -> Iterator[Subject]:
    F = functional
    x, r, w, b = t["rows"], t["residual"], t["w"], t["b"]
    maps, cw, cb, large, lw, lb = (t[n] for n in ("maps", "cw", "cb", "large", "lw", "lb"))
    mean, var = torch.zeros_like(cw).detach(), torch.ones_like(cw).detach()
    lmean, lvar = torch.zeros_like(lw).detach(), torch.ones_like(lw).detach()
    calls: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...]]] = {
        "LayerNorm": (lambda: F.layer_norm(x, (4096,), w, b), (x, w, b)),
        "RMSNorm": (lambda: F.rms_norm(x, (4096,), w), (x, w)),
        "add + RMSNorm": (lambda: F.rms_norm(x, (4096,), w, pre_add=r), (x, r, w)),
        "BatchNorm": (lambda: F.batch_norm(maps, mean, var, cw, cb, True), (maps, cw, cb)),
        "BatchNorm, ticketed": (lambda: F.batch_norm(large, lmean, lvar, lw, lb, True), (large, lw, lb)),
        "GroupNorm": (lambda: F.group_norm(maps, 8, cw, cb), (maps, cw, cb)),
        "InstanceNorm": (lambda: F.instance_norm(maps, None, None, cw, cb), (maps, cw, cb)),
    }
    for norm, (call, leaves) in calls.items():
        yield Subject(norm, "normops", call, leaves)


def by_modules(t: dict[str, Tensor]) -> Iterator[Subject]:
    device = t["rows"].device
    modules = {
        "LayerNorm": (nn.LayerNorm(4096, dtype=torch.bfloat16), "rows"),
        "RMSNorm": (nn.RMSNorm(4096, dtype=torch.bfloat16), "rows"),
        "BatchNorm": (nn.BatchNorm2d(64), "maps"),
        "GroupNorm": (nn.GroupNorm(8, 64), "maps"),
        "InstanceNorm": (nn.InstanceNorm2d(64, affine=True), "maps"),
    }
    for norm, (module, name) in modules.items():
        module, x = module.to(device), t[name]
        yield Subject(norm, "normops.nn", lambda m=module, x=x: m(x), (x, *module.parameters()))  # type: ignore[misc]


class Empty(torch.autograd.Function):
    """Allocates what LayerNorm returns and launches nothing: what no Function in Python can be faster than."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, w, b)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def by_torch(t: dict[str, Tensor]) -> Iterator[Subject]:
    device = t["rows"].device
    x, maps = (torch.randn(shape, device=device, requires_grad=True) for shape in ((1, 8), (1, 4, 2)))
    w, b, cw, cb = (torch.ones(n, device=device, requires_grad=True) for n in (8, 8, 4, 4))
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    yield Subject("LayerNorm", "torch", lambda: TF.layer_norm(x, (8,), w, b), (x, w, b))
    yield Subject("RMSNorm", "torch", lambda: TF.rms_norm(x, (8,), w), (x, w))
    yield Subject("BatchNorm", "torch", lambda: TF.batch_norm(maps, mean, var, cw, cb, True), (maps, cw, cb))
    yield Subject("GroupNorm", "torch", lambda: TF.group_norm(maps, 2, cw, cb), (maps, cw, cb))
    yield Subject("InstanceNorm", "torch", lambda: TF.instance_norm(maps, None, None, cw, cb), (maps, cw, cb))
    apply = super(torch.autograd.Function, Empty).apply  # past the look for transforms, as normops goes
    leaves = (t["rows"], t["w"], t["b"])
    yield Subject("empty Function", "torch", lambda: apply(*leaves), leaves)


def by_liger(t: dict[str, Tensor]) -> Iterator[Subject]:
    """Liger's own autograd functions, as its modules call them."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.group_norm import LigerGroupNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, r, w, b, maps, cw, cb = (t[n] for n in ("rows", "residual", "w", "b", "maps", "cw16", "cb16"))
    yield Subject("LayerNorm", "Liger", lambda: LigerLayerNormFunction.apply(x, w, b, 1e-5), (x, w, b))
    yield Subject("RMSNorm", "Liger", lambda: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", True), (x, w))
    yield Subject(
        "add + RMSNorm", "Liger", lambda: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6, 0.0, "llama", True),
        (x, r, w),
    )  # fmt: skip
    yield Subject("GroupNorm", "Liger", lambda: LigerGroupNormFunction.apply(maps, cw, cb, 64, 8, 1e-5), (maps, cw, cb))


def both_ways(subject: Subject) -> Callable[[], Any]:
    """A call and its backward, with gradients that were there before."""
    outputs = subject.call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.empty_like(y) for y in outputs]
    return lambda: torch.autograd.grad(subject.call(), subject.leaves, gradients)


def interleaved(
    functions: dict[Any, Callable[[], Any]], blocks: int, calls: int, rest: Callable[[], Any] = lambda: None,
    watched: Callable[[range], Iterable[int]] = iter,
) -> dict[Any, tuple[float, float]]:  # fmt: skip
    """(median, smallest) microseconds of one call of each, over blocks that take turns; `watched` sees the turns."""
    found: dict[Any, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(5):
            function()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in watched(range(blocks)):
            for name, function in functions.items():
                start = perf_counter()
                for _ in range(calls):
                    function()
                found[name].append((perf_counter() - start) / calls * 1e6)
                rest()
    finally:
        if collecting:
            gc.enable()
    return {name: (median(times), min(times)) for name, times in found.items()}


@contextmanager
def caught(owner: Any, name: str, into: dict[str, tuple[Any, ...]]) -> Iterator[None]:
    """Keep the arguments of the last call of owner.name."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        into[name] = (original, args, kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def silent() -> Iterator[None]:
    """Launches are not recorded: a record keeps tensors, and memory that is never returned costs the call that made it
    more than memory that is."""
    active = driver.active
    launcher = active.launcher_cls

    class Silent(launcher):  # type: ignore[misc, valid-type]
        def __call__(self, *_: Any) -> None:
            pass

    active.launcher_cls = Silent
    try:
        yield
    finally:
        active.launcher_cls = launcher


def stages(subject: Subject) -> tuple[str, dict[str, Callable[[], Any]]]:
    """The engine that runs, and inner functions of a call of normops, each with the arguments that it had there."""
    launched = launch.Step.launch
    call: dict[str, tuple[Any, ...]] = {}
    with caught(calls, "find", call), caught(autograd, "apply", call), caught(calls.Call, "forward", call):
        with caught(launch.Step, "launch", call):
            y = subject.call()
        forward_launch = call["launch"][1]
        y = y if isinstance(y, tuple) else (y,)
        with caught(calls.Call, "backward", call), caught(launch.Step, "launch", call):
            torch.autograd.grad(y, subject.leaves, [torch.empty_like(t) for t in y])
    inner = {name: partial(original, *args, **named) for name, (original, args, named) in call.items()}
    return forward_launch[0].plan.engine, {
        "lookup": inner["find"], "apply": inner["apply"], "forward": inner["forward"],
        "forward launch": partial(launched, *forward_launch), "backward": inner["backward"],
        "backward launch": inner["launch"],
    }  # fmt: skip


def breakdown(times: dict[str, tuple[float, float]], total: tuple[float, float]) -> dict[str, dict[str, float]]:
    """Microseconds of each stage, by differences of medians; `total`: forward, and forward + backward."""
    t = {name: middle for name, (middle, _) in times.items()}
    forward, both = total
    return {
        "forward": {
            "checks and plan": t["lookup"], "autograd": t["apply"],
            "allocation": t["forward"] - t["forward launch"], "launch": t["forward launch"],
            "rest": forward - t["lookup"] - t["forward"] - t["apply"],
        },
        "backward": {
            "checks and plan": 0.0, "autograd": both - forward - t["backward"],
            "allocation": t["backward"] - t["backward launch"], "launch": t["backward launch"], "rest": 0.0,
        },
    }  # fmt: skip


def keep_memory() -> None:
    """glibc hands nothing back to the system from here on: it would again and again at the top of its heap, for some
    subjects and not for others, by what stands above their tensors."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 30)


def plain(device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is measured to judge the measurement: allocations by their size, sums by theirs."""
    shapes = {"16 B": (8,), "512 KB": (64, 4096), "1 MB": (64, 8, 32, 32)}
    likes = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
    parts = {n: torch.zeros(1, n, device=device) for n in (8, 4096)}
    return {name: partial(torch.empty_like, like) for name, like in likes.items()} | {
        f"sum of {n}": lambda p=p: p.sum(dim=0).to(torch.bfloat16)  # type: ignore[misc]
        for n, p in parts.items()
    }


def measure(blocks: int, calls: int) -> dict[str, Any]:
    """Everything, in this process: on the GPU where there is one, else on a virtual device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(1)
    skipped = {}
    with ExitStack() as stack:
        if not cuda:
            keep_memory()
            stack.enter_context(virtual_device(DEVICE))
            stack.enter_context(silent())
        t = tensors(device)
        subjects = [*by_normops(t), *by_modules(t), *by_torch(t)]
        if find_spec("liger_kernel") is None:
            skipped["Liger"] = "liger-kernel is not installed"
        else:
            try:
                subjects += by_liger(t)
            except ImportError as error:
                skipped["Liger"] = f"liger-kernel cannot be imported: {error}"
        functions: dict[tuple[str, str, str], Callable[[], Any]] = {}
        for s in subjects:
            functions[s.norm, s.provider, "forward"], functions[s.norm, s.provider, "both"] = s.call, both_ways(s)
        engines, inner = {}, {}
        for s in subjects:
            if s.provider == "normops":
                engines[s.norm], inner[s.norm] = stages(s)
                functions |= {(s.norm, "stage", name): function for name, function in inner[s.norm].items()}
        functions |= {("", "plain", name): function for name, function in plain(device).items()}
        rest = torch.cuda.synchronize if cuda else lambda: None
        with LineProgress() as progress:  # never a bar, which is drawn ten times a second
            watched = partial(progress.track, description=f"host: turns of {calls} times {len(functions)} calls")
            times = interleaved(functions, blocks, calls, rest, watched)

    rows = [
        {"norm": s.norm, "provider": s.provider}
        | {f"{d}_us": times[s.norm, s.provider, d][0] for d in ("forward", "both")}
        | {f"{d}_min_us": times[s.norm, s.provider, d][1] for d in ("forward", "both")}
        for s in subjects
    ]
    parts = []
    for norm, names in inner.items():
        found = {name: times[norm, "stage", name] for name in names}
        total = times[norm, "normops", "forward"][0], times[norm, "normops", "both"][0]
        boundaries = {f"{name}_us": middle for name, (middle, _) in found.items()}
        boundaries |= {f"{name}_min_us": smallest for name, (_, smallest) in found.items()}
        parts.append({"norm": norm, "engine": engines[norm]} | breakdown(found, total) | {"boundaries": boundaries})
    apart = {name: times["", "plain", name] for _, provider, name in functions if provider == "plain"}
    where = torch.cuda.get_device_name() if cuda else f"virtual {DEVICE}"
    return {
        "method": __doc__, "where": where, "blocks": blocks, "calls": calls, "rows": rows, "stages": parts,
        "empties_us": {name: middle for name, (middle, _) in apart.items() if not name.startswith("sum")},
        "sum_us": 0.0 if cuda else max(0.0, apart["sum of 4096"][1] - apart["sum of 8"][1]), "skipped": skipped,
    }  # fmt: skip


def verdicts(rows: list[dict[str, Any]], sum_us: float = 0.0) -> list[str]:
    """Of each norm of TARGET, how its host time stands to half of Liger's, by medians and by smallest blocks.

    sum_us: arithmetic in each of Liger's sums, which a GPU does while the host goes on.
    """
    found = {(row["norm"], row["provider"]): row for row in rows}
    lines = []
    for norm, theirs in TARGET.items():
        mine, liger = found[norm, "normops"], found.get((theirs, "Liger"))
        if liger is None:
            lines.append(f"{norm}: at most 0.5 of Liger's {theirs} is the target, not judged: Liger was not timed")
            continue
        off = {"forward": 0.0, "both": SUMS[theirs] * sum_us}
        (fm, fs), (bm, bs) = (
            [mine[f"{d}{kind}_us"] / (liger[f"{d}{kind}_us"] - off[d]) for kind in ("", "_min")] for d in off
        )
        state = "met" if max(fm, fs, bm, bs) <= 0.5 else "missed"
        lines.append(
            f"{norm}: at most 0.5 of Liger's {theirs} is the target, {state} in this run: forward {fm:.2f} (smallest "
            f"blocks {fs:.2f}), forward + backward {bm:.2f} ({bs:.2f})"
        )
    return lines


def show(result: dict[str, Any]) -> None:
    rows = result["rows"]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    title = f"Host time of an eager call in us, forward / forward + backward (medians, {result['where']})"
    found = {(row["norm"], row["provider"]): f"{row['forward_us']:.1f} / {row['both_us']:.1f}" for row in rows}
    norms = dict.fromkeys(row["norm"] for row in rows)
    lines = [[norm, *(found.get((norm, provider), "") for provider in providers)] for norm in norms]
    print_table(title, ("norm", *providers), lines)
    lines = [
        [
            part["norm"], part["engine"],
            *(f"{part['forward'][stage]:.1f} / {part['backward'][stage]:.1f}" for stage in STAGES),
        ]
        for part in result["stages"]
    ]  # fmt: skip
    print_table("Where normops spends it, us, forward / backward", ("norm", "engine", *STAGES), lines)
    empties = ", ".join(f"{time:.2f} us for {size}" for size, time in result["empties_us"].items())
    console.print(f"An empty tensor takes {empties}; arithmetic in a sum of Liger's {result['sum_us']:.1f} us.")
    for name, reason in result["skipped"].items():
        console.print(f"{name} was not timed: {reason}")
    for line in verdicts(rows, result["sum_us"]):
        console.print(line)


def host(out: Path, blocks: int = 15, each: int = 100) -> bool:
    """Measure, print, write host.json.  In a process of its own where this one interprets kernels."""
    if calls.INTERPRETED:
        command = [sys.executable, "-m", "bench", "host", "--out", str(out), "--blocks", str(blocks)]
        environment = os.environ | {"TRITON_INTERPRET": "0", "COLUMNS": str(console.width)}
        return subprocess.run([*command, "--calls", str(each)], env=environment).returncode == 0
    result = measure(blocks, each)
    save(out, "host", result)
    show(result)
    return True
