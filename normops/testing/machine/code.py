"""Reads machine code of NVIDIA GPUs (sm_80 and newer) as cuobjdump prints it: instructions, and what their control bits
say of waiting."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);"
    r"\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)
_FUNCTION = re.compile(r"Function : (\S+)")
_OPERAND = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
_REGISTER = re.compile(r"U?R\d+$")
PREDICATE = re.compile(r"!?U?P(?:\d|T)$")

COUNTED = {
    "SHFL": "shuffles", "MUFU": "mufu", "BAR": "barriers", "LDS": "shared_loads", "LDSM": "shared_loads",
    "STS": "shared_stores", "STSM": "shared_stores", "ATOMS": "shared_stores", "LDL": "local", "STL": "local",
    "LDG": "loads", "LDGSTS": "loads", "UBLKCP": "loads", "UTMALDG": "loads", "STG": "stores", "UTMASTG": "stores",
    "ATOMG": "atomics", "ATOM": "atomics", "RED": "atomics", "REDG": "atomics", "MEMBAR": "fences",
}  # fmt: skip
"""Instruction -> what it counts as, beside an instruction.  MUFU: exp2, reciprocal, root, ..., 16 a clock and SM."""
KINDS = ("instructions", *dict.fromkeys(COUNTED.values()))


class Instruction(NamedTuple):
    """One instruction.

    ``waits``, ``sets``, ``frees``: numbers of the six counters by which a warp waits for what takes a variable time
    (loads, shuffles, ...): those it waits for, and those that wait for its result and until its operands were read.
    ``stall``: cycles before the warp issues the next one.
    """

    address: int
    guard: str | None
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    stall: int
    sets: int | None
    frees: int | None
    waits: tuple[int, ...]

    @property
    def head(self) -> str:
        return self.parts[0]

    @property
    def width(self) -> int:
        """Bits that one thread moves."""
        sizes = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return next((sizes[part] for part in self.parts[1:] if part in sizes), 32)

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = [o for o in self.operands if o.startswith("0x")]
        return int(found[-1], 16) if found else None

    def registers(self) -> tuple[str, ...]:
        """Operands that are registers, or constants in their place, without predicates."""
        return tuple(o for o in self.operands if not PREDICATE.match(o))

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:04x} {guard}{'.'.join(self.parts)} {', '.join(self.operands)}".rstrip()


def _control(high: int) -> tuple[int, int | None, int | None, tuple[int, ...]]:
    """The control bits, 105 to 121 of an instruction: stall, and numbers of counters (7: none)."""
    stall, sets, frees, waits = high >> 41 & 15, high >> 46 & 7, high >> 49 & 7, high >> 52 & 63
    found = tuple(i for i in range(6) if waits >> i & 1)
    return stall, sets if sets < 6 else None, frees if frees < 6 else None, found


def read(text: str, function: str) -> list[Instruction]:
    """The instructions of one function, in order.  Raises ValueError where cuobjdump lists no such function."""
    parts = _FUNCTION.split(text)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    if function not in bodies:
        raise ValueError(f"function must be one of {', '.join(bodies) or 'none'}, got {function!r}")
    found = []
    for m in _LINE.finditer(bodies[function]):
        operands = tuple(o.strip().replace(".reuse", "") for o in _OPERAND.findall(m["rest"]) if o.strip())
        found.append(Instruction(
            int(m["address"], 16), m["guard"], tuple(m["name"].split(".")), operands, *_control(int(m["high"], 16))
        ))  # fmt: skip
    places = {i.address: k for k, i in enumerate(found)}
    return [
        i._replace(parts=("BRA",)) if i.head == "CALL" and not _comes_back(found, places, i.target) else i
        for i in found
    ]


def _comes_back(code: Sequence[Instruction], places: dict[int, int], target: int | None) -> bool:
    """Whether what is called returns: compilers also call what ends the program."""
    seen: set[int] = set()
    todo = [places.get(target, len(code)) if target is not None else len(code)]
    while todo:
        k = todo.pop()
        if k == len(code) or code[k].head == "RET":
            return True
        if k not in seen:
            seen.add(k)
            todo += [n for n in _follows(code, places, k) if n < len(code)]
    return False


def is_register(operand: str) -> bool:
    return bool(_REGISTER.match(operand))


def _follows(code: Sequence[Instruction], places: dict[int, int], i: int) -> tuple[int, ...]:
    """Instructions that may be executed after the i-th; len(code): the end."""
    end, here = len(code), code[i]
    after = min(i + 1, end)
    if here.head in ("EXIT", "RET"):
        return (after, end) if here.guard else (end,)
    if here.head == "BRA" and here.target is not None and here.parts[-1] != "DIV":
        conditional = here.guard or any(PREDICATE.match(o) and o.lstrip("!U") != "PT" for o in here.operands)
        target = places.get(here.target, end)
        return (after, target) if conditional else (target,)
    return (after,)


def meeting_points(code: Sequence[Instruction]) -> list[int]:
    """For each instruction the first one that is executed after it whichever way is taken (len(code): none).

    The immediate postdominator, found as by K. D. Cooper, T. J. Harvey, K. Kennedy, A Simple, Fast Dominance Algorithm.
    """
    places, end = {instruction.address: i for i, instruction in enumerate(code)}, len(code)
    follows = [_follows(code, places, i) for i in range(end)]
    before: list[list[int]] = [[] for _ in range(end + 1)]
    for i, nexts in enumerate(follows):
        for n in nexts:
            before[n].append(i)
    # Numbers in the order in which a walk backwards from the end leaves an instruction; the end has the highest.
    order: dict[int, int] = {}
    seen, stack = {end}, [(end, iter(before[end]))]
    while stack:
        node, rest = stack[-1]
        unseen = next((p for p in rest if p not in seen), None)
        if unseen is None:
            order[node] = len(order)
            stack.pop()
        else:
            seen.add(unseen)
            stack.append((unseen, iter(before[unseen])))
    found = {end: end}

    def meet(a: int, b: int) -> int:
        while a != b:
            while order[a] < order[b]:
                a = found[a]
            while order[b] < order[a]:
                b = found[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in sorted(order, key=lambda n: -order[n])[1:]:
            known = [n for n in follows[node] if n in found]
            if not known:
                continue
            new = known[0]
            for n in known[1:]:
                new = meet(new, n)
            if found.get(node) != new:
                found[node] = new
                changed = True
    return [found.get(i, end) for i in range(end)]
