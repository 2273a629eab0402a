"""Surrogates by name: `fit("pfn", X, Y)` and its rivals, each a BoTorch model.

All see the unit cube, into which the bounds are mapped. Read `prior_fitted.py` for the network,
`gaussian_processes.py` and `bayesian_networks.py` for the others.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import Model, ModelList
from botorch.models.model_list_gp_regression import ModelListGP
from botorch.models.transforms.input import Normalize
from torch import Tensor

from priors.context import check_finite, to_tensor
from surrogates.names import EXTRAS, FITS, SAMPLERS


def fit(
    name: str,
    X: Any,
    Y: Any,
    Yvar: Any = None,
    *,
    bounds: Any = None,
    seed: int = 0,
    input_transform: Any = None,
    outcome_transform: Any = None,
    **options: Any,
) -> Model:
    """A BoTorch model of Y, for maximization.

    Args:
        name: one of `available()` but "random" and "sobol", which only sample.
        X: (n, d).
        Y: (n, m), or (n,) for one output; of several outputs each gets a model.
        Yvar: like Y, the known variances of the noise; otherwise noise is inferred.
        bounds: (2, d), the box that becomes the unit cube; by default the unit cube itself if all
            of X lies in it, else the range of X.
        seed: of all that is random in the fit.
        input_transform: a BoTorch transform instead of the map of the bounds.
        outcome_transform: a BoTorch transform of Y; by default each surrogate standardises.
        options: of the surrogate, the keyword arguments of its function, such as
            `surrogates.prior_fitted.fit_pfn`; `surrogates.names.FITS` says where each is.

    Returns:
        A model in float64; a `ModelListGP` or `ModelList` for m > 1.

    Raises:
        ValueError: an unknown name or option, or data of other shapes, not finite, or out of order.
        ModuleNotFoundError: a missing extra, with its installation.

    Example:
        >>> import torch
        >>> X = torch.rand(10, 2, dtype=torch.float64)
        >>> fit("pfn", X, X.sum(-1)).posterior(X[:3]).mean.shape
        torch.Size([3, 1])
    """
    if name in SAMPLERS:
        raise ValueError(f"Expected a surrogate; {name} only samples. Choose among {[*FITS]}.")
    if name not in FITS:
        raise ValueError(f"Expected a surrogate among {[*FITS]}; got {name!r}.")
    X, Y, Yvar = _check(X, Y, Yvar)
    if input_transform is None:
        input_transform = Normalize(X.shape[-1], bounds=_bounds(bounds, X))
    elif bounds is not None:
        raise ValueError("Expected bounds or an input_transform, not both.")
    fit_one = find_fit(name)
    check_options(name, options)
    models = [
        fit_one(
            X,
            Y[:, i : i + 1],
            None if Yvar is None else Yvar[:, i : i + 1],
            input_transform=copy.deepcopy(input_transform),
            outcome_transform=copy.deepcopy(outcome_transform),  # it learns from each output
            seed=seed + i,
            **options,
        )
        for i in range(Y.shape[1])
    ]
    if len(models) == 1:
        return models[0]
    together = ModelListGP if all(isinstance(m, GPyTorchModel) for m in models) else ModelList
    return together(*models)


def find_fit(name: str) -> Callable[..., Any]:
    """The function in `FITS`, which fits one output.

    Raises:
        ModuleNotFoundError: a missing extra, with its installation.
    """
    library, extra = EXTRAS.get(name, ("botorch", "bo"))
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(
            f"The surrogate {name} needs {library}: pip install 'pfn[{extra}]'."
        )
    module, function = FITS[name].split(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"surrogates.{module}"), function)
    return found


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuses options that `fit` would not pass to the surrogate; a sampler has none.

    Raises:
        ValueError: an option that is not among those that it lists.
        ModuleNotFoundError: a missing extra, with its installation.
    """
    known = []
    if name not in SAMPLERS:
        parameters = inspect.signature(find_fit(name)).parameters.values()
        known = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != "seed"]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"Expected options of {name!r} among {known}; got {unknown}.")


def _check(X: Any, Y: Any, Yvar: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """X (n, d), Y and Yvar (n, m) in float64."""
    given = {"X": X, "Y": Y} | ({} if Yvar is None else {"Yvar": Yvar})
    tensors = {}
    for label, value in given.items():
        tensor = to_tensor(value, label).double()
        check_finite(tensor, label)
        tensors[label] = tensor.unsqueeze(-1) if tensor.dim() == 1 and label != "X" else tensor
    x, y, variance = tensors["X"], tensors["Y"], tensors.get("Yvar")
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not (x.shape[1] and y.shape[1]):
        raise ValueError(
            f"Expected X (n, d) and Y (n, m) or (n,); got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if variance is not None and (variance.shape != y.shape or not bool((variance > 0).all())):
        raise ValueError(
            f"Expected positive Yvar of Y's shape {tuple(y.shape)}; got {tuple(variance.shape)}"
            f" from {float(variance.min()):g}."
        )
    return x, y, variance


def _bounds(bounds: Any, X: Tensor) -> Tensor:
    """The box (2, d) that becomes the unit cube."""
    d = X.shape[1]
    if bounds is None:
        unit = torch.tensor([[0.0] * d, [1.0] * d], dtype=torch.float64)
        if not len(X) or bool(((X >= 0) & (X <= 1)).all()):
            return unit
        low, high = X.aminmax(dim=0)
        constant = high <= low
        return torch.stack([low - 0.5 * constant, high + 0.5 * constant])
    box = to_tensor(bounds, "bounds").double()
    check_finite(box, "bounds")
    if box.shape != (2, d) or not bool((box[0] < box[1]).all()):
        raise ValueError(
            f"Expected bounds of shape (2, {d}), lower ends below upper ends; "
            f"got shape {tuple(box.shape)}."
        )
    return box
