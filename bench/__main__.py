"""``python -m bench``: verify, time on a GPU or compile for one, train; ``python -m bench COMMAND`` for one of them."""

from __future__ import annotations

import sys

if __name__ == "__main__" and "--help" not in sys.argv:
    print("python -m bench", *sys.argv[1:], flush=True)  # the imports take seconds

if __name__ == "__main__" and sys.argv[1:2] in (["gpu"], ["tune"]):  # where there is only Python, torch and triton
    from importlib import import_module

    sys.exit(import_module(f".{sys.argv[1]}", "bench").main(sys.argv[2:]))

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from normops import schedule
from normops.testing import HARDWARE

from .cases import CASES, DOZEN, select
from .common import console
from .evidence import evidence as evidence_all
from .force import limits_of
from .host import host as host_all
from .providers import DTYPES
from .timing import time_all
from .train import train as train_all
from .verify import verify as verify_all

app = typer.Typer(add_completion=False, help="Evidence for normops: values, times, training.", rich_markup_mode=None)


def known(only: str | None) -> str | None:
    if not select(only):
        raise typer.BadParameter(f"no case has {only!r} in its name, norm or origin")
    return only


def exact(name: str | None) -> str | None:
    names = [case.name for case in CASES]
    if name is not None and name not in names:
        raise typer.BadParameter(f"no case is named {name!r}; near are {get_close_matches(name, names) or names}")
    return name


def device_known(device: str) -> str:
    if device not in HARDWARE:
        raise typer.BadParameter(f"device must be one of {', '.join(HARDWARE)}, got {device!r}")
    return device


def dtype_known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return dtype


def forced(texts: list[str] | None) -> list[str] | None:
    try:
        with schedule.forced(**limits_of(texts)):
            return texts
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Only = Annotated[str | None, typer.Option(callback=known, help="Cases whose name, norm or origin contains this text.")]
Out = Annotated[Path, typer.Option(help="Folder for JSON and the picture.")]
Seed = Annotated[int, typer.Option(help="Seed of inputs, weights and batches.")]
Dtype = Annotated[str, typer.Option(callback=dtype_known, help="bf16, fp16, fp32 or fp64.")]
Exact = Annotated[str | None, typer.Option("--case", callback=exact, help="One case, by its name.")]
Device = Annotated[str, typer.Option(callback=device_known, help=", ".join(HARDWARE))]
Keep = Annotated[Path | None, typer.Option(help="Folder for the code of every launch.")]
Base = Annotated[str | None, typer.Option(help="Another commit: print only what changed since.")]
Baseline = Annotated[bool, typer.Option("--baseline", help="Write bench/results/evidence.json too.")]
Force = Annotated[
    list[str] | None,
    typer.Option(callback=forced, help="Another schedule: NAME=VALUE,... of normops.schedule.Limits; repeatable."),
]
CompileOnly = Annotated[
    bool, typer.Option("--compile-only", help="Leave out what is executed and how long it takes: in half the time.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that compile; 0: one a core, 8 at most.")]
OUT = Path("bench/out")
PARTS = """No CUDA device: nothing is timed on one.  Of {cases} cases of {all}, results in {out}:
  evidence  what they compile to, execute and move on an H100, and how long that is predicted to take
  verify    their values and gradients against float64, in Triton's interpreter
  host      how long the host takes to launch
  train     three small networks with torch's norms and with these
On 2 cores a dozen take about a minute for evidence and four in all.  Of all cases: python -m bench evidence, verify."""


def finish(out: Path, *oks: bool) -> None:
    """Draw, say where things are, and exit with 1 if anything failed."""
    from .plot import plot  # takes half a second, which only who draws should wait for

    if path := plot(out):
        console.print(f"JSON and picture: {path.parent}", soft_wrap=True)
    raise typer.Exit(0 if all(oks) else 1)


def here(context: typer.Context, parameter: Any) -> bool:
    """Whether the command line gives a parameter before the command."""
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name == "COMMANDLINE"


@app.callback(invoke_without_command=True)
def everything(
    context: typer.Context, only: Only = None, out: Out = OUT, seed: Seed = 0, dtype: Dtype = "bf16"
) -> None:
    """Without a command: verify, time and train on a CUDA device; without one what can be said of a dozen cases: what
    they compile to and how long that is predicted to take, values, host times, training."""
    command, given = context.invoked_subcommand, [p.opts[0] for p in context.command.params if here(context, p)]
    if command is not None:
        if given:
            raise typer.BadParameter(f"{', '.join(given)} must come after the command {command}")
        return
    if torch.cuda.is_available():
        cases = select(only)
        console.print(f"verify, time, train: {len(cases)} cases; results: {out}", markup=False)
        finish(out, verify_all(cases, out, seed), time_all(only, out, seed, dtype), train_all(out, seed))
    cases = select(only) if only else [case for case in CASES if case.name in DOZEN]
    console.print(PARTS.format(cases=len(cases), all=len(CASES), out=out), markup=False, highlight=False)
    oks = evidence_all("h100", cases, dtype, out), verify_all(cases, out, seed), host_all(out, blocks=7, each=100)
    finish(out, *oks, train_all(out, seed))


