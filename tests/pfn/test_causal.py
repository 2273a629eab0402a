"""The causal network: what a query may see, and that its parts agree."""

from __future__ import annotations

import pytest
import torch

import pfn
from pfn.causal import CausalTransformer
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


def curve(n: int, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    tasks = LearningCurves().sample(batch, n, 1, generator=generator)
    return tasks.x.float(), tasks.y.float()


def test_a_prefix_of_a_buffer_is_that_context(network: CausalTransformer) -> None:
    x, y = curve(20)
    queries = torch.tensor([0.7, 0.9, 1.0])[None, :, None].expand(3, -1, -1)
    for n in (0, 1, 7, 20):
        alone = network.mixture_y(
            network.answer(x[:, :n], y[:, :n], None, FromContext(), queries)[0]
        )
        empty = network.encode(x[:, :0], y[:, :0])
        visible = torch.full((3,), n)
        told = network.decode(empty, queries, buffer=(x, y), visible=visible)
        for one, other in zip(alone, network.mixture_y(told), strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


def test_points_added_to_a_context_are_read_as_if_they_had_been_in_it(
    network: CausalTransformer,
) -> None:
    x, y = curve(15)
    queries = torch.linspace(0.6, 1, 4)[None, :, None].expand(3, -1, -1)
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


def test_more_features_or_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="one feature"):
        CausalTransformer(TransformerConfig(max_features=2, causal=True))
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
