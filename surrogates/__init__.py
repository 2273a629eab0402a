"""BoTorch models and Bayesian-optimization loops on top of `pfn`; needs the extra `bo`."""

from surrogates.base import Surrogate as Surrogate
from surrogates.fitting import available as available
from surrogates.fitting import fit as fit
from surrogates.optimize import Result as Result
from surrogates.optimize import maximize as maximize
from surrogates.optimize import minimize as minimize
from surrogates.sampler import PFNSampler as PFNSampler