@app.command()
def verify(only: Only = None, out: Out = OUT, seed: Seed = 0) -> None:
    """Forward and backward of every case against float64."""
    finish(out, verify_all(select(only), out, seed))


@app.command()
def time(only: Only = None, out: Out = OUT, seed: Seed = 0, dtype: Dtype = "bf16") -> None:
    """Time of every case against PyTorch, the libraries that are installed and a copy (needs CUDA)."""
    if not torch.cuda.is_available():
        print("python -m bench time needs a CUDA device, and torch sees none: nothing was timed", file=sys.stderr)
        raise typer.Exit(2)
    finish(out, time_all(only, out, seed, dtype))


@app.command()
def train(out: Out = OUT, seed: Seed = 0) -> None:
    """Three small networks, with torch's norms and with normops'."""
    finish(out, train_all(out, seed))


@app.command()
def evidence(
    device: Device = "h100", case: Exact = None, only: Only = None, dtype: Dtype = "bf16", force: Force = None,
    compile_only: CompileOnly = False, keep: Keep = None, base: Base = None, baseline: Baseline = False,
    workers: Workers = 0, out: Out = OUT,
) -> None:  # fmt: skip
    """What every case compiles to, executes and moves on a named device, without one: nothing is timed."""
    chosen = [c for c in select(only) if case in (None, c.name)]
    changes = limits_of(force)
    if baseline and (len(chosen), device, dtype, changes, compile_only) != (len(CASES), "h100", "bf16", {}, False):
        raise typer.BadParameter("the baseline holds all cases for h100 in bf16: leave out other choices")
    try:
        done = evidence_all(
            device, chosen, dtype, out, only=only, folder=keep, base=base, baseline=baseline, processes=workers,
            force=changes, walk=not compile_only,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(0 if done else 1)


@app.command()
def engines(
    device: Device = "h100", workers: Workers = 0, out: Out = OUT,
    baseline: Annotated[bool, typer.Option("--baseline", help="Write bench/results and docs too.")] = False,
) -> None:  # fmt: skip
    """The map of engines: which one a call takes by the size and number of its groups, and what each is predicted."""
    from .engines import engines as engines_all

    raise typer.Exit(0 if engines_all(device, out, baseline, workers) else 1)


@app.command()
def numerics(
    only: Annotated[str | None, typer.Option(help="Calls whose norm, layout or dtype contain this text.")] = None,
    out: Out = OUT,
    baseline: Annotated[bool, typer.Option("--baseline", help="Write bench/results and docs/numerics.md too.")] = False,
) -> None:
    """Errors of every norm on adversarial data against exact results, beside PyTorch's own."""
    from .numerics import numerics as numerics_all

    raise typer.Exit(0 if numerics_all(only, out, baseline) else 1)


@app.command()
def calibrate(
    device: Device = "h100",
    write: Annotated[bool, typer.Option("--write", help="Keep the parameters for predictions.")] = False,
) -> None:
    """Fit the model of times to measured points, and print how far off it is."""
    from .calibrate import calibrate as fit_all

    raise typer.Exit(0 if fit_all(device, write) else 1)


@app.command()
def host(
    out: Out = OUT, blocks: Annotated[int, typer.Option(min=1, help="Turns of every call.")] = 15,
    each: Annotated[int, typer.Option("--calls", min=1, help="Calls in one turn.")] = 100,
) -> None:  # fmt: skip
    """Host time of eager calls, beside torch's and Liger's, and where it goes."""
    raise typer.Exit(0 if host_all(out, blocks, each) else 1)


PLAIN = {"context_settings": {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}}


@app.command(**PLAIN)
def gpu(context: typer.Context) -> None:
    """One full run on a CUDA machine, in minutes: correctness, times, DRAM bytes (gpu --help)."""
    from .gpu import main

    raise typer.Exit(main(context.args))


@app.command(**PLAIN)
def tune(context: typer.Context) -> None:
    """Thresholds of the schedule from measured times: measures on a GPU, or reads records (tune --help)."""
    from .tune import main

    raise typer.Exit(main(context.args))


@app.command(**PLAIN)
def report(context: typer.Context) -> None:
    """The README's table and pictures from committed results of GPU runs (report --help)."""
    from .report import main

    raise typer.Exit(main(context.args))


if __name__ == "__main__":
    app()
