"""Searches: the posterior is the prior's own, points crowd where y is good, columns are encoded."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import LogNormal

from priors import BNN, GaussianProcess, LearningCurves, Searched, Warped, optimization
from priors.bends import Bend
from priors.searched import _Search
from priors.spaces import Columns, draw_spaces

FIXED = GaussianProcess(kernel="matern52", lengthscale=0.3, outputscale=1.5, noise=0.02, mean=0.7)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_queries_have_the_posterior_of_what_they_see() -> None:
    visible = torch.tensor([0, 3, 11, 24, 24])
    for share in (0.0, 1.0):
        prior = Searched(FIXED, share)
        tasks = prior.sample_conditional(6, 24, 2, visible, generator=generator())
        for j, p in enumerate(visible.tolist()):
            for i in range(6):
                query = tasks.x_query[i, j : j + 1]
                exact = FIXED.posterior((tasks.x[i, :p], tasks.y[i, :p]), query, latent=True)
                assert float(tasks.mean[i, j]) == pytest.approx(float(exact.mean), abs=1e-6)
                assert float(tasks.variance[i, j]) == pytest.approx(float(exact.variance), abs=1e-6)


def test_a_search_leaves_the_law_of_new_observations_alone() -> None:
    # z = L^-1 (y - mean) is white noise, wherever earlier y led the search; DKW at 1e-6
    tasks = Searched(FIXED, share=1.0).sample_conditional(
        400, 20, 2, torch.tensor([20]), generator=generator()
    )
    theta = FIXED.draw_hyperparameters(400, 2, generator=generator())
    _, z = FIXED.whiten(tasks.x, tasks.y, theta, 0.0)
    ordered = torch.special.ndtr(z).flatten().sort().values
    rank = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = float(torch.maximum(rank[1:] - ordered, ordered - rank[:-1]).max())
    assert distance < math.sqrt(math.log(2e6) / 2 / len(ordered))


def spread(x: Tensor) -> Tensor:
    """The mean distance (task,) between the points of each task."""
    return torch.cdist(x, x).mean((1, 2))


def test_searches_crowd() -> None:
    prior = Warped(FIXED, irrelevant=0.2)
    none = torch.tensor([0])
    at_random = Searched(prior, 0.0).sample_conditional(300, 60, 3, none, generator=generator())
    searched = Searched(prior, 1.0).sample_conditional(300, 60, 3, none, generator=generator())
    difference = spread(at_random.x) - spread(searched.x)
    assert float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(300)

    # and better: the later y are further from the first ones than those of random points
    def extreme(tasks: Tensor) -> Tensor:
        return (tasks[:, 30:].mean(1) - tasks[:, :10].mean(1)).abs()

    gain = extreme(searched.y) - extreme(at_random.y)
    assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(300)


def test_columns_are_levels_or_one_hot() -> None:
    levels = torch.tensor([[0.0, 3.0, 0.0, 0.0, 0.0, 2.0]])
    space = Columns(levels.double(), torch.tensor([[0, 1, 2, 2, 2, 3]]))
    x = space.draw(500, generator=generator())
    for _ in range(3):
        assert set(x[0, :, 1].tolist()) == {0.0, 0.5, 1.0} and set(x[0, :, 5].tolist()) == {
            0.0,
            1.0,
        }
        assert torch.equal(x[0, :, 2:5].sum(-1), torch.ones(500).double())
        assert len(x[0, :, 0].unique()) > 100 and (x >= 0).all() and (x <= 1).all()
        scale, change = (torch.tensor(v).double() for v in (0.1, 0.5))
        x = space.near(x, scale, change, generator=generator(1))
    one = space.near(x, scale, torch.tensor(0.0).double(), generator=generator(2))
    moved = (one != x).double()
    moved = torch.cat([moved[..., :2], moved[..., 2:5].amax(-1, keepdim=True), moved[..., 5:]], -1)
    assert (moved.sum(-1) <= 1).all() and float(moved.sum(-1).mean()) > 0.5  # levels may come back


def test_spaces_are_of_all_kinds() -> None:
    space = draw_spaces(2000, 6, generator=generator())
    assert 0.5 < float((space.levels == 0).all(1).double().mean()) < 0.8
    grouped = (space.group[:, 1:] == space.group[:, :-1]).any(1)
    assert 0.1 < float(grouped.double().mean()) < 0.3
    assert float(space.levels.max()) == 10 and set(space.levels.unique().tolist()) >= {0.0, 2.0}


def test_a_network_can_be_searched_too() -> None:
    tasks = Searched(BNN(8, 1, noise=LogNormal(-4.0, 1.0)), 1.0).sample_conditional(
        5, 12, 2, torch.tensor([12, 3]), generator=generator()
    )
    assert tasks.y.shape == (5, 12) and tasks.mean.shape == (5, 2)
    assert tasks.latents["noise"].shape == (5,) and bool((tasks.variance > 0).all())


def test_the_posterior_is_the_bases() -> None:
    x, y, query = torch.rand(5, 1).double(), torch.randn(5).double(), torch.rand(3, 1).double()
    ours, base = Searched(FIXED).posterior((x, y), query), FIXED.posterior((x, y), query)
    assert torch.equal(ours.mean, base.mean)
    assert torch.equal(Searched(FIXED).log_evidence((x, y)), FIXED.log_evidence((x, y)))


def test_a_trend_moves_observations_and_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def trend(x: Tensor) -> Tensor:
        return -3 * (x - 0.3).square().sum(-1)

    monkeypatch.setattr(Searched, "_trend", lambda *_: trend)
    prior = Searched(FIXED, share=1.0, bowl=LogNormal(0.0, 1.0))
    tasks = prior.sample_conditional(6, 24, 2, torch.tensor([9, 24]), generator=generator())
    for j, p in enumerate((9, 24)):
        for i in range(6):
            query = tasks.x_query[i, j : j + 1]
            residuals = tasks.y[i, :p] - trend(tasks.x[i, :p])
            exact = FIXED.posterior((tasks.x[i, :p], residuals), query, latent=True)
            expected = float(exact.mean + trend(query))
            assert float(tasks.mean[i, j]) == pytest.approx(expected, abs=1e-6)
            assert float(tasks.variance[i, j]) == pytest.approx(float(exact.variance), abs=1e-6)
    drawn = prior.sample(4000, 2, 2, generator=generator())
    left = drawn.f - trend(drawn.x) - 0.7  # FIXED's mean
    assert float(left.mean()) == pytest.approx(0, abs=4 * math.sqrt(1.5 / 4000))
    assert float(left.var()) == pytest.approx(1.5, rel=4 * math.sqrt(2 / 4000))


@pytest.mark.parametrize("d", [1, 5, 20])
def test_bowls_are_concave_with_a_top_near_the_space_and_of_the_size_asked(d: int) -> None:
    prior = Searched(FIXED, bowl=LogNormal(math.log(2.0), 1e-6))
    trend = prior._trend(500, d, generator())
    x = torch.rand(500, 300, d, generator=generator(1), dtype=torch.float64)
    assert float(trend(x).std(1).mean()) == pytest.approx(2.0, rel=0.1)
    one, other = x[:, :150], x[:, 150:]
    assert bool((2 * trend((one + other) / 2) > trend(one) + trend(other)).all())
    assert bool((trend(x) < 0).all())
    along = torch.linspace(-1, 2, 301).double().view(1, -1, 1).expand(500, -1, d)
    top = along[0, trend(along).argmax(1), 0]  # on the diagonal, an average of centres
    assert -0.21 < float(top.min()) and float(top.max()) < 1.21


def test_searches_of_bowls_are_for_the_highest() -> None:
    prior = Searched(FIXED, share=1.0, bowl=LogNormal(0.0, 0.5))
    tasks = prior.sample_conditional(400, 60, 3, torch.tensor([0]), generator=generator())
    first, last = tasks.y[:, :10].mean(1), tasks.y[:, -10:].mean(1)
    assert float((last - first).mean()) > 5 * float((last - first).std()) / math.sqrt(400)
    assert not hasattr(prior, "posterior")  # which would not know of the trend


def test_bends_come_after_noise_and_leave_the_conditional_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = torch.ones(6, dtype=torch.float64)
    curved = Bend(0.7 * one, 2 * one, 0.4 * one, one, one, one)  # y = 0.7 + 5 (1 - exp(-0.4 t))
    monkeypatch.setattr(Searched, "_bend", lambda *_: (curved, {}))
    prior = Searched(FIXED, share=1.0, bent=1.0)
    tasks = prior.sample_conditional(6, 24, 2, torch.tensor([9, 24]), generator=generator())
    latent = 0.7 - 5 * torch.log1p(-(tasks.y - 0.7) / 5)
    for j, p in enumerate((9, 24)):
        for i in range(6):
            query = tasks.x_query[i, j : j + 1]
            exact = FIXED.posterior((tasks.x[i, :p], latent[i, :p]), query, latent=True)
            assert float(tasks.mean[i, j]) == pytest.approx(float(exact.mean), abs=1e-5)
            assert float(tasks.variance[i, j]) == pytest.approx(float(exact.variance), abs=1e-5)
    assert tasks.bend is curved and not hasattr(prior, "posterior")
    drawn = prior.sample(6, 2000, 2, generator=generator())
    y, f = (0.7 - 5 * torch.log1p(-(value - 0.7) / 5) for value in (drawn.y, drawn.f))
    assert float((y - f).var()) == pytest.approx(0.02, rel=4 * math.sqrt(2 / 12000))


def test_bends_know_where_functions_lie_and_how_much_they_vary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("priors.searched.MOMENTS", 20_000)
    prior = Searched(FIXED, bowl=LogNormal(math.log(2.0), 1e-6), bent=1.0)
    process = FIXED.draw_process(20, 3, generator=generator())
    space = draw_spaces(20, 3, generator=generator())
    trend = prior._trend(20, 3, generator())
    bend, latents = prior._bend(process, space, trend, generator(1))
    line = 0.7 + trend(space.draw(20_000, generator=generator(2)))
    spread = (1.5 + line.var(1)).sqrt()
    assert bool(((bend.center - line.mean(1)).abs() < 5 * spread * math.sqrt(2 / 20_000)).all())
    torch.testing.assert_close(bend.scale, spread, rtol=0.05, atol=0)
    assert latents == process.latents  # FIXED's noise is none of them


def test_noise_is_what_a_bend_leaves_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def halve(center: Tensor, *_: object, **__: object) -> Bend:
        line, far = Bend.identity(center), torch.full_like(center, 1e3)
        return line._replace(floor=far, leak=0.5 * torch.ones_like(far))  # a line of slope 1/2

    monkeypatch.setattr(Bend, "draw", halve)
    base = GaussianProcess(noise=LogNormal(-2.0, 1.0))
    drawn = Searched(base, bent=1.0).sample(2000, 50, 2, generator=generator())
    ratio = (drawn.y - drawn.f).square().mean(1) / drawn.latents["noise"]
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(2 / 50 / 2000))


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="Gaussian process given its latents"):
        Searched(LearningCurves())
    with pytest.raises(ValueError, match="a share in"):
        Searched(FIXED, 1.5)
    with pytest.raises(ValueError, match="share bent in"):
        Searched(FIXED, bent=-0.1)


def test_objectives_have_noise_and_a_kind() -> None:
    tasks = optimization().sample(32, 10, 4, generator=generator())
    assert set(tasks.latents) == {"noise", "component"}
    assert tasks.y.isfinite().all() and tasks.x.shape == (32, 10, 4)


def test_what_a_query_does_not_see_moves_nothing() -> None:
    process = FIXED.draw_process(5, 2, generator=generator())
    space = draw_spaces(5, 2, generator=generator())
    x, y = space.draw(20, generator=generator(1)), torch.randn(5, 20, dtype=torch.float64)
    visible = torch.tensor([5, 5, 0, 20])
    flat, level = Searched(FIXED)._trend(5, 2, generator()), Bend.identity(process.noise)
    first, other = (
        _Search(space, process, flat, level, False, 5, generator(2)).queries(x, values, visible)
        for values in (y, torch.cat([y[:, :5], 7 * y[:, 5:]], 1))
    )
    assert torch.equal(first[:, :3], other[:, :3])
