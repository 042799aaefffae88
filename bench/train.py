"""Three small networks trained on scikit-learn's handwritten digits, with torch's norms and with normops'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

import normops.nn

from . import workers
from .common import console, run_all, save

STEPS, BATCH, HELD_OUT = 12, 32, 64
BOUND = 1e-4
REASON = (
    "Both runs start from the same weights and see the same batches in fp32, so only rounding (1e-7 relative a step) "
    "differs at first; each optimiser step feeds it back, and Adam divides by the size of gradients, some tiny. "
    "The loss may differ by 1e-4 relative at any step; torch's own fp32 run against its fp64 run is shown beside it."
)


def conv_net(nn: Any) -> torch.nn.Module:
    """Classifier: convolution, BatchNorm, ReLU."""
    layers: list[torch.nn.Module] = []
    for a, b, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def unet(nn: Any) -> torch.nn.Module:
    """Denoiser: GroupNorm and SiLU, one level down and up again with a skip."""

    def block(a: int, b: int) -> torch.nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU())

    class UNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.down, self.up = block(1, 8), block(8, 16), block(24, 8)
            self.last = nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            skip = self.first(x)
            low = F.interpolate(self.down(F.avg_pool2d(skip, 2)), scale_factor=2)
            return self.last(self.up(torch.cat((skip, low), 1)))

    return UNet()


def transformer(nn: Any) -> torch.nn.Module:
    """Classifier over the eight rows of an image: LayerNorm before attention, RMSNorm before the MLP."""

    class Block(torch.nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class Transformer(torch.nn.Module):
        def __init__(self, width: int = 32) -> None:
            super().__init__()
            self.embed = nn.Linear(8, width)
            self.place = nn.Parameter(0.1 * torch.randn(8, width))
            self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.blocks(self.embed(x[:, 0]) + self.place)).mean(1))

    return Transformer()


MODELS: dict[str, tuple[Callable[[Any], torch.nn.Module], str]] = {
    "conv net": (conv_net, "BatchNorm2d + ReLU, classifies"),
    "unet": (unet, "GroupNorm + SiLU, removes noise"),
    "transformer": (transformer, "LayerNorm and RMSNorm, classifies"),
}


def fit(build: Callable[[Any], torch.nn.Module], nn: Any, dtype: torch.dtype, seed: int) -> tuple[list[float], float]:
    """Loss at every step, and the held-out loss in eval mode."""
    from sklearn.datasets import load_digits  # takes a second, which no other command should

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).sub(0.5).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    noise = torch.randn(images.shape) * 0.3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    model = build(nn).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-6)

    def loss_of(index: Tensor) -> Tensor:
        x = images[index].to(device, dtype)
        if build is unet:
            return F.mse_loss(model(x + noise[index].to(device, dtype)), x)
        return F.cross_entropy(model(x), labels[index].to(device))

    losses = []
    for step in range(STEPS):
        loss = loss_of(order[HELD_OUT + step * BATCH :][:BATCH])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return losses, loss_of(order[:HELD_OUT]).item()


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def train_model(task: tuple[str, int]) -> dict[str, Any]:
    name, seed = task
    build, what = MODELS[name]
    theirs, theirs_held = fit(build, torch.nn, torch.float32, seed)
    exact, exact_held = fit(build, torch.nn, torch.float64, seed)
    row: dict[str, Any] = {"model": name, "what": what, "torch": theirs, "torch_held_out": theirs_held, "bound": BOUND}
    row["torch_rounding"] = largest_difference([*theirs, theirs_held], [*exact, exact_held])
    try:
        ours, ours_held = fit(build, normops.nn, torch.float32, seed)
    except Exception as error:  # a broken model is a result: the others still run
        return row | {"ok": False, "error": f"{type(error).__name__}: {error}"}
    difference = largest_difference([*ours, ours_held], [*theirs, theirs_held])
    return row | {"normops": ours, "normops_held_out": ours_held, "difference": difference, "ok": difference <= BOUND}


def train(out: Path, seed: int) -> bool:
    """Train all models both ways, print a table, write train.json; True if every curve is within the bound."""
    done = dict(run_all(train_model, [(name, seed) for name in MODELS], "train"))
    rows = [done[i] for i in sorted(done)]
    for name, row in zip(MODELS, rows, strict=True):
        if isinstance(row, workers.Failed):
            raise RuntimeError(f"training the {name} failed: {row.reason}")
    save(out, "train", {"reason": REASON, "steps": STEPS, "batch": BATCH, "seed": seed, "rows": rows})
    title = f"Training on digits, {STEPS} steps of {BATCH}: loss with torch.nn and with normops.nn"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("model", "first", "last, torch", "last, normops", "held out", "held out, normops"):
        table.add_column(column)
    table.add_column("difference (bound)")
    table.add_column("torch fp32, fp64")
    for row in rows:
        losses = f"{row['torch'][0]:.4f}", f"{row['torch'][-1]:.6f}"
        if "error" in row:
            table.add_row(row["model"], *losses, f"[red]{row['error'].split(':')[0]}", f"{row['torch_held_out']:.6f}")
            continue
        held = f"{row['torch_held_out']:.6f}", f"{row['normops_held_out']:.6f}"
        difference = f"{'' if row['ok'] else '[red]'}{row['difference']:.1e} ({row['bound']:.0e})"
        table.add_row(
            row["model"], *losses, f"{row['normops'][-1]:.6f}", *held, difference, f"{row['torch_rounding']:.1e}"
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"FAILED {row['model']}: {row['error']}", markup=False, style="red")
    return all(row["ok"] for row in rows)
