"""The rest of a learning curve as a posterior: its predictive at each step, and joint draws.

`MetricPredictive` maps what the network says of y to a metric; `Curve` is one for each remaining
step, with what they say together. Read `metrics.py` for the map, `extrapolation.py` for how the
network is asked.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.types import _size

from pfn import Predictive
from surrogates.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

# normal scores at which each marginal is tabulated, and their probabilities
SCORES = torch.linspace(-5.0, 5.0, 161, dtype=torch.float64)
_ENDS = torch.special.ndtr((SCORES[1:] + SCORES[:-1]) / 2)
WEIGHTS = torch.diff(_ENDS, prepend=_ENDS.new_zeros(1), append=_ENDS.new_ones(1))
EDGE = 1e-4  # y of an unbounded metric this near to its open end is the end
DIVERGED = 0.1  # y below which an unbounded metric has diverged: a loss of 9 times the first
DRAWS = 1024  # of the rest of a curve, behind joint probabilities
MEMORY, COMMON = 0.25, 0.6  # of the copula of remaining steps, see `Curve`


class MetricPredictive(Predictive):
    """Predictives of a metric: mixtures of normals in y, mapped to the metric and kept in bounds.

    The mixture is censored at the ends of the y that the metric can take: what lies beyond, which
    is the network's own noise, counts as the end, so that all values are within the metric's bounds
    and an end may have a probability of its own. Quantiles are mapped, and swapped where lower is
    better; moments, entropy and expected improvement are means of mapped quantiles. Where a metric
    is unbounded on its bad side, the moments are those of runs that do not diverge, unless most do:
    a mean over losses without limit would say nothing of the rest. See `prob_diverged`.

    Args:
        marginals: of y, as the network gives them.
        metric: the map.
    """

    def __init__(self, marginals: Predictive, metric: Metric) -> None:
        parts = (marginals.log_weights, marginals.means, marginals.stds)
        super().__init__(*(part.double() for part in parts), validate_args=False)
        self.metric, self._y = metric, Predictive(*parts, validate_args=False)
        open_below = not math.isfinite(metric.bottom)
        open_above = not math.isfinite(metric.top)
        self._ends = (EDGE if open_below else 0.0, 1 - EDGE if open_above else 1.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, {self.metric})"

    def _with(self, log_weights: Tensor, means: Tensor, stds: Tensor) -> Predictive:
        inner = Predictive(log_weights, means, stds, validate_args=False)
        return MetricPredictive(inner, self.metric)

    def affine(self, loc: float | Tensor, scale: float | Tensor) -> Predictive:
        """Not offered: a metric has its own units and bounds."""
        raise ValueError("Expected no affine map of a metric; extrapolate other values instead.")

    @property
    def mode(self) -> Tensor:
        """The tabulated quantile at which the density of the metric is highest."""
        values = self._table
        return values.gather(0, self.log_prob(values).argmax(0, keepdim=True)).squeeze(0)

    def prob_diverged(self) -> Tensor:
        """P(y < 0.1), a loss of nine times the first, say; 0 where the bad side is bounded."""
        if math.isfinite(self.metric.bottom):
            return torch.zeros(self.batch_shape, dtype=torch.float64)
        return self._of_y(torch.tensor(DIVERGED, dtype=torch.float64))

    def entropy(self) -> Tensor:
        """-E[log density] in nats, of the metric in its units."""
        return -(self._shares() * self.log_prob(self._table)).sum(0)

    def crps(self, value: ArrayLike | Tensor) -> Tensor:
        """E|v - value| - E|v - v'| / 2, lower is better."""
        table, weights = self._table, self._shares()
        if self.metric.sign < 0:
            table, weights = table.flip(0), weights.flip(0)
        apart = 2 * (weights * (2 * weights.cumsum(0) - weights - 1) * table).sum(0)
        to_value = (weights * (table - self._checked(value)).abs()).sum(0)
        return self._out(to_value - apart / 2)

    # what the rest of a `Predictive` is derived from, in values of the metric

    @functools.cached_property
    def _table(self) -> Tensor:
        """Values (score, ...) at the quantiles of y that have the normal scores `SCORES`."""
        return self.metric.decode(self._y_table)

    @functools.cached_property
    def _y_table(self) -> Tensor:
        levels = torch.special.ndtr(SCORES)
        return self._y_at(levels.reshape(-1, *[1] * len(self.batch_shape)))

    def _y_at(self, probability: Tensor) -> Tensor:
        """Quantiles of y within its ends."""
        return self._y._solve(probability.clamp(1e-15, 1 - 1e-15)).clamp(*self._ends)

    def _of_y(self, y: Tensor, *, strictly: bool = False) -> Tensor:
        """P(Y <= y) of the censored mixture, or P(Y < y)."""
        low, high = self._ends
        inside = self._y._tail(y.clamp(low, high)).clamp(0, 1)
        none, all_ = (y <= low, y > high) if strictly else (y < low, y >= high)
        return torch.where(none, 0.0, torch.where(all_, 1.0, inside))

    def _log_q(self, value: Tensor) -> Tensor:
        """Between the ends, and at them that of the mixture; -inf beyond."""
        y = self.metric.place(value)
        inside = y.clamp(*self._ends)
        log_q = self._y._log_q(inside) + self.metric.log_slope(inside)
        return log_q.masked_fill((y < 0) | (y > 1) | ~value.isfinite(), -math.inf)

    def _tail(self, value: Tensor, side: float | Tensor = 1.0) -> Tensor:
        y = self.metric.place(value)  # V <= value is Y <= y, or Y >= y where lower is better
        below = self._of_y(y) if self.metric.sign > 0 else 1 - self._of_y(y, strictly=True)
        side = torch.as_tensor(side, dtype=torch.float64)
        return torch.where(side > 0, below, 1 - below)

    def _solve(self, p: Tensor) -> Tensor:
        return self.metric.decode(self._y_at(p if self.metric.sign > 0 else 1 - p))

    def _implicit(self, y: Tensor, p: Tensor | None = None) -> Tensor:
        return y

    def _draw(self, sample_shape: _size, generator: torch.Generator | None) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator)
        return self.metric.decode(self._y_at(uniform))

    def _shares(self) -> Tensor:
        """Probabilities of the tabulated values, (score, 1, ...)."""
        return WEIGHTS.reshape(-1, *[1] * len(self.batch_shape))

    def _weights(self) -> Tensor:
        """Of the tabulated values in moments (score, ...): of runs that do not diverge, if most."""
        weights = self._shares().expand_as(self._y_table)
        if math.isfinite(self.metric.bottom):
            return weights
        kept = weights * (self._y_table >= DIVERGED)
        share = kept.sum(0)
        return torch.where(share >= 0.5, kept / share.clamp_min(0.5), weights)

    def _mean(self) -> Tensor:
        return (self._weights() * self._table).sum(0)

    def _variance(self) -> Tensor:
        return (self._weights() * (self._table - self._mean()).square()).sum(0)

    def _log_improvement(self, best: float | Tensor, maximize: bool) -> Tensor:
        gain = self._table - self._checked(best)
        gain = (gain if maximize else -gain).clamp_min(0)
        gain = (self._shares() * gain).sum(0)
        return gain.clamp_min(torch.finfo(torch.float64).tiny).log()


