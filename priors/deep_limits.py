"""What infinitely wide networks become when they are also infinitely deep: three old classifiers.

On inputs of equal norm, and with an activation scaled so that a layer keeps it, the covariance of a
layer is a function k of the cosine z between two inputs: the normalised dual, a power series sum_j
a_j^2 z^j with k(1) = 1. Depth iterates k, and the iterates have only three kinds of limit:

- a_0 = a_1 = 0: only the closest training point keeps any covariance: its nearest neighbour;
- a_0 = 0, a_1 != 0: covariances shrink by a_1^2 per layer, all in the same proportion to a limit
  (of Koenigs) singular at z = 1: a smoother with weights ||x - x'||^-alpha;
- a_0 != 0: all pairs become equally correlated: the majority decides.

The predictors below are those limits, on targets y of which the sign is the class; the kernels they
are limits of come from `dual.py` through `normalised_dual` and `deep_kernel`.

Reference: Radhakrishnan, Belkin and Uhler, Wide and deep neural networks achieve consistency for
classification, PNAS 2023, arXiv 2204.14126. They treat the tangent kernel; the same limits hold for
the covariance, which reaches them faster and is used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from priors.dual import Activation

ZERO = 1e-12  # coefficients of a dual that are zero but for rounding

Dual = Callable[[Tensor], Tensor]


class DeepLimit(NamedTuple):
    """Which limit a network has, and what decides it."""

    kind: str  # "nearest-neighbour", "singular-smoother" or "majority-vote"
    constant: float  # a_0^2 = k(0)
    slope: float  # a_1^2 = k'(0)
    expansion: float  # k'(1), by which small angles (squared) grow from layer to layer
    exponent: float | None  # alpha of the singular smoother


def normalised_dual(activation: Activation, variance: float = 1.0, *, centre: bool = False) -> Dual:
    """The correlation after one layer as a function of the correlation before it.

    Args:
        activation: as in `priors.dual`.
        variance: of the inputs of the activation.
        centre: of the activation minus its mean, which makes a_0 = 0. The difference keeps 16
            digits below one, not below the correlation.
    """
    q = torch.tensor(variance, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    shift = activation.dual(zero, q, q) if centre else zero
    scale = activation.square(q) - shift
    return lambda cosine: (activation.dual(variance * cosine, q, q) - shift) / scale


def deep_limit(dual: Dual) -> DeepLimit:
    """The limit at infinite depth of networks with this normalised dual.

    Raises:
        ValueError: a dual with k(1) != 1, or with none of the three limits: a linear one, or one
            with a_0 != 0 and k'(1) < 1, whose layers forget all inputs.

    Reference: Radhakrishnan et al., 2023, theorems on the three cases; alpha = -4 log|a_1| / log
    k'(1).
    """
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    values = dual(ends)
    (derivatives,) = torch.autograd.grad(values.sum(), ends)
    (constant, one), (slope, expansion) = values.tolist(), derivatives.tolist()
    if abs(one - 1) > 1e-9:
        raise ValueError(f"Expected a normalised dual, with k(1) = 1; got {one}.")
    if constant > ZERO and expansion > 1 - 1e-9:
        return DeepLimit("majority-vote", constant, slope, expansion, None)
    if constant > ZERO or slope > 1 - ZERO:
        raise ValueError(
            "Expected a nonlinear dual with k(0) = 0 or k'(1) >= 1; "
            f"got k(0) = {constant:.3g}, k'(0) = {slope:.3g} and k'(1) = {expansion:.3g}."
        )
    if slope < ZERO:
        return DeepLimit("nearest-neighbour", constant, slope, expansion, None)
    exponent = -2 * math.log(slope) / math.log(expansion)
    return DeepLimit("singular-smoother", constant, slope, expansion, exponent)


def deep_kernel(dual: Dual, cosine: Tensor, depth: int) -> Tensor:
    """The NNGP kernel, as a correlation, after `depth` layers at inputs with this cosine."""
    for _ in range(depth):
        cosine = dual(cosine)
    return cosine


def koenigs(dual: Dual, cosine: Tensor, depth: int) -> Tensor:
    """k iterated `depth` times over a_1^(2 depth): the limit kernel of the singular smoother.

    It solves psi(k(z)) = a_1^2 psi(z) and grows like (1 - z)^(-alpha / 2) towards z = 1. Each
    further layer multiplies its relative error, about a_1^(2 depth) psi, by a_1^2.

    Reference: Radhakrishnan et al., 2023; Koenigs, 1884, for the functional equation.
    """
    return deep_kernel(dual, cosine, depth) / deep_limit(dual).slope ** depth


def nearest_neighbour(x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
    """The target of the training point at the smallest angle from each query.

    Args:
        x: (..., n, d), of which only the directions matter.
        y: (..., n).
        x_query: (..., m, d).

    Returns:
        (..., m).
    """
    closest = (_directions(x_query) @ _directions(x).mT).argmax(-1)
    return y.gather(-1, closest)


def singular_smoother(x: Tensor, y: Tensor, x_query: Tensor, *, exponent: float) -> Tensor:
    """Targets averaged with weights ||x - x'||^-exponent between directions.

    At a training point it returns its target: it interpolates, and is consistent as a classifier
    nevertheless where the exponent is the dimension of the data (Devroye, Gyorfi and Krzyzak, The
    Hilbert kernel regression estimate, 1998).

    Args: see `nearest_neighbour`.
    """
    mode = "donot_use_mm_for_euclid_dist"  # keeps the digits of small distances
    distance = torch.cdist(_directions(x_query), _directions(x), compute_mode=mode)
    tiny = torch.finfo(distance.dtype).tiny
    weight = (-exponent * distance.clamp_min(tiny).log()).softmax(-1)  # (..., m, n)
    return (weight * y.unsqueeze(-2)).sum(-1)


def majority_vote(y: Tensor, num_queries: int) -> Tensor:
    """The mean target (..., m) at every query, whatever the inputs."""
    return y.mean(-1, keepdim=True).expand(*y.shape[:-1], num_queries)


def _directions(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
