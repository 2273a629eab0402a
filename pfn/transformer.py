"""The network: a pre-norm transformer with one token per data point.

Context tokens attend to the context, query tokens to the context only, so no query's answer depends
on another query. `condition` runs the context once and keeps each layer's keys and values; a query
then costs one attention over them. Points added later live in a buffer: they attend to the frozen
context and causally to each other, and a query may see any prefix of them.

Shapes: b tasks, n context points, k buffer points, m queries, d features, w width, h heads.
Read next: `predictive.py`, the distribution that the output parametrises, and `model.py`, which
puts units, checks and caching around this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PSEUDO_COUNT = 0.1  # weight of the prior in the frozen normalisation of y, in observations


@dataclass(frozen=True)
class Latent:
    """How one latent of the prior enters and leaves the network.

    `mean` and `std` standardise it over prior draws, after a logarithm where `positive`. A latent
    with `categories` > 0 is an index and enters one-hot.
    """

    name: str
    per_feature: bool = False
    positive: bool = False
    categories: int = 0
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that fixes the architecture. `y_mean` and `y_std` are the prior's own moments."""

    max_features: int
    width: int = 128
    layers: int = 6
    heads: int = 4
    expansion: int = 4
    fourier_octaves: int = 4
    components: int = 10
    y_mean: float = 0.0
    y_std: float = 1.0
    latents: tuple[Latent, ...] = ()

    @property
    def latent_slots(self) -> int:
        """Scalars needed to hold all latents: one each, one per feature, or one per category."""
        return sum(self.slots(latent) for latent in self.latents)

    def slots(self, latent: Latent) -> int:
        return latent.categories or (self.max_features if latent.per_feature else 1)


class Mixture(NamedTuple):
    """Unconstrained-to-natural parameters of normal mixtures, each (..., components)."""

    log_weights: Tensor
    means: Tensor
    log_stds: Tensor


class Scaling(NamedTuple):
    """The frozen affine map of y inside the network: y = center + scale * normalised, (b,) each."""

    center: Tensor
    scale: Tensor


class Encoded(NamedTuple):
    """An encoded context, with or without buffer: per layer the keys and values (b, h, 1 + n, w/h)."""

    keys: list[Tensor]
    values: list[Tensor]
    scaling: Scaling
    count: Tensor  # (b,) number of context points
    dimension: int  # number of features d


