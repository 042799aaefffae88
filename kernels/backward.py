"""Backward kernels.  With g = dy · act'(z):

    p1, p0 = sum_s (g · xhat, g)            c1, c0 = sum_a (w · p1, w · p0) / |R|      (RMS: c0 = 0)
    dw, db = sum_m (p1, p0)                 dx     = rstd · (w · g - xhat · c1 - c0)
"""

import triton
import triton.language as tl

from .epilogue import affine, read_gradient, write_gradient
from .forward import chunk_of
from .tile import (
    by_group,
    extent,
    first_columns,
    group_size,
    kept,
    kept_block,
    load,
    load_shared,
    offsets,
    reduced_a,
    reduced_s,
    store,
    widened,
)


@triton.jit
def saved_statistics(mean_ptr, rstd_ptr, m, c, mk, SPACE: tl.constexpr, STAT: tl.constexpr, ACC: tl.constexpr):
    o = offsets((m, c, 0, 0), SPACE, STAT)
    mean = 0.0
    if mean_ptr is not None:
        mean = load(mean_ptr, o, mk, ACC)
    return mean, load(rstd_ptr, o, mk, ACC)


@triton.jit
def tile_sums(t1, t0, BLOCK_K: tl.constexpr, FOLD: tl.constexpr):
    """Sums over s; also over the columns of a group, where they share their parameters (see FOLD)."""
    p1 = tl.sum(t1, 2, keep_dims=True)
    p0 = tl.sum(t0, 2, keep_dims=True)
    PER_SUM: tl.constexpr = FOLD[3]
    if PER_SUM > 1:
        p1 = by_group(p1, BLOCK_K, FOLD)
        p0 = by_group(p0, BLOCK_K, FOLD)
    return p1, p0


