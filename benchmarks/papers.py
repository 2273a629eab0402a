"""Two experiments of Müller et al., ICLR 2022 (arXiv 2112.10510), beside what we answer.

    python benchmarks/papers.py five      # section 5.1: a known process, 5 features, 2000 points
    python benchmarks/papers.py speedup   # section 5.2: times beside MLE-II and NUTS

The paper's figures are curves, so that ours are compared with the exact posterior, and with its
statements: 200 times the speed of MLE-II, 1000 to 8000 times that of NUTS. Its network answered
many data sets at once, on a GPU; here all runs on one thread of a CPU, alone and 64 at once. Its
third experiment of the kind, learning curves, is in `curves.py prior`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import common  # first: it quietens OpenMP before torch starts
import torch
import typer
from speed import ask, clock, draw_tasks, fit_and_ask, iterate
from torch import Tensor
from torch.distributions import Distribution

import pfn
from pfn.fresh_tasks import draw_tasks as draw_fresh
from priors import GaussianProcess
from priors.nuts import Settings
from priors.reference import nuts_posterior

app = typer.Typer(help=__doc__, add_completion=False)
FIVE = Path(__file__).parent.parent / "pretrained" / "small" / "gp-5d"
AT_ONCE = 64
Data = tuple[Tensor, Tensor]  # x (n, d), y (n,)


@app.command()
def five(
    model: Annotated[str, typer.Option(help="a checkpoint of recipes/gp-5d.py")] = str(FIVE),
    tasks: Annotated[int, typer.Option(help="for each size of context")] = 64,
    queries: int = 64,
) -> None:
    """Negative log densities of the network and of the exact posterior, in nats per query."""
    torch.set_num_threads(1)
    network, rows = pfn.load(model), []
    assert isinstance(network.prior, GaussianProcess)
    for n in (10, 50, 100, 200, 500, 1000, 2000):
        drawn = draw_fresh(network.prior, n, 5, tasks=tasks, queries=queries, seed=1)
        each = [
            (
                timed(network.prior.posterior, (x, y), x_query, y_query),
                timed(partial(network.predict, standardize=False), (x, y), x_query, y_query),
            )
            for x, y, x_query, y_query in zip(*drawn, strict=True)
        ]
        exact, ours = (torch.tensor(part) for part in zip(*each, strict=True))  # (task, 2)
        gap = exact[:, 0] - ours[:, 0]
        rows.append(
            {
                "points": n,
                "exact": -float(exact[:, 0].mean()),
                "network": -float(ours[:, 0].mean()),
                "gap, nats": float(gap.mean()),
                "standard error": float(gap.std() / math.sqrt(tasks)),
                "exact, ms": 1e3 * float(exact[:, 1].median()),
                "network, ms": 1e3 * float(ours[:, 1].median()),
            }
        )
        print(rows[-1], flush=True)
    spent = network.card.training
    common.save("papers-five", rows, trained={k: spent[k] for k in ("seconds", "tasks")})


def timed(
    answer: Callable[..., Distribution], context: Data, x_query: Tensor, y_query: Tensor
) -> tuple[float, float]:
    """Mean log density of a task's queries, and the seconds that the answer took."""
    began = time.perf_counter()
    posterior = answer(context, x_query)
    seconds = time.perf_counter() - began
    return float(posterior.log_prob(y_query).mean()), seconds


@app.command()
def speedup(
    model: Annotated[str, typer.Option(help="a checkpoint, by name or path")] = "gp",
    queries: int = 100,
    repeats: int = 5,
) -> None:
    """Milliseconds per data set of 5 features: one by one, 64 at once, MLE-II, and NUTS.

    NUTS is one chain for one kernel that it is told, on the checkpoint's prior; compilation is not
    counted. MLE-II is BoTorch's SingleTaskGP.
    """
    warnings.filterwarnings("ignore")  # of fits that stop early
    torch.set_num_threads(1)
    network, rows = pfn.load(model), []
    prior = network.prior
    assert isinstance(prior, GaussianProcess)
    given = {"kernel": 0} if len(prior.kernels) > 1 else None

    def sample(context: Data, query: Tensor) -> object:
        return nuts_posterior(prior, context, query, given=given, settings=Settings(chains=1))

    for n in (10, 30, 100):
        tasks = draw_tasks(model, n, queries, 5, count=AT_ONCE)
        x, y, x_query = (
            torch.stack(part) for part in zip(*((*seen, q) for seen, q in tasks), strict=True)
        )

        def at_once(x: Tensor = x, y: Tensor = y, x_query: Tensor = x_query) -> object:
            posterior = network.predict((x, y), x_query)
            return posterior.mean, posterior.variance

        sampled = iterate(tasks, sample)
        sampled()  # compiles
        times = common.measure(
            {"alone": ask(model, tasks), "at once": at_once, "MLE-II": fit_and_ask(tasks)}, repeats
        )
        nuts = median(clock(sampled).cpu for _ in range(repeats))
        ours = times["at once"].cpu / AT_ONCE
        rows.append(
            {
                "points": n,
                "alone, CPU ms": 1e3 * times["alone"].cpu,
                f"{AT_ONCE} at once, CPU ms each": 1e3 * ours,
                "MLE-II, CPU ms": 1e3 * times["MLE-II"].cpu,
                "NUTS, CPU ms": 1e3 * nuts,
                "MLE-II / alone": times["MLE-II"].cpu / times["alone"].cpu,
                "MLE-II / at once": times["MLE-II"].cpu / ours,
                "paper": 200,
                "NUTS / alone": nuts / times["alone"].cpu,
                "NUTS / at once": nuts / ours,
                "the paper": "1000 to 8000",
            }
        )
        print(rows[-1], flush=True)
    common.save("papers-speedup", rows)


if __name__ == "__main__":
    app()
