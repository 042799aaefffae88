"""What instructions do to a warp: each is turned once into a function of it.

Only what can decide a program's way and its addresses is computed.  Every other result is unknown, and so is that of an
instruction that is not listed here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

import numpy as np

from . import integers, lanes
from .code import PREDICATE, Instruction, is_register
from .lanes import Value, extend
from .operands import Act, Warp, pair, place, predicate, reader, size, split

SILENT = frozenset({
    "STG", "STSM", "BAR", "BSSY", "BSYNC", "WARPSYNC", "BREAK", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "CCTLL", "NOP",
    "DEPBAR", "LDGDEPBAR", "YIELD", "RED", "REDG", "NANOSLEEP", "BMOV", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG",
    "UTMAREDG", "UTMACCTL", "UTMACMDFLUSH", "PREEXIT", "ACQBULK", "EXIT", "BRA", "CALL", "RET", "BRX", "JMP", "KILL",
    "BPT",
})  # fmt: skip
"""Instructions that leave registers and predicates as they are, or are the walk's own business."""


def move(i: Instruction) -> Act:
    wide = "64" in i.parts
    out, source = i.registers()[0], reader(i.registers()[-1], wide)
    return lambda w: w.put(out, source(w), wide)


def special(i: Instruction) -> Act:
    out, name = i.registers()[0], i.operands[-1]
    wide = i.head == "CS2R" and i.parts[-1] != "32"
    return lambda w: w.put(out, 0 if name == "SRZ" else w.special(name), wide)


def read_first(i: Instruction) -> Act:
    """To a register that the warp shares: what its first lane holds."""
    out = next(o for o in i.operands if o.startswith("UR"))
    source = reader(i.registers()[-1])

    def act(w: Warp) -> None:
        v = source(w)
        if isinstance(v, np.ndarray):
            v = int(v[w.active_lanes()[0]])
        w.put(out, v)

    return act


def exchange(i: Instruction) -> Act:
    """SHFL: the value of another lane."""
    _, (out, a, by, _), _ = split(i)
    source, other, kind = reader(a), reader(by), i.parts[1]

    def act(w: Warp) -> None:
        v, n = source(w), other(w)
        if n is None or not isinstance(v, np.ndarray):
            w.put(out, v)
            return
        n = lanes.array(n)
        at = {"IDX": n, "BFLY": lanes.LANES ^ n, "DOWN": lanes.LANES + n, "UP": lanes.LANES - n}[kind]
        w.put(out, v[np.where(at < 32, at, lanes.LANES).astype(np.int64)])

    return act


def vote(i: Instruction) -> Act:
    outs = [o for o in i.operands[:2] if PREDICATE.match(o)]
    register_out = next((o for o in i.operands if is_register(o)), None)
    p, kind = predicate(i.operands[-1]), i.parts[1]

    def act(w: Warp) -> None:
        v = p(w)
        here = None if v is None else lanes.array(v)[w.active_lanes()]
        for name in outs[: len(i.operands) - 1 - bool(register_out)]:
            w.set(name, None if here is None else bool(here.any() if kind == "ANY" else here.all()))
        if register_out:
            w.put(register_out, None if here is None else sum(1 << int(n) for n in w.active_lanes()[here]))

    return act


def elect(i: Instruction) -> Act:
    """The first lane, of those that are here."""
    out = i.operands[0]
    return lambda w: w.set(out, w.active_lanes()[0] == lanes.LANES if len(w.active_lanes()) else False)


def barrier(i: Instruction) -> Act:
    """SYNCS, a barrier in shared memory: what is waited for has come when a wait for it is over."""
    if "TRYWAIT" not in i.parts:
        return forget(i)
    out = i.operands[0]
    return lambda w: w.set(out, True)


def to_float(i: Instruction) -> Act:
    out, source = i.registers()[0], reader(i.registers()[1])
    signed, up = "S32" in i.parts or not any(p.startswith("U") for p in i.parts), "RP" in i.parts
    if i.parts[1:2] == ("F64",) or any("64" in part for part in i.parts):
        return forget(i)

    def act(w: Warp) -> None:
        v = source(w)
        if v is None:
            w.put(out, None)
            return
        exact = lanes.array(extend(v) if signed else v)
        wide = exact.view(np.int64).astype(np.float64) if signed else exact.astype(np.float64)
        f = wide.astype(np.float32)
        if up:
            f = np.where(f.astype(np.float64) < wide, np.nextafter(f, np.float32(np.inf)), f)
        w.put(out, lanes.collapsed(lanes.from_floats(f)))

    return act


def to_integer(i: Instruction) -> Act:
    out, source = i.registers()[0], reader(i.registers()[1])

    def act(w: Warp) -> None:
        v = source(w)
        w.put(out, None if v is None else lanes.collapsed(lanes.integers(lanes.floats(v))))

    return act if not any("64" in part for part in i.parts) else forget(i)


