"""torch.nn with fused norms: ``from normops import nn`` serves code written for ``from torch import nn``.

Every other name is torch.nn's own.  The norms are subclasses of torch's, with the same arguments, state_dict and repr;
they take ``activation`` when built, and ``pre_add`` and ``post_add`` when called:

    y = act(norm(x + pre_add) * weight + bias + post_add)

A call with ``pre_add`` returns ``(y, x + pre_add)``, any other returns y.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import *  # noqa: F403
from torch.nn.modules import batchnorm, instancenorm

from . import functional as F
from .pattern import affine_shape
from .reference import check_activation

__all__ = sorted({n for n in dir(torch.nn) if not n.startswith("_")} | {"LayerNorm2d", "Normalize"})

Output = Tensor | tuple[Tensor, Tensor]
"""y, or ``(y, x + pre_add)`` of a call with pre_add."""


def __getattr__(name: str) -> Any:
    if not name.startswith("__"):  # never __path__: with torch.nn's, Python would import its files a second time
        try:
            return getattr(torch.nn, name)
        except AttributeError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn)})


class _Fused(torch.nn.Module):
    """What the norms share: the keyword-only `activation`, checked when the module is built."""

    activation: str | None = None  # on the class, so that a module unpickled or converted from torch's has it too

    def __init__(self, *args: Any, activation: str | None = None, **kwargs: Any) -> None:
        check_activation(activation)
        super().__init__(*args, **kwargs)
        self.activation = activation

    def extra_repr(self) -> str:
        return self._repr(super().extra_repr())

    def _repr(self, base: str) -> str:
        return base if self.activation is None else f"{base}, activation={self.activation}"

    def _extras(self, pre_add: Tensor | None, post_add: Tensor | None) -> dict[str, Any]:
        return {"activation": self.activation, "pre_add": pre_add, "post_add": post_add}


class _BatchNorm(_Fused, batchnorm._BatchNorm):
    def forward(  # type: ignore[override]
        self, input: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None
    ) -> Output:
        self._check_input_dim(input)
        tracking = self.training and self.track_running_stats
        counter = self.num_batches_tracked if tracking else None
        momentum = 0.0 if self.momentum is None else self.momentum
        if counter is not None and self.momentum is None:  # cumulative average
            momentum = 1.0 / (float(counter) + 1.0)
        used = not self.training or self.track_running_stats
        result = F.batch_norm(
            input,
            self.running_mean if used else None,
            self.running_var if used else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            **self._extras(pre_add, post_add),
        )
        if counter is not None:
            counter.add_(1)  # torch counts before the call; here a call that raises leaves no trace
        return result


class _InstanceNorm(_Fused, instancenorm._InstanceNorm):
    def forward(  # type: ignore[override]
        self, input: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None
    ) -> Output:
        self._check_input_dim(input)
        rank = self._get_no_batch_dim()
        axis = input.dim() - rank
        if input.size(axis) != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={axis} to match num_features"
                    f" ({self.num_features}), but got: {input.size(axis)}."
                )
            warnings.warn(
                f"input's size at dim={axis} does not match num_features. You can silence this warning by not passing"
                " in num_features, which is not used because affine=False",
                stacklevel=2,
            )
        if input.dim() != rank:
            return self._apply_instance_norm(input, pre_add, post_add)
        pre_add, post_add = (t.unsqueeze(0) if t is not None and t.dim() == rank else t for t in (pre_add, post_add))
        result = self._apply_instance_norm(input.unsqueeze(0), pre_add, post_add)
        return result.squeeze(0) if isinstance(result, Tensor) else (result[0].squeeze(0), result[1].squeeze(0))

    def _apply_instance_norm(
        self, input: Tensor, pre_add: Tensor | None = None, post_add: Tensor | None = None
    ) -> Output:
        return F.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            **self._extras(pre_add, post_add),
        )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):  # type: ignore[no-redef]
    """`torch.nn.BatchNorm1d`, (N, C) or (N, C, L), with activation, pre_add and post_add."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):  # type: ignore[no-redef]
    """`torch.nn.BatchNorm2d`, (N, C, H, W), with activation, pre_add and post_add."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):  # type: ignore[no-redef]
    """`torch.nn.BatchNorm3d`, (N, C, D, H, W), with activation, pre_add and post_add."""


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):  # type: ignore[no-redef]
    """`torch.nn.InstanceNorm1d`, (N, C, L) or (C, L), with activation, pre_add and post_add."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):  # type: ignore[no-redef]
    """`torch.nn.InstanceNorm2d`, (N, C, H, W) or (C, H, W), with activation, pre_add and post_add."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):  # type: ignore[no-redef]
    """`torch.nn.InstanceNorm3d`, (N, C, D, H, W) or (C, D, H, W), with activation, pre_add and post_add."""


class GroupNorm(_Fused, torch.nn.GroupNorm):  # type: ignore[no-redef]
    """`torch.nn.GroupNorm`, (N, C, ...), with activation, pre_add and post_add."""

    def forward(  # type: ignore[override]
        self, input: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None
    ) -> Output:
        extras = self._extras(pre_add, post_add)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **extras)


class LayerNorm(_Fused, torch.nn.LayerNorm):  # type: ignore[no-redef]
    """`torch.nn.LayerNorm`, (..., *normalized_shape), with activation, pre_add and post_add."""

    def forward(  # type: ignore[override]
        self, input: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None
    ) -> Output:
        extras = self._extras(pre_add, post_add)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **extras)


class RMSNorm(_Fused, torch.nn.RMSNorm):  # type: ignore[no-redef]
    """`torch.nn.RMSNorm`, (..., *normalized_shape), with activation, pre_add and post_add."""

    def forward(  # type: ignore[override]
        self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None
    ) -> Output:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, **self._extras(pre_add, post_add))


class _Parameters(torch.nn.Module):
    """weight (ones) and bias (zeros) of a shape; None for those that are not wanted."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, shape: tuple[int, ...] | None, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        for name, wanted in (("weight", shape is not None), ("bias", shape is not None and bias)):
            empty = torch.empty(shape or (), device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if empty is None else torch.nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)


