"""Surrogates and samplers on the problems of `objectives.py`: `python benchmarks/bo.py run`.

Every run of a method on a problem with a seed is kept in `--state` as soon as it is done, so that a
killed benchmark continues. `report` makes results/bo.json of them: the rank of each method among
all on each problem and seed, regrets relative to what random search leaves, and seconds per
suggestion. Lower is better; in several objectives the hypervolume that is missed counts.
"""

from __future__ import annotations

import json
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import common  # before torch
import numpy as np
import optuna
import torch
import typer
from numpy.typing import NDArray
from objectives import PROBLEMS, REAL, Problem, hypervolume

import surrogates

app = typer.Typer(add_completion=False)
EVALUATIONS, AFTER = 40, (20, 40)
RIVALS = {
    "random": optuna.samplers.RandomSampler,
    "TPE": optuna.samplers.TPESampler,
    "GPSampler": optuna.samplers.GPSampler,
}
METHODS = ("pfn", "gp", "ibnn", "stp", "dkl", "ensemble", "laplace-bnn", *RIVALS)
EXPENSIVE = ("hmc-bnn", "sghmc-bnn")
FOR_EXPENSIVE = ("Branin", "Hartmann-6", "network draw, 10-d", "SVR, diabetes")
State = Annotated[Path, typer.Option(help="where runs are kept")]


@app.command()
def run(
    only: Annotated[list[str] | None, typer.Option(help="problems; all by default")] = None,
    method: Annotated[list[str] | None, typer.Option(help="methods; the cheap by default")] = None,
    seeds: int = 5,
    workers: int = 2,
    state: State = Path("runs/bo-study"),
) -> None:
    """Runs what is missing, one seed of all methods and problems after the other."""
    state.mkdir(parents=True, exist_ok=True)
    jobs = [
        (name, problem, seed, state)
        for seed in range(seeds)
        for problem in only or list(PROBLEMS)
        for name in method or METHODS
    ]
    missing = [job for job in jobs if not path(*job).is_file()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(one, *job): job for job in missing}
        for done, future in enumerate(as_completed(futures)):
            name, problem, seed, _ = futures[future]
            said = f"{future.result():.0f} s"
            print(f"{done + 1} of {len(missing)}: {name} on {problem}, {seed}: {said}", flush=True)


@app.command()
def report(state: State = Path("runs/bo-study")) -> None:
    """Ranks, regrets and times of all runs, and a figure."""
    runs = [json.loads(file.read_text()) for file in sorted(state.glob("*.json"))]
    losses = {(r["method"], r["problem"], r["seed"]): np.array(r["losses"]) for r in runs}
    seconds: dict[str, list[float]] = {}
    for r in runs:
        seconds.setdefault(r["method"], []).append(float(np.mean(r["seconds"][5:])))
    methods = [m for m in (*METHODS, *EXPENSIVE) if any(key[0] == m for key in losses)]
    common.save(
        "bo",
        [
            summary(m, methods, losses) | {"seconds per step": np.median(seconds[m])}
            for m in methods
        ],
    )
    common.save("bo-problems", by_problem(methods, losses))


def one(method: str, name: str, seed: int, state: Path) -> float:
    """Runs a method on a problem, keeps the run, and returns its seconds."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    problem, began = PROBLEMS[name](), time.perf_counter()
    rival = RIVALS.get(method)
    sampler = rival(seed=seed) if rival else surrogates.PFNSampler(method, seed=seed)
    count = max(1, len(problem.reference))
    study = optuna.create_study(directions=["minimize"] * count, sampler=sampler)
    values, true, seconds = [], [], []
    for _ in range(EVALUATIONS):
        asked = time.perf_counter()
        trial = study.ask(problem.space)
        seconds.append(time.perf_counter() - asked)
        value = problem.function(trial.params)
        study.tell(trial, value)
        values.append(value)
        true.append(problem.true(trial.params) if problem.true else value)
    content = {
        "method": method,
        "problem": name,
        "seed": seed,
        "losses": losses_after_each(problem, np.array(values), np.array(true)).tolist(),
        "seconds": seconds,
    }
    file = path(method, name, seed, state)
    file.with_suffix(".partial").write_text(json.dumps(content))
    file.with_suffix(".partial").rename(file)
    return time.perf_counter() - began


def losses_after_each(
    problem: Problem, values: NDArray[Any], true: NDArray[Any]
) -> NDArray[np.float64]:
    """What is to be small after each evaluation (evaluation,).

    The least value; with noise, the true value where the least was seen; with several objectives,
    minus the hypervolume.
    """
    steps = range(1, len(values) + 1)
    if problem.reference:
        return np.array([-hypervolume(values[:step], problem.reference) for step in steps])
    return np.array([true[int(values[:step].argmin())] for step in steps])


def summary(
    method: str, methods: list[str], losses: dict[tuple[str, str, int], NDArray[np.float64]]
) -> dict[str, Any]:
    """Mean rank and regret of a method, with standard errors over problems."""
    row: dict[str, Any] = {"method": method}
    for group, names in (("", list(PROBLEMS)), ("real, ", list(REAL))):
        for after in AFTER:
            ranks, regrets = [], []
            for name in names:
                if not any((method, name, seed) in losses for seed in range(100)):
                    continue
                rank, regret = on_problem(method, methods, name, after, losses)
                ranks.append(rank)
                regrets.append(regret)
            if ranks:
                error = np.std(ranks, ddof=1) / np.sqrt(len(ranks)) if len(ranks) > 1 else np.nan
                row[f"{group}rank at {after}"] = f"{np.mean(ranks):.2f} ± {error:.2f}"
                row[f"{group}regret at {after}"] = float(np.mean(regrets))
    return row


def on_problem(
    method: str,
    methods: list[str],
    name: str,
    after: int,
    losses: dict[tuple[str, str, int], NDArray[np.float64]],
) -> tuple[float, float]:
    """Mean rank over seeds, and mean regret over that of random search.

    Only methods that ran on most problems are ranked; 1 is the best. The regret is relative to the
    best value that any method found on the problem.
    """
    rivals = [m for m in methods if m not in EXPENSIVE or m == method]
    seeds = [s for s in range(100) if (method, name, s) in losses]
    ranks = []
    for seed in seeds:
        at = np.array(
            [losses[m, name, seed][after - 1] for m in rivals if (m, name, seed) in losses]
        )
        mine = losses[method, name, seed][after - 1]
        ranks.append(1 + np.sum(at < mine) + (np.sum(at == mine) - 1) / 2)
    every = [values for key, values in losses.items() if key[1] == name]
    best = min(float(values.min()) for values in every)
    of = {
        m: np.mean([v[after - 1] for k, v in losses.items() if k[:2] == (m, name)]) - best
        for m in (method, "random")
    }
    return float(np.mean(ranks)), float(of[method] / max(of["random"], 1e-12))


def by_problem(
    methods: list[str], losses: dict[tuple[str, str, int], NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """Mean losses after all evaluations, a row for each problem."""
    rows = []
    for name in PROBLEMS:
        row: dict[str, Any] = {"problem": name}
        for method in methods:
            ends = [v[-1] for k, v in losses.items() if k[:2] == (method, name)]
            row[method] = float(np.mean(ends)) if ends else None
        if any(row[method] is not None for method in methods):
            rows.append(row)
    return rows


def path(method: str, name: str, seed: int, state: Path) -> Path:
    words = f"{name}--{method}--{seed}".replace(" ", "-").replace(",", "")
    return state / f"{words}.json"


if __name__ == "__main__":
    app()
