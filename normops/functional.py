"""Functions: ``normalize`` over any axes, and the named norms with ``torch.nn.functional``'s signatures.

A named norm says which axes are averaged over and which carry parameters, and nothing else.  What shapes, strides,
dtypes and options decide about a call is checked and planned when such a call comes first, and looked up from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd, calls, checks, composed, traced
from .checks import Axes, Operands

NO_MOMENTUM = "{}: momentum must be a float here, got None; cumulative averages are the module's"

_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack


class _Statistics:
    """What return_stats and InstanceNorm's running statistics want of a call."""

    axes: Axes
    mean: Tensor | None
    rstd: Tensor


def _run(
    check: Callable[..., Axes], options: tuple[Any, ...], activation: str | None, out_dtype: torch.dtype | None,
    eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None,
    post_add: Tensor | None, center: bool = True, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, given: bool = False, momentum: float | Tensor | None = None,
    statistics: _Statistics | None = None,
) -> Any:  # fmt: skip
    """-> y, or (y, sum) with pre_add.

    Running statistics stand in for those of x where they are `given`, and move towards them where there is a
    `momentum`.
    """
    call = None
    if not (is_dynamo_compiling() or _transforms_active() or _dispatch_modes() or forward_ad._current_level >= 0):
        call = calls.find(
            check, options, activation, out_dtype, x, weight, bias, pre_add, post_add, center, running_mean,
            running_var, given,
        )  # fmt: skip
    if call is None:
        operands = Operands(x, weight, bias, pre_add, post_add, running_mean, running_var)
        axes, (y, total, mean, rstd) = traced.normalize(
            check, options, activation, out_dtype, eps, operands, center, given
        )
        if momentum is not None:
            composed.track(operands, mean, rstd, eps, momentum)
        if statistics is not None:
            statistics.axes, statistics.mean, statistics.rstd = axes, mean, rstd
        return y if total is None else (y, total)
    kept: dict[str, Any] = {}
    if given:
        kept = {"mean": running_mean.contiguous(), "var": running_var.contiguous()}  # type: ignore[union-attr]
    elif momentum is not None and running_mean is not None:
        kept = {"running_mean": running_mean, "running_var": running_var, "momentum": float(momentum)}
    result = autograd.normalize(call, x, weight, bias, pre_add, post_add, eps, kept)
    if statistics is not None:
        statistics.axes = call.axes
        statistics.mean, statistics.rstd = autograd.statistics(call, kept["saved"])
    return result


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
    out_dtype: torch.dtype | None = None,
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
    if has_torch_function_variadic(x, weight, bias, pre_add, post_add):
        return handle_torch_function(
            normalize, (x, weight, bias, pre_add, post_add), x, axes, weight, bias, eps=eps, center=center,
            affine=affine, activation=activation, pre_add=pre_add, post_add=post_add, return_stats=return_stats,
            out_dtype=out_dtype, **lengths,
        )  # fmt: skip
    key = tuple(axes) if isinstance(axes, list) else axes
    found = _Statistics() if return_stats else None
    result = _run(
        checks.normalize, (key, affine, tuple(lengths.items())), activation, out_dtype, eps, x, weight, bias, pre_add,
        post_add, center, statistics=found,
    )  # fmt: skip
    if found is None:
        return result
    kept = sorted(found.axes.stat_axes)
    order = [kept.index(axis) for axis in found.axes.stat_axes]
    shaped = (
        None if t is None else t.permute(order).reshape(found.axes.stat_shape) for t in (found.mean, found.rstd)
    )
    return (result, *shaped) if isinstance(result, Tensor) else (*result, *shaped)


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
    out_dtype: torch.dtype | None = None,
) -> Any:
    """BatchNorm over (N, *) for each channel of (N, C, *); :func:`torch.nn.functional.batch_norm` with extras.

    running = (1 - momentum) · running + momentum · statistic, with the unbiased variance, when ``training``; else the
    running statistics stand in for those of the batch.  Extras and dtypes as in :func:`normalize`.

    Raises ValueError for one value per channel in training, RuntimeError for shapes and devices that do not fit.
    Source: Ioffe & Szegedy 2015.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, pre_add, post_add):
        return handle_torch_function(
            batch_norm, (input, running_mean, running_var, weight, bias, pre_add, post_add), input, running_mean,
            running_var, weight, bias, training, momentum, eps, activation=activation, pre_add=pre_add,
            post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    if training and running_mean is not None and momentum is None:
        raise ValueError(NO_MOMENTUM.format("batch_norm"))
    return _run(
        checks.batch_norm, (training,), activation, out_dtype, eps, input, weight, bias, pre_add, post_add, True,
        running_mean, running_var, not training, momentum if training and running_mean is not None else None,
    )  # fmt: skip


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
    out_dtype: torch.dtype | None = None,
) -> Any:
    """InstanceNorm over * for each sample and channel of (N, C, *); :func:`torch.nn.functional.instance_norm` with
    extras.

    Running statistics move towards the mean over the batch of each instance's mean and unbiased variance; with
    ``use_input_stats=False`` they stand in for the statistics.  Raises ValueError for one value per instance.
    Source: Ulyanov et al. 2016.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, pre_add, post_add):
        return handle_torch_function(
            instance_norm, (input, running_mean, running_var, weight, bias, pre_add, post_add), input, running_mean,
            running_var, weight, bias, use_input_stats, momentum, eps, activation=activation, pre_add=pre_add,
            post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    if not use_input_stats:
        if running_mean is None:
            raise ValueError("instance_norm: expected running_mean and running_var when use_input_stats=False")
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps,
            activation=activation, pre_add=pre_add, post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    if running_mean is not None and momentum is None:
        raise ValueError(NO_MOMENTUM.format("instance_norm"))
    found = None if running_mean is None else _Statistics()
    result = _run(
        checks.instance_norm, (), activation, out_dtype, eps, input, weight, bias, pre_add, post_add, True,
        running_mean, running_var, statistics=found,
    )  # fmt: skip
    if found is not None:
        operands = Operands(input, running_mean=running_mean, running_var=running_var)
        composed.track(operands, found.mean, found.rstd, eps, momentum)
    return result


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
    out_dtype: torch.dtype | None = None,
) -> Any:
    """LayerNorm over the last axes; :func:`torch.nn.functional.layer_norm` with extras.  Source: Ba et al. 2016.

    Raises RuntimeError where ``normalized_shape`` is not the end of the input's shape, or weight's, bias's shape.
    """
    if has_torch_function_variadic(input, weight, bias, pre_add, post_add):
        return handle_torch_function(
            layer_norm, (input, weight, bias, pre_add, post_add), input, normalized_shape, weight, bias, eps,
            activation=activation, pre_add=pre_add, post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    shape = normalized_shape if isinstance(normalized_shape, int) else tuple(normalized_shape)
    return _run(
        checks.trailing, ("layer_norm", shape), activation, out_dtype, eps, input, weight, bias, pre_add, post_add
    )


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    pre_add: Tensor | None = None,
    post_add: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """RMSNorm over the last axes: x / sqrt(mean(x²) + eps) · weight; :func:`torch.nn.functional.rms_norm` with
    extras.  ``eps=None`` is torch.finfo of the statistics' dtype.  Source: Zhang & Sennrich 2019.
    """
    if has_torch_function_variadic(input, weight, pre_add, post_add):
        return handle_torch_function(
            rms_norm, (input, weight, pre_add, post_add), input, normalized_shape, weight, eps,
            activation=activation, pre_add=pre_add, post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    shape = normalized_shape if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if eps is None:
        # Not a constant of this module: a compiler would take that for something that may change.
        double = isinstance(input, Tensor) and input.dtype == torch.float64
        eps = torch.finfo(torch.float64 if double else torch.float32).eps
    return _run(
        checks.trailing, ("rms_norm", shape), activation, out_dtype, eps, input, weight, None, pre_add, post_add,
        False,
    )  # fmt: skip


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
    out_dtype: torch.dtype | None = None,
) -> Any:
    """GroupNorm over (C / num_groups, *) of (N, C, *); :func:`torch.nn.functional.group_norm` with extras.

    Raises RuntimeError where num_groups does not divide C, ValueError for a single sample of one value per group.
    Source: Wu & He 2018.
    """
    if has_torch_function_variadic(input, weight, bias, pre_add, post_add):
        return handle_torch_function(
            group_norm, (input, weight, bias, pre_add, post_add), input, num_groups, weight, bias, eps,
            activation=activation, pre_add=pre_add, post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    return _run(checks.group_norm, (num_groups,), activation, out_dtype, eps, input, weight, bias, pre_add, post_add)
