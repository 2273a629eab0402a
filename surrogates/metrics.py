"""Metrics of trainings as the network of curves sees them: y in [0, 1], higher is better.

The rule, for a goodness g = v (mode "max") or -v (mode "min") with a top and a bottom where the
bounds give them, and for the first finite value seen, v0 (beside runs of the same sweep, medians
over the runs take the place of v0 and s):

- top and bottom (an accuracy, an error rate): y = (g - bottom) / (top - bottom);
- a top only (a loss >= 0): y = s / (s + top - g), where s is the distance of v0 from the top, so
  that a loss begins at 1/2 and a factor of the loss is a step of the logit of y;
- a bottom only (a score without limit): y = (g - bottom) / (s + g - bottom), likewise;
- neither: y = 1 / (1 + exp(-(g - g0) / s)), where s is the largest distance from v0 so far.

NaN and infinite values are a divergence, y = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MODES = ("max", "min")
Bounds = tuple[float | None, float | None]
LEAST = 1e-12  # distance from a bound that counts as none


@dataclass(frozen=True)
class Metric:
    """An increasing map from goodness to y and back, by the rule above.

    Args:
        sign: 1 where higher values are better, -1 where lower ones are.
        bottom, top: bounds of the goodness, -inf and inf where there are none.
        center, scale: of the rule, in the metric's units; unused where both bounds are finite.
    """

    sign: float
    bottom: float
    top: float
    center: float
    scale: float

    @property
    def is_linear(self) -> bool:
        """Whether y is proportional to the goodness, as where both bounds are finite."""
        return math.isfinite(self.bottom) and math.isfinite(self.top)

    def encode(self, values: Tensor) -> Tensor:
        """y in [0, 1] of observed values of any shape, in float64; 0 where they are not finite."""
        values = values.double()
        return torch.where(values.isfinite(), self.place(values).clamp(0, 1), 0.0)

    def place(self, values: Tensor) -> Tensor:
        """y of values to ask about: -1 and 2 are those below the bottom and above the top."""
        goodness = self.sign * values.double()
        g = goodness.clamp(self.bottom, self.top)
        if self.is_linear:
            y = (g - self.bottom) / (self.top - self.bottom)
        elif math.isfinite(self.top):
            y = self.scale / (self.scale + self.top - g)
        elif math.isfinite(self.bottom):
            y = 1 - self.scale / (self.scale + g - self.bottom)
        else:
            y = torch.sigmoid((g - self.sign * self.center) / self.scale)
        return torch.where(goodness < self.bottom, -1.0, torch.where(goodness > self.top, 2.0, y))

    def decode(self, y: Tensor) -> Tensor:
        """Values at y in (0, 1)."""
        if self.is_linear:
            g = self.bottom + (self.top - self.bottom) * y
        elif math.isfinite(self.top):
            g = self.top - self.scale * (1 - y) / y
        elif math.isfinite(self.bottom):
            g = self.bottom + self.scale * y / (1 - y)
        else:
            g = self.sign * self.center + self.scale * torch.logit(y)
        return self.sign * g

    def log_slope(self, y: Tensor) -> Tensor:
        """log |dy/dv| at y in (0, 1)."""
        if self.is_linear:
            return torch.full_like(y, -math.log(self.top - self.bottom))
        if math.isfinite(self.top):
            return 2 * y.log() - math.log(self.scale)
        if math.isfinite(self.bottom):
            return 2 * torch.log1p(-y) - math.log(self.scale)
        return y.log() + torch.log1p(-y) - math.log(self.scale)


def read_metric(
    values: NDArray[np.float64],
    mode: str,
    bounds: Bounds | None,
    siblings: Sequence[NDArray[np.float64]] = (),
    best: float | None = None,
) -> Metric:
    """The map for a metric of which `values` (n,) were seen, and `siblings` of other runs.

    Without bounds, a metric to be maximised whose values all lie in [0, 1] is bounded by these, one
    to be minimised that is never negative is bounded by 0 below, and any other is unbounded; a
    value to beat, `best`, counts among the values. Beside siblings, center and scale are medians of
    the runs'.

    Raises:
        ValueError: a mode that is none, bounds out of order, or values outside of them.
    """
    if mode not in MODES:
        raise ValueError(f"Expected a mode among {MODES}; got {mode!r}.")
    runs = [run[np.isfinite(run)] for run in (values, *siblings)]
    finite = np.concatenate(runs)
    if bounds is not None:
        low, high = _check_bounds(bounds, finite)
    else:
        told = [] if best is None or not math.isfinite(best) else [best]
        low, high = _guess(np.append(finite, told), mode)
    sign = 1.0 if mode == "max" else -1.0
    bottom, top = (low, high) if mode == "max" else (-high, -low)
    begun = [run for run in runs if len(run)]
    center = float(np.median([run[0] for run in begun])) if begun else _inside(low, high)
    side = top if math.isfinite(top) else bottom
    scales = [scale for run in begun if (scale := _scale(sign * run, side)) is not None]
    if scales:
        scale = float(np.median(scales))
    else:
        scale = 1.0 if math.isfinite(side) else max(abs(center), 1.0)
    return Metric(sign, bottom, top, center, scale)


def _scale(goodness: NDArray[np.float64], side: float) -> float | None:
    """Of one run: its first distance from a bound, or its largest from its first value."""
    if math.isfinite(side):
        apart = np.abs(goodness - side)
        apart = apart[apart > LEAST]
        return float(apart[0]) if len(apart) else None
    reach = float(np.abs(goodness - goodness[0]).max())
    return reach if reach > LEAST * max(1.0, abs(float(goodness[0]))) else None


def _check_bounds(bounds: Any, finite: NDArray[np.float64]) -> tuple[float, float]:
    try:
        low, high = bounds
        low = -math.inf if low is None else float(low)
        high = math.inf if high is None else float(high)
    except (TypeError, ValueError):
        raise ValueError(
            "Expected bounds (low, high), numbers or None, such as (0, 1) or (0, None); got"
            f" {bounds!r}."
        ) from None
    if not low < high:
        raise ValueError(f"Expected bounds with low < high; got {bounds!r}.")
    outside = finite[(finite < low) | (finite > high)]
    if len(outside):
        raise ValueError(f"Expected values within the bounds {bounds!r}; got {outside[0]}.")
    return low, high


def _guess(finite: NDArray[np.float64], mode: str) -> tuple[float, float]:
    if mode == "max" and len(finite) and finite.min() >= 0 and finite.max() <= 1:
        return 0.0, 1.0
    if mode == "min" and len(finite) and finite.min() >= 0:
        return 0.0, math.inf
    return -math.inf, math.inf


def _inside(low: float, high: float) -> float:
    """A value between bounds, of which any may be infinite."""
    if math.isfinite(low) and math.isfinite(high):
        return (low + high) / 2
    if math.isfinite(low):
        return low + 1.0
    return high - 1.0 if math.isfinite(high) else 0.0


def check_values(values: Any) -> NDArray[np.float64]:
    """Values of a metric (n,) as float64; NaN and infinities may be among them."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double()
    try:
        array = np.require(np.asarray(values, dtype=np.float64), requirements="W")
    except (TypeError, ValueError):
        raise ValueError(f"Expected values of shape (n,), numbers; got {values!r}.") from None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"Expected values of shape (n,), one per step; got shape {array.shape}.")
    return array


