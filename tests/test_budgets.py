"""What a call may execute: instructions for each element of x, all its launches, as the committed evidence counts them.

tests/test_evidence.py holds the evidence against the kernels as they are.
"""

from __future__ import annotations

import pytest

from bench.compare import BASELINE, read_rows

BUDGETS = {
    # BatchNorm + ReLU, InstanceNorm + leaky ReLU, GroupNorm + SiLU: planes of 1024 pixels and more.
    ("resnet 64x56 b256", "contiguous"): (14, 20),
    ("nnunet 32x128", "contiguous"): (15, 26),
    ("unet 320x64 b16", "contiguous"): (16, 35),  # read once: two derivatives of SiLU an element
    # The same where channels lie side by side.
    ("resnet 64x56 b256", "channels_last"): (12, 19),
    ("nnunet 32x128", "channels_last_3d"): (15, 24),
    ("unet 320x64 b16", "channels_last"): (19, 34),
    ("vae 128x512", "channels_last"): (18, 32),
    # Odd planes, 7 x 7 and 13 x 17.
    ("resnet 2048x7 b32", "contiguous"): (24, 40),
    ("odd planes", "contiguous"): (20, 34),
    # Rows with w and b, with w alone, of odd lengths, too long for one program, with a sum.
    ("vit-b", "contiguous"): (14, 17),
    ("vit-l", "contiguous"): (13, 16),
    ("rows of 1001", "contiguous"): (17, 20),
    ("llama last", "contiguous"): (8, 12),
    ("head norm 128", "contiguous"): (10, 13),
    ("qwen 5120", "contiguous"): (13, 15),
    ("many long rows", "contiguous"): (13, 24),
    ("long row 131072", "contiguous"): (17, 30),
    # Channels across memory.
    ("convnext 128x56", "contiguous"): (16, 17),
    ("convnext 256x28", "contiguous"): (16, 18),
    ("convnext 1024x7", "contiguous"): (32, 41),
    # Planes of 28 x 28, whole channels of which stay on chip.
    ("resnet downsample", "contiguous"): (17, 19),
}
"""(forward, backward)"""


@pytest.mark.parametrize("case", BUDGETS, ids=lambda case: " ".join(case))
def test_calls_stay_within_their_instructions(case: tuple[str, str]) -> None:
    rows = [row for row in read_rows(BASELINE)["rows"] if (row["case"], row["format"]) == case]
    executed = {row["direction"]: row["instructions_per_element"] for row in rows}
    for direction, budget in zip(("forward", "backward"), BUDGETS[case], strict=True):
        assert executed[direction] <= budget, f"{direction}: {executed[direction]} > {budget}"
