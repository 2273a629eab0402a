"""Designs of inputs, and draws that a generator controls."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Exponential, Gamma, LogNormal, Normal

from priors.draws import draw
from priors.inputs import DESIGNS, Design, draw_inputs

# sqrt(log(2 / p) / 2n) bounds a Kolmogorov-Smirnov distance but for p = 1e-6 of all seeds (DKW)
DKW = math.sqrt(math.log(2e6) / 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ks_distance(pit: Tensor) -> float:
    """Largest distance between the empirical cdf of `pit` and the uniform one."""
    ordered = pit.flatten().sort().values
    rank = torch.arange(len(ordered) + 1, dtype=ordered.dtype) / len(ordered)
    return float(torch.maximum(rank[1:] - ordered, ordered - rank[:-1]).max())


@pytest.fixture(params=DESIGNS)
def design(request: pytest.FixtureRequest) -> Design:
    return DESIGNS[request.param]


def test_designs_have_the_asked_shape_in_float64(design: Design) -> None:
    for shape in ((3, 7, 2), (1, 1, 1), (2, 0, 3)):
        x = design(*shape, generator=generator())
        assert x.shape == shape and x.dtype == torch.float64 and x.isfinite().all()


def test_the_same_seed_gives_the_same_inputs(design: Design) -> None:
    first, again = (design(4, 9, 2, generator=generator(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, design(4, 9, 2, generator=generator(6)))


def test_rows_are_exchangeable(design: Design) -> None:
    # x_first < x_last in half of the tasks; 5 standard errors of a fair coin, ties broken
    x = design(4000, 6, 1, generator=generator()).squeeze(-1)
    share = (x[:, 0] < x[:, -1]).double().mean() + (x[:, 0] == x[:, -1]).double().mean() / 2
    assert abs(float(share) - 0.5) < 5 * 0.5 / math.sqrt(4000)


def test_uniform_inputs_are_uniform() -> None:
    assert ks_distance(DESIGNS["uniform"](100, 100, 2, generator=generator())) < DKW / 141


def test_normal_inputs_are_normal_around_the_center() -> None:
    x = DESIGNS["normal"](100, 100, 2, generator=generator())
    assert ks_distance(Normal(0.5, 0.2).cdf(x)) < DKW / 141


def test_a_grid_has_every_level_once_in_each_feature() -> None:
    x = DESIGNS["grid"](5, 8, 3, generator=generator())
    levels = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    torch.testing.assert_close(x.sort(1).values, levels[None, :, None].expand(5, 8, 3))
    assert not torch.equal(x[:, :, 0], x[:, :, 1])  # features are shuffled on their own


def test_clusters_are_tighter_than_the_box() -> None:
    x = DESIGNS["clustered"](500, 60, 1, generator=generator()).squeeze(-1).sort(1).values
    even = DESIGNS["uniform"](500, 60, 1, generator=generator()).squeeze(-1).sort(1).values
    gaps, even_gaps = x.diff(dim=1).median(1).values, even.diff(dim=1).median(1).values
    assert gaps.median() < 0.7 * even_gaps.median()


def test_each_task_has_one_of_the_designs() -> None:
    x = draw_inputs(("grid", "uniform"), 400, 10, 1, generator=generator()).squeeze(-1)
    levels = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    is_grid = (x.sort(1).values - levels).abs().max(1).values < 1e-12
    assert abs(float(is_grid.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(400)


@pytest.mark.parametrize("prior", [LogNormal(-1.0, 0.5), Exponential(2.0), Normal(1.0, 2.0)])
def test_draws_follow_their_distribution(prior: Distribution) -> None:
    drawn = draw(prior, (20000,), generator=generator())
    assert drawn.dtype == torch.float64
    assert ks_distance(prior.cdf(drawn)) < DKW / math.sqrt(20000)


def test_draws_without_inverse_cdf_leave_the_global_state_alone() -> None:
    prior = Gamma(2.0, 3.0)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = (draw(prior, (20000,), generator=generator(1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert ks_distance(prior.cdf(first)) < DKW / math.sqrt(20000)


def test_a_number_is_drawn_as_itself() -> None:
    assert torch.equal(draw(0.25, (3,), generator=generator()), torch.full((3,), 0.25).double())
