"""Is a posterior calibrated? Tests whose own error rates are known.

Each compares the truth of a simulated task with what a posterior said of it, as one number u in
[0, 1] that is uniform if the posterior is exact:

- where the truth lies in a one-dimensional predictive: its cdf there, the probability integral
  transform (PIT), `randomized_pit` if the predictive has atoms;
- where the truth, or any statistic of truth and data, ranks among draws: `sbc_ranks`;
- how much mass has a higher density than the truth: `expected_coverage`;
- how many draws are closer to a reference point than the truth: `tarp_coverage`.

`ecdf_test` or `ks_test` then asks whether the u of many tasks are uniform, and `ecdf_band` draws
the answer. Both need independent values. Queries of one task share its context, and statistics of
one task its truth, so take one value per task. `interval_coverage` takes all queries: its standard
errors are over tasks.

A posterior that returns the prior passes every test whose statistic ignores the data. Choose a
statistic that looks at both, such as the log likelihood, or reference points that are data.

`simulation.py` applies these to a prior's own posterior; `coherence.py` asks whether predictives
of different data sets belong to one model, which needs no truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRID = 100  # cells of [0, 1]
EDGES = np.arange(1, GRID) / GRID  # between them, where bands are evaluated


class Coverage(NamedTuple):
    """How often the central interval of nominal `mass` held the truth."""

    mass: float
    fraction: float
    standard_error: float


class KolmogorovSmirnov(NamedTuple):
    """The largest distance between the empirical cdf and the nominal one, and its p-value."""

    statistic: float
    p_value: float


class EcdfTest(NamedTuple):
    """The smallest p-value of the empirical cdf at any one edge of the grid, and that of all."""

    statistic: float
    p_value: float


class EcdfBand(NamedTuple):
    """A simultaneous band: an exact posterior's empirical cdf stays within it with its mass."""

    edges: Tensor  # (99,) 0.01, 0.02, ...
    lower: Tensor  # (99,) the least share of values <= edge that is inside
    upper: Tensor  # (99,) the largest


def randomized_pit(cdf: Tensor, cdf_below: Tensor, *, generator: torch.Generator) -> Tensor:
    """u = F(y-) + V (F(y) - F(y-)), with V uniform: uniform also where F jumps.

    Args:
        cdf: F(y) = P(Y <= y) at the truths, any shape.
        cdf_below: F(y-) = P(Y < y), the same shape; equal to `cdf` where F is continuous.

    Reference: Smith, Diagnostic checks of non-standard time series models, Journal of Forecasting
    1985; Czado, Gneiting and Held, Predictive model assessment for count data, Biometrics 2009.
    """
    if cdf.shape != cdf_below.shape:
        raise ValueError(
            f"Expected cdf and cdf_below of one shape; got {tuple(cdf.shape)} and"
            f" {tuple(cdf_below.shape)}."
        )
    _check_unit(cdf)
    _check_unit(cdf_below)
    if not bool((cdf_below <= cdf).all()):
        raise ValueError("Expected cdf_below <= cdf; are they exchanged?")
    return cdf_below + _uniform(cdf, generator) * (cdf - cdf_below)


def sbc_ranks(draws: Tensor, truth: Tensor, *, generator: torch.Generator) -> Tensor:
    """u = (r + U) / (L + 1): the rank r of the truth among L draws, U uniform, ties at random.

    Truth and draws of an exact posterior are exchangeable given the data, so that u is uniform
    whatever L is. Without U it has L + 1 values, and a continuous test rejects exact posteriors.

    Args:
        draws: (draw, task, ...) independent posterior draws, or a statistic of them and the data.
        truth: (task, ...) what each task was simulated from, or the same statistic of it.

    Returns:
        (task, ...) values in [0, 1]; uniform for each statistic, dependent within a task.

    Reference: Talts, Betancourt, Simpson, Vehtari and Gelman, Validating Bayesian inference
    algorithms with simulation-based calibration, arXiv 1804.06788, theorem 1; Modrak et al.,
    Simulation-based calibration checking for Bayesian computation, Bayesian Analysis 2023, for
    statistics that depend on the data.
    """
    if not len(draws.shape) or draws.shape[1:] != truth.shape or not len(draws):
        raise ValueError(
            "Expected draws (draw, task, ...) for truth (task, ...), with at least one draw; got"
            f" {tuple(draws.shape)} and {tuple(truth.shape)}."
        )
    if bool(draws.isnan().any()) or bool(truth.isnan().any()):
        raise ValueError("Expected draws and truth without NaN, which has no rank.")
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return (below + _uniform(truth, generator) * (1 + equal)) / (len(draws) + 1)


def expected_coverage(
    draws_log_prob: Tensor, truth_log_prob: Tensor, *, generator: torch.Generator
) -> Tensor:
    """The mass (task,) of the highest-density region of q that has the truth on its edge.

    It is the share of draws from q that are denser than the truth: ranks of log q. The share of
    tasks with a value <= m is the coverage of regions of mass m. Sees errors of shape that average
    out in marginal ranks; not a posterior that ignores the data.

    Args:
        draws_log_prob: (draw, task) log q(draw | data) at draws from q itself.
        truth_log_prob: (task,) log q(truth | data).

    Reference: Hermans et al., A trust crisis in simulation-based inference?, TMLR 2022.
    """
    return 1 - sbc_ranks(draws_log_prob, truth_log_prob, generator=generator)


