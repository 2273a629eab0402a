"""The HEBO+ prior against its published constants."""

import json
import math

import pytest
import torch
from scipy import stats

from priors import from_config, hebo_plus, to_config


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_hyperparameters_follow_the_published_laws() -> None:
    latents = hebo_plus().sample(4000, 1, 3, generator=generator()).latents
    for name, law in (
        ("lengthscale", stats.gamma(1.2107, scale=1 / 1.5212)),
        ("outputscale", stats.gamma(0.8452, scale=1 / 0.3994)),
        ("noise", stats.lognorm(0.5, scale=math.exp(-4.63))),
        ("concentration1", stats.lognorm(0.75)),
        ("concentration0", stats.lognorm(0.75)),
    ):
        assert stats.kstest(latents[name].flatten().numpy(), law.cdf).pvalue > 1e-6, name
    share = float(latents["relevance"].mean())
    assert abs(share - 0.7) < 4.9 * math.sqrt(0.21 / 12000)


def test_every_task_draws_hyperparameters_of_its_own() -> None:
    latents = hebo_plus().sample(256, 2, 1, generator=generator()).latents
    assert all(len(latents[name].unique()) == 256 for name in ("lengthscale", "outputscale"))


def test_marginals_have_the_variance_of_the_hyperpriors() -> None:
    tasks = hebo_plus().sample(20000, 1, 2, generator=generator())
    square = tasks.y.square().flatten()
    expected = 0.8452 / 0.3994 + math.exp(-4.63 + 0.125)
    assert abs(float(square.mean()) - expected) < 4.9 * float(square.std()) / math.sqrt(20000)
    assert ((tasks.x >= 0) & (tasks.x <= 1)).all()


def test_without_data_the_posterior_is_the_prior() -> None:
    prior = hebo_plus()
    posterior = prior.posterior((torch.empty(0, 1), torch.empty(0)), [0.2, 0.8])
    draws = prior.sample(40000, 2, 1, generator=generator(1)).y.flatten().sort().values
    at = draws[[8000, 24000, 40000, 56000, 72000]].unsqueeze(-1).expand(-1, 2)
    expected = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64).unsqueeze(-1)
    # 1600 draws of the hyperparameters: the mixture's cdf varies by at most 0.5 / sqrt(1600)
    assert (posterior.cdf(at) - expected).abs().max() < 4.9 * 0.5 / math.sqrt(1600)


def test_the_posterior_follows_a_function() -> None:
    x = torch.linspace(0, 1, 12, dtype=torch.float64)
    y = torch.sin(6 * x)
    posterior = hebo_plus().posterior((x, y), x[:-1] + 1 / 22, latent=True)
    miss = posterior.mean - torch.sin(6 * (x[:-1] + 1 / 22))
    assert miss.abs().max() < 0.1 and posterior.stddev.max() < 0.2
    assert not hebo_plus().posterior_is_quick(1)


@pytest.mark.slow
def test_the_posterior_is_calibrated_on_prior_tasks() -> None:
    prior = hebo_plus()
    tasks = prior.sample(40, 9, 2, generator=generator(7))
    posterior = prior.posterior((tasks.x[:, :8], tasks.y[:, :8]), tasks.x[:, 8:])
    pit = posterior.cdf(tasks.y[:, 8:]).flatten()
    assert stats.kstest(pit.numpy(), "uniform").pvalue > 1e-6


def test_it_survives_the_round_trip_through_json() -> None:
    rebuilt = from_config(json.loads(json.dumps(to_config(hebo_plus()))))
    draws = [p.sample(5, 4, 2, generator=generator()).y for p in (hebo_plus(), rebuilt)]
    assert torch.equal(*draws)
