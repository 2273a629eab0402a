"""`StopRule` and `CurvePruner`: what is stopped, what is not, and why."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import optuna
import pytest
import torch

from priors import LearningCurves
from surrogates import CurvePruner, StopRule, extrapolate
from surrogates.extrapolation import Reader
from surrogates.pruning import find_siblings
from surrogates.stopping import Criterion, _percent, judge, judge_again

EPOCHS = 40
GOOD = 0.95 - 0.5 / np.sqrt(np.arange(1.0, EPOCHS + 1))  # still rising: 0.87 at the end
POOR = 0.50 - 0.3 * 0.6 ** np.arange(EPOCHS)  # flat at 0.5 after ten epochs


def run(rule: StopRule, values) -> int | None:
    """The step after which a run is stopped, if it is."""
    for step, value in enumerate(values, 1):
        if rule.update(value).stop and step < len(values):
            return step
    return None


def test_a_hopeless_run_is_stopped_and_a_promising_one_is_not() -> None:
    stopped = run(StopRule(EPOCHS, best=0.86), POOR)
    assert stopped is not None and stopped < EPOCHS / 2
    assert run(StopRule(EPOCHS, best=0.86), GOOD) is None
    assert run(StopRule(EPOCHS, best=0.14, mode="min", bounds=(0, 1)), 1 - GOOD) is None
    assert run(StopRule(EPOCHS, best=0.14, mode="min", bounds=(0, 1)), 1 - POOR) == stopped


def test_a_loss_in_any_unit_is_judged_alike() -> None:
    loss = 0.8 + 1.5 * 0.6 ** np.arange(EPOCHS)
    steps = [run(StopRule(EPOCHS, best=u * 0.3, mode="min"), u * loss) for u in (1.0, 1e3, 1e-3)]
    assert steps[0] is not None and len(set(steps)) == 1


def test_a_diverged_run_is_stopped() -> None:
    values = [2.3, 1.9, 1.5, 1.2, 1.1, 1.0, 0.95] + [math.nan] * 10
    rule = StopRule(EPOCHS, best=0.9, mode="min")
    assert run(rule, values) in range(8, 18)
    decision = rule.decide()
    assert decision.stop and not decision.pause
    assert "diverged at the end with probability" in decision.reason


def test_without_an_incumbent_a_run_is_stopped_when_nothing_is_left_to_gain() -> None:
    assert run(StopRule(EPOCHS), GOOD) is None
    assert run(StopRule(EPOCHS, min_delta=0.01), POOR) is not None


def test_a_leader_is_measured_by_its_own_best() -> None:
    rule = StopRule(EPOCHS, best=0.3, min_delta=0.05)
    for value in POOR[:36]:
        decision = rule.update(value)
    assert decision.stop and "its own best" in decision.reason


def test_nothing_is_stopped_in_the_warm_up_nor_before_the_least_step() -> None:
    assert run(StopRule(EPOCHS, 0.99, warmup=12), POOR) >= 13
    assert run(StopRule(EPOCHS, 0.99, min_steps=20), POOR) >= 20


def test_as_many_updates_in_a_row_as_patience_says_must_speak_for_it() -> None:
    first = {p: run(StopRule(EPOCHS, 0.99, patience=p), POOR) for p in (1, 2, 5)}
    assert first[2] == first[1] + 1 and first[5] == first[1] + 4


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_decision_made_anew_is_that_of_updates(patience: int) -> None:
    values = [*POOR[:7], 0.8, *POOR[8:20]]  # hopeless, hopeful, and hopeless again
    rule = StopRule(EPOCHS, 0.99, warmup=3, patience=patience)
    steps = [float(step) for step in range(1, len(values) + 1)]
    stops = []
    for count, value in enumerate(values, 1):
        decision = rule.update(value)
        again = judge_again(rule.criterion, values[:count], steps[:count], 0.99, Reader())
        assert (again.stop, again.reason) == (decision.stop, decision.reason)
        stops.append(decision.stop)
    assert any(stops) and not any(stops[: 2 + patience])


def test_more_confidence_stops_later() -> None:
    values = 0.7 - 0.4 / np.sqrt(np.arange(1.0, EPOCHS + 1))
    stops = [run(StopRule(EPOCHS, 0.72, confidence=c), values) or EPOCHS for c in (0.6, 0.9, 0.999)]
    assert stops == sorted(stops) and stops[0] < stops[-1]


def test_reasons_say_what_was_decided_and_on_what() -> None:
    rule = StopRule(EPOCHS, best=0.86)
    early = rule.update(POOR[0])
    assert "too early" in early.reason and math.isnan(early.probability)
    for value in POOR[1:20]:
        late = rule.update(value)
    assert late.stop
    for words in ("After step 20 of 40", "0.86", "less than 5 %", "expected at the end"):
        assert words in late.reason
    low, high = late.final[1:]
    assert low < late.final[0] < high and 0.45 < late.final[0] < 0.6


def test_a_paused_run_may_resume_when_the_incumbent_changes() -> None:
    rule = StopRule(EPOCHS, best=0.86)
    for value in POOR[:15]:
        decision = rule.update(value)
    assert decision.stop
    rule.best = 0.4
    assert not rule.decide().stop
    rule.best = 0.86
    assert rule.decide().stop and rule.decide().probability == decision.probability


def test_a_near_miss_is_paused_and_a_hopeless_run_is_not() -> None:
    decisions = []
    for best in np.linspace(0.5, 0.98, 100):
        criterion = Criterion(EPOCHS, patience=1)
        decisions.append(judge(criterion, POOR[:32].tolist(), list(range(1, 33)), float(best)))
    assert any(d.pause and d.stop for d in decisions)
    assert decisions[-1].stop and not decisions[-1].pause
    assert all(d.pause for d in decisions if d.stop and d.probability >= 0.005)


def test_the_state_goes_through_json_and_continues() -> None:
    rule, whole = StopRule(EPOCHS, best=0.86), StopRule(EPOCHS, best=0.86)
    for value in POOR[:9]:
        rule.update(value)
        whole.update(value)
    again = StopRule(EPOCHS)
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    for value in POOR[9:20]:
        assert again.update(value).reason == whole.update(value).reason
    assert pickle.loads(pickle.dumps(again)).decide().reason == whole.decide().reason


def test_steps_may_be_irregular() -> None:
    at = [1, 2, 5, 9, 14, 20, 27, 30]
    rule = StopRule(EPOCHS, best=0.86)
    for step in at:
        decision = rule.update(POOR[step - 1], step)
    assert decision.stop
    with pytest.raises(ValueError, match="increasing"):
        rule.update(0.5, 30)
    with pytest.raises(ValueError, match="horizon of at least"):
        rule.update(0.5, 41)
    assert rule.steps == at  # nothing was noted


def test_a_curve_unlike_any_of_the_prior_is_not_stopped_where_that_is_checked() -> None:
    waves = 0.5 + 0.4 * np.sin(np.arange(1, 31) / 3)  # no training rises and falls like this
    steps = list(range(1, 31))
    assert Reader().surprise(waves, 33) < 1e-4 < Reader().surprise(POOR[:30], 33)
    for check, stops in ((False, True), (True, False)):
        decision = judge(Criterion(33, check_prior=check, patience=1), waves, steps, 0.9999)
        assert decision.probability < 0.05
        assert decision.stop == stops and ("unlike any" in decision.reason) == check
    assert judge(Criterion(33, check_prior=True, patience=1), POOR[:30], steps, 0.999).stop


def test_p_values_of_draws_of_the_prior_are_not_small() -> None:
    tasks = LearningCurves(resolution=3e-4).sample(
        150, 30, 1, generator=torch.Generator().manual_seed(4)
    )
    p = [
        Reader().surprise(y.clamp(0, 1), 1.0, x.tolist(), "max", (0, 1))
        for x, y in zip(tasks.x[..., 0], tasks.y, strict=True)
    ]
    assert sum(value < 0.01 for value in p) <= 12  # of 150, where 1.5 are expected of a posterior


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"horizon": 0}, "horizon"),
        ({"mode": "best"}, "mode among"),
        ({"bounds": (1, 0)}, "low < high"),
        ({"confidence": 1.0}, "confidence between"),
        ({"min_delta": -1}, "min_delta"),
        ({"warmup": -1}, "warmup"),
        ({"patience": 0}, "patience"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        StopRule(**{"horizon": 10, **arguments})


def test_a_value_to_beat_tells_the_bounds_too() -> None:
    rule = StopRule(20, best=20.0, warmup=2)
    for value in (0.05, 0.2, 0.35, 0.5):  # of a score without limit, not an accuracy
        decision = rule.update(value)
    assert decision.curve is not None and not math.isfinite(decision.curve.metric.top)
    rule = StopRule(20, best=-1.0, mode="min", warmup=2)
    for value in (0.9, 0.5, 0.3, 0.2):
        decision = rule.update(value)
    assert decision.curve is not None and not math.isfinite(decision.curve.metric.top)


def test_runs_of_any_length_are_judged() -> None:
    rule = StopRule(50_000, best=0.9, warmup=3)
    for value in (0.1, 0.2, 0.25, 0.3, 0.33):
        decision = rule.update(value)
    assert decision.curve is not None and 0 <= decision.probability <= 1


def test_probabilities_read_well_in_words() -> None:
    words = ["below 0.01 %", "1.2 %", "50 %", "99.9 %", "99.99 %", "above 99.99 %"]
    assert [_percent(p) for p in (3e-7, 0.0123, 0.5, 0.999, 0.9999, 1.0)] == words
    assert [_percent(p, "5 %") for p in (0.0496, 0.04999, 0.05, 0.0502)] == [
        "4.96 %", "4.999 %", "5 %", "5.02 %",
    ]  # fmt: skip


# Optuna


def make_study(direction: str = "maximize", **arguments) -> optuna.Study:
    return optuna.create_study(
        direction=direction, pruner=CurvePruner(EPOCHS, **arguments), storage=None
    )


def report(study: optuna.Study, values, steps=None) -> optuna.trial.FrozenTrial:
    trial = study.ask()
    for step, value in zip(steps or range(1, len(values) + 1), values, strict=True):
        trial.report(float(value), step)
        if trial.should_prune():
            return study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return study.tell(trial, float(values[-1]))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_study_prunes_the_hopeless_and_says_why(sign: int) -> None:
    direction = "maximize" if sign > 0 else "minimize"
    study = make_study(direction, bounds=(0, 1) if sign > 0 else (-1, 0))
    assert report(study, sign * POOR).state.name == "COMPLETE"  # nothing to compare with
    assert report(study, sign * GOOD).state.name == "COMPLETE"
    bad = report(study, sign * POOR)
    assert bad.state.name == "PRUNED" and bad.last_step < EPOCHS / 2
    assert 0.4 < sign * bad.user_attrs["curve:final"] < 0.6
    low, high = bad.user_attrs["curve:interval"]
    assert low < bad.user_attrs["curve:final"] < high
    assert bad.user_attrs["curve:probability"] < 0.05 and "beats" in bad.user_attrs["curve:reason"]


def test_trials_may_report_at_other_steps_or_count_from_nothing() -> None:
    study = make_study()
    report(study, GOOD)
    tens = report(study, POOR[4::5], [5, 10, 15, 20, 25, 30, 35, 40])
    assert tens.state.name == "PRUNED"
    from_zero = report(study, POOR, list(range(EPOCHS)))
    assert from_zero.state.name == "PRUNED"
    assert report(study, GOOD + 0.02, list(range(EPOCHS))).state.name == "COMPLETE"


def test_it_decides_on_what_the_storage_holds_and_can_be_pickled(tmp_path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(
        direction="maximize", pruner=CurvePruner(EPOCHS), storage=url, study_name="s"
    )
    report(study, GOOD)
    trial = study.ask()
    verdicts = []
    for step, value in enumerate(POOR[:12], 1):
        trial.report(float(value), step)
        pruner = pickle.loads(pickle.dumps(CurvePruner(EPOCHS)))
        other = optuna.load_study(study_name="s", storage=url, pruner=pruner)
        verdicts.append((trial.should_prune(), other.pruner.prune(other, other.trials[-1])))
    assert all(a == b for a, b in verdicts) and verdicts[-1] == (True, True)


def test_a_pruner_reads_siblings_where_they_have_parameters_in_common() -> None:
    study = make_study(siblings=True)
    assert report(study, GOOD).state.name == "COMPLETE"  # without parameters: by itself
    assert report(study, POOR).state.name == "PRUNED"
    distributions = {
        "lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
    }
    study = make_study(siblings=True)
    for lr, values in ((1e-3, GOOD), (1e-2, POOR), (2e-2, POOR), (3e-2, POOR)):
        study.enqueue_trial({"lr": lr, "kind": "b"})
        trial = study.ask(distributions)
        for step, value in enumerate(values, 1):
            trial.report(float(value), step)
        study.tell(trial, float(values[-1]))
    trial = study.ask(distributions)
    trial.report(0.3, 1)
    frozen = study.trials[-1]
    siblings, place = find_siblings(frozen, study.trials[:-1], EPOCHS)
    places = [tuple(sibling.hyperparameters.tolist()) for sibling in siblings]
    assert len(set(places)) == 4 and all(len(values) == 3 for values in places)
    assert place is not None and len(place) == 3 and len(siblings[0].values) == EPOCHS
    study.enqueue_trial({"lr": 2.5e-2, "kind": "b"})
    bad = study.ask(distributions)
    for step, value in enumerate(POOR, 1):
        bad.report(float(value), step)
        if bad.should_prune():
            break
    assert step < EPOCHS / 2
    told = study.trials[-1]
    alone = extrapolate(POOR[:step], EPOCHS)[-1].icdf(0.5)
    beside = extrapolate(
        POOR[:step],
        EPOCHS,
        siblings=find_siblings(told, study.trials[:4], EPOCHS)[0],
        hyperparameters=find_siblings(told, study.trials[:4], EPOCHS)[1],
    )[-1].icdf(0.5)
    assert told.user_attrs["curve:final"] == pytest.approx(float(beside), abs=1e-4)
    assert float(beside) != pytest.approx(float(alone), abs=1e-4)


def test_no_trial_is_pruned_before_enough_are_complete_nor_at_its_last_report() -> None:
    study = make_study(n_startup_trials=3)
    report(study, GOOD)
    assert report(study, POOR).state.name == "COMPLETE"
    assert report(study, POOR).state.name == "COMPLETE"
    assert report(study, POOR).state.name == "PRUNED"
    with pytest.raises(ValueError, match="n_startup_trials"):
        CurvePruner(10, n_startup_trials=0)
    with pytest.raises(ValueError, match="confidence"):
        CurvePruner(10, confidence=2)
