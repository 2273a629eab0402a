"""`TrainerCurveStopping`: the same decision as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surrogates.stopping import Decision, StopRule


class TrainerCurveStopping(TrainerCallback):  # type: ignore[misc]
    """Stops when the monitored metric will hardly beat `best`, or, without one, its own best.

    The horizon is the trainer's `max_steps`, and a value comes with each evaluation in training
    that has the metric.

    Args:
        monitor: name of a metric of the evaluation, with or without its "eval_".
        best: value to beat, of earlier runs.
        mode: "max" where higher is better, or "min".
        verbose: whether to print the reason of a stop.
        rule: further arguments of `StopRule`.

    Attributes:
        decision: the last one, with its reason.

    Raises:
        ValueError: an argument out of range, or, at the end, a metric that was never evaluated.
    """

    def __init__(
        self,
        monitor: str = "eval_loss",
        best: float | None = None,
        mode: str = "min",
        *,
        verbose: bool = True,
        **rule: Any,
    ) -> None:
        self.monitor = monitor if monitor.startswith("eval_") else f"eval_{monitor}"
        self.verbose = verbose
        self.decision: Decision | None = None
        self._new = lambda horizon: StopRule(horizon, best, mode, **rule)
        self._new(1)  # raises where an argument is out of range
        self._rule: StopRule | None = None
        self._evaluated: set[str] = set()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Reads the horizon, and in a run that is resumed the values before."""
        self._rule, self._evaluated = self._new(state.max_steps), set()
        for entry in state.log_history:
            if self.monitor in entry and _is_new(self._rule, entry["step"]):
                self._rule.update(float(entry[self.monitor]), entry["step"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Decides after an evaluation."""
        if self._rule is None or not _is_new(self._rule, state.global_step):
            return  # evaluated before the training or after it
        metrics = metrics or {}
        self._evaluated |= set(metrics)
        if self.monitor not in metrics:  # another set than the one that is monitored
            return
        self.decision = self._rule.update(float(metrics[self.monitor]), state.global_step)
        if self.decision.stop and state.global_step < state.max_steps:
            control.should_training_stop = True
            if self.verbose and state.is_world_process_zero:
                print(self.decision.reason)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Says so if the metric never came."""
        self._rule = None
        if self._evaluated and self.monitor not in self._evaluated:
            raise ValueError(
                f"Expected monitor among the metrics {sorted(self._evaluated)}; got"
                f" {self.monitor!r}."
            )


def _is_new(rule: StopRule, step: float) -> bool:
    done = rule.steps[-1] if rule.steps else 0
    return done < step <= rule.criterion.horizon
