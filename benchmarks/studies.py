"""Design choices at equal compute: head, optimizer, experts, loss, features, shape and batches.

    python benchmarks/studies.py [--only head] [--cpu-seconds 60]

Each run trains a small network (width 64, 2 layers unless it says so) for the same CPU time on one
core, sampling included, and is judged at the end of its schedule on tasks that it never saw: by the
loss of y in nats per query and, for the Gaussian-process prior of one feature, its gap to the exact
posterior. Held-out contexts have 2, 8, 32 and 128 points with equal weight, as log-uniform sizes
have. Runs are kept in results/studies-runs.json, so that a stopped study continues.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple, Protocol

import common  # first: it quietens OpenMP before torch starts
import torch
import typer
from torch import Tensor, nn

from pfn.fresh_tasks import named_generator
from pfn.mixture import mixture_log_prob
from pfn.optim import Optimizer
from pfn.pretrain import Lesson, PretrainConfig, Sizes, architecture, draw_lesson, plan, schedule
from pfn.transformer import Block, Transformer, TransformerConfig
from priors import GaussianProcess, Prior, ReferencePrior, Tasks

SEEDS = {
    "loss": 3,
    "kernels": 3,
    "shape": 3,
    "octaves": 3,
    "queries": 3,
}  # runs of a variant; else 2
CONTEXTS = (2, 8, 32, 128)  # sizes of held-out contexts
HELD_OUT = 10**9  # a step that no training run reaches


@dataclass(frozen=True)
class Variant:
    """One run's settings.

    `particles` are the values of the latents behind each target, the task's own first; with
    `single_draws` the prior shows one draw of each query and none of them.
    """

    prior: str = "gp-1d"
    head: str = "normals"
    components: int = 6
    refinements: int = 6
    width: int = 64
    layers: int = 2
    tokens: int = 1024
    uniform_contexts: bool = False
    muon: bool = True
    lr: float = 5e-3
    single_draws: bool = False
    particles: int = 8
    kernels: tuple[str, ...] = ("rbf", "matern52", "matern32")
    octaves: int = 6
    queries: int = 24
    log_n_temperature: bool = True
    seed: int = 0

    def config(self, cpu_seconds: float) -> PretrainConfig:
        """The trainer's settings: a small network, and none of the auxiliary tasks."""
        return PretrainConfig(
            max_features=12 if self.prior == "gp" else 1,
            width=self.width,
            layers=self.layers,
            heads=4,
            components=self.components,
            expert_kernels=self.kernels,
            least_refinements=min(1, self.refinements),
            refinements=self.refinements,
            fourier_octaves=self.octaves,
            seconds=cpu_seconds,
            queries=self.queries,
            particles=self.particles,
            tokens=self.tokens,
            micro_batches=1,
            buffer_share=0.0,
            standardized_share=0.0,
            bounded_share=0.0,
            known_share=0.0,
            latent_share=0.0,
            lr=self.lr,
            bf16=False,
            seed=self.seed,
        )


JUDGE = Variant(particles=8).config(1.0)  # of held-out tasks, whatever runs are trained with

