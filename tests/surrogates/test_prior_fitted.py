"""The network as a BoTorch model: marginals, joint draws, fantasies, acquisitions."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
)
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.sampling.get_sampler import get_sampler
from torch import Tensor

import pfn
import surrogates
from surrogates.prior_fitted import PredictiveLogEI, PriorFitted, fit_pfn, trained_for

BOX = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, QUERIES = uniform(14, 2), uniform(5, 2, seed=1)
Y = torch.sin(5 * X[:, :1]) + X[:, 1:].square() + 0.02 * uniform(14, 1, seed=2)


@pytest.fixture(scope="module")
def model() -> PriorFitted:
    fitted: Any = surrogates.fit("pfn", X, Y, model="gp")
    return fitted  # type: ignore[no-any-return]


def test_marginals_are_the_networks(model: PriorFitted) -> None:
    exact = pfn.predict((X, Y), QUERIES, model="gp", bounds=BOX, latent=True)
    posterior = model.posterior(QUERIES.unsqueeze(-2))
    assert posterior.mean.shape == (5, 1, 1) and posterior.mean.dtype == torch.float64
    torch.testing.assert_close(posterior.mean.flatten(), exact.mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(posterior.variance.flatten(), exact.variance, atol=1e-6, rtol=1e-4)
    noisy = model.posterior(QUERIES, observation_noise=True)
    assert (noisy.variance > model.posterior(QUERIES).variance).all()


def test_a_point_has_one_answer_wherever_it_stands(model: PriorFitted) -> None:
    batch = QUERIES.expand(3, 2, 5, 2)
    posterior = model.posterior(batch)
    assert posterior.mean.shape == (3, 2, 5, 1)
    assert (posterior.mean - model.posterior(QUERIES).mean).abs().max() < 1e-6
    sampler = get_sampler(posterior, torch.Size([16]), seed=3)
    pairs = torch.stack([QUERIES[:2], QUERIES[2:4], QUERIES[:2]])
    draws = sampler(model.posterior(pairs))
    assert draws.shape == (16, 3, 2, 1)
    torch.testing.assert_close(draws[:, 0], draws[:, 2], atol=1e-5, rtol=0)
    again = get_sampler(posterior, torch.Size([16]), seed=3)(model.posterior(pairs))
    assert torch.equal(draws, again)


def test_the_network_stays_in_float32(model: PriorFitted) -> None:
    acquisition = LogExpectedImprovement(model, best_f=Y.max())
    acquisition.to(QUERIES)  # as BoTorch does
    assert acquisition(QUERIES.unsqueeze(-2)).dtype == torch.float64
    weights = model._context.pfn.transformer.parameters()
    assert {value.dtype for value in weights} == {torch.float32}


def test_gradients_match_finite_differences(model: PriorFitted) -> None:
    acquisition = PredictiveLogEI(model, best_f=Y.max())
    x = QUERIES[:3].unsqueeze(-2).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(acquisition(x).sum(), x)
    step = 1e-3  # float32 answers: differences over much less would be rounding
    for column in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[column] = step
        with torch.no_grad():
            difference = (acquisition(x + shift) - acquisition(x - shift)) / (2 * step)
        torch.testing.assert_close(gradient[:, 0, column], difference, rtol=0.02, atol=0.05)


def test_expected_improvement_is_of_the_predictive_itself(model: PriorFitted) -> None:
    best = float(Y.max())
    ours = PredictiveLogEI(model, best)(QUERIES.unsqueeze(-2))
    y = torch.linspace(best, best + 12, 200_001, dtype=torch.float64)
    marginals = model.posterior(QUERIES).marginals  # type: ignore[attr-defined]
    density = marginals[:, None].log_prob(y).exp()
    exact = torch.trapezoid((y - best) * density, y).log()
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=0)
    of_moments = LogExpectedImprovement(model, best)(QUERIES.unsqueeze(-2))
    assert (ours - of_moments).abs().max() > 1e-3  # mixtures are not normal


def test_joint_draws_have_the_marginals_and_hang_together(model: PriorFitted) -> None:
    points = torch.tensor([[0.9, 0.5], [0.93, 0.5], [0.1, 0.9]], dtype=torch.float64)
    posterior = model.posterior(points)
    sampler = get_sampler(posterior, torch.Size([1024]), seed=0)
    draws = sampler(posterior).squeeze(-1)
    deviation = posterior.variance.sqrt().squeeze(-1)
    error = (draws.mean(0) - posterior.mean.squeeze(-1)) / deviation
    assert error.abs().max() < 5 / math.sqrt(1024)
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.25, atol=0)
    correlation = torch.corrcoef(draws.T)
    assert correlation[0, 1] > 0.5 > correlation[0, 2].abs()


def test_draws_are_a_function_of_the_seed(model: PriorFitted) -> None:
    draws = model.posterior(QUERIES).rsample(torch.Size([3]))
    assert torch.equal(model.posterior(QUERIES).rsample(torch.Size([3])), draws)
    other: Any = surrogates.fit("pfn", X, Y, model="gp", seed=1)
    assert not torch.equal(other.posterior(QUERIES).rsample(torch.Size([3])), draws)


@pytest.mark.parametrize(("model", "columns"), [("gp", 12), ("gp-1d", 1), ("auto", 12)])
def test_what_a_network_was_trained_for_is_on_its_card(model: str, columns: int) -> None:
    assert trained_for(model) == (columns, 256)
    assert trained_for(pfn.load("gp")) == (12, 256)


def test_conditioning_is_the_networks_buffer(model: PriorFitted) -> None:
    new_x, new_y = uniform(3, 2, seed=5), uniform(3, 1, seed=6)
    fantasy = model.condition_on_observations(new_x, new_y)
    assert fantasy.batch_shape == ()
    fitted = pfn.load("gp").condition((X, Y), bounds=BOX).extend(new_x, new_y)
    exact = fitted.predict(QUERIES, latent=True)
    posterior = fantasy.posterior(QUERIES)
    torch.testing.assert_close(posterior.mean.squeeze(-1), exact.mean, atol=1e-5, rtol=0)
    twice = model.condition_on_observations(new_x[:1], new_y[:1])
    twice = twice.condition_on_observations(new_x[1:], new_y[1:])
    torch.testing.assert_close(twice.posterior(QUERIES).mean, posterior.mean, atol=1e-5, rtol=0)


def test_fantasies_are_a_batch(model: PriorFitted) -> None:
    sampler = get_sampler(model.posterior(QUERIES), torch.Size([4]), seed=0)
    fantasies = model.fantasize(QUERIES[:2].unsqueeze(0).expand(3, 2, 2), sampler)
    assert fantasies.batch_shape == (4, 3)
    posterior = fantasies.posterior(QUERIES)
    assert posterior.mean.shape == (4, 3, 5, 1)
    before = model.posterior(QUERIES[:2]).variance
    assert (fantasies.posterior(QUERIES[:2]).variance < 1.01 * before).all()
    acquisition = PredictiveLogEI(fantasies, best_f=Y.max())
    assert acquisition(QUERIES[:, None, None, None, :]).shape == (5, 4, 3)


@pytest.mark.parametrize("kind", [qLogExpectedImprovement, qLogNoisyExpectedImprovement])
def test_batches_of_points_can_be_optimized(model: PriorFitted, kind: Any) -> None:
    sampler = get_sampler(model.posterior(QUERIES), torch.Size([16]), seed=0)
    first = {"best_f": Y.max()} if kind is qLogExpectedImprovement else {"X_baseline": X[-3:]}
    acquisition = kind(model, **first, sampler=sampler, X_pending=QUERIES[:1])
    found, value = optimize_acqf(
        acquisition, BOX, q=2, num_restarts=2, raw_samples=4, options={"maxiter": 2}
    )
    assert (
        found.shape == (2, 2)
        and bool(value.isfinite())
        and bool(((0 <= found) & (found <= 1)).all())
    )


def test_copies_answer_alike(model: PriorFitted) -> None:
    expected = model.posterior(QUERIES).mean
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.posterior(QUERIES).mean, expected)


def test_transforms_map_in_and_out() -> None:
    raw_x, raw_y = 10 + 5 * X, 1e6 * Y
    plain: Any = surrogates.fit("pfn", X, Y, model="gp")
    scaled: Any = surrogates.fit("pfn", raw_x, raw_y, model="gp", bounds=10 + 5 * BOX)
    query = 10 + 5 * QUERIES
    expected = plain.posterior(QUERIES).mean
    torch.testing.assert_close(scaled.posterior(query).mean, 1e6 * expected, rtol=1e-4, atol=1.0)
    given: Any = surrogates.fit(
        "pfn",
        raw_x,
        raw_y,
        model="gp",
        input_transform=Normalize(2, bounds=10 + 5 * BOX),
        outcome_transform=Standardize(1),
    )
    posterior = given.posterior(query)
    torch.testing.assert_close(posterior.mean, 1e6 * expected, rtol=1e-3, atol=1e3)
    assert posterior.rsample(torch.Size([3])).shape == (3, 5, 1)
    fantasy = given.condition_on_observations(query, 1e6 * expected)
    assert (fantasy.posterior(query).mean - 1e6 * expected).abs().max() < 1e5


def test_known_noise_is_used_where_it_is_one_number() -> None:
    quiet, loud = (fit_pfn(X, Y, torch.full_like(Y, v), model="gp") for v in (1e-4, 0.3))
    assert (loud.posterior(X).mean - Y).abs().mean() > (quiet.posterior(X).mean - Y).abs().mean()
    with pytest.raises(ValueError, match="knows one noise"):
        fit_pfn(X, Y, torch.linspace(0.1, 1, 14).unsqueeze(-1), model="gp")
    with pytest.raises(ValueError, match="observation_noise True or False"):
        quiet.posterior(QUERIES, observation_noise=torch.ones(1))


def test_no_data_give_the_prior() -> None:
    model = fit_pfn(torch.empty(0, 2).double(), torch.empty(0, 1).double(), model="gp")
    posterior = model.posterior(QUERIES)
    assert posterior.mean.abs().max() < 0.5 and (posterior.variance > 0.2).all()


def test_other_outputs_and_dimensions_are_refused(model: PriorFitted) -> None:
    with pytest.raises(ValueError, match=r"output_indices \[0\]"):
        model.posterior(QUERIES, output_indices=[1])
    assert model.subset_output([0]) is model
    with pytest.raises(ValueError, match="at most 12 features"):
        fit_pfn(uniform(5, 13), uniform(5, 1), model="gp")


def test_fantasies_leave_an_outcome_transform_as_it_is() -> None:
    transform = Standardize(1)
    model: Any = surrogates.fit("pfn", X, 500 + Y, model="gp", outcome_transform=transform)
    fantasy = model.condition_on_observations(QUERIES[:1], torch.full((1, 1), 1000.0).double())
    assert (model.posterior(X).mean - 500 - Y).abs().max() < 0.3
    assert (fantasy.posterior(X).mean - 500 - Y).abs().max() < 600
    with pytest.raises(ValueError, match="without an outcome_transform"):
        PredictiveLogEI(model, 1.0)


def test_nothing_can_be_asked_and_fantasised(model: PriorFitted) -> None:
    nothing = QUERIES[:0]
    assert model.posterior(nothing).mean.shape == (0, 1)
    sampler = get_sampler(model.posterior(QUERIES), torch.Size([4]), seed=0)
    fantasies = model.fantasize(QUERIES[:1], sampler)
    assert fantasies.posterior(nothing).mean.shape == (4, 0, 1)
