"""Speed, as ratios measured in one run on one machine: `python benchmarks/speed.py`.

Contenders take turns and medians are compared, by the clock and in CPU time, on one thread unless
`--threads` says otherwise. Sections, each saved to results/speed-SECTION.json:

    predict   one `pfn.predict` against fitting and asking BoTorch's SingleTaskGP
    nuts      one `pfn.predict` against NUTS on the checkpoint's own prior, without its compilation
    cache     one query on an encoded context against a pass over all of it
    sampling  the prior's batched draws against one GPyTorch model per draw
    training  a training step's model FLOP/s against the matrix-product peak at its own shapes
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import gpytorch
import torch
import typer
from botorch import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from common import Timing, measure, save
from gpytorch.priors import LogNormalPrior
from torch import Tensor
from torch.distributions import LogNormal

import pfn
from pfn.model import PFN
from pfn.pretrain import PretrainConfig, Progress, plan, pretrain
from priors import GaussianProcess

Task = tuple[tuple[Tensor, Tensor], Tensor]
Rows = list[dict[str, Any]]
DEFAULT = ["predict", "cache", "sampling", "training", "nuts"]


def main(
    sections: Annotated[list[str] | None, typer.Argument(help="which; all by default")] = None,
    model: Annotated[str, typer.Option(help="a checkpoint, by name or path")] = "gp",
    repeats: Annotated[int, typer.Option(help="rounds of alternation")] = 15,
    threads: int = 1,
) -> None:
    """Measures the sections and saves a table of each."""
    warnings.filterwarnings(
        "ignore"
    )  # of fits that stop early and contexts beyond the trained size
    torch.set_num_threads(threads)
    run: dict[str, Callable[[], Rows]] = {
        "predict": lambda: predict(pfn.load(model), repeats),
        "nuts": lambda: nuts(pfn.load(model), repeats),
        "cache": lambda: cache(pfn.load(model), repeats),
        "sampling": lambda: sampling(repeats),
        "training": lambda: training(repeats),
    }
    for section in sections or DEFAULT:
        save(f"speed-{section}", run[section]())


def predict(model: PFN, repeats: int) -> Rows:
    """`pfn.predict`, its mean and variance, against SingleTaskGP fitted by maximum likelihood."""
    rows = []
    for n, m, goal in ((100, 1000, 3), (100, 100, 10), (20, 1, 60)):
        tasks = draw_tasks(model, n, m, 5, repeats + 1)
        timings = measure({"ours": ask(name, tasks), "rival": fit_and_ask(tasks)}, repeats)
        rows.append(compare(f"n = {n}, m = {m}, d = 5", "SingleTaskGP", timings, goal))
    return rows


def nuts(model: PFN, repeats: int) -> Rows:
    """`pfn.predict` against the reference posterior of the prior it was trained on."""
    assert model.prior is not None
    tasks = draw_tasks(model, 100, 1000, 5, repeats + 1)
    reference = iterate(tasks, lambda context, query: model.prior.posterior(context, query).mean)
    began = time.perf_counter()
    reference()
    first = time.perf_counter() - began
    fast = measure({"ours": ask(model, tasks)}, repeats)
    slow = measure({"rival": reference}, max(1, repeats // 5), warmup=0)
    row = compare("n = 100, m = 1000, d = 5", "NUTS", fast | slow, 300)
    return [row | {"its compilation, s": first - slow["rival"].wall}]


def cache(model: PFN, repeats: int) -> Rows:
    """One query on an encoded context of 1000 points against encoding it for each query."""
    (context, query), *_ = draw_tasks(model, 1000, 1, 5, 1)
    fitted = model.condition(context, extrapolate_n=True)
    timings = measure(
        {
            "ours": lambda: fitted.predict(query).mean,
            "rival": lambda: model.predict(context, query, extrapolate_n=True).mean,
        },
        repeats,
    )
    return [compare("one query, n = 1000, d = 5", "uncached pass", timings, 10)]


def sampling(repeats: int) -> Rows:
    """64 tasks of 128 points in 5 features: one batch against one GPyTorch model per task."""
    prior = GaussianProcess(
        lengthscale=LogNormal(-0.7, 1.0), outputscale=LogNormal(0.5, 0.8), ard=True
    )
    generator = torch.Generator().manual_seed(0)
    timings = measure(
        {
            "ours": lambda: prior.sample(64, 128, 5, generator=generator),
            "rival": lambda: [draw_with_gpytorch(128, 5) for _ in range(64)],
        },
        repeats,
    )
    row = compare("64 tasks, n = 128, d = 5", "GPyTorch, a model per draw", timings, 20)
    return [row | {"our tasks/s": 64 / timings["ours"].cpu}]


class Drawn(gpytorch.models.ExactGP):
    """An RBF Gaussian process with the hyperpriors of `sampling`, as one builds it for one draw."""

    def __init__(self, d: int) -> None:
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_prior=LogNormalPrior(-4.0, 1.5))
        super().__init__(None, None, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(
            gpytorch.kernels.RBFKernel(ard_num_dims=d, lengthscale_prior=LogNormalPrior(-0.7, 1.0)),
            outputscale_prior=LogNormalPrior(0.5, 0.8),
        )

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@torch.no_grad()
def draw_with_gpytorch(n: int, d: int) -> Tensor:
    """Targets (n,) of one task from a model with hyperparameters drawn from its priors."""
    model = Drawn(d).eval()
    for _, module, prior, closure, set_value in model.named_priors():
        set_value(module, prior.sample(closure(module).shape))
    return model.likelihood(model(torch.rand(n, d))).sample()


def training(repeats: int) -> Rows:
    """Steps of `pfn.pretrain` at width 256, with matrix products at its shapes in between."""
    rows = []
    prior = GaussianProcess(ard=True, scale_with_dimension=True)
    for bf16 in (False, True):
        config = PretrainConfig(max_features=12, width=256, heads=8, bf16=bf16, tasks=1)
        steps = range(repeats + 1)
        sizes = [
            [plan(config, step, part) for part in range(config.micro_batches)] for step in steps
        ]
        budget = sum(size.batch for parts in sizes for size in parts)
        config = PretrainConfig(max_features=12, width=256, heads=8, bf16=bf16, tasks=budget)
        clock = StepClock(config)
        with tempfile.TemporaryDirectory() as folder:
            pretrain(prior, config, Path(folder), report=clock)
        useful = sum(model_flops(config, size) for parts in sizes[1:] for size in parts)
        wall, cpu = (sum(part) for part in zip(*clock.steps[1:], strict=True))
        rows.append(
            {
                "what": f"step of {config.tokens} tokens, width 256, 6 layers",
                "precision": "bf16" if bf16 else "float32",
                "ms per step": 1e3 * wall / repeats,
                "CPU ms per step": 1e3 * cpu / repeats,
                "GFLOP/s": useful / cpu / 1e9,
                "peak GFLOP/s": clock.peak() / 1e9,
                "share": useful / cpu / clock.peak(),
                "goal": 0.5,
            }
        )
    return rows


class StepClock:
    """Called after each training step: keeps its time, and runs matrix products at its shapes."""

    def __init__(self, config: PretrainConfig) -> None:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        tokens, w = config.tokens // config.micro_batches, config.width
        self.steps: list[tuple[float, float]] = []
        self.rates: dict[tuple[int, int, int], list[float]] = {}
        self.shapes = [(tokens, w, 4 * w), (tokens, 4 * w, w), (w, tokens, 4 * w), (tokens, w, w)]
        self.operands = [
            (torch.randn(a, b, dtype=dtype), torch.randn(b, c, dtype=dtype))
            for a, b, c in self.shapes
        ]
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter(), time.process_time()
        self.steps.append((now[0] - self.wall, now[1] - self.cpu))
        for (a, b, c), (left, right) in zip(self.shapes, self.operands, strict=True):
            left @ right
            began = time.process_time()
            for _ in range(10):
                left @ right
            rate = 10 * 2 * a * b * c / (time.process_time() - began)
            self.rates.setdefault((a, b, c), []).append(rate)
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def peak(self) -> float:
        """FLOP/s of the fastest shape, by its median."""
        return max(median(rates) for rates in self.rates.values())


def model_flops(config: PretrainConfig, size: Any) -> float:
    """FLOPs of a micro-batch, forward and backward: 6 per weight and token, and attention.

    Queries need no keys and values of their own; optimiser, embedding and heads are not counted.
    """
    w, context, buffer = config.width, 1 + size.context, size.buffer
    full, queries = context + buffer, config.queries
    weights = (4 + 2 * config.expansion) * w * w * full + (
        2 + 2 * config.expansion
    ) * w * w * queries
    pairs = context**2 + buffer * (context + buffer / 2) + queries * (context + buffer / 2)
    return size.batch * config.layers * (6 * weights + 12 * w * pairs)


def draw_tasks(model: PFN, n: int, m: int, d: int, count: int) -> list[Task]:
    """Tasks ((x, y), query) in float64 from the checkpoint's prior."""
    prior = model.prior if isinstance(model.prior, GaussianProcess) else GaussianProcess(ard=True)
    drawn = prior.sample(count, n + m, d, generator=torch.Generator().manual_seed(7))
    return [
        ((x[:n], y[:n]), x[n:]) for x, y in zip(drawn.x.unbind(), drawn.y.unbind(), strict=True)
    ]


