"""What stands around a norm, done by its kernel: the activation behind it, a sum before or behind.

In ``nn.Sequential`` by what its modules are; elsewhere in the source of a module's methods, edited as a person would
(``editing``).  The edited methods belong to a class of its own, which the module gets; its children are what they were.
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import activations
from .editing import Editor, Pruned, is_self
from .nn import _Fused

_PLACE = "_normops_taken"
ANNOTATIONS = __future__.annotations.compiler_flag  # whether they are texts


@dataclass
class Taken:
    """What a module was, and what became of it."""

    kind: type
    attributes: dict[str, Any] = field(default_factory=dict)
    """Those that were set, as they were; None where they were not there."""
    norm: bool = True
    """A norm, or a module with one, whose forward was edited."""
    fused: list[str] = field(default_factory=list)
    reason: str = ""


def taken(module: Module) -> Taken | None:
    return module.__dict__.get(_PLACE)


def take(module: Module, state: Taken) -> None:
    module.__dict__[_PLACE] = state


class Done(torch.nn.Identity):
    """In the place of an activation that the norm before it does."""

    def __init__(self, activation: Module) -> None:
        super().__init__()
        self.__dict__["activation"] = activation  # not a child: names of modules stay what they were

    def extra_repr(self) -> str:
        return f"done: {self.__dict__['activation']!r}"


def _name(activation: Any) -> str | None:
    """The name of one of our activations."""
    try:
        name = activations.check(activation)
    except ValueError:
        return None
    return None if name == "identity" else name


def _hooked(module: Module) -> bool:
    return any(
        getattr(module, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _free(module: Any) -> bool:
    """Whether a norm may do something besides: it is converted, and does nothing yet."""
    return isinstance(module, _Fused) and taken(module) is not None and module.activation in (None, "identity")


def _activate(norm: Any, name: str) -> None:
    state = taken(norm)
    assert state is not None
    state.attributes.setdefault("activation", norm.__dict__.get("activation"))
    state.fused.append(f"activation {name}")
    norm.activation = name


def fuse(model: Module) -> None:
    """Fuse what can be in a converted model."""
    uses: dict[Module, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            if child is not None:
                uses[child] = uses.get(child, 0) + 1
    elsewhere = _elsewhere(model)
    for module in list(model.modules()):
        if getattr(type(module), "forward", None) is torch.nn.Sequential.forward:
            _fuse_sequential(module, uses)
        elif taken(module) is None and any(_free(child) for child in module._modules.values()):
            _fuse_methods(module, uses, elsewhere)


def _fuse_sequential(module: Module, uses: dict[Module, int]) -> None:
    for name, following in pairwise(list(module._modules)):
        norm, act = module._modules[name], module._modules[following]
        spelled = _name(act) if isinstance(act, Module) else None
        if norm is None or act is None or spelled is None or not _free(norm):
            continue
        state = taken(norm)
        assert state is not None
        if uses[norm] > 1:
            state.reason = "it is used in several places"
        elif _hooked(norm) or _hooked(act):
            state.reason = f"a hook looks between it and {following}"
        else:
            _activate(norm, spelled)
            module._modules[following] = Done(act)


def undo(model: Module) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, Done):
                activation: Module = child.__dict__["activation"]
                module._modules[name] = activation.train(child.training)
        state = taken(module)
        if state is not None:
            del module.__dict__[_PLACE]
            module.__class__ = state.kind
            for name, value in state.attributes.items():
                module.__dict__.pop(name, None)
                if value is not None:
                    module.__dict__[name] = value


# ------------------------------------------------------------------------------------------- what edited forwards call


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype


def post_added(norm: Any, x: Any, added: Any, activation: str) -> Any:
    """act(norm(x) + added), in the norm's kernel where both are alike."""
    if _alike(x, added):
        return norm(x, post_add=added)
    name, norm.activation = norm.activation, None
    try:
        total = norm(x) + added
    finally:
        norm.activation = name
    return activations.ACTIVATIONS[activation].function(total)


def pre_added(norm: Any, x: Any, added: Any) -> tuple[Any, Any]:
    """norm(x + added) and the sum, in the norm's kernel where both are alike."""
    if _alike(x, added):
        found: tuple[Any, Any] = norm(x, pre_add=added)
        return found
    total = x + added
    return norm(total), total


