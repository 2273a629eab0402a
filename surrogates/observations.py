"""Observations as our own surrogates see them: in the unit cube, of mean 0 and deviation 1.

Outcomes are standardised after an outcome transform, by a map that stays as it is when more are
added, and that works at any scale, where BoTorch's Standardize stops at 1e-8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Tensor

from surrogates.base import Surrogate


class Observations(NamedTuple):
    """What a surrogate has seen, and y = location + scale * (what it sees)."""

    x: Tensor  # (..., n, d), in the unit cube
    y: Tensor  # (..., n)
    location: Tensor  # ()
    scale: Tensor  # (), positive


def observe(
    X: Tensor,
    Y: Tensor,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
) -> Observations:
    """X (n, d) and Y (n, 1) after the transforms, which are fitted to them, and standardised.

    Outcomes are only shifted where n < 2 or all are equal.

    Raises:
        ValueError: data of other shapes, or no observation.
    """
    if X.dim() != 2 or Y.shape != (len(X), 1) or not len(X):
        raise ValueError(
            "Expected X (n, d) and Y (n, 1) of at least one observation; got "
            f"{tuple(X.shape)} and {tuple(Y.shape)}."
        )
    X, Y = X.double(), Y.double()
    x = X if input_transform is None else input_transform(X)
    if outcome_transform is not None:
        Y = outcome_transform.train()(Y, X=x)[0]
        outcome_transform.eval()
    y = Y.squeeze(-1)
    location = y.mean()
    rounding = 4 * torch.finfo(y.dtype).eps * y.abs().amax()
    is_constant = bool(y.amax() - y.amin() <= rounding)
    scale = torch.ones_like(location) if is_constant else y.std()
    return Observations(x, (y - location) / scale, location, scale)


def observe_more(model: Surrogate, seen: Observations, X: Tensor, Y: Tensor) -> Observations:
    """X (batch x n x d) and Y (batch x n x 1) alone, as a fitted model sees them."""
    x, Y = model.transform_inputs(X.double()), Y.double()
    if hasattr(model, "outcome_transform"):
        Y = model.outcome_transform(Y, X=x)[0]
    return seen._replace(x=x, y=(Y.squeeze(-1) - seen.location) / seen.scale)


def append(old: Tensor, new: Tensor, batch: torch.Size) -> Tensor:
    """The rows of (..., n, k) and (..., m, k) together, (batch, n + m, k)."""
    return torch.cat([part.expand(*batch, *part.shape[-2:]) for part in (old, new)], -2)
