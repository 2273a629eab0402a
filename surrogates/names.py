"""The names of surrogates, which need no library to be told."""

from __future__ import annotations

FITS = {  # where each is: imported when it is used
    "pfn": "prior_fitted.fit_pfn",
    "gp": "gaussian_processes.fit_gp",
    "dkl": "gaussian_processes.fit_dkl",
    "hmc-bnn": "bayesian_networks.fit_hmc_bnn",
    "sghmc-bnn": "bayesian_networks.fit_sghmc_bnn",
    "ensemble": "bayesian_networks.fit_ensemble",
    "laplace-bnn": "bayesian_networks.fit_laplace_bnn",
    "ibnn": "gaussian_processes.fit_ibnn",
    "stp": "gaussian_processes.fit_stp",
}
EXTRAS = {"hmc-bnn": ("numpyro", "reference")}  # a library beyond the extra bo, and its extra
SAMPLERS = ("random", "sobol")


def available() -> list[str]:
    """The names of all surrogates, and of the samplers that need none."""
    return [*FITS, *SAMPLERS]
