"""hebo-plus: the prior of PFNs4BO, for objectives of up to six hyperparameters.

Matern-3/2 functions with warped inputs, some of them irrelevant. Its reference is sequential Monte
Carlo over 4 d + 2 hyperparameters, minutes for each task.
"""

from pfn.pretrain import PretrainConfig
from priors import hebo_plus

prior = hebo_plus()

config = PretrainConfig(max_features=6, max_context=64, lr=5e-3, seconds=1500)
