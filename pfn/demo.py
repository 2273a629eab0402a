"""`pfn demo`: real tables, predicted by the shipped networks and by a fitted Gaussian process.

The tables come with scikit-learn and the map with Matplotlib, so nothing is downloaded. Random
splits of 100 training rows; the Gaussian process is BoTorch's SingleTaskGP with its hyperparameters
at the maximum of the marginal likelihood times their priors.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.distributions import Distribution, Normal

import pfn
from pfn.plot import BANDS, BLUE, GREY, INK, quiet

Array = NDArray[np.float64]

TRAIN, SPLITS = 100, 3
MASSES = np.linspace(0.05, 0.95, 19)  # of the intervals in the calibration figure
ORANGE = "#D9822B"


class Score(NamedTuple):
    """How one contender did on the held-out rows of one split."""

    nll: float  # nats per row, with y in units of its standard deviation
    rmse: float  # in the same units
    seconds: float
    pit: Tensor  # (row,) the predictive cdf at the truth
    truth: Tensor
    mean: Tensor
    interval: tuple[Tensor, Tensor]  # of 90 %


def run(out: Path) -> None:
    """Prints the table of scores and writes the figures to `out`.

    Raises:
        ImportError: naming the extras that the demo needs.
    """
    try:
        import botorch  # noqa: F401
        import matplotlib.pyplot as plt
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error}. The demo needs: pip install 'pfn[bo,sklearn,plot]'."
        ) from error
    plt.switch_backend("Agg")
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    contenders = {"pfn": predict_by_pfn, "SingleTaskGP": predict_by_gp}
    sets = load_tables()
    scores: dict[tuple[str, str], list[Score]] = {}
    for call in contenders.values():
        call(*_split(*sets["iris"], seed=0)[:3])  # the first call of a library loads half of it
    jobs = [(name, seed) for name in sets for seed in range(SPLITS)]
    for name, seed in track(jobs, "Predicting", console=console, transient=True):
        data = _split(*sets[name], seed=seed)
        for contender, call in contenders.items():
            scores.setdefault((name, contender), []).append(score(call, *data))
    console.print(_table(sets, scores))
    draw_terrain(out / "terrain.png")
    draw_calibration(scores, out / "calibration.png")
    console.print(f"Figures: {out / 'terrain.png'} and {out / 'calibration.png'}")


def load_tables() -> dict[str, tuple[Array, Array]]:
    """Features (row, feature) and target (row,) of each table, the target with unit variance."""
    from sklearn import datasets

    cancer, wine = datasets.load_breast_cancer(), datasets.load_wine()
    iris = datasets.load_iris().data
    tables = {
        "diabetes": datasets.load_diabetes(return_X_y=True),
        "wine": (wine.data[:, 1:], wine.data[:, 0]),  # alcohol
        "iris": (iris[:, :3], iris[:, 3]),  # petal width
        "cell nuclei": (cancer.data[:, :9], cancer.data[:, 9]),  # fractal dimension
        "terrain": load_terrain(),
    }
    return {name: (x, y / y.std()) for name, (x, y) in tables.items()}


def load_terrain() -> tuple[Array, Array]:
    """Column and row (cell, 2) in a square of 61 x 61 cells, and its elevation in metres."""
    square = _elevation()[200:261, 80:141]
    column, row = np.meshgrid(np.arange(61.0), np.arange(61.0))
    return np.stack([column.ravel(), row.ravel()], axis=1), square.ravel()


def score(
    predict: Callable[[Array, Array, Array], Distribution],
    x: Array,
    y: Array,
    x_query: Array,
    y_query: Array,
) -> Score:
    """The scores of one contender on the held-out rows."""
    began = time.perf_counter()
    predictive = predict(x, y, x_query)
    mean = predictive.mean
    seconds = time.perf_counter() - began
    truth = torch.from_numpy(y_query)
    ends = [predictive.icdf(torch.tensor(p, dtype=torch.float64)) for p in (0.05, 0.95)]
    return Score(
        nll=-float(predictive.log_prob(truth).mean()),
        rmse=float((mean - truth).square().mean().sqrt()),
        seconds=seconds,
        pit=predictive.cdf(truth),
        truth=truth,
        mean=mean,
        interval=(ends[0], ends[1]),
    )


def predict_by_pfn(x: Array, y: Array, x_query: Array) -> Distribution:
    """The posterior predictive of the shipped network."""
    return pfn.predict((x, y), x_query)


def predict_by_gp(x: Array, y: Array, x_query: Array) -> Distribution:
    """The predictive of BoTorch's SingleTaskGP, its hyperparameters fitted."""
    from botorch import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Normalize, Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BoTorch's own, about scaling and retried fits
        model = SingleTaskGP(
            torch.from_numpy(x),
            torch.from_numpy(y).unsqueeze(-1),
            input_transform=Normalize(x.shape[1]),
            outcome_transform=Standardize(1),
        )
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        with torch.no_grad():
            posterior = model.posterior(torch.from_numpy(x_query), observation_noise=True)
            return Normal(posterior.mean.squeeze(-1), posterior.variance.sqrt().squeeze(-1))


