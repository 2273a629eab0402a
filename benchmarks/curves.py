"""Learning curves: how well their rest is predicted, and what early stopping saves.

    python benchmarks/curves.py prior                     draws of LC-PFN's prior, against MCMC
    python benchmarks/curves.py predict --data FOLDER     real curves, against all baselines
    python benchmarks/curves.py stop --data FOLDER        the published study of early stopping
    python benchmarks/curves.py speed                     seconds of an update

FOLDER is that of `curve_prior.py`. Real curves are in units of y in [0, 1], higher is better, by
the rule of `surrogates/metrics.py`. Densities are means over +-0.005, mixed with 1 % of a uniform
one.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import common  # before torch
import curve_baselines as baselines
import numpy as np
import torch
import typer
from curve_baselines import Array, Beginning, Draws, Student, smoothed_density
from curve_prior import Curve, complete_curves, read_curves

import pfn
from priors import LearningCurves
from surrogates import extrapolate
from surrogates.extrapolation import MODEL
from surrogates.stopping import StopRule

app = typer.Typer(add_completion=False, help=__doc__)
CUTS = (0.1, 0.2, 0.4, 0.8)
DATA = typer.Option(help="folder of real curves")
PER_GROUP = 40  # curves of a data set and kind
MCMC_CURVES = 16  # of each kind, for MCMC: it takes seconds a curve
ORDERS, DELTA = 40, 0.05


class Network:
    """The network's predictives of y, as a baseline's."""

    def __init__(self, name: str) -> None:
        self.model = pfn.load(name)

    def __call__(self, b: Beginning) -> Any:
        context = b.time[: b.cut, None], b.y[: b.cut]
        return self.model.predict(context, b.time[b.cut :, None], standardize=False)


def cdf_and_median(predictive: Any) -> tuple[Callable[[Array], Array], Array, Array, Array]:
    """Of a predictive or a baseline's: cdf, median, and the ends of the 90 % interval."""
    if isinstance(predictive, pfn.Predictive):
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64).unsqueeze(-1)
        low, middle, high = predictive.icdf(levels).numpy()
        return (lambda y: predictive.cdf(torch.from_numpy(y)).numpy()), middle, low, high
    low, high = (_quantile(predictive, p) for p in (0.05, 0.95))
    return predictive.cdf, predictive.median(), low, high


def _quantile(predictive: Draws | Student, p: float) -> Array:
    """By bisection on [-1, 2]."""
    low, high = np.full(len(predictive.median()), -1.0), np.full(len(predictive.median()), 2.0)
    for _ in range(50):
        middle = (low + high) / 2
        below = predictive.cdf(middle) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


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


def beginnings(curves: Sequence[Curve], share: float) -> list[Beginning]:
    """The first points of each curve, up to a share of its run, two at least."""
    found = []
    for curve in curves:
        cut = max(2, int(np.searchsorted(curve.time, share + 1e-9)))
        if cut < len(curve.y):
            found.append(Beginning(curve.time, curve.y, cut))
    return found


def sample_of(curves: Iterator[Curve], seed: int) -> dict[tuple[str, str], list[Curve]]:
    """At most `PER_GROUP` curves of each data set and kind."""
    groups = defaultdict(list)
    for curve in curves:
        if np.isfinite(curve.y).all():
            groups[curve.dataset, curve.kind].append(curve)
    rng = np.random.default_rng(seed)
    return {
        key: [some[i] for i in rng.permutation(len(some))[:PER_GROUP]]
        for key, some in groups.items()
    }


