"""What a plan moves, without running it: bytes by launch and operand, those that reach DRAM, and the least possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..kernels.bundles import APPLY
from ..kernels.grad_stream import grad_stream
from ..kernels.resident import grad_group, grad_normalize, normalize
from ..kernels.stream import stream
from ..plan import Launch, Plan
from .counting import KERNELS, Counted, Moved


@dataclass(frozen=True)
class Hbm:
    """What of a plan's traffic reaches DRAM, see :func:`hbm`."""

    bytes: int
    """Read from and written to DRAM."""
    cached: int
    """Read a second time by a later launch, and assumed to be found in L2."""
    window: int
    """The most bytes that must stay in L2 between two launches for that."""
    launches: tuple[Moved, ...]
    """`bytes`, launch by launch."""


STREAMS = ("x", "pre", "sum", "post", "y", "dy", "dsum", "dx", "dpost")
"""Operands of the size of x: what a launch reads of these last is what it leaves in L2."""


TILED = (normalize, grad_normalize, grad_group, stream, grad_stream)
"""Kernels whose programs take tiles of operands of the size of x."""


def _reversed(launch: Launch) -> bool:
    """Whether it walks from the last tile to the first."""
    return launch.kernel in (stream, grad_stream) and launch.form.PHASE == APPLY


def _calls(plan: Plan, itemsizes: Mapping[str, int]) -> list[Counted]:
    missing = [name for name, elements in plan.workspace if elements and name not in itemsizes]
    if missing:
        raise ValueError(f"itemsizes must give the bytes of an element of workspace too: {', '.join(missing)} missing")
    calls = []
    for launch in plan.launches:
        if launch.kernel not in KERNELS:
            raise ValueError(f"what a kernel moves is known of those of normops.kernels only; got {launch.kernel}")
        call = Counted(launch, itemsizes)
        KERNELS[launch.kernel](call)
        calls.append(call)
    return calls


def traffic(plan: Plan, itemsizes: Mapping[str, int]) -> tuple[dict[str, Moved], ...]:
    """For each launch of a plan, name of operand -> bytes its kernel loads and stores.

    Every access of every lane inside the masks counts, as in ``normops.testing.traffic``: there are no caches.
    `itemsizes`: bytes of an element of each operand that is present, workspace included; absent ones move nothing.

    Raises ValueError for a kernel that is not known, and where `itemsizes` leaves out workspace.
    """
    return tuple({name: _bytes(n, itemsizes[name]) for name, n in c.lanes.items()} for c in _calls(plan, itemsizes))


def _bytes(lanes: Moved, itemsize: int) -> Moved:
    return Moved(lanes.loads * itemsize, lanes.stores * itemsize)


class _Once(NamedTuple):
    """Bytes of an operand in one launch, each element counted once: read first, written, read again."""

    loads: int
    stores: int
    again: int


class _Distinct(NamedTuple):
    moved: dict[str, _Once]
    between: int
    """Bytes of streams that go by before a launch reads again what it has read."""


def _distinct(plan: Plan, itemsizes: Mapping[str, int]) -> list[_Distinct]:
    """As traffic(), but within a launch each element of an operand counts once, however often it is accessed.

    What a launch counts in (tickets) is left out: it never leaves L2.  So is what is read beside tiles that hold it.
    """
    sizes = dict(plan.workspace)

    def once(call: Counted, pointer: str, name: str) -> _Once:
        elements = sizes.get(name) or call.elements(pointer)
        (loads, stores), again = call.lanes[name], call.again.get(name, 0)
        found = (loads - call.aside.get(name, 0) - again, stores, again)
        return _Once(*(itemsizes[name] * (n if elements is None else min(n, elements)) for n in found))

    return [
        _Distinct(
            {name: once(call, pointer, name) for pointer, name in call.pointers.items()
             if name in call.lanes and call.lanes[name] != (call.aside.get(name, 0), 0) and name != "tickets"},
            sum(lanes * itemsizes[name] for name, lanes in call.between.items()),
        )
        for call in _calls(plan, itemsizes)
    ]  # fmt: skip


def hbm(plan: Plan, itemsizes: Mapping[str, int], l2_window: int) -> Hbm:
    """What of a plan's traffic reaches DRAM where `l2_window` bytes can be found again in L2.  A model; it assumes:

    - nothing the call reads is in L2 when it starts, and everything it writes for its caller goes to DRAM;
    - within a launch each element is read from DRAM once: parameters and statistics that tiles share come from caches;
      a ticketed launch finds what it reads again where the streams that go by in between fit `l2_window`, else nothing;
    - of the streams (operands of the size of x) a launch leaves the `l2_window` bytes that it touched last in L2, in
      equal shares.  A later launch that walks in reverse (an apply) finds these, and reads the rest from DRAM;
      one that walks forward finds everything where all the streams of that launch fit, else nothing;
    - parameters, statistics and partial sums that an earlier launch touched are found where those read together fit
      `l2_window`; workspace that fits is overwritten or freed before it goes to DRAM.

    Raises ValueError as :func:`traffic` does, and for a negative window.
    """
    if l2_window < 0:
        raise ValueError(f"l2_window must be a number of bytes, 0 or more; got {l2_window}")
    scratch = dict(plan.scratch)
    touched: dict[str, int] = {}  # operand -> streams of the last launch that touched it, in bytes
    cached = window = 0
    launches = []
    for launch, (moved, between) in zip(plan.launches, _distinct(plan, itemsizes), strict=True):
        again = sum(m.loads for name, m in moved.items() if name in touched and name not in STREAMS)
        spilled = sum(m.stores for name, m in moved.items() if name in scratch) > l2_window
        loads = stores = 0
        for name, m in moved.items():
            found = 0
            if m.loads and name in touched:
                held = touched[name] if name in STREAMS else again
                if held <= l2_window or (name in STREAMS and _reversed(launch)):
                    found = m.loads * min(held, l2_window) // held
                    window = max(window, min(held, l2_window))
            if name in STREAMS and m.again:
                if between <= l2_window:
                    window = max(window, between)
                    cached += m.again
                else:
                    loads += m.again
            cached += found
            loads += m.loads - found
            stores += m.stores if spilled or name not in scratch else 0
        streams = sum(max(m.loads, m.stores) for name, m in moved.items() if name in STREAMS)
        touched.update(dict.fromkeys(moved, streams))
        launches.append(Moved(loads, stores))
    return Hbm(sum(map(sum, launches)), cached, window, tuple(launches))


def floor(plan: Plan, itemsizes: Mapping[str, int]) -> int:
    """The least bytes of a call: each operand that is read before it is written read once, each that is written
    written once.  Workspace counts only where it is a result (mean and rstd of a forward).

    Raises ValueError as :func:`traffic` does.
    """
    scratch = dict(plan.scratch)
    read: dict[str, int] = {}
    written: dict[str, int] = {}
    for moved, _ in _distinct(plan, itemsizes):
        for name, (loads, stores, _) in moved.items():
            if name not in scratch:
                if loads and name not in written:
                    read[name] = loads
                if stores:
                    written[name] = stores
    return sum(read.values()) + sum(written.values())
