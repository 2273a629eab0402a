"""Early stopping: what it saves on real sweeps of trainings, and what it loses.

    python benchmarks/stopping.py run --data FOLDER    all tasks; goes on where it was
    python benchmarks/stopping.py report
    python benchmarks/stopping.py beside --data FOLDER    what the runs before a run add

A task is a sweep, whose runs come in random order, as in Adriaensen et al. (NeurIPS 2023, section
4.3): a run may be stopped after any step but the first, and is not resumed. Budgets are 20 complete
runs, over 40 orders. FOLDER is that of `curve_prior.py`. Values are in units of y in [0, 1], higher
is better: accuracies, or losses relative to the median first loss of the sweep. The prior was
compared with these curves, though never trained on them. Rules decide "at once", or as `StopRule`
does, after 5 steps and by two decisions in a row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, NamedTuple

import common  # before torch
import curve_baselines as baselines
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import torch
import typer
from curve_baselines import Array, Beginning
from curves import read_trainings

from pfn.plot import BLUE, GREY, INK, quiet
from surrogates.extrapolation import Reader, Sibling
from surrogates.stopping import ASKED

app = typer.Typer(add_completion=False, help=__doc__)
RESULTS = Path(__file__).parent / "results" / "stopping.jsonl"
FIGURE = Path(__file__).parent.parent / "docs" / "early-stopping.png"
RUNS, ORDERS, DELTA = 20, 40, 0.05
SHORTEST = 10  # run that is looked at
EVERY, FEW = 5, 5  # steps between decisions, and orders, of runs beside siblings
WORTH = 0.001  # what a stopped run must have gained for its stop to have been wrong
SHOWN = {  # markers of the figure, beside patience
    "pfn": "o",
    "pfn, at once": "s",
    "trend": "^",
    "last value": "v",
    "Optuna median": "x",
    "Optuna Hyperband": "+",
}
PATIENCE = (1, 2, 3, 5, 7, 10, 15, 20, 30)
SHARES = (0.1, 0.2, 0.4, 0.8)  # of runs, at which baselines are fitted


class Sweep(NamedTuple):
    """All runs of a task."""

    name: str
    kind: str  # accuracy or loss
    raw: list[Array]  # values of the metric, finite or not
    y: list[Array]  # what is compared
    scale: float = 1.0  # of a loss: the one at which y is 1/2

    @property
    def mode(self) -> str:
        return "max" if self.kind == "accuracy" else "min"


class Outcome(NamedTuple):
    """Of the runs of one order."""

    used: list[int]  # steps of each run
    best: Array  # the best value after each step of them all, in turn
    wrong: list[bool]  # whether a run was stopped that would have led


Stopper = Callable[[int, float], int]  # of a run and the best so far: steps that it gets


def read_sweeps(folder: Path) -> Iterator[Sweep]:
    """Validation metrics of the small trainings and of TaskSet."""
    for path, step in (("own_dev.csv.gz", "epoch"), ("taskset_dev.csv.gz", "step")):
        table = pd.read_csv(folder / path)
        step = step if step in table else "epoch"
        table = table[table.metric.str.contains("val")]
        for (name, metric), runs in table.groupby(["dataset", "metric"]):
            kind = "accuracy" if "acc" in metric else "loss"
            raw = [run.sort_values(step).value.to_numpy(float) for _, run in runs.groupby("run")]
            raw = [values for values in raw if len(values) >= SHORTEST]
            if kind == "accuracy":
                yield Sweep(str(name), kind, raw, raw)
                continue
            first = float(np.median([values[0] for values in raw if np.isfinite(values[0])]))
            with np.errstate(over="ignore", invalid="ignore"):
                y = [np.nan_to_num(first / (first + values), nan=0.0) for values in raw]
            yield Sweep(str(name), kind, raw, y, first)


# who stops


def levels_of_network(sweep: Sweep, model: str) -> list[Array]:
    """For each run and step: the least best-so-far that the rest beats with probability DELTA."""
    levels = []
    for values in sweep.raw:
        reader, of_run = Reader(model), np.full(len(values), np.inf)
        for seen in range(2, len(values)):
            of_run[seen - 1] = level_of_network(sweep, reader, values, seen)
        levels.append(of_run)
    return levels


def level_of_network(sweep: Sweep, reader: Reader, values: Array, seen: int) -> float:
    """In units of y, after the first values of a run."""
    curve = reader.extrapolate(values[:seen], len(values), mode=sweep.mode, most=ASKED)
    level = curve.quantile_best(1 - DELTA)
    return level if sweep.kind == "accuracy" else sweep.scale / (sweep.scale + level)


def levels_of_baseline(sweep: Sweep, predict: Callable[[Beginning], Any]) -> list[Array]:
    """Likewise, that no single value of the rest beats with probability DELTA, as published."""
    levels = []
    for y in sweep.y:
        time, of_run = np.arange(1.0, len(y) + 1) / len(y), np.full(len(y), np.inf)
        for seen in range(2, len(y)):
            answer = predict(Beginning(time, y, seen))
            of_run[seen - 1] = baselines.quantile(answer, 1 - DELTA).max()
        levels.append(of_run)
    return levels


def by_levels(
    sweep: Sweep, levels: list[Array], *, warmup: int = 1, patience: int = 1, min_delta: float = 0
) -> Stopper:
    """Stops once the best so far, or the run's own, is beyond the level, several times in a row."""
    own = [np.maximum.accumulate(y) for y in sweep.y]

    def steps(run: int, best: float) -> int:
        hopeless = np.maximum(own[run], best) + min_delta >= levels[run]
        hopeless[:warmup] = False
        hopeless[-1] = False
        rows = np.convolve(hopeless, np.ones(patience), "full")[: len(hopeless)] >= patience
        return int(rows.argmax()) + 1 if rows.any() else len(hopeless)

    return steps


