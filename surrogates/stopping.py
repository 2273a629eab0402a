"""Whether a training is worth going on with: `StopRule`, its decisions and their reasons.

Every plug (`pruning.py`, the callbacks) shares `judge`, which is a function of what was observed
alone, so that it may run in any process and again after a restart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pfn import PFN
from surrogates.curve_posterior import Curve
from surrogates.extrapolation import MODEL, Reader, Sibling
from surrogates.metrics import Bounds, check_steps, check_values, read_metric

PAUSE = 0.1  # of the tolerated probability: a run that is stopped with more than that may resume
ASKED = 32  # remaining steps that a decision asks the network for, at most
OUTSIDE = 1e-4  # p-value below which a curve is unlike any of the prior


@dataclass(frozen=True)
class Decision:
    """What to do with a run, and why.

    Attributes:
        stop: whether to end it now.
        pause: whether to keep its state when it is stopped: it may be the next best thing to do,
            as a run that has diverged is not.
        probability: that the best of the rest beats the incumbent; NaN where the model was not
            asked.
        curve: the rest, as predicted, at no more than 32 steps; None likewise.
    """

    stop: bool
    why: str = field(repr=False)
    pause: bool = False
    probability: float = math.nan
    curve: Curve | None = field(default=None, repr=False)

    @functools.cached_property
    def final(self) -> tuple[float, float, float]:
        """Median of the value at the horizon, and the ends of its 90 % interval; or NaN."""
        if self.curve is None:
            return (math.nan,) * 3
        levels = torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64)
        middle, low, high = self.curve[-1].icdf(levels).tolist()
        return middle, low, high

    @property
    def reason(self) -> str:
        """The decision in words."""
        if self.curve is None:
            return self.why
        middle, low, high = self.final
        metric = self.curve.metric
        diverged = float(self.curve.prob_diverged()[-1]) if math.isfinite(metric.top) else 0.0
        if diverged >= 0.5:
            return f"{self.why}; diverged at the end with probability {_percent(diverged)}."
        ends = [f"{low:.4g}", f"{high:.4g}"]
        if diverged >= 0.05:
            ends[0 if metric.sign > 0 else 1] = "divergence"
        return f"{self.why}; expected at the end {middle:.4g} (90 %: {' to '.join(ends)})."


@dataclass(frozen=True)
class Criterion:
    """When to stop a run of `horizon` steps; the arguments are those of `StopRule`."""

    horizon: float
    mode: str = "max"
    bounds: Bounds | None = None
    confidence: float = 0.95
    min_delta: float = 0.0
    warmup: int = 5
    min_steps: float = 0.0
    patience: int = 2
    check_prior: bool = False
    model: str | PFN = MODEL

    def __post_init__(self) -> None:
        check_steps(None, 0, self.horizon)
        read_metric(np.empty(0), self.mode, self.bounds)
        if not 0 < self.confidence < 1:
            raise ValueError(f"Expected a confidence between 0 and 1; got {self.confidence}.")
        if not (self.min_delta >= 0 and self.warmup >= 0 and self.min_steps >= 0):
            raise ValueError(
                "Expected min_delta, warmup and min_steps of at least 0; got "
                f"{self.min_delta}, {self.warmup} and {self.min_steps}."
            )
        if self.patience < 1:
            raise ValueError(f"Expected a patience of at least 1; got {self.patience}.")


class StopRule:
    """Stops a run that will hardly beat the incumbent: P(it does) < 1 - confidence.

    The incumbent is `best`, or the best value of the run itself where that is better or no `best`
    is known; a run that leads is stopped when it has nothing left to gain.

    Args:
        horizon: planned steps of a run.
        best: value to beat, of earlier runs. May be set again between updates.
        mode: "max" where higher is better, or "min".
        bounds: of the metric, as for `extrapolate`.
        confidence: in (0, 1); of a run that is stopped, that it would not have beaten the
            incumbent.
        min_delta: what counts as beating, in the metric's units.
        warmup: updates before the model is asked.
        min_steps: the step before which no run is stopped.
        patience: updates in a row that must speak for stopping, so that one unlucky value does not.
        check_prior: whether to let a run go on where its values are none that the model would have
            predicted: then its word counts for nothing.
        siblings, hyperparameters: other runs of the sweep, and this run's place among them, as for
            `extrapolate`.
        model: a network of learning curves.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> rule = StopRule(horizon=50, best=0.95, warmup=3)
        >>> for accuracy in (0.30, 0.38, 0.41, 0.42, 0.425, 0.426, 0.427):
        ...     decision = rule.update(accuracy)
        >>> decision.stop
        True
    """

    def __init__(
        self,
        horizon: float,
        best: float | None = None,
        mode: str = "max",
        bounds: Bounds | None = None,
        confidence: float = 0.95,
        min_delta: float = 0.0,
        warmup: int = 5,
        *,
        min_steps: float = 0.0,
        patience: int = 2,
        check_prior: bool = False,
        siblings: Sequence[Sibling] = (),
        hyperparameters: Any = None,
        model: str | PFN = MODEL,
    ) -> None:
        self.criterion = Criterion(
            horizon, mode, bounds, confidence, min_delta, warmup, min_steps, patience, check_prior,
            model,
        )  # fmt: skip
        self.best = best
        self.values: list[float] = []
        self.steps: list[float] = []
        self._hopeless = 0  # updates in a row
        self._reader = Reader(model, siblings, hyperparameters)

    def __repr__(self) -> str:
        return f"StopRule({self.criterion}, best={self.best}, {len(self.values)} values)"

    def update(self, value: float, step: float | None = None) -> Decision:
        """Notes a value of the metric, at the next step by default, and decides.

        Raises:
            ValueError: a step that does not come after the last one, or lies past the horizon; the
                value is then not noted.
        """
        if step is None:
            step = self.steps[-1] + 1 if self.steps else 1
        values, steps = [*self.values, float(value)], [*self.steps, float(step)]
        check_steps(steps, len(values), self.criterion.horizon)
        decision = judge(self.criterion, values, steps, self.best, self._hopeless, self._reader)
        self.values, self.steps = values, steps
        self._hopeless = self._hopeless + 1 if is_hopeless(decision, self.criterion) else 0
        return decision

    def decide(self) -> Decision:
        """The decision on the values so far, say for a paused run or after `best` has changed."""
        before = max(self._hopeless, self.criterion.patience - 1)
        return judge(self.criterion, self.values, self.steps, self.best, before, self._reader)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, as plain numbers."""
        return {
            "best": self.best,
            "values": list(self.values),
            "steps": list(self.steps),
            "hopeless": self._hopeless,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, `best` included."""
        self.best = state["best"]
        self.values, self.steps = list(state["values"]), list(state["steps"])
        self._hopeless = state["hopeless"]


def judge(
    criterion: Criterion,
    values: Sequence[float],
    steps: Sequence[float],
    best: float | None,
    hopeless: int = 0,
    reader: Reader | None = None,
) -> Decision:
    """The decision on a run with these values.

    Args:
        hopeless: how many updates in a row spoke for stopping.
        reader: of the criterion's model, which has maybe read a beginning of the run.
    """
    array = check_values(values)
    where = f"After step {steps[-1]:g} of {criterion.horizon:g}" if len(steps) else "At the start"
    if len(array) and steps[-1] >= criterion.horizon:
        return Decision(True, f"{where}: the run is complete.")
    if len(array) <= criterion.warmup or steps[-1] < criterion.min_steps:
        return Decision(False, f"{where}: too early to judge (warm-up).")
    incumbent, whose = find_incumbent(array, criterion.mode, best)
    if incumbent is None:
        return Decision(False, f"{where}: no finite value to compare with.")
    how = (criterion.horizon, steps, criterion.mode, criterion.bounds)
    reader = reader or Reader(criterion.model)
    curve = reader.extrapolate(array, *how, best=incumbent, most=ASKED)
    probability = curve.prob_best(incumbent, min_delta=criterion.min_delta)
    tolerated = 1 - criterion.confidence
    limit = f"{100 * tolerated:.4g} %"
    more = f" by more than {criterion.min_delta:g}," if criterion.min_delta else ""
    why = (
        f"{where}: the rest beats {whose}, {incumbent:.4g},{more} with probability"
        f" {_percent(probability, limit)}"
    )
    if probability >= tolerated:
        why += f", at least the {limit} that are worth it"
        return Decision(False, why, False, probability, curve)
    why += f", less than {limit}"
    if hopeless + 1 < criterion.patience:
        why += f", for {hopeless + 1} of {criterion.patience} updates"
        return Decision(False, why, False, probability, curve)
    if criterion.check_prior:
        p = reader.surprise(array, *how)
        if p < OUTSIDE:
            why += f", but the curve is unlike any that the model knows (p = {p:.1g})"
            return Decision(False, why, False, probability, curve)
    pause = probability >= PAUSE * tolerated and math.isfinite(values[-1])
    return Decision(True, why, pause, probability, curve)


def judge_again(
    criterion: Criterion,
    values: Sequence[float],
    steps: Sequence[float],
    best: float | None,
    reader: Reader,
) -> Decision:
    """As `judge`, where nothing is known of earlier decisions: the last few are made anew."""
    hopeless = 0
    for count in range(max(1, len(values) + 1 - criterion.patience), len(values)):
        earlier = judge(criterion, values[:count], steps[:count], best, reader=reader)
        hopeless = hopeless + 1 if is_hopeless(earlier, criterion) else 0
    return judge(criterion, values, steps, best, hopeless, reader)


def is_hopeless(decision: Decision, criterion: Criterion) -> bool:
    """Whether an update speaks for stopping, be it that more must."""
    return decision.probability < 1 - criterion.confidence  # False for NaN


def find_incumbent(
    values: NDArray[np.float64], mode: str, best: float | None
) -> tuple[float | None, str]:
    """What the rest has to beat, and whose it is."""
    finite = values[np.isfinite(values)].tolist()
    given = [] if best is None or not math.isfinite(best) else [float(best)]
    if not finite and not given:
        return None, ""
    choose = max if mode == "max" else min
    incumbent = choose(finite + given)
    return incumbent, "the best so far" if incumbent in given else "its own best"


def _percent(p: float, limit: str = "") -> str:
    """A probability in words, with more digits where it would read as the limit."""
    if p < 1e-4:
        return "below 0.01 %"
    if p > 0.9999:
        return "above 99.99 %"
    texts = (f"{100 * p:.{digits}g} %" for digits in range(2 if p < 0.99 else 4, 16))
    return next((text for text in texts if text != limit), limit)