def check_steps(
    steps: Sequence[float] | NDArray[Any] | None, count: int, horizon: float
) -> NDArray[np.float64]:
    """Increasing positive steps (n,) that end before the horizon; 1 to n by default."""
    if not (isinstance(horizon, (int, float, np.number)) and math.isfinite(horizon)):
        raise ValueError(
            f"Expected a finite horizon, the planned number of steps; got {horizon!r}."
        )
    if steps is None:
        chosen = np.arange(1.0, count + 1)
    else:
        chosen = check_values(steps)
        if len(chosen) != count:
            raise ValueError(
                f"Expected one step for each of {count} values; got {len(chosen)} steps."
            )
        before = np.append(0.0, chosen[:-1])
        wrong = np.flatnonzero(~(np.isfinite(chosen) & (chosen > before)))
        if len(wrong):
            after = f" after {before[wrong[0]]:g}" if wrong[0] else ""
            raise ValueError(
                "Expected finite, positive and increasing steps, the first of them 1, say, not 0;"
                f" got {chosen[wrong[0]]:g}{after}."
            )
    if horizon <= 0:
        raise ValueError(f"Expected a positive horizon; got {horizon}.")
    if len(chosen) and chosen[-1] > horizon:
        raise ValueError(
            f"Expected a horizon of at least the last step, {chosen[-1]:g}; got {horizon}."
        )
    return chosen
