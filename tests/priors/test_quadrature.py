"""Quadrature over hyperparameters against closed forms, importance sampling and calibration."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    Uniform,
)

from priors import GaussianProcess, reference
from priors.hyperpriors import hyperpriors
from priors.quadrature import Spectral, integrate

# sqrt(log(2 / p) / 2n) bounds a Kolmogorov-Smirnov distance but for p = 1e-6 of all seeds (DKW)
DKW = math.sqrt(math.log(2e6) / 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ks_distance(pit: Tensor) -> float:
    """Largest distance between the empirical cdf of `pit` and the uniform one."""
    ordered = pit.flatten().sort().values
    rank = torch.arange(len(ordered) + 1, dtype=ordered.dtype) / len(ordered)
    return float(torch.maximum(rank[1:] - ordered, ordered - rank[:-1]).max())


# integrate: any smooth log density


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("width", [0.003, 0.1, 1.0, 3.0])
def test_normal_densities_integrate_to_one(dim: int, width: float) -> None:
    # correlated by 0.95, as wide or narrow as posteriors get, and off the centre
    covariance = width**2 * (0.05 * torch.eye(dim) + 0.95).double()
    normal = MultivariateNormal(torch.full((dim,), 0.7).double(), covariance)
    lattice = integrate(normal.log_prob, dim)
    weights = lattice.log_weights.exp()
    # the threshold of 18 nats leaves out chi-square tails of 1e-7
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    weights = weights / weights.sum()
    mean = weights @ lattice.points
    torch.testing.assert_close(mean, normal.mean, atol=1e-6 * width, rtol=0)
    centred = lattice.points - mean
    second = (weights.unsqueeze(-1) * centred).T @ centred
    torch.testing.assert_close(second, covariance, atol=1e-5 * width**2, rtol=0)


def test_skewed_densities_integrate_to_gamma_functions() -> None:
    shape = torch.tensor([0.6, 2.0, 30.0], dtype=torch.float64)
    lattice = integrate(lambda t: (shape * t - t.exp()).sum(-1), 3)
    expected = float(torch.lgamma(shape).sum())
    assert float(lattice.log_weights.logsumexp(0)) == pytest.approx(expected, abs=1e-5)


def test_a_curved_ridge_is_followed() -> None:
    def banana(t: Tensor) -> Tensor:
        bent = torch.stack([t[:, 0], (t[:, 1] - t[:, 0].square()) / 0.1], -1)
        return Normal(0.0, 1.0).log_prob(bent).sum(-1) - math.log(0.1)

    assert float(integrate(banana, 2).log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-5)


def test_separate_narrow_modes_are_all_found() -> None:
    centers = torch.tensor([[-1.5, 0.3], [1.7, -1.2]], dtype=torch.float64)
    weight = torch.tensor([0.97, 0.03], dtype=torch.float64).log()

    def two(t: Tensor) -> Tensor:
        log_prob = Normal(centers, 0.1).log_prob(t.unsqueeze(-2)).sum(-1)
        return (weight + log_prob).logsumexp(-1)

    lattice = integrate(two, 2)
    assert float(lattice.log_weights.logsumexp(0)) == pytest.approx(0, abs=1e-5)
    right = lattice.log_weights[lattice.points[:, 0] > 0].exp().sum()
    assert float(right) == pytest.approx(0.03, abs=1e-5)


def test_without_variables_the_density_is_the_integral() -> None:
    lattice = integrate(lambda t: torch.full((len(t),), -3.0), 0)
    assert lattice.log_weights.tolist() == [-3.0] and lattice.gap == 0


def test_a_density_it_cannot_resolve_is_announced() -> None:
    with pytest.warns(UserWarning, match="stopped with a gap"):
        integrate(lambda t: -1e3 * (t[:, 0] > 0.1234).double() - t[:, 0].abs(), 1, rounds=3)


# hyperpriors as coordinates

HYPERPRIORS = [
    LogNormal(-1.0, 0.7),
    Gamma(0.5, 0.125),
    InverseGamma(3.0, 1.0),
    HalfNormal(2.0),
    HalfCauchy(1.0),
    Exponential(1.0),
    Uniform(0.1, 2.0),
]


@pytest.mark.parametrize("prior", HYPERPRIORS, ids=lambda prior: type(prior).__name__)
def test_hyperpriors_integrate_to_one_in_their_coordinates(prior: Distribution) -> None:
    hyper = hyperpriors(
        GaussianProcess(noise=prior, lengthscale=1.0, outputscale=1.0).hyperparameters(1), {}
    )
    lattice = integrate(hyper.log_density, 1)
    weights, noise = lattice.log_weights.exp(), hyper.values(lattice.points)["noise"]
    # exponential tails lose what lies 18 nats down: e^-18 / slope
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    below = weights[noise < prior.sample(torch.Size([1000])).median()].sum()
    assert 0.2 < below < 0.8


def test_log_normal_coordinates_are_standard_normal() -> None:
    hyper = hyperpriors(GaussianProcess(ard=True, scale_with_dimension=True).hyperparameters(4), {})
    assert hyper.dim == 6
    t = torch.randn(5, 6, dtype=torch.float64, generator=generator())
    expected = Normal(0.0, 1.0).log_prob(t).sum(-1)
    # parameters of torch's distributions are float32
    torch.testing.assert_close(hyper.log_density(t), expected, atol=1e-5, rtol=0)
    values = hyper.values(torch.zeros(1, 6, dtype=torch.float64))
    assert values["lengthscale"].tolist() == [pytest.approx([2 * 0.3] * 4)]


# one task: likelihood and evidence


def test_the_spectral_likelihood_is_the_multivariate_normal() -> None:
    prior = GaussianProcess(kernel="matern32", mean=Normal(0.5, 1.2))
    tasks = prior.sample(6, 9, 2, generator=generator())
    spectral = Spectral(prior, tasks.x[0], tasks.y[0], 1.44)
    theta = tasks.latents
    x, y = tasks.x[:1].expand(6, -1, -1), tasks.y[:1].expand(6, -1)
    dense = prior.log_likelihood(x, y, theta, mean_variance=1.44)
    covariance = prior.covariance(x, x, theta) + 1.44
    covariance = covariance + torch.diag_embed(theta["noise"].unsqueeze(-1).expand(6, 9))
    mean = theta["mean"].unsqueeze(-1).expand(6, 9)
    expected = MultivariateNormal(mean, covariance).log_prob(y)
    # the jitter of 1e-10 is divided by noises down to 1e-3, times 9 points
    torch.testing.assert_close(spectral.log_likelihood(theta), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-6)


def importance_sample(
    prior: GaussianProcess, x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor, draws: int
) -> tuple[Tensor, Tensor]:
    """Densities of y and of each (y, y_query_j) with draws from the prior: (1 + m,), and errors."""
    theta = prior.draw_hyperparameters(draws, x.shape[-1], generator=generator(9))
    x, y, x_query = (part.expand(draws, *part.shape) for part in (x, y, x_query))
    likelihood = prior.log_likelihood(x, y, theta)
    mean, variance = prior.conditional(x, y, x_query, theta)
    deviation = (variance + theta["noise"].unsqueeze(-1)).sqrt()
    predictive = Normal(mean, deviation).log_prob(y_query)
    joint = torch.cat([likelihood.unsqueeze(-1), likelihood.unsqueeze(-1) + predictive], -1).exp()
    return joint.mean(0), joint.std(0) / math.sqrt(draws)


@pytest.mark.parametrize(
    "prior",
    [
        GaussianProcess(),
        GaussianProcess(kernel="linear", noise=0.1, mean=Uniform(-1.0, 2.0)),
        GaussianProcess(kernel="periodic", outputscale=HalfNormal(2.0), noise=Gamma(2.0, 9.0)),
        GaussianProcess(kernel=("rbf", "matern12"), lengthscale=InverseGamma(3.0, 1.0), noise=0.1),
        GaussianProcess(mean=StudentT(4.0, 0.0, 1.0), lengthscale=0.3, outputscale=0.5),
    ],
    ids=["default", "linear", "periodic", "kernels", "mean"],
)
def test_evidence_and_predictive_match_importance_sampling(prior: GaussianProcess) -> None:
    tasks = prior.sample(1, 9, 1, generator=generator(4))
    x, y, x_query, y_query = tasks.x[0, :6], tasks.y[0, :6], tasks.x[0, 6:], tasks.y[0, 6:]
    density, error = importance_sample(prior, x, y, x_query, y_query, 40000)
    evidence = prior.log_evidence((x, y))
    predictive = prior.posterior((x, y), x_query).log_prob(y_query)
    exact = torch.cat([evidence.unsqueeze(0), evidence + predictive]).exp()
    assert ((exact - density).abs() < 5 * error).all()
    assert (error < 0.1 * density).all()  # or the comparison says little


def test_a_tensor_product_grid_agrees_to_five_digits() -> None:
    prior = GaussianProcess(outputscale=1.0)
    tasks = prior.sample(1, 15, 1, generator=generator(2))
    x, y = tasks.x[0], tasks.y[0]
    axis = torch.linspace(-7, 7, 141, dtype=torch.float64)
    hyper = hyperpriors(prior.hyperparameters(1), {})
    spectral = Spectral(GaussianProcess(), x, y)
    grid = torch.cartesian_prod(axis, axis)
    log_density = hyper.log_density(grid) + spectral.log_likelihood(hyper.values(grid))
    expected = float(log_density.logsumexp(0)) + 2 * math.log(0.1)
    assert float(prior.log_evidence((x, y))) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("n", [0, 1, 5, 20, 60])
def test_refining_the_lattice_moves_no_log_density_by_1e4_nor_by_more_than_stated(n: int) -> None:
    prior = GaussianProcess()
    drawn = prior.sample(2, n + 16, 1, generator=generator(n))
    for i in range(2):
        context = (drawn.x[i, :n], drawn.y[i, :n])
        tasks, _ = reference._tasks(prior, context, drawn.x[i, n:], None)
        coarse, fine = (
            reference._distribution(
                tasks,
                [reference._infer(prior, tasks[0], None, (0, 0), step=step)],
                latent=False,
                joint=False,
                batched=False,
            )
            for step in (0.65, 0.4)
        )
        y = drawn.y[i, n:]
        moved = (coarse.log_prob(y) - fine.log_prob(y)).abs()
        assert moved.max() < 1e-4
        assert isinstance(coarse, reference.QuadraturePosterior)
        stated = coarse.log_prob_error(y)
        assert stated.shape == y.shape
        assert (moved < 3 * stated + 1e-7).all() and stated.max() < 1e-3


@pytest.mark.parametrize("noise", [0.01, LogNormal(-4.0, 1.0)])
def test_errors_are_stated_for_many_kernels_and_tasks(noise: float | Distribution) -> None:
    prior = GaussianProcess(
        kernel=("rbf", "matern32"), lengthscale=0.3, outputscale=1.0, noise=noise
    )
    drawn = prior.sample(3, 10, 1, generator=generator())
    context, x_query, y = (drawn.x[:, :6], drawn.y[:, :6]), drawn.x[:, 6:], drawn.y[:, 6:]
    posterior = prior.posterior(context, x_query)
    assert isinstance(posterior, reference.QuadraturePosterior)
    error = posterior.log_prob_error(y)
    assert error.shape == (3, 4) and (error >= reference.MASS_LEFT_OUT).all()
    assert error.max() < (1e-3 if isinstance(noise, Distribution) else 1e-7)
    expanded = posterior.expand((2, 3, 4))
    torch.testing.assert_close(expanded.log_prob(y), posterior.log_prob(y).expand(2, 3, 4))


def test_a_joint_density_is_a_difference_of_evidences() -> None:
    prior = GaussianProcess()
    tasks = prior.sample(1, 18, 1, generator=generator())
    x, y = tasks.x[0], tasks.y[0]
    joint = prior.posterior((x[:10], y[:10]), x[10:], joint=True)
    assert joint.batch_shape == () and joint.event_shape == (8,)
    expected = prior.log_evidence((x, y)) - prior.log_evidence((x[:10], y[:10]))
    assert float(joint.log_prob(y[10:])) == pytest.approx(float(expected), abs=1e-4)
    single = prior.posterior((x[:10], y[:10]), x[10:])
    torch.testing.assert_close(joint.mean, single.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(joint.variance, single.variance, atol=1e-6, rtol=0)


def test_a_joint_posterior_of_many_queries_fits_in_memory() -> None:
    prior = GaussianProcess(outputscale=1.0)
    tasks = prior.sample(1, 160, 1, generator=generator())
    joint = prior.posterior((tasks.x[0, :10], tasks.y[0, :10]), tasks.x[0, 10:], joint=True)
    assert joint.event_shape == (150,)
    assert joint.mixture_distribution.logits.numel() * 150**2 <= reference.JOINT_ENTRIES


def test_kernels_are_weighted_by_their_evidence() -> None:
    both = GaussianProcess(kernel=("rbf", "matern12"), noise=0.05)
    tasks = both.sample(1, 25, 1, generator=generator(3))
    x, y, x_query = tasks.x[0, :20], tasks.y[0, :20], tasks.x[0, 20:]
    singles = [GaussianProcess(kernel=kernel, noise=0.05) for kernel in both.kernels]
    evidence = torch.stack([single.log_evidence((x, y)) for single in singles])
    weights = evidence.softmax(0)
    means = torch.stack([single.posterior((x, y), x_query).mean for single in singles])
    torch.testing.assert_close(
        both.posterior((x, y), x_query).mean, weights @ means, atol=1e-6, rtol=0
    )
    kernel = both.latent_posterior((x, y))["kernel"]
    assert float(kernel.mean) == pytest.approx(float(weights[1]), abs=1e-6)
    total = evidence.logsumexp(0) - math.log(2)
    assert float(both.log_evidence((x, y))) == pytest.approx(float(total), abs=1e-6)


# posteriors of the hyperparameters


def test_the_posteriordb_gaussian_process_is_reproduced() -> None:
    """Data and reference draws of gp_pois_regr-gp_regr: 10000 draws of Stan with these errors.

    Reference: Magnusson et al., posteriordb, github.com/stan-dev/posteriordb; its `sigma` is a
    variance, its `alpha` a standard deviation.
    """
    x = torch.arange(-10.0, 11, 2)
    y = [4.75906, 1.59423, 2.99548, 5.27501, 1.66472, 2.24347]
    y += [2.8914, 4.08681, 4.60588, 0.802364, 3.92136]
    prior = GaussianProcess(
        lengthscale=Gamma(25.0, 4.0), outputscale=Gamma(0.5, 0.125), noise=HalfNormal(1.0)
    )
    latents = prior.latent_posterior((x, y))
    alpha = latents["outputscale"]._replace(values=latents["outputscale"].values.sqrt())
    for ours, mean, error in (
        (latents["lengthscale"].mean, 6.87435, 0.01276),
        (alpha.mean, 2.44240, 0.00776),
        (latents["noise"].mean, 1.82873, 0.00503),
    ):
        assert abs(float(ours) - mean) < 3 * error


def test_quantiles_invert_the_cdf_of_a_latent() -> None:
    prior = GaussianProcess()
    tasks = prior.sample(1, 30, 1, generator=generator(1))
    for marginal in prior.latent_posterior((tasks.x[0], tasks.y[0])).values():
        for level in (0.05, 0.5, 0.95):
            at = marginal.quantile(level)
            assert float(marginal.cdf(at)) == pytest.approx(level, abs=1e-9)


def test_latents_of_no_data_are_their_prior() -> None:
    prior = GaussianProcess()
    latents = prior.latent_posterior((torch.empty(0, 1), torch.empty(0)))
    for name, marginal in latents.items():
        hyperprior = getattr(prior, name)
        assert float(marginal.mean) == pytest.approx(float(hyperprior.mean), rel=1e-4)
        for level in (0.05, 0.5, 0.95):
            quantile = float(hyperprior.icdf(torch.tensor(level)))
            # even densities in cells of 0.4 standard deviations: 0.4^2 max |p'| / 24 inside, twice
            # that at their edges
            assert float(marginal.cdf(quantile)) == pytest.approx(level, abs=3.5e-3)


def test_the_posterior_is_calibrated_on_prior_tasks() -> None:
    # PIT of one new observation and of the latents: uniform for the exact posterior of the prior
    prior = GaussianProcess(outputscale=1.0, noise=LogNormal(-2.0, 1.0))
    tasks = prior.sample(120, 7, 1, generator=generator(7))
    posterior = prior.posterior((tasks.x[:, :6], tasks.y[:, :6]), tasks.x[:, 6:])
    assert ks_distance(posterior.cdf(tasks.y[:, 6:])) < DKW / math.sqrt(120)
    ranks: dict[str, list[Tensor]] = {"lengthscale": [], "noise": []}
    for i in range(120):
        latents = prior.latent_posterior((tasks.x[i, :6], tasks.y[i, :6]))
        for name, marginal in latents.items():
            ranks[name].append(marginal.cdf(tasks.latents[name][i]))
    for pit in ranks.values():
        assert ks_distance(torch.stack(pit)) < DKW / math.sqrt(120)


@pytest.mark.parametrize("kind", ["constant", "huge", "tiny", "duplicates", "outlier"])
def test_hard_data_get_a_finite_answer_without_warnings(kind: str) -> None:
    x = torch.linspace(0, 1, 12, dtype=torch.float64)
    y = {
        "constant": torch.zeros(12).double(),
        "huge": 1e6 * torch.sin(6 * x),
        "tiny": 1e-9 * torch.sin(6 * x),
        "duplicates": torch.sin(6 * x),
        "outlier": torch.sin(6 * x) + 1000.0 * (x > 0.95),
    }[kind]
    x = x[torch.arange(12) // 2] if kind == "duplicates" else x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = GaussianProcess().posterior((x, y), [0.0, 0.31, 2.0])
    answers: list[Any] = [posterior.mean, posterior.variance, posterior.log_prob(y[:3])]
    assert all(answer.isfinite().all() for answer in answers)
    assert (posterior.variance > 0).all()
