"""A scikit-learn regressor whose fit stores the data and whose predictions are a posterior.

It computes in float64: scikit-learn expects a row's prediction to be the same to seven digits
whatever rows come with it, where float32 keeps about six.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pfn.library import choose_for
from pfn.model import PFN
from pfn.predictive import Predictive

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "PFNRegressor needs scikit-learn >= 1.6: pip install 'pfn[sklearn]'."
    ) from error

if TYPE_CHECKING:
    from numpy.random import RandomState

Array = NDArray[np.float64]


COMPARED = 256  # rows that "best" compares models on, at most


class PFNRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Regression by the posterior predictive: `fit` encodes the data, with nothing to optimise.

    Args:
        model: a shipped name, a checkpoint's folder, a PFN, "auto" or "best", as in `pfn.predict`.
        standardize: maps X and y to the units of the prior, and answers back.
        random_state: draws the rows that are kept, 4 times the trained context size, where there
            are more of them.

    Attributes:
        fitted_: the `pfn.Fitted` behind the predictions, which has `latents()` and the function
            without noise.

    Example:
        >>> X = np.linspace(0, 1, 20)[:, None]
        >>> PFNRegressor().fit(X, np.sin(6 * X[:, 0])).predict([[0.5]], return_std=True)[1].shape
        (1,)
    """

    def __init__(
        self,
        model: str | Path | PFN = "auto",
        *,
        standardize: bool = True,
        random_state: int | RandomState | None = None,
    ) -> None:
        self.model = model
        self.standardize = standardize
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> PFNRegressor:
        """The regressor itself, conditioned on X (n, d) and y (n,).

        Raises:
            ValueError: on bad data, or more features than the model was trained for.
        """
        X, y = validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        rows = check_random_state(self.random_state).permutation(len(X))
        some = rows[:COMPARED] if len(X) > COMPARED else slice(None)
        network = choose_for((X[some], y[some]), self.model, standardize=self.standardize)
        limit = 4 * network.card.max_context
        if len(X) > limit:
            X, y = X[rows[:limit]], y[rows[:limit]]
        double = PFN(deepcopy(network.transformer).double(), network.card, network.prior)
        self.fitted_ = double.condition((X, y), standardize=self.standardize)
        return self

    def predict(
        self, X: Any, return_std: bool = False, quantiles: Sequence[float] | None = None
    ) -> Array | tuple[Array, Array]:
        """The predictive mean (m,) at X (m, d).

        Args:
            return_std: also returns the standard deviation (m,) of a new observation.
            quantiles: probabilities in (0, 1); returns these quantiles (m, len(quantiles)) instead.

        Raises:
            ValueError: if both are asked for.
        """
        if quantiles is None:
            posterior = self.predictive(X)
            mean = posterior.mean.numpy()
            return (mean, posterior.stddev.numpy()) if return_std else mean
        if return_std:
            raise ValueError("Expected return_std or quantiles, one of them; got both.")
        posterior = self.predictive(X)
        columns: list[Any] = [posterior.icdf(p).numpy() for p in quantiles]
        return np.stack(columns, axis=1)

    def predictive(self, X: Any) -> Predictive:
        """The whole predictive distribution at X (m, d), of batch_shape (m,)."""
        check_is_fitted(self)
        return self.fitted_.predict(validate_data(self, X, reset=False, dtype=np.float64))
