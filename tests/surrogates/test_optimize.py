"""Loops lose nothing: exceptions, hangs, NaN, kills, several processes, Ctrl-C."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from pfn.plot import import_pyplot
from surrogates.optimize import (
    RETRY,
    load_objective,
    maximize,
    minimize,
    open_storage,
    recover,
    spent,
    trace,
)
from surrogates.plots import _end_near, plot_best, plot_parallel, plot_slices
from surrogates.sampler import LOST, PFNSampler, counted, stamp, write_attribute
from surrogates.worker import is_dead

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
BOX = [(0.0, 1.0), (0.0, 1.0)]
GRID = {"i": IntDistribution(0, 7), "j": IntDistribution(0, 7)}
QUICK = {"num_candidates": 64}

SCRIPT = """
import os, sys, time
from optuna.distributions import IntDistribution
from surrogates.optimize import minimize

calls = 0

def f(x):
    global calls
    calls += 1
    time.sleep(600 if calls == int(os.environ["HANGS_AT"]) else 0.02)
    if isinstance(x, dict):
        return float(x["i"] + x["j"])
    return float(((x - 0.3) ** 2).sum())

grid = {"i": IntDistribution(0, 11), "j": IntDistribution(0, 11)}
storage, surrogate, budget, space, workers = sys.argv[1:]
minimize(f, grid if space == "grid" else [(0.0, 1.0)] * 2, int(budget), surrogate,
         storage=storage, workers=int(workers), num_candidates=64)
"""


def bowl(x):
    return float(((x - 0.3) ** 2).sum())


def start(folder, storage, surrogate, budget, space="box", *, hangs_at=0, workers=1):
    """A process that optimizes; each of its workers hangs at that evaluation, counted from 1."""
    path = folder / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), storage, surrogate, str(budget), space, str(workers)]
    return subprocess.Popen(command, env={**ENV, "HANGS_AT": str(hangs_at)}, cwd=folder)


def wait_for(storage, condition):
    """The study once `condition` holds of its trials."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            study = optuna.load_study(study_name="pfn", storage=storage)
            if condition(study.get_trials()):
                return study
        except Exception:  # the file is not there yet, or half made
            pass
        time.sleep(0.05)
    raise AssertionError("the other process is not where it should be")


def count(trials, state):
    return sum(trial.state == state for trial in trials)


def running(trials):
    return [trial for trial in trials if trial.state == TrialState.RUNNING]


def are_asked(trials):
    """Whether two evaluations have begun and have all that a loop writes before them."""
    begun = running(trials)
    return len(begun) == 2 and all(len(trial.params) == 2 for trial in begun)


def points(study):
    return [tuple(t.params.values()) for t in counted(study.trials) if t.state.is_finished()]


def test_a_vector_or_a_dict_goes_in_and_comes_out():
    result = minimize(bowl, BOX, budget=10, surrogate="gp", **QUICK)
    assert isinstance(result.x, np.ndarray) and result.x.shape == (2,)
    assert result.value == bowl(result.x) < 0.02
    space = {"k": IntDistribution(0, 9), "c": CategoricalDistribution(["a", "b"])}
    result = maximize(lambda p: p["k"] - (p["c"] == "a"), space, budget=20, surrogate="sobol")
    assert result.x == {"k": 9, "c": "b"} and result.value == 9.0
    assert len(set(points(result.study))) == 20


def test_the_trace_has_a_row_for_each_evaluation():
    trace = maximize(bowl, BOX, budget=5, surrogate="random").trace
    assert list(trace.columns) == [
        "number",
        "state",
        "value",
        "best",
        "x0",
        "x1",
        "seconds",
        "error",
    ]
    assert trace.best.tolist() == trace.value.cummax().tolist()


def test_parameters_named_like_a_column_keep_both_in_the_trace():
    space = {name: IntDistribution(0, 3) for name in ("value", "number", "error")}
    trace = maximize(lambda p: 10 + p["value"], space, budget=2, surrogate="sobol").trace
    assert trace.number.tolist() == [0, 1] and trace.error.isna().all()
    assert (trace.value == 10 + trace.params_value).all()


