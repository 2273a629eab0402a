"""Mixtures of priors against direct sums over their parts."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Cauchy,
    ComposeTransform,
    ExpTransform,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
)

from priors import GaussianProcess, Mixture, Searched, Tasks, from_config, to_config
from priors.distributions import MixtureOf, StackOf, Transformed, expectation, invert_cdf
from priors.tasks import ConditionalPrior

SMOOTH = GaussianProcess(lengthscale=0.4, outputscale=1.0, noise=0.01)
ROUGH = GaussianProcess(kernel="matern12", lengthscale=0.2, outputscale=2.0, noise=0.1)
LINE = GaussianProcess(kernel="linear", lengthscale=0.3, outputscale=1.0, noise=LogNormal(-3, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Coin:
    """A user's own prior, which only samples: y is +1 or -1 everywhere."""

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        x = torch.rand(batch, n, d, generator=generator, dtype=torch.float64)
        side = torch.randint(2, (batch, 1), generator=generator).double() * 2 - 1
        return Tasks(x, side.expand(batch, n), side.expand(batch, n), {})


# distributions


def test_a_mixture_of_families_is_the_sum_of_its_parts() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    parts = [
        Normal(torch.zeros(2).double(), 1.0),
        Laplace(torch.ones(2).double(), 0.3),
        StudentT(torch.full((2,), 5.0).double(), -1.0, 2.0),
    ]
    mixture = MixtureOf(weights.log().unsqueeze(-1), parts)
    y = torch.linspace(-6, 6, 24, dtype=torch.float64).reshape(12, 2)
    density = sum(w * p.log_prob(y).exp() for w, p in zip(weights[:2], parts[:2], strict=True))
    density = density + weights[2] * parts[2].log_prob(y).exp()
    torch.testing.assert_close(mixture.log_prob(y), density.log(), atol=1e-13, rtol=0)
    mean = weights @ torch.tensor([0.0, 1.0, -1.0]).double()
    second = weights @ torch.tensor([1.0, 1 + 2 * 0.09, 1 + 4 * 5 / 3], dtype=torch.float64)
    torch.testing.assert_close(mixture.mean, mean.expand(2), atol=1e-13, rtol=0)
    torch.testing.assert_close(mixture.variance, (second - mean**2).expand(2), atol=1e-12, rtol=0)
    assert mixture.expand((4, 2)).log_prob(y[:4]).shape == (4, 2)


def test_quantiles_of_a_mixture_invert_its_cdf() -> None:
    parts = [Normal(torch.zeros(3).double(), 1e-3), Laplace(torch.full((3,), 50.0).double(), 2.0)]
    mixture = MixtureOf(torch.tensor([0.9, 0.1]).double().log().unsqueeze(-1), parts)
    level = torch.tensor([1e-6, 0.5, 1 - 1e-6], dtype=torch.float64)
    torch.testing.assert_close(mixture.cdf(mixture.icdf(level)), level, atol=1e-12, rtol=0)


