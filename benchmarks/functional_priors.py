"""Functional priors on real tables: a network's weights matched to a Gaussian process, or fixed.

    python benchmarks/functional_priors.py --data FOLDER

FOLDER has the six sets as SET.csv.gz, features first and target last. Network, sampler, noise and
splits are the same for all contenders; only the prior of the weights differs:

- "fixed": N(0, 1) before the scaling by the square root of the fan-in, biases N(0, 1), which is
  what the published code compares with (it scales layers so unless told otherwise);
- "fixed, unscaled": N(0, 1) weights as they are, so that functions grow with the width;
- "matched": a variance for weights and biases of each layer, from `priors.match`;
- "matched, hierarchical": the same with an inverse gamma for each weight variance.

The target of the match is the published one, a Gaussian process of ARD lengthscales, LogNormal(log
sqrt(2 d), 1) for standardised inputs, and outputscale LogNormal(0.1, 1), at the training inputs and
30 uniform ones in the range of all inputs; it sees no targets. As there, the variance of the noise
is 0.1. What differs from the publication: its tables are full, ours have 50 training rows, where
priors matter most and NUTS is quick; its network has 100 units, ours 20; it samples by stochastic
gradients. The bound on hidden variances in `match` was chosen by distances on the inputs of three
of these tables. Means and standard deviations of the training rows standardise both inputs and
targets, and scores are in original units. Runs are remembered in
results/functional-priors-runs.json: an interrupted run goes on where it was.

Reference: Tran, Rossi, Milios and Filippone, JMLR 23, 2022, arXiv 2011.12829, section 5.2.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, NamedTuple

import common  # first: it quietens OpenMP before torch starts
import numpy as np
import torch
import typer
from torch import Tensor
from torch.distributions import InverseGamma, LogNormal

from priors import BNN, GaussianProcess, match, to_config
from priors.bnn_reference import nuts_posterior
from priors.matching import distance
from priors.nuts import Settings

SETS = ("concrete", "energy", "kin8nm", "power-plant", "wine-quality-red", "yacht")
SPLITS, TRAINING_ROWS, TEST_ROWS = 5, 50, 300
NETWORK = BNN(width=20, depth=1, activation="tanh", noise=0.1)
SETTINGS = Settings(chains=4, warmup=150, draws=150)
MATCH_STEPS = 100
CONTENDERS = ("fixed", "matched", "fixed, unscaled", "matched, hierarchical")
PAIRS = (
    ("matched", "fixed"),
    ("matched, hierarchical", "fixed"),
    ("matched", "fixed, unscaled"),
    ("matched, hierarchical", "matched"),
)

Scores = dict[str, float]


class Task(NamedTuple):
    """One split, standardised by its training rows; inputs such that a network sees them so."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    x_test: Tensor  # (m, d)
    y_test: Tensor  # (m,)
    unit: float  # standard deviation of the training targets


def draw_task(table: Tensor, split: int) -> Task:
    """Split `split` of a table (rows, d + 1), the same for every contender."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(split))
    rows = table[order[: TRAINING_ROWS + TEST_ROWS]]
    training = rows[:TRAINING_ROWS]
    spread = training.std(0)
    rows = (rows - training.mean(0)) / torch.where(spread > 0, spread, 1.0)
    x = 0.5 + rows[:, :-1] / math.sqrt(12)
    x, x_test = x[:TRAINING_ROWS], x[TRAINING_ROWS:]
    y, y_test = rows[:TRAINING_ROWS, -1], rows[TRAINING_ROWS:, -1]
    return Task(x, y, x_test, y_test, float(spread[-1]))


def measurement_points(task: Task, split: int) -> Tensor:
    """The training inputs and 30 uniform ones in the range of all, (80, d)."""
    generator = torch.Generator().manual_seed(split)
    every = torch.cat([task.x, task.x_test])
    low, high = every.amin(0), every.amax(0)
    uniform = torch.rand(30, every.shape[1], dtype=every.dtype, generator=generator)
    return torch.cat([task.x, low + (high - low) * uniform])


def target(d: int) -> GaussianProcess:
    """The Gaussian process to match, its lengthscales in units of the box."""
    return GaussianProcess(
        kernel="rbf",
        lengthscale=LogNormal(math.log(math.sqrt(2 * d / 12)), 1.0),
        outputscale=LogNormal(0.1, 1.0),
        ard=True,
    )


def with_variances(weight: Any, bias: Any) -> BNN:
    """The network of all contenders with other variances of weights and biases."""
    fields = {"width": NETWORK.width, "depth": NETWORK.depth, "noise": NETWORK.noise}
    return BNN(**fields, activation=NETWORK.activation, weight_variance=weight, bias_variance=bias)


def prior_of(name: str, task: Task, split: int) -> BNN:
    """The contender's prior; its targets have no say in it."""
    d = task.x.shape[1]
    if name == "fixed":
        return with_variances(1.0, 1.0)
    if name == "fixed, unscaled":
        return with_variances((float(d), float(NETWORK.width)), 1.0)
    spread = InverseGamma(torch.tensor(3.0).double(), torch.tensor(3.0).double())
    start = with_variances(spread if "hierarchical" in name else 1.0, 1.0)
    points = measurement_points(task, split)
    return match(start, target(d), points=points, steps=MATCH_STEPS, seed=split)


