"""Tasks as an optimizer would have collected them: points that crowd where earlier ones were good.

A search looks at its own observations only, never at latents, so that the posterior given the data
is the prior's own, wherever the points lie. Read `kernel_prior.py` for the processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from priors.bends import Bend
from priors.draws import draw, draw_normal
from priors.kernel_prior import Process, cholesky, conditional_given
from priors.spaces import Columns, draw_spaces
from priors.tasks import ConditionalTasks, Tasks

ROUNDS = 4  # of a search, at most
FRESH = 0.3  # of a round's points are drawn from the whole space
BEYOND = 0.2  # of a column's range, that a bowl's centre may lie outside
MOMENTS = 64  # points of a space that tell a bend where functions lie and how much they vary
STEEPNESS = 4.3  # of a bowl in one column whose standard deviation is 1, about

Trend = Callable[[Tensor], Tensor]  # x (task, n, dim) to (task, n)


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
        bowl: None, or the standard deviation over the space, about, of a concave quadratic trend
            that is added to each function: a positive distribution. Objectives for maximization
            tend to have their best inside the space, not in its corners, which processes that are
            stationary or grow outwards do not know. Searches are then for the highest y.
        bent: share of the functions, in [0, 1], whose values may have a floor or flatten towards
            the top, as scores of tuned models do (`priors.bends`). Searches are then upwards, too.

    `sample` draws exchangeable points of the same spaces, without a search. Latents are the base's,
    but "noise", the variance around f, is that of typical points where a bend changes it.

    Example:
        >>> from priors import GaussianProcess
        >>> g = torch.Generator().manual_seed(0)
        >>> Searched(GaussianProcess()).sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    base: Any
    share: float = 0.5
    bowl: Distribution | None = None
    bent: float = 0.0

    def __post_init__(self) -> None:
        if not hasattr(self.base, "draw_process"):
            raise ValueError(
                "Expected a base that is a Gaussian process given its latents; got a "
                f"{type(self.base).__name__}."
            )
        for label, share in (("share", self.share), ("share bent", self.bent)):
            if not 0 <= share <= 1:
                raise ValueError(f"Expected a {label} in [0, 1]; got {share}.")
        known = (
            "posterior",
            "log_evidence",
            "latent_posterior",
            "latent_densities",
            "posterior_is_quick",
        )
        plain = self.bowl is None and not self.bent
        for name in known if plain else ():  # where points lie says no more than y
            if hasattr(self.base, name):
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
        space = draw_spaces(batch, d, generator=generator)
        trend = self._trend(batch, d, generator)
        bend, latents = self._bend(process, space, trend, generator)
        x = space.draw(n, generator=generator)
        factor = cholesky(process.covariance(x, x), process.jitter)
        f = (factor @ draw_normal(batch, n, 1, generator=generator)).squeeze(-1)
        f = process.mean.unsqueeze(-1) + trend(x) + f
        y = f + process.noise.sqrt().unsqueeze(-1) * draw_normal(batch, n, generator=generator)
        return Tasks(x, bend(y), bend(f), latents)

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Tasks whose queries know their distribution given the latents and y_1 .. y_visible.

        Args:
            visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
        """
        process = self.base.draw_process(batch, d, generator=generator)
        space = draw_spaces(batch, d, generator=generator)
        trend = self._trend(batch, d, generator)
        coin = torch.rand((), device=generator.device, generator=generator)
        bend, latents = self._bend(process, space, trend, generator)
        upwards = self.bowl is not None or self.bent > 0
        search = _Search(space, process, trend, bend, upwards, batch, generator)
        x, y, factor, z = search.run(n, ROUNDS if float(coin) < self.share else 0)
        x_query = search.queries(x, y, visible)
        cross = process.covariance(x, x_query)
        tasks = conditional_given(process, x, x_query, visible, cross=cross, factor=factor, z=z)
        return tasks._replace(
            y=y,
            mean=tasks.mean + trend(x_query),
            latents=latents,
            bend=bend if self.bent else None,
        )

    def _bend(
        self, process: Process, space: Columns, trend: Trend, generator: torch.Generator
    ) -> tuple[Bend, dict[str, Tensor]]:
        """The bends of a batch, in the units that functions have a priori, and its latents.

        The latent noise is what is left of it where slopes are the geometric mean over the space.
        """
        if not self.bent:
            return Bend.identity(process.noise), process.latents
        x = space.draw(MOMENTS, generator=generator)
        center, variance = process.mean.unsqueeze(-1) + trend(x), process.variance(x)
        scale = (center.var(-1) + variance.mean(-1)).sqrt()
        bend = Bend.draw(center.mean(-1), scale, self.bent, generator=generator)
        f = center + variance.sqrt() * draw_normal(len(x), MOMENTS, generator=generator)
        latents = dict(process.latents)
        if "noise" in latents:
            latents["noise"] = process.noise * (2 * bend.log_slope(f).mean(-1)).exp()
        return bend, latents

    def _trend(self, batch: int, d: int, generator: torch.Generator) -> Trend:
        """The trends of a batch: 0, or bowls around centres of their own, steep in some columns."""
        if self.bowl is None:
            return lambda x: x.new_zeros(x.shape[:2])
        size = draw(self.bowl, (batch, 1), generator=generator)
        uniform = torch.rand(
            2, batch, 1, d, dtype=torch.float64, device=generator.device, generator=generator
        )
        centre = (1 + 2 * BEYOND) * uniform[0] - BEYOND
        weight = -uniform[1].clamp_min(1e-12).log()
        weight = STEEPNESS * weight / weight.square().sum(-1, keepdim=True).sqrt()
        return lambda x: -size * (weight * (x - centre).square()).sum(-1)


class _Search:
    """Searches of one batch, each for the highest y, or the lowest if not all go upwards."""

    def __init__(
        self,
        space: Columns,
        process: Process,
        trend: Trend,
        bend: Bend,
        upwards: bool,
        batch: int,
        generator: torch.Generator,
    ) -> None:
        self.space, self.process, self.trend, self.bend = space, process, trend, bend
        self.generator = generator
        sign = self._uniform(batch, 1).sub(0.5).sign()
        self.sign = sign.abs() if upwards else sign
        self.greed = 30 ** self._uniform(batch, 1)  # of the choice among good points
        self.change = 0.1 + 0.9 * self._uniform(batch, 1, 1)  # share of columns that move

    def run(self, n: int, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (task, n, dim), y, the bend of mean + L z + trend, (task, n), L and z."""
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
            seen = self.process.mean.unsqueeze(-1) + seen.squeeze(-1) + self.trend(new)
            x, y = torch.cat([x, new], 1), torch.cat([y, self.bend(seen)], 1)
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