class Block(nn.Module):
    """Pre-norm attention and feed-forward, with an attention temperature that knows log n."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.temperature = nn.Parameter(torch.tensor([[1.0], [0.1]]).repeat(1, config.heads))
        self.norm_forward = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, config.expansion * width)
        self.contract = nn.Linear(config.expansion * width, width)
        for last in (self.from_heads, self.contract):
            nn.init.zeros_(last.weight)  # every block starts as the identity

    def queries(self, normed: Tensor, log_count: Tensor) -> Tensor:
        """Query vectors (b, h, tokens, w/h), sharpened by the log of the points they attend to."""
        q = self._split(self.to_query(normed))
        offset, slope = self.temperature
        return q * (offset[:, None, None] + slope[:, None, None] * log_count).to(q.dtype)

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.to_key_value(normed).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Adds what attention gathered (b, h, tokens, w/h), then the feed-forward layer."""
        tokens = tokens + self.from_heads(attended.transpose(1, 2).flatten(2))
        hidden = F.relu(self.expand(self.norm_forward(tokens))).square()
        return tokens + self.contract(hidden)

    def _split(self, flat: Tensor) -> Tensor:
        b, t, w = flat.shape
        return flat.view(b, t, self.heads, w // self.heads).transpose(1, 2)  # (b, h, t, w/h)


class Transformer(nn.Module):
    """Maps a context and queries to mixtures over a new observation and the noise-free function."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        per_feature = 1 + 2 * config.fourier_octaves
        self.embed_x = nn.Linear(config.max_features * (per_feature + 1), width)
        self.embed_y = nn.Linear(1, width)
        self.embed_query = nn.Parameter(torch.randn(width) * 0.1)
        self.embed_buffer = nn.Parameter(torch.zeros(width))
        self.embed_task = nn.Linear(2 * config.latent_slots + config.max_features + 3, width)
        self.embed_latent = nn.Parameter(torch.randn(max(config.latent_slots, 1), width) * 0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head_y = _mixture_head(config)
        self.head_f = _mixture_head(config)
        self.head_latent = nn.Linear(width, 3 * config.components + 1)

    def encode(self, x: Tensor, y: Tensor, known: Tensor | None = None) -> Encoded:
        """Runs the context (b, n, d), (b, n) through all layers and keeps keys and values.

        Args:
            known: (b, latent_slots) standardised latents that are known, NaN where unknown.
        """
        scaling = self.scaling(y)
        count = torch.full_like(scaling.center, x.shape[1])
        tokens = torch.cat(
            [
                self._task_token(scaling, count, x.shape[-1], known),
                self._embed_points(x, y, scaling),
            ],
            dim=1,
        )  # (b, 1 + n, w)
        log_count = count.log1p()[:, None, None, None]
        keys, values = [], []
        for block in self.blocks:
            normed = block.norm_attention(tokens)
            key, value = block.keys_values(normed)
            keys.append(key)
            values.append(value)
            attended = attend(block.queries(normed, log_count), key, value)
            tokens = block.finish(tokens, attended)
        return Encoded(keys, values, scaling, count, x.shape[-1])

    def decode(
        self,
        encoded: Encoded,
        x_query: Tensor,
        *,
        buffer: tuple[Tensor, Tensor] | None = None,
        visible: Tensor | None = None,
        latents: bool = False,
    ) -> Tensor:
        """Final query representations (b, m [+ latent_slots], w) given an encoded context.

        Args:
            x_query: (b, m, d).
            buffer: added points (b, k, d), (b, k); they see the context and causally each other.
            visible: (m,) how many buffer points each query sees; needed with a buffer.
            latents: appends one query per latent slot, which sees the context only.
        """
        queries = self._embed_features(x_query) + self.embed_query
        if latents:
            extra = self.embed_latent.expand(x_query.shape[0], -1, -1)
            queries = torch.cat([queries, extra], dim=1)
        if buffer is None:
            log_count = encoded.count.log1p()[:, None, None, None]
            for block, key, value in zip(self.blocks, encoded.keys, encoded.values, strict=True):
                q = block.queries(block.norm_attention(queries), log_count)
                queries = block.finish(queries, attend(q, key, value))
            return self.norm(queries)
        assert visible is not None
        added = self._embed_points(*buffer, encoded.scaling) + self.embed_buffer
        k, n = added.shape[1], encoded.keys[0].shape[2] - 1
        if latents:
            visible = torch.cat([visible, visible.new_zeros(queries.shape[1] - len(visible))])
        position = torch.arange(k, device=added.device)
        sees = torch.cat([position + 1, visible])  # (k + m,) buffer points each token sees
        allowed = torch.cat(
            [
                torch.ones(len(sees), 1 + n, dtype=torch.bool, device=added.device),
                position < sees.unsqueeze(-1),
            ],
            dim=1,
        )
        log_count = (encoded.count[:, None] + sees).log1p()[:, None, :, None]  # (b, 1, k + m, 1)
        tokens = torch.cat([added, queries], dim=1)
        for block, key, value in zip(self.blocks, encoded.keys, encoded.values, strict=True):
            normed = block.norm_attention(tokens)
            key_added, value_added = block.keys_values(normed[:, :k])
            attended = attend(
                block.queries(normed, log_count),
                torch.cat([key, key_added], dim=2),
                torch.cat([value, value_added], dim=2),
                allowed,
            )
            tokens = block.finish(tokens, attended)
        return self.norm(tokens[:, k:])

    def scaling(self, y: Tensor) -> Scaling:
        """The context's mean and standard deviation (b,), shrunk to the prior's by a pseudo-count."""
        total = y.shape[1] + PSEUDO_COUNT
        prior_mean, prior_variance = self.config.y_mean, self.config.y_std**2
        center = (y.sum(1) + PSEUDO_COUNT * prior_mean) / total
        squares = (y - center.unsqueeze(-1)).square().sum(1)
        return Scaling(center, ((squares + PSEUDO_COUNT * prior_variance) / total).sqrt())

    def mixture_y(self, final: Tensor) -> Mixture:
        """Mixtures over a new observation, in the normalised units of `scaling`."""
        return _to_mixture(self.head_y(final))

    def mixture_f(self, final: Tensor) -> Mixture:
        """Mixtures over the noise-free function, in the normalised units of `scaling`."""
        return _to_mixture(self.head_f(final))

    def latent_head(self, final: Tensor) -> tuple[Mixture, Tensor]:
        """Mixtures over standardised latents, and logits for those that are categories."""
        raw = self.head_latent(final)
        return _to_mixture(raw[..., :-1]), raw[..., -1]

    def _embed_features(self, x: Tensor) -> Tensor:
        """Embeds inputs (b, n, d): each feature raw and as sines and cosines of doubling frequency."""
        d, missing = x.shape[-1], self.config.max_features - x.shape[-1]
        centered = 2 * x - 1  # the prior's box [0, 1] becomes [-1, 1]
        octaves = torch.arange(self.config.fourier_octaves, device=x.device)
        phase = centered.unsqueeze(-1) * (0.5 * math.pi * 2**octaves)  # (b, n, d, octaves)
        features = torch.cat([centered.unsqueeze(-1), phase.sin(), phase.cos()], dim=-1)
        features = F.pad(features, (0, 0, 0, missing)).flatten(-2)
        which = F.one_hot(torch.tensor(d - 1, device=x.device), self.config.max_features)
        which = which.to(x.dtype).expand(*x.shape[:-1], -1)
        return self.embed_x(torch.cat([features, which], dim=-1))

    def _embed_points(self, x: Tensor, y: Tensor, scaling: Scaling) -> Tensor:
        normalised = (y - scaling.center.unsqueeze(-1)) / scaling.scale.unsqueeze(-1)
        return self._embed_features(x) + self.embed_y(normalised.unsqueeze(-1))

    def _task_token(
        self, scaling: Scaling, count: Tensor, d: int, known: Tensor | None
    ) -> Tensor:
        """One token (b, 1, w) for what concerns the whole task: scale, size, known latents."""
        if known is None:
            known = scaling.center.new_full((len(count), self.config.latent_slots), torch.nan)
        is_known = ~known.isnan()
        which = F.one_hot(torch.tensor(d - 1, device=count.device), self.config.max_features)
        summary = torch.stack(
            [
                (scaling.center - self.config.y_mean) / self.config.y_std,
                (scaling.scale / self.config.y_std).log(),
                count.log1p() / 5,
            ],
            dim=-1,
        )
        features = [known.nan_to_num(0.0), is_known, which.expand(len(count), -1), summary]
        return self.embed_task(
            torch.cat([part.to(summary.dtype) for part in features], dim=-1)
        ).unsqueeze(1)


def attend(q: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, in float32 on a CPU: its bfloat16 backward pass is 10 x slower."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            q, key, value = q.float(), key.float(), value.float()
            return F.scaled_dot_product_attention(q, key, value, attn_mask=allowed)
    return F.scaled_dot_product_attention(q, key, value, attn_mask=allowed)


def _mixture_head(config: TransformerConfig) -> nn.Linear:
    """A linear head that starts as a broad mixture with spread means."""
    head = nn.Linear(config.width, 3 * config.components)
    nn.init.normal_(head.weight, std=0.02)
    with torch.no_grad():
        _, means, _ = head.bias.zero_().chunk(3)
        means.copy_(torch.linspace(-1.5, 1.5, config.components))
    return head


def _to_mixture(raw: Tensor) -> Mixture:
    """Log weights, means and log standard deviations, the last within e^-10 .. e^10."""
    weights, means, log_stds = raw.float().chunk(3, dim=-1)
    return Mixture(weights.log_softmax(-1), means, 10 * torch.tanh(log_stds / 10))
