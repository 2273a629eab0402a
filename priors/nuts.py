"""Posterior draws of many hyperparameters by the No-U-Turn sampler of NumPyro, and their evidence.

One compiled sampler serves all tasks of one shape: data, kernel and key are its arguments. Chains
run one after another inside it, because in lockstep all would wait for the longest trajectory.
Densities that are written in torch (`sample_torch`) cost the same for one point as for hundreds, so
all chains of all tasks do run in lockstep there.
Importing this module imports JAX; it computes in float64 without touching JAX's global settings.
Where JAX has not started yet, it is told to use one thread: matrices are small here, and threads
that wait for each other on shared cores cost up to a hundred times the work itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions
import torch
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer.hmc import hmc
from torch import Tensor

from priors.config import to_config
from priors.hyperpriors import Hyperpriors
from priors.kernel_prior import JITTER


class Settings(NamedTuple):
    """What NUTS spends on one task under one kernel."""

    chains: int = 4
    warmup: int = 300
    draws: int = 300
    target_accept: float = 0.8
    tree_depth: int = 10  # at most, of the doublings of a trajectory


DEFAULT = Settings()


class Draws(NamedTuple):
    """Draws from a posterior in the coordinates of the hyperpriors."""

    t: Tensor  # (chain, draw, dim)
    divergent: Tensor  # (chain, draw), true where the integrator failed
    leapfrogs: Tensor  # (chain, draw), gradients spent

    @property
    def r_hat(self) -> float:
        """The largest split R-hat of the coordinates."""
        return float(np.max(split_gelman_rubin(self.t.numpy())))

    @property
    def ess(self) -> float:
        """The smallest effective sample size of the coordinates."""
        return float(np.min(effective_sample_size(self.t.numpy())))


def sample_nuts(
    kernel: str,
    x: Tensor,
    y: Tensor,
    hyper: Hyperpriors,
    *,
    seed: int,
    settings: Settings = DEFAULT,
) -> Draws:
    """Draws from p(hyperparameters | x, y) under one kernel.

    Args:
        kernel: a name in `priors.kernels.KERNELS`.
        x: (point, dim).
        y: (point,).

    Raises:
        ValueError: a hyperprior that is not in `priors.config.DISTRIBUTIONS`.
    """
    with jax.enable_x64(True):
        run = _sampler(specify(hyper), settings)
        out = run(_data(kernel, x, y, hyper), jax.random.key(seed))
        t, divergent, leapfrogs = (torch.from_numpy(np.array(part)) for part in out)
    return Draws(t, divergent, leapfrogs)


# Every kernel is profile(sum_j feature(x_j, z_j) / lengthscale_j^2). Features are computed once per
# task, so that a gradient costs two matrix-vector products more than a Cholesky factorisation's.
_KERNELS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "rbf": (lambda x, z: (x - z).square(), "gauss"),
    "matern12": (lambda x, z: (x - z).square(), "matern12"),
    "matern32": (lambda x, z: (x - z).square(), "matern32"),
    "matern52": (lambda x, z: (x - z).square(), "matern52"),
    "periodic": (lambda x, z: 4 * torch.sin(2 * math.pi * (x - z)).square(), "gauss"),
    "linear": (lambda x, z: (x - 0.5) * (z - 0.5), "identity"),
}


def _distance(square: jax.Array) -> jax.Array:
    apart = square > 0  # the square root has no gradient where points coincide
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def _matern32(square: jax.Array) -> jax.Array:
    r = math.sqrt(3) * _distance(square)
    return (1 + r) * jnp.exp(-r)


def _matern52(square: jax.Array) -> jax.Array:
    r = math.sqrt(5) * _distance(square)
    return (1 + r + r**2 / 3) * jnp.exp(-r)


_PROFILES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gauss": lambda square: jnp.exp(-0.5 * square),
    "matern12": lambda square: jnp.exp(-_distance(square)),
    "matern32": _matern32,
    "matern52": _matern52,
    "identity": lambda product: product,
}


Specification = tuple[tuple[str, str, int], ...]  # name, prior as JSON and size of coordinates


def specify(hyper: Hyperpriors) -> Specification:
    """What the sampler is compiled for; all else about the hyperpriors is data."""
    return tuple(
        (c.name, json.dumps(to_config(c.prior)), math.prod(c.shape)) for c in hyper.coordinates
    )


def _data(kernel: str, x: Tensor, y: Tensor, hyper: Hyperpriors) -> dict[str, Any]:
    """One task as the arguments of `_potential`."""
    feature, profile = _KERNELS[kernel]
    return {
        "features": feature(x.unsqueeze(1), x.unsqueeze(0)).flatten(0, 1).numpy(),  # (n^2, dim)
        "profile": list(_PROFILES).index(profile),
        "y": y.numpy(),
        "known": {name: value.reshape(-1).numpy() for name, value in hyper.known.items()},
        "mean_variance": hyper.mean_variance,
        "affine": [(c.location.numpy(), c.scale.numpy(), c.factor) for c in hyper.coordinates],
    }


def _potential(coordinates: Specification) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
    """-log p(t, y | x) up to a constant, as a function of `_data` and coordinates t (dim,)."""
    names = [name for name, _, _ in coordinates]
    priors = [to_numpyro(json.loads(config)) for _, config, _ in coordinates]
    ends = np.cumsum([size for _, _, size in coordinates])

    def potential(data: dict[str, Any], t: jax.Array) -> jax.Array:
        theta, log_prior = dict(data["known"]), jnp.zeros(())
        parts = jnp.split(t, ends[:-1])
        for name, prior, part, affine in zip(names, priors, parts, data["affine"], strict=True):
            location, scale, factor = affine
            bijection = numpyro.distributions.biject_to(prior.support)
            free = location + scale * part
            value = bijection(free)
            jacobian = bijection.log_abs_det_jacobian(free, value)
            log_prior += jnp.sum(prior.log_prob(value) + jacobian)
            theta[name] = factor * value
        n, d = len(data["y"]), data["features"].shape[-1]
        weights = jnp.broadcast_to(theta["lengthscale"] ** -2.0, (d,))
        square = (data["features"] @ weights).reshape(n, n)
        unit = jax.lax.switch(data["profile"], list(_PROFILES.values()), square)
        diagonal = theta["noise"] + JITTER * theta["outputscale"]
        covariance = theta["outputscale"] * unit + data["mean_variance"] + diagonal * jnp.eye(n)
        root = jnp.linalg.cholesky(covariance)
        z = jax.scipy.linalg.solve_triangular(root, data["y"] - theta["mean"], lower=True)
        return 0.5 * z @ z + jnp.log(jnp.diagonal(root)).sum() - log_prior

    return potential


def to_numpyro(config: dict[str, Any]) -> numpyro.distributions.Distribution:
    parameters = {k: v for k, v in config.items() if k not in ("distribution", "dtype")}
    parameters = {k: np.asarray(v, dtype=np.float64) for k, v in parameters.items()}
    return getattr(numpyro.distributions, config["distribution"])(**parameters)


Sampler = Callable[[dict[str, Any], jax.Array], tuple[jax.Array, ...]]


@functools.lru_cache(maxsize=32)
def _sampler(coordinates: Specification, settings: Settings) -> Sampler:
    dim = sum(size for _, _, size in coordinates)
    return compile_chains(_potential(coordinates), dim, settings, spread=0.5)


def compile_chains(
    potential: Callable[[dict[str, Any], jax.Array], jax.Array],
    dim: int,
    settings: Settings,
    *,
    spread: float,
) -> Sampler:
    """A jitted map from (data, key) to the draws, divergences and leapfrogs of all chains.

    Args:
        potential: maps data and a point (dim,) to minus its log density, up to a constant.
        spread: standard deviation of the normal points where chains start.
    """

    chain = _chain(potential, dim, settings, spread)

    def chains(data: dict[str, Any], key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, settings.chains)
        return jax.lax.map(functools.partial(chain, data), keys)

    return jax.jit(chains)


def _chain(
    potential: Callable[[Any, jax.Array], jax.Array], dim: int, settings: Settings, spread: float
) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:
    """A map from (data, key) to the draws, divergences and leapfrogs of one chain."""

    def chain(data: Any, key: jax.Array) -> tuple[jax.Array, ...]:
        start_key, key = jax.random.split(key)
        start = spread * jax.random.normal(start_key, (dim,))
        init, step = hmc(functools.partial(potential, data), algo="NUTS")
        state = init(
            start,
            settings.warmup,
            target_accept_prob=settings.target_accept,
            max_tree_depth=settings.tree_depth,
            rng_key=key,
        )
        state = jax.lax.fori_loop(0, settings.warmup, lambda _, state: step(state), state)

        def draw(state: Any, _: None) -> tuple[Any, tuple[jax.Array, ...]]:
            state = step(state)
            return state, (state.z, state.diverging, state.num_steps)

        return jax.lax.scan(draw, state, length=settings.draws)[1]

    return chain


Density = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sample_torch(
    density: Density, tasks: int, dim: int, *, seed: int, settings: Settings = DEFAULT
) -> list[Draws]:
    """Draws from densities that are written in torch, one of each task, all at once.

    Args:
        density: maps the tasks (row,) of points (row, dim) to log densities (row,), up to a
            constant of each task, and their gradients (row, dim).
    """
    token = next(_tokens)
    _densities[token] = density
    try:
        with jax.enable_x64(True):
            rows = jnp.stack(
                [
                    jnp.full(tasks * settings.chains, token, jnp.int32),
                    jnp.arange(tasks, dtype=jnp.int32).repeat(settings.chains),
                ],
                1,
            )
            keys = jax.random.split(jax.random.key(seed), len(rows))
            out = _lockstep_sampler(dim, settings)(rows, keys)
            parts = [torch.from_numpy(np.array(part)) for part in out]
    finally:
        del _densities[token]
    each = [part.unflatten(0, (tasks, settings.chains)) for part in parts]
    return [Draws(*task) for task in zip(*each, strict=True)]


_tokens = itertools.count()
_densities: dict[int, Density] = {}  # of the calls in progress: what is compiled serves them all


@functools.lru_cache(maxsize=32)
def _lockstep_sampler(dim: int, settings: Settings) -> Callable[..., tuple[jax.Array, ...]]:
    """Compiled chains (row,), each of which is given by its token and task (row, 2)."""

    def call(rows: Any, bits: Any) -> np.ndarray[Any, Any]:
        t = np.array(bits).view(np.float64)  # (row, dim, 1)
        token, task = np.array(rows).T
        log_density, gradient = _densities[int(token[0])](
            torch.from_numpy(task).long(), torch.from_numpy(t).squeeze(-1)
        )
        answer = torch.cat([log_density.unsqueeze(-1), gradient], -1).neg().unsqueeze(-1)
        return np.ascontiguousarray(answer.numpy()).view(np.uint32)

    def value_and_gradient(row: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        # callbacks hand numbers over in JAX's global precision, so these go as bits
        shape = jax.ShapeDtypeStruct((1 + dim, 2), jnp.uint32)
        bits = jax.lax.bitcast_convert_type(t, jnp.uint32)
        answer = jax.pure_callback(call, shape, row, bits, vmap_method="broadcast_all")
        value = jax.lax.bitcast_convert_type(answer, jnp.float64)
        return value[0], value[1:]

    @jax.custom_vjp
    def potential(row: jax.Array, t: jax.Array) -> jax.Array:
        return value_and_gradient(row, t)[0]

    def backward(gradient: jax.Array, cotangent: jax.Array) -> tuple[None, jax.Array]:
        return None, cotangent * gradient

    potential.defvjp(value_and_gradient, backward)
    return jax.jit(jax.vmap(_chain(potential, dim, settings, 1.0)))


class LogEvidence(NamedTuple):
    """An estimate in nats with its standard error."""

    value: float
    error: float


def bridge_log_evidence(
    log_density: Callable[[Tensor], Tensor], t: Tensor, *, seed: int
) -> LogEvidence:
    """log int exp(log_density(t)) dt and its standard error, from draws of the density.

    Half of each chain fits a normal proposal, the other half is compared with draws from it; then
    the halves change roles. Density and draws are made symmetric about the proposal's mean first,
    which leaves the integral as it is and skewness out of the comparison.

    Args:
        log_density: maps points (node, dim) to (node,).
        t: draws (chain, draw, dim).

    Reference: Meng and Wong, Statistica Sinica 6, 1996; Meng and Schilling, J. Comput. Graph.
    Stat. 11, 2002 (warp III); the standard error as in Fruehwirth-Schnatter, Econometrics J. 7,
    2004.
    """
    middle = t.shape[1] // 2
    halves = (t[:, :middle], t[:, middle:])
    generator = torch.Generator().manual_seed(seed)
    first = _bridge(log_density, halves[0], halves[1], generator)
    second = _bridge(log_density, halves[1], halves[0], generator)
    error = math.hypot(first.error, second.error) / 2
    return LogEvidence((first.value + second.value) / 2, error)


def _bridge(
    log_density: Callable[[Tensor], Tensor], fit: Tensor, t: Tensor, generator: torch.Generator
) -> LogEvidence:
    """The estimate from draws `t` (chain, draw, dim), with a proposal fitted to other draws."""
    dim = t.shape[-1]
    flat = fit.reshape(-1, dim)
    center = flat.mean(0)
    factor = torch.linalg.cholesky((flat - center).T @ (flat - center) / len(flat))

    def log_ratio(z: Tensor) -> Tensor:  # of the symmetric density and the normal, in its units
        both = torch.cat([center + z @ factor.T, center - z @ factor.T])
        log_p = torch.logaddexp(*log_density(both).chunk(2)) - math.log(2)
        log_q = -0.5 * (z.square().sum(-1) + dim * math.log(2 * math.pi))
        return log_p + factor.diagonal().log().sum() - log_q

    draws = torch.linalg.solve_triangular(factor, (t.reshape(-1, dim) - center).T, upper=False).T
    sign = torch.randint(0, 2, (len(draws), 1), generator=generator) * 2 - 1
    normal = torch.randn(draws.shape, dtype=t.dtype, generator=generator)
    of_draws, of_normal = log_ratio(sign * draws), log_ratio(normal)

    ess = effective_sample_size(of_draws.reshape(t.shape[:2]).numpy())
    share = float(min(1.0, ess / len(draws)))
    share = share / (1 + share)  # of the density's draws among all, counted by their worth
    log_z = float(of_draws.median())
    for _ in range(200):
        # E_q[p / (share p + (1 - share) q Z)] = Z E_p[q / ...] with both ratios below in units of Z
        top = torch.sigmoid(of_normal - log_z + math.log(share / (1 - share)))
        bottom = torch.sigmoid(log_z - of_draws + math.log((1 - share) / share))
        change = math.log(top.mean() / share) - math.log(bottom.mean() / (1 - share))
        log_z += change
        if abs(change) < 1e-10:
            break
    variance = top.var() / top.mean() ** 2 / len(top)
    variance += bottom.var() / bottom.mean() ** 2 / len(bottom) / (share / (1 - share))
    return LogEvidence(log_z, float(variance.sqrt()))
