"""Posterior draws of a Bayesian neural network by the No-U-Turn sampler of NumPyro.

The readout is a linear model of the last hidden layer, so it is integrated out: NUTS moves only
the hidden weights, standard normal a priori, and the coordinates of the variances that are random.
One compiled sampler serves all tasks of one shape, as in `nuts.py`; tasks of other sizes share it,
because rows are padded to a multiple of `ROWS` and masked.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import torch
from torch import Tensor

from priors import nuts  # imported before JAX starts: it says how many threads to use
from priors.flows import STEEPEST
from priors.hyperpriors import Hyperpriors

ROWS = 8

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "erf": jax.scipy.special.erf,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}

Shapes = tuple[tuple[int, int], ...]
Flow = Sequence[tuple[Any, Any]]  # matrices of each coupling, as in `priors.flows.WeightFlow`


class Network(NamedTuple):
    """What a sampler is compiled for, besides the number of rows."""

    activation: str
    shapes: Shapes  # (fan_in, fan_out) of each layer, the readout's last
    coordinates: nuts.Specification

    @property
    def sizes(self) -> list[int]:
        """Number of weights and biases of each hidden layer."""
        return [(1 + fan_in) * fan_out for fan_in, fan_out in self.shapes[:-1]]


class Draws(NamedTuple):
    """Posterior draws of hidden weights and variances."""

    weights: list[
        Tensor
    ]  # standard normal, of each hidden layer (chain, draw, 1 + fan_in, fan_out)
    t: Tensor  # (chain, draw, dim) in the coordinates of the hyperpriors
    divergent: Tensor  # (chain, draw), true where the integrator failed
    leapfrogs: Tensor  # (chain, draw), gradients spent


def sample_nuts(
    activation: str,
    shapes: Shapes,
    flow: Sequence[Flow],
    inputs: Tensor,
    y: Tensor,
    hyper: Hyperpriors,
    *,
    seed: int,
    settings: nuts.Settings,
) -> Draws:
    """Draws from p(hidden weights, variances | inputs, y).

    Args:
        flow: `WeightFlow.couplings` of each hidden layer, or none.
        inputs: (point, dim), standardised.
        y: (point,).
    """
    network = Network(activation, shapes, nuts.specify(hyper))
    with jax.enable_x64(True):
        run = _sampler(network, settings)
        out = run(task_data(flow, inputs, y, hyper), jax.random.key(seed))
        position, divergent, leapfrogs = (torch.from_numpy(np.array(part)) for part in out)
    *parts, t = position.split([*network.sizes, hyper.dim], -1)
    weights = [
        part.unflatten(-1, (1 + fan_in, fan_out))
        for part, (fan_in, fan_out) in zip(parts, shapes[:-1], strict=True)
    ]
    return Draws(weights, t, divergent, leapfrogs)


def task_data(
    flow: Sequence[Flow], inputs: Tensor, y: Tensor, hyper: Hyperpriors
) -> dict[str, Any]:
    """One task as an argument of `potential_energy`."""
    padding = -len(y) % ROWS
    return {
        "flow": [[tuple(map(np.array, pair)) for pair in couplings] for couplings in flow],
        "inputs": np.pad(inputs.numpy(), ((0, padding), (0, 0))),
        "y": np.pad(y.numpy(), (0, padding)),
        "real": np.arange(len(y) + padding) < len(y),
        "known": {name: value.numpy() for name, value in hyper.known.items()},
        "affine": [(c.location.numpy(), c.scale.numpy()) for c in hyper.coordinates],
    }


def potential_energy(network: Network) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
    """-log p(weights, t, y | x) up to a constant, at the position (dim,) of both one by one."""
    priors = [nuts.to_numpyro(json.loads(config)) for _, config, _ in network.coordinates]
    ends = np.cumsum(network.sizes)
    activation = ACTIVATIONS[network.activation]
    readout = len(network.shapes)

    def potential(data: dict[str, Any], position: jax.Array) -> jax.Array:
        *parts, t = jnp.split(position, ends)
        theta, log_prior = dict(data["known"]), -0.5 * position[: ends[-1]] @ position[: ends[-1]]
        coordinates = zip(network.coordinates, priors, t, data["affine"], strict=True)
        for (name, _, _), prior, value, (location, scale) in coordinates:
            bijection = numpyro.distributions.biject_to(prior.support)
            free = location + scale * value
            theta[name] = bijection(free)
            jacobian = bijection.log_abs_det_jacobian(free, theta[name])
            log_prior += prior.log_prob(theta[name]) + jacobian
        hidden = data["inputs"]
        for layer, (part, shape) in enumerate(zip(parts, network.shapes[:-1], strict=True), 1):
            weights = part.reshape(1 + shape[0], shape[1])
            for couplings in data["flow"][layer - 1 : layer]:
                weights = _push(couplings, weights)
            weight_scale = jnp.sqrt(theta[f"weight_variance_{layer}"] / shape[0])
            bias_scale = jnp.sqrt(theta[f"bias_variance_{layer}"])
            hidden = activation(bias_scale * weights[0] + weight_scale * (hidden @ weights[1:]))
        weight_variance = theta[f"weight_variance_{readout}"] / network.shapes[-1][0]
        bias_variance = theta[f"bias_variance_{readout}"]
        basis = jnp.concatenate(
            [
                jnp.full((len(hidden), 1), jnp.sqrt(bias_variance)),
                jnp.sqrt(weight_variance) * hidden,
            ],
            1,
        )
        basis = jnp.where(data["real"][:, None], basis, 0.0)  # (point, 1 + width)
        log_likelihood = _linear_evidence(basis, data["y"], theta["noise"], data["real"].sum())
        return -log_prior - log_likelihood

    return potential


def _push(couplings: Flow, z: jax.Array) -> jax.Array:
    """What `priors.flows.push` does, to the columns of z (dim, unit)."""
    for index, (inner, outer) in enumerate(couplings):
        kept, moved = slice(index % 2, None, 2), slice(1 - index % 2, None, 2)
        hidden = jnp.tanh(inner[:1].T + inner[1:].T @ z[kept])
        scale, shift = jnp.split(outer[:1].T + outer[1:].T @ hidden, 2)
        scale = jnp.exp(STEEPEST * jnp.tanh(scale / STEEPEST))
        z = z.at[moved].set(z[moved] * scale + shift)
    return z


def _linear_evidence(
    basis: jax.Array, y: jax.Array, noise: jax.Array, count: jax.Array
) -> jax.Array:
    """log Normal(y; 0, basis basis' + noise I) up to a constant, by the smaller of two matrices.

    Rows of zeros, with y = 0, do not matter: `count` is the number of the others.

    Reference: Rasmussen and Williams, equations 2.30 and 2.11.
    """
    rows, columns = basis.shape
    if rows <= columns:
        gram = basis @ basis.T / noise + jnp.eye(rows)
        root = jnp.linalg.cholesky(gram)
        z = jax.scipy.linalg.solve_triangular(root, y, lower=True)
        square = z @ z
    else:
        gram = basis.T @ basis / noise + jnp.eye(columns)
        root = jnp.linalg.cholesky(gram)
        z = jax.scipy.linalg.solve_triangular(root, basis.T @ y / jnp.sqrt(noise), lower=True)
        square = y @ y - z @ z
    log_determinant = count * jnp.log(noise) + 2 * jnp.log(jnp.diagonal(root)).sum()
    return -0.5 * (square / noise + log_determinant)


@functools.lru_cache(maxsize=32)
def _sampler(network: Network, settings: nuts.Settings) -> nuts.Sampler:
    dim = sum(network.sizes) + sum(size for _, _, size in network.coordinates)
    return nuts.compile_chains(potential_energy(network), dim, settings, spread=1.0)
