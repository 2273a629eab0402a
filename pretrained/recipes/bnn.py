"""bnn: networks of thirty tanh units whose weights are tuned to follow smooth Gaussian processes.

A functional prior: random lengthscales and variances of the process are met by random variances of
weights and hidden biases, so that functions, not weights, are what is sensible. The match was made
for one feature and holds for twelve, as weights are divided by the number of features, which
stretches lengthscales with its square root. Thirty units keep NUTS, the reference, affordable, and
they learn features: the posterior is no Gaussian process, whatever its kernel.
"""

import math

from torch.distributions import InverseGamma, LogNormal

from pfn.pretrain import PretrainConfig
from priors import BNN, GaussianProcess

target = GaussianProcess(
    kernel="rbf",
    lengthscale=LogNormal(math.log(0.5), 0.5),
    outputscale=LogNormal(0.0, 0.5),
    scale_with_dimension=True,
)
# What `match(network, target)` makes of a network with InverseGamma(3, 20) for all variances but
# that of the readout's bias, 0.01; to three digits, as the last ones depend on the machine. The
# variance of hidden biases ends at the bound of `match`, a centre of 20: NUTS dislikes steep units.
prior = BNN(
    width=30,
    depth=1,
    activation="tanh",
    weight_variance=(InverseGamma(3.56, 15.1), InverseGamma(4.03, 4.23)),
    bias_variance=(InverseGamma(2.5, 49.9), 4.55e-5),
    noise=LogNormal(-4.0, 1.0),
    inputs=("uniform", "normal", "clustered", "grid"),
)

config = PretrainConfig(
    max_features=12,
    max_context=128,
    components=8,
    expert_kernels=("rbf", "matern52"),  # functions are smooth, and some nearly steps
    least_refinements=3,  # at few points as well: most of the gap is there
    fourier_octaves=3,
    lr=5e-3,
    seconds=3900,
)
