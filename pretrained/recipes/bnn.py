"""bnn: functions of finite Bayesian neural networks whose layers draw their own variances.

One or two features, thirty tanh units: small enough that NUTS, the reference, answers in seconds.
Hierarchical variances make some functions flat and others step-like, and unlike wide networks these
learn features: the posterior is no Gaussian process, whatever its kernel.
"""

from torch.distributions import InverseGamma, LogNormal

from pfn.pretrain import PretrainConfig
from priors import BNN

prior = BNN(
    width=30,
    depth=1,
    activation="tanh",
    weight_variance=InverseGamma(2.0, 4.0),
    bias_variance=InverseGamma(2.0, 2.0),
    noise=LogNormal(-4.0, 1.0),
    inputs=("uniform", "normal", "clustered", "grid"),
)

config = PretrainConfig(
    max_features=2,
    max_context=64,
    fourier_octaves=4,
    lr=5e-3,
    seconds=1500,
)
