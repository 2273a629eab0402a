"""NUTS against quadrature and importance sampling; its evidence against closed forms."""

import math

import jax
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Distribution,
    Gamma,
    HalfNormal,
    InverseGamma,
    LogNormal,
    Normal,
    StudentT,
    TransformedDistribution,
    Uniform,
)

from priors import GaussianProcess, nuts, nuts_posterior
from priors.hyperpriors import hyperpriors
from priors.kernels import KERNELS
from priors.reference import NutsPosterior

EASY = GaussianProcess(kernel=("rbf", "matern32"))  # three hyperparameters: quadrature applies
HARD = GaussianProcess(ard=True, scale_with_dimension=True)  # six of them in four features


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def potential_energy(prior: GaussianProcess, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """What NUTS descends, (node,), and that its gradient is finite."""
    hyper = hyperpriors(prior.hyperparameters(x.shape[-1]), {})
    with jax.enable_x64(True):
        energy = nuts._potential(nuts.specify(hyper))
        data = nuts._data(prior.kernels[0], x, y, hyper)
        run = jax.jit(jax.vmap(jax.value_and_grad(energy, argnums=1), in_axes=(None, 0)))
        values, gradients = run(data, t.numpy())
        assert np.isfinite(gradients).all()
        return torch.from_numpy(np.array(values))


def log_density(prior: GaussianProcess, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """The same by torch: log p(t) + log p(y | x, t)."""
    hyper = hyperpriors(prior.hyperparameters(x.shape[-1]), {})
    x, y = x.expand(len(t), *x.shape), y.expand(len(t), *y.shape)
    variance = hyper.mean_variance
    likelihood = prior.log_likelihood(x, y, hyper.values(t), mean_variance=variance)
    return hyper.log_density(t) + likelihood


def test_both_implementations_of_the_density_agree() -> None:
    hyperparameters: list[dict[str, float | Distribution | bool]] = [
        {"noise": Gamma(2.0, 3.0), "outputscale": InverseGamma(3.0, 1.0)},
        {"noise": Uniform(0.05, 0.5), "outputscale": HalfNormal(2.0), "ard": True},
        {"noise": 0.1, "mean": StudentT(4.0, 0.5, 1.0), "scale_with_dimension": True},
        {"noise": LogNormal(-2.0, 1.0), "mean": Normal(1.0, 2.0), "ard": True},
        {"lengthscale": 0.4, "noise": 0.3},
    ]
    x = torch.rand(7, 2, dtype=torch.float64, generator=generator())
    x[1] = x[0]  # coinciding inputs
    y = torch.randn(7, dtype=torch.float64, generator=generator())
    for i, kernel in enumerate(KERNELS):
        settings = hyperparameters[i % len(hyperparameters)]
        prior = GaussianProcess(kernel=kernel, **settings)  # type: ignore[arg-type]
        dim = hyperpriors(prior.hyperparameters(2), {}).dim
        t = torch.randn(3, dim, dtype=torch.float64, generator=generator(i))
        total = potential_energy(prior, x, y, t) + log_density(prior, x, y, t)
        # equal but for a constant; torch's hyperpriors have float32 parameters
        torch.testing.assert_close(total, total[:1].expand(3), atol=1e-5, rtol=0)


def test_it_agrees_with_quadrature_within_its_stated_error() -> None:
    tasks = EASY.sample(2, 24, 1, generator=generator(3))
    context, x_query, value = (tasks.x[:, :12], tasks.y[:, :12]), tasks.x[:, 12:], tasks.y[:, 12:]
    posterior, diagnostics = nuts_posterior(EASY, context, x_query)
    assert isinstance(posterior, NutsPosterior) and posterior.batch_shape == (2, 12)
    assert (diagnostics.r_hat < 1.05).all() and (diagnostics.ess > 100).all()
    assert (diagnostics.divergences < 12).all()  # one in a hundred
    error = posterior.log_prob_error(value)
    assert error.max() < 0.1
    difference = posterior.log_prob(value) - EASY.posterior(context, x_query).log_prob(value)
    assert (difference.abs() < 5 * error).all()
    assert (difference / error).square().mean().sqrt() < 2  # queries of a task are correlated
    for k in range(2):
        exact = EASY.log_evidence(context, given={"kernel": k})
        gap = diagnostics.log_evidence[:, k] + math.log(2) - exact
        assert (gap.abs() < 5 * diagnostics.log_evidence_error[:, k]).all()
    again, _ = nuts_posterior(EASY, context, x_query)
    assert torch.equal(posterior.mean, again.mean)
    latents = EASY.latent_posterior((context[0][0], context[1][0]), method="nuts")
    exact_latents = EASY.latent_posterior((context[0][0], context[1][0]))
    for name, marginal in latents.items():
        other = exact_latents[name]
        # 5 standard errors at the 100 effective draws asserted above
        assert (marginal.mean - other.mean).abs() < 5 * (other.variance / 100).sqrt()


def test_six_hyperparameters_agree_with_importance_sampling() -> None:
    tasks = HARD.sample(1, 9, 4, generator=generator(2))
    x, y, x_query, y_query = tasks.x[0, :6], tasks.y[0, :6], tasks.x[0, 6:], tasks.y[0, 6:]
    theta = HARD.draw_hyperparameters(40000, 4, generator=generator(8))
    data = [part.expand(40000, *part.shape) for part in (x, y, x_query)]
    weight = HARD.log_likelihood(data[0], data[1], theta).exp()
    mean, variance = HARD.conditional(*data, theta)
    density = Normal(mean, (variance + theta["noise"].unsqueeze(-1)).sqrt()).log_prob(y_query).exp()
    ratio = (weight.unsqueeze(-1) * density).mean(0) / weight.mean()
    influence = weight.unsqueeze(-1) * (density / ratio - 1) / weight.mean()
    error = influence.std(0) / math.sqrt(40000)
    assert error.max() < 0.05  # or the comparison says little

    posterior = HARD.posterior((x, y), x_query)
    assert isinstance(posterior, NutsPosterior)  # chosen for more than three hyperparameters
    total = (error.square() + posterior.log_prob_error(y_query).square()).sqrt()
    assert ((posterior.log_prob(y_query) - ratio.log()).abs() < 5 * total).all()
    evidence = HARD.log_evidence((x, y))
    error_of_evidence = math.hypot(float(weight.std() / weight.mean()) / 200, 0.03)
    assert abs(float(evidence - weight.mean().log())) < 5 * error_of_evidence

    joint = HARD.posterior((x, y), x_query, joint=True)
    assert joint.event_shape == (3,)
    torch.testing.assert_close(joint.mean, posterior.mean, atol=1e-9, rtol=0)
    run = nuts._sampler(nuts.specify(hyperpriors(HARD.hyperparameters(4), {})), nuts.DEFAULT)
    assert run._cache_size() == 1  # type: ignore[attr-defined]  # compiled once for all of the above


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_bridge_sampling_finds_gamma_functions(dim: int) -> None:
    # log-gamma densities are skewed to the left, like posteriors of log variances
    shape = torch.linspace(0.7, 4, dim + 1, dtype=torch.float64)[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dim)
        draws = Gamma(shape, torch.ones_like(shape)).sample((4, 300)).log()
    evidence = nuts.bridge_log_evidence(
        lambda t: (shape * t - t.exp()).sum(-1) - 700, draws, seed=0
    )
    assert evidence.error < 0.03
    assert abs(evidence.value + 700 - float(torch.lgamma(shape).sum())) < 5 * evidence.error


def test_without_observations_it_draws_the_prior() -> None:
    prior = GaussianProcess(ard=True)
    empty = (torch.empty(0, 2), torch.empty(0))
    posterior = prior.posterior(empty, torch.tensor([[0.1, 0.9]]))
    assert float(posterior.mean) == 0
    variance = prior.outputscale.mean + prior.noise.mean  # type: ignore[union-attr]
    spread = prior.outputscale.variance + prior.noise.variance  # type: ignore[union-attr]
    # 5 standard errors of a mean over 400 effective draws
    assert abs(float(posterior.variance - variance)) < 5 * math.sqrt(float(spread) / 400)
    assert abs(float(prior.log_evidence(empty))) < 0.05


def test_hyperpriors_that_numpyro_lacks_are_refused() -> None:
    shifted = TransformedDistribution(LogNormal(0.0, 1.0), [AffineTransform(0.1, 1.0)])
    prior = GaussianProcess(noise=shifted, ard=True)
    with pytest.raises(ValueError, match="Expected a distribution among"):
        prior.posterior((torch.rand(3, 2), torch.rand(3)), torch.rand(1, 2))


def test_double_precision_does_not_leak() -> None:
    assert jax.numpy.ones(1).dtype == np.float32
