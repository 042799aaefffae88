"""Sources of methods, edited so that norms can do what stands around them; syntax in, syntax out.

    self.act(self.norm(x))                               self._normops_act(self.norm, x, self.act)
    h = self.norm(h); h = F.relu(h)                      h = self._normops_act(self.norm, h, F.relu)
    out = self.bn(out); out += x; out = self.relu(out)   out = self._normops_add_act(self.bn, out, x, self.relu)
    h = x + y; r = h; h = self.norm(h)                   h, r = self._normops_sums(self.norm, x, y)

Nothing is decided here about what a name stands for: the functions that are called instead look at what they get, and
do the same as before where it is no norm or activation of ours.  Only statements that follow one another are joined,
so that nothing moves past what may look at it or change it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

SUM = "_normops_unused_sum"


class Pruned(ast.NodeTransformer):
    """Without the branches that are never taken; `constant`: what a test is, where it will always be that."""

    def __init__(self, constant: Callable[[ast.expr], bool | None]) -> None:
        self.constant = constant

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        known = self.constant(node.test)
        return node if known is None else (node.body if known else node.orelse) or ast.Pass()


class Editor:
    """`norms`: names in self of those that may do more; `acts`: the name of the activation that a call is of, if it is
    of one.  `found` is what was joined, by the norm's name."""

    def __init__(self, norms: set[str], acts: Callable[[ast.Call], str | None]) -> None:
        self.norms, self.acts = norms, acts
        self.found: dict[str, str] = {}
        self.copies: set[tuple[str, str]] = set()

    def edit(self, tree: ast.FunctionDef) -> None:
        for node in ast.walk(tree):
            target, value = _assigned(node)
            if target is not None and isinstance(value, ast.Name):
                self.copies |= {(target, value.id), (value.id, target)}
        tree.body = self.block(tree.body)

    def norm(self, node: ast.AST | None) -> str | None:
        """The name of a norm that a call is of, with x alone."""
        if not (isinstance(node, ast.Call) and is_self(node.func) and len(node.args) == 1 and not node.keywords):
            return None
        name: str = node.func.attr  # type: ignore[attr-defined]
        return name if name in self.norms and not isinstance(node.args[0], ast.Starred) else None

    def activation(self, node: ast.AST | None) -> str | None:
        """The name of the activation that a call is of, with one input."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            return None
        return self.acts(node) if all(isinstance(k.value, ast.Constant) and k.arg for k in node.keywords) else None

    # Expressions

    def expression(self, node: ast.expr) -> ast.expr:
        """act(norm(x)), act(norm(x) + e) and norm(a + b), wherever they stand."""
        editor = self

        class Inside(ast.NodeTransformer):
            def visit_Call(self, node: ast.Call) -> ast.AST:
                self.generic_visit(node)
                return editor.joined(node)

            def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
                return node

        edited: ast.expr = Inside().visit(node)
        return edited

    def joined(self, node: ast.Call) -> ast.expr:
        name = self.activation(node)
        inner: Any = node.args[0] if name is not None else None
        if name is not None and (norm := self.norm(inner)) is not None:
            self.found[norm] = f"activation {name}"
            return _call("act", inner.func, inner.args[0], act=node)
        if name is not None and isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add):
            sides: list[Any] = [inner.left, inner.right]
            for call, other in (sides, reversed(sides)):
                if (norm := self.norm(call)) is not None and not self.touches([other], call) and (
                    call is inner.left or not (_calls(other) and _calls(call.args[0]))  # in the order they were in
                ):
                    self.found[norm] = f"post_add, activation {name}"
                    return _call("add_act", call.func, call.args[0], other, act=node)
        if (norm := self.norm(node)) is not None:
            total = node.args[0]
            if isinstance(total, ast.BinOp) and isinstance(total.op, ast.Add):
                self.found[norm] = "pre_add"
                pair = _call("sums", node.func, total.left, total.right)
                return ast.Subscript(pair, ast.Constant(0), ast.Load())
        return node

    # Statements

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        for statement in body:
            for part in ("body", "orelse", "finalbody"):
                inner = getattr(statement, part, None)
                if isinstance(inner, list) and not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                    setattr(statement, part, self.block(inner))
            if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)) and statement.value is not None:
                statement.value = self.expression(statement.value)
        out: list[ast.stmt] = []
        while body:
            out += self.statements(body)
        return out

    def statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """Take one statement, or several that are joined, from the front."""
        first, rest = body[0], body[1:]
        v, value = _assigned(first)
        if v is None or value is None or not rest:
            return [body.pop(0)]
        call: Any = value
        norm = self.norm(value)
        if norm is not None:
            acted = self.acted(rest[0], v)
            if acted is not None:
                self.found[norm] = f"activation {acted[0]}"
                del body[:2]
                return [_again(rest[0], _call("act", call.func, call.args[0], act=acted[1]))]
            for i, statement in enumerate(rest[:-1]):
                other = _added(statement, v)
                acted = None if other is None else self.acted(rest[i + 1], v)
                if other is not None and acted is not None and not self.touches([*rest[:i], other], value):
                    self.found[norm] = f"post_add, activation {acted[0]}"
                    place = isinstance(statement, ast.AugAssign)
                    total = _call("add_act", call.func, _load(v), other, act=acted[1], inplace=place)
                    del body[: i + 3]
                    return [_assign(v, call.args[0]), *rest[:i], _again(rest[i + 1], total)]
                if _mentions(statement, v) or not isinstance(statement, (ast.Assign, ast.If)) or _leaves(statement):
                    break
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            # h = x + y; [residual = h;] h = self.norm(h)
            copy, source = _assigned(rest[0])
            kept = copy if isinstance(source, ast.Name) and source.id == v and copy != v and len(rest) > 1 else None
            at = int(kept is not None)
            target, called = _assigned(rest[at])
            norm, call = self.norm(called), called
            if norm is not None and target is not None and target != kept and _is(call.args[0], v):
                names = [target, kept or (v if target != v else SUM)]
                pair = _call("sums", call.func, value.left, value.right)
                self.found[norm] = "pre_add"
                del body[: at + 2]
                sums: list[ast.stmt] = [ast.Assign([ast.Tuple([_store(n) for n in names], ast.Store())], pair)]
                return sums + ([_assign(v, _load(kept))] if kept and target != v else [])
        return [body.pop(0)]

    def acted(self, statement: ast.stmt, v: str) -> tuple[str, ast.Call] | None:
        """The activation of ``v = act(v)`` or ``return act(v)``, and its call."""
        target, value = _assigned(statement)
        call: Any = value if target == v else statement.value if isinstance(statement, ast.Return) else None
        name = self.activation(call)
        return (name, call) if name is not None and _is(call.args[0], v) else None

    def touches(self, nodes: list[Any], norm: Any) -> bool:
        """Whether these may change what a norm is called with: by its names, or those that it was copied to."""
        names = {n.id for n in ast.walk(norm.args[0]) if isinstance(n, ast.Name)} - {"self"}
        while more := {b for a, b in self.copies if a in names} - names:
            names |= more
        alone = all(isinstance(node, ast.Name) for node in nodes)
        return not alone and any(_mentions(node, name) for node in nodes for name in names)


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _assigned(statement: ast.AST) -> tuple[str | None, ast.expr | None]:
    """v and value of ``v = value``."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    return None, None


