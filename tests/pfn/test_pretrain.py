"""The training loop: what it draws, what it minimises, and that it survives kills and bad draws."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributions import Gamma, LogNormal, Normal

import pfn.pretrain
from pfn.card import ModelCard, save_checkpoint
from pfn.experts import Forecast
from pfn.mixture import mixture_log_prob
from pfn.optim import Optimizer
from pfn.pretrain import (
    LATENT_STRATA,
    STRATA,
    Lesson,
    PretrainConfig,
    Progress,
    Sizes,
    architecture,
    draw_lesson,
    draw_targets,
    is_bf16,
    latent_loss,
    latent_slots,
    loss,
    plan,
    pretrain,
    schedule,
)
from pfn.transformer import Final, Latent, Mixture, Transformer, TransformerConfig
from pfn.units import FromContext, context_units
from priors import ConditionalTasks, GaussianProcess, Prior, Tasks
from priors.bends import Bend

CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    max_features=2,
    max_context=12,
    width=16,
    layers=2,
    heads=2,
    expansion=1,
    fourier_octaves=2,
    components=3,
    tasks=300,
    queries=8,
    tokens=256,
    micro_batches=2,
    bf16=False,
)


class Lines:
    """What a user writes: f = a + b x_1 with standard normal a, b; noise 0.1; only `sample`."""

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        x = torch.rand(batch, n, d, generator=generator)
        a, b = torch.randn(2, batch, 1, generator=generator)
        f = a + b * x[..., 0]
        return Tasks(x, f + 0.1 * torch.randn(batch, n, generator=generator), f, {})


def run(prior: Prior, config: PretrainConfig, out: Path) -> tuple[Transformer, list[Progress]]:
    steps: list[Progress] = []
    return pretrain(prior, config, out, device="cpu", report=steps.append), steps


def lesson_for(prior: Prior, config: PretrainConfig, sizes: Sizes, step: int = 0) -> Lesson:
    return draw_lesson(prior, architecture(prior, config), config, sizes, step, 0, CPU)


def initial(network: TransformerConfig) -> Transformer:
    """The weights that training starts from."""
    torch.manual_seed(CONFIG.seed)
    return Transformer(network)


def tensors(value: Any) -> list[Tensor]:
    """All tensors inside nested tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple) else []


def same(one: Lesson, other: Lesson) -> bool:
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return all(torch.equal(a.nan_to_num(99), b.nan_to_num(99)) for a, b in pairs)


# Learning


def test_a_users_own_prior_trains_and_beats_the_prior_predictive(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, max_features=1, tasks=6000, lr=1e-2)
    model, steps = run(Lines(), config, tmp_path)
    lesson = lesson_for(Lines(), config, Sizes(256, 8, 0, 1, False), step=10**6)
    with torch.no_grad():
        trained, untrained = (loss(m, lesson)[1] for m in (model, initial(model.config)))
    assert trained < untrained - 0.1  # whose experts know something of any function
    std = (1 + lesson.x_query[..., 0].square() + 0.01).sqrt()
    prior_predictive = -Normal(0.0, std).log_prob(lesson.y_draws).mean()
    assert trained < prior_predictive - 1.5  # the exact posterior gains about 2.3 nats
    half = len(steps) // 2
    early, late = (sum(step.loss for step in part) for part in (steps[:half], steps[-half:]))
    assert late < early


def test_training_ends_with_the_budget_and_learns_from_its_first_step(tmp_path: Path) -> None:
    _, steps = run(GaussianProcess(), CONFIG, tmp_path)
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-2].tasks < CONFIG.tasks <= steps[-1].tasks
    assert steps[-1].fraction == 1.0
    assert all(math.isfinite(step.loss) and step.excess > -1.0 for step in steps)
    expected = plan(CONFIG, 0, 0).batch + plan(CONFIG, 0, 1).batch
    assert steps[0].tasks == expected
    assert schedule(0.0, CONFIG.warmup) > 0


def test_a_budget_in_seconds_is_kept(tmp_path: Path) -> None:
    _, steps = run(Lines(), dataclasses.replace(CONFIG, tasks=None, seconds=0.5), tmp_path)
    assert steps[-1].seconds >= 0.5
    assert all(step.fraction < 1 for step in steps[:-1])


