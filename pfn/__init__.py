"""Prior-fitted networks: a posterior in one forward pass, with a certificate of how good it is.

Names are imported on first use, so that `pfn --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pfn.card import ModelCard as ModelCard
    from pfn.comparison import Comparison as Comparison
    from pfn.conflict import Check as Check
    from pfn.library import compare as compare
    from pfn.library import load as load
    from pfn.library import models as models
    from pfn.library import predict as predict
    from pfn.model import PFN as PFN
    from pfn.model import Fitted as Fitted
    from pfn.predictive import Predictive as Predictive

_HOME = {
    "Check": "pfn.conflict",
    "Comparison": "pfn.comparison",
    "ModelCard": "pfn.card",
    "compare": "pfn.library",
    "load": "pfn.library",
    "models": "pfn.library",
    "predict": "pfn.library",
    "PFN": "pfn.model",
    "Fitted": "pfn.model",
    "Predictive": "pfn.predictive",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pfn' has no attribute {name!r}; it offers {__all__}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
