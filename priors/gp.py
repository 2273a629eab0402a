"""Gaussian processes whose hyperparameters are drawn per task: the prior to start reading with.

Each task has its own kernel, lengthscales, outputscale, noise and mean. What follows from them,
tasks and posteriors, is in `kernel_prior.py`; the kernels are in `kernels.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal

from priors.kernel_prior import Hyperparameter, KernelPrior, check_hyperparameters
from priors.kernels import KERNELS


@dataclass(frozen=True)
class GaussianProcess(KernelPrior):
    """A Gaussian-process prior with hyperpriors: f ~ GP(mean, outputscale * kernel), y = f + noise.

    Args:
        kernel: a name in `priors.kernels.KERNELS`, or several, one of them drawn per task.
        lengthscale: positive, in the units of x; a number or any torch distribution.
        outputscale: prior variance of f; a number or a distribution.
        noise: variance (not standard deviation) of the observation noise.
        mean: constant mean of f.
        ard: one lengthscale per feature, drawn independently; irrelevant features are the long tail
            of its distribution. Otherwise one per task.
        scale_with_dimension: multiplies lengthscales by sqrt(d), so that functions of many features
            stay as learnable as functions of one (Hvarfner et al., 2024, arXiv 2402.02229).
        inputs: a design in `priors.inputs.DESIGNS`, or several, one of them drawn per task.

    Latents in `Tasks`: "lengthscale" (task, dim) with `ard`, else (task,); "outputscale", "noise",
    "mean" (task,) where they are not plain numbers; "kernel" (task,), an index, where several.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> GaussianProcess().sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    kernel: str | tuple[str, ...] = "rbf"
    lengthscale: float | Distribution = LogNormal(math.log(0.3), 0.7)
    outputscale: float | Distribution = LogNormal(0.0, 0.5)
    noise: float | Distribution = LogNormal(-4.0, 1.5)
    mean: float | Distribution = 0.0
    ard: bool = False
    scale_with_dimension: bool = False
    inputs: str | tuple[str, ...] = "uniform"

    shaping: ClassVar[tuple[str, ...]] = ("lengthscale",)
    quadrature_limit: ClassVar[int] = 3  # beyond it NUTS is as quick, and knows more kernels

    def __post_init__(self) -> None:
        unknown = [name for name in self.kernels if name not in KERNELS]
        if unknown or not self.kernels:
            raise ValueError(f"Expected kernel among {sorted(KERNELS)}; got {self.kernels}.")
        check_hyperparameters(self, ("lengthscale", "outputscale", "noise"))

    @property
    def kernels(self) -> tuple[str, ...]:
        return (self.kernel,) if isinstance(self.kernel, str) else tuple(self.kernel)

    @property
    def alternatives(self) -> tuple[str, ...]:
        return self.kernels

    def hyperparameters(self, d: int) -> tuple[Hyperparameter, ...]:
        """Lengthscales, outputscale, noise and mean of tasks with `d` features."""
        shape = (d,) if self.ard else ()
        factor = math.sqrt(d) if self.scale_with_dimension else 1.0
        return (
            Hyperparameter("lengthscale", self.lengthscale, "x", shape, factor, spacing=0.2),
            Hyperparameter("outputscale", self.outputscale, "y^2"),
            Hyperparameter("noise", self.noise, "y^2"),
            Hyperparameter("mean", self.mean, "y", spacing=math.inf),
        )

    def unit_covariance(self, x: Tensor, z: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The kernel with an outputscale of 1, (task, n, m)."""
        return self._by_alternative(self._kernel, theta, x, z)

    def unit_variance(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """Its diagonal (task, n); 1 but for the linear kernel, which alone is not stationary."""
        if "linear" not in self.kernels:
            return x.new_ones(x.shape[:-1])
        square = ((x - 0.5) / self._lengthscale(theta).unsqueeze(-2)).square().sum(-1)
        if len(self.kernels) == 1:
            return square
        is_linear = theta["kernel"] == self.kernels.index("linear")
        return torch.where(is_linear.unsqueeze(-1), square, 1.0)

    def _kernel(self, name: str, theta: Mapping[str, Tensor], x: Tensor, z: Tensor) -> Tensor:
        return KERNELS[name](x, z, self._lengthscale(theta))

    def _lengthscale(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Lengthscales (task, 1 or dim)."""
        return theta["lengthscale"] if self.ard else theta["lengthscale"].unsqueeze(-1)
