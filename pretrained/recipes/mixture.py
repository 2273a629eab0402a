"""mixture: straight lines, smooth functions or periodic ones, one kind for each task.

The posterior weighs the kinds by their evidence, and the network has to do so from a few points.
"""

from torch.distributions import LogNormal

from pfn.pretrain import PretrainConfig
from priors import GaussianProcess, Linear, Mixture

noise = LogNormal(-4.0, 1.0)
prior = Mixture(
    (
        Linear(weight_variance=1.0, bias_variance=1.0, noise=noise),
        GaussianProcess(lengthscale=LogNormal(-1.2, 0.5), outputscale=1.0, noise=noise),
        GaussianProcess(
            kernel="periodic", lengthscale=LogNormal(0.0, 0.5), outputscale=1.0, noise=noise
        ),
    )
)

config = PretrainConfig(max_features=1, max_context=64, fourier_octaves=5, lr=5e-3, seconds=300)
