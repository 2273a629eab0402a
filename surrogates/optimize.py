"""`minimize` and `maximize`: a SciPy-like front on an Optuna study.

Every evaluation is in the storage before the next one begins. An objective that raises, hangs, or
returns no number is recorded as failed and stepped over; a loop that was killed goes on where it
was.
Read `sampler.py` for the suggestions, `worker.py` for the processes, `plots.py` for the figures.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from surrogates.sampler import LOST, WORKER, PFNSampler, counted, step_of, write_attribute
from surrogates.spaces import Space, read_space
from surrogates.worker import Child, EvaluationError, Workers, describe, is_dead

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]
    from matplotlib.figure import Figure

Callback = Callable[[Study, FrozenTrial], None]

STARTUP_TRIALS = 10  # Sobol points; Optuna's samplers begin with ten random ones
ERROR = "error"  # user attribute of a failed trial
RETRY = "retry_of"  # user attribute of a trial that repeats a lost one
PATIENCE = 60.0  # seconds until another process gives way on SQLite
POLL = 0.2  # seconds between looks at the workers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a loop found.

    Attributes:
        x: the best point, a vector or a dict as the objective takes it; of several objectives the
            list of those on the Pareto front. None, or an empty list, if no evaluation succeeded
            and met the constraints.
        value: of the best point, nan if there is none; of several objectives (k, m).
        study: the Optuna study, with everything in it.
        interrupted: whether Ctrl-C ended the loop before the budget was spent.
    """

    x: Any
    value: Any
    study: Study
    interrupted: bool = False

    @property
    def trace(self) -> pd.DataFrame:
        """A row for each evaluation: number, state, value, best so far, parameters, seconds, error.

        The seconds are those of the suggestion and the evaluation. Of several objectives: value_0,
        value_1, ... and no best. With constraints, a column says where they were met.
        """
        return trace(self.study)

    def summary(self) -> dict[str, Any]:
        """The best, and how many evaluations ended how, as plain numbers for JSON.

        Values that are not finite are None.
        """
        trials = _evaluations(self.study)
        counts = Counter(trial.state.name.lower() for trial in trials)
        x: Any = self.x
        if isinstance(x, np.ndarray):
            x = x.tolist()
        elif isinstance(x, list):
            x = [point.tolist() if isinstance(point, np.ndarray) else point for point in x]
        value = _finite_or_none(np.asarray(self.value).tolist())
        return {"x": x, "value": value, "evaluations": dict(counts), "study": self.study.study_name}

    def __str__(self) -> str:
        if self.x is None or len(self.x) == 0:
            succeeded = any(t.state == TrialState.COMPLETE for t in _evaluations(self.study))
            return f"no evaluation {'met the constraints' if succeeded else 'succeeded'}"
        if isinstance(self.value, float):
            return f"value {self.value:.6g} at {self.summary()['x']}"
        pairs = zip(self.value.tolist(), self.summary()["x"], strict=True)
        return "\n".join(f"values {value} at {x}" for value, x in pairs)

    def plot(self) -> Figure:
        """Best so far, and the surrogate's slices through the best point; fronts for several."""
        from surrogates.plots import plot_result

        return plot_result(self.study)


