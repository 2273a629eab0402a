"""Bayesian linear regression: y = b + w'z + noise, with every posterior in closed form.

Inputs are centred and scaled, z = sqrt(12) (x - 1/2), as networks see them: this is the network
without hidden layers. Given its variances it is a Gaussian process, but one of d + 1 weights, so
that `WeightSpace` answers in O(n d^2) where a kernel takes O(n^3), and without jitter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal

from priors.draws import draw_normal
from priors.inputs import draw_inputs
from priors.kernel_prior import Hyperparameter, KernelPrior, check_hyperparameters
from priors.tasks import Tasks


@dataclass(frozen=True)
class Linear(KernelPrior):
    """f(x) = b + w'z with b ~ Normal(0, bias_variance) and w_j ~ Normal(0, weight_variance / d).

    Args:
        weight_variance: of all weights together: the prior variance of w'z where |z|^2 = d, its
            mean under uniform inputs; a number or a distribution.
        bias_variance: of the intercept at the centre of the box.
        noise: variance (not standard deviation) of the observation noise.
        inputs: a design in `priors.inputs.DESIGNS`, or several, one of them drawn per task.

    Latents in `Tasks`: the three variances (task,), where they are not plain numbers.

    Reference: Bishop, Pattern Recognition and Machine Learning, 2006, sections 3.3 and 3.5.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> Linear().sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    weight_variance: float | Distribution = LogNormal(0.0, 0.5)
    bias_variance: float | Distribution = 1.0
    noise: float | Distribution = LogNormal(-4.0, 1.5)
    inputs: str | tuple[str, ...] = "uniform"

    shaping: ClassVar[tuple[str, ...]] = ("weight_variance", "bias_variance")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("weight_variance", "bias_variance", "noise"))

    @property
    def alternatives(self) -> tuple[str, ...]:
        return ("linear",)

    def hyperparameters(self, d: int) -> tuple[Hyperparameter, ...]:
        """The three variances, and a mean of zero."""
        return (
            Hyperparameter("weight_variance", self.weight_variance, "y^2"),
            Hyperparameter("bias_variance", self.bias_variance, "y^2"),
            Hyperparameter("noise", self.noise, "y^2"),
            Hyperparameter("mean", 0.0, "y"),
        )

    def variances(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The weights' and the noise's, (task,) each."""
        return theta["weight_variance"], theta["noise"]

    def unit_covariance(self, x: Tensor, z: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The covariance (task, n, m) of f for a weight_variance of 1."""
        ratio = (theta["bias_variance"] / theta["weight_variance"]).unsqueeze(-1).unsqueeze(-1)
        return ratio + features(x)[..., 1:] @ features(z)[..., 1:].mT

    def unit_variance(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """Its diagonal (task, n)."""
        ratio = (theta["bias_variance"] / theta["weight_variance"]).unsqueeze(-1)
        return ratio + features(x)[..., 1:].square().sum(-1)

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` features, in float64 on the generator's device."""
        theta = self.draw_hyperparameters(batch, d, generator=generator)
        x = draw_inputs(self.inputs, batch, n, d, generator=generator)
        weights = draw_normal(batch, d + 1, 1, generator=generator)
        f = (features(x) @ (deviations(theta, d).unsqueeze(-1) * weights)).squeeze(-1)
        noise = theta["noise"].sqrt().unsqueeze(-1)
        y = f + noise * draw_normal(batch, n, generator=generator)
        return Tasks(x, y, f, self.report_latents(theta, d))

    def of_one_task(self, x: Tensor, y: Tensor, mean_variance: float) -> WeightSpace:
        """Likelihoods and predictions of one task for many hyperparameters, see `WeightSpace`."""
        assert mean_variance == 0, "the intercept is one of the weights"
        return WeightSpace(self, x, y)


class WeightSpace:
    """One task of `Linear`: likelihoods and predictions for many variances at once.

    With the rows of Phi the features, Phi = Q R and Q'y keep all that y says about weights; the
    rest of y is noise. At given variances S of the weights u scaled to unit prior variance, with
    A = R S^1/2, the posterior of u has the precision B = I + A'A / noise and the mean
    B^-1 A'Q'y / noise. This needs O(n d^2) once and O(d^3) for each set of variances, whatever n.

    Args:
        prior: of the task.
        x: (point, dim).
        y: (point,).

    Reference: Rasmussen and Williams, section 2.1.1; Bishop, equation 3.86 for the evidence.
    """

    def __init__(self, prior: Linear, x: Tensor, y: Tensor) -> None:
        self.prior, self.dim, self.n = prior, x.shape[-1], len(y)
        q, self.r = torch.linalg.qr(features(x))  # r is (min(n, dim + 1), dim + 1)
        self.target = q.T @ y
        self.rest = (y - q @ self.target).square().sum()

    def log_likelihood(self, theta: dict[str, Tensor]) -> Tensor:
        """log p(y | x, theta) (node,), weights integrated out."""
        design, factor, mean = self._weights(theta)
        miss = self.target - (design @ mean.unsqueeze(-1)).squeeze(-1)
        noise = theta["noise"]
        square = (self.rest + miss.square().sum(-1)) / noise + mean.square().sum(-1)
        log_determinant = self.n * noise.log() + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (square + log_determinant + self.n * math.log(2 * math.pi))

    def predict(
        self, theta: dict[str, Tensor], x_query: Tensor, *, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (node, m) and variance (node, m), or covariance (node, m, m), of f."""
        _, factor, mean = self._weights(theta)
        scaled = features(x_query) * deviations(theta, self.dim).unsqueeze(-2)  # (node, m, dim + 1)
        root = torch.linalg.solve_triangular(factor, scaled.mT, upper=False)
        spread = root.mT @ root if joint else root.square().sum(-2)
        return (scaled @ mean.unsqueeze(-1)).squeeze(-1), spread

    def mean(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and variance (node,) of the prior's constant mean, which is known to be zero."""
        return theta["mean"], torch.zeros_like(theta["mean"])

    def _weights(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """A (node, k, dim + 1), the Cholesky factor of B, and the mean of u (node, dim + 1)."""
        noise = theta["noise"].unsqueeze(-1).unsqueeze(-1)
        design = self.r * deviations(theta, self.dim).unsqueeze(-2)
        precision = design.mT @ design / noise + torch.eye(self.dim + 1, dtype=torch.float64)
        factor = torch.linalg.cholesky(precision)
        right = design.mT @ self.target.unsqueeze(-1) / noise
        return design, factor, torch.cholesky_solve(right, factor).squeeze(-1)


def features(x: Tensor) -> Tensor:
    """1 and z / sqrt(d), (..., n, d + 1), of inputs x (..., n, d)."""
    z = math.sqrt(12 / x.shape[-1]) * (x - 0.5)
    return torch.cat([torch.ones_like(z[..., :1]), z], -1)


def deviations(theta: Mapping[str, Tensor], d: int) -> Tensor:
    """Prior standard deviations (task, d + 1) of the intercept and the weights of `features`."""
    bias, weights = theta["bias_variance"], theta["weight_variance"]
    return torch.cat([bias.unsqueeze(-1), weights.unsqueeze(-1).expand(-1, d)], -1).sqrt()
