"""The prior-fitted network as a BoTorch model: `surrogates.fit("pfn", X, Y)`.

Marginals are the network's own mixtures, and `PredictiveLogEI` is the expected improvement of these
instead of their first two moments. Joint draws, fantasies and pending points follow the chain rule:
each point is drawn given those before it, which the network sees in its buffer. The network stays
in float32, whatever dtype an acquisition function casts the model to.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from botorch.acquisition.analytic import AnalyticAcquisitionFunction
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import Posterior
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor

from pfn import PFN, Predictive
from pfn.card import read_card
from pfn.library import AUTOMATIC, choose, find
from pfn.model import Fitted
from surrogates.base import Surrogate

MODEL = "bo"  # the checkpoint that is used by default
TAIL = 1e-6  # probability that a draw leaves in each tail


class PriorFitted(Surrogate):
    """A PFN conditioned on X (n, d) in the unit cube and Y (n, 1).

    Args:
        fitted: the network with an encoded context, of these data after `input_transform`.
        X_added, Y_added: (batch x k x d), (batch x k x 1) observations after the context.
        seed: of draws without base samples.
    """

    def __init__(
        self,
        fitted: Fitted,
        X: Tensor,
        Y: Tensor,
        *,
        X_added: Tensor | None = None,
        Y_added: Tensor | None = None,
        seed: int = 0,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> None:
        super().__init__(X, Y, input_transform=input_transform, outcome_transform=outcome_transform)
        self._context, self.seed = fitted, seed
        self.X_added, self.Y_added = X_added, Y_added

    @property
    def batch_shape(self) -> torch.Size:
        """() for data as passed, batch for fantasies."""
        return torch.Size() if self.Y_added is None else self.Y_added.shape[:-2]

    def posterior_of(self, X: Tensor, observation_noise: bool | Tensor) -> PriorFittedPosterior:
        if isinstance(observation_noise, Tensor):
            raise ValueError(
                "Expected observation_noise True or False: the network infers the noise; got a "
                f"tensor of shape {tuple(observation_noise.shape)}."
            )
        batch = torch.broadcast_shapes(X.shape[:-2], self.batch_shape)
        X = X.expand(*batch, *X.shape[-2:])
        added = None
        if self.X_added is not None and self.Y_added is not None:
            added = (
                self.X_added.expand(*batch, *self.X_added.shape[-2:]),
                self.Y_added.expand(*batch, *self.Y_added.shape[-2:]).squeeze(-1),
            )
        latent = not observation_noise
        return PriorFittedPosterior(self._context, X, added, latent=latent, seed=self.seed)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The model that has also seen Y (batch x k x 1) at X (batch x k x d), in its buffer.

        The units of y stay those of the first data.

        Raises:
            ValueError: known `noise`.
        """
        if kwargs.get("noise") is not None:
            raise ValueError("Expected no noise with new observations: the network infers it.")
        X, Y = self.transform_inputs(X.double()), Y.double()
        if hasattr(self, "outcome_transform"):
            Y, _ = self.outcome_transform(Y, X=X)
        batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], self.batch_shape)
        X, Y = (part.expand(*batch, *part.shape[-2:]) for part in (X, Y))
        if self.X_added is not None and self.Y_added is not None:
            X = torch.cat([self.X_added.expand(*batch, *self.X_added.shape[-2:]), X], -2)
            Y = torch.cat([self.Y_added.expand(*batch, *self.Y_added.shape[-2:]), Y], -2)
        return type(self)(
            self._context,
            self.train_X,
            self.train_Y,
            X_added=X,
            Y_added=Y,
            seed=self.seed,
            input_transform=getattr(self, "input_transform", None),
            outcome_transform=getattr(self, "outcome_transform", None),
        )