# ------------------------------------------------------------------------------------------------------------- methods


def _functions(kind: type) -> list[tuple[str, FunctionType]]:
    """What a class and its bases define in Python, up to torch.nn's own; those that hide others first."""
    bases = [b for b in kind.__mro__ if not b.__module__.startswith("torch.nn.modules")]
    members = [(name, _plain(value)) for base in bases for name, value in vars(base).items()]
    return [(name, value) for name, value in members if isinstance(value, FunctionType) and not name.startswith("__")]


def _plain(member: Any) -> Any:
    """The function of a property, or of a method without self."""
    return getattr(member, "fget", None) or getattr(member, "__func__", member)


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
    tree = _syntax(function)
    if tree is None:
        return "has no source to be read"
    if inspect.unwrap(function).__closure__:
        return "calls super(), or what is around it"
    if tree.name != name or not tree.args.args or tree.args.args[0].arg != "self":
        return "is made by another function"
    return ""


def _resolved(node: ast.AST, function: FunctionType) -> Any:
    """The object that a dotted name stands for in a function, where it is none of its own variables."""
    if isinstance(node, ast.Name):
        inner: Any = inspect.unwrap(function)
        return None if node.id in inner.__code__.co_varnames else inner.__globals__.get(node.id)
    return getattr(_resolved(node.value, function), node.attr, None) if isinstance(node, ast.Attribute) else None


def _activation(module: Module, function: FunctionType, node: ast.Call) -> str | None:
    """The name of the activation that a call is of: a child's, an attribute's, or a function's."""
    given: Any
    if is_self(node.func):
        given = getattr(module, node.func.attr, None)  # type: ignore[attr-defined]
        if isinstance(given, Module) and _hooked(given):
            return None
    else:
        given = _resolved(node.func, function)
    options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    if len(options) < len(node.keywords):
        return None
    options.pop("inplace", None)
    if given is torch.nn.functional.gelu and options.pop("approximate", "none") == "tanh":
        return None if options else "gelu_tanh"
    return None if options or isinstance(given, type) or not callable(given) else _name(given)


def _constant(module: Module, test: ast.expr) -> bool | None:
    """What a comparison of a text of the module with another is: such texts say which kind of module it is."""
    match test:
        case ast.Compare(left=left, ops=[ast.Eq()], comparators=[ast.Constant(value=str(text))]) if is_self(left):
            value = getattr(module, left.attr, None)  # type: ignore[attr-defined]
            return value == text if isinstance(value, str) else None
    return None


def _fuse_methods(module: Module, uses: dict[Module, int], elsewhere: set[str]) -> None:
    norms: dict[str, Any] = {name: child for name, child in module._modules.items() if _free(child)}
    functions = _functions(type(module))
    methods = dict(reversed(functions))
    if not any(inspect.unwrap(function).__closure__ for function in methods.values()):
        functions = list(methods.items())  # none calls super(): what is hidden is never called
    prune, trees = Pruned(partial(_constant, module)), {}
    for _, function in functions:
        if (found := _syntax(function)) is not None:
            trees[function] = prune.visit(copy.deepcopy(found))
    asked = {name: Counter[str]() for name, _ in functions}
    for name, function in functions:
        if function in trees:
            asked[name].update(text for node in ast.walk(trees[function]) for text in _asked(node))
    called, walks = sum(asked.values(), Counter[str]()), _walks(asked)
    for name, norm in norms.items():
        reasons = {
            "it has a hook": _hooked(norm), "it is used in several places": uses[norm] > 1,
            "it is called more than once": called[name] > 1, "another module calls it": name in elsewhere,
            "its module goes through all that it has": walks,
        }  # fmt: skip
        taken(norm).reason = next((reason for reason, holds in reasons.items() if holds), "")  # type: ignore[union-attr]
    free = {name for name, norm in norms.items() if not taken(norm).reason}  # type: ignore[union-attr]
    edited: dict[str, str] = {}
    joined: dict[str, str] = {}
    obstacle = ""
    for name, function in methods.items():
        why = "is the instance's own" if name in module.__dict__ else _obstacle(name, function)
        if not isinstance(inspect.getattr_static(type(module), name), FunctionType):
            why = "is no method"
        tree = trees.get(function)
        if why or tree is None:
            obstacle = f"{name} {why}" if name == "forward" else obstacle
            continue
        editor = Editor(free - joined.keys(), partial(_activation, module, function))
        tree.body = editor.block(tree.body)
        if editor.found:
            joined.update(editor.found)
            edited[name] = ast.unparse(ast.fix_missing_locations(tree if tree.decorator_list else _bare(tree)))
    try:
        kind = _edited(type(module), tuple(sorted(edited.items())))
    except Exception as error:  # of decorators and annotations, which may ask for anything
        joined, obstacle = {}, f"its source does not run again: {error}"
    for name in free - joined.keys():
        taken(norms[name]).reason = obstacle  # type: ignore[union-attr]
    if not joined:
        return
    take(module, Taken(type(module), norm=False))
    module.__class__ = kind
    for name, what in joined.items():
        if what.startswith("p"):
            taken(norms[name]).fused.append(what.split()[0])  # type: ignore[union-attr]
        if what != "pre_add":
            _activate(norms[name], what.removeprefix("post_add "))


