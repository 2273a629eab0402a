"""Pretraining: any prior in, a transformer that approximates its posterior predictive out.

Each step draws fresh tasks in a few micro-batches of different sizes, takes the expected negative
log density of queries given contexts, and updates. Step k of seed s depends on (s, k) alone: a
killed run resumes to the same weights (with a budget in tasks), and several processes, each taking
a share of the micro-batches, follow the same loss curve. Start at `pretrain`, the loop; `loss` is
the objective; `optim.py` the update.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pfn.causal import OF_SWEEPS, find_runs
from pfn.library import load
from pfn.mixture import mixture_log_prob
from pfn.network import Network, build
from pfn.optim import Optimizer
from pfn.transformer import Final, Latent, Mixture, TransformerConfig
from pfn.units import FromContext, Units, context_units, prior_units
from priors import ConditionalPrior, ParticlePrior, ParticleTasks, Prior

STRATA = 8  # draws of y per query from what the prior knows of it, one per slice of probability
LATENT_STRATA = 4  # draws of a task's latents, where the prior knows several
SHOCK = 10.0  # nats
PROBE = 4096  # prior tasks behind the frozen moments of y and of the latents


@dataclass(frozen=True)
class PretrainConfig:
    """A recipe's settings. Budgets: give `seconds` (wall clock) or `tasks`, not both.

    Args:
        max_features: tasks have 1 .. max_features features, uniformly; of a causal network, half
            of the tasks have the time alone, the others 1 .. max_features - 1 hyperparameters
            besides, about log-uniformly.
        max_context: contexts have 0 .. max_context points, about log-uniformly; a causal network
            is shown a fifth to all of them, uniformly, and trained on their beginnings.
        width, layers, heads, expansion, fourier_octaves, components, expert_kernels,
            least_refinements, refinements: of the `TransformerConfig`.
        seconds: wall-clock budget, over all parts of a run that was stopped and continued.
        tasks: budget in prior tasks; only with this one does a continued run repeat exactly.
        queries: query points per task.
        particles: values of the latents behind a query's target, where the prior can weigh others
            than those that drew the task (`priors.ParticlePrior`); 1 takes these alone.
        tokens: context and query points per step, over all micro-batches.
        micro_batches: parts of a step, each with its own sizes; shared among processes.
        causal: whether the rows of a task are in order, as of curves, and the network is one that
            reads them so (`causal.py`): each query then is a row that sees a random part of those
            before it.
        buffer_share: share of micro-batches that split the context into context and buffer.
        max_buffer: points in such a buffer, at most.
        standardized_share: share of micro-batches in the units of their own contexts, as users'
            data are by default.
        bounded_share: share of all micro-batches, at most `standardized_share`, where that is y
            alone and x keeps the prior's box, as where users pass bounds.
        known_share: share of tasks that reveal some latents to the network.
        latent_share: share of micro-batches that train the marginal heads of the latents.
        lr: peak learning rate; linear warm-up over `warmup` of the budget, then cosine to zero.
        weight_decay: decoupled, of matrices only.
        clip: largest norm of the gradient.
        ema: decay per step of the averaged weights, in [0, 1); shorter at first.
        bf16: matrix products in bfloat16 (master weights stay float32); by default where the device
            is faster so.
        compile: the feed-forward layers by torch.compile, where the device gains.
        seed: of the initial weights and of all draws.
        init: a checkpoint, by shipped name or path, whose weights the run begins with; by default
            they are random. Its network must be as large, and know as many latents; one of single
            curves may begin one of sweeps.
        save_every: seconds between saved states; a tenth of the budget if that is less.

    Raises:
        ValueError: without a budget, with two, or with one that is not positive; shares out of
            order.
    """

    max_features: int = 1
    max_context: int = 256
    width: int = 96
    layers: int = 2
    heads: int = 6
    expansion: int = 2
    fourier_octaves: int = 4
    components: int = 6
    expert_kernels: tuple[str, ...] = TransformerConfig.expert_kernels
    least_refinements: int = 1
    refinements: int = 6
    seconds: float | None = None
    tasks: int | None = None
    queries: int = 24
    particles: int = 8  # 32 are no better at equal compute: `benchmarks/studies.py`
    tokens: int = 2048
    micro_batches: int = 2
    causal: bool = False
    buffer_share: float = 0.25
    max_buffer: int = 128
    standardized_share: float = 0.6
    bounded_share: float = 0.15
    known_share: float = 0.3
    latent_share: float = 0.25
    lr: float = 2e-3
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.998
    bf16: bool | None = None
    compile: bool = False
    seed: int = 0
    init: str | None = None
    save_every: float = 120.0

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.tasks is None):
            raise ValueError(
                f"Expected a budget in seconds or in tasks, one of them; got seconds={self.seconds}"
                f" and tasks={self.tasks}."
            )
        if not 0 <= self.bounded_share <= self.standardized_share <= 1:
            raise ValueError(
                "Expected 0 <= bounded_share <= standardized_share <= 1; got"
                f" {self.bounded_share} and {self.standardized_share}."
            )
        if not (self.seconds or self.tasks or 0) > 0:
            raise ValueError(
                f"Expected a positive budget; got seconds={self.seconds} and tasks={self.tasks}."
            )


class Progress(NamedTuple):
    """What a step reports to people; nothing of it feeds back into training."""

    step: int
    tasks: int
    fraction: float  # of the budget, in [0, 1]
    loss: float  # nats per query, expected negative log density of y
    excess: float  # loss minus the entropy given all latents, an upper bound of the gap
    seconds: float  # wall clock since the run began, pauses left out
    tokens_per_second: float  # of this step
    sampling_share: float  # of this step's seconds, in [0, 1], spent on draws from the prior


class Sizes(NamedTuple):
    """Shapes of one micro-batch."""

    batch: int
    context: int
    buffer: int
    features: int
    latents: bool
    own: FromContext = FromContext()


def pretrain(
    prior: Prior,
    config: PretrainConfig,
    out: Path,
    *,
    device: str | torch.device | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    probe: Callable[[Network, Progress], None] = lambda model, progress: None,
) -> Network:
    """Trains a transformer on `prior` until the budget is spent and returns its averaged weights.

    Run state is written to `out`/state.safetensors every `save_every` seconds; if the file exists,
    the run continues from it. Under `torchrun` the processes share the micro-batches of each step.

    Args:
        report: called after each step on the first process.
        probe: called with the averaged weights whenever state is saved.

    Raises:
        ValueError: if the saved state belongs to another recipe or prior, or the initial weights to
            another architecture.
        FloatingPointError: if the gradient is not finite for 20 steps in a row.
    """
    device = choose_device(device)
    rank, world = _join_processes(device)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    bf16 = is_bf16(config, device)
    network = architecture(prior, config)
    with torch.random.fork_rng(devices=[]):  # initial weights come from the global generator
        torch.default_generator.manual_seed(config.seed)
        model = build(network).to(device)
    path = out / "state.safetensors"
    if config.init is not None and not path.exists():
        begin_with(config.init, model)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = Optimizer(model, weight_decay=config.weight_decay)
    step, tasks, elapsed = 0, 0, 0.0
    if path.exists():
        step, tasks, elapsed = _load_state(path, config, model, average, optimizer)
    if config.compile:
        for block in model.blocks:  # sizes change in each batch: what most time goes to, for any
            block.finish = torch.compile(block.finish, dynamic=True)

    saved = began = time.monotonic()
    spent, bad = elapsed, 0
    while True:
        fraction = _fraction(config, tasks, spent, world, device)
        if fraction >= 1:
            break
        began_step = time.monotonic()
        total = torch.zeros(2, device=device)  # loss of y, excess
        done_tasks = done_tokens = 0
        draw_seconds = 0.0
        for part in range(config.micro_batches):
            sizes = plan(config, step, part)
            done_tasks += sizes.batch
            done_tokens += sizes.batch * (sizes.context + sizes.buffer + config.queries)
            if part % world != rank:
                continue
            began_draw = time.monotonic()
            lesson = draw_lesson(prior, network, config, sizes, step, part, device)
            draw_seconds += time.monotonic() - began_draw
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value, report_y, excess = loss(model, lesson)
            (value / config.micro_batches).backward()
            total += torch.stack([report_y, excess]) / config.micro_batches
        _sum_over_processes(model, total, world)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if torch.isfinite(norm):
            optimizer.step(config.lr * schedule(fraction, config.warmup))
            decay = min(config.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1 - decay)
            bad = 0
        else:
            bad += 1
            if bad == 20:
                raise FloatingPointError(
                    f"The gradient was not finite for 20 steps in a row, at step {step}. Lower lr, "
                    f"or look at the prior's draws; the last good state is in {path}."
                )
        model.zero_grad(set_to_none=True)
        step, tasks = step + 1, tasks + done_tasks
        now = time.monotonic()
        spent = elapsed + now - began
        if rank == 0:
            mean_y, mean_excess = total.tolist()
            progress = Progress(
                step=step,
                tasks=tasks,
                fraction=min(1.0, _fraction(config, tasks, spent, 1, device)),
                loss=mean_y,
                excess=mean_excess,
                seconds=spent,
                tokens_per_second=done_tokens / (now - began_step),
                sampling_share=draw_seconds / (now - began_step),
            )
            report(progress)
            if now - saved > min(config.save_every, 0.1 * (config.seconds or math.inf)):
                saved = now
                _save_state(path, config, model, average, optimizer, step, tasks, spent)
                probe(_with_weights(model, average), progress)
    if rank == 0:
        _save_state(path, config, model, average, optimizer, step, tasks, spent)
    return _with_weights(model, average)


def begin_with(checkpoint: str, model: Network) -> None:
    """Copies the weights of a checkpoint into `model`.

    One of single curves can begin a network of sweeps, whose further weights stay random.

    Raises:
        ValueError: if there is none, or its parameters have other shapes.
    """
    weights = load(checkpoint).transformer.state_dict()
    there = {name: tuple(value.shape) for name, value in weights.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    own = {name: wanted[name] for name in wanted if OF_SWEEPS in name}
    if there not in (wanted, {k: v for k, v in wanted.items() if k not in own}):
        name = next(k for k in sorted(there | wanted) if there.get(k) != wanted.get(k))
        raise ValueError(
            f"Expected an init with the recipe's architecture; {checkpoint!r} has {name} of shape"
            f" {there.get(name)} where this network has {wanted.get(name)}."
        )
    model.load_state_dict(weights, strict=False)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The given device; by default the GPU, where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def is_bf16(config: PretrainConfig, device: torch.device) -> bool:
    """Whether a run's matrix products are in bfloat16."""
    return gains_by_bf16(device) if config.bf16 is None else config.bf16


