"""The sampler passes Optuna's own suite, and keeps what its docstring promises."""

import math
import sys

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from optuna.trial import TrialState, create_trial

import pfn
import surrogates.sampler
from surrogates.outcomes import read_outcomes
from surrogates.sampler import (
    LOST,
    History,
    PFNSampler,
    _keep,
    known_params,
    read_history,
    step_of,
    write_attribute,
)
from surrogates.spaces import Space

optuna.logging.set_verbosity(optuna.logging.ERROR)

LINE = {"x": FloatDistribution(0.0, 1.0)}
PLANE = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}
QUICK = 64  # candidates


class Suite(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's tests of samplers."""

    surrogate: str

    @pytest.fixture
    def sampler(self):
        return lambda: PFNSampler(self.surrogate, num_candidates=QUICK)


class TestRandom(Suite):
    surrogate = "random"


class TestSobol(Suite):
    surrogate = "sobol"


@pytest.mark.slow
class TestGP(Suite):
    surrogate = "gp"


@pytest.mark.slow
class TestPFN(Suite):
    surrogate = "pfn"


def make_study(surrogate="gp", directions=("minimize",), **options):
    options = {"num_candidates": QUICK, **options}
    return optuna.create_study(directions=directions, sampler=PFNSampler(surrogate, **options))


def add(study, params, distributions, values=None, state=TrialState.COMPLETE, **more):
    study.add_trial(
        create_trial(params=params, distributions=distributions, values=values, state=state, **more)
    )


def add_random(study, space, n, f):
    for values in torch.rand(n, len(space), generator=torch.Generator().manual_seed(0)).tolist():
        params = dict(zip(space, values, strict=True))
        add(study, params, space, [f(params)])


def bowl(trial):
    return (trial.suggest_float("x", 0, 1) - 0.3) ** 2 + (trial.suggest_float("y", 0, 1) - 0.6) ** 2


def history_of(study, space):
    return read_history(study.get_trials(), study.directions, Space(space), -1)


def test_a_bowl_is_minimised_in_a_dozen_trials():
    study = make_study(space=PLANE)
    study.optimize(bowl, n_trials=12)
    assert study.best_value < 1e-3


def test_suggestions_are_a_function_of_seed_and_storage_not_of_the_process():
    whole = make_study(space=PLANE, seed=4)
    whole.optimize(bowl, n_trials=7)
    first = make_study(space=PLANE, seed=4)
    first.optimize(bowl, n_trials=4)
    second = make_study(space=PLANE, seed=4)  # another sampler, as after a restart
    for trial in first.trials:
        second.add_trial(trial)
    torch.manual_seed(99)
    second.optimize(bowl, n_trials=3)
    assert [t.params for t in second.trials] == [t.params for t in whole.trials]
    other = make_study(space=PLANE, seed=5)
    other.optimize(bowl, n_trials=1)
    assert other.trials[0].params != whole.trials[0].params


def test_startup_trials_are_one_sobol_sequence():
    study = make_study("sobol", space=PLANE, seed=1)
    study.optimize(bowl, n_trials=8)
    x = torch.tensor([list(t.params.values()) for t in study.trials], dtype=torch.float64)
    for column in x.T:  # a scrambled net: one point in each eighth
        assert sorted((column * 8).floor().int().tolist()) == list(range(8))


@pytest.mark.parametrize("prior_optimum", [None, {"i": (2, 5)}])
def test_a_grid_is_seen_as_a_whole_before_a_point_comes_back(prior_optimum):
    grid = {"i": IntDistribution(0, 11), "j": IntDistribution(0, 11)}
    study = make_study("sobol", space=grid, prior_optimum=prior_optimum)
    for _ in range(145):
        study.tell(study.ask(grid), 0.0)
    points = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(points[:144])) == 144 and points[144] in points[:144]


def test_running_trials_of_others_are_known_and_never_repeated():
    study = make_study(space={"k": IntDistribution(0, 9)})
    for k in (2, 7):
        add(study, {"k": k}, {"k": IntDistribution(0, 9)}, [abs(k - 5.0)])
    trials = [study.ask({"k": IntDistribution(0, 9)}) for _ in range(8)]
    assert sorted([2, 7, *(trial.params["k"] for trial in trials)]) == list(range(10))


