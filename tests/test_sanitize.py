"""No kernel of normops reads or writes where it must not, and `sanitize` would say so of any kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from normops import calls
from normops import functional as F
from normops.kernels import finish, grad_stream, memory, norm, resident, tile
from normops.testing import Fault, plans, sanitize
from tests.test_values import NORMS, Norm
from tests.tolerance import ACTIVATIONS, ENGINES, FORMATS, engine, laid_out

pytestmark = pytest.mark.skipif(not calls.INTERPRETED, reason="works in the interpreter: TRITON_INTERPRET=1")

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ODD = ((2, 6, 1, 17), (1, 2, 13, 17), (3, 34, 1, 5), (5, 2, 3, 7), (2, 10, 3, 3))
"""Primes, extents of 1, and one more than a power of 2."""


@pytest.fixture
def poison() -> None:
    """Fresh memory stays as it comes: what the other tests write to it would count as written."""


def run(norm: Norm, shape: tuple[int, ...], layout: str, which: str, turn: int) -> None:
    """One call and its backward; gradients come in another layout than x."""
    dtype, activation = DTYPES[turn % 4], list(ACTIVATIONS)[turn % 9]
    x = laid_out(shape, layout, dtype, CPU).requires_grad_()
    sizes = norm.weight(shape)
    w = torch.ones(sizes, dtype=DTYPES[(turn + turn // 4) % 4], requires_grad=True)
    b = torch.ones_like(w).requires_grad_() if norm.bias else None
    options: dict[str, Any] = {"activation": activation}
    if turn % 3 == 1:
        options["pre_add"] = laid_out(shape, ("contiguous", "permuted")[turn % 2], dtype, CPU).requires_grad_()
    if turn % 2:
        options["post_add"] = torch.randn(shape[-1:]).to(dtype).expand(shape).requires_grad_()
    if norm.running:
        options |= {"rm": torch.zeros(shape[1]), "rv": torch.ones(shape[1]), "train": turn % 7 > 0}
    with engine(which), plans() as planned, sanitize(identical=True) as looked:
        y = norm.call(x, norm.given(w), None if b is None else norm.given(b), **options)
        outs = y if isinstance(y, tuple) else (y,)
        dys = [torch.randn(()).to(dtype).expand(shape), laid_out(shape, "sliced", dtype, CPU)][: len(outs)]
        leaves = [t for t in (x, w, b, options.get("pre_add"), options.get("post_add")) if t is not None]
        torch.autograd.grad(outs, leaves, dys[::-1] if turn % 5 else dys)
    assert looked.launches == sum(len(p.plan.launches) for p in planned) >= 2
    assert looked.elements > 3 * x.numel()
    clamped = any(launch.form.CLAMP_K for p in planned for launch in p.plan.launches)
    assert clamped or not looked.repeated, "only blocks that overlap by plan write what another program wrote"


@pytest.mark.parametrize("which", ENGINES)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.name)
def test_no_norm_makes_a_faulty_access(norm: Norm, which: str) -> None:
    for layout in FORMATS:
        turn = NORMS.index(norm) + 3 * FORMATS.index(layout) + 7 * ENGINES.index(which)
        shape = ODD[turn % len(ODD)]
        run(norm, (2, 6, 1, 3, 5) if layout == "channels_last_3d" else shape, layout, which, turn)


ROWS = [*product([(3, 1001), (17, 13), (131, 7), (2, 1)], ["resident"]),
        ((3, 1001), "ticketed"), ((3, 1001), "split"), ((67, 29), "split")]  # fmt: skip


@pytest.mark.parametrize(("shape", "which"), ROWS, ids=str)
@pytest.mark.parametrize("name", ["layer", "adaln"])
def test_no_row_makes_a_faulty_access(name: str, shape: tuple[int, ...], which: str) -> None:
    norm = next(n for n in NORMS if n.name == name)
    sizes = {"tile": 512, "grad_tile": 512, "ticket_tile": 512, "grad_ticket_tile": 512, "column_tile": 512}
    with engine(which, **sizes):
        run(norm, shape, "contiguous", "resident", 5 * ROWS.index((shape, which)) + shape[0])


def test_no_large_group_makes_a_faulty_access() -> None:
    x = torch.randn(1, 70, 61, 67).to(torch.bfloat16).requires_grad_()
    with plans() as planned, sanitize() as looked:
        torch.autograd.grad(F.batch_norm(x, None, None, training=True, activation="relu"), x, torch.randn_like(x))
    assert looked.launches == 2
    assert planned[1].plan.launches[0].kernel is resident.grad_group


# Faults put into kernels of normops.


@triton.jit
def no_mask(t, PIECE: tl.constexpr, F: tl.constexpr):
    return tile.both(None, None)


@triton.jit
def one_more(t, PIECE: tl.constexpr, F: tl.constexpr):
    return tile.coordinates(t, PIECE, F)[2] <= t.n_a


@triton.jit
def keeps_nothing(o, mean, var, m, c, mk, n0, eps, momentum, F: tl.constexpr):
    return 1.0 / tl.sqrt(var + eps)


@triton.jit
def not_masked(ptr, o, mask):
    return tl.load(ptr + o)


@triton.jit
def first_chunk(block_a, chunk_s, chunks_s, F: tl.constexpr):
    return 0


@triton.jit
def save_all(ptr, value, t, PIECE: tl.constexpr, STRIDES: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr):
    memory.store(memory.pointers(ptr, t, PIECE, STRIDES, F), 0, value, None, KEEP)


@triton.jit
def first_block(i, chunks_s, n0, F: tl.constexpr):
    return 0 * i, 0 * i, i % chunks_s


def layer(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x.flatten(1), (x[0].numel(),), w.flatten())


def instance(x: Tensor, w: Tensor) -> Tensor:
    return F.instance_norm(x, None, None, w[:, 0, 0].contiguous())


FAULTS: dict[str, tuple[Any, str, Any, Callable[[Tensor, Tensor], Tensor], str, tuple[str, str]]] = {
    "a load without its mask": (memory, "mask_read", no_mask, layer, "resident", ("outside", "o.x")),
    "a store without its mask": (norm, "save", save_all, layer, "resident", ("outside", "o.y")),
    "a mask of one too many": (memory, "mask_read", one_more, layer, "resident", ("outside", "o.x")),
    "partial results without a mask": (finish, "load_shared", not_masked, instance, "split", ("outside", "o.part_m2")),
    "statistics nobody stores": (resident, "keep_moments", keeps_nothing, layer, "resident", ("unwritten", "o.mean")),
    "chunks in one place": (grad_stream, "chunk_of", first_chunk, instance, "split", ("overlapping", "o.p1")),
    "programs with one block": (tile, "place", first_block, instance, "split", ("overlapping", "o.part_mean")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_of_normops_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, variant, call, which, found = FAULTS[fault]
    x, w = torch.randn(3, 5, 7, 11, requires_grad=True), torch.randn(5, 7, 11)

    def both_directions() -> None:
        with engine(which), sanitize():
            y = call(x, w)
            torch.autograd.grad(y, x, torch.randn_like(y))

    both_directions()
    monkeypatch.setattr(module, name, variant)
    with pytest.raises(Fault) as caught:
        both_directions()
    assert (caught.value.kind, caught.value.argument) == found


# Kernels of others.


@triton.jit
def copy(x_ptr, y_ptr, n, left, ahead, BLOCK: tl.constexpr, STEP: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    v = tl.load(x_ptr + i + left, mask=i < n)
    tl.store(y_ptr + i + ahead, v, mask=i < n)


def copied(x: Tensor, y: Tensor, n: int = 10, left: int = 0, ahead: int = 0, step: int = 4) -> None:
    copy[(3,)](x, y, n, left, ahead, BLOCK=4, STEP=step)


def fault_of(run: Callable[[], Any], *reached: Tensor, identical: bool = False) -> Fault:
    with pytest.raises(Fault) as caught, sanitize(*reached, identical=identical):
        run()
    return caught.value


def test_a_right_kernel_passes_and_computes() -> None:
    x = torch.randn(10)
    with sanitize() as looked:
        y = torch.empty(10)
        copied(x, y)
    assert torch.equal(x, y) and (looked.launches, looked.elements, looked.repeated) == (1, 20, 0)


@pytest.mark.parametrize(("options", "kind", "program", "access", "argument", "element", "offset"), [
    ({"n": 11}, "outside", 2, "load", "x_ptr", 10, 40),
    ({"left": 1}, "outside", 2, "load", "x_ptr", 10, 40),
    ({"left": -1}, "outside", 0, "load", "x_ptr", -1, -4),
    ({"ahead": 1}, "outside", 2, "store", "y_ptr", 10, 40),
    ({"ahead": -3}, "outside", 0, "store", "y_ptr", -3, -12),
    ({"left": 1 << 30}, "outside", 0, "load", "x_ptr", 1 << 30, 1 << 32),
    ({"step": 3}, "overlapping", 1, "store", "y_ptr", 3, 12),
])  # fmt: skip
def test_a_fault_is_named(
    options: dict[str, int], kind: str, program: int, access: str, argument: str, element: int, offset: int
) -> None:
    x, y = torch.randn(10), torch.randn(10)
    found = fault_of(lambda: copied(x, y, **options))
    assert (found.kind, found.kernel, found.program) == (kind, "copy", (program, 0, 0))
    assert (found.access, found.argument, found.element, found.offset, found.extent) == (
        access, argument, element, offset, 40)  # fmt: skip
    assert found.other == ((0, 0, 0) if kind == "overlapping" else None)
    line = copy.fn.__code__.co_firstlineno + (3 if access == "load" else 4)
    assert str(found).startswith(f"copy: program {program} {access}s ")
    assert f" element {element} of {argument}, {kind}" in str(found)
    assert str(found).endswith(f": byte {offset} of a storage of 40, at test_sanitize.py:{line}")


def test_a_tensor_is_its_storage() -> None:
    whole = torch.zeros(12)
    with sanitize():
        copied(whole[1:11], torch.empty(10), left=1)
    found = fault_of(lambda: copied(whole[2:12], torch.empty(10), left=1))
    assert (found.element, found.offset, found.extent) == (10, 48, 48)


def test_what_lies_in_another_tensor_is_outside_of_this_one() -> None:
    """Two storages that touch each other, both arguments."""
    memory = bytearray(96)
    x, y = (torch.frombuffer(memory, dtype=torch.float32, count=10, offset=o) for o in (0, 40))
    with sanitize():
        copied(x, y)
    assert fault_of(lambda: copied(x, y, left=1)).argument == "x_ptr"
    assert fault_of(lambda: copied(x, y, ahead=-1)).argument == "y_ptr"


def test_what_nobody_wrote() -> None:
    x, z = torch.randn(10), torch.empty(10)
    assert fault_of(lambda: copied(torch.empty(10), x)).kind == "unwritten"
    for make in (lambda: torch.empty_like(x), lambda: x.new_empty(10), lambda: torch.empty_strided((10,), (1,))):
        assert fault_of(lambda make=make: copied(make(), x)).element == 0
    with sanitize():
        copied(z, x)  # not from inside the block: may have been written
        for write in (
            lambda t: t.zero_(), lambda t: t.copy_(x), lambda t: torch.add(x, x, out=t), lambda t: copied(x, t),
            lambda t: t[::2].fill_(1) + t[1::2].fill_(1),
        ):  # fmt: skip
            fresh = torch.empty(10)
            write(fresh)
            copied(fresh, x)

    def every_third() -> None:
        fresh = torch.empty(4, 3)
        fresh[:, 1] = 1
        fresh[:3, ::2].copy_(torch.ones(3, 2))
        copied(fresh, x)

    assert fault_of(every_third).element == 9

    def masked() -> None:
        fresh = torch.empty(10)
        copied(x, fresh, n=7)
        copied(fresh, x, n=7)
        copied(fresh, x, n=8)

    assert fault_of(masked).element == 7


def test_memory_that_is_given_back_is_not_taken_for_what_it_was() -> None:
    x = torch.randn(10)
    with sanitize():
        for _ in range(20):
            torch.empty(10)
            copied(torch.ones(10), x)
            copied(torch.from_numpy(x.numpy().copy()), x)


@triton.jit
def atomics(x_ptr, old_ptr, BLOCK: tl.constexpr, EXCHANGE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    old = tl.atomic_xchg(x_ptr + i, 1) if EXCHANGE else tl.atomic_add(x_ptr + i, 1)
    tl.store(old_ptr + tl.program_id(0) * BLOCK + i, old)


def test_atomic_operations_may_meet_but_not_outside_nor_unwritten() -> None:
    old = torch.zeros(24, dtype=torch.int32)
    with sanitize():
        atomics[(3,)](torch.zeros(8, dtype=torch.int32), old, BLOCK=8, EXCHANGE=False)
        atomics[(3,)](torch.empty(8, dtype=torch.int32), old, BLOCK=8, EXCHANGE=True)
    assert fault_of(lambda: atomics[(3,)](torch.zeros(7, dtype=torch.int32), old, 8, False)).access == "atomic"
    assert fault_of(lambda: atomics[(3,)](torch.empty(8, dtype=torch.int32), old, 8, False)).kind == "unwritten"


@triton.jit
def number(y_ptr):
    tl.store(y_ptr, tl.program_id(0))


def test_the_same_bits_may_be_stored_twice_where_it_is_said() -> None:
    x, y = torch.zeros(10), torch.zeros(10)
    with sanitize(identical=True) as looked:
        copied(x, y, step=3)
    assert looked.repeated == 2
    x[3:] = 1
    with sanitize(identical=True):
        copied(x, y, step=3)
    turned = torch.zeros(2)
    assert fault_of(lambda: number[(2,)](turned), identical=True).program == (1, 0, 0)


@triton.jit
def by_blocks(x, y_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    if HOW == "descriptor":
        v = x.load([0, 0])
    else:
        p = tl.make_block_ptr(x, (4, 8), (8, 1), (0, 4), (4, BLOCK), (1, 0))
        v = tl.load(p, boundary_check=(1,) if HOW == "checked" else ())
    tl.store(y_ptr + tl.arange(0, 4)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], v)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_and_descriptors() -> None:
    x, y = torch.randn(4, 8), torch.zeros(4, 8)
    with sanitize():
        by_blocks[(1,)](TensorDescriptor.from_tensor(x, [4, 8]), y, "descriptor", 8)
        assert torch.equal(x, y)
        by_blocks[(1,)](x, y, "checked", 8)
    too_large = TensorDescriptor(x, [5, 8], [8, 1], [8, 8])
    found = fault_of(lambda: by_blocks[(1,)](x, y, "unchecked", 8))
    assert (found.kind, found.argument, found.element) == ("outside", "x", 32)
    with pytest.raises(Fault, match="element 32 of x, outside"), sanitize():
        by_blocks[(1,)](too_large, torch.zeros(8, 8), "descriptor", 8)


@triton.jit
def through(table_ptr, y_ptr):
    p = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + tl.program_id(0), tl.load(p + 1))


def test_addresses_from_memory_need_tensors_that_are_named() -> None:
    parts, y = [torch.randn(2), torch.randn(2)], torch.zeros(2)
    table = torch.tensor([t.data_ptr() for t in parts])
    with sanitize(*parts):
        through[(2,)](table, y)
    assert y.tolist() == [t[1] for t in parts]
    assert fault_of(lambda: through[(2,)](table, y)).argument == "no argument"


def test_everything_is_put_back() -> None:
    builder, executor = triton.runtime.interpreter.InterpreterBuilder, triton.runtime.interpreter.GridExecutor
    before = builder.create_masked_load, builder.create_atomic_rmw, executor.__call__, executor._init_args_hst
    fault_of(lambda: copied(torch.zeros(9), torch.zeros(10)))
    assert before == (builder.create_masked_load, builder.create_atomic_rmw, executor.__call__, executor._init_args_hst)
    copied(torch.zeros(10), torch.empty(10))


def test_it_needs_the_interpreter_and_a_cpu() -> None:
    with pytest.raises(ValueError, match="x_ptr must be on the CPU"), sanitize():
        copied(torch.empty(10, device="meta"), torch.empty(10))
    code = "import normops.testing as t\nwith t.sanitize(): pass"
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode and "TRITON_INTERPRET=1" in done.stderr


def test_memory_that_grows() -> None:
    """What resize_() adds is unwritten; what was written stays so."""
    with sanitize():
        for _ in range(20):
            torch.empty(4).resize_(10000).zero_()
        x = torch.empty(8)
        x[:4] = 1
        x.resize_(64)
        F.layer_norm(x[:4].reshape(1, 4), (4,))
        with pytest.raises(Exception, match="unwritten"):
            F.layer_norm(x[:8].reshape(1, 8), (8,))