@functools.cache
def gains_by_bf16(device: torch.device) -> bool:
    """Whether matrix products are faster in bfloat16: CPUs without instructions for it crawl."""
    if device.type != "cpu":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(256, 256, dtype=dtype)
        matrix @ matrix  # what happens once
        began = time.perf_counter()
        for _ in range(3):
            matrix @ matrix
        seconds[dtype] = time.perf_counter() - began
    return seconds[torch.bfloat16] < seconds[torch.float32]


class Lesson(NamedTuple):
    """One micro-batch, normalised and in float32, ready for the network."""

    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    buffer: tuple[Tensor, Tensor] | None
    visible: Tensor | None  # (m,), of sweeps (b, m), buffer points each query sees
    x_query: Tensor  # (b, m, d)
    y_draws: Tensor  # (s, b, m) draws of a new observation
    f_draws: Tensor  # (s, b, m) draws of the noise-free function
    entropy: Tensor  # () mean entropy of y given the latents; NaN where the prior cannot tell
    known: Tensor  # (b, slots) standardised latents, NaN where hidden from the network
    own: FromContext
    latents: Tensor | None  # (s, b, slots) draws of them, when their heads are trained; NaN: none


def loss(model: Network, lesson: Lesson) -> tuple[Tensor, Tensor, Tensor]:
    """The training loss, and for people: the loss of y alone and its excess over known latents.

    Expected negative log density of y, in nats per query, plus f's and a tenth of the
    latents'. Draws that surprise by more than `SHOCK` nats count less.
    """
    context = (lesson.x, lesson.y, lesson.known, lesson.own)
    latents = lesson.latents is not None
    if lesson.buffer is None:
        final, scaling = model.answer(*context, lesson.x_query, latents=latents)
    else:
        encoded = model.encode(*context)
        scaling = encoded.scaling
        final = model.decode(
            encoded,
            lesson.x_query,
            buffer=lesson.buffer,
            visible=lesson.visible,
            latents=latents,
        )
    with torch.autocast(lesson.x.device.type, enabled=False):
        final = final._replace(tokens=final.tokens.float())
        center, scale = (value.unsqueeze(-1) for value in scaling)
        y_draws, f_draws = ((draws - center) / scale for draws in (lesson.y_draws, lesson.f_draws))
        log_scale = scale.log().mean()
        loss_y = log_scale - _mean_log_prob(model.mixture_y(final), y_draws)
        loss_f = log_scale - _mean_log_prob(model.mixture_f(final), f_draws)
        value = loss_y + loss_f
        if lesson.latents is not None:
            value = value + 0.1 * latent_loss(model, final, lesson)
    return value, loss_y.detach(), (loss_y - lesson.entropy).detach()


