"""CPU seconds to a given gap from the exact posterior: ours against the `pfns` package.

One prior for both: Gaussian processes of one feature with an RBF kernel of lengthscale 0.2,
outputscale 1 and noise of standard deviation 0.1, inputs uniform on [0, 1]; contexts of 0 to 49
points. As the hyperparameters are fixed, the exact posterior has a closed form. Both networks train
on one thread, each to the end of its learning-rate schedule, and answer the same 200 fresh tasks.

    python -m venv .venv-pfns && .venv-pfns/bin/pip install torch==2.13.0 pfns==0.4.2
    python benchmarks/peers.py --pfns-python .venv-pfns/bin/python
"""

from __future__ import annotations

import math
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from common import save
from torch import Tensor

from pfn.pretrain import PretrainConfig, pretrain
from pfn.transformer import Transformer
from priors import GaussianProcess, Prior, Tasks
from priors.kernel_prior import cholesky
from priors.kernels import rbf

PRIOR = GaussianProcess(lengthscale=0.2, outputscale=1.0, noise=0.01)
SIZES = (5, 10, 20, 40)
OURS = PretrainConfig(
    max_context=49,
    width=64,
    layers=2,
    heads=4,
    refinements=1,
    tokens=512,
    micro_batches=1,
    lr=5e-3,
    bf16=False,
    tasks=1,
)
# The tutorial's own sizes, and the sizes and step size at which the package did best on a CPU.
RIVALS = {
    "pfns, its tutorial's recipe": [],
    "pfns, small network and batch": [
        "--width=128",
        "--heads=4",
        "--batch=8",
        "--lr=1e-3",
        "--epochs=50",
    ],
}


class Questions(NamedTuple):
    """Contexts of one size with queries, and draws of y from the exact posterior at each."""

    x: Tensor  # (task, n, 1)
    y: Tensor  # (task, n)
    query: Tensor  # (task, m, 1)
    targets: Tensor  # (task, m, draw)
    log_density: Tensor  # (task, m, draw) of the targets under the exact posterior


class OnlySamples:
    """A prior without conditionals: our network then trains on plain draws, as the rival does."""

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        return PRIOR.sample(batch, n, d, generator=generator)


def main(
    pfns_python: Annotated[Path, typer.Option(help="an interpreter with pfns 0.4.2 and torch")],
    seconds: Annotated[float, typer.Option(help="CPU seconds of training for the rival")] = 300.0,
    tasks: Annotated[int, typer.Option(help="held-out tasks, over all context sizes")] = 200,
) -> None:
    """Trains the rival for `seconds`, then ours for growing shares of it until it is as good."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(2024)
    questions = {n: ask(n, tasks // len(SIZES), generator=generator) for n in SIZES}
    rows: list[dict[str, Any]] = []
    for name, options in RIVALS.items():
        rows.append(
            describe(name, *train_rival(pfns_python, questions, seconds, options), questions)
        )
    for name, prior in {"ours": PRIOR, "ours, on plain draws": OnlySamples()}.items():
        rate = tasks_per_second(prior)
        for share in (1 / 48, 1 / 24, 1 / 12, 1 / 6, 1 / 3):
            row = describe(
                name, *train_ours(prior, questions, round(rate * seconds * share)), questions
            )
            rows.append(row)
            if row["gap, nats"] < min(rows[i]["gap, nats"] for i in range(len(RIVALS))):
                break
    save("peers", rows, reached=[verdict(rows, index) for index in range(len(RIVALS))])


def ask(n: int, tasks: int, *, generator: torch.Generator, m: int = 50) -> Questions:
    """Fresh tasks with draws from their exact posteriors, one per 1/32 of probability."""
    drawn = PRIOR.sample(tasks, n + m, 1, generator=generator)
    x, y, query = drawn.x[:, :n], drawn.y[:, :n], drawn.x[:, n:]
    lengthscale, noise = torch.full((tasks, 1), 0.2), torch.full((tasks,), 0.01)
    factor = cholesky(rbf(x, x, lengthscale), noise.double())
    weights = torch.linalg.solve_triangular(factor, rbf(x, query, lengthscale), upper=False)
    whitened = torch.linalg.solve_triangular(factor, y.unsqueeze(-1), upper=False)
    mean = (weights * whitened).sum(1)
    std = (1 + 0.01 - weights.square().sum(1)).sqrt()
    uniform = torch.rand(tasks, m, 32, dtype=torch.float64, generator=generator)
    z = torch.special.ndtri(((torch.arange(32) + uniform) / 32).clamp(1e-9, 1 - 1e-9))
    targets = mean.unsqueeze(-1) + std.unsqueeze(-1) * z
    log_density = -0.5 * z.square() - (std * math.sqrt(2 * math.pi)).log().unsqueeze(-1)
    return Questions(x, y, query, targets, log_density)


def train_rival(
    python: Path, questions: dict[int, Questions], seconds: float, options: list[str]
) -> tuple[dict[int, Tensor], float, int]:
    """Log densities of the targets by n, CPU seconds and tasks of training, from `rival.py`."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "tasks.npz", Path(folder) / "answers.npz"
        np.savez(
            asked,
            **{
                f"{name}_{n}": getattr(batch, name).float().numpy()
                for n, batch in questions.items()
                for name in ("x", "y", "query", "targets")
            },
        )
        script = Path(__file__).with_name("rival.py")
        command = [python, script, asked, answered, f"--seconds={seconds}", *options]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        answers = np.load(answered)
        densities = {n: torch.tensor(answers[f"log_density_{n}"]).double() for n in questions}
        return densities, float(answers["cpu_seconds"]), int(answers["tasks"])


