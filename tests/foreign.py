"""Norms as other libraries write them, and others by the same names, for tests of conversion."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LlamaRMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(n)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        h = hidden_states.to(torch.promote_types(dtype, torch.float32))
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(n)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 + self.weight.float())).type_as(x)


class ConvNextLayerNorm(nn.LayerNorm):
    def __init__(self, n: int, data_format: str) -> None:
        super().__init__(n, eps=1e-6)
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_first":
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(x)


class FlexibleLayerNorm(nn.Module):
    """Over channels of images, and over the last axis of all else."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.permute(0, 2, 3, 1)
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(n) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = w * (var + 1e-5).rsqrt()
        return x * scale + (b - mean * scale)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0,
            self.eps,
        )  # fmt: skip
        return self.act(self.drop(y))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, n: int) -> None:
        super().__init__(2, n)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class LayerNormAct2d(nn.LayerNorm):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(self.drop(y.permute(0, 3, 1, 2)))


class Renamed(nn.GroupNorm):
    """A subclass that changes nothing."""


FOREIGN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LlamaRMSNorm": (lambda: LlamaRMSNorm(8), (2, 3, 8)),
    "GemmaRMSNorm": (lambda: GemmaRMSNorm(8), (2, 3, 8)),
    "ConvNextLayerNorm": (lambda: ConvNextLayerNorm(8, "channels_last"), (2, 3, 4, 8)),
    "ConvNextLayerNorm, channels first": (lambda: ConvNextLayerNorm(8, "channels_first"), (2, 8, 3, 4)),
    "images": (lambda: FlexibleLayerNorm(4), (2, 4, 3, 5)),
    "rows": (lambda: FlexibleLayerNorm(4), (2, 4, 4)),
    "FrozenBatchNorm2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8)), (2, 3, 3, 4)),
    "BatchNormAct2d": (lambda: BatchNormAct2d(8), (2, 8, 3, 4)),
    "GroupNormAct": (lambda: GroupNormAct(8), (2, 8, 3, 4)),
    "LayerNormAct2d": (lambda: LayerNormAct2d(8), (2, 8, 3, 4)),
    "a subclass": (lambda: Renamed(2, 8), (2, 8, 3, 4)),
}


class Scaled(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class HalfNorm(LlamaRMSNorm):
    """By its name and its attributes a norm that is known, and by what it computes none."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden_states)


class WideRMSNorm(LlamaRMSNorm):
    """Which returns fp32 whatever comes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.float())


class OutsideNorm(LlamaRMSNorm):
    """With eps outside of the root, as many are written: another formula for small numbers."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = hidden_states
        return self.weight * (h / (h.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon))


class DetachedNorm(LlamaRMSNorm):
    """The same numbers, and other gradients."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = hidden_states
        scale = torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (h.float() * scale.detach()).to(h.dtype)


class AbsoluteNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * self.weight.sign()


class GatedRMSNorm(LlamaRMSNorm):
    """Which takes more than one input."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states if gate is None else hidden_states * F.silu(gate))


class RandomNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise ValueError("it wants something else")


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.LayerNorm((4, 4)), dim=0)


UNKNOWN = "computes no norm that is known here"
OTHER_FORMULAS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scaled": (lambda: Scaled(4), UNKNOWN), "half": (lambda: HalfNorm(4), UNKNOWN),
    "eps outside": (lambda: OutsideNorm(4), UNKNOWN), "detached": (lambda: DetachedNorm(4), UNKNOWN),
    "absolute": (lambda: AbsoluteNorm(4), UNKNOWN), "gated": (lambda: GatedRMSNorm(4), UNKNOWN),
    "wide": (lambda: WideRMSNorm(4), UNKNOWN),
    "raises": (lambda: RandomNorm(4), UNKNOWN), "lazy": (nn.LazyBatchNorm2d, "convert after a first call"),
    "sync": (lambda: nn.SyncBatchNorm(4), "all processes"), "parametrized": (parametrized, "parametrized LayerNorm"),
    "dropping": (lambda: dropping(), UNKNOWN),
}  # fmt: skip


def dropping() -> nn.Module:
    norm = BatchNormAct2d(8)
    norm.drop = nn.Dropout(0.5)
    return norm
