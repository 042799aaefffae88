"""What a call must satisfy, and the axes it means: run once for each kind of call, see ``functional``.

A check takes the operands and the options of a call and returns its :class:`Axes`; it raises PyTorch's kind of error,
naming the argument, its value and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .form import Form
from .pattern import parse
from .plan import DTYPES


class Operands(NamedTuple):
    """The tensors of a call."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    pre_add: Tensor | None = None
    post_add: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


class Axes(NamedTuple):
    """What is averaged over, and what the parameters vary along."""

    factors: tuple[tuple[int, ...], ...]
    """For each axis of x the sizes it splits into."""
    reduced: tuple[int, ...]
    """Axes of the split shape."""
    affine: tuple[int, ...]
    """Axes of the split shape, in the order of the weight's axes."""
    stat_axes: tuple[int, ...] = ()
    """Axes that keep a statistic, in the order in which they are returned."""
    stat_shape: tuple[int, ...] = ()
    """The shape of mean and rstd as they are returned."""
    weight_shape: tuple[int, ...] | None = None
    """What weight and bias broadcast to; None where they have that shape."""


def written(axes: Axes) -> tuple[str, str, tuple[int, ...] | None]:
    """pattern, affine and lengths as the registered operators take them."""
    pattern, affine = Form(tuple(map(len, axes.factors)), axes.reduced, axes.affine).strings
    return pattern, affine, tuple(n for sizes in axes.factors for n in sizes[:-1]) or None


def dtype(out_dtype: torch.dtype | None) -> None:
    """The dtype of y is one that kernels write."""
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(f"out_dtype must be None, float16, bfloat16, float32 or float64, got {out_dtype!r}")