def test_draws_of_a_mixture_follow_its_cdf() -> None:
    mixture = MixtureOf(
        torch.tensor([0.7, 0.3]).double().log().unsqueeze(-1),
        [Normal(torch.zeros(1).double(), 1.0), Laplace(torch.full((1,), 2.0).double(), 0.5)],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pit = mixture.cdf(mixture.sample((20000,))).flatten().sort().values
    distance = (pit - torch.linspace(0, 1, len(pit)).double()).abs().max()
    assert distance < math.sqrt(math.log(2e6) / 2 / len(pit))  # of all seeds but 1e-6 (DKW)


def test_joint_components_are_drawn_whole() -> None:
    far = torch.full((4,), 100.0).double()
    eye = torch.eye(4, dtype=torch.float64)
    parts = [MultivariateNormal(far, eye), MultivariateNormal(-far, eye)]
    mixture = MixtureOf(torch.zeros(2).double(), parts)
    draws = mixture.sample((50,))
    assert draws.shape == (50, 4) and (draws.sign().sum(-1).abs() == 4).all()
    assert mixture.log_prob(draws).shape == (50,)
    torch.testing.assert_close(mixture.variance, 1 + far**2)


def test_components_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected components of one shape"):
        MixtureOf(torch.zeros(2), [Normal(0.0, 1.0), Normal(torch.zeros(2), 1.0)])


def test_weights_belong_to_components_where_the_batch_is_as_long() -> None:
    parts = [Normal(torch.zeros(2), 1.0), Normal(torch.full((2,), 10.0), 1.0)]
    mixture = MixtureOf(torch.tensor([0.0, 5.0]), parts)
    share = 1 / (1 + math.exp(-5))
    torch.testing.assert_close(mixture.mean, torch.full((2,), 10 * share))
    torch.testing.assert_close(mixture.expand((3, 2)).mean, torch.full((3, 2), 10 * share))
    by_task = torch.tensor([[0.0, 100.0], [100.0, 0.0]])  # (component, task)
    tasks = [Normal(torch.full((2, 3), loc), 1.0) for loc in (0.0, 10.0)]
    mean = MixtureOf(by_task.unsqueeze(-1), tasks).mean
    torch.testing.assert_close(mean, torch.tensor([[10.0], [0.0]]).expand(2, 3))


def test_a_stack_is_its_parts_one_by_one() -> None:
    parts = [Laplace(torch.arange(3).double(), scale) for scale in (0.5, 1.0)]
    stack = StackOf([MixtureOf(torch.zeros(1, 1).double(), [part]) for part in parts])
    assert stack.batch_shape == (2, 3) and stack.sample((5,)).shape == (5, 2, 3)
    y = torch.linspace(-2, 4, 12, dtype=torch.float64).reshape(2, 2, 3)
    expected = torch.stack([part.log_prob(y[:, i]) for i, part in enumerate(parts)], 1)
    torch.testing.assert_close(stack.log_prob(y), expected, atol=1e-14, rtol=0)
    torch.testing.assert_close(
        stack.icdf(torch.full((2, 3), 0.3).double())[1],
        parts[1].icdf(torch.full((3,), 0.3).double()),
        atol=1e-10,
        rtol=0,
    )
    joint = StackOf([MultivariateNormal(torch.zeros(3), torch.eye(3))] * 2)
    assert joint.log_prob(torch.zeros(5, 2, 3)).shape == (5, 2)


def test_moments_of_transformed_distributions_match_closed_forms() -> None:
    loc = torch.tensor([0.3, -1.0], dtype=torch.float64)
    normal = Transformed(Normal(loc, 0.7), ExpTransform())
    exact = LogNormal(loc, 0.7)
    torch.testing.assert_close(normal.mean, exact.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(normal.variance, exact.variance, rtol=1e-11, atol=0)
    laplace = Transformed(Laplace(loc, 0.2), ExpTransform())  # E exp(Z) = exp(loc) / (1 - 0.04)
    # the trapezoidal rule meets the kink of the density: error of order (step * scale)^2 / 12
    torch.testing.assert_close(laplace.mean, loc.exp() / 0.96, rtol=2e-5, atol=0)
    student = StudentT(torch.tensor([3.0, 8.0]).double(), loc, 2.0)
    second = expectation(student, torch.square)
    # draws of 3 degrees of freedom lie 1e5 deviations off with weight 1e-5 in the second moment
    torch.testing.assert_close(second, student.variance + loc.square(), rtol=3e-5, atol=0)


def test_moments_of_transformed_mixtures_go_component_by_component() -> None:
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64).expand(3, 2)
    loc = torch.tensor([[0.0, 1.0], [-1.0, 2.0], [0.5, 0.5]], dtype=torch.float64)
    scale = torch.tensor([0.01, 0.5], dtype=torch.float64).expand(3, 2)
    base = MixtureSameFamily(torch.distributions.Categorical(weights), Normal(loc, scale))
    warped = Transformed(base, ExpTransform())
    parts = LogNormal(loc, scale)
    mean = (weights * parts.mean).sum(-1)
    second = (weights * (parts.variance + parts.mean**2)).sum(-1)
    torch.testing.assert_close(warped.mean, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(warped.variance, second - mean**2, rtol=1e-10, atol=0)
    level = torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64)
    torch.testing.assert_close(warped.cdf(warped.icdf(level)), level, atol=1e-12, rtol=0)
    torch.testing.assert_close(warped.icdf(level).log(), invert_cdf(base, level))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_out_of_its_range_a_transformed_law_has_no_density(sign: float) -> None:
    warp = (
        ExpTransform() if sign > 0 else ComposeTransform([AffineTransform(0, -1), ExpTransform()])
    )
    law = Transformed(Normal(torch.zeros(3).double(), 1.0), warp)
    value = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    exact = LogNormal(torch.zeros(()).double(), 1.0)  # the normal is symmetric
    log_density, below = law.log_prob(value), law.cdf(value)
    assert log_density[:2].tolist() == [-math.inf] * 2 and below[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(log_density[2], exact.log_prob(value[2]))
    torch.testing.assert_close(below[2], exact.cdf(value[2]))
    (slope,) = torch.autograd.grad(log_density[2] + below.sum(), value)
    assert slope.isfinite().all()
    eye = torch.eye(2, dtype=torch.float64)
    joint = Transformed(MultivariateNormal(torch.zeros(2).double(), eye), warp)
    assert joint.log_prob(torch.tensor([-1.0, 2.0]).double()) == -math.inf


def test_above_its_range_a_transformed_law_has_probability_one() -> None:
    negative = ComposeTransform([ExpTransform(), AffineTransform(0, -1)])  # decreasing, to y < 0
    law = Transformed(Normal(torch.zeros(2).double(), 1.0), negative)
    value = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert law.log_prob(value)[0] == -math.inf and law.log_prob_error(value).tolist() == [0, 0]
    torch.testing.assert_close(law.cdf(value), torch.tensor([1.0, 0.5]).double())


def test_quantiles_are_found_without_moments() -> None:
    level = torch.tensor([1e-3, 0.3, 0.5, 0.999], dtype=torch.float64)
    cauchy = Cauchy(torch.full((4,), 3.0).double(), 2.0)
    torch.testing.assert_close(invert_cdf(cauchy, level), cauchy.icdf(level), rtol=1e-9, atol=0)
    far = torch.tensor([0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    mixture = MixtureOf(torch.zeros(2), [cauchy, cauchy])
    torch.testing.assert_close(mixture.icdf(far), cauchy.icdf(far), rtol=1e-9, atol=0)


# priors


@pytest.fixture(scope="module")
def task() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tasks = SMOOTH.sample(1, 16, 1, generator=generator(1))
    return tasks.x[0, :10], tasks.y[0, :10], tasks.x[0, 10:], tasks.y[0, 10:]


def test_the_posterior_is_the_evidence_weighted_sum(task: tuple[Tensor, ...]) -> None:
    x, y, x_query, y_query = task
    prior = Mixture([SMOOTH, ROUGH, LINE], (0.2, 0.5, 0.3))
    evidence = [part.log_evidence((x, y)) for part in (SMOOTH, ROUGH, LINE)]
    joint = torch.stack(evidence) + torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    predictive = [part.posterior((x, y), x_query) for part in (SMOOTH, ROUGH, LINE)]
    log_densities = torch.stack([p.log_prob(y_query) for p in predictive])
    total = joint.logsumexp(0)
    expected = (joint.unsqueeze(-1) + log_densities).logsumexp(0) - total
    posterior = prior.posterior((x, y), x_query)
    torch.testing.assert_close(posterior.log_prob(y_query), expected, atol=1e-12, rtol=0)
    means = torch.stack([p.mean for p in predictive])
    torch.testing.assert_close(posterior.mean, joint.softmax(0) @ means, atol=1e-12, rtol=0)
    torch.testing.assert_close(prior.log_evidence((x, y)), total, atol=1e-12, rtol=0)
    weights = prior.latent_posterior((x, y))["component"].weights
    torch.testing.assert_close(weights, joint.softmax(0), atol=1e-12, rtol=0)


def test_a_joint_density_is_a_difference_of_evidences(task: tuple[Tensor, ...]) -> None:
    x, y, x_query, y_query = task
    prior = Mixture([SMOOTH, ROUGH])
    both = (torch.cat([x, x_query]), torch.cat([y, y_query]))
    expected = prior.log_evidence(both) - prior.log_evidence((x, y))
    joint = prior.posterior((x, y), x_query, joint=True)
    assert joint.batch_shape == () and joint.event_shape == (6,)
    assert float(joint.log_prob(y_query)) == pytest.approx(float(expected), abs=1e-6)


def test_a_batch_is_its_tasks_one_by_one() -> None:
    prior = Mixture([SMOOTH, ROUGH])
    tasks = prior.sample(3, 8, 2, generator=generator())
    x, y, x_query, y_query = tasks.x[:, :5], tasks.y[:, :5], tasks.x[:, 5:], tasks.y[:, 5:]
    batched = prior.posterior((x, y), x_query)
    assert batched.batch_shape == (3, 3)
    for i in range(3):
        single = prior.posterior((x[i], y[i]), x_query[i])
        torch.testing.assert_close(
            single.log_prob(y_query[i]), batched.log_prob(y_query)[i], atol=1e-12, rtol=0
        )
    evidence = [prior.log_evidence((x[i], y[i])) for i in range(3)]
    torch.testing.assert_close(torch.stack(evidence), prior.log_evidence((x, y)))


def test_without_data_the_posterior_is_the_prior() -> None:
    prior = Mixture([SMOOTH, ROUGH], (1.0, 3.0))
    posterior = prior.posterior((torch.empty(0, 1), torch.empty(0)), [0.2, 0.7])
    expected = 0.25 * 1.01 + 0.75 * 2.1
    torch.testing.assert_close(
        posterior.variance, torch.full((2,), expected).double(), atol=1e-7, rtol=0
    )
    assert float(prior.log_evidence((torch.empty(0, 1), torch.empty(0)))) == pytest.approx(0)


def test_the_error_is_that_of_parts_which_state_one(task: tuple[Tensor, ...]) -> None:
    x, y, x_query, y_query = task
    exact = Mixture([SMOOTH, ROUGH]).posterior((x, y), x_query)
    assert (exact.log_prob_error(y_query) == 0).all()
    one = Mixture([LINE]).posterior((x, y), x_query).log_prob_error(y_query)
    torch.testing.assert_close(one, LINE.posterior((x, y), x_query).log_prob_error(y_query))


def test_no_tasks_and_no_queries_are_answered() -> None:
    prior = Mixture([SMOOTH, ROUGH])
    tasks = prior.sample(0, 5, 2, generator=generator())
    assert tasks.x.shape == (0, 5, 2) and tasks.y.shape == (0, 5)
    assert tasks.latents["component"].shape == (0,)
    posterior = prior.posterior(([0.1, 0.6], [0.3, -1.0]), torch.empty(0, 1))
    assert posterior.mean.shape == posterior.log_prob(torch.empty(0)).shape == (0,)


def test_tasks_come_from_the_parts_in_random_order() -> None:
    prior = Mixture([SMOOTH, Coin()], (0.3, 0.7))
    tasks = prior.sample(4000, 3, 1, generator=generator())
    component = tasks.latents["component"]
    share = component.double().mean()
    assert abs(float(share) - 0.7) < 4.9 * math.sqrt(0.21 / 4000)  # 1e-6 of all seeds
    is_coin = tasks.y.abs().eq(1).all(-1)
    assert torch.equal(is_coin, component == 1)
    neighbours = (component[1:] == component[:-1]).double().mean()
    assert abs(float(neighbours) - 0.58) < 4.9 * math.sqrt(0.25 / 2000)
    assert len(tasks.x[:, 0, 0].unique()) == 4000
    again = prior.sample(4000, 3, 1, generator=generator())
    assert torch.equal(tasks.y, again.y)


def test_shared_latents_are_kept_and_no_others() -> None:
    one = GaussianProcess(mean=Normal(0.0, 1.0))
    other = GaussianProcess(kernel=("rbf", "linear"), ard=True)
    tasks = Mixture([one, other]).sample(50, 4, 2, generator=generator())
    assert set(tasks.latents) == {"component", "outputscale", "noise"}
    assert (tasks.latents["noise"] > 0).all()
    mixture = Mixture([one, other, Coin()])
    assert mixture.latent_categories == {
        "component": ["GaussianProcess 1", "GaussianProcess 2", "Coin"]
    }
    assert mixture.latent_units == {"component": ""}
    assert Mixture([one, one]).latent_units["noise"] == "y^2"


def test_conditionals_are_passed_on_where_all_parts_have_them() -> None:
    prior = Mixture([SMOOTH, ROUGH])
    assert isinstance(prior, ConditionalPrior)
    visible = torch.tensor([0, 3, 5])
    tasks: Any = prior.sample_conditional(2000, 5, 1, visible, generator=generator())
    component = tasks.latents["component"]
    noise = torch.tensor([0.01, 0.1], dtype=torch.float64)
    assert torch.equal(tasks.noise, noise[component])
    expected = torch.where(component == 0, 1.0, 2.0).double()
    torch.testing.assert_close(tasks.variance[:, 0], expected)
    assert not isinstance(Mixture([SMOOTH, Coin()]), ConditionalPrior)


def test_bends_are_those_of_the_part() -> None:
    prior = Mixture([Searched(SMOOTH, bent=1.0), SMOOTH])
    tasks: Any = prior.sample_conditional(500, 5, 1, torch.tensor([5]), generator=generator())
    plain = tasks.latents["component"] == 1
    z = torch.randn(500, 3, dtype=torch.float64, generator=generator())
    bent = (tasks.bend.curve > 0) | (tasks.bend.leak < 1)
    assert bool(bent.any()) and not bool((bent & plain).any())
    assert torch.equal(tasks.bend(z)[plain], z[plain])
    none: Any = Mixture([Searched(SMOOTH), SMOOTH])
    assert none.sample_conditional(2, 5, 1, torch.tensor([5]), generator=generator()).bend is None


def test_parts_without_a_posterior_are_named() -> None:
    with pytest.raises(ValueError, match="Coin does not"):
        Mixture([SMOOTH, Coin()]).posterior(([0.1], [0.2]), [0.3])
    assert not Mixture([SMOOTH, Coin()]).posterior_is_quick(1)
    assert Mixture([SMOOTH, ROUGH]).posterior_is_quick(1)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (1.0, math.nan)])
def test_weights_are_checked(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="Expected 2 positive weights"):
        Mixture([SMOOTH, ROUGH], weights)
    with pytest.raises(ValueError, match="at least one prior"):
        Mixture([])


def test_a_mixture_survives_the_round_trip_through_json() -> None:
    prior = Mixture([SMOOTH, LINE], (0.5, 0.25))
    rebuilt = from_config(json.loads(json.dumps(to_config(prior))))
    assert isinstance(rebuilt, Mixture) and rebuilt.weights == (0.5, 0.25)
    draws = [p.sample(5, 4, 2, generator=generator()).y for p in (prior, rebuilt)]
    assert torch.equal(*draws)
