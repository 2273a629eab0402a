"""Coherence of exact predictives is found, and incoherence at its size, with known error rates."""

import math

import pytest
import torch
from torch import Tensor

from pfn.coherence import Martingale, exchangeability, martingale_test
from pfn.diagnostics import ks_test

REPEATS = 400
LEVEL = 0.05
MARGIN = 4 * math.sqrt(LEVEL * (1 - LEVEL) / REPEATS)  # four standard errors of a rejection rate


def updates(
    tasks: int,
    draws: int,
    probes: int,
    *,
    gain: float = 1.0,
    spread: float = 1.0,
    bias: float = 0.0,
    simulated: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Predictive cdfs before and after an observation, where y ~ Normal(theta, 1).

    With theta ~ Normal(0, 1) and n observations, theta is Normal(m, v) with v = 1 / (1 + n), and
    the next y is Normal(m, v + 1). Tasks have n log-uniform in [0, 199).

    Args:
        gain: factor on how far an observation moves the mean.
        spread: factor on the standard deviation afterwards.
        bias: in standard deviations, of the mean afterwards.
        simulated: factor on the standard deviation that y is drawn with.
    """
    g = torch.Generator().manual_seed(seed)
    n = (200 ** torch.rand(tasks, dtype=torch.float64, generator=g)).floor() - 1
    v = 1 / (1 + n)
    sd = (v + 1).sqrt()
    levels = torch.linspace(0.05, 0.95, probes, dtype=torch.float64)
    before = levels.expand(tasks, -1)  # at its own quantiles, of mean 0
    y = simulated * sd * torch.randn(draws, tasks, dtype=torch.float64, generator=g)
    mean = gain * v / (v + 1) * y + bias * sd
    after_sd = spread * (1 / (2 + n) + 1).sqrt()
    quantiles = sd.unsqueeze(1) * torch.special.ndtri(levels)
    after = torch.special.ndtr((quantiles - mean.unsqueeze(-1)) / after_sd.unsqueeze(1))
    return before, after


def alarm_rate(results: list[Martingale]) -> float:
    return sum(result.p_value < LEVEL for result in results) / len(results)


@pytest.mark.parametrize(
    ("tasks", "draws", "probes"),
    [(10, 16, 9), (20, 60, 3), (100, 16, 1), (100, 60, 9), (500, 8, 5)],
)
def test_martingale_test_raises_a_false_alarm_in_one_of_twenty(
    tasks: int, draws: int, probes: int
) -> None:
    results = [martingale_test(*updates(tasks, draws, probes, seed=i)) for i in range(REPEATS)]
    assert abs(alarm_rate(results) - LEVEL) < MARGIN
    assert ks_test(torch.tensor([r.p_value for r in results])).p_value > 1e-3
    ratio = sum(r.discrepancy for r in results) / sum(r.null_level for r in results)
    # The standard error of few skewed draws is a little small, here at most by a tenth.
    assert ratio == pytest.approx(1, abs=0.12 if draws < 60 else 0.03)


@pytest.mark.parametrize(
    ("wrong", "power"),
    [
        ({"spread": 0.98}, 0.95),
        ({"spread": 0.9}, 0.999),
        ({"bias": 0.01}, 0.95),
        ({"bias": 0.1}, 0.999),
        ({"gain": 2.0}, 0.95),
        ({"gain": 0.0}, 0.95),
        ({"simulated": 1.5}, 0.7),
    ],
)
def test_martingale_test_notices_incoherent_updates(wrong: dict[str, float], power: float) -> None:
    results = [martingale_test(*updates(100, 60, 9, seed=i, **wrong)) for i in range(100)]
    assert alarm_rate(results) > power


def test_martingale_test_notices_errors_of_opposite_sign_in_each_task() -> None:
    rejected = 0
    for i in range(100):
        before, after = updates(100, 60, 9, seed=i)
        sign = torch.randn(100, 1, generator=torch.Generator().manual_seed(i)).sign()
        rejected += martingale_test(before, after + 0.01 * sign).p_value < LEVEL
    assert rejected > 95


def test_discrepancy_is_the_size_of_the_violation_and_null_level_what_draws_can_see() -> None:
    before, after = updates(200, 4000, 9)
    shifted = martingale_test(before, after + 0.02)
    assert shifted.discrepancy == pytest.approx(0.02, abs=shifted.null_level)
    few, many = martingale_test(before, after[:250]), martingale_test(before, after)
    assert few.null_level / many.null_level == pytest.approx(4, rel=0.05)
    assert many.discrepancy == pytest.approx(many.null_level, rel=0.1)


def test_a_network_that_ignores_observations_is_a_martingale() -> None:
    before = torch.rand(20, 5, generator=torch.Generator().manual_seed(0))
    result = martingale_test(before, before.expand(8, -1, -1))
    assert result == Martingale(0.0, 0.0, 0.5)
    constant = martingale_test(before, before.expand(8, -1, -1) + 0.001)
    assert constant.p_value < 1e-4 and constant.null_level < 1e-9


def joint_log_densities(tasks: int, orders: int, points: int, spread: float) -> Tensor:
    """Exact ones, which all orders share, and what an order adds, in nats per point."""
    g = torch.Generator().manual_seed(0)
    exact = -points * torch.rand(tasks, 1, dtype=torch.float64, generator=g)
    return exact + points * spread * torch.randn(tasks, orders, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("orders", [2, 4, 16])
def test_spread_over_orders_is_found_however_many_there_are(orders: int) -> None:
    result = exchangeability(joint_log_densities(4000, orders, 20, 0.03), 20)
    assert result.spread == pytest.approx(0.03, abs=4 * result.standard_error)
    assert result.standard_error < 0.0005


def test_the_standard_error_over_tasks_is_honest_in_nineteen_of_twenty() -> None:
    outside = 0
    for block in joint_log_densities(REPEATS * 100, 8, 20, 0.03).split(100):
        result = exchangeability(block, 20)
        outside += abs(result.spread - 0.03) > 1.96 * result.standard_error
    assert abs(outside / REPEATS - LEVEL) < MARGIN


def test_averaging_over_orders_leaves_what_remaining_says() -> None:
    log_joint = joint_log_densities(4000, 9, 20, 0.03)
    exact = joint_log_densities(4000, 9, 20, 0.0)[:, 0]
    error = (log_joint.mean(1) - exact).std() / 20
    assert exchangeability(log_joint, 20).remaining == pytest.approx(float(error), rel=0.05)


def test_the_chain_rule_of_an_exact_posterior_does_not_depend_on_the_order() -> None:
    tasks, orders, n = 5, 6, 12
    g = torch.Generator().manual_seed(0)
    y = torch.randn(tasks, n, dtype=torch.float64, generator=g)
    order = torch.rand(tasks, orders, n, generator=g).argsort(-1)
    told = y.unsqueeze(1).expand(-1, orders, -1).gather(-1, order)
    k = torch.arange(n, dtype=torch.float64)
    mean = (told.cumsum(-1) - told) / (1 + k)  # of theta ~ Normal(0, 1), given those before
    predictive = torch.distributions.Normal(mean, (1 + 1 / (1 + k)).sqrt())
    exact = predictive.log_prob(told).sum(-1)
    assert exchangeability(exact, n).spread < 1e-14
    forgetful = predictive.log_prob(told)[..., 3:].sum(-1)  # without the first three
    assert exchangeability(forgetful, n).spread > 0.01


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.rand(5, 3), torch.rand(9, 5)),
        (torch.rand(5, 3), torch.rand(3, 5, 3)),
        (torch.rand(5), torch.rand(9, 5)),
        (torch.rand(0, 3), torch.rand(9, 0, 3)),
    ],
)
def test_cdfs_that_do_not_belong_together_are_refused(before: Tensor, after: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(draw, task, probe\) with at least 4 draws; got"):
        martingale_test(before, after)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite values of cdfs"):
        martingale_test(torch.full((5, 3), math.nan), torch.rand(9, 5, 3))
    with pytest.raises(ValueError, match="finite log joint"):
        exchangeability(torch.full((5, 3), -math.inf), 10)


@pytest.mark.parametrize(("shape", "points"), [((5,), 3), ((1, 4), 3), ((4, 1), 3), ((4, 4), 0)])
def test_too_few_tasks_orders_or_points_are_refused(shape: tuple[int, ...], points: int) -> None:
    with pytest.raises(ValueError, match="at least 2 tasks and 2 orders"):
        exchangeability(torch.zeros(shape), points)
