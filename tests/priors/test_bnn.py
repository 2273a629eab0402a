"""Draws of Bayesian neural networks against closed forms, and their wide limit."""

import json
import math
import sys
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.distributions import InverseGamma, LogNormal

import priors
from priors import BNN, ConditionalPrior, from_config, to_config
from priors.bnn import ACTIVATIONS
from priors.infinite_width import nngp, nngp_variance
from priors.inputs import draw_inputs, standardise_inputs

# sqrt(log(2 / p) / 2n) bounds a Kolmogorov-Smirnov distance but for p = 1e-6 of all seeds (DKW)
DKW = math.sqrt(math.log(2e6) / 2)
HIERARCHICAL = BNN(weight_variance=InverseGamma(2.0, 1.0), bias_variance=InverseGamma(3.0, 1.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ks_distance(pit: Tensor) -> float:
    """Largest distance between the empirical cdf of `pit` and the uniform one."""
    return float(scipy.stats.kstest(pit.numpy(), "uniform").statistic)


def kernel(prior: BNN, x: Tensor) -> Tensor:
    """The covariance of infinitely wide networks with the same variances."""
    return nngp(
        standardise_inputs(x),
        standardise_inputs(x),
        activation=prior.activation,
        depth=prior.depth,
        weight_variance=prior.weight_variance,  # type: ignore[arg-type]
        bias_variance=prior.bias_variance,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("activation", ["relu", "erf", "gelu"])
def test_one_hidden_layer_of_any_width_has_the_covariance_of_infinitely_many(
    activation: str,
) -> None:
    # because the readout is linear and hidden units are independent and alike
    prior = BNN(3, depth=1, activation=activation, weight_variance=2.0, bias_variance=0.3)
    x = torch.rand(4, 2, dtype=torch.float64, generator=generator(1))
    parameters = prior.draw_parameters(200_000, 2, generator=generator())
    f = prior.functions(parameters, x.expand(200_000, 4, 2))
    products = f.unsqueeze(-1) * f.unsqueeze(-2)
    error = products.std(0) / math.sqrt(len(f))
    # 5.5 standard errors: 1e-6 in ten different entries
    assert ((products.mean(0) - kernel(prior, x)).abs() < 5.5 * error).all()
    assert (f.mean(0).abs() < 5.5 * f.std(0) / math.sqrt(len(f))).all()


@pytest.mark.parametrize("activation", ["relu", "erf", "gelu"])
def test_wide_networks_have_the_kernel_of_infinitely_wide_ones(activation: str) -> None:
    prior = BNN(2048, depth=2, activation=activation, weight_variance=2.0, bias_variance=0.3)
    x = torch.rand(8, 5, dtype=torch.float64, generator=generator(1))
    covariances, networks = [], 4
    for seed in range(networks):
        parameters = prior.draw_parameters(1, 5, generator=generator(seed))
        basis = prior.readout_basis(parameters, x.unsqueeze(0)).squeeze(0)
        covariances.append(basis @ basis.T)
    exact = kernel(prior, x)
    error = (torch.stack(covariances).mean(0) - exact).norm() / exact.norm()
    # 4 sigma, with the variance of E[phi^2]'s estimate of each layer: 5 of ReLU, 2 of bounded units
    spread = 5 if activation in ("relu", "gelu") else 2
    assert float(error) < 4 * math.sqrt(spread * prior.depth / (prior.width * networks))


def test_hierarchical_functions_have_heavy_tails_within_one_batch() -> None:
    tiny = (
        1e-12  # a readout without bias: f is normal given hidden units and their weights' variance
    )
    prior = BNN(depth=1, weight_variance=(1.0, InverseGamma(2.0, 3.0)), bias_variance=(1.0, tiny))
    parameters = prior.draw_parameters(50_000, 1, generator=generator())
    x = torch.full((50_000, 1, 1), 0.9, dtype=torch.float64)
    size = prior.features(parameters, x).square().mean(-1).sqrt()
    ratio = (prior.functions(parameters, x) / size).squeeze(-1)
    # sqrt(v) z with v ~ InverseGamma(a, b) is Student's t with 2 a degrees of freedom
    pit = torch.from_numpy(scipy.stats.t(4, scale=math.sqrt(3 / 2)).cdf(ratio.numpy()))
    assert ks_distance(pit) < DKW / math.sqrt(len(pit))
    normal = torch.special.ndtr(ratio / ratio.std())
    assert ks_distance(normal) > 2 * DKW / math.sqrt(len(pit))  # the test tells the two apart


def test_every_function_and_layer_has_its_own_variances() -> None:
    latents = HIERARCHICAL.sample(5000, 1, 1, generator=generator()).latents
    assert list(latents) == [
        f"{kind}_variance_{i}" for kind in ("weight", "bias") for i in (1, 2, 3)
    ] + ["noise"]
    assert set(latents) <= set(HIERARCHICAL.latent_units)
    for name, value in latents.items():
        assert value.shape == (5000,) and value.dtype == torch.float64
        shape = 3 if "bias" in name else 2
        law = scipy.stats.invgamma(shape)
        if name == "noise":
            law = scipy.stats.lognorm(1.5, scale=math.exp(-4.0))
        assert ks_distance(torch.from_numpy(law.cdf(value.numpy()))) < DKW / math.sqrt(5000)
    ranks = torch.stack([value.argsort().argsort() for value in latents.values()]).double()
    correlation = torch.corrcoef(ranks) - torch.eye(7)
    assert correlation.abs().max() < 5.5 / math.sqrt(5000)  # 1e-6 in 21 pairs


@pytest.mark.parametrize("prior", [BNN(), HIERARCHICAL, BNN(activation="relu", depth=4, width=9)])
def test_sampling_in_single_precision_does_no_harm(prior: BNN) -> None:
    tasks = prior.sample(300, 20, 3, generator=generator(4))
    parameters = prior.draw_parameters(300, 3, generator=generator(4))
    exact = prior.functions(parameters, tasks.x)
    scale = exact.square().mean(-1, keepdim=True).sqrt() + 1e-3
    # float32 rounds by 6e-8, amplified by each layer and, where units saturate, by their inputs
    assert ((tasks.f - exact).abs() < 1e-4 * scale).all()
    assert (((tasks.f - exact) / scale).square().mean().sqrt()) < 2e-6
    residual = (tasks.y - tasks.f) / parameters.noise.sqrt().unsqueeze(-1)
    assert ks_distance(torch.special.ndtr(residual.flatten())) < DKW / math.sqrt(6000)


def test_tasks_are_float64_in_the_box_and_repeat_with_the_seed() -> None:
    tasks, again = (BNN().sample(7, 11, 2, generator=generator(5)) for _ in range(2))
    assert tasks.x.shape == (7, 11, 2) and tasks.y.shape == tasks.f.shape == (7, 11)
    assert {part.dtype for part in (tasks.x, tasks.y, tasks.f)} == {torch.float64}
    assert tasks.num_context is None and ((tasks.x >= 0) & (tasks.x <= 1)).all()
    assert torch.equal(tasks.y, again.y)
    assert not torch.equal(tasks.y, BNN().sample(7, 11, 2, generator=generator(6)).y)
    assert BNN().sample(0, 5, 2, generator=generator()).y.shape == (0, 5)
    assert BNN().sample(3, 0, 2, generator=generator()).y.shape == (3, 0)


def test_tasks_of_a_batch_are_independent() -> None:
    tasks = replace(HIERARCHICAL, width=3).sample(40_000, 1, 1, generator=generator())
    rank = tasks.f.flatten().argsort().argsort().double() / 40_000 - 0.5  # heavy tails have none
    product = 12 * rank[0::2] * rank[1::2]
    assert abs(float(product.mean())) < 5 * float(product.std()) / math.sqrt(20_000)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_function_is_that_of_linear_layers(activation: str) -> None:
    prior = BNN(5, depth=3, activation=activation)
    drawn = prior.draw_parameters(1, 2, generator=generator())
    variances = torch.linspace(0.5, 2, 8, dtype=torch.float64).reshape(2, 1, 4)
    parameters = drawn._replace(weight_variance=variances[0], bias_variance=variances[1])
    x = torch.rand(1, 6, 2, dtype=torch.float64, generator=generator())
    module = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "gelu": nn.GELU(), "erf": torch.erf}[activation]
    h = math.sqrt(12) * (x[0] - 0.5)
    for layer in range(4):
        linear = nn.Linear(h.shape[-1], 1 if layer == 3 else 5).double()
        z = parameters.weights[layer][0]
        with torch.no_grad():
            linear.bias.copy_(variances[1, 0, layer].sqrt() * z[0])
            linear.weight.copy_((variances[0, 0, layer] / linear.in_features).sqrt() * z[1:].T)
            h = linear(h if layer == 0 else module(h))
    torch.testing.assert_close(prior.functions(parameters, x)[0], h[:, 0], atol=1e-12, rtol=0)


def test_functions_are_differentiable_in_the_variances() -> None:
    prior = BNN(4, depth=2, activation="gelu")
    drawn = prior.draw_parameters(2, 1, generator=generator())
    x = torch.rand(2, 3, 1, dtype=torch.float64, generator=generator())

    def functions(weight: Tensor, bias: Tensor) -> Tensor:
        return prior.functions(drawn._replace(weight_variance=weight, bias_variance=bias), x)

    variances = [torch.full((2, 3), 0.7, dtype=torch.float64, requires_grad=True) for _ in "wb"]
    assert torch.autograd.gradcheck(functions, variances)


def test_queries_know_their_distribution_given_the_hidden_layer() -> None:
    prior = BNN(7, 2, weight_variance=InverseGamma(3.0, 3.0), noise=0.1)
    assert isinstance(prior, ConditionalPrior)
    visible = torch.tensor([0, 2, 5])
    tasks = prior.sample_conditional(4, 5, 2, visible, generator=generator(3))
    parameters = prior.draw_parameters(4, 2, generator=(same := generator(3)))
    x = draw_inputs(("uniform",), 4, 8, 2, generator=same)
    torch.testing.assert_close(torch.cat([tasks.x, tasks.x_query], 1), x)
    basis = prior.readout_basis(parameters, x)
    covariance = basis @ basis.mT
    for i in range(4):
        for j, p in enumerate(visible.tolist()):
            seen = covariance[i, :p, :p] + 0.1 * torch.eye(p, dtype=torch.float64)
            weights = torch.linalg.solve(seen, covariance[i, :p, 5 + j])
            mean = weights @ tasks.y[i, :p]
            variance = covariance[i, 5 + j, 5 + j] - weights @ covariance[i, :p, 5 + j]
            torch.testing.assert_close(tasks.mean[i, j], mean, atol=1e-7, rtol=0)
            torch.testing.assert_close(tasks.variance[i, j], variance, atol=1e-7, rtol=0)


def test_without_observations_the_posterior_is_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "priors.bnn_nuts", None)  # it takes no NUTS
    prior = BNN(7, depth=1, activation="erf", noise=LogNormal(-2.0, 0.5))
    x = torch.tensor([[0.0], [0.4]], dtype=torch.float64)
    posterior = prior.posterior((torch.empty(0, 1), torch.empty(0)), x)
    assert posterior.mean.tolist() == [0, 0]
    exact = nngp_variance(
        standardise_inputs(x), activation="erf", depth=1, weight_variance=1.0, bias_variance=1.0
    )
    exact = exact + prior.noise.mean  # type: ignore[union-attr]
    variances = posterior.component_distribution.variance  # type: ignore[attr-defined]
    error = variances.std(-1) / math.sqrt(variances.shape[-1])
    assert ((posterior.variance - exact).abs() < 5 * error).all()
    joint = prior.posterior((torch.empty(0, 1), torch.empty(0)), x, joint=True)
    assert joint.event_shape == (2,)
    torch.testing.assert_close(joint.variance, posterior.variance)


def test_numpyro_is_asked_for_where_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(priors, "bnn_nuts", raising=False)
    monkeypatch.setitem(sys.modules, "priors.bnn_nuts", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pfn\[reference\]'"):
        BNN().posterior(([0.1], [0.2]), [0.3])


def test_its_config_builds_it_again() -> None:
    layers = (InverseGamma(2.0, 1.0), 0.5, InverseGamma(3.0, 1.0))
    prior = BNN(8, weight_variance=layers, bias_variance=(0.0, 1.0, 2.0), noise=0.1)
    config = to_config(prior)
    again = from_config(json.loads(json.dumps(config)))
    assert to_config(again) == config
    assert torch.equal(
        prior.sample(2, 3, 1, generator=generator()).y,
        again.sample(2, 3, 1, generator=generator()).y,
    )
    assert list(prior.sample(1, 1, 1, generator=generator()).latents) == [
        "weight_variance_1",
        "weight_variance_3",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "sine"}, "Expected an activation among"),
        ({"depth": 5}, "Expected a depth from 1 to 4"),
        ({"width": 0}, "positive width"),
        ({"weight_variance": (1.0, 1.0)}, "for each of 3 layers; got 2"),
        ({"weight_variance": 0.0}, "Expected a positive weight_variance_1"),
        ({"bias_variance": -1.0}, "Expected a positive bias_variance_1"),
        ({"noise": 0.0}, "Expected a positive noise"),
        ({"inputs": "sobol"}, "Expected inputs among"),
    ],
)
def test_impossible_networks_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BNN(**arguments)  # type: ignore[arg-type]
