"""Integer arithmetic and logic: what these instructions do, each as a function of a warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import lanes
from .code import PREDICATE, Instruction
from .lanes import CARRY, HIGH, M32, M64, Value, both, either, extend, inverted, select, table
from .operands import Act, Warp, constant, predicate, reader, split


def simple(i: Instruction, function: Callable[..., Value], wide: bool = False) -> Act:
    """Destination = function(sources), unknown where a source is."""
    _, (out, *sources), _ = split(i)
    reads = [reader(s) for s in sources]

    def act(w: Warp) -> None:
        values = [r(w) for r in reads]
        v = None if any(x is None for x in values) else function(*values)
        w.put(out, v if v is None or wide else v & M32, wide)

    return act


def add(i: Instruction) -> Act:
    outs, (out, *sources), ins = split(i)
    wide = "64" in i.parts
    ones = M64 if wide else M32
    reads = [reader(s, wide, carry=bool(outs)) for s in sources]
    carries = [predicate(p) for p in ins] if "X" in i.parts else []
    tells = [(p, n + 1) for n, p in enumerate(outs) if p not in ("PT", "UPT")]

    def act(w: Warp) -> None:
        values = [r(w) for r in reads]
        for c in carries:
            p = c(w)
            values.append(None if p is None else p.astype(np.uint64) if isinstance(p, np.ndarray) else int(p))
        t = None if any(v is None for v in values) else sum(values)
        for name, n in tells:
            w.set(name, None if t is None or wide else t >= n * CARRY)
        w.put(out, None if t is None else t & ones, wide)

    return act


def multiply(i: Instruction) -> Act:
    outs, (out, a, b, *rest), ins = split(i)
    c = rest[0] if rest else "RZ"
    wide, high, signed = "WIDE" in i.parts, "HI" in i.parts, "U32" not in i.parts
    x, y, z = reader(a), reader(b), reader(c, wide or high)
    carry = predicate(ins[-1]) if "X" in i.parts and ins else constant(0)

    def act(w: Warp) -> None:
        p, q, r, k = x(w), y(w), z(w), carry(w)
        if (not isinstance(p, np.ndarray) and p == 0) or (not isinstance(q, np.ndarray) and q == 0):
            p = q = 0
        if p is None or q is None or r is None or k is None:
            v: Value = None
        elif wide or high:
            v = (extend(p) * extend(q) if signed else p * q) + r & M64
            v = v >> 32 if high else v
        else:
            v = p * q + r + k & M32
        for name in outs:
            w.set(name, None)
        w.put(out, v, wide)

    return act


def shift_add(i: Instruction) -> Act:
    """LEA: (a << n) + b; HI: of the pair (c, a), the high half."""
    outs, (out, *sources), ins = split(i)
    high, signed = "HI" in i.parts, "SX32" in i.parts
    a, b = reader(sources[0]), reader(sources[1])
    c = reader(sources[2]) if len(sources) == 4 else constant(0)
    n = reader(sources[-1])
    carry = predicate(ins[-1]) if "X" in i.parts and ins else constant(0)

    def act(w: Warp) -> None:
        x, y, top, by, k = a(w), b(w), c(w), n(w), carry(w)
        if any(v is None for v in (x, y, top, by, k)):
            t: Value = None
        elif high:
            whole = extend(x) if signed else x | top << 32
            t = (lanes.shifted(whole, by, True) >> 32) + y + k
        else:
            t = (lanes.shifted(x, by, True) & M32) + y
        for name in outs:
            w.set(name, None if t is None else t > M32)
        w.put(out, None if t is None else t & M32)

    return act


def shift(i: Instruction) -> Act:
    _, (out, a, by, c), _ = split(i)
    low, n, top = reader(a), reader(by), reader(c)
    turns = "W" in i.parts  # by so many bits modulo the width
    left, high, signed = i.parts[1] == "L", "HI" in i.parts, "S32" in i.parts or "S64" in i.parts
    only_low = left and not high  # its result does not depend on the high half
    only_high = not left and (high or "S32" in i.parts or "U32" in i.parts)

    def act(w: Warp) -> None:
        x, s, y = low(w), n(w), top(w)
        if turns and s is not None:
            s = s & (31 if i.parts[2].endswith("32") or i.parts[-1].endswith("32") else 63)
        if s is None or (x is None and not only_high) or (y is None and not only_low):
            v: Value = None
        elif only_low:
            v = lanes.shifted(x, s, True, 32)
        elif only_high:
            v = lanes.shifted_signed(y, s, 32) if signed else lanes.shifted(y, s, False, 32)
        else:
            whole = x | y << 32
            v = lanes.shifted(whole, s, True) >> 32 if left else lanes.shifted(whole, s, False)
            if signed and not left:
                v = lanes.shifted_signed(whole, s, 64)
        w.put(out, None if v is None else lanes.collapsed(v & M32))

    return act


def logic(i: Instruction) -> Act:
    outs, (out, a, b, c, lut), _ = split(i)
    x, y, z, code = reader(a), reader(b), reader(c), int(lut, 16)

    def act(w: Warp) -> None:
        v = table(code, [x(w), y(w), z(w)], M32)
        v = lanes.collapsed(v)
        for name in outs:
            w.set(name, None if v is None else v != 0)
        w.put(out, v)

    return act


def predicate_logic(i: Instruction) -> Act:
    names, luts = [o for o in i.operands if PREDICATE.match(o)], [o for o in i.operands if not PREDICATE.match(o)]
    outs, ins = names[:-3], [predicate(p) for p in names[-3:]]
    codes = [int(lut, 16) for lut in luts]

    def act(w: Warp) -> None:
        values = [p(w) for p in ins]
        for name, code in zip(outs, codes, strict=False):
            v = table(code, list(values), 1)
            w.set(name, v.astype(np.bool_) if isinstance(v, np.ndarray) else v if v is None else bool(v))

    return act


def compare(i: Instruction) -> Act:
    first, second, a, b, joined, *low = i.operands
    wide = any(part in ("U64", "S64", "64") for part in i.parts)
    x, y, c, top = reader(a, wide), reader(b, wide), predicate(joined), 1 << 63 if wide else HIGH
    below = predicate(low[0]) if low else constant(None)
    relation, signed, extended = i.parts[1], not any(part in ("U32", "U64") for part in i.parts), "EX" in i.parts
    join = next((part for part in i.parts if part in ("AND", "OR", "XOR")), "AND")

    def act(w: Warp) -> None:
        p, q = x(w), y(w)
        if p is None or q is None:
            r: Value = None
        else:
            if signed and relation not in ("EQ", "NE"):
                p, q = p ^ top, q ^ top
            if extended:
                apart = {"L": p < q, "G": p > q, "E": False, "N": True}[relation[0]]
                r = select(p == q, below(w), apart)
            else:
                r = {"LT": p < q, "LE": p <= q, "GT": p > q, "GE": p >= q, "EQ": p == q, "NE": p != q}[relation]
        w.set(first, _joined(join, r, c(w)))
        if second not in ("PT", "UPT"):
            w.set(second, _joined(join, inverted(r), c(w)))

    return act


def _joined(join: str, r: Value, c: Value) -> Value:
    if join == "XOR":
        return None if r is None or c is None else r ^ c
    return both(r, c) if join == "AND" else either(r, c)


def choose(i: Instruction) -> Act:
    out, wide = i.operands[0], "64" in i.parts
    a, b, p = reader(i.operands[1], wide), reader(i.operands[2], wide), predicate(i.operands[3])
    return lambda w: w.put(out, select(p(w), a(w), b(w)), wide)


def smaller(i: Instruction) -> Act:
    """IMNMX and its kin: the smaller where the predicate holds, else the larger; VIADDMNMX adds the first two."""
    _, (out, *sources), ins = split(i)
    reads, least = [reader(s) for s in sources], predicate(ins[-1]) if ins else constant(True)
    flip, adds = 0 if "U32" in i.parts else HIGH, i.head.startswith("VIADD")

    def act(w: Warp) -> None:
        values, p = [r(w) for r in reads], least(w)
        if p is None or any(v is None for v in values):
            w.put(out, None)
            return
        if adds:
            values = [values[0] + values[1] & M32, *values[2:]]
        t = values[0] ^ flip
        for v in values[1:]:
            u = v ^ flip
            t = select(p, np.minimum(t, u), np.maximum(t, u))
        t = t ^ flip
        w.put(out, t if isinstance(t, np.ndarray) and t.ndim else int(t))

    return act


def permute(i: Instruction) -> Act:
    """PRMT: bytes of two registers by the digits of a selector."""
    _, (out, a, chosen, b), _ = split(i)
    x, s, y = reader(a), reader(chosen), reader(b)

    def act(w: Warp) -> None:
        digits = s(w)
        if not isinstance(digits, int) or len(i.parts) > 1:
            w.put(out, None)
            return
        wanted = [digits >> 4 * k & 15 for k in range(4)]
        p, q = (0 if all(d & 4 for d in wanted) else x(w)), (0 if not any(d & 4 for d in wanted) else y(w))
        if p is None or q is None:
            w.put(out, None)
            return
        whole, t = p | q << 32, 0
        for k, d in enumerate(wanted):
            byte = whole >> 8 * (d & 7) & 255
            if d & 8:
                byte = (byte >> 7) * 255
            t = t | byte << 8 * k
        w.put(out, t)

    return act


def bits_of(i: Instruction) -> Act:
    """POPC, FLO (the highest bit; SH: how far from the top) and BREV."""
    head, out, source = i.head.lstrip("U"), i.registers()[0], reader(i.registers()[-1])

    def of(v: int) -> int:
        if head == "POPC":
            return v.bit_count()
        if head == "BREV":
            return int(f"{v:032b}"[::-1], 2)
        return M32 if not v else 32 - v.bit_length() if "SH" in i.parts else v.bit_length() - 1

    def act(w: Warp) -> None:
        v = source(w)
        if isinstance(v, np.ndarray):
            w.put(out, np.array([of(int(x)) for x in v], np.uint64))
            return
        w.put(out, None if v is None else of(v))

    return act


def _sign_extend(value: Value, n: Value) -> Value:
    if not isinstance(n, int) or not 0 < n <= 32:
        return value
    v = value & ((1 << n) - 1)
    return (v ^ (1 << n - 1)) + (CARRY - (1 << n - 1)) & M32


def _low_bits(value: Value, n: Value) -> Value:
    return value & ((1 << n) - 1) if isinstance(n, int) else value


def _mask_of_bits(a: Value, n: Value) -> Value:
    return lanes.shifted((1 << n) - 1 if isinstance(n, int) else M32, a, True, 32)


def _absolute(v: Value) -> Value:
    return select(v >= HIGH, (v ^ M32) + 1 & M32, v)


def field(i: Instruction) -> Act:
    """SGXT: the low bits, with the highest of them as the sign unless U32."""
    return simple(i, _low_bits if "U32" in i.parts else _sign_extend)


MEANINGS: dict[str, Callable[[Instruction], Act]] = {
    "IADD3": add, "IADD": add, "VIADD": add, "IMAD": multiply, "LEA": shift_add, "SHF": shift, "LOP3": logic,
    "PLOP3": predicate_logic, "ISETP": compare, "SEL": choose, "FSEL": choose, "IMNMX": smaller, "VIMNMX": smaller,
    "VIMNMX3": smaller, "VIADDMNMX": smaller, "PRMT": permute, "POPC": bits_of, "FLO": bits_of, "BREV": bits_of,
    "IABS": lambda i: simple(i, _absolute), "SGXT": field, "BMSK": lambda i: simple(i, _mask_of_bits),
}  # fmt: skip
