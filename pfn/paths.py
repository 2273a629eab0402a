"""Joint draws of the posterior: whole functions, not one point at a time.

Each draw visits points of the query in a random order of its own and draws an observation at each
from the predictive given all before it: by the chain rule, a joint draw of observations. The
function is what these observations leave to be known of it: one expert, chosen by its weight given
them, says its mean, and around the mean a draw of that expert's residual process, so that its
variance is whole however noisy the observations are. (The mean alone, a martingale posterior, has
the variance of the posterior less that of the posterior given the rollout.) So are observations at
points beyond `MOST` that a draw visits.

Read `rollout.py` first. Shapes: s draws, m queries, k of them visited, e experts.

Reference: Fong, Holmes and Walker, Martingale posterior distributions, J. R. Stat. Soc. B 85, 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pfn.rollout import Rollout
from pfn.transformer import Encoded, Mixture, Transformer

MOST = 128  # points that a draw visits: as many as networks are trained to add to a context
ENTRIES = 2**26  # of the matrices of draws that walk at once: half a GiB; fewer take longer


def draw_paths(
    network: Transformer,
    encoded: Encoded,
    grid: Tensor,
    draws: int,
    told: tuple[Tensor, Tensor] | None = None,
    *,
    latent: bool,
    generator: torch.Generator,
) -> Tensor:
    """Joint draws (s, m) at grid (m, d) behind one context, in the network's normalised units.

    Args:
        told: points (k, d), (k,) that were added behind the context, in the prior's units.
    """
    if not len(grid):
        return grid.new_empty(draws, 0)
    x_told, y_told = (grid[:0], grid[:0, 0]) if told is None else told
    values = encoded.scaling.apply(y_told.unsqueeze(0))[0]
    points = torch.cat([x_told, grid])
    visits = len(x_told) + min(len(grid), MOST)
    size = max(1, ENTRIES // (network.config.components * visits * len(points)))
    parts = []
    for start in range(0, draws, size):
        some = min(size, draws - start)
        order = _orders(some, len(x_told), len(grid), generator)
        parts.append(_walk(network, encoded, points, order, values, latent, generator))
    return torch.cat(parts)[:, len(x_told) :]


def _orders(draws: int, told: int, m: int, generator: torch.Generator) -> Tensor:
    """What each draw visits: the points that were told, then a random order of up to `MOST`."""
    device = generator.device
    shuffled = torch.rand(draws, m, generator=generator, device=device).argsort(1)[:, :MOST]
    first = torch.arange(told, device=device).expand(draws, -1)
    return torch.cat([first, told + shuffled], 1)


def _walk(
    network: Transformer,
    encoded: Encoded,
    points: Tensor,
    order: Tensor,
    told: Tensor,
    latent: bool,
    generator: torch.Generator,
) -> Tensor:
    """Draws at all points (s, k + m), of which the first are told (k,)."""
    walk = Rollout(network, encoded, points, order)
    visited: list[Tensor] = []
    for j in range(order.shape[1]):
        final = walk.step(visited[-1] if visited else None)
        is_told = j < len(told)
        mixture = network.mixture_y(final)
        visited.append(told[j].expand(len(order)) if is_told else draw(mixture, generator))
    values = torch.stack(visited, 1)
    if not latent and order.shape[1] == len(points):
        return torch.empty_like(values).scatter_(1, order, values)
    mixture_of = network.mixture_f if latent else network.mixture_y
    parts = [_choose(mixture_of(final), generator) for final in walk.finish(visited[-1])]
    chosen, mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    residual = walk.experts.residuals(chosen, noisy=not latent, generator=generator)
    paths = mean + std * residual.to(std)
    return paths if latent else paths.scatter(1, order, values)


def _choose(mixture: Mixture, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One component for all of a walk's points (s,), and its means and deviations (s, m)."""
    log_weights, means, log_stds = mixture
    chosen = torch.multinomial(log_weights.exp().mean(1), 1, generator=generator)  # (s, 1)
    index = chosen.unsqueeze(1).expand(-1, means.shape[1], -1)
    mean, log_std = (part.gather(2, index).squeeze(2) for part in (means, log_stds))
    return chosen.squeeze(1), mean, log_std.exp()


def draw(mixture: Mixture, generator: torch.Generator) -> Tensor:
    """One draw (s,) of mixtures (s, 1, e)."""
    log_weights, means, log_stds = (part.squeeze(1) for part in mixture)
    component = torch.multinomial(log_weights.exp(), 1, generator=generator)
    mean, std = (part.gather(1, component).squeeze(1) for part in (means, log_stds.exp()))
    normal = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + std * normal
