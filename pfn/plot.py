"""Pictures of predictives, over one feature or row by row. Matplotlib is imported on demand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

    from pfn.predictive import Predictive

BANDS = {0.9: "#E0E8F0", 0.5: "#B5C8DC"}  # mass: colour
BLUE, INK, GREY = "#3F6C9B", "#22303C", "#8A949E"


def plot_predictive(
    posterior: Predictive,
    x_query: ArrayLike | Tensor,
    context: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The Axes with mean, 50 % and 90 % intervals and context: see `Predictive.plot`."""
    plt = import_pyplot()
    x = _column(x_query, "x_query")
    if tuple(posterior.batch_shape) != x.shape:
        raise ValueError(
            f"Expected one predictive per query, batch_shape {x.shape} as x_query; got "
            f"{tuple(posterior.batch_shape)}. For a batch of tasks, plot one: posterior[0].plot."
        )
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")[1]

    order = np.argsort(x, kind="stable")
    for mass, color in BANDS.items():
        lower, upper = (_array(bound)[order] for bound in posterior.interval(mass))
        ax.fill_between(x[order], lower, upper, color=color, lw=0, label=f"{mass:.0%} interval")
    ax.plot(x[order], _array(posterior.mean)[order], color=BLUE, lw=2, label="mean")
    if context is not None:
        x_context, y_context = _column(context[0], "context x"), _column(context[1], "context y")
        if x_context.shape != y_context.shape:
            raise ValueError(
                f"Expected as many context x as y; got {len(x_context)} and {len(y_context)}."
            )
        ax.scatter(
            x_context, y_context, s=26, color=INK, edgecolor="white", lw=0.7, zorder=3, label="data"
        )

    ax.set_xlabel("x", color=INK)
    ax.set_ylabel("y", color=INK)
    ax.margins(x=0.01)
    quiet(ax)
    ax.legend(frameon=False, fontsize="small", labelcolor=INK, reverse=True)
    return ax


def plot_rows(posterior: Predictive, ax: Axes) -> None:
    """Each predictive of batch_shape (m,) as a dot in its 50 % and 90 % intervals, by the mean."""
    ordered = posterior[posterior.mean.argsort()]
    rows = np.arange(len(ordered.mean))
    width = min(6.0, max(0.8, 300 / max(1, len(rows))))  # points: bars touch where they are many
    for mass, color in BANDS.items():
        lower, upper = (_array(bound) for bound in ordered.interval(mass))
        ax.vlines(rows, lower, upper, color=color, lw=width, label=f"{mass:.0%} interval")
    ax.scatter(rows, _array(ordered.mean), s=width + 2, color=BLUE, zorder=3, label="mean")
    ax.set_xlabel("rows, ordered by prediction", color=INK)
    quiet(ax)
    ax.legend(frameon=False, fontsize="small", labelcolor=INK, reverse=True)


def import_pyplot() -> Any:
    """The module matplotlib.pyplot.

    Raises:
        ImportError: naming the extra that brings it.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'pfn[plot]'.") from error
    return plt


def quiet(ax: Axes) -> None:
    """Leaves two spines, in grey, so that the data stand out."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(color=GREY, labelcolor=INK)


def _array(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _column(values: ArrayLike | Tensor, name: str) -> NDArray[np.float64]:
    """A single feature or target as (n,)."""
    array = _array(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"Expected {name} of shape (n,) or (n, 1), as only d = 1 can be drawn; got "
            f"{array.shape}. For more features, predict along one with the others fixed, and pass "
            "that feature's values as x_query."
        )
    return array
