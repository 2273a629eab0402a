"""Suggestions maximise what they say, are valid, new, and the same for the same seed."""

import math

import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.acquisition.multi_objective.analytic import ExpectedHypervolumeImprovement
from botorch.optim import optimize_acqf
from botorch.utils.multi_objective.box_decompositions.non_dominated import (
    FastNondominatedPartitioning,
)
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch.distributions import Normal

import surrogates
from surrogates.acquisition import (
    GAIN,
    _moments,
    _reference_point,
    incumbents,
    is_known,
    make_acquisition,
    maximize_acquisition,
    suggest,
)
from surrogates.beliefs import Belief
from surrogates.draws import FewDraws
from surrogates.spaces import Space

CUBE = Space({f"x{i}": FloatDistribution(0.0, 1.0) for i in range(2)})
MIXED = Space(
    {
        "x": FloatDistribution(0.0, 1.0),
        "k": IntDistribution(0, 6),
        "c": CategoricalDistribution(["a", "b", "c"]),
    }
)
KINDS = torch.tensor([0.0, 0.7, 0.2], dtype=torch.float64)


def bowl(X):
    return -(X - 0.3).square().sum(-1, keepdim=True)


def data(f, n=12, space=CUBE):
    X = space.sobol(n, seed=7)
    Y = f(X)
    return X, (Y - Y.mean(0)) / Y.std(0)


def mixed(X):
    """Best at x = 0.6, k = 4, c = b."""
    return -((X[:, :1] - 0.6) ** 2 + (X[:, 1:2] - 4 / 6) ** 2) + (X[:, 2:] @ KINDS).unsqueeze(-1)


def test_without_constraints_it_is_botorchs_log_expected_improvement():
    X, Y = data(bowl)
    model = surrogates.fit("gp", X, Y)
    best = model.posterior(X).mean.max()
    points = CUBE.sobol(32, seed=1)
    expected = LogExpectedImprovement(model, best)(points.unsqueeze(-2))
    value = make_acquisition(model, X, Y)(points)
    assert torch.allclose(value, expected, atol=1e-6)  # float64, another batch shape


def test_the_gain_of_a_network_is_limited_and_agrees_with_monte_carlo(untrained):
    X, Y = data(bowl)
    model = surrogates.fit("pfn", X, Y, model=untrained)
    best = model.posterior(X).mean.max().maximum(Y.max())
    points = CUBE.sobol(8, seed=1)
    g = torch.Generator().manual_seed(0)
    draws = model.posterior(points).marginals.sample((20_000,), generator=g)
    most = GAIN * Y.std()
    gain = (draws - best).clamp_min(0.0).clamp_max(most)
    value = make_acquisition(model, X, Y)(points).detach().exp()
    error = gain.std(0) / math.sqrt(len(gain))
    unseen = most * 15 / len(gain)  # what no draw shows, but for 3 times in 10 million
    assert bool(((value - gain.mean(0)).abs() < 5 * error + unseen).all())
    assert bool((gain.amax(0) == most).any())  # else the limit was not tried


@pytest.mark.parametrize("up", [3.0, -3.0])
def test_the_networks_incumbent_is_what_was_seen_where_that_is_better(up):
    X, Y = data(bowl)
    Y[4] += up * Y.std()  # as a seed would have it
    model = surrogates.fit("pfn", X, Y)
    points = CUBE.sobol(8, seed=1)
    best = max(_moments(model, X)[0].max(), Y.max())
    if up > 0:
        assert best > _moments(model, X)[0].max()  # the network does not believe it all
    predictive = model.posterior(points).marginals
    most = GAIN * Y.std()
    expected = predictive.expected_improvement(best) - predictive.expected_improvement(best + most)
    value = make_acquisition(model, X, Y)(points).detach().exp()
    assert torch.allclose(value, expected.detach(), rtol=1e-3, atol=1e-12)


