"""`CurveStopping`: a Lightning callback that stops a training by the posterior of its curve."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from surrogates.stopping import Decision, StopRule


class CurveStopping(pl.Callback):
    """Stops when the monitored metric will hardly beat `best`, or, without one, its own best.

    The horizon is the trainer's `max_epochs`, or `max_steps` where epochs are unlimited. The metric
    is read after each validation, be it within an epoch, or after each training epoch where it is
    logged then; the trainer's `min_epochs` and `min_steps` are respected.

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
        """The values seen, for a training that is resumed; the better incumbent counts then."""
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
        self._after_epoch = not trainer.enable_validation  # rather than after a validation
        if self._state is not None:
            self._rule.load_state_dict(self._state)
            known = [best for best in (self._best, self._rule.best) if best is not None]
            self._rule.best = (max if self._mode == "max" else min)(known, default=None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides after a validation."""
        if not self._is_fitting(trainer) or self._after_epoch:
            return
        if self.monitor not in trainer.callback_metrics:  # a metric of the training, it seems
            self._after_epoch = True
            return
        self._update(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides after an epoch, by a metric that is logged then."""
        if not self._is_fitting(trainer) or not self._after_epoch:
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"Expected monitor among the logged metrics {sorted(metrics)}; got"
                f" {self.monitor!r}. Log it with self.log({self.monitor!r}, value)."
            )
        self._update(trainer)

    def _is_fitting(self, trainer: pl.Trainer) -> bool:
        is_trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        return trainer.state.fn == TrainerFn.FITTING and not is_trial

    def _step(self, trainer: pl.Trainer) -> float:
        """Epochs, parts of the running one included, or optimizer steps."""
        if self._by_step:
            return trainer.global_step
        batches = trainer.num_training_batches
        if self._after_epoch or not math.isfinite(batches):
            return trainer.current_epoch + 1
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return trainer.current_epoch + min(1.0, done / batches)

    def _update(self, trainer: pl.Trainer) -> None:
        assert self._rule is not None
        metrics, step = trainer.callback_metrics, self._step(trainer)
        done = self._rule.steps[-1] if self._rule.steps else 0
        if not done < step <= self._rule.criterion.horizon:  # validated twice in an epoch
            return
        self.decision = self._rule.update(float(metrics[self.monitor]), step)
        stop = trainer.strategy.reduce_boolean_decision(self.decision.stop, all=False)
        if stop and step < self._rule.criterion.horizon:
            trainer.should_stop = True
            if self.verbose and trainer.is_global_zero:
                print(self.decision.reason)
