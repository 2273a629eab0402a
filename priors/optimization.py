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

    Seven tasks in ten are Gaussian processes, rough or smooth, with warped inputs and irrelevant
    columns, as in HEBO+ (`priors.hebo_plus`); the others are infinitely wide networks with heavy
    tails and finite networks, which are not stationary. All have a concave trend of their own,
    weak or strong, as y is for maximization, and most are bent: hopeless points share a floor,
    or the best are nearly level (`priors.bends`). Noise ranges from next to none to as much
    as the signal. Points lie in spaces with integers and choices, half of those that networks are
    trained on where a search for the best went (`priors.Searched`).

    Latents in `Tasks`: "noise", and "component", the index of the part.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> optimization().sample(batch=64, n=60, d=5, generator=g).y.shape
        torch.Size([64, 60])
    """
    noise = LogNormal(-5.5, 2.0)
    smooth = GaussianProcess(
        kernel=("matern32", "matern52", "rbf"),
        lengthscale=LogNormal(math.log(0.5), 0.8),
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
        Warped(smooth, irrelevant=0.3),
        ScaleMixture(wide, InverseGamma(2.0, 2.0), scaled_noise=False),
        network,
    )
    bowl = LogNormal(math.log(0.7), 1.0)
    return Mixture([Searched(part, bowl=bowl, bent=0.7) for part in parts], (0.7, 0.15, 0.15))
