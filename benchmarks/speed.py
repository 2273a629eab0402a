"""Speed, as ratios measured in one run on one machine: `python benchmarks/speed.py`.

Contenders take turns and medians are compared, by the clock and in CPU time, on one thread unless
`--threads` says otherwise. Sections, each saved to results/speed-SECTION.json:

    predict   one `pfn.predict` against fitting and asking BoTorch's SingleTaskGP
    cache     one query on an encoded context against a pass over all of it
    sampling  the prior's batched draws against one GPyTorch model per draw
    training  a training step's model FLOP/s against the matrix-product peak at its own shapes
    recipes   the same of the shipped recipes, and what of their time goes to draws from the prior
    suggest   one suggestion of an optimizer by each surrogate, fit and acquisition
"""

from __future__ import annotations

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import gpytorch
import torch
import typer
from botorch import fit_gpytorch_mll
from botorch.exceptions.warnings import InputDataWarning
from botorch.models import SingleTaskGP
from botorch.test_functions import Hartmann
from common import RECIPES, SHIPPED, Timing, measure, save
from gpytorch.priors import LogNormalPrior
from optuna.distributions import FloatDistribution
from torch import Tensor
from torch.distributions import LogNormal

import pfn
import surrogates
from pfn.monitor import training_flops
from pfn.pretrain import (
    PretrainConfig,
    Progress,
    architecture,
    gains_by_bf16,
    is_bf16,
    plan,
    pretrain,
)
from pfn.recipe import load_recipe
from priors import GaussianProcess, Prior
from surrogates.acquisition import suggest
from surrogates.names import FITS
from surrogates.spaces import Space

Task = tuple[tuple[Tensor, Tensor], Tensor]
Rows = list[dict[str, Any]]


