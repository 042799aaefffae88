"""A compiled kernel, and what its machine code says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget

from . import amdgcn, ptx

_STORED_TILE = re.compile(
    r"async_tma_(?:copy_local_to_global|reduce|scatter).*!ttg\.memdesc<([\dx]+)[a-z]+(\d+)[^,]*, (#\w+)"
)
_SWIZZLED = re.compile(r"(#\w+) = #ttg\.nvmma_shared<\{swizzlingByteWidth = (\d+), transposed = (\w+)")


class Parameter(NamedTuple):
    """A parameter of the compiled kernel: the argument that it belongs to (a tuple has several; of a NamedTuple each
    field is one)."""

    argument: str
    pointer: bool
    rank: int = 0
    """Of a tensor descriptor, which is passed in several pieces; 0: something else."""


class Usage(NamedTuple):
    """Per thread."""

    registers: int
    stack: int
    spills: int


@dataclass(frozen=True, eq=False)
class Binary:
    """A compiled kernel; launches of one kernel share it, and with it whatever was once read out of its code."""

    name: str
    target: GPUTarget
    asm: Mapping[str, Any]
    shared: int
    num_warps: int
    num_ctas: int
    parameters: tuple[Parameter, ...]

    @property
    def _text(self) -> str:
        text: str = self.asm["ptx" if self.target.backend == "cuda" else "amdgcn"]
        return text

    def cuobjdump(self, option: str) -> str:
        """What NVIDIA's cuobjdump says of the machine code: "-sass", "-res-usage", ..."""
        return self._ask(knobs.nvidia.cuobjdump.path, option)

    def _ask(self, *command: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

    @cached_property
    def lines(self) -> dict[int, str]:
        """Address of an instruction -> file and line of the source that it was compiled from."""
        text = self._ask(knobs.nvidia.nvdisasm.path, "-g", "-c")
        found, line = {}, ""
        mine = text.partition(f".text.{self.name}:")[2]
        for m in re.finditer(r'//## File "([^"]*)", line (\d+)|^\s+/\*([0-9a-f]{4,})\*/|^\.text\.', mine, flags=re.M):
            if m[1]:
                line = f"{os.path.basename(m[1])}:{m[2]}"
            elif m[3]:
                found[int(m[3], 16)] = line
            else:
                break  # another function
        return found

    def _cubin_usage(self) -> Usage:
        out = self.cuobjdump("-res-usage")
        # One line per function: the kernel's own, and those of functions that it calls.
        for name, line in re.findall(r"Function (\S+):\s*\n?([^\n]*)", out):
            if name == self.name:
                found = {key: int(n) for key, n in re.findall(r"\b([A-Z]+):(\d+)", line)}
                stack = found["STACK"] + found["LOCAL"]
                return Usage(found["REG"], stack, max(0, stack - ptx.arrays(self._text)))
        raise RuntimeError(f"cuobjdump does not list {self.name}: {out}")

    @cached_property
    def usage(self) -> Usage:
        if self.target.backend == "cuda":
            return self._cubin_usage()
        counts = {n: amdgcn.figure(self._text, n) for n in ("vgpr_count", "private_segment_fixed_size")}
        spilled = 4 * amdgcn.figure(self._text, "vgpr_spill_count")
        return Usage(counts["vgpr_count"], counts["private_segment_fixed_size"], spilled)

    @cached_property
    def threads(self) -> int:
        """Threads of a program: more than num_warps has where warps are specialised."""
        if self.target.backend == "cuda" and (found := ptx.threads(self._text)):
            return found
        return self.num_warps * int(self.target.warp_size)

    @cached_property
    def barriers(self) -> int:
        return ptx.barriers(self._text) if self.target.backend == "cuda" else amdgcn.barriers(self._text)

    @cached_property
    def atomics(self) -> int:
        return ptx.atomics(self._text) if self.target.backend == "cuda" else amdgcn.atomics(self._text)

    @cached_property
    def tiles(self) -> frozenset[int]:
        """Bytes that a bulk copy (TMA) stores; more than one number where they cannot be told apart.

        A copy takes at most 256 elements along an axis, and of contiguous ones what is swizzled together.
        """
        text = self.asm.get("ttgir", "")
        layouts = {m[1]: (int(m[2]), m[3] == "true") for m in _SWIZZLED.finditer(text)}
        found = set()
        for shape, bits, layout in _STORED_TILE.findall(text):
            *sizes, last = (min(256, int(n)) for n in shape.split("x") if n)
            width, transposed = layouts.get(layout, (0, False))
            if transposed and sizes:
                sizes[-1], last = last, sizes[-1]
            whole = last * int(bits) // 8
            found.add(prod(sizes) * (min(whole, width) if width else whole))
        return frozenset(found)

    @cached_property
    def _ptx_accesses(self) -> tuple[ptx.Access, ...]:
        pointers = frozenset(i for i, p in enumerate(self.parameters) if p.pointer)
        return ptx.accesses(self._text, pointers)

    def accesses(
        self, argument: str | None = None, without: frozenset[str] = frozenset()
    ) -> dict[tuple[str, int], int]:
        """See VirtualLaunch.accesses; `without`: lines of the source, as "file:line", whose accesses do not count."""
        if without and self.target.backend != "cuda":
            raise NotImplementedError("lines of accesses are known on NVIDIA only: leave without out")
        if argument is None:
            if self.target.backend != "cuda":
                return dict(Counter(amdgcn.accesses(self._text)))
            return dict(Counter((a.kind, a.bits) for a in self._ptx_accesses if not a.lines & without))
        if self.target.backend != "cuda":
            raise NotImplementedError("accesses of one argument are told apart on NVIDIA only: leave argument out")
        if any(p.rank for p in self.parameters):
            raise NotImplementedError("accesses of one argument are not told apart in kernels with tensor descriptors")
        mine = {i for i, p in enumerate(self.parameters) if p.pointer and p.argument == argument}
        found = (a for a in self._ptx_accesses if a.parameters & mine and not a.lines & without)
        return dict(Counter((a.kind, a.bits) for a in found))
