"""Warped priors: warps as maps, and posteriors against those of their bases."""

import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Kumaraswamy,
    LogNormal,
    Normal,
    PowerTransform,
    SoftmaxTransform,
    SoftplusTransform,
    Transform,
)

from priors import BNN, NNGP, GaussianProcess, Tasks, Warped, from_config, to_config
from priors.tasks import ConditionalPrior
from priors.warped import SinhArcsinh, WarpedKernel, kumaraswamy, kumaraswamy_inverse

SMOOTH = GaussianProcess(lengthscale=0.4, outputscale=1.0, noise=0.01)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Line:
    """A user's own prior with a posterior but no kernel: f = w x, w ~ N(0, 1), and noise 0.1."""

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        x = torch.rand(batch, n, d, generator=generator, dtype=torch.float64)
        w = torch.randn(batch, d, 1, generator=generator, dtype=torch.float64)
        f = (x @ w).squeeze(-1)
        noise = torch.randn(batch, n, generator=generator, dtype=torch.float64)
        return Tasks(x, f + 0.1**0.5 * noise, f, {})

    def posterior(
        self, context: tuple[Tensor, Tensor], x_query: Tensor, latent: bool = False, **_: Any
    ) -> Normal:
        x, y = context
        precision = torch.eye(x.shape[-1]).double() + x.mT @ x / 0.1
        w = torch.linalg.solve(precision, x.mT @ y / 0.1)
        variance = (x_query @ torch.linalg.inv(precision) * x_query).sum(-1)
        return Normal(x_query @ w, (variance + (0 if latent else 0.1)).sqrt())


# warps


@pytest.mark.parametrize("a", [0.02, 0.3, 1.0, 4.0, 60.0])
@pytest.mark.parametrize("b", [0.02, 0.3, 1.0, 4.0, 60.0])
def test_kumaraswamy_warps_are_the_cdf_and_invertible(a: float, b: float) -> None:
    x = torch.linspace(0.003, 0.997, 301, dtype=torch.float64)
    a_, b_ = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    warped = kumaraswamy(x, a_, b_)
    exact = -np.expm1(b * np.log1p(-(x.numpy() ** a)))
    np.testing.assert_allclose(warped, exact, rtol=1e-10, atol=1e-14)
    assert (warped.diff() >= 0).all()
    # where float64 can tell the warped value from 0 and 1, the inverse recovers x to about
    # eps / (u' x) of its digits
    clear = (warped > 1e-4) & (warped < 1 - 1e-4)
    back = kumaraswamy_inverse(warped, a_, b_)
    torch.testing.assert_close(back[clear], x[clear], rtol=1e-9, atol=1e-12)
    slope = Kumaraswamy(a_, b_).log_prob(x).exp()
    grad = torch.func.vmap(torch.func.grad(lambda v: kumaraswamy(v, a_, b_)))(x)
    torch.testing.assert_close(grad[clear], slope[clear], rtol=1e-8, atol=1e-12)


