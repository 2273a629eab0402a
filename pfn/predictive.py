"""The predictive distribution: a mixture of normals, from which every answer is derived.

The network's head, the training loss (-log_prob), intervals, samples and acquisition values all
come from the same (weights, means, standard deviations), so they agree, tails included. Arithmetic
is in float64 whatever the parameters' dtype; answers come out in theirs. Everything is
differentiable once in the parameters, hence in the query.

Read next: `model.py`, which makes these from a context and a query.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.types import _size

from pfn.mixture import SQRT_2PI, log_improvement, mixture_log_prob, normal_cdf
from priors.context import to_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

EPS, TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
# Between these multiples of each component's standard deviation, `entropy` integrates piecewise
# with this many Gauss-Legendre nodes, so that narrow components in broad ones are resolved.
PIECES = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0)
NODES, NODE_WEIGHTS = (part.tolist() for part in np.polynomial.legendre.leggauss(6))


class Predictive(Distribution):
    """The mixture q(y) = sum_k w_k Normal(y; m_k, s_k^2), one for each element of the batch.

    Args:
        log_weights: (..., components); normalised here, -inf switches a component off.
        means: (..., components), in the units of y.
        stds: (..., components), positive, in the units of y.
            The three broadcast; what precedes `components` is the batch_shape.

    Raises:
        ValueError: shapes that do not broadcast, NaN or infinity, or a std that is not positive.

    Example:
        >>> q = Predictive(torch.tensor([0.3, 0.7]).log(), torch.tensor([-1.0, 1.0]), torch.ones(2))
        >>> q.mean, q.interval(0.9)
        (tensor(0.4000), (tensor(-1.9809), tensor(2.4661)))
    """

    arg_constraints = {  # noqa: RUF012
        "log_weights": constraints.real,
        "means": constraints.real,
        "stds": constraints.positive,
    }
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        log_weights: Tensor,
        means: Tensor,
        stds: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        parameters = (log_weights, means, stds)
        try:
            every = torch.broadcast_tensors(*parameters)
        except RuntimeError:
            every = (torch.empty(0),)
        shape = every[0].shape
        if not shape or not shape[-1]:
            shapes = tuple(tuple(part.shape) for part in parameters)
            raise ValueError(
                "Expected log_weights, means and stds that broadcast to (..., components) with at "
                f"least one component; got shapes {shapes}."
            )
        self._dtype = reduce(torch.promote_types, (p.dtype for p in parameters))
        if not self._dtype.is_floating_point:
            raise ValueError(f"Expected floating-point parameters; got {self._dtype}.")
        self.log_weights, self.means, self.stds = (part.to(self._dtype) for part in every)
        self._log_w = self.log_weights.double().log_softmax(-1)
        self._m, self._s = self.means.double(), self.stds.double()
        super().__init__(shape[:-1], validate_args=False)
        default = Distribution._validate_args
        self._validate_args = default if validate_args is None else validate_args
        if self._validate_args:
            self._check_parameters()

    def __repr__(self) -> str:
        batch, components = tuple(self.batch_shape), self.means.shape[-1]
        return f"Predictive(batch_shape={batch}, components={components}, dtype={self._dtype})"

    def __getitem__(self, index: Any) -> Predictive:
        """The predictives at an index of the batch: `posterior[0]` is the first task or query."""
        where = (*index, slice(None)) if isinstance(index, tuple) else (index, slice(None))
        return self._with(self.log_weights[where], self.means[where], self.stds[where])

    def expand(self, batch_shape: _size, _instance: Any = None) -> Predictive:
        """The same predictives with batch dimensions added or expanded, sharing memory."""
        shape = (*batch_shape, self.means.shape[-1])
        return self._with(
            self.log_weights.expand(shape), self.means.expand(shape), self.stds.expand(shape)
        )

    def reshape(self, *batch_shape: int) -> Predictive:
        """The same predictives in a batch of another shape, with as many elements."""
        parts = (self.log_weights, self.means, self.stds)
        return self._with(*(part.reshape(*batch_shape, part.shape[-1]) for part in parts))

    def affine(self, loc: float | Tensor, scale: float | Tensor) -> Predictive:
        """The predictive of loc + scale * y.

        Args:
            loc, scale: numbers, or tensors that broadcast with batch_shape; scale > 0. Tensors of
                a wider dtype than the parameters' give a predictive of that dtype.
        """
        given = [part.dtype for part in (loc, scale) if isinstance(part, Tensor)]
        dtype = reduce(torch.promote_types, given, self._dtype)
        loc, scale = self._double(loc).unsqueeze(-1), self._double(scale).unsqueeze(-1)
        if not (scale > 0).all():
            raise ValueError(f"Expected a positive scale; got {scale.min().item()}.")
        means, stds = loc + scale * self._m, scale * self._s
        return self._with(self.log_weights, means.to(dtype), stds.to(dtype))

    # Moments and mode

    @property
    def mean(self) -> Tensor:
        return self._out(self._mean())

    @property
    def variance(self) -> Tensor:
        """sum_k w_k (s_k^2 + (m_k - mean)^2), which cannot cancel."""
        return self._out(self._variance())

    @property
    def stddev(self) -> Tensor:
        return self._out(self._variance().sqrt())

    @property
    def mode(self) -> Tensor:
        """Where the density is highest, to about half the float width (the density is flat there).

        Newton and mean-shift steps, whichever climbs higher, start from every component's mean and
        from between neighbouring means; the best end wins.
        """
        with torch.no_grad():
            ordered = self._m.sort(-1).values
            y = torch.cat([ordered, (ordered[..., 1:] + ordered[..., :-1]) / 2], -1)
            each = self._with_axis()  # (..., 1): one batch element for all its starts
            for _ in range(10):
                score, pull, curvature = each._slopes(y)
                newton = torch.where(curvature > 0, y + score / curvature, y)
                steps = torch.stack([y, y + score / pull, newton])
                y = _at_best(steps, each._log_q(steps), dim=0)
            y = _at_best(y, each._log_q(y), dim=-1)
        score, pull, curvature = self._slopes(y)
        curvature = torch.where(curvature > 0, curvature, pull).detach()
        return self._out(y + (score - score.detach()) / curvature)  # a Newton step's gradient

    # Densities and probabilities

    def log_prob(self, value: ArrayLike | Tensor) -> Tensor:
        """log q(value), never below the most negative float of the dtype."""
        return self._out_log(self._log_q(self._checked(value)))

    def cdf(self, value: ArrayLike | Tensor) -> Tensor:
        """P(y <= value); for a precise upper tail see `probability_of_improvement`."""
        return self._out(self._tail(self._checked(value)).clamp_max(1))

    def icdf(self, value: ArrayLike | Tensor) -> Tensor:
        """The y at which cdf(y) = value, to float width; -inf at 0, inf at 1.

        The answer lies between the components' quantiles; Newton steps on the logarithm of the
        nearer tail, replaced by bisection where they leave the bracket or fail to halve.

        Args:
            value: probabilities in [0, 1] that broadcast with batch_shape; (q, 1) gives (q, m).

        Raises:
            ValueError: a probability outside [0, 1].
        """
        p = self._checked(value)
        if not ((p >= 0) & (p <= 1)).all():
            raise ValueError(f"Expected probabilities in [0, 1]; got {_outside(p)}.")
        inner = torch.where((p == 0) | (p == 1), 0.5, p)
        y = self._implicit(self._solve(inner.detach()), inner)
        y = torch.where(p == 0, -torch.inf, torch.where(p == 1, torch.inf, y))
        return self._out(y)

    quantile = icdf

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """The equal-tailed interval (lower, upper) with `mass` of the probability, in (0, 1)."""
        if not 0 < mass < 1:
            raise ValueError(f"Expected an interval's mass between 0 and 1; got {mass}.")
        tail = (1 - mass) / 2
        return self.icdf(tail), self.icdf(1 - tail)

    def sample(
        self,
        sample_shape: _size = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws of shape sample_shape + batch_shape, without gradient."""
        return self._out(self._draw(sample_shape, generator))

    def rsample(
        self,
        sample_shape: _size = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The same draws as `sample`, with gradients in weights, means and standard deviations.

        At fixed F(y; theta), dy/dtheta = -(dF/dtheta) / q(y). First derivatives only.

        Reference: Figurnov et al., Implicit Reparameterization Gradients, NeurIPS 2018,
            arXiv 1805.08498.
        """
        return self._out(self._implicit(self._draw(sample_shape, generator)))

    def entropy(self) -> Tensor:
        """-E[log q(y)] in nats by piecewise Gauss-Legendre quadrature, to 1e-5."""
        multiples = torch.tensor(PIECES, dtype=torch.float64, device=self._m.device)
        cuts = (self._m.unsqueeze(-1) + self._s.unsqueeze(-1) * multiples).detach()
        cuts = cuts.flatten(-2).sort(-1).values
        half = (cuts[..., 1:] - cuts[..., :-1]) / 2
        each = self._with_axis()
        unit = self._variance().sqrt().log().detach()  # of y: makes the error free of its scale
        entropy = unit
        for node, weight in zip(NODES, NODE_WEIGHTS, strict=True):
            log_q = each._log_q(cuts[..., :-1] + half * (1 + node))
            surprise = -(log_q + unit.unsqueeze(-1))
            entropy = entropy + (weight * half * log_q.exp() * surprise).sum(-1)
        return self._out(entropy)

    def crps(self, value: ArrayLike | Tensor) -> Tensor:
        """The continuous ranked probability score E|y - value| - E|y - y'| / 2, lower is better.

        Reference: Grimit et al., The continuous ranked probability score for circular variables,
        2006, eq. 5 (for mixtures of normals).
        """
        w = self._log_w.exp()
        to_value = _mean_absolute(self._checked(value).unsqueeze(-1) - self._m, self._s)
        apart = _mean_absolute(
            self._m.unsqueeze(-1) - self._m.unsqueeze(-2),
            torch.hypot(self._s.unsqueeze(-1), self._s.unsqueeze(-2)),
        )
        spread = (w.unsqueeze(-1) * w.unsqueeze(-2) * apart).sum((-2, -1))
        return self._out((w * to_value).sum(-1) - spread / 2)

    # Acquisition: larger is better, whether y is maximised or minimised

    def expected_improvement(self, best: float | Tensor, *, maximize: bool = True) -> Tensor:
        """E[max(y - best, 0)], or E[max(best - y, 0)] when minimising, in the units of y.

        Args:
            best: the incumbent, in the units of y; broadcasts with batch_shape.
        """
        return self._out(self._log_improvement(best, maximize).exp())

    def log_expected_improvement(self, best: float | Tensor, *, maximize: bool = True) -> Tensor:
        """log of `expected_improvement`, finite with finite gradients however far `best` is."""
        return self._out_log(self._log_improvement(best, maximize))

    def probability_of_improvement(self, best: float | Tensor, *, maximize: bool = True) -> Tensor:
        """P(y > best), or P(y < best) when minimising."""
        return self._out(self._tail(self._checked(best), -1.0 if maximize else 1.0).clamp_max(1))

    def upper_confidence_bound(self, beta: float = 4.0, *, maximize: bool = True) -> Tensor:
        """mean + sqrt(beta) stddev, or -mean + sqrt(beta) stddev when minimising.

        Args:
            beta: BoTorch's beta, not negative: the squared number of standard deviations.
        """
        if not beta >= 0:
            raise ValueError(f"Expected beta >= 0; got {beta}.")
        mean = self._mean() if maximize else -self._mean()
        return self._out(mean + math.sqrt(beta) * self._variance().sqrt())

    def plot(
        self,
        x_query: ArrayLike | Tensor,
        context: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """The Axes with mean, 50 % and 90 % intervals and the context's points; d = 1 only.

        Args:
            x_query: (m,) or (m, 1), what this predictive of batch_shape (m,) was asked at.
            context: (x, y), the observations it was conditioned on.
            ax: where to draw; a new figure by default.

        Raises:
            ValueError: more than one feature, or shapes that do not match.
        """
        from pfn.plot import plot_predictive

        return plot_predictive(self, x_query, context, ax)

    # Helpers, all in float64

    def _with(self, log_weights: Tensor, means: Tensor, stds: Tensor) -> Predictive:
        return Predictive(log_weights, means, stds, validate_args=False)

    def _check_parameters(self) -> None:
        total = (self._m + self._s).sum().item() + self._log_w.exp().sum().item()
        if math.isfinite(total) and (self._s > 0).all():  # a sum may overflow where all are finite
            return
        for expected, sound in (
            ("finite means", self._m.isfinite()),
            ("finite, positive stds", self._s.isfinite() & (self._s > 0)),
            ("log_weights below inf, not all -inf", ~self._log_w.isnan()),
        ):
            if not sound.all():
                raise ValueError(
                    f"Expected {expected}; got {int((~sound).sum())} of {sound.numel()} components"
                    " otherwise."
                )

    def _with_axis(self) -> Predictive:
        """A trailing batch dimension of size 1, against which many points per element broadcast."""
        return self[..., None]

    def _double(self, value: ArrayLike | Tensor) -> Tensor:
        return to_tensor(value, "values").to(self._m.device, torch.float64)

    def _checked(self, value: ArrayLike | Tensor) -> Tensor:
        y = self._double(value)
        if self._validate_args:
            self._validate_sample(y)
        return y

    def _out(self, answer: Tensor) -> Tensor:
        return answer.to(self._dtype)

    def _out_log(self, answer: Tensor) -> Tensor:
        return self._out(answer.clamp_min(torch.finfo(self._dtype).min))

    def _log_q(self, y: Tensor) -> Tensor:
        return mixture_log_prob(self._log_w, self._m, self._s.log(), y)

    def _tail(self, y: Tensor, side: float | Tensor = 1.0) -> Tensor:
        """P(Y <= y) where side is 1, P(Y > y) where it is -1."""
        z = (y.unsqueeze(-1) - self._m) / self._s
        side = torch.as_tensor(side, device=z.device).unsqueeze(-1)
        return (self._log_w.exp() * normal_cdf(side * z)).sum(-1)

    def _centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first mean (..., 1), all means' distances to it, and their weighted mean (..., 1).

        So a large common offset costs no digits.
        """
        base = self._m[..., :1]
        deviation = self._m - base
        return base, deviation, (self._log_w.exp() * deviation).sum(-1, keepdim=True)

    def _mean(self) -> Tensor:
        base, _, shift = self._centred()
        return (base + shift).squeeze(-1)

    def _variance(self) -> Tensor:
        _, deviation, shift = self._centred()
        spread = self._s.square() + (deviation - shift).square()
        return (self._log_w.exp() * spread).sum(-1)

    def _slopes(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The score d log q / dy, the mean precision, and the curvature -d^2 log q / dy^2."""
        precision = self._s.pow(-2)
        toward = (self._m - y.unsqueeze(-1)) * precision
        share = (self._log_w - self._s.log() - 0.5 * toward.square() / precision).softmax(-1)
        score, pull = (share * toward).sum(-1), (share * precision).sum(-1)
        spread = (share * (toward - score.unsqueeze(-1)).square()).sum(-1)
        return score, pull, pull - spread

    def _draw(self, sample_shape: _size, generator: torch.Generator | None) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        device = self._m.device if generator is None else generator.device
        uniform = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
        normal = torch.randn(shape, dtype=torch.float64, device=device, generator=generator)
        with torch.no_grad():
            below = self._log_w.exp().cumsum(-1)[..., :-1]
            chosen = (uniform.to(below.device).unsqueeze(-1) >= below).sum(-1, keepdim=True)
            mean, std = (
                part.expand(*shape, -1).gather(-1, chosen).squeeze(-1)
                for part in (self._m, self._s)
            )
            return mean + std * normal.to(mean.device)

    def _implicit(self, y: Tensor, p: Tensor | None = None) -> Tensor:
        """The values y, with the gradients of the root of F(y; theta) = p, from the nearer tail."""
        if not torch.is_grad_enabled():
            return y
        with torch.no_grad():
            side = torch.where(self._tail(y) <= 0.5, 1.0, -1.0)
            # Between remote components the density is 0, yet gradients shall be finite.
            density = torch.maximum(self._log_q(y).exp(), 1e-100 * self._tail(y, side)) + TINY
        excess = side * self._tail(y, side)
        if p is not None:
            excess = excess - p
        return y - (excess - excess.detach()) / density

    @torch.no_grad()
    def _solve(self, p: Tensor) -> Tensor:
        """Quantiles at p in (0, 1), by safeguarded Newton steps on the log of the nearer tail."""
        quantiles = self._m + self._s * torch.special.ndtri(p).unsqueeze(-1)
        lower, upper = quantiles.amin(-1), quantiles.amax(-1)
        y = (self._log_w.exp() * quantiles).sum(-1).clamp(lower, upper)
        return self._refine(p.expand_as(y), y, lower, upper, upper - lower)

    def _refine(self, p: Tensor, y: Tensor, lower: Tensor, upper: Tensor, move: Tensor) -> Tensor:
        """Quantiles, from guesses y between bounds and the last moves of y, all of p's shape."""
        side = torch.where(p <= 0.5, 1.0, -1.0)
        target = torch.where(p <= 0.5, p, 1 - p)
        done = torch.zeros_like(y, dtype=torch.bool)
        for _ in range(200):
            tail = self._tail(y, side)
            error = side * (tail / target).log()  # increases with y
            lower, upper = torch.where(error < 0, y, lower), torch.where(error < 0, upper, y)
            newton = y - error * tail / self._log_q(y).exp()
            trusted = (newton > lower) & (newton < upper) & ((newton - y).abs() < move / 2)
            # From 1e-12 one Newton step reaches float width; more would only follow rounding.
            settled = error.abs() < 1e-12
            new = torch.where(settled, y, lower + (upper - lower) / 2)
            new = torch.where(trusted, newton, new)
            move = (new - y).abs()
            y = torch.where(done, y, new)
            done |= settled | (move <= EPS * new.abs())
            left = ~done
            if 2 * int(left.sum()) < done.numel():  # these go on alone
                if left.any():
                    rest = (v[left] for v in (p, y, lower, upper, move))
                    y[left] = self._at(left)._refine(*rest)
                break
        return y

    def _at(self, chosen: Tensor) -> Predictive:
        """The mixtures (k,) where a mask of a shape that the batch broadcasts to is true."""
        parts = (self._log_w, self._m, self._s)
        return Predictive(
            *(part.expand(*chosen.shape, -1)[chosen] for part in parts), validate_args=False
        )

    def _log_improvement(self, best: float | Tensor, maximize: bool) -> Tensor:
        sign = 1.0 if maximize else -1.0
        z = sign * (self._m - self._checked(best).unsqueeze(-1)) / self._s
        return torch.logsumexp(self._log_w + self._s.log() + log_improvement(z), dim=-1)


def _mean_absolute(mean: Tensor, std: Tensor) -> Tensor:
    """E|y| for y ~ Normal(mean, std^2)."""
    z = mean / std
    return 2 * std * (-0.5 * z.square()).exp() / SQRT_2PI + mean * torch.erf(z / math.sqrt(2))


def _at_best(values: Tensor, scores: Tensor, dim: int) -> Tensor:
    """The value with the highest score along `dim`."""
    return values.gather(dim, scores.argmax(dim, keepdim=True)).squeeze(dim)


def _outside(p: Tensor) -> float:
    """One of the offending probabilities, for the message."""
    return p[~((p >= 0) & (p <= 1))].flatten()[0].item()
