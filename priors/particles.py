"""Tasks of a Gaussian process with several hyperparameters each, weighed by their likelihood.

The hyperparameters that drew a task are one draw from their posterior. Others that the data leave
as plausible are proposed around a common centre, which is itself drawn around the first: then which
of them came first is told by their likelihoods alone, and weights proportional to these leave the
posterior as it is (multiple-proposal Metropolis with a reversible proposal). What a weighted
average over the particles says of a query is therefore right in expectation whatever the proposals
are, and closer to the exact posterior predictive than the first particle alone.

References: Tjelmeland, Using all Metropolis-Hastings proposals to estimate mean values, NTNU
Statistics 4/2004; for the proposal, which leaves a standard normal prior as it is, Cotter, Roberts,
Stuart and White, MCMC methods for functions, Statistical Science 28, 2013, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.draws import draw_normal
from priors.hyperpriors import Coordinate, coordinates
from priors.inputs import draw_inputs
from priors.tasks import ParticleTasks

if TYPE_CHECKING:
    from priors.kernel_prior import KernelPrior

REACH = 7.0  # of proposals, in standard deviations of the prior, times sqrt(observations * values)


def sample_particles(
    prior: KernelPrior,
    batch: int,
    n: int,
    d: int,
    visible: Tensor,
    *,
    particles: int,
    held: Mapping[str, Tensor],
    generator: torch.Generator,
) -> ParticleTasks:
    """What `KernelPrior.sample_particles` says."""
    from priors.kernel_prior import JITTER, cholesky, pieces  # built on this module

    first = prior.draw_hyperparameters(batch, d, generator=generator)
    x = draw_inputs(prior.inputs, batch, n + len(visible), d, generator=generator)
    unknown = coordinates(prior.hyperparameters(d))
    theta, log_ratio = _propose(unknown, first, n, particles, held, generator)  # (b k, ...), (b, k)

    drew = {name: value[::particles] for name, value in theta.items()}
    signal, noise = prior.variances(drew)
    factor = cholesky(prior.covariance(x[:, :n], x[:, :n], drew), noise + JITTER * signal)
    y = drew["mean"].unsqueeze(-1) + (
        factor @ draw_normal(batch, n, 1, generator=generator)
    ).squeeze(-1)

    def of_each(value: Tensor) -> Tensor:  # (task, ...) to (task * particle, ...)
        return value.unsqueeze(1).expand(-1, particles, *value.shape[1:]).flatten(0, 1)

    each = (
        _explain(prior, some, inputs, observed, visible.to(x.device))
        for some, inputs, observed in pieces(theta, of_each(x), of_each(y))
    )
    log_likelihood, mean, variance = (
        torch.cat(parts).view(batch, particles, -1).mT for parts in zip(*each, strict=True)
    )  # (task, query, particle)
    log_weights = log_likelihood + log_ratio.unsqueeze(1)
    log_weights = log_weights.nan_to_num(-math.inf, -math.inf, -math.inf)  # proposals that overflow
    return ParticleTasks(
        x=x[:, :n],
        y=y,
        x_query=x[:, n:],
        log_weights=log_weights.log_softmax(-1),
        mean=mean,
        variance=variance,
        noise=prior.variances(theta)[1].view(batch, particles),
        latents={
            name: value.unflatten(0, (batch, particles))
            for name, value in prior.report_latents(theta, d).items()
        },
    )


def _explain(
    prior: KernelPrior, theta: Mapping[str, Tensor], x: Tensor, y: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log likelihood, but for constants, of the y that queries see, and their mean and variance.

    Args:
        theta: hyperparameters (k, ...).
        x: (k, n + m, d), the last of them queries.
        y: (k, n).
        visible: (m,).
    """
    from priors.kernel_prior import JITTER, cholesky  # built on this module

    n = y.shape[1]
    signal, noise = prior.variances(theta)
    factor = cholesky(prior.covariance(x[:, :n], x[:, :n], theta), noise + JITTER * signal)
    constant = theta["mean"].unsqueeze(-1)
    cross = prior.covariance(x[:, :n], x[:, n:], theta)
    sides = torch.cat([(y - constant).unsqueeze(-1), cross], -1)
    solved = torch.linalg.solve_triangular(factor, sides, upper=False)
    white, weights = solved[..., :1], solved[..., 1:]  # (k, n, 1), (k, n, m)
    weights = weights * (torch.arange(n, device=x.device).unsqueeze(-1) < visible)
    left = prior.variance(x[:, n:], theta) - weights.square().sum(1)
    steps = -0.5 * white.squeeze(-1).square() - factor.diagonal(dim1=-2, dim2=-1).log()
    log_likelihood = F.pad(steps.cumsum(-1), (1, 0))[:, visible]
    mean = constant + (weights * white).sum(1)
    return log_likelihood, mean, left.clamp_min(JITTER * signal.unsqueeze(-1))


def _propose(
    unknown: tuple[Coordinate, ...],
    first: dict[str, Tensor],
    n: int,
    particles: int,
    held: Mapping[str, Tensor],
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    """Hyperparameters (task * particle, ...), and log weights (task, particle) but for likelihoods.

    In coordinates t that are about standard normal, the centre is c ~ Normal(r t, 1 - r^2), and the
    others are t' ~ Normal(r c, 1 - r^2). Their reach falls with the number of observations, as the
    posterior's does, and with the number of values, as that of random walks must, times a factor
    drawn for each task.
    """
    device = generator.device  # distributions live on the CPU, and all of this is small
    first, held = ({name: v.cpu() for name, v in some.items()} for some in (first, held))
    batch = len(next(iter(first.values())))
    values = sum(first[coordinate.name][0].numel() for coordinate in unknown)
    uniform = torch.rand(batch, 1, dtype=torch.float64, device=device, generator=generator).cpu()
    reach = (REACH / math.sqrt((1 + n) * max(values, 1)) * 4 ** (uniform - 0.5)).clamp_max(1.0)
    kept = (1 - reach.square()).sqrt()
    theta = {
        name: value.unsqueeze(1).repeat_interleave(particles, 1) for name, value in first.items()
    }
    log_ratio = uniform.new_zeros(batch, particles)
    for coordinate in unknown:
        name, transform = coordinate.name, coordinate.transform
        t = transform.inv(first[name] / coordinate.factor).reshape(batch, 1, -1)
        center, others = (
            draw_normal(batch, count, t.shape[-1], generator=generator).cpu()
            for count in (1, particles - 1)
        )
        wide, keep = reach.unsqueeze(1), kept.unsqueeze(1)
        center = keep * t + wide * center
        every = torch.cat([t, keep * center + wide * others], 1)  # (task, particle, values)
        value = (coordinate.factor * transform(every)).reshape(theta[name].shape)
        shared = torch.zeros_like(first[name], dtype=torch.bool)
        shared = held.get(name, shared).unsqueeze(1).expand(theta[name].shape).clone()
        shared[:, 0] = True
        theta[name] = torch.where(shared, theta[name], value)
        every = torch.where(shared.reshape(every.shape), t, every)
        shaped = every.reshape(theta[name].shape)
        ratio = coordinate.log_density(shaped).reshape(every.shape) + 0.5 * every.square()
        log_ratio = log_ratio + ratio.sum(-1)
    flat = {name: value.flatten(0, 1).to(device) for name, value in theta.items()}
    return flat, log_ratio.to(device)
