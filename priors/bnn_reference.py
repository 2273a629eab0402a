"""Reference posteriors of Bayesian neural networks.

Given hidden weights, variances and noise, the readout is Bayesian linear regression on the last
hidden layer, and f is Gaussian in closed form. NUTS draws the rest (`bnn_nuts.py`), and every
answer is a mixture over its draws: of proper normals, also for the noise-free function.
`BNN.posterior` is the front door; `nuts_posterior` adds diagnostics. These look at functions, not
at weights, which a posterior permutes and negates at will. The evidence is not among the answers:
NUTS does not give it for free, and bridge sampling fails in so many dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from priors.bnn import BNN, Parameters
from priors.context import Context, read_context
from priors.hyperpriors import Hyperpriors, hyperpriors
from priors.inputs import standardise_inputs
from priors.kernel_prior import JITTER, cholesky
from priors.reference import CHUNK, JOINT_ENTRIES, Marginal, NutsPosterior, read_given

if TYPE_CHECKING:
    from priors.nuts import Settings

CHAINS, DRAWS = 4, 400  # after as many for warm-up
PRIOR_DRAWS = 2000  # in each of as many chains, where there are no observations: they are cheap


class Diagnostics(NamedTuple):
    """How far to trust a posterior, (task,) each.

    R-hat and the effective sample size are those of E[f] and log Var[f] at each query, given hidden
    weights and variances, and of the log likelihood.
    """

    r_hat: Tensor  # largest split R-hat
    ess: Tensor  # smallest effective sample size
    divergences: Tensor  # number of divergent draws
    leapfrogs: Tensor  # mean number of gradients per draw


class _Nodes(NamedTuple):
    """Equally likely networks of one task, chain after chain."""

    parameters: Parameters  # (node, ...), but for the readout's weights, which are not there
    chains: int
    divergences: int
    leapfrogs: float


class _Prediction(NamedTuple):
    """What the nodes of one task predict for f at its queries."""

    mean: Tensor  # (node, m)
    spread: Tensor  # (node, m) variances, or (node, m, m) covariances
    log_likelihood: Tensor  # (node,)
    noise: Tensor  # (node,)


def posterior(
    prior: BNN,
    context: tuple[Any, Any],
    x_query: Any,
    latent: bool = False,
    *,
    joint: bool = False,
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Distribution:
    """What `BNN.posterior` returns; see there."""
    nodes, (x, y, query, batched) = _infer(prior, context, x_query, given, seed, None)
    predictions = []
    for i, part in enumerate(nodes):
        if joint:
            part = _thinned(part, max(1, JOINT_ENTRIES // max(1, query.shape[1]) ** 2))
        predictions.append(_predict(prior, part.parameters, x[i], y[i], query[i], joint))
    return _distribution(predictions, nodes[0].chains, latent, joint, batched)


def latent_posterior(
    prior: BNN,
    context: tuple[Any, Any],
    *,
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Marginal]:
    """What `BNN.latent_posterior` returns; see there."""
    nodes, data = _infer(prior, context, None, given, seed, None)
    if data.batched:
        raise ValueError("Expected one task, x of shape (n, d) or (n,); got a batch of tasks.")
    latents = prior.report_latents(nodes[0].parameters)
    return {
        name: Marginal(value, torch.full_like(value, 1 / len(value)), value, value)
        for name, value in latents.items()
        if name not in (given or {})
    }


def nuts_posterior(
    prior: BNN,
    context: tuple[Any, Any],
    x_query: Any,
    latent: bool = False,
    *,
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> tuple[Distribution, Diagnostics]:
    """The posterior predictive by NUTS, with its diagnostics; see `BNN.posterior`."""
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    nodes, (x, y, query, batched) = _infer(prior, context, x_query, given, seed, settings)
    predictions = [
        _predict(prior, part.parameters, x[i], y[i], query[i], joint=False)
        for i, part in enumerate(nodes)
    ]
    rows = []
    for part, prediction in zip(nodes, predictions, strict=True):
        watched = torch.cat(
            [prediction.mean, prediction.spread.log(), prediction.log_likelihood.unsqueeze(-1)], -1
        )
        chains = watched.unflatten(0, (part.chains, -1)).numpy()
        r_hat, ess = np.max(split_gelman_rubin(chains)), np.min(effective_sample_size(chains))
        rows.append((float(r_hat), float(ess), part.divergences, part.leapfrogs))
    diagnostics = Diagnostics(*torch.tensor(rows, dtype=torch.float64).unbind(-1))
    return _distribution(predictions, nodes[0].chains, latent, False, batched), diagnostics


@torch.no_grad()
def _infer(
    prior: BNN,
    context: tuple[Any, Any],
    x_query: Any,
    given: Mapping[str, Any] | None,
    seed: int,
    settings: Settings | None,
) -> tuple[list[_Nodes], Context]:
    """Posterior draws of every task, and the tasks."""
    data = read_context(context, x_query)
    hyperparameters = prior.hyperparameters(data.x.shape[-1])
    known = read_given(hyperparameters, given or {}, len(data.x), {})
    nodes = []
    for i, (x, y) in enumerate(zip(data.x, data.y, strict=True)):
        hyper = hyperpriors(hyperparameters, {name: value[i] for name, value in known.items()})
        own_seed = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        by = _by_nuts(prior, x, y, hyper, own_seed, settings) if len(y) else None
        nodes.append(by or _by_prior(prior, x.shape[-1], hyper, own_seed))
    return nodes, data


def _by_nuts(
    prior: BNN, x: Tensor, y: Tensor, hyper: Hyperpriors, seed: int, settings: Settings | None
) -> _Nodes:
    try:
        from priors import bnn_nuts, nuts  # on demand: they import JAX
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The posterior of a BNN needs NUTS, from NumPyro: pip install 'pfn[reference]'."
        ) from error

    settings = settings or nuts.Settings(CHAINS, DRAWS, DRAWS)
    shapes = tuple(prior.shapes(x.shape[-1]))
    inputs = standardise_inputs(x)
    flow = [part.couplings for part in prior.flow]
    draws = bnn_nuts.sample_nuts(
        prior.activation, shapes, flow, inputs, y, hyper, seed=seed, settings=settings
    )
    theta = hyper.values(draws.t.flatten(0, 1))
    weights = tuple(w.flatten(0, 1) for w in draws.weights)
    parameters = _parameters(prior, weights, theta)
    leapfrogs = float(draws.leapfrogs.double().mean())
    return _Nodes(parameters, settings.chains, int(draws.divergent.sum()), leapfrogs)


def _by_prior(prior: BNN, d: int, hyper: Hyperpriors, seed: int) -> _Nodes:
    """Independent draws of the prior, which is the posterior of no observations."""
    generator = torch.Generator().manual_seed(seed)
    drawn = prior.draw_parameters(CHAINS * PRIOR_DRAWS, d, generator=generator)
    theta = prior.all_latents(drawn)
    theta |= {name: value.expand(len(drawn.noise)) for name, value in hyper.known.items()}
    return _Nodes(_parameters(prior, drawn.weights[:-1], theta), CHAINS, 0, 0.0)


def _parameters(prior: BNN, weights: tuple[Tensor, ...], theta: Mapping[str, Tensor]) -> Parameters:
    layers = range(1, prior.depth + 2)
    weight_variance, bias_variance = (
        torch.stack([theta[f"{name}_{layer}"] for layer in layers], -1)
        for name in ("weight_variance", "bias_variance")
    )
    return Parameters(weights, weight_variance, bias_variance, theta["noise"])


def _thinned(nodes: _Nodes, limit: int) -> _Nodes:
    """At most `limit` of the nodes, evenly spread over the chains."""
    weights, *rest = nodes.parameters
    step = math.ceil(len(rest[-1]) / limit)
    some = Parameters(tuple(w[::step] for w in weights), *(part[::step] for part in rest))
    return nodes._replace(parameters=some)


@torch.no_grad()
def _predict(
    prior: BNN, parameters: Parameters, x: Tensor, y: Tensor, x_query: Tensor, joint: bool
) -> _Prediction:
    """f at the queries given each node, its readout integrated out."""
    rows = len(x) + len(x_query)
    size = max(1, CHUNK // (rows * max(prior.width, rows if joint else len(x)) + 1))
    parts = [_regress(prior, some, x, y, x_query, joint) for some in _chunks(parameters, size)]
    return _Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunks(parameters: Parameters, size: int) -> Iterator[Parameters]:
    weights, *rest = parameters
    for start in range(0, len(parameters.noise), size):
        some = slice(start, start + size)
        yield Parameters(tuple(w[some] for w in weights), *(part[some] for part in rest))


def _regress(
    prior: BNN, parameters: Parameters, x: Tensor, y: Tensor, x_query: Tensor, joint: bool
) -> _Prediction:
    """The same of some nodes at once, by Gaussian process regression with the readout's kernel.

    Reference: Rasmussen and Williams, equations 2.25, 2.26 and 2.30.
    """
    n, noise = len(x), parameters.noise
    points = torch.cat([x, x_query]).expand(len(noise), -1, -1)
    basis = prior.readout_basis(parameters, points)  # (node, n + m, 1 + width)
    seen, asked = basis[:, :n], basis[:, n:]
    factor = cholesky(seen @ seen.mT, noise)
    right = torch.cat([y.expand(len(noise), -1).unsqueeze(-1), seen @ asked.mT], -1)
    z, gain = torch.linalg.solve_triangular(factor, right, upper=False).split([1, len(x_query)], -1)
    mean = (gain * z).sum(-2)
    log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    square = z.square().sum((-2, -1))
    log_likelihood = -0.5 * (square + log_determinant + n * math.log(2 * math.pi))
    if joint:
        covariance = asked @ asked.mT - gain.mT @ gain
        return _Prediction(mean, covariance, log_likelihood, noise)
    prior_variance = asked.square().sum(-1)
    variance = (prior_variance - gain.square().sum(-2)).maximum(JITTER * prior_variance)
    return _Prediction(mean, variance, log_likelihood, noise)


def _distribution(
    predictions: list[_Prediction], chains: int, latent: bool, joint: bool, batched: bool
) -> Distribution:
    """The mixture over the nodes of every task."""
    mean, spread, _, noise = (torch.stack(column) for column in zip(*predictions, strict=True))
    if not batched:
        mean, spread, noise = mean[0], spread[0], noise[0]
    noise = torch.zeros_like(noise) if latent else noise
    if joint:
        scale = spread.diagonal(dim1=-2, dim2=-1).mean(-1)
        factor = cholesky(spread.flatten(0, -3), (noise + JITTER * scale).flatten())
        component = MultivariateNormal(mean, scale_tril=factor.reshape(spread.shape))
        return MixtureSameFamily(Categorical(logits=torch.zeros_like(noise)), component)
    mean, spread = mean.mT, (spread + noise.unsqueeze(-1)).sqrt().mT  # (..., query, node)
    mixture = Categorical(logits=torch.zeros_like(mean))
    no_error = torch.zeros(*mean.shape[:-2], 1, dtype=torch.float64)  # one prior: no weights to err
    return NutsPosterior(mixture, Normal(mean, spread), chains, no_error)
