# ruff: noqa: E501  (tables)
"""Wrong arguments of every public function, made from its signature: what is called, and what must come of it.

``python -m tests.bad_input`` prints what is wrong, and how many cases there are: for where a CPU has no kernels.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

import normops
from normops import calls
from normops import functional as F

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Arguments = dict[str, Any]


class Thing:
    """No tensor, no number, no text."""

    def __repr__(self) -> str:
        return "a thing"


THING = Thing()
NAN, INFINITE = float("nan"), float("inf")


def _tensors(good: Tensor | None, like: Tensor) -> Iterator[tuple[str, Any]]:
    """Wrong tensors in the place of `good`."""
    t = like if good is None else good
    yield from {"text": "ones", "number": 1.5, "list": [1.0, 2.0], "object": THING}.items()
    yield "integers", t.to(torch.int64)
    yield "booleans", t > 0
    yield "complex", t.to(torch.complex64)
    yield "meta", t.detach().to("meta")
    yield "sparse", t.detach().to_sparse()
    yield "more", torch.cat([t, t], dim=0)[: t.shape[0] + 1] if t.dim() == 1 else t.new_ones(5, 7)
    if t.dim():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield "quantized", torch.quantize_per_tensor(t.detach().cpu().float(), 0.1, 0, torch.qint8)
            yield "nested", torch.nested.nested_tensor([t.detach(), t.detach()])


WRONG: dict[str, dict[str, Any]] = {
    "number": {"text": "1e-5", "none": None, "list": [1e-5], "complex": 1j, "object": THING,
               "negative": -1.0, "zero": 0.0, "nan": NAN, "inf": INFINITE, "int": 1, "flag": True},
    "count": {"text": "2", "none": None, "list": [2], "float": 2.0, "object": THING, "negative": -1, "zero": 0, "large": 7},
    "sizes": {"text": "3", "none": None, "float": 3.0, "floats": (3.0,), "object": THING, "none of them": (), "wrong": (4,),
              "negative": (-3,), "zero": 0, "many": (2, 6, 3, 3, 3), "list": [3], "int": 3},
    "axes": {"none": None, "float": 1.5, "floats": (1.5,), "object": THING, "none of them": (), "beyond": 4, "below": -5,
             "twice": (1, -3), "texts": ("n",), "pattern": "n c -> n", "no pattern": "nchw"},
    "flag": {"text": "yes", "none": None, "object": THING, "list": [1]},
    "activation": {"text": "swich", "number": 1, "object": THING, "list": ["relu"], "module": torch.nn.Softmax(0)},
    "dtype": {"text": "float32", "int": torch.int64, "number": 1, "object": THING, "python": float},
    "affine": {"number": 1, "unknown": "z", "object": THING, "twice": "c c"},
    "length": {"text": "2", "none": None, "float": 2.0, "negative": -2, "zero": 0, "no divisor": 4},
}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A public function: right arguments, what kind each is of, and what torch calls it."""

    name: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any] | None
    good: Callable[[], Arguments]
    kinds: dict[str, str]


def made(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape).sin().to(DEVICE)


EXTRAS = {"activation": "activation", "pre_add": "tensor", "post_add": "tensor", "out_dtype": "dtype"}
STATISTICS = {"running_mean": "tensor", "running_var": "tensor", "weight": "tensor", "bias": "tensor"}


def statistics() -> Arguments:
    return {"running_mean": made(6), "running_var": made(6) + 2, "weight": made(6), "bias": made(6)}