def test_a_constraint_adds_the_logarithm_of_its_probability():
    X, Y = data(lambda X: torch.cat([bowl(X), X[:, :1] - 0.25], -1))
    Y[:, 1] = X[:, 0] - 0.25
    model = surrogates.fit("gp", X, Y)
    points = CUBE.sobol(32, seed=1)
    posterior = model.posterior(points.unsqueeze(-2))
    means = model.posterior(X.unsqueeze(-2)).mean[:, 0, 0]
    best = means[Y[:, 1] <= 0].max()
    first = LogExpectedImprovement(model.subset_output([0]), best)(points.unsqueeze(-2))
    constraint = Normal(posterior.mean[:, 0, 1], posterior.variance[:, 0, 1].sqrt())
    value = make_acquisition(model, X, Y, constraints=1)(points).detach()
    probable = value > -20  # where the cdf is no zero in float64
    expected = first + constraint.cdf(torch.tensor(0.0)).log()
    assert bool(probable.any())
    assert torch.allclose(value[probable], expected[probable], atol=1e-4)


def test_while_nothing_is_feasible_only_feasibility_counts():
    X, Y = data(lambda X: torch.cat([bowl(X), X[:, :1]], -1))
    Y[:, 1] = 0.2 + (1 - X[:, 0])  # always violated, least at x0 = 1
    model = surrogates.fit("gp", X, Y)
    x = suggest(model, X, Y, CUBE, constraints=1, num_candidates=256)
    assert float(x[0]) > 0.95


def test_of_several_objectives_too_only_feasibility_counts_while_nothing_is_feasible():
    X, Y = data(lambda X: torch.cat([bowl(X), bowl(1 - X), X[:, :1]], -1))
    Y[:, 2] = 0.2 + (1 - X[:, 0])
    model = surrogates.fit("gp", X, Y)
    points = CUBE.sobol(32, seed=1)
    mean, variance = _moments(model.subset_output([2]), points)
    expected = torch.special.log_ndtr(-mean / variance.sqrt())
    for pending in (None, torch.tensor([[1.0, 0.5]], dtype=torch.float64)):
        value = make_acquisition(model, X, Y, constraints=1, pending=pending)(points)
        if pending is None:
            assert torch.allclose(value, expected)
        best = float(points[value.argmax(), 0])
        assert best == float(points[:, 0].max())


def test_points_of_a_front_are_feasible_if_they_were_seen_to_be():
    X, Y = data(lambda X: torch.cat([bowl(X), bowl(1 - X), X[:, :1]], -1))
    Y[:, 2] = X[:, 0] - 0.5
    model = surrogates.fit("gp", X, Y + torch.tensor([0.0, 0.0, 0.3]))  # expects fewer
    met, means = Y[:, 2] <= 0, _means(model, X)
    assert bool((means[met, 2] > 0).any())
    reference = _reference_point(Y[met, :2])
    boxes = FastNondominatedPartitioning(reference, means[met, :2])
    points = CUBE.sobol(64, seed=1)
    objectives = model.subset_output([0, 1])
    gain = ExpectedHypervolumeImprovement(objectives, reference.tolist(), boxes)
    mean, variance = _moments(model.subset_output([2]), points)
    holds = Normal(mean, variance.sqrt()).cdf(torch.tensor(0.0))
    expected = (gain(points.unsqueeze(-2)) * holds).detach()
    value = make_acquisition(model, X, Y, constraints=1)(points).exp()
    assert float(expected.max()) > 1e-3
    assert torch.allclose(value, expected, rtol=1e-4, atol=1e-9)


def test_draws_that_the_fantasies_leave_few_of_are_no_news():
    X, Y = data(bowl)
    model = surrogates.fit("ensemble", X, Y, members=8, steps=50)
    pending = CUBE.sobol(3, seed=3)
    with pytest.warns(FewDraws):
        make_acquisition(model, X, Y, pending=pending)
    x = suggest(model, X, Y, CUBE, pending=pending, num_candidates=32)  # a warning is an error
    assert not is_known(x, pending)


