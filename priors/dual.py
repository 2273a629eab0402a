"""Dual activations: the second moments of an activation under correlated normal inputs.

For a pair (u, v) of centred normals with variances q11, q22 and covariance q12, the dual of an
activation is E[phi(u) phi(v)], and the dual of its slope E[phi'(u) phi'(v)]: all that an infinitely
wide layer does to the covariance of its inputs. By Price's theorem the second is the derivative of
the first with respect to q12. Everything here is elementwise and in the dtype of its arguments,
with finite gradients where u = v. Read `infinite_width.py` next, which stacks layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01  # of torch.nn.LeakyReLU


@dataclass(frozen=True)
class Activation:
    """An activation phi with its moments in closed form.

    Covariances q12 (..., n, m) come with variances q11 (..., n, 1) and q22 (..., 1, m), or in any
    shapes that broadcast to that of q12.
    """

    function: Callable[[Tensor], Tensor]  # phi
    dual: Callable[[Tensor, Tensor, Tensor], Tensor]  # E[phi(u) phi(v)] of (q12, q11, q22)
    slope_dual: Callable[[Tensor, Tensor, Tensor], Tensor]  # E[phi'(u) phi'(v)]
    square: Callable[[Tensor], Tensor]  # E[phi(u)^2] of q11
    slope_square: Callable[[Tensor], Tensor]  # E[phi'(u)^2]


def abrelu(negative: float, positive: float) -> Activation:
    """The piecewise linear activation of slope `negative` below zero and `positive` above.

    With theta the angle between u and v, s = sqrt(q11 q22 - q12^2) and f = (positive - negative)^2
    / (2 pi), the duals are f s + g q12 and g = (positive^2 + negative^2) / 2 - f theta.

    Reference: Cho and Saul, Kernel methods for deep learning, NeurIPS 2009, equation 3 with n = 1;
    Tsuchida, Roosta-Khorasani and Gallagher, ICML 2018, arXiv 1711.09090, for unequal slopes.
    """
    bend = (positive - negative) ** 2 / (2 * math.pi)
    level = (positive**2 + negative**2) / 2

    def dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
        return _BentDual.apply(*_with_deviations(q12, q11, q22), bend, level)

    def slope_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
        return level - bend * _angle(*_with_deviations(q12, q11, q22))[1]

    return Activation(
        function=lambda u: torch.where(u < 0, negative * u, positive * u),
        dual=dual,
        slope_dual=slope_dual,
        square=lambda q: level * q,
        slope_square=lambda q: torch.full_like(q, level),
    )


class _BentDual(torch.autograd.Function):
    """f s + (level - f theta) q12 with its exact gradient, in which all that is singular cancels.

    The derivatives are level - f theta in q12 and f s / d in a standard deviation d; automatic
    differentiation would divide by s, which is zero where u = v.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q12: Tensor, d1: Tensor, d2: Tensor, bend: float, level: float) -> Tensor:
        cosine = (q12 / d1).div_(d2)
        sine = torch.mul(cosine, cosine).neg_().add_(1)
        sine = F.threshold(sine, _rounding(q12), 0.0, inplace=True).sqrt_()
        angle = torch.atan2(sine, cosine)
        unit = angle.mul_(-bend).add_(level).mul_(cosine).add_(sine, alpha=bend)
        return unit.mul_(d1).mul_(d2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *covariance, ctx.bend, ctx.level = inputs
        ctx.save_for_backward(*covariance)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q12, d1, d2 = ctx.saved_tensors
        sine, angle = _angle(q12, d1, d2)
        by_q12 = grads[0] * (ctx.level - ctx.bend * angle)
        shared = grads[0] * ctx.bend * sine
        return by_q12, shared * d2, shared * d1, None, None


def _with_deviations(q12: Tensor, q11: Tensor, q22: Tensor) -> tuple[Tensor, ...]:
    """The covariance and two standard deviations of its shape, positive also at variance 0."""
    tiny = torch.finfo(q12.dtype).tiny
    deviations = (q.clamp_min(tiny).sqrt() for q in (q11, q22))
    return torch.broadcast_tensors(q12, *deviations)


def _angle(q12: Tensor, d1: Tensor, d2: Tensor) -> tuple[Tensor, Tensor]:
    """The sine of the angle between u and v, and the angle in [0, pi].

    Where they coincide both have a zero gradient instead of an infinite one.
    """
    cosine = q12 / d1 / d2
    square = 1 - cosine.square()
    apart = square > _rounding(q12)
    sine = square.where(apart, 1.0).sqrt()
    angle = torch.atan2(sine, cosine)
    aligned = torch.where(q12 < 0, math.pi, 0.0).to(q12.dtype)
    return sine.where(apart, 0.0), angle.where(apart, aligned)


def _rounding(like: Tensor) -> float:
    """What may be left of 1 - cosine^2 between equal points; such angles count as zero.

    Its square root would be an error of 1e-8 in the angle, and of that size in the slope's dual.
    """
    return 64 * torch.finfo(like.dtype).eps


def _erf_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    """2 / pi asin(2 q12 / sqrt((1 + 2 q11) (1 + 2 q22))), as an arc tangent.

    Reference: Williams, Computing with infinite networks, NeurIPS 1996, equation 11.
    """
    return (2 / math.pi) * torch.atan2(2 * q12, _root(q12, q11, q22, 2.0))


def _erf_slope_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    return (4 / math.pi) / _root(q12, q11, q22, 2.0)


def _erf_square(q: Tensor) -> Tensor:
    return (2 / math.pi) * torch.atan2(2 * q, (1 + 4 * q).sqrt())


def _gelu_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    """With P = (1 + q11) (1 + q22) and D = sqrt(P - q12^2): q12 / 4 + [(q12^2 + q11 q22 D^2) /
    (P D) + q12 atan2(q12, D)] / (2 pi).

    Reference: Tsuchida, Pearce, van der Heide, Roosta and Gallagher, Avoiding kernel fixed points,
    AAAI 2021, arXiv 2002.08517, proposition on GELU networks.
    """
    root = _root(q12, q11, q22, 1.0)
    rest = (q12.square() + q11 * q22 * root.square()) / ((1 + q11) * (1 + q22) * root)
    return q12 / 4 + (rest + q12 * torch.atan2(q12, root)) / (2 * math.pi)


def _gelu_slope_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    root = _root(q12, q11, q22, 1.0)
    rest = 1 / root.square() + (1 - q11 * q22) / ((1 + q11) * (1 + q22)) + 1
    return 0.25 + (torch.atan2(q12, root) + rest * q12 / root) / (2 * math.pi)


def _gelu_square(q: Tensor) -> Tensor:
    root = (1 + 2 * q).sqrt()
    return q * (0.25 + (q / ((1 + q) * root) + torch.atan2(q, root) / 2) / math.pi)


def _root(q12: Tensor, q11: Tensor, q22: Tensor, scale: float) -> Tensor:
    """sqrt((1 + scale q11) (1 + scale q22) - (scale q12)^2), at least 1 in exact arithmetic."""
    product = (1 + scale * q11) * (1 + scale * q22)
    return torch.addcmul(product, q12, q12, value=-(scale**2)).clamp_min(1).sqrt()


def _sine_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    """exp(-(q11 + q22) / 2) sinh(q12), with no overflow and all digits of small covariances.

    Reference: the difference of E[cos(u - v)] and E[cos(u + v)] over two; E[cos w] = exp(-Var[w] /
    2) is the characteristic function of a normal.
    """
    sign = torch.where(q12 < 0, -1.0, 1.0).to(q12.dtype)
    size = sign * q12
    return -0.5 * sign * (size - (q11 + q22) / 2).exp() * torch.expm1(-2 * size)


def _sine_slope_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    mean = (q11 + q22) / 2
    return ((q12 - mean).exp() + (-q12 - mean).exp()) / 2


ACTIVATIONS: dict[str, Activation] = {
    "relu": abrelu(0.0, 1.0),
    "leaky-relu": abrelu(LEAKY_SLOPE, 1.0),
    "abs": abrelu(-1.0, 1.0),
    "erf": Activation(
        function=torch.erf,
        dual=_erf_dual,
        slope_dual=_erf_slope_dual,
        square=_erf_square,
        slope_square=lambda q: (4 / math.pi) * (1 + 4 * q).rsqrt(),
    ),
    "gelu": Activation(
        function=F.gelu,
        dual=_gelu_dual,
        slope_dual=_gelu_slope_dual,
        square=_gelu_square,
        slope_square=lambda q: _gelu_slope_dual(q, q, q),
    ),
    "sine": Activation(
        function=torch.sin,
        dual=_sine_dual,
        slope_dual=_sine_slope_dual,
        square=lambda q: -torch.expm1(-2 * q) / 2,
        slope_square=lambda q: (1 + torch.exp(-2 * q)) / 2,
    ),
}
