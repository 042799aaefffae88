"""An experiment: groups held in the registers of several programs at once, which wait for one another between the sums
and what is done with them.  x is read once, from DRAM, and never again, not even from L2.

A unit is a block of BLOCK_K groups; its tiles are `chunks_s` along s for each block of a.  A team has a program for
each tile, and walks over units: it stores partial results, meets, merges all of them in index order, every program for
itself, and goes on with the tile that it still holds.  Partial results have places of their own for each unit, so a
fast program of a team overwrites nothing that a slow one reads.

All programs must run at the same time, or those that run wait for ever: a launch asks for it
(launch_cooperative_grid), and fails where there is no room.

    words of tickets_ptr      [32 · team] arrivals and departures, 0 again when a launch ends
"""

import triton
import triton.language as tl

from .backward import saved_statistics, sum_lanes, tile_sums, weighted
from .epilogue import read_gradient, read_input, write_gradient, write_output
from .finish import chunk_size, merge_moments, merge_sums
from .forward import centred, finish_moments
from .tickets import FIRST_STATE, leave, publish, wait
from .tile import (
    by_group,
    extent,
    first_columns,
    group_block,
    group_size,
    kept_block,
    kept_blocks,
    load_shared,
    number_of_groups,
    offsets,
    reduced_a,
    reduced_s,
    store,
    total,
)


@triton.jit
def meet(word_ptr, programs, turn):
    """Wait for the other programs of a team, for the turn-th time (from 0): what they stored can then be loaded."""
    publish(word_ptr)
    wait(word_ptr, (turn + 1) * programs - 1)


@triton.jit
def part(word_ptr, programs, turns):
    """After so many meetings, each program once: the last one puts the word back to 0."""
    leave(word_ptr, turns * programs - 1, programs)


@triton.jit
def settled(v, ptr, uo, uk, o, mk, BLOCK_K: tl.constexpr):
    """v[groups, 1, 1], the result of a merge, at the columns of a tile of x; uo, o: where those of groups and columns
    are in what ptr points to, a place for it."""
    # By way of memory, for else the compiler lays the tile out over threads as the merge was, and holds each element
    # in many of them.
    if BLOCK_K > 1:
        tl.store(ptr + uo, v, mask=uk)
        tl.debug_barrier()
        v = load_shared(ptr, o, mk)
    return v


