"""`CurveStopping`: a Lightning callback that stops a training by the posterior of its curve."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from surrogates.stopping import Decision, StopRule


class CurveStopping(pl.Callback):
    """Stops when the monitored metric will hardly beat `best`, or, without one, its own best.

    The horizon is the trainer's `max_epochs`, or `max_steps` where epochs are unlimited. The metric
    is read after each validation, or after each training epoch where there is none; the trainer's
    `min_epochs` and `min_steps` are respected.

    Args:
        monitor: name of a logged metric.
        best: value to beat, of earlier runs.
        mode: "max" where higher is better, or "min".
        horizon: planned epochs, where the trainer cannot tell.
        verbose: whether to print the reason of a stop.
        rule: further arguments of `StopRule`.

    Attributes:
        decision: the last one, with its reason.

    Raises:
        ValueError: an argument out of range; no horizon; a metric that was not logged.
    """

    def __init__(
        self,
        monitor: str,
        best: float | None = None,
        mode: str = "max",
        *,
        horizon: float | None = None,
        verbose: bool = True,
        **rule: Any,
    ) -> None:
        self.monitor, self.verbose = monitor, verbose
        self.decision: Decision | None = None
        self._horizon, self._best, self._mode, self._options = horizon, best, mode, rule
        self._rule: StopRule | None = None
        self._state: dict[str, Any] | None = None
        StopRule(horizon or 1, best, mode, **rule)  # raises where an argument is out of range

    @property
    def state_key(self) -> str:
        """What its state is filed under in a checkpoint."""
        return f"{type(self).__qualname__}[monitor={self.monitor}]"

    def state_dict(self) -> dict[str, Any]:
        """The values seen, for a training that is resumed."""
        return {} if self._rule is None else self._rule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self._state = state_dict or None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the horizon from the trainer."""
        epochs = self._horizon or trainer.max_epochs
        self._by_step = epochs is None or epochs < 0
        horizon = trainer.max_steps if self._by_step else epochs
        if horizon is None or horizon < 1:
            raise ValueError(
                "Expected a trainer with max_epochs or max_steps, or CurveStopping(horizon=...); "
                f"got max_epochs={trainer.max_epochs} and max_steps={trainer.max_steps}."
            )
        self._rule = StopRule(horizon, self._best, self._mode, **self._options)
        if self._state is not None:
            self._rule.load_state_dict(self._state)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides after a validation."""
        self._update(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides after an epoch without validation."""
        if not trainer.enable_validation:
            self._update(trainer)

    def _update(self, trainer: pl.Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or trainer.fast_dev_run or not fitting:  # type: ignore[attr-defined]
            return
        assert self._rule is not None
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"Expected monitor among the logged metrics {sorted(metrics)}; got"
                f" {self.monitor!r}. Log it with self.log({self.monitor!r}, value)."
            )
        step = trainer.global_step if self._by_step else trainer.current_epoch + 1
        done = self._rule.steps[-1] if self._rule.steps else 0
        if not done < step <= self._rule.criterion.horizon:  # validated twice in an epoch
            return
        self.decision = self._rule.update(float(metrics[self.monitor]), step)
        stop = trainer.strategy.reduce_boolean_decision(self.decision.stop, all=False)
        if stop and step < self._rule.criterion.horizon:
            trainer.should_stop = True
            if self.verbose and trainer.is_global_zero:
                print(self.decision.reason)
