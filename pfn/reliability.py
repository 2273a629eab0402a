"""The reliability page: what a certificate measured, as one figure.

Everything that is drawn is in the card, so the page needs no network and no data. Panels that do
not apply are left out. Read `certify.py` and `audits.py` for what the figures mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pfn.audits import in_words
from pfn.card import ModelCard
from pfn.diagnostics import ecdf_band
from pfn.plot import import_pyplot, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
MASS = 0.95  # of simultaneous bands
COLOURS = ("#1f6f8b", "#d1495b", "#66a182", "#edae49", "#5f5aa2", "#8d6a4f")


def plot_certificate(card: ModelCard) -> Figure:
    """The reliability page of a checkpoint.

    Raises:
        ValueError: a card without a certificate, or one that an older `pfn certify` wrote.
        ImportError: without matplotlib, the extra `plot`.
    """
    certificate = card.certificate
    if not certificate or "conflict" not in certificate:
        raise ValueError(
            f"Expected a certificate with all audits on the card of {card.name!r}; run pfn certify"
            f" {card.name}."
        )
    panels: list[tuple[str, Callable[[Axes, Any], None], Any]] = [
        ("Gap to the exact posterior", _gap, certificate["gap"]),
        ("Coverage of central intervals", _coverage, certificate["coverage"]),
        ("Uniform where calibrated", _uniform, certificate["coverage"]),
        ("Posterior of latents", _latents, certificate["latents"]),
        ("Covariance of joint draws", _joint, certificate["joint"]),
        ("Coherence and evidence", _summary, in_words(certificate)),
    ]
    shown = [panel for panel in panels if panel[2]]
    columns = 2 if len(shown) == 4 else COLUMNS
    rows = -(-len(shown) // columns)
    figure, axes = import_pyplot().subplots(
        rows, columns, figsize=(3.3 * columns, 2.7 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (title, draw, content) in zip(axes.flat, shown, strict=False):
        quiet(axis)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
        draw(axis, content)
    low, high = card.d_range
    features = "1 feature" if high == 1 else f"{low} to {high} features"
    words = f"{card.name}: {features}, up to {card.max_context} points"
    figure.suptitle(words, fontsize=11, x=0.01, ha="left")
    return figure


def _gap(axis: Axes, gap: Mapping[str, Any]) -> None:
    """By context size, a line for each number of features."""
    cells = gap["cells"]
    features = sorted({cell["d"] for cell in cells})
    for colour, d in zip(COLOURS, features, strict=False):
        some = [cell for cell in cells if cell["d"] == d]
        n, mean, error = ([cell[k] for cell in some] for k in ("n", "mean", "standard_error"))
        label = f"d = {d}"
        axis.errorbar(n, mean, [2 * e for e in error], color=colour, lw=1.2, label=label, capsize=2)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set_xscale("log")
    axis.set_xticks(sorted({cell["n"] for cell in cells}))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.set(xlabel="context points", ylabel="nats per query, ± 2 s.e.")
    if len(features) > 1:
        _legend(axis)


def _coverage(axis: Axes, coverage: list[dict[str, Any]]) -> None:
    """What intervals cover more than they say, in points."""
    for shift, colour, item in zip((-0.4, 0.4), COLOURS, coverage, strict=False):
        mass = [100 * part["mass"] + shift for part in item["intervals"]]
        excess = [100 * (part["fraction"] - part["mass"]) for part in item["intervals"]]
        error = [200 * part["standard_error"] for part in item["intervals"]]
        axis.errorbar(
            mass, excess, error, fmt="o", ms=4, capsize=2, color=colour, label=_units(item)
        )
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(xlabel="nominal, %", ylabel="covered less nominal, points")
    _legend(axis)


def _uniform(axis: Axes, coverage: list[dict[str, Any]]) -> None:
    """Empirical cdfs less the diagonal, with the band that exact posteriors stay in."""
    names = {"pit": "cdf at the truth", "expected_coverage": "rank of density", "tarp": "TARP"}
    item = coverage[0]
    curves = {words: item[name]["histogram"] for name, words in names.items()}
    _ecdf(axis, curves)


def _latents(axis: Axes, latents: list[dict[str, Any]]) -> None:
    _ecdf(axis, {row["latent"]: row["histogram"] for row in latents})


def _ecdf(axis: Axes, histograms: Mapping[str, list[int]]) -> None:
    counts = next(iter(histograms.values()))
    band = ecdf_band(sum(counts), MASS)
    edges = band.edges.numpy()
    axis.fill_between(
        edges, band.lower.numpy() - edges, band.upper.numpy() - edges, color="0.9", lw=0
    )
    for colour, (name, histogram) in zip(COLOURS, histograms.items(), strict=False):
        share = np.cumsum(histogram) / sum(histogram)
        ends = np.arange(1, len(share) + 1) / len(share)
        axis.plot(
            np.r_[0, ends],
            np.r_[0, share - ends],
            color=colour,
            lw=1.2,
            label=name.replace("_", " "),
        )
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(xlabel="probability", ylabel="empirical less uniform cdf")
    _legend(axis)


def _joint(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Relative errors of covariances, beside those of as many exact draws."""
    sizes = sorted({row["n"] for row in rows})
    for shift, colour, latent in ((-0.15, COLOURS[0], True), (0.15, COLOURS[1], False)):
        some = sorted((row for row in rows if row["latent"] == latent), key=lambda row: row["n"])
        place = np.arange(len(some)) + shift
        error = [200 * row["error_standard_error"] for row in some]
        mean = [100 * row["error_mean"] for row in some]
        label = "function" if latent else "observations"
        axis.bar(place, mean, 0.28, yerr=error, color=colour, label=label, error_kw={"lw": 0.8})
        chance = [100 * row["exact_draws"] for row in some]
        axis.plot(place, chance, "_", color="black", ms=12)
    axis.plot([], [], "_", color="black", ms=12, label="exact draws")
    axis.set_xticks(range(len(sizes)), [str(n) for n in sizes])
    axis.set(xlabel="context points", ylabel="Frobenius error, %")
    _legend(axis)


def _legend(axis: Axes) -> None:
    """Two columns above all that is drawn."""
    lines = -(-len(axis.get_legend_handles_labels()[1]) // 2)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + (0.05 + 0.12 * lines) * (high - low))
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center")


def _summary(axis: Axes, lines: list[tuple[str, str]]) -> None:
    axis.set_axis_off()
    for i, (name, value) in enumerate(lines):
        height = 0.95 - 0.155 * i
        axis.text(0, height, name, fontsize=7.5, color="0.35", transform=axis.transAxes)
        axis.text(0, height - 0.07, value, fontsize=8, transform=axis.transAxes)


def _units(item: Mapping[str, Any]) -> str:
    return "standardized" if item["standardize"] else "in the prior's units"
