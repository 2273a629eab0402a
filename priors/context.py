"""Contexts and queries as people pass them, checked and brought to one shape.

Every `posterior` and `log_evidence` reads its arguments here, so that all priors accept the same
(arrays, tensors, lists, data frames; one task or a batch; (n,) where d = 1) and complain in the
same words. Networks read theirs in `pfn/data.py`, by the same rules for single arrays, below.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Context(NamedTuple):
    """Data sets and queries in float64 on the CPU; `batched` if the caller passed a batch."""

    x: Tensor  # (task, point, dim)
    y: Tensor  # (task, point)
    x_query: Tensor  # (task, query, dim)
    batched: bool


def read_context(context: tuple[Any, Any], x_query: Any | None = None) -> Context:
    """The context and queries of one task or a batch, checked; without queries, m = 0.

    Args:
        context: x (n, d) or (b, n, d), or (n,) where d = 1, and y (n,) or (b, n), also with a
            trailing axis of size 1.
        x_query: (m, d), (b, m, d), or (m,) where d = 1; columns of data frames match by name.

    Raises:
        ValueError: arguments of other shapes, not numeric, or not finite.
    """
    if not isinstance(context, tuple | list) or len(context) != 2:
        raise ValueError(f"Expected context = (x, y), a pair; got {type(context).__name__}.")
    x, y = (as_tensor(name, value).detach() for name, value in zip("xy", context, strict=True))
    if x.dim() == 0:
        raise ValueError("Expected x of shape (n, d), (b, n, d) or (n,); got a single number.")
    query = None if x_query is None else as_tensor("x_query", x_query)
    if query is not None and query.dim() == 0:
        raise ValueError("Expected x_query of shape (m, d) or (m,); got a single number.")
    if query is not None:
        query = order_columns(query, column_names(x_query), column_names(context[0]))
    if query is None:
        query = x[..., :0] if x.dim() == 1 else x[..., :0, :]
    query = query.unsqueeze(-1) if query.dim() == 1 else query
    if x.dim() == 1:
        x = x.reshape(len(x), query.shape[-1] if len(x) == 0 else 1)
    if y.dim() == x.dim() and y.shape[-1] == 1:
        y = y.squeeze(-1)
    if x.dim() not in (2, 3) or y.shape != x.shape[:-1]:
        raise ValueError(
            "Expected a context of x (n, d) and y (n,), or x (b, n, d) and y (b, n); "
            f"got x {tuple(x.shape)} and y {tuple(y.shape)}."
        )
    if query.dim() != x.dim() or (query.shape[:-2], query.shape[-1]) != (x.shape[:-2], x.shape[-1]):
        raise ValueError(
            f"Expected x_query like x {tuple(x.shape)} in all but the number of points; "
            f"got {tuple(query.shape)}."
        )
    if x.dim() == 3:
        return Context(x, y, query, batched=True)
    return Context(x.unsqueeze(0), y.unsqueeze(0), query.unsqueeze(0), batched=False)


def as_tensor(label: str, value: Any) -> Tensor:
    """`value` in float64 on the CPU, finite and real; see `to_tensor` and `check_finite`."""
    tensor = to_tensor(value, label).to("cpu", torch.float64)
    check_finite(tensor, label)
    return tensor


def to_tensor(value: Any, label: str) -> Tensor:
    """A real tensor of `value`: a tensor as it is, anything else as a copy of its values."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ValueError(f"Expected {label} with real numbers; got {value.dtype}.")
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected {label} as a rectangular array; got ragged rows or no array ({error})."
        ) from error
    if array.dtype.kind == "O":
        array = _from_objects(array, label)
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"Expected {label} with numbers only; got values of type {array.dtype}. Encode"
            " categories and dates as numbers first."
        )
    too_wide = array.dtype.itemsize > 8  # long double, which torch does not know
    dtype = np.dtype(np.float64) if too_wide else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def check_finite(tensor: Tensor, label: str) -> None:
    """Raises ValueError with the count and first place of NaN or infinity."""
    if math.isfinite(tensor.sum().item()):  # which may overflow where all are finite
        return
    bad = ~torch.isfinite(tensor)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"Expected finite {label}; got {int(bad.sum())} NaN or infinite values, the first at"
            f" index {first}. Drop or impute those rows."
        )


def _from_objects(array: NDArray[Any], label: str) -> NDArray[Any]:
    """Floats from Python objects; text is refused even where it spells a number."""
    try:
        if any(isinstance(item, str | bytes) for item in array.flat):
            raise TypeError("text")
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Expected {label} with numbers only, none missing; got Python objects in an array of"
            f" shape {array.shape} ({error}). Encode categories as numbers first."
        ) from None


def column_names(value: Any) -> tuple[str, ...] | None:
    """Column names of a data frame of any library, else None."""
    columns = getattr(value, "columns", None)
    return None if columns is None or isinstance(value, Tensor) else tuple(map(str, columns))


def order_columns(
    x: Tensor, names: tuple[str, ...] | None, wanted: tuple[str, ...] | None
) -> Tensor:
    """Queries x (m, d) with columns `names` in the order of the context's, where both have names.

    Raises:
        ValueError: if the names are others than the context's.
    """
    if names is None or wanted is None or names == wanted:
        return x
    if sorted(names) != sorted(wanted) or len(set(names)) < len(names):
        raise ValueError(
            f"Expected query columns {list(wanted)} as in the context, in any order if no name"
            f" repeats; got {list(names)}."
        )
    return x[:, [names.index(name) for name in wanted]]
