"""Pyro programs as priors: draws, mapped and not, and posteriors against exact ones."""

import math
import subprocess
import sys
import time
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from priors import Linear, from_pyro, pyro_runs
from priors.linear import features


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regression(x: Tensor) -> None:
    """`Linear(weight_variance=1, bias_variance=1, noise=0.1)`."""
    d = x.shape[-1]
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([d]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    z = math.sqrt(12 / d) * (x - 0.5)
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Normal(b + z @ w, math.sqrt(0.1)))


def schools(x: Tensor) -> None:
    """Eight schools, not centred, and one slope of the input in all of them."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
    theta = pyro.deterministic("theta", mu + tau * eta)
    school = (8 * x[:, 0]).long().clamp(0, 7)
    f = pyro.deterministic("f", theta[school])
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.StudentT(4.0, f, 1.0))


def families(x: Tensor) -> None:
    """Distributions of many kinds, one hanging on another."""
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Beta(a, 2.0))
    c = pyro.sample("c", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    k = pyro.sample("k", dist.Categorical(c))
    s = pyro.sample("s", dist.InverseGamma(3.0, 1.0))
    m = pyro.sample("m", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    e = pyro.sample("e", dist.LogNormal(0.0, 0.5))
    f = pyro.deterministic("f", a * x[:, 0] + b + k + m.sum() * e)
    pyro.sample("y", dist.Laplace(f, s).to_event(1))


def branching(x: Tensor) -> None:
    """Python control flow on a draw: cannot be mapped."""
    if pyro.sample("flip", dist.Bernoulli(0.25)).item() > 0:
        f = pyro.sample("level", dist.Normal(10.0, 1.0)).expand(len(x))
    else:
        f = pyro.sample("level", dist.Normal(-10.0, 1.0)) * x[:, 0]
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Normal(f, 0.1))


def scattered(x: Tensor) -> None:
    """A latent of every point: its own noise variance, which makes y Student-t."""
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("points", len(x)):
        variance = pyro.sample("variance", dist.InverseGamma(2.0, 2.0))
        pyro.sample("y", dist.Normal(level, variance.sqrt()))


# draws


def test_tasks_of_a_program_have_the_moments_of_the_same_prior() -> None:
    tasks = from_pyro(regression).sample(20000, 4, 2, generator=generator())
    assert tasks.x.dtype == tasks.y.dtype == tasks.f.dtype == torch.float64
    assert tasks.latents["w"].shape == (20000, 2) and tasks.latents["b"].shape == (20000,)
    exact = features(tasks.x) @ torch.cat(
        [tasks.latents["b"].unsqueeze(-1), tasks.latents["w"]], -1
    ).unsqueeze(-1)
    torch.testing.assert_close(tasks.f, exact.squeeze(-1), atol=1e-12, rtol=0)
    for name in ("w", "b"):
        assert stats.kstest(tasks.latents[name].flatten().numpy(), "norm").pvalue > 1e-6
    noise = (tasks.y - tasks.f).flatten().numpy() / math.sqrt(0.1)
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    shared = tasks.y[:, 0] * tasks.y[:, 1]  # the intercept is all that distant inputs share
    assert abs(float(shared.mean()) - 1) < 4.9 * float(shared.std()) / math.sqrt(20000)


def test_no_tasks_have_the_shapes_of_some() -> None:
    tasks = from_pyro(regression).sample(0, 4, 2, generator=generator())
    assert tasks.x.shape == (0, 4, 2) and tasks.y.shape == tasks.f.shape == (0, 4)
    assert tasks.latents["w"].shape == (0, 2) and tasks.latents["b"].shape == (0,)


def test_tasks_of_a_batch_are_independent() -> None:
    tasks = from_pyro(regression).sample(20000, 3, 1, generator=generator())
    for value in (tasks.latents["b"], tasks.y[:, 0]):
        assert len(value.unique()) == 20000
        correlation = torch.corrcoef(torch.stack([value[1:], value[:-1]]))[0, 1]
        assert abs(float(correlation)) < 4.9 / math.sqrt(20000)


def test_the_generator_rules_all_draws_and_the_global_state_is_left_alone() -> None:
    torch.manual_seed(5)
    state, prior = torch.get_rng_state(), from_pyro(families)
    one, two, other = (prior.sample(6, 5, 1, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(one.y, two.y) and not torch.equal(one.y, other.y)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def _columns(value: Tensor) -> Any:
    return value.reshape(len(value), -1).T


@pytest.mark.parametrize("model", [regression, schools, families, scattered])
def test_programs_are_mapped_with_the_law_of_single_runs(model: Any) -> None:
    x = torch.rand(800, 3, 1, generator=generator(), dtype=torch.float64)
    with pyro_runs.private_draws(1, x.device):
        mapped = pyro_runs.run_mapped(model, x)
        singles = [pyro_runs.run(model, inputs) for inputs in x]
    columns = {"y": mapped.y, "f": mapped.f} | mapped.latents
    for name, value in columns.items():
        single = torch.stack(
            [getattr(run, name) if name in ("y", "f") else run.latents[name] for run in singles]
        )
        assert single.shape == value.shape
        for ours, theirs in zip(_columns(value), _columns(single), strict=True):
            assert stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue > 1e-7, name


def test_a_program_that_cannot_be_mapped_runs_task_by_task() -> None:
    x = torch.rand(4, 3, 1, dtype=torch.float64)
    with pyro_runs.private_draws(0, x.device), pytest.raises(Exception, match="item"):
        pyro_runs.run_mapped(branching, x)
    with pytest.warns(UserWarning, match="task by task"):
        tasks = from_pyro(branching).sample(600, 3, 1, generator=generator())
    flip, level = tasks.latents["flip"], tasks.latents["level"]
    assert abs(float(flip.double().mean()) - 0.25) < 4.9 * math.sqrt(0.1875 / 600)
    assert ((level > 0) == (flip > 0)).all() and len(level.unique()) == 600


def test_mapping_is_much_faster_than_a_loop() -> None:
    x = torch.rand(512, 20, 2, dtype=torch.float64)
    with pyro_runs.private_draws(0, x.device):
        pyro_runs.run_mapped(regression, x)
        start = time.process_time()
        pyro_runs.run_mapped(regression, x)
        mapped = time.process_time() - start
        start = time.process_time()
        for inputs in x[:32]:
            pyro_runs.run(regression, inputs)
        loop = 16 * (time.process_time() - start)
    assert loop > 5 * mapped


def test_latents_have_the_names_of_their_sites() -> None:
    latents = from_pyro(families).sample(7, 4, 2, generator=generator()).latents
    assert {name: tuple(value.shape) for name, value in latents.items()} == {
        "a": (7,),
        "b": (7,),
        "c_0": (7,),
        "c_1": (7,),
        "c_2": (7,),
        "k": (7,),
        "s": (7,),
        "m": (7, 2),
        "e": (7,),
    }
    assert latents["k"].dtype == torch.int64
    schooled = from_pyro(schools).sample(7, 8, 1, generator=generator()).latents
    assert {"mu", "tau", "eta_0", "eta_7", "theta_0", "theta_7"} <= set(schooled)
    # what belongs to single points is no latent of the task
    assert set(from_pyro(scattered).sample(7, 8, 1, generator=generator()).latents) == {"level"}


def test_f_is_a_site_or_the_mean_of_y() -> None:
    tasks = from_pyro(schools).sample(50, 6, 1, generator=generator())
    theta = torch.stack([tasks.latents[f"theta_{i}"] for i in range(8)], -1)
    school = (8 * tasks.x[..., 0]).long()
    torch.testing.assert_close(tasks.f, theta.gather(1, school), atol=1e-12, rtol=0)


def no_y(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x[:, 0], 1.0).to_event(1))


def short_y(x: Tensor) -> None:
    pyro.sample("y", dist.Normal(0.0, 1.0))


def correlated_y(x: Tensor) -> None:
    pyro.sample("y", dist.MultivariateNormal(x[:, 0], torch.eye(len(x))))


@pytest.mark.parametrize("model", [no_y, short_y])
def test_programs_without_observations_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match='Expected a site "y" of shape'):
        from_pyro(model).sample(2, 3, 1, generator=generator())


def test_what_cannot_be_conditioned_is_refused() -> None:
    context = ([0.1, 0.2], [0.0, 1.0])
    with pytest.raises(ValueError, match="independent given the latents"):
        from_pyro(correlated_y).posterior(context, [0.3])
    with pytest.raises(ValueError, match=r"\['flip'\] are discrete"):
        from_pyro(branching).posterior(context, [0.3])
    with pytest.raises(ValueError, match="latent or joint"):
        from_pyro(regression).posterior(context, [0.3], latent=True, joint=True)
    with pytest.raises(ValueError, match="multiples of 10"):
        from_pyro(regression).posterior(context, [0.3], draws=33)
    with pytest.raises(ValueError, match="Expected inputs among"):
        from_pyro(regression, inputs="nowhere")
    with pytest.raises(ValueError, match="Expected a Pyro program"):
        from_pyro("model")  # type: ignore[arg-type]


def test_without_pyro_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['pyro'] = None; import priors\n"
        "try: priors.from_pyro(print)\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'pfn[reference]'" in run.stdout


# posteriors


def test_without_data_the_posterior_is_the_prior() -> None:
    posterior = from_pyro(regression).posterior((torch.empty(0, 1), torch.empty(0)), [0.5, 1.0])
    exact = Linear(1.0, 1.0, 0.1).posterior((torch.empty(0, 1), torch.empty(0)), [0.5, 1.0])
    y = torch.tensor([0.3, -1.0], dtype=torch.float64)
    gap = (posterior.log_prob(y) - exact.log_prob(y)).abs()
    assert (gap < 6 * posterior.log_prob_error(y)).all()  # type: ignore[attr-defined]
    torch.testing.assert_close(posterior.variance, exact.variance, rtol=0.3, atol=0)
    nothing = (torch.empty(2, 0, 1), torch.empty(2, 0))
    batch = from_pyro(regression).posterior(nothing, torch.rand(2, 3, 1), draws=20)
    assert batch.batch_shape == (2, 3) and batch.cdf(batch.mean).shape == (2, 3)
    assert from_pyro(regression).log_evidence(nothing).tolist() == [0.0, 0.0]


def check_against_exact(program: Any, exact: Any, tasks: Any, n: int, **settings: int) -> None:
    """Density, moments and evidence within 6 stated Monte Carlo errors: 1e-6 of 40 batch means."""
    x, y, x_query, y_query = tasks.x[0, :n], tasks.y[0, :n], tasks.x[0, n:], tasks.y[0, n:]
    posterior = program.posterior((x, y), x_query, **settings)
    truth = exact.posterior((x, y), x_query)
    error = posterior.log_prob_error(y_query)
    assert ((posterior.log_prob(y_query) - truth.log_prob(y_query)).abs() < 6 * error + 1e-6).all()
    assert error.max() < 0.1
    means = posterior.component_distribution.mean.unflatten(-1, (40, -1)).mean(-1)
    error = means.std(-1) / math.sqrt(40)
    assert ((posterior.mean - truth.mean).abs() < 6 * error).all()
    assert (error < 0.1 * truth.stddev).all()
    level = torch.full_like(y_query, 0.2)
    torch.testing.assert_close(posterior.cdf(posterior.icdf(level)), level, atol=1e-9, rtol=0)
    torch.testing.assert_close(posterior.variance, truth.variance, rtol=0.3, atol=0)
    latent = program.posterior((x, y), x_query, latent=True, **settings)
    hidden = exact.posterior((x, y), x_query, latent=True)
    assert ((latent.mean - hidden.mean).abs() < 0.5 * hidden.stddev).all()
    torch.testing.assert_close(latent.variance, hidden.variance, rtol=0.5, atol=0)
    evidence = program.log_evidence((x, y), **settings)
    assert float(evidence) == pytest.approx(float(exact.log_evidence((x, y))), abs=0.1)
    joint = program.posterior((x, y), x_query, joint=True, **settings)
    both = exact.log_evidence((tasks.x[0], tasks.y[0])) - exact.log_evidence((x, y))
    assert float(joint.log_prob(y_query)) == pytest.approx(float(both), abs=0.5)


def test_a_program_has_the_posterior_of_the_exact_prior() -> None:
    exact = Linear(1.0, 1.0, 0.1)
    tasks = exact.sample(1, 33, 1, generator=generator(1))
    program = from_pyro(regression)
    x, y = tasks.x[0, :30], tasks.y[0, :30]
    posterior = program.posterior((x, y), tasks.x[0, 30:], warmup=60, draws=60)
    truth, y_query = exact.posterior((x, y), tasks.x[0, 30:]), tasks.y[0, 30:]
    error = posterior.log_prob_error(y_query)  # type: ignore[attr-defined]
    gap = (posterior.log_prob(y_query) - truth.log_prob(y_query)).abs()
    assert (gap < 6 * error).all() and error.max() < 0.1


@pytest.mark.slow
def test_all_answers_of_a_program_are_those_of_the_exact_prior() -> None:
    exact = Linear(1.0, 1.0, 0.1)
    tasks = exact.sample(1, 14, 2, generator=generator(1))
    check_against_exact(from_pyro(regression), exact, tasks, 10, warmup=100, draws=100)
    again = from_pyro(regression)
    context = (tasks.x[0, :10], tasks.y[0, :10])
    one, two = (again.posterior(context, [[0.1, 0.2]], warmup=100, draws=20) for _ in "ab")
    assert torch.equal(one.mean, two.mean)


@pytest.mark.slow
def test_latents_of_points_are_integrated_out() -> None:
    # given the level, y is Student-t with 4 degrees of freedom: integrate the level by hand
    y = torch.tensor([0.1, 0.5, -0.2, 3.0], dtype=torch.float64)
    level = torch.linspace(-6, 6, 4001, dtype=torch.float64).unsqueeze(-1)
    student = torch.distributions.StudentT(4.0, level, 1.0)
    log_weight = -0.5 * level.square().squeeze(-1) + student.log_prob(y).sum(-1)
    weight = log_weight.softmax(0)
    at = torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64)
    density = (weight.unsqueeze(-1) * student.log_prob(at).exp()).sum(0).log()
    x = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64)
    posterior = from_pyro(scattered).posterior((x, y), [0.2, 0.4, 0.6], warmup=150, draws=150)
    error = posterior.log_prob_error(at)  # type: ignore[attr-defined]
    assert ((posterior.log_prob(at) - density).abs() < 6 * error).all() and error.max() < 0.1


@pytest.mark.slow
def test_eight_schools_are_partially_pooled() -> None:
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64) / 5
    x = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    program = from_pyro(schools)
    marginals = program.latent_posterior((x, effects), warmup=150, draws=150)
    posterior = program.posterior((x, effects), x, latent=True, warmup=150, draws=150)
    mu = float(marginals["mu"].mean)
    shrunk = (posterior.mean - mu) / (effects - mu)
    clear = (effects - mu).abs() > 1
    assert ((shrunk[clear] > 0) & (shrunk[clear] < 1)).all()


def hidden_draws(x: Tensor) -> None:
    level = torch.randn((), dtype=torch.float64)
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Normal(level, 1.0))


def coins(x: Tensor) -> None:
    bias = pyro.sample("bias", dist.Beta(2.0, 2.0))
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Bernoulli(bias))


def test_impossible_observations_and_hidden_draws_are_refused() -> None:
    with pytest.raises(ValueError, match=r"by pyro\.sample alone"):
        from_pyro(hidden_draws).posterior(([0.1, 0.2], [0.0, 1.0]), [0.3])
    with pytest.raises(ValueError, match="support of Bernoulli"):
        from_pyro(coins).posterior(([0.1, 0.2], [0.5, 1.0]), [0.3])


def test_counts_are_predicted() -> None:
    # a Beta(2, 2) coin after 5 heads of 6: heads again with probability 7 / 10
    x, y = torch.rand(6, 1).double(), torch.tensor([1.0, 1, 1, 0, 1, 1]).double()
    posterior = from_pyro(coins).posterior((x, y), [0.5], warmup=100, draws=100)
    means = posterior.component_distribution.mean.unflatten(-1, (40, -1)).mean(-1)  # type: ignore[attr-defined]
    error = float(means.std()) / math.sqrt(40)
    assert abs(float(posterior.mean) - 0.7) < 6 * error < 0.1


def weighted(x: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.factor("pull", -50 * (level - 3.0).square())
    with pyro.plate("points", len(x)):
        pyro.sample("y", dist.Normal(level, 1.0))


def test_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="no factors and no observed sites"):
        from_pyro(weighted).sample(2, 3, 1, generator=generator())
    with pytest.raises(ValueError, match="no factors and no observed sites"):
        from_pyro(weighted).posterior(([0.1], [0.2]), [0.3])


def test_without_latents_the_law_of_y_is_all() -> None:
    def noise(x: Tensor) -> None:
        pyro.sample("y", dist.Normal(x[:, 0], 0.1).to_event(1))

    program = from_pyro(noise)
    posterior = program.posterior(([[0.1]], [0.2]), [[0.3], [0.8]])
    torch.testing.assert_close(posterior.mean, torch.tensor([0.3, 0.8]).double())
    exact = dist.Normal(0.1, 0.1).log_prob(torch.tensor(0.2))
    assert float(program.log_evidence(([[0.1]], [0.2]))) == pytest.approx(float(exact), abs=1e-5)


def test_programs_that_cannot_be_mapped_have_posteriors_too() -> None:
    def model(x: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        scale = 0.5 if float(level.detach()) > -100 else 1.0  # Python looks at a draw
        with pyro.plate("points", len(x)):
            pyro.sample("y", dist.Normal(level, scale))

    x, y = torch.rand(8, 1).double(), torch.full((8,), 0.7).double()
    with pytest.warns(UserWarning, match="mapping"):
        posterior = from_pyro(model).posterior((x, y), [0.5], warmup=50, draws=50)
    mean = 0.7 * 8 / (8 + 0.25)  # conjugate: 200 draws with a standard deviation of 0.17
    assert abs(float(posterior.mean) - mean) < 6 * 0.17 / math.sqrt(50)


def test_sites_that_some_runs_lack_are_refused() -> None:
    def forked(x: Tensor) -> None:
        is_heads = pyro.sample("flip", dist.Bernoulli(0.5)).item() > 0
        level = pyro.sample("a" if is_heads else "b", dist.Normal(0.0, 1.0))
        with pyro.plate("points", len(x)):
            pyro.sample("y", dist.Normal(level, 0.1))

    with pytest.raises(ValueError, match=r"same sites in every run; \['a', 'b'\]"):
        from_pyro(forked).sample(20, 3, 1, generator=generator())
