"""Functions: ``normalize`` over any axes, and the named norms with ``torch.nn.functional``'s signatures.

A named norm says which axes are averaged over and which carry parameters, and nothing else.  What shapes, strides,
dtypes and options decide about a call is checked and planned when such a call comes first, and looked up from then on.

>>> import torch
>>> from normops import functional as F
>>> F.layer_norm(torch.randn(2, 4), (4,), activation="gelu").shape
torch.Size([2, 4])
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import activations, autograd, calls, reference, rules, traced
from .activations import Act
from .faults import KernelError
from .norm import Norm, Operands, accumulator, flag, laid_out, real, whole
from .rules import Rule

NO_MOMENTUM = "{}: momentum must be a float here, got None; cumulative averages are the module's"

Pair = tuple[Tensor, Tensor]
"""``(y, x + pre_add)``, of a call with pre_add."""
Shape = int | Sequence[int]

# torch.autograd.graph.increment_version without its own calls.
_increment_version: Any = torch._C._increment_version


def _run(
    operands: Operands, rule: Rule, arguments: tuple[Any, ...], eps: float | None, activation: Act,
    out_dtype: torch.dtype | None, momentum: float | Tensor | None = None, return_stats: bool = False,
) -> Any:  # fmt: skip
    """-> y, or (y, sum) with pre_add, followed by mean and rstd with return_stats.  Every norm goes through here.

    `rule` (of normops.rules) says what the call means, given the operands and the arguments.  Running statistics
    stand in for those of x where it says so, and move towards them elsewhere.
    """
    if has_torch_function_variadic(*operands):
        return _overridden(operands, rule, arguments, eps, activation, out_dtype, momentum, return_stats)
    if activation is not None and activation.__class__ is not str:
        activation = activations.check(activation)
    call = None if traced.watched() else calls.find(operands, rule, arguments, activation, out_dtype)
    norm = rules.norm_of(operands, rule, arguments, activation, out_dtype) if call is None else call.norm
    if eps is None and rule is rules.rms_norm:
        # Not a constant of this module: a compiler would take that for something that may change.
        eps = torch.finfo(accumulator(operands.x.dtype)).eps
    if eps.__class__ is not float:
        if isinstance(eps, Tensor):
            raise TypeError(f"{rule.__name__}: eps must be a float, got a Tensor of shape {tuple(eps.shape)}")
        eps = real(eps, "eps")
    if eps <= 0 and rule is rules.batch_norm and (eps < 0 or not norm.given):
        raise ValueError(f"batch_norm: eps must be positive (0 with given statistics), got {eps}")
    if momentum.__class__ is not float and momentum is not None and not isinstance(momentum, Tensor):
        momentum = real(momentum, "momentum")
    moves = operands.running_mean is not None and not norm.given
    if moves and momentum is None:
        raise ValueError(NO_MOMENTUM.format(rule.__name__))
    total: Tensor | None
    result: Any
    mean, rstd = None, None
    needed = call is not None and torch.is_grad_enabled() and _needed(operands)
    if needed and norm.given and _needed(operands[5:]):
        raise RuntimeError(traced.CONSTANT)
    if call is None or not call.kernels:
        own = None
        if call is None and traced.exporting():
            own = traced.exported(rule, norm, operands, arguments, eps, out_dtype, momentum)
        elif call is not None and call.native:
            own = autograd.by_native(rule, norm, operands, arguments, eps, momentum, needed)
        if own is not None:
            return own if operands.pre_add is not None else own[0]
        formula = traced.normalize if call is None else _formula
        y, total, mean, rstd = formula(norm, operands, eps, out_dtype)
        result = y if operands.pre_add is None else (y, total)
    else:
        laid = operands if call.ready else laid_out(norm, operands)
        step = float(momentum) if call.tracks else 0.0  # type: ignore[arg-type]
        try:
            y, total, saved = found = call.forward(laid, eps, step, needed)
        except KernelError as error:
            call.fall_back(error)
            return _run(operands, rule, arguments, eps, activation, out_dtype, momentum, return_stats)
        result = y if total is None else (y, total)
        if needed:
            result = autograd.apply(call, eps, found, *laid[:5])
        if call.tracks:
            _increment_version(operands[5:])
            moves = False
        if return_stats or moves:
            mean, rstd = call.statistics(saved)
    if moves and operands.x.numel():
        assert mean is not None and rstd is not None and momentum is not None
        # Of a traced call taken back from rstd, in float64, for eps may be large beside it: an eager one reads x again.
        s = total if operands.pre_add is not None and total is not None else operands.x
        var = (rstd.double().pow(-2) - eps).clamp_min(0) if call is None else reference.variance(norm, s)
        reference.track(operands, mean, var, momentum)
    if not return_stats:
        return result
    statistics = (None if t is None else _spelled(t, norm) for t in (mean, rstd))
    return (result, *statistics) if operands.pre_add is None else (*result, *statistics)


def _formula(
    norm: Norm, operands: Operands, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """-> y, sum, mean and rstd by PyTorch's operations, eagerly."""
    if torch.is_grad_enabled() and _needed(operands):
        return traced.recorded(norm, operands, eps, out_dtype)
    laid = laid_out(norm, operands if norm.given else Operands(*operands[:5]))
    return reference.normalize(norm, eps, laid, out_dtype)