@pytest.mark.parametrize("surrogate", ["gp", "pfn"])
def test_a_pending_point_is_worth_less_and_not_suggested_again(surrogate, untrained):
    X, Y = data(bowl)
    options = {"model": untrained} if surrogate == "pfn" else {}
    model = surrogates.fit(surrogate, X, Y, **options)
    pending = suggest(model, X, Y, CUBE, num_candidates=256).unsqueeze(0)
    before = make_acquisition(model, X, Y)
    after = make_acquisition(model, X, Y, pending=pending)
    points = CUBE.sobol(16, seed=4)
    assert after(points).shape == (16,)
    if surrogate == "gp":  # the untrained network knows nothing of correlations
        assert bool((after(pending) < before(pending) - 0.3).all())
    again = suggest(model, X, Y, CUBE, pending=pending, num_candidates=256)
    assert not is_known(again, pending)


def test_suggestions_repeat_for_a_seed_and_leave_the_global_state_alone():
    X, Y = data(bowl)
    model = surrogates.fit("gp", X, Y)
    torch.manual_seed(3)
    first = suggest(model, X, Y, CUBE, seed=5, num_candidates=256)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(first, suggest(model, X, Y, CUBE, seed=5, num_candidates=256))


def test_gradients_and_neighbours_find_the_best_point_of_a_mixed_space():
    best = torch.tensor([0.6123, 4 / 6, 0.0, 1.0, 0.0], dtype=torch.float64)
    start = MIXED.sobol(1, seed=0)

    def acquisition(X):
        return -100 * (X - best).square().sum(-1)

    x = maximize_acquisition(acquisition, MIXED, start, known=start, num_candidates=64)
    assert torch.equal(MIXED.snap(x), x)
    assert torch.allclose(x, best, atol=1e-4)  # of L-BFGS after 20 evaluations


