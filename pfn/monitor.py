"""What a pretraining run shows to people: rates, model FLOP utilisation, loss, and the gap.

Utilisation is the floating-point work that the architecture calls for, forward and backward, over
what a plain matrix product of the model's own shapes and precision reaches on the same device.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from pfn.mixture import mixture_log_prob
from pfn.network import Network
from pfn.pretrain import PretrainConfig, Progress, Sizes, choose_device, is_bf16, plan
from pfn.transformer import TransformerConfig
from priors import Prior, ReferencePrior

WINDOW = 200  # steps behind the rates and the loss
EVERY = 10.0  # seconds between lines where the output is no terminal


class Monitor:
    """A progress line for `pretrain`: pass `report` and `probe`, and use it in a `with`."""

    def __init__(
        self,
        name: str,
        prior: Prior,
        config: PretrainConfig,
        network: TransformerConfig,
        *,
        device: str | None,
        console: Console,
    ) -> None:
        self.config, self.network, self.console = config, network, console
        self.recent: deque[tuple[Progress, float]] = deque(maxlen=WINDOW)
        self.held_out = held_out(prior, config)
        self.gap: float | None = None
        peak = matrix_product_peak(network, config, choose_device(device))
        self.peak = int(os.environ.get("WORLD_SIZE", "1")) * peak
        self.bar = Bar(
            TextColumn(f"[bold]{name}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal or int(os.environ.get("RANK", "0")) > 0,
        )
        self.row = self.bar.add_task("", total=1.0)
        self.printed = time.monotonic()

    def __enter__(self) -> Monitor:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def report(self, progress: Progress) -> None:
        """Takes in one step."""
        sizes = [plan(self.config, progress.step - 1, p) for p in range(self.config.micro_batches)]
        flops = math.fsum(training_flops(self.network, s, self.config.queries) for s in sizes)
        self.recent.append((progress, flops))
        self.bar.update(self.row, completed=progress.fraction, description=self.line())
        now = time.monotonic()
        if self.bar.disable and now - self.printed > EVERY:
            self.printed = now
            self.console.print(f"{100 * progress.fraction:.0f} %  {self.line()}", soft_wrap=True)

    def probe(self, model: Network, progress: Progress) -> None:
        """Measures the gap of the averaged weights."""
        if self.held_out is not None:
            self.gap = gap(model, self.held_out)

    def line(self) -> str:
        """Rates over the last steps, loss and gap."""
        rates, parts = self.rates(), []
        if rates:
            parts.append(f"{rates['tasks_per_second']:,.0f} tasks/s")
            parts.append(f"{rates['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"{100 * rates['flop_utilisation']:.0f} % of peak FLOP/s")
        parts.append(f"loss {self._mean('loss'):.3f}")
        if self.gap is not None:
            parts.append(f"gap {self.gap:.4f}")
        elif math.isfinite(self._mean("excess")):
            parts.append(f"gap at most {self._mean('excess'):.4f} (over known latents)")
        return " · ".join(parts)

    def rates(self) -> dict[str, float]:
        """Tasks, tokens and share of peak floating-point work per second, over the last steps."""
        (first, _), (last, _) = self.recent[0], self.recent[-1]
        seconds = last.seconds - first.seconds
        if seconds <= 0:
            return {}
        flops = math.fsum(flops for _, flops in list(self.recent)[1:])
        return {
            "tasks_per_second": (last.tasks - first.tasks) / seconds,
            "tokens_per_second": self._mean("tokens_per_second"),
            "flop_utilisation": flops / seconds / self.peak,
        }

    def summary(self, model: Network) -> dict[str, Any]:
        """Figures for the card; empty where a finished run is only written again."""
        if not self.recent:
            return {}
        self.probe(model, self.recent[-1][0])
        excess = self._mean("excess")
        return {
            "final_loss": self._mean("loss"),
            "final_excess_over_known_latents": excess if math.isfinite(excess) else None,
            "final_gap_on_few_tasks": self.gap,
            **self.rates(),
        }

    def _mean(self, name: str) -> float:
        return math.fsum(getattr(progress, name) for progress, _ in self.recent) / len(self.recent)


class Answered(NamedTuple):
    """Held-out tasks of one shape, with the reference's log density of their queries."""

    x: Tensor  # (task, n, dim)
    y: Tensor  # (task, n)
    x_query: Tensor  # (task, query, dim)
    y_query: Tensor  # (task, query)
    log_prob: Tensor  # (task, query)


