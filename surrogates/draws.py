"""Posteriors that are draws of functions: what sampled and ensembled networks have in common.

A draw is a whole function with its noise variance, so draws at several points are joint, and every
answer is a mixture over the draws. Acquisition functions by Monte Carlo go through `DrawsSampler`,
whose base samples pick draws in proportion to their weights, the same for all entries of a batch.
Read `bayesian_networks.py` next, which makes such draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from torch import Tensor

from surrogates.base import Surrogate
from surrogates.observations import Observations, append, observe_more

LEAST_DRAWS = 4.0  # effective draws, below which conditioning gives way
BISECTIONS = 40

Functions = Callable[[Tensor], Tensor]


class FewDraws(UserWarning):
    """New observations speak against nearly all draws, and were believed in part only."""


class DrawsModel(Surrogate):
    """A posterior of weighted draws.

    Args:
        X, Y: (..., n, d) and (..., n, 1), as passed.
        seen: the same as the draws see them; answers are in the units of Y.
        functions: maps (batch x q x d), in the unit cube, to the draws (draw, batch x q) there,
            differentiable; it can be pickled.
        noise: (draw,), variances in standardised units.
        log_weights: (..., draw), equal by default; they need not be normalised.
        chains: that the draws come from, one after another, of equal length.
        seed: of draws without base samples.
    """

    def __init__(
        self,
        X: Tensor,
        Y: Tensor,
        seen: Observations,
        functions: Functions,
        noise: Tensor,
        *,
        chains: int = 1,
        seed: int,
        log_weights: Tensor | None = None,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> None:
        super().__init__(X, Y, input_transform=input_transform, outcome_transform=outcome_transform)
        self.functions, self.noise, self.seed, self._seen = functions, noise, seed, seen
        self._chains = chains
        equal = torch.zeros_like(noise) if log_weights is None else log_weights
        self.log_weights = equal.log_softmax(-1)

    @property
    def effective_draws(self) -> Tensor:
        """The effective sample size 1 / sum w^2 of the weights, (...)."""
        return _effective(self.log_weights)

    @torch.no_grad()
    def r_hat(self, X: Tensor) -> Tensor:
        """The split R-hat (...) of the functions at X (..., d): 1 where chains agree, 1.1 is poor.

        Reference: Gelman, Carlin, Stern, Dunson, Vehtari and Rubin, Bayesian Data Analysis, 2013,
        section 11.4. It looks at the draws as they came, whatever their weights now.
        """
        values = self.functions(self.transform_inputs(X.double()))
        halves = values.unflatten(0, (self._chains, -1)).unflatten(1, (2, -1)).flatten(0, 1)
        within, length = halves.var(1).mean(0), halves.shape[1]
        between = halves.mean(1).var(0)
        return ((length - 1) / length + between / within).sqrt()

    def posterior_of(self, X: Tensor, observation_noise: bool | Tensor) -> DrawsPosterior:
        """The mixture; noise that is a tensor (batch x q x 1) is the variance of every draw."""
        values = self._seen.location + self._seen.scale * self.functions(X)
        noise = None
        if isinstance(observation_noise, Tensor):
            noise = observation_noise.squeeze(-1).expand(values.shape)
        elif observation_noise:
            each = self._seen.scale.square() * self.noise
            noise = each.reshape(-1, *[1] * (values.dim() - 1)).expand(values.shape)
        return DrawsPosterior(values, self.log_weights, noise, seed=self.seed)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The draws re-weighted by the likelihood of Y (batch x n x 1) at X (batch x n x d).

        Where fewer than `LEAST_DRAWS` effective draws would be left, the likelihood is raised to
        the power that leaves as many, with a warning: few draws stand for no posterior. A new fit
        has no such limit. Weights, means and variances are differentiable in X and Y, but which
        draw a sampler picks is not.

        Args:
            kwargs: `noise` (batch x n x 1), known variances after an outcome transform.
        """
        new = observe_more(self, self._seen, X, Y)
        batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], self.batch_shape)
        noise = kwargs.get("noise")
        values = self.functions(new.x).movedim(0, -1)  # (batch x n, draw)
        variance = self.noise if noise is None else noise / new.scale.square()
        square = (new.y.unsqueeze(-1) - values).square() / variance
        log_likelihood = -0.5 * (square + variance.log()).sum(-2)
        log_likelihood = log_likelihood.expand(*batch, -1)
        return type(self)(
            append(self.train_X, X, batch),
            append(self.train_Y, Y, batch),
            self._seen,
            self.functions,
            self.noise,
            chains=self._chains,
            seed=self.seed,
            log_weights=_reweight(self.log_weights, log_likelihood),
            input_transform=getattr(self, "input_transform", None),
            outcome_transform=getattr(self, "outcome_transform", None),
        )


