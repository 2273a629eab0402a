"""The posterior density of the hyperparameters of one task, as samplers see it.

`KernelPrior.latent_densities` is the front door. With the units of y free, it is the density for
data that were standardised: their location and scale have flat priors, as those of the prior say
nothing about them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from priors.context import read_context
from priors.draws import draw_normal
from priors.hyperpriors import Coordinate, Hyperpriors, hyperpriors
from priors.kernel_prior import Hyperparameter, KernelPrior
from priors.reference import Dense, alternatives, categories, read_given

FLAT = 1e5  # variance of a mean whose prior is flat, in the prior's units of y^2


class HyperparameterDensity(NamedTuple):
    """A `priors.tasks.LatentDensity`: of the hyperparameters of a task under one alternative."""

    prior: KernelPrior
    hyper: Hyperpriors
    model: Dense
    log_constant: float  # log probability of the alternative; makes the prior of a free mean 1
    known: frozenset[str]  # latents that the user knows
    choice: dict[str, int]
    unit: FreeUnit | None

    @property
    def dim(self) -> int:
        """Of the hyperparameters, and one more for a free unit of y."""
        return self.hyper.dim + (self.unit is not None)

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        return self.hyper.coordinates

    def log_density(self, t: Tensor) -> Tensor:
        """log p(t, y, alternative | x), (node,)."""
        prior = self.hyper.log_density(t) if self.unit is None else self._log_prior(self.unit, t)
        likelihood = self.model.log_likelihood_or_none(self._theta(t))
        total = self.log_constant + prior + likelihood
        return total.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def predict(self, t: Tensor, x_query: Tensor, *, latent: bool = False) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (node, m) of y, or f, at x_query (m, d)."""
        theta = self._theta(t)
        mean, variance = self.model.predict(theta, x_query)
        noise = self.prior.variances(theta)[1].unsqueeze(-1)
        return mean, (variance if latent else variance + noise).sqrt()

    def latents(self, t: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """The unknown latents, (node,) or (node, dim), a normal mean drawn given t."""
        theta = self._theta(t)
        if self.hyper.mean_variance:
            mean, variance = self.model.mean(theta)
            theta["mean"] = mean + variance.sqrt() * draw_normal(len(t), generator=generator)
        latents = self.prior.report_latents(theta, self.model.x.shape[-1])
        return {name: value for name, value in latents.items() if name not in self.known}

    def _theta(self, t: Tensor) -> dict[str, Tensor]:
        """All hyperparameters, in the units that y has."""
        theta = self.hyper.values(t[:, : self.hyper.dim])
        if self.unit is not None:
            shrunk = (-2 * self.unit.log_unit(t)).exp()
            theta |= {name: theta[name] * shrunk for name in self.unit.fixed}
        return theta

    def _log_prior(self, unit: FreeUnit, t: Tensor) -> Tensor:
        """The prior's log density (node,), with the unit's flat one."""
        log_unit = unit.log_unit(t).unsqueeze(-1)
        total = self.hyper.log_density(t[:, :-1] + unit.slopes * log_unit)
        for coordinate, known in unit.known:
            total = total + coordinate.log_density(known + 2 / coordinate.scale * log_unit[:, 0])
        return total - 0.5 * math.log(unit.precision)


class FreeUnit(NamedTuple):
    """An unknown unit of y, exp(u) times the prior's.

    A variance v in units of y is exp(2 u) v in the prior's, so that its coordinate there is t + c
    u, where c is 2 over the scale of its logarithm. The last latent is u around what the others say
    a priori, sum(c t) / sum(c^2), in units of their uncertainty, 1 / sqrt(sum(c^2)): of log-normal
    variances it is exactly standard normal and independent of them.
    """

    slopes: Tensor  # (dim,) c of all coordinates, 0 of those that do not scale with y
    known: tuple[tuple[Coordinate, Tensor], ...]  # variances that the user knows, at t ()
    fixed: tuple[str, ...]  # variances that are plain numbers in the prior's units

    @property
    def precision(self) -> float:
        """Of u a priori; 1 where nothing is said about it."""
        total = float(self.slopes.square().sum())
        return total + sum(float(2 / c.scale) ** 2 for c, _ in self.known) or 1.0

    def log_unit(self, t: Tensor) -> Tensor:
        """u (node,) at t (node, dim + 1)."""
        said = t[:, :-1] @ self.slopes
        for coordinate, known in self.known:
            said = said + 2 / coordinate.scale * known
        return t[:, -1] / math.sqrt(self.precision) - said / self.precision


@torch.no_grad()
def latent_densities(
    prior: KernelPrior,
    context: tuple[Any, Any],
    given: Mapping[str, Any] | None,
    free_location: bool,
    free_scale: bool,
) -> list[HyperparameterDensity]:
    """What `KernelPrior.latent_densities` returns; see there."""
    x, y, _, batched = read_context(context)
    if batched:
        raise ValueError("Expected one task, x of shape (n, d) or (n,); got a batch of tasks.")
    x, y, d = x[0], y[0], x.shape[-1]
    known = read_given(prior.hyperparameters(d), given or {}, 1, categories(prior))
    known = {name: value[0] for name, value in known.items()}
    names, free_location = frozenset(known), free_location and "mean" not in known
    if free_location:
        known["mean"] = torch.zeros((), dtype=torch.float64)
    parts = alternatives(prior, d, known)
    constant = 0.5 * math.log(2 * math.pi * FLAT) * free_location - math.log(len(parts))
    densities = []
    for index, hyper in parts.items():
        if free_location:
            hyper = hyper._replace(mean_variance=FLAT)
        model = Dense(prior, x, y, hyper.mean_variance)
        choice = {prior.choice: index} if len(prior.alternatives) > 1 else {}
        unit = _free_unit(prior.hyperparameters(d), hyper, known) if free_scale else None
        density = HyperparameterDensity(prior, hyper, model, constant, names, choice, unit)
        densities.append(density)
    return densities


def _free_unit(
    hyperparameters: tuple[Hyperparameter, ...], hyper: Hyperpriors, known: Mapping[str, Tensor]
) -> FreeUnit:
    """The unit of y of a task with these hyperpriors, where `known` are known to the user."""
    variances = [h for h in hyperparameters if h.unit == "y^2"]
    names = {h.name for h in variances}
    random = [h for h in variances if isinstance(h.value, Distribution)]
    told = hyperpriors([h for h in random if h.name in known], {}).coordinates
    for coordinate in (*told, *(c for c in hyper.coordinates if c.name in names)):
        if not coordinate.is_log:
            raise ValueError(
                f"Expected a {coordinate.name} that may have any positive value, as the unit of y"
                f" is free; its prior is {coordinate.prior}."
            )
    slopes = [
        (2 / c.scale if c.name in names else torch.zeros_like(c.scale)).expand(c.shape).reshape(-1)
        for c in hyper.coordinates
    ]
    return FreeUnit(
        torch.cat([*slopes, torch.zeros(0, dtype=torch.float64)]),
        tuple((c, c.transform.inv(known[c.name] / c.factor)) for c in told),
        tuple(h.name for h in variances if h not in random and h.name not in known),
    )