def latent_loss(model: Network, final: Final, lesson: Lesson) -> Tensor:
    """Mean negative log probability of the latents: densities, or cross-entropy for categories."""
    assert lesson.latents is not None
    mixture, logits = model.latent_head(final)
    there = ~lesson.latents.isnan()
    log_prob = mixture_log_prob(*mixture, lesson.latents.nan_to_num(0.0))  # (s, b, slots)
    terms = []
    start = 0
    for latent in model.config.latents:
        stop = start + model.config.slots(latent)
        if latent.categories:
            chosen = lesson.latents[0, :, start:stop].argmax(-1)  # one for all draws
            terms.append(-F.cross_entropy(logits[:, start:stop], chosen).unsqueeze(0))
        else:
            used = there[..., start:stop].flatten(0, 1)
            total = (log_prob[..., start:stop].flatten(0, 1) * used).sum(0)
            terms.append((total / used.sum(0).clamp_min(1))[used.any(0)])
        start = stop
    every = torch.cat(terms)
    return -every.mean() if len(every) else every.sum()


def plan(config: PretrainConfig, step: int, part: int) -> Sizes:
    """Sizes of one micro-batch: constant cost; the rest as `PretrainConfig` says."""
    generator = torch.Generator().manual_seed(_seed(config.seed, step, part, "sizes"))
    share, buffered, split, with_latents, own_units = torch.rand(5, generator=generator).tolist()
    features = int(torch.randint(1, config.max_features + 1, (), generator=generator))
    points = int(8 * math.exp(share * math.log((config.max_context + 9) / 8)) - 8)
    points = min(points, config.max_context)
    if config.causal:  # a curve trains all its beginnings: long ones cost little more
        among = own_units  # the draw decides nothing else of a causal network
        hyperparameters = int(config.max_features**among) if split < 0.5 else 0
        features = min(1 + hyperparameters, config.max_features)
        points = max(2, round(config.max_context * (0.2 + 0.8 * share)))
        batch = max(1, round(config.tokens / config.micro_batches / (points + config.queries)))
        return Sizes(batch, 0, points, features, latents=False)
    buffer = 0
    if buffered < config.buffer_share and points > 0:
        buffer = 1 + int(split * min(points, config.max_buffer))
    per_task = points + config.queries
    batch = max(1, round(config.tokens / config.micro_batches / per_task))
    own = FromContext()
    if own_units < config.standardized_share and points > buffer:
        own = FromContext(x=own_units >= config.bounded_share, y=True)
    return Sizes(
        batch,
        points - buffer,
        buffer,
        features,
        latents=with_latents < config.latent_share,
        own=own,
    )


