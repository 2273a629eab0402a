"""Figures of a study: best so far, the surrogate along each parameter, fronts. Needs matplotlib.

Pareto fronts and parallel coordinates are Optuna's own.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import torch
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import TrialState
from torch import Tensor

from pfn.plot import BANDS, BLUE, GREY, INK, import_pyplot, quiet
from surrogates.acquisition import incumbents, make_acquisition, predictives
from surrogates.optimize import is_feasible
from surrogates.sampler import PFNSampler, counted
from surrogates.spaces import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

SLICES = 4  # parameters that `plot_result` shows
POINTS = 200  # of a curve
MARGIN, AROUND = 0.08, 0.5  # ranges of the values beyond them on an axis; on one of slices
FENCE = 4.0  # distances from the best to the median: values farther below that are left out


def plot_result(study: Study) -> Figure:
    """Best so far over slices of the surrogate; the Pareto front of several objectives.

    Best so far alone where `plot_slices` has nothing to show.
    """
    plt = import_pyplot()
    if len(study.directions) > 1:
        axes: Any = (plot_front if len(study.directions) < 4 else plot_parallel)(study)
        whole: Figure = axes.get_figure()
        return whole
    space = _space(study)
    shared = _names(study, space)
    names = shared[:SLICES]
    if not names or _sampler_of_all(study, space) is None:
        figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
        plot_best(study, ax)
        return figure
    figure = plt.figure(figsize=(max(6.4, 2.6 * len(names)), 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 3))
    plot_best(study, top.subplots())
    plot_slices(study, names, bottom)
    if len(shared) > SLICES:
        bottom.suptitle(
            f"{SLICES} of {len(shared)} parameters; plot_slices(study, names) has the others",
            fontsize="small",
            color=INK,
        )
    return figure


def plot_best(study: Study, ax: Axes | None = None) -> Axes:
    """Each evaluation's value, and the best so far; failed evaluations are ticks below.

    Values so bad that the rest would be a line are counted in words instead. Those that
    broke a constraint are circles.
    """
    if len(study.directions) > 1:
        raise ValueError("Expected a study of one objective; plot_front shows several.")
    plt = import_pyplot()
    from matplotlib.ticker import MaxNLocator

    ax = plt.subplots(layout="constrained")[1] if ax is None else ax
    trials = counted(study.get_trials(deepcopy=False))
    complete = [t for t in trials if t.state == TrialState.COMPLETE and math.isfinite(t.values[0])]
    numbers = [trial.number for trial in complete]
    values = [trial.values[0] for trial in complete]
    sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
    scores = [
        sign * v if is_feasible(t) else -math.inf for t, v in zip(complete, values, strict=True)
    ]
    best = sign * np.maximum.accumulate(np.array(scores, dtype=np.float64))
    met = np.isfinite(np.array(scores, dtype=np.float64))
    x, y = np.array(numbers, dtype=np.float64), np.array(values, dtype=np.float64)
    ax.scatter(x[met], y[met], s=16, color=GREY, lw=0, label="evaluations")
    if not met.all():
        ax.scatter(x[~met], y[~met], s=16, facecolor="none", edgecolor=GREY, label="infeasible")
    if met.any():
        first = int(met.argmax())
        ax.step(x[first:], best[first:], where="post", color=BLUE, lw=2, label="best so far")
    failed = [trial.number for trial in trials if trial.state == TrialState.FAIL]
    if failed:
        height = ax.get_xaxis_transform()
        ax.plot(failed, [0.02] * len(failed), "|", color=INK, transform=height, label="failed")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("trial", color=INK)
    ax.set_ylabel("value", color=INK)
    _end_near(ax, y, sign, MARGIN)
    quiet(ax)
    ax.legend(frameon=False, fontsize="small", labelcolor=INK)
    return ax


def plot_slices(
    study: Study, names: list[str] | None = None, figure: Any | None = None
) -> list[Axes]:
    """The surrogate along parameters through the best point, and the acquisition below.

    Median, 50 % and 90 % intervals of the noise-free function, in the objective's units; dots are
    all evaluations, wherever they lie in the other parameters.

    Args:
        names: of parameters; all by default.
        figure: where to draw; a new one by default.

    Returns:
        The Axes of the slices, then those of the acquisition.

    Raises:
        ValueError: a study of several objectives, without a completed trial, or without a
            `PFNSampler` that has a surrogate of all its columns.
    """
    space = _space(study)
    sampler = _sampler_of_all(study, space)
    if len(study.directions) > 1 or sampler is None:
        raise ValueError(
            "Expected a study of one objective whose sampler is a PFNSampler with a surrogate of "
            f"all columns; got {len(study.directions)} objective(s), {study.sampler} and "
            f"{space.dim} columns."
        )
    names = _names(study, space) if names is None else names
    model, history = sampler.fit(study, space)
    objective = model.subset_output([0]) if history.Y.shape[1] > 1 else model
    acquisition = make_acquisition(
        model, history.X, history.Y, constraints=history.constraints, pending=history.pending,
        seed=sampler.seed,
    )  # fmt: skip
    best = incumbents(history.X, history.Y, history.constraints)[0]
    sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0

    def in_units(y: Tensor) -> Any:
        padded = y.unsqueeze(-1).expand(*y.shape, history.Y.shape[1])
        return (sign * history.outcomes.decode(padded)[..., 0]).numpy()

    if figure is None:
        size = (max(4.0, 2.6 * len(names)), 4.2)
        figure = import_pyplot().figure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(names), sharey="row", squeeze=False, height_ratios=(3, 1))
    for name, upper, lower in zip(names, *grid, strict=True):
        parameter = next(p for p in space.parameters if p.name == name)
        line = best.repeat(len(space.values(name, POINTS)), 1)
        line[:, parameter.columns] = space.values(name, POINTS)
        x = [space.decode(point)[name] for point in line]
        with torch.no_grad():
            predictive, score = predictives(objective, line), acquisition(line)
            for mass, color in BANDS.items():
                ends = torch.tensor([(1 - mass) / 2, (1 + mass) / 2], dtype=line.dtype)
                low, high = (in_units(predictive.icdf(end)) for end in ends)
                if parameter.is_one_hot:
                    upper.vlines(range(len(x)), low, high, color=color, lw=8)
                else:
                    upper.fill_between(x, low, high, color=color, lw=0)
            style = "o" if parameter.is_one_hot else "-"
            ticks = list(range(len(x))) if parameter.is_one_hot else x
            middle = in_units(predictive.icdf(0.5))
            upper.plot(ticks, middle, style, color=BLUE, lw=2)
            lower.plot(ticks, score.numpy(), style, color=INK, lw=1)
        seen = [space.decode(point)[name] for point in history.X]
        seen = [x.index(value) for value in seen] if parameter.is_one_hot else seen
        upper.scatter(seen, in_units(history.Y[:, 0]), s=10, color=INK, lw=0, zorder=3)
        for ax in (upper, lower):
            if parameter.is_one_hot:
                ax.set_xticks(ticks, [str(value) for value in x])
            elif getattr(parameter.distribution, "log", False):
                ax.set_xscale("log")
            quiet(ax)
        lower.set_xlabel(name, color=INK)
    _end_near(grid[0, 0], in_units(history.Y[:, 0]), sign, AROUND)
    grid[0, 0].set_ylabel("value: median, 50 % and 90 %", color=INK)
    grid[1, 0].set_ylabel("log acquisition", color=INK)
    return [*grid[0], *grid[1]]


def plot_front(study: Study) -> Axes:
    """Optuna's plot of the Pareto front, of two or three objectives."""
    return _optuna("plot_pareto_front", study)


