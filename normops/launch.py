"""From tensors to launches: allocates outputs and workspace, and runs the plan of a call.

The only file that allocates and launches; what is launched is decided in ``plan``, thresholds live in ``schedule``.
All that shapes, strides and dtypes decide is decided once and kept in a ``Call``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from . import compiled, counters, schedule
from .gpus import H200, Device
from .kernels import bundles
from .layout import follows, split
from .norm import Norm, Operands, laid_out
from .plan import Plan, accumulator, weight_strides
from .plan_backward import Needs, plan_backward
from .plan_forward import plan_forward
from .views import Shapes

INTERPRETED = compiled.INTERPRETED

# Tensors and scalars of the two directions, in the order in which Step.launch takes them.
FORWARD = (
    "x", "pre", "sum", "w", "b", "post", "y", "mean", "rstd", "var", "running_mean", "running_var", "saved", "scratch",
    "tickets",
)  # fmt: skip
BACKWARD = (
    "x", "dy", "w", "b", "post", "dsum", "dx", "dpost", "dw", "db", "mean", "rstd", "saved", "scratch", "tickets"
)  # fmt: skip
SCALARS = ("eps", "momentum")

PIECE = 32
"""Pieces of a workspace start at multiples of this many elements: aligned alike, whatever the shape."""
CALLS = 4096
"""Calls that are remembered; one more, and all are forgotten."""

_data_ptr = Tensor.data_ptr

Strides = tuple[int, ...]


_IN_INTERPRETER = replace(H200, ptx=False)
_stand_in: Device | None = None
"""The device that CPU tensors are planned for and compiled for, see :func:`standing_in`."""


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    shared = 0 if torch.version.hip else properties.L2_cache_size  # AMD's dies have an L2 each
    capability = (properties.major, properties.minor)
    return Device(properties.name, properties.multi_processor_count, capability, shared, not torch.version.hip)


def device_facts(device: torch.device) -> Device:
    return _properties(device) if device.type == "cuda" else _stand_in or _IN_INTERPRETER


def uses_kernels(x: Tensor) -> bool:
    """CUDA tensors run the Triton kernels, CPU tensors only in Triton's interpreter (or where they stand in)."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and (INTERPRETED or _stand_in is not None))


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """CPU tensors take the way of tensors on this device; a driver of Triton's must be there to compile and launch."""
    global _stand_in
    before, _stand_in = _stand_in, device
    calls.clear()  # they hold plans for, and kernels of, the device before
    try:
        yield
    finally:
        _stand_in = before
        calls.clear()


