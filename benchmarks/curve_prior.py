"""Priors of learning curves beside real ones, their sampling speed, and their reference posterior.

    python benchmarks/curve_prior.py compare --data FOLDER   summary statistics, and a figure
    python benchmarks/curve_prior.py speed                   against one curve at a time in NumPy
    python benchmarks/curve_prior.py reference               accuracy and time of the posterior

FOLDER holds gzipped tables in long format, `*_dev.csv.gz`, with columns dataset, run, step or
epoch, metric and value. Real curves are compared with, never fitted.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from common import measure, save
from torch import Tensor

from priors import LearningCurves, ParametricCurves

Rows = list[dict[str, Any]]
FIGURE = Path(__file__).parent.parent / "docs" / "curve-prior.png"
DRAWS = 4000
POINTS = 50  # steps of drawn curves

# where the figures of a row come from, for readers of the table
STATISTICS = """gain_after_10: y at the end less y at a tenth, its 10, 50 and 90 % quantiles;
monotone: share of curves that never fall; below_max: share that end more than 0.02 below their
maximum; roughness: median over curves of the median absolute second difference; end_given_tenth:
standard deviation of the end around its linear regression on the value at a tenth, and its R^2."""

app = typer.Typer(help=__doc__)


class Curve(NamedTuple):
    """A run: values in order of time, higher is better, in [0, 1]."""

    dataset: str
    kind: str  # accuracy or loss
    time: np.ndarray  # fractions of the run
    y: np.ndarray


@app.command()
def compare(
    data: Annotated[Path, typer.Option(help="folder of real curves")],
    seed: int = 0,
) -> None:
    """Prints and stores the statistics of real curves and of draws, and draws the figure."""
    real = list(read_curves(data))
    rows = []
    for kind in ("accuracy", "loss"):
        names = sorted({c.dataset for c in real if c.kind == kind})
        chosen = [c for c in real if c.kind == kind]
        rows.append({"source": "real", "metric": kind, **statistics(chosen)})
        for name in names:
            some = [c for c in chosen if c.dataset == name]
            if len(some) >= 20:
                rows.append({"source": name, "metric": kind, **statistics(some)})
    for name, kind, curves in drawn_curves(seed):
        rows.append({"source": name, "metric": kind, **statistics(curves)})
    save("curve-prior", rows, statistics=STATISTICS)
    draw_figure(real, seed)


@app.command()
def speed(repeats: int = 5, batch: int = 4096, points: int = 100) -> None:
    """Curves per second of batched rejection against a loop over single curves."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    lcpfn, ours, few = LearningCurves.lcpfn(points), LearningCurves(), 8

    def draw(prior: Any) -> object:
        return prior.sample(batch, points, 1, generator=torch.Generator().manual_seed(0))

    times = measure(
        {
            "lcpfn, batched": lambda: draw(lcpfn),
            "lcpfn, loop over curves (NumPy)": lambda: loop_numpy(few, points),
            "lcpfn, loop over curves and steps (Python)": lambda: loop_python(few, points),
            "lcpfn, loop over calls of one task": lambda: [
                lcpfn.sample(1, points, 1, generator=generator) for _ in range(few)
            ],
            "ours, batched": lambda: draw(ours),
            "ours, loop over calls of one task": lambda: [
                ours.sample(1, points, 1, generator=generator) for _ in range(few)
            ],
        },
        repeats,
    )
    best = {name: batch / times[f"{name}, batched"].cpu for name in ("lcpfn", "ours")}
    rows: Rows = []
    for name, timing in times.items():
        rate = (batch if "batched" in name else few) / timing.cpu
        ratio = best[name.split(",")[0]] / rate if "loop" in name else None
        rows.append({"sampler": name, "curves_per_s": rate, "batched_over_loop": ratio})
    save("curve-speed", rows, batch=batch, points=points)


