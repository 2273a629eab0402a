"""What holds for every surrogate: the seams that BoTorch's acquisitions and loops rely on."""

import copy
import math
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.sampling.get_sampler import get_sampler
from torch import Tensor

import surrogates

SLOW = {"hmc-bnn", "sghmc-bnn"}
NAMES = [name for name in surrogates.available() if name not in ("random", "sobol")]
OPTIONS: dict[str, dict[str, Any]] = {"pfn": {"model": "gp"}}
BOX = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, QUERIES = uniform(12, 2), uniform(4, 2, seed=1)
Y = torch.sin(4 * X[:, :1]) + X[:, 1:]


@cache
def fitted(name: str) -> Model:
    return surrogates.fit(name, X, Y, bounds=BOX, seed=0, **OPTIONS.get(name, {}))


@pytest.fixture(params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NAMES])
def model(request: pytest.FixtureRequest) -> Model:
    return fitted(request.param)


def test_posteriors_have_the_shape_of_the_batch(model: Model) -> None:
    assert model.num_outputs == 1 and model.batch_shape == ()
    for shape in ((4,), (3, 4), (2, 1, 3, 4)):
        posterior = model.posterior(QUERIES.expand(*shape, 2))
        assert posterior.mean.shape == posterior.variance.shape == (*shape, 1)
        assert posterior.mean.dtype == torch.float64 and bool((posterior.variance > 0).all())
        draws = posterior.rsample(torch.Size([5]))
        assert draws.shape == (5, *shape, 1) and bool(draws.isfinite().all())


def test_functions_are_learned(model: Model) -> None:
    truth = torch.sin(4 * QUERIES[:, :1]) + QUERIES[:, 1:]
    posterior = model.posterior(QUERIES)
    assert (posterior.mean - truth).abs().max() < 0.6
    assert ((posterior.mean - truth).abs() < 6 * posterior.variance.sqrt() + 0.15).all()
    noisy = model.posterior(QUERIES, observation_noise=True)
    assert (noisy.variance > posterior.variance).all()


def test_the_mean_is_differentiable(model: Model) -> None:
    x = QUERIES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.posterior(x).mean.sum(), x)
    step = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (model.posterior(x + s).mean for s in (step, -step))
    difference = (ahead - behind).squeeze(-1) / 2e-3
    torch.testing.assert_close(gradient[:, 0], difference, rtol=0.02, atol=0.02)


def test_draws_are_of_the_point_not_of_its_place(model: Model) -> None:
    pairs = torch.stack([QUERIES[:2], QUERIES[2:], QUERIES[:2]])
    posterior = model.posterior(pairs)
    sampler = get_sampler(posterior, torch.Size([64]), seed=1)
    draws = sampler(posterior)
    torch.testing.assert_close(draws[:, 0], draws[:, 2], atol=1e-5, rtol=1e-5)
    again = get_sampler(posterior, torch.Size([64]), seed=1)(model.posterior(pairs))
    torch.testing.assert_close(draws, again)


def test_draws_have_the_moments(model: Model) -> None:
    posterior = model.posterior(QUERIES)
    draws = get_sampler(posterior, torch.Size([512]), seed=1)(posterior)
    deviation = posterior.variance.sqrt()
    assert ((draws.mean(0) - posterior.mean).abs() < 5 / math.sqrt(512) * deviation + 1e-9).all()
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.3, atol=1e-9)


def test_improvement_is_optimized(model: Model) -> None:
    torch.manual_seed(0)
    acquisition = LogExpectedImprovement(model, best_f=Y.max())
    found, value = optimize_acqf(
        acquisition, BOX, q=1, num_restarts=2, raw_samples=16, options={"maxiter": 5}
    )
    assert found.shape == (1, 2) and bool(value.isfinite())
    posterior = model.posterior(QUERIES)
    sampler = get_sampler(posterior, torch.Size([32]), seed=0)
    pair = qLogExpectedImprovement(model, Y.max(), sampler=sampler, X_pending=QUERIES[:1])
    assert bool(pair(QUERIES[1:3]).isfinite().all())


def test_several_objectives_are_optimized(model: Model, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["model"]
    both = torch.cat([Y, -Y], -1)
    joint = surrogates.fit(name, X, both, bounds=BOX, **OPTIONS.get(name, {}))
    assert joint.num_outputs == 2
    sampler = get_sampler(joint.posterior(QUERIES), torch.Size([16]), seed=0)
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        joint, ref_point=[-1.0, -3.0], X_baseline=X[:4], sampler=sampler
    )
    assert bool(acquisition(QUERIES[:1]).isfinite().all())
    one = joint.subset_output([1])
    assert one.posterior(QUERIES).mean.shape == (4, 1)


@pytest.mark.filterwarnings("ignore:New observations leave")
def test_fantasies_know_more(model: Model) -> None:
    sampler = get_sampler(model.posterior(QUERIES), torch.Size([4]), seed=0)
    fantasies = model.fantasize(QUERIES[:1], sampler)
    posterior = fantasies.posterior(QUERIES[:1])
    assert posterior.mean.shape == (4, 1, 1)
    before = model.posterior(QUERIES[:1]).variance
    assert bool(posterior.variance.mean() < 1.05 * before)


@pytest.mark.filterwarnings("ignore:New observations leave")  # few draws, and told so
def test_conditioning_moves_towards_the_data(model: Model) -> None:
    posterior = model.posterior(QUERIES[:1])
    new = posterior.mean + 1.5 * posterior.variance.sqrt()
    after = model.condition_on_observations(QUERIES[:1], new.detach()).posterior(QUERIES[:1])
    assert bool(after.mean > posterior.mean)


@pytest.mark.filterwarnings("ignore:New observations leave")
def test_conditioning_needs_no_prediction_before() -> None:
    fresh = surrogates.fit("gp", X, Y, bounds=BOX)
    at_once = fresh.condition_on_observations(QUERIES[:1], Y[:1])
    fresh = surrogates.fit("gp", X, Y, bounds=BOX)
    fresh.posterior(QUERIES)
    later = fresh.condition_on_observations(QUERIES[:1], Y[:1])
    torch.testing.assert_close(at_once.posterior(QUERIES).mean, later.posterior(QUERIES).mean)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="kernal"):
        surrogates.fit("gp", X, Y, bounds=BOX, kernal="rbf")


def test_copies_answer_alike(model: Model) -> None:
    expected = model.posterior(QUERIES).mean
    copied = copy.deepcopy(model).posterior(QUERIES).mean
    torch.testing.assert_close(copied, expected)
    pickled = pickle.loads(pickle.dumps(model)).posterior(QUERIES).mean
    torch.testing.assert_close(pickled, expected)


def test_fits_repeat_and_leave_the_global_state_alone(
    model: Model, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["model"]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    again = surrogates.fit(name, X, Y, bounds=BOX, seed=0, **OPTIONS.get(name, {}))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(again.posterior(QUERIES).mean, model.posterior(QUERIES).mean)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_answers_are_in_the_units_of_y(
    model: Model, scale: float, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["model"]
    scaled = surrogates.fit(name, X, 10 + scale * Y, bounds=BOX, seed=0, **OPTIONS.get(name, {}))
    answer = (scaled.posterior(QUERIES).mean - 10) / scale
    torch.testing.assert_close(answer, model.posterior(QUERIES).mean, rtol=0, atol=0.1)
