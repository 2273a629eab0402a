"""The network for curves: a transformer that reads a context in order, each point after the others.

A query sees any prefix of the points, so that one pass over a curve trains all its cut-offs at
once, and a new point costs one token. Each point comes with what its prefix says of level and
roughness at several memories, and a mixture is told relative to the last point that its query sees,
in units of that roughness: a run that hardly moves is to the network what a lively one is.

With more than one feature, rows are the runs of a sweep, one run after another: the first feature
is the time, the others are the run's hyperparameters. A new run begins where these change or time
does not increase; a query belongs to the last run with its hyperparameters. What a prefix says is
then said of the point's own run. The first half of the heads attend to that run alone, the others
to all, and the last of these prefers runs of near hyperparameters.

It answers as `transformer.py` does, in the units of y that the prior has; it knows no latents.
Shapes: b tasks, n context points, k buffer points, m queries, d features, w width, h heads, s
state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfn.network import Network
from pfn.transformer import Mixture, Scaling, TransformerConfig
from pfn.units import FromContext

MEMORIES = (1.0, 4.0, 16.0)  # points over which levels and roughness are averaged
FLOOR = 2e-4  # of a roughness, in units of y
WAVES = 7  # octaves of y's embedding
OF_SWEEPS = "embed_run"  # the parameter that a network of single curves lacks
# what the last head's logits lose per mean squared distance of hyperparameters, in turn by layer
NEAR = (15.0, 60.0)
RUN_WAVES = 5  # numbers that a hyperparameter is embedded by
LEAST = 1e-6  # of a time or a time between points
NARROWEST = -9.5  # log of the least standard deviation of a component


class Layer(NamedTuple):
    """What one layer keeps of the points it has read, a start token first."""

    key: Tensor  # (b, h, 1 + n, w/h)
    value: Tensor  # (b, h, 1 + n, w/h)


class Read(NamedTuple):
    """A context that was read: all that later queries and points need of it."""

    layers: list[Layer]
    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    scaling: Scaling  # the identity

    def repeat(self, times: int) -> Read:
        """The reading of one context (b = 1) as a batch of `times` equal ones."""

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(times, *[1] * (value.dim() - 1))

        layers = [Layer(*map(repeated, layer)) for layer in self.layers]
        return Read(
            layers, repeated(self.x), repeated(self.y), Scaling(*map(repeated, self.scaling))
        )


class Told(NamedTuple):
    """Queries after all layers, and what their mixtures are relative to."""

    tokens: Tensor  # (b, m, w)
    level: Tensor  # (b, m)
    unit: Tensor  # (b, m)


class State(NamedTuple):
    """What prefixes say of the run that they end in: the empty one first, 1 + n in all."""

    features: Tensor  # (b, 1 + n, s)
    level: Tensor  # (b, 1 + n) the last y
    unit: Tensor  # (b, 1 + n) roughness
    time: Tensor  # (b, 1 + n) of the last point, 0 at first
    apart: Tensor  # (b, 1 + n) mean time between points

    def at(self, index: Tensor) -> State:
        """The states of some prefixes (b, m)."""
        return State(
            self.features.gather(1, index.unsqueeze(-1).expand(-1, -1, self.features.shape[-1])),
            *(part.gather(1, index) for part in self[1:]),
        )


class CausalBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.norm_forward = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, config.expansion * width)
        self.contract = nn.Linear(config.expansion * width, width)
        for last in (*self.from_heads.parameters(), *self.contract.parameters()):
            nn.init.zeros_(last)  # every block starts as the identity

    def keys_values(self, normed: Tensor) -> Layer:
        """Keys and values of tokens (b, t, w)."""
        b, t, w = normed.shape
        both = self.to_key_value(normed).view(b, t, 2, self.heads, w // self.heads)
        return Layer(*both.transpose(1, 3).unbind(2))

    def finish(self, tokens: Tensor, normed: Tensor, layer: Layer, mask: Tensor) -> Tensor:
        """Tokens (b, t, w) after attention and feed-forward.

        Args:
            mask: (b or 1, h or 1, t, keys) where there is attention, or what is added to it.
        """
        b, t, w = tokens.shape
        query = self.to_query(normed).view(b, t, self.heads, w // self.heads).transpose(1, 2)
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
        attended = F.scaled_dot_product_attention(query, layer.key, layer.value, mask)
        tokens = tokens + self.from_heads(attended.transpose(1, 2).flatten(2))
        hidden = F.relu(self.expand(self.norm_forward(tokens)), inplace=True).square()
        return tokens + self.contract(hidden)


class CausalTransformer(Network):
    """Maps the beginning of a curve and later times to mixtures over y, and over f without noise.

    Raises:
        ValueError: latents, for which it is not made, or one head for the runs of a sweep.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.latents:
            raise ValueError(
                f"Expected no latents of a causal network; got {len(config.latents)} latents."
            )
        if config.max_features > 1 and config.heads < 2:
            raise ValueError(f"Expected at least 2 heads for runs of a sweep; got {config.heads}.")
        self.config = config
        width, waves = config.width, 1 + 2 * config.fourier_octaves
        states = 7 + 2 * WAVES + 3 * len(MEMORIES)
        self.embed_time = nn.Linear(waves + 1, width)
        if config.max_features > 1:
            self.embed_run = nn.Linear((config.max_features - 1) * RUN_WAVES, width, bias=False)
        self.embed_state = nn.Linear(states, width)
        self.embed_seen = nn.Linear(states + 4, width)  # of the prefix that a query sees
        self.embed_query = nn.Parameter(torch.randn(width) * 0.1)
        self.embed_start = nn.Parameter(torch.randn(width) * 0.1)
        blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.layers))
        self.blocks = cast(Sequence[CausalBlock], blocks)
        self.norm = nn.LayerNorm(width, bias=False)
        self.head_y = _head(config)
        self.head_f = _head(config)

    def encode(
        self,
        x: Tensor,
        y: Tensor,
        known: Tensor | None = None,
        own: FromContext = FromContext(),
    ) -> Read:
        """Reads a context (b, n, d), (b, n), whose rows are in order of time, run by run.

        Args:
            known, own: as other networks take them; a causal one has no use for either.
        """
        return self.extend(self._nothing(x), x, y, x[:, :0])[0]

    def extend(self, read: Read, x: Tensor, y: Tensor, x_query: Tensor) -> tuple[Read, Told]:
        """Reads more points (b, k, d), (b, k) after a context, and queries that see them all."""
        visible = torch.full((x_query.shape[1],), x.shape[1], device=x.device)
        return self._run(read, x, y, x_query, visible)

    def answer(
        self,
        x: Tensor,
        y: Tensor,
        known: Tensor | None,
        own: FromContext,
        x_query: Tensor,
        *,
        latents: bool = False,
    ) -> tuple[Told, Scaling]:
        """What `decode` gives for `encode` of a context, in one pass; and the scaling."""
        read, told = self.extend(self._nothing(x), x, y, x_query)
        return told, read.scaling

    def decode(
        self,
        encoded: Read,
        x_query: Tensor,
        *,
        buffer: tuple[Tensor, Tensor] | None = None,
        visible: Tensor | None = None,
        latents: bool = False,
    ) -> Told:
        """What becomes of queries (b, m, d) given a context and maybe more points after it.

        Args:
            buffer: added points (b, k, d), (b, k), which come after the context.
            visible: (m,) or (b, m) how many of these each query sees; needed with a buffer.
        """
        if buffer is None:
            none = x_query[:, :0]
            buffer, visible = (none, none[..., 0]), x_query.new_zeros(x_query.shape[1]).long()
        assert visible is not None
        return self._run(encoded, *buffer, x_query, visible)[1]

    def mixture_y(self, told: Told) -> Mixture:
        """Mixtures over a new observation."""
        return _mixture(told, self.head_y)

    def mixture_f(self, told: Told) -> Mixture:
        """Mixtures over the noise-free curve."""
        return _mixture(told, self.head_f)

    def _nothing(self, x: Tensor) -> Read:
        """What is known before any point: the start token's keys."""
        b = len(x)
        tokens = self.embed_start.expand(b, 1, -1)
        layers = []
        allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device)
        for block in self.blocks:
            normed = block.norm_attention(tokens)
            layers.append(block.keys_values(normed))
            tokens = block.finish(tokens, normed, layers[-1], allowed)
        zero = torch.zeros(b, device=x.device, dtype=x.dtype)
        return Read(layers, x[:, :0], x[:, :0, 0], Scaling(zero, zero + 1))

    def _run(
        self, read: Read, x: Tensor, y: Tensor, x_query: Tensor, visible: Tensor
    ) -> tuple[Read, Told]:
        """New points and queries through all layers; each sees what was read and what precedes."""
        k, before = x.shape[1], read.x.shape[1]
        every_x, every_y = torch.cat([read.x, x], 1), torch.cat([read.y, y], 1)
        runs = find_runs(every_x)
        limit = before + (visible if visible.dim() == 2 else visible.unsqueeze(0))
        index = _find(every_x, x_query, limit)
        with torch.autocast(x.device.type, enabled=False):
            state = self._state(every_x[..., 0].float(), every_y.float(), runs)
            seen = state.at(index)
            since = x_query[..., 0].float() - seen.time
            reach = torch.stack(
                [
                    since,
                    since.abs().clamp_min(LEAST).log() / 3,
                    (since.abs().clamp_min(LEAST) / seen.apart).log() / 3,
                    since.sign(),
                ],
                -1,
            )
            points = self._embed(x, state.features[:, before + 1 :], self.embed_state)
            queries = self._embed(x_query, torch.cat([seen.features, reach], -1), self.embed_seen)
            tokens = torch.cat([points, queries + self.embed_query], 1)
        places = torch.arange(before + k, device=x.device)
        order = (before + 1 + torch.arange(k, device=x.device)).expand(len(limit), -1)
        allowed = F.pad(places < torch.cat([order, limit], 1).unsqueeze(-1), (1, 0), value=True)
        masks = [allowed.unsqueeze(1)] * len(self.blocks)
        if x.shape[-1] > 1:
            of_query = F.pad(runs, (1, 0), value=-1).gather(1, index)
            of_token = torch.cat([runs[:, before:], of_query], 1)
            own = of_token.unsqueeze(-1) == runs.unsqueeze(1)
            far = _squared_distance(torch.cat([x, x_query], 1)[..., 1:], every_x[..., 1:])
            masks = self._masks(allowed, own, far)
        layers = []
        for block, kept, mask in zip(self.blocks, read.layers, masks, strict=True):
            normed = block.norm_attention(tokens)
            new = block.keys_values(normed[:, :k])
            old = (part.to(new.key.dtype) for part in kept)
            layer = Layer(*(torch.cat(two, 2) for two in zip(old, new, strict=True)))
            layers.append(layer)
            if block is self.blocks[-1]:  # nothing reads the points' tokens after it
                tokens, normed, mask = tokens[:, k:], normed[:, k:], mask[..., k:, :]
            tokens = block.finish(tokens, normed, layer, mask)
        told = Told(self.norm(tokens), seen.level, seen.unit)
        return Read(layers, every_x, every_y, read.scaling), told

    def _masks(self, allowed: Tensor, own: Tensor, far: Tensor) -> list[Tensor]:
        """What is added to the logits of each layer's heads, (b, h, t, keys).

        Args:
            allowed: (b or 1, t, keys) where there is attention, the start token first.
            own: (b, t, keys - 1) which points are of a token's own run.
            far: (b, t, keys - 1) mean squared distances between hyperparameters.
        """
        heads = self.config.heads
        own, far = F.pad(own, (1, 0), value=True), F.pad(far, (1, 0))
        head = torch.arange(heads, device=far.device)[:, None, None]
        seen = allowed.unsqueeze(1) & (own.unsqueeze(1) | (head >= heads // 2))
        nothing = far.new_zeros(()).masked_fill(~seen, -math.inf)
        near = (head == heads - 1) * far.unsqueeze(1)
        masks = [nothing - sharpness * near for sharpness in NEAR]
        return [masks[i % len(NEAR)] for i in range(len(self.blocks))]

    def _embed(self, x: Tensor, more: Tensor, layer: nn.Linear) -> Tensor:
        """Tokens (b, t, w) of times, hyperparameters (b, t, d) and of what else is known."""
        time = x[..., :1].float()
        octaves = torch.arange(self.config.fourier_octaves, device=x.device)
        phase = (2 * time - 1) * (0.5 * math.pi * 2**octaves)
        log_time = time.clamp_min(LEAST).log() / 3
        waves = torch.cat([2 * time - 1, log_time, phase.sin(), phase.cos()], -1)
        kind = self.embed_time.weight.dtype
        tokens = self.embed_time(waves.to(kind)) + layer(more.to(kind))
        if self.config.max_features == 1:
            return tokens
        place = 2 * x[..., 1:].float() - 1
        phases = [0.5 * math.pi * place, math.pi * place]
        waves = torch.stack([place, *(f(p) for p in phases for f in (torch.sin, torch.cos))], -1)
        missing = self.config.max_features - x.shape[-1]  # features that the sweep does not have
        return tokens + self.embed_run(F.pad(waves, (0, 0, 0, missing)).flatten(-2).to(kind))

    def _state(self, time: Tensor, y: Tensor, runs: Tensor) -> State:
        """What each prefix of points (b, n) says of the run that it ends in.

        Args:
            runs: (b, n) index of each point's run, or (1, n) where all tasks have the same.
        """
        b, n = y.shape
        first = y.new_full((b, 1), self.config.y_mean)
        begins = torch.diff(runs, dim=1, prepend=runs.new_full((len(runs), 1), -1)) > 0
        previous = torch.cat([first, y[:, :-1]], 1)[:, :n]
        previous = torch.where(begins, first, previous)
        change = y - previous
        apart = torch.diff(time, dim=1, prepend=time.new_zeros(b, 1))
        apart = torch.where(begins, time, apart).clamp_min(LEAST)
        place = torch.arange(n, device=y.device)
        earlier = (runs.unsqueeze(-1) == runs.unsqueeze(1)) & (place[:, None] >= place)
        count = earlier.sum(-1).to(y).expand(b, n)
        lag = (place[:, None] - place).clamp_min(0).to(y)
        # the first change is from the prior's mean, which says little of roughness
        square = torch.where(begins, change.square().clamp_max(0.01), change.square())
        memories = torch.tensor(MEMORIES, device=y.device, dtype=y.dtype)[:, None, None]
        weight = (-lag / memories).exp() * earlier.unsqueeze(1)  # (b or 1, memory, n, n)
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-9)
        levels = _averages(weight, y).unbind(0)
        rough = (_averages(weight, square) + FLOOR**2).sqrt().unbind(0)
        unit = rough[-1] if n else y
        inner = y.clamp(1e-4, 1 - 1e-4)
        octaves = 2.0 ** torch.arange(WAVES, device=y.device)
        phase = (y - 0.5).unsqueeze(-1) * (0.5 * math.pi * octaves)
        best = y
        if n:
            best = y.unsqueeze(1).expand(b, n, n).masked_fill(~earlier, -math.inf).amax(-1)
        parts = [
            2 * y - 1,
            inner.logit() / 4,
            count.log() / 3,
            apart.log() / 3,
            (change / unit).clamp(-6, 6) if n else y,
            ((best - y) / unit).clamp(0, 20).sqrt() if n else y,
            torch.ones_like(y),
            *(((y - level) / unit).clamp(-6, 6) for level in levels),
            *(value.log() / 3 for value in rough),
            *((value / unit).log() for value in rough),
        ]
        features = torch.cat([torch.stack(parts, -1), phase.sin(), phase.cos()], -1)
        mean_apart = (time / count) if n else time
        return State(
            F.pad(features, (0, 0, 1, 0)),
            torch.cat([first, y], 1),
            torch.cat([torch.full_like(first, self.config.y_std), unit], 1),
            F.pad(time, (1, 0)),
            torch.cat([torch.full_like(first, 0.1), mean_apart.clamp_min(LEAST)], 1),
        )


def find_runs(x: Tensor) -> Tensor:
    """The index (b, n) of the run of each point (b, n, d); (1, n), zeros, if d = 1: one run."""
    if x.shape[-1] == 1:
        return torch.zeros(1, x.shape[1], dtype=torch.long, device=x.device)
    before, after = x[:, :-1], x[:, 1:]
    begins = (after[..., 1:] != before[..., 1:]).any(-1) | (after[..., 0] <= before[..., 0])
    return F.pad(begins, (1, 0))[:, : x.shape[1]].long().cumsum(1)


def _averages(weight: Tensor, values: Tensor) -> Tensor:
    """What each prefix has of values (b, n) at each memory, (memory, b, n)."""
    if len(weight) == 1:  # one product of matrices for all tasks
        return torch.einsum("mij,bj->mbi", weight[0], values)
    return torch.einsum("bmij,bj->mbi", weight, values)


def _squared_distance(x: Tensor, others: Tensor) -> Tensor:
    """Mean over k of the squared differences of (b, t, k) and (b, n, k), (b, t, n)."""
    return torch.cdist(x, others).square() / x.shape[-1]


def _find(x: Tensor, x_query: Tensor, limit: Tensor) -> Tensor:
    """How many points (b, m) precede and end with the last one of each query's own run.

    Args:
        x: (b, n, d) points.
        x_query: (b, m, d).
        limit: (b or 1, m) how many points a query sees at most.
    """
    if x.shape[-1] == 1:
        return limit.expand(len(x), -1)
    is_own = torch.ones(len(x), x_query.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    for own, asked in zip(x[..., 1:].unbind(-1), x_query[..., 1:].unbind(-1), strict=True):
        is_own &= own.unsqueeze(1) == asked.unsqueeze(-1)
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    is_own &= places <= limit.unsqueeze(-1)
    return (places * is_own).amax(-1) if x.shape[1] else limit.expand(len(x), -1)


def _head(config: TransformerConfig) -> nn.Linear:
    """Means and widths of components that begin apart, and one unit for all."""
    head = nn.Linear(config.width, 3 * config.components + 1)
    nn.init.normal_(head.weight, std=0.02)
    with torch.no_grad():
        spread = torch.linspace(-1.5, 1.5, config.components)
        head.bias.copy_(torch.cat([torch.zeros_like(spread), spread, 0 * spread, torch.zeros(1)]))
    return head


def _mixture(told: Told, head: nn.Linear) -> Mixture:
    raw = head(told.tokens).float() if told.tokens.dtype != torch.float64 else head(told.tokens)
    logits, means, log_stds = raw[..., :-1].chunk(3, -1)
    log_unit = told.unit.log().to(raw).unsqueeze(-1) + 8 * torch.tanh(raw[..., -1:] / 8)
    stds = log_unit + 8 * torch.tanh(log_stds / 8)
    return Mixture(
        logits.log_softmax(-1),
        told.level.to(raw).unsqueeze(-1) + log_unit.exp() * means,
        stds.clamp_min(NARROWEST),
    )
