"""The certificate of a checkpoint: how far from the exact posterior, how calibrated, how fast.

The gap is the mean over fresh prior tasks and queries of log p_reference(y) - log q(y), in nats
per query and in the prior's own units: the Kullback-Leibler divergence from reference to network,
which is zero only for the exact posterior. References are the expensive part and know no network:
`compute_references` keeps them in files that a killed run continues and that every later
certificate of the same prior reuses. Task i of a cell depends on (seed, n, d, i) alone, and on no
training seed.

Read `diagnostics.py` for the calibration tests, `card.py` for where the certificate is kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor

from pfn import __version__
from pfn.audits import SIZES, AuditSizes, audit, default_sizes, histogram, in_words
from pfn.card import write_atomically, write_card
from pfn.diagnostics import (
    ecdf_test,
    expected_coverage,
    interval_coverage,
    ks_test,
    tarp_coverage,
)
from pfn.fresh_tasks import Progress, Report, Split, draw_tasks
from pfn.library import find, load
from pfn.model import PFN
from pfn.predictive import Predictive
from pfn.simulation import nearest_observation
from priors import Prior, ReferencePrior, to_config
from priors.tasks import knows_posterior

Cell = tuple[int, int]  # context points n and features d

SIZES_OF_ONE = (*SIZES, 200)  # where a network has one feature
FEATURES = (1, 2, 5, 12)
GROUP = 8  # coverage tasks that share a shape, hence a pass through the network
CHUNK = 32  # tasks per pass: bounds memory
DRAWS = 99  # of a predictive, among which the truth is ranked


class Reference(NamedTuple):
    """The reference's answers for a cell; NaN where not computed, errors also where not stated."""

    y_query: Tensor  # (task, query) where it was evaluated
    log_prob: Tensor  # (task, query)
    error: Tensor  # (task, query) its own standard error of log_prob
    seconds: Tensor  # (task,)


@runtime_checkable
class StatesError(Protocol):
    """A reference posterior, itself approximate, that knows how precise its `log_prob` is."""

    def log_prob_error(self, value: Tensor) -> Tensor:
        """The standard error of `log_prob(value)` in nats; about its size if nothing is random."""
        ...


def certify_checkpoint(
    name: str | Path, *, prior: Prior | None = None, keep_gap: bool = False, **options: Any
) -> dict[str, Any]:
    """The certificate of a shipped name or a folder, also written into its card.json.

    Args:
        prior: the one it was trained on, for a prior of your own that no card can rebuild.
        keep_gap: leaves the gap as the card has it, and measures all else anew.
        options: those of `certify`.

    Raises:
        ValueError: as `certify`, or to keep a gap that the card does not have.
    """
    folder = find(name)
    model = load(folder, prior=prior)
    if keep_gap:
        kept = model.card.certificate.get("gap")
        if kept is None:
            raise ValueError(
                f"Expected a gap to keep on the card of {model.card.name!r}; it has none."
            )
        options["gap"] = {"command": model.card.certificate["command"]} | kept
    certificate = certify(model, **options)
    write_card(folder, dataclasses.replace(model.card, certificate=certificate))
    return certificate


