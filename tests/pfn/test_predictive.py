"""The predictive distribution against integrals of its own density, mpmath, torch and its draws."""

import math
import pickle
from collections.abc import Callable

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from pfn.predictive import Predictive

WEIGHTS = [[1.0, 1.0, 1.0], [0.5, 0.3, 0.2], [0.3, 0.7, 0.0], [0.02, 0.9, 0.08]]
MEANS = [[0.0, 0.1, -0.2], [-3.0, 0.5, 4.0], [0.2, 0.0, 9.0], [6.0, -0.5, 1.0]]
STDS = [[1.0, 0.8, 1.5], [0.4, 1.0, 0.6], [0.05, 1.5, 1.0], [2.0, 0.2, 0.7]]
METHODS: dict[str, Callable[[Predictive], Tensor]] = {
    "mean": lambda q: q.mean,
    "variance": lambda q: q.variance,
    "stddev": lambda q: q.stddev,
    "log_prob": lambda q: q.log_prob(0.7),
    "cdf": lambda q: q.cdf(0.7),
    "icdf": lambda q: q.icdf(0.93),
    "entropy": lambda q: q.entropy(),
    "crps": lambda q: q.crps(0.7),
    "expected_improvement": lambda q: q.expected_improvement(0.7),
    "log_expected_improvement": lambda q: q.log_expected_improvement(0.7, maximize=False),
    "probability_of_improvement": lambda q: q.probability_of_improvement(0.7),
    "upper_confidence_bound": lambda q: q.upper_confidence_bound(2.0),
}


