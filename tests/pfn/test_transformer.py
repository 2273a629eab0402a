"""Who attends to whom, what is inert, and how the network starts.

The networks here have random weights in float64, so that "does not depend" means to rounding: the
sums of a few small layers and a solve with a condition number of some thousands.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pfn.transformer
from pfn.experts import Forecast
from pfn.transformer import (
    Encoded,
    Final,
    Latent,
    Transformer,
    TransformerConfig,
    attend,
    place,
)
from pfn.units import FromContext

ROUNDING = 1e-9
LATENTS = (
    Latent("lengthscale", per_feature=True, positive=True),
    Latent("noise", positive=True),
    Latent("kernel", categories=2),
)
CONFIG = TransformerConfig(
    max_features=3,
    width=16,
    layers=2,
    heads=4,
    expansion=2,
    fourier_octaves=2,
    components=3,
    y_mean=0.5,
    y_std=2.0,
    latents=LATENTS,
)


def random_network() -> Transformer:
    """Random everywhere: at its own initialisation no block would do anything."""
    torch.manual_seed(0)
    network = Transformer(CONFIG).double().eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        size = 0.05 if name.startswith("experts.") else 0.3  # no extreme hyperparameters
        parameter.add_(size * torch.randn_like(parameter))
    return network


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(network: Transformer, final: Final) -> Tensor:
    """All that the network says of queries, then of latents, side by side (b, m + slots, ...)."""
    m = final.forecast.mean.shape[1]
    mixtures = [*network.mixture_y(final), *network.mixture_f(final)]
    queries = torch.cat([final.tokens[:, :m], *mixtures], -1)
    latents = F.pad(final.tokens[:, m:], (0, queries.shape[-1] - CONFIG.width))
    return torch.cat([queries, latents], 1)


def decode(network: Transformer, encoded: Encoded, x_query: Tensor, **options: Any) -> Tensor:
    return everything(network, network.decode(encoded, x_query, **options))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING)


def test_context_order_does_not_matter() -> None:
    network, x, y, x_query = random_network(), draw(2, 7, 2), draw(2, 7), draw(2, 5, 2, seed=1)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    one = decode(network, network.encode(x, y), x_query)
    other = decode(network, network.encode(x[:, order], y[:, order]), x_query)
    assert close(one, other)
    swapped = decode(network, network.encode(x, y[:, order]), x_query)
    assert not torch.allclose(one, swapped, rtol=1e-3)  # but which y belongs to which x does


def test_no_query_depends_on_other_queries() -> None:
    network, x_query = random_network(), draw(2, 5, 2, seed=1)
    encoded = network.encode(draw(2, 7, 2), draw(2, 7))
    together = decode(network, encoded, x_query)
    changed = x_query.clone()
    changed[:, 1:] = 3 * draw(2, 4, 2, seed=2)
    assert close(decode(network, encoded, changed)[:, 0], together[:, 0])
    for j in range(5):
        assert close(decode(network, encoded, x_query[:, j : j + 1]), together[:, j : j + 1])


def test_one_pass_answers_as_an_encoded_context() -> None:
    network, x, y, x_query = random_network(), draw(2, 7, 2), draw(2, 7), draw(2, 5, 2, seed=1)
    known = torch.full((2, CONFIG.latent_slots), torch.nan, dtype=torch.float64)
    known[:, 3] = 0.7
    final, scaling = network.answer(x, y, known, FromContext(True, True), x_query, latents=True)
    encoded = network.encode(x, y, known, FromContext(True, True))
    assert close(everything(network, final), decode(network, encoded, x_query, latents=True))
    assert torch.equal(torch.stack(scaling), torch.stack(encoded.scaling))


def test_no_task_depends_on_the_others_of_its_batch() -> None:
    network, x, y, x_query = random_network(), draw(4, 7, 2), draw(4, 7), draw(4, 5, 2, seed=1)
    together = decode(network, network.encode(x, y), x_query)
    for i in range(4):
        one = slice(i, i + 1)
        assert close(decode(network, network.encode(x[one], y[one]), x_query[one]), together[one])


def test_a_query_that_sees_no_buffer_answers_as_without_one() -> None:
    network, x_query = random_network(), draw(2, 5, 2, seed=1)
    encoded = network.encode(draw(2, 7, 2), draw(2, 7))
    added = (draw(2, 4, 2, seed=2), draw(2, 4, seed=3))
    visible = torch.tensor([0, 4, 0, 2, 0])
    unseeing = visible == 0
    plain = decode(network, encoded, x_query)
    buffered = decode(network, encoded, x_query, buffer=added, visible=visible)
    assert close(buffered[:, unseeing], plain[:, unseeing])
    assert not torch.allclose(buffered[:, ~unseeing], plain[:, ~unseeing], rtol=1e-3)


def test_a_query_sees_exactly_its_prefix_of_the_buffer() -> None:
    network, x_query = random_network(), draw(2, 1, 2, seed=1)
    encoded = network.encode(draw(2, 7, 2), draw(2, 7))
    x, y = draw(2, 4, 2, seed=2), draw(2, 4, seed=3)
    for seen in range(1, 5):
        visible = torch.tensor([seen])
        answer = decode(network, encoded, x_query, buffer=(x, y), visible=visible)
        prefix = (x[:, :seen], y[:, :seen])
        assert close(decode(network, encoded, x_query, buffer=prefix, visible=visible), answer)
        later = y.clone()
        later[:, seen:] += 10
        assert close(decode(network, encoded, x_query, buffer=(x, later), visible=visible), answer)
        last = y.clone()
        last[:, seen - 1] += 10
        moved = decode(network, encoded, x_query, buffer=(x, last), visible=visible)
        assert not torch.allclose(moved, answer, rtol=1e-3)


def test_buffer_points_see_the_context_and_causally_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = random_network()
    encoded = network.encode(draw(1, 2, 2), draw(1, 2))
    masks: list[Tensor | None] = []

    def record(q: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        masks.append(allowed)
        return attend(q, key, value, allowed)

    monkeypatch.setattr(pfn.transformer, "attend", record)
    buffer = (draw(1, 3, 2), draw(1, 3))
    network.decode(encoded, draw(1, 2, 2), buffer=buffer, visible=torch.tensor([1, 3]))
    expected = [  # columns: the task token, two context points, three buffer points
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert len(masks) == CONFIG.layers
    for mask in masks:
        assert mask is not None and mask.int().tolist() == expected


def test_without_a_buffer_attention_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []

    def record(q: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        masks.append(allowed)
        return attend(q, key, value, allowed)

    monkeypatch.setattr(pfn.transformer, "attend", record)
    network = random_network()
    network.decode(network.encode(draw(2, 7, 2), draw(2, 7)), draw(2, 5, 2))
    assert masks == [None] * (2 * CONFIG.layers)


def test_latent_queries_see_the_context_only() -> None:
    network = random_network()
    x, y = draw(2, 7, 2), draw(2, 7)
    encoded = network.encode(x, y)
    alone = decode(network, encoded, draw(2, 0, 2), latents=True)
    assert alone.shape[:2] == (2, CONFIG.latent_slots)
    beside = decode(
        network,
        encoded,
        draw(2, 3, 2, seed=4),
        buffer=(draw(2, 2, 2, seed=5), draw(2, 2, seed=6)),
        visible=torch.tensor([0, 1, 2]),
        latents=True,
    )
    assert close(beside[:, 3:], alone)
    elsewhere = decode(network, network.encode(x, y + 1), draw(2, 0, 2), latents=True)
    assert not torch.allclose(elsewhere, alone, rtol=1e-3)


def test_an_empty_context_gives_the_prior_predictive() -> None:
    network = random_network()
    encoded = network.encode(draw(2, 0, 2), draw(2, 0))
    assert torch.equal(encoded.scaling.center, torch.full((2,), 0.5, dtype=torch.float64))
    assert torch.equal(encoded.scaling.scale, torch.full((2,), 2.0, dtype=torch.float64))
    final = network.decode(encoded, draw(2, 5, 2), latents=True)
    latents, logits = network.latent_head(final)
    for value in (*network.mixture_y(final), *network.mixture_f(final), *latents, logits):
        assert value.isfinite().all()


def test_latents_marked_unknown_are_as_none() -> None:
    network, x, y, x_query = random_network(), draw(2, 7, 2), draw(2, 7), draw(2, 5, 2, seed=1)
    unknown = torch.full((2, CONFIG.latent_slots), torch.nan, dtype=torch.float64)
    plain = decode(network, network.encode(x, y), x_query)
    assert torch.equal(decode(network, network.encode(x, y, unknown), x_query), plain)


@pytest.mark.parametrize("slot", range(CONFIG.latent_slots))
def test_a_revealed_latent_changes_the_answer_even_when_it_is_zero(slot: int) -> None:
    network, x, y, x_query = random_network(), draw(2, 7, 2), draw(2, 7), draw(2, 5, 2, seed=1)
    known = torch.full((2, CONFIG.latent_slots), torch.nan, dtype=torch.float64)
    answers = [decode(network, network.encode(x, y), x_query)]
    for value in (0.0, 1.0):
        known[:, slot] = value
        answers.append(decode(network, network.encode(x, y, known), x_query))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(answers[i], answers[j], rtol=1e-3)


def test_features_beyond_d_are_inert() -> None:
    network, x, y, x_query = random_network(), draw(2, 7, 2), draw(2, 7), draw(2, 5, 2, seed=1)
    before = decode(network, network.encode(x, y), x_query)
    waves = 1 + 2 * CONFIG.fourier_octaves  # inputs of `embed_x` per feature
    unused = [*range(2 * waves, 3 * waves), 3 * waves + 0, 3 * waves + 2]
    network.embed_x.weight[:, unused] = 100.0
    for block in network.blocks:
        precisions = block.to_metric.weight.unflatten(0, (CONFIG.heads, 3))
        precisions[:, 2] = 100.0
    experts, count = network.experts, CONFIG.components
    experts.propose.weight.unflatten(0, (2, count, 6))[:, :, 2] = 100.0
    for layer in (experts.to_task, experts.to_latent):
        layer.weight.unflatten(1, (count, 2 + 6))[:, :, 2 + 2] = 100.0
    assert torch.equal(decode(network, network.encode(x, y), x_query), before)


def test_every_block_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    for block in Transformer(CONFIG).blocks:
        tokens, attended = torch.randn(2, 5, 16), torch.randn(2, 4, 5, 4)
        assert torch.equal(block.finish(tokens, attended), tokens)


def test_logits_are_tempered_inner_products_minus_scaled_squared_distances() -> None:
    """One inner product of long vectors, against the formula that `Block` states."""
    block, n, m, d = random_network().blocks[0], 4, 3, 2
    context, queries = draw(1, n, 16, seed=1), draw(1, m, 16, seed=2)
    x, x_query = draw(1, n, d, seed=3), draw(1, m, d, seed=4)
    metric = block.metric(draw(1, 16, seed=5), d)  # (b, h, 1, d)
    sharpness = draw(1, 4, 1, 1, seed=6)
    key, value = block.keys_values(context, *place(x).near(metric).of_key())
    query = block.queries(queries, sharpness, *place(x_query).near(metric).of_query())

    q = block.to_query(queries).unflatten(-1, (4, 4))
    k, v = (half.unflatten(-1, (4, 4)) for half in block.to_key_value(context).chunk(2, -1))
    product = sharpness * torch.einsum("bjhc,bihc->bhji", q, k)
    apart = 2 * x_query[:, :, None] - 2 * x[:, None]  # in the box [-1, 1]
    distance = torch.einsum("bhod,bjid->bhji", metric.square(), apart.square())
    torch.testing.assert_close(query @ key.mT, product - distance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value[..., :4], v.transpose(1, 2))
    assert value.shape == key.shape and not value[..., 4:].any()


def test_the_task_token_is_near_to_everything_by_a_learned_logit() -> None:
    block, d, sharpness = random_network().blocks[0], 2, draw(1, 4, 1, 1)
    task, queries, x_query = draw(1, 1, 16, seed=1), draw(1, 3, 16, seed=2), draw(1, 3, d, seed=3)
    metric, nowhere = block.metric(task[:, 0], d), place(x_query[:, :0], before=1)
    key, _ = block.keys_values(task, *nowhere.near(metric).of_key())
    higher, _ = block.keys_values(task, *nowhere.near(metric).of_key(logit=1.0))
    for x in (x_query, 100 * x_query):
        query = block.queries(queries, sharpness, *place(x).near(metric).of_query())
        content = query[..., :4] @ key[..., :4].mT
        assert close(query @ key.mT, content)
        assert close(query @ higher.mT, content + 1)
    query = block.queries(task, sharpness, *nowhere.near(metric).of_query())
    assert close(query[..., 4:], torch.zeros(d + 2, dtype=torch.float64))  # it sees no distance


def test_attention_sharpens_with_the_log_of_the_points() -> None:
    network = random_network()
    sharpness = network.sharpness(torch.tensor([[0.0, 7.0]], dtype=torch.float64))
    for block, sharp in zip(network.blocks, sharpness, strict=True):
        offset, slope = block.temperature[:, :, None] / math.sqrt(4)
        assert close(sharp[0, :, :, 0], torch.cat([offset, offset + slope * math.log(8)], dim=1))


def test_new_heads_reach_from_far_to_near_whatever_the_task() -> None:
    torch.manual_seed(0)
    for block in Transformer(CONFIG).blocks:
        metric = block.metric(torch.randn(2, 16), 3)
        expected = torch.linspace(-3, 3, 4).div(2).exp()[None, :, None, None].expand(2, -1, 1, 3)
        torch.testing.assert_close(metric, expected)


def test_scaling_shrinks_the_moments_of_y_to_the_priors_by_a_tenth_of_a_point() -> None:
    y = draw(2, 7)
    scaling = random_network().scaling(y)
    center = (y.sum(1) + 0.1 * 0.5) / 7.1
    variance = ((y - center[:, None]).square().sum(1) + 0.1 * 4.0) / 7.1
    torch.testing.assert_close(scaling.center, center)
    torch.testing.assert_close(scaling.scale.square(), variance)


def test_the_network_knows_whether_the_context_set_its_units() -> None:
    network, x, y, x_query = random_network(), draw(2, 7, 2), draw(2, 7), draw(2, 5, 2, seed=1)
    own = decode(network, network.encode(x, y), x_query)
    other = decode(network, network.encode(x, y, own=FromContext(True, True)), x_query)
    assert not torch.allclose(own, other, rtol=1e-3)


def test_heads_give_mixtures_around_the_experts() -> None:
    network = random_network()
    tokens = 1e6 * (draw(2, 5 + CONFIG.latent_slots, 16) - 0.5)  # beyond what a norm lets through
    said = Forecast(*(draw(2, m, 3, seed=m) for m in (5, 5, 1, 1)))
    final = Final(tokens, said, draw(2, 1, 3, seed=2))
    latents, logits = network.latent_head(final)
    slots = CONFIG.latent_slots
    for mixture, m in (
        (network.mixture_y(final), 5),
        (network.mixture_f(final), 5),
        (latents, slots),
    ):
        assert all(value.shape == (2, m, CONFIG.components) for value in mixture)
        total = mixture.log_weights.logsumexp(-1)
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=ROUNDING)
        assert mixture.log_stds.abs().max() <= 15  # of the experts' at most 5, stretched by 10
    assert logits.shape == (2, slots)
    assert not torch.equal(network.mixture_y(final).means, network.mixture_f(final).means)


def test_a_new_network_says_what_its_experts_say() -> None:
    torch.manual_seed(0)
    network = Transformer(CONFIG).requires_grad_(False)
    encoded = network.encode(torch.rand(2, 7, 2), torch.rand(2, 7))
    final = network.decode(encoded, torch.rand(2, 5, 2))
    noise = 4 * 0.02 * math.sqrt(16) + 1e-6  # of head weights of 0.02 on 16 unit entries
    for mixture, variance in (
        (network.mixture_y(final), final.forecast.variance + final.forecast.noise),
        (network.mixture_f(final), final.forecast.variance),
    ):
        away = (mixture.means - final.forecast.mean) / variance.sqrt()
        assert away.abs().max() < noise
        assert (mixture.log_stds - 0.5 * variance.log()).abs().max() < noise


def test_attention_is_in_float32_under_autocast() -> None:
    query, key, value = (torch.randn(1, 2, 3, width) for width in (7, 7, 4))
    with torch.autocast("cpu", torch.bfloat16):
        attended = attend(query, key, value)
    expected = (query @ key.mT).softmax(-1) @ value
    torch.testing.assert_close(attended, expected)


@pytest.mark.parametrize(("name", "value"), [("heads", 3), ("layers", 0), ("components", 0)])
def test_an_impossible_architecture_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        TransformerConfig(max_features=1, width=16, **{name: value})