def function_unit(i: Instruction) -> Act:
    """MUFU: the reciprocal is known, for integers are divided by it."""
    if i.parts[1:] != ("RCP",):
        return forget(i)
    out, source = i.registers()[0], reader(i.registers()[1])

    def act(w: Warp) -> None:
        v = source(w)
        if v is None:
            w.put(out, None)
            return
        with np.errstate(divide="ignore"):
            w.put(out, lanes.collapsed(lanes.from_floats(np.float32(1) / lanes.floats(v))))

    return act


def halves(i: Instruction) -> Act:
    """HFMA2 with a product of zero: how two 16-bit constants come into a register."""
    _, (out, *sources), _ = split(i)
    if len(sources) != 4 or {sources[0].lstrip("-"), sources[1].lstrip("-")} != {"RZ"}:
        return forget(i)
    high, low = (int(np.float16(float(s)).view(np.uint16)) for s in sources[2:])
    return lambda w: w.put(out, high << 16 | low)


def predicates_to_register(i: Instruction) -> Act:
    _, (out, *_, mask), _ = split(i)
    which = int(mask, 16)
    names = [(k, f"{'U' if i.head[0] == 'U' else ''}P{k}") for k in range(7) if which >> k & 1]

    def act(w: Warp) -> None:
        t: Value = 0
        kept = {}
        for k, name in names:
            p = w.predicates.get(name, False)
            kept[name] = p
            if p is None or t is None:
                t = None
            else:
                t = t | (lanes.array(p).astype(np.uint64) << k if isinstance(p, np.ndarray) else int(p) << k)
        w.put(out, t)
        w.packed[out] = kept

    return act


def register_to_predicates(i: Instruction) -> Act:
    source, mask = [o for o in i.operands if o != "PR"][:2]
    which, value = int(mask, 16), reader(source)

    def act(w: Warp) -> None:
        v = value(w)
        for k in range(7):
            if which >> k & 1:
                kept = w.packed.get(source, {}).get(f"P{k}")
                w.set(f"P{k}", kept if v is None else (v >> k & 1) != 0)

    return act


def forget(i: Instruction) -> Act:
    """Unknown results: of floating-point arithmetic, and of what is not listed."""
    outs = list(takewhile(PREDICATE.match, i.operands))
    written = i.operands[len(outs) : len(outs) + (2 if i.width == 256 else 1)]  # 256 bits come in two pieces
    names = [pair(o, k) for o in written if is_register(o) for k in range(size(i))]

    def act(w: Warp) -> None:
        for name in names:
            w.put(name, None)
        for name in outs:
            w.set(name, None)

    return act


def load(i: Instruction) -> Act:
    out, address, words = i.registers()[0], place(i), max(1, i.width // 32)
    memory = "shared" if i.head == "LDS" else "local"

    def act(w: Warp) -> None:
        at = address(w)
        for k in range(words):
            w.put(pair(out, k) if words > 1 else out, w.remembered(memory, at, 4 * k))

    return act


def store(i: Instruction) -> Act:
    address, words, source = place(i), max(1, i.width // 32), i.registers()[-1]
    reads = [reader(pair(source, k) if is_register(source) else source) for k in range(words)]
    memory = "shared" if i.head == "STS" else "local"

    def act(w: Warp) -> None:
        at = address(w)
        for k, r in enumerate(reads):
            w.remember(memory, at, 4 * k, r(w))

    return act


def atomic(i: Instruction) -> Act:
    """The first addition of a program may draw a ticket, see Warp.ticket; what others return is unknown."""
    out = next((o for o in i.registers() if is_register(o)), "RZ")
    try:
        address, addend = place(i), reader(i.registers()[-1])
    except StopIteration:
        return forget(i)

    def act(w: Warp) -> None:
        drawn = w.drawn(address(w), addend(w)) if "ADD" in i.parts and i.head in ("ATOMG", "ATOM") else None
        for k in range(max(1, i.width // 32)):
            w.put(pair(out, k) if out != "RZ" else out, drawn if not k else None)

    return act


_MEANINGS: dict[str, Callable[[Instruction], Act]] = integers.MEANINGS | {
    "MOV": move, "MOV32I": move, "LDC": move, "LDCU": move, "ULDC": move, "CS2R": special, "S2R": special,
    "S2UR": special, "R2UR": read_first, "SHFL": exchange, "VOTE": vote, "VOTEU": vote, "ELECT": elect,
    "SYNCS": barrier, "I2F": to_float, "I2FP": to_float, "F2I": to_integer, "MUFU": function_unit, "HFMA2": halves,
    "P2R": predicates_to_register, "R2P": register_to_predicates, "LDS": load, "LDL": load, "STS": store, "STL": store,
    "ATOMG": atomic, "ATOM": atomic, "ATOMS": atomic,
}  # fmt: skip


def meaning(i: Instruction) -> Act | None:
    """What the instruction does to a warp; None: nothing that can be known or has to be forgotten."""
    if i.head in SILENT:
        return None
    known = _MEANINGS.get(i.head) or (_MEANINGS.get(i.head[1:]) if i.head[0] == "U" else None)
    return (known or forget)(i)