def draw_lesson(
    prior: Prior,
    network: TransformerConfig,
    config: PretrainConfig,
    sizes: Sizes,
    step: int,
    part: int,
    device: torch.device,
) -> Lesson:
    """Draws one micro-batch on `device`; a function of (seed, step, part) and the sizes."""
    generator = torch.Generator(device).manual_seed(_seed(config.seed, step, part, "tasks"))
    n, m = sizes.context + sizes.buffer, config.queries
    visible = None
    if config.causal:
        return draw_curves(prior, network, sizes, m, generator)
    if sizes.buffer:
        visible = torch.randint(sizes.buffer + 1, (m,), device=device, generator=generator)
    reveal = draw_reveal(sizes.batch, network, config, generator)
    sees = torch.full((m,), n, device=device) if visible is None else visible + sizes.context
    if isinstance(prior, ParticlePrior):
        held = by_latent(network, reveal, sizes.features)
        drawn = draw_with_particles(prior, sizes, sees, config.particles, held, generator)
    elif isinstance(prior, ConditionalPrior):
        drawn = draw_with_conditionals(prior, sizes, sees, generator)
    else:
        drawn = draw_alone(prior, sizes, m, generator)
    x, y, x_query, y_draws, f_draws, entropy, latents = drawn
    k = min(sizes.context, x.shape[1])
    own = sizes.own if k else FromContext()
    if own.y:
        units = context_units(x[:, :k], y[:, :k])
        if not own.x:
            units = prior_units(x, y)._replace(y_shift=units.y_shift, y_scale=units.y_scale)
        x, x_query = units.map_x(x), units.map_x(x_query)
        y, y_draws, f_draws = (units.map_y(value) for value in (y, y_draws, f_draws))
        entropy = entropy - units.y_scale.log().mean()
        scaling = getattr(prior, "latent_units", {})
        latents = [in_units(each, units, network, scaling) for each in latents]
    slots = torch.stack([latent_slots(network, each, sizes.batch, device) for each in latents])
    known = torch.where(reveal, slots[0], torch.nan)
    x, y, x_query, y_draws, f_draws, known, slots, entropy = (
        value.float() for value in (x, y, x_query, y_draws, f_draws, known, slots, entropy)
    )
    return Lesson(
        x=x[:, :k],
        y=y[:, :k],
        buffer=None if visible is None else (x[:, k:], y[:, k:]),
        visible=None if visible is None else visible.clamp_max(x.shape[1] - k),
        x_query=x_query,
        y_draws=y_draws,
        f_draws=f_draws,
        entropy=entropy,
        known=known,
        own=own,
        latents=slots[-LATENT_STRATA:] if sizes.latents and network.latent_slots else None,
    )


