"""The rest of a learning curve: its predictive at each step, and what its draws say together.

`extrapolate` asks the network of curves, whose prior is `priors.LearningCurves`. Read `metrics.py`
for the map between a metric and the network's units, `stopping.py` for decisions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.types import _size

import pfn
from pfn import PFN, Predictive
from pfn.transformer import Mixture
from pfn.units import FromContext
from surrogates.metrics import Bounds, Metric, check_steps, check_values, read_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, np.dtype[np.float64]]
MODEL = "curves"
# normal scores at which each marginal is tabulated, and their probabilities
SCORES = torch.linspace(-5.0, 5.0, 161, dtype=torch.float64)
_ENDS = torch.special.ndtr((SCORES[1:] + SCORES[:-1]) / 2)
WEIGHTS = torch.diff(_ENDS, prepend=_ENDS.new_zeros(1), append=_ENDS.new_ones(1))
EDGE = 1e-4  # y of an unbounded metric this near to its open end is the end
DIVERGED = 0.1  # y below which an unbounded metric has diverged: a loss of 9 times the first
DRAWS = 1024  # of the rest of a curve, behind joint probabilities
MEMORY, COMMON = 0.25, 0.6  # of the copula of remaining steps, see `Curve`
MOST_STEPS = 10_000  # steps that are predicted


class MetricPredictive(Predictive):
    """Predictives of a metric: mixtures of normals in y, mapped to the metric and kept in bounds.

    The mixture is truncated to the y that the metric can take, so all values are within its bounds.
    Quantiles are mapped, and swapped where lower is better; moments, entropy and expected
    improvement are means of mapped quantiles. Where a metric is unbounded on its bad side, the
    moments are those of runs that do not diverge, unless most do: a mean over losses without limit
    would say nothing of the rest. See `prob_diverged`.

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
        ends = torch.tensor(self._ends, dtype=torch.float64)
        below = self._y._tail(ends[0])
        above = self._y._tail(ends[1], -1.0)
        self._below, self._inside = below, (1 - below - above).clamp_min(1e-12)

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

    def crps(self, value: float | Tensor) -> Tensor:
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
        p = self._below + self._inside * probability
        return self._y._solve(p.clamp(1e-15, 1 - 1e-15)).clamp(*self._ends)

    def _of_y(self, y: Tensor) -> Tensor:
        """P(Y <= y) of the truncated mixture."""
        return ((self._y._tail(y) - self._below) / self._inside).clamp(0, 1)

    def _encode(self, value: Tensor) -> Tensor:
        return self.metric.encode(value).clamp(*self._ends)

    def _log_q(self, value: Tensor) -> Tensor:
        y = self._encode(value)
        inner = self._y._log_q(y) - self._inside.log()
        return inner + self.metric.log_slope(y)

    def _tail(self, value: Tensor, side: float | Tensor = 1.0) -> Tensor:
        y = self._encode(value)
        below = self._of_y(y)
        side = torch.as_tensor(side, dtype=torch.float64)
        return torch.where(side * self.metric.sign > 0, below, 1 - below)

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
    ) -> None:
        super().__init__(marginals, metric)
        self.steps, self.values, self.seen, self.horizon = steps, values, seen, horizon
        variance = noise_free.variance.clamp_min(1e-18)
        self._share = (variance / marginals.variance).clamp(0, 1)
        clock = (variance.cummax(0).values if len(steps) else variance) ** (2 * MEMORY)
        passed = torch.diff(clock, prepend=clock.new_zeros(1)) if len(steps) else clock
        self._moves = passed.clamp_min(0).sqrt(), clock.sqrt()

    def sample_paths(self, n: int, *, seed: int = 0) -> Tensor:
        """Joint draws (n, rest) of the metric at the remaining steps."""
        return self.metric.decode(self._paths(n, seed))

    def prob_best(self, best: float, *, min_delta: float = 0.0) -> float:
        """P(the best of the remaining values is better than `best` by more than `min_delta`)."""
        if not math.isfinite(best) or min_delta < 0:
            raise ValueError(f"Expected a finite best and min_delta >= 0; got {best}, {min_delta}.")
        if not len(self.steps):
            return 0.0
        sign = self.metric.sign
        level = torch.as_tensor(best + sign * min_delta, dtype=torch.float64)
        worse = self._tail(level, sign).clamp(1e-15, 1 - 1e-15)  # (rest,) marginally
        shared = self._scores(DRAWS, torch.Generator().manual_seed(0))
        noise = ((1 - self._share) * (1 - COMMON)).sqrt().clamp_min(1e-6)
        # given these all steps are independent: no more is drawn
        below = (torch.special.ndtri(worse) - shared) / noise
        return float(-torch.expm1(torch.special.log_ndtr(below).sum(-1)).mean())

    def prob_above(self, value: float) -> float:
        """P(the value at the horizon is above `value`), or below it where lower is better."""
        if not len(self.steps):
            raise ValueError("Expected steps that remain; the curve is at its horizon.")
        return float(self[-1].probability_of_improvement(value, maximize=self.metric.sign > 0))

    def time_to(self, value: float) -> TimeTo:
        """When the metric first is at least as good as `value`, among the remaining steps."""
        sign, count = self.metric.sign, len(self.steps)
        reached = sign * self.sample_paths(DRAWS) >= sign * value  # (draw, rest)
        first = reached.double().argmax(-1)[reached.any(-1)]
        share = torch.bincount(first, minlength=count).double() / DRAWS
        return TimeTo(self.steps, share, 1 - float(share.sum()))

    def plot(self, ax: Axes | None = None, *, best: float | None = None) -> Axes:  # type: ignore[override]
        """The Axes with the values seen, and median, 50 % and 90 % intervals of the rest."""
        from surrogates.curve_plots import plot_curve

        return plot_curve(self, ax, best=best)

    def _paths(self, n: int, seed: int) -> Tensor:
        """Joint draws (n, rest) of y."""
        if n < 1:
            raise ValueError(f"Expected n >= 1 paths; got {n}.")
        generator = torch.Generator().manual_seed(seed)
        count = len(self.steps)
        shared = self._scores(n, generator)
        noise = torch.randn(n, count, dtype=torch.float64, generator=generator)
        scores = shared + ((1 - self._share) * (1 - COMMON)).sqrt() * noise
        where = (scores - SCORES[0]) / (SCORES[1] - SCORES[0])
        low = where.floor().clamp(0, len(SCORES) - 2).long()
        table = self._y_table.T  # (rest, score)
        rows = torch.arange(count)
        below, above = table[rows, low], table[rows, low + 1]
        y = below + (where - low).clamp(0, 1) * (above - below)
        return y.clamp(*self._ends)

    def _scores(self, n: int, generator: torch.Generator) -> Tensor:
        """What steps share of their normal scores, (n, rest): the curve's and common noise.

        The curve's are a walk by the clock of its variance.
        """
        each, total = self._moves
        steps = torch.randn(n, len(self.steps), dtype=torch.float64, generator=generator)
        common = torch.randn(n, 1, dtype=torch.float64, generator=generator)
        walk = (each * steps).cumsum(-1) / total
        return self._share.sqrt() * walk + ((1 - self._share) * COMMON).sqrt() * common


