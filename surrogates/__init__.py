"""BoTorch models and Bayesian-optimization loops on top of `pfn`; needs the extra `bo`.

What needs BoTorch and Optuna is imported when it is first asked for, so that their absence is told
with the command that mends it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surrogates.names import available as available

if TYPE_CHECKING:
    from surrogates.base import Surrogate as Surrogate
    from surrogates.fitting import fit as fit
    from surrogates.optimize import Result as Result
    from surrogates.optimize import maximize as maximize
    from surrogates.optimize import minimize as minimize
    from surrogates.sampler import PFNSampler as PFNSampler

_MODULES = {
    "Surrogate": "base",
    "fit": "fitting",
    "Result": "optimize",
    "maximize": "optimize",
    "minimize": "optimize",
    "PFNSampler": "sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'surrogates' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"surrogates.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in ("botorch", "gpytorch", "optuna", "scipy"):
            raise
        raise ModuleNotFoundError(
            f"surrogates.{name} needs {library}: pip install 'pfn[bo]'."
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
