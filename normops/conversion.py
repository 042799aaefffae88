"""Take over the norms of a model, and give them back.

Modules stay the objects that they are, with their parameters, buffers, hooks and names: what changes is their class.

>>> import torch, normops
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
>>> type(normops.convert(model)[1]), normops.report(model)[0].fused
(<class 'normops.nn.BatchNorm2d'>, 'activation relu')
>>> type(normops.restore(model)[1])
<class 'torch.nn.modules.batchnorm.BatchNorm2d'>
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import Module

from . import adopting, fusing, nn

Converter = Callable[[Module], type[Module] | str | None]
"""The class that a module gets, or why it is left alone; None: it is no norm, or another converter's."""

OURS: dict[type, type] = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in (
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "GroupNorm",
        "LayerNorm", "RMSNorm",
    )
}  # fmt: skip
LEFT = {
    torch.nn.SyncBatchNorm: "its statistics are those of all processes",
    torch.nn.LocalResponseNorm: "it is another formula",
    torch.nn.CrossMapLRN2d: "it is another formula",
}
_converters: dict[type | str, Converter] = {}


class Row(NamedTuple):
    """What became of a norm."""

    path: str
    was: str
    now: str
    """What it is; "" where it was left alone."""
    fused: str
    """What its kernel does besides."""
    reason: str
    """Why it was left alone, or not fused."""


class Report(list[Row]):
    """The norms of a model, as a table when printed."""

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("module", "was", "is", "fused with", "why not")]
        lines += [tuple(cell or "-" for cell in row) for row in self]
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def register_converter(kind: type | str, converter: Converter) -> None:
    """Say what modules of a class become: its own type, or ``"package.module.Name"`` for one that need not be imported.

    ``converter(module)`` returns the class to give to the module (a subclass of its own, whose forward takes pre_add
    and post_add where it may be fused), a text that says why it is left alone, or None to leave it to the others.
    Raises TypeError for another kind of argument.

    >>> import torch, normops
    >>> class Whitening(torch.nn.LayerNorm): ...
    >>> normops.register_converter(Whitening, lambda module: "it must stay as it is")
    >>> normops.convert(Whitening(4))
    Whitening((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    if not isinstance(kind, (type, str)) or not callable(converter):
        raise TypeError(f"expected a class or its name, and a function, got {kind!r} and {converter!r}")
    _converters[kind] = converter


def _decide(module: Module) -> type | str | None:
    """The class that a module gets, why it is left alone, or None where it is no norm."""
    kind = type(module)
    for known in (kind, f"{kind.__module__}.{kind.__qualname__}"):
        if known in _converters and (found := _converters[known](module)) is not None:
            return found
    if torch.nn.utils.parametrize.is_parametrized(module):
        kind = kind.__mro__[1]
        return f"a parametrized {kind.__name__}" if kind in OURS else None
    own = {"activation", "out_dtype"} & {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
    if isinstance(module, nn._Fused):
        return None
    if own and any(isinstance(module, base) for base in OURS):
        return f"it has {own.pop()} of its own"
    if kind in OURS:
        return OURS[kind]
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin) and "Norm" in kind.__name__:
        return "it has no parameters yet: convert after a first call"
    if kind in LEFT:
        return LEFT[kind]
    base = next((base for base in OURS if isinstance(module, base)), None)
    if base is not None and all(getattr(kind, name, None) is getattr(base, name, None) for name in _METHODS):
        try:
            return adopting.adopted(OURS[base], kind)
        except TypeError as error:  # of __init_subclass__
            return f"its class takes no other one: {error}"
    if base is None and ("norm" not in kind.__name__.lower() or not module.state_dict()):
        return None
    if any("norm" in type(m).__name__.lower() for m in module.modules() if m is not module):
        return None  # a container of norms
    found_class = adopting.candidate_of(module)
    if found_class is not None:
        return adopting.adopted(found_class, kind)
    return f"{kind.__module__}.{kind.__qualname__} computes no norm that is known here"


_METHODS = ("forward", "_check_input_dim", "_apply_instance_norm", "_get_no_batch_dim", "_handle_no_batch_input")


def convert(model: Module, fuse: bool = True) -> Module:
    """Give the norms of a model to normops, in place, and return it.

    Parameters, buffers, names, hooks and the modules themselves stay what they are; so does every norm that is not
    known, see :func:`report`.  `fuse`: norms that an activation follows, or that a sum stands before or behind, do it
    in the same kernel: in ``nn.Sequential``, and in the forward of any module whose source can be read.  In evaluation
    and in training the results are those of before to rounding; under autocast LayerNorm and GroupNorm return the dtype
    of their input, where torch's return float32.

    Raises TypeError where `model` is no module.

    >>> import torch, normops
    >>> model = normops.convert(torch.nn.TransformerEncoderLayer(8, 2))
    >>> type(model.norm1)
    <class 'normops.nn.LayerNorm'>
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    decided = [(module, _decide(module)) for module in model.modules() if fusing.taken(module) is None]
    for module, kind in decided:  # after all that may raise
        if isinstance(kind, type):
            more = kind.attributes(module) if issubclass(kind, adopting._Adopted) else {}
            fusing.take(module, kind, **more)
    if fuse:
        fusing.fuse(model)
    return model


def restore(model: Module) -> Module:
    """Undo :func:`convert`, exactly: classes, attributes and activations are those of before.  Returns the model.

    For whatever looks at types: quantisation, folding, export, other libraries.  Raises TypeError where `model` is no
    module, RuntimeError where a module was parametrized or sharded since, and changes nothing then.

    >>> import torch, normops
    >>> norm = torch.nn.GroupNorm(2, 4)
    >>> normops.restore(normops.convert(norm)) is norm and type(norm) is torch.nn.GroupNorm
    True
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    fusing.undo(model)
    return model


def report(model: Module) -> Report:
    """What is, or would be, converted: a row for each norm, printed as a table.  TypeError where `model` is no module.

    >>> import torch, normops
    >>> print(normops.report(normops.convert(torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.SiLU()))))
    module  was                 is         fused with       why not
    0       torch.nn.LayerNorm  LayerNorm  activation silu  -
    """
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    rows = Report()
    for path, module in model.named_modules():
        found = fusing.taken(module)
        if found is not None and not found.norm:
            continue
        if found is not None:
            rows.append(Row(path, _spelled(found.kind), type(module).__name__, found.fused, found.reason))
        elif isinstance(module, nn._Fused):
            rows.append(Row(path, f"normops.nn.{type(module).__name__}", type(module).__name__, "", "it is ours"))
        elif (kind := _decide(module)) is not None:
            reason = kind if isinstance(kind, str) else "not converted"
            rows.append(Row(path, _spelled(type(module)), "", "", reason))
    return rows


def _spelled(kind: type) -> str:
    place = "torch.nn" if kind.__module__.startswith("torch.nn.modules") else kind.__module__
    return f"{place}.{kind.__qualname__}"
