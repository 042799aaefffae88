"""What a call of normops will do on a device, in words and figures, without the device and without running anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .. import plan, schedule
from ..kernels.bundles import BOTH
from . import cost
from .counting import Moved
from .hardware import Hardware
from .plans import Planned, plans
from .predict import Demand, Prediction, Time, predict
from .virtual import VirtualLaunch, virtual_device

ENGINES = {
    "resident": "each program holds whole groups on chip and reads them once",
    "ticketed": "one launch visits each tile twice, in the order of tickets, so that L2 still holds it the second time",
    "split": "statistics, their merge and what uses them are launches of their own, which read everything twice",
    "rows": "programs walk over rows and keep sums for dw and db in registers",
    "apply": "sums over groups are given or not needed, so everything is read once",
}
"""Engine -> what it does, see docs/engines.md."""


@dataclass(frozen=True)
class Direction:
    """The forward or the backward of one call on a device.

    >>> import torch, normops
    >>> from normops.testing import Direction, explain
    >>> forward: Direction = explain(lambda: normops.functional.rms_norm(torch.empty(64, 96), (96,)))[0]
    >>> forward.name, forward.engine, forward.predicted_us > forward.floor_us / 2
    ('forward', 'resident', True)
    """

    name: str
    """"forward" or "backward"."""
    hardware: Hardware
    plan: plan.Plan
    launches: tuple[VirtualLaunch, ...]
    moved: tuple[dict[str, Moved], ...]
    """For each launch, operand -> bytes that it asks for."""
    hbm: cost.Hbm
    """What of these reaches DRAM."""
    x_bytes: int
    floor_bytes: int
    """The least a call can move: each input read once, each output written once."""
    prediction: Prediction | None
    """None on AMD, and where none was asked for."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Microseconds that it is predicted to take by other engines, where these were asked for too."""

    @property
    def engine(self) -> str:
        return self.plan.engine

    @property
    def passes(self) -> float:
        """Bytes to and from DRAM, in units of x."""
        return self.hbm.bytes / max(1, self.x_bytes)

    @property
    def floor_us(self) -> float:
        """What a copy takes that moves the least bytes."""
        return self.hardware.copy_us(self.floor_bytes)

    @property
    def predicted_us(self) -> float | None:
        return None if self.prediction is None else self.prediction.us

    @property
    def of_floor(self) -> float | None:
        """Share of the floor: 1 is as fast as a copy."""
        return None if self.prediction is None else self.floor_us / self.prediction.us

    @property
    def bound(self) -> str | None:
        """What holds the call for most of its time: "issue", "memory", "latency" or "launches"."""
        return None if self.prediction is None else self.prediction.bound

    def per_element(self, kind: str = "instructions") -> float | None:
        """Executed instructions (or those of a kind) of all launches, for each element of x; None on AMD."""
        if self.prediction is None:
            return None
        return sum(launch.executed.per_element(self.plan.layout.numel, kind) for launch in self.launches)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.engine}, {ENGINES[self.engine]}"
        times: Sequence[Time | None] = self.prediction.launches if self.prediction else [None] * len(self.launches)
        for launch, planned, time in zip(self.launches, self.plan.launches, times, strict=True):
            tile = " x ".join(map(str, planned.tile))
            line = f"  {titled(planned)}: {prod(launch.grid)} programs of {launch.num_warps} warps, tile {tile}"
            yield line + (f"; {time.us:.1f} us, held by {time.bound}" if time else "")
        yield (
            f"  moves {self.hbm.bytes / 1e6:.1f} MB to and from DRAM ({self.passes:.2f} passes over x; at least "
            f"{self.floor_bytes / 1e6:.1f} MB)"
        )
        if self.prediction is None:
            yield f"  floor on {self.hardware.title}: {self.floor_us:.1f} us"
            return
        yield f"  executes {self.per_element():.1f} instructions for each element of x"
        kind = "predicted" if self.prediction.calibrated else "predicted, uncalibrated"
        yield (
            f"  {kind} on {self.hardware.title}: {self.prediction.us:.1f} us, {self.of_floor:.2f} of the floor "
            f"({self.floor_us:.1f} us), bound by {self.bound}"
        )
        for engine, us in self.others.items():
            yield f"  by the engine {engine}: {us:.1f} us, {us / self.prediction.us:.2f} times as long"


def titled(planned: plan.Launch) -> str:
    """The name of the kernel, and the phase that the launch is of where it is one of several."""
    phase = phase_of(planned)
    return f"{planned.kernel.__name__} ({phase})" if phase not in (None, BOTH) else str(planned.kernel.__name__)


