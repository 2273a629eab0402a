"""`CurvePruner`: Optuna trials that are pruned by the posterior of their learning curves."""

from __future__ import annotations

import math
from typing import Any

from optuna.pruners import BasePruner
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from pfn import PFN
from surrogates.extrapolation import MODEL
from surrogates.metrics import Bounds
from surrogates.stopping import Criterion, Decision, is_hopeless, judge

FINAL, INTERVAL = "curve:final", "curve:interval"  # user attributes of a trial: median and 90 %
PROBABILITY, REASON = (
    "curve:probability",
    "curve:reason",
)  # interval at the horizon, and the verdict


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
        model: str | PFN = MODEL,
    ) -> None:
        if n_startup_trials < 1:
            raise ValueError(f"Expected n_startup_trials of at least 1; got {n_startup_trials}.")
        self.n_startup_trials = n_startup_trials
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
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        finals = [t.value for t in done if t.value is not None and math.isfinite(t.value)]
        maximize = study.direction == StudyDirection.MAXIMIZE
        criterion = Criterion(mode="max" if maximize else "min", **self._arguments)
        decision = self.decide(criterion, trial, (max if maximize else min)(finals, default=None))
        if not math.isnan(decision.probability):
            final, *interval = decision.final
            for key, value in (
                (FINAL, final), (INTERVAL, interval), (PROBABILITY, decision.probability),
                (REASON, decision.reason),
            ):  # fmt: skip
                # a pruner is given a frozen trial, which cannot write
                study._storage.set_trial_user_attr(trial._trial_id, key, value)
        return decision.stop and len(finals) >= self.n_startup_trials

    def decide(self, criterion: Criterion, trial: FrozenTrial, best: float | None) -> Decision:
        """The decision on a trial's reports; earlier ones are judged anew for the patience."""
        offset = 1 if min(trial.intermediate_values) == 0 else 0
        steps = sorted(trial.intermediate_values)
        values = [trial.intermediate_values[step] for step in steps]
        places = [float(step + offset) for step in steps]
        if places[-1] >= criterion.horizon:  # its last report: nothing is left to save
            return Decision(False, "The trial is complete.")
        hopeless = 0
        for back in range(criterion.patience - 1, 0, -1):
            count = len(values) - back
            if count < 1:
                continue
            earlier = judge(criterion, values[:count], places[:count], best)
            hopeless = hopeless + 1 if is_hopeless(earlier, criterion) else 0
        return judge(criterion, values, places, best, hopeless)
