"""Iterated kernels of deep networks against the three classifiers that they become."""

import math

import pytest
import torch
from torch import Tensor

from priors.deep_limits import (
    Dual,
    deep_kernel,
    deep_limit,
    koenigs,
    majority_vote,
    nearest_neighbour,
    normalised_dual,
    singular_smoother,
)
from priors.dual import ACTIVATIONS
from priors.infinite_width import nngp


def square(cosine: Tensor) -> Tensor:
    """The dual of the second Hermite polynomial."""
    return cosine.square()


def moebius(cosine: Tensor) -> Tensor:
    """A dual with a_1^2 = 1/2, k'(1) = 2, and z / (1 - z) as its limit of Koenigs."""
    return 0.5 * cosine / (1 - 0.5 * cosine)


def hermite_mixture(cosine: Tensor) -> Tensor:
    """The dual of (He_0 + He_2 / sqrt(2)) / sqrt(2)."""
    return 0.5 + 0.5 * cosine.square()


def points(n: int, d: int, seed: int) -> Tensor:
    """Random directions (n, d)."""
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(n, d, dtype=torch.float64, generator=g), dim=-1
    )


def labels(n: int, positive: int) -> Tensor:
    return torch.where(torch.arange(n) % n < positive, 1.0, -1.0).double()


def regress(dual: Dual, x: Tensor, y: Tensor, x_query: Tensor, depth: int) -> Tensor:
    """Predictions of a deep network's NNGP without noise, K* K^-1 y."""
    kernel = deep_kernel(dual, torch.cat([x, x_query]) @ x.mT, depth)
    seen, cross = kernel[: len(x)], kernel[len(x) :]
    seen.diagonal().fill_(1.0)  # as any dual keeps it, but for rounding that depth magnifies
    return cross @ torch.linalg.solve(seen, y)


# which limit


@pytest.mark.parametrize(
    ("dual", "kind", "exponent"),
    [
        (square, "nearest-neighbour", None),
        (normalised_dual(ACTIVATIONS["abs"], centre=True), "nearest-neighbour", None),
        (moebius, "singular-smoother", 2.0),
        (normalised_dual(ACTIVATIONS["relu"]), "majority-vote", None),
        (normalised_dual(ACTIVATIONS["gelu"]), "majority-vote", None),
        (hermite_mixture, "majority-vote", None),
    ],
)
def test_duals_are_classified(dual: Dual, kind: str, exponent: float | None) -> None:
    limit = deep_limit(dual)
    assert limit.kind == kind
    assert limit.exponent == (None if exponent is None else pytest.approx(exponent, rel=1e-12))


def test_coefficients_are_moments_of_the_activation() -> None:
    # sin(u) at variance q: a_j^2 of sinh(q z) / sinh(q)
    for q in (0.1, 1.0, 3.0):
        limit = deep_limit(normalised_dual(ACTIVATIONS["sine"], q))
        assert limit.constant == 0
        assert limit.slope == pytest.approx(q / math.sinh(q), rel=1e-12)
        assert limit.expansion == pytest.approx(q / math.tanh(q), rel=1e-12)
    # ReLU at unit variance: E[phi] = 1 / sqrt(2 pi), E[phi'] = 1 / 2 and E[phi^2] = 1 / 2
    limit = deep_limit(normalised_dual(ACTIVATIONS["relu"]))
    assert limit.constant == pytest.approx(1 / math.pi, rel=1e-12)
    assert limit.slope == pytest.approx(0.5, rel=1e-12)
    assert limit.expansion == pytest.approx(1.0, rel=1e-12)
    centred = deep_limit(normalised_dual(ACTIVATIONS["relu"], centre=True))
    assert centred.constant == 0
    assert centred.slope == pytest.approx(0.25 / (0.5 - 1 / (2 * math.pi)), rel=1e-12)


def test_duals_without_a_limit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k\(1\) = 1; got 2"):
        deep_limit(lambda z: 2 * z)
    with pytest.raises(ValueError, match="Expected a nonlinear dual"):
        deep_limit(lambda z: z)
    with pytest.raises(ValueError, match=r"k'\(1\) >= 1"):
        deep_limit(lambda z: 0.7 + 0.3 * z.square())


