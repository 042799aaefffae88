"""What shapes, strides and dtypes decide about a call: checked and planned when it comes first, looked up ever after.

The only file that allocates; what is launched is decided in ``plan``, thresholds live in ``schedule``.  Kernels and
Triton are imported when a call needs them: tensors of a CPU need neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from . import faults, native, schedule
from .activations import Act
from .gpus import H200, Device
from .layout import follows, split
from .norm import Needs, Norm, Operands, accumulator, laid_out, placed
from .rules import Rule, norm_of

if TYPE_CHECKING:
    from .launch import Step

Strides = tuple[int, ...]

KNOWN = 4096
"""Calls that are remembered; one more, and all are forgotten."""
STEPS = 64
"""Steps that a call remembers likewise: by the strides of gradients."""


def _triton() -> tuple[bool, ImportError | None]:
    """Whether kernels are interpreted, and what is missing for any to run."""
    if find_spec("triton") is None:  # there is none for some systems, where CPU tensors are all there is
        return False, ModuleNotFoundError("expected the package triton", name="triton")
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 5):
        return False, ImportError(f"expected triton >= 3.5, found {triton.__version__}", name="triton")
    from .compiled import INTERPRETED

    if INTERPRETED and version < (3, 7):
        import numpy

        if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
            return True, ImportError(
                f"expected numpy < 2.4, for the interpreter of triton {triton.__version__} knows no later one, "
                f"found {numpy.__version__}", name="numpy",
            )  # fmt: skip
    return INTERPRETED, None


INTERPRETED, MISSING = _triton()
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
    """CUDA tensors run the Triton kernels, CPU tensors only in Triton's interpreter (or where they stand in).

    ImportError where Triton is missing, or is too old."""
    wanted = x.device.type == "cuda" or (x.device.type == "cpu" and (INTERPRETED or _stand_in is not None))
    if wanted and MISSING is not None:
        error = type(MISSING)(f"normops runs its kernels with Triton: {MISSING}", name=MISSING.name)
        if not faults.falling_back:
            raise error
        faults.warn(error)
    return wanted and MISSING is None


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """CPU tensors take the way of tensors on this device; a driver of Triton's must be there to compile and launch."""
    global _stand_in
    before, _stand_in = _stand_in, device
    known.clear()  # they hold plans for, and kernels of, the device before
    try:
        yield
    finally:
        _stand_in = before
        known.clear()