def tarp_coverage(
    draws: Tensor, truth: Tensor, references: Tensor, *, generator: torch.Generator
) -> Tensor:
    """The share (task,) of posterior draws that are closer to a reference point than the truth.

    Uniform for an exact posterior, whatever function of the data the references are; if uniform for
    all such functions, the posterior is exact. Test these values themselves: expected coverage on
    a grid of levels is no sample, and a two-sample test of it against the levels never rejects.

    Args:
        draws: (draw, task, dim); scale the dimensions alike, distances are Euclidean.
        truth: (task, dim).
        references: (task, dim) a function of each task's data, of random numbers, or of both, never
            of truth or draws. Without the data they let a posterior pass that ignores the data.

    Reference: Lemos, Coogan, Hezaveh and Perreault-Levasseur, Sampling-based accuracy testing of
    posterior estimators for general inference, ICML 2023.
    """
    if truth.ndim != 2 or draws.shape[1:] != truth.shape or references.shape != truth.shape:
        raise ValueError(
            "Expected draws (draw, task, dim), truth and references (task, dim); got"
            f" {tuple(draws.shape)}, {tuple(truth.shape)} and {tuple(references.shape)}."
        )
    theirs, ours = (torch.linalg.vector_norm(at - references, dim=-1) for at in (draws, truth))
    return sbc_ranks(theirs, ours, generator=generator)


def interval_coverage(
    pit: Tensor, masses: Sequence[float] = (0.5, 0.8, 0.9, 0.95)
) -> list[Coverage]:
    """The share of truths inside each central interval, |u - 1/2| <= mass / 2.

    Args:
        pit: (task, query) values of the predictive cdf at the truth; tasks independent, at least 2.
        masses: nominal probabilities of the intervals.

    Returns:
        One `Coverage` per mass; its standard error is that of a mean over tasks, valid however the
        queries of a task depend on each other.
    """
    if pit.ndim != 2 or len(pit) < 2:
        raise ValueError(f"Expected pit (task, query) of at least 2 tasks; got {tuple(pit.shape)}.")
    _check_unit(pit)
    if not all(0 < mass < 1 for mass in masses):
        raise ValueError(f"Expected masses in (0, 1), 0.9 for 90 %; got {tuple(masses)}.")
    coverages = []
    for mass in masses:
        per_task = ((pit - 0.5).abs() <= mass / 2).double().mean(1)
        error = float(per_task.std()) / math.sqrt(len(pit))
        coverages.append(Coverage(mass, float(per_task.mean()), error))
    return coverages


def ks_test(values: Tensor) -> KolmogorovSmirnov:
    """A Kolmogorov-Smirnov test that independent values are uniform on [0, 1].

    With D the largest distance between the empirical cdf and the diagonal and
    z = sqrt(n) D + 1 / (6 sqrt(n)) + (sqrt(n) D - 1) / (4 n), the p-value is
    2 sum_k (-1)^(k-1) exp(-2 k^2 z^2), within 0.003 of exact from n = 10 on.

    Args:
        values: (n,) independent values of a continuous distribution: one per task.

    Reference: Vrbik, Small-sample corrections to Kolmogorov-Smirnov test statistic, 2018.
    """
    n = _check_sample(values)
    ordered = values.double().sort().values
    below = torch.arange(n, dtype=torch.float64, device=values.device) / n
    statistic = float(torch.maximum(ordered - below, below + 1 / n - ordered).max())
    z = math.sqrt(n) * statistic
    z = z + 1 / (6 * math.sqrt(n)) + (z - 1) / (4 * n)
    return KolmogorovSmirnov(statistic, _kolmogorov_tail(z))


def ecdf_test(values: Tensor) -> EcdfTest:
    """A test that independent values are uniform on [0, 1], as sensitive in the tails as between.

    The number of values <= z is Binomial(n, z). The statistic is the smallest two-sided p-value of
    these counts, over z = 0.01, 0.02, ..., 0.99; the p-value is the probability that uniform values
    give so small a one anywhere, by an exact recursion. So p_value <= 1 - mass if and only if the
    empirical cdf leaves `ecdf_band(n, mass)`. Counts are discrete, hence rejections at level 0.05
    have a probability of at most that: 0.04 at n = 1 and 2, above 0.048 from n = 3 on.

    Errors of spread are noticed earlier than by `ks_test`, a bias equally.

    Args:
        values: (n,) independent values: one per task.

    Reference: Sailynoja, Burkner and Vehtari, Graphical test for discrete uniformity and its
    applications in goodness-of-fit evaluation and multiple sample comparison, Statistics and
    Computing 2022, the band that is adjusted by optimisation.
    """
    n = _check_sample(values)
    ordered = values.detach().double().cpu().sort().values.numpy()
    counts = np.searchsorted(ordered, EDGES, side="right")  # values <= edge
    statistic = float(_pointwise(n)[np.arange(len(EDGES)), counts].min())
    return EcdfTest(statistic, _exit_probability(n, statistic))


