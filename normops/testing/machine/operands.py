"""Operands of instructions: each is turned once into a function of a warp that reads its value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .code import PREDICATE, Instruction
from .lanes import M32, M64, Value, inverted

Warp = Any
Act = Callable[[Warp], None]
Read = Callable[[Warp], Value]


def pair(register: str, n: int = 1) -> str:
    """The n-th register after this one."""
    found = re.match(r"(U?R)(\d+)", register)
    return f"{found[1]}{int(found[2]) + n}" if found else register


def reader(operand: str, wide: bool = False, carry: bool = False) -> Read:
    """The value of an operand: 32 bits, or with `wide` those of a pair of registers; with `carry` -x is one more than
    ~x, also where that does not fit 32 bits."""
    ones = M64 if wide else M32
    text = operand
    negative = text.startswith("-")
    text = text.removeprefix("-")
    flipped = text.startswith("~")
    text = text.removeprefix("~")
    base: Read
    if text in ("RZ", "URZ", "SRZ"):
        base = constant(0)
    elif text.startswith(("c[", "cx[")):
        base = bank(text, wide)
    elif m := re.fullmatch(r"(U?R\d+)(?:\.64)?", text):
        base = register(m[1], wide)
    else:
        number = literal(text)
        if number is not None and negative:
            return constant(-number & ones)
        base = constant(number)
    if flipped:
        return lambda w: None if (v := base(w)) is None else v ^ ones
    if negative and carry:
        return lambda w: None if (v := base(w)) is None else (v ^ ones) + 1
    if negative:
        return lambda w: None if (v := base(w)) is None else ((v ^ ones) + 1) & ones
    return base


def constant(v: Value) -> Read:
    return lambda w: v


def register(name: str, wide: bool = False) -> Read:
    if not wide:
        return lambda w: w.registers.get(name, 0)
    high = pair(name)

    def value(w: Warp) -> Value:
        a, b = w.registers.get(name, 0), w.registers.get(high, 0)
        return None if a is None or b is None else a | b << 32

    return value


def bank(text: str, wide: bool) -> Read:
    """A constant, of which the kernel's parameters are the known ones."""
    m = re.match(r"cx?\[[^\]]*\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]", text)
    if not m or not text.startswith("c[0x0]"):
        return constant(None)
    index, at = reader(m[1]) if m[1] else constant(0), int(m[2] or "0", 16)

    def value(w: Warp) -> Value:
        i = index(w)
        if not isinstance(i, int):
            return None
        a, b = w.constants.get(at + i & M32), w.constants.get(at + i + 4 & M32)
        return a if not wide else None if a is None or b is None else a | b << 32

    return value


def literal(text: str) -> int | None:
    try:
        return int(text, 0) & M32
    except ValueError:
        pass
    try:
        return int(np.float32(float(text)).view(np.uint32))
    except ValueError:
        return None


def predicate(text: str) -> Read:
    name = text.lstrip("!")
    if name in ("PT", "UPT"):
        fixed = not text.startswith("!")
        return lambda w: fixed
    if text.startswith("!"):
        return lambda w: inverted(w.predicates.get(name, False))
    return lambda w: w.predicates.get(name, False)


def split(i: Instruction) -> tuple[list[str], list[str], list[str]]:
    """(predicates before the sources, registers and constants, predicates after them); the destination comes first in
    the second list."""
    first = next((k for k, o in enumerate(i.operands) if not PREDICATE.match(o)), 0)
    sources = [k for k, o in enumerate(i.operands) if k > first and not PREDICATE.match(o)]
    start = sources[0] if sources else len(i.operands)
    outs = [o for k, o in enumerate(i.operands) if PREDICATE.match(o) and k < start]
    ins = [o for k, o in enumerate(i.operands) if PREDICATE.match(o) and k > start]
    return outs, list(i.registers()), ins


def place(i: Instruction) -> Read:
    """The address in brackets: 32 bits of shared and local memory, 64 of global memory."""
    text = next(o for o in i.operands if "[" in o and not o.startswith(("c[", "cx[")))
    text = re.sub(r"^.*desc\[[^\]]*\]", "", text).strip("[]")
    parts = []
    for part in text.split("+"):
        m = re.match(r"(-?U?R\w+|-?0x[0-9a-f]+)((?:\.\w+)*)$", part)
        if not m:
            return constant(None)
        scale = next((int(s) for s in re.findall(r"\.X(\d+)", m[2])), 1)
        parts.append((reader(m[1], wide=".64" in m[2]) if m[1][0] in "RU" else constant(int(m[1], 16)), scale))

    def value(w: Warp) -> Value:
        t: Value = 0
        for read, scale in parts:
            v = read(w)
            if v is None:
                return None
            t = t + v * scale if isinstance(v, np.ndarray) or v >= 0 else t - (-v)
        return t

    return value


def size(i: Instruction) -> int:
    """Registers that an instruction writes whose result is not followed."""
    if i.head in ("HMMA", "IMMA"):
        return 4
    if "M88" in i.parts:
        return int(i.parts[-1]) if i.parts[-1] in "24" else 1
    if i.head[0] == "D" or i.head in ("FADD2", "FMUL2", "FFMA2") or any("64" in part for part in i.parts):
        return 2
    return min(4, max(1, i.width // 32))
