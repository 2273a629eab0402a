"""Trained ensembles against matrix functions, Gaussian process regression and finite networks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from priors.dual import ACTIVATIONS
from priors.infinite_width import network_kernels
from priors.inputs import standardise_inputs
from priors.ntk import WideEnsemble, training_response


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=generator(seed))


def task(n: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x = uniform(n + m, d, seed=seed)
    return x[:n], 2 * uniform(n, seed=seed + 1) - 1, x[n:]


def kernels(ensemble: WideEnsemble, x: Tensor, x_query: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance and tangent kernel (n + m, n + m) of training points and queries together."""
    points = standardise_inputs(torch.cat([x, x_query]))
    return network_kernels(
        points,
        points,
        activation=ensemble.activation,
        depth=ensemble.depth,
        weight_variance=ensemble.weight_variance,
        bias_variance=ensemble.bias_variance,
    )


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("time", [0.0, 0.4, math.inf])
def test_the_ensemble_has_the_published_mean_and_covariance(
    activation: str, ridge: float, time: float
) -> None:
    # Lee et al. (2019), equations 14 and 15: matrix functions of the tangent kernel
    x, y, x_query = task(5, 4, 3)
    ensemble = WideEnsemble(activation=activation, ridge=ridge, time=time)
    covariance, tangent = kernels(ensemble, x, x_query)
    seen = tangent[:5, :5] + ridge * torch.eye(5, dtype=torch.float64)
    decay = torch.zeros_like(seen) if time == math.inf else torch.matrix_exp(-time * seen)
    remainder = torch.eye(5, dtype=torch.float64) - decay
    response = tangent[5:, :5] @ torch.linalg.inv(seen) @ remainder
    mixed = response @ covariance[:5, 5:]
    expected = covariance[5:, 5:] + response @ covariance[:5, :5] @ response.mT - mixed - mixed.mT
    predicted = ensemble.predict((x, y), x_query, joint=True)
    assert isinstance(predicted, MultivariateNormal)
    torch.testing.assert_close(predicted.mean, response @ y, atol=1e-10, rtol=0)
    # with the jitter of 1e-10 of the prior variance
    torch.testing.assert_close(predicted.covariance_matrix, expected, atol=2e-9, rtol=0)
    marginal = ensemble.predict((x, y), x_query)
    assert isinstance(marginal, Normal)
    torch.testing.assert_close(marginal.mean, predicted.mean)
    torch.testing.assert_close(marginal.variance, predicted.variance, atol=2e-9, rtol=0)


def test_the_mean_is_gaussian_process_regression_with_the_tangent_kernel() -> None:
    x, y, x_query = task(8, 5, 2)
    ensemble = WideEnsemble("gelu", ridge=0.1)
    _, tangent = kernels(ensemble, x, x_query)
    noisy = tangent[:8, :8] + 0.1 * torch.eye(8, dtype=torch.float64)
    solved = torch.linalg.solve(noisy, y)
    predicted = ensemble.predict((x, y), x_query)
    torch.testing.assert_close(predicted.mean, tangent[8:, :8] @ solved, atol=1e-11, rtol=0)
    # but its spread is not that of the regression, which is far larger
    posterior = tangent[8:, 8:] - tangent[8:, :8] @ torch.linalg.solve(noisy, tangent[:8, 8:])
    assert (posterior.diagonal() > 1.5 * predicted.variance).all()


def test_a_linear_model_trains_to_its_posterior() -> None:
    # without hidden layers T = K, and the ensemble without noise is the posterior (n < d + 1)
    x, y, x_query = task(3, 4, 5)
    ensemble = WideEnsemble(depth=0)
    covariance, tangent = kernels(ensemble, x, x_query)
    torch.testing.assert_close(covariance, tangent)
    gain = torch.linalg.solve(covariance[:3, :3], covariance[:3, 3:])
    predicted = ensemble.predict((x, y), x_query)
    expected = (covariance[3:, 3:] - covariance[3:, :3] @ gain).diagonal()
    torch.testing.assert_close(predicted.mean, gain.mT @ y, atol=1e-10, rtol=0)
    torch.testing.assert_close(predicted.variance, expected, atol=1e-9, rtol=0)


def test_the_response_follows_the_gradient_flow_of_a_linearised_model() -> None:
    # Euler steps in the parameters of f = f_0 + J (theta - theta_0), with a pull to theta_0
    jacobian = torch.randn(7, 30, dtype=torch.float64, generator=generator()) / math.sqrt(30)
    y, f = uniform(4, seed=1), uniform(7, seed=2)
    ridge, steps, time = 0.2, 20000, 3.0
    moved = torch.zeros(30, dtype=torch.float64)
    for _ in range(steps):
        error = f[:4] + jacobian[:4] @ moved - y
        moved = moved - time / steps * (jacobian[:4].mT @ error + ridge * moved)
    tangent = jacobian @ jacobian.mT
    response = training_response(tangent[:4, :4], tangent[4:, :4], ridge=ridge, time=time)
    # one Euler step errs by half its square
    expected = jacobian[4:] @ moved
    torch.testing.assert_close(response @ (y - f[:4]), expected, atol=5 * time / steps, rtol=0)


