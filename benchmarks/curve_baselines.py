"""What extrapolates learning curves without a network, for `curves.py`.

Each baseline gives, for beginnings of curves, mixtures or Student-t distributions at later times,
in units of y in [0, 1] where higher is better. Spreads and the trend's numbers are fitted on other
data sets than those that they are measured on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.stats import t as student
from torch import Tensor

from priors import ParametricCurves
from priors.curve_families import FAMILIES, Family

Array = np.ndarray[Any, np.dtype[np.float64]]
HALF = 0.005  # densities are means over +- this
UNIFORM = 0.01  # share of a uniform density on [0, 1] that is mixed in
WALKERS, STEPS, BURN_IN, KEPT = 100, 2500, 500, 40  # of MCMC; of its steps, every so many are kept


class Beginning(NamedTuple):
    """A curve of which the first `cut` points were seen."""

    time: Array  # (n,) all times, fractions of the run
    y: Array  # (n,) all values
    cut: int


@dataclass
class Draws:
    """Predictive of equally weighted normals: means and standard deviations (draw, rest)."""

    mean: Array
    std: Array

    def cdf(self, y: Array) -> Array:
        z = torch.from_numpy((y - self.mean) / self.std)
        return torch.special.ndtr(z).mean(0).numpy()

    def median(self) -> Array:
        return np.median(self.mean, 0)


@dataclass
class Student:
    """Student-t predictives (rest,)."""

    loc: Array
    scale: Array
    dof: float = math.inf

    def cdf(self, y: Array) -> Array:
        dof = min(self.dof, 1e6)
        return student.cdf((y - self.loc) / self.scale, dof)

    def median(self) -> Array:
        return self.loc


def quantile(predictive: Draws | Student, p: float) -> Array:
    """By bisection on [-1, 2]."""
    low, high = np.full(len(predictive.median()), -1.0), np.full(len(predictive.median()), 2.0)
    for _ in range(50):
        middle = (low + high) / 2
        below = predictive.cdf(middle) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def smoothed_density(cdf: Any, y: Array) -> Array:
    """log of the mean density over y +- HALF, with a little of a uniform one."""
    inside = (cdf(y + HALF) - cdf(y - HALF)) / (2 * HALF)
    return np.log((1 - UNIFORM) * inside + UNIFORM)


# the last value, with a spread that grows with the distance


def fit_last(train: Sequence[Beginning]) -> Array:
    """Coefficients of log spread: constant and logarithm of the distance, robustly."""
    rows = [
        (math.log(b.time[i] - b.time[b.cut - 1]), abs(b.y[i] - b.y[b.cut - 1]))
        for b in train
        for i in range(b.cut, len(b.y), max(1, (len(b.y) - b.cut) // 8))
    ]
    x, r = np.array(rows).T
    design = torch.from_numpy(np.column_stack([np.ones_like(x), x]))
    return _fit(
        lambda w: (
            -torch.distributions.Normal(0.0, (design @ w).exp())
            .log_prob(torch.from_numpy(r))
            .clamp_min(-20)
            .mean()
        ),
        [-3.0, 0.3],
    )


def predict_last(w: Array, b: Beginning) -> Student:
    ahead = b.time[b.cut :] - b.time[b.cut - 1]
    scale = np.exp(w[0] + w[1] * np.log(ahead))
    return Student(np.full(len(ahead), b.y[b.cut - 1]), scale.clip(1e-4))


# a damped trend, whose scale follows roughness, slope and distance: nine numbers


def trend_features(b: Beginning) -> Array:
    """For each later point: level, slope times distance, and logarithms of three sizes."""
    y, time = b.y[: b.cut], b.time[: b.cut]
    last = max(2, b.cut // 3)
    rough = float(np.median(np.abs(np.diff(y[-last - 1 :])))) + 1e-4 if b.cut > 1 else 0.02
    slope = 0.0
    if b.cut > 2:
        slope = float(np.polyfit(time[-max(3, last) :], y[-max(3, last) :], 1)[0])
    level = float(y[-min(3, b.cut) :].mean())
    ahead = b.time[b.cut :] - time[-1]
    passed = np.full_like(ahead, time[-1])
    return np.column_stack(
        [
            np.full_like(ahead, level),
            np.full_like(ahead, y[-1]),
            np.full_like(ahead, slope),
            ahead,
            passed,
            np.full_like(ahead, math.log(rough)),
            np.log(abs(slope) * ahead + 1e-4),
            np.log(ahead / passed),
        ]
    )


def _trend(w: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    level, last, slope, ahead, passed, rough, moved, far = f.unbind(-1)
    base = last + torch.sigmoid(w[0]) * (level - last)
    damping = passed * w[1].exp()
    loc = base + w[2] * slope * damping * (1 - (-ahead / damping).exp())
    scale = (w[3] + w[4] * rough + w[5] * moved + w[6] * far).exp() + 1e-4 + w[7].exp()
    return loc, scale, 1 + w[8].exp()


def fit_trend(train: Sequence[Beginning]) -> Array:
    """The nine numbers, by maximum likelihood."""
    rows, ys = [], []
    for b in train:
        pick = slice(0, None, max(1, (len(b.y) - b.cut) // 8))
        rows.append(trend_features(b)[pick])
        ys.append(b.y[b.cut :][pick])
    f, y = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(ys))

    def loss(w: Tensor) -> Tensor:
        loc, scale, dof = _trend(w, f)
        q = torch.distributions.StudentT(dof, loc, scale).log_prob(y)
        return -torch.logaddexp(q + math.log(1 - UNIFORM), torch.tensor(math.log(UNIFORM))).mean()

    return _fit(loss, [0.0, 0.0, 0.5, -1.0, 0.4, 0.3, 0.3, -7.0, 1.0])


def predict_trend(w: Array, b: Beginning) -> Student:
    loc, scale, dof = _trend(torch.from_numpy(w), torch.from_numpy(trend_features(b)))
    return Student(loc.numpy(), scale.numpy(), float(dof))


def _fit(loss: Any, start: Sequence[float]) -> Array:
    w = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    optimizer.step(closure)
    return w.detach().numpy()


# least squares over the eleven families


def best_family(b: Beginning, starts: int = 4) -> Array:
    """The rest (rest,) by the family that fits the beginning best, from several starts each."""
    steps = torch.from_numpy(b.time * 100)
    best, answer = math.inf, np.full(len(b.y) - b.cut, b.y[b.cut - 1])
    for family in FAMILIES.values():
        if len(family.parameters) > b.cut + 1:
            continue
        z, cost = _fit_family(family, steps[: b.cut], b.y[: b.cut], starts)
        rest = family(steps[b.cut :], torch.from_numpy(z)[None])[0].numpy()
        if cost < best and np.isfinite(rest).all():
            best, answer = cost, rest
    return answer


def _fit_family(family: Family, seen: Tensor, y: Array, starts: int) -> tuple[Array, float]:
    """Coordinates of least squares, and half the sum of squares."""
    rng, dim = np.random.default_rng(0), len(family.parameters)

    def residual(z: Array) -> Array:
        value = family(seen, torch.from_numpy(z)[None])[0].numpy()
        return np.nan_to_num(value - y, nan=10.0, posinf=10.0, neginf=-10.0).clip(-10, 10)

    begun = [np.zeros(dim), *(rng.normal(size=dim) for _ in range(starts - 1))]
    found = [least_squares(residual, z, bounds=(-5, 5), max_nfev=60) for z in begun]
    best = min(found, key=lambda one: one.cost)
    return best.x, float(best.cost)


def fit_spread(pairs: Sequence[tuple[Beginning, Array]]) -> Array:
    """Coefficients of the log spread of least squares' errors, as `fit_last`."""
    x = np.concatenate([np.log(b.time[b.cut :] - b.time[b.cut - 1]) for b, _ in pairs])
    r = np.concatenate([(b.y[b.cut :] - rest).clip(-1, 1) for b, rest in pairs])
    design = torch.from_numpy(np.column_stack([np.ones_like(x), x]))
    r = torch.from_numpy(r)
    return _fit(
        lambda w: (
            -torch.distributions.Normal(0.0, (design @ w).exp() + 1e-4)
            .log_prob(r)
            .clamp_min(-20)
            .mean()
        ),
        [-3.0, 0.3],
    )


