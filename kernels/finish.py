"""Small kernels that combine partial results, always in index order: same input, same bits."""

import triton
import triton.language as tl

from .forward import finish_moments
from .moments import count
from .tile import extent, kept_block, load, offset, offsets, store


@triton.jit
def chunk_size(
    p, chunks_s, steps, SPACE: tl.constexpr, N0, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr
):
    """Number of elements in chunk p of a group (0 past the last)."""
    n_a = tl.minimum(tl.maximum(extent(SPACE, 2, N0) - (p // chunks_s) * BLOCK_A, 0), BLOCK_A)
    n_s = tl.minimum(extent(SPACE, 3, N0) - (p % chunks_s) * (steps * BLOCK_S), steps * BLOCK_S)
    return n_a.to(ACC) * n_s.to(ACC)


@triton.jit(do_not_specialize=["N0", "chunks", "chunks_s", "steps"])
def finish_statistics(
    part_mean_ptr, part_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    N0, chunks, chunks_s, steps, eps: "fp64", momentum: "fp64",
    SPACE: tl.constexpr, STAT: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr, ALONG_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """mean[chunk, m, c], m2[chunk, m, c] -> mean[m, c], rstd[m, c], running statistics[c].

    Chan's merge in two passes over the chunks: the mean first, then m2 + n · (mean[chunk] - mean)².
    """
    m, c, mk = kept_block(tl.program_id(0), SPACE, N0, ALONG_M, BLOCK_K, WIDE)
    o = offsets((m, c, 0, 0), SPACE, STAT)
    groups = extent(SPACE, 0, N0) * extent(SPACE, 1, N0)
    n = count(extent(SPACE, 2, N0), ACC) * count(extent(SPACE, 3, N0), ACC)
    p = tl.arange(0, BLOCK_P)[None, None, :]

    mean = 0.0
    if CENTER:
        t = tl.zeros((BLOCK_K, 1, BLOCK_P), ACC)
        for i in range(0, chunks, BLOCK_P):
            mask = mk & (i + p < chunks)
            d = tl.load(part_mean_ptr + (i + p) * groups + o, mask=mask, other=0.0)
            t += d * chunk_size(i + p, chunks_s, steps, SPACE, N0, BLOCK_A, BLOCK_S, ACC)
        mean = tl.sum(t, 2, keep_dims=True) / n
    t = tl.zeros((BLOCK_K, 1, BLOCK_P), ACC)
    for i in range(0, chunks, BLOCK_P):
        mask = mk & (i + p < chunks)
        t += tl.load(part_m2_ptr + (i + p) * groups + o, mask=mask, other=0.0)
        if CENTER:
            d = tl.load(part_mean_ptr + (i + p) * groups + o, mask=mask, other=0.0) - mean
            d = tl.where(mask, d, 0.0)
            t += d * d * chunk_size(i + p, chunks_s, steps, SPACE, N0, BLOCK_A, BLOCK_S, ACC)
    finish_moments(
        mean, tl.sum(t, 2, keep_dims=True) / n, n, m, c, mk, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
        N0, eps, momentum, SPACE, STAT, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N0", "chunks"])
def finish_group(
    p1_ptr, p0_ptr, w_ptr, c1_ptr, c0_ptr,
    N0, chunks,
    SPACE: tl.constexpr, W: tl.constexpr, STAT: tl.constexpr, A: tl.constexpr,
    ACC: tl.constexpr, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """p1, p0[chunk, m, c, a], w[c, a] -> c1, c0[m, c] = sum over (chunk, a) of w · p / |R|"""
    m, c, mk = kept_block(tl.program_id(0), SPACE, N0, ALONG_M, BLOCK_K, WIDE)
    o = offsets((m, c, 0, 0), SPACE, STAT)
    groups = extent(SPACE, 0, N0) * extent(SPACE, 1, N0)
    n = count(extent(SPACE, 2, N0), ACC) * count(extent(SPACE, 3, N0), ACC)
    t1 = tl.zeros((BLOCK_K, BLOCK_P, 1), ACC)
    t0 = tl.zeros((BLOCK_K, BLOCK_P, 1), ACC)
    for i in range(0, chunks * A, BLOCK_P):
        j = (i + tl.arange(0, BLOCK_P))[None, :, None]
        mask = mk & (j < chunks * A)
        q = ((j // A) * groups + m * extent(SPACE, 1, N0) + c) * A + j % A
        v = 1.0
        if w_ptr is not None:
            v = load(w_ptr, offsets((m, c, j % A, 0), SPACE, W), mask, ACC)
        t1 += v * tl.load(p1_ptr + q, mask=mask, other=0.0)
        if c0_ptr is not None:
            t0 += v * tl.load(p0_ptr + q, mask=mask, other=0.0)
    tl.store(c1_ptr + o, tl.sum(t1, 1, keep_dims=True) / n, mask=mk)
    if c0_ptr is not None:
        tl.store(c0_ptr + o, tl.sum(t0, 1, keep_dims=True) / n, mask=mk)


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
