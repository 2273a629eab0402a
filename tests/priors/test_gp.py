"""Gaussian-process tasks against their formulas, and posteriors of known hyperparameters."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Gamma,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)

from priors import ConditionalPrior, GaussianProcess, ReferencePrior, Tasks
from priors.kernel_prior import JITTER, cholesky
from priors.kernels import KERNELS

# sqrt(log(2 / p) / 2n) bounds a Kolmogorov-Smirnov distance but for p = 1e-6 of all seeds (DKW)
DKW = math.sqrt(math.log(2e6) / 2)

EVERYTHING = GaussianProcess(
    kernel=tuple(KERNELS), mean=Normal(1.0, 2.0), ard=True, scale_with_dimension=True
)
KNOWN = {"lengthscale": 0.3, "outputscale": 1.7, "noise": 0.05, "mean": 0.4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ks_distance(pit: Tensor) -> float:
    """Largest distance between the empirical cdf of `pit` and the uniform one."""
    ordered = pit.flatten().sort().values
    rank = torch.arange(len(ordered) + 1, dtype=ordered.dtype) / len(ordered)
    return float(torch.maximum(rank[1:] - ordered, ordered - rank[:-1]).max())


def covariance_of_f(x: Tensor, latents: dict[str, Tensor], i: int) -> Tensor:
    """Covariance of f at x (point, dim) under the latents of task i of EVERYTHING."""
    kernel = KERNELS[EVERYTHING.kernels[int(latents["kernel"][i])]]
    return latents["outputscale"][i] * kernel(x, x, latents["lengthscale"][i])


def whitened(x: Tensor, y: Tensor, latents: dict[str, Tensor]) -> Tensor:
    """L^-1 (y - mean) (task, point): white for the right covariance L L' of y only."""
    white = []
    for i in range(len(x)):
        covariance = covariance_of_f(x[i], latents, i) + latents["noise"][i] * torch.eye(x.shape[1])
        centred = (y[i] - latents["mean"][i]).unsqueeze(-1)
        factor = torch.linalg.cholesky(covariance)
        white.append(torch.linalg.solve_triangular(factor, centred, upper=False).squeeze(-1))
    return torch.stack(white)


def test_it_is_every_kind_of_prior() -> None:
    prior = GaussianProcess()
    assert isinstance(prior, ConditionalPrior) and isinstance(prior, ReferencePrior)


@pytest.mark.parametrize("seed", [0, 1])
def test_whitened_tasks_are_standard_normal(seed: int) -> None:
    tasks = EVERYTHING.sample(400, 12, 3, generator=generator(seed))
    z = whitened(tasks.x, tasks.y, tasks.latents)
    assert ks_distance(Normal(0.0, 1.0).cdf(z)) < DKW / math.sqrt(z.numel())
    # tasks are independent: correlations of neighbours within 5 standard errors of zero
    assert (z[1:] * z[:-1]).mean().abs() < 5 / math.sqrt(z[1:].numel())
    # and points after whitening: any wrong correlation would show
    off_diagonal = z.T @ z / 400 - torch.eye(12)
    assert off_diagonal.abs().max() < 5 * math.sqrt(2 / 400)


def test_noise_is_a_variance() -> None:
    tasks = GaussianProcess(noise=0.04).sample(200, 50, 2, generator=generator())
    residuals = (tasks.y - tasks.f) / 0.2
    assert ks_distance(Normal(0.0, 1.0).cdf(residuals)) < DKW / 100


