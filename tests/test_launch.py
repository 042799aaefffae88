"""Launching: what is compiled is launched again directly, with the arguments that Triton's own binder would pass.

Kernels compile here, for a virtual device; that needs a process without the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from normops import calls, gpus
from normops import functional as F

ROOT = Path(__file__).resolve().parents[1]

HEAD = """
import torch
from torch import Tensor
from normops import calls, functional as F, launch, schedule
from normops.testing import virtual_device

x = torch.randn(3, 8, 5, 4)
w, b = torch.randn(8), torch.randn(8)
rm, rv = torch.zeros(8), torch.ones(8)
"""


def run(script: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])}
    done = subprocess.run([sys.executable, "-c", HEAD + script], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_direct_launches_pass_what_the_binder_passes() -> None:
    """Each step runs twice on the same tensors: through the binder, then directly."""
    run("""
pairs = []
step_launch = launch.Step.launch

def address(v):
    return v.data_ptr() if isinstance(v, Tensor) else v

def twice(step, tensors, scalars, device):
    assert not step._direct
    found = []
    for direct in (False, True):
        gpu.launches.clear()
        step_launch(step, tensors, scalars, device)
        found.append([
            (l.name, l.grid, l.num_warps, {n: address(v) for n, v in l.arguments.items()})
            for l in gpu.launches
        ])
        assert any(isinstance(v, Tensor) for l in gpu.launches for v in l.arguments.values()) != direct
        assert bool(step._direct)
    pairs.append(found)

launch.Step.launch = twice
options = [{}, {"activation": "silu"}, {"pre_add": torch.randn_like(x)}, {"post_add": torch.randn_like(x)}]
with virtual_device("h200") as gpu:
    for turn, limits in enumerate((
        {}, {"forward": 0, "backward": 0, "backward_affine": 0, "tile": 64, "grad_tile": 64}
    )):
        with schedule.forced(**limits):
            lx, lw, lb = [t.clone().requires_grad_() for t in (x, w, b)]
            norms = (
                lambda **extras: F.batch_norm(lx, rm, rv, lw, lb, True, **extras),
                lambda **extras: F.batch_norm(lx, rm, rv, lw, lb, **extras),
                lambda **extras: F.instance_norm(lx, None, None, lw, lb, **extras),
                lambda **extras: F.group_norm(lx, 2, lw, lb, **extras),
                lambda **extras: F.normalize(lx, 1, lw.view(8, 1, 1), **extras),
                lambda **extras: F.normalize(lx, (-1,), center=False, **extras),
            )
            for place, norm in enumerate(norms):  # each with two of the options, which go round
                for extras in (options[(place + turn) % 4], options[(place + turn + 2) % 4]):
                    y = norm(**extras)
                    y = y if isinstance(y, Tensor) else y[0]
                    y.backward(torch.randn_like(y))
assert len(pairs) == 2 * 2 * 12, len(pairs)
for binder, direct in pairs:
    assert binder == direct, (binder, direct)
""")


def test_a_misaligned_tensor_is_never_given_to_a_kernel_compiled_for_aligned_ones() -> None:
    run("""
aligned, shifted = torch.empty(6, 32), torch.empty(6 * 32 + 1)[1:].view(6, 32)
assert aligned.data_ptr() % 16 == 0 and shifted.data_ptr() % 16 != 0
with virtual_device("h200") as gpu:
    for _ in range(3):
        F.layer_norm(aligned, (32,))
    F.layer_norm(shifted, (32,))
    F.layer_norm(aligned, (32,))
    binaries = [l.binary for l in gpu.launches]
assert binaries[0] is binaries[1] is binaries[2] is binaries[4]
assert binaries[3] is not binaries[0]
""")


def test_launch_hooks_are_told_of_every_launch() -> None:
    run("""
