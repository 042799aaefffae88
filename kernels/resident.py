"""A whole group in the registers of one program: x, and backward dy, are read once."""

import triton
import triton.language as tl

from .bundles import APPLY, STATISTICS
from .elements import least
from .memory import load_at, store
from .norm import (
    elements,
    given_sums,
    gradient,
    group_sums,
    keep_moments,
    moments,
    parameters,
    read_gradient,
    read_input,
    read_sum,
    saved_statistics,
    sum_lanes,
    tile_sums,
    write_gradient,
    write_output,
)
from .sums import joined, of_lanes, over_rows, plus, side_by_side, sums_along
from .tile import extent, first_columns, group_size, kept, offsets, tile_at, tile_of, widened, zeros

_APPLY = tl.constexpr(APPLY)
_STATISTICS = tl.constexpr(STATISTICS)


@triton.jit(do_not_specialize=["n0"])
def normalize(o, n0, eps: "fp64", momentum: "fp64", F: tl.constexpr):
    """x[m, c, a, s] -> y[m, c, a, s], mean[m, c], rstd[m, c].  One program for each block of groups."""
    t = tile_of(tl.program_id(0), 0, 0, n0, F)
    v = read_input(o, t, F)
    n = group_size(n0, F)
    m = t.at[0]
    c = t.at[1]
    first = elements(o, (m, c, 0, 0), t.mk, F) if F.CENTER and F.BLOCK_K == 1 else 0.0
    near, mean, m2 = moments(v, t, n, first, F)
    mean = near + mean
    rstd = keep_moments(o, mean, m2 / n, m, c, first_columns(t, F), n0, eps, momentum, F)
    write_output(o, v, mean, rstd, t, F)