def _needed(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether any gradient may be asked for; not of inference tensors among themselves, whatever they say."""
    for t in tensors:  # any() takes several times as long
        if t is not None and t.requires_grad:
            return not t.is_inference() or not all(other is None or other.is_inference() for other in tensors)
    return False


def _spelled(t: Tensor, norm: Norm) -> Tensor:
    """A statistic as the right side of the pattern orders and joins its axes."""
    flat = [axis for axes in norm.kept for axis in axes]
    shape = norm.shape
    order = [sorted(flat).index(axis) for axis in flat]
    return t.permute(order).reshape([prod([shape[axis] for axis in axes]) for axes in norm.kept])


def _overridden(operands: Operands, rule: Rule, arguments: tuple[Any, ...], eps: float | None, *options: Any) -> Any:
    """The public function that was called, which has the name of its rule, for the class of an operand to take over."""
    function = globals()[rule.__name__]
    given = operands._asdict() | dict(zip(list(signature(rule).parameters)[1:], arguments, strict=True)) | {"eps": eps}
    given |= dict(zip(("activation", "out_dtype", "momentum", "return_stats"), options, strict=True))
    lengths = dict(given.pop("lengths", ()))
    named = {name: given[name] for name in list(signature(function).parameters)[1:] if name in given}
    return handle_torch_function(function, operands, operands.x, **named, **lengths)


@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: Act = ..., pre_add: None = ...,
    post_add: Tensor | None = ..., return_stats: Literal[False] = ..., out_dtype: torch.dtype | None = ...,
    **lengths: int,
) -> Tensor: ...  # fmt: skip
@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: Act = ..., pre_add: Tensor,
    post_add: Tensor | None = ..., return_stats: Literal[False] = ..., out_dtype: torch.dtype | None = ...,
    **lengths: int,
) -> Pair: ...  # fmt: skip
@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: Act = ..., pre_add: None = ...,
    post_add: Tensor | None = ..., return_stats: Literal[True], out_dtype: torch.dtype | None = ..., **lengths: int,
) -> tuple[Tensor, Tensor | None, Tensor]: ...  # fmt: skip
@overload
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., center: bool = ..., affine: str | None = ..., activation: Act = ..., pre_add: Tensor,
    post_add: Tensor | None = ..., return_stats: Literal[True], out_dtype: torch.dtype | None = ..., **lengths: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]: ...  # fmt: skip
def normalize(
    x: Tensor, axes: int | Sequence[int] | str, weight: Tensor | None = None, bias: Tensor | None = None, *,
    eps: float = 1e-5, center: bool = True, affine: str | None = None, activation: Act = None,
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
        activation: a name from ``normops.activations``, or what PyTorch has by it: ``F.silu``, ``nn.SiLU()``.
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
    key = axes if isinstance(axes, str) else rules.sizes(axes, "axes")
    operands = Operands(x, weight, bias, pre_add, post_add)
    # Lengths that are no ints come in lists, which are not looked up: 2.0 would be found where 2 came before.
    given: Any = tuple([item if item[1].__class__ is int else [*item] for item in lengths.items()])
    arguments = (key, affine, center, given)
    if return_stats.__class__ is not bool:
        return_stats = flag(return_stats, "return_stats")
    return _run(operands, rules.normalize, arguments, eps, activation, out_dtype, None, return_stats)


@overload
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = ...,
    bias: Tensor | None = ..., training: bool = ..., momentum: float | Tensor = ..., eps: float = ..., *,
    activation: Act = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = ...,
    bias: Tensor | None = ..., training: bool = ..., momentum: float | Tensor = ..., eps: float = ..., *,
    activation: Act = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float | Tensor = 0.1, eps: float = 1e-5, *,
    activation: Act = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
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
    operands = Operands(input, weight, bias, pre_add, post_add, running_mean, running_var)
    return _run(operands, rules.batch_norm, (training,), eps, activation, out_dtype, momentum)


@overload
def instance_norm(
    input: Tensor, running_mean: Tensor | None = ..., running_var: Tensor | None = ..., weight: Tensor | None = ...,
    bias: Tensor | None = ..., use_input_stats: bool = ..., momentum: float = ..., eps: float = ..., *,
    activation: Act = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def instance_norm(
    input: Tensor, running_mean: Tensor | None = ..., running_var: Tensor | None = ..., weight: Tensor | None = ...,
    bias: Tensor | None = ..., use_input_stats: bool = ..., momentum: float = ..., eps: float = ..., *,
    activation: Act = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *,
    activation: Act = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
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
    operands = Operands(input, weight, bias, pre_add, post_add, running_mean, running_var)
    return _run(operands, rules.instance_norm, (use_input_stats,), eps, activation, out_dtype, momentum)


@overload
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ...,
    *, activation: Act = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ...,
    *, activation: Act = ..., pre_add: Tensor, post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def layer_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, activation: Act = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
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
    shape = rules.sizes(normalized_shape, "normalized_shape")
    operands = Operands(input, weight, bias, pre_add, post_add)
    return _run(operands, rules.layer_norm, (shape,), eps, activation, out_dtype)


@overload
def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., eps: float | None = ..., *,
    activation: Act = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ..., round_first: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = ..., eps: float | None = ..., *,
    activation: Act = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
    round_first: bool = ...,
) -> Pair: ...  # fmt: skip
def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None = None, eps: float | None = None, *,
    activation: Act = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
    out_dtype: torch.dtype | None = None, round_first: bool = False,
) -> Any:  # fmt: skip
    """RMSNorm over the last axes: x / sqrt(mean(x²) + eps) · weight; :func:`torch.nn.functional.rms_norm` with extras.

    ``eps=None`` is torch.finfo of the statistics' dtype.  ``round_first`` rounds x / sqrt(…) to the dtype of x before
    it is multiplied by weight, as Llama and its kin do; gradients are those without.  Extras, dtypes and errors as in
    :func:`layer_norm`.
    Source: Zhang & Sennrich 2019, torch.nn.functional.rms_norm.

    >>> import torch, normops
    >>> normops.functional.rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), (4,), out_dtype=torch.float32).dtype
    torch.float32
    """
    shape = rules.sizes(normalized_shape, "normalized_shape")
    operands = Operands(input, weight, None, pre_add, post_add)
    return _run(operands, rules.rms_norm, (shape, round_first), eps, activation, out_dtype)


@overload
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., *,
    activation: Act = ..., pre_add: None = ..., post_add: Tensor | None = ...,
    out_dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = ..., bias: Tensor | None = ..., eps: float = ..., *,
    activation: Act = ..., pre_add: Tensor, post_add: Tensor | None = ..., out_dtype: torch.dtype | None = ...,
) -> Pair: ...  # fmt: skip
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    activation: Act = None, pre_add: Tensor | None = None, post_add: Tensor | None = None,
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
    if num_groups.__class__ is not int:
        num_groups = whole(num_groups, "num_groups")
    operands = Operands(input, weight, bias, pre_add, post_add)
    return _run(operands, rules.group_norm, (num_groups,), eps, activation, out_dtype)
