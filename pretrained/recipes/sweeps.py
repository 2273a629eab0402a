"""sweeps: the runs of a sweep beside each other, each with up to ten hyperparameters.

A run is read after its siblings, so that what is left of it is predicted from its own beginning and
from what runs with near hyperparameters did. It begins with the weights of `curves`, which serves
single runs; for these it is the better network, having spent all of its training on them.
"""

from pfn.pretrain import PretrainConfig
from priors import LearningCurves

prior = LearningCurves(resolution=3e-4)

config = PretrainConfig(
    causal=True,
    init="curves",
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
    bf16=False,
    lr=2e-3,
    seconds=3600,
)
