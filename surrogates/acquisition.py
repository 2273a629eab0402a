"""Where to look next: a surrogate's acquisition, maximised over the valid points of a space.

One objective: the logarithm of the expected improvement, of the mean and variance of a posterior,
or of the network's own predictive, whose tails are heavy: there a limit keeps gains that are great
and improbable from leading the search into corners. Constraints multiply it by the probability that
they hold. Several objectives: the logarithm of the expected hypervolume improvement, of the same
predictives. Points without an answer yet are fantasised. Everything is maximised, and a constraint
holds at values <= 0, as in Optuna. `sampler.py` calls `suggest` once per trial.

Reference: Ament et al., Unexpected Improvements to Expected Improvement, NeurIPS 2023, arXiv
2310.20708; Gardner et al., Bayesian Optimization with Inequality Constraints, ICML 2014.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from botorch.models.model import Model
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.box_decompositions.non_dominated import (
    FastNondominatedPartitioning,
)
from botorch.utils.multi_objective.pareto import is_non_dominated
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from pfn import Predictive
from surrogates.beliefs import Belief
from surrogates.draws import FewDraws
from surrogates.prior_fitted import PriorFitted
from surrogates.spaces import Space

Acquisition = Callable[[Tensor], Tensor]  # (n, dim) to (n,), a logarithm

FANTASIES = 8  # draws of the points without an answer
SCALES = (0.2, 0.05, 0.0125, 0.003)  # of perturbed incumbents, sides of the unit cube
STARTS = 8  # candidates that are improved
EVALUATIONS = 20  # of the acquisition and its gradient, in a round
ROUNDS = 2  # of gradients and neighbours in turn
CHUNK = 2048  # candidates in a batch
LEAST_VARIANCE = 1e-18  # of a normal predictive
GAIN = 0.3  # standard deviations of an objective's values: what a step may gain, at most
SAME = 1e-6  # points nearer than this, in every column, are one point


def suggest(
    model: Model,
    X: Tensor,
    Y: Tensor,
    space: Space,
    *,
    constraints: int = 0,
    pending: Tensor | None = None,
    known: Tensor | None = None,
    fixed: Mapping[str, Any] | None = None,
    belief: Belief | None = None,
    num_candidates: int = 1024,
    seed: int = 0,
) -> Tensor:
    """The valid point (dim,) of `space` with the largest acquisition that is none of the known.

    Args:
        model: of Y, for maximization; a `ModelList` where Y has several columns.
        X: (n, dim) evaluated points, n >= 1.
        Y: (n, m) their outcomes: objectives, then constraints.
        constraints: how many of Y's columns are constraints, which hold at values <= 0.
        pending: (k, dim) points without an answer, which are fantasised.
        known: (j, dim) points not to be suggested, by default X and `pending`. If all candidates
            are known, random points are tried; if the space is exhausted, one comes back again.
        fixed: values of parameters that are not free.
        belief: where the user thinks the optimum is.
        num_candidates: from the whole space; half as many lie around the incumbents.
        seed: of candidates and Monte Carlo draws.

    Reference: alternating over mixed spaces as in Daulton et al., Bayesian Optimization over
    Discrete and Mixed Spaces via Probabilistic Reparameterization, NeurIPS 2022, appendix.
    """
    if known is None:
        known = X if pending is None else torch.cat([X, pending])
    with warnings.catch_warnings():
        # where points are close
        warnings.filterwarnings("ignore", message="A not p.d., added jitter")
        warnings.simplefilter("ignore", FewDraws)  # of fantasies
        acquisition = make_acquisition(
            model, X, Y, constraints=constraints, pending=pending, seed=seed
        )
        if belief is not None:
            acquisition = belief.weigh(acquisition, len(X))
        return maximize_acquisition(
            acquisition,
            space,
            incumbents(X, Y, constraints),
            known=known,
            fixed=fixed,
            belief=belief,
            num_candidates=num_candidates,
            seed=seed,
        )


def make_acquisition(
    model: Model,
    X: Tensor,
    Y: Tensor,
    *,
    constraints: int = 0,
    pending: Tensor | None = None,
    seed: int = 0,
) -> Acquisition:
    """The logarithm of the expected improvement, or of its hypervolume, as a function of points.

    The incumbent is the largest posterior mean among the evaluated points that meet the
    constraints, not the largest noisy observation; while no evaluated point meets them, only the
    probability of meeting them counts. For the network and one objective it is the larger of the
    two: the network takes part of a rugged objective for noise, and over a smoothed incumbent the
    nearest neighbours of it would for ever seem to improve.
    """
    if pending is not None and not len(pending):
        pending = None
    if Y.shape[1] - constraints > 1:
        return _hypervolume(model, X, Y, constraints, pending, seed)
    models = [model.subset_output([i]) for i in range(Y.shape[1])] if Y.shape[1] > 1 else [model]
    if pending is not None:
        models = [_fantasize(part, pending, seed + i) for i, part in enumerate(models)]
    objective, limits = models[0], models[1:]
    seen = X if pending is None else torch.cat([X, pending])
    most = GAIN * Y[:, 0].std() if isinstance(objective, PriorFitted) and len(Y) > 1 else None
    with torch.no_grad():
        means = torch.stack([_moments(part, seen)[0] for part in models], -1)  # (n, ..., m)
    feasible = _are_feasible(Y, means, constraints)
    some_feasible = bool(feasible[: len(X)].any())
    best = means[..., 0].masked_fill(~feasible, -math.inf).amax(0)  # (fantasy,) or ()
    if isinstance(objective, PriorFitted) and some_feasible:
        best = best.maximum(Y[feasible[: len(X)].reshape(len(X), -1)[:, 0], 0].max())

    def value(points: Tensor) -> Tensor:
        total = torch.zeros(len(points), *best.shape, dtype=points.dtype)
        if some_feasible:
            total = total + _log_improvement(objective, points, best, most)
        for limit in limits:
            total = total + _log_feasibility(limit, points)
        return total.logsumexp(-1) - math.log(total.shape[-1]) if best.dim() else total

    return value


def _are_feasible(Y: Tensor, means: Tensor, constraints: int) -> Tensor:
    """Whether points (n + k,) or (n + k, fantasy) meet the constraints, the last of m columns.

    The first n by their outcomes Y (n, m), those without an answer by their means (n + k, ..., m).
    """
    n, first = len(Y), Y.shape[1] - constraints
    expected = (means[..., first:] <= 0).all(-1)
    observed = (Y[:, first:] <= 0).all(-1).reshape(n, *[1] * (expected.dim() - 1))
    return torch.cat([observed.expand_as(expected[:n]), expected[n:]])


def incumbents(X: Tensor, Y: Tensor, constraints: int = 0) -> Tensor:
    """The points (k, dim) to search around: the best three, or those on the Pareto front.

    While no point meets the constraints, those that violate them least.
    """
    values, limits = Y.split([Y.shape[1] - constraints, constraints], -1)
    violation = limits.clamp_min(0.0).sum(-1)
    if not bool((violation <= 0).any()):
        return X[violation.argsort()[:3]]
    X, values = X[violation <= 0], values[violation <= 0]
    if values.shape[1] == 1:
        return X[values[:, 0].argsort(descending=True, stable=True)[:3]]
    return X[is_non_dominated(values)]


def maximize_acquisition(
    acquisition: Acquisition,
    space: Space,
    incumbents: Tensor,
    *,
    known: Tensor,
    fixed: Mapping[str, Any] | None = None,
    belief: Belief | None = None,
    num_candidates: int = 1024,
    seed: int = 0,
) -> Tensor:
    """The point (dim,) that `suggest` describes.

    Scrambled Sobol points and perturbed incumbents, all valid, are compared in one batch. The best
    are improved, in turn, by gradients in their continuous columns, all at once, and by their
    neighbours in the discrete ones. A space of few points is compared as a whole.
    """
    generator = torch.Generator().manual_seed(seed)
    hold, free = hold_fixed(space, fixed or {})
    if space.size <= num_candidates:
        candidates = hold(space.enumerate()).unique(dim=0)
    else:
        draws = [space.sobol(num_candidates, seed=seed)]
        if belief is not None:
            draws.append(belief.sobol(num_candidates // 2, seed=seed + 1))
        draws.append(_perturb(space, incumbents, num_candidates // 2, generator))
        candidates = hold(torch.cat(draws))
    values = _evaluate(acquisition, candidates)
    if space.size > num_candidates:
        starts = candidates[values.argsort(descending=True, stable=True)[:STARTS]]
        near = hold(_perturb(space, starts, num_candidates // 4, generator))
        pool, pool_values = [candidates, near], [values, _evaluate(acquisition, near)]
        both, both_values = torch.cat(pool), torch.cat(pool_values)
        x = both[both_values.argsort(descending=True, stable=True)[:STARTS]]
        for _ in range(ROUNDS):
            x = _climb(acquisition, x, space.continuous & free)
            pool.append(x)
            pool_values.append(_evaluate(acquisition, x))
            before, x = x, _step(acquisition, space, x, pool_values[-1], free)
            if torch.equal(before, x):
                break
        else:
            pool.append(x)
            pool_values.append(_evaluate(acquisition, x))
        candidates, values = torch.cat(pool), torch.cat(pool_values)
    for x in candidates[values.argsort(descending=True, stable=True)]:
        if not is_known(x, known):
            return x
    for x in hold(space.uniform(num_candidates, generator=generator)):
        if not is_known(x, known):
            return x
    return candidates[values.argmax()]


def is_known(x: Tensor, known: Tensor) -> bool:
    """Whether x (dim,) is one of `known` (n, dim)."""
    return bool(((known - x).abs() < SAME).all(-1).any())


def _fantasize(model: Model, pending: Tensor, seed: int) -> Model:
    """The model of batch_shape (FANTASIES,) that saw its own joint draws at the pending points."""
    some: Any = model
    with torch.no_grad():
        sampler = get_sampler(some.posterior(pending), torch.Size([FANTASIES]), seed=seed)
        fantasies: Model = some.fantasize(pending, sampler=sampler)
    return fantasies


def _log_improvement(model: Model, X: Tensor, best: Tensor, most: Tensor | None = None) -> Tensor:
    """log E[min(max(f - best, 0), most)] at X (n, dim), (n, ...) for `best` (...).

    `best` is one for each fantasy, or any number of thresholds for a model without fantasies.
    """
    predictive = predictives(model, X)
    value = predictive.log_expected_improvement(best.unsqueeze(-1)).movedim(-1, 0)
    if most is None or most <= 0:
        return value
    beyond = predictive.log_expected_improvement((best + most).unsqueeze(-1)).movedim(-1, 0)
    return value + torch.log1p(-(beyond - value).exp().clamp_max(1 - 1e-9))


def _log_feasibility(model: Model, X: Tensor) -> Tensor:
    """log P(constraint <= 0) at X (n, dim), (n,) or (n, fantasy), from mean and variance."""
    mean, variance = _moments(model, X)
    return torch.special.log_ndtr(-mean / variance.sqrt())


def _moments(model: Model, X: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and variances at X (n, dim), each (n,) or (n, fantasy)."""
    predictive = predictives(model, X)
    return predictive.mean.movedim(-1, 0), predictive.variance.movedim(-1, 0)


