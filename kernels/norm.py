"""The formula on a tile: what is read, its moments, the affine map and activation, and their gradient.

Streams (operands of the size of x) stay as they came from memory until they are used: half the registers, in bf16.
"""

import triton
import triton.language as tl

from .activations import activation, activation_grad
from .elements import least, where_negative, widen
from .memory import ANY, load, load_at, load_kept, load_parameter, pointers, rounded, save, store
from .sums import by_group, plus, sums_along, tile_total, totals
from .tile import both, count, extent, first_columns, group_size, inside, mask_of, offsets

# ---------------------------------------------------------------------------------------------------------- forward


@triton.jit
def read_piece(o, t, PIECE: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr, write):
    PRE: tl.constexpr = F.PRE
    SUM: tl.constexpr = F.SUM
    X: tl.constexpr = F.X
    if o.pre is None:
        v = load(o.x, t, PIECE, X, F, KEEP)
    else:
        v = widen(load(o.x, t, PIECE, X, F), F) + widen(load(o.pre, t, PIECE, PRE, F), F)
        v = rounded(v, o.sum.dtype.element_ty)
        if write is not None:
            p = pointers(o.sum, t, PIECE, SUM, F)
            store(p, 0, v, both(mask_of(t, PIECE, F), write), KEEP)
    return v


@triton.jit
def read_input(o, t, F: tl.constexpr, KEEP: tl.constexpr = ANY, write=True):
    """x, or x + pre in the type of the sum, so that the backward sees the same numbers; stored, where `write`."""
    PIECES: tl.constexpr = F.PIECES
    v = ()
    for p in tl.static_range(PIECES):
        v = v + (read_piece(o, t, p, F, KEEP, write),)
    return v


@triton.jit
def load_pieces(
    ptr, t, STRIDES: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr = ANY, FIRST: tl.constexpr = 0,
    NUMBER: tl.constexpr = 1 << 30,
):  # fmt: skip
    """So many pieces from the FIRST on, as they are in memory; nothing of an operand that is not there."""
    PIECES: tl.constexpr = F.PIECES
    v = ()
    if ptr is not None:
        for p in tl.static_range(FIRST, least(FIRST + NUMBER, PIECES)):
            v = v + (load(ptr, t, p, STRIDES, F, KEEP),)
    return v


@triton.jit
def elements(o, at, mk, F: tl.constexpr):
    """An element of each column: sums about that of its group's first one cancel in no constant group."""
    PRE: tl.constexpr = F.PRE
    X: tl.constexpr = F.X
    v = load_at(o.x, at, X, mk, F)
    if o.pre is not None:
        v = rounded(v + load_at(o.pre, at, PRE, mk, F), o.sum.dtype.element_ty).to(F.ACC)
    return v


@triton.jit
def median_elements(o, m, c, mk, n0, F: tl.constexpr):
    """The median of three elements of each column, one a third: a single element far from all others is not what means
    are kept less of, or these would be as coarse as its distance."""
    third_a = extent(2, n0, F) // 3
    third_s = extent(3, n0, F) // 3
    v0 = elements(o, (m, c, 0, 0), mk, F)
    v1 = elements(o, (m, c, third_a, third_s), mk, F)
    v2 = elements(o, (m, c, 2 * third_a, 2 * third_s), mk, F)
    return tl.maximum(tl.minimum(v0, v1), tl.minimum(tl.maximum(v0, v1), v2))


@triton.jit
def add_moments(s1, s2, v, t, shift, F: tl.constexpr, PURE: tl.constexpr = False):
    """Sums of v - shift and of its squares, by lane; to s1 and s2, or None.  PURE: see widen()."""
    PIECES: tl.constexpr = F.PIECES
    for p in tl.static_range(PIECES):
        d = widen(v[p], F, PURE) - shift
        if not F.CLAMP_A:
            d = inside(d, t, p, F)
        s1 = plus(s1, d)
        s2 = plus(s2, d * d)
    if F.CLAMP_A:
        s1 = inside(s1, t, 0, F)
        s2 = inside(s2, t, 0, F)
    return s1, s2


