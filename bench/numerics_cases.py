"""What ``python -m bench numerics`` measures: norms, data at which sums cancel or overflow, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

import normops
from normops import functional as F

from .providers import DTYPES, statistic

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GROUPS = 4
"""Of a GroupNorm."""
Parameter = Tensor | None
Call = Callable[[Tensor, Parameter, Parameter, float], Tensor]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Norm:
    name: str
    sizes: Sizes
    """Of x, with the channels split where the norm splits them."""
    reduced: Sizes
    affine: Sizes
    """Axes of these sizes along which w and b vary."""
    ours: Call
    torchs: Call
    center: bool = True
    wide: bool = False
    """Whether parameters are kept in the precision of the statistics, as in mixed precision training."""

    @property
    def shape(self) -> Sizes:
        """Of x."""
        n, *inner = self.sizes
        return (n, prod(inner[:2]), *inner[2:]) if len(self.sizes) == 5 else self.sizes

    @property
    def groups(self) -> int:
        return prod(n for i, n in enumerate(self.sizes) if i not in self.reduced)

    @property
    def elements(self) -> int:
        """Of a group."""
        return prod(self.sizes[i] for i in self.reduced)

    def spread(self, data: Tensor, layout: str) -> Tensor:
        """x of data[group, element]: the elements of a group in the order in which they lie in memory."""
        like = torch.empty(self.shape, device="meta").contiguous(memory_format=FORMATS[layout])
        strides = like.view(self.sizes).stride()
        kept = [i for i in range(len(self.sizes)) if i not in self.reduced]
        walk = kept + sorted(self.reduced, key=lambda i: -strides[i])
        t = data.view([self.sizes[i] for i in walk]).permute([walk.index(i) for i in range(len(walk))])
        return t.reshape(self.shape).contiguous(memory_format=FORMATS[layout])

    def parameter(self, values: Tensor) -> Tensor:
        """w or b of so many values, as both libraries take it."""
        return values.view([self.sizes[i] for i in self.affine]) if len(self.sizes) == 4 else values

    @property
    def parameters(self) -> int:
        return prod(self.sizes[i] for i in self.affine)


def _any_axes(x: Tensor, w: Parameter, b: Parameter, eps: float) -> Tensor:
    """Means over n and h alone, of torch's LayerNorm."""
    assert w is not None and b is not None
    t = x.permute(1, 3, 0, 2)
    y = TF.layer_norm(t.flatten(2), (t.shape[2] * t.shape[3],), None, None, eps).view(t.shape).permute(2, 0, 3, 1)
    return y * w.view(-1, 1, 1) + b.view(-1, 1, 1)


def _instance(name: str, *sizes: int) -> Norm:
    return Norm(
        name, sizes, (2, 3), (1,),
        lambda x, w, b, eps: F.instance_norm(x, None, None, w, b, True, 0.1, eps),
        lambda x, w, b, eps: TF.instance_norm(x, None, None, w, b, True, 0.1, eps), wide=True,
    )  # fmt: skip


# Groups of 512 and a few elements, of which a forced engine makes several tiles.
NORMS = (
    Norm(
        "BatchNorm", (4, 6, 8, 16), (0, 2, 3), (1,),
        lambda x, w, b, eps: F.batch_norm(x, None, None, w, b, True, 0.1, eps),
        lambda x, w, b, eps: TF.batch_norm(x, None, None, w, b, True, 0.1, eps), wide=True,
    ),
    Norm(
        "LayerNorm", (6, 8, 9, 8), (1, 2, 3), (1, 2, 3),
        lambda x, w, b, eps: F.layer_norm(x, x.shape[1:], w, b, eps),
        lambda x, w, b, eps: TF.layer_norm(x, x.shape[1:], w, b, eps),
    ),
    _instance("InstanceNorm", 2, 3, 16, 33),
    Norm(
        "GroupNorm", (2, GROUPS, 8, 8, 8), (2, 3, 4), (1, 2),
        lambda x, w, b, eps: F.group_norm(x, GROUPS, w, b, eps),
        lambda x, w, b, eps: TF.group_norm(x, GROUPS, w, b, eps),
    ),
    Norm(
        "RMSNorm", (6, 8, 9, 8), (1, 2, 3), (1, 2, 3),
        lambda x, w, b, eps: F.rms_norm(x, x.shape[1:], w, eps),
        lambda x, w, b, eps: TF.rms_norm(x, x.shape[1:], w, eps), center=False,
    ),
    Norm(
        "any axes", (4, 3, 128, 4), (0, 2), (1,),
        lambda x, w, b, eps: normops.normalize(x, "n c h w -> c w", w, b, affine="c", eps=eps), _any_axes,
    ),
)  # fmt: skip
LONG = (_instance("groups of 2^20", 2, 1, 1 << 10, 1 << 10),)