def tensors(o: Operands) -> None:
    """Every operand is a tensor of a known dtype, on the device of x."""
    x = o.x
    for name, t in zip(o._fields, o, strict=True):
        if t is None and name != "x":
            continue
        if not isinstance(t, Tensor):
            expected = "a Tensor" if name == "x" else "a Tensor or None"
            raise TypeError(f"{name} must be {expected}, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be of dtype float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != x.device:
            raise RuntimeError(f"expected {name} on the device of x, {x.device}, got {t.device}")


def _channels(name: str, o: Operands) -> None:
    x = o.x
    for argument in ("running_mean", "running_var", "weight", "bias"):
        t = getattr(o, argument)
        if t is not None and tuple(t.shape) != (x.shape[1],):
            raise RuntimeError(
                f"{name}: {argument} must have shape ({x.shape[1]},), one value per channel of an input of shape "
                f"{tuple(x.shape)}, got {tuple(t.shape)}"
            )


def _unsplit(x: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple((n,) for n in x.shape)


def _tracked(name: str, o: Operands) -> None:
    """What BatchNorm and InstanceNorm ask for alike."""
    if o.x.dim() < 2:
        raise RuntimeError(f"{name}: input must have at least 2 axes (N, C, *), got shape {tuple(o.x.shape)}")
    if (o.running_mean is None) != (o.running_var is None):
        raise RuntimeError(f"{name}: running_mean and running_var must be both given or both None")
    _channels(name, o)


def _writable(o: Operands) -> None:
    for name in ("running_mean", "running_var"):
        t = getattr(o, name)
        if t is None:
            continue
        if not t.is_contiguous():
            raise RuntimeError(f"{name} must be contiguous, for it is updated in place; got strides {t.stride()}")
        if t.requires_grad:
            raise RuntimeError(f"{name} is updated in place and must not require grad")


def batch_norm(o: Operands, training: bool) -> Axes:
    _tracked("batch_norm", o)
    x = o.x
    if training:
        if x.numel() and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        _writable(o)
    elif o.running_mean is None:
        raise RuntimeError("batch_norm: expected running_mean and running_var to be defined when training=False")
    return Axes(_unsplit(x), (0, *range(2, x.dim())), (1,))


def instance_norm(o: Operands) -> Axes:
    _tracked("instance_norm", o)
    x = o.x
    if prod(x.shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.shape}")
    return Axes(_unsplit(x), tuple(range(2, x.dim())), (1,), (0, 1), tuple(x.shape[:2]))


def trailing(o: Operands, name: str, normalized_shape: int | tuple[int, ...]) -> Axes:
    """The last axes of x, which normalized_shape names."""
    x = o.x
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{name}: normalized_shape must name at least one axis, got {shape}")
    if len(shape) > x.dim() or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise RuntimeError(
            f"Given normalized_shape={list(shape)}, expected input with shape [*, {', '.join(map(str, shape))}], "
            f"but got input of size {list(x.shape)}"
        )
    for argument, t in (("weight", o.weight), ("bias", o.bias)):
        if t is not None and tuple(t.shape) != shape:
            raise RuntimeError(
                f"{name}: expected {argument} to be of same shape as normalized_shape {shape}, got {tuple(t.shape)}"
            )
    axes = tuple(range(x.dim() - len(shape), x.dim()))
    return Axes(_unsplit(x), axes, axes)


def group_norm(o: Operands, num_groups: int) -> Axes:
    x = o.x
    if x.dim() < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {x.dim()}")
    channels = x.shape[1]
    if num_groups <= 0:
        raise RuntimeError(f"group_norm: expected num_groups to be greater than 0, got {num_groups}")
    if channels % num_groups:
        raise RuntimeError(
            f"Expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{list(x.shape)} and num_groups={num_groups}"
        )
    _channels("group_norm", o)
    if x.numel() and x.numel() == num_groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape} and "
            f"num_groups={num_groups}"
        )
    factors = ((x.shape[0],), (num_groups, channels // num_groups), *((n,) for n in x.shape[2:]))
    return Axes(factors, tuple(range(2, x.dim() + 1)), (1, 2))


def formed(o: Operands, pattern: str, affine: str, lengths: tuple[int, ...] | None) -> Axes:
    """Of a registered operator: the form says what is meant; parameters and statistics need only have that many
    elements, pre_add and post_add x's shape."""
    form = Form.read(pattern, affine)
    factors = form.factors(o.x.shape, lengths)
    sizes = [n for parts in factors for n in parts]
    elements = {"weight": prod(sizes[i] for i in form.affine), "running_mean": prod(form.kept(factors))}
    for name, of in (
        ("weight", "weight"),
        ("bias", "weight"),
        ("running_mean", "running_mean"),
        ("running_var", "running_mean"),
    ):
        t = getattr(o, name)
        if t is not None and t.numel() != elements[of]:
            raise RuntimeError(
                f"{name.removeprefix('running_')} must have {elements[of]} elements for {pattern!r}, affine {affine!r} "
                f"and x of shape {tuple(o.x.shape)}, got shape {tuple(t.shape)}"
            )
    for name in ("pre_add", "post_add"):
        t = getattr(o, name)
        if t is not None and t.shape != o.x.shape:
            raise RuntimeError(f"{name} must have the shape of x, {tuple(o.x.shape)}, got {tuple(t.shape)}")
    return Axes(factors, form.reduced, form.affine)


def normalize(
    o: Operands, axes: int | Sequence[int] | str, affine: str | None, lengths: tuple[tuple[str, int], ...]
) -> Axes:
    x = o.x
    if isinstance(axes, str):
        pattern = parse(axes, tuple(x.shape), affine, dict(lengths))
        found = Axes(pattern.factors, pattern.reduced, pattern.affine_axes, pattern.stat_axes, pattern.stat_shape)
        if affine is None:
            return _broadcast(found, o)
        for name, t in (("weight", o.weight), ("bias", o.bias)):
            if t is not None and tuple(t.shape) != pattern.affine_shape:
                raise RuntimeError(
                    f"{name} must have shape {pattern.affine_shape} for affine={affine!r}, got {tuple(t.shape)}"
                )
        return found
    if lengths or affine is not None:
        extra = "affine" if affine is not None else lengths[0][0]
        raise TypeError(f"normalize() got {extra!r}, which goes with a pattern, but axes = {axes!r}")
    if x.dim() == 0:
        raise RuntimeError("x must have at least one axis, got a tensor of rank 0")
    reduced = _reduced(axes, x.dim())
    stat_axes = tuple(i for i in range(x.dim()) if i not in reduced)
    stat_shape = tuple(x.shape[i] for i in stat_axes)
    return _broadcast(Axes(_unsplit(x), reduced, (), stat_axes, stat_shape), o)


def _reduced(axes: int | Sequence[int], rank: int) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if not axes:
        raise ValueError("axes must name at least one axis, got ()")
    for axis in axes:
        if not isinstance(axis, int):
            raise TypeError(f"axes must be ints or a pattern, got {axis!r}")
        if not -rank <= axis < rank:
            raise IndexError(f"axes out of range: expected each in [{-rank}, {rank - 1}], got {axis}")
    found = tuple(axis % rank for axis in axes)
    if len(set(found)) != len(found):
        raise RuntimeError(f"axes must be distinct, got {axes} for a tensor of rank {rank}")
    return tuple(sorted(found))


def _broadcast(axes: Axes, o: Operands) -> Axes:
    """The axes along which parameters vary that broadcast against x, and the shape that both come to."""
    x = o.x
    sizes = []
    for name, t in (("weight", o.weight), ("bias", o.bias)):
        if t is None:
            continue
        padded = (1,) * (x.dim() - t.dim()) + tuple(t.shape)
        if len(padded) != x.dim() or any(s != 1 and s != n for s, n in zip(padded, x.shape, strict=True)):
            raise RuntimeError(f"{name} must broadcast against x of shape {tuple(x.shape)}, got shape {tuple(t.shape)}")
        sizes.append(padded)
    if not sizes:
        return axes._replace(affine=())
    union = tuple(b if a == 1 else a for a, b in zip(sizes[0], sizes[-1], strict=True))
    varying: list[int] = []
    i = 0
    for size, factors in zip(union, axes.factors, strict=True):
        if size != 1:
            varying.extend(range(i, i + len(factors)))
        i += len(factors)
    return axes._replace(affine=tuple(varying), weight_shape=union)


def expanded(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None or t.shape == x.shape:
        return t
    try:
        return t.expand(x.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name} must broadcast to the shape of x, {tuple(x.shape)}, got shape {tuple(t.shape)}"
        ) from None