def minimize(
    f: Callable[[Any], Any],
    space: Sequence[tuple[float, float]] | Mapping[str, BaseDistribution],
    budget: int = 50,
    surrogate: str = "pfn",
    seed: int = 0,
    storage: str | BaseStorage | None = None,
    workers: int = 1,
    trial_timeout: float | None = None,
    *,
    study_name: str = "pfn",
    objectives: int = 1,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Result:
    """The best point that `budget` evaluations of an expensive function found.

    - Exceptions, `sys.exit`, NaN, what is not a number, and infinite values on the good side become
      failed evaluations; infinite ones on the other side stay values. All count for the budget.
    - A warning says so if no evaluation succeeded, or none met the constraints.
    - With a storage, the same call continues the study of that name, and several processes may make
      it at once; `budget` is what they have together, and each returns once it can start no more
      of it, though others may still evaluate. Trials of a process that died on this machine
      are queued again, once; a trial whose process dies a second time has failed. Trials of other
      machines are never taken for dead: `study.tell(number, state=TrialState.FAIL)` gives one up.
    - Ctrl-C returns what there is. The evaluation that it stopped is queued again. Whatever else
      ends the loop, such as a callback's exception, has the study as its attribute `study`.
    - A progress line with the incumbent appears on a terminal.

    Args:
        f: takes a vector (d,) for a list of bounds, a dict for a dict of distributions. It returns
            a number; a sequence of numbers for several objectives; or a pair of those and a dict of
            constraints, each of which holds at values <= 0.
        space: (low, high) for each coordinate, or Optuna's distributions by name.
        budget: evaluations, those already in the storage included.
        surrogate: a name in `surrogates.available()`.
        seed: of the suggestions.
        storage: such as "sqlite:///tuning.db", or an Optuna storage; in memory by default.
        workers: processes on that storage.
        trial_timeout: seconds after which an evaluation has failed; the objective then runs in a
            child process, which is killed with all it started. Starting it takes no time of this.
        study_name: of the study in the storage.
        objectives: how many numbers f returns.
        callbacks: Optuna's, called with the study and each finished trial; `study.stop()` ends the
            loop. With several workers they run in the worker.
        options: of `PFNSampler`, whose n_startup_trials is 10 here, and of the surrogate.

    Raises:
        ValueError: bad arguments, or a storage whose study has another space or direction.

    On Linux child processes are forks, in which torch has one thread, as PyTorch's data loaders
    are; elsewhere `f` must be a function of a module, and with several workers so must callbacks.

    Example:
        >>> result = minimize(lambda x: (x[0] - 0.3) ** 2, [(0, 1)], budget=5, surrogate="sobol")
        >>> len(result.trace)
        5
    """
    return _optimize(
        StudyDirection.MINIMIZE, f, space, budget, surrogate, seed, storage, workers,
        trial_timeout, study_name, objectives, callbacks, options,
    )  # fmt: skip


def maximize(
    f: Callable[[Any], Any],
    space: Sequence[tuple[float, float]] | Mapping[str, BaseDistribution],
    budget: int = 50,
    surrogate: str = "pfn",
    seed: int = 0,
    storage: str | BaseStorage | None = None,
    workers: int = 1,
    trial_timeout: float | None = None,
    *,
    study_name: str = "pfn",
    objectives: int = 1,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Result:
    """`minimize`, but for the largest value."""
    return _optimize(
        StudyDirection.MAXIMIZE, f, space, budget, surrogate, seed, storage, workers,
        trial_timeout, study_name, objectives, callbacks, options,
    )  # fmt: skip


def recover(study: Study) -> int:
    """Queues the trials of dead processes of this machine again; how many.

    A lost trial ends as failed and does not count. The one that repeats it has its parameters and
    its place, so that a single worker goes on as if it had never stopped. A trial that was lost
    before has failed for good.
    """
    queued = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner = trial.system_attrs.get(WORKER)
        if owner is None or not is_dead(owner):
            continue
        again = RETRY not in trial.user_attrs
        try:
            if again:
                write_attribute(study, trial, LOST, "its process died")
            else:
                write_user_attribute(study, trial, ERROR, "its process died, twice")
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):
            continue  # another process was quicker
        if again:
            _queue_again(study, trial)
            queued += 1
    return queued


def trace(study: Study) -> pd.DataFrame:
    """A row for each evaluation, see `Result.trace`.

    Parameters named like another column have the prefix `params_`.

    Raises:
        ImportError: naming what is missing.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("The trace is a data frame: pip install pandas.") from error
    sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
    rows, best, trials = [], -math.inf, _evaluations(study)
    constrained = any(trial.constraints for trial in trials)
    for trial in trials:
        row: dict[str, Any] = {"number": trial.number, "state": trial.state.name.lower()}
        values = trial.values or [math.nan] * len(study.directions)
        if len(study.directions) == 1:
            complete = trial.state == TrialState.COMPLETE
            best = max(best, sign * values[0]) if complete and is_feasible(trial) else best
            row |= {"value": values[0], "best": sign * best if best > -math.inf else math.nan}
        else:
            row |= {f"value_{i}": value for i, value in enumerate(values)}
        if constrained:
            row["feasible"] = is_feasible(trial) if trial.constraints else None
        seconds = trial.duration.total_seconds() if trial.duration else math.nan
        ends = {"seconds": seconds, "error": trial.user_attrs.get(ERROR)}
        taken = {*row, *ends}
        row |= {f"params_{k}" if k in taken else k: value for k, value in trial.params.items()}
        rows.append(row | ends)
    return pd.DataFrame(rows)


def _finite_or_none(value: Any) -> Any:
    """A number or nested lists of numbers, with None for what JSON cannot say."""
    if isinstance(value, list):
        return [_finite_or_none(part) for part in value]
    return value if math.isfinite(value) else None


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether an evaluation met its constraints."""
    return all(limit <= 0 for limit in trial.constraints.values())


def optimize_command(source: str, space: Path, *, largest: bool, **settings: Any) -> Result:
    """What `pfn optimize` does: the loop for `module:function` and a TOML file of parameters.

    Raises:
        ValueError: if there is no such function or file, or a setting is bad.
    """
    if not space.is_file():
        raise ValueError(f"Expected a TOML file of parameters; there is no file {space}.")
    function = load_objective(source)
    return (maximize if largest else minimize)(function, read_space(space), **settings)


def load_objective(source: str) -> Callable[[Any], Any]:
    """The function of `module:function`, looked for in the current folder too, or `FILE.py:NAME`.

    Raises:
        ValueError: saying what is not there.
    """
    name, _, attribute = source.rpartition(":")
    if not name:
        raise ValueError(f"Expected module:function or FILE.py:FUNCTION; got {source!r}.")
    folder = "."
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"Expected FILE.py:FUNCTION; there is no file {path}.")
        folder, name = str(path.parent), path.stem
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"Importing {name!r} failed: {describe(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(f"Expected a function {attribute!r} in {name}; it has {names}.")
    return function


