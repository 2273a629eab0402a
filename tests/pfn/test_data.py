"""Whatever holds numbers goes in; what cannot be right is refused with what, where and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pfn.data import check_context, check_query

few = settings(max_examples=40)
X = np.arange(12.0).reshape(6, 2) ** 2
Y = np.arange(6.0)


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    """The message of the ValueError, which says what was expected and what came."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.startswith("Expected ") and "got" in message
    return message


# What goes in

containers: dict[str, Callable[[Any], Any]] = {
    "array": np.asarray,
    "list": lambda values: values.tolist(),
    "tuple": lambda values: tuple(map(tuple, values)) if values.ndim == 2 else tuple(values),
    "tensor": torch.tensor,
    "frame": lambda values: pd.DataFrame(values) if values.ndim == 2 else pd.Series(values),
    "objects": lambda values: values.astype(object),
    "fortran": np.asfortranarray,
    "reversed view": lambda values: values[::-1].copy()[::-1],
    "other byte order": lambda values: values.astype(">f8"),
    "long double": lambda values: values.astype(np.longdouble),
    "list of tensors": lambda values: [torch.tensor(row) for row in values],
}


@pytest.mark.parametrize("container", containers)
def test_every_container_gives_the_same_context(container: str) -> None:
    make = containers[container]
    context = check_context((make(X), make(Y)))
    assert not context.batched
    torch.testing.assert_close(context.x, torch.tensor(X).unsqueeze(0), rtol=0, atol=0)
    torch.testing.assert_close(context.y, torch.tensor(Y).unsqueeze(0), rtol=0, atol=0)


@few
@given(
    kind=st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "?"]),
    data=st.data(),
)
def test_every_number_type_keeps_its_values(kind: str, data: st.DataObject) -> None:
    numbers = {} if kind[0] in "iu?" else {"allow_nan": False, "allow_infinity": False}
    x = data.draw(hnp.arrays(kind, (3, 2), elements=numbers))
    context = check_context((x, x[:, 0]))
    assert context.x.dtype == context.y.dtype == torch.float64
    assert np.array_equal(context.x[0].numpy(), x.astype(np.float64))


@pytest.mark.parametrize(
    ("x_shape", "y_shape", "shape", "batched"),
    [
        ((6, 2), (6,), (1, 6, 2), False),
        ((6, 2), (6, 1), (1, 6, 2), False),
        ((6,), (6,), (1, 6, 1), False),
        ((6,), (6, 1), (1, 6, 1), False),
        ((6, 1), (6, 1), (1, 6, 1), False),
        ((1, 2), (1,), (1, 1, 2), False),
        ((0, 2), (0,), (1, 0, 2), False),
        ((0,), (0,), (1, 0, 1), False),
        ((4, 6, 2), (4, 6), (4, 6, 2), True),
        ((4, 6, 2), (4, 6, 1), (4, 6, 2), True),
        ((6, 6, 1), (6, 6), (6, 6, 1), True),
        ((4, 0, 2), (4, 0), (4, 0, 2), True),
    ],
)
def test_shapes_of_a_context(
    x_shape: tuple[int, ...],
    y_shape: tuple[int, ...],
    shape: tuple[int, ...],
    batched: bool,
) -> None:
    context = check_context((np.zeros(x_shape), np.zeros(y_shape)))
    assert context.x.shape == shape and context.y.shape == shape[:2]
    assert context.batched is batched


def test_the_callers_array_is_copied() -> None:
    x = X.copy()
    context = check_context((x, Y))
    x[:] = 0
    assert torch.equal(context.x[0], torch.tensor(X))


@pytest.mark.parametrize(
    ("query", "dtype"),
    [
        (np.zeros((3, 2)), torch.float64),
        (np.zeros((3, 2), np.float32), torch.float32),
        (np.zeros((3, 2), np.float16), torch.float16),
        (np.zeros((3, 2), np.int64), torch.float32),
        (np.zeros((3, 2), bool), torch.float32),
        (torch.zeros(3, 2), torch.float32),
        (torch.zeros(3, 2, dtype=torch.bfloat16), torch.bfloat16),
        (torch.zeros(3, 2, dtype=torch.int32), torch.float32),
        ([[0, 1]], torch.float32),
        ([[0.0, 1]], torch.float64),
        (pd.DataFrame({"a": [1], "b": [0.5]}), torch.float64),
    ],
)
def test_answers_come_in_the_floating_dtype_of_the_query(query: Any, dtype: torch.dtype) -> None:
    x, found = check_query(query, check_context((X, Y)))
    assert found == dtype and x.dtype == torch.float64 and x.shape[::2] == (1, 2)


def test_columns_match_by_name() -> None:
    context = check_context((pd.DataFrame(X, columns=["a", "b"]), Y))
    swapped = pd.DataFrame(X[:, ::-1], columns=["b", "a"])
    assert torch.equal(check_query(swapped, context)[0], context.x)
    assert torch.equal(check_query(X, context)[0], context.x)  # no names, so by position
    message = refusal(check_query, swapped.rename(columns={"a": "c"}), context)
    assert "['a', 'b']" in message and "['b', 'c']" in message
    refusal(check_query, swapped[["a"]], context)
    refusal(check_query, swapped.assign(c=0.0), context)


def test_columns_match_by_name_where_names_are_numbers() -> None:
    context = check_context((pd.DataFrame(X, columns=[2020, 2021]), Y))
    swapped = pd.DataFrame(X[:, ::-1], columns=[2021, 2020])
    assert torch.equal(check_query(swapped, context)[0], context.x)