def test_the_average_of_weights_is_returned_and_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history: list[dict[str, Tensor]] = []

    class Recorder(Optimizer):
        def step(self, lr: float) -> None:
            if not history:
                self.record()
            super().step(lr)
            self.record()

        def record(self) -> None:
            history.append({name: p.detach().clone() for name, p in self.parameters.items()})

    monkeypatch.setattr(pfn.pretrain, "Optimizer", Recorder)
    config = dataclasses.replace(CONFIG, ema=0.4, save_every=0.0)
    probed: list[Transformer] = []
    model = pretrain(
        Lines(), config, tmp_path, device="cpu", probe=lambda model, progress: probed.append(model)
    )
    average = history[0]
    for k, weights in enumerate(history[1:]):
        decay = min(0.4, (1 + k) / (10 + k))  # short at first, to forget the initial weights
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    assert len(probed) == len(history) - 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, average[name])
        assert torch.equal(parameter, probed[-1].get_parameter(name))


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    prior = GaussianProcess(noise=Gamma(1.1, 20.0))  # whose quantiles torch does not know
    run(prior, dataclasses.replace(CONFIG, tasks=30), tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_bfloat16_products_keep_float32_weights_and_the_same_loss(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tasks=60)
    _, steps = run(Lines(), config, tmp_path / "float32")
    model, rounded = run(Lines(), dataclasses.replace(config, bf16=True), tmp_path / "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert rounded[0].loss != steps[0].loss
    assert abs(rounded[0].loss - steps[0].loss) < 10 * 2**-9  # bfloat16 keeps eight bits


def test_bfloat16_is_the_default_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for faster in (False, True):
        monkeypatch.setattr("pfn.pretrain.gains_by_bf16", lambda device, faster=faster: faster)
        assert is_bf16(dataclasses.replace(CONFIG, bf16=None), cpu) is faster
        assert is_bf16(dataclasses.replace(CONFIG, bf16=True), cpu)
        assert not is_bf16(dataclasses.replace(CONFIG, bf16=False), cpu)


# Killed and continued

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
from pfn.pretrain import PretrainConfig, pretrain
from priors import GaussianProcess

torch.set_num_threads(1)

def report(progress):
    print(progress.step, flush=True)
    if progress.step == 5:
        time.sleep(600)  # after the step, before its state is saved: here the kill arrives

pretrain(GaussianProcess(), PretrainConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]),
         device="cpu", report=report)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_train_as_plain_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = functools.partial(torch.compile, backend="eager")  # which needs no C++ compiler
    monkeypatch.setattr(torch, "compile", compiled)
    losses = [
        [progress.loss for progress in run(Lines(), config, tmp_path / str(config.compile))[1]]
        for config in (CONFIG, dataclasses.replace(CONFIG, compile=True))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, save_every=0.0)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(asdict(config)), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(5)] == ["1", "2", "3", "4", "5"]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()

    whole, steps = run(GaussianProcess(), config, tmp_path / "whole")
    resumed, rest = run(GaussianProcess(), config, tmp_path / "killed")
    assert [step.step for step in rest] == list(range(5, len(steps) + 1))  # step 5 was lost
    assert [step.loss for step in rest] == [step.loss for step in steps[4:]]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    one, other = (
        safetensors.torch.load_file(tmp_path / name / "state.safetensors")
        for name in ("whole", "killed")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_returns_its_weights_without_another_step(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, tasks=60)
    first, _ = run(Lines(), config, tmp_path)
    again, steps = run(Lines(), dataclasses.replace(config, save_every=7.0), tmp_path)
    assert steps == []
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


def test_a_run_begins_with_the_weights_of_a_checkpoint_once(tmp_path: Path) -> None:
    first, _ = run(Lines(), dataclasses.replace(CONFIG, tasks=200), tmp_path / "first")
    save_checkpoint(
        tmp_path / "first", first, ModelCard("first", first.config, None, CONFIG.max_context)
    )
    config = dataclasses.replace(CONFIG, tasks=1, lr=0.0, init=str(tmp_path / "first"))
    begun, steps = run(Lines(), config, tmp_path / "second")
    assert len(steps) == 1
    for name, weight in begun.state_dict().items():  # checkpoints are in half precision
        torch.testing.assert_close(weight, first.state_dict()[name].half().float())
    longer = dataclasses.replace(config, tasks=400, lr=1e-2)
    trained, _ = run(Lines(), longer, tmp_path / "third")
    shutil.rmtree(tmp_path / "first")  # a run that continues needs it no more
    again, steps = run(Lines(), longer, tmp_path / "third")
    assert steps == []
    assert all(map(torch.equal, trained.state_dict().values(), again.state_dict().values()))


def test_initial_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, init="gp-1d")
    with pytest.raises(ValueError, match="architecture; 'gp-1d' has"):
        run(Lines(), config, tmp_path)
    with pytest.raises(ValueError, match="Expected a model among"):
        run(Lines(), dataclasses.replace(CONFIG, init="nothing"), tmp_path)


