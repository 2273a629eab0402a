"""The map between metrics and the network's units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surrogates.metrics import check_steps, read_metric

CASES = [  # mode, bounds, values seen
    ("max", (0, 1), [0.2, 0.5]),
    ("min", (0, 1), [0.8, 0.4]),
    ("max", (0, 100), [20.0, 55.0]),
    ("min", (0, None), [2.3, 1.1]),
    ("max", (0, None), [3.0, 8.0]),
    ("max", (None, 1), [-4.0, 0.2]),
    ("min", (None, 0), [-3.0, -7.0]),
    ("max", (None, None), [-10.0, 4.0]),
    ("min", (None, None), [120.0, 80.0]),
]


@pytest.mark.parametrize(("mode", "bounds", "seen"), CASES)
def test_it_is_increasing_in_goodness_and_invertible(mode, bounds, seen) -> None:
    metric = read_metric(np.array(seen), mode, bounds)
    y = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    values = metric.decode(y)
    steps = values.diff() * (1 if mode == "max" else -1)
    assert (steps > 0).all()
    torch.testing.assert_close(metric.encode(values), y, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("mode", "bounds", "seen"), CASES)
def test_its_slope_is_the_derivative(mode, bounds, seen) -> None:
    metric = read_metric(np.array(seen), mode, bounds)
    y = torch.linspace(0.05, 0.95, 20, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(metric.decode(y).sum(), y)
    torch.testing.assert_close(metric.log_slope(y), -slope.abs().log(), atol=1e-9, rtol=0)


def test_the_documented_rule() -> None:
    loss = read_metric(np.array([2.0, 1.0]), "min", (0, None))
    y = loss.encode(torch.tensor([2.0, 1.0, 0.0, math.inf, math.nan]))
    torch.testing.assert_close(y, torch.tensor([1 / 2, 2 / 3, 1.0, 0.0, 0.0], dtype=torch.float64))
    error = read_metric(np.array([0.3]), "min", (0, 1))
    assert float(error.encode(torch.tensor(0.3))) == pytest.approx(0.7)
    percent = read_metric(np.array([50.0]), "max", (0, 100))
    assert float(percent.encode(torch.tensor(80.0))) == pytest.approx(0.8)
    reward = read_metric(np.array([-20.0, -10.0, 5.0]), "max", None)
    assert float(reward.encode(torch.tensor(-20.0))) == pytest.approx(0.5)
    assert float(reward.encode(torch.tensor(5.0))) == pytest.approx(1 / (1 + math.exp(-1)))


def test_bounds_are_guessed_where_none_are_given() -> None:
    def ends(values, mode):
        metric = read_metric(np.array(values), mode, None)
        return metric.bottom, metric.top

    assert ends([0.2, 0.9], "max") == (0, 1)
    assert ends([0.2, 1.9], "max") == (-math.inf, math.inf)
    assert ends([0.2, 1.9], "min") == (-math.inf, 0)
    assert ends([-0.2, 1.9], "min") == (-math.inf, math.inf)
    assert ends([math.nan, 0.5, math.inf], "max") == (0, 1)


def test_a_metric_of_which_nothing_finite_was_seen_has_a_map() -> None:
    for mode, bounds in (("min", (0, None)), ("max", None), ("min", None), ("max", (0, 1))):
        for seen in ([], [math.nan], [math.inf, math.nan]):
            metric = read_metric(np.array(seen, dtype=float), mode, bounds)
            y = metric.encode(torch.tensor([*seen, 0.4]))
            assert ((y >= 0) & (y <= 1)).all()
            assert (y[:-1] == 0).all()


def test_a_first_value_at_a_bound_sets_no_scale() -> None:
    metric = read_metric(np.array([0.0, 0.5]), "min", (0, None))
    assert metric.scale == 0.5
    assert read_metric(np.array([0.0]), "min", (0, None)).scale == 1.0


@pytest.mark.parametrize(
    ("mode", "bounds", "words"),
    [
        ("maximum", None, "Expected a mode among"),
        ("max", (1, 0), "low < high"),
        ("max", (0, 0.4), "within the bounds"),
        ("max", 3, "bounds \\(low, high\\)"),
        ("max", (0, "one"), "bounds \\(low, high\\)"),
        ("max", (math.nan, 1), "low < high"),
    ],
)
def test_what_does_not_fit_is_refused(mode, bounds, words) -> None:
    with pytest.raises(ValueError, match=words):
        read_metric(np.array([0.1, 0.5]), mode, bounds)


@pytest.mark.parametrize(
    ("steps", "count", "horizon", "words"),
    [
        ([1, 2], 3, 10, "one step for each of 3"),
        ([2, 1], 2, 10, "increasing"),
        ([0, 1], 2, 10, "positive"),
        ([1, math.nan], 2, 10, "finite"),
        (None, 11, 10, "horizon of at least"),
        (None, 0, 0, "positive horizon"),
        (None, 2, math.inf, "finite horizon"),
        (None, 2, "100", "finite horizon"),
    ],
)
def test_steps_that_do_not_fit_are_refused(steps, count, horizon, words) -> None:
    with pytest.raises(ValueError, match=words):
        check_steps(steps, count, horizon)