class TimeTo(NamedTuple):
    """When a curve first reaches a value: a distribution over its remaining steps, or never."""

    steps: Tensor  # (rest,)
    probabilities: Tensor  # (rest,) of each step to be the first
    never: float  # probability that it does not happen up to the horizon

    def cdf(self, step: float) -> float:
        """P(reached at or before a step)."""
        return float(self.probabilities[self.steps <= step].sum())

    @property
    def median(self) -> float:
        """The first step by which it is as likely as not; infinite if there is none."""
        reached = self.probabilities.cumsum(0) >= 0.5
        return float(self.steps[reached][0]) if bool(reached.any()) else math.inf


class Curve(MetricPredictive):
    """The rest of a learning curve, batch_shape (rest,), in the metric's units.

    Its marginals are the network's. Together, two steps s < t are related by a normal copula. A
    value's normal score is sqrt(r) u + sqrt(1 - r) e: u of the noise-free curve, e of the noise,
    and r the curve's share in the variance. The scores u are correlated by (v_s / v_t)^MEMORY,
    where v is the noise-free variance, which grows with time: 0 would be curves that keep their
    rank for ever, 1/2 curves with independent increments. The scores e are correlated by COMMON:
    heavy tails are noise of unknown size, which all steps share. Tests check what
    follows, whether the best of the rest beats a value, on draws of the prior.

    Attributes:
        steps: (rest,) of the predictives.
        grid: all steps that remain; more than `steps` where only some were asked for.
        values, seen: what was observed, and its steps.
        horizon: the last step.
    """

    def __init__(
        self,
        marginals: Predictive,
        noise_free: Predictive,
        metric: Metric,
        steps: Tensor,
        values: Tensor,
        seen: Tensor,
        horizon: float,
        grid: Tensor | None = None,
    ) -> None:
        super().__init__(marginals, metric)
        self.steps, self.values, self.seen, self.horizon = steps, values, seen, horizon
        self.grid = steps if grid is None else grid
        variance = noise_free.variance.clamp_min(1e-18)
        self._share = (variance / marginals.variance).clamp(0, 1)
        clock = variance.cummax(0).values if len(steps) else variance
        self._clock = clock ** (2 * MEMORY)

    def sample_paths(self, n: int, *, seed: int = 0) -> Tensor:
        """Joint draws (n, rest) of the metric at the remaining steps."""
        return self.metric.decode(self._paths(n, seed))

    def prob_best(self, best: float, *, min_delta: float = 0.0) -> float:
        """P(the best of the remaining values is better than `best` by more than `min_delta`)."""
        if not math.isfinite(best) or min_delta < 0:
            raise ValueError(f"Expected a finite best and min_delta >= 0; got {best}, {min_delta}.")
        if not len(self.steps):
            return 0.0
        level = best + self.metric.sign * min_delta
        return 1 - float(self._none_above(self.metric.place(torch.tensor([level]).double())))

    def quantile_best(self, p: float) -> float:
        """What the best of the remaining values is no better than with probability p in (0, 1)."""
        if not 0 < p < 1:
            raise ValueError(f"Expected a probability between 0 and 1; got {p}.")
        self._check_rest()
        low, high = self._ends
        for _ in range(16):
            y = (low + high) / 2
            if float(self._none_above(torch.tensor([y], dtype=torch.float64))) < p:
                low = y
            else:
                high = y
        return float(self.metric.decode(torch.tensor(high, dtype=torch.float64)))

    def _none_above(self, y: Tensor) -> Tensor:
        """P(no remaining y is above a level), for levels (k,)."""
        worse = self._of_y(y.unsqueeze(-1)).clamp(1e-15, 1 - 1e-15)  # (k, rest) marginally
        worse = self._between(torch.special.ndtri(worse)).float()
        shared, noise = self._joint
        # given what is shared all steps are independent: no more is drawn
        return torch.special.ndtr(worse.unsqueeze(1) / noise - shared).prod(-1).mean(-1)

    @functools.cached_property
    def _joint(self) -> tuple[Tensor, Tensor]:
        """Draws (DRAWS, grid) of what steps share, in units of what they do not, (grid,)."""
        share, clock = self._between(torch.stack([self._share, self._clock])).float()
        normals = _normals(1 << len(self.grid).bit_length())
        shared = _shared_scores(share, clock, normals[:, 1 : 1 + len(self.grid)], normals[:, :1])
        noise = ((1 - share) * (1 - COMMON)).sqrt().clamp_min(1e-6)
        return shared / noise, noise

    def prob_above(self, value: float) -> float:
        """P(the value at the horizon is above `value`), or below it where lower is better."""
        self._check_rest()
        _check_value(value)
        return float(self[-1].probability_of_improvement(value, maximize=self.metric.sign > 0))

    def time_to(self, value: float) -> TimeTo:
        """When the metric first is at least as good as `value`, among the curve's steps.

        Raises:
            ValueError: NaN, or no steps that remain.
        """
        _check_value(value)
        self._check_rest()
        sign, count = self.metric.sign, len(self.steps)
        reached = sign * self.sample_paths(DRAWS) >= sign * value  # (draw, rest)
        first = reached.double().argmax(-1)[reached.any(-1)]
        share = torch.bincount(first, minlength=count).double() / DRAWS
        return TimeTo(self.steps, share, 1 - float(share.sum()))

    def plot(self, ax: Axes | None = None, *, best: float | None = None) -> Axes:  # type: ignore[override]
        """The Axes with the values seen, and median, 50 % and 90 % intervals of the rest."""
        from surrogates.curve_plots import plot_curve

        return plot_curve(self, ax, best=best)

    def _check_rest(self) -> None:
        if not len(self.steps):
            raise ValueError("Expected steps that remain; the curve is at its horizon.")

    def _paths(self, n: int, seed: int) -> Tensor:
        """Joint draws (n, rest) of y."""
        if n < 1:
            raise ValueError(f"Expected n >= 1 paths; got {n}.")
        generator = torch.Generator().manual_seed(seed)
        count = len(self.steps)
        normals = torch.randn(n, 2 * count + 1, dtype=torch.float64, generator=generator)
        common, walk, noise = normals.split([1, count, count], 1)
        shared = _shared_scores(self._share, self._clock, walk, common)
        scores = shared + ((1 - self._share) * (1 - COMMON)).sqrt() * noise
        where = (scores - SCORES[0]) / (SCORES[1] - SCORES[0])
        low = where.floor().clamp(0, len(SCORES) - 2).long()
        table = self._y_table.T  # (rest, score)
        rows = torch.arange(count)
        below, above = table[rows, low], table[rows, low + 1]
        y = below + (where - low).clamp(0, 1) * (above - below)
        return y.clamp(*self._ends)

    def _between(self, values: Tensor) -> Tensor:
        """Values (..., rest) at the steps, interpolated to all of the grid."""
        if len(self.grid) == len(self.steps):
            return values
        after = torch.searchsorted(self.steps, self.grid).clamp(1, len(self.steps) - 1)
        low, high = self.steps[after - 1], self.steps[after]
        share = (self.grid - low) / (high - low)
        return torch.lerp(values[..., after - 1], values[..., after], share)


def _check_value(value: float) -> None:
    if math.isnan(value):
        raise ValueError(f"Expected a number to compare with; got {value}.")


def _shared_scores(share: Tensor, clock: Tensor, walk: Tensor, common: Tensor) -> Tensor:
    """What steps share of their normal scores, (n, rest): the curve's and common noise.

    Args:
        share: (rest,) of the curve in the variance of a value.
        clock: (rest,), by which the curve's scores walk.
        walk, common: (n, rest) and (n, 1) standard normal.
    """
    each = torch.diff(clock, prepend=clock.new_zeros(1)).clamp_min(0).sqrt()
    curve = (each * walk).cumsum(-1) / clock.sqrt()
    return share.sqrt() * curve + ((1 - share) * COMMON).sqrt() * common


@functools.lru_cache(8)
def _normals(size: int) -> Tensor:
    """The draws (DRAWS, 1 + size) behind joint probabilities, quasi-random, in single precision."""
    sobol = torch.quasirandom.SobolEngine(1 + size, scramble=True, seed=0)
    uniform = sobol.draw(DRAWS, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).float()