@pytest.mark.parametrize(
    ("prior", "changes", "words"),
    [
        (GaussianProcess(), {"lr": 1e-3}, "recipe: lr {lr}, now 0.001."),
        (GaussianProcess(), {"seed": 1}, "recipe: seed 0, now 1."),
        (
            GaussianProcess(),
            {"width": 32, "lr": 1e-3},
            "lr {lr}, now 0.001, width {width}, now 32.",
        ),
        (GaussianProcess(lengthscale=LogNormal(0.0, 0.3)), {}, "network: latents"),
        (Lines(), {}, "network: "),
    ],
)
def test_the_state_of_another_recipe_or_prior_is_refused(
    tmp_path: Path, prior: Prior, changes: dict[str, Any], words: str
) -> None:
    config = dataclasses.replace(CONFIG, tasks=20)
    run(GaussianProcess(), config, tmp_path)
    with pytest.raises(
        ValueError, match=r"state of this recipe and prior.*got.*remove the file"
    ) as caught:
        run(prior, dataclasses.replace(config, **changes), tmp_path)
    assert words.format(lr=CONFIG.lr, width=CONFIG.width) in str(caught.value)


@pytest.mark.parametrize("budget", [{}, {"seconds": 1.0, "tasks": 5}])
def test_a_recipe_needs_one_budget(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one of them; got seconds="):
        PretrainConfig(**budget)


@pytest.mark.parametrize("budget", [{"tasks": 0}, {"seconds": 0.0}, {"seconds": -1.0}])
def test_a_budget_is_positive(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive budget; got seconds="):
        PretrainConfig(**budget)


@pytest.mark.parametrize("shares", [{"bounded_share": 0.7}, {"standardized_share": 1.1}])
def test_shares_of_micro_batches_are_in_order(shares: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="0 <= bounded_share <= standardized_share <= 1"):
        PretrainConfig(tasks=1, **shares)


# Bad draws


@dataclasses.dataclass(frozen=True)
class Broken:
    """`Lines` with a NaN in a share of the batches of more than `spared` points."""

    share: float
    spared: int = 0

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        tasks = Lines().sample(batch, n, d, generator=generator)
        if n > self.spared and torch.rand((), generator=generator) < self.share:
            tasks.y[:, -1] = torch.nan
        return tasks


def test_a_prior_that_is_sometimes_nan_is_survived(tmp_path: Path) -> None:
    model, steps = run(Broken(0.3), CONFIG, tmp_path)
    bad = [step for step in steps if math.isnan(step.loss)]
    assert 0 < len(bad) < len(steps)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(model.embed_query, initial(model.config).embed_query)


def test_a_prior_that_is_always_nan_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="20 steps in a row, at step 19"):
        run(Broken(1.0, spared=4), dataclasses.replace(CONFIG, tasks=10**6), tmp_path)


def test_a_prior_without_any_finite_draw_is_named(tmp_path: Path) -> None:
    class Nowhere:
        def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
            tasks = Lines().sample(batch, n, d, generator=generator)
            return tasks._replace(y=tasks.y / 0)

    with pytest.raises(FloatingPointError, match="finite draws of y"):
        run(Nowhere(), CONFIG, tmp_path)


# Lessons


def test_sizes_stay_within_limits_at_constant_cost() -> None:
    config = PretrainConfig(
        max_features=3, max_context=100, max_buffer=20, queries=10, tokens=2000, tasks=1
    )
    sizes = [plan(config, step, part) for step in range(2000) for part in range(2)]
    points = torch.tensor([size.context + size.buffer for size in sizes])
    buffers = torch.tensor([size.buffer for size in sizes])
    assert points.min() == 0 and points.max() == 100
    assert buffers.min() == 0 and buffers.max() == 20
    assert all(size.context >= 0 for size in sizes)
    cost = torch.tensor([size.batch for size in sizes]) * (points + 10)
    assert ((cost - 1000).abs() <= (points + 10) / 2).all()  # of 2000 / 2 tokens, to half a task
    share = (buffers > 0).double().mean()
    expected = config.buffer_share * (points > 0).double().mean()
    assert abs(share - expected) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    features = torch.bincount(torch.tensor([size.features for size in sizes]))
    assert features[0] == 0 and (features[1:] / 4000 - 1 / 3).abs().max() < 4 * math.sqrt(2 / 36000)
    # log-uniform: P(points < t) = log((t + 8) / 8) / log(109 / 8)
    below = (points < 20).double().mean()
    assert abs(below - math.log(28 / 8) / math.log(109 / 8)) < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    "prior", [GaussianProcess(noise=Gamma(1.1, 20.0)), Lines()], ids=["conditional", "sample"]
)
def test_a_lesson_depends_on_seed_step_and_part_only(prior: Prior) -> None:
    network, sizes = architecture(prior, CONFIG), Sizes(5, 6, 3, 2, True)

    def draw(step: int, part: int, seed: int = 0) -> Lesson:
        config = dataclasses.replace(CONFIG, seed=seed)
        return draw_lesson(prior, network, config, sizes, step, part, CPU)

    torch.manual_seed(0)
    first = draw(7, 1)
    torch.manual_seed(1)
    draw(6, 1)
    assert same(draw(7, 1), first)
    for other in (draw(8, 1), draw(7, 0), draw(7, 1, seed=1)):
        assert not torch.equal(other.x, first.x)
    assert plan(CONFIG, 7, 1) == plan(CONFIG, 7, 1)
    assert len({plan(CONFIG, step, part) for step in range(5) for part in range(2)}) > 5


