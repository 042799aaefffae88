"""What a call may execute: instructions for each element of x, all its launches, as the committed evidence counts them.

tests/test_evidence.py holds the evidence against the kernels as they are.
"""

from __future__ import annotations

import pytest

from bench.compare import BASELINE, read_rows

BUDGETS = {
    ("resnet 64x56 b256", "contiguous"): (16, 24),
    ("nnunet 32x128", "contiguous"): (15, 28),
    ("unet 320x64 b16", "contiguous"): (20, 35),
    ("vit-b", "contiguous"): (18, 22),
    ("head norm 128", "contiguous"): (12, 18),
    ("llama last", "contiguous"): (12, 18),
}
"""(forward, backward); BatchNorm + ReLU, InstanceNorm + leaky ReLU, GroupNorm + SiLU, rows with w and b, RMS."""


@pytest.mark.parametrize("case", BUDGETS, ids=lambda case: case[0])
def test_calls_stay_within_their_instructions(case: tuple[str, str]) -> None:
    rows = [row for row in read_rows(BASELINE)["rows"] if (row["case"], row["format"]) == case]
    executed = {row["direction"]: row["instructions_per_element"] for row in rows}
    for direction, budget in zip(("forward", "backward"), BUDGETS[case], strict=True):
        assert executed[direction] <= budget, f"{direction}: {executed[direction]} > {budget}"
