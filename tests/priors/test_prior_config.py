"""Priors to plain data and back."""

import json
import math
from typing import Any

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Cauchy,
    Chi2,
    Distribution,
    Exponential,
    Gamma,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    Kumaraswamy,
    Laplace,
    LogNormal,
    Normal,
    Pareto,
    StudentT,
    Uniform,
    Weibull,
)

from priors import BurrXII, GaussianProcess, from_config, to_config
from priors.config import DISTRIBUTIONS

EXAMPLES = [
    Beta(2.0, 3.0),
    BurrXII(2.0, 1.5),
    Cauchy(0.0, 1.0),
    Chi2(3.0),
    Exponential(2.0),
    Gamma(2.0, 3.0),
    Gumbel(0.0, 1.0),
    HalfCauchy(1.0),
    HalfNormal(2.0),
    InverseGamma(3.0, 1.0),
    Kumaraswamy(2.0, 3.0),
    Laplace(0.0, 1.0),
    LogNormal(math.log(0.3), 0.7),
    Normal(0.5, 2.0),
    Pareto(1.0, 3.0),
    StudentT(4.0, 1.0, 2.0),
    Uniform(0.1, 0.9),
    Weibull(1.0, 2.0),
]


def through_json(value: Any) -> Any:
    return from_config(json.loads(json.dumps(to_config(value))))


def test_there_is_an_example_of_every_distribution() -> None:
    assert {type(example).__name__ for example in EXAMPLES} == set(DISTRIBUTIONS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_distributions_survive_the_round_trip_to_the_last_bit(example: Distribution) -> None:
    rebuilt = through_json(example)
    assert type(rebuilt) is type(example)
    value = example.sample(torch.Size([20]))
    assert torch.equal(rebuilt.log_prob(value), example.log_prob(value))


def test_double_precision_parameters_stay_double() -> None:
    example = Normal(torch.tensor(0.1, dtype=torch.float64), 1.0)
    rebuilt = through_json(example)
    assert rebuilt.loc.dtype == torch.float64 and rebuilt.loc == example.loc


def test_a_prior_draws_the_same_tasks_after_the_round_trip() -> None:
    prior = GaussianProcess(
        kernel=("rbf", "linear"),
        lengthscale=Gamma(3.0, 4.0),
        outputscale=1.5,
        mean=Normal(0.0, 2.0),
        ard=True,
        inputs=("uniform", "grid"),
    )
    rebuilt = through_json(prior)
    assert to_config(rebuilt) == to_config(prior)
    draws = [
        p.sample(3, 5, 2, generator=torch.Generator().manual_seed(0)) for p in (prior, rebuilt)
    ]
    assert torch.equal(draws[0].y, draws[1].y)
    assert rebuilt.kernel == ("rbf", "linear")


def test_the_format_is_the_documented_one() -> None:
    config = to_config(GaussianProcess(lengthscale=Uniform(0.0, 1.0)))
    assert config["prior"] == "GaussianProcess"
    assert config["lengthscale"] == {"distribution": "Uniform", "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prior": "os.system"}, "Expected a prior among"),
        ({"kernel": "rbf"}, "Expected a prior among"),
        ({"prior": ["GaussianProcess"]}, "Expected a prior among"),
        ({"prior": "GaussianProcess", "colour": 3}, "got also"),
        ({"prior": "GaussianProcess", "noise": -1.0}, "Expected a positive noise"),
        ({"distribution": "Dirichlet", "concentration": [1.0]}, "Expected a distribution among"),
        ({"distribution": "Normal", "loc": 0.0}, "Expected parameters"),
        ({"distribution": "Normal", "loc": 0.0, "scale": -1.0}, "scale"),
        ({"distribution": "Normal", "loc": 0.0, "scale": 1.0, "dtype": "int8"}, "Expected a dtype"),
    ],
)
def test_configs_of_anything_else_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_config(config)


@pytest.mark.parametrize("value", [object(), Bernoulli(0.5), GaussianProcess, lambda: 1])
def test_values_that_are_not_plain_data_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected a"):
        to_config(value)


def test_a_subclass_is_not_taken_for_the_prior_it_extends() -> None:
    class GaussianProcess2(GaussianProcess):
        pass

    with pytest.raises(ValueError, match="got GaussianProcess2"):
        to_config(GaussianProcess2())
