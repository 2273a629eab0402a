"""Bends of what a search observes: y = g(z), increasing, for z from a prior.

Scores of tuned models are not normal around their function. Hopeless settings share a floor, as a
classifier that guesses does, and near the best there is little left to gain. Noise enters before
the bend: it shrinks with the slope. `searched.py` bends objectives.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CURVED, FLOORED = 0.7, 0.6  # of bent tasks; chances are independent
CURVE = 1.0  # standard deviation of a normal law, of which the curve is the size
FLOOR = (-0.3, 0.8)  # mean and standard deviation, in units of `Bend.scale`
SHARPNESS = (2.0, 50.0)  # log-uniform
LEAK = (0.01, 0.3)  # log-uniform
TINY = torch.finfo(torch.float64).tiny
STEEPEST = 3.0  # log slope of a curve, where it goes on as a line


class Bend(NamedTuple):
    """An increasing map of each task.

    With t = (z - center) / scale, a soft floor, h = leak t + (1 - leak) (floor + softplus(sharpness
    (t - floor)) / sharpness), then a concave curve, (1 - exp(-curve h)) / curve, back in the units
    of z. A leak of 1 and a curve of 0 are the identity.
    """

    center: Tensor  # (task,) in the units of z
    scale: Tensor  # (task,) positive, in the units of z
    curve: Tensor  # (task,) 0 or more
    floor: Tensor  # (task,) in units of scale around center
    sharpness: Tensor  # (task,) positive, of the floor's corner
    leak: Tensor  # (task,) slope below the floor, in (0, 1]

    @classmethod
    def identity(cls, like: Tensor) -> Bend:
        """No bend, for each of `like` (task,)."""
        zero, one = torch.zeros_like(like), torch.ones_like(like)
        return cls(zero, one, zero, zero, one, one)

    @classmethod
    def draw(
        cls, center: Tensor, scale: Tensor, share: float, *, generator: torch.Generator
    ) -> Bend:
        """Random bends around `center` (task,), in units of `scale` (task,), for a share of them.

        The others are the identity, as are those of the share that get neither curve nor floor.
        """

        def uniform() -> Tensor:
            return torch.rand(
                len(center), dtype=torch.float64, device=center.device, generator=generator
            )

        def log_uniform(low: float, high: float) -> Tensor:
            return (math.log(low) + math.log(high / low) * uniform()).exp()

        def normal() -> Tensor:
            return torch.special.ndtri(uniform().clamp(1e-12, 1 - 1e-12))

        bent = uniform() < share
        curve = torch.where(bent & (uniform() < CURVED), CURVE * normal().abs(), 0.0)
        floored = bent & (uniform() < FLOORED)
        leak = torch.where(floored, log_uniform(*LEAK), 1.0)
        floor = FLOOR[0] + FLOOR[1] * normal()
        return cls(center, scale, curve, floor, log_uniform(*SHARPNESS), leak)

    def __call__(self, z: Tensor) -> Tensor:
        """y (..., task, point) of z."""
        center, scale, curve, _, _, leak = (value.unsqueeze(-1) for value in self)
        straight = self._floored(z)
        exponent = -curve * straight
        size = torch.expm1(exponent.clamp_max(STEEPEST)) + (
            math.exp(STEEPEST) * (exponent - STEEPEST).clamp_min(0)
        )
        curved = torch.where(curve > 0, -size / curve.clamp_min(TINY), straight)
        return torch.where((curve > 0) | (leak < 1), center + scale * curved, z)

    def log_slope(self, z: Tensor) -> Tensor:
        """log dy/dz (..., task, point), at most 0 but for curves."""
        center, scale, curve, floor, sharpness, leak = (value.unsqueeze(-1) for value in self)
        t = (z - center) / scale
        slope = leak + (1 - leak) * torch.sigmoid(sharpness * (t - floor))
        return slope.log() - (curve * self._floored(z)).clamp_min(-STEEPEST)

    def _floored(self, z: Tensor) -> Tensor:
        """h (..., task, point)."""
        center, scale, _, floor, sharpness, leak = (value.unsqueeze(-1) for value in self)
        t = (z - center) / scale
        soft = floor + F.softplus(sharpness * (t - floor), threshold=40) / sharpness
        return leak * t + (1 - leak) * soft