def draw_terrain(path: Path) -> None:
    """Saves a profile of the map, predicted from few and from more of its points."""
    import matplotlib.pyplot as plt

    profile = _elevation()[240, 20:111]
    place = 0.09 * np.arange(len(profile))  # cells of 3 arc seconds, in kilometres
    grid = np.linspace(place[0], place[-1], 300)
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True, layout="constrained")
    for ax, count in zip(axes, (8, 24), strict=True):
        seen = np.random.default_rng(0).permutation(len(place))[:count]
        context = (place[seen], profile[seen])
        pfn.predict(context, grid).plot(grid, context=context, ax=ax)
        ax.plot(place, profile, color=ORANGE, lw=1.2, label="truth", zorder=2.5)
        ax.set(title=f"{count} points", xlabel="distance, km", ylabel="elevation, m")
        ax.label_outer()
    axes[0].get_legend().remove()
    axes[1].legend(frameon=False, fontsize="small", labelcolor=INK)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_calibration(scores: dict[tuple[str, str], list[Score]], path: Path) -> None:
    """Saves how often intervals held the truth, and the diabetes table with its intervals."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    for contender, color in {"pfn": BLUE, "SingleTaskGP": ORANGE}.items():
        found = [s for (_, name), each in scores.items() for s in each if name == contender]
        off_center = torch.cat([(s.pit - 0.5).abs() for s in found]).numpy()
        held = [(off_center <= mass / 2).mean() for mass in MASSES]
        left.plot(100 * MASSES, 100 * np.array(held), color=color, lw=2, label=contender)
    left.plot([0, 100], [0, 100], color=GREY, lw=1, ls="--", zorder=1, label="ideal")
    left.set(xlabel="nominal mass of the interval, %", ylabel="held-out rows inside, %")
    left.set(title="Calibration on all tables", aspect="equal", xlim=(0, 100), ylim=(0, 100))
    shown = scores["diabetes", "pfn"][0]
    order = shown.mean[:80].argsort()
    rows, truth = torch.arange(len(order)), shown.truth[order]
    lower, upper = (end[order] for end in shown.interval)
    inside = (lower <= truth) & (truth <= upper)
    right.vlines(rows, lower, upper, color=BANDS[0.5], lw=2.5, label="90% interval")
    right.plot(rows, shown.mean[order], color=BLUE, lw=2, label="mean")
    for rows_of, color, label in ((inside, INK, "inside"), (~inside, ORANGE, "outside")):
        points = rows[rows_of], truth[rows_of]
        right.scatter(*points, s=14, color=color, zorder=3, label=f"truth, {label}")
    right.set(xlabel="held-out rows, ordered by prediction", ylabel="disease progression")
    right.set(title="Diabetes")
    right.legend(frameon=False, labelcolor=INK, fontsize="small")
    for ax in (left, right):
        quiet(ax)
    left.legend(frameon=False, labelcolor=INK, loc="upper left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _split(x: Array, y: Array, seed: int) -> tuple[Array, Array, Array, Array]:
    """Training and held-out rows, at most 500 of the latter."""
    order = np.random.default_rng(seed).permutation(len(y))
    train, test = order[:TRAIN], order[TRAIN : TRAIN + 500]
    return x[train], y[train], x[test], y[test]


def _table(
    sets: dict[str, tuple[Array, Array]], scores: dict[tuple[str, str], list[Score]]
) -> Table:
    """Means over the splits, a row for each table and contender."""
    title = f"Held-out rows given {TRAIN} others, means of {SPLITS} random splits"
    table = Table(title=title, title_justify="left")
    for column in ("table, features", "contender"):
        table.add_column(column, no_wrap=True)
    for column in ("NLL, nats", "RMSE", "90 % coverage", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for (name, contender), each in scores.items():
        first = contender == "pfn"
        covered = torch.cat([(s.pit - 0.5).abs() <= 0.45 for s in each]).double().mean()
        table.add_row(
            f"{name}, {sets[name][0].shape[1]}" if first else "",
            contender,
            f"{np.mean([s.nll for s in each]):.3f}",
            f"{np.mean([s.rmse for s in each]):.3f}",
            f"{100 * float(covered):.1f} %",
            f"{np.mean([s.seconds for s in each]):.3f}",
            end_section=not first,
        )
    return table


def _elevation() -> Array:
    """The map around the Jacksboro fault that comes with Matplotlib, (row, column) in metres."""
    from matplotlib import cbook

    path = cbook.get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)
    with np.load(path) as data:
        return np.asarray(data["elevation"], dtype=np.float64)
