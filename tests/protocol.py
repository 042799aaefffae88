"""A ticketed launch as a model whose every order of steps can be searched, under a weak memory.

The model has no code of its own for the protocol: it runs the text of kernels/tickets.py and of `paired` in
kernels/stream.py or kernels/grad_stream.py, once for each of two threads of each program.  What these call in other
files is replaced by what it does to memory that programs share (``_forward``, ``_backward``).

*Threads.*  A scalar atomic is done by thread 0; a result that is used is handed on to the other thread, and that orders
nothing.  ``tl.debug_barrier`` is ``bar.sync``.  Assembly is what its text says, of each thread or of the first.  Of
blocks, each thread stores its half and loads all.

*Memory.*  Each thread has a view: which stores happened before what it does next.  A release puts the view into the
word, an acquire takes that of the word over, an atomic of any order hands on what the word had before (so chains of
read-modify-writes carry releases, as PTX's observation order does), a barrier joins the views of a program.  A load
of what is not in the view is an error, whatever it would have found: so there is no store buffer to model, and `.cg`
cannot help.  Loads of words may find old values: of these the first above n is kept, as it brings the smallest view,
and those up to n only keep a thread where it is.  A launch begins with empty views: its end orders everything.

Not modelled: scopes (all is `.gpu`), values read out of thin air (nothing is stored that depends on a load that races),
an old value found for ever (a thread that waits finds the newest in the end), programs whose threads do not go on.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from normops.ticketing import FIRST_STATE

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
THREADS = 2
END = -1
"""The place of a thread that has ended."""


class Barrier(NamedTuple):
    pass


class Number(NamedTuple):
    """The program's id: any that no other program has."""


class Atomic(NamedTuple):
    word: int
    action: str
    operand: int
    sem: str
    used: bool


class Load(NamedTuple):
    word: int
    sem: str


class Data(NamedTuple):
    """Each thread stores its half of a location, or loads all of it."""

    location: int
    stores: bool


Op = Barrier | Number | Atomic | Load | Data
Steps = Iterator[Op]


class Edit(NamedTuple):
    """A fault: other text for a piece of a file of kernels/."""

    file: str
    old: str
    new: str


def halves(location: int) -> int:
    """Its bits in a view."""
    return ((1 << THREADS) - 1) << THREADS * location


class Launch(NamedTuple):
    """What is launched: T tiles in units of n, with lead L."""

    tiles: int
    unit: int
    lead: int
    backward: bool = False
    ptx: bool = True

    @property
    def programs(self) -> int:
        return self.tiles + self.lead


# The kernels' text, as generators of steps.


class _Stepped(ast.NodeTransformer):
    """Jit functions to generators: each call that makes steps hands these on."""

    def __init__(self, makers: set[str]) -> None:
        self._makers = makers

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list = []
        for arg in node.args.args:
            arg.annotation = None
        self.generic_visit(node)
        node.body = [*ast.parse("if False: yield").body, *node.body]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr:
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith("tl.atomic_"):
            node.value.keywords.append(ast.keyword("used", ast.Constant(False)))
        self.generic_visit(node)
        return node

    def visit_While(self, node: ast.While) -> ast.While:
        """Python compiles the condition twice: one place for it."""
        self.generic_visit(node)
        leave = ast.If(ast.UnaryOp(ast.Not(), node.test), [ast.Break()], [])
        return ast.While(ast.Constant(True), [leave, *node.body], [])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        return ast.YieldFrom(node) if ast.unparse(node.func) in self._makers else node


def _atomic(action: str) -> Callable[..., Any]:
    def atomic(word: int, operand: int, sem: str, used: bool = True) -> Any:
        return (yield Atomic(word, action, operand, sem, used))

    return atomic


def _debug_barrier() -> Steps:
    yield Barrier()


def _program_id(axis: int) -> Any:
    return (yield Number())


_LOAD = re.compile(r"ld\.(\w+)\.gpu\.global\.b32 \$0, \[\$1\];")
_FIRST = re.compile(
    r".* mov\.u32 thread, %tid\.x; setp\.eq\.u32 first, thread, 0;"
    r" @first red\.(\w+)\.gpu\.global\.(\w+)\.u32 \[\$1\], (\$2|\d+);.*"
)


