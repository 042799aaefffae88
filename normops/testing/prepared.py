"""Triton's interpreter without what it does in vain: it prepares triton.language again at each call of a function,
describes each block anew, and looks for integers that overflow to throw away what it finds."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

from triton.language import core
from triton.runtime import interpreter

from ..compiled import INTERPRETED

LANGUAGES = frozenset({"triton.language", "triton.language.core"})
"""Modules whose functions the interpreter replaces, where a kernel sees them."""


class _Prepared:
    """Stands for what the interpreter does at every call of a jit function, and undoes after."""

    def __init__(self) -> None:
        self._prepare, self._launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
        self._scopes: dict[Any, Any] | None = None
        self._languages: dict[Any, frozenset[str]] = {}

    def prepare(self, function: Any) -> Any:
        if self._scopes is None:
            return self._prepare(function)
        if function not in self._languages:
            modules = {v.__name__ for v in function.__globals__.values() if isinstance(v, ModuleType)}
            self._languages[function] = LANGUAGES & modules
        languages = self._languages[function]  # all that preparing looks at
        if languages not in self._scopes:
            self._scopes[languages] = self._prepare(function)
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
                if scope is not None:  # Triton before 3.6 undoes nothing
                    scope.restore()


def _remembered(of: Any) -> Any:
    """A function of a type, called once for each scalar type; pointers cannot be hashed, their names can."""
    known: dict[str, Any] = {}

    def remembered(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = of(kind)
        return known[name]

    return remembered


def _described_once() -> None:
    """Blocks of one shape and type share what is derived from these, instead of deriving it at each operation."""
    block, tensor = core.block_type.__init__, core.tensor.__init__
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(n.value if isinstance(n, core.constexpr) else n for n in shape)
        if key in types:
            vars(self).update(types[key], element_ty=element_ty)
        else:
            block(self, element_ty, shape)
            types[key] = dict(vars(self))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in tensors:
            vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)
        else:
            tensor(self, handle, type)
            tensors[type.name] = vars(self) | {"handle": None}

    core.block_type.__init__, core.tensor.__init__ = make_block, make_tensor


_prepared: _Prepared | None = None


def prepare_once() -> None:
    """From now on, let the interpreter prepare triton.language once for a launch, not at each call of a function, share
    what it derives from types, and not look for overflow: no value changes, and kernels made of many functions run in
    a quarter of the time.

    Does nothing outside the interpreter, or in a version of Triton that works otherwise.

    >>> from normops.testing import prepare_once
    >>> prepare_once()
    """
    global _prepared
    if _prepared is not None or not INTERPRETED or not hasattr(interpreter, "_patch_lang"):
        return
    prepared = _prepared = _Prepared()
    options = interpreter.interpreter_builder.options
    if getattr(options, "sanitize_overflow", False) and not options.debug:  # only debugging reads what it finds
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter._patch_lang = prepared.prepare
    _described_once()
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter.GridExecutor.__call__ = lambda self, *args, **kwargs: prepared.launch(self, *args, **kwargs)