@app.command()
def predict(
    data: Annotated[Path, DATA], model: str = MODEL, seed: int = 0, mcmc: bool = True
) -> None:
    """Log density, error and coverage on real curves; baselines are fitted on other data sets."""
    torch.set_num_threads(1)
    network = Network(model)
    groups = sample_of(read_curves(data), seed)
    prior = LearningCurves.lcpfn()
    rows = []
    for share in CUTS:
        found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
        few: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
        spent: dict[str, list[float]] = defaultdict(list)
        for kind in ("accuracy", "loss"):
            names = [name for name, k in groups if k == kind]
            cut = {name: beginnings(groups[name, kind], share) for name in names}
            squares = {
                name: [(b, _timed(spent["least squares"], baselines.best_family, b)) for b in some]
                for name, some in cut.items()
            }
            chosen = np.random.default_rng(seed).permutation(sum(map(len, cut.values())))
            chosen = set(chosen[:MCMC_CURVES].tolist())
            place = 0
            for name in names:
                train = [b for other in names if other != name for b in cut[other]]
                last = baselines.fit_last(train)
                trend = baselines.fit_trend(train)
                pairs = [pair for other in names if other != name for pair in squares[other]]
                spread = baselines.fit_spread(pairs)
                for b, (_, rest) in zip(cut[name], squares[name], strict=True):
                    ahead = np.log(b.time[b.cut :] - b.time[b.cut - 1])
                    answers: dict[str, Any] = {
                        "pfn": _timed(spent["pfn"], network, b),
                        "last value": _timed(spent["last value"], baselines.predict_last, last, b),
                        "trend": _timed(spent["trend"], baselines.predict_trend, trend, b),
                        "least squares": Student(
                            rest, np.exp(spread[0] + spread[1] * ahead) + 1e-4
                        ),
                    }
                    is_few = mcmc and place in chosen
                    if is_few:
                        answers["MCMC, lcpfn prior"] = _timed(
                            spent["MCMC, lcpfn prior"], baselines.mcmc, prior, b
                        )
                    for method, answer in answers.items():
                        entry = scores(answer, b)
                        if method != "MCMC, lcpfn prior":
                            found[method, kind].append(entry)
                        if is_few:
                            few[method, kind].append(entry)
                    place += 1
        for subset, table in (("all", found), ("of MCMC", few)):
            for (method, kind), entries in table.items():
                rows.append(
                    {
                        "cut": share,
                        "metric": kind,
                        "subset": subset,
                        "method": method,
                        "curves": len(entries),
                        **{key: float(np.mean([e[key] for e in entries])) for key in entries[0]},
                        "seconds": float(np.median(spent[method])),
                    }
                )
    common.save("curves-predict", rows, model=model, seed=seed)


def _timed(spent: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    began = time.process_time()
    answer = call(*arguments)
    spent.append(time.process_time() - began)
    return answer


@app.command()
def prior(
    model: str = "pretrained/small/lcpfn", curves: int = 2000, few: int = 40, seed: int = 0
) -> None:
    """Draws of the published prior: the network on all, MCMC on a few of them, paired."""
    torch.set_num_threads(1)
    law, network = LearningCurves.lcpfn(), Network(model)
    x, y = complete_curves(law, curves, torch.Generator().manual_seed(seed))
    times, values = x.numpy(), y.numpy()
    published = {0.1: (1.64, 1.76), 0.2: (1.96, 2.13), 0.4: (2.29, 2.40), 0.8: (2.49, 2.52)}
    rows = []
    for share in CUTS:
        ours, paired, theirs, seconds, slow = [], [], [], [], []
        for i in range(curves):
            b = Beginning(times, values[i], round(100 * share))
            rest = torch.from_numpy(values[i, b.cut :])
            ours.append(float(_timed(seconds, network, b).log_prob(rest).mean()))
            if i < few:
                draws = _timed(slow, baselines.mcmc, law, b, i)
                normal = torch.distributions.Normal(
                    torch.from_numpy(draws.mean), torch.from_numpy(draws.std)
                )
                each = normal.log_prob(rest).logsumexp(0) - math.log(len(draws.mean))
                theirs.append(float(each.mean()))
                paired.append(ours[-1])
        difference = np.array(paired) - np.array(theirs)
        rows.append(
            {
                "cut": share,
                "curves": curves,
                "network": float(np.mean(ours)),
                "standard error": float(np.std(ours) / math.sqrt(curves)),
                "paired": few,
                "network, paired": float(np.mean(paired)),
                "MCMC": float(np.mean(theirs)),
                "difference": float(difference.mean()),
                "its standard error": float(difference.std(ddof=1) / math.sqrt(few)),
                "published MCMC": published[share][0],
                "published LC-PFN": published[share][1],
                "network, s": float(np.median(seconds)),
                "MCMC, s": float(np.median(slow)),
                "ratio": float(np.median(slow) / np.median(seconds)),
            }
        )
        print(rows[-1], flush=True)
    common.save("curves-prior", rows, model=model, seed=seed)


@app.command()
def speed(updates: int = 100, repeats: int = 3) -> None:
    """Seconds of `StopRule.update` and of `extrapolate`, along a run of 100 and of 1,000 steps."""
    torch.set_num_threads(1)
    rows = []
    for horizon in (100, 1000):
        y = 0.9 - 0.6 / np.sqrt(np.arange(1.0, horizon + 1))
        best = []
        for _ in range(repeats):
            rule = StopRule(horizon, best=0.9, warmup=0, patience=horizon)
            spent = []
            for value in y[: min(updates, horizon - 1)]:
                began = time.process_time()
                rule.update(value)
                spent.append(time.process_time() - began)
            best.append(float(np.median(spent[len(spent) // 2 :])))
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