def _optimize(
    direction: StudyDirection,
    f: Callable[[Any], Any],
    space: Sequence[tuple[float, float]] | Mapping[str, BaseDistribution],
    budget: int,
    surrogate: str,
    seed: int,
    storage: str | BaseStorage | None,
    workers: int,
    trial_timeout: float | None,
    study_name: str,
    objectives: int,
    callbacks: Sequence[Callback],
    options: dict[str, Any],
) -> Result:
    distributions, as_vector = _read_space(space)
    if not callable(f):
        raise ValueError(f"Expected a function; got {f!r}.")
    for label, number in {"budget": budget, "workers": workers, "objectives": objectives}.items():
        if not isinstance(number, Integral) or number < 1:
            raise ValueError(f"Expected {label} as a whole number, 1 or more; got {number!r}.")
    if not isinstance(callbacks, Sequence):
        raise ValueError(f"Expected callbacks as a list of functions; got {callbacks!r}.")
    if not isinstance(storage, str | BaseStorage | None):
        raise ValueError(
            f"Expected a storage such as sqlite:///tuning.db, or one of Optuna's; got {storage!r}."
        )
    if trial_timeout is not None and not trial_timeout > 0:
        raise ValueError(f"Expected a trial_timeout > 0 seconds; got {trial_timeout}.")
    options = {"n_startup_trials": STARTUP_TRIALS, **options}
    sampler = PFNSampler(surrogate, seed, space=distributions, **options)
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        opened = _open(storage, workers, Path(folder))
        study = _open_study(opened, study_name, sampler, distributions, [direction] * objectives)
        recover(study)
        evaluate = _Evaluate(f, as_vector, tuple(study.directions))
        loop = _Loop(evaluate, distributions, budget, trial_timeout, tuple(callbacks))
        interrupted, failure = False, None
        with _Line(budget) as line:
            try:
                line.show(study)
                if workers == 1:
                    loop.run(study, [line.callback])
                else:
                    shared = opened if storage is None else storage
                    work = _Work(loop, shared, study_name, sampler)
                    _run_workers(work, study, workers, line)
            except KeyboardInterrupt:
                interrupted = True
            except Exception as error:
                failure = error
            line.show(study)
        if storage is None and workers > 1:  # out of the temporary folder
            kept = InMemoryStorage()
            optuna.copy_study(from_study_name=study_name, from_storage=opened, to_storage=kept)
            study = optuna.load_study(study_name=study_name, storage=kept, sampler=sampler)
    if failure is not None:
        failure.study = study  # type: ignore[attr-defined]
        failure.add_note("The evaluations until then are in this exception's attribute `study`.")
        raise failure
    return _result(study, as_vector, interrupted)


