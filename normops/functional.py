"""Functions: ``normalize`` over any axes, and the named norms with ``torch.nn.functional``'s signatures.

A named norm says which axes are averaged over and which carry parameters, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import activations, autograd
from .launch import DTYPES, Spec
from .pattern import parse


def _check_tensors(x: Tensor, **others: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be of dtype float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, t in others.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor or None, got {type(t).__name__}")
        if t.dtype not in DTYPES:
            raise TypeError(f"{name} must be of dtype float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != x.device:
            raise RuntimeError(f"expected {name} on the device of x, {x.device}, got {t.device}")


def _expanded(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None or t.shape == x.shape:
        return t
    try:
        return t.expand(x.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name} must broadcast to the shape of x, {tuple(x.shape)}, got shape {tuple(t.shape)}"
        ) from None


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Sequence[tuple[int, ...]],
    reduced: Sequence[int], affine: Sequence[int], eps: float, *, center: bool = True, activation: str | None = None,
    pre_add: Tensor | None = None, post_add: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    _check_tensors(x, weight=weight, bias=bias, pre_add=pre_add, post_add=post_add)
    has_affine = weight is not None or bias is not None
    spec = Spec(
        tuple(factors), tuple(reduced), tuple(affine) if has_affine else (), center, activations.check(activation)
    )
    pre_add, post_add = _expanded("pre_add", pre_add, x), _expanded("post_add", post_add, x)
    return autograd.normalize(x, weight, bias, pre_add, post_add, spec, eps, **options)


def _with_sum(y: Tensor, total: Tensor | None) -> Any:
    return y if total is None else (y, total)


def _broadcast(name: str, t: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The shape of a parameter as axes of x; RuntimeError if it does not broadcast against x."""
    sizes = (1,) * (len(shape) - t.dim()) + tuple(t.shape)
    if len(sizes) != len(shape) or any(s not in (1, n) for s, n in zip(sizes, shape, strict=True)):
        raise RuntimeError(f"{name} must broadcast against x of shape {tuple(shape)}, got shape {tuple(t.shape)}")
    return sizes


def _reduced_axes(axes: int | Sequence[int], rank: int) -> tuple[int, ...]:
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


def normalize(
    x: Tensor,
    axes: int | Sequence[int] | str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    center: bool = True,
    affine: str | None = None,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
    return_stats: bool = False,
    **lengths: int,
) -> Any:
    """Normalise x over any axes: ``y = act((s - mean) / sqrt(var + eps) * weight + bias + post_add)``.

    s = x + pre_add, mean and var are taken over ``axes`` (var without Bessel's correction), in fp32 (fp64 for fp64).

    Args:
        x: float16, bfloat16, float32 or float64, any shape of rank ≥ 1, any strides.
        axes: the axes that are averaged over, as ints, or a pattern that says which axes keep a statistic:
            ``"n c h w -> c"`` is BatchNorm, ``"n c h w -> n c"`` InstanceNorm, ``"n (g c) h w -> n g"`` GroupNorm.
        weight, bias: with int axes, tensors that broadcast against x; with a pattern, of the shape ``affine`` says.
        eps: added to the variance.
        center: False leaves the mean in place (RMSNorm: var is then the mean of squares).
        affine: with a pattern, the axes of weight and bias, ``"c"`` or ``"(g c)"`` say.
        activation: a name from ``normops.activations``.
        pre_add: added to x before the statistics; the call then returns ``(y, x + pre_add)``.
        post_add: added after the affine, before the activation.
        return_stats: return mean and rstd too (mean is None without ``center``); no gradient flows through them.
        lengths: sizes of named axes, ``g=32`` say.

    Returns:
        y with x's shape, dtype and memory format (under autocast too); ``(y, x + pre_add)`` with pre_add; followed by
        ``mean, rstd`` (shaped like the kept axes) with return_stats.

    Raises:
        ValueError: a pattern that does not fit x, or an unknown activation.
        IndexError, RuntimeError: axes out of range or repeated, shapes that do not broadcast, other devices.
        TypeError: a tensor of another kind.

    Source: Ba et al. 2016 (LayerNorm), Ioffe & Szegedy 2015 (BatchNorm), Wu & He 2018 (GroupNorm).

    >>> import torch, normops
    >>> normops.normalize(torch.randn(2, 6, 5), "n (g c) l -> n g", g=3).shape
    torch.Size([2, 6, 5])
    """
    _check_tensors(x, weight=weight, bias=bias, pre_add=pre_add, post_add=post_add)
    if isinstance(axes, str):
        pattern = parse(axes, tuple(x.shape), affine, lengths)
        factors, reduced, stat_axes = pattern.factors, pattern.reduced, pattern.stat_axes
        stat_shape = pattern.stat_shape
    else:
        if lengths or affine is not None:
            extra = "affine" if affine is not None else next(iter(lengths))
            raise TypeError(f"normalize() got {extra!r}, which goes with a pattern, but axes = {axes!r}")
        if x.dim() == 0:
            raise RuntimeError("x must have at least one axis, got a tensor of rank 0")
        factors = tuple((n,) for n in x.shape)
        reduced = _reduced_axes(axes, x.dim())
        stat_axes = tuple(i for i in range(x.dim()) if i not in reduced)
        stat_shape = tuple(x.shape[i] for i in stat_axes)
    if isinstance(axes, str) and affine is not None:
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None and tuple(t.shape) != pattern.affine_shape:
                raise RuntimeError(
                    f"{name} must have shape {pattern.affine_shape} for affine={affine!r}, got {tuple(t.shape)}"
                )
        affine_axes = pattern.affine_axes
    else:
        weight, bias, affine_axes = _broadcast_affine(x, weight, bias, factors)
    y, total, mean, rstd = _run(
        x, weight, bias, factors, reduced, affine_axes, eps, center=center, activation=activation,
        pre_add=pre_add, post_add=post_add,
    )  # fmt: skip
    out = (y,) if total is None else (y, total)
    if return_stats:
        order = (*stat_axes, *reduced)
        out = (*out, *(None if t is None else t.permute(order).reshape(stat_shape) for t in (mean, rstd)))
    return out[0] if len(out) == 1 else out


