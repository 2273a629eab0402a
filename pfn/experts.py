"""Gaussian-process experts inside the network: kernel regression, solved exactly.

Attention is a kernel smoother. A posterior needs the smoother's inverse, which layers of attention
only approach, slowly where noise is small. So the task token proposes the hyperparameters of a few
Gaussian processes; a learned rule moves them along the slopes of their evidence; and a Cholesky
factorisation solves each of them on the context. What they predict becomes features of the tokens
and the components of the predictive mixture. The rest of the network weighs the experts, and
corrects them where the prior is none of them.

Shapes: b tasks, e experts, g = b e experts of all tasks, n context points, k buffer points, m
queries, d features, w width. Distances and solving are in float64, everything else in the network's
dtype: rounding correlations to float32 moves an answer by some 6e-8 sqrt(n) / noise of its standard
deviation, which matters only where an expert's noise is about `RIDGE`. Start at `Experts`.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from pfn.transformer import TransformerConfig

CACHED = 2**16  # numbers, 512 KiB
AT_ONCE = 2**27  # numbers, 1 GiB, in the matrices of experts that are solved at once
AT_ONCE_CPU = 2**19  # 4 MiB, which its cache holds
REFINED = 2048  # points of larger contexts that hyperparameters are refined on
RIDGE = 1e-5  # least noise and least variance left, relative to an expert's variance; tenfold, what
# the first retry of a Cholesky factorisation adds
# Correlations (1 + p r + q r^2) exp(-s r - t r^2), and slopes in r^2, (u + v r) exp(-s r - t r^2).
# r^2 stays above `NEAR`, as 1 / r has no value at 0, and below `far`, as exp would underflow to
# denormal numbers. Squared exponential, Matern 5/2 and 3/2 of Rasmussen and Williams, Gaussian
# Processes for Machine Learning, equations 4.9 and 4.17; r is sqrt(scale) times a distance over the
# lengthscale.
NEAR = 1e-14
SCALES = {"rbf": 1.0, "matern52": 5.0, "matern32": 3.0, "plane": 1.0}
# Limits of log(d precision). "plane" is "rbf" of lengthscales above five widths of the box: almost
# planes. Most of its variance is that of the offset: noise below a thousandth of the squared rise
# over half a box counts as that, see `RIDGE`.
LOWEST = -12.0
HIGHEST = {"rbf": 9.0, "matern52": 9.0, "matern32": 9.0, "plane": -4.6}
KERNELS = {#              far    p      q    s    t       u       v
           "rbf":      [100.0, 0.0, 0.0, 0.0, 0.5, -1 / 2, 0.0],
           "matern52": [500.0, 1.0, 1 / 3, 1.0, 0.0, -1 / 6, -1 / 6],
           "matern32": [300.0, 1.0, 0.0, 1.0, 0.0, -1 / 2, 0.0],
           "plane":    [100.0, 0.0, 0.0, 0.0, 0.5, -1 / 2, 0.0]}  # fmt: skip
PSEUDO_COUNT = 1.0  # weight of a proposed variance beside the context's residuals, in observations
exporting = ContextVar("exporting", default=False)  # to a graph for all n, see `export.py`
GLOBALS = 3  # hyperparameters besides one lengthscale for each feature: noise, mean, variance
HIDDEN = 48  # units of a refinement
# glibc gives freed memory back to the system, to be fetched anew page by page, beyond twice the
# largest block below 32 MiB that it has mapped and freed. After this one, whose pages nobody
# touches, solving contexts of 200 points takes 0.6 of the time.
torch.empty(31 * 2**20, dtype=torch.uint8)


class Theta(NamedTuple):
    """Hyperparameters of the experts; y in the network's normalised units, x in [-1, 1]^d."""

    experts: int  # e
    kernel: tuple[Tensor, ...]  # columns of `KERNELS`, (g, 1, 1) each, in correlations' dtype
    metric: Tensor  # (g, 1, d) inverse lengthscales, times sqrt(scale)
    noise: Tensor  # (g, 1) variance, relative to that of the function
    mean: Tensor  # (g, 1)
    log_variance: Tensor  # (g, 1) of the function, before the context's residuals scale it

    def each(self, function: Callable[[Tensor], Tensor]) -> Theta:
        """The same with what a function makes of each part (g, ...)."""
        return Theta(self.experts, tuple(map(function, self.kernel)), *map(function, self[2:]))