def plot_parallel(study: Study, objective: int = 0) -> Axes:
    """Optuna's parallel coordinates, coloured by an objective."""
    if len(study.directions) == 1:
        return _optuna("plot_parallel_coordinate", study)
    return _optuna(
        "plot_parallel_coordinate",
        study,
        target=lambda trial: trial.values[objective],
        target_name=f"objective {objective}",
    )


def _end_near(ax: Axes, values: NDArray[np.float64], sign: float, around: float) -> None:
    """Ends the axis `around` ranges beyond values (k,), at most, and before the terrible ones.

    Says how many of these there are.
    """
    if not len(values):
        return
    best, middle = (sign * values).max(), np.median(sign * values)
    terrible = (sign * values < middle - FENCE * (best - middle)) & (best > middle)
    kept = values[~terrible]
    ends = np.array([kept.min() - around * np.ptp(kept), kept.max() + around * np.ptp(kept)])
    if np.ptp(ends) == 0:
        return
    low, high = ends.clip(*ax.get_ylim())
    if not terrible.any() and (low, high) == ax.get_ylim():
        return  # the axis stays free to grow
    if terrible.any():
        margin = MARGIN * np.ptp(kept)
        low, high = (kept.min() - margin, high) if sign > 0 else (low, kept.max() + margin)
        height, side = (0.03, "bottom") if sign > 0 else (0.97, "top")  # where they would be
        words = f"{terrible.sum()} worse, not shown"
        ax.text(0.99, height, words, color=GREY, fontsize="small", ha="right", va=side,
                transform=ax.transAxes)  # fmt: skip
    ax.set_ylim(low, high)


def _optuna(name: str, study: Study, **options: Any) -> Any:
    plt = import_pyplot()
    with plt.rc_context(), warnings.catch_warnings():  # Optuna sets a style for good
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return getattr(optuna.visualization.matplotlib, name)(study, **options)


def _sampler_of_all(study: Study, space: Space) -> PFNSampler | None:
    """The study's sampler, if its surrogate sees all columns at once."""
    sampler = study.sampler
    if not isinstance(sampler, PFNSampler) or not sampler.has_surrogate:
        return None
    limit = sampler.max_columns
    return sampler if limit is None or space.dim <= limit else None


def _names(study: Study, space: Space) -> list[str]:
    """The space's parameters in the order in which trials asked for them."""
    trials = counted(study.get_trials(deepcopy=False))
    asked = list(dict.fromkeys(name for trial in trials for name in trial.params))
    return sorted((parameter.name for parameter in space.parameters), key=asked.index)


def _space(study: Study) -> Space:
    """The parameters that all trials share."""
    trials = counted(study.get_trials(deepcopy=False))
    return Space(intersection_search_space(trials, include_pruned=True))
