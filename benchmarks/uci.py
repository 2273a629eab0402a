"""Small real tables: the `gp` checkpoint beside BoTorch's SingleTaskGP and NUTS under its prior.

    python benchmarks/uci.py --data FOLDER [--model gp] [--only PFN]

FOLDER holds one `NAME.csv.gz` per set, features first and the target last. Every split draws n
training rows and up to 500 test rows at random. Targets are divided by the standard deviation of
the *training* targets before anyone sees them, so that nats and errors of different sets compare.
Results of each contender are kept in results/uci-runs.json until what they depend on changes: the
weights for the PFN, the prior and the sampler's settings for NUTS, the version of BoTorch for
MLE-II. The process keeps to one core: on several, JAX's threads wait for each other in CPU time.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, NamedTuple

import common  # first: it quietens OpenMP before torch starts
import numpy as np
import torch
import typer
from torch import Tensor
from torch.distributions import Distribution, Normal

import pfn
from pfn import PFN
from priors import GaussianProcess
from priors.reference import NutsPosterior, nuts_posterior

SETS = ("concrete", "energy", "kin8nm", "power-plant", "wine-quality-red", "yacht")
SPLITS = {  # contender -> training points -> splits
    "PFN": {50: 20, 200: 20},
    "MLE-II": {50: 20, 200: 20},
    "NUTS": {50: 5, 200: 2},
}
NUTS = {  # training points -> chains, warm-up and draws of each chain, for each kernel
    50: (4, 300, 300),
    200: (2, 250, 250),
}
TEST_ROWS = 500
FIGURES = ("nll", "rmse", "coverage_90", "cpu_seconds")

Scores = dict[str, float]
Runs = dict[str, Scores]  # "set/n/split" -> scores


class Task(NamedTuple):
    """One split: raw inputs, and targets in units of the training targets' standard deviation."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    x_test: Tensor  # (m, d)
    y_test: Tensor  # (m,)


def draw_task(table: Tensor, n: int, split: int) -> Task:
    """Split `split` of a table (rows, d + 1), the same for every contender."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(split))
    rows = table[order]
    y = (rows[:, -1] - rows[:n, -1].mean()) / rows[:n, -1].std()
    stop = n + TEST_ROWS
    return Task(rows[:n, :-1], y[:n], rows[n:stop, :-1], y[n:stop])


class Answer(NamedTuple):
    """A predictive at the test inputs, and what its maker says of its quality."""

    predictive: Distribution
    quality: Scores = {}  # noqa: RUF012


def by_pfn(task: Task, model: PFN) -> Answer:
    """The network's predictive, in one forward pass."""
    return Answer(model.predict((task.x, task.y), task.x_test))


