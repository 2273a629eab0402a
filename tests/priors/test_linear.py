"""Bayesian linear regression against dense normals, scikit-learn and quadrature by hand."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.distributions import Exponential, InverseGamma, LogNormal, MultivariateNormal, Normal

from priors import Linear, from_config, to_config
from priors.linear import WeightSpace, features
from priors.tasks import ConditionalPrior


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def theta(weight_variance: float, bias_variance: float, noise: float) -> dict[str, Tensor]:
    return {
        "weight_variance": double(weight_variance),
        "bias_variance": double(bias_variance),
        "noise": double(noise),
        "mean": double(0.0),
    }


def dense(x: Tensor, weight_variance: float, bias_variance: float) -> Tensor:
    """The covariance of f, in function space."""
    z = math.sqrt(12) * (x - 0.5)
    return bias_variance + weight_variance * z @ z.T / x.shape[-1]


@pytest.mark.parametrize("n", [0, 1, 3, 8, 60])
@pytest.mark.parametrize("d", [1, 4])
@pytest.mark.parametrize("noise", [1e-4, 0.5])
def test_the_weight_space_evidence_is_the_multivariate_normal(n: int, d: int, noise: float) -> None:
    x = torch.rand(n, d, generator=generator(n), dtype=torch.float64)
    y = torch.randn(n, generator=generator(1), dtype=torch.float64)
    y = features(x) @ torch.ones(d + 1, dtype=torch.float64) + math.sqrt(noise) * y
    actual = WeightSpace(Linear(), x, y).log_likelihood(theta(0.7, 2.0, noise))
    covariance = dense(x, 0.7, 2.0) + noise * torch.eye(n, dtype=torch.float64)
    if n == 0:
        assert actual.tolist() == [0.0]
        return
    # the dense one loses what its condition number takes: 1e-16 * (3 n / noise) * n
    atol = 1e-10 if noise > 1e-2 else 1e-7
    expected = MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance).log_prob(y)
    torch.testing.assert_close(actual, expected.unsqueeze(0), atol=atol, rtol=1e-12)
    scipys = stats.multivariate_normal(np.zeros(n), covariance.numpy()).logpdf(y.numpy())
    assert float(actual) == pytest.approx(float(scipys), abs=atol)


def test_predictions_are_those_of_function_space() -> None:
    x = torch.rand(12, 3, generator=generator(), dtype=torch.float64)
    y = torch.randn(12, generator=generator(1), dtype=torch.float64)
    prior = Linear(weight_variance=0.7, bias_variance=2.0, noise=0.1)
    covariance = dense(x, 0.7, 2.0)
    seen, query = covariance[:8, :8] + 0.1 * torch.eye(8).double(), covariance[8:, 8:]
    gain = torch.linalg.solve(seen, covariance[:8, 8:]).T
    mean, spread = gain @ y[:8], query - gain @ covariance[:8, 8:]
    model = WeightSpace(prior, x[:8], y[:8])
    actual = model.predict(theta(0.7, 2.0, 0.1), x[8:], joint=True)
    torch.testing.assert_close(actual[0][0], mean, atol=1e-11, rtol=0)
    torch.testing.assert_close(actual[1][0], spread, atol=1e-11, rtol=0)
    each = model.predict(theta(0.7, 2.0, 0.1), x[8:])[1][0]
    torch.testing.assert_close(each, spread.diagonal(), atol=1e-11, rtol=0)
    posterior = prior.posterior((x[:8], y[:8]), x[8:])
    # a kernel's jitter is 1e-10 of the signal
    torch.testing.assert_close(posterior.mean, mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(posterior.variance, each + 0.1, atol=1e-10, rtol=0)
    latent = prior.posterior((x[:8], y[:8]), x[8:], latent=True)
    torch.testing.assert_close(latent.variance, each, atol=1e-10, rtol=0)


def test_the_mean_is_ridge_regression_with_a_free_intercept() -> None:
    x = torch.rand(40, 3, generator=generator(), dtype=torch.float64)
    y = 5 + x @ double(1.0, -2.0, 0.5) + 0.3 * torch.randn(40, generator=generator(1)).double()
    prior = Linear(weight_variance=0.7, bias_variance=1e7, noise=0.1)
    ridge = Ridge(alpha=0.1 / 0.7).fit(features(x)[:, 1:].numpy(), y.numpy())
    expected = ridge.predict(features(x[:5])[:, 1:].numpy())
    actual = prior.posterior((x, y), x[:5]).mean
    # an intercept of variance 1e7 shrinks by noise / (n variance) = 2.5e-10
    np.testing.assert_allclose(actual, expected, atol=1e-7)


@pytest.mark.parametrize("bias_variance", [1.0, Exponential(1.0)])
def test_variances_are_integrated_out(bias_variance: float | Exponential) -> None:
    prior = Linear(noise=InverseGamma(3.0, 0.3), bias_variance=bias_variance)
    assert prior.posterior_is_quick(5)
    tasks = prior.sample(1, 14, 2, generator=generator(2))
    x, y, x_query, y_query = tasks.x[0, :9], tasks.y[0, :9], tasks.x[0, 9:], tasks.y[0, 9:]
    drawn = prior.draw_hyperparameters(40000, 2, generator=generator(5))
    model = WeightSpace(prior, x, y)
    likelihood = model.log_likelihood(drawn)
    mean, variance = model.predict(drawn, x_query)
    predictive = Normal(mean, (variance + drawn["noise"].unsqueeze(-1)).sqrt()).log_prob(y_query)
    joint = torch.cat([likelihood.unsqueeze(-1), likelihood.unsqueeze(-1) + predictive], -1)
    density, error = joint.exp().mean(0), joint.exp().std(0) / math.sqrt(40000)
    evidence = prior.log_evidence((x, y))
    answer = prior.posterior((x, y), x_query).log_prob(y_query)
    exact = torch.cat([evidence.unsqueeze(0), evidence + answer]).exp()
    assert ((exact - density).abs() < 5 * error).all()
    assert (error < 0.1 * density).all()


def test_functions_are_linear_with_the_stated_moments() -> None:
    prior = Linear(weight_variance=0.7, bias_variance=2.0, noise=0.1)
    tasks = prior.sample(20000, 5, 3, generator=generator())
    assert tasks.latents == {} and tasks.x.dtype == torch.float64
    weights = torch.linalg.lstsq(features(tasks.x[:, :4]), tasks.f[:, :4].unsqueeze(-1)).solution
    fifth = (features(tasks.x[:, 4:]) @ weights).reshape(-1)
    clear = torch.linalg.cond(features(tasks.x[:, :4])) < 1e3
    torch.testing.assert_close(fifth[clear], tasks.f[clear, 4], atol=1e-9, rtol=0)
    for square, expected in (
        (tasks.f[:, 0].square(), 2.7),  # |z|^2 / d is 1 on average
        ((tasks.y - tasks.f)[:, 0].square(), 0.1),
        (tasks.f[:, 0] * tasks.f[:, 1], 2.0),  # the intercept is all that distant inputs share
    ):
        assert abs(float(square.mean()) - expected) < 4.9 * float(square.std()) / math.sqrt(20000)


def test_without_data_the_posterior_is_the_prior() -> None:
    posterior = Linear(0.7, 2.0, 0.1).posterior((torch.empty(0, 1), torch.empty(0)), [0.5, 1.0])
    torch.testing.assert_close(posterior.variance, double(2.1, 2.1 + 0.7 * 3), atol=1e-9, rtol=0)
    assert float(Linear().log_evidence((torch.empty(0, 2), torch.empty(0)))) == pytest.approx(
        0, abs=1e-5
    )


def test_latents_are_found_and_can_be_given() -> None:
    prior = Linear(noise=LogNormal(-2.0, 1.0))
    tasks = prior.sample(1, 200, 1, generator=generator())
    context = (tasks.x[0], tasks.y[0])
    noise = prior.latent_posterior(context)["noise"]
    truth = float(tasks.latents["noise"])
    assert abs(float(noise.mean) - truth) < 5 * float(noise.variance.sqrt())
    assert float(noise.variance.sqrt()) == pytest.approx(truth * math.sqrt(2 / 200), rel=0.2)
    given = prior.posterior(context, [0.5], given={"noise": truth, "weight_variance": 1.0})
    assert isinstance(given, Normal)


def test_conditionals_agree_with_the_posterior_given_the_latents() -> None:
    prior = Linear()
    assert isinstance(prior, ConditionalPrior)
    tasks = prior.sample_conditional(3, 6, 2, torch.tensor([0, 4]), generator=generator())
    for i in range(3):
        known = {name: value[i] for name, value in tasks.latents.items()}
        exact = prior.posterior(
            (tasks.x[i, :4], tasks.y[i, :4]), tasks.x_query[i, 1:], latent=True, given=known
        )
        torch.testing.assert_close(exact.mean, tasks.mean[i, 1:], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(exact.variance, tasks.variance[i, 1:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("field", ["weight_variance", "bias_variance", "noise"])
def test_variances_are_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"Expected a positive {field}"):
        Linear(**{field: 0.0})  # type: ignore[arg-type]


def test_it_survives_the_round_trip_through_json() -> None:
    prior = Linear(bias_variance=Exponential(1.0), inputs=("uniform", "grid"))
    rebuilt = from_config(json.loads(json.dumps(to_config(prior))))
    draws = [p.sample(5, 4, 2, generator=generator()).y for p in (prior, rebuilt)]
    assert torch.equal(*draws)
