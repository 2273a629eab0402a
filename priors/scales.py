"""Distributions of positive scales that torch lacks, for `scale_mixture.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all


class BurrXII(Distribution):
    """The Burr XII distribution, of cdf 1 - (1 + s^c)^-d on s > 0: power tails of index c d.

    Args:
        c: positive, the shape near zero, where the density grows as s^(c - 1).
        d: positive; E[s^k] is finite for k < c d.

    Reference: Burr, Cumulative frequency functions, Annals of Mathematical Statistics 1942, type
    XII; as a scale of variances in Lee, Yun, Yang and Lee, ICLR 2022, arXiv 2107.01408.
    """

    arg_constraints = {"c": constraints.positive, "d": constraints.positive}  # noqa: RUF012
    support = constraints.positive
    has_rsample = True

    def __init__(
        self, c: float | Tensor, d: float | Tensor, validate_args: bool | None = None
    ) -> None:
        self.c, self.d = broadcast_all(c, d)
        super().__init__(self.c.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BurrXII:
        """The same distribution with more batch dimensions."""
        return BurrXII(self.c.expand(batch_shape), self.d.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log c + log d + (c - 1) log s - (d + 1) log(1 + s^c)."""
        log_s = value.log()
        log_rest = _softplus(self.c * log_s)
        return self.c.log() + self.d.log() + (self.c - 1) * log_s - (self.d + 1) * log_rest

    def cdf(self, value: Tensor) -> Tensor:
        """The probability of a scale below `value`."""
        return -torch.expm1(-self.d * _softplus(self.c * value.log()))

    def icdf(self, value: Tensor) -> Tensor:
        """The scale below which lies probability `value`: ((1 - u)^(-1/d) - 1)^(1/c)."""
        return torch.expm1(-torch.log1p(-value) / self.d) ** (1 / self.c)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws by inversion."""
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.c.dtype, device=self.c.device)
        return self.icdf(uniform.clamp(1e-12, 1 - torch.finfo(self.c.dtype).eps))

    def raw_moment(self, k: int) -> Tensor:
        """E[s^k] = d B(d - k/c, 1 + k/c); infinite from k = c d on."""
        a, b = self.d - k / self.c, 1 + k / self.c
        value = self.d * (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)).exp()
        return torch.where(a > 0, value, torch.inf)

    @property
    def mean(self) -> Tensor:
        return self.raw_moment(1)

    @property
    def variance(self) -> Tensor:
        square = self.mean.square().nan_to_num(posinf=0.0)  # infinite: inf - 0, not inf - inf
        return self.raw_moment(2) - square


def _softplus(value: Tensor) -> Tensor:
    """log(1 + exp(value)) to the last digit, which torch's own rounds off from 20 on."""
    return torch.logaddexp(value, torch.zeros_like(value))
