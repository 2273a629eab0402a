"""matched-bnn: a small network whose weights are tuned to follow a smooth Gaussian process.

A seed decides the match, which takes seconds, so that a run that continues finds the same
variances. `priors.matching.distance` tells how close the functions are.
"""

from pfn.pretrain import PretrainConfig
from priors import BNN, GaussianProcess, match

target = GaussianProcess(kernel="rbf", lengthscale=0.3, outputscale=1.0, noise=0.02)
prior = match(BNN(width=30, depth=1, noise=0.02), target, d=1)

config = PretrainConfig(max_features=1, max_context=64, fourier_octaves=5, lr=5e-3, seconds=600)
