"""Infinitely wide Bayesian neural networks as a prior: Gaussian processes with a network's kernel.

The kernel is in `infinite_width.py`; everything else follows in `kernel_prior.py`. Networks of
finite width are in `bnn.py`, networks trained by gradient descent instead of Bayes in `ntk.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Distribution, LogNormal

from priors.dual import ACTIVATIONS, Activation, abrelu
from priors.infinite_width import nngp, nngp_variance
from priors.inputs import standardise_inputs
from priors.kernel_prior import Hyperparameter, KernelPrior, check_hyperparameters


@dataclass(frozen=True)
class NNGP(KernelPrior):
    """Functions of an infinitely wide network: f ~ GP(mean, outputscale * K), y = f + noise.

    K is the covariance of the output of a fully connected network with weights N(0,
    weight_variance / fan_in) and biases N(0, bias_variance), the readout included, at inputs of
    unit variance (x - 1/2) sqrt(12).

    Args:
        activation: a name in `priors.dual.ACTIVATIONS`, or the slopes (below, above zero) of a
            piecewise linear one.
        depth: number of hidden layers, or several, one of them drawn per task.
        weight_variance: positive; a number or any torch distribution.
        bias_variance: positive; a number or a distribution.
        outputscale: multiplies the kernel; a number or a distribution.
        noise: variance of the observation noise.
        mean: constant mean of f.
        inputs: a design in `priors.inputs.DESIGNS`, or several, one of them drawn per task.

    Latents in `Tasks`, each (task,): "weight_variance", "bias_variance", "outputscale", "noise",
    "mean" where they are not plain numbers; "depth", an index, where several.

    Reference: Lee, Bahri, Novak, Schoenholz, Pennington and Sohl-Dickstein, Deep neural networks as
    Gaussian processes, ICLR 2018, arXiv 1711.00165.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> NNGP(depth=(1, 2, 4)).sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    activation: str | tuple[float, float] = "relu"
    depth: int | tuple[int, ...] = 2
    weight_variance: float | Distribution = LogNormal(math.log(2.0), 0.4)
    bias_variance: float | Distribution = LogNormal(math.log(0.2), 0.8)
    outputscale: float | Distribution = 1.0
    noise: float | Distribution = LogNormal(-4.0, 1.5)
    mean: float | Distribution = 0.0
    inputs: str | tuple[str, ...] = "uniform"

    shaping: ClassVar[tuple[str, ...]] = ("weight_variance", "bias_variance")
    choice: ClassVar[str] = "depth"

    def __post_init__(self) -> None:
        named = isinstance(self.activation, str)
        if self.activation not in ACTIVATIONS if named else len(self.activation) != 2:
            raise ValueError(
                f"Expected an activation among {sorted(ACTIVATIONS)}, or two slopes; "
                f"got {self.activation!r}."
            )
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"Expected depths of at least 1 hidden layer; got {self.depth}.")
        check_hyperparameters(self, ("weight_variance", "bias_variance", "outputscale", "noise"))

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.depth,) if isinstance(self.depth, int) else tuple(self.depth)

    @property
    def alternatives(self) -> tuple[str, ...]:
        return tuple(str(depth) for depth in self.depths)

    def hyperparameters(self, d: int) -> tuple[Hyperparameter, ...]:
        """Variances of weights and biases, outputscale, noise and mean, one each for a task."""
        return (
            Hyperparameter("weight_variance", self.weight_variance, spacing=0.3),
            Hyperparameter("bias_variance", self.bias_variance),
            Hyperparameter("outputscale", self.outputscale, "y^2"),
            Hyperparameter("noise", self.noise, "y^2"),
            Hyperparameter("mean", self.mean, "y", spacing=math.inf),
        )

    def unit_covariance(self, x: Tensor, z: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The network's kernel (task, n, m) between x (task, n, d) and z (task, m, d)."""
        return self._by_alternative(self._kernel, theta, x, z)

    def unit_variance(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The network's kernel (task, n) of each x (task, n, d) with itself."""
        return self._by_alternative(self._diagonal, theta, x)

    @property
    def _dual(self) -> Activation:
        """The activation with its moments."""
        if isinstance(self.activation, str):
            return ACTIVATIONS[self.activation]
        return abrelu(*self.activation)

    def _kernel(self, depth: str, theta: Mapping[str, Tensor], x: Tensor, z: Tensor) -> Tensor:
        return nngp(
            standardise_inputs(x),
            standardise_inputs(z),
            activation=self._dual,
            depth=int(depth),
            weight_variance=theta["weight_variance"],
            bias_variance=theta["bias_variance"],
        )

    def _diagonal(self, depth: str, theta: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return nngp_variance(
            standardise_inputs(x),
            activation=self._dual,
            depth=int(depth),
            weight_variance=theta["weight_variance"],
            bias_variance=theta["bias_variance"],
        )
