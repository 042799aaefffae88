"""Reads PTX: accesses to global memory, and which kernel parameter their addresses come from.

PTX out of LLVM gives nearly every register one value, so that following registers back without regard to control flow
loses next to nothing.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

# A statement: after a line's start or another one's end, perhaps a guard, then the instruction and its operands.
_STATEMENT = re.compile(r"(?m)(?:^|[;{}:])\s*(?:@!?[%\w]+\s+)?([a-z]\w*(?:\.[\w:]+)*)\b([^;]*)(?=;)")
_FUNCTION = re.compile(r"\.(entry|func)\b\s*(?:\([^)]*\)\s*)?([\w$]+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"')
_LINE = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n/]*(?://([^\n]*))?")
_INLINED = re.compile(r"([^\s\[\]@/]+:\d+):\d+")
_REGISTER = re.compile(r"%?[A-Za-z_]\w*")
_VECTOR = re.compile(r"v([248])")
_TYPE = re.compile(r"[busf](\d+)")
_PASSED_ON = ("shared", "local", "param")


class Instruction(NamedTuple):
    function: str
    entry: bool
    parts: tuple[str, ...]
    operands: str
    lines: frozenset[str] = frozenset()
    """Files and lines of the source: where it stands, and where the functions were called that were inlined."""

    def space(self) -> str:
        """The state space, without its scope; "" for a generic address or none."""
        spaces = (part.split("::")[0] for part in self.parts)
        return next((s for s in spaces if s in ("global", *_PASSED_ON)), "")

    def addresses(self) -> list[str]:
        return re.findall(r"\[([^\]]*)\]", self.operands)


class Access(NamedTuple):
    kind: str
    """"load" or "store"."""
    bits: int
    parameters: frozenset[int]
    """Numbers of the kernel's parameters that the address may come from."""
    lines: frozenset[str] = frozenset()
    """Files and lines of the source."""


def instructions(text: str) -> Iterator[Instruction]:
    files = dict(_FILE.findall(text))
    lines: list[tuple[int, frozenset[str]]] = [(0, frozenset())]
    for m in _LINE.finditer(text):
        lines.append((m.start(), frozenset({f"{files.get(m[1], '')}:{m[2]}", *_INLINED.findall(m[3] or "")})))
    starts = [start for start, _ in lines]
    text = re.sub(r"/\*.*?\*/|//[^\n]*", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    functions = [(m.start(), m[1] == "entry", m[2]) for m in _FUNCTION.finditer(text)]
    for i, (start, entry, name) in enumerate(functions):
        end = functions[i + 1][0] if i + 1 < len(functions) else len(text)
        for found in _STATEMENT.finditer(text, start, end):
            where = lines[bisect(starts, found.start()) - 1][1]
            yield Instruction(name, entry, tuple(found[1].split(".")), found[2], where)


def _access(instruction: Instruction) -> tuple[str, int, str] | None:
    """(load or store, bits, the registers of the address), if it is an access to global memory."""
    parts, addresses = instruction.parts, instruction.addresses()
    if parts[:2] == ("cp", "async") and "bulk" not in parts and len(addresses) == 2:
        size = instruction.operands.rsplit("]", 1)[1].split(",")[1]
        return "load", 8 * int(size, 0), addresses[1]
    if parts[0] not in ("ld", "st") or instruction.space() != "global":
        return None
    vector = next((int(m[1]) for p in parts if (m := _VECTOR.fullmatch(p))), 1)
    bits = next(int(m[1]) for p in reversed(parts) if (m := _TYPE.fullmatch(p)))
    return "load" if parts[0] == "ld" else "store", vector * bits, addresses[0]


def _split(operands: str) -> tuple[str, str]:
    """The destination, which may be a vector in braces, and the rest."""
    operands = operands.strip()
    cut = operands.find("}") + 1 if operands.startswith("{") else operands.find(",")
    return (operands, "") if cut <= 0 else (operands[:cut], operands[cut:])


def _flows(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Registers that an instruction writes, and those that it reads; a parameter of the kernel is one of them.

    Memory that threads pass values on through is one register per state space, shared by all functions.
    """
    head, function = instruction.parts[0], instruction.function
    space = instruction.space()
    memory = f"[{space}]"

    def registers(text: str) -> list[str]:
        return [f"{function} {name}" for name in _REGISTER.findall(text)]

    if head == "ld" and space in _PASSED_ON:
        written, address = registers(_split(instruction.operands)[0]), instruction.addresses()[0]
        # The kernel's own parameters, perhaps one of several that a register tells; else what a call handed over.
        own = space == "param" and instruction.entry and ("%" in address or f"{function}_param_" in address)
        return written, registers(address) if own else [memory]
    if head == "st" and space in _PASSED_ON:
        return [memory], registers(instruction.operands.rsplit("]", 1)[1])
    # What comes out of memory or of a comparison is no address that went in.
    if head in ("ld", "st", "atom", "red", "setp", "bra", "call", "cp"):
        return [], []
    target, sources = _split(instruction.operands)
    return registers(target), registers(sources)


def _origins(code: list[Instruction], pointers: frozenset[int]) -> dict[str, frozenset[int]]:
    """Register -> parameters that its value may come from."""
    origins: dict[str, frozenset[int]] = defaultdict(frozenset)
    flows = [flow for i in code if (flow := _flows(i))[0]]
    for name in {i.function for i in code if i.entry}:
        origins |= {f"{name} {name}_param_{number}": frozenset([number]) for number in pointers}
    changed = True
    while changed:
        changed = False
        for targets, sources in flows:
            found = frozenset[int]().union(*(origins[s] for s in sources if s in origins))
            for target in targets:
                if not found <= origins[target]:
                    origins[target] |= found
                    changed = True
    return origins


def accesses(text: str, pointers: frozenset[int]) -> tuple[Access, ...]:
    """Every access to global memory; `pointers`: numbers of the parameters that are pointers."""
    code = list(instructions(text))
    origins = _origins(code, pointers)
    found = []
    for instruction in code:
        if access := _access(instruction):
            kind, bits, address = access
            registers = [f"{instruction.function} {name}" for name in _REGISTER.findall(address)]
            parameters = frozenset[int]().union(*(origins[r] for r in registers))
            found.append(Access(kind, bits, parameters, instruction.lines))
    return tuple(found)


def barriers(text: str) -> int:
    """Instructions that wait for the other warps of the program (or of its cluster)."""
    return sum(
        i.parts[0] in ("bar", "barrier") and "warp" not in i.parts and "arrive" not in i.parts
        for i in instructions(text)
    )


def atomics(text: str) -> int:
    """Atomic operations that are not on shared memory."""
    return sum(i.parts[0] in ("atom", "red") and i.space() != "shared" for i in instructions(text))


def arrays(text: str) -> int:
    """Bytes per thread of arrays that the program itself keeps in local memory."""
    return sum(int(n) for n in re.findall(r"\.local\b[^;\[]*\.b8\s+\w+\[(\d+)\]", text))


def threads(text: str) -> int | None:
    """Threads that the kernel must be launched with."""
    found = re.search(r"\.reqntid\s+(\d+)", text)
    return int(found[1]) if found else None
