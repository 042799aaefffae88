"""Reads AMD's assembly: accesses to global memory, and the register counts that stand at its end."""

from __future__ import annotations

import re

_ACCESS = re.compile(r"(?m)^\s*(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_WORDS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}


def _bits(suffix: str) -> int:
    """The width of `dwordx4`, `ushort`, `short_d16_hi`, and of `b128`, `u16` from gfx12 on."""
    word = suffix.split("_")[0]
    if word in _WORDS:
        return _WORDS[word]
    if many := re.fullmatch(r"dwordx(\d)", word):
        return 32 * int(many[1])
    if plain := re.fullmatch(r"[biu](\d+)", word) or re.fullmatch(r"d16_?[biu]?(\d+)?", word):
        return int(plain[1] or 16)
    raise ValueError(f"unknown width of a memory instruction: {suffix!r}")


def accesses(text: str) -> tuple[tuple[str, int], ...]:
    """("load" or "store", bits) of every vector access to global memory (scalar loads are not among them)."""
    return tuple((kind, _bits(suffix)) for kind, suffix in _ACCESS.findall(text))


def barriers(text: str) -> int:
    return len(re.findall(r"(?m)^\s*s_barrier(?:_wait)?\b", text))


def atomics(text: str) -> int:
    return len(re.findall(r"(?m)^\s*(?:global|buffer|flat)_atomic_", text))


def figure(text: str, name: str) -> int:
    """A number out of the kernel's metadata, such as vgpr_count."""
    found = re.search(rf"(?m)^\s*\.{name}:\s*(\d+)", text)
    if not found:
        raise ValueError(f"the assembly does not say .{name}")
    return int(found[1])