def test_a_suggestion_is_readable_before_it_is_asked_for():
    study = make_study(space=PLANE)
    add(study, {"x": 0.1, "y": 0.2}, PLANE, [1.0])
    trial = study.ask()
    x = trial.suggest_float("x", 0, 1)  # y is suggested, but not asked for
    pending = history_of(study, PLANE).pending
    assert pending.shape == (1, 2) and float(pending[0, 0]) == x


def test_failed_trials_are_left_behind():
    study = make_study(space=PLANE)

    def objective(trial):
        value = bowl(trial)
        if trial.params["x"] < 0.5:  # where the optimum would be
            raise RuntimeError("no licence")
        return value

    study.optimize(objective, n_trials=14, catch=(RuntimeError,))
    points = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(points)) == len(points)
    assert study.best_trial.params["x"] < 0.7  # towards the edge of what works


def test_pruned_trials_count_with_their_last_report_but_no_better_than_the_median():
    study = make_study(directions=("maximize",))
    for x, value in ((0.1, 1.0), (0.2, 2.0), (0.3, 3.0)):
        add(study, {"x": x}, LINE, [value])
    pruned = {"state": TrialState.PRUNED}
    add(study, {"x": 0.4}, LINE, intermediate_values={0: 9.0, 5: 1.5}, **pruned)
    add(study, {"x": 0.5}, LINE, intermediate_values={3: 99.0}, **pruned)
    add(study, {"x": 0.6}, LINE, **pruned)
    add(study, {"x": 0.7}, LINE, intermediate_values={3: math.nan}, **pruned)
    history = history_of(study, LINE)
    y = history.outcomes.decode(history.Y)
    assert y[:, 0].tolist() == pytest.approx([1.0, 2.0, 3.0, 1.5, 2.0])
    assert history.pending[:, 0].tolist() == [0.6, 0.7]


def test_infinite_values_count_as_the_extreme_finite_ones():
    study = make_study()
    for x, value in ((0.1, 1.0), (0.2, math.inf), (0.3, 5.0), (0.4, -math.inf)):
        add(study, {"x": x}, LINE, [value])
    history = history_of(study, LINE)
    y = -history.outcomes.decode(history.Y)[:, 0]
    assert y.tolist() == pytest.approx([1.0, 5.0, 5.0, 1.0])
    study = make_study(space=LINE)
    add(study, {"x": 0.2}, LINE, [math.inf])
    assert 0 <= study.ask(LINE).params["x"] <= 1


def test_trials_of_other_ranges_and_lost_trials_do_not_count():
    study = make_study(space=LINE)
    add(study, {"x": 0.5}, LINE, [1.0])
    add(study, {"x": 1.5}, {"x": FloatDistribution(0.0, 2.0)}, [0.0])
    assert len(history_of(study, LINE).X) == 1
    trial = study.ask()
    frozen = study.get_trials()[trial.number]
    assert step_of(study, frozen) == 2
    write_attribute(study, frozen, LOST, "a test")
    number = study.ask().number
    again = study.get_trials()[number]
    assert again.number == 3 and step_of(study, again) == 2


def test_constraints_keep_the_optimum_where_they_hold():
    study = make_study(space=PLANE)

    def objective(trial):
        value = bowl(trial)
        trial.set_constraint("x", 0.5 - trial.params["x"])
        return value

    study.optimize(objective, n_trials=12)
    assert 0.5 <= study.best_trial.params["x"] < 0.56
    assert study.best_value < 0.2**2 + 0.02


def test_constraints_func_of_older_studies_is_stored():
    study = make_study(space=PLANE, constraints_func=lambda trial: [trial.params["x"] - 0.5])
    study.optimize(bowl, n_trials=3)
    for trial in study.trials:
        assert list(trial.constraints.values()) == [trial.params["x"] - 0.5]
    assert history_of(study, PLANE).constraints == 1


