import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_diabetes
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pfn
from pfn.library import load
from pfn.sklearn import PFNRegressor


@parametrize_with_checks([PFNRegressor()])
def test_scikit_learn_checks(estimator: PFNRegressor, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks warn on purpose
        check(estimator)


def test_predictions_are_those_of_the_library_to_float32() -> None:
    rng = np.random.default_rng(0)
    X, y, X_query = rng.uniform(size=(40, 2)), rng.normal(size=40), rng.uniform(size=(5, 2))
    posterior = pfn.predict((X, y), X_query)
    regressor = PFNRegressor().fit(X, y)
    mean, std = regressor.predict(X_query, return_std=True)
    quantiles = regressor.predict(X_query, quantiles=(0.05, 0.5))
    assert quantiles.shape == (5, 2)
    for found, expected in (
        (mean, posterior.mean),
        (std, posterior.stddev),
        (quantiles[:, 0], posterior.icdf(0.05)),
        (regressor.predictive(X_query).variance, posterior.variance),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_return_std_and_quantiles_exclude_each_other(untrained: Path) -> None:
    regressor = PFNRegressor(model=untrained).fit([[0.0], [1.0]], [0.0, 1.0])
    with pytest.raises(ValueError, match="one of them"):
        regressor.predict([[0.5]], return_std=True, quantiles=[0.5])


def test_it_serves_in_pipelines_and_cross_validation() -> None:
    X, y = load_diabetes(return_X_y=True)
    scores = cross_val_score(make_pipeline(StandardScaler(), PFNRegressor()), X[:200], y[:200])
    assert scores.mean() > 0.2  # 0 predicts the mean; linear models reach about 0.4


def test_a_large_table_keeps_a_random_subset_with_a_seed(untrained: Path) -> None:
    limit = 4 * load(untrained).card.max_context
    rng = np.random.default_rng(0)
    X, y = rng.uniform(size=(limit + 50, 2)), rng.normal(size=limit + 50)

    def kept(seed: int) -> np.ndarray:
        with pytest.warns(UserWarning, match="trained up to"):
            regressor = PFNRegressor(model=untrained, random_state=seed).fit(X, y)
        return np.asarray(regressor.fitted_.context.x[0])

    assert kept(0).shape == (limit, 2)
    np.testing.assert_array_equal(kept(0), kept(0))
    assert not np.array_equal(kept(0), kept(1))
    assert len(np.unique(kept(0)[:, 0])) == limit  # without repetition