def test_warps_are_the_identity_outside_the_box_and_continuous_at_its_edges() -> None:
    a, b = torch.tensor(0.7, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    outside = torch.tensor([-3.0, -1e-9, 0.0, 1.0, 1 + 1e-9, 7.0], dtype=torch.float64)
    assert torch.equal(kumaraswamy(outside, a, b), outside)
    assert torch.equal(kumaraswamy_inverse(outside, a, b), outside)
    edges = torch.tensor([1e-14, 1 - 1e-14], dtype=torch.float64)
    near = kumaraswamy(edges, a, b)
    assert near[0] < 1e-9 and near[1] > 1 - 1e-9
    x = torch.cat([outside, edges]).requires_grad_()
    (slope,) = torch.autograd.grad(kumaraswamy(x, a, b).sum(), x)
    assert slope.isfinite().all()


@pytest.mark.parametrize(("skewness", "tail"), [(0.0, 1.0), (0.7, 0.5), (-1.5, 2.0)])
def test_sinh_arcsinh_is_invertible_with_its_jacobian(skewness: float, tail: float) -> None:
    g, z = SinhArcsinh(skewness, tail), torch.linspace(-5, 5, 41, dtype=torch.float64)
    y = g(z)
    torch.testing.assert_close(g.inv(y), z, atol=1e-12, rtol=1e-12)
    slope = torch.func.vmap(torch.func.grad(lambda v: ((v.asinh() + skewness) / tail).sinh()))(z)
    torch.testing.assert_close(g.log_abs_det_jacobian(z, y), slope.log(), atol=1e-12, rtol=0)


# input warps


def test_a_fixed_input_warp_is_the_base_at_warped_inputs() -> None:
    prior = Warped(SMOOTH, input=(0.5, 2.0))
    tasks = prior.sample(2, 14, 2, generator=generator())
    assert set(tasks.latents) == set()
    x, y, x_query, y_query = tasks.x[:, :9], tasks.y[:, :9], tasks.x[:, 9:], tasks.y[:, 9:]
    a, b = torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    inner = (kumaraswamy(x, a, b), y)
    expected = SMOOTH.posterior(inner, kumaraswamy(x_query, a, b)).log_prob(y_query)
    actual = prior.posterior((x, y), x_query).log_prob(y_query)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        prior.log_evidence((x, y)), SMOOTH.log_evidence(inner), atol=1e-10, rtol=0
    )


def test_a_transform_of_inputs_is_the_base_at_its_values() -> None:
    warp = ComposeTransform([AffineTransform(-1.0, 2.0), SoftplusTransform()])
    for base in (SMOOTH, Line()):
        prior = Warped(base, input=warp)
        tasks = prior.sample(1, 12, 2, generator=generator())
        x, y, x_query, y_query = tasks.x[0, :8], tasks.y[0, :8], tasks.x[0, 8:], tasks.y[0, 8:]
        expected = base.posterior((warp(x), y), warp(x_query)).log_prob(y_query)
        actual = prior.posterior((x, y), x_query).log_prob(y_query)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_concentrations_of_one_change_nothing() -> None:
    prior = Warped(SMOOTH, input=(1.0, 1.0))
    tasks = prior.sample(1, 10, 3, generator=generator())
    plain = SMOOTH.log_evidence((tasks.x, tasks.y))
    torch.testing.assert_close(prior.log_evidence((tasks.x, tasks.y)), plain, atol=1e-9, rtol=0)
    none = Warped(SMOOTH, input=None)
    assert torch.equal(
        none.sample(2, 5, 1, generator=generator()).y,
        SMOOTH.sample(2, 5, 1, generator=generator()).y,
    )


def test_random_concentrations_are_integrated_by_quadrature() -> None:
    prior = Warped(SMOOTH)
    assert prior.posterior_is_quick(1)
    tasks = prior.sample(1, 12, 1, generator=generator(3))
    assert tasks.latents["concentration1"].shape == (1, 1)
    x, y, x_query, y_query = tasks.x[0, :9], tasks.y[0, :9], tasks.x[0, 9:], tasks.y[0, 9:]
    z = torch.randn(6000, 2, generator=generator(1), dtype=torch.float64)
    a, b = (0.75 * z).exp().unsqueeze(-1).unbind(1)
    theta = {"concentration1": a, "concentration0": b}
    kernel = WarpedKernel(SMOOTH, prior.input, 0.0)
    theta |= {
        name: torch.full((6000,), v).double()
        for name, v in (("lengthscale", 0.4), ("outputscale", 1.0), ("noise", 0.01), ("mean", 0.0))
    }
    big = [part.expand(6000, *part.shape) for part in (x, y, x_query)]
    likelihood = kernel.log_likelihood(big[0], big[1], theta)
    mean, variance = kernel.conditional(*big, theta)
    predictive = Normal(mean, (variance + 0.01).sqrt()).log_prob(y_query)
    joint = torch.cat([likelihood.unsqueeze(-1), likelihood.unsqueeze(-1) + predictive], -1)
    density = joint.exp().mean(0)
    error = joint.exp().std(0) / math.sqrt(6000)
    evidence = prior.log_evidence((x, y))
    answer = prior.posterior((x, y), x_query).log_prob(y_query)
    exact = torch.cat([evidence.unsqueeze(0), evidence + answer]).exp()
    assert ((exact - density).abs() < 5 * error).all()
    assert (error < 0.1 * density).all()