def main(
    sections: Annotated[list[str] | None, typer.Argument(help="which; all by default")] = None,
    model: Annotated[str, typer.Option(help="a checkpoint, by name or path")] = "gp",
    repeats: Annotated[int, typer.Option(help="rounds of alternation")] = 15,
    threads: int = 1,
) -> None:
    """Measures the sections and saves a table of each."""
    warnings.filterwarnings("ignore")  # of fits that stop early, of contexts beyond the trained
    torch.set_num_threads(threads)
    run: dict[str, Callable[[], Rows]] = {
        "predict": lambda: predict(model, repeats),
        "cache": lambda: cache(model, repeats),
        "sampling": lambda: sampling(repeats),
        "training": lambda: training(repeats),
        "recipes": lambda: recipes(repeats),
        "suggest": lambda: suggestions(max(3, repeats // 5)),
    }
    for section in sections or run:
        save(f"speed-{section}", run[section]())


def predict(model: str, repeats: int) -> Rows:
    """`pfn.predict`, its mean and variance, against SingleTaskGP fitted by maximum likelihood."""
    rows = []
    for n, m, goal in ((100, 1000, 3), (100, 100, 10), (20, 1, 60)):
        tasks = draw_tasks(model, n, m, 5)
        timings = measure({"ours": ask(model, tasks), "rival": fit_and_ask(tasks)}, repeats)
        rows.append(compare(f"n = {n}, m = {m}, d = 5", "SingleTaskGP", timings, goal))
    return rows


def suggestions(repeats: int) -> Rows:
    """A step of optimization after 50 evaluations of Hartmann's function of 6 inputs."""
    space = Space({f"x{i}": FloatDistribution(0.0, 1.0) for i in range(6)})
    X = space.sobol(50, seed=0)
    Y = -Hartmann(dim=6)(X).unsqueeze(-1)
    Y = (Y - Y.mean(0)) / Y.std(0)
    box = torch.tensor([[0.0] * 6, [1.0] * 6])

    def step(name: str) -> Callable[[], object]:
        seeds = itertools.count()  # another one each time, as in a run

        def call() -> object:
            seed = next(seeds)
            return suggest(
                surrogates.fit(name, X, Y, bounds=box, seed=seed), X, Y, space, seed=seed
            )

        return call

    contenders = {name: step(name) for name in FITS}
    for call in contenders.values():
        call()  # what happens once, such as compilation
    rounds = [{name: clock(call) for name, call in contenders.items()} for _ in range(repeats)]
    wall = {name: median(each[name].wall for each in rounds) for name in FITS}
    return [
        {"surrogate": name, "seconds": seconds, "times pfn": seconds / wall["pfn"]}
        for name, seconds in wall.items()
    ]


def clock(call: Callable[[], object]) -> Timing:
    """The time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def cache(model: str, repeats: int) -> Rows:
    """One query on an encoded context, of up to 1000 points, against encoding it for each query."""
    network, rows = pfn.load(model), []
    for n in (256, 500, 1000):
        context, query = draw_tasks(model, n, 1, 5)[0]
        fitted = network.condition(context)
        timings = measure(
            {
                "ours": lambda fitted=fitted, query=query: fitted.predict(query).mean,
                "rival": lambda context=context, query=query: network.predict(context, query).mean,
            },
            repeats,
        )
        rows.append(compare(f"one query, n = {n}, d = 5", "uncached pass", timings, 10))
    return rows


def sampling(repeats: int) -> Rows:
    """64 tasks in 5 features: one batch against one GPyTorch model per task, built both ways."""
    prior = GaussianProcess(
        lengthscale=LogNormal(-0.7, 1.0), outputscale=LogNormal(0.5, 0.8), ard=True
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in (100, 128):
        for name, build in {"ExactGP": ExactGP, "SingleTaskGP, as pfns does": botorch_gp}.items():
            timings = measure(
                {
                    "ours": lambda n=n: prior.sample(64, n, 5, generator=generator),
                    "rival": lambda n=n, build=build: [draw(build, n, 5) for _ in range(64)],
                },
                repeats,
            )
            row = compare(f"64 tasks, n = {n}, d = 5", f"a model per draw: {name}", timings, 20)
            rows.append(row | {"our tasks/s": 64 / timings["ours"].cpu})
    return rows


class ExactGP(gpytorch.models.ExactGP):
    """GPyTorch's own model with the prior of `sampling`."""

    def __init__(self, x: Tensor) -> None:
        likelihood, kernel = gpytorch_parts(x.shape[-1])
        super().__init__(None, None, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def botorch_gp(x: Tensor) -> SingleTaskGP:
    """BoTorch's model with the same prior, built as the `hebo_prior` of pfns 0.4.2 builds it."""
    likelihood, kernel = gpytorch_parts(x.shape[-1])
    mean, y = gpytorch.means.ZeroMean(), torch.randn(len(x), 1)
    with warnings.catch_warnings(action="ignore", category=InputDataWarning):  # of float32
        return SingleTaskGP(x, y, likelihood=likelihood, covar_module=kernel, mean_module=mean)


def gpytorch_parts(d: int) -> tuple[gpytorch.likelihoods.Likelihood, gpytorch.kernels.Kernel]:
    """A likelihood and an ARD kernel with the hyperpriors of `sampling`."""
    kernel = gpytorch.kernels.RBFKernel(ard_num_dims=d, lengthscale_prior=LogNormalPrior(-0.7, 1.0))
    above = gpytorch.constraints.GreaterThan(1e-9)  # some draws lie below the default, 1e-4
    noise_prior = LogNormalPrior(-4.0, 1.5)
    return (
        gpytorch.likelihoods.GaussianLikelihood(noise_prior, noise_constraint=above),
        gpytorch.kernels.ScaleKernel(kernel, outputscale_prior=LogNormalPrior(0.5, 0.8)),
    )


@torch.no_grad()
def draw(build: Callable[[Tensor], Any], n: int, d: int) -> tuple[Tensor, Tensor]:
    """f and y (n,) of one task, from a model with hyperparameters drawn from its priors."""
    x = torch.rand(n, d)
    model = build(x).eval()
    for _, module, prior, closure, set_value in model.named_priors():
        set_value(module, prior.sample(closure(module).shape))
    with gpytorch.settings.prior_mode(True):
        f = model(x).sample()
        return f, model.likelihood(f).sample()


def training(repeats: int) -> Rows:
    """Steps of `pfn.pretrain` at width 256, with matrix products at its shapes in between.

    Of as many tokens as by default, and as long runs take: the optimizer's share falls with them.
    """
    rows = []
    prior = GaussianProcess(ard=True, scale_with_dimension=True)
    precisions = (False, True) if gains_by_bf16(torch.device("cpu")) else (False,)
    for tokens, bf16 in itertools.product((2048, 8192), precisions):
        config = PretrainConfig(
            max_features=12,
            width=256,
            heads=8,
            layers=6,
            expansion=4,
            tokens=tokens,
            micro_batches=tokens // 1024,  # of one size, as the products that they are held against
            bf16=bf16,
            tasks=1,
        )
        clock, work = run_steps(prior, config, repeats)
        wall, cpu = (sum(part) for part in zip(*clock.steps[1:], strict=True))
        rows.append(
            {
                "what": f"a step of {config.tokens} tokens, width 256, {config.layers} layers",
                "precision": "bfloat16" if bf16 else "float32",
                "ms": 1e3 * wall / repeats,
                "CPU ms": 1e3 * cpu / repeats,
                "GFLOP/s": work.operations / cpu / 1e9,
                "peak GFLOP/s": clock.peak() / 1e9,
                "share of peak": work.operations / cpu / clock.peak(),
                "goal": 0.5,
            }
        )
    return rows


def recipes(repeats: int) -> Rows:
    """Steps of the recipes of the shipped checkpoints."""
    rows, steps = [], 4 * repeats  # they are short
    for name in SHIPPED:
        _, prior, config = load_recipe(str(RECIPES / f"{name}.py"))
        clock, work = run_steps(prior, config, steps)
        wall, cpu = (sum(part) for part in zip(*clock.steps[1:], strict=True))
        rows.append(
            {
                "recipe": name,
                "network": f"{config.width} wide, {config.layers} layers",
                "experts": 0 if config.causal else config.components,
                "tokens/s": work.tokens / cpu,
                "GFLOP/s": work.operations / cpu / 1e9,
                "peak GFLOP/s": clock.peak() / 1e9,
                "share of peak": work.operations / cpu / clock.peak(),
                "share of draws": sum(clock.sampling[1:]) / wall,
            }
        )
    return rows


class Work(NamedTuple):
    """What some steps call for."""

    operations: float  # floating-point, of `training_flops`
    tokens: int


def run_steps(prior: Prior, config: PretrainConfig, repeats: int) -> tuple[StepClock, Work]:
    """Times of a first step and `repeats` others, and the work of these."""
    sizes = [
        [plan(config, step, part) for part in range(config.micro_batches)]
        for step in range(repeats + 1)
    ]
    tasks = sum(size.batch for parts in sizes for size in parts)
    config = replace(config, seconds=None, tasks=tasks)
    clock = StepClock(config)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(prior, config, Path(folder), report=clock)
    network = architecture(prior, config)
    timed = [size for parts in sizes[1:] for size in parts]
    return clock, Work(
        sum(training_flops(network, size, config.queries) for size in timed),
        sum(size.batch * (size.context + size.buffer + config.queries) for size in timed),
    )


class StepClock:
    """Called after each training step: keeps its time, and runs matrix products at its shapes."""

    def __init__(self, config: PretrainConfig) -> None:
        device = torch.device("cpu")
        dtype = torch.bfloat16 if is_bf16(config, device) else torch.float32
        tokens, w = config.tokens // config.micro_batches, config.width
        hidden = config.expansion * w
        self.steps: list[tuple[float, float]] = []
        self.sampling: list[float] = []  # seconds of each step
        self.rates: dict[tuple[int, int, int], list[float]] = {}
        self.shapes = [
            (tokens, w, hidden),
            (tokens, hidden, w),
            (w, tokens, hidden),
            (tokens, w, w),
        ]
        self.operands = [
            (torch.randn(a, b, dtype=dtype), torch.randn(b, c, dtype=dtype))
            for a, b, c in self.shapes
        ]
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter(), time.process_time()
        wall = now[0] - self.wall
        self.steps.append((wall, now[1] - self.cpu))
        self.sampling.append(progress.sampling_share * wall)
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


def draw_tasks(model: str, n: int, m: int, d: int, count: int = 32) -> list[Task]:
    """Tasks ((x, y), query) in float64 from the checkpoint's prior."""
    prior = pfn.load(model).prior
    assert prior is not None
    drawn = prior.sample(count, n + m, d, generator=torch.Generator().manual_seed(7))
    return [
        ((x[:n], y[:n]), x[n:]) for x, y in zip(drawn.x.unbind(), drawn.y.unbind(), strict=True)
    ]


def ask(model: str, tasks: list[Task]) -> Callable[[], object]:
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
