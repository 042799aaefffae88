"""One process of two: trains small networks with torch's norms and with ours, and calls norms on DTensors.

    python -m tests.distributed_training gloo RANK INIT_FILE RESULTS

What came out on rank 0 goes to RESULTS; tests/test_distributed.py starts both processes and judges it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as TF
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normops.functional as F
from normops import nn, normalize
from normops.calls import known
from normops.testing import prepare_once

WORLD, STEPS, BATCH = 2, 4, 2  # BATCH: images of one process in one step
Result = dict[str, Any]


class TorchLayerNorm2d(torch.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TorchRMSNorm(torch.nn.RMSNorm):
    def forward(self, x: Tensor, *, pre_add: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x + pre_add), x + pre_add


NORMS: dict[str, dict[str, Any]] = {
    "torch": {
        "BatchNorm2d": torch.nn.BatchNorm2d, "GroupNorm": torch.nn.GroupNorm, "LayerNorm2d": TorchLayerNorm2d,
        "LayerNorm": torch.nn.LayerNorm, "RMSNorm": TorchRMSNorm,
    },
    "normops": {
        "BatchNorm2d": nn.BatchNorm2d, "GroupNorm": nn.GroupNorm, "LayerNorm2d": nn.LayerNorm2d,
        "LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm,
    },
}  # fmt: skip


class Images(torch.nn.Module):
    """Convolutions with norms over images."""

    def __init__(self, norms: dict[str, Any], batch: bool) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.first = norms["BatchNorm2d"](8) if batch else torch.nn.Identity()
        self.second, self.third = norms["GroupNorm"](2, 8), norms["LayerNorm2d"](8)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, (self.first, self.second, self.third), strict=True):
            x = TF.silu(norm(conv(x)))
        return x


class Features(torch.nn.Module):
    """Linear layers with norms over features, the last with a residual."""

    def __init__(self, norms: dict[str, Any]) -> None:
        super().__init__()
        self.enter, self.update, self.leave = (torch.nn.Linear(i, o) for i, o in ((128, 16), (16, 16), (16, 4)))
        self.norm, self.last, self.spare = norms["LayerNorm"](16), norms["RMSNorm"](16), norms["LayerNorm"](16)

    def forward(self, x: Tensor, spare: bool) -> Tensor:
        h = self.norm(self.enter(x))
        if spare:
            h = self.spare(h)
        y, h = self.last(self.update(h), pre_add=h)
        return self.leave(y + h)


class Network(torch.nn.Module):
    def __init__(self, norms: str, batch: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.images, self.features = Images(NORMS[norms], batch), Features(NORMS[norms])
        self.checkpointed = checkpointed
        for name, p in self.named_parameters():  # ones and zeros would hide a swap of weights
            if p.dim() == 1:
                torch.nn.init.uniform_(p, 0.5, 1.5) if name.endswith("weight") else torch.nn.init.normal_(p, std=0.1)

    def forward(self, x: Tensor, spare: bool = True) -> Tensor:
        if not self.checkpointed:
            return self.features(self.images(x).flatten(1), spare)
        x = checkpoint(self.images, x, use_reentrant=False).flatten(1)
        return checkpoint(self.features, x, spare, use_reentrant=False)


def batches(device: torch.device, parts: int = 1) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """For every step, what each micro-batch of all processes holds."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS // parts):
        step = []
        for _ in range(parts):
            x = torch.randn(WORLD * BATCH, 3, 4, 4, generator=generator)
            step.append((x.to(device), torch.randn(WORLD * BATCH, 4, generator=generator).to(device)))
        yield step


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu()


def train(
    model: torch.nn.Module, network: torch.nn.Module, device: torch.device, *, parts: int = 1,
    local: Callable[[bool], Any] | None = None, split: bool = True, spare: Callable[[int], bool] = lambda step: True,
) -> Result:  # fmt: skip
    """The losses of all steps, the mean over processes, and parameters and buffers after the last.

    local(last) is the context that a micro-batch runs in; without `split`, one process has the whole batch.
    """
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    part = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH) if split else slice(None)
    losses = []
    for step, micro in enumerate(batches(device, parts)):
        total = torch.zeros((), device=device)
        for i, (x, target) in enumerate(micro):
            with local(i == len(micro) - 1) if local is not None else nullcontext():
                loss = TF.mse_loss(model(x[part], spare(step)), target[part]) / parts
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if split:
            dist.all_reduce(total)
        losses.append(total.item() / (WORLD if split else 1))
    parameters = {name: whole(p) for name, p in network.named_parameters()}
    return {"losses": losses, "parameters": parameters, "buffers": {n: whole(b) for n, b in network.named_buffers()}}