def extrapolate(
    values: Any,
    horizon: float,
    steps: Sequence[float] | None = None,
    mode: str = "max",
    bounds: Bounds | None = None,
    *,
    model: str | PFN = MODEL,
) -> Curve:
    """The posterior of the rest of a learning curve, from its beginning.

    Args:
        values: (n,) of a metric, in order of time; NaN and infinities are a divergence. None, n =
            0, gives the prior predictive.
        horizon: the step at which the training would end; it informs the answer, since schedules
            and users adapt to it.
        steps: (n,) of the values, by default 1 to n: epochs, iterations or examples, at any
            spacing. Those that remain then go on at the median spacing, up to the horizon.
        mode: "max" where higher is better, or "min".
        bounds: (low, high) of the metric, None where there is none. By default [0, 1] for a metric
            to be maximised whose values lie there, 0 below for one to be minimised that is never
            negative, and none otherwise; see `metrics.py`.
        model: a network of learning curves.

    Returns:
        A `Curve` of batch_shape (horizon - n,) at the steps that remain.

    Raises:
        ValueError: values, steps, horizon, mode or bounds that do not fit each other.

    Example:
        >>> curve = extrapolate([0.3, 0.5, 0.6, 0.66, 0.69], horizon=50)
        >>> curve.batch_shape, curve.prob_above(0.75) > curve.prob_above(0.95)
        (torch.Size([45]), True)
    """
    array = check_values(values)
    seen = check_steps(steps, len(array), horizon)
    metric = read_metric(array, mode, bounds)
    rest = remaining_steps(seen, float(horizon))
    network = load(model) if isinstance(model, str) else model
    marginals, noise_free = ask(network, metric, array, seen, rest, float(horizon))
    return Curve(
        marginals,
        noise_free,
        metric,
        torch.from_numpy(rest),
        torch.from_numpy(array),
        torch.from_numpy(seen),
        float(horizon),
    )


