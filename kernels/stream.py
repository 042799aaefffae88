"""Forward, where a group does not fit one program: its tiles are visited twice, in two launches or in one.

STATISTICS and APPLY are launches with a finish between them.  BOTH is one launch that reads x from DRAM once and again
from L2: the program that draws ticket t does the statistics of tile t and applies those of tile t - lead, both tiles on
their way at once; the last of a unit's tiles merges the partial results of all of them, in index order, and publishes
the unit.  A unit is a block of groups.  See tickets.py and docs/ticketed.md.
"""

import triton
import triton.language as tl

from .bundles import APPLY, STATISTICS
from .finish import chunk_size, finish_groups
from .memory import ANY, EVICT_FIRST, EVICT_LAST
from .norm import (
    add_moments,
    any_of,
    cancels,
    load_pieces,
    median_elements,
    moments,
    read_input,
    reciprocal_root,
    saved_statistics,
    write_output,
)
from .sums import tile_total, totals
from .tickets import FIRST_STATE, arrive, draw, leave, pair, publish, wait
from .tile import count, extent, group_number, number_of_groups, numbered_tile, tile_at, tiles_of

_APPLY = tl.constexpr(APPLY)
_STATISTICS = tl.constexpr(STATISTICS)


@triton.jit(do_not_specialize=["n0", "number"])
def stream(o, n0, number, eps: "fp64", momentum: "fp64", F: tl.constexpr):
    """x[m, c, a, s] -> y[m, c, a, s], mean[m, c], rstd[m, c]; `number`: tiles of a chunk (STATISTICS), or the lead.

    STATISTICS    part_mean, part_m2[chunk, m, c]; a chunk is `number` tiles of a group
    APPLY         y from mean and rstd (FROM_VAR: from mean and variance)
    """
    X: tl.constexpr = F.X
    if F.PHASE == _STATISTICS:
        t, _, block_a, chunk_s = numbered_tile(tl.program_id(0), number, n0, F)
        store_moments(o, read_input(o, t, F), t, block_a, chunk_s, number, n0, F)
    elif F.PHASE == _APPLY:
        # The last tile first: the end of x is what the statistics left in L2.
        t, _, _, _ = numbered_tile(tl.num_programs(0) - 1 - tl.program_id(0), 1, n0, F)
        v = load_pieces(o.x, t, X, F)
        mean, rstd = saved_statistics(o, t, F)
        if F.FROM_VAR:
            rstd = reciprocal_root(rstd + count(eps, F))
        write_output(o, v, mean, rstd, t, F)
    else:
        paired(o, n0, number, eps, momentum, F)


@triton.jit
def paired(o, n0, lead, eps, momentum, F: tl.constexpr):
    SUM: tl.constexpr = F.SUM
    X: tl.constexpr = F.X
    chunks_s = tl.cdiv(extent(3, n0, F), F.WIDTH_S)
    tiles = chunks_s * tl.cdiv(extent(2, n0, F), F.WIDTH_A)
    begins, tile, applies, applied = pair(draw(o.tickets), lead)
    t, unit, block_a, chunk_s = numbered_tile(tile, 1, n0, F)
    u, unit_u, _, _ = numbered_tile(applied, 1, n0, F)

    # Both tiles are on their way before either is used; at the ends, where there is one, the other is read for nothing:
    # a condition would cost every program more.
    v = read_input(o, t, F, EVICT_LAST, begins)
    if o.pre is None:
        x = load_pieces(o.x, u, X, F, EVICT_FIRST)
    if begins:
        store_moments(o, v, t, block_a, chunk_s, 1, n0, F)
        state = o.tickets + FIRST_STATE + unit
        if arrive(state, tiles):
            finish_groups(o, unit, tiles, chunks_s, 1, n0, eps, momentum, F)
            publish(state)
    if applies:
        state = o.tickets + FIRST_STATE + unit_u
        wait(state, tiles, F)
        mean, rstd = saved_statistics(o, u, F, True)
        if o.pre is None:
            write_output(o, x, mean, rstd, u, F, EVICT_FIRST)
        else:  # the sum was written by a program of this launch: not to be read before
            write_output(o, load_pieces(o.sum, u, SUM, F, EVICT_FIRST), mean, rstd, u, F, EVICT_FIRST)
        leave(state, tiles, F)


