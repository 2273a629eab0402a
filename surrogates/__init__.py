"""BoTorch models, Bayesian-optimization loops and learning curves on top of `pfn`.

What needs another library is imported when it is first asked for, so that its absence is told with
the command that mends it: the extra `bo` for models and loops; curves need none, their plugs each
the library that they plug into.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surrogates.names import available as available

if TYPE_CHECKING:
    from surrogates.base import Surrogate as Surrogate
    from surrogates.curve_posterior import Curve as Curve
    from surrogates.extrapolation import Sibling as Sibling
    from surrogates.extrapolation import extrapolate as extrapolate
    from surrogates.fitting import fit as fit
    from surrogates.keras_callback import KerasCurveStopping as KerasCurveStopping
    from surrogates.lightning_callback import CurveStopping as CurveStopping
    from surrogates.optimize import Result as Result
    from surrogates.optimize import maximize as maximize
    from surrogates.optimize import minimize as minimize
    from surrogates.pruning import CurvePruner as CurvePruner
    from surrogates.ray_scheduler import CurveScheduler as CurveScheduler
    from surrogates.sampler import PFNSampler as PFNSampler
    from surrogates.stopping import Decision as Decision
    from surrogates.stopping import StopRule as StopRule
    from surrogates.trainer_callback import TrainerCurveStopping as TrainerCurveStopping

_MODULES = {
    "Surrogate": "base",
    "fit": "fitting",
    "Result": "optimize",
    "maximize": "optimize",
    "minimize": "optimize",
    "PFNSampler": "sampler",
    "Curve": "curve_posterior",
    "Sibling": "extrapolation",
    "extrapolate": "extrapolation",
    "Decision": "stopping",
    "StopRule": "stopping",
    "CurvePruner": "pruning",
    "CurveStopping": "lightning_callback",
    "KerasCurveStopping": "keras_callback",
    "TrainerCurveStopping": "trainer_callback",
    "CurveScheduler": "ray_scheduler",
}
_EXTRAS = {  # what installs a library that is not in everyone's way
    "botorch": "pfn[bo]",
    "gpytorch": "pfn[bo]",
    "scipy": "pfn[bo]",
    "optuna": "pfn[bo]",
    "lightning": "lightning",
    "keras": "keras",
    "transformers": "transformers",
    "ray": "ray[tune]",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'surrogates' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"surrogates.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        raise ModuleNotFoundError(
            f"surrogates.{name} needs {library}: pip install '{_EXTRAS[library]}'."
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
