"""gp-1d: functions of one feature, smooth, with unknown lengthscale, variance and noise.

The checkpoint that proves the engine: three hyperparameters can be integrated out by quadrature, so
its certificate compares with an exact posterior.
"""

import math

from torch.distributions import LogNormal

from pfn.pretrain import PretrainConfig
from priors import GaussianProcess

prior = GaussianProcess(
    kernel="rbf",
    lengthscale=LogNormal(math.log(0.3), 0.8),  # 0.08 to 1.1 of the box in nine of ten tasks
    outputscale=LogNormal(0.25, 0.6),
    noise=LogNormal(-4.0, 1.5),  # noise from 4 % to 50 % of a standard deviation
    inputs=("uniform", "normal", "clustered", "grid"),
)

config = PretrainConfig(
    max_features=1,
    max_context=256,
    width=128,
    heads=8,
    layers=3,
    components=9,
    expert_kernels=("rbf",),
    least_refinements=3,
    fourier_octaves=6,  # the shortest period is 1/16 of the box
    buffer_share=0.5,  # joint draws and extended contexts lean on it
    lr=5e-3,
    seconds=3300,
)
