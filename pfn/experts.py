"""Gaussian-process experts inside the network: kernel regression, solved exactly.

Attention is a kernel smoother. A posterior needs the smoother's inverse, which layers of attention
only approach, slowly where noise is small. So the task token proposes the hyperparameters of a few
Gaussian processes; a learned rule moves them along the slopes of their evidence; and a Cholesky
factorisation solves each of them on the context. What they predict becomes features of the tokens
and the components of the predictive mixture. The rest of the network weighs the experts, and
corrects them where the prior is none of them.

Shapes: b tasks, e experts, n context points, k buffer points, m queries, d features, w width.
Distances and solving are in float64, everything else in the network's dtype: rounding correlations
to float32 moves an answer by some 6e-8 sqrt(n) / noise of its standard deviation, which matters
only where an expert's noise is about `RIDGE`. Start at `Experts`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CACHED = 2**16  # numbers, 512 KiB
RIDGE = 1e-5  # least noise, relative to an expert's variance
NEAR, FAR = 1e-14, 100.0  # squared distances: less is none, more is no correlation (no denormals)
# Correlations (1 + p r + q r^2) exp(-s r - t r^2) at r = sqrt(scale) times the distance; their
# slopes in the squared distance are -(u + v r) exp(-s r - t r^2). Squared exponential, Matern 5/2
# and 3/2: Rasmussen and Williams, Gaussian Processes for Machine Learning, equations 4.9 and 4.17.
#            scale    p    q    s    t      u      v
KERNELS = [[1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0],
           [5.0, 1.0, 1 / 3, 1.0, 0.0, 5 / 6, 5 / 6],
           [3.0, 1.0, 0.0, 1.0, 0.0, 1.5, 0.0]]  # fmt: skip
PSEUDO_COUNT = 1.0  # weight of a proposed variance beside the context's residuals, in observations
GLOBALS = 3  # hyperparameters besides one lengthscale for each feature: noise, mean, variance


class Theta(NamedTuple):
    """Hyperparameters of the experts; y in the network's normalised units, x in [-1, 1]^d."""

    metric: Tensor  # (b, e, 1, d) inverse lengthscales
    noise: Tensor  # (b, e) variance, relative to that of the function
    mean: Tensor  # (b, e)
    log_variance: Tensor  # (b, e) of the function, before the context's residuals scale it


class Solved(NamedTuple):
    """Experts solved on a context: all that predictions need of it."""

    theta: Theta
    place: Tensor  # (b, e, n, d) inputs in each expert's metric
    dtype: torch.dtype  # of correlations
    precision: Tensor  # (b, e, n, n) inverse of correlation + noise
    pull: Tensor  # (b, e, n) precision times centred y
    log_variance: Tensor  # (b, e) scaled by the context's residuals
    log_evidence: Tensor  # (b, e) of the context, in nats


class Added(NamedTuple):
    """Buffer points behind a solved context, as further rows of a Cholesky factorisation."""

    place: Tensor  # (b, e, k, d)
    weights: Tensor  # (b, e, n, k) of context points in the prediction of each buffer point
    whitener: Tensor  # (b, e, k, k) inverse of the factor of what the context leaves open
    white: Tensor  # (b, e, k) one-step-ahead residuals over their standard deviations
    log_diagonal: Tensor  # (b, e, k) of the factor


class Forecast(NamedTuple):
    """What the experts say at queries."""

    mean: Tensor  # (b, m, e)
    variance: Tensor  # (b, m, e) of the noise-free function
    noise: Tensor  # (b, 1, e) variance
    log_evidence: Tensor  # (b, 1, e) of the context, or (b, m, e) with the buffer points seen