def test_sequential_monte_carlo_agrees_with_quadrature_within_its_error() -> None:
    prior = Warped(SMOOTH)
    tasks = prior.sample(1, 12, 1, generator=generator(3))
    x, y, x_query, y_query = tasks.x[0, :8], tasks.y[0, :8], tasks.x[0, 8:], tasks.y[0, 8:]
    exact = prior.posterior((x, y), x_query).log_prob(y_query)
    drawn = prior.posterior((x, y), x_query, method="smc")
    gap = (drawn.log_prob(y_query) - exact).abs()
    error = drawn.log_prob_error(y_query)  # type: ignore[attr-defined]
    # eight islands: Student-t of 7 degrees of freedom, 19.3 deviations for 1e-6 of 4 comparisons
    assert (gap < 19.3 * error + 1e-4).all() and error.max() < 0.1


def test_every_task_and_feature_has_a_warp_of_its_own() -> None:
    tasks = Warped(SMOOTH).sample(2000, 2, 3, generator=generator())
    for name in ("concentration1", "concentration0"):
        value = tasks.latents[name]
        assert value.shape == (2000, 3) and len(value.unique()) == 6000
        p_value = stats.kstest(value.log().flatten().numpy() / 0.75, "norm").pvalue
        assert p_value > 1e-6


def test_inputs_of_a_base_without_kernel_are_pulled_back() -> None:
    prior = Warped(Line())
    tasks = prior.sample(500, 6, 2, generator=generator())
    a, b = tasks.latents["concentration1"], tasks.latents["concentration0"]
    warped = kumaraswamy(tasks.x, a.unsqueeze(-2), b.unsqueeze(-2))
    w = torch.linalg.lstsq(warped[:, :2], tasks.f[:, :2].unsqueeze(-1)).solution
    clear = torch.linalg.cond(warped[:, :2]) < 100
    # the round trip loses digits where the warp is flat: 1e-16 over slopes down to 1e-10
    torch.testing.assert_close(
        (warped @ w).squeeze(-1)[clear], tasks.f[clear], atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="Expected a fixed input warp, or a base with a kernel"):
        prior.posterior((tasks.x[0], tasks.y[0]), tasks.x[0])
    assert not prior.posterior_is_quick(1)
    assert prior.latent_units == {"concentration1": "", "concentration0": ""}


def test_irrelevant_features_leave_the_function_alone() -> None:
    prior = Warped(SMOOTH, irrelevant=0.3)
    tasks = prior.sample(3000, 2, 2, generator=generator())
    relevance = tasks.latents["relevance"]
    assert set(relevance.unique().tolist()) == {0.0, 1.0}
    assert abs(float(relevance.mean()) - 0.7) < 4.9 * math.sqrt(0.21 / 6000)
    constant = (tasks.f[:, 0] - tasks.f[:, 1]).abs() < 1e-3
    assert constant[relevance.sum(-1) == 0].all()
    assert constant[relevance.sum(-1) == 2].double().mean() < 0.1


