"""Functions of normal mixtures that both the training loss and `predictive.py` rest on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQRT_2PI = math.sqrt(2 * math.pi)


def mixture_log_prob(log_weights: Tensor, means: Tensor, log_stds: Tensor, y: Tensor) -> Tensor:
    """log sum_k w_k Normal(y; mean_k, std_k^2), finite wherever ((y - mean) / std)^2 is.

    Args:
        log_weights, means, log_stds: (..., components), weights normalised.
        y: broadcastable to (...).
    """
    z = (y.unsqueeze(-1) - means) * torch.exp(-log_stds)
    log_normal = -0.5 * z.square() - log_stds - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(log_weights + log_normal, dim=-1)


def normal_cdf(z: Tensor) -> Tensor:
    """Phi(z), precise in the lower tail too, where torch.special.ndtr is not."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def log_improvement(z: Tensor) -> Tensor:
    """log h(z), h(z) = z Phi(z) + phi(z), with finite derivatives for any float64 z above -1e150.

    E[max(y - best, 0)] = s h((m - best) / s) for y ~ Normal(m, s^2). With the Mills ratio
    R = Phi / phi, h = phi (1 + z R), which cancels to phi (1/z^2 - 3/z^4 + 15/z^6 - ...) far below.

    Reference: Ament et al., Unexpected Improvements to Expected Improvement, NeurIPS 2023,
    arXiv 2310.20708, eq. 9.
    """
    near = z.clamp_min(-1.0)  # each branch sees only its own range: no NaN reaches the gradient
    near = (near * normal_cdf(near) + (-0.5 * near.square()).exp() / SQRT_2PI).log()

    middle = z.clamp(-30.0, -1.0)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(-middle / math.sqrt(2))
    middle = torch.log1p(middle * mills)

    far = z.clamp_max(-30.0)
    series = torch.ones_like(far)
    for odd in range(17, 1, -2):  # 1 - 3/z^2 (1 - 5/z^2 (1 - ...)), exact to 1e-16 from 30 on
        series = 1 - odd * far.pow(-2) * series
    far = series.log() - 2 * (-far).log()

    log_phi = -0.5 * z.square() - math.log(SQRT_2PI)
    return torch.where(z > -1, near, log_phi + torch.where(z > -30, middle, far))