def test_a_lesson_has_the_shapes_that_the_network_takes() -> None:
    prior = GaussianProcess(kernel=("rbf", "matern52"), ard=True)
    config = dataclasses.replace(CONFIG, known_share=1.0)
    lesson = lesson_for(prior, config, Sizes(64, 5, 3, 1, True))
    assert lesson.x.shape == (64, 5, 1) and lesson.y.shape == (64, 5)
    assert lesson.buffer is not None and lesson.visible is not None
    assert lesson.buffer[0].shape == (64, 3, 1) and lesson.buffer[1].shape == (64, 3)
    assert lesson.visible.shape == (8,) and set(lesson.visible.tolist()) <= {0, 1, 2, 3}
    assert lesson.y_draws.shape == lesson.f_draws.shape == (STRATA, 64, 8)
    assert lesson.latents is not None
    assert lesson.latents.shape == (LATENT_STRATA, 64, 2 + 1 + 1 + 2)
    assert lesson.latents[..., 1].isnan().all()  # the second lengthscale, which one feature lacks
    known = lesson.known.isfinite()
    for drawn in lesson.latents:  # what is known has one value, what is not has several
        torch.testing.assert_close(lesson.known[known], drawn[known])
    differ = (lesson.latents[0] != lesson.latents[-1])[:, [0, 2, 3]]
    assert (differ & ~known[:, [0, 2, 3]]).sum() > 0.3 * differ.numel()
    shown = known[:, [0, 2, 3, 4, 5]].double().mean()
    assert abs(shown - 0.5) < 4 * math.sqrt(0.25 / (5 * 64))
    assert all(t.dtype == torch.float32 for t in tensors(lesson) if t.is_floating_point())
    hidden = lesson_for(
        prior, dataclasses.replace(config, known_share=0.0), Sizes(64, 5, 0, 1, False)
    )
    assert hidden.known.isnan().all() and hidden.latents is None
    assert hidden.buffer is None and hidden.visible is None


