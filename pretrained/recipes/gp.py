"""gp: functions of 1 to 12 features, each feature with its own relevance; the default model.

Three kernels from rough to smooth, lengthscales that grow with the square root of the number of
features so that many features stay learnable, and a long tail of lengthscales that switches
features off. Noise from almost none to half of the variance, as real tables have it.
"""

import math

from torch.distributions import LogNormal

from pfn.pretrain import PretrainConfig
from priors import GaussianProcess

prior = GaussianProcess(
    kernel=("rbf", "matern52", "matern32"),
    lengthscale=LogNormal(math.log(0.5), 1.0),
    outputscale=LogNormal(0.5, 0.8),  # above 1: long lengthscales spend variance on the constant
    noise=LogNormal(-4.0, 1.5),
    ard=True,
    scale_with_dimension=True,
    inputs=("uniform", "normal", "clustered", "grid"),
)

config = PretrainConfig(
    max_features=12,
    max_context=256,
    fourier_octaves=3,
    lr=5e-3,
    seconds=4000,
)
