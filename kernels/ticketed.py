"""One launch that reads x from DRAM once and again from L2, for groups that do not fit one program.

A unit is a block of BLOCK_K groups; its tiles are `chunks_s` along s for each block of a.  Statistics tiles of later
units run between apply tiles of earlier ones, in the order of tickets.py; the last statistics tile of a unit merges the
partial results of all of them, in index order, and publishes the unit.

FAN > 0: so many chunks at a time are merged by the last of them first, so that a unit of hundreds of chunks of many
groups leaves no long work to a single program.
"""

import triton
import triton.language as tl

from .backward import given_sums, saved_statistics, sum_lanes, tile_sums
from .epilogue import affine, read_gradient, read_input, write_gradient, write_output
from .finish import chunk_size, merge_group, merge_moments, merge_sums
from .forward import centred, finish_moments
from .tickets import FIRST_STATE, arrive, draw, leave, publish, turn, wait
from .tile import (
    EVICT_FIRST,
    EVICT_LAST,
    by_group,
    extent,
    first_columns,
    group_block,
    group_size,
    kept_block,
    load,
    load_shared,
    number_of_groups,
    offsets,
    reduced_a,
    reduced_s,
    store,
    total,
)


@triton.jit
def statistics_phase(
    x_ptr, pre_ptr, sum_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, part_mean_ptr, part_m2_ptr,
    state_ptr, blocks_ptr, unit, m, c, mk, block_a, chunk_s, N0, chunks_s, eps, momentum,
    SPACE: tl.constexpr, X: tl.constexpr, PRE: tl.constexpr, SUM: tl.constexpr, STAT: tl.constexpr,
    CENTER: tl.constexpr, ACC: tl.constexpr, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, FAN: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """mean and m2 of one tile; the last of a unit to come here merges them to mean and rstd."""
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(chunk_s * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
    mask = mk & ma & ms
    groups = number_of_groups(SPACE, N0, FOLD)
    o = offsets((m, c, 0, 0), SPACE, STAT)
    chunks = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A) * chunks_s
    chunk = block_a * chunks_s + chunk_s

    x = read_input(x_ptr, pre_ptr, sum_ptr, (m, c, a, s), mask, SPACE, X, PRE, SUM, ACC, EVICT_LAST)
    n_tile = chunk_size(chunk, chunks_s, 1, SPACE, N0, BLOCK_A, BLOCK_S, FOLD, ACC)
    mean, x = centred(x, mask, n_tile, CENTER, BLOCK_K, FOLD)
    first = first_columns(m, c, mk, ALONG_M, FOLD)
    if CENTER:
        tl.store(part_mean_ptr + chunk * groups + o, mean, mask=first)
    tl.store(part_m2_ptr + chunk * groups + o, by_group(total(x * x), BLOCK_K, FOLD), mask=first)

    row = 0
    rows = chunks
    steps = 1
    along_s = chunks_s
    done = True
    if FAN > 0:
        along_s = tl.cdiv(chunks_s, FAN)
        begin = (chunk_s // FAN) * FAN
        expected = tl.minimum(chunks_s - begin, FAN)
        word_ptr = blocks_ptr + chunk_s // FAN
        done = arrive(word_ptr, expected)
        if done:
            tl.atomic_xchg(word_ptr, 0, sem="relaxed")
            bm, bc, bk = group_block(unit, SPACE, N0, ALONG_M, FOLD, WIDE)
            bo = offsets((bm, bc, 0, 0), SPACE, STAT)
            n_block = chunk_size(chunk_s // FAN, along_s, FAN, SPACE, N0, BLOCK_A, BLOCK_S, FOLD, ACC)
            block_mean, block_m2 = merge_moments(
                part_mean_ptr, part_m2_ptr, begin, begin, expected, n_block, bo, bk, groups, chunks_s, 1,
                SPACE, N0, CENTER, ACC, BLOCK_A, BLOCK_S, BLOCK_P, FOLD,
            )  # fmt: skip
            q = (chunks + chunk_s // FAN) * groups + bo
            if CENTER:
                tl.store(part_mean_ptr + q, block_mean, mask=bk)
            tl.store(part_m2_ptr + q, block_m2, mask=bk)
        row = chunks
        rows = along_s
        steps = FAN
    if done:  # noqa: SIM102 (`and` on the device evaluates both sides)
        if arrive(state_ptr, rows):
            n = group_size(SPACE, N0, FOLD, ACC)
            um, uc, uk = group_block(unit, SPACE, N0, ALONG_M, FOLD, WIDE)
            uo = offsets((um, uc, 0, 0), SPACE, STAT)
            unit_mean, unit_m2 = merge_moments(
                part_mean_ptr, part_m2_ptr, row, 0, rows, n, uo, uk, groups, along_s, steps,
                SPACE, N0, CENTER, ACC, BLOCK_A, BLOCK_S, BLOCK_P, FOLD,
            )  # fmt: skip
            finish_moments(
                unit_mean, unit_m2 / n, n, um, uc, uk, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
                N0, eps, momentum, SPACE, STAT, ACC, FOLD,
            )  # fmt: skip
            publish(state_ptr)


@triton.jit
def apply_phase(
    x_ptr, sum_ptr, w_ptr, b_ptr, post_ptr, y_ptr, mean_ptr, rstd_ptr, state_ptr, m, c, mk, block_a, chunk_s,
    N0, arrivals, tiles,
    SPACE: tl.constexpr, X: tl.constexpr, SUM: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, Y: tl.constexpr,
    STAT: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, ALONG_M: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y of one tile, once its unit is published; x is on its way while this waits."""
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(chunk_s * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
    at = (m, c, a, s)
    mask = mk & ma & ms
    if sum_ptr is None:
        raw = load(x_ptr, offsets(at, SPACE, X), mask, x_ptr.dtype.element_ty, EVICT_FIRST)
        wait(state_ptr, arrivals)
    else:  # the sum was written by a program of this launch: not to be read before
        wait(state_ptr, arrivals)
        raw = load(sum_ptr, offsets(at, SPACE, SUM), mask, sum_ptr.dtype.element_ty, EVICT_FIRST)
    x = raw.to(ACC)  # only now: while it waits, a program holds half the registers
    o = offsets((m, c, 0, 0), SPACE, STAT)
    if mean_ptr is not None:
        x = x - load_shared(mean_ptr, o, mk)
    xhat = x * load_shared(rstd_ptr, o, mk)
    wmask = ma if ALONG_M else mk & ma
    write_output(xhat, w_ptr, b_ptr, post_ptr, y_ptr, at, wmask, mask, SPACE, W, POST, Y, ACT, ACC, EVICT_FIRST)
    leave(state_ptr, arrivals, tiles)


@triton.jit(do_not_specialize=["N0", "chunks_s", "lead"])
def ticketed(
    x_ptr, pre_ptr, sum_ptr, w_ptr, b_ptr, post_ptr, y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    part_mean_ptr, part_m2_ptr, tickets_ptr,
    N0, chunks_s, lead, eps: "fp64", momentum: "fp64",
    SPACE: tl.constexpr, X: tl.constexpr, PRE: tl.constexpr, SUM: tl.constexpr, W: tl.constexpr, POST: tl.constexpr,
    Y: tl.constexpr, STAT: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, FAN: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x[m, c, a, s] -> y[m, c, a, s], mean[m, c], rstd[m, c].  Two programs for each tile of each unit."""
    applies, i = turn(draw(tickets_ptr), lead)
    blocks_a = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A)
    tiles = blocks_a * chunks_s
    unit = i // tiles
    block_a = (i % tiles) // chunks_s
    chunk_s = i % chunks_s
    arrivals = tl.cdiv(chunks_s, FAN) if FAN > 0 else tiles
    m, c, mk = kept_block(unit, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
    state_ptr = tickets_ptr + FIRST_STATE + unit
    if applies:
        apply_phase(
            x_ptr, sum_ptr, w_ptr, b_ptr, post_ptr, y_ptr, mean_ptr, rstd_ptr, state_ptr, m, c, mk, block_a, chunk_s,
            N0, arrivals, tiles, SPACE, X, SUM, W, POST, Y, STAT, ACT, ACC, ALONG_M, BLOCK_A, BLOCK_S, WIDE,
        )  # fmt: skip
    else:
        blocks_ptr = tickets_ptr + FIRST_STATE + tl.num_programs(0) // 2 // tiles + unit * arrivals
        statistics_phase(
            x_ptr, pre_ptr, sum_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, part_mean_ptr, part_m2_ptr,
            state_ptr, blocks_ptr, unit, m, c, mk, block_a, chunk_s, N0, chunks_s, eps, momentum,
            SPACE, X, PRE, SUM, STAT, CENTER, ACC, ALONG_M, BLOCK_K, BLOCK_A, BLOCK_S, BLOCK_P, FAN, FOLD, WIDE,
        )  # fmt: skip


@triton.jit
def grad_statistics_phase(
    xhat, g, w_ptr, c1_ptr, c0_ptr, dw_ptr, db_ptr, p1_ptr, p0_ptr, state_ptr, blocks_ptr,
    unit, m, c, mk, a, ma, block_a, chunk_s, N0, chunks_s,
    SPACE: tl.constexpr, W: tl.constexpr, STAT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, A: tl.constexpr,
    DIRECT: tl.constexpr, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
    MERGE_A: tl.constexpr, BLOCK_P: tl.constexpr, FAN: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of one tile; the last of a unit to come here merges them to c1, c0 and (not ROWS) dw, db."""
    columns = number_of_groups(SPACE, N0, FOLD) * A
    PER_SUM: tl.constexpr = FOLD[3]
    column = (m * extent(SPACE, 1, N0) + c) // PER_SUM * extent(SPACE, 2, N0)
    mask = mk
    wmask = ma if ALONG_M else mk & ma
    if ROWS:
        column = m * extent(SPACE, 1, N0) + c
        block_m = unit % tl.cdiv(extent(SPACE, 0, N0), BLOCK_K)
        # s is a single point: dw and db are sums over the rows of this tile, c1 and c0 sums along a.
        if DIRECT:
            o = offsets((0, c, a, 0), SPACE, W)
        else:
            o = (block_m * extent(SPACE, 1, N0) + c) * extent(SPACE, 2, N0) + a
        if dw_ptr is not None:
            store(dw_ptr, o, tl.sum(g * xhat, 0, keep_dims=True), ma)
        if db_ptr is not None:
            store(db_ptr, o, tl.sum(g, 0, keep_dims=True), ma)
        chunk = block_a * chunks_s + chunk_s
        chunks = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A) * chunks_s
        arrivals = chunks
        t0 = affine(g, w_ptr, None, (m, c, a, 0), wmask, SPACE, W, ACC)
        t1 = total(t0 * xhat)
        t0 = total(t0)
    else:
        column += a
        mask = sum_lanes(m, c, mk, ALONG_M, FOLD) & ma
        chunk = chunk_s
        chunks = chunks_s
        arrivals = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A) * chunks_s
        t1, t0 = tile_sums(g * xhat, g, BLOCK_K, FOLD)
    tl.store(p1_ptr + chunk * columns + column, t1, mask=mask)
    if p0_ptr is not None:
        tl.store(p0_ptr + chunk * columns + column, t0, mask=mask)

    row = 0
    rows = chunks
    done = True
    if FAN > 0:
        first = (chunk // FAN) * FAN
        expected = tl.minimum(chunks - first, FAN)
        row = chunks
        rows = tl.cdiv(chunks, FAN)
        arrivals = rows
        word_ptr = blocks_ptr + chunk // FAN
        done = arrive(word_ptr, expected)
        if done:
            tl.atomic_xchg(word_ptr, 0, sem="relaxed")
            b1, b0 = merge_sums(
                p1_ptr, p0_ptr, first, expected, column, mask, columns, p0_ptr is not None, ACC,
                BLOCK_K, 1 if ROWS else BLOCK_A, BLOCK_P,
            )  # fmt: skip
            q = (chunks + chunk // FAN) * columns + column
            tl.store(p1_ptr + q, b1, mask=mask)
            if p0_ptr is not None:
                tl.store(p0_ptr + q, b0, mask=mask)
    if done:  # noqa: SIM102 (`and` on the device evaluates both sides)
        if arrive(state_ptr, arrivals):
            um, uc, uk = group_block(unit, SPACE, N0, ALONG_M, FOLD, WIDE)
            merge_group(
                p1_ptr, p0_ptr, None if ROWS else w_ptr, c1_ptr, c0_ptr, None if ROWS else dw_ptr,
                None if ROWS else db_ptr, row, rows, um, uc, uk,
                SPACE, N0, W, STAT, A, DIRECT, ACC, ALONG_M, FOLD, MERGE_A, BLOCK_P,
            )  # fmt: skip
            publish(state_ptr)


@triton.jit(do_not_specialize=["N0", "chunks_s", "lead"])
def grad_ticketed(
    x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean_ptr, rstd_ptr, c1_ptr, c0_ptr, dsum_ptr, dx_ptr, dpost_ptr,
    dw_ptr, db_ptr, p1_ptr, p0_ptr, tickets_ptr,
    N0, chunks_s, lead,
    SPACE: tl.constexpr, X: tl.constexpr, DY: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, DSUM: tl.constexpr,
    DX: tl.constexpr, DPOST: tl.constexpr, STAT: tl.constexpr, ACT_GRAD: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, A: tl.constexpr, DIRECT: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr,
    MERGE_A: tl.constexpr, BLOCK_P: tl.constexpr, FAN: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x, dy[m, c, a, s] -> dx[m, c, a, s] and dw, db[m, c, a] (ROWS: [block of m, c, a]; DIRECT: [c, a]).

    ROWS, where s is a single point: sums over s are as large as x, so a tile of rows adds up dw and db along m.
    """
    applies, i = turn(draw(tickets_ptr), lead)
    blocks_a = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A)
    tiles = blocks_a * chunks_s
    unit = i // tiles
    block_a = (i % tiles) // chunks_s
    chunk_s = i % chunks_s
    if FAN > 0:
        arrivals = tl.cdiv(tiles, FAN)
    else:
        arrivals = tiles
    m, c, mk = kept_block(unit, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
    a, ma = reduced_a(block_a * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(chunk_s * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
    at = (m, c, a, s)
    mask = mk & ma & ms
    wmask = ma if ALONG_M else mk & ma
    state_ptr = tickets_ptr + FIRST_STATE + unit
    mean, rstd = saved_statistics(mean_ptr, rstd_ptr, m, c, mk, SPACE, STAT, ACC)
    if applies:
        xhat, g = read_gradient(
            x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean, rstd, at, wmask, mask, SPACE, X, DY, W, POST, ACT_GRAD, ACC,
            EVICT_FIRST,
        )  # fmt: skip
        wait(state_ptr, arrivals)
        c1, c0 = given_sums(c1_ptr, c0_ptr, m, c, mk, SPACE, STAT)
        write_gradient(
            xhat, g, c1, c0, rstd, w_ptr, dsum_ptr, dx_ptr, dpost_ptr, at, wmask, mask,
            SPACE, W, DSUM, DX, DPOST, ACC, EVICT_FIRST,
        )  # fmt: skip
        leave(state_ptr, arrivals, tiles)
    else:
        xh, gr = read_gradient(
            x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean, rstd, at, wmask, mask, SPACE, X, DY, W, POST, ACT_GRAD, ACC,
            EVICT_LAST,
        )  # fmt: skip
        units = tl.num_programs(0) // 2 // tiles
        grad_statistics_phase(
            xh, gr, w_ptr, c1_ptr, c0_ptr, dw_ptr, db_ptr, p1_ptr, p0_ptr,
            state_ptr, tickets_ptr + FIRST_STATE + units + unit * arrivals, unit, m, c, mk, a, ma, block_a,
            chunk_s, N0, chunks_s, SPACE, W, STAT, ACC, ROWS, A, DIRECT, ALONG_M, BLOCK_K, BLOCK_A, MERGE_A, BLOCK_P,
            FAN, FOLD, WIDE,
        )  # fmt: skip