def train_ours(
    prior: Prior, questions: dict[int, Questions], tasks: int
) -> tuple[dict[int, Tensor], float, int]:
    """Log densities of the targets by n, CPU seconds and tasks of training."""
    began = time.process_time()
    model = fit(prior, tasks)
    seconds = time.process_time() - began
    return {n: log_density(model, batch) for n, batch in questions.items()}, seconds, tasks


def fit(prior: Prior, tasks: int) -> Transformer:
    with tempfile.TemporaryDirectory() as folder:
        return pretrain(prior, replace(OURS, tasks=tasks), Path(folder), device="cpu")


def tasks_per_second(prior: Prior) -> float:
    """Tasks per CPU second of training, from a short run after an even shorter one."""
    few = 2000
    fit(prior, 200)
    began = time.process_time()
    fit(prior, few)
    return few / (time.process_time() - began)


@torch.no_grad()
def log_density(model: Transformer, batch: Questions) -> Tensor:
    """log q (task, query, draw) of the targets given the contexts, in the units of the prior."""
    encoded = model.encode(batch.x.float(), batch.y.float())
    mixture = model.mixture_y(model.decode(encoded, batch.query.float()))
    center, scale = (part[:, None, None].double() for part in encoded.scaling)
    z = ((batch.targets - center) / scale).unsqueeze(-1)
    log_weights, means, log_stds = (part.unsqueeze(-2).double() for part in mixture)
    density = torch.distributions.Normal(means, log_stds.exp()).log_prob(z)
    return (log_weights + density).logsumexp(-1) - scale.log()


def describe(
    name: str,
    densities: dict[int, Tensor],
    seconds: float,
    tasks: int,
    questions: dict[int, Questions],
) -> dict[str, Any]:
    """A row: what training took, and the mean gap over tasks with its standard error."""
    gaps = {n: (batch.log_density - densities[n]).mean((1, 2)) for n, batch in questions.items()}
    each = torch.cat(list(gaps.values()))
    return {
        "network": name,
        "CPU s": seconds,
        "tasks": tasks,
        "gap, nats": float(each.mean()),
        "standard error": float(each.std() / math.sqrt(len(each))),
        "median task": float(each.median()),
        **{f"n = {n}": float(gap.mean()) for n, gap in gaps.items()},
    }


def verdict(rows: list[dict[str, Any]], rival: int) -> dict[str, Any]:
    """The CPU seconds that ours needs for the rival's gap, from our first run that reaches it."""
    theirs = rows[rival]
    answer = {
        "rival": theirs["network"],
        "its gap": theirs["gap, nats"],
        "its CPU s": theirs["CPU s"],
    }
    for row in rows[len(RIVALS) :]:
        if row["gap, nats"] <= theirs["gap, nats"] and row["network"] not in answer:
            answer[row["network"]] = row["CPU s"]
    return answer


if __name__ == "__main__":
    typer.run(main)
