"""Further hyperparameters of a task, weighed by how well they explain its data."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, LogNormal, Normal, Poisson, Uniform

from priors import NNGP, GaussianProcess, ParticlePrior, ParticleTasks, ScaleMixture, Warped

PLAIN = GaussianProcess(ard=True)  # log-normal: standard normal in their coordinates
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


def test_each_particle_is_a_gaussian_process_and_weighs_its_likelihood() -> None:
    visible = [0, 4, 6]
    tasks = draw(PLAIN, visible)
    for j, seen in enumerate(visible):
        log_likelihood = []
        for k in range(5):
            theta = {name: value[:, k] for name, value in tasks.latents.items()}
            theta["mean"] = torch.zeros(40, dtype=torch.float64)
            context = tasks.x[:, :seen], tasks.y[:, :seen]
            mean, variance = PLAIN.conditional(*context, tasks.x_query[:, j : j + 1], theta)
            near = {"rtol": 1e-6, "atol": 1e-8}
            torch.testing.assert_close(tasks.mean[:, j, k], mean[:, 0], **near)
            torch.testing.assert_close(tasks.variance[:, j, k], variance[:, 0], **near)
            assert torch.equal(tasks.noise[:, k], theta["noise"])
            log_likelihood.append(PLAIN.log_likelihood(*context, theta))
        expected = torch.stack(log_likelihood, -1).log_softmax(-1)
        torch.testing.assert_close(tasks.log_weights[:, j], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("visible", [0, 2, 20])
@pytest.mark.parametrize(
    "prior",
    [PLAIN, OTHERS, ScaleMixture(NNGP(), Gamma(2.0, 2.0)), Warped(GaussianProcess())],
    ids=["plain", "others", "scale mixture", "warped"],
)
def test_latents_that_drew_a_task_are_a_draw_from_its_weighted_particles(
    prior: Any, visible: int
) -> None:
    assert isinstance(prior, ParticlePrior)
    n, batch = max(visible, 1), 3000
    tasks = draw(prior, [visible], batch=batch, n=n, d=1, particles=8)
    weights = tasks.log_weights[:, 0].exp()  # (task, particle)
    for name, value in tasks.latents.items():
        value = value.reshape(batch, 8).double()
        value = value if name in ("mean", "kernel") else value.log()
        excess = value[:, 0] - (weights * value).sum(-1)
        error = float(excess.std()) / math.sqrt(batch)
        assert abs(float(excess.mean())) < 4 * error + 1e-9, name
    # proposals are plausible: on average no particle has more than three quarters
    assert float(weights.square().sum(-1).mean()) < 0.75


def test_proposals_that_overflow_count_for_nothing() -> None:
    prior = GaussianProcess(outputscale=LogNormal(0.0, 150.0), noise=0.1)
    tasks = draw(prior, [2], n=2, d=1)
    assert all(part.isfinite().all() for part in (tasks.mean, tasks.variance, tasks.noise))
    total = tasks.log_weights.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_hyperparameters_without_a_density_all_particles_share() -> None:
    tasks = draw(GaussianProcess(mean=Poisson(3.0)), [6])
    assert (tasks.latents["mean"] == tasks.latents["mean"][:, :1]).all()
    assert (tasks.latents["noise"] != tasks.latents["noise"][:, :1]).any()
    fixed = GaussianProcess(lengthscale=0.3, outputscale=1.0, noise=0.1)
    assert draw(fixed, [6]).log_weights.shape == (40, 1, 1)


def test_particles_halve_the_squared_distance_to_the_posterior() -> None:
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


def test_tasks_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(OTHERS, [2, 6])
    monkeypatch.setattr("priors.kernel_prior.CACHED", 500)
    pieces = draw(OTHERS, [2, 6])
    for name in ("x", "y", "x_query", "log_weights", "mean", "variance", "noise"):
        ours, theirs = getattr(pieces, name), getattr(whole, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
