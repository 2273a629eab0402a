"""How likely data are under a prior: the evidence, by the chain rule of a network's predictives.

log p(y | x) = sum_i log p(y_i | x_i, the points before i). A prefix is encoded, the points after it
are added behind it until there are half as many again, and the longer prefix is encoded anew: 11
encodings for 50 points. A causal network says all of it in one pass.

A predictive that is not quite coherent gives each order of the points an evidence of its own. The
average over a few orders is a density as each of them is; their spread says how far to trust it.

Shapes: b tasks, n points, o orders.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pfn.mixture import mixture_log_prob
from pfn.network import Network
from pfn.transformer import Mixture, Transformer
from pfn.units import FromContext

GROWTH = 0.5  # points added behind a prefix before it is encoded anew, as a share of it
ENTRIES = 2**24  # of the matrices of tasks that are encoded at once: bounds memory
CACHED = 2**17  # of these, on a CPU


class DataSets(NamedTuple):
    """Data in the units that the network is given."""

    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    known: Tensor | None  # (b, slots) standardised latents, NaN where unknown


class Evidence(NamedTuple):
    """The log evidence of data, in nats."""

    value: Tensor  # (b,)
    error: Tensor  # (b,) the standard error that the mean density over orders has, to first order


def log_evidence(
    network: Network, data: DataSets, orders: int, generator: torch.Generator
) -> Evidence:
    """The log evidence of data, averaged over random orders of their points."""
    b, n = data.y.shape
    if not b or not n:
        zero = data.y.new_zeros(b, dtype=torch.float64)
        return Evidence(zero, zero)
    if network.config.causal:  # whose points have one order
        each = one_step_ahead(network, *data).sum(1)
        return Evidence(each, torch.zeros_like(each))
    each = chain_rule(network, data, orders, generator)
    value = each.logsumexp(0) - math.log(orders)
    if orders == 1:
        return Evidence(value, torch.full_like(value, math.nan))
    density = (each - each.amax(0)).exp()
    error = density.std(0) / density.mean(0) / math.sqrt(orders)
    return Evidence(value, error)


def chain_rule(network: Network, data: DataSets, orders: int, generator: torch.Generator) -> Tensor:
    """The log densities (o, b) that random orders of the points give the whole of them."""
    (x, y, known), each = data, []
    for _ in range(orders):
        order = torch.rand(y.shape, generator=generator, device=y.device).argsort(1)
        ordered = x.gather(1, order.unsqueeze(-1).expand_as(x)), y.gather(1, order)
        each.append(one_step_ahead(network, *ordered, known).sum(1))
    return torch.stack(each)


def one_step_ahead(
    network: Network, x: Tensor, y: Tensor, known: Tensor | None, *, growth: float = GROWTH
) -> Tensor:
    """Log density (b, n) of each observation given those before it, in the order given."""
    n = y.shape[1]
    parts = [
        predict_points(network, x[:, :a], y[:, :a], known, x[:, a:z], y[:, a:z], one_by_one=True)
        for a, z in ([(0, n)] if network.config.causal else _blocks(n, growth))
    ]
    return torch.cat(parts, 1)


def left_out(network: Transformer, x: Tensor, y: Tensor, known: Tensor | None) -> Tensor:
    """Normal scores (b, n) of each observation given all others, by the experts alone.

    Experts say it in closed form, of the whole context solved once; what the heads would make of
    it, and what the point told the experts' hyperparameters, is left out of account.
    """
    scores = []
    for some in _some(y, y.shape[1]):
        encoded = network.encode(x[some], y[some], None if known is None else known[some])
        mixture = network.mixture_left_out(encoded)
        scores.append(_normal_score(mixture, torch.zeros_like(mixture.means[..., 0])))
    return torch.cat(scores)


def _blocks(n: int, growth: float) -> Iterator[tuple[int, int]]:
    """Ends of prefixes, and of what is added behind each."""
    start = 0
    while start < n:
        stop = min(n, start + max(1, int(growth * start)))
        yield start, stop
        start = stop


def _some(y: Tensor, points: int) -> Iterator[slice]:
    """Tasks of y (b, ...) that are encoded at once, of so many points each."""
    entries = CACHED if y.device.type == "cpu" else ENTRIES
    size = max(1, entries // (1 + points) ** 2)
    return (slice(start, start + size) for start in range(0, max(1, len(y)), size))


def predict_points(
    network: Network,
    x: Tensor,
    y: Tensor,
    known: Tensor | None,
    x_query: Tensor,
    y_query: Tensor,
    *,
    one_by_one: bool = False,
) -> Tensor:
    """Log density of observations (b, m) given a context, one by one also given those before."""
    parts = []
    for some in _some(y, y.shape[1] + y_query.shape[1]):
        knows = None if known is None else known[some]
        encoded = network.encode(x[some], y[some], knows, FromContext())
        ask, answer = x_query[some], y_query[some]
        buffer = visible = None
        if one_by_one:
            buffer, visible = (ask, answer), torch.arange(answer.shape[1], device=y.device)
        final = network.decode(encoded, ask, buffer=buffer, visible=visible)
        mixture = Mixture(*(part.double() for part in network.mixture_y(final)))
        value = encoded.scaling.apply(answer).double()
        log_scale = encoded.scaling.scale.double().log().unsqueeze(1)
        parts.append(mixture_log_prob(*mixture, value) - log_scale)
    return torch.cat(parts)


def _normal_score(mixture: Mixture, value: Tensor) -> Tensor:
    """z with Phi(z) = F(value), precise in both tails."""
    scaled = (value.unsqueeze(-1) - mixture.means) * (-mixture.log_stds).exp()
    below, above = (
        (mixture.log_weights + torch.special.log_ndtr(side * scaled)).logsumexp(-1)
        for side in (1, -1)
    )
    tail = torch.minimum(below, above).exp().clamp_min(torch.finfo(torch.float64).tiny)
    z = torch.special.ndtri(tail)
    return torch.where(below < above, z, -z)