class Experts(nn.Module):
    """Proposes hyperparameters, refines and solves them, and tells the tokens what came of it.

    Reference for proposals by a network that reads the data: Liu et al., Task-Agnostic Amortized
    Inference of Gaussian Process Hyperparameters, NeurIPS 2020.
    """

    def __init__(
        self, width: int, experts: int, max_features: int, latent_slots: int, refinements: int
    ) -> None:
        super().__init__()
        self.experts, self.max_features = experts, max_features
        slots, latent_slots = experts * (max_features + GLOBALS), max(latent_slots, 1)
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_start = nn.Linear(width, slots)
        self.to_gain = nn.Linear(width, slots)
        self.to_logit = nn.Linear(width, experts)
        self.from_known = nn.Linear(3 * latent_slots, 2 * slots, bias=False)
        self.refinements = nn.ModuleList(Refinement(width) for _ in range(refinements))
        self.to_task = nn.Linear(2 * experts + slots, width)
        self.to_latent = nn.Linear(2 * experts + slots, latent_slots * width)
        self.to_context = nn.Linear(2 * experts, width)
        self.to_buffer = nn.Linear(2 * experts, width)
        self.to_query = nn.Linear(2 * experts, width)
        for layer in (
            self.to_start,
            self.to_gain,
            self.to_logit,
            self.from_known,
            self.to_latent,
        ):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        with torch.no_grad():  # of each kernel, from far- to near-sighted; noise of 2 %
            start = self.to_start.bias.view(experts, -1)
            start[:, -GLOBALS] = -4.0
            for kind in start.tensor_split(3):
                kind[:, :max_features] = torch.linspace(-2, 2, len(kind)).unsqueeze(-1)

    def solve(
        self, task: Tensor, known: Tensor | None, x: Tensor, y: Tensor
    ) -> tuple[Solved, Tensor, Tensor]:
        """Solves the experts that the task token (b, w) proposes on the context.

        In training, slopes of the evidence enter the rule as given numbers: their use is learned
        without second derivatives, at half the cost.

        Args:
            known: (b, 3 latent_slots) what is known of the latents, if anything.

        Returns:
            The solved experts, logits of each (b, 1, e), and a report of them (b, 2e + slots).
        """
        n, d = x.shape[1:]
        task = self.norm(task)
        start, gain = self.to_start(task), self.to_gain(task)
        if known is not None:
            more_start, more_gain = self.from_known(known).chunk(2, dim=-1)
            start, gain = start + more_start, gain + more_gain
        values, gain = self._slots(start, d), self._slots(gain, d).exp()  # (b, e, d + GLOBALS)
        move = slopes = torch.zeros_like(values)
        for refinement in self.refinements:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
                now = evidence_slopes(to_theta(values), x, y).to(values).asinh()
            move = gain * refinement(values, now, slopes, move, task, n)
            values, slopes = values + move, now
        solved = solve(to_theta(values), x, y)
        summary = torch.cat([solved.log_evidence / (1 + n), solved.log_variance], -1)
        absent = values.new_zeros(*values.shape[:2], self.max_features - d)
        every = torch.cat([values[..., :d], absent, values[..., d:]], -1).flatten(1)
        return (
            solved,
            self.to_logit(task).unsqueeze(1),
            torch.cat([summary.to(task).asinh(), every], -1),
        )

    def tell_task(self, report: Tensor) -> Tensor:
        """What the task token (b, 1, w) learns: the hyperparameters, and how well they do."""
        return self.to_task(report).unsqueeze(1)

    def tell_latents(self, report: Tensor) -> Tensor:
        """What queries for latents (b, latent_slots, w) learn: the same."""
        return self.to_latent(report).unflatten(-1, (-1, self.to_task.out_features))

    def tell_context(self, solved: Solved) -> Tensor:
        """What context tokens (b, n, w) learn: how well the others predict each."""
        return self.to_context(torch.cat(leave_one_out(solved), -1).to(self.norm.weight).asinh())

    def tell_buffer(self, solved: Solved, added: Added) -> Tensor:
        """What buffer tokens (b, k, w) learn: how well those before them predict each."""
        half = 0.5 * solved.log_variance.unsqueeze(-1)
        told = torch.cat([added.white * (-half).exp(), added.log_diagonal + half], 1)
        return self.to_buffer(told.mT.to(self.norm.weight).asinh())

    def tell_query(self, forecast: Forecast) -> Tensor:
        """What query tokens (b, m, w) learn: the predictions."""
        told = torch.cat([forecast.mean, 0.5 * forecast.variance.log()], -1)
        return self.to_query(told.to(self.norm.weight).asinh())

    def _slots(self, flat: Tensor, d: int) -> Tensor:
        """(b, experts * (max_features + GLOBALS)) as (b, experts, d + GLOBALS)."""
        value = flat.unflatten(-1, (self.experts, -1))
        return torch.cat([value[..., :d], value[..., -GLOBALS:]], -1)


