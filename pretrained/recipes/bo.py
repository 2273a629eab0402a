"""bo: objectives of up to 20 encoded columns, seen as an optimizer sees them.

The surrogate behind `surrogates.fit("pfn", ...)` and `PFNSampler`. A one-hot choice counts as many
columns as it has values.
"""

from pfn.pretrain import PretrainConfig
from priors import optimization

prior = optimization()

# surrogates pass the bounds of the space, and y in any units: the bounded case is the usual one
config = PretrainConfig(
    max_features=20,
    max_context=256,
    standardized_share=0.8,
    bounded_share=0.6,
    lr=4e-3,
    seconds=4200,
)
