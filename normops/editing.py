"""Sources of methods, edited so that norms do what stands around them; syntax in, syntax out.

    self.relu(self.bn1(x))                          self.bn1(x)
    out = self.bn2(out); out += x; self.relu(out)   out = self.post_added(self.bn2, out, x, "relu")
    h = x + y; x = h; h = self.norm(h)              h, x = self.pre_added(self.norm, x, y)

Only statements that follow one another are joined, so that nothing moves past what may look at it.  Which of a norm's
names may be joined, and what an activation is called, says who edits.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any


class Pruned(ast.NodeTransformer):
    """Without the branches that are never taken; `constant`: what a test is, where it will always be that."""

    def __init__(self, constant: Callable[[ast.expr], bool | None]) -> None:
        self.constant = constant

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        known = self.constant(node.test)
        return node if known is None else (node.body if known else node.orelse) or ast.Pass()


class Editor:
    """`free`: names of norms in self that may do more; `activation`: the name of what a call is of, if that is one.
    `found` is what was joined, by the norm's name."""

    def __init__(self, free: set[str], activation: Callable[[ast.Call], str | None]) -> None:
        self.free, self.name_of = free, activation
        self.found: dict[str, str] = {}

    def norm(self, node: ast.AST | None) -> str | None:
        """The name of a norm that a call is of, with x alone."""
        if not (isinstance(node, ast.Call) and is_self(node.func) and len(node.args) == 1 and not node.keywords):
            return None
        name: str = node.func.attr  # type: ignore[attr-defined]
        fits = name not in self.found and not isinstance(node.args[0], ast.Starred) and name in self.free
        return name if fits else None

    def activation(self, node: ast.AST | None) -> tuple[str, ast.expr] | None:
        """The name of an activation that a call is of, and its argument."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            return None
        name = self.name_of(node)
        return None if name is None else (name, node.args[0])

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
        acted = self.activation(node)
        if acted is not None:
            name, inner = acted
            if (norm := self.norm(inner)) is not None:
                self.found[norm] = name
                return inner
            if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add):
                for call, other in ((inner.left, inner.right), (inner.right, inner.left)):
                    if (norm := self.norm(call)) is not None and not _touches([other], call):
                        self.found[norm] = f"post_add {name}"
                        return _call("post_added", call.func, call.args[0], other, ast.Constant(name))  # type: ignore[attr-defined]
        if (norm := self.norm(node)) is not None:
            inner = node.args[0]
            if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Add):
                self.found[norm] = "pre_add"
                pair = _call("pre_added", node.func, inner.left, inner.right)
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
        if v is None or value is None:
            return [body.pop(0)]
        norm = self.norm(value)
        if norm is not None:
            acted = self.acted(rest[0], v) if rest else None
            if acted is not None:
                name, last = acted
                self.found[norm] = name
                del body[:2]
                return [first, *last]
            for i, statement in enumerate(rest):
                other = _added(statement, v)
                acted = self.acted(rest[i + 1], v) if other is not None and i + 1 < len(rest) else None
                if other is not None and acted is not None:
                    if _touches([*rest[:i], other], value):
                        break
                    name, last = acted
                    self.found[norm] = f"post_add {name}"
                    call: Any = value
                    total = _call("post_added", call.func, _load(v), other, ast.Constant(name))
                    del body[: i + 3]
                    return [_assign(v, call.args[0]), *rest[:i], _assign(v, total), *last]
                if _mentions(statement, v) or not isinstance(statement, (ast.Assign, ast.If, ast.Expr)):
                    break
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and rest:
            # h = x + y; [residual = h;] h = self.norm(h)
            kept, at = None, 0
            copy, source = _assigned(rest[0])
            if copy not in (None, v) and isinstance(source, ast.Name) and source.id == v and len(rest) > 1:
                kept, at = copy, 1
            target, call = _assigned(rest[at])
            norm = self.norm(call)
            argument = call.args[0] if norm is not None else None
            if norm is not None and isinstance(argument, ast.Name) and argument.id == v:
                pair = _call("pre_added", call.func, value.left, value.right)
                names = [_store(target or v), _store(kept or (v if target != v else "_"))]
                self.found[norm] = "pre_add"
                del body[: at + 2]
                joined: list[ast.stmt] = [ast.Assign([ast.Tuple(names, ast.Store())], pair)]
                return joined + ([_assign(v, _load(kept))] if kept and target != v else [])
        return [body.pop(0)]

    def acted(self, statement: ast.stmt, v: str) -> tuple[str, list[ast.stmt]] | None:
        """The activation of ``v = act(v)`` or ``return act(v)``, and what is left of that statement."""
        target, value = _assigned(statement)
        returned = statement.value if isinstance(statement, ast.Return) else None
        found = self.activation(value if target == v else returned)
        if found is None or not (isinstance(found[1], ast.Name) and found[1].id == v):
            return None
        return found[0], [ast.Return(_load(v))] if returned is not None else []


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
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


def _touches(nodes: list[Any], norm: Any) -> bool:
    """Whether a call among these may change, in place, what a norm is called with, and which is not made for it."""
    x = norm.args[0]
    names = set() if isinstance(x, ast.Call) else {n.id for n in ast.walk(x) if isinstance(n, ast.Name)}
    calls = [n for node in nodes for n in ast.walk(node) if isinstance(n, (ast.Call, ast.AugAssign))]
    return any(_mentions(call, name) for call in calls for name in names - {"self"})


def _mentions(node: ast.AST, v: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == v for n in ast.walk(node))


def _load(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _store(name: str) -> ast.expr:
    return ast.Name(name, ast.Store())


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([_store(name)], value)


def _call(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(_load("self"), f"_normops_{function}", ast.Load()), list(arguments), [])