def by_mle(task: Task) -> Answer:
    """BoTorch's SingleTaskGP as it ships: hyperparameters maximise the marginal likelihood.

    To be exact it is a maximum a posteriori: BoTorch puts dimension-scaled log-normal priors on
    lengthscales and noise (Hvarfner et al., 2024, arXiv 2402.02229).
    """
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Normalize, Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    model = SingleTaskGP(
        task.x,
        task.y.unsqueeze(-1),
        input_transform=Normalize(d=task.x.shape[-1]),
        outcome_transform=Standardize(m=1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a restart of the optimiser, say
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    with torch.no_grad():
        posterior = model.posterior(task.x_test, observation_noise=True)
        std = posterior.variance.squeeze(-1).sqrt()
        return Answer(Normal(posterior.mean.squeeze(-1), std))


def by_nuts(task: Task, model: PFN) -> Answer:
    """The reference posterior under the network's own prior, on the numbers that the network sees.

    Targets already have mean 0 and standard deviation 1, so only the inputs need the network's map.
    """
    from priors.nuts import Settings  # it imports JAX

    assert isinstance(model.prior, GaussianProcess)
    units = model.condition((task.x, task.y)).units
    x, x_test = (units.map_x(part.unsqueeze(0)).squeeze(0) for part in (task.x, task.x_test))
    settings = Settings(*NUTS[len(task.y)])
    predictive, diagnostics = nuts_posterior(model.prior, (x, task.y), x_test, settings=settings)
    matters = diagnostics.log_evidence.softmax(-1) > 0.01  # kernels with a say
    assert isinstance(predictive, NutsPosterior)
    quality = {
        "r_hat": float(diagnostics.r_hat[matters].max()),
        "own_error": float(predictive.log_prob_error(task.y_test).mean()),
    }
    return Answer(predictive, quality)


def score(predict: Callable[[Task], Answer], task: Task) -> Scores:
    """Mean negative log density (nats), root mean square error, coverage of the 90 % interval."""
    began = time.process_time()
    predictive, quality = predict(task)
    seconds = time.process_time() - began
    level = predictive.cdf(task.y_test)
    return {
        "nll": -float(predictive.log_prob(task.y_test).mean()),
        "rmse": float((predictive.mean - task.y_test).square().mean().sqrt()),
        "coverage_90": float(((level > 0.05) & (level < 0.95)).double().mean()),
        "cpu_seconds": seconds,
        **quality,
    }


def run(name: str, data: Path, model: str, path: Path) -> Runs:
    """All splits of one contender; those that `path` remembers are not repeated."""
    predict, depends_on = contender(name, model)
    remembered = recall(path).get(name, {})
    runs: Runs = remembered["runs"] if remembered.get("depends_on") == depends_on else {}
    splits = SPLITS[name]
    for n, table in product(splits, SETS):
        rows = torch.from_numpy(np.loadtxt(data / f"{table}.csv.gz", delimiter=",", skiprows=1))
        for split in range(splits[n]):
            key = f"{table}/{n}/{split}"
            if key not in runs:
                runs[key] = score(predict, draw_task(rows, n, split))
                memory = recall(path) | {name: {"depends_on": depends_on, "runs": runs}}
                temporary = path.with_suffix(".partial")
                temporary.write_text(json.dumps(memory, indent=1) + "\n")
                os.replace(temporary, path)
    return {
        f"{t}/{n}/{s}": runs[f"{t}/{n}/{s}"] for t in SETS for n in splits for s in range(splits[n])
    }


def recall(path: Path) -> dict[str, Any]:
    """What is remembered of each contender: its runs, and what they depend on."""
    return json.loads(path.read_text()) if path.exists() else {}


def contender(name: str, model: str) -> tuple[Callable[[Task], Answer], Any]:
    """How a contender predicts, and all that its results depend on besides the data."""
    if name == "MLE-II":
        return by_mle, f"botorch {metadata.version('botorch')}"
    network = pfn.load(model)
    if name == "PFN":
        return lambda task: by_pfn(task, network), network.card.weights_sha256
    assert network.card.prior is not None
    prior = {k: v for k, v in network.card.prior.items() if k != "inputs"}  # no say given x
    settings = {str(n): list(sizes) for n, sizes in NUTS.items()}
    return lambda task: by_nuts(task, network), {"prior": prior, "nuts": settings}


def summarise(results: dict[str, Runs]) -> list[dict[str, Any]]:
    """One row per set, n and contender: means over splits, and over sets under the name "mean"."""
    rows = []
    sizes = sorted({int(key.split("/")[1]) for runs in results.values() for key in runs})
    for n, table, (name, runs) in product(sizes, (*SETS, "mean"), results.items()):
        chosen = [scores for key, scores in runs.items() if matches(key, table, n)]
        if chosen:
            figures = {figure: mean(scores[figure] for scores in chosen) for figure in FIGURES}
            if "r_hat" in chosen[0]:
                figures["worst r_hat"] = max(scores["r_hat"] for scores in chosen)
                figures["own_error"] = mean(scores["own_error"] for scores in chosen)
            splits = len(chosen) // (len(SETS) if table == "mean" else 1)
            rows.append({"set": table, "n": n, "contender": name, "splits": splits, **figures})
    return rows


def compare(results: dict[str, Runs]) -> list[dict[str, Any]]:
    """Paired differences of NLL over common splits with standard errors; sets weigh the same."""
    rows = []
    sizes = sorted({int(key.split("/")[1]) for runs in results.values() for key in runs})
    for n, (one, other) in product(sizes, (("PFN", "MLE-II"), ("PFN", "NUTS"), ("NUTS", "MLE-II"))):
        if one not in results or other not in results:
            continue
        means, errors = [], []
        for table in SETS:
            gaps = [
                scores["nll"] - results[other][key]["nll"]
                for key, scores in results[one].items()
                if matches(key, table, n) and key in results[other]
            ]
            if not gaps:
                continue
            means.append(mean(gaps))
            errors.append(stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan)
            rows.append(_gap(f"{one} - {other}", table, n, len(gaps), means[-1], errors[-1]))
        if means:
            error = math.sqrt(sum(error**2 for error in errors)) / len(errors)
            rows.append(_gap(f"{one} - {other}", "mean", n, len(gaps), mean(means), error))
    return rows


def matches(key: str, table: str, n: int) -> bool:
    """Whether a run belongs to a set ("mean": to any) and a number of training points."""
    its_table, its_n, _ = key.split("/")
    return int(its_n) == n and table in (its_table, "mean")


def _gap(pair: str, table: str, n: int, splits: int, gap: float, error: float) -> dict[str, Any]:
    row = {"difference": pair, "n": n, "set": table, "splits": splits}
    return row | {"nll_difference": gap, "standard_error": error}


def main(
    data: Annotated[Path, typer.Option(help="folder of the six sets")],
    model: Annotated[str, typer.Option(help="a shipped name or a checkpoint's folder")] = "gp",
    only: Annotated[list[str] | None, typer.Option(help=f"among {', '.join(SPLITS)}")] = None,
) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    common.RESULTS.mkdir(exist_ok=True)
    memory = common.RESULTS / "uci-runs.json"
    results = {name: run(name, data, model, memory) for name in only or SPLITS}
    differences = compare(results)
    common.save("uci", summarise(results), differences=differences)
    if differences:
        common.show("paired differences of NLL, nats", differences)


if __name__ == "__main__":
    typer.run(main)
