"""Bends: increasing, with the limits and the slope that their formula has."""

import math

import pytest
import torch
from torch import Tensor

from priors.bends import CURVED, FLOORED, LEAK, STEEPEST, Bend

Z = torch.linspace(-30, 10, 801, dtype=torch.float64)


def bend(
    curve: float = 0.0,
    floor: float = 0.0,
    sharpness: float = 1.0,
    leak: float = 1.0,
    center: float = 0.0,
    scale: float = 1.0,
) -> Bend:
    """One task's."""
    numbers = (center, scale, curve, floor, sharpness, leak)
    return Bend(*(torch.tensor([value], dtype=torch.float64) for value in numbers))


def drawn(share: float = 1.0, tasks: int = 4000) -> Bend:
    center = torch.linspace(-3, 3, tasks, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return Bend.draw(center, 1 + center.abs(), share, generator=generator)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of(bend: Bend, z: Tensor = Z) -> Tensor:
    return bend(z.unsqueeze(0)).squeeze(0)


def test_no_bend_is_the_identity() -> None:
    tasks = torch.ones(3, dtype=torch.float64)
    none = Bend.identity(tasks)
    assert torch.equal(none(1e6 * Z.expand(3, -1)), 1e6 * Z.expand(3, -1))
    assert bool((none.log_slope(Z.expand(3, -1)).abs() < 1e-6).all())


def test_curves_are_one_minus_an_exponential_and_go_on_as_lines() -> None:
    y = of(bend(curve=0.5, center=1.0, scale=2.0))
    t = (Z - 1) / 2
    curved = 1 + 2 * (1 - torch.exp(-0.5 * t)) / 0.5
    line = Z < 1 - 2 * STEEPEST / 0.5
    torch.testing.assert_close(y[~line], curved[~line])
    slope = y.diff() / Z.diff()
    assert line.sum() > 100
    torch.testing.assert_close(
        slope[line[1:]], torch.full_like(slope[line[1:]], math.exp(STEEPEST))
    )


def test_floors_are_soft_and_leak() -> None:
    y = of(bend(floor=-1.0, sharpness=20.0, leak=0.1))
    high, low = Z > 1, Z < -3
    torch.testing.assert_close(y[high], Z[high])
    torch.testing.assert_close(y[low], 0.1 * Z[low] - 0.9)
    at = of(bend(floor=-1.0, sharpness=20.0, leak=0.1), torch.tensor([-1.0]).double())
    assert float(at) == pytest.approx(-1 + 0.9 * math.log(2) / 20)


def test_slopes_are_derivatives_and_bends_increase() -> None:
    every = drawn(tasks=300)
    z = (every.center.unsqueeze(-1) + 4 * normal(300, 50)).requires_grad_()
    (slope,) = torch.autograd.grad(every(z).sum(), z)
    torch.testing.assert_close(every.log_slope(z.detach()), slope.log(), rtol=1e-6, atol=1e-5)
    assert bool((every(z.detach().sort(1).values).diff(dim=1) >= 0).all())


def test_bends_keep_the_units_of_what_they_bend() -> None:
    one = drawn(tasks=50)
    z = normal(50, 20)
    other = one._replace(center=3 * one.center + 1, scale=3 * one.scale)
    torch.testing.assert_close(other(3 * z + 1), 3 * one(z) + 1)


def test_the_share_is_bent_and_the_rest_is_not() -> None:
    some = drawn(0.4)
    bent = (some.curve > 0) | (some.leak < 1)
    either = 0.4 * (1 - (1 - CURVED) * (1 - FLOORED))
    assert float(bent.double().mean()) == pytest.approx(either, abs=4 * 0.5 / math.sqrt(4000))
    z = some.center.unsqueeze(-1) + some.scale.unsqueeze(-1) * normal(4000, 5)
    assert torch.equal(some(z)[~bent], z[~bent])
    assert bool((some(z)[bent] != z[bent]).any(1).all())
    floored = some.leak < 1
    assert LEAK[0] <= float(some.leak.min()) and float(some.leak[floored].max()) <= LEAK[1]
