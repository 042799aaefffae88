"""Compiled variants: Triton compiles a kernel anew for each signature, combination of constants and number of warps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple

from triton import knobs
from triton.runtime import jit


class Variant(NamedTuple):
    """One of them, by the same name in every process."""

    kernel: str
    key: str
    """Digest of what Triton tells variants of a kernel apart by."""


@contextmanager
def variants(compile: bool = True) -> Iterator[list[Variant]]:
    """Yields a list that takes up what Triton has to compile inside the block, in order.

    `compile=False`: nothing is compiled or launched, so every request is one that has to be compiled (and a call of
    normops asks for all of its kernels before it launches them).
    """
    found: list[Variant] = []
    before = knobs.runtime.jit_cache_hook

    def hook(*, key: Any, fn: Any, **given: Any) -> bool:
        found.append(Variant(fn.name.rpartition(".")[2], sha256(str(key).encode()).hexdigest()[:16]))
        return not compile or bool(before and before(key=key, fn=fn, **given))

    # What a hook is told besides: before Triton 3.7 it cannot be formed where a constant is a function.
    serialize = jit.serialize_specialization_data
    jit.serialize_specialization_data = lambda *_, **__: ""
    knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before
        jit.serialize_specialization_data = serialize


def counted(found: Iterable[Variant]) -> dict[str, int]:
    """Kernel -> its variants, the most first."""
    return dict(Counter(variant.kernel for variant in set(found)).most_common())
