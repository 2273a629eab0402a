"""NUTS on Bayesian neural networks against another model, importance sampling and calibration."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
import torch
from numpyro.infer.util import log_density
from torch import Tensor
from torch.distributions import InverseGamma, LogNormal, Normal

from priors import BNN, bnn_nuts, nuts
from priors.bnn import Parameters
from priors.bnn_reference import _infer, _predict, hyperpriors, nuts_posterior
from priors.flows import coupling, flow_of, identity_flow
from priors.inputs import standardise_inputs
from priors.reference import NutsPosterior

# sqrt(log(2 / p) / 2n) bounds a Kolmogorov-Smirnov distance but for p = 1e-6 of all seeds (DKW)
DKW = math.sqrt(math.log(2e6) / 2)
TINY = BNN(3, depth=1, noise=LogNormal(-2.0, 0.5))
HIERARCHICAL = BNN(
    4,
    weight_variance=InverseGamma(3.0, 2.0),
    bias_variance=(InverseGamma(2.0, 1.0), 0.7, InverseGamma(3.0, 1.0)),
)


SMALL = BNN(2, depth=1, weight_variance=(1.0, InverseGamma(3.0, 2.0)), noise=LogNormal(-2.0, 0.5))
SHORT = nuts.Settings(chains=2, warmup=200, draws=200)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def potential_energy(prior: BNN, x: Tensor, y: Tensor, position: Tensor) -> Tensor:
    """What NUTS descends, (node,)."""
    hyper = hyperpriors(prior.hyperparameters(1), {})
    shapes = tuple(prior.shapes(x.shape[-1]))
    network = bnn_nuts.Network(prior.activation, shapes, nuts.specify(hyper))
    with jax.enable_x64(True):
        flow = [part.couplings for part in prior.flow]
        data = bnn_nuts.task_data(flow, standardise_inputs(x), y, hyper)
        energy = jax.vmap(bnn_nuts.potential_energy(network), in_axes=(None, 0))
        return torch.from_numpy(np.array(jax.jit(energy)(data, position.numpy())))


def dimension(prior: BNN, d: int) -> int:
    weights = sum((1 + fan_in) * fan_out for fan_in, fan_out in prior.shapes(d)[:-1])
    return weights + hyperpriors(prior.hyperparameters(1), {}).dim


def model(prior: BNN, x: np.ndarray, y: np.ndarray) -> None:
    """The prior and the likelihood of observations, with weights that are not standardised."""

    def draw(name: str) -> Any:
        value = {h.name: h.value for h in prior.hyperparameters(1)}[name]
        if isinstance(value, InverseGamma):
            law = dist.InverseGamma(float(value.concentration), float(value.rate))
            return numpyro.sample(name, law)
        if isinstance(value, LogNormal):
            return numpyro.sample(name, dist.LogNormal(float(value.loc), float(value.scale)))
        return value

    h, last = jnp.sqrt(12.0) * (x - 0.5), prior.depth + 1
    for layer in range(1, last):
        weight, bias = draw(f"weight_variance_{layer}"), draw(f"bias_variance_{layer}")
        fan_in = h.shape[-1]
        law = dist.Normal(0.0, jnp.sqrt(weight / fan_in))
        w = numpyro.sample(f"w_{layer}", law.expand([fan_in, prior.width]).to_event(2))
        b = numpyro.sample(
            f"b_{layer}", dist.Normal(0.0, jnp.sqrt(bias)).expand([prior.width]).to_event(1)
        )
        h = {"tanh": jnp.tanh, "relu": jax.nn.relu}[prior.activation](h @ w + b)
    weight, bias = draw(f"weight_variance_{last}"), draw(f"bias_variance_{last}")
    covariance = bias + weight / prior.width * h @ h.T + draw("noise") * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


@pytest.mark.parametrize(
    ("prior", "n"),  # fewer observations than features of the readout, and more
    [(BNN(9, depth=1, activation="relu"), 5), (HIERARCHICAL, 13)],
)
def test_its_density_is_that_of_an_independent_model(prior: BNN, n: int) -> None:
    tasks = prior.sample(1, n, 2, generator=generator())
    x, y = tasks.x[0], tasks.y[0]
    position = torch.randn(4, dimension(prior, 2), dtype=torch.float64, generator=generator(1))
    hyper = hyperpriors(prior.hyperparameters(1), {})
    totals = []
    joint = jax.jit(lambda site: log_density(model, (prior, x.numpy(), y.numpy()), {}, site)[0])
    for row, energy in zip(position, potential_energy(prior, x, y, position), strict=True):
        *parts, t = row.split([(1 + i) * o for i, o in prior.shapes(2)[:-1]] + [hyper.dim])
        theta = {name: float(value) for name, value in hyper.values(t.unsqueeze(0)).items()}
        site: dict[str, Any] = dict(theta)
        log_jacobian = 0.0
        for layer, part in enumerate(parts, 1):
            fan_in, fan_out = prior.shapes(2)[layer - 1]
            weight = math.sqrt(theta[f"weight_variance_{layer}"] / fan_in)
            bias = math.sqrt(theta[f"bias_variance_{layer}"])
            z = part.reshape(1 + fan_in, fan_out).numpy()
            site |= {f"b_{layer}": bias * z[0], f"w_{layer}": weight * z[1:]}
            log_jacobian += fan_out * (math.log(bias) + fan_in * math.log(weight))
        for c in hyper.coordinates:  # d value / d t = value * scale, for positive variances
            log_jacobian += math.log(theta[c.name] * float(c.scale))
        with jax.enable_x64(True):
            totals.append(float(joint(site)) + log_jacobian + float(energy))
    # equal but for a constant
    assert np.ptp(totals) < 1e-6


def flow(dim: int, seed: int) -> Any:
    """A flow that is not the identity."""
    start = identity_flow(dim, couplings=3, hidden=4, generator=generator(seed))
    matrices = [
        coupling(dim, i, *map(torch.tensor, pair)) for i, pair in enumerate(start.couplings)
    ]
    noise = generator(seed + 1)
    pairs = [(m.inner.double(), torch.randn(m.outer.shape, generator=noise)) for m in matrices]
    return flow_of(dim, [(inner, outer.double()) for inner, outer in pairs])


@pytest.mark.parametrize(
    "prior",
    [
        BNN(4, depth=3, activation="erf"),
        BNN(4, depth=2, activation="gelu", weight_variance=InverseGamma(2.0, 1.0)),
        BNN(4, depth=2, activation="relu", bias_variance=0.0),
        BNN(4, depth=2, flow=(flow(3, 0), flow(5, 1))),
    ],
    ids=["erf", "gelu", "relu", "flow"],
)
def test_both_implementations_of_the_density_agree(prior: BNN) -> None:
    tasks = prior.sample(1, 11, 2, generator=generator())
    x, y, hyper = tasks.x[0], tasks.y[0], hyperpriors(prior.hyperparameters(1), {})
    position = torch.randn(6, dimension(prior, 2), dtype=torch.float64, generator=generator(1))
    parts = position.split([(1 + i) * o for i, o in prior.shapes(2)[:-1]] + [hyper.dim], -1)
    theta = hyper.values(parts[-1])
    weights = [
        part.unflatten(-1, (1 + i, o))
        for part, (i, o) in zip(parts[:-1], prior.shapes(2)[:-1], strict=True)
    ]
    drawn = prior.draw_parameters(6, 2, generator=generator())
    columns = torch.stack([theta[h.name] for h in prior.hyperparameters(1)], -1)
    parameters = drawn._replace(
        weights=tuple(weights),
        weight_variance=columns[:, : prior.depth + 1],
        bias_variance=columns[:, prior.depth + 1 : -1],
        noise=columns[:, -1],
    )
    log_prior = hyper.log_density(parts[-1])
    log_prior = log_prior + sum(Normal(0, 1).log_prob(part).sum(-1) for part in parts[:-1])
    log_likelihood = _predict(prior, parameters, x, y, x[:0], False).log_likelihood
    total = log_prior + log_likelihood + potential_energy(prior, x, y, position)
    # torch's distributions have float32 parameters
    torch.testing.assert_close(total, total[:1].expand(6), atol=1e-4, rtol=0)


def test_it_agrees_with_a_million_draws_of_the_prior() -> None:
    tasks = TINY.sample(1, 6, 1, generator=generator(3))
    x, y, x_query, y_query = tasks.x[0, :3], tasks.y[0, :3], tasks.x[0, 3:], tasks.y[0, 3:]
    drawn = TINY.draw_parameters(1_000_000, 1, generator=generator(5))
    f = TINY.functions(drawn, tasks.x.expand(1_000_000, 6, 1))
    noise = drawn.noise.sqrt().unsqueeze(-1)
    weight = Normal(f[:, :3], noise).log_prob(y).sum(-1).exp()
    weight = weight / weight.mean()
    assert 1e6 / weight.square().mean() > 1e4  # or the comparison says little

    def weighted(value: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior mean of `value` (draw, query), and its standard error."""
        mean = (weight.unsqueeze(-1) * value).mean(0)
        influence = weight.unsqueeze(-1) * (value - mean)
        return mean, influence.std(0) / 1000

    posterior, diagnostics = nuts_posterior(TINY, (x, y), x_query)
    assert isinstance(posterior, NutsPosterior) and posterior.batch_shape == (3,)
    assert diagnostics.r_hat < 1.02 and diagnostics.ess > 400 and diagnostics.divergences < 8
    means = posterior.component_distribution.mean
    variances = posterior.component_distribution.variance
    for value, node, mine in (
        (f[:, 3:], means, posterior.mean),
        (f[:, 3:].square() + drawn.noise.unsqueeze(-1), means**2 + variances, None),
    ):
        exact, error = weighted(value)
        mine = node.mean(-1) if mine is None else mine
        total = (error.square() + node.var(-1) / diagnostics.ess).sqrt()
        assert ((mine - exact).abs() < 5 * total).all()
    density, error = weighted(Normal(f[:, 3:], noise).log_prob(y_query).exp())
    total = ((error / density).square() + posterior.log_prob_error(y_query).square()).sqrt()
    assert total.max() < 0.05
    assert ((posterior.log_prob(y_query) - density.log()).abs() < 5 * total).all()
    # the noise-free function, and two queries at once
    latent = TINY.posterior((x, y), x_query, latent=True)
    below, error = weighted((f[:, 3:] < y_query).double())
    total = (error.square() + 0.25 / diagnostics.ess).sqrt()
    assert ((latent.cdf(y_query) - below).abs() < 5 * total).all()
    joint = TINY.posterior((x, y), x_query, joint=True)
    product, error = weighted(Normal(f[:, 3:], noise).log_prob(y_query).sum(-1, keepdim=True).exp())
    error_of_log = math.hypot(float(error / product), 0.1)
    assert abs(float(joint.log_prob(y_query) - product.log())) < 5 * error_of_log
    torch.testing.assert_close(joint.mean, posterior.mean)
    torch.testing.assert_close(joint.variance, posterior.variance)


