"""What normops is timed against: PyTorch eager and compiled, and libraries where they are installed.

A provider calls a library as its user would: what the library does not fuse (an addition, an activation) is done by
torch around it.  Of several forms the one that keeps the precision of the others is taken.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import cudnn_graph
from .cases import Case
from .providers import EPS, MOMENTUM, Inputs, Outputs, by_normops, by_torch, finish

SLACK = 4.0
"""How far from float64 the others may be, in bounds of normops: a composition rounds between its functions, and may
round to x's dtype what is returned in a wider one."""
LIGER_LIMIT, QUACK_LIMIT = 65536, 262144
"""Elements of a row."""
APEX_CHANNELS = (
    128, 256, 320, 384, 448, 512, 640, 768, 896, 960, 1024, 1280, 1344, 1536, 1792, 1920, 2048, 2240, 2560, 2688, 3072,
    3136, 3584, 4096,
)  # fmt: skip
WIDE_APEX_CHANNELS = (3136, 3584, 4096)
"""Of these its one-pass kernel takes smaller planes only."""


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Case], Callable[[Inputs], Outputs]]
    """The function that is called again and again."""
    refuses: Callable[[Case, str, torch.dtype], str | None] = lambda *_: None
    """Why it does not do a case in a memory format and dtype."""
    modules: tuple[str, ...] = ()
    """What must be there to import."""
    slack: float = SLACK

    def reason(self, case: Case, memory_format: str, dtype: torch.dtype) -> str | None:
        """Why it is skipped, or None."""
        return self.refuses(case, memory_format, dtype) or next(filter(None, map(missing, self.modules)), None)


@cache
def missing(module: str) -> str | None:
    """Why a module cannot be imported, or None."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed: {error.name or module}"
    except Exception as error:  # a library built for another torch, say
        return f"{module} does not load: {type(error).__name__}: {error}"[:200]
    return None


def narrow(dtype: torch.dtype) -> str | None:
    return "no fp64" if dtype == torch.float64 else None


def rows_only(case: Case, dtype: torch.dtype, limit: int) -> str | None:
    if case.norm not in ("layer", "rms") or case.dims != 1:
        return "LayerNorm and RMSNorm over the last axis only"
    return f"rows of at most {limit} elements" if case.shape[-1] > limit else narrow(dtype)


def summed(i: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What is normalised, and the sum to return, for libraries that do not fuse the addition."""
    if i["pre_add"] is None:
        return i["x"], ()
    total = i["x"] + i["pre_add"]
    return total, (total,)


def compiled(case: Case) -> Callable[[Inputs], Outputs]:
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is called more than once
    return torch.compile(partial(by_torch, case), dynamic=False)


def native_only(case: Case, memory_format: str, dtype: torch.dtype) -> str | None:
    """PyTorch gives BatchNorm (and InstanceNorm, which is built on it) to cuDNN in fp16 and fp32, and nothing else."""
    if case.norm in ("batch", "batch_eval", "instance") and dtype in (torch.float16, torch.float32):
        return None
    return "eager does not use cuDNN here either"


def by_native(case: Case, i: Inputs) -> Outputs:
    with torch.backends.cudnn.flags(enabled=False):
        return by_torch(case, i)


def refuses_liger(case: Case, memory_format: str, dtype: torch.dtype) -> str | None:
    if case.norm == "group":
        return "copies channels_last to contiguous" if memory_format != "contiguous" else narrow(dtype)
    return rows_only(case, dtype, LIGER_LIMIT)


def by_liger(case: Case, i: Inputs) -> Outputs:
    from liger_kernel import ops

    if case.norm == "group":
        y = ops.LigerGroupNormFunction.apply(i["x"], i["weight"], i["bias"], i["x"].shape[1], case.groups, EPS)
        return (finish(case, i, y),)
    if case.norm == "rms" and i["pre_add"] is not None:
        # fp32 throughout ("gemma"); not in place, which would overwrite dy
        y, total = ops.LigerFusedAddRMSNormFunction.apply(
            i["x"], i["pre_add"], i["weight"], EPS, 0.0, "gemma", False
        )  # fmt: skip
        return finish(case, i, y), total
    x, sums = summed(i)
    if case.norm == "rms":
        y = ops.LigerRMSNormFunction.apply(x, i["weight"], EPS, 0.0, "gemma", False)
    else:
        y = ops.LigerLayerNormFunction.apply(x, i["weight"], i["bias"], EPS)
    return finish(case, i, y), *sums


