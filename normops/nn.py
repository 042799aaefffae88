"""torch.nn with fused norms: ``from normops import nn`` serves code written for ``from torch import nn``.

Every other name is torch.nn's own.  The norms are subclasses of torch's, with the same arguments, state_dict and repr;
they take ``activation`` and ``out_dtype`` when built, and ``pre_add``, ``post_add`` and another ``activation`` when
called:

    y = act((s - mean) / sqrt(var + eps) * weight + bias + post_add)        s = x + pre_add

A call with ``pre_add`` returns ``(y, s)``, any other returns y.  x is float16, bfloat16, float32 or float64, the
parameters too; statistics are float32 (float64 for float64), and y has ``out_dtype``, or x's dtype without, under
autocast too.  An unknown ``activation`` raises ValueError when a module is built, an ``out_dtype`` that is none of the
four TypeError; calls raise what the functions of :mod:`normops.functional` do.

>>> import torch
>>> from normops import nn
>>> norm = nn.RMSNorm(4, activation="silu")
>>> norm(torch.ones(2, 4), pre_add=torch.ones(2, 4))[1][0].tolist()
[2.0, 2.0, 2.0, 2.0]
"""

# ruff: noqa: F403

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules import batchnorm, instancenorm

from . import activations, rules
from . import functional as F
from .activations import Act
from .norm import affine_shape

Add = Tensor | None

if not TYPE_CHECKING:
    from torch.nn import *

__all__ = sorted({n for n in dir(torch.nn) if not n.startswith("_")} | {"LayerNorm2d", "Normalize"})


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
    """What the norms share: the keyword-only `activation` and `out_dtype`, checked when the module is built."""

    # On the class, so that a module unpickled or converted from torch's has them too.
    activation: str | None = None
    out_dtype: torch.dtype | None = None

    def __init__(
        self, *args: Any, activation: Act = None, out_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        name = None if activation is None else activations.check(activation)
        rules.dtype(out_dtype)
        super().__init__(*args, **kwargs)
        self.activation, self.out_dtype = name, out_dtype

    def __init_subclass__(cls) -> None:
        """Give a norm that takes torch's arguments and the extras their signature, for skip_init to look at."""
        super().__init_subclass__()
        init: Any = next(vars(c)["__init__"] for c in cls.__mro__ if c is not _Fused and "__init__" in vars(c))
        own = list(inspect.signature(init).parameters.values())[1:]
        if init.__module__.startswith("torch.nn") and all(p.kind is not p.VAR_KEYWORD for p in own):
            extras = inspect.signature(_Fused.__init__).parameters.values()
            own += [p for p in extras if p.kind is p.KEYWORD_ONLY]
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    if TYPE_CHECKING:

        @overload
        def __call__(
            self, input: Tensor, *, pre_add: None = ..., post_add: Tensor | None = ..., activation: Act = ...
        ) -> Tensor: ...
        @overload
        def __call__(
            self, input: Tensor, *, pre_add: Tensor, post_add: Tensor | None = ..., activation: Act = ...
        ) -> F.Pair: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def extra_repr(self) -> str:
        return self._repr(super().extra_repr())

    def _repr(self, base: str) -> str:
        extras = {"activation": self.activation, "out_dtype": self.out_dtype}
        return ", ".join([base, *(f"{name}={value}" for name, value in extras.items() if value is not None)])

    def _extras(self, pre_add: Tensor | None, post_add: Tensor | None, activation: Act) -> dict[str, Any]:
        if activation is None:
            activation = self.activation
        return {"activation": activation, "pre_add": pre_add, "post_add": post_add, "out_dtype": self.out_dtype}

    def _leaf(self, input: Proxy, pre_add: Any, post_add: Any, activation: Act) -> Any:
        """One node in a graph of torch.fx, which takes only the modules of torch.nn for leaves of its own accord."""
        given = (("pre_add", pre_add), ("post_add", post_add), ("activation", activation))
        adds = {name: value for name, value in given if value is not None}
        tracer: Any = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), adds)


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


