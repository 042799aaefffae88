"""What stands around a norm, done by its kernel: the activation behind it, a sum before or behind.

In ``nn.Sequential`` by what follows what; elsewhere in the source of a module's methods (``editing``).  Either way the
module gets a class of its own, and its children stay what they are: whoever else calls a norm, or puts another module
in the place of one, gets what they ask for.  Whether two things are done at once is decided when they meet, by what
they are then; where they may not be, they are done one after the other as before.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from types import CellType, CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from . import activations
from .adopting import named_alike
from .editing import Editor, Pruned, is_self
from .nn import _Fused

_PLACE = "_normops_taken"


@dataclass
class Taken:
    """What a module was, and what became of it."""

    kind: type
    given: str
    """The name of the class that it got."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Those that were set, as they were; None where they were not there."""
    norm: bool = True
    """A norm, or a module with one, which got another forward."""
    fused: str = ""
    reason: str = ""


class Edit(NamedTuple):
    """Of a method: its name, its new source, and the texts of a module for which that is the same."""

    name: str
    source: str
    texts: tuple[tuple[str, str], ...]


def taken(module: Module) -> Taken | None:
    return module.__dict__.get(_PLACE)


def take(module: Module, kind: type, **attributes: Any) -> None:
    """Give a norm another class, and attributes."""
    before = {name: module.__dict__.get(name) for name in (*attributes, "activation", "out_dtype")}
    _give(module, kind, Taken(type(module), kind.__qualname__, before))
    module.__dict__.update(attributes)


def _give(module: Module, kind: type, state: Taken) -> None:
    module.__dict__[_PLACE] = state
    module.__class__ = kind


def undo(model: Module) -> None:
    for path, module in model.named_modules():
        state, kind = taken(module), type(module).__qualname__
        if state is not None and state.given != kind:  # parametrized, or sharded
            raise RuntimeError(f"{path or 'the model'} became a {kind} after it was converted: undo that before")
    for module in list(model.modules()):
        state = taken(module)
        if state is not None:
            del module.__dict__[_PLACE]
            module.__class__ = state.kind
            for name, value in state.attributes.items():
                module.__dict__.pop(name, None)
                if value is not None:
                    module.__dict__[name] = value


# --------------------------------------------------------------------------------------- what is done where things meet


def _alone(module: Any) -> bool:
    """Whether a call of a module is a call of its class's forward, and nobody looks on."""
    return not (
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        or module._backward_pre_hooks
    )  # fmt: skip


def _may(norm: Any) -> bool:
    """Whether a norm may do something besides."""
    return isinstance(norm, _Fused) and norm.activation in (None, "identity") and _alone(norm)


def named(act: Any, options: dict[str, Any] | None = None) -> str | None:
    """The name of an activation of ours that a function or a module is, with such options; None where it is none."""
    options = {name: value for name, value in (options or {}).items() if name != "inplace"}
    if isinstance(act, Module) and not _alone(act):
        return None
    if act is torch.nn.functional.gelu and options.pop("approximate", "none") == "tanh":
        return None if options else "gelu_tanh"
    if act is torch.nn.functional.leaky_relu and options.pop("negative_slope", 0.01) != 0.01:
        return None
    if options or isinstance(act, (str, type)):
        return None
    try:
        name = activations.check(act)
    except ValueError:
        return None
    return None if name == "identity" else name


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def act(norm: Any, x: Any, act: Any, **options: Any) -> Any:
    """act(norm(x))"""
    name = named(act, options) if _may(norm) else None
    return act(norm(x), **options) if name is None else norm(x, activation=name)


def add_act(norm: Any, x: Any, added: Any, act: Any, *, _inplace: bool = False, **options: Any) -> Any:
    """act(norm(x) + added); `_inplace`: added to what the norm returns."""
    name = named(act, options) if _may(norm) and _alike(x, added) else None
    if name is not None:
        return norm(x, post_add=added, activation=name)
    total = norm(x)
    if _inplace:
        total += added
    else:
        total = total + added
    return act(total, **options)


def sums(norm: Any, x: Any, added: Any) -> tuple[Any, Any]:
    """norm(x + added) and the sum."""
    if _may(norm) and _alike(x, added):
        found: tuple[Any, Any] = norm(x, pre_add=added)
        return found
    total = x + added
    return norm(total), total


def _walk(self: Any, input: Any) -> Any:
    """Forward of a Sequential."""
    modules = list(self._modules.values())
    at = 0
    while at < len(modules):
        norm, follows = modules[at], modules[at + 1] if at + 1 < len(modules) else None
        name = named(follows) if isinstance(follows, Module) and taken(norm) is not None and _may(norm) else None
        input = norm(input) if name is None else norm(input, activation=name)
        at += 1 if name is None else 2
    return input