def test_it_is_calibrated_on_draws_of_its_prior() -> None:
    prior, count = SMALL, 50
    truth = prior.draw_parameters(count, 1, generator=generator(1))
    x = torch.rand(count, 7, 1, dtype=torch.float64, generator=generator(2))
    f = prior.functions(truth, x)
    normal = torch.randn(f.shape, dtype=torch.float64, generator=generator(3))
    y = f + truth.noise.sqrt().unsqueeze(-1) * normal
    nodes, _ = _infer(prior, (x[:, :6], y[:, :6]), x[:, 6:], None, 0, SHORT)
    levels: dict[str, list[float]] = {}
    for i, part in enumerate(nodes):
        data = x[i, :6], y[i, :6], x[i, 6:]
        mine = _predict(prior, part.parameters, *data, joint=False)
        own = _predict(prior, row(truth, i), *data, joint=False)
        spread = (mine.spread + mine.noise.unsqueeze(-1)).sqrt()
        entries = {
            "y": Normal(mine.mean, spread).cdf(y[i, 6:]).mean(),
            "f": Normal(mine.mean, mine.spread.sqrt()).cdf(f[i, 6:]).mean(),
            "log likelihood": rank(mine.log_likelihood, own.log_likelihood, i),
        }
        latents, true = prior.report_latents(part.parameters), prior.report_latents(row(truth, i))
        entries |= {name: rank(value, true[name], i) for name, value in latents.items()}
        for name, level in entries.items():
            levels.setdefault(name, []).append(float(level))
    assert list(levels) == ["y", "f", "log likelihood", "weight_variance_2", "noise"]
    for name, level in levels.items():
        assert scipy.stats.kstest(level, "uniform").statistic < DKW / math.sqrt(count), name
        assert abs(np.mean(level) - 0.5) < 5 / math.sqrt(12 * count), name


