"""lcpfn: accuracies over 100 epochs from the published prior of LC-PFN, as a test of the engine.

Its reference is a sampler that respects the hard walls of that prior. Time is a fraction of the
horizon, and y is in the prior's own units, so nothing is standardised: ask with
`standardize=False`. The network for real curves is another, on `LearningCurves()`.
"""

from pfn.pretrain import PretrainConfig
from priors import LearningCurves

prior = LearningCurves.lcpfn()

config = PretrainConfig(
    max_features=1,
    max_context=100,
    fourier_octaves=5,
    standardized_share=0.0,
    bounded_share=0.0,
    queries=32,
    lr=5e-3,
    seconds=1500,
)
