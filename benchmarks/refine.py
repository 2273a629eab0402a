"""What refining costs and brings, beside a NUTS that starts cold: `python benchmarks/refine.py`.

Tasks are those of certificates, in the units of the prior. The gap is the Kullback-Leibler
divergence per query from the exact posterior predictive to an answer: by quadrature where features
are one, else by NUTS, whose own error is stated beside it. NUTS has the reference's settings, four
chains of 300 draws after as many for warm-up, for each kernel. Its gradients are counted up to as
many effective draws, by the coordinate that has fewest, as the refined answer has; warm-up is
included, with trajectories as long as later ones. A gradient costs some three evaluations, and
compilation, 5 to 20 seconds for each size of task, is not counted. Results in results/refine.json.
"""

from __future__ import annotations

import time
from statistics import fmean, median
from typing import Annotated, NamedTuple

import common  # before torch
import torch
import typer
from torch import Tensor
from torch.distributions import Distribution

import pfn
from pfn.fresh_tasks import draw_tasks
from pfn.model import PFN
from pfn.refine import Refined, refine
from priors import GaussianProcess
from priors.nuts import DEFAULT
from priors.reference import Diagnostics, nuts_posterior

QUERIES, DRAWS = 16, 32  # of a task, and of the exact predictive at each


class Cell(NamedTuple):
    """A checkpoint, the size of tasks, how many, and for how many of them NUTS runs."""

    model: str
    n: int
    d: int
    tasks: int
    with_nuts: int


CELLS = [
    Cell("gp-1d", 5, 1, 40, 8),
    Cell("gp-1d", 20, 1, 40, 8),
    Cell("gp-1d", 60, 1, 20, 5),
    Cell("gp", 20, 2, 20, 4),
    Cell("gp", 60, 2, 20, 3),
    Cell("gp", 20, 5, 20, 3),
    Cell("gp", 60, 5, 20, 3),
    Cell("gp", 20, 12, 20, 3),
    Cell("gp", 60, 12, 10, 2),
]


def main(
    only: Annotated[list[str] | None, typer.Option(help="checkpoints; all by default")] = None,
) -> None:
    """Measures the cells on one thread, and saves the table."""
    torch.set_num_threads(1)
    cells = [cell for cell in CELLS if not only or cell.model in only]
    rows, beside = zip(*(measure(cell) for cell in cells), strict=True)
    title = "beside a cold start of NUTS, and gaps"
    common.show(title, beside)
    settings = {"queries": QUERIES, "draws": DRAWS, "nuts": DEFAULT._asdict()}
    common.save("refine", rows, **{title: list(beside)}, **settings)


def measure(cell: Cell) -> tuple[common.Row, common.Row]:
    """A cell's refined tasks, and the first of them beside NUTS and the exact posterior."""
    model, n, d = pfn.load(cell.model), cell.n, cell.d
    prior = model.prior
    assert isinstance(prior, GaussianProcess)
    drawn = draw_tasks(prior, n, d, tasks=cell.tasks, queries=QUERIES, seed=0)
    refined, seconds, compared = [], [], []
    for i in range(cell.tasks):
        context, x_query = (drawn.x[i], drawn.y[i]), drawn.x_query[i]
        began = time.perf_counter()
        answer = refine(model.condition(context, standardize=False))
        answer.predict(x_query)
        seconds.append(time.perf_counter() - began)
        refined.append(answer)
        if i < cell.with_nuts:
            compared.append(compare(model, prior, context, x_query, answer))
        print(f"{cell.model}, n = {n}, d = {d}: {i + 1} of {cell.tasks}", flush=True)
    size = {"model": cell.model, "n": n, "d": d}
    costs = size | {
        "tasks": cell.tasks,
        "k": median(answer.pareto_k for answer in refined),
        "worst k": max(answer.pareto_k for answer in refined),
        "share by SMC": fmean(answer.method == "smc" for answer in refined),
        "evaluations": median(answer.evaluations for answer in refined),
        "effective draws": median(answer.effective_draws for answer in refined),
        "seconds": median(seconds),
    }
    beside = size | {
        "tasks": cell.with_nuts,
        "gradients of NUTS": median(part.gradients for part in compared),
        "per evaluation": median(part.saved for part in compared),
        "its seconds": median(part.seconds for part in compared[1:]),  # the first compiles
        "gap": fmean(part.gap for part in compared),
        "refined gap": fmean(part.refined_gap for part in compared),
        "gap of the reference": fmean(part.reference_gap for part in compared),
    }
    return costs, beside


class Comparison(NamedTuple):
    """A task beside NUTS; gaps in nats per query."""

    gradients: float  # of NUTS, to as many effective draws
    saved: float  # these over the evaluations of refining
    seconds: float  # of NUTS at its settings
    gap: float
    refined_gap: float
    reference_gap: float  # that the reference's own error is worth


def compare(
    model: PFN,
    prior: GaussianProcess,
    context: tuple[Tensor, Tensor],
    x_query: Tensor,
    refined: Refined,
) -> Comparison:
    """One task, its network's answer and its refined one beside NUTS and the exact posterior."""
    began = time.perf_counter()
    posterior, diagnostics = nuts_posterior(prior, context, x_query)
    seconds = time.perf_counter() - began
    exact: Distribution = posterior
    if context[0].shape[1] == 1:
        exact = prior.posterior(context, x_query)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = exact.sample(torch.Size([DRAWS]))
    network = model.condition(context, standardize=False).predict(x_query)
    gradients = cold_gradients(diagnostics, refined.effective_draws)
    return Comparison(
        gradients,
        gradients / refined.evaluations,
        seconds,
        divergence(exact, network, y),
        divergence(exact, refined.predict(x_query), y),
        float(exact.log_prob_error(y).square().mean()) / 2,  # type: ignore[attr-defined]
    )


def cold_gradients(diagnostics: Diagnostics, effective: float) -> float:
    """Gradients of one NUTS for each kernel, until their mixture has so many effective draws."""
    shares = diagnostics.log_evidence[0].softmax(0)
    reached = float(1 / (shares.square() / diagnostics.ess[0]).sum())
    leapfrogs = float(diagnostics.leapfrogs[0].sum())  # one draw of each kernel
    return leapfrogs * DEFAULT.chains * (DEFAULT.warmup + DEFAULT.draws * effective / reached)


def divergence(exact: Distribution, answer: Distribution, y: Tensor) -> float:
    """E[log exact - log answer] over draws y of exact, by terms that are never negative."""
    log_ratio = answer.log_prob(y) - exact.log_prob(y)
    return float((log_ratio.exp() - 1 - log_ratio).mean())


if __name__ == "__main__":
    typer.run(main)
