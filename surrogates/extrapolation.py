"""The rest of a learning curve: `extrapolate` asks a network of curves, alone or beside siblings.

The networks' prior is `priors.LearningCurves`. Read `metrics.py` for the map between a metric and
the network's units, `curve_posterior.py` for what is returned, `stopping.py` for decisions.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import pfn
from pfn import PFN, Predictive
from pfn.causal import CausalTransformer, Told
from pfn.transformer import Mixture
from surrogates.curve_posterior import Curve
from surrogates.metrics import Bounds, Metric, check_steps, check_values, read_metric

Array = np.ndarray[Any, np.dtype[np.float64]]
MODEL = "curves"
MOST_STEPS = 10_000  # steps that are predicted
MOST_SIBLINGS = 31  # runs that are read beside a run, those with the nearest hyperparameters
HAIR = 1e-4  # of a hyperparameter
OWN = 128  # values of a run that are read beside siblings


class Sibling(NamedTuple):
    """Another run of a sweep, complete or not.

    Attributes:
        values: (n,) of the metric, in order of time.
        hyperparameters: (k,) of the run, each scaled to [0, 1]; categories one-hot.
        steps: (n,) of the values, by default 1 to n.
    """

    values: Any
    hyperparameters: Any
    steps: Sequence[float] | None = None


def extrapolate(
    values: Any,
    horizon: float,
    steps: Sequence[float] | None = None,
    mode: str = "max",
    bounds: Bounds | None = None,
    *,
    siblings: Sequence[Sibling] = (),
    hyperparameters: Any = None,
    model: str | PFN = MODEL,
) -> Curve:
    """The posterior of the rest of a learning curve, from its beginning.

    Args:
        values: (n,) of a metric, in order of time; NaN and infinities are a divergence. No value,
            n = 0, gives the prior predictive.
        horizon: the step at which the training would end; it informs the answer, since schedules
            and users adapt to it.
        steps: (n,) of the values, by default 1 to n: epochs, iterations or examples, at any
            spacing. Those that remain then go on at the median spacing, up to the horizon.
        mode: "max" where higher is better, or "min".
        bounds: (low, high) of the metric, None where there is none. By default [0, 1] for a metric
            to be maximised whose values lie there, 0 below for one to be minimised that is never
            negative, and none otherwise; see `metrics.py`.
        siblings: other runs of the same sweep with the same metric and horizon, which tell what
            runs with near hyperparameters do; of many, the 31 nearest are read.
        hyperparameters: (k,) of this run, as those of the siblings, k <= 10; without siblings they
            say nothing.
        model: a network of learning curves.

    Returns:
        A `Curve` of batch_shape (horizon - n,) at the steps that remain.

    Raises:
        ValueError: values, steps, horizon, mode, bounds or hyperparameters that do not fit each
            other, siblings past the horizon, more than 10,000 remaining steps, or a model of
            something else than curves.

    Example:
        >>> curve = extrapolate([0.3, 0.5, 0.6, 0.66, 0.69], horizon=50)
        >>> curve.batch_shape, curve.prob_above(0.75) > curve.prob_above(0.95)
        (torch.Size([45]), True)
    """
    reader = Reader(model, siblings, hyperparameters)
    return reader.extrapolate(values, horizon, steps, mode, bounds)


class Reader:
    """Asks a network about runs that grow: what it has read of a run is not read again.

    Args:
        model, siblings, hyperparameters: as of `extrapolate`.
    """

    def __init__(
        self,
        model: str | PFN = MODEL,
        siblings: Sequence[Sibling] = (),
        hyperparameters: Any = None,
    ) -> None:
        self.network = load(model) if isinstance(model, str) else model
        if not isinstance(self.network.transformer, CausalTransformer):
            raise ValueError(
                f"Expected a network of learning curves, such as {MODEL!r}; got"
                f" {self.network.card.name!r}."
            )
        self.siblings, self.hyperparameters = _check_sweep(
            siblings, hyperparameters, self.network.card.d_range[1] - 1
        )
        self._transformer = self.network.transformer
        self._device = self._transformer.embed_query.device
        none = torch.zeros(1, 0, 1 + len(self.hyperparameters), device=self._device)
        with torch.inference_mode():
            self._nothing = self._transformer.encode(none, none[..., 0])
        self._read = self._nothing

    def extrapolate(
        self,
        values: Any,
        horizon: float,
        steps: Sequence[float] | None = None,
        mode: str = "max",
        bounds: Bounds | None = None,
        *,
        best: float | None = None,
        most: int | None = None,
    ) -> Curve:
        """As the function, for a comparison with `best`.

        Args:
            best: a value that the metric can have; it tells bounds, as values do.
            most: steps that are asked for, the last one among them. There may then be any number
                of remaining steps; of more than 10,000, evenly spaced ones stand for all.
        """
        array, seen, metric = self._check(values, horizon, steps, mode, bounds, best)
        grid = torch.from_numpy(remaining_steps(seen, float(horizon), coarsen=most is not None))
        rest = grid if most is None else grid[spread(len(grid), most)]
        x, y = self._rows(metric, array, seen, horizon)
        told = self._ask(x, y, self._places(rest.numpy() / horizon, self.hyperparameters))
        with torch.inference_mode():
            mixtures = self._transformer.mixture_y(told), self._transformer.mixture_f(told)
        marginals, noise_free = map(_predictive, mixtures)
        told_of = torch.from_numpy(array), torch.from_numpy(seen)
        return Curve(marginals, noise_free, metric, rest, *told_of, float(horizon), grid)

    def surprise(self, values: Any, horizon: float, *how: Any) -> float:
        """The p-value of a curve under the prior: small where it is none that the network knows.

        Fisher's combination of the two-sided tail probabilities of each value given those before
        it: minus twice the sum of their n logarithms is chi-squared with 2 n degrees of freedom, if
        the curve is a draw of the prior and the network its posterior.

        Args:
            values, horizon, how: as of `extrapolate`; `how` are steps, mode and bounds.
        """
        array, seen, metric = self._check(values, horizon, *how)
        x, y = self._rows(metric, array, seen, horizon)
        own = len(thin(len(array), self._most))
        if not own:
            return 1.0
        visible = torch.arange(len(y) - own, len(y))
        with torch.inference_mode():
            told = self._transformer.decode(
                self._nothing,
                x[None, -own:],
                buffer=(x[None], y[None]),
                visible=visible.to(self._device),
            )
            below = _predictive(self._transformer.mixture_y(told)).cdf(y[-own:].double().cpu())
        tails = (2 * torch.minimum(below, 1 - below)).clamp(1e-12, 1)
        count = torch.tensor(float(own), dtype=torch.float64)
        return float(torch.special.gammaincc(count, -tails.log().sum()))

    def _check(
        self,
        values: Any,
        horizon: float,
        steps: Sequence[float] | None = None,
        mode: str = "max",
        bounds: Bounds | None = None,
        best: float | None = None,
    ) -> tuple[Array, Array, Metric]:
        """Values and steps (n,) of a run, and the map of its metric."""
        array = check_values(values)
        seen = check_steps(steps, len(array), horizon)
        siblings = [run.values for run in self.siblings]
        return array, seen, read_metric(array, mode, bounds, siblings, best)

    @property
    def _most(self) -> int:
        """Values of the run itself that are read."""
        most = self.network.card.max_context
        return min(OWN, most // 2) if self.siblings else most

    def _rows(
        self, metric: Metric, values: Array, seen: Array, horizon: float
    ) -> tuple[Tensor, Tensor]:
        """What the network reads, x (n, 1 + k) and y (n,): siblings, then the run itself."""
        each = (self.network.card.max_context - self._most) // max(1, len(self.siblings))
        runs = [
            *((run.values, run.steps, run.hyperparameters, each) for run in self.siblings),
            (values, seen, self.hyperparameters, self._most),
        ]
        x, y = [], []
        for of_run, steps, hyperparameters, most in runs:
            if len(steps) and steps[-1] > horizon:
                raise ValueError(
                    f"Expected siblings within the horizon, {horizon:g}; got step {steps[-1]:g}."
                )
            keep = thin(len(of_run), most)
            x.append(self._places(steps[keep.numpy()] / horizon, hyperparameters))
            y.append(metric.encode(torch.from_numpy(of_run)[keep]).float())
        return torch.cat(x), torch.cat(y).to(self._device)

    def _places(self, time: Array, hyperparameters: Array) -> Tensor:
        """Inputs (n, 1 + k) of the network."""
        own = np.broadcast_to(hyperparameters, (len(time), len(hyperparameters)))
        return torch.from_numpy(np.concatenate([time[:, None], own], 1)).float().to(self._device)

    def _ask(self, x: Tensor, y: Tensor, x_query: Tensor) -> Told:
        """What becomes of queries (m, d) after a context (n, d), (n,), which is kept as read."""
        known = self._read.x.shape[1]
        if not (
            known <= len(x)
            and torch.equal(self._read.x[0], x[:known])
            and torch.equal(self._read.y[0], y[:known])
        ):
            self._read, known = self._nothing, 0
        with torch.inference_mode():
            self._read, told = self._transformer.extend(
                self._read, x[None, known:], y[None, known:], x_query[None]
            )
        return told


class _Run(NamedTuple):
    """A sibling that was checked."""

    values: Array
    hyperparameters: Array
    steps: Array


def _check_sweep(
    siblings: Sequence[Sibling], hyperparameters: Any, most: int
) -> tuple[list[_Run], Array]:
    """The nearest siblings that have values, and the run's own hyperparameters (k,)."""
    if not len(siblings):  # alone, a run's hyperparameters say nothing
        return [], np.empty(0)
    if hyperparameters is None:
        raise ValueError("Expected hyperparameters (k,) of the run, as of its siblings; got None.")
    own = check_values(hyperparameters)
    runs = []
    for sibling in siblings:
        try:
            sibling = Sibling(*sibling)
        except TypeError:
            raise ValueError(
                f"Expected siblings (values, hyperparameters, steps); got {sibling!r}."
            ) from None
        values, point = check_values(sibling.values), check_values(sibling.hyperparameters)
        if len(point) != len(own):
            raise ValueError(
                f"Expected as many hyperparameters of each sibling as of the run, {len(own)}; got"
                f" {len(point)}."
            )
        steps = check_steps(sibling.steps, len(values), sys.float_info.max)
        if len(values):
            runs.append(_Run(values, point, steps))
    if most < 1:
        raise ValueError("Expected a network that was trained on sweeps, to read siblings.")
    if not 1 <= len(own) <= most:
        raise ValueError(
            f"Expected 1 to {most} hyperparameters, which the network knows; got {len(own)}."
        )
    for point in (own, *(run.hyperparameters for run in runs)):
        if not ((point >= 0) & (point <= 1)).all():
            raise ValueError(f"Expected hyperparameters in [0, 1]; got {point.tolist()}.")
    far = [float(np.square(run.hyperparameters - own).sum()) for run in runs]
    nearest = sorted(np.argsort(far, kind="stable")[:MOST_SIBLINGS])
    chosen = [runs[i] for i in nearest]
    *places, own = tell_apart([*(run.hyperparameters for run in chosen), own])
    return [run._replace(hyperparameters=p) for run, p in zip(chosen, places, strict=True)], own