def certify(
    pfn: PFN,
    *,
    tasks: int | None = None,
    queries: int = 64,
    seed: int = 0,
    cells: Sequence[Cell] | None = None,
    coverage_tasks: int = 1000,
    audits: AuditSizes | bool = True,
    gap: dict[str, Any] | None = None,
    references: Path | None = None,
    workers: int = 1,
    command: str = "",
    report: Report = lambda progress: None,
) -> dict[str, Any]:
    """The certificate: gap to the reference posterior, coverage, audits, latency, as numbers.

    Args:
        tasks: per cell; 200 for a network of one feature, else 30.
        queries: per task.
        cells: pairs (n, d); by default `default_cells` of the network.
        coverage_tasks: tasks behind the coverage, which needs no reference.
        audits: how many tasks are behind each of `audits.py`; False leaves them out.
        gap: what an earlier certificate of the same weights found, to be kept; None measures it.
        references: a folder that keeps references; None computes them and forgets.
        workers: processes that compute references.
        command: what a reader types to measure this again.

    Returns:
        A dictionary that JSON can hold. "gap" and the reference's latency are None for a prior
        without `posterior`.

    Raises:
        ValueError: if the PFN does not know its prior, or there are too few tasks or queries.
    """
    if pfn.prior is None:
        raise ValueError(
            f"Expected a PFN that knows its prior; {pfn.card.name!r} was trained on a prior of your"
            " own. Load it with pfn.load(path, prior=my_prior)."
        )
    largest = pfn.card.d_range[1]
    cells = default_cells(largest, pfn.card.max_context) if cells is None else cells
    if tasks is None:
        tasks = 200 if largest == 1 else 30
    if min(tasks, coverage_tasks) < 2 or queries < 1:
        raise ValueError(
            "Expected at least 2 tasks, for standard errors, and 1 query; got"
            f" tasks={tasks}, coverage_tasks={coverage_tasks}, queries={queries}."
        )
    if gap is None and knows_posterior(pfn.prior):
        answers = compute_references(
            pfn.prior,
            cells,
            references,
            tasks=tasks,
            queries=queries,
            seed=seed,
            workers=workers,
            report=report,
        )
        gap = gap_by_cell(pfn, pfn.prior, cells, answers, seed=seed, report=report)
        gap["command"] = command
    if audits is True:
        audits = default_sizes(largest)
    return {
        "model": pfn.card.name,
        "seed": seed,
        "command": command,
        "versions": {"pfn": __version__, "torch": torch.__version__},
        "gap": gap,
        "coverage": _coverage(pfn, pfn.prior, coverage_tasks, seed, report),
        **({} if audits is False else audit(pfn, pfn.prior, audits, seed, report)),
        "latency": _latency(pfn, pfn.prior, seed, report),
    }


def default_cells(max_features: int, max_context: int) -> list[Cell]:
    """The cells (n, d) of a certificate: what the network was trained for of a standard grid."""
    grid = SIZES_OF_ONE if max_features == 1 else SIZES
    sizes = [n for n in grid if n <= max_context] or [max_context]
    return [(n, d) for d in FEATURES if d <= max_features for n in sizes]


def compute_references(
    prior: ReferencePrior,
    cells: Sequence[Cell],
    folder: Path | None,
    *,
    tasks: int,
    queries: int = 64,
    seed: int = 0,
    workers: int = 1,
    report: Report = lambda progress: None,
) -> list[Reference]:
    """The reference's log densities for each cell, from files where they are there.

    A file belongs to (prior, seed, n, d, queries) and is rewritten, atomically, after each task: a
    killed run continues, and asking for more tasks later adds to it.

    Args:
        folder: where the files lie; None keeps nothing.
        workers: processes; with more than one the prior must be picklable.

    Raises:
        ValueError: if a file holds the references of other tasks.
        RuntimeError: if the reference gives a density that is not finite.
    """
    found = []
    for n, d in cells:
        path = folder / _file_name(prior, seed, n, d, queries) if folder else None
        drawn = draw_tasks(prior, n, d, tasks=tasks, queries=queries, seed=seed)
        cell = _load_reference(path, drawn.y_query)
        missing = cell.log_prob[:tasks].isnan().any(1).nonzero().flatten().tolist()
        jobs = [(prior, Split(*(part[i] for part in drawn))) for i in missing]
        done = tasks - len(missing)
        for row, (log_prob, error, seconds) in _run(jobs, workers):
            i = missing[row]
            if not bool(log_prob.isfinite().all()):
                raise RuntimeError(
                    f"The reference's log density is not finite at task {i} of n = {n}, d = {d},"
                    f" seed = {seed}."
                )
            cell.log_prob[i], cell.error[i], cell.seconds[i] = log_prob, error, seconds
            done += 1
            report(Progress(f"references, n = {n}, d = {d}", done, tasks))
            if path:
                _save_reference(path, cell)
        found.append(Reference(*(part[:tasks] for part in cell)))
    return found