def by_siblings(sweep: Sweep, model: str, places: list[Array] | None) -> Stopper:
    """As `by_levels`, every few steps, with all runs before a run as its siblings, as they ended.

    Args:
        places: hyperparameters of all runs; None for no siblings.
    """
    before: list[int] = []
    used: dict[int, int] = {}

    def steps(run: int, best: float) -> int:
        values, beside, place = sweep.raw[run], [], None
        if places is not None:
            place = places[run]
            beside = [Sibling(sweep.raw[i][: min(used[i], len(values))], places[i]) for i in before]
        reader, used[run] = Reader(model, beside, place), len(values)
        for seen in range(EVERY, len(values), EVERY):
            led = max(best, float(sweep.y[run][:seen].max()))
            if led >= level_of_network(sweep, reader, values, seen):
                used[run] = seen
                break
        before.append(run)
        return used[run]

    return steps


def by_patience(sweep: Sweep, patience: int) -> Stopper:
    """Stops once the run's best is `patience` steps old."""
    lengths = []
    for y in sweep.y:
        best = np.maximum.accumulate(y)
        since = np.zeros(len(y), dtype=int)
        for t in range(1, len(y)):
            since[t] = 0 if y[t] > best[t - 1] else since[t - 1] + 1
        found = np.flatnonzero(since >= patience)
        lengths.append(int(found[0]) + 1 if len(found) else len(y))
    return lambda run, best: lengths[run]


def run_all(sweep: Sweep, run: int, best: float) -> int:
    """Stops nothing."""
    return len(sweep.y[run])


def by_oracle(sweep: Sweep) -> Stopper:
    """Stops after one step what will not lead, and at its best what will."""

    def steps(run: int, best: float) -> int:
        y = sweep.y[run]
        return int(y.argmax()) + 1 if y.max() > best else 1

    return steps


