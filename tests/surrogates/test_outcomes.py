"""Outcomes: an increasing map with an inverse, which does not care about units or outliers."""

import pytest
import torch

from surrogates.outcomes import read_outcomes


def values(n=40, m=1):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, m, dtype=torch.float64, generator=g)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("objectives", [1, 2])
def test_decode_inverts_encode(n, objectives):
    Y = 3 + 100 * values(n, 2) ** 3
    outcomes = read_outcomes(Y, objectives)
    assert torch.allclose(outcomes.decode(outcomes.encode(Y)), Y, rtol=1e-9, atol=1e-9)


def test_it_increases_with_a_continuous_slope_at_the_bend():
    outcomes = read_outcomes(values(), 1)
    y = outcomes.middle + torch.tensor([[-1e-6], [0.0], [1e-6]], dtype=torch.float64)
    steps = outcomes.encode(y).diff(dim=0)
    assert bool((steps > 0).all())
    assert float(steps[1] / steps[0]) == pytest.approx(1, abs=1e-4)
    grid = torch.linspace(-1e6, 1e6, 1001, dtype=torch.float64).unsqueeze(-1)
    assert bool((outcomes.encode(grid).diff(dim=0) > 0).all())


def test_units_of_the_objective_do_not_matter():
    Y = values()
    first = read_outcomes(Y, 1).encode(Y)
    scaled = 7 + 1e-6 * Y
    assert torch.allclose(read_outcomes(scaled, 1).encode(scaled), first, atol=1e-6)


def test_encoded_objectives_have_mean_0_and_deviation_1_and_constraints_keep_their_limit():
    Y = torch.cat([values(), 5 + values()], -1)
    Z = read_outcomes(Y, 1).encode(Y)
    assert float(Z[:, 0].mean()) == pytest.approx(0, abs=1e-12)
    assert float(Z[:, 0].std(correction=0)) == pytest.approx(1)
    assert torch.allclose(Z[:, 1] * Y[:, 1].std(correction=0), Y[:, 1])


def test_one_terrible_outcome_leaves_the_differences_between_good_ones():
    Y = values()
    ruined = torch.cat([Y, torch.tensor([[-1e9]], dtype=torch.float64)])

    def spread_of_the_best(Y):
        return float(read_outcomes(Y, 1).encode(Y)[:, 0].sort().values[-10:].std())

    assert spread_of_the_best(ruined) > 0.2 * spread_of_the_best(Y)
    standardised = (ruined - ruined.mean()) / ruined.std()
    assert float(standardised[:, 0].sort().values[-10:].std()) < 1e-6


def test_several_objectives_are_only_standardised():
    Y = values(m=2)
    Z = read_outcomes(Y, 2).encode(Y)
    assert torch.allclose(Z, (Y - Y.mean(0)) / Y.std(0, correction=0))


@pytest.mark.parametrize("levels", [[0.0] * 6, [0.0] * 5 + [1.0], [0.0] + [1.0] * 5])
def test_plateaus_and_constants_stay_finite(levels):
    Y = torch.tensor(levels, dtype=torch.float64).unsqueeze(-1)
    outcomes = read_outcomes(Y, 1)
    assert bool(outcomes.encode(Y).isfinite().all())
    assert torch.allclose(outcomes.decode(outcomes.encode(Y)), Y)