def predictives(model: Model, X: Tensor) -> Predictive:
    """Of the noise-free function at X (n, dim), batch_shape (n,) or (fantasy, n).

    The network's own; of other models the normal distribution with the posterior's moments.
    """
    some: Any = model
    batch = model.batch_shape
    if isinstance(model, PriorFitted):  # which reads each fantasy once, not once for each point
        marginals: Predictive = some.posterior(X.expand(*batch, *X.shape)).marginals
        return marginals
    points = X.reshape(len(X), *[1] * len(batch), 1, X.shape[-1])
    posterior = some.posterior(points.expand(len(X), *batch, 1, X.shape[-1]))
    mean, variance = (part.movedim(0, -3) for part in (posterior.mean, posterior.variance))
    deviation = variance.squeeze(-1).clamp_min(LEAST_VARIANCE).sqrt()
    zero = torch.zeros_like(deviation)
    return Predictive(zero, mean.squeeze(-1), deviation, validate_args=False)


def _hypervolume(
    model: Model, X: Tensor, Y: Tensor, constraints: int, pending: Tensor | None, seed: int
) -> Acquisition:
    """The logarithm of the expected hypervolume improvement of independent objectives, exactly.

    What no evaluated point dominates is a union of boxes. In each the improvement is a product over
    objectives, with the expectation E[max(y - low, 0)] - E[max(y - high, 0)] in each. Points
    without an answer get one joint draw.

    Reference: Yang, Emmerich, Deutz and Baeck, Efficient Computation of Expected Hypervolume
    Improvement Using Box Decomposition Algorithms, Journal of Global Optimization 75, 2019.
    """
    count = Y.shape[1] - constraints
    models: list[Model] = [model.subset_output([i]) for i in range(Y.shape[1])]
    with torch.no_grad():
        if pending is not None:
            models = [_answer(part, pending, seed + i) for i, part in enumerate(models)]
            X = torch.cat([X, pending])
        means = torch.stack([_moments(part, X)[0] for part in models], -1)  # (n, m)
    feasible = _are_feasible(Y, means, constraints)
    met, limits = feasible[: len(Y)], models[count:]
    if not bool(met.any()):
        return lambda points: torch.stack([_log_feasibility(m, points) for m in limits]).sum(0)
    reference = _reference_point(Y[met, :count])
    front = means[feasible, :count]
    low, high = FastNondominatedPartitioning(reference, front).hypercell_bounds  # (cell, count)

    def value(points: Tensor) -> Tensor:
        total = _log_gain(models[:count], points, low, high)
        for limit in limits:
            total = total + _log_feasibility(limit, points)
        return total

    return value


