"""The fit against quantiles of known distributions, k against ratios whose tail index is known."""

import math

import pytest
import scipy.stats
import torch

from pfn.pareto import effective_draws, fit_pareto, is_trusted, largest_trusted, smooth


@pytest.mark.parametrize("k", [-0.4, 0.0, 0.3, 0.7, 1.2])
def test_the_fit_finds_the_distribution_of_exact_quantiles(k: float) -> None:
    level = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    excess = torch.from_numpy(scipy.stats.genpareto.ppf(level.numpy(), k, scale=2.5))

    fitted = fit_pareto(excess)

    drawn_to_half = (4000 * k + 10 * 0.5) / 4010  # by the prior of k
    assert fitted.k == pytest.approx(drawn_to_half, abs=0.01)  # quantiles have no noise
    assert fitted.scale == pytest.approx(2.5, rel=0.02)
    expected = torch.from_numpy(scipy.stats.genpareto.ppf(level.numpy(), fitted.k))
    torch.testing.assert_close(fitted.quantile(level), fitted.scale * expected)


def test_quantiles_at_k_of_zero_are_exponential() -> None:
    level = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)
    exact = torch.from_numpy(scipy.stats.expon.ppf(level.numpy(), scale=3.0))
    fitted = fit_pareto(torch.ones(10, dtype=torch.float64))._replace(k=0.0, scale=3.0)
    torch.testing.assert_close(fitted.quantile(level), exact)


@pytest.mark.parametrize("std", [0.4, 0.6, 0.8])
def test_k_is_the_tail_index_of_ratios_of_normals(std: float) -> None:
    """Weights of Normal(0, 1) under draws of Normal(0, std^2) exceed u as often as u^(-1/k)."""
    generator = torch.Generator().manual_seed(0)
    x = std * torch.randn(200_000, dtype=torch.float64, generator=generator)
    log_weights = 0.5 * (x / std).square() - 0.5 * x.square()

    smoothed = smooth(log_weights)

    tail = 3 * math.sqrt(len(x))
    # the standard deviation of k from its tail, and the bias at finite levels
    assert smoothed.k == pytest.approx(1 - std**2, abs=4 * (1 + 1 - std**2) / math.sqrt(tail))
    assert is_trusted(smoothed) == (std > 0.5)  # where k is 0.64 and 0.36, and not 0.84


def test_bounded_weights_have_no_positive_k() -> None:
    x = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert smooth(0.5 * x.square() - 0.5 * (x / 0.5).square()).k < 0


def test_smoothing_keeps_order_bulk_and_the_largest_and_about_the_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    x = 0.8 * torch.randn(20_000, dtype=torch.float64, generator=generator)
    log_weights = 0.5 * (x / 0.8).square() - 0.5 * x.square() + 300.0  # would overflow

    smoothed = smooth(log_weights).log_weights

    order = log_weights.argsort()
    assert bool((smoothed[order].diff() >= 0).all())
    tail = math.ceil(3 * math.sqrt(len(x)))
    assert torch.equal(smoothed[order[:-tail]], log_weights[order[:-tail]])
    assert float(smoothed.max()) <= float(log_weights.max())
    error = 1 / math.sqrt(effective_draws(log_weights))
    assert float(smoothed.logsumexp(0) - log_weights.logsumexp(0)) == pytest.approx(0, abs=error)


def test_equal_weights_are_as_good_as_can_be_and_few_say_nothing() -> None:
    equal = torch.full((50,), -3.0, dtype=torch.float64)
    assert smooth(equal).k == -math.inf and effective_draws(equal) == pytest.approx(50)
    assert smooth(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)).k == math.inf
    impossible = torch.full((50,), -math.inf, dtype=torch.float64)
    assert smooth(impossible).k == math.inf
    one = torch.cat([impossible, torch.zeros(1, dtype=torch.float64)])
    assert smooth(one).k == math.inf and effective_draws(one) == pytest.approx(1)


def test_the_largest_k_that_is_trusted_grows_with_the_draws() -> None:
    assert largest_trusted(100) == pytest.approx(0.5)
    assert largest_trusted(1000) == pytest.approx(2 / 3)
    assert largest_trusted(10**6) == 0.7
