"""Gaussian processes and what is built on them: `gp`, `dkl`, `ibnn` and `stp` of `surrogates.fit`.

The first three are BoTorch's SingleTaskGP and differ in the kernel alone: BoTorch's own, the same
on features of a network that is trained with it, and the kernel of an infinitely wide network. The
Student-t process is a scale mixture of the first, with a posterior in closed form.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.optimize
import scipy.special
import torch
from botorch import settings
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform, Standardize
from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
from botorch.posteriors import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler
from gpytorch.constraints import Interval
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import NormalPrior
from gpytorch.utils.warnings import NumericalWarning
from torch import Tensor, nn
from torch.distributions import LogNormal
from torch.quasirandom import SobolEngine

from priors.infinite_width import nngp, nngp_variance
from priors.inputs import standardise_inputs
from priors.kernel_prior import cholesky
from priors.kernels import rbf
from priors.student_t import StudentT, student_t_log_prob
from surrogates.base import Surrogate
from surrogates.observations import Observations, append, observe, observe_more

LEAST_LENGTHSCALE, LEAST_NOISE = 0.025, 1e-4  # as in BoTorch's GP
MOST = 1e4  # of both: such a feature is irrelevant, such data are noise
REACH = 6.0  # standard deviations of a prior that a line search may go
BEND = 0.1  # of readout weights: 0.05 of the cube at a point, before any evidence
JITTER_OF_DRAWS = 1e-9  # relative to the prior variance


def fit_gp(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
) -> SingleTaskGP:
    """BoTorch's SingleTaskGP with its hyperparameters at the posterior's mode.

    Args:
        X: (n, d).
        Y: (n, 1).
        Yvar: (n, 1), known variances of the noise.
        input_transform: to the unit cube.
        outcome_transform: BoTorch's Standardize, unless given.
        seed: of the starts after a failed fit.

    Reference: Hvarfner, Hellsten and Nardi, ICML 2024, arXiv 2402.02229, for the priors.
    """
    return fit_kernel(X, Y, Yvar, None, input_transform, outcome_transform, seed)


def fit_dkl(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    widths: tuple[int, ...] = (64, 64),
    steps: int = 200,
) -> SingleTaskGP:
    """A GP on features of a network, both fitted by the marginal likelihood; see `DeepKernel`.

    Args: as in `fit_gp`, and
        seed: also of the network's first weights.
        widths: of the hidden layers.
        steps: of L-BFGS, at most.
    """
    kernel = DeepKernel(X.shape[-1], widths, seed=seed)
    return fit_kernel(X, Y, Yvar, kernel, input_transform, outcome_transform, seed, steps)


def fit_ibnn(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    depth: int = 3,
    activation: str = "relu",
) -> SingleTaskGP:
    """A GP with the kernel of an infinitely wide network; see `InfiniteWidthKernel`.

    Args: as in `fit_gp`, and
        depth: hidden layers.
        activation: a name in `priors.dual.ACTIVATIONS`.
    """
    kernel = InfiniteWidthKernel(depth, activation)
    return fit_kernel(X, Y, Yvar, kernel, input_transform, outcome_transform, seed)


def fit_kernel(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None,
    kernel: Kernel | None,
    input_transform: InputTransform | None,
    outcome_transform: OutcomeTransform | None,
    seed: int,
    steps: int = 1000,
) -> SingleTaskGP:
    """A SingleTaskGP with this kernel, or BoTorch's, its parameters at the mode."""
    model = kernel_model(X, Y, Yvar, kernel, None, input_transform, outcome_transform)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)  # of steps that a line search takes back
        torch.manual_seed(seed)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": steps}})
    return model


class KernelModel(SingleTaskGP):
    """A SingleTaskGP that takes observations at once, not only after it has predicted."""

    def condition_on_observations(  # type: ignore[override]
        self, X: Tensor, Y: Tensor, **kwargs: Any
    ) -> Any:
        """GPyTorch's, which needs caches of a prediction."""
        if self.prediction_strategy is None:
            with torch.no_grad():
                self.posterior(X[..., :1, :])
        return super().condition_on_observations(X, Y, **kwargs)