def test_the_iterated_dual_is_the_kernel_of_a_deep_network() -> None:
    # weights that keep the variance q of a layer: weight_variance E[phi^2] = q
    phi, q = ACTIVATIONS["erf"], torch.tensor(1.3, dtype=torch.float64)
    x, z = points(6, 3, 0), points(5, 3, 1)
    weight = float(q / phi.square(q))
    scale = math.sqrt(3 * float(q) / weight)  # q_0 = weight |x|^2 / 3 = q
    kernel = nngp(
        scale * x, scale * z, activation=phi, depth=20, weight_variance=weight, bias_variance=0.0
    )
    expected = deep_kernel(normalised_dual(phi, float(q)), x @ z.mT, 20)
    torch.testing.assert_close(kernel / q, expected, atol=1e-14, rtol=1e-11)


# predictions


@pytest.mark.parametrize(
    ("dual", "n", "depth", "gap"),
    [
        (square, 30, 12, 0.004),
        # centring leaves 16 digits below one, which few layers use up
        (normalised_dual(ACTIVATIONS["abs"], centre=True), 6, 5, 0.08),
    ],
    ids=["square", "abs"],
)
def test_without_a_linear_part_deep_networks_are_nearest_neighbours(
    dual: Dual, n: int, depth: int, gap: float
) -> None:
    # in the positive orthant no direction is the opposite of another, which even duals confuse
    x, x_query, y = points(n, 3, 2).abs(), points(200, 3, 3).abs(), labels(n, n // 2)
    predicted, expected = regress(dual, x, y, x_query, depth), nearest_neighbour(x, y, x_query)
    ordered = (x_query @ x.mT).sort(-1).values
    # the closest point outweighs each other one by more than exp(2^depth gap), above n
    clear = ordered[:, -1] - ordered[:, -2] > gap
    assert math.exp(2**depth * gap) > n and clear.sum() > 50
    assert (predicted.sign() == expected)[clear].all()


def test_the_ratio_of_kernels_of_near_and_far_grows_without_bound() -> None:
    cosine = torch.tensor([0.50, 0.51], dtype=torch.float64)
    for depth in (5, 8, 9):  # at 11 layers both kernels underflow
        far, near = deep_kernel(square, cosine, depth).log()
        assert float(near - far) == pytest.approx(2**depth * math.log(0.51 / 0.50), rel=1e-9)


def test_a_moebius_dual_is_the_power_law_smoother() -> None:
    # psi = z / (1 - z) = 2 / |x - x'|^2 - 1, and the constant drops out of balanced classes
    x, x_query, y = points(40, 2, 4), points(200, 2, 5), labels(40, 20)
    cosine = x_query @ x.mT
    limit = koenigs(moebius, cosine, 60)
    torch.testing.assert_close(limit, cosine / (1 - cosine), atol=1e-9, rtol=1e-9)
    # after 40 layers the kernel is below its limit by 1 + 2^-40 psi, and psi is up to 1e8 here
    deep = regress(moebius, x, y, x_query, depth=40) * 2.0**40
    weights = 2 / torch.cdist(x_query, x).square()
    assert weights.max() < 1e8
    torch.testing.assert_close(deep, weights @ y, atol=1e-4, rtol=1e-4)
    smooth = singular_smoother(x, y, x_query, exponent=2.0)
    torch.testing.assert_close(smooth, weights @ y / weights.sum(-1), atol=1e-9, rtol=0)
    assert (deep.sign() == smooth.sign()).all()
    # a different classifier than the nearest neighbour
    assert (smooth.sign() != nearest_neighbour(x, y, x_query)).any()


@pytest.mark.parametrize("name", ["relu", "leaky-relu", "gelu", "erf", "sine"])
def test_deep_networks_without_a_mean_are_smoothers_with_the_stated_exponent(name: str) -> None:
    dual = normalised_dual(ACTIVATIONS[name], 2.0, centre=True)
    limit = deep_limit(dual)
    assert limit.kind == "singular-smoother" and limit.exponent is not None
    depth = math.ceil(math.log(1e-9) / math.log(limit.slope))
    # the slope over one period of k: psi(k(z)) = a_1^2 psi(z) and 1 - k(z) = k'(1) (1 - z)
    gap = torch.tensor([1e-9, 1e-9 * limit.expansion], dtype=torch.float64)
    near, far = koenigs(dual, 1 - gap, depth + math.ceil(math.log(1e9) / math.log(limit.expansion)))
    slope = float((far / near).log()) / math.log(limit.expansion)
    # 1 - k(z) has a next term of relative order sqrt(1 - z), 3e-5, and gaps are known to 1e-7
    assert slope == pytest.approx(-limit.exponent / 2, rel=1e-3)
    # and predictions converge to those of the limit kernel, in which the diagonal is infinite; the
    # next term of the kernel is of the order of 1e-9 psi^2, and rounding 1e-16 / 1e-9
    x, x_query, y = points(20, 3, 6), points(50, 3, 7), labels(20, 8)
    predicted = regress(dual, x, y, x_query, depth) / limit.slope**depth
    psi = koenigs(dual, x_query @ x.mT, depth + 5)
    error = 1e-8 * psi.square().sum(-1) + 1e-6 * psi.abs().sum(-1)
    assert ((predicted - psi @ y).abs() < error).all()
    assert (error < 1e-2 * psi.square().sum(-1).sqrt()).all()  # or the comparison says little


@pytest.mark.parametrize("positive", [12, 18])
@pytest.mark.parametrize("name", ["gelu", "relu", "mixture"])
def test_deep_networks_with_a_mean_let_the_majority_vote(name: str, positive: int) -> None:
    dual = hermite_mixture if name == "mixture" else normalised_dual(ACTIVATIONS[name])
    assert deep_limit(dual).kind == "majority-vote"
    # many dimensions, hence no close pairs, which would take longer to forget their angle
    x, x_query, y = points(30, 12, 8), points(100, 12, 9), labels(30, positive)
    # geometric convergence where k'(1) > 1, else like 1 / depth
    depth = {"gelu": 500, "relu": 3000, "mixture": 3000}[name]
    predicted = regress(dual, x, y, x_query, depth)
    vote = majority_vote(y, 100)
    assert float(vote[0]) == pytest.approx((2 * positive - 30) / 30)
    assert (predicted.sign() == vote.sign()).all()
    assert predicted.std() < 0.1 * predicted.mean().abs()


def test_correlations_of_all_pairs_reach_the_fixed_point() -> None:
    # k(z) = (1 + z^2) / 2 has its only fixed point at 1, approached like 2 / depth; with k'(1) > 1
    # there is one below: k(z) = 0.2 + 0.8 z^2 at z = 1/4
    cosine = torch.linspace(-0.99, 0.99, 21, dtype=torch.float64)
    fixed = deep_kernel(lambda z: 0.2 + 0.8 * z.square(), cosine, 400)
    torch.testing.assert_close(fixed, torch.full_like(fixed, 0.25), atol=1e-12, rtol=0)
    slow = deep_kernel(hermite_mixture, cosine, 10000)
    torch.testing.assert_close(1 - slow, torch.full_like(slow, 2e-4), atol=0, rtol=0.02)


# predictors


def test_smoothers_interpolate_and_ignore_norms() -> None:
    x, y = points(10, 3, 10), labels(10, 4)
    for predicted in (singular_smoother(x, y, 3 * x, exponent=2.5), nearest_neighbour(x, y, 3 * x)):
        torch.testing.assert_close(predicted, y, atol=1e-9, rtol=0)


def test_a_large_exponent_is_the_nearest_neighbour_and_none_the_majority() -> None:
    x, x_query, y = points(10, 3, 11), points(50, 3, 12), labels(10, 6)
    near = singular_smoother(x, y, x_query, exponent=3000.0)
    assert (near.sign() == nearest_neighbour(x, y, x_query)).all()
    flat = singular_smoother(x, y, x_query, exponent=0.0)
    torch.testing.assert_close(flat, majority_vote(y, 50))


def test_predictors_take_batches() -> None:
    x, x_query, y = (
        points(24, 3, 13).reshape(2, 12, 3),
        points(10, 3, 14).reshape(2, 5, 3),
        labels(24, 9).reshape(2, 12),
    )
    for predicted, alone in (
        (nearest_neighbour(x, y, x_query), nearest_neighbour(x[1], y[1], x_query[1])),
        (
            singular_smoother(x, y, x_query, exponent=2.0),
            singular_smoother(x[1], y[1], x_query[1], exponent=2.0),
        ),
        (majority_vote(y, 5), majority_vote(y[1], 5)),
    ):
        assert predicted.shape == (2, 5)
        torch.testing.assert_close(predicted[1], alone)
