"""Sequential Monte Carlo against closed forms, with walls, two modes, and planted bugs."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from priors import smc
from priors.smc import Cloud, SmcPosterior, Target, move, propose, sample_smc

# P(|t| > 15) is 1e-6 for Student's t with 7 degrees of freedom, the number of islands less one. The
# bias of order 1 / particles is far below the errors.
SIGMAS = 15.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_draws(particles: int, dim: int, *, seed: int) -> Tensor:
    return torch.randn(particles, dim, dtype=torch.float64, generator=generator(seed))


def log_standard_normal(t: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(t).sum(-1)


@pytest.mark.parametrize("noise", [0.03, 1.0])
@pytest.mark.parametrize("dim", [1, 4])
def test_evidence_and_moments_of_a_conjugate_normal(dim: int, noise: float) -> None:
    generate = generator(dim)
    design = torch.randn(dim, dim, dtype=torch.float64, generator=generate)
    y = torch.randn(dim, dtype=torch.float64, generator=generate)
    variance = noise**2 * torch.eye(dim, dtype=torch.float64)
    draws = sample_smc(
        normal_draws(4000, dim, seed=1),
        log_standard_normal,
        lambda t: MultivariateNormal(t @ design.T, variance).log_prob(y),
        generator=generate,
    )
    exact = MultivariateNormal(torch.zeros_like(y), design @ design.T + variance).log_prob(y)
    assert float(draws.log_evidence_error) < 0.2
    assert float((draws.log_evidence - exact).abs()) < SIGMAS * float(draws.log_evidence_error)
    precision = torch.eye(dim, dtype=torch.float64) + design.T @ design / noise**2
    mean = torch.linalg.solve(precision, design.T @ y / noise**2)
    spread = precision.inverse().diagonal().sqrt()
    weights = draws.log_weights.exp()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    z = (draws.t - mean) / spread
    by_island = 8 * weights.unsqueeze(-1) * torch.stack([z, z.square() - 1], -1).flatten(1)
    means = by_island.unflatten(0, (8, -1)).sum(1)  # (island, 2 dim), all zero in expectation
    error = means.std(0) / math.sqrt(8)
    assert float(error.max()) < 0.1
    assert float((means.mean(0).abs() / error).max()) < SIGMAS


def test_a_wall_in_the_prior_truncates_it() -> None:
    # a normal truncated to t > 1, seen once: the evidence is that of the normalised prior
    start = normal_draws(20000, 1, seed=2)
    start = start[start[:, 0] > 1][:2400]

    def log_prior(t: Tensor) -> Tensor:
        return torch.where(t[:, 0] > 1, log_standard_normal(t), -math.inf)

    def log_likelihood(t: Tensor) -> Tensor:
        return Normal(t[:, 0], 0.5).log_prob(torch.tensor(0.8))

    draws = sample_smc(start, log_prior, log_likelihood, generator=generator())
    grid = torch.linspace(1, 9, 20001, dtype=torch.float64).unsqueeze(-1)
    density = (log_standard_normal(grid) + log_likelihood(grid)).exp()
    inside = Normal(0.0, 1.0).cdf(torch.tensor(-1.0, dtype=torch.float64))
    evidence = torch.trapezoid(density, grid[:, 0])
    mean = torch.trapezoid(density * grid[:, 0], grid[:, 0]) / evidence
    assert bool((draws.t > 1).all())
    error = float(draws.log_evidence_error)
    assert error < 0.05
    assert abs(float(draws.log_evidence - (evidence / inside).log())) < SIGMAS * error
    means = draws.t.reshape(8, -1).mean(1)
    assert abs(float(means.mean() - mean)) < SIGMAS * float(means.std()) / math.sqrt(8)

    again = sample_smc(
        start,
        log_standard_normal,
        log_likelihood,
        generator=generator(),
        allowed=lambda t: t[:, 0] > 1,
    )
    assert torch.equal(again.t, draws.t)  # the wall asked late is the same wall


def test_two_modes_keep_their_shares() -> None:
    centers = torch.tensor([[-1.5, 0.3], [1.7, -1.2]], dtype=torch.float64)
    weight = torch.tensor([0.8, 0.2], dtype=torch.float64).log()

    def two(t: Tensor) -> Tensor:
        return (weight + Normal(centers, 0.1).log_prob(t.unsqueeze(-2)).sum(-1)).logsumexp(-1)

    draws = sample_smc(
        normal_draws(8000, 2, seed=3), log_standard_normal, two, generator=generator(3)
    )
    narrow = MultivariateNormal(torch.zeros(2).double(), 1.01 * torch.eye(2).double())
    shares = weight + narrow.log_prob(centers)
    exact = shares.logsumexp(0)
    assert abs(float(draws.log_evidence - exact)) < SIGMAS * float(draws.log_evidence_error)
    right = (draws.log_weights.exp() * (draws.t[:, 0] > 0)).unflatten(0, (8, -1)).sum(1) * 8
    expected = float(shares.softmax(0)[1])
    error = float(right.std()) / math.sqrt(8)
    assert error < 0.05
    assert abs(float(right.mean()) - expected) < SIGMAS * error


# one step of the kernel, from exact draws: F.4b of any sampler's ladder of tests

DIM, CHAINS, DIRECTIONS = 5, 50_000, 100
# DKW: all the cdfs of 100 projections within this but for one seed in a million
INVARIANT = math.sqrt(math.log(2 * DIRECTIONS / 1e-6) / (2 * CHAINS))


def distance_after_one_step(seed: int) -> float:
    """The worst distance of a projection's cdf from normal, after one step from exact draws.

    The target is a product: N(0, I) times a likelihood exp(-t'At / 2) tempered at 0.5, correlated.
    """
    generate = generator(seed)
    half = torch.randn(DIM, DIM, dtype=torch.float64, generator=generate)
    matrix = half @ half.T
    covariance = torch.linalg.inv(torch.eye(DIM, dtype=torch.float64) + 0.5 * matrix)
    factor = torch.linalg.cholesky(covariance)
    crowd, exact = (
        torch.randn(count, DIM, dtype=torch.float64, generator=generate) @ factor.T
        for count in (1000, CHAINS)
    )
    target = Target(log_standard_normal, lambda t: -0.5 * ((t @ matrix) * t).sum(-1))
    proposal = propose(exact, crowd, factor, 1.0, generator=generate)
    moved, accepted = move(target.at(exact), target, 0.5, proposal, generator=generate)
    whitened = torch.linalg.solve_triangular(factor, (moved.t - exact).T, upper=False)
    assert float(whitened.square().mean().sqrt()) > 0.3  # else the test is vacuous
    assert float(accepted.double().mean()) > 0.1
    directions = torch.randn(DIM, DIRECTIONS, dtype=torch.float64, generator=generate)
    scale = (directions * (covariance @ directions)).sum(0).sqrt()
    pit = torch.special.ndtr(moved.t @ directions / scale).sort(0).values
    rank = torch.arange(CHAINS + 1, dtype=torch.float64).unsqueeze(-1) / CHAINS
    return float(torch.maximum(rank[1:] - pit, pit - rank[:-1]).max())


def test_one_step_leaves_the_target_invariant() -> None:
    assert distance_after_one_step(0) < INVARIANT


def wrong_sign(log_ratio: Tensor, *, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(log_ratio.shape, dtype=log_ratio.dtype, generator=generator)
    return uniform.log() < -log_ratio


def always(log_ratio: Tensor, *, generator: torch.Generator) -> Tensor:
    return torch.rand(log_ratio.shape, generator=generator) < 0.5


@pytest.mark.parametrize("bug", [wrong_sign, always])
def test_the_invariance_test_catches_planted_bugs(bug, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smc, "_accept", bug)
    assert distance_after_one_step(0) > 2 * INVARIANT


def test_a_biased_proposal_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = propose

    def biased(t: Tensor, *args, **options) -> Tensor:
        return 0.7 * shifted(t, *args, **options)

    monkeypatch.setitem(globals(), "propose", biased)
    assert distance_after_one_step(0) > 2 * INVARIANT


# what the rest relies on


def test_the_stated_error_is_the_spread_between_runs() -> None:
    # 40 runs: the ratio of standard deviations lies in (0.5, 2) but for p = 1e-6 (F with 39, 280)
    y = torch.tensor([1.5, -0.5], dtype=torch.float64)
    runs = [
        sample_smc(
            normal_draws(400, 2, seed=seed),
            log_standard_normal,
            lambda t: Normal(t, 0.2).log_prob(y).sum(-1),
            generator=generator(seed),
        )
        for seed in range(40)
    ]
    evidence = torch.stack([run.log_evidence for run in runs])
    errors = torch.stack([run.log_evidence_error for run in runs])
    assert 0.5 < float(evidence.std() / errors.square().mean().sqrt()) < 2
    at = torch.tensor([1.3], dtype=torch.float64)
    answers = [
        SmcPosterior(run.log_weights, Normal(run.t[:, 0].unsqueeze(0), 0.3), 8) for run in runs
    ]
    values = torch.cat([answer.log_prob(at) for answer in answers])
    stated = torch.cat([answer.log_prob_error(at) for answer in answers])
    assert 0.5 < float(values.std() / stated.square().mean().sqrt()) < 2


def test_same_seed_same_draws() -> None:
    def run() -> Tensor:
        return sample_smc(
            normal_draws(80, 2, seed=0),
            log_standard_normal,
            lambda t: Normal(t, 0.2).log_prob(torch.tensor(0.5)).sum(-1),
            generator=generator(1),
        ).t

    assert torch.equal(run(), run())


def test_nan_and_impossible_particles_are_dropped() -> None:
    start = normal_draws(4000, 1, seed=5)

    def log_likelihood(t: Tensor) -> Tensor:
        return torch.where(t[:, 0] > 0, torch.zeros_like(t[:, 0]), math.nan)

    draws = sample_smc(start, log_standard_normal, log_likelihood, generator=generator())
    assert bool((draws.t > 0).all())
    # a binomial of 4000 at 1/2, in the log: standard error 1 / sqrt(4000)
    assert abs(float(draws.log_evidence) + math.log(2)) < 5 / math.sqrt(4000)


def test_data_that_the_prior_forbids_are_refused() -> None:
    with pytest.raises(ValueError, match="positive likelihood"):
        sample_smc(
            normal_draws(80, 1, seed=0),
            log_standard_normal,
            lambda t: torch.full((len(t),), -math.inf, dtype=torch.float64),
            generator=generator(),
        )
    with pytest.raises(ValueError, match="multiple of 8 islands"):
        sample_smc(torch.zeros(7, 1), log_standard_normal, torch.numel, generator=generator())


def test_a_cloud_is_what_the_target_says() -> None:
    target = Target(log_standard_normal, lambda t: t[:, 0] / 0)
    cloud = target.at(torch.tensor([[-1.0], [0.0]]))
    assert isinstance(cloud, Cloud) and cloud.log_likelihood.tolist() == [-math.inf, -math.inf]