def gap_by_cell(
    pfn: PFN,
    prior: Prior,
    cells: Sequence[Cell],
    references: Sequence[Reference],
    *,
    seed: int = 0,
    report: Report = lambda progress: None,
) -> dict[str, Any]:
    """The gap by cell and its mean over cells, given the answers of `compute_references`.

    Queries of a task depend on each other and share the reference's error; tasks are independent.
    "reference_error" is the error that the reference brings into the mean if those of tasks are
    independent, sqrt(sum_i e_i^2) / tasks, with e_i the mean error of task i;
    "reference_error_per_query", the mean of e_i, bounds it even if all errors had one sign.
    """
    rows: list[dict[str, Any]] = []
    differences = []
    for done, ((n, d), reference) in enumerate(zip(cells, references, strict=True)):
        tasks, queries = reference.log_prob.shape
        drawn = draw_tasks(prior, n, d, tasks=tasks, queries=queries, seed=seed)
        difference = (reference.log_prob - log_prob(pfn, drawn)).mean(1)  # (task,)
        error = reference.error.mean(1)
        differences.append(difference)
        rows.append(
            {
                "n": n,
                "d": d,
                "tasks": tasks,
                "queries": queries,
                **_summary(difference),
                "standard_error": float(difference.std()) / math.sqrt(tasks),
                "reference_error": _stated(error.square().sum().sqrt() / tasks),
                "reference_error_per_query": _stated(error.mean()),
                "reference_seconds_per_task": float(reference.seconds.mean()),
            }
        )
        report(Progress("gap", done + 1, len(cells)))
    return {
        "unit": "nats per query",
        **_summary(torch.cat(differences)),
        "mean": statistics.fmean(row["mean"] for row in rows),  # cells weigh the same
        "standard_error": _error_of_mean([row["standard_error"] for row in rows]),
        "reference_error": _error_of_mean([row["reference_error"] for row in rows]),
        "cells": rows,
    }


def _coverage(
    pfn: PFN, prior: Prior, tasks: int, seed: int, report: Report, queries: int = 16
) -> list[dict[str, Any]]:
    """Coverage and PIT in the prior's units and standardised, over n log-uniform and d uniform."""
    groups = math.ceil(tasks / GROUP)
    largest = pfn.card.max_context
    units = [False, True]
    if pfn.card.architecture.causal:  # whose units are the prior's
        units.remove(True)
    pit: dict[bool, list[Tensor]] = {standardize: [] for standardize in units}
    ranks: dict[bool, list[Tensor]] = {standardize: [] for standardize in units}
    generator = torch.Generator().manual_seed(seed)
    for group in range(groups):
        n = round((largest + 1) ** ((group + 0.5) / groups)) - 1
        d = 1 + group % pfn.card.d_range[1]
        drawn = draw_tasks(
            prior,
            n,
            d,
            tasks=GROUP,
            queries=queries,
            seed=seed,
            first=group * GROUP,
            purpose="coverage",
        )
        for standardize in units:
            context = (drawn.x, drawn.y)
            predictive = pfn.predict(context, drawn.x_query, standardize=standardize)
            pit[standardize].append(predictive.cdf(drawn.y_query).cpu())
            ranks[standardize].append(_ranks(predictive[:, 0], drawn, generator))
        report(Progress("coverage", group + 1, groups))
    result = []
    for standardize in units:
        everything = torch.cat(pit[standardize])[:tasks]
        first = everything[:, 0]  # one query per task: independent
        density, distance = torch.cat(ranks[standardize])[:tasks].T
        result.append(
            {
                "standardize": standardize,
                "tasks": tasks,
                "queries": queries,
                "intervals": [item._asdict() for item in interval_coverage(everything)],
                "pit": _uniformity(first),
                "expected_coverage": _uniformity(density),
                "tarp": _uniformity(distance),
            }
        )
    return result


def _ranks(predictive: Predictive, drawn: Split, generator: torch.Generator) -> Tensor:
    """Of the first query's truth among draws: its density's rank, and that of its distance from the
    nearest observation, (task, 2). A posterior that ignores its data fails the second."""
    truth, draws = drawn.y_query[:, 0], predictive.sample((DRAWS,), generator=generator)
    log_prob, ours = predictive.log_prob(draws), predictive.log_prob(truth)
    reference = nearest_observation(drawn.x, drawn.y, drawn.x_query[:, :1])
    distance = tarp_coverage(
        draws.unsqueeze(-1), truth.unsqueeze(-1), reference.unsqueeze(-1), generator=generator
    )
    return torch.stack([expected_coverage(log_prob, ours, generator=generator), distance], 1)


