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
from pfn.transformer import Mixture
from pfn.units import FromContext

GROWTH = 0.5  # points added behind a prefix before it is encoded anew, as a share of it
ENTRIES = 2**22  # of the matrices of tasks that are encoded at once: bounds memory


class DataSets(NamedTuple):
    """Data in the units that the network is given."""

    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    known: Tensor | None  # (b, slots) standardised latents, NaN where unknown


class Evidence(NamedTuple):
    """The log evidence of data, in nats."""

    value: Tensor  # (b,)
    error: Tensor  # (b,) the standard error that the mean density over orders has, to first order
    spread: Tensor  # (b,) the standard deviation over orders


def log_evidence(
    network: Network, data: DataSets, orders: int, generator: torch.Generator
) -> Evidence:
    """The log evidence of data, averaged over random orders of their points."""
    b, n = data.y.shape
    if not n:
        zero = data.y.new_zeros(b, dtype=torch.float64)
        return Evidence(zero, zero, zero)
    if network.config.causal:  # whose points have one order
        each = one_step_ahead(network, *data).log_prob.sum(1)
        return Evidence(each, torch.zeros_like(each), torch.zeros_like(each))
    each = chain_rule(network, data, orders, generator)
    value = each.logsumexp(0) - math.log(orders)
    if orders == 1:
        return Evidence(value, *[torch.full_like(value, math.nan)] * 2)
    density = (each - each.amax(0)).exp()
    error = density.std(0) / density.mean(0) / math.sqrt(orders)
    return Evidence(value, error, each.std(0))


def chain_rule(network: Network, data: DataSets, orders: int, generator: torch.Generator) -> Tensor:
    """The log densities (o, b) that random orders of the points give the whole of them."""
    (x, y, known), each = data, []
    for _ in range(orders):
        order = torch.rand(y.shape, generator=generator, device=y.device).argsort(1)
        ordered = x.gather(1, order.unsqueeze(-1).expand_as(x)), y.gather(1, order)
        each.append(one_step_ahead(network, *ordered, known).log_prob.sum(1))
    return torch.stack(each)


class Ahead(NamedTuple):
    """What the points before each observation say of it."""

    log_prob: Tensor  # (b, n), float64
    z: Tensor  # (b, n) normal scores of the predictive's cdf, standard normal if it is the prior's


def one_step_ahead(network: Network, x: Tensor, y: Tensor, known: Tensor | None) -> Ahead:
    """Each observation (b, n) as those before it predict it, in the order given."""
    parts = [
        predict_points(network, x[:, :a], y[:, :a], known, x[:, a:z], y[:, a:z], one_by_one=True)
        for a, z in _blocks(y.shape[1], whole=network.config.causal)
    ]
    return Ahead(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


def left_out(network: Network, x: Tensor, y: Tensor, known: Tensor | None, folds: int) -> Ahead:
    """Each observation (b, n) as the other folds predict it; every `folds`-th point is one fold."""
    fold = torch.arange(y.shape[1], device=y.device) % folds
    parts, places = [], []
    for k in range(min(folds, len(fold))):
        rest, out = fold != k, fold == k
        parts.append(predict_points(network, x[:, rest], y[:, rest], known, x[:, out], y[:, out]))
        places.append(out.nonzero().squeeze(1))
    place = torch.cat(places).argsort()
    return Ahead(*(torch.cat(part, 1)[:, place] for part in zip(*parts, strict=True)))


def _blocks(n: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """Ends of prefixes, and of what is added behind each."""
    start = 0
    while start < n:
        stop = n if whole else min(n, start + max(1, int(GROWTH * start)))
        yield start, stop
        start = stop


def predict_points(
    network: Network,
    x: Tensor,
    y: Tensor,
    known: Tensor | None,
    x_query: Tensor,
    y_query: Tensor,
    *,
    one_by_one: bool = False,
) -> Ahead:
    """Observations (b, m) given a context, and one by one also given those before them."""
    size = max(1, ENTRIES // (1 + y.shape[1] + y_query.shape[1]) ** 2)
    parts = []
    for start in range(0, len(y), size):
        some = slice(start, start + size)
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
        log_prob = mixture_log_prob(*mixture, value) - log_scale
        parts.append(Ahead(log_prob, _normal_score(mixture, value)))
    return Ahead(*(torch.cat(part) for part in zip(*parts, strict=True)))


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