class Points(NamedTuple):
    """Data as every expert sees them, in float64."""

    x: Tensor  # (g, n, d) in [-1, 1]^d
    y: Tensor  # (g, n)


class Solved(NamedTuple):
    """Experts solved on a context: all that predictions need of it."""

    theta: Theta
    place: Tensor  # (g, n, d) inputs in each expert's metric
    precision: Tensor  # (g, n, n) inverse of correlation + noise
    pull: Tensor  # (g, n) precision times centred y
    log_variance: Tensor  # (g, 1) scaled by the context's residuals
    log_evidence: Tensor  # (g, 1) of the context, in nats

    def each(self, function: Callable[[Tensor], Tensor]) -> Solved:
        """The same with what a function makes of each part (g, ...)."""
        return Solved(self.theta.each(function), *map(function, self[1:]))


class Added(NamedTuple):
    """Buffer points behind a solved context, as further rows of a Cholesky factorisation."""

    place: Tensor  # (g, k, d)
    weights: Tensor  # (g, n, k) of context points in the prediction of each buffer point
    whitener: Tensor  # (g, k, k) inverse of the factor of what the context leaves open
    white: Tensor  # (g, k) one-step-ahead residuals over their standard deviations
    log_diagonal: Tensor  # (g, k) of the factor


class Forecast(NamedTuple):
    """What the experts say at queries."""

    mean: Tensor  # (b, m, e)
    variance: Tensor  # (b, m, e) of the noise-free function
    noise: Tensor  # (b, 1, e) variance
    log_evidence: Tensor  # (b, 1, e) of the context, or (b, m, e) with the buffer points seen

    def of(self, tasks: slice) -> Forecast:
        """That of some of the tasks."""
        return Forecast(*(part[tasks] for part in self))


