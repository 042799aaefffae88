"""What a call means: its norm, once all of it was found right.

A rule takes the operands and the arguments of a call and returns its norm; it raises PyTorch's kind of error, naming
the argument, its value and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import activations
from .activations import Act
from .norm import DTYPES, OPTIONS, Norm, Operands, flag, parse, whole

Rule = Callable[..., Norm]

def norm_of(
    operands: Operands, rule: Rule, arguments: tuple[Any, ...], activation: Act, out_dtype: torch.dtype | None
) -> Norm:
    """What a call means, once everything about it was found right."""
    _tensors(operands)
    norm = rule(operands, *arguments)._replace(activation=activations.check(activation))
    dtype(out_dtype)
    for name in ("pre_add", "post_add"):
        t = getattr(operands, name)
        if t is not None and t.shape != operands.x.shape:
            try:
                t.expand(operands.x.shape)
            except RuntimeError:
                raise RuntimeError(
                    f"{name} must broadcast to the shape of x, {tuple(operands.x.shape)}, got shape {tuple(t.shape)}"
                ) from None
    return norm if operands.weight is not None or operands.bias is not None else norm._replace(affine=())


def dtype(out_dtype: torch.dtype | None) -> None:
    """The dtype of y is one that kernels write."""
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype must be None, float16, bfloat16, float32 or float64, got {out_dtype!r}")


def _tensors(o: Operands) -> None:
    """Every operand is a tensor of a known dtype, on the device of x."""
    for name, t in zip(o._fields, o, strict=True):
        if t is None and name != "x":
            continue
        if not isinstance(t, Tensor):
            expected = "a Tensor" if name == "x" else "a Tensor or None"
            raise TypeError(f"{name} must be {expected}, got {type(t).__name__}")
        if t.is_nested or t.layout is not torch.strided or t.is_quantized:
            kind = "nested" if t.is_nested else "quantized" if t.is_quantized else t.layout
            raise NotImplementedError(f"{name} must be a dense tensor, in strided memory, got {kind}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be of dtype float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != o.x.device:
            raise RuntimeError(f"expected {name} on the device of x, {o.x.device}, got {t.device}")


def _named(o: Operands, pattern: str, affine: str, refusal: Callable[[], str], **lengths: int) -> Norm:
    """The norm of a pattern.  Where x does not fit it a RuntimeError, as of PyTorch: the refusal, with x's shape."""
    try:
        norm = parse(pattern, o.x.shape, affine, lengths)
    except ValueError:
        raise RuntimeError(refusal()) from None
    return _parameters(norm, o)


def _parameters(norm: Norm, o: Operands, reason: str = "") -> Norm:
    """The norm, once one-valued operands have the shape that it gives them."""
    for name in ("running_mean", "running_var", "weight", "bias"):
        t = getattr(o, name)
        if t is not None and tuple(t.shape) != norm.affine_shape:
            raise RuntimeError(
                f"{name} must have shape {norm.affine_shape} for x of shape {tuple(o.x.shape)}{reason}, got "
                f"{tuple(t.shape)}"
            )
    return norm


_NOTHING = Norm(((0,),), (0,), ())


def _channels(name: str, o: Operands, pattern: str) -> Norm:
    """Of the norms that may keep running statistics, one for each channel."""
    if (o.running_mean is None) != (o.running_var is None):
        raise RuntimeError(f"{name}: running_mean and running_var must be both given or both None")
    return _named(o, pattern, "c", lambda: (
        f"{name}: input must have at least 2 axes (N, C, *), got shape {tuple(o.x.shape)}"
    ))  # fmt: skip


def sizes(value: Any, name: str) -> tuple[int, ...]:
    """One int or several, before they are looked up: 2.0 would be found where 2 came before."""
    if value.__class__ is int:
        return (value,)
    if isinstance(value, Iterable):
        return tuple([n if n.__class__ is int else whole(n, name) for n in value])
    return (whole(value, name),)


def batch_norm(o: Operands, training: bool) -> Norm:
    training = flag(training, "training")
    if o.x.shape == (0,) and o.weight is None and o.bias is None:
        return _NOTHING  # of no channels, as PyTorch takes it
    norm = _channels("batch_norm", o, "n c ... -> c")
    if not training:
        if o.running_mean is None:
            raise RuntimeError("batch_norm: expected running_mean and running_var to be defined when training=False")
        return norm._replace(given=True)
    if o.x.numel() and o.x.numel() == o.x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {o.x.shape}")
    for name in ("running_mean", "running_var"):
        t = getattr(o, name)
        if t is not None and not t.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous, for it is updated in place; got strides {t.stride()}")
        if t is not None and t.requires_grad:
            raise RuntimeError(f"{name} is updated in place and must not require grad")
    return norm


