"""Small kernels that combine partial results, always in index order: same input, same bits."""

import triton
import triton.language as tl

from .epilogue import affine
from .forward import finish_moments
from .tile import extent, group_block, group_size, load_shared, number_of_groups, offset, offsets, store


@triton.jit
def chunk_size(
    p, chunks_s, steps, SPACE: tl.constexpr, N0, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Number of elements in chunk p of a group (0 past the last)."""
    n_a = tl.minimum(tl.maximum(extent(SPACE, 2, N0) - (p // chunks_s) * BLOCK_A, 0), BLOCK_A)
    n_s = tl.minimum(extent(SPACE, 3, N0) - (p % chunks_s) * (steps * BLOCK_S), steps * BLOCK_S)
    PER: tl.constexpr = FOLD[0]
    return n_a.to(ACC) * n_s.to(ACC) * PER


@triton.jit
def merge_moments(
    part_mean_ptr, part_m2_ptr, row, first, count_p, n, o, mk, groups, chunks_s, steps,
    SPACE: tl.constexpr, N0, CENTER: tl.constexpr, ACC: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """mean[chunk, o], m2[chunk, o] -> mean, m2 of chunks first to first + count_p, n elements in all.

    Chan's merge in two passes: the mean first, then m2 + n[chunk] · (mean[chunk] - mean)².  `row`: where the first
    chunk lies in memory.
    """
    GROUPS: tl.constexpr = FOLD[2]
    p = tl.arange(0, BLOCK_P)[None, None, :]
    mean = 0.0
    if CENTER:
        t = tl.zeros((GROUPS, 1, BLOCK_P), ACC)
        for i in range(0, count_p, BLOCK_P):
            d = load_shared(part_mean_ptr, (row + i + p) * groups + o, mk & (i + p < count_p))
            t += d * chunk_size(first + i + p, chunks_s, steps, SPACE, N0, BLOCK_A, BLOCK_S, FOLD, ACC)
        mean = tl.sum(t, 2, keep_dims=True) / n
    t = tl.zeros((GROUPS, 1, BLOCK_P), ACC)
    for i in range(0, count_p, BLOCK_P):
        mask = mk & (i + p < count_p)
        t += load_shared(part_m2_ptr, (row + i + p) * groups + o, mask)
        if CENTER:
            d = tl.where(mask, load_shared(part_mean_ptr, (row + i + p) * groups + o, mask) - mean, 0.0)
            t += d * d * chunk_size(first + i + p, chunks_s, steps, SPACE, N0, BLOCK_A, BLOCK_S, FOLD, ACC)
    return mean, tl.sum(t, 2, keep_dims=True)


@triton.jit(do_not_specialize=["N0", "chunks", "chunks_s", "steps"])
def finish_statistics(
    part_mean_ptr, part_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    N0, chunks, chunks_s, steps, eps: "fp64", momentum: "fp64",
    SPACE: tl.constexpr, STAT: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr, ALONG_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """mean[chunk, m, c], m2[chunk, m, c] -> mean[m, c], rstd[m, c], running statistics[c]"""
    m, c, mk = group_block(tl.program_id(0), SPACE, N0, ALONG_M, FOLD, WIDE)
    o = offsets((m, c, 0, 0), SPACE, STAT)
    n = group_size(SPACE, N0, FOLD, ACC)
    mean, m2 = merge_moments(
        part_mean_ptr, part_m2_ptr, 0, 0, chunks, n, o, mk, number_of_groups(SPACE, N0, FOLD), chunks_s, steps,
        SPACE, N0, CENTER, ACC, BLOCK_A, BLOCK_S, BLOCK_P, FOLD,
    )  # fmt: skip
    finish_moments(
        mean, m2 / n, n, m, c, mk, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
        N0, eps, momentum, SPACE, STAT, ACC, FOLD,
    )  # fmt: skip


@triton.jit
def merge_sums(
    p1_ptr, p0_ptr, row, count_p, o, mask, columns, BOTH: tl.constexpr, ACC: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """p1, p0[chunk, o] -> their sums over count_p chunks, the first of which is `row`."""
    p = tl.arange(0, BLOCK_P)[None, None, :]
    t1 = tl.zeros((BLOCK_K, BLOCK_A, BLOCK_P), ACC)
    t0 = tl.zeros((BLOCK_K, BLOCK_A, BLOCK_P), ACC)
    for i in range(0, count_p, BLOCK_P):
        q = (row + i + p) * columns + o
        here = mask & (i + p < count_p)
        t1 += load_shared(p1_ptr, q, here)
        if BOTH:
            t0 += load_shared(p0_ptr, q, here)
    return tl.sum(t1, 2, keep_dims=True), tl.sum(t0, 2, keep_dims=True)


@triton.jit
def merge_group(
    p1_ptr, p0_ptr, w_ptr, c1_ptr, c0_ptr, dw_ptr, db_ptr, row, chunks, m, c, mk,
    SPACE: tl.constexpr, N0, W: tl.constexpr, STAT: tl.constexpr, A: tl.constexpr, DIRECT: tl.constexpr,
    ACC: tl.constexpr, ALONG_M: tl.constexpr, FOLD: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """p1, p0[chunk, m, c, a], w[c, a] -> c1, c0[m, c] = sum over (chunk, a) of w · p / |R|;
    dw, db[m, c, a] (DIRECT, where there is one m: dw, db[c, a]) = sum over chunk of p.

    A: extent of a in p, which may be the columns of a group.
    """
    PER: tl.constexpr = FOLD[0]
    GROUPS: tl.constexpr = FOLD[2]
    groups = number_of_groups(SPACE, N0, FOLD)
    n = group_size(SPACE, N0, FOLD, ACC)
    BOTH: tl.constexpr = p0_ptr is not None
    c1 = tl.zeros((GROUPS, 1, 1), ACC)
    c0 = tl.zeros((GROUPS, 1, 1), ACC)
    for i in range(0, A, BLOCK_A):
        a = (i + tl.arange(0, BLOCK_A))[None, :, None]
        ma = a < A
        mask = mk & ma
        column = (m * extent(SPACE, 1, N0) + c) // PER * A + a
        t1, t0 = merge_sums(p1_ptr, p0_ptr, row, chunks, column, mask, groups * A, BOTH, ACC, GROUPS, BLOCK_A, BLOCK_P)
        if PER > 1 and A > 1:  # the a of p are columns of c
            at = (m, c + a, 0, 0)
            wmask = mask
        else:
            at = (m, c, a, 0)
            wmask = ma if ALONG_M else mask
        if DIRECT:
            o = offsets((0, at[1], at[2], 0), SPACE, W)
        else:
            o = column
        if dw_ptr is not None:
            store(dw_ptr, o, t1, mask)
        if db_ptr is not None:
            store(db_ptr, o, t0, mask)
        if c1_ptr is not None:
            c1 += tl.sum(affine(t1, w_ptr, None, at, wmask, SPACE, W, ACC), 1, keep_dims=True)
            if BOTH:
                c0 += tl.sum(affine(t0, w_ptr, None, at, wmask, SPACE, W, ACC), 1, keep_dims=True)
    o = offsets((m, c, 0, 0), SPACE, STAT)
    if c1_ptr is not None:
        tl.store(c1_ptr + o, c1 / n, mask=mk)
    if c0_ptr is not None:
        tl.store(c0_ptr + o, c0 / n, mask=mk)


@triton.jit(do_not_specialize=["N0", "chunks"])
def finish_group(
    p1_ptr, p0_ptr, w_ptr, c1_ptr, c0_ptr, dw_ptr, db_ptr,
    N0, chunks,
    SPACE: tl.constexpr, W: tl.constexpr, STAT: tl.constexpr, A: tl.constexpr, DIRECT: tl.constexpr,
    ACC: tl.constexpr, ALONG_M: tl.constexpr, FOLD: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """merge_group() for each block of groups: one read of the partial results gives c1, c0 and dw, db."""
    m, c, mk = group_block(tl.program_id(0), SPACE, N0, ALONG_M, FOLD, WIDE)
    merge_group(
        p1_ptr, p0_ptr, w_ptr, c1_ptr, c0_ptr, dw_ptr, db_ptr, 0, chunks, m, c, mk,
        SPACE, N0, W, STAT, A, DIRECT, ACC, ALONG_M, FOLD, BLOCK_A, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N0", "rows"])
def finish_affine(
    p1_ptr, p0_ptr, dw_ptr, db_ptr,
    N0, rows,
    SPACE: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """p1, p0[row, c, a] -> dw, db[c, a] = sum over rows, each tile [BLOCK_J, BLOCK_I] of (row, (c, a))."""
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    n_a = extent(SPACE, 2, N0)
    columns = extent(SPACE, 1, N0) * n_a
    o = offset(i // n_a, SPACE, W, 1) + offset(i % n_a, SPACE, W, 2)
    t1 = tl.zeros((BLOCK_J, BLOCK_I), ACC)
    t0 = tl.zeros((BLOCK_J, BLOCK_I), ACC)
    for row in range(0, rows, BLOCK_J):
        j = row + tl.arange(0, BLOCK_J)[:, None]
        mask = (j < rows) & (i < columns)
        q = j.to(tl.int64) * columns + i
        if dw_ptr is not None:
            t1 += tl.load(p1_ptr + q, mask=mask, other=0.0)
        if db_ptr is not None:
            t0 += tl.load(p0_ptr + q, mask=mask, other=0.0)
    if dw_ptr is not None:
        store(dw_ptr, o, tl.sum(t1, 0, keep_dims=True), i < columns)
    if db_ptr is not None:
        store(db_ptr, o, tl.sum(t0, 0, keep_dims=True), i < columns)