def single(device: torch.device) -> Result:
    """torch's norms, but no BatchNorm, on the batches of all processes together."""
    network = Network("torch", batch=False).to(device)
    return train(network, network, device, split=False)


def ddp(
    norms: str, device: torch.device, *, batch: bool = True, parts: int = 1, odd: bool = False, **options: Any
) -> Result:
    network = Network(norms, batch).to(device)
    model = DistributedDataParallel(network, **options)
    return train(
        model, network, device, parts=parts, local=lambda last: nullcontext() if last else model.no_sync(),
        spare=(lambda step: step % 2 == 0) if odd else (lambda step: True),
    )  # fmt: skip


def fsdp(
    norms: str, device: torch.device, mesh: DeviceMesh, *, batch: bool = True, parts: int = 1,
    checkpointed: bool = False,
) -> Result:  # fmt: skip
    network = Network(norms, batch, checkpointed).to(device)
    for module in (network.images, network.features, network):
        fully_shard(module, mesh=mesh)

    def local(last: bool) -> Any:
        network.set_requires_gradient_sync(last)
        return nullcontext()

    assert all(isinstance(p, DTensor) for p in network.parameters())
    return train(network, network, device, parts=parts, local=local)


def trainings(device: torch.device, mesh: DeviceMesh) -> dict[str, Callable[[str], Result]]:
    return {
        "ddp": lambda norms: ddp(norms, device),
        "ddp accumulating": lambda norms: ddp(norms, device, parts=2),
        "ddp static graph": lambda norms: ddp(norms, device, static_graph=True),
        "ddp unused parameters": lambda norms: ddp(norms, device, odd=True, find_unused_parameters=True),
        "fsdp": lambda norms: fsdp(norms, device, mesh),
        "fsdp accumulating": lambda norms: fsdp(norms, device, mesh, parts=2),
        "fsdp checkpointed": lambda norms: fsdp(norms, device, mesh, checkpointed=True),
        "ddp without batch norm": lambda norms: ddp(norms, device, batch=False),
        "fsdp without batch norm": lambda norms: fsdp(norms, device, mesh, batch=False),
    }


class Operand(NamedTuple):
    shape: tuple[int, ...]
    placement: Any = Replicate()


Calls = dict[str, tuple[Callable[..., Any], dict[str, Operand]]]


