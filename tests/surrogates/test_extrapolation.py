"""`extrapolate`: predictives in the metric's units, and what joint draws say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import pfn
from priors import LearningCurves
from surrogates import Sibling, extrapolate
from surrogates.curve_posterior import DIVERGED, DRAWS, EDGE
from surrogates.extrapolation import Reader, remaining_steps, spread, tell_apart, thin

ACCURACY = 0.9 - 0.6 / np.sqrt(np.arange(1.0, 16))
LOSS = 0.3 + 2.0 / np.arange(1.0, 16)
REWARD = np.array([-200.0, -150, -90, -110, -60, -40, -45, -30])
KINDS = [
    (ACCURACY, {"mode": "max"}),
    (1 - ACCURACY, {"mode": "min", "bounds": (0, 1)}),
    (LOSS, {"mode": "min"}),
    (REWARD, {"mode": "max"}),
    (100 * ACCURACY, {"mode": "max", "bounds": (0, 100)}),
]


@pytest.mark.parametrize(("values", "how"), KINDS)
def test_the_answer_is_a_distribution_at_each_remaining_step(values, how) -> None:
    curve = extrapolate(values, horizon=40, **how)
    assert isinstance(curve, pfn.Predictive)
    assert curve.batch_shape == (40 - len(values),)
    assert curve.steps.tolist() == list(range(len(values) + 1, 41))
    p = torch.tensor([0.02, 0.3, 0.5, 0.7, 0.98], dtype=torch.float64).unsqueeze(-1)
    q = curve.icdf(p)
    assert (q.diff(dim=0) >= 0).all()
    inside = (curve.metric.encode(q) > 1e-3) & (curve.metric.encode(q) < 1 - 1e-3)
    assert float(inside.double().mean()) > 0.8  # the rest is at an end, which may be likely
    torch.testing.assert_close(curve.cdf(q)[inside], p.expand_as(q)[inside], atol=1e-6, rtol=0)
    assert (curve.cdf(q) >= p - 1e-6).all()
    low, high = curve.interval(0.9)
    assert (low < high).all() and bool(curve.mean.isfinite().all())


@pytest.mark.parametrize(("values", "how"), KINDS)
def test_densities_integrate_to_one_and_are_the_slope_of_the_cdf(values, how) -> None:
    end = extrapolate(values, horizon=40, **how)[-1]
    p = torch.linspace(1e-5, 1 - 1e-5, 40_001, dtype=torch.float64)
    grid = end.icdf(p)
    density = end.log_prob(grid).exp()
    total = torch.trapezoid(density, grid)
    low, high = (end.cdf(v) for v in (grid[0], grid[-1] - 1e-9))  # the ends may have some, too
    assert float(total) == pytest.approx(float(high - low), abs=2e-3)  # of the trapezoidal rule
    middle = end.icdf(torch.tensor([0.3, 0.6], dtype=torch.float64))
    h = 1e-4 * end.stddev
    slope = (end.cdf(middle + h) - end.cdf(middle - h)) / (2 * h)
    torch.testing.assert_close(end.log_prob(middle).exp(), slope, rtol=1e-3, atol=0)


def test_an_error_rate_is_an_accuracy_upside_down() -> None:
    up = extrapolate(ACCURACY, 40, mode="max", bounds=(0, 1))
    down = extrapolate(1 - ACCURACY, 40, mode="min", bounds=(0, 1))
    torch.testing.assert_close(up.mean, 1 - down.mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(up.icdf(0.95), 1 - down.icdf(0.05), atol=1e-6, rtol=0)
    torch.testing.assert_close(up.cdf(0.8), 1 - down.cdf(0.2), atol=1e-6, rtol=0)
    torch.testing.assert_close(up.log_prob(0.85), down.log_prob(0.15), atol=1e-5, rtol=1e-5)
    assert up.prob_best(0.8) == pytest.approx(down.prob_best(0.2), abs=1e-6)
    assert up.prob_above(0.8) == pytest.approx(down.prob_above(0.2), abs=1e-9)


def test_units_of_a_metric_change_the_answers_units_alone() -> None:
    curve, scaled = extrapolate(LOSS, 40, mode="min"), extrapolate(1000 * LOSS, 40, mode="min")
    torch.testing.assert_close(1000 * curve.mean, scaled.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(1000 * curve.stddev, scaled.stddev, rtol=1e-9, atol=0)
    torch.testing.assert_close(curve.entropy() + math.log(1000), scaled.entropy())
    steps = np.arange(1, 16) * 50.0
    longer = extrapolate(LOSS, 2000, steps.tolist(), mode="min")
    torch.testing.assert_close(curve.mean, longer.mean)
    assert longer.steps.tolist() == (50 * curve.steps).tolist()


def test_moments_are_those_of_the_mapped_values_not_of_a_mapped_mean() -> None:
    curve = extrapolate(LOSS, 40, mode="min")
    draws = curve.sample((20_000,), generator=torch.Generator().manual_seed(0))
    draws = draws[(curve.metric.encode(draws) >= DIVERGED).all(-1)]  # moments are of these
    error = draws.std(0) / math.sqrt(len(draws))
    # beside the Monte Carlo error, a table of quantiles misses some of the tails
    assert ((draws.mean(0) - curve.mean).abs() < 4 * error + 0.02 * curve.stddev).all()
    inverted = curve.metric.decode(torch.as_tensor(curve.metric.encode(draws).mean(0)))
    assert (curve.mean > inverted).all()  # Jensen: a loss is convex in y


@pytest.mark.parametrize(("values", "how"), KINDS)
def test_paths_have_the_marginals(values, how) -> None:
    curve = extrapolate(values, 40, **how)
    paths = curve.sample_paths(4000, seed=3)
    assert paths.shape == (4000, 40 - len(values))
    for p in (0.1, 0.5, 0.9):
        share = (paths <= curve.icdf(p)).double().mean(0)
        assert ((share - p).abs() < 4.5 * math.sqrt(p * (1 - p) / 4000)).all()
    assert torch.equal(paths, curve.sample_paths(4000, seed=3))


def test_the_best_of_the_rest_is_at_least_as_good_as_any_value() -> None:
    curve = extrapolate(ACCURACY, 40)
    each = curve.probability_of_improvement(0.78)
    best = curve.prob_best(0.78)
    noise = 4 / math.sqrt(DRAWS)
    assert each.max() - noise < best < each.sum() + noise  # between a union's bounds
    assert curve.prob_best(0.5) > 1 - 1e-4 and curve.prob_best(1.0) < 1e-4
    assert curve.prob_best(0.76, min_delta=0.02) == curve.prob_best(0.78)
    assert curve.prob_above(0.78) == pytest.approx(float(each[-1]))


@pytest.mark.parametrize(("values", "how"), KINDS)
def test_the_quantile_of_the_best_is_the_inverse_of_its_probability(values, how) -> None:
    curve = extrapolate(values, 40, **how)
    paths = curve.sample_paths(20_000, seed=5)
    best = paths.amax(-1) if how["mode"] == "max" else -paths.amin(-1)
    for p in (0.05, 0.5, 0.95):
        q = curve.quantile_best(p)
        if curve.metric.encode(torch.tensor(q)) > 1 - 2 * EDGE:  # the end is that likely
            assert 1 - curve.prob_best(q) > p - 2e-3
            continue
        assert 1 - curve.prob_best(q) == pytest.approx(p, abs=2e-3)
        below = best <= (q if how["mode"] == "max" else -q)
        # quasi-random draws err by about a percent
        assert float(below.double().mean()) == pytest.approx(p, abs=0.02)
    with pytest.raises(ValueError, match="between 0 and 1"):
        curve.quantile_best(1.0)


def test_a_growing_run_is_read_once_and_answered_alike() -> None:
    reader = Reader()
    for seen in (3, 4, 9, 15):
        growing = reader.extrapolate(ACCURACY[:seen], 40)
        torch.testing.assert_close(
            growing.mean, extrapolate(ACCURACY[:seen], 40).mean, atol=1e-5, rtol=0
        )
    other = reader.extrapolate(1 - ACCURACY, 40, mode="min")  # not what it has read
    torch.testing.assert_close(
        other.mean, extrapolate(1 - ACCURACY, 40, mode="min").mean, atol=1e-5, rtol=0
    )


def test_few_steps_say_nearly_what_all_do() -> None:
    assert spread(10, 32).tolist() == list(range(10))
    some = spread(500, 32)
    assert len(some) <= 32 and some[0] == 0 and some[-1] == 499
    for values, how in KINDS:
        whole, few = (Reader().extrapolate(values, 200, **how, most=most) for most in (None, 32))
        assert len(few.steps) <= 32 and torch.equal(few.grid, whole.steps)
        for p in (0.05, 0.5, 0.95):
            best = whole.quantile_best(p)
            assert few.prob_best(best) == pytest.approx(whole.prob_best(best), abs=0.02)


def sweep(seed: int) -> tuple[list[Sibling], np.ndarray, np.ndarray]:
    """Runs whose end is a function of their only hyperparameter, the last of them unseen."""
    rng = np.random.default_rng(seed)
    time, runs = np.arange(1.0, 21), []
    for place in rng.uniform(size=12):
        end = 0.3 + 0.6 * place
        runs.append(Sibling(end - (end - 0.1) * np.exp(-time / 5), [place]))
    return runs[:-1], np.asarray(runs[-1].hyperparameters), np.asarray(runs[-1].values)


def test_siblings_say_what_runs_with_near_hyperparameters_do() -> None:
    for seen in (2, 5):
        alone, beside = [], []
        for seed in range(12):
            siblings, place, values = sweep(seed)
            how = {"siblings": siblings, "hyperparameters": place, "bounds": (0, 1)}
            single = extrapolate(values[:seen], 20, bounds=(0, 1))
            curve = extrapolate(values[:seen], 20, **how)
            assert curve.batch_shape == (20 - seen,)
            alone.append(float(single[-1].log_prob(values[-1])))
            beside.append(float(curve[-1].log_prob(values[-1])))
        assert np.mean(beside) > np.mean(alone) + 0.1  # nats; 0.4 as this is written


def test_a_run_is_predicted_from_its_siblings_before_it_has_begun() -> None:
    prior = LearningCurves(metrics=("accuracy",), resolution=3e-4)
    tasks = prior.sample(200, 160, 2, generator=torch.Generator().manual_seed(5))
    gains = []
    unknown = extrapolate([], 100, bounds=(0, 1))[-1]
    for x, y in zip(tasks.x, tasks.y.clamp(0, 1), strict=True):
        place, of_row = torch.unique_consecutive(x[:, 1:], return_inverse=True, dim=0)
        if len(place) < 4:
            continue
        siblings = [
            Sibling(y[of_row == i], place[i], (100 * x[of_row == i, 0]).tolist())
            for i in range(len(place) - 1)
        ]
        curve = extrapolate([], 100, bounds=(0, 1), siblings=siblings, hyperparameters=place[-1])
        gains.append(float(curve[-1].log_prob(y[-1]) - unknown.log_prob(y[-1])))
    assert np.mean(gains) > 2 * np.std(gains) / math.sqrt(len(gains))  # two standard errors


def test_siblings_may_be_many_of_any_length_and_repeats() -> None:
    siblings, place, values = sweep(1)
    many = 8 * siblings + [
        Sibling([0.2], place),
        Sibling([0.3, 0.4], place, [5, 19]),
        Sibling([], place),
    ]
    for seen in (0, 5):
        curve = extrapolate(values[:seen], 20, siblings=many, hyperparameters=place, bounds=(0, 1))
        assert curve.batch_shape == (20 - seen,) and bool(curve.mean.isfinite().all())
    loss = [Sibling(3 / np.arange(1.0, 9), [0.2]), Sibling([2.0, math.nan, math.inf], [0.4])]
    curve = extrapolate([2.5, 1.2], 10, mode="min", siblings=loss, hyperparameters=[0.3])
    assert bool(curve.mean.isfinite().all()) and bool((curve.icdf(0.05) >= 0).all())


def test_repeats_of_a_place_are_told_apart() -> None:
    places = [
        np.array([0.2, 0.7]),
        np.array([0.9, 0.7]),
        np.array([0.2, 0.7]),
        np.array([0.2, 0.7]),
    ]
    apart = tell_apart(places)
    assert len({tuple(place.astype(np.float32)) for place in apart}) == 4
    for place, moved in zip(places, apart, strict=True):
        assert np.abs(place - moved).max() < 1e-3


@pytest.mark.parametrize(
    ("siblings", "place", "words"),
    [
        ([0.5, 0.6], [0.1], "Expected siblings"),
        ([Sibling([0.5], [0.1])], None, "hyperparameters .k,. of the run"),
        ([Sibling([0.5], [0.1])], [0.1, 0.2], "as many hyperparameters"),
        ([Sibling([0.5], [1.1])], [0.1], "in .0, 1."),
        ([Sibling([0.5] * 11, [0.1])], [0.1], "within the horizon"),
        ([Sibling([0.5], [0.1] * 11)], [0.1] * 11, "1 to 10 hyperparameters"),
    ],
)
def test_siblings_that_do_not_fit_are_refused(siblings, place, words) -> None:
    with pytest.raises(ValueError, match=words):
        extrapolate([0.3], 10, siblings=siblings, hyperparameters=place)


def test_the_time_to_a_value_is_a_distribution() -> None:
    curve = extrapolate(ACCURACY, 40)
    time = curve.time_to(0.78)
    assert float(time.probabilities.sum()) + time.never == pytest.approx(1)
    assert time.cdf(40) == pytest.approx(curve.prob_best(0.78), abs=4 / math.sqrt(DRAWS))
    assert curve.time_to(0.3).median == 16 and curve.time_to(0.99).median == math.inf


def test_the_best_of_the_rest_is_calibrated_on_draws_of_the_prior() -> None:
    generator = torch.Generator().manual_seed(7)
    prior = LearningCurves(metrics=("accuracy",), resolution=3e-4)
    tasks = prior.sample(3000, 60, 1, generator=generator)
    time = tasks.x[..., 0]
    regular = (time - torch.arange(1.0, 61).double() / 60).abs().amax(-1) < 1e-9
    curves = tasks.y[regular].clamp(0, 1).numpy()[:500]
    levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    below = []
    for i, y in enumerate(curves):
        cut = (6, 15, 30)[i % 3]
        curve = extrapolate(y[:cut], 60, bounds=(0, 1))
        below.append([y[cut:].max() <= curve.quantile_best(level) for level in levels])
    share = np.mean(below, 0)
    deviation = np.sqrt(levels * (1 - levels))
    tolerance = 3.5 * deviation / math.sqrt(len(curves)) + 0.08 * deviation  # the network's error
    assert (abs(share - levels) < tolerance).all(), share


def test_an_empty_curve_has_the_prior_and_a_whole_one_has_no_rest() -> None:
    before = extrapolate([], 30, bounds=(0, 1))
    assert before.batch_shape == (30,) and bool(before.mean.isfinite().all())
    after = extrapolate(ACCURACY, 15)
    assert after.batch_shape == (0,) and after.prob_best(0.5) == 0
    assert after.sample_paths(3).shape == (3, 0)


def test_divergence_is_information() -> None:
    values = LOSS.copy()
    values[10:] = np.nan
    curve = extrapolate(values, 40, mode="min")
    assert (curve.prob_diverged() > 0.5).all()
    assert curve.prob_best(0.5) < 0.1
    fine = extrapolate(LOSS, 40, mode="min")
    assert (fine.prob_diverged() < 0.1).all() and bool(fine.mean.isfinite().all())
    for bad in ([math.inf] * 4, [math.nan] * 4, [3.0, math.inf, 2.0, math.nan]):
        assert bool(extrapolate(bad, 20, mode="min").icdf(0.5).isfinite().all())


def test_what_the_network_puts_beyond_an_end_counts_as_the_end() -> None:
    curve = extrapolate([0.9, 0.99, 1.0, 1.0, 1.0, 1.0], 20)
    raw = curve._y  # of the network, before it is censored
    for value in (0.9, 0.99, 0.999):
        torch.testing.assert_close(curve.cdf(value), raw.cdf(value).double(), atol=1e-6, rtol=0)
    assert (curve.cdf(1.0) == 1).all() and (curve.icdf(0.999) <= 1).all()
    assert curve.prob_best(1.0) == 0  # nothing is better


def test_the_probability_of_divergence_is_the_networks() -> None:
    for values in (LOSS, np.append(LOSS, np.nan), np.append(LOSS, [np.nan] * 4)):
        curve = extrapolate(values, 40, mode="min")
        raw = curve._y.cdf(DIVERGED).double()  # of y, before it is censored
        torch.testing.assert_close(curve.prob_diverged(), raw, atol=1e-6, rtol=0)
        assert raw.max() < 1 and raw.min() > 0


def test_values_beyond_the_bounds_are_answered_exactly() -> None:
    loss = extrapolate(LOSS, 40, mode="min")
    assert loss.prob_best(-5.0) == 0 and loss.prob_above(-5.0) == 0
    assert (loss.cdf(-5.0) == 0).all() and (loss.cdf(math.inf) == 1).all()
    accuracy = extrapolate(ACCURACY, 40)
    assert (accuracy.cdf(math.inf) == 1).all() and (accuracy.cdf(-math.inf) == 0).all()
    assert accuracy.prob_above(math.inf) == 0 and accuracy.prob_best(1.5) == 0
    assert (accuracy.log_prob(1.5) < -1e30).all()
    with pytest.raises(ValueError, match="a number to compare"):
        accuracy.prob_above(math.nan)


def test_rows_that_are_kept_of_long_runs_stay_as_they_grow() -> None:
    for most in (16, 128):
        for count in (0, 1, most, most + 1, 2 * most, 10 * most):
            kept = thin(count, most)
            assert len(kept) <= most and (count == 0 or (kept[0] == 0 and kept[-1] == count - 1))
    assert thin(140, 128)[:60].tolist() == thin(150, 128)[:60].tolist()
    y = 0.9 - 0.5 * np.exp(-np.arange(1.0, 301) / 60)
    said = [extrapolate(y[:n], 400).prob_best(0.899) for n in range(254, 262)]
    assert max(np.abs(np.diff(said))) < 0.25  # 256 values are read, and then every second


def test_flat_constant_and_extreme_values_get_an_answer() -> None:
    for values in ([0.5] * 10, [0.0] * 5, [1.0] * 5, [1e-12, 2e-12], [1e12, 1e11], [5], [1, 0, 1]):
        for mode in ("max", "min"):
            curve = extrapolate(values, 20, mode=mode)
            assert bool(curve.mean.isfinite().all()) and bool((curve.stddev > 0).all())


def test_long_curves_are_thinned_to_what_the_network_was_trained_for() -> None:
    assert thin(10, 128).tolist() == list(range(10))
    y = 0.9 - 0.6 / np.sqrt(np.arange(1.0, 1001))
    curve = extrapolate(y, 2000)
    assert curve.batch_shape == (1000,) and float((curve.mean[-1] - 0.88).abs()) < 0.05


def test_remaining_steps_go_on_as_those_seen_and_end_at_the_horizon() -> None:
    assert remaining_steps(np.array([10.0, 20, 30]), 55).tolist() == [40, 50, 55]
    assert remaining_steps(np.array([]), 3).tolist() == [1, 2, 3]
    assert remaining_steps(np.array([1000.0, 1001]), 1004).tolist() == [1002, 1003, 1004]
    assert remaining_steps(np.array([50.0]), 150).tolist() == [100, 150]
    assert len(remaining_steps(np.array([1.0]), 1e6, coarsen=True)) <= 10_001
    assert remaining_steps(np.array([1.0, 2]), 2).tolist() == []
    with pytest.raises(ValueError, match="at most"):
        remaining_steps(np.array([1.0]), 1e6)


def test_expected_improvement_and_scores_agree_with_draws() -> None:
    end = extrapolate(LOSS, 40, mode="min")[-1]
    draws = end.sample((40_000,), generator=torch.Generator().manual_seed(1))
    best = float(end.icdf(0.4))
    gain = (best - draws).clamp_min(0)
    error = float(gain.std()) / 200
    assert float(end.expected_improvement(best, maximize=False)) == pytest.approx(
        float(gain.mean()), abs=4 * error + 0.01 * float(end.stddev)
    )
    assert_allclose(float(end.entropy()), -float(end.log_prob(draws).mean()), atol=0.05)
    end = extrapolate(ACCURACY, 40)[-1]  # whose values are bounded, so that means of draws converge
    draws = end.sample((40_000,), generator=torch.Generator().manual_seed(1))
    best = float(end.icdf(0.4))
    pair = (draws[:20_000] - draws[20_000:]).abs().mean() / 2
    crps = float((draws - best).abs().mean() - pair)
    assert float(end.crps(best)) == pytest.approx(crps, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[0.1, 0.2]], 10), "shape \\(n,\\)"),
        ((["a"], 10), "numbers"),
        (([0.1] * 11, 10), "horizon of at least"),
        (([0.1], 10, [1, 2]), "one step for each"),
        (([0.1], 10, None, "up"), "mode among"),
        (([0.1], 10, None, "max", (0.5, 1)), "within the bounds"),
    ],
)
def test_bad_input_is_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        extrapolate(*arguments)


def test_other_networks_are_refused_and_columns_are_read() -> None:
    with pytest.raises(ValueError, match="network of learning curves"):
        extrapolate(ACCURACY, 40, model="gp-1d")
    for values in (ACCURACY[:, None], torch.tensor(ACCURACY).float()):
        torch.testing.assert_close(
            extrapolate(values, 40).mean, extrapolate(ACCURACY, 40).mean, atol=1e-4, rtol=0
        )
    assert extrapolate(torch.tensor([0.5, 0.6], dtype=torch.bfloat16), 9).batch_shape == (7,)


def test_questions_that_make_no_sense_are_refused() -> None:
    curve = extrapolate(ACCURACY, 40)
    with pytest.raises(ValueError, match="finite best"):
        curve.prob_best(math.nan)
    with pytest.raises(ValueError, match="n >= 1"):
        curve.sample_paths(0)
    with pytest.raises(ValueError, match="no affine map"):
        curve.affine(0.0, 2.0)
    with pytest.raises(ValueError, match="remain"):
        extrapolate(ACCURACY, 15).prob_above(0.5)
    with pytest.raises(ValueError, match="remain"):
        extrapolate(ACCURACY, 15).time_to(0.5)
