"""Finite networks as surrogates: `hmc-bnn`, `sghmc-bnn`, `ensemble`, `laplace-bnn`.

All have the prior `priors.BNN` over tanh networks on standardised outcomes, whose variances and
noise are inferred or tuned by evidence, never set by hand. The first three are draws of functions
(`draws.py`): exact but slow, by stochastic gradients, and MAP networks from many starts. The last
linearises one MAP network in its weights, which makes a Gaussian process with closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from torch import Tensor
from torch.distributions import InverseGamma, LogNormal

from priors.bnn import BNN, Parameters
from priors.hyperpriors import hyperpriors
from priors.inputs import standardise_inputs
from priors.kernel_prior import KernelPrior, cholesky
from priors.matching import match
from surrogates.draws import DrawsModel
from surrogates.gaussian_processes import (
    LEAST_NOISE,
    InfiniteWidthKernel,
    fit_kernel,
    kernel_model,
    refuse_known_noise,
)
from surrogates.observations import observe

CACHED = 2**20  # activations of a hidden layer at once, 8 MiB
ERF_OF_TANH = 4 / math.pi  # tanh(sqrt(4 / pi) u) is about erf(u): the same slope at 0
WINDOW = 200.0  # steps over which masses are estimated, at most
NOISE = -4.0  # median of the noise's logarithm, as in BoTorch's GP
FIRST_NOISES = (0.01, 0.1)  # of the linearised network, in turn: the larger may call all noise
MODE_STEPS = 80


@dataclass(frozen=True)
class NetworkDraws:
    """Networks as functions of the unit cube, for `DrawsModel`."""

    prior: BNN
    parameters: Parameters  # (draw, ...)

    def __call__(self, X: Tensor) -> Tensor:
        """All draws (draw, batch x q) at X (batch x q x d)."""
        draws = len(self.parameters.noise)
        flat = X.reshape(-1, X.shape[-1])
        pieces = flat.split(max(1, CACHED // (draws * self.prior.width)))
        values = [self.prior.functions(self.parameters, x.expand(draws, -1, -1)) for x in pieces]
        return torch.cat(values, 1).reshape(draws, *X.shape[:-1])


def hierarchical(width: int, depth: int) -> BNN:
    """The prior of the sampled networks, where every layer's variances are random."""
    broad = LogNormal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    noise = LogNormal(torch.tensor(NOISE).double(), torch.tensor(1.0).double())
    return BNN(width, depth, weight_variance=broad, bias_variance=broad, noise=noise)


def fit_hmc_bnn(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    prior: BNN | None = None,
    match_to: KernelPrior | None = None,
    chains: int = 2,
    warmup: int = 150,
    draws: int = 128,
) -> DrawsModel:
    """Draws of networks by NUTS, which needs the extra `reference`.

    NUTS moves hidden weights and variances, the readout integrated out; each of its draws then gets
    a readout from its conditional. See `priors.bnn_nuts`.

    Args:
        X: (n, d).
        Y: (n, 1).
        Yvar: None.
        input_transform: to the unit cube.
        outcome_transform: of Y, which is standardised after it.
        seed: of NUTS and the readouts.
        prior: by default 50 hidden tanh units in one layer, with random variances. Deeper networks
            take NUTS ten times as long.
        match_to: a Gaussian process that the prior's functions are to follow: the prior's variances
            are tuned by `priors.match` first.
        chains: one after another.
        warmup: of each chain.
        draws: kept of each chain.

    Raises:
        ValueError: Yvar, or no observations.
    """
    refuse_known_noise("NUTS of a network", Yvar)
    from priors import bnn_nuts, nuts  # on demand: they import JAX

    seen = observe(X, Y, input_transform, outcome_transform)
    d = seen.x.shape[-1]
    prior = prior or hierarchical(width=50, depth=1)
    if match_to is not None:
        inverse_gamma = InverseGamma(torch.tensor(2.0).double(), torch.tensor(2.0).double())
        start = replace(prior, weight_variance=inverse_gamma, bias_variance=inverse_gamma)
        prior = match(start, match_to, d=d, seed=seed)
    hyper = hyperpriors(prior.hyperparameters(d), {})
    couplings = [flow.couplings for flow in prior.flow]
    sampled = bnn_nuts.sample_nuts(
        prior.activation,
        tuple(prior.shapes(d)),
        couplings,
        standardise_inputs(seen.x),
        seen.y,
        hyper,
        seed=seed,
        settings=nuts.Settings(chains, warmup, draws),
    )
    hidden = tuple(weights.flatten(0, 1) for weights in sampled.weights)
    parameters = _with_variances(prior, hidden, hyper.values(sampled.t.flatten(0, 1)))
    generator = torch.Generator().manual_seed(seed)
    parameters = _with_readout(prior, parameters, seen.x, seen.y, generator=generator)
    return DrawsModel(
        X,
        Y,
        seen,
        NetworkDraws(prior, parameters),
        parameters.noise,
        chains=chains,
        seed=seed,
        input_transform=input_transform,
        outcome_transform=outcome_transform,
    )


