"""The gap against compute: runs of one recipe with other budgets, each at its schedule's end.

    pfn pretrain pretrained/recipes/gp.py --seconds 300 --out runs/gp-300
    python benchmarks/compute.py pretrained/recipes/gp.py runs/gp-300 runs/gp-900 pretrained/gp

Cells and tasks are those of the certificate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import common  # first: it quietens OpenMP before torch starts
import torch
import typer

import pfn
from pfn.certify import compute_references, default_cells, gap_by_cell
from pfn.recipe import load_recipe
from priors import ReferencePrior


def main(
    recipe: Annotated[str, typer.Argument(help="the file that the run followed")],
    runs: Annotated[list[Path], typer.Argument(help="folders of checkpoints made by it")],
    references: Annotated[Path, typer.Option(help="where references are kept")] = Path(
        "runs/references"
    ),
) -> None:
    """Prints one row per run: seconds, tasks, and the gap over the certificate's cells."""
    torch.set_num_threads(1)
    name, prior, config = load_recipe(recipe)
    assert isinstance(prior, ReferencePrior), "a gap needs a reference posterior"
    cells = default_cells(config.max_features, config.max_context)
    tasks = 200 if config.max_features == 1 else 30
    answers = compute_references(prior, cells, references, tasks=tasks)
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
    rows.sort(key=lambda row: row["training s"])
    common.save(f"compute-{name}", rows)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    typer.run(main)
