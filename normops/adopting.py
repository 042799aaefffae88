"""Norms of other libraries: classes that compute one of ours, told by their structure and proved by a probe.

A candidate is a mixin whose ``forward`` is ours.  A module is taken for one where its attributes fit, and where both
give the same numbers on random inputs and parameters, in training and in evaluation.  No library is imported.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import activations
from . import functional as F
from .activations import Act
from .nn import Add, GroupNorm, _BatchNorm, _Fused


class _Adopted(_Fused):
    """What candidates share: they are what the class was, but for forward, which takes pre_add and post_add too."""

    weight: Tensor | None
    bias: Tensor | None
    rank: int | None = None
    """Of inputs; others are the class's own, which may mean another axis by them.  None: any."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        raise NotImplementedError

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        """Of an input: images, unless it says otherwise."""
        return 3, module.weight.numel(), 5, 2

    @classmethod
    def attributes(cls, module: Any) -> dict[str, Any]:
        """What a module has more once it is one: the activation that it ends in itself, where nothing is dropped before
        that (timm's norms with act)."""
        drop, act = getattr(module, "drop", None), getattr(module, "act", None)
        if act is None or not (drop is None or isinstance(drop, torch.nn.Identity)):
            return {}
        try:
            return {"activation": activations.check(act)}
        except ValueError:
            return {}

    def _promoted(
        self, x: Tensor, pre_add: Tensor | None, post_add: Tensor | None, activation: Act
    ) -> dict[str, Any]:
        """The extras of a norm whose result has the dtype of a product of x and weight."""
        extras = self._extras(pre_add, post_add, activation)
        if self.weight is not None and self.weight.dtype != x.dtype:
            extras["out_dtype"] = torch.promote_types(self.weight.dtype, x.dtype)
        return extras


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def _eps(module: Any) -> float | None:
    """By the names that libraries have for it."""
    for name in ("variance_epsilon", "eps", "epsilon"):  # of the instance: a look for a missing one is dear
        if name in module.__dict__:
            return float(module.__dict__[name])
    return None


def _vectors(module: torch.nn.Module, *names: str) -> bool:
    """Whether its tensors are these, vectors of one size."""
    tensors = _tensors(module)
    sizes = {t.shape for t in tensors.values()}
    return set(names) == set(tensors) and len(sizes) == 1 and len(*sizes) == 1


