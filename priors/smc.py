"""Sequential Monte Carlo: weighted posterior draws and the evidence of one task, walls included.

Draws of the prior are carried to the posterior through tempered densities prior x likelihood^b, b
from 0 to 1, by reweighting, resampling and Metropolis moves. It needs no gradient, sees several
modes at once, and a hard constraint is a log prior of -inf. The particles are split in islands that
never exchange weight: how far their answers differ is the error of the answer.

Read `curves.py` for its use, `quadrature.py` for up to three variables, `nuts.py` for smooth
densities of many.

Reference: Del Moral, Doucet and Jasra, Sequential Monte Carlo samplers, JRSS B 2006, section 3.3;
Whiteley, Lee and Heine, On the role of interaction in sequential Monte Carlo, Bernoulli 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from priors.distributions import SameFamily
from priors.draws import draw_normal

LogDensity = Callable[[Tensor], Tensor]  # (particle, dim) -> (particle,)

TARGET = 0.25  # acceptance; 0.234 is best in many dimensions, 0.44 in one
ISLANDS = 8  # whose spread has a standard error of a quarter of itself
JUMPS = 0.1  # share of moves by a whole difference of two particles, from mode to mode


class SmcDraws(NamedTuple):
    """Weighted draws of one posterior, island after island, with the evidence and its error."""

    t: Tensor  # (particle, dim)
    log_weights: Tensor  # (particle,), their exponentials sum to 1
    log_evidence: Tensor  # () log of int prior x likelihood, in nats
    log_evidence_error: Tensor  # () its standard error, from the spread between islands
    log_evidences: Tensor  # (island,) one estimate each
    temperatures: Tensor  # (step + 1,) from 0 to 1
    acceptance: Tensor  # (step,) share of moves accepted at each temperature but the first
    sweeps: Tensor  # (step,) moves of every particle at each of them


class Cloud(NamedTuple):
    """Particles with their log densities."""

    t: Tensor  # (particle, dim)
    log_prior: Tensor  # (particle,)
    log_likelihood: Tensor  # (particle,)


class Target(NamedTuple):
    """The densities of one posterior; `allowed` is asked last, about moves otherwise accepted."""

    log_prior: LogDensity
    log_likelihood: LogDensity
    allowed: Callable[[Tensor], Tensor] | None = None  # (particle, dim) -> (particle,) bool

    def at(self, t: Tensor) -> Cloud:
        """Particles at t (particle, dim); NaN densities count as zero."""
        prior, likelihood = self.log_prior(t), self.log_likelihood(t)
        return Cloud(t, *(_without_nan(value) for value in (prior, likelihood)))


def sample_smc(
    start: Tensor,
    log_prior: LogDensity,
    log_likelihood: LogDensity,
    *,
    generator: torch.Generator,
    allowed: Callable[[Tensor], Tensor] | None = None,
    islands: int = ISLANDS,
    keep: float = 0.5,
    movement: float = 1.0,
    max_sweeps: int = 200,
) -> SmcDraws:
    """Draws of the density proportional to prior x likelihood, and the log evidence.

    Args:
        start: (particle, dim) exact, independent draws of the prior (of a constrained prior by
            rejection), which make the evidence that of the normalised prior whatever the constant
            in `log_prior`. A multiple of `islands`; a thousand per island suits ten dimensions.
        log_prior: maps (particle, dim) to (particle,) nats, up to a constant; -inf off the support.
        log_likelihood: maps (particle, dim) to (particle,) nats; -inf where impossible.
        allowed: a costly hard constraint of the prior, asked only about moves otherwise accepted.
        islands: groups whose disagreement is the error.
        keep: effective share of the particles of every island that a step of temperature keeps.
        movement: a temperature's moves go on until particles have travelled this many posterior
            variances in every direction, in mean square; 2 is the distance of independent draws.
        max_sweeps: moves per temperature after which they stop anyway.

    Raises:
        ValueError: if the particles do not fill the islands evenly, or an island has no particle
            of positive density.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> start = torch.randn(4000, 1, generator=g, dtype=torch.float64)
        >>> prior = torch.distributions.Normal(0.0, 1.0)
        >>> draws = sample_smc(
        ...     start,
        ...     lambda t: prior.log_prob(t).sum(-1),
        ...     lambda t: torch.distributions.Normal(t[:, 0], 1.0).log_prob(torch.tensor(2.0)),
        ...     generator=g,
        ... )  # y = 2 seen with variance 1: y ~ Normal(0, 2)
        >>> round(float(draws.log_evidence), 1)
        -2.3
    """
    if start.dim() != 2 or not len(start) or len(start) % islands:
        raise ValueError(
            f"Expected start (particle, dim), a multiple of {islands} islands; "
            f"got {tuple(start.shape)}."
        )
    target = Target(log_prior, log_likelihood, allowed)
    cloud, scale = target.at(start), 1.0
    temperature, log_evidences = 0.0, start.new_zeros(islands)
    temperatures, acceptance, sweeps = [0.0], [], []
    while temperature < 1:
        log_ratio = cloud.log_likelihood.unflatten(0, (islands, -1))
        step = _next_step(log_ratio, keep, 1 - temperature)
        temperature = 1.0 if step == 1 - temperature else temperature + step
        log_weights = step * log_ratio
        log_evidences = log_evidences + log_weights.logsumexp(1) - math.log(log_ratio.shape[1])
        chosen = _resample(log_weights, generator=generator)
        cloud = Cloud(*(part[chosen] for part in cloud))
        cloud, scale, accepted = _mix(
            cloud, target, temperature, scale, movement, max_sweeps, generator=generator
        )
        temperatures.append(temperature)
        acceptance.append(sum(accepted) / len(accepted))
        sweeps.append(len(accepted))
    size = len(start) // islands
    share = log_evidences.log_softmax(0)
    return SmcDraws(
        t=cloud.t,
        log_weights=(share - math.log(size)).repeat_interleave(size),
        log_evidence=log_evidences.logsumexp(0) - math.log(islands),
        log_evidence_error=(islands * share.exp()).std() / math.sqrt(islands),
        log_evidences=log_evidences,
        temperatures=start.new_tensor(temperatures),
        acceptance=start.new_tensor(acceptance),
        sweeps=torch.tensor(sweeps),
    )


class SmcPosterior(SameFamily):
    """A mixture over weighted draws that knows the Monte Carlo error of its log density.

    Args:
        log_weights: (..., particle) of `sample_smc`.
        component: of the same batch_shape (..., particle).
        islands: as there.
    """

    def __init__(
        self, log_weights: Tensor, component: Distribution, islands: int = ISLANDS
    ) -> None:
        super().__init__(Categorical(logits=log_weights), component)
        self._islands = islands

    def log_prob_error(self, value: Tensor) -> Tensor:
        """The standard error of `log_prob(value)` in nats, from the spread between islands.

        With W_i the weight of island i and r_i its density relative to the mixture's, its square
        is Var_i[I W_i (r_i - 1)] / I: the delta method for a ratio of means over I islands.
        """
        log_density = self.component_distribution.log_prob(self._pad(value))
        log_share = self.mixture_distribution.logits + log_density
        log_ratio = log_share - self.log_prob(value).unsqueeze(-1)
        by_island = log_ratio.unflatten(-1, (self._islands, -1)).logsumexp(-1).exp()  # W_i r_i
        weight = self.mixture_distribution.probs.unflatten(-1, (self._islands, -1)).sum(-1)
        return math.sqrt(self._islands) * (by_island - weight).std(-1)


def move(
    cloud: Cloud,
    target: Target,
    temperature: float,
    proposal: Tensor,
    *,
    generator: torch.Generator,
) -> tuple[Cloud, Tensor]:
    """One Metropolis step of every particle to `proposal` (particle, dim), and who moved.

    It leaves prior x likelihood^temperature invariant if the proposal is symmetric.
    """
    new = target.at(proposal)
    log_ratio = (
        new.log_prior
        + temperature * new.log_likelihood
        - cloud.log_prior
        - temperature * cloud.log_likelihood
    )
    accepted = _accept(log_ratio, generator=generator)
    if target.allowed is not None:
        accepted[accepted.clone()] = target.allowed(proposal[accepted])
    moved = Cloud(
        torch.where(accepted.unsqueeze(-1), new.t, cloud.t),
        torch.where(accepted, new.log_prior, cloud.log_prior),
        torch.where(accepted, new.log_likelihood, cloud.log_likelihood),
    )
    return moved, accepted


def propose(
    t: Tensor, crowd: Tensor, factor: Tensor, scale: float, *, generator: torch.Generator
) -> Tensor:
    """Symmetric proposals (particle, dim) at distances that the posterior suggests.

    Half are normal steps with the posterior's covariance, half are differences of two particles of
    `crowd`, on some of the coordinates, which follow bent and separate posteriors better; a tenth
    of the latter are whole differences, which jump from mode to mode. `crowd` stays fixed while
    particles move, so that each step leaves the tempered density invariant.

    Args:
        crowd: (particle, dim) of the same posterior.
        factor: (dim, dim) Cholesky factor of its covariance.
        scale: of the steps, relative to 2.38 / sqrt(dim).

    Reference: ter Braak, A Markov chain Monte Carlo version of the genetic algorithm differential
    evolution, Statistics and Computing 2006; Vrugt et al., DREAM, 2009, for the subsets.
    """
    particles, dim = t.shape
    uniform = torch.rand(
        4, particles, 1, dtype=t.dtype, device=t.device, generator=generator
    )  # that choose the kind, the length, the size of the subset, and whether it is a jump
    length = scale * 2.38 * 10 ** (1.3 * uniform[1] - 1)  # from a tenth of it to its double
    normal = draw_normal(particles, dim, generator=generator)
    walk = length / math.sqrt(dim) * (normal @ factor.T)
    pair = torch.randint(len(crowd), (2, particles), device=t.device, generator=generator)
    difference = crowd[pair[0]] - crowd[pair[1]]
    chosen = torch.rand(
        particles, dim, dtype=t.dtype, device=t.device, generator=generator
    ) < uniform[2].clamp_min(1 / dim)
    is_jump = uniform[3] < JUMPS
    chosen = chosen | is_jump
    count = chosen.sum(-1, keepdim=True).clamp_min(1)
    stretch = torch.where(is_jump, 1.0, length / (2 * count).sqrt())
    jitter = 1e-4 * (normal @ factor.T)
    evolution = (stretch * difference + jitter) * chosen
    return t + torch.where(uniform[0] < 0.5, walk, evolution)


def _accept(log_ratio: Tensor, *, generator: torch.Generator) -> Tensor:
    """Metropolis: accepted (particle,) with probability min(1, exp(log_ratio))."""
    uniform = torch.rand(
        log_ratio.shape, dtype=log_ratio.dtype, device=log_ratio.device, generator=generator
    )
    return uniform.log() < log_ratio


def _mix(
    cloud: Cloud,
    target: Target,
    temperature: float,
    scale: float,
    movement: float,
    max_sweeps: int,
    *,
    generator: torch.Generator,
) -> tuple[Cloud, float, list[float]]:
    """Particles moved away from their copies, the adapted scale, and acceptance by sweep."""
    crowd = cloud.t
    covariance = torch.cov(crowd.T).reshape(crowd.shape[1], -1)
    ridge = 1e-12 + 1e-9 * covariance.diagonal()
    factor = torch.linalg.cholesky(covariance + torch.diag(ridge))
    accepted: list[float] = []
    for _ in range(max_sweeps):
        proposal = propose(cloud.t, crowd, factor, scale, generator=generator)
        cloud, moved = move(cloud, target, temperature, proposal, generator=generator)
        accepted.append(float(moved.double().mean()))
        scale = min(10.0, max(1e-3, scale * math.exp(accepted[-1] - TARGET)))
        travelled = torch.linalg.solve_triangular(factor, (cloud.t - crowd).T, upper=False)
        if float(travelled.square().mean(1).min()) >= movement:
            break
    return cloud, scale, accepted


def _without_nan(value: Tensor) -> Tensor:
    return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _next_step(log_likelihood: Tensor, keep: float, rest: float) -> float:
    """The step of temperature, at most `rest`, at which the worst island keeps its share.

    Args:
        log_likelihood: (island, particle); impossible particles are lost whatever the step.
    """
    possible = log_likelihood.isfinite().sum(1)
    if not bool(possible.all()):
        raise ValueError(
            "Expected particles of positive likelihood in every island; one has none. Does the "
            "prior allow these data? If so, use more particles."
        )

    def keeps(step: float) -> bool:
        log_weights = step * log_likelihood
        log_ess = 2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)
        return bool((log_ess.exp() >= keep * possible).all())

    if keeps(rest):
        return rest
    low, high = math.log(1e-16), math.log(rest)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(math.exp(middle)) else (low, middle)
    return math.exp(low)


def _resample(log_weights: Tensor, *, generator: torch.Generator) -> Tensor:
    """Indices (island * particle,) by systematic resampling within each island.

    Reference: Douc, Cappe and Moulines, Comparison of resampling schemes, 2005, section 2.4.
    """
    islands, particles = log_weights.shape
    offset = torch.rand(
        islands, 1, dtype=log_weights.dtype, device=log_weights.device, generator=generator
    )
    grid = (torch.arange(particles, device=log_weights.device) + offset) / particles
    cumulative = log_weights.softmax(1).cumsum(1)
    index = torch.searchsorted(cumulative, grid * cumulative[:, -1:], right=True)
    index = index.clamp_max(particles - 1)
    return (index + particles * torch.arange(islands, device=index.device).unsqueeze(1)).flatten()