@dataclass(frozen=True)
class _Evaluate:
    """The values and constraints of a point; a class, which another process can import."""

    f: Callable[[Any], Any]
    as_vector: bool
    directions: tuple[StudyDirection, ...]

    def __call__(self, params: dict[str, Any]) -> tuple[list[float], dict[str, float]]:
        x = np.array(list(params.values()), dtype=np.float64) if self.as_vector else params
        try:
            answer = self.f(x)
        except (Exception, SystemExit) as error:
            raise EvaluationError(describe(error)) from error
        return _read_answer(answer, self.directions)


@dataclass(frozen=True)
class _Loop:
    """Evaluates until the budget is spent."""

    evaluate: _Evaluate
    distributions: dict[str, BaseDistribution]
    budget: int
    trial_timeout: float | None
    callbacks: tuple[Callback, ...]

    def run(self, study: Study, callbacks: Sequence[Callback] = ()) -> None:
        def stop_when_spent(study: Study, _: FrozenTrial) -> None:
            if spent(study) >= self.budget:
                study.stop()

        if spent(study) >= self.budget:
            return
        timeout = self.trial_timeout
        child = nullcontext(self.evaluate) if timeout is None else Child(self.evaluate, timeout)
        with child as call:
            study.optimize(
                lambda trial: self._objective(trial, call),
                catch=(EvaluationError,),
                callbacks=[*callbacks, *self.callbacks, stop_when_spent],
            )

    def _objective(self, trial: Trial, call: Callable[[dict[str, Any]], Any]) -> list[float]:
        study = trial.study
        frozen = study.get_trials(deepcopy=False)[trial.number]
        if step_of(study, frozen) >= self.budget:  # another process took the last evaluation
            write_attribute(study, frozen, LOST, "beyond the budget")
            study.stop()
            raise optuna.TrialPruned
        try:
            params = {name: _ask(trial, name, d) for name, d in self.distributions.items()}
            values, limits = call(params)
        except KeyboardInterrupt:
            write_attribute(study, frozen, LOST, "interrupted")
            _queue_again(study, study.trials[trial.number])
            raise
        except EvaluationError as failure:
            trial.set_user_attr(ERROR, str(failure))
            log.warning("Trial %d failed: %s", trial.number, failure)
            raise
        for key, limit in limits.items():
            trial.set_constraint(key, limit)
        return values


def spent(study: Study) -> int:
    """Evaluations that have ended or run."""
    return len(_evaluations(study, TrialState.RUNNING))


def _evaluations(study: Study, *also: TrialState) -> list[FrozenTrial]:
    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return counted(study.get_trials(deepcopy=False, states=(*ended, *also)))


def _read_answer(
    answer: Any, directions: Sequence[StudyDirection]
) -> tuple[list[float], dict[str, float]]:
    """The values and the constraints that an objective returned."""
    constraints: Mapping[Any, Any] = {}
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
        answer, constraints = answer
    values = _read_numbers(answer)
    if len(values) != len(directions):
        raise EvaluationError(
            f"Expected {len(directions)} number(s) of the objective; got {answer!r}."
        )
    best = [math.inf if d == StudyDirection.MAXIMIZE else -math.inf for d in directions]
    if any(v != v or v == b for v, b in zip(values, best, strict=True)):
        raise EvaluationError(f"The objective returned {answer!r}.")
    limits = {str(key): _read_numbers(limit) for key, limit in constraints.items()}
    if any(len(limit) != 1 or limit[0] != limit[0] for limit in limits.values()):
        raise EvaluationError(f"Expected constraints that are numbers; got {constraints!r}.")
    return values, {key: limit[0] for key, limit in limits.items()}