def _broadcast_affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factors: Sequence[tuple[int, ...]]
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Parameters that broadcast against x, brought to one shape, and the (split) axes along which they vary."""
    sizes = [_broadcast(name, t, x.shape) for name, t in (("weight", weight), ("bias", bias)) if t is not None]
    if not sizes:
        return None, None, ()
    union = tuple(max(s) if 0 not in s else 0 for s in zip(*sizes, strict=True))
    weight, bias = (None if t is None else t.expand(union) for t in (weight, bias))
    varying: list[int] = []
    i = 0
    for size, split_sizes in zip(union, factors, strict=True):
        if size != 1:
            varying.extend(range(i, i + len(split_sizes)))
        i += len(split_sizes)
    return weight, bias, tuple(varying)


def _channels(name: str, x: Tensor, **tensors: Tensor | None) -> None:
    for argument, t in tensors.items():
        if t is not None and tuple(t.shape) != (x.shape[1],):
            raise RuntimeError(
                f"{name}: {argument} must have shape ({x.shape[1]},), one value per channel of an input of shape "
                f"{tuple(x.shape)}, got {tuple(t.shape)}"
            )


def _check_running(name: str, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    if (running_mean is None) != (running_var is None):
        raise RuntimeError(f"{name}: running_mean and running_var must be both given or both None")
    _check_tensors(x, running_mean=running_mean, running_var=running_var)
    _channels(name, x, running_mean=running_mean, running_var=running_var)


def _momentum(name: str, momentum: float | None) -> float:
    if momentum is None:
        raise ValueError(f"{name}: momentum must be a float here; cumulative averages (None) are the module's")
    return float(momentum)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
) -> Any:
    """BatchNorm over (N, *) for each channel of (N, C, *); :func:`torch.nn.functional.batch_norm` with extras.

    running = (1 - momentum) · running + momentum · statistic, with the unbiased variance, when ``training``; else the
    running statistics stand in for those of the batch.  Extras and dtypes as in :func:`normalize`.

    Raises ValueError for one value per channel in training, RuntimeError for shapes and devices that do not fit.
    Source: Ioffe & Szegedy 2015.
    """
    _check_tensors(input, weight=weight, bias=bias, pre_add=pre_add, post_add=post_add)
    if input.dim() < 2:
        raise RuntimeError(f"batch_norm: input must have at least 2 axes (N, C, *), got shape {tuple(input.shape)}")
    _check_running("batch_norm", input, running_mean, running_var)
    _channels("batch_norm", input, weight=weight, bias=bias)
    options: dict[str, Any] = {}
    if training:
        if input.numel() and input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if running_mean is not None:
            options = {
                "running_mean": _writable("running_mean", running_mean),
                "running_var": _writable("running_var", running_var),
                "momentum": _momentum("batch_norm", momentum),
            }
    elif running_mean is None:
        raise RuntimeError("batch_norm: expected running_mean and running_var to be defined when training=False")
    else:
        options = {"mean": running_mean.contiguous(), "var": running_var.contiguous()}  # type: ignore[union-attr]
    axes = (0, *range(2, input.dim()))
    y, total, _, _ = _run(
        input, weight, bias, tuple((n,) for n in input.shape), axes, (1,), eps,
        activation=activation, pre_add=pre_add, post_add=post_add, **options,
    )  # fmt: skip
    return _with_sum(y, total)


def _writable(name: str, t: Tensor | None) -> Tensor:
    assert t is not None
    if not t.is_contiguous():
        raise RuntimeError(f"{name} must be contiguous, for it is updated in place; got strides {t.stride()}")
    if t.requires_grad:
        raise RuntimeError(f"{name} is updated in place and must not require grad")
    return t


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
) -> Any:
    """InstanceNorm over * for each sample and channel of (N, C, *); :func:`torch.nn.functional.instance_norm` with
    extras.

    Running statistics move towards the mean over the batch of each instance's mean and unbiased variance; with
    ``use_input_stats=False`` they stand in for the statistics.  Raises ValueError for one value per instance.
    Source: Ulyanov et al. 2016.
    """
    _check_tensors(input, weight=weight, bias=bias, pre_add=pre_add, post_add=post_add)
    if input.dim() < 2:
        raise RuntimeError(f"instance_norm: input must have at least 2 axes (N, C, *), got {tuple(input.shape)}")
    _check_running("instance_norm", input, running_mean, running_var)
    _channels("instance_norm", input, weight=weight, bias=bias)
    if not use_input_stats:
        if running_mean is None:
            raise ValueError("instance_norm: expected running_mean and running_var when use_input_stats=False")
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps,
            activation=activation, pre_add=pre_add, post_add=post_add,
        )  # fmt: skip
    n = prod(input.shape[2:])
    if n == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {input.shape}")
    if running_mean is not None:
        momentum = _momentum("instance_norm", momentum)
    y, total, mean, rstd = _run(
        input, weight, bias, tuple((n,) for n in input.shape), tuple(range(2, input.dim())), (1,), eps,
        activation=activation, pre_add=pre_add, post_add=post_add,
    )  # fmt: skip
    if running_mean is not None and running_var is not None and input.numel():
        with torch.no_grad():
            var = (rstd.pow(-2) - eps).clamp_min(0) * (n / (n - 1))  # type: ignore[union-attr]
            for running, t in ((running_mean, mean), (running_var, var)):
                value = t.reshape(input.shape[:2]).mean(0)  # type: ignore[union-attr]
                running.lerp_(value.to(running.dtype), momentum)
    return _with_sum(y, total)


def _trailing(name: str, x: Tensor, normalized_shape: Sequence[int], **tensors: Tensor | None) -> tuple[int, ...]:
    """The last axes of x that normalized_shape names."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise RuntimeError(f"{name}: normalized_shape must name at least one axis, got {shape}")
    if len(shape) > x.dim() or tuple(x.shape[x.dim() - len(shape) :]) != shape:
        raise RuntimeError(
            f"Given normalized_shape={list(shape)}, expected input with shape [*, {', '.join(map(str, shape))}], "
            f"but got input of size {list(x.shape)}"
        )
    for argument, t in tensors.items():
        if t is not None and tuple(t.shape) != shape:
            raise RuntimeError(
                f"{name}: expected {argument} to be of same shape as normalized_shape {shape}, got {tuple(t.shape)}"
            )
    return tuple(range(x.dim() - len(shape), x.dim()))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
) -> Any:
    """LayerNorm over the last axes; :func:`torch.nn.functional.layer_norm` with extras.  Source: Ba et al. 2016.

    Raises RuntimeError where ``normalized_shape`` is not the end of the input's shape, or weight's, bias's shape.
    """
    _check_tensors(input, weight=weight, bias=bias)
    axes = _trailing("layer_norm", input, normalized_shape, weight=weight, bias=bias)
    y, total, _, _ = _run(
        input, weight, bias, tuple((n,) for n in input.shape), axes, axes, eps,
        activation=activation, pre_add=pre_add, post_add=post_add,
    )  # fmt: skip
    return _with_sum(y, total)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
) -> Any:
    """RMSNorm over the last axes: x / sqrt(mean(x²) + eps) · weight; :func:`torch.nn.functional.rms_norm` with
    extras.  ``eps=None`` is torch.finfo of the statistics' dtype.  Source: Zhang & Sennrich 2019.
    """
    _check_tensors(input, weight=weight)
    axes = _trailing("rms_norm", input, normalized_shape, weight=weight)
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    y, total, _, _ = _run(
        input, weight, None, tuple((n,) for n in input.shape), axes, axes, eps, center=False,
        activation=activation, pre_add=pre_add, post_add=post_add,
    )  # fmt: skip
    return _with_sum(y, total)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
) -> Any:
    """GroupNorm over (C / num_groups, *) of (N, C, *); :func:`torch.nn.functional.group_norm` with extras.

    Raises RuntimeError where num_groups does not divide C, ValueError for a single sample of one value per group.
    Source: Wu & He 2018.
    """
    _check_tensors(input, weight=weight, bias=bias)
    if input.dim() < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {input.dim()}")
    channels = input.shape[1]
    if num_groups <= 0:
        raise RuntimeError(f"group_norm: expected num_groups to be greater than 0, got {num_groups}")
    if channels % num_groups:
        raise RuntimeError(
            f"Expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{list(input.shape)} and num_groups={num_groups}"
        )
    _channels("group_norm", input, weight=weight, bias=bias)
    if input.numel() and input.numel() == num_groups:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape} and "
            f"num_groups={num_groups}"
        )
    factors = ((input.shape[0],), (num_groups, channels // num_groups), *((n,) for n in input.shape[2:]))
    y, total, _, _ = _run(
        input, weight, bias, factors, tuple(range(2, input.dim() + 1)), (1, 2), eps,
        activation=activation, pre_add=pre_add, post_add=post_add,
    )  # fmt: skip
    return _with_sum(y, total)
