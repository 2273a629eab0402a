"""The two nouns every prior speaks: `Tasks`, a batch of data sets, and `Prior`, what draws them.

A prior of your own is any object with a `sample` of this signature; nothing needs to be inherited.
`ConditionalPrior` and `ParticlePrior` are optional further abilities that make pretraining far more
efficient: such a prior can say, for every point it draws, how that point is distributed given the
points before it, and the latents as well or not.
Read `gp.py` next for a complete example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution

from priors.bends import Bend

if TYPE_CHECKING:
    from priors.hyperpriors import Coordinate


class Tasks(NamedTuple):
    """A batch of data sets drawn from a prior.

    Rows are in exchangeable random order when `num_context` is None, so that any split into context
    and query is valid. A number means that only the rows up to it may be context, in that order
    (prefixes of a learning curve, say).
    """

    x: Tensor  # (task, point, dim) inputs
    y: Tensor  # (task, point) noisy observations
    f: Tensor  # (task, point) the noise-free function
    latents: dict[str, Tensor]  # name -> (task,) or, one value per feature, (task, dim)
    num_context: int | None = None


class ConditionalTasks(NamedTuple):
    """Tasks whose queries carry their exact Gaussian conditional given the latents.

    Query j of a task is distributed as f_j ~ Normal(mean_j, variance_j) and y_j = f_j + Normal(0,
    noise) given the latents and the first `visible_j` observations. A network trained on these
    conditionals instead of on single draws minimises the same expected loss with less gradient
    noise (Rao-Blackwell).

    With a `bend`, y and f are bent: mean, variance and noise are of what it is applied to.
    """

    x: Tensor  # (task, point, dim)
    y: Tensor  # (task, point) noisy observations
    x_query: Tensor  # (task, query, dim)
    mean: Tensor  # (task, query) E[f_j | latents, y_1 .. y_visible_j]
    variance: Tensor  # (task, query) Var[f_j | latents, y_1 .. y_visible_j]
    noise: Tensor  # (task,) variance of the observation noise
    latents: dict[str, Tensor]
    bend: Bend | None = None


class ParticleTasks(NamedTuple):
    """Tasks whose queries carry their posterior predictive as a weighted mixture of normals.

    Each task has several values of the latents, its particles, of which the first drew its y; those
    that are categories all particles of a task share. Query
    j is distributed as f_j ~ Normal(mean_jk, variance_jk) and y_j = f_j + Normal(0, noise_k) given
    particle k and the first `visible_j` observations, and the average over particles with their
    weights has the same expectation, given these observations, as the exact posterior predictive.
    A network trained on it meets less gradient noise than on the conditional of the first alone.
    """

    x: Tensor  # (task, point, dim)
    y: Tensor  # (task, point) noisy observations
    x_query: Tensor  # (task, query, dim)
    log_weights: Tensor  # (task, query, particle), normalised
    mean: Tensor  # (task, query, particle)
    variance: Tensor  # (task, query, particle)
    noise: Tensor  # (task, particle)
    latents: dict[str, Tensor]  # name -> (task, particle) or (task, particle, dim)


@runtime_checkable
class Prior(Protocol):
    """A distribution over tasks. `posterior` and `log_evidence` are optional extras.

    So is `latent_units`, a dictionary of how latents scale with the data: "x", "y", "y^2" or "".
    """

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` independent tasks of `n` points with `d` features, on the generator's device."""
        ...


@runtime_checkable
class ConditionalPrior(Prior, Protocol):
    """A prior that knows each point's Gaussian conditional given latents and earlier points."""

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Tasks of `n` observations, and one query per entry of `visible` (m,), in 0 .. n."""
        ...


@runtime_checkable
class ParticlePrior(Prior, Protocol):
    """A prior that knows further latents which its tasks' observations leave plausible."""

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
        """Tasks of `n` observations, and one query per entry of `visible` (m,), in 0 .. n.

        Args:
            held: latents by name that all particles of a task share, (task,) or (task, dim)
                booleans; none where a name is missing.
        """
        ...


@runtime_checkable
class PriorAtInputs(Prior, Protocol):
    """A prior that can draw data sets at given inputs."""

    def sample_at(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Noisy observations (task, n) of tasks of their own at x (task, n, d)."""
        ...


@runtime_checkable
class ReferencePrior(Prior, Protocol):
    """A prior that knows its exact or reference posterior predictive.

    One made of others, whose parts may not, says so by an attribute `has_posterior`.
    """

    def posterior(
        self, context: tuple[Tensor, Tensor], x_query: Tensor, latent: bool = False
    ) -> Distribution:
        """The posterior predictive at `x_query`, batch_shape (m,) or (b, m)."""
        ...


class LatentDensity(Protocol):
    """The posterior density of one task's latents, up to its constant, and what they predict.

    Latents are t (node, dim), unconstrained and about standard normal a priori: first those of
    `coordinates`, then any others. A prior with a choice, of a kernel say, has one such density for
    each alternative; together they integrate to the evidence.
    """

    @property
    def dim(self) -> int:
        """The number of unknown latents."""
        ...

    @property
    def coordinates(self) -> tuple[Coordinate, ...]:
        """What the first latents mean."""
        ...

    @property
    def choice(self) -> dict[str, int]:
        """Which alternative this is: the choice's name and index; nothing where there is none."""
        ...

    def log_density(self, t: Tensor) -> Tensor:
        """log p(t, y, alternative | x) in nats, (node,); -inf where it cannot be computed."""
        ...

    def predict(self, t: Tensor, x_query: Tensor, *, latent: bool = False) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (node, m) of the normal law of y, or f, at x_query (m, d).

        Args:
            latent: the noise-free function instead of a new observation.
        """
        ...

    def latents(self, t: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        """The unknown latents by name as in `Tasks`, (node,) or (node, dim).

        Those that the density has integrated out are drawn from their law given t.
        """
        ...


@runtime_checkable
class LatentPrior(Prior, Protocol):
    """A prior whose data have a likelihood given latents, and a normal law for every query."""

    def latent_densities(
        self,
        context: tuple[Any, Any],
        *,
        given: Mapping[str, Any] | None = None,
        free_location: bool = False,
        free_scale: bool = False,
    ) -> Sequence[LatentDensity]:
        """The densities of one task's latents, one for each alternative that it may have.

        Args:
            given: latents that are known, by their names in `Tasks.latents`.
            free_location: a flat prior for the mean of y.
            free_scale: a flat prior for the logarithm of the unit of y.
        """
        ...


def knows_posterior(prior: Prior) -> TypeGuard[ReferencePrior]:
    """Whether a prior, with all its parts, is a `ReferencePrior`."""
    return isinstance(prior, ReferencePrior) and getattr(prior, "has_posterior", True)
