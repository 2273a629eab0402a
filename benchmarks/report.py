"""Rewrites tables that are made of files: `python benchmarks/report.py`.

Those of README.md beside it come from results/*.json; that of certificates, in the README of the
project, from the cards of the shipped checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from common import RESULTS, SHIPPED, Row, columns, readable

README = Path(__file__).with_name("README.md")
PROJECT = Path(__file__).parent.parent
PROJECT_README = PROJECT / "README.md"
HEADINGS = {
    "speed-predict": "Prediction against a fitted Gaussian process",
    "papers-speedup": "Prediction against MLE-II and NUTS",
    "papers-five": "A known Gaussian process of five features",
    "speed-cache": "A query on a cached context",
    "serving-onnx": "ONNX graphs beside torch",
    "serving-start": "The first answer of a process",
    "serving-large": "Many queries, and many points",
    "speed-sampling": "Prior sampling",
    "speed-training": "A training step against the machine's matrix products",
    "speed-recipes": "Training steps of the recipes",
    "speed-suggest": "A suggestion of an optimizer",
    "peers": "Training against the `pfns` package",
    "compute-gp": "The gap of `gp` against its training",
    "compute-fit-gp": "The gap of `gp`, fitted",
    "compute-gp-1d": "The gap of `gp-1d` against its training",
    "compute-fit-gp-1d": "The gap of `gp-1d`, fitted",
    "compute-heavy-tails": "The gap of `heavy-tails` against its training",
    "compute-fit-heavy-tails": "The gap of `heavy-tails`, fitted",
    "compute-bnn": "The gap of `bnn` against its training",
    "compute-fit-bnn": "The gap of `bnn`, fitted",
    "compute-bo": "The loss of `bo` against its training",
    "compute-fit-bo": "The loss of `bo`, fitted",
    "compute-curves": "The loss of `curves` against its training",
    "compute-fit-curves": "The loss of `curves`, fitted",
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
    "bo-prior": "`bo` beside `gp` on draws of its prior",
    "bo-problems": "Losses after 40 evaluations, by problem",
    "studies-loss": "What the prior tells of queries, at equal compute",
    "studies-kernels": "Kernels of experts, at equal compute",
    "studies-head": "Heads, at equal compute",
    "studies-experts": "Numbers of experts, at equal compute",
    "studies-refinements": "Refinements of experts, at equal compute",
    "studies-layers": "Numbers of layers, at equal compute",
    "studies-optimizer": "Optimizers, at equal compute",
    "studies-temperature": "Temperatures of attention, at equal compute",
    "studies-shape": "Width against depth, at equal compute",
    "studies-batch": "Tokens in a batch, at equal compute",
    "studies-contexts": "Sizes of contexts, at equal compute",
    "studies-particles": "Particles behind targets, at equal compute",
    "studies-octaves": "Fourier features, at equal compute",
    "studies-queries": "Queries of a task, at equal compute",
}


def main() -> None:
    """Writes both files, in which everything outside the marks stays as it is."""
    paths = {name: RESULTS / f"{name}.json" for name in HEADINGS}
    parts = [
        section(name, json.loads(path.read_text())) for name, path in paths.items() if path.exists()
    ]
    fill(README, "tables", "\n\n".join(parts))
    fill(PROJECT_README, "certificates", markdown(certificates()))


def fill(file: Path, name: str, content: str) -> None:
    """Puts `content` between the marks "<!-- NAME -->" and "<!-- end of NAME -->" of a file."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = file.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    whole = "\n\n".join([before + begin, content, end + after])
    file.write_text(whole, encoding="utf-8")


def certificates() -> list[Row]:
    """A row for each figure of a certificate, a column for each shipped checkpoint."""
    by_name = {name: certified(name) for name in SHIPPED}
    rows = dict.fromkeys(label for words in by_name.values() for label in words)
    return [
        {"": label, **{f"`{name}`": words.get(label, "") for name, words in by_name.items()}}
        for label in rows
    ]


def certified(name: str) -> dict[str, str]:
    """The certificate of a checkpoint in words."""
    card = json.loads((PROJECT / "pretrained" / name / "card.json").read_text())
    certificate, most = card["certificate"], card["architecture"]["max_features"]
    words = {"features": "1" if most == 1 else f"1 to {most}"}
    words["points"] = f"0 to {card['max_context']}"
    if gap := certificate["gap"]:
        words |= gap_in_words(gap)
    for part in certificate["coverage"]:
        masses = " / ".join(f"{100 * each['mass']:.0f}" for each in part["intervals"])
        label = f"coverage of {masses} %" + (", `standardize`" if part["standardize"] else "")
        words[label] = " / ".join(f"{100 * each['fraction']:.1f}" for each in part["intervals"])
    if joint := certificate.get("joint"):
        functions = [part for part in joint if part["latent"]]
        sizes = " / ".join(str(part["n"]) for part in functions)
        words[f"covariances of drawn functions off by, at {sizes} points, %"] = " / ".join(
            f"{100 * part['error_mean']:.0f}" for part in functions
        )
    return words | audits_in_words(certificate) | latency_in_words(certificate["latency"])


def gap_in_words(gap: dict[str, Any]) -> dict[str, str]:
    """The gap, by points and by features."""
    words = {"gap, nats per query": f"{gap['mean']:.4f} ± {gap['standard_error']:.4f}"}
    for n in sorted({cell["n"] for cell in gap["cells"] if cell["n"] <= 60}):
        mean = fmean(cell["mean"] for cell in gap["cells"] if cell["n"] == n)
        words[f"at {n} points"] = f"{mean:.3f}"
    by_features = {
        d: fmean(cell["mean"] for cell in gap["cells"] if cell["d"] == d)
        for d in sorted({cell["d"] for cell in gap["cells"]})
    }
    words["by features"] = ", ".join(f"{d}: {mean:.3f}" for d, mean in by_features.items())
    return words


def audits_in_words(certificate: dict[str, Any]) -> dict[str, str]:
    """Evidence, and tests that an exact posterior passes."""
    words = {}
    if evidence := certificate.get("evidence"):
        mean, spread = evidence["mean"], evidence["root_mean_square"]
        words["log evidence less exact, nats a point: mean, r.m.s."] = f"{mean:.3f}, {spread:.3f}"
    if coherence := certificate.get("coherence"):
        words["martingale, p"] = f"{coherence['martingale']['p_value']:.3f}"
    if latents := certificate.get("latents"):
        least = min(each["p_value"] for each in latents)
        words["ranks of latents, least p, of how many"] = f"{least:.3f}, {len(latents)}"
    if conflict := certificate.get("conflict"):
        alarms, error = 100 * conflict["false_alarms"], 100 * conflict["standard_error"]
        words["false alarms of `check`, %"] = f"{alarms:.1f} ± {error:.1f}"
    return words


def latency_in_words(latency: dict[str, Any]) -> dict[str, str]:
    """Times on one thread."""
    asked, kept = 1e3 * latency["predict_seconds"], 1e3 * latency["cached_query_seconds"]
    words = {
        f"{latency['m']} queries, ms": f"{asked:.0f}, n = {latency['n']}",
        "a query on a kept context, ms": f"{kept:.1f}",
    }
    if latency["reference_seconds"]:
        words["quadrature or NUTS, s"] = f"{latency['reference_seconds']:.1f}"
    return words


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