# ----------------------------------------------------------------------------------------------- who gets another class


def fuse(model: Module) -> None:
    """Fuse what can be in a converted model."""
    for module in list(model.modules()):
        norms = {name: child for name, child in module._modules.items() if child is not None and _taken_norm(child)}
        if not norms or taken(module) is not None:
            continue
        if getattr(type(module), "forward", None) is torch.nn.Sequential.forward:
            _fuse_sequential(module)
        else:
            _fuse_methods(module, norms)


def _taken_norm(module: Module) -> bool:
    state = taken(module)
    return state is not None and state.norm and isinstance(module, _Fused)


def _fuse_sequential(module: Module) -> None:
    children: list[Any] = list(module._modules.values())
    found = False
    for norm, follows in pairwise(children):
        state = taken(norm) if _taken_norm(norm) else None
        name = None if state is None else named(follows)
        if state is not None and name is not None:
            if _may(norm):
                state.fused, found = f"activation {name}", True
            else:
                state.reason = "it has a hook, a forward of its own, or an activation"
    if found and "forward" not in module.__dict__:
        kind = _edited(type(module), ())
        _give(module, kind, Taken(type(module), kind.__qualname__, norm=False))


def _fuse_methods(module: Module, norms: dict[str, Module]) -> None:
    edits: list[Edit] = []
    fused: dict[str, str] = {}
    hindered = ""
    for name, function in _methods(type(module)).items():
        why = "is the instance's own" if name in module.__dict__ else _obstacle(name, function)
        if why:
            hindered = f"{name} {why}" if name == "forward" else hindered
            continue
        texts = {node.attr: getattr(module, node.attr, None) for node in _tests(_syntax(function))}
        tree: Any = Pruned(partial(_constant, texts)).visit(copy.deepcopy(_syntax(function)))  # type: ignore[arg-type]
        editor = Editor(set(norms), partial(_activation, module, function))
        editor.edit(tree)
        if editor.found:
            fused.update(editor.found)
            known = tuple((key, text) for key, text in texts.items() if isinstance(text, str))
            edits.append(Edit(name, ast.unparse(ast.fix_missing_locations(tree)), known))
    try:
        kind = _edited(type(module), tuple(edits)) if edits else None
    except Exception as error:  # of decorators and annotations, which may ask for anything
        kind, fused, hindered = None, {}, f"its source does not run again: {error}"
    for name, norm in norms.items():
        state = taken(norm)
        assert state is not None
        what = fused.get(name, "")
        if what and not _may(norm):
            state.reason = "it has a hook, a forward of its own, or an activation"
        else:
            state.fused, state.reason = what, "" if what else hindered
    if kind is not None:
        _give(module, kind, Taken(type(module), kind.__qualname__, norm=False))


def _methods(kind: type) -> dict[str, FunctionType]:
    """What a class and its bases define in Python, up to torch.nn's own."""
    bases = [b for b in kind.__mro__ if not b.__module__.startswith("torch.nn.modules")]
    members = {name: value for base in reversed(bases) for name, value in vars(base).items()}
    return {name: f for name, f in members.items() if isinstance(f, FunctionType) and not name.startswith("__")}


@cache
def _syntax(function: FunctionType) -> ast.FunctionDef | None:
    """The definition of a function, where its source can be read."""
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None


def _obstacle(name: str, function: FunctionType) -> str:
    """Why the source of a method cannot be edited, or ""."""
    tree, inner = _syntax(function), inspect.unwrap(function)
    if tree is None:
        return "has no source to be read"
    if inner.__closure__:
        return "calls super(), or what is around it"
    if tree.name != name or not tree.args.args or tree.args.args[0].arg != "self":
        return "is made by another function"
    private = (n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    if any(attr.startswith("__") and not attr.endswith("__") for attr in private):
        return "uses private names"
    compiled = compile(ast.Module([_bare(copy.deepcopy(tree))], []), "", "exec", dont_inherit=True)
    code = next(c for c in compiled.co_consts if isinstance(c, CodeType))
    same = _told(code) == _told(inner.__code__)
    return "" if same else "is not what its file says any more"


def _told(code: CodeType) -> tuple[Any, ...]:
    """What two compilations of the same source agree on, whatever the indentation of its texts."""
    constants = [
        c for c in code.co_consts if not (isinstance(c, CodeType) or (isinstance(c, str) and "\n" in c))
    ]  # fmt: skip
    return code.co_names, code.co_varnames, constants, [_told(c) for c in code.co_consts if isinstance(c, CodeType)]


def _tests(tree: Any) -> list[ast.Attribute]:
    """What of self is compared with a text: ``if self.kind == "default"``."""
    tests = (node.test for node in ast.walk(tree) if isinstance(node, ast.If))
    return [test.left for test in tests if _compares(test)]  # type: ignore[attr-defined]


def _compares(test: ast.expr) -> bool:
    match test:
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[ast.Constant(value=str())]):
            return is_self(left)
    return False


