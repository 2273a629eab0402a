"""Network surrogates: BoTorch's seams, exactness where it is known, samplers against each other."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models import ModelList
from botorch.models.transforms.input import Normalize
from botorch.optim import optimize_acqf
from botorch.sampling.get_sampler import get_sampler
from torch import Tensor
from torch.distributions import InverseGamma

from priors import BNN, GaussianProcess
from priors.inputs import standardise_inputs
from surrogates.bayesian_networks import (
    Tangent,
    TangentKernel,
    evidence_tuned,
    fit_ensemble,
    fit_hmc_bnn,
    fit_laplace_bnn,
    fit_sghmc_bnn,
    hierarchical,
    sample_sghmc,
)
from surrogates.draws import DrawsModel, FewDraws
from surrogates.gaussian_processes import fit_gp

BRIEF: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "hmc": (fit_hmc_bnn, {"prior": hierarchical(10, 1), "warmup": 60, "draws": 64}),
    "sghmc": (fit_sghmc_bnn, {"width": 20, "depth": 1, "burn_in": 600, "thinning": 30}),
    "ensemble": (fit_ensemble, {"steps": 150}),
    "laplace": (fit_laplace_bnn, {"width": 20, "starts": 1, "rounds": 3}),
}
BOUNDS = torch.tensor([[-1.0, 0.0], [3.0, 0.5]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_inputs(*shape: int, seed: int = 0) -> Tensor:
    unit = torch.rand(*shape, 2, generator=generator(seed), dtype=torch.float64)
    return BOUNDS[0] + unit * (BOUNDS[1] - BOUNDS[0])


def bowl(X: Tensor) -> Tensor:
    """A maximum of 1 at (1, 0.25), the middle of the box."""
    unit = (X - BOUNDS[0]) / (BOUNDS[1] - BOUNDS[0])
    return 1 - 4 * (unit - 0.5).square().sum(-1, keepdim=True)


def fit(name: str, X: Tensor, Y: Tensor, **options: Any) -> Any:
    function, brief = BRIEF[name]
    return function(X, Y, input_transform=Normalize(2, bounds=BOUNDS), **(brief | options))


def observations(n: int = 32) -> tuple[Tensor, Tensor]:
    X = draw_inputs(n)
    return X, bowl(X) + 0.05 * torch.randn(n, 1, generator=generator(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: fit(name, *observations()) for name in BRIEF}


@pytest.fixture(params=BRIEF)
def model(models: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return models[request.param]


@pytest.fixture(autouse=True)
def few_draws_are_no_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FewDraws)
        yield


def test_posterior_has_any_batch_and_is_in_double_precision(model: Any) -> None:
    for shape in [(1,), (4,), (3, 4), (2, 1, 3, 2)]:
        posterior = model.posterior(draw_inputs(*shape))
        assert posterior.mean.shape == posterior.variance.shape == (*shape, 1)
        assert posterior.mean.dtype == torch.float64
        samples = get_sampler(posterior, torch.Size([5]), seed=0)(posterior)
        assert samples.shape == (5, *shape, 1)
    noisy = model.posterior(draw_inputs(*shape), observation_noise=True)
    assert bool((noisy.variance > posterior.variance).all())
    assert model.num_outputs == 1 and model.batch_shape == torch.Size()


def test_gradients_are_finite_differences(model: Any) -> None:
    def answer(X: Tensor) -> Tensor:
        posterior = model.posterior(X)
        samples = get_sampler(posterior, torch.Size([4]), seed=0)(posterior)
        return torch.cat([posterior.mean, posterior.variance, samples.mean(0)], -1)

    X = draw_inputs(1, 2, seed=7).requires_grad_()
    assert torch.autograd.gradcheck(answer, X, atol=1e-5, rtol=1e-4)


def test_answers_do_not_depend_on_the_rest_of_a_batch(model: Any) -> None:
    X = draw_inputs(6, 1, seed=8)
    sampler = get_sampler(model.posterior(X[:1]), torch.Size([64]), seed=3)
    acquisition = qLogExpectedImprovement(model, best_f=0.5, sampler=sampler)
    together = acquisition(X)
    torch.testing.assert_close(acquisition(X[4:5]), together[4:5], atol=1e-9, rtol=0)
    torch.testing.assert_close(acquisition(X.flip(0)), together.flip(0), atol=1e-9, rtol=0)


def test_draws_at_close_points_are_close(model: Any) -> None:
    X = torch.tensor([[0.3, 0.1], [0.3001, 0.1]], dtype=torch.float64)
    posterior = model.posterior(X)
    draws = get_sampler(posterior, torch.Size([256]), seed=0)(posterior).squeeze(-1)
    assert float(torch.corrcoef(draws.detach().T)[0, 1]) > 0.99


def test_acquisitions_find_the_maximum(model: Any) -> None:
    pending = draw_inputs(2, seed=3)
    for acquisition, q in (
        (LogExpectedImprovement(model, best_f=0.9), 1),
        (qLogExpectedImprovement(model, best_f=0.9, X_pending=pending), 2),
    ):
        torch.manual_seed(0)
        X, value = optimize_acqf(
            acquisition, BOUNDS, q=q, num_restarts=2, raw_samples=32, options={"maxiter": 30}
        )
        assert bool(value.isfinite().all())
        assert float(bowl(X).max()) > 0.7  # of at most 1


def test_hypervolume_is_searched_beside_another_model(model: Any) -> None:
    X = draw_inputs(8)
    other = fit_gp(X, X[:, :1], input_transform=Normalize(2, bounds=BOUNDS))
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        ModelList(model, other),
        ref_point=[0.0, 0.0],
        X_baseline=X,
        prune_baseline=True,
        cache_root=False,
    )
    X_new, value = optimize_acqf(
        acquisition, BOUNDS, q=2, num_restarts=1, raw_samples=8, options={"maxiter": 10}
    )
    assert X_new.shape == (2, 2) and bool(value.isfinite())


def test_fantasies_are_batches_of_models(model: Any) -> None:
    X = draw_inputs(2, seed=4)
    posterior = model.posterior(X)
    fantasy = model.fantasize(X, get_sampler(posterior, torch.Size([3]), seed=0))
    assert fantasy.batch_shape == (3,)
    assert fantasy.posterior(draw_inputs(4, 1, 1)).mean.shape == (4, 3, 1, 1)
    after = fantasy.posterior(X).variance.mean(0)
    assert bool((after < 1.2 * posterior.variance).all())


def test_copies_answer_alike(model: Any) -> None:
    X = draw_inputs(4)
    expected = model.posterior(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.posterior(X).mean, expected.mean)
        assert torch.equal(twin.posterior(X).variance, expected.variance)


@pytest.mark.parametrize("name", BRIEF)
def test_fits_repeat_and_leave_the_global_generator_alone(
    name: str, models: dict[str, Any]
) -> None:
    state = torch.get_rng_state()
    again = fit(name, *observations())
    assert torch.equal(torch.get_rng_state(), state)
    query = draw_inputs(3, seed=5)
    assert torch.equal(again.posterior(query).mean, models[name].posterior(query).mean)


@pytest.mark.parametrize("name", BRIEF)
@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, -3e6)])
def test_units_of_outcomes_do_not_matter(
    name: str, scale: float, shift: float, models: dict[str, Any]
) -> None:
    if name == "laplace" and scale < 1:
        scale = 1e-2  # GPyTorch takes variances below 1e-10 for errors of rounding
    X, Y = observations()
    expected = models[name].posterior(X)
    answer = fit(name, X, shift + scale * Y).posterior(X)
    # rounding of the data is 1e-10; chains and optimisers grow it, to another draw of theirs
    error = ((answer.mean - shift) / scale - expected.mean).abs() / (
        expected.variance.sqrt() + 0.05
    )
    assert float(error.max()) < (1.0 if name != "hmc" else 2.0)
    ratio = answer.variance.sqrt() / scale / expected.variance.sqrt()
    assert 0.3 < float(ratio.min()) and float(ratio.max()) < 3.0


def test_fits_are_calibrated_on_a_smooth_function(model: Any) -> None:
    X = draw_inputs(200, 1, seed=9)
    posterior = model.posterior(X, observation_noise=True)
    error = (bowl(X) - posterior.mean).detach()
    assert float(error.square().mean().sqrt()) < 0.6 * float(bowl(X).std())  # by brief chains
    inside = (error.abs() < 2 * posterior.variance.detach().sqrt()).double().mean()
    assert float(inside) > 0.6


@pytest.mark.parametrize(
    "name",
    [pytest.param("hmc", marks=pytest.mark.slow), "sghmc", "ensemble", "laplace"],  # it compiles
)
def test_few_and_equal_observations_get_an_answer(name: str) -> None:
    X = draw_inputs(3)
    for n, Y in ((1, bowl(X)), (3, torch.full((3, 1), 3.0, dtype=torch.float64))):
        posterior = fit(name, X[:n], Y[:n]).posterior(X)
        assert bool((posterior.mean.isfinite() & (posterior.variance > 0)).all())
    with pytest.raises(ValueError, match="at least one observation"):
        fit(name, X[:0], bowl(X)[:0])


def test_known_noise_is_refused_or_respected() -> None:
    X, Y = observations()
    Yvar = torch.full_like(Y, 1e-2)
    for name in ("hmc", "sghmc", "ensemble"):
        with pytest.raises(ValueError, match='"laplace-bnn"'):
            fit(name, X, Y, Yvar=Yvar)
    Y[0] += 2.0
    sure = fit("laplace", X, Y, Yvar=Yvar).posterior(X[:1]).mean
    Yvar[0] = 25.0
    unsure = fit("laplace", X, Y, Yvar=Yvar).posterior(X[:1]).mean
    assert float(unsure) < float(sure) - 0.3


def test_tangent_is_the_gradient_of_the_network() -> None:
    prior = BNN(7, 2)
    drawn = prior.draw_parameters(1, 3, generator=generator())
    x = torch.rand(4, 3, generator=generator(), dtype=torch.float64)
    raw = tuple(w[0].clone().requires_grad_() for w in drawn.weights)
    spread = torch.rand(2, 3, generator=generator(2), dtype=torch.float64)
    tangent = Tangent(tuple(w.detach() for w in raw), spread[0], spread[1])

    def network(*weights: Tensor) -> Tensor:
        hidden = standardise_inputs(x)
        for index, w in enumerate(weights):
            hidden = w[0] + (hidden.tanh() if index else hidden) @ w[1:]
        return hidden.squeeze(-1)

    jacobians = torch.autograd.functional.jacobian(network, raw)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    shift = network(*raw)
    for jacobian, w, weight, bias in zip(jacobians, raw, spread[0], spread[1], strict=True):
        scale = torch.full((len(w), 1), float(weight) / (len(w) - 1), dtype=torch.float64)
        scale[0] = bias
        expected += (jacobian * scale).flatten(1) @ jacobian.flatten(1).T
        shift = shift - (jacobian * w).sum((1, 2))
    kernel = TangentKernel()
    kernel.tangent = tangent
    torch.testing.assert_close(kernel(x).to_dense(), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(kernel(x, diag=True), expected.diagonal(), atol=1e-12, rtol=0)
    torch.testing.assert_close(tangent.shift(x), shift.detach(), atol=1e-12, rtol=0)


def test_laplace_mean_at_the_mode_is_the_network(models: dict[str, Any]) -> None:
    model = models["laplace"]
    X = draw_inputs(5, seed=6)
    tangent = model.covar_module.tangent
    f = tangent.layers(model.transform_inputs(X))[-1][1]
    units = model.outcome_transform
    expected = units.means + units.stdvs * f
    # L-BFGS stops a little before the mode
    torch.testing.assert_close(model.posterior(X).mean, expected, atol=0.03, rtol=0)


def test_laplace_conditioning_is_exact(models: dict[str, Any]) -> None:
    model = models["laplace"]
    X, query = draw_inputs(3, seed=4), draw_inputs(4, seed=5)
    Y = bowl(X)
    joint = model.posterior(torch.cat([X, query])).distribution
    K, noise = joint.covariance_matrix, model.likelihood.noise * model.outcome_transform.stdvs**2
    gain = torch.linalg.solve(K[:3, :3] + noise * torch.eye(3), K[:3, 3:]).mT
    expected = joint.mean[3:] + gain @ (Y.squeeze(-1) - joint.mean[:3])
    answer = model.condition_on_observations(X, Y).posterior(query)
    torch.testing.assert_close(answer.mean.squeeze(-1), expected, atol=1e-6, rtol=0)


def test_sghmc_samples_a_known_density() -> None:
    """A normal with standard deviations from 0.03 to 1, whose curvature masses have to learn."""
    deviation = torch.logspace(-1.5, 0, 6, dtype=torch.float64)
    draws = sample_sghmc(
        lambda position: (position - 2.0) / deviation.square(),
        torch.zeros(16, 6, dtype=torch.float64),
        burn_in=1000,
        draws=50,
        thinning=50,
        step=0.03,
        friction=0.1,
        generator=generator(),
    )
    standardised = (draws - 2.0) / deviation
    count = 16 * 50 / 4  # effective draws, at least
    assert float(standardised.mean((0, 1)).abs().max()) < 4 / math.sqrt(count)
    spread = standardised.std((0, 1))
    assert 0.75 < float(spread.min()) and float(spread.max()) < 1.25


@pytest.mark.slow
def test_readout_draws_have_the_moments_of_the_reference() -> None:
    """NUTS with the readout drawn, against the same prior's posterior with it integrated out."""
    x = torch.rand(8, 1, generator=generator(), dtype=torch.float64)
    y = (4 * x).sin()
    prior = BNN(10, 1, weight_variance=2.0, bias_variance=1.0, noise=0.05)
    model = fit_hmc_bnn(x, y, prior=prior, draws=1000)
    query = torch.linspace(0, 1, 5, dtype=torch.float64).unsqueeze(-1)
    standardised = ((y - y.mean()) / y.std()).squeeze(-1)
    expected = prior.posterior((x, standardised), query, latent=True)
    answer = model.posterior(query)
    mean = (answer.mean.squeeze(-1) - y.mean()) / y.std()
    error = (mean - expected.mean).abs() / expected.variance.sqrt()
    assert float(error.max()) < 0.2  # 5 standard errors of 600 effective draws
    ratio = answer.variance.squeeze(-1) / y.std().square() / expected.variance
    assert 0.75 < float(ratio.min()) and float(ratio.max()) < 1.33
    assert float(model.r_hat(query).max()) < 1.1


@pytest.mark.slow
def test_matched_networks_take_their_variances_from_the_process() -> None:
    X, Y = observations(6)
    smooth = GaussianProcess(lengthscale=1.0, outputscale=1.0)
    prior = BNN(10, 1, noise=0.05)
    model = fit("hmc", X, Y, prior=prior, match_to=smooth, warmup=30, draws=16)
    assert isinstance(model, DrawsModel)
    variances = model.functions.prior.layer_variances("weight_variance")
    assert all(isinstance(value, InverseGamma) for value in variances)


def test_evidence_finds_the_noise() -> None:
    x = torch.rand(60, 1, generator=generator(), dtype=torch.float64)
    y = (4 * x).sin().squeeze(-1)
    noisy = y + 0.3 * torch.randn(60, generator=generator(1), dtype=torch.float64)
    for values, variance in ((y, 0.0), (noisy, 0.09)):
        standardised = (values - values.mean()) / values.std()
        prior = evidence_tuned(x, standardised, width=20, depth=2, seed=0)
        assert isinstance(prior.noise, float)
        assert prior.noise * float(values.var()) == pytest.approx(variance, abs=0.04)