def _uniformity(values: Tensor) -> dict[str, Any]:
    """Tests of independent values that an exact posterior makes uniform, and their histogram."""
    test = ks_test(values)
    return {
        "values": len(values),
        **test._asdict(),
        "ecdf_p_value": ecdf_test(values).p_value,
        "histogram": histogram(values),
    }


def _latency(pfn: PFN, prior: Prior, seed: int, report: Report) -> dict[str, Any]:
    """Median seconds of an answer for 1000 queries, and of one query on a cached context."""
    n, m, d = min(100, pfn.card.max_context), 1000, min(5, pfn.card.d_range[1])
    drawn = draw_tasks(prior, n, d, tasks=1, queries=m, seed=seed, purpose="latency")
    x, y, x_query = drawn.x[0], drawn.y[0], drawn.x_query[0]
    fitted = pfn.condition((x, y), standardize=False)
    predict = _time(lambda: pfn.predict((x, y), x_query, standardize=False).mean, 7)
    cached = _time(lambda: fitted.predict(x_query[:1]).mean, 7)
    report(Progress("latency", 1, 2))
    reference = None
    if knows_posterior(prior):
        reference_prior = prior
        reference = _time(lambda: reference_prior.posterior((x, y), x_query).mean, 1)  # minutes
    report(Progress("latency", 2, 2))
    return {
        "n": n,
        "m": m,
        "d": d,
        "threads": torch.get_num_threads(),
        "predict_seconds": predict,
        "cached_query_seconds": cached,
        "reference_seconds": reference,
        "reference_over_predict": None if reference is None else reference / predict,
    }


def certificate_table(certificate: dict[str, Any]) -> Table:
    """The certificate for people: a rich table that holds one for each part."""
    page = Table.grid(padding=(1, 0))
    if certificate["gap"] is None:
        page.add_row("The prior has no posterior, hence no gap.")
    else:
        page.add_row(_gap_table(certificate["gap"]))
    page.add_row(_coverage_table(certificate["coverage"]))
    if certificate.get("coherence"):
        page.add_row(_audit_table(certificate))
    page.add_row(_latency_table(certificate["latency"]))
    return page


def _gap_table(gap: dict[str, Any]) -> Table:
    table = Table(title="Gap to the reference, nats per query", title_justify="left")
    for name in ("n", "d", "tasks", "gap", "median task", "worst task", "reference's error"):
        table.add_column(name, justify="right")
    for row in [*gap["cells"], {"n": "mean", "d": "", "tasks": "", **gap}]:
        table.add_row(
            *(str(row[name]) for name in ("n", "d", "tasks")),
            f"{row['mean']:.4f} ± {row['standard_error']:.4f}",
            f"{row['median_task']:.4f}",
            f"{row['worst_task']:.4f}",
            "not stated" if row["reference_error"] is None else f"{row['reference_error']:.1e}",
            end_section=row is gap["cells"][-1],
        )
    return table


def _coverage_table(coverage: list[dict[str, Any]]) -> Table:
    table = Table(title="Coverage of central intervals, %", title_justify="left")
    table.add_column("standardize")
    for interval in coverage[0]["intervals"]:
        table.add_column(f"{100 * interval['mass']:g} %", justify="right")
    table.add_column("PIT uniform, p", justify="right")
    for row in coverage:
        table.add_row(
            str(row["standardize"]),
            *(
                f"{100 * item['fraction']:.1f} ± {100 * item['standard_error']:.1f}"
                for item in row["intervals"]
            ),
            f"{row['pit']['p_value']:.2g}",
        )
    return table


def _audit_table(certificate: dict[str, Any]) -> Table:
    table = Table(title="Audits", title_justify="left", show_header=False)
    for name, value in in_words(certificate):
        table.add_row(name, value)
    for row in certificate["latents"] or []:
        table.add_row(f"Posterior of {row['latent']}: uniform, p", f"{row['p_value']:.2g}")
    for row in certificate["given"] or []:
        value = f"{row['mean']:.4f} ± {row['standard_error']:.4f}"
        table.add_row(f"Gap where the noise is known, n = {row['n']}", value)
    return table