def _constant(texts: dict[str, Any], test: ast.expr) -> bool | None:
    """What such a comparison gives, for texts of the module."""
    if not _compares(test):
        return None
    value = texts.get(test.left.attr)  # type: ignore[attr-defined]
    return value == test.comparators[0].value if isinstance(value, str) else None  # type: ignore[attr-defined]


def _activation(module: Module, function: FunctionType, node: ast.Call) -> str | None:
    """The name of the activation that a call is of, as things are now."""
    try:
        given = _resolved(module, node.func, inspect.unwrap(function))
        return named(given, {str(k.arg): k.value.value for k in node.keywords})  # type: ignore[attr-defined]
    except Exception:  # of a property, say
        return None


def _resolved(module: Module, node: ast.AST, function: Any) -> Any:
    """The object that a dotted name stands for, where it is no variable of the function."""
    if isinstance(node, ast.Name):
        names = (n for n in ast.walk(_syntax(function) or node) if isinstance(n, ast.Name))
        own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        return module if node.id == "self" else None if node.id in own else function.__globals__.get(node.id)
    return getattr(_resolved(module, node.value, function), node.attr) if isinstance(node, ast.Attribute) else None


# ------------------------------------------------------------------------------------------------------- edited classes


def _bare(tree: ast.FunctionDef) -> ast.FunctionDef:
    """A definition without annotations, defaults and decorators."""
    tree.returns, tree.decorator_list, a = None, [], tree.args
    for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if argument is not None:
            argument.annotation = None
    a.defaults = [ast.Constant(None) for _ in a.defaults]
    a.kw_defaults = [None if d is None else ast.Constant(None) for d in a.kw_defaults]
    return ast.fix_missing_locations(tree)


def _compiled(original: FunctionType, edit: Edit) -> Any:
    """The edited method, with all that the original has; where texts of the module are others, that one."""
    inner: Any = inspect.unwrap(original)
    tree: Any = _bare(ast.parse(edit.source).body[0])  # type: ignore[arg-type]
    place = f"<{original.__qualname__}, edited by normops>"
    found: dict[str, Any] = {}
    exec(compile(ast.Module([tree], []), place, "exec", dont_inherit=True), inner.__globals__, found)
    method = _wrapped(original, _like(inner, found[inner.__name__]))
    if not edit.texts:
        return method

    def chosen(self: Any, *inputs: Any, **options: Any) -> Any:
        same = all(getattr(self, name, None) == text for name, text in edit.texts)
        return (method if same else original)(self, *inputs, **options)

    chosen.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return chosen


def _like(original: Any, made: Any) -> Any:
    """A function with the defaults, the names and the attributes of another."""
    made.__defaults__, made.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    for name in ("__annotations__", "__name__", "__qualname__", "__module__", "__doc__"):
        setattr(made, name, getattr(original, name))
    made.__dict__.update(original.__dict__)
    return made


def _wrapped(original: Any, inner: Any) -> Any:
    """A function in the wrappers of another: each the same code, around the new function in place of the old."""
    around = getattr(original, "__wrapped__", None)
    if around is None:
        return inner
    within = _wrapped(around, inner)
    cells = original.__closure__ or ()
    if not any(cell.cell_contents is around for cell in cells):
        raise ValueError(f"the decorator of {original.__qualname__} does not say what it calls")
    closure = tuple(CellType(within) if cell.cell_contents is around else cell for cell in cells)
    made = FunctionType(original.__code__, original.__globals__, original.__name__, None, closure)
    _like(original, made).__wrapped__ = within
    return made


_kinds: dict[Any, type] = {}


def _edited(theirs: type, edits: tuple[Edit, ...]) -> type:
    """A class with edited methods; without any, that of a Sequential."""
    if (theirs, edits) not in _kinds:
        methods = _methods(theirs)
        place: dict[str, Any] = {edit.name: _compiled(methods[edit.name], edit) for edit in edits} or {"forward": _walk}
        for function in (act, add_act, sums):
            place[f"_normops_{function.__name__}"] = staticmethod(function)
        _kinds[theirs, edits] = named_alike((theirs,), place, _edited, theirs, edits)
    return _kinds[theirs, edits]