def _with_variances(
    prior: BNN, weights: tuple[Tensor, ...], theta: dict[str, Tensor]
) -> Parameters:
    """Networks of these weights, with their variances by name, each (draw,)."""
    layers = range(1, prior.depth + 2)
    weight_variance, bias_variance = (
        torch.stack([theta[f"{name}_{layer}"] for layer in layers], -1)
        for name in ("weight_variance", "bias_variance")
    )
    return Parameters(weights, weight_variance, bias_variance, theta["noise"])


def _with_readout(
    prior: BNN, parameters: Parameters, x: Tensor, y: Tensor, *, generator: torch.Generator
) -> Parameters:
    """The same networks with a readout each, drawn given the rest and y (n,) at x (n, d).

    Reference: Rasmussen and Williams, equation 2.8, in the coordinates of a unit normal readout.
    """
    draws = len(parameters.noise)
    basis = prior.readout_basis(parameters, x.expand(draws, -1, -1))  # (draw, n, 1 + width)
    noise = parameters.noise
    gram = basis.mT @ basis / noise[:, None, None]
    factor = cholesky(gram, torch.ones_like(noise))  # of the posterior's precision
    right = (basis.mT @ y.unsqueeze(-1)) / noise[:, None, None]
    mean = torch.cholesky_solve(right, factor)
    normal = torch.randn(mean.shape, dtype=mean.dtype, generator=generator)
    deviation = torch.linalg.solve_triangular(factor.mT, normal, upper=True)
    return parameters._replace(weights=(*parameters.weights, mean + deviation))


def fit_sghmc_bnn(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    width: int = 50,
    depth: int = 2,
    chains: int = 16,
    burn_in: int = 1000,
    draws: int = 16,
    thinning: int = 60,
    step: float = 0.03,
    friction: float = 0.1,
) -> DrawsModel:
    """Draws of networks by scale-adapted stochastic gradient Hamiltonian Monte Carlo.

    All weights move, and the logarithms of all variances. The gradients are those of all data,
    which are few. There is no test of acceptance, so that the answer has a bias of the step's size.

    Args: as in `fit_hmc_bnn`, and
        width, depth: of the tanh networks.
        chains: in lockstep.
        burn_in: steps that adapt the masses, and are forgotten.
        draws: kept of each chain.
        thinning: steps between draws.
        step: epsilon of the paper.
        friction: share of the momentum that each step loses.

    Reference: Springenberg, Klein, Falkner and Hutter, Bayesian optimization with robust Bayesian
    neural networks, NeurIPS 2016, section 3; Chen, Fox and Guestrin, ICML 2014.
    """
    refuse_known_noise("SGHMC of a network", Yvar)
    seen = observe(X, Y, input_transform, outcome_transform)
    prior = hierarchical(width, depth)
    shapes = prior.shapes(seen.x.shape[-1])
    size = sum((1 + fan_in) * fan_out for fan_in, fan_out in shapes) + 2 * len(shapes) + 1
    generator = torch.Generator().manual_seed(seed)

    def gradient(position: Tensor) -> Tensor:
        position = position.detach().requires_grad_()
        misfit = _misfit(prior, _parameters(position, shapes), seen.x, seen.y)
        energy = misfit.sum() + 0.5 * position.square().sum()
        return torch.autograd.grad(energy, position)[0]

    start = torch.randn(chains, size, dtype=torch.float64, generator=generator)
    start[:, -1] = -NOISE  # a noise of 1: no steep walls yet
    kept = sample_sghmc(
        gradient,
        start,
        burn_in=burn_in,
        draws=draws,
        thinning=thinning,
        step=step,
        friction=friction,
        generator=generator,
    )
    parameters = _parameters(kept.flatten(0, 1), shapes)
    return DrawsModel(
        X,
        Y,
        seen,
        NetworkDraws(prior, parameters),
        parameters.noise,
        chains=chains,
        seed=seed,
        input_transform=input_transform,
        outcome_transform=outcome_transform,
    )