def _assembly(text: str, constraints: str, args: list[int], **_: Any) -> Any:
    if found := _LOAD.fullmatch(text):
        return (yield Load(args[0], found[1]))
    found = _FIRST.fullmatch(text)
    assert found, f"assembly that the model does not know: {text}"
    yield Atomic(args[0], found[2], args[1] if found[3] == "$2" else int(found[3]), found[1], False)


STEPS: dict[str, Callable[..., Any]] = {
    "debug_barrier": _debug_barrier, "program_id": _program_id, "atomic_add": _atomic("add"),
    "atomic_xchg": _atomic("exch"), "inline_asm_elementwise": _assembly,
}  # fmt: skip
"""What makes steps of triton.language."""


def _language(launch: Launch) -> SimpleNamespace:
    return SimpleNamespace(
        **STEPS, num_programs=lambda axis: launch.programs, cdiv=lambda n, d: -(-n // d), minimum=min, maximum=max,
        static_range=range, int32=None,
    )  # fmt: skip


def _data(launch: Launch) -> dict[str, range]:
    """Locations by what is stored there: a tile's sum, partial results and output, a unit's statistics."""
    numbers = {"part": launch.tiles, "out": launch.tiles, "stat": launch.tiles // launch.unit}
    if not launch.backward:
        numbers["sum"] = launch.tiles
    found, end = {}, 0
    for name, number in numbers.items():
        found[name] = range(end, end + number)
        end += number
    return found


def _forward(launch: Launch) -> dict[str, Callable[..., Any]]:
    """Functions that paired() of stream.py calls, with their own parameters; a tile is its number."""
    data = _data(launch)

    def read_input(o: Any, t: int, F: Any, KEEP: Any = None, write: bool = True) -> Steps:
        if o.pre is not None and write:
            yield Data(data["sum"][t], True)

    def load_pieces(ptr: Any, t: int, STRIDES: Any, F: Any, KEEP: Any = None, FIRST: int = 0, NUMBER: int = 0) -> Steps:
        if ptr == "sum":
            yield Data(data["sum"][t], False)

    def store_moments(o: Any, v: Any, t: int, block_a: int, chunk_s: int, steps: int, n0: int, F: Any) -> Steps:
        yield Data(data["part"][t], True)

    def finish_groups(
        o: Any, block: int, chunks: int, chunks_s: int, steps: int, n0: int, eps: Any, momentum: Any, F: Any
    ) -> Steps:
        for chunk in range(chunks):
            yield Data(data["part"][block * launch.unit + chunk], False)
        yield Data(data["stat"][block], True)

    def saved_statistics(o: Any, t: int, F: Any, SHARED: bool = False) -> Any:
        yield Data(data["stat"][t // launch.unit], False)
        return None, None

    def write_output(o: Any, v: Any, mean: Any, rstd: Any, t: int, F: Any, KEEP: Any = None) -> Steps:
        yield Data(data["out"][t], True)

    made = (read_input, load_pieces, store_moments, finish_groups, saved_statistics, write_output)
    return {made.__name__: made for made in made}


def _backward(launch: Launch) -> dict[str, Callable[..., Any]]:
    """As _forward(), of grad_stream.py."""
    data = _data(launch)

    def store_sums(o: Any, p1: Any, p0: Any, t: int, chunk: int, n0: int, F: Any) -> Steps:
        yield Data(data["part"][t], True)

    def merge_group(o: Any, block: int, chunks: int, n0: int, F: Any, AFFINE: bool = True) -> Steps:
        for chunk in range(chunks):
            yield Data(data["part"][block * launch.unit + chunk], False)
        yield Data(data["stat"][block], True)

    def given_sums(o: Any, t: int, rstd: Any, F: Any, SHARED: bool) -> Any:
        yield Data(data["stat"][t // launch.unit], False)
        return None, None

    def write_gradient(
        o: Any, d: Any, g: Any, dsum: Any, k1: Any, k0: Any, scale: Any, t: int, PIECE: int, F: Any, KEEP: Any = None
    ) -> Steps:
        yield Data(data["out"][t], True)

    return {made.__name__: made for made in (store_sums, merge_group, given_sums, write_gradient)}


def effects(launch: Launch) -> dict[str, Callable[..., Any]]:
    return _backward(launch) if launch.backward else _forward(launch)


def _read_only(launch: Launch) -> dict[str, Callable[..., Any]]:
    """What computes, or reads what nobody writes in a launch."""
    n = launch.unit
    found: dict[str, Callable[..., Any]] = {
        "numbered_tile": lambda i, *_: (i, i // n, 0, i % n), "extent": lambda axis, *_: (1, 1, 1, n)[axis],
    }  # fmt: skip
    if launch.backward:
        found |= {
            "read_gradient": lambda *_: None, "read_sum": lambda *_: None, "saved_statistics": lambda *_: (0.0, 0.0),
            "parameters": lambda *_: ([0.0], [0.0]), "gradient": lambda *_: (0.0, 0.0), "plus": lambda *_: 0.0,
            "tile_sums": lambda *_: (0.0, 0.0),
        }  # fmt: skip
    return found


def _functions(file: str, edits: Sequence[Edit]) -> list[ast.FunctionDef]:
    text = (KERNELS / file).read_text(encoding="utf-8")
    for edit in edits:
        if edit.file == file:
            assert text.count(edit.old) == 1, f"{file} has {text.count(edit.old)} times: {edit.old}"
            text = text.replace(edit.old, edit.new)
    return [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]


class Code:
    """One thread of a launch as places in its code: what it does there, and where it comes with which result."""

    def __init__(self, launch: Launch, edits: Sequence[Edit] = ()) -> None:
        self.launch = launch
        self.locations = sum(map(len, _data(launch).values()))
        file = "grad_stream.py" if launch.backward else "stream.py"
        functions = _functions("tickets.py", edits)
        functions += [f for f in _functions(file, edits) if f.name in ("paired", "apply", "chunk_of")]
        named = effects(launch)
        makers = {f.name for f in functions} | named.keys() | {f"tl.{name}" for name in STEPS}
        scope: dict[str, Any] = {"tl": _language(launch), "FIRST_STATE": FIRST_STATE}
        scope |= dict.fromkeys(("ANY", "EVICT_FIRST", "EVICT_LAST")) | _read_only(launch) | named
        module = ast.Module([_Stepped(makers).visit(f) for f in functions], [])
        exec(compile(ast.fix_missing_locations(module), file, "exec"), scope)
        self._paired = scope["paired"]
        self._o = SimpleNamespace(tickets=0, x="x", pre="pre", sum="sum")
        self._form = SimpleNamespace(
            PTX=launch.ptx, WIDTH_S=1, WIDTH_A=1, SUM=None, X=None, PIECES=1, BLOCK_K=1, SHARED_A=True, CLAMP_A=False,
        )  # fmt: skip
        self.ops: list[Op] = []
        self._histories: list[tuple[int, ...]] = []
        self._places: dict[Any, int] = {}
        self._after: dict[tuple[int, int], int] = {}

    def _play(self, history: tuple[int, ...]) -> int:
        lead, more = self.launch.lead, () if self.launch.backward else (None, None)
        thread = self._paired(self._o, 0, lead, *more, self._form)
        try:
            op = next(thread)
            for result in history:
                op = thread.send(result)
        except StopIteration:
            return END
        place, frame = [], thread
        while frame is not None:  # where it is and its local names, of which follows what it does next
            place.append((frame.gi_code.co_name, frame.gi_frame.f_lasti, repr(frame.gi_frame.f_locals)))
            frame = frame.gi_yieldfrom
        number = self._places.setdefault(tuple(place), len(self.ops))
        if number == len(self.ops):
            self.ops.append(op)
            self._histories.append(history)
        return number

    @cached_property
    def start(self) -> int:
        return self._play(())

    def after(self, place: int, result: int = 0) -> int:
        key = place, result
        if key not in self._after:
            self._after[key] = self._play((*self._histories[place], result))
        return self._after[key]
