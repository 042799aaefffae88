"""One call of a case: its inputs, normops' way, and torch's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import inf, nextafter, sqrt
from zlib import crc32

import torch
import torch.nn.functional as TF
from torch import Tensor

import normops
from normops.activations import ACTIVATIONS

from .cases import Case

EPS, MOMENTUM = 1e-5, 0.1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
"""Where the derivative of an activation jumps."""
LEAVES = ("x", "weight", "bias", "pre_add", "post_add")
Inputs = dict[str, Tensor | None]
Outputs = tuple[Tensor, ...]


def statistic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_inputs(
    case: Case,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    seed: int = 0,
    empty: bool = False,
) -> Inputs:
    """Random operands, gradients of the outputs (dy, and dsum of x + pre_add) and running statistics.

    Parameters of BatchNorm and InstanceNorm are kept in the precision of the statistics, as in mixed precision
    training; those of other norms have x's dtype.  `empty`: on the CPU and without values, so that tensors of any size
    cost nothing, for memory that is never touched is never there.
    """
    device = "cuda" if torch.cuda.is_available() and not empty else "cpu"
    generator = torch.Generator(device).manual_seed(crc32(case.name.encode()) + seed)

    def random(shape: tuple[int, ...], scale: float, shift: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
        if empty:
            return torch.empty(shape, dtype=dtype)
        return torch.randn(shape, generator=generator, device=device).mul_(scale).add_(shift).to(dtype)

    def like_x(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        if empty:
            return torch.empty(shape, dtype=dtype, memory_format=memory_format)
        return random(shape, scale, shift).contiguous(memory_format=memory_format)

    wide = case.norm.startswith(("batch", "instance"))
    parameters = {"layer": shape[-case.dims :], "rms": shape[-case.dims :], "adaln": (shape[0], 1, shape[-1])}
    parameter, kept = parameters.get(case.norm, (shape[1],)), statistic(dtype)
    inputs: Inputs = {
        "x": like_x(2.0, 1.0),
        "weight": random(parameter, 0.3, 1.0, kept if wide else dtype),
        "bias": None if case.norm == "rms" else random(parameter, 0.3, 0.1, kept if wide else dtype),
        "pre_add": like_x() if case.pre_add else None,
        "post_add": like_x() if case.post_add else None,
        "dy": like_x(),
        "dsum": like_x() if case.pre_add else None,
        "running_mean": random(parameter, 0.3, 1.0, kept) if "batch" in case.norm else None,
        "running_var": random(parameter, 0.3, 4.0, kept).abs() if "batch" in case.norm else None,
    }
    for name in LEAVES:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    return inputs


def by_normops(case: Case, i: Inputs) -> Outputs:
    F, x, w, b = normops.functional, i["x"], i["weight"], i["bias"]
    extras = {"activation": case.activation, "pre_add": i["pre_add"], "post_add": i["post_add"]}
    match case.norm:
        case "batch" | "batch_eval":
            y = F.batch_norm(
                x, i["running_mean"], i["running_var"], w, b, case.norm == "batch", MOMENTUM, EPS, **extras
            )
        case "instance":
            y = F.instance_norm(x, None, None, w, b, True, MOMENTUM, EPS, **extras)
        case "group":
            y = F.group_norm(x, case.groups, w, b, EPS, **extras)
        case "layer":
            y = F.layer_norm(x, w.shape, w, b, EPS, **extras)
        case "rms":
            y = F.rms_norm(x, w.shape, w, EPS, **extras)
        case "layer2d":
            y = normops.normalize(x, "n c h w -> n h w", w, b, affine="c", eps=EPS, **extras)
        case "adaln":
            y = normops.normalize(x, (-1,), w, b, eps=EPS, **extras)
    return y if isinstance(y, tuple) else (y,)


def by_torch(case: Case, i: Inputs) -> Outputs:
    """The composition of torch's functions."""
    z, *total = before_activation(case, i)
    return (ACTIVATIONS[case.activation or "identity"].function(z), *total)