class Call:
    """What shapes, strides and dtypes decide about a call: made once, looked up ever after."""

    def __init__(self, norm: Norm, operands: Operands, out_dtype: torch.dtype | None) -> None:
        laid = laid_out(norm, operands)
        x, weight, bias, pre_add, post_add, running_mean, _ = laid
        self.norm = norm
        self.ready = all(a is b for a, b in zip(operands, laid, strict=True))
        """Whether operands come as kernels take them, see :func:`laid_out`."""
        self.kernels = x.numel() > 0 and uses_kernels(x)
        self.native = False
        """Whether PyTorch has a function for what no kernel runs, see ``native``."""
        self.shape = x.shape
        self.order = torch.empty_like(x, device="meta").stride()
        """Strides of y."""
        self.plain = norm.activation == "identity"
        self.tracks = running_mean is not None and not norm.given and running_mean.shape == norm.kept_shape
        """Whether kernels move running statistics: those of BatchNorm."""
        self.dtypes = tuple(None if t is None else t.dtype for t in (x, pre_add, post_add))
        self.sum_dtype = x.dtype if pre_add is None else torch.result_type(x, pre_add)
        self.acc = accumulator(x.dtype, self.sum_dtype)
        self.weights = None if weight is None and bias is None else norm.weight_strides
        self.facts = schedule.limits(), device_facts(x.device)
        self.x, self.pre, self.post = (None if t is None else t.stride() for t in (x, pre_add, post_add))
        self.itemsize = x.dtype.itemsize
        self.copied = not all(self._follows(s) for s in (self.x, self.pre, self.post))
        self.out_dtype = None if out_dtype == x.dtype else out_dtype
        """The dtype of y, where it is not x's."""
        self.eager: Step | None = None
        """The step of a forward that leaves "saved", once it was planned: of almost every call."""
        self._forward: dict[Any, Step] = {}
        self._backward: dict[Any, Step] = {}

        starts, elements = placed(norm.statistics)
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

    def _step_forward(self, saved: bool, apart: bool) -> Step:
        """`saved`: mean and rstd are, or come, in one tensor; `apart`: in two.  Else they come as mean and var."""
        step = self._forward.get((saved, apart))
        if step is None:
            from .launch import FORWARD, Step
            from .plan_forward import plan_forward
            from .views import Shapes

            given = self.norm.given
            summed = self.pre is not None and not given
            total = self._operand(self.order) if self.pre is not None else None
            shapes = Shapes(split(self.order, self.norm.factors), (
                ("X", total if self.pre is not None and given else self._operand(self.x)),
                ("PRE", self._operand(self.pre) if summed else None), ("SUM", total if summed else None),
                ("W", self.weights), ("POST", self._operand(self.post)), ("Y", self._operand(self.order)),
            ))  # fmt: skip
            form = "" if not given else "rstd" if saved or apart else "var"
            plan = plan_forward(self.norm, shapes, self.itemsize, self.acc, form, *self.facts)
            step = self._forward[saved, apart] = Step(plan, FORWARD, self.norm.statistics if saved else (), self.empty)
            if saved:
                self.eager = step
        return step

    def _step_backward(self, needs: Needs, dy: Tensor, dsum: Tensor | None, apart: bool) -> Step:
        key = (needs, dy.stride(), dy.dtype, None if dsum is None else (dsum.stride(), dsum.dtype), apart)
        step = self._backward.get(key)
        if step is None:
            from .launch import BACKWARD, Step
            from .plan_backward import plan_backward
            from .views import Shapes

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
            if len(self._backward) >= STEPS:
                self._backward.clear()
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
        try:
            step = self.eager if saved is not None else None
            if step is None:
                step = self._step_forward(saved is not None, apart is not None)
            step.launch(
                (source, pre, None if pre is None else total, w, b, post, y, mean, rstd, var, running_mean,
                 running_var, saved, *step.workspace(x)), (eps, momentum), x.get_device(),
            )  # fmt: skip
        except Exception as error:
            self._fail(error)
        return y, total, saved

    def backward(
        self, kept: tuple[Any, ...], dy: Tensor, dsum: Tensor | None, needs: Needs,
        apart: tuple[Tensor | None, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """-> dx, dw, db, dpost, each None where not needed.

        kept: what was normalised, weight, bias, post_add, saved; mean and rstd come in the last, or `apart`."""
        x, w, b, post, saved = kept
        need_dx, need_dw, need_db, need_dpost = needs
        try:
            step = self._step_backward(needs, dy, dsum, apart is not None)
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
        except Exception as error:
            self._fail(error)
        return dx, dw, db, dpost

    def _fail(self, error: Exception) -> NoReturn:
        """A KernelError that names the call; the interpreter's own errors stay."""
        if INTERPRETED:
            raise error
        what = f"{self.norm.written[0]!r} of x of shape {tuple(self.shape)} and {self.dtypes[0]}"
        raise faults.error_of(f"{what} on {self.facts[1].name}", error) from error

    def fall_back(self, error: faults.KernelError) -> None:
        """No more kernels of this call, where ``fallback`` is on; else the error."""
        if not faults.falling_back:
            raise error
        faults.warn(error)
        self.kernels = False


def _aligned(t: Tensor | None, like: Tensor) -> Tensor | None:
    """t itself, or a copy in like's memory format where t walks memory in another order (or overlaps itself)."""
    if t is None or t.stride() == like.stride() or follows(t.stride(), like.stride(), like.shape):
        return t
    return torch.empty_like(like, dtype=t.dtype).copy_(t.detach())


known: dict[Any, Call] = {}
"""Calls by all that decides them, ``schedule.limits()`` among it."""
faults.changed.append(known.clear)

# Where an operand is: a number is hashed faster than a device.  It does not tell the meta device from a CPU, which
# matters where PyTorch's own checks do not see what is read: in the interpreter.
_place = attrgetter("device") if INTERPRETED else Tensor.get_device

PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
"""Types whose memory kernels may be given; others (fake, distributed, wrapped tensors) mean something else by it, and
so does a tensor with the negative bit (the imaginary part of a conjugate)."""


def find(
    operands: Operands, rule: Rule, arguments: tuple[Any, ...], activation: Act, out_dtype: torch.dtype | None
) -> Call | None:
    """The call that these operands make; None where they are no plain tensors.  Where it was not met before, it is
    checked first."""
    key: Any
    try:
        key = (
            rule, arguments, activation, out_dtype, schedule.limits(), operands.x.device,
            *[t if t is None else (t.shape, t.stride(), t.dtype, _place(t), t.__class__, t.is_neg()) for t in operands],
            operands.running_mean is not None and any(t.requires_grad for t in operands[5:] if t is not None),
        )  # fmt: skip
        found = known.get(key)
        # Without kernels a place may be the meta device's, see above.
        if found is not None and (found.kernels or not any(t is not None and t.is_meta for t in operands)):
            return found
    except (AttributeError, TypeError, RuntimeError):  # no tensor, or a nested one, or nothing to hash: checks say it
        key = None
    if any(t is not None and (type(t) not in PLAIN or t.is_neg()) for t in operands):
        return None
    call = Call(norm_of(operands, rule, arguments, activation, out_dtype), operands, out_dtype)
    call.native = not call.kernels and native.suitable(rule, call.norm, operands, out_dtype)
    if key is not None:
        if len(known) >= KNOWN:
            known.clear()
        known[key] = call
    return call
