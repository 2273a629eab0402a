"""Refined answers against quadrature, whatever the network; units, known latents and errors.

Weighted draws err: log densities are compared within five of their standard errors, by the delta
method from the draws themselves, and evidences within four of those that are stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, LogNormal, MixtureSameFamily, Normal

import pfn
import pfn.importance
from pfn.importance import Part, log_weights_of, thin, weigh
from pfn.model import PFN, Fitted
from pfn.predictive import Predictive
from pfn.refine import NODES, Refined, refine
from priors import GaussianProcess, Mixture
from priors.student_t import StudentT
from priors.tasks import LatentDensity, Tasks

SMOOTH = pfn.load("gp-1d")
MANY = pfn.load("gp")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def split(model: PFN, n: int, d: int = 1, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """A context of n points that the model's prior draws, and 20 points to ask about."""
    assert model.prior is not None
    tasks = model.prior.sample(1, n + 20, d, generator=generator(seed))
    x, y = tasks.x[0], tasks.y[0]
    return (x[:n], y[:n]), x[n:], y[n:]


def log_prob_error(predictive: Distribution, y: Tensor) -> Tensor:
    """The standard error of the log density of a mixture over independent, weighted draws."""
    assert isinstance(predictive, Predictive)
    each = Normal(predictive.means, predictive.stds).log_prob(y.unsqueeze(-1))
    ratio = (each - predictive.log_prob(y).unsqueeze(-1)).exp()
    weights = predictive.log_weights.softmax(-1)
    return (weights * (ratio - 1)).square().sum(-1).sqrt()


def assert_exact(refined: Refined, exact: Distribution, x_query: Tensor, y: Tensor) -> None:
    answer = refined.predict(x_query)
    difference = answer.log_prob(y) - exact.log_prob(y)
    assert bool((difference.abs() < 5 * log_prob_error(answer, y) + 1e-4).all())
    assert float(difference.abs().mean()) < 0.05


def assert_evidence(refined: Refined, exact: Tensor) -> None:
    assert 0 < refined.log_evidence_error < 0.1
    error = 4 * refined.log_evidence_error + 1e-5
    assert refined.log_evidence == pytest.approx(float(exact), abs=error)


@pytest.mark.parametrize(("n", "seed"), [(3, 0), (12, 1), (40, 2), (120, 3)])
def test_refined_answers_are_those_of_quadrature(n: int, seed: int) -> None:
    context, x_query, y = split(SMOOTH, n, seed=seed)
    fitted = SMOOTH.condition(context, standardize=False)

    refined = refine(fitted, draws=2000)

    assert refined.method == "importance" and refined.pareto_k < 0.7
    assert 2000 <= refined.effective_draws <= refined.evaluations
    prior = SMOOTH.prior
    assert isinstance(prior, GaussianProcess)
    assert_exact(refined, prior.posterior(context, x_query), x_query, y)
    assert_evidence(refined, prior.log_evidence(context))
    for name, exact in prior.latent_posterior(context).items():
        marginal = refined.latents()[name]
        error = math.sqrt(float(exact.variance) / refined.effective_draws)
        assert float(marginal.mean) == pytest.approx(float(exact.mean), abs=5 * error)
        assert float(marginal.cdf(exact.quantile(0.5))) == pytest.approx(0.5, abs=0.06)


def test_the_function_without_noise_is_exact_too() -> None:
    context, x_query, _ = split(SMOOTH, 15, seed=4)
    refined = refine(SMOOTH.condition(context, standardize=False), draws=4000)
    assert isinstance(SMOOTH.prior, GaussianProcess)
    exact = SMOOTH.prior.posterior(context, x_query, latent=True)
    answer = refined.predict(x_query, latent=True)
    spread = (answer.means - answer.mean.unsqueeze(-1)).square()  # type: ignore[attr-defined]
    error = (spread.mean(-1) / refined.effective_draws).sqrt()
    assert bool(((answer.mean - exact.mean).abs() < 5 * error + 1e-6).all())
    torch.testing.assert_close(answer.stddev, exact.stddev, rtol=0.1, atol=0)


def test_refining_closes_the_gap_of_the_network() -> None:
    """To less than a thousandth of a nat per query, which is sampling error."""
    gaps = torch.zeros(2)
    prior = SMOOTH.prior
    assert isinstance(prior, GaussianProcess)
    for seed in range(8):
        context, x_query, _ = split(SMOOTH, 10, seed=seed)
        x_query = x_query[:4]
        exact = prior.posterior(context, x_query)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            y = exact.sample(torch.Size([48]))
        fitted = SMOOTH.condition(context, standardize=False)
        for i, answer in enumerate((fitted.predict(x_query), refine(fitted).predict(x_query))):
            log_ratio = answer.log_prob(y) - exact.log_prob(y)
            gaps[i] += (log_ratio.exp() - 1 - log_ratio).mean() / 8  # unbiased, never negative
    assert float(gaps[1]) < min(0.001, float(gaps[0]))