class Experts(nn.Module):
    """Proposes hyperparameters, refines and solves them, and tells the tokens what came of it.

    Reference for proposals by a network that reads the data: Liu et al., Task-Agnostic Amortized
    Inference of Gaussian Process Hyperparameters, NeurIPS 2020.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, experts, width = config, config.components, config.width
        slots, latent_slots = experts * (config.max_features + GLOBALS), max(config.latent_slots, 1)
        self.norm = nn.LayerNorm(width, bias=False)
        self.propose = nn.Linear(width, 2 * slots)  # starts of the values, log gains of the steps
        self.to_logit = nn.Linear(width, experts)
        self.from_known = nn.Linear(3 * latent_slots, 2 * slots, bias=False)
        self.refinements = nn.ModuleList(Refinement(width) for _ in range(config.refinements))
        self.to_task = nn.Linear(2 * experts + slots, width)
        self.to_latent = nn.Linear(2 * experts + slots, latent_slots * width)
        self.to_context = nn.Linear(2 * experts, width)
        self.to_buffer = nn.Linear(2 * experts, width)
        self.to_query = nn.Linear(2 * experts, width)
        for layer in (self.propose, self.to_logit, self.from_known, self.to_latent):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        with torch.no_grad():  # of each kernel, from far- to near-sighted; noise of 2 %
            start = self.propose.bias[:slots].view(experts, -1)
            start[:, -GLOBALS] = -4.0
            names = kernel_of_each(config.expert_kernels, experts)
            for kernel in set(names):
                mine = [i for i, name in enumerate(names) if name == kernel]
                end = min(2.0, HIGHEST[kernel])
                spread = torch.linspace(end - 4, end, len(mine)).unsqueeze(-1)
                start[mine, : config.max_features] = spread

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
        (b, n, d), e = x.shape, self.config.components
        task = self.norm(task)
        proposed = self.propose(task)
        if known is not None:
            proposed = proposed + self.from_known(known)
        each = proposed.unflatten(-1, (2, e, -1))
        each = torch.cat([each[..., :d], each[..., -GLOBALS:]], -1)  # (b, 2, e, d + GLOBALS)
        values, gain = each[:, 0], each[:, 1].exp()
        move = slopes = torch.zeros_like(values)
        points = few = seen_by_each(e, x, y)
        if not exporting.get() and n > REFINED:
            few = seen_by_each(e, *_some_of(x, y))
        count = len(self.refinements) if exporting.get() else self.config.count_refinements(n)
        for i, refinement in enumerate(itertools.islice(self.refinements, count)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
                now = evidence_slopes(self._theta(values), few)
            now = now.view_as(values).to(values).asinh()
            move = gain * refinement(torch.stack([values, now, slopes, move], -1), task)
            if exporting.get():  # a graph for every n has all refinements
                move = move * self.config.is_refined(i, torch.full((), n))
            values, slopes = values + move, now
        solved = solve(self._theta(values), points)
        summary = torch.cat([solved.log_evidence / (1 + n), solved.log_variance], -1)
        told = torch.cat(
            [
                summary.to(task).asinh().view(b, e, 2),
                values[..., :d],
                values.new_zeros(b, e, self.config.max_features - d),
                values[..., d:],
            ],
            dim=-1,
        )
        return solved, self.to_logit(task).unsqueeze(1), told.flatten(1)

    def _theta(self, values: Tensor) -> Theta:
        return to_theta(values, self.config.expert_kernels)

    def tell_task(self, report: Tensor) -> Tensor:
        """What the task token (b, 1, w) learns: the hyperparameters, and how well they do."""
        return self.to_task(report).unsqueeze(1)

    def tell_latents(self, report: Tensor) -> Tensor:
        """What queries for latents (b, latent_slots, w) learn: the same."""
        return self.to_latent(report).unflatten(-1, (-1, self.to_task.out_features))

    def tell_context(self, solved: Solved) -> Tensor:
        """What context tokens (b, n, w) learn: how well the others predict each."""
        return self.to_context(self._features(*leave_one_out(solved)))

    def tell_buffer(self, log_variance: Tensor, white: Tensor, log_diagonal: Tensor) -> Tensor:
        """What buffer tokens (b, k, w) learn: how well those before them predict each.

        Args:
            log_variance: (g, 1) of the experts; the others (g, k) are those of `Added`.
        """
        half = 0.5 * log_variance
        return self.to_buffer(self._features(white * (-half).exp(), log_diagonal + half))

    def tell_query(self, forecast: Forecast) -> Tensor:
        """What query tokens (b, m, w) learn: the predictions."""
        told = torch.cat([forecast.mean, 0.5 * forecast.variance.log()], -1)
        return self.to_query(told.to(self.norm.weight).asinh())

    def _features(self, *parts: Tensor) -> Tensor:
        """Parts (g, n) as features of tokens (b, n, parts * experts)."""
        told = torch.cat([part.unflatten(0, (-1, self.config.components)) for part in parts], 1)
        return told.mT.to(self.norm.weight).contiguous().asinh()


class Refinement(nn.Module):
    """One learned step from the slopes of the evidence to better hyperparameters.

    All features of all experts follow the same rule, so that it is learned once for all.

    Reference: Andrychowicz et al., Learning to learn by gradient descent by gradient descent,
    NeurIPS 2016, arXiv 1606.04474.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_task = nn.Linear(width, 2 * HIDDEN)
        self.of_shared = nn.Linear(4 + 4 * GLOBALS, 2 * HIDDEN, bias=False)
        self.of_feature = nn.Linear(4, HIDDEN, bias=False)
        self.to_feature = nn.Linear(HIDDEN, 1)
        self.to_globals = nn.Linear(HIDDEN, GLOBALS)
        for last in (*self.to_feature.parameters(), *self.to_globals.parameters()):
            nn.init.zeros_(last)

    def forward(self, known: Tensor, task: Tensor) -> Tensor:
        """The move (b, e, d + GLOBALS) of the unconstrained hyperparameters.

        Args:
            known: (b, e, d + GLOBALS, 4) their values, slopes, last slopes and last move.
            task: (b, w).
        """
        d = known.shape[2] - GLOBALS
        of_features, of_globals = known[:, :, :d], known[:, :, d:]
        shared = torch.cat([of_features.mean(2), of_globals.flatten(2)], -1)
        hidden = self.of_shared(shared) + self.of_task(task).unsqueeze(1)
        for_feature, for_globals = hidden.chunk(2, dim=-1)
        feature = F.gelu(self.of_feature(of_features) + for_feature.unsqueeze(2))
        moves = [self.to_feature(feature).squeeze(-1), self.to_globals(F.gelu(for_globals))]
        return torch.cat(moves, -1)