def random_networks(
    x: Tensor, ensemble: WideEnsemble, width: int, nets: int, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Outputs (net, point) and tangent kernels (net, point, point) of networks at initialisation.

    By forward and backward passes in which all weights are standard normal.
    """
    assert isinstance(ensemble.activation, str)
    phi = ACTIVATIONS[ensemble.activation].function
    weight, bias = ensemble.weight_variance, ensemble.bias_variance

    def draw(*shape: int) -> Tensor:
        return torch.randn(nets, *shape, dtype=torch.float64, generator=generator)

    hidden, layers = x.expand(nets, *x.shape), []
    for _ in range(ensemble.depth):
        fan_in = hidden.shape[-1]
        w = draw(fan_in, width)
        inner = bias + weight / fan_in * hidden @ hidden.mT
        before = (
            math.sqrt(weight / fan_in) * hidden @ w + math.sqrt(bias) * draw(1, width)
        ).detach()
        before.requires_grad_()
        hidden = phi(before)
        (slope,) = torch.autograd.grad(hidden.sum(), before)
        hidden = hidden.detach()
        layers.append((w, inner, slope, fan_in))
    readout = math.sqrt(weight / width) * draw(width, 1)
    outputs = (hidden @ readout).squeeze(-1) + math.sqrt(bias) * draw(1)
    tangent = bias + weight / width * hidden @ hidden.mT
    backward = readout.mT
    for w, inner, slope, fan_in in reversed(layers):
        backward = backward * slope  # of the output in the preactivations
        tangent = tangent + inner * (backward @ backward.mT)
        backward = backward @ w.mT * math.sqrt(weight / fan_in)
    return outputs, tangent


@pytest.mark.parametrize(
    ("activation", "depth", "width", "nets", "time"),
    [
        ("relu", 1, 2048, 2000, math.inf),
        ("erf", 1, 2048, 2000, 0.5),
        ("gelu", 2, 512, 400, math.inf),
    ],
)
def test_linearised_finite_networks_train_to_this_ensemble(
    activation: str, depth: int, width: int, nets: int, time: float
) -> None:
    x, y, x_query = task(4, 3, 5, seed=11)
    ensemble = WideEnsemble(activation, depth, ridge=0.5, time=time)
    points, g, size = standardise_inputs(torch.cat([x, x_query])), generator(5), 40
    drawn = [
        random_networks(points, ensemble, width, size, generator=g) for _ in range(nets // size)
    ]
    f, tangent = (torch.cat(column) for column in zip(*drawn, strict=True))
    response = training_response(tangent[:, :4, :4], tangent[:, 4:, :4], ridge=0.5, time=time)
    trained = f[:, 4:] + (response @ (y - f[:, :4]).unsqueeze(-1)).squeeze(-1)
    predicted = ensemble.predict((x, y), x_query, joint=True)
    assert isinstance(predicted, MultivariateNormal)
    exact = predicted.covariance_matrix
    spread = exact.diagonal()
    # 5.5 standard errors, 1e-6 for all entries; and a relative bias of 5 / width per layer, by
    # which the kernels of finite networks fluctuate
    bias = 5 * (depth + 1) / width
    error = 5.5 * (spread / nets).sqrt() + bias
    assert ((trained.mean(0) - predicted.mean).abs() < error).all()
    error = 5.5 * ((spread.outer(spread) + exact.square()) / nets).sqrt() + bias * spread.max()
    assert ((trained.T.cov() - exact).abs() < error).all()
    # sharp enough to tell it from the prior and from regression with the tangent kernel
    covariance, tangent = kernels(ensemble, x, x_query)
    solved = torch.linalg.solve(tangent[:4, :4] + 0.5 * torch.eye(4), tangent[:4, 4:])
    for other in (covariance[4:, 4:], tangent[4:, 4:] - tangent[4:, :4] @ solved):
        assert ((trained.T.cov() - other).abs() > error).any()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_training_to_convergence_interpolates(activation: str) -> None:
    x, y, _ = task(10, 1, 4)
    predicted = WideEnsemble(activation).predict((x, y), x)
    torch.testing.assert_close(predicted.mean, y, atol=1e-6, rtol=0)
    assert (predicted.stddev < 1e-4).all()


def test_conflicting_targets_are_averaged() -> None:
    x = torch.tensor([[0.3], [0.3], [0.8]])
    y = torch.tensor([1.0, -0.5, 0.7])
    for activation in ("relu", "erf"):
        predicted = WideEnsemble(activation).predict((x, y), [[0.3], [0.8]])
        torch.testing.assert_close(
            predicted.mean, torch.tensor([0.25, 0.7]).double(), atol=1e-5, rtol=0
        )


def test_no_data_or_no_time_leave_the_prior() -> None:
    x, y, x_query = task(3, 4, 2)
    ensemble = WideEnsemble()
    covariance, _ = kernels(ensemble, x, x_query)
    empty = (torch.empty(0, 2), torch.empty(0))
    for predicted in (
        ensemble.predict(empty, x_query, joint=True),
        WideEnsemble(time=0.0).predict((x, y), x_query, joint=True),
    ):
        assert isinstance(predicted, MultivariateNormal)
        torch.testing.assert_close(predicted.mean, torch.zeros(4).double())
        torch.testing.assert_close(
            predicted.covariance_matrix, covariance[3:, 3:], atol=2e-9, rtol=0
        )


def test_a_batch_is_its_tasks() -> None:
    x, y, x_query = uniform(3, 6, 2), uniform(3, 6, seed=1), uniform(3, 5, 2, seed=2)
    ensemble = WideEnsemble("gelu")
    joint = ensemble.predict((x, y), x_query, joint=True)
    marginal = ensemble.predict((x, y), x_query)
    assert (joint.batch_shape, joint.event_shape) == ((3,), (5,))
    assert marginal.batch_shape == (3, 5)
    for i in range(3):
        alone = ensemble.predict((x[i], y[i]), x_query[i])
        assert alone.batch_shape == (5,)
        torch.testing.assert_close(marginal.mean[i], alone.mean)
        torch.testing.assert_close(marginal.variance[i], alone.variance)


@pytest.mark.parametrize("wrong", [{"ridge": -0.1}, {"time": -1.0}, {"ridge": math.nan}])
def test_bad_settings_are_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"Expected {name} of at least 0"):
        WideEnsemble(**wrong)