def test_two_objectives_spread_over_the_front():
    study = make_study(space=PLANE, directions=("minimize", "maximize"))

    def objective(trial):
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        return (x - 0.2) ** 2 + (y - 0.5) ** 2, -((x - 0.8) ** 2) - (y - 0.5) ** 2

    study.optimize(objective, n_trials=10)
    front = [trial.params["x"] for trial in study.best_trials]
    assert len(front) >= 4 and max(front) - min(front) > 0.2


def test_branches_are_learned_from_the_trials_that_took_them():
    study = make_study(seed=2)

    def objective(trial):
        kind = trial.suggest_categorical("kind", ["near", "far"])
        if kind == "near":
            return (trial.suggest_float("a", 0, 1) - 0.25) ** 2
        return 0.5 + (trial.suggest_float("b", 0, 1) - 0.75) ** 2

    study.optimize(objective, n_trials=14)
    assert study.best_trial.params["kind"] == "near"
    assert study.best_value < 5e-3
    assert sum(trial.params["kind"] == "near" for trial in study.trials) > 7


def test_enqueued_values_are_kept_and_the_rest_is_suggested_for_them():
    study = make_study(space=PLANE)
    study.optimize(bowl, n_trials=8)
    study.enqueue_trial({"x": 0.9})
    trial = study.ask()
    assert known_params(study.trials[trial.number]) == {"x": 0.9}
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    assert x == 0.9
    assert abs(y - 0.6) < 0.3
    study.tell(trial, 1.0)


def test_many_columns_move_in_subsets_around_the_best():
    space = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(12)}
    study = make_study(space=space, max_columns=4)
    add_random(study, space, 5, lambda params: sum(params.values()))
    best = study.best_trial.params
    trial = study.ask(space)
    moved = [name for name in space if abs(trial.params[name] - best[name]) > 1e-12]
    assert 1 <= len(moved) <= 4
    study.tell(trial, 0.0)
    later = study.ask(space)
    assert [n for n in space if abs(later.params[n] - trial.params[n]) > 1e-12] != moved


def test_the_network_moves_as_many_columns_as_it_was_trained_for(untrained):
    assert PFNSampler("pfn").max_columns == pfn.load("bo").card.architecture.max_features
    space = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(15)}
    for model in (untrained, str(untrained), pfn.load(untrained)):
        study = make_study("pfn", space=space, model=model)
        add(study, dict.fromkeys(space, 0.5), space, [1.0])
        params = study.ask(space).params
        assert sum(value != 0.5 for value in params.values()) <= 12
    with pytest.raises(ValueError, match="max_columns <= 12"):
        PFNSampler("pfn", model=untrained, max_columns=13)


def test_choices_wider_than_a_surrogate_are_refused_by_name():
    space = {**LINE, "kind": CategoricalDistribution(["a", "b", "c", "d"])}
    with pytest.raises(ValueError, match=r"max_columns = 3 columns.*\['kind'\] are wider"):
        PFNSampler("gp", space=space, max_columns=3)
    study = make_study(max_columns=3)  # which learns the space from its first trial
    study.tell(study.ask(space), 1.0)
    with pytest.raises(ValueError, match=r"\['kind'\] are wider"):
        study.ask(space)


def test_long_studies_go_on_with_the_best_and_the_latest(untrained):
    study = make_study("pfn", space=LINE, model=untrained)  # which was trained for 64
    for i in range(260):
        add(study, {"x": i / 260}, LINE, [abs(i - 100)])
    assert 0 <= study.ask(LINE).params["x"] <= 1  # without a warning either
    model, history = study.sampler.fit(study, Space(LINE))
    assert len(history.X) == 260
    seen = (model.train_X[:, 0] * 260).round().int().tolist()
    assert seen == [*range(84, 116), *range(228, 260)]


