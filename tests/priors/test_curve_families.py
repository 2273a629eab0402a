"""The eleven families at points worked out by hand, and the laws of their parameters."""

import math

import pytest
import torch
from torch.distributions import Normal, Uniform

from priors import curve_families
from priors.curve_families import FAMILIES, log_density

# a step, parameters in the order of the formula, and the value; e.g. pow3: 0.9 - 0.5 * 4^-0.5
BY_HAND = {
    "pow3": (4.0, (0.9, 0.5, 0.5), 0.65),
    "ilog2": (math.e - 1, (0.8, 0.3), 0.5),
    "janoschek": (4.0, (0.9, 0.1, math.log(2), 0.5), 0.7),  # 0.9 - 0.8 / 4
    "log_power": (math.e**2, (0.8, 1.0, -2.0), 0.8 / (1 + math.e**-2)),
    "weibull": (2.0, (1.0, 0.2, 0.5, 3.0), 1 - 0.8 / math.e),
    "mmf": (6.0, (0.9, 0.1, 0.5, 1.0), 0.7),  # 0.9 - 0.8 / (1 + 3)
    "vap": (2.0, (-1.0, -2.0, 1.0), 2 * math.exp(-2)),
    "loglog_linear": (math.e, (0.5, 1.5), math.log(2)),
    "exp4": (4.0, (0.9, 0.5, 1.0, 0.5), 0.9 - 1),  # exp(-0.5 * 2 + 1) = 1
    "pow4": (3.0, (0.9, 2.0, 2.0, 1.0), 0.775),  # 0.9 - 1 / 8
    "dr_hill": (4.0, (0.8, 2.0, 2.0), 0.64),  # 0.8 * 16 / (4 + 16)
}


def test_there_are_eleven() -> None:
    assert set(FAMILIES) == set(BY_HAND) and len(BY_HAND) == 11


@pytest.mark.parametrize("name", BY_HAND)
def test_formulas_at_points_worked_out_by_hand(name: str) -> None:
    step, parameters, expected = BY_HAND[name]
    values = (torch.tensor(p, dtype=torch.float64) for p in parameters)
    value = getattr(curve_families, name)(torch.tensor(step, dtype=torch.float64), *values)
    assert float(value) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_parameters_scale_the_curve(name: str) -> None:
    family = FAMILIES[name]
    _, parameters, _ = BY_HAND[name]
    x = torch.arange(1.0, 20.0, dtype=torch.float64)
    doubled = [2 * p if i < family.linear else p for i, p in enumerate(parameters)]
    once, twice = (
        family.function(x, *(torch.tensor(p, dtype=torch.float64) for p in some))
        for some in (parameters, doubled)
    )
    factor = 2 if family.linear else 1
    torch.testing.assert_close(twice, factor * once, rtol=1e-14, atol=0)


PRIORS = {
    ("pow3", "c"): Uniform(0, 1.25),
    ("pow3", "a"): Uniform(-0.6, 0.6),
    ("janoschek", "beta"): Uniform(0, 2),
    ("log_power", "a"): Normal(0.8, 0.1),
    ("log_power", "c"): Uniform(-3, 0),
    ("weibull", "alpha"): Uniform(0, 1.5),
    ("vap", "b"): Uniform(-4, 0),
}
LOGARITHMS = {
    ("pow3", "alpha"): Normal(0, 2),
    ("janoschek", "k"): Normal(-2, 1),
    ("janoschek", "delta"): Normal(0, 0.5),
    ("mmf", "kappa"): Normal(0, 2),
    ("vap", "c"): Uniform(-8, 0),
    ("loglog_linear", "b"): Uniform(0, 1),
    ("exp4", "b"): Normal(0, 0.5),
    ("pow4", "a"): Normal(-3, 2),
    ("dr_hill", "kappa"): Normal(1, 2),
}


@pytest.mark.parametrize("key", [*PRIORS, *LOGARITHMS], ids="-".join)
def test_parameters_follow_the_published_laws(key: tuple[str, str]) -> None:
    # quantiles of the standard normal coordinate are quantiles of the law
    family, name = key
    parameter = next(p for p in FAMILIES[family].parameters if p.name == name)
    level = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    value = parameter.value(torch.special.ndtri(level))
    law = PRIORS.get(key) or LOGARITHMS[key]
    linked = value if key in PRIORS else value.log()
    torch.testing.assert_close(law.cdf(linked), level, atol=1e-6, rtol=0)  # float32 constants


def test_one_minus_c_of_pow4_is_log_uniform() -> None:
    c = FAMILIES["pow4"].parameters[0].value(torch.tensor([-40.0, 0.0, 40.0]).double())
    expected = 1 - torch.tensor([-5.0, -2.5, 0.0]).double().exp()
    torch.testing.assert_close(c, expected, rtol=1e-12, atol=1e-12)


def test_the_density_of_coordinates_is_standard_normal() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, -2.5], dtype=torch.float64) - math.log(2 * math.pi)
    torch.testing.assert_close(log_density(z), expected, rtol=1e-14, atol=0)


def test_large_exponents_stay_finite() -> None:
    # k^e and x^e overflow: the published form would give infinity / infinity
    x = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    theta, eta, kappa = (torch.tensor(v, dtype=torch.float64) for v in (0.8, 400.0, 100.0))
    torch.testing.assert_close(
        curve_families.dr_hill(x, theta, eta, kappa), torch.tensor([0.0, 0.8]).double()
    )
