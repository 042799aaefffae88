"""Mutants of tests/mutants.py that do the same: by module, the line as it would be changed, and why."""

from __future__ import annotations

ONE = "a sum of one term is that term"

EQUIVALENT = {
    "layout": {
        "return all(s >= 0 for s in seen) and all(a >= b for a, b in pairwise(seen))": "`seen` has no 0",
    },
    "sums": {
        "if F.LANE >= 1:": "the same sums, with a change of layout, or through shared memory",
        "if S >= 4:": ONE,
        "if F.KEPT_FIRST and F.BLOCK_K >= 1 and (F.BLOCK_S if AXIS == 1 else F.BLOCK_A) == 1:": "the same sum of a row",
        "if F.PTX or not (F.KEPT_FIRST and (F.BLOCK_S if AXIS == 1 else F.BLOCK_A) == 1):":
            "the same two sums elsewhere than on NVIDIA, for which nothing here is counted",
        "if F.BLOCK_S >= 1:": ONE,
        "if F.BLOCK_A >= 1:": ONE,
        "if PER >= 1:": ONE,
    },
}  # fmt: skip