class PriorFittedPosterior(Posterior):
    """The posterior over X (batch x q x d): the network's marginals, joint by the chain rule.

    Draws of the noise-free function are conditioned on observations at the quantiles of its own
    draws, as the network sees observations only.

    Args:
        context: the encoded data.
        X: in the unit cube.
        added: observations in the buffer, (batch x k x d) and (batch x k).
        latent: the noise-free function instead of new observations.
        seed: of `rsample`.
    """

    def __init__(
        self,
        context: Fitted,
        X: Tensor,
        added: tuple[Tensor, Tensor] | None,
        *,
        latent: bool,
        seed: int,
    ) -> None:
        self.context, self.X, self.added, self.latent = context, X, added, latent
        self._generator = torch.Generator(X.device).manual_seed(seed)
        self._marginals: Predictive | None = None

    @property
    def marginals(self) -> Predictive:
        """The predictive of each point, batch_shape (batch x q)."""
        if self._marginals is None:
            self._marginals = self._predict(self.X, self.added, self.latent)
        return self._marginals

    @property
    def mean(self) -> Tensor:
        return self.marginals.mean.unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        return self.marginals.variance.unsqueeze(-1)

    @property
    def device(self) -> torch.device:
        return self.X.device

    @property
    def dtype(self) -> torch.dtype:
        return self.X.dtype

    @property
    def batch_shape(self) -> torch.Size:
        return self.X.shape[:-2]

    @property
    def base_sample_shape(self) -> torch.Size:
        return torch.Size([*self.X.shape[:-1], 1])

    @property
    def batch_range(self) -> tuple[int, int]:
        return (0, -2)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return sample_shape + self.base_sample_shape

    def log_expected_improvement(self, best: float | Tensor) -> Tensor:
        """log E[max(y - best, 0)] of the predictive itself, (batch), for q = 1."""
        if self.X.shape[-2] != 1:
            raise ValueError(f"Expected q = 1; got X of shape {tuple(self.X.shape)}.")
        return self.marginals.log_expected_improvement(best).squeeze(-1)

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Joint draws (sample_shape x batch x q x 1), by the posterior's own generator."""
        shape = torch.Size() if sample_shape is None else sample_shape
        size, g = self._extended_shape(shape), self._generator
        base = torch.randn(size, dtype=self.dtype, device=self.device, generator=g)
        return self.rsample_from_base_samples(shape, base)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Joint draws from standard normal numbers (sample_shape x batch x q x 1).

        Point j is at the quantile Phi(z_j) of its predictive given draws of the points before it.
        """
        shape = self._extended_shape(sample_shape)
        level = torch.special.ndtr(base_samples.expand(shape).squeeze(-1)).clamp(TAIL, 1 - TAIL)
        draws: list[Tensor] = []
        seen = level[..., :0]
        for j in range(self.X.shape[-2]):
            added = self._given(seen) if j else self.added
            first = self.marginals[..., :1]
            predictive = self._predict_after(added, j, self.latent) if j else first
            draws.append(predictive.icdf(level[..., j : j + 1]))
            if j + 1 < self.X.shape[-2]:  # what later points are told of this one is noisy
                noisy = self._predict_after(added, j, False) if self.latent else predictive
                seen = torch.cat([seen, noisy.icdf(level[..., j : j + 1])], -1)
        return torch.cat(draws, -1).unsqueeze(-1)

    def _given(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The buffer (sample_shape x batch x ...) with draws (..., j) of the first points."""
        X = self.X[..., : y.shape[-1], :].expand(*y.shape, self.X.shape[-1])
        if self.added is None:
            return X, y
        x_before, y_before = self.added
        x_before = x_before.expand(*y.shape[:-1], *x_before.shape[-2:])
        y_before = y_before.expand(*y.shape[:-1], y_before.shape[-1])
        return torch.cat([x_before, X], -2), torch.cat([y_before, y], -1)

    def _predict_after(
        self, added: tuple[Tensor, Tensor] | None, j: int, latent: bool
    ) -> Predictive:
        """The predictive of point j given a buffer, (..., 1)."""
        X = self.X[..., j : j + 1, :]
        batch = X.shape[:-2] if added is None else added[1].shape[:-1]
        return self._predict(X.expand(*batch, *X.shape[-2:]), added, latent)

    def _predict(self, X: Tensor, added: tuple[Tensor, Tensor] | None, latent: bool) -> Predictive:
        """The predictive (batch x q) at X (batch x q x d) given a buffer (batch x k)."""
        *batch, q, d = X.shape
        tasks = math.prod(batch)
        if added is None:
            return self.context.predict(X.reshape(tasks * q, d), latent=latent).reshape(*batch, q)
        k = added[1].shape[-1]
        fitted = self.context.extend(added[0].reshape(tasks, k, d), added[1].reshape(tasks, k))
        return fitted.predict(X.reshape(tasks, q, d), latent=latent).reshape(*batch, q)