def ecdf_band(n: int, mass: float) -> EcdfBand:
    """The band that the empirical cdf of n independent uniform values leaves with 1 - mass.

    At each edge it is the interval of counts whose two-sided binomial p-value exceeds one level,
    the largest for which the whole band has the mass (at least, for counts are discrete). See
    `ecdf_test`. Plots show the difference to the diagonal: `band.lower - band.edges`.

    Args:
        n: number of values, at least 1.
        mass: simultaneous probability, in (0, 1).
    """
    if n < 1 or not 0 < mass < 1:
        raise ValueError(f"Expected n >= 1 and 0 < mass < 1; got n = {n} and mass = {mass}.")
    lower, upper = _interior(n, _adjusted_level(n, mass))
    return EcdfBand(torch.tensor(EDGES), torch.from_numpy(lower / n), torch.from_numpy(upper / n))


@lru_cache(maxsize=64)
def _adjusted_level(n: int, mass: float) -> float:
    """The largest pointwise level that all edges together exceed with at least the mass."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _exit_probability(n, middle) <= 1 - mass else (low, middle)
    return low


def _exit_probability(n: int, level: float) -> float:
    """P(the pointwise p-value of n uniform values is <= level at some edge).

    The counts of uniform values are those of a Poisson process of rate n, given that it ends at n:
    so its increments between edges are independent. Sums over the edge that is the first outside;
    all terms are positive, hence small probabilities are precise.
    """
    lower, upper = _interior(n, level)
    rate = n / GRID
    most = int(rate + 12 * math.sqrt(rate) + 30)  # more in one cell has a probability below 1e-30
    step = _poisson(np.arange(min(n, most) + 1), rate)
    inside, first, exits = np.ones(1), 0, 0.0
    for i, (least, largest) in enumerate(zip(lower, upper, strict=True), start=1):
        grown = np.convolve(inside, step)[: n + 1 - first]
        counts = np.arange(first, first + len(grown))
        kept = (counts >= least) & (counts <= largest)
        rest = _poisson(n - counts[~kept], n - i * rate)
        exits += float(grown[~kept] @ rest)
        if not kept.any():
            break
        inside, first = grown[kept], least
    return min(1.0, exits / float(_poisson(np.array([n]), n)[0]))


def _interior(n: int, level: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The least and the largest count at each edge whose pointwise p-value exceeds the level."""
    inside = _pointwise(n) > level
    empty = ~inside.any(1)
    lower, upper = inside.argmax(1), n - inside[:, ::-1].argmax(1)
    return np.where(empty, n + 1, lower), np.where(empty, -1, upper)


@lru_cache(maxsize=4)
def _pointwise(n: int) -> NDArray[np.float64]:
    """Two-sided p-values (edge, count) of Binomial(n, edge): 2 min(P(C <= c), P(C >= c))."""
    edge, count = EDGES[:, None], np.arange(n + 1)
    log_choose = math.lgamma(n + 1) - _log_factorial(count) - _log_factorial(n - count)
    pmf = np.exp(log_choose + count * np.log(edge) + (n - count) * np.log1p(-edge))
    below, above = pmf.cumsum(1), pmf[:, ::-1].cumsum(1)[:, ::-1]
    p_values: NDArray[np.float64] = np.minimum(1, 2 * np.minimum(below, above))
    return (p_values + p_values[::-1, ::-1]) / 2  # z and 1 - z to the last bit: ties stay ties


def _poisson(count: NDArray[np.int64], mean: float) -> NDArray[np.float64]:
    pmf: NDArray[np.float64] = np.exp(count * math.log(mean) - mean - _log_factorial(count))
    return pmf


def _log_factorial(count: NDArray[np.int64]) -> NDArray[np.float64]:
    return torch.lgamma(torch.from_numpy(count).double() + 1).numpy()


def _kolmogorov_tail(z: float) -> float:
    """P(Z > z) for Kolmogorov's distribution."""
    if z < 0.2:
        return 1.0  # to 1e-11; the series below converges slowly here
    terms = ((-1) ** (k - 1) * math.exp(-2 * (k * z) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * sum(terms)))


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform numbers in the shape and on the device of a tensor."""
    device = generator.device
    drawn = torch.rand(like.shape, dtype=torch.float64, generator=generator, device=device)
    return drawn.to(like.device)


def _check_sample(values: Tensor) -> int:
    """The number of values (n,), which lie in [0, 1]."""
    if values.ndim != 1:
        raise ValueError(
            f"Expected values of shape (n,), one per task; got shape {tuple(values.shape)}."
        )
    if not len(values):
        raise ValueError("Expected at least one value; got none.")
    _check_unit(values)
    return len(values)


def _check_unit(values: Tensor) -> None:
    if not bool(((values >= 0) & (values <= 1)).all()):
        low, high = (float(end) for end in values.aminmax())
        raise ValueError(f"Expected values in [0, 1]; got some from {low:g} to {high:g}.")
