"""The eleven parametric learning curves of Domhan et al., with the priors that LC-PFN gave them.

Each maps steps x >= 1 to a performance, elementwise in x and its parameters. A prior is normal or
uniform after a link (the logarithm, say), so that every parameter is a monotone function of a
standard normal coordinate: a prior draw is a standard normal vector, and the prior's log density in
these coordinates is that of N(0, I) for all families. Read `parametric_curves.py` next.

Reference: Domhan, Springenberg and Hutter, Speeding up automatic hyperparameter optimization of
deep neural networks by extrapolation of learning curves, IJCAI 2015, table 1; Adriaensen et al.,
Efficient Bayesian learning curve extrapolation using prior-data fitted networks, NeurIPS 2023
(arXiv 2310.20447), section 3 and its code, whose constants these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, Uniform


class Parameter(NamedTuple):
    """A parameter whose link, "identity", "log" or "log1m" for ln(1 - value), has a simple law."""

    name: str
    prior: Normal | Uniform
    link: str = "identity"

    def value(self, z: Tensor) -> Tensor:
        """The parameter at standard normal coordinates z, elementwise."""
        linked = from_standard_normal(self.prior, z)
        if self.link == "log":
            return linked.exp()
        return 1 - linked.exp() if self.link == "log1m" else linked

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of an unlinked parameter, -inf off its support; elementwise."""
        assert self.link == "identity"
        if isinstance(self.prior, Normal):
            loc, scale = float(self.prior.loc), float(self.prior.scale)
            return log_normal((value - loc) / scale) - math.log(scale)
        inside = (value >= self.prior.low) & (value <= self.prior.high)
        return torch.where(inside, -(self.prior.high - self.prior.low).log(), -math.inf)


class Family(NamedTuple):
    """A curve: a function of the step and its parameters, which broadcast against it.

    Doubling the first `linear` parameters, if any, doubles the curve.
    """

    function: Callable[..., Tensor]
    parameters: tuple[Parameter, ...]
    linear: int = 0

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """The curve at steps x (..., point) with coordinates z (..., parameter)."""
        values = (p.value(z[..., i : i + 1]) for i, p in enumerate(self.parameters))
        return self.function(x, *values)


def from_standard_normal(law: Distribution, z: Tensor) -> Tensor:
    """What has distribution `law`, normal or uniform, where z is standard normal; elementwise."""
    if isinstance(law, Normal):
        return float(law.loc) + float(law.scale) * z
    assert isinstance(law, Uniform)
    return float(law.low) + float(law.high - law.low) * torch.special.ndtr(z)


def log_density(z: Tensor) -> Tensor:
    """The prior's log density (...,) of coordinates z (..., dim), whatever the families."""
    return log_normal(z).sum(-1)


def log_normal(z: Tensor) -> Tensor:
    """The log density of N(0, 1), elementwise."""
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)


def pow3(x: Tensor, c: Tensor, a: Tensor, alpha: Tensor) -> Tensor:
    """c - a x^-alpha."""
    return c - a * _power(x, -alpha)


def ilog2(x: Tensor, c: Tensor, a: Tensor) -> Tensor:
    """c - a / ln(x + 1)."""
    return c - a / x.log1p()


def janoschek(x: Tensor, a: Tensor, beta: Tensor, k: Tensor, delta: Tensor) -> Tensor:
    """a - (a - beta) exp(-k x^delta)."""
    return a - (a - beta) * (-k * _power(x, delta)).exp()


