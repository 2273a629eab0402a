"""Boxes whose columns may take a few values only, as optimizers encode their parameters.

Integers, steps and ordinals are levels between 0 and 1; a choice among k is k columns of which one
is 1. `searched.py` looks for good points in them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from priors.draws import draw_normal

DISCRETE = 0.4  # of spaces have columns with levels, or one-hot groups
LEVELS = 10  # at most


class Columns(NamedTuple):
    """The columns of each task."""

    levels: Tensor  # (task, dim) number of values, 0 where continuous
    group: Tensor  # (task, dim) columns of one number are one-hot together

    def draw(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Uniform points (task, n, dim) in float64."""
        shape = (len(self.levels), n, self.levels.shape[1])
        share = torch.rand(
            *shape, dtype=torch.float64, device=generator.device, generator=generator
        )
        levels = self.levels.unsqueeze(1)
        stepped = (share * levels).floor() / (levels - 1).clamp_min(1)
        group = self.group.unsqueeze(1).expand(shape)
        largest = torch.zeros_like(share).scatter_reduce_(2, group, share, "amax").gather(2, group)
        one_hot = (share == largest).double()
        return torch.where(self._alone(), torch.where(levels > 0, stepped, share), one_hot)

    def near(
        self, x: Tensor, scale: Tensor, change: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Neighbours of x (task, n, dim): some columns move by normal steps, or are drawn anew.

        At least one column, or one-hot group, does.

        Args:
            scale: standard deviation of steps in continuous columns; broadcasts with x.
            change: probability that a column, or a one-hot group, changes; broadcasts with x.
        """
        fresh = self.draw(x.shape[1], generator=generator)
        share = torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=generator)
        share = share.gather(2, self.group.unsqueeze(1).expand(x.shape))  # one for a group
        share = share.masked_fill(share == share.amin(-1, keepdim=True), -1.0)  # one always changes
        moved = (x + scale * draw_normal(*x.shape, generator=generator)).clamp(0, 1)
        continuous = self._alone() & (self.levels.unsqueeze(1) == 0)
        return torch.where(share < change, torch.where(continuous, moved, fresh), x)

    def _alone(self) -> Tensor:
        """Whether each column is no part of a one-hot group, (task, 1, dim)."""
        count = torch.zeros_like(self.group).scatter_add_(
            1, self.group, torch.ones_like(self.group)
        )
        return (count.gather(1, self.group) == 1).unsqueeze(1)


def draw_spaces(batch: int, d: int, *, generator: torch.Generator) -> Columns:
    """Spaces of `d` columns: most continuous, others with levels, groups, or both.

    In a discrete space, any share of the columns has 2 to 10 levels, and with probability 1/2 runs
    of columns are one-hot groups, of three columns on average.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=generator.device, generator=generator)

    discrete = uniform(batch, 1) < DISCRETE
    stepped = discrete & (uniform(batch, d) < uniform(batch, 1))
    levels = torch.where(stepped, (2 + uniform(batch, d) * (LEVELS - 1)).floor(), 0.0).double()
    grouped = discrete & (uniform(batch, 1) < 0.5)
    begins = ~(grouped & (uniform(batch, d) < 2 / 3))
    begins[:, :1] = True
    return Columns(levels, begins.long().cumsum(1) - 1)
