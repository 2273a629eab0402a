"""The gap against compute: states of one training run, each beside the exact posterior.

    cp runs/gp/state.safetensors runs/states/1.safetensors   # now and then, while it trains
    python benchmarks/compute.py pretrained/recipes/gp.py runs/states/*.safetensors

The learning rate is still high in all states but the last: each but that would have a smaller gap
at the end of a schedule of its own. Cells and tasks are those of the certificate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import common  # first: it quietens OpenMP before torch starts
import safetensors
import torch
import typer

from pfn.card import ModelCard
from pfn.certify import compute_references, default_cells, gap_by_cell
from pfn.model import PFN
from pfn.pretrain import architecture
from pfn.recipe import load_recipe
from pfn.transformer import Transformer
from priors import ReferencePrior


def main(
    recipe: Annotated[str, typer.Argument(help="the file that the run followed")],
    states: Annotated[list[Path], typer.Argument(help="copies of its state.safetensors")],
    references: Annotated[Path, typer.Option(help="where references are kept")] = Path(
        "runs/references"
    ),
) -> None:
    """Prints one row per state: seconds, tasks, and the gap over the certificate's cells."""
    torch.set_num_threads(1)
    name, prior, config = load_recipe(recipe)
    assert isinstance(prior, ReferencePrior), "a gap needs a reference posterior"
    network = architecture(prior, config)
    cells = default_cells(config.max_features, config.max_context)
    tasks = 200 if config.max_features == 1 else 30
    answers = compute_references(prior, cells, references, tasks=tasks)
    rows: list[dict[str, Any]] = []
    for path in states:
        with safetensors.safe_open(path, "pt") as file:
            spent = json.loads(file.metadata()["progress"])
            prefix = "average."
            weights = {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()
                if key.startswith(prefix)
            }
        model = Transformer(network).requires_grad_(False).eval()
        model.load_state_dict(weights)
        pfn = PFN(model, ModelCard(name, network, prior=None, max_context=config.max_context))
        gap = gap_by_cell(pfn, prior, cells, answers)
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