def score(name: str, task: Task, split: int) -> Scores:
    """Mean negative log density (nats) and root mean square error, in original units, and more."""
    began = time.process_time()
    prior = prior_of(name, task, split)
    matched = time.process_time()
    context = (task.x, task.y)
    predictive, told = nuts_posterior(prior, context, task.x_test, seed=split, settings=SETTINGS)
    sampled = time.process_time()
    rmse = float((predictive.mean - task.y_test).square().mean().sqrt())
    points = measurement_points(task, split)
    apart = distance(prior, target(task.x.shape[1]), points=points, draws=256, repeats=4)
    return {
        "nll": math.log(task.unit) - float(predictive.log_prob(task.y_test).mean()),
        "rmse": task.unit * rmse,
        "standardised_rmse": rmse,
        "r_hat": float(told.r_hat),
        "ess": float(told.ess),
        "divergences": float(told.divergences),
        "w2": apart.covariance,
        "sliced": apart.sliced,
        "match_seconds": matched - began,
        "nuts_seconds": sampled - matched,
    }


def run(data: Path, contenders: Iterable[str], path: Path) -> dict[str, Scores]:
    """All runs, "contender/set/split" -> scores; those that `path` remembers are not repeated."""
    depends_on = {
        "network": to_config(NETWORK),
        "nuts": list(SETTINGS),
        "rows": [TRAINING_ROWS, TEST_ROWS],
        "match_steps": MATCH_STEPS,
    }
    memory = json.loads(path.read_text()) if path.exists() else {}
    runs: dict[str, Scores] = memory["runs"] if memory.get("depends_on") == depends_on else {}
    wanted = list(product(range(SPLITS), SETS, contenders))
    for done, (split, table, name) in enumerate(wanted, 1):
        key = f"{name}/{table}/{split}"
        if key in runs:
            continue
        rows = np.loadtxt(data / f"{table}.csv.gz", delimiter=",", skiprows=1)
        runs[key] = score(name, draw_task(torch.from_numpy(rows), split), split)
        told = f"nll {runs[key]['nll']:.3f}, R-hat {runs[key]['r_hat']:.3f}"
        print(f"{done}/{len(wanted)} {key}: {told}", flush=True)
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps({"depends_on": depends_on, "runs": runs}, indent=1) + "\n")
        os.replace(temporary, path)
    return {f"{c}/{t}/{s}": runs[f"{c}/{t}/{s}"] for s, t, c in wanted}


def summarise(runs: dict[str, Scores]) -> list[dict[str, Any]]:
    """One row per set and contender: means over splits, the worst R-hat, all divergences."""
    rows = []
    for table, name in product(SETS, CONTENDERS):
        chosen = [s for key, s in runs.items() if key.rsplit("/", 1)[0] == f"{name}/{table}"]
        if chosen:
            figures = ("nll", "rmse", "w2", "sliced", "match_seconds", "nuts_seconds")
            row = {figure: mean(scores[figure] for scores in chosen) for figure in figures}
            row["worst r_hat"] = max(scores["r_hat"] for scores in chosen)
            row["divergences"] = sum(int(scores["divergences"]) for scores in chosen)
            rows.append({"set": table, "prior": name, "splits": len(chosen), **row})
    return rows


def compare(runs: dict[str, Scores]) -> list[dict[str, Any]]:
    """Paired differences over common splits with standard errors; in the mean sets weigh the same.

    Those of the RMSE are in units of the training targets' standard deviation.
    """
    rows = []
    for one, other in PAIRS:
        means: dict[str, list[float]] = {"nll": [], "standardised_rmse": []}
        errors: dict[str, list[float]] = {"nll": [], "standardised_rmse": []}
        for table in SETS:
            splits = [
                split
                for split in range(SPLITS)
                if {f"{one}/{table}/{split}", f"{other}/{table}/{split}"} <= runs.keys()
            ]
            if len(splits) < 2:
                continue
            for figure in means:
                gaps = [
                    runs[f"{one}/{table}/{s}"][figure] - runs[f"{other}/{table}/{s}"][figure]
                    for s in splits
                ]
                means[figure].append(mean(gaps))
                errors[figure].append(stdev(gaps) / math.sqrt(len(gaps)))
            last = {figure: (means[figure][-1], errors[figure][-1]) for figure in means}
            rows.append(_gap(f"{one} - {other}", table, len(splits), last))
        if means["nll"]:
            overall = {
                figure: (mean(means[figure]), math.hypot(*errors[figure]) / len(errors[figure]))
                for figure in means
            }
            rows.append(_gap(f"{one} - {other}", "mean", len(splits), overall))
    return rows


def _gap(
    pair: str, table: str, splits: int, figures: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"difference": pair, "set": table, "splits": splits}
    for figure, (gap, error) in figures.items():
        row |= {figure: gap, f"{figure} error": error}
    return row


def main(
    data: Annotated[Path, typer.Option(help="folder of the six sets")],
    only: Annotated[list[str] | None, typer.Option(help=f"among {CONTENDERS}")] = None,
) -> None:
    torch.set_num_threads(1)
    common.RESULTS.mkdir(exist_ok=True)
    runs = run(data, only or CONTENDERS, common.RESULTS / "functional-priors-runs.json")
    differences = compare(runs)
    common.save("functional-priors", summarise(runs), differences=differences)
    if differences:
        common.show("paired differences", differences)


if __name__ == "__main__":
    typer.run(main)
