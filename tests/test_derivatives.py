"""Derivatives of every kind and order, and vmap, through the kernels in float64, against the formula written out.

The formula stands for torch's own norms, which are no oracle here: in PyTorch 2.13, torch.func's hessian,
jacrev(jacrev) and jacrev(jacfwd) of layer_norm, batch_norm and instance_norm have wrong cross terms between x and
weight, and functional.batch_norm, instance_norm raise under vmap over the parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from normops import calls, nn
from normops import functional as F

EPS = 1e-5


def formula(
    x: Tensor, axes: tuple[int, ...], w: Tensor | None = None, b: Tensor | None = None, *, pre: Tensor | None = None,
    post: Tensor | None = None, act: Callable[[Tensor], Tensor] | None = None, center: bool = True,
) -> Any:  # fmt: skip
    s = x if pre is None else x + pre
    h = s - s.mean(axes, keepdim=True) if center else s
    h = h / torch.sqrt(h.square().mean(axes, keepdim=True) + EPS)
    for factor in () if w is None else (w,):
        h = h * factor
    for term in (t for t in (b, post) if t is not None):
        h = h + term
    y = h if act is None else act(h)
    return y if pre is None else (y, s)


def split(t: Tensor, axes: tuple[int, ...], w: Tensor, b: Tensor) -> Tensor:
    """GroupNorm in 2 groups of (N, C, L)."""
    n, c, length = t.shape
    return torch.nn.functional.gelu(
        formula(t.reshape(n, 2, c // 2, length), axes).reshape(t.shape) * w[:, None] + b[:, None]
    )


class Case(NamedTuple):
    ours: Callable[..., Any]
    formula: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


X, C, ROW = (2, 4, 3), (4,), (3,)
MEAN, VAR = (torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(0.5, 2, 4, dtype=torch.float64))
CASES = {
    "BatchNorm": Case(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        lambda x, w, b: formula(x, (0, 2), w[:, None], b[:, None]), (X, C, C)),
    "BatchNorm, given statistics": Case(
        lambda x, w, b: F.batch_norm(x, MEAN.to(x.device), VAR.to(x.device), w, b, False, activation="silu"),
        lambda x, w, b: torch.nn.functional.silu(
            (x - MEAN.to(x.device)[:, None]) / torch.sqrt(VAR.to(x.device)[:, None] + EPS) * w[:, None] + b[:, None]),
        (X, C, C)),
    "GroupNorm, gelu": Case(
        lambda x, w, b: F.group_norm(x, 2, w, b, activation="gelu"), lambda x, w, b: split(x, (2, 3), w, b), (X, C, C)),
    "InstanceNorm, post_add": Case(
        lambda x, w, b, post: F.instance_norm(x, None, None, w, b, post_add=post),
        lambda x, w, b, post: formula(x, (2,), w[:, None], b[:, None], post=post), (X, C, C, X)),
    "LayerNorm, both adds, tanh": Case(
        lambda x, w, pre, post: F.layer_norm(x, ROW, w, None, pre_add=pre, post_add=post, activation="tanh"),
        lambda x, w, pre, post: formula(x, (-1,), w, pre=pre, post=post, act=torch.tanh), (X, ROW, X, X)),
    "RMSNorm, pre_add": Case(
        lambda x, w, pre: F.rms_norm(x, ROW, w, EPS, pre_add=pre),
        lambda x, w, pre: formula(x, (-1,), w, pre=pre, center=False), (X, ROW, X)),
    "LayerNorm over channels": Case(
        lambda x, w, b: F.normalize(x, (1,), w.view(4, 1), b.view(4, 1), activation="sigmoid"),
        lambda x, w, b: formula(x, (1,), w.view(4, 1), b.view(4, 1), act=torch.sigmoid), (X, C, C)),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def arguments(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.float64, device=device) for shape in case.shapes)


def scalar(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """A loss that no symmetry of a norm makes constant."""

    def loss(*args: Tensor) -> Tensor:
        out = f(*args)
        return sum(
            (t.square() * torch.linspace(0.5, 2, t.numel(), dtype=t.dtype, device=t.device).view(t.shape)).sum()
            for t in (out if isinstance(out, tuple) else (out,))
        )  # type: ignore[return-value]

    return loss


def same(got: Any, expected: Any) -> None:
    """float64 on both sides: what differs is round-off, at most some hundred ulps through two divisions by sigma."""
    got, expected = tree_leaves(got), tree_leaves(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@cases
def test_first_derivatives(case: Case, device: torch.device) -> None:
    """Reverse and forward mode, each also batched, against differences; undefined gradients too."""
    leaves = [t.requires_grad_() for t in arguments(case, device)]
    assert gradcheck(
        case.ours, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip


SECOND = ("BatchNorm", "GroupNorm, gelu")


@pytest.mark.parametrize("case", [CASES[name] for name in SECOND], ids=SECOND)  # the others: test_transforms' hessian
def test_second_derivatives(case: Case, device: torch.device) -> None:
    """Reverse over reverse and forward over reverse, against differences."""
    leaves = [t.requires_grad_() for t in arguments(case, device)]
    assert gradgradcheck(case.ours, leaves, fast_mode=True, check_fwd_over_rev=True)


TRANSFORMS: dict[str, Callable[[Callable[..., Any], int], Callable[..., Any]]] = {
    "grad": lambda f, n: grad(scalar(f), tuple(range(n))),
    "vjp": lambda f, n: lambda *a: vjp(f, *a)[1](f(*a)),
    "jvp": lambda f, n: lambda *a: jvp(f, a, tuple(t.cos() for t in a)),
    "jacrev": lambda f, n: jacrev(f, tuple(range(n))),
    "jacfwd": lambda f, n: jacfwd(f, tuple(range(n))),
    "hessian": lambda f, n: hessian(scalar(f), tuple(range(n))),
    "jacrev of jacfwd": lambda f, n: jacrev(jacfwd(scalar(f), (0, 1)), (0, 1)),
    "jacfwd of jacfwd": lambda f, n: jacfwd(jacfwd(scalar(f), (0, 1)), (0, 1)),
    "third": lambda f, n: jacfwd(hessian(lambda w, x, *a: scalar(f)(x, w, *a))),
}


@cases
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(case: Case, transform: Callable[..., Any], device: torch.device) -> None:
    args = arguments(case, device)
    args = (args[1], args[0], *args[2:]) if transform is TRANSFORMS["third"] else args
    n = len(args)
    same(transform(case.ours, n)(*args), transform(case.formula, n)(*args))


@cases
def test_vmap(case: Case, device: torch.device) -> None:
    """Over any one argument and over all, values and gradients of each sample; also along another axis, and nested."""
    args = arguments(case, device)
    n = len(args)
    batched = [torch.stack([t, t.flip(0), 2 * t], dim=-1) for t in args]
    for chosen in (range(n), *((i,) for i in range(n))):
        dims = tuple(-1 if i in chosen else None for i in range(n))
        given = [batched[i] if i in chosen else args[i] for i in range(n)]
        for transform in (lambda f: f, lambda f: grad(scalar(f), tuple(range(n)))):
            same(vmap(transform(case.ours), dims)(*given), vmap(transform(case.formula), dims)(*given))
    twice = [torch.stack([t, t + 1]) for t in batched]
    same(vmap(vmap(case.ours, -1), 0)(*twice), vmap(vmap(case.formula, -1), 0)(*twice))
    same(vmap(case.ours, -1, out_dims=1, chunk_size=2)(*batched), vmap(case.formula, -1, out_dims=1)(*batched))


@cases
def test_a_gradient_through_vmap(case: Case, device: torch.device) -> None:
    batched = [torch.stack([t, 2 * t]) for t in arguments(case, device)]
    every = tuple(range(len(batched)))
    ours, expected = (
        grad(lambda *a, f=f: vmap(scalar(f))(*a).sum(), every)(*batched) for f in (case.ours, case.formula)
    )
    same(ours, expected)


def test_vmap_over_given_statistics(device: torch.device) -> None:
    x, mean = torch.randn(2, 4, 3, device=device), torch.randn(5, 4, device=device)
    var = torch.rand(5, 4, device=device)
    got = vmap(lambda m, v: F.batch_norm(x, m, v))(mean, var)
    for i in range(5):
        torch.testing.assert_close(got[i], F.batch_norm(x, mean[i], var[i]))


def test_vmap_over_x_alone_cannot_move_running_statistics(device: torch.device) -> None:
    """There are as many updates as samples, and one place for them.  torch's own batch_norm raises alike."""
    x, mean, var = torch.randn(5, 2, 4, 3, device=device), torch.zeros(4, device=device), torch.ones(4, device=device)
    with pytest.raises((RuntimeError, ValueError), match="vmap"):
        vmap(lambda x: F.batch_norm(x, mean, var, training=True))(x)
    assert mean.eq(0).all() and var.eq(1).all(), "nothing is half-written"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """The needs of every backward that is launched."""
    found: list[tuple[bool, ...]] = []
    original = calls.Call.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        found.append(args[4])
        return original(*args, **kwargs)

    monkeypatch.setattr(calls.Call, "backward", backward)
    return found