def test_exceptions_nan_and_infinities_are_stepped_over(caplog):
    def f(params):
        k = params["k"]
        if k == 0:
            raise RuntimeError("no licence")
        return {1: math.nan, 2: -math.inf, 3: math.inf, 4: "text", 5: None}.get(k, k)

    result = minimize(f, {"k": IntDistribution(0, 9)}, budget=10, surrogate="gp", **QUICK)
    assert sorted(point[0] for point in points(result.study)) == list(range(10))
    trace = result.trace.set_index("k")
    assert (trace.state[[0, 1, 2, 4, 5]] == "fail").all()
    assert (trace.state[[3, 6, 7, 8, 9]] == "complete").all()
    assert trace.value[3] == math.inf
    assert "RuntimeError: no licence" in trace.error[0] and "test_optimize.py" in trace.error[0]
    assert "nan" in trace.error[1] and "number" in trace.error[4]
    assert result.x == {"k": 6}
    assert "no licence" in caplog.text


@pytest.mark.parametrize("trial_timeout", [None, 60.0])
def test_answers_that_are_no_numbers_and_exits_are_stepped_over(trial_timeout):
    answers = {
        0: torch.tensor(3.0, requires_grad=True) * 1,  # of a graph, which does not pickle
        1: (torch.tensor([2.0]), {"c": torch.tensor(-1.0, requires_grad=True)}),
        2: (1.0, {"c": "bad"}),
        3: (1.0, {"c": None}),
        4: 10**400,
        5: lambda: None,
    }

    def f(params):
        if params["k"] == 6:
            sys.exit(2)
        return answers[params["k"]]

    space = {"k": IntDistribution(0, 6)}
    result = minimize(f, space, budget=7, surrogate="sobol", trial_timeout=trial_timeout)
    trace = result.trace.sort_values("k")
    assert trace.state.tolist() == ["complete"] * 2 + ["fail"] * 5
    assert trace.value.tolist()[:2] == [3.0, 2.0]
    words = ["'c': 'bad'", "'c': None", "1000", "lambda", "SystemExit: 2"]
    assert all(word in error for word, error in zip(words, trace.error.tolist()[2:], strict=True))
    assert result.x == {"k": 1}


def test_where_everything_fails_there_is_no_best():
    with pytest.warns(UserWarning, match="No evaluation of 3 succeeded.*division"):
        result = minimize(lambda x: 1 / 0, BOX, 3, "gp")
    assert result.x is None and math.isnan(result.value)
    assert str(result) == "no evaluation succeeded"
    assert result.plot() is not None


@pytest.mark.parametrize("objectives", [1, 2])
def test_where_nothing_meets_the_constraints_the_result_says_so(objectives):
    def f(x):
        return [x[0], 1 - x[0]][:objectives], {"c": 1.0}

    with pytest.warns(UserWarning, match="No evaluation of 3 .* met the constraints"):
        result = minimize(f, BOX, 3, "sobol", objectives=objectives)
    assert str(result) == "no evaluation met the constraints"
    if objectives == 1:
        assert result.x is None and math.isnan(result.value)
    else:
        assert result.x == [] and result.value.shape == (0, 2)
    assert json.loads(json.dumps(result.summary()))["evaluations"] == {"complete": 3}
    assert result.plot() is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_what_ends_the_loop_has_the_evaluations(monkeypatch, workers):
    def break_down(*_):
        raise RuntimeError("no such option")

    monkeypatch.setattr(PFNSampler, "_fit", break_down)
    with pytest.raises(RuntimeError, match="no such option") as caught:
        minimize(bowl, BOX, 8, "gp", workers=workers, n_startup_trials=4)
    assert "`study`" in caught.value.__notes__[0]
    rows = trace(caught.value.study)
    assert (rows.state == "complete").sum() >= 4


def test_choices_of_any_kind_live_in_memory():
    with pytest.warns(UserWarning, match="persistent storage"):
        space = {"layer": CategoricalDistribution([torch.nn.ReLU, torch.nn.Tanh])}
        result = minimize(lambda p: float(p["layer"]()(-torch.ones(()))), space, 2, "sobol")
        assert result.x == {"layer": torch.nn.Tanh}
        with pytest.raises(ValueError, match=r"Expected choices.*Tanh"):
            minimize(lambda p: 1.0, space, 2, "sobol", workers=2)


def test_a_storage_that_cannot_be_is_refused(tmp_path):
    for storage in ("a.db", "magic://a", f"sqlite:///{tmp_path}/nowhere/a.db"):
        with pytest.raises(ValueError, match="Expected a storage such as sqlite") as caught:
            open_storage(storage)
        assert storage in str(caught.value)