def _parameters(position: Tensor, shapes: list[tuple[int, int]]) -> Parameters:
    """Networks of the prior `hierarchical` at its coordinates (network, dim), standard normal."""
    layers = len(shapes)
    sizes = [(1 + fan_in) * fan_out for fan_in, fan_out in shapes]
    *parts, weight, bias, noise = position.split([*sizes, layers, layers, 1], -1)
    weights = tuple(
        part.unflatten(-1, (1 + fan_in, fan_out))
        for part, (fan_in, fan_out) in zip(parts, shapes, strict=True)
    )
    return Parameters(weights, weight.exp(), bias.exp(), (NOISE + noise.squeeze(-1)).exp())


def _misfit(prior: BNN, parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
    """-log p(y | networks, x), (network,), up to a constant."""
    f = prior.functions(parameters, x.expand(len(parameters.noise), -1, -1))
    noise = parameters.noise
    return 0.5 * ((y - f).square().sum(-1) / noise + len(y) * noise.log())


def sample_sghmc(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    burn_in: int,
    draws: int,
    thinning: int,
    step: float,
    friction: float,
    generator: torch.Generator,
) -> Tensor:
    """Draws (chain, draw, dim) of exp(-energy), whose gradient (chain, dim) is given.

    In the burn-in V estimates the mean square of each gradient over a window tau that adapts, too;
    then masses stay sqrt(V). V is at least 1, a standard normal prior's part. No push exceeds a
    standard deviation of the velocity: a gradient far steeper than V would end in infinity.

    Args: see `fit_sghmc_bnn`; start is (chain, dim).
    """
    position, velocity = start, torch.zeros_like(start)
    tau, mean, square = (torch.ones_like(start) for _ in range(3))
    kept = []
    for index in range(burn_in + draws * thinning):
        slope = gradient(position)
        if index < burn_in:
            rate = 1 / tau
            tau = (tau * (1 - mean.square() / square) + 1).clamp_max(WINDOW)
            mean = mean + rate * (slope - mean)
            square = (square + rate * (slope.square() - square)).clamp_min(1.0)
        scale = step / square**0.25  # standard deviation of the velocity
        normal = torch.randn(start.shape, dtype=start.dtype, generator=generator)
        push = (scale * slope).clamp(-1.0, 1.0)  # walls of small noise are steeper than V
        velocity = (1 - friction) * velocity + scale * (math.sqrt(2 * friction) * normal - push)
        position = position + velocity
        if index >= burn_in and (index - burn_in + 1) % thinning == 0:
            kept.append(position)
    return torch.stack(kept, 1)


def fit_ensemble(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    members: int = 16,
    width: int = 50,
    depth: int = 2,
    steps: int = 600,
    rate: float = 0.02,
) -> DrawsModel:
    """A deep ensemble: networks at the posterior's mode, each from a start of its own.

    The variances of weights, biases and noise are those of highest evidence in the limit of
    infinite width, where it is in closed form.

    Args: as in `fit_hmc_bnn`, and
        members: trained together, each layer in one batched product.
        width, depth: of the tanh networks.
        steps: of Adam.
        rate: of Adam at the start; it falls to zero along a cosine.

    Reference: Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017, arXiv 1612.01474.
    """
    refuse_known_noise("an ensemble", Yvar)
    seen = observe(X, Y, input_transform, outcome_transform)
    prior = evidence_tuned(seen.x, seen.y, width=width, depth=depth, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = prior.draw_parameters(members, seen.x.shape[-1], generator=generator)
    weights = [w.requires_grad_() for w in parameters.weights]
    optimizer = torch.optim.Adam(weights, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        decay = 0.5 * sum((w.square().sum() for w in weights), torch.zeros(()))
        (_misfit(prior, parameters, seen.x, seen.y).sum() + decay).backward()
        optimizer.step()
        schedule.step()
    trained = parameters._replace(weights=tuple(w.detach() for w in weights))
    return DrawsModel(
        X,
        Y,
        seen,
        NetworkDraws(prior, trained),
        trained.noise,
        seed=seed,
        input_transform=input_transform,
        outcome_transform=outcome_transform,
    )


def evidence_tuned(x: Tensor, y: Tensor, *, width: int, depth: int, seed: int) -> BNN:
    """The prior with the variances of highest evidence for y (n,) at x (n, d), in the wide limit.

    That limit is in closed form for erf, which is close to tanh.
    """
    limit = fit_kernel(
        x, y.unsqueeze(-1), None, InfiniteWidthKernel(depth, "erf"), None, None, seed
    )
    weight, bias, scale = limit.covar_module.log_scales.detach().exp().tolist()
    noise = float(limit.likelihood.noise.detach())
    hidden = [ERF_OF_TANH] * depth
    return BNN(
        width,
        depth,
        weight_variance=tuple(weight * factor for factor in (*hidden, scale)),
        bias_variance=tuple(bias * factor for factor in (*hidden, scale)),
        noise=noise,
    )


def fit_laplace_bnn(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    width: int = 50,
    depth: int = 2,
    starts: int = 2,
    rounds: int = 4,
) -> SingleTaskGP:
    """A Gaussian process: the network at its mode, linear in all its weights.

    The mode and the variances of each layer's weights and biases and of the noise are found in
    turn, the latter by the evidence of the linear model. Conditioning is exact in that model.

    Args: as in `fit_gp`, and
        width, depth: of the tanh network.
        starts: of the network; the one of highest evidence is kept.
        rounds: of finding mode and variances.

    Reference: Immer, Korzepa and Bauer, Improving predictions of Bayesian neural nets via local
    linearization, AISTATS 2021, arXiv 2008.08400; Immer, Bauer, Fortuin, Raetsch and Khan, ICML
    2021, arXiv 2104.04975, for the evidence during training; MacKay, Neural Computation 4, 1992.
    """
    kernel, mean = TangentKernel(), TangentMean()
    model = kernel_model(X, Y, Yvar, kernel, mean, input_transform, outcome_transform)
    x = X if input_transform is None else input_transform.eval()(X)
    noise = None if Yvar is None else model.likelihood.noise
    candidates = [
        _fit_tangent(
            x, model.train_targets, noise, width, depth, rounds, seed + i, FIRST_NOISES[i % 2]
        )
        for i in range(starts)
    ]
    tangent, noise, _ = max(candidates, key=lambda candidate: candidate.evidence)
    kernel.tangent = mean.tangent = tangent
    if Yvar is None:
        model.likelihood.noise = noise
    return model.eval().requires_grad_(False)


class Tangent(NamedTuple):
    """A tanh network, and the variances of a change in its weights: f + J (w - w*)."""

    weights: tuple[Tensor, ...]  # of each layer (1 + fan_in, fan_out), biases first
    weight_variance: Tensor  # (layer,), to be divided by the fan-in
    bias_variance: Tensor  # (layer,)

    def layers(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer at x (..., n, d): what enters it, h; b + W h; and df / d(b + W h).

        So the gradients of f in its weights and biases are outer products of the first and last.
        """
        hidden, entering, summed = standardise_inputs(x), [], []
        for weights in self.weights:
            entering.append(hidden)
            summed.append(weights[0] + hidden @ weights[1:])
            hidden = summed[-1].tanh()
        slopes = [torch.ones_like(summed[-1])]
        for weights, value in zip(self.weights[:0:-1], summed[-2::-1], strict=True):
            slopes.append((slopes[-1] @ weights[1:].mT) * (1 - value.tanh().square()))
        return list(zip(entering, summed, slopes[::-1], strict=True))

    def shift(self, x: Tensor) -> Tensor:
        """f(x) - J(x) w*, (..., n): the linear model's mean at w = 0, where its prior is."""
        return -sum(
            ((slope * value).sum(-1) for _, value, slope in self.layers(x)[:-1]),
            torch.zeros((), dtype=x.dtype),
        )

    def grams(self, x: Tensor, z: Tensor) -> Tensor:
        """Inner products (2 layer, ..., n, m) of gradients: of all layers' weights, then biases."""
        weights, biases = [], []
        for (h, _, slope), (h_z, _, slope_z) in zip(self.layers(x), self.layers(z), strict=True):
            biases.append(slope @ slope_z.mT)
            weights.append(biases[-1] * (h @ h_z.mT) / h.shape[-1])
        return torch.stack(weights + biases)

    def variance(self, x: Tensor) -> Tensor:
        """J V J' of each point alone, (..., n)."""
        total = torch.zeros((), dtype=x.dtype)
        scales = zip(self.weight_variance, self.bias_variance, self.layers(x), strict=True)
        for weight, bias, (h, _, slope) in scales:
            total = total + slope.square().sum(-1) * (bias + weight * h.square().mean(-1))
        return total


class TangentKernel(Kernel):  # type: ignore[misc] # GPyTorch has no types
    """J V J' of a `Tangent`: the prior covariance of a network that is linear in its weights."""

    tangent: Tangent

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        if diag:
            return self.tangent.variance(x1)
        scales = torch.cat([self.tangent.weight_variance, self.tangent.bias_variance])
        return torch.tensordot(scales, self.tangent.grams(x1, x2), 1)


class TangentMean(Mean):  # type: ignore[misc] # GPyTorch has no types
    """The mean of a `Tangent`."""

    tangent: Tangent

    def forward(self, x: Tensor) -> Tensor:
        return self.tangent.shift(x)


class _Candidate(NamedTuple):
    tangent: Tangent
    noise: Tensor  # (), or (n,) where it is known
    evidence: float  # log p(y | x) of the linear model, with the hyperpriors


def _fit_tangent(
    x: Tensor,
    y: Tensor,
    known: Tensor | None,
    width: int,
    depth: int,
    rounds: int,
    seed: int,
    first_noise: float,
) -> _Candidate:
    """Mode and variances in turn, from a draw of the prior, for y (n,) at x (n, d)."""
    prior = BNN(width, depth)
    drawn = prior.draw_parameters(1, x.shape[-1], generator=torch.Generator().manual_seed(seed))
    shapes = prior.shapes(x.shape[-1])
    scales = torch.zeros(2 * len(shapes) + 1, dtype=x.dtype)  # logarithms of variances and noise
    scales[-1] = math.log(first_noise)
    raw = [w[0] / _fan_in(w[0]) for w in drawn.weights]
    for _ in range(rounds):
        noise = scales[-1].exp() if known is None else known
        raw = _find_mode(raw, scales[:-1].exp(), noise, x, y)
        tangent = _tangent(raw, scales[:-1].exp())
        scales, evidence = _find_variances(tangent, scales, known, x, y)
    noise = scales[-1].exp() if known is None else known
    raw = _find_mode(raw, scales[:-1].exp(), noise, x, y)
    return _Candidate(_tangent(raw, scales[:-1].exp()), noise, evidence)


def _fan_in(weights: Tensor) -> Tensor:
    """What divides biases (1) and weights (the root of their number), (1 + fan_in, 1)."""
    root = torch.full((len(weights), 1), math.sqrt(len(weights) - 1), dtype=weights.dtype)
    root[0] = 1.0
    return root


def _tangent(raw: list[Tensor], variances: Tensor) -> Tangent:
    return Tangent(tuple(raw), *variances.chunk(2))


def _find_mode(
    raw: list[Tensor], variances: Tensor, noise: Tensor, x: Tensor, y: Tensor
) -> list[Tensor]:
    """The weights at the posterior's mode, by L-BFGS."""
    weight_variance, bias_variance = variances.chunk(2)
    deviations = [
        torch.cat([bias.sqrt().reshape(1, 1), weight.sqrt().expand(len(w) - 1, 1)]) / _fan_in(w)
        for w, weight, bias in zip(raw, weight_variance, bias_variance, strict=True)
    ]
    free = [(w / s).requires_grad_() for w, s in zip(raw, deviations, strict=True)]
    optimizer = torch.optim.LBFGS(free, max_iter=MODE_STEPS, line_search_fn="strong_wolfe")

    def energy() -> Tensor:
        optimizer.zero_grad()
        hidden = standardise_inputs(x)
        for index, (w, s) in enumerate(zip(free, deviations, strict=True)):
            hidden = hidden.tanh() if index else hidden
            hidden = s[0] * w[0] + hidden @ (s[1:] * w[1:])
        misfit = ((y - hidden.squeeze(-1)).square() / noise).sum()
        total = 0.5 * (misfit + sum((w.square().sum() for w in free), torch.zeros(())))
        total.backward()
        return total

    optimizer.step(energy)
    return [(w * s).detach() for w, s in zip(free, deviations, strict=True)]


def _find_variances(
    tangent: Tangent, start: Tensor, known: Tensor | None, x: Tensor, y: Tensor
) -> tuple[Tensor, float]:
    """Logarithms of variances and noise of highest evidence, and that evidence, by L-BFGS.

    A priori the variances are LogNormal(0, 1) and the noise is LogNormal(-4, 1).
    """
    grams, right = tangent.grams(x, x), (y - tangent.shift(x)).unsqueeze(-1)
    center = torch.zeros_like(start)
    center[-1] = NOISE
    free = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=50, line_search_fn="strong_wolfe")

    def evidence() -> Tensor:
        noise = (LEAST_NOISE + free[-1].exp()).expand(len(y)) if known is None else known
        covariance = torch.tensordot(free[:-1].exp(), grams, 1) + torch.diag(noise)
        factor = torch.linalg.cholesky(covariance)
        z = torch.linalg.solve_triangular(factor, right, upper=False)
        log_likelihood = -0.5 * z.square().sum() - factor.diagonal().log().sum()
        return log_likelihood - 0.5 * (free - center).square().sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -evidence()
        value.backward()
        return value

    optimizer.step(loss)
    found = free.detach()
    with torch.no_grad():
        value = float(evidence())
    found[-1] = (LEAST_NOISE + found[-1].exp()).log()
    return found, value