def test_alternative_kernels_are_weighed() -> None:
    context, x_query, y = split(MANY, 25, seed=2)
    refined = refine(MANY.condition(context, standardize=False), draws=2000)
    prior = MANY.prior
    assert isinstance(prior, GaussianProcess)
    assert_exact(refined, prior.posterior(context, x_query), x_query, y)
    assert_evidence(refined, prior.log_evidence(context))
    found, exact = refined.latents()["kernel"], prior.latent_posterior(context)["kernel"]
    for kernel in range(3):
        share, expected = (
            float(marginal.weights[marginal.values == kernel].sum()) for marginal in (found, exact)
        )
        assert share == pytest.approx(expected, abs=5 * 0.5 / math.sqrt(refined.effective_draws))


def test_where_weights_cannot_be_trusted_a_sampler_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pfn.importance, "is_trusted", lambda smoothed: False)
    monkeypatch.setattr(pfn.importance, "MOST", 2)
    context, x_query, y = split(SMOOTH, 12, seed=1)
    refined = refine(SMOOTH.condition(context, standardize=False))
    assert refined.method == "smc"
    assert 100 < refined.effective_draws < 1601 and refined.evaluations > 2 * 1600
    assert isinstance(SMOOTH.prior, GaussianProcess)
    answer, exact = refined.predict(x_query), SMOOTH.prior.posterior(context, x_query)
    share = math.sqrt(1600 / refined.effective_draws)  # particles depend on each other
    error = 5 * share * log_prob_error(answer, y) + 1e-4
    assert bool(((answer.log_prob(y) - exact.log_prob(y)).abs() < error).all())
    assert_evidence(refined, SMOOTH.prior.log_evidence(context))


@pytest.mark.parametrize("noise", [-9.0, 1.0])
def test_a_network_that_is_sure_of_something_wrong_does_no_harm(noise: float) -> None:
    """Whatever it takes: more rounds, or the sampler."""
    prior = SMOOTH.prior
    assert isinstance(prior, GaussianProcess)
    context, _, _ = split(SMOOTH, 12, seed=1)
    sure = LogNormal(torch.tensor([noise]).double(), torch.tensor([0.05]).double())
    wrong = MixtureSameFamily(Categorical(torch.ones(1).double()), sure)
    found = weigh(prior.latent_densities(context), {"noise": wrong}, 1000, generator=generator())
    assert found.evaluations > 2000  # a good network needs 2000
    total = float(log_weights_of(found.parts).logsumexp(0))
    error = 4 * found.log_evidence_error
    assert total == pytest.approx(float(prior.log_evidence(context)), abs=error)


def test_a_network_without_latents_proposes_the_prior(untrained: Path) -> None:
    model = pfn.load(untrained)
    context, x_query, y = split(model, 12, d=2, seed=1)
    refined = refine(model.condition(context, standardize=False))
    prior = model.prior
    assert isinstance(prior, GaussianProcess)
    assert_exact(refined, prior.posterior(context, x_query), x_query, y)
    assert_evidence(refined, prior.log_evidence(context))


