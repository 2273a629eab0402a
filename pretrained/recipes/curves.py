"""curves: validation curves of trainings, alone or beside their siblings in a sweep.

Time is a fraction of the planned run and y a metric in [0, 1] by the rule of `LearningCurves`, so
nothing is standardised: ask with `standardize=False`. There is no reference posterior; calibration
and real curves judge.
"""

from pfn.pretrain import PretrainConfig
from priors import LearningCurves

prior = LearningCurves()

config = PretrainConfig(
    max_features=6,
    max_context=256,
    fourier_octaves=5,
    standardized_share=0.0,
    bounded_share=0.0,
    queries=32,
    lr=5e-3,
    seconds=3000,
)
