"""Functional priors: the weights of a Bayesian network tuned so that its functions follow a GP.

`match` returns a network whose prior over functions is close to a Gaussian process in Wasserstein
distance, at a set of points. The kernel of the infinitely wide network comes first: it makes the
distance between covariances a smooth, deterministic function of the variances of weights and
biases. Draws of the finite network then correct what the limit leaves out, and fit what it does not
have: random variances (inverse gamma) and normalising flows. `distance` says what was reached. The
distances are in `wasserstein.py`, the networks in `bnn.py`, the flows in `flows.py`.

Reference: Tran, Rossi, Milios and Filippone, All you need is a good functional prior for Bayesian
deep learning, JMLR 23, 2022, arXiv 2011.12829, for the idea and sections 4.1 to 4.3 for the three
priors; Sendera, Sorkhei and Kusmierczyk, arXiv 2410.15777, for the closed form in place of a
critic. Draws are compared by their energy distance, not by a critic or slices: its gradients are
unbiased, and there is nothing to train.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, InverseGamma

from priors.bnn import BNN, Parameters
from priors.context import as_tensor
from priors.draws import draw, draw_normal
from priors.dual import ACTIVATIONS
from priors.flows import coupling, flow_of, identity_flow, push
from priors.inputs import standardise_inputs
from priors.kernel_prior import JITTER, KernelPrior, cholesky
from priors.wasserstein import bures, energy_distance, sliced_wasserstein

POINTS = 64  # uniform on the box, where the user gives none
HYPERPARAMETERS = 1024  # draws that stand for the hyperpriors in a covariance
CHUNK = 2**18  # matrix entries at once, 2 MiB
POOL = 4096  # draws of the Gaussian process that minibatches come from
HELD_OUT = 1024  # draws of either side that choose the parameters returned
REACH = 10.0  # logarithms of variances stay within it, of both signs
SHAPES = (0.6, 100.0)  # of inverse gammas: from a mean that is infinite to nearly a number
CHECKS = 10  # times that held-out draws may choose other parameters


class Distance(NamedTuple):
    """How far the functions of a network are from those of a Gaussian process, at some points.

    All are in the units of f. `covariance` is W2 / sqrt(points) between Gaussians of the means and
    covariances of the two, a lower bound on the same of the processes themselves (Gelbrich, Math.
    Nachrichten 147, 1990). It takes the network as infinitely wide; with a flow, it averages over
    4096 draws of the hidden layers. `sliced` is the sliced 1-Wasserstein distance between draws of
    the finite network and of the Gaussian process, and `floor` what two sets of draws of the latter
    show.
    """

    covariance: float
    sliced: float
    sliced_error: float  # standard error, over repeats
    floor: float


class Progress(NamedTuple):
    """What `match` reports: a stage ("covariance" or "draws"), its step and the distance there."""

    stage: str
    step: int
    distance: float  # covariance: W2 / sqrt(points); draws: the loss on held-out ones


def match(
    bnn: BNN,
    gp: KernelPrior,
    *,
    points: Any | None = None,
    d: int | None = None,
    flow: bool = False,
    largest: float = 20.0,
    draws: int = 256,
    steps: int = 200,
    seed: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> BNN:
    """The network with the prior of its weights tuned so that its functions follow `gp`.

    Every variance of weights and biases is tuned, one for each layer. Those that are numbers stay
    numbers; those that are inverse gammas, drawn anew for every function, keep their kind. First
    all are numbers, and the Bures-Wasserstein distance between the kernel of the infinitely wide
    network and the covariance of `gp` is minimised by L-BFGS; of a distribution over kernels it is
    the mean covariance. Then stochastic gradients of the energy distance between draws of the
    finite network and of `gp` correct the result. The parameters returned are those of all that
    were tried, the first stage's included, that did best on held-out draws, the same for all.

    The noise is left as it is: it is no part of the functions.

    Args:
        bnn: the network; its variances are numbers or `InverseGamma`, and where the search starts.
        gp: `GaussianProcess`, `NNGP` or another prior with a kernel; its hyperparameters may be
            random.
        points: (m, d) where the functions are compared, or (m,) where d = 1; by default 64
            uniform ones in the unit box. The network is tuned for tasks like these.
        d: number of features, 1 unless `points` say otherwise.
        flow: also fits a normalising flow to each hidden layer. The network is then one for d
            features only.
        largest: bound on the variances of hidden layers. Far beyond it tanh units are steps: a
            rough target comes closer still, but networks of steps are hard to sample from a
            posterior, by gradients most of all.
        draws: functions in each minibatch of the second stage.
        steps: of the second stage; 0 leaves it out.
        report: called with the `Progress` of both stages.

    Raises:
        ValueError: `gp` without a kernel, variances of another distribution, or points and
            features that do not fit each other or the network's flow.

    Example:
        >>> from priors import GaussianProcess
        >>> smooth = GaussianProcess(lengthscale=0.5, outputscale=1.0)
        >>> match(BNN(depth=1), smooth, steps=0).depth
        1
    """
    x = _points(gp, points, d, seed)
    prior = _WeightPrior(bnn, x.shape[-1], flow, largest, seed)
    target = _moments(gp, x, seed)
    _match_covariance(prior, x, target, report)
    if steps:
        _match_draws(prior, gp, x, target, draws, steps, seed, report)
    return prior.network()


def distance(
    bnn: BNN,
    gp: KernelPrior,
    *,
    points: Any | None = None,
    d: int | None = None,
    draws: int = 512,
    repeats: int = 8,
    seed: int = 1,
) -> Distance:
    """How far the network's functions are from those of `gp`; arguments as in `match`.

    Args:
        draws: functions in each of `repeats` independent estimates of the sliced distance. Its
            floor falls with their square root.
    """
    x = _points(gp, points, d, seed)
    generator = torch.Generator().manual_seed(seed)
    mean, covariance = _moments(gp, x, seed)
    of_network = _network_moments(bnn, x, generator=generator)
    squared = bures(of_network[1], covariance, mean_a=of_network[0], mean_b=mean)
    sliced, floor = [], []
    for _ in range(repeats):
        f = _network_functions(bnn, x, draws, generator=generator)
        g, other = (_gp_functions(gp, x, draws, generator=generator) for _ in range(2))
        sliced.append(sliced_wasserstein(f, g, generator=generator))
        floor.append(sliced_wasserstein(other, g, generator=generator))
    each = torch.stack(sliced)
    return Distance(
        covariance=float((squared / len(x)).sqrt()),
        sliced=float(each.mean()),
        sliced_error=float(each.std() / math.sqrt(repeats)),
        floor=float(torch.stack(floor).mean()),
    )


# The two stages


def _match_covariance(
    prior: _WeightPrior,
    x: Tensor,
    target: tuple[Tensor, Tensor],
    report: Callable[[Progress], None] | None,
) -> None:
    """Moves the centres of all variances to where the kernel of the wide network is closest."""
    mean, covariance = target
    optimizer = torch.optim.LBFGS(
        [prior.centres],
        max_iter=100,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    step = itertools.count()

    def loss() -> Tensor:
        optimizer.zero_grad()
        kernel = network_kernel(x, *prior.variances_at_centres(), activation=prior.bnn.activation)
        squared = bures(kernel, covariance, mean_b=mean) / len(x)
        squared.backward()
        if report is not None:
            report(Progress("covariance", next(step), float(squared.detach().sqrt())))
        return squared

    optimizer.step(loss)


def _match_draws(
    prior: _WeightPrior,
    gp: KernelPrior,
    x: Tensor,
    target: tuple[Tensor, Tensor],
    draws: int,
    steps: int,
    seed: int,
    report: Callable[[Progress], None] | None,
) -> None:
    """Stochastic gradients of a distance between draws; the best on held-out draws is kept.

    With a flow, the squared distance between covariances over the number of points is added to the
    energy distance: the readout integrated out, a few draws estimate it far better.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    pool, held_out = (_gp_functions(gp, x, m, generator=generator) for m in (POOL, HELD_OUT))
    held_out_state = torch.Generator().manual_seed(seed + 2).get_state()

    def loss_of(f_draws: int, g: Tensor, generator: torch.Generator) -> Tensor:
        parameters = prior.draw(f_draws, generator=generator)
        inputs = x.expand(f_draws, *x.shape)
        loss = energy_distance(prior.bnn.functions(parameters, inputs), g)
        if prior.flows:
            basis = prior.bnn.readout_basis(parameters, inputs)
            covariance = torch.einsum("tni,tmi->nm", basis, basis) / f_draws
            loss = loss + bures(covariance, target[1], mean_b=target[0]) / len(x)
        return loss

    def check(step: int) -> float:
        with torch.no_grad():
            same = torch.Generator()
            same.set_state(held_out_state)  # common random numbers
            value = float(loss_of(HELD_OUT, held_out, same))
        if report is not None:
            report(Progress("draws", step, value))
        return value

    best, kept = check(0), prior.snapshot()
    optimizer = torch.optim.Adam(prior.parameters, lr=0.02, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    every = max(1, steps // CHECKS)
    for step in range(1, steps + 1):
        g = pool[torch.randint(POOL, (draws,), generator=generator)]
        loss = loss_of(draws, g, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 and (value := check(step)) < best:
            best, kept = value, prior.snapshot()
    prior.restore(kept)


class _WeightPrior:
    """The tunable parameters of a network's weight prior, and its draws as functions of them.

    A variance of layer l is v_l = exp(c_l), or v_l = exp(c_l) a_l / Gamma(a_l), an inverse gamma
    of shape a_l and rate a_l exp(c_l). Columns are weight variances of all layers, then biases'.
    What is optimised are logits of where c_l and log a_l lie between their bounds.
    """

    def __init__(self, bnn: BNN, d: int, flow: bool, largest: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        flows = bnn.flow
        if flow and not flows:
            sizes = [1 + fan_in for fan_in, _ in bnn.shapes(d)[:-1]]
            flows = tuple(identity_flow(size, generator=generator) for size in sizes)
        self.bnn, self.d = replace(bnn, flow=()), d
        values = [*bnn.layer_variances("weight_variance"), *bnn.layer_variances("bias_variance")]
        centres, shapes = zip(*[_centre_and_shape(value) for value in values], strict=True)
        high = [math.log(largest)] * bnn.depth + [REACH]  # the readout's is the scale of f
        self.bounds = torch.tensor([[-REACH] * len(centres), high * 2], dtype=torch.float64)
        self.shape_bounds = torch.tensor(SHAPES, dtype=torch.float64).log()
        self.is_random = torch.tensor([math.isfinite(shape) for shape in shapes])
        finite = torch.tensor([shape for shape in shapes if math.isfinite(shape)])
        start = torch.tensor(centres, dtype=torch.float64)
        self.centres = _to_logit(start, self.bounds).requires_grad_()
        self.shapes = _to_logit(finite.double().log(), self.shape_bounds).requires_grad_()
        self.flows = [
            [
                (one.inner.clone().requires_grad_(), one.outer.clone().requires_grad_())
                for one in f.tensors
            ]
            for f in flows
        ]
        self.dims = [f.dim for f in flows]

    @property
    def parameters(self) -> list[Tensor]:
        matrices = [matrix for pairs in self.flows for pair in pairs for matrix in pair]
        return [self.centres, *([self.shapes] if len(self.shapes) else []), *matrices]

    def snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, snapshot, strict=True):
            parameter.copy_(value)

    def variances_at_centres(self) -> tuple[Tensor, Tensor]:
        """Variances of weights and of biases, (layer,) each."""
        weight, bias = _from_logit(self.centres, self.bounds).exp().chunk(2)
        return weight, bias

    def draw(self, draws: int, *, generator: torch.Generator) -> Parameters:
        """Networks, differentiable in all parameters; flows are already applied."""
        weights = []
        for layer, (fan_in, fan_out) in enumerate(self.bnn.shapes(self.d)):
            z = draw_normal(draws, 1 + fan_in, fan_out, generator=generator)
            if layer < len(self.flows):
                z = push(self._couplings(layer), z.mT).value.mT
            weights.append(z)
        weight, bias = self._variances(draws, generator=generator).chunk(2, -1)
        return Parameters(tuple(weights), weight, bias, torch.ones(draws, dtype=torch.float64))

    def _variances(self, draws: int, *, generator: torch.Generator) -> Tensor:
        """One for every function and layer, (draw, 2 layer): heavy tails are within a batch."""
        variances = _from_logit(self.centres, self.bounds).exp().expand(draws, -1)
        if not len(self.shapes):
            return variances
        shape = _from_logit(self.shapes, self.shape_bounds).exp().expand(draws, -1)
        gamma = torch._standard_gamma(shape, generator)  # its gradients are implicit
        ratio = torch.ones_like(variances)
        ratio = ratio.index_copy(-1, self.is_random.nonzero().squeeze(-1), shape / gamma)
        return variances * ratio

    def _couplings(self, layer: int) -> tuple[Any, ...]:
        pairs = enumerate(self.flows[layer])
        return tuple(coupling(self.dims[layer], index, *pair) for index, pair in pairs)

    @torch.no_grad()
    def network(self) -> BNN:
        """The network with these parameters."""
        centres = _from_logit(self.centres, self.bounds).exp().tolist()
        shapes = iter(_from_logit(self.shapes, self.shape_bounds).exp().tolist())
        values: list[float | Distribution] = []
        for centre, is_random in zip(centres, self.is_random.tolist(), strict=True):
            values.append(_inverse_gamma(centre, next(shapes)) if is_random else centre)
        middle = len(values) // 2
        return replace(
            self.bnn,
            weight_variance=tuple(values[:middle]),
            bias_variance=tuple(values[middle:]),
            flow=tuple(
                flow_of(dim, pairs) for dim, pairs in zip(self.dims, self.flows, strict=True)
            ),
        )


def _centre_and_shape(value: float | Distribution) -> tuple[float, float]:
    """Log of the centre, rate / shape, of a variance, and its shape; a number has no spread."""
    if not isinstance(value, Distribution):
        if not value > 0:
            raise ValueError(f"Expected positive variances to start the match from; got {value}.")
        return math.log(value), math.inf
    if type(value) is not InverseGamma:
        raise ValueError(
            f"Expected variances that are numbers or InverseGamma; got {type(value).__name__}."
        )
    shape, rate = float(value.concentration), float(value.rate)
    return math.log(rate / shape), shape


def _inverse_gamma(centre: float, shape: float) -> InverseGamma:
    parameters = torch.tensor([shape, shape * centre], dtype=torch.float64)
    return InverseGamma(*parameters)


def _from_logit(logit: Tensor, bounds: Tensor) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.sigmoid(logit)


def _to_logit(value: Tensor, bounds: Tensor) -> Tensor:
    """The inverse; a start outside the bounds or next to them moves inside."""
    low, high = bounds
    return torch.logit(((value - low) / (high - low)).clamp(0.02, 0.98))


# Moments and draws of both sides


def _points(gp: KernelPrior, points: Any | None, d: int | None, seed: int) -> Tensor:
    if not isinstance(gp, KernelPrior):
        raise ValueError(
            f"Expected a prior with a kernel, such as GaussianProcess; got {type(gp).__name__}."
        )
    if points is None:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(POINTS, d or 1, dtype=torch.float64, generator=generator)
    x = as_tensor("points", points)
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if x.dim() != 2 or len(x) < 2 or (d is not None and x.shape[1] != d):
        raise ValueError(
            f"Expected points (m, {'d' if d is None else d}), two or more; got {tuple(x.shape)}."
        )
    return x


def _moments(gp: KernelPrior, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (point,) and covariance (point, point) of f, hyperpriors averaged over fixed draws."""
    generator = torch.Generator().manual_seed(seed)
    theta = gp.draw_hyperparameters(HYPERPARAMETERS, x.shape[-1], generator=generator)
    total = x.new_zeros(len(x), len(x))
    for some in _slices(HYPERPARAMETERS, len(x) ** 2):
        chosen = {name: value[some] for name, value in theta.items()}
        inputs = x.expand(len(chosen["mean"]), *x.shape)
        total = total + gp.covariance(inputs, inputs, chosen).sum(0)
    mean = theta["mean"].mean().expand(len(x))
    return mean, total / HYPERPARAMETERS + theta["mean"].var(correction=0)


def _gp_functions(gp: KernelPrior, x: Tensor, draws: int, *, generator: torch.Generator) -> Tensor:
    """Functions (draw, point) at x, each with hyperparameters of its own."""
    theta = gp.draw_hyperparameters(draws, x.shape[-1], generator=generator)
    z = draw_normal(draws, len(x), 1, generator=generator)
    functions = []
    for some in _slices(draws, len(x) ** 2):
        chosen = {name: value[some] for name, value in theta.items()}
        inputs = x.expand(len(chosen["mean"]), *x.shape)
        jitter = JITTER * gp.variances(chosen)[0]
        factor = cholesky(gp.covariance(inputs, inputs, chosen), jitter)
        functions.append(chosen["mean"].unsqueeze(-1) + (factor @ z[some]).squeeze(-1))
    return torch.cat(functions)


@torch.no_grad()
def _network_functions(bnn: BNN, x: Tensor, draws: int, *, generator: torch.Generator) -> Tensor:
    """Functions (draw, point) of the finite network at x."""
    parameters = bnn.draw_parameters(draws, x.shape[-1], generator=generator)
    return bnn.functions(parameters, x.expand(draws, *x.shape))


def _network_moments(bnn: BNN, x: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the network's functions: see `Distance`."""
    if bnn.flow:
        parameters = bnn.draw_parameters(POOL, x.shape[-1], generator=generator)
        basis = bnn.readout_basis(parameters, x.expand(POOL, *x.shape))
        return x.new_zeros(len(x)), torch.einsum("tni,tmi->nm", basis, basis) / POOL
    values = bnn.layer_variances("weight_variance") + bnn.layer_variances("bias_variance")
    draws = HYPERPARAMETERS if any(isinstance(v, Distribution) for v in values) else 1
    variances = torch.stack([draw(v, (draws,), generator=generator) for v in values], -1)
    total = x.new_zeros(len(x), len(x))
    for some in _slices(draws, 11 * len(x) ** 2):  # what the dual of tanh takes
        weight, bias = variances[some].chunk(2, -1)
        total = total + network_kernel(x, weight, bias, activation=bnn.activation).sum(0)
    return x.new_zeros(len(x)), total / draws


def _slices(count: int, entries: int) -> Iterator[slice]:
    size = max(1, CHUNK // entries)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


# The kernel with a variance for each layer


def network_kernel(
    x: Tensor, weight_variance: Tensor, bias_variance: Tensor, *, activation: str
) -> Tensor:
    """Covariance (..., point, point) of a wide network that has its own variances in each layer.

    Args:
        x: (point, dim) in the unit box.
        weight_variance: (..., depth + 1), of each layer, the readout's last.
        bias_variance: (..., depth + 1).
        activation: one of `priors.bnn.ACTIVATIONS`.

    Reference: Lee et al., ICLR 2018, arXiv 1711.00165, equations 4 and 5.
    """
    phi = _activation(activation)
    weights, biases = (
        part.unsqueeze(-1).unsqueeze(-1).unbind(-3) for part in (weight_variance, bias_variance)
    )
    z = standardise_inputs(x)
    q = biases[0] + weights[0] * (z @ z.T / z.shape[-1])
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        variance = q.diagonal(dim1=-2, dim2=-1)
        q = bias + weight * phi(q, variance.unsqueeze(-1), variance.unsqueeze(-2))
    return q


def _activation(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The dual of an activation, E[phi(u) phi(v)] as a function of (q12, q11, q22)."""
    return _tanh_dual if name == "tanh" else ACTIVATIONS[name].dual


def _tanh_dual(q12: Tensor, q11: Tensor, q22: Tensor) -> Tensor:
    """E[tanh(u) tanh(v)] to 1e-6, as a double sum over the dual of erf.

    The logistic distribution is a normal with a random scale, twice a variable K of Kolmogorov's
    distribution, and tanh(u) is its cumulative distribution, rescaled: tanh(u) = E[erf(u / (K
    sqrt 2))]. Eleven values of K do.

    Reference: Andrews and Mallows, JRSS B 36, 1974, section 4.
    """
    scales, weights = (part.to(q12) for part in _kolmogorov())
    total = torch.zeros_like(q12)
    wide = [q.unsqueeze(-1) for q in (q12, q11, q22)]
    for scale, weight in zip(scales, weights, strict=True):  # in turn: memory is a matrix each
        some = (scale * scales * wide[0], scale**2 * wide[1], scales**2 * wide[2])
        total = total + weight * (ACTIVATIONS["erf"].dual(*some) @ weights)
    return total


@functools.cache
def _kolmogorov() -> tuple[Tensor, Tensor]:
    """Scales s and weights w such that tanh(u) = sum of w erf(s u).

    By the trapezoidal rule in log K, which converges geometrically; the density of K is that of
    the largest value of |Brownian bridge|, by a series for large K and another for small.
    """
    step = 0.25
    grid = torch.arange(-20, 21, dtype=torch.float64).unsqueeze(-1) * step
    k, n = grid.exp(), torch.arange(1, 40, dtype=torch.float64)
    large = 8 * (2 * (n % 2) - 1) * n**2 * k * torch.exp(-2 * n**2 * k**2)
    rate = (2 * n - 1) ** 2 * math.pi**2 / 8
    small = math.sqrt(2 * math.pi) * torch.exp(-rate / k**2) * (2 * rate / k**4 - 1 / k**2)
    density = torch.where(grid > 0, large, small).sum(-1, keepdim=True)
    weights = (step * k * density).squeeze(-1)
    chosen = weights > 1e-9
    return math.sqrt(0.5) / k.squeeze(-1)[chosen], weights[chosen]
