"""GP surrogates: BoTorch's seams, exact conditioning, kernels and the Student-t process."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models import ModelList
from botorch.models.transforms.input import Normalize
from botorch.models.transforms.outcome import Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.sampling.get_sampler import get_sampler
from scipy import stats
from torch import Tensor
from torch.distributions import InverseGamma

from priors import GaussianProcess, ScaleMixture
from priors.infinite_width import nngp
from surrogates.gaussian_processes import (
    DeepKernel,
    InfiniteWidthKernel,
    StudentTProcess,
    fit_dkl,
    fit_gp,
    fit_ibnn,
    fit_stp,
)

FITS: dict[str, Callable[..., Any]] = {
    "gp": fit_gp,
    "dkl": fit_dkl,
    "ibnn": fit_ibnn,
    "stp": fit_stp,
}
KNOW_NOISE = ("gp", "dkl", "ibnn")
BOUNDS = torch.tensor([[-1.0, 0.0], [3.0, 0.5]], dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_inputs(n: int, seed: int = 0) -> Tensor:
    unit = torch.rand(n, 2, generator=generator(seed), dtype=torch.float64)
    return BOUNDS[0] + unit * (BOUNDS[1] - BOUNDS[0])


def bowl(X: Tensor) -> Tensor:
    """A maximum of 1 at (1, 0.25), the middle of the box."""
    unit = (X - BOUNDS[0]) / (BOUNDS[1] - BOUNDS[0])
    return 1 - 4 * (unit - 0.5).square().sum(-1, keepdim=True)


def fitted(name: str, n: int = 14, **options: Any) -> Any:
    X = draw_inputs(n)
    noise = 0.01 * torch.randn(n, 1, generator=generator(1), dtype=torch.float64)
    transform = Normalize(2, bounds=BOUNDS)
    return FITS[name](X, bowl(X) + noise, input_transform=transform, **options)


@pytest.fixture(scope="module", params=FITS)
def model(request: pytest.FixtureRequest) -> Any:
    model = fitted(request.param)
    return model.requires_grad_(False)


def test_posterior_has_any_batch_and_is_in_double_precision(model: Any) -> None:
    for shape in itertools.product([(), (3,), (2, 1, 3)], [1, 4]):
        X = draw_inputs(24)[: math.prod(shape[0]) * shape[1]].reshape(*shape[0], shape[1], 2)
        posterior = model.posterior(X)
        assert posterior.mean.shape == posterior.variance.shape == (*shape[0], shape[1], 1)
        assert posterior.mean.dtype == torch.float64
        samples = get_sampler(posterior, torch.Size([5]), seed=0)(posterior)
        assert samples.shape == (5, *shape[0], shape[1], 1)
        assert posterior.rsample(torch.Size([2])).shape == (2, *shape[0], shape[1], 1)
    noisy = model.posterior(X, observation_noise=True)
    assert bool((noisy.variance > posterior.variance).all())
    assert model.num_outputs == 1 and model.batch_shape == torch.Size()


def test_gradients_are_finite_differences(model: Any) -> None:
    X = draw_inputs(2, 7).unsqueeze(0)  # (1, 2, 2): two points, also jointly
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)

    def answer(X: Tensor) -> Tensor:
        posterior = model.posterior(X)
        return torch.cat([posterior.mean, posterior.variance, sampler(posterior).mean(0)], -1)

    assert torch.autograd.gradcheck(answer, X.requires_grad_(), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_gradients_exist_at_observed_points(model: Any) -> None:
    X = draw_inputs(3).unsqueeze(-2).requires_grad_()
    posterior = model.posterior(X)
    (gradient,) = torch.autograd.grad(posterior.variance.sum() + posterior.mean.sum(), X)
    assert bool(gradient.isfinite().all())


def test_answers_do_not_depend_on_the_rest_of_a_batch(model: Any) -> None:
    X = draw_inputs(6, 8)
    acquisition = qLogExpectedImprovement(model, best_f=0.5)
    acquisition.sampler = get_sampler(model.posterior(X[:1]), torch.Size([64]), seed=3)
    together = acquisition(X.unsqueeze(1))
    torch.testing.assert_close(acquisition(X[4:5].unsqueeze(1)), together[4:5], atol=1e-9, rtol=0)
    torch.testing.assert_close(
        acquisition(X.flip(0).unsqueeze(1)), together.flip(0), atol=1e-9, rtol=0
    )


def test_draws_at_close_points_are_close(model: Any) -> None:
    X = torch.tensor([[[0.3, 0.1], [0.3001, 0.1]]], dtype=torch.float64)
    posterior = model.posterior(X)
    draws = get_sampler(posterior, torch.Size([256]), seed=0)(posterior)
    draws = draws.detach().squeeze(-1).squeeze(1)
    assert float(torch.corrcoef(draws.T)[0, 1]) > 0.99


def test_acquisitions_find_the_maximum(model: Any) -> None:
    candidates = [
        (LogExpectedImprovement(model, best_f=0.9), 1),
        (qLogExpectedImprovement(model, best_f=0.9), 2),
    ]
    for acquisition, q in candidates:
        torch.manual_seed(0)
        X, value = optimize_acqf(acquisition, BOUNDS, q=q, num_restarts=3, raw_samples=32)
        assert bool(value.isfinite().all())
        assert float(bowl(X).max()) > 0.85  # of at most 1


def test_pending_points_share_the_improvement(model: Any) -> None:
    pending = torch.tensor([[1.0, 0.25]], dtype=torch.float64)
    X = draw_inputs(5, 7).unsqueeze(1)
    both = torch.cat([X, pending.expand(5, 1, 2)], 1)
    sampler = get_sampler(model.posterior(both), torch.Size([32]), seed=0)
    busy = qLogExpectedImprovement(model, 0.9, sampler=sampler, X_pending=pending)
    free = qLogExpectedImprovement(model, 0.9, sampler=sampler)
    torch.testing.assert_close(busy(X), free(both), atol=1e-9, rtol=0)


def test_hypervolume_improves_beside_another_model(model: Any) -> None:
    X = draw_inputs(10)
    other = fit_gp(X, X[:, :1] / 3, input_transform=Normalize(2, bounds=BOUNDS))
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        ModelList(model, other), ref_point=[0.0, 0.0], X_baseline=X, prune_baseline=True
    )
    X_new, value = optimize_acqf(acquisition, BOUNDS, q=2, num_restarts=1, raw_samples=8)
    assert X_new.shape == (2, 2) and bool(value.isfinite())


def test_fantasies_are_batches_of_models(model: Any) -> None:
    posterior = model.posterior(draw_inputs(2, 4))
    sampler = get_sampler(posterior, torch.Size([3]), seed=0)
    fantasy = model.fantasize(draw_inputs(2, 4), sampler)
    query = draw_inputs(4, 5).reshape(4, 1, 1, 2)
    assert fantasy.batch_shape == (3,)
    assert fantasy.posterior(query).mean.shape == (4, 3, 1, 1)
    Y = torch.zeros(3, 2, 1, dtype=torch.float64)
    again = fantasy.condition_on_observations(draw_inputs(2, 6).expand(3, 2, 2), Y)
    assert again.posterior(query).variance.shape == (4, 3, 1, 1)
    before = model.posterior(draw_inputs(2, 4)).variance
    after = fantasy.posterior(draw_inputs(2, 4)).variance
    assert bool((after < (3.0 if isinstance(model, StudentTProcess) else 1.0) * before).all())


def test_copies_answer_alike(model: Any) -> None:
    X = draw_inputs(4, 5)
    expected = model.posterior(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        answer = twin.posterior(X)
        assert torch.equal(answer.mean, expected.mean)
        assert torch.equal(answer.variance, expected.variance)


@pytest.mark.parametrize("name", FITS)
def test_fits_repeat_and_leave_the_global_generator_alone(name: str) -> None:
    X, query = draw_inputs(12), draw_inputs(3, 5)
    state = torch.get_rng_state()
    first, second = (FITS[name](X, bowl(X), seed=4).posterior(query).mean for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", FITS)
def test_units_of_outcomes_do_not_matter(name: str) -> None:
    X, query = draw_inputs(12), draw_inputs(3, 5)
    Y = bowl(X)
    expected = FITS[name](X, Y).posterior(query)
    least = 1e-6 if name == "stp" else 1e-2  # GPyTorch takes variances below 1e-10 for errors
    for scale, shift in ((least, 0.0), (1e6, -3e6)):
        answer = FITS[name](X, shift + scale * Y).posterior(query)
        # fits stop at about 1e-5 of the optimum, and start from rounded numbers
        atol = 2e-3 * float(expected.mean.detach().abs().max())
        torch.testing.assert_close((answer.mean - shift) / scale, expected.mean, atol=atol, rtol=0)
        torch.testing.assert_close(
            answer.variance / scale**2, expected.variance, atol=1e-3, rtol=0.05
        )


@pytest.mark.parametrize("name", FITS)
def test_intervals_cover_a_smooth_function(name: str) -> None:
    model = fitted(name, n=25)
    X = draw_inputs(200, 9)
    posterior = model.posterior(X.unsqueeze(1), observation_noise=True)
    error = (bowl(X).unsqueeze(1) - posterior.mean).detach().squeeze()
    deviation = posterior.variance.detach().sqrt().squeeze()
    assert float(error.square().mean().sqrt()) < 0.2 * float(bowl(X).std())
    share = float((error.abs() < 2 * deviation).double().mean())
    assert share > (0.6 if name == "dkl" else 0.8)  # it overfits a little by design


@pytest.mark.parametrize("name", FITS)
def test_few_and_equal_observations_get_an_answer(name: str) -> None:
    X = draw_inputs(5)
    for n, Y in ((1, bowl(X)), (2, bowl(X)), (5, torch.full((5, 1), 3.0, dtype=torch.float64))):
        posterior = FITS[name](X[:n], Y[:n]).posterior(X)
        assert bool((posterior.mean.isfinite() & (posterior.variance > 0)).all())
    duplicates = X[[0, 0, 0, 1, 2]]
    posterior = FITS[name](duplicates, bowl(duplicates)).posterior(X)
    assert bool((posterior.mean.isfinite() & (posterior.variance > 0)).all())
    with pytest.raises(ValueError, match="at least one observation"):
        FITS[name](X[:0], bowl(X)[:0])


@pytest.mark.parametrize("name", FITS)
def test_outcome_transforms_are_undone(name: str) -> None:
    X = draw_inputs(12)
    expected = FITS[name](X, 5 * bowl(X)).posterior(X)
    answer = FITS[name](X, 5 * bowl(X), outcome_transform=Standardize(1)).posterior(X)
    torch.testing.assert_close(answer.mean, expected.mean, atol=2e-3, rtol=0)
    torch.testing.assert_close(answer.variance, expected.variance, atol=1e-3, rtol=0.05)


@pytest.mark.parametrize("name", KNOW_NOISE)
def test_known_noise_is_respected(name: str) -> None:
    X = draw_inputs(10)
    Y, Yvar = bowl(X), torch.full((10, 1), 1e-4, dtype=torch.float64)
    Y[0] += 1.0
    sure = FITS[name](X, Y, Yvar).posterior(X[:1]).mean.detach()
    Yvar[0] = 25.0
    unsure = FITS[name](X, Y, Yvar).posterior(X).mean.detach()
    assert abs(float(sure - Y[0])) < 0.05
    assert abs(float(unsure[0] - Y[0])) > 0.2
    assert float((unsure - Y)[1:].abs().max()) < 0.05


def test_known_noise_is_refused_where_it_has_no_closed_form() -> None:
    X = draw_inputs(5)
    with pytest.raises(ValueError, match='"gp"'):
        fit_stp(X, bowl(X), torch.ones(5, 1))
    with pytest.raises(ValueError, match="above 2"):
        fit_stp(X, bowl(X), df=2.0)


@pytest.mark.parametrize("name", KNOW_NOISE)
def test_conditioning_is_the_formula(name: str) -> None:
    model = fitted(name)
    X_new, query = draw_inputs(3, 4), draw_inputs(4, 5)
    Y_new = bowl(X_new)
    model.posterior(query)
    conditioned = model.condition_on_observations(X_new, Y_new)
    noise = model.likelihood.noise.detach()
    joint = model.posterior(torch.cat([X_new, query])).distribution
    units = model.outcome_transform.stdvs.squeeze() ** 2
    K = joint.covariance_matrix.detach()
    gain = torch.linalg.solve(K[:3, :3] + units * noise * torch.eye(3), K[:3, 3:]).mT
    expected = joint.mean[3:] + gain @ (Y_new.squeeze(-1) - joint.mean[:3])
    answer = conditioned.posterior(query)
    torch.testing.assert_close(answer.mean.squeeze(-1), expected, atol=1e-5, rtol=0)
    variance = (K[3:, 3:] - gain @ K[:3, 3:]).diagonal()
    torch.testing.assert_close(answer.variance.squeeze(-1), variance, atol=1e-6, rtol=0)


def test_infinite_width_kernel_is_that_of_the_prior() -> None:
    kernel = InfiniteWidthKernel(2, "relu")
    kernel.initialize(log_scales=torch.tensor([1.5, 0.3, 2.0], dtype=torch.float64).log())
    x, z = draw_inputs(4), draw_inputs(3, 1)
    network: dict[str, Any] = {"activation": "relu", "depth": 2}
    a, b = (math.sqrt(12) * (part - 0.5) for part in (x, z))
    expected = 2 * nngp(a, b, weight_variance=1.5, bias_variance=0.3, **network)
    torch.testing.assert_close(kernel(x, z).to_dense(), expected, atol=1e-12, rtol=0)
    square = kernel(x).to_dense()
    torch.testing.assert_close(kernel(x, diag=True), square.diagonal(), atol=1e-12, rtol=0)


def test_deep_kernel_begins_as_the_gp() -> None:
    X = draw_inputs(8)
    assert torch.equal(DeepKernel(2, (5,), seed=0).features(X), X)


def scale_mixture(model: StudentTProcess) -> ScaleMixture:
    hyper, half = model._hyper, torch.tensor(model._df / 2).double()
    spread = float(hyper.lengthscale[0])
    base = GaussianProcess("rbf", spread, 1.0, float(hyper.noise), float(hyper.mean))
    return ScaleMixture(base, InverseGamma(half, half))


def test_student_t_process_is_the_scale_mixture() -> None:
    x = torch.rand(9, 1, generator=generator(2), dtype=torch.float64)
    y = (6 * x).sin()
    model = fit_stp(x, y)
    prior = scale_mixture(model)
    query = torch.linspace(0, 1, 4, dtype=torch.float64).unsqueeze(-1)
    standardised = (y.squeeze(-1) - y.mean()) / y.std()
    for noisy in (False, True):
        expected = prior.posterior((x, standardised), query, latent=not noisy)
        answer = model.posterior(query, observation_noise=noisy)
        assert answer.df == pytest.approx(4 + 9)
        mean = y.mean() + y.std() * expected.mean
        torch.testing.assert_close(answer.mean.squeeze(-1), mean, atol=1e-7, rtol=0)
        variance = y.std().square() * expected.variance
        torch.testing.assert_close(answer.variance.squeeze(-1), variance, atol=1e-7, rtol=1e-5)


def test_student_t_hyperparameters_are_a_mode() -> None:
    x = torch.rand(12, 1, generator=generator(2), dtype=torch.float64)
    y = (6 * x).sin() + 0.1 * torch.randn(12, 1, generator=generator(3), dtype=torch.float64)
    model = fit_stp(x, y)
    standardised = (y.squeeze(-1) - y.mean()) / y.std()

    def value(shift: float, which: str) -> float:
        moved = model._hyper._replace(**{which: getattr(model._hyper, which) * math.exp(shift)})
        twin = copy.copy(model)
        twin._hyper = moved
        lengthscale, noise = float(moved.lengthscale), float(moved.noise)
        log_prior = stats.lognorm.logpdf(lengthscale, math.sqrt(3), scale=math.exp(math.sqrt(2)))
        log_prior += stats.lognorm.logpdf(noise, 1.0, scale=math.exp(-4))
        return log_prior + float(scale_mixture(twin).log_evidence((x, standardised)))

    for which in ("lengthscale", "noise"):
        middle = value(0.0, which)
        assert middle >= max(value(-0.1, which), value(0.1, which))


def test_student_t_conditioning_is_a_fit_of_all_at_once() -> None:
    model = fitted("stp")
    X_new, query = draw_inputs(3, 4), draw_inputs(4, 5)
    Y_new = torch.randn(2, 3, 1, generator=generator(6), dtype=torch.float64)
    together = model.condition_on_observations(X_new, Y_new)
    one_by_one = model
    for i in range(3):
        one_by_one = one_by_one.condition_on_observations(X_new[i : i + 1], Y_new[:, i : i + 1])
    answer, expected = together.posterior(query), one_by_one.posterior(query)
    assert answer.mean.shape == (2, 4, 1) and answer.df == model.posterior(query).df + 3
    torch.testing.assert_close(answer.mean, expected.mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(answer.variance, expected.variance, atol=1e-9, rtol=0)
    joint = model.posterior(torch.cat([X_new, query]))
    # Ding, On the conditional distribution of the multivariate t, 2016: the mean is the normal's
    noise = float(model.posterior(query, observation_noise=True)._spread[0, 0])
    noise -= float(model.posterior(query)._spread[0, 0])
    K = joint._spread
    gain = torch.linalg.solve(K[:3, :3] + noise * torch.eye(3), K[:3, 3:]).mT
    mean = joint.location[3:] + (Y_new.squeeze(-1) - joint.location[:3]) @ gain.mT
    torch.testing.assert_close(answer.mean.squeeze(-1), mean, atol=1e-8, rtol=0)


def test_student_t_draws_have_the_tails_and_correlations_of_the_joint() -> None:
    model = fitted("stp", n=4)  # 8 degrees of freedom
    X = draw_inputs(2, 5)
    posterior = model.posterior(X)
    draws = get_sampler(posterior, torch.Size([8192]), seed=0)(posterior).squeeze(-1).detach()
    scale = posterior._spread.detach()
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(scale), (draws - posterior.location.detach()).mT, upper=False
    )
    square = z.square().sum(0) / 2  # F with 2 and df degrees of freedom
    statistic, _ = stats.kstest(square.numpy(), stats.f(2, posterior.df).cdf)
    assert statistic < 1.63 / math.sqrt(8192)  # 1 % level of independent draws
    levels = torch.tensor([0.1, 0.9], dtype=torch.float64)
    quantiles = posterior.quantile(levels).squeeze(-1).detach()
    expected = draws.quantile(levels, 0)
    torch.testing.assert_close(quantiles, expected, atol=0.02, rtol=0)
    mode = posterior.density(posterior.mean)
    assert bool((mode > posterior.density(posterior.mean + 0.1)).all())


def test_student_t_process_of_many_degrees_is_the_gp() -> None:
    X = draw_inputs(14)
    Y = bowl(X) + 0.05 * torch.randn(14, 1, generator=generator(1), dtype=torch.float64)
    unit = (X - BOUNDS[0]) / (BOUNDS[1] - BOUNDS[0])
    expected, answer = fit_gp(unit, Y).posterior(unit), fit_stp(unit, Y, df=1e6).posterior(unit)
    torch.testing.assert_close(answer.mean, expected.mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(answer.variance, expected.variance, atol=1e-4, rtol=0.1)


def test_student_t_noise_in_an_outlying_sample_widens_the_posterior() -> None:
    model = fitted("stp")
    query = draw_inputs(4, 5)
    calm = model.condition_on_observations(
        draw_inputs(1, 4), model.posterior(draw_inputs(1, 4)).mean
    )
    wild = model.condition_on_observations(draw_inputs(1, 4), torch.full((1, 1), 30.0).double())
    assert bool((wild.posterior(query).variance > 10 * calm.posterior(query).variance).all())
