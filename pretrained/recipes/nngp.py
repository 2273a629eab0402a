"""nngp: infinitely wide networks with erf units, shallow and deep, of one to three features.

Weight and bias variances are unknown: small ones make functions nearly linear, large ones steps.
With three hyperparameters and two depths, quadrature is the reference.
"""

import math

from torch.distributions import LogNormal

from pfn.pretrain import PretrainConfig
from priors import NNGP

prior = NNGP(
    activation="erf",
    depth=(1, 3),
    weight_variance=LogNormal(math.log(3.0), 0.7),
    bias_variance=LogNormal(math.log(0.3), 0.7),
    noise=LogNormal(-4.0, 1.5),
    inputs=("uniform", "normal", "clustered", "grid"),
)

config = PretrainConfig(max_features=3, max_context=64, lr=5e-3, seconds=300)