def held_out(prior: Prior, config: PretrainConfig, tasks: int = 8) -> Answered | None:
    """Tasks of 20 points and one feature with exact answers, where the prior has them quickly."""
    is_quick = getattr(prior, "posterior_is_quick", None)
    if not isinstance(prior, ReferencePrior) or is_quick is None or not is_quick(1):
        return None
    n = min(20, config.max_context)
    drawn = prior.sample(tasks, n + 16, 1, generator=torch.Generator().manual_seed(1))
    context, x_query = (drawn.x[:, :n], drawn.y[:, :n]), drawn.x[:, n:]
    log_prob = prior.posterior(context, x_query).log_prob(drawn.y[:, n:])
    return Answered(*context, x_query, drawn.y[:, n:], log_prob)


@torch.no_grad()
def gap(model: Network, answered: Answered) -> float:
    """Mean of log p_reference(y) - log q(y), in nats per query."""
    parameter = next(model.parameters())
    x, y, x_query, y_query, log_prob = (part.to(parameter) for part in answered)
    encoded = model.encode(x, y)
    center, scale = (part.unsqueeze(-1) for part in encoded.scaling)
    mixture = model.mixture_y(model.decode(encoded, x_query))
    log_q = mixture_log_prob(*mixture, (y_query - center) / scale) - scale.log()
    return float((log_prob - log_q).mean())


def training_flops(network: TransformerConfig, sizes: Sizes, queries: int) -> float:
    """Floating-point operations of one micro-batch, backward pass included.

    Two per multiply-add of every matrix product, of attention and of the experts' factorisations. A
    backward pass costs two forward passes; refinements have none. What is left out, as is usual:
    norms, softmax, padding, kernels, small layers, the loss, the optimiser.
    """
    if network.causal:
        return 3 * causal_products(network, sizes, queries)
    refined = 2 * network.count_refinements(sizes.context) * _solve(sizes)
    inverse = 2 * _solve(sizes) + 4 * sizes.context**3  # its gradient takes two products
    experts = network.components * sizes.batch * (refined + inverse)
    return experts + 3 * forward_products(network, sizes, queries)


def causal_products(network: TransformerConfig, sizes: Sizes, queries: int) -> float:
    """Operations of a forward pass of a causal network, which has no experts."""
    w, stored = network.width, 1 + sizes.context + sizes.buffer
    tokens = sizes.context + sizes.buffer + queries
    per_layer = tokens * (4 + 2 * network.expansion) * w * w + tokens * stored * 2 * w
    ends = queries * 6 * network.components * w + 70 * tokens * w
    return 2 * sizes.batch * (network.layers * per_layer + ends)


def forward_products(network: TransformerConfig, sizes: Sizes, queries: int) -> float:
    """Operations of a forward pass besides the experts' factorisations and refinements."""
    w, layers, place = network.width, network.layers, network.heads * (sizes.features + 2)
    tokens = queries + (network.latent_slots if sizes.latents else 0)
    stored = 1 + sizes.context + sizes.buffer  # tokens that others attend to
    attended = (sizes.buffer + tokens) * stored
    finished = (2 + 2 * network.expansion) * w * w  # q, output, feed-forward
    scored = 2 * w + place  # scores, with distances, and weighted values
    per_layer = (sizes.buffer + tokens) * finished + stored * 2 * w * w + attended * scored
    context = (1 + sizes.context) * finished + (1 + sizes.context) ** 2 * scored
    inputs = sizes.features * (1 + 2 * network.fourier_octaves)
    told = 2 * network.components
    ends = (stored + tokens) * (inputs + told) * w + queries * 6 * network.components * w
    n, k, d = sizes.context, sizes.buffer, sizes.features
    experts = (k + queries) * n * (n + d + 1)  # weights of the context, distances, means
    if k:
        experts += k * (n * k + n + k * (d + 1)) + queries * k * (n + k + d + 2)
    trunk = layers * per_layer + (layers - 1) * context  # whose last layer only stores it
    return 2 * sizes.batch * (trunk + ends + network.components * experts)


def _solve(sizes: Sizes) -> float:
    """Multiply-adds of one factorisation, inverse and slope of one expert."""
    n = sizes.context
    return 0.5 * n**3 + n * n * (2 * sizes.features + 1)


def matrix_product_peak(
    network: TransformerConfig, config: PretrainConfig, device: torch.device, seconds: float = 0.3
) -> float:
    """FLOP/s of the feed-forward layer's matrix product, the best of several timings."""
    rows, w = config.tokens // config.micro_batches, network.width
    dtype = torch.bfloat16 if is_bf16(config, device) else torch.float32
    left = torch.randn(rows, w, device=device, dtype=dtype)
    right = torch.randn(w, network.expansion * w, device=device, dtype=dtype)
    best, began, repeats = 0.0, time.perf_counter(), 16
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        for _ in range(repeats):
            product = left @ right
        float(product[0, 0])  # waits for the device
        rate = repeats * 2 * rows * w * right.shape[1] / (time.perf_counter() - start)
        best = max(best, rate)
    return best