def _recomputing() -> bool:
    """Whether a backward runs, which calls a norm only to compute again what a checkpoint did not keep: running
    statistics have moved for this batch."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _BatchNorm(_Fused, batchnorm._BatchNorm):
    def forward(self, input: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        if isinstance(input, Proxy):
            return self._leaf(input, pre_add, post_add, activation)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        tracking = self.training and self.track_running_stats and not _recomputing()
        counter = self.num_batches_tracked if tracking else None
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if counter is not None and self.momentum is None:  # cumulative average; a graph holds no number of a tensor
            momentum = 1.0 / ((counter.double() if torch.compiler.is_compiling() else float(counter)) + 1.0)
        used = not self.training or tracking
        result = F.batch_norm(
            input, self.running_mean if used else None, self.running_var if used else None, self.weight, self.bias,
            self.training or (self.running_mean is None and self.running_var is None), momentum, self.eps,
            **self._extras(pre_add, post_add, activation),
        )  # fmt: skip
        if counter is not None:
            counter.add_(1)  # not of a call that was refused
        return result

    @property
    def qconfig(self) -> Any:
        """Asked for before a SyncBatchNorm or quantisation replaces a norm; RuntimeError if an activation is lost."""
        if self.activation not in (None, "identity"):
            lost = f"a {type(self).__name__} with activation={self.activation!r}"
            raise RuntimeError(f"{lost} is about to be replaced by a module without: build it without before")
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]


class _InstanceNorm(_Fused, instancenorm._InstanceNorm):
    def forward(self, input: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        if isinstance(input, Proxy):
            return self._leaf(input, pre_add, post_add, activation)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        rank: int = self._get_no_batch_dim()  # type: ignore[no-untyped-call]
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
            return self._apply_instance_norm(input, pre_add, post_add, activation)
        pre_add, post_add = (t.unsqueeze(0) if t is not None and t.dim() == rank else t for t in (pre_add, post_add))
        result = self._apply_instance_norm(input.unsqueeze(0), pre_add, post_add, activation)
        return result.squeeze(0) if isinstance(result, Tensor) else (result[0].squeeze(0), result[1].squeeze(0))

    def _apply_instance_norm(
        self, input: Tensor, pre_add: Tensor | None = None, post_add: Tensor | None = None,
        activation: Act = None,
    ) -> Any:  # fmt: skip
        used = not self.training or not _recomputing()
        return F.instance_norm(
            input, self.running_mean if used else None, self.running_var if used else None, self.weight, self.bias,
            self.training or not self.track_running_stats, self.momentum if self.momentum is not None else 0.0,
            self.eps, **self._extras(pre_add, post_add, activation),
        )  # fmt: skip


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with the extras: mean and variance over (N, L) for each channel of (N, C) or (N, C, L).

    >>> import torch, normops
    >>> normops.nn.BatchNorm1d(3, activation="relu")(torch.randn(4, 3)).shape
    torch.Size([4, 3])
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the extras: mean and variance over (N, H, W) for each channel of (N, C, H, W).

    >>> import torch, normops
    >>> normops.nn.BatchNorm2d(3, activation="relu")(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with the extras: mean and variance over (N, D, H, W) for each channel of (N, C, D, H, W).

    >>> import torch, normops
    >>> normops.nn.BatchNorm3d(3, momentum=None)(torch.randn(2, 3, 2, 2, 2)).shape
    torch.Size([2, 3, 2, 2, 2])
    """


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` with the extras: over L for each sample and channel of (N, C, L) or (C, L).

    >>> import torch, normops
    >>> normops.nn.InstanceNorm1d(3)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` with the extras: over (H, W) for each sample and channel of (N, C, H, W) or (C, H, W).

    >>> import torch, normops
    >>> normops.nn.InstanceNorm2d(3, affine=True)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` with the extras: over (D, H, W) for each channel of (N, C, D, H, W) or (C, D, H, W).

    >>> import torch, normops
    >>> normops.nn.InstanceNorm3d(3)(torch.randn(3, 2, 2, 2)).shape
    torch.Size([3, 2, 2, 2])
    """


class GroupNorm(_Fused, torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` with the extras: over (C / num_groups, ...) of (N, C, ...).

    >>> import torch, normops
    >>> normops.nn.GroupNorm(2, 4, activation="silu")(torch.randn(2, 4, 5)).shape
    torch.Size([2, 4, 5])
    """

    def forward(self, input: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        extras = self._extras(pre_add, post_add, activation)
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **extras)


class LayerNorm(_Fused, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with the extras: over the last axes of (..., *normalized_shape).

    >>> import torch, normops
    >>> normops.nn.LayerNorm([3, 4])(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def forward(self, input: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        extras = self._extras(pre_add, post_add, activation)
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **extras)


class RMSNorm(_Fused, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the extras: over the last axes of (..., *normalized_shape), without a mean.

    >>> import torch, normops
    >>> normops.nn.RMSNorm(4, eps=1e-6)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def forward(self, x: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        extras = self._extras(pre_add, post_add, activation)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, **extras)


class LayerNorm2d(_Fused, torch.nn.LayerNorm):
    """LayerNorm over the channels of (N, C, ...), any rank from 2 on, in any memory format: ConvNeXt's LayerNorm2d.

    weight and bias have shape (C,).  It is a :class:`torch.nn.LayerNorm`, so that what treats norms by their class
    (weight decay, say) finds it.  Raises ValueError where axis 1 of the input is not `num_channels`.  Source: Liu et
    al. 2022 (ConvNeXt).

    >>> import torch, normops
    >>> normops.nn.LayerNorm2d(3, eps=1e-6)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, num_channels: int, eps: float = 1e-5, affine: bool = True, *, bias: bool = True,
        activation: Act = None, out_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_channels, eps, affine, bias, device, dtype, activation=activation, out_dtype=out_dtype
        )  # fmt: skip

    @property
    def num_channels(self) -> int:
        return self.normalized_shape[0]

    def forward(self, input: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        if isinstance(input, Proxy):
            return self._leaf(input, pre_add, post_add, activation)
        if input.dim() < 2 or input.size(1) != self.num_channels:
            raise ValueError(f"expected input of shape (N, {self.num_channels}, ...), got {tuple(input.shape)}")
        return F.normalize(
            input, "n c ... -> n ...", self.weight, self.bias, eps=self.eps,
            affine="c" if self.elementwise_affine else None, **self._extras(pre_add, post_add, activation),
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = f"{self.num_channels}, eps={self.eps}, affine={self.elementwise_affine}, bias={self.bias is not None}"
        return self._repr(parts)


class Normalize(_Fused, _Parameters):
    """Any norm: the axes missing on the right of an einops-style pattern are averaged over.

        Normalize("n (g c) h w -> n g", affine="(g c)", g=8, c=4)      # GroupNorm(8, 32)
        Normalize("b ... d -> b ...", affine="d", center=False, d=512)  # RMSNorm(512)

    `affine` names the axes that weight and bias vary along; all of them need a length.  Lengths of other names are
    checked against the input, or split its axes.

    Raises:
        ValueError: a malformed pattern, an unused length, a name in `affine` without one, an unknown activation; when
            called, an input that does not fit.

    >>> import torch, normops
    >>> normops.nn.Normalize("b ... d -> b ...", affine="d", center=False, d=4)(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self, pattern: str, *, affine: str | None = None, eps: float = 1e-5, center: bool = True, bias: bool = True,
        activation: Act = None, out_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **lengths: int,
    ) -> None:  # fmt: skip
        shape = affine_shape(pattern, affine, lengths)  # checks the pattern, also where there are no parameters
        wanted = None if affine is None else shape
        super().__init__(wanted, bias, device, dtype, activation=activation, out_dtype=out_dtype)
        self.pattern, self.affine, self.eps, self.center = pattern, affine, eps, center
        self.lengths: dict[str, Any] = lengths

    def forward(self, input: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        return F.normalize(
            input, self.pattern, self.weight, self.bias, eps=self.eps, center=self.center, affine=self.affine,
            **self._extras(pre_add, post_add, activation), **self.lengths,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [repr(self.pattern), f"affine={self.affine!r}", f"eps={self.eps}", f"center={self.center}"]
        parts += [f"bias={self.bias is not None}", *(f"{name}={n}" for name, n in self.lengths.items())]
        return self._repr(", ".join(parts))


if TYPE_CHECKING:  # last, for mypy takes the first of two definitions of a name
    from torch.nn import Buffer as Buffer
    from torch.nn import Parameter as Parameter
    from torch.nn import functional as functional
    from torch.nn import init as init
    from torch.nn import utils as utils
    from torch.nn.modules import *  # type: ignore[assignment]
