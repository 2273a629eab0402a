"""Draws of functions as a BoTorch model: moments, samplers, conditioning."""

import copy
import itertools
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    PosteriorMean,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qSimpleRegret,
)
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models import ModelList, SingleTaskGP
from botorch.models.transforms.input import Normalize
from botorch.models.transforms.outcome import Standardize
from botorch.optim import optimize_acqf
from botorch.posteriors import PosteriorList
from botorch.sampling.get_sampler import get_sampler
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from surrogates.draws import DrawsModel, DrawsPosterior, FewDraws
from surrogates.observations import observe

BOUNDS = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


@dataclass(frozen=True)
class Planes:
    """f(x) = a + b . x, one plane per draw."""

    slopes: Tensor  # (draw, 1 + d), offsets first

    def __call__(self, X: Tensor) -> Tensor:
        values = self.slopes[:, 0] + X @ self.slopes[:, 1:].T
        return values.movedim(-1, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, 2, generator=generator(seed), dtype=torch.float64)


def planes(draws: int = 32, noise: float = 0.5, d: int = 2, **options: Any) -> DrawsModel:
    """Standard normal planes; outcomes have mean 0 and standard deviation 1 already."""
    slopes = torch.randn(draws, 1 + d, generator=generator(3), dtype=torch.float64)
    X = points(2)[:, :d]
    Y = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) / math.sqrt(2)
    seen = observe(X, Y, options.get("input_transform"), options.get("outcome_transform"))
    variances = torch.full((draws,), noise, dtype=torch.float64)
    return DrawsModel(X, Y, seen, Planes(slopes), variances, seed=0, **options)


def test_moments_are_those_of_the_mixture() -> None:
    model = planes()
    X = points(3, 2)
    values = model.functions(X)
    posterior = model.posterior(X)
    torch.testing.assert_close(posterior.mean, values.mean(0).unsqueeze(-1))
    variance = values.var(0, unbiased=False).unsqueeze(-1)
    torch.testing.assert_close(posterior.variance, variance)
    noisy = model.posterior(X, observation_noise=True)
    torch.testing.assert_close(noisy.variance, variance + 0.5)
    given = model.posterior(X, observation_noise=torch.full((3, 2, 1), 0.1).double())
    torch.testing.assert_close(given.variance, variance + 0.1)


def test_density_is_that_of_the_mixture() -> None:
    model = planes(draws=9, noise=2.0).condition_on_observations(
        points(1, seed=1), torch.ones(1, 1).double()
    )
    X, y = points(4, seed=2), torch.randn(6, 4, 1, generator=generator()).double()
    mixture = Categorical(logits=model.log_weights)
    each = Normal(model.functions(X).T, math.sqrt(2.0))
    expected = MixtureSameFamily(mixture, each).log_prob(y.squeeze(-1)).unsqueeze(-1)
    noisy = model.posterior(X, observation_noise=True)
    torch.testing.assert_close(noisy.log_density(y), expected)
    torch.testing.assert_close(noisy.density(y), expected.exp())
    with pytest.raises(ValueError, match="observation_noise=True"):
        model.posterior(X).log_density(y)


def test_shapes_with_any_batch() -> None:
    model = planes()
    fantasy = model.condition_on_observations(points(3, 1), torch.zeros(3, 1, 1).double())
    for batch, q, noise in itertools.product([(), (3,), (2, 1, 3)], [1, 4], [False, True]):
        X = points(*batch, q)
        for posterior, expected in (
            (model.posterior(X, observation_noise=noise), batch),
            (fantasy.posterior(X, observation_noise=noise), torch.broadcast_shapes(batch, (3,))),
        ):
            assert posterior.mean.shape == posterior.variance.shape == (*expected, q, 1)
            assert posterior.mean.dtype == torch.float64
            sample_shape = torch.Size([6, 2])
            samples = get_sampler(posterior, sample_shape, seed=0)(posterior)
            assert samples.shape == (6, 2, *expected, q, 1)
            assert posterior.rsample(sample_shape).shape == (6, 2, *expected, q, 1)
            assert posterior.rsample().shape == (*expected, q, 1)


def test_a_multiple_of_the_draws_has_the_mean_of_the_mixture() -> None:
    model = planes(draws=32)
    X = points(5, 1)
    sampler = get_sampler(model.posterior(X), torch.Size([64]), seed=5)
    regret = qSimpleRegret(model, sampler=sampler)(X)
    torch.testing.assert_close(regret, PosteriorMean(model)(X), atol=1e-12, rtol=0)


def test_samples_are_whole_draws() -> None:
    model = planes(draws=8)
    X = points(3, 5)  # three t-batches: the same draw in all of them
    posterior = model.posterior(X)
    samples = get_sampler(posterior, torch.Size([16]), seed=0)(posterior).squeeze(-1)
    distance = (samples.unsqueeze(1) - model.functions(X)).abs().amax((-1, -2))
    assert bool((distance.min(1).values < 1e-12).all())


