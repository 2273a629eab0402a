import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pfn.monitor import Monitor, forward_products, gap, held_out, training_flops
from pfn.pretrain import PretrainConfig, Progress, Sizes, architecture, draw_lesson, loss
from pfn.transformer import Transformer
from priors import GaussianProcess, Tasks

CONFIG = PretrainConfig(
    max_features=3, width=32, layers=3, heads=2, components=5, tasks=100, queries=7, bf16=False
)


class White:
    """Independent standard normals, whose posterior is the prior."""

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        x = torch.rand(batch, n, d, generator=generator, dtype=torch.float64)
        y = torch.randn(batch, n, generator=generator, dtype=torch.float64)
        return Tasks(x, y, torch.zeros_like(y), {})

    def posterior(
        self, context: tuple[Tensor, Tensor], x_query: Tensor, latent: bool = False
    ) -> Distribution:
        mean = torch.zeros(x_query.shape[:-1], dtype=torch.float64)
        return Normal(mean, torch.ones_like(mean))

    def posterior_is_quick(self, d: int) -> bool:
        return True


@pytest.mark.parametrize(
    "sizes", [Sizes(2, 200, 0, 2, False), Sizes(2, 150, 50, 3, False), Sizes(2, 200, 0, 3, True)]
)
def test_flops_are_those_that_torch_counts(sizes: Sizes) -> None:
    prior = GaussianProcess()
    network = architecture(prior, CONFIG)
    lesson = draw_lesson(prior, network, CONFIG, sizes, 0, 0, torch.device("cpu"))
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # the kind whose products are counted
        torch.no_grad(),
    ):
        loss(Transformer(network), lesson)
    n, k, m = sizes.context + 1, sizes.buffer, lesson.x_query.shape[1]
    m += 0 if lesson.latents is None else network.latent_slots
    pairs = (CONFIG.layers - 1) * n**2 + CONFIG.layers * (k + m) * (n + k)
    # Values are padded to the length of the keys, which hold d + 2 numbers more per head.
    padding = 2 * sizes.batch * pairs * CONFIG.heads * (sizes.features + 2)
    refined = network.count_refinements(sizes.context)
    d, solves = sizes.features, network.components * (refined + 1)
    distances = 2 * sizes.batch * solves * sizes.context**2 * (d + 1)
    slopes = 2 * sizes.batch * network.components * refined * sizes.context**2 * (d + 1)
    expected = counter.get_total_flops() - padding - distances - slopes
    found = forward_products(network, sizes, CONFIG.queries)
    assert found == pytest.approx(expected, rel=0.02)  # the task token's own layers are left out
    cubic = sizes.batch * network.components * sizes.context**3 * (refined + 1 + 4)
    rest = 2 * distances + slopes
    assert 0 < training_flops(network, sizes, CONFIG.queries) - 3 * found - cubic < rest


def test_gap_is_the_mean_difference_of_log_densities() -> None:
    answered = held_out(White(), CONFIG)
    assert answered is not None
    entropy = -float(answered.log_prob.mean())
    count = answered.log_prob.numel()
    # The mean of y^2 / 2 has standard error 1 / sqrt(2 count).
    exact = 0.5 * math.log(2 * math.pi * math.e)
    assert entropy == pytest.approx(exact, abs=4 / math.sqrt(2 * count))
    model = Transformer(architecture(White(), CONFIG)).requires_grad_(False)
    found = gap(model, answered)
    encoded = model.encode(answered.x.float(), answered.y.float())
    mixture = model.mixture_y(model.decode(encoded, answered.x_query.float()))
    density = torch.zeros_like(answered.y_query)
    for k in range(CONFIG.components):
        mean = (
            encoded.scaling.center[:, None] + encoded.scaling.scale[:, None] * mixture.means[..., k]
        )
        std = encoded.scaling.scale[:, None] * mixture.log_stds[..., k].exp()
        part = Normal(mean.double(), std.double()).log_prob(answered.y_query).exp()
        density = density + mixture.log_weights[..., k].exp() * part
    expected = float((answered.log_prob - density.log()).mean())
    assert found == pytest.approx(expected, abs=1e-4)  # float32 network


def test_line_names_the_gap_or_its_bound() -> None:
    def line(gap: float | None, excess: float) -> str:
        network = architecture(White(), CONFIG)
        console = Console(file=StringIO())
        monitor = Monitor("run", White(), CONFIG, network, device="cpu", console=console)
        for step in (1, 2):
            monitor.report(Progress(step, 10 * step, 0.5, 1.5, excess, 2.0 * step, 100.0, 0.1))
        monitor.gap = gap
        return monitor.line()

    assert "5 tasks/s" in line(None, 0.25) and "100 tokens/s" in line(None, 0.25)
    assert "loss 1.500" in line(None, 0.25)
    assert "gap at most 0.2500" in line(None, 0.25)
    assert "gap 0.1250" in line(0.125, 0.25)
    assert "gap" not in line(None, math.nan)
