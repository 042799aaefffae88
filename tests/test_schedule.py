"""What holds for every schedule, whatever its numbers: pure functions of layouts and of facts about devices."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product
from math import prod

import pytest

from normops import schedule, ticketing, walks
from normops.gpus import A100, B200, H200, KNOWN, Device
from normops.kernels import tickets
from normops.layout import Layout, coalesce, dense_strides, split
from normops.tile import Tile, along_m, line_groups, next_power_of_2, vector

DEVICES = (A100, H200, B200)
SIZES = [(2, 4), (4, 4), (8, 8)]  # bytes of an element, of an accumulator


def layout(
    factors: tuple[tuple[int, ...], ...], last: bool, reduced: tuple[int, ...], affine: tuple[int, ...]
) -> Layout:
    """The layout over a tensor (channels last if so) and its parameters."""
    sizes = [prod(f) for f in factors]
    strides = list(dense_strides(sizes))
    if last:
        order = [0, *range(2, len(sizes)), 1]
        for i, stride in zip(order, dense_strides([sizes[i] for i in order]), strict=True):
            strides[i] = stride
    shape = tuple(n for f in factors for n in f)
    w = dict(zip(affine, dense_strides([shape[i] for i in affine]), strict=True))
    x = split(strides, factors)
    return coalesce(shape, (x, x, tuple(w.get(i, 0) for i in range(len(shape)))), reduced, affine)


def named(n: int, c: int, hw: int, affine: bool = True) -> dict[str, Layout]:
    """The named norms for n samples of c channels of hw × hw (rows of c for the norms over the last axis)."""
    nchw, groups = ((n,), (c,), (hw,), (hw,)), 8 if c % 8 == 0 else 1
    grouped = ((n,), (groups, c // groups), (hw,), (hw,))

    def a(*axes: int) -> tuple[int, ...]:
        return axes if affine else ()

    found = {"LayerNorm": layout(((n,), (hw,), (c,)), False, (2,), a(2))}
    for last in (False, True):
        name = "-last" if last else ""
        found["LayerNorm2d" + name] = layout(nchw, last, (1,), a(1))
        found["BatchNorm" + name] = layout(nchw, last, (0, 2, 3), a(1))
        found["InstanceNorm" + name] = layout(nchw, last, (2, 3), a(1))
        found["GroupNorm" + name] = layout(grouped, last, (2, 3, 4), a(1, 2))
        found["AdaIN" + name] = layout(nchw, last, (2, 3), a(0, 1))
    found["five axes"] = layout(((n,), (c,), (2,), (hw,), (3,)), False, (0, 2, 4), a(1))
    return found


DIMENSIONS = [
    (2, 3, 1), (2, 8, 4), (3, 7, 5), (16, 64, 8), (32, 96, 14), (64, 256, 56),
    (7, 1000, 3), (2, 32, 256), (4096, 4096, 1), (2, 100_000, 1), (3, 1 << 22, 1),
]  # fmt: skip
LAYOUTS = [
    pytest.param(found, id=f"{name}-{n}x{c}x{hw}-{'affine' if affine else 'plain'}")
    for (n, c, hw), affine in product(DIMENSIONS, (True, False))
    for name, found in named(n, c, hw, affine).items()
]


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def check_tile(tile: Tile) -> None:
    assert all(map(power_of_two, (tile.k, tile.a, tile.s, tile.warps)))
    assert 1 <= tile.warps <= 16
    assert tile.elements == tile.k * tile.a * tile.s


def tiles(found: Layout, itemsize: int, acc: int) -> list[Tile]:
    """Every tile of whole groups and of streams that plans ask for."""
    limits = schedule.limits()
    whole = [
        schedule.whole_groups(found, itemsize, acc, limits.forward, limits.tile, 1024),
        schedule.whole_groups(found, itemsize, acc, limits.backward, limits.grad_tile, 512),
        schedule.whole_groups(found, itemsize, acc, limits.backward_affine, limits.grad_tile, 512),
    ]
    streams = [
        schedule.stream(found, itemsize, acc, limits.tile, 1024),
        schedule.stream(found, itemsize, acc, limits.grad_tile, 512),
    ]
    return [tile for tile in whole if tile is not None] + streams


@pytest.mark.parametrize("found", LAYOUTS)
def test_whole_groups_cover_the_group_within_the_limit(found: Layout) -> None:
    limits = schedule.limits()
    for itemsize, acc in SIZES:
        for limit, pack in ((limits.forward, limits.tile), (limits.backward, limits.grad_tile), (64, 64), (0, 64)):
            tile = schedule.whole_groups(found, itemsize, acc, limit, pack, 1024)
            if tile is None:
                # A group that fills no line of memory may be refused for the groups beside it, never for less.
                rows = max(1, limits.line_bytes // itemsize)
                assert found.group * 4 * rows * acc // 4 > limit
                continue
            check_tile(tile)
            assert tile.a >= found.extent("a") and tile.s >= found.extent("s")
            assert tile.a < 2 * found.extent("a") and tile.s < 2 * found.extent("s")
            assert tile.elements * acc <= max(limit, pack) * 4
            assert tile.along_m == along_m(found)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dimensions", DIMENSIONS, ids=str)
def test_tiles_of_rows_do_not_depend_on_the_batch(dimensions: tuple[int, int, int], affine: bool) -> None:
    _, c, hw = dimensions
    batches = [named(n, c, hw, affine) for n in (2, 3, 17, 4096)]
    for name in batches[0]:
        # These average over the batch; and a group of one element has no sum whose order could matter.
        if "BatchNorm" in name or name == "five axes" or batches[0][name].group == 1:
            continue
        for itemsize, acc in SIZES:
            found = [tiles(batch[name], itemsize, acc) for batch in batches]
            assert all(f == found[0] for f in found), name
            streams = [schedule.stream(b[name], itemsize, acc, schedule.limits().tile, 1024) for b in batches]
            steps = {walks.least_steps(b[name], tile) for b, tile in zip(batches, streams, strict=True)}
            assert len(steps) == 1, name


@pytest.mark.parametrize("found", LAYOUTS)
def test_streams_stay_within_their_size(found: Layout) -> None:
    for (itemsize, acc), elements in product(SIZES, (64, 2048, 4096)):
        tile = schedule.stream(found, itemsize, acc, elements, 1024)
        check_tile(tile)
        assert tile.elements * acc <= elements * 4
        assert tile.a < 2 * found.extent("a") and tile.s < 2 * found.extent("s")
        assert tile.along_m == along_m(found)


@pytest.mark.parametrize("found", LAYOUTS)
def test_steps_bound_the_partial_results(found: Layout) -> None:
    for (itemsize, acc), elements, most in product(SIZES, (64, 4096), (1, 7, 256)):
        with schedule.forced(chunks=most):
            tile = schedule.stream(found, itemsize, acc, elements, 1024)
            steps = walks.least_steps(found, tile)
            assert steps >= 1
            blocks_a = -(-found.extent("a") // tile.a)
            chunks_s = -(-found.extent("s") // (tile.s * steps))
            # Each block of a rounds up once: where there is one, the bound is exact.
            assert chunks_s * blocks_a < most + blocks_a
            # No more steps than needed.
            assert steps == 1 or -(-found.extent("s") // tile.s) * blocks_a > most * (steps - 1)


@pytest.mark.parametrize("found", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_parts_cover_the_rows_exactly(found: Layout, device: Device) -> None:
    m = found.extent("m")
    for itemsize, acc in SIZES:
        for tile in tiles(found, itemsize, acc):
            count, each = walks.parts(found, tile, device, 2)
            blocks = -(-m // tile.k) if tile.along_m else m
            assert count >= 1 and each >= 1
            assert count * each >= blocks, "rows are left out"
            assert (count - 1) * each < blocks, "a part is empty"
            assert count <= device.num_sms * schedule.limits().warps_per_sm


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_thread_has_two_elements_of_each_piece_of_a_row(itemsize: int) -> None:
    """Which are converted as the pair that a register holds, where they are accessed so."""
    for n in (*range(129, 1200), *range(1200, 70_000, 997), 65536, 14336, 5120):
        found = named(4096, n, 1)["LayerNorm"]
        backward = schedule.rows(found, itemsize, 4, 32, 8)
        for tile in (schedule.forward_rows(found, itemsize, 4, False, False, "identity"), backward):
            if tile is not None:
                assert tile.k * tile.a >= 64 * tile.warps or vector(found, itemsize) == 1, (n, tile)
                assert tile.width >= n > tile.width - tile.a, (n, tile)


def test_parts_grow_with_the_device() -> None:
    found = named(4096, 4096, 1)["LayerNorm"]
    tile = schedule.whole_groups(found, 2, 4, schedule.limits().backward_affine, schedule.limits().grad_tile, 512)
    assert tile is not None
    counts = [walks.parts(found, tile, replace(H200, num_sms=n), 2)[0] for n in (1, 16, 64, 132)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_forced_restores() -> None:
    before = schedule.limits()
    with schedule.forced(forward=0, tile=64):
        assert asdict(schedule.limits()) == asdict(before) | {"forward": 0, "tile": 64}
        with schedule.forced(tile=32):
            assert (schedule.limits().forward, schedule.limits().tile) == (0, 32)
        assert (schedule.limits().forward, schedule.limits().tile) == (0, 64)
    assert schedule.limits() is before
    with pytest.raises(KeyError), schedule.forced(forward=0):
        raise KeyError
    assert schedule.limits() is before
    with pytest.raises(TypeError), schedule.forced(nonsense=1):
        pass
    assert schedule.limits() is before


def test_forced_splits_every_group() -> None:
    for case in LAYOUTS:
        assert schedule.whole_groups(case.values[0], 2, 4, 0, 4096, 1024) is None


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 1023, 1024, 1025, 1 << 40])
def test_next_power_of_2(n: int) -> None:
    found = next_power_of_2(n)
    assert power_of_two(found) and found >= n and (found == 1 or found // 2 < n)


def test_known_devices() -> None:
    assert set(DEVICES) <= set(KNOWN.values())
    assert all(name == device.name for name, device in KNOWN.items())
    assert all(KNOWN[d.name] is d for d in DEVICES)


def test_parameters_do_not_narrow_a_tile() -> None:
    """The weight of a BatchNorm has stride 1 along channels; the width of an access to x is not its business."""
    x, w = (3136 * 64, 3136, 56, 1), (0, 1, 0, 0)
    layout = coalesce((32, 64, 56, 56), (x, x, w), (0, 2, 3), (1,))
    assert vector(layout, 2) == 8
    odd = coalesce((32, 64, 7, 7), ((49 * 64, 49, 7, 1),), (0, 2, 3), (1,))
    assert vector(odd, 2) == 1


@pytest.mark.parametrize(("name", "value"), [
    ("tile", 100), ("ticket_tile", 0), ("grad_ticket_tile", -64), ("chunks", 0),
])  # fmt: skip
def test_sizes_that_no_kernel_takes_are_refused(name: str, value: int) -> None:
    before = schedule.limits()
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"), schedule.forced(**{name: value}):
        pass
    assert schedule.limits() is before


def test_unknown_engines_are_refused_by_name() -> None:
    match = "engine must be one of resident, .*, got .fastest"
    with pytest.raises(ValueError, match=match), schedule.forced(engine="fastest"):
        pass


def test_states_of_units_begin_where_kernels_look_for_them() -> None:
    assert tickets.FIRST_STATE.value == ticketing.FIRST_STATE


def up(n: int, by: int) -> int:
    return -(-n // by)


def unit_bytes(found: Layout, tile: Tile, itemsize: int, streams: int) -> int:
    """Of all groups that a tile takes part in; a batch counts as if it filled the tile."""
    groups = tile.columns if tile.along_m else min(tile.columns, found.extent("c"))
    return groups * found.group * itemsize * streams


@pytest.mark.parametrize("found", LAYOUTS)
def test_ticketed_launches_visit_every_tile_within_the_window(found: Layout) -> None:
    """Units of whole groups, statistics as far ahead as the device holds programs and the window memory, not further;
    where no unit fits, not even one of half as many groups side by side would."""
    limits, ticket_tile, per_warp = schedule.limits(), 8192, 2048
    for (itemsize, acc), streams, device, window in product(SIZES, (1, 2), (A100, B200), (0, 1 << 14, 1 << 20)):
        halved = 2 if itemsize >= 4 or vector(found, itemsize) == 1 else 1  # registers of values, or of addresses
        with schedule.forced(window=window):
            t = ticketing.ticketed(
                found, itemsize, acc, streams, ticket_tile, per_warp, schedule.limits(), device, None
            )  # fmt: skip
        window = window or device.window
        first = schedule.stream(found, itemsize, acc, ticket_tile // halved, per_warp // halved)
        side_by_side = first.k > 1 and line_groups(found, itemsize, limits.line_bytes) > 1
        other = replace(first, k=first.k // 2, s=min(next_power_of_2(found.extent("s")), 2 * first.s))
        fit = [4 * unit_bytes(found, tile, itemsize, streams) <= 3 * window for tile in (first, other)]
        if t is None:
            assert not fit[0] and not (side_by_side and fit[1])
            continue
        assert t.tile == (first if fit[0] else other) and (fit[0] or (side_by_side and fit[1]))
        inside, outside = ("m", "c") if t.tile.along_m else ("c", "m")
        assert t.chunks_s == up(found.extent("s"), t.tile.length)
        assert t.tiles == t.chunks_s * up(found.extent("a"), t.tile.width)
        assert t.units == up(found.extent(inside), t.tile.columns) * found.extent(outside)
        every, unit = t.units * t.tiles, unit_bytes(found, t.tile, itemsize, streams)
        assert (t.programs, t.words) == (every + t.lead, tickets.FIRST_STATE.value + t.units)
        assert t.tiles <= t.lead <= every
        ahead = t.tiles + limits.ahead * device.num_sms
        if t.lead > t.tiles:
            assert t.lead <= ahead and (t.lead + 1) * unit <= window * t.tiles
        assert t.lead in (ahead, every) or (t.lead + 2) * unit > window * t.tiles
        assert 8 <= t.merge_p <= 512 and (t.tile.k * t.merge_p == 1024 or t.merge_p == (512 if t.tile.k < 2 else 8))


def test_a_window_is_left_to_calls_that_are_not_told_to_take_tickets() -> None:
    found = named(7, 1000, 3)["LayerNorm"]
    for engine, taken in (("", False), ("split", False), ("ticketed", True)):
        with schedule.forced(engine=engine, window=64):
            t = ticketing.ticketed(found, 2, 4, 1, 8192, 2048, schedule.limits(), H200, None)
        assert (t is not None) == taken, engine


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize(("itemsize", "acc"), SIZES)
def test_tiles_of_planes_fit_the_registers(itemsize: int, acc: int, streams: int) -> None:
    """64 elements a thread of 4 warps and 256 bytes of all streams, for planes of every size: 128 x 128 once had twice
    that.  Pieces divide the plane, and are a line of memory or more."""
    found = 0
    for height, width in product(range(7, 260, 3), (7, 8, 28, 32, 56, 64, 96, 128, 180, 224, 256, 512)):
        shape = (4, 3, height, width)
        planes = coalesce(shape, (dense_strides(shape),), (0, 2, 3), (1,)).of_planes()
        assert planes is not None
        tile = schedule.plane_tile(planes, itemsize, acc, streams)
        if tile is not None:
            found += 1
            assert tile.elements <= min(64 * 128, 256 * 128 // (streams * itemsize)) * 4 // acc
            assert height * width % tile.length == 0 and tile.s * itemsize >= 128
    assert found > 50