@app.command()
def reference(curves: int = 25, particles: int = 8000, seed: int = 0) -> None:
    """Posterior of the published prior after 10, 20, 40 and 80 of 100 steps, on its own curves."""
    torch.set_num_threads(1)
    prior = LearningCurves.lcpfn()
    generator = torch.Generator().manual_seed(seed)
    x, y = complete_curves(prior, curves, generator)
    published = {10: 1.642, 20: 1.956, 40: 2.285, 80: 2.486}  # 10,000 curves, table 1, M3
    found: dict[int, list[list[float]]] = {n: [] for n in published}
    for i in range(curves):
        for n, entries in found.items():
            began = time.perf_counter(), time.process_time()
            draws = prior.infer((x[:n], y[i, :n]), particles=particles, seed=i)
            posterior = prior.predict(draws, x[n:])
            entry = [
                float(posterior.log_prob(y[i, n:]).mean()),
                float(posterior.log_prob_error(y[i, n:]).mean()),
                float(draws.log_evidence_error),
                time.process_time() - began[1],
                time.perf_counter() - began[0],
            ]
            entries.append(entry)
            print(i, n, *(f"{value:.3f}" for value in entry), flush=True)
    rows: Rows = []
    for n, entries in found.items():
        score, error, evidence, cpu, wall = np.array(entries).T
        rows.append(
            {
                "cut": n,
                "log_likelihood": float(score.mean()),
                "standard_error": float(score.std(ddof=1)) / math.sqrt(curves),
                "published_mcmc": published[n],
                "log_prob_error": float(np.median(error)),
                "log_prob_error_worst": float(error.max()),
                "evidence_error": float(np.median(evidence)),
                "evidence_error_worst": float(evidence.max()),
                "cpu_s": float(cpu.mean()),
                "wall_s": float(wall.mean()),
            }
        )
    save("curve-reference", rows, curves=curves, particles=particles, seed=seed)


