"""Units, caching and gradients around the network, whatever its weights.

The network is small, random and in float64, so that equalities hold to rounding: inputs that were
shifted by up to 1000 of their scales keep 13 digits, the network's slope costs a few more.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily

import pfn.experts
import pfn.model
from pfn.card import ModelCard
from pfn.model import PFN
from pfn.predictive import Predictive
from pfn.transformer import Latent, Transformer, TransformerConfig
from pfn.units import FromContext

DIGITS = 1e-8
few = settings(max_examples=25)
LATENTS = (
    Latent("lengthscale", per_feature=True, positive=True, mean=-1.0, std=0.8),
    Latent("noise", positive=True, mean=-4.0, std=1.5),
    Latent("mean", mean=0.3, std=2.0),
    Latent("kernel", categories=3),
)


def tiny(latents: tuple[Latent, ...] = LATENTS) -> PFN:
    """A PFN for up to three features and 16 points with random weights."""
    config = TransformerConfig(
        max_features=3,
        width=16,
        layers=2,
        heads=2,
        expansion=2,
        fourier_octaves=2,
        components=3,
        y_mean=0.2,
        y_std=1.5,
        latents=latents,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Transformer(config).double().eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            size = 0.05 if name.startswith("experts.") else 0.2  # no extreme hyperparameters
            parameter.add_(size * torch.randn_like(parameter))
    card = ModelCard(
        "tiny",
        config,
        prior=None,
        max_context=16,
        latent_units={"lengthscale": "x", "noise": "y^2", "mean": "y", "kernel": ""},
        latent_categories={"kernel": ["rbf", "matern32", "matern52"]},
    )
    return PFN(network, card)


MODEL = tiny()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parts(posterior: Predictive) -> tuple[Tensor, Tensor, Tensor]:
    return posterior.log_weights, posterior.means, posterior.stds


def assert_same(one: Predictive, other: Predictive, digits: float = DIGITS) -> None:
    """Equal weights, and means and standard deviations equal on the scale of the latter."""
    torch.testing.assert_close(one.log_weights, other.log_weights, rtol=digits, atol=digits)
    assert ((one.means - other.means) / other.stds).abs().max() < digits
    torch.testing.assert_close(one.stds, other.stds, rtol=digits, atol=0)


def direct(
    x: Tensor,
    y: Tensor,
    x_query: Tensor,
    known: Tensor | None = None,
    own: FromContext = FromContext(),
) -> Predictive:
    """The answer for the noise-free function straight from the network."""
    network = MODEL.transformer
    encoded = network.encode(x[None], y[None], known, own)
    mixture = network.mixture_f(network.decode(encoded, x_query[None]))
    center, scale = (value[:, None, None] for value in encoded.scaling)
    means, stds = center + scale * mixture.means, scale * mixture.log_stds.exp()
    return Predictive(mixture.log_weights[0], means[0], stds[0])


# Units

scales = st.integers(-12, 12).map(lambda exponent: 3.7 * 10.0**exponent)
shifts = st.sampled_from([0.0, 0.3, -7.0, 1000.0])


@few
@given(
    scale=st.tuples(scales, scales),
    shift=st.tuples(shifts, shifts),
    y_scale=scales,
    y_shift=shifts,
    latent=st.booleans(),
)
def test_answers_follow_shifts_and_scales_of_y_and_of_each_input(
    scale: tuple[float, float],
    shift: tuple[float, float],
    y_scale: float,
    y_shift: float,
    latent: bool,
) -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(5, 2, seed=1)
    x_scale = torch.tensor(scale, dtype=torch.float64)
    x_shift = torch.tensor(shift, dtype=torch.float64) * x_scale
    plain = MODEL.predict((x, y), x_query, latent=latent)
    moved = MODEL.predict(
        (x * x_scale + x_shift, (y + y_shift) * y_scale), x_query * x_scale + x_shift, latent=latent
    )
    assert_same(moved, plain.affine(y_shift * y_scale, y_scale))
    value = draw(5, seed=2)
    torch.testing.assert_close(
        moved.log_prob((value + y_shift) * y_scale),
        plain.log_prob(value) - math.log(y_scale),  # the Jacobian
        rtol=0,
        atol=1e-6,  # log densities are as steep as deviations in standard deviations, here < 100
    )


def test_latents_follow_the_units_of_the_data() -> None:
    x, y, scale = draw(7, 2), draw(7), torch.tensor([1e-3, 40.0], dtype=torch.float64)
    plain = MODEL.condition((x, y)).latents()
    moved = MODEL.condition((x * scale - 5, 30 * y + 100)).latents()
    expected = {
        "lengthscale": scale * plain["lengthscale"].mean,
        "noise": 900 * plain["noise"].mean,
        "mean": 30 * plain["mean"].mean + 100,
    }
    for name, value in expected.items():
        torch.testing.assert_close(moved[name].mean, value, rtol=DIGITS, atol=0)
    torch.testing.assert_close(moved["kernel"].probs, plain["kernel"].probs)


def test_an_empty_context_is_answered_in_the_priors_own_units() -> None:
    empty = (np.zeros((0, 2)), np.zeros(0))
    x_query = draw(5, 2)
    for one, other in zip(
        parts(MODEL.predict(empty, x_query)),
        parts(MODEL.predict(empty, x_query, standardize=False)),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_one_point_is_shifted_only() -> None:
    x, y, x_query = torch.tensor([[5.0, -3.0]]).double(), torch.tensor([70.0]).double(), draw(4, 2)
    own = direct(x - x + 0.5, y - y, x_query + 0.5, own=FromContext(True, True))
    assert_same(MODEL.predict((x, y), x + x_query, latent=True), own.affine(70.0, 1.0))


@pytest.mark.parametrize(("value", "digits"), [(0.0, 1e-3), (0.1, 1e-3), (-1e12 / 3, 0.1)])
def test_a_constant_y_is_shifted_only(value: float, digits: float) -> None:
    x, x_query = draw(7, 2).sigmoid(), draw(4, 2, seed=1)
    bounds = [[0, 0], [1, 1]]
    y = torch.full((7,), value, dtype=torch.float64)  # whose computed spread may be 1e-17, or 1e-5
    own = direct(x, torch.zeros(7).double(), x_query, own=FromContext(x=False, y=True))
    found = MODEL.predict((x, y), x_query, bounds=bounds, latent=True)
    assert_same(found, own.affine(value, 1.0), digits)


def test_a_constant_column_is_shifted_only_beside_one_that_is_scaled() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    x[:, 1] = 40.0
    low, high = x[:, 0].min().item(), x[:, 0].max().item()
    units = MODEL.condition((x, y)).units
    assert units.x_shift.tolist() == [[low, 39.5]]
    assert units.x_scale.tolist() == [[high - low, 1.0]]
    own = direct(
        units.map_x(x)[0], units.map_y(y)[0], units.map_x(x_query)[0], own=FromContext(True, True)
    )
    found = MODEL.predict((x, y), x_query, latent=True)
    assert_same(found, own.affine(float(units.y_shift), float(units.y_scale)))


def test_in_a_batch_only_the_constant_task_is_not_scaled() -> None:
    x, y, x_query = draw(2, 7, 2), draw(2, 7), draw(2, 4, 2, seed=1)
    y[0] = 0.1
    both = MODEL.predict((x, y), x_query)
    for i in range(2):
        assert_same(both[i], MODEL.predict((x[i], y[i]), x_query[i]))


def test_bounds_replace_the_range_of_x() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    low, high = torch.tensor([-4.0, -5.0]), torch.tensor([6.0, 5.0])
    inside = MODEL.predict(
        ((x - low) / (high - low), y), (x_query - low) / (high - low), bounds=[[0, 0], [1, 1]]
    )
    assert_same(MODEL.predict((x, y), x_query, bounds=torch.stack([low, high])), inside)
    assert_same(MODEL.predict((x, y), x_query, bounds=pd.DataFrame([[-4, -5], [6, 5]])), inside)


def test_rows_outside_the_bounds_are_told_of() -> None:
    x, y = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0.0, 1.0, 0.3])
    with pytest.warns(UserWarning, match="1 of 3 context rows are outside the bounds") as caught:
        MODEL.predict((x, y), x, bounds=[[0.0], [2.0]])
    assert caught[0].filename == __file__
    MODEL.predict((x, y), x, bounds=[[0.0], [5.0]])


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 1],
        [[0, 0], [1, 0]],
        [[0, 0], [1, -1]],
        [[0, 0, 0], [1, 1, 1]],
        [[0, 0], [1, math.nan]],
        [[0, 0], [1, math.inf]],
        [["a", "b"], ["c", "d"]],
    ],
)
def test_impossible_bounds_are_refused(bounds: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected.*bounds.*got"):
        MODEL.condition((draw(7, 2), draw(7)), bounds=bounds)


def test_without_standardizing_numbers_are_in_the_priors_units() -> None:
    x, y, x_query = draw(7, 2).sigmoid(), draw(7), draw(4, 2, seed=1).sigmoid()
    own = MODEL.predict((x, y), x_query, latent=True, standardize=False)
    assert_same(own, direct(x, y, x_query))


# What comes out


@pytest.mark.parametrize(
    ("query", "dtype"),
    [
        (draw(3, 2), torch.float64),
        (draw(3, 2).float(), torch.float32),
        (draw(3, 2).bfloat16(), torch.bfloat16),
        (np.zeros((3, 2), np.float16), torch.float16),
        (np.zeros((3, 2), np.int32), torch.float32),
        ([[0, 1], [1, 0], [1, 1]], torch.float32),
    ],
)
def test_answers_come_in_the_dtype_of_the_query(query: Any, dtype: torch.dtype) -> None:
    posterior = MODEL.predict((draw(7, 2), draw(7)), query)
    for answer in (posterior.mean, posterior.variance, posterior.log_prob(0.0), posterior.sample()):
        assert answer.dtype == dtype and answer.shape == (3,)


def test_every_way_to_pass_the_same_data_gives_the_same_answer() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    expected = MODEL.predict((x, y), x_query)
    frame = pd.DataFrame(x.numpy(), columns=["a", "b"])
    query = pd.DataFrame(x_query.numpy()[:, ::-1], columns=["b", "a"])
    for context, x_new in (
        ((x.numpy(), y.numpy()), x_query.numpy()),
        ([x.tolist(), y.tolist()], x_query.tolist()),
        ((x, y[:, None]), x_query),
        ((frame, pd.Series(y.numpy())), query),
        ((frame, pd.DataFrame({"y": y.numpy()})), query),
    ):
        for one, other in zip(parts(MODEL.predict(context, x_new)), parts(expected), strict=True):
            assert torch.equal(one, other)


def test_one_dimensional_inputs_have_one_feature() -> None:
    x, y, x_query = draw(7), draw(7), draw(4, seed=1)
    assert_same(
        MODEL.predict((x, y), x_query), MODEL.predict((x[:, None], y), x_query[:, None]), 1e-15
    )


def test_a_batch_of_tasks_is_as_one_after_the_other() -> None:
    x, y, x_query = draw(3, 7, 2), draw(3, 7), draw(3, 4, 2, seed=1)
    fitted = MODEL.condition((x, y), given={"noise": [0.1, 0.2, 0.3]})
    together, latents = fitted.predict(x_query), fitted.latents()
    assert together.batch_shape == (3, 4)
    for i in range(3):
        alone = MODEL.condition((x[i], y[i]), given={"noise": 0.1 * (i + 1)})
        assert_same(together[i], alone.predict(x_query[i]))
        for name, marginal in alone.latents().items():
            torch.testing.assert_close(latents[name].mean[i], marginal.mean, equal_nan=True)


def test_a_fitted_context_answers_as_one_pass() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    fitted = MODEL.condition((x, y))
    for latent in (False, True):
        whole = MODEL.predict((x, y), x_query, latent=latent)
        for _ in range(2):
            assert_same(fitted.predict(x_query, latent=latent), whole)


def test_neither_other_queries_nor_the_order_of_the_context_matter() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    whole = MODEL.predict((x, y), x_query)
    assert_same(MODEL.predict((x[order], y[order]), x_query), whole)
    crowded = MODEL.predict((x, y), torch.cat([x_query[:1], 1e6 * draw(9, 2)]))
    assert_same(crowded[:1], whole[:1])


def test_many_queries_are_answered_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_query = draw(2, 7, 2), draw(2, 7), draw(2, 11, 2, seed=1)
    whole = MODEL.predict((x, y), x_query)
    sizes = []
    decode = MODEL.transformer.decode

    def record(encoded: Any, queries: Tensor, **options: Any) -> Tensor:
        sizes.append(queries.shape[1])
        return decode(encoded, queries, **options)

    monkeypatch.setattr(pfn.model, "CHUNK", 4 * 128)
    monkeypatch.setattr(MODEL.transformer, "decode", record)
    assert_same(MODEL.predict((x, y), x_query), whole)
    assert sizes == [4, 4, 3]
    monkeypatch.setattr(pfn.model, "MATRICES", 8**2)  # and many tasks one by one
    assert_same(MODEL.predict((x, y), x_query), whole)
    assert sizes[3:] == [4, 4, 3] * 2


def test_many_tasks_are_answered_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, x_query = draw(5, 7, 2), draw(5, 7), draw(5, 4, 2, seed=1)
    whole = MODEL.predict((x, y), x_query, given={"noise": draw(5, 1).exp()})
    sizes = []
    answer = MODEL.transformer.answer

    def record(x: Tensor, *rest: Any) -> Any:
        sizes.append(len(x))
        return answer(x, *rest)

    monkeypatch.setattr(pfn.model, "MATRICES", 2 * 8**2)
    monkeypatch.setattr(MODEL.transformer, "answer", record)
    assert_same(MODEL.predict((x, y), x_query, given={"noise": draw(5, 1).exp()}), whole)
    assert sizes == [2, 2, 1]


def test_no_queries_get_no_answers() -> None:
    posterior = MODEL.predict((draw(7, 2), draw(7)), np.zeros((0, 2)))
    assert posterior.batch_shape == (0,) and posterior.mean.shape == (0,)
    nothing = MODEL.predict((draw(0, 7, 2), draw(0, 7)), draw(0, 3, 2))
    assert nothing.batch_shape == (0, 3) and nothing.mean.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_may_meet_gradients_after_those_that_needed_none(dtype: torch.dtype) -> None:
    model = PFN(copy.deepcopy(MODEL.transformer).to(dtype), MODEL.card)
    x, y, x_query = (value.to(dtype) for value in (draw(7, 2), draw(7), draw(4, 2, seed=1)))
    pfn.experts._kernels.cache_clear()  # what the first call leaves there serves the second
    pfn.experts._limits.cache_clear()
    for answer in (model.predict((x, y), x_query), model.condition((x, y)).predict(x_query)):
        scale = torch.ones(4, 1, dtype=dtype, requires_grad=True)
        for part in (answer.log_weights, answer.means, answer.stds):
            (scale * part).sum().backward()
        assert scale.grad is not None and scale.grad.isfinite().all()
    x_query.requires_grad_()
    model.predict((x, y), x_query).mean.sum().backward()
    assert x_query.grad is not None and x_query.grad.any()


# Gradients


def test_no_gradient_unless_an_input_asks_for_one() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    asking = MODEL.transformer.requires_grad_(True)
    try:
        assert not MODEL.predict((x, y), x_query).mean.requires_grad
    finally:
        asking.requires_grad_(False)
    for i in range(3):
        inputs = [value.clone().requires_grad_(j == i) for j, value in enumerate((x, y, x_query))]
        assert MODEL.predict((inputs[0], inputs[1]), inputs[2]).mean.requires_grad
        with torch.no_grad():
            assert not MODEL.predict((inputs[0], inputs[1]), inputs[2]).mean.requires_grad
    noise = torch.tensor(0.1, requires_grad=True)
    assert MODEL.predict((x, y), x_query, given={"noise": noise}).mean.requires_grad


def test_gradients_match_finite_differences() -> None:
    def answer(x: Tensor, y: Tensor, x_query: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = MODEL.predict((x, y), x_query, given={"noise": noise})
        return posterior.mean, posterior.log_prob(0.3)

    inputs = (draw(5, 2), draw(5), draw(3, 2, seed=1), draw().exp())
    assert torch.autograd.gradcheck(answer, [value.requires_grad_() for value in inputs])


def test_gradients_are_finite_where_the_context_is_degenerate() -> None:
    x, y = torch.ones(3, 2, requires_grad=True), torch.ones(3, requires_grad=True)
    x_query = torch.ones(4, 2, requires_grad=True)
    MODEL.predict((x, y), x_query).log_prob(1.0).sum().backward()
    for value in (x, y, x_query):
        assert value.grad is not None and value.grad.isfinite().all()


# Latents that the user knows


def test_a_given_latent_enters_the_network_standardised() -> None:
    x, y, x_query = draw(7, 2).sigmoid(), draw(7), draw(4, 2, seed=1)
    known = torch.full((1, 8), math.nan, dtype=torch.float64)
    known[0, 0] = (math.log(0.2) + 1.0) / 0.8
    known[0, 1] = (math.log(3.0) + 1.0) / 0.8
    known[0, 3] = (math.log(0.01) + 4.0) / 1.5
    known[0, 4] = (0.7 - 0.3) / 2.0
    known[0, 5:] = torch.tensor([0.0, 1.0, 0.0])
    latents = {"lengthscale": [0.2, 3.0], "noise": 0.01, "mean": 0.7, "kernel": "matern32"}
    for size in (1, 2, 4):
        for names in itertools.combinations(latents, size):
            part, start = known.clone(), 0
            for latent in LATENTS:
                stop = start + MODEL.card.architecture.slots(latent)
                if latent.name not in names:
                    part[:, start:stop] = math.nan
                start = stop
            given = {name: latents[name] for name in names}
            own = MODEL.predict((x, y), x_query, latent=True, standardize=False, given=given)
            assert_same(own, direct(x, y, x_query, part))


def test_given_latents_are_in_the_units_of_the_data() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    scale, shift = torch.tensor([1e-3, 40.0], dtype=torch.float64), 100.0
    plain = MODEL.predict(
        (x, y),
        x_query,
        given={"noise": 0.01, "lengthscale": [0.4, 2.0], "mean": 0.2, "kernel": "rbf"},
    )
    moved = MODEL.predict(
        (x * scale, 30 * y + shift),
        x_query * scale,
        given={
            "noise": 900 * 0.01,
            "lengthscale": [0.4e-3, 80.0],
            "mean": 30 * 0.2 + shift,
            "kernel": 0,
        },
    )
    assert_same(moved, plain.affine(shift, 30.0))
    assert ((plain.mean - MODEL.predict((x, y), x_query).mean).abs() > 1e-3).all()


def test_gradients_exist_where_targets_are_constant() -> None:
    x, y = draw(2, 6, 2), torch.stack([torch.ones(6), draw(6).float()]).requires_grad_()
    MODEL.predict((x, y), draw(2, 3, 2, seed=1)).mean.sum().backward()
    assert y.grad is not None
    assert bool(y.grad.isfinite().all())


def test_given_latents_are_told_as_they_were_given() -> None:
    given = {"noise": 0.01, "lengthscale": [0.4, 2.0], "mean": -0.2, "kernel": "rbf"}
    fitted = MODEL.condition((draw(7, 2), 30 * draw(7) + 100), given=given)
    for name, marginal in fitted.latents().items():
        if name == "kernel":
            assert marginal.probs.tolist() == [1, 0, 0]
            continue
        told = torch.as_tensor(given[name], dtype=torch.float64)
        torch.testing.assert_close(marginal.mean, told, rtol=1e-5, atol=1e-4)
        assert (marginal.stddev < 1e-3).all()
    partly = MODEL.condition((draw(7, 2), draw(7)), given={"noise": 0.01}).latents()
    assert partly["noise"].stddev < 1e-5 < partly["lengthscale"].stddev.min()


def test_nothing_given_is_as_no_given() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    empty = MODEL.predict((x, y), x_query, given={})
    assert all(map(torch.equal, parts(empty), parts(MODEL.predict((x, y), x_query))))


def test_a_batch_takes_one_value_for_all_or_one_per_task() -> None:
    x, y, x_query = draw(2, 7, 2), draw(2, 7), draw(2, 4, 2, seed=1)
    for one, per_task in (
        ({"noise": 0.1}, {"noise": [0.1, 0.1]}),
        ({"lengthscale": 0.3}, {"lengthscale": [[0.3, 0.3], [0.3, 0.3]]}),
        ({"lengthscale": [0.3, 0.4]}, {"lengthscale": np.array([[0.3, 0.4], [0.3, 0.4]])}),
    ):
        a, b = (MODEL.predict((x, y), x_query, given=given) for given in (one, per_task))
        assert all(map(torch.equal, parts(a), parts(b)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nois": 0.1}, r"latents among \['lengthscale', 'noise', 'mean', 'kernel'\].*nois"),
        (0.1, "given as a dict.*0.1"),
        ({"noise": -0.1}, "positive given noise; got -0.1"),
        ({"noise": 0.0}, "positive given noise"),
        ({"noise": math.nan}, "finite given noise; got nan. Leave out"),
        ({"noise": None}, "finite given noise; got None"),
        ({"noise": "low"}, "given noise with numbers"),
        ({"noise": [0.1, 0.2]}, r"given noise as a number; got shape \(2,\)"),
        ({"lengthscale": [1.0, 2.0, 3.0]}, r"given lengthscale.*2 numbers.*got shape \(3,\)"),
        ({"kernel": "linear"}, r"given kernel among \['rbf', .*'linear'"),
        ({"kernel": 3}, "given kernel.*got 3"),
        ({"kernel": 0.5}, "given kernel.*got 0.5"),
    ],
)
def test_impossible_given_latents_are_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"Expected.*{said}"):
        MODEL.condition((draw(7, 2), draw(7)), given=given)


def test_a_model_without_latents_knows_none() -> None:
    model = tiny(latents=())
    fitted = model.condition((draw(7, 2), draw(7)))
    assert fitted.latents() == {}
    with pytest.raises(ValueError, match=r"latents among \[\]"):
        model.condition((draw(7, 2), draw(7)), given={"noise": 0.1})


def test_latents_have_the_kind_and_shape_of_what_they_describe() -> None:
    latents = MODEL.condition((draw(7, 2), draw(7))).latents()
    assert list(latents) == [latent.name for latent in LATENTS]
    assert latents["lengthscale"].batch_shape == (2,)  # one per feature that the data have
    assert latents["noise"].batch_shape == latents["mean"].batch_shape == ()
    assert isinstance(latents["kernel"], Categorical) and latents["kernel"].probs.shape == (3,)
    for name, low in (("lengthscale", 0.0), ("noise", 0.0), ("mean", -math.inf)):
        assert isinstance(latents[name], MixtureSameFamily)
        assert (latents[name].sample((100,)) > low).all()
    batched = MODEL.condition((draw(5, 7, 3), draw(5, 7))).latents()
    assert batched["lengthscale"].batch_shape == (5, 3)
    assert batched["noise"].batch_shape == batched["kernel"].batch_shape == (5,)


def test_one_lengthscale_for_all_features_needs_equal_ranges() -> None:
    model = tiny((Latent("lengthscale", positive=True),))
    x, y = draw(7, 2), draw(7)
    with pytest.raises(ValueError, match=r"Expected.*one lengthscale.*got ranges.*equal bounds"):
        model.condition((x, y), given={"lengthscale": 1.0})
    fitted = model.condition((x, y), given={"lengthscale": 2.0}, bounds=[[-5, -4], [5, 6]])
    assert fitted.latents()["lengthscale"].batch_shape == ()
    own = model.condition((x, y), standardize=False, given={"lengthscale": 0.2})
    one, other = (
        model.read_given({"lengthscale": v}, f.units, 2) for v, f in ((2, fitted), (0.2, own))
    )
    torch.testing.assert_close(one, other)


# Limits, hard data


def test_contexts_beyond_the_trained_size_warn_then_fail_then_need_a_word() -> None:
    def condition(n: int, **options: Any) -> None:
        MODEL.condition((draw(n, 2), draw(n)), **options)

    condition(16)
    for n in (17, 64):
        with pytest.warns(UserWarning, match=f"n = {n} points.*up to n = 16"):
            condition(n)
    with pytest.raises(
        ValueError, match=r"at most 64 points.*up to n = 16; got n = 65.*extrapolate"
    ):
        condition(65)
    with pytest.warns(UserWarning, match="n = 65"):
        condition(65, extrapolate_n=True)
    with pytest.warns(UserWarning, match="n = 65"):
        MODEL.predict((draw(65, 2), draw(65)), draw(1, 2), extrapolate_n=True)


def test_too_many_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 3 features for model 'tiny'; got.*d = 4"):
        MODEL.condition((draw(7, 4), draw(7)))


@settings(max_examples=60)
@given(data=st.data())
def test_hard_data_get_finite_answers(data: st.DataObject) -> None:
    n, d = data.draw(st.sampled_from([0, 1, 2, 3, 8])), data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 100))
    x, y, x_query = draw(n, d, seed=seed), draw(n, seed=seed + 1), draw(4, d, seed=seed + 2)
    x, y, x_query = (v * 10.0 ** data.draw(st.integers(-12, 12)) for v in (x, y, x_query))
    trouble = data.draw(
        st.lists(st.sampled_from(["constant y", "constant column", "duplicates", "rounded", "far"]))
    )
    if "constant y" in trouble:
        y[:] = y.mean() if n else 0.0
    if "constant column" in trouble and n:
        x[:, 0] = x[0, 0]
    if "duplicates" in trouble and n:
        x = x[:1].repeat(n, 1)
    if "rounded" in trouble:
        x, y, x_query = x.round(), y.round(), x_query.round()
    if "far" in trouble:
        x_query[0] = 1e30
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    fitted = MODEL.condition((x, y))
    for latent in (False, True):
        posterior = fitted.predict(x_query.to(dtype), latent=latent)
        assert posterior.mean.isfinite().all()
        assert posterior.variance.isfinite().all() and (posterior.variance > 0).all()
        targets = y[:1].to(dtype) if n else 0.0
        for value in (targets, 1e15 * posterior.stddev):
            assert posterior.log_prob(value).isfinite().all()
    for marginal in fitted.latents().values():
        assert marginal.sample().isfinite().all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, bool])
def test_integers_and_booleans_get_an_answer(dtype: Any) -> None:
    x = np.array([[0, 1], [1, 0], [1, 1], [0, 0]]).astype(dtype)
    posterior = MODEL.predict((x, x[:, 0]), x)
    as_floats = MODEL.predict((x.astype(float), x[:, 0].astype(float)), x.astype(np.float32))
    assert all(map(torch.equal, parts(posterior), parts(as_floats)))


@pytest.mark.parametrize(
    ("context", "query", "said"),
    [
        ((draw(7, 2), draw(6)), draw(4, 2), r"context y of shape \(7,\).*got \(6,\)"),
        ((draw(7, 2), draw(7) / 0), draw(4, 2), "finite context y; got 7"),
        ((draw(7, 2), draw(7)), draw(4, 3), r"query x of shape \(m, 2\).*got \(4, 3\)"),
        ((draw(7, 2), draw(7)), draw(4, 2) * math.nan, "finite query x; got 8"),
        ((draw(7, 2), draw(7)), [["a", "b"]], "query x with numbers only"),
        ((draw(3, 7, 2), draw(3, 7)), draw(4, 2), r"query x of shape \(3, m, 2\).*got \(4, 2\)"),
        (draw(7, 2), draw(4, 2), "a pair; got Tensor of length 7"),
    ],
)
def test_bad_data_are_refused(context: Any, query: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"Expected.*{said}"):
        MODEL.predict(context, query)


def test_a_float32_network_answers_float64_data_to_its_own_precision() -> None:
    x, y, x_query = draw(7, 2), draw(7), draw(4, 2, seed=1)
    network = copy.deepcopy(MODEL.transformer).float()
    single = PFN(network, MODEL.card).predict((x, 1e6 + y), x_query)
    assert single.mean.dtype == torch.float64
    assert_same(single, MODEL.predict((x, 1e6 + y), x_query), 1e-3)  # a thousand float32 epsilons


def test_a_pfn_introduces_itself() -> None:
    assert repr(MODEL) == "PFN('tiny', d = 1..3, n = 0..16)"
    assert MODEL.prior is None


def test_added_points_are_seen_in_order_however_they_come() -> None:
    x, y, query = draw(9, 2, seed=1), draw(9, seed=2), draw(4, 2, seed=3)
    fitted = MODEL.condition((x[:5], y[:5]))
    at_once = fitted.extend(x[5:], y[5:])
    in_turn = fitted.extend(x[5:7], y[5:7]).extend(x[7:], y[7:])
    for one, two in zip(parts(at_once.predict(query)), parts(in_turn.predict(query)), strict=True):
        torch.testing.assert_close(one, two, atol=DIGITS, rtol=DIGITS)
    assert (at_once.predict(query).mean - fitted.predict(query).mean).abs().max() > 1e-4
    alone = at_once.predict(query[:1])
    torch.testing.assert_close(alone.mean, at_once.predict(query).mean[:1], atol=DIGITS, rtol=0)


def test_one_context_has_many_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, query = draw(5, 2, seed=1), draw(5, seed=2), draw(3, 4, 2, seed=3)
    added = draw(3, 2, 2, seed=4), draw(3, 2, seed=5)
    fitted = MODEL.condition((x, y))
    together = fitted.extend(*added).predict(query)
    monkeypatch.setattr(pfn.model, "MATRICES", 100)  # one task at a time
    singly = fitted.extend(*added).predict(query)
    for i in range(3):
        one = fitted.extend(added[0][i], added[1][i]).predict(query[i])
        for of_all, alone, apart in zip(parts(together), parts(one), parts(singly), strict=True):
            torch.testing.assert_close(of_all[i], alone, atol=DIGITS, rtol=DIGITS)
            torch.testing.assert_close(of_all, apart, atol=DIGITS, rtol=DIGITS)


def test_gradients_flow_through_added_points() -> None:
    fitted = MODEL.condition((draw(4, 1, seed=1), draw(4, seed=2)))

    def mean(x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        return fitted.extend(x, y).predict(query).mean

    inputs = [draw(2, 1, seed=3), draw(2, seed=4), draw(2, 1, seed=5)]
    assert torch.autograd.gradcheck(mean, [value.requires_grad_() for value in inputs], atol=1e-6)


def test_added_points_that_do_not_fit_are_refused() -> None:
    fitted = MODEL.condition((draw(4, 2), draw(4)))
    with pytest.raises(ValueError, match=r"Expected added x of shape \(k, 2\) or \(b, k, 2\)"):
        fitted.extend(draw(3, 1), draw(3))
    batch = MODEL.condition((draw(2, 4, 2), draw(2, 4)))
    with pytest.raises(ValueError, match=r"shape \(2, k, 2\)"):
        batch.extend(draw(3, 3, 2), draw(3, 3))


def test_added_columns_match_by_name() -> None:
    x, y, query = draw(5, 2, seed=1), draw(5, seed=2), draw(3, 2, seed=3)
    fitted = MODEL.condition((pd.DataFrame(x.numpy(), columns=["a", "b"]), y))
    plain = fitted.extend(x[:2], y[:2]).predict(query)
    turned = pd.DataFrame(x[:2].numpy(), columns=["a", "b"])[["b", "a"]]
    assert torch.equal(fitted.extend(turned, y[:2]).predict(query).mean, plain.mean)


def test_continuations_can_be_continued() -> None:
    x, y, query = draw(5, 2, seed=1), draw(5, seed=2), draw(3, 4, 2, seed=3)
    added, more = (draw(3, 2, 2, seed=4), draw(3, 2, seed=5)), (draw(3, 1, 2, seed=6), draw(3, 1))
    in_turn = MODEL.condition((x, y)).extend(*added).extend(*more).predict(query)
    at_once = MODEL.condition((x, y)).extend(
        torch.cat([added[0], more[0]], 1), torch.cat([added[1], more[1]], 1)
    )
    torch.testing.assert_close(in_turn.mean, at_once.predict(query).mean, atol=DIGITS, rtol=DIGITS)
    latents = at_once.latents()  # the first context's
    assert set(latents) == {latent.name for latent in LATENTS}
    assert all(law.batch_shape[:1] == (3,) for law in latents.values())
