"""curves: validation curves of trainings, of any length, alone or beside the runs of a sweep.

Time is a fraction of the planned run and y a metric in [0, 1] by the rule of `LearningCurves`, so
nothing is standardised: ask with `standardize=False`. Half of the tasks are single runs, the others
are sweeps of up to 32 runs with up to ten hyperparameters. There is no reference posterior;
calibration and real curves judge.
"""

from pfn.pretrain import PretrainConfig
from priors import LearningCurves

prior = LearningCurves(resolution=3e-4)  # finer steps of a metric than that decide nothing

config = PretrainConfig(
    causal=True,
    max_features=11,
    max_context=256,
    width=96,
    layers=4,
    heads=4,
    components=8,
    fourier_octaves=5,
    queries=128,
    tokens=4096,
    standardized_share=0.0,
    bounded_share=0.0,
    lr=2e-3,
    seconds=7200,
)
