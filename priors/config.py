"""Priors as plain data: what a checkpoint's card stores, and how it is read back.

Only classes named in `PRIORS`, `DISTRIBUTIONS` and `TRANSFORMS` are ever built, from numbers,
strings, lists and other configs; nothing is executed.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, distributions
from torch.distributions import Distribution, Transform

from priors.bnn import BNN
from priors.curves import LearningCurves
from priors.flows import WeightFlow
from priors.gp import GaussianProcess
from priors.linear import Linear
from priors.mixture import Mixture
from priors.nngp import NNGP
from priors.parametric_curves import ParametricCurves
from priors.scale_mixture import ScaleMixture
from priors.scales import BurrXII
from priors.searched import Searched
from priors.warped import Warped

PRIORS: dict[str, type] = {
    "BNN": BNN,
    "GaussianProcess": GaussianProcess,
    "LearningCurves": LearningCurves,
    "Linear": Linear,
    "Mixture": Mixture,
    "NNGP": NNGP,
    "ParametricCurves": ParametricCurves,
    "ScaleMixture": ScaleMixture,
    "Searched": Searched,
    "Warped": Warped,
}
PARTS: dict[str, type] = {"WeightFlow": WeightFlow}  # of priors, written and read like them

DISTRIBUTIONS: dict[str, Any] = {
    name: getattr(distributions, name)
    for name in (
        "Beta Cauchy Chi2 Exponential Gamma Gumbel HalfCauchy HalfNormal InverseGamma Kumaraswamy "
        "Laplace LogNormal Normal Pareto StudentT Uniform Weibull"
    ).split()
} | {"BurrXII": BurrXII}

TRANSFORMS: dict[str, tuple[str, ...]] = {  # with the numbers that define each
    "AffineTransform": ("loc", "scale"),
    "ExpTransform": (),
    "PowerTransform": ("exponent",),
    "SigmoidTransform": (),
    "SoftplusTransform": (),
    "TanhTransform": (),
}


def to_config(value: Any) -> Any:
    """A JSON-able description of a prior, from which `from_config` builds an equal one.

    A prior becomes {"prior": class name, field: value, ...}, a distribution {"distribution": class
    name, parameter: value, ...} with "dtype" where its parameters are not float32, a transform
    {"transform": class name, parameter: number, ...}.

    Raises:
        ValueError: a class that is not built in, or a value that is not plain data.
    """
    if dataclasses.is_dataclass(value) and type(value) is (PRIORS | PARTS).get(
        type(value).__name__
    ):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"prior": type(value).__name__} | {k: to_config(v) for k, v in fields.items()}
    if isinstance(value, Distribution):
        return _distribution_to_config(value)
    if isinstance(value, Transform):
        return _transform_to_config(value)
    if isinstance(value, tuple | list):
        return [to_config(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"Expected a prior among {sorted(PRIORS)}, a distribution among {sorted(DISTRIBUTIONS)}, a "
        f"transform among {sorted(TRANSFORMS)}, or numbers, strings and sequences of them; got "
        f"{type(value).__name__}."
    )


def from_config(config: Any) -> Any:
    """The prior that `to_config` described; lists become tuples.

    Raises:
        ValueError: an unknown class, or fields that its class does not have.
    """
    if isinstance(config, list | tuple):
        return tuple(from_config(item) for item in config)
    if not isinstance(config, dict):
        return config
    if "distribution" in config:
        return _distribution_from_config(config)
    if "transform" in config:
        return _transform_from_config(config)
    fields = dict(config)
    name = fields.pop("prior", None)
    cls = (PRIORS | PARTS).get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"Expected a prior among {sorted(PRIORS)}; got {name!r}.")
    known = {field.name for field in dataclasses.fields(cls)}
    if not set(fields) <= known:
        unknown = sorted(set(fields) - known)
        raise ValueError(f"Expected fields of {name} among {sorted(known)}; got also {unknown}.")
    return cls(**{field: from_config(value) for field, value in fields.items()})


def _distribution_to_config(value: Distribution) -> dict[str, Any]:
    name = type(value).__name__
    if type(value) is not DISTRIBUTIONS.get(name):
        raise ValueError(f"Expected a distribution among {sorted(DISTRIBUTIONS)}; got {name}.")
    parameters: dict[str, Tensor] = {k: getattr(value, k) for k in _names(DISTRIBUTIONS[name])}
    dtypes = {str(v.dtype).removeprefix("torch.") for v in parameters.values()} - {"float32"}
    config: dict[str, Any] = {"distribution": name} | ({"dtype": dtypes.pop()} if dtypes else {})
    return config | {k: v.tolist() for k, v in parameters.items()}


def _distribution_from_config(config: dict[str, Any]) -> Distribution:
    parameters = dict(config)
    name, dtype = parameters.pop("distribution"), parameters.pop("dtype", "float32")
    cls = DISTRIBUTIONS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ValueError(f"Expected a distribution among {sorted(DISTRIBUTIONS)}; got {name!r}.")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"Expected a dtype float32 or float64 for {name}; got {dtype!r}.")
    if set(parameters) != set(_names(cls)):
        raise ValueError(f"Expected parameters {_names(cls)} of {name}; got {sorted(parameters)}.")
    tensors = {k: torch.tensor(v, dtype=getattr(torch, dtype)) for k, v in parameters.items()}
    return cls(**tensors)


def _transform_to_config(value: Transform) -> dict[str, Any]:
    name = type(value).__name__
    if name not in TRANSFORMS or type(value) is not getattr(distributions, name):
        raise ValueError(f"Expected a transform among {sorted(TRANSFORMS)}; got {name}.")
    return {"transform": name} | {k: float(getattr(value, k)) for k in TRANSFORMS[name]}


def _transform_from_config(config: dict[str, Any]) -> Transform:
    parameters = dict(config)
    name = parameters.pop("transform")
    if not isinstance(name, str) or name not in TRANSFORMS:
        raise ValueError(f"Expected a transform among {sorted(TRANSFORMS)}; got {name!r}.")
    if set(parameters) != set(TRANSFORMS[name]):
        raise ValueError(
            f"Expected parameters {TRANSFORMS[name]} of {name}; got {sorted(parameters)}."
        )
    transform: Transform = getattr(distributions, name)(**parameters)
    return transform


def _names(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "validate_args"]