def calls() -> Calls:
    """Norms by the axis of x that is sharded, and their operands."""
    found: Calls = {}

    def add(name: str, function: Callable[..., Any], **operands: Operand) -> None:
        found[name] = (function, operands)

    x, uneven, image, d, c = (4, 6, 8), (4, 5, 8), (4, 6, 5), Operand((8,)), Operand((6,))
    batch, second, last = Shard(0), Shard(1), Shard(2)

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), weight, bias)

    def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (8,), weight)

    def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, 3, weight, bias)

    def instance_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.instance_norm(x, weight=weight, bias=bias)

    def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, True)

    def batch_norm_given(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        return F.batch_norm(x, mean.detach(), log_var.detach().exp(), weight, bias, False)

    for name, shard in (("batch", batch), ("sequence", second), ("features", last)):
        add(f"layer_norm by {name}", layer_norm, x=Operand(x, shard), weight=d, bias=d)
        add(f"rms_norm by {name}", rms_norm, x=Operand(x, shard), weight=d)
    add("layer_norm by uneven sequence", layer_norm, x=Operand(uneven, second), weight=d, bias=d)
    add("layer_norm without parameters", lambda x: F.layer_norm(x, (8,)), x=Operand(x, second))
    add(
        "rms_norm with every extra",
        lambda x, weight, pre_add, post_add: F.rms_norm(
            x, (8,), weight, activation="silu", pre_add=pre_add, post_add=post_add
        ),
        x=Operand(x, second), weight=d, pre_add=Operand(x, second), post_add=Operand(x, second),
    )  # fmt: skip
    add(
        "normalize with statistics",
        lambda x, weight: normalize(x, (2,), weight, return_stats=True), x=Operand(x, second), weight=d,
    )  # fmt: skip
    add(
        "gradient of a gradient",
        lambda x, weight, bias: torch.autograd.grad(
            layer_norm(x, weight, bias).pow(3).sum(), (x,), create_graph=True
        ),
        x=Operand(x, second), weight=d, bias=d,
    )  # fmt: skip
    for name, shard in (("batch", batch), ("channels", second)):
        add(f"group_norm by {name}", group_norm, x=Operand(image, shard), weight=c, bias=c)
        of = c if shard == batch else Operand((6,), Shard(0))
        for function in (instance_norm, batch_norm):
            add(f"{function.__name__} by {name}", function, x=Operand(image, shard), weight=of, bias=of)
        add(
            f"batch_norm_given by {name}", batch_norm_given,
            x=Operand(image, shard), weight=of, bias=of, mean=of, log_var=of,
        )  # fmt: skip
    for pattern in ("n c l -> n", "n c l -> c", "n c l -> n c"):  # one after another, of the same operand
        add(pattern, lambda x, pattern=pattern: normalize(x, pattern), x=Operand(image, batch))
    return found


def placed(t: Tensor) -> str:
    (placement,) = t.placements
    if isinstance(placement, Shard):
        return f"shard {placement.dim}"
    return "replicate" if placement.is_replicate() else "partial"


def listed(t: Any) -> list[Tensor]:
    return list(t) if isinstance(t, tuple) else [t]


def scattered(mesh: DeviceMesh, name: str) -> Result:
    """Values, gradients, placements and communication of a call on DTensors, and the same call on plain tensors."""
    function, operands = calls()[name]
    torch.manual_seed(3)
    plain = {n: torch.randn(o.shape, device=mesh.device_type).requires_grad_() for n, o in operands.items()}
    shards = {
        n: distribute_tensor(plain[n].detach(), mesh, [o.placement]).requires_grad_() for n, o in operands.items()
    }
    expected = listed(function(**plain))
    with CommDebugMode() as forward:
        got = listed(function(**shards))
    upstream = [torch.randn_like(y) for y in expected if y.requires_grad]
    torch.autograd.backward([y for y in expected if y.requires_grad], upstream)
    outputs = [y for y in got if y.requires_grad]
    upstream = [distribute_tensor(g, mesh, y.placements) for g, y in zip(upstream, outputs, strict=True)]
    with CommDebugMode() as backward:
        torch.autograd.backward(outputs, upstream)
    expected_gradients, gradients = (
        {n: t.grad for n, t in leaves.items() if t.grad is not None} for leaves in (plain, shards)
    )
    return {
        "expected": [whole(y) for y in expected], "got": [whole(y) for y in got],
        "outputs": [placed(y) for y in got],
        "expected gradients": {n: whole(g) for n, g in expected_gradients.items()},
        "gradients": {n: whole(g) for n, g in gradients.items()},
        "placements": {n: placed(g) for n, g in gradients.items()},
        "collectives": forward.get_total_counts() + backward.get_total_counts(),
    }  # fmt: skip


def compiled(mesh: DeviceMesh, norms: Any) -> Result:
    """LayerNorm of DTensors in a compiled program: y, its placement and the gradient of x."""
    torch.manual_seed(3)
    program = torch.compile(norms.layer_norm, fullgraph=True, backend="aot_eager")
    x = distribute_tensor(torch.randn(4, 6, 8, device=mesh.device_type), mesh, [Shard(1)]).requires_grad_()
    y = program(x, (8,))
    y.pow(3).sum().backward()
    return {"got": {"output": whole(y), "x": whole(x.grad)}, "placement": placed(y)}


def sequence_parallel(mesh: DeviceMesh, norms: Any) -> Result:
    """LayerNorm and RMSNorm under a plan of torch.distributed.tensor.parallel: each process has its part of axis 1."""
    torch.manual_seed(4)
    device = mesh.device_type
    model = torch.nn.Sequential(norms.LayerNorm(8), torch.nn.GELU(), norms.RMSNorm(8)).to(device)
    x = torch.randn(2, 6, 8, device=device)
    part = x.chunk(WORLD, 1)[dist.get_rank()].clone().requires_grad_()
    model = parallelize_module(model, mesh, {"0": SequenceParallel(), "2": SequenceParallel()})
    y = model(part)
    (y * distribute_tensor(torch.arange(8.0, device=device), mesh, [Replicate()])).sum().backward()
    got = {"output": whole(y), **{n: whole(p.grad) for n, p in model.named_parameters()}}
    return {"got": got | {"x": part.grad.cpu()}, "placement": placed(y)}


def run(backend: str, rank: int, init: str) -> Result:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    prepare_once()
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{init}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh(device.type, (WORLD,))
    cases: dict[str, Callable[[], Result]] = {
        # First, so that no eager call of DTensors has gone before.
        "compiled, normops": lambda: compiled(mesh, F),
        "compiled, torch": lambda: compiled(mesh, TF),
        "sequence parallel, torch": lambda: sequence_parallel(mesh, torch.nn),
        "sequence parallel, normops": lambda: sequence_parallel(mesh, nn),
        "one process, torch": lambda: single(device),
    }
    for name, training in trainings(device, mesh).items():
        for norms in NORMS:
            cases[f"{name}, {norms}"] = partial(training, norms)
    for name in calls():
        cases[name] = partial(scattered, mesh, name)
    found: Result = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    found["kernels ran"] = any(call.kernels for call in known.values())
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    backend, rank, init, results = sys.argv[1:]
    found = run(backend, int(rank), init)
    if rank == "0":
        torch.save(found, results)
