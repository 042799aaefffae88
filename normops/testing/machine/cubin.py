"""Reads from an NVIDIA binary where the parameters of its kernel lie in the constant bank."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_CBANK, _PARAMETER = 0x0A, 0x17
"""Attributes of a kernel: where its parameters begin; number, offset and size of one of them."""


class Place(NamedTuple):
    """Of a parameter, in bytes of the constant bank."""

    offset: int
    size: int


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, number, names = struct.unpack_from("<HHH", elf, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", elf, start + k * size) for k in range(number)]
    table = heads[names][4]
    for name, kind, _, _, offset, length in heads:
        end = elf.index(b"\0", table + name)
        yield elf[table + name : end].decode(), b"" if kind == 8 else elf[offset : offset + length]


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(content):
        form, kind, length = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == 4:  # followed by so many bytes; other forms hold their value in the two bytes of the length
            yield kind, content[at : at + length]
            at += length


def parameters(elf: bytes, kernel: str) -> tuple[Place, ...]:
    """The parameters of a kernel, in order.  Raises ValueError where the file does not tell."""
    content = dict(_sections(elf)).get(f".nv.info.{kernel}")
    if content is None:
        raise ValueError(f"kernel must be one that the binary describes, got {kernel!r}")
    base, found = 0, {}
    for kind, value in _attributes(content):
        if kind == _CBANK:
            base = struct.unpack_from("<IH", value)[1]
        elif kind == _PARAMETER:
            _, number, offset, flags = struct.unpack("<IHHI", value)
            found[number] = Place(offset, flags >> 18)
    return tuple(Place(base + offset, size) for _, (offset, size) in sorted(found.items()))
