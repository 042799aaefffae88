"""From operands to the Call that they make: checked and planned when such a call comes first, looked up ever after."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import activations, checks, launch, schedule
from .checks import Axes, Operands
from .launch import Call
from .plan import Spec

# Where an operand is: a number is hashed faster than a device.  It does not tell the meta device from a CPU, which
# matters where PyTorch's own checks do not see what is read: in the interpreter.
_place = attrgetter("device") if launch.INTERPRETED else Tensor.get_device

PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
"""Types whose memory kernels may be given; others (fake, distributed, wrapped tensors) mean something else by it, and
so does a tensor with the negative bit (the imaginary part of a conjugate)."""


def find(
    check: Callable[..., Axes], options: tuple[Any, ...], activation: str | None, out_dtype: torch.dtype | None,
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pre_add: Tensor | None, post_add: Tensor | None,
    center: bool = True, running_mean: Tensor | None = None, running_var: Tensor | None = None, given: bool = False,
) -> Call | None:  # fmt: skip
    """The call that these operands make; None where they are no plain tensors.

    Where it was not met before, ``check(operands, *options)`` runs first.
    """
    try:
        key = (
            check, options, activation, out_dtype, center, given, schedule.limits(),
            x.shape, x.stride(), x.dtype, x.device, x.__class__, x.is_neg(),
            None if weight is None else (
                weight.shape, weight.stride(), weight.dtype, _place(weight), weight.__class__, weight.is_neg()
            ),
            None if bias is None else (
                bias.shape, bias.stride(), bias.dtype, _place(bias), bias.__class__, bias.is_neg()
            ),
            None if pre_add is None else (
                pre_add.shape, pre_add.stride(), pre_add.dtype, _place(pre_add), pre_add.__class__, pre_add.is_neg()
            ),
            None if post_add is None else (
                post_add.shape, post_add.stride(), post_add.dtype, _place(post_add), post_add.__class__,
                post_add.is_neg(),
            ),
            None if running_mean is None or running_var is None else (
                running_mean.shape, running_mean.stride(), running_mean.dtype, _place(running_mean),
                running_mean.requires_grad, running_mean.__class__, running_mean.is_neg(), running_var.shape,
                running_var.stride(), running_var.dtype, _place(running_var), running_var.requires_grad,
                running_var.__class__, running_var.is_neg(),
            ), running_mean is None, running_var is None,
        )  # fmt: skip
        found = launch.calls.get(key)
        if found is not None:
            return found
    except (AttributeError, TypeError):  # not a tensor, or nothing to hash: the checks say what it is
        key = None
    operands = Operands(x, weight, bias, pre_add, post_add, running_mean, running_var)
    if any(t is not None and (type(t) not in PLAIN or t.is_neg()) for t in operands):
        return None
    axes = checked(check, options, activation, out_dtype, operands)
    if axes.weight_shape is not None:
        weight, bias = (None if t is None else t.expand(axes.weight_shape) for t in (weight, bias))
    pre_add, post_add = checks.expanded("pre_add", pre_add, x), checks.expanded("post_add", post_add, x)
    reshaped = axes.weight_shape is not None or any(
        t is not None and t.shape != x.shape for t in (operands.pre_add, operands.post_add)
    )
    spec = Spec(axes.factors, axes.reduced, axes.affine, center, activations.check(activation))
    call = Call(spec, axes, x, weight, bias, pre_add, post_add, given, reshaped, out_dtype)
    if key is not None:
        launch.remember(key, call)
    return call


def checked(
    check: Callable[..., Axes], options: tuple[Any, ...], activation: str | None, out_dtype: torch.dtype | None,
    operands: Operands,
) -> Axes:  # fmt: skip
    """The axes that a call means, once everything about it was found right."""
    checks.tensors(operands)
    axes = check(operands, *options)
    activations.check(activation)
    checks.dtype(out_dtype)
    for name, t in (("pre_add", operands.pre_add), ("post_add", operands.post_add)):
        checks.expanded(name, t, operands.x)
    return axes if operands.weight is not None or operands.bias is not None else axes._replace(affine=())