def test_hanging_evaluations_are_killed_with_all_they_started(tmp_path):
    def f(params):
        if params["k"] % 2 or params["k"] == 4:
            child = subprocess.Popen(["sleep", "600"])
            (tmp_path / f"{params['k']}").write_text(str(child.pid))
        if params["k"] % 2:
            time.sleep(600)
        if params["k"] == 4:
            os._exit(7)
        return params["k"]

    space = {"k": IntDistribution(0, 5)}
    result = minimize(f, space, budget=6, surrogate="sobol", trial_timeout=3.0)
    errors = result.trace.set_index("k").error
    assert all("TimeoutError" in errors[k] for k in (1, 3, 5))
    assert "code 7" in errors[4]
    assert result.x == {"k": 0}
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "4", "5"}
    for path in tmp_path.iterdir():
        status = Path(f"/proc/{path.read_text()}/stat")
        assert not status.exists() or " Z " in status.read_text()


def test_ctrl_c_keeps_what_is_done_and_the_stopped_evaluation_is_repeated():
    calls = []

    def f(x):
        calls.append(tuple(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return bowl(x)

    storage = optuna.storages.InMemoryStorage()
    result = minimize(f, BOX, budget=6, surrogate="sobol", storage=storage)
    assert result.interrupted and len(result.trace) == 3
    assert result.value == min(bowl(np.array(call)) for call in calls[:3])
    result = minimize(f, BOX, budget=6, surrogate="sobol", storage=storage)
    assert not result.interrupted and len(result.trace) == 6
    assert calls[4] == calls[3]
    assert points(result.study) == points(minimize(bowl, BOX, 6, "sobol").study)


def test_callbacks_see_each_trial_and_can_stop():
    seen = []

    def callback(study, trial):
        seen.append(trial.number)
        if trial.number == 2:
            study.stop()

    result = minimize(bowl, BOX, budget=9, surrogate="sobol", callbacks=[callback])
    assert seen == [0, 1, 2] and len(result.trace) == 3


def test_a_loop_goes_on_where_its_storage_is(tmp_path):
    storage = f"sqlite:///{tmp_path}/a.db"
    minimize(bowl, BOX, budget=3, surrogate="sobol", storage=storage)
    result = minimize(bowl, BOX, budget=5, surrogate="sobol", storage=storage)
    assert points(result.study) == points(minimize(bowl, BOX, 5, "sobol").study)
    assert len(minimize(bowl, BOX, 4, "sobol", storage=storage).trace) == 5
    with pytest.raises(ValueError, match="directions"):
        maximize(bowl, BOX, 5, "sobol", storage=storage)
    with pytest.raises(ValueError, match="space"):
        minimize(bowl, [(0.0, 2.0)] * 2, 5, "sobol", storage=storage)


def test_a_killed_loop_resumes_as_if_it_had_never_stopped(tmp_path):
    storage = f"sqlite:///{tmp_path}/a.db"
    process = start(tmp_path, storage, "gp", 8, hangs_at=5)
    wait_for(storage, lambda trials: len(trials) == 5 and len(trials[4].params) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = optuna.load_study(study_name="pfn", storage=storage).trials
    assert before[4].state == TrialState.RUNNING
    result = minimize(bowl, BOX, 8, "gp", storage=storage, **QUICK)
    trials = result.study.trials
    assert trials[4].state == TrialState.FAIL and LOST in trials[4].system_attrs
    assert trials[5].user_attrs[RETRY] == 4 and trials[5].params == trials[4].params
    assert [t.values for t in trials[:4]] == [t.values for t in before[:4]]
    assert len(result.trace) == 8
    assert points(result.study) == points(minimize(bowl, BOX, 8, "gp", **QUICK).study)


def test_a_trial_whose_process_dies_twice_has_failed():
    study = optuna.create_study()
    for _ in range(2):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        frozen = study.trials[trial.number]
        gone = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
        )
        owner = f"{stamp().split(':')[0]}:{int(gone.stdout)}:1"
        write_attribute(study, frozen, "pfn:worker", owner)
        recover(study)
    states = [(trial.state, LOST in trial.system_attrs) for trial in study.trials]
    assert states == [(TrialState.FAIL, True), (TrialState.FAIL, False)]
    assert study.trials[0].params == study.trials[1].params
    assert spent(study) == 1


def test_trials_of_living_processes_and_other_machines_are_left_alone():
    study = optuna.create_study(sampler=PFNSampler("random"))
    study.ask()
    number = study.ask().number
    other = study.trials[number]
    write_attribute(study, other, "pfn:worker", "elsewhere:1:1")
    assert recover(study) == 0
    assert count(study.trials, TrialState.RUNNING) == 2


def check_shared(storage, budget):
    trials = counted(optuna.load_study(study_name="pfn", storage=storage).trials)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * budget
    assert len({tuple(trial.params.values()) for trial in trials}) == budget


def test_two_processes_share_a_storage_without_duplicates_or_lost_trials(tmp_path):
    storage = f"sqlite:///{tmp_path}/a.db"
    processes = [start(tmp_path, storage, "sobol", 30, "grid") for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    check_shared(storage, 30)


@pytest.mark.slow
def test_two_processes_share_a_hundred_trials_of_a_surrogate(tmp_path):
    storage = f"sqlite:///{tmp_path}/a.db"
    processes = [start(tmp_path, storage, "pfn", 100, "grid") for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    check_shared(storage, 100)


@pytest.mark.parametrize("stored", [False, True])
def test_workers_share_the_budget(tmp_path, stored):
    storage = f"sqlite:///{tmp_path}/a.db" if stored else None
    deadline = time.monotonic() + 600

    def f(params):
        (tmp_path / f"{os.getpid()}.here").touch()
        while len(list(tmp_path.glob("*.here"))) < 2:  # the first worker waits for the second
            assert time.monotonic() < deadline, "there is no second worker"
            time.sleep(0.01)
        return params["i"]

    result = minimize(f, GRID, 20, "sobol", storage=storage, workers=2)
    assert len(set(points(result.study))) == len(result.trace) == 20
    assert len({t.system_attrs["pfn:worker"] for t in result.study.trials}) == 2
    assert result.value == 0.0


@pytest.mark.parametrize("die", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(1)])
def test_a_worker_that_dies_is_replaced_and_its_point_tried_once_more(tmp_path, die):
    def f(params):
        if (params["i"], params["j"]) == point:
            with (tmp_path / "deaths").open("a") as file:
                file.write("x")
            die()
        return params["i"]

    point = points(minimize(lambda p: p["i"], GRID, 3, "sobol").study)[1]
    result = minimize(f, GRID, 6, "sobol", workers=2)
    assert (tmp_path / "deaths").read_text() == "xx"
    assert len(result.trace) == 6
    assert result.trace.error.dropna().tolist() == ["its process died, twice"]


@pytest.fixture
def spawned(monkeypatch):
    """New interpreters, as macOS and Windows have."""
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr("surrogates.worker._context", lambda: context)


def test_new_interpreters_evaluate_a_function_of_a_module(tmp_path, monkeypatch, spawned):
    text = "import time\ndef f(p):\n    time.sleep(600 if p['i'] == 3 else 0)\n    return p['i']\n"
    (tmp_path / "objective_to_import.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    f = load_objective("objective_to_import:f")
    space = {"i": IntDistribution(0, 3)}
    result = minimize(f, space, 4, "sobol", workers=2, trial_timeout=3.0)
    trace = result.trace.sort_values("i")
    assert trace.value.tolist()[:3] == [0.0, 1.0, 2.0]
    assert trace.state.tolist()[3] == "fail" and "TimeoutError" in trace.error.tolist()[3]


@pytest.mark.parametrize("settings", [{"workers": 2}, {"trial_timeout": 60.0}])
def test_new_interpreters_refuse_a_local_function(spawned, settings):
    with pytest.raises(ValueError, match="a function of a module") as caught:
        minimize(lambda x: 1.0, BOX, 2, "sobol", **settings)
    assert not counted(caught.value.study.trials)


def test_workers_end_with_the_process_that_started_them(tmp_path):
    storage = f"sqlite:///{tmp_path}/a.db"
    process = start(tmp_path, storage, "sobol", 60, "grid", hangs_at=3, workers=2)
    study = wait_for(storage, lambda trials: len(trials) == 6 and are_asked(trials))
    workers = {trial.system_attrs["pfn:worker"] for trial in running(study.trials)}
    assert len(workers) == 2 and not any(is_dead(worker) for worker in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while not all(is_dead(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    assert len(study.trials) == 6


def test_constraints_and_several_objectives():
    def f(x):
        return [x[0], 1 - x[0] + x[1]], {"low": 0.25 - x[0]}

    result = minimize(f, BOX, budget=8, surrogate="gp", objectives=2, **QUICK)
    assert result.value.shape == (len(result.x), 2)
    assert all(x[0] >= 0.25 for x in result.x)
    assert {"value_0", "value_1"} <= set(result.trace.columns)
    assert result.plot() is not None and plot_parallel(result.study) is not None
    assert len(json.loads(json.dumps(result.summary()))["x"]) == len(result.x)


@pytest.mark.parametrize(("search", "sign"), [(minimize, 1.0), (maximize, -1.0)])
def test_a_terrible_evaluation_does_not_set_the_value_axis(search, sign):
    def f(x):
        return sign * (1e6 if x[0] > 0.95 else (x[0] - 0.3) ** 2)

    study = search(f, [(0, 1)], budget=8, surrogate="sobol").study
    study.enqueue_trial({"x0": 0.99})
    study.optimize(lambda trial: f([trial.suggest_float("x0", 0, 1)]), n_trials=1)
    ax = plot_best(study)
    low, high = ax.get_ylim()
    kept = [t.value for t in study.trials if abs(t.value) < 1e6]
    assert low < min(kept) and max(kept) < high and high - low < 2 * (max(kept) - min(kept))
    assert [text.get_text() for text in ax.texts] == ["1 worse, not shown"]


def test_plots_of_a_mixed_space(tmp_path):
    space = {
        "rate": FloatDistribution(1e-4, 1.0, log=True),
        "layers": IntDistribution(1, 5),
        "kind": CategoricalDistribution(["a", "b"]),
    }

    def f(params):
        if params["layers"] == 5:
            raise ValueError("too deep")
        return math.log10(params["rate"]) ** 2 + params["layers"] + (params["kind"] == "a")

    result = minimize(f, space, budget=8, surrogate="gp", **QUICK)
    figure = result.plot()
    figure.savefig(tmp_path / "a.png")
    labels = {axes.get_xlabel() for axes in figure.axes} | {
        axes.get_xlabel() for part in figure.subfigs for axes in part.axes
    }
    assert {*space, "trial"} <= labels
    assert minimize(f, space, budget=3, surrogate="sobol").plot() is not None


def test_a_surrogate_of_fewer_columns_than_the_study_has_no_slices():
    result = minimize(bowl, BOX, 4, "gp", n_startup_trials=4, max_columns=1)
    assert len(result.plot().axes) == 1
    with pytest.raises(ValueError, match="all columns"):
        plot_slices(result.study)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"space": []}, "low, high"),
        ({"space": [(1.0, 0.0)]}, "low < high"),
        ({"space": {}}, "at least one"),
        ({"budget": 0}, "budget"),
        ({"budget": "3"}, "budget"),
        ({"f": 3}, "function"),
        ({"callbacks": print}, "callbacks"),
        ({"storage": Path("a.db")}, "storage"),
        ({"workers": 0}, "workers"),
        ({"trial_timeout": -1.0}, "trial_timeout"),
        ({"surrogate": "magic"}, "surrogate"),
        ({"workers": 2, "storage": optuna.storages.InMemoryStorage()}, "share"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        minimize(**{"f": bowl, "space": BOX, "surrogate": "sobol", **arguments})


def test_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def loss(p):\n    print('evaluating')\n"
        "    if p['k'] == 3:\n        raise ValueError('bad k')\n"
        "    return (p['k'] - 2) ** 2\n"
    )
    (tmp_path / "space.toml").write_text("[k]\nlow = 0\nhigh = 5\n")
    options = "--space space.toml --budget 6 --surrogate sobol --storage sqlite:///a.db".split()
    command = [sys.executable, "-m", "pfn", "optimize", "mine:loss", *options]

    def run(*more):
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=ENV, capture_output=True, text=True
        )

    done = run("--json", "--out", "trace.csv", "--plot", "a.png")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["x"] == {"k": 2} and answer["value"] == 0.0
    assert answer["evaluations"] == {"complete": 5, "fail": 1}
    assert "bad k" in done.stderr
    assert len((tmp_path / "trace.csv").read_text().splitlines()) == 7
    assert (tmp_path / "a.png").stat().st_size > 0
    for option in (["--plot", "nowhere/a.png"], ["--plot", "a.foo"], ["--out", "nowhere/a.csv"]):
        early = run(*option)  # nothing is evaluated for a file that cannot be written
        assert early.returncode == 2 and not early.stdout and option[1] in early.stderr
    (tmp_path / "space.toml").write_text("[k]\nlow = 0\n")
    bad = run()
    assert bad.returncode == 2 and bad.stderr.startswith("Error: Expected [k]")


def test_a_command_without_success_says_so(tmp_path):
    (tmp_path / "mine.py").write_text("def loss(p):\n    return float('nan')\n")
    (tmp_path / "space.toml").write_text("[k]\nlow = 0\nhigh = 5\n")
    options = "mine:loss --space space.toml --budget 2 --surrogate sobol --json".split()
    command = [sys.executable, "-m", "pfn", "optimize", *options]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["x"] is None and answer["value"] is None and answer["evaluations"] == {"fail": 2}


def test_infinite_values_are_null_in_json():
    result = minimize(lambda x: math.inf, BOX, budget=2, surrogate="sobol")
    assert result.value == math.inf
    assert json.loads(json.dumps(result.summary(), allow_nan=False))["value"] is None
    two = minimize(lambda x: (x[0], math.inf), BOX, budget=2, surrogate="sobol", objectives=2)
    values = json.loads(json.dumps(two.summary(), allow_nan=False))["value"]
    assert all(value[0] is not None and value[1] is None for value in values)


def test_a_parameter_may_be_called_feasible():
    space = {"feasible": FloatDistribution(0, 1)}

    def f(params):
        if params["feasible"] > 0.6:
            raise ValueError("no")
        return params["feasible"], {"c": -1.0}

    table = minimize(f, space, budget=6, surrogate="sobol").trace
    failed = table["state"] == "fail"
    assert 0 < failed.sum() < 6 and table["feasible"][failed].isna().all()
    assert (table["params_feasible"][failed] > 0.6).all()


def test_infeasible_evaluations_are_circles_and_no_best():
    result = minimize(lambda x: (x[0], {"c": x[0] - 0.5}), [(0, 1)], budget=8, surrogate="sobol")
    met = result.trace["feasible"]
    assert 0 < met.sum() < 8
    fine, circles = plot_best(result.study).collections
    assert len(fine.get_offsets()) == met.sum() and len(circles.get_offsets()) == 8 - met.sum()
    with pytest.warns(UserWarning, match="met the constraints"):
        none = minimize(lambda x: (x[0], {"c": 1.0}), [(0, 1)], budget=3, surrogate="sobol")
    assert not plot_best(none.study).lines


def test_plots_show_the_first_parameters_and_say_how_many_there_are():
    space = {name: FloatDistribution(0, 1) for name in "edcba"}
    result = minimize(lambda p: sum(p.values()), space, budget=6, surrogate="gp", **QUICK)
    bottom = result.plot().subfigs[1]
    assert [ax.get_xlabel() for ax in bottom.axes if ax.get_xlabel()] == list("edcb")
    assert bottom.get_suptitle().startswith("4 of 5")


def test_an_interrupted_study_has_a_plot():
    result = minimize(bowl, BOX, budget=6, surrogate="gp", **QUICK)
    result.study.enqueue_trial({"x0": 0.5, "x1": 0.5})  # as what Ctrl-C stopped
    assert len(result.plot().subfigs) == 2


def test_the_value_axis_ends_near_the_values_and_is_free_otherwise():
    ax = import_pyplot().subplots()[1]
    ax.plot([0, 1], [-50, 50])  # as an interval that reaches far
    _end_near(ax, np.array([0.0, 1.0, 2.0]), 1.0, 0.5)
    assert ax.get_ylim() == (-1.0, 3.0)
    ax = import_pyplot().subplots()[1]
    ax.plot([0, 1], [0, 2])
    _end_near(ax, np.array([0.0, 1.0, 2.0]), 1.0, 0.5)
    ax.plot([0, 1], [10, 12])
    assert ax.get_ylim()[1] > 12


def test_objectives_are_found_or_refused(tmp_path, monkeypatch):
    (tmp_path / "objective_of_mine.py").write_text("def f(p):\n    return 1\n")
    assert load_objective(f"{tmp_path}/objective_of_mine.py:f")({}) == 1
    for source, words in {
        "f": "module:function",
        "objective_of_mine:g": "'g'",
        "nowhere_at_all:f": "Importing",
        f"{tmp_path}/nothing.py:f": "no file",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_objective(source)