def test_repeated_names_match_in_their_order_or_not_at_all() -> None:
    x = np.arange(18.0).reshape(6, 3)
    context = check_context((pd.DataFrame(x, columns=["a", "a", "b"]), Y))
    assert torch.equal(context.x[0], torch.tensor(x))
    same = pd.DataFrame(x, columns=["a", "a", "b"])
    assert torch.equal(check_query(same, context)[0], context.x)
    refusal(check_query, pd.DataFrame(x, columns=["a", "b", "a"]), context)


def test_frames_of_mixed_number_types() -> None:
    frame = pd.DataFrame(
        {
            "float": [0.5, 1.5],
            "bool": [True, False],
            "int": pd.array([1, 2], dtype="Int64"),
            "code": pd.Categorical([3, 4]),
        }
    )
    context = check_context((frame, [1, 2]))
    assert context.x.tolist() == [[[0.5, 1, 1, 3], [1.5, 0, 2, 4]]]


# What is refused


@few
@given(
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    place=st.tuples(st.integers(0, 5), st.integers(0, 1)),
    part=st.sampled_from(["context x", "context y", "query x"]),
)
def test_nan_and_infinity_are_named_and_placed(
    bad: float, place: tuple[int, int], part: str
) -> None:
    x, y, x_query = X.copy(), Y.copy(), X.copy()
    if part == "context y":
        y[place[0]] = bad
        message = refusal(check_context, (x, y))
    elif part == "context x":
        x[place] = bad
        message = refusal(check_context, (x, y))
    else:
        x_query[place] = bad
        message = refusal(check_query, x_query, check_context((x, y)))
    index = (place[0],) if part == "context y" else place
    assert f"finite {part}; got 1" in message and f"index {index}" in message


@few
@given(
    x_shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
    y_shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
def test_shapes_either_match_or_are_refused(
    x_shape: tuple[int, ...], y_shape: tuple[int, ...]
) -> None:
    x_shape_2d = (*x_shape, 1) if len(x_shape) == 1 else x_shape
    fits = y_shape in (x_shape_2d[:-1], (*x_shape_2d[:-1], 1)) and x_shape_2d[-1] > 0
    context = (np.zeros(x_shape), np.zeros(y_shape))
    if fits:
        assert check_context(context).y.shape[-1] == x_shape_2d[-2]
    else:
        message = refusal(check_context, context)
        assert str(x_shape_2d if x_shape_2d[-1] == 0 else y_shape) in message


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4), (6, 0)])
def test_context_x_of_impossible_shape_is_refused(shape: tuple[int, ...]) -> None:
    assert "context x of shape (n, d)" in refusal(check_context, (np.zeros(shape), Y))


@few
@given(shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
def test_queries_that_do_not_fit_the_context_are_refused(shape: tuple[int, ...]) -> None:
    query = np.zeros(shape)
    for context_shape in ((6, 2), (6, 1), (3, 6, 2)):
        context = check_context((np.zeros(context_shape), np.zeros(context_shape[:-1])))
        *batch, _, d = context_shape
        as_points = (*shape, 1) if len(shape) == 1 and (*batch, d) == (1,) else shape
        fits = len(as_points) == len(context_shape) and as_points[-1] == d
        if fits and list(as_points[:-2]) == batch:
            assert check_query(query, context)[0].shape[1:] == as_points[-2:]
        else:
            message = refusal(check_query, query, context)
            assert "query x of shape" in message and str(shape) in message


@pytest.mark.parametrize(
    ("context", "said"),
    [
        (None, "NoneType"),
        (X, "ndarray of length 6"),
        ((X,), "tuple of length 1"),
        ((X, Y, Y), "tuple of length 3"),
        ({"x": X, "y": Y}, "dict of length 2"),
    ],
)
def test_a_context_that_is_no_pair_is_refused(context: Any, said: str) -> None:
    message = refusal(check_context, context)
    assert "context = (x, y), a pair" in message and said in message


class Unreadable:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("no array here")


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0], [3.0]],
        [[1.0], [[2.0]]],
        [["a", "b"], ["c", "d"]],
        [["1", "2"], ["3", "4"]],
        [[1.0, "2"], [3.0, "4"]],
        np.array([[1.0, "2"]], dtype=object),
        np.array([["2020-01-01"]], dtype="datetime64[D]"),
        np.array([[1 + 2j]]),
        torch.ones(2, 1, dtype=torch.complex64),
        [torch.ones(2, requires_grad=True), torch.ones(2)],
        [[10**400]],
        [[{}]],
        {1, 2},
        "text",
        b"text",
        None,
        len,
        Unreadable(),
        pd.DataFrame({"a": ["u", "v"]}),
        pd.DataFrame({"a": ["1", "2"]}),
        pd.DataFrame({"a": [1.0, 2.0], "b": pd.Categorical(["u", "v"])}),
        pd.DataFrame({"a": [1.0, 2.0], "b": pd.to_datetime(["2020-01-01", "2020-01-02"])}),
    ],
    ids=lambda values: type(values).__name__,
)
def test_what_holds_no_numbers_is_refused_wherever_it_comes(values: Any) -> None:
    assert "context x" in refusal(check_context, (values, Y))
    assert "context y" in refusal(check_context, (X, values))
    assert "query x" in refusal(check_query, values, check_context((X, Y)))


@pytest.mark.parametrize(
    "values", [pd.array([1, None], dtype="Int64"), [1.0, None], [pd.NA, 1.0]], ids=repr
)
def test_missing_values_are_refused(values: Any) -> None:
    refusal(check_context, (pd.DataFrame({"a": values}), [1, 2]))
    refusal(check_context, ([1, 2], pd.Series(values)))
