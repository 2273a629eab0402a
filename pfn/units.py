"""Units: the frozen affine maps between the data of a user and the numbers that a network sees.

Without standardization numbers are in the prior's own units. With it, the context's range becomes
the unit box, unless bounds say what does, and its y has mean 0 and standard deviation 1.
Pretraining draws tasks in all of these units, and the network is told which (`FromContext`), so
that it knows what is lost where the context sets them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REACH = 4.0  # inputs further than this many box widths outside the prior's box count as that far


class FromContext(NamedTuple):
    """Which units a context's own range (x) and moments (y) set, so that the prior's are lost."""

    x: bool = False
    y: bool = False


class Units(NamedTuple):
    """The maps x -> (x - x_shift) / x_scale and y -> (y - y_shift) / y_scale."""

    x_shift: Tensor  # (b, d)
    x_scale: Tensor  # (b, d)
    y_shift: Tensor  # (b,)
    y_scale: Tensor  # (b,)

    def to_box(self, x: Tensor) -> Tensor:
        """Inputs (b, n, d) where the box of the prior is the unit box."""
        return (x - self.x_shift.unsqueeze(-2)) / self.x_scale.unsqueeze(-2)

    def map_x(self, x: Tensor) -> Tensor:
        """The same, clamped to `REACH` around the box, as the network has them."""
        return self.to_box(x).clamp(-REACH, 1 + REACH)

    def map_y(self, y: Tensor) -> Tensor:
        """Outputs (..., b, n) in the network's units."""
        return (y - self.y_shift.unsqueeze(-1)) / self.y_scale.unsqueeze(-1)

    def of_latent(self, unit: str, per_feature: bool) -> tuple[Tensor, Tensor]:
        """Shift and scale (b, 1 or d) of a latent: data = shift + scale * network.

        NaN in the scale where a latent for all features has no unit, as their ranges differ.

        Args:
            unit: how the latent scales with the data: "x", "y", "y^2", or "" (not at all).
        """
        scale = self.y_scale.unsqueeze(-1)
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        if unit == "y":
            return self.y_shift.unsqueeze(-1), scale
        if unit == "y^2":
            return zero, scale.square()
        if unit == "x" and per_feature:
            return zero, self.x_scale
        if unit == "x":
            first = self.x_scale[:, :1]
            equal = torch.isclose(self.x_scale, first).all(-1, keepdim=True)
            return zero, torch.where(equal, first, torch.nan)
        return zero, one


def prior_units(x: Tensor, y: Tensor) -> Units:
    """Numbers as they are, for x (b, n, d), y (b, n)."""
    b, _, d = x.shape
    return Units(x.new_zeros(b, d), x.new_ones(b, d), y.new_zeros(b), y.new_ones(b))


def context_units(x: Tensor, y: Tensor) -> Units:
    """The units of a context x (b, n, d), y (b, n): its ranges of x, mean and deviation of y.

    Shifts only where a spread is zero or n < 2, and the identity at n = 0.
    """
    n = y.shape[1]
    if y.numel() == 0:
        return prior_units(x, y)
    low, high = x.aminmax(dim=1)
    constant = high <= low
    x_shift = torch.where(constant, low - 0.5, low)  # a constant column sits mid-box
    x_scale = torch.where(constant, 1.0, high - low)
    if n == 1:
        return Units(x_shift, x_scale, y[:, 0], torch.ones_like(y[:, 0]))
    y_shift = y.mean(1)
    squares = (y - y_shift.unsqueeze(-1)).square().sum(1)
    least, most = y.aminmax(dim=1)
    varies = (most > least) & (squares > 0)  # rounding gives constants a tiny spread
    variance = torch.where(varies, squares / torch.full_like(squares, n - 1), 1.0)
    return Units(x_shift, x_scale, y_shift, variance.sqrt())