def _log_gain(models: list[Model], X: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The logarithm of the expected volume that X (n, dim) gain in boxes (cell, m), (n,)."""
    total = torch.zeros(len(X), len(low), dtype=X.dtype)
    for model, below, above in zip(models, low.T, high.T, strict=True):
        ends, index = torch.cat([below, above]).unique(return_inverse=True)
        finite = ends[ends.isfinite()]  # an infinite one is last
        beyond = _log_improvement(model, X, finite)
        beyond = F.pad(beyond, (0, len(ends) - beyond.shape[1]), value=-math.inf)
        more, less = beyond[:, index[: len(low)]], beyond[:, index[len(low) :]]
        total = total + more + torch.log1p(-(less - more).exp().clamp_max(1 - 1e-12))
    return total.logsumexp(-1)


def _reference_point(values: Tensor) -> Tensor:
    """A tenth of the range below the worst on the front, and below nine tenths of all values.

    A young front is short; measured from its own ends, nothing beyond them would count.
    """
    front = values[is_non_dominated(values)]
    worst = torch.minimum(front.amin(0), values.quantile(0.1, dim=0))
    spread = front.amax(0) - worst
    return worst - 0.1 * torch.where(spread > 0, spread, front.amax(0).abs().clamp_min(1.0))


def _answer(model: Model, pending: Tensor, seed: int) -> Model:
    """The model that saw one joint draw of itself at the pending points."""
    posterior: Any = model.posterior(pending, observation_noise=True)
    draw = get_sampler(posterior, torch.Size([1]), seed=seed)(posterior)[0]
    return model.condition_on_observations(pending, draw)


def hold_fixed(space: Space, fixed: Mapping[str, Any]) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """What sets the columns of fixed parameters, and which columns are free (dim,)."""
    names = [p for p in space.parameters if p.name in fixed]
    free = torch.ones(space.dim, dtype=torch.bool)
    values = torch.zeros(space.dim, dtype=torch.float64)
    for parameter in names:
        free[parameter.columns] = False
        single = Space({parameter.name: parameter.distribution})
        values[parameter.columns] = single.encode({parameter.name: fixed[parameter.name]})
    return lambda X: torch.where(free, X, values), free


def _perturb(space: Space, X: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` points around X: steps of several scales, in few columns or all."""
    pick = torch.arange(n) % len(X)
    scale = torch.tensor(SCALES, dtype=torch.float64)
    scale = scale[torch.randint(len(SCALES), (n, 1), generator=generator)]
    few = min(1.0, 2.0 / max(1, len(space.parameters)))
    change = torch.tensor([few, 0.5, 1.0], dtype=torch.float64)
    change = change[torch.randint(3, (n, 1), generator=generator)]
    return space.perturb(X[pick], scale, change, generator=generator)


@torch.no_grad()
def _evaluate(acquisition: Acquisition, X: Tensor) -> Tensor:
    values = torch.cat([acquisition(part) for part in X.split(CHUNK)])
    return values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _climb(acquisition: Acquisition, X: Tensor, columns: Tensor) -> Tensor:
    """X (k, dim) after a few steps of L-BFGS in some columns, all points at once."""
    if not bool(columns.any()):
        return X

    def negative(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        moved = torch.from_numpy(flat.reshape(len(X), -1)).requires_grad_()
        points = X.clone()
        points[:, columns] = moved
        total = -acquisition(points).sum()
        (gradient,) = torch.autograd.grad(total, moved)
        return total.item(), gradient.nan_to_num(0.0, 0.0, 0.0).numpy().ravel()

    start = X[:, columns].numpy().ravel()
    options = {"maxiter": EVALUATIONS, "maxfun": EVALUATIONS}
    found = minimize(
        negative,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, 1.0)] * len(start),
        options=options,
    )
    climbed = X.clone()
    climbed[:, columns] = torch.from_numpy(found.x.reshape(len(X), -1)).clamp(0.0, 1.0)
    return climbed


def _step(
    acquisition: Acquisition, space: Space, X: Tensor, values: Tensor, free: Tensor
) -> Tensor:
    """Each of X (k, dim), or the best of its neighbours in discrete parameters if better."""
    names = {p.name for p in space.parameters if bool(free[p.start])}
    near = [space.neighbours(x, names) for x in X]
    sizes = [len(rows) for rows in near]
    if not sum(sizes):
        return X
    scores = _evaluate(acquisition, torch.cat(near)).split(sizes)
    best = []
    for x, value, rows, score in zip(X, values, near, scores, strict=True):
        better = len(rows) and bool(score.max() > value)
        best.append(rows[score.argmax()] if better else x)
    return torch.stack(best)
