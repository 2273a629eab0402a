"""Joint draws of the posterior: whole functions, not one point at a time.

Each draw visits points of the query in a random order of its own and draws an observation at each
from the predictive given all before it: by the chain rule, a joint draw of observations. The
function is what these observations leave to be known of it: its mean given them, and around the
mean a draw of the expert's residual process, so that its variance is whole however noisy the
observations are. (The mean alone, a martingale posterior, has the variance of the posterior less
that of the posterior given the rollout.) So are observations at points beyond `MOST` that a draw
visits.

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
    moments = [_moments(mixture_of(final)) for _, final in walk.finish(visited[-1])]
    mean, std, weights = (torch.cat(parts) for parts in zip(*moments, strict=True))
    chosen = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    residual = walk.experts.residuals(chosen, noisy=not latent, generator=generator)
    paths = mean + std * residual.to(std)
    return paths if latent else paths.scatter(1, order, values)


def _moments(mixture: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation (s, m), and the average weights of components (s, e)."""
    weights = mixture.log_weights.exp()
    mean = (weights * mixture.means).sum(-1)
    spread = (2 * mixture.log_stds).exp() + (mixture.means - mean.unsqueeze(-1)).square()
    return mean, (weights * spread).sum(-1).sqrt(), weights.mean(1)


def draw(mixture: Mixture, generator: torch.Generator) -> Tensor:
    """One draw (s,) of mixtures (s, 1, e)."""
    log_weights, means, log_stds = (part.squeeze(1) for part in mixture)
    component = torch.multinomial(log_weights.exp(), 1, generator=generator)
    mean, std = (part.gather(1, component).squeeze(1) for part in (means, log_stds.exp()))
    normal = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + std * normal
