"""Hyperparameters as unconstrained coordinates that are about standard normal under their prior.

Quadrature and NUTS both work in these coordinates: t = 0 is the prior median, and a normal or
log-normal prior is exactly Normal(0, 1).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Distribution,
    LogNormal,
    Normal,
    biject_to,
)
from torch.distributions.transforms import Transform

from priors.draws import draw

if TYPE_CHECKING:
    from priors.kernel_prior import Hyperparameter

FREE = torch.linspace(-2, 2, 3, dtype=torch.float64)  # where bijections are recognised


class Coordinate(NamedTuple):
    """One hyperparameter, or one for each feature: value = factor * transform(t)."""

    name: str
    prior: Distribution
    location: Tensor  # of the unconstrained hyperparameter, location + scale * t
    scale: Tensor
    factor: float
    shape: tuple[int, ...]  # (), or (dim,) for one per feature
    spacing: float  # of lattice nodes, at most, in the unconstrained hyperparameter

    @property
    def transform(self) -> Transform:
        standard = AffineTransform(self.location, self.scale)
        return ComposeTransform([standard, biject_to(self.prior.support)])

    @property
    def is_log(self) -> bool:
        """Whether the unconstrained hyperparameter is the logarithm of the value."""
        return torch.equal(self._in_three_places, FREE.exp())

    @property
    def _in_three_places(self) -> Tensor:
        return biject_to(self.prior.support)(FREE)

    def log_density(self, t: Tensor) -> Tensor:
        """The prior's log density at each t (...,)."""
        value = self.transform(t)
        return self.prior.log_prob(value) + self.transform.log_abs_det_jacobian(t, value)

    def normal(self, law: Distribution) -> Normal | None:
        """The normal law of t that gives the hyperparameter this law; None if t's is no normal.

        Args:
            law: of batch_shape (*shape, ...); a log-normal one of a positive hyperparameter or a
                normal one of a real one have an answer.
        """
        if isinstance(law, LogNormal) and self.is_log:
            loc, spread = law.loc - math.log(self.factor), law.scale
        elif isinstance(law, Normal) and torch.equal(self._in_three_places, FREE):
            loc, spread = law.loc / self.factor, law.scale / self.factor
        else:
            return None
        rest = [1] * (loc.dim() - len(self.shape))
        location, scale = (
            part.expand(self.shape).reshape(*self.shape, *rest)
            for part in (self.location, self.scale)
        )
        return Normal((loc - location) / scale, spread / scale)


class Hyperpriors(NamedTuple):
    """The hyperparameters that vary, those that are known, and the variance of a normal mean.

    A mean with a normal prior is conjugate: it is integrated out in closed form as a constant
    kernel, and "mean" in `known` is its prior mean.
    """

    coordinates: tuple[Coordinate, ...]
    known: dict[str, Tensor]
    mean_variance: float

    @property
    def dim(self) -> int:
        return sum(math.prod(coordinate.shape) for coordinate in self.coordinates)

    def values(self, t: Tensor) -> dict[str, Tensor]:
        """All hyperparameters at t (node, dim): (node,), or (node, dim) with one per feature."""
        theta = {name: v.expand(len(t), *v.shape) for name, v in self.known.items()}
        for coordinate, part in self._parts(t):
            theta[coordinate.name] = coordinate.factor * coordinate.transform(part)
        return theta

    def log_density(self, t: Tensor) -> Tensor:
        """The prior's log density (node,) in the coordinates t (node, dim)."""
        total = t.new_zeros(len(t))
        for coordinate, part in self._parts(t):
            total = total + coordinate.log_density(part).reshape(len(t), -1).sum(-1)
        return total

    def draw(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Independent draws (count, dim) of the prior, in its coordinates."""
        columns = [
            c.transform.inv(draw(c.prior, (count, *c.shape), generator=generator))
            for c in self.coordinates
        ]
        return torch.cat([column.reshape(count, -1) for column in columns], 1)

    def _parts(self, t: Tensor) -> list[tuple[Coordinate, Tensor]]:
        parts, start = [], 0
        for coordinate in self.coordinates:
            end = start + math.prod(coordinate.shape)
            parts.append((coordinate, t[:, start:end].reshape(len(t), *coordinate.shape)))
            start = end
        return parts


def hyperpriors(
    hyperparameters: Sequence[Hyperparameter], given: Mapping[str, Tensor]
) -> Hyperpriors:
    """The hyperpriors of one task, where `given` are known to the user.

    Args:
        given: name -> tensor () or, for one hyperparameter per feature, (d,); also the indices of
            alternatives, which are kept as they are.
    """
    unknown, mean_variance = [], 0.0
    names = {h.name for h in hyperparameters}
    known = {name: v.to(torch.float64) for name, v in given.items() if name not in names}
    for hyperparameter in hyperparameters:
        name, value, _, shape, factor, _ = hyperparameter
        if name in given:
            known[name] = given[name].to(torch.float64).expand(shape)
        elif not isinstance(value, Distribution):
            known[name] = torch.full(shape, factor * float(value), dtype=torch.float64)
        elif name == "mean" and type(value) is Normal:
            known[name] = value.loc.to(torch.float64)
            mean_variance = float(value.scale) ** 2
        else:
            unknown.append(hyperparameter)
    return Hyperpriors(coordinates(unknown), known, mean_variance)


def coordinates(hyperparameters: Sequence[Hyperparameter]) -> tuple[Coordinate, ...]:
    """Of those hyperparameters that have a distribution."""
    found = []
    for name, value, _, shape, factor, spacing in hyperparameters:
        if isinstance(value, Distribution):
            value = _in_float64(value)
            location, scale = _standardise(value)
            found.append(Coordinate(name, value, location, scale, factor, shape, spacing))
    return tuple(found)


def _in_float64(prior: Distribution) -> Distribution:
    """The same distribution with its parameters in float64, where its constructor shows them."""
    cls: Any = type(prior)
    names = [name for name in inspect.signature(cls).parameters if name != "validate_args"]
    parameters = {name: getattr(prior, name, None) for name in names}
    tensors = {name: v.double() for name, v in parameters.items() if isinstance(v, Tensor)}
    return cls(**tensors) if len(tensors) == len(names) else prior


def _standardise(prior: Distribution) -> tuple[Tensor, Tensor]:
    """Median and half the central 68 % interval of the unconstrained hyperparameter."""
    levels = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    try:
        quantiles = prior.icdf(levels.reshape(3, *[1] * len(prior.batch_shape)))
    except NotImplementedError:
        generator = torch.Generator().manual_seed(0)
        draws = draw(prior, (4096, *prior.batch_shape), generator=generator)
        quantiles = draws.quantile(levels, 0)
    low, median, high = biject_to(prior.support).inv(quantiles.to(torch.float64))
    return median, (high - low) / 2