def parameters(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A broad, a three-bump, a narrow-in-broad and a skewed mixture: batch_shape (4,)."""
    weights, means, stds = (torch.tensor(part, dtype=dtype) for part in (WEIGHTS, MEANS, STDS))
    return weights.log(), means, stds


def predictive(dtype: torch.dtype = torch.float64) -> Predictive:
    return Predictive(*parameters(dtype))


def integral(
    f: Callable[[Tensor], Tensor], lower: float = -20.0, upper: float = 25.0, panels: int = 900
) -> Tensor:
    """The integral of f over y, f from (points, 1) to (points, 4), to rounding for our scales."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(10))
    width = (upper - lower) / panels
    left = lower + width * torch.arange(panels, dtype=torch.float64)
    y = (left[:, None] + width * (1 + nodes) / 2).reshape(-1, 1)
    return (f(y) * (weights * width / 2).repeat(panels)[:, None]).sum(0)


def assert_close(
    actual: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-12
) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# Against integrals of the density


def test_the_density_integrates_to_one() -> None:
    q = predictive()
    assert_close(integral(lambda y: q.log_prob(y).exp()), torch.ones(4, dtype=torch.float64))


def test_mean_and_variance_are_moments_of_the_density() -> None:
    q = predictive()
    assert_close(q.mean, integral(lambda y: y * q.log_prob(y).exp()))
    assert_close(q.variance, integral(lambda y: (y - q.mean).square() * q.log_prob(y).exp()))
    assert_close(q.stddev, q.variance.sqrt())


def test_entropy_is_the_integral_to_its_stated_error() -> None:
    q = predictive()
    expected = -integral(lambda y: q.log_prob(y).exp() * q.log_prob(y))
    assert_close(q.entropy(), expected, rtol=0, atol=1e-5)


def test_entropy_of_one_normal_and_of_remote_components_is_known() -> None:
    std, scales = torch.tensor([0.3]), torch.tensor([1e-3, 1.0, 1e3])
    normal = Predictive(torch.zeros(1), torch.tensor([5.0]), std)
    remote = Predictive(torch.zeros(3), torch.tensor([-1e5, 0.0, 1e5]), scales)
    of_unit = 0.5 * math.log(2 * math.pi * math.e)
    assert_close(normal.entropy(), of_unit + std.log()[0], rtol=0, atol=1e-5)
    assert_close(remote.entropy(), of_unit + math.log(3) + scales.log().mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("y", [-3.2, 0.0, 0.21, 4.5])
def test_cdf_and_probability_of_improvement_are_integrals_from_either_side(y: float) -> None:
    q = predictive()
    below = integral(lambda t: q.log_prob(t).exp(), upper=y)
    above = integral(lambda t: q.log_prob(t).exp(), lower=y)
    assert_close(q.cdf(y), below)
    assert_close(q.probability_of_improvement(y), above)
    assert_close(q.probability_of_improvement(y, maximize=False), below)


@pytest.mark.parametrize("best", [-4.0, 0.2, 5.0])
def test_expected_improvement_is_an_integral_in_both_directions(best: float) -> None:
    q = predictive()
    above = integral(lambda y: (y - best) * q.log_prob(y).exp(), lower=best)
    below = integral(lambda y: (best - y) * q.log_prob(y).exp(), upper=best)
    assert_close(q.expected_improvement(best), above)
    assert_close(q.expected_improvement(best, maximize=False), below)
    assert_close(q.log_expected_improvement(best), above.log())
    assert_close(q.log_expected_improvement(best, maximize=False), below.log())


@pytest.mark.parametrize("value", [-3.2, 0.2, 5.0])
def test_crps_is_the_squared_distance_of_the_cdf_to_a_step(value: float) -> None:
    q = predictive()
    below = integral(lambda y: q.cdf(y).square(), upper=value)
    above = integral(lambda y: q.probability_of_improvement(y).square(), lower=value)
    assert_close(q.crps(value), below + above)


def test_torch_agrees_where_it_has_the_method() -> None:
    log_weights, means, stds = parameters()
    theirs = MixtureSameFamily(Categorical(logits=log_weights), Normal(means, stds))
    q, y = predictive(), torch.linspace(-6, 8, 29, dtype=torch.float64).unsqueeze(-1)
    assert_close(q.log_prob(y), theirs.log_prob(y))
    assert_close(q.cdf(y), theirs.cdf(y))
    assert_close(q.mean, theirs.mean)


# Mode and quantiles


def test_no_point_of_a_dense_grid_beats_the_mode() -> None:
    torch.manual_seed(0)
    shape = (60, 6)
    q = Predictive(torch.randn(shape), torch.randn(shape).double(), torch.randn(shape).exp())
    q = Predictive(*(part.double() for part in (q.log_weights, q.means, q.stds)))
    lower, upper = q.means.amin(-1), q.means.amax(-1)  # the mode lies between the means
    grid = lower + (upper - lower) * torch.linspace(0, 1, 2001).double().unsqueeze(-1)
    assert (q.log_prob(grid) <= q.log_prob(q.mode) + 1e-12).all()


def test_spikes_on_the_component_means_do_not_hide_the_mode_between_them() -> None:
    weights = torch.tensor([0.5, 0.5, 1e-6, 1e-6], dtype=torch.float64)
    means = torch.tensor([-0.9, 0.9, -0.9, 0.9], dtype=torch.float64)
    stds = torch.tensor([1.0, 1.0, 1e-4, 1e-4], dtype=torch.float64)
    assert abs(Predictive(weights.log(), means, stds).mode.item()) < 1e-6


def test_quantiles_invert_the_cdf_in_bulk_and_tails() -> None:
    q = predictive()
    tail = torch.tensor([1e-300, 1e-100, 1e-15, 1e-6, 1e-3, 0.1, 0.3, 0.5], dtype=torch.float64)
    tail = tail.unsqueeze(-1)
    # rounding of y alone moves cdf(y) by |y / std| eps times its logarithmic slope, 40 / std
    assert ((q.cdf(q.icdf(tail)) / tail - 1).abs() < 1e-10).all()
    upper = 1 - tail[2:]
    assert ((q.probability_of_improvement(q.icdf(upper)) / (1 - upper) - 1).abs() < 1e-10).all()


def test_quantiles_of_a_batch_are_those_of_its_mixtures() -> None:
    generator = torch.Generator().manual_seed(5)
    logits, means = torch.randn(2, 40, 6, dtype=torch.float64, generator=generator)
    stds = torch.rand(40, 6, dtype=torch.float64, generator=generator) ** 8 + 1e-6
    p = torch.rand(30, 1, dtype=torch.float64, generator=generator)
    together = Predictive(logits, means, stds).icdf(p)  # some of these take many steps, most few
    for i in range(40):
        alone = Predictive(logits[i], means[i], stds[i]).icdf(p.squeeze(-1))
        assert_close(together[:, i], alone, rtol=1e-12, atol=1e-12)


def test_the_cdf_inverts_quantiles() -> None:
    q, y = predictive(), torch.linspace(-1.5, 2.5, 41, dtype=torch.float64).unsqueeze(-1)
    density = q.log_prob(y).exp()
    # a rounding error of the cdf is worth 1 / density in y; the slack covers three components
    error = (q.quantile(q.cdf(y)) - y).abs()
    assert (error <= 4 * torch.finfo(torch.float64).eps * (1 / density + y.abs())).all()


def test_quantiles_of_one_normal_are_exact() -> None:
    q = Predictive(torch.zeros(1), torch.tensor([2.0]).double(), torch.tensor([3.0]).double())
    p = torch.tensor([0.001, 0.3, 0.5, 0.975], dtype=torch.float64)
    assert_close(q.icdf(p), Normal(q.means[0], q.stds[0]).icdf(p), rtol=1e-13)


def test_quantiles_broadcast_and_reach_infinity() -> None:
    q, p = predictive(), torch.tensor([[0.0], [0.2], [1.0]], dtype=torch.float64)
    y = q.icdf(p)
    assert y.shape == (3, 4)
    assert y[0].eq(-torch.inf).all() and y[2].eq(torch.inf).all()
    assert_close(y[1], q.icdf(0.2))
    assert q.icdf(torch.rand(5, 2, 1, 1)).shape == (5, 2, 1, 4)


def test_a_quantile_in_the_empty_gap_between_components_is_finite_with_its_gradient() -> None:
    means = torch.tensor([-1e3, 1e3], dtype=torch.float64, requires_grad=True)
    y = Predictive(torch.zeros(2), means, torch.ones(2)).icdf(0.5)
    (gradient,) = torch.autograd.grad(y, means)
    assert -1e3 < y.item() < 1e3 and gradient.isfinite().all()


def test_intervals_hold_their_mass_with_equal_tails() -> None:
    q = predictive()
    lower, upper = q.interval(0.8)
    assert_close(q.cdf(lower), torch.full((4,), 0.1, dtype=torch.float64))
    assert_close(q.probability_of_improvement(upper), torch.full((4,), 0.1, dtype=torch.float64))


# Draws


@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_draws_pass_a_kolmogorov_smirnov_test(method: str) -> None:
    q, n = predictive(), 20_000
    draws = getattr(q, method)((n,), generator=torch.Generator().manual_seed(0))
    uniform = q.cdf(draws.sort(0).values)
    steps = torch.arange(n + 1, dtype=torch.float64).unsqueeze(-1) / n
    distance = torch.maximum((uniform - steps[:-1]).abs(), (uniform - steps[1:]).abs()).amax(0)
    # P(sqrt(n) D > t) <= 2 exp(-2 t^2): 1e-6 over the four mixtures at t = 2.8
    assert (math.sqrt(n) * distance < 2.8).all()


def test_draws_repeat_with_torchs_seed_and_with_a_generator() -> None:
    q = predictive()
    torch.manual_seed(3)
    first = q.sample((5,))
    state = torch.get_rng_state()
    with_generator = q.sample((5,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)  # a generator leaves torch's own alone
    torch.manual_seed(3)
    assert torch.equal(first, q.rsample((5,)))
    assert torch.equal(with_generator, q.sample((5,), torch.Generator().manual_seed(3)))


def test_gradients_of_a_draw_follow_its_quantile() -> None:
    leaves = [part.requires_grad_() for part in parameters()]
    leaves[0].data.clamp_min_(-4.0)  # finite differences need every weight positive
    q = Predictive(*leaves)
    y = q.rsample(generator=torch.Generator().manual_seed(1))
    p = q.cdf(y).detach()
    implicit = torch.autograd.grad(y.sum(), leaves)
    for index, gradient in enumerate(implicit):
        for k in range(3):
            shift = torch.zeros_like(leaves[index])
            shift[:, k] = 1e-6
            moved = [
                Predictive(*(p.detach() + s * shift if i == index else p.detach() for i, p in
                             enumerate(leaves))).icdf(p)
                for s in (1, -1)
            ]  # fmt: skip
            assert_close(gradient[:, k], (moved[0] - moved[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def test_averaged_gradients_of_draws_are_the_gradients_of_moments() -> None:
    n = 20_000
    single = [part[1].requires_grad_() for part in parameters()]
    each = [part.detach().expand(n, 3).clone().requires_grad_() for part in single]
    y = Predictive(*each).rsample(generator=torch.Generator().manual_seed(2))
    second = (q := Predictive(*single)).variance + q.mean.square()
    for draws, exact in ((y, q.mean), (y.square(), second)):
        estimates = torch.autograd.grad(draws.sum(), each, retain_graph=True)
        truths = torch.autograd.grad(exact, single, retain_graph=True, materialize_grads=True)
        for estimate, truth in zip(estimates, truths, strict=True):
            standard_error = estimate.std(0) / math.sqrt(n)
            assert ((estimate.mean(0) - truth).abs() < 5.5 * standard_error).all()


# Acquisition far away


def reference_log_ei(z: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """log h(z) and h'(z) / h(z) for h(z) = z Phi(z) + phi(z), by mpmath with digits to spare."""
    with mpmath.workdps(50 + int(z * z / 4)):
        h = z * mpmath.ncdf(z) + mpmath.npdf(z)
        return mpmath.log(h), mpmath.ncdf(z) / h


@pytest.mark.parametrize("distance", [0.0, 1.0, 1.001, 5.0, 29.99, 30.01, 35.0, 40.0])
def test_log_ei_and_its_gradient_match_mpmath_far_below_the_incumbent(distance: float) -> None:
    mean, std = torch.tensor([1.5], dtype=torch.float64, requires_grad=True), 0.25
    best = mean.item() + distance * std  # exact in binary for the mean, so z is off by rounding
    q = Predictive(torch.zeros(1), mean, torch.full((1,), std).double())
    value = q.log_expected_improvement(best)
    (gradient,) = torch.autograd.grad(value, mean)
    log_h, slope = reference_log_ei((mean.item() - best) / std)
    assert value.item() == pytest.approx(float(log_h) + math.log(std), rel=1e-13)
    assert gradient.item() == pytest.approx(float(slope) / std, rel=1e-11)


def test_log_ei_of_a_mixture_35_standard_deviations_away_matches_mpmath() -> None:
    weights, means, stds = [0.25, 0.75], [0.0, -0.5], [1.0, 1.02]
    log_weights = torch.tensor(weights).double().log()
    q = Predictive(log_weights, torch.tensor(means).double(), torch.tensor(stds).double())
    with mpmath.workdps(60):
        parts = zip(weights, means, q.stds.tolist(), strict=True)
        total = sum(w * s * mpmath.exp(reference_log_ei((m - 35.0) / s)[0]) for w, m, s in parts)
        expected = float(mpmath.log(total))
    assert q.log_expected_improvement(35.0).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [-1e15, -40.0, -5.0, 0.0, 5.0, 30.0, 40.0, 1e4, 1e15])
@pytest.mark.parametrize("maximize", [True, False])
def test_log_ei_and_every_gradient_stay_finite(
    dtype: torch.dtype, distance: float, maximize: bool
) -> None:
    leaves = [part.requires_grad_() for part in parameters(dtype)]
    leaves[0].data.clamp_min_(-50.0)
    best = torch.tensor(distance, dtype=dtype, requires_grad=True)
    value = Predictive(*leaves).log_expected_improvement(best, maximize=maximize)
    gradients = torch.autograd.grad(value.sum(), [*leaves, best])
    assert value.dtype == dtype and value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[-1] != 0  # an optimiser still sees where to go


def test_minimising_is_maximising_the_mirror_image() -> None:
    log_weights, means, stds = parameters()
    q, mirror = Predictive(log_weights, means, stds), Predictive(log_weights, -means, stds)
    for name in ("expected_improvement", "probability_of_improvement", "log_expected_improvement"):
        assert_close(getattr(q, name)(0.3, maximize=False), getattr(mirror, name)(-0.3))
    assert_close(q.upper_confidence_bound(maximize=False), mirror.upper_confidence_bound())


def test_upper_confidence_bound_takes_botorchs_beta() -> None:
    q = predictive()
    assert_close(q.upper_confidence_bound(beta=9.0), q.mean + 3 * q.stddev)


# Gradients, units, precision


@pytest.mark.parametrize("name", METHODS)
def test_gradients_match_finite_differences(name: str) -> None:
    log_weights, means, stds = parameters()
    leaves = [part.requires_grad_() for part in (log_weights.clamp_min(-4.0), means, stds)]
    assert torch.autograd.gradcheck(lambda *parts: METHODS[name](Predictive(*parts)), leaves)


def test_gradients_of_the_mode_match_finite_differences() -> None:
    log_weights, means, stds = parameters()
    leaves = [part.requires_grad_() for part in (log_weights.clamp_min(-4.0), means, stds)]
    # the mode is good to 1e-8, hence the wide step and tolerance
    assert torch.autograd.gradcheck(
        lambda *parts: Predictive(*parts).mode, leaves, eps=1e-4, atol=1e-3, rtol=1e-3
    )


def test_gradients_flow_to_the_point_asked_about() -> None:
    q = predictive()
    y = torch.tensor([0.3, -2.0, 0.21, 1.0], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.3, 0.9, 0.21, 0.02], dtype=torch.float64, requires_grad=True)
    for method in (q.log_prob, q.cdf, q.crps, q.expected_improvement, q.log_expected_improvement):
        assert torch.autograd.gradcheck(method, y)
    assert torch.autograd.gradcheck(q.icdf, p, eps=1e-7, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 0.3, 1e12])
def test_changing_units_changes_the_answers_with_them(scale: float) -> None:
    q, loc, y = predictive(), 3 * scale, torch.tensor([0.3, -2.0, 0.21, 1.0], dtype=torch.float64)
    mapped, log_scale = q.affine(loc, scale), math.log(scale)
    best = loc + scale * y
    assert_close(mapped.mean / scale, 3 + q.mean)
    assert_close(mapped.mode / scale, 3 + q.mode, atol=1e-7)
    assert_close(mapped.stddev / scale, q.stddev)
    assert_close(mapped.variance / scale**2, q.variance)
    assert_close(mapped.entropy() - log_scale, q.entropy())
    assert_close(mapped.log_prob(best) + log_scale, q.log_prob(y))
    assert_close(mapped.cdf(best), q.cdf(y))
    assert_close(mapped.icdf(0.07) / scale, 3 + q.icdf(0.07))
    assert_close(mapped.crps(best) / scale, q.crps(y))
    assert_close(mapped.expected_improvement(best) / scale, q.expected_improvement(y))
    assert_close(mapped.log_expected_improvement(best) - log_scale, q.log_expected_improvement(y))
    assert_close(mapped.probability_of_improvement(best), q.probability_of_improvement(y))


def test_affine_takes_a_map_per_element_and_widens_the_dtype() -> None:
    low, high = predictive(torch.float32), predictive()
    scale = torch.tensor([1.0, 1e-60, 2.0, 1e60], dtype=torch.float64)
    assert_close(low.affine(0.0, scale).stddev / scale, high.stddev, rtol=1e-6)
    assert low.affine(1.0, 2.0).mean.dtype == torch.float32


def test_a_large_common_offset_costs_the_variance_no_digits() -> None:
    offset, means = 2.0**40, torch.tensor([0.0, 0.125, 0.5], dtype=torch.float64)
    stds = torch.full((3,), 1e-3, dtype=torch.float64)
    near, far = Predictive(stds.log(), means, stds), Predictive(stds.log(), means + offset, stds)
    assert_close(far.variance, near.variance, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_log_prob_is_finite_a_million_billion_standard_deviations_away(
    dtype: torch.dtype, scale: float
) -> None:
    means, stds = torch.tensor([[0.0, 1.0, -2.0], [5.0, 5.0, 5.0]]), torch.tensor([1e-5, 1.0, 0.1])
    q = Predictive(torch.zeros(3), means, stds).affine(0.0, scale)
    q = Predictive(q.log_weights.to(dtype), q.means.to(dtype), q.stds.to(dtype))
    y = (q.mean + torch.tensor([[-1e15], [1e15]], dtype=dtype) * q.stddev).requires_grad_()
    log_prob = q.log_prob(y)
    (gradient,) = torch.autograd.grad(log_prob.sum(), y)
    assert log_prob.isfinite().all() and gradient.isfinite().all()


def test_tiny_standard_deviations_leave_a_positive_variance() -> None:
    tiny = torch.full((2,), 1e-19, dtype=torch.float32)
    q = Predictive(torch.zeros(2), torch.zeros(2), tiny)
    assert q.variance.item() == pytest.approx(1e-38, rel=1e-6)
    q = Predictive(torch.zeros(2), torch.zeros(2), 1e-5 * tiny)  # now only stddev is representable
    assert q.stddev.item() == pytest.approx(1e-24, rel=1e-6)
    q = Predictive(torch.zeros(2), torch.zeros(2).double(), torch.full((2,), 1e-24).double())
    assert q.variance.item() == pytest.approx(1e-48, rel=1e-6)


@pytest.mark.parametrize("name", [*METHODS, "mode"])
def test_float32_parameters_give_float32_answers_to_their_precision(name: str) -> None:
    method = METHODS.get(name, lambda q: q.mode)
    low = predictive(torch.float32)
    high = Predictive(low.log_weights.double(), low.means.double(), low.stds.double())
    answer = method(low)
    assert answer.dtype == torch.float32
    assert_close(answer.double(), method(high), rtol=1e-6, atol=1e-7)


# Shapes, copies, errors


@pytest.mark.parametrize("name", [*METHODS, "mode"])
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_answers_have_the_batch_shape(name: str, batch: tuple[int, ...]) -> None:
    q = Predictive(torch.zeros(5), torch.linspace(-1, 1, 5).expand(*batch, 5), torch.ones(5))
    assert q.batch_shape == batch and q.event_shape == ()
    assert METHODS.get(name, lambda q: q.mode)(q).shape == batch


def test_values_and_incumbents_broadcast_against_the_batch() -> None:
    q, y = predictive(), torch.linspace(-1, 1, 7).unsqueeze(-1)
    for method in (q.log_prob, q.cdf, q.crps, q.expected_improvement, q.log_expected_improvement):
        assert method(y).shape == (7, 4)
        assert_close(method(y)[3], method(y[3]))
    assert q.sample((7, 2)).shape == q.rsample((7, 2)).shape == (7, 2, 4)


def test_expanding_and_indexing_select_the_same_mixtures() -> None:
    q = predictive()
    assert q.expand((3, 4)).batch_shape == (3, 4)
    assert_close(q.expand((3, 4))[2, 1].mean, q.mean[1])
    assert_close(q[1:3].icdf(0.2), q.icdf(0.2)[1:3])
    assert_close(q.expand((3, 4))[..., 2].entropy(), q.entropy()[2].expand(3))


def test_a_pickled_copy_answers_alike_and_the_repr_is_short() -> None:
    q = predictive()
    copy = pickle.loads(pickle.dumps(q))
    assert torch.equal(copy.icdf(0.3), q.icdf(0.3))
    assert repr(copy) == "Predictive(batch_shape=(4,), components=3, dtype=torch.float64)"


def test_weights_are_normalised_and_may_be_switched_off() -> None:
    log_weights, means, stds = parameters()
    assert_close(Predictive(log_weights + 3, means, stds).cdf(0.2), predictive().cdf(0.2))
    without = Predictive(log_weights[2, :2], means[2, :2], stds[2, :2])
    assert_close(predictive()[2].entropy(), without.entropy(), rtol=0, atol=1e-5)
    assert_close(
        predictive()[2].log_expected_improvement(1.0), without.log_expected_improvement(1.0)
    )
    assert_close(predictive()[2].icdf(0.99), without.icdf(0.99))


def test_a_predictive_that_asks_for_no_gradient_gives_none() -> None:
    assert not any(METHODS[name](predictive()).requires_grad for name in METHODS)


@pytest.mark.parametrize(
    ("index", "value", "complaint"),
    [
        (0, torch.full((3,), -torch.inf), "not all -inf"),
        (0, torch.tensor([0.0, torch.nan, 0.0]), "log_weights"),
        (1, torch.tensor([0.0, torch.nan, 0.0]), "means"),
        (1, torch.tensor([0.0, torch.inf, 0.0]), "finite means"),
        (2, torch.tensor([1.0, 0.0, 1.0]), "stds"),
        (2, torch.ones(2), r"got shapes \(\(3,\), \(3,\), \(2,\)\)"),
        (2, torch.ones(3, 0), "at least one component"),
    ],
)
def test_bad_parameters_are_refused_by_name(index: int, value: Tensor, complaint: str) -> None:
    parts = [torch.zeros(3), torch.zeros(3), torch.ones(3)]
    parts[index] = value
    with pytest.raises(ValueError, match=complaint):
        Predictive(*parts)


def test_integer_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"floating-point parameters; got torch\.int64"):
        Predictive(torch.zeros(3).long(), torch.zeros(3).long(), torch.ones(3).long())


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda q: q.icdf(1.5), r"\[0, 1\]; got 1\.5"),
        (lambda q: q.icdf(torch.tensor([0.2, 0.3, -0.1, 0.5])), r"\[0, 1\]; got -0\.1"),
        (lambda q: q.icdf(torch.tensor([0.2, 0.3])), "not broadcastable"),
        (lambda q: q.log_prob(torch.zeros(3)), "not broadcastable"),
        (lambda q: q.cdf(torch.nan), "support"),
        (lambda q: q.expected_improvement(torch.zeros(3)), "not broadcastable"),
        (lambda q: q.interval(90.0), "between 0 and 1; got 90"),
        (lambda q: q.upper_confidence_bound(-1.0), "beta >= 0; got -1"),
        (lambda q: q.affine(0.0, -2.0), "positive scale; got -2"),
    ],
)
def test_bad_questions_are_refused(call: Callable[[Predictive], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call(predictive())


# Plot


def test_a_plot_shows_mean_intervals_and_data_in_order_of_x() -> None:
    import matplotlib.pyplot as plt

    q, x = predictive(), torch.tensor([0.4, 0.1, 0.9, 0.5], dtype=torch.float64)
    ax = q.plot(x.unsqueeze(-1), context=(x[:2].numpy(), [1.0, 2.0]))
    mean = ax.get_lines()[0]
    assert_close(torch.tensor(mean.get_xdata()), x.sort().values)
    assert_close(torch.tensor(mean.get_ydata()), q.mean[x.argsort()])
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"mean", "50% interval", "90% interval", "data"}
    assert q.plot(x, ax=ax) is ax
    ax.figure.canvas.draw()
    plt.close(ax.figure)


def test_rows_are_drawn_as_intervals_ordered_by_the_mean() -> None:
    import matplotlib.pyplot as plt

    from pfn.plot import plot_rows

    q = predictive()
    figure, ax = plt.subplots()
    plot_rows(q, ax)
    wide, narrow, dots = ax.collections
    order = q.mean.argsort()
    assert_close(torch.tensor(dots.get_offsets())[:, 1], q.mean[order])
    for bars, mass in ((wide, 0.9), (narrow, 0.5)):
        ends = torch.tensor(np.array(bars.get_segments()))[..., 1]
        assert_close(ends, torch.stack([bound[order] for bound in q.interval(mass)], -1))
    plt.close(figure)


def test_a_plot_says_what_to_do_with_more_features_or_tasks() -> None:
    q = predictive()
    with pytest.raises(ValueError, match="predict along one with the others fixed"):
        q.plot(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"batch_shape \(5,\) as x_query; got \(4,\)"):
        q.plot(torch.zeros(5))
    with pytest.raises(ValueError, match=r"posterior\[0\]"):
        q.expand((3, 4)).plot(torch.zeros(4))
    with pytest.raises(ValueError, match="as many context x as y; got 3 and 2"):
        q.plot(torch.zeros(4), context=(torch.zeros(3), torch.zeros(2)))


def test_values_may_be_lists_and_series_whatever_their_index() -> None:
    q, values = predictive(), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    series = pd.Series(values.numpy(), index=[7, 3, 5, 9])
    for method in (q.log_prob, q.cdf, q.crps):
        assert torch.equal(method(series), method(values))
        assert torch.equal(method(values.tolist()), method(values))
