"""Backward, where a group does not fit one program: as stream.py, with x and dy."""

import triton
import triton.language as tl

from .bundles import APPLY, STATISTICS
from .finish import merge_group
from .memory import ANY, EVICT_FIRST, EVICT_LAST, store
from .norm import (
    given_sums,
    gradient,
    parameters,
    read_gradient,
    read_sum,
    saved_statistics,
    tile_sums,
    write_gradient,
)
from .sums import plus
from .tickets import FIRST_STATE, arrive, draw, leave, pair, publish, wait
from .tile import both, extent, inside, mask_a, numbered_tile, tile_at, tiles_of, zeros

_APPLY = tl.constexpr(APPLY)
_STATISTICS = tl.constexpr(STATISTICS)


@triton.jit(do_not_specialize=["n0", "number"])
def grad_stream(o, n0, number, F: tl.constexpr):
    """x, dy[m, c, a, s] -> dx[m, c, a, s] and dw, db[m, c, a] (DIRECT: dw, db[c, a]); `number` as in stream().

    STATISTICS    p1, p0[chunk, m, c, a]; given dx, where the statistics of x were constants: dx = rstd · w · g
    APPLY         dx from c1, c0[m, c]
    """
    PIECES: tl.constexpr = F.PIECES
    if F.PHASE == _STATISTICS:
        t, _, block_a, chunk_s = numbered_tile(tl.program_id(0), number, n0, F)
        mean, rstd = saved_statistics(o, t, F)
        w, b = parameters(o, t, F)
        t1 = zeros(F.BLOCK_K, F.BLOCK_A, F.BLOCK_S, F.ACC)
        t0 = zeros(F.BLOCK_K, F.BLOCK_A, F.BLOCK_S, F.ACC)
        for i in range(0, tiles_of(chunk_s, number, n0, F)):
            s_start = (chunk_s * number + i) * F.WIDTH_S
            u = tile_at(t.at[0], t.at[1], t.mk, block_a * F.WIDTH_A, s_start, n0, F)
            streams = read_gradient(o, u, F)
            dsum = read_sum(o, u, F)
            for p in tl.static_range(PIECES):
                d, g = gradient(o, streams, mean, rstd, w, b, p, F)
                write_gradient(o, d, g, dsum, 0.0, 0.0, rstd * w[p], u, p, F)
                t1 += g * d
                t0 += g
        p1, p0 = tile_sums(t1, t0, F)
        store_sums(o, p1 * rstd, p0, t, chunk_of(block_a, chunk_s, tl.cdiv(t.n_s, F.WIDTH_S * number), F), n0, F)
    elif F.PHASE == _APPLY:
        t, _, _, _ = numbered_tile(tl.num_programs(0) - 1 - tl.program_id(0), 1, n0, F)
        mean, rstd = saved_statistics(o, t, F)
        w, b = parameters(o, t, F)
        apply(o, read_gradient(o, t, F), mean, rstd, w, b, t, False, F)
    else:
        paired(o, n0, number, F)


@triton.jit
def paired(o, n0, lead, F: tl.constexpr):
    chunks_s = tl.cdiv(extent(3, n0, F), F.WIDTH_S)
    tiles = chunks_s * tl.cdiv(extent(2, n0, F), F.WIDTH_A)
    begins, tile, applies, applied = pair(draw(o.tickets), lead)
    t, unit, block_a, chunk_s = numbered_tile(tile, 1, n0, F)
    u, unit_u, _, _ = numbered_tile(applied, 1, n0, F)

    # Both tiles are asked for before either is used, see stream.paired(); ptxas may move loads of the first behind the
    # branch.  What are numbers are loaded here too, or they would be one more round after the wait.
    NUMBERS: tl.constexpr = F.BLOCK_K == 1 and F.SHARED_A
    streams = read_gradient(o, t, F, EVICT_LAST)
    again = read_gradient(o, u, F, EVICT_FIRST)
    mean, rstd = saved_statistics(o, t, F)
    w, b = parameters(o, t, F)
    if NUMBERS:
        mean_u, rstd_u = saved_statistics(o, u, F)
        w_u, b_u = parameters(o, u, F)
    if begins:
        PIECES: tl.constexpr = F.PIECES
        p1 = None
        p0 = None
        for p in tl.static_range(PIECES):
            d, g = gradient(o, streams, mean, rstd, w, b, p, F)
            p1 = plus(p1, g * d)
            p0 = plus(p0, g)
        if F.CLAMP_A:
            p1 = inside(p1, t, 0, F)
            p0 = inside(p0, t, 0, F)
        p1, p0 = tile_sums(p1, p0, F)
        store_sums(o, p1 * rstd, p0, t, chunk_of(block_a, chunk_s, chunks_s, F), n0, F)
        state = o.tickets + FIRST_STATE + unit
        if arrive(state, tiles):
            merge_group(o, unit, tiles if F.SHARED_A else chunks_s, n0, F)
            publish(state)
    if applies:
        state = o.tickets + FIRST_STATE + unit_u
        wait(state, tiles, F)
        if not NUMBERS:
            mean_u, rstd_u = saved_statistics(o, u, F)
            w_u, b_u = parameters(o, u, F)
        apply(o, again, mean_u, rstd_u, w_u, b_u, u, True, F, EVICT_FIRST)
        leave(state, tiles, F)


@triton.jit
def apply(o, streams, mean, rstd, w, b, t, SHARED: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr = ANY):
    k1, k0 = given_sums(o, t, rstd, F, SHARED)
    dsum = read_sum(o, t, F)
    PIECES: tl.constexpr = F.PIECES
    for p in tl.static_range(PIECES):
        d, g = gradient(o, streams, mean, rstd, w, b, p, F)
        write_gradient(o, d, g, dsum, k1, k0, rstd * w[p], t, p, F, KEEP)


@triton.jit
def chunk_of(block_a, chunk_s, chunks_s, F: tl.constexpr):
    """Which of the partial results of a group (and of a, where parameters run along it) those of a tile are."""
    return block_a * chunks_s + chunk_s if F.SHARED_A else chunk_s


@triton.jit
def extent_a(n0, F: tl.constexpr):
    """Number of sums of a group that are kept apart."""
    return 1 if F.SHARED_A else extent(2, n0, F)


@triton.jit
def store_sums(o, p1, p0, t, chunk, n0, F: tl.constexpr):
    """p1, p0 of one chunk."""
    n_a = extent_a(n0, F)
    column = (t.at[0] * extent(1, n0, F) + t.at[1]) * n_a
    mask = t.mk
    if not F.SHARED_A:
        column = column + t.at[2]
        mask = both(mask, mask_a(t, 0, F))
    at = chunk * (extent(0, n0, F) * extent(1, n0, F)) * n_a + column
    store(o.p1, at, p1, mask)
    if o.p0 is not None:
        store(o.p0, at, p0, mask)
