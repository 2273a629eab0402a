"""What every prior promises, asked of each: shapes, seeds, independence, calibration, limits."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import ExpTransform, InverseGamma, LogNormal

import priors
from pfn.pretrain import PretrainConfig, architecture, draw_lesson, plan
from pfn.recipe import check_prior
from pfn.simulation import judge, simulate
from priors import (
    BNN,
    NNGP,
    GaussianProcess,
    LearningCurves,
    Linear,
    Mixture,
    ParticlePrior,
    ScaleMixture,
    Searched,
    Tasks,
    Warped,
    from_config,
    from_pyro,
    hebo_plus,
    match,
    optimization,
    to_config,
)

FALSE_FAILURE = 1e-6  # of each test here, over all its random checks of one prior


def lines(x: Tensor) -> None:
    """A Pyro program: straight lines with random slopes and noise."""
    slope = pyro.sample("slope", pyro.distributions.Normal(0.0, 1.0))
    noise = pyro.sample("noise", pyro.distributions.LogNormal(-3.0, 0.5))
    with pyro.plate("points", x.shape[-2]):
        mean = slope * (x - 0.5).sum(-1)
        pyro.sample("y", pyro.distributions.Normal(mean, noise.sqrt()))


FIXED = GaussianProcess(kernel="matern52", lengthscale=0.4, outputscale=1.3, noise=0.05, mean=0.2)
WIDE = NNGP("erf", depth=1, weight_variance=1.5, bias_variance=0.4, noise=0.05)


class Case(NamedTuple):
    """A prior, and the number of features that its tasks have here."""

    prior: Any
    d: int = 2


EVERY = {
    "GaussianProcess": Case(GaussianProcess()),
    "NNGP": Case(NNGP(depth=(1, 2))),
    "ScaleMixture": Case(ScaleMixture(NNGP())),
    "BNN": Case(BNN(weight_variance=InverseGamma(2.0, 2.0))),
    "matched BNN": Case(match(BNN(depth=1), FIXED)),
    "LearningCurves": Case(LearningCurves(), 1),
    "siblings": Case(LearningCurves(), 4),
    "lcpfn": Case(LearningCurves.lcpfn(), 1),
    "domhan": Case(LearningCurves.domhan(20), 1),
    "Linear": Case(Linear()),
    "Warped": Case(Warped(GaussianProcess())),
    "warped BNN": Case(Warped(BNN(), output=ExpTransform())),
    "Mixture": Case(Mixture((GaussianProcess(), NNGP(), BNN()))),
    "HEBO+": Case(hebo_plus()),
    "Pyro": Case(from_pyro(lines)),
    "Searched": Case(Searched(Warped(GaussianProcess()))),
    "objectives": Case(optimization()),
}

# Posteriors in closed form, hence exact, and quick enough for hundreds of tasks.
EXACT = {
    "GaussianProcess": Case(FIXED),
    "NNGP": Case(WIDE),
    "Student-t process": Case(ScaleMixture(FIXED, InverseGamma(2.5, 2.0))),
    "Linear": Case(Linear(weight_variance=1.5, bias_variance=0.5, noise=0.1), 3),
    "Warped": Case(Warped(FIXED, input=(0.7, 1.6))),
    "warped outputs": Case(Warped(FIXED, input=None, output=ExpTransform())),
    "Mixture": Case(Mixture((FIXED, WIDE))),
}
# Exact up to quadrature: a fraction of a second for each task.
QUADRATURE = {
    "GaussianProcess": Case(GaussianProcess(outputscale=1.0), 1),
    "NNGP": Case(NNGP("erf", depth=2, bias_variance=0.3, noise=0.05), 1),
    "ScaleMixture": Case(ScaleMixture(FIXED, LogNormal(0.0, 1.0), scaled_noise=False), 1),
}
# By sampling: few tasks of few points; `benchmarks/sbc.py` asks for 500. With their options.
SAMPLED: dict[str, tuple[Case, dict[str, Any]]] = {
    "BNN": (Case(BNN(4, 1), 1), {}),
    "lcpfn": (Case(LearningCurves.lcpfn(10), 1), {"particles": 400}),
    "GaussianProcess, ARD": (Case(GaussianProcess(ard=True, outputscale=1.0)), {"method": "nuts"}),
    "Pyro": (Case(from_pyro(lines), 1), {"warmup": 100, "draws": 100}),
}

every = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY.keys())
exact = pytest.mark.parametrize("case", EXACT.values(), ids=EXACT.keys())


def draw(case: Case, batch: int, n: int, seed: int = 0) -> Tasks:
    generator = torch.Generator().manual_seed(seed)
    drawn: Tasks = case.prior.sample(batch, n, case.d, generator=generator)
    return drawn


@every
def test_shapes_dtypes_and_devices(case: Case) -> None:
    for batch, n in ((3, 17), (1, 10), (0, 10)):
        tasks = draw(case, batch, n)
        assert tasks.x.shape == (batch, n, case.d)
        assert tasks.y.shape == tasks.f.shape == (batch, n)
        for value in (tasks.x, tasks.y, tasks.f, *tasks.latents.values()):
            assert value.device.type == "cpu" and len(value) == batch
            assert value.isfinite().all()
        assert tasks.x.dtype == tasks.y.dtype == tasks.f.dtype == torch.float64
        assert tasks.num_context is None or 0 < tasks.num_context <= n
    check_prior(case.prior, case.d)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@every
def test_draws_are_born_where_the_generator_is(case: Case) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tasks = case.prior.sample(3, 17, case.d, generator=generator)
    for value in (tasks.x, tasks.y, tasks.f, *tasks.latents.values()):
        assert value.device.type == "cuda"
    if isinstance(case.prior, ParticlePrior):
        visible = torch.tensor([2, 5], device="cuda")
        weighed = case.prior.sample_particles(
            3, 5, case.d, visible, particles=4, held={}, generator=generator
        )
        assert weighed.log_weights.device.type == weighed.mean.device.type == "cuda"


@every
def test_the_seed_decides_and_the_global_state_does_not(case: Case) -> None:
    torch.manual_seed(1)
    first = draw(case, 4, 12)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again = draw(case, 4, 12)
    torch.testing.assert_close(first._asdict(), again._asdict(), atol=0, rtol=0)
    assert not torch.equal(first.y, draw(case, 4, 12, seed=1).y)
    torch.random.set_rng_state(state)
    draw(case, 4, 12)
    assert torch.equal(torch.random.get_rng_state(), state)


@every
def test_tasks_of_a_batch_are_independent(case: Case) -> None:
    batch = 2000
    tasks = draw(case, batch, 12)
    statistics = {
        "mean": tasks.y.mean(1),
        "spread": tasks.y.std(1),
        **{k: v.reshape(batch, -1)[:, 0].double() for k, v in tasks.latents.items()},
    }
    for name, value in statistics.items():
        jitter = 1e-9 * torch.rand(batch, generator=torch.Generator().manual_seed(3))
        ranks = (value + jitter * value.std()).argsort().argsort().double()  # ties at random
        for lag in (1, 2, 4, batch // 2):
            pair = torch.stack([ranks[:-lag], ranks[lag:]])
            limit = 5.6 / math.sqrt(batch - lag)  # 2e-8 two-sided, some fifty comparisons
            assert abs(float(torch.corrcoef(pair)[0, 1])) < limit, (name, lag)


@every
def test_rows_are_exchangeable_unless_they_are_a_prefix(case: Case) -> None:
    tasks = draw(case, 2000, 12)
    if tasks.num_context is not None:
        return
    for value in (tasks.x[..., 0], tasks.f):  # with levels there are ties
        order = (value[:, -1] - value[:, 0]).sign()
        assert abs(float(order.mean())) < 4.9 / math.sqrt(2000)


@every
def test_a_prior_can_be_pretrained_on(case: Case) -> None:
    config = PretrainConfig(max_features=case.d, max_context=16, queries=8, tokens=256, tasks=100)
    network = architecture(case.prior, config)
    lesson = draw_lesson(case.prior, network, config, plan(config, 0, 0), 0, 0, torch.device("cpu"))
    for value in (lesson.x, lesson.y, lesson.x_query, lesson.y_draws, lesson.f_draws):
        assert value.isfinite().all()


@every
def test_a_built_in_prior_survives_its_config(case: Case) -> None:
    if case.prior is EVERY["Pyro"].prior:
        with pytest.raises(ValueError, match="Expected a prior among"):
            to_config(case.prior)
        return
    config = to_config(case.prior)
    again = from_config(config)
    assert to_config(again) == config
    torch.testing.assert_close(
        draw(case, 3, 12)._asdict(), draw(Case(again, case.d), 3, 12)._asdict(), atol=0, rtol=0
    )


def test_every_prior_of_the_package_is_asked() -> None:
    assert set(priors.config.PRIORS.values()) <= {type(case.prior) for case in EVERY.values()}


@exact
@pytest.mark.parametrize("n", [0, 8])
def test_closed_form_posteriors_are_calibrated(case: Case, n: int) -> None:
    verdict = judge(simulate(case.prior, 500, n, case.d, seed=n))
    assert verdict.worst > FALSE_FAILURE / 3


@pytest.mark.parametrize("case", QUADRATURE.values(), ids=QUADRATURE.keys())
def test_quadrature_is_calibrated(case: Case) -> None:
    verdict = judge(simulate(case.prior, 40, 6, case.d))
    assert verdict.worst > FALSE_FAILURE / 3


@pytest.mark.filterwarnings("ignore:NUTS has not converged")  # in few draws: calibration decides
@pytest.mark.parametrize("name", SAMPLED)
def test_samplers_are_calibrated(name: str) -> None:
    case, options = SAMPLED[name]

    def posterior(x: Tensor, y: Tensor, x_query: Tensor) -> Any:
        return case.prior.posterior((x, y), x_query, **options)

    tasks = 12
    verdict = judge(simulate(case.prior, tasks, 5, case.d, group=tasks, posterior=posterior))
    assert verdict.worst > FALSE_FAILURE / 3


@exact
def test_calibration_would_notice(case: Case) -> None:
    def ignores_data(x: Tensor, y: Tensor, x_query: Tensor) -> Any:
        return case.prior.posterior((x[:, :0], y[:, :0]), x_query)

    verdict = judge(simulate(case.prior, 500, 8, case.d, posterior=ignores_data))
    assert verdict.dependence < FALSE_FAILURE


@exact
def test_posterior_follows_the_contract(case: Case) -> None:
    tasks = draw(case, 3, 9)
    context, x_query, y_query = (tasks.x[:, :6], tasks.y[:, :6]), tasks.x[:, 6:], tasks.y[:, 6:]
    batched = case.prior.posterior(context, x_query)
    assert batched.batch_shape == (3, 3)
    for i in range(3):
        one = case.prior.posterior((tasks.x[i, :6], tasks.y[i, :6]), x_query[i])
        assert one.batch_shape == (3,)
        for name in ("mean", "variance"):
            torch.testing.assert_close(getattr(one, name), getattr(batched, name)[i])
        for name in ("log_prob", "cdf"):
            value = getattr(one, name)(y_query[i])
            torch.testing.assert_close(value, getattr(batched, name)(y_query)[i])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = case.prior.posterior((context[0][:, order], context[1][:, order]), x_query)
    torch.testing.assert_close(shuffled.log_prob(y_query), batched.log_prob(y_query))
    latent = case.prior.posterior(context, x_query, latent=True)
    assert (latent.variance < batched.variance).all()
    joint = case.prior.posterior(context, x_query, joint=True)
    assert joint.event_shape == (3,) and joint.batch_shape == (3,)
    chain = case.prior.log_evidence((tasks.x, tasks.y)) - case.prior.log_evidence(context)
    torch.testing.assert_close(joint.log_prob(y_query), chain, atol=1e-6, rtol=0)


@exact
def test_any_container_and_one_point_will_do(case: Case) -> None:
    tasks = draw(case, 1, 5)
    x, y, x_query = tasks.x[0, :1], tasks.y[0, :1], tasks.x[0, 1:]
    expected = case.prior.posterior((x, y), x_query).mean
    listed = case.prior.posterior((x.tolist(), y.tolist()), x_query.tolist()).mean
    torch.testing.assert_close(listed, expected)
    single = case.prior.posterior((x.float().numpy(), y.float()), x_query.float()).mean
    torch.testing.assert_close(single, expected, atol=1e-4, rtol=1e-4)  # inputs of float32


def test_known_latents_make_the_prior_that_has_them() -> None:
    tasks = FIXED.sample(2, 9, 2, generator=torch.Generator().manual_seed(7))
    context, x_query = (tasks.x[:, :6], tasks.y[:, :6]), tasks.x[:, 6:]
    free = GaussianProcess(kernel=("rbf", "matern52"), mean=0.2)
    known = {"kernel": 1, "lengthscale": 0.4, "outputscale": 1.3, "noise": 0.05}
    ours = free.posterior(context, x_query, given=known)
    torch.testing.assert_close(ours.mean, FIXED.posterior(context, x_query).mean)
    wide = NNGP("erf", depth=1).posterior(
        context, x_query, given={"weight_variance": 1.5, "bias_variance": 0.4, "noise": 0.05}
    )
    torch.testing.assert_close(wide.mean, WIDE.posterior(context, x_query).mean)
    mixed = ScaleMixture(FIXED, scaled_noise=False)
    torch.testing.assert_close(
        mixed.posterior(context, x_query, given={"scale": 1.0}).variance,
        FIXED.posterior(context, x_query).variance,
    )


@exact
def test_wrong_questions_are_refused(case: Case) -> None:
    x = torch.rand(4, case.d)
    y = torch.rand(4) + 0.1
    for context, x_query, match_ in (
        ((x, y[:3]), x, r"x \(4, .*y \(3,\)"),
        ((x, torch.full((4,), math.nan)), x, "finite y"),
        ((x, y), torch.rand(2, case.d + 1), "x_query like x"),
        ((x, ["a"] * 4), x, "y with numbers only"),
    ):
        with pytest.raises(ValueError, match=match_):
            case.prior.posterior(context, x_query)


# limits


def test_a_wide_network_is_its_infinite_limit() -> None:
    bnn = BNN(4000, 1, "erf", weight_variance=1.5, bias_variance=0.4, noise=0.05, inputs="grid")
    tasks = bnn.sample(4000, 4, 1, generator=torch.Generator().manual_seed(4))
    f = tasks.f.gather(1, tasks.x.squeeze(-1).argsort(1))
    x = torch.tensor([[0.125], [0.375], [0.625], [0.875]], dtype=torch.float64)
    expected = WIDE.posterior((torch.zeros(0, 1), torch.zeros(0)), x, latent=True, joint=True)
    covariance = expected.covariance_matrix  # type: ignore[attr-defined]
    ours = f.T @ f / len(f)
    scale = (covariance.diagonal().outer(covariance.diagonal()) + covariance.square()).sqrt()
    assert float(((ours - covariance) / scale).abs().max()) < 5.3 / math.sqrt(len(f))


def test_a_sure_mixture_is_its_part() -> None:
    mixture = Mixture((FIXED, WIDE), weights=(1.0, 1e-12))
    tasks = FIXED.sample(1, 9, 2, generator=torch.Generator().manual_seed(5))
    context = tasks.x[0, :6], tasks.y[0, :6]
    ours = mixture.posterior(context, tasks.x[0, 6:]).log_prob(tasks.y[0, 6:])
    part = FIXED.posterior(context, tasks.x[0, 6:]).log_prob(tasks.y[0, 6:])
    torch.testing.assert_close(ours, part, atol=1e-6, rtol=0)


def test_an_even_warp_is_none() -> None:
    tasks = FIXED.sample(1, 9, 2, generator=torch.Generator().manual_seed(6))
    context = tasks.x[0, :6], tasks.y[0, :6]
    plain = FIXED.posterior(context, tasks.x[0, 6:])
    warped = Warped(FIXED, input=(1.0, 1.0)).posterior(context, tasks.x[0, 6:])
    torch.testing.assert_close(warped.mean, plain.mean)
    torch.testing.assert_close(warped.variance, plain.variance)


@pytest.mark.parametrize(
    "defaults", [GaussianProcess, NNGP, BNN, LearningCurves, Linear], ids=lambda c: c.__name__
)
def test_priors_construct_with_defaults(defaults: Callable[[], Any]) -> None:
    prior = defaults()
    assert dataclasses.is_dataclass(prior)
    for wrapper in (ScaleMixture, Warped):
        if wrapper is ScaleMixture and not isinstance(prior, priors.KernelPrior):
            continue
        wrapped = wrapper(prior)
        assert wrapped.base is prior
        drawn = wrapped.sample(2, 12, 1, generator=torch.Generator().manual_seed(8))
        assert drawn.y.shape == (2, 12)
    assert Mixture([prior, FIXED]).priors[0] is prior
