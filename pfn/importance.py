"""Weighted draws of an exact posterior, from marginals that are about right.

`weigh` takes the densities of a prior's latents, one for each alternative, and marginals that a
network says. Their product is the first proposal. Later ones have the mean and covariance of the
draws so far, until enough draws of a round are effective. The Pareto k of the weights says whether
they can be trusted; where they cannot, sequential Monte Carlo carries the proposal to the
posterior.

Read `pareto.py` for the diagnostic, `priors/smc.py` for the sampler, `refine.py` for the use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Chi2, Distribution, MixtureSameFamily

from pfn.pareto import Smoothed, effective_draws, is_trusted, smooth
from pfn.predictive import Predictive
from priors.draws import draw, draw_normal
from priors.hyperpriors import Coordinate
from priors.smc import ISLANDS, SmcDraws, sample_smc
from priors.student_t import MultivariateStudentT
from priors.tasks import LatentDensity

AIM = 1.5  # effective draws that a round aims at, per wanted one
BETTER = 1.2  # times the efficiency of the round before: a fit that is worth another one
FACTOR = 3  # of the next round, at most, where fits are worth it no more
MOST = 30  # evaluations per wanted effective draw, after which there is no further round
OF_PRIOR, OF_MARGINALS = 0.1, 0.1  # of a round's draws, in case that the fit misses something
OF_ALL = 0.1  # of a round's draws are spread evenly over the alternatives
FREEDOM = 15.0  # degrees of freedom of the fit: tails heavier than those of nearly all priors
EVEN = 4  # effective draws per dimension that a fit is made from, at least
PARTICLES = 200  # in each of `ISLANDS`, for each alternative, of sequential Monte Carlo
MOVEMENT = 0.5  # posterior variances that they travel at each temperature


class Part(NamedTuple):
    """Weighted draws under one alternative of a prior."""

    density: LatentDensity
    t: Tensor  # (draw, dim)
    log_weights: Tensor  # (draw,); over all parts their exponentials sum to p(y | x)


class Weighted(NamedTuple):
    """Weighted draws of a posterior, and how they came about."""

    parts: tuple[Part, ...]  # one for each alternative
    method: str  # "importance", "smc", or "exact" where nothing is unknown
    pareto_k: float  # of the importance weights
    effective_draws: float
    log_evidence_error: float  # the standard error of log p(y | x), in nats
    evaluations: int  # of densities


def weigh(
    densities: Sequence[LatentDensity],
    known: Mapping[str, Distribution],
    draws: int,
    *,
    generator: torch.Generator,
) -> Weighted:
    """Weighted draws of the posterior, at least `draws` of them effective if that is not too many.

    Args:
        densities: of the latents under each alternative of the prior.
        known: about the posterior marginals of latents by name: mixtures of log-normals or normals
            of batch_shape () or (dim,), and a Categorical over the alternatives. Other latents are
            proposed by about their prior.

    Raises:
        ValueError: data that are impossible under the prior.
    """
    if densities[0].dim == 0:
        point = torch.zeros(1, 0, dtype=torch.float64)
        parts = tuple(Part(density, point, density.log_density(point)) for density in densities)
        return Weighted(parts, "exact", -math.inf, math.inf, 0.0, len(parts))
    clouds, smoothed = _adapt(densities, known, draws, generator)
    if is_trusted(smoothed):
        return _by_importance(clouds, smoothed)
    return _by_smc(clouds, smoothed, generator)


def log_weights_of(parts: Sequence[Part]) -> Tensor:
    """Those of all parts, end to end."""
    return torch.cat([part.log_weights for part in parts])


def thin(parts: Sequence[Part], most: int, *, generator: torch.Generator) -> tuple[Part, ...]:
    """Weighted draws whose sums are the same in expectation, about `most` of them.

    Draws of weight c or more stay. Others stay with a probability of their weight over c, and then
    weigh c. Parts of which none stays are left out.

    Reference: Fearnhead and Clifford, On-line inference for hidden Markov models via particle
    filters, JRSS B 65, 2003, section 3.
    """
    logs = log_weights_of(parts)
    if len(logs) <= most:
        return tuple(parts)
    weights = logs.softmax(0)
    low, high = 0.0, 1.0
    for _ in range(60):  # the expected number falls with c, from all to one
        level = (low + high) / 2
        too_many = float((weights / level).clamp_max(1).sum()) > most
        low, high = (level, high) if too_many else (low, level)
    chance = (weights / high).clamp_max(1)
    offset = torch.rand(1, dtype=torch.float64, generator=generator)
    passed = torch.cat([offset, offset + chance.cumsum(0)]).floor()  # systematic: one at each step
    stays = ((passed.diff() > 0) | (chance == 1)).split([len(part.t) for part in parts])
    log_level = math.log(high) + float(logs.logsumexp(0))
    return tuple(
        Part(part.density, part.t[some], part.log_weights[some].clamp_min(log_level))
        for part, some in zip(parts, stays, strict=True)
        if bool(some.any())
    )


class _Proposal(NamedTuple):
    """What draws of one alternative come from: the prior, the marginals, a fit to earlier draws.

    The prior's share, about a standard normal, bounds the weights if the likelihood is bounded.

    Reference: Owen and Zhou, Safe and effective importance sampling, JASA 95, 2000.
    """

    marginals: Predictive  # (dim,)
    fit: MultivariateStudentT | None = None

    @property
    def shares(self) -> Tensor:
        """Probabilities of the three, or of the first two without a fit."""
        shares = [OF_PRIOR, 1 - OF_PRIOR]
        if self.fit is not None:
            shares = [OF_PRIOR, OF_MARGINALS, 1 - OF_PRIOR - OF_MARGINALS]
        return torch.tensor(shares, dtype=torch.float64)

    def draw(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Independent draws (count, dim)."""
        normal = draw_normal(count, *self.marginals.batch_shape, generator=generator)
        drawn = [normal, self.marginals.sample((count,), generator)]
        if self.fit is not None:
            drawn.append(_draw_student_t(self.fit, count, generator=generator))
        chosen = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        return torch.stack(drawn)[chosen, torch.arange(count)]

    def log_prob(self, t: Tensor) -> Tensor:
        """Its log density (draw,) at t (draw, dim)."""
        log_normal = -0.5 * (t.square() + math.log(2 * math.pi)).sum(-1)
        parts = [log_normal, self.marginals.log_prob(t).sum(-1)]
        if self.fit is not None:
            parts.append(self.fit.log_prob(t))
        return (torch.stack(parts, -1) + self.shares.log()).logsumexp(-1)


