"""Where the user thinks that the optimum lies, as a density over the points of a space.

`sampler.py` makes one of its `prior_optimum`; `acquisition.py` weighs an acquisition by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from optuna.distributions import CategoricalDistribution
from torch import Tensor

from surrogates.spaces import Space


class Belief:
    """Where the user thinks that the optimum lies; its weight fades as observations come.

    A parameter lies with probability 9/10 in its interval, whose edges are smooth, or among its
    choices, and otherwise anywhere. The acquisition is multiplied by density ^ (beta / n).

    Args:
        space: its parameters.
        optimum: by parameter, an interval (low, high) or a number, or one or several choices; names
            that are not in the space are ignored.
        beta: observations after which the density counts once; after n it has the power beta / n.

    Raises:
        ValueError: an interval or a choice outside the parameter's range.

    Reference: Hvarfner et al., piBO: Augmenting Acquisition Functions with User Beliefs, ICLR 2022,
    arXiv 2204.11051, equation 6; intervals as in Müller et al., PFNs4BO, ICML 2023, section 5.
    """

    SURE = 0.9

    def __init__(self, space: Space, optimum: Mapping[str, Any], beta: float = 10.0) -> None:
        self.space, self.beta = space, beta
        self.intervals: dict[int, tuple[float, float]] = {}
        self.choices: dict[int, Tensor] = {}
        for index, parameter in enumerate(space.parameters):
            if parameter.name not in optimum:
                continue
            wanted, distribution = optimum[parameter.name], parameter.distribution
            if isinstance(distribution, CategoricalDistribution):
                self.choices[index] = self._among(parameter.name, wanted, distribution)
            else:
                self.intervals[index] = self._between(parameter.name, wanted, distribution)

    def log_density(self, X: Tensor) -> Tensor:
        """Of valid points (..., dim), relative to the uniform distribution."""
        total = torch.zeros(X.shape[:-1], dtype=X.dtype)
        for index, (low, high) in self.intervals.items():
            column = X[..., self.space.parameters[index].start]
            edge = 0.05 * (high - low)
            inside = ((column - low) / edge).sigmoid() * ((high - column) / edge).sigmoid()
            total = total + (self.SURE * inside / (high - low) + 1 - self.SURE).log()
        for index, weights in self.choices.items():
            parameter = self.space.parameters[index]
            values = self.space.values(parameter.name, parameter.levels)
            away = X[..., parameter.columns].unsqueeze(-2) - values  # (..., choice, width)
            total = total + weights[away.abs().sum(-1).argmin(-1)].log()
        return total

    def weigh(self, acquisition: Callable[[Tensor], Tensor], n: int) -> Callable[[Tensor], Tensor]:
        """The logarithm of an acquisition after n observations."""
        power = self.beta / max(n, 1)
        return lambda X: acquisition(X) + power * self.log_density(X)

    def sobol(self, n: int, *, seed: int, skip: int = 0) -> Tensor:
        """Valid points (n, dim) where the optimum is believed to be."""
        X = self.space.sobol(n, seed=seed, skip=skip)
        for index, (low, high) in self.intervals.items():
            column = self.space.parameters[index].start
            X[:, column] = low + X[:, column] * (high - low)
        generator = torch.Generator().manual_seed(seed)
        for index, weights in self.choices.items():
            drawn = torch.multinomial(weights, skip + n, replacement=True, generator=generator)
            parameter = self.space.parameters[index]
            values = self.space.values(parameter.name, parameter.levels)
            X[:, parameter.columns] = values[drawn[skip:]]
        return self.space.snap(X)

    def _between(self, name: str, wanted: Any, distribution: Any) -> tuple[float, float]:
        """The ends of the interval on the column, at least a hundredth apart."""
        ends = wanted if isinstance(wanted, tuple | list) and len(wanted) == 2 else (wanted, wanted)
        try:
            inside = all(distribution.low <= end <= distribution.high for end in ends)
        except TypeError:  # no numbers
            inside = False
        if not inside:
            raise ValueError(
                f"Expected prior_optimum of {name!r} within {distribution}; got {wanted!r}."
            )
        alone = Space({name: distribution})
        low, high = sorted(float(alone.encode({name: end})[0]) for end in ends)
        half = max(0.0, 0.01 - (high - low)) / 2
        return low - half, high + half

    def _among(self, name: str, wanted: Any, distribution: CategoricalDistribution) -> Tensor:
        """The probability of each choice times their number."""
        choices = distribution.choices
        is_one = wanted in choices or not isinstance(wanted, list | tuple | set)
        several = [wanted] if is_one else list(wanted)
        if not several or any(choice not in choices for choice in several):
            raise ValueError(f"Expected prior_optimum of {name!r} among {choices}; got {wanted!r}.")
        weights = torch.full((len(choices),), 1 - self.SURE, dtype=torch.float64)
        for choice in several:
            weights[choices.index(choice)] += self.SURE * len(choices) / len(several)
        return weights
