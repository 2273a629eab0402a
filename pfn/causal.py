"""The network for curves: a transformer that reads a context in order, each point after the others.

A query sees any prefix of the points, so that one pass over a curve trains all its cut-offs at
once, and a new point costs one token. Each point comes with what its prefix says of level and
roughness at several memories, and a mixture is told relative to the last point that its query sees,
in units of that roughness: a run that hardly moves is to the network what a lively one is.

It answers as `transformer.py` does, in the units of y that the prior has; it knows no latents.
Shapes: b tasks, n context points, k buffer points, m queries, w width, h heads, s state.
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
        return Read(layers, repeated(self.x), repeated(self.y), Scaling(*map(repeated, self[3])))


class Told(NamedTuple):
    """Queries after all layers, and what their mixtures are relative to."""

    tokens: Tensor  # (b, m, w)
    level: Tensor  # (b, m)
    unit: Tensor  # (b, m)


class State(NamedTuple):
    """What each prefix of the points says: of the empty one first, 1 + n in all."""

    features: Tensor  # (b, 1 + n, s)
    level: Tensor  # (b, 1 + n) the last y
    unit: Tensor  # (b, 1 + n) roughness
    time: Tensor  # (b, 1 + n) of the last point, 0 at first
    apart: Tensor  # (b, 1 + n) mean time between points

    def at(self, index: Tensor) -> State:
        """The states of some prefixes (m,)."""
        return State(*(part[:, index] for part in self))


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

    def finish(self, tokens: Tensor, normed: Tensor, layer: Layer, allowed: Tensor) -> Tensor:
        """Tokens (b, t, w) after attention to keys, where `allowed` (t, keys), and feed-forward."""
        b, t, w = tokens.shape
        query = self.to_query(normed).view(b, t, self.heads, w // self.heads).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, layer.key, layer.value, allowed)
        tokens = tokens + self.from_heads(attended.transpose(1, 2).flatten(2))
        hidden = F.relu(self.expand(self.norm_forward(tokens))).square()
        return tokens + self.contract(hidden)


class CausalTransformer(Network):
    """Maps the beginning of a curve and later times to mixtures over y, and over f without noise.

    Raises:
        ValueError: more than one feature, or latents, for which it is not made.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.max_features > 1 or config.latents:
            raise ValueError(
                "Expected one feature, the time, and no latents of a causal network; got "
                f"max_features={config.max_features} and {len(config.latents)} latents."
            )
        self.config = config
        width, waves = config.width, 1 + 2 * config.fourier_octaves
        states = 7 + 2 * WAVES + 3 * len(MEMORIES)
        self.embed_time = nn.Linear(waves + 1, width)
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
        """Reads a context (b, n, 1), (b, n), whose rows are in order of time.

        Args:
            known, own: as other networks take them; a causal one has no use for either.
        """
        empty = self._nothing(x)
        return self._run(empty, x, y, x[:, :0], torch.zeros(0, dtype=torch.long, device=x.device))[
            0
        ]

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
        visible = torch.full((x_query.shape[1],), x.shape[1], device=x.device)
        read, told = self._run(self._nothing(x), x, y, x_query, visible)
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
        """What becomes of queries (b, m, 1) given a context and maybe more points after it.

        Args:
            buffer: added points (b, k, 1), (b, k), which come after the context.
            visible: (m,) how many of these each query sees; needed with a buffer.
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
        allowed = torch.ones(1, 1, dtype=torch.bool, device=x.device)
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
        with torch.autocast(x.device.type, enabled=False):
            state = self._state(every_x[..., 0].float(), every_y.float())
            seen = state.at(before + visible)
            order = torch.arange(k, device=x.device)
            points = self._embed(x, state.features[:, before + 1 :], self.embed_state)
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
            queries = self._embed(x_query, torch.cat([seen.features, reach], -1), self.embed_seen)
            tokens = torch.cat([points, queries + self.embed_query], 1)
        places = torch.arange(1 + before + k, device=x.device)
        limit = 1 + before + torch.cat([order + 1, visible])
        allowed = places < limit.unsqueeze(-1)  # (k + m, 1 + before + k)
        layers = []
        for block, kept in zip(self.blocks, read.layers, strict=True):
            normed = block.norm_attention(tokens)
            new = block.keys_values(normed[:, :k])
            old = (part.to(new.key.dtype) for part in kept)
            layer = Layer(*(torch.cat(two, 2) for two in zip(old, new, strict=True)))
            layers.append(layer)
            tokens = block.finish(tokens, normed, layer, allowed)
        told = Told(self.norm(tokens[:, k:]), seen.level, seen.unit)
        return Read(layers, every_x, every_y, read.scaling), told

    def _embed(self, x: Tensor, more: Tensor, layer: nn.Linear) -> Tensor:
        """Tokens (b, t, w) of times (b, t, 1) and of what else is known."""
        time = x.float()
        octaves = torch.arange(self.config.fourier_octaves, device=x.device)
        phase = (2 * time - 1) * (0.5 * math.pi * 2**octaves)
        log_time = time.clamp_min(LEAST).log() / 3
        waves = torch.cat([2 * time - 1, log_time, phase.sin(), phase.cos()], -1)
        kind = self.embed_time.weight.dtype
        return self.embed_time(waves.to(kind)) + layer(more.to(kind))

    def _state(self, time: Tensor, y: Tensor) -> State:
        """What each prefix of points (b, n) says, beginning with none."""
        b, n = y.shape
        first = y.new_full((b, 1), self.config.y_mean)
        previous = torch.cat([first, y[:, :-1]], 1)[:, :n]
        change = y - previous
        apart = torch.diff(time, dim=1, prepend=time.new_zeros(b, 1)).clamp_min(LEAST)
        count = torch.arange(1, n + 1, device=y.device, dtype=y.dtype)
        lag = count[:, None] - count[None, :]
        levels, rough = [], []
        # the first change is from the prior's mean, which says little of roughness
        square = change.square()
        square = torch.cat([square[:, :1].clamp_max(0.01), square[:, 1:]], 1)
        for memory in MEMORIES:
            weight = (-lag.clamp_min(0) / memory).exp() * (lag >= 0)
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-9)
            levels.append(y @ weight.T)
            rough.append((square @ weight.T + FLOOR**2).sqrt())
        unit = rough[-1] if n else y
        inner = y.clamp(1e-4, 1 - 1e-4)
        octaves = 2.0 ** torch.arange(WAVES, device=y.device)
        phase = (y - 0.5).unsqueeze(-1) * (0.5 * math.pi * octaves)
        best = y.cummax(1).values if n else y
        parts = [
            2 * y - 1,
            inner.logit() / 4,
            count.log().expand(b, n) / 3,
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
