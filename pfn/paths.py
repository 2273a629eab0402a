"""Joint draws of the posterior: whole functions, not one point at a time.

Each draw visits points of the query in a random order of its own and draws observations from the
predictive given all before: by the chain rule, a joint draw of observations. Where points are few
beside those known, some are drawn together, as one expert sees them, in a fraction of the time and
without a loss of accuracy that could be measured. They wait in a buffer behind the context. While
that is small, a buffer that grows to half its size misses what more points tell of the experts'
hyperparameters; then the context of each draw and the points it has visited are encoded anew, as
contexts of their own.

The function is what these observations leave to be known of it: one expert, chosen by its weight
given them, says its mean, and around the mean a draw of that expert's residual process, so that its
variance is whole however noisy the observations are. (The mean alone, a martingale posterior, has
the variance of the posterior less that of the posterior given the rollout.) Observations at points
that a draw does not visit, beyond `MOST`, are drawn in the same way.

Read `rollout.py` first. Shapes: s draws, b contexts, 1 or s; n points of them, m points to draw at,
e experts.

Reference: Fong, Holmes and Walker, Martingale posterior distributions, J. R. Stat. Soc. B 85, 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pfn.rollout import Rollout
from pfn.transformer import Encoded, Mixture, Transformer
from pfn.units import Units

BLOCK = 8  # points are drawn together that are less than this part of those known
MOST = 128  # points that a draw visits: as many as networks are trained to add to a context
GROWTH = 0.5  # points visited before a context is encoded anew with them, as a share of it
LARGEST = 32  # points of a context that is encoded anew; larger ones take seconds for 500 draws
ENTRIES = 2**25  # of the matrices of draws that walk at once: 256 MiB
ANEW = 2**23  # where each draw has a context of its own, which is faster in the cache


class Walked(NamedTuple):
    """Contexts that draws walk behind, in the units that the first of them was given in."""

    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    units: Units  # those of the prior, for the network
    encoded: Encoded

    def normalise(self, y: Tensor) -> Tensor:
        """Values (s, j) as the network has them."""
        return self.encoded.scaling.apply(self.units.map_y(y))

    def restore(self, normalised: Tensor) -> Tensor:
        """The inverse."""
        center, scale = (part.unsqueeze(-1) for part in self.encoded.scaling)
        y_shift, y_scale = self.units.y_shift.unsqueeze(-1), self.units.y_scale.unsqueeze(-1)
        return y_shift + y_scale * (center + scale * normalised)


Encode = Callable[[Tensor, Tensor], Walked]  # of contexts x (s, n, d), y (s, n)


def draw_paths(
    network: Transformer,
    context: Walked,
    encode: Encode,
    x: Tensor,
    draws: int,
    told: Tensor,
    *,
    kinds: tuple[bool, ...],
    generator: torch.Generator,
) -> list[Tensor]:
    """Joint draws (s, m) behind one context, of each kind.

    Args:
        encode: makes of larger contexts what `context` is of the first.
        x: (k + m, d) points, of which the first k were observed and added behind the context.
        told: (k,) these observations.
        kinds: True for draws of the function, False for the observations that it goes with.
    """
    k, m = len(told), len(x) - len(told)
    if not m:
        return [told.new_empty(draws, 0) for _ in kinds]
    matrix = max(len(x), LARGEST) * max(k + min(m, MOST), LARGEST)
    entries = ENTRIES if context.y.shape[1] >= LARGEST else ANEW
    size = max(1, entries // (network.config.components * matrix))
    parts = []
    for start in range(0, draws, size):
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        own = torch.Generator(generator.device).manual_seed(int(seed))  # the same for all kinds
        order = _orders(min(size, draws - start), k, m, own)
        walks = _walk(network, context, encode, x, order, told, kinds, own)
        parts.append([path[:, k:] for path in walks])
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def _orders(draws: int, told: int, m: int, generator: torch.Generator) -> Tensor:
    """Indices (s, k + m) of points: those that were told, then the others in a random order."""
    shuffled = torch.rand(draws, m, generator=generator, device=generator.device).argsort(1)
    first = torch.arange(told, device=generator.device).expand(draws, -1)
    return torch.cat([first, told + shuffled], 1)


def _legs(n: int, told: int, visits: int) -> Iterator[tuple[int, int]]:
    """Which of the points are visited behind one context, and which behind the next."""
    begin, end = 0, told
    while begin < visits:
        end += max(1, int(GROWTH * (n + end)))
        if n + end > LARGEST:
            end = visits
        yield begin, min(end, visits)
        begin = end


def _blocks(n: int, begin: int, end: int, told: int) -> Iterator[tuple[int, int]]:
    """Points that are drawn together, behind n of a context: first of them, and how many."""
    while begin < end:
        count = told - begin if begin < told else max(1, (n + begin) // BLOCK)
        count = min(count, end - begin)
        yield begin, count
        begin += count


def _walk(
    network: Transformer,
    first: Walked,
    encode: Encode,
    x: Tensor,
    order: Tensor,
    told: Tensor,
    kinds: tuple[bool, ...],
    generator: torch.Generator,
) -> list[Tensor]:
    """Draws at all points (s, k + m), of which the first are told (k,), of each kind."""
    s, k, context = len(order), len(told), first
    visits = k + min(len(x) - k, MOST)
    values = told.new_empty(s, 0)  # at the points that were visited, in order
    for begin, end in _legs(first.y.shape[1], k, visits):
        if begin:
            x_all = torch.cat([first.x.expand(s, -1, -1), x[order[:, :begin]]], 1)
            context = encode(x_all, torch.cat([first.y.expand(s, -1), values], 1))
        some = order[:, begin:end]
        if end == visits:  # the last may be asked for the function everywhere
            some = torch.cat([order[:, begin:], order[:, :begin]], 1)
        grid = context.units.map_x(x.unsqueeze(0))
        walk = Rollout(network, context.encoded, grid, some, end - begin)
        forced = context.normalise(told.expand(len(context.y), -1))
        leg: list[Tensor] = []
        for j, count in _blocks(first.y.shape[1], begin, end, k):
            final = walk.step(count, leg[-1] if leg else None)
            if j < k:
                leg.append(forced.expand(s, -1))
                continue
            expert, mean, std = _choose(network.mixture_y(final), generator)
            noise = walk.experts.noise_of_next(expert, count, generator)
            leg.append(mean + std * noise.to(std))
        values = torch.cat([values, context.restore(torch.cat(leg, 1))], 1)
    mixture_of = {True: network.mixture_f, False: network.mixture_y}
    asked = [latent for latent in kinds if latent or visits < len(x)]
    finals = walk.finish(leg[-1]) if asked else iter(())
    parts = [
        [_choose(mixture_of[latent](final), generator) for latent in asked] for final in finals
    ]
    paths = {False: values.new_empty(s, len(x))}
    for latent, of_latent in zip(asked, zip(*parts, strict=True), strict=True):
        chosen, mean, std = (torch.cat(part) for part in zip(*of_latent, strict=True))
        residual = walk.experts.residuals(chosen, noisy=not latent, generator=generator)
        drawn = context.restore(mean + std * residual.to(std))
        paths[latent] = torch.empty_like(drawn).scatter_(1, some, drawn)
    paths[False].scatter_(1, order[:, :visits], values)
    return [paths[latent] for latent in kinds]


def _choose(mixture: Mixture, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """An expert for each walk (s,), and means and deviations (s, m) of mixtures at its points.

    One level decides for all points, so that they have the same component where it is as likely.
    """
    log_weights, means, log_stds = mixture
    below = log_weights.exp().cumsum(-1)  # (s, m, e)
    level = torch.rand(len(below), 1, 1, generator=generator, device=below.device)
    last = below.shape[-1] - 1
    index = (below < level).sum(-1, keepdim=True).clamp_max(last)
    expert = (below.mean(1) < level[:, 0]).sum(-1).clamp_max(last)
    mean, log_std = (part.gather(2, index).squeeze(2) for part in (means, log_stds))
    return expert, mean, log_std.exp()
