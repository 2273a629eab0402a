"""linear: Bayesian ridge regression with unknown variances, one to five features.

The easiest prior there is: five numbers say everything about a function, and the reference is exact
at any size.
"""

from pfn.pretrain import PretrainConfig
from priors import Linear

prior = Linear(inputs=("uniform", "normal", "clustered", "grid"))

config = PretrainConfig(
    max_features=5,
    max_context=64,
    expert_kernels=("plane",),  # of data that are no plane, its evidence is small, too
    lr=5e-3,
    seconds=480,
)
