"""Where the inputs of a task lie. The prior's box is [0, 1]^d; some designs spill over it a little.

A design maps (batch, n, d, generator) to inputs (batch, n, d) in float64. Rows come in exchangeable
random order, so that any split into context and query is valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from priors.draws import draw_normal

Design = Callable[..., Tensor]


def uniform(batch: int, n: int, d: int, *, generator: torch.Generator) -> Tensor:
    """Independent uniform inputs on the box."""
    return torch.rand(
        batch, n, d, dtype=torch.float64, device=generator.device, generator=generator
    )


def normal(batch: int, n: int, d: int, *, generator: torch.Generator) -> Tensor:
    """Independent normal inputs with mean 1/2 and standard deviation 1/5: 1.2 % lie off the box."""
    return 0.5 + 0.2 * draw_normal(batch, n, d, generator=generator)


def clustered(batch: int, n: int, d: int, *, generator: torch.Generator) -> Tensor:
    """Inputs around one to eight centres per task, with one width per task from 0.02 to 0.2."""
    count = torch.randint(1, 9, (batch, 1), device=generator.device, generator=generator)
    share = uniform(batch, n, 1, generator=generator).squeeze(-1)
    cluster = (share * count).long()  # (task, point)
    centers = uniform(batch, 8, d, generator=generator)
    width = 0.02 * 10 ** uniform(batch, 1, 1, generator=generator)
    centers = centers.gather(1, cluster.unsqueeze(-1).expand(-1, -1, d))  # (task, point, dim)
    return centers + width * draw_normal(batch, n, d, generator=generator)


def grid(batch: int, n: int, d: int, *, generator: torch.Generator) -> Tensor:
    """An even grid in each feature, shuffled per task and feature (a Latin hypercube)."""
    order = uniform(batch, n, d, generator=generator).argsort(1)
    return (order.to(torch.float64) + 0.5) / n


DESIGNS: dict[str, Design] = {
    "uniform": uniform,
    "normal": normal,
    "clustered": clustered,
    "grid": grid,
}


def read_designs(inputs: str | Sequence[str]) -> tuple[str, ...]:
    """The names of the designs that `inputs` means, one or several.

    Raises:
        ValueError: none, or one that is not in `DESIGNS`.
    """
    designs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if not designs or not set(designs) <= set(DESIGNS):
        raise ValueError(f"Expected inputs among {sorted(DESIGNS)}; got {designs}.")
    return designs


def standardise_inputs(x: Tensor) -> Tensor:
    """Inputs as networks see them: of mean 0 and variance 1 under the uniform design."""
    return math.sqrt(12) * (x - 0.5)


def draw_inputs(
    inputs: str | Sequence[str], batch: int, n: int, d: int, *, generator: torch.Generator
) -> Tensor:
    """Inputs (batch, n, d) in float64, each task by a design drawn uniformly from `inputs`."""
    if batch < 0 or n < 0 or d < 1:
        raise ValueError(f"Expected batch >= 0, n >= 0 and d >= 1; got {batch}, {n} and {d}.")
    designs = read_designs(inputs)
    if len(designs) == 1:
        return DESIGNS[designs[0]](batch, n, d, generator=generator)
    choice = torch.randint(len(designs), (batch,), device=generator.device, generator=generator)
    drawn = torch.stack([DESIGNS[name](batch, n, d, generator=generator) for name in designs])
    return drawn[choice, torch.arange(batch, device=generator.device)]
