"""`PFNSampler`: any surrogate as an Optuna sampler.

A suggestion is a function of the seed, of what the storage holds, and of the trial's place among
the trials, whatever process asks; a study that was stopped continues as if it never was. Read
`acquisition.py` for how a point is chosen, `optimize.py` for the loop.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from botorch.exceptions import ModelFittingError
from botorch.models.model import Model
from linear_operator.utils.errors import NanError, NotPSDError
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from surrogates.acquisition import hold_fixed, incumbents, is_known, suggest
from surrogates.beliefs import Belief
from surrogates.fitting import check_options, fit
from surrogates.names import FITS, SAMPLERS
from surrogates.outcomes import Outcomes, read_outcomes
from surrogates.prior_fitted import MODEL, trained_for
from surrogates.spaces import Space

PARAMS = "pfn:params"  # system attributes of trials: what was suggested,
WORKER = "pfn:worker"  # by which process,
LOST = "pfn:lost"  # and why the trial does not count
_LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
FAILURES = (ModelFittingError, NotPSDError, NanError, _LinAlgError)  # of a fit
AHEAD = 1024  # points of the Sobol sequence that are looked through for a new one
ATTEMPTS = 10  # to suggest what no other process has suggested meanwhile

_ONE_AT_A_TIME = threading.Lock()  # threads of one study see each other's suggestions


class History(NamedTuple):
    """What a study knows, in the columns of a space."""

    X: Tensor  # (n, dim) evaluated
    Y: Tensor  # (n, m) for maximization, then constraints, in the surrogate's units
    constraints: int
    pending: Tensor  # (k, dim) running, failed, or pruned without a report
    outcomes: Outcomes  # whose `decode` gives Y in the users' units, for maximization


class PFNSampler(BaseSampler):
    """Suggests the parameters of trials by a surrogate, for one or several objectives.

    Parameters that all trials share are suggested together. Others, in a branch that some trials
    take, are suggested one by one, by a surrogate of the trials that have them, given the
    parameters that the trial has already. Evaluated points are not suggested again.

    - Running trials, of any process on the storage, are fantasised, and so are failed ones, so
      that a point that fails is left behind without being called bad.
    - A pruned trial counts with its last report, but as no better than the median of the completed
      ones; without a report, or with several objectives, it counts as failed.
    - Infinite values count as the largest or smallest finite one.
    - Values of a single objective that are worse than their median are seen on a logarithmic scale.
    - Constraints of `trial.set_constraint` hold at values <= 0. Trials that lack one of them count
      as failed.
    - Before there is any observation the prior predictive is the same everywhere up to the
      surface of the cube, so the first trials are points of a scrambled Sobol sequence; random
      points where their parameters are not known in advance, see `space`.
    - Where a fit breaks down numerically, a warning says so, and the trial is the next Sobol point.
    - More trials than the network of "pfn" was trained for: it sees the best, which are half of
      what it takes, and the most recent others.
    - More columns than `max_columns`: each trial changes some parameters, which are all that its
      surrogate sees, and keeps the others at the best trial's values. They are drawn without
      replacement, by their relevance to a Gaussian process: its squared inverse lengthscales.

    Args:
        surrogate: a name in `surrogates.available()`.
        seed: of everything random.
        n_startup_trials: completed trials before the surrogate is asked; at least one is needed.
            `minimize` begins with ten: a surrogate that has seen next to nothing expects most of
            the corners of the cube, which are farthest from what it has seen.
        space: the parameters, if known in advance; else they are learned from the first trial.
        prior_optimum: where the user thinks that the optimum lies, as {"lr": (1e-4, 1e-2),
            "optimizer": "adam"}; see `beliefs.Belief`.
        beta: observations after which that belief's density counts once; after n it has the power
            beta / n.
        constraints_func: values <= 0 of a finished trial, as Optuna's samplers took them before
            version 5.
        max_columns: of one surrogate; by default those that the network of "pfn" was trained for,
            else any.
        num_candidates: points of the whole space that are compared for a suggestion.
        options: of the surrogate, see `surrogates.fit`.

    Raises:
        ValueError: a name, number or option out of range.
        ModuleNotFoundError: a missing extra, with its installation.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(sampler=PFNSampler("sobol"))
        >>> study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=5)
    """

    def __init__(
        self,
        surrogate: str = "pfn",
        seed: int = 0,
        n_startup_trials: int = 0,
        *,
        space: Mapping[str, BaseDistribution] | None = None,
        prior_optimum: Mapping[str, Any] | None = None,
        beta: float = 10.0,
        constraints_func: Callable[[FrozenTrial], Sequence[float]] | None = None,
        max_columns: int | None = None,
        num_candidates: int = 1024,
        **options: Any,
    ) -> None:
        if surrogate not in (*FITS, *SAMPLERS):
            raise ValueError(f"Expected a surrogate among {[*FITS, *SAMPLERS]}; got {surrogate!r}.")
        columns = 1 if max_columns is None else max_columns
        if n_startup_trials < 0 or num_candidates < 1 or columns < 1:
            raise ValueError(
                "Expected n_startup_trials >= 0, num_candidates >= 1 and max_columns >= 1; got "
                f"{n_startup_trials}, {num_candidates} and {max_columns}."
            )
        unknown = set(prior_optimum or {}) - set(space or prior_optimum or {})
        if unknown:
            raise ValueError(
                f"Expected prior_optimum for parameters among {sorted(space or {})}; got "
                f"{sorted(unknown)}."
            )
        check_options(surrogate, options)
        self.max_columns, self.max_observations = max_columns, None
        if surrogate == "pfn":
            trained = trained_for(options.get("model", MODEL))
            self.max_columns = trained.columns if max_columns is None else max_columns
            self.max_observations = None if options.get("extrapolate_n") else trained.observations
            if self.max_columns > trained.columns:
                raise ValueError(
                    f"Expected max_columns <= {trained.columns}, for which the network was trained;"
                    f" got {max_columns}."
                )
        if space is not None:
            self._check_widths(Space(space))
            Belief(Space(space), prior_optimum or {}, beta)  # raises where it does not fit
        self.surrogate, self.seed, self.n_startup_trials = surrogate, seed, n_startup_trials
        self.space = None if space is None else dict(space)
        self.prior_optimum, self.beta = dict(prior_optimum or {}), beta
        self.constraints_func = constraints_func
        self.num_candidates, self.options = num_candidates, options

    @property
    def has_surrogate(self) -> bool:
        """Whether it is more than random or Sobol points."""
        return self.surrogate not in SAMPLERS

    def __str__(self) -> str:
        return f"PFNSampler({self.surrogate!r}, seed={self.seed})"

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Notes which process runs the trial."""
        write_attribute(study, trial, WORKER, stamp())

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The parameters that are suggested together: those of `space`, or of all trials so far."""
        if self.surrogate == "random":
            return {}
        space = self.space
        if space is None:
            trials = counted(study.get_trials(deepcopy=False))
            space = intersection_search_space(trials, include_pruned=True)
        return {name: d for name, d in space.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The values of these parameters, which other processes can read at once."""
        if not search_space:
            return {}
        space = Space(search_space)
        given = dict(trial.system_attrs.get("fixed_params", {}))
        given = {name: value for name, value in given.items() if name in search_space}
        with _ONE_AT_A_TIME:
            for attempt in range(ATTEMPTS):
                before = _others(study, trial, space)
                x = self._suggest(study, trial, space, given)
                params = space.decode(x)
                internal = {k: search_space[k].to_internal_repr(v) for k, v in params.items()}
                write_attribute(study, trial, PARAMS, json.dumps(internal))
                # written first, then read: of two processes with one idea, one sees the other's,
                # which may have been evaluated by then
                after = _others(study, trial, space)
                if is_known(x, before) or not is_known(x, after):
                    break
                # waits of different lengths, or two processes would yield in step for ever
                time.sleep(0.1 * (self._seed(trial.number, f"wait {attempt}") % 10))
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The value of a parameter, given those that the trial has already."""
        alone = Space({param_name: param_distribution})
        if self.has_surrogate and not param_distribution.single():
            given = known_params(trial)
            given.pop(param_name, None)
            trials = [
                other
                for other in counted(study.get_trials(deepcopy=False))
                if other.distributions.get(param_name) == param_distribution
            ]
            shared = intersection_search_space(trials, include_pruned=True)
            shared = {k: d for k, d in shared.items() if k in given and not d.single()}
            space = Space({**shared, param_name: param_distribution})
            given = {name: given[name] for name in shared}
            with _ONE_AT_A_TIME:
                if self._count(read_history(trials, study.directions, space, trial.number)):
                    x = self._suggest(study, trial, space, given)
                    return space.decode(x)[param_name]
        generator = torch.Generator().manual_seed(self._seed(step_of(study, trial), param_name))
        belief = self._belief(alone)
        if belief is None or not alone.dim:
            return alone.decode(alone.uniform(1, generator=generator)[0])[param_name]
        seed = int(torch.randint(2**31, (1,), generator=generator))
        return alone.decode(belief.sobol(1, seed=seed)[0])[param_name]

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Stores what `constraints_func` says of a finished trial."""
        if self.constraints_func is None or state == TrialState.FAIL:
            return
        limits = [float(value) for value in self.constraints_func(trial)]
        if any(limit != limit for limit in limits):
            raise ValueError(f"Expected constraints that are numbers; got {limits}.")
        write_attribute(study, trial, "constraints", limits)

    def reseed_rng(self) -> None:
        """Nothing: threads differ by the numbers of their trials."""

    def fit(self, study: Study, space: Space) -> tuple[Model, History]:
        """The surrogate of what a study knows, in the units of the history's Y.

        Raises:
            ValueError: if nothing is known, or the sampler has no surrogate.
        """
        trials = counted(study.get_trials(deepcopy=False))
        history = read_history(trials, study.directions, space, -1)
        if not len(history.X):
            raise ValueError("Expected a study with a completed trial; it has none.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._fit(history, self.seed), history

    def _suggest(
        self,
        study: Study,
        trial: FrozenTrial,
        space: Space,
        given: Mapping[str, Any],
    ) -> Tensor:
        """The point (dim,) for a trial, of which some parameters are given."""
        self._check_widths(space)
        step = step_of(study, trial)
        trials = counted(study.get_trials(deepcopy=False))
        history = read_history(trials, study.directions, space, trial.number)
        known = torch.cat([history.X, history.pending])
        if not self.has_surrogate or not self._count(history):
            return self._first(space, step, given, known)
        seed = self._seed(step)
        with torch.random.fork_rng(devices=[]):  # whatever a surrogate's library draws from
            torch.manual_seed(seed)
            try:
                part, columns, best = self._choose_columns(space, history, given, seed)
                seen = history._replace(
                    X=history.X[:, columns], pending=history.pending[:, columns]
                )
                model = self._fit(seen, seed)
            except FAILURES as error:
                warnings.warn(
                    f"A fit of {self.surrogate} to {len(history.X)} trials broke down, so trial"
                    f" {trial.number} is a Sobol point: {error}",
                    stacklevel=2,
                )
                return self._first(space, step, given, known)
            near = known[((known - best).abs()[:, ~columns] < 1e-9).all(-1)]
            names = part.distributions
            x = suggest(
                model,
                seen.X,
                seen.Y,
                part,
                constraints=seen.constraints,
                pending=seen.pending,
                known=near[:, columns],
                fixed={name: value for name, value in given.items() if name in names},
                belief=self._belief(part),
                num_candidates=self.num_candidates,
                seed=seed,
            )
        best[columns] = x
        return best

    def _first(self, space: Space, step: int, given: Mapping[str, Any], known: Tensor) -> Tensor:
        """The next new point of the Sobol sequence, or of all that a small space has."""
        belief = self._belief(space)
        hold, _ = hold_fixed(space, given)
        draw = space.sobol if belief is None else belief.sobol
        points = hold(draw(AHEAD, seed=self._seed(-1), skip=step))
        for x in points:
            if not is_known(x, known):
                return x
        if space.size <= AHEAD:
            generator = torch.Generator().manual_seed(self._seed(step))
            every = hold(space.enumerate())
            for x in every[torch.randperm(len(every), generator=generator)]:
                if not is_known(x, known):
                    return x
        return points[0]

    def _choose_columns(
        self, space: Space, history: History, given: Mapping[str, Any], seed: int
    ) -> tuple[Space, Tensor, Tensor]:
        """The parameters of this step's surrogate, their columns (dim,), and the rest's values.

        All, or a subset that fits in `max_columns`, free parameters first, then the relevant.
        """
        columns = torch.ones(space.dim, dtype=torch.bool)
        generator = torch.Generator().manual_seed(seed)
        best = incumbents(history.X, history.Y, history.constraints)
        pick = torch.randint(len(best), (1,), generator=generator)  # of a front, any
        several = history.Y.shape[1] - history.constraints > 1
        rest = best[pick[0] if several else 0]
        rest = hold_fixed(space, given)[0](rest)
        limit = self.max_columns
        if limit is None or space.dim <= limit:
            return space, columns, rest
        gumbel = -torch.empty(len(space.parameters)).exponential_(generator=generator).log()
        relevance = _relevance(self._within_reach(history), seed)
        score = gumbel + torch.stack([relevance[p.columns].sum().log() for p in space.parameters])
        order = score.argsort(descending=True).tolist()
        order.sort(key=lambda index: space.parameters[index].name in given)
        columns[:] = False
        for index in order:
            parameter = space.parameters[index]
            if int(columns.sum()) + parameter.width <= limit:
                columns[parameter.columns] = True
        chosen = {p.name: p.distribution for p in space.parameters if columns[p.start]}
        return Space(chosen), columns, rest

    def _check_widths(self, space: Space) -> None:
        """Refuses choices of more columns than one surrogate may have."""
        limit = self.max_columns
        wide = [p.name for p in space.parameters if limit is not None and p.width > limit]
        if wide:
            raise ValueError(
                f"Expected parameters of at most max_columns = {limit} columns, of which a choice"
                f" takes one for each of up to 16 values; {wide} are wider."
            )

    def _fit(self, history: History, seed: int) -> Model:
        seen = self._within_reach(history)
        return fit(self.surrogate, seen.X, seen.Y, seed=seed, **self.options)

    def _within_reach(self, history: History) -> History:
        """The observations that the surrogate takes, see `_keep`."""
        limit = self.max_observations
        return history if limit is None or len(history.X) <= limit else _keep(history, limit)

    def _count(self, history: History) -> int:
        """The number of observations, if there are enough for a surrogate, else 0."""
        n = len(history.X)
        return n if n >= max(1, self.n_startup_trials) else 0

    def _belief(self, space: Space) -> Belief | None:
        names = {parameter.name for parameter in space.parameters}
        if not names & set(self.prior_optimum):
            return None
        return Belief(space, self.prior_optimum, self.beta)

    def _seed(self, step: int, name: str = "") -> int:
        """A seed of its own for a step, and a parameter that is drawn alone."""
        text = f"{self.seed}:{step}:{name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1


def _keep(history: History, limit: int) -> History:
    """The best `limit // 2` observations, and the latest others, `limit` in all, in their order.

    Best are those that violate constraints least, and of these those that fewest dominate.
    """
    count = history.Y.shape[1] - history.constraints
    values, violation = history.Y[:, :count], history.Y[:, count:].clamp_min(0.0).sum(-1)
    as_good = torch.stack([(values >= y).all(-1).sum() for y in values])
    order = as_good.argsort(stable=True)
    order = order[violation[order].argsort(stable=True)]
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[order[: limit // 2]] = True
    others = (~kept).nonzero().squeeze(-1)
    kept[others[limit // 2 - limit :]] = True
    return history._replace(X=history.X[kept], Y=history.Y[kept])


def _relevance(history: History, seed: int) -> Tensor:
    """Squared inverse lengthscales (dim,) of Gaussian processes, summed over outputs."""
    model: Any = fit("gp", history.X, history.Y, seed=seed)
    models = model.models if history.Y.shape[1] > 1 else [model]
    lengthscales = torch.stack([part.covar_module.lengthscale.flatten() for part in models])
    return lengthscales.detach().square().reciprocal().sum(0)


def read_history(
    trials: Iterable[FrozenTrial],
    directions: Sequence[StudyDirection],
    space: Space,
    number: int,
) -> History:
    """What trials other than `number` say, as `PFNSampler` documents it."""
    signs = [1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in directions]
    trials = [trial for trial in trials if trial.number != number]
    keys = sorted({key for t in trials for key in t.constraints})
    evaluated: list[Tensor] = []
    rows: list[list[float]] = []
    pruned: list[bool] = []
    pending: list[Tensor] = []
    for trial in trials:
        x = _point(trial, space)
        if x is None:
            continue
        values, limits = _values(trial, len(directions)), trial.constraints
        if values is None or any(key not in limits for key in keys):
            pending.append(x)
        else:
            evaluated.append(x)
            rows.append([s * v for s, v in zip(signs, values, strict=True)])
            rows[-1] += [limits[key] for key in keys]
            pruned.append(trial.state == TrialState.PRUNED)
    Y = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(directions) + len(keys))
    Y = torch.stack([_clip_infinite(column) for column in Y.T], -1)
    stopped = torch.tensor(pruned, dtype=torch.bool)
    if bool(stopped.any()) and not bool(stopped.all()):
        middle = Y[~stopped, 0].median()
        Y[:, 0] = torch.where(stopped, Y[:, 0].clamp_max(middle), Y[:, 0])
    outcomes = read_outcomes(Y, len(directions))
    X, waiting = _stack(evaluated, space), _stack(pending, space)
    return History(X, outcomes.encode(Y), len(keys), waiting, outcomes)


def known_params(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial, those that it has not asked for yet included."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def counted(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that are not lost, see `optimize.recover`."""
    return [trial for trial in trials if LOST not in trial.system_attrs]


def step_of(study: Study, trial: FrozenTrial) -> int:
    """How many trials that count came before this one."""
    trials = counted(study.get_trials(deepcopy=False))
    return sum(other.number < trial.number for other in trials)


def stamp(pid: int | None = None) -> str:
    """What identifies a process: its host, its id, and when it began, where the system says so."""
    pid = os.getpid() if pid is None else pid
    status = Path(f"/proc/{pid}/stat")
    try:  # fields after the name, which may contain blanks; the 22nd of all is the start
        began = status.read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = ""
    return f"{socket.gethostname()}:{pid}:{began}"


def _point(trial: FrozenTrial, space: Space) -> Tensor | None:
    """The trial in the columns of the space; None if it lacks parameters, or had other ranges."""
    params: dict[str, Any] = {}
    if not trial.state.is_finished():
        stored = json.loads(trial.system_attrs.get(PARAMS, "{}"))
        params = {
            name: space.distributions[name].to_external_repr(value)
            for name, value in stored.items()
            if name in space.distributions
        }
        params |= trial.system_attrs.get("fixed_params", {})
    params |= trial.params
    for parameter in space.parameters:
        name = parameter.name
        if name not in params:
            return None
        if trial.distributions.get(name, parameter.distribution) != parameter.distribution:
            return None
    return space.encode(params)


def _values(trial: FrozenTrial, count: int) -> list[float] | None:
    """What an evaluated trial returned, or a pruned one reported last."""
    if trial.state == TrialState.COMPLETE:
        return list(trial.values)
    if trial.state == TrialState.PRUNED and count == 1 and trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
        return [value] if value == value else None
    return None


def _clip_infinite(column: Tensor) -> Tensor:
    finite = column[column.isfinite()]
    return column.clamp(finite.min(), finite.max()) if len(finite) else column.clamp(-1.0, 1.0)


def _others(study: Study, trial: FrozenTrial, space: Space) -> Tensor:
    """The points (k, dim) of all other trials."""
    trials = counted(study.get_trials(deepcopy=False))
    points = [_point(other, space) for other in trials if other.number != trial.number]
    return _stack([point for point in points if point is not None], space)


def _stack(points: list[Tensor], space: Space) -> Tensor:
    return torch.stack(points) if points else torch.zeros(0, space.dim, dtype=torch.float64)


def write_attribute(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    # Optuna has no public way for a sampler to write; its own samplers do it so
    study._storage.set_trial_system_attr(trial._trial_id, key, value)
