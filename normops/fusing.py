"""What stands around a norm, done by its kernel: the activation behind it, a sum before or behind.

In ``nn.Sequential`` by what its modules are; elsewhere in the source of a module's methods, edited as a person would
(``editing``).  The edited methods belong to a class of its own, which the module gets; its children are what they were.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from dataclasses import dataclass, field
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import activations
from .editing import Editor, is_self
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
    for module in list(model.modules()):
        if getattr(type(module), "forward", None) is torch.nn.Sequential.forward:
            _fuse_sequential(module, uses)
        elif taken(module) is None and any(_free(child) for child in module._modules.values()):
            _fuse_methods(module, uses)


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


def _methods(kind: type) -> dict[str, FunctionType]:
    """What a class and its bases define in Python, up to torch.nn's own."""
    found: dict[str, FunctionType] = {}
    for base in kind.__mro__:
        if base is Module or base.__module__.startswith("torch.nn.modules"):
            break
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and not name.startswith("__"):
                found.setdefault(name, value)
    return found


def _syntax(name: str, function: FunctionType) -> ast.FunctionDef | str:
    """The definition of a method, or why it cannot be edited."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return "has no source to be read"
    found = tree.body[0]
    if inspect.unwrap(function).__closure__:
        return "calls super(), or what is around it"
    if not isinstance(found, ast.FunctionDef) or found.name != name:
        return "is made by another function"
    return found if found.args.args and found.args.args[0].arg == "self" else "has no self"


def _resolved(node: ast.AST, names: dict[str, Any]) -> Any:
    """The object that a dotted name stands for."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    return getattr(_resolved(node.value, names), node.attr, None) if isinstance(node, ast.Attribute) else None


def _activation(module: Module, names: dict[str, Any], node: ast.Call) -> str | None:
    """The name of the activation that a call is of: a child's, an attribute's, or a function's."""
    given: Any
    if is_self(node.func):
        given = getattr(module, node.func.attr, None)  # type: ignore[attr-defined]
        if isinstance(given, Module) and _hooked(given):
            return None
    else:
        given = _resolved(node.func, names)
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


def _fuse_methods(module: Module, uses: dict[Module, int]) -> None:
    methods = _methods(type(module))
    trees = {name: _syntax(name, function) for name, function in methods.items()}
    norms = {name for name, child in module._modules.items() if _free(child)}
    edited: dict[str, str] = {}
    joined: dict[str, str] = {}
    for name, tree in trees.items():
        if isinstance(tree, str) or name in module.__dict__:  # the instance has another one
            continue
        editor = Editor(
            lambda norm: norm in norms and norm not in joined and uses[module._modules[norm]] == 1,  # type: ignore[index]
            lambda node, function=methods[name]: _activation(module, _names(function), node),  # type: ignore[misc]
            lambda test: _constant(module, test),
        )
        tree.body = editor.block(tree.body)
        if editor.found:
            joined.update(editor.found)
            edited[name] = ast.unparse(ast.fix_missing_locations(tree if tree.decorator_list else _bare(tree)))
    calls = _calls(edited, trees)
    for norm in list(joined):
        if calls.get(norm, 0) != 1 or _hooked(module._modules[norm]):  # type: ignore[arg-type]
            for each in norms:
                _reason(module._modules[each], f"{norm} is called more than once, or has a hook")
            return
    for norm in norms - set(joined):
        why = [f"{name} {tree}" for name, tree in trees.items() if isinstance(tree, str) and name == "forward"]
        _reason(module._modules[norm], why[0] if why else "")
    if not joined:
        return
    try:
        kind = _edited(type(module), tuple(sorted(edited.items())))
    except Exception as error:  # of decorators and annotations, which may ask for anything
        for norm in norms:
            _reason(module._modules[norm], f"its source does not run again: {error}")
        return
    take(module, Taken(type(module), norm=False))
    module.__class__ = kind
    for norm, what in joined.items():
        child = module._modules[norm]
        if what == "pre_add":
            taken(child).fused.append(what)  # type: ignore[union-attr, arg-type]
        else:
            _activate(child, what.removeprefix("post_add "))
            if what.startswith("post_add"):
                taken(child).fused.insert(-1, "post_add")  # type: ignore[union-attr, arg-type]


def _reason(norm: Any, text: str) -> None:
    state = taken(norm)
    if state is not None and text:
        state.reason = text


def _calls(edited: dict[str, str], trees: dict[str, ast.FunctionDef | str]) -> dict[str, int]:
    """How often each attribute of self is mentioned."""
    found: dict[str, int] = {}
    for name, tree in trees.items():
        source: ast.AST | None = ast.parse(edited[name]) if name in edited else None if isinstance(tree, str) else tree
        for node in ast.walk(source) if source is not None else ():
            if is_self(node):
                found[node.attr] = found.get(node.attr, 0) + 1  # type: ignore[attr-defined]
    return found


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


def _names(function: FunctionType) -> dict[str, Any]:
    """What a method's global names stand for."""
    found: dict[str, Any] = inspect.unwrap(function).__globals__
    return found


def _compiled(original: FunctionType, source: str, place: str) -> Any:
    """A method of an edited source: decorated anew, or with the annotations and defaults of the original."""
    flags = inspect.unwrap(original).__code__.co_flags & ANNOTATIONS
    found: dict[str, Any] = {}
    exec(compile(source, place, "exec", flags, dont_inherit=True), _names(original), found)
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
        for name, source in sources:
            where = f"<{theirs.__qualname__}.{name}, edited by normops>"
            place[name] = _compiled(_methods(theirs)[name], source, where)
        _kinds[theirs, sources] = type(theirs.__name__, (theirs,), place)
    return _kinds[theirs, sources]


def _again(theirs: type, sources: tuple[tuple[str, str], ...]) -> Any:
    kind: Any = _edited(theirs, sources)
    return kind.__new__(kind)
