"""What the warps of a launch execute: a sample of its programs is walked through the machine code."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod
from typing import Any

from torch import Tensor

from .binary import Binary
from .machine import cubin
from .machine.code import KINDS, Instruction, read
from .machine.counts import Count
from .machine.steps import Code
from .machine.walk import LIMIT, Walk

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
    """Bytes that all programs ask global memory for, masked lanes left out; bulk copies (TMA) count with whole tiles,
    also where these reach beyond the tensor."""
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
    return Code(read(text, name), max(binary.tiles, default=0)), cubin.parameters(binary.asm["cubin"], name)


def _address(pointer: Any) -> int:
    """A tensor's address, or an address, as on a device, where memory that is allocated begins at 512 bytes; a CPU's
    begins at 64."""
    if isinstance(pointer, Tensor):
        begin = pointer.untyped_storage().data_ptr()
        return -(-begin // ALIGNED) * ALIGNED + pointer.data_ptr() - begin
    address = int(pointer if isinstance(pointer, int) else pointer.data_ptr())
    return address if address % 64 else -(-address // ALIGNED) * ALIGNED


def _pieces(value: Any, rank: int, left: deque[cubin.Place]) -> Iterator[tuple[cubin.Place, Any]]:
    """Where the pieces of a parameter lie, and their values (None: not known).

    A tensor descriptor is an opaque word of 128 bytes, sizes and strides; without TMA its tensor, sizes, strides and
    flags stand in the place of that word.
    """
    if not left:
        return
    first = left.popleft()
    sizes = [*value.shape, *value.strides] if rank and value is not None else [None] * 2 * rank
    opaque = first.size > 8
    yield first, None if opaque else value.base if rank and value is not None else value
    if rank and not opaque:
        yield from zip([left.popleft() for _ in sizes], sizes, strict=True)
        while left and left[0].size == 1:
            left.popleft()
    yield from zip([left.popleft() for _ in sizes], sizes, strict=True)


def constants(
    binary: Binary, places: Sequence[cubin.Place], values: Sequence[Any], grid: tuple[int, int, int]
) -> dict[int, int]:
    """Known words of the constant bank: sizes of the launch, and its integer and pointer parameters."""
    base = min((p.offset for p in places), default=0)
    block, size, stack = (0x360, 0x370, 0x37C) if base >= _BLACKWELL else (0x0, 0xC, 0x28)
    words = {block: binary.threads, block + 4: 1, block + 8: 1, stack: 1 << 16}
    words |= {size + 4 * axis: n for axis, n in enumerate(grid)}
    left = deque(places)
    for parameter, whole in zip(binary.parameters, values, strict=True):
        for place, value in _pieces(whole, parameter.rank, left):
            if value is not None and (parameter.pointer or isinstance(value, Tensor)):
                value = _address(value)
            if isinstance(value, int):  # also bool
                bits = int(value) & ((1 << 8 * place.size) - 1)
                words |= {place.offset + k: bits >> 8 * k & 0xFFFFFFFF for k in range(0, place.size, 4)}
    return words


def execute(binary: Binary, grid: tuple[int, int, int], values: Sequence[Any]) -> Executed:
    """Walk a sample of the warps of a launch; `values`: of its parameters, in order.

    Raises NotImplementedError for a kernel that was not compiled for an NVIDIA GPU.
    """
    if binary.target.backend != "cuda":
        raise NotImplementedError(f"machine code is walked through for NVIDIA GPUs only, {binary.name} is for another")
    code, places = prepared(binary)
    ctas = binary.num_ctas  # programs of a cluster lie side by side along x
    grid = (grid[0] * ctas, *grid[1:])
    words, programs = constants(binary, places, values, grid), prod(grid)
    threads = binary.threads // 32

    def walk(program: int, tickets: bool) -> list[Walk]:
        x, y, _ = grid
        where = {"SR_CTAID.X": program % x, "SR_CTAID.Y": program // x % y, "SR_CTAID.Z": program // (x * y),
                 "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CgaCtaId": program % ctas, "SR_VIRTUALSMID": 0}  # fmt: skip
        found: list[Walk] = []
        for warp in range(threads):  # all: where a row ends decides which of them have anything to do
            told = found[0].barriers if found else ()
            one = Walk(code, where, words, warp, program // ctas if tickets else None, told)
            one.run()
            found.append(one)
            if one.left <= 0:  # the others would take as long
                break
        return found

    first = walk(0, True)
    most = max(FEWEST, min(MOST, BUDGET // max(1, sum(sum(w.count.visits) for w in first))))
    draws = {w.first_atomic for w in first if w.first_atomic}
    tickets = len(draws) == 1 and next(iter(draws))[1] == 1
    sample = sampled(programs, most) if all(w.left > 0 for w in first) else [(0, 1.0)]
    walks = [(share, first if program == 0 and tickets else walk(program, tickets)) for program, share in sample]
    drawn = {w.first_atomic for _, found in walks for w in found if w.first_atomic}
    if tickets and len(drawn) > 1:  # not one counter for all: no tickets
        tickets = False
        walks = [(share, walk(program, False)) for program, share in sample]
    return summarised(binary, code, walks, programs, tickets)


def counted(code: Code, visits: Sequence[int]) -> dict[str, int]:
    return {kind: sum(map(visits.__getitem__, places)) for kind, places in code.kinds.items()}


def summarised(
    binary: Binary, code: Code, walks: Sequence[tuple[float, list[Walk]]], programs: int, tickets: bool
) -> Executed:
    """The averages over a sample of (share, the warps of a program)."""
    counts, most = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    totals = dict.fromkeys(("loaded", "stored", "sectors", "in_flight", "wavefronts", "size"), 0.0)
    longest = dict.fromkeys(("rounds", "atomic_rounds", "cycles", "further_rounds", "further_cycles"), 0.0)
    branches: set[int] = set()
    loops: set[int] = set()
    accesses: set[int] = set()
    endless = False
    for share, walked in walks:
        part = share / len(walked)
        for walk in walked:
            one: Count = walk.count
            for kind, n in counted(code, one.visits).items():
                counts[kind] += part * n
                most[kind] += part * n
            for kind, n in counted(code, one.maybe).items():
                most[kind] += part * n
            for name in totals:
                totals[name] += part * (getattr(one, name) if name != "size" else sum(map(bool, one.visits)))
            branches |= one.branches
            loops |= one.loops
            accesses |= one.accesses
            endless |= one.endless
        for name in longest:
            longest[name] += share * max(getattr(walk.count, name) for walk in walked)
    uncounted = []
    if any(step.access == "tile" for step in code.steps) and len(binary.tiles) != 1:
        uncounted.append(f"a bulk copy stores {' or '.join(map(str, sorted(binary.tiles))) or 'unknown'} bytes")
    if any(walk.left <= 0 for _, found in walks for walk in found):
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