def _walks(asked: dict[str, Counter[str]]) -> bool:
    """Whether a forward, or a method that it calls, goes through all children; `asked`: what each asks of self."""
    reached, more = set[str](), {"forward"}
    while more:
        reached |= more
        more = {name for method in more & asked.keys() for name in asked[method]} - reached
    return bool(reached & {"children", "named_children", "modules", "named_modules", "_modules"})


def _elsewhere(model: Module) -> set[str]:
    """Names of what modules of a model call in something that is not they: ``block.norm(x)``."""
    kinds = {type(module) for module in model.modules()}
    trees = {_syntax(function) for kind in kinds for _, function in _functions(kind)} - {None}
    found: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)):  # type: ignore[arg-type]
        match node:
            case ast.Call(func=ast.Attribute(attr=name) as called) if not is_self(called):
                found.add(name)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]):
                found.add(name)
    return found


def _asked(node: ast.AST) -> list[str]:
    """The name that is asked of self: as an attribute, or in a text, of getattr say."""
    match node:
        case ast.Attribute(attr=name) if is_self(node):
            return [name]
        case ast.Constant(value=str(name)):
            return [name]
    return []


def _bare(tree: ast.FunctionDef) -> ast.FunctionDef:
    """A definition without annotations and defaults, which are those of the original."""
    tree.returns = None
    a = tree.args
    for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg):
        if argument is not None:
            argument.annotation = None
    a.defaults = [ast.Constant(None) for _ in a.defaults]
    a.kw_defaults = [None if d is None else ast.Constant(None) for d in a.kw_defaults]
    return tree


def _compiled(original: FunctionType, source: str, place: str) -> Any:
    """A method of an edited source: decorated anew, or with the annotations and defaults of the original."""
    inner: Any = inspect.unwrap(original)
    flags = inner.__code__.co_flags & ANNOTATIONS
    found: dict[str, Any] = {}
    exec(compile(source, place, "exec", flags, dont_inherit=True), inner.__globals__, found)
    method = found[original.__name__]
    if not hasattr(original, "__wrapped__"):
        method.__defaults__, method.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
        method.__annotations__, method.__qualname__ = original.__annotations__, original.__qualname__
        method.__module__, method.__doc__ = original.__module__, original.__doc__
    return method


_kinds: dict[Any, type] = {}


def _edited(theirs: type, sources: tuple[tuple[str, str], ...]) -> type:
    """A class with edited methods."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # the class has no place of its own to be found in
        return _again, (theirs, sources), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    if (theirs, sources) not in _kinds:
        place: dict[str, Any] = {
            "__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "__reduce_ex__": __reduce_ex__,
            "_normops_pre_added": staticmethod(pre_added), "_normops_post_added": staticmethod(post_added),
        }  # fmt: skip
        methods = dict(reversed(_functions(theirs)))
        for name, source in sources:
            where = f"<{theirs.__qualname__}.{name}, edited by normops>"
            place[name] = _compiled(methods[name], source, where)
        _kinds[theirs, sources] = type(theirs.__name__, (theirs,), place)
    return _kinds[theirs, sources]


def _again(theirs: type, sources: tuple[tuple[str, str], ...]) -> Any:
    kind: Any = _edited(theirs, sources)
    return kind.__new__(kind)
