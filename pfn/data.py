"""The edge where people pass data: arrays, tensors, lists and data frames become checked tensors.

Everything behind this module may assume float64 tensors of matching shapes without NaN or infinity.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Context(NamedTuple):
    """A checked context in float64."""

    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    batched: bool  # whether the user passed the leading axis
    columns: tuple[str, ...] | None  # names, where x was a data frame


def check_context(context: Any) -> Context:
    """The checked context of a pair (x, y).

    Args:
        context: x (n, d), (b, n, d), or (n,) for d = 1; y (n,) or (b, n), with or without a
            trailing 1.

    Raises:
        ValueError: naming the argument, what it was, and what was expected.
    """
    if not isinstance(context, tuple | list) or len(context) != 2:
        raise ValueError(
            f"Expected context = (x, y), a pair; got {type(context).__name__}"
            + (f" of length {len(context)}." if hasattr(context, "__len__") else ".")
        )
    columns = _columns(context[0])
    x, y = to_tensor(context[0], "context x"), to_tensor(context[1], "context y")
    if x.ndim == 1:
        x = x.unsqueeze(-1)
    if x.ndim not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(
            "Expected context x of shape (n, d), (b, n, d) or (n,), with at least one feature; got"
            f" shape {tuple(x.shape)}."
        )
    if y.ndim == x.ndim and y.shape[-1] == 1 and y.shape[-2] == x.shape[-2]:
        y = y.squeeze(-1)
    if y.shape != x.shape[:-1]:
        raise ValueError(
            f"Expected context y of shape {tuple(x.shape[:-1])}, one target per row of x with shape"
            f" {tuple(x.shape)}; got {tuple(y.shape)}."
        )
    check_finite(x, "context x")
    check_finite(y, "context y")
    batched = x.ndim == 3
    if not batched:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    return Context(x.double(), y.double(), batched, columns)


def check_query(x_query: Any, context: Context) -> tuple[Tensor, torch.dtype]:
    """The query (b, m, d) in float64, and the floating dtype that answers come out in.

    Raises:
        ValueError: naming what the query was and what the context lets expect.
    """
    x, names = to_tensor(x_query, "query x"), _columns(x_query)
    if names is not None and context.columns is not None and names != context.columns:
        if sorted(names) != sorted(context.columns) or len(set(names)) < len(names):
            raise ValueError(
                f"Expected query columns {list(context.columns)} as in the context, in any order if"
                f" no name repeats; got {list(names)}."
            )
        x = x[:, [names.index(name) for name in context.columns]]
    dtype = x.dtype if x.is_floating_point() else torch.float32
    d = context.x.shape[-1]
    if x.ndim == 1:
        if d != 1 or context.batched:
            raise ValueError(
                f"Expected query x of shape {'(b, m, d)' if context.batched else '(m, d)'} with d ="
                f" {d} features like the context; got shape {tuple(x.shape)}."
            )
        x = x.unsqueeze(-1)
    expected = 3 if context.batched else 2
    if x.ndim != expected or x.shape[-1] != d or (context.batched and len(x) != len(context.x)):
        shape = f"({len(context.x)}, m, {d})" if context.batched else f"(m, {d})"
        raise ValueError(
            f"Expected query x of shape {shape} to match context x with shape"
            f" {tuple(context.x.shape if context.batched else context.x.shape[1:])};"
            f" got {tuple(x.shape)}."
        )
    check_finite(x, "query x")
    return (x if context.batched else x.unsqueeze(0)).double(), dtype


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


def _columns(value: Any) -> tuple[str, ...] | None:
    """Column names of a data frame of any library, else None."""
    columns = getattr(value, "columns", None)
    return None if columns is None or isinstance(value, Tensor) else tuple(map(str, columns))
