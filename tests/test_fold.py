# ruff: noqa: E501  (tables)
"""Short odd pieces of groups, tiled as columns: values and gradients against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normops import functional as F
from normops.testing import plans
from tests.tolerance import TINY, check, engine, leaf, oracle

# (norm, shape, groups, options): short odd pieces of groups side by side, tiled as columns.
FOLDED = [
    ("batch", (9, 24, 7, 7), 0, {}), ("batch", (5, 16, 3, 5), 0, {"activation": "silu"}),
    ("batch", (3, 32, 5, 5), 0, {"adds": "both"}), ("batch", (2, 8, 3, 3, 7), 0, {}),
    ("group", (3, 40, 5, 6), 4, {"activation": "gelu"}), ("group", (2, 72, 5, 7), 12, {}),
    ("group", (1, 40, 4, 5), 8, {"adds": "post"}), ("group", (2, 60, 3, 4), 20, {"adds": "pre"}),
]  # fmt: skip


@pytest.mark.parametrize("which", ["resident", "split"])  # columns are never visited in a launch of tickets
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("norm", "shape", "groups", "options"), FOLDED, ids=lambda v: str(v) if not isinstance(v, dict) else "")
def test_columns_of_several_groups(
    norm: str, shape: tuple[int, ...], groups: int, options: Any, dtype: torch.dtype, affine: bool, which: str,
    device: torch.device,
) -> None:
    fmt = torch.contiguous_format if norm == "batch" else torch.channels_last
    adds = options.get("adds", "none")
    x, pre, post = (torch.randn(shape, device=device).add(2).to(dtype).contiguous(memory_format=fmt).requires_grad_() for _ in range(3))
    w, b = (torch.randn(shape[1], device=device, requires_grad=True) if affine else None for _ in range(2))
    given = {"activation": options.get("activation")}
    given |= {"pre_add": pre} if adds in ("pre", "both") else {}
    given |= {"post_add": post} if adds in ("post", "both") else {}
    running = (torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device))
    with engine(which, **{name: 8 * TINY[name] for name in TINY if "tile" in name}), plans() as planned:
        if norm == "batch":
            y = F.batch_norm(x, *running, w, b, training=True, **given)
        else:
            y = F.group_norm(x, groups, w, b, **given)
        y, total = y if isinstance(y, tuple) else (y, None)
        leaves = [t for t in (x, w, b, *(t for t in (pre, post) if any(t is g for g in given.values()))) if t is not None]
        dy = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=fmt)
        got = torch.autograd.grad(y, leaves, dy)
    if affine or norm == "batch":  # without parameters, the channels of a group are not told from pixels
        folds = [launch.given["FOLD"][0] for p in planned for launch in p.plan.launches if "x" in launch.operands]
        # Of launches for each visit the one that takes statistics keeps the columns of a group apart.
        assert len(folds) >= 2 and (max if which == "split" else min)(folds) > 1, folds
    exact = {id(t): leaf(t) for t in (x, w, b, pre, post) if t is not None}
    spread = (1, -1, *(1,) * (len(shape) - 2))
    weights = [None if t is None else exact[id(t)].reshape(spread) for t in (w, b)]
    axes = (0, *range(2, len(shape))) if norm == "batch" else tuple(range(2, len(shape) + 1))
    ref, _ = oracle(
        exact[id(x)], axes, *weights, activation=options.get("activation"), groups=groups or None, total=total,
        pre_add=exact[id(pre)] if "pre_add" in given else None, post_add=exact[id(post)] if "post_add" in given else None,
    )  # fmt: skip
    check("y", y, ref)
    for t, g, e in zip(leaves, got, torch.autograd.grad(ref, [exact[id(t)] for t in leaves], dy.double()), strict=True):
        check(f"gradient of {tuple(t.shape)}", g, e, scale=4, dtype=dtype)  # sums of some thousand terms
    if norm == "batch":
        xd = (total if total is not None else x).detach().double()
        reduced = [0, *range(2, len(shape))]
        check("running_mean", running[0], 0.1 * xd.mean(reduced), scale=4)
        check("running_var", running[1], 0.9 + 0.1 * xd.var(reduced), scale=4)