@triton.jit
def weighted(
    p, w_ptr, at, mask, SPACE: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """Sum over a group of w · p, for p of tile_sums()"""
    PER_SUM: tl.constexpr = FOLD[3]
    v = tl.sum(affine(p, w_ptr, None, at, mask, SPACE, W, ACC), 1, keep_dims=True)
    if PER_SUM == 1:
        v = by_group(v, BLOCK_K, FOLD)
    return v


@triton.jit
def sum_lanes(m, c, mk, ALONG_M: tl.constexpr, FOLD: tl.constexpr):
    """Lanes that store a sum of tile_sums()."""
    PER_SUM: tl.constexpr = FOLD[3]
    if PER_SUM > 1:
        mk = first_columns(m, c, mk, ALONG_M, FOLD)
    return mk


@triton.jit
def given_sums(c1_ptr, c0_ptr, m, c, mk, SPACE: tl.constexpr, STAT: tl.constexpr):
    o = offsets((m, c, 0, 0), SPACE, STAT)
    c1 = 0.0
    c0 = 0.0
    if c1_ptr is not None:
        c1 = load_shared(c1_ptr, o, mk)
    if c0_ptr is not None:
        c0 = load_shared(c0_ptr, o, mk)
    return c1, c0


@triton.jit(do_not_specialize=["N0", "steps"])
def grad_normalize(
    x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean_ptr, rstd_ptr, c1_ptr, c0_ptr, dsum_ptr,
    dx_ptr, dpost_ptr, dw_ptr, db_ptr,
    N0, steps,
    SPACE: tl.constexpr, X: tl.constexpr, DY: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, DSUM: tl.constexpr,
    DX: tl.constexpr, DPOST: tl.constexpr, STAT: tl.constexpr, CENTER: tl.constexpr, ACT_GRAD: tl.constexpr,
    ACC: tl.constexpr, DIRECT: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x, dy[m, c, a, s] -> dx[m, c, a, s], dw, db[part, c, a] (DIRECT: dw, db[c, a]): one read of x and dy.

    A program walks over m in `steps` blocks for one c (or block of c) and one block of a, the whole of s on chip, and
    adds up dw and db in registers.  c1 and c0 are formed on chip where the tile holds whole groups, else given.
    """
    blocks_a = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A)
    i = tl.program_id(0)
    block_a = i % blocks_a
    i = i // blocks_a
    COLUMNS: tl.constexpr = FOLD[1]
    PER_SUM: tl.constexpr = FOLD[3]
    C_BLOCK: tl.constexpr = 1 if ALONG_M else COLUMNS
    blocks_c = tl.cdiv(extent(SPACE, 1, N0), C_BLOCK)
    c_start = widened(i % blocks_c, WIDE) * C_BLOCK
    part = widened(i // blocks_c, WIDE)
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(0, SPACE, N0, BLOCK_S, WIDE)
    n = group_size(SPACE, N0, FOLD, ACC)

    if dw_ptr is not None:
        dw = tl.zeros((BLOCK_K, BLOCK_A, 1), ACC)
    if db_ptr is not None:
        db = tl.zeros((BLOCK_K, BLOCK_A, 1), ACC)
    M_STEP: tl.constexpr = COLUMNS if ALONG_M else 1
    for j in range(0, steps):
        m_start = (part * steps + j) * M_STEP
        m, c, mk = kept(m_start, c_start, SPACE, N0, ALONG_M, BLOCK_K, WIDE, COLUMNS)
        if not ALONG_M:
            # As a block: the interpreter of Triton 3.9 takes no mask made of a block and a scalar.
            mk = mk & (m + c * 0 < extent(SPACE, 0, N0))
        at = (m, c, a, s)
        mask = mk & ma & ms
        wmask = ma if ALONG_M else mk & ma
        mean, rstd = saved_statistics(mean_ptr, rstd_ptr, m, c, mk, SPACE, STAT, ACC)
        xhat, g = read_gradient(
            x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean, rstd, at, wmask, mask,
            SPACE, X, DY, W, POST, ACT_GRAD, ACC,
        )  # fmt: skip
        p1, p0 = tile_sums(g * xhat, g, BLOCK_K, FOLD)
        if dw_ptr is not None:
            dw += p1
        if db_ptr is not None:
            db += p0
        if c1_ptr is None:
            c1 = weighted(p1, w_ptr, at, wmask, SPACE, W, ACC, BLOCK_K, FOLD) / n
            c0 = 0.0
            if CENTER:
                c0 = weighted(p0, w_ptr, at, wmask, SPACE, W, ACC, BLOCK_K, FOLD) / n
        else:
            c1, c0 = given_sums(c1_ptr, c0_ptr, m, c, mk, SPACE, STAT)
        write_gradient(
            xhat, g, c1, c0, rstd, w_ptr, dsum_ptr, dx_ptr, dpost_ptr, at, wmask, mask,
            SPACE, W, DSUM, DX, DPOST, ACC,
        )  # fmt: skip

    m, c, mk = kept(0 * part, c_start, SPACE, N0, ALONG_M, BLOCK_K, WIDE, COLUMNS)
    if DIRECT:
        o = offsets((0, c, a, 0), SPACE, W)
    else:
        o = (part * extent(SPACE, 1, N0) + c) // PER_SUM * extent(SPACE, 2, N0) + a
    mask = ma if ALONG_M else sum_lanes(m, c, mk, ALONG_M, FOLD) & ma
    if dw_ptr is not None:
        store(dw_ptr, o, tl.sum(dw, 0, keep_dims=True) if ALONG_M else dw, mask)
    if db_ptr is not None:
        store(db_ptr, o, tl.sum(db, 0, keep_dims=True) if ALONG_M else db, mask)


@triton.jit(do_not_specialize=["N0", "chunks_s", "steps"])
def grad_statistics(
    x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean_ptr, rstd_ptr, dsum_ptr, dx_ptr, dpost_ptr, p1_ptr, p0_ptr,
    N0, chunks_s, steps,
    SPACE: tl.constexpr, X: tl.constexpr, DY: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, DSUM: tl.constexpr,
    DX: tl.constexpr, DPOST: tl.constexpr, STAT: tl.constexpr, ACT_GRAD: tl.constexpr, ACC: tl.constexpr,
    PER_A: tl.constexpr, KEPT_FIRST: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x, dy[m, c, a, s] -> p1, p0[chunk, m, c, a] (PER_A), or sum_a of w · p1, w · p0 [chunk, m, c].

    Where the statistics are constants (dx_ptr given), dx = rstd · w · g is written in the same pass.
    """
    block_k, block_a, chunk_s = chunk_of(tl.program_id(0), chunks_s, SPACE, N0, KEPT_FIRST, ALONG_M, FOLD, BLOCK_A)
    m, c, mk = kept_block(block_k, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    wmask = ma if ALONG_M else mk & ma
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, m, c, mk, SPACE, STAT, ACC)
    t1 = tl.zeros((BLOCK_K, BLOCK_A, BLOCK_S), ACC)
    t0 = tl.zeros((BLOCK_K, BLOCK_A, BLOCK_S), ACC)
    for i in range(0, steps):
        s, ms = reduced_s((chunk_s * steps + i) * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
        at = (m, c, a, s)
        mask = mk & ma & ms
        xhat, g = read_gradient(
            x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean, rstd, at, wmask, mask,
            SPACE, X, DY, W, POST, ACT_GRAD, ACC,
        )  # fmt: skip
        write_gradient(
            xhat, g, 0.0, 0.0, rstd, w_ptr, dsum_ptr, dx_ptr, dpost_ptr, at, wmask, mask,
            SPACE, W, DSUM, DX, DPOST, ACC,
        )  # fmt: skip
        t1 += g * xhat
        t0 += g

    PER_SUM: tl.constexpr = FOLD[3]
    groups = extent(SPACE, 0, N0) * extent(SPACE, 1, N0) // PER_SUM
    group = (m * extent(SPACE, 1, N0) + c) // PER_SUM
    mk = sum_lanes(m, c, mk, ALONG_M, FOLD)
    p1, p0 = tile_sums(t1, t0, BLOCK_K, FOLD)
    if PER_A:
        o = (chunk_s * groups + group) * extent(SPACE, 2, N0) + a
        mask = mk & ma
    else:
        o = (block_a * chunks_s + chunk_s) * groups + group
        mask = mk
        p1 = weighted(p1, w_ptr, (m, c, a, 0), wmask, SPACE, W, ACC, BLOCK_K, FOLD)
        if p0_ptr is not None:
            p0 = weighted(p0, w_ptr, (m, c, a, 0), wmask, SPACE, W, ACC, BLOCK_K, FOLD)
    tl.store(p1_ptr + o, p1, mask=mask)
    if p0_ptr is not None:
        tl.store(p0_ptr + o, p0, mask=mask)


@triton.jit(do_not_specialize=["N0", "chunks_s"])
def grad_apply(
    x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean_ptr, rstd_ptr, c1_ptr, c0_ptr, dsum_ptr, dx_ptr, dpost_ptr,
    N0, chunks_s,
    SPACE: tl.constexpr, X: tl.constexpr, DY: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, DSUM: tl.constexpr,
    DX: tl.constexpr, DPOST: tl.constexpr, STAT: tl.constexpr, ACT_GRAD: tl.constexpr, ACC: tl.constexpr,
    KEPT_FIRST: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x, dy[m, c, a, s], c1, c0[m, c] -> dx[m, c, a, s]; the last tile first, see forward.apply."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    block_k, block_a, chunk_s = chunk_of(i, chunks_s, SPACE, N0, KEPT_FIRST, ALONG_M, FOLD, BLOCK_A)
    m, c, mk = kept_block(block_k, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(chunk_s * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
    at = (m, c, a, s)
    mask = mk & ma & ms
    wmask = ma if ALONG_M else mk & ma
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, m, c, mk, SPACE, STAT, ACC)
    c1, c0 = given_sums(c1_ptr, c0_ptr, m, c, mk, SPACE, STAT)
    xhat, g = read_gradient(
        x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean, rstd, at, wmask, mask, SPACE, X, DY, W, POST, ACT_GRAD, ACC
    )
    write_gradient(
        xhat, g, c1, c0, rstd, w_ptr, dsum_ptr, dx_ptr, dpost_ptr, at, wmask, mask, SPACE, W, DSUM, DX, DPOST, ACC
    )