class LayerNorm2d(_Fused, _Parameters):
    """LayerNorm over the channels of (N, C, ...), any rank from 2 on, in any memory format: ConvNeXt's LayerNorm2d.

    weight and bias have shape (C,).  Raises ValueError where axis 1 of the input is not `num_channels`.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_channels,) if affine else None, bias, device, dtype, activation=activation)
        self.num_channels, self.eps, self.affine = num_channels, eps, affine

    def forward(self, input: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Output:
        if input.dim() < 2 or input.size(1) != self.num_channels:
            raise ValueError(f"expected input of shape (N, {self.num_channels}, ...), got {tuple(input.shape)}")
        shape = (-1,) + (1,) * (input.dim() - 2)
        weight, bias = (None if p is None else p.view(shape) for p in (self.weight, self.bias))
        return F.normalize(input, (1,), weight, bias, eps=self.eps, **self._extras(pre_add, post_add))

    def extra_repr(self) -> str:
        return self._repr(f"{self.num_channels}, eps={self.eps}, affine={self.affine}, bias={self.bias is not None}")


class Normalize(_Fused, _Parameters):
    """Any norm: the axes missing on the right of an einops-style pattern are averaged over.

        Normalize("n (g c) h w -> n g", affine="(g c)", g=8, c=4)      # GroupNorm(8, 32)
        Normalize("b ... d -> b ...", affine="d", center=False, d=512)  # RMSNorm(512)

    `affine` names the axes that weight and bias vary along; all of them need a length.  Lengths of other names are
    checked against the input, or split its axes.

    Raises:
        ValueError: a malformed pattern, an unused length, a name in `affine` without one, an unknown activation; when
            called, an input that does not fit.
    """

    def __init__(
        self,
        pattern: str,
        *,
        affine: str | None = None,
        eps: float = 1e-5,
        center: bool = True,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **lengths: int,
    ) -> None:
        shape = affine_shape(pattern, affine, lengths)
        super().__init__(None if affine is None else shape, bias, device, dtype, activation=activation)
        self.pattern, self.affine, self.eps, self.center = pattern, affine, eps, center
        self.lengths: dict[str, Any] = lengths

    def forward(self, input: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Output:
        return F.normalize(
            input,
            self.pattern,
            self.weight,
            self.bias,
            eps=self.eps,
            center=self.center,
            affine=self.affine,
            **self._extras(pre_add, post_add),
            **self.lengths,
        )

    def extra_repr(self) -> str:
        parts = [repr(self.pattern), f"affine={self.affine!r}", f"eps={self.eps}", f"center={self.center}"]
        parts += [f"bias={self.bias is not None}", *(f"{name}={n}" for name, n in self.lengths.items())]
        return self._repr(", ".join(parts))
