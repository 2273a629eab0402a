"""Each diagnostic is itself tested: false alarms at the nominal rate, power where all is wrong."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal

from pfn.diagnostics import (
    EcdfBand,
    ecdf_band,
    ecdf_test,
    expected_coverage,
    interval_coverage,
    ks_test,
    randomized_pit,
    sbc_ranks,
    tarp_coverage,
)

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


def leaves(values: Tensor, band: EcdfBand) -> Tensor:
    """Whether the empirical cdf of each row (repeat, n) leaves the band."""
    edges = band.edges.expand(len(values), -1).contiguous()
    counts = torch.searchsorted(values.sort(-1).values, edges, right=True)
    outside = (counts < band.lower * values.shape[1] - 0.5) | (
        counts > band.upper * values.shape[1] + 0.5
    )
    return outside.any(-1)


def test_ecdf_test_equals_the_enumeration_of_all_samples_of_two() -> None:
    cells = np.stack(np.triu_indices(100))  # where the smaller and the larger value lie
    edges = np.arange(1, 100)
    counts = (cells[:, :, None] < edges).sum(0)  # (sample, edge)
    binomial = scipy.stats.binom(2, edges / 100)
    pointwise = 2 * np.minimum(binomial.cdf(counts), binomial.sf(counts - 1))
    statistic = np.minimum(pointwise, 1).min(1)
    chance = np.where(cells[0] == cells[1], 1e-4, 2e-4)
    for k in range(0, len(chance), 200):
        test = ecdf_test(torch.from_numpy((cells[:, k] + 0.5) / 100))
        assert test.statistic == pytest.approx(statistic[k], rel=1e-12)
        as_extreme = chance[statistic <= statistic[k] * (1 + 1e-9)].sum()
        assert test.p_value == pytest.approx(as_extreme, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
def test_ecdf_test_rejects_where_the_band_is_left(n: int) -> None:
    u = pit_values(200, n, bias=1.5 / math.sqrt(n))
    rejected = torch.tensor([ecdf_test(x).p_value <= LEVEL for x in u])
    assert torch.equal(rejected, leaves(u, ecdf_band(n, 1 - LEVEL)))
    assert 0 < rejected.sum() < 200


@pytest.mark.parametrize(("n", "mass"), [(10, 0.5), (100, 0.95), (100, 0.5), (1000, 0.95)])
def test_ecdf_band_holds_all_of_the_empirical_cdf_with_its_mass(n: int, mass: float) -> None:
    left = leaves(pit_values(5000, n), ecdf_band(n, mass)).double().mean()
    # Counts are discrete, so it may be too wide: by 0.016 at n = 10 and mass 0.5, else by 0.001.
    slack = 4 * math.sqrt(mass * (1 - mass) / 5000)
    assert 1 - mass - (0.016 if n == 10 else 0.002) - slack < left < 1 - mass + slack


def test_ecdf_band_shrinks_like_one_over_the_root_of_n_and_is_narrow_at_the_ends() -> None:
    small, large = ecdf_band(1000, 0.95), ecdf_band(4000, 0.95)
    ratio = (small.upper - small.lower)[49] / (large.upper - large.lower)[49]
    assert ratio == pytest.approx(2, abs=0.1)
    assert (small.upper - small.lower)[0] < 0.25 * (small.upper - small.lower)[49]
    torch.testing.assert_close(small.lower, 1 - small.upper.flip(0))


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_ecdf_test_raises_a_false_alarm_in_one_of_twenty(n: int) -> None:
    alarms = [ecdf_test(u).p_value < LEVEL for u in pit_values(REPEATS, n)]
    assert abs(sum(alarms) / REPEATS - LEVEL) < MARGIN


@pytest.mark.parametrize(
    ("sd", "bias", "power"),
    [(0.9, 0.0, 0.8), (0.8, 0.0, 0.999), (1.1, 0.0, 0.7), (1.0, 0.1, 0.7), (1.0, 0.2, 0.999)],
)
def test_ecdf_test_notices_a_wrong_spread_or_bias(sd: float, bias: float, power: float) -> None:
    u = pit_values(REPEATS, 1000, sd=sd, bias=bias)
    alarms = leaves(u, ecdf_band(1000, 1 - LEVEL)).double().mean()
    assert alarms > power
    if bias == 0:  # its point: errors of spread are noticed earlier
        assert alarms >= sum(ks_test(x).p_value < LEVEL for x in u) / REPEATS


def test_randomized_pit_of_counts_is_uniform() -> None:
    counts = scipy.stats.poisson.rvs(1.5, size=(REPEATS, 200), random_state=0)
    cdf = torch.from_numpy(scipy.stats.poisson.cdf(counts, 1.5))
    below = torch.from_numpy(scipy.stats.poisson.cdf(counts - 1, 1.5))
    u = randomized_pit(cdf, below, generator=torch.Generator().manual_seed(0))
    assert alarm_rates(u) == pytest.approx([LEVEL, LEVEL], abs=MARGIN)
    assert alarm_rates(cdf) == [1, 1]  # F(y) itself is not


def test_randomized_pit_notices_a_wrong_rate_of_counts() -> None:
    counts = scipy.stats.poisson.rvs(1.5, size=(REPEATS, 1000), random_state=0)
    cdf = torch.from_numpy(scipy.stats.poisson.cdf(counts, 1.8))
    below = torch.from_numpy(scipy.stats.poisson.cdf(counts - 1, 1.8))
    u = randomized_pit(cdf, below, generator=torch.Generator().manual_seed(0))
    assert min(alarm_rates(u)) > 0.999


def test_randomized_pit_of_a_continuous_cdf_is_the_cdf() -> None:
    u = pit_values(5, 3)
    assert torch.equal(randomized_pit(u, u, generator=torch.Generator()), u)


class Simulated(NamedTuple):
    """Truth of a conjugate normal model, data, and draws from some posterior with its density."""

    truth: Tensor  # (task, 2) ~ Normal(0, 1)
    data: Tensor  # (task, 2) ~ Normal(truth, 1), so that the posterior is Normal(data / 2, 1 / 2)
    draws: Tensor  # (draw, task, 2)
    q: Normal

    def log_q(self, value: Tensor) -> Tensor:
        return self.q.log_prob(value).sum(-1)

    def log_likelihood(self, value: Tensor) -> Tensor:
        return Normal(value, 1.0).log_prob(self.data).sum(-1)


def simulate(
    tasks: int,
    draws: int,
    *,
    sd: float = 1.0,
    bias: float = 0.0,
    posterior: str = "conjugate",
    seed: int = 0,
) -> Simulated:
    """Draws from the exact posterior, or one that is too narrow, shifted, blind or mistaken."""
    g = torch.Generator().manual_seed(seed)
    truth, noise = torch.randn(2, tasks, 2, dtype=torch.float64, generator=g)
    data = truth + noise
    seen = data.roll(1, 0) if posterior == "of other data" else data
    scale = math.sqrt(0.5)
    q = Normal(seen / 2 + bias * scale, sd * scale)
    if posterior == "prior":
        q = Normal(torch.zeros_like(data), 1.0)
    unit = torch.randn(draws, tasks, 2, dtype=torch.float64, generator=g)
    return Simulated(truth, data, q.loc + q.scale * unit, q)


def rank(s: Simulated, g: torch.Generator) -> Tensor:
    return sbc_ranks(s.draws[..., 0], s.truth[..., 0], generator=g)


def likelihood_rank(s: Simulated, g: torch.Generator) -> Tensor:
    return sbc_ranks(s.log_likelihood(s.draws), s.log_likelihood(s.truth), generator=g)


def density(s: Simulated, g: torch.Generator) -> Tensor:
    return expected_coverage(s.log_q(s.draws), s.log_q(s.truth), generator=g)


def tarp_random(s: Simulated, g: torch.Generator) -> Tensor:
    references = torch.randn(s.truth.shape, dtype=torch.float64, generator=g)
    return tarp_coverage(s.draws, s.truth, references, generator=g)


def tarp_data(s: Simulated, g: torch.Generator) -> Tensor:
    return tarp_coverage(s.draws, s.truth, s.data, generator=g)


def tarp_far(s: Simulated, g: torch.Generator) -> Tensor:
    return tarp_coverage(s.draws, s.truth, torch.full_like(s.truth, 10.0), generator=g)


Statistic = Callable[[Simulated, torch.Generator], Tensor]
STATISTICS: list[Statistic] = [rank, likelihood_rank, density, tarp_random, tarp_far, tarp_data]


def alarm_rates(values: Tensor) -> list[float]:
    """How often `ks_test` and the band of `ecdf_test` reject rows of (repeat, n)."""
    by_ks = [ks_test(row).p_value < LEVEL for row in values]
    by_ecdf = leaves(values, ecdf_band(values.shape[1], 1 - LEVEL))
    return [sum(by_ks) / len(by_ks), float(by_ecdf.double().mean())]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("tasks", "draws"), [(50, 9), (200, 19), (100, 99), (1000, 3)])
def test_an_exact_posterior_raises_a_false_alarm_in_one_of_twenty(
    statistic: Statistic, tasks: int, draws: int
) -> None:
    g = torch.Generator().manual_seed(1)
    values = statistic(simulate(REPEATS * tasks, draws), g).view(REPEATS, tasks)
    assert alarm_rates(values) == pytest.approx([LEVEL, LEVEL], abs=MARGIN)


WRONG = [
    (rank, {"sd": 0.9}, 0.5),
    (rank, {"sd": 0.8}, 0.99),
    (rank, {"bias": 0.1}, 0.4),
    (rank, {"bias": 0.2}, 0.8),
    (rank, {"bias": 0.3}, 0.999),
    (rank, {"posterior": "of other data"}, 0.999),
    (likelihood_rank, {"posterior": "prior"}, 0.999),
    (likelihood_rank, {"posterior": "of other data"}, 0.999),
    (density, {"sd": 0.9}, 0.9),
    (density, {"sd": 0.8}, 0.999),
    (density, {"posterior": "of other data"}, 0.999),
    (tarp_random, {"sd": 0.9}, 0.4),
    (tarp_random, {"sd": 0.8}, 0.99),
    (tarp_far, {"bias": 0.2}, 0.95),
    (tarp_random, {"posterior": "of other data"}, 0.999),
    (tarp_data, {"posterior": "prior"}, 0.999),
    (tarp_data, {"sd": 0.8}, 0.9),
    (tarp_data, {"posterior": "of other data"}, 0.999),
]


@pytest.mark.parametrize(("statistic", "wrong", "power"), WRONG)
def test_a_wrong_posterior_is_noticed(
    statistic: Statistic, wrong: dict[str, Any], power: float
) -> None:
    g, tasks, repeats = torch.Generator().manual_seed(1), 500, 100
    values = statistic(simulate(repeats * tasks, 49, **wrong), g).view(repeats, tasks)
    assert alarm_rates(values)[1] > power


@pytest.mark.parametrize("statistic", [rank, density, tarp_random, tarp_far])
def test_the_prior_passes_for_a_posterior_where_the_statistic_ignores_the_data(
    statistic: Statistic,
) -> None:
    g = torch.Generator().manual_seed(1)
    values = statistic(simulate(REPEATS * 100, 49, posterior="prior"), g).view(REPEATS, 100)
    assert alarm_rates(values) == pytest.approx([LEVEL, LEVEL], abs=MARGIN)


def test_ranks_of_a_binary_parameter_are_uniform_because_ties_are_broken_at_random() -> None:
    g = torch.Generator().manual_seed(0)
    chance = torch.rand(REPEATS * 200, generator=g)  # of one, given the data: the exact posterior
    truth, draws = chance.bernoulli(generator=g), chance.expand(19, -1).bernoulli(generator=g)
    values = sbc_ranks(draws, truth, generator=g).view(REPEATS, 200)
    assert alarm_rates(values) == pytest.approx([LEVEL, LEVEL], abs=MARGIN)
    ties_below = ((draws <= truth).double().mean(0)).view(REPEATS, 200)
    assert alarm_rates(ties_below) == [1, 1]


def test_a_continuous_test_of_integer_ranks_would_reject_the_exact_posterior() -> None:
    s = simulate(REPEATS * 1000, 19)
    ranks = (s.draws[..., 0] < s.truth[..., 0]).double().mean(0).view(REPEATS, 1000)
    assert min(alarm_rates(ranks)) > 0.999


def test_a_two_sample_test_of_coverage_on_a_grid_would_never_reject() -> None:
    levels = np.linspace(0, 1, 51)
    s, g = simulate(20 * 1000, 99, sd=0.8), torch.Generator().manual_seed(1)
    for values in tarp_random(s, g).view(20, 1000):
        coverage = np.searchsorted(np.sort(values.numpy()), levels) / 1000
        assert scipy.stats.ks_2samp(coverage, levels).pvalue > 0.5
        assert ks_test(values).p_value < 1e-3 and ecdf_test(values).p_value < 1e-6


def test_expected_coverage_counts_the_draws_that_are_denser() -> None:
    g = torch.Generator().manual_seed(0)
    coverage = expected_coverage(
        torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.5]), generator=g
    )
    assert 0.25 < float(coverage) < 0.5  # one of three is denser: (1 + U) / 4


def test_tarp_coverage_counts_the_draws_that_are_closer() -> None:
    g = torch.Generator().manual_seed(0)
    draws = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]], [[0.0, 2.0]]])
    coverage = tarp_coverage(draws, torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), generator=g)
    assert 0.5 < float(coverage) < 0.75  # two of three are: (2 + U) / 4


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
    ("values", "message"),
    [
        (torch.tensor([0.1, math.nan]), r"in \[0, 1\]"),
        (torch.tensor([0.1, 1.5]), r"in \[0, 1\]"),
        (torch.rand(3, 2), r"shape \(n,\)"),
        (torch.rand(0), "at least one"),
    ],
)
@pytest.mark.parametrize("test", [ks_test, ecdf_test])
def test_bad_values_are_refused(
    test: Callable[[Tensor], object], values: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        test(values)


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    g = torch.Generator()
    with pytest.raises(ValueError, match=r"\(task, \.\.\.\).*got \(9, 4\) and \(5,\)"):
        sbc_ranks(torch.rand(9, 4), torch.rand(5), generator=g)
    with pytest.raises(ValueError, match="at least one draw"):
        sbc_ranks(torch.rand(0, 5), torch.rand(5), generator=g)
    with pytest.raises(ValueError, match="NaN"):
        sbc_ranks(torch.full((9, 5), math.nan), torch.rand(5), generator=g)
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(2,\)"):
        tarp_coverage(torch.rand(9, 5, 2), torch.rand(5, 2), torch.rand(2), generator=g)
    with pytest.raises(ValueError, match="one shape"):
        randomized_pit(torch.rand(5), torch.rand(4), generator=g)
    with pytest.raises(ValueError, match="exchanged"):
        randomized_pit(torch.tensor([0.2]), torch.tensor([0.3]), generator=g)
    with pytest.raises(ValueError, match="mass = 95"):
        ecdf_band(10, 95)


def test_coverage_needs_several_tasks() -> None:
    with pytest.raises(ValueError, match="at least 2 tasks"):
        interval_coverage(torch.rand(1, 5))


def test_values_and_masses_are_probabilities() -> None:
    with pytest.raises(ValueError, match=r"values in \[0, 1\]; got some from 0.5 to 2"):
        interval_coverage(torch.tensor([[0.5], [2.0]]))
    with pytest.raises(ValueError, match=r"masses in \(0, 1\), 0.9 for 90 %; got \(90,\)"):
        interval_coverage(torch.rand(4, 5), [90])
