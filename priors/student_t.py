"""Student-t distributions as torch lacks them: with a cdf, and of whole vectors.

`scale_mixture.py` answers with them where its scale is inverse gamma and all else is known.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributions
from torch.distributions import Chi2, Distribution, constraints

from priors.distributions import invert_cdf


class StudentT(distributions.StudentT):
    """torch's Student-t distribution with its cdf; df, location and scale of any common shape."""

    def cdf(self, value: Tensor) -> Tensor:
        """1 - I_w(df / 2, 1 / 2) / 2 above the location, with w = df / (df + t^2)."""
        t = (value - self.loc) / self.scale
        total = self.df + t.square()
        half = torch.full_like(self.df, 0.5)
        tail = 0.5 * incomplete_beta(self.df / 2, half, self.df / total, t.square() / total)
        return torch.where(t > 0, 1 - tail, tail)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantiles at levels `value` in (0, 1), by bisection below the location, and symmetry."""
        zero, one = torch.zeros_like(self.loc), torch.ones_like(self.loc)
        t = invert_cdf(StudentT(self.df, zero, one), torch.minimum(value, 1 - value))
        return self.loc + self.scale * torch.where(value > 0.5, -t, t)


class MultivariateStudentT(Distribution):
    """A Student-t distribution of vectors: normal ones over the root of one common chi-square.

    Args:
        df: (...), degrees of freedom.
        loc: (..., m).
        scale_tril: (..., m, m) Cholesky factor of the scale matrix S; the covariance is
            df / (df - 2) S where df > 2.
    """

    arg_constraints = {  # noqa: RUF012
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale_tril": constraints.lower_cholesky,
    }
    support = constraints.real_vector

    def __init__(
        self, df: Tensor, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None
    ) -> None:
        shape = torch.broadcast_shapes(df.shape, loc.shape[:-1], scale_tril.shape[:-2])
        self.df, self.loc = df.expand(shape), loc.expand(*shape, -1)
        self.scale_tril = scale_tril.expand(*shape, -1, -1)
        super().__init__(shape, loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc.where(self.df.unsqueeze(-1) > 1, torch.nan)

    @property
    def covariance_matrix(self) -> Tensor:
        """df / (df - 2) S (..., m, m); infinite where df <= 2."""
        factor = (self.df / (self.df - 2)).where(self.df > 2, torch.inf)
        return factor[..., None, None] * (self.scale_tril @ self.scale_tril.mT)

    @property
    def variance(self) -> Tensor:
        factor = (self.df / (self.df - 2)).where(self.df > 2, torch.inf)
        return factor.unsqueeze(-1) * self.scale_tril.square().sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MultivariateStudentT:
        return MultivariateStudentT(
            self.df.expand(batch_shape),
            self.loc.expand(*batch_shape, -1),
            self.scale_tril.expand(*batch_shape, -1, -1),
            validate_args=False,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """The joint log density (...) of value (..., m)."""
        m = self.event_shape[0]
        centred = (value - self.loc).unsqueeze(-1)
        z = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False)
        square = z.squeeze(-1).square().sum(-1)
        log_determinant = 2 * self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return student_t_log_prob(self.df / 2, self.df / 2, square, log_determinant, m)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the normal vector, all coordinates over one root of chi-square / df."""
        shape = self._extended_shape(sample_shape)
        normal = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        root = (Chi2(self.df).sample(torch.Size(sample_shape)) / self.df).sqrt()
        drawn = (self.scale_tril @ normal.unsqueeze(-1)).squeeze(-1)
        return self.loc + drawn / root.unsqueeze(-1)


def student_t_log_prob(
    alpha: Tensor, beta: Tensor, square: Tensor, log_determinant: Tensor, n: int
) -> Tensor:
    """log int Normal(y | 0, s K) InverseGamma(s | alpha, beta) ds, in nats.

    Args:
        square: y' K^-1 y.
        log_determinant: of K.
        n: length of y.

    Reference: Shah, Wilson and Ghahramani, AISTATS 2014, equation 4 with s integrated out.
    """
    return (
        torch.lgamma(alpha + n / 2)
        - torch.lgamma(alpha)
        - 0.5 * (n * math.log(2 * math.pi) + log_determinant)
        + alpha * beta.log()
        - (alpha + n / 2) * (beta + square / 2).log()
    )


def incomplete_beta(a: Tensor, b: Tensor, x: Tensor, rest: Tensor) -> Tensor:
    """The regularised incomplete beta function I_x(a, b), to about 1e-14 in float64.

    Args:
        rest: 1 - x, which keeps its digits where x is close to 1.

    Reference: NIST Digital Library of Mathematical Functions, 8.17.22, evaluated by the method of
    Lentz; 8.17.4 where the continued fraction would converge slowly.
    """
    a, b, x, rest = torch.broadcast_tensors(a, b, x, rest)
    swap = x > (a + 1) / (a + b + 2)
    a, b, x, rest = (u.where(swap, v) for u, v in ((b, a), (a, b), (rest, x), (x, rest)))
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    front = (torch.xlogy(a, x) + torch.xlogy(b, rest) - log_beta).exp() / a
    c, d = torch.ones_like(x), 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for k in range(1, 300):
        even = k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k))
        odd = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            fraction = fraction * d * c
        if bool(((d * c - 1).abs() < 1e-15).all()):
            break
    value = (front * fraction).clamp(0, 1)
    return (1 - value).where(swap, value)
