"""Functions: ``normalize`` over any axes, and the named norms with ``torch.nn.functional``'s signatures.

A named norm says which axes are averaged over and which carry parameters, and nothing else.  What shapes, strides,
dtypes and options decide about a call is checked and planned when such a call comes first, and looked up from then on.

>>> import torch
>>> from normops import functional as F
>>> F.layer_norm(torch.randn(2, 4), (4,), activation="gelu").shape
torch.Size([2, 4])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import autograd, calls, checks, composed, traced, transforms
from .checks import Axes, Operands

NO_MOMENTUM = "{}: momentum must be a float here, got None; cumulative averages are the module's"

Pair = tuple[Tensor, Tensor]
"""``(y, x + pre_add)``, of a call with pre_add."""
Shape = int | Sequence[int]

_overridden: Callable[..., Any] = handle_torch_function  # which is typed for functions without overloads
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state  # torch.jit.trace


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
    if not (
        is_dynamo_compiling() or _transforms_active() or _dispatch_modes() or forward_ad._current_level >= 0
        or _tracing() is not None
    ):  # fmt: skip
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
        if torch.is_grad_enabled() and (running_mean.requires_grad or running_var.requires_grad):  # type: ignore[union-attr]
            raise RuntimeError(transforms.CONSTANT)
        kept = {"mean": running_mean.contiguous(), "var": running_var.contiguous()}  # type: ignore[union-attr]
    elif momentum is not None and running_mean is not None:
        kept = {"running_mean": running_mean, "running_var": running_var, "momentum": float(momentum)}
    result = autograd.normalize(call, x, weight, bias, pre_add, post_add, eps, kept)
    if statistics is not None:
        statistics.axes = call.axes
        statistics.mean, statistics.rstd = autograd.statistics(call, kept["saved"])
    return result


@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: str | None = ..., pre_add: None = ...,
    post_add: Tensor | None = ..., return_stats: Literal[False] = ..., out_dtype: torch.dtype | None = ...,
    **lengths: int,
) -> Tensor: ...  # fmt: skip
@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: str | None = ..., pre_add: Tensor,
    post_add: Tensor | None = ..., return_stats: Literal[False] = ..., out_dtype: torch.dtype | None = ...,
    **lengths: int,
) -> Pair: ...  # fmt: skip
@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: str | None = ..., pre_add: None = ...,
    post_add: Tensor | None = ..., return_stats: Literal[True], out_dtype: torch.dtype | None = ..., **lengths: int,
) -> tuple[Tensor, Tensor | None, Tensor]: ...  # fmt: skip
@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: str | None = ..., pre_add: Tensor,
    post_add: Tensor | None = ..., return_stats: Literal[True], out_dtype: torch.dtype | None = ..., **lengths: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]: ...  # fmt: skip
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = None, bias: Tensor | None = None, *,
    eps: float = 1e-5, center: bool = True, affine: str | None = None, activation: str | None = None,
    pre_add: Tensor | None = None, post_add: Tensor | None = None, return_stats: bool = False,
    out_dtype: torch.dtype | None = None, **lengths: int,
) -> Any:  # fmt: skip
    """Normalise x over any axes: ``y = act((s - mean) / sqrt(var + eps) * weight + bias + post_add)``.

    s = x + pre_add, mean and var are taken over ``axes`` (var without Bessel's correction), in float32 (float64 for
    float64), and what follows is computed in it, whatever the dtypes of x and the parameters, under autocast too.

    Args:
        x: float16, bfloat16, float32 or float64, any shape of rank ≥ 1, any strides.
        axes: the axes that are averaged over, as ints, or a pattern that says which axes keep a statistic:
            ``"n c h w -> c"`` is BatchNorm, ``"n c h w -> n c"`` InstanceNorm, ``"n (g c) h w -> n g"`` GroupNorm.
        weight, bias: with int axes, tensors that broadcast against x; with a pattern, of the shape ``affine`` says.
        eps: added to the variance.
        center: False leaves the mean in place (RMSNorm: var is then the mean of squares).
        affine: with a pattern, the axes of weight and bias, ``"c"`` or ``"(g c)"`` say.
        activation: a name from ``normops.activations``.
        pre_add: broadcast and added to x before the statistics; the call then returns ``(y, x + pre_add)``.
        post_add: broadcast and added after the affine, before the activation.
        return_stats: return mean and rstd too (mean is None without ``center``); no gradient flows through them.
        out_dtype: the dtype of y, x's by default; float32, say, for what autocast makes of torch's norms.
        lengths: sizes of named axes, ``g=32`` say.

    Returns:
        y with x's shape and memory format, in ``out_dtype``; ``(y, x + pre_add)`` with pre_add, the sum in
        ``torch.result_type(x, pre_add)``; followed by ``mean, rstd`` (shaped like the kept axes) with return_stats.

    Raises:
        ValueError: a pattern that does not fit x, or an unknown activation.
        IndexError, RuntimeError: axes out of range or repeated, shapes that do not broadcast, other devices.
        TypeError: an operand or ``out_dtype`` of another kind.

    Source: Ba et al. 2016 (LayerNorm), Ioffe & Szegedy 2015 (BatchNorm), Wu & He 2018 (GroupNorm).

    >>> import torch, normops
    >>> normops.normalize(torch.randn(2, 6, 5), "n (g c) l -> n g", g=3).shape
    torch.Size([2, 6, 5])
    """
    if has_torch_function_variadic(x, weight, bias, pre_add, post_add):
        return _overridden(
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


@overload
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = ...,
    bias: Tensor | None = ..., training: bool = ..., momentum: float | Tensor = ..., eps: float = ..., *,
    activation: str | None = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = ...,
    bias: Tensor | None = ..., training: bool = ..., momentum: float | Tensor = ..., eps: float = ..., *,
    activation: str | None = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float | Tensor = 0.1, eps: float = 1e-5, *,
    activation: str | None = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """BatchNorm over (N, *) for each channel of (N, C, *): :func:`torch.nn.functional.batch_norm` with extras.

    In ``training``, running = (1 - momentum) · running + momentum · statistic, in place, with the unbiased variance;
    else the running statistics stand in for those of the batch.  All four are of shape (C,).  Formula, extras, dtypes
    and errors as in :func:`normalize`; also ValueError for one value per channel in training, and for momentum=None
    (cumulative averages are the module's).  Source: Ioffe & Szegedy 2015, torch.nn.functional.batch_norm.

    >>> import torch, normops
    >>> mean, var = torch.zeros(3), torch.ones(3)
    >>> y = normops.functional.batch_norm(torch.ones(4, 3), mean, var, training=True)
    >>> mean, var
    (tensor([0.1000, 0.1000, 0.1000]), tensor([0.9000, 0.9000, 0.9000]))
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, pre_add, post_add):
        return _overridden(
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


@overload
def instance_norm(
    input: Tensor, running_mean: Tensor | None = ..., running_var: Tensor | None = ..., weight: Tensor | None = ...,
    bias: Tensor | None = ..., use_input_stats: bool = ..., momentum: float = ..., eps: float = ..., *,
    activation: str | None = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def instance_norm(
    input: Tensor, running_mean: Tensor | None = ..., running_var: Tensor | None = ..., weight: Tensor | None = ...,
    bias: Tensor | None = ..., use_input_stats: bool = ..., momentum: float = ..., eps: float = ..., *,
    activation: str | None = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *,
    activation: str | None = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """InstanceNorm over * for each sample and channel of (N, C, *): torch.nn.functional.instance_norm with extras.

    Running statistics of shape (C,) move, in place, towards the mean over the batch of each instance's mean and
    unbiased variance; with ``use_input_stats=False`` they stand in for the statistics.  Formula, extras, dtypes and
    errors as in :func:`normalize`; also ValueError for one value per instance, for momentum=None, and for
    ``use_input_stats=False`` without running statistics.
    Source: Ulyanov et al. 2016, torch.nn.functional.instance_norm.

    >>> import torch, normops
    >>> y = normops.functional.instance_norm(torch.randn(2, 3, 8))
    >>> torch.allclose(y.mean(-1), torch.zeros(2, 3), atol=1e-5)
    True
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, pre_add, post_add):
        return _overridden(
            instance_norm, (input, running_mean, running_var, weight, bias, pre_add, post_add), input, running_mean,
            running_var, weight, bias, use_input_stats, momentum, eps, activation=activation, pre_add=pre_add,
            post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    if not use_input_stats:
        if running_mean is None:
            raise ValueError("instance_norm: expected running_mean and running_var when use_input_stats=False")
        return _run(
            checks.batch_norm, (False,), activation, out_dtype, eps, input, weight, bias, pre_add, post_add, True,
            running_mean, running_var, True,
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


@overload
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ...,
    *, activation: str | None = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ...,
    *, activation: str | None = ..., pre_add: Tensor, post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, activation: str | None = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """LayerNorm over the last axes, ``normalized_shape``: :func:`torch.nn.functional.layer_norm` with extras.

    Formula, extras, dtypes and errors as in :func:`normalize`; also RuntimeError where ``normalized_shape`` is not the
    end of the input's shape, or not weight's and bias's shape.  Source: Ba et al. 2016, torch.nn.functional.layer_norm.

    >>> import torch, normops
    >>> y, hidden = normops.functional.layer_norm(torch.ones(2, 3), (3,), pre_add=torch.ones(2, 3))
    >>> y[0], hidden[0]
    (tensor([0., 0., 0.]), tensor([2., 2., 2.]))
    """
    if has_torch_function_variadic(input, weight, bias, pre_add, post_add):
        return _overridden(
            layer_norm, (input, weight, bias, pre_add, post_add), input, normalized_shape, weight, bias, eps,
            activation=activation, pre_add=pre_add, post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    shape = normalized_shape if isinstance(normalized_shape, int) else tuple(normalized_shape)
    return _run(
        checks.trailing, ("layer_norm", shape), activation, out_dtype, eps, input, weight, bias, pre_add, post_add
    )


@overload
def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., eps: float | None = ..., *,
    activation: str | None = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., eps: float | None = ..., *,
    activation: str | None = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, eps: float | None = None, *,
    activation: str | None = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """RMSNorm over the last axes: x / sqrt(mean(x²) + eps) · weight; :func:`torch.nn.functional.rms_norm` with extras.

    ``eps=None`` is torch.finfo of the statistics' dtype.  Extras, dtypes and errors as in :func:`layer_norm`.
    Source: Zhang & Sennrich 2019, torch.nn.functional.rms_norm.

    >>> import torch, normops
    >>> normops.functional.rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), (4,), out_dtype=torch.float32).dtype
    torch.float32
    """
    if has_torch_function_variadic(input, weight, pre_add, post_add):
        return _overridden(
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


@overload
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., *,
    activation: str | None = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., *,
    activation: str | None = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    activation: str | None = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """GroupNorm over (C / num_groups, *) of (N, C, *): :func:`torch.nn.functional.group_norm` with extras.

    weight and bias are of shape (C,).  Formula, extras, dtypes and errors as in :func:`normalize`; also RuntimeError
    where num_groups does not divide C, ValueError for a single sample of one value per group.
    Source: Wu & He 2018, torch.nn.functional.group_norm.

    >>> import torch, normops
    >>> normops.functional.group_norm(torch.randn(2, 6, 4), 3, activation="silu").shape
    torch.Size([2, 6, 4])
    """
    if has_torch_function_variadic(input, weight, bias, pre_add, post_add):
        return _overridden(
            group_norm, (input, weight, bias, pre_add, post_add), input, num_groups, weight, bias, eps,
            activation=activation, pre_add=pre_add, post_add=post_add, out_dtype=out_dtype,
        )  # fmt: skip
    return _run(checks.group_norm, (num_groups,), activation, out_dtype, eps, input, weight, bias, pre_add, post_add)
