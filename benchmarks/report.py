"""Rewrites the tables of README.md beside it from results/*.json: `python benchmarks/report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS, Row, columns, readable

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
HEADINGS = {
    "speed-predict": "Prediction against a fitted Gaussian process",
    "speed-nuts": "Prediction against NUTS",
    "speed-cache": "A query on a cached context",
    "serving-onnx": "ONNX graphs beside torch",
    "serving-start": "The first answer of a process",
    "serving-large": "Many queries, and many points",
    "speed-sampling": "Prior sampling",
    "speed-training": "A training step against the machine's matrix products",
    "speed-suggest": "A suggestion of an optimizer",
    "peers": "Training against the `pfns` package",
    "compute-gp": "The gap of `gp` against its training",
    "compute-fit-gp": "The gap of `gp`, fitted",
    "uci": "Small real tables",
    "functional-priors": "Networks matched to a Gaussian process, on real tables",
    "refine": "Refined answers, beside NUTS",
    "sbc": "Calibration of sampled references by simulation",
    "draws": "Draws of every prior",
    "trust-paths": "Joint draws against encoding each longer context anew",
    "trust-choice": "Priors chosen by evidence",
    "trust-power": "Misfits that the check against the prior catches",
    "curve-prior": "Learning curves drawn beside real ones",
    "curve-speed": "Draws of learning curves",
    "curve-reference": "The reference posterior of published learning curves",
    "curves-predict": "The rest of real learning curves",
    "curves-sweeps": "The rest of a curve beside siblings",
    "curves-prior": "Draws of the published prior of learning curves, against MCMC",
    "curves-copula": "Constants of joint draws of a curve",
    "curves-speed": "A decision on a learning curve",
    "stopping": "Early stopping of sweeps",
    "stopping-siblings": "Early stopping of runs beside those before",
    "stopping-tasks": "Early stopping, task by task",
    "bo": "Optimization with surrogates and samplers",
    "bo-problems": "Losses after 40 evaluations, by problem",
    "studies-loss": "What the prior tells of queries, at equal compute",
    "studies-kernels": "Kernels of experts, at equal compute",
    "studies-head": "Heads, at equal compute",
    "studies-experts": "Numbers of experts, at equal compute",
    "studies-refinements": "Refinements of experts, at equal compute",
    "studies-layers": "Numbers of layers, at equal compute",
    "studies-optimizer": "Optimizers, at equal compute",
    "studies-temperature": "Temperatures of attention, at equal compute",
    "studies-octaves": "Fourier features, at equal compute",
    "studies-queries": "Queries of a task, at equal compute",
}


def main() -> None:
    """Writes the README, in which everything outside the two marks stays as it is."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    paths = {name: RESULTS / f"{name}.json" for name in HEADINGS}
    parts = [
        section(name, json.loads(path.read_text())) for name, path in paths.items() if path.exists()
    ]
    README.write_text("\n\n".join([before + BEGIN, *parts, END + after]), encoding="utf-8")


def section(name: str, content: dict[str, Any]) -> str:
    """A heading, a table for `rows` and for each further list of rows, and how they came about."""
    tables = [markdown(content["rows"])]
    tables += [
        f"{key.capitalize()}:\n\n{markdown(rows)}"
        for key, rows in content.items()
        if key != "rows" and isinstance(rows, list) and rows
    ]
    versions = ", ".join(f"{library} {version}" for library, version in content["versions"].items())
    source = f"`{content['command']}`, {content['date']}, on {content['hardware']}; {versions}."
    return "\n\n".join([f"### {HEADINGS[name]}", *tables, source])


def markdown(rows: list[Row]) -> str:
    """A table in Markdown, numbers to the right."""
    names = columns(rows)
    words = [isinstance(rows[0].get(name), str) for name in names]
    lines = [names, [":--" if is_word else "--:" for is_word in words]]
    lines += [[readable(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