class Refinement(nn.Module):
    """One learned step from the slopes of the evidence to better hyperparameters.

    All features of all experts follow the same rule, so that it is learned once for all.

    Reference: Andrychowicz et al., Learning to learn by gradient descent by gradient descent,
    NeurIPS 2016, arXiv 1606.04474.
    """

    def __init__(self, width: int, hidden: int = 48, of_task: int = 12) -> None:
        super().__init__()
        self.of_task = nn.Linear(width, of_task)
        inputs = 4 + 4 * GLOBALS + 2 + of_task
        self.to_feature = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, 1))
        self.to_globals = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, GLOBALS)
        )
        for last in (self.to_feature[-1], self.to_globals[-1]):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        values: Tensor,
        slopes: Tensor,
        last_slopes: Tensor,
        last_move: Tensor,
        task: Tensor,
        n: int,
    ) -> Tensor:
        """The move of the unconstrained hyperparameters, all (b, e, d + GLOBALS); task (b, w)."""
        b, e, d = *values.shape[:2], values.shape[-1] - GLOBALS
        known = torch.stack([values, slopes, last_slopes, last_move], -1)
        of_features, of_globals = known.split([d, GLOBALS], dim=2)
        size = values.new_tensor([math.log1p(n) / 5, math.log(d) / 2]).expand(b, e, 2)
        of_task = self.of_task(task).unsqueeze(1).expand(b, e, -1)
        shared = torch.cat([of_globals.flatten(2), size, of_task], -1)
        each = torch.cat([of_features, shared.unsqueeze(2).expand(b, e, d, -1)], -1)
        together = torch.cat([of_features.mean(2), shared], -1)
        return torch.cat([self.to_feature(each).squeeze(-1), self.to_globals(together)], -1)


def to_theta(values: Tensor) -> Theta:
    """Hyperparameters from unconstrained values (b, e, d + GLOBALS).

    Those are log(d precision) of each feature, log noise, mean and log variance.
    """
    d = values.shape[-1] - GLOBALS
    log_precision, log_noise, mean, log_variance = values.double().split([d, 1, 1, 1], dim=-1)
    return Theta(
        (0.5 * (log_precision.clamp(-12, 9) - math.log(d))).exp().unsqueeze(2),
        log_noise.squeeze(-1).clamp(math.log(RIDGE), 5).exp(),
        mean.squeeze(-1),
        log_variance.squeeze(-1).clamp(-10, 10),
    )


def solve(theta: Theta, x: Tensor, y: Tensor) -> Solved:
    """Experts on a context x (b, n, d), y (b, n)."""
    n, place = x.shape[1], in_metric(theta, x)
    precision, log_determinant = _Inverse.apply(
        correlation(place, place, x.dtype) + _noise(theta, n)
    )
    pull, square = _pull(theta, precision, y)
    log_variance = _log_variance(theta, square, n)
    constant = n * (log_variance + math.log(2 * math.pi))
    log_evidence = -0.5 * (square * (-log_variance).exp() + constant + log_determinant)
    return Solved(theta, place, x.dtype, precision, pull, log_variance, log_evidence)