def to_theta(values: Tensor, kernels: tuple[str, ...]) -> Theta:
    """Hyperparameters from unconstrained values (b, e, d + GLOBALS).

    Those are log(d precision) of each feature, log noise, mean and log variance.

    Args:
        kernels: names in `KERNELS`, each of about an equal part of the experts, in this order.
    """
    b, e, d = *values.shape[:2], values.shape[-1] - GLOBALS
    features, shared = values[..., :d], values[..., d:]
    highest, low, high, scale = _limits(kernels, e, values.dtype, values.device)
    limited = torch.minimum(features, highest).clamp_min(LOWEST)
    metric = (0.5 * limited).exp() * (scale / d).sqrt()
    noise, mean, log_variance = shared.clamp(low, high).flatten(0, 1).split(1, dim=-1)
    kernel = _kernels(kernels, e, values.dtype, values.device).repeat(1, b, 1, 1).unbind()
    return Theta(e, kernel, metric.flatten(0, 1).unsqueeze(1), noise.exp(), mean, log_variance)


def seen_by_each(experts: int, x: Tensor, y: Tensor) -> Points:
    """Data x (b, n, d) of the unit box, y (b, n), once for each expert."""
    each = y.double().unsqueeze(1).expand(-1, experts, -1).flatten(0, 1)
    return Points(inputs_of_each(experts, x), each)


def inputs_of_each(experts: int, x: Tensor) -> Tensor:
    """Inputs (b, n, d) of the unit box as (g, n, d) in [-1, 1]^d."""
    return (2 * x.double() - 1).unsqueeze(1).expand(-1, experts, -1, -1).flatten(0, 1)


def solve(theta: Theta, points: Points) -> Solved:
    """Experts on a context; some after the other where their matrices are large."""
    pieces = list(_pieces(theta, points))
    if len(pieces) == 1:
        return _solve(theta, points)
    (g, n), start, parts = points.y.shape, 0, []
    precision = points.y.new_empty(g, n, n)  # filled, as a copy of it would take as much again
    for piece in pieces:
        part = _solve(*piece)
        precision[start : start + len(part.pull)] = part.precision
        start += len(part.pull)
        parts.append((part.place, *part[3:]))
    place, *rest = (torch.cat(every) for every in zip(*parts, strict=True))
    return Solved(theta, place, precision, *rest)