def _draw_student_t(law: MultivariateStudentT, count: int, *, generator: torch.Generator) -> Tensor:
    """Independent draws (count, dim)."""
    normal = draw_normal(count, len(law.loc), generator=generator)
    square = draw(Chi2(law.df), (count, 1), generator=generator)
    return law.loc + (normal @ law.scale_tril.T) / (square / law.df).sqrt()


class _Cloud(NamedTuple):
    """Draws of one alternative, in rounds of one proposal each."""

    density: LatentDensity
    proposals: tuple[_Proposal, ...] = ()
    rounds: tuple[Tensor, ...] = ()  # draws (draw, dim)
    logs: tuple[Tensor, ...] = ()  # log densities (draw,)

    @property
    def evaluations(self) -> int:
        return sum(map(len, self.logs))

    def grown(self, proposal: _Proposal, count: int, generator: torch.Generator) -> _Cloud:
        """The cloud with one more round."""
        t = proposal.draw(count, generator=generator)
        return _Cloud(
            self.density,
            (*self.proposals, proposal),
            (*self.rounds, t),
            (*self.logs, self.density.log_density(t)),
        )

    def last(self) -> Tensor:
        """Log weights (draw,) of the last round.

        Their proposal depends on earlier rounds only, so that the sum of the weights is an unbiased
        estimate of p(y, alternative | x).
        """
        t = self.rounds[-1]
        return self.logs[-1] - self.proposals[-1].log_prob(t) - math.log(len(t))

    def all(self) -> Tensor:
        """Log weights (draw,) of all rounds, as if drawn from the mixture of their proposals.

        Less noisy than those of the last, but biased: proposals lie near the draws that they were
        fitted to. In twelve features the log evidence would be some 0.2 nats too low.

        Reference: Cornuet, Marin, Mira and Robert, Adaptive multiple importance sampling,
        Scandinavian J. Statistics 39, 2012, section 3.
        """
        t = torch.cat(self.rounds)
        log_mixture = [
            math.log(len(part)) + proposal.log_prob(t)
            for part, proposal in zip(self.rounds, self.proposals, strict=True)
        ]
        return torch.cat(self.logs) - torch.stack(log_mixture).logsumexp(0)