def draw_reveal(
    batch: int, network: TransformerConfig, config: PretrainConfig, generator: torch.Generator
) -> Tensor:
    """Which latents the network is told (b, slots): of some tasks, half of them."""
    device = generator.device
    hidden = torch.rand(batch, network.latent_slots, device=device, generator=generator)
    reveal = torch.rand(batch, 1, device=device, generator=generator) < config.known_share
    return reveal & (hidden < 0.5)


def by_latent(network: TransformerConfig, slots: Tensor, d: int) -> dict[str, Tensor]:
    """The columns of `slots` by name of latent, (b,) or (b, d); categories left out."""
    columns = slots.split([network.slots(latent) for latent in network.latents], dim=1)
    return {
        latent.name: column[:, :d] if latent.per_feature else column[:, 0]
        for latent, column in zip(network.latents, columns, strict=True)
        if not latent.categories
    }


class Drawn(NamedTuple):
    """Tasks and targets of their queries, in the units of the prior."""

    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    x_query: Tensor  # (b, m, d)
    y_draws: Tensor  # (s, b, m)
    f_draws: Tensor  # (s, b, m)
    entropy: Tensor  # () of y given the latents; NaN where the prior cannot tell
    latents: list[dict[str, Tensor]]  # as in `Tasks`; behind the tasks' own may be further draws


def draw_alone(prior: Prior, sizes: Sizes, m: int, generator: torch.Generator) -> Drawn:
    """Tasks of a prior that shows single draws only."""
    n = sizes.context + sizes.buffer
    tasks = prior.sample(sizes.batch, n + m, sizes.features, generator=generator)
    seen = n if tasks.num_context is None else min(n, tasks.num_context)  # others are queries only
    return Drawn(
        tasks.x[:, :seen],
        tasks.y[:, :seen],
        tasks.x[:, n:],
        tasks.y[None, :, n:],
        tasks.f[None, :, n:],
        tasks.y.new_tensor(torch.nan),
        [tasks.latents],
    )


def draw_with_conditionals(
    prior: ConditionalPrior, sizes: Sizes, sees: Tensor, generator: torch.Generator
) -> Drawn:
    """Tasks whose queries, of which each sees so many points (m,), have stratified draws."""
    n = sizes.context + sizes.buffer
    tasks = prior.sample_conditional(sizes.batch, n, sizes.features, sees, generator=generator)
    std_y, std_f = (tasks.variance + tasks.noise.unsqueeze(-1)).sqrt(), tasks.variance.sqrt()
    z = _stratified_normal(sizes.batch, len(sees), generator)  # (s, b, m)
    y_draws, f_draws = tasks.mean + std_y * z, tasks.mean + std_f * z
    entropy = _normal_entropy(std_y).mean()
    if tasks.bend is not None:
        entropy = entropy + tasks.bend.log_slope(y_draws).mean()
        y_draws, f_draws = tasks.bend(y_draws), tasks.bend(f_draws)
    return Drawn(tasks.x, tasks.y, tasks.x_query, y_draws, f_draws, entropy, [tasks.latents])