def row(parameters: Parameters, i: int) -> Parameters:
    """Task i alone."""
    weights, *rest = parameters
    return Parameters(tuple(w[i : i + 1] for w in weights), *(part[i : i + 1] for part in rest))


def rank(draws: Tensor, truth: Tensor, seed: int) -> Tensor:
    """The rank of the truth among draws, thinned until about independent, uniform on [0, 1]."""
    draws = draws[::5]
    uniform = torch.rand((), generator=generator(seed))
    return ((draws < truth).sum() + uniform) / (len(draws) + 1)


def test_sizes_share_a_compilation_and_batches_their_answers() -> None:
    tasks = SMALL.sample(2, 7, 1, generator=generator())
    context, query = (tasks.x[:, :6], tasks.y[:, :6]), tasks.x[:, 6:]
    both, diagnostics = nuts_posterior(SMALL, context, query, settings=SHORT)
    assert both.batch_shape == (2, 1) and diagnostics.ess.shape == (2,)
    alone, _ = nuts_posterior(SMALL, (context[0][0], context[1][0]), query[0], settings=SHORT)
    torch.testing.assert_close(alone.mean, both.mean[0], rtol=1e-12, atol=0)
    nuts_posterior(SMALL, (tasks.x[0, :3], tasks.y[0, :3]), query[0], settings=SHORT)
    coordinates = nuts.specify(hyperpriors(SMALL.hyperparameters(1), {}))
    network = bnn_nuts.Network("tanh", tuple(SMALL.shapes(1)), coordinates)
    run = bnn_nuts._sampler(network, SHORT)
    assert run._cache_size() == 1  # type: ignore[attr-defined]


