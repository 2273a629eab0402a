"""`TrainerCurveStopping`: the same decision as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from surrogates.stopping import Decision, StopRule


class TrainerCurveStopping(TrainerCallback):  # type: ignore[misc]
    """Stops when the monitored metric will hardly beat `best`, or, without one, its own best.

    The horizon is the trainer's `max_steps`, and a value comes with each evaluation.

    Args:
        monitor: name of a metric of the evaluation, with or without its "eval_".
        best: value to beat, of earlier runs.
        mode: "max" where higher is better, or "min".
        verbose: whether to print the reason of a stop.
        rule: further arguments of `StopRule`.

    Attributes:
        decision: the last one, with its reason.

    Raises:
        ValueError: an argument out of range, or a metric that was not evaluated.
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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Reads the horizon, and in a run that is resumed the values before."""
        self._rule = self._new(state.max_steps)
        for entry in state.log_history:
            if self.monitor in entry and self._is_new(entry["step"]):
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
        metrics = metrics or {}
        if self.monitor not in metrics:
            raise ValueError(
                f"Expected monitor among the metrics {sorted(metrics)}; got {self.monitor!r}."
            )
        if not self._is_new(state.global_step):  # evaluated before or after the training
            return
        self.decision = self._rule.update(float(metrics[self.monitor]), state.global_step)
        if self.decision.stop and state.global_step < state.max_steps:
            control.should_training_stop = True
            if self.verbose and state.is_world_process_zero:
                print(self.decision.reason)

    def _is_new(self, step: float) -> bool:
        done = self._rule.steps[-1] if self._rule.steps else 0
        return done < step <= self._rule.criterion.horizon