def test_rows_past_num_context_are_never_context() -> None:
    class Curves:
        """y counts the rows; only the first three may be context."""

        def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
            rows = torch.arange(float(n)).expand(batch, n)
            return Tasks(rows[..., None].expand(-1, -1, d), rows, rows, {}, num_context=3)

    lesson = lesson_for(Curves(), CONFIG, Sizes(2, 6, 0, 1, False))
    assert lesson.y.tolist() == [[0, 1, 2]] * 2
    assert lesson.y_draws.min() == 6 and lesson.y_draws.shape == (1, 2, 8)
    lesson = lesson_for(Curves(), CONFIG, Sizes(2, 2, 4, 1, False))
    assert lesson.buffer is not None and lesson.visible is not None
    assert lesson.y.tolist() == [[0, 1]] * 2 and lesson.buffer[1].tolist() == [[2]] * 2
    assert lesson.visible.max() == 1
    lesson = lesson_for(Curves(), CONFIG, Sizes(2, 2, 0, 1, False))
    assert lesson.y.tolist() == [[0, 1]] * 2


# Units


@pytest.mark.parametrize("buffer", [0, 3])
@pytest.mark.parametrize("bounded", [False, True])
def test_standardized_lessons_are_the_same_tasks_in_the_units_of_their_contexts(
    buffer: int, bounded: bool
) -> None:
    prior, config = GaussianProcess(), dataclasses.replace(CONFIG, known_share=1.0)
    plain, own = (
        lesson_for(prior, config, Sizes(64, 6, buffer, 1, True, own))
        for own in (FromContext(), FromContext(x=not bounded, y=True))
    )
    units = context_units(plain.x, plain.y)
    if bounded:
        units = units._replace(x_shift=torch.zeros(64, 1), x_scale=torch.ones(64, 1))
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(own.y.mean(1), torch.zeros(64), **near)
    torch.testing.assert_close(own.y.std(1), torch.ones(64), **near)
    torch.testing.assert_close(own.x, units.map_x(plain.x), **near)
    torch.testing.assert_close(own.x_query, units.map_x(plain.x_query), **near)
    torch.testing.assert_close(own.y_draws, units.map_y(plain.y_draws), **near)
    torch.testing.assert_close(own.f_draws, units.map_y(plain.f_draws), **near)
    torch.testing.assert_close(own.entropy, plain.entropy - units.y_scale.log().mean(), **near)
    if buffer:
        assert own.buffer is not None and plain.buffer is not None
        torch.testing.assert_close(own.buffer[1], units.map_y(plain.buffer[1]), **near)
    assert own.latents is not None and plain.latents is not None
    network = architecture(prior, config)
    assert [latent.name for latent in network.latents] == ["lengthscale", "outputscale", "noise"]
    for column, (latent, log_unit) in enumerate(
        zip(
            network.latents,
            (units.x_scale[:, 0].log(), 2 * units.y_scale.log(), 2 * units.y_scale.log()),
            strict=True,
        )
    ):
        moved = (own.latents - plain.latents)[..., column]
        expected = (-log_unit / latent.std).expand_as(moved)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)
    shown = ~own.known.isnan()
    assert shown.any()
    torch.testing.assert_close(own.known[shown], own.latents[0][shown])


def test_a_lengthscale_of_features_with_other_ranges_has_no_value() -> None:
    lesson = lesson_for(
        GaussianProcess(), CONFIG, Sizes(64, 6, 0, 2, True, FromContext(True, True))
    )
    assert lesson.latents is not None
    assert lesson.latents[..., 0].isnan().all() and lesson.latents[..., 1:].isfinite().all()
    network = random_network(architecture(GaussianProcess(), CONFIG))
    assert all(part.isfinite() for part in loss(network, lesson))


def test_most_lessons_are_standardized_some_within_bounds_and_none_without_a_context() -> None:
    sizes = [plan(CONFIG, step, 0) for step in range(1000)]
    with_context = [size for size in sizes if size.context > 0]
    for own, expected in (
        (FromContext(x=True, y=True), CONFIG.standardized_share - CONFIG.bounded_share),
        (FromContext(x=False, y=True), CONFIG.bounded_share),
    ):
        share = sum(size.own == own for size in sizes) / len(with_context)
        assert abs(share - expected) < 4 * math.sqrt(0.25 / len(with_context))
    assert not any(size.own.x or size.own.y for size in sizes if size.context == 0)