def complete_curves(
    prior: ParametricCurves, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """All steps x (horizon,) and noisy curves y (count, horizon)."""
    tasks = prior.sample(count, prior.horizon, 1, generator=generator)
    return tasks.x[0, :, 0], tasks.y


# real and drawn curves, in the same units


def read_curves(folder: Path) -> Iterator[Curve]:
    """Validation curves of at least 10 points; losses relative to the first finite value."""
    for path in sorted(folder.glob("*_dev.csv.gz")):
        table = pd.read_csv(path)
        step = "epoch" if "epoch" in table else "step"
        table = table[table.metric.str.contains("val")]
        for (dataset, _, metric), run in table.groupby(["dataset", "run", "metric"]):
            run = run.sort_values(step)
            values = run.value.to_numpy(float)
            steps = run[step].to_numpy(float) + (run[step].min() == 0)
            kind = kind_of(metric)
            if kind is None or len(values) < 10:
                continue
            name = str(dataset) if path.name.startswith("own") else path.name.split("_")[0]
            y = as_prior_sees(values, metric)
            if y is not None:
                yield Curve(name, kind, steps / steps[-1], y)


def kind_of(metric: str) -> str | None:
    if any(word in metric for word in ("acc", "error_rate", "ssim", "mean_average", "auc")):
        return "accuracy"
    return "loss" if any(word in metric for word in ("loss", "rmse", "wer")) else None


def as_prior_sees(values: np.ndarray, metric: str) -> np.ndarray | None:
    """By the rules of `LearningCurves`; None where the first value is no scale for a loss."""
    if kind_of(metric) == "accuracy":
        finite = np.nan_to_num(values, nan=0.0)
        return 1 - finite if "error" in metric else finite
    finite = values[np.isfinite(values)]
    if not len(finite) or finite[0] <= 0:
        return None
    with np.errstate(over="ignore"):
        y = finite[0] / (finite[0] + np.where(np.isfinite(values), values.clip(0), np.inf))
    return y


def drawn_curves(seed: int) -> Iterator[tuple[str, str, list[Curve]]]:
    """Draws of the published priors and ours at POINTS regular steps."""
    for name, prior, count in (
        ("lcpfn", LearningCurves.lcpfn(POINTS), DRAWS),
        ("domhan", LearningCurves.domhan(POINTS), DRAWS // 8),
    ):
        generator = torch.Generator().manual_seed(seed)
        x, y = complete_curves(prior, count, generator)
        yield name, "accuracy", [Curve(name, "accuracy", x.numpy(), row.numpy()) for row in y]
    for kind in ("accuracy", "loss"):
        yield "ours", kind, our_curves(kind, DRAWS, seed)


def our_curves(kind: str, count: int, seed: int) -> list[Curve]:
    """Whole curves of `LearningCurves`: the tasks of draws that are regular throughout.

    Losses are put relative to their first value, as the real ones are.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = LearningCurves(metrics=(kind,)).sample(20 * count, POINTS, 1, generator=generator)
    x = tasks.x.squeeze(-1)
    regular = (x - torch.arange(1.0, POINTS + 1).double() / POINTS).abs().amax(1) < 1e-9
    x, y = x[regular][:count], tasks.y[regular][:count].clamp(0, 1)
    if kind == "loss":
        loss = 1 / y.clamp_min(1e-3) - 1  # beyond, noise of diverged runs would count
        y = 1 / (1 + loss / loss[:, :1].clamp_min(1e-9))
    return [Curve("ours", kind, a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)]


def statistics(curves: list[Curve]) -> dict[str, float]:
    """See STATISTICS."""
    tenth = np.array([c.y[np.searchsorted(c.time, 0.1)] for c in curves])
    end = np.array([c.y[-1] for c in curves])
    gain = np.quantile(end - tenth, [0.1, 0.5, 0.9])
    slope, level = np.polyfit(tenth, end, 1)
    left = end - slope * tenth - level
    rough = [float(np.median(np.abs(np.diff(c.y, 2)))) for c in curves]
    return {
        "curves": len(curves),
        "gain_10": float(gain[0]),
        "gain_50": float(gain[1]),
        "gain_90": float(gain[2]),
        "monotone": fmean(float((np.diff(c.y) >= 0).all()) for c in curves),
        "below_max": fmean(float(c.y[-1] < c.y.max() - 0.02) for c in curves),
        "roughness": float(np.median(rough)),
        "rough_90": float(np.quantile(rough, 0.9)),
        "end_sd": float(left.std()),
        "end_r2": float(1 - left.var() / end.var()),
    }


def draw_figure(real: list[Curve], seed: int, count: int = 20) -> None:
    """Curves of each source side by side: accuracies above, losses below."""
    drawn = {(name, kind): curves for name, kind, curves in drawn_curves(seed)}
    own = {"digits", "wine", "australian", "a1a", "fourclass", "pima", "energy", "algoperf"}
    panels = [
        ("real, accuracy", [c for c in real if c.kind == "accuracy" and c.dataset in own]),
        ("LearningCurves(), accuracy", drawn["ours", "accuracy"]),
        ("LearningCurves.lcpfn()", drawn["lcpfn", "accuracy"]),
        (
            "real, loss: y = l0 / (l0 + l)",
            [c for c in real if c.kind == "loss" and c.dataset in own],
        ),
        ("LearningCurves(), loss", drawn["ours", "loss"]),
        ("LearningCurves.domhan()", drawn["domhan", "accuracy"]),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.8), sharex=True, sharey=True)
    rng = np.random.default_rng(seed)
    for axis, (title, curves) in zip(axes.flat, panels, strict=True):
        for i in rng.choice(len(curves), min(count, len(curves)), replace=False):
            axis.plot(curves[i].time, curves[i].y, lw=0.7, alpha=0.8)
        axis.set_title(title, fontsize=9)
        axis.set(xlim=(0, 1), ylim=(-0.02, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("y, higher is better", fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("fraction of the run", fontsize=8)
    figure.tight_layout()
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=90)
    print(f"drew {FIGURE.name}")


def loop_numpy(curves: int, points: int) -> list[np.ndarray]:
    """The published prior as one would write it for one curve: draw, check, draw again."""
    rng = np.random.default_rng(0)
    x = np.arange(1, points + 1)
    result: list[np.ndarray] = []
    while len(result) < curves:
        w = rng.uniform(0, 1, 3)
        pow3 = rng.uniform(0, 1.25) - rng.uniform(-0.6, 0.6) * x ** -np.exp(rng.normal(0, 2))
        ilog2 = rng.uniform(0, 1) - rng.uniform(-0.5, 0.5) / np.log(x + 1)
        a, beta = rng.uniform(0, 1), rng.uniform(0, 2)
        k, delta = np.exp(rng.normal(-2, 1)), np.exp(rng.normal(0, 0.5))
        f = w[0] * pow3 + w[1] * ilog2 + w[2] * (a - (a - beta) * np.exp(-k * x**delta))
        if f[-1] > f[0] and (f >= 0).all() and (f <= 1).all():
            result.append(f + np.exp(rng.normal(-4, 1)) * rng.normal(size=points))
    return result


def loop_python(curves: int, points: int) -> list[list[float]]:
    """The same without arrays."""
    rng = random.Random(0)
    result: list[list[float]] = []
    while len(result) < curves:
        w = [rng.random() for _ in range(3)]
        c, a, alpha = rng.uniform(0, 1.25), rng.uniform(-0.6, 0.6), math.exp(rng.gauss(0, 2))
        c2, a2 = rng.random(), rng.uniform(-0.5, 0.5)
        a3, beta = rng.random(), rng.uniform(0, 2)
        k, delta = math.exp(rng.gauss(-2, 1)), math.exp(rng.gauss(0, 0.5))
        f = []
        for x in range(1, points + 1):
            pow3 = c - a * x**-alpha
            ilog2 = c2 - a2 / math.log(x + 1)
            janoschek = a3 - (a3 - beta) * math.exp(-k * x**delta)
            f.append(w[0] * pow3 + w[1] * ilog2 + w[2] * janoschek)
        if f[-1] > f[0] and min(f) >= 0 and max(f) <= 1:
            sigma = math.exp(rng.gauss(-4, 1))
            result.append([value + rng.gauss(0, sigma) for value in f])
    return result


if __name__ == "__main__":
    app()