@triton.jit
def cancels(m2, s2):
    """Whether three or more bits of m2 = s2 - ... were lost: of each group."""
    return 8.0 * m2 < s2


@triton.jit
def any_of(condition, F: tl.constexpr):
    if F.BLOCK_K > 1:
        condition = tl.max(condition.to(tl.int32)) > 0
    return condition


@triton.jit
def moments(v, t, n, first, F: tl.constexpr):
    """Of a tile that holds n elements of each group: (near, mean - near, the sum of squares about the mean).

    One pass about the first element of a group, which is then the number near the mean.  Where it lies far from it, so
    that the squares would cancel and the mean be as coarse as the distance, a second one about the mean that the first
    one found.  Where a tile holds several groups, one of which may be such a one: the mean first, always.
    """
    # A larger tile spills what a second pass could use of the first one.
    SMALL: tl.constexpr = F.BLOCK_A * F.BLOCK_S * F.PIECES <= 32768
    near = first
    s1, s2 = add_moments(None, None, v, t, 0.0 if F.BLOCK_K > 1 else first, F, SMALL)
    if not F.CENTER:
        mean = 0.0
        m2 = by_group(tile_total(s2, F), F)
    elif F.BLOCK_K > 1:
        near = by_group(tile_total(s1, F), F) / n
        s1, s2 = add_moments(None, None, v, t, near, F, SMALL)
        s1, s2 = totals(s1, s2, F)
        s1 = by_group(s1, F)
        mean = s1 / n
        m2 = tl.maximum(by_group(s2, F) - s1 * mean, 0.0)
    else:
        s1, s2 = totals(s1, s2, F)
        mean = s1 / n
        m2 = tl.maximum(s2 - s1 * mean, 0.0)
        if cancels(m2, s2):
            near = first + mean
            s1, s2 = add_moments(None, None, v, t, near, F, SMALL)
            s1, s2 = totals(s1, s2, F)
            mean = s1 / n
            m2 = tl.maximum(s2 - s1 * mean, 0.0)
    return near, mean, m2


@triton.jit
def reciprocal_root(v):
    # rsqrt of fp64 is an approximation on the device.
    if v.dtype == tl.float64:
        r = 1.0 / tl.sqrt(v)
    else:
        r = tl.rsqrt(v)
    return r


@triton.jit
def update_running(ptr, i, value, momentum, mask, F: tl.constexpr):
    """running[i] = (1 - momentum) * running[i] + momentum * value, as torch.lerp: from the nearer end, so that what is
    rounded is small beside the result."""
    old = tl.load(ptr + i, mask=mask, other=0.0).to(F.ACC)
    f = tl.full((), momentum, F.ACC)
    way = value - old
    new = tl.where(f < 0.5, old + f * way, value - (1.0 - f) * way)
    tl.store(ptr + i, rounded(new, ptr.dtype.element_ty), mask=mask)


@triton.jit
def keep_moments(o, mean, var, m, c, mk, n0, eps, momentum, F: tl.constexpr):
    """Store mean and rstd of (m, c), update the running statistics, return rstd; mk: one lane of each group.

    A BatchNorm has channels along m or along c, never both: m · |c| + c counts them.
    """
    STAT: tl.constexpr = F.STAT
    rstd = reciprocal_root(var + count(eps, F))
    at = offsets((m, c, 0, 0), STAT, F)
    if o.mean is not None:
        tl.store(o.mean + at, mean, mask=mk)
    tl.store(o.rstd + at, rstd, mask=mk)
    if o.running_mean is not None:
        PER: tl.constexpr = F.FOLD[0]
        n = group_size(n0, F)
        channel = (m * extent(1, n0, F) + c) // PER
        update_running(o.running_mean, channel, mean, momentum, mk, F)
        update_running(o.running_var, channel, var * (n / (n - 1.0)), momentum, mk, F)
    return rstd