class RMSNorm(_Adopted):
    """xhat, rounded to the dtype of x, times weight: Llama, Mistral, Qwen, T5."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return _vectors(module, "weight") and _eps(module) is not None

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, 2, module.weight.numel()

    def forward(self, x: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        assert self.weight is not None
        extras = self._promoted(x, pre_add, post_add, activation)
        return F.rms_norm(x, tuple(self.weight.shape), self.weight, _eps(self), round_first=True, **extras)


class OffsetRMSNorm(RMSNorm):
    """xhat · (1 + weight), rounded once: Gemma."""

    def forward(self, x: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        assert self.weight is not None
        extras = self._extras(pre_add, post_add, activation)
        return F.rms_norm(x, tuple(self.weight.shape), 1.0 + self.weight.float(), _eps(self), **extras)


class LastNorm(_Adopted):
    """LayerNorm over the last axis."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return _vectors(module, "weight", "bias") and _eps(module) is not None

    @classmethod
    def shape(cls, module: Any) -> tuple[int, ...]:
        return 3, 5, 2, module.weight.numel()

    def forward(self, x: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        assert self.weight is not None
        extras = self._extras(pre_add, post_add, activation)
        return F.layer_norm(x, tuple(self.weight.shape), self.weight, self.bias, _eps(self) or 0.0, **extras)


class ChannelNorm(_Adopted):
    """LayerNorm over the channels of (N, C, H, W): LayerNorm2d."""

    rank = 4

    @classmethod
    def fits(cls, module: Any) -> bool:
        return LastNorm.fits(module)

    def forward(self, x: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        extras = self._extras(pre_add, post_add, activation)
        return F.normalize(
            x, "n c ... -> n ...", self.weight, self.bias, eps=_eps(self) or 0.0, affine="c", **extras
        )


class FrozenBatchNorm(_Adopted):
    """BatchNorm whose statistics and parameters are buffers: detection backbones."""

    running_mean: Tensor
    running_var: Tensor
    rank = 4

    @classmethod
    def fits(cls, module: Any) -> bool:
        named = ("weight", "bias", "running_mean", "running_var")
        return _vectors(module, *named) and not list(module.parameters())

    def forward(self, x: Tensor, *, pre_add: Add = None, post_add: Add = None, activation: Act = None) -> Any:
        eps = _eps(self)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5 if eps is None else eps,
            **self._promoted(x, pre_add, post_add, activation),
        )  # fmt: skip


class ImageNorm(_Adopted):
    """BatchNorm of images, with an activation in the module or without."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return isinstance(module, torch.nn.BatchNorm2d)

    forward = _BatchNorm.forward


class GroupsNorm(_Adopted):
    """GroupNorm, with an activation in the module or without."""

    @classmethod
    def fits(cls, module: Any) -> bool:
        return isinstance(module, torch.nn.GroupNorm)

    forward = GroupNorm.forward


CANDIDATES: tuple[type[_Adopted], ...] = (
    RMSNorm, OffsetRMSNorm, LastNorm, ChannelNorm, FrozenBatchNorm, ImageNorm, GroupsNorm,
)  # fmt: skip


_kinds: dict[tuple[type, type], type] = {}


def adopted(candidate: type, theirs: Any) -> type:
    """The class of a module that is still one of theirs, with the forward of a candidate."""
    if (candidate, theirs) not in _kinds:
        ours: Any = candidate
        name = next(iter(list(inspect.signature(theirs.forward).parameters)[1:]), "input")

        def forward(self: Any, *inputs: Tensor, **given: Any) -> Any:
            """Of a candidate, whose input may have the name that it has with theirs."""
            (x,) = inputs or (given.pop(name),)
            if ours.rank not in (None, x.dim()) and not given:
                return theirs.forward(self, x)
            return ours.forward(self, x, **given)

        place = {"forward": forward} if issubclass(candidate, _Adopted) else {}
        _kinds[candidate, theirs] = named_alike((candidate, theirs), place, adopted, candidate, theirs)
    return _kinds[candidate, theirs]


def named_alike(bases: tuple[Any, ...], place: dict[str, Any], make: Callable[..., type], *arguments: Any) -> type:
    """A class by the name of the last of its bases; ``make(*arguments)`` makes it again for copies and pickles, for it
    has no place of its own to be found in."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _again, (make, *arguments), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    theirs = bases[-1]
    place |= {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "__reduce_ex__": __reduce_ex__}
    return type(theirs.__name__, bases, place)


def _again(make: Callable[..., type], *arguments: Any) -> Any:
    kind: Any = make(*arguments)
    return kind.__new__(kind)


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
"""Of a probe, by the dtype of x: what roundings of another order may come to, and no other formula does."""
SCALES = (1.0, 1e-3, 30.0)
"""Of the inputs of a probe: small ones show eps, and where it stands."""


def _bare(module: Any, parameters: torch.dtype) -> Any:
    """A copy on the CPU, of such parameters, without hooks."""
    bare = copy.copy(module)
    bare.__dict__ = dict(module.__dict__)
    for name, value in module.__dict__.items():
        if name.endswith("_hooks") and isinstance(value, dict):
            bare.__dict__[name] = type(value)()
    bare = copy.deepcopy(bare)
    if any(t.is_meta for t in _tensors(bare).values()):
        bare = bare.to_empty(device="cpu")
    return bare.cpu().to(parameters)


def _run(module: Any, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float32, device="cpu").reshape(y.shape).to(y.dtype))
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())]
    return [t for t in found if t is not None]


def _same(module: Any, candidate: type[_Adopted], parameters: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a copy of the module gives the same with the forward of a candidate, for parameters and x of such dtypes;
    or refuses them, where they differ."""
    original = _bare(module, parameters)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in _tensors(original).items():
            if t.is_floating_point():  # of either sign, but for a variance
                drawn = torch.rand(t.shape, generator=generator, dtype=torch.float32, device="cpu") + 0.5
                t.copy_(drawn if "var" in name else drawn * torch.linspace(-1, 1, t.numel()).sign().reshape(t.shape))
    ours = copy.deepcopy(original)
    ours.__class__ = adopted(candidate, type(ours))
    ours.__dict__.update(candidate.attributes(module))
    full = candidate.shape(module)
    other = full[:-1] if full[1] == module.weight.numel() else full[-2:]  # a rank less
    exact = parameters == dtype == torch.float32
    for shape, scale, training in product((full, other), SCALES, (True, False)) if exact else [(full, 1.0, True)]:
        x = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale).to(dtype)
        try:
            expected = _run(original.train(training), x)
        except (RuntimeError, ValueError, IndexError):
            expected = []
        if not expected or expected[0].shape != x.shape:  # it takes no such input, or makes something else of it
            if parameters != dtype or shape != full:
                continue
            return False
        got = _run(ours.train(training), x)
        if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in expected]:
            return False
        for a, b in zip(got, expected, strict=True):
            bound = TOLERANCES[dtype] * max(1.0, b.abs().max().item())
            if not torch.allclose(a.float(), b.float(), rtol=TOLERANCES[dtype], atol=bound):
                return False
    return True


def _one_input(module: Any) -> bool:
    parameters = list(inspect.signature(module.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def candidate_of(module: torch.nn.Module) -> type[_Adopted] | None:
    """The first candidate that a module is one of; None where it is none."""
    for candidate in CANDIDATES:
        try:
            half, full = torch.bfloat16, torch.float32
            dtypes = (full, full), (half, half), (full, half)
            if candidate.fits(module) and _one_input(module) and "forward" not in module.__dict__:
                with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                    if all(_same(module, candidate, *pair) for pair in dtypes):
                        return candidate
        except Exception:  # code that is not ours may ask for anything: it is no such norm then
            continue
    return None

