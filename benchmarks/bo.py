"""Surrogates and samplers on the problems of `objectives.py`: `python benchmarks/bo.py run`.

Every run of a method on a problem with a seed is a line of `results/bo-runs/METHOD.jsonl`, written
as soon as it is done, so that a killed benchmark continues; to repeat a method, delete its file.
Runs of `pfn` carry a fingerprint of its weights, and count while these are the shipped ones.
`report` makes results/bo.json of them: the rank of each method among all on each problem and seed,
regrets relative to what random search leaves, and seconds per suggestion beside whatever else ran
(`speed.py suggest` times them alone). Lower is better; in several objectives the hypervolume that
is missed counts. Our samplers begin with as many points as `surrogates.minimize`.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
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

import pfn
import surrogates
from pfn.card import read_card
from pfn.fresh_tasks import draw_tasks
from pfn.library import find
from pfn.plot import BLUE, GREY, INK, import_pyplot, quiet
from priors import optimization
from surrogates.optimize import STARTUP_TRIALS
from surrogates.prior_fitted import MODEL

app = typer.Typer(add_completion=False)
EVALUATIONS, AFTER, SEEDS = 40, (20, 40), 5
RIVALS = {
    "random": optuna.samplers.RandomSampler,
    "TPE": optuna.samplers.TPESampler,
    "GPSampler": optuna.samplers.GPSampler,
}
METHODS = ("pfn", "gp", "ibnn", "stp", "dkl", "ensemble", "laplace-bnn", *RIVALS)
EXPENSIVE = ("hmc-bnn", "sghmc-bnn")
FOR_EXPENSIVE = ("Branin", "Hartmann-6", "network draw, 10-d", "SVR, diabetes")
Runs = Annotated[Path, typer.Option(help="where runs are kept")]
RUNS = common.RESULTS / "bo-runs"
CHOSEN_ON = (0, 1, 2)  # seeds on which checkpoints and acquisitions were compared: they flatter pfn
DIGITS = 6  # of losses that are kept
FINGERPRINT = 12  # hexadecimal digits
FIGURE = Path(__file__).parent.parent / "docs" / "optimization.png"
TITLES = ("mean rank", "regret, random search's is 1")
OTHERS = {"color": GREY, "lw": 1.2}


@app.command()
def run(
    only: Annotated[list[str] | None, typer.Option(help="problems; all by default")] = None,
    method: Annotated[list[str] | None, typer.Option(help="methods; the cheap by default")] = None,
    seeds: int = SEEDS,
    workers: int = 2,
    runs: Runs = RUNS,
) -> None:
    """Runs what is missing, one seed of all methods and problems after the other."""
    runs.mkdir(parents=True, exist_ok=True)
    for file in runs.glob("*.jsonl"):  # without a line that was being written at a kill
        text = file.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    done = {(r["method"], r["problem"], r["seed"]) for r in read(runs)}
    missing = [
        (name, problem, seed)
        for seed in range(seeds)
        for problem in only or list(PROBLEMS)
        for name in method or METHODS
        if only or name not in EXPENSIVE or problem in FOR_EXPENSIVE
        if (name, problem, seed) not in done
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(one, *job) for job in missing]
        for count, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(cancel_futures=True)  # or the rest would run, and be lost
            kept = future.result()
            with (runs / f"{kept['method']}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")
            words = f"{kept['method']} on {kept['problem']}, {kept['seed']}"
            print(f"{count} of {len(missing)}: {words}", flush=True)


@app.command()
def report(runs: Runs = RUNS) -> None:
    """Ranks, regrets and times of all runs; seconds are means from the sixth evaluation on.

    A method that has not finished its problems with two seeds is listed without a rank. Those that
    have run others than `CHOSEN_ON` are compared on these.
    """
    losses, seconds = {}, {}
    for r in read(runs):
        losses[r["method"], r["problem"], r["seed"]] = np.array(r["losses"])
        seconds.setdefault(r["method"], []).append(r["seconds per step"])
    some = [m for m in (*METHODS, *EXPENSIVE) if m in seconds]
    methods = [m for m in some if has_run(m, losses)]
    rows = [
        summary(m, methods, losses) | {"seconds per step": float(np.median(seconds[m]))}
        for m in methods
    ]
    rows += [{"method": m, "runs": len(seconds[m])} for m in some if m not in methods]
    fresh = {key: values for key, values in losses.items() if key[2] not in CHOSEN_ON}
    tried = [m for m in methods if m not in EXPENSIVE and has_run(m, fresh)]
    unseen = [summary(m, tried, fresh) for m in tried]
    networks = [m for m in ("sghmc-bnn", "ensemble", "laplace-bnn") if m in seconds]
    pairs = [wins("hmc-bnn", other, losses) for other in networks]
    common.save("bo", rows, **{"seeds that chose nothing": unseen, "networks in pairs": pairs})
    common.save("bo-problems", by_problem(methods, losses))
    draw([m for m in methods if m not in EXPENSIVE], losses)


@app.command()
def prior(
    tasks: Annotated[int, typer.Option(help="for each size of context and number of inputs")] = 100,
) -> None:
    """Negative log densities, in nats per query, of the optimizer's checkpoint and of `gp`.

    On fresh draws of the former's prior. Both get the bounds, and set the unit of y by the context,
    as in `surrogates`.
    """
    torch.set_num_threads(1)
    rows = []
    for d in (2, 6, 12):
        bounds = torch.tensor([[0.0] * d, [1.0] * d])
        for n in (5, 20, 60):
            x, y, x_query, y_query = draw_tasks(
                optimization(), n, d, tasks=tasks, queries=32, seed=2
            )
            ours, gp = (
                pfn.predict((x, y), x_query, model=name, bounds=bounds).log_prob(y_query).mean(1)
                for name in (MODEL, "gp")
            )
            ahead = ours - gp
            rows.append(
                {
                    "inputs": d,
                    "points": n,
                    MODEL: -float(ours.mean()),
                    "gp": -float(gp.mean()),
                    "ahead by, nats": float(ahead.mean()),
                    "standard error": float(ahead.std() / math.sqrt(tasks)),
                    "ahead on, share of tasks": float((ahead > 0).double().mean()),
                }
            )
    common.save("bo-prior", rows)


def wins(
    method: str, other: str, losses: dict[tuple[str, str, int], NDArray[np.float64]]
) -> dict[str, Any]:
    """How often a method is ahead in the runs that both have done; ties count half."""
    runs = [key[1:] for key in losses if key[0] == method and (other, *key[1:]) in losses]
    row: dict[str, Any] = {"method": method, "against": other, "runs": len(runs)}
    for count in (20, 40):
        ahead = [
            np.sign(losses[other, *run][count - 1] - losses[method, *run][count - 1])
            for run in runs
        ]
        row[f"wins after {count}"] = float(sum(ahead) + len(runs)) / 2
    return row


def has_run(method: str, losses: dict[tuple[str, str, int], NDArray[np.float64]]) -> bool:
    """Whether a method has run its problems with two seeds, as a rank takes."""
    names = FOR_EXPENSIVE if method in EXPENSIVE else PROBLEMS
    return all(len(complete([method], name, losses)) >= 2 for name in names)


def read(runs: Path) -> list[dict[str, Any]]:
    """All runs that are kept, but those of other weights."""
    every = [
        json.loads(line)
        for file in sorted(runs.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return [r for r in every if r.get("weights") == weights(r["method"])]


@cache
def weights(method: str) -> str | None:
    """The first digits of the SHA-256 of the shipped weights, which only `pfn` has."""
    return read_card(find(MODEL)).weights_sha256[:FINGERPRINT] if method == "pfn" else None


def one(method: str, name: str, seed: int) -> dict[str, Any]:
    """Runs a method on a problem."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    problem = PROBLEMS[name]()
    rival = RIVALS.get(method)
    sampler = rival(seed=seed) if rival else surrogates.PFNSampler(method, seed, STARTUP_TRIALS)
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
    losses = losses_after_each(problem, np.array(values), np.array(true))
    kept = {
        "method": method,
        "problem": name,
        "seed": seed,
        "losses": [float(f"{loss:.{DIGITS}g}") for loss in losses],
        "seconds per step": round(float(np.mean(seconds[5:])), 5),
    }
    return kept | {"weights": weights(method)} if method == "pfn" else kept


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
    """Mean rank and regret of a method, with standard errors over problems.

    Its rivals are the methods that run on all problems; those of few problems are ranked one by one
    among these.
    """
    row: dict[str, Any] = {"method": method}
    rivals = [m for m in methods if m not in EXPENSIVE or m == method]
    row["runs"] = sum(len(complete(rivals, name, losses)) for name in PROBLEMS)
    for group, names in (("", list(PROBLEMS)), ("real, ", list(REAL))):
        for after in AFTER:
            ranks, regrets = [], []
            for name in names:
                if not complete(rivals, name, losses):
                    continue
                rank, regret = on_problem(method, rivals, name, after, losses)
                ranks.append(rank)
                regrets.append(regret)
            if ranks:
                row[f"{group}rank at {after}"] = f"{np.mean(ranks):.2f}"
                if len(ranks) > 1:
                    error = np.std(ranks, ddof=1) / np.sqrt(len(ranks))
                    row[f"{group}rank at {after}"] += f" ± {error:.2f}"
                row[f"{group}regret at {after}"] = float(np.mean(regrets))
    return row