@dataclass(frozen=True)
class Data:
    name: str
    x: Callable[[Tensor, torch.finfo], Tensor]
    """x of normal numbers [group, element] and its dtype."""
    eps: float = 1e-5
    dtypes: tuple[str, ...] = tuple(DTYPES)
    overflow: tuple[str, ...] = ()
    """Dtypes in whose statistics the squares of these numbers overflow: no bound is asked for."""
    dy: float = 0.0
    """The mean of dy."""
    away: float = 0.0
    """Deviations between 0 and the mean: a mean is rounded to the statistics' dtype, in any library."""


def _far(by: float, place: float) -> Callable[[Tensor, torch.finfo], Tensor]:
    def x(z: Tensor, _: torch.finfo) -> Tensor:
        z = z.clone()
        z[:, int(place * (z.shape[1] - 1))] += by
        return z

    return x


def _steps(length: int) -> Callable[[Tensor, torch.finfo], Tensor]:
    """Each `length` elements 1e4 deviations or more from those before."""

    def x(z: Tensor, _: torch.finfo) -> Tensor:
        step = torch.arange(z.shape[1]) // length
        return z + 1e4 * (step % 3 + step % 2)

    return x


def _root(info: torch.finfo) -> float:
    """Of the largest number of a dtype's statistics."""
    return sqrt(torch.finfo(statistic(getattr(torch, info.dtype))).max)


PLACES = (("first", 0), ("middle", 0.5), ("last", 1))
NO_FP16 = ("bf16", "fp32", "fp64")
DATA = (
    Data("normal", lambda z, _: z),
    *(Data(f"mean {m:.0e}", lambda z, _, m=m: z + m, away=m) for m in (1e2, 1e4)),
    Data("mean 1e+06", lambda z, _: z + 1e6, dtypes=NO_FP16, away=1e6),
    Data("mean -1e+04, deviation 0.01", lambda z, _: 0.01 * z - 1e4, away=1e6),
    *(Data(f"{name} by 1e+04", _far(1e4, at)) for name, at in PLACES),
    *(Data(f"{name} by 1e+06", _far(1e6, at), dtypes=NO_FP16) for name, at in PLACES),
    *(Data(f"constant {c}", lambda z, _, c=c: torch.full_like(z, c)) for c in (0.1, 100.1, 254.9, 12345.7)),
    Data("constant 100.1, eps 1e-12", lambda z, _: torch.full_like(z, 100.1), 1e-12),
    Data("ramp", lambda z, _: torch.arange(z.shape[1]).expand(z.shape) * 0.37 + 5),
    Data("falling ramp", lambda z, _: 1e3 - torch.arange(z.shape[1]).expand(z.shape) * 2.9),
    Data("steps of 32", _steps(32)),
    Data("steps of 256", _steps(256)),
    Data("deviation 1e-04", lambda z, _: 1e-4 * z),
    Data("deviation 1e+04", lambda z, _: 1e4 * z, dtypes=NO_FP16),
    Data("deviation 1e-06, eps 1e-12", lambda z, _: 1e-6 * z, 1e-12),
    Data("eps 0", lambda z, _: z + 3, 0.0, away=3),
    # Not of bf16: Triton's interpreter does not read these.
    Data("subnormal", lambda z, info: z * (info.tiny / 8), dtypes=("fp16", "fp32", "fp64")),
    Data("squares near overflow", lambda z, info: z * (_root(info) / 128), dtypes=NO_FP16),
    Data("numbers near overflow", lambda z, info: z.clamp(-4, 4) * (info.max / 8), overflow=NO_FP16),
    Data("dy of mean 1e+02", lambda z, _: z, dy=1e2),
)
LONG_DATA = {
    LONG[0].name: [one for one in DATA if one.name in ("normal", "mean 1e+04", "first by 1e+06", "constant 100.1")],
}  # fmt: skip
RUNNING: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "BatchNorm": (F.batch_norm, TF.batch_norm), "InstanceNorm": (F.instance_norm, TF.instance_norm),
}  # fmt: skip
"""Norms with running statistics: ours, torch's."""
BATCHES = 6
MOMENTA = {
    "normal": (0.0, 0.001, 0.1, 0.5, 0.9, 1.0), "mean 1e+04": (0.1, 1.0), "deviation 1e-04": (0.1, 0.9, 1.0),
    "deviation 1e+04": (0.1, 0.9), "constant 100.1": (0.1, 1.0), "first by 1e+04": (0.1,),
}  # fmt: skip
"""Data of running statistics, and momenta with each."""