def test_the_maximum_is_that_of_botorchs_optimizer():
    space = Space({f"x{i}": FloatDistribution(0.0, 1.0) for i in range(4)})
    X = space.sobol(24, seed=2)
    Y = (6 * X).sin().sum(-1, keepdim=True)
    model = surrogates.fit("gp", X, (Y - Y.mean()) / Y.std())
    acquisition = LogExpectedImprovement(model, model.posterior(X).mean.max().detach())
    box = torch.tensor([[0.0] * 4, [1.0] * 4], dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, best = optimize_acqf(acquisition, box, q=1, num_restarts=8, raw_samples=256)
    x = suggest(model, X, Y, space)
    assert float(acquisition(x[None, None]).detach()) > float(best) - 0.01  # nats


def test_fixed_parameters_stay():
    X, Y = data(mixed, 20, MIXED)
    model = surrogates.fit("gp", X, Y)
    x = suggest(model, X, Y, MIXED, fixed={"k": 1, "c": "c"}, num_candidates=128)
    params = MIXED.decode(x)
    assert (params["k"], params["c"]) == (1, "c")


def test_a_finite_space_is_searched_as_a_whole_and_without_repetition():
    space = Space({"k": IntDistribution(0, 4), "c": CategoricalDistribution(["a", "b"])})
    everything = space.enumerate()
    known = everything[:1]

    def acquisition(X):
        return X[:, 0] + X[:, 1]

    for _ in range(len(everything) - 1):
        x = maximize_acquisition(acquisition, space, known[:1], known=known)
        assert not is_known(x, known)
        known = torch.cat([known, x.unsqueeze(0)])
    x = maximize_acquisition(acquisition, space, known[:1], known=known)
    assert is_known(x, known)  # exhausted


@pytest.mark.parametrize("constraints", [0, 1])
@pytest.mark.parametrize("pending", [False, True])
def test_several_objectives_look_between_their_optima(constraints, pending):
    def outcomes(X):
        parts = [bowl(X), -(X - 0.7).square().sum(-1, keepdim=True)]
        return torch.cat([*parts, *[X[:, :1] - 0.9] * constraints], -1)

    X, Y = data(outcomes)
    if constraints:
        Y[:, 2] = X[:, 0] - 0.9
    model = surrogates.fit("gp", X, Y)
    waiting = torch.full((1, 2), 0.5, dtype=torch.float64) if pending else None
    x = suggest(model, X, Y, CUBE, constraints=constraints, pending=waiting, num_candidates=128)
    assert bool(((x > 0.2) & (x < 0.8)).all())


def test_several_objectives_of_a_model_that_is_no_process(untrained):
    X, Y = data(lambda X: torch.cat([bowl(X), -(X - 0.7).square().sum(-1, keepdim=True)], -1))
    model = surrogates.fit("pfn", X, Y, model=untrained)
    for waiting in (None, X[:2] * 0.9):
        x = suggest(model, X, Y, CUBE, pending=waiting, num_candidates=32)
        acquisition = make_acquisition(model, X, Y, pending=waiting)
        values = acquisition(torch.cat([x.unsqueeze(0), CUBE.sobol(64, seed=9)]))
        assert bool((values[0] >= values[1:]).all())


def test_incumbents_are_feasible_or_least_infeasible():
    X = torch.arange(4.0).unsqueeze(-1).double()
    Y = torch.tensor([[3.0, 1.0], [2.0, -1.0], [1.0, -1.0], [0.0, 2.0]]).double()
    assert incumbents(X, Y, 1).squeeze(-1).tolist() == [1.0, 2.0]
    assert incumbents(X, Y + 2, 1).squeeze(-1).tolist() == [1.0, 2.0, 0.0]
    assert incumbents(X, Y).squeeze(-1).tolist() == [0.0, 3.0]  # a front


def test_a_belief_draws_where_it_says_and_fades():
    space = Space(
        {"lr": FloatDistribution(1e-6, 1.0, log=True), "c": CategoricalDistribution(["a", "b"])}
    )
    belief = Belief(space, {"lr": (1e-4, 1e-2), "c": "b"}, beta=10.0)
    X = belief.sobol(256, seed=0)
    assert bool(((X[:, 0] >= 1 / 3 - 1e-9) & (X[:, 0] <= 2 / 3 + 1e-9)).all())
    share = float(X[:, 2].mean())
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 256)
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    line = torch.stack([grid, torch.zeros_like(grid), torch.ones_like(grid)], -1)
    other = line[:, [0, 2, 1]]
    mass = 0.5 * (belief.log_density(line).exp().mean() + belief.log_density(other).exp().mean())
    assert float(mass) == pytest.approx(1.0, abs=0.02)  # edges are smooth
    inside, outside = belief.log_density(line[[10000, 0]])

    def flat(X):
        return torch.zeros(len(X), dtype=X.dtype)

    early, late = (belief.weigh(flat, n)(line[[10000, 0]]) for n in (1, 1000))
    assert float(early[0] - early[1]) == pytest.approx(10 * float(inside - outside))
    assert float(late[0] - late[1]) == pytest.approx(0.01 * float(inside - outside))


def test_a_belief_outside_the_range_is_refused():
    for wanted in ((-1.0, 0.5), 2.0, "a"):
        with pytest.raises(ValueError, match="prior_optimum"):
            Belief(CUBE, {"x0": wanted})
    with pytest.raises(ValueError, match="among"):
        Belief(MIXED, {"c": "z"})