def before_activation(case: Case, i: Inputs, stored: Tensor | None = None) -> Outputs:
    """What the activation is applied to, by torch; `stored` is x + pre_add as another provider rounded it."""
    x, w, b = i["x"], i["weight"], i["bias"]
    if i["pre_add"] is not None:
        x = x + i["pre_add"]
        total = x
        if stored is not None:
            x = x + (stored.to(x.dtype) - x).detach()
    match case.norm:
        case "batch" | "batch_eval":
            y = TF.batch_norm(x, i["running_mean"], i["running_var"], w, b, case.norm == "batch", MOMENTUM, EPS)
        case "instance":
            y = TF.instance_norm(x, None, None, w, b, True, MOMENTUM, EPS)
        case "group":
            y = TF.group_norm(x, case.groups, w, b, EPS)
        case "layer":
            y = TF.layer_norm(x, w.shape, w, b, EPS)
        case "rms":
            y = TF.rms_norm(x, w.shape, w, EPS)
        case "layer2d":
            y = TF.layer_norm(x.permute(0, 2, 3, 1), w.shape, w, b, EPS).permute(0, 3, 1, 2)
        case "adaln":
            y = TF.layer_norm(x, x.shape[-1:], None, None, EPS) * w + b
    if i["post_add"] is not None:
        y = y + i["post_add"]
    return (y,) if i["pre_add"] is None else (y, total)


def finish(case: Case, i: Inputs, y: Tensor) -> Tensor:
    """What follows the norm, by torch."""
    if i["post_add"] is not None:
        y = y + i["post_add"]
    return ACTIVATIONS[case.activation or "identity"].function(y)


def leaves(i: Inputs) -> list[Tensor]:
    return [i[name] for name in LEAVES if i[name] is not None]


def output_gradients(i: Inputs) -> list[Tensor]:
    return [g for g in (i["dy"], i["dsum"]) if g is not None]


def results(outputs: Outputs, i: Inputs) -> dict[str, Tensor]:
    """Everything a call computes: y, x + pre_add, gradients ("d" + name) and updated running statistics."""
    names = ["d" + name for name in LEAVES if i[name] is not None]
    gradients = torch.autograd.grad(outputs, leaves(i), output_gradients(i), retain_graph=True)
    running = {name: i[name] for name in ("running_mean", "running_var") if i[name] is not None}
    return dict(zip(("y", "sum"), outputs, strict=False)) | dict(zip(names, gradients, strict=True)) | running


def upcast(i: Inputs) -> Inputs:
    return {
        name: None if t is None else t.detach().double().clone().requires_grad_(name in LEAVES) for name, t in i.items()
    }


def errors_of(
    call: Callable[[Inputs], Outputs], case: Case, inputs: Inputs, dtype: torch.dtype, slack: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]], int]:
    """Results of a provider, their errors against torch in float64, and how many elements lay on a kink."""
    reference = upcast(inputs)  # before the call, which updates running statistics
    actual = results(call(inputs), inputs)
    expected, kinks = exact(case, reference, actual, dtype, slack)
    return actual, compare(actual, expected, dtype, slack), kinks


