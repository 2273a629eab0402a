"""Distances between distributions of functions, from covariances in closed form or from draws.

A function is the vector of its values at a set of points. All distances are differentiable, and
those that grow with the number of points are to be divided by its square root, so that they stay
in the units of the function and compare across sets of points. `matching.py` minimises them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.draws import draw_normal

DEGENERATE = 1e-8  # relative size of singular values below which a gradient is damped


def bures(
    a: Tensor, b: Tensor, *, mean_a: Tensor | None = None, mean_b: Tensor | None = None
) -> Tensor:
    """Squared 2-Wasserstein distance (...) of the Gaussians N(mean_a, a) and N(mean_b, b).

    |mean_a - mean_b|^2 + tr a + tr b - 2 tr (a^1/2 b a^1/2)^1/2. The last trace is the sum of the
    singular values of a^1/2 b^1/2, which loses no digits where the matrices are nearly singular, as
    covariances of smooth functions are.

    Args:
        a: (..., n, n), symmetric and positive semidefinite.
        b: the same.
        mean_a: (..., n); zero by default.
        mean_b: the same.

    Reference: Dowson and Landau, J. Multivariate Analysis 12, 1982, equation 4.
    """
    traces = (a.diagonal(dim1=-2, dim2=-1) + b.diagonal(dim1=-2, dim2=-1)).sum(-1)
    squared = traces - 2 * _Fidelity.apply(a, b)
    if mean_a is not None or mean_b is not None:
        zero = torch.zeros((), dtype=a.dtype, device=a.device)
        apart = (zero if mean_a is None else mean_a) - (zero if mean_b is None else mean_b)
        squared = squared + apart.square().sum(-1)
    return squared.clamp_min(0)


class _Fidelity(torch.autograd.Function):
    """tr (a^1/2 b a^1/2)^1/2 with the transport maps as gradients, damped where they are unbounded.

    With a^1/2 b^1/2 = U S V', the gradient in a is b^1/2 V S^-1 V' b^1/2 / 2, half the optimal map
    from N(0, a) to N(0, b), and the one in b is a^1/2 U S^-1 U' a^1/2 / 2.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        root_a, root_b = _root(a), _root(b)
        u, s, vh = torch.linalg.svd(root_a @ root_b)
        ctx.save_for_backward(root_a @ u, root_b @ vh.mT, s)
        return s.sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        of_a, of_b, s = ctx.saved_tensors
        half = (grads[0] / 2).unsqueeze(-1).unsqueeze(-1)
        inverse = 1 / s.clamp_min(DEGENERATE * s[..., :1]).clamp_min(torch.finfo(s.dtype).tiny)
        scale = half * inverse.unsqueeze(-2)
        return (of_b * scale) @ of_b.mT, (of_a * scale) @ of_a.mT


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix; rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def sliced_wasserstein(
    f: Tensor, g: Tensor, *, projections: int = 256, generator: torch.Generator
) -> Tensor:
    """Mean over random unit directions of the exact 1-Wasserstein distance of projected draws.

    A direction sees a standard deviation of about that of f at one point, whatever the number of
    points: the result is in the units of f. The same generator state gives the same directions.

    Args:
        f: (draw, point).
        g: (other draw, point); the number of draws may differ.

    Reference: Bonneel, Rabin, Peyre and Pfister, J. Math. Imaging and Vision 51, 2015, section 3.
    """
    directions = F.normalize(draw_normal(f.shape[-1], projections, generator=generator), dim=0)
    ordered_f = (f @ directions).sort(0).values  # (draw, projection)
    ordered_g = (g @ directions).sort(0).values
    rank_f, rank_g, share = _coupling(len(f), len(g), device=f.device)
    distance = (ordered_f[rank_f] - ordered_g[rank_g]).abs()
    return (share.to(f.dtype) @ distance).mean()


def _coupling(n: int, m: int, *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks in samples of n and of m that optimal transport pairs, and the mass of each pair."""
    steps_f = torch.arange(1, n + 1, device=device) * m  # levels in units of 1 / (n m), exact
    steps_g = torch.arange(1, m + 1, device=device) * n
    ends = torch.cat([steps_f, steps_g]).unique()
    starts = F.pad(ends[:-1], (1, 0))
    return starts // m, starts // n, (ends - starts).double() / (n * m)


def energy_distance(f: Tensor, g: Tensor) -> Tensor:
    """(2 E|f - g| - E|f - f'| - E|g - g'|) / sqrt(point), without bias, so it may be negative.

    Up to a constant it is the squared Cramer distance of the projected draws, averaged over all
    directions. Gradients of Wasserstein distances between samples are biased; these are not.

    Args:
        f: (draw, point), at least 2 draws.
        g: (other draw, point).

    Reference: Szekely and Rizzo, J. Statistical Planning and Inference 143, 2013, equation 5;
    Bellemare et al., The Cramer distance, arXiv 1705.10743, for the bias.
    """
    between = _distances(f, g).mean()
    within_f = _distances(f, f).sum() / (len(f) * (len(f) - 1))
    within_g = _distances(g, g).sum() / (len(g) * (len(g) - 1))
    return (2 * between - within_f - within_g) / math.sqrt(f.shape[-1])


def _distances(f: Tensor, g: Tensor) -> Tensor:
    return torch.cdist(f, g, compute_mode="donot_use_mm_for_euclid_dist")