def draw_with_particles(
    prior: ParticlePrior,
    sizes: Sizes,
    sees: Tensor,
    particles: int,
    held: dict[str, Tensor],
    generator: torch.Generator,
) -> Drawn:
    """The same, also over latents that the points which a query sees leave plausible."""
    n, m = sizes.context + sizes.buffer, len(sees)
    of_latents = sees.new_full((1,), sizes.context)  # what their own queries see
    tasks = prior.sample_particles(
        sizes.batch,
        n,
        sizes.features,
        torch.cat([sees, of_latents]),
        particles=particles,
        held=held,
        generator=generator,
    )
    targets = draw_targets(tasks, m, generator)
    latents = [{name: value[:, 0] for name, value in tasks.latents.items()}]
    if sizes.latents:
        latents += draw_latents(tasks, generator)
    return Drawn(tasks.x, tasks.y, tasks.x_query[:, :m], *targets, latents)


def draw_targets(
    tasks: ParticleTasks, m: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of y and f (s, b, m) at the first m queries, and the entropy of y given the latents.

    Draws are stratified: over particles, in the order of their means, and within them.
    """
    log_weights, mean, variance = (
        part[:, :m] for part in (tasks.log_weights, tasks.mean, tasks.variance)
    )
    std_y, std_f = (variance + tasks.noise.unsqueeze(1)).sqrt(), variance.sqrt()
    weights = log_weights.exp()
    entropy = (weights * _normal_entropy(std_y)).sum(-1).mean()
    order = mean.argsort(-1)
    cumulated = weights.gather(-1, order).cumsum(-1)  # (b, m, particle)
    z = _stratified_normal(len(mean), m, generator)  # (s, b, m)
    z = z.gather(0, torch.rand(z.shape, device=z.device, generator=generator).argsort(0))
    chosen = order.gather(-1, _stratified_choice(cumulated, len(z), generator))  # (b, m, s)
    mean, std_y, std_f = (part.gather(-1, chosen).movedim(-1, 0) for part in (mean, std_y, std_f))
    return mean + std_y * z, mean + std_f * z, entropy


def draw_latents(tasks: ParticleTasks, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Stratified draws of particles' latents, by their weights at the last query."""
    cumulated = tasks.log_weights[:, -1].exp().cumsum(-1)  # (b, particle)
    chosen = _stratified_choice(cumulated, LATENT_STRATA, generator)  # (b, s)
    rows = torch.arange(len(chosen), device=chosen.device)
    return [
        {name: value[rows, column] for name, value in tasks.latents.items()}
        for column in chosen.unbind(1)
    ]


def draw_curves(
    prior: Prior, network: TransformerConfig, sizes: Sizes, m: int, generator: torch.Generator
) -> Lesson:
    """A micro-batch of rows in order, and as queries m of them, each after a random beginning.

    With several features rows are runs, one after another; then a query sees all runs before its
    own, and in four cases of five a beginning of its own. Of a `ConditionalPrior`, y is normal
    around the noise-free curve, with the latent "noise" as its variance: each query then has
    several draws of y.
    """
    n, device = sizes.buffer, generator.device
    drawn = prior.sample(sizes.batch, n, sizes.features, generator=generator)
    x, y, f = drawn.x.float(), drawn.y.float(), drawn.f.float()
    row = torch.randint(n, (m,), device=device, generator=generator)
    begin, alone = torch.zeros_like(row), 0.0
    if sizes.features > 1:
        runs = find_runs(x)
        begin, alone = torch.searchsorted(runs, runs[:, row]), 0.2  # (b, m)
    share = torch.rand(begin.shape, device=device, generator=generator)
    share = ((share - alone) / (1 - alone)).clamp_min(0)
    visible = begin + (share * (row + 1 - begin)).long()
    if drawn.num_context is None:
        raise ValueError(
            "Expected a prior of rows in order, num_context a number, for a causal network; got"
            " num_context=None, rows in random order."
        )
    visible = visible.clamp_max(drawn.num_context)
    y_draws, entropy = y[None, :, row], torch.tensor(torch.nan, device=device)
    if isinstance(prior, ConditionalPrior):
        std = drawn.latents["noise"].sqrt().float().unsqueeze(-1)
        y_draws = f[:, row] + std * _stratified_normal(sizes.batch, m, generator).float()
        entropy = _normal_entropy(std).mean()
    return Lesson(
        x=x[:, :0],
        y=y[:, :0],
        buffer=(x, y),
        visible=visible,
        x_query=x[:, row],
        y_draws=y_draws,
        f_draws=f[None, :, row],
        entropy=entropy,
        known=latent_slots(network, drawn.latents, sizes.batch, device),
        own=FromContext(),
        latents=None,
    )


def in_units(
    latents: dict[str, Tensor],
    units: Units,
    network: TransformerConfig,
    scaling: Mapping[str, str],
) -> dict[str, Tensor]:
    """Latents of tasks whose x and y took other units; NaN where a latent has none in these.

    Args:
        scaling: how latents scale with the data, as in `Units.of_latent`.
    """
    mapped = dict(latents)
    for latent in network.latents:
        if not latent.categories:
            value = latents[latent.name]
            shift, scale = units.of_latent(scaling.get(latent.name, ""), latent.per_feature)
            mapped[latent.name] = ((value.reshape(len(value), -1) - shift) / scale).view_as(value)
    return mapped


def latent_slots(
    network: TransformerConfig, latents: dict[str, Tensor], batch: int, device: torch.device
) -> Tensor:
    """Standardised latents side by side (b, slots); NaN in the slots of features a task lacks."""
    columns = []
    for latent in network.latents:
        value = latents[latent.name]
        if latent.categories:
            columns.append(F.one_hot(value.long(), latent.categories).to(torch.float64))
            continue
        value = (value.log() if latent.positive else value).to(torch.float64)
        value = ((value - latent.mean) / latent.std).reshape(batch, -1)
        columns.append(F.pad(value, (0, network.slots(latent) - value.shape[1]), value=torch.nan))
    return torch.cat(columns, dim=1) if columns else torch.zeros(batch, 0, device=device)


def architecture(prior: Prior, config: PretrainConfig) -> TransformerConfig:
    """The network's frozen configuration, with the prior's moments measured on fixed draws.

    Raises:
        FloatingPointError: if no draw of y or of a latent is finite.
    """
    generator = torch.Generator().manual_seed(0)
    units = getattr(prior, "latent_units", {})
    few = prior.sample(PROBE, 4, 1, generator=generator)
    many = prior.sample(PROBE, 4, config.max_features, generator=generator)
    latents = []
    for name, value in many.latents.items():
        if not value.is_floating_point():
            latents.append(Latent(name, categories=int(value.max()) + 1))
            continue
        per_feature = value.ndim > few.latents[name].ndim or (
            value.ndim == 2 and value.shape[-1] == config.max_features
        )
        both = _finite(name, value, few.latents[name])
        positive = units.get(name) != "y" and bool((both > 0).all())  # units of y can shift
        both = both.log() if positive else both
        mean, std = float(both.mean()), float(both.std()) or 1.0
        latents.append(Latent(name, per_feature, positive, 0, mean, std))
    y = _finite("y", few.y, many.y)
    spread = float((y.quantile(0.84) - y.quantile(0.16)) / 2)  # a heavy tail must not inflate it
    return TransformerConfig(
        max_features=config.max_features,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        expansion=config.expansion,
        fourier_octaves=config.fourier_octaves,
        components=config.components,
        expert_kernels=config.expert_kernels,
        least_refinements=config.least_refinements,
        refinements=config.refinements,
        y_mean=float(y.median()),
        y_std=spread or 1.0,
        latents=() if config.causal else tuple(latents),
        causal=config.causal,
    )


def schedule(fraction: float, warmup: float) -> float:
    """Learning-rate factor: linear warm-up from above zero, then a cosine to zero."""
    if fraction < warmup:
        return max(fraction / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def _finite(name: str, *values: Tensor) -> Tensor:
    """All finite entries (k,): a rare broken draw of a prior must not spoil its moments."""
    flat = torch.cat([value.flatten() for value in values])
    flat = flat[flat.isfinite()]
    if not len(flat):
        raise FloatingPointError(
            f"Expected finite draws of {name}; the prior's are all NaN or inf."
        )
    return flat


def _mean_log_prob(mixture: Mixture, draws: Tensor) -> Tensor:
    """Mean log density; what surprises beyond `SHOCK` nats counts with its logarithm.

    Where two observations set the unit of y, others lie hundreds of units away.
    """
    log_prob = mixture_log_prob(mixture.log_weights, mixture.means, mixture.log_stds, draws)
    shock = (-log_prob / SHOCK).clamp_min(1)
    return torch.where(shock > 1, -SHOCK * (1 + shock.log()), log_prob).mean()


def _stratified_normal(batch: int, m: int, generator: torch.Generator) -> Tensor:
    """Normal draws (s, b, m), one in each of s slices of equal probability, at a random place."""
    uniform = torch.rand(
        STRATA, batch, m, dtype=torch.float64, device=generator.device, generator=generator
    )
    slices = torch.arange(STRATA, dtype=torch.float64, device=generator.device)[:, None, None]
    return torch.special.ndtri(((slices + uniform) / STRATA).clamp(1e-9, 1 - 1e-9))


def _stratified_choice(cumulated: Tensor, strata: int, generator: torch.Generator) -> Tensor:
    """Indices (..., s) by cumulated weights (..., k), one in each slice of equal probability."""
    shape = (*cumulated.shape[:-1], strata)
    uniform = torch.rand(shape, dtype=torch.float64, device=generator.device, generator=generator)
    uniform = (torch.arange(strata, device=uniform.device) + uniform) / strata
    return torch.searchsorted(cumulated, uniform).clamp_max(cumulated.shape[-1] - 1)


def _normal_entropy(std: Tensor) -> Tensor:
    return 0.5 * math.log(2 * math.pi * math.e) + std.log()


def _seed(seed: int, step: int, part: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{part}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _fraction(
    config: PretrainConfig, tasks: int, seconds: float, world: int, device: torch.device
) -> float:
    """Share of the budget spent; every process takes the first one's clock."""
    if config.tasks is not None:
        return tasks / config.tasks
    assert config.seconds is not None
    fraction = torch.tensor(seconds / config.seconds, device=device)
    if world > 1:
        dist.broadcast(fraction, 0)
    return float(fraction)


def _join_processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of processes; joins the group that `torchrun` announces."""
    if "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def _sum_over_processes(model: Network, total: Tensor, world: int) -> None:
    if world == 1:
        return
    parameters = list(model.parameters())
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )
    dist.all_reduce(flat)
    dist.all_reduce(total)
    for parameter, gradient in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = gradient.view_as(parameter)


def _with_weights(model: Network, weights: dict[str, Tensor]) -> Network:
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    return other.eval()


def _save_state(
    path: Path,
    config: PretrainConfig,
    model: Network,
    average: dict[str, Tensor],
    optimizer: Optimizer,
    step: int,
    tasks: int,
    seconds: float,
) -> None:
    """Writes the run's state atomically: a kill at any moment leaves a whole file."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state.items()}
    metadata = _identity(config, model.config)
    metadata["progress"] = json.dumps({"step": step, "tasks": tasks, "seconds": seconds})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    safetensors.torch.save_file(
        {name: value.contiguous().cpu() for name, value in tensors.items()}, temporary, metadata
    )
    os.replace(temporary, path)


def _load_state(
    path: Path,
    config: PretrainConfig,
    model: Network,
    average: dict[str, Tensor],
    optimizer: Optimizer,
) -> tuple[int, int, float]:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for part, expected in _identity(config, model.config).items():
        saved = metadata.get(part, "{}")
        if saved != expected:
            raise ValueError(
                f"Expected the state of this recipe and prior in {path}; got another {part}:"
                f" {_differences(saved, expected)}. Choose another output folder,"
                f" with --init {path.parent} to begin with what a finished run has learned, or"
                " remove the file."
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            average[name].copy_(tensors[f"average.{name}"])
    optimizer.load({name: tensors[f"optimizer.{name}"] for name in optimizer.state})
    progress = json.loads(metadata["progress"])
    return progress["step"], progress["tasks"], progress["seconds"]


def _differences(saved: str, wanted: str) -> str:
    """In words, the settings that differ between two JSON objects."""
    old, new = json.loads(saved), json.loads(wanted)
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"{name} {old.get(name)}, now {new.get(name)}" for name in names)


def _identity(config: PretrainConfig, network: TransformerConfig) -> dict[str, str]:
    """What must agree for a run to continue; the prior's moments to digits all machines share."""
    settings = replace(config, save_every=0.0, compile=False)
    measured = json.loads(
        json.dumps(asdict(network)), parse_float=lambda digits: float(f"{float(digits):.6g}")
    )
    return {"recipe": json.dumps(asdict(settings)), "network": json.dumps(measured)}
