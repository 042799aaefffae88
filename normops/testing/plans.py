"""What runs inside a block: the plan of every call of normops, forward and backward, and its operands by name.

>>> with plans() as planned:
...     y = normops.functional.layer_norm(x, (64,))
>>> planned[0].plan.engine, planned[0].nbytes["y"]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from ..launch import Step
from ..plan import Plan

WHOLE = ("saved", "scratch")
"""Tensors that operands are pieces of."""


class Planned(NamedTuple):
    """One direction of one call, as it ran."""

    plan: Plan
    itemsizes: dict[str, int]
    """Operand that was there, workspace included -> bytes of one of its elements, as ``normops.cost`` takes them."""
    nbytes: dict[str, int]
    """Operand -> its bytes."""
    operands: dict[str, Tensor]


@contextmanager
def plans() -> Iterator[list[Planned]]:
    """Yields a list that takes up every plan that runs inside the block, in order, and keeps its operands alive.

    Works wherever normops launches: on a GPU, in Triton's interpreter, and on a virtual device.
    """
    found: list[Planned] = []
    launch = Step.launch

    def recorded(self: Step, tensors: tuple[Tensor | None, ...], scalars: tuple[float, ...], device: int) -> None:
        launch(self, tensors, scalars, device)
        given = self.operands(tensors, scalars).items()
        operands = {name: t for name, t in given if isinstance(t, Tensor) and name not in WHOLE}
        found.append(Planned(
            self.plan, {name: t.element_size() for name, t in operands.items()},
            {name: t.nbytes for name, t in operands.items()}, operands,
        ))  # fmt: skip

    Step.launch = recorded  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Step.launch = launch  # type: ignore[method-assign]