def ask(model: PFN, tasks: list[Task]) -> Callable[[], object]:
    """Each call answers the next task by `pfn.predict`."""

    def answer(context: tuple[Tensor, Tensor], query: Tensor) -> object:
        posterior = pfn.predict(context, query, model=model)
        return posterior.mean, posterior.variance

    return iterate(tasks, answer)


def fit_and_ask(tasks: list[Task]) -> Callable[[], object]:
    """Each call answers the next task by BoTorch's SingleTaskGP, fitted to its context."""

    def answer(context: tuple[Tensor, Tensor], query: Tensor) -> object:
        gp = SingleTaskGP(context[0], context[1].unsqueeze(-1))
        fit_gpytorch_mll(gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp))
        with torch.no_grad():
            posterior = gp.posterior(query, observation_noise=True)
            return posterior.mean, posterior.variance

    return iterate(tasks, answer)


def iterate(
    tasks: list[Task], answer: Callable[[tuple[Tensor, Tensor], Tensor], object]
) -> Callable[[], object]:
    """A call without arguments that answers one task after the other, from the first again."""
    endless: Iterator[Task] = itertools.cycle(tasks)
    return lambda: answer(*next(endless))


def compare(what: str, rival: str, timings: dict[str, Timing], goal: float) -> dict[str, Any]:
    """A row with both times in milliseconds and how many times faster ours is."""
    ours, other = timings["ours"], timings["rival"]
    return {
        "what": what,
        "against": rival,
        "ours, ms": 1e3 * ours.wall,
        "its, ms": 1e3 * other.wall,
        "ratio": other.wall / ours.wall,
        "ours, CPU ms": 1e3 * ours.cpu,
        "its, CPU ms": 1e3 * other.cpu,
        "ratio of CPU time": other.cpu / ours.cpu,
        "goal": goal,
    }


if __name__ == "__main__":
    typer.run(main)
