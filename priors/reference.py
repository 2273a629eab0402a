"""Reference posteriors of kernel priors: hyperpriors and alternative kernels integrated out.

Inference turns one task into weighted nodes of the hyperparameters, by quadrature, NUTS or
sequential Monte Carlo, and every answer is a sum over nodes. `KernelPrior.posterior` is the front
door; read `quadrature.py`, `nuts.py` and `smc.py` for the three ways, `nuts_posterior` for
diagnostics of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from priors.context import as_tensor, read_context
from priors.distributions import SameFamily
from priors.gp import GaussianProcess
from priors.hyperpriors import Hyperpriors, hyperpriors
from priors.kernel_prior import JITTER, Hyperparameter, KernelPrior, NodeModel, cholesky
from priors.quadrature import integrate, parities
from priors.smc import SmcPosterior, sample_smc

if TYPE_CHECKING:
    from priors.nuts import Draws, Settings

MASS_LEFT_OUT = 1e-8  # of the posterior, in nodes too light to predict with
FEW = 1000  # nodes, of which none is too light
ISLANDS, PARTICLES = 8, 1600  # of sequential Monte Carlo, for each alternative
JOINT_ENTRIES = 2**26  # in the covariance matrices of a joint posterior: its nodes are limited
CHUNK = 2**18  # matrix entries at once: what a cache holds


class Marginal(NamedTuple):
    """The posterior of one latent: weighted values, each spread over a cell from `low` to `high`.

    All but the weights are (node,), or (node, dim) with one latent per feature.
    """

    values: Tensor
    weights: Tensor  # (node,), sums to 1
    low: Tensor
    high: Tensor

    @property
    def mean(self) -> Tensor:
        return torch.tensordot(self.weights, self.values, 1)

    @property
    def variance(self) -> Tensor:
        return torch.tensordot(self.weights, (self.values - self.mean).square(), 1)

    def cdf(self, value: float | Tensor) -> Tensor:
        """The probability that the latent lies below `value`; () or (dim,)."""
        at, low, high = torch.as_tensor(value, dtype=torch.float64), self.low, self.high
        if (low > 0).all():  # then the cells are those of the logarithm
            at, low, high = at.clamp_min(1e-300).log(), low.log(), high.log()
        inside = ((at - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        return torch.tensordot(self.weights, inside, 1)

    def quantile(self, level: float) -> Tensor:
        """The value below which the latent lies with probability `level`; () or (dim,)."""
        below, above = self.low.amin(0), self.high.amax(0)
        for _ in range(80):  # bisection to the last bit
            middle = (below + above) / 2
            is_below = self.cdf(middle) < level
            below, above = middle.where(is_below, below), above.where(is_below, middle)
        return (below + above) / 2


class Diagnostics(NamedTuple):
    """How far to trust a posterior by NUTS; each entry is (task, alternative)."""

    log_evidence: Tensor
    log_evidence_error: Tensor  # standard error in nats
    r_hat: Tensor  # largest split R-hat of the hyperparameters
    ess: Tensor  # smallest effective sample size of the hyperparameters
    divergences: Tensor  # number of divergent draws
    leapfrogs: Tensor  # mean number of gradients per draw


class NutsPosterior(SameFamily):
    """A mixture over the draws of NUTS that knows the Monte Carlo error of its log density."""

    blocks = 10  # per chain; their means are about independent

    def __init__(
        self, mixture: Categorical, component: Normal, chains: int, log_evidence_error: Tensor
    ) -> None:
        super().__init__(mixture, component)
        self._chains, self._log_evidence_error = chains, log_evidence_error

    def log_prob_error(self, value: Tensor) -> Tensor:
        """The standard error of `log_prob(value)` in nats, from batch means and the evidences.

        With r the component densities relative to the mixture's, and w the weights of the kernels,
        its square is sum_k w_k^2 (Var[mean r of k] + (mean r of k - 1)^2 Var[log evidence of k]).
        """
        log_ratio = self.component_distribution.log_prob(value.unsqueeze(-1))
        ratio = (log_ratio - self.log_prob(value).unsqueeze(-1)).exp()
        kernels = self._log_evidence_error.shape[-1]
        groups = kernels, self._chains * self.blocks, -1
        means = ratio.unflatten(-1, groups).mean(-1)  # (..., query, kernel, block)
        weight = self.mixture_distribution.probs.unflatten(-1, (kernels, -1)).sum(-1)
        error = self._log_evidence_error.unsqueeze(-2)  # (..., 1, kernel)
        variance = means.var(-1) / means.shape[-1] + ((means.mean(-1) - 1) * error).square()
        return (weight.square() * variance).sum(-1).sqrt()


class QuadraturePosterior(SameFamily):
    """A mixture over the nodes of a lattice that knows about how precise its log density is."""

    def __init__(self, mixture: Categorical, component: Normal, parity: Tensor) -> None:
        super().__init__(mixture, component)
        self._parity = parity  # (..., node, kernel, half) as in `quadrature.parities`, 0 elsewhere

    def log_prob_error(self, value: Tensor) -> Tensor:
        """About how far `log_prob(value)` may be off, in nats.

        That is the square of how far half lattices disagree: the trapezoidal rule converges
        geometrically on smooth densities, so that a lattice errs by the square of what its halves
        err by, or less. The worst way to halve counts, summed over kernels, and the mass of nodes
        left out, which is about what they matter for a y that is no surprise.

        Reference: Trefethen and Weideman, The Exponentially Convergent Trapezoidal Rule, SIAM
        Review 2014, section 5.
        """
        weight = self.mixture_distribution.probs
        log_density = self.component_distribution.log_prob(value.unsqueeze(-1))
        share = (self.mixture_distribution.logits + log_density).softmax(-1)
        difference = torch.einsum("...qn,...nkh->...qkh", share - weight, self._parity)
        return (2 * difference.abs().amax(-1).sum(-1)).square() + MASS_LEFT_OUT


class _Task(NamedTuple):
    """One data set with its known latents."""

    x: Tensor  # (point, dim)
    y: Tensor  # (point,)
    x_query: Tensor  # (query, dim)
    given: dict[str, Tensor]


class Dense(NamedTuple):
    """What `Spectral` offers, by one Cholesky factorisation per node: for free lengthscales."""

    prior: KernelPrior
    x: Tensor
    y: Tensor
    mean_variance: float

    def log_likelihood(self, theta: dict[str, Tensor]) -> Tensor:
        parts = [
            self.prior.log_likelihood(x, y, some, mean_variance=self.mean_variance)
            for some, x, y in self._chunks(theta, self.x, self.y)
        ]
        return torch.cat(parts)

    def log_likelihood_or_none(self, theta: dict[str, Tensor]) -> Tensor:
        """The same, but -inf far out, where no diagonal mends a covariance."""
        try:
            return self.log_likelihood(theta)
        except RuntimeError:
            nodes = len(theta["mean"])
            if nodes == 1:
                return self.y.new_full((1,), -math.inf)
            halves = (slice(nodes // 2), slice(nodes // 2, None))
            parts = ({name: value[half] for name, value in theta.items()} for half in halves)
            return torch.cat([self.log_likelihood_or_none(part) for part in parts])

    def predict(
        self, theta: dict[str, Tensor], x_query: Tensor, *, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        parts = [
            self.prior.conditional(
                x, y, queries, some, joint=joint, mean_variance=self.mean_variance
            )
            for some, x, y, queries in self._chunks(theta, self.x, self.y, x_query)
        ]
        means, spreads = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(spreads)

    def mean(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        parts = []
        for some, x, y in self._chunks(theta, self.x, self.y):
            factor, z = self.prior.whiten(x, y, some, self.mean_variance)
            ones = torch.full_like(y, self.mean_variance).unsqueeze(-1)
            gain = torch.linalg.solve_triangular(factor, ones, upper=False).squeeze(-1)
            variance = self.mean_variance - gain.square().sum(-1)
            parts.append((some["mean"] + (gain * z).sum(-1), variance))
        means, variances = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(variances)

    def _chunks(self, theta: dict[str, Tensor], *data: Tensor) -> Iterator[tuple[Any, ...]]:
        """Some nodes at a time, so that their matrices fit in memory, with the data expanded."""
        rows = max(len(part) for part in data)
        size = max(1, CHUNK // max(1, rows * rows))
        for start in range(0, len(theta["mean"]), size):
            some = {name: value[start : start + size] for name, value in theta.items()}
            yield some, *(part.expand(len(some["mean"]), *part.shape) for part in data)


class _Nodes(NamedTuple):
    """Weighted hyperparameters of one task under one alternative."""

    hyper: Hyperpriors
    prior: KernelPrior
    model: NodeModel
    t: Tensor  # (node, dim) in the coordinates of `hyper`
    log_weights: Tensor  # (node,); their exponentials sum to p(y, alternative | x)
    spacing: Tensor  # (dim,) of a lattice; 0 for draws
    lattice_index: Tensor | None = None  # (node, dim), if they are a lattice's
    draws: Draws | None = None
    log_evidence_error: float = 0.0
    islands: int = 0  # of equally many draws by sequential Monte Carlo


class _Prediction(NamedTuple):
    """Nodes of one task and what they predict at its queries."""

    log_weights: Tensor  # (node,)
    mean: Tensor  # (node, m)
    spread: Tensor  # (node, m) standard deviations, or (node, m, m) Cholesky factors
    parity: Tensor  # (node, kernel, half) of `QuadraturePosterior`


def posterior(
    prior: KernelPrior,
    context: tuple[Any, Any],
    x_query: Any,
    latent: bool = False,
    *,
    joint: bool = False,
    given: Mapping[str, Any] | None = None,
    method: str | None = None,
    seed: int = 0,
) -> Distribution:
    """What `KernelPrior.posterior` returns; see there."""
    tasks, batched = _tasks(prior, context, x_query, given)
    nodes = [_infer(prior, task, method, (seed, i)) for i, task in enumerate(tasks)]
    return _distribution(tasks, nodes, latent, joint, batched)


def nuts_posterior(
    prior: KernelPrior,
    context: tuple[Any, Any],
    x_query: Any,
    latent: bool = False,
    *,
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> tuple[Distribution, Diagnostics]:
    """The posterior predictive by NUTS, with its diagnostics; see `KernelPrior.posterior`."""
    tasks, batched = _tasks(prior, context, x_query, given)
    nodes = [_infer(prior, task, "nuts", (seed, i), settings) for i, task in enumerate(tasks)]

    def table(entry: Callable[[_Nodes, Draws], Any]) -> Tensor:
        rows = [[entry(part, part.draws) for part in row if part.draws] for row in nodes]
        return torch.tensor(rows, dtype=torch.float64)

    diagnostics = Diagnostics(
        log_evidence=table(lambda part, draws: part.log_weights.logsumexp(0)),
        log_evidence_error=table(lambda part, draws: part.log_evidence_error),
        r_hat=table(lambda part, draws: draws.r_hat),
        ess=table(lambda part, draws: draws.ess),
        divergences=table(lambda part, draws: draws.divergent.sum()),
        leapfrogs=table(lambda part, draws: draws.leapfrogs.double().mean()),
    )
    return _distribution(tasks, nodes, latent, False, batched), diagnostics


def log_evidence(
    prior: KernelPrior,
    context: tuple[Any, Any],
    *,
    given: Mapping[str, Any] | None = None,
    method: str | None = None,
    seed: int = 0,
) -> Tensor:
    """What `KernelPrior.log_evidence` returns; see there."""
    tasks, batched = _tasks(prior, context, None, given)
    totals = []
    for i, task in enumerate(tasks):
        nodes = _infer(prior, task, method, (seed, i))
        totals.append(torch.cat([part.log_weights for part in nodes]).logsumexp(0))
    return torch.stack(totals) if batched else totals[0]


def latent_posterior(
    prior: KernelPrior,
    context: tuple[Any, Any],
    *,
    given: Mapping[str, Any] | None = None,
    method: str | None = None,
    seed: int = 0,
) -> dict[str, Marginal]:
    """What `KernelPrior.latent_posterior` returns; see there."""
    tasks, batched = _tasks(prior, context, None, given)
    if batched:
        raise ValueError("Expected one task, x of shape (n, d) or (n,); got a batch of tasks.")
    nodes = _infer(prior, tasks[0], method, (seed, 0), step=0.4)  # fine enough to interpolate
    weights = torch.cat([part.log_weights for part in nodes]).softmax(0)
    hyper = nodes[0].hyper
    values, low, high = (
        [hyper.values(part.t + side * part.spacing / 2) for part in nodes] for side in (0, -1, 1)
    )
    marginals = {}
    for name in (c.name for c in hyper.coordinates):
        columns = (torch.cat([theta[name] for theta in side]) for side in (values, low, high))
        at, *edges = columns
        marginals[name] = Marginal(at, weights, *edges)
    if hyper.mean_variance:  # normal at every node: as many equally likely values, of its variance
        moments = [part.model.mean(part.hyper.values(part.t)) for part in nodes]
        mean, variance = (torch.cat(column).unsqueeze(-1) for column in zip(*moments, strict=True))
        normal = torch.special.ndtri((torch.arange(64, dtype=torch.float64) + 0.5) / 64)
        at = (mean + variance.sqrt() * normal / normal.square().mean().sqrt()).flatten()
        marginals["mean"] = Marginal(at, (weights / 64).repeat_interleave(64), at, at)
    if len(nodes) > 1:
        sizes = torch.tensor([len(part.log_weights) for part in nodes])
        index = torch.arange(len(nodes), dtype=torch.float64).repeat_interleave(sizes)
        marginals[prior.choice] = Marginal(index, weights, index, index)
    return marginals


@torch.no_grad()
def _infer(
    prior: KernelPrior,
    task: _Task,
    method: str | None,
    seeds: tuple[int, int],
    settings: Settings | None = None,
    step: float = 0.65,
) -> list[_Nodes]:
    """Weighted nodes of one task, for each alternative that it may have."""
    if method not in (None, "quadrature", "nuts", "smc"):
        raise ValueError(f'Expected method "quadrature", "nuts", "smc" or None; got {method!r}.')
    if method == "nuts" and not isinstance(prior, GaussianProcess):
        raise ValueError(f"Expected a GaussianProcess for NUTS; got a {type(prior).__name__}.")
    known = alternatives(prior, task.x.shape[-1], task.given)
    nodes = []
    for index, hyper in known.items():
        if method == "quadrature" or hyper.dim <= (0 if method else prior.quadrature_limit):
            part = _by_quadrature(prior, task, hyper, step)
        else:
            model = Dense(prior, task.x, task.y, hyper.mean_variance)
            draws = _by_nuts if (method or _draws_of(prior)) == "nuts" else _by_smc
            part = draws(model, hyper, (*seeds, index), settings)
        nodes.append(part._replace(log_weights=part.log_weights - math.log(len(known))))
    return nodes


def alternatives(prior: KernelPrior, d: int, given: Mapping[str, Tensor]) -> dict[int, Hyperpriors]:
    """The hyperpriors of a task with d features, by the alternatives that it may have.

    Args:
        given: as in `hyperpriors`.
    """
    hyperparameters = prior.hyperparameters(d)
    if len(prior.alternatives) == 1:
        return {0: hyperpriors(hyperparameters, given)}
    known = given.get(prior.choice)
    indices = range(len(prior.alternatives)) if known is None else [int(known)]
    return {
        index: hyperpriors(hyperparameters, {**given, prior.choice: torch.tensor(index)})
        for index in indices
    }


def _draws_of(prior: KernelPrior) -> str:
    """The method for more hyperparameters than quadrature takes."""
    return "nuts" if isinstance(prior, GaussianProcess) else "smc"


def _by_quadrature(prior: KernelPrior, task: _Task, hyper: Hyperpriors, step: float) -> _Nodes:
    model = prior.of_one_task(task.x, task.y, hyper.mean_variance)

    def log_density(t: Tensor) -> Tensor:
        return hyper.log_density(t) + model.log_likelihood(hyper.values(t))

    limits = [c.spacing / c.scale.expand(c.shape).reshape(-1) for c in hyper.coordinates]
    threshold = 18.0
    if hyper.dim == 1 and hyper.coordinates[0].name not in prior.shaping:
        step, threshold = 0.25, 60.0  # costs nothing: to the last digits, and far into the tails
    nodes = integrate(
        log_density,
        hyper.dim,
        limits=torch.cat([torch.ones(0), *limits]),
        step=step,
        threshold=threshold,
    )
    return _Nodes(
        hyper, prior, model, nodes.points, nodes.log_weights, nodes.spacing, nodes.lattice_index
    )


def _by_nuts(
    model: Dense, hyper: Hyperpriors, seeds: tuple[int, ...], settings: Settings | None
) -> _Nodes:
    try:
        from priors import nuts  # on demand: it imports JAX
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{hyper.dim} hyperparameters need NUTS, from NumPyro: pip install 'pfn[reference]'."
        ) from error

    def log_density(t: Tensor) -> Tensor:
        return hyper.log_density(t) + model.log_likelihood(hyper.values(t))

    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    settings = settings or nuts.DEFAULT
    kernel = model.prior.alternatives[int(hyper.known.get(model.prior.choice, 0))]
    draws = nuts.sample_nuts(kernel, model.x, model.y, hyper, seed=seed, settings=settings)
    evidence = nuts.bridge_log_evidence(log_density, draws.t, seed=seed)
    t = draws.t.flatten(0, 1)
    log_weights = t.new_full((len(t),), evidence.value - math.log(len(t)))
    return _Nodes(
        hyper, model.prior, model, t, log_weights, torch.zeros(()), None, draws, evidence.error
    )


def _by_smc(
    model: Dense, hyper: Hyperpriors, seeds: tuple[int, ...], settings: Settings | None
) -> _Nodes:
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    start = hyper.draw(PARTICLES, generator=generator)
    draws = sample_smc(
        start,
        hyper.log_density,
        lambda t: model.log_likelihood_or_none(hyper.values(t)),
        generator=generator,
        islands=ISLANDS,
    )
    log_weights = draws.log_weights + draws.log_evidence
    return _Nodes(hyper, model.prior, model, draws.t, log_weights, torch.zeros(()), islands=ISLANDS)


def _distribution(
    tasks: list[_Task], nodes: list[list[_Nodes]], latent: bool, joint: bool, batched: bool
) -> Distribution:
    """The mixture over all nodes of each task; tasks of fewer nodes get components of weight 0."""
    predictions = [_predict(*both, latent, joint) for both in zip(tasks, nodes, strict=True)]
    size = max(len(prediction.log_weights) for prediction in predictions)
    fill = -math.inf, 0.0, torch.eye(len(tasks[0].x_query)).double() if joint else 1.0, 0.0
    log_weights, mean, spread, parity = (
        torch.stack([_pad(part, size, f) for part in column])
        for column, f in zip(zip(*predictions, strict=True), fill, strict=True)
    )
    errors = torch.tensor([[part.log_evidence_error for part in row] for row in nodes])
    if not batched:
        log_weights, mean, spread, parity = log_weights[0], mean[0], spread[0], parity[0]
        errors = errors[0]
    if joint and size == 1:
        return MultivariateNormal(mean.squeeze(-2), scale_tril=spread.squeeze(-3))
    if joint:
        component = MultivariateNormal(mean, scale_tril=spread)
        return MixtureSameFamily(Categorical(logits=log_weights), component)
    if size == 1:
        return Normal(mean.squeeze(-2), spread.squeeze(-2))
    mean, spread = mean.mT, spread.mT  # (..., query, node)
    mixture = Categorical(logits=log_weights.unsqueeze(-2).expand(mean.shape), validate_args=False)
    if islands := nodes[0][0].islands:  # each with its draws of all alternatives
        order = torch.arange(size).reshape(len(nodes[0]), islands, -1).transpose(0, 1).flatten()
        normals = Normal(mean[..., order], spread[..., order])
        return SmcPosterior(mixture.logits[..., order], normals, islands)
    if nodes[0][0].draws is None:
        return QuadraturePosterior(mixture, Normal(mean, spread), parity)
    return NutsPosterior(mixture, Normal(mean, spread), len(nodes[0][0].draws.t), errors.double())


def _predict(task: _Task, nodes: list[_Nodes], latent: bool, joint: bool) -> _Prediction:
    """What the nodes of all alternatives predict for one task."""
    total = torch.cat([part.log_weights for part in nodes]).logsumexp(0)
    parts = []
    for kernel, part in enumerate(nodes):
        log_weights = part.log_weights - total
        keep = torch.arange(len(log_weights))
        limit = max(1, int(JOINT_ENTRIES / len(nodes) / max(1, len(task.x_query)) ** 2))
        if part.lattice_index is not None:
            order = log_weights.argsort()
            left_out = MASS_LEFT_OUT if len(order) > FEW else 0.0
            keep = order[log_weights[order].exp().cumsum(0) > left_out]
            keep = keep[-limit:] if joint else keep
        elif joint:
            keep = keep[:: math.ceil(len(keep) / limit)]
        theta = part.hyper.values(part.t[keep])
        mean, spread = part.model.predict(theta, task.x_query, joint=joint)
        signal, noise = part.prior.variances(theta)
        noise = torch.zeros_like(noise) if latent else noise
        if joint:
            spread = cholesky(spread, noise + JITTER * signal)
        else:
            spread = (spread + noise.unsqueeze(-1)).sqrt()
        halves = (
            mean.new_zeros(len(keep), 0)
            if part.lattice_index is None
            else parities(part.lattice_index[keep])
        )
        halves = F.pad(
            halves, (0, 1)
        )  # one way to halve, whose halves agree, where there is no other
        parity = halves.new_zeros(len(keep), len(nodes), halves.shape[1])
        parity[:, kernel] = halves
        parts.append(_Prediction(log_weights[keep], mean, spread, parity))
    return _Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _pad(part: Tensor, size: int, fill: float | Tensor) -> Tensor:
    """The nodes of a task, and `fill` for those up to `size`."""
    padded = part.new_empty(size, *part.shape[1:])
    padded[:] = torch.as_tensor(fill, dtype=part.dtype)
    padded[: len(part)] = part
    return padded


def _tasks(
    prior: KernelPrior,
    context: tuple[Any, Any],
    x_query: Any | None,
    given: Mapping[str, Any] | None,
) -> tuple[list[_Task], bool]:
    """Checked tasks in float64 on the CPU, and whether they came as a batch."""
    x, y, query, batched = read_context(context, x_query)
    latents = read_given(prior.hyperparameters(x.shape[-1]), given or {}, len(x), categories(prior))
    rows = ({name: value[i] for name, value in latents.items()} for i in range(len(x)))
    return [_Task(*row) for row in zip(x, y, query, rows, strict=True)], batched


def categories(prior: KernelPrior) -> dict[str, int]:
    """The latent that is an index, and of how many alternatives; none without a choice."""
    count = len(prior.alternatives)
    return {prior.choice: count} if count > 1 else {}


def read_given(
    hyperparameters: Sequence[Hyperparameter],
    given: Mapping[str, Any],
    batch: int,
    choices: Mapping[str, int],
) -> dict[str, Tensor]:
    """Known latents by task: (b,), or (b, d) where there is one for each feature.

    Args:
        choices: latents that are indices, and the number of alternatives of each.

    Raises:
        ValueError: latents that are unknown, of another shape, or impossible.
    """
    shapes = {h.name: (batch, *h.shape) for h in hyperparameters}
    shapes |= dict.fromkeys(choices, (batch,))
    latents = {}
    for name, value in given.items():
        if name not in shapes:
            raise ValueError(f"Expected given latents among {sorted(shapes)}; got {name!r}.")
        value = as_tensor(name, value)
        try:
            latents[name] = value.expand(shapes[name])
        except RuntimeError:
            raise ValueError(
                f"Expected given {name} of a shape that broadcasts to {shapes[name]}; "
                f"got {tuple(value.shape)}."
            ) from None
        if name in choices:
            if not all(index in range(choices[name]) for index in latents[name].tolist()):
                raise ValueError(f"Expected a {name} index below {choices[name]}; got {value}.")
        elif name == "relevance" and not ((value == 0) | (value == 1)).all():
            raise ValueError(f"Expected a {name} of 0 or 1; got {value.tolist()}.")
        elif name not in ("mean", "relevance") and not (value > 0).all():
            raise ValueError(f"Expected a positive {name}; got {value.tolist()}.")
    return latents