def evidence_slopes(theta: Theta, x: Tensor, y: Tensor) -> Tensor:
    """Derivatives (b, e, d + GLOBALS) of the log evidence in the values that `to_theta` takes.

    They hold the variance fixed; in its own place is how far the residuals move its logarithm.

    Reference: Rasmussen and Williams, equation 5.9.
    """
    n, place = x.shape[1], in_metric(theta, x)
    square = _squared_distance(place, place).to(x.dtype)
    matrix, by_distance = (value.double() for value in _Correlation.apply(square))
    precision, _ = _Inverse.apply(matrix + _noise(theta, n))
    pull, square = _pull(theta, precision, y)
    log_variance = _log_variance(theta, square, n)
    scaled = pull * (-0.5 * log_variance).exp().unsqueeze(-1)
    by_matrix = 0.5 * (scaled.unsqueeze(-1) * scaled.unsqueeze(-2) - precision)
    by_square = by_matrix * by_distance
    moment = (by_square.sum(-1, keepdim=True) * place.square()).sum(-2)
    by_precision = 2 * (moment - (place * (by_square @ place)).sum(-2))
    by_noise = theta.noise * by_matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    by_mean = pull.sum(-1) * (-log_variance).exp()
    rest = torch.stack([by_noise, by_mean, theta.log_variance - log_variance], -1)
    return torch.cat([by_precision, rest], -1)


