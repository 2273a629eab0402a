"""Distributions that torch lacks: mixtures of different families, and warped ones with moments.

`MixtureOf` is what a `Mixture` of priors and a posterior by draws of a Pyro program answer with,
`Transformed` is what `Warped` does. Both have mean, variance, log_prob, cdf, icdf and sample, made
from the same pieces of what they are made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Transform,
    constraints,
)

HERMITE_NODES = 96  # integrate polynomials of a normal up to degree 191


class MixtureOf(Distribution):
    """sum_k w_k p_k for distributions p_k of any families, of one shape.

    Args:
        log_weights: (component, ...), of which `...` broadcasts with the components' batch_shape;
            normalised here.
        components: distributions of equal batch_shape and event_shape.

    Example:
        >>> from torch.distributions import Laplace
        >>> mixture = MixtureOf(torch.zeros(2), [Normal(0.0, 1.0), Laplace(1.0, 1.0)])
        >>> float(mixture.mean)
        0.5
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, log_weights: Tensor, components: Sequence[Distribution]) -> None:
        first = components[0]
        if any(
            (part.batch_shape, part.event_shape) != (first.batch_shape, first.event_shape)
            for part in components
        ):
            shapes = [(tuple(p.batch_shape), tuple(p.event_shape)) for p in components]
            raise ValueError(f"Expected components of one shape; got {shapes}.")
        self.components = tuple(components)
        missing = 1 + len(first.batch_shape) - log_weights.dim()  # axes between component and ...
        log_weights = log_weights.reshape(len(log_weights), *[1] * missing, *log_weights.shape[1:])
        self.log_weights = log_weights.log_softmax(0).expand(len(components), *first.batch_shape)
        super().__init__(first.batch_shape, first.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        means = torch.stack([part.mean for part in self.components])
        return self.average(means, len(self.event_shape))

    @property
    def variance(self) -> Tensor:
        means = torch.stack([part.mean for part in self.components])
        within = torch.stack([part.variance for part in self.components])
        events = len(self.event_shape)
        between = (means - self.average(means, events)).square()
        return self.average(within + between, events)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_shares(value).logsumexp(0)

    def log_prob_error(self, value: Tensor) -> Tensor:
        """About how far `log_prob(value)` may be off, in nats: 0 where all components are exact.

        Errors of components that state one, weighted by their shares of the density at `value`;
        those that state none count as exact.
        """
        shares = self._log_shares(value).softmax(0)
        errors = [
            part.log_prob_error(value) if hasattr(part, "log_prob_error") else torch.zeros(())
            for part in self.components
        ]
        return sum(
            (s * e for s, e in zip(shares, errors, strict=True)), torch.zeros_like(shares[0])
        )

    def cdf(self, value: Tensor) -> Tensor:
        return self.average(torch.stack([part.cdf(value) for part in self.components]))

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles at levels `value` in (0, 1), by bisection."""
        return invert_cdf(self, value)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent draws of every batch entry; one joint draw of each event."""
        shape = torch.Size(sample_shape)
        uniform = torch.rand(len(self.components), *shape, *self.batch_shape, dtype=torch.float64)
        gumbel = -(-uniform.log()).log()  # the largest of log w_k + gumbel_k is k with chance w_k
        weights = self.log_weights.reshape(-1, *[1] * len(shape), *self.batch_shape)
        chosen = (weights + gumbel).argmax(0)  # (*sample_shape, *batch_shape)
        chosen = chosen.reshape(*chosen.shape, *[1] * len(self.event_shape))
        draw = self.components[0].sample(shape)
        for index, part in enumerate(self.components[1:], 1):
            if bool((chosen == index).any()):
                draw = torch.where(chosen == index, part.sample(shape), draw)
        return draw

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixtureOf:
        components = [part.expand(batch_shape) for part in self.components]
        new, extra = torch.Size(batch_shape), len(batch_shape) - len(self.batch_shape)
        weights = self.log_weights.reshape(-1, *[1] * extra, *self.batch_shape)
        return MixtureOf(weights.expand(-1, *new), components)

    def _log_shares(self, value: Tensor) -> Tensor:
        """log w_k p_k(value), (component, ...)."""
        log_densities = torch.stack([part.log_prob(value) for part in self.components])
        extra = log_densities.dim() - self.log_weights.dim()
        shape = (len(self.components), *[1] * max(0, extra), *self.batch_shape)
        return self.log_weights.reshape(shape) + log_densities

    def average(self, parts: Tensor, events: int = 0) -> Tensor:
        """Sum over components of w_k parts_k.

        Args:
            parts: (component, ..., *batch_shape) and, after it, `events` axes.
        """
        extra = parts.dim() - 1 - len(self.batch_shape) - events
        shape = (len(parts), *[1] * extra, *self.batch_shape, *[1] * events)
        return (self.log_weights.exp().reshape(shape) * parts).sum(0)


class SameFamily(MixtureSameFamily):
    """A mixture with quantiles that can be expanded, although its parts know more than torch's."""

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles at levels `value` in (0, 1), by bisection."""
        return invert_cdf(self, value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixtureSameFamily:
        """The same mixture with more batch dimensions; it states no error any more."""
        components = *batch_shape, self._num_component
        return MixtureSameFamily(
            self.mixture_distribution.expand(batch_shape),
            self.component_distribution.expand(components),
        )


class StackOf(Distribution):
    """Independent distributions of one shape, stacked along a new first batch axis.

    Args:
        parts: distributions of equal batch_shape and event_shape.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, parts: Sequence[Distribution]) -> None:
        self.parts = tuple(parts)
        shape = torch.Size([len(parts), *parts[0].batch_shape])
        super().__init__(shape, parts[0].event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.stack([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        return torch.stack([part.variance for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        return self._each("log_prob", value)

    def log_prob_error(self, value: Tensor) -> Tensor:
        """That of each part."""
        return self._each("log_prob_error", value)

    def cdf(self, value: Tensor) -> Tensor:
        return self._each("cdf", value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles at levels `value` in (0, 1), by bisection."""
        return invert_cdf(self, value)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        return torch.stack([part.sample(shape) for part in self.parts], len(shape))

    def _each(self, name: str, value: Tensor) -> Tensor:
        """A method of all parts, each at its entries of `value`."""
        whole = self.batch_shape + (self.event_shape if name.startswith("log_prob") else ())
        value = value.expand(torch.broadcast_shapes(value.shape, whole))
        entries = value.unbind(value.dim() - len(whole))
        answers = [getattr(p, name)(v) for p, v in zip(self.parts, entries, strict=True)]
        return torch.stack(answers, answers[0].dim() - len(self.batch_shape) + 1)


class Transformed(Distribution):
    """The law of g(Z) for an increasing or decreasing g of the real line, elementwise.

    Unlike torch's TransformedDistribution it has mean and variance: over mixtures component by
    component, by Gauss-Hermite quadrature for normals, by a trapezoidal rule in z = m + s sinh(t)
    for others.

    Args:
        base: the law of Z, batch_shape (...,), or event_shape (m,) for joint laws.
        transform: g, with its inverse and Jacobian.

    Example:
        >>> from torch.distributions import ExpTransform
        >>> round(float(Transformed(Normal(0.0, 1.0), ExpTransform()).mean), 4)  # exp(1 / 2)
        1.6487
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012

    def __init__(self, base: Distribution, transform: Transform) -> None:
        self.base, self.transform = base, transform
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return expectation(self.base, self.transform)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return expectation(self.base, lambda z: (self.transform(z) - mean).square())

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus infinity out of the range of g."""
        value, inside = self._clip(value)
        z = self.transform.inv(value)
        slope = self.transform.log_abs_det_jacobian(z, value)
        slope = slope.sum(-1) if self.event_shape else slope
        inside = inside.all(-1) if self.event_shape else inside
        return (self.base.log_prob(z) - slope).where(inside, -math.inf)

    def log_prob_error(self, value: Tensor) -> Tensor:
        """The base's, or zero where it states none and out of the range of g."""
        value, inside = self._clip(value)
        z = self.transform.inv(value)
        if not hasattr(self.base, "log_prob_error"):
            return torch.zeros_like(self.base.log_prob(z))
        inside = inside.all(-1) if self.event_shape else inside
        error: Tensor = self.base.log_prob_error(z)
        return error.where(inside, 0.0)

    def cdf(self, value: Tensor) -> Tensor:
        """Zero below the range of g, one above."""
        clipped, inside = self._clip(value)
        below = self.base.cdf(self.transform.inv(clipped))
        below = below if self.transform.sign > 0 else 1 - below
        return below.where(inside, (value > clipped).to(below.dtype))

    def _clip(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """`value` with g(0) where it is out of the range of g, and where it is not."""
        # a composition states the codomain of its last part only, so its inverse may be NaN
        outside = ~self.transform.codomain.check(value) | self.transform.inv(value).isnan()
        inside = ~outside | value.isnan()  # NaN stays the base's to refuse
        return value.where(inside, self.transform(torch.zeros_like(value))), inside

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles at levels `value` in (0, 1)."""
        level = value if self.transform.sign > 0 else 1 - value
        try:
            return self.transform(self.base.icdf(level))
        except NotImplementedError:
            return self.transform(invert_cdf(self.base, level))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.transform(self.base.sample(torch.Size(sample_shape)))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Transformed:
        return Transformed(self.base.expand(batch_shape), self.transform)


def invert_cdf(distribution: Distribution, level: Tensor) -> Tensor:
    """The values at which the cdf is `level`, in (0, 1), by bisection to the last bits.

    The search starts from mean and standard deviation, or from 0 and 1 where there are none.
    """
    shape = torch.broadcast_shapes(level.shape, distribution.batch_shape)
    center = distribution.mean.nan_to_num(0.0, 0.0, 0.0).expand(shape)
    scale = distribution.variance.nan_to_num(1.0, 1.0, 1.0).sqrt().expand(shape)
    low, high = center - scale, center + scale
    for _ in range(1000):
        below, above = distribution.cdf(low) > level, distribution.cdf(high) < level
        if not bool((below | above).any()):
            break
        low = torch.where(below, center - 2 * (center - low), low)
        high = torch.where(above, center + 2 * (high - center), high)
    for _ in range(64):
        middle = (low + high) / 2
        is_below = distribution.cdf(middle) < level
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2


def expectation(distribution: Distribution, g: Callable[[Tensor], Tensor]) -> Tensor:
    """E[g(Z)] elementwise, of the distribution's batch_shape + event_shape.

    Args:
        g: maps (node, ...) to (node, ...).
    """
    if isinstance(distribution, MixtureSameFamily):
        events = len(distribution.event_shape)
        axis = -1 - events

        def by_component(z: Tensor) -> Tensor:  # what g holds has no axis of components
            return g(z.movedim(axis, 0)).movedim(0, axis)

        parts = expectation(distribution.component_distribution, by_component)
        weights = distribution.mixture_distribution.probs
        return (weights.reshape(*weights.shape, *[1] * events) * parts).sum(axis)
    if isinstance(distribution, MixtureOf):
        parts = torch.stack([expectation(part, g) for part in distribution.components])
        return distribution.average(parts, len(distribution.event_shape))
    if isinstance(distribution, Independent):
        return expectation(distribution.base_dist, g)
    if isinstance(distribution, MultivariateNormal):
        return expectation(Normal(distribution.loc, distribution.variance.sqrt()), g)
    if isinstance(distribution, Normal):
        return _of_normal(distribution, g)
    return _of_density(distribution, g)


def _of_normal(normal: Normal, g: Callable[[Tensor], Tensor]) -> Tensor:
    """Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(HERMITE_NODES)
    t = torch.from_numpy(nodes).reshape(-1, *[1] * normal.loc.dim())
    weight = torch.from_numpy(weights / math.sqrt(2 * math.pi)).reshape(t.shape)
    return (weight * g(normal.loc + normal.scale * t)).sum(0)


def _of_density(distribution: Distribution, g: Callable[[Tensor], Tensor]) -> Tensor:
    """The trapezoidal rule in t where z = m + s sinh(t), which reaches 1e5 deviations far."""
    t = torch.arange(-12, 12.005, 0.01, dtype=torch.float64)
    t = t.reshape(-1, *[1] * len(distribution.batch_shape))
    scale = distribution.stddev.where(distribution.stddev.isfinite(), 1.0)
    z = distribution.mean + scale * t.sinh()
    weight = (distribution.log_prob(z) + t.cosh().log()).softmax(0)
    return (weight * g(z)).nan_to_num(nan=0.0).sum(0)
