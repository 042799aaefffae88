"""The registered operators on ``torch.distributed.tensor.DTensor``: which shards they take, and which they return.

An axis of x that is kept, and that the pattern does not split, may be sharded: nothing is summed across it but the
gradients of parameters, and those are partial sums where the parameters do not vary along it.  With given statistics
nothing is averaged, so every axis counts as kept.  Whatever else comes is redistributed first, as DTensor does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any, NamedTuple

from . import operators

Sharding = tuple[list[Any], list[Any]]
"""Placements of the tensors that an operator returns, and of its arguments: None for what is no tensor."""


class Cut(NamedTuple):
    """Placements that go together along one axis of the mesh."""

    x: Any
    parameter: Any
    gradient: Any
    """Of weight and bias."""
    statistic: Any
    absent: Any
    """Of what has no elements."""


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


def register_for(x: Any) -> None:
    """register(), if x is a DTensor."""
    if type(x).__name__ == "DTensor":
        register()


def _cuts(a: operators.Forward | operators.Backward, statistic: Any) -> Iterator[Cut]:
    """The ways to place a norm's tensors: all replicated, then along each axis of x that may be sharded.

    statistic stands for mean or rstd; its rank is what counts.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    norm, parameter = operators.norm_of(a), a.weight if a.bias is None else a.bias
    whole = Replicate()
    yield Cut(whole, whole, whole, whole, whole)
    kept = [i for i in range(len(norm.shape)) if i not in norm.reduced]
    named = statistic is None or statistic.ndim == len(kept)
    i = 0
    for axis, sizes in enumerate(norm.factors):
        at, i = i, i + len(sizes)
        if len(sizes) > 1 or (at in norm.reduced and not norm.given) or (at in kept and not named):
            continue
        along: Any = Shard(kept.index(at)) if at in kept else whole
        if at not in norm.affine or parameter is None:
            yield Cut(Shard(axis), whole, Partial(), along, whole)
        elif parameter.ndim == len(norm.affine):
            with_x = Shard(norm.affine.index(at))
            yield Cut(Shard(axis), with_x, with_x, along, whole)


def _shardings(a: Any, statistic: Any, given: str, returned: str, present: Sequence[bool]) -> list[Sharding]:
    """Of each cut.  given, returned: of which kind the tensors are that an operator takes and returns; what is absent
    is returned too, with shape (0,), and lies everywhere."""
    cuts = list(_cuts(a, statistic))
    whole = cuts[0]
    return [
        (
            [getattr(c if here else whole, kind) for kind, here in zip(returned.split(), present, strict=True)],
            [
                None if t is None or kind is None else getattr(c, kind)
                for t, kind in zip_longest(a, given.split())
            ],
        )
        for c in cuts
    ]  # fmt: skip


def _forward(*arguments: Any) -> list[Sharding]:
    a = operators.Forward(*arguments)
    kinds = "x parameter parameter x x statistic statistic"
    return _shardings(a, a.var, kinds, "x x statistic statistic", (True, a.pre_add is not None, a.center, True))


def _backward(*arguments: Any) -> list[Sharding]:
    a = operators.Backward(*arguments)
    tensors = (a.x, a.weight, a.bias, a.post_add)
    present = [t is not None and wanted for t, wanted in zip(tensors, a.output_mask, strict=True)]
    kinds = f"x x x parameter parameter x {'statistic' if a.center else 'absent'} statistic"
    return _shardings(a, a.rstd, kinds, "x gradient gradient x", present)
