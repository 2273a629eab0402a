"""A prior made for optimization: what objectives look like, and where optimizers look at them."""

from __future__ import annotations

import math

from torch.distributions import InverseGamma, LogNormal

from priors.bnn import BNN
from priors.gp import GaussianProcess
from priors.mixture import Mixture
from priors.nngp import NNGP
from priors.scale_mixture import ScaleMixture
from priors.searched import Searched
from priors.warped import Warped


def optimization() -> Mixture:
    """Warped processes, networks of infinite and of finite width, searched for their best.

    Eight tasks in ten are Gaussian processes, rough or smooth, with gently warped inputs and
    irrelevant columns, as in HEBO+ (`priors.hebo_plus`); their lengthscales are those of objectives
    that can be learned from few points, most of them longer than the box. One is an infinitely wide
    network with heavy tails, one a finite network, which are not stationary. Noise ranges from next
    to none to as much as the signal. Points lie in spaces with integers and choices, half of those
    that networks are trained on where a search for the best went (`priors.Searched`).

    Latents in `Tasks`: "noise", and "component", the index of the part.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> optimization().sample(batch=64, n=60, d=5, generator=g).y.shape
        torch.Size([64, 60])
    """
    noise = LogNormal(-5.0, 2.0)
    smooth = GaussianProcess(
        kernel=("matern32", "matern52", "rbf"),
        lengthscale=LogNormal(0.0, 1.0),
        outputscale=LogNormal(0.0, 0.5),
        noise=noise,
        ard=True,
        scale_with_dimension=True,
    )
    wide = NNGP(
        activation="erf",
        depth=(1, 2, 3),
        weight_variance=LogNormal(math.log(4.0), 0.8),
        bias_variance=LogNormal(math.log(0.5), 0.8),
        noise=noise,
    )
    network = BNN(
        width=50,
        depth=2,
        weight_variance=(*[LogNormal(math.log(4.0), 0.8)] * 2, 1.0),
        bias_variance=LogNormal(math.log(0.5), 0.8),
        noise=noise,
    )
    parts = (
        Warped(smooth, (LogNormal(0.0, 0.5), LogNormal(0.0, 0.5)), irrelevant=0.2),
        ScaleMixture(wide, InverseGamma(2.0, 2.0), scaled_noise=False),
        network,
    )
    return Mixture([Searched(part) for part in parts], (0.8, 0.1, 0.1))
