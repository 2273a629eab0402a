"""Priors from programs in a probabilistic language: the front door, which needs no extra itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from priors.pyro_program import PyroProgram


def from_pyro(
    model: Callable[[Tensor], Any], *, inputs: str | tuple[str, ...] = "uniform"
) -> PyroProgram:
    """A prior from a Pyro program of one data set, with its posterior by NUTS.

    Args:
        model: maps x (n, d), in float64, to samples. "y" (n,) is the site of the observations,
            independent of each other given all else; a deterministic site "f" (n,) is the
            noise-free function, or without one the mean of y's distribution is. All randomness is
            that of `pyro.sample`, and what precedes a point does not depend on others: the first n
            of n + 1 points have the law of n points.
        inputs: a design in `priors.inputs.DESIGNS`, or several, one of them drawn per task.

    Raises:
        ModuleNotFoundError: without the extra `reference`.
        ValueError: unknown inputs, or a model that cannot be called.

    Example:
        >>> import pyro, torch
        >>> def model(x):
        ...     slope = pyro.sample("slope", pyro.distributions.Normal(0.0, 1.0))
        ...     with pyro.plate("points", len(x)):
        ...         pyro.sample("y", pyro.distributions.Normal(slope * x[:, 0], 0.1))
        >>> g = torch.Generator().manual_seed(0)
        >>> from_pyro(model).sample(batch=64, n=100, d=1, generator=g).latents["slope"].shape
        torch.Size([64])
    """
    from priors.pyro_program import PyroProgram  # on demand: it imports Pyro

    return PyroProgram(model, inputs)