def _pieces(theta: Theta, points: Points) -> Iterator[tuple[Theta, Points]]:
    """Experts that are solved at once: as many as memory or cache allow, or gradients need."""
    g, n = points.y.shape
    most = AT_ONCE_CPU if points.y.device.type == "cpu" else AT_ONCE
    is_recorded = torch.is_grad_enabled() and (theta.metric.requires_grad or points.y.requires_grad)
    if exporting.get() or is_recorded or g * n * n <= most:
        yield theta, points
        return
    size = max(1, most // (n * n))
    for start in range(0, g, size):
        only = operator.itemgetter(slice(start, start + size))
        yield theta.each(only), Points(*map(only, points))


def _some_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`REFINED` rows of x (b, n, d), y (b, n), chosen by what is in them, whatever their order."""
    weights = torch.arange(2, 2 + x.shape[-1], dtype=torch.float64, device=x.device).sqrt()
    key = 100 * (x.double() @ weights + math.pi * y.double())
    chosen = key.frac().abs().topk(REFINED, dim=1, largest=False).indices
    return x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])), y.gather(1, chosen)


def _solve(theta: Theta, points: Points) -> Solved:
    n, place = points.y.shape[1], theta.metric * points.x
    precision, log_determinant = _apply(_Inverse, correlation(theta, place, place), theta.noise)
    pull, square = _pull(theta, precision, points)
    log_variance = _log_variance(theta, square, n)
    constant = torch.full_like(square, n) * (log_variance + math.log(2 * math.pi))
    log_evidence = -0.5 * (square * (-log_variance).exp() + constant + log_determinant)
    return Solved(theta, place, precision, pull, log_variance, log_evidence)


def evidence_slopes(theta: Theta, points: Points) -> Tensor:
    """Derivatives (g, d + GLOBALS) of the log evidence in the values that `to_theta` takes.

    They hold the variance fixed; in its own place is how far the residuals move its logarithm.

    Reference: Rasmussen and Williams, equation 5.9.
    """
    return torch.cat([_slopes(*part) for part in _pieces(theta, points)])


def _slopes(theta: Theta, points: Points) -> Tensor:
    n, place = points.y.shape[1], theta.metric * points.x
    value, by_distance = _apply(_Correlation, _squared_distance(place, place), theta.kernel, True)
    precision, _ = _apply(_Inverse, value, theta.noise)
    pull, square = _pull(theta, precision, points)
    log_variance = _log_variance(theta, square, n)
    white = pull * (-0.5 * log_variance).exp()
    twice = torch.baddbmm(precision, white.unsqueeze(2), white.unsqueeze(1), beta=-1)  # by matrix
    by_square = twice * by_distance
    moved = by_square.sum(-1, keepdim=True) * place
    slopes = [
        (place * torch.baddbmm(moved, by_square, place, alpha=-1)).sum(1),
        0.5 * theta.noise * twice.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True),
        pull.sum(-1, keepdim=True) * (-log_variance).exp(),
        theta.log_variance - log_variance,
    ]
    return torch.cat(slopes, -1)


def _pull(theta: Theta, precision: Tensor, points: Points) -> tuple[Tensor, Tensor]:
    """Precision times centred y (g, n), and its product with centred y (g, 1)."""
    centred = points.y - theta.mean
    pull = torch.bmm(precision, centred.unsqueeze(2)).squeeze(2)
    return pull, (pull * centred).sum(-1, keepdim=True)


def _log_variance(theta: Theta, square: Tensor, n: int) -> Tensor:
    """The proposed variance times what the residuals say of it, both weighed, (g, 1)."""
    count = torch.full_like(square, n)
    return theta.log_variance + ((PSEUDO_COUNT + square) / (PSEUDO_COUNT + count)).log()


def add(solved: Solved, points: Points) -> Added:
    """Buffer points behind a solved context, in their order."""
    theta, place = solved.theta, solved.theta.metric * points.x
    cross = correlation(theta, solved.place, place).double()
    weights = solved.precision @ cross
    left = correlation(theta, place, place).double() - cross.mT @ weights
    factor = cholesky(left + theta.noise.expand_as(points.y).diag_embed())
    whitener = torch.linalg.solve_triangular(factor, eye(factor), upper=False)
    residual = (points.y - theta.mean).unsqueeze(-1) - cross.mT @ solved.pull.unsqueeze(-1)
    white = (whitener @ residual).squeeze(-1)
    return Added(place, weights, whitener, white, factor.diagonal(dim1=1, dim2=2).log())


def forecast(
    solved: Solved, x_query: Tensor, added: Added | None = None, visible: Tensor | None = None
) -> Forecast:
    """Posterior mean and variance of each expert at x_query (b, m, d).

    Args:
        added: buffer points, of which query j sees the first visible[j].
        visible: (m,) integers.
    """
    theta = solved.theta
    place = theta.metric * inputs_of_each(theta.experts, x_query)
    parts = [_from_context(solved, part) for part in place.split(_tile(solved), dim=1)]
    mean, left = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    log_evidence = solved.log_evidence
    if added is not None:
        assert visible is not None
        order = torch.arange(added.white.shape[-1], device=visible.device)
        seen = (order.unsqueeze(-1) < visible).to(place)  # (k, m)
        more = correlation(theta, added.place, place).double()
        more = more - added.weights.mT @ correlation(theta, solved.place, place).double()
        more = seen * (added.whitener @ more)
        mean = mean + (added.white.unsqueeze(1) @ more).squeeze(1)
        left = left - more.square().sum(1)
        step = added.white.square() * (-solved.log_variance).exp() + solved.log_variance
        step = step + math.log(2 * math.pi)
        log_evidence = log_evidence - (0.5 * step + added.log_diagonal) @ seen
    variance = solved.log_variance.exp()
    every = mean, variance * left.clamp_min(RIDGE), variance * theta.noise, log_evidence
    return Forecast(*(value.unflatten(0, (-1, theta.experts)).mT for value in every))


def _from_context(solved: Solved, place: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and share of variance left (g, m) at places (g, m, d)."""
    cross = correlation(solved.theta, solved.place, place).double()  # (g, n, m)
    mean = solved.theta.mean + torch.bmm(solved.pull.unsqueeze(1), cross).squeeze(1)
    return mean, 1 - (cross * torch.bmm(solved.precision, cross)).sum(1)


def _tile(solved: Solved) -> int:
    """Queries at once: on a CPU as many as its cache holds the correlations of."""
    if solved.pull.device.type != "cpu" or exporting.get():
        return 2**31
    return max(32, CACHED // max(1, solved.pull.numel()))


def leave_one_out(solved: Solved) -> tuple[Tensor, Tensor]:
    """Of each y_i given the other points: residual over standard deviation, and its log, (g, n).

    Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, equation 5.12.
    """
    diagonal = solved.precision.diagonal(dim1=1, dim2=2)
    log_std = 0.5 * (solved.log_variance - diagonal.log())
    return solved.pull / diagonal * (-log_std).exp(), log_std


def correlation(theta: Theta, left: Tensor, right: Tensor) -> Tensor:
    """Correlations (g, n, m) of places (g, n, d) and (g, m, d), in the dtype of the kernel."""
    value: Tensor = _apply(_Correlation, _squared_distance(left, right), theta.kernel, False)[0]
    return value


class _Unrecorded:
    """In place of an autograd context where no gradient is recorded."""

    needs_input_grad = (False,)

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply`, or its forward pass alone where autograd has nothing to record."""
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.forward(_Unrecorded(), *inputs)


class _Correlation(torch.autograd.Function):
    """Correlations at squared distances (g, n, m), and their slopes there where wanted."""

    @staticmethod
    def forward(
        ctx: Any, square: Tensor, kernel: tuple[Tensor, ...], slopes: bool
    ) -> tuple[Tensor, Tensor | None]:
        far, p, q, s, t, u, v = kernel
        square = square.to(far.dtype).clamp_min(NEAR).minimum(far)
        r = square.sqrt()
        decay = (t * square).addcmul_(s, r).neg_().exp_()  # in place: memory is what this costs
        slope = None
        if slopes or ctx.needs_input_grad[0]:
            slope = torch.addcmul(u, v, r).mul_(decay)
            ctx.save_for_backward(r, decay, slope)
            ctx.kernel = kernel
        value = square.mul_(q).addcmul_(p, r).add_(1).mul_(decay)
        return value, slope if slopes else None

    @staticmethod
    @once_differentiable  # the slopes' own slopes are not recorded
    def backward(ctx: Any, grad: Tensor, grad_slope: Tensor | None) -> tuple[Tensor, None, None]:
        r, decay, slope = ctx.saved_tensors
        grad = grad * slope
        if grad_slope is not None:
            _, _, _, s, t, _, v = ctx.kernel
            bend = v * decay - slope * (s + 2 * t * r)
            grad = grad + grad_slope * bend * (0.5 / r)
        return grad.double(), None, None


def _squared_distance(left: Tensor, right: Tensor) -> Tensor:
    """Between places (g, n, d) and (g, m, d), to rounding; (g, n, m)."""
    of_left = left.square().sum(-1, keepdim=True)
    of_right = of_left if left is right else right.square().sum(-1, keepdim=True)
    return torch.baddbmm(of_left + of_right.mT, left, right.mT, alpha=-2)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may meet gradients later
def _kernels(
    kernels: tuple[str, ...], experts: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The columns of `KERNELS` for each expert, (columns, e, 1, 1)."""
    rows = [KERNELS[name] for name in kernel_of_each(kernels, experts)]
    return torch.tensor(rows, dtype=dtype, device=device).T[..., None, None].contiguous()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may meet gradients later
def _limits(
    kernels: tuple[str, ...], experts: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Highest log precisions (e, 1), limits of what features share (GLOBALS,), scales (e, 1)."""
    names = kernel_of_each(kernels, experts)
    of_each = (
        [[HIGHEST[name]] for name in names],
        [math.log(RIDGE), -math.inf, -10.0],
        [5.0, math.inf, 10.0],
        [[SCALES[name]] for name in names],
    )
    return tuple(torch.tensor(part, dtype=dtype, device=device) for part in of_each)


def kernel_of_each(kernels: tuple[str, ...], experts: int) -> list[str]:
    """Equal parts, or about; with fewer experts than kernels, some kernels have none."""
    return [kernels[i * len(kernels) // experts] for i in range(experts)]


class _Inverse(torch.autograd.Function):
    """Inverse (g, n, n) and log determinant (g, 1), in float64, of correlations + noise (g, 1)."""

    @staticmethod
    def forward(ctx: Any, correlations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if exporting.get():
            wide = correlations.double()
            return torch.ops.pfn.spd_inverse(wide + noise.double().unsqueeze(-1) * eye(wide))
        matrix = correlations.to(torch.float64, copy=True)
        matrix.diagonal(dim1=1, dim2=2).add_(noise)
        factor = cholesky(matrix)
        inverse = torch.cholesky_inverse(factor)
        ctx.save_for_backward(inverse)
        ctx.dtypes = correlations.dtype, noise.dtype
        return inverse, 2 * factor.diagonal(dim1=1, dim2=2).log().sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log_determinant: Tensor) -> tuple[Tensor, Tensor]:
        (inverse,) = ctx.saved_tensors
        grad = grad_log_determinant.unsqueeze(-1) * inverse - inverse @ grad @ inverse
        by_noise = grad.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
        return grad.to(ctx.dtypes[0]), by_noise.to(ctx.dtypes[1])


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factors; the diagonal grows for matrices that are not positive definite to rounding."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    ridge = RIDGE
    while bool(failed.any()) and ridge < 1:  # what holds NaN never succeeds
        ridge *= 10
        matrix = matrix + ridge * (failed > 0)[..., None, None] * eye(matrix)
        factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor


def eye(matrix: Tensor) -> Tensor:
    """The identity of the last axis, like the matrix."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
