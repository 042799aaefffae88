"""Values of the 32 lanes of a warp: an int where all lanes hold the same, an array where they differ, None where the
value depends on data.  Predicates likewise, of bool.  Integers are kept as their 32 bits, without a sign."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

Value = Any
"""int, or array of 32 uint64 below 2**32; None: not known."""
M32, M64 = (1 << 32) - 1, (1 << 64) - 1
HIGH, CARRY = 1 << 31, 1 << 32
LANES = np.arange(32, dtype=np.uint64)


def array(v: Value) -> Any:
    return v if isinstance(v, np.ndarray) else np.full(32, v, dtype=np.bool_ if isinstance(v, bool) else np.uint64)


def extend(v: Value) -> Value:
    """32 bits with a sign -> 64."""
    return ((v ^ HIGH) + (M64 - HIGH + 1)) & M64


def select(p: Value, a: Value, b: Value) -> Value:
    """a where p, else b."""
    if p is None:
        return a if same(a, b) else None
    if isinstance(p, bool):
        return a if p else b
    return None if a is None or b is None else np.where(p, array(a), array(b))


def same(a: Value, b: Value) -> bool:
    if a is b:
        return True
    if a is None or b is None:
        return False
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else bool(a == b)


def inverted(p: Value) -> Value:
    return None if p is None else not p if isinstance(p, bool) else ~p


def settled(p: Value, mask: Value) -> Value:
    """A predicate as a bool where the lanes of the mask agree."""
    if not isinstance(p, np.ndarray):
        return p if p is None else bool(p)
    here = p if mask is True else p[mask]
    return True if here.all() else p if here.any() else False


def both(p: Value, q: Value) -> Value:
    if p is False or q is False:
        return False
    return None if p is None or q is None else q if p is True else p if q is True else p & q


def either(p: Value, q: Value) -> Value:
    return inverted(both(inverted(p), inverted(q)))


def table(lut: int, bits: list[Value], ones: int) -> Value:
    """A function of three operands, bit by bit, by its truth table; known where the unknown ones do not matter."""
    unknown = [i for i, v in enumerate(bits) if v is None]
    results = []
    for guess in product((0, ones), repeat=len(unknown)):
        for i, v in zip(unknown, guess, strict=True):
            bits[i] = v
        a, b, c = bits
        r: Value = 0
        for k in range(8):
            if lut >> k & 1:
                r = r | ((a if k & 4 else a ^ ones) & (b if k & 2 else b ^ ones) & (c if k & 1 else c ^ ones))
        results.append(r)
    return results[0] if all(same(r, results[0]) for r in results[1:]) else None


def shifted(v: Value, by: Value, left: bool, bits: int = 64) -> Value:
    """v << by or v >> by within so many bits; 0 beyond them."""
    if isinstance(v, np.ndarray) or isinstance(by, np.ndarray):
        v, by = array(v), array(by)
        near = np.minimum(by, np.uint64(63))
        v = np.where(by < bits, v << near if left else v >> near, np.uint64(0))
    else:
        v = 0 if by >= bits else v << by if left else v >> by
    return v & ((1 << bits) - 1)


def shifted_signed(v: Value, by: Value, bits: int) -> Value:
    """v >> by, filled with its sign."""
    sign = 1 << (bits - 1)
    if isinstance(v, np.ndarray) or isinstance(by, np.ndarray):
        v = array(extend(v) if bits == 32 else v).view(np.int64)
        return (v >> np.minimum(array(by), np.uint64(bits - 1)).astype(np.int64)).view(np.uint64) & ((1 << bits) - 1)
    return ((v ^ sign) - sign >> min(by, bits - 1)) & ((1 << bits) - 1)


def floats(v: Value) -> Any:
    return array(v).astype(np.uint32).view(np.float32)


def from_floats(f: Any) -> Any:
    return np.asarray(f, np.float32).view(np.uint32).astype(np.uint64)


def integers(f: Any) -> Any:
    """Floats towards zero, as 32 bits."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(f).astype(np.int64).view(np.uint64) & M32


def collapsed(v: Any) -> Value:
    """An array as an int where all lanes agree."""
    return int(v[0]) if isinstance(v, np.ndarray) and (v == v[0]).all() else v
