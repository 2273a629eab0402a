"""Learning curves as trainings really produce them: the prior behind extrapolation and stopping.

A curve is what remains to be learned, raised by learning-rate schedules, late overfitting, and
divergence, seen through noise that is autocorrelated, shrinks as training settles, has spikes, and
is rounded to the rows of a validation set. The siblings of a sweep share a task, and depend on
hyperparameters through random smooth functions. Every quantity behind a curve is a monotone
function of a standard normal number, which is how the siblings share and depend.

The published priors, which have reference posteriors, are in `parametric_curves.py`. This one is
too rich for a density: with its rounding, spikes and divergence it has no tractable posterior and
offers none; networks trained on it are judged on real curves and by their calibration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from priors.curve_families import FAMILIES
from priors.draws import draw_normal
from priors.parametric_curves import ParametricCurves
from priors.tasks import Tasks

METRICS = ("accuracy", "loss")
SHORTEST, LONGEST = 10, 1000  # reports of a run
RARELY = 30  # steps between two reports, at most
SIBLINGS = 32  # curves of a sweep, at most
FEATURES = 24  # random features behind each dependence on hyperparameters


@dataclass(frozen=True)
class LearningCurves:
    """Validation curves of small and large trainings, one per task or the siblings of a sweep.

    Higher is better, and y lies in [0, 1] but for a little of its own noise. An accuracy is itself;
    an error rate e is 1 - e; a loss l >= 0 without upper bound is y = l0 / (l0 + l), where l0 is
    the loss of a constant prediction or the first one seen (the prior leaves a factor of about 2
    for it), so that log l is minus the logit of y and a diverged loss, NaN or infinite, is y = 0.

    Inputs are x[..., 0], the time as a fraction of the planned run, in (0, 1], and with d >= 2 the
    d - 1 hyperparameters of the row's curve, in [0, 1]. With d = 1 a task is one curve in order of
    time: its first k reports, k random, of a run of 10 to 1000 reports, and the rest at irregular
    later times; one task in five is a whole run of n reports. Reports come every step or, in two
    runs of five, every few steps, up to 30. With d >= 2 rows are the runs of a sweep of up to 32,
    one after another and each in order of time: two in five of them are complete, others were
    stopped at any time, and the last goes to its end. Positions do not depend on y, so that every
    prefix of the rows is a valid context.

    Args:
        metrics: of `METRICS`, one of them drawn per task.
        resolution: standard deviation of normal noise on y itself, which keeps densities finite
            where real curves repeat a value exactly.

    Latents in `Tasks`, all (task,): "noise", the variance of y around f at the end of the last
    curve, "final", its f at x = 1, and "metric", an index.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> LearningCurves().sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    metrics: tuple[str, ...] = METRICS
    resolution: float = 2e-5

    def __post_init__(self) -> None:
        if not self.metrics or not set(self.metrics) <= set(METRICS):
            raise ValueError(f"Expected metrics among {METRICS}; got {self.metrics}.")
        if not self.resolution > 0:
            raise ValueError(f"Expected a positive resolution; got {self.resolution}.")

    @staticmethod
    def lcpfn(horizon: int = 100) -> ParametricCurves:
        """The prior of the released LC-PFN: sums of pow3, ilog2 and janoschek curves."""
        return ParametricCurves(horizon=horizon)

    @staticmethod
    def domhan(horizon: int = 100) -> ParametricCurves:
        """The same prior with all eleven families of Domhan et al.; one draw in 800 is accepted."""
        return ParametricCurves(tuple(FAMILIES), horizon)

    @property
    def latent_units(self) -> dict[str, str]:
        """How each latent scales with the data."""
        return {"noise": "y^2", "final": "y", "metric": ""}

    @property
    def latent_categories(self) -> dict[str, list[str]]:
        """The names behind latents that are indices."""
        return {"metric": list(self.metrics)}

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` rows in float64 on the generator's device."""
        layout = _draw_layout(batch, n, d, generator=generator)
        z = _draw_latents(layout.hyperparameters, generator=generator)  # (task, sibling, latent)
        metric = torch.randint(
            len(self.metrics), (batch,), device=generator.device, generator=generator
        )
        is_loss = torch.tensor([m == "loss" for m in self.metrics], device=generator.device)[metric]
        curve = _Curve(_latents(z, layout.curve), is_loss.unsqueeze(-1))
        f = curve.value(layout.time)
        y = curve.observe(f, layout, generator=generator)
        y = y + self.resolution * draw_normal(batch, n, generator=generator)
        last = _Curve(_latents(z, layout.last.unsqueeze(-1)), is_loss.unsqueeze(-1))
        end = torch.ones(batch, 1, dtype=torch.float64, device=generator.device)
        final = last.value(end)
        noise = last.variance(end, final) + self.resolution**2
        latents = {"noise": noise.squeeze(-1), "final": final.squeeze(-1), "metric": metric}
        own = layout.hyperparameters.gather(
            1, layout.curve.unsqueeze(-1).expand(-1, -1, max(d - 1, 0))
        )
        x = torch.cat([layout.time.unsqueeze(-1), own], -1)
        return Tasks(x, y, f, latents, num_context=max(n - 1, 0))


# where the rows are


class _Layout(NamedTuple):
    """Which curve and time each row is, and the hyperparameters of the curves."""

    time: Tensor  # (task, row) in (0, 1]
    curve: Tensor  # (task, row) index of the sibling
    last: Tensor  # (task,) the last sibling
    step: Tensor  # (task, 1) time between two steps of the run
    hyperparameters: Tensor  # (task, sibling, d - 1)


def _draw_layout(batch: int, n: int, d: int, *, generator: torch.Generator) -> _Layout:
    """One run, or the runs of a sweep."""
    if d == 1:
        return _draw_run(batch, n, generator=generator)
    return _draw_sweep(batch, n, d - 1, generator=generator)


def _draw_run(batch: int, n: int, *, generator: torch.Generator) -> _Layout:
    """The first reports of one run, and the rest at later times; or all reports of a run."""
    steps = _draw_steps(batch, generator=generator)
    whole = _uniform(batch, 1, generator=generator) < 0.2
    steps = torch.where(whole, torch.full_like(steps, max(n, 2)), steps)
    begun = (_uniform(batch, 1, generator=generator) * (n + 1)).floor().minimum(steps - 1)
    begun = torch.where(whole, n, begun)
    row = torch.arange(n, dtype=torch.float64, device=generator.device)
    covered = begun / steps
    later = covered + (1 - covered) * (1 - _uniform(batch, n, generator=generator))
    later = later.masked_fill(row < begun, 0.0).sort(-1).values
    time = torch.where(row < begun, (row + 1) / steps, later).clamp(1e-6, 1.0)
    curve = torch.zeros(batch, n, dtype=torch.long, device=generator.device)
    apart = _uniform(2, batch, 1, generator=generator)  # whether, and how far
    stride = torch.where(apart[0] < 0.4, (RARELY ** apart[1]).floor(), 1.0)
    step = 1 / (steps * stride)
    return _Layout(time, curve, curve.new_zeros(batch), step, time.new_empty(batch, 1, 0))


def _draw_sweep(batch: int, n: int, dim: int, *, generator: torch.Generator) -> _Layout:
    """Runs one after another, each at evenly spaced times; two in five of all but the last end."""
    device, most = generator.device, max(1, min(SIBLINGS, n // 4))
    siblings = (_uniform(batch, 1, generator=generator) * math.log(most + 1)).exp().floor()
    last = siblings.clamp(1, most).long() - 1
    row = torch.arange(n, dtype=torch.float64, device=device)
    cuts = _uniform(batch, most, generator=generator)  # between siblings, as shares of the rows
    cuts = cuts.masked_fill(torch.arange(most, device=device) >= last, 2.0).sort(-1).values
    share = ((row + 0.5) / max(n, 1)).expand(batch, n).contiguous()
    curve = torch.searchsorted(cuts, share).minimum(last)
    last = curve[:, -1:] if n else last  # some between may have no row
    first = torch.full((batch, most), float(n), dtype=torch.float64, device=device)
    first.scatter_reduce_(1, curve, row.expand(batch, n), "amin")
    count = torch.zeros(batch, most, dtype=torch.float64, device=device)
    count.scatter_add_(1, curve, torch.ones_like(share))

    covered = 1 - _uniform(batch, most, generator=generator)  # share of the run that was observed
    finished = _uniform(batch, most, generator=generator) < 0.4
    covered = torch.where(finished, 1.0, covered).scatter(1, last, 1.0)
    rank = row - first.gather(1, curve) + 1  # of the row in its run, from 1
    time = rank * (covered / count.clamp_min(1)).gather(1, curve)

    hyperparameters = _uniform(batch, most, dim, generator=generator)
    steps = _draw_steps(batch, generator=generator)
    return _Layout(time.clamp(1e-6, 1.0), curve, last.squeeze(-1), 1 / steps, hyperparameters)


def _draw_steps(batch: int, *, generator: torch.Generator) -> Tensor:
    """The number of steps of each run (batch, 1)."""
    share = _uniform(batch, 1, generator=generator)
    return (SHORTEST * (LONGEST / SHORTEST) ** share).round()


def _uniform(*shape: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    return torch.rand(*shape, dtype=torch.float64, device=device, generator=generator)


# what curves share, and how they depend on hyperparameters

LATENTS = (
    "start finish speed shape sharpness second_share second_speed delay schedule drop_time "
    "drop_size warm_up warm_up_time schedule_effect progress_effect overfit overfit_time "
    "overfit_power diverge diverge_time noise correlation correlated settle rows flips "
    "spike_rate spike_size worse flat scale blow_up asleep"
).split()
Latents = dict[str, Tensor]


def _draw_latents(hyperparameters: Tensor, *, generator: torch.Generator) -> Tensor:
    """Standard normal latents (task, sibling, latent), correlated between siblings.

    Each is a sum of a part of the task, a random smooth function of the hyperparameters, and the
    curve's own part, in shares that are drawn per task and latent.
    """
    batch, siblings, inputs = hyperparameters.shape
    count = len(LATENTS)
    own = draw_normal(batch, siblings, count, generator=generator)
    if not inputs:
        return own
    shared = draw_normal(batch, 1, count, generator=generator)
    relevance = (
        4 * _uniform(batch, inputs, 1, generator=generator).square()
    )  # many hyperparameters hardly matter
    frequency = relevance * draw_normal(batch, inputs, FEATURES, generator=generator)
    phase = 2 * math.pi * _uniform(batch, 1, FEATURES, generator=generator)
    features = math.sqrt(2 / FEATURES) * (hyperparameters @ frequency + phase).cos()
    dependent = features @ draw_normal(batch, FEATURES, count, generator=generator)
    dependent = dependent / features.square().sum(-1, keepdim=True).sqrt()
    share = -_uniform(
        3, batch, 1, count, generator=generator
    ).log()  # Dirichlet(1, 1, 1) when normalised
    share = share / share.sum(0)
    # the curve's own share is small in most tasks: seeds matter less than hyperparameters
    share[2] *= _uniform(batch, 1, 1, generator=generator).square()
    share = (share / share.sum(0)).sqrt()
    return share[0] * shared + share[1] * dependent + share[2] * own


def _latents(z: Tensor, curve: Tensor) -> Latents:
    """The latents of each row by name, (task, row), or (task, 1) if all are of one curve."""
    if z.shape[1] == 1:
        return dict(zip(LATENTS, z.unbind(-1), strict=True))
    rows = z.gather(1, curve.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
    return dict(zip(LATENTS, rows.unbind(-1), strict=True))


def _share(z: Tensor) -> Tensor:
    """Uniform on (0, 1) where z is standard normal."""
    return torch.special.ndtr(z)


def _log_uniform(z: Tensor, low: float, high: float) -> Tensor:
    """Between powers of ten, uniform in the exponent."""
    return 10 ** (low + (high - low) * _share(z))


def _excess(z: Tensor, probability: float) -> Tensor:
    """Exponential with mean 1 with a probability, else 0."""
    tail = _share(-z).clamp_min(1e-12)
    return (probability / tail).log().clamp_min(0)


# the curve itself


class _Curve(NamedTuple):
    """Curves with latents z by row, accuracies or losses: everything is elementwise in the rows.

    The metric is counted downwards, as an error rate or as a loss relative to l0, and shown as
    y = 1 - error or y = 1 / (1 + loss).
    """

    z: Latents  # each (task, row) or (task, 1)
    is_loss: Tensor  # (task, 1)

    def value(self, time: Tensor) -> Tensor:
        """The noise-free y (task, row) at times (task, row)."""
        z = self.z
        begin, end = self.ends()
        gap = begin - end
        rate, used = self.schedule(time)
        effect = (1.5 * _share(z["progress_effect"])).clamp_max(1)  # 1: by the rate alone
        remaining = self.remaining((1 - effect) * time + effect * used)
        metric = end + gap * remaining
        # the learning rate keeps a distance from the optimum, which falls when it drops
        raised = 0.3 * _share(z["schedule_effect"]).square() * gap.abs()
        metric = metric + raised * rate * (1 - remaining)
        metric = metric + self.overfitting(time) * (gap.abs() + 0.02 * begin)
        error = metric.clamp(0, 1)
        y = torch.where(self.is_loss, 1 / (1 + metric.clamp_min(1e-9)), 1 - error)
        return torch.where(time >= self.divergence(), self.diverged(), y)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The metric before training and where it would end."""
        z = self.z
        classes = 2 + _excess(z["scale"], 0.6) * 4  # chance level of an accuracy
        chance = 1 - (1 / classes) * (0.6 + 0.8 * _share(z["start"]))
        untrained = (0.5 * z["start"] + 1.5 * _excess(z["blow_up"], 0.12)).exp()
        begin = torch.where(self.is_loss, untrained, chance)
        kept = torch.sigmoid(2.2 * z["finish"] - 1.9)  # of the error, by the best training
        kept_loss = (-1.9 * _excess(-z["finish"], 1.0)).exp() * (0.95 + 0.05 * _share(z["scale"]))
        kept = torch.where(self.is_loss, kept_loss, kept)
        shrink = 10 ** (-1.5 * _excess(z["flat"], 0.2))  # runs that hardly move
        kept = 1 - (1 - kept) * shrink
        kept = kept + 0.3 * _excess(z["worse"], 0.08) * shrink  # and some that get worse
        return begin, begin * kept

    def remaining(self, time: Tensor) -> Tensor:
        """What is left to learn, from 1 at time 0 downwards: two phases of Burr type.

        (1 + (t / tau)^delta / alpha)^-alpha is a power law for delta = 1, Hill's curve for
        alpha = 1, and Weibull's for large alpha; delta > 1 starts slowly.
        """
        z = self.z
        delay = 0.3 * _excess(z["delay"], 0.18).clamp_max(2.5)
        time = torch.nn.functional.softplus((time - delay) / 0.03) * 0.03
        time = torch.where(delay > 0, time, time.clamp_min(1e-9))
        speed = _log_uniform(z["speed"], -3.0, 0.7)
        shape = _log_uniform(z["shape"], -0.6, 1.5)
        # slow runs are still in the phase where progress gains speed
        power = (0.4 + 0.3 * speed.log10() + 0.45 * z["sharpness"]).exp()

        def phase(tau: Tensor) -> Tensor:
            return (-shape * ((time / tau) ** power / shape).log1p()).exp()

        share = _excess(z["second_share"], 0.4).clamp_max(1) * 0.7
        later = speed * _log_uniform(z["second_speed"], 0.3, 2.0)
        return (1 - share) * phase(speed) + share * phase(later)

    def schedule(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """The learning rate relative to its peak, and its integral over time.

        It is constant, stepped, a cosine or linear, and one in four rises at first.
        """
        z = self.z
        kind = _share(z["schedule"])
        first = 0.3 + 0.5 * _share(z["drop_time"])
        drop = _log_uniform(z["drop_size"], -1.3, -0.3)
        second = (1 + first) / 2
        late, later = (time - first).clamp_min(0), (time - second).clamp_min(0)
        stepped = torch.where(time < first, 1.0, torch.where(time < second, drop, drop.square()))
        stepped_used = time - (1 - drop) * late - (drop - drop.square()) * later
        cosine = (1 + (math.pi * time).cos()) / 2
        cosine_used = time / 2 + (math.pi * time).sin() / (2 * math.pi)
        options = (
            (kind < 0.4, torch.ones_like(time), time),
            (kind < 0.63, stepped, stepped_used),
            (kind < 0.87, cosine, cosine_used),
            (kind < 2.0, 1 - time, time - time.square() / 2),
        )
        rate, used = options[-1][1:]
        for chosen, a, b in reversed(options[:-1]):
            rate, used = torch.where(chosen, a, rate), torch.where(chosen, b, used)
        rises = _share(z["warm_up"]) < 0.25
        share = torch.where(rises, time / _log_uniform(z["warm_up_time"], -2.0, -0.5), 2.0)
        lost = torch.where(share < 1, time * (1 - share / 2), time / (2 * share))
        lost = torch.where(rises, lost, 0.0)  # of the integral
        return rate * share.clamp_max(1), used - lost

    def overfitting(self, time: Tensor) -> Tensor:
        """What the metric loses again, relative to the gap."""
        z = self.z
        size = torch.where(self.is_loss, 0.25, 0.06) * _excess(z["overfit"], 0.35)
        tau = _log_uniform(z["overfit_time"], -1.5, 0.3)
        return size * ((time / tau) ** (0.5 * z["overfit_power"]).exp()).log1p()

    def divergence(self) -> Tensor:
        """The time at which a run breaks down, beyond 1 for most."""
        happens = _excess(self.z["diverge"], 0.05) > 0
        return torch.where(happens, _log_uniform(self.z["diverge_time"], -2.0, 0.0), 2.0)

    def diverged(self) -> Tensor:
        """y afterwards: a loss of infinity, or huge; an accuracy of chance or below."""
        begin, _ = self.ends()
        large = _log_uniform(self.z["scale"], 0.5, 4.0)
        loss = torch.where(self.z["blow_up"] > 0, torch.zeros_like(large), 1 / (1 + large))
        return torch.where(self.is_loss, loss, 1 - begin)

    # noise

    def spread(self, time: Tensor) -> Tensor:
        """Standard deviation of the noise in the logit of y, before rounding."""
        z = self.z
        size = 10 ** (torch.where(self.is_loss, -2.7, -2.2) + 0.75 * z["noise"])
        rate, _ = self.schedule(time)
        settled = _share(z["settle"]) * (1 - self.remaining(time)) ** 2
        calm = (0.1 + 0.9 * rate).sqrt() * (1 - 0.8 * settled)
        return size * calm * self.awake(time) * (time < self.divergence())

    def awake(self, time: Tensor) -> Tensor:
        """Share of an accuracy's noise that is there.

        In half of the runs all predictions are alike at first: it grows from 0 to 1 while a
        twentieth of what there is to learn is learned.
        """
        learned = (20 * (1 - self.remaining(time))).clamp_max(1)
        return torch.where(self.is_loss | (self.z["asleep"] < 0), 1.0, learned)

    def rows(self) -> Tensor:
        """Rows of the validation set."""
        return _log_uniform(self.z["rows"], 1.5, 4.7).round()

    def flips(self, time: Tensor, f: Tensor) -> Tensor:
        """Standard deviation of an accuracy by predictions that change from step to step."""
        moving = 0.4 * _share(self.z["flips"]).square() * self.awake(time)
        moving = moving * (time < self.divergence())
        deviation = moving * (f * (1 - f)).clamp_min(0).sqrt() / self.rows().sqrt()
        return torch.where(self.is_loss, torch.zeros_like(deviation), deviation)

    def variance(self, time: Tensor, f: Tensor) -> Tensor:
        """Variance of y around f, to first order, without spikes."""
        logit = (self.spread(time) * f * (1 - f)).square()
        rounding = torch.where(self.is_loss, torch.zeros_like(f), 1 / (12 * self.rows().square()))
        return logit + self.flips(time, f).square() + rounding

    def observe(self, f: Tensor, layout: _Layout, *, generator: torch.Generator) -> Tensor:
        """y (task, row): noise in the logit, flips, spikes, then rounding to the rows."""
        z, time = self.z, layout.time
        white, flip = draw_normal(2, *f.shape, generator=generator)
        uniform = _uniform(2, *f.shape, generator=generator)
        length = layout.step * _log_uniform(z["correlation"], -0.5, 1.7)
        slow = _autocorrelated(time, layout.curve, length, generator=generator)
        share = _share(z["correlated"])
        noise = share.sqrt() * slow + (1 - share).sqrt() * white
        rate = 0.15 * _share(z["spike_rate"]) ** 6  # most runs have hardly any
        size = 10 ** (-0.7 + 0.5 * z["spike_size"]) * -uniform[1].clamp_min(1e-12).log()
        spike = torch.where(uniform[0] < rate, size, torch.zeros_like(size))
        alive = (time < self.divergence()) & (f > 0)
        inside = f.clamp(1e-9, 1 - 1e-9)
        y = torch.sigmoid(inside.logit() + self.spread(time) * noise - spike)
        y = torch.where(alive, y, f) + self.flips(time, f) * flip
        rounded = (y * self.rows()).round() / self.rows()
        return torch.where(self.is_loss, y, rounded).clamp(0, 1)


def _autocorrelated(
    time: Tensor, curve: Tensor, length: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Ornstein-Uhlenbeck noise (task, row) of unit variance along each curve of a task.

    In order of time e_i = a_i e_(i-1) + b_i with a_i = exp(-gap / length); the recursion is a
    parallel scan, in which pairs (a, b) over runs of 1, 2, 4, ... rows are composed.

    Args:
        time, curve: (task, row).
        length: (task, row) or (task, 1), in units of time.
    """
    length = length.expand_as(time)
    order = (curve + time).argsort(-1)  # times are at most 1: ties between curves do no harm
    time, curve, length = (v.gather(1, order) for v in (time, curve, length))
    gap = (time[:, 1:] - time[:, :-1]).clamp_min(0)
    kept = (-gap / length[:, 1:]).exp() * (curve[:, 1:] == curve[:, :-1])
    a = torch.nn.functional.pad(kept, (1, 0))
    b = (1 - a.square()).sqrt() * draw_normal(*time.shape, generator=generator)
    reach = 1
    while reach < time.shape[1]:
        before_a, before_b = (torch.nn.functional.pad(v[:, :-reach], (reach, 0)) for v in (a, b))
        a, b = a * before_a, b + a * before_b
        reach *= 2
    return torch.empty_like(b).scatter_(1, order, b)