HEADS = ("normals", "student-t", "100 bars", "1000 bars")
STUDIES: dict[str, dict[str, Variant]] = {
    "head": {
        f"{head} on {prior}": Variant(prior, head)
        for prior in ("gp-1d", "heavy-tails")
        for head in HEADS
    },
    "optimizer": {
        **{f"Muon, lr {lr}": Variant(lr=lr) for lr in (2.5e-3, 5e-3)},
        **{f"AdamW, lr {lr}": Variant(muon=False, lr=lr) for lr in (2.5e-3, 5e-3)},
    },
    "refinements": {
        f"{count} refinements": Variant("gp", refinements=count) for count in (0, 2, 4, 6)
    },
    "experts": {f"{count} experts": Variant("gp", components=count) for count in (3, 6, 9)},
    "layers": {f"{count} layers": Variant("gp", layers=count) for count in (1, 2, 4)},
    "shape": {
        f"{layers} layers, {width} wide": Variant("gp", width=width, layers=layers)
        for width, layers in ((96, 1), (64, 2), (48, 4), (32, 8))
    },
    "batch": {
        f"{tokens} tokens, lr {lr}": Variant("gp", tokens=tokens, lr=lr)
        for tokens, lr in ((512, 3.5e-3), (1024, 5e-3), (2048, 7e-3), (4096, 1e-2))
    },
    "contexts": {
        "log-uniform sizes": Variant("gp"),
        "uniform sizes": Variant("gp", uniform_contexts=True),
    },
    "loss": {
        "8 draws from 8 particles": Variant(),
        "8 draws from one conditional": Variant(particles=1),
        "one draw per query": Variant(single_draws=True),
    },
    "particles": {
        f"{count} particles": Variant("gp", particles=count) for count in (1, 4, 8, 16, 32)
    },
    "kernels": {
        "experts of three kernels": Variant(),
        "experts of the prior's kernel": Variant(kernels=("rbf",)),
    },
    "octaves": {f"{octaves} Fourier octaves": Variant(octaves=octaves) for octaves in (0, 6)},
    "queries": {f"{queries} per task": Variant(queries=queries) for queries in (8, 24, 72)},
    "temperature": {
        "attention sharpened by log n": Variant(),
        "constant temperature": Variant(log_n_temperature=False),
    },
}


# Priors


class SampleOnly:
    """A prior that shows single draws only, as a user's own prior may."""

    def __init__(self, base: Prior) -> None:
        self.sample = base.sample


class HeavyTails:
    """y_i = s (f(x_i) + e_i): f a Gaussian process, e_i Student-t, and s^2 inverse-gamma per task.

    Both the scales of tasks and single observations have the tails of 3 degrees of freedom.
    """

    def __init__(self, base: GaussianProcess) -> None:
        self.base = base

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        tasks = self.base.sample(batch, n, d, generator=generator)
        scale, ratio = (_inverse_chi(shape, generator) for shape in ((batch, 1), (batch, n)))
        f = scale * tasks.f
        return Tasks(tasks.x, f + scale * ratio * (tasks.y - tasks.f), f, {})


