"""Simulation-based calibration: does a prior's reference posterior belong to its draws?

Draw a task from the prior, show the posterior all but one observation, and ask where that one lies.
If the posterior is exact, then given the context it is one more draw from the predictive, so that
three things hold, each with a p-value whose error rate is known:

- its probability integral transform is uniform;
- so is the mass of the highest-density region that has it on its edge (expected coverage), which
  sees errors of shape that the first averages out;
- neither depends on the context: the transform does not correlate with the nearest observation. A
  posterior that ignores the data passes the first two, and fails here.

Reference: Talts, Betancourt, Simpson, Vehtari and Gelman, Validating Bayesian inference algorithms
with simulation-based calibration, arXiv 1804.06788; Modrak et al., Simulation-based calibration
checking for Bayesian computation, Bayesian Analysis 2023, for statistics that depend on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pfn.diagnostics import expected_coverage, ks_test
from priors import Prior

DRAWS = 99  # from each predictive


class Simulated(NamedTuple):
    """What one held-out observation of each task says of its predictive, (task,) each."""

    pit: Tensor  # the predictive cdf at the observation, uniform on [0, 1]
    level: Tensor  # the mass of the highest-density region with the observation on its edge
    nearest: Tensor  # the observation of the context that is nearest in x; 0 where there is none


class Verdict(NamedTuple):
    """p-values of the three tests: small ones say that the posterior is not the prior's."""

    pit: float
    level: float
    dependence: float

    @property
    def worst(self) -> float:
        return min(self)


def simulate(
    prior: Prior,
    tasks: int,
    n: int,
    d: int,
    *,
    seed: int = 0,
    posterior: Callable[[Tensor, Tensor, Tensor], Distribution] | None = None,
    group: int = 50,
) -> Simulated:
    """Simulates `tasks` tasks of `n` observations and one more, in `d` features.

    Args:
        posterior: maps x (b, n, d), y (b, n) and x_query (b, 1, d) to predictives of batch_shape
            (b, 1); by default the prior's own.
        group: tasks in one call of the posterior.

    Raises:
        ValueError: without any task.
    """
    if tasks < 1:
        raise ValueError(f"Expected at least 1 task; got {tasks}.")
    if posterior is None:
        known: Any = prior
        posterior = lambda x, y, x_query: known.posterior((x, y), x_query)  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, tasks, group):
        count = min(group, tasks - start)
        drawn = prior.sample(count, n + 1, d, generator=generator)
        x, y = drawn.x[:, :n], drawn.y[:, :n]
        predictive = posterior(x, y, drawn.x[:, n:])
        held_out = drawn.y[:, n:]
        with torch.random.fork_rng(devices=[]):  # torch's distributions draw from the global state
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            others = predictive.log_prob(predictive.sample(torch.Size([DRAWS]))).squeeze(-1)
        ours = predictive.log_prob(held_out).squeeze(-1)
        level = expected_coverage(others, ours, generator=generator)
        pit = predictive.cdf(held_out).squeeze(-1).clamp(0, 1)
        parts.append((pit, level, nearest_observation(x, y, drawn.x[:, n:])))
    return Simulated(*(torch.cat(column) for column in zip(*parts, strict=True)))


def judge(simulated: Simulated) -> Verdict:
    """The three tests of one simulation."""
    n = len(simulated.pit)
    varies = bool((simulated.nearest != simulated.nearest[0]).any())
    correlation = _rank_correlation(simulated.pit, simulated.nearest) if varies else 0.0
    tail = math.erfc(abs(correlation) * math.sqrt((n - 1) / 2)) if n > 1 else 1.0
    return Verdict(ks_test(simulated.pit).p_value, ks_test(simulated.level).p_value, tail)


def nearest_observation(x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
    """The observation (task,) of each context whose input is nearest to the query's."""
    if not x.shape[1]:
        return y.new_zeros(len(y))
    index = (x - x_query).square().sum(-1).argmin(1, keepdim=True)
    return y.gather(1, index).squeeze(1)


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; of n independent pairs its variance is 1 / (n - 1)."""
    ranks = [value.argsort().argsort().double() for value in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
