"""BoTorch models, Bayesian-optimisation loops and learning curves on top of `pfn`. Empty so far."""