def test_known_latents_are_conditioned_on() -> None:
    tasks = TINY.sample(1, 6, 1, generator=generator(3))
    x, y, x_query = tasks.x[0, :5], tasks.y[0, :5], tasks.x[0, 5:]
    given = {"noise": 0.09}
    known, latent = (
        TINY.posterior((x, y), x_query, latent=latent, given=given) for latent in (False, True)
    )
    torch.testing.assert_close(known.variance - latent.variance, torch.full((1,), 0.09).double())
    same = replace(TINY, noise=0.09).posterior((x, y), x_query)
    torch.testing.assert_close(same.mean, known.mean)
    assert TINY.latent_posterior((x, y), given=given) == {}
    marginal = TINY.latent_posterior((x, y))["noise"]
    assert 0.02 < marginal.quantile(0.05) < marginal.mean < marginal.quantile(0.95) < 1
    with pytest.raises(ValueError, match="Expected given latents among"):
        TINY.posterior((x, y), x_query, given={"lengthscale": 1.0})
    with pytest.raises(ValueError, match="Expected a positive noise"):
        TINY.posterior((x, y), x_query, given={"noise": -1.0})
    with pytest.raises(ValueError, match="Expected one task"):
        TINY.latent_posterior((tasks.x, tasks.y))


def test_double_precision_does_not_leak() -> None:
    assert jax.numpy.ones(1).dtype == np.float32