@triton.jit
def write_output(o, v, mean, rstd, t, F: tl.constexpr, KEEP: tl.constexpr = ANY):
    """y = act((x - mean) * rstd * w + b + post); w and b are loaded here, after the statistics (or the tile spills)."""
    POST: tl.constexpr = F.POST
    Y: tl.constexpr = F.Y
    PIECES: tl.constexpr = F.PIECES
    # Those of several pieces at once: behind a store they would wait for it.
    SMALL: tl.constexpr = F.BLOCK_K * F.BLOCK_A <= 1024
    FEW: tl.constexpr = 4096 // (F.BLOCK_K * F.BLOCK_A) if SMALL else 4
    AHEAD: tl.constexpr = PIECES if F.KEPT_FIRST or not F.PIECES_A else least(PIECES, FEW)
    for q in tl.static_range(0, PIECES, AHEAD):
        ws = load_parameters(o.w, t, q, AHEAD, 1.0, F)
        bs = load_parameters(o.b, t, q, AHEAD, 0.0, F)
        posts = load_pieces(o.post, t, POST, F, ANY, q, AHEAD)
        for p in tl.static_range(q, least(q + AHEAD, PIECES)):
            if F.ROUND:
                z = rounded((widen(v[p], F) - mean) * rstd, v[p].dtype).to(F.ACC) * ws[p - q]
            else:
                z = (widen(v[p], F) - mean) * (rstd * ws[p - q])
            if o.b is not None:
                z = z + bs[p - q]
            if o.post is not None:
                z += widen(posts[p - q], F)
            save(o.y, activation(z, o.y.dtype.element_ty, F), t, p, Y, F, KEEP)


@triton.jit
def load_parameters(ptr, t, FIRST: tl.constexpr, NUMBER: tl.constexpr, NONE: tl.constexpr, F: tl.constexpr):
    """w or b of pieces from the FIRST on; NONE where there is none."""
    PIECES: tl.constexpr = F.PIECES
    v = ()
    for p in tl.static_range(FIRST, least(FIRST + NUMBER, PIECES)):
        if ptr is None:
            v = v + (NONE,)
        elif p == FIRST or F.PIECES_A:
            v = v + (load_parameter(ptr, t, p, F),)
        else:  # along s all pieces have the same
            v = v + (v[0],)
    return v


# --------------------------------------------------------------------------------------------------------- backward


@triton.jit
def saved_statistics(o, t, F: tl.constexpr, SHARED: tl.constexpr = False):
    """mean (0 where there is none) and rstd of a tile's groups; SHARED: published by a program of this launch."""
    mean = 0.0
    if o.mean is not None:
        mean = load_kept(o.mean, t, F, SHARED)
    return mean, load_kept(o.rstd, t, F, SHARED)


@triton.jit
def parameters(o, t, F: tl.constexpr):
    """w and b of each piece, 1 and 0 where there are none; b only where an activation's derivative asks for it."""
    PIECES: tl.constexpr = F.PIECES
    w = load_parameters(o.w, t, 0, PIECES, 1.0, F)
    b = load_parameters(o.b if F.ACT != "identity" else None, t, 0, PIECES, 0.0, F)
    return w, b


@triton.jit
def read_gradient(o, t, F: tl.constexpr, KEEP: tl.constexpr = ANY):
    """x, dy and post of each piece as they are in memory; post only where an activation's derivative asks for it."""
    DY: tl.constexpr = F.DY
    POST: tl.constexpr = F.POST
    X: tl.constexpr = F.X
    x = load_pieces(o.x, t, X, F, KEEP)
    dy = load_pieces(o.dy, t, DY, F, KEEP)
    if o.post is not None and F.ACT != "identity":
        post = load_pieces(o.post, t, POST, F, KEEP)
    else:
        post = ()
    return x, dy, post


