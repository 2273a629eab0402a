"""Pareto-smoothed importance weights: how far a sum over weighted draws can be trusted.

The largest weights follow a generalised Pareto distribution, whatever the proposal. Its shape k
says how many moments the weights have: below 0.5 a variance, above 1 not even a mean. Replacing
the largest weights by the quantiles of the fitted distribution makes sums over them stable, and
useful up to k = 0.7.

Reference: Vehtari, Simpson, Gelman, Yao and Gabry, Pareto Smoothed Importance Sampling, JMLR 25,
2024, arXiv 1507.02646.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FEWEST = 5  # weights in a tail that is fitted
PRIOR_DRAWS = 10  # that a weak prior of k = 0.5 counts for


class Smoothed(NamedTuple):
    """Log weights with a smoothed tail, and the shape k of that tail."""

    log_weights: Tensor  # (draw,)
    k: float


class Pareto(NamedTuple):
    """The generalised Pareto distribution P(X > x) = (1 + k x / scale)^(-1 / k), x > 0."""

    k: float
    scale: float

    def quantile(self, level: Tensor) -> Tensor:
        """The x that is exceeded with probability 1 - level; an exponential's at k = 0."""
        log_rest = torch.log1p(-level)
        if self.k == 0:
            return -self.scale * log_rest
        return self.scale * torch.expm1(-self.k * log_rest) / self.k


def smooth(log_weights: Tensor) -> Smoothed:
    """The weights (draw,) with their min(S / 5, 3 sqrt(S)) largest smoothed, and the Pareto k.

    Weights that are all equal have no tail, k = -inf. Fewer than `FEWEST` large ones say nothing
    about it: they stay as they are, with k = inf.

    Args:
        log_weights: up to a constant; -inf for a weight of zero.

    Example:
        >>> x = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> smooth(0.5 * x.square() - 0.5 * (x / 0.5).square()).k < 0  # a bounded ratio
        True
    """
    largest = log_weights.max()
    if bool((log_weights == largest).all()):
        return Smoothed(log_weights, -math.inf if bool(largest > -math.inf) else math.inf)
    count = min(len(log_weights) // 5, math.ceil(3 * math.sqrt(len(log_weights))))
    order = log_weights.argsort()
    tail = order[len(order) - count :]
    edge = log_weights[order[-count - 1]] - largest
    excess = (log_weights[tail] - largest).exp() - edge.exp()
    excess = excess[excess > 0]
    if len(excess) < FEWEST:
        return Smoothed(log_weights, math.inf)
    tail = tail[-len(excess) :]
    fitted = fit_pareto(excess)
    level = (torch.arange(len(excess)).to(excess) + 0.5) / len(excess)
    expected = (edge.exp() + fitted.quantile(level)).clamp_max(1)  # none above the largest
    smoothed = log_weights.clone()
    smoothed[tail] = largest + expected.log()
    return Smoothed(smoothed, fitted.k)


def largest_trusted(draws: int) -> float:
    """The k above which a sum over this many weighted draws is not to be trusted, at most 0.7.

    Reference: min(1 - 1 / log10(S), 0.7), section 3.2 of the paper.
    """
    return min(1 - 1 / math.log10(max(2, draws)), 0.7)


def is_trusted(smoothed: Smoothed) -> bool:
    """Whether k is no larger than a sum over these weights allows."""
    return smoothed.k <= largest_trusted(len(smoothed.log_weights))


def effective_draws(log_weights: Tensor) -> float:
    """(sum w)^2 / sum w^2: so many equally weighted draws say as much."""
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp())


def fit_pareto(excess: Tensor) -> Pareto:
    """The generalised Pareto distribution of sorted, positive values (value,).

    The posterior mean of theta = -k / scale under a prior that the data suggest, by quadrature, and
    from it k and scale; k is then drawn towards 0.5 as if by `PRIOR_DRAWS` further values.

    Reference: Zhang and Stephens, A new and efficient estimation method for the generalized Pareto
    distribution, Technometrics 51, 2009, with the sign of k changed; the weak prior of k as in the
    paper above.
    """
    count = len(excess)
    points = 30 + math.isqrt(count)
    index = torch.arange(1, points + 1).to(excess)
    quartile = excess[int(count / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - (points / (index - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta.unsqueeze(-1) * excess).mean(-1)
    log_likelihood = count * ((-theta / k).log() - k - 1)
    mean = (log_likelihood.softmax(0) * theta).sum()
    k = torch.log1p(-mean * excess).mean()
    scale = -k / mean
    k = (count * k + PRIOR_DRAWS * 0.5) / (count + PRIOR_DRAWS)
    return Pareto(float(k), float(scale))
