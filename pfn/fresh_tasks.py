"""Tasks that no network was trained on, for its certificate: functions of their names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from priors import Prior


class Progress(NamedTuple):
    """What long work reports to people."""

    stage: str
    done: int
    total: int


Report = Callable[[Progress], None]


class Split(NamedTuple):
    """Prior tasks cut into context and queries."""

    x: Tensor  # (task, n, dim)
    y: Tensor  # (task, n)
    x_query: Tensor  # (task, query, dim)
    y_query: Tensor  # (task, query)


def draw_tasks(
    prior: Prior,
    n: int,
    d: int,
    *,
    tasks: int,
    queries: int,
    seed: int,
    first: int = 0,
    purpose: str = "gap",
) -> Split:
    """Tasks `first` to `first + tasks - 1` of a cell, functions of (purpose, seed, n, d, i)."""
    drawn = []
    for i in range(first, first + tasks):
        name = f"certificate/{purpose}/{seed}/{n}/{d}/{i}"
        generator = named_generator(name)
        task = prior.sample(1, n + queries, d, generator=generator)
        if task.num_context is not None and task.num_context < n:
            raise ValueError(
                f"Expected cells with at most {task.num_context} context points, as this prior"
                f" allows among {n + queries}; got n = {n}."
            )
        drawn.append((task.x, task.y))
    x, y = (torch.cat(part) for part in zip(*drawn, strict=True))
    return Split(x[:, :n], y[:, :n], x[:, n:], y[:, n:])


def named_generator(name: str) -> torch.Generator:
    """A generator whose seed is a function of a name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
