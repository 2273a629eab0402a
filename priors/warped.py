"""Priors seen through monotone warps of their inputs, their outputs, or both.

An input warp stretches the axes: f(x) = h(w(x)), so that functions of the base vary faster in some
regions than in others. By default every task and feature has a Kumaraswamy warp of its own, with
random concentrations. An output warp bends values: y = g(z), for counts, rates and other data that
are not normal around their function. For bases with a kernel, `WarpedKernel` makes concentrations
hyperparameters like any other; read `kernel_prior.py` for what follows from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal, Transform, Uniform, constraints

from priors.context import read_context
from priors.distributions import Transformed
from priors.draws import draw
from priors.kernel_prior import Hyperparameter, KernelPrior
from priors.reference import Marginal
from priors.tasks import Tasks

Concentrations = tuple[float | Distribution, float | Distribution]


@dataclass(frozen=True)
class Warped:
    """A base prior whose inputs and outputs are warped: y = g(z), z drawn by the base at w(x).

    Args:
        base: any prior; with random input warps only a `KernelPrior` has a posterior.
        input: concentrations (a, b) of Kumaraswamy warps, positive numbers or distributions of
            which every task and feature draws its own; or a fixed, increasing torch Transform of
            inputs, elementwise; None: inputs as they are.
        output: a fixed torch Transform g of the real line, increasing or decreasing, applied to
            function and observation alike; None: outputs as they are.
        irrelevant: probability that a feature does not matter: its warp is then constant. For
            bases with a kernel.

    Inputs of a base with a kernel follow its design; those of any other base are what the base
    draws, pulled back through the warp.

    Latents in `Tasks`: the base's; "concentration1" (a) and "concentration0" (b), (task, dim),
    where they are not plain numbers; "relevance" (task, dim), 1 where a feature matters and 0 where
    not, if some may be irrelevant.

    `sample_conditional`, `sample_particles`, `draw_process` and `latent_densities` are there for
    bases with a kernel and no output warp.

    Reference: Kumaraswamy, J. Hydrology 46, 1980; Snoek, Swersky, Zemel and Adams, Input warping
    for Bayesian optimization, ICML 2014; the default concentrations of Mueller, Feurer, Hollmann
    and Hutter, PFNs4BO, ICML 2023, section 4.

    Example:
        >>> from priors import GaussianProcess
        >>> g = torch.Generator().manual_seed(0)
        >>> Warped(GaussianProcess()).sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    base: Any
    input: Concentrations | Transform | None = (LogNormal(0.0, 0.75), LogNormal(0.0, 0.75))
    output: Transform | None = None
    irrelevant: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.input, Transform):
            _check_transform("input", self.input)
        elif self.input is not None:
            object.__setattr__(self, "input", tuple(self.input))
            positive = [v for v in self.input if isinstance(v, Distribution) or v > 0]
            if len(positive) != 2:
                raise ValueError(f"Expected two positive concentrations; got {self.input}.")
        if self.output is not None:
            _check_transform("output", self.output)
        if not 0 <= self.irrelevant < 1:
            raise ValueError(f"Expected a probability irrelevant in [0, 1); got {self.irrelevant}.")
        if self.irrelevant and not isinstance(self.base, KernelPrior):
            raise ValueError(
                "Expected a base with a kernel where features may be irrelevant; "
                f"got a {type(self.base).__name__}."
            )
        if self.output is None and isinstance(self.base, KernelPrior):
            object.__setattr__(self, "draw_process", self.inner.draw_process)
            object.__setattr__(self, "sample_conditional", self.inner.sample_conditional)
            object.__setattr__(self, "sample_particles", self.inner.sample_particles)
            object.__setattr__(self, "latent_densities", self.inner.latent_densities)

    @property
    def inner(self) -> Any:
        """The prior of z: with a kernel if the base has one, else the base itself, at w(x)."""
        if isinstance(self.base, KernelPrior):
            return WarpedKernel(self.base, self.input, self.irrelevant)
        return self.base

    @property
    def latent_units(self) -> dict[str, str]:
        """How each latent scales with the data; warps leave little that does."""
        units = dict(getattr(self.inner, "latent_units", {}))
        if not isinstance(self.base, KernelPrior):
            units |= {"concentration1": "", "concentration0": ""}
        lost = {"x"} if self.input is not None else set()
        lost |= {"y", "y^2"} if self.output is not None else set()
        return {name: "" if unit in lost else unit for name, unit in units.items()}

    @property
    def latent_categories(self) -> dict[str, list[str]]:
        """The names behind latents that are indices."""
        return getattr(self.base, "latent_categories", {})

    def posterior_is_quick(self, d: int) -> bool:
        """Whether the posterior of z is there, and quick."""
        if not isinstance(self.base, KernelPrior) and _is_random(self.input):
            return False
        return hasattr(self.inner, "posterior_is_quick") and self.inner.posterior_is_quick(d)

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` features, in float64 on the generator's device."""
        tasks: Tasks = self.inner.sample(batch, n, d, generator=generator)
        if self.input is not None and not isinstance(self.base, KernelPrior):
            tasks = self._pull_back(tasks, generator=generator)
        if self.output is not None:
            tasks = tasks._replace(y=self.output(tasks.y), f=self.output(tasks.f))
        return tasks

    def posterior(
        self,
        context: tuple[Any, Any],
        x_query: Any,
        latent: bool = False,
        *,
        joint: bool = False,
        **options: Any,
    ) -> Distribution:
        """The posterior predictive at `x_query`, random warps integrated out.

        Args:
            context: x (n, d) or (b, n, d), or (n,) where d = 1, and y (n,) or (b, n), in the range
                of the output warp.
            x_query: (m, d), (b, m, d) or (m,).
            latent: the noise-free function instead of a new observation.
            joint: one joint distribution over all queries instead of one for each.
            options: of the base's posterior; `given`, `method` and `seed` if it has a kernel.

        Returns:
            What the base's posterior is, batch_shape (m,) or (b, m); with an output warp the law of
            g(z) under it.

        Raises:
            ValueError: arguments of other shapes, not finite, or outside the output warp's range;
                a random input warp of a base without a kernel.
        """
        inner, query, _ = self._unwarp(context, x_query)
        posterior: Distribution = self.inner.posterior(inner, query, latent, joint=joint, **options)
        return posterior if self.output is None else Transformed(posterior, self.output)

    def log_evidence(self, context: tuple[Any, Any], **options: Any) -> Tensor:
        """log p(y | x) in nats, () or (b,): the base's evidence of z, and the Jacobian of g.

        Args: see `posterior`.
        """
        inner, _, log_slope = self._unwarp(context, None)
        return self.inner.log_evidence(inner, **options) - log_slope

    def latent_posterior(self, context: tuple[Any, Any], **options: Any) -> dict[str, Marginal]:
        """The posterior marginals of the latents of one task, where the base has them.

        Args: see `posterior`; the context is one task.
        """
        inner, _, _ = self._unwarp(context, None)
        return self.inner.latent_posterior(inner, **options)

    def _unwarp(
        self, context: tuple[Any, Any], x_query: Any | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Context and queries of the inner prior, and the sum of log |dy / dz|, () or (b,)."""
        x, y, query, batched = read_context(context, x_query)
        if not isinstance(self.base, KernelPrior) and self.input is not None:
            if _is_random(self.input):
                raise ValueError(
                    "Expected a fixed input warp, or a base with a kernel, for a posterior; got a "
                    f"{type(self.base).__name__} with a random warp."
                )
            x, query = (_warp_by(self.input, part) for part in (x, query))
        log_slope = y.new_zeros(len(y))
        if self.output is not None:
            z = self.output.inv(y)
            if not bool(self.output.codomain.check(y).all() and z.isfinite().all()):
                raise ValueError(
                    "Expected y in the range of the output warp; "
                    f"got values from {float(y.min())} to {float(y.max())}."
                )
            log_slope = self.output.log_abs_det_jacobian(z, y).sum(-1)
            y = z
        if batched:
            return (x, y), query, log_slope
        return (x[0], y[0]), query[0], log_slope[0]

    def _pull_back(self, tasks: Tasks, *, generator: torch.Generator) -> Tasks:
        """The same tasks at the inputs that the warp maps to theirs."""
        if isinstance(self.input, Transform):
            return tasks._replace(x=self.input.inv(tasks.x))
        assert self.input is not None
        shape = (tasks.x.shape[0], tasks.x.shape[2])
        a, b = (draw(value, shape, generator=generator) for value in self.input)
        latents = {
            name: value
            for name, value, prior in zip(
                ("concentration1", "concentration0"), (a, b), self.input, strict=True
            )
            if isinstance(prior, Distribution)
        }
        x = kumaraswamy_inverse(tasks.x, a.unsqueeze(-2), b.unsqueeze(-2))
        return tasks._replace(x=x, latents=tasks.latents | latents)


@dataclass(frozen=True)
class WarpedKernel(KernelPrior):
    """A prior whose kernel sees its inputs through `Warped`'s input warp; fields as there."""

    base: KernelPrior
    input: Concentrations | Transform | None
    irrelevant: float

    def __post_init__(self) -> None:
        limit = 0 if self.irrelevant else self.base.quadrature_limit  # no lattice for a step
        object.__setattr__(self, "quadrature_limit", limit)
        object.__setattr__(self, "inputs", self.base.inputs)
        object.__setattr__(self, "choice", self.base.choice)
        names = tuple(h.name for h in self._warps(1))
        object.__setattr__(self, "shaping", (*names, *self.base.shaping))

    @property
    def alternatives(self) -> tuple[str, ...]:
        return self.base.alternatives

    def hyperparameters(self, d: int) -> tuple[Hyperparameter, ...]:
        """Those of the warps, then the base's."""
        return (*self._warps(d), *self.base.hyperparameters(d))

    def unit_covariance(self, x: Tensor, z: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The base's unit kernel (task, n, m) between warped inputs."""
        return self.base.unit_covariance(self.warp(x, theta), self.warp(z, theta), theta)

    def unit_variance(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """Its diagonal (task, n)."""
        return self.base.unit_variance(self.warp(x, theta), theta)

    def variances(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The base's."""
        return self.base.variances(theta)

    def warp(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """What the kernel sees of x (task, n, d)."""
        if isinstance(self.input, Transform):
            x = self.input(x)
        elif self.input is not None:
            a, b = theta["concentration1"], theta["concentration0"]
            x = kumaraswamy(x, a.unsqueeze(-2), b.unsqueeze(-2))
        if self.irrelevant:
            x = x * (theta["relevance"] > self.irrelevant).unsqueeze(-2)
        return x

    def latent_posterior(
        self,
        context: tuple[Any, Any],
        *,
        given: Mapping[str, Any] | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> dict[str, Marginal]:
        """As `KernelPrior.latent_posterior`, with "relevance" 1 where a feature matters, else 0."""
        marginals = super().latent_posterior(context, given=given, method=method, seed=seed)
        if "relevance" in marginals:
            weights = marginals["relevance"].weights
            matters = (marginals["relevance"].values > self.irrelevant).double()
            marginals["relevance"] = Marginal(matters, weights, matters, matters)
        return marginals

    def _warps(self, d: int) -> list[Hyperparameter]:
        warps = []
        if self.input is not None and not isinstance(self.input, Transform):
            names = ("concentration1", "concentration0")
            for name, value in zip(names, self.input, strict=True):
                warps.append(Hyperparameter(name, value, "", (d,), spacing=0.3))
        if self.irrelevant:  # uniform, so that samplers move in it as in any other variable
            warps.append(Hyperparameter("relevance", Uniform(0.0, 1.0), "", (d,), spacing=0.3))
        return warps

    def report_latents(self, theta: dict[str, Tensor], d: int) -> dict[str, Tensor]:
        latents = super().report_latents(theta, d)
        if self.irrelevant:
            latents["relevance"] = (latents["relevance"] > self.irrelevant).double()
        return latents


class SinhArcsinh(Transform):
    """g(z) = sinh((arcsinh(z) + skewness) / tail), a warp that skews and fattens normal tails.

    Args:
        skewness: any number; positive skews to the right.
        tail: positive; below 1 tails are heavier than the base's, above 1 lighter.

    Reference: Jones and Pewsey, Sinh-arcsinh distributions, Biometrika 96, 2009, section 2.

    Example:
        >>> g = SinhArcsinh(skewness=0.5, tail=0.8)
        >>> z = torch.tensor([-2.0, 0.0, 3.0])
        >>> torch.allclose(g.inv(g(z)), z)
        True
    """

    domain = codomain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, skewness: float = 0.0, tail: float = 1.0) -> None:
        super().__init__()
        if not tail > 0:
            raise ValueError(f"Expected a positive tail; got {tail}.")
        self.skewness, self.tail = skewness, tail

    def _call(self, x: Tensor) -> Tensor:
        return ((x.asinh() + self.skewness) / self.tail).sinh()

    def _inverse(self, y: Tensor) -> Tensor:
        return (self.tail * y.asinh() - self.skewness).sinh()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log cosh(arcsinh(y)) - log(tail) - log(sqrt(1 + x^2))."""
        return 0.5 * (y.square().log1p() - x.square().log1p()) - math.log(self.tail)


def kumaraswamy(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The cdf 1 - (1 - x^a)^b on the unit interval, and x itself outside: increasing throughout.

    Args:
        x: any shape.
        a: positive, broadcasts with x; large a flattens the curve near 0.
        b: positive; large b flattens it near 1.

    Reference: Kumaraswamy, J. Hydrology 46, 1980.
    """
    inside = (x > 0) & (x < 1)
    log_power = a * torch.where(inside, x, 0.5).log()
    return torch.where(inside, -torch.expm1(b * _log1mexp(log_power)), x)


def kumaraswamy_inverse(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The x at which `kumaraswamy` is u."""
    inside = (u > 0) & (u < 1)
    log_rest = torch.log1p(-torch.where(inside, u, 0.5)) / b
    return torch.where(inside, (_log1mexp(log_rest) / a).exp(), u)


def _log1mexp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) for value < 0, to the last digits at both ends.

    Reference: Maechler, Accurately computing log(1 - exp(-|a|)), 2012.
    """
    near = value > -math.log(2)
    close = (-torch.expm1(torch.where(near, value, -1.0))).log()
    return torch.where(near, close, torch.log1p(-torch.where(near, -1.0, value).exp()))


def _warp_by(warp: Concentrations | Transform, x: Tensor) -> Tensor:
    """x under a fixed warp."""
    if isinstance(warp, Transform):
        return warp(x)
    return kumaraswamy(x, *(torch.as_tensor(value, dtype=torch.float64) for value in warp))


def _is_random(warp: Concentrations | Transform | None) -> bool:
    return isinstance(warp, tuple) and any(isinstance(value, Distribution) for value in warp)


def _check_transform(name: str, transform: Transform) -> None:
    """Raises a ValueError if a transform is not monotone and elementwise on the real line."""
    elementwise = transform.domain.event_dim == 0 and transform.codomain.event_dim == 0
    on_reals = bool(transform.domain.check(torch.tensor([-1.0, 0.0, 1.0])).all())
    if not (transform.bijective and elementwise and on_reals):
        raise ValueError(
            f"Expected a monotone, elementwise transform of the real line as {name}; "
            f"got {transform}."
        )
    if name == "input" and not transform.sign > 0:
        raise ValueError(f"Expected an increasing transform of inputs; got {transform}.")