@triton.jit(do_not_specialize=["n0", "steps"])
def grad_normalize(o, n0, steps, F: tl.constexpr):
    """x, dy[m, c, a, s] -> dx[m, c, a, s], and dw, db[part, c, a] (DIRECT: dw, db[c, a]): one read of x and dy.

    A program walks over m in `steps` blocks for one c (or block of c), PIECES blocks of a and the whole of s; w, b and
    the sums for dw and db stay in registers.  PHASE, where the pieces are not all of a:

        STATISTICS    p1, p0[block of a, m, c] = sum_a (w · g · xhat, w · g), dw and db, and no dx
        APPLY         dx from given c1, c0; from none, where the statistics of x were constants: then dw and db too
    """
    PIECES: tl.constexpr = F.PIECES
    LANE: tl.constexpr = F.LANE
    COLUMNS: tl.constexpr = F.FOLD[1]
    C_BLOCK: tl.constexpr = 1 if F.ALONG_M else COLUMNS
    M_STEP: tl.constexpr = COLUMNS if F.ALONG_M else 1
    blocks_a = tl.cdiv(extent(2, n0, F), F.WIDTH_A)
    blocks_c = tl.cdiv(extent(1, n0, F), C_BLOCK)
    i = tl.program_id(0)
    block_a = i % blocks_a
    a_start = block_a * F.WIDTH_A
    c_start = widened(i // blocks_a % blocks_c, F) * C_BLOCK
    part = widened(i // blocks_a // blocks_c, F)
    n = group_size(n0, F)

    m, c, mk = kept(0 * part, c_start, n0, F, F.BLOCK_K)
    w, b = parameters(o, tile_at(m, c, mk, a_start, 0, n0, F), F)
    dw = ()
    db = ()
    for p in tl.static_range(PIECES):
        dw = dw + (zeros(F.BLOCK_K // LANE, F.BLOCK_A, 1, F.ACC),)
        db = db + (zeros(F.BLOCK_K // LANE, F.BLOCK_A, 1, F.ACC),)

    # Tiles of several m may stick out; of those of one there are no more than m has points.
    blocks_m = steps if F.BLOCK_K > 1 and F.ALONG_M else tl.minimum(steps, extent(0, n0, F) - part * steps)
    for j in range(0, blocks_m):
        m, c, mk = kept((part * steps + j) * M_STEP, c_start, n0, F, F.BLOCK_K)
        t = tile_at(m, c, mk, a_start, 0, n0, F)
        mean, rstd = saved_statistics(o, t, F)
        streams = read_gradient(o, t, F)
        dsum = read_sum(o, t, F)
        ds = ()
        gs = ()
        dw_next = ()
        db_next = ()
        t1 = None
        t0 = None
        for p in tl.static_range(PIECES):
            d, g = gradient(o, streams, mean, rstd, w, b, p, F)
            p1, p0 = tile_sums(g * d, g, F)
            t1 = plus(t1, w[p] * p1)
            t0 = plus(t0, w[p] * p0)
            dw_next = dw_next + (dw[p] + of_lanes(p1 * rstd, F),)
            db_next = db_next + (db[p] + of_lanes(p0, F),)
            ds = ds + (d,)
            gs = gs + (g,)
        dw = dw_next
        db = db_next
        if F.PHASE == _APPLY:
            k1, k0 = given_sums(o, t, rstd, F, False)
        else:
            t1, t0 = group_sums(t1, t0, F)
            k1 = t1 * rstd * rstd * (rstd / n)
            k0 = t0 * (rstd / n) if F.CENTER else 0.0
        if F.PHASE == _STATISTICS:
            at = block_a * extent(0, n0, F) * extent(1, n0, F) + m * extent(1, n0, F) + c
            store(o.p1, at, t1 * rstd, mk)
            if o.p0 is not None:
                store(o.p0, at, t0, mk)
        else:
            for p in tl.static_range(PIECES):
                write_gradient(o, ds[p], gs[p], dsum, k1, k0, w[p] * rstd, t, p, F)

    m, c, mk = kept(0 * part, c_start, n0, F, F.BLOCK_K)
    t = tile_at(m, c, mk, a_start, 0, n0, F)
    store_affine(o, side_by_side(dw, F), side_by_side(db, F), t, part, n0, F)


@triton.jit(do_not_specialize=["n0"])
def grad_group(o, n0, F: tl.constexpr):
    """As grad_normalize, of one large group a program: x and dy are held as they came, and what is made of them is made
    twice.  dw, db[m, c, a] (DIRECT, where there is one m: dw, db[c, a])."""
    PIECES: tl.constexpr = F.PIECES
    P: tl.constexpr = triton.next_power_of_2(PIECES)
    V: tl.constexpr = least(F.ACCESS, F.BLOCK_S)
    t = tile_of(tl.program_id(0), 0, 0, n0, F)
    mean, rstd = saved_statistics(o, t, F)
    w, b = parameters(o, t, F)
    streams = read_gradient(o, t, F)
    p1 = ()
    p0 = ()
    for p in tl.static_range(PIECES):
        d, g = gradient(o, streams, mean, rstd, w, b, p, F, False)
        # What a lane has at once, so that little is left of a piece.
        p1 = p1 + (tl.sum(tl.reshape(g * d, (F.BLOCK_A, F.BLOCK_S // V, V)), 2),)
        p0 = p0 + (tl.sum(tl.reshape(g, (F.BLOCK_A, F.BLOCK_S // V, V)), 2),)
    p1 = tl.reshape(joined(p1, P), (F.BLOCK_A, F.BLOCK_S // V, P))
    p0 = tl.reshape(joined(p0, P), (F.BLOCK_A, F.BLOCK_S // V, P))
    p1, p0 = sums_along(p1, p0, 1, F)
    p1 = tl.reshape(p1, (1, F.BLOCK_A, P))
    p0 = tl.reshape(p0, (1, F.BLOCK_A, P))
    store_affine(o, p1 * rstd, p0, t, t.at[0], n0, F)
    if o.w is not None:
        W: tl.constexpr = F.W
        a = points_of_a(t, F)
        scale = load_at(o.w, (t.at[0], t.at[1], a, 0), W, a < t.n_a, F)
        p1 = p1 * scale
        p0 = p0 * scale
    t1, t0 = group_sums(p1, p0, F)
    n = group_size(n0, F)
    k1 = t1 * rstd * rstd * (rstd / n)
    k0 = t0 * (rstd / n) if F.CENTER else 0.0
    dsum = read_sum(o, t, F)
    for p in tl.static_range(PIECES):
        d, g = gradient(o, streams, mean, rstd, w, b, p, F)
        write_gradient(o, d, g, dsum, k1, k0, w[p] * rstd, t, p, F)


@triton.jit
def points_of_a(t, F: tl.constexpr):
    """Those of all pieces: [1, BLOCK_A, pieces]."""
    P: tl.constexpr = triton.next_power_of_2(F.PIECES)
    return t.at[2] + (tl.arange(0, P) * F.BLOCK_A)[None, None, :]


@triton.jit
def store_affine(o, dw, db, t, part, n0, F: tl.constexpr):
    """What a program has added up for dw and db, all pieces of a at once: [lanes of m or c, BLOCK_A, pieces]."""
    W: tl.constexpr = F.W
    PER_SUM: tl.constexpr = F.FOLD[3]
    P: tl.constexpr = triton.next_power_of_2(F.PIECES)
    c = t.at[1]
    a = points_of_a(t, F)
    if F.DIRECT:
        at = offsets((0, c, a, 0), W, F)
    else:
        at = (part * extent(1, n0, F) + c) // PER_SUM * extent(2, n0, F) + a
    mask = a < t.n_a
    if not F.ALONG_M:
        mask = mask & sum_lanes(t, F)
    if o.dw is not None:
        store(o.dw, at, over_rows(dw, P, F) if F.ALONG_M else dw, mask)
    if o.db is not None:
        store(o.db, at, over_rows(db, P, F) if F.ALONG_M else db, mask)
