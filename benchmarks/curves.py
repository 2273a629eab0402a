"""Learning curves: how well their rest is predicted, and what early stopping saves.

    python benchmarks/curves.py slow --data FOLDER        MCMC and least squares on some real curves
    python benchmarks/curves.py predict --data FOLDER     the network and quick baselines on many
    python benchmarks/curves.py sweeps --data FOLDER      what siblings add
    python benchmarks/curves.py prior                     draws of LC-PFN's prior, against MCMC
    python benchmarks/curves.py copula                    constants of joint draws, on the prior's
    python benchmarks/curves.py speed                     milliseconds of an update

FOLDER is that of `curve_prior.py`, whose curves the prior was compared with: they are no test on
data never seen. Real curves are in units of y in [0, 1], higher is better, by the rule of
`surrogates/metrics.py`. Densities are means over +-0.005, mixed with 1 % of a uniform one. What is
fitted, of the baselines, is fitted on other data sets than it is measured on.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import common  # before torch
import curve_baselines as baselines
import numpy as np
import pandas as pd
import torch
import typer
from curve_baselines import Array, Beginning, Student, smoothed_density
from curve_prior import Curve, complete_curves, our_curves, read_curves

import pfn
import surrogates
from pfn.predictive import Predictive
from priors import LearningCurves
from surrogates import curve_posterior, extrapolate
from surrogates.extrapolation import MODEL, Reader, Sibling, thin
from surrogates.metrics import read_metric
from surrogates.stopping import StopRule

app = typer.Typer(add_completion=False, help=__doc__)
CUTS = (0.1, 0.2, 0.4, 0.8)
DATA = typer.Option(help="folder of real curves")
PER_GROUP = 40  # curves of a data set and kind
MEMORIES, COMMONS = (0.125, 0.25, 0.5), (0.0, 0.3, 0.6, 0.9)  # of joint draws
SIBLINGS = (0, 1, 5, 15, 30)
BATCH, MOST_STEPS = 100, 4000  # curves of a batch, and steps of MCMC, for the published prior
SLOW = Path(__file__).parent / "results" / "curves-slow.jsonl"
SQUARES, PUBLISHED, FLAT = "least squares", "MCMC, LC-PFN's prior", "MCMC, eleven families"


class Network:
    """The network's predictives of y, as a baseline's."""

    def __init__(self, name: str) -> None:
        self.model = pfn.load(name)

    def __call__(self, b: Beginning) -> Any:
        keep = thin(b.cut, self.model.card.max_context)
        context = torch.from_numpy(b.time)[keep, None], torch.from_numpy(b.y)[keep]
        return self.model.predict(context, b.time[b.cut :, None], standardize=False)


def cdf_and_median(predictive: Any) -> tuple[Callable[[Array], Array], Array, Array, Array]:
    """Of a predictive or a baseline's: cdf, median, and the ends of the 90 % interval."""
    if isinstance(predictive, pfn.Predictive):
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64).unsqueeze(-1)
        low, middle, high = predictive.icdf(levels).numpy()
        return (lambda y: predictive.cdf(torch.from_numpy(y)).numpy()), middle, low, high
    low, high = (baselines.quantile(predictive, p) for p in (0.05, 0.95))
    return predictive.cdf, predictive.median(), low, high


def scores(predictive: Any, b: Beginning) -> dict[str, float]:
    """Of one curve: log density of the last value and of the rest, errors and coverage."""
    y = b.y[b.cut :]
    cdf, middle, low, high = cdf_and_median(predictive)
    log_q = smoothed_density(cdf, y)
    return {
        "log p, final": float(log_q[-1]),
        "log p, rest": float(log_q.mean()),
        "MAE, final": float(abs(middle[-1] - y[-1])),
        "90 % covers": float(((low - 1e-9 <= y) & (y <= high + 1e-9)).mean()),
    }


def beginning(curve: Curve, share: float) -> Beginning | None:
    """A curve up to a share of its run, two points at least; None if nothing is left."""
    cut = max(2, int(np.searchsorted(curve.time, share + 1e-9)))
    return Beginning(curve.time, curve.y, cut) if cut < len(curve.y) else None