def _adapt(
    densities: Sequence[LatentDensity],
    known: Mapping[str, Distribution],
    draws: int,
    generator: torch.Generator,
) -> tuple[list[_Cloud], Smoothed]:
    """Rounds of draws until enough of the last are effective, and its weights, end to end.

    Proposals of the first round are the marginals. The next have as many draws as should be enough,
    given the round before, but few as long as each fit is much better than the one before it.
    """
    proposals = [_Proposal(_marginals(density, known)) for density in densities]
    shares = _shares(densities, known)
    clouds = [_Cloud(density) for density in densities]
    count, before = draws // 2, 0.0
    while True:
        of_all = OF_ALL / len(clouds) + (1 - OF_ALL) * shares
        clouds = [
            cloud.grown(proposal, max(1, round(count * float(share))), generator)
            for cloud, proposal, share in zip(clouds, proposals, of_all, strict=True)
        ]
        smoothed = smooth(torch.cat([cloud.last() for cloud in clouds]))
        effective = effective_draws(smoothed.log_weights)
        if math.isnan(effective):
            raise ValueError("Expected data that the prior allows; no latents give them a density.")
        evaluations = sum(cloud.evaluations for cloud in clouds)
        if (is_trusted(smoothed) and effective >= draws) or evaluations >= MOST * draws:
            return clouds, smoothed
        proposals = [_fitted(cloud) for cloud in clouds]
        shares = torch.stack([cloud.all().logsumexp(0) for cloud in clouds]).softmax(0)
        improves, before = effective / count > BETTER * before, effective / count
        enough = AIM * draws / before
        count = math.ceil(min(enough, AIM * draws if improves else FACTOR * count))


def _marginals(density: LatentDensity, known: Mapping[str, Distribution]) -> Predictive:
    """The marginals (dim,) of the coordinates; about the prior's where none is known."""
    parts = [_marginal(c, known.get(c.name)) for c in density.coordinates]
    parts.append(_standard(density.dim - sum(len(part[0]) for part in parts)))
    most = max(part.shape[-1] for part, _, _ in parts)
    fill = -math.inf, 0.0, 1.0
    log_weights, means, stds = (
        torch.cat([F.pad(part, (0, most - part.shape[-1]), value=value) for part in column])
        for column, value in zip(zip(*parts, strict=True), fill, strict=True)
    )
    return Predictive(log_weights, means, stds)


def _marginal(coordinate: Coordinate, law: Distribution | None) -> tuple[Tensor, ...]:
    """Log weights, means and standard deviations (size, component) of one hyperparameter's t."""
    if isinstance(law, MixtureSameFamily):
        normal = coordinate.normal(law.component_distribution)
        if normal is not None:
            parts = law.mixture_distribution.logits, normal.loc, normal.scale
            return tuple(part.reshape(-1, part.shape[-1]) for part in parts)
    return _standard(math.prod(coordinate.shape))


def _standard(size: int) -> tuple[Tensor, ...]:
    """Those of standard normals."""
    zero = torch.zeros(size, 1, dtype=torch.float64)
    return zero, zero, torch.ones_like(zero)


def _shares(densities: Sequence[LatentDensity], known: Mapping[str, Distribution]) -> Tensor:
    """Probabilities (alternative,), equal where none are known."""
    shares = torch.ones(len(densities), dtype=torch.float64)
    for name, law in known.items():
        if isinstance(law, Categorical) and name in densities[0].choice:
            shares *= torch.stack([law.probs[part.choice[name]] for part in densities])
    return shares / shares.sum()