# MCMC at the published settings


def mcmc(
    prior: ParametricCurves,
    b: Beginning,
    seed: int = 0,
    *,
    steps: int = STEPS,
    from_optimum: bool = False,
) -> Draws:
    """The posterior predictive under a published prior, by emcee's ensemble sampler.

    Args:
        steps: of each walker.
        from_optimum: whether walkers begin within 1e-6 of one optimum, as published, and not at
            the best of many prior draws, which mixes better.
    """
    times = torch.from_numpy(b.time * prior.horizon)
    seen, y = times[: b.cut], torch.from_numpy(b.y[: b.cut])

    def log_prob(t: Tensor) -> Tensor:
        likelihood = _log_normal(y, prior.curve(seen, t), prior.sigma(t).unsqueeze(-1))
        return torch.where(prior.is_allowed(t), prior.log_prior(t) + likelihood, -math.inf)

    generator = torch.Generator().manual_seed(seed)
    draws = prior.draw(20 * WALKERS, generator=generator)
    start = draws[log_prob(draws).argsort(descending=True)[:WALKERS]]
    if from_optimum:
        best = _climb(log_prob, start[0], start.shape[1])
        start = best + 1e-6 * torch.randn(start.shape, dtype=best.dtype, generator=generator)
    kept = _walk(log_prob, start, seed, steps)
    kept = kept[log_prob(kept).isfinite()]  # a walker may begin beyond a wall, and stay there
    return Draws(
        prior.curve(times[b.cut :], kept).numpy(), prior.sigma(kept).reshape(-1, 1).numpy()
    )


