"""The rules of the schedule against the map of engines, which was predicted for an H100: bench/engines.py."""

from __future__ import annotations

import json

import pytest
import torch

from bench.engines import BASELINE, LAYOUTS, Cell, cells, regret
from bench.tune_measure import planned

ROWS = json.loads(BASELINE.read_text())["rows"]
ALONE = "LayerNorm, rows"
"""Whose engine depends on the length of a row alone, for its bits may not depend on how many there are."""


def test_every_cell_is_there() -> None:
    found = {Cell(row["layout"], row["group"], row["groups"]) for row in ROWS}
    assert found == set(cells()) and len(ROWS) == 2 * len(found)
    assert {row["layout"] for row in ROWS} == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_other_engine_is_much_faster(layout: str) -> None:
    """By a tenth at most: the model is off by six in a hundred in the median."""
    behind = {(r["direction"], r["group"], r["groups"]): round(regret(r), 2) for r in ROWS if r["layout"] == layout}
    most = 0.5 if layout == ALONE else 0.1
    assert not {place: share for place, share in behind.items() if share > most}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_map_is_that_of_the_rules(layout: str) -> None:
    """Planned anew, for a device of the same facts, without a launch."""
    chosen = {(r["group"], r["groups"], r["direction"]): r["chosen"] for r in ROWS if r["layout"] == layout}
    for cell in cells():
        if cell.layout == layout:
            with planned() as found:
                y = LAYOUTS[layout](cell.group, cell.groups)
                y.backward(torch.empty_like(y))
            for plan, direction in zip(found, ("forward", "backward"), strict=True):
                assert plan.engine == chosen[cell.group, cell.groups, direction], cell
