"""gp-5d: functions of a Gaussian process whose hyperparameters are known, at up to 2000 points.

The first experiment of the paper that proposed prior-fitted networks (Müller et al., ICLR 2022,
section 5.1): up to five features, one kernel, answers beside the exact ones as the context grows.
What never varies needs no reading of the data: one expert, no refinements, one small layer. All is
in the units of the prior: pass `standardize=False`.
"""

from pfn.pretrain import PretrainConfig
from priors import GaussianProcess

prior = GaussianProcess(kernel="rbf", lengthscale=0.6, outputscale=1.0, noise=1e-4)

config = PretrainConfig(
    max_features=5,
    max_context=2000,
    width=32,
    layers=1,
    heads=4,
    components=1,
    expert_kernels=("rbf",),
    least_refinements=0,
    refinements=0,
    standardized_share=0.0,
    bounded_share=0.0,
    lr=5e-3,
    seconds=600,
)
