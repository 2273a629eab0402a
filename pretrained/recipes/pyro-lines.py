"""pyro-lines: a prior written as a Pyro program, with the posterior that NUTS gives for free."""

import pyro
import pyro.distributions as dist
from torch import Tensor

from pfn.pretrain import PretrainConfig
from priors import from_pyro


def lines(x: Tensor) -> None:
    """Straight lines, whose slopes share a scale, through noise."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.LogNormal(-3.0, 0.5))
    size = pyro.sample("size", dist.Normal(0.0, 1.0))  # of the slope; not centred, for NUTS
    slope = pyro.deterministic("slope", scale * size)
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("points", x.shape[-2]):
        mean = offset + slope * (x - 0.5).sum(-1)
        pyro.sample("y", dist.Normal(mean, noise.sqrt()))


prior = from_pyro(lines)

config = PretrainConfig(max_features=1, max_context=64, lr=5e-3, seconds=240)
