"""From operands to the Call that they make: checked and planned when such a call comes first, looked up ever after."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import launch, schedule
from .checks import Rule, norm_of
from .launch import Call
from .norm import Operands

# Where an operand is: a number is hashed faster than a device.  It does not tell the meta device from a CPU, which
# matters where PyTorch's own checks do not see what is read: in the interpreter.
_place = attrgetter("device") if launch.INTERPRETED else Tensor.get_device

PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
"""Types whose memory kernels may be given; others (fake, distributed, wrapped tensors) mean something else by it, and
so does a tensor with the negative bit (the imaginary part of a conjugate)."""


def find(
    operands: Operands, rule: Rule, arguments: tuple[Any, ...], activation: str | None, out_dtype: torch.dtype | None
) -> Call | None:
    """The call that these operands make; None where they are no plain tensors.  Where it was not met before, it is
    checked first."""
    try:
        signature: list[Any] = [rule, arguments, activation, out_dtype, schedule.limits(), operands.x.device]
        for t in operands:
            signature.append(
                t if t is None else (t.shape, t.stride(), t.dtype, _place(t), t.__class__, t.is_neg())
            )
        if operands.running_mean is not None:
            signature.append(any(t.requires_grad for t in operands[5:] if t is not None))
        key = tuple(signature)
        found = launch.calls.get(key)
        if found is not None:
            return found
    except (AttributeError, TypeError):  # not a tensor, or nothing to hash: the checks say what it is
        key = None
    if any(t is not None and (type(t) not in PLAIN or t.is_neg()) for t in operands):
        return None
    call = Call(norm_of(operands, rule, arguments, activation, out_dtype), operands, out_dtype)
    if key is not None:
        launch.remember(key, call)
    return call
