"""What runs inside a block: the plan of every call of normops, forward and backward, and its operands by name."""

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
    """One direction of one call, as it ran.

    >>> import torch, normops
    >>> from normops.testing import Planned, plans
    >>> with plans() as planned:
    ...     y = normops.functional.rms_norm(torch.randn(2, 4), (4,))
    >>> type(planned[0]) is Planned, planned[0].itemsizes["x"], planned[0].operands["y"].shape
    (True, 4, torch.Size([2, 4]))
    """

    plan: Plan
    itemsizes: dict[str, int]
    """Operand that was there, workspace included -> bytes of one of its elements, as ``cost`` takes them."""
    nbytes: dict[str, int]
    """Operand -> its bytes."""
    operands: dict[str, Tensor]


@contextmanager
def plans() -> Iterator[list[Planned]]:
    """Yields a list that takes up every plan that runs inside the block, in order, and keeps its operands alive.

    Works wherever normops launches: on a GPU, in Triton's interpreter, and on a virtual device.

    >>> import torch, normops
    >>> from normops.testing import plans
    >>> with plans() as planned:
    ...     y = normops.functional.layer_norm(torch.randn(2, 4), (4,))
    >>> planned[0].plan.engine, planned[0].nbytes["y"]
    ('resident', 32)
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
