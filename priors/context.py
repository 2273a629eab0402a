"""Contexts and queries as people pass them, checked and brought to one shape.

Every `posterior` and `log_evidence` reads its arguments here, so that all priors accept the same
(arrays, tensors, lists; one task or a batch; (n,) where d = 1) and complain in the same words.
"""

from __future__ import annotations

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
    query = None if x_query is None else as_tensor("x_query", _match_columns(x_query, context[0]))
    if query is not None and query.dim() == 0:
        raise ValueError("Expected x_query of shape (m, d) or (m,); got a single number.")
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


def as_tensor(name: str, value: Any) -> Tensor:
    """`value` in float64 on the CPU.

    Raises:
        ValueError: if it is not numeric, or holds NaN or infinity.
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(_as_array(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Expected numeric {name} in a rectangular array; got {error}.") from error
    if tensor.is_complex():
        raise ValueError(f"Expected real numbers in {name}; got {tensor.dtype}.")
    tensor = tensor.to("cpu", torch.float64)
    if not tensor.isfinite().all():
        raise ValueError(f"Expected finite {name}; got NaN or infinity.")
    return tensor


def _as_array(value: Any) -> NDArray[np.float64]:
    """A copy of its numbers, whatever the strides, byte order or flags of `value`."""
    array = np.asarray(value)
    if array.dtype.kind == "O" and not any(isinstance(v, str | bytes) for v in array.flat):
        array = array.astype(np.float64)  # integers, booleans and floats of a frame's columns
    if value is None or array.dtype.kind not in "fiub":
        raise TypeError(f"{type(value).__name__} of {array.dtype}")
    return np.array(array, dtype=np.float64, order="C")


def _match_columns(x_query: Any, x: Any) -> Any:
    """A data frame of queries with its columns in the order of those of x; others as they are."""
    wanted, found = getattr(x, "columns", None), getattr(x_query, "columns", None)
    if wanted is None or found is None or list(wanted) == list(found):
        return x_query
    missing = [name for name in wanted if name not in list(found)]
    if missing or len(set(found)) < len(found) or len(found) != len(wanted):
        raise ValueError(
            f"Expected columns {list(wanted)} in x_query, as in x; got {list(found)}"
            + (f", without {missing}." if missing else ".")
        )
    return x_query[list(wanted)]