def on_problem(
    method: str,
    rivals: list[str],
    name: str,
    after: int,
    losses: dict[tuple[str, str, int], NDArray[np.float64]],
) -> tuple[float, float]:
    """Mean rank over seeds, and mean regret over that of random search.

    Ranked are the rivals, of which the method is one, over the seeds that all of them have run; 1
    is the best. The regret is relative to the best value that any method found on the problem.
    """
    seeds = complete(rivals, name, losses)
    ranks = []
    for seed in seeds:
        at = np.array([losses[m, name, seed][after - 1] for m in rivals])
        mine = losses[method, name, seed][after - 1]
        ranks.append(1 + np.sum(at < mine) + (np.sum(at == mine) - 1) / 2)
    every = [values for key, values in losses.items() if key[1] == name]
    best = min(float(values.min()) for values in every)
    of = {
        m: np.mean([losses[m, name, seed][after - 1] for seed in seeds]) - best
        for m in (method, "random")
    }
    return float(np.mean(ranks)), float(of[method] / max(of["random"], 1e-12))


def draw(methods: list[str], losses: dict[tuple[str, str, int], NDArray[np.float64]]) -> None:
    """Mean ranks and regrets after each evaluation, over the problems that all have run."""
    plt = import_pyplot()
    names = [name for name in PROBLEMS if complete(methods, name, losses)]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    steps = np.arange(STARTUP_TRIALS, EVALUATIONS + 1)
    ends = []
    for method in methods:
        every = [[on_problem(method, methods, name, k, losses) for name in names] for k in steps]
        curves = np.array(every).mean(1).T  # (2, step)
        ends.append(curves[:, -1])
        for ax, curve in zip(axes, curves, strict=True):
            style = {"color": BLUE, "lw": 2.4, "zorder": 3} if method == "pfn" else OTHERS
            ax.plot(steps, curve, **style)
    for ax, values, title in zip(axes, np.array(ends).T, TITLES, strict=True):
        places = apart(values, 0.045 * float(np.ptp(ax.get_ylim())))
        for method, value, place in zip(methods, values, places, strict=True):
            color = BLUE if method == "pfn" else INK
            ax.plot([EVALUATIONS, EVALUATIONS + 1], [value, place], color=GREY, lw=0.6)
            ax.text(EVALUATIONS + 1.3, place, method, color=color, va="center", fontsize="small")
        ax.set(title=title, xlabel="evaluations", xlim=(STARTUP_TRIALS, EVALUATIONS + 8))
        ax.set_xticks(steps[::10])
        quiet(ax)
    figure.savefig(FIGURE, dpi=90)
    plt.close(figure)


