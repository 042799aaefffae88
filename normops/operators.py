"""``torch.ops.normops``: the two directions as registered operators, for everything in PyTorch that traces programs.

    forward(x, weight?, bias?, pre_add?, post_add?, mean?, var?, pattern, affine, lengths, center, eps, activation,
            out_dtype?, round_first) -> (y, sum, mean, rstd)
    backward(dy, dsum?, x, weight?, bias?, post_add?, mean, rstd, pattern, affine, lengths, center, given, eps,
             activation, output_mask) -> (dx, dw, db, dpost)

y = act((s - mean) · rstd · weight + bias + post_add) with s = x + pre_add.  pattern, affine and lengths say which axes
are averaged over, and hold no size of x (``Norm.written``); without lengths that is None, for AOTInductor loses empty
lists.  weight and bias are dense, in the order of `affine`; pre_add and post_add have x's shape.  `mean` and `var` are
given statistics.  Nothing is modified and no output aliases an input: what is absent (sum without pre_add, mean of an
RMS norm, a gradient not asked for) has shape (0,).

Eager calls of plain tensors do not come here: of a LayerNorm's forward the host would take 16 us in place of 7, and 36
in place of 10 with a gradient (a virtual H200's launches, which do nothing, on a CPU core of 2026).
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import calls, reference, rules
from .calls import Call
from .faults import KernelError
from .norm import Norm, Operands, accumulator, parse

NAMESPACE = "normops"

library = torch.library.Library(NAMESPACE, "DEF")
_FORM = "str pattern, str affine, SymInt[]? lengths, bool center"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
library.define(
    f"forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? pre_add, Tensor? post_add, Tensor? mean, Tensor? var, "
    f"{_FORM}, float eps, str activation, ScalarType? out_dtype, bool round_first) "
    f"-> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    tags=_TAGS,
)
library.define(
    f"backward(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor? bias, Tensor? post_add, Tensor mean, "
    f"Tensor rstd, {_FORM}, bool given, float eps, str activation, bool[4] output_mask) "
    f"-> (Tensor dx, Tensor dw, Tensor db, Tensor dpost)",
    tags=_TAGS,
)
forward = torch.ops.normops.forward.default
backward = torch.ops.normops.backward.default

Four = tuple[Tensor, Tensor, Tensor, Tensor]


_FORWARD = namedtuple(
    "_FORWARD",
    "x weight bias pre_add post_add mean var pattern affine lengths center eps activation out_dtype round_first",
)
_BACKWARD = namedtuple(
    "_BACKWARD",
    "dy dsum x weight bias post_add mean rstd pattern affine lengths center given eps activation output_mask",
)


class Forward(_FORWARD):
    """The arguments of ``forward``."""

    @property
    def operands(self) -> Operands:
        return Operands(*self[:7])

    @property
    def given(self) -> bool:
        return self.var is not None


class Backward(_BACKWARD):
    """The arguments of ``backward``.  x is what was normalised; where rstd is None, statistics are functions of it."""

    @property
    def operands(self) -> Operands:
        return Operands(self.x, self.weight, self.bias, None, self.post_add)


def norm_of(a: Forward | Backward) -> Norm:
    norm = parse(a.pattern, a.x.shape, a.affine, a.lengths)
    rounded = isinstance(a, Forward) and a.round_first
    return norm._replace(center=a.center, given=a.given, activation=a.activation, round_first=rounded)


def _rule(a: Forward | Backward) -> tuple[Any, ...]:
    """What the rule of a call is, as find() and norm_of() take it after the operands."""
    lengths = None if a.lengths is None else tuple(a.lengths)
    out_dtype, rounded = (a.out_dtype, a.round_first) if isinstance(a, Forward) else (None, False)
    return rules.written, (a.pattern, a.affine, lengths, a.center, a.given, rounded), a.activation, out_dtype


def _all(x: Tensor, found: Iterable[Tensor | None]) -> Four:
    """What is absent has shape (0,)."""
    first, second, third, fourth = (x.new_empty(0) if t is None else t for t in found)
    return first, second, third, fourth


def decomposed_forward(*arguments: Any, **named: Any) -> Four:
    """``forward`` as a composition of PyTorch operations."""
    a = Forward(*arguments, **named)
    y, total, mean, rstd = reference.normalize(norm_of(a), a.eps, a.operands, a.out_dtype)
    if mean is not None and a.given:
        mean = mean.clone()
    return _all(a.x, (y, None if a.pre_add is None else total, mean, rstd))


def decomposed_backward(*arguments: Any, **named: Any) -> Four:
    """``backward`` as a composition of PyTorch operations; it is a function of x alone where rstd is None."""
    a = Backward(*arguments, **named)
    work = accumulator(a.x.dtype)
    mean, rstd = (None if t is None or t.numel() == 0 else t.to(work) for t in (a.mean, a.rstd))
    dx, dw, db, g = reference.gradients(norm_of(a), a.eps, a.operands, a.dy, mean, rstd)
    dx = dx if a.dsum is None else dx + a.dsum
    # Copies where either may be dy itself: of one value for each of x's, and nothing between.
    db = db if db is None or db.shape != a.dy.shape else db.clone()
    dpost = None if a.post_add is None else g.to(a.post_add.dtype, copy=a.activation == "identity")
    return _all(a.x, (t if wanted else None for t, wanted in zip((dx, dw, db, dpost), a.output_mask, strict=True)))


def decompositions() -> dict[Any, Callable[..., Four]]:
    """What the operators are composed of, for ``torch.export``'s ``run_decompositions`` and other tracers.

    >>> import torch, normops
    >>> sorted(str(op) for op in normops.decompositions())
    ['normops.backward.default', 'normops.forward.default']
    """
    return {forward: decomposed_forward, backward: decomposed_backward}


def _plain(t: Any) -> Any:
    """A subclass that reaches a kernel is one in name only."""
    return t.as_subclass(Tensor) if isinstance(t, Tensor) and type(t) not in calls.PLAIN else t


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _called(a: Forward | Backward) -> tuple[Call, Operands]:
    operands = a.operands._replace(weight=_dense(a.weight), bias=_dense(a.bias))
    call = calls.find(operands, *_rule(a))
    assert call is not None  # of plain tensors
    return call, operands


def _statistic(t: Tensor, call: Call) -> Tensor:
    """mean or rstd as kernels of a call write and read it."""
    t = t.reshape(call.kept_shape)
    return t if t.dtype == call.acc and t.stride() == call.kept_strides else call.statistic(t).copy_(t)


def _forward(*arguments: Any) -> Four:
    a = Forward(*map(_plain, arguments))
    call, operands = _called(a)
    if not call.kernels:
        y, total, *found = decomposed_forward(*a)
        mean, rstd = (t if t.numel() == 0 else _statistic(t, call) for t in found)
        return y, total, mean, rstd
    rstd = call.statistic(a.x)
    at_mean = call.statistic(a.x) if a.center else None
    if a.var is not None:
        torch.rsqrt(a.var.reshape(call.kept_shape).to(call.acc) + a.eps, out=rstd)
        if at_mean is not None and a.mean is not None:
            at_mean.copy_(a.mean.reshape(call.kept_shape))
    try:
        y, added, _ = call.forward(operands, a.eps, apart=(at_mean, rstd))
    except KernelError as error:
        call.fall_back(error)
        return _forward(*arguments)
    return _all(a.x, (y, added, at_mean, rstd))


def _backward(*arguments: Any) -> Four:
    a = Backward(*map(_plain, arguments))
    call, operands = _called(a)
    if not call.kernels:  # from x, and not from a mean that was rounded
        return decomposed_backward(*(a if a.given else a._replace(mean=None, rstd=None)))
    assert a.mean is not None and a.rstd is not None
    apart = _statistic(a.mean, call) if a.center else None, _statistic(a.rstd, call)
    kept = (a.x, operands.weight, operands.bias, a.post_add, None)
    try:
        return _all(a.x, call.backward(kept, a.dy, a.dsum, tuple(a.output_mask), apart))
    except KernelError as error:
        call.fall_back(error)
        return _backward(*arguments)


def _fake_forward(*arguments: Any) -> Four:
    a = Forward(*arguments)
    norm = rules.norm_of(a.operands, *_rule(a))
    dtype = a.x.dtype if a.pre_add is None else torch.result_type(a.x, a.pre_add)
    strides = norm.kept_strides(torch.empty_like(a.x).stride())
    mean, rstd = (
        torch.empty_strided(norm.kept_shape, strides, dtype=accumulator(a.x.dtype, dtype), device=a.x.device)
        for _ in range(2)
    )
    total = None if a.pre_add is None else torch.empty_like(a.x, dtype=dtype)
    return _all(a.x, (torch.empty_like(a.x, dtype=a.out_dtype or a.x.dtype), total, mean if a.center else None, rstd))


def _fake_backward(*arguments: Any) -> Four:
    a = Backward(*arguments)
    dpost = None if a.post_add is None else torch.empty_like(a.x, dtype=a.post_add.dtype)
    found = (a.x, _dense(a.weight), _dense(a.bias), dpost)
    return _all(a.x, (
        None if t is None or not wanted else torch.empty_like(t) for t, wanted in zip(found, a.output_mask, strict=True)
    ))  # fmt: skip


for _name, _run, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    # Dynamo must not look into launches where it declined to trace what calls them.
    library.impl(_name, torch._disable_dynamo(_run), "CompositeExplicitAutograd")  # type: ignore[attr-defined]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=library)
