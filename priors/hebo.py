"""The HEBO+ prior of PFNs for Bayesian optimization, as published."""

from __future__ import annotations

from torch.distributions import Gamma, LogNormal

from priors.gp import GaussianProcess
from priors.warped import Warped


def hebo_plus() -> Warped:
    """A Matern-3/2 process with ARD lengthscales, warped inputs and irrelevant features.

    Lengthscales are Gamma(1.2107, 1.5212), the outputscale Gamma(0.8452, 0.3994) (shape and rate),
    the noise variance LogNormal(-4.63, 0.5). Each feature has a Kumaraswamy warp with both
    concentrations LogNormal(0, 0.75), and does not matter with probability 0.3. Inputs are uniform.
    Every task draws hyperparameters of its own; the published code shares them between tasks of a
    batch.

    With 4 d + 2 hyperparameters its posterior takes sequential Monte Carlo.

    Reference: Mueller, Feurer, Hollmann and Hutter, PFNs4BO: In-Context Learning for Bayesian
    Optimization, ICML 2023, section 4 and appendix; the kernel and its hyperpriors after Cowen-
    Rivers et al., HEBO, JAIR 74, 2022.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> hebo_plus().sample(batch=64, n=60, d=5, generator=g).latents["relevance"].shape
        torch.Size([64, 5])
    """
    base = GaussianProcess(
        kernel="matern32",
        lengthscale=Gamma(1.2107, 1.5212),
        outputscale=Gamma(0.8452, 0.3994),
        noise=LogNormal(-4.63, 0.5),
        ard=True,
    )
    return Warped(base, irrelevant=0.3)
