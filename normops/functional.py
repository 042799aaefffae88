"""Functions: ``normalize`` over any axes, and the named norms with ``torch.nn.functional``'s signatures.

A named norm says which axes are averaged over and which carry parameters, and nothing else.  What shapes, strides,
dtypes and options decide about a call is checked and planned when such a call comes first, and looked up from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import activations, autograd, checks, launch, schedule
from .checks import Axes, Operands
from .launch import Call
from .plan import Spec

NO_MOMENTUM = "{}: momentum must be a float here, got None; cumulative averages are the module's"


def _call(
    check: Callable[..., Axes], options: tuple[Any, ...], activation: str | None, x: Tensor, weight: Tensor | None,
    bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, center: bool = True, given: bool = False,
) -> Call:  # fmt: skip
    """The call that these operands make.  Where it was not met before, ``check(operands, *options)`` runs first."""
    try:
        key = (
            check, options, activation, center, given, schedule.limits(), x.shape, x.stride(), x.dtype, x.device,
            None if weight is None else (weight.shape, weight.stride(), weight.dtype, weight.device),
            None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device),
            None if pre_add is None else (pre_add.shape, pre_add.stride(), pre_add.dtype, pre_add.device),
            None if post_add is None else (post_add.shape, post_add.stride(), post_add.dtype, post_add.device),
            None if running_mean is None or running_var is None else (
                running_mean.shape, running_mean.stride(), running_mean.dtype, running_mean.device,
                running_mean.requires_grad, running_var.shape, running_var.stride(), running_var.dtype,
                running_var.device, running_var.requires_grad,
            ), running_mean is None, running_var is None,
        )  # fmt: skip
        found = launch.calls.get(key)
        if found is not None:
            return found
    except (AttributeError, TypeError):  # not a tensor, or nothing to hash: the checks say what it is
        key = None
    operands = Operands(x, weight, bias, pre_add, post_add, running_mean, running_var)
    checks.tensors(operands)
    axes = check(operands, *options)
    if axes.weight_shape is not None:
        weight, bias = (None if t is None else t.expand(axes.weight_shape) for t in (weight, bias))
    pre_add, post_add = checks.expanded("pre_add", pre_add, x), checks.expanded("post_add", post_add, x)
    affine = axes.affine if weight is not None or bias is not None else ()
    spec = Spec(axes.factors, axes.reduced, affine, center, activations.check(activation))
    reshaped = axes.weight_shape is not None or any(
        t is not None and t.shape != x.shape for t in (operands.pre_add, operands.post_add)
    )
    call = Call(spec, axes, x, weight, bias, pre_add, post_add, given, reshaped)
    if key is not None:
        launch.remember(key, call)
    return call


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
    key = tuple(axes) if isinstance(axes, list) else axes
    call = _call(
        checks.normalize, (key, affine, tuple(lengths.items())), activation, x, weight, bias, pre_add, post_add,
        center=center,
    )  # fmt: skip
    options: dict[str, Any] = {}
    y = autograd.normalize(call, x, weight, bias, pre_add, post_add, eps, options)
    if not return_stats:
        return y
    order = (*call.axes.stat_axes, *call.axes.reduced)
    shaped = (
        None if t is None else t.permute(order).reshape(call.axes.stat_shape)
        for t in autograd.statistics(call, options["saved"])
    )  # fmt: skip
    return (y, *shaped) if isinstance(y, Tensor) else (*y, *shaped)


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
    call = _call(
        checks.batch_norm, (training,), activation, input, weight, bias, pre_add, post_add, running_mean, running_var,
        given=not training,
    )  # fmt: skip
    options: dict[str, Any] = {}
    if not training:
        options = {"mean": running_mean.contiguous(), "var": running_var.contiguous()}  # type: ignore[union-attr]
    elif running_mean is not None:
        if momentum is None:
            raise ValueError(NO_MOMENTUM.format("batch_norm"))
        options = {"running_mean": running_mean, "running_var": running_var, "momentum": float(momentum)}
    return autograd.normalize(call, input, weight, bias, pre_add, post_add, eps, options)


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
    if not use_input_stats:
        if running_mean is None:
            raise ValueError("instance_norm: expected running_mean and running_var when use_input_stats=False")
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps,
            activation=activation, pre_add=pre_add, post_add=post_add,
        )  # fmt: skip
    call = _call(
        checks.instance_norm, (), activation, input, weight, bias, pre_add, post_add, running_mean, running_var
    )
    options: dict[str, Any] = {}
    if running_mean is not None and momentum is None:
        raise ValueError(NO_MOMENTUM.format("instance_norm"))
    y = autograd.normalize(call, input, weight, bias, pre_add, post_add, eps, options)
    if running_mean is not None and running_var is not None and input.numel():
        n = prod(input.shape[2:])
        mean, rstd = autograd.statistics(call, options["saved"])
        with torch.no_grad():
            var = (rstd.pow(-2) - eps).clamp_min(0) * (n / (n - 1))
            for running, t in ((running_mean, mean), (running_var, var)):
                value = t.reshape(input.shape[:2]).mean(0)  # type: ignore[union-attr]
                running.lerp_(value.to(running.dtype), float(momentum))
    return y


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
    shape = normalized_shape if isinstance(normalized_shape, int) else tuple(normalized_shape)
    call = _call(checks.trailing, ("layer_norm", shape), activation, input, weight, bias, pre_add, post_add)
    return autograd.normalize(call, input, weight, bias, pre_add, post_add, eps, {})


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
    shape = normalized_shape if isinstance(normalized_shape, int) else tuple(normalized_shape)
    call = _call(
        checks.trailing, ("rms_norm", shape), activation, input, weight, None, pre_add, post_add, center=False
    )
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return autograd.normalize(call, input, weight, None, pre_add, post_add, eps, {})


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
    call = _call(checks.group_norm, (num_groups,), activation, input, weight, bias, pre_add, post_add)
    return autograd.normalize(call, input, weight, bias, pre_add, post_add, eps, {})
