"""What training and serving rely on, whatever the network: `Network`, and `build`, which makes one.

Read next: `transformer.py`, for contexts in any order; `causal.py`, for curves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from pfn.transformer import Mixture, TransformerConfig
    from pfn.units import FromContext


class Network(nn.Module, ABC):
    """A network that reads a context once and then answers queries, each by itself.

    What `encode` returns has `layers`, `scaling` and `repeat`; what `decode` returns only the
    network's own methods understand.
    """

    config: TransformerConfig
    embed_query: nn.Parameter
    blocks: Sequence[Any]

    @abstractmethod
    def encode(
        self, x: Tensor, y: Tensor, known: Tensor | None = ..., own: FromContext = ...
    ) -> Any:
        """A context (b, n, d), (b, n), read."""

    @abstractmethod
    def answer(
        self,
        x: Tensor,
        y: Tensor,
        known: Tensor | None,
        own: FromContext,
        x_query: Tensor,
        *,
        latents: bool = False,
    ) -> tuple[Any, Any]:
        """What becomes of queries (b, m, d) given a context, in one pass; and the scaling of y."""

    @abstractmethod
    def decode(
        self,
        encoded: Any,
        x_query: Tensor,
        *,
        buffer: tuple[Tensor, Tensor] | None = None,
        visible: Tensor | None = None,
        latents: bool = False,
    ) -> Any:
        """What becomes of queries given what `encode` returned, and added points."""

    @abstractmethod
    def mixture_y(self, final: Any) -> Mixture:
        """Mixtures over a new observation, in the units of `scaling`."""

    @abstractmethod
    def mixture_f(self, final: Any) -> Mixture:
        """Mixtures over the noise-free function."""

    def latent_head(self, final: Any) -> tuple[Mixture, Tensor]:
        """Mixtures over standardised latents, and logits for those that are categories."""
        raise ValueError("Expected a network that knows latents; this one has none.")


def build(config: TransformerConfig) -> Network:
    """The network of a configuration, with random weights."""
    from pfn.causal import CausalTransformer
    from pfn.transformer import Transformer

    return CausalTransformer(config) if config.causal else Transformer(config)