FUNCTIONS = (
    Function("batch_norm", F.batch_norm, TF.batch_norm,
             lambda: {"input": made(2, 6, 3, 3), **statistics(), "training": True, "momentum": 0.1, "eps": 1e-5},
             {"input": "tensor", **STATISTICS, "training": "flag", "momentum": "number", "eps": "number", **EXTRAS}),
    Function("batch_norm in evaluation", F.batch_norm, TF.batch_norm,
             lambda: {"input": made(2, 6, 3, 3), **statistics(), "training": False, "eps": 1e-5},
             {"input": "tensor", **STATISTICS, "eps": "number", **EXTRAS}),
    Function("instance_norm", F.instance_norm, TF.instance_norm,
             lambda: {"input": made(2, 6, 3, 3), **statistics(), "use_input_stats": True, "momentum": 0.1, "eps": 1e-5},
             {"input": "tensor", **STATISTICS, "use_input_stats": "flag", "momentum": "number", "eps": "number", **EXTRAS}),
    Function("layer_norm", F.layer_norm, TF.layer_norm,
             lambda: {"input": made(2, 6, 3, 3), "normalized_shape": (3,), "weight": made(3), "bias": made(3), "eps": 1e-5},
             {"input": "tensor", "normalized_shape": "sizes", "weight": "tensor", "bias": "tensor", "eps": "number", **EXTRAS}),
    Function("rms_norm", F.rms_norm, TF.rms_norm,
             lambda: {"input": made(2, 6, 3, 3), "normalized_shape": (3,), "weight": made(3), "eps": 1e-5},
             {"input": "tensor", "normalized_shape": "sizes", "weight": "tensor", "eps": "number", "round_first": "flag", **EXTRAS}),
    Function("group_norm", F.group_norm, TF.group_norm,
             lambda: {"input": made(2, 6, 3, 3), "num_groups": 2, "weight": made(6), "bias": made(6), "eps": 1e-5},
             {"input": "tensor", "num_groups": "count", "weight": "tensor", "bias": "tensor", "eps": "number", **EXTRAS}),
    Function("normalize", normops.normalize, None,
             lambda: {"x": made(2, 6, 3, 3), "axes": (1, 2), "weight": made(6, 1, 1), "bias": made(3)},
             {"x": "tensor", "axes": "axes", "weight": "tensor", "bias": "tensor", "eps": "number", "center": "flag",
              "return_stats": "flag", **EXTRAS}),
    Function("normalize with a pattern", normops.normalize, None,
             lambda: {"x": made(2, 6, 3, 3), "axes": "n (g c) h w -> n g", "g": 2, "affine": "(g c)", "weight": made(6),
                      "bias": made(6)},
             {"x": "tensor", "weight": "tensor", "bias": "tensor", "eps": "number", "affine": "affine", "g": "length",
              **EXTRAS}),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    function: Function
    parameter: str
    label: str
    change: Arguments
    without: str = ""

    @property
    def name(self) -> str:
        return f"{self.function.name}: {self.parameter} {self.label}"


def cases(function: Function) -> Iterator[Case]:
    """Each argument wrong in every way of its kind, and each keyword misspelt."""
    good = function.good()
    like = good["input"] if "input" in good else good["x"]
    for parameter, kind in function.kinds.items():
        values = _tensors(good.get(parameter), like) if kind == "tensor" else WRONG[kind].items()
        for label, value in values:
            yield Case(function, parameter, label, {parameter: value})
        if parameter in ("input", "x"):
            yield Case(function, parameter, "none", {parameter: None})
    for parameter in inspect.signature(function.ours).parameters:
        if parameter != "lengths":
            yield Case(function, parameter, "misspelt", {parameter + parameter[-1]: good.get(parameter)}, parameter)


def outcome(call: Callable[..., Any], arguments: Arguments) -> Any:
    """What it returns (y alone) or raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = call(**arguments)
        except Exception as error:
            return error
    return found[0] if isinstance(found, tuple) else found


DTYPES = "an operand of no known dtype is a TypeError; torch's kind depends on what meets it first"
NO_TENSOR = "what is no tensor is a TypeError; torch asks it for its size and says that it has none"
JUSTIFIED = {
    ("input", "text"): NO_TENSOR, ("input", "number"): NO_TENSOR, ("input", "list"): NO_TENSOR,
    ("input", "object"): NO_TENSOR, ("input", "none"): NO_TENSOR,
    **{(name, label): DTYPES for name in ("input", *STATISTICS) for label in ("integers", "booleans", "complex")},
    ("input", "more"): "two things are wrong with an input of rank 2 for InstanceNorm, and either may be told",
    ("input", "nested"): "torch has a LayerNorm of nested tensors; ours have none",
    ("momentum", "none"): "a ValueError that says whose business None is",
    ("normalized_shape", "int"): "an int is taken, as torch's modules do",
    ("normalized_shape", "zero"): "an int is taken, and this one does not fit",
    ("num_groups", "zero"): "torch divides by it",
    ("eps", "negative"): "not every torch refuses it in BatchNorm", ("eps", "zero"): "not every torch refuses it in BatchNorm",
}
"""Where another kind of error than torch's is raised, or none, or one where torch raises none; and why."""
ALIASES = {"input": "x", "axes": "pattern"}
"""Names that messages have for an argument of another name: one set of checks serves all functions."""


def faults(case: Case) -> Iterator[str]:
    """What is wrong with how a case is met; the right call was made before."""
    function = case.function
    good, wrong = function.good(), function.good()
    wrong = {name: value for name, value in wrong.items() if name != case.without} | case.change
    before = {name: t.clone() for name, t in wrong.items() if isinstance(t, Tensor) and name not in case.change}
    known = len(calls.known)
    ours = outcome(function.ours, wrong)
    theirs = None
    if function.theirs is not None and case.parameter not in (*EXTRAS, "round_first"):
        again = {name: value for name, value in function.good().items() if name != case.without} | case.change
        theirs = outcome(function.theirs, again)
    justified = (case.parameter, case.label) in JUSTIFIED
    if isinstance(theirs, Exception) and not (isinstance(ours, type(theirs)) or justified):
        yield f"{ours!r} for torch's {theirs!r}"
    if isinstance(theirs, Tensor) and isinstance(ours, Exception) and not justified:
        yield f"{ours!r}, which torch accepts"
    both = isinstance(theirs, Tensor) and isinstance(ours, Tensor)
    if both and not torch.allclose(ours, theirs, atol=1e-5, equal_nan=True):
        yield "another value than torch's"
    if theirs is None and not isinstance(ours, Exception) and not (case.parameter == "eps" and case.label in NUMBERS):
        yield "is accepted"
    if not isinstance(ours, Exception):
        return
    names = [next(iter(case.change))] if case.without else [case.parameter, ALIASES.get(case.parameter, case.parameter)]
    if case.without in ("x", "axes", *FIRST):  # an argument without a default is missing before another is too many
        names.append(case.without)
    if not any(name in str(ours) for name in names):
        yield f"the message does not name {names[0]}: {ours}"
    if case.without and "lengths" in inspect.signature(function.ours).parameters and not near(case, ours):
        yield f"the message does not say what was meant: {ours}"
    if not any(told in str(ours) for told in spelled(next(iter(case.change.values())))) and not case.without:
        yield f"the message does not say what was given: {ours}"
    for name, t in before.items():
        if not torch.equal(wrong[name], t):
            yield f"{name} was modified"
    if len(calls.known) != known:
        yield "it is remembered"
    if not torch.equal(outcome(function.ours, good), RIGHT[function.name]):
        yield "the right call gives other bits afterwards"


FIRST = ("input", "normalized_shape", "num_groups")
NUMBERS = ("negative", "zero", "nan", "inf", "int", "flag")
RIGHT: dict[str, Tensor] = {}
"""What the right calls return."""


def near(case: Case, error: Exception) -> bool:
    return f"did you mean {case.without}?" in str(error) or case.without in ("x", "axes")


def spelled(value: Any) -> list[str]:
    """How a message may tell a value: itself, or what counts about it."""
    if isinstance(value, (tuple, list)):
        return [*(part for n in value for part in spelled(n)), repr(tuple(value)), repr(list(value)), type(value).__name__]
    if not isinstance(value, Tensor):
        return [repr(value), str(value), type(value).__name__]
    if value.is_nested:
        return ["nested"]
    kinds = value.dtype, value.device, value.layout, "quantized"
    return [str(tuple(value.shape)), str(list(value.shape)), f"[{-value.dim()}, {value.dim() - 1}]", *map(str, kinds)]


def found(function: Function) -> list[str]:
    """All faults of a function."""
    RIGHT[function.name] = outcome(function.ours, function.good())
    return [f"{case.name}: {fault}" for case in cases(function) for fault in faults(case)]


if __name__ == "__main__":
    for function in FUNCTIONS:
        for fault in found(function):
            print(fault)
    print(sum(1 for function in FUNCTIONS for _ in cases(function)), "cases")
