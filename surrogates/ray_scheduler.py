"""`CurveScheduler`: the same decision as a scheduler of Ray Tune."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from surrogates.stopping import Decision, StopRule


class CurveScheduler(FIFOScheduler):  # type: ignore[misc]
    """Stops trials whose metric will hardly beat the best value of any trial.

    Args:
        horizon: planned steps of a trial, in units of `time_attr`.
        metric: name of a reported result, if `tune.TuneConfig` has none.
        mode: "max" or "min", likewise.
        time_attr: the result that counts steps.
        rule: further arguments of `StopRule`.

    Attributes:
        decisions: the last one of each trial, by its id.

    Raises:
        ValueError: an argument out of range, or a metric given twice.
    """

    def __init__(
        self,
        horizon: float,
        metric: str | None = None,
        mode: str | None = None,
        time_attr: str = "training_iteration",
        **rule: Any,
    ) -> None:
        super().__init__()
        StopRule(horizon, None, mode or "max", **rule)  # raises where an argument is out of range
        self._horizon, self._metric, self._mode, self._time = horizon, metric, mode, time_attr
        self._options = rule
        self._rules: dict[str, StopRule] = {}
        self.decisions: dict[str, Decision] = {}
        self._stopped = 0

    @property
    def metric(self) -> str | None:
        """The name of the metric."""
        return self._metric

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Takes metric and mode from `tune.TuneConfig`; False if they were given before."""
        if (self._metric and metric) or (self._mode and mode):
            return False
        self._metric, self._mode = metric or self._metric, mode or self._mode
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Begins a curve."""
        if not self._metric or not self._mode:
            raise ValueError(
                "Expected a metric and a mode, of CurveScheduler or tune.TuneConfig; got "
                f"{self._metric!r} and {self._mode!r}."
            )
        self._rules[trial.trial_id] = StopRule(self._horizon, None, self._mode, **self._options)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Continues or stops a trial."""
        if self._metric not in result or self._time not in result:
            return str(TrialScheduler.CONTINUE)
        rule, step = self._rules[trial.trial_id], float(result[self._time])
        done = rule.steps[-1] if rule.steps else 0
        if not done < step <= self._horizon:
            return str(TrialScheduler.CONTINUE)
        rule.best = self._best()
        decision = rule.update(float(result[self._metric]), step)
        self.decisions[trial.trial_id] = decision
        stop = decision.stop and step < self._horizon
        self._stopped += stop
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def _best(self) -> float | None:
        """The best value of any trial so far."""
        values = [v for rule in self._rules.values() for v in rule.values if math.isfinite(v)]
        return (max if self._mode == "max" else min)(values, default=None)

    def debug_string(self) -> str:
        """A line of a status report."""
        return f"Using CurveScheduler: {self._stopped} of {len(self._rules)} trials stopped."