@pytest.mark.parametrize("d", [1, 4])
def test_latents_follow_their_priors(d: int) -> None:
    prior = GaussianProcess(
        kernel=("rbf", "matern12"),
        outputscale=Gamma(2.0, 1.0),
        noise=Uniform(0.1, 0.2),
        mean=Normal(1.0, 2.0),
        ard=True,
        scale_with_dimension=True,
    )
    tasks = prior.sample(4000, 1, d, generator=generator())
    assert set(tasks.latents) == {"lengthscale", "outputscale", "noise", "mean", "kernel"}
    assert tasks.latents["lengthscale"].shape == (4000, d)
    tasks.latents["lengthscale"] /= math.sqrt(d)
    for name in ("lengthscale", "outputscale", "noise", "mean"):
        pit = getattr(prior, name).cdf(tasks.latents[name])
        assert ks_distance(pit) < DKW / math.sqrt(pit.numel())
    assert abs(float(tasks.latents["kernel"].double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(4000)


def test_fixed_hyperparameters_are_not_latents() -> None:
    prior = GaussianProcess(lengthscale=0.3, noise=0.1)
    assert set(prior.sample(2, 3, 1, generator=generator()).latents) == {"outputscale"}


def test_the_same_seed_gives_the_same_tasks() -> None:
    first, again, other = (EVERYTHING.sample(3, 5, 2, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(first.y, again.y) and torch.equal(first.x, again.x)
    assert not torch.equal(first.y, other.y)


def test_tasks_have_the_promised_shapes() -> None:
    tasks = GaussianProcess().sample(4, 6, 2, generator=generator())
    assert isinstance(tasks, Tasks) and tasks.num_context is None
    assert tasks.x.shape == (4, 6, 2) and tasks.y.shape == tasks.f.shape == (4, 6)
    assert tasks.latents["lengthscale"].shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "cubic"}, "kernel among"),
        ({"kernel": ()}, "kernel among"),
        ({"inputs": "spiral"}, "inputs among"),
        ({"noise": 0.0}, "positive noise"),
        ({"lengthscale": -1.0}, "positive lengthscale"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianProcess(**arguments)


def test_the_diagonal_of_the_covariance_is_the_variance() -> None:
    tasks = EVERYTHING.sample(30, 5, 2, generator=generator())
    diagonal = EVERYTHING.covariance(tasks.x, tasks.x, tasks.latents).diagonal(dim1=1, dim2=2)
    # Matern 1/2 turns rounding of squared distances, 1e-15, into 3e-8
    torch.testing.assert_close(
        EVERYTHING.variance(tasks.x, tasks.latents), diagonal, atol=1e-6, rtol=1e-6
    )


def test_conditional_tasks_match_direct_formulas_for_every_prefix() -> None:
    visible = torch.tensor([0, 3, 9, 10, 1])
    tasks = EVERYTHING.sample_conditional(40, 10, 2, visible, generator=generator())
    for i in range(40):
        latents = {name: value[i] for name, value in tasks.latents.items()}
        x = torch.cat([tasks.x[i], tasks.x_query[i]])
        covariance = covariance_of_f(x, tasks.latents, i)
        for j, p in enumerate(visible.tolist()):
            diagonal = latents["noise"] + JITTER * latents["outputscale"]
            seen = covariance[:p, :p] + diagonal * torch.eye(p)
            weights = torch.linalg.solve(seen, covariance[:p, 10 + j])
            mean = latents["mean"] + weights @ (tasks.y[i, :p] - latents["mean"])
            own = EVERYTHING.variance(tasks.x_query[i : i + 1], _only(tasks.latents, i))[0, j]
            variance = own - weights @ covariance[:p, 10 + j]
            assert abs(tasks.mean[i, j] - mean) < 1e-8 * (1 + mean.abs())
            assert abs(tasks.variance[i, j] - variance.clamp_min(0)) < 1e-8 * own + 1e-10


def _only(latents: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: value[i : i + 1] for name, value in latents.items()}


def test_observations_of_conditional_tasks_are_those_of_the_prior() -> None:
    drawn = EVERYTHING.sample_conditional(400, 8, 3, torch.tensor([8]), generator=generator())
    z = whitened(drawn.x, drawn.y, drawn.latents)
    assert ks_distance(Normal(0.0, 1.0).cdf(z)) < DKW / math.sqrt(z.numel())
    assert (z.T @ z / 400 - torch.eye(8)).abs().max() < 5 * math.sqrt(2 / 400)


def test_cholesky_raises_the_diagonal_only_where_it_must() -> None:
    good = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    singular = torch.tensor([[1.0, 1.0 + 1e-9], [1.0 + 1e-9, 1.0]], dtype=torch.float64)
    diagonal = torch.full((2,), 1e-10, dtype=torch.float64)
    factor = cholesky(torch.stack([good, singular]), diagonal)
    product = factor @ factor.mT
    torch.testing.assert_close(product[0], good, atol=2e-10, rtol=0)
    torch.testing.assert_close(product[1], singular, atol=2e-8, rtol=0)
    with pytest.raises(RuntimeError, match="not positive definite"):
        cholesky(-good.unsqueeze(0), diagonal[:1])


def test_the_posterior_given_all_latents_matches_gpytorch() -> None:
    with warnings.catch_warnings():  # its dependencies use deprecated parts of torch
        warnings.simplefilter("ignore", DeprecationWarning)
        import gpytorch

        class Exact(gpytorch.models.ExactGP):
            def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
                super().__init__(x, y, likelihood)
                self.mean_module = gpytorch.means.ConstantMean()
                self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

            def forward(self, x: Tensor) -> Any:
                covariance = self.covar_module(x)
                return gpytorch.distributions.MultivariateNormal(self.mean_module(x), covariance)

        tasks = GaussianProcess().sample(1, 25, 2, generator=generator())
        x, y, x_query = tasks.x[0, :20], tasks.y[0, :20], tasks.x[0, 20:]
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        model = Exact(x, y, likelihood).double().eval()
        likelihood.noise, model.mean_module.constant = KNOWN["noise"], KNOWN["mean"]
        model.covar_module.outputscale = KNOWN["outputscale"]
        model.covar_module.base_kernel.lengthscale = KNOWN["lengthscale"]
        expected = likelihood.eval()(model(x_query))
    posterior = GaussianProcess().posterior((x, y), x_query, given=KNOWN)
    assert isinstance(posterior, Normal)
    torch.testing.assert_close(posterior.mean, expected.mean.detach(), atol=1e-7, rtol=0)
    torch.testing.assert_close(posterior.variance, expected.variance.detach(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_posterior_given_all_latents_is_the_conditional(kernel: str) -> None:
    prior = GaussianProcess(kernel=kernel)
    tasks = prior.sample(2, 12, 2, generator=generator())
    x, y, x_query = tasks.x[:, :8], tasks.y[:, :8], tasks.x[:, 8:]
    theta = {name: torch.full((2,), value, dtype=torch.float64) for name, value in KNOWN.items()}
    digits = 1e-7 if kernel == "matern12" else 1e-8  # its kink: roots of rounding at distance zero
    mean, variance = prior.conditional(x, y, x_query, theta)
    noisy = prior.posterior((x, y), x_query, given=KNOWN)
    noise_free = prior.posterior((x, y), x_query, latent=True, given=KNOWN)
    assert noisy.batch_shape == (2, 4)
    torch.testing.assert_close(noisy.mean, mean, atol=digits, rtol=digits)
    torch.testing.assert_close(noise_free.variance, variance, atol=digits, rtol=digits)
    torch.testing.assert_close(noisy.variance, variance + KNOWN["noise"], atol=digits, rtol=digits)
    mean, covariance = prior.conditional(x, y, x_query, theta, joint=True)
    joint = prior.posterior((x, y), x_query, joint=True, given=KNOWN)
    assert isinstance(joint, MultivariateNormal)
    assert joint.batch_shape == (2,) and joint.event_shape == (4,)
    covariance = covariance + KNOWN["noise"] * torch.eye(4)
    torch.testing.assert_close(joint.mean, mean, atol=digits, rtol=digits)
    torch.testing.assert_close(joint.covariance_matrix, covariance, atol=digits, rtol=digits)


def test_a_normal_mean_is_a_constant_kernel() -> None:
    prior = GaussianProcess(mean=Normal(1.0, 3.0))
    tasks = prior.sample(1, 10, 1, generator=generator())
    x, y, x_query = tasks.x[0, :7], tasks.y[0, :7], tasks.x[0, 7:]
    known = {name: value for name, value in KNOWN.items() if name != "mean"}
    unit = KERNELS["rbf"](
        tasks.x[0], tasks.x[0], torch.tensor([known["lengthscale"]], dtype=torch.float64)
    )
    covariance = known["outputscale"] * unit + 9 + known["noise"] * torch.eye(10)
    expected = MultivariateNormal(torch.ones(7).double(), covariance[:7, :7]).log_prob(y)
    evidence = prior.log_evidence((x, y), given=known)
    torch.testing.assert_close(evidence, expected, atol=1e-7, rtol=0)
    weights = torch.linalg.solve(covariance[:7, :7], covariance[:7, 7:])
    joint = prior.posterior((x, y), x_query, joint=True, given=known)
    mean = 1 + weights.T @ (y - 1)
    torch.testing.assert_close(joint.mean, mean, atol=1e-7, rtol=0)
    left = covariance[7:, 7:] - covariance[7:, :7] @ weights
    torch.testing.assert_close(joint.covariance_matrix, left, atol=1e-7, rtol=0)
    single = prior.posterior((x, y), x_query, given=known)
    torch.testing.assert_close(single.variance, left.diagonal(), atol=1e-7, rtol=0)
    moments = prior.latent_posterior((x, y), given=known)["mean"]
    gain = torch.linalg.solve(covariance[:7, :7], torch.full((7,), 9.0).double())
    assert float(moments.mean) == pytest.approx(float(1 + gain @ (y - 1)), abs=1e-7)
    assert float(moments.variance) == pytest.approx(float(9 - 9 * gain.sum()), abs=1e-7)


def test_known_latents_of_a_batch_may_differ() -> None:
    prior = GaussianProcess(kernel=("rbf", "matern12"), ard=True)
    tasks = prior.sample(2, 9, 2, generator=generator())
    context, x_query = (tasks.x[:, :6], tasks.y[:, :6]), tasks.x[:, 6:]
    given = {
        "lengthscale": [[0.2, 0.5], [0.7, 0.1]],
        "outputscale": 1.2,
        "noise": [0.1, 0.2],
        "kernel": [0, 1],
    }
    both = prior.posterior(context, x_query, given=given)
    for i in range(2):
        own = {k: v if isinstance(v, float) else v[i] for k, v in given.items()}
        single = prior.posterior((context[0][i], context[1][i]), x_query[i], given=own)
        torch.testing.assert_close(both.mean[i], single.mean)
        torch.testing.assert_close(both.variance[i], single.variance)


def test_a_context_may_be_lists_and_one_dimensional() -> None:
    prior = GaussianProcess(lengthscale=0.3)
    tasks = prior.sample(1, 6, 1, generator=generator())
    x, y = tasks.x[0, :5], tasks.y[0, :5]
    expected = prior.posterior((x, y), tasks.x[0, 5:]).mean
    flat = prior.posterior((x.squeeze(-1).tolist(), y.tolist()), tasks.x[0, 5:].flatten().numpy())
    column = prior.posterior((x, y.unsqueeze(-1)), tasks.x[0, 5:])
    for posterior in (flat, column):
        torch.testing.assert_close(posterior.mean, expected)
        assert posterior.mean.dtype == torch.float64


def test_without_observations_the_posterior_is_the_prior() -> None:
    prior = GaussianProcess(lengthscale=0.3)
    posterior = prior.posterior(([], []), torch.tensor([[0.1, 0.2], [0.5, 0.9]]))
    assert posterior.batch_shape == (2,)
    variance = float(prior.outputscale.mean + prior.noise.mean)  # of LogNormal, in closed form
    torch.testing.assert_close(posterior.mean, torch.zeros(2).double())
    assert posterior.variance.tolist() == pytest.approx([variance] * 2, rel=1e-5)
    evidence = prior.log_evidence((torch.empty(0, 1), torch.empty(0)))
    assert float(evidence) == pytest.approx(0, abs=1e-6)


def test_batched_posteriors_equal_single_ones() -> None:
    prior = GaussianProcess(outputscale=1.0)
    tasks = prior.sample(3, 12, 1, generator=generator())
    context, x_query = (tasks.x[:, :8], tasks.y[:, :8]), tasks.x[:, 8:]
    batched = prior.posterior(context, x_query)
    assert isinstance(batched, MixtureSameFamily) and batched.batch_shape == (3, 4)
    evidence = prior.log_evidence(context)
    for i in range(3):
        task = (context[0][i], context[1][i])
        single = prior.posterior(task, x_query[i])
        value = tasks.y[i, 8:]
        # pads have weight 0, but all are summed in another order
        torch.testing.assert_close(batched.mean[i], single.mean, atol=1e-10, rtol=0)
        torch.testing.assert_close(batched.variance[i], single.variance, atol=1e-10, rtol=0)
        expected = single.log_prob(value)
        log_prob = batched.log_prob(tasks.y[:, 8:])[i]
        torch.testing.assert_close(log_prob, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(evidence[i], prior.log_evidence(task))


def test_the_order_of_the_context_does_not_matter() -> None:
    prior = GaussianProcess()
    tasks = prior.sample(1, 14, 1, generator=generator())
    x, y, x_query = tasks.x[0, :10], tasks.y[0, :10], tasks.x[0, 10:]
    order = torch.randperm(10, generator=generator())
    first, second = (prior.posterior((x[o], y[o]), x_query) for o in (slice(None), order))
    torch.testing.assert_close(first.mean, second.mean, atol=1e-7, rtol=0)
    torch.testing.assert_close(first.variance, second.variance, atol=1e-7, rtol=0)


def test_no_query_depends_on_the_others() -> None:
    prior = GaussianProcess(noise=0.1)
    tasks = prior.sample(1, 14, 1, generator=generator())
    context, x_query = (tasks.x[0, :10], tasks.y[0, :10]), tasks.x[0, 10:]
    together = prior.posterior(context, x_query).mean
    alone = torch.cat([prior.posterior(context, x_query[j : j + 1]).mean for j in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_the_density_is_finite_far_out_and_agrees_with_the_cdf() -> None:
    prior = GaussianProcess(outputscale=1.0)
    tasks = prior.sample(1, 6, 1, generator=generator())
    posterior = prior.posterior((tasks.x[0, :5], tasks.y[0, :5]), tasks.x[0, 5:])
    far = posterior.mean + 1e15 * posterior.stddev
    assert posterior.log_prob(far).isfinite().all()
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = posterior.log_prob(grid).exp()
    mass = torch.cumulative_trapezoid(density, grid)
    # the trapezoid rule on 20000 intervals leaves 2e-6
    torch.testing.assert_close(posterior.cdf(grid)[1:], mass, atol=1e-5, rtol=0)
    mean = torch.trapezoid(grid * density, grid)
    assert float(mean) == pytest.approx(float(posterior.mean), abs=1e-6)


def test_the_posterior_mean_is_differentiable_in_the_query() -> None:
    prior = GaussianProcess(noise=0.1)
    tasks = prior.sample(1, 8, 1, generator=generator())
    context, x_query = (tasks.x[0, :6], tasks.y[0, :6]), tasks.x[0, 6:].clone().requires_grad_()
    prior.posterior(context, x_query).mean.sum().backward()
    ahead, behind = (prior.posterior(context, x_query.detach() + h).mean for h in (1e-5, -1e-5))
    assert x_query.grad is not None
    slope = (ahead - behind) / 2e-5
    torch.testing.assert_close(x_query.grad.flatten(), slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": ([0.1, 0.2], [1.0])}, r"y \(n,\).*got x \(2, 1\) and y \(1,\)"),
        ({"context": ([0.1, math.nan], [1.0, 2.0])}, "finite x"),
        ({"context": ([0.1, 0.2], [1.0, math.inf])}, "finite y"),
        ({"x_query": [[0.1, 0.2]]}, r"x_query like x \(2, 1\).*got \(1, 2\)"),
        ({"given": {"nose": 0.1}}, "latents among"),
        ({"given": {"kernel": 0}}, "latents among"),
        ({"given": {"noise": -0.1}}, "positive noise"),
        ({"given": {"noise": [0.1, 0.2]}}, "broadcasts"),
        ({"method": "guess"}, "Expected method"),
    ],
)
def test_wrong_questions_are_refused(arguments: dict[str, Any], message: str) -> None:
    question = {"context": ([0.1, 0.2], [1.0, 2.0]), "x_query": [0.3]} | arguments
    with pytest.raises(ValueError, match=message):
        GaussianProcess().posterior(**question)
    two = GaussianProcess(kernel=("rbf", "linear"))
    with pytest.raises(ValueError, match="kernel index below 2"):
        two.posterior(([0.1], [1.0]), [0.2], given={"kernel": 2})
    with pytest.raises(ValueError, match="one task"):
        two.latent_posterior((torch.zeros(2, 1, 1), torch.zeros(2, 1)))


@pytest.mark.parametrize(
    "value", [-1.0, Normal(0.1, 1.0), LogNormal(torch.zeros(3), torch.ones(3))]
)
def test_what_is_not_positive_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected a positive lengthscale"):
        GaussianProcess(lengthscale=value)


@pytest.mark.parametrize("size", [(2, -3, 1), (2, 3, 0)])
def test_impossible_sizes_are_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="Expected batch >= 0, n >= 0 and d >= 1"):
        GaussianProcess().sample(*size, generator=torch.Generator())
