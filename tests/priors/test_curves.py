"""Learning curves: the published prior against its figures, its posterior against brute force."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from priors import (
    LearningCurves,
    ParametricCurves,
    Prior,
    ReferencePrior,
    from_config,
    parametric_curves,
    to_config,
)
from priors.curves import _autocorrelated, _Curve, _draw_latents, _latents

LCPFN = LearningCurves.lcpfn()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def z_bound(count: int, p: float) -> float:
    """Five standard errors of a share p in `count` draws: false failures 6e-7."""
    return 5 * math.sqrt(p * (1 - p) / count)


# the published prior


def test_acceptance_is_as_published() -> None:
    # the notes' 20.5 %, itself from 3,000 accepted draws: a standard error of 0.003
    candidates = 60_000
    z = torch.randn(candidates, LCPFN.dim, dtype=torch.float64, generator=generator())
    share = float(LCPFN.is_allowed(LCPFN.coordinates(z)).double().mean())
    assert abs(share - 0.205) < z_bound(candidates, 0.205) + 5 * 0.0033


@pytest.mark.parametrize(
    ("step", "quantiles"),
    [(1, (0.07, 0.23, 0.40, 0.58, 0.81)), (100, (0.22, 0.44, 0.62, 0.80, 0.95))],
)
def test_quantiles_are_as_published(step: int, quantiles: tuple[float, ...]) -> None:
    # of 3,000 draws, to two digits: the share below each has the error of both samples
    f = LCPFN.sample(20_000, 100, 1, generator=generator()).f[:, step - 1]
    for level, quantile in zip((0.05, 0.25, 0.5, 0.75, 0.95), quantiles, strict=True):
        density = 1.5  # no curve's density exceeds it: rounding by 0.005 moves a share by less
        bound = 0.005 * density + z_bound(3000, level) + z_bound(20_000, level)
        assert abs(float((f < quantile).double().mean()) - level) < bound


@pytest.mark.parametrize("prior", [LCPFN, LearningCurves.domhan(20)], ids=["lcpfn", "domhan"])
def test_curves_meet_the_walls_at_every_step(prior: ParametricCurves) -> None:
    tasks = prior.sample(40, prior.horizon, 1, generator=generator(1))
    assert bool(((tasks.f >= 0) & (tasks.f <= 1)).all())
    assert bool((tasks.f[:, -1] > tasks.f[:, 0]).all())
    expected = torch.arange(1, prior.horizon + 1).double() / prior.horizon
    torch.testing.assert_close(tasks.x[..., 0], expected.expand(40, -1))
    torch.testing.assert_close(tasks.f[:, -1], tasks.latents["final"])


def test_noise_has_the_published_law() -> None:
    tasks = LCPFN.sample(4000, 50, 1, generator=generator(2))
    z = (tasks.latents["noise"].log() / 2 + 4) / 1.0
    # acceptance does not depend on the noise: 5 standard errors of mean and standard deviation
    assert abs(float(z.mean())) < 5 / math.sqrt(4000)
    assert abs(float(z.std()) - 1) < 5 / math.sqrt(8000)
    whitened = (tasks.y - tasks.f) / tasks.latents["noise"].sqrt().unsqueeze(-1)
    assert abs(float(whitened.square().mean()) - 1) < 5 * math.sqrt(2 / 200_000)


def test_the_batched_sampler_draws_what_a_loop_draws() -> None:
    # the law of three functionals by two-sample Kolmogorov-Smirnov at p = 1e-6
    rng, x, loop = np.random.default_rng(0), np.arange(1, 31), []
    while len(loop) < 1500:
        w, alpha, k, delta = rng.uniform(0, 1, 3), *np.exp(rng.normal([0, -2, 0], [2, 1, 0.5]))
        a, b = rng.uniform(0, 1), rng.uniform(0, 2)
        f = (
            w[0] * (rng.uniform(0, 1.25) - rng.uniform(-0.6, 0.6) * x**-alpha)
            + w[1] * (rng.uniform(0, 1) - rng.uniform(-0.5, 0.5) / np.log(x + 1))
            + w[2] * (a - (a - b) * np.exp(-k * x**delta))
        )
        if f[-1] > f[0] and f.min() >= 0 and f.max() <= 1:
            loop.append(f)
    ours = LearningCurves.lcpfn(30).sample(6000, 30, 1, generator=generator(3)).f.numpy()
    bound = math.sqrt(math.log(2e6) / 2 * (1 / 1500 + 1 / 6000))
    for functional in (lambda f: f[:, -1], lambda f: f[:, 9] - f[:, 0], lambda f: np.ptp(f, 1)):
        one, two = np.sort(functional(np.stack(loop))), np.sort(functional(ours))
        at = np.concatenate([one, two])
        gap = np.searchsorted(one, at, "right") / 1500 - np.searchsorted(two, at, "right") / 6000
        assert np.abs(gap).max() < bound


@pytest.mark.parametrize("n", [1, 10, 60, 100, 250])
def test_rows_are_steps_in_order(n: int) -> None:
    tasks = LCPFN.sample(200, n, 1, generator=generator(4))
    steps = tasks.x[..., 0] * 100
    torch.testing.assert_close(steps, steps.round())
    steps = steps.round()
    assert bool((steps.diff(dim=1) >= 0).all()) and bool((steps >= 1).all())
    if n <= 100:
        assert bool((steps.diff(dim=1) >= 1).all())
    assert tasks.num_context == n - 1


def test_parametric_curves_have_one_feature() -> None:
    with pytest.raises(ValueError, match="d = 1"):
        LCPFN.sample(1, 10, 2, generator=generator())
    with pytest.raises(ValueError, match="families"):
        ParametricCurves(families=("pow5",))
    with pytest.raises(ValueError, match="horizon"):
        ParametricCurves(horizon=1)


# its posterior


def brute_force(y: Tensor, queries: Tensor, curves: int) -> tuple[Tensor, ...]:
    """Log evidence, predictive means, and the standard errors of both, by weighted prior draws."""
    t = LCPFN.draw(curves, generator=generator(99))
    steps = torch.arange(1.0, len(y) + 1, dtype=torch.float64)
    f, sigma = LCPFN.curve(steps, t), LCPFN.sigma(t).unsqueeze(-1)
    log_weight = Normal(f, sigma).log_prob(y).sum(-1)
    weight = (log_weight - log_weight.max()).exp()
    evidence = weight.mean().log() + log_weight.max()
    evidence_error = weight.std() / weight.mean() / math.sqrt(curves)
    share = weight / weight.sum()
    values = LCPFN.curve(queries * 100, t)
    mean = share @ values
    error = (share.unsqueeze(-1) * (values - mean)).square().sum(0).sqrt()
    return evidence, evidence_error, mean, error


@pytest.mark.parametrize("y", [[0.3], [0.55, 0.52, 0.6]])
def test_short_prefixes_agree_with_brute_force(y: list[float]) -> None:
    seen = torch.tensor(y, dtype=torch.float64)
    x = torch.arange(1, len(y) + 1).double() / 100
    queries = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    evidence, evidence_error, mean, error = brute_force(seen, queries, 100_000)
    draws = LCPFN.infer((x, seen), particles=800, seed=1)
    posterior = LCPFN.predict(draws, queries)
    # 1e-6: 19.3 standard errors of 8 islands (t of 7 degrees of freedom), 4 comparisons
    both = math.hypot(float(evidence_error), float(draws.log_evidence_error))
    assert both < 0.2
    assert abs(float(draws.log_evidence - evidence)) < 19.3 * both
    values = LCPFN.curve(queries * 100, draws.t)
    islands = (8 * draws.log_weights.exp().unsqueeze(-1) * (values - mean)).unflatten(0, (8, -1))
    own = islands.sum(1).std(0) / math.sqrt(8)
    assert bool(
        ((posterior.mean - mean).abs() < 19.3 * (own.square() + error.square()).sqrt()).all()
    )
    assert bool((own < 0.05).all())


def test_nothing_seen_is_the_prior() -> None:
    x, y = torch.zeros(0), torch.zeros(0)
    posterior = LCPFN.posterior((x, y), torch.tensor([0.01, 1.0]), particles=1600)
    f = LCPFN.sample(8000, 100, 1, generator=generator(5)).f[:, [0, -1]]
    error = f.std(0) * math.sqrt(1 / 8000 + 1 / 1600)
    assert bool(((posterior.mean - f.mean(0)).abs() < 5 * error).all())
    assert abs(float(LCPFN.log_evidence((x, y), particles=1600))) < 1e-12


def test_shapes_of_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parametric_curves, "SWEEPS", 3)
    quick = {"particles": 80}
    x, y = torch.tensor([0.3]), torch.tensor([0.4])
    query = torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)
    one = LCPFN.posterior((x, y), query, **quick)
    batch = (x.expand(2, 1).unsqueeze(-1), y.expand(2, 1))
    two = LCPFN.posterior(batch, query.expand(2, 3).unsqueeze(-1), **quick)
    joint = LCPFN.posterior((x, y), query, joint=True, **quick)
    latent = LCPFN.posterior((x, y), query, latent=True, **quick)
    assert one.batch_shape == (3,) and two.batch_shape == (2, 3)
    assert joint.batch_shape == () and joint.event_shape == (3,)
    assert one.log_prob_error(query * 0.5).shape == (3,)
    assert joint.log_prob_error(query * 0.5).shape == ()
    torch.testing.assert_close(joint.mean, one.mean)
    torch.testing.assert_close(latent.mean, one.mean)
    assert bool((latent.variance < one.variance).all())
    torch.testing.assert_close(two.mean[0], one.mean)  # the first task has the same seed
    for bad in (torch.tensor([0.0]), torch.tensor([1.2])):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            LCPFN.posterior((x, y), bad)


def test_posterior_curves_meet_the_walls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parametric_curves, "SWEEPS", 10)
    x = torch.arange(1, 4).double() / 100
    draws = LCPFN.infer((x, torch.tensor([0.8, 0.9, 0.98])), particles=80)
    assert bool(LCPFN.is_allowed(draws.t).all())


@pytest.mark.slow
def test_the_posterior_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    # PIT of the last step given six: 100 tasks, Kolmogorov-Smirnov (DKW) at p = 1e-6
    monkeypatch.setattr(parametric_curves, "SWEEPS", 30)
    prior = LearningCurves.lcpfn(20)
    tasks = prior.sample(100, 20, 1, generator=generator(6))
    pit = (
        torch.stack(
            [
                prior.posterior((x[:6], y[:6]), x[-1:], particles=800).cdf(y[-1:])[0]
                for x, y in zip(tasks.x, tasks.y, strict=True)
            ]
        )
        .sort()
        .values
    )
    rank = torch.arange(101).double() / 100
    distance = float(torch.maximum(rank[1:] - pit, pit - rank[:-1]).max())
    assert distance < math.sqrt(math.log(2e6) / 2 / 100)


# ours


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 10, 128, 1000])
def test_draws_are_finite_and_in_the_box(n: int, d: int) -> None:
    tasks = LearningCurves().sample(16, n, d, generator=generator(n))
    assert tasks.x.shape == (16, n, d) and tasks.y.shape == tasks.f.shape == (16, n)
    assert all(bool(v.isfinite().all()) for v in (tasks.x, tasks.y, tasks.f))
    assert bool((tasks.x[..., 0] > 0).all()) and bool(((tasks.x >= 0) & (tasks.x <= 1)).all())
    assert bool(((tasks.y > -0.01) & (tasks.y < 1.01)).all())
    assert bool(((tasks.f >= 0) & (tasks.f <= 1)).all())
    for value in tasks.latents.values():
        assert value.shape == (16,) and bool(value.isfinite().all())
    assert bool((tasks.latents["noise"] > 0).all())


def test_a_single_curve_is_in_order_of_time() -> None:
    x = LearningCurves().sample(200, 64, 1, generator=generator(7)).x[..., 0]
    assert bool((x.diff(dim=1) > 0).all())
    step = x[:, 0]  # regular from the start: most tasks begin with steps 1, 2, 3 of their run
    begins = ((x[:, 2] - 3 * step).abs() < 1e-9).double().mean()
    assert float(begins) > 0.8
    assert float(step.min()) < 0.002 and float(step.max()) > 0.05  # runs of 10 to 1000 steps


def test_rows_of_a_sweep_share_the_hyperparameters_of_their_curve() -> None:
    tasks = LearningCurves().sample(50, 96, 3, generator=generator(8))
    curves = {len(task[:, 1:].unique(dim=0)) for task in tasks.x}
    assert min(curves) == 1 and max(curves) > 8
    complete = []
    for task in tasks.x:
        same = (task[1:, 1:] == task[:-1, 1:]).all(-1)
        assert bool((task[1:, 0] > task[:-1, 0])[same].all())  # each in order of time
        complete += (task[:-1, 0][~same] > 1 - 1e-9).tolist()
        assert float(task[-1, 0]) > 1 - 1e-9  # the last goes to its end
    assert 0.3 < sum(complete) / len(complete) < 0.5  # two in five


def test_siblings_resemble_each_other_more_the_closer_they_are() -> None:
    h = torch.tensor([[0.5, 0.5], [0.52, 0.5], [0.95, 0.05]]).double().expand(4000, 3, 2)
    z = _draw_latents(h, generator=generator(9))
    # every latent is standard normal: 5 standard errors of 4000 draws of each of them
    assert float(z.mean(0).abs().max()) < 5 / math.sqrt(4000)
    near = float((z[:, 0] * z[:, 1]).mean())
    far = float((z[:, 0] * z[:, 2]).mean())
    assert near > far + 0.1 and far > 0.2 and near < 0.95


def test_autocorrelated_noise_has_its_correlation() -> None:
    time = torch.tensor([0.1, 0.2, 0.5, 0.3, 0.4]).double().expand(40_000, 5)
    curve = torch.tensor([0, 0, 0, 1, 1]).expand(40_000, 5)
    length = torch.full((40_000, 1), 0.2).double()
    noise = _autocorrelated(time, curve, length, generator=generator(10))
    covariance = noise.T @ noise / 40_000
    gap = (time[0].unsqueeze(0) - time[0].unsqueeze(1)).abs()
    expected = (-gap / 0.2).exp() * (curve[0].unsqueeze(0) == curve[0].unsqueeze(1))
    # the error of a covariance of unit normals is at most sqrt(2 / n)
    torch.testing.assert_close(covariance, expected, atol=5 * math.sqrt(2 / 40_000), rtol=0)


def test_what_the_published_prior_lacks_is_there() -> None:
    prior = LearningCurves(metrics=("accuracy",), resolution=1e-9)
    tasks = prior.sample(4000, 50, 1, generator=generator(11))
    flat = (tasks.f.amax(1) - tasks.f.amin(1)) < 0.01
    falling = tasks.f[:, -1] < tasks.f[:, 0] - 0.01
    ties = (tasks.y.diff(dim=1).abs() < 1e-6).double().mean(1) > 0.3
    for share in (flat, falling, ties):
        assert 0.01 < float(share.double().mean()) < 0.5
    losses = LearningCurves(metrics=("loss",)).sample(4000, 50, 1, generator=generator(12))
    assert 0.003 < float((losses.f[:, -1] == 0).double().mean()) < 0.1  # diverged


def test_half_of_the_accuracies_begin_without_noise() -> None:
    z = _latents(
        _draw_latents(torch.empty(8000, 1, 0, dtype=torch.float64), generator=generator(14)),
        torch.zeros(8000, 1, dtype=torch.long),
    )
    time = torch.tensor([[1e-6, 1.0]], dtype=torch.float64).expand(8000, -1)
    for is_loss, share in ((False, 0.5), (True, 0.0)):
        curve = _Curve(z, torch.full((8000, 1), is_loss))
        begun, learned = (1 - curve.remaining(time)).unbind(-1)
        silent = curve.spread(time)[:, 0] < 1e-3 * curve.spread(time)[:, 1]
        untouched = begun < 1e-6
        assert untouched.sum() > 300
        assert abs(silent[untouched].double().mean() - share) < z_bound(300, 0.5)
        assert (curve.awake(time)[:, 1][learned > 0.05] == 1).all()


def test_noise_is_the_variance_at_the_end() -> None:
    # where noise is white and no spike strikes, y - f at late rows has about the stated variance
    tasks = LearningCurves(metrics=("loss",)).sample(4000, 50, 1, generator=generator(13))
    late = tasks.x[:, -1, 0] > 0.9
    z = (tasks.y - tasks.f)[late, -1] / tasks.latents["noise"][late].sqrt()
    inside = float((z.abs() < 1).double().mean())
    assert 0.6 < inside < 0.75  # 0.683 if normal; schedules and spikes shift it a little


@pytest.mark.parametrize("prior", [LearningCurves(), LCPFN], ids=["ours", "lcpfn"])
def test_draws_are_functions_of_the_seed(prior: Prior) -> None:
    first, again, other = (prior.sample(8, 20, 1, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.y, again.y) and torch.equal(first.x, again.x)
    assert not torch.equal(first.y, other.y)


@pytest.mark.parametrize("prior", [LearningCurves(), LCPFN], ids=["ours", "lcpfn"])
def test_tasks_of_a_batch_are_independent(prior: Prior) -> None:
    # neighbours in a batch do not correlate, and batches of 1 have the law of batches of 2000
    many = prior.sample(2000, 10, 1, generator=generator(1)).latents["final"]
    centred = (many - many.mean()) / many.std()
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 5 / math.sqrt(2000)
    draws = generator(2)
    ones = torch.cat([prior.sample(1, 10, 1, generator=draws).latents["final"] for _ in range(100)])
    bound = 5 * float(many.std()) * math.sqrt(1 / 100 + 1 / 2000)
    assert abs(float(ones.mean() - many.mean())) < bound


def test_curves_survive_a_card() -> None:
    for prior in (LearningCurves(metrics=("loss",)), LCPFN, LearningCurves.domhan(50)):
        assert from_config(to_config(prior)) == prior


def test_only_the_published_priors_claim_a_posterior() -> None:
    assert isinstance(LCPFN, ReferencePrior)
    assert not isinstance(LearningCurves(), ReferencePrior)
    with pytest.raises(ValueError, match="metrics"):
        LearningCurves(metrics=("f1",))
    with pytest.raises(ValueError, match="resolution"):
        LearningCurves(resolution=0.0)
