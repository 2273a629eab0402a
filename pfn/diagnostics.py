"""Is a predictive distribution calibrated? Tests whose own error rates are known.

All of them start from the probability integral transform (PIT) u = F(y): if y was drawn from F, u
is uniform on [0, 1]. Queries of one task share its context, so their u depend on each other:
standard errors here are over tasks, and a test of uniformity takes one query per task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Coverage(NamedTuple):
    """How often the central interval of nominal `mass` held the truth."""

    mass: float
    fraction: float
    standard_error: float


class KolmogorovSmirnov(NamedTuple):
    """The largest distance between the empirical cdf and the nominal one, and its p-value."""

    statistic: float
    p_value: float


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
    _check_unit(pit, ndim=2)
    if len(pit) < 2:
        raise ValueError(f"Expected pit (task, query) of at least 2 tasks; got {tuple(pit.shape)}.")
    coverages = []
    for mass in masses:
        per_task = ((pit - 0.5).abs() <= mass / 2).double().mean(1)
        error = float(per_task.std()) / math.sqrt(len(pit))
        coverages.append(Coverage(mass, float(per_task.mean()), error))
    return coverages


def ks_test(pit: Tensor) -> KolmogorovSmirnov:
    """A Kolmogorov-Smirnov test that independent values are uniform on [0, 1].

    With D the largest distance between the empirical cdf and the diagonal and
    z = sqrt(n) D + 1 / (6 sqrt(n)) + (sqrt(n) D - 1) / (4 n), the p-value is
    2 sum_k (-1)^(k-1) exp(-2 k^2 z^2), within 0.003 of exact from n = 10 on.

    Args:
        pit: (n,) independent values of a continuous distribution: one query per task.

    Reference: Vrbik, Small-sample corrections to Kolmogorov-Smirnov test statistic, 2018.
    """
    _check_unit(pit, ndim=1)
    n = len(pit)
    if n == 0:
        raise ValueError("Expected at least one PIT value; got none.")
    ordered = pit.double().sort().values
    below = torch.arange(n, dtype=torch.float64, device=pit.device) / n
    statistic = float(torch.maximum(ordered - below, below + 1 / n - ordered).max())
    z = math.sqrt(n) * statistic
    z = z + 1 / (6 * math.sqrt(n)) + (z - 1) / (4 * n)
    return KolmogorovSmirnov(statistic, _kolmogorov_tail(z))


def _kolmogorov_tail(z: float) -> float:
    """P(Z > z) for Kolmogorov's distribution."""
    if z < 0.2:
        return 1.0  # to 1e-11; the series below converges slowly here
    terms = ((-1) ** (k - 1) * math.exp(-2 * (k * z) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * sum(terms)))


def _check_unit(pit: Tensor, ndim: int) -> None:
    shape = "(task, query)" if ndim == 2 else "(n,)"
    if pit.ndim != ndim:
        raise ValueError(f"Expected pit of shape {shape}; got {tuple(pit.shape)}.")
    if not bool(((pit >= 0) & (pit <= 1)).all()):
        raise ValueError(f"Expected pit values in [0, 1]; got {pit.aminmax()}.")
