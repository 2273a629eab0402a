"""The experts are exact Gaussian processes: against `priors`, brute force and autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import pfn
import pfn.experts
from pfn.experts import (
    GLOBALS,
    HIGHEST,
    SCALES,
    Experts,
    Points,
    Refinement,
    Solved,
    Theta,
    add,
    correlation,
    evidence_slopes,
    forecast,
    kernel_of_each,
    leave_one_out,
    seen_by_each,
    solve,
    to_theta,
)
from pfn.transformer import Latent, TransformerConfig
from priors import GaussianProcess

KERNELS = ("rbf", "matern52", "matern32")
D, E = 2, 6
CONFIG = TransformerConfig(
    max_features=3,
    width=8,
    heads=2,
    components=E,
    refinements=2,
    latents=(Latent("noise"), Latent("mean")),
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hyperparameters(seed: int = 5) -> Tensor:
    values = 0.5 * draw(2, E, D + GLOBALS, seed=seed)
    values[..., D] -= 3.0  # log noise
    return values


def each(x: Tensor, y: Tensor) -> Points:
    return seen_by_each(E, x, y)


def by_expert(value: Tensor) -> Tensor:
    """(b e, ...) as (b, e, ...)."""
    return value.unflatten(0, (-1, E))


X, Y, X_QUERY = draw(2, 7, D).sigmoid(), draw(2, 7, seed=1), draw(2, 5, D, seed=2).sigmoid()


@pytest.mark.parametrize("n", [0, 1, 7])
def test_experts_are_gaussian_processes(n: int) -> None:
    values = hyperparameters()
    theta = to_theta(values, KERNELS)
    solved = solve(theta, each(X[:, :n], Y[:, :n]))
    said = forecast(solved, X_QUERY)
    for i in range(E):
        prior = GaussianProcess(kernel=KERNELS[i * 3 // E], ard=True)
        outputscale = by_expert(solved.log_variance)[:, i, 0].exp()
        metric = by_expert(theta.metric)[:, i, 0] / math.sqrt(SCALES[KERNELS[i * 3 // E]])
        latents = {
            "lengthscale": 0.5 / metric,  # of the unit box; the metric's is twice it
            "outputscale": outputscale,
            "noise": outputscale * by_expert(theta.noise)[:, i, 0],
            "mean": by_expert(theta.mean)[:, i, 0],
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
        solved = solve(to_theta(values, KERNELS), each(X, y))
        square = torch.einsum("bi,beij,bj->be", y, by_expert(solved.precision), y)
        expected = values[..., D + 2] + ((1 + square) / (1 + 7)).log()
        torch.testing.assert_close(by_expert(solved.log_variance).squeeze(-1), expected)


@pytest.mark.parametrize(("recorded", "calls"), [(False, 2 * E // 4), (True, 1)])
def test_experts_of_large_contexts_are_solved_in_pieces(
    monkeypatch: pytest.MonkeyPatch, recorded: bool, calls: int
) -> None:
    theta = to_theta(hyperparameters(), KERNELS)
    points = seen_by_each(E, draw(2, 7, D).sigmoid(), draw(2, 7, seed=1).requires_grad_(recorded))
    at_once, slopes = solve(theta, points), evidence_slopes(theta, points)
    monkeypatch.setattr("pfn.experts.AT_ONCE_CPU", 4 * 7 * 7)
    counted = Mock(side_effect=pfn.experts._solve)
    monkeypatch.setattr("pfn.experts._solve", counted)
    for one, other in zip(solve(theta, points)[1:], at_once[1:], strict=True):
        torch.testing.assert_close(one, other)
    assert counted.call_count == calls
    torch.testing.assert_close(evidence_slopes(theta, points), slopes)


@torch.no_grad()
def test_rows_of_a_grid_are_chosen_from_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pfn.experts.REFINED", 44)
    x = torch.cartesian_prod(torch.linspace(0, 1, 44), torch.linspace(0, 1, 5)).unsqueeze(0)
    chosen, _ = pfn.experts._some_of(x, x.sum(-1))
    assert chosen.shape == (1, 44, 2)
    assert len(chosen[0, :, 1].unique()) == 5
    assert len(chosen[0, :, 0].unique()) > 20


@torch.no_grad()
def test_hyperparameters_of_large_contexts_are_refined_on_some_of_their_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pfn.load("gp-1d")
    assert model.prior is not None
    tasks = model.prior.sample(4, 240, 1, generator=torch.Generator().manual_seed(0))
    x, y, query = tasks.x[:, :220], tasks.y[:, :220], tasks.x[:, 220:]
    whole = model.predict((x, y), query)
    monkeypatch.setattr("pfn.experts.REFINED", 80)
    some = model.predict((x, y), query)
    order = torch.randperm(220, generator=torch.Generator().manual_seed(1))
    shuffled = model.predict((x[:, order], y[:, order]), query)
    assert not torch.equal(some.mean, whole.mean)
    torch.testing.assert_close(shuffled.mean, some.mean, rtol=1e-3, atol=1e-3)
    assert float((some.mean - whole.mean).abs().div(whole.stddev).max()) < 0.3
    assert float((some.stddev / whole.stddev).log().abs().max()) < 0.3


def test_leaving_one_out_is_solving_without_it() -> None:
    theta = to_theta(hyperparameters(), KERNELS)
    solved = solve(theta, each(X, Y))
    residual, log_std = (by_expert(value).mT for value in leave_one_out(solved))
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        fewer = solve(theta, each(X[:, rest], Y[:, rest]))
        fewer = fewer._replace(log_variance=solved.log_variance)
        said = forecast(fewer, X[:, i : i + 1])
        std = (said.variance + said.noise)[:, 0].sqrt()
        torch.testing.assert_close(log_std[:, i], std.log(), rtol=1e-6, atol=1e-6)
        expected = (Y[:, i, None] - said.mean[:, 0]) / std
        torch.testing.assert_close(residual[:, i], expected, rtol=1e-6, atol=1e-6)


def test_slopes_are_derivatives_of_the_evidence_at_fixed_variance() -> None:
    values = hyperparameters().requires_grad_()
    solved = solve(to_theta(values, KERNELS), each(X, Y))
    variance = solved.log_variance.detach()
    (expected,) = torch.autograd.grad(evidence_at(solved, variance).sum(), values)
    found = by_expert(evidence_slopes(to_theta(values, KERNELS), each(X, Y)))
    torch.testing.assert_close(found[..., : D + 2], expected[..., : D + 2], rtol=1e-7, atol=1e-9)
    moved = solved.theta.log_variance - solved.log_variance
    torch.testing.assert_close(found[..., D + 2 :], by_expert(moved))


def evidence_at(solved: Solved, log_variance: Tensor) -> Tensor:
    """The evidence (g, 1) of all of X, Y had the function another variance."""
    n = solved.pull.shape[1]
    square = (solved.pull * (each(X, Y).y[:, :n] - solved.theta.mean)).sum(-1, keepdim=True)

    def terms(log_variance: Tensor) -> Tensor:
        return square * (-log_variance).exp() + n * log_variance

    return solved.log_evidence + 0.5 * (terms(solved.log_variance) - terms(log_variance))


@pytest.mark.parametrize("seen", range(5))
def test_added_points_condition_as_a_longer_context_would(seen: int) -> None:
    theta = to_theta(hyperparameters(), KERNELS)
    few = solve(theta, each(X[:, :3], Y[:, :3]))
    added = add(few, each(X[:, 3:], Y[:, 3:]))
    said = forecast(few, X_QUERY, added, torch.full((5,), seen))
    long = solve(theta, each(X[:, : 3 + seen], Y[:, : 3 + seen]))
    at_once = forecast(long._replace(log_variance=few.log_variance), X_QUERY)
    torch.testing.assert_close(said.mean, at_once.mean)
    torch.testing.assert_close(said.variance, at_once.variance)
    # The evidence of more points at the variance that the first three set.
    expected = by_expert(evidence_at(long, few.log_variance)).mT.expand(2, 5, E)
    torch.testing.assert_close(said.log_evidence, expected)


def test_gradients_match_finite_differences() -> None:
    def answer(values: Tensor, x: Tensor, y: Tensor, x_query: Tensor) -> tuple[Tensor, ...]:
        solved = solve(to_theta(values, KERNELS), each(x, y))
        added = add(solved, each(x_query[:, 1:], y[:, :2]))
        said = forecast(solved, x_query[:, :2], added, torch.tensor([0, 2]))
        return (
            *said,
            *leave_one_out(solved),
            evidence_slopes(to_theta(values, KERNELS), each(x, y)),
        )

    inputs = (hyperparameters()[:1], X[:1, :4], Y[:1, :4], X_QUERY[:1, :3])
    inputs = tuple(value.clone().requires_grad_() for value in inputs)
    assert torch.autograd.gradcheck(answer, inputs, atol=1e-5)


def test_repeated_and_noiseless_points_have_finite_answers_and_gradients() -> None:
    values = hyperparameters()
    values[..., D] = -50.0
    values.requires_grad_()
    x = X[:, :1].expand(2, 7, D).clone().requires_grad_()
    solved = solve(to_theta(values, KERNELS), each(x, Y))
    said = forecast(solved, torch.cat([x, X_QUERY], 1))
    slopes = evidence_slopes(to_theta(values, KERNELS), each(x, Y))
    total = sum(part.sum() for part in (*said, *leave_one_out(solved), slopes))
    assert isinstance(total, Tensor)
    total.backward()
    for value in (total, values.grad, x.grad):
        assert value is not None and value.isfinite().all()


def test_second_derivatives_are_refused() -> None:
    values = hyperparameters().requires_grad_()
    solved = solve(to_theta(values, KERNELS), each(X, Y))
    (first,) = torch.autograd.grad(solved.log_evidence.sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_correlations_far_apart_are_no_denormal_numbers() -> None:
    theta: Theta = to_theta(torch.zeros(1, 3, 1 + GLOBALS), KERNELS)
    zero, far = torch.zeros(3, 1, 1).double(), torch.full((3, 1, 1), 1e4).double()
    value = correlation(theta, zero, far)
    assert value.dtype == torch.float32
    assert (value > 1e-30).all() and (value < 1e-5).all()


def test_a_new_bank_proposes_the_same_to_every_task_and_refines_nothing() -> None:
    torch.manual_seed(0)
    experts = Experts(CONFIG)
    one, logits, _ = experts.solve(torch.randn(2, 8), None, X, Y)
    other, _, _ = experts.solve(torch.randn(2, 8), torch.randn(2, 6), X, Y)
    assert torch.equal(one.theta.metric, other.theta.metric)
    spread = torch.linspace(-2, 2, E // 3).repeat(3)
    scale = torch.tensor([SCALES[name] for name in KERNELS]).repeat_interleave(E // 3)
    expected = scale.sqrt() * (0.5 * (spread - math.log(D))).exp()
    torch.testing.assert_close(by_expert(one.theta.metric)[0, :, 0, 0], expected)
    assert not logits.any()


def test_refinement_treats_features_and_experts_alike() -> None:
    torch.manual_seed(0)
    rule = Refinement(8).double()
    for parameter in rule.parameters():
        torch.nn.init.normal_(parameter)
    known, task = draw(2, E, 4 + GLOBALS, 4), draw(2, 8, seed=9)
    move = rule(known, task)
    order, others = torch.tensor([2, 0, 3, 1, 4, 5, 6]), torch.tensor([5, 1, 0, 2, 4, 3])
    torch.testing.assert_close(rule(known[:, :, order], task), move[:, :, order])
    torch.testing.assert_close(rule(known[:, others], task), move[:, others])


def test_more_data_take_more_steps() -> None:
    config = TransformerConfig(max_features=1, least_refinements=1, refinements=4)
    taken = [config.count_refinements(n) for n in (0, 14, 15, 30, 31, 62, 63, 1000)]
    assert taken == [1, 1, 2, 2, 3, 3, 4, 4]
    config = replace(config, least_refinements=3)
    assert [config.count_refinements(n) for n in (0, 62, 63)] == [3, 3, 4]


def test_experts_share_the_kernels_of_their_configuration() -> None:
    values = hyperparameters()
    banks = ("matern32",), ("rbf", "matern32")
    first, second = (
        by_expert(solve(to_theta(values, kernels), each(X, Y)).log_evidence) for kernels in banks
    )
    assert torch.equal(first[:, E // 2 :], second[:, E // 2 :])
    assert not torch.allclose(first[:, : E // 2], second[:, : E // 2])
    with pytest.raises(ValueError, match="expert_kernels"):
        TransformerConfig(max_features=1, expert_kernels=("cubic",))


def test_experts_start_where_their_own_kernel_does() -> None:
    kernels = ("rbf", "plane", "matern32", "plane")
    config = replace(CONFIG, expert_kernels=kernels)
    names = kernel_of_each(kernels, E)
    start = Experts(config).propose.bias[: E * (3 + GLOBALS)].view(E, -1)[:, 0]
    assert [value <= HIGHEST["plane"] for value in start] == [name == "plane" for name in names]


def test_experts_of_planes_draw_planes() -> None:
    values = hyperparameters()
    values[..., :D] += 3.0  # would be short lengthscales
    theta = to_theta(values, ("plane",))
    x = torch.rand(2, 9, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.1 * draw(2, 9)
    ends = torch.rand(2, 2, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    line = torch.cat([ends, ends.mean(1, keepdim=True)], 1)
    first, last, middle = forecast(solve(theta, each(x, y)), line).mean.unbind(1)
    rough = forecast(solve(to_theta(values, ("rbf",)), each(x, y)), line).mean
    bend, slope = middle - (first + last) / 2, last - first
    assert (bend.abs() < 0.02 * slope.abs()).all()
    assert (rough[:, 2] - rough[:, :2].mean(1)).abs().max() > 0.1


def test_slopes_are_constants_in_training_only() -> None:
    torch.manual_seed(0)
    experts = Experts(CONFIG).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    grads = []
    for mode in (True, False):
        y = Y.clone().requires_grad_()
        experts.train(mode).solve(draw(2, 8, seed=3), None, X, y)[0].theta.metric.sum().backward()
        grads.append(y.grad)
    assert grads[0] is None and grads[1] is not None and grads[1].any()
