"""cuDNN's norms through the graphs of nvidia-cudnn-frontend, forward and backward, built once per set of shapes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NODES = {"layer": "layernorm", "rms": "rmsnorm", "instance": "instancenorm", "batch": "batchnorm"}
HOST = ("epsilon", "momentum")
"""Passed by value."""
FIRST, FIRST_OUT = 1, 101
"""Uids of the first input and output: cuDNN's RMSNorm takes 0 for a tensor that is missing."""
Meta = tuple[tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype], ...]


@lru_cache(maxsize=1)
def handle() -> Any:
    import cudnn

    return cudnn.create_handle()


def construct(node: str, inputs: Meta, outputs: tuple[torch.dtype | None, ...], owner: Any) -> Any:
    """A graph of one node: inputs have the uids 1, 2, …, outputs 101, 102, … (None: there is no such output)."""
    import cudnn

    kinds = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(handle=owner, intermediate_data_type=wide, compute_data_type=wide)
    given = {
        name: graph.tensor(
            name=name, dim=list(shape), stride=list(stride), data_type=getattr(cudnn.data_type, kinds[dtype]), uid=uid,
            is_pass_by_value=name in HOST,
        )
        for uid, (name, shape, stride, dtype) in enumerate(inputs, FIRST)
    }  # fmt: skip
    if node.endswith("_backward"):
        options = {"has_dbias": False} if node == "rmsnorm_backward" else {}
    else:
        options = {} if node == "batchnorm" else {"norm_forward_phase": cudnn.norm_forward_phase.TRAINING}
        if node == "rmsnorm":
            options["bias"] = None
    made = getattr(graph, node)(name=node, **given, **options)
    for uid, (result, dtype) in enumerate(zip(made, outputs, strict=True), FIRST_OUT):
        if dtype is not None:
            result.set_uid(uid).set_output(True).set_data_type(getattr(cudnn.data_type, kinds[dtype]))
    return graph


@lru_cache(maxsize=256)
def build(node: str, inputs: Meta, outputs: tuple[torch.dtype | None, ...]) -> tuple[Any, int]:
    """The graph, ready to run, and the bytes of its workspace.  Raises where cuDNN does not support it."""
    import cudnn

    graph = construct(node, inputs, outputs, handle())
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, graph.get_workspace_size()


def execute(node: str, inputs: dict[str, Tensor], outputs: tuple[Tensor | None, ...]) -> None:
    import cudnn

    meta = tuple((name, tuple(t.shape), t.stride(), t.dtype) for name, t in inputs.items())
    graph, size = build(node, meta, tuple(None if t is None else t.dtype for t in outputs))
    cudnn.set_stream(handle=handle(), stream=torch.cuda.current_stream().cuda_stream)
    pack = dict(enumerate(inputs.values(), FIRST)) | {u: t for u, t in enumerate(outputs, FIRST_OUT) if t is not None}
    graph.execute(pack, torch.empty(max(1, size), dtype=torch.uint8, device=outputs[0].device), handle=handle())


def host(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float32)


class CudnnNorm(torch.autograd.Function):
    """y of x (N, C, …), normalised as `kind` says: layer and rms over C, with rows as N and a space of 1."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, running: tuple[Tensor, Tensor] | None, kind: str,
        eps: float, momentum: float,
    ) -> Tensor:  # fmt: skip
        along_c = (1, -1, *[1] * (x.dim() - 2))
        scale = weight.reshape(along_c).to(x.dtype if kind == "rms" else torch.float32)
        sizes = {"batch": (1, x.shape[1]), "instance": x.shape[:2]}.get(kind, (x.shape[0], 1))
        mean, inv_var = (
            torch.empty(*sizes, *[1] * (x.dim() - 2), dtype=torch.float32, device=x.device) for _ in range(2)
        )
        y = torch.empty_like(x)
        inputs = {"input": x, "scale": scale}
        if bias is not None:
            inputs["bias"] = bias.reshape(along_c).to(torch.float32)
        outputs: tuple[Tensor, ...] = (y, inv_var) if kind == "rms" else (y, mean, inv_var)
        if running is not None:
            moving = tuple(t.view(along_c) for t in running)
            inputs |= {"in_running_mean": moving[0], "in_running_var": moving[1]}
            outputs += moving
        inputs["epsilon"] = host(eps)
        if running is not None:
            inputs["momentum"] = host(momentum)
        execute(NODES[kind], inputs, outputs)
        ctx.kind, ctx.dtypes = kind, (weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(x, scale, mean, inv_var)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, scale, mean, inv_var = ctx.saved_tensors
        dx, dscale, dbias = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        inputs = {"grad": dy, "input": x, "scale": scale, "mean": mean, "inv_variance": inv_var}
        if ctx.kind == "rms":
            del inputs["mean"]
            dbias = None
        execute(NODES[ctx.kind] + "_backward", inputs, (dx, dscale, dbias))
        dw, db = ctx.dtypes
        return dx, dscale.reshape(-1).to(dw), None if db is None else dbias.reshape(-1).to(db), None, None, None, None
