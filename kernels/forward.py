"""Forward kernels: a whole group on chip (one read), or statistics and apply (two reads)."""

import triton
import triton.language as tl

from .epilogue import read_input, write_output
from .moments import count, reciprocal_root, update_running
from .tile import (
    by_group,
    extent,
    first_columns,
    group_size,
    kept_block,
    kept_blocks,
    load,
    number_of_groups,
    offsets,
    reduced_a,
    reduced_s,
    total,
)


@triton.jit
def centred(x, mask, n, CENTER: tl.constexpr, BLOCK_K: tl.constexpr, FOLD: tl.constexpr):
    """mean over the n elements of each group in a tile, and x - mean (0 outside): squares of it do not cancel."""
    mean = 0.0
    if CENTER:
        mean = by_group(total(x), BLOCK_K, FOLD) / n
        x = tl.where(mask, x - mean, 0.0)
    return mean, x


@triton.jit
def finish_moments(
    mean, var, n, m, c, mk, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, N0, eps, momentum,
    SPACE: tl.constexpr, STAT: tl.constexpr, ACC: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Store mean and rstd of (m, c), update the running statistics, return rstd; mk: one lane of each group.

    A BatchNorm has channels along m or along c, never both: m · |c| + c counts them.
    """
    rstd = reciprocal_root(var + count(eps, ACC))
    o = offsets((m, c, 0, 0), SPACE, STAT)
    if mean_ptr is not None:
        tl.store(mean_ptr + o, mean, mask=mk)
    tl.store(rstd_ptr + o, rstd, mask=mk)
    if running_mean_ptr is not None:
        PER: tl.constexpr = FOLD[0]
        channel = (m * extent(SPACE, 1, N0) + c) // PER
        update_running(running_mean_ptr, channel, mean, momentum, mk, ACC)
        update_running(running_var_ptr, channel, var * (n / (n - 1.0)), momentum, mk, ACC)
    return rstd


@triton.jit(do_not_specialize=["N0"])
def normalize(
    x_ptr, pre_ptr, sum_ptr, w_ptr, b_ptr, post_ptr, y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    N0, eps: "fp64", momentum: "fp64",
    SPACE: tl.constexpr, X: tl.constexpr, PRE: tl.constexpr, SUM: tl.constexpr, W: tl.constexpr, POST: tl.constexpr,
    Y: tl.constexpr, STAT: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x[m, c, a, s] -> y[m, c, a, s], mean[m, c], rstd[m, c]: whole groups in registers, exact two-pass statistics.

    One program for each block of groups.
    """
    m, c, mk = kept_block(tl.program_id(0), SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
    a, ma = reduced_a(0, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(0, SPACE, N0, BLOCK_S, WIDE)
    at = (m, c, a, s)
    mask = mk & ma & ms
    wmask = ma if ALONG_M else mk & ma
    n = group_size(SPACE, N0, FOLD, ACC)

    x = read_input(x_ptr, pre_ptr, sum_ptr, at, mask, SPACE, X, PRE, SUM, ACC)
    mean, x = centred(x, mask, n, CENTER, BLOCK_K, FOLD)
    var = by_group(total(x * x), BLOCK_K, FOLD) / n
    rstd = finish_moments(
        mean, var, n, m, c, first_columns(m, c, mk, ALONG_M, FOLD), mean_ptr, rstd_ptr, running_mean_ptr,
        running_var_ptr, N0, eps, momentum, SPACE, STAT, ACC, FOLD,
    )  # fmt: skip
    write_output(x * rstd, w_ptr, b_ptr, post_ptr, y_ptr, at, wmask, mask, SPACE, W, POST, Y, ACT, ACC)


@triton.jit
def chunk_of(
    i, chunks_s, SPACE: tl.constexpr, N0, KEPT_FIRST: tl.constexpr,
    ALONG_M: tl.constexpr, FOLD: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The i-th program of a streaming grid -> block of groups, block of a, chunk of s.

    The grid is counted along the innermost axis in memory first: KEPT_FIRST says that it is a kept one.
    """
    blocks_a = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A)
    chunks = blocks_a * chunks_s
    if KEPT_FIRST:
        blocks_k = kept_blocks(SPACE, N0, ALONG_M, FOLD)
        block_k = i % blocks_k
        chunk = i // blocks_k
    else:
        block_k = i // chunks
        chunk = i % chunks
    return block_k, chunk // chunks_s, chunk % chunks_s


@triton.jit(do_not_specialize=["N0", "chunks_s", "steps"])
def statistics(
    x_ptr, pre_ptr, sum_ptr, mean_ptr, m2_ptr,
    N0, chunks_s, steps,
    SPACE: tl.constexpr, X: tl.constexpr, PRE: tl.constexpr, SUM: tl.constexpr, STAT: tl.constexpr,
    CENTER: tl.constexpr, ACC: tl.constexpr, KEPT_FIRST: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x[m, c, a, s] -> mean[chunk, m, c], m2[chunk, m, c] of each chunk of a group.

    A chunk is BLOCK_A × (steps · BLOCK_S) elements, summed as differences to the mean of its first tile, so that
    nothing cancels when the mean is far from 0. One program for each block of groups and chunk.
    """
    block_k, block_a, chunk_s = chunk_of(tl.program_id(0), chunks_s, SPACE, N0, KEPT_FIRST, ALONG_M, FOLD, BLOCK_A)
    m, c, mk = kept_block(block_k, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s_start = chunk_s * steps * BLOCK_S
    s, ms = reduced_s(s_start, SPACE, N0, BLOCK_S, WIDE)
    mask = mk & ma & ms
    PER: tl.constexpr = FOLD[0]
    n_a = count(tl.minimum(extent(SPACE, 2, N0) - block_a * BLOCK_A, BLOCK_A), ACC) * PER
    n_s = extent(SPACE, 3, N0) - s_start

    x = read_input(x_ptr, pre_ptr, sum_ptr, (m, c, a, s), mask, SPACE, X, PRE, SUM, ACC)
    shift, x = centred(x, mask, n_a * count(tl.minimum(n_s, BLOCK_S), ACC), CENTER, BLOCK_K, FOLD)
    d1 = x
    d2 = x * x
    for i in range(1, steps):
        s, ms = reduced_s(s_start + i * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
        mask = mk & ma & ms
        x = read_input(x_ptr, pre_ptr, sum_ptr, (m, c, a, s), mask, SPACE, X, PRE, SUM, ACC)
        if CENTER:
            x = tl.where(mask, x - shift, 0.0)
            d1 += x
        d2 += x * x

    o = (block_a * chunks_s + chunk_s) * number_of_groups(SPACE, N0, FOLD)
    o = o + offsets((m, c, 0, 0), SPACE, STAT)
    mk = first_columns(m, c, mk, ALONG_M, FOLD)
    m2 = by_group(total(d2), BLOCK_K, FOLD)
    if CENTER:
        n = n_a * count(tl.minimum(n_s, steps * BLOCK_S), ACC)
        d = by_group(total(d1), BLOCK_K, FOLD)
        tl.store(mean_ptr + o, shift + d / n, mask=mk)
        m2 = tl.maximum(m2 - d * d / n, 0.0)
    tl.store(m2_ptr + o, m2, mask=mk)


@triton.jit(do_not_specialize=["N0", "chunks_s"])
def apply(
    x_ptr, w_ptr, b_ptr, post_ptr, y_ptr, mean_ptr, rstd_ptr,
    N0, chunks_s, eps: "fp64",
    SPACE: tl.constexpr, X: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, Y: tl.constexpr, STAT: tl.constexpr,
    FROM_VAR: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, KEPT_FIRST: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x[m, c, a, s], mean[m, c], rstd[m, c] -> y[m, c, a, s]; FROM_VAR: rstd_ptr holds variances.

    One program for each tile, the last tile first: the end of x is what the statistics left in L2.
    """
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    block_k, block_a, chunk_s = chunk_of(i, chunks_s, SPACE, N0, KEPT_FIRST, ALONG_M, FOLD, BLOCK_A)
    m, c, mk = kept_block(block_k, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(chunk_s * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
    at = (m, c, a, s)
    mask = mk & ma & ms
    wmask = ma if ALONG_M else mk & ma
    o = offsets((m, c, 0, 0), SPACE, STAT)
    x = load(x_ptr, offsets(at, SPACE, X), mask, ACC)
    if mean_ptr is not None:
        x = x - load(mean_ptr, o, mk, ACC)
    rstd = load(rstd_ptr, o, mk, ACC)
    if FROM_VAR:
        rstd = reciprocal_root(rstd + count(eps, ACC))
    write_output(x * rstd, w_ptr, b_ptr, post_ptr, y_ptr, at, wmask, mask, SPACE, W, POST, Y, ACT, ACC)
