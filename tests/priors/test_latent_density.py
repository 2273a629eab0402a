"""Densities of hyperparameters integrate to the evidence, with and without free units of y."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Gamma,
    InverseGamma,
    LogNormal,
    Normal,
    StudentT,
    Uniform,
)

from priors import BNN, NNGP, GaussianProcess, Linear, Mixture, ScaleMixture, Searched, Warped
from priors.hyperpriors import hyperpriors
from priors.kernel_prior import Hyperparameter
from priors.latent_density import FLAT
from priors.quadrature import integrate
from priors.tasks import LatentPrior


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int, d: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, d, dtype=torch.float64, generator=generator(seed))
    return x, (5 * x[:, 0]).sin() + 0.3 * torch.randn(
        n, dtype=torch.float64, generator=generator(1)
    )


def evidence(densities: Any) -> float:
    """By quadrature over each density, on its own."""
    parts = [torch.logsumexp(integrate(d.log_density, d.dim).log_weights, 0) for d in densities]
    return float(torch.stack(parts).logsumexp(0))


@pytest.mark.parametrize(
    "prior",
    [
        GaussianProcess(kernel=("rbf", "matern32"), outputscale=1.0),
        GaussianProcess(mean=Normal(1.0, 2.0), lengthscale=0.4),
        GaussianProcess(mean=StudentT(4.0), lengthscale=0.4, outputscale=1.0),
        NNGP(depth=(1, 2), weight_variance=2.0),
        Linear(),
        ScaleMixture(GaussianProcess(lengthscale=0.4, outputscale=1.0), scaled_noise=False),
        Warped(GaussianProcess(lengthscale=0.4, outputscale=1.0, noise=0.05)),
        Searched(GaussianProcess(lengthscale=0.4)),
    ],
    ids=lambda prior: type(prior).__name__,
)
def test_the_densities_of_a_task_integrate_to_its_evidence(prior: Any) -> None:
    context = data(7)
    assert isinstance(prior, LatentPrior)
    found = evidence(prior.latent_densities(context))
    assert found == pytest.approx(float(prior.log_evidence(context)), abs=1e-3)


def test_known_latents_make_the_density_of_the_others() -> None:
    prior, context = GaussianProcess(kernel=("rbf", "matern32")), data(6)
    for given in ({"noise": 0.1}, {"kernel": 1, "outputscale": 2.0}):
        densities = prior.latent_densities(context, given=given)
        assert evidence(densities) == pytest.approx(
            float(prior.log_evidence(context, given=given)), abs=1e-3
        )
        drawn = densities[0].latents(torch.zeros(5, densities[0].dim), generator=generator())
        assert not set(given) & set(drawn)
    assert [density.choice for density in densities] == [{"kernel": 1}]


def test_predictions_are_conditionals_given_the_hyperparameters() -> None:
    prior, (x, y) = GaussianProcess(kernel="matern52"), data(6)
    (density,) = prior.latent_densities((x, y))
    t = torch.randn(3, density.dim, dtype=torch.float64, generator=generator())
    x_query = torch.rand(4, 1, dtype=torch.float64, generator=generator())
    latents = density.latents(t, generator=generator())
    for latent in (False, True):
        means, stds = density.predict(t, x_query, latent=latent)
        for i in range(3):
            given = {name: value[i] for name, value in latents.items()}
            exact = prior.posterior((x, y), x_query, latent, given=given)
            torch.testing.assert_close(means[i], exact.mean)
            torch.testing.assert_close(stds[i], exact.stddev, atol=1e-6, rtol=1e-6)


def test_a_mean_that_is_integrated_out_is_drawn_given_the_others() -> None:
    prior, context = GaussianProcess(mean=Normal(1.0, 2.0), lengthscale=0.4, noise=0.1), data(8)
    (density,) = prior.latent_densities(context)
    t = torch.zeros(20_000, 1, dtype=torch.float64)
    drawn = density.latents(t, generator=generator())["mean"]
    (outputscale,) = density.latents(t[:1], generator=generator())["outputscale"]
    exact = prior.latent_posterior(context, given={"outputscale": outputscale})["mean"]
    error = math.sqrt(float(exact.variance) / len(t))
    assert float(drawn.mean()) == pytest.approx(float(exact.mean), abs=4 * error)
    assert float(drawn.var()) == pytest.approx(float(exact.variance), rel=4 * math.sqrt(2 / len(t)))


def test_a_free_location_is_a_mean_that_may_be_anything() -> None:
    """By the closed form of an integral over a constant with a flat prior."""
    prior, (x, y) = GaussianProcess(lengthscale=0.3, outputscale=1.5, noise=0.1), data(6)
    (density,) = prior.latent_densities((x, y + 100.0), free_location=True)
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    covariance = 1.5 * (-0.5 * ((x - x.T) / 0.3).square()).exp() + 0.1 * torch.eye(6)
    precision = covariance.inverse()
    total, weighted = precision.sum(), precision @ y
    square = y @ weighted - weighted.sum() ** 2 / total
    expected = -0.5 * (5 * math.log(2 * math.pi) + covariance.logdet() + total.log() + square)
    shifted = float(density.log_density(nothing))  # 100^2 / (2 FLAT) is all it sees of the shift
    assert shifted == pytest.approx(float(expected), abs=1.5 * 100.0**2 / (2 * FLAT))
    (near,) = prior.latent_densities((x, y), free_location=True)
    assert float(near.log_density(nothing)) == pytest.approx(float(expected), abs=1e-3)
    mean, _ = near.predict(nothing, x)
    far, _ = density.predict(nothing, x)
    torch.testing.assert_close(far - 100.0, mean, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("prior", "given"),
    [
        (GaussianProcess(lengthscale=0.4), {}),
        (GaussianProcess(lengthscale=0.4), {"noise": 0.2}),
        (GaussianProcess(lengthscale=0.4, outputscale=1.3), {}),
        (GaussianProcess(lengthscale=0.4, outputscale=1.3), {"noise": 0.2}),
        (GaussianProcess(lengthscale=0.4, outputscale=InverseGamma(3.0, 2.0), noise=0.1), {}),
    ],
)
def test_with_a_free_scale_no_unit_of_y_matters(prior: Any, given: dict[str, float]) -> None:
    """The evidence in other units is the same but for the Jacobian, known variances included."""
    (x, y), unit = data(7), 20.0
    both = []
    for factor in (1.0, unit):
        known = {name: factor**2 * value for name, value in given.items()}
        found = prior.latent_densities((x, factor * y), given=known, free_scale=True)
        assert found[0].dim == 3 - len(given) - isinstance(prior.outputscale, float) - isinstance(
            prior.noise, float
        )
        both.append(evidence(found))
    jacobian = len(y) * math.log(unit)
    # the prior of a known variance, per unit of its logarithm, is free of units, too
    assert both[0] - both[1] == pytest.approx(jacobian, abs=1e-3)


def test_what_the_prior_says_of_a_free_unit_is_standard_normal() -> None:
    """Log-normal variances: the last latent is independent of the others and of the data."""
    prior, context = GaussianProcess(), data(5)
    (density,) = prior.latent_densities(context, free_scale=True)
    t = torch.randn(4, density.dim, dtype=torch.float64, generator=generator())
    other = t.clone()
    other[:, -1] = torch.tensor([0.0, 3.0, -1.0, 6.0])
    difference = density.log_density(t) - density.log_density(other)
    normal = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    expected = normal.log_prob(t[:, -1]) - normal.log_prob(other[:, -1])
    torch.testing.assert_close(difference, expected, atol=1e-9, rtol=0)


def test_wrong_questions_are_refused() -> None:
    x, y = data(5)
    with pytest.raises(ValueError, match="one task"):
        GaussianProcess().latent_densities((x.unsqueeze(0), y.unsqueeze(0)))
    with pytest.raises(ValueError, match="any positive value"):
        GaussianProcess(noise=Uniform(0.1, 0.2)).latent_densities((x, y), free_scale=True)
    for prior in (BNN(), Mixture([GaussianProcess()]), Warped(BNN())):
        assert not isinstance(prior, LatentPrior)


def test_a_law_of_values_is_the_law_of_coordinates() -> None:
    """What a network says of a value, in the coordinate of its hyperprior."""
    laws = [
        (LogNormal(0.3, 0.7), 2.0, LogNormal(torch.tensor([-1.0, 2.0]), torch.tensor([0.1, 2.0]))),
        (Gamma(2.0, 3.0), 1.0, LogNormal(torch.tensor([-1.0, 2.0]), torch.tensor([0.1, 2.0]))),
        (StudentT(5.0, 1.0, 2.0), 3.0, Normal(torch.tensor([-1.0, 2.0]), torch.tensor([0.1, 2.0]))),
    ]
    for prior, factor, law in laws:
        hyperparameter = Hyperparameter("value", prior, factor=factor)
        (coordinate,) = hyperpriors([hyperparameter], {}).coordinates
        normal = coordinate.normal(law)
        assert normal is not None
        t = torch.tensor([0.2, -0.4], dtype=torch.float64, requires_grad=True)
        value = factor * coordinate.transform(t)
        (slope,) = torch.autograd.grad(value.sum(), t)
        expected = law.log_prob(value) + slope.log()
        torch.testing.assert_close(normal.log_prob(t), expected, atol=1e-5, rtol=1e-5)
    (bounded,) = hyperpriors([Hyperparameter("value", Uniform(0.0, 1.0))], {}).coordinates
    assert bounded.normal(LogNormal(0.0, 1.0)) is None
    assert coordinate.normal(LogNormal(0.0, 1.0)) is None
    assert coordinate.normal(Uniform(0.0, 1.0)) is None