def _added(statement: ast.stmt, v: str) -> ast.expr | None:
    """e of ``v += e``, ``v = v + e`` and ``v = e + v``."""
    if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
        same = isinstance(statement.target, ast.Name) and statement.target.id == v
        return statement.value if same and not _mentions(statement.value, v) else None
    target, value = _assigned(statement)
    if target == v and isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        for mine, other in ((value.left, value.right), (value.right, value.left)):
            if isinstance(mine, ast.Name) and mine.id == v and not _mentions(other, v):
                return other
    return None


def _mentions(node: ast.AST, v: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == v for n in ast.walk(node))


def _load(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _store(name: str) -> ast.expr:
    return ast.Name(name, ast.Store())


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([_store(name)], value)


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _calls(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Call) for n in ast.walk(node))


def _leaves(node: ast.AST) -> bool:
    """Whether control may go elsewhere than to the next statement."""
    away = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom, ast.Await, ast.Assert)
    return any(isinstance(n, away) for n in ast.walk(node))


def _again(statement: Any, value: ast.expr) -> ast.stmt:
    """A statement with another value."""
    statement.value = value
    return statement  # type: ignore[no-any-return]


def _call(function: str, *arguments: ast.expr, act: ast.Call | None = None, inplace: bool = False) -> ast.Call:
    """A call of one of our functions; `act`: that of an activation, whose function and options are handed over."""
    options: list[ast.keyword] = []
    if act is not None:
        arguments = (*arguments, act.func)
        options = [ast.keyword(k.arg, k.value) for k in act.keywords]
    if inplace:
        options.append(ast.keyword("_inplace", ast.Constant(True)))
    return ast.Call(ast.Attribute(_load("self"), f"_normops_{function}", ast.Load()), list(arguments), options)
