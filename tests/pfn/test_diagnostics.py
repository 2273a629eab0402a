"""Each diagnostic is itself tested: false alarms at the nominal rate, power where all is wrong."""

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from pfn.diagnostics import interval_coverage, ks_test

REPEATS = 400
LEVEL = 0.05
MARGIN = 4 * math.sqrt(LEVEL * (1 - LEVEL) / REPEATS)  # four standard errors of a rejection rate


def pit_values(*shape: int, sd: float = 1.0, bias: float = 0.0, seed: int = 0) -> Tensor:
    """PIT values of predictives Normal(bias, sd^2) when the truth is Normal(0, 1)."""
    truth = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.special.ndtr((truth - bias) / sd)


def clustered_pit_values(*shape: int, sd: float = 1.0, seed: int = 0) -> Tensor:
    """The same, with a correlation of 0.8 between the queries (last axis) of a task."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(*shape[:-1], 1, dtype=torch.float64, generator=g)
    own = torch.randn(*shape, dtype=torch.float64, generator=g)
    return torch.special.ndtr((math.sqrt(0.8) * shared + math.sqrt(0.2) * own) / sd)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_ks_test_equals_the_exact_test_of_scipy(n: int) -> None:
    for seed in range(20):
        u = pit_values(n, bias=0.1 * (seed % 4), seed=seed)
        exact = scipy.stats.kstest(u.numpy(), "uniform", method="exact")
        ours = ks_test(u)
        assert ours.statistic == pytest.approx(exact.statistic, abs=1e-15)
        # The approximation's own error, measured: 0.0022 at n = 10, falling like 1 / n.
        assert ours.p_value == pytest.approx(exact.pvalue, abs=0.03 / n)


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_ks_test_raises_a_false_alarm_in_one_of_twenty(n: int) -> None:
    alarms = [ks_test(u).p_value < LEVEL for u in pit_values(REPEATS, n)]
    assert abs(sum(alarms) / REPEATS - LEVEL) < MARGIN


def test_ks_test_is_invalid_on_dependent_queries_hence_one_query_per_task() -> None:
    u = clustered_pit_values(REPEATS, 50, 16)
    pooled = sum(ks_test(x.flatten()).p_value < LEVEL for x in u) / REPEATS
    one_each = sum(ks_test(x[:, 0]).p_value < LEVEL for x in u) / REPEATS
    assert pooled > 0.5
    assert abs(one_each - LEVEL) < MARGIN


@pytest.mark.parametrize(
    ("sd", "bias", "power"),
    [(0.9, 0.0, 0.3), (0.8, 0.0, 0.999), (1.25, 0.0, 0.999), (1.0, 0.1, 0.75), (1.0, 0.2, 0.999)],
)
def test_ks_test_notices_a_wrong_spread_or_bias(sd: float, bias: float, power: float) -> None:
    alarms = [ks_test(u).p_value < LEVEL for u in pit_values(REPEATS, 1000, sd=sd, bias=bias)]
    assert sum(alarms) / REPEATS > power


def coverage_alarm(pit: Tensor, mass: float) -> bool:
    (coverage,) = interval_coverage(pit, [mass])
    return abs(coverage.fraction - mass) > 1.96 * coverage.standard_error


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_coverage_standard_error_holds_although_queries_of_a_task_depend(mass: float) -> None:
    u = clustered_pit_values(REPEATS, 500, 16)
    assert abs(sum(coverage_alarm(x, mass) for x in u) / REPEATS - LEVEL) < MARGIN
    flattened = [coverage_alarm(x.reshape(-1, 1), mass) for x in u]
    assert sum(flattened) / REPEATS > 0.3  # what errors over queries would claim


@pytest.mark.parametrize(("sd", "power"), [(0.9, 0.9), (0.8, 0.999), (1.25, 0.999)])
def test_coverage_notices_a_wrong_spread(sd: float, power: float) -> None:
    u = pit_values(REPEATS, 500, 16, sd=sd)
    assert sum(coverage_alarm(x, 0.9) for x in u) / REPEATS > power


@pytest.mark.parametrize("mass", [0.5, 0.8, 0.9, 0.95])
def test_coverage_of_narrow_predictives_follows_the_formula(mass: float) -> None:
    (coverage,) = interval_coverage(pit_values(4000, 8, sd=0.8), [mass])
    half_width = 0.8 * scipy.stats.norm.ppf(0.5 + mass / 2)
    expected = 2 * scipy.stats.norm.cdf(half_width) - 1
    assert coverage.fraction == pytest.approx(expected, abs=4 * coverage.standard_error)


@pytest.mark.parametrize(
    ("pit", "message"),
    [
        (torch.tensor([0.1, math.nan]), r"in \[0, 1\]"),
        (torch.tensor([0.1, 1.5]), r"in \[0, 1\]"),
        (torch.rand(3, 2), r"shape \(n,\)"),
        (torch.rand(0), "at least one"),
    ],
)
def test_bad_pit_values_are_refused(pit: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ks_test(pit)


def test_coverage_needs_several_tasks() -> None:
    with pytest.raises(ValueError, match="at least 2 tasks"):
        interval_coverage(torch.rand(1, 5))