def _read_numbers(answer: Any) -> list[float]:
    """The numbers of an answer, none if it is something else."""
    parts = answer if isinstance(answer, list | tuple) else [answer]
    try:
        # tensors may require grad, or be elsewhere
        parts = [part.tolist() if isinstance(part, torch.Tensor) else part for part in parts]
        return np.asarray(parts, dtype=np.float64).ravel().tolist()
    except Exception:  # an answer's conversion is code like the objective's
        return []


def _ask(trial: Trial, name: str, distribution: Any) -> Any:
    """The trial's value of a parameter."""
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    suggest = (
        trial.suggest_float if isinstance(distribution, FloatDistribution) else trial.suggest_int
    )
    return suggest(
        name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def _queue_again(study: Study, trial: FrozenTrial) -> None:
    """A waiting trial with the parameters of a lost one; without any, nothing is lost."""
    params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if params:
        study.enqueue_trial(params, user_attrs={RETRY: trial.number})


def write_user_attribute(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def _read_space(
    space: Sequence[tuple[float, float]] | Mapping[str, BaseDistribution],
) -> tuple[dict[str, BaseDistribution], bool]:
    """Distributions by name, and whether they are the coordinates of a vector."""
    if isinstance(space, Mapping):
        if not space:
            raise ValueError("Expected a space of at least one parameter; got an empty dict.")
        Space(space)
        return dict(space), False
    try:
        bounds = [(float(low), float(high)) for low, high in space]
    except (TypeError, ValueError):
        bounds = []
    if not bounds or not all(-math.inf < low < high < math.inf for low, high in bounds):
        raise ValueError(
            f"Expected (low, high) with low < high for each coordinate, or a dict; got {space!r}."
        )
    return {f"x{i}": FloatDistribution(*pair) for i, pair in enumerate(bounds)}, True


def _open(storage: str | BaseStorage | None, workers: int, folder: Path) -> BaseStorage:
    """A storage of this process."""
    if storage is None:
        if workers == 1:
            return InMemoryStorage()
        return JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    if isinstance(storage, InMemoryStorage) and workers > 1:
        raise ValueError("Expected a storage that processes can share; got one in memory.")
    return open_storage(storage)


def open_storage(storage: str | BaseStorage) -> BaseStorage:
    """The storage of a URL; SQLite waits for other processes instead of failing.

    Raises:
        ValueError: if there cannot be one.
    """
    if not isinstance(storage, str):
        return storage
    waits = {"connect_args": {"timeout": PATIENCE}} if storage.startswith("sqlite") else {}
    pauses = [0.2, 0.5, 1.0]
    while True:
        try:
            return RDBStorage(storage, engine_kwargs=waits)
        except SQLAlchemyError as error:
            # another process may make the tables just now
            if not pauses or not isinstance(error, IntegrityError | OperationalError):
                place = storage.rpartition("@")[2]  # without a password
                raise ValueError(
                    "Expected a storage such as sqlite:///tuning.db, in a folder that exists; got "
                    f"{place!r}: {error.args[0]}"
                ) from error
        time.sleep(pauses.pop(0))


def _open_study(
    storage: BaseStorage,
    name: str,
    sampler: PFNSampler,
    distributions: dict[str, BaseDistribution],
    directions: list[StudyDirection],
) -> Study:
    """The study of that name, which must be one of this space and these directions."""
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        sampler=sampler,
        directions=directions,
        load_if_exists=True,
    )
    if study.directions != directions:
        raise ValueError(
            f"Expected study {name!r} to have directions {[d.name for d in directions]}; the "
            f"storage has {[d.name for d in study.directions]}. Choose another name for the study."
        )
    try:
        space = json.dumps({key: distribution_to_json(d) for key, d in distributions.items()})
    except TypeError as error:
        if not isinstance(storage, InMemoryStorage):
            raise ValueError(
                "Expected choices of None, bool, int, float and str, which a storage or workers "
                f"can share; got {distributions}."
            ) from error
        space = repr(distributions)
    if study.user_attrs.setdefault("space", space) != space:
        raise ValueError(
            f"Expected study {name!r} to have the space {list(distributions)} with the same ranges;"
            f" the storage has {study.user_attrs['space']}. Choose another name for the study."
        )
    study.set_user_attr("space", space)
    return study


@dataclass(frozen=True)
class _Work:
    """What a worker does: the loop, on a storage of its own."""

    loop: _Loop
    storage: str | BaseStorage
    study_name: str
    sampler: PFNSampler

    def __call__(self, stop: Any) -> None:
        own = Workers.reopen(self.storage, open_storage)

        def follow(study: Study, _: FrozenTrial) -> None:
            if stop.is_set():
                study.stop()

        with _quiet():
            study = optuna.load_study(study_name=self.study_name, storage=own, sampler=self.sampler)
            self.loop.run(study, [follow])
        if spent(study) < self.loop.budget:
            stop.set()


def _run_workers(work: _Work, study: Study, count: int, line: _Line) -> None:
    """Worker processes until the budget is spent, or one of them is told to stop."""
    while spent(study) < work.loop.budget:
        try:
            with Workers(work, count) as workers:
                while workers.are_alive(POLL):
                    line.show(study)
        finally:
            queued = recover(study)
        workers.raise_failure()
        if workers.stopped or not (queued or workers.died):
            break


def _result(study: Study, as_vector: bool, interrupted: bool) -> Result:
    def point(trial: FrozenTrial) -> Any:
        return np.array(list(trial.params.values())) if as_vector else dict(trial.params)

    trials = _evaluations(study)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    is_met = any(is_feasible(trial) for trial in complete)
    if complete and not is_met:
        text = f"No evaluation of {len(complete)} that succeeded met the constraints."
        warnings.warn(text, stacklevel=4)
    elif failed and not complete:
        warnings.warn(
            f"No evaluation of {len(failed)} succeeded; the last: "
            f"{failed[-1].user_attrs.get(ERROR)}",
            stacklevel=4,
        )
    if len(study.directions) > 1:
        front = study.best_trials
        values = np.array([t.values for t in front]).reshape(len(front), len(study.directions))
        return Result([point(trial) for trial in front], values, study, interrupted)
    if not is_met:
        return Result(None, math.nan, study, interrupted)
    best = study.best_trial
    return Result(point(best), best.values[0], study, interrupted)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's log without lines for each trial; of failures the loop says one of its own."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.ERROR))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class _Line:
    """The progress line; nothing where there is no terminal."""

    def __init__(self, budget: int) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
        )
        # without a thread, whose locks forks would inherit
        self.progress = Progress(
            *columns, console=console, disable=not console.is_terminal, auto_refresh=False
        )
        self.task = self.progress.add_task("", total=budget)

    def __enter__(self) -> _Line:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def callback(self, study: Study, _: FrozenTrial) -> None:
        self.show(study)

    def show(self, study: Study) -> None:
        if self.progress.disable:
            return
        trials = _evaluations(study)
        failed = sum(trial.state == TrialState.FAIL for trial in trials)
        text = f"{failed} failed" if failed else ""
        if len(study.directions) > 1:
            text = f"{len(study.best_trials)} on the front  {text}"
        elif any(trial.state == TrialState.COMPLETE for trial in trials):
            try:
                best = study.best_trial
                text = f"best {best.values[0]:.6g} in trial {best.number}  {text}"
            except ValueError:
                text = f"none feasible  {text}"
        self.progress.update(self.task, completed=len(trials), description=text, refresh=True)
