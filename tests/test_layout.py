"""The algebra of axis groups against brute force: kernels/tile.py's addressing, in plain Python, for every element."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations, product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normops.layout import Layout, coalesce, dense_strides, follows, split

Axes = tuple[int, ...]


def offset(i: int, sizes: Axes, steps: Axes) -> int:
    """The twin of ``offset`` in kernels/tile.py, statement for statement."""
    if len(steps) == 0:
        return 0
    if len(steps) == 1:
        return i * steps[0]
    o = i * 0
    for d in range(len(steps) - 1):
        size, stride = sizes[len(steps) - 1 - d], steps[len(steps) - 1 - d]
        o, i = o + (i % size) * stride, i // size
    return o + i * steps[0]


def extent(sizes: Axes, n0: int) -> int:
    """The twin of ``extent`` in kernels/tile.py."""
    return (n0 if sizes[0] == 0 else sizes[0]) * prod(sizes[1:])


def table(layout: Layout, operand: tuple[Axes, ...]) -> list[list[int]]:
    """For each coordinate the offset of each of its points: the offset of an element is the sum of four."""
    return [
        [offset(i, layout.space[d], operand[d]) for i in range(extent(layout.space[d], layout.outer))] for d in range(4)
    ]


def offsets(layout: Layout, steps: tuple[Axes, ...], point: Axes) -> int:
    """The twin of ``offsets`` in kernels/tile.py."""
    m, c, a, s = point
    if len(steps) == 5:
        m, c = m // steps[4][0], c // steps[4][1]
    return sum(offset(i, layout.space[d], steps[d]) for d, i in enumerate((m, c, a, s)))


def subsets(n: int) -> Iterator[Axes]:
    for size in range(1, n + 1):
        yield from combinations(range(n), size)


def affine_sets(n: int, reduced: Axes) -> list[Axes]:
    kept = tuple(i for i in range(n) if i not in reduced)
    return sorted({(), (min(1, n - 1),), (n - 1,), reduced, kept, tuple(range(n)), (0, n - 1) if n > 1 else (0,)})


def weight_strides(shape: Axes, affine: Axes) -> Axes:
    strides = dict(zip(affine, dense_strides([shape[i] for i in affine]), strict=True))
    return tuple(strides.get(i, 0) for i in range(len(shape)))


def check(shape: Axes, order: Axes, x: Axes, reduced: Axes, affine: Axes) -> Layout:
    """Every property of one layout; `order` are the strides of a dense output, `x` those of the input."""
    w = weight_strides(shape, affine)
    layout = coalesce(shape, (order, x, w), reduced, affine)
    indices = list(product(*map(range, shape)))
    at = {sum(i * s for i, s in zip(index, order, strict=True)): index for index in indices}
    assert len(at) == prod(shape), "the test's own output must be dense"

    assert layout.outer == (layout.runs[0].size if layout.runs else 1)
    assert [extent(s, layout.outer) for s in layout.space] == [layout.extent(letter) for letter in "mcas"]
    assert layout.group == prod(shape[i] for i in reduced)
    assert layout.numel == prod(shape) == layout.group * layout.groups
    assert sum(s.count(0) for s in layout.space) == (len(layout.runs) > 1)
    assert all(
        len(steps) in (0, len(sizes)) for o in range(3)
        for steps, sizes in zip(layout.operand(o), layout.space, strict=True)
    )  # fmt: skip
    for outer, inner in zip(layout.runs, layout.runs[1:], strict=False):
        joins = all(a == inner.size * b for a, b in zip(outer.strides, inner.strides, strict=True))
        assert outer.letter != inner.letter or not joins, "neighbours that join were left apart"

    ym, yc, ya, ys = table(layout, layout.operand(0))
    xm, xc, xa, xs = table(layout, layout.operand(1))
    wm, wc, wa, ws = table(layout, layout.operand(2))
    sm, sc, sa, ss = table(layout, layout.statistics())
    assert not any(sa) and not any(ss) and not any(wm) and not any(ws)
    visited, groups = set(), {}
    for m, c, a, s in product(range(len(ym)), range(len(yc)), range(len(ya)), range(len(ys))):
        index = at[ym[m] + yc[c] + ya[a] + ys[s]]
        visited.add(index)
        assert xm[m] + xc[c] + xa[a] + xs[s] == sum(i * t for i, t in zip(index, x, strict=True))
        assert wc[c] + wa[a] == sum(i * t for i, t in zip(index, w, strict=True))
        groups.setdefault(sm[m] + sc[c], set()).add(index)
    assert len(visited) == layout.numel, "every element exactly once"
    assert sorted(groups) == list(range(layout.groups)), "statistics are dense"
    expected: dict[Axes, set[Axes]] = {}
    for index in indices:
        expected.setdefault(tuple(i for d, i in enumerate(index) if d not in reduced), set()).add(index)
    assert {frozenset(g) for g in groups.values()} == {frozenset(g) for g in expected.values()}
    # Dense in the order of the kept axes in memory: sorted by their first element's offset.
    first = {stat: min(sum(i * t for i, t in zip(e, order, strict=True)) for e in g) for stat, g in groups.items()}
    assert sorted(first, key=first.__getitem__) == list(range(layout.groups))
    furthest = max(sum((n - 1) * t for n, t in zip(shape, strides, strict=True)) for strides in (order, x, w))
    assert layout.reach() == furthest
    assert layout.kept == (layout.groups > 1)
    planes, folded = layout.of_planes(), layout.folded([0, 1], 2 if affine else None)
    assert (planes is not None) == (layout.letters in ("scs", "sms"))
    statistic = {index: group for group, members in groups.items() for index in members}
    for other in filter(None, (planes, folded)):
        check_same_elements(layout, other, [order, x, w], at, statistic)
    return layout


def check_same_elements(
    layout: Layout, other: Layout, strides: list[Axes], at: dict[int, Axes], statistic: dict[Axes, int]
) -> None:
    """Another way to walk a layout: each element once, beside its own statistics and parameters."""
    assert (other.group, other.groups, other.numel) == (layout.group, layout.groups, layout.numel)
    assert other.of_planes() is None and other.folded([0, 1], None) is None
    w = (*layout.operand(2), other.divisors) if other.shared else other.operand(2)
    visited = set()
    for point in product(*(range(other.extent(letter)) for letter in "mcas")):
        index = at[offsets(other, other.operand(0), point)]
        visited.add(index)
        exact = [sum(i * t for i, t in zip(index, stride, strict=True)) for stride in strides]
        assert [offsets(other, steps, point) for steps in (other.operand(0), other.operand(1), w)] == exact
        assert offsets(other, other.statistics(), point) == statistic[index]
    assert len(visited) == layout.numel


SHAPES: list[Axes] = [
    (5,),
    (1,),
    (3, 4),
    (1, 4),
    (3, 1),
    (2, 3, 4),
    (2, 1, 3),
    (2, 3, 2, 5),
    (1, 3, 1, 2),
    (2, 3, 2, 2, 3),
]


def formats(shape: Axes) -> Iterator[tuple[str, torch.Tensor]]:
    x = torch.empty(shape)
    yield "contiguous", x
    if len(shape) == 4:
        yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    if len(shape) == 5:
        yield "channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)
    if len(shape) > 1:
        order = (*range(1, len(shape)), 0)
        yield "rotated", torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
        yield "reversed", torch.empty(shape[::-1]).permute(*reversed(range(len(shape))))
        yield "expanded", torch.empty((1, *shape[1:])).expand(shape)
        yield "expanded_last", torch.empty((*shape[:-1], 1)).expand(shape)
    yield "sliced", torch.empty([n + 1 for n in shape])[tuple(slice(1, None) for _ in shape)]
    yield "strided", torch.empty((*shape[:-1], 2 * shape[-1]))[..., ::2]


FORMATS = [
    pytest.param(shape, x, id=f"{'x'.join(map(str, shape))}-{name}") for shape in SHAPES for name, x in formats(shape)
]


@pytest.mark.parametrize(("shape", "x"), FORMATS)
def test_every_element_once_in_its_group(shape: Axes, x: torch.Tensor) -> None:
    for reduced in subsets(len(shape)):
        for affine in affine_sets(len(shape), reduced):
            check(shape, torch.empty_like(x).stride(), x.stride(), reduced, affine)


@pytest.mark.parametrize("axes", list(subsets(4)), ids=str)
def test_groups_are_those_of_torch(axes: Axes) -> None:
    """Mean and variance over the groups, taken through statistics(), are torch.var_mean's over the axes."""
    x = torch.arange(2 * 3 * 2 * 5, dtype=torch.float64).sin().reshape(2, 3, 2, 5)
    x = x.contiguous(memory_format=torch.channels_last)
    layout = coalesce(tuple(x.shape), (x.stride(),), axes)
    ms, cs, as_, ss = table(layout, layout.operand(0))
    sm, sc, *_ = table(layout, layout.statistics())
    flat = x.as_strided((x.numel(),), (1,))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    var, mean = (t.expand(x.shape).contiguous(memory_format=torch.channels_last) for t in (var, mean))
    var, mean = (t.as_strided((t.numel(),), (1,)) for t in (var, mean))
    seen = set()
    for m, c in product(range(len(ms)), range(len(cs))):
        members = [ms[m] + cs[c] + a + s for a in as_ for s in ss]
        seen.add(sm[m] + sc[c])
        v, mu = torch.var_mean(flat[members], correction=0)
        torch.testing.assert_close(mean[members], mu.expand(len(members)))
        torch.testing.assert_close(var[members], v.expand(len(members)))
    assert seen == set(range(layout.groups))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_permuted_padded_tensor(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    rank = len(shape)
    order = data.draw(st.permutations(range(rank)))
    pad = data.draw(st.lists(st.integers(0, 1), min_size=rank, max_size=rank))
    bits = (data.draw(st.integers(1, 2**rank - 1)), data.draw(st.integers(0, 2**rank - 1)))
    reduced, affine = (tuple(i for i in range(rank) if b >> i & 1) for b in bits)
    inverse = [order.index(i) for i in range(rank)]
    padded = torch.empty([shape[i] + pad[i] for i in order]).permute(inverse)
    x = padded[tuple(slice(n) for n in shape)]
    check(shape, torch.empty_like(x).stride(), x.stride(), reduced, affine)


N, C, H, W, G = 2, 6, 4, 5, 2
CL = torch.channels_last


def pattern_of(
    factors: Sequence[Axes], reduced: Axes, affine: Axes, fmt: torch.memory_format = torch.contiguous_format
) -> tuple[str, tuple[Axes, ...]]:
    x = torch.empty([prod(f) for f in factors])
    strides = split(x.contiguous(memory_format=fmt).stride(), factors)
    shape = tuple(n for f in factors for n in f)
    layout = check(shape, strides, strides, reduced, affine)
    return layout.pattern, layout.statistics()


NCHW = ((N,), (C,), (H,), (W,))
GROUPED = ((N,), (G, C // G), (H,), (W,))
TABLE = [
    ("LayerNorm", ((N,), (H,), (C,)), (2,), (2,), None, "KRa", ((1,), (), (), ())),
    ("LayerNorm over two", ((N,), (H,), (C,)), (1, 2), (1, 2), None, "KRa", ((1,), (), (), ())),
    ("LayerNorm2d", NCHW, (1,), (1,), None, "KRaK", ((H * W, 1), (), (), ())),
    ("LayerNorm2d channels_last", NCHW, (1,), (1,), CL, "KRa", ((1,), (), (), ())),
    ("BatchNorm", NCHW, (0, 2, 3), (1,), None, "RKaR", ((), (1,), (), ())),
    ("BatchNorm channels_last", NCHW, (0, 2, 3), (1,), CL, "RKa", ((), (1,), (), ())),
    ("BatchNorm plain", NCHW, (0, 2, 3), (), None, "RKR", ((1,), (), (), ())),
    ("InstanceNorm", NCHW, (2, 3), (1,), None, "KKaR", ((C,), (1,), (), ())),
    ("InstanceNorm channels_last", NCHW, (2, 3), (1,), CL, "KRKa", ((C,), (1,), (), ())),
    ("InstanceNorm plain", NCHW, (2, 3), (), None, "KR", ((1,), (), (), ())),
    ("GroupNorm", GROUPED, (2, 3, 4), (1, 2), None, "KKaRaR", ((G,), (1,), (), ())),
    ("GroupNorm channels_last", GROUPED, (2, 3, 4), (1, 2), CL, "KRKaRa", ((G,), (1,), (), ())),
    ("AdaIN", NCHW, (2, 3), (0, 1), None, "KaR", ((), (1,), (), ())),
    ("AdaIN channels_last", NCHW, (2, 3), (0, 1), CL, "KaRKa", ((), (C, 1), (), ())),
    ("everything", NCHW, (0, 1, 2, 3), (), None, "R", ((0,), (), (), ())),
    ("one element", ((1,), (1,)), (1,), (), None, "1", ((0,), (), (), ())),
]


@pytest.mark.parametrize(
    ("factors", "reduced", "affine", "fmt", "pattern", "statistics"), [c[1:] for c in TABLE], ids=[c[0] for c in TABLE]
)
def test_patterns_of_the_named_norms(
    factors: Sequence[Axes], reduced: Axes, affine: Axes, fmt: torch.memory_format | None, pattern: str,
    statistics: tuple[Axes, ...],
) -> None:  # fmt: skip
    assert pattern_of(factors, reduced, affine, fmt or torch.contiguous_format) == (pattern, statistics)


HW = H * W
FOLDED = [
    ("BatchNorm", NCHW, (0, 2, 3), (1,), None, HW),
    ("BatchNorm plain", NCHW, (0, 2, 3), (), None, HW),
    ("BatchNorm channels_last", NCHW, (0, 2, 3), (1,), CL, 0),
    ("GroupNorm channels_last", GROUPED, (2, 3, 4), (1, 2), CL, C // G),
    ("GroupNorm channels_last plain", GROUPED, (2, 3, 4), (), CL, 0),  # the groups are no run of their own
    ("GroupNorm", GROUPED, (2, 3, 4), (1, 2), None, 0),
    ("InstanceNorm", NCHW, (2, 3), (1,), None, 0),  # nothing else is averaged over
    ("LayerNorm2d", NCHW, (1,), (1,), None, 0),
    ("parameters outside", ((N,), (C,), (W,)), (0, 2), (0,), None, 0),
    ("parameters inside", ((N,), (C,), (W,)), (2,), (1, 2), None, 0),
    ("two kept runs", ((N,), (C,), (H,), (G,), (W,)), (2, 4), (1, 3, 4), None, 0),
    ("of the batch", ((H,), (N,), (W,)), (1, 2), (0,), None, 0),
]


@pytest.mark.parametrize(
    ("factors", "reduced", "affine", "fmt", "fold"), [c[1:] for c in FOLDED], ids=[c[0] for c in FOLDED]
)
def test_short_pieces_of_groups_are_folded(
    factors: Sequence[Axes], reduced: Axes, affine: Axes, fmt: torch.memory_format | None, fold: int
) -> None:
    x = torch.empty([prod(f) for f in factors]).contiguous(memory_format=fmt or torch.contiguous_format)
    shape, strides = tuple(n for f in factors for n in f), split(x.stride(), factors)
    params = weight_strides(shape, affine)
    layout = coalesce(shape, (strides, strides, params), reduced, affine)
    found = layout.folded([0, 1], 2)
    assert (found.fold if found else 0) == fold
    # Not where the columns of an operand of x's size are no single run.
    kept, inner = layout.runs[-2:]
    apart = Layout((*layout.runs[:-2], kept._replace(strides=(kept.strides[0], kept.strides[1] + 1, 0)), inner))
    assert apart.folded([0, 1], 2) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense_strides(shape: Axes) -> None:
    assert dense_strides(shape) == torch.empty(shape).stride()


@pytest.mark.parametrize("fmt", [torch.contiguous_format, CL], ids=["contiguous", "channels_last"])
def test_split(fmt: torch.memory_format) -> None:
    x = torch.empty(2, 12, 4, 5).contiguous(memory_format=fmt)[:, :, 1:, ::2]
    assert split(x.stride(), ((2,), (2, 3, 2), (3,), (3,))) == x.unflatten(1, (2, 3, 2)).stride()
    assert split((), ()) == ()
    with pytest.raises(ValueError):
        split(x.stride(), ((2,), (12,)))


def test_follows() -> None:
    shape = (2, 3, 4, 5)
    x = torch.empty(shape)
    formats = [x.permute(p) for p in permutations(range(4))]
    for a, b in product(formats, formats):
        a, b = a.reshape(a.shape), b
        same = sorted(range(4), key=lambda i: -a.stride(i)) == sorted(range(4), key=lambda i: -b.stride(i))
        assert follows(a.stride(), b.stride(), shape) == same
    cl = x.contiguous(memory_format=CL)
    assert follows(x[:, :, 1:, ::2].stride(), x.stride(), shape)
    assert not follows(cl.stride(), x.stride(), shape)
    assert follows((1, 1), (2, 1), (2, 2))  # elements may overlap
    # Broadcast axes follow every order, and so do axes of size 1.
    assert follows(torch.empty(1, 3, 1, 1).expand(shape).stride(), cl.stride(), shape)
    assert follows(torch.empty(()).expand(shape).stride(), x.stride(), shape)
    one = (2, 1, 4, 5)
    assert follows(torch.empty(one).stride(), torch.empty(one).contiguous(memory_format=CL).stride(), one)


def test_wider_layouts_are_hashable_and_cached() -> None:
    arguments = ((2, 3, 2, 2, 3), ((36, 12, 6, 3, 1),), (0, 2, 4))
    layout = coalesce(*arguments)
    assert layout is coalesce(*arguments) and hash(layout) == hash(Layout(layout.runs, batch=layout.batch))
    assert (layout.pattern, layout.letters) == ("RKRKR", "smsms")
