"""`CurvePruner`: Optuna trials that are pruned by the posterior of their learning curves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pfn import PFN
from surrogates.extrapolation import MODEL, Reader, Sibling
from surrogates.metrics import Bounds
from surrogates.spaces import Space
from surrogates.stopping import Criterion, Decision, judge_again

# user attributes of a trial: median and 90 % interval at the horizon, and the verdict
FINAL, INTERVAL = "curve:final", "curve:interval"
PROBABILITY, REASON = "curve:probability", "curve:reason"
COLUMNS = 10  # hyperparameters that the network knows


class CurvePruner(BasePruner):
    """Prunes a trial whose curve will hardly beat the best completed trial.

    The mode is the study's direction, and the incumbent its best value. Trials may report at any
    steps, each at its own; where a trial reports a step 0, its steps are taken to be counted from
    there, and `horizon` is their number. Nothing is kept between calls: what decides is what the
    storage holds, so that any process may ask. The predicted value at the horizon and its 90 %
    interval, the probability, and the reason are left as user attributes "curve:final",
    "curve:interval", "curve:probability" and "curve:reason" of the trial.

    Args:
        horizon: planned steps of a trial.
        bounds, confidence, min_delta, warmup, min_steps, patience, check_prior, model: as for
            `StopRule`.
        n_startup_trials: completed trials before any is pruned.
        siblings: whether to read the curves of earlier trials too, beside their parameters, where
            those that all trials share take at most ten columns (categories one each).

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(direction="maximize", pruner=CurvePruner(horizon=50))
    """

    def __init__(
        self,
        horizon: float,
        *,
        bounds: Bounds | None = None,
        confidence: float = 0.95,
        min_delta: float = 0.0,
        warmup: int = 5,
        min_steps: float = 0.0,
        patience: int = 2,
        check_prior: bool = False,
        n_startup_trials: int = 1,
        siblings: bool = False,
        model: str | PFN = MODEL,
    ) -> None:
        if n_startup_trials < 1:
            raise ValueError(f"Expected n_startup_trials of at least 1; got {n_startup_trials}.")
        self.n_startup_trials, self.siblings = n_startup_trials, siblings
        self._arguments: dict[str, Any] = {
            "horizon": horizon, "bounds": bounds, "confidence": confidence, "min_delta": min_delta,
            "warmup": warmup, "min_steps": min_steps, "patience": patience,
            "check_prior": check_prior, "model": model,
        }  # fmt: skip
        Criterion(**self._arguments)  # raises where one is out of range

    def __str__(self) -> str:
        return f"CurvePruner(horizon={self._arguments['horizon']})"

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to prune a trial, by what it has reported."""
        if not trial.intermediate_values:
            return False
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        finals = [
            t.value
            for t in ended
            if t.state == TrialState.COMPLETE and t.value is not None and math.isfinite(t.value)
        ]
        maximize = study.direction == StudyDirection.MAXIMIZE
        criterion = Criterion(mode="max" if maximize else "min", **self._arguments)
        runs = find_siblings(trial, ended, criterion.horizon) if self.siblings else ([], None)
        reader = Reader(criterion.model, *runs)
        best = (max if maximize else min)(finals, default=None)
        decision = decide_trial(criterion, trial, best, reader)
        if not math.isnan(decision.probability):
            final, *interval = decision.final
            for key, value in (
                (FINAL, final), (INTERVAL, interval), (PROBABILITY, decision.probability),
                (REASON, decision.reason),
            ):  # fmt: skip
                # a pruner is given a frozen trial, which cannot write
                study._storage.set_trial_user_attr(trial._trial_id, key, value)
        return decision.stop and len(finals) >= self.n_startup_trials


def decide_trial(
    criterion: Criterion, trial: FrozenTrial, best: float | None, reader: Reader
) -> Decision:
    """The decision on a trial's reports."""
    values, steps = read_reports(trial)
    if steps[-1] >= criterion.horizon:  # its last report: nothing is left to save
        return Decision(False, "The trial is complete.")
    return judge_again(criterion, values, steps, best, reader)


def read_reports(trial: FrozenTrial) -> tuple[list[float], list[float]]:
    """What a trial has reported, and its steps, counted from 1."""
    offset = 1 if min(trial.intermediate_values) == 0 else 0
    steps = sorted(trial.intermediate_values)
    return [trial.intermediate_values[s] for s in steps], [float(s + offset) for s in steps]


def find_siblings(
    trial: FrozenTrial, others: list[FrozenTrial], horizon: float
) -> tuple[list[Sibling], NDArray[np.float64] | None]:
    """Other trials that have reported, and the trial's place among them; none if there is none."""
    others = [t for t in others if t.intermediate_values and t.number != trial.number]
    shared = dict(trial.distributions)
    for other in others:
        shared = {name: d for name, d in shared.items() if other.distributions.get(name) == d}
    space = Space(shared)
    if not others or not 1 <= space.dim <= COLUMNS:
        return [], None
    siblings = []
    for other in others:
        values, steps = read_reports(other)
        kept = [i for i, step in enumerate(steps) if step <= horizon]
        place = space.encode(other.params).numpy()
        siblings.append(Sibling([values[i] for i in kept], place, [steps[i] for i in kept]))
    return siblings, space.encode(trial.params).numpy()
