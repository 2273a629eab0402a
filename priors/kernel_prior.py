"""Priors that are Gaussian processes once their hyperparameters are known.

`KernelPrior` turns a covariance and a list of hyperparameters into everything a prior offers:
tasks, conditionals, posterior, evidence. A batch of tasks, each with hyperparameters of its own, is
one batched Cholesky factorisation in float64 on the generator's device. Read `gp.py` next for the
simplest one; the hyperparameters are integrated out in `reference.py`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from priors.draws import draw, draw_normal
from priors.inputs import draw_inputs, read_designs
from priors.tasks import ConditionalTasks, ParticleTasks, Tasks

if TYPE_CHECKING:
    from priors.latent_density import HyperparameterDensity
    from priors.reference import Marginal

JITTER = 1e-10  # relative to the outputscale; raised tenfold only for tasks that fail to factorise
CACHED = 2**18  # matrix entries, 2 MiB


class Hyperparameter(NamedTuple):
    """One hyperparameter, or one for each feature: a number or a distribution, times a factor."""

    name: str
    value: float | Distribution
    unit: str = ""  # how it scales with the data: as "x", "y" or "y^2", or not at all
    shape: tuple[int, ...] = ()  # or (dim,)
    factor: float = 1.0
    # The largest spacing between the nodes that integrate it out, in its unconstrained coordinate
    # and however flat the posterior: over it, the density of a new observation hardly changes.
    spacing: float = 0.7


class NodeModel(Protocol):
    """What quadrature asks of one task, for all its nodes at once; see `quadrature.Spectral`."""

    def log_likelihood(self, theta: dict[str, Tensor]) -> Tensor:
        """log p(y | x, theta) (node,)."""
        ...

    def mean(self, theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance (node,) of the constant mean."""
        ...

    def predict(
        self, theta: dict[str, Tensor], x_query: Tensor, *, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (node, m) and variance (node, m), or covariance (node, m, m), of f."""
        ...


class Process(NamedTuple):
    """Gaussian processes, one for each task: what is left once all latents are known."""

    mean: Tensor  # (task,)
    covariance: Callable[[Tensor, Tensor], Tensor]  # of f, (task, n, d), (task, m, d): (task, n, m)
    variance: Callable[[Tensor], Tensor]  # of f, its diagonal: (task, n, d) to (task, n)
    noise: Tensor  # (task,) variance
    jitter: Tensor  # (task,) added to diagonals
    latents: dict[str, Tensor]


class KernelPrior(abc.ABC):
    """f ~ GP(mean, signal * unit kernel) and y = f + noise, given hyperparameters drawn per task.

    A subclass says what its hyperparameters are, "noise" (a variance) and "mean" among them, and
    what the unit kernel is. `theta` is a dictionary of them by name, (task,) or (task, dim), and of
    the index of the alternative, by the name in `choice`, where there are several.
    """

    inputs: str | tuple[str, ...]
    shaping: ClassVar[tuple[str, ...]]  # the hyperparameters that the unit kernel depends on
    choice: ClassVar[str] = "kernel"
    quadrature_limit: ClassVar[int] = 4  # hyperparameters; a lattice in four takes some ten seconds

    @abc.abstractmethod
    def hyperparameters(self, d: int) -> tuple[Hyperparameter, ...]:
        """All hyperparameters of tasks with `d` features, those in `shaping` first."""

    @abc.abstractmethod
    def unit_covariance(self, x: Tensor, z: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The unit kernel (task, n, m) between x (task, n, d) and z (task, m, d)."""

    @abc.abstractmethod
    def unit_variance(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The unit kernel (task, n) of each x (task, n, d) with itself."""

    @property
    @abc.abstractmethod
    def alternatives(self) -> tuple[str, ...]:
        """Names of the kernels of which each task has one, drawn uniformly."""

    def variances(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What multiplies the unit kernel, and the variance of the noise, (task,) each."""
        return theta["outputscale"], theta["noise"]

    def of_one_task(self, x: Tensor, y: Tensor, mean_variance: float) -> NodeModel:
        """Likelihoods and predictions of x (point, dim), y (point,) for many hyperparameters.

        Args:
            mean_variance: of a normal prior of the mean, integrated out.
        """
        from priors.quadrature import Spectral  # on demand: it is built on this module

        return Spectral(self, x, y, mean_variance)

    @property
    def latent_units(self) -> dict[str, str]:
        """How each latent scales with the data: as "x", "y" or "y^2", or not at all ("")."""
        return {h.name: h.unit for h in self.hyperparameters(1)} | {self.choice: ""}

    @property
    def latent_categories(self) -> dict[str, list[str]]:
        """The names behind latents that are indices."""
        return {self.choice: list(self.alternatives)}

    def posterior_is_quick(self, d: int) -> bool:
        """Whether `posterior` of a task with d features takes about a second: a small lattice."""
        from priors.hyperpriors import hyperpriors  # on demand: both are built on this module

        return hyperpriors(self.hyperparameters(d), {}).dim <= min(3, self.quadrature_limit)

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` features, in float64 on the generator's device."""
        theta = self.draw_hyperparameters(batch, d, generator=generator)
        signal, noise = (value.unsqueeze(-1) for value in self.variances(theta))
        x = draw_inputs(self.inputs, batch, n, d, generator=generator)
        z = draw_normal(batch, n, 1, generator=generator)
        drawn = []
        for some, inputs, normal in pieces(theta, x, z):
            jitter = inputs.new_full((len(inputs),), JITTER)
            factor = cholesky(self.unit_covariance(inputs, inputs, some), jitter)
            drawn.append(normal.mT @ factor.mT)  # as rows: LAPACK's factors are column-major
        f = theta["mean"].unsqueeze(-1) + signal.sqrt() * torch.cat(drawn).squeeze(1)
        y = f + noise.sqrt() * draw_normal(batch, n, generator=generator)
        return Tasks(x, y, f, self.report_latents(theta, d))

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Draws tasks whose queries know their distribution given the latents and y_1 .. y_visible.

        Args:
            visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
        """
        process = self.draw_process(batch, d, generator=generator)
        x = draw_inputs(self.inputs, batch, n + len(visible), d, generator=generator)
        return conditional_tasks(process, x[:, :n], x[:, n:], visible, generator=generator)

    def sample_particles(
        self,
        batch: int,
        n: int,
        d: int,
        visible: Tensor,
        *,
        particles: int,
        held: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> ParticleTasks:
        """Draws tasks whose queries know about how y_1 .. y_visible leave them distributed.

        Args:
            visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
            particles: values of the hyperparameters for each task, the first its own; one where no
                hyperparameter is unknown.
            held: latents by name that all particles of a task share, (task,) or (task, dim)
                booleans; none where a name is missing. Alternatives are always shared.

        Hyperparameters are taken as independent and drawn from `hyperparameters`: a subclass that
        draws them otherwise needs a `sample_particles` of its own.
        """
        from priors.particles import particle_tasks  # on demand: it is built on this module

        return particle_tasks(self, (batch, n, d), visible, particles, held, generator)

    def sample_at(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Noisy observations (task, n) of tasks of their own at x (task, n, d)."""
        return observe(self.draw_process(len(x), x.shape[-1], generator=generator), x, generator)

    def draw_process(self, batch: int, d: int, *, generator: torch.Generator) -> Process:
        """Processes with hyperparameters of their own."""
        return self.process(self.draw_hyperparameters(batch, d, generator=generator), d)

    def process(self, theta: dict[str, Tensor], d: int) -> Process:
        """The processes of given hyperparameters."""
        signal, noise = self.variances(theta)
        return Process(
            theta["mean"],
            lambda x, z: self.covariance(x, z, theta),
            lambda x: self.variance(x, theta),
            noise,
            JITTER * signal,
            self.report_latents(theta, d),
        )

    def posterior(
        self,
        context: tuple[Any, Any],
        x_query: Any,
        latent: bool = False,
        *,
        joint: bool = False,
        given: Mapping[str, Any] | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> Distribution:
        """The posterior predictive at `x_query`, all hyperparameters integrated out.

        Up to `quadrature_limit` hyperparameters take deterministic quadrature, with an error below
        1e-4 nats in the log density. More take draws: NUTS for a `GaussianProcess`, which needs the
        extra `reference`, sequential Monte Carlo for others. A normal prior of the mean does not
        count, because it is integrated out in closed form.

        Args:
            context: x (n, d) or (b, n, d), or (n,) where d = 1, and y (n,) or (b, n).
            x_query: (m, d), (b, m, d) or (m,).
            latent: the noise-free function instead of a new observation.
            joint: one joint distribution over all queries instead of one for each.
            given: latents that are known, by their names in `Tasks.latents`; noise is a variance.
            method: "quadrature", "nuts" or "smc" instead of the choice above.
            seed: of the draws.

        Returns:
            A float64 mixture of normals, batch_shape (m,) or (b, m); with `joint`, event_shape (m,)
            and batch_shape () or (b,). A single normal where all hyperparameters are known.

        Raises:
            ValueError: arguments of other shapes, not finite, or of unknown latents.

        Example:
            >>> from priors import GaussianProcess
            >>> posterior = GaussianProcess().posterior(([0.1, 0.6], [0.3, -1.0]), [0.2, 0.4, 0.9])
            >>> posterior.mean.shape
            torch.Size([3])
        """
        from priors import reference  # on demand: it is built on this module

        return reference.posterior(
            self, context, x_query, latent, joint=joint, given=given, method=method, seed=seed
        )

    def log_evidence(
        self,
        context: tuple[Any, Any],
        *,
        given: Mapping[str, Any] | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> Tensor:
        """log p(y | x) in nats, () or (b,), all that is not `given` integrated out.

        Args: see `posterior`. From draws of NUTS it is estimated by bridge sampling.
        """
        from priors import reference

        return reference.log_evidence(self, context, given=given, method=method, seed=seed)

    def latent_posterior(
        self,
        context: tuple[Any, Any],
        *,
        given: Mapping[str, Any] | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> dict[str, Marginal]:
        """The posterior marginal of each latent of one task: `.mean`, `.variance`, `.quantile`.

        Args: see `posterior`; the context is one task.
        """
        from priors import reference

        return reference.latent_posterior(self, context, given=given, method=method, seed=seed)

    def latent_densities(
        self,
        context: tuple[Any, Any],
        *,
        given: Mapping[str, Any] | None = None,
        free_location: bool = False,
        free_scale: bool = False,
    ) -> list[HyperparameterDensity]:
        """The posterior density of the hyperparameters of one task, for each alternative.

        For samplers of one's own; together they integrate to the evidence.

        Args:
            context: one task; see `posterior`.
            free_location: a flat prior for the mean of y, as if it had been subtracted.
            free_scale: a flat prior for the logarithm of the unit of y, as if it had been divided
                by its own. Latents are then in the units that y has.
        """
        from priors import latent_density

        return latent_density.latent_densities(self, context, given, free_location, free_scale)

    def conditional(
        self,
        x: Tensor,
        y: Tensor,
        x_query: Tensor,
        theta: Mapping[str, Tensor],
        *,
        joint: bool = False,
        mean_variance: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (task, m) and variance (task, m), or covariance, of f given the latents.

        Args:
            x: (task, n, d).
            y: (task, n).
            x_query: (task, m, d).
            theta: all hyperparameters, also those that are plain numbers in the prior.
            joint: the covariance (task, m, m) instead of the variance.
            mean_variance: of a normal prior of the mean around theta["mean"], integrated out.

        Reference: Rasmussen and Williams, equations 2.25 and 2.26.
        """
        factor, z = self.whiten(x, y, theta, mean_variance)
        cross = self.covariance(x, x_query, theta) + mean_variance  # (task, n, m)
        weights = torch.linalg.solve_triangular(factor, cross, upper=False)
        mean = theta["mean"].unsqueeze(-1) + (weights * z.unsqueeze(-1)).sum(-2)
        if joint:
            prior = self.covariance(x_query, x_query, theta) + mean_variance
            return mean, prior - weights.mT @ weights
        variance = self.variance(x_query, theta) + mean_variance - weights.square().sum(-2)
        return mean, variance.clamp_min(JITTER * self.variances(theta)[0].unsqueeze(-1))

    def log_likelihood(
        self, x: Tensor, y: Tensor, theta: Mapping[str, Tensor], *, mean_variance: float = 0.0
    ) -> Tensor:
        """log p(y | x, latents) in nats, (task,); arguments as in `conditional`."""
        factor, z = self.whiten(x, y, theta, mean_variance)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (z.square().sum(-1) + log_determinant + y.shape[-1] * math.log(2 * math.pi))

    def whiten(
        self, x: Tensor, y: Tensor, theta: Mapping[str, Tensor], mean_variance: float
    ) -> tuple[Tensor, Tensor]:
        """The Cholesky factor L (task, n, n) of y's covariance, and L^-1 (y - mean) (task, n)."""
        return self.whiten_given(self.covariance(x, x, theta) + mean_variance, y, theta)

    def whiten_given(
        self, covariance: Tensor, y: Tensor, theta: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same, given the covariance (task, n, n) of y without its noise."""
        signal, noise = self.variances(theta)
        factor = cholesky(covariance, noise + JITTER * signal)
        centred = (y - theta["mean"].unsqueeze(-1)).unsqueeze(-1)
        return factor, torch.linalg.solve_triangular(factor, centred, upper=False).squeeze(-1)

    def variance(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """Prior variance (task, n) of f at x (task, n, d): the diagonal of `covariance`."""
        return self.variances(theta)[0].unsqueeze(-1) * self.unit_variance(x, theta)

    def covariance(self, x: Tensor, z: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """Covariance (task, n, m) of f between x (task, n, d) and z (task, m, d) given latents."""
        signal = self.variances(theta)[0].unsqueeze(-1).unsqueeze(-1)
        return signal * self.unit_covariance(x, z, theta)

    def draw_hyperparameters(
        self, batch: int, d: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Hyperparameters of `batch` tasks in float64: (batch,), or (batch, d) one per feature."""
        theta = {
            h.name: h.factor * draw(h.value, (batch, *h.shape), generator=generator)
            for h in self.hyperparameters(d)
        }
        if len(self.alternatives) > 1:
            theta[self.choice] = torch.randint(
                len(self.alternatives), (batch,), device=generator.device, generator=generator
            )
        return theta

    def report_latents(self, theta: dict[str, Tensor], d: int) -> dict[str, Tensor]:
        """The latents that vary between tasks."""
        fixed = {h.name for h in self.hyperparameters(d) if not isinstance(h.value, Distribution)}
        return {name: value for name, value in theta.items() if name not in fixed}

    def _by_alternative(
        self, function: Callable[..., Tensor], theta: Mapping[str, Tensor], *inputs: Tensor
    ) -> Tensor:
        """`function`(alternative, theta, *inputs), called once for all tasks of an alternative."""
        if len(self.alternatives) == 1:
            return function(self.alternatives[0], theta, *inputs)
        rows, values = [], []
        for index, name in enumerate(self.alternatives):
            chosen = (theta[self.choice] == index).nonzero().squeeze(-1)
            if len(chosen) or not len(theta[self.choice]):  # no tasks: an empty kernel
                some = {key: theta[key][chosen] for key in self.shaping}
                rows.append(chosen)
                values.append(function(name, some, *(part[chosen] for part in inputs)))
        return torch.cat(values)[torch.cat(rows).argsort()]


def observe(process: Process, x: Tensor, generator: torch.Generator) -> Tensor:
    """Noisy observations (task, n) of processes at x (task, n, dim)."""
    factor = cholesky(process.covariance(x, x), process.noise + process.jitter)
    z = draw_normal(*x.shape[:2], 1, generator=generator)
    return process.mean.unsqueeze(-1) + (factor @ z).squeeze(-1)


def conditional_tasks(
    process: Process, x: Tensor, x_query: Tensor, visible: Tensor, *, generator: torch.Generator
) -> ConditionalTasks:
    """Observations at x (task, n, dim), and what they say of queries (task, m, dim)."""
    z = draw_normal(*x.shape[:2], 1, generator=generator)
    within, cross = covariances(process, torch.cat([x, x_query], 1), x.shape[1])
    factor = cholesky(within, process.noise + process.jitter)
    return conditional_given(process, x, x_query, visible, cross=cross, factor=factor, z=z)


def covariances(process: Process, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of f at the first n of x (task, n + m, dim): (task, n, n), and with the rest (task, n, m)."""
    both = process.covariance(x[:, :n], x)
    return both[..., :n], both[..., n:]


def conditional_given(
    process: Process,
    x: Tensor,
    x_query: Tensor,
    visible: Tensor,
    *,
    cross: Tensor,
    factor: Tensor,
    z: Tensor,
) -> ConditionalTasks:
    """The same where the observations are mean + L z already.

    With L the Cholesky factor of K + noise I, y = L z, and A = L^-1 K_*, the conditional given the
    first p observations is Normal(A_:p,j z_:p, K_jj - |A_:p,j|^2): all prefixes fall out of the
    factorisation that draws the tasks.

    Args:
        visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
        cross: K_* (task, n, m).
        factor: L (task, n, n).
        z: (task, n, 1).
    """
    weights = torch.linalg.solve_triangular(factor, cross, upper=False)  # (task, point, query)
    seen = torch.arange(x.shape[1], device=x.device).unsqueeze(-1) < visible.to(x.device)
    weights = weights * seen
    left = process.variance(x_query) - weights.square().sum(1)
    constant = process.mean.unsqueeze(-1)
    return ConditionalTasks(
        x=x,
        y=constant + (factor @ z).squeeze(-1),
        x_query=x_query,
        mean=constant + (weights * z).sum(1),
        variance=left.clamp_min(process.jitter.unsqueeze(-1)),
        noise=process.noise,
        latents=process.latents,
    )


def check_hyperparameters(prior: KernelPrior, positive: tuple[str, ...]) -> None:
    """Raises a ValueError for a number that should be positive, or an unknown design of inputs."""
    read_designs(prior.inputs)
    for label in positive:
        value = getattr(prior, label)
        fits = is_positive(value) if isinstance(value, Distribution) else value > 0
        if not fits:
            raise ValueError(
                f"Expected a positive {label}, or a distribution of such; got {value}."
            )


def is_positive(distribution: Distribution) -> bool:
    """Whether it is one distribution, of numbers above zero."""
    if distribution.batch_shape or distribution.event_shape:
        return False
    support = distribution.support
    if support is None or support.is_discrete:
        return False
    lower = getattr(support, "lower_bound", None)
    if lower is None:  # a transformed one may not know its support
        try:
            lower = distribution.icdf(torch.tensor(1e-9))
        except NotImplementedError:
            return False
    return bool(torch.as_tensor(lower) >= 0)


def cholesky(covariance: Tensor, diagonal: Tensor) -> Tensor:
    """Lower factors of covariance + diagonal I; the diagonal grows only for matrices that fail.

    A matrix that is not finite, as of hyperparameters that overflow, has a factor of NaN.

    Args:
        covariance: (task, n, n).
        diagonal: (task,), added to the diagonal; tenfold at each retry where a task failed.
    """
    factor, failed = torch.linalg.cholesky_ex(_on_diagonal(covariance, diagonal))
    if not failed.any():
        return factor
    is_finite = covariance.isfinite().all(-1).all(-1) & diagonal.isfinite()
    factor[~is_finite] = math.nan
    for _ in range(8):
        bad = (failed > 0) & is_finite
        if not bad.any():
            return factor
        diagonal = torch.where(bad, 10 * diagonal, diagonal)
        grown = _on_diagonal(covariance[bad], diagonal[bad])
        factor[bad], failed[bad] = torch.linalg.cholesky_ex(grown)
    raise RuntimeError(
        "The covariance is not positive definite, even with a diagonal 1e8 x larger."
    )


def _on_diagonal(matrix: Tensor, value: Tensor) -> Tensor:
    """Matrices (task, n, n) with a value (task,) added to each diagonal."""
    matrix = matrix.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(value.unsqueeze(-1))
    return matrix


def pieces(theta: Mapping[str, Tensor], x: Tensor, z: Tensor) -> Iterator[tuple[Any, ...]]:
    """All tasks at once, but on a CPU in pieces whose matrices stay in the cache."""
    batch, n = x.shape[:2]
    size = max(1, batch if x.device.type != "cpu" else CACHED // max(1, n * n))
    for start in range(0, max(1, batch), size):
        some = slice(start, start + size)
        yield {name: value[some] for name, value in theta.items()}, x[some], z[some]
