"""The check of values can fail: at kinks of activations and beside them, and for long sums."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from bench import providers
from bench.cases import Case

SHAPE = (8, 16, 10, 10)
KINKS = [("relu", 0.0, 0.0, 1.0), ("leaky_relu", 0.0, 0.01, 1.0), ("hardswish", -3.0, 0.0, -0.5),
         ("hardswish", 3.0, 1.5, 1.0)]  # fmt: skip
"""Activation, kink, the derivative below and above."""


def judged(
    activation: str, places: Sequence[float], slopes: Sequence[float], leaf: str
) -> tuple[dict[str, float], int]:
    """Shares of the bounds, and kinks, of an fp32 BatchNorm whose first elements reach the activation at `places` and
    whose backward takes `slopes` for its derivative there.

    `leaf`: whether "post_add" is an operand, so that its gradient shows the derivative, or that of "x" must.
    """
    case = Case("kinks", "batch", SHAPE, SHAPE, "", activation=activation, post_add=leaf == "post_add")
    inputs = providers.make_inputs(case, SHAPE, torch.contiguous_format, torch.float32)
    first = (0, slice(0, len(places)), 0, 0)  # one a channel: post_add or bias, which statistics do not depend on
    with torch.no_grad():
        (z,) = providers.before_activation(case, providers.upcast(inputs))
        if leaf == "post_add":
            inputs["post_add"][first] += torch.tensor(places) - z[first]
        else:
            inputs["bias"][: len(places)] += torch.tensor(places) - z[first]

    def call(i: providers.Inputs) -> providers.Outputs:
        (z,) = providers.before_activation(case, i)
        at = z.detach().requires_grad_()
        y = providers.ACTIVATIONS[activation].function(at)
        (slope,) = torch.autograd.grad(y.sum(), at)
        slope[first] = torch.tensor(slopes)
        return (y.detach() + (z - z.detach()) * slope,)

    _, errors, kinks = providers.errors_of(call, case, inputs, torch.float32)
    return {name: error["share"] for name, error in errors.items()}, kinks


@pytest.mark.parametrize("leaf", ["post_add", "x"])
@pytest.mark.parametrize(("activation", "kink", "below", "above"), KINKS)
def test_on_a_kink_either_derivative_is_right(
    activation: str, kink: float, below: float, above: float, leaf: str
) -> None:
    places = [kink, kink + 1e-7, kink - 1e-7, kink]
    shares, kinks = judged(activation, places, [below, above, above, below], leaf)
    assert max(shares.values()) <= 1 and kinks == 4, shares
    shares, _ = judged(activation, places, [below, (below + above) / 2, above, below], leaf)
    assert min(shares[name] for name in ("d" + leaf, "dweight", "dbias")) > 1, "neither derivative"


@pytest.mark.parametrize(("activation", "kink", "below", "above"), KINKS)
def test_beside_a_kink_only_its_own_derivative_is_right(
    activation: str, kink: float, below: float, above: float
) -> None:
    places = [kink - 1e-4, kink + 1e-4]
    right = torch.tensor(places, requires_grad=True)
    (slopes,) = torch.autograd.grad(providers.ACTIVATIONS[activation].function(right).sum(), right)
    assert slopes.tolist() == pytest.approx([below, above], abs=1e-4)
    shares, kinks = judged(activation, places, slopes.tolist(), "post_add")
    assert max(shares.values()) <= 1 and kinks == 0, shares
    shares, _ = judged(activation, places, [above, below], "post_add")
    assert min(shares[name] for name in ("dpost_add", "dweight", "dbias")) > 1


def test_too_many_elements_on_kinks_judge_nothing() -> None:
    few = providers.KINKS_ALLOWED
    assert judged("relu", [0.0] * few, [1.0] * few, "post_add")[1] == few
    with pytest.raises(AssertionError, match="wrong: 16 of 12800 elements lie on a kink, more than 10"):
        judged("relu", [0.0] * 16, [1.0] * 16, "post_add")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_grow_with_the_length_of_sums(dtype: torch.dtype) -> None:
    half = torch.finfo(dtype).eps / 2
    element, short, long = (providers.bounds(dtype, dtype, n) for n in (1, 1024, 1 << 22))
    assert element == pytest.approx((17 * half, 65 * half), rel=0.01)
    assert short == pytest.approx(element, rel=0.05)
    # The largest errors of right sums of 3.2M and 4.2M elements that were measured, against a reference in fp64 itself.
    assert long[0] > 21 * half and long[0] < 64 * half and long[1] < 256 * half
    assert providers.bounds(dtype, dtype, 3.2e6)[0] > 18.4 * half


@pytest.mark.parametrize(("lost", "right"), [(0, True), (1, False)])
def test_a_long_sum_without_one_of_its_terms_is_wrong(lost: int, right: bool) -> None:
    dy = torch.randn(2, 1 << 21, dtype=torch.float64)
    expected = {"y": dy, "dbias": dy.sum(1)}
    actual = {"y": dy, "dbias": dy.flip(1)[:, : dy.shape[1] - lost].sum(1)}
    share = providers.compare(actual, expected, torch.float64)["dbias"]["share"]
    assert (share <= 1) is right
