"""The gap against compute: runs of one recipe with other budgets, each at its schedule's end.

    pfn pretrain pretrained/recipes/gp.py --tasks 30000 --out runs/gp-30000
    python benchmarks/compute.py measure pretrained/recipes/gp.py runs/gp-30000 pretrained/gp
    python benchmarks/compute.py fit gp

Cells are those of the certificate, and so are their tasks unless `--per-cell` says otherwise. The
fit is a power law in the number of training tasks, which on one network and prior is proportional
to compute, by weighted least squares of logarithms; the runs are asked the same, so that the errors
of the gaps are correlated and the stated error of the slope is too large.
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

import pfn
from pfn.certify import compute_references, default_cells, gap_by_cell
from pfn.recipe import load_recipe
from priors import ReferencePrior

Array = np.ndarray


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
    """Prints one row per run: seconds, tasks, and the gap over the certificate's cells."""
    torch.set_num_threads(1)
    name, prior, config = load_recipe(recipe)
    assert isinstance(prior, ReferencePrior), "a gap needs a reference posterior"
    cells = default_cells(config.max_features, config.max_context)
    if per_cell is None:
        per_cell = 200 if config.max_features == 1 else 30
    answers = compute_references(prior, cells, references, tasks=per_cell)
    rows: list[dict[str, Any]] = []
    for folder in runs:
        network = pfn.load(folder)
        spent = network.card.training
        gap = gap_by_cell(network, prior, cells, answers)
        by_n = {
            f"n = {n}": _mean([row["mean"] for row in gap["cells"] if row["n"] == n])
            for n in sorted({n for n, _ in cells})
        }
        rows.append(
            {
                "recipe": name,
                "training s": round(spent["seconds"]),
                "tasks": spent["tasks"],
                "gap, nats": gap["mean"],
                "standard error": gap["standard_error"],
                **by_n,
            }
        )
    rows.sort(key=lambda row: row["tasks"])
    common.save(f"compute-{name}", rows)


@app.command()
def fit(recipe: Annotated[str, typer.Argument(help="the name of one that was measured")]) -> None:
    """The power law of the measured gaps, and what it says of more compute."""
    rows = json.loads((common.RESULTS / f"compute-{recipe}.json").read_text())["rows"]
    tasks, gaps, errors = (
        np.array([row[name] for row in rows], dtype=float)
        for name in ("tasks", "gap, nats", "standard error")
    )
    slope, error = power_law(tasks, gaps, errors)
    local = np.diff(np.log(gaps)) / np.diff(np.log(tasks))
    rows = [
        {
            "between": f"{tasks[0]:,.0f} and {tasks[-1]:,.0f} tasks",
            "exponent": slope,
            "standard error": error,
            "compute that halves the gap": 2 ** (-1 / slope),
            "gap of ten times the compute": gaps[-1] * 10**slope,
        }
    ]
    for i, each in enumerate(local):
        rows.append(
            {
                "between": f"{tasks[i]:,.0f} and {tasks[i + 1]:,.0f} tasks",
                "exponent": float(each),
                "compute that halves the gap": 2 ** (-1 / each),
                "gap of ten times the compute": gaps[-1] * 10**each,
            }
        )
    common.save(f"compute-fit-{recipe}", rows)


def power_law(tasks: Array, gaps: Array, errors: Array) -> tuple[float, float]:
    """The slope of log gap in log tasks, and its standard error."""
    weights = gaps / errors  # one over the standard error of each logarithm
    design = np.stack([np.log(tasks), np.ones_like(tasks)], 1) * weights[:, None]
    covariance = np.linalg.inv(design.T @ design)
    slope, _ = covariance @ design.T @ (np.log(gaps) * weights)
    return float(slope), math.sqrt(covariance[0, 0])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    app()