def apart(values: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """Heights of labels near `values` (k,), at least so far apart from each other."""
    order = np.argsort(values, kind="stable")
    places = values[order].copy()
    for _ in range(200):
        overlap = (least - np.diff(places)).clip(0) / 2
        places[:-1] -= overlap
        places[1:] += overlap
    found = np.empty_like(places)
    found[order] = places
    return found


def complete(
    methods: list[str], name: str, losses: dict[tuple[str, str, int], NDArray[np.float64]]
) -> list[int]:
    """The seeds that all of the methods have run on a problem."""
    seeds = {seed for _, problem, seed in losses if problem == name}
    return sorted(s for s in seeds if all((m, name, s) in losses for m in methods))


def by_problem(
    methods: list[str], losses: dict[tuple[str, str, int], NDArray[np.float64]]
) -> list[dict[str, Any]]:
    """Mean losses after all evaluations over the ranked seeds, a row for each problem."""
    rows = []
    for name in PROBLEMS:
        row: dict[str, Any] = {"problem": name}
        for method in methods:
            seeds = complete(
                [m for m in methods if m not in EXPENSIVE or m == method], name, losses
            )
            ends = [losses[method, name, seed][-1] for seed in seeds]
            row[method] = float(np.mean(ends)) if ends else None
        rows.append(row)
    return rows


if __name__ == "__main__":
    app()
