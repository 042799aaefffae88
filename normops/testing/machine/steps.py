"""A kernel's machine code, prepared once for all walks through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .code import COUNTED, KINDS, PREDICATE, Instruction, meeting_points
from .lanes import Value, both
from .meaning import meaning
from .operands import Act, place, predicate

LATENCY = {
    "MUFU": 22, "SHFL": 24, "LDS": 30, "LDSM": 33, "LDC": 40, "LDCU": 30, "ULDC": 12, "S2R": 20, "S2UR": 20,
    "R2UR": 12, "POPC": 18, "FLO": 18, "I2F": 18, "F2I": 18, "F2F": 18, "VOTEU": 12, "BREV": 18, "ATOMS": 60, "LDL": 40,
}  # fmt: skip
"""Cycles until a result is there, of what is not computed in a fixed time and does not leave the SM.  Nominal: the
model of times scales the cycles of a warp by a factor that was fitted."""
OTHERS = 14
"""The same of what is not listed."""
ACCESSES = {"LDG": "global", "STG": "global", "LDGSTS": "global", "LDS": "shared", "STS": "shared", "LDSM": "matrix",
            "STSM": "matrix", "SHFL": "shuffle", "UTMASTG": "tile", "UTMAREDG": "tile"}  # fmt: skip
FAR = ("LDG", "LDGSTS", "ATOMG", "ATOM")
"""What leaves the SM and comes back: a wait for it is a round."""


class Step(NamedTuple):
    """An instruction, prepared."""

    i: Instruction
    act: Act | None
    guard: Any
    meets: int
    control: bool
    """Whether it may go elsewhere than to the next one."""
    latency: int
    noted: bool
    """Whether others can wait for it."""
    far: str
    """"" or what the round is of: "loads", "atomics"."""
    address: Any
    """Of an access to global or shared memory; None: no access, or a shuffle."""
    access: str
    """"": none, "global", "shared", "shuffle", ...; "announced" and "awaited": copies of whole tiles into shared
    memory, "tile": out of it."""


def guard_of(i: Instruction) -> Any:
    """Reads whether an instruction is executed: by its guard, and loads also by a predicate behind their operands."""
    texts = [i.guard] if i.guard else []
    if i.head in ("LDG", "LDGSTS", "LDS"):
        texts += [o for o in i.operands[2:] if PREDICATE.match(o)]
    reads = [predicate(text) for text in texts]
    if len(reads) < 2:
        return reads[0] if reads else None
    return lambda w: both(reads[0](w), reads[1](w))


def access_of(i: Instruction) -> str:
    """See Step.access.  A barrier in shared memory (SYNCS) is told how many bytes of bulk copies will arrive at it."""
    if i.head != "SYNCS":
        return ACCESSES.get(i.head, "")
    if "TRYWAIT" in i.parts:
        return "awaited"
    return "announced" if i.parts[1:] == ("ARRIVE", "TRANS64") and i.operands[-1] != "RZ" else ""


class Code:
    """A kernel's machine code, prepared once for all walks.  ``tile``: bytes that a bulk copy stores."""

    def __init__(self, code: Sequence[Instruction], tile: int = 0) -> None:
        self.tile = tile
        self._wavefronts: dict[Any, int] = {}
        self.places = {i.address: k for k, i in enumerate(code)}
        self.steps = [self._step(i, m) for i, m in zip(code, meeting_points(code), strict=True)]
        self.kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}
        """Kind -> instructions that count as such."""
        for k, i in enumerate(code):
            if i.head != "NOP":
                self.kinds["instructions"].append(k)
            if i.head in COUNTED:
                self.kinds[COUNTED[i.head]].append(k)

    def _step(self, i: Instruction, meets: int) -> Step:
        far, access = "", access_of(i)
        if i.head in FAR and (i.sets is not None or i.head == "LDGSTS"):
            far = "loads" if i.head in ("LDG", "LDGSTS") else "atomics"
        return Step(
            i, meaning(i), guard_of(i), meets,
            i.head in ("BRA", "EXIT", "CALL", "RET", "BRX", "JMP", "BAR", "DEPBAR", "LDGDEPBAR"),
            LATENCY.get(i.head, OTHERS), i.sets is not None or i.frees is not None, far,
            place(i) if access not in ("", "shuffle", "tile") else None, access,
        )  # fmt: skip

    def wavefronts(self, at: Value, width: int) -> int:
        """Turns of one access to shared memory: a bank gives one word of 4 bytes at a time, to all lanes that want it.

        Accesses of 64 and 128 bits come in as many parts, of 16 and 8 lanes.
        """
        words = max(1, width // 4)
        if not isinstance(at, np.ndarray):
            return 1 if at is not None else words
        key = (int(at[0]) & 127, (at - at[0]).tobytes(), words)
        known = self._wavefronts.get(key)
        if known is None:
            each = 32 // words
            known = 0
            for k in range(0, len(at), each):
                part = np.unique((at[k : k + each, None] >> 2) + np.arange(words, dtype=np.uint64)).astype(np.int64)
                known += int(np.bincount(part & 31).max())
            self._wavefronts[key] = known
        return known