def test_a_task_without_a_context_has_the_units_of_the_prior() -> None:
    class Empty:
        def sample(self, *sizes: int, generator: torch.Generator) -> Tasks:
            tasks = GaussianProcess().sample(*sizes, generator=generator)
            return tasks._replace(num_context=0, latents={})

    lesson = lesson_for(Empty(), CONFIG, Sizes(4, 6, 0, 1, False, FromContext(True, True)))
    assert lesson.x.shape == (4, 0, 1) and lesson.own == FromContext(False, False)


# The objective


def random_network(config: TransformerConfig) -> Transformer:
    torch.manual_seed(0)
    network = Transformer(config).requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@dataclasses.dataclass(frozen=True)
class Known:
    """Queries with one conditional: f ~ Normal(0.7, 0.04), y = f + Normal(0, 0.05)."""

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        return Lines().sample(batch, n, d, generator=generator)

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        tasks = self.sample(batch, n, d, generator=generator)
        x_query = torch.rand(batch, len(visible), d, generator=generator)
        mean = torch.full(x_query.shape[:2], 0.7, dtype=torch.float64)
        noise = torch.full((batch,), 0.05, dtype=torch.float64)
        variance = torch.full_like(mean, 0.04)
        return ConditionalTasks(tasks.x, tasks.y, x_query, mean, variance, noise, {})


def test_the_loss_estimates_the_cross_entropy_without_bias() -> None:
    config = dataclasses.replace(CONFIG, components=1)
    network = random_network(architecture(Known(), config))
    for head in (network.head_y, network.head_f):
        head.weight.zero_()  # the answer is one normal, whatever the context
    lesson = lesson_for(Known(), config, Sizes(500, 0, 0, 1, False))
    value, loss_y, excess = loss(network, lesson)
    loss_f = value - loss_y
    for estimate, head, variance, draws in (
        (loss_y, network.mixture_y, 0.09, lesson.y_draws),
        (loss_f, network.mixture_f, 0.04, lesson.f_draws),
    ):
        final, _ = network.answer(lesson.x, lesson.y, lesson.known, lesson.own, lesson.x_query)
        _, mean, log_std = (float(part.flatten()[0]) for part in head(final))
        location = network.config.y_mean + network.config.y_std * mean
        scale = network.config.y_std * math.exp(log_std)
        square = ((0.7 - location) ** 2 + variance) / scale**2
        expected = math.log(scale) + 0.5 * math.log(2 * math.pi) + 0.5 * square
        error = Normal(location, scale).log_prob(draws).std() / math.sqrt(draws.numel())
        assert abs(estimate - expected) < 4 * error + 1e-6  # less, as draws are stratified
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.09)
    assert abs(loss_y - excess - entropy) < 1e-6


def test_lessons_are_bent_and_know_what_that_does_to_the_entropy() -> None:
    @dataclasses.dataclass(frozen=True)
    class Curved(Known):
        """y = 2 (1 - exp(-z / 2))."""

        def sample_conditional(
            self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
        ) -> ConditionalTasks:
            tasks = super().sample_conditional(batch, n, d, visible, generator=generator)
            curve = torch.full_like(tasks.noise, 0.5)
            return tasks._replace(bend=Bend.identity(tasks.noise)._replace(curve=curve))

    sizes = Sizes(20, 5, 0, 1, False)
    plain, curved = (lesson_for(prior, CONFIG, sizes) for prior in (Known(), Curved()))
    for one, other in (
        (plain.y_draws, curved.y_draws),
        (plain.f_draws, curved.f_draws),
    ):
        torch.testing.assert_close(other, 2 * (1 - torch.exp(-one / 2)))
    expected = float(plain.entropy - 0.5 * plain.y_draws.mean())  # the mean log slope
    assert float(curved.entropy) == pytest.approx(expected, abs=1e-5)