@cases
def test_the_first_derivative_is_the_kernels(case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under create_graph, under torch.func and for a batch of samples too: one backward is launched, bit for bit that
    of a plain call."""
    launched = counted(monkeypatch)
    args = arguments(case, device)
    every = tuple(range(len(args)))
    leaves = [t.clone().requires_grad_() for t in args]
    plain = torch.autograd.grad(scalar(case.ours)(*leaves), leaves)
    again = torch.autograd.grad(scalar(case.ours)(*leaves), leaves, create_graph=True)
    functional = grad(scalar(case.ours), every)(*args)
    assert len(launched) == 3
    for a, b, c in zip(plain, again, functional, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    samples = vmap(grad(scalar(case.ours), every))(*(torch.stack([t, -t]) for t in args))
    assert len(launched) == 4, "a vmap is one launch, not a loop"
    same([t[0] for t in samples], plain)


def test_per_sample_gradients_of_a_model(device: torch.device) -> None:
    """Of convolution and GroupNorm, LayerNorm, by vmap and by a loop."""
    model = torch.nn.Sequential(
        torch.nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4, activation="relu"), nn.LayerNorm(3), nn.RMSNorm(3)
    ).to(device, torch.float64)
    parameters = dict(model.named_parameters())
    x = torch.randn(3, 4, 3, dtype=torch.float64, device=device)

    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, p, (sample[None],)).pow(3).sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        model.zero_grad()
        model(x[i : i + 1]).pow(3).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad)


def test_a_gradient_of_a_step_of_descent(device: torch.device) -> None:
    """MAML: the loss after one step on the weights, differentiated through the step."""
    x, w, b = (torch.randn(s, dtype=torch.float64, device=device) for s in (X, C, C))

    def after(norm: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        inner = torch.autograd.grad(scalar(norm)(*leaves), leaves[1:], create_graph=True)
        moved = [p - 0.1 * g for p, g in zip(leaves[1:], inner, strict=True)]
        return list(torch.autograd.grad(scalar(norm)(leaves[0], *moved), leaves))

    for name in ("BatchNorm", "GroupNorm, gelu"):
        same(after(CASES[name].ours), after(CASES[name].formula))


def test_forward_mode_leaves_the_primal_to_the_kernels(device: torch.device) -> None:
    x, t = torch.randn(2, 3, 8, device=device).unbind()
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(F.layer_norm(forward_ad.make_dual(x, t), (8,)))
        assert torch.equal(primal, F.layer_norm(x, (8,)))
    torch.testing.assert_close(tangent, jvp(lambda x: F.layer_norm(x, (8,)), (x,), (t,))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_derivatives(dtype: torch.dtype, device: torch.device) -> None:
    """Tangents have the outputs' dtypes, gradients the inputs', in half precision with fp32 parameters too."""
    x, w = torch.randn(3, 8, device=device, dtype=dtype), torch.randn(8, device=device)
    pre = torch.randn(3, 8, device=device)
    f = lambda x, w, pre: F.rms_norm(x, (8,), w, EPS, pre_add=pre)  # noqa: E731
    (y, total), (ty, tsum) = jvp(f, (x, w, pre), (x, w, pre))
    assert y.dtype == ty.dtype == dtype and total.dtype == tsum.dtype == torch.float32
    gradients = grad(lambda *a: sum(t.float().sum() for t in f(*a)), (0, 1, 2))(x, w, pre)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]


def test_the_sum_requires_grad_where_x_or_pre_add_does(device: torch.device) -> None:
    x, pre, w = (torch.randn(s, device=device) for s in ((2, 4), (2, 4), (4,)))
    for which, expected in (("x", True), ("pre", True), ("w", False)):
        leaves = {name: t.detach().requires_grad_(name == which) for name, t in (("x", x), ("pre", pre), ("w", w))}
        y, total = F.rms_norm(leaves["x"], (4,), leaves["w"], pre_add=leaves["pre"])
        assert y.requires_grad and total.requires_grad == expected


def test_nothing_flows_back_through_y(device: torch.device) -> None:
    """Only the sum is used: its gradient is that of x, and parameters get None, which an optimiser leaves alone."""
    x, w = torch.randn(4, 6, device=device, requires_grad=True), torch.ones(6, device=device, requires_grad=True)
    _, total = F.rms_norm(x, (6,), w, pre_add=x.detach())
    dx, dw = torch.autograd.grad(total.sum(), [x, w], allow_unused=True)
    assert dw is None and dx.eq(1).all()


@pytest.mark.parametrize("wanted", ["xwb", "xb", "wb", "w", "b"])
def test_a_penalty_on_gradients_of_a_linear_loss(wanted: str, device: torch.device) -> None:
    """dy is constant there, so that some of the gradients are functions of nothing that requires one."""
    leaves = [torch.randn(s, dtype=torch.float64, device=device) for s in ((4, 6), (6,), (6,))]

    def penalty(norm: Callable[..., Tensor]) -> list[Tensor]:
        x, w, b = (t.clone().requires_grad_() for t in leaves)
        chosen = [t for n, t in zip("xwb", (x, w, b), strict=True) if n in wanted]
        found = torch.autograd.grad(norm(x, w, b).sum(), chosen, create_graph=True)
        loss = x.sum() + sum(t.square().sum() for t in found)
        return [t for t in torch.autograd.grad(loss, [x, w], allow_unused=True) if t is not None]

    same(penalty(lambda x, w, b: F.layer_norm(x, (6,), w, b)), penalty(lambda x, w, b: formula(x, (-1,), w, b)))


def test_tangents_are_no_operands_tangents(device: torch.device) -> None:
    x, v = torch.randn(4, 6, device=device), torch.ones(4, 6, device=device)

    def doubled(a: Tensor) -> Tensor:
        _, total = F.rms_norm(a, (6,), pre_add=x)
        return total.mul_(2) + a

    assert jvp(doubled, (x,), (v,))[1].eq(3).all() and v.eq(1).all()


def test_given_statistics_are_constants(device: torch.device) -> None:
    """torch's batch_norm is not differentiable with respect to them either, and says so."""
    x, mean, var = torch.randn(4, 6, device=device), torch.randn(6, device=device), torch.rand(6, device=device) + 1
    for call in (
        lambda: jvp(lambda m: F.batch_norm(x, m, var), (mean,), (mean,)),
        lambda: grad(lambda v: F.batch_norm(x, mean, v).sum())(var),
        lambda: F.batch_norm(x, mean, var.clone().requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match="constants"):
            call()


def test_tensors_that_stand_for_their_opposite(device: torch.device) -> None:
    """The imaginary part of a conjugate shares its memory with what it is the opposite of: as x, and as dy."""
    z = torch.randn(8, 3, dtype=torch.complex64, device=device).conj()
    assert z.imag.is_neg()
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    plain = z.imag.resolve_neg()
    torch.testing.assert_close(F.layer_norm(z.imag, (3,)), F.layer_norm(plain, (3,)))
    # Calls of plain tensors like these were met by now, in every place.
    torch.testing.assert_close(F.layer_norm(plain, (3,), plain[1].clone()), F.layer_norm(plain, (3,), z.imag[1]))
    F.batch_norm(z.imag, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, z.imag.mean(0))
    x = torch.randn(8, 3, device=device, requires_grad=True)
    found = [
        torch.autograd.grad(norm(x, (3,)), x, z.imag)[0] for norm in (F.layer_norm, torch.nn.functional.layer_norm)
    ]
    torch.testing.assert_close(*found)
