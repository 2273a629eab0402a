"""What the benchmarks share: timing in alternation, tables, and results as JSON.

Import this before torch. A result file says on what and with what it was measured, and by which
command; `report.py` turns the files of `results/` into the tables of README.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning ruins timings on a busy machine

import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from pfn.recipe import processor

RESULTS = Path(__file__).parent / "results"
RECIPES = Path(__file__).parent.parent / "pretrained" / "recipes"
SHIPPED = ("gp-1d", "gp", "heavy-tails", "bnn", "bo", "curves")  # checkpoints that have names
LIBRARIES = ("torch", "numpy", "gpytorch", "botorch", "numpyro", "jax", "pfns")

Row = Mapping[str, Any]


class Timing(NamedTuple):
    """Median seconds of one call, by the clock and in CPU time of all threads."""

    wall: float
    cpu: float


def measure(
    contenders: Mapping[str, Callable[[], object]], repeats: int, *, at_least: float = 0.2
) -> dict[str, Timing]:
    """Medians over `repeats` rounds, in each of which every contender has its turn.

    Args:
        at_least: seconds of a turn; a contender that is quicker is called several times.
    """
    times = {}
    for name, call in contenders.items():
        call()  # what happens once, such as loading, is not measured
        began = time.perf_counter()
        call()
        times[name] = 1 + int(at_least / (time.perf_counter() - began))
    readings: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            gc.collect()  # garbage of one contender is not collected in another's time
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(times[name]):
                call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            readings[name].append((wall / times[name], cpu / times[name]))
    return {
        name: Timing(median(wall for wall, _ in pairs), median(cpu for _, cpu in pairs))
        for name, pairs in readings.items()
    }


def save(name: str, rows: Sequence[Row], **facts: Any) -> None:
    """Prints `rows` and writes them to results/NAME.json, with the circumstances and `facts`."""
    RESULTS.mkdir(exist_ok=True)
    content = {"rows": [dict(row) for row in rows], **facts, **circumstances()}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(name, rows)


def show(title: str, rows: Sequence[Row]) -> None:
    """Prints a table, one column per key of the rows."""
    table = Table(title=title)
    for column in columns(rows):
        words = isinstance(rows[0].get(column), str)
        table.add_column(column, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(readable(row.get(column)) for column in columns(rows)))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def circumstances() -> dict[str, Any]:
    """Hardware in words, library versions, date and command."""
    return {
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
    }


def hardware() -> str:
    """Such as "2 CPU cores (AMD EPYC), 1 thread", with the name of the GPU where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    words = f"{cores} CPU cores ({processor()}), {threads} thread{'s' * (threads > 1)}"
    return f"{torch.cuda.get_device_name()}, {words}" if torch.cuda.is_available() else words


def columns(rows: Sequence[Row]) -> list[str]:
    """The keys of all rows, in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def readable(value: Any) -> str:
    """A cell: floats to three significant digits, nothing for None."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return "" if value is None else str(value)


def _versions() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _command() -> str:
    """The command as typed, with absolute paths left out: they concern one machine only."""
    words = ["PATH" if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
