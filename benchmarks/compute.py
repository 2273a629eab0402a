"""The gap against compute: runs of one recipe with other budgets, each at its schedule's end.

    pfn pretrain pretrained/recipes/gp.py --tasks 30000 --out runs/gp-30000
    python benchmarks/compute.py measure pretrained/recipes/gp.py runs/gp-30000 pretrained/gp
    python benchmarks/compute.py fit gp

Cells are those of the certificate, and so are their tasks unless `--per-cell` says otherwise. The
fit is a power law in the number of training tasks, which on one network and prior is proportional
to compute, by weighted least squares of logarithms; the runs are asked the same, so that the errors
of the gaps are correlated and the stated error of the slope is too large.

Where the prior has no reference posterior, what is measured is the loss, and the power law falls to
a limit that three runs decide: what training without end would leave of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import common  # first: it quietens OpenMP before torch starts
import numpy as np
import torch
import typer
from scipy.optimize import brentq

import pfn
from pfn.certify import Cell, compute_references, default_cells, gap_by_cell, log_prob
from pfn.fresh_tasks import draw_tasks
from pfn.model import PFN
from pfn.recipe import load_recipe
from priors import Prior, ReferencePrior
from priors.tasks import knows_posterior

Array = np.ndarray
Row = dict[str, Any]

LOSS, GAIN, GAIN_ERROR = "loss, nats", "gained on the run before, nats", "error of the gain"
SLOPES = (-10.0, -1e-6)  # of a law with a limit, between which its own is looked for

app = typer.Typer(help=__doc__)


@app.command()
def measure(
    recipe: Annotated[str, typer.Argument(help="the file that the run followed")],
    runs: Annotated[list[Path], typer.Argument(help="folders of checkpoints made by it")],
    references: Annotated[Path, typer.Option(help="where references are kept")] = Path(
        "runs/references"
    ),
    per_cell: Annotated[
        int | None, typer.Option(help="tasks of each cell; as in the certificate")
    ] = None,
) -> None:
    """Prints one row per run: its tasks, and its gap, or its loss, over the certificate's cells."""
    torch.set_num_threads(1)
    name, prior, config = load_recipe(recipe)
    cells = default_cells(config.max_features, config.max_context)
    if per_cell is None:
        per_cell = 200 if config.max_features == 1 else 30
    networks = sorted(map(load, runs), key=lambda network: network.card.training["tasks"])
    if knows_posterior(prior):
        measured = measure_gaps(networks, prior, cells, references, per_cell)
    else:
        measured = measure_losses(networks, prior, cells, per_cell)
    rows = []
    for network, row in zip(networks, measured, strict=True):
        spent = network.card.training
        effort = {"training s": round(spent["seconds"]), "tasks": spent["tasks"]}
        rows.append({"recipe": name, **effort, **row})
    common.save(f"compute-{name}", rows)


def load(folder: Path) -> PFN:
    """The network of a run that began with random weights, so that its tasks are all it has had."""
    network = pfn.load(folder)
    start = network.card.training["recipe"].get("init")
    if start:
        raise ValueError(
            f"Expected runs from random weights; {folder} began with those of {start!r}, so that"
            " its tasks are not all that it has had."
        )
    return network


def measure_gaps(
    networks: list[PFN], prior: ReferencePrior, cells: list[Cell], folder: Path, per_cell: int
) -> list[Row]:
    """Each network's gap to the reference posterior, on the same tasks."""
    answers = compute_references(prior, cells, folder, tasks=per_cell)
    rows = []
    for network in networks:
        gap = gap_by_cell(network, prior, cells, answers)
        row = {"gap, nats": gap["mean"], "standard error": gap["standard_error"]}
        rows.append(row | _by_n(cells, [cell["mean"] for cell in gap["cells"]]))
    return rows


def measure_losses(
    networks: list[PFN], prior: Prior, cells: list[Cell], per_cell: int
) -> list[Row]:
    """Each network's negative log density of queries, and what it gains on the one before."""
    splits = [draw_tasks(prior, n, d, tasks=per_cell, queries=64, seed=0) for n, d in cells]
    rows: list[Row] = []
    before = None
    for network in networks:
        by_task = [-log_prob(network, split).mean(1) for split in splits]
        loss = torch.stack(by_task).double()  # (cell, task)
        row = {LOSS: float(loss.mean())}
        if before is not None:
            gain = before - loss
            error = (gain.var(1) / per_cell).sum().sqrt() / len(cells)
            row |= {GAIN: float(gain.mean()), GAIN_ERROR: float(error)}
        rows.append(row | _by_n(cells, loss.mean(1).tolist()))
        before = loss
    return rows