from triton import knobs
seen = []
hook = lambda metadata: seen.append(metadata.get()["name"])
with virtual_device("h200") as gpu:
    F.layer_norm(x, (4,)), F.layer_norm(x, (4,))
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        F.layer_norm(x, (4,))
        assert isinstance(gpu.launches[-1].arguments["x"], Tensor), "not through the binder"
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    F.layer_norm(x, (4,))
    assert isinstance(gpu.launches[-1].arguments["x"], int)
""")


def test_another_batch_size_compiles_nothing() -> None:
    run("""
with virtual_device("h200") as gpu:
    for n in (64, 2, 3, 17, 1000):
        big = torch.empty(n, 8, 5, 4, requires_grad=True)
        y = F.group_norm(big, 2, w, b)
        y.backward(torch.empty_like(y))
        F.layer_norm(torch.empty(n, 7, 64), (64,))
    assert len({id(l.binary) for l in gpu.launches}) <= 4, {l.name for l in gpu.launches}
""")


def test_calls_of_one_device_are_not_kept_for_the_next() -> None:
    run("""
for name in ("a100", "h200"):
    with virtual_device(name) as gpu:
        for _ in range(3):
            F.layer_norm(x, (4,))
        assert len(gpu.launches) == 3
    assert not calls.known
assert torch.equal(F.layer_norm(x, (4,)), F.layer_norm(x, (4,)))  # plain PyTorch again
""")


def test_calls_are_bounded(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(calls, "KNOWN", 4)
    calls.known.clear()
    for n in range(1, 12):
        F.layer_norm(torch.randn(n, 4, device=device), (4,))
        assert len(calls.known) <= 4


def test_what_no_key_holds_is_taken_anew(device: torch.device) -> None:
    """eps and momentum change from call to call without another plan."""
    x = torch.randn(6, 3, 4, device=device)
    calls.known.clear()
    for eps, momentum in ((1e-5, 0.1), (0.5, 0.1), (1e-5, 1.0), (3, 0)):
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        ref_mean, ref_var = mean.clone(), var.clone()
        y = F.batch_norm(x, mean, var, training=True, momentum=momentum, eps=eps)
        ref = torch.nn.functional.batch_norm(x, ref_mean, ref_var, training=True, momentum=momentum, eps=eps)
        torch.testing.assert_close(y, ref)
        torch.testing.assert_close((mean, var), (ref_mean, ref_var))
    assert len(calls.known) == 1


def test_what_a_key_holds_makes_another_call(device: torch.device) -> None:
    calls.known.clear()
    x = torch.randn(4, 6, 8, device=device)
    w = torch.randn(8, device=device)
    variants = (
        (x, w), (x.half(), w), (x, w.half()), (x.transpose(0, 1), w), (x[::2], w), (x, None), (x[:3], w),
        (x, torch.randn(16, device=device)[::2]),
    )  # fmt: skip
    for i, (a, p) in enumerate(variants):
        got = F.layer_norm(a, (8,), p)
        expected = torch.nn.functional.layer_norm(a.double(), (8,), None if p is None else p.double())
        torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=2e-3)
        assert len(calls.known) == i + 1
    with pytest.raises(RuntimeError, match="normalized_shape"):
        F.layer_norm(x, (6,), w)
    assert len(calls.known) == len(variants), "a call that raised was remembered"


def test_an_unknown_device_is_planned_for_by_its_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = SimpleNamespace(
        name="none we know", multi_processor_count=20, major=8, minor=6, L2_cache_size=4 << 20, total_memory=1 << 33
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    calls._properties.cache_clear()
    try:
        device = calls.device_facts(torch.device("cuda", 63))
        assert device == gpus.Device("none we know", 20, (8, 6), 4 << 20)
        assert 0 < device.window < facts.L2_cache_size
        monkeypatch.setattr(torch.version, "hip", "6.0")
        calls._properties.cache_clear()
        assert calls.device_facts(torch.device("cuda", 63)).window == 0, "its dies share no L2: never ticketed"
    finally:
        calls._properties.cache_clear()
