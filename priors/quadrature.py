"""Integrals over the few hyperparameters of a Gaussian process, by adaptive lattice quadrature.

`integrate` works on any log density of up to about four variables. The trapezoidal rule on a
lattice converges geometrically for smooth densities on the whole space, so all it takes is a
lattice that follows the posterior: coarse over the prior first, then whitened by the posterior's
own covariance. For a Gaussian process one eigendecomposition per lengthscale serves all
outputscales, noises and means in O(n) each.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from priors.kernel_prior import JITTER, KernelPrior


class Lattice(NamedTuple):
    """Nodes and weights of int exp(log_density(t)) g(t) dt = sum_i exp(log_weight_i) g(t_i)."""

    points: Tensor  # (node, dim)
    lattice_index: Tensor  # (node, dim) integers; neighbours along an axis differ by one
    log_weights: Tensor  # (node,)
    spacing: Tensor  # (dim,) between nodes along each axis
    gap: float  # nats between the integrals over half the lattice, about the root of the error


def integrate(
    log_density: Callable[[Tensor], Tensor],
    dim: int,
    *,
    limits: Tensor | None = None,
    step: float = 0.65,
    tolerance: float = 5e-4,
    threshold: float = 18.0,
    rounds: int = 12,
) -> Lattice:
    """Nodes and weights that integrate exp(log_density) over R^dim.

    The lattice starts at spacing 0.4 on [-4, 4]^dim, grows wherever the density is within
    `threshold` nats of its maximum, and is then rebuilt at `step` posterior standard deviations
    along the Cholesky factor of the posterior covariance, until even and odd planes agree on the
    integral. On a normal density lattices of spacing h and 2 h err by 2 exp(-2 pi^2 / h^2) and its
    fourth root: agreement of the halves to 0.005 leaves an error below 1e-5 in the whole.

    Args:
        log_density: maps points (node, dim) to (node,), about standard normal where no data speak.
        limits: (dim,) largest spacing along each axis, for answers finer than the density itself.
        step: spacing in posterior standard deviations; planes of the first coordinate stay planes.
        tolerance: nats between even and odd planes of the final lattice, on every axis.
        threshold: nats below the maximum where the lattice ends.
        rounds: how often the lattice may be rebuilt.
    """
    if dim == 0:
        point = torch.zeros(1, 0, dtype=torch.float64)
        return Lattice(point, point.long(), log_density(point), torch.zeros(0), 0.0)
    origin = torch.zeros(dim, dtype=torch.float64)
    basis = 0.4 * torch.eye(dim, dtype=torch.float64)
    seeds = torch.cartesian_prod(*[torch.arange(-10, 11)] * dim).reshape(-1, dim)
    steps = torch.full((dim,), step, dtype=torch.float64)
    for rebuilt in range(rounds):
        index, value = _grow(log_density, origin, basis, seeds, threshold)
        points = origin + index.to(torch.float64) @ basis.T
        gaps = _parity_gaps(index, value)
        if rebuilt and (gaps < tolerance).all():
            break
        weight = value.softmax(0)
        origin = weight @ points
        centred = points - origin
        covariance = (weight[:, None] * centred).T @ centred + basis @ basis.T / 12
        factor = torch.linalg.cholesky(covariance)
        coarse = (gaps >= tolerance) & ((factor * steps).diagonal() > 0.7 * basis.diagonal())
        steps = torch.where(coarse, 0.6 * steps, steps)
        basis = factor * (steps if limits is None else steps.minimum(limits / factor.diagonal()))
        seeds = torch.linalg.solve_triangular(basis, centred.T, upper=False).T.round().long()
    else:
        warnings.warn(f"The quadrature stopped with a gap of {gaps.max():.2g} nats.", stacklevel=2)
    spacing = basis.diagonal()
    return Lattice(points, index, value + spacing.log().sum(), spacing, float(gaps.max()))


def _grow(
    log_density: Callable[[Tensor], Tensor],
    origin: Tensor,
    basis: Tensor,
    seeds: Tensor,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Lattice indices (node, dim), reached from `seeds`, within `threshold` nats of the maximum."""
    dim = seeds.shape[1]
    reach = 2 ** (60 // dim)  # indices within +-reach / 2 are packed in one integer
    radix = reach ** torch.arange(dim)
    offsets = torch.tensor(list(itertools.product((-1, 0, 1), repeat=dim)))
    fresh = seeds.unique(dim=0)
    codes = torch.zeros(0, dtype=torch.long)
    index, value = fresh[:0], torch.zeros(0, dtype=torch.float64)
    while len(fresh):
        values = log_density(origin + fresh.to(torch.float64) @ basis.T)
        values = values.nan_to_num(nan=-math.inf, neginf=-math.inf)
        index, value = torch.cat([index, fresh]), torch.cat([value, values])
        codes = torch.cat([codes, ((fresh + reach // 2) * radix).sum(-1)])
        alive = fresh[values > value.max() - threshold]
        around = (alive[:, None] + offsets).reshape(-1, dim)
        around_codes = ((around + reach // 2) * radix).sum(-1).unique()
        around_codes = around_codes[torch.isin(around_codes, codes, invert=True)]
        fresh = around_codes[:, None] // radix % reach - reach // 2
    keep = value > value.max() - threshold
    return index[keep], value[keep]


def _parity_gaps(index: Tensor, value: Tensor) -> Tensor:
    """Worst relative disagreement (dim,) of half lattices that split along each axis.

    Each half lattice of `parities` is charged to the axes in its sum.
    """
    gaps = 2 * (value.softmax(0) @ parities(index)).abs()
    return (gaps.unsqueeze(-1) * _axes(index.shape[1])).amax(0)


def parities(index: Tensor) -> Tensor:
    """Which half lattice each node is in, +1 or -1, for each way to halve, (node, 2^dim - 1).

    A half holds the nodes where the sum of some of the indices is even.
    """
    return 1.0 - 2.0 * (index @ _axes(index.shape[1]).T).remainder(2).double()


def _axes(dim: int) -> Tensor:
    """Every set of axes but the empty one, (2^dim - 1, dim) zeros and ones."""
    sets = list(itertools.product((0, 1), repeat=dim))[1:]
    return torch.tensor(sets, dtype=torch.long).reshape(2**dim - 1, dim)


class Spectral:
    """One task: likelihoods and predictions for many hyperparameters at once.

    With K = U diag(lambda) U' the unit kernel at the hyperparameters that shape it, the covariance
    of y is U diag(v) U' + c 1 1', v = signal lambda + noise, where c is the variance of a normal
    mean: all that depends on the other hyperparameters costs O(n).

    Args:
        prior: of the task.
        x: (point, dim).
        y: (point,).
        mean_variance: prior variance c of the constant mean around theta["mean"].
    """

    def __init__(
        self, prior: KernelPrior, x: Tensor, y: Tensor, mean_variance: float = 0.0
    ) -> None:
        self.prior, self.x, self.y, self.mean_variance = prior, x, y, mean_variance
        self._known: dict[tuple[float, ...], tuple[Tensor, ...]] = {}

    def log_likelihood(self, theta: dict[str, Tensor]) -> Tensor:
        """log p(y | x, theta) (node,), a mean of variance c integrated out."""
        v, z, a = self._whitened(theta)
        a_z, a_a = (a * z / v).sum(-1), (a.square() / v).sum(-1)
        gain = 1 + self.mean_variance * a_a
        square = (z.square() / v).sum(-1) - self.mean_variance * a_z.square() / gain
        log_determinant = v.log().sum(-1) + gain.log()
        return -0.5 * (square + log_determinant + len(self.y) * math.log(2 * math.pi))

    def mean(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance (node,) of the constant mean."""
        v, z, a = self._whitened(theta)
        gain = 1 + self.mean_variance * (a.square() / v).sum(-1)
        shift = self.mean_variance * (a * z / v).sum(-1) / gain
        return theta["mean"] + shift, self.mean_variance / gain

    def predict(
        self, theta: dict[str, Tensor], x_query: Tensor, *, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (node, m) and variance (node, m), or covariance (node, m, m), of f.

        Reference: Rasmussen and Williams, equations 2.25, 2.26 and 2.41 to 2.42.
        """
        nodes, m = len(theta["mean"]), len(x_query)
        mean = x_query.new_empty(nodes, m)
        spread = x_query.new_empty(nodes, m, m) if joint else x_query.new_empty(nodes, m)
        constant, constant_variance = self.mean(theta)
        signal = self.prior.variances(theta)[0].unsqueeze(-1)
        v, z, a = self._whitened(theta)
        z = z - (constant - theta["mean"]).unsqueeze(-1) * a
        for at, shape in self._planes(theta):
            cross = self._kernel(x_query, self.x, shape) @ self._spectrum(shape)[1]
            scale, inverse = signal[at], 1 / v[at]
            mean[at] = constant[at].unsqueeze(-1) + (scale * z[at] * inverse) @ cross.T
            rest = 1 - (scale * a[at] * inverse) @ cross.T  # of the mean, not seen through y
            if joint:
                prior = scale.unsqueeze(-1) * self._kernel(x_query, x_query, shape)
                scaled = (scale * inverse.sqrt()).unsqueeze(-2) * cross
                left = (constant_variance[at].sqrt().unsqueeze(-1) * rest).unsqueeze(-1)
                spread[at] = prior - scaled @ scaled.mT + left @ left.mT
            else:
                prior = scale * self.prior.unit_variance(x_query.unsqueeze(0), shape)
                explained = (scale.square() * inverse) @ cross.square().T
                variance = (prior - explained).clamp_min(JITTER * scale)
                spread[at] = variance + constant_variance[at].unsqueeze(-1) * rest.square()
        return mean, spread

    def _whitened(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Variances v, targets U'(y - mean) and constant U'1, each (node, n)."""
        nodes, n = len(theta["mean"]), len(self.y)
        eigenvalues, y, ones = (self.y.new_empty(nodes, n) for _ in range(3))
        for at, shape in self._planes(theta):
            eigenvalues[at], _, y[at], ones[at] = self._spectrum(shape)
        z = y - theta["mean"].unsqueeze(-1) * ones
        signal, noise = (value.unsqueeze(-1) for value in self.prior.variances(theta))
        return signal * (eigenvalues + JITTER) + noise, z, ones

    def _planes(self, theta: dict[str, Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Nodes that share a unit kernel, and what shapes it, (1,) or (1, dim) each."""
        names = [*self.prior.shaping, *({self.prior.choice} & set(theta))]
        nodes = len(theta["mean"])
        rows = torch.cat([theta[name].reshape(nodes, -1).double() for name in names], 1)
        plane = rows.unique(dim=0, return_inverse=True)[1]
        for at in plane.argsort(stable=True).split(plane.bincount().tolist()):
            yield at, {name: theta[name][at[:1]] for name in names}

    def _kernel(self, x: Tensor, z: Tensor, shape: dict[str, Tensor]) -> Tensor:
        return self.prior.unit_covariance(x.unsqueeze(0), z.unsqueeze(0), shape).squeeze(0)

    def _spectrum(self, shape: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Eigenvalues, eigenvectors U, U'y and U'1 of K."""
        key = tuple(number for value in shape.values() for number in value.flatten().tolist())
        if key not in self._known:
            values, vectors = torch.linalg.eigh(self._kernel(self.x, self.x, shape))
            self._known[key] = (values.clamp_min(0), vectors, vectors.T @ self.y, vectors.sum(0))
        return self._known[key]
