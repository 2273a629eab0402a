"""Optuna's distributions as columns of the unit cube, and back.

A float is a column, over its logarithm if it says so; integers and steps are levels of a column,
from 0 to 1; a choice among k is k columns of which one is 1. These are the columns that
`priors.spaces` pretrains on. `acquisition.py` looks for good points here, `sampler.py` decodes
them.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from torch import Tensor
from torch.quasirandom import SobolEngine

ONE_HOT = 16  # choices at most; more of them become levels of one column, in their order
NEAR = 16  # levels that a neighbour may take: all of them, or the nearest


class Parameter(NamedTuple):
    """One parameter and its columns."""

    name: str
    distribution: BaseDistribution
    start: int  # its first column
    width: int  # columns
    levels: int  # number of values, 0 where continuous

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.width)

    @property
    def is_one_hot(self) -> bool:
        return self.width > 1


class Space:
    """The columns of named parameters; those that can take one value only have none.

    Args:
        distributions: by name; floats, integers and categories of Optuna.

    Attributes:
        dim: columns.
        size: number of points, inf if a column is continuous.
        continuous: (dim,) whether a column is.

    Raises:
        ValueError: a distribution of another kind.

    Example:
        >>> lr = FloatDistribution(1e-4, 1e-2, log=True)
        >>> space = Space({"lr": lr, "layers": IntDistribution(1, 5)})
        >>> space.encode({"lr": 1e-3, "layers": 2})
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self.distributions = dict(distributions)
        self.parameters: list[Parameter] = []
        self.dim = 0
        for name, distribution in self.distributions.items():
            levels = _count_levels(name, distribution)
            if levels == 1:
                continue
            is_category = isinstance(distribution, CategoricalDistribution)
            width = levels if is_category and levels <= ONE_HOT else 1
            self.parameters.append(Parameter(name, distribution, self.dim, width, levels))
            self.dim += width
        self.continuous = torch.ones(self.dim, dtype=torch.bool)
        for parameter in self.parameters:
            self.continuous[parameter.columns] = parameter.levels == 0
        self.size = math.prod(float(p.levels or math.inf) for p in self.parameters)

    def encode(self, params: Mapping[str, Any]) -> Tensor:
        """The point (dim,) of parameters in their own units; names of no column are ignored."""
        x = torch.zeros(self.dim, dtype=torch.float64)
        for parameter in self.parameters:
            value = parameter.distribution.to_internal_repr(params[parameter.name])
            if parameter.is_one_hot:
                x[parameter.start + int(value)] = 1.0
            else:
                x[parameter.start] = _to_unit(value, parameter)
        return x

    def decode(self, x: Tensor) -> dict[str, Any]:
        """The parameters, as Optuna passes them to an objective, of the valid point next to x."""
        params: dict[str, Any] = {}
        by_name = {parameter.name: parameter for parameter in self.parameters}
        for name, distribution in self.distributions.items():
            if name not in by_name:
                params[name] = _only_value(distribution)
            elif by_name[name].is_one_hot:
                index = int(x[by_name[name].columns].argmax())
                params[name] = distribution.to_external_repr(float(index))
            else:
                params[name] = _from_unit(float(x[by_name[name].start]), by_name[name])
        return params

    def snap(self, X: Tensor) -> Tensor:
        """The valid points next to X (..., dim): levels, one 1 among the columns of a choice."""
        X = X.clamp(0.0, 1.0)
        for parameter in self.parameters:
            if parameter.is_one_hot:
                largest = X[..., parameter.columns].argmax(-1)
                X[..., parameter.columns] = _one_hot(largest, parameter.width, X)
            elif parameter.levels:
                X[..., parameter.start] = _snap_levels(X[..., parameter.start], parameter)
        return X

    def from_uniform(self, shares: Tensor) -> Tensor:
        """Valid points (n, dim) from numbers (n, parameters) in [0, 1): all levels equally likely.

        Integers on a logarithmic scale are as likely as their logarithms are far apart.
        """
        X = shares.new_empty(len(shares), self.dim)
        for share, parameter in zip(shares.unbind(-1), self.parameters, strict=True):
            if parameter.is_one_hot:
                index = (share * parameter.width).long().clamp_max(parameter.width - 1)
                X[:, parameter.columns] = _one_hot(index, parameter.width, X)
            elif not parameter.levels or _is_log(parameter.distribution):
                X[:, parameter.start] = share
            else:
                index = (share * parameter.levels).floor().clamp_max(parameter.levels - 1)
                X[:, parameter.start] = index / (parameter.levels - 1)
        return self.snap(X)

    def sobol(self, n: int, *, seed: int, skip: int = 0) -> Tensor:
        """Points `skip` to `skip + n` of a scrambled Sobol sequence, (n, dim)."""
        if not self.parameters:
            return torch.zeros(n, 0, dtype=torch.float64)
        engine = SobolEngine(len(self.parameters), scramble=True, seed=seed)
        if skip:
            engine.fast_forward(skip)
        return self.from_uniform(engine.draw(n, dtype=torch.float64))

    def uniform(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Random points (n, dim)."""
        shape = (n, len(self.parameters))
        return self.from_uniform(torch.rand(shape, dtype=torch.float64, generator=generator))

    def perturb(
        self, X: Tensor, scale: Tensor, change: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Valid points (n, dim) near X: some parameters move by normal steps, choices are redrawn.

        Args:
            scale: (n, 1) standard deviations of the steps.
            change: (n, 1) probabilities that a parameter changes; one always does.
        """
        n, count = len(X), len(self.parameters)
        draw = torch.rand(n, count, dtype=torch.float64, generator=generator)
        changes = (draw < change) | (draw == draw.amin(-1, keepdim=True))
        steps = torch.randn(n, self.dim, dtype=torch.float64, generator=generator)
        moved = (X + scale * steps).clamp(0.0, 1.0)
        fresh = self.uniform(n, generator=generator)
        for index, parameter in enumerate(self.parameters):
            if parameter.is_one_hot:
                moved[:, parameter.columns] = fresh[:, parameter.columns]
            elif parameter.levels:  # a step of a standard deviation below one level is a level
                column = parameter.start
                least = 1.0 / (parameter.levels - 1)
                stride = steps[:, column].sign() * least * (1 + steps[:, column].abs()).floor()
                far = torch.where(scale[:, 0] > least, scale[:, 0] * steps[:, column], stride)
                moved[:, column] = (X[:, column] + far).clamp(0.0, 1.0)
            keep = ~changes[:, index : index + 1]
            moved[:, parameter.columns] = torch.where(
                keep, X[:, parameter.columns], moved[:, parameter.columns]
            )
        return self.snap(moved)

    def neighbours(self, x: Tensor, names: set[str] | None = None) -> Tensor:
        """Valid points (m, dim) that differ from x in one discrete parameter.

        All values of up to 16 levels, the nearest and some further ones of more.

        Args:
            names: of parameters that may change; all by default.
        """
        points = [x.new_empty(0, self.dim)]
        for parameter in self.parameters:
            if parameter.levels and (names is None or parameter.name in names):
                values = self._values_near(x[parameter.columns], parameter)
                rows = x.repeat(len(values), 1)
                rows[:, parameter.columns] = values
                points.append(rows)
        near = torch.cat(points)
        return near[(near - x).abs().amax(-1) > 1e-12] if self.dim else near

    def enumerate(self) -> Tensor:
        """All points (size, dim) of a space without continuous columns."""
        assert self.size < math.inf
        values = [self.values(parameter.name, parameter.levels) for parameter in self.parameters]
        rows = [torch.cat(row) for row in itertools.product(*values)]
        return torch.stack(rows) if self.dim else torch.zeros(1, 0, dtype=torch.float64)

    def values(self, name: str, n: int) -> Tensor:
        """At most n values (k, width) of a parameter's columns, evenly from end to end.

        Of a choice with columns of its own all, whatever n is.
        """
        parameter = next(p for p in self.parameters if p.name == name)
        if parameter.is_one_hot:
            return torch.eye(parameter.width, dtype=torch.float64)
        if 0 < parameter.levels <= n:
            levels = torch.arange(parameter.levels, dtype=torch.float64)
            return _unit_of_levels(levels, parameter).unsqueeze(-1)
        column = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
        column = _snap_levels(column, parameter).unique() if parameter.levels else column
        return column.unsqueeze(-1)

    def _values_near(self, value: Tensor, parameter: Parameter) -> Tensor:
        """Values (k, width) of a discrete parameter: all, or the nearest and ever further ones."""
        if parameter.is_one_hot or parameter.levels <= NEAR:
            return self.values(parameter.name, NEAR)
        last = parameter.levels - 1
        middle = _level_of(float(value), parameter)
        strides = torch.logspace(0, math.log2(last), NEAR // 2, base=2.0).round().double()
        levels = torch.cat([middle - strides, middle + strides])
        levels = levels[(levels >= 0) & (levels <= last)].unique()
        return _unit_of_levels(levels, parameter).unsqueeze(-1)


def read_space(path: Path) -> dict[str, BaseDistribution]:
    """Optuna's distributions in a TOML file with a table for each parameter.

    A table has `low` and `high`, perhaps `log` or `step`, or it has `choices`. Whole numbers are
    integers, unless `type = "float"`.

    Raises:
        ValueError: naming the table and what it lacks.

    Example of a file:
        [lr]
        low = 1e-5
        high = 1e-1
        log = true
        [layers]
        low = 1
        high = 8
        [optimizer]
        choices = ["adam", "sgd"]
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"Expected {path} to be TOML: {error}") from error
    if not tables:
        raise ValueError(f"Expected a table for each parameter in {path}; it is empty.")
    return {name: _read_table(name, table) for name, table in tables.items()}


def _read_table(name: str, table: Any) -> BaseDistribution:
    fields = {"low", "high", "log", "step", "choices", "type"}
    if not isinstance(table, dict) or not set(table) <= fields:
        raise ValueError(f"Expected [{name}] with fields among {sorted(fields)}; got {table}.")
    kind = table.pop("type", None)
    if "choices" in table:
        if set(table) > {"choices"} or kind not in (None, "categorical"):
            raise ValueError(f"Expected [{name}] with choices alone; got {table}.")
        if not isinstance(table["choices"], list) or not table["choices"]:
            raise ValueError(f"Expected [{name}] with a list of choices; got {table['choices']!r}.")
        if not all(isinstance(choice, bool | int | float | str) for choice in table["choices"]):
            raise ValueError(
                f"Expected [{name}] with numbers, texts and booleans; got {table['choices']}."
            )
        return CategoricalDistribution(table["choices"])
    if not {"low", "high"} <= set(table) or kind not in (None, "float", "int"):
        raise ValueError(
            f"Expected [{name}] with low and high, or choices, and a type float or int; got {table}"
        )
    if not isinstance(table.get("log", False), bool):
        raise ValueError(f"Expected [{name}] with log true or false; got {table['log']!r}.")
    numbers = [table[key] for key in ("low", "high", "step") if key in table]
    whole = all(isinstance(number, int) for number in numbers)
    if kind == "int" and not whole:
        raise ValueError(f"Expected [{name}] of type int with whole numbers; got {table}.")
    try:
        return IntDistribution(**table) if kind != "float" and whole else FloatDistribution(**table)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected a range in [{name}]: {error}") from error


def _count_levels(name: str, distribution: BaseDistribution) -> int:
    """The number of values, 0 if infinite."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        raise ValueError(
            f"Expected a float, int or categorical distribution of {name!r}; got {distribution!r}."
        )
    if distribution.single():
        return 1
    if distribution.step is None or (
        isinstance(distribution, FloatDistribution) and _is_log(distribution)
    ):
        return 0
    return round((distribution.high - distribution.low) / distribution.step) + 1


def _only_value(distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return distribution.low


def _is_log(distribution: BaseDistribution) -> bool:
    return bool(getattr(distribution, "log", False))


def _range(parameter: Parameter) -> tuple[float, float]:
    """The ends of the column, of the logarithm where it is one."""
    low, high = float(parameter.distribution.low), float(parameter.distribution.high)  # type: ignore[attr-defined]
    return (math.log(low), math.log(high)) if _is_log(parameter.distribution) else (low, high)


def _to_unit(value: float, parameter: Parameter) -> float:
    """The column of a number, or of the index of a choice."""
    if isinstance(parameter.distribution, CategoricalDistribution):
        return value / (parameter.levels - 1)
    low, high = _range(parameter)
    number = math.log(value) if _is_log(parameter.distribution) else value
    return min(1.0, max(0.0, (number - low) / (high - low)))


def _from_unit(unit: float, parameter: Parameter) -> Any:
    distribution = parameter.distribution
    if parameter.levels:
        level = _level_of(unit, parameter)
        if isinstance(distribution, CategoricalDistribution):
            return distribution.to_external_repr(float(level))
        if isinstance(distribution, IntDistribution):
            return distribution.low + level * distribution.step
        assert isinstance(distribution, FloatDistribution) and distribution.step is not None
        return min(distribution.low + level * distribution.step, distribution.high)
    assert isinstance(distribution, FloatDistribution)
    low, high = _range(parameter)
    number = low + unit * (high - low)
    number = math.exp(number) if distribution.log else number
    return min(max(number, distribution.low), distribution.high)


def _level_of(unit: float, parameter: Parameter) -> int:
    """The index of the level next to a column's value."""
    last = parameter.levels - 1
    if not _is_log(parameter.distribution):
        return round(min(max(unit, 0.0), 1.0) * last)
    low, high = _range(parameter)
    first = round(math.exp(low))
    return min(max(round(math.exp(low + unit * (high - low))) - first, 0), last)


def _unit_of_levels(levels: Tensor, parameter: Parameter) -> Tensor:
    """The column's values of the levels with these indices."""
    if not _is_log(parameter.distribution):
        return levels / (parameter.levels - 1)
    low, high = _range(parameter)
    return ((levels + round(math.exp(low))).log() - low) / (high - low)


def _snap_levels(column: Tensor, parameter: Parameter) -> Tensor:
    last = parameter.levels - 1
    if not _is_log(parameter.distribution):
        return (column * last).round() / last
    low, high = _range(parameter)
    number = (low + column * (high - low)).exp() - round(math.exp(low))
    return _unit_of_levels(number.round().clamp(0, last), parameter)


def _one_hot(index: Tensor, width: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(index, width).to(like)
