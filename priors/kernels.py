"""Covariance functions of Gaussian processes, as pure functions with unit variance.

Every kernel maps x (..., n, d), z (..., m, d) and lengthscale (..., 1 or d) to a matrix
(..., n, m); leading axes broadcast, so that each task of a batch has its own lengthscales. Scaled
distances are formed in the dtype of the inputs; use float64 where the matrix is to be factorised.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def squared_distance(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    """Scaled squared distances sum_j ((x_j - z_j) / lengthscale_j)^2, never negative."""
    x = x / lengthscale.unsqueeze(-2)  # (..., n, d)
    z = z / lengthscale.unsqueeze(-2)  # (..., m, d)
    center = x.mean(-2, keepdim=True)  # the expansion below loses digits far from the origin
    x, z = x - center, z - center
    square_x, square_z = x.square().sum(-1, keepdim=True), z.square().sum(-1, keepdim=True)
    left = torch.cat([-2 * x, square_x, torch.ones_like(square_x)], -1)
    right = torch.cat([z, torch.ones_like(square_z), square_z], -1)
    return (left @ right.mT).clamp_min(0)  # (..., n, m): one product is one pass over memory


def rbf(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    """The squared-exponential kernel exp(-r^2 / 2).

    Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, equation 4.9.
    """
    return squared_distance(x, z, lengthscale).mul_(-0.5).exp_()


def matern12(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    """The exponential kernel exp(-r), of Brownian roughness.

    Reference: Rasmussen and Williams, equation 4.18.
    """
    return torch.exp(-_distance(x, z, lengthscale))


def matern32(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    """The once-differentiable Matern kernel (1 + sqrt(3) r) exp(-sqrt(3) r).

    Reference: Rasmussen and Williams, equation 4.17.
    """
    r = math.sqrt(3) * _distance(x, z, lengthscale)
    return (1 + r) * torch.exp(-r)


def matern52(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    """The twice-differentiable Matern kernel (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r).

    Reference: Rasmussen and Williams, equation 4.17.
    """
    r = math.sqrt(5) * _distance(x, z, lengthscale)
    return (1 + r + r.square() / 3) * torch.exp(-r)


def periodic(x: Tensor, z: Tensor, lengthscale: Tensor, period: float = 0.5) -> Tensor:
    """The periodic kernel exp(-2 sum_j sin^2(pi (x_j - z_j) / period) / lengthscale_j^2).

    Reference: Rasmussen and Williams, equation 4.31, with a period.
    """
    phase = math.pi * (x.unsqueeze(-2) - z.unsqueeze(-3)) / period  # (..., n, m, d)
    scaled = torch.sin(phase) / lengthscale.unsqueeze(-2).unsqueeze(-2)
    return torch.exp(-2 * scaled.square().sum(-1))


def linear(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    """The linear kernel sum_j (x_j - 1/2) (z_j - 1/2) / lengthscale_j^2, centred on the unit box.

    Not stationary: its variance is 1 where the scaled distance to the centre is 1.
    """
    scale = lengthscale.unsqueeze(-2)
    return ((x - 0.5) / scale) @ ((z - 0.5) / scale).mT


def _distance(x: Tensor, z: Tensor, lengthscale: Tensor) -> Tensor:
    """Scaled distances, 1e-15 and with a gradient of zero where two points coincide."""
    return squared_distance(x, z, lengthscale).clamp_min(1e-30).sqrt()


KERNELS: dict[str, Kernel] = {
    "rbf": rbf,
    "matern12": matern12,
    "matern32": matern32,
    "matern52": matern52,
    "periodic": periodic,
    "linear": linear,
}
