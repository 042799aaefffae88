"""PyTorch's own samples of its norms: ours is as near to float64, with kernels and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("expecttest")  # PyTorch's samples need it
from tests.samples import DTYPES, NORMS, SAMPLES, errors, faults


@pytest.mark.parametrize("norm", NORMS)
def test_kernels(norm: str) -> None:
    for dtype in DTYPES:
        assert not list(faults(norm, dtype))
    assert not list(errors(norm))


def test_plain(plain: Callable[[str], str]) -> None:
    found = plain("""
from tests.samples import DTYPES, NORMS, errors, faults
found = [f for norm in NORMS for dtype in DTYPES for f in faults(norm, dtype)] + [e for n in NORMS for e in errors(n)]
print(len(found), *found[:5], sep="\\n")
""")
    assert found == "0"


def test_there_are_samples() -> None:
    assert set(SAMPLES) == set(NORMS)
