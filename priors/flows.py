"""Normalising flows as priors of a hidden layer's weights, with an exact density.

A flow turns standard normal numbers into the bias and weights of one hidden unit; all units of a
layer share it and are independent, so that it has as many numbers for ten units as for thousands,
and wide networks still converge to a Gaussian process. Affine couplings are inverted exactly, and
their Jacobian is triangular: samples and density belong to the same distribution (with planar
flows, which have no closed inverse, they easily do not). `matching.py` fits them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from priors.draws import draw_normal

STEEPEST = 1.5  # bound on the log of the scale of one coupling

Numbers = tuple[tuple[float, ...], ...]  # a matrix as plain data


class Mapped(NamedTuple):
    """A flow's output, and the log determinant of the Jacobian of the map that made it."""

    value: Tensor  # (..., dim)
    log_determinant: Tensor  # (...)


class Coupling(NamedTuple):
    """Scales and shifts some coordinates by a small network of the others."""

    kept: Tensor  # (k,) integers
    moved: Tensor  # (dim - k,) integers
    inner: Tensor  # (1 + k, hidden), biases first
    outer: Tensor  # (1 + hidden, 2 (dim - k)), biases first; logarithms of scales, then shifts

    def scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift (..., dim - k) of the moved coordinates, given the kept ones."""
        hidden = torch.tanh(self.inner[0] + kept @ self.inner[1:])
        scale, shift = (self.outer[0] + hidden @ self.outer[1:]).chunk(2, -1)
        return STEEPEST * torch.tanh(scale / STEEPEST), shift


@dataclass(frozen=True)
class WeightFlow:
    """A distribution on R^dim: the image of Normal(0, I) under affine couplings.

    Coupling i keeps every second coordinate, starting with coordinate i mod 2. Its numbers are
    plain data, so that a prior with a flow is written and read like any other.

    Args:
        dim: 1 + fan_in of the layer, bias first.
        couplings: of each, the matrices `inner` (1 + k, hidden) and `outer` (1 + hidden, 2 (dim -
            k)) of its network as nested tuples. Without any, the flow is the identity.

    Reference: Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP, ICLR 2017,
    equations 4 to 8.

    Example:
        >>> flow = identity_flow(2, generator=torch.Generator().manual_seed(0))
        >>> flow.log_prob(torch.zeros(5, 2, dtype=torch.float64)).shape
        torch.Size([5])
    """

    dim: int = 2
    couplings: tuple[tuple[Numbers, Numbers], ...] = ()

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"Expected a flow of 2 dimensions or more; got {self.dim}.")
        for index, (inner, outer) in enumerate(self.couplings):
            kept = len(range(index % 2, self.dim, 2))
            hidden = len(inner[0])
            shapes = ((len(inner), len(inner[0])), (len(outer), len(outer[0])))
            expected = ((1 + kept, hidden), (1 + hidden, 2 * (self.dim - kept)))
            if shapes != expected:
                raise ValueError(
                    f"Expected matrices of shapes {expected} in coupling {index} of a flow of "
                    f"{self.dim} dimensions; got {shapes}."
                )

    @cached_property
    def tensors(self) -> tuple[Coupling, ...]:
        """The couplings in float64 on the CPU."""
        return tuple(
            coupling(
                self.dim,
                index,
                torch.tensor(inner, dtype=torch.float64),
                torch.tensor(outer, dtype=torch.float64),
            )
            for index, (inner, outer) in enumerate(self.couplings)
        )

    def forward(self, z: Tensor) -> Mapped:
        """From standard normal z (..., dim) to parameters, in the dtype of z."""
        return push(self._like(z), z)

    def inverse(self, value: Tensor) -> Mapped:
        """From parameters (..., dim) back to standard normal ones."""
        return pull(self._like(value), value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (...) at parameters (..., dim)."""
        z, log_determinant = self.inverse(value)
        return log_determinant - 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def _like(self, z: Tensor) -> tuple[Coupling, ...]:
        """The couplings on the device and in the dtype of `z`."""
        if z.dtype == torch.float64 and z.device.type == "cpu":
            return self.tensors
        return tuple(
            coupling(self.dim, index, one.inner.to(z), one.outer.to(z))
            for index, one in enumerate(self.tensors)
        )


def coupling(dim: int, index: int, inner: Tensor, outer: Tensor) -> Coupling:
    """Coupling number `index` of a flow on R^dim, on the device of its matrices."""
    every = torch.arange(dim, device=inner.device)
    return Coupling(every[index % 2 :: 2], every[1 - index % 2 :: 2], inner, outer)


def identity_flow(
    dim: int, *, couplings: int = 4, hidden: int = 16, generator: torch.Generator
) -> WeightFlow:
    """A flow that leaves everything where it is, ready to be fitted."""
    pairs = []
    for index in range(couplings):
        kept = len(range(index % 2, dim, 2))
        inner = draw_normal(1 + kept, hidden, generator=generator) / math.sqrt(kept)
        outer = torch.zeros(1 + hidden, 2 * (dim - kept), dtype=torch.float64)
        pairs.append((inner, outer))
    return flow_of(dim, pairs)


def flow_of(dim: int, pairs: list[tuple[Tensor, Tensor]]) -> WeightFlow:
    """The flow of these matrices `inner` and `outer`, one pair for each coupling."""
    return WeightFlow(dim, tuple((_numbers(inner), _numbers(outer)) for inner, outer in pairs))


def push(couplings: tuple[Coupling, ...], z: Tensor) -> Mapped:
    """z (..., dim) through all couplings; differentiable in their matrices."""
    total = z.new_zeros(z.shape[:-1])
    for one in couplings:
        log_scale, shift = one.scale_and_shift(z[..., one.kept])
        z = z.index_copy(-1, one.moved, z[..., one.moved] * log_scale.exp() + shift)
        total = total + log_scale.sum(-1)
    return Mapped(z, total)


def pull(couplings: tuple[Coupling, ...], value: Tensor) -> Mapped:
    """The inverse of `push`."""
    total = value.new_zeros(value.shape[:-1])
    for one in reversed(couplings):
        log_scale, shift = one.scale_and_shift(value[..., one.kept])
        moved = (value[..., one.moved] - shift) * (-log_scale).exp()
        value = value.index_copy(-1, one.moved, moved)
        total = total - log_scale.sum(-1)
    return Mapped(value, total)


def _numbers(matrix: Tensor) -> Numbers:
    return tuple(tuple(row) for row in matrix.tolist())