def test_samples_follow_the_weights_and_the_noise() -> None:
    model = planes(draws=16)
    heavy = model.condition_on_observations(points(1, seed=1), torch.full((1, 1), 0.5).double())
    X = points(2, seed=2)
    for posterior in (heavy.posterior(X), heavy.posterior(X, observation_noise=True)):
        samples = get_sampler(posterior, torch.Size([4096]), seed=0)(posterior)
        error = (posterior.variance / 4096).sqrt()
        assert bool(((samples.mean(0) - posterior.mean).abs() < 4.5 * error).all())
        torch.testing.assert_close(samples.var(0), posterior.variance, atol=0, rtol=0.1)
    noise = samples.squeeze(-1) - posterior.mean.squeeze(-1)
    signal = posterior.variance.squeeze(-1) - 0.5
    share = torch.corrcoef(noise.T)[0, 1] * posterior.variance.prod().sqrt() / signal.prod().sqrt()
    assert abs(float(share)) < 1.1  # noise of two points is independent, functions are not


def test_draws_of_random_numbers_are_seeded_and_leave_the_global_ones() -> None:
    model = planes()
    state = torch.get_rng_state()
    first, second = (model.posterior(points(3)).rsample(torch.Size([4])) for _ in range(2))
    assert torch.equal(first, second)
    sampler = get_sampler(model.posterior(points(3)), torch.Size([4]), seed=1)
    sampler(model.posterior(points(3), observation_noise=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_answers_do_not_depend_on_the_rest_of_a_batch() -> None:
    model = planes()
    acquisition = qLogExpectedImprovement(model, best_f=0.5)
    X = points(6, 2)
    together = acquisition(X)
    torch.testing.assert_close(acquisition(X[4:5]), together[4:5], atol=1e-12, rtol=0)
    torch.testing.assert_close(acquisition(X.flip(0)), together.flip(0), atol=1e-12, rtol=0)


def test_gradients_are_finite_differences() -> None:
    model = planes().condition_on_observations(points(1, seed=4), torch.ones(1, 1).double())

    def answer(X: Tensor) -> Tensor:
        posterior = model.posterior(X)
        sampler = get_sampler(posterior, torch.Size([4]), seed=0)
        return torch.cat([posterior.mean, posterior.variance, sampler(posterior).mean(0)], -1)

    assert torch.autograd.gradcheck(answer, points(1, 2).requires_grad_())


def test_weights_of_fantasies_have_gradients() -> None:
    model = planes()

    def answer(X: Tensor, Y: Tensor) -> Tensor:
        return model.condition_on_observations(X, Y).posterior(points(3)).mean

    X, Y = points(2, 1), torch.tensor([[[0.3]], [[-0.2]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(answer, (X.requires_grad_(), Y.requires_grad_()))


def test_conditioning_is_bayes_rule() -> None:
    model = planes(draws=20_000)
    X, Y = points(3, seed=1), torch.tensor([[0.3], [0.8], [-0.2]], dtype=torch.float64)
    conditioned = model.condition_on_observations(X, Y)
    assert conditioned.train_X.shape == (5, 2) and conditioned.train_Y.shape == (5, 1)
    design, query = torch.cat([torch.ones(3, 1), X], 1), points(4, seed=2)
    precision = torch.eye(3).double() + design.T @ design / 0.5
    mean = torch.linalg.solve(precision, design.T @ Y / 0.5)
    asked = torch.cat([torch.ones(4, 1), query], 1)
    variance = (asked @ torch.linalg.solve(precision, asked.T)).diagonal().unsqueeze(-1)
    answer = conditioned.posterior(query)
    error = 5 / math.sqrt(float(conditioned.effective_draws))  # standard errors
    assert float(((answer.mean - asked @ mean) / variance.sqrt()).abs().max()) < error
    torch.testing.assert_close(answer.variance, variance, atol=0, rtol=2 * error)


def test_conditioning_at_once_or_in_turn_is_the_same() -> None:
    model = planes(noise=2.0)
    X, Y = points(3, 2), torch.randn(4, 3, 2, 1, generator=generator(), dtype=torch.float64)
    at_once = model.condition_on_observations(X, Y)
    in_turn = model.condition_on_observations(X[..., :1, :], Y[..., :1, :])
    in_turn = in_turn.condition_on_observations(X[..., 1:, :], Y[..., 1:, :])
    assert at_once.batch_shape == (4, 3) and at_once.log_weights.shape == (4, 3, 32)
    torch.testing.assert_close(at_once.log_weights, in_turn.log_weights)
    known = model.condition_on_observations(X, Y, noise=torch.full((3, 2, 1), 2.0).double())
    torch.testing.assert_close(at_once.log_weights, known.log_weights)


def test_contradicting_observations_are_believed_in_part() -> None:
    model = planes(noise=1e-4)
    with pytest.warns(FewDraws, match="effective draws of 32"):
        conditioned = model.condition_on_observations(points(4), torch.full((4, 1), 9.0).double())
    assert float(conditioned.effective_draws) == pytest.approx(4, rel=1e-6)
    assert float(model.effective_draws) == pytest.approx(32)


def test_fantasies_are_draws_of_observations() -> None:
    model = planes(draws=256)
    X = points(2)
    sampler = get_sampler(model.posterior(X), torch.Size([8]), seed=0)
    fantasy = model.fantasize(X, sampler)
    assert fantasy.batch_shape == (8,)
    after = fantasy.posterior(X).variance.mean(0)
    assert bool((after < model.posterior(X).variance).all())


def test_acquisitions_climb_to_the_corner() -> None:
    slopes = torch.tensor([0.0, 3.0, 3.0], dtype=torch.float64) + 0.3 * torch.randn(
        64, 3, generator=generator(), dtype=torch.float64
    )
    model = planes(draws=64)
    model.functions = Planes(slopes)
    for acquisition, q in (
        (LogExpectedImprovement(model, best_f=3.0), 1),
        (qLogExpectedImprovement(model, best_f=3.0), 2),
        (qLogExpectedImprovement(model, best_f=3.0, X_pending=points(1)), 1),
        (qKnowledgeGradient(model, num_fantasies=4), 1),
    ):
        torch.manual_seed(0)
        X, value = optimize_acqf(acquisition, BOUNDS, q=q, num_restarts=2, raw_samples=16)
        assert bool(value.isfinite().all())
        if not isinstance(acquisition, qKnowledgeGradient):
            assert float(X.sum(-1).max()) > 1.99


def test_hypervolume_is_searched_beside_a_gp() -> None:
    X = points(8)
    models = ModelList(planes(), SingleTaskGP(X, X[:, :1]))
    assert isinstance(models.posterior(X), PosteriorList)
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        models, ref_point=[-3.0, -3.0], X_baseline=X, prune_baseline=True, cache_root=False
    )
    few = {"maxiter": 5}
    X_new, value = optimize_acqf(acquisition, BOUNDS, 2, num_restarts=1, raw_samples=8, options=few)
    assert X_new.shape == (2, 2) and bool(value.isfinite())


def test_base_samples_are_handed_on() -> None:
    model = planes()
    few, many = (model.posterior(points(q), observation_noise=True) for q in (2, 3))
    old, new = (get_sampler(few, torch.Size([4]), seed=seed) for seed in (0, 1))
    old(few)
    new._update_base_samples(many, old)
    assert new.base_samples.shape == (4, 1 + 3)
    assert torch.equal(new.base_samples[..., :3], old.base_samples)


def test_units_and_transforms_are_undone() -> None:
    X = points(2) * 10
    Y = torch.tensor([[5e6], [7e6]], dtype=torch.float64)
    bounds = torch.tensor([[0.0, 0.0], [10.0, 10.0]], dtype=torch.float64)
    answers = []
    for outcome_transform in (None, Standardize(1)):
        transforms = {"input_transform": Normalize(2, bounds=bounds)}
        seen = observe(X, Y, transforms["input_transform"], outcome_transform)
        model = DrawsModel(
            X,
            Y,
            seen,
            planes().functions,
            torch.full((32,), 0.5, dtype=torch.float64),
            seed=0,
            outcome_transform=outcome_transform,
            **transforms,
        )
        answers.append(model.posterior(X, observation_noise=True))
        conditioned = model.condition_on_observations(X, Y)
        answers.append(conditioned.posterior(X, observation_noise=True))
    unit = planes().posterior(X / 10, observation_noise=True)
    deviation = math.sqrt(2) * 1e6
    torch.testing.assert_close(answers[0].mean, 6e6 + deviation * unit.mean)
    torch.testing.assert_close(answers[0].variance, deviation**2 * unit.variance)
    for plain, transformed in ((0, 2), (1, 3)):
        torch.testing.assert_close(answers[plain].mean, answers[transformed].mean)
        torch.testing.assert_close(answers[plain].variance, answers[transformed].variance)


def test_copies_answer_alike() -> None:
    model = planes().condition_on_observations(points(1), torch.ones(1, 1).double())
    expected = model.posterior(points(3))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.posterior(points(3)).mean, expected.mean)
        assert torch.equal(
            twin.posterior(points(3)).rsample(), model.posterior(points(3)).rsample()
        )


def test_single_precision_inputs_keep_the_model_double() -> None:
    model = planes()
    value = LogExpectedImprovement(model, best_f=0.0)(points(3, 1).float())
    torch.testing.assert_close(
        value.double(),
        LogExpectedImprovement(model, best_f=0.0)(points(3, 1)),
        atol=1e-5,
        rtol=0,
    )


def test_r_hat_tells_chains_apart() -> None:
    model = planes(draws=64)
    model._chains = 2
    assert float(model.r_hat(points(4)).max()) < 1.2
    model.functions.slopes[:32] += 3.0
    assert float(model.r_hat(points(4)).min()) > 1.5


def test_a_posterior_of_constants() -> None:
    values = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    posterior = DrawsPosterior(values, weights.log(), None, seed=0)
    base = torch.tensor([[0.1], [0.499], [0.5001], [0.74], [0.76], [0.999]], dtype=torch.float64)
    samples = posterior.rsample_from_base_samples(torch.Size([6]), base)
    assert samples.flatten().tolist() == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
