"""warped: a smooth process whose input axis is stretched by a Kumaraswamy warp of its own.

Functions that vary fast at one end and slowly at the other, which no stationary process does. The
warp's two concentrations and the noise are integrated out by quadrature.
"""

from torch.distributions import LogNormal

from pfn.pretrain import PretrainConfig
from priors import GaussianProcess, Warped

prior = Warped(
    GaussianProcess(
        kernel="matern52", lengthscale=0.25, outputscale=1.0, noise=LogNormal(-4.0, 1.0)
    )
)

config = PretrainConfig(max_features=1, max_context=64, fourier_octaves=6, lr=5e-3, seconds=300)
