"""The registered operators on ``torch.distributed.tensor.DTensor``: which shards they take, and which they return.

An axis of x that is kept, and that the pattern does not split, may be sharded: nothing is summed across it but the
gradients of parameters, and those are partial sums where the parameters do not vary along it.  With given statistics
nothing is averaged, so every axis counts as kept.  Whatever else comes is redistributed first, as DTensor does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from . import operators
from .form import Form

Sharding = tuple[list[Any], list[Any]]
"""Placements of the tensors that an operator returns, and of its arguments: None for what is no tensor."""


class Cut(NamedTuple):
    """Placements that go together along one axis of the mesh."""

    x: Any
    parameter: Any
    gradient: Any
    """Of weight and bias."""
    statistic: Any


@cache
def register() -> None:
    """Teach DTensor the operators.  Not when normops is imported, for ``torch.distributed.tensor`` takes a second to
    import, which who holds a DTensor has paid already."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for operator, rule in ((operators.forward, _forward), (operators.backward, _backward)):
        register_sharding(operator)(rule)
        # What a rule says is remembered for the same placements and the same arguments from the first int on.  There
        # is no int here: without this, a norm would be sharded as another norm of the same operands was.
        first = [argument.name for argument in operator._schema.arguments].index("pattern")
        propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(first, needs_pytree=True)


def meet(x: Any) -> None:
    """register(), if x is a DTensor."""
    if type(x).__name__ == "DTensor":
        register()


def _cuts(form: Form, parameter: Any, statistic: Any, given: bool) -> Iterator[Cut]:
    """The ways to place a norm's tensors: all replicated, then along each axis of x that may be sharded.

    parameter and statistic stand for weight or bias, and for mean or rstd; their ranks are what counts.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()
    yield Cut(whole, whole, whole, whole)
    kept = [i for i in range(sum(form.ranks)) if i not in form.reduced]
    named = statistic is None or statistic.ndim == len(kept)
    i = 0
    for axis, rank in enumerate(form.ranks):
        at, i = i, i + rank
        if rank > 1 or (at in form.reduced and not given):
            continue
        if at in kept and not named:
            continue
        along: Any = Shard(kept.index(at)) if at in kept else whole
        if at not in form.affine or parameter is None:
            yield Cut(Shard(axis), whole, Partial(), along)
        elif parameter.ndim == len(form.affine):
            with_x = Shard(form.affine.index(at))
            yield Cut(Shard(axis), with_x, with_x, along)


def _placed(tensors: Sequence[Any], placements: Sequence[Any]) -> list[Any]:
    return [None if t is None else placement for t, placement in zip(tensors, placements, strict=True)]


def _returned(present: Sequence[bool], placements: Sequence[Any], absent: Any) -> list[Any]:
    """What is absent is returned too, with shape (0,)."""
    return [placement if here else absent for here, placement in zip(present, placements, strict=True)]


def _forward(
    x: Any, weight: Any, bias: Any, pre_add: Any, post_add: Any, mean: Any, var: Any, pattern: str, affine: str,
    lengths: Any, center: bool, eps: float, activation: str, out_dtype: torch.dtype | None,
) -> list[Sharding]:  # fmt: skip
    cuts = list(_cuts(Form.read(pattern, affine), weight if bias is None else bias, var, var is not None))
    present = (True, pre_add is not None, center, True)
    tensors = (x, weight, bias, pre_add, post_add, mean, var)
    return [
        (
            _returned(present, (c.x, c.x, c.statistic, c.statistic), cuts[0].x),
            [
                *_placed(tensors, (c.x, c.parameter, c.parameter, c.x, c.x, c.statistic, c.statistic)),
                *(None,) * 7,
            ],
        )
        for c in cuts
    ]


def _backward(
    dy: Any, dsum: Any, x: Any, weight: Any, bias: Any, post_add: Any, mean: Any, rstd: Any, pattern: str,
    affine: str, lengths: Any, center: bool, given: bool, eps: float, activation: str, output_mask: Sequence[bool],
) -> list[Sharding]:  # fmt: skip
    cuts = list(_cuts(Form.read(pattern, affine), weight if bias is None else bias, rstd, given))
    present = [
        t is not None and wanted for t, wanted in zip((x, weight, bias, post_add), output_mask, strict=True)
    ]
    tensors = (dy, dsum, x, weight, bias, post_add, mean, rstd)
    whole = cuts[0].x
    return [
        (
            _returned(present, (c.x, c.gradient, c.gradient, c.x), whole),
            [
                *_placed(
                    tensors,
                    (c.x, c.x, c.x, c.parameter, c.parameter, c.x, c.statistic if center else whole, c.statistic),
                ),
                *(None,) * 8,
            ],
        )
        for c in cuts
    ]