@app.command()
def fit(recipe: Annotated[str, typer.Argument(help="the name of one that was measured")]) -> None:
    """The power law of the measured gaps or losses, and what it says of more compute."""
    rows = json.loads((common.RESULTS / f"compute-{recipe}.json").read_text())["rows"]
    common.save(f"compute-fit-{recipe}", fit_losses(rows) if LOSS in rows[0] else fit_gaps(rows))


def fit_gaps(rows: list[Row]) -> list[Row]:
    """The law through all runs, and those through each pair of neighbours."""
    tasks, gaps, errors = (
        np.array([row[name] for row in rows], dtype=float)
        for name in ("tasks", "gap, nats", "standard error")
    )
    slope, error = power_law(tasks, gaps, errors)
    local = np.diff(np.log(gaps)) / np.diff(np.log(tasks))
    fitted = [_law(tasks[0], tasks[-1], slope, gaps[-1], error)]
    fitted += [_law(tasks[i], tasks[i + 1], float(each), gaps[-1]) for i, each in enumerate(local)]
    return fitted


def fit_losses(rows: list[Row]) -> list[Row]:
    """The law with a limit through the last three runs.

    Its error is that of the two gains' ratio, as if they were independent.

    Raises:
        ValueError: if fewer runs were measured, or as `law_with_limit` does.
    """
    if len(rows) < 3:
        raise ValueError(f"Expected three runs, for a law with a limit; got {len(rows)}.")
    tasks = np.array([row["tasks"] for row in rows[-3:]], dtype=float)
    gains, errors = (np.array([row[name] for row in rows[-2:]]) for name in (GAIN, GAIN_ERROR))
    slope, gap = law_with_limit(tasks, gains)
    step = 1e-4  # of the ratio's logarithm
    changed, _ = law_with_limit(tasks, gains * [1 + step, 1])
    error = float(np.hypot(*(errors / gains))) * abs(changed - slope) / step
    return [_law(tasks[0], tasks[-1], slope, gap, error) | {"gap of the last run": gap}]


def law_with_limit(tasks: Array, gains: Array) -> tuple[float, float]:
    """The slope of log(loss - limit) in log tasks, and the last run's distance from the limit.

    Three runs and the two gains between them decide both.

    Raises:
        ValueError: unless gains are positive and shrink per logarithm of tasks.
    """

    def mismatch(slope: float) -> float:
        first, second = -np.diff((tasks / tasks[-1]) ** slope)
        return float(first / second - gains[0] / gains[1])

    if gains.min() <= 0 or mismatch(SLOPES[0]) <= 0 or mismatch(SLOPES[1]) >= 0:
        raise ValueError(
            "Expected gains that are positive and shrink per logarithm of tasks, as towards a"
            f" limit; got {gains} nats between runs of {tasks} tasks."
        )
    slope = float(brentq(mismatch, *SLOPES))
    return slope, float(gains[1] / ((tasks[1] / tasks[2]) ** slope - 1))


def _law(first: float, last: float, slope: float, gap: float, error: float | None = None) -> Row:
    return {
        "between": f"{first:,.0f} and {last:,.0f} tasks",
        "exponent": slope,
        "standard error": error,
        "compute that halves the gap": 2 ** (-1 / slope),
        "gap of ten times the compute": gap * 10**slope,
    }


def power_law(tasks: Array, gaps: Array, errors: Array) -> tuple[float, float]:
    """The slope of log gap in log tasks, and its standard error."""
    weights = gaps / errors  # one over the standard error of each logarithm
    design = np.stack([np.log(tasks), np.ones_like(tasks)], 1) * weights[:, None]
    covariance = np.linalg.inv(design.T @ design)
    slope, _ = covariance @ design.T @ (np.log(gaps) * weights)
    return float(slope), math.sqrt(covariance[0, 0])


def _by_n(cells: list[Cell], values: list[float]) -> Row:
    """The mean over the cells of each size of context."""
    sizes = sorted({n for n, _ in cells})
    by_size = [[v for (n, _), v in zip(cells, values, strict=True) if n == m] for m in sizes]
    return {f"n = {n}": sum(size) / len(size) for n, size in zip(sizes, by_size, strict=True)}


if __name__ == "__main__":
    app()
