"""Triton's interpreter at twice its speed: triton.language is prepared once for each function of a launch."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

from ..compiled import INTERPRETED


class _Prepared:
    """Stands for what the interpreter does at every call of a jit function, and undoes after."""

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


_prepared: _Prepared | None = None


def prepare_once() -> None:
    """From now on, let the interpreter prepare triton.language once for each function of a launch, not at each call: no
    value changes, and kernels made of many functions run in half the time.

    Does nothing outside the interpreter, or in a version of Triton that works otherwise.

    >>> from normops.testing import prepare_once
    >>> prepare_once()
    """
    global _prepared
    if _prepared is not None or not INTERPRETED or not hasattr(interpreter, "_patch_lang"):
        return
    prepared = _prepared = _Prepared()
    interpreter._patch_lang = prepared.prepare
    interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: prepared.launch(self, *args, **kwargs)
