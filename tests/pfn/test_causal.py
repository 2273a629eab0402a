"""The causal network: what a query may see, and that its parts agree."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

import pfn
from pfn.causal import CausalTransformer, _find, find_runs
from pfn.network import build
from pfn.predictive import Predictive
from pfn.pretrain import PretrainConfig, draw_lesson, loss, plan
from pfn.transformer import Latent, Transformer, TransformerConfig
from pfn.units import FromContext
from priors import LearningCurves

CONFIG = TransformerConfig(
    max_features=1, width=24, layers=2, heads=2, components=3, y_mean=0.6, y_std=0.2, causal=True
)
TOLERANCE = 2e-5  # float32 rounding through a few layers, with y of order 1


@pytest.fixture(scope="module")
def network() -> CausalTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CausalTransformer(CONFIG).requires_grad_(False)
        for parameter in model.parameters():  # blocks that begin as the identity would hide leaks
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def of_sweeps() -> CausalTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = CausalTransformer(replace(CONFIG, max_features=4)).requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def curve(n: int, batch: int = 3, d: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    tasks = LearningCurves().sample(batch, n, d, generator=generator)
    return tasks.x.float(), tasks.y.float()


@pytest.mark.parametrize("d", [1, 3])
def test_a_prefix_of_a_buffer_is_that_context(
    network: CausalTransformer, of_sweeps: CausalTransformer, d: int
) -> None:
    network = network if d == 1 else of_sweeps
    x, y = curve(20, d=d)
    queries = torch.tensor([0.7, 0.9, 1.0])[None, :, None].expand(3, -1, -1)
    for n in (0, 1, 7, 20):
        own = x[:, max(n - 1, 0), None, 1:].expand(-1, 3, -1)  # of the run that the prefix ends in
        asked = torch.cat([queries, own], -1)
        alone = network.mixture_y(network.answer(x[:, :n], y[:, :n], None, FromContext(), asked)[0])
        empty = network.encode(x[:, :0], y[:, :0])
        visible = torch.full((3,), n)
        told = network.decode(empty, asked, buffer=(x, y), visible=visible)
        for one, other in zip(alone, network.mixture_y(told), strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_runs_of_a_sweep_are_told_apart() -> None:
    time = [0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.5]
    own = [0.5, 0.5, 0.7, 0.7, 0.7, 0.5, 0.5]
    x = torch.tensor([time, own]).T[None]
    assert find_runs(x).tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    asked = torch.tensor([[0.9, 0.5], [0.9, 0.7], [0.9, 0.1]])[None]
    for limit, found in ((7, [7, 5, 0]), (6, [6, 5, 0]), (4, [2, 4, 0]), (1, [1, 0, 0])):
        assert _find(x, asked, torch.full((1, 3), limit)).tolist() == [found]


def test_what_a_prefix_says_is_said_of_its_last_run(of_sweeps: CausalTransformer) -> None:
    x, y = curve(24, batch=8, d=2)
    runs = find_runs(x)
    state = of_sweeps._state(x[..., 0], y, runs)
    for i in range(8):
        begin = int((runs[i] == runs[i, -1]).nonzero()[0])
        own = x[i : i + 1, begin:], y[i : i + 1, begin:]
        alone = of_sweeps._state(own[0][..., 0], own[1], find_runs(own[0]))
        for whole, part in zip(state, alone, strict=True):
            torch.testing.assert_close(whole[i, -1], part[0, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("half", ["own run", "all runs"])
def test_half_of_the_heads_read_a_points_own_run_alone(
    of_sweeps: CausalTransformer, half: str
) -> None:
    network = copy.deepcopy(of_sweeps)
    for block in network.blocks:  # what the other heads say is not heard
        own, every = block.from_heads.weight.chunk(2, 1)
        (every if half == "own run" else own).zero_()
    x, y = curve(24, batch=8, d=2)
    runs = find_runs(x)
    before = (runs < runs[:, -1:]) & (x[..., 1:] != x[:, -1:, 1:]).any(-1)
    asked = x[:, -1:] + torch.tensor([0.1, 0.0])
    answers = [
        network.answer(x, values, None, FromContext(), asked)[0].tokens
        for values in (y, torch.where(before, 1 - y, y))
    ]
    differs = (answers[0] - answers[1]).abs().amax((1, 2)) > TOLERANCE
    assert differs.tolist() == (before.any(-1) & (half == "all runs")).tolist()
    assert before.any(-1).sum() >= 4


def test_one_head_hears_runs_of_near_hyperparameters_more(of_sweeps: CausalTransformer) -> None:
    network = copy.deepcopy(of_sweeps)
    for block in network.blocks:  # only the last head is heard
        block.from_heads.weight[:, : -CONFIG.width // CONFIG.heads].zero_()
    x = torch.tensor([[0.2, 0.5], [0.6, 0.5], [0.2, 0.9], [0.6, 0.9]])[None]
    y = torch.tensor([[0.3, 0.6, 0.3, 0.6]])

    def answer(y: torch.Tensor, place: float) -> torch.Tensor:
        asked = torch.tensor([[[0.6, place]]])
        return network.answer(x, y, None, FromContext(), asked)[0].tokens

    for place, near in ((0.45, 1), (0.95, 3)):
        moved = []
        for row in (near, 4 - near):
            other = y.clone()
            other[0, row] = 0.9
            moved.append(float((answer(other, place) - answer(y, place)).norm()))
        # the weights' ratio is at most exp(-15 (0.45^2 - 0.05^2)) = 0.05 in any layer
        assert moved[0] > 10 * moved[1] > 0


@pytest.mark.parametrize("d", [1, 3])
def test_points_added_to_a_context_are_read_as_if_they_had_been_in_it(
    network: CausalTransformer, of_sweeps: CausalTransformer, d: int
) -> None:
    network = network if d == 1 else of_sweeps
    x, y = curve(15, d=d)
    queries = torch.linspace(0.6, 1, 4)[None, :, None].expand(3, -1, -1)
    queries = torch.cat([queries, x[:, -1:, 1:].expand(-1, 4, -1)], -1)
    whole = network.mixture_f(network.decode(network.encode(x, y), queries))
    begun = network.encode(x[:, :9], y[:, :9])
    told = network.decode(begun, queries, buffer=(x[:, 9:], y[:, 9:]), visible=torch.full((4,), 6))
    for one, other in zip(whole, network.mixture_f(told), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_queries_do_not_see_each_other_nor_what_comes_after_their_prefix(
    network: CausalTransformer,
) -> None:
    x, y = curve(12)
    queries = torch.tensor([0.5, 0.8])[None, :, None].expand(3, -1, -1)
    empty = network.encode(x[:, :0], y[:, :0])
    visible = torch.tensor([5, 8])
    both = network.mixture_y(network.decode(empty, queries, buffer=(x, y), visible=visible))
    changed = y.clone()
    changed[:, 5:] = 0.123
    first = network.mixture_y(
        network.decode(empty, queries[:, :1], buffer=(x, changed), visible=visible[:1])
    )
    for one, other in zip(both, first, strict=True):
        torch.testing.assert_close(one[:, :1], other, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_encoding_of_one_curve_repeats(network: CausalTransformer) -> None:
    x, y = curve(6, batch=1)
    twice = network.encode(x, y).repeat(2)
    queries = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(0))
    together = network.mixture_y(network.decode(twice, queries)).means
    for i in range(2):
        alone = network.mixture_y(network.decode(network.encode(x, y), queries[i : i + 1])).means
        torch.testing.assert_close(together[i : i + 1], alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_half_of_the_lessons_are_single_runs_and_most_sweeps_have_few_hyperparameters() -> None:
    config = PretrainConfig(causal=True, max_features=11, max_context=40, tokens=600, tasks=1)
    count = 4000
    features = torch.tensor([plan(config, step, 0).features for step in range(count)])
    shares = torch.bincount(features, minlength=12)[1:] / count
    k = torch.arange(1.0, 11)
    expected = torch.cat([torch.tensor([0.5]), 0.5 * ((k + 1) / k).log() / math.log(11)])
    error = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() < 4.5 * error).all()


def test_a_lesson_asks_for_rows_that_come_after_what_they_see() -> None:
    config = PretrainConfig(causal=True, max_context=40, queries=30, tokens=600, tasks=1)
    sizes = plan(config, 0, 0)
    lesson = draw_lesson(LearningCurves(), CONFIG, config, sizes, 0, 0, torch.device("cpu"))
    assert lesson.buffer is not None and lesson.visible is not None
    x, y = lesson.buffer
    assert x.shape[1] == sizes.buffer and lesson.x.shape[1] == 0
    row = (x[0, :, 0] == lesson.x_query[0]).float().argmax(-1)  # times are distinct
    assert (lesson.visible <= row).all()
    torch.testing.assert_close(y[:, row], lesson.y_draws[0])
    value, _, _ = loss(build(CONFIG), lesson)
    assert bool(value.isfinite())


def test_a_lesson_of_sweeps_shows_the_runs_before_and_a_beginning_of_its_own() -> None:
    config = PretrainConfig(
        causal=True, max_features=4, max_context=60, queries=200, tokens=4000, tasks=1
    )
    sizes = plan(config, 0, 0)._replace(features=3)
    network = replace(CONFIG, max_features=4)
    lesson = draw_lesson(LearningCurves(), network, config, sizes, 0, 0, torch.device("cpu"))
    assert lesson.buffer is not None and lesson.visible is not None
    x, _ = lesson.buffer
    runs = find_runs(x)
    alone = 0.0
    for i in range(len(x)):
        row = (x[i] == lesson.x_query[i].unsqueeze(1)).all(-1).float().argmax(-1)
        begin = (runs[i] < runs[i, row].unsqueeze(-1)).sum(-1)
        assert ((begin <= lesson.visible[i]) & (lesson.visible[i] <= row)).all()
        alone += float((lesson.visible[i] == begin)[row > begin + 5].float().mean()) / len(x)
    assert 0.2 < alone < 0.5  # a fifth, and those whose beginning is empty by chance
    value, _, _ = loss(build(network), lesson)
    assert bool(value.isfinite())


def test_training_lowers_the_loss_of_curves() -> None:
    config = PretrainConfig(causal=True, max_context=30, queries=60, tokens=1800, tasks=1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for step in range(60):
        lesson = draw_lesson(
            LearningCurves(), CONFIG, config, plan(config, step, 0), step, 0, torch.device("cpu")
        )
        value, loss_y, _ = loss(model, lesson)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(loss_y))
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.5  # nats; noise of a mean is 0.1


def test_its_mixtures_are_distributions(network: CausalTransformer) -> None:
    x, y = curve(9)
    mixture = network.mixture_y(network.decode(network.encode(x, y), x))
    predictive = Predictive(mixture.log_weights, mixture.means, mixture.log_stds.exp())
    assert predictive.batch_shape == (3, 9)
    torch.testing.assert_close(
        mixture.log_weights.logsumexp(-1), torch.zeros(3, 9), atol=1e-5, rtol=0
    )


def test_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="no latents"):
        CausalTransformer(TransformerConfig(1, latents=(Latent("noise"),), causal=True))


def test_a_configuration_says_which_network_is_built() -> None:
    assert isinstance(build(CONFIG), CausalTransformer)
    assert isinstance(build(TransformerConfig(1, width=24, heads=2)), Transformer)


def test_its_users_are_told_of_units_and_order() -> None:
    model = pfn.load("curves")
    with pytest.raises(ValueError, match="standardize=False for model 'curves'"):
        model.predict(([0.1, 0.2], [0.5, 0.6]), [0.5])
    with pytest.raises(ValueError, match="in order of time"):
        model.predict(([0.2, 0.1], [0.5, 0.6]), [0.5], standardize=False)
    fitted = model.condition(([0.1, 0.2], [0.5, 0.6]), standardize=False)
    more = fitted.extend([0.3], [0.65]).predict([0.5, 1.0])
    whole = model.predict(([0.1, 0.2, 0.3], [0.5, 0.6, 0.65]), [0.5, 1.0], standardize=False)
    torch.testing.assert_close(more.mean, whole.mean, atol=TOLERANCE, rtol=TOLERANCE)
    assert fitted.latents() == {}