def sample_curves(data: Path, seed: int) -> dict[str, list[Curve]]:
    """By kind, at most `PER_GROUP` curves of each data set: one of each, then the next of each."""
    groups = defaultdict(list)
    for curve in read_curves(data):
        if np.isfinite(curve.y).all():
            groups[curve.dataset, curve.kind].append(curve)
    rng = np.random.default_rng(seed)
    ranked: dict[str, list[tuple[int, Curve]]] = defaultdict(list)
    for (_, kind), some in sorted(groups.items()):
        order = rng.permutation(len(some))[:PER_GROUP]
        ranked[kind] += [(rank, some[i]) for rank, i in enumerate(order)]
    return {
        kind: [curve for _, curve in sorted(pairs, key=lambda pair: pair[0])]
        for kind, pairs in ranked.items()
    }


@app.command()
def slow(data: Annotated[Path, DATA], few: int = 12, seed: int = 0) -> None:
    """Least squares and MCMC on the first `few` curves of each kind; goes on where it was."""
    torch.set_num_threads(1)
    done = {(e["metric"], e["curve"], e["cut"]) for e in read_slow()}
    prior = LearningCurves.lcpfn()
    with SLOW.open("a") as file:
        for i, share, (kind, curves) in itertools.product(
            range(few), CUTS, sample_curves(data, seed).items()
        ):
            b = beginning(curves[i], share)
            if b is None or (kind, i, share) in done:
                continue
            spent: dict[str, list[float]] = defaultdict(list)
            rest = _timed(spent[SQUARES], baselines.best_family, b)
            published = _timed(spent[PUBLISHED], baselines.mcmc, prior, b)
            flat = _timed(spent[FLAT], baselines.mcmc_flat, b)
            entry = {
                "metric": kind,
                "curve": i,
                "cut": share,
                "dataset": curves[i].dataset,
                SQUARES: [round(value, 5) for value in rest.tolist()],
                PUBLISHED: scores(published, b),
                FLAT: scores(flat, b),
                "seconds": {method: round(times[0], 3) for method, times in spent.items()},
            }
            file.write(json.dumps(entry) + "\n")
            file.flush()
            print(kind, i, share, entry["seconds"], flush=True)


def read_slow() -> list[dict[str, Any]]:
    """What `slow` has found so far."""
    return [json.loads(line) for line in SLOW.read_text().splitlines()] if SLOW.exists() else []


@app.command()
def predict(data: Annotated[Path, DATA], model: str = MODEL, seed: int = 0) -> None:
    """Log density, error and coverage on real curves, of all and of those that `slow` has done."""
    torch.set_num_threads(1)
    network = Network(model)
    samples = sample_curves(data, seed)
    found: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    spent: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    slowly = {(e["metric"], e["curve"], e["cut"]): e for e in read_slow()}
    for share, (kind, curves) in itertools.product(CUTS, samples.items()):
        begun = [(i, c.dataset, beginning(c, share)) for i, c in enumerate(curves)]
        cut = [(i, name, b) for i, name, b in begun if b is not None]
        squares = {
            i: (name, b, np.array(slowly[kind, i, share][SQUARES]))
            for i, name, b in cut
            if (kind, i, share) in slowly
        }
        for name in sorted({name for _, name, _ in cut}):
            others = [b for _, other, b in cut if other != name]
            last, trend = baselines.fit_last(others), baselines.fit_trend(others)
            pairs = [(b, rest) for other, b, rest in squares.values() if other != name]
            spread = baselines.fit_spread(pairs) if pairs else None
            for i, b in ((i, b) for i, other, b in cut if other == name):
                entries = {
                    "pfn": scores(_timed(spent[share, kind, "pfn"], network, b), b),
                    "last value": scores(
                        _timed(spent[share, kind, "last value"], baselines.predict_last, last, b), b
                    ),
                    "trend": scores(
                        _timed(spent[share, kind, "trend"], baselines.predict_trend, trend, b), b
                    ),
                }
                for method, entry in entries.items():
                    found[share, kind, "all", method].append(entry)
                if spread is None or i not in squares:
                    continue
                ahead = np.log(b.time[b.cut :] - b.time[b.cut - 1])
                scale = np.exp(spread[0] + spread[1] * ahead) + 1e-4
                entries[SQUARES] = scores(Student(squares[i][2], scale), b)
                entries |= {method: slowly[kind, i, share][method] for method in (PUBLISHED, FLAT)}
                for method, seconds in slowly[kind, i, share]["seconds"].items():
                    spent[share, kind, method].append(seconds)
                for method, entry in entries.items():
                    found[share, kind, "of MCMC", method].append(entry)
    rows = []
    for (share, kind, subset, method), several in found.items():
        mean = {key: fmean(entry[key] for entry in several) for key in several[0]}
        labels = {"cut": share, "metric": kind, "curves": len(several), "method": method}
        rows.append(
            {"subset": subset, **labels, **mean, "seconds": median(spent[share, kind, method])}
        )
    rows.sort(key=lambda row: (row["subset"], row["metric"], row["cut"]))
    common.save("curves-predict", rows, model=model, seed=seed)


