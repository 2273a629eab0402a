"""Simulation-based calibration of the references that are sampled: `python benchmarks/sbc.py`.

`pfn/simulation.py` draws tasks from each prior and asks its own posterior for one held-out
observation each; the p-values of its three tests go to results/sbc.json, with the seconds of a
posterior. Closed forms are tested the same way in tests/priors/test_contract.py. A killed run
continues from `--state`, where each group of tasks is kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import common  # before torch
import safetensors.torch
import torch
import typer
from torch import Tensor
from torch.distributions import Distribution, HalfCauchy, InverseGamma, LogNormal, Normal

from pfn.recipe import load_recipe
from pfn.simulation import Simulated, judge, simulate
from priors import (
    BNN,
    NNGP,
    GaussianProcess,
    LearningCurves,
    Linear,
    Mixture,
    ScaleMixture,
    Warped,
    hebo_plus,
    to_config,
)

PROGRAM = load_recipe(str(common.RECIPES / "pyro-lines.py"))
GROUP = 20  # tasks that one process simulates at a time


class Case(NamedTuple):
    """A prior, how its posterior is computed, with which options, and the size of its tasks."""

    prior: Any
    reference: str
    n: int
    d: int
    options: dict[str, Any] = {}  # noqa: RUF012
    tasks: int = 500


SIMPLE = GaussianProcess(kernel="matern52", lengthscale=0.4, outputscale=1.0, noise=0.05)
CASES = {
    "GaussianProcess": Case(GaussianProcess(), "quadrature", 10, 1),
    "GaussianProcess, ARD": Case(GaussianProcess(ard=True, outputscale=1.0), "NUTS", 6, 3),
    "NNGP": Case(NNGP(depth=(1, 3), weight_variance=2.0), "quadrature", 10, 2),
    "ScaleMixture of NNGP": Case(
        ScaleMixture(NNGP(weight_variance=2.0), InverseGamma(2.0, 2.0)), "quadrature", 10, 2
    ),
    "ScaleMixture, half-Cauchy": Case(
        ScaleMixture(SIMPLE, HalfCauchy(1.0), scaled_noise=False), "quadrature", 10, 1
    ),
    "Linear": Case(Linear(), "quadrature", 8, 3),
    "BNN": Case(BNN(6, 1), "NUTS", 6, 1),
    "BNN, hierarchical": Case(BNN(6, 1, weight_variance=InverseGamma(3.0, 3.0)), "NUTS", 6, 1),
    "Warped": Case(Warped(SIMPLE), "quadrature", 10, 1),
    "HEBO+": Case(hebo_plus(), "sequential Monte Carlo", 6, 1),
    "Mixture": Case(
        Mixture((SIMPLE, Linear(bias_variance=1.0), NNGP(bias_variance=0.3, weight_variance=2.0))),
        "quadrature",
        8,
        1,
    ),
    "lcpfn": Case(LearningCurves.lcpfn(20), "sequential Monte Carlo", 8, 1, {"particles": 1600}),
    "domhan": Case(  # 48 dimensions: some ten seconds a task
        LearningCurves.domhan(20), "sequential Monte Carlo", 8, 1, {"particles": 800}, 100
    ),
    "Pyro": Case(PROGRAM.prior, "NUTS", 6, 1),
    "GaussianProcess, random mean": Case(
        GaussianProcess(
            lengthscale=0.3, mean=Normal(0.0, 2.0), noise=LogNormal(-3.0, 1.0), outputscale=1.0
        ),
        "quadrature",
        8,
        1,
    ),
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="cases; all by default")] = None,
    most: Annotated[int, typer.Option(help="tasks per case")] = 500,
    workers: int = 2,
    state: Annotated[Path, typer.Option(help="where groups of tasks are kept")] = Path("runs/sbc"),
) -> None:
    """Simulates what is missing, and saves the table."""
    state.mkdir(parents=True, exist_ok=True)
    names = only or list(CASES)
    counts = {name: min(most, CASES[name].tasks) // GROUP for name in names}
    jobs = [(name, i, state) for name in names for i in range(counts[name])]
    missing = [job for job in jobs if not path(*job).is_file()]
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = {pool.submit(simulate_group, *job): job for job in missing}
        for done, future in enumerate(as_completed(futures)):
            future.result()
            print(f"{done + 1} of {len(missing)}: {futures[future][0]}", flush=True)
    common.save("sbc", [row(name, counts[name], state) for name in names], group=GROUP)


def simulate_group(name: str, index: int, state: Path) -> None:
    """Simulates one group of tasks, a function of its index, and keeps it with its seconds."""
    torch.set_num_threads(1)
    case, began = CASES[name], time.perf_counter()

    def posterior(x: Tensor, y: Tensor, x_query: Tensor) -> Distribution:
        seed = {} if case.reference == "quadrature" else {"seed": index}  # else errors repeat
        known: Distribution = case.prior.posterior((x, y), x_query, **case.options, **seed)
        return known

    simulated = simulate(
        case.prior, GROUP, case.n, case.d, seed=index, group=GROUP, posterior=posterior
    )
    seconds = torch.tensor((time.perf_counter() - began) / GROUP)
    content = safetensors.torch.save({**simulated._asdict(), "seconds": seconds})
    file = path(name, index, state)
    file.with_suffix(".partial").write_bytes(content)
    file.with_suffix(".partial").rename(file)


def row(name: str, groups: int, state: Path) -> dict[str, Any]:
    """The verdict on one case."""
    case = CASES[name]
    kept = [safetensors.torch.load(path(name, i, state).read_bytes()) for i in range(groups)]
    parts = {key: torch.cat([group[key].reshape(-1) for group in kept]) for key in kept[0]}
    verdict = judge(Simulated(*(parts[key] for key in Simulated._fields)))
    return {
        "prior": name,
        "reference": case.reference,
        "n": case.n,
        "d": case.d,
        "tasks": len(parts["pit"]),
        "p, transform": verdict.pit,
        "p, density rank": verdict.level,
        "p, dependence": verdict.dependence,
        "seconds per task": float(parts["seconds"].median()),
    }


def path(name: str, index: int, state: Path) -> Path:
    """The file of one group; of another prior or size it has another name."""
    case = CASES[name]
    try:
        prior = json.dumps(to_config(case.prior))
    except ValueError:
        prior = name  # not built in: remove its files when it changes
    words = f"{prior}/{case.n}/{case.d}/{case.options}/{GROUP}/{index}"
    return state / f"{hashlib.blake2b(words.encode(), digest_size=8).hexdigest()}.safetensors"


if __name__ == "__main__":
    typer.run(main)
