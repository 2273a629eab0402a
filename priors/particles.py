"""Tasks of a Gaussian process with several hyperparameters each, weighed by their posterior.

The hyperparameters that drew a task are one draw from their posterior. Others are proposed around a
common centre, which is itself drawn around the first. Up to a factor that all share, the joint
density is then the same whichever of them came first, but for likelihood and prior: given the data
and all particles, the chance that one drew the task is its weight. So the weighted average of what
the particles say of a query has the expectation of the first particle's word, that of the exact
posterior predictive, with less variance (Rao-Blackwell), however far the proposals reach.

References: Tjelmeland, Using all Metropolis-Hastings proposals to estimate mean values, NTNU
Statistics 4/2004; for the proposal, which leaves a standard normal prior as it is, Cotter, Roberts,
Stuart and White, MCMC methods for functions, Statistical Science 28, 2013, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution

from priors.draws import draw_normal
from priors.hyperpriors import Hyperpriors, coordinates
from priors.inputs import draw_inputs
from priors.kernel_prior import (
    Hyperparameter,
    KernelPrior,
    conditional_given,
    covariances,
    observe,
    pieces,
)
from priors.tasks import ParticleTasks

# Step size of proposals in prior standard deviations, times sqrt((1 + observations) * values): of
# 1.5 to 17, about what brings targets of `gp-1d` closest to the posterior at 5, 20 and 60 points.
STEP = 7.0


def particle_tasks(
    prior: KernelPrior,
    sizes: tuple[int, int, int],
    visible: Tensor,
    particles: int,
    held: Mapping[str, Tensor],
    generator: torch.Generator,
) -> ParticleTasks:
    """What `KernelPrior.sample_particles` says, of sizes (batch, n, d)."""
    batch, n, d = sizes
    first = prior.draw_hyperparameters(batch, d, generator=generator)
    x = draw_inputs(prior.inputs, batch, n + len(visible), d, generator=generator)
    y = observe(prior.process(first, d), x[:, :n], generator)
    unknown = [h for h in prior.hyperparameters(d) if _is_continuous(h)]
    particles = particles if unknown else 1
    theta, log_ratio = _propose(unknown, first, n, particles, held, generator)

    def of_each(value: Tensor) -> Tensor:  # (task, ...) to (task * particle, ...)
        return value.repeat_interleave(particles, 0)

    each = (
        _explain(prior, some, inputs, observed, visible.to(x.device))
        for some, inputs, observed in pieces(theta, of_each(x), of_each(y))
    )
    log_weights, mean, variance = (
        torch.cat(parts).view(batch, particles, -1).mT for parts in zip(*each, strict=True)
    )  # (task, query, particle)
    log_weights = log_weights + log_ratio.unsqueeze(1)
    noise = prior.variances(theta)[1].view(batch, 1, particles)
    usable = torch.stack([log_weights, mean, variance]).isfinite().all(0).all(1, keepdim=True)
    mean, variance, noise = (  # of proposals that overflow, those of the first
        torch.where(usable, value, value[..., :1]) for value in (mean, variance, noise)
    )
    return ParticleTasks(
        x=x[:, :n],
        y=y,
        x_query=x[:, n:],
        log_weights=log_weights.masked_fill(~usable, -math.inf).log_softmax(-1),
        mean=mean,
        variance=variance,
        noise=noise.squeeze(1),
        latents={
            name: value.unflatten(0, (batch, particles))
            for name, value in prior.report_latents(theta, d).items()
        },
    )


def _explain(
    prior: KernelPrior, theta: dict[str, Tensor], x: Tensor, y: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log likelihood, but for constants, of the y that queries see, and their mean and variance.

    Args:
        theta: hyperparameters (k, ...).
        x: (k, n + m, d), the last of them queries.
        y: (k, n).
        visible: (m,).
    """
    n = y.shape[1]
    process = prior.process(theta, x.shape[-1])
    within, cross = covariances(process, x, n)
    factor, z = prior.whiten_given(within, y, theta)
    said = conditional_given(
        process, x[:, :n], x[:, n:], visible, cross=cross, factor=factor, z=z.unsqueeze(-1)
    )
    steps = -0.5 * z.square() - factor.diagonal(dim1=-2, dim2=-1).log()
    return F.pad(steps.cumsum(-1), (1, 0))[:, visible], said.mean, said.variance


def _propose(
    unknown: list[Hyperparameter],
    first: dict[str, Tensor],
    n: int,
    particles: int,
    held: Mapping[str, Tensor],
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], Tensor]:
    """Hyperparameters (task * particle, ...), and log weights (task, particle) but for likelihoods.

    In coordinates t that are about standard normal and a step size s, with r^2 = 1 - s^2, the
    centre is c ~ Normal(r t, s^2) and the others are t' ~ Normal(r c, s^2). s falls with the number
    of observations, as the posterior's width does, and with the number of values, as that of random
    walks must, times a factor drawn for each task.
    """
    device, batch = generator.device, len(next(iter(first.values())))
    theta = {name: value.repeat_interleave(particles, 0) for name, value in first.items()}
    if not unknown:
        return theta, torch.zeros(batch, particles, dtype=torch.float64, device=device)
    law = Hyperpriors(coordinates(unknown), {}, 0.0)  # on the CPU, as distributions are
    columns = {
        c.name: c.transform.inv(first[c.name].cpu() / c.factor).reshape(batch, -1)
        for c in law.coordinates
    }
    t = torch.cat(list(columns.values()), 1).unsqueeze(1)  # (task, 1, value)
    is_held = torch.cat(
        [
            held[name].cpu().reshape(batch, -1) if name in held else torch.zeros_like(part).bool()
            for name, part in columns.items()
        ],
        dim=1,
    ).unsqueeze(1)
    uniform = torch.rand(batch, 1, 1, dtype=torch.float64, device=device, generator=generator).cpu()
    step = (STEP / math.sqrt((1 + n) * t.shape[-1]) * 4 ** (uniform - 0.5)).clamp_max(1.0)
    normal = draw_normal(batch, particles, t.shape[-1], generator=generator).cpu()
    rest = (1 - step.square()).sqrt()
    center = rest * t + step * normal[:, :1]
    others = torch.where(is_held, t, rest * center + step * normal[:, 1:])
    every = torch.cat([t, others], 1).flatten(0, 1)  # (task * particle, value)
    theta |= {name: value.to(device) for name, value in law.values(every).items()}
    log_ratio = law.log_density(every) + 0.5 * every.square().sum(-1)
    return theta, log_ratio.view(batch, particles).to(device)


def _is_continuous(hyperparameter: Hyperparameter) -> bool:
    law = hyperparameter.value
    return isinstance(law, Distribution) and not (law.support and law.support.is_discrete)
