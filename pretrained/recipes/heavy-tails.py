"""heavy-tails: functions of infinitely wide ReLU networks, each with a random scale of its own.

A Student-t process of three degrees of freedom: most functions are modest, a few are huge, and the
network has to tell from the context which it is looking at. Noise keeps its own scale, as a sensor
does. Scaling weights of a ReLU network scales its function, so the scale is left to the mixture.
"""

import math

from torch.distributions import InverseGamma, LogNormal

from pfn.pretrain import PretrainConfig
from priors import NNGP, ScaleMixture

prior = ScaleMixture(
    NNGP(
        activation="relu",
        depth=(1, 3),  # deeper ones bend more sharply, and forget directions
        weight_variance=2.0,  # keeps the variance from layer to layer
        bias_variance=LogNormal(math.log(0.3), 1.0),
        noise=LogNormal(-4.0, 1.5),
        inputs=("uniform", "normal", "clustered", "grid"),
    ),
    InverseGamma(1.5, 1.0),
    scaled_noise=False,
)

config = PretrainConfig(
    max_features=12,
    max_context=128,
    components=8,
    least_refinements=3,  # at few points as well: most of the gap is there
    fourier_octaves=3,
    lr=5e-3,
    seconds=4600,
)