def test_the_posterior_finds_the_irrelevant_feature() -> None:
    x = torch.rand(30, 2, generator=generator(), dtype=torch.float64)
    y = torch.sin(7 * x[:, 0]) + 0.05 * torch.randn(30, generator=generator(1), dtype=torch.float64)
    prior = Warped(
        GaussianProcess(lengthscale=0.3, outputscale=1.0, noise=0.0025), input=None, irrelevant=0.3
    )
    kernel = prior.inner
    subsets = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    theta: dict[str, Tensor] = {"relevance": subsets}
    for name, value in (
        ("lengthscale", 0.3),
        ("outputscale", 1.0),
        ("noise", 0.0025),
        ("mean", 0.0),
    ):
        theta[name] = torch.full((4,), value, dtype=torch.float64)
    likelihood = kernel.log_likelihood(x.expand(4, -1, -1), y.expand(4, -1), theta)
    log_prior = torch.where(subsets == 1, math.log(0.7), math.log(0.3)).sum(-1)
    exact = (likelihood + log_prior).softmax(0) @ subsets
    marginal = prior.latent_posterior((x, y))["relevance"].mean
    torch.testing.assert_close(marginal, exact, atol=0.05, rtol=0)  # 1600 correlated particles
    assert exact[0] > 0.99


def test_conditionals_are_there_for_kernels_without_output_warp() -> None:
    prior = Warped(SMOOTH)
    assert isinstance(prior, ConditionalPrior)
    visible = torch.tensor([0, 4])
    tasks: Any = prior.sample_conditional(5, 4, 2, visible, generator=generator())
    torch.testing.assert_close(tasks.variance[:, 0], torch.ones(5).double())
    assert (tasks.variance[:, 1] < 1).all()
    assert not isinstance(Warped(SMOOTH, output=ExpTransform()), ConditionalPrior)
    assert not isinstance(Warped(Line()), ConditionalPrior)
    again: Any = pickle.loads(pickle.dumps(prior))
    repeated = again.sample_conditional(5, 4, 2, visible, generator=generator())
    assert torch.equal(repeated.mean, tasks.mean)


# output warps