@triton.jit
def store_moments(o, v, t, block_a, chunk_s, steps, n0, F: tl.constexpr):
    """Mean, less median_elements() of the group, and sum of squares of one chunk, whose first tile is v."""
    GROUPS: tl.constexpr = F.FOLD[2]
    chunk = block_a * tl.cdiv(extent(3, n0, F), F.WIDTH_S * steps) + chunk_s
    at = chunk * number_of_groups(n0, F) + group_number(t.at[0], t.at[1], n0, F)
    if F.CENTER:
        if F.PHASE == _STATISTICS or GROUPS <= 16:
            mean, m2 = chunk_moments(o, v, t, block_a, chunk_s, steps, n0, F)
        else:
            n = chunk_size(chunk, tl.cdiv(extent(3, n0, F), F.WIDTH_S), 1, n0, F)
            near, mean, m2 = moments(v, t, n, 0.0, F)
            mean = (near - median_elements(o, t.at[0], t.at[1], t.mk, n0, F)) + mean
        tl.store(o.part_mean + at, mean, mask=t.mk)
    else:
        _, d2 = add_moments(None, None, v, t, 0.0, F)
        for i in range(1, tiles_of(chunk_s, steps, n0, F)):
            u = next_tile(t, block_a, chunk_s * steps + i, n0, F)
            _, d2 = add_moments(None, d2, read_input(o, u, F), u, 0.0, F)
        m2 = tile_total(d2, F)
    tl.store(o.part_m2 + at, m2, mask=t.mk)


@triton.jit
def next_tile(t, block_a, tile_s, n0, F: tl.constexpr):
    return tile_at(t.at[0], t.at[1], t.mk, block_a * F.WIDTH_A, tile_s * F.WIDTH_S, n0, F)


@triton.jit
def chunk_moments(o, v, t, block_a, chunk_s, steps, n0, F: tl.constexpr):
    """mean - median and m2 of a chunk, in one pass about median_elements() of the group, or where tiles hold many
    groups, of which one is likely to have it far from its mean, about the mean of its first tile; again where squares
    about that cancel."""
    GROUPS: tl.constexpr = F.FOLD[2]
    n_a = count(tl.minimum(extent(2, n0, F) - block_a * F.WIDTH_A, F.WIDTH_A), F)
    n_s = extent(3, n0, F) - chunk_s * steps * F.WIDTH_S
    n = n_a * count(tl.minimum(n_s, steps * F.WIDTH_S), F)
    median = median_elements(o, t.at[0], t.at[1], t.mk, n0, F)
    shift = median
    if GROUPS >= 16:
        d1, _ = add_moments(None, None, v, t, 0.0, F)
        shift = tile_total(d1, F) / (n_a * count(tl.minimum(n_s, F.WIDTH_S), F))
    s1, s2 = chunk_sums(o, v, t, shift, block_a, chunk_s, steps, n0, F)
    mean = s1 / n
    m2 = tl.maximum(s2 - s1 * mean, 0.0)
    again = cancels(m2, s2)
    if any_of(again, F):
        near = shift + mean
        s1, s2 = chunk_sums(o, v, t, near, block_a, chunk_s, steps, n0, F, None)
        # Of those groups alone: a row's bits do not depend on its neighbours.
        m2 = tl.where(again, tl.maximum(s2 - s1 * (s1 / n), 0.0), m2)
        mean = tl.where(again, (near - shift) + s1 / n, mean)
    return (shift - median) + mean, m2


@triton.jit
def chunk_sums(o, v, t, near, block_a, chunk_s, steps, n0, F: tl.constexpr, write=True):
    """Sums of x - near and of its squares over a chunk, whose first tile is v; `write`: as of read_input()."""
    # Of both tiles of a launch that reads two at once little is kept beside them; parameters along a leave no room.
    PURE: tl.constexpr = F.PHASE == _STATISTICS or not F.SHARED_A
    d1, d2 = add_moments(None, None, v, t, near, F, PURE)
    for i in range(1, tiles_of(chunk_s, steps, n0, F)):
        u = next_tile(t, block_a, chunk_s * steps + i, n0, F)
        d1, d2 = add_moments(d1, d2, read_input(o, u, F, ANY, write), u, near, F, True)
    return totals(d1, d2, F)
