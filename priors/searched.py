"""Tasks as an optimizer would have collected them: points that crowd where earlier ones were good.

A search looks at its own observations only, never at latents, so that the posterior given the data
is the prior's own, wherever the points lie. Read `kernel_prior.py` for the processes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from priors.draws import draw_normal
from priors.kernel_prior import Process, cholesky, conditional_given
from priors.spaces import Columns, draw_spaces
from priors.tasks import ConditionalTasks, Tasks

ROUNDS = 4  # of a search, at most
FRESH = 0.3  # of a round's points are drawn from the whole space


@dataclass(frozen=True)
class Searched:
    """A prior's functions, observed at random or where a search for their best went.

    A search starts with random points and continues in rounds; most points of a round lie around
    the best observations so far. Queries lie around the best that they see, or anywhere. Spaces
    have columns with levels and one-hot groups (`priors.spaces`).

    Args:
        base: a prior that is a Gaussian process once its latents are known: a `KernelPrior`, a
            `Warped` one, or a `BNN`.
        share: of the batches of `sample_conditional` that are searches, in [0, 1].

    `sample` draws exchangeable points of the same spaces, without a search. Latents are the base's.

    Example:
        >>> from priors import GaussianProcess
        >>> g = torch.Generator().manual_seed(0)
        >>> Searched(GaussianProcess()).sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    base: Any
    share: float = 0.5

    def __post_init__(self) -> None:
        if not hasattr(self.base, "draw_process"):
            raise ValueError(
                "Expected a base that is a Gaussian process given its latents; got a "
                f"{type(self.base).__name__}."
            )
        if not 0 <= self.share <= 1:
            raise ValueError(f"Expected a share in [0, 1]; got {self.share}.")
        for name in ("posterior", "log_evidence", "latent_posterior", "posterior_is_quick"):
            if hasattr(self.base, name):  # where points lie says nothing that y does not
                object.__setattr__(self, name, getattr(self.base, name))

    @property
    def latent_units(self) -> dict[str, str]:
        """The base's."""
        units: dict[str, str] = self.base.latent_units
        return units

    @property
    def latent_categories(self) -> dict[str, list[str]]:
        """The base's."""
        return getattr(self.base, "latent_categories", {})

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` columns, in float64 on the generator's device."""
        process = self.base.draw_process(batch, d, generator=generator)
        x = draw_spaces(batch, d, generator=generator).draw(n, generator=generator)
        factor = cholesky(process.covariance(x, x), process.jitter)
        f = (factor @ draw_normal(batch, n, 1, generator=generator)).squeeze(-1)
        f = process.mean.unsqueeze(-1) + f
        y = f + process.noise.sqrt().unsqueeze(-1) * draw_normal(batch, n, generator=generator)
        return Tasks(x, y, f, process.latents)

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Tasks whose queries know their distribution given the latents and y_1 .. y_visible.

        Args:
            visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
        """
        process = self.base.draw_process(batch, d, generator=generator)
        space = draw_spaces(batch, d, generator=generator)
        coin = torch.rand((), device=generator.device, generator=generator)
        search = _Search(space, process, batch, generator)
        x, y, factor, z = search.run(n, ROUNDS if float(coin) < self.share else 0)
        x_query = search.queries(x, y, visible)
        return conditional_given(process, x, x_query, factor, z, visible)


class _Search:
    """Searches of one batch, each for the highest or the lowest y."""

    def __init__(
        self, space: Columns, process: Process, batch: int, generator: torch.Generator
    ) -> None:
        self.space, self.process, self.generator = space, process, generator
        self.sign = self._uniform(batch, 1).sub(0.5).sign()
        self.greed = 30 ** self._uniform(batch, 1)  # of the choice among good points
        self.change = 0.1 + 0.9 * self._uniform(batch, 1, 1)  # share of columns that move

    def run(self, n: int, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (task, n, dim), y (task, n) but for the mean, and L (task, n, n) and z with y = L z."""
        batch, d = self.space.levels.shape
        z = draw_normal(batch, n, 1, generator=self.generator)
        x, y = z.new_empty(batch, 0, d), z.new_empty(batch, 0)
        factor = z.new_zeros(batch, n, n)
        for start, stop in itertools.pairwise(self._edges(n, rounds)):
            new = self.queries(x, y, torch.full((stop - start,), start, device=z.device))
            block = self.process.covariance(new, new)
            if start:
                cross = torch.linalg.solve_triangular(
                    factor[:, :start, :start], self.process.covariance(x, new), upper=False
                )
                block = block - cross.mT @ cross
                factor[:, start:stop, :start] = cross.mT
            diagonal = self.process.noise + self.process.jitter
            factor[:, start:stop, start:stop] = cholesky(block, diagonal)
            seen = factor[:, start:stop, :stop] @ z[:, :stop]
            x, y = torch.cat([x, new], 1), torch.cat([y, seen.squeeze(-1)], 1)
        return x, y, factor, z

    def queries(self, x: Tensor, y: Tensor, visible: Tensor) -> Tensor:
        """Points (task, m, dim), of which the j-th looks at the first visible_j observations."""
        batch, m = len(x), len(visible)
        fresh = self.space.draw(m, generator=self.generator)
        if not x.shape[1]:
            return fresh
        rank = torch.arange(y.shape[1], device=y.device)
        hidden = rank >= visible.to(y.device).unsqueeze(-1)
        seen = (~hidden).to(y)  # (query, point): units are of what a query sees, too
        count = seen.sum(-1).clamp_min(1)
        mean = y @ seen.T / count
        variance = y.square() @ seen.T / count - mean.square()
        value = (self.sign * y).unsqueeze(1) / variance.clamp_min(1e-12).sqrt().unsqueeze(-1)
        gumbel = -(-self._uniform(batch, m, y.shape[1]).clamp_min(1e-12).log()).log()
        score = self.greed.unsqueeze(-1) * value + gumbel  # (task, query, point)
        parent = score.masked_fill(hidden, -torch.inf).argmax(-1)
        start = x.gather(1, parent.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        scale = 0.01 * 30 ** self._uniform(batch, m, 1)
        near = self.space.near(start, scale, self.change, generator=self.generator)
        anywhere = (self._uniform(batch, m) < FRESH) | hidden.all(-1)
        return torch.where(anywhere.unsqueeze(-1), fresh, near)

    def _edges(self, n: int, rounds: int) -> list[int]:
        """Where rounds begin and end."""
        cuts = (self._uniform(rounds) * n).long().tolist()
        return sorted({0, n, *(cut for cut in cuts if cut)})

    def _uniform(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.rand(*shape, dtype=torch.float64, device=device, generator=self.generator)
