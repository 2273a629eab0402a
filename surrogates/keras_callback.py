"""`KerasCurveStopping`: the same decision as a Keras callback."""

from __future__ import annotations

from typing import Any

import keras

from surrogates.stopping import Decision, StopRule


class KerasCurveStopping(keras.callbacks.Callback):  # type: ignore[misc]
    """Stops when the monitored metric will hardly beat `best`, or, without one, its own best.

    The horizon is the `epochs` of `fit`, and a value comes with each epoch that has one.

    Args:
        monitor: name of a metric in the epoch's logs.
        best: value to beat, of earlier runs.
        mode: "max" where higher is better, or "min".
        verbose: whether to print the reason of a stop.
        rule: further arguments of `StopRule`.

    Attributes:
        decision: the last one, with its reason.

    Raises:
        ValueError: an argument out of range, or, at the end, a metric that was never in the logs.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        best: float | None = None,
        mode: str = "min",
        *,
        verbose: bool = True,
        **rule: Any,
    ) -> None:
        super().__init__()
        self.monitor, self.verbose = monitor, verbose
        self.decision: Decision | None = None
        self._new = lambda horizon: StopRule(horizon, best, mode, **rule)
        self._new(1)  # raises where an argument is out of range

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Reads the horizon."""
        self._rule = self._new(self.params["epochs"])
        self._logged: set[str] = set()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Decides after an epoch."""
        logs = logs or {}
        self._logged |= set(logs)
        if self.monitor not in logs:  # an epoch without validation
            return
        self.decision = self._rule.update(float(logs[self.monitor]), epoch + 1)
        if self.decision.stop and epoch + 1 < self._rule.criterion.horizon:
            self.model.stop_training = True
            if self.verbose:
                print(self.decision.reason)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        """Says so if the metric never came."""
        if self._logged and self.monitor not in self._logged:
            raise ValueError(
                f"Expected monitor among the logs {sorted(self._logged)}; got {self.monitor!r}."
            )