@triton.jit
def read_sum(o, t, F: tl.constexpr):
    """What is added to dx, of each piece as it is in memory: to be read before a store that it would wait for."""
    DSUM: tl.constexpr = F.DSUM
    v = ()
    if o.dx is not None:
        v = load_pieces(o.dsum, t, DSUM, F)
    return v


@triton.jit
def gradient(o, streams, mean, rstd, w, b, PIECE: tl.constexpr, F: tl.constexpr, PURE: tl.constexpr = True):
    """d = x - mean and g = dy · act'(z) of a piece; z = d · rstd · w + b + post is computed again.

    Lanes outside hold g = 0, so that sums of g need no mask.
    """
    d = widen(streams[0][PIECE], F, PURE) - mean
    dy = streams[1][PIECE]
    if F.ACT == "identity":
        g = widen(dy, F, PURE)
    elif F.ACT == "relu":
        z = (0.0 - b[PIECE]) - d * (rstd * w[PIECE])  # -z, where 0 is never -0
        if o.post is not None:
            z -= widen(streams[2][PIECE], F)
        g = where_negative(z, dy, F, PURE)
    else:
        z = d * (rstd * w[PIECE]) + b[PIECE]
        if o.post is not None:
            z += widen(streams[2][PIECE], F)
        g = widen(dy, F, PURE) * activation_grad(z, o.dy.dtype.element_ty, F)
    return d, g


@triton.jit
def write_gradient(o, d, g, dsum, k1, k0, scale, t, PIECE: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr = ANY):
    """dx = g · rstd · w - (d · k1 + k0) + dsum, where scale = rstd · w, k1 = rstd² · c1, k0 = rstd · c0; dpost = g.

    `dsum`: read_sum().
    """
    DPOST: tl.constexpr = F.DPOST
    DX: tl.constexpr = F.DX
    if o.dpost is not None:
        save(o.dpost, g, t, PIECE, DPOST, F, KEEP)
    if o.dx is not None:
        dx = g * scale - (d * k1 + k0)
        if o.dsum is not None:
            dx += widen(dsum[PIECE], F)
        save(o.dx, dx, t, PIECE, DX, F, KEEP)


@triton.jit
def given_sums(o, t, rstd, F: tl.constexpr, SHARED: tl.constexpr):
    """k1 = rstd² · c1 and k0 = rstd · c0; 0 where no sums are given."""
    k1 = 0.0
    k0 = 0.0
    if o.c1 is not None:
        k1 = rstd * rstd * load_kept(o.c1, t, F, SHARED)
    if o.c0 is not None:
        k0 = rstd * load_kept(o.c0, t, F, SHARED)
    return k1, k0


@triton.jit
def tile_sums(p1, p0, F: tl.constexpr):
    """sum_s (p1, p0); over a too, where no parameter runs along it; over the columns of a group, where they share
    their parameters (see FOLD)."""
    PER_SUM: tl.constexpr = F.FOLD[3]
    if F.BLOCK_S > 1:
        p1, p0 = sums_along(p1, p0, 2, F)
    if F.SHARED_A and F.BLOCK_A > 1:
        p1, p0 = sums_along(p1, p0, 1, F)
    if PER_SUM > 1:
        p1 = by_group(p1, F)
        p0 = by_group(p0, F)
    return p1, p0


@triton.jit
def group_sums(t1, t0, F: tl.constexpr):
    """Sums over a, numbers where BLOCK_K is 1; and over the columns of a group, where tile_sums() kept those apart."""
    PER_SUM: tl.constexpr = F.FOLD[3]
    if F.CENTER:
        t1, t0 = totals(t1, t0, F)
    else:
        t1 = tile_total(t1, F)
    if PER_SUM == 1:
        t1 = by_group(t1, F)
        if F.CENTER:
            t0 = by_group(t0, F)
    return t1, t0


@triton.jit
def sum_lanes(t, F: tl.constexpr):
    """Columns that store a sum of tile_sums()."""
    PER_SUM: tl.constexpr = F.FOLD[3]
    mk = t.mk
    if PER_SUM > 1:
        mk = first_columns(t, F)
    return mk
