"""Contexts and queries as people pass them, checked and brought to one shape.

Every `posterior` and `log_evidence` reads its arguments here, so that all priors accept the same
(arrays, tensors, lists; one task or a batch; (n,) where d = 1) and complain in the same words.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
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
        x_query: (m, d), (b, m, d), or (m,) where d = 1.

    Raises:
        ValueError: arguments of other shapes, not numeric, or not finite.
    """
    x, y = (
        as_tensor(name, value).detach() for name, value in zip(("x", "y"), context, strict=True)
    )
    query = None if x_query is None else as_tensor("x_query", x_query)
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
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected numeric {name} in a rectangular array; {error}.") from error
    tensor = tensor.to("cpu", torch.float64)
    if not tensor.isfinite().all():
        raise ValueError(f"Expected finite {name}; got NaN or infinity.")
    return tensor