def phase_of(planned: plan.Launch) -> str | None:
    """What a launch does with its tiles; None where it has none: it finishes partial results."""
    return str(planned.form.PHASE) if planned.kernel in cost.TILED else None


class Explanation(tuple[Direction, ...]):
    """The directions of all calls, in the order in which they ran; ``str`` tells them in words.

    >>> import torch, normops
    >>> from normops.testing import Explanation, explain
    >>> nothing: Explanation = explain(lambda: torch.ones(1))
    >>> print(nothing)
    no call of normops launched anything
    """

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no call of normops launched anything"


def direction(
    planned: Planned, launches: Sequence[VirtualLaunch], hardware: Hardware, predicted: bool = True
) -> Direction:
    """One direction of a call: its entry in ``testing.plans()``, and what a virtual device noted of its launches;
    without a prediction, no machine code is walked through.

    Raises RuntimeError where these are not the launches of the plan.
    """
    made, itemsizes = planned.plan, planned.itemsizes
    names = [launch.kernel.__name__ for launch in made.launches]
    if names != [launch.name for launch in launches]:
        raise RuntimeError(f"the plan launches {names}, the device saw {[launch.name for launch in launches]}")
    hbm = cost.hbm(made, itemsizes, hardware.l2_window)
    prediction = None
    if predicted and hardware.target.backend == "cuda":
        demands = [Demand.of(launch, sum(moved)) for launch, moved in zip(launches, hbm.launches, strict=True)]
        prediction = predict(demands, hardware)
    return Direction(
        "backward" if "dy" in itemsizes else "forward", hardware, made, tuple(launches), cost.traffic(made, itemsizes),
        hbm, made.layout.numel * itemsizes["x"], cost.floor(made, itemsizes), prediction,
    )  # fmt: skip


def explain(call: Callable[[], Any], device: str = "h100", compare: bool = False) -> Explanation:
    """What the calls of normops inside ``call()`` would do on a device: plan, bytes, instructions, predicted time.

    ``call`` is run once with normops' kernels compiled instead of run, so outputs hold no values; give it CPU tensors
    of the real shapes (``torch.empty`` costs nothing).  What it does beside normops, torch does on the CPU.  If what it
    returns requires gradients and it does no backward of its own, the backward is explained too: no ``.grad`` changes,
    the graph stays, hooks run.  Devices: the names of ``HARDWARE``.  ``compare``: ``call`` is run once more with each
    engine that can be forced, to say what it is predicted to take by the others.

    Raises ValueError for an unknown device or meta tensors, RuntimeError in the interpreter, which compiles nothing.

    >>> import torch, normops
    >>> from normops.testing import explain
    >>> x = torch.empty(16, 320, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    >>> forward, backward = explain(lambda: normops.functional.group_norm(x, 32), device="h100")
    >>> forward.name, backward.name, forward.bound in ("issue", "memory", "latency", "launches")
    ('forward', 'backward', True)
    """
    found = _explained(call, device)
    for engine in schedule.ENGINES if compare else ():
        with schedule.forced(engine=engine):
            again = _explained(call, device)
        for i, (one, other) in enumerate(zip(found, again, strict=True)):
            # Where an engine cannot take a call, another one does.
            if other.engine not in (one.engine, *one.others) and other.predicted_us is not None:
                found[i] = replace(one, others={**one.others, other.engine: other.predicted_us})
    return Explanation(found)


def _explained(call: Callable[[], Any], device: str) -> list[Direction]:
    with virtual_device(device) as gpu, plans() as planned:
        results = [t for t in tree_leaves(call()) if isinstance(t, torch.Tensor)]
        if any(t.is_meta for t in results):
            raise ValueError("call must compute with CPU tensors (torch.empty costs nothing), got a result on meta")
        outputs = [t for t in results if t.grad_fn is not None]
        ran = any("dy" in one.itemsizes for one in planned)  # the call did its own backward
        inputs = [] if ran else _leaves(outputs)
        if inputs:
            gradients = [torch.empty_like(t) for t in outputs]
            torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)
    found, rest = [], iter(gpu.launches)
    for one in planned:
        # Kernels of others may lie between those of normops.
        names = [launch.kernel.__name__ for launch in one.plan.launches]
        mine = [n for name in names if (n := next((n for n in rest if n.name == name), None)) is not None]
        if len(mine) < len(names):
            raise RuntimeError("call must not explain or compile for a device itself: its launches went elsewhere")
        if mine:
            found.append(direction(one, mine, gpu.hardware))
    return found


def _leaves(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that gradients of the outputs would arrive at."""
    found: dict[Any, torch.Tensor] = {}
    seen, todo = set(), [t.grad_fn for t in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node] = node.variable
        todo += [following for following, _ in node.next_functions]
    return list(found.values())
