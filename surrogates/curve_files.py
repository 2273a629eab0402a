"""Learning curves from files, for the command line: tables and TensorBoard logs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pfn.tables import NothingYet, read_csv
from surrogates.extrapolation import Reader
from surrogates.stopping import Criterion, judge_again

STEPS = ("step", "epoch", "iteration", "n")  # names of a column of steps, in any case
EVENTS = "events.out.tfevents"


class Observed(NamedTuple):
    """A metric at its steps, both (n,)."""

    name: str
    steps: NDArray[np.float64] | None  # None: counted from 1
    values: NDArray[np.float64]


def read_curve(
    path: Path, metric: str | None = None, step: str | None = None, *, growing: bool = False
) -> Observed:
    """A metric from a CSV file, or from a TensorBoard log (a file or its folder).

    A table has a header, a column of values, and maybe one of steps, which is called step, epoch,
    iteration or n unless `step` names it; of several columns of values `metric` says which. Rows
    without a step or a value are left out; "nan" is a value, a divergence; of a step reported
    twice, the later row counts. Steps 0, 1, 2 ... are counted from 1; of wider spaced ones, a step
    0, from before the training, is left out.

    Args:
        growing: whether the file is being written, as for `read_csv`.

    Raises:
        ValueError: no such file, header, metric or values, or several columns of steps.
    """
    if path.is_dir() or EVENTS in path.name:
        if step is not None:
            raise ValueError(f"Expected --step for a table only; {path} is a TensorBoard log.")
        name, raw, values = _read_events(path, metric)
    else:
        name, raw, values = _read_table(path, metric, step, growing)
    if raw is None:
        return Observed(name, None, values)
    order = np.argsort(raw, kind="stable")
    raw, values = raw[order], values[order]
    if not len(raw):
        raise NothingYet(f"Expected values of {name!r} in {path}; there are none.")
    last = np.append(np.diff(raw) > 0, True)  # of a step reported twice, the later value
    raw, values = raw[last], values[last]
    if raw[0] == 0:
        counted = len(raw) == 1 or np.median(np.diff(raw)) == 1
        raw, values = (raw + 1, values) if counted else (raw[1:], values[1:])
    return Observed(name, raw, values)


def _read_table(
    path: Path, metric: str | None, step: str | None, growing: bool
) -> tuple[str, NDArray[np.float64] | None, NDArray[np.float64]]:
    table = read_csv(path, growing=growing)
    if all(map(_is_number, table)):
        raise ValueError(
            f"Expected a header in the first line of {path}, such as epoch,accuracy; got the"
            f" numbers {list(table)}."
        )
    known = [name for name in table if name.lower() in STEPS]
    if step is None and len(known) > 1:
        raise ValueError(f"Expected --step, one of the columns {known} of {path}.")
    if step is not None and step not in table:
        raise ValueError(
            f"Expected --step among the columns {list(table)} of {path}; got {step!r}."
        )
    steps = next(iter(known), None) if step is None else step
    names = [name for name in table if name != steps]
    if metric is None and len(names) != 1:
        raise ValueError(f"Expected --metric, one of the columns {names} of {path}.")
    name = names[0] if metric is None else metric
    if name not in names:
        raise ValueError(f"Expected --metric among the columns {names} of {path}; got {name!r}.")
    places = table[steps] if steps is not None else table[name]
    kept = [
        i
        for i, (place, cell) in enumerate(zip(places, table[name], strict=True))
        if place.strip() and cell.strip()
    ]
    values = _numbers(table[name], kept, name, path)
    if steps is None:
        return name, None, values
    where = _numbers(places, kept, steps, path)
    return name, where[np.isfinite(where)], values[np.isfinite(where)]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(cells: list[str], kept: list[int], name: str, path: Path) -> NDArray[np.float64]:
    try:
        return np.array([float(cells[i]) for i in kept], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"Expected numbers in column {name!r} of {path}: {error}.") from None


def _read_events(
    path: Path, metric: str | None
) -> tuple[str, NDArray[np.float64] | None, NDArray[np.float64]]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Reading TensorBoard logs needs tensorboard: pip install tensorboard."
        ) from error
    if not path.exists():
        raise NothingYet(f"Expected a table or a TensorBoard log; there is no {path}.")
    log = EventAccumulator(str(path), size_guidance={"scalars": 0})
    log.Reload()
    names = log.Tags()["scalars"]
    if not names:
        raise NothingYet(f"Expected scalars in {path}; there are none.")
    if metric is None and len(names) != 1:
        raise ValueError(f"Expected --metric, one of the scalars {names} of {path}.")
    name = names[0] if metric is None else metric
    if name not in names:
        raise ValueError(f"Expected --metric among the scalars {names} of {path}; got {name!r}.")
    events = log.Scalars(name)
    return (
        name,
        np.array([event.step for event in events], dtype=np.float64),
        np.array([event.value for event in events], dtype=np.float64),
    )


def extrapolate_command(
    path: Path,
    criterion: Criterion,
    *,
    best: float | None,
    metric: str | None = None,
    step: str | None = None,
    plot: Path | None = None,
    growing: bool = False,
) -> dict[str, Any]:
    """What `pfn extrapolate` prints: predictions, and a decision.

    Args:
        metric, step, growing: as for `read_curve`.
        best: value to beat.
        plot: figure to write.
    """
    seen = read_curve(path, metric, step, growing=growing)
    steps = np.arange(1.0, len(seen.values) + 1) if seen.steps is None else seen.steps
    reader = Reader(criterion.model)
    decision = judge_again(criterion, seen.values.tolist(), steps.tolist(), best, reader)
    how = (criterion.horizon, steps.tolist(), criterion.mode, criterion.bounds)
    curve = reader.extrapolate(seen.values, *how, best=best)
    if plot is not None:
        from pfn.plot import import_pyplot
        from surrogates.curve_plots import plot_curve

        plt = import_pyplot()
        plt.switch_backend("Agg")
        ax = plot_curve(curve, best=best, reason=decision.reason)
        ax.set_ylabel(seen.name)
        figure: Any = ax.figure
        figure.savefig(plot, dpi=150)
        plt.close(figure)
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    rows = [curve.icdf(level).tolist() for level in levels]
    return {
        "metric": seen.name,
        "observed": len(seen.values),
        "horizon": criterion.horizon,
        "best": best,
        "steps": curve.steps.tolist(),
        **{f"q{round(100 * level):02d}": row for level, row in zip(levels, rows, strict=True)},
        "probability": _finite(decision.probability),
        "stop": decision.stop,
        "pause": decision.pause,
        "reason": decision.reason,
    }


def watch(
    ask: Callable[[], dict[str, Any]], *, every: float, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Asks again whenever there is a new value, until the decision is to stop.

    Raises:
        ValueError: what is wrong with the file, unless a moment later it no longer is.
    """
    seen, wrong = -1, ""
    while True:
        answer = None
        try:
            answer, wrong = ask(), ""
        except NothingYet:
            wrong = ""
        except ValueError as error:
            if str(error) == wrong:
                raise
            wrong = str(error)
        if answer is not None and answer["observed"] != seen:
            seen = answer["observed"]
            say(answer)
            if answer["stop"]:
                return answer
        time.sleep(every)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
