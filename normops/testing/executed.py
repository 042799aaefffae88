"""What the warps of a launch execute: a sample of its programs is walked through the machine code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod
from typing import Any

from torch import Tensor

from .binary import Binary
from .machine import cubin
from .machine.code import COUNTED, Instruction, read
from .machine.counts import Count
from .machine.steps import Code
from .machine.walk import LIMIT, Walk

KINDS = ("instructions", *dict.fromkeys(COUNTED.values()))
BUDGET, FEWEST, MOST = 300_000, 4, 18
"""Instructions to walk through in all, and how many programs at least and at most."""
ALIGNED = 512
_BLACKWELL = 0x380
"""Where parameters begin from compute capability 10 on; what a launch is told of its own size lies before them."""


@dataclass(frozen=True)
class Executed:
    """What a launch executes, as averages of a warp; ``unsure`` says what data decides.

    >>> import torch, normops
    >>> from normops.testing import Executed, virtual_device
    >>> with virtual_device("h100") as gpu:
    ...     y = normops.functional.rms_norm(torch.empty(4096, 1024, dtype=torch.bfloat16), (1024,))
    >>> done: Executed = gpu.launches[0].executed
    >>> done.rounds, done["barriers"], done.unsure
    (1.0, 4.0, ())
    >>> 5 < done.per_element(4096 * 1024) < 30
    True
    """

    programs: int
    """Those of a cluster count each."""
    warps: int
    """Of a program."""
    walked: int
    """Programs that were walked through; what only others do is not known where these are fewer."""
    counts: Mapping[str, float]
    """Kind -> how many a warp executes, as far as data does not decide: KINDS says which kinds there are."""
    at_most: Mapping[str, float]
    """The same if data always takes the longer way; infinite where it decides how often a loop runs."""
    rounds: float
    """How often a program waits for loads from global memory one after the other: loads that are under way together
    are one round."""
    atomic_rounds: float
    """The same for atomic operations whose result it waits for."""
    cycles: float
    """Of one warp alone on an SM, were global memory to answer at once: stalls and the latencies of the SM."""
    further_rounds: float
    further_cycles: float
    """What data would add to these if it always took the longer way, a loop that it decides once."""
    loaded: float
    stored: float
    """Bytes that all programs ask global memory for, masked lanes left out."""
    sectors: float
    """Pieces of 32 bytes that they draw from L2 or send there: times 32 it is more than the bytes where lanes do not
    use neighbouring memory.  What a warp's last loads touched is in L1."""
    in_flight: float
    """Bytes that a warp has under way at once, at most."""
    wavefronts: float
    """Turns that a warp's accesses to memory and shuffles take at the SM's one port, 128 bytes each or less: more where
    banks of shared memory conflict, or lanes use different lines of global memory."""
    size: float
    """Instructions that a warp executes at least once."""
    tickets: bool
    """Whether each program begins by drawing a number from one counter: in the order of programs, it is assumed."""
    uncounted: tuple[str, ...]
    """What the walk could not follow, in words."""
    deciding: tuple[tuple[str, Instruction], ...]
    """Where data decides: "a branch", "a loop" or "an access", and the instruction."""
    binary: Binary

    @property
    def unsure(self) -> tuple[str, ...]:
        """Where data decides, with the line of the source, and what was assumed."""
        texts = ["programs draw tickets from one counter: in their order, it is assumed"] if self.tickets else []
        for what, i in self.deciding:
            line = self.binary.lines.get(i.address) or "an unknown line"
            texts.append(f"data decides {what} in {line}: {i}")
        return tuple(texts) + self.uncounted

    def __getitem__(self, kind: str) -> float:
        return self.counts[kind]

    def per_element(self, elements: int, kind: str = "instructions") -> float:
        """Instructions of one thread for each of so many elements: a warp's are those of 32 threads."""
        return self.counts[kind] * self.warps * self.programs * 32 / max(1, elements)


def sampled(programs: int, most: int) -> list[tuple[int, float]]:
    """(number of a program, share of all programs that it stands for).

    All, where they are few; else the first, the last, and pairs of neighbours between them, for neighbours often have
    different roles.
    """
    if programs <= most:
        return [(i, 1 / programs) for i in range(programs)]
    pairs = (most - 2) // 2
    edge, each = 1 / programs, (1 - 2 / programs) / (2 * pairs)
    starts = [1 + int((k + 0.5) * (programs - 3) / pairs) for k in range(pairs)]
    return [(0, edge), *((i + n, each) for i in starts for n in (0, 1)), (programs - 1, edge)]


@lru_cache(maxsize=512)
def prepared(binary: Binary) -> tuple[Code, tuple[cubin.Place, ...]]:
    text, name = binary.cuobjdump("-sass"), binary.name
    return Code(read(text, name)), cubin.parameters(binary.asm["cubin"], name)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for element in value:
            yield from _flat(element)
    else:
        yield value