@GetSampler.register(PriorFittedPosterior)
def _sampler(
    posterior: PriorFittedPosterior, sample_shape: torch.Size, *, seed: int | None = None
) -> SobolQMCNormalSampler:
    return SobolQMCNormalSampler(sample_shape, seed=seed)


class PredictiveLogEI(AnalyticAcquisitionFunction):
    """log E[max(y - best_f, 0)] under the predictive itself, for models whose posterior has it.

    Args:
        model: a `PriorFitted` without an outcome transform, which would hide its predictive.
        best_f: the incumbent, in the units of Y; maximization.
    """

    def __init__(self, model: PriorFitted, best_f: float | Tensor) -> None:
        if hasattr(model, "outcome_transform"):
            raise ValueError("Expected a model without an outcome_transform.")
        super().__init__(model)
        self.best_f = best_f

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: Tensor) -> Tensor:
        """Of X (batch x 1 x d), (batch)."""
        posterior: Any = self.model.posterior(X)
        return posterior.log_expected_improvement(self.best_f)


def fit_pfn(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    model: str | Path | PFN = MODEL,
    extrapolate_n: bool = False,
) -> PriorFitted:
    """A network conditioned on X (n, d) and Y (n, 1); nothing is fitted, and n may be 0.

    Args:
        Yvar: (n, 1) known noise variance, equal for all points: the network knows one noise.
        seed: of draws without base samples.
        model: a checkpoint whose prior fits, see `pfn.predict`.
        extrapolate_n: allows more than 4 times the observations that the network was trained for.

    Raises:
        ValueError: noise that differs between points, more columns than the network was trained
            for, or too many observations.
    """
    inputs = X if input_transform is None else input_transform(X)
    targets = Y
    if outcome_transform is not None:
        targets, Yvar = outcome_transform.train()(Y, Yvar)
    given = None
    if Yvar is not None:
        if not bool(torch.isclose(Yvar, Yvar.mean(), rtol=1e-3, atol=0).all()):
            raise ValueError(
                "Expected Yvar equal for all points, as the network knows one noise; got values "
                f"from {float(Yvar.min()):g} to {float(Yvar.max()):g}. The surrogate gp takes them."
            )
        given = {"noise": float(Yvar.mean())}
    d = X.shape[-1]
    network = choose(model, d)
    bounds = torch.tensor([[0.0] * d, [1.0] * d], dtype=torch.float64)
    fitted = network.condition(
        (inputs, targets.squeeze(-1)),
        bounds=bounds,
        given=given,
        extrapolate_n=extrapolate_n,
    )
    return PriorFitted(
        fitted,
        X,
        Y,
        seed=seed,
        input_transform=input_transform,
        outcome_transform=outcome_transform,
    )


class Trained(NamedTuple):
    """The sizes that a checkpoint was trained for."""

    columns: int
    observations: int


def trained_for(model: str | Path | PFN) -> Trained:
    """What `fit_pfn` can be given with a model; of "auto", with any of the networks it may be.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if isinstance(model, PFN):
        cards = [model.card]
    else:
        cards = [read_card(find(name)) for name in (AUTOMATIC if model == "auto" else [model])]
    return Trained(
        max(card.architecture.max_features for card in cards),
        min(card.max_context for card in cards),
    )
