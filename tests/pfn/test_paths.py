"""Joint draws: a walk is the network's own buffer, and draws have the posterior's covariance."""

import copy
import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

import pfn
from pfn.experts import RIDGE, cholesky, eye
from pfn.paths import BLOCK, LARGEST, MOST, _blocks, _legs
from pfn.rollout import ExpertsWalk, Rollout
from pfn.units import context_units, prior_units

GRID = torch.linspace(0.02, 0.98, 12, dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> pfn.PFN:
    return pfn.load("gp-1d")


def a_task(model: pfn.PFN, n: int, m: int, d: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tasks = model.prior.sample(1, n + m, d, generator=generator)
    return tasks.x, tasks.y


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("name", "d"), [("gp-1d", 1), ("gp", 3), ("bnn", 2)])
@torch.no_grad()
def test_a_walk_says_what_decode_says_of_the_same_buffer(
    name: str, d: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one context that all draws share, and where each has its own."""
    model = pfn.load(name)
    network = copy.deepcopy(model.transformer).double()  # in float32 they differ by rounding
    x, y = a_task(model, 15, 10, d)
    encoded = network.encode(x[:, :15], y[:, :15])
    grid, values = x[0, 15:], y[0, 15:]
    order = torch.stack([torch.randperm(10), torch.arange(10)])
    told = encoded.scaling.apply(values.unsqueeze(0))[0][order]
    if alone:
        walk = Rollout(network, encoded.repeat(2), grid.expand(2, -1, -1), order, 10)
    else:
        walk = Rollout(network, encoded, grid.unsqueeze(0), order, 10)
    ends = torch.tensor([0, 1, 2, 4, 7, 10])  # points are asked for one by one, then together
    blocks = list(itertools.pairwise(ends.tolist()))
    steps = [walk.step(1)] + [
        walk.step(end - begin, told[:, before:begin])
        for (before, begin), (_, end) in itertools.pairwise(blocks)
    ]
    steps = [network.mixture_y(final) for final in steps]
    final = network.decode(
        encoded.repeat(2),
        grid[order],
        buffer=(grid[order], values[order]),
        visible=ends[:-1].repeat_interleave(ends.diff()),
    )
    for ours, theirs in zip(zip(*steps, strict=True), network.mixture_y(final), strict=True):
        torch.testing.assert_close(torch.cat(ours, 1), theirs, atol=1e-9, rtol=1e-9)
    monkeypatch.setattr("pfn.rollout.PIECE", 1)  # one walk after the other
    pieces = [network.mixture_f(final) for final in walk.finish(told[:, 7:])]
    assert len(pieces) == 2
    everywhere = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    final = network.decode(
        encoded.repeat(2),
        grid[order],
        buffer=(grid[order], values[order]),
        visible=torch.full((10,), 10),
    )
    for ours, theirs in zip(everywhere, network.mixture_f(final), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("alone", [False, True])
@torch.no_grad()
def test_residuals_have_an_experts_covariance_given_the_walk(model: pfn.PFN, alone: bool) -> None:
    x, y = (part.float() for part in a_task(model, 8, 10))
    encoded = model.transformer.encode(x[:, :8], y[:, :8])
    generator = torch.Generator().manual_seed(1)
    draws, visits = 20_000, 3
    order = torch.tensor([7, 2, 5, 0, 1, 3, 4, 6, 8, 9]).expand(draws, -1)
    left = ExpertsWalk(encoded.solved, x[:, 8:], order, visits)._left[0, 4]
    left = left[order[0]][:, order[0]]
    solved, grid = encoded.solved, x[:, 8:]
    if alone:
        solved, grid = encoded.repeat(draws).solved, grid.expand(draws, -1, -1)
    walk = ExpertsWalk(solved, grid, order, visits)
    chosen, noise = torch.full((draws,), 4), walk._noise[0, 4]
    residual = walk.residuals(chosen, noisy=False, generator=generator)
    inverse = torch.linalg.inv(left[:visits, :visits] + noise * torch.eye(visits))
    covariance = left - left[:, :visits] @ inverse @ left[:visits]
    std = covariance.diagonal().sqrt()
    # standard errors of correlations are at most 1 / sqrt(draws) = 0.007
    correlation = covariance / std / std.unsqueeze(-1)
    torch.testing.assert_close(torch.cov(residual.T), correlation, atol=0.035, rtol=0)
    noisy = walk.residuals(chosen, noisy=True, generator=generator)
    std = (covariance.diagonal() + noise).sqrt()
    expected = (covariance + noise * torch.eye(10)) / std / std.unsqueeze(-1)
    torch.testing.assert_close(torch.cov(noisy.T), expected, atol=0.035, rtol=0)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@torch.no_grad()
def test_what_is_left_of_visited_points_follows_from_the_factor(
    model: pfn.PFN, monkeypatch: pytest.MonkeyPatch, ridge: float
) -> None:
    """As conditioning on them says, also where they were factorised with more noise."""
    monkeypatch.setattr("pfn.rollout.cholesky", lambda m: cholesky(m + ridge * eye(m)))
    x, y = (part.float() for part in a_task(model, 8, 6))
    solved = model.transformer.encode(x[:, :8], y[:, :8]).solved
    order = torch.tensor([[3, 0, 5, 1, 2, 4], [0, 1, 2, 3, 4, 5]])
    walk, k = ExpertsWalk(solved, x[:, 8:], order, 4), 4
    values = torch.randn(2, k, generator=torch.Generator().manual_seed(0))
    walk.expect_next(k)
    walk.tell(values)
    said = walk.expect_all()
    noise = (walk._noise + ridge).unsqueeze(-1)
    for s in range(2):
        left = walk._left[0][:, order[s]][:, :, order[s]]
        inverse = torch.linalg.inv(left[:, :k, :k] + noise[0].unsqueeze(-1) * torch.eye(k))
        weights = left[:, :, :k] @ inverse
        residual = values[s].double() - walk._mean[s, :, :k]
        mean = walk._mean[s] + (weights @ residual.unsqueeze(-1)).squeeze(-1)
        share = left.diagonal(dim1=1, dim2=2) - (weights * left[:, :, :k]).sum(-1)
        torch.testing.assert_close(said.mean[s].mT, mean)
        variance = walk._log_variance[0].exp().unsqueeze(-1) * share.clamp_min(RIDGE)
        torch.testing.assert_close(said.variance[s].mT, variance, rtol=1e-6, atol=1e-9)


def covariance_of(posterior: Distribution) -> Tensor:
    """Of a mixture of joint normals, (m, m)."""
    weights = posterior.mixture_distribution.probs
    each = posterior.component_distribution
    spread = each.mean - posterior.mean
    outer = spread.unsqueeze(-1) * spread.unsqueeze(-2)
    return (weights[:, None, None] * (each.covariance_matrix + outer)).sum(0)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("n", [6, 30])
def test_joint_draws_have_the_exact_posteriors_covariance(
    model: pfn.PFN, n: int, latent: bool
) -> None:
    errors = []
    for seed in range(5):
        x, y = a_task(model, n, 0, seed=seed)
        context = x[0], y[0]
        exact = covariance_of(model.prior.posterior(context, GRID, latent=latent, joint=True))
        fitted = model.condition(context, standardize=False)
        paths = fitted.sample_paths(GRID, 1500, latent=latent, seed=seed)
        errors.append(float((torch.cov(paths.T) - exact).norm() / exact.norm()))
    # 1500 exact draws err by 0.05 to 0.09; independent draws of each point by 0.5 and more
    assert sum(errors) / 5 < 0.2


def test_draws_of_the_function_have_the_variance_of_its_predictive(model: pfn.PFN) -> None:
    x, y = a_task(model, 12, 0, seed=3)
    fitted = model.condition((x[0], y[0]), standardize=False)
    paths = fitted.sample_paths(GRID, 1000, latent=True)
    predictive = fitted.predict(GRID, latent=True)
    error = (paths.mean(0) - predictive.mean).abs() / predictive.stddev
    assert float(error.max()) < 0.2  # 0.03 by chance, and what coherence lacks
    assert float((paths.var(0) / predictive.variance).log().abs().mean()) < 0.2


@pytest.mark.parametrize("given", [None, {"noise": 0.09}])
@pytest.mark.parametrize("bounds", [None, [[-2.0], [8.0]]])
def test_small_contexts_that_grow_stay_in_their_units(
    model: pfn.PFN, given: dict[str, float] | None, bounds: list[list[float]] | None
) -> None:
    """Marginals of the draws are the predictive's, where draws' contexts are encoded anew."""
    x, y = a_task(model, 7, 0, seed=5)
    context = (6 * x[0], 50 + 3 * y[0])
    given = None if given is None else {"noise": 9 * given["noise"]}
    fitted = model.condition(context, given=given, bounds=bounds)
    query = torch.linspace(0, 6, 12, dtype=torch.float64)
    paths = fitted.sample_paths(query, 1000)
    predictive = fitted.predict(query)
    error = (paths.mean(0) - predictive.mean).abs() / predictive.stddev
    assert float(error.max()) < 0.25  # 0.09 by chance, and what coherence lacks
    assert float((paths.var(0) / predictive.variance).log().abs().mean()) < 0.25


def test_functions_are_smooth_on_a_fine_grid_and_equal_at_equal_inputs(model: pfn.PFN) -> None:
    """Of noisy data that leave little open: rounding would be a large part of what they leave."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, dtype=torch.float64, generator=generator).sort().values
    y = x / (0.2 + x) + 0.03 * torch.randn(40, dtype=torch.float64, generator=generator)
    fitted = model.condition((x, y))
    paths = fitted.sample_paths(torch.linspace(0, 1, 200), 50, latent=True)
    slopes = paths.diff(dim=1)
    turns = (slopes[:, 1:] * slopes[:, :-1] < 0).sum(1).double().mean()
    assert float(turns) < 4
    twice = fitted.sample_paths([0.1, 0.3, 0.5, 0.3, 0.9], 50, latent=True)
    assert float((twice[:, 1] - twice[:, 3]).std()) < 0.01 * float(twice[:, 1].std())


@pytest.mark.parametrize("n", [1, 3])
def test_contexts_that_set_no_scale_leave_that_of_the_prior(model: pfn.PFN, n: int) -> None:
    fitted = model.condition((torch.linspace(3, 4, n), torch.full((n,), 33.0)))
    query = torch.tensor([3.0, 3.2, 3.9])
    low, high = fitted.predict(query).interval(0.9)
    paths = fitted.sample_paths(query, 1000).double()
    drawn = paths.quantile(0.95, dim=0) - paths.quantile(0.05, dim=0)
    assert float((drawn / (high - low)).log().abs().max()) < 0.35


def test_far_queries_do_not_change_the_units_of_near_ones(model: pfn.PFN) -> None:
    x, y = a_task(model, 6, 0, seed=3)
    fitted = model.condition((x[0], y[0]))
    seen = fitted._seen(0)
    more = torch.cat([seen[0], torch.full((1, 3, 1), 4.0)], 1)
    walked = fitted._encode_anew(seen, more, torch.cat([seen[1], torch.ones(1, 3)], 1))
    assert walked.units.x_shift.tolist() == [[0.0]]
    assert walked.units.x_scale.tolist() == [[1.0]]
    assert walked.units.y_scale.item() != 1.0
    low, high = float(x.min()), float(x.max())
    near = torch.linspace(low, high, 6, dtype=torch.float64)
    far = high + (high - low) * torch.linspace(2, 3, 6, dtype=torch.float64)
    predictive = fitted.predict(near)
    paths = fitted.sample_paths(torch.cat([near, far]), 1000)[:, :6]
    error = (paths.mean(0) - predictive.mean).abs() / predictive.stddev
    assert float(error.max()) < 0.25


def test_known_latents_follow_their_data_into_other_units() -> None:
    model = pfn.load("gp-1d")
    x, y = a_task(model, 9, 0, seed=2)
    given = {"noise": 0.05, "outputscale": 1.3}
    whole, inner = context_units(x, 4 + 3 * y), prior_units(x, y)
    inner = inner._replace(y_shift=inner.y_shift + 0.7, y_scale=inner.y_scale * 2.5)
    both = whole._replace(y_shift=whole.y_shift + 0.7, y_scale=whole.y_scale * 2.5)
    known, expected = (model.read_given(given, units, 1) for units in (whole, both))
    assert known is not None
    assert expected is not None
    torch.testing.assert_close(model.known_in(inner, known), expected, equal_nan=True)


@pytest.mark.parametrize(("n", "told", "visits"), [(0, 0, 40), (5, 0, 12), (18, 3, 90), (60, 0, 9)])
def test_legs_and_blocks_visit_each_point_once(n: int, told: int, visits: int) -> None:
    legs = list(_legs(n, told, visits))
    assert [legs[0][0], *(end for _, end in legs)] == [*(begin for begin, _ in legs), visits]
    assert all(n + begin <= LARGEST for begin, _ in legs if begin)
    assert len(legs) == 1 if n == 60 else len(legs) > 1
    for begin, end in legs:
        blocks = list(_blocks(n, begin, end, told))
        assert [j for first, count in blocks for j in range(first, first + count)] == [
            *range(begin, end)
        ]
        drawn = [(first, count) for first, count in blocks if first >= told]
        assert all(count == 1 or BLOCK * count <= n + first for first, count in drawn)


def test_observations_are_those_of_the_function_drawn_with_them(
    model: pfn.PFN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfn.paths.ANEW", 2**21)  # 500 draws walk in parts of 227
    x, y = a_task(model, 30, 0, seed=1)
    fitted = model.condition((x[0], y[0]), standardize=False)
    observed, function = fitted.draw(GRID, 500, (False, True), seed=0)
    assert torch.equal(observed, fitted.sample_paths(GRID, 500))
    both = torch.corrcoef(torch.stack([observed[:, 5], function[:, 5]]))
    exact = fitted.predict(GRID[5:6], latent=True).variance / fitted.predict(GRID[5:6]).variance
    assert float(both[0, 1]) == pytest.approx(float(exact.sqrt()), abs=0.15)


def test_functions_are_smoother_than_observations(model: pfn.PFN) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, dtype=torch.float64, generator=generator)
    y = torch.sin(6 * x) + 0.3 * torch.randn(40, dtype=torch.float64, generator=generator)
    fitted = model.condition((x, y))
    query = torch.linspace(0, 1, 60, dtype=torch.float64)
    rough = [fitted.sample_paths(query, 30, latent=f).diff(dim=1).square().mean() for f in (0, 1)]
    assert rough[0] > 10 * rough[1]


def test_paths_are_in_the_units_of_the_data(model: pfn.PFN) -> None:
    x, y = a_task(model, 10, 0)
    x, y = x[0], y[0]
    paths = model.condition((x, y)).sample_paths([0.3, 0.6], 20)
    moved = model.condition((5 + 3 * x, 7 - 0 * y + 10 * y)).sample_paths([5.9, 6.8], 20)
    torch.testing.assert_close(moved, 7 + 10 * paths, rtol=1e-3, atol=1e-2)


def test_draws_follow_the_seed_alone_and_take_the_queries_shape(model: pfn.PFN) -> None:
    fitted = model.condition(([0.1, 0.5, 0.9], [0.0, 1.0, 0.3]))
    query = torch.tensor([0.2, 0.4])
    first = fitted.sample_paths(query, 5)
    assert first.shape == (5, 2)
    assert first.dtype == torch.float32
    assert torch.equal(first, fitted.sample_paths(query, 5))
    assert not torch.equal(first, fitted.sample_paths(query, 5, seed=1))
    assert fitted.sample_paths(torch.rand(2, 1).double()).shape == (256, 2)
    batch = model.condition((torch.rand(3, 6, 1), torch.rand(3, 6)))
    assert batch.sample_paths(torch.rand(3, 4, 1), 7).shape == (7, 3, 4)
    assert model.condition(([], [])).sample_paths([0.2, 0.4], 5).shape == (5, 2)


@pytest.mark.parametrize("latent", [False, True])
def test_more_points_than_a_draw_visits(model: pfn.PFN, latent: bool) -> None:
    x, y = a_task(model, 20, 0)
    fitted = model.condition((x[0], y[0]), standardize=False)
    query = torch.linspace(0, 1, MOST + 72)
    paths = fitted.sample_paths(query, 120, latent=latent)
    spread = paths.var(0) / fitted.predict(query, latent=latent).variance
    assert paths.shape == (120, MOST + 72)
    assert float(spread.mean()) == pytest.approx(1.0, abs=0.25)


def test_added_points_are_seen(model: pfn.PFN) -> None:
    x, y = a_task(model, 25, 0)
    x, y = x[0], y[0]
    extended = model.condition((x[:20], y[:20]), standardize=False).extend(x[20:], y[20:])
    paths = extended.sample_paths(x[20:23], 400, latent=True)
    error = (paths.mean(0) - extended.predict(x[20:23], latent=True).mean) / paths.std(0)
    assert float(error.abs().max()) < 0.3


def test_alternatives_that_were_added_have_paths_each(model: pfn.PFN) -> None:
    fitted = model.condition(([0.1, 0.5, 0.9], [0.0, 1.0, 0.3]))
    y = torch.tensor([[-3.0], [0.5], [4.0]])
    added = fitted.extend(torch.full((3, 1, 1), 0.3), y)
    paths = added.sample_paths(torch.tensor([0.29, 0.7]).expand(3, 2).unsqueeze(-1), 60)
    assert paths.shape == (60, 3, 2)
    near = paths[..., 0].mean(0)
    assert near[0] < near[1] < near[2]


def test_no_tasks_have_empty_paths_and_evidence(model: pfn.PFN) -> None:
    fitted = model.condition((torch.ones(0, 5, 1), torch.ones(0, 5)))
    assert fitted.sample_paths(torch.ones(0, 3, 1), 7).shape == (7, 0, 3)
    assert fitted.log_evidence().shape == (0,)


def test_no_queries_have_empty_paths(model: pfn.PFN) -> None:
    fitted = model.condition(([0.1, 0.5, 0.9], [0.0, 1.0, 0.3]))
    assert fitted.sample_paths(torch.empty(0, 1), 7, latent=True).shape == (7, 0)


def test_bad_requests(model: pfn.PFN) -> None:
    fitted = model.condition(([0.1, 0.5, 0.9], [0.0, 1.0, 0.3]))
    for draws in (0, 2.5, None, True):
        with pytest.raises(ValueError, match=f"at least 1 draw, a whole number; got {draws}"):
            fitted.sample_paths([0.2], draws)
    with pytest.raises(ValueError, match="query"):
        fitted.sample_paths(torch.rand(4, 2))
    curves = pfn.load("curves").condition(([0.1, 0.2], [0.3, 0.4]), standardize=False)
    with pytest.raises(ValueError, match=r"surrogates\.extrapolate"):
        curves.sample_paths([0.5])