def _placed(pieces: tuple[tuple[str, int], ...]) -> tuple[dict[str, int], int]:
    """Where each piece of a workspace starts, and the elements of all of them."""
    starts, end = {}, 0
    for name, elements in pieces:
        starts[name] = end
        end += -(-elements // PIECE) * PIECE
    return starts, end


class Step:
    """A plan and what launches it: the first run goes through Triton's binder, later ones call what it compiled."""

    __slots__ = ("_direct", "_offsets", "_present", "_scratch", "_static", "names", "pieces", "plan")

    def __init__(self, plan: Plan, names: tuple[str, ...], saved: tuple[tuple[str, int], ...], empty: Tensor) -> None:
        self.plan = plan
        self.names = names
        self.pieces: dict[str, tuple[str, int, int]] = {}
        """Piece of a workspace -> the tensor it is part of, its first element, its elements."""
        for owner, pieces in (("saved", saved), ("scratch", plan.scratch)):
            starts, elements = _placed(pieces)
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
        operands = self.operands(tensors, scalars)
        kernels = [
            launch.kernel[(launch.grid,)](
                bundles.Operands(**{name: operands.get(given) for name, given in launch.operands.items()}),
                *(operands[v] if isinstance(v, str) else v for v in launch.scalars),
                launch.form,
                num_warps=launch.num_warps,
                enable_fp_fusion=True,  # the default so far; Triton 3.9 announces another
            )
            for launch in self.plan.launches
        ]
        handles = [compiled.handle(kernel) for kernel in kernels]
        if None not in handles and all(t is None or t.data_ptr() % 16 == 0 for t in tensors):
            self._keep(handles, tensors, len(scalars))  # type: ignore[arg-type]

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


class Call:
    """What shapes, strides and dtypes decide about a call: made once, looked up ever after."""

    def __init__(self, norm: Norm, operands: Operands, out_dtype: torch.dtype | None) -> None:
        laid = laid_out(norm, operands)
        x, weight, bias, pre_add, post_add, running_mean, _ = laid
        self.norm = norm
        self.ready = all(a is b for a, b in zip(operands, laid, strict=True))
        """Whether operands come as kernels take them, see :func:`laid_out`."""
        self.kernels = x.numel() > 0 and uses_kernels(x)
        self.shape = x.shape
        self.order = torch.empty_like(x, device="meta").stride()
        """Strides of y."""
        self.plain = norm.activation == "identity"
        self.tracks = running_mean is not None and not norm.given and running_mean.shape == norm.kept_shape
        """Whether kernels move running statistics: those of BatchNorm."""
        self.dtypes = tuple(None if t is None else t.dtype for t in (x, pre_add, post_add))
        self.sum_dtype = x.dtype if pre_add is None else torch.result_type(x, pre_add)
        self.acc = accumulator(x.dtype, self.sum_dtype)
        self.weights = None if weight is None and bias is None else weight_strides(norm)
        self.facts = schedule.limits(), device_facts(x.device)
        self.x, self.pre, self.post = (None if t is None else t.stride() for t in (x, pre_add, post_add))
        self.copied = not all(self._follows(s) for s in (self.x, self.pre, self.post))
        self.out_dtype = None if out_dtype == x.dtype else out_dtype
        """The dtype of y, where it is not x's."""
        self.eager: Step | None = None
        """The step of a forward that leaves "saved", once it was planned: of almost every call."""
        self._forward: dict[Any, Step] = {}
        self._backward: dict[Any, Step] = {}

        starts, elements = _placed(norm.statistics)
        self.rstd_at = starts["rstd"]
        self.empty = torch.empty(1, dtype=self.acc, device=x.device)
        self.saved = self.empty.expand(elements)
        """What statistics are saved in has this form: empty_like asks the host for less than empty does."""
        self.kept_shape, self.kept_strides = norm.kept_shape, norm.kept_strides(self.order)

    def _follows(self, strides: Strides | None) -> bool:
        return strides is None or strides == self.order or follows(strides, self.order, self.shape)

    def restrided(
        self, total: Tensor, w: Tensor | None, b: Tensor | None, post: Tensor | None, saved: Tensor
    ) -> bool:
        """Whether a hook on saved tensors gave back one that lies in memory otherwise than the one it was given."""
        return not (
            total.stride() == (self.x if self.pre is None else self.order)
            and (w is None or w.is_contiguous()) and (b is None or b.is_contiguous()) and saved.is_contiguous()
            and (post is None or post.stride() == self.post)
        )  # fmt: skip

    def _operand(self, strides: Strides | None) -> Strides | None:
        """Strides in the split shape, of the copy where one is made."""
        return None if strides is None else split(strides if self._follows(strides) else self.order, self.norm.factors)

    def statistic(self, like: Tensor) -> Tensor:
        """Room for mean or rstd of its own, in the order in which kernels write it."""
        return torch.empty_strided(self.kept_shape, self.kept_strides, dtype=self.acc, device=like.device)

    def statistics(self, saved: Tensor) -> tuple[Tensor | None, Tensor]:
        """mean (None for RMS) and rstd that a forward left in `saved`."""
        mean = saved.as_strided(self.kept_shape, self.kept_strides) if self.norm.center else None
        return mean, saved[self.rstd_at :].as_strided(self.kept_shape, self.kept_strides)

    def _plan_forward(self, saved: bool, apart: bool) -> Step:
        """`saved`: mean and rstd are, or come, in one tensor; `apart`: in two.  Else they come as mean and var."""
        step = self._forward.get((saved, apart))
        if step is None:
            given = self.norm.given
            summed = self.pre is not None and not given
            total = self._operand(self.order) if self.pre is not None else None
            shapes = Shapes(split(self.order, self.norm.factors), (
                ("X", total if self.pre is not None and given else self._operand(self.x)),
                ("PRE", self._operand(self.pre) if summed else None), ("SUM", total if summed else None),
                ("W", self.weights), ("POST", self._operand(self.post)), ("Y", self._operand(self.order)),
            ))  # fmt: skip
            form = "" if not given else "rstd" if saved or apart else "var"
            itemsize = self.dtypes[0].itemsize  # type: ignore[union-attr]
            plan = plan_forward(self.norm, shapes, itemsize, self.acc, form, *self.facts)
            step = self._forward[saved, apart] = Step(plan, FORWARD, self.norm.statistics if saved else (), self.empty)
            if saved:
                self.eager = step
        return step

    def _plan_backward(self, needs: Needs, dy: Tensor, dsum: Tensor | None, apart: bool) -> Step:
        key = (needs, dy.stride(), dy.dtype, None if dsum is None else (dsum.stride(), dsum.dtype), apart)
        step = self._backward.get(key)
        if step is None:
            order = self._operand(self.order)
            assert order is not None
            shapes = Shapes(order, (
                ("X", order if self.pre is not None else self._operand(self.x)), ("DY", self._operand(dy.stride())),
                ("W", self.weights), ("POST", None if self.plain else self._operand(self.post)),
                ("DSUM", None if dsum is None else self._operand(dsum.stride())),
                ("DX", order if needs[0] else None), ("DPOST", order if needs[3] else None),
            ))  # fmt: skip
            itemsize, given = self.sum_dtype.itemsize, self.norm.given
            plan = plan_backward(self.norm, shapes, itemsize, self.acc, given, needs, *self.facts)
            step = self._backward[key] = Step(plan, BACKWARD, () if apart else self.norm.statistics, self.empty)
        return step

    def forward(
        self, operands: Operands, eps: float, momentum: float = 0.0, keep: bool = False,
        apart: tuple[Tensor | None, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:  # fmt: skip
        """-> y, x + pre_add (None without), saved: mean and rstd, ``norm.statistics`` one after the other.

        Given statistics are put into saved only to `keep` them for a backward.  `apart`: mean and rstd, each a tensor
        as of `statistic`, to write to, or given; nothing is saved then.
        """
        x, w, b, pre, post, running_mean, running_var = operands
        y = torch.empty_like(x) if self.out_dtype is None else torch.empty_like(x, dtype=self.out_dtype)
        source, total = x, None
        if pre is not None:
            total = torch.empty_like(x, dtype=self.sum_dtype)
            if self.norm.given:
                source, pre = torch.add(x.detach(), pre.detach(), out=total), None
        if self.copied:
            source, pre, post = _aligned(source, y), _aligned(pre, y), _aligned(post, y)  # type: ignore[assignment]
        mean = rstd = var = saved = None
        if apart is not None:
            mean, rstd = apart
        elif keep or not self.norm.given:
            saved = torch.empty_like(self.saved)
        if self.norm.given and apart is None:
            mean, var = running_mean.contiguous(), running_var.contiguous()  # type: ignore[union-attr]
            if saved is not None:  # a copy: running statistics may move on before the backward
                saved[: mean.numel()].copy_(mean)
                torch.rsqrt(var.to(self.acc) + eps, out=saved[self.rstd_at :][: mean.numel()])
                mean = var = None
        if not self.tracks:
            running_mean = running_var = None
        step = self.eager if saved is not None else None
        if step is None:
            step = self._plan_forward(saved is not None, apart is not None)
        step.launch(
            (source, pre, None if pre is None else total, w, b, post, y, mean, rstd, var, running_mean, running_var,
             saved, *step.workspace(x)), (eps, momentum), x.get_device(),
        )  # fmt: skip
        return y, total, saved

    def backward(
        self, kept: tuple[Any, ...], dy: Tensor, dsum: Tensor | None, needs: Needs,
        apart: tuple[Tensor | None, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """-> dx, dw, db, dpost, each None where not needed.

        kept: what was normalised, weight, bias, post_add, saved; mean and rstd come in the last, or `apart`."""
        x, w, b, post, saved = kept
        step = self._plan_backward(needs, dy, dsum, apart is not None)
        need_dx, need_dw, need_db, need_dpost = needs
        dx = torch.empty_like(x) if need_dx else None
        dpost = torch.empty_like(x, dtype=post.dtype) if need_dpost and post is not None else None
        dw = torch.empty_like(w) if need_dw and w is not None else None
        db = torch.empty_like(b) if need_db and b is not None else None
        if self.copied or not (dy.stride() == self.order and dsum is None):
            like = dx if dx is not None else torch.empty_like(x)
            x, dy, dsum, post = (_aligned(t, like) for t in (x, dy, dsum, post))  # type: ignore[assignment]
        mean, rstd = apart or (None, None)
        step.launch(
            (x, dy, w, b, post, dsum, dx, dpost, dw, db, mean, rstd, saved, *step.workspace(x)), (),
            x.get_device(),
        )  # fmt: skip
        return dx, dw, db, dpost


calls: dict[Any, Call] = {}
"""Calls by all that decides them, ``schedule.limits()`` among it."""


def _aligned(t: Tensor | None, like: Tensor) -> Tensor | None:
    """t itself, or a copy in like's memory format where t walks memory in another order (or overlaps itself)."""
    if t is None or t.stride() == like.stride() or follows(t.stride(), like.stride(), like.shape):
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t.detach())
