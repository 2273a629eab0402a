"""Draws that a `torch.Generator` controls; `torch.distributions` alone uses the global state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution


def draw_normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Independent standard normals of `shape`, in float64 on the generator's device."""
    return torch.randn(*shape, dtype=torch.float64, device=generator.device, generator=generator)


def draw(
    value: float | Distribution, shape: tuple[int, ...], *, generator: torch.Generator
) -> Tensor:
    """A float64 tensor of `shape` on the generator's device, independent draws of `value`.

    A number fills the tensor. A distribution with an inverse cdf is drawn by inversion; any other
    is drawn under a private copy of the global state, seeded by the generator.
    """
    device = generator.device
    if not isinstance(value, Distribution):
        return torch.full(shape, float(value), dtype=torch.float64, device=device)
    uniform = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
    try:
        return value.icdf(uniform.clamp(1e-12, 1 - 1e-12)).to(torch.float64)
    except NotImplementedError:
        seed = int(torch.randint(2**62, (), device=device, generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return value.sample(torch.Size(shape)).to(device, torch.float64)
