"""Evidence: agreement with exact answers, the Jacobian of units, and comparisons of models."""

import math

import pytest
import torch
from torch import Tensor

import pfn
from pfn.evidence import left_out, one_step_ahead
from pfn.sklearn import PFNRegressor
from priors import GaussianProcess


@pytest.fixture(scope="module")
def model() -> pfn.PFN:
    return pfn.load("gp-1d")


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_evidence_is_that_of_the_prior(model: pfn.PFN) -> None:
    n, prior = 24, model.prior
    tasks = prior.sample(24, n, 1, generator=torch.Generator().manual_seed(0))
    exact = prior.log_evidence((tasks.x, tasks.y))
    fitted = model.condition((tasks.x, tasks.y), standardize=False)
    error = (fitted.log_evidence() - exact) / n
    assert error.square().mean().sqrt() < 0.05
    assert fitted.log_evidence_error().max() / n < 0.05


def test_given_latents_change_the_evidence_as_they_should(model: pfn.PFN) -> None:
    tasks = model.prior.sample(1, 20, 1, generator=torch.Generator().manual_seed(3))
    context = tasks.x[0], tasks.y[0]
    exact, ours = [], []
    for noise in (0.5, 0.02):
        fitted = model.condition(context, standardize=False, given={"noise": noise})
        exact.append(float(model.prior.log_evidence(context, given={"noise": noise})))
        ours.append(float(fitted.log_evidence()))
    assert abs(exact[0] - exact[1]) > 4
    assert ours[0] - ours[1] == pytest.approx(exact[0] - exact[1], abs=2.5)


def test_evidence_has_the_jacobian_of_its_units(model: pfn.PFN) -> None:
    x, y = uniform(2, 15)
    plain = model.condition((x, y)).log_evidence()
    scaled = model.condition((x * 4 - 1, y * 100 + 3)).log_evidence()
    assert float(scaled) == pytest.approx(float(plain) - 15 * math.log(100), abs=0.02)


def test_points_that_were_added_count(model: pfn.PFN) -> None:
    x, y = uniform(2, 12)
    whole = model.condition((x, y), standardize=False).log_evidence()
    parts = model.condition((x[:5], y[:5]), standardize=False).extend(x[5:], y[5:]).log_evidence()
    assert float(whole) == pytest.approx(float(parts), abs=1e-4)


def test_the_error_is_that_of_the_average_over_orders(model: pfn.PFN) -> None:
    tasks = model.prior.sample(1, 20, 1, generator=torch.Generator().manual_seed(4))
    fitted = model.condition((tasks.x[0], tasks.y[0]), standardize=False)
    values = torch.stack([fitted.log_evidence(seed=seed) for seed in range(30)])
    errors = torch.stack([fitted.log_evidence_error(seed=seed) for seed in range(30)])
    # a standard deviation of 30 values has a relative standard error of 0.13
    assert 0.5 < float(values.std() / errors.square().mean().sqrt()) < 2


def test_evidence_carries_no_gradient(model: pfn.PFN) -> None:
    y = torch.rand(6, dtype=torch.float64, requires_grad=True)
    assert not model.condition((torch.rand(6).double(), y)).log_evidence().requires_grad


def test_no_points_are_certain(model: pfn.PFN) -> None:
    fitted = model.condition(([], []))
    assert float(fitted.log_evidence()) == 0
    assert float(fitted.log_evidence_error()) == 0
    assert math.isnan(model.condition(([0.5], [1.0])).log_evidence_error(orders=1))
    with pytest.raises(ValueError, match="at least 1 order, a whole number; got 0"):
        fitted.log_evidence(orders=0)


def test_one_step_ahead_is_the_chain_rule(model: pfn.PFN) -> None:
    """Each term is the predictive of a context that ends before it, to what the buffer loses."""
    tasks = model.prior.sample(6, 16, 1, generator=torch.Generator().manual_seed(1))
    x, y = tasks.x.float(), tasks.y.float()
    with torch.no_grad():
        ahead = one_step_ahead(model.transformer, x, y, None)
    for i, tolerance in ((0, 1e-4), (1, 1e-4), (6, 1e-4), (7, 0.5), (15, 0.5)):  # in blocks, more
        answer = model.predict((x[:, :i], y[:, :i]), x[:, i : i + 1], standardize=False)
        theirs = answer.log_prob(y[:, i : i + 1]).squeeze(1)
        torch.testing.assert_close(ahead[:, i].float(), theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["gp-1d", "heavy-tails"])
