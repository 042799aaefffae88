"""Tensors of more than 2^31 elements whose memory costs nothing, and a few programs of each launch that sees them:
where these read and write is known in Python's integers."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime import interpreter

from normops.kernels.bundles import APPLY, STATISTICS
from normops.plan import cdiv
from normops.testing.accesses import Access, Method, around, around_launches, lanes
from normops.testing.processes import Executor, Programs

FILLED = 0.5
"""What small fresh memory holds: statistics and partial results of programs that do not run."""


MERGES = ("grad_finish", "sum_rows")
"""Kernels that see partial results only, which are never large; of these they take a few."""
FEW = 64


mapped: list[mmap.mmap] = []
"""All that is there, for give_back()."""


def give_back() -> None:
    """Unmap everything, for a process that has mapped this much cannot fork; tensors are not to be touched any more."""
    while mapped:
        mapped.pop().close()


def sparse(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory of which only pages that are touched exist."""
    n = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)  # of Linux
    mapped.append(mmap.mmap(-1, n * dtype.itemsize, flags=flags))
    t = torch.frombuffer(mapped[-1], dtype=dtype)
    if n < 1 << 22:
        t.fill_(FILLED)
    return t.as_strided(tuple(shape), tuple(strides))


class SparseTorch:
    """torch, but large empty tensors cost nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty_like(t: Tensor, **kwargs: Any) -> Tensor:
        form = torch.empty_like(t, **kwargs | {"device": "meta"})
        return form if "device" in kwargs else sparse(form.shape, form.stride(), form.dtype)

    @staticmethod
    def empty_strided(shape: Any, strides: Any, *, dtype: Any, device: Any) -> Tensor:
        return sparse(shape, strides, dtype)


def value(offset: int) -> float:
    """What x and dy hold there: exact in bf16."""
    return (offset * 2654435761 % 251 - 125) / 64


Element = tuple[int, int, int, int]
"""Its m, c, a and s."""


class Model:
    """Where the tiles of a launch lie, in Python's integers: what kernels/tile.py says with the device's."""

    def __init__(self, form: Any, n0: int) -> None:
        self.form = form
        self.sizes = [[n0 if i == 0 and size == 0 else size for i, size in enumerate(axis)] for axis in form.SPACE]
        self.m, self.c, self.a, self.s = (prod(axis) for axis in self.sizes)

    def offsets(self, elements: list[Element], strides: Any) -> list[int]:
        """Where elements lie in an operand."""
        m, c, a, s = ({i: self._along(axis, i, strides) for i in {e[axis] for e in elements}} for axis in range(4))
        return [m[i] + c[j] + a[k] + s[n] for i, j, k, n in elements]

    def _along(self, axis: int, i: int, strides: Any) -> int:
        found, sizes, steps = 0, self.sizes[axis], strides[axis]
        if len(strides) == 5 and axis < 2:
            i //= strides[4][axis]
        for size, step in zip(sizes[:0:-1], steps[:0:-1], strict=True) if len(steps) > 1 else ():
            found, i = found + i % size * step, i // size
        return found + i * steps[0] if steps else found

    def columns(self, block: int) -> list[tuple[int, int]]:
        """(m, c) of a block of groups."""
        f, columns = self.form, self.form.FOLD[1]
        n, limit = (self.m, self.c) if f.ALONG_M else (self.c, self.m)
        start, other = block % cdiv(n, columns) * columns, block // cdiv(n, columns)
        if f.CLAMP_K:
            start = min(start // f.CLAMP_K, (n - columns) // f.CLAMP_K) * f.CLAMP_K
        kept = range(start, min(start + columns, n) if other < limit else start)
        return [(k, other) if f.ALONG_M else (other, k) for k in kept]

    def blocks(self) -> int:
        n, other = (self.m, self.c) if self.form.ALONG_M else (self.c, self.m)
        return cdiv(n, self.form.FOLD[1]) * other

    def tile(self, block: int, block_a: int, s_start: int, tiles: int) -> list[Element]:
        f = self.form
        a = range(block_a * f.WIDTH_A, min((block_a + 1) * f.WIDTH_A, self.a))
        s = range(s_start, min(s_start + tiles * f.WIDTH_S, self.s))
        return [(m, c, i, j) for m, c in self.columns(block) for i in a for j in s]

    def place(self, i: int, steps: int) -> tuple[int, int, int]:
        """Block of groups, block of a, chunk of s."""
        chunks_s = cdiv(self.s, self.form.WIDTH_S * steps)
        chunks = cdiv(self.a, self.form.WIDTH_A) * chunks_s
        block, chunk = divmod(i, self.blocks())[::-1] if self.form.KEPT_FIRST else divmod(i, chunks)
        return block, *divmod(chunk, chunks_s)

    def numbered(self, i: int, steps: int = 1) -> list[Element]:
        block, block_a, chunk_s = self.place(i, steps)
        return self.tile(block, block_a, chunk_s * steps * self.form.WIDTH_S, steps)

    def rows(self, i: int, steps: int) -> list[Element]:
        """Of a program of grad_normalize."""
        f, columns = self.form, self.form.FOLD[1]
        blocks_a = cdiv(self.a, f.WIDTH_A)
        blocks_c = self.c if f.ALONG_M else cdiv(self.c, columns)
        block_a, c, part = i % blocks_a, i // blocks_a % blocks_c, i // blocks_a // blocks_c
        if f.ALONG_M:
            ms, cs = range(part * steps * columns, min((part + 1) * steps * columns, self.m)), range(c, c + 1)
        else:
            ms = range(part * steps, min((part + 1) * steps, self.m))
            cs = range(c * columns, min((c + 1) * columns, self.c))
        a = range(block_a * f.WIDTH_A, min((block_a + 1) * f.WIDTH_A, self.a))
        return [(m, k, i, j) for m in ms for k in cs for i in a for j in range(self.s)]

    def of(self, kernel: str, program: int, programs: int, number: int) -> list[Element]:
        """The elements that a program reads (of the ticket of that number)."""
        if kernel in ("normalize", "grad_group"):
            return self.tile(program, 0, 0, 1)
        if kernel == "grad_normalize":
            return self.rows(program, number)
        if self.form.PHASE == STATISTICS:
            return self.numbered(program, number)
        if self.form.PHASE == APPLY:
            return self.numbered(programs - 1 - program)
        last = programs - number - 1
        return self.numbered(min(program, last)) + self.numbered(max(program - number, 0))


class Sampled:
    """What ran, of a launch."""

    def __init__(self, kernel: str, o: Any, form: Any, model: Model, number: int, programs: int) -> None:
        self.kernel, self.o, self.form, self.model, self.number = kernel, o, form, model, number
        self.grid = programs
        self.elements: list[list[Element]] = []
        """That each of the programs that ran reads."""
        self.programs: list[int] = []
        self.read: dict[int, set[int]] = {}
        self.stored: dict[int, set[int]] = {}


def chosen(programs: int, numel: int) -> list[int]:
    """The first program and the last, and those about which offsets pass 2^31 and 2^32 elements."""
    about = [programs * limit // numel for limit in (1 << 31, 1 << 32) if limit < numel]
    return sorted({0, programs - 1, *(min(p + d, programs - 1) for p in about for d in (0, 1))})


@contextmanager
def sampled(numel: int) -> Iterator[list[Sampled]]:
    """A few programs of every launch inside the block, no integer of which may overflow."""
    found: list[Sampled] = []
    builder = interpreter.interpreter_builder

    def looking(access: Access, original: Method) -> Method:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            addresses, _ = lanes(access, args)
            into = found[-1].read if access.reads else found[-1].stored
            for t in found[-1].o:
                if t is not None and t.numel() == numel:
                    start = t.data_ptr()
                    here = addresses[(addresses >= start) & (addresses < start + t.untyped_storage().nbytes())]
                    into.setdefault(start, set()).update(((here - start) // t.element_size()).tolist())
            return original(self, *args, **kwargs)

        return method

    def launching(original: Method) -> Method:
        def launch(executor: Any, o: Any, n0: int, *scalars: Any, **kwargs: Any) -> None:
            form, name, grid = scalars[-1], executor.fn.__name__, executor.grid[0]
            model = Model(form, n0)
            number = scalars[0] if len(scalars) > 1 else 0
            found.append(Sampled(name, o, form, model, number, grid))
            if name in MERGES:
                scalars = (*(min(n, FEW) for n in scalars[:-1]), form)

            def run(program: Any) -> None:
                builder.set_grid_dim(grid, 1, 1)
                for i in chosen(grid, numel):
                    if name not in (*MERGES, "finish"):
                        elements = model.of(name, i, grid, number)
                        fill(model, o, form, elements)
                        found[-1].elements.append(elements)
                        found[-1].programs.append(i)
                    if o.tickets is not None:
                        o.tickets[0] = i
                        o.tickets[32:] = 1 << 30  # published, all of them
                    builder.set_grid_idx(i, 0, 0)
                    program()

            original(Executor(Programs(executor.fn, run), executor.arg_names, (1,)), o, n0, *scalars, **kwargs)

        return launch

    options = replace(builder.options, debug=True, sanitize_overflow=True)
    with patch.object(builder, "options", options), around_launches(launching), around(looking):
        yield found


def flat(t: Tensor) -> Tensor:
    """All of its storage, from its first element on."""
    n = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    return t.detach().as_strided((n,), (1,))


def fill(model: Model, o: Any, form: Any, elements: list[Element]) -> None:
    for name, strides in (("x", form.X), ("dy", form.DY)):
        if getattr(o, name) is not None:
            at = model.offsets(elements, strides)
            flat(getattr(o, name))[at] = torch.tensor([value(i) for i in at]).to(torch.bfloat16)