def _inverse_chi(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """sqrt(3 / chi-square(3)): times a standard normal it is a Student-t with 3 degrees."""
    normal = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    return (3 / normal.square().sum(0)).sqrt()


def make_prior(name: str) -> Prior:
    file = "gp.py" if name == "gp" else "gp-1d.py"
    recipe: GaussianProcess = runpy.run_path(str(common.RECIPES / file))["prior"]
    return HeavyTails(recipe) if name == "heavy-tails" else recipe


# Heads: from `size` numbers per query to a log density in the network's normalised units of y


class Experts(NamedTuple):
    """What the experts say of y at queries: log odds, means and standard deviations (b, m, e)."""

    log_odds: Tensor
    means: Tensor
    stds: Tensor


class Head(Protocol):
    bias: Tensor  # (size,) where training starts

    def log_prob(self, raw: Tensor, experts: Experts, z: Tensor) -> Tensor:
        """log q(z) (s, b, m) for the head's output (b, m, size) and draws z (s, b, m)."""
        ...


class Normals:
    """The library's head: a normal around each expert."""

    def __init__(self, components: int) -> None:
        self.bias = torch.zeros(3 * components)

    def log_prob(self, raw: Tensor, experts: Experts, z: Tensor) -> Tensor:
        return mixture_log_prob(*_around(raw, experts), z)


class StudentTs:
    """A Student-t around each expert, with degrees of freedom of its own above 2 (10 at first)."""

    def __init__(self, components: int) -> None:
        self.bias = torch.cat([torch.zeros(3 * components), torch.full((components,), 8.0)])

    def log_prob(self, raw: Tensor, experts: Experts, z: Tensor) -> Tensor:
        raw, dof = raw.split([raw.shape[-1] * 3 // 4, raw.shape[-1] // 4], dim=-1)
        weights, means, log_scales = _around(raw, experts)
        dof = 2 + nn.functional.softplus(dof)
        normaliser = torch.lgamma((dof + 1) / 2) - torch.lgamma(dof / 2)
        normaliser = normaliser - 0.5 * (math.pi * dof).log() - log_scales
        square = ((z.unsqueeze(-1) - means) * torch.exp(-log_scales)).square()
        log_t = normaliser - 0.5 * (dof + 1) * torch.log1p(square / dof)
        return torch.logsumexp(weights + log_t, dim=-1)


def _around(raw: Tensor, experts: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights, locations and log scales that a head moves away from the experts."""
    logits, shift, stretch = raw.chunk(3, dim=-1)
    log_scales = experts.stds.log() + 10 * torch.tanh(stretch / 10)
    weights = (logits + experts.log_odds).log_softmax(-1)
    return weights, experts.means + experts.stds * shift, log_scales


class Bars:
    """A histogram: bars of equal prior mass, half-normal tails fitted to the prior's draws.

    Of the experts it knows what the network told its queries.
    """

    def __init__(self, count: int, draws: Tensor) -> None:
        self.bias = torch.zeros(count)
        ordered = draws.sort().values
        steps = torch.linspace(0, len(ordered) - 1, count + 1)[1:-1].long()
        self.borders = ordered[steps]  # (count - 1,)
        self.log_widths = self.borders.diff().clamp_min(1e-6).log()
        low, high = self.borders[0], self.borders[-1]
        self.tails = torch.stack(  # the half-normals' most likely scales
            [
                (ordered[ordered < low] - low).square().mean().sqrt(),
                (ordered[ordered > high] - high).square().mean().sqrt(),
            ]
        )

    def log_prob(self, raw: Tensor, experts: Experts, z: Tensor) -> Tensor:
        bar = torch.searchsorted(self.borders, z)  # (s, b, m)
        log_mass = raw.log_softmax(-1).gather(-1, bar.permute(1, 2, 0)).permute(2, 0, 1)
        inside = -self.log_widths[(bar - 1).clamp(0, len(self.log_widths) - 1)]
        upper = bar == len(self.borders)
        excess = torch.where(upper, z - self.borders[-1], self.borders[0] - z)
        scale = self.tails[upper.long()]
        tail = 0.5 * math.log(2 / math.pi) - scale.log() - 0.5 * (excess / scale).square()
        return log_mass + torch.where((bar == 0) | upper, tail, inside)


def make_head(variant: Variant, normalised_draws: Callable[[], Tensor]) -> Head:
    if variant.head.endswith("bars"):
        return Bars(int(variant.head.split()[0]), normalised_draws())
    return (Normals if variant.head == "normals" else StudentTs)(variant.components)


# Runs


class Network(NamedTuple):
    """The library's trunk under a head of the study."""

    trunk: Transformer
    head: Head


def make_network(variant: Variant, config: PretrainConfig) -> Network:
    prior = make_prior(variant.prior)
    settings = architecture(prior, config)
    torch.manual_seed(config.seed)
    trunk = Transformer(settings)

    def normalised_draws() -> Tensor:
        lessons = [
            _lesson(prior, settings, config, plan(config, i, 0), HELD_OUT - i) for i in range(200)
        ]
        return torch.cat(
            [_normalise(trunk, lesson, lesson.y_draws).flatten() for lesson in lessons]
        )

    head = make_head(variant, normalised_draws)
    for name in ("head_y", "head_f"):
        linear = nn.Linear(config.width, len(head.bias))
        nn.init.normal_(linear.weight, std=0.02)
        linear.bias.data.copy_(head.bias)
        setattr(trunk, name, linear)
    if not variant.log_n_temperature:
        for block in trunk.blocks:
            assert isinstance(block, Block)
            constant = torch.tensor([[1.0], [0.0]]).repeat(1, config.heads)
            del block.temperature
            block.register_buffer("temperature", constant)
    return Network(trunk, head)


def losses(network: Network, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Negative log densities of y and of f, in nats, averaged over each task's queries (b,)."""
    trunk, head = network
    final, scaling = trunk.answer(lesson.x, lesson.y, lesson.known, lesson.own, lesson.x_query)
    said, log_scale = final.forecast, scaling.scale.log()

    def surprise(layer: nn.Module, variance: Tensor, draws: Tensor) -> Tensor:
        parts = (final.log_odds, said.mean, variance.sqrt())
        experts = Experts(*(part.to(final.tokens) for part in parts))
        log_prob = head.log_prob(layer(final.tokens), experts, _normalise(trunk, lesson, draws))
        return log_scale - log_prob.mean((0, 2))

    of_y = surprise(trunk.head_y, said.variance + said.noise, lesson.y_draws)
    return of_y, surprise(trunk.head_f, said.variance, lesson.f_draws)


def train(variant: Variant, config: PretrainConfig) -> tuple[Network, dict[str, float]]:
    """Trains until the CPU time is spent, by the library's optimizer and schedule."""
    network = make_network(variant, config)
    trunk, prior = network.trunk, make_prior(variant.prior)
    prior = SampleOnly(prior) if variant.single_draws else prior
    optimizer = Optimizer(trunk, weight_decay=config.weight_decay, muon=variant.muon)
    assert config.seconds is not None
    began, step, tasks = time.process_time(), 0, 0
    while (spent := time.process_time() - began) < config.seconds:
        for part in range(config.micro_batches):
            sizes = sizes_of(variant, config, step, part)
            loss_y, loss_f = losses(
                network, _lesson(prior, trunk.config, config, sizes, step, part)
            )
            ((loss_y.mean() + loss_f.mean()) / config.micro_batches).backward()
            tasks += sizes.batch
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), config.clip)
        optimizer.step(config.lr * schedule(spent / config.seconds, config.warmup))
        trunk.zero_grad(set_to_none=True)
        step += 1
    return network, {"steps": step, "tasks": tasks, "cpu_seconds": round(spent, 1)}


def sizes_of(variant: Variant, config: PretrainConfig, step: int, part: int) -> Sizes:
    """The library's sizes of a micro-batch, or as many tokens with contexts of uniform sizes."""
    sizes = plan(config, step, part)
    if not variant.uniform_contexts:
        return sizes
    generator = named_generator(f"contexts/{config.seed}/{step}/{part}")
    n = int(torch.randint(config.max_context + 1, (), generator=generator))
    tokens = config.tokens / config.micro_batches
    return sizes._replace(context=n, batch=max(1, round(tokens / (n + config.queries))))


def judge(network: Network, variant: Variant, batch: int) -> dict[str, Any]:
    """Loss of y on held-out tasks, the same for all runs on a prior, with its standard error."""
    prior = make_prior(variant.prior)
    by_task = []
    for n in CONTEXTS:
        with torch.no_grad():
            loss_y, _ = losses(network, held_out(prior, network.trunk.config, n, batch))
        by_task.append(loss_y)
    errors = torch.stack([values.std() / math.sqrt(batch) for values in by_task])
    return {
        "loss": mean(float(values.mean()) for values in by_task),
        "loss_by_n": {n: float(values.mean()) for n, values in zip(CONTEXTS, by_task, strict=True)},
        "loss_standard_error": float(errors.square().sum().sqrt() / len(errors)),
    }


def reference(name: str, path: Path, batch: int) -> float | None:
    """The loss of the exact posterior on the same tasks, where the prior has it in seconds."""
    prior = make_prior(name)
    if not isinstance(prior, ReferencePrior) or name == "gp":
        return None
    settings = architecture(prior, JUDGE)
    by_n = []
    for n in CONTEXTS:

        def exact(n: int = n) -> float:
            lesson = held_out(prior, settings, n, batch)
            parts = (lesson.x, lesson.y, lesson.x_query, lesson.y_draws.transpose(0, 1))
            log_density = []
            for x, y, x_query, draws in zip(*(part.double() for part in parts), strict=True):
                log_density.append(prior.posterior((x, y), x_query).log_prob(draws).mean())
            return -float(torch.stack(log_density).mean())

        by_n.append(remember(path, f"exact posterior, {name}, n = {n}, {batch} tasks", exact))
    return mean(by_n)


def held_out(prior: Prior, settings: TransformerConfig, n: int, batch: int) -> Lesson:
    features = min(5, settings.max_features)
    sizes = Sizes(batch, context=n, buffer=0, features=features, latents=False)
    return _lesson(prior, settings, JUDGE, sizes, HELD_OUT + n)


def _lesson(
    prior: Prior,
    settings: TransformerConfig,
    config: PretrainConfig,
    sizes: Sizes,
    step: int,
    part: int = 0,
) -> Lesson:
    return draw_lesson(prior, settings, config, sizes, step, part, torch.device("cpu"))


def _normalise(trunk: Transformer, lesson: Lesson, draws: Tensor) -> Tensor:
    """Draws (s, b, m) in the network's units."""
    return trunk.scaling(lesson.y).apply(draws)


def run(variant: Variant, cpu_seconds: float, path: Path, batch: int = 128) -> dict[str, Any]:
    """One run's figures, from memory where it was made before."""

    def figures() -> dict[str, Any]:
        network, effort = train(variant, variant.config(cpu_seconds))
        return judge(network, variant, batch) | effort

    return remember(path, json.dumps({**asdict(variant), "cpu_seconds": cpu_seconds}), figures)


def remember(path: Path, key: str, compute: Callable[[], Any]) -> Any:
    """The value of `key` in a JSON file, computed and added where it is missing."""
    memory = json.loads(path.read_text()) if path.exists() else {}
    if key not in memory:
        value = compute()
        memory = json.loads(path.read_text()) if path.exists() else {}
        memory[key] = value
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(memory, indent=1) + "\n")
        os.replace(temporary, path)
    return memory[key]


def table(study: str, cpu_seconds: float, path: Path, batch: int = 128) -> list[dict[str, Any]]:
    """One row per variant; `gap` is to the exact posterior, `spread` half the range over seeds.

    Variants take turns, for a busy machine does more in a second of CPU time at one minute than at
    another.
    """
    rows, seeds, variants = [], SEEDS.get(study, 2), STUDIES[study]
    turns = [
        [run(replace(variant, seed=s), cpu_seconds, path, batch) for variant in variants.values()]
        for s in range(seeds)
    ]
    for (label, variant), runs in zip(variants.items(), zip(*turns, strict=True), strict=True):
        losses, exact = [figures["loss"] for figures in runs], reference(variant.prior, path, batch)
        row: dict[str, Any] = {"study": study, "variant": label, "seeds": seeds}
        row |= {"gap": None if exact is None else mean(losses) - exact, "loss": mean(losses)}
        row |= {f"n = {n}": mean(_by_n(r)[n] for r in runs) for n in CONTEXTS}
        row |= {"spread": (max(losses) - min(losses)) / 2}
        row |= {
            name: round(mean(r[name] for r in runs)) for name in ("steps", "tasks", "cpu_seconds")
        }
        rows.append(row)
    return rows


def _by_n(figures: dict[str, Any]) -> dict[int, float]:
    """Losses by size of the context, whose keys are words where they come from memory."""
    return {int(n): loss for n, loss in figures["loss_by_n"].items()}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"among {', '.join(STUDIES)}")] = None,
    cpu_seconds: Annotated[float, typer.Option(help="per run")] = 60.0,
) -> None:
    torch.set_num_threads(1)
    common.RESULTS.mkdir(exist_ok=True)
    for study in only or STUDIES:
        rows = table(study, cpu_seconds, common.RESULTS / "studies-runs.json")
        common.save(f"studies-{study}", rows)


if __name__ == "__main__":
    typer.run(main)
