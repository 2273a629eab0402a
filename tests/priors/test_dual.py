"""Dual activations against quadrature, Price's theorem, and identities of Gaussian integrals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from priors.dual import ACTIVATIONS, Activation, abrelu

# (q12, q11, q22): weakly, strongly, and negatively correlated, and of unequal variances
COVARIANCES = [
    (0.0, 1.0, 1.0),
    (0.3, 1.0, 0.5),
    (0.999, 1.0, 1.0),
    (-0.7, 0.6, 1.5),
    (-0.99, 1.0, 1.0),
    (0.02, 0.01, 0.05),
]
SMOOTH = ["erf", "gelu", "sine"]
BENT = {
    "relu": (0.0, 1.0),
    "leaky-relu": (0.01, 1.0),
    "abs": (-1.0, 1.0),
    "slopes": (-0.4, 1.7),
}
PHI: dict[str, Activation] = {**ACTIVATIONS, "slopes": abrelu(*BENT["slopes"])}


def covariance(values: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
    q12, q11, q22 = torch.tensor(values, dtype=torch.float64)
    return q12, q11, q22


def slope(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative of an elementwise function."""

    def derivative(u: Tensor) -> Tensor:
        u = u.clone().requires_grad_()
        return torch.autograd.grad(function(u).sum(), u)[0]

    return derivative


def by_hermite(phi: Callable[[Tensor], Tensor], q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    """E[phi(u) phi(v)] by a Gauss-Hermite rule of 200 x 200 nodes."""
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(200))
    weights = weights / weights.sum()
    u = q11.sqrt() * nodes
    rest = (q22 - q12.square() / q11).sqrt()
    v = (q12 / q11.sqrt() * nodes).unsqueeze(-1) + rest * nodes
    return weights @ (phi(u).unsqueeze(-1) * phi(v)) @ weights


def by_angle(
    phi: Callable[[Tensor], Tensor], q12: Tensor, q11: Tensor, q22: Tensor, degree: int
) -> Tensor:
    """E[phi(u) phi(v)] of phi homogeneous of `degree` 0 or 1, by Gauss-Legendre in the polar angle.

    With (u, v) = r (d1 cos w, d2 cos(w - theta)) the radius integrates to 1 or, of degree 1, to
    E[r^2] = 2; each arc between two kinks is smooth.
    """
    theta = torch.acos(q12 / (q11 * q22).sqrt())
    kinks = torch.stack(
        [w + side for w in (0 * theta, theta) for side in (-math.pi / 2, math.pi / 2)]
    )
    edges = kinks.remainder(2 * math.pi).sort().values
    edges = torch.cat([edges, edges[:1] + 2 * math.pi])
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(40))
    low, half = edges[:-1].unsqueeze(-1), (edges.diff() / 2).unsqueeze(-1)
    w = low + half * (nodes + 1)
    values = phi(q11.sqrt() * w.cos()) * phi(q22.sqrt() * (w - theta).cos())
    return (half * weights * values).sum() * 2**degree / (2 * math.pi)


