"""Draws per CPU second of every prior, in batches and singly: `python benchmarks/draws.py`.

Two loops stand beside each batch of 512 tasks of 128 points: our own `sample` with a batch of one,
and the same prior as one would write it with the field's libraries, one model object for each task:
GPyTorch for Gaussian processes, BoTorch's infinite-width kernel, `torch.nn` for networks, NumPy for
curves, Pyro's own handlers for a Pyro program. Results in results/draws.json.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import common  # before torch
import gpytorch
import numpy as np
import pyro
import torch
import typer
from botorch.models.kernels.infinite_width_bnn import InfiniteWidthBNNKernel
from curve_prior import loop_numpy
from speed import ExactGP
from speed import draw as draw_gpytorch
from torch import Tensor, nn
from torch.distributions import InverseGamma, Kumaraswamy, LogNormal

from pfn.recipe import load_recipe
from priors import (
    BNN,
    NNGP,
    GaussianProcess,
    LearningCurves,
    Linear,
    Mixture,
    ScaleMixture,
    Warped,
    hebo_plus,
)

PROGRAM = load_recipe(str(common.RECIPES / "pyro-lines.py"))
BATCH, POINTS, FEATURES = 512, 128, 5
SECONDS = 1.5  # of a loop, at least
CURVES = 200  # in one call of their loop


def loop_gp() -> Any:
    """An ARD Gaussian process with hyperpriors as a GPyTorch model."""
    return draw_gpytorch(ExactGP, POINTS, FEATURES)


def loop_nngp(scale: float = 1.0) -> Tensor:
    """BoTorch's kernel of an infinitely wide network, with drawn variances, in GPyTorch."""
    kernel = InfiniteWidthBNNKernel(depth=2)
    kernel.weight_var = LogNormal(math.log(2.0), 0.4).sample()
    kernel.bias_var = LogNormal(math.log(0.2), 0.8).sample()
    x = torch.rand(POINTS, FEATURES).double() - 0.5
    mean, noise = torch.zeros(POINTS).double(), LogNormal(-4.0, 1.5).sample()
    with torch.no_grad():
        f = gpytorch.distributions.MultivariateNormal(mean, scale * kernel.double()(x)).sample()
    return f + noise.sqrt() * torch.randn(POINTS)


def loop_scale_mixture() -> Tensor:
    """The same, times a scale of its own."""
    return loop_nngp(float(InverseGamma(2.0, 2.0).sample()))


@torch.no_grad()
def loop_bnn() -> Tensor:
    """A network of two hidden layers as a module, its weights drawn anew."""
    net = nn.Sequential(
        nn.Linear(FEATURES, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)
    )
    for layer in net[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(layer.bias)
    f = net(math.sqrt(12) * (torch.rand(POINTS, FEATURES) - 0.5)).squeeze(-1)
    return f + LogNormal(-4.0, 1.5).sample().sqrt() * torch.randn(POINTS)


def loop_linear() -> Tensor:
    """Weights, an intercept and noise, each from a distribution of torch."""
    x = torch.rand(POINTS, FEATURES)
    normal = torch.distributions.Normal(0.0, 1.0)
    f = x @ normal.sample((FEATURES,)) + normal.sample()
    return f + LogNormal(-4.0, 1.5).sample().sqrt() * normal.sample((POINTS,))


def loop_warped() -> Any:
    """A GPyTorch model seen through Kumaraswamy warps with drawn concentrations."""
    a, b = LogNormal(0.0, 0.75).sample((2, FEATURES))
    x = Kumaraswamy(a, b).cdf(torch.rand(POINTS, FEATURES).clamp(1e-6, 1 - 1e-6))
    with torch.no_grad(), gpytorch.settings.prior_mode(True):
        model = ExactGP(x).eval()
        for _, module, prior, closure, set_value in model.named_priors():
            set_value(module, prior.sample(closure(module).shape))
        return model.likelihood(model(x).sample()).sample()


def loop_curves() -> Any:
    """One curve at a time, redrawn until it is accepted: many, as some take longer."""
    return loop_numpy(CURVES, POINTS)


def loop_pyro() -> Tensor:
    """The program under Pyro's trace."""
    x = torch.rand(POINTS, FEATURES)
    return pyro.poutine.trace(PROGRAM.prior.model).get_trace(x).nodes["y"]["value"]


class Contest(NamedTuple):
    """A prior, and how others draw one task of it, in words and as a call."""

    prior: Any
    library: str | None = None
    loop: Callable[[], Any] | None = None
    features: int = FEATURES
    tasks: int = 1  # that one call of the loop draws


CONTESTS = {
    "GaussianProcess": Contest(GaussianProcess(ard=True), "GPyTorch", loop_gp),
    "NNGP": Contest(NNGP(), "BoTorch's kernel", loop_nngp),
    "ScaleMixture of NNGP": Contest(ScaleMixture(NNGP()), "BoTorch's kernel", loop_scale_mixture),
    "BNN": Contest(BNN(), "torch.nn", loop_bnn),
    "lcpfn": Contest(LearningCurves.lcpfn(POINTS), "NumPy", loop_curves, 1, CURVES),
    "LearningCurves": Contest(LearningCurves(), features=1),
    "LearningCurves, sweeps": Contest(LearningCurves()),
    "Linear": Contest(Linear(), "torch.distributions", loop_linear),
    "Warped": Contest(Warped(GaussianProcess(ard=True)), "GPyTorch", loop_warped),
    "HEBO+": Contest(hebo_plus(), "GPyTorch", loop_warped),
    "Mixture": Contest(Mixture((GaussianProcess(), NNGP(), BNN()))),
    "Pyro": Contest(PROGRAM.prior, "Pyro", loop_pyro),
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="priors; all by default")] = None,
    repeats: Annotated[int, typer.Option(help="rounds of alternation")] = 5,
    threads: int = 2,
) -> None:
    """Measures by the clock, and saves the table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    common.save("draws", [contest(name, repeats) for name in only or CONTESTS], batch=BATCH)


def contest(name: str, repeats: int) -> dict[str, Any]:
    """Tasks per second of one prior: the batch, our loop, and the library's."""
    prior, library, loop, features, tasks = CONTESTS[name]
    generator = torch.Generator().manual_seed(0)
    batch, one, other = [], [], []
    for _ in range(repeats):
        batch.append(
            BATCH * rate(lambda: prior.sample(BATCH, POINTS, features, generator=generator))
        )
        one.append(rate(lambda: prior.sample(1, POINTS, features, generator=generator)))
        if loop:
            other.append(tasks * rate(loop))
    best, ours = float(np.median(batch)), float(np.median(one))
    theirs = float(np.median(other)) if other else None
    return {
        "prior": name,
        "d": features,
        "tasks/s": best,
        "one at a time": ours,
        "ratio": best / ours,
        "with": library,
        "its tasks/s": theirs,
        "its ratio": best / theirs if theirs else None,
    }


def rate(call: Callable[[], Any]) -> float:
    """Calls per CPU second, over at least `SECONDS` of them after a call that warms up."""
    call()
    began, calls = time.process_time(), 0
    while (spent := time.process_time() - began) < SECONDS:
        call()
        calls += 1
    return calls / spent


if __name__ == "__main__":
    typer.run(main)
