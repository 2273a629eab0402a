"""What people pass to posteriors: every container gives one context, the rest is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from priors.context import read_context

X = np.arange(6.0).reshape(3, 2)
Y = np.arange(3.0)

containers: dict[str, Callable[[Any], Any]] = {
    "list": lambda values: values.tolist(),
    "float32": lambda values: values.astype(np.float32),
    "int": lambda values: values.astype(int),
    "tensor": torch.tensor,
    "frame": lambda values: pd.DataFrame(values) if values.ndim == 2 else pd.Series(values),
    "objects": lambda values: values.astype(object),
    "negative strides": lambda values: values[::-1].copy()[::-1],
}


@pytest.mark.parametrize("container", containers)
def test_every_container_gives_the_same_context(container: str) -> None:
    make = containers[container]
    context = read_context((make(X), make(Y)), make(X))
    assert not context.batched
    for tensor, values in ((context.x, X), (context.y, Y), (context.x_query, X)):
        assert tensor.dtype == torch.float64 and tensor[0].tolist() == values.tolist()


@pytest.mark.parametrize(("n", "m"), [(0, 2), (1, 2), (3, 0), (0, 0)])
def test_any_number_of_points_and_queries(n: int, m: int) -> None:
    context = read_context((np.zeros((n, 2)), np.zeros(n)), np.zeros((m, 2)))
    assert context.x.shape == (1, n, 2) and context.x_query.shape == (1, m, 2)


def test_columns_match_by_name() -> None:
    x = pd.DataFrame(X, columns=["a", "b"])
    assert read_context((x, Y), x[["b", "a"]]).x_query[0].tolist() == X.tolist()
    with pytest.raises(ValueError, match=r"query columns \['a', 'b'\]"):
        read_context((x, Y), x[["a"]])


@pytest.mark.parametrize(
    ("context", "query", "said"),
    [
        (None, X, "a pair; got NoneType"),
        ((X,), X, "a pair; got tuple"),
        ((1.0, Y), X, "x of shape .*a single number"),
        ((X, Y), 1.0, "x_query of shape .*a single number"),
        ((None, Y), X, "finite x"),
        ((X, None), X, "finite y"),
        ((X + 1j, Y), X, "x (with numbers only|as a rectangular)"),
        ((torch.zeros(3, 2, dtype=torch.complex64), Y), X, "x with real numbers"),
        ((X, ["a", "b", "c"]), X, "y with numbers only"),
        (([[1.0], [1.0, 2.0]], Y), X, "x (with numbers only|as a rectangular)"),
        ((X * np.nan, Y), X, "finite x"),
        ((X, Y[:2]), X, "Expected a context of x"),
        ((X, Y), X[:, :1], "x_query like x"),
    ],
)
def test_what_makes_no_context_is_refused(context: Any, query: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_context(context, query)
