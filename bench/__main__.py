"""``python -m bench``: verify, time (on a GPU) and train; ``python -m bench COMMAND`` for one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cases import select
from .common import console
from .plot import plot
from .timing import time_all
from .train import train as train_all
from .verify import verify as verify_all

app = typer.Typer(add_completion=False, help="Evidence for normops: values, times, training.", rich_markup_mode=None)


def known(only: str | None) -> str | None:
    if not select(only):
        raise typer.BadParameter(f"no case has {only!r} in its name, norm or origin")
    return only


Only = Annotated[str | None, typer.Option(callback=known, help="Cases whose name, norm or origin contains this text.")]
Out = Annotated[Path, typer.Option(help="Folder for JSON and the picture.")]
Seed = Annotated[int, typer.Option(help="Seed of inputs, weights and batches.")]
Dtype = Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp64.")]
OUT = Path("bench/out")


def finish(out: Path, *oks: bool) -> None:
    """Draw, say where things are, and exit with 1 if anything failed."""
    if path := plot(out):
        console.print(f"JSON and picture: {path.parent}", soft_wrap=True)
    raise typer.Exit(0 if all(oks) else 1)


@app.callback(invoke_without_command=True)
def everything(
    context: typer.Context, only: Only = None, out: Out = OUT, seed: Seed = 0, dtype: Dtype = "bf16"
) -> None:
    """Without a command: verify, time where there is a CUDA device, train."""
    if context.invoked_subcommand is None:
        finish(out, verify_all(only, out, seed), time_all(only, out, seed, dtype), train_all(out, seed))


@app.command()
def verify(only: Only = None, out: Out = OUT, seed: Seed = 0) -> None:
    """Forward and backward of every case against float64."""
    finish(out, verify_all(only, out, seed))


@app.command()
def time(only: Only = None, out: Out = OUT, seed: Seed = 0, dtype: Dtype = "bf16") -> None:
    """Time of every case against torch eager, torch.compile and a copy (needs CUDA)."""
    finish(out, time_all(only, out, seed, dtype))


@app.command()
def train(out: Out = OUT, seed: Seed = 0) -> None:
    """Three small networks, with torch's norms and with normops'."""
    finish(out, train_all(out, seed))


if __name__ == "__main__":
    app()
