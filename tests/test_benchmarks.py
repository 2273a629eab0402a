"""Each benchmark's arithmetic on something small whose answer is known."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from botorch.utils.multi_objective.pareto import is_non_dominated
from torch.distributions import Normal

from pfn.monitor import training_flops
from pfn.pretrain import PretrainConfig, architecture, plan
from priors import GaussianProcess


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module


def test_splits_are_in_units_of_the_training_targets_and_disjoint(benchmark_module) -> None:
    uci: ModuleType = benchmark_module("uci")
    table = torch.arange(240.0).double().reshape(80, 3)  # each row is told by its first entry

    task = uci.draw_task(table, n=50, split=3)

    assert task.x.shape == (50, 2) and task.x_test.shape == (30, 2)
    rows = torch.cat([task.x, task.x_test])[:, 0]
    assert torch.equal(rows.sort().values, table[:, 0])
    assert float(task.y.mean()) == pytest.approx(0, abs=1e-12)
    assert float(task.y.std()) == pytest.approx(1, rel=1e-12)


def test_scores_of_the_true_distribution_are_its_entropy_deviation_and_coverage(
    benchmark_module,
) -> None:
    uci: ModuleType = benchmark_module("uci")
    m = 40_000
    y = 2 * torch.randn(m, generator=torch.Generator().manual_seed(0)).double()
    task = uci.Task(torch.zeros(1, 1), torch.zeros(1), torch.zeros(m, 1), y)

    truth = Normal(torch.zeros(m), torch.full((m,), 2.0))
    scores = uci.score(lambda task: uci.Answer(truth), task)

    entropy = 0.5 * math.log(2 * math.pi * math.e * 4)
    assert scores["nll"] == pytest.approx(entropy, abs=4 * math.sqrt(0.5 / m))
    assert scores["rmse"] == pytest.approx(2, abs=4 * math.sqrt(2 / m))
    assert scores["coverage_90"] == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / m))


def test_differences_pair_the_splits_that_both_contenders_ran(benchmark_module) -> None:
    uci: ModuleType = benchmark_module("uci")

    def runs(**nll: float) -> dict[str, dict[str, float]]:
        return {f"{name[:-1]}/50/{name[-1]}": {"nll": value} for name, value in nll.items()}

    results = {
        "PFN": runs(yacht0=1.0, yacht1=2.0, yacht2=9.0, energy0=0.0, energy1=0.0),
        "NUTS": runs(yacht0=0.5, yacht1=1.9, energy0=0.1, energy1=0.1),
    }
    energy, yacht, mean = uci.compare(results)

    assert yacht["splits"] == 2
    assert yacht["nll_difference"] == pytest.approx(0.3)  # of 0.5 and 0.1
    assert yacht["standard_error"] == pytest.approx(0.2)
    assert energy["nll_difference"] == pytest.approx(-0.1)
    assert mean["nll_difference"] == pytest.approx(0.1)
    assert mean["standard_error"] == pytest.approx(0.1)  # 0.2 and 0, over two sets


@pytest.mark.parametrize("name", ["normals", "student-t", "20 bars"])
def test_every_head_of_the_study_is_a_density(benchmark_module, name: str) -> None:
    studies: ModuleType = benchmark_module("studies")
    generator = torch.Generator().manual_seed(0)
    variant = studies.Variant(head=name, components=4)
    head = studies.make_head(variant, lambda: torch.randn(10_000, generator=generator))
    raw = head.bias + 0.5 * torch.randn(len(head.bias), generator=generator)
    z = torch.linspace(-200, 200, 800_001)  # a Student-t above 2 degrees has 4e-5 beyond

    log_odds, means, log_stds = torch.randn(3, 1, 1, 4, generator=generator)
    experts = studies.Experts(log_odds, means, (0.5 * log_stds).exp())
    density = head.log_prob(raw[None, None], experts, z[:, None, None]).flatten().double().exp()

    # each of the jumps between bars costs the trapezoidal rule up to half a step, 2.5e-4
    assert float(torch.trapezoid(density, z.double())) == pytest.approx(1, abs=2e-3)


def test_a_study_trains_judges_and_remembers(benchmark_module, tmp_path: Path) -> None:
    studies: ModuleType = benchmark_module("studies")
    variant = studies.Variant(prior="heavy-tails", log_n_temperature=False, queries=16)
    memory = tmp_path / "runs.json"

    first = studies.run(variant, 0.2, memory, batch=4)
    again = studies.run(variant, 0.2, memory, batch=4)
    other = studies.run(replace(variant, seed=1), 0.2, memory, batch=4)

    assert first["steps"] >= 1 and math.isfinite(first["loss"])
    assert again["loss"] == first["loss"] != other["loss"]


def test_contexts_of_uniform_sizes_have_as_many_tokens(benchmark_module) -> None:
    studies: ModuleType = benchmark_module("studies")
    uniform = studies.Variant("gp", uniform_contexts=True)
    config = uniform.config(1.0)

    sizes = [studies.sizes_of(uniform, config, step, 0) for step in range(400)]

    n = torch.tensor([float(size.context) for size in sizes])
    error = config.max_context / math.sqrt(12 * len(sizes))
    assert float(n.mean()) == pytest.approx(config.max_context / 2, abs=4 * error)
    for size in sizes:
        per_task = size.context + config.queries
        assert abs(size.batch * per_task - config.tokens) <= per_task / 2
    other = studies.sizes_of(uniform, replace(config, seed=1), 7, 0)
    assert other.context != sizes[7].context
    own = studies.sizes_of(studies.Variant("gp"), config, 7, 0)
    assert own == studies.plan(config, 7, 0)


def test_an_answer_is_scored_by_the_mean_log_density_of_its_queries(benchmark_module) -> None:
    papers: ModuleType = benchmark_module("papers")
    y = torch.tensor([0.0, 1.0, 3.0])
    context = torch.zeros(2, 1), torch.zeros(2)

    def answer(context: object, x_query: torch.Tensor) -> Normal:
        time.sleep(0.01)
        return Normal(torch.zeros(len(x_query)), torch.ones(len(x_query)))

    found = papers.timed(answer, context, torch.zeros(3, 1), y)

    assert found.log_prob == pytest.approx(-0.5 * math.log(2 * math.pi) - 10 / 6)
    assert found.seconds >= 0.01


def test_measured_steps_are_those_whose_operations_are_counted(benchmark_module) -> None:
    speed: ModuleType = benchmark_module("speed")
    config = PretrainConfig(
        max_context=8, width=16, heads=2, components=2, queries=4, tokens=64, bf16=False, tasks=1
    )
    prior = GaussianProcess(lengthscale=0.3, outputscale=1.0, noise=0.1)

    clock, work = speed.run_steps(prior, config, 2)

    assert len(clock.steps) == len(clock.sampling) == 3
    assert all(
        0 < share < wall for share, (wall, _) in zip(clock.sampling, clock.steps, strict=True)
    )
    sizes = [plan(config, step, part) for step in (1, 2) for part in range(config.micro_batches)]
    network = architecture(prior, config)
    assert work.operations == sum(training_flops(network, s, config.queries) for s in sizes)
    assert work.tokens == sum(s.batch * (s.context + s.buffer + config.queries) for s in sizes)


def test_contenders_take_turns_and_quick_ones_are_called_several_times(
    benchmark_module, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: ModuleType = benchmark_module("common")
    calls: list[str] = []
    clock = {"wall": 0.0, "cpu": 0.0}
    clocks = SimpleNamespace(perf_counter=lambda: clock["wall"], process_time=lambda: clock["cpu"])
    monkeypatch.setattr(common, "time", clocks)

    def contender(name: str, wall: float, cpu: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            clock["wall"] += wall
            clock["cpu"] += cpu

        return call

    contenders = {"quick": contender("quick", 2e-4, 1e-4), "slow": contender("slow", 0.02, 0.01)}
    timings = common.measure(contenders, repeats=3, at_least=0.0101)

    turns = [name for name, _ in itertools.groupby(calls)]
    assert turns == ["quick", "slow"] * 4  # the first to see how long each takes
    assert calls.count("slow") == 2 + 3 and calls.count("quick") == 2 + 3 * 51  # 10.2 ms a turn
    assert timings["slow"] == pytest.approx((0.02, 0.01))
    assert timings["quick"] == pytest.approx((2e-4, 1e-4))


def test_held_out_draws_come_with_their_exact_posterior_density(benchmark_module) -> None:
    peers: ModuleType = benchmark_module("peers")
    questions = peers.ask(7, 3, generator=torch.Generator().manual_seed(0), m=5)

    posterior = peers.PRIOR.posterior((questions.x, questions.y), questions.query)
    density = torch.stack([posterior.log_prob(y) for y in questions.targets.unbind(-1)], dim=-1)

    torch.testing.assert_close(questions.log_density, density, rtol=1e-6, atol=1e-6)
    share = posterior.cdf(questions.targets.movedim(-1, 0)).movedim(0, -1)
    assert torch.equal((32 * share).floor().long(), torch.arange(32).expand(3, 5, 32))


def test_a_gap_is_the_mean_difference_of_log_densities(benchmark_module) -> None:
    peers: ModuleType = benchmark_module("peers")
    generator = torch.Generator().manual_seed(0)
    questions = {n: peers.ask(n, 2, generator=generator) for n in (3, 4)}
    worse = {n: batch.log_density - n / 10 for n, batch in questions.items()}

    row = peers.describe("worse", worse, 1.0, 1, questions)

    assert row["gap, nats"] == pytest.approx(0.35) and row["n = 4"] == pytest.approx(0.4)
    assert row["standard error"] == pytest.approx(0.1 / math.sqrt(3) / 2)


def test_gradients_of_a_cold_nuts_are_counted_to_as_many_effective_draws(benchmark_module) -> None:
    refine: ModuleType = benchmark_module("refine")
    one, two = torch.zeros(1, 1), torch.tensor([[3.0, 3.0]])  # equally likely kernels
    diagnostics = refine.Diagnostics(one, one, one, one + 600.0, one, one + 10.0)
    chains, warmup, draws = refine.DEFAULT[:3]
    cost = 10.0 * chains * (warmup + draws / 2)  # half as many draws are enough
    assert refine.cold_gradients(diagnostics, 300.0) == pytest.approx(cost)
    both = refine.Diagnostics(two, two, two, two * 100, two, torch.tensor([[10.0, 30.0]]))
    cost = 40.0 * chains * (warmup + draws)  # kernels share the draws: 600 are effective in all
    assert refine.cold_gradients(both, 600.0) == pytest.approx(cost)


def test_a_divergence_is_that_of_two_normals(benchmark_module) -> None:
    refine: ModuleType = benchmark_module("refine")
    exact, answer = Normal(torch.zeros(()).double(), 1.0), Normal(torch.tensor(0.1).double(), 1.0)
    y = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert refine.divergence(exact, answer, y) == pytest.approx(0.1**2 / 2, rel=0.03)
    assert refine.divergence(exact, exact, y) == 0


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # by linear_operator
def test_gpytorch_draws_the_tasks_of_the_prior_that_it_is_timed_against(benchmark_module) -> None:
    speed: ModuleType = benchmark_module("speed")
    torch.manual_seed(0)
    for build in (speed.ExactGP, speed.botorch_gp):
        drawn = [speed.draw(build, 20, 5) for _ in range(150)]
        # Medians over tasks of mean squares: e^0.5 outputscale, e^-4 noise, both log-normal.
        f, noise = (torch.stack(part) for part in zip(*((f, y - f) for f, y in drawn), strict=True))
        for values, log_median, log_std in ((f[:, 0].abs(), 0.5, 0.8), (noise, -4.0, 1.5)):
            log_squares = values.square().flatten().log()
            # log of a chi-square with one degree of freedom: mean -1.27, variance pi^2 / 2
            error = 4 * math.sqrt((log_std**2 + math.pi**2 / 2) / 150)
            assert float(log_squares.mean()) == pytest.approx(log_median - 1.27, abs=error)


def test_the_hypervolume_is_botorchs(benchmark_module) -> None:
    objectives: ModuleType = benchmark_module("objectives")
    values = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)).double()
    reference = torch.tensor([0.8, 0.9], dtype=torch.float64)
    expected = Hypervolume(-reference).compute(-values[is_non_dominated(-values)])
    assert objectives.hypervolume(values.numpy(), (0.8, 0.9)) == pytest.approx(expected)
    assert objectives.hypervolume(values.numpy(), (-1.0, -1.0)) == 0


def test_the_lander_brakes_and_turns_as_its_constants_say(benchmark_module) -> None:
    objectives: ModuleType = benchmark_module("objectives")
    known = np.array([0.5, 1.0, 0.4, 0.55, 0.5, 1.0, 0.5, 0.5, 0.0, 0.5, 0.05, 0.05])

    def fire(x=0.0, y=0.0, speed_x=0.0, speed_y=0.0, angle=0.0, turning=0.0, leg=0.0) -> int:
        state = np.array([x, y, speed_x, speed_y, angle, turning, leg, 0.0], np.float32)
        engine: int = objectives.fire(state, known)
        return engine

    assert fire(speed_y=-0.2) == objectives.DOWN  # rise = 0.5 * 0.2 > 0.05
    assert fire(speed_y=-0.09) == objectives.COAST
    assert fire(speed_y=-0.2, angle=0.5) == objectives.RIGHT  # turn = -0.25 outweighs rise
    assert fire(x=0.5) == objectives.DOWN  # rise = 0.5 * 0.55 * 0.5, turn = 0.5 * 0.25
    assert fire(x=0.5, y=1.0) == objectives.LEFT
    assert fire(x=0.5, y=1.0, leg=1.0) == objectives.COAST  # it stands


def test_noisy_losses_are_true_values_where_the_least_was_seen(benchmark_module) -> None:
    bo: ModuleType = benchmark_module("bo")
    problem = benchmark_module("objectives").noisy()
    seen, true = np.array([3.0, 1.0, 2.0, 0.5]), np.array([1.0, 4.0, 0.0, 2.0])
    assert bo.losses_after_each(problem, seen, true).tolist() == [1.0, 4.0, 4.0, 2.0]


def test_ranks_share_ties_and_regrets_are_relative_to_random_search(benchmark_module) -> None:
    bo: ModuleType = benchmark_module("bo")
    ends = {"a": [1.0, 1.0], "b": [1.0, 3.0], "random": [5.0, 2.0]}  # method: loss of each seed
    losses = {
        (method, "Branin", seed): np.full(40, value)
        for method, values in ends.items()
        for seed, value in enumerate(values)
    }
    losses["a", "Branin", 2] = np.full(40, 0.5)  # a seed that others lack sets only the best
    found = {m: bo.on_problem(m, list(ends), "Branin", 40, losses) for m in ends}
    assert {m: rank for m, (rank, _) in found.items()} == {"a": 1.25, "b": 2.25, "random": 2.5}
    assert found["random"][1] == 1.0
    assert found["a"][1] == pytest.approx((1.0 - 0.5) / (3.5 - 0.5))


def test_labels_are_apart_and_in_order(benchmark_module) -> None:
    places = benchmark_module("bo").apart(np.array([0.3, 0.0, 0.31, 0.3, 2.0]), 0.1)
    assert np.argsort(places, kind="stable").tolist() == [1, 0, 3, 2, 4]
    assert np.diff(np.sort(places)).min() > 0.099


def test_the_report_writes_tables_between_its_marks_and_nowhere_else(
    benchmark_module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report: ModuleType = benchmark_module("report")
    facts = {"versions": {"torch": "2"}, "command": "python x", "date": "today", "hardware": "one"}
    rows = [{"what": "a", "ms": 12.3456, "ratio": None}, {"what": "b", "ms": 1234.5, "ratio": 2}]
    (tmp_path / "peers.json").write_text(json.dumps({"rows": rows, **facts}))
    readme = tmp_path / "README.md"
    readme.write_text("Before.\n\n<!-- tables -->\nold\n<!-- end of tables -->\n\nAfter.\n")
    front = tmp_path / "front.md"
    front.write_text("A.\n\n<!-- certificates -->\n\n<!-- end of certificates -->\n\nB.\n")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "PROJECT_README", front)
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    report.main()
    once = readme.read_text()
    report.main()

    assert readme.read_text() == once and "old" not in once
    assert once.startswith("Before.\n") and once.endswith("\nAfter.\n")
    assert "| what | ms | ratio |\n| :-- | --: | --: |\n| a | 12.3 |  |\n| b | 1234 | 2 |" in once
    assert "`python x`, today, on one; torch 2." in once
    assert front.read_text().startswith("A.\n") and front.read_text().endswith("\nB.\n")
    assert "| gap, nats per query | 0.0" in front.read_text()


def test_the_readme_has_the_certificates_of_the_cards(benchmark_module) -> None:
    report: ModuleType = benchmark_module("report")
    assert report.markdown(report.certificates()) in report.PROJECT_README.read_text()


def test_runs_of_other_weights_do_not_count(benchmark_module, tmp_path: Path) -> None:
    bo: ModuleType = benchmark_module("bo")
    shipped = bo.weights("pfn")
    rows = [{"method": "pfn", "weights": w} for w in (shipped, "other")] + [{"method": "pfn"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pfn.jsonl").write_text(text + '{"method": "pf')  # killed in a line
    (tmp_path / "gp.jsonl").write_text(json.dumps({"method": "gp"}) + "\n")
    assert bo.read(tmp_path) == [{"method": "gp"}, rows[0]]


def test_smooth_data_and_their_misfits_are_what_they_are_called(benchmark_module) -> None:
    trust: ModuleType = benchmark_module("trust")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 400, 1, dtype=torch.float64, generator=generator)
    f, e = trust.smooth(x, 30, generator)
    torch.testing.assert_close(f.std(1), torch.ones(30).double())
    place = x[0, :, 0]
    made = {name: make(place, f, e) - f for name, (make, _) in trust.MISFITS.items()}
    outlier = made["one outlier, 10 noise deviations"]
    torch.testing.assert_close((outlier - 0.1 * e)[:, 0], torch.ones(30).double())
    heavy = made["Student-t noise, 1.5 degrees of freedom"].flatten() / 0.1
    # quartiles of the law are at 0.873; the standard error of a quartile of 12,000 draws is 0.02
    assert float(heavy.abs().median()) == pytest.approx(0.873, abs=0.06)
    left_and_right = made["noise 0.03 on the left, 0.6 on the right"]
    ratio = left_and_right[:, place > 0.5].std() / left_and_right[:, place <= 0.5].std()
    assert float(ratio) == pytest.approx(20, rel=0.1)


def test_the_check_of_the_benchmark_is_that_of_a_context(benchmark_module, monkeypatch) -> None:
    trust: ModuleType = benchmark_module("trust")
    monkeypatch.setattr(trust, "NULL", 59)
    model = trust.pfn.load("gp-1d")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 30, 1, dtype=torch.float64, generator=generator)
    f, e = trust.smooth(x, 3, generator)
    y = f + 0.1 * e
    y[1, 4] += 3.0
    found = trust._check(model, x.expand(3, -1, -1), y, None, generator)
    assert [p <= 0.05 for p, _ in found] == [False, True, False]
    alone = [model.condition((x[0], row)).check(draws=59) for row in y]
    assert [check.verdict for check in alone] == ["consistent", "conflict", "consistent"]
    outlier = list(alone[1].p_values).index("outlier")
    assert found[1][1][outlier] == pytest.approx(alone[1].p_values["outlier"], abs=0.01)


def test_a_power_law_is_found_again(benchmark_module) -> None:
    compute: ModuleType = benchmark_module("compute")
    tasks = np.array([1e4, 3e4, 4e5])
    gaps = 0.2 * tasks**-0.3
    slope, error = compute.power_law(tasks, gaps, 0.1 * gaps)
    assert slope == pytest.approx(-0.3)
    assert error == pytest.approx(0.1 / (math.sqrt(3) * np.log(tasks).std()))


def test_a_power_law_with_a_limit_is_found_again(benchmark_module) -> None:
    compute: ModuleType = benchmark_module("compute")
    tasks = np.array([4e3, 1.7e4, 7e4])
    losses = 1.3 + 20 * tasks**-0.6
    slope, gap = compute.law_with_limit(tasks, -np.diff(losses))
    assert slope == pytest.approx(-0.6)
    assert gap == pytest.approx(losses[-1] - 1.3)
    for gains in (np.log(tasks[1:] / tasks[:-1]), np.array([0.1, -0.01]), np.array([0.1, 1e-8])):
        with pytest.raises(ValueError, match="shrink per logarithm"):
            compute.law_with_limit(tasks, gains)


def test_the_error_of_a_law_with_a_limit_is_that_of_its_gains(benchmark_module) -> None:
    compute: ModuleType = benchmark_module("compute")
    tasks = np.array([4e3, 1.6e4, 6.4e4])
    gains, errors = -np.diff(20 * tasks**-0.6), np.array([1e-3, 5e-4])
    rows = [{"tasks": each} for each in tasks]
    for row, gain, error in zip(rows[1:], gains, errors, strict=True):
        row |= {compute.GAIN: gain, compute.GAIN_ERROR: error}
    with pytest.raises(ValueError, match="three runs"):
        compute.fit_losses(rows[:2])
    (law,) = compute.fit_losses(rows)
    # evenly spaced, the slope is minus the logarithm of the gains' ratio over that of the tasks
    expected = math.hypot(*(errors / gains)) / math.log(4)
    assert law["exponent"] == pytest.approx(-0.6)
    assert law["standard error"] == pytest.approx(expected, rel=1e-3)
    assert law["gap of the last run"] == pytest.approx(20 * tasks[-1] ** -0.6)
    assert law["compute that halves the gap"] == pytest.approx(2 ** (1 / 0.6))


def test_gains_of_runs_are_paired_by_task(benchmark_module) -> None:
    compute: ModuleType = benchmark_module("compute")
    prior = GaussianProcess(lengthscale=0.3, outputscale=1.0, noise=0.1)
    offsets = torch.linspace(0.1, 0.3, 6).double()  # how much worse the first is, by task

    class Exact:
        """The prior's own posterior, made worse by a constant of each task."""

        def __init__(self, offsets: torch.Tensor) -> None:
            self.offsets = offsets

        def predict(self, context, x_query, *, standardize: bool) -> SimpleNamespace:
            assert not standardize
            exact = prior.posterior(context, x_query)
            return SimpleNamespace(
                log_prob=lambda y_query: exact.log_prob(y_query) - self.offsets[:, None]
            )

    cells = [(5, 1), (9, 1)]
    first, second = compute.measure_losses([Exact(offsets), Exact(0 * offsets)], prior, cells, 6)
    assert set(first) == {compute.LOSS, "n = 5", "n = 9"}
    assert second[compute.GAIN] == pytest.approx(float(offsets.mean()))
    assert first[compute.LOSS] - second[compute.LOSS] == pytest.approx(second[compute.GAIN])
    expected = float(offsets.std()) / math.sqrt(2 * 6)  # two cells of six tasks
    assert second[compute.GAIN_ERROR] == pytest.approx(expected)