def test_of_several_objectives_the_front_and_what_is_feasible_are_kept():
    x = torch.arange(6.0, dtype=torch.float64).unsqueeze(-1)
    y = torch.tensor([[0, 2], [2, 0], [1, 1], [0, 0], [3, 3], [-1, -1]], dtype=torch.float64)
    limits = torch.tensor([0, -1, 0, 0, 1, -1], dtype=torch.float64).unsqueeze(-1)
    outcomes = read_outcomes(y, 2)
    history = History(x, torch.cat([y, limits], -1), 1, x[:0], outcomes)
    assert _keep(history, 6).X.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert _keep(history, 5).X.flatten().tolist() == [0, 1, 3, 4, 5]
    assert _keep(history, 2).X.flatten().tolist() == [0, 5]


def test_of_many_columns_those_that_matter_move_most_often():
    space = {f"x{i}": FloatDistribution(0.0, 1.0) for i in range(12)}
    study = make_study(space=space, max_columns=3)
    add_random(study, space, 20, lambda params: (params["x3"] - 0.3) ** 2)
    moves = dict.fromkeys(space, 0)
    for _ in range(6):
        best = study.best_trial.params
        trial = study.ask(space)
        for name in space:
            moves[name] += abs(trial.params[name] - best[name]) > 1e-12
        study.tell(trial, (trial.params["x3"] - 0.3) ** 2)
    assert moves["x3"] >= 4  # of 6; three of twelve at random are 1.5
    assert study.best_value < 1e-3


@pytest.mark.parametrize("max_columns", [None, 1])  # with 1, the relevance is fitted first
def test_a_fit_that_breaks_down_costs_no_trial(monkeypatch, max_columns):
    def broken(*args, **options):
        torch.rand(1)
        raise torch.linalg.LinAlgError("not positive-definite")

    study = make_study(space=PLANE, max_columns=max_columns)
    study.optimize(bowl, n_trials=2)
    monkeypatch.setattr(surrogates.sampler, "fit", broken)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="fit of gp to 2 trials broke down, so trial 2 is a Sobol"):
        study.optimize(bowl, n_trials=1)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    study.optimize(bowl, n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4


def test_a_belief_about_the_optimum_leads_the_first_trials():
    space = {"lr": FloatDistribution(1e-6, 1.0, log=True), "c": CategoricalDistribution([0, 1, 2])}
    study = make_study(space=space, prior_optimum={"lr": (1e-4, 1e-2), "c": 1})
    for value in (0.3, 0.31, 0.29, 0.3):
        study.tell(study.ask(space), value)
    rates = [trial.params["lr"] for trial in study.trials]
    assert all(5e-5 < rate < 2e-2 for rate in rates)
    assert sum(trial.params["c"] == 1 for trial in study.trials) >= 3


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="surrogate"):
        PFNSampler("magic")
    with pytest.raises(ValueError, match="n_startup_trials"):
        PFNSampler("gp", n_startup_trials=-1)
    with pytest.raises(ValueError, match="prior_optimum"):
        PFNSampler("gp", space=PLANE, prior_optimum={"z": (0, 1)})
    with pytest.raises(ValueError, match="prior_optimum"):
        PFNSampler("gp", space=PLANE, prior_optimum={"x": (0, 7)})
    with pytest.raises(ValueError, match="max_columns"):
        PFNSampler("gp", max_columns=0)
    with pytest.raises(ValueError, match="model among"):
        PFNSampler("pfn", model="magic")


@pytest.mark.parametrize("surrogate", surrogates.available())
def test_unknown_options_are_refused_before_the_first_trial(surrogate):
    with pytest.raises(ValueError, match=rf"options of '{surrogate}' among .*\['n_startup'\]"):
        PFNSampler(surrogate, n_startup=3)


def test_a_missing_extra_is_told_before_the_first_trial(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro", None)
    with pytest.raises(ModuleNotFoundError, match=r"hmc-bnn needs numpyro: pip install 'pfn\[ref"):
        PFNSampler("hmc-bnn")


def test_an_untrained_network_suggests_too(untrained):
    study = make_study("pfn", space=PLANE, model=untrained)
    study.optimize(bowl, n_trials=3)
    assert len({trial.params["x"] for trial in study.trials}) == 3
