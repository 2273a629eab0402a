"""Kernels of infinitely wide fully connected networks, as pure functions.

The hidden layers of a network with weights W ~ N(0, weight_variance / fan_in) and biases b ~ N(0,
bias_variance) become Gaussian processes as their widths grow. Their covariances follow from layer
to layer through the dual of the activation (`dual.py`):

    q_0 = bias_variance + weight_variance <x, z> / d
    q_l = bias_variance + weight_variance E[phi(u) phi(v)],  (u, v) ~ N(0, q_{l-1} at x and z).

Depth counts hidden layers, and the readout has the same variances: q_depth is the covariance of the
network's output (the NNGP kernel). The tangent kernel (NTK) holds the inner products of the
output's gradients, which rule training by gradient descent: see `ntk.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from priors.dual import ACTIVATIONS, Activation

CACHED = 2**17  # matrix entries, 1 MiB


class NetworkKernels(NamedTuple):
    """Both kernels of one infinitely wide network."""

    nngp: Tensor  # (..., n, m) covariance of the outputs at initialisation
    ntk: Tensor  # (..., n, m) inner product of the outputs' gradients in all parameters


def nngp(
    x: Tensor,
    z: Tensor,
    *,
    activation: str | Activation,
    depth: int,
    weight_variance: float | Tensor,
    bias_variance: float | Tensor,
) -> Tensor:
    """Covariance (..., n, m) of the outputs of an infinitely wide network at x and z.

    Args:
        x: (..., n, d), of about unit variance per feature.
        z: (..., m, d).
        activation: a name in `priors.dual.ACTIVATIONS`, or an `Activation`.
        depth: number of hidden layers; 0 is a linear model.
        weight_variance: positive, divided by the fan-in; a number, or (...) with one per task.
        bias_variance: not negative; a number or (...).

    Reference: Lee, Bahri, Novak, Schoenholz, Pennington and Sohl-Dickstein, Deep neural networks as
    Gaussian processes, ICLR 2018, arXiv 1711.00165, equations 4 and 5.
    """
    phi = _activation(activation)

    def kernel(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        q = _inputs(x, z, weight, bias)
        for _ in range(depth):
            q = _next(phi, q, weight, bias)
        return q.between

    return _in_pieces(kernel, x, z, _per_task(weight_variance, x), _per_task(bias_variance, x))


def nngp_variance(
    x: Tensor,
    *,
    activation: str | Activation,
    depth: int,
    weight_variance: float | Tensor,
    bias_variance: float | Tensor,
) -> Tensor:
    """The diagonal (..., n) of `nngp(x, x)`, at a cost linear in n; arguments as there."""
    phi = _activation(activation)
    weight, bias = (_per_task(value, x) for value in (weight_variance, bias_variance))
    q = _variance(x, weight, bias)
    for _ in range(depth):
        q = torch.addcmul(bias, weight, phi.square(q))
    return q.squeeze(-1)


def network_kernels(
    x: Tensor,
    z: Tensor,
    *,
    activation: str | Activation,
    depth: int,
    weight_variance: float | Tensor,
    bias_variance: float | Tensor,
) -> NetworkKernels:
    """The NNGP and the NTK of one network in one pass; arguments as in `nngp`.

    The NTK is of the parameterisation in which weights and biases are standard normal and a layer
    is sqrt(weight_variance / fan_in) W h + sqrt(bias_variance) b.

    Reference: Jacot, Gabriel and Hongler, Neural tangent kernel, NeurIPS 2018, arXiv 1806.07572,
    theorem 1.
    """
    phi = _activation(activation)
    weight, bias = (_per_task(value, x) for value in (weight_variance, bias_variance))
    q = _inputs(x, z, weight, bias)
    tangent = q.between
    for _ in range(depth):
        inner = weight * phi.slope_dual(*q) * tangent
        q = _next(phi, q, weight, bias)
        tangent = q.between + inner
    return NetworkKernels(q.between, tangent)


def ntk(
    x: Tensor,
    z: Tensor,
    *,
    activation: str | Activation,
    depth: int,
    weight_variance: float | Tensor,
    bias_variance: float | Tensor,
) -> Tensor:
    """The neural tangent kernel (..., n, m) between x and z; see `network_kernels`."""
    return network_kernels(
        x,
        z,
        activation=activation,
        depth=depth,
        weight_variance=weight_variance,
        bias_variance=bias_variance,
    ).ntk


def ntk_variance(
    x: Tensor,
    *,
    activation: str | Activation,
    depth: int,
    weight_variance: float | Tensor,
    bias_variance: float | Tensor,
) -> Tensor:
    """The diagonal (..., n) of `ntk(x, x)`, at a cost linear in n; arguments as in `nngp`."""
    phi = _activation(activation)
    weight, bias = (_per_task(value, x) for value in (weight_variance, bias_variance))
    q = tangent = _variance(x, weight, bias)
    for _ in range(depth):
        inner = weight * phi.slope_square(q) * tangent
        q = torch.addcmul(bias, weight, phi.square(q))
        tangent = q + inner
    return tangent.squeeze(-1)


def _activation(activation: str | Activation) -> Activation:
    if isinstance(activation, Activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(f"Expected an activation among {sorted(ACTIVATIONS)}; got {activation!r}.")
    return ACTIVATIONS[activation]


def _per_task(value: float | Tensor, like: Tensor) -> Tensor:
    """One value per task as (..., 1, 1), to broadcast against matrices and columns."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)[..., None, None]


def _in_pieces(kernel: Callable[..., Tensor], x: Tensor, z: Tensor, *per_task: Tensor) -> Tensor:
    """All tasks at once, but on a CPU in pieces whose matrices stay in the cache."""
    parts = (x, z, *per_task)
    batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    size = max(1, CACHED // max(1, x.shape[-2] * z.shape[-2]))
    if x.device.type != "cpu" or batch.numel() <= size:
        return kernel(*parts)
    rows = (part.expand(*batch, *part.shape[-2:]).flatten(0, -3) for part in parts)
    pieces = zip(*(row.split(size) for row in rows), strict=True)
    return torch.cat([kernel(*piece) for piece in pieces]).unflatten(0, batch)


class _Layer(NamedTuple):
    """Second moments of what enters the activations of a layer at x and z."""

    between: Tensor  # (..., n, m)
    of_x: Tensor  # (..., n, 1)
    of_z: Tensor  # (..., 1, m)


def _inputs(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> _Layer:
    """The first layer."""
    between = torch.addcmul(bias, weight, x @ z.mT / x.shape[-1])
    return _Layer(between, _variance(x, weight, bias), _variance(z, weight, bias).mT)


def _next(phi: Activation, q: _Layer, weight: Tensor, bias: Tensor) -> _Layer:
    """The layer after q."""
    moments = phi.dual(*q), phi.square(q.of_x), phi.square(q.of_z)
    return _Layer(*(torch.addcmul(bias, weight, moment) for moment in moments))


def _variance(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Variance (..., n, 1) of the first layer."""
    return torch.addcmul(bias, weight, x.square().mean(-1, keepdim=True))