def surprise(
    values: Any,
    horizon: float,
    steps: Sequence[float] | None = None,
    mode: str = "max",
    bounds: Bounds | None = None,
    *,
    model: str | PFN = MODEL,
) -> float:
    """The p-value of a curve under the prior: small where it is none that the network knows.

    Fisher's combination of the two-sided tail probabilities of each value given those before it:
    minus twice the sum of their n logarithms is chi-squared with 2 n degrees of freedom, if the
    curve is a draw of the prior and the network its posterior. Arguments are those of
    `extrapolate`.
    """
    array = check_values(values)
    seen = check_steps(steps, len(array), horizon)
    network = load(model) if isinstance(model, str) else model
    keep = thin(len(array), network.card.max_context)
    y = read_metric(array, mode, bounds).encode(torch.from_numpy(array))[keep].float()[None]
    x = torch.from_numpy(seen / horizon)[keep].float()[None, :, None]
    with torch.inference_mode():
        nothing = network.transformer.encode(x[:, :0], y[:, :0])
        before = torch.arange(len(keep))  # what each value is predicted from
        told = network.transformer.decode(nothing, x, buffer=(x, y), visible=before)
        below = _predictive(network.transformer.mixture_y(told)).cdf(y[0].double())
    tails = (2 * torch.minimum(below, 1 - below)).clamp(1e-12, 1)
    count = torch.tensor(float(len(keep)), dtype=torch.float64)
    return float(torch.special.gammaincc(count, -tails.log().sum())) if len(keep) else 1.0


def ask(
    network: PFN, metric: Metric, values: Array, seen: Array, rest: Array, horizon: float
) -> tuple[Predictive, Predictive]:
    """Predictives (rest,) of y and of the noise-free curve, of one pass through the network."""
    y = metric.encode(torch.from_numpy(values))
    keep = thin(len(y), network.card.max_context)
    x = torch.from_numpy(seen / horizon)[keep]
    times = torch.from_numpy(rest / horizon)
    with torch.inference_mode():
        told, _ = network.transformer.answer(
            x.float()[None, :, None],
            y.float()[None, keep],
            None,
            FromContext(),
            times.float()[None, :, None],
        )
        y_rest, f_rest = network.transformer.mixture_y(told), network.transformer.mixture_f(told)
    return _predictive(y_rest), _predictive(f_rest)


def _predictive(mixture: Mixture) -> Predictive:
    """The only task's mixtures, in float64 and free of inference mode."""
    log_weights, means, log_stds = (part[0].double().clone() for part in mixture)
    return Predictive(log_weights, means, log_stds.exp(), validate_args=False)


@functools.lru_cache(4)
def load(name: str) -> PFN:
    """The network of a name, read once."""
    return pfn.load(name)


def remaining_steps(seen: Array, horizon: float) -> Array:
    """Steps after the last one seen, at the spacing so far, up to the horizon and with it.

    Raises:
        ValueError: more than `MOST_STEPS`.
    """
    last = seen[-1] if len(seen) else 0.0
    apart = float(np.median(np.diff(seen, prepend=0.0))) if len(seen) else 1.0
    count = math.floor((horizon - last) / apart + 1e-9)
    if count > MOST_STEPS:
        raise ValueError(
            f"Expected at most {MOST_STEPS} remaining steps; got {count}, one every {apart:g} up to"
            f" {horizon:g}. Pass wider spaced values and their steps."
        )
    rest = last + apart * np.arange(1.0, count + 1)
    if horizon - (rest[-1] if count else last) > 1e-6 * apart:
        rest = np.append(rest, horizon)
    return rest.clip(max=horizon)


def thin(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count` values, evenly spaced, the last one among them."""
    stride = max(1, math.ceil(count / most))
    return torch.arange(count - 1, -1, -stride).flip(0)