def test_standardised_answers_follow_shifts_and_scalings() -> None:
    (x, y), x_query, _ = split(MANY, 20, d=2, seed=3)
    shift, scale = torch.tensor([5.0, -300.0]).double(), torch.tensor([1e-3, 40.0]).double()
    plain = refine(MANY.condition((x, y)))
    other = refine(MANY.condition((shift + scale * x, 7.0 + 1e4 * y)))
    before, after = plain.predict(x_query), other.predict(shift + scale * x_query)
    torch.testing.assert_close(7.0 + 1e4 * before.mean, after.mean, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(1e4 * before.stddev, after.stddev, rtol=1e-5, atol=0)
    change = plain.log_evidence - other.log_evidence
    assert change == pytest.approx(20 * math.log(1e4), abs=1e-4)
    means = [refined.latents()["lengthscale"].mean for refined in (plain, other)]
    torch.testing.assert_close(scale * means[0], means[1], rtol=1e-4, atol=0)
    noises = [float(refined.latents()["noise"].mean) for refined in (plain, other)]
    assert noises[1] == pytest.approx(1e8 * noises[0], rel=1e-4)


def test_standardised_answers_know_neither_location_nor_scale() -> None:
    """Against sums over a grid, with the priors of mean and scale of y flat and in closed form."""
    (x, y), x_query, y_query = split(SMOOTH, 6, seed=3)
    x, x_query = (part / float(x.max() - x.min()) for part in (x, x_query))  # x in its units
    fitted = SMOOTH.condition((x, y))

    refined = refine(fitted, draws=4000)

    prior = SMOOTH.prior
    assert isinstance(prior, GaussianProcess)
    grid = [
        torch.linspace(a, b, k).double() for a, b, k in ((-5, 3, 41), (-4, 7, 56), (-12, 4, 65))
    ]
    lengthscale, outputscale, noise = torch.cartesian_prod(*grid).T
    hyperpriors = (prior.lengthscale, prior.outputscale, prior.noise)
    length, signal, error = (law.base_dist for law in hyperpriors if isinstance(law, LogNormal))
    spread = torch.hypot(signal.scale, error.scale).double()
    log_prior = Normal(length.loc.double(), length.scale.double()).log_prob(lengthscale)
    ratio = Normal(error.loc.double() - signal.loc.double(), spread)
    log_prior = log_prior + ratio.log_prob(noise - outputscale) - math.log(2)  # of log scale
    z = (y - y.mean()) / y.std()
    unit = (-0.5 * ((x - x.T) / lengthscale.exp()[:, None, None]).square()).exp()
    covariance = outputscale.exp()[:, None, None] * unit
    covariance = covariance + noise.exp()[:, None, None] * torch.eye(6)
    precision = covariance.inverse()
    total, weighted = precision.sum((-2, -1)), precision @ z
    square = weighted @ z - weighted.sum(-1).square() / total
    log_likelihood = -0.5 * (5 * math.log(2 * math.pi) + covariance.logdet() + total.log() + square)
    log_weight = (log_prior + log_likelihood).nan_to_num(nan=-math.inf)
    cells = math.prod(float(axis[1] - axis[0]) for axis in grid)
    log_evidence = float(log_weight.logsumexp(0)) + math.log(cells)

    log_scale = 6 * math.log(float(y.std()))
    error_of_log = 4 * refined.log_evidence_error + 2e-3  # and that of the grid
    assert refined.log_evidence + log_scale == pytest.approx(log_evidence, abs=error_of_log)
    cross = (
        outputscale.exp()[:, None, None]
        * (-0.5 * ((x - x_query.T) / lengthscale.exp()[:, None, None]).square()).exp()
    )  # (node, n, m)
    center = (weighted.sum(-1) / total)[:, None]
    residual = (precision @ (z - center).unsqueeze(-1)).squeeze(-1)
    mean = center + (cross * residual.unsqueeze(-1)).sum(1)
    gain = precision @ cross
    variance = outputscale.exp()[:, None] - (cross * gain).sum(1)
    variance = variance + (1 - gain.sum(1)).square() / total[:, None] + noise.exp()[:, None]
    keep = log_weight > log_weight.max() - 15
    exact = Predictive(log_weight[keep], mean[keep].T, variance[keep].T.sqrt())
    exact = exact.affine(y.mean(), y.std())
    assert_exact(refined, exact, x_query, y_query)


@pytest.mark.parametrize("y", [[], [3.0], [2.0, 2.0, 2.0], [1.0, 4.0]])
def test_few_or_constant_targets_get_an_answer(y: list[float]) -> None:
    x = torch.linspace(0.1, 0.9, len(y)).reshape(-1, 1)
    refined = refine(SMOOTH.condition((x, torch.tensor(y))), draws=200)
    answer = refined.predict([[0.3], [5.0]])
    assert bool(answer.mean.isfinite().all() and (answer.stddev > 0).all())
    if y and min(y) == max(y):  # their scale is the prior's, their location is theirs
        assert float(answer.mean[0]) == pytest.approx(y[0], abs=0.5)


def test_without_observations_the_refined_answer_is_the_prior() -> None:
    context, x_query = (torch.zeros(0, 1), torch.zeros(0)), torch.tensor([[0.2], [0.7]])
    refined = refine(SMOOTH.condition(context), draws=2000)
    assert isinstance(SMOOTH.prior, GaussianProcess)
    exact = SMOOTH.prior.posterior(context, x_query)
    assert_exact(refined, exact, x_query.double(), torch.tensor([0.5, -1.0]).double())
    assert refined.log_evidence == pytest.approx(0, abs=4 * refined.log_evidence_error + 1e-9)


def test_known_latents_are_respected() -> None:
    context, x_query, y = split(MANY, 15, seed=5)
    prior = MANY.prior
    assert isinstance(prior, GaussianProcess)
    given = {"noise": 0.04, "kernel": "matern52"}
    refined = refine(MANY.condition(context, standardize=False, given=given), draws=2000)
    known = {"noise": 0.04, "kernel": 1}
    assert set(refined.latents()) == {"lengthscale", "outputscale"}
    assert_exact(refined, prior.posterior(context, x_query, given=known), x_query, y)
    assert_evidence(refined, prior.log_evidence(context, given=known))


def test_with_all_latents_known_nothing_is_drawn() -> None:
    context, x_query, y = split(SMOOTH, 9, seed=5)
    given = {"lengthscale": 0.3, "outputscale": 1.5, "noise": 0.04}
    refined = refine(SMOOTH.condition(context, standardize=False, given=given))
    prior = SMOOTH.prior
    assert isinstance(prior, GaussianProcess)
    assert (refined.method, refined.evaluations, refined.pareto_k) == ("exact", 1, -math.inf)
    exact = prior.posterior(context, x_query, given=given)
    # networks keep known latents as float32
    torch.testing.assert_close(
        refined.predict(x_query).log_prob(y), exact.log_prob(y), atol=1e-4, rtol=1e-4
    )
    assert refined.log_evidence == pytest.approx(
        float(prior.log_evidence(context, given=given)), abs=1e-3
    )


def test_added_observations_count() -> None:
    context, x_query, y = split(SMOOTH, 16, seed=6)
    x, targets = context
    begun = SMOOTH.condition((x[:10], targets[:10]), standardize=False)
    refined = refine(begun.extend(x[10:], targets[10:]), draws=2000)
    assert isinstance(SMOOTH.prior, GaussianProcess)
    assert_exact(refined, SMOOTH.prior.posterior(context, x_query), x_query, y)
    assert_evidence(refined, SMOOTH.prior.log_evidence(context))


def test_added_observations_are_where_they_are_however_far() -> None:
    x, y = torch.linspace(0, 1, 8).double(), torch.zeros(8).double()
    fitted = SMOOTH.condition((x, y), standardize=False).extend([20.0], [1.5])
    whole = SMOOTH.condition((torch.cat([x, x.new_tensor([20.0])]), [*y, 1.5]), standardize=False)
    query = torch.tensor([5.0, 20.0]).double()
    both = [each.refine(seed=0).predict(query).mean for each in (fitted, whole)]
    torch.testing.assert_close(*both, atol=0.1, rtol=0)
    assert float(both[0][1]) > 0.5


def test_latents_that_the_network_was_not_taught_have_units_too(untrained: Path) -> None:
    (x, y), _, _ = split(SMOOTH, 20)
    network = pfn.load(untrained)
    plain, scaled = (network.condition((x, s * y)).refine(seed=0).latents() for s in (1, 100))
    ratio = float(scaled["noise"].mean / plain["noise"].mean)
    assert ratio == pytest.approx(100**2, rel=0.3)


def test_answers_have_the_type_of_the_query_and_depend_on_no_other_query() -> None:
    context, x_query, _ = split(SMOOTH, 10)
    fitted = SMOOTH.condition(context)
    refined = refine(fitted)
    assert refined.predict(x_query.float()).mean.dtype == torch.float32
    assert refined.predict(x_query[:3, 0].tolist()).mean.shape == (3,)
    whole, part = refined.predict(x_query), refined.predict(x_query[4:6])
    torch.testing.assert_close(whole.mean[4:6], part.mean)
    assert isinstance(whole, Predictive) and whole.means.shape[-1] <= NODES + 20
    assert torch.equal(refine(fitted, seed=0).predict(x_query).mean, whole.mean)
    assert not torch.equal(refine(fitted, seed=1).predict(x_query).mean, whole.mean)
    asked = x_query.clone().requires_grad_()
    refined.predict(asked).mean.sum().backward()
    assert asked.grad is not None and bool(asked.grad.isfinite().all())


def test_far_away_the_refined_answer_is_the_prior_again() -> None:
    context, _, _ = split(SMOOTH, 10)
    refined = refine(SMOOTH.condition(context, standardize=False))
    latents = refined.latents()
    expected = float((latents["outputscale"].mean + latents["noise"].mean).sqrt())
    answer = refined.predict([[1e6]])  # thinned draws err by a few percent
    assert float(answer.stddev) == pytest.approx(expected, rel=0.15)
    assert float(answer.mean) == pytest.approx(0, abs=1e-9)


class Level:
    """Constant tasks whose posterior is a Student-t distribution or a normal, by `normal`."""

    def __init__(self, normal: bool = False) -> None:
        self.normal = normal

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        x = torch.zeros(batch, n, d, dtype=torch.float64)
        return Tasks(x, x[..., 0], x[..., 0], {})

    def posterior(self, context: Any, x_query: Tensor, latent: bool = False) -> Distribution:
        mean = context[1].mean().expand(len(x_query))
        scale = torch.ones_like(mean)
        return Normal(mean, scale) if self.normal else StudentT(5 * scale, mean, scale)


def test_a_prior_with_a_posterior_alone_answers_itself(untrained: Path) -> None:
    context = torch.linspace(0, 1, 5), torch.tensor([10.0, 30.0, 20.0, 40.0, 50.0])
    model = PFN(pfn.load(untrained).transformer, pfn.load(untrained).card, Level())
    refined = refine(model.condition(context))
    assert (refined.method, refined.pareto_k) == ("reference", math.inf)
    assert math.isnan(refined.log_evidence) and refined.latents() == {}
    scale, y = float(context[1].std()), torch.tensor([20.0, 60.0]).double()
    exact = StudentT(*torch.tensor([[5.0, 5.0], [30.0, 30.0], [scale, scale]]).double())
    answer = refined.predict([0.2, 0.8])
    torch.testing.assert_close(answer.log_prob(y), exact.log_prob(y), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(answer.stddev, exact.stddev, rtol=1e-4, atol=0)

    model.prior = Level(normal=True)
    answer = refine(model.condition(context)).predict([0.2, 0.8])
    assert isinstance(answer, Predictive)
    torch.testing.assert_close(answer.stddev, torch.full((2,), scale).double())


def test_thinned_draws_sum_to_the_same_and_keep_the_heavy_ones() -> None:
    prior = GaussianProcess(lengthscale=0.3, outputscale=1.0)
    densities: Sequence[LatentDensity] = prior.latent_densities(([0.1, 0.5], [0.3, -1.0]))
    t = torch.randn(3000, 1, dtype=torch.float64, generator=generator())
    parts = [
        Part(densities[0], t[:2000], 2 * t[:2000, 0]),
        Part(densities[0], t[2000:], t[2000:, 0]),
    ]
    exact = (
        log_weights_of(parts).exp()
        @ torch.stack([torch.ones(3000), t[:, 0], t[:, 0] ** 2], 1).double()
    )
    sums = []
    for seed in range(200):
        kept = thin(parts, 100, generator=generator(seed))
        weights, values = log_weights_of(kept).exp(), torch.cat([part.t[:, 0] for part in kept])
        assert 95 <= len(values) <= 105
        heavy = t[:2000, 0] > 3.0  # which weigh e^6
        assert bool(torch.isin(t[:2000, 0][heavy], values).all())
        sums.append(weights @ torch.stack([torch.ones_like(values), values, values**2], 1))
    found = torch.stack(sums)
    error = found.std(0) / math.sqrt(200)
    assert bool(((found.mean(0) - exact).abs() < 4 * error + 1e-9).all())


def test_what_cannot_be_refined_is_refused(untrained: Path) -> None:
    x, y = torch.rand(2, 5, 1), torch.rand(2, 5)
    with pytest.raises(ValueError, match="one context"):
        refine(SMOOTH.condition((x, y)))
    fitted = SMOOTH.condition((x[0], y[0]))
    with pytest.raises(ValueError, match=r"at least 100 draws, .*got 10"):
        refine(fitted, draws=10)
    with pytest.raises(ValueError, match="Expected query x"):
        refine(fitted).predict(torch.rand(3, 2))
    loaded = pfn.load(untrained)
    without = PFN(loaded.transformer, loaded.card, None)
    with pytest.raises(ValueError, match="knows its prior"):
        refine(without.condition((x[0], y[0])))

    class SampleOnly:
        sample = Level.sample

    nothing = PFN(loaded.transformer, loaded.card, SampleOnly())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SampleOnly, which has neither"):
        refine(nothing.condition((x[0], y[0])))
    fitted = MANY.condition((x[0], y[0]), given={"noise": 0.1})
    mixed = Fitted(
        PFN(MANY.transformer, MANY.card, Mixture([GaussianProcess()])),
        fitted._ready,
        fitted._encoded,
    )
    with pytest.raises(ValueError, match=r"no given latents with a Mixture.*noise"):
        refine(mixed)