def _pull(theta: Theta, precision: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Precision times centred y (b, e, n), and its product with centred y (b, e)."""
    centred = y.double().unsqueeze(1) - theta.mean.unsqueeze(-1)
    pull = (precision @ centred.unsqueeze(-1)).squeeze(-1)
    return pull, (pull * centred).sum(-1)


def _log_variance(theta: Theta, square: Tensor, n: int) -> Tensor:
    """The proposed variance times what the residuals say of it, both weighed, (b, e)."""
    return theta.log_variance + ((PSEUDO_COUNT + square) / (PSEUDO_COUNT + n)).log()


def add(solved: Solved, x: Tensor, y: Tensor) -> Added:
    """Buffer points x (b, k, d), y (b, k) behind a solved context, in their order."""
    theta, k = solved.theta, x.shape[1]
    place = in_metric(theta, x)
    cross = correlation(solved.place, place, solved.dtype)
    weights = solved.precision @ cross
    factor = cholesky(correlation(place, place, x.dtype) + _noise(theta, k) - cross.mT @ weights)
    whitener = torch.linalg.solve_triangular(factor, _eye(k, x.device), upper=False)
    centred = y.double().unsqueeze(1) - theta.mean.unsqueeze(-1)
    residual = centred.unsqueeze(-1) - cross.mT @ solved.pull.unsqueeze(-1)
    white = (whitener @ residual).squeeze(-1)
    return Added(place, weights, whitener, white, factor.diagonal(dim1=-2, dim2=-1).log())


def forecast(
    solved: Solved, x_query: Tensor, added: Added | None = None, visible: Tensor | None = None
) -> Forecast:
    """Posterior mean and variance of each expert at x_query (b, m, d).

    Args:
        added: buffer points, of which query j sees the first visible[j].
        visible: (m,) integers.
    """
    theta, place = solved.theta, in_metric(solved.theta, x_query)
    parts = [_from_context(solved, part) for part in place.split(_tile(solved), dim=2)]
    mean, left = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    log_evidence = solved.log_evidence.unsqueeze(-1)
    if added is not None and visible is not None:
        order = torch.arange(added.white.shape[-1], device=visible.device)
        seen = (order.unsqueeze(-1) < visible).to(place)  # (k, m)
        more = correlation(added.place, place, solved.dtype)
        more = more - added.weights.mT @ correlation(solved.place, place, solved.dtype)
        more = seen * (added.whitener @ more)
        mean = mean + (added.white.unsqueeze(-2) @ more).squeeze(-2)
        left = left - more.square().sum(-2)
        log_variance = solved.log_variance.unsqueeze(-1)
        step = added.white.square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)
        log_evidence = log_evidence - (0.5 * step + added.log_diagonal) @ seen
    variance = solved.log_variance.exp().unsqueeze(-1)
    function, noise = variance * left.clamp_min(RIDGE), variance * theta.noise.unsqueeze(-1)
    return Forecast(mean.mT, function.mT, noise.mT, log_evidence.mT)


def _from_context(solved: Solved, place: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and share of variance left (b, e, m) at places (b, e, m, d)."""
    cross = correlation(solved.place, place, solved.dtype)  # (b, e, n, m)
    mean = solved.theta.mean.unsqueeze(-1) + (solved.pull.unsqueeze(-2) @ cross).squeeze(-2)
    return mean, 1 - (cross * (solved.precision @ cross)).sum(-2)


def _tile(solved: Solved) -> int:
    """Queries at once: on a CPU as many as its cache holds the correlations of."""
    if solved.pull.device.type != "cpu":
        return 2**31
    return max(32, CACHED // max(1, solved.pull.numel()))


def leave_one_out(solved: Solved) -> tuple[Tensor, Tensor]:
    """Of each y_i given the other points: residual over standard deviation, and its log, (b, n, e).

    Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, equation 5.12.
    """
    diagonal = solved.precision.diagonal(dim1=-2, dim2=-1)
    log_std = 0.5 * (solved.log_variance.unsqueeze(-1) - diagonal.log())
    return (solved.pull / diagonal * (-log_std).exp()).mT, log_std.mT


def in_metric(theta: Theta, x: Tensor) -> Tensor:
    """Inputs (b, n, d) of the unit box in each expert's metric, (b, e, n, d)."""
    return theta.metric * (2 * x.double() - 1).unsqueeze(1)


def correlation(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Correlations (b, e, n, m) at (b, e, n, d) and (b, e, m, d), evaluated in `dtype`.

    The first third of the experts is squared exponential, then Matern 5/2, then Matern 3/2.
    """
    value: Tensor = _Correlation.apply(_squared_distance(left, right).to(dtype))[0]
    return value.double()


class _Correlation(torch.autograd.Function):
    """Correlations at squared distances (b, e, n, m), and their slopes there."""

    @staticmethod
    def forward(ctx: Any, square: Tensor) -> tuple[Tensor, Tensor]:
        scale, p, q, s, t, u, v = _kernels(square.shape[1], square.dtype, square.device)
        square = square.clamp(NEAR, FAR).mul_(scale)  # in place, as memory is what this costs
        r = square.sqrt()
        decay = (-s * r).addcmul_(t, square, value=-1).exp_()
        slope = (v * r).add_(u).mul_(decay).neg_()
        value = (q * square).addcmul_(p, r).add_(1).mul_(decay)
        ctx.save_for_backward(r, decay, slope)
        return value, slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_slope: Tensor) -> Tensor:
        r, decay, slope = ctx.saved_tensors
        grad = grad * slope
        if bool(grad_slope.any()):  # slopes feed a gradient outside training only
            scale, _, _, s, t, _, v = _kernels(r.shape[1], r.dtype, r.device)
            bend = -v * decay - slope * (s + 2 * t * r)
            grad = grad + grad_slope * bend * (0.5 * scale / r)
        return grad


@functools.lru_cache(maxsize=64)
def _kernels(experts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The columns of `KERNELS` for each expert, (7, e, 1, 1)."""
    which = torch.arange(experts) * 3 // experts
    return torch.tensor(KERNELS, dtype=dtype)[which].T[..., None, None].to(device)


def _squared_distance(left: Tensor, right: Tensor) -> Tensor:
    square = left.square().sum(-1).unsqueeze(-1) + right.square().sum(-1).unsqueeze(-2)
    return square - 2 * left @ right.mT


class _Inverse(torch.autograd.Function):
    """Inverse and log determinant of symmetric matrices; two products give the gradient."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor = cholesky(matrix)
        inverse = torch.cholesky_inverse(factor)
        ctx.save_for_backward(inverse)
        return inverse, 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_determinant: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return grad_log_determinant[..., None, None] * inverse - inverse @ grad @ inverse


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factors; the diagonal grows for matrices that are not positive definite to rounding."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    ridge = RIDGE
    while bool(failed.any()) and ridge < 1:  # what holds NaN never succeeds
        ridge *= 10
        grown = ridge * (failed > 0)[..., None, None] * _eye(matrix.shape[-1], matrix.device)
        matrix = matrix + grown
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor


def _noise(theta: Theta, n: int) -> Tensor:
    return theta.noise.unsqueeze(-1).expand(-1, -1, n).diag_embed()


def _eye(n: int, device: torch.device) -> Tensor:
    return torch.eye(n, dtype=torch.float64, device=device)
