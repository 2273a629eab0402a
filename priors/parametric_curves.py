"""The published priors of learning curves: weighted sums of parametric curves that end above their
start and stay in [0, 1].

`LearningCurves.lcpfn()` and `LearningCurves.domhan()` make them. Hard walls on a whole curve are
what gradient-based samplers handle badly; the reference posterior is by the sequential Monte Carlo
of `smc.py`, which starts from exact prior draws and never leaves the walls. Read
`curve_families.py` for the formulas, `curves.py` for the prior that the networks learn from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from priors.context import Context, read_context
from priors.curve_families import FAMILIES, Family, log_density, log_normal
from priors.draws import draw_normal
from priors.smc import ISLANDS, SmcDraws, SmcPosterior, sample_smc
from priors.tasks import ConditionalTasks, Tasks

KNOWN = 1e-12  # the variance of a curve that is known
CANDIDATES = 2**14  # curves at once
CACHED = 2**16  # points, 512 KiB
SWEEPS = 100  # of moves per temperature
SMOOTHING = 0.15  # of posterior standard deviations, about Silverman's choice for 10,000 draws


@dataclass(frozen=True)
class ParametricCurves:
    """Curves f(t) = sum_k w_k f_k(t), t = 1 .. horizon, and y = f + Normal(0, sigma^2).

    The weights are independent and uniform on (0, 1), not normalised, and log sigma ~ Normal; all
    is redrawn until f(horizon) > f(1) and f stays in [0, 1] at every step. The noise may leave it.

    Inputs are x = t / horizon. A task's rows are steps in order of time: the first k in a row, k
    uniform, and the rest spread evenly over the later steps, so that every prefix is a context
    and all steps appear where n = horizon; with more rows some steps are measured repeatedly.

    Args:
        families: names in `priors.curve_families.FAMILIES`.
        horizon: number of steps T, at least 2; the walls make the posterior depend on it.
        log_noise: mean and standard deviation of log sigma, the standard deviation of the noise.

    Latents in `Tasks`: "noise" (task,), the variance sigma^2, and "final" (task,), f(horizon).

    Reference: Adriaensen et al., NeurIPS 2023 (arXiv 2310.20447), section 3, and its code.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> ParametricCurves().sample(batch=64, n=100, d=1, generator=g).y.shape
        torch.Size([64, 100])
    """

    families: tuple[str, ...] = ("pow3", "ilog2", "janoschek")
    horizon: int = 100
    log_noise: tuple[float, float] = (-4.0, 1.0)

    def __post_init__(self) -> None:
        unknown = [name for name in self.families if name not in FAMILIES]
        if unknown or not self.families:
            raise ValueError(f"Expected families among {sorted(FAMILIES)}; got {self.families}.")
        if self.horizon < 2:
            raise ValueError(f"Expected a horizon of at least 2 steps; got {self.horizon}.")

    @property
    def latent_units(self) -> dict[str, str]:
        """How each latent scales with the data."""
        return {"noise": "y^2", "final": "y"}

    @property
    def dim(self) -> int:
        """The number of coordinates of a curve: parameters by family, weights, log sigma."""
        return sum(len(f.parameters) + 1 for f in self._members) + 1

    def posterior_is_quick(self, d: int) -> bool:
        """It takes seconds."""
        return False

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` curves of `n` rows in float64 on the generator's device.

        Raises:
            ValueError: unless d = 1.
        """
        if d != 1:
            raise ValueError(f"Expected d = 1, the time, for parametric curves; got d = {d}.")
        t = self.draw(batch, generator=generator)
        steps = _steps(batch, n, self.horizon, generator=generator)
        f = self._by_pieces(steps, t)
        sigma = self.sigma(t).unsqueeze(-1)
        y = f + sigma * draw_normal(batch, n, generator=generator)
        final = self.curve(torch.full_like(steps[:, :1], self.horizon), t).squeeze(-1)
        latents = {"noise": sigma.squeeze(-1).square(), "final": final}
        x = (steps / self.horizon).unsqueeze(-1)
        return Tasks(x, y, f, latents, num_context=max(n - 1, 0))

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Tasks whose queries know their distribution given the latents: f is known, y is noisy.

        Args:
            visible: (m,); what a query sees changes nothing here, as the latents say it all.
        """
        tasks = self.sample(batch, n + len(visible), d, generator=generator)
        mean = tasks.f[:, n:]
        return ConditionalTasks(
            x=tasks.x[:, :n],
            y=tasks.y[:, :n],
            x_query=tasks.x[:, n:],
            mean=mean,
            variance=torch.full_like(mean, KNOWN),
            noise=tasks.latents["noise"],
            latents=tasks.latents,
        )

    def posterior(
        self,
        context: tuple[Any, Any],
        x_query: Any,
        latent: bool = False,
        *,
        joint: bool = False,
        particles: int = 8000,
        seed: int = 0,
    ) -> Distribution:
        """The posterior predictive at `x_query`: one normal for each of many posterior curves.

        Seconds for each task: where several questions follow, `infer` once and `predict` often.

        Args:
            context: x (n,), (n, 1) or (b, n, 1), as fractions of the horizon, and y (n,) or (b, n).
            x_query: (m,), (m, 1) or (b, m, 1).
            latent: the noise-free curve instead of a new observation; its draws are smoothed by a
                kernel of 0.15 standard deviations that keeps mean and variance.
            joint: one joint distribution over all queries instead of one for each.
            particles: posterior curves, a multiple of 8; the error falls as their root.
            seed: of the sampler.

        Returns:
            A float64 mixture of batch_shape (m,) or (b, m); with `joint`, event_shape (m,). It has
            `log_prob_error`, the Monte Carlo error of its log density.

        Raises:
            ValueError: arguments of other shapes, not finite, or x outside (0, 1].
        """
        data = self._read(context, x_query)
        if particles < ISLANDS or particles % ISLANDS:
            raise ValueError(f"Expected particles in multiples of {ISLANDS}; got {particles}.")
        draws = [
            self._infer(x, y, particles, (seed, i))
            for i, (x, y) in enumerate(zip(data.x, data.y, strict=True))
        ]
        parts = [
            self._predict(some, query, latent)
            for some, query in zip(draws, data.x_query, strict=True)
        ]
        weights, mean, spread = (torch.stack(part) for part in zip(*parts, strict=True))
        if not data.batched:
            weights, mean, spread = weights[0], mean[0], spread[0]
        return _mixture(weights, mean, spread, joint)

    def predict(self, draws: SmcDraws, x_query: Tensor) -> SmcPosterior:
        """What `posterior` returns for the draws of `infer` at queries (m,)."""
        return _mixture(*self._predict(draws, x_query.unsqueeze(-1), False), False)

    def log_evidence(
        self, context: tuple[Any, Any], *, particles: int = 8000, seed: int = 0
    ) -> Tensor:
        """log p(y | x) in nats, () or (b,); see `posterior`.

        It is a Monte Carlo estimate: `infer` says how precise, about a tenth of a nat, several in
        ten on curves of little noise.
        """
        data = self._read(context, None)
        totals = torch.stack(
            [
                self._infer(x, y, particles, (seed, i)).log_evidence
                for i, (x, y) in enumerate(zip(data.x, data.y, strict=True))
            ]
        )
        return totals if data.batched else totals[0]

    def infer(self, context: tuple[Any, Any], *, particles: int = 8000, seed: int = 0) -> SmcDraws:
        """Posterior draws of the coordinates of one task, with evidence, error and diagnostics."""
        data = self._read(context, None)
        if data.batched:
            raise ValueError("Expected one task, x of shape (n, 1) or (n,); got a batch of tasks.")
        return self._infer(data.x[0], data.y[0], particles, (seed, 0))

    def draw(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Coordinates (count, dim) of prior curves, by rejection; accepted ones in their order."""
        ends = torch.tensor([1.0, self.horizon], dtype=torch.float64, device=generator.device)
        accepted = [draw_normal(0, self.dim, generator=generator)]
        missing, tried = count, min(CANDIDATES, 8 * count)
        while missing > 0:
            t = self.coordinates(draw_normal(tried, self.dim, generator=generator))
            t = t[_rises_inside(self.curve(ends, t))]  # most fail by their ends
            accepted.append(t[self.is_allowed(t)])
            missing -= len(accepted[-1])
            tried = min(CANDIDATES, 2 * tried)
        return torch.cat(accepted)[:count]

    def is_allowed(self, t: Tensor) -> Tensor:
        """Whether curves with coordinates t (curve, dim) meet the walls, (curve,)."""
        steps = torch.arange(1.0, self.horizon + 1, dtype=t.dtype, device=t.device)
        size = max(1, CACHED // self.horizon)
        parts = [_rises_inside(self.curve(steps, some)) for some in t.split(size)]
        return torch.cat(parts)

    def coordinates(self, z: Tensor) -> Tensor:
        """Coordinates t (curve, dim) of curves with standard normal z (curve, dim).

        A family's linear parameters are multiplied by its weight: then the data say nothing about
        the weight beyond its products, and the posterior is straight where it was bent.
        """
        t = z.clone()
        for family, start, last in self._layout():
            weight = torch.special.ndtr(z[:, last])
            for i in range(start, start + family.linear):
                t[:, i] = weight * family.parameters[i - start].value(z[:, i])
        return t

    def log_prior(self, t: Tensor) -> Tensor:
        """The prior's log density (curve,) at coordinates t (curve, dim), but for the walls."""
        total = log_normal(t[:, -1])
        for family, start, last in self._layout():
            middle = start + family.linear
            total = total + log_density(t[:, middle : last + 1])
            log_weight = torch.special.log_ndtr(t[:, last])
            for i in range(start, middle):
                value = t[:, i] / log_weight.exp()
                total = total + family.parameters[i - start].log_prob(value) - log_weight
        return total

    def curve(self, steps: Tensor, t: Tensor) -> Tensor:
        """f at steps (point,) or (curve, point), for coordinates t (curve, dim): (curve, point)."""
        total = torch.zeros((), dtype=t.dtype, device=t.device)
        for family, start, last in self._layout():
            middle = start + family.linear
            shape = zip(
                family.parameters[family.linear :], t[:, middle:last].unbind(1), strict=True
            )
            values = [column.unsqueeze(1) for column in t[:, start:middle].unbind(1)]
            values += [parameter.value(z).unsqueeze(1) for parameter, z in shape]
            part = family.function(steps, *values)
            weight = torch.special.ndtr(t[:, last : last + 1])
            total = total + (part if family.linear else weight * part)
        return total

    def _by_pieces(self, steps: Tensor, t: Tensor) -> Tensor:
        """`curve` at steps (curve, point), on a CPU as many curves at a time as a cache holds."""
        size = len(t) if t.device.type != "cpu" else max(1, CACHED // max(1, steps.shape[1]))
        pieces = zip(steps.split(max(1, size)), t.split(max(1, size)), strict=True)
        return torch.cat([self.curve(*piece) for piece in pieces])

    def sigma(self, t: Tensor) -> Tensor:
        """The noise's standard deviation (curve,)."""
        mean, std = self.log_noise
        return (mean + std * t[:, -1]).exp()

    def _layout(self) -> Iterator[tuple[Family, int, int]]:
        """Each family with its first coordinate and the one of its weight, which is its last."""
        start = 0
        for family in self._members:
            last = start + len(family.parameters)
            yield family, start, last
            start = last + 1

    @property
    def _members(self) -> tuple[Family, ...]:
        return tuple(FAMILIES[name] for name in self.families)

    def _read(self, context: tuple[Any, Any], x_query: Any) -> Context:
        data = read_context(context, x_query)
        if data.x.shape[-1] != 1:
            raise ValueError(f"Expected x with one feature, the time; got {data.x.shape[-1]}.")
        for name, x in (("x", data.x), ("x_query", data.x_query)):
            if not bool(((x > 0) & (x <= 1)).all()):
                raise ValueError(
                    f"Expected {name} in (0, 1], fractions of the horizon of {self.horizon} steps; "
                    f"got values from {float(x.min()):g} to {float(x.max()):g}."
                )
        return data

    def _infer(self, x: Tensor, y: Tensor, particles: int, seed: tuple[int, int]) -> SmcDraws:
        """Posterior draws for x (n, 1) and y (n,)."""
        generator = torch.Generator().manual_seed(_number(*seed))
        steps = x.squeeze(-1) * self.horizon

        def log_likelihood(t: Tensor) -> Tensor:
            sigma = self.sigma(t)
            square = ((y - self.curve(steps, t)) / sigma.unsqueeze(-1)).square().sum(-1)
            return -0.5 * square - len(y) * (sigma.log() + 0.5 * math.log(2 * math.pi))

        return sample_smc(
            self.draw(particles, generator=generator),
            self.log_prior,
            log_likelihood,
            generator=generator,
            allowed=self.is_allowed,
            max_sweeps=SWEEPS,
        )

    def _predict(
        self, draws: SmcDraws, x_query: Tensor, latent: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights (particle,), means and standard deviations (particle, m)."""
        f = self.curve(x_query.squeeze(-1) * self.horizon, draws.t)
        if not latent:
            return draws.log_weights, f, self.sigma(draws.t).unsqueeze(-1).expand_as(f)
        weights = draws.log_weights.exp().unsqueeze(-1)
        center = (weights * f).sum(0)
        spread = (weights * (f - center).square()).sum(0).sqrt().clamp_min(1e-9)
        shrunk = center + math.sqrt(1 - SMOOTHING**2) * (f - center)
        return draws.log_weights, shrunk, (SMOOTHING * spread).expand_as(f)


def _mixture(weights: Tensor, mean: Tensor, spread: Tensor, joint: bool) -> SmcPosterior:
    """Of log weights (..., particle) and normals (..., particle, query)."""
    if joint:
        return SmcPosterior(weights, Independent(Normal(mean, spread), 1))
    weights = weights.unsqueeze(-2).expand(mean.mT.shape)
    return SmcPosterior(weights, Normal(mean.mT, spread.mT))


def _rises_inside(f: Tensor) -> Tensor:
    """Whether curves (curve, point) end above their start, in [0, 1] throughout; NaN is outside."""
    return (f[:, -1] > f[:, 0]) & (f >= 0).all(1) & (f <= 1).all(1)


def _number(seed: int, task: int) -> int:
    """One seed of two, the same on every machine."""
    name = f"curves/{seed}/{task}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big")


def _steps(batch: int, n: int, horizon: int, *, generator: torch.Generator) -> Tensor:
    """Steps (batch, n) in order: 1 .. k with k uniform, then an even sample of the later ones."""
    uniform = torch.rand(
        2, batch, 1, dtype=torch.float64, device=generator.device, generator=generator
    )
    lead = (uniform[0] * (min(n, horizon - 1) + 1)).floor()
    row = torch.arange(n, dtype=torch.float64, device=generator.device)
    later = (row - lead + uniform[1]) * (horizon - lead) / (n - lead).clamp_min(1)
    return torch.where(row < lead, row + 1, lead + 1 + later.floor()).clamp_max(horizon)