def log_power(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a / (1 + (x / e^b)^c)."""
    return a / (1 + (c * (x.log() - b)).exp())


def weibull(x: Tensor, alpha: Tensor, beta: Tensor, kappa: Tensor, delta: Tensor) -> Tensor:
    """alpha - (alpha - beta) exp(-(kappa x)^delta)."""
    return alpha - (alpha - beta) * (-_power(kappa * x, delta)).exp()


def mmf(x: Tensor, alpha: Tensor, beta: Tensor, kappa: Tensor, delta: Tensor) -> Tensor:
    """alpha - (alpha - beta) / (1 + (kappa x)^delta)."""
    return alpha - (alpha - beta) / (1 + _power(kappa * x, delta))


def vap(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """exp(a + b / x + c ln x)."""
    return (a + b / x + c * x.log()).exp()


def loglog_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """ln(a ln x + b)."""
    return (a * x.log() + b).log()


def exp4(x: Tensor, c: Tensor, a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    """c - exp(-a x^alpha + b)."""
    return c - (b - a * _power(x, alpha)).exp()


def pow4(x: Tensor, c: Tensor, a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    """c - (a x + b)^-alpha."""
    return c - _power(a * x + b, -alpha)


def dr_hill(x: Tensor, theta: Tensor, eta: Tensor, kappa: Tensor) -> Tensor:
    """theta x^eta / (kappa^eta + x^eta), in a form whose powers do not overflow together."""
    return theta / (1 + (eta * (kappa.log() - x.log())).exp())


def _power(x: Tensor, exponent: Tensor) -> Tensor:
    """x^exponent for x > 0, three times as fast as torch's."""
    return (exponent * x.log()).exp()


FAMILIES: dict[str, Family] = {
    "pow3": Family(
        pow3,
        (
            Parameter("c", Uniform(0.0, 1.25)),
            Parameter("a", Uniform(-0.6, 0.6)),
            Parameter("alpha", Normal(0.0, 2.0), "log"),
        ),
        linear=2,
    ),
    "ilog2": Family(ilog2, (Parameter("c", Uniform(0.0, 1.0)), Parameter("a", Uniform(-0.5, 0.5)))),
    "janoschek": Family(
        janoschek,
        (
            Parameter("a", Uniform(0.0, 1.0)),
            Parameter("beta", Uniform(0.0, 2.0)),
            Parameter("k", Normal(-2.0, 1.0), "log"),
            Parameter("delta", Normal(0.0, 0.5), "log"),
        ),
        linear=2,
    ),
    "log_power": Family(
        log_power,
        (
            Parameter("a", Normal(0.8, 0.1)),
            Parameter("b", Normal(1.0, 1.0)),
            Parameter("c", Uniform(-3.0, 0.0)),
        ),
        linear=1,
    ),
    "weibull": Family(
        weibull,
        (
            Parameter("alpha", Uniform(0.0, 1.5)),
            Parameter("beta", Uniform(0.0, 1.0)),
            Parameter("kappa", Normal(-2.0, 1.0), "log"),
            Parameter("delta", Normal(0.0, 0.5), "log"),
        ),
        linear=2,
    ),
    "mmf": Family(
        mmf,
        (
            Parameter("alpha", Normal(0.8, 0.1)),
            Parameter("beta", Normal(0.2, 0.1)),
            Parameter("kappa", Normal(0.0, 2.0), "log"),
            Parameter("delta", Normal(0.0, 1.0), "log"),
        ),
        linear=2,
    ),
    "vap": Family(
        vap,
        (
            Parameter("a", Uniform(-2.0, 0.0)),
            Parameter("b", Uniform(-4.0, 0.0)),
            Parameter("c", Uniform(-8.0, 0.0), "log"),
        ),
    ),
    "loglog_linear": Family(
        loglog_linear,
        (Parameter("a", Normal(-2.0, 1.0), "log"), Parameter("b", Uniform(0.0, 1.0), "log")),
    ),
    "exp4": Family(
        exp4,
        (
            Parameter("c", Normal(0.8, 0.1)),
            Parameter("a", Normal(-2.0, 1.0), "log"),
            Parameter("b", Normal(0.0, 0.5), "log"),
            Parameter("alpha", Normal(0.0, 1.0), "log"),
        ),
    ),
    "pow4": Family(
        pow4,
        (
            Parameter("c", Uniform(-5.0, 0.0), "log1m"),
            Parameter("a", Normal(-3.0, 2.0), "log"),
            Parameter("b", Uniform(0.0, 1.0), "log"),
            Parameter("alpha", Normal(0.0, 1.0), "log"),
        ),
    ),
    "dr_hill": Family(
        dr_hill,
        (
            Parameter("theta", Normal(0.8, 0.1)),
            Parameter("eta", Normal(1.0, 1.0), "log"),
            Parameter("kappa", Normal(1.0, 2.0), "log"),
        ),
        linear=1,
    ),
}