def _latency_table(latency: dict[str, Any]) -> Table:
    title = "Milliseconds at n = {n}, m = {m}, d = {d}".format(**latency)
    table = Table(title=title, title_justify="left")
    for name in ("predict", "one query, cached", "reference", "ratio"):
        table.add_column(name, justify="right")
    seconds = (latency[f"{name}_seconds"] for name in ("predict", "cached_query", "reference"))
    ratio = latency["reference_over_predict"]
    table.add_row(
        *("-" if value is None else f"{1000 * value:.4g}" for value in seconds),
        "-" if ratio is None else f"{ratio:.3g}",
    )
    return table


def log_prob(pfn: PFN, drawn: Split) -> Tensor:
    """log q(y) (task, query), in the prior's own units."""
    parts = []
    for x, y, x_query, y_query in zip(*(part.split(CHUNK) for part in drawn), strict=True):
        predictive = pfn.predict((x, y), x_query, standardize=False)
        parts.append(predictive.log_prob(y_query).cpu())
    return torch.cat(parts)


def _run(
    jobs: list[tuple[ReferencePrior, Split]], workers: int
) -> Iterator[tuple[int, tuple[Tensor, Tensor, float]]]:
    """Results of `_reference` with the row of their job, as they come."""
    if workers == 1 or len(jobs) < 2:
        yield from ((row, _reference(*job)) for row, job in enumerate(jobs))
        return
    context = get_context("spawn")  # a fork would copy the locks of running thread pools
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = {pool.submit(_reference, *job): row for row, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _reference(prior: ReferencePrior, task: Split) -> tuple[Tensor, Tensor, float]:
    """Log densities (query,) of one task, their standard errors, and the seconds they took."""
    began = time.perf_counter()
    posterior = prior.posterior((task.x, task.y), task.x_query)
    log_prob = posterior.log_prob(task.y_query)
    error = torch.full_like(log_prob, math.nan)
    if isinstance(posterior, StatesError):
        error = posterior.log_prob_error(task.y_query)
    return log_prob, error, time.perf_counter() - began


def _file_name(prior: Prior, seed: int, n: int, d: int, queries: int) -> str:
    try:
        config = json.dumps(to_config(prior), sort_keys=True)
    except ValueError:
        config = type(prior).__qualname__  # a user's own; the file knows its tasks
    digest = hashlib.blake2b(config.encode(), digest_size=6).hexdigest()
    return f"{digest}-seed{seed}-n{n}-d{d}-q{queries}.safetensors"


def _load_reference(path: Path | None, y_query: Tensor) -> Reference:
    """What the file holds, with rows of NaN for tasks that it lacks."""
    tasks, queries = y_query.shape
    empty = torch.full((tasks, queries), math.nan, dtype=torch.float64)
    fresh = Reference(y_query, empty, empty.clone(), empty[:, 0].clone())
    if path is None or not path.is_file():
        return fresh
    stored = Reference(**safetensors.torch.load(path.read_bytes()))
    known = min(tasks, len(stored.y_query))
    if not torch.allclose(stored.y_query[:known], y_query[:known], rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"Expected references of the tasks that the prior draws now in {path}; found other"
            " tasks. Choose another folder or remove the file."
        )
    return Reference(
        *(torch.cat([old, new[known:]]) for old, new in zip(stored, fresh, strict=True))
    )


def _save_reference(path: Path, cell: Reference) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in cell._asdict().items()}
    write_atomically(path, safetensors.torch.save(tensors))


def _summary(difference: Tensor) -> dict[str, float]:
    return {
        "mean": float(difference.mean()),
        "median_task": float(difference.median()),
        "worst_task": float(difference.max()),
    }


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean of independent numbers with these standard errors."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def _stated(error: Tensor) -> float | None:
    """The number, or None (JSON has no NaN) where the reference states no error."""
    return None if bool(error.isnan()) else float(error)


def _time(answer: Callable[[], Any], repeats: int) -> float:
    """Median seconds after one call that warms up."""
    answer()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        answer()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