OUTPUTS = [
    ExpTransform(),
    AffineTransform(
        torch.tensor(2.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    ),
    SinhArcsinh(0.4, 0.7),
    ComposeTransform([AffineTransform(0.5, 0.5), SoftplusTransform()]),
]
NAMES = ["exp", "decreasing", "sinh-arcsinh", "softplus"]


@pytest.mark.parametrize("output", OUTPUTS, ids=NAMES)
def test_output_warps_follow_the_change_of_variables(output: Transform) -> None:
    base = GaussianProcess(lengthscale=0.4, outputscale=1.0, noise=LogNormal(-4.0, 0.5))
    prior = Warped(base, input=None, output=output)
    tasks = prior.sample(2, 13, 1, generator=generator(2))
    z = base.sample(2, 13, 1, generator=generator(2))
    torch.testing.assert_close(tasks.y, output(z.y))
    torch.testing.assert_close(tasks.f, output(z.f))
    x, y, x_query, y_query = tasks.x[:, :9], tasks.y[:, :9], tasks.x[:, 9:], tasks.y[:, 9:]
    inner = base.posterior((x, z.y[:, :9]), x_query)
    slope = torch.func.vmap(torch.func.grad(lambda v: output(v)))(z.y.flatten()).reshape(2, 13)
    posterior = prior.posterior((x, y), x_query)
    expected = inner.log_prob(z.y[:, 9:]) - slope[:, 9:].abs().log()
    torch.testing.assert_close(posterior.log_prob(y_query), expected, atol=1e-8, rtol=0)
    evidence = base.log_evidence((x, z.y[:, :9])) - slope[:, :9].abs().log().sum(-1)
    torch.testing.assert_close(prior.log_evidence((x, y)), evidence, atol=1e-8, rtol=0)
    torch.testing.assert_close(
        posterior.cdf(posterior.icdf(torch.tensor(0.3, dtype=torch.float64))),
        torch.full((2, 4), 0.3, dtype=torch.float64),
        atol=1e-10,
        rtol=0,
    )
    error = posterior.log_prob_error(y_query)  # type: ignore[attr-defined]
    assert ((error > 0) & (error < 1e-3)).all()
    joint = prior.posterior((x, y), x_query, joint=True)
    both = prior.log_evidence((tasks.x, tasks.y)) - prior.log_evidence((x, y))
    torch.testing.assert_close(joint.log_prob(y_query), both, atol=1e-4, rtol=0)
    torch.testing.assert_close(joint.mean, posterior.mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output", OUTPUTS, ids=NAMES)
def test_moments_of_warped_outputs_integrate_the_density(output: Transform) -> None:
    prior = Warped(SMOOTH, input=None, output=output)
    posterior = prior.posterior(
        (torch.tensor([0.1, 0.5]), output(torch.tensor([0.3, -1.0], dtype=torch.float64))), [0.3]
    )
    levels = (torch.arange(60000, dtype=torch.float64) + 0.5) / 60000
    values = output(
        SMOOTH.posterior((torch.tensor([0.1, 0.5]), torch.tensor([0.3, -1.0])), [0.3]).icdf(
            levels.unsqueeze(-1)
        )
    )
    # the midpoint rule over quantiles loses the last 2.5e-6 of mass in each tail
    torch.testing.assert_close(posterior.mean, values.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.variance, values.var(0), rtol=1e-3, atol=1e-4)
    again = prior.posterior((torch.empty(0, 1), torch.empty(0)), [0.3, 0.9], latent=True)
    exact = output(Normal(0.0, 1.0).icdf(levels))
    torch.testing.assert_close(again.mean, exact.mean().expand(2), rtol=1e-4, atol=1e-4)


def test_observations_out_of_range_are_refused() -> None:
    prior = Warped(SMOOTH, output=ExpTransform())
    for y in ([1.0, -0.5], [0.0, 1.0]):
        with pytest.raises(ValueError, match="Expected y in the range of the output warp"):
            prior.posterior(([0.1, 0.2], y), [0.5])
        with pytest.raises(ValueError, match="Expected y in the range of the output warp"):
            prior.log_evidence(([0.1, 0.2], y))


def test_units_are_lost_where_warps_bend_them() -> None:
    assert Warped(GaussianProcess()).latent_units["lengthscale"] == ""
    assert Warped(GaussianProcess()).latent_units["noise"] == "y^2"
    warped = Warped(GaussianProcess(), input=None, output=ExpTransform())
    assert warped.latent_units["lengthscale"] == "x" and warped.latent_units["noise"] == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": (1.0, -1.0)}, "two positive concentrations"),
        ({"input": (1.0,)}, "two positive concentrations"),
        ({"input": AffineTransform(0.0, -1.0)}, "increasing transform of inputs"),
        ({"output": PowerTransform(2.0)}, "monotone, elementwise transform"),
        ({"output": SoftmaxTransform()}, "monotone, elementwise transform"),
        ({"irrelevant": 1.0}, "probability irrelevant"),
        ({"base": BNN(), "irrelevant": 0.5}, "base with a kernel"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Warped(**({"base": SMOOTH} | fields))
    with pytest.raises(ValueError, match="positive tail"):
        SinhArcsinh(tail=0.0)


@pytest.mark.parametrize("base", [NNGP(), BNN()], ids=["nngp", "bnn"])
def test_any_base_can_be_warped(base: Any) -> None:
    tasks = Warped(base, output=ExpTransform()).sample(4, 10, 2, generator=generator())
    assert tasks.y.shape == (4, 10) and (tasks.y > 0).all() and tasks.x.dtype == torch.float64


def test_a_warped_prior_survives_the_round_trip_through_json() -> None:
    prior = Warped(GaussianProcess(ard=True), irrelevant=0.2)
    rebuilt = from_config(json.loads(json.dumps(to_config(prior))))
    draws = [p.sample(5, 4, 2, generator=generator()).y for p in (prior, rebuilt)]
    assert torch.equal(*draws)
    with pytest.raises(ValueError, match="Expected a"):
        to_config(Warped(SMOOTH, output=SinhArcsinh()))
