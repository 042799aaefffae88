"""Partial results combined, always in index order: same input, same bits."""

import triton
import triton.language as tl

from .memory import load_at, load_shared, store
from .norm import keep_moments, median_elements
from .sums import sums_along, total
from .tile import extent, group_block, group_number, group_size, kept_blocks, number_of_groups, offset, offsets, zeros


@triton.jit
def partial_at(i, at, width, F: tl.constexpr):
    """Where the i-th partial result of a group lies: a chunk's after the other, and in a chunk a column's after the
    other, where these are kept apart; `width`: groups of a chunk."""
    if F.APART > 1:
        q = (i // F.APART * width + at) * F.APART + i % F.APART
    else:
        q = i * width + at
    return q


@triton.jit
def chunk_size(p, chunks_s, steps, n0, F: tl.constexpr):
    """Number of elements of which a partial result of chunk p is (0 past the last)."""
    a = F.WIDTH_A
    s = steps * F.WIDTH_S
    n_a = tl.minimum(tl.maximum(extent(2, n0, F) - (p // chunks_s) * a, 0), a)
    n_s = tl.minimum(extent(3, n0, F) - (p % chunks_s) * s, s)
    PER: tl.constexpr = F.FOLD[0]
    return n_a.to(F.ACC) * n_s.to(F.ACC) * (PER // F.APART)


@triton.jit
def partial_mean(o, i, median, m, c, mask, n0, F: tl.constexpr):
    """Of the i-th partial result of a group its mean, less the group's `median`.

    Where columns are kept apart it was stored less that of its column.
    """
    at = group_number(m, c, n0, F)
    d = load_shared(o.part_mean, partial_at(i, at, number_of_groups(n0, F), F), mask)
    if F.APART > 1:
        if F.ALONG_M:
            m = m + i % F.APART
        else:
            c = c + i % F.APART
        d += median_elements(o, m, c, mask, n0, F) - median
    return d


@triton.jit
def merge_moments(o, m, c, mk, chunks, n, chunks_s, steps, n0, F: tl.constexpr):
    """part_mean, part_m2 of (m, c) -> mean, m2 of its n elements.

    Chan's merge in two passes: the mean first, then m2 + n[chunk] · (mean[chunk] - mean)².  Means are less the
    group's median_elements(), so that nothing is lost where they are far from 0.
    """
    GROUPS: tl.constexpr = F.FOLD[2]
    number = chunks * F.APART
    at = group_number(m, c, n0, F)
    width = number_of_groups(n0, F)
    p = tl.arange(0, F.BLOCK_P)[None, None, :]
    mask = mk & (p < number)
    # Of a group with no more than BLOCK_P of them all are on their way at once, and read once.
    m2 = load_shared(o.part_m2, partial_at(p, at, width, F), mask)
    mean = 0.0
    if F.CENTER:
        median = median_elements(o, m, c, mk, n0, F) if F.APART > 1 else 0.0
        d = partial_mean(o, p, median, m, c, mask, n0, F)
        size = chunk_size(p // F.APART, chunks_s, steps, n0, F)
        s1 = d * size
        for i in range(F.BLOCK_P, number, F.BLOCK_P):
            e = partial_mean(o, i + p, median, m, c, mk & (i + p < number), n0, F)
            s1 += e * chunk_size((i + p) // F.APART, chunks_s, steps, n0, F)
        mean = total(s1, GROUPS) / n
        d = tl.where(mask, d - mean, 0.0)
        m2 += d * d * size
    for i in range(F.BLOCK_P, number, F.BLOCK_P):
        mask = mk & (i + p < number)
        m2 += load_shared(o.part_m2, partial_at(i + p, at, width, F), mask)
        if F.CENTER:
            d = tl.where(mask, partial_mean(o, i + p, median, m, c, mask, n0, F) - mean, 0.0)
            m2 += d * d * chunk_size((i + p) // F.APART, chunks_s, steps, n0, F)
    return mean, total(m2, GROUPS)


@triton.jit
def finish_groups(o, block, chunks, chunks_s, steps, n0, eps, momentum, F: tl.constexpr):
    """mean, rstd and the running statistics of a block of groups from all their chunks."""
    m, c, mk = group_block(block, n0, F)
    n = group_size(n0, F)
    median = median_elements(o, m, c, mk, n0, F) if F.CENTER else 0.0
    mean, m2 = merge_moments(o, m, c, mk, chunks, n, chunks_s, steps, n0, F)
    mean += median
    keep_moments(o, mean, m2 / n, m, c, mk, n0, eps, momentum, F)


@triton.jit(do_not_specialize=["n0", "steps"])
def finish(o, n0, steps, eps: "fp64", momentum: "fp64", F: tl.constexpr):
    """part_mean[chunk, m, c], part_m2[chunk, m, c] -> mean[m, c], rstd[m, c], running statistics[c]"""
    chunks_s = tl.cdiv(extent(3, n0, F), F.WIDTH_S * steps)
    chunks = chunks_s * tl.cdiv(extent(2, n0, F), F.WIDTH_A)
    finish_groups(o, tl.program_id(0), chunks, chunks_s, steps, n0, eps, momentum, F)


@triton.jit
def merge_sums(o, chunks, at, mask, columns, K: tl.constexpr, A: tl.constexpr, F: tl.constexpr):
    """p1, p0[chunk, at] -> their sums over the chunks."""
    p = tl.arange(0, F.BLOCK_P)[None, None, :]
    t1 = zeros(K, A, F.BLOCK_P, F.ACC)
    t0 = zeros(K, A, F.BLOCK_P, F.ACC)
    for i in range(0, chunks * F.APART, F.BLOCK_P):
        q = partial_at(i + p, at, columns, F)
        here = mask & (i + p < chunks * F.APART)
        t1 += load_shared(o.p1, q, here)
        if o.p0 is not None:
            t0 += load_shared(o.p0, q, here)
    return sums_along(t1, t0, 2, F)


@triton.jit
def merge_group(o, block, chunks, n0, F: tl.constexpr, AFFINE: tl.constexpr = True):
    """p1, p0[chunk, m, c, a], w[c, a] -> c1, c0[m, c] = sum over (chunk, a) of w · p / |R|;
    AFFINE: dw, db[m, c, a] (DIRECT, where there is one m: dw, db[c, a]) = sum over chunk of p.

    F.A: extent of a in p, which may be the columns of a group.
    """
    STAT: tl.constexpr = F.STAT
    W: tl.constexpr = F.W
    PER: tl.constexpr = F.FOLD[0]
    GROUPS: tl.constexpr = F.FOLD[2]
    m, c, mk = group_block(block, n0, F)
    groups = number_of_groups(n0, F)
    n = group_size(n0, F)
    c1 = zeros(GROUPS, F.MERGE_A, 1, F.ACC)
    c0 = zeros(GROUPS, F.MERGE_A, 1, F.ACC)
    for i in range(0, F.A, F.MERGE_A):
        a = (i + tl.arange(0, F.MERGE_A))[None, :, None]
        ma = a < F.A
        mask = mk & ma
        column = group_number(m, c, n0, F) * F.A + a
        t1, t0 = merge_sums(o, chunks, column, mask, groups * F.A, GROUPS, F.MERGE_A, F)
        if PER > 1 and F.A > 1:  # the a of p are columns of c
            at = (m, c + a, 0, 0)
            wmask = mask
        else:
            at = (m, c, a, 0)
            wmask = ma if F.ALONG_M else mask
        if F.DIRECT:
            q = offsets((0, at[1], at[2], 0), W, F)
        else:
            q = column
        if AFFINE and o.dw is not None:
            store(o.dw, q, t1, mask)
        if AFFINE and o.db is not None:
            store(o.db, q, t0, mask)
        if o.c1 is not None:
            if o.w is not None:
                w = load_at(o.w, at, W, wmask, F)
                t1 = t1 * w
                t0 = t0 * w
            c1 += t1
            c0 += t0
    q = offsets((m, c, 0, 0), STAT, F)
    if o.c1 is not None:
        tl.store(o.c1 + q, total(c1, GROUPS) / n, mask=mk)
    if o.c0 is not None:
        tl.store(o.c0 + q, total(c0, GROUPS) / n, mask=mk)


@triton.jit(do_not_specialize=["n0", "chunks", "rows"])
def grad_finish(o, n0, chunks, rows, F: tl.constexpr):
    """merge_group() for each block of groups: one read of the partial results gives c1, c0 and dw, db.

    Where there are t1, t0 (`rows` of them) dw and db are the sums of these, which further programs make.
    """
    i = tl.program_id(0)
    if o.t1 is None and o.t0 is None:
        merge_group(o, i, chunks, n0, F)
    else:
        blocks = kept_blocks(n0, F)
        if i < blocks:
            merge_group(o, i, chunks, n0, F, False)
        else:
            add_rows(o, i - blocks, rows, n0, F)


@triton.jit(do_not_specialize=["n0", "rows"])
def sum_rows(o, n0, rows, F: tl.constexpr):
    """t1, t0[row, c, a] -> dw, db[c, a]"""
    add_rows(o, tl.program_id(0), rows, n0, F)


@triton.jit
def add_rows(o, block, rows, n0, F: tl.constexpr):
    """dw, db[c, a] = sum over rows of t1, t0: BLOCK_A columns a program, BLOCK_S rows at a time."""
    W: tl.constexpr = F.W
    i = (block * F.BLOCK_A + tl.arange(0, F.BLOCK_A))[None, None, :]
    n_a = extent(2, n0, F)
    columns = extent(1, n0, F) * n_a
    at = offset(i // n_a, W, 1, F) + offset(i % n_a, W, 2, F)
    s1 = zeros(1, F.BLOCK_S, F.BLOCK_A, F.ACC)
    s0 = zeros(1, F.BLOCK_S, F.BLOCK_A, F.ACC)
    for row in range(0, rows, F.BLOCK_S):
        j = row + tl.arange(0, F.BLOCK_S)[None, :, None]
        mask = (j < rows) & (i < columns)
        q = j.to(tl.int64) * columns + i
        if o.dw is not None:
            s1 += tl.load(o.t1 + q, mask=mask, other=0.0)
        if o.db is not None:
            s0 += tl.load(o.t0 + q, mask=mask, other=0.0)
    s1, s0 = sums_along(s1, s0, 1, F)
    if o.dw is not None:
        store(o.dw, at, s1, i < columns)
    if o.db is not None:
        store(o.db, at, s0, i < columns)
