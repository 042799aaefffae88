"""``torch.ops.normops``: the two directions as registered operators, for everything in PyTorch that traces programs.

    forward(x, weight?, bias?, pre_add?, post_add?, mean?, var?, pattern, affine, lengths, center, eps, activation,
            out_dtype?) -> (y, sum, mean, rstd)
    backward(dy, dsum?, x, weight?, bias?, post_add?, mean, rstd, pattern, affine, lengths, center, given, eps,
             activation, output_mask) -> (dx, dw, db, dpost)

y = act((s - mean) · rstd · weight + bias + post_add) with s = x + pre_add.  pattern, affine and lengths say which axes
are averaged over, and hold no size of x (:mod:`normops.form`); without lengths that is None, for AOTInductor loses
empty lists.  weight and bias are dense, in the order of `affine`;
pre_add and post_add have x's shape.  `mean` and `var` are given statistics.  Nothing is modified and no output aliases
an input: what is absent (sum without pre_add, mean of an RMS norm, a gradient not asked for) has shape (0,).

Eager calls of plain tensors do not come here: of a LayerNorm's forward the host would take 16 us in place of 7, and 36
in place of 10 with a gradient (a virtual H200's launches, which do nothing, on a CPU core of 2026).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import calls, checks, composed, launch
from .form import Form, kept_strides
from .launch import Call
from .plan import Spec, accumulator

NAMESPACE = "normops"

library = torch.library.Library(NAMESPACE, "DEF")
_FORM = "str pattern, str affine, SymInt[]? lengths, bool center"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
library.define(
    f"forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? pre_add, Tensor? post_add, Tensor? mean, Tensor? var, "
    f"{_FORM}, float eps, str activation, ScalarType? out_dtype) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
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


def decomposed_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None,
    mean: Tensor | None, var: Tensor | None, pattern: str, affine: str, lengths: Sequence[int] | None, center: bool,
    eps: float, activation: str, out_dtype: torch.dtype | None = None,
) -> Four:  # fmt: skip
    """``forward`` as a composition of PyTorch operations."""
    spec = spec_of(x, pattern, affine, lengths, center, activation)
    y, total, *found = composed.forward(spec, eps, x, weight, bias, pre_add, post_add, mean, var, out_dtype)
    kept = [n for i, n in enumerate(spec.shape) if i not in spec.reduced]
    at_mean, rstd = (x.new_empty(0) if t is None else t.reshape(kept) for t in found)
    return y, x.new_empty(0) if pre_add is None else total, at_mean if mean is None else at_mean.clone(), rstd


def decomposed_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, post_add: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, pattern: str, affine: str, lengths: Sequence[int] | None, center: bool,
    given: bool, eps: float, activation: str, output_mask: Sequence[bool],
) -> Four:  # fmt: skip
    """``backward`` as a composition of PyTorch operations; it is a function of x alone where rstd is None."""
    spec = spec_of(x, pattern, affine, lengths, center, activation)
    work = accumulator(x.dtype)
    mean, rstd = (None if t is None or t.numel() == 0 else t.to(work) for t in (mean, rstd))
    dx, dw, db, dpost = composed.gradients(spec, eps, dy, dsum, x, weight, bias, post_add, mean, rstd, given)
    # Copies where either may be dy itself: of one value for each of x's, and nothing between.
    db = db if db is None or db.shape != dy.shape else db.clone()
    found = (dx, dw, db, None if post_add is None else dpost.to(post_add.dtype, copy=activation == "identity"))
    dx, dw, db, dpost = (
        x.new_empty(0) if t is None or not wanted else t for t, wanted in zip(found, output_mask, strict=True)
    )
    return dx, dw, db, dpost


def decompositions() -> dict[Any, Callable[..., Four]]:
    """What the operators are composed of, for ``torch.export``'s ``run_decompositions`` and other tracers.

    >>> import torch, normops
    >>> sorted(str(op) for op in normops.decompositions())
    ['normops.backward.default', 'normops.forward.default']
    """
    return {forward: decomposed_forward, backward: decomposed_backward}


def spec_of(
    x: Tensor, pattern: str, affine: str, lengths: Sequence[int] | None, center: bool, activation: str
) -> Spec:
    form = Form.read(pattern, affine)
    return Spec(form.factors(x.shape, lengths), form.reduced, form.affine, center, activation)


@overload
def _operand(t: Tensor) -> Tensor: ...
@overload
def _operand(t: Tensor | None) -> Tensor | None: ...
def _operand(t: Tensor | None) -> Tensor | None:
    """A subclass that reaches a kernel is one in name only."""
    return t if t is None or type(t) in calls.PLAIN else t.as_subclass(Tensor)


def _lengths(lengths: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if lengths is None else tuple(lengths)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else _operand(t.contiguous())


def _placed(t: Tensor, call: Call) -> Tensor:
    """A statistic as kernels of a call write and read it."""
    t = t.reshape(call.kept)
    if t.dtype == call.acc and t.stride() == call.kept_strides:
        return t
    return call.statistic(t).copy_(t)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None,
    mean: Tensor | None, var: Tensor | None, pattern: str, affine: str, lengths: Sequence[int] | None, center: bool,
    eps: float, activation: str, out_dtype: torch.dtype | None,
) -> Four:  # fmt: skip
    x = _operand(x)
    pre_add, post_add, mean, var = (_operand(t) for t in (pre_add, post_add, mean, var))
    weight, bias = _dense(weight), _dense(bias)
    given = var is not None
    options = (pattern, affine, _lengths(lengths))
    call = calls.find(
        checks.formed, options, activation, out_dtype, x, weight, bias, pre_add, post_add, center, mean, var, given
    )  # fmt: skip
    assert call is not None  # of plain tensors
    at_mean: Tensor | None
    if not call.kernels:
        y, total, at_mean, rstd = decomposed_forward(
            x, weight, bias, pre_add, post_add, mean, var, *options, center, eps, activation, out_dtype
        )
        return y, total, _placed(at_mean, call) if center else at_mean, _placed(rstd, call)
    rstd = call.statistic(x)
    at_mean = call.statistic(x) if center else None
    if var is not None:
        torch.rsqrt(var.reshape(call.kept).to(call.acc) + eps, out=rstd)
        if at_mean is not None and mean is not None:
            at_mean.copy_(mean.reshape(call.kept))
    y, total, _ = launch.forward(
        call, x, weight, bias, pre_add, post_add, eps, mean=at_mean, saved=rstd, apart=True
    )
    return y, x.new_empty(0) if pre_add is None else total, x.new_empty(0) if at_mean is None else at_mean, rstd


def _backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, post_add: Tensor | None,
    mean: Tensor, rstd: Tensor, pattern: str, affine: str, lengths: Sequence[int] | None, center: bool, given: bool,
    eps: float, activation: str, output_mask: Sequence[bool],
) -> Four:  # fmt: skip
    dy, x, mean, rstd = (_operand(t) for t in (dy, x, mean, rstd))
    dsum, post_add = _operand(dsum), _operand(post_add)
    weight, bias = _dense(weight), _dense(bias)
    options = (pattern, affine, _lengths(lengths))
    call = calls.find(
        checks.formed, options, activation, None, x, weight, bias, None, post_add, center, given=given
    )
    assert call is not None
    if not call.kernels:
        return decomposed_backward(
            dy, dsum, x, weight, bias, post_add, mean, rstd, *options, center, given, eps, activation, output_mask
        )
    need_x, need_w, need_b, need_post = output_mask
    found = launch.backward(
        call, dy, dsum, x, weight, bias, post_add, _placed(rstd, call), (need_x, need_w, need_b, need_post),
        mean=_placed(mean, call) if center else None, apart=True,
    )  # fmt: skip
    dx, dw, db, dpost = (x.new_empty(0) if t is None else t for t in found)
    return dx, dw, db, dpost


def _fake_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None,
    mean: Tensor | None, var: Tensor | None, pattern: str, affine: str, lengths: Sequence[int] | None, center: bool,
    eps: float, activation: str, out_dtype: torch.dtype | None,
) -> Four:  # fmt: skip
    operands = checks.Operands(x, weight, bias, pre_add, post_add, mean, var)
    axes = calls.checked(checks.formed, (pattern, affine, _lengths(lengths)), activation, out_dtype, operands)
    kept = Form.read(pattern, affine).kept(axes.factors)
    strides = kept_strides(axes.factors, torch.empty_like(x).stride(), axes.reduced)
    dtype = x.dtype if pre_add is None else torch.result_type(x, pre_add)
    work = accumulator(x.dtype, dtype)
    return (
        torch.empty_like(x, dtype=out_dtype or x.dtype),
        x.new_empty(0) if pre_add is None else torch.empty_like(x, dtype=dtype),
        torch.empty_strided(kept, strides, dtype=work, device=x.device) if center else x.new_empty(0),
        torch.empty_strided(kept, strides, dtype=work, device=x.device),
    )


def _fake_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, post_add: Tensor | None,
    mean: Tensor, rstd: Tensor, pattern: str, affine: str, lengths: Sequence[int] | None, center: bool, given: bool,
    eps: float, activation: str, output_mask: Sequence[bool],
) -> Four:  # fmt: skip
    found = (x, _dense(weight), _dense(bias), post_add)
    like = (None, None, None, x)
    dx, dw, db, dpost = (
        x.new_empty(0) if t is None or not wanted else torch.empty_like(t if o is None else o, dtype=t.dtype)
        for t, o, wanted in zip(found, like, output_mask, strict=True)
    )
    return dx, dw, db, dpost


for _name, _run, _fake in (("forward", _forward, _fake_forward), ("backward", _backward, _fake_backward)):
    # Dynamo must not look into launches where it declined to trace what calls them.
    library.impl(_name, torch._disable_dynamo(_run), "CompositeExplicitAutograd")  # type: ignore[attr-defined]
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=library)