def mcmc_flat(b: Beginning, seed: int = 0) -> Draws:
    """All eleven families under flat priors, as in the code of Domhan et al.

    Parameters, positive weights of sum 1, and the noise are flat. A curve has to be finite, to end
    within [0, 100], and not below its beginning. Walkers begin within 1e-6 of a joint optimum,
    which begins at the least squares of each family.
    """
    steps = torch.from_numpy(b.time * 100)
    seen, y = steps[: b.cut], torch.from_numpy(b.y[: b.cut])
    families = list(FAMILIES.values())
    sizes = [len(family.parameters) for family in families]

    def curve(at: Tensor, t: Tensor) -> Tensor:
        parts = t[:, : sum(sizes)].split(sizes, 1)
        values = [
            family.function(at, *part.unsqueeze(-1).unbind(1))
            for family, part in zip(families, parts, strict=True)
        ]
        weights = t[:, sum(sizes) : -1] / t[:, sum(sizes) : -1].sum(-1, keepdim=True)
        return (weights.unsqueeze(-1) * torch.stack(values, 1)).sum(1)

    def log_prob(t: Tensor) -> Tensor:
        ends = curve(steps[[0, -1]], t)
        allowed = (t[:, sum(sizes) :] > 0).all(-1) & (ends[:, 1] >= ends[:, 0])
        allowed = allowed & (ends[:, 1] >= 0) & (ends[:, 1] <= 100)
        likelihood = _log_normal(y, curve(seen, t), t[:, -1:].clamp_min(1e-12))
        return torch.where(allowed, likelihood.nan_to_num(-math.inf), -math.inf)

    parameters = []
    for family in families:
        z = torch.from_numpy(_fit_family(family, seen, b.y[: b.cut], 1)[0])
        parameters += [p.value(z[i]).item() for i, p in enumerate(family.parameters)]
    start = torch.tensor([*parameters, *[10.0] * len(families), 0.05], dtype=torch.float64)
    best = _climb(log_prob, start, sum(sizes))
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.randn(WALKERS, len(best), dtype=torch.float64, generator=generator)
    kept = _walk(log_prob, best + 1e-6 * jitter, seed)
    mean = curve(steps[b.cut :], kept)
    sound = mean.isfinite().all(-1)
    return Draws(mean[sound].numpy(), kept[sound, -1:].numpy())


def _climb(log_prob: Any, start: Tensor, positive: int, rounds: int = 300) -> Tensor:
    """The best point met on the way up from `start`; coordinates from `positive` on are so."""
    moving = torch.cat([start[:positive], start[positive:].log()]).requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=0.01)
    best, highest = start, -math.inf
    for _ in range(rounds):
        point = torch.cat([moving[:positive], moving[positive:].exp()])
        value = log_prob(point.unsqueeze(0))[0]
        if not value.isfinite():
            break
        if float(value.detach()) > highest:
            best, highest = point.detach().clone(), float(value.detach())
        optimizer.zero_grad()
        (-value).backward()
        if not moving.grad.isfinite().all():
            break
        optimizer.step()
    return best


def _log_normal(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density (walker,) of y (n,) around mean (walker, n)."""
    return (-0.5 * ((y - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def _walk(log_prob: Any, start: Tensor, seed: int, steps: int = STEPS) -> Tensor:
    """Points (draw, dim) of emcee's walkers after burn-in."""
    import emcee

    def of_arrays(t: Array) -> Array:
        with torch.no_grad():
            return torch.nan_to_num(log_prob(torch.from_numpy(t)), nan=-math.inf).numpy()

    sampler = emcee.EnsembleSampler(*start.shape, of_arrays, vectorize=True)
    sampler.random_state = np.random.RandomState(seed).get_state()
    sampler.run_mcmc(start.numpy(), steps, skip_initial_state_check=True)
    return torch.from_numpy(sampler.get_chain(discard=BURN_IN, thin=KEPT, flat=True))