def _fitted(cloud: _Cloud) -> _Proposal:
    """A proposal with the mean of a cloud, and its covariance as far as the draws tell it.

    As if from marginals that are independent and right, where they do not.

    Reference: Schaefer and Strimmer, A shrinkage approach to large-scale covariance matrix
    estimation, Stat. Appl. Genet. Mol. Biol. 4, 2005, section 2.4.
    """
    marginals, t = cloud.proposals[0].marginals, torch.cat(cloud.rounds)
    dim = t.shape[1]
    weights = _even(smooth(cloud.all()).log_weights, EVEN * dim).softmax(0)
    if bool(weights.isnan().any()):  # impossible so far
        return cloud.proposals[-1]
    mean, unit = weights @ t, marginals.stddev
    z = (t - mean) / unit
    covariance, square = (weights * z.T) @ z, (weights * z.T.square()) @ z.square()
    noise = (square - covariance.square()) * weights.square().sum()
    target = torch.eye(dim, dtype=torch.float64)
    share = float(noise.sum() / (covariance - target).square().sum())
    covariance = torch.lerp(covariance, target, min(1.0, share))
    factor = torch.linalg.cholesky((FREEDOM - 2) / FREEDOM * covariance)
    df = torch.tensor(FREEDOM, dtype=torch.float64)
    return _Proposal(marginals, MultivariateStudentT(df, mean, unit.unsqueeze(-1) * factor))


def _even(log_weights: Tensor, wanted: float) -> Tensor:
    """Log weights times a power in [0, 1] that leaves as many effective draws, if any does."""
    if effective_draws(log_weights) >= wanted:
        return log_weights
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        enough = effective_draws(middle * log_weights) >= wanted
        low, high = (middle, high) if enough else (low, middle)
    return low * log_weights


def _by_importance(clouds: Sequence[_Cloud], smoothed: Smoothed) -> Weighted:
    """The last round, with smoothed weights."""
    each = smoothed.log_weights.split([len(cloud.rounds[-1]) for cloud in clouds])
    parts = [
        Part(cloud.density, cloud.rounds[-1], part)
        for cloud, part in zip(clouds, each, strict=True)
    ]
    total = smoothed.log_weights.logsumexp(0)
    shares = [(part - total).exp() for part in each]
    variance = sum(float(part.square().sum() - part.sum() ** 2 / len(part)) for part in shares)
    return Weighted(
        tuple(parts),
        "importance",
        smoothed.k,
        effective_draws(smoothed.log_weights),
        math.sqrt(variance),
        sum(cloud.evaluations for cloud in clouds),
    )


def _by_smc(clouds: Sequence[_Cloud], smoothed: Smoothed, generator: torch.Generator) -> Weighted:
    """Draws of each alternative's last proposal, carried to its posterior.

    Sequential Monte Carlo goes through the densities proposal^(1 - b) x posterior^b, b from 0 to 1:
    few steps, where the proposal is near.
    """
    evaluations = sum(cloud.evaluations for cloud in clouds)
    parts, runs = [], []
    for cloud in clouds:
        proposal = cloud.proposals[-1]
        start = proposal.draw(PARTICLES * ISLANDS, generator=generator)
        log_ratio = _log_ratio(cloud.density, proposal)
        run = sample_smc(
            start, proposal.log_prob, log_ratio, generator=generator, movement=MOVEMENT
        )
        runs.append(run)
        parts.append(Part(cloud.density, run.t, run.log_weights + run.log_evidence))
        evaluations += len(start) * (1 + int(run.sweeps.sum()))
    shares = torch.stack([run.log_evidence for run in runs]).softmax(0)
    errors = torch.stack([run.log_evidence_error for run in runs])
    noise = torch.tensor([1 / _effective_particles(run) for run in runs], dtype=torch.float64)
    return Weighted(
        tuple(parts),
        "smc",
        smoothed.k,
        float(1 / (shares.square() * noise).sum()),
        float((shares * errors).square().sum().sqrt()),
        evaluations,
    )


def _log_ratio(density: LatentDensity, proposal: _Proposal) -> Callable[[Tensor], Tensor]:
    return lambda t: density.log_density(t) - proposal.log_prob(t)


def _effective_particles(run: SmcDraws) -> float:
    """Variances of the coordinates over those of their means, which islands tell; in the mean."""
    weights = run.log_weights.exp()
    mean = weights @ run.t
    variance = weights @ (run.t - mean).square()
    by_island = run.t.unflatten(0, (ISLANDS, -1)).mean(1)
    share = ISLANDS * weights.unflatten(0, (ISLANDS, -1)).sum(1, keepdim=True)
    of_mean = (share * (by_island - mean)).square().sum(0) / (ISLANDS * (ISLANDS - 1))
    return min(float(len(run.t)), 1 / float((of_mean / variance).mean()))
