"""Norms of other libraries: classes that compute one of ours, told by their structure and proved by a probe.

A candidate is a mixin whose ``forward`` is ours.  A module is taken for one where its attributes fit, and where both
give the same numbers on random inputs and parameters, in training and in evaluation.  No library is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import activations
from . import functional as F
from .nn import _Fused


class _Adopted(_Fused):
    """What candidates share: they are what the class was, but for forward, which takes pre_add and post_add too."""

    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def fits(cls, module: Any) -> bool:
        raise NotImplementedError

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        """Of an input."""
        raise NotImplementedError

    @classmethod
    def attributes(cls, module: Any) -> dict[str, Any]:
        """What a module has more once it is one."""
        return {}

    def _promoted(self, x: Tensor, pre_add: Tensor | None, post_add: Tensor | None) -> dict[str, Any]:
        """The extras of a norm whose result has the dtype of a product of x and weight."""
        extras = self._extras(pre_add, post_add)
        if self.weight is not None and self.weight.dtype != x.dtype:
            extras["out_dtype"] = torch.promote_types(self.weight.dtype, x.dtype)
        return extras


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _eps(module: Any) -> float | None:
    """By the names that libraries have for it."""
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon"))
    return next((float(eps) for eps in found if isinstance(eps, (int, float))), None)


def _vectors(module: torch.nn.Module, *names: str, other: Sequence[str] = ()) -> bool:
    """Whether its tensors are these, vectors of one size, and maybe others."""
    tensors = _tensors(module)
    sizes = {tensors[name].shape for name in names if name in tensors}
    return set(names) <= set(tensors) <= {*names, *other} and len(sizes) == 1 and len(*sizes) == 1


class RMSNorm(_Adopted):
    """xhat, rounded to the dtype of x, times weight: Llama, Mistral, Qwen, T5."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return _vectors(module, "weight") and _eps(module) is not None

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, 2, module.weight.numel()

    def forward(self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Any:
        assert self.weight is not None
        extras = self._promoted(x, pre_add, post_add)
        return F.rms_norm(x, tuple(self.weight.shape), self.weight, _eps(self), round_first=True, **extras)


class OffsetRMSNorm(RMSNorm):
    """xhat · (1 + weight), rounded once: Gemma."""

    def forward(self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Any:
        assert self.weight is not None
        extras = self._extras(pre_add, post_add)
        return F.rms_norm(x, tuple(self.weight.shape), 1.0 + self.weight.float(), _eps(self), **extras)


class LastNorm(_Adopted):
    """LayerNorm over the last axis."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return _vectors(module, "weight", "bias") and _eps(module) is not None

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, 5, 2, module.weight.numel()

    def forward(self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Any:
        assert self.weight is not None
        extras = self._extras(pre_add, post_add)
        return F.layer_norm(x, tuple(self.weight.shape), self.weight, self.bias, _eps(self) or 0.0, **extras)


class ChannelNorm(LastNorm):
    """LayerNorm over the channels of (N, C, H, W): LayerNorm2d."""

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, module.weight.numel(), 5, 2

    def forward(self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Any:
        extras = self._extras(pre_add, post_add)
        return F.normalize(
            x, "n c ... -> n ...", self.weight, self.bias, eps=_eps(self) or 0.0, affine="c", **extras
        )


class FrozenBatchNorm(_Adopted):
    """BatchNorm whose statistics and parameters are buffers: detection backbones."""

    running_mean: Tensor
    running_var: Tensor

    @classmethod
    def fits(cls, module: Any) -> bool:
        named = ("weight", "bias", "running_mean", "running_var")
        return _vectors(module, *named) and not list(module.parameters())

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, module.weight.numel(), 5, 2

    def forward(self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Any:
        eps = _eps(self)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5 if eps is None else eps,
            **self._promoted(x, pre_add, post_add),
        )  # fmt: skip


def _activated(module: Any) -> dict[str, Any]:
    """What follows in the module itself: nothing that drops, and one of our activations (timm's norms with act)."""
    drop, act = getattr(module, "drop", None), getattr(module, "act", None)
    if act is None or not (drop is None or isinstance(drop, torch.nn.Identity)):
        return {}
    try:
        return {"activation": activations.check(act)}
    except ValueError:
        return {}


class BatchNormAct(_Adopted):
    """BatchNorm and an activation in one module."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return isinstance(module, torch.nn.BatchNorm2d) and bool(_activated(module))

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, module.num_features, 5, 2

    @classmethod
    def attributes(cls, module: Any) -> dict[str, Any]:
        return _activated(module)

    def forward(self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Any:
        from .nn import _BatchNorm

        return _BatchNorm.forward(self, x, pre_add=pre_add, post_add=post_add)  # type: ignore[arg-type]


class Groups(_Adopted):
    """GroupNorm, with an activation in the module or without."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return isinstance(module, torch.nn.GroupNorm) and (not hasattr(module, "act") or bool(_activated(module)))

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, module.num_channels, 5, 2

    @classmethod
    def attributes(cls, module: Any) -> dict[str, Any]:
        return _activated(module)

    def forward(self, x: Tensor, *, pre_add: Tensor | None = None, post_add: Tensor | None = None) -> Any:
        module: Any = self
        extras = self._extras(pre_add, post_add)
        return F.group_norm(x, module.num_groups, self.weight, self.bias, module.eps, **extras)


class LastNormAct(LastNorm):
    """LayerNorm over the last axis, and an activation in the module."""

    @classmethod
    def attributes(cls, module: Any) -> dict[str, Any]:
        return _activated(module)


class ChannelNormAct(ChannelNorm):
    """LayerNorm2d, and an activation in the module."""

    @classmethod
    def attributes(cls, module: Any) -> dict[str, Any]:
        return _activated(module)


CANDIDATES: tuple[type[_Adopted], ...] = (
    RMSNorm, OffsetRMSNorm, LastNorm, ChannelNorm, FrozenBatchNorm, BatchNormAct, Groups, LastNormAct, ChannelNormAct,
)  # fmt: skip


_kinds: dict[tuple[type, type], type] = {}


def adopted(candidate: type, theirs: type) -> type:
    """The class of a module that is still one of theirs, with the forward of a candidate."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # the class has no place of its own to be found in
        return _again, (candidate, theirs), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    if (candidate, theirs) not in _kinds:
        place = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "__reduce_ex__": __reduce_ex__}
        _kinds[candidate, theirs] = type(theirs.__name__, (candidate, theirs), place)
    return _kinds[candidate, theirs]


def _again(candidate: type, theirs: type) -> Any:
    kind: Any = adopted(candidate, theirs)
    return kind.__new__(kind)


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of a probe, by the dtype of x: what roundings of another order may come to, and no other formula does."""


def _same(module: Any, candidate: type[_Adopted], parameters: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a copy of the module on the CPU gives the same with the forward of a candidate, for parameters and x of
    such dtypes; or refuses them."""
    original = copy.deepcopy(module)
    if any(t.is_meta for t in _tensors(module).values()):
        original = original.to_empty(device="cpu")
    original = original.cpu().to(parameters)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in _tensors(original).values():
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
        ours = copy.deepcopy(original)
        ours.__class__ = adopted(candidate, type(ours))
        ours.__dict__.update(candidate.attributes(module))
        x = torch.randn(candidate.shape(module), generator=generator).to(dtype)
        for training in (True, False):
            try:
                expected = original.train(training)(x.clone())
            except RuntimeError:
                return parameters != dtype
            got = ours.train(training)(x.clone())
            if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (x.shape, got.dtype):
                return False
            if not torch.allclose(got.float(), expected.float(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]):
                return False
    return True


def candidate_of(module: torch.nn.Module) -> type[_Adopted] | None:
    """The first candidate that a module is one of; None where it is none."""
    for candidate in CANDIDATES:
        try:
            half, full = torch.bfloat16, torch.float32
            dtypes = (full, full), (half, half), (full, half)
            if candidate.fits(module) and all(_same(module, candidate, *pair) for pair in dtypes):
                return candidate
        except Exception:  # code that is not ours may ask for anything: it is no such norm then
            continue
    return None


Converter = Callable[[torch.nn.Module], type | str | None]