def _timed(spent: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    began = time.process_time()
    answer = call(*arguments)
    spent.append(time.process_time() - began)
    return answer


@app.command()
def sweeps(
    data: Annotated[Path, DATA], model: str = MODEL, targets: int = 8, seed: int = 0
) -> None:
    """Runs of the small trainings beside complete siblings, of which each table has ever more.

    With their hyperparameters permuted, siblings say what runs of the sweep do, but not where.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    found: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for _, kind, runs in read_trainings(data):
        whole = [run for run in runs if np.isfinite(run.values).all()]
        for i in rng.permutation(len(whole))[:targets]:
            run = whole[i]
            others = [other for other in runs if other is not run]
            others = [others[j] for j in rng.permutation(len(others))]
            for share, count in itertools.product((0.0, 0.1, 0.4), SIBLINGS):
                seen = round(share * len(run.values))
                beside = [
                    Sibling(other.values[: len(run.values)], other.hyperparameters)
                    for other in others[:count]
                ]
                if seen or beside:
                    entry = score_run(Reader(model, beside, run.hyperparameters), run, kind, seen)
                    if len(beside) > 1:  # what the siblings' places add to their curves
                        order = rng.permutation(len(beside))
                        places = [beside[j].hyperparameters for j in order]
                        moved = [
                            other._replace(hyperparameters=place)
                            for other, place in zip(beside, places, strict=True)
                        ]
                        reader = Reader(model, moved, run.hyperparameters)
                        permuted = score_run(reader, run, kind, seen)
                        entry["final, places permuted"] = permuted["log p, final"]
                    found[kind, share, count].append(entry)
    rows = []
    for (kind, share, count), several in sorted(found.items()):
        mean = {key: fmean(entry[key] for entry in several) for key in several[0]}
        labels = {"metric": kind, "cut": share, "siblings": count, "runs": len(several)}
        rows.append({**labels, **mean})
    common.save("curves-sweeps", rows, model=model, seed=seed)


def score_run(reader: Reader, run: Sibling, kind: str, seen: int) -> dict[str, float]:
    """Of a run's rest, in units of y relative to its own first value."""
    values = np.array(run.values, dtype=float)
    mode = "max" if kind == "accuracy" else "min"
    metric = read_metric(values[:1], mode, (0, 1) if mode == "max" else (0, None))
    curve = reader.extrapolate(
        values[:seen], len(values), mode=mode, bounds=(0, 1) if mode == "max" else (0, None)
    )

    def cdf(y: Array) -> Array:
        edge = 1e-4 if kind == "loss" else 0.0
        below = curve.cdf(metric.decode(torch.from_numpy(y).clamp(edge, 1 - edge)))
        return (below if mode == "max" else 1 - below).numpy()

    y = metric.encode(torch.from_numpy(values[seen:])).numpy()
    log_q = smoothed_density(cdf, y)
    middle = metric.encode(curve.icdf(0.5)).numpy()
    low, high = (end.numpy() for end in curve.interval(0.9))
    rest = values[seen:]
    return {
        "log p, final": float(log_q[-1]),
        "log p, rest": float(log_q.mean()),
        "MAE, final": float(abs(middle[-1] - y[-1])),
        "90 % covers": float(((low - 1e-9 <= rest) & (rest <= high + 1e-9)).mean()),
    }


def read_trainings(data: Path) -> Iterator[tuple[str, str, list[Sibling]]]:
    """Data set, kind of metric, and runs of small trainings, with their settings in [0, 1]."""
    table = pd.read_csv(data / "own_dev.csv.gz")
    table = table[table.metric.isin(["val_acc", "val_logloss", "val_rmse"])]
    place = pd.DataFrame(
        {
            "lr": np.log10(table.lr).add(5) / 5,
            "width": np.log2(table.width).sub(2) / 5,
            "depth": table.depth / 10,
            "batch": np.log2(table.batch_size).sub(4) / 5,
            "decay": np.log10(table.weight_decay.clip(lower=1e-7)).add(7) / 6,
            "dropout": table.dropout / 0.6,
            "trees": (table.model == "gbdt").astype(float),
            **{
                name: table[name].astype("category").cat.codes.clip(lower=0) / 3
                for name in ("optimizer", "activation", "schedule")
            },
        }
    )
    place = place.fillna(0.0).clip(0, 1)
    for (dataset, metric), runs in table.groupby(["dataset", "metric"]):
        kind = "accuracy" if metric == "val_acc" else "loss"
        found = []
        for _, run in runs.groupby("run"):
            run = run.sort_values("epoch")
            found.append(
                Sibling(run.value.to_numpy(float), place.loc[run.index[0]].to_numpy(float))
            )
        yield str(dataset), kind, found


@app.command()
def prior(
    model: str = "pretrained/small/lcpfn", curves: int = 2000, few: int = 40, seed: int = 0
) -> None:
    """Draws of the published prior: the network on all, MCMC on a few of them, paired.

    MCMC at the published settings that did best: 100 walkers, 4000 steps, 500 of them left out.
    Walkers begin at one optimum, as published, or at the best of many draws of the prior.
    """
    torch.set_num_threads(1)
    law, network = LearningCurves.lcpfn(), Network(model)
    x, y = complete_curves(law, curves, torch.Generator().manual_seed(seed))
    published = {0.1: (1.64, 1.76), 0.2: (1.96, 2.13), 0.4: (2.29, 2.40), 0.8: (2.49, 2.52)}
    rows = []
    for share in CUTS:
        cut = round(100 * share)
        rest = y[:, cut:]
        one: list[float] = []
        slow: list[float] = []
        batched: list[float] = []

        def answer(some: torch.Tensor, cut: int = cut) -> Predictive:
            times = x[:, None].expand(len(some), -1, 1)
            context = times[:, :cut], y[some, :cut]
            return network.model.predict(context, times[:, cut:], standardize=False)

        batches = torch.arange(curves).split(BATCH)
        ours = [answer(some).log_prob(rest[some]).mean(-1) for some in batches]
        log_p = torch.cat(ours).numpy()
        theirs = np.empty((2, few))
        for i, begun in itertools.product(range(few), (0, 1)):
            b = Beginning(x.numpy(), y[i].numpy(), cut)
            _timed(one, network, b)
            _timed(batched, answer, batches[i % len(batches)])  # in turn, on a busy machine too
            ask = partial(baselines.mcmc, steps=MOST_STEPS, from_optimum=begun == 0)
            draws = _timed(slow, ask, law, b, i)
            normal = torch.distributions.Normal(
                torch.from_numpy(draws.mean), torch.from_numpy(draws.std)
            )
            each = normal.log_prob(rest[i]).logsumexp(0) - math.log(len(draws.mean))
            theirs[begun, i] = float(each.mean())
        ahead = log_p[:few] - theirs
        rows.append(
            {
                "cut": share,
                "curves": curves,
                "network": float(log_p.mean()),
                "standard error": float(log_p.std() / math.sqrt(curves)),
                "paired": few,
                "network, paired": float(log_p[:few].mean()),
                "MCMC": float(theirs[0].mean()),
                "ahead of MCMC": float(ahead[0].mean()),
                "standard error of it": float(ahead[0].std(ddof=1) / math.sqrt(few)),
                "MCMC from draws": float(theirs[1].mean()),
                "ahead of MCMC from draws": float(ahead[1].mean()),
                "standard error of that": float(ahead[1].std(ddof=1) / math.sqrt(few)),
                "published MCMC": published[share][0],
                "published LC-PFN": published[share][1],
                "network, s": median(one),
                "in batches, s": median(batched) / BATCH,
                "MCMC, s": median(slow),
                "ratio": median(slow) * BATCH / median(batched),
            }
        )
        print(rows[-1], flush=True)
    common.save("curves-prior", rows, model=model, seed=seed)


@app.command()
def copula(model: str = MODEL, curves: int = 150, seed: int = 0) -> None:
    """Whether the best of the rest beats a rival, for draws of the prior: scores of constants.

    Rivals are such that it does with probability 1/2, 1/5 and 1/20, by the constants in use.
    """
    torch.set_num_threads(1)
    runs = [c.y for kind in ("accuracy", "loss") for c in our_curves(kind, curves, seed)]
    used = curve_posterior.MEMORY, curve_posterior.COMMON
    found: dict[tuple[float, float], list[float]] = defaultdict(list)
    said: dict[tuple[float, float], list[float]] = defaultdict(list)
    for y, share in itertools.product(runs, CUTS):
        seen = max(2, round(share * len(y)))

        def ask(memory: float, shared: float, y: Array = y, seen: int = seen) -> surrogates.Curve:
            curve_posterior.MEMORY, curve_posterior.COMMON = memory, shared
            return Reader(model).extrapolate(y[:seen], len(y), bounds=(0, 1))

        rivals = [ask(*used).quantile_best(p) for p in (0.5, 0.8, 0.95)]
        for constants in itertools.product(MEMORIES, COMMONS):
            curve = ask(*constants)
            for rival in rivals:
                p = min(max(curve.prob_best(rival), 1e-4), 1 - 1e-4)
                beaten = bool(y[seen:].max() > rival)
                found[constants].append(math.log(p if beaten else 1 - p))
                said[constants].append(p - beaten)
    rows = [
        {
            "memory": memory,
            "common": shared,
            "log score": fmean(found[memory, shared]),
            "said less happened": fmean(said[memory, shared]),
            "in use": "yes" if (memory, shared) == used else "",
        }
        for memory, shared in found
    ]
    common.save("curves-copula", rows, curves=len(runs), model=model, seed=seed)


@app.command()
def speed(updates: int = 100, repeats: int = 3) -> None:
    """Milliseconds of `StopRule.update` and of `extrapolate` in runs of 100 and of 1,000 steps."""
    torch.set_num_threads(1)
    rows = []
    for horizon in (100, 1000):
        y = 0.9 - 0.6 / np.sqrt(np.arange(1.0, horizon + 1))
        best = []
        for _ in range(repeats):
            rule = StopRule(horizon, best=0.9, warmup=0, patience=horizon)
            spent = []
            for value in y[:-1]:
                began = time.process_time()
                rule.update(value)
                spent.append(time.process_time() - began)
            best.append(float(np.median(spent[-updates:])))
        began = time.process_time()
        curve = extrapolate(y[: horizon // 2], horizon)
        whole = time.process_time() - began
        began = time.process_time()
        curve.sample_paths(256)
        paths = time.process_time() - began
        rows.append(
            {
                "horizon": horizon,
                "update, ms": 1e3 * min(best),
                "extrapolate, ms": 1e3 * whole,
                "256 paths, ms": 1e3 * paths,
            }
        )
    common.save("curves-speed", rows)


if __name__ == "__main__":
    app()