def kernel_model(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None,
    kernel: Kernel | None,
    mean: Mean | None,
    input_transform: InputTransform | None,
    outcome_transform: OutcomeTransform | None,
) -> SingleTaskGP:
    """A SingleTaskGP with this kernel and mean, or BoTorch's, before any fit."""
    observe(X, Y)  # refuses what is no data of one output
    with settings.validate_input_scaling(False):  # a constant Y has no standard deviation of 1
        return KernelModel(
            X,
            Y,
            Yvar,
            covar_module=kernel,
            mean_module=mean,
            outcome_transform=outcome_transform or Standardize(1),
            input_transform=input_transform,
        )


def refuse_known_noise(name: str, Yvar: Tensor | None) -> None:
    """Nothing.

    Raises:
        ValueError: known noise, for a surrogate that infers its own.
    """
    if Yvar is not None:
        raise ValueError(
            f"Expected no Yvar, because {name} infers its noise; got one of shape "
            f'{tuple(Yvar.shape)}. Known noise is respected by "gp", "dkl", "ibnn" and '
            '"laplace-bnn", and by "pfn" if it is the same everywhere.'
        )


class DeepKernel(Kernel):  # type: ignore[misc] # GPyTorch has no types
    """BoTorch's ARD kernel on features x + g(x), where g is a tanh network with d outputs.

    All weights are parameters. They are normal a priori, those of g's hidden layers around their
    first values, those of its readout around 0 with standard deviation `BEND`, and divided by the
    roots of their fan-ins. So the fit begins as `fit_gp`, and bends the inputs as far as evidence
    outweighs the prior: the marginal likelihood alone folds them up and is sure of what it sees.

    Reference: Wilson, Hu, Salakhutdinov and Xing, Deep kernel learning, AISTATS 2016; Ober,
    Rasmussen and van der Wilk, UAI 2021, arXiv 2102.12108, on overfitting.

    Args:
        d: features of the inputs.
        widths: of the hidden layers.
        seed: of the hidden layers' first weights.
    """

    def __init__(self, d: int, widths: tuple[int, ...], *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = len(widths) + 1
        sizes = itertools.pairwise((d, *widths, d))
        for layer, (fan_in, fan_out) in enumerate(sizes):
            first = torch.randn(1 + fan_in, fan_out, generator=generator, dtype=torch.float64)
            is_readout = layer == len(widths)
            first = torch.zeros_like(first) if is_readout else first
            spread = torch.full_like(first, BEND if is_readout else 1.0)
            self.register_parameter(_layer(layer), nn.Parameter(first.clone()))
            _register_normal_prior(self, _layer(layer), first, spread)
        self.base_kernel = get_covar_module_with_dim_scaled_prior(d)

    def features(self, x: Tensor) -> Tensor:
        """x + g(x), (..., n, d), at x in the unit cube."""
        hidden = standardise_inputs(x)
        for layer in range(self.layers):
            weights = getattr(self, _layer(layer))
            hidden = hidden.tanh() if layer else hidden
            hidden = weights[0] + hidden @ weights[1:] / math.sqrt(len(weights) - 1)
        return x + hidden

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        return self.base_kernel.forward(self.features(x1), self.features(x2), diag=diag, **params)


def _layer(index: int) -> str:
    return f"weights_{index}"


def _register_normal_prior(
    kernel: Kernel, name: str, location: Tensor | float, scale: Tensor | float
) -> None:
    """Gives a parameter a prior that GPyTorch's fits see and can draw new starts from."""
    read, write = functools.partial(_read, name), functools.partial(_write, name)  # for pickle
    kernel.register_prior(f"{name}_prior", NormalPrior(location, scale), read, write)


def _read(name: str, kernel: Any) -> Tensor:
    return getattr(kernel, name)


def _write(name: str, kernel: Any, value: Tensor) -> None:
    kernel.initialize(**{name: value})


class InfiniteWidthKernel(Kernel):  # type: ignore[misc] # GPyTorch has no types
    """`priors.NNGP`'s kernel times an output scale, with its variances as parameters.

    All layers share the variances of weights and biases; their hyperpriors are `priors.NNGP`'s.

    Args:
        depth: hidden layers.
        activation: a name in `priors.dual.ACTIVATIONS`.
    """

    def __init__(self, depth: int, activation: str) -> None:
        super().__init__()
        self.depth, self.activation = depth, activation
        location = torch.tensor([math.log(2.0), math.log(0.2), 0.0], dtype=torch.float64)
        scale = torch.tensor([0.4, 0.8, 1.0], dtype=torch.float64)
        # logarithms of the variances of weights and biases, and of the output scale
        self.register_parameter("log_scales", nn.Parameter(location.clone()))
        _register_normal_prior(self, "log_scales", location, scale)
        ends = location - REACH * scale, location + REACH * scale
        self.register_constraint("log_scales", Interval(*ends, transform=None))

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        weight_variance, bias_variance, outputscale = self.log_scales.exp()
        network: dict[str, Any] = {
            "activation": self.activation,
            "depth": self.depth,
            "weight_variance": weight_variance,
            "bias_variance": bias_variance,
        }
        x1, x2 = standardise_inputs(x1), standardise_inputs(x2)
        return outputscale * (nngp_variance(x1, **network) if diag else nngp(x1, x2, **network))


class StudentTHyperparameters(NamedTuple):
    """What is fitted of a Student-t process, in the units of standardised outcomes."""

    lengthscale: Tensor  # (d,), in widths of the unit cube
    noise: Tensor  # (), its variance over that of the function
    mean: Tensor  # ()


def fit_stp(
    X: Tensor,
    Y: Tensor,
    Yvar: Tensor | None = None,
    *,
    input_transform: InputTransform | None = None,
    outcome_transform: OutcomeTransform | None = None,
    seed: int = 0,
    df: float = 4.0,
) -> StudentTProcess:
    """A Student-t process with the kernel of `fit_gp`, hyperparameters at the posterior's mode.

    Args: as in `fit_gp`, and
        Yvar: None: the noise has the function's random scale.
        seed: of draws without base samples.
        df: degrees of freedom of the prior, above 2; a Gaussian process has infinitely many.

    Raises:
        ValueError: Yvar, no observations, or df of 2 or less.
    """
    refuse_known_noise("a Student-t process", Yvar)
    if not df > 2:
        raise ValueError(f"Expected df above 2, for a finite variance; got {df}.")
    seen = observe(X, Y, input_transform, outcome_transform)
    return StudentTProcess(
        X,
        Y,
        seen,
        _fit_student_t(seen.x, seen.y, df),
        df,
        seed,
        input_transform=input_transform,
        outcome_transform=outcome_transform,
    )


class StudentTProcess(Surrogate):
    """f ~ GP(mean, s K), y = f + noise of variance s r, with s ~ InverseGamma(df / 2, df / 2).

    Given the lengthscales of the RBF kernel K, the relative noise r and the mean, everything is in
    closed form, as in `priors.ScaleMixture`, and further observations are exact, too.

    Args:
        X, Y: (..., n, d) and (..., n, 1), as passed.
        seen: the same as the process sees them.
        df: degrees of freedom of the prior.
        seed: of draws without base samples.

    Reference: Shah, Wilson and Ghahramani, Student-t processes as alternatives to Gaussian
    processes, AISTATS 2014, lemma 3.
    """

    def __init__(
        self,
        X: Tensor,
        Y: Tensor,
        seen: Observations,
        hyper: StudentTHyperparameters,
        df: float,
        seed: int,
        *,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> None:
        super().__init__(X, Y, input_transform=input_transform, outcome_transform=outcome_transform)
        self._seen, self._hyper, self._df, self._seed = seen, hyper, df, seed
        self._factor, self._z = _whiten(seen.x, seen.y, *hyper)

    def posterior_of(self, X: Tensor, observation_noise: bool | Tensor) -> StudentTPosterior:
        """A joint Student-t distribution; noise that is a tensor adds to its variances."""
        seen, (lengthscale, noise, mean) = self._seen, self._hyper
        cross = rbf(seen.x, X, lengthscale)  # (..., n, q)
        weights = torch.linalg.solve_triangular(self._factor, cross, upper=False)
        center = mean + (weights * self._z.unsqueeze(-1)).sum(-2)
        spread = rbf(X, X, lengthscale) - weights.mT @ weights
        if observation_noise is True:
            spread = spread + noise * torch.eye(X.shape[-2], dtype=X.dtype)
        df = self._df + seen.y.shape[-1]
        scale = (self._df + self._z.square().sum(-1)) / df * seen.scale.square()
        spread = scale[..., None, None] * spread
        if isinstance(observation_noise, Tensor):
            spread = spread + (df - 2) / df * torch.diag_embed(observation_noise.squeeze(-1))
        jitter = JITTER_OF_DRAWS * scale
        return StudentTPosterior(
            df, seen.location + seen.scale * center, spread, jitter, seed=self._seed
        )

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The process that has also seen Y (batch x n x 1) at X (batch x n x d), exactly.

        Raises:
            ValueError: known `noise`.
        """
        refuse_known_noise("a Student-t process", kwargs.get("noise"))
        batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], self.batch_shape)
        seen = self._seen
        new = observe_more(self, seen, X, Y)
        y = append(seen.y.unsqueeze(-1), new.y.unsqueeze(-1), batch).squeeze(-1)
        return type(self)(
            append(self.train_X, X, batch),
            append(self.train_Y, Y, batch),
            seen._replace(x=append(seen.x, new.x, batch), y=y),
            self._hyper,
            self._df,
            self._seed,
            input_transform=getattr(self, "input_transform", None),
            outcome_transform=getattr(self, "outcome_transform", None),
        )


class StudentTPosterior(Posterior):
    """A joint Student-t distribution over the q points of each batch entry.

    Base samples are standard normal, one for the common scale and then one for each point.

    Args:
        df: degrees of freedom, above 2.
        location: (batch x q).
        spread: (batch x q x q), the scale matrix: the covariance times (df - 2) / df.
        jitter: (...), what is added to its diagonal for draws.
        seed: of `rsample`.
    """

    def __init__(
        self, df: float, location: Tensor, spread: Tensor, jitter: Tensor, *, seed: int
    ) -> None:
        self.df, self.location = df, location
        self._spread, self._jitter = spread.expand(*location.shape, -1), jitter
        self._generator = torch.Generator().manual_seed(seed)
        self._factor: Tensor | None = None

    @property
    def marginals(self) -> StudentT:
        """The distribution of each point, batch_shape (batch x q x 1)."""
        scale = self._spread.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().unsqueeze(-1)
        mean = self.mean
        return StudentT(torch.full_like(mean, self.df), mean, scale, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.location.unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        diagonal = self._spread.diagonal(dim1=-2, dim2=-1).clamp_min(0)
        return (self.df / (self.df - 2) * diagonal).unsqueeze(-1)

    @property
    def device(self) -> torch.device:
        return self.location.device

    @property
    def dtype(self) -> torch.dtype:
        return self.location.dtype

    @property
    def batch_shape(self) -> torch.Size:
        return self.location.shape[:-1]

    @property
    def base_sample_shape(self) -> torch.Size:
        return torch.Size([*self.batch_shape, 1 + self.location.shape[-1]])

    @property
    def batch_range(self) -> tuple[int, int]:
        return (0, -1)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return torch.Size([*sample_shape, *self.location.shape, 1])

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Joint draws (sample_shape x batch x q x 1), by the posterior's own generator."""
        shape = torch.Size() if sample_shape is None else sample_shape
        normal = torch.randn(
            *shape, *self.base_sample_shape, dtype=self.dtype, generator=self._generator
        )
        return self.rsample_from_base_samples(shape, normal)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Draws from base samples (sample_shape x batch x (1 + q)): a normal vector over a root."""
        root = _root_of_chi_square(base_samples[..., :1], self.df)
        normal = (self._root() @ base_samples[..., 1:].unsqueeze(-1)).squeeze(-1)
        return (self.location + normal / root).unsqueeze(-1)

    def density(self, value: Tensor) -> Tensor:
        """The density of each point, at value (... x batch x q x 1)."""
        return self.marginals.log_prob(value).exp()

    def quantile(self, value: Tensor) -> Tensor:
        """The quantiles (level x batch x q x 1) of each point at levels (level,) or ()."""
        marginals = self.marginals
        levels = value.reshape(*value.shape, *[1] * marginals.loc.dim())
        return marginals.icdf(levels.expand(*value.shape, *marginals.loc.shape))

    def _root(self) -> Tensor:
        """The Cholesky factor (batch x q x q) of the spread."""
        if self._factor is None:
            flat = self._spread.reshape(-1, *self._spread.shape[-2:])
            jitter = self._jitter.expand(self.batch_shape).reshape(-1)
            self._factor = cholesky(flat, jitter).reshape(self._spread.shape)
        return self._factor


@GetSampler.register(StudentTPosterior)
def _sampler(
    posterior: StudentTPosterior, sample_shape: torch.Size, *, seed: int | None = None
) -> MCSampler:
    """Quasi-random base samples, but for more points than Sobol's sequence has dimensions."""
    few = posterior.base_sample_shape[-1] <= SobolEngine.MAXDIM
    return (SobolQMCNormalSampler if few else IIDNormalSampler)(sample_shape, seed=seed)


def _root_of_chi_square(z: Tensor, df: float) -> Tensor:
    """The root of a chi-square variable over its degrees of freedom, with the quantile of z."""
    upper = torch.special.ndtr(-z).numpy()
    chi_square = 2 * scipy.special.gammainccinv(df / 2, upper)
    return torch.from_numpy(np.asarray(chi_square / df)).sqrt()


def _whiten(
    x: Tensor, y: Tensor, lengthscale: Tensor, noise: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """The Cholesky factor L (..., n, n) of K + r I, and L^-1 (y - mean) (..., n)."""
    covariance = rbf(x, x, lengthscale) + noise * torch.eye(x.shape[-2], dtype=x.dtype)
    factor = torch.linalg.cholesky(covariance)
    centred = (y - mean).unsqueeze(-1)
    return factor, torch.linalg.solve_triangular(factor, centred, upper=False).squeeze(-1)


def _fit_student_t(x: Tensor, y: Tensor, df: float) -> StudentTHyperparameters:
    """The mode of the hyperparameters by L-BFGS from the mode of their priors, which are the GP's.

    As in GPyTorch it is the mode of lengthscales and noise, not of their logarithms.
    """
    n, d = x.shape
    half = torch.tensor(df / 2, dtype=x.dtype)
    location = torch.tensor([math.sqrt(2) + 0.5 * math.log(d)] * d + [-4.0], dtype=x.dtype)
    prior = LogNormal(location, torch.tensor([math.sqrt(3)] * d + [1.0], dtype=x.dtype))

    def read(values: Tensor) -> StudentTHyperparameters:
        return StudentTHyperparameters(values[:d].exp(), values[d].exp(), values[d + 1])

    def loss(values: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        point = torch.from_numpy(values).requires_grad_()
        factor, z = _whiten(x, y, *read(point))
        log_determinant = 2 * factor.diagonal().log().sum()
        evidence = student_t_log_prob(half, half, z.square().sum(), log_determinant, n)
        value = -evidence - prior.log_prob(point[: d + 1].exp()).sum()
        value.backward()
        assert point.grad is not None
        return value.item(), point.grad.numpy()

    start = torch.cat([prior.mode.log(), torch.zeros(1, dtype=x.dtype)]).numpy()
    ranges = [(LEAST_LENGTHSCALE, MOST)] * d + [(LEAST_NOISE, MOST)]  # a line search goes far
    bounds = [*((math.log(low), math.log(high)) for low, high in ranges), (None, None)]
    best = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return read(torch.from_numpy(best))
