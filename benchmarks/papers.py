"""Two experiments of Müller et al., ICLR 2022 (arXiv 2112.10510), beside what we answer.

    python benchmarks/papers.py five      # section 5.1: a known process, 5 features, 2000 points
    python benchmarks/papers.py speedup   # section 5.2: times beside MLE-II and NUTS

The paper's figures are curves, so that ours are compared with the exact posterior, and with its
statements: more than 200 times the speed of MLE-II, 1000 to 8000 times that of NUTS. All runs on
one thread of a CPU, the network alone and with 64 data sets at once. The same for learning curves,
after LC-PFN (Adriaensen et al., NeurIPS 2023), is in `curves.py prior`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import fmean, median, stdev
from typing import Annotated, NamedTuple

import common  # first: it quietens OpenMP before torch starts
import speed
import torch
import typer
from torch import Tensor
from torch.distributions import Distribution

import pfn
from pfn.fresh_tasks import draw_tasks
from priors import GaussianProcess
from priors.nuts import Settings
from priors.reference import nuts_posterior

app = typer.Typer(help=__doc__, add_completion=False)
FIVE = common.RECIPES.parent / "small" / "gp-5d"
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
        drawn = draw_tasks(network.prior, n, 5, tasks=tasks, queries=queries, seed=1)
        answers = [
            (
                timed(network.prior.posterior, (x, y), x_query, y_query),
                timed(partial(network.predict, standardize=False), (x, y), x_query, y_query),
            )
            for x, y, x_query, y_query in zip(*drawn, strict=True)
        ]
        exact, ours = zip(*answers, strict=True)
        gaps = [theirs.log_prob - own.log_prob for theirs, own in answers]
        rows.append(
            {
                "points": n,
                "exact, nats": -fmean(each.log_prob for each in exact),
                "network, nats": -fmean(each.log_prob for each in ours),
                "gap, nats": fmean(gaps),
                "standard error": stdev(gaps) / math.sqrt(tasks),
                "exact, ms": 1e3 * median(each.seconds for each in exact),
                "network, ms": 1e3 * median(each.seconds for each in ours),
            }
        )
        print(rows[-1], flush=True)
    common.save("papers-five", rows)


class Answer(NamedTuple):
    """What was said of a task's queries."""

    log_prob: float  # mean over queries, in nats
    seconds: float


def timed(
    answer: Callable[..., Distribution], context: Data, x_query: Tensor, y_query: Tensor
) -> Answer:
    """How well an answer fits a task's queries, and how long it took."""
    began = time.perf_counter()
    posterior = answer(context, x_query)
    seconds = time.perf_counter() - began
    return Answer(float(posterior.log_prob(y_query).mean()), seconds)


@app.command()
def speedup(
    model: Annotated[str, typer.Option(help="a checkpoint, by name or path")] = "gp",
    queries: int = 100,
    repeats: int = 5,
) -> None:
    """Milliseconds per data set of 5 features: one by one, 64 at once, MLE-II, and NUTS.

    NUTS is one chain of 300 + 300 steps under the first kernel of the checkpoint's prior, whichever
    drew the data; compilation is not counted, and it does not take turns with the others. MLE-II is
    BoTorch's SingleTaskGP.
    """
    warnings.filterwarnings("ignore")  # of fits that stop early
    torch.set_num_threads(1)
    network, rows = pfn.load(model), []
    prior = network.prior
    assert isinstance(prior, GaussianProcess)
    given = {"kernel": 0} if len(prior.kernels) > 1 else None

    def run_nuts(context: Data, query: Tensor) -> object:
        return nuts_posterior(prior, context, query, given=given, settings=Settings(chains=1))

    for n in (10, 30, 100):
        tasks = speed.draw_tasks(model, n, queries, 5, count=AT_ONCE)
        x, y, x_query = (
            torch.stack(part) for part in zip(*((*seen, q) for seen, q in tasks), strict=True)
        )

        def at_once(x: Tensor = x, y: Tensor = y, x_query: Tensor = x_query) -> object:
            posterior = network.predict((x, y), x_query)
            return posterior.mean, posterior.variance

        sampled = speed.iterate(tasks, run_nuts)
        sampled()  # compiles
        times = common.measure(
            {
                "alone": speed.ask(model, tasks),
                "at once": at_once,
                "MLE-II": speed.fit_and_ask(tasks),
            },
            repeats,
        )
        nuts = median(speed.clock(sampled).cpu for _ in range(repeats))
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
                "MLE-II, the paper's": 200,
                "NUTS / alone": nuts / times["alone"].cpu,
                "NUTS / at once": nuts / ours,
                "NUTS, the paper's": "1000 to 8000",
            }
        )
        print(rows[-1], flush=True)
    common.save("papers-speedup", rows)


if __name__ == "__main__":
    app()
