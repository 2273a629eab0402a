"""Scale mixtures against Student-t distributions, brute force, and their Gaussian limit."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    MultivariateNormal,
    Normal,
)

from priors import NNGP, BurrXII, GaussianProcess, ScaleMixture
from priors.draws import draw
from priors.kernel_prior import JITTER
from priors.kernels import matern32
from priors.student_t import StudentT

FIXED = GaussianProcess(kernel="matern32", lengthscale=0.4, outputscale=1.5, noise=0.1, mean=0.3)
ALPHA, BETA = 2.5, 1.5
SCALE = InverseGamma(torch.tensor(ALPHA).double(), torch.tensor(BETA).double())
STUDENT_T = ScaleMixture(FIXED, SCALE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gram(x: Tensor, noise: float = 0.1) -> Tensor:
    """The covariance (..., n, n) of y before it is scaled."""
    covariance = 1.5 * matern32(x, x, torch.tensor([0.4], dtype=torch.float64))
    return covariance + (noise + 1.5 * JITTER) * torch.eye(x.shape[-2], dtype=torch.float64)


def multivariate_t(x: Tensor, df: float, shape: float, mean: float = 0.3) -> object:
    return scipy.stats.multivariate_t(np.full(len(x), mean), (shape * gram(x)).numpy(), df=df)


def test_evidence_is_the_multivariate_t_of_scipy() -> None:
    tasks = STUDENT_T.sample(4, 25, 2, generator=generator())
    ours = STUDENT_T.log_evidence((tasks.x, tasks.y))
    for x, y, value in zip(tasks.x, tasks.y, ours, strict=True):
        expected = multivariate_t(x, 2 * ALPHA, BETA / ALPHA).logpdf(y.numpy())  # type: ignore[attr-defined]
        assert float(value) == pytest.approx(expected, abs=1e-12)


def test_quadrature_is_the_closed_form() -> None:
    tasks = STUDENT_T.sample(3, 30, 2, generator=generator(1))
    context, x_query, y_query = (tasks.x[:, :20], tasks.y[:, :20]), tasks.x[:, 20:], tasks.y[:, 20:]
    for latent in (False, True):
        exact = STUDENT_T.posterior(context, x_query, latent)
        lattice = STUDENT_T.posterior(context, x_query, latent, method="quadrature")
        for name in ("log_prob", "cdf"):
            one, other = (getattr(p, name)(y_query) for p in (exact, lattice))
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(exact.mean, lattice.mean, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(exact.variance, lattice.variance, atol=1e-12, rtol=1e-12)
    evidence = STUDENT_T.log_evidence(context, method="quadrature")
    torch.testing.assert_close(STUDENT_T.log_evidence(context), evidence, atol=1e-12, rtol=1e-12)


def test_joint_predictive_is_a_ratio_of_evidences() -> None:
    tasks = STUDENT_T.sample(1, 12, 1, generator=generator(2))
    x, y = tasks.x[0], tasks.y[0]
    joint = STUDENT_T.posterior((x[:8], y[:8]), x[8:], joint=True)
    assert joint.event_shape == (4,)
    expected = STUDENT_T.log_evidence((x, y)) - STUDENT_T.log_evidence((x[:8], y[:8]))
    torch.testing.assert_close(joint.log_prob(y[8:]), expected, atol=1e-8, rtol=0)  # jitter
    marginal = STUDENT_T.posterior((x[:8], y[:8]), x[8:])
    torch.testing.assert_close(joint.variance, marginal.variance, atol=1e-8, rtol=0)


@pytest.mark.parametrize("scaled_noise", [True, False])
@pytest.mark.parametrize("scale", [BurrXII(2.0, 1.5), LogNormal(0.2, 0.8), HalfCauchy(1.0)])
def test_any_scale_matches_a_dense_grid(scale: Distribution, scaled_noise: bool) -> None:
    prior = ScaleMixture(FIXED, scale, scaled_noise)
    tasks = prior.sample(1, 10, 1, generator=generator(3))
    x, y, x_query, y_query = tasks.x[0, :7], tasks.y[0, :7], tasks.x[0, 7:], tasks.y[0, 7:]
    log_s = torch.linspace(-40, 60, 200_001, dtype=torch.float64)
    s = log_s.exp()
    weight = scale.log_prob(s) + log_s + math.log(float(log_s[1] - log_s[0]))
    both = torch.cat([x, x_query])
    values, vectors = torch.linalg.eigh(gram(both[:7], 0.0))
    noise = 0.1 * s.unsqueeze(-1) if scaled_noise else torch.tensor(0.1, dtype=torch.float64)
    v = s.unsqueeze(-1) * values + noise
    z = vectors.T @ (y - 0.3)
    log_likelihood = Normal(0.0, v.sqrt()).log_prob(z).sum(-1)
    evidence = (weight + log_likelihood).logsumexp(0)
    torch.testing.assert_close(prior.log_evidence((x, y)), evidence, atol=1e-7, rtol=0)
    cross = gram(both, 0.0)[7:, :7] @ vectors
    mean = 0.3 + (s.unsqueeze(-1) * z / v) @ cross.T
    variance = s.unsqueeze(-1) * 1.5 - (s.unsqueeze(-1).square() / v) @ cross.square().T + noise
    log_prob = Normal(mean, variance.sqrt()).log_prob(y_query)
    expected = (weight.unsqueeze(-1) + log_likelihood.unsqueeze(-1) + log_prob).logsumexp(0)
    ours = prior.posterior((x, y), x_query).log_prob(y_query)
    torch.testing.assert_close(ours, expected - evidence, atol=1e-7, rtol=0)


def test_conditioning_in_two_steps_is_conditioning_once() -> None:
    prior = ScaleMixture(FIXED, BurrXII(2.0, 1.5))
    tasks = prior.sample(1, 9, 2, generator=generator(4))
    x, y = tasks.x[0], tasks.y[0]
    first = prior.posterior((x[:4], y[:4]), x[4:7], joint=True).log_prob(y[4:7])
    expected = prior.log_evidence((x[:7], y[:7])) - prior.log_evidence((x[:4], y[:4]))
    torch.testing.assert_close(first, expected, atol=1e-7, rtol=0)


def test_a_sure_scale_gives_the_gaussian_process() -> None:
    tasks = FIXED.sample(1, 12, 1, generator=generator(5))
    context, x_query, y_query = (tasks.x[0, :9], tasks.y[0, :9]), tasks.x[0, 9:], tasks.y[0, 9:]
    exact = FIXED.posterior(context, x_query).log_prob(y_query)
    gaps = []
    for k in (1e3, 1e5):
        sure = ScaleMixture(FIXED, InverseGamma(torch.tensor(k).double(), torch.tensor(k).double()))
        gaps.append(float((sure.posterior(context, x_query).log_prob(y_query) - exact).abs().max()))
    assert gaps[1] < 1e-4
    assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.1)  # the rate is O(1 / k)


def test_no_context_gives_the_prior() -> None:
    x_query = torch.rand(3, 2, generator=generator(6), dtype=torch.float64)
    prior = STUDENT_T.posterior((torch.zeros(0, 2), torch.zeros(0)), x_query)
    assert isinstance(prior, StudentT)
    torch.testing.assert_close(prior.df, torch.full((3,), 2 * ALPHA).double())
    expected = math.sqrt(BETA / ALPHA * (1.5 + 0.1))
    torch.testing.assert_close(prior.scale, torch.full((3,), expected, dtype=torch.float64))


def test_draws_share_one_scale_in_all_their_values() -> None:
    n, tasks = 6, 20_000
    drawn = STUDENT_T.sample(tasks, n, 1, generator=generator(7))
    df = 2 * ALPHA
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * tasks))  # Dvoretzky-Kiefer-Wolfowitz-Massart
    factor = torch.linalg.cholesky(BETA / ALPHA * gram(drawn.x))
    centred = (drawn.y - 0.3).unsqueeze(-1)
    z = torch.linalg.solve_triangular(factor, centred, upper=False).squeeze(-1)
    square = z.square().sum(-1) / n
    projected = z.sum(-1) / math.sqrt(n)  # d'y / sqrt(d'S d) for one direction d
    radius, direction = z.norm(dim=-1), z[:, 0] / z.norm(dim=-1)
    assert scipy.stats.kstest(square.numpy(), scipy.stats.f(n, df).cdf).statistic < bound
    assert scipy.stats.kstest(projected.numpy(), scipy.stats.t(df).cdf).statistic < bound
    independent = scipy.stats.spearmanr(radius.numpy(), direction.numpy()).statistic
    assert abs(independent) < 4.9 / math.sqrt(tasks)  # 1e-6 two-sided
    # values far apart are uncorrelated, but large together
    size = scipy.stats.spearmanr(drawn.f[:, 0].abs().numpy(), drawn.f[:, -1].abs().numpy())
    assert size.statistic > 0.2


def test_posterior_mean_of_the_scale_in_closed_form() -> None:
    tasks = STUDENT_T.sample(1, 15, 1, generator=generator(8))
    x, y = tasks.x[0], tasks.y[0]
    z = torch.linalg.solve(gram(x), y - 0.3)
    square = float((y - 0.3) @ z)
    expected = (BETA + square / 2) / (ALPHA + 15 / 2 - 1)
    marginal = STUDENT_T.latent_posterior((x, y))["scale"]
    assert float(marginal.mean) == pytest.approx(expected, rel=1e-8)


def test_hyperparameters_of_the_base_are_integrated_too() -> None:
    prior = ScaleMixture(NNGP(weight_variance=1.5, noise=0.05), InverseGamma(3.0, 3.0))
    tasks = prior.sample(1, 8, 1, generator=generator(9))
    x, y = tasks.x[0], tasks.y[0]
    bias = draw(prior.base.bias_variance, (4000,), generator=generator(10))  # type: ignore[attr-defined]
    copies = x.expand(4000, -1, -1), y.expand(4000, -1)
    values = prior.log_evidence(copies, given={"bias_variance": bias})
    mean, error = values.exp().mean(), values.exp().std() / math.sqrt(len(bias))
    evidence = prior.log_evidence((x, y)).exp()
    assert float((evidence - mean).abs() / error) < 4.9  # 1e-6 two-sided


def test_the_conditional_of_a_query_is_gaussian_given_the_scale() -> None:
    prior = ScaleMixture(FIXED, InverseGamma(2.5, 1.5), scaled_noise=False)
    tasks = prior.sample_conditional(5, 8, 2, torch.full((3,), 8), generator=generator(11))
    scale = tasks.latents["scale"]
    for i in range(5):
        both = torch.cat([tasks.x[i], tasks.x_query[i]])
        covariance = scale[i] * gram(both, 0.0) + 0.1 * torch.eye(11, dtype=torch.float64)
        joint = MultivariateNormal(torch.full((11,), 0.3, dtype=torch.float64), covariance)
        prefix = MultivariateNormal(torch.full((8,), 0.3, dtype=torch.float64), covariance[:8, :8])
        for j in range(3):
            y = torch.cat([tasks.y[i], torch.full((3,), 0.3, dtype=torch.float64)])
            keep = [*range(8), 8 + j]
            value = y[keep] + torch.tensor([0.0] * 8 + [0.7], dtype=torch.float64)
            pair = MultivariateNormal(joint.mean[keep], covariance[keep][:, keep])
            expected = pair.log_prob(value) - prefix.log_prob(tasks.y[i])
            deviation = (tasks.variance[i, j] + tasks.noise[i]).sqrt()
            ours = Normal(tasks.mean[i, j], deviation).log_prob(value[-1])
            torch.testing.assert_close(ours, expected, atol=1e-7, rtol=0)


def test_bad_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="a Gaussian process given its hyperparameters"):
        ScaleMixture(STUDENT_T)
    with pytest.raises(ValueError, match="distribution of positive numbers"):
        ScaleMixture(FIXED, Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="relative_noise"):
        STUDENT_T.posterior(([0.1], [0.2]), [0.3], given={"noise": 0.1})