class DrawsPosterior(Posterior):
    """A mixture of functions, jointly over the q points of each batch entry.

    Base samples are uniform on (0, 1), the first of which picks a draw, and standard normal for the
    noise of each point.

    Args:
        values: (draw, batch x q).
        log_weights: (..., draw), normalised; its leading axes broadcast with the batch.
        noise: (draw, batch x q) variances of new observations; None for the functions themselves.
        seed: of `rsample`.
    """

    def __init__(
        self, values: Tensor, log_weights: Tensor, noise: Tensor | None, *, seed: int
    ) -> None:
        batch = torch.broadcast_shapes(values.shape[1:-1], log_weights.shape[:-1])
        shape = (len(values), *batch, values.shape[-1])
        self.values = _align(values, batch).expand(shape)
        self.noise = None if noise is None else _align(noise, batch).expand(shape)
        self.weights = log_weights.exp().movedim(-1, 0).unsqueeze(-1)  # (draw, ..., 1)
        missing = len(batch) - (self.weights.dim() - 2)
        self.weights = self.weights.reshape(len(values), *[1] * missing, *self.weights.shape[1:])
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.values).sum(0).unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        """The spread of the draws, and the mean noise where there is some."""
        square = (self.values - self.mean.squeeze(-1)).square()
        spread = square if self.noise is None else square + self.noise
        return (self.weights * spread).sum(0).unsqueeze(-1)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def base_sample_shape(self) -> torch.Size:
        q = 0 if self.noise is None else self.values.shape[-1]
        return torch.Size([*self.values.shape[1:-1], 1 + q])

    @property
    def batch_range(self) -> tuple[int, int]:
        return (0, -1)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return torch.Size([*sample_shape, *self.values.shape[1:], 1])

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Joint draws (sample_shape x batch x q x 1), by the posterior's own generator."""
        shape = torch.Size() if sample_shape is None else sample_shape
        size = (*shape, *self.base_sample_shape)
        base = torch.randn(size, dtype=self.dtype, generator=self._generator)
        base[..., 0] = torch.rand(size[:-1], dtype=self.dtype, generator=self._generator)
        return self.rsample_from_base_samples(shape, base)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """The draws that base samples (sample_shape x batch x (1 or 1 + q)) pick, with their noise.

        Where the first is u, it is the draw at which the cumulated weights exceed u.
        """
        base = base_samples.reshape(-1, *base_samples.shape[len(sample_shape) :])
        draw = self._pick(base[..., 0])  # (sample, batch), or ones in place of batch axes
        index = draw.unsqueeze(-1)
        samples = torch.take_along_dim(self.values, index, 0)
        if self.noise is not None:
            noise = torch.take_along_dim(self.noise, index, 0)
            samples = samples + noise.sqrt() * base[..., 1:]
        return samples.reshape(self._extended_shape(sample_shape))

    def log_density(self, value: Tensor) -> Tensor:
        """The log density of new observations of each point, at value (... x batch x q x 1).

        Raises:
            ValueError: a posterior of functions without noise, which has no density.
        """
        if self.noise is None:
            raise ValueError(
                "Expected a posterior with observation_noise=True; draws have no density."
            )
        y = value.squeeze(-1).unsqueeze(-1 - self.values.dim() + 1)
        log_each = -0.5 * (
            (y - self.values).square() / self.noise + (2 * math.pi * self.noise).log()
        )
        axis = -self.values.dim()
        return (log_each + self.weights.log()).logsumexp(axis).unsqueeze(-1)

    def density(self, value: Tensor) -> Tensor:
        """The density of new observations of each point; see `log_density`."""
        return self.log_density(value).exp()

    def _pick(self, uniform: Tensor) -> Tensor:
        """The draws (sample, batch) that uniform numbers (sample, batch) fall on."""
        weights = self.weights.detach().squeeze(-1)  # (draw, ...)
        cumulated = weights.cumsum(0).movedim(0, -1)
        batch = torch.broadcast_shapes(uniform.shape[1:], cumulated.shape[:-1])
        u = uniform.movedim(0, -1).expand(*batch, -1).contiguous()
        cumulated = cumulated.expand(*batch, -1).contiguous()
        index = torch.searchsorted(cumulated, u, right=True).clamp_max(len(weights) - 1)
        return index.movedim(-1, 0)


