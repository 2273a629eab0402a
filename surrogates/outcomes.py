"""Outcomes as the surrogates of a search see them: standardised, bad ones on a logarithmic scale.

How bad a bad point is says little about the best ones, yet it would decide the units of all: one
diverged training makes all others look alike. Several objectives stay on their own scales, in which
a hypervolume is measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_OUTCOMES = 4  # outcomes for a scale that bends


class Outcomes(NamedTuple):
    """An increasing map of outcomes, for maximization, to a surrogate's units, and back.

    t = (y - middle) / unit becomes -log(1 - t) where it is negative and bends, and is then
    standardised.
    """

    middle: Tensor  # (m,)
    unit: Tensor  # (m,) positive
    bends: Tensor  # (m,) bool
    center: Tensor  # (m,)
    scale: Tensor  # (m,) positive

    def encode(self, Y: Tensor) -> Tensor:
        """Outcomes (..., m) in the surrogate's units."""
        t = (Y - self.middle) / self.unit
        bent = -torch.log1p(-t.clamp_max(0.0))
        return (torch.where(self.bends & (t < 0), bent, t) - self.center) / self.scale

    def decode(self, Z: Tensor) -> Tensor:
        """Outcomes (..., m) in the users' units."""
        t = self.center + self.scale * Z
        straight = -torch.expm1(-t.clamp_max(0.0))
        return self.middle + self.unit * torch.where(self.bends & (t < 0), straight, t)


def read_outcomes(Y: Tensor, objectives: int) -> Outcomes:
    """The map for outcomes Y (n, m), objectives first; constraints keep their limit, which is 0.

    A single objective bends at its median, and the unit is the distance from there to the upper
    quartile, or to the best if that is none.
    """
    m = Y.shape[1]
    is_objective = torch.arange(m) < objectives
    zero, one = torch.zeros(m, dtype=Y.dtype), torch.ones(m, dtype=Y.dtype)
    outcomes = Outcomes(zero, one, torch.zeros(m, dtype=torch.bool), zero, one)
    if len(Y) >= LEAST_OUTCOMES:
        levels = torch.tensor([0.5, 0.75, 1.0], dtype=Y.dtype)
        middle, upper, best = Y.quantile(levels, dim=0)
        unit = torch.where(upper > middle, upper - middle, best - middle)
        bends = is_objective & (unit > 0) & (objectives == 1)
        outcomes = outcomes._replace(
            middle=middle.where(bends, zero), unit=unit.where(bends, one), bends=bends
        )
    if not len(Y):
        return outcomes
    bent = outcomes.encode(Y)
    deviation = bent.std(0, correction=0)
    return outcomes._replace(
        center=bent.mean(0).where(is_objective, zero), scale=deviation.where(deviation > 0, one)
    )