def tell_apart(places: Sequence[Array]) -> list[Array]:
    """The same points, but repeats moved by a hair: the network knows runs by where they are."""
    known: set[tuple[float, ...]] = set()
    apart = []
    for place in places:
        moved = place.astype(np.float32)
        while tuple(moved.tolist()) in known:
            moved[0] += HAIR if place[0] < 0.5 else -HAIR
        known.add(tuple(moved.tolist()))
        apart.append(moved.astype(np.float64))
    return apart


def _predictive(mixture: Mixture) -> Predictive:
    """The only task's mixtures, in float64 and free of inference mode."""
    log_weights, means, log_stds = (part[0].double().cpu().clone() for part in mixture)
    return Predictive(log_weights, means, log_stds.exp(), validate_args=False)


@functools.lru_cache(4)
def load(name: str) -> PFN:
    """The network of a name, read once."""
    return pfn.load(name)


def remaining_steps(seen: Array, horizon: float, *, coarsen: bool = False) -> Array:
    """Steps after the last one seen, at the spacing so far, up to the horizon and with it.

    Args:
        coarsen: space them wider where they are more than `MOST_STEPS`.

    Raises:
        ValueError: more than that otherwise.
    """
    last = seen[-1] if len(seen) else 0.0
    apart = float(np.median(np.diff(seen))) if len(seen) > 1 else float(last or 1.0)
    count = math.floor((horizon - last) / apart + 1e-9)
    if count > MOST_STEPS:
        if not coarsen:
            raise ValueError(
                f"Expected at most {MOST_STEPS} remaining steps; got {count}, one every {apart:g}"
                f" up to {horizon:g}. Pass wider spaced values and their steps."
            )
        apart, count = (horizon - last) / MOST_STEPS, MOST_STEPS
    rest = last + apart * np.arange(1.0, count + 1)
    if horizon - (rest[-1] if count else last) > 1e-6 * apart:
        rest = np.append(rest, horizon)
    return rest.clip(max=horizon)


def thin(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count` values: every second, third, ... and the last one."""
    stride = max(1, math.ceil((count - 1) / max(1, most - 1)))
    return torch.tensor(sorted({*range(0, count, stride), count - 1} - {-1}), dtype=torch.long)


def spread(count: int, most: int) -> Tensor:
    """Indices of at most `most` of `count` steps, the first and the last, denser at first."""
    if count <= most:
        return torch.arange(count)
    share = torch.linspace(0, 1, most, dtype=torch.float64) ** 1.5
    return (share * (count - 1)).round().long().unique()