def instance_norm(o: Operands, use_input_stats: bool) -> Norm:
    if not flag(use_input_stats, "use_input_stats"):
        if o.running_mean is None:
            raise ValueError("instance_norm: expected running_mean and running_var when use_input_stats=False")
        return batch_norm(o, False)
    norm = _channels("instance_norm", o, "n c ... -> n c")
    if prod(o.x.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {o.x.shape}")
    return norm


def layer_norm(o: Operands, normalized_shape: tuple[int, ...]) -> Norm:
    shape = normalized_shape
    if not shape:
        raise RuntimeError(f"normalized_shape must name at least one axis, got {shape}")
    lengths = {f"d{i}": n for i, n in enumerate(shape)}
    names = " ".join(lengths)
    return _named(o, f"... {names} -> ...", names, lambda: (
        f"Given normalized_shape={list(shape)}, expected input with shape [*, {', '.join(map(str, shape))}], but got "
        f"input of size {list(o.x.shape)}"
    ), **lengths)  # fmt: skip


def rms_norm(o: Operands, normalized_shape: tuple[int, ...], round_first: bool = False) -> Norm:
    return layer_norm(o, normalized_shape)._replace(center=False, round_first=flag(round_first, "round_first"))


def group_norm(o: Operands, num_groups: int) -> Norm:
    if num_groups <= 0:
        raise RuntimeError(f"group_norm: expected num_groups to be greater than 0, got {num_groups}")
    norm = _named(o, "n (g c) ... -> n g", "(g c)", lambda: (
        f"Expected at least 2 dimensions, and number of channels in input to be divisible by num_groups, but got input "
        f"of shape {list(o.x.shape)} and num_groups={num_groups}"
    ), g=num_groups)  # fmt: skip
    if o.x.numel() and o.x.numel() == num_groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {o.x.shape} and "
            f"num_groups={num_groups}"
        )
    return norm


def normalize(
    o: Operands, axes: tuple[int, ...] | str, affine: str | None, center: bool, lengths: tuple[tuple[str, int], ...]
) -> Norm:
    center = flag(center, "center")
    if isinstance(axes, str):
        norm = parse(axes, o.x.shape, affine, dict(lengths))._replace(center=center)
        if affine is None and (o.weight is not None or o.bias is not None):
            raise ValueError(f"pattern {axes!r}: weight and bias need affine, the axes they vary along, got None")
        return norm if affine is None else _parameters(norm, o, f" and affine={affine!r}")
    if lengths or affine is not None:
        extra = "affine" if affine is not None else lengths[0][0]
        near = get_close_matches(extra, OPTIONS, 1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != extra else ""
        raise TypeError(f"normalize() got {extra!r}, which goes with a pattern, but axes = {axes!r}{hint}")
    rank = o.x.dim()
    if rank == 0:
        raise RuntimeError("x must have at least one axis, got a tensor of rank 0")
    reduced = _reduced(axes, rank)
    kept = tuple((i,) for i in range(rank) if i not in reduced)
    return _broadcast(Norm(tuple((n,) for n in o.x.shape), reduced, (), center, kept=kept), o)


def _reduced(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if not axes:
        raise ValueError("axes must name at least one axis, got ()")
    for axis in axes:
        if not -rank <= axis < rank:
            raise IndexError(f"axes out of range: expected each in [{-rank}, {rank - 1}], got {axis}")
    found = tuple(axis % rank for axis in axes)
    if len(set(found)) != len(found):
        raise RuntimeError(f"axes must be distinct, got {axes} for a tensor of rank {rank}")
    return tuple(sorted(found))


def _broadcast(norm: Norm, o: Operands) -> Norm:
    """The norm with parameters that broadcast against x, in the shape that both come to."""
    union = [1] * o.x.dim()
    for name, t in (("weight", o.weight), ("bias", o.bias)):
        if t is None:
            continue
        padded = (1,) * (o.x.dim() - t.dim()) + tuple(t.shape)
        if len(padded) != o.x.dim() or any(s != 1 and s != n for s, n in zip(padded, o.x.shape, strict=True)):
            raise RuntimeError(
                f"{name} must broadcast against x of shape {tuple(o.x.shape)}, got shape {tuple(t.shape)}"
            )
        union = [b if a == 1 else a for a, b in zip(union, padded, strict=True)]
    varying: list[int] = []
    i = 0
    for size, factors in zip(union, norm.factors, strict=True):
        if size != 1:
            varying.extend(range(i, i + len(factors)))
        i += len(factors)
    return norm._replace(affine=tuple(varying), affine_shape=tuple(union))


def written(
    o: Operands, pattern: str, affine: str, lengths: tuple[int, ...] | None, center: bool, given: bool,
    round_first: bool,
) -> Norm:  # fmt: skip
    """Of a registered operator: parameters and statistics need only have that many elements, pre_add and post_add x's
    shape."""
    norm = parse(pattern, o.x.shape, affine, lengths)
    sizes = norm.shape
    elements = {"weight": prod(sizes[i] for i in norm.affine), "mean": prod(norm.kept_shape)}
    elements |= {"bias": elements["weight"], "var": elements["mean"]}
    for name, t in zip(o._fields, o, strict=True):
        name = name.removeprefix("running_")
        if t is None or name == "x":
            continue
        if name in elements and t.numel() != elements[name]:
            raise RuntimeError(
                f"{name} must have {elements[name]} elements for {pattern!r}, affine {affine!r} and x of shape "
                f"{tuple(o.x.shape)}, got shape {tuple(t.shape)}"
            )
        if name not in elements and t.shape != o.x.shape:
            raise RuntimeError(f"{name} must have the shape of x, {tuple(o.x.shape)}, got {tuple(t.shape)}")
    return norm._replace(center=center, given=given, round_first=round_first, affine_shape=None)
