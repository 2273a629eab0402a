"""Ensembles of infinitely wide networks trained by gradient descent: what they predict, exactly.

A network drawn from the NNGP and trained on the squared loss stays close to its initialisation as
its width grows, and so evolves as a linear model of its parameters, under the tangent kernel T of
`infinite_width.py`. The ensemble over initialisations is Gaussian at any time, but it is not the
posterior of a Gaussian process: its spread comes from the NNGP kernel K, its training from T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from priors.context import read_context
from priors.dual import Activation
from priors.infinite_width import network_kernels, nngp, nngp_variance
from priors.inputs import standardise_inputs
from priors.kernel_prior import JITTER, cholesky


@dataclass(frozen=True)
class WideEnsemble:
    """Infinitely wide networks, each from its own initialisation, after training by gradient flow.

    All parameters are trained, in the parameterisation of `network_kernels`, on the loss sum_i
    (f(x_i) - y_i)^2 / 2 + ridge |theta - theta_0|^2 / 2. Predictions are of the networks' outputs:
    observation noise is not part of the model, and not added.

    Args:
        activation: a name in `priors.dual.ACTIVATIONS`, or an `Activation`.
        depth: number of hidden layers.
        weight_variance: positive, divided by the fan-in.
        bias_variance: not negative.
        ridge: pulls the parameters back to their initialisation; the mean is then that of Gaussian
            process regression with kernel T and a noise variance of `ridge`.
        time: of the gradient flow, with a learning rate of one; infinite is trained to convergence.

    Reference: Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein and Pennington, Wide neural
    networks of any depth evolve as linear models under gradient descent, NeurIPS 2019, arXiv
    1902.06720, section 2.4.

    Example:
        >>> ensemble = WideEnsemble().predict(([0.1, 0.6], [0.3, -1.0]), [0.2, 0.4, 0.9])
        >>> ensemble.mean.shape
        torch.Size([3])
    """

    activation: str | Activation = "relu"
    depth: int = 2
    weight_variance: float = 2.0
    bias_variance: float = 0.2
    ridge: float = 0.0
    time: float = math.inf

    def __post_init__(self) -> None:
        for label in ("ridge", "time"):
            if not getattr(self, label) >= 0:
                raise ValueError(f"Expected {label} of at least 0; got {getattr(self, label)}.")

    def predict(
        self, context: tuple[Any, Any], x_query: Any, *, joint: bool = False
    ) -> Distribution:
        """The distribution of the trained networks' outputs at `x_query`.

        With R the response of `training_response`, the mean is R y and the covariance K** + R K R'
        - R K*' - K* R'.

        Args:
            context: x (n, d) or (b, n, d), or (n,) where d = 1, in the unit box, and y (n,) or
                (b, n).
            x_query: (m, d), (b, m, d) or (m,).
            joint: one joint distribution over all queries instead of one for each.

        Returns:
            A float64 normal, batch_shape (m,) or (b, m); with `joint`, event_shape (m,) and
            batch_shape () or (b,).

        Raises:
            ValueError: arguments of other shapes, or not finite.

        Reference: Lee et al., 2019, equations 14 and 15, with a ridge.
        """
        x, y, query, batched = read_context(context, x_query)
        x, query = standardise_inputs(x), standardise_inputs(query)
        network: dict[str, Any] = {
            "activation": self.activation,
            "depth": self.depth,
            "weight_variance": self.weight_variance,
            "bias_variance": self.bias_variance,
        }
        seen, cross = network_kernels(x, x, **network), network_kernels(query, x, **network)
        response = training_response(seen.ntk, cross.ntk, ridge=self.ridge, time=self.time)
        mean = (response @ y.unsqueeze(-1)).squeeze(-1)
        change = response @ seen.nngp / 2 - cross.nngp  # half of what training does to K**
        variance = nngp_variance(query, **network)
        if joint:
            half = change @ response.mT
            covariance = nngp(query, query, **network) + half + half.mT
            factor = cholesky(covariance, JITTER * variance.amax(-1))
            mean, factor = (mean, factor) if batched else (mean[0], factor[0])
            return MultivariateNormal(mean, scale_tril=factor)
        trained = variance + 2 * (change * response).sum(-1)
        deviation = trained.maximum(JITTER * variance).sqrt()
        return Normal(mean, deviation) if batched else Normal(mean[0], deviation[0])


def training_response(seen: Tensor, cross: Tensor, *, ridge: float, time: float) -> Tensor:
    """How far each target moves each query: the matrix R in f_t = f_0 + R (y - f_0 at the data).

    R = T* (T + ridge I)^-1 (1 - exp(-(T + ridge I) t)). Directions in which T + ridge I is below
    1e-10 of its mean diagonal are trained as if at that rate: conflicting targets at one input are
    averaged, as by a real descent, and rounding is not amplified further.

    Args:
        seen: tangent kernel T (..., n, n) of the training points.
        cross: tangent kernel T* (..., m, n) between queries and training points.
        ridge: not negative.
        time: not negative, or infinite.

    Returns:
        (..., m, n).
    """
    eigenvalues, vectors = torch.linalg.eigh(seen)
    size = seen.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) / max(1, seen.shape[-1])
    rate = (eigenvalues + ridge).maximum(JITTER * size)
    trained = -torch.expm1(-rate * time) / rate
    return (cross @ vectors * trained.unsqueeze(-2)) @ vectors.mT
