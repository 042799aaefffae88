"""The architecture, read from the source: nn → functional → autograd → launch → plan → { schedule → layout , kernels }.

A module imports only what stands to its right.  Imports inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From right to left; a module may import modules of the rows above its own.
LAYERS = (
    {"kernels", "layout", "gpus", "activations", "compiled", "counters", "faults"},
    {"tile", "norm"},
    {"schedule"},
    {"ticketing", "views", "walks"},
    {"plan"},
    {"plan_forward", "plan_backward", "reference", "rules"},
    {"launch", "native"},
    {"calls"},
    {"operators"},
    {"sharding"},
    {"traced"},
    {"autograd"},
    {"functional"},
    {"nn"},
    {"adopting", "editing"},
    {"fusing"},
    {"conversion"},
    {"__init__"},
    {"virtual", "testing"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Where less than the order allows is allowed: everything but the standard library that a module may import.
ONLY = {
    "layout": set(),
    "gpus": set(),
    "norm": {"torch", ".layout"},
    "tile": {".layout"},
    "schedule": {".gpus", ".layout", ".tile"},
    "ticketing": {".gpus", ".layout", ".schedule", ".tile"},
    "walks": {".gpus", ".layout", ".schedule", ".tile"},
    "activations": {"torch"},
    "reference": {"torch", ".activations", ".norm"},
    "rules": {"torch", ".activations", ".norm"},
    "views": {".kernels", ".layout", ".schedule", ".tile"},
    "plan": {
        "torch", "triton", ".gpus", ".kernels", ".layout", ".norm", ".schedule", ".ticketing", ".tile", ".views",
        ".walks",
    },
    "plan_forward": {
        "torch", "triton", ".gpus", ".layout", ".norm", ".plan", ".schedule", ".ticketing", ".tile", ".views",
        ".walks",
        ".kernels",
    },
    "plan_backward": {
        "torch", "triton", ".gpus", ".layout", ".norm", ".plan", ".schedule", ".ticketing", ".tile", ".views",
        ".walks",
        ".kernels",
    },
    "counters": {"torch"},
    "compiled": {"triton"},
    "launch": {"torch", ".compiled", ".counters", ".norm", ".plan", ".kernels"},
    "editing": set(),
    "native": {"torch", ".activations", ".norm", ".reference", ".rules"},
    "faults": {"torch"},
    "calls": {
        "numpy", "torch", "triton", ".activations", ".compiled", ".faults", ".gpus", ".launch", ".layout", ".native",
        ".norm", ".plan_forward", ".plan_backward", ".rules", ".schedule", ".views",
    },
}

NORMS = ("batch_norm", "layer_norm", "instance_norm", "group_norm", "rms_norm")
SPELLINGS = NORMS + tuple(norm.replace("_", "") for norm in NORMS)

MODULES = sorted(p for p in (ROOT / "normops").rglob("*.py") if "kernels" not in p.relative_to(ROOT / "normops").parts)
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def layer(path: Path) -> str:
    """The name of a module of normops, or of the subpackage that it belongs to."""
    return path.relative_to(ROOT / "normops").with_suffix("").parts[0]


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The dotted name that `from … import` starts from."""
    if not node.level:
        return node.module or ""
    package = ("normops", *path.relative_to(ROOT / "normops").parent.parts)
    base = package[: len(package) - node.level + 1]
    return ".".join((*base, node.module) if node.module else base)


def imports(path: Path) -> set[str]:
    """Names of top-level packages; modules of normops as `.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = absolute(path, node)
            found |= {f"normops.{alias.name}" for alias in node.names} if source == "normops" else {source}
    return {f".{name.split('.')[1]}" if name.startswith("normops.") else name.split(".")[0] for name in found}


def outside(found: set[str]) -> set[str]:
    return {name for name in found if name not in sys.stdlib_module_names}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_import_only_to_their_right(path: Path) -> None:
    name = layer(path)
    assert name in RANK, f"{name} has no place in the layers: give it one in LAYERS"
    found = outside(imports(path)) - {f".{name}"}
    assert "normops" not in found, "import the module that is meant, not the package"
    unknown = {n for n in found if n.startswith(".") and n[1:] not in RANK}
    assert not unknown, f"{name} imports {sorted(unknown)}, which have no place in LAYERS"
    left = {n for n in found if n.startswith(".") and RANK[n[1:]] >= RANK[name]}
    assert not left, f"{name} imports {sorted(left)}, not to its right"
    if name in ONLY:
        assert found <= ONLY[name], f"{name} imports {sorted(found - ONLY[name])}"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_kernels_import_only_triton_and_siblings(path: Path) -> None:
    """And what a bundle of values is declared with."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] == "triton" for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            sibling = node.level == 1
            outside = (node.module or "").split(".")[0] in ("triton", "typing")
            assert sibling or (node.level == 0 and outside), ast.unparse(node)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_kernel_is_named_after_a_norm(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [path.stem] + [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    named = [name for name in names if any(norm in name.lower() for norm in SPELLINGS)]
    assert not named, f"named after a norm: {named}"


def test_something_was_read() -> None:
    assert MODULES and KERNELS


@pytest.mark.parametrize("path", [p for p in KERNELS if p.stem != "__init__"], ids=lambda p: p.stem)
def test_kernels_pass_no_bare_strings(path: Path) -> None:
    """Before Triton 3.7 a jit function takes strings only as constexpr values that have a name; assembly is no such."""
    values: list[ast.expr] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) not in ("tl.constexpr", "tl.inline_asm_elementwise"):
            values += node.args
        if isinstance(node, ast.FunctionDef):
            values += node.args.defaults
    bare = [v for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    assert not bare, [(v.lineno, v.value) for v in bare]


@pytest.mark.parametrize("path", [p for p in KERNELS if p.stem != "__init__"], ids=lambda p: p.stem)
def test_kernels_declare_no_constant_in_a_loop(path: Path) -> None:
    """An unrolled loop declares it once for each turn, and the compiler takes only the first; the interpreter all."""
    loops = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.For | ast.While)]
    found = {n.lineno for loop in loops for n in ast.walk(loop) if isinstance(n, ast.AnnAssign)}
    assert not found, f"constants declared in a loop, lines {sorted(found)}: let a function take them as a parameter"