def exact(
    case: Case, i: Inputs, actual: dict[str, Tensor], dtype: torch.dtype, slack: float = 1.0
) -> tuple[dict[str, Tensor], int]:
    """All results by torch in float64, as `results` names them, and how many elements lay on a kink.

    Where z, to which the activation is applied, is nearer to a kink than it can be computed, rounding decides which of
    two derivatives a backward takes: both are right, and one such element changes the sums that it enters by more than
    any bound.  Which one was taken shows in the gradient of z itself (that of post_add, or its share in that of x): the
    nearer of the two counts, and the reference goes on from there.  So each element is held to its bound, with one of
    the two derivatives, and so are all sums.  Passes of one backward must agree on z, or sums and elements differ here.
    """
    z, *total = before_activation(case, i, actual.get("sum"))
    activation = ACTIVATIONS[case.activation or "identity"].function
    outer = [i["dsum"]] if total else []

    def gradients(at: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        at = at.detach().requires_grad_()
        (dz,) = torch.autograd.grad(activation(at), at, i["dy"])
        return torch.autograd.grad((z, *total), of, (dz, *outer), retain_graph=True)

    at, kinks = z.detach(), 0
    below, above, allowed = at, at, KINKS_ALLOWED
    rms = at.square().mean().sqrt().item()
    nearness = slack * bounds(dtype, dtype if slack > 1 else statistic(dtype))[1]  # others round z to x's dtype
    for kink in KINKS.get(case.activation or "", ()):
        width = nearness * (abs(kink) + rms)
        near = (at - kink).abs() <= width
        below = torch.where(near, below.clamp(max=nextafter(kink, -inf)), below)
        above = torch.where(near, above.clamp(min=nextafter(kink, inf)), above)
        kinks += int(near.sum())
        allowed += at.numel() * 2 * width / max(rms, 1e-300)
    if kinks > allowed:
        raise AssertionError(f"wrong: {kinks} of {at.numel()} elements lie on a kink, more than {allowed:.0f}")
    if kinks:
        name = "x" if i["post_add"] is None else "post_add"
        off = [(gradients(side, [i[name]])[0] - actual["d" + name]).abs_() for side in (below, above)]
        at = torch.where(off[0] <= off[1], below, above)
        del off
    names = ["d" + name for name in LEAVES if i[name] is not None]
    expected = dict(zip(("y", "sum"), (activation(z), *total), strict=False))
    expected |= dict(zip(names, gradients(at, leaves(i)), strict=True))
    return expected | {name: i[name] for name in ("running_mean", "running_var") if i[name] is not None}, kinks


def bounds(dtype: torch.dtype, result: torch.dtype, length: float = 1) -> tuple[float, float]:
    """Allowed (RMS, largest) error of a result that sums up `length` elements, relative; see REASON."""
    stored, arithmetic = torch.finfo(result).eps / 2, torch.finfo(statistic(dtype)).eps / 2
    if result == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        stored *= 2
    walk = sqrt(length / LANES)
    return stored + (16 + walk) * arithmetic, stored + (64 + 4 * walk) * arithmetic


LANES = 4096
"""Threads that share a long sum, about, over all programs."""
KINKS_ALLOWED = 10
"""Elements on a kink in a tensor of any size, however small."""
REASON = (
    "A result is rounded once to its own dtype, which costs at most half its eps. Before that all is computed in "
    "the precision of the statistics (fp32, or fp64 for fp64): mean, variance, affine, activation and the tree sums of "
    "the backward are about ten roundings deep, which is allowed 16 half-eps in the root mean square and 64 in the "
    "worst element. A gradient of a parameter, or a running statistic, sums up n elements: some 4096 threads each add "
    "n / 4096 of them one after another, and rounding errors of random signs add up to the root of their number, which "
    "is allowed beside the 16, four times that beside the 64. Triton's interpreter truncates to bf16 where hardware "
    "rounds, so a whole eps is allowed there. The reference continues from x + pre_add as it was stored, which is "
    "checked by itself. Where the activation has a kink nearer to z than z can be computed, it continues from the "
    "derivative that was taken; there may be no more such elements (`kinks`) than if z had a density of 1 / RMS(z) "
    "there, 2.5 times that of normal numbers, and 10. "
    "RMS error is RMS(error) / RMS(reference); the largest is |error| / (|reference| + RMS(reference))."
)


def compare(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, slack: float = 1.0
) -> dict[str, dict[str, float]]:
    """For each result its errors, and the worse of them as a share of its bound."""
    errors = {}
    for name, ref in expected.items():
        got = actual[name].detach()
        ref = ref.detach()
        rms_ref = ref.square().mean().sqrt().clamp_min(1e-300)
        error = (got.double() - ref).abs()
        rms, largest = (error.square().mean().sqrt() / rms_ref).item(), (error / (ref.abs() + rms_ref)).max().item()
        # Others may round anything to x's dtype on the way, the gradients of fp32 parameters too.
        stored = dtype if slack > 1 and torch.finfo(dtype).eps > torch.finfo(got.dtype).eps else got.dtype
        length = expected["y"].numel() / ref.numel()
        rms_bound, largest_bound = (slack * bound for bound in bounds(dtype, stored, length))
        share = max(rms / rms_bound, largest / largest_bound)
        errors[name] = {
            "rms": rms, "rms_bound": rms_bound, "max": largest, "max_bound": largest_bound,
            "share": share if share == share else float("inf"),
        }  # fmt: skip
    return errors