def test_conditionals_and_single_draws_give_the_same_expected_loss() -> None:
    class Sampled:
        """The same prior, whose conditionals nobody knows."""

        sample = staticmethod(GaussianProcess().sample)

    network = random_network(architecture(GaussianProcess(), CONFIG))
    means, errors = [], []
    for prior in (GaussianProcess(), Sampled()):
        losses = torch.stack(
            [
                loss(
                    network,
                    draw_lesson(prior, network.config, CONFIG, Sizes(64, 3, 3, 1, True), k, 0, CPU),
                )[0]
                for k in range(40)
            ]
        )
        means.append(losses.mean())
        errors.append(losses.std() / math.sqrt(40))
    assert abs(means[0] - means[1]) < 4 * math.hypot(*errors)


def test_targets_of_particles_have_the_moments_of_their_mixture() -> None:
    prior, generator = GaussianProcess(), torch.Generator().manual_seed(0)
    tasks = prior.sample_particles(
        4, 6, 1, torch.tensor([0, 3, 6]), particles=8, held={}, generator=generator
    )
    draws = [draw_targets(tasks, 2, generator) for _ in range(500)]
    entropy = draws[0][2]
    y, f = (torch.cat([draw[i] for draw in draws]) for i in range(2))  # (4000, 4, 2)
    weights, mean = tasks.log_weights[:, :2].exp(), tasks.mean[:, :2]
    expected = (weights * mean).sum(-1)
    between = (weights * (mean - expected.unsqueeze(-1)).square()).sum(-1)
    within, noise = tasks.variance[:, :2], tasks.noise.unsqueeze(1)
    for drawn, variance in ((f, within), (y, within + noise)):
        spread = between + (weights * variance).sum(-1)
        z = (drawn - expected) / spread.sqrt()
        assert z.mean(0).abs().max() < 4 / math.sqrt(len(z))
        kurtosis = z.square().var(0)
        assert ((z.square().mean(0) - 1).abs() < 4 * (kurtosis / len(z)).sqrt() + 1e-3).all()
    log_std = 0.5 * (within + noise).log()
    known = (weights * log_std).sum(-1).mean() + 0.5 * math.log(2 * math.pi * math.e)
    torch.testing.assert_close(entropy, known)


def test_particles_quieten_the_gradient() -> None:
    network = random_network(architecture(GaussianProcess(), CONFIG)).requires_grad_()
    sizes, noise = Sizes(64, 5, 0, 1, False), []
    for particles in (1, 16):
        config = dataclasses.replace(CONFIG, particles=particles, known_share=0.0)
        gradients = []
        for k in range(30):
            lesson = draw_lesson(GaussianProcess(), network.config, config, sizes, k, 0, CPU)
            (gradient,) = torch.autograd.grad(loss(network, lesson)[0], network.head_y.bias)
            gradients.append(gradient)
        noise.append(torch.stack(gradients).var(0).sum())
    assert noise[1] < 0.8 * noise[0]


def test_what_surprises_most_counts_with_its_logarithm() -> None:
    zero = torch.zeros(1, 1)
    mixture = Mixture(zero, zero, zero)
    for y in (0.0, 3.0, 1e3, 1e9):
        surprise = 0.5 * y**2 + 0.5 * math.log(2 * math.pi)
        expected = surprise if surprise < 10 else 10 * (1 + math.log(surprise / 10))
        found = -pfn.pretrain._mean_log_prob(mixture, torch.tensor([y]))
        torch.testing.assert_close(found, torch.tensor(expected))


def test_draws_of_a_query_are_stratified_and_normal() -> None:
    draws = pfn.pretrain._stratified_normal(400, 5, torch.Generator().manual_seed(0))
    slices = (torch.special.ndtr(draws) * STRATA).floor()
    assert torch.equal(slices, torch.arange(8.0).double()[:, None, None].expand_as(slices))
    uniform = torch.special.ndtr(draws).flatten().sort().values
    n = len(uniform)
    gap = (uniform - (torch.arange(n) + 0.5) / n).abs().max()
    assert gap < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1 %


