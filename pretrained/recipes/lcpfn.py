"""lcpfn: accuracies over 100 epochs from the published prior of LC-PFN, as a test of the engine.

Its reference is a sampler that respects the hard walls of that prior, and MCMC at the published
settings. Time is a fraction of the horizon, and y is in the prior's own units, so nothing is
standardised: ask with `standardize=False`. The network is narrow, for speed. The one for real
curves is another, on `LearningCurves()`.
"""

from pfn.pretrain import PretrainConfig
from priors import LearningCurves

prior = LearningCurves.lcpfn()

config = PretrainConfig(
    causal=True,
    max_context=100,
    width=48,
    layers=3,
    heads=3,
    components=8,
    fourier_octaves=5,
    queries=128,
    tokens=4096,
    standardized_share=0.0,
    bounded_share=0.0,
    lr=2e-3,
    seconds=3600,
)
