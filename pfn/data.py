"""The edge where people pass data: arrays, tensors, lists and data frames become checked tensors.

Everything behind this module may assume float64 tensors of matching shapes without NaN or infinity.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from priors.context import check_finite, column_names, order_columns, to_tensor


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
    columns = column_names(context[0])
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
    x = to_tensor(x_query, "query x")
    x = order_columns(x, column_names(x_query), context.columns)
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


def check_count(value: Any, least: int, label: str) -> int:
    """A whole number of at least so many.

    Raises:
        ValueError: for another, or what is none; `label` names its unit: "draw".
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        unit = label if least == 1 else f"{label}s"
        raise ValueError(f"Expected at least {least} {unit}, a whole number; got {value!r}.")
    return int(value)