def by_optuna(sweep: Sweep, make: Callable[[int], Any], order: int) -> Stopper:
    """A pruner of Optuna, in a study of its own for an order."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    longest = max(map(len, sweep.y))
    study = optuna.create_study(
        study_name=f"{sweep.name} {order}", direction="maximize", pruner=make(longest)
    )

    def steps(run: int, best: float) -> int:
        trial, y = study.ask(), sweep.y[run]
        for t, value in enumerate(y.tolist(), 1):
            trial.report(value, t)
            if t < len(y) and trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                return t
        study.tell(trial, float(y.max()))
        return len(y)

    return steps


# what comes of it


def simulate(sweep: Sweep, order: Sequence[int], stopper: Stopper, budget: int) -> Outcome:
    """Runs in an order, until as many steps as `budget` are used."""
    best, used, wrong, trace = -np.inf, [], [], []
    for run in order:
        y = sweep.y[run]
        steps = stopper(run, best)
        used.append(steps)
        trace.append(np.maximum(np.maximum.accumulate(y[:steps]), best))
        led = max(best, float(y[:steps].max()))
        wrong.append(steps < len(y) and float(y[steps:].max()) > led + WORTH)
        best = led
        if sum(used) >= budget:
            break
    return Outcome(used, np.concatenate(trace), wrong)


def study(
    sweep: Sweep, stoppers: dict[str, Callable[[int], Stopper]], count: int = ORDERS
) -> list[dict[str, Any]]:
    """Rows of a task over `count` orders, one for each method."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(sweep.y)).tolist() for _ in range(count)]
    budgets = [sum(len(sweep.y[run]) for run in order[:RUNS]) for order in orders]
    top = max(float(y.max()) for y in sweep.y)
    complete = [
        simulate(sweep, order[:RUNS], partial(run_all, sweep), budget)
        for order, budget in zip(orders, budgets, strict=True)
    ]
    regret = fmean(top - float(o.best[-1]) for o in complete)
    rows = []
    for method, make in stoppers.items():
        found = [
            simulate(sweep, order, make(i), budget)
            for i, (order, budget) in enumerate(zip(orders, budgets, strict=True))
        ]
        share = np.linspace(0, 1, 401)[1:]  # of the budget
        mean = np.mean(
            [
                top - o.best[np.minimum((share * b).astype(int), len(o.best)) - 1]
                for o, b in zip(found, budgets, strict=True)
            ],
            axis=0,
        )
        reached = np.flatnonzero(mean <= regret + 1e-12)
        same = [o.best[sum(o.used[:RUNS]) - 1] for o in found]
        rows.append(
            {
                "task": sweep.name,
                "metric": sweep.kind,
                "method": method,
                "speed-up at equal regret": 1 / float(share[reached[0]]) if len(reached) else 0.0,
                "final regret": float(mean[-1]),
                "regret without": regret,
                "speed-up, same runs": fmean(
                    b / sum(o.used[:RUNS]) for o, b in zip(found, budgets, strict=True)
                ),
                "lost, points": 100
                * fmean(float(c.best[-1] - s) for c, s in zip(complete, same, strict=True)),
                "wrong stops": fmean(fmean(o.wrong[:RUNS]) for o in found),
            }
        )
    return rows


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="folder of real curves")], model: str = "curves"
) -> None:
    """All tasks; those that have results are left out."""
    torch.set_num_threads(1)
    done = {(row["task"], row["metric"]) for row in read_rows()}
    sweeps = list(read_sweeps(data))
    for sweep in sweeps:
        if (sweep.name, sweep.kind) in done:
            continue
        others = [s for s in sweeps if s.name != sweep.name and s.kind == sweep.kind]
        train = [
            Beginning(np.arange(1.0, len(y) + 1) / len(y), y, max(2, round(share * len(y))))
            for other in others
            for y in other.y[:20]
            for share in SHARES
        ]
        last, trend = baselines.fit_last(train), baselines.fit_trend(train)
        ours = levels_of_network(sweep, model)
        of_last = levels_of_baseline(sweep, partial(baselines.predict_last, last))
        of_trend = levels_of_baseline(sweep, partial(baselines.predict_trend, trend))
        fixed: dict[str, Stopper] = {
            "no stopping": partial(run_all, sweep),
            "pfn, at once": by_levels(sweep, ours),
            "pfn": by_levels(sweep, ours, warmup=5, patience=2),
            "pfn, worth 0.1 point": by_levels(sweep, ours, warmup=5, patience=2, min_delta=WORTH),
            "last value, at once": by_levels(sweep, of_last),
            "last value": by_levels(sweep, of_last, warmup=5, patience=2),
            "trend, at once": by_levels(sweep, of_trend),
            "trend": by_levels(sweep, of_trend, warmup=5, patience=2),
            **{f"patience {k}": by_patience(sweep, k) for k in PATIENCE},
            "oracle": by_oracle(sweep),
        }
        stoppers: dict[str, Callable[[int], Stopper]] = {
            name: partial(_same, stopper) for name, stopper in fixed.items()
        }
        for name, make in (
            ("Optuna median", lambda longest: optuna.pruners.MedianPruner()),
            ("Optuna Hyperband", lambda m: optuna.pruners.HyperbandPruner(max_resource=m)),
        ):
            stoppers[name] = partial(by_optuna, sweep, make)
        with RESULTS.open("a") as file:
            for row in study(sweep, stoppers):
                file.write(json.dumps(_rounded(row)) + "\n")
        print(sweep.name, sweep.kind, flush=True)


