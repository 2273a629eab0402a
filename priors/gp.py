"""Gaussian processes whose hyperparameters are drawn per task: the prior to start reading with.

A batch of tasks, each with its own kernel, lengthscales, outputscale, noise and mean, is one
batched Cholesky factorisation in float64 on the generator's device. The posterior with the
hyperparameters integrated out is in `quadrature.py` (up to three of them) and `nuts.py` (more).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal

from priors.draws import draw, draw_normal
from priors.inputs import DESIGNS, draw_inputs
from priors.kernels import KERNELS
from priors.tasks import ConditionalTasks, Tasks

if TYPE_CHECKING:
    from priors.reference import Marginal

JITTER = 1e-10  # relative to the outputscale; raised tenfold only for tasks that fail to factorise
CACHED = 2**16  # matrix entries, 512 KiB


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian-process prior with hyperpriors: f ~ GP(mean, outputscale * kernel), y = f + noise.

    Args:
        kernel: a name in `priors.kernels.KERNELS`, or several, one of them drawn per task.
        lengthscale: positive, in the units of x; a number or any torch distribution.
        outputscale: prior variance of f; a number or a distribution.
        noise: variance (not standard deviation) of the observation noise.
        mean: constant mean of f.
        ard: one lengthscale per feature, drawn independently; irrelevant features are the long tail
            of its distribution. Otherwise one per task.
        scale_with_dimension: multiplies lengthscales by sqrt(d), so that functions of many features
            stay as learnable as functions of one (Hvarfner et al., 2024, arXiv 2402.02229).
        inputs: a design in `priors.inputs.DESIGNS`, or several, one of them drawn per task.

    Latents in `Tasks`: "lengthscale" (task, dim) with `ard`, else (task,); "outputscale", "noise",
    "mean" (task,) where they are not plain numbers; "kernel" (task,), an index, where several.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> GaussianProcess().sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    kernel: str | tuple[str, ...] = "rbf"
    lengthscale: float | Distribution = LogNormal(math.log(0.3), 0.7)
    outputscale: float | Distribution = LogNormal(0.0, 0.5)
    noise: float | Distribution = LogNormal(-4.0, 1.5)
    mean: float | Distribution = 0.0
    ard: bool = False
    scale_with_dimension: bool = False
    inputs: str | tuple[str, ...] = "uniform"

    def __post_init__(self) -> None:
        for label, chosen, known in (
            ("kernel", self.kernels, KERNELS),
            ("inputs", self.designs, DESIGNS),
        ):
            unknown = [name for name in chosen if name not in known]
            if unknown or not chosen:
                raise ValueError(f"Expected {label} among {sorted(known)}; got {chosen}.")
        for label in ("lengthscale", "outputscale", "noise"):
            value = getattr(self, label)
            if not isinstance(value, Distribution) and not value > 0:
                raise ValueError(f"Expected a positive {label}; got {value}.")

    @property
    def kernels(self) -> tuple[str, ...]:
        return (self.kernel,) if isinstance(self.kernel, str) else tuple(self.kernel)

    @property
    def designs(self) -> tuple[str, ...]:
        return (self.inputs,) if isinstance(self.inputs, str) else tuple(self.inputs)

    @property
    def latent_units(self) -> dict[str, str]:
        """How each latent scales with the data: as "x", "y" or "y^2", or not at all ("")."""
        return {"lengthscale": "x", "outputscale": "y^2", "noise": "y^2", "mean": "y", "kernel": ""}

    @property
    def latent_categories(self) -> dict[str, list[str]]:
        """The names behind latents that are indices."""
        return {"kernel": list(self.kernels)}

    def posterior_is_quick(self, d: int) -> bool:
        """Whether `posterior` of a task with d features is quadrature, in well under a second."""
        from priors.hyperpriors import hyperpriors  # on demand: both are built on this module
        from priors.reference import QUADRATURE_LIMIT

        return hyperpriors(self, d, {}).dim <= QUADRATURE_LIMIT

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` features, in float64 on the generator's device."""
        theta = self._draw_hyperparameters(batch, d, generator=generator)
        x = draw_inputs(self.designs, batch, n, d, generator=generator)
        z = draw_normal(batch, n, 1, generator=generator)
        drawn = []
        for some, inputs, normal in _pieces(theta, x, z):
            jitter = torch.full_like(some["outputscale"], JITTER)
            factor = cholesky(self._of_unit_scale(inputs, inputs, some), jitter)
            drawn.append(normal.mT @ factor.mT)  # as rows: LAPACK's factors are column-major
        scale, mean = theta["outputscale"].sqrt().unsqueeze(-1), theta["mean"].unsqueeze(-1)
        f = mean + scale * torch.cat(drawn).squeeze(1)
        y = f + theta["noise"].sqrt().unsqueeze(-1) * draw_normal(batch, n, generator=generator)
        return Tasks(x, y, f, self._report(theta))

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Draws tasks whose queries know their distribution given the latents and y_1 .. y_visible.

        With L the Cholesky factor of K + noise I, y = mean + L z, and A = L^-1 K_*, the conditional
        of f_j given the first p observations is Normal(mean + A_:p,j z_:p, K_jj - |A_:p,j|^2): all
        prefixes fall out of the factorisation that draws the tasks.

        Args:
            visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
        """
        m = len(visible)
        theta = self._draw_hyperparameters(batch, d, generator=generator)
        x_all = draw_inputs(self.designs, batch, n + m, d, generator=generator)
        x, x_query = x_all[:, :n], x_all[:, n:]
        z = draw_normal(batch, n, 1, generator=generator)
        factor = cholesky(
            self.covariance(x, x, theta), theta["noise"] + JITTER * theta["outputscale"]
        )
        weights = torch.linalg.solve_triangular(
            factor, self.covariance(x, x_query, theta), upper=False
        )  # (task, point, query)
        seen = torch.arange(n, device=x.device).unsqueeze(-1) < visible.to(x.device)
        weights = weights * seen
        constant = theta["mean"].unsqueeze(-1)
        mean = constant + (weights * z).sum(1)
        variance = self.variance(x_query, theta) - weights.square().sum(1)
        floor = JITTER * theta["outputscale"].unsqueeze(-1)
        return ConditionalTasks(
            x=x,
            y=constant + (factor @ z).squeeze(-1),
            x_query=x_query,
            mean=mean,
            variance=variance.clamp_min(floor),
            noise=theta["noise"],
            latents=self._report(theta),
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
        """The posterior predictive at `x_query`, the hyperpriors and the kernel integrated out.

        Up to three hyperparameters take deterministic quadrature, with an error below 1e-4 nats in
        the log density; more take NUTS, which needs the extra `reference`. A normal prior of the
        mean does not count, because it is integrated out in closed form.

        Args:
            context: x (n, d) or (b, n, d), or (n,) where d = 1, and y (n,) or (b, n).
            x_query: (m, d), (b, m, d) or (m,).
            latent: the noise-free function instead of a new observation.
            joint: one joint distribution over all queries instead of one for each.
            given: latents that are known, by their names in `Tasks.latents`; noise is a variance.
            method: "quadrature" or "nuts" instead of the choice above.
            seed: of NUTS.

        Returns:
            A float64 mixture of normals, batch_shape (m,) or (b, m); with `joint`, event_shape (m,)
            and batch_shape () or (b,). A single normal where all hyperparameters are known.

        Raises:
            ValueError: arguments of other shapes, not finite, or of unknown latents.

        Example:
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

        Args: see `posterior`. NUTS estimates it by bridge sampling.
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

    def conditional(
        self,
        x: Tensor,
        y: Tensor,
        x_query: Tensor,
        theta: dict[str, Tensor],
        *,
        joint: bool = False,
        mean_variance: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (task, m) and variance (task, m), or covariance, of f given the latents.

        Args:
            x: (task, n, d).
            y: (task, n).
            x_query: (task, m, d).
            theta: all latents, also those that are plain numbers in the prior; (task,), or
                (task, dim) lengthscales with `ard`.
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
        return mean, variance.clamp_min(JITTER * theta["outputscale"].unsqueeze(-1))

    def log_likelihood(
        self, x: Tensor, y: Tensor, theta: dict[str, Tensor], *, mean_variance: float = 0.0
    ) -> Tensor:
        """log p(y | x, latents) in nats, (task,); arguments as in `conditional`."""
        factor, z = self.whiten(x, y, theta, mean_variance)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (z.square().sum(-1) + log_determinant + y.shape[-1] * math.log(2 * math.pi))

    def whiten(
        self, x: Tensor, y: Tensor, theta: dict[str, Tensor], mean_variance: float
    ) -> tuple[Tensor, Tensor]:
        """The Cholesky factor L (task, n, n) of y's covariance, and L^-1 (y - mean) (task, n)."""
        covariance = self.covariance(x, x, theta) + mean_variance
        factor = cholesky(covariance, theta["noise"] + JITTER * theta["outputscale"])
        centred = (y - theta["mean"].unsqueeze(-1)).unsqueeze(-1)
        return factor, torch.linalg.solve_triangular(factor, centred, upper=False).squeeze(-1)

    def variance(self, x: Tensor, theta: dict[str, Tensor]) -> Tensor:
        """Prior variance (task, n) of f at x (task, n, d): the diagonal of `covariance`."""
        variance = theta["outputscale"].unsqueeze(-1).expand(x.shape[:-1])
        if "linear" not in self.kernels:
            return variance  # every other kernel is stationary
        lengthscale = theta["lengthscale"] if self.ard else theta["lengthscale"].unsqueeze(-1)
        square = ((x - 0.5) / lengthscale.unsqueeze(-2)).square().sum(-1)
        is_linear = torch.ones_like(theta["outputscale"], dtype=torch.bool)
        if len(self.kernels) > 1:
            is_linear = theta["kernel"] == self.kernels.index("linear")
        return torch.where(is_linear.unsqueeze(-1), variance * square, variance)

    def covariance(self, x: Tensor, z: Tensor, theta: dict[str, Tensor]) -> Tensor:
        """Covariance (task, n, m) of f between x (task, n, d) and z (task, m, d) given latents."""
        return theta["outputscale"].unsqueeze(-1).unsqueeze(-1) * self._of_unit_scale(x, z, theta)

    def _of_unit_scale(self, x: Tensor, z: Tensor, theta: dict[str, Tensor]) -> Tensor:
        """The same with an outputscale of 1."""
        lengthscale = theta["lengthscale"]
        lengthscale = lengthscale if self.ard else lengthscale.unsqueeze(-1)
        if len(self.kernels) == 1:
            return KERNELS[self.kernels[0]](x, z, lengthscale)
        unit = x.new_empty(*x.shape[:-1], z.shape[-2])
        for index, name in enumerate(self.kernels):
            chosen = theta["kernel"] == index
            unit[chosen] = KERNELS[name](x[chosen], z[chosen], lengthscale[chosen])
        return unit

    def _draw_hyperparameters(
        self, batch: int, d: int, *, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Hyperparameters of `batch` tasks in float64: (batch,), or (batch, d) with `ard`."""
        shape = (batch, d) if self.ard else (batch,)
        lengthscale = draw(self.lengthscale, shape, generator=generator)
        if self.scale_with_dimension:
            lengthscale = lengthscale * math.sqrt(d)
        theta = {
            "lengthscale": lengthscale,
            "outputscale": draw(self.outputscale, (batch,), generator=generator),
            "noise": draw(self.noise, (batch,), generator=generator),
            "mean": draw(self.mean, (batch,), generator=generator),
        }
        if len(self.kernels) > 1:
            theta["kernel"] = torch.randint(
                len(self.kernels), (batch,), device=generator.device, generator=generator
            )
        return theta

    def _report(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        """The latents that vary between tasks."""
        fixed = {
            name
            for name in ("lengthscale", "outputscale", "noise", "mean")
            if not isinstance(getattr(self, name), Distribution)
        }
        return {name: value for name, value in theta.items() if name not in fixed}


def cholesky(covariance: Tensor, diagonal: Tensor) -> Tensor:
    """Lower factors of covariance + diagonal I; the diagonal grows only for matrices that fail.

    Args:
        covariance: (task, n, n).
        diagonal: (task,), added to the diagonal; tenfold at each retry where a task failed.
    """
    factor, failed = torch.linalg.cholesky_ex(_on_diagonal(covariance, diagonal))
    for _ in range(8):
        if not failed.any():
            return factor
        bad = failed > 0
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


def _pieces(theta: dict[str, Tensor], x: Tensor, z: Tensor) -> Iterator[tuple[Any, ...]]:
    """All tasks at once, but on a CPU as many as its cache holds the matrices of: 3 x faster."""
    batch, n = x.shape[:2]
    size = max(1, batch if x.device.type != "cpu" else CACHED // max(1, n * n))
    for start in range(0, max(1, batch), size):
        some = slice(start, start + size)
        yield {name: value[some] for name, value in theta.items()}, x[some], z[some]