class QuackLayerNorm(torch.autograd.Function):
    """quack has LayerNorm as two functions over (rows, N), with fp32 parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        from quack.rmsnorm import layernorm_fwd

        flat, wide = x.reshape(-1, x.shape[-1]), weight.float()
        b = None if bias is None else bias.float()
        y, rstd, mean = layernorm_fwd(flat, wide, b, EPS, return_rstd=True, return_mean=True)
        ctx.save_for_backward(flat, wide, rstd, mean)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        from quack.rmsnorm import layernorm_bwd

        x, weight, rstd, mean = ctx.saved_tensors
        dw_dtype, db_dtype = ctx.dtypes
        flat = dy.reshape(x.shape)
        dx, dw, db = layernorm_bwd(x, weight, flat, rstd, mean, has_bias=db_dtype is not None)
        return dx.view(dy.shape), dw.to(dw_dtype), None if db is None else db.to(db_dtype)


def by_quack(case: Case, i: Inputs) -> Outputs:
    from quack.rmsnorm import rmsnorm

    if case.norm == "rms":
        fused = i["pre_add"] is not None
        y = rmsnorm(i["x"], i["weight"], residual=i["pre_add"], eps=EPS, prenorm=fused)
        return (finish(case, i, y[0]), y[1]) if fused else (finish(case, i, y),)
    x, sums = summed(i)
    return finish(case, i, QuackLayerNorm.apply(x, i["weight"], i["bias"])), *sums


def refuses_cudnn(case: Case, memory_format: str, dtype: torch.dtype) -> str | None:
    if case.norm in ("batch", "instance"):
        return "its backward takes channels_last only" if memory_format == "contiguous" else narrow(dtype)
    if case.norm not in ("layer", "rms"):
        return "no node for this norm"
    return rows_only(case, dtype, 2**31)


def by_cudnn(case: Case, i: Inputs) -> Outputs:
    x, sums = summed(i)
    running = (i["running_mean"], i["running_var"]) if case.norm == "batch" else None
    rows = x.reshape(-1, x.shape[-1], 1, 1) if case.norm in ("layer", "rms") else x
    y = cudnn_graph.CudnnNorm.apply(rows, i["weight"], i["bias"], running, case.norm, EPS, MOMENTUM)
    return finish(case, i, y.view_as(x)), *sums


def by_apex(case: Case, i: Inputs) -> Outputs:
    from apex.normalization import fused_layer_norm as apex

    x, sums = summed(i)
    shape = i["weight"].shape
    if case.norm == "rms":
        y = apex.fused_rms_norm_affine(x, i["weight"], shape, EPS)
    else:
        y = apex.fused_layer_norm_affine(x, i["weight"], i["bias"], shape, EPS)
    return finish(case, i, y), *sums


def refuses_apex_group(case: Case, memory_format: str, dtype: torch.dtype) -> str | None:
    if case.norm != "group" or memory_format != "channels_last":
        return "GroupNorm in channels_last only"
    if case.shape[1] not in APEX_CHANNELS or case.groups not in (16, 32):
        return f"not for {case.shape[1]} channels in {case.groups} groups"
    return narrow(dtype)


def by_apex_group(case: Case, i: Inputs) -> Outputs:
    from apex.contrib.group_norm import group_norm as apex

    c, space = i["x"].shape[1], i["x"].shape[2:].numel()
    two = space > 1024 or (space >= 512 and c in WIDE_APEX_CHANNELS)  # as its module chooses on sm_80 and later
    call = apex.cuda_group_norm_nhwc_two_pass if two else apex.cuda_group_norm_nhwc_one_pass
    fused = case.activation == "silu" and i["post_add"] is None
    y = call(i["x"], case.groups, i["weight"], i["bias"], EPS, "silu" if fused else "")
    return (y if fused else finish(case, i, y),)


def refuses_apex_batch(case: Case, memory_format: str, dtype: torch.dtype) -> str | None:
    if case.norm != "batch" or memory_format != "channels_last" or dtype != torch.float16:
        return "BatchNorm in fp16 and channels_last only"
    return None if case.activation in (None, "relu") else "ReLU only"


def apex_batch(case: Case) -> Callable[[Inputs], Outputs]:
    from apex.contrib.groupbn import BatchNorm2d_NHWC

    module = BatchNorm2d_NHWC(case.shape[1], fuse_relu=case.activation == "relu").cuda()
    module.momentum, module.eps = MOMENTUM, EPS

    def call(i: Inputs) -> Outputs:
        given = {name: i[name] for name in ("weight", "bias", "running_mean", "running_var")}
        fused = i["post_add"] is not None and case.activation == "relu"
        y = torch.func.functional_call(module, given, (i["x"], i["post_add"]) if fused else (i["x"],))
        return (y if fused or i["post_add"] is None else finish(case, i, y),)

    return call


def calls(function: Callable[[Case, Inputs], Outputs]) -> Callable[[Case], Callable[[Inputs], Outputs]]:
    return lambda case: partial(function, case)


COMPILED = "torch.compile"
PROVIDERS = (
    Provider("normops", calls(by_normops), slack=1.0),
    Provider("torch", calls(by_torch)),
    Provider("torch, cuDNN off", calls(by_native), native_only),
    Provider(COMPILED, compiled),
    Provider("cudnn-frontend", calls(by_cudnn), refuses_cudnn, ("cudnn",)),
    Provider("liger", calls(by_liger), refuses_liger, ("liger_kernel.ops",)),
    Provider("quack", calls(by_quack), lambda c, f, d: rows_only(c, d, QUACK_LIMIT), ("quack.rmsnorm",)),
    Provider("apex", calls(by_apex), lambda c, f, d: rows_only(c, d, 2**31),
             ("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda")),
    Provider("apex group_norm", calls(by_apex_group), refuses_apex_group, ("apex.contrib.group_norm",)),
    Provider("apex groupbn", apex_batch, refuses_apex_batch, ("bnp", "apex.contrib.groupbn")),
)  # fmt: skip