@triton.jit(do_not_specialize=["N0", "chunks_s"])
def cooperative(
    x_ptr, pre_ptr, sum_ptr, w_ptr, b_ptr, post_ptr, y_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    part_mean_ptr, part_m2_ptr, tickets_ptr,
    N0, chunks_s, eps: "fp64", momentum: "fp64",
    SPACE: tl.constexpr, X: tl.constexpr, PRE: tl.constexpr, SUM: tl.constexpr, W: tl.constexpr, POST: tl.constexpr,
    Y: tl.constexpr, STAT: tl.constexpr, CENTER: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
    ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x[m, c, a, s] -> y[m, c, a, s], mean[m, c], rstd[m, c].  One program for each tile of a team."""
    tiles = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A) * chunks_s
    team = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    teams = tl.num_programs(0) // tiles
    word_ptr = tickets_ptr + FIRST_STATE * team
    a, ma = reduced_a((tile // chunks_s) * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s((tile % chunks_s) * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
    groups = number_of_groups(SPACE, N0, FOLD)
    n = group_size(SPACE, N0, FOLD, ACC)
    n_tile = chunk_size(tile, chunks_s, 1, SPACE, N0, BLOCK_A, BLOCK_S, FOLD, ACC)
    own = (tiles + tile) * groups

    turns = 0
    for unit in range(team, kept_blocks(SPACE, N0, ALONG_M, FOLD), teams):
        m, c, mk = kept_block(unit, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
        um, uc, uk = group_block(unit, SPACE, N0, ALONG_M, FOLD, WIDE)
        o = offsets((m, c, 0, 0), SPACE, STAT)
        uo = offsets((um, uc, 0, 0), SPACE, STAT)
        first = first_columns(m, c, mk, ALONG_M, FOLD)
        at = (m, c, a, s)
        mask = mk & ma & ms
        wmask = ma if ALONG_M else mk & ma
        x = read_input(x_ptr, pre_ptr, sum_ptr, at, mask, SPACE, X, PRE, SUM, ACC)
        tile_mean, x = centred(x, mask, n_tile, CENTER, BLOCK_K, FOLD)
        if CENTER:
            tl.store(part_mean_ptr + tile * groups + o, tile_mean, mask=first)
        tl.store(part_m2_ptr + tile * groups + o, by_group(total(x * x), BLOCK_K, FOLD), mask=first)
        meet(word_ptr, tiles, turns)
        mean, m2 = merge_moments(
            part_mean_ptr, part_m2_ptr, 0, 0, tiles, n, uo, uk, groups, chunks_s, 1,
            SPACE, N0, CENTER, ACC, BLOCK_A, BLOCK_S, BLOCK_P, FOLD,
        )  # fmt: skip
        # As a block: the interpreter of Triton 3.9 takes no mask made of a block and a scalar.
        chief = uk & (um * 0 + uc * 0 + tile == 0)
        rstd = finish_moments(
            mean, m2 / n, n, um, uc, chief, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, N0, eps, momentum,
            SPACE, STAT, ACC, FOLD,
        )  # fmt: skip
        if CENTER:
            x = x + (tile_mean - settled(mean, part_mean_ptr + own, uo, uk, o, mk, BLOCK_K))
        xhat = x * settled(rstd, part_m2_ptr + own, uo, uk, o, mk, BLOCK_K)
        write_output(xhat, w_ptr, b_ptr, post_ptr, y_ptr, at, wmask, mask, SPACE, W, POST, Y, ACT, ACC)
        turns += 1
    part(word_ptr, tiles, turns)


@triton.jit(do_not_specialize=["N0", "chunks_s"])
def grad_cooperative(
    x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean_ptr, rstd_ptr, dsum_ptr, dx_ptr, dpost_ptr,
    dw_ptr, db_ptr, q1_ptr, q0_ptr, tickets_ptr,
    N0, chunks_s,
    SPACE: tl.constexpr, X: tl.constexpr, DY: tl.constexpr, W: tl.constexpr, POST: tl.constexpr, DSUM: tl.constexpr,
    DX: tl.constexpr, DPOST: tl.constexpr, STAT: tl.constexpr, CENTER: tl.constexpr, ACT_GRAD: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, ALONG_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x, dy[m, c, a, s] -> dx[m, c, a, s] and dw, db[chunk of s, m, c, a] (ROWS: dw, db[team, a]).

    ROWS, where s is a single point and c too: sums over s are as large as x, so a program adds up dw and db in
    registers, over the rows of its tile and over all units of its team.
    """
    blocks_a = tl.cdiv(extent(SPACE, 2, N0), BLOCK_A)
    tiles = blocks_a * chunks_s
    team = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    teams = tl.num_programs(0) // tiles
    word_ptr = tickets_ptr + FIRST_STATE * team
    chunk_s = tile % chunks_s
    a, ma = reduced_a((tile // chunks_s) * BLOCK_A, SPACE, N0, BLOCK_A, WIDE)
    s, ms = reduced_s(chunk_s * BLOCK_S, SPACE, N0, BLOCK_S, WIDE)
    groups = number_of_groups(SPACE, N0, FOLD)
    n = group_size(SPACE, N0, FOLD, ACC)

    own = (tiles + tile) * groups
    GROUPS: tl.constexpr = FOLD[2]
    PER_SUM: tl.constexpr = FOLD[3]
    if ROWS:
        dw = tl.zeros((1, BLOCK_A, 1), ACC)
        db = tl.zeros((1, BLOCK_A, 1), ACC)
    turns = 0
    for unit in range(team, kept_blocks(SPACE, N0, ALONG_M, FOLD), teams):
        m, c, mk = kept_block(unit, SPACE, N0, ALONG_M, BLOCK_K, FOLD, WIDE)
        um, uc, uk = group_block(unit, SPACE, N0, ALONG_M, FOLD, WIDE)
        o = offsets((m, c, 0, 0), SPACE, STAT)
        uo = offsets((um, uc, 0, 0), SPACE, STAT)
        first = first_columns(m, c, mk, ALONG_M, FOLD)
        at = (m, c, a, s)
        mask = mk & ma & ms
        wmask = ma if ALONG_M else mk & ma
        mean, rstd = saved_statistics(mean_ptr, rstd_ptr, m, c, mk, SPACE, STAT, ACC)
        xhat, g = read_gradient(
            x_ptr, dy_ptr, w_ptr, b_ptr, post_ptr, mean, rstd, at, wmask, mask, SPACE, X, DY, W, POST, ACT_GRAD, ACC
        )
        p1, p0 = tile_sums(g * xhat, g, BLOCK_K, FOLD)
        if ROWS:
            if dw_ptr is not None:
                dw += tl.sum(p1, 0, keep_dims=True)
            if db_ptr is not None:
                db += tl.sum(p0, 0, keep_dims=True)
        else:
            sums = extent(SPACE, 0, N0) * extent(SPACE, 1, N0) // PER_SUM
            column = (chunk_s * sums + (m * extent(SPACE, 1, N0) + c) // PER_SUM) * extent(SPACE, 2, N0) + a
            lanes = sum_lanes(m, c, mk, ALONG_M, FOLD) & ma
            if dw_ptr is not None:
                tl.store(dw_ptr + column, p1, mask=lanes)
            if db_ptr is not None:
                tl.store(db_ptr + column, p0, mask=lanes)
        q1 = weighted(p1, w_ptr, at, wmask, SPACE, W, ACC, BLOCK_K, FOLD)
        tl.store(q1_ptr + tile * groups + o, q1, mask=first)
        if CENTER:
            q0 = weighted(p0, w_ptr, at, wmask, SPACE, W, ACC, BLOCK_K, FOLD)
            tl.store(q0_ptr + tile * groups + o, q0, mask=first)
        meet(word_ptr, tiles, turns)
        c1, c0 = merge_sums(q1_ptr, q0_ptr, 0, tiles, uo, uk, groups, CENTER, ACC, GROUPS, 1, BLOCK_P)
        c1 = settled(c1 / n, q1_ptr + own, uo, uk, o, mk, BLOCK_K)
        if CENTER:
            c0 = settled(c0 / n, q0_ptr + own, uo, uk, o, mk, BLOCK_K)
        write_gradient(
            xhat, g, c1, c0, rstd, w_ptr, dsum_ptr, dx_ptr, dpost_ptr, at, wmask, mask,
            SPACE, W, DSUM, DX, DPOST, ACC,
        )  # fmt: skip
        turns += 1
    part(word_ptr, tiles, turns)

    if ROWS:
        row = team * extent(SPACE, 2, N0) + a
        if dw_ptr is not None:
            store(dw_ptr, row, dw, ma)
        if db_ptr is not None:
            store(db_ptr, row, db, ma)