class DrawsSampler(MCSampler):
    """Base samples for `DrawsPosterior`, drawn once from a seed.

    The numbers that pick draws are the middles of as many equal strata, in random order. So with a
    multiple of the number of equally weighted draws each is picked as often, and the mean over
    samples is the mixture's.
    """

    base_samples: Tensor | None
    sample_shape: torch.Size

    def forward(self, posterior: Posterior) -> Tensor:
        """Samples (sample_shape x batch x q x 1)."""
        return posterior.rsample_from_base_samples(self.sample_shape, self._construct(posterior))

    def _construct(self, posterior: Posterior) -> Tensor:
        """Base samples of the posterior's shape, those that are there if they have it."""
        shape = self._get_collapsed_shape(posterior)
        if self.base_samples is not None and self.base_samples.shape == shape:
            return self.base_samples
        generator = torch.Generator().manual_seed(self.seed)
        count = self.sample_shape.numel()
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        rest = shape[len(self.sample_shape) : -1]
        columns = [middles[torch.randperm(count, generator=generator)] for _ in range(rest.numel())]
        first = torch.stack(columns, -1).reshape(*self.sample_shape, *rest, 1)
        size = (*shape[:-1], shape[-1] - 1)
        normal = torch.randn(size, dtype=torch.float64, generator=generator)
        self.base_samples = torch.cat([first, normal], -1)
        return self.base_samples

    def _update_base_samples(self, posterior: Posterior, base_sampler: MCSampler) -> None:
        """Takes over the base samples of another sampler, for the points that it has seen."""
        self._instance_check(base_sampler)
        assert isinstance(base_sampler, DrawsSampler)
        new, old = self._construct(posterior), base_sampler.base_samples
        if old is not None:
            rest = old.shape[len(self.sample_shape) :]
            missing = new.dim() - old.dim()
            old = old.reshape(*self.sample_shape, *[1] * missing, *rest)
            new[..., : old.shape[-1]] = old


@GetSampler.register(DrawsPosterior)
def _sampler(
    posterior: DrawsPosterior, sample_shape: torch.Size, *, seed: int | None = None
) -> DrawsSampler:
    return DrawsSampler(sample_shape, seed=seed)


def _align(values: Tensor, batch: torch.Size) -> Tensor:
    """Values (draw, ..., q) with ones for the leading batch axes that they lack."""
    missing = len(batch) - (values.dim() - 2)
    return values.reshape(len(values), *[1] * missing, *values.shape[1:])


def _effective(log_weights: Tensor) -> Tensor:
    return (-(2 * log_weights).logsumexp(-1)).exp()


def _reweight(log_weights: Tensor, log_likelihood: Tensor) -> Tensor:
    """Normalised weights times a power of the likelihood: 1, or what leaves `LEAST_DRAWS`.

    Reference: Del Moral, Doucet and Jasra, J. R. Stat. Soc. B 68, 2006, for the tempering.
    """
    whole = (log_weights + log_likelihood).log_softmax(-1)
    least = _effective(log_weights).clamp_max(LEAST_DRAWS)
    is_few = _effective(whole) < least
    if not bool(is_few.any()):
        return whole
    warnings.warn(
        f"New observations leave {float(_effective(whole).min()):.1f} effective draws of "
        f"{log_weights.shape[-1]}; their likelihood was tempered to leave {LEAST_DRAWS:g}. A new "
        "fit, or more draws, would respect them in full.",
        FewDraws,
        stacklevel=3,
    )
    power = _power(log_weights.detach(), log_likelihood.detach(), least.detach())
    power = torch.where(is_few, power, 1.0).unsqueeze(-1)
    return (log_weights + power * log_likelihood).log_softmax(-1)


def _power(log_weights: Tensor, log_likelihood: Tensor, least: Tensor) -> Tensor:
    """The largest power in [0, 1] of the likelihood that leaves as many draws, by bisection."""
    low = torch.zeros(log_likelihood.shape[:-1], dtype=log_likelihood.dtype)
    high = torch.ones_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        tempered = (log_weights + middle.unsqueeze(-1) * log_likelihood).log_softmax(-1)
        enough = _effective(tempered) >= least
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low