@app.command()
def beside(
    data: Annotated[Path, typer.Option(help="folder of real curves")], model: str = "curves"
) -> None:
    """The small trainings, whose hyperparameters are known: each run alone, or beside those before.

    Both decide every 5 steps.
    """
    torch.set_num_threads(1)
    trainings = {(name, kind): runs for name, kind, runs in read_trainings(data)}
    rows = []
    for sweep in read_sweeps(data):
        if (sweep.name, sweep.kind) not in trainings:
            continue
        runs = trainings[sweep.name, sweep.kind]
        places = [np.asarray(run.hyperparameters) for run in runs if len(run.values) >= SHORTEST]
        rows += study(
            sweep,
            {
                "alone": partial(_anew, partial(by_siblings, sweep, model, None)),
                "beside": partial(_anew, partial(by_siblings, sweep, model, places)),
            },
            FEW,
        )
        print(rows[-2:], flush=True)
    summary = []
    for method in ("alone", "beside"):
        some = [row for row in rows if row["method"] == method]
        summary.append({"method": method, **_summarized(some)})
    common.save("stopping-siblings", summary, runs=RUNS, orders=FEW, delta=DELTA, every=EVERY)


def _same(stopper: Stopper, order: int) -> Stopper:
    return stopper


def _anew(make: Callable[[], Stopper], order: int) -> Stopper:
    return make()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


def read_rows() -> list[dict[str, Any]]:
    """What `run` has found so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


@app.command()
def report() -> None:
    """Medians over tasks, wrong stops against patience at equal savings, and a figure."""
    rows = read_rows()
    by_method = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    patient = {
        key: [
            (row["speed-up, same runs"], row["wrong stops"])
            for row in of_task
            if row["method"].startswith("patience") or row["method"] == "no stopping"
        ]
        for key, of_task in _grouped(rows).items()
    }
    summary = []
    for method, some in by_method.items():
        entry = {"method": method, **_summarized(some)}
        entry["of patience that saves as much"] = fmean(
            at_equal_savings(patient[r["task"], r["metric"]], r["speed-up, same runs"])
            for r in some
        )
        summary.append(entry)
    common.save("stopping", summary, runs=RUNS, orders=ORDERS, delta=DELTA)
    ours = [{k: v for k, v in row.items() if k != "method"} for row in by_method["pfn"]]
    common.save("stopping-tasks", ours)
    draw(by_method)


def _summarized(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One method over tasks."""
    entry = {
        "tasks": len(rows),
        "speed-up at equal regret": median(r["speed-up at equal regret"] for r in rows),
        "never reached": sum(r["speed-up at equal regret"] == 0 for r in rows),
        "speed-up, same runs": median(r["speed-up, same runs"] for r in rows),
    }
    for kind in ("accuracy", "loss"):
        lost = [r["lost, points"] for r in rows if r["metric"] == kind]
        entry[f"lost, points, {kind}"] = fmean(lost)
        entry[f"worst, {kind}"] = max(lost)
    entry["wrong stops"] = fmean(r["wrong stops"] for r in rows)
    return entry


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"], row["metric"]].append(row)
    return groups


def at_equal_savings(points: list[tuple[float, float]], speed_up: float) -> float:
    """Wrong stops of patience rules, between those that save a little more and less."""
    saved, wrong = zip(*sorted((1 - 1 / s, w) for s, w in points), strict=True)
    return float(np.interp(1 - 1 / speed_up, saved, wrong))


def draw(by_method: dict[str, list[dict[str, Any]]]) -> None:
    """What rules save against what they lose: the patience rules as a line, others as points."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    for axis, kind in zip(axes, ("accuracy", "loss"), strict=True):
        at = {}
        for method, some in by_method.items():
            of_kind = [r for r in some if r["metric"] == kind]
            saved = [1 - 1 / r["speed-up, same runs"] for r in of_kind]
            at[method] = 100 * fmean(saved), 100 * fmean(r["wrong stops"] for r in of_kind)
        line = [at[f"patience {k}"] for k in PATIENCE]
        axis.plot(*zip(*line, strict=True), "-o", color=GREY, ms=3, lw=1.2, label="patience")
        for k, place in zip(PATIENCE, line, strict=True):
            axis.annotate(
                str(k), place, xytext=(-3, 4), textcoords="offset points", ha="right", fontsize=7
            )
        for method, marker in SHOWN.items():
            color, size = (BLUE, 8) if method.startswith("pfn") else (INK, 5)
            axis.plot(*at[method], marker, color=color, ms=size, ls="none", label=method)
        axis.set(title=f"{kind}, {len(of_kind)} sweeps", xlabel="steps saved, %", ylim=(-0.5, 21))
        axis.set_xlim(0, 100)
        quiet(axis)
    axes[0].set_ylabel("runs stopped that would have led, %")
    axes[0].legend(frameon=False, fontsize="small", loc="upper left")
    figure.savefig(FIGURE, dpi=90)


if __name__ == "__main__":
    app()