def _address(pointer: Any) -> int:
    """A tensor's address, or an address, as on a device, where memory that is allocated begins at 512 bytes; a CPU's
    begins at 64."""
    if isinstance(pointer, Tensor):
        begin = pointer.untyped_storage().data_ptr()
        return -(-begin // ALIGNED) * ALIGNED + pointer.data_ptr() - begin
    address = int(pointer if isinstance(pointer, int) else pointer.data_ptr())
    return address if address % 64 else -(-address // ALIGNED) * ALIGNED


def constants(
    binary: Binary, places: Sequence[cubin.Place], arguments: Mapping[str, Any], grid: tuple[int, int, int]
) -> dict[int, int]:
    """Known words of the constant bank: sizes of the launch, and its integer and pointer arguments."""
    base = min((p.offset for p in places), default=0)
    block, size, stack = (0x360, 0x370, 0x37C) if base >= _BLACKWELL else (0x0, 0xC, 0x28)
    words = {block: binary.threads, block + 4: 1, block + 8: 1, stack: 1 << 16}
    words |= {size + 4 * axis: n for axis, n in enumerate(grid)}
    queues = {name: _flat(value) for name, value in arguments.items()}
    for parameter, place in zip(binary.parameters or (), places, strict=False):
        value = next(queues.get(parameter.argument, iter(())), None)
        if parameter.pointer and value is not None:
            value = _address(value)
        if isinstance(value, int):  # also bool
            bits = int(value) & ((1 << 8 * place.size) - 1)
            words |= {place.offset + k: bits >> 8 * k & 0xFFFFFFFF for k in range(0, place.size, 4)}
    return words


def execute(binary: Binary, grid: tuple[int, int, int], arguments: Mapping[str, Any]) -> Executed:
    """Walk a sample of the warps of a launch.

    Raises NotImplementedError for a kernel that was not compiled for an NVIDIA GPU.
    """
    if binary.target.backend != "cuda":
        raise NotImplementedError(f"machine code is walked through for NVIDIA GPUs only, {binary.name} is for another")
    code, places = prepared(binary)
    ctas = binary.num_ctas  # programs of a cluster lie side by side along x
    grid = (grid[0] * ctas, *grid[1:])
    words, programs = constants(binary, places, arguments, grid), prod(grid)
    threads = binary.threads // 32

    def walk(program: int, tickets: bool) -> list[tuple[float, Walk]]:
        x, y, _ = grid
        where = {"SR_CTAID.X": program % x, "SR_CTAID.Y": program // x % y, "SR_CTAID.Z": program // (x * y),
                 "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CgaCtaId": program % ctas, "SR_VIRTUALSMID": 0}  # fmt: skip
        found: list[tuple[float, Walk]] = []
        for warp in range(threads):  # all: where a row ends decides which of them have anything to do
            told = found[0][1].barriers if found else ()
            one = Walk(code, where, words, warp, program // ctas if tickets else None, told)
            one.run()
            found.append((1 / threads, one))
        return found

    first = walk(0, True)
    most = max(FEWEST, min(MOST, BUDGET // max(1, sum(sum(w.count.visits) for _, w in first))))
    draws = {w.first_atomic for _, w in first if w.first_atomic}
    tickets = len(draws) == 1 and next(iter(draws))[1] == 1
    sample = sampled(programs, most)
    walks = [(share, first if program == 0 and tickets else walk(program, tickets)) for program, share in sample]
    drawn = {w.first_atomic for _, found in walks for _, w in found if w.first_atomic}
    if tickets and len(drawn) > 1:  # not one counter for all: no tickets
        tickets = False
        walks = [(share, walk(program, False)) for program, share in sample]
    return summarised(binary, code, walks, programs, tickets)


def counted(code: Code, visits: Sequence[int]) -> dict[str, int]:
    found = dict.fromkeys(KINDS, 0)
    for step, n in zip(code.steps, visits, strict=True):
        if n and step.i.head != "NOP":
            found["instructions"] += n
            if kind := COUNTED.get(step.i.head):
                found[kind] += n
    return found


def summarised(
    binary: Binary, code: Code, walks: Sequence[tuple[float, list[tuple[float, Walk]]]], programs: int, tickets: bool
) -> Executed:
    """The averages over a sample of (share, [(share of its warps, walk)])."""
    counts, most = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    totals = dict.fromkeys(("loaded", "stored", "sectors", "in_flight", "wavefronts", "size"), 0.0)
    longest = dict.fromkeys(("rounds", "atomic_rounds", "cycles", "further_rounds", "further_cycles"), 0.0)
    branches: set[int] = set()
    loops: set[int] = set()
    accesses: set[int] = set()
    endless = False
    for share, warps_walked in walks:
        for part, walk in warps_walked:
            one: Count = walk.count
            for kind, n in counted(code, one.visits).items():
                counts[kind] += share * part * n
                most[kind] += share * part * n
            for kind, n in counted(code, one.maybe).items():
                most[kind] += share * part * n
            for name in totals:
                totals[name] += share * part * (getattr(one, name) if name != "size" else sum(map(bool, one.visits)))
            branches |= one.branches
            loops |= one.loops
            accesses |= one.accesses
            endless |= one.endless
        for name in longest:
            longest[name] += share * max(getattr(walk.count, name) for _, walk in warps_walked)
    uncounted = ["bytes of bulk copies (TMA) are not counted"] if code.bulk else []
    if any(walk.left <= 0 for _, found in walks for _, walk in found):
        uncounted.append(f"a warp executes more than {LIMIT} instructions: the rest was not walked through")
    deciding = [("a loop" if at in loops else "a branch", at) for at in branches | loops]
    deciding += [("an access", at) for at in accesses]
    found = tuple((what, code.steps[at].i) for what, at in sorted(deciding, key=lambda pair: pair[1]))
    warps = binary.threads // 32
    everyone = programs * warps
    average = {name: round(value, 9) for name, value in (longest | totals).items()}
    return Executed(
        programs, warps, len(walks), {kind: round(n, 9) for kind, n in counts.items()},
        dict.fromkeys(KINDS, inf) if endless else {kind: round(n, 9) for kind, n in most.items()},
        **{name: value * everyone if name in ("loaded", "stored", "sectors") else value
           for name, value in average.items()},
        tickets=tickets, uncounted=tuple(uncounted), deciding=found, binary=binary,
    )  # fmt: skip
