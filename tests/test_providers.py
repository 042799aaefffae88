"""What normops is timed against, and how: reasons to skip, cuDNN's graphs, replays."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cudnn_graph, timing
from bench.device import Cuda
from bench.peers import PROVIDERS, by_cudnn
from bench.timing import Job
from tests.bench_doubles import BY_NAME, TINY, FakeDevice


@pytest.mark.parametrize(("provider", "case", "memory_format", "dtype", "reason"), [
    ("liger", "resnet stem", "contiguous", "bf16", "LayerNorm and RMSNorm over the last axis only"),
    ("liger", "unet 640x32", "channels_last", "bf16", "copies channels_last to contiguous"),
    ("liger", "long row 131072", "contiguous", "bf16", "rows of at most 65536 elements"),
    ("cudnn-frontend", "unet 640x32", "contiguous", "bf16", "no node for this norm"),
    ("cudnn-frontend", "resnet stem", "contiguous", "bf16", "its backward takes channels_last only"),
    ("cudnn-frontend", "image instance", "contiguous", "fp16", "its backward takes channels_last only"),
    ("cudnn-frontend", "nnunet 320x8", "channels_last_3d", "fp64", "no fp64"),
    ("quack", "vit-b", "contiguous", "fp64", "no fp64"),
    ("torch, cuDNN off", "resnet stem", "contiguous", "bf16", "eager does not use cuDNN here either"),
    ("apex group_norm", "unet 640x32", "contiguous", "bf16", "GroupNorm in channels_last only"),
    ("apex groupbn", "resnet stem", "channels_last", "bf16", "BatchNorm in fp16 and channels_last only"),
])  # fmt: skip
def test_reasons_to_skip(provider: str, case: str, memory_format: str, dtype: str, reason: str) -> None:
    (found,) = (p for p in PROVIDERS if p.name == provider)
    assert found.reason(BY_NAME[case], memory_format, timing.providers.DTYPES[dtype]) == reason


class FakeNode:
    def __getattr__(self, name: str) -> Callable[..., FakeNode]:
        return lambda *_: self

    def set_uid(self, uid: int) -> FakeNode:
        self.uid = uid
        return self


class FakeCudnn:
    """cuDNN as its frontend shows it: graphs that note their tensors and compute nothing."""

    data_type = SimpleNamespace(HALF="HALF", BFLOAT16="BFLOAT16", FLOAT="FLOAT")
    norm_forward_phase = SimpleNamespace(TRAINING="TRAINING")
    heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, list[int]]] = {}
        self.nodes: list[tuple[str, dict[str, Any]]] = []
        self.packs: list[dict[int, torch.Tensor]] = []

    def create_handle(self) -> None: ...
    def set_stream(self, handle: Any, stream: int) -> None: ...
    def validate(self) -> None: ...
    def build_operation_graph(self) -> None: ...
    def create_execution_plans(self, modes: list[str]) -> None: ...
    def check_support(self) -> None: ...
    def build_plans(self) -> None: ...

    def pygraph(self, **_: Any) -> FakeCudnn:
        return self

    def get_workspace_size(self) -> int:
        return 0

    def tensor(self, name: str, dim: list[int], uid: int, **_: Any) -> str:
        self.tensors[name] = uid, dim
        return name

    def rmsnorm(self, **given: Any) -> list[FakeNode]:
        self.nodes.append(("rmsnorm", given))
        return [FakeNode(), FakeNode()]

    def rmsnorm_backward(self, **given: Any) -> list[FakeNode | None]:
        self.nodes.append(("rmsnorm_backward", given))
        return [FakeNode(), FakeNode(), None]

    def execute(self, pack: dict[int, torch.Tensor], *_: Any, **__: Any) -> None:
        self.packs.append(pack)


def test_rms_norm_reaches_cudnn_as_rows_without_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCudnn()
    monkeypatch.setitem(sys.modules, "cudnn", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    cudnn_graph.build.cache_clear()
    cudnn_graph.handle.cache_clear()
    case = BY_NAME["head norm 128"]
    inputs = Job(case, "contiguous", "bf16").inputs(case.small, 0)
    (y,) = by_cudnn(case, inputs)
    timing.gradient((y,), inputs)
    rows, n = case.small[0] * case.small[1] * case.small[2], case.small[-1]
    assert y.shape == inputs["x"].shape and inputs["x"].dim() == 4
    (forward, given), (backward, given_back) = fake.nodes
    assert (forward, backward) == ("rmsnorm", "rmsnorm_backward")
    assert given["bias"] is None and given_back["has_dbias"] is False and "bias" not in fake.tensors
    assert {name: shape for name, (_, shape) in fake.tensors.items()} == {
        "input": [rows, n, 1, 1], "scale": [1, n, 1, 1], "epsilon": [1] * 4, "grad": [rows, n, 1, 1],
        "inv_variance": [rows, 1, 1, 1],
    }  # fmt: skip
    assert 0 not in {*fake.packs[0], *fake.packs[1]}, "cuDNN takes the id 0 for a tensor that is missing"
    assert [len(pack) for pack in fake.packs] == [5, 6]
    cudnn_graph.build.cache_clear()
    cudnn_graph.handle.cache_clear()


def test_what_is_not_installed_says_so() -> None:
    (apex,) = (p for p in PROVIDERS if p.name == "apex group_norm")
    reason = apex.reason(BY_NAME["unet 640x32"], "channels_last", torch.bfloat16)
    assert reason is None or reason.startswith(("not installed: apex", "apex.contrib.group_norm does not load"))


def test_a_wrong_provider_is_not_timed() -> None:
    wrong = timing.Provider("wrong", lambda case: lambda i: (i["x"] * i["weight"].sum() * i["bias"].sum(),))
    rows = timing.time_job(Job(BY_NAME[TINY], "contiguous", "fp32"), FakeDevice(), [wrong])
    assert [row["ok"] for row in rows] == [False] and rows[0]["error"].startswith("wrong: ")


class Held:
    """Something that a call holds, as a backward holds what its forward saved."""


class FakeGraph:
    def replay(self) -> None:
        pass


class Capturing(Cuda):
    """A device whose graphs are doubles."""

    def __init__(self) -> None:
        self._stream = None

    stream = staticmethod(nullcontext)


def test_a_replay_keeps_alive_what_its_calls_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    held = Held()
    alive = weakref.ref(held)
    replay = Capturing().capture([partial(id, held)])
    del held
    gc.collect()
    assert replay.graph and alive() is not None
    del replay
    gc.collect()
    assert alive() is None
