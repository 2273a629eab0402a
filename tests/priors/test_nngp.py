"""The prior of infinitely wide networks: its moments, posterior, limits and refusals."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import LogNormal, MultivariateNormal, Normal

from priors import NNGP, from_config, to_config
from priors.dual import abrelu
from priors.infinite_width import nngp
from priors.kernel_prior import JITTER

FIXED = NNGP("erf", depth=3, weight_variance=1.7, bias_variance=0.3, noise=0.05)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gram(x: Tensor, prior: NNGP = FIXED, depth: int = 3) -> Tensor:
    z = math.sqrt(12) * (x - 0.5)
    return nngp(z, z, activation="erf", depth=depth, weight_variance=1.7, bias_variance=0.3)


def test_evidence_and_predictive_are_the_multivariate_normal() -> None:
    tasks = FIXED.sample(1, 12, 3, generator=generator())
    x, y = tasks.x[0], tasks.y[0]
    covariance = gram(x) + (0.05 + JITTER) * torch.eye(12, dtype=torch.float64)
    zero = torch.zeros(12).double()
    whole = MultivariateNormal(zero, covariance).log_prob(y)
    part = MultivariateNormal(zero[:9], covariance[:9, :9]).log_prob(y[:9])
    torch.testing.assert_close(FIXED.log_evidence((x, y)), whole, atol=1e-10, rtol=0)
    joint = FIXED.posterior((x[:9], y[:9]), x[9:], joint=True).log_prob(y[9:])
    torch.testing.assert_close(joint, whole - part, atol=1e-8, rtol=0)
    marginal = FIXED.posterior((x[:9], y[:9]), x[9:])
    assert isinstance(marginal, Normal)


def test_draws_have_the_kernels_second_moments() -> None:
    prior = NNGP("erf", depth=3, weight_variance=1.7, bias_variance=0.3, noise=1e-6, inputs="grid")
    tasks = prior.sample(20_000, 4, 1, generator=generator(1))
    order = tasks.x.squeeze(-1).argsort(1)  # the same grid in each task, shuffled
    f = tasks.f.gather(1, order)
    expected = gram(torch.tensor([[0.125], [0.375], [0.625], [0.875]]).double())
    ours = f.T @ f / len(f)
    scale = (expected.diagonal().outer(expected.diagonal()) + expected.square()).sqrt()
    assert float(((ours - expected) / scale).abs().max()) < 5.2 / math.sqrt(len(f))  # 1e-6 of ten


def test_mixed_depths_weigh_by_their_evidence() -> None:
    mixed = NNGP("erf", depth=(1, 3), weight_variance=1.7, bias_variance=0.3, noise=0.05)
    tasks = mixed.sample(2, 14, 2, generator=generator(2))
    context, x_query, y_query = (tasks.x[:, :10], tasks.y[:, :10]), tasks.x[:, 10:], tasks.y[:, 10:]
    parts = [NNGP("erf", d, 1.7, 0.3, noise=0.05) for d in (1, 3)]
    evidence = torch.stack([part.log_evidence(context) for part in parts])
    densities = torch.stack([part.posterior(context, x_query).log_prob(y_query) for part in parts])
    weights = evidence.log_softmax(0).unsqueeze(-1)
    expected = (weights + densities).logsumexp(0)
    ours = mixed.posterior(context, x_query).log_prob(y_query)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    total = evidence.logsumexp(0) - math.log(2)
    torch.testing.assert_close(mixed.log_evidence(context), total, atol=1e-10, rtol=0)
    depth = mixed.latent_posterior((tasks.x[0, :10], tasks.y[0, :10]))["depth"]
    assert float(depth.mean) == pytest.approx(float(weights[1, 0].exp()), abs=1e-10)
    assert mixed.latent_categories == {"depth": ["1", "3"]}


def test_a_task_of_each_depth_has_that_depths_kernel() -> None:
    mixed = NNGP("erf", depth=(1, 3), weight_variance=1.7, bias_variance=0.3)
    x = torch.rand(6, 5, 2, generator=generator(3), dtype=torch.float64)
    theta = mixed.draw_hyperparameters(6, 2, generator=generator(4))
    depth = theta["depth"]
    assert set(depth.tolist()) == {0, 1}
    unit = mixed.unit_covariance(x, x, theta)
    for i in range(6):
        torch.testing.assert_close(unit[i], gram(x[i], depth=(1, 3)[int(depth[i])]))
    torch.testing.assert_close(mixed.unit_variance(x, theta), unit.diagonal(dim1=1, dim2=2))


def test_quadrature_agrees_with_sequential_monte_carlo() -> None:
    prior = NNGP()
    tasks = prior.sample(1, 20, 2, generator=generator(5))
    context, x_query, y_query = (tasks.x[0, :16], tasks.y[0, :16]), tasks.x[0, 16:], tasks.y[0, 16:]
    exact = prior.posterior(context, x_query)
    draws = prior.posterior(context, x_query, method="smc")
    gap = exact.log_prob(y_query) - draws.log_prob(y_query)
    # eight islands: a Student-t of 7 degrees of freedom, 1e-6 over four queries
    assert float((gap / draws.log_prob_error(y_query)).abs().max()) < 15.0
    assert float(gap.abs().max()) < 0.05
    evidence = prior.log_evidence(context), prior.log_evidence(context, method="smc")
    assert float((evidence[0] - evidence[1]).abs()) < 0.2


def test_slopes_make_a_piecewise_linear_network() -> None:
    prior = NNGP((0.2, 1.0), depth=2, weight_variance=1.2, bias_variance=0.1)
    x = torch.rand(1, 5, 2, generator=generator(6), dtype=torch.float64)
    theta = prior.draw_hyperparameters(1, 2, generator=generator(7))
    z = math.sqrt(12) * (x - 0.5)
    expected = nngp(
        z, z, activation=abrelu(0.2, 1.0), depth=2, weight_variance=1.2, bias_variance=0.1
    )
    torch.testing.assert_close(prior.unit_covariance(x, x, theta), expected)
    assert to_config(from_config(to_config(prior))) == to_config(prior)


def test_hyperparameters_are_reported_where_they_vary() -> None:
    prior = NNGP(weight_variance=LogNormal(0.0, 0.3), bias_variance=0.2, depth=2)
    tasks = prior.sample(7, 4, 1, generator=generator(8))
    assert set(tasks.latents) == {"weight_variance", "noise"}
    assert prior.latent_units["noise"] == "y^2" and prior.latent_units["weight_variance"] == ""


def test_bad_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected an activation"):
        NNGP(activation="sigmoid")
    with pytest.raises(ValueError, match="two slopes"):
        NNGP(activation=(0.1, 0.2, 0.3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 hidden layer"):
        NNGP(depth=())
    with pytest.raises(ValueError, match="positive noise"):
        NNGP(noise=0.0)
    with pytest.raises(ValueError, match="inputs among"):
        NNGP(inputs="hexagonal")