def test_the_loss_of_latents_is_their_cross_entropy() -> None:
    latents = (
        Latent("lengthscale", per_feature=True, positive=True),
        Latent("noise", positive=True),
        Latent("kernel", categories=3),
    )
    config = TransformerConfig(max_features=2, width=16, heads=2, components=2, latents=latents)
    network = random_network(config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(7, config.latent_slots, 16, generator=generator)
    nothing = torch.zeros(7, 0, 2)
    final = Final(tokens, Forecast(nothing, nothing, nothing, nothing), nothing)
    drawn = {
        "lengthscale": torch.rand(7, 1, generator=generator),
        "noise": torch.rand(7, generator=generator),
        "kernel": torch.randint(3, (7,), generator=generator),
    }
    slots = latent_slots(config, drawn, 7, CPU).float()
    lesson = lesson_for(Lines(), CONFIG, Sizes(7, 3, 0, 1, False))._replace(latents=slots[None])
    mixture, logits = network.latent_head(final)
    z = [drawn["lengthscale"][:, 0].log(), drawn["noise"].log()]
    terms = [mixture_log_prob(*(p[:, 2 * i] for p in mixture), z[i]) for i in range(2)]
    terms.append(logits[:, 3:].log_softmax(-1).gather(1, drawn["kernel"][:, None])[:, 0])
    expected = -torch.stack(terms).mean()  # the second lengthscale, of no feature, has no part
    torch.testing.assert_close(latent_loss(network, final, lesson), expected)
    twice = lesson._replace(latents=slots.expand(2, -1, -1))
    torch.testing.assert_close(latent_loss(network, final, twice), expected)


def test_the_learning_rate_rises_from_above_zero_to_one_and_falls_to_zero() -> None:
    rates = [schedule(k / 1000, 0.1) for k in range(1001)]
    assert rates[0] == 0.01 and rates[100] == 1.0 and abs(rates[1000]) < 1e-12
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert math.isclose(rates[550], 0.5)
    assert schedule(0.0, 0.0) == 1.0


# The frozen configuration


def test_the_architecture_knows_the_priors_moments_and_latents() -> None:
    prior = GaussianProcess(
        kernel=("rbf", "matern52"),
        lengthscale=LogNormal(-1.0, 0.5),
        noise=LogNormal(-4.0, 1.0),
        mean=LogNormal(0.0, 0.5),
        ard=True,
    )
    network = architecture(prior, CONFIG)
    found = {latent.name: latent for latent in network.latents}
    per_feature = {name for name, latent in found.items() if latent.per_feature}
    assert list(found) == ["lengthscale", "outputscale", "noise", "mean", "kernel"]
    assert per_feature == {"lengthscale"} and found["kernel"].categories == 2
    assert found["noise"].positive and found["lengthscale"].positive
    assert not found["mean"].positive  # shifts of y would break a logarithm
    draws = pfn.pretrain.PROBE
    for name, mean, std, count in (
        ("lengthscale", -1.0, 0.5, 3 * draws),
        ("noise", -4.0, 1.0, 2 * draws),
    ):
        assert abs(found[name].mean - mean) < 4 * std / math.sqrt(count)
        assert abs(found[name].std - std) < 4 * std / math.sqrt(2 * count)
    # y is a mean of median 1 plus symmetric parts; four points of a task count as one at worst
    assert abs(network.y_mean - 1.0) < 0.2 and 0.5 < network.y_std < 2.0


def test_one_broken_draw_does_not_spoil_the_moments() -> None:
    class Rare:
        def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
            tasks = Lines().sample(batch, n, d, generator=generator)
            tasks.y[0, 0], tasks.y[1, 0] = torch.nan, torch.inf
            slope = torch.ones(batch)
            slope[3] = torch.nan
            return tasks._replace(latents={"slope": slope})

    network = architecture(Rare(), CONFIG)
    clean = architecture(Lines(), CONFIG)
    assert math.isclose(network.y_std, clean.y_std, rel_tol=1e-2)
    assert network.latents == (Latent("slope", positive=True, mean=0.0, std=1.0),)


def test_a_constant_prior_has_a_scale_all_the_same() -> None:
    class Zero:
        def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
            zero = torch.zeros(batch, n)
            return Tasks(torch.rand(batch, n, d, generator=generator), zero, zero, {})

    network = architecture(Zero(), CONFIG)
    assert (network.y_mean, network.y_std) == (0.0, 1.0)