def test_left_out_scores_are_about_those_of_a_context_without_the_point(name: str) -> None:
    model = pfn.load(name)
    assert model.prior is not None
    tasks = model.prior.sample(40, 16, 1, generator=torch.Generator().manual_seed(1))
    x, y = tasks.x.float(), tasks.y.float()
    with torch.no_grad():
        scores = left_out(model.transformer, x, y, None)
    theirs = torch.empty_like(scores)
    for i in range(16):
        rest = torch.arange(16) != i
        answer = model.predict((x[:, rest], y[:, rest]), x[:, i : i + 1], standardize=False)
        theirs[:, i] = torch.special.ndtri(answer.cdf(y[:, i : i + 1]).double()).squeeze(1)
    difference = scores - theirs

    assert difference.abs().mean() < 0.2


def test_curves_have_evidence_in_one_pass() -> None:
    curves = pfn.load("curves")
    times = torch.arange(1, 9) / 20
    rising, falling = torch.linspace(0.3, 0.7, 8), torch.linspace(0.7, 0.3, 8)
    evidence = [
        float(curves.condition((times, values), standardize=False).log_evidence())
        for values in (rising, falling)
    ]
    assert evidence[0] > evidence[1] + 2  # better is up, in the units of this prior


def test_comparison_finds_the_prior_that_drew_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    rough = GaussianProcess(kernel="rbf", lengthscale=0.1, outputscale=1.0, noise=0.01)
    tasks = rough.sample(1, 40, 1, generator=generator)
    line = tasks.x[0, :, 0] * 2 + 0.05 * torch.randn(40, dtype=torch.float64, generator=generator)
    models = ["gp-1d", pfn.load("pretrained/small/linear")]
    wiggly = pfn.compare((tasks.x[0], tasks.y[0]), models=models)
    straight = pfn.compare((tasks.x[0], line), models=models)
    assert wiggly.names == ["gp-1d", "linear"]
    assert wiggly.probabilities[0] > 0.99
    assert straight.best == "linear"
    assert float(straight.probabilities.sum()) == pytest.approx(1)
    assert repr(wiggly).startswith("Comparison(gp-1d: 1")


def test_the_averaged_prediction_is_the_mixture_of_the_models() -> None:
    context = tuple(uniform(2, 12))
    both = pfn.compare(context, models=["gp-1d", "gp"])
    query, y = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([0.1, 0.9])
    each = torch.stack([fitted.predict(query).log_prob(y).exp() for fitted in both.fitted])
    expected = (both.probabilities.unsqueeze(-1) * each).sum(0)
    torch.testing.assert_close(both.predict(query).log_prob(y).exp(), expected)
    assert both.predict(query, latent=True).batch_shape == (2,)


def test_best_is_the_model_of_highest_evidence() -> None:
    x = torch.linspace(0, 1, 15, dtype=torch.float64)
    best = pfn.compare((x, x.square())).best
    expected = pfn.predict((x, x.square()), [0.33], model=best).mean
    torch.testing.assert_close(pfn.predict((x, x.square()), [0.33], model="best").mean, expected)


def test_best_is_for_scikit_learn_too() -> None:
    x = torch.linspace(0, 1, 15, dtype=torch.float64).unsqueeze(1).numpy()
    fitted = PFNRegressor(model="best").fit(x, x[:, 0] ** 2)
    expected = pfn.predict((x, x[:, 0] ** 2), [[0.33]], model="best").mean
    assert float(fitted.predict([[0.33]])[0]) == pytest.approx(float(expected), abs=1e-5)
    many = torch.rand(300, 1, dtype=torch.float64).numpy()
    with pytest.warns(UserWarning, match="n = 300 points"):
        assert len(PFNRegressor(model="best").fit(many, many[:, 0]).predict(many[:3])) == 3


def test_models_that_do_not_fit_the_data_are_left_out() -> None:
    x = torch.rand(9, 14)
    assert pfn.compare((x, x.sum(1))).names == ["bo"]
    x = torch.rand(9, 6)
    assert pfn.compare((x, x.sum(1))).names == ["bnn", "bo", "gp", "heavy-tails"]
    with pytest.raises(ValueError, match="one task to compare models on; got a batch of 2"):
        pfn.compare((torch.rand(2, 9, 6), torch.rand(2, 9)))
    with pytest.raises(ValueError, match="a list of models to compare; got 'gp'"):
        pfn.compare((x, x.sum(1)), models="gp")
    with pytest.raises(ValueError, match="models to compare; got an empty list"):
        pfn.compare((x, x.sum(1)), models=[])
