"""Further hyperparameters of a task, weighed by how well they explain its data."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, Normal, Uniform

from priors import NNGP, GaussianProcess, ParticlePrior, ParticleTasks, ScaleMixture, Warped

PLAIN = GaussianProcess(
    ard=True
)  # log-normal hyperparameters: standard normal in their coordinates
OTHERS = GaussianProcess(
    kernel=("rbf", "matern52"),
    lengthscale=Uniform(0.05, 1.0),
    outputscale=Gamma(2.0, 2.0),
    noise=0.05,
    mean=Normal(0.5, 1.0),
)


def draw(
    prior: Any, visible: list[int], *, batch: int = 40, n: int = 6, d: int = 2, **options: Any
) -> ParticleTasks:
    defaults: dict[str, Any] = {"particles": 5, "held": {}}
    generator = torch.Generator().manual_seed(0)
    where = torch.tensor(visible)
    tasks: ParticleTasks = prior.sample_particles(
        batch, n, d, where, generator=generator, **(defaults | options)
    )
    return tasks


@pytest.mark.parametrize("seen", [0, 4, 6])
def test_each_particle_is_a_gaussian_process_and_weighs_its_likelihood(seen: int) -> None:
    tasks = draw(PLAIN, [seen] * 3)
    log_likelihood = []
    for k in range(5):
        theta = {name: value[:, k] for name, value in tasks.latents.items()}
        theta["mean"] = torch.zeros(40, dtype=torch.float64)
        context = tasks.x[:, :seen], tasks.y[:, :seen]
        mean, variance = PLAIN.conditional(*context, tasks.x_query, theta)
        torch.testing.assert_close(tasks.mean[..., k], mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(tasks.variance[..., k], variance, rtol=1e-6, atol=1e-8)
        assert torch.equal(tasks.noise[:, k], theta["noise"])
        log_likelihood.append(PLAIN.log_likelihood(*context, theta))
    expected = torch.stack(log_likelihood, -1).log_softmax(-1).unsqueeze(1).expand(-1, 3, -1)
    torch.testing.assert_close(tasks.log_weights, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 5, 30])
@pytest.mark.parametrize(
    "prior",
    [PLAIN, OTHERS, ScaleMixture(NNGP(), Gamma(2.0, 2.0)), Warped(GaussianProcess())],
    ids=["plain", "others", "scale mixture", "warped"],
)
def test_which_particle_drew_the_task_is_told_by_its_weight(prior: Any, n: int) -> None:
    assert isinstance(prior, ParticlePrior)
    weights = (
        draw(prior, [n], batch=1000, n=n, particles=16).log_weights[:, 0].exp()
    )  # (task, particle)
    # Given the data and the particles, the first is the k-th with the chance of its weight.
    excess = weights[:, 0] - weights.square().sum(-1)
    error = float(excess.std()) / math.sqrt(len(excess))
    assert abs(float(excess.mean())) < 4 * error + 1e-9
    informed = float(weights.square().sum(-1).mean())
    assert informed < 0.75  # proposals are plausible: no particle takes it all


def test_particles_halve_the_distance_to_the_posterior() -> None:
    prior = GaussianProcess()
    tasks = draw(prior, [5] * 4, batch=60, n=5, d=1, particles=16)
    exact = [
        prior.posterior((x, y), x_query).mean
        for x, y, x_query in zip(tasks.x, tasks.y, tasks.x_query, strict=True)
    ]
    weighted = (tasks.log_weights.exp() * tasks.mean).sum(-1)
    ours, first = (
        (mean - torch.stack(exact)).square().mean() for mean in (weighted, tasks.mean[..., 0])
    )
    assert ours < 0.5 * first


def test_what_is_held_all_particles_share() -> None:
    held = {
        "noise": torch.arange(40) % 2 == 0,
        "lengthscale": torch.arange(80).reshape(40, 2) % 3 == 0,
    }
    tasks = draw(PLAIN, [6], held=held)
    for name, value in tasks.latents.items():
        same = (value == value[:, :1]).all(1)
        expected = held.get(name, torch.zeros(40, dtype=torch.bool))
        assert torch.equal(same, expected), name


def test_one_particle_is_the_conditional_of_the_latents() -> None:
    tasks = draw(OTHERS, [2, 6], particles=1)
    assert not tasks.log_weights.any()
    theta: dict[str, Tensor] = {name: value[:, 0] for name, value in tasks.latents.items()}
    theta["noise"] = torch.full((40,), 0.05, dtype=torch.float64)
    mean, _ = OTHERS.conditional(tasks.x, tasks.y, tasks.x_query[:, 1:], theta)
    torch.testing.assert_close(tasks.mean[:, 1:, 0], mean, rtol=1e-6, atol=1e-8)
    assert set(tasks.latents) == {"lengthscale", "outputscale", "mean", "kernel"}
