"""The experts are exact Gaussian processes: against `priors`, brute force and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pfn.experts import (
    GLOBALS,
    Experts,
    Refinement,
    add,
    correlation,
    evidence_slopes,
    forecast,
    leave_one_out,
    solve,
    to_theta,
)
from priors import GaussianProcess

KERNELS = ("rbf", "matern52", "matern32")
D, E = 2, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hyperparameters(seed: int = 5) -> Tensor:
    values = 0.5 * draw(2, E, D + GLOBALS, seed=seed)
    values[..., D] -= 3.0  # log noise
    return values


X, Y, X_QUERY = draw(2, 7, D).sigmoid(), draw(2, 7, seed=1), draw(2, 5, D, seed=2).sigmoid()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_experts_are_gaussian_processes(n: int) -> None:
    values = hyperparameters()
    theta = to_theta(values)
    solved = solve(theta, X[:, :n], Y[:, :n])
    said = forecast(solved, X_QUERY)
    for i in range(E):
        prior = GaussianProcess(kernel=KERNELS[i * 3 // E], ard=True)
        outputscale = solved.log_variance[:, i].exp()
        latents = {
            "lengthscale": 0.5 / theta.metric[:, i, 0],  # of the unit box; the metric's is twice it
            "outputscale": outputscale,
            "noise": outputscale * theta.noise[:, i],
            "mean": theta.mean[:, i],
        }
        mean, variance = prior.conditional(X[:, :n], Y[:, :n], X_QUERY, latents)
        torch.testing.assert_close(said.mean[..., i], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(said.variance[..., i], variance, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(said.noise[:, 0, i], latents["noise"])
        evidence = prior.log_likelihood(X[:, :n], Y[:, :n], latents)
        torch.testing.assert_close(said.log_evidence[:, 0, i], evidence, rtol=1e-6, atol=1e-6)


def test_the_variance_is_scaled_by_the_residuals() -> None:
    values = hyperparameters()
    values[..., D + 1] = 0.0  # mean
    for factor in (1.0, 100.0):
        y = factor * Y
        solved = solve(to_theta(values), X, y)
        square = torch.einsum("bi,beij,bj->be", y, solved.precision, y)
        expected = values[..., D + 2] + ((1 + square) / (1 + 7)).log()
        torch.testing.assert_close(solved.log_variance, expected)


def test_leaving_one_out_is_solving_without_it() -> None:
    theta = to_theta(hyperparameters())
    solved = solve(theta, X, Y)
    residual, log_std = leave_one_out(solved)
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        fewer = solve(theta, X[:, rest], Y[:, rest])._replace(log_variance=solved.log_variance)
        said = forecast(fewer, X[:, i : i + 1])
        std = (said.variance + said.noise)[:, 0].sqrt()
        torch.testing.assert_close(log_std[:, i], std.log(), rtol=1e-6, atol=1e-6)
        expected = (Y[:, i, None] - said.mean[:, 0]) / std
        torch.testing.assert_close(residual[:, i], expected, rtol=1e-6, atol=1e-6)


def test_slopes_are_derivatives_of_the_evidence_at_fixed_variance() -> None:
    values = hyperparameters().requires_grad_()
    solved = solve(to_theta(values), X, Y)
    held = solved.log_variance.detach()
    square = (solved.pull * (Y.unsqueeze(1) - solved.theta.mean.unsqueeze(-1))).sum(-1)
    own = square * (-solved.log_variance).exp() + 7 * solved.log_variance
    fixed = square * (-held).exp() + 7 * held
    evidence = solved.log_evidence + 0.5 * (own - fixed)
    (expected,) = torch.autograd.grad(evidence.sum(), values)
    found = evidence_slopes(to_theta(values), X, Y)
    torch.testing.assert_close(found[..., : D + 2], expected[..., : D + 2], rtol=1e-7, atol=1e-9)
    moved = solved.theta.log_variance - solved.log_variance
    torch.testing.assert_close(found[..., D + 2], moved)


@pytest.mark.parametrize("seen", range(5))
def test_added_points_condition_as_a_longer_context_would(seen: int) -> None:
    theta = to_theta(hyperparameters())
    few = solve(theta, X[:, :3], Y[:, :3])
    added = add(few, X[:, 3:], Y[:, 3:])
    said = forecast(few, X_QUERY, added, torch.full((5,), seen))
    long = solve(theta, X[:, : 3 + seen], Y[:, : 3 + seen])
    at_once = forecast(long._replace(log_variance=few.log_variance), X_QUERY)
    torch.testing.assert_close(said.mean, at_once.mean)
    torch.testing.assert_close(said.variance, at_once.variance)
    # The evidence of more points at the variance that the first three set.
    square = (long.pull * (Y[:, : 3 + seen].unsqueeze(1) - theta.mean.unsqueeze(-1))).sum(-1)
    variance = few.log_variance
    n = 3 + seen
    own = square * (-long.log_variance).exp() + n * long.log_variance
    fixed = square * (-variance).exp() + n * variance
    expected = long.log_evidence + 0.5 * (own - fixed)
    torch.testing.assert_close(said.log_evidence[:, 0], expected)


def test_gradients_match_finite_differences() -> None:
    def answer(values: Tensor, x: Tensor, y: Tensor, x_query: Tensor) -> tuple[Tensor, ...]:
        solved = solve(to_theta(values), x, y)
        added = add(solved, x_query[:, 1:], y[:, :2])
        said = forecast(solved, x_query[:, :2], added, torch.tensor([0, 2]))
        return (*said, *leave_one_out(solved), evidence_slopes(to_theta(values), x, y))

    inputs = (hyperparameters()[:1], X[:1, :4], Y[:1, :4], X_QUERY[:1, :3])
    inputs = tuple(value.clone().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(answer, inputs, atol=1e-5)


def test_repeated_and_noiseless_points_have_finite_answers_and_gradients() -> None:
    values = hyperparameters()
    values[..., D] = -50.0
    values.requires_grad_()
    x = X[:, :1].expand(2, 7, D).clone().requires_grad_()
    solved = solve(to_theta(values), x, Y)
    said = forecast(solved, torch.cat([x, X_QUERY], 1))
    slopes = evidence_slopes(to_theta(values), x, Y)
    total = sum(part.sum() for part in (*said, *leave_one_out(solved), slopes))
    assert isinstance(total, Tensor)
    total.backward()
    for value in (total, values.grad, x.grad):
        assert value is not None and value.isfinite().all()


def test_correlations_far_apart_are_no_denormal_numbers() -> None:
    zero, far = torch.zeros(1, 3, 1, 1).double(), torch.full((1, 3, 1, 1), 1e4).double()
    value = correlation(zero, far, torch.float32)
    assert (value > 1e-30).all() and (value < 1e-5).all()


def test_a_new_bank_proposes_the_same_to_every_task_and_refines_nothing() -> None:
    torch.manual_seed(0)
    experts = Experts(width=8, experts=E, max_features=3, latent_slots=2, refinements=2)
    one, logits, _ = experts.solve(torch.randn(2, 8), None, X, Y)
    other, _, _ = experts.solve(torch.randn(2, 8), torch.randn(2, 6), X, Y)
    assert torch.equal(one.theta.metric, other.theta.metric)
    spread = torch.linspace(-2, 2, E // 3).repeat(3).double()
    expected = (0.5 * (spread - math.log(D))).exp()
    torch.testing.assert_close(one.theta.metric[0, :, 0, 0], expected)
    assert not logits.any()


def test_refinement_treats_features_and_experts_alike() -> None:
    torch.manual_seed(0)
    rule = Refinement(8).double()
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter)
    parts = [draw(2, E, 4 + GLOBALS, seed=i) for i in range(4)]
    task = draw(2, 8, seed=9)
    move = rule(*parts, task, 7)
    order, others = torch.tensor([2, 0, 3, 1, 4, 5, 6]), torch.tensor([5, 1, 0, 2, 4, 3])
    shuffled = rule(*(part[..., order] for part in parts), task, 7)
    torch.testing.assert_close(shuffled, move[..., order])
    shuffled = rule(*(part[:, others] for part in parts), task, 7)
    torch.testing.assert_close(shuffled, move[:, others])


def test_slopes_are_constants_in_training_only() -> None:
    torch.manual_seed(0)
    experts = Experts(width=8, experts=E, max_features=3, latent_slots=2, refinements=2).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    grads = []
    for mode in (True, False):
        y = Y.clone().requires_grad_()
        experts.train(mode).solve(draw(2, 8, seed=3), None, X, y)[0].theta.metric.sum().backward()
        grads.append(y.grad)
    assert grads[0] is None and grads[1] is not None and grads[1].any()
