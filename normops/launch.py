"""What launches a plan: its kernels with the tensors of a call, and the workspace that they share.

Triton comes in here, when a call that runs kernels comes first; see ``calls`` for what a call is.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import compiled, counters
from .kernels import bundles
from .norm import placed
from .plan import Plan

# Tensors and scalars of the two directions, in the order in which Step.launch takes them.
FORWARD = (
    "x", "pre", "sum", "w", "b", "post", "y", "mean", "rstd", "var", "running_mean", "running_var", "saved", "scratch",
    "tickets",
)  # fmt: skip
BACKWARD = (
    "x", "dy", "w", "b", "post", "dsum", "dx", "dpost", "dw", "db", "mean", "rstd", "saved", "scratch", "tickets"
)  # fmt: skip
SCALARS = ("eps", "momentum")

_data_ptr = Tensor.data_ptr


class Step:
    """A plan and what launches it: the first run goes through Triton's binder, later ones call what it compiled."""

    __slots__ = ("_direct", "_offsets", "_present", "_scratch", "_static", "names", "pieces", "plan")

    def __init__(self, plan: Plan, names: tuple[str, ...], saved: tuple[tuple[str, int], ...], empty: Tensor) -> None:
        self.plan = plan
        self.names = names
        self.pieces: dict[str, tuple[str, int, int]] = {}
        """Piece of a workspace -> the tensor it is part of, its first element, its elements."""
        for owner, pieces in (("saved", saved), ("scratch", plan.scratch)):
            starts, elements = placed(pieces)
            self.pieces |= {name: (owner, starts[name], n) for name, n in pieces}
        self._scratch = empty.expand(elements) if elements else None
        self._direct: list[tuple[Any, ...]] = []  # what picks arguments, and what launches: of each kernel
        self._present: Callable[..., tuple[Tensor, ...]] = tuple
        self._offsets: list[tuple[int, int]] = []  # of each piece: the position of its tensor, and bytes
        self._static: tuple[Any, ...] = ()

    def launch(self, tensors: tuple[Tensor | None, ...], scalars: tuple[float, ...], device: int) -> None:
        """Launch everything.  Tensors in the order of the names, None where absent; device: index, -1 for a CPU."""
        try:
            if self._direct and not compiled.hooked():
                values: list[Any] = list(map(_data_ptr, self._present(tensors)))
                bits = 0
                for pointer in values:
                    bits |= pointer
                current, stream = compiled.current()
                # What was compiled takes pointers for multiples of 16, as they were when it was.
                if bits & 15 == 0 and (device == current or device < 0):
                    values += [values[i] + o for i, o in self._offsets]
                    values += scalars
                    values += self._static
                    for pointers, others, grid, run, function, metadata in self._direct:
                        run(grid, 1, 1, stream, function, metadata, None, None, None, pointers(values), *others(values))
                    return
            if device >= 0 and device != torch.cuda.current_device():
                with torch.cuda.device(device):
                    self._bind(tensors, scalars)
            else:
                self._bind(tensors, scalars)
        except BaseException:
            if self.plan.words:
                counters.forget(torch.device("cpu") if device < 0 else torch.device("cuda", device))
            raise

    def workspace(self, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """scratch and tickets"""
        scratch = None if self._scratch is None else torch.empty_like(self._scratch)
        return scratch, counters.words(self.plan.words, like.device) if self.plan.words else None

    def operands(self, tensors: tuple[Tensor | None, ...], scalars: tuple[float, ...]) -> dict[str, Any]:
        """All that launches take, by name."""
        found: dict[str, Any] = dict(zip(self.names, tensors, strict=True)) | dict(zip(SCALARS, scalars, strict=False))
        for name, (owner, start, elements) in self.pieces.items():
            found[name] = found[owner][start : start + elements]
        return found

    def _bind(self, tensors: tuple[Tensor | None, ...], scalars: tuple[float, ...]) -> None:
        """Compile, load and launch.  All kernels are loaded before one is launched: where one cannot be, nothing is
        written."""
        operands = self.operands(tensors, scalars)
        calls = [
            (launch, (
                bundles.Operands(**{name: operands.get(given) for name, given in launch.operands.items()}),
                *(operands[v] if isinstance(v, str) else v for v in launch.scalars),
                launch.form,
            ), {"num_warps": launch.num_warps, "enable_fp_fusion": True})  # the default; Triton 3.9 announces another
            for launch in self.plan.launches
        ]  # fmt: skip
        handles: list[Any] = [None]
        if not compiled.INTERPRETED:
            handles = [compiled.loaded(one.kernel, one.grid, *given, **options) for one, given, options in calls]
        for one, given, options in calls:
            one.kernel[(one.grid,)](*given, **options)
        if None not in handles and all(t is None or t.data_ptr() % 16 == 0 for t in tensors):
            self._keep(handles, tensors, len(scalars))

    def _keep(self, handles: list[compiled.Handle], tensors: tuple[Tensor | None, ...], scalars: int) -> None:
        """Write down where each argument of each kernel stands among tensors, pieces, scalars and constants."""
        present = {name: t.element_size() for name, t in zip(self.names, tensors, strict=True) if t is not None}
        place = {name: i for i, name in enumerate((*present, *self.pieces, *SCALARS[:scalars]))}
        static: list[Any] = [None]

        def constant(value: Any) -> int:
            static.append(value)
            return len(place) + len(static) - 1

        direct: list[tuple[Any, ...]] = []
        for launch, handle in zip(self.plan.launches, handles, strict=True):
            nothing = len(place)  # past the last place: None
            names = (launch.operands.get(name, "") for name in bundles.Operands._fields)
            pointers = itemgetter(*(place.get(name, nothing) for name in names))
            scalars_at = (place[v] if isinstance(v, str) else constant(v) for v in launch.scalars)
            others = itemgetter(*scalars_at, constant(launch.form))
            direct.append((pointers, others, launch.grid, *handle))
        self._offsets = [(place[owner], start * present[owner]) for owner, start, _ in self.pieces.values()]
        self._present = itemgetter(*(i for i, t in enumerate(tensors) if t is not None))
        self._static = tuple(static)
        self._direct = direct  # last: another thread may be waiting to use it
