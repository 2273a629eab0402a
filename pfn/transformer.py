"""The network: a pre-norm transformer with one token per data point, and experts before its end.

Context tokens attend to the context, query tokens to the context only, so no query's answer depends
on another query. Before the last layer, Gaussian-process experts (`experts.py`), whose
hyperparameters are read from the context, predict every token, and the network goes on from there.
`encode` runs the context once and keeps each layer's keys and values and the solved experts; a
query then costs one attention over them. Points added later live in a buffer: they attend to the
frozen context and causally to each other, and a query may see any prefix of them.

Shapes: b tasks, n context points, k buffer points, m queries, d features, w width, h heads.
Read next: `experts.py`; `predictive.py`, the distribution that the output parametrises; `model.py`,
which puts units, checks and caching around this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfn.experts import (
    KERNELS,
    Added,
    Experts,
    Forecast,
    Solved,
    add,
    forecast,
    leave_one_out,
    seen_by_each,
)
from pfn.network import Network
from pfn.units import FromContext

Seen = tuple[Tensor, Tensor, Tensor | None, FromContext]  # a context: x, y, known latents, units
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
    """Everything that fixes the architecture.

    There is one component of the mixture for each expert, whose hyperparameters take from
    `least_refinements` to `refinements` steps; about equal parts of the experts have each of
    the `expert_kernels`. A `causal` network (`causal.py`) has no experts.
    `y_mean` and `y_std` are the prior's own moments.
    """

    max_features: int
    width: int = 96
    layers: int = 2
    heads: int = 6
    expansion: int = 2
    fourier_octaves: int = 4
    components: int = 6
    expert_kernels: tuple[str, ...] = ("rbf", "matern52", "matern32")
    least_refinements: int = 1
    refinements: int = 6
    y_mean: float = 0.0
    y_std: float = 1.0
    latents: tuple[Latent, ...] = ()
    causal: bool = False

    def __post_init__(self) -> None:
        for name in ("max_features", "width", "layers", "heads", "expansion", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of at least 1; got {getattr(self, name)}.")
        if not 0 <= self.least_refinements <= self.refinements:
            raise ValueError(
                f"Expected 0 <= least_refinements <= refinements; got {self.least_refinements} and"
                f" {self.refinements}."
            )
        object.__setattr__(self, "expert_kernels", tuple(self.expert_kernels))  # JSON has lists
        unknown = [name for name in self.expert_kernels if name not in KERNELS]
        if unknown or not self.expert_kernels:
            raise ValueError(
                f"Expected expert_kernels among {sorted(KERNELS)}; got {self.expert_kernels}."
            )
        if self.width % self.heads:
            raise ValueError(
                f"Expected a width that heads divides; got width {self.width}, heads {self.heads}."
            )

    def count_refinements(self, n: int) -> int:
        """For n context points: one more where they double, as more data say more."""
        return sum(bool(self.is_refined(i, n)) for i in range(self.refinements))

    def is_refined(self, i: int, n: int | Tensor) -> bool | Tensor:
        """Whether experts take refinement i, from 0 on, on n context points."""
        return (1 + n >= 2 ** (i + 3)) | (i < self.least_refinements)

    @property
    def latent_slots(self) -> int:
        """Scalars needed to hold all latents: one each, one per feature, or one per category."""
        return sum(self.slots(latent) for latent in self.latents)

    def slots(self, latent: Latent) -> int:
        return latent.categories or (self.max_features if latent.per_feature else 1)


class Mixture(NamedTuple):
    """Parameters of normal mixtures, each (..., components), the weights normalised."""

    log_weights: Tensor
    means: Tensor
    log_stds: Tensor


class Scaling(NamedTuple):
    """The frozen affine map of y inside the network: y = center + scale * normalised, (b,) each."""

    center: Tensor
    scale: Tensor

    def apply(self, y: Tensor) -> Tensor:
        return (y - self.center.unsqueeze(-1)) / self.scale.unsqueeze(-1)


class Place(NamedTuple):
    """Where tokens are, for the distance in attention; zeros for those that are nowhere."""

    position: Tensor  # (b, 1, t, d)
    present: Tensor  # (1, 1, t, 1)

    def near(self, metric: Tensor) -> Near:
        """The same in a metric (..., h, 1, d)."""
        scaled = metric * self.position
        square = scaled.square().sum(-1, keepdim=True)
        return Near(scaled, square, self.present.expand_as(square))


class Near(NamedTuple):
    """Places in the metric of a layer, and what queries and keys append for their distance.

    The inner product of the two is -|scaled_query - scaled_key|^2, or `logit` for keys nowhere.
    """

    scaled: Tensor  # (..., h, t, d)
    square: Tensor  # (..., h, t, 1)
    present: Tensor  # (..., h, t, 1)

    def rows(self, start: int, stop: int) -> Near:
        return Near(*(part[..., start:stop, :] for part in self))

    def of_query(self) -> tuple[Tensor, Tensor, Tensor]:
        return 2 * self.scaled, -self.square, self.present

    def of_key(self, logit: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        return self.scaled, self.present, logit - self.square


class Final(NamedTuple):
    """Queries after all layers, beside what the experts say of them."""

    tokens: Tensor  # (b, m [+ latent_slots], w)
    forecast: Forecast
    log_odds: Tensor  # (b, 1 or m, e) of the experts, by the whole task


class EncodedLayer(NamedTuple):
    """What one layer keeps of a context: h heads, 1 + n keys (the task token is first)."""

    key: Tensor  # (b, h, 1 + n, w/h + d + 2)
    value: Tensor  # the same, zeros from w/h on: fused kernels want one width
    metric: Tensor  # (b, h, 1, d) square roots of precisions


class Encoded(NamedTuple):
    """An encoded context: all that later queries and added points need of it."""

    layers: list[EncodedLayer]
    solved: Solved
    logits: Tensor  # (b, 1, e) of the experts
    report: Tensor  # (b, ...) of the experts' hyperparameters
    scaling: Scaling
    num_context: Tensor  # (b,) n, as a float

    def repeat(self, times: int) -> Encoded:
        """The encoding of one context (b = 1) as a batch of `times` equal ones."""

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(times, *[1] * (value.dim() - 1))

        layers = [EncodedLayer(*map(repeated, layer)) for layer in self.layers]
        return Encoded(
            layers,
            self.solved.each(repeated),
            repeated(self.logits),
            repeated(self.report),
            Scaling(*map(repeated, self.scaling)),
            repeated(self.num_context),
        )


class Block(nn.Module):
    """Pre-norm attention and feed-forward. Attention adds a distance that the task itself scales.

    The logit of key i for query j is a temperature, which knows log n, times q_j . k_i / sqrt(w/h),
    minus sum_l precision_l (x_jl - x_il)^2, the precisions read per head and feature from the task
    token. A head is thus a kernel smoother whose lengthscales the network infers from the context:
    relevance of features need not be learned anew from inner products. Both terms are one inner
    product of longer vectors, so that the usual fused attention computes them.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads, self.max_features = config.width, config.heads, config.max_features
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(width, 2 * width, bias=False)
        self.from_heads = nn.Linear(width, width, bias=False)
        self.temperature = nn.Parameter(torch.tensor([[1.0], [0.1]]).repeat(1, config.heads))
        self.to_metric = nn.Linear(width, config.heads * config.max_features)
        self.task_logit = nn.Parameter(torch.zeros(config.heads))
        self.norm_forward = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, config.expansion * width)
        self.contract = nn.Linear(config.expansion * width, width)
        for last in (*self.from_heads.parameters(), *self.contract.parameters()):
            nn.init.zeros_(last)  # every block starts as the identity
        nn.init.zeros_(self.to_metric.weight)
        sight = torch.linspace(-3, 3, config.heads)  # heads start from far- to near-sighted
        self.to_metric.bias = nn.Parameter(sight.repeat_interleave(config.max_features))

    def metric(self, normed_task: Tensor, d: int) -> Tensor:
        """Square roots of the precisions (b, h, 1, d), from the task token (b, w)."""
        log_precision = _full(self.to_metric(normed_task))
        log_precision = log_precision.view(-1, self.heads, 1, self.max_features)
        return (0.5 * log_precision[..., :d].clamp(-8, 7)).exp()

    def queries(self, normed: Tensor, sharpness: Tensor, *near: Tensor) -> Tensor:
        """Query vectors (b, h, tokens, w/h + d + 2): content, `sharpness` times, and place."""
        b, t, w = normed.shape
        content = _full(self.to_query(normed)).view(b, t, self.heads, w // self.heads)
        return torch.cat([content.transpose(1, 2) * sharpness, *near], dim=-1)

    def keys_values(self, normed: Tensor, *near: Tensor) -> tuple[Tensor, Tensor]:
        """Key vectors as long as the queries', and values with zeros up to the same length."""
        b, t, w = normed.shape
        both = _full(self.to_key_value(normed)).view(b, t, 2, self.heads, w // self.heads)
        key, value = both.transpose(1, 3).unbind(2)  # (b, h, t, w/h)
        key = torch.cat([key, *near], dim=-1)
        return key, F.pad(value, (0, key.shape[-1] - value.shape[-1]))

    def finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Adds what attention gathered (b, h, tokens, w/h), then the feed-forward layer."""
        content = attended[..., : tokens.shape[-1] // self.heads]
        tokens = tokens + self.from_heads(content.transpose(1, 2).flatten(2))
        hidden = F.relu(self.expand(self.norm_forward(tokens))).square()
        return tokens + self.contract(hidden)


class Transformer(Network):
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
        self.embed_task = nn.Linear(2 * config.latent_slots + config.max_features + 5, width)
        self.embed_latent = nn.Parameter(torch.randn(max(config.latent_slots, 1), width) * 0.5)
        blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.blocks = cast(Sequence[Block], blocks)
        self.experts = Experts(config)
        self.trust = nn.Parameter(torch.tensor(0.1))  # in evidence, as weights of the experts
        self.norm = nn.LayerNorm(width, bias=False)
        self.head_y = _mixture_head(config)
        self.head_f = _mixture_head(config)
        self.head_latent = nn.Linear(width, 3 * config.components + 1)

    def encode(
        self,
        x: Tensor,
        y: Tensor,
        known: Tensor | None = None,
        own: FromContext = FromContext(),
    ) -> Encoded:
        """Runs the context (b, n, d), (b, n) through all layers and keeps what queries need.

        Args:
            known: (b, latent_slots) standardised latents that are known, NaN where unknown.
            own: which units of x and y the context itself set.
        """
        return self._run((x, y, known, own), x[:, :0], latents=False)[0]

    def answer(
        self,
        x: Tensor,
        y: Tensor,
        known: Tensor | None,
        own: FromContext,
        x_query: Tensor,
        *,
        latents: bool = False,
    ) -> tuple[Final, Scaling]:
        """What `decode` gives for `encode` of a context, in one pass; and the scaling."""
        encoded, final = self._run((x, y, known, own), x_query, latents)
        return final, encoded.scaling

    def _run(
        self,
        context: Seen,
        x_query: Tensor,
        latents: bool,
    ) -> tuple[Encoded, Final]:
        """Context and queries through all layers; every token attends to the context."""
        x, y, known, own = context
        scaling = self.scaling(y)
        y = scaling.apply(y)
        known = self._known(known, scaling)
        (b, n, d), m, k = x.shape, x_query.shape[1], 1 + x.shape[1]
        count = torch.full_like(scaling.center, n)
        every = torch.cat([x, x_query], dim=1)
        roles = [self.embed_y(y.unsqueeze(-1)), self.embed_query.expand(b, m, -1)]
        task = self._task_token(scaling, count, d, known, own)
        parts = [task, self._embed_features(every) + torch.cat(roles, dim=1)]
        extra = len(self.embed_latent) if latents else 0
        if latents:
            parts.append(self.embed_latent.expand(b, -1, -1))
        tokens = torch.cat(parts, dim=1)  # (b, 1 + n + m + extra, w)
        where = place(every, before=1, after=extra)
        logits = torch.stack([block.task_logit for block in self.blocks])[:, None, :, None, None]
        logits = logits * (1 - where.present[:, :, :k])  # (layer, 1, h, 1 + n, 1), for the task's
        sharpness = self.sharpness(count[:, None])
        layers = []
        for block, sharp, logit in zip(self.blocks, sharpness, logits, strict=True):
            if block is self.blocks[-1]:
                with torch.autocast(x.device.type, enabled=False):
                    solved, weigh, report = self.experts.solve(tokens[:, 0], known, x, y)
                    told = [self.experts.tell_task(report), self.experts.tell_context(solved)]
                said, to_queries = self._ask(solved, report, x_query, latents)
                tokens = tokens + torch.cat([*told, to_queries], dim=1)
            normed = block.norm_attention(tokens)
            metric = block.metric(normed[:, 0], x.shape[-1])
            near = where.near(metric)
            key, value = block.keys_values(normed[:, :k], *near.rows(0, k).of_key(logit))
            layers.append(EncodedLayer(key, value, metric))
            if block is self.blocks[-1]:  # nothing reads the context's tokens after it
                tokens, normed, near = tokens[:, k:], normed[:, k:], near.rows(k, k + m + extra)
            query = block.queries(normed, sharp, *near.of_query())
            tokens = block.finish(tokens, attend(query, key, value))
        encoded = Encoded(layers, solved, weigh, report, scaling, count)
        return encoded, self.finish(tokens, said, weigh)

    def decode(
        self,
        encoded: Encoded,
        x_query: Tensor,
        *,
        buffer: tuple[Tensor, Tensor] | None = None,
        visible: Tensor | None = None,
        latents: bool = False,
    ) -> Final:
        """What becomes of queries given an encoded context.

        Args:
            x_query: (b, m, d).
            buffer: added points (b, k, d), (b, k); they see the context and causally each other.
            visible: (m,) how many buffer points each query sees; needed with a buffer.
            latents: appends one query per latent slot, which sees the context only.
        """
        queries, where = self.embed_queries(x_query, latents)
        if buffer is None:
            sharpness = self.sharpness(encoded.num_context[:, None])
            metrics = torch.stack([layer.metric for layer in encoded.layers])
            nears = torch.cat(where.near(metrics).of_query(), dim=-1)  # of all layers at once
            layers = zip(self.blocks, encoded.layers, sharpness, nears, strict=True)
            for block, (key, value, _), sharp, near in layers:
                if block is self.blocks[-1]:
                    said, told = self._ask(encoded.solved, encoded.report, x_query, latents)
                    queries = queries + told
                query = block.queries(block.norm_attention(queries), sharp, near)
                queries = block.finish(queries, attend(query, key, value))
            return self.finish(queries, said, encoded.logits)
        assert visible is not None
        x_added, y_added = buffer[0], encoded.scaling.apply(buffer[1])
        added = self.embed_points(x_added, y_added) + self.embed_buffer
        k, n = added.shape[1], encoded.layers[0].key.shape[2] - 1
        order = torch.arange(k, device=added.device)
        blind = visible.new_zeros(queries.shape[1] - len(visible))
        sees = torch.cat([order + 1, visible, blind])  # (tokens,) buffer points each of them sees
        allowed = torch.cat(
            [
                torch.ones(len(sees), 1 + n, dtype=torch.bool, device=added.device),
                order < sees.unsqueeze(-1),
            ],
            dim=1,
        )
        tokens = torch.cat([added, queries], dim=1)
        new = place(x_added)
        every = Place(*(torch.cat(two, dim=2) for two in zip(new, where, strict=True)))
        sharpness = self.sharpness(encoded.num_context[:, None] + sees)
        for block, (key, value, metric), sharp in zip(
            self.blocks, encoded.layers, sharpness, strict=True
        ):
            if block is self.blocks[-1]:
                with torch.autocast(x_query.device.type, enabled=False):
                    points = seen_by_each(self.config.components, x_added, y_added)
                    more = add(encoded.solved, points)
                    to_added = self.experts.tell_buffer(
                        encoded.solved.log_variance, more.white, more.log_diagonal
                    )
                said, told = self._ask(
                    encoded.solved, encoded.report, x_query, latents, more, visible
                )
                tokens = tokens + torch.cat([to_added, told], dim=1)
            normed = block.norm_attention(tokens)
            key_added, value_added = block.keys_values(normed[:, :k], *new.near(metric).of_key())
            attended = attend(
                block.queries(normed, sharp, *every.near(metric).of_query()),
                torch.cat([key, key_added], dim=2),
                torch.cat([value, value_added], dim=2),
                allowed,
            )
            tokens = block.finish(tokens, attended)
        return self.finish(tokens[:, k:], said, encoded.logits)

    def _ask(
        self,
        solved: Solved,
        report: Tensor,
        x_query: Tensor,
        latents: bool,
        added: Added | None = None,
        visible: Tensor | None = None,
    ) -> tuple[Forecast, Tensor]:
        """What the experts say at queries, and what tokens (b, m [+ slots], w) learn of it."""
        with torch.autocast(x_query.device.type, enabled=False):
            said = forecast(solved, x_query, added, visible)
            told = self.experts.tell_query(said)
            if latents:
                told = torch.cat([told, self.experts.tell_latents(report)], dim=1)
        return said, told

    def _known(self, known: Tensor | None, scaling: Scaling) -> Tensor | None:
        """Known latents, which they are, and the scale of y for those (b, 3 latent_slots)."""
        if known is None or not self.config.latent_slots:
            return None
        is_known = (~known.isnan()).to(known)
        log_scale = (scaling.scale / self.config.y_std).log().unsqueeze(-1)
        return torch.cat([known.nan_to_num(0.0), is_known, is_known * log_scale], dim=-1)

    def finish(self, tokens: Tensor, said: Forecast, logits: Tensor) -> Final:
        """Tokens of queries (b, m, w) after the last layer, and the weights of their experts."""
        evidence = said.log_evidence - said.log_evidence.amax(-1, keepdim=True)
        return Final(self.norm(tokens), said, logits + self.trust * evidence.to(logits))

    def scaling(self, y: Tensor) -> Scaling:
        """The context's mean and standard deviation (b,), shrunk to the prior's."""
        total = y.shape[1] + PSEUDO_COUNT
        prior_mean, prior_variance = self.config.y_mean, self.config.y_std**2
        center = (y.sum(1) + PSEUDO_COUNT * prior_mean) / total
        squares = (y - center.unsqueeze(-1)).square().sum(1)
        return Scaling(center, ((squares + PSEUDO_COUNT * prior_variance) / total).sqrt())

    def sharpness(self, count: Tensor) -> Sequence[Tensor]:
        """Per layer, what multiplies q . k for tokens that attend to `count` (b, t) points."""
        temperature = torch.stack([block.temperature for block in self.blocks])
        offset, slope = temperature[:, :, None, :, None, None].unbind(1)  # (layer, 1, h, 1, 1)
        log_count = count.log1p()[:, None, :, None]  # (b, 1, t, 1)
        root = math.sqrt(self.config.width // self.config.heads)
        return ((offset + slope * log_count) / root).unbind()

    def mixture_y(self, final: Final) -> Mixture:
        """Mixtures over a new observation, in the normalised units of `scaling`."""
        return _around(final, final.forecast.variance + final.forecast.noise, self.head_y)

    def mixture_f(self, final: Final) -> Mixture:
        """Mixtures over the noise-free function, in the normalised units of `scaling`."""
        return _around(final, final.forecast.variance, self.head_f)

    def mixture_left_out(self, encoded: Encoded) -> Mixture:
        """Mixtures (b, n, e) over each observation given all others, by the experts alone.

        In the same units, with the observation itself at 0.
        """
        solved = encoded.solved
        white, log_stds = (
            part.unflatten(0, (-1, self.config.components)).mT for part in leave_one_out(solved)
        )
        of_all = solved.log_evidence.unflatten(0, (-1, self.config.components)).mT  # (b, 1, e)
        of_others = of_all + 0.5 * white.square() + log_stds  # but for a constant
        log_weights = (encoded.logits + self.trust * of_others).log_softmax(-1)
        return Mixture(log_weights, -white * log_stds.exp(), log_stds)

    def latent_head(self, final: Final) -> tuple[Mixture, Tensor]:
        """Mixtures over standardised latents, and logits for those that are categories."""
        m = final.forecast.mean.shape[1]
        raw = _full(self.head_latent(final.tokens[:, m:]))
        weights, means, log_stds = raw[..., :-1].chunk(3, dim=-1)
        mixture = Mixture(weights.log_softmax(-1), means, 10 * torch.tanh(log_stds / 10))
        return mixture, raw[..., -1]

    def _embed_features(self, x: Tensor) -> Tensor:
        """Embeds inputs (b, n, d): each feature raw and in waves of doubling frequency."""
        d, weight = x.shape[-1], self.embed_x.weight
        centered = (2 * x - 1).unsqueeze(-1)
        octaves = torch.arange(self.config.fourier_octaves, device=x.device)
        phase = centered * (0.5 * math.pi * 2**octaves)  # (b, n, d, octaves)
        features = torch.cat([centered, phase.sin(), phase.cos()], dim=-1).flatten(-2)
        which = weight[:, d - 1 - self.config.max_features]  # the input that says "d features"
        return F.linear(features, weight[:, : features.shape[-1]], self.embed_x.bias + which)

    def embed_queries(self, x: Tensor, latents: bool) -> tuple[Tensor, Place]:
        """Query tokens (b, m, w), one per latent slot behind them if wanted, and their places."""
        queries = self._embed_features(x) + self.embed_query
        if latents:
            extra = self.embed_latent.expand(x.shape[0], -1, -1)
            queries = torch.cat([queries, extra], dim=1)
        return queries, place(x, after=queries.shape[1] - x.shape[1])

    def embed_points(self, x: Tensor, normalised: Tensor) -> Tensor:
        """Tokens (b, n, w) of observations, y normalised."""
        return self._embed_features(x) + self.embed_y(normalised.unsqueeze(-1))

    def _task_token(
        self, scaling: Scaling, count: Tensor, d: int, known: Tensor | None, own: FromContext
    ) -> Tensor:
        """One token (b, 1, w) for what concerns the whole task: scale, size, known latents."""
        summary = torch.stack(
            [
                (scaling.center - self.config.y_mean) / self.config.y_std,
                (scaling.scale / self.config.y_std).log(),
                count.log1p() / 5,
                *(torch.full_like(count, flag) for flag in own),
            ],
            dim=-1,
        )
        weight, slots = self.embed_task.weight, self.config.latent_slots
        which = weight[:, 2 * slots + d - 1]  # the input that says "d features"
        token = F.linear(summary, weight[:, -5:], self.embed_task.bias + which)
        if known is not None:
            token = token + F.linear(known[:, : 2 * slots], weight[:, : 2 * slots])
        return token.unsqueeze(1)


def place(x: Tensor, *, before: int = 0, after: int = 0) -> Place:
    """Where tokens at x (b, n, d) are, with others at no place `before` and `after` them."""
    position = (2 * _full(x) - 1).unsqueeze(1)  # the prior's box becomes [-1, 1]^d
    present = torch.ones_like(position[:1, :, :, :1])
    pad = (0, 0, before, after)
    return Place(F.pad(position, pad), F.pad(present, pad))


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Fused attention in float32, which the differences of squares inside the logits need."""
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):
            return F.scaled_dot_product_attention(query, key, value, allowed, scale=1.0)
    return F.scaled_dot_product_attention(query, key, value, allowed, scale=1.0)


def _mixture_head(config: TransformerConfig) -> nn.Linear:
    """A linear head that starts close to what the experts say."""
    head = nn.Linear(config.width, 3 * config.components)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def _around(final: Final, variance: Tensor, head: nn.Linear) -> Mixture:
    """One component around each expert's answer, moved and stretched as the head says."""
    logits, shift, stretch = _full(head(final.tokens[:, : variance.shape[1]])).chunk(3, dim=-1)
    std = variance.sqrt()
    means = (final.forecast.mean + std * shift).to(logits)
    log_stds = std.log().to(logits) + 10 * torch.tanh(stretch / 10)
    return Mixture((logits + final.log_odds).log_softmax(-1), means, log_stds)


def _full(value: Tensor) -> Tensor:
    """At least float32: what bfloat16 matrix products gave is widened, float64 is kept."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
