"""The fan chart of a learning curve. Needs matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from pfn.plot import BLUE, GREY, INK, import_pyplot, quiet
from surrogates.curve_posterior import DIVERGED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from surrogates.curve_posterior import Curve

WIDTH = 88  # characters of a line of the title


def plot_curve(
    curve: Curve, ax: Axes | None = None, *, best: float | None = None, reason: str = ""
) -> Axes:
    """The Axes with what was seen, the median and 50 % and 90 % intervals of the rest.

    Args:
        best: the incumbent, a dashed line.
        reason: of a decision, the title.
    """
    plt = import_pyplot()
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")[1]
    seen, values = curve.seen.numpy(), curve.values.numpy()
    finite = np.isfinite(values)
    if len(curve.steps):
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
        bands = curve.icdf(levels.unsqueeze(-1)).numpy()  # (5, rest)
        metric = curve.metric
        if math.isfinite(metric.top) > math.isfinite(metric.bottom):
            # a loss that has diverged would hide the rest
            worst = float(metric.decode(torch.tensor(DIVERGED, dtype=torch.float64)))
            bands = metric.sign * np.maximum(metric.sign * bands, metric.sign * worst)
        steps = curve.steps.numpy()
        for low, high, opacity in ((bands[0], bands[4], 0.15), (bands[1], bands[3], 0.3)):
            ax.fill_between(steps, low, high, color=BLUE, alpha=opacity, lw=0)
        ax.plot(steps, bands[2], color=BLUE, lw=1.8, label="median, 50 % and 90 %")
        ax.legend(frameon=False, fontsize="small")
    ax.plot(seen[finite], values[finite], color=INK, lw=1.2, marker="o", ms=2.5)
    if not finite.all():
        ends = ax.get_ylim()
        bad = ends[0] if curve.metric.sign > 0 else ends[1]
        ax.plot(seen[~finite], np.full((~finite).sum(), bad), "x", color=INK, ms=5, clip_on=False)
        ax.set_ylim(ends)
    if best is not None:
        ax.axhline(best, color=GREY, lw=1.2, ls="--")
        ax.annotate(
            f"best so far {best:.4g}", (0.99, best), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", ha="right", color=INK, fontsize="small",
        )  # fmt: skip
    ax.set(xlabel="step", ylabel="metric", xlim=(0, curve.horizon))
    if reason:
        import textwrap

        lines = textwrap.wrap(reason.replace(" %", "\u00a0%"), WIDTH)
        ax.set_title("\n".join(lines), fontsize="small", loc="left")
    quiet(ax)
    return ax