@pytest.mark.parametrize("wanted", [[3, 4, 20], (3, 20), 3])
def test_a_belief_in_levels_is_in_these_choices_and_in_none_between(wanted):
    space = Space({"x": FloatDistribution(0.0, 1.0), "c": CategoricalDistribution([*range(30)])})
    belief = Belief(space, {"c": wanted})
    several = {wanted} if wanted == 3 else set(wanted)
    points = torch.stack([space.encode({"x": 0.5, "c": c}) for c in range(30)])
    density = belief.log_density(points).exp()
    assert float(density.mean()) == pytest.approx(1.0)
    for c in range(30):
        share = 0.1 + (0.9 * 30 / len(several) if c in several else 0.0)
        assert float(density[c]) == pytest.approx(share)
    drawn = [space.decode(x)["c"] for x in belief.sobol(256, seed=0)]
    inside = sum(c in several for c in drawn) / 256
    expected = 0.9 + 0.1 * len(several) / 30
    assert abs(inside - expected) < 4 * math.sqrt(expected * (1 - expected) / 256)


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution")
def test_a_choice_that_is_a_tuple_is_one_choice():
    space = Space({"c": CategoricalDistribution([(1, 2), 1, 2, None])})
    whole, parts, none = (Belief(space, {"c": c}) for c in ((1, 2), [1, 2], None))
    points = torch.stack([space.encode({"c": c}) for c in ((1, 2), 1, 2, None)])
    assert whole.log_density(points).exp().tolist() == pytest.approx([3.7, 0.1, 0.1, 0.1])
    assert parts.log_density(points).exp().tolist() == pytest.approx([0.1, 1.9, 1.9, 0.1])
    assert none.log_density(points).exp().tolist() == pytest.approx([0.1, 0.1, 0.1, 3.7])


def test_several_objectives_have_botorchs_expected_hypervolume_improvement():
    X, Y = data(lambda X: torch.cat([bowl(X), bowl(1 - X)], -1))
    model = surrogates.fit("gp", X, Y)
    reference = _reference_point(Y)
    boxes = FastNondominatedPartitioning(reference, model.posterior(X).mean.detach())
    points = CUBE.sobol(64, seed=1)
    exact = ExpectedHypervolumeImprovement(model, reference.tolist(), boxes)
    expected = exact(points.unsqueeze(-2)).detach()
    value = make_acquisition(model, X, Y)(points).detach().exp()
    assert float(expected.max()) > 0.01
    assert torch.allclose(value, expected, rtol=1e-4, atol=1e-9)


def test_hypervolume_improvements_of_mixtures_agree_with_monte_carlo(untrained):
    X, Y = data(lambda X: torch.cat([bowl(X), bowl(1 - X)], -1))
    model = surrogates.fit("pfn", X, Y, model=untrained)
    boxes = FastNondominatedPartitioning(_reference_point(Y), _means(model, X))
    low, high = boxes.hypercell_bounds
    points = CUBE.sobol(8, seed=1)
    g = torch.Generator().manual_seed(0)
    predictives = [part.posterior(points).marginals for part in model.models]
    draws = torch.stack([each.sample((20_000,), generator=g) for each in predictives], -1)
    sides = (torch.minimum(draws.unsqueeze(-2), high) - low).clamp_min(0.0)
    gain = sides.prod(-1).sum(-1)
    value = make_acquisition(model, X, Y)(points).detach().exp()
    error = gain.std(0) / math.sqrt(len(gain))
    assert bool(((value - gain.mean(0)).abs() < 5 * error).all())


def test_hypervolume_counts_only_where_constraints_hold():
    X, Y = data(lambda X: torch.cat([bowl(X), bowl(1 - X), X[:, :1]], -1))
    Y[:, 2] = X[:, 0] - 0.25
    model = surrogates.fit("gp", X, Y)
    points = CUBE.sobol(64, seed=1)
    value = make_acquisition(model, X, Y, constraints=1)(points).detach()
    assert float(value[points[:, 0] > 0.5].max()) < float(value[points[:, 0] < 0.2].max()) - 5


def test_a_pending_point_adds_less_hypervolume():
    X, Y = data(lambda X: torch.cat([bowl(X), bowl(1 - X)], -1))
    model = surrogates.fit("gp", X, Y)
    pending = suggest(model, X, Y, CUBE, num_candidates=256).unsqueeze(0)
    before = make_acquisition(model, X, Y)(pending).item()
    after = make_acquisition(model, X, Y, pending=pending)(pending).item()
    assert after < before - 1


def _means(model, X):
    with torch.no_grad():
        return model.posterior(X.unsqueeze(-2)).mean[:, 0]