@pytest.mark.parametrize("values", COVARIANCES)
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_duals_are_their_integrals(name: str, values: tuple[float, float, float]) -> None:
    phi, q = ACTIVATIONS[name], covariance(values)
    expected = by_hermite(phi.function, *q)
    torch.testing.assert_close(phi.dual(*q), expected, atol=1e-12, rtol=0)
    expected = by_hermite(slope(phi.function), *q)
    torch.testing.assert_close(phi.slope_dual(*q), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("values", COVARIANCES)
@pytest.mark.parametrize("name", BENT)
def test_piecewise_linear_duals_are_their_integrals(
    name: str, values: tuple[float, float, float]
) -> None:
    phi, q = PHI[name], covariance(values)
    expected = by_angle(phi.function, *q, degree=1)
    torch.testing.assert_close(phi.dual(*q), expected, atol=1e-12, rtol=0)
    expected = by_angle(slope(phi.function), *q, degree=0)
    torch.testing.assert_close(phi.slope_dual(*q), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions_are_those_of_torch(name: str) -> None:
    u = torch.linspace(-3, 3, 25, dtype=torch.float64)
    expected = {
        "relu": torch.relu,
        "leaky-relu": torch.nn.LeakyReLU(),
        "abs": torch.abs,
        "erf": torch.erf,
        "gelu": torch.nn.GELU(),
        "sine": torch.sin,
    }[name]
    torch.testing.assert_close(ACTIVATIONS[name].function(u), expected(u))


@pytest.mark.parametrize("values", COVARIANCES)
@pytest.mark.parametrize("name", PHI)
def test_the_dual_of_the_slope_is_the_slope_of_the_dual(
    name: str, values: tuple[float, float, float]
) -> None:
    # Price's theorem; the central difference errs by step^2 k''' / 6 and rounding / step
    phi, (q12, q11, q22), step = PHI[name], covariance(values), 1e-4 * values[1]
    difference = phi.dual(q12 + step, q11, q22) - phi.dual(q12 - step, q11, q22)
    exact = phi.slope_dual(q12, q11, q22)
    if abs(values[0]) < 0.9:
        torch.testing.assert_close(difference / (2 * step), exact, atol=1e-8, rtol=0)
    q12.requires_grad_()
    (gradient,) = torch.autograd.grad(phi.dual(q12, q11, q22), q12)
    torch.testing.assert_close(gradient, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PHI)
def test_first_and_second_gradients_are_those_of_differences(name: str) -> None:
    values = torch.tensor([v for v in COVARIANCES if abs(v[0]) < 0.9], dtype=torch.float64)
    q = [column.clone().requires_grad_() for column in values.T]
    phi = PHI[name]
    assert torch.autograd.gradcheck(phi.dual, q, eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(phi.dual, q, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(phi.slope_dual, q, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PHI)
def test_the_diagonal_has_the_moments_of_one_variable(name: str) -> None:
    q = torch.logspace(-6, 1, 29, dtype=torch.float64)
    phi = PHI[name]
    torch.testing.assert_close(phi.square(q), phi.dual(q, q, q), atol=0, rtol=1e-14)
    torch.testing.assert_close(phi.slope_square(q), phi.slope_dual(q, q, q), atol=0, rtol=1e-14)


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize("variance", [1e-8, 0.7, 1e6])
def test_gradients_are_exact_where_both_inputs_are_one(name: str, variance: float) -> None:
    # d/dq E[phi(u)^2] is the sum of the three partial derivatives at q12 = q11 = q22 = q
    phi = PHI[name]
    q = torch.full((1,), variance, dtype=torch.float64, requires_grad=True)
    partials = torch.autograd.grad(phi.dual(q, q, q).sum(), q)[0]
    total = torch.autograd.grad(phi.square(q).sum(), q)[0]
    # the GELU's terms of order variance^0 cancel to variance^-1/2, times 1e-16
    torch.testing.assert_close(partials, total, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", PHI)
@pytest.mark.parametrize(
    "values", [(0.7, 0.7, 0.7), (-0.7, 0.7, 0.7), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
)
def test_gradients_are_finite_at_equal_opposite_and_zero_inputs(
    name: str, values: tuple[float, float, float]
) -> None:
    for dual in (PHI[name].dual, PHI[name].slope_dual):
        q = [part.requires_grad_() for part in covariance(values)]
        gradients = torch.autograd.grad(dual(*q), q)
        assert all(gradient.isfinite() for gradient in gradients)


@pytest.mark.parametrize("name", ["relu", "leaky-relu", "abs", "slopes", "gelu"])
def test_opposite_covariances_differ_by_a_linear_function(name: str) -> None:
    # phi(u) - phi(-u) = g u, so that k(c) - k(-c) = g E[phi(u) v] = g c E[phi'(u)] (Stein)
    q12, q11, q22 = torch.tensor(COVARIANCES, dtype=torch.float64).T
    gain = sum(BENT.get(name, (0.0, 1.0)))
    phi = PHI[name]
    odd = phi.dual(q12, q11, q22) - phi.dual(-q12, q11, q22)
    torch.testing.assert_close(odd, gain**2 / 2 * q12, atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("name", BENT)
def test_piecewise_linear_duals_are_homogeneous(name: str) -> None:
    q = list(torch.tensor(COVARIANCES, dtype=torch.float64).T)
    phi = PHI[name]
    for factor in (2.0**-40, 4.0, 2.0**60):  # powers of four round nothing
        scaled = phi.dual(*(factor * part for part in q))
        torch.testing.assert_close(scaled, factor * phi.dual(*q), atol=0, rtol=0)


def test_erf_of_small_inputs_is_linear() -> None:
    q12, q11, q22 = covariance((1e-7, 2e-7, 1e-7))
    # erf(u) = 2 u / sqrt(pi) (1 - u^2 / 3): relative to the limit 1 - (q11 + q22)
    expected = 4 / math.pi * q12 * (1 - (q11 + q22))
    torch.testing.assert_close(ACTIVATIONS["erf"].dual(q12, q11, q22), expected, atol=0, rtol=1e-12)


def test_gelu_of_large_inputs_is_relu() -> None:
    gaps = []
    for scale in (1e2, 1e4, 1e6):
        q = [scale * part for part in covariance((0.3, 1.0, 0.5))]
        relu = ACTIVATIONS["relu"].dual(*q)
        gaps.append(float((ACTIVATIONS["gelu"].dual(*q) / relu).sub(1)))
    # the gap is of the order of 1 / variance
    assert gaps[0] / gaps[1] == pytest.approx(100, rel=0.02)
    assert gaps[1] / gaps[2] == pytest.approx(100, rel=0.001) and abs(gaps[2]) < 1e-6


def test_abs_is_relu_on_both_sides() -> None:
    q12, q11, q22 = torch.tensor(COVARIANCES, dtype=torch.float64).T
    relu = ACTIVATIONS["relu"].dual
    expected = 2 * (relu(q12, q11, q22) + relu(-q12, q11, q22))
    torch.testing.assert_close(
        ACTIVATIONS["abs"].dual(q12, q11, q22), expected, atol=1e-15, rtol=1e-14
    )


@pytest.mark.parametrize("name", PHI)
def test_extreme_variances_keep_the_inequality_of_cauchy_and_schwarz(name: str) -> None:
    variances = torch.logspace(-12, 12, 25, dtype=torch.float64)
    q11, q22 = variances.unsqueeze(-1), variances.unsqueeze(0)
    phi = PHI[name]
    bound = (phi.square(q11) * phi.square(q22)).sqrt()
    for correlation in (-1.0, -0.5, 0.0, 1e-9, 0.9, 1.0):
        value = phi.dual(correlation * (q11 * q22).sqrt(), q11, q22)
        assert (value.abs() <= (1 + 1e-12) * bound).all()


@pytest.mark.parametrize("name", PHI)
def test_single_precision_keeps_five_digits(name: str) -> None:
    q = list(torch.tensor(COVARIANCES, dtype=torch.float64).T)
    phi = PHI[name]
    single = phi.dual(*(part.float() for part in q))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), phi.dual(*q), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PHI)
def test_duals_map_over_a_batch_of_functions(name: str) -> None:
    q = list(torch.tensor(COVARIANCES, dtype=torch.float64).T)
    phi = PHI[name]
    per_entry = torch.func.vmap(torch.func.grad(phi.dual))(*q)
    torch.testing.assert_close(per_entry, phi.slope_dual(*q), atol=1e-12, rtol=0)
