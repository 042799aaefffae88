"""Kernels run on the GPU where there is one, in Triton's interpreter elsewhere; fresh memory is NaN either way."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are decorated: before anything imports normops

from triton.runtime import interpreter

from normops import launch

torch.set_num_threads(1)  # pytest -n shares out the cores


class _Prepared:
    """Prepares triton.language once for each function of a launch: the interpreter does so at every call of a jit
    function and undoes it after, half of its time."""

    def __init__(self) -> None:
        self._prepare, self._launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
        self._scopes: dict[Any, Any] | None = None

    def prepare(self, function: Any) -> Any:
        if self._scopes is None:
            return self._prepare(function)
        if function not in self._scopes:
            self._scopes[function] = self._prepare(function)
        return self

    def restore(self) -> None:
        """Called at the end of every function; what was prepared stays until the end of the launch."""

    def launch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if self._scopes is not None:  # a launch inside a launch
            return self._launch(executor, *args, **kwargs)
        self._scopes = {}
        try:
            return self._launch(executor, *args, **kwargs)
        finally:
            scopes, self._scopes = self._scopes, None
            for scope in reversed(scopes.values()):
                scope.restore()


if launch.INTERPRETED and hasattr(interpreter, "_patch_lang"):
    _prepared = _Prepared()
    interpreter._patch_lang = _prepared.prepare
    interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: _prepared.launch(self, *args, **kwargs)


class _Poisoned:
    """torch, but empty tensors hold NaN: what a kernel forgets to write, or reads before it is written, shows."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = torch.empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    @staticmethod
    def empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = torch.empty_like(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "torch", _Poisoned())


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
