"""Any Pyro program as a prior: `from_pyro(model)` samples its tasks and conditions it by NUTS.

Read `pyro_runs.py` for how a program is run for many tasks at once, `pyro_posterior.py` for its
posterior. Needs the extra `reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from priors.context import read_context
from priors.distributions import StackOf
from priors.inputs import draw_inputs, read_designs
from priors.pyro_runs import Model, private_draws, run, run_all
from priors.reference import Marginal, NutsPosterior
from priors.tasks import Tasks

if TYPE_CHECKING:
    from priors.nuts import Settings

CHAINS = 4
TREE_DEPTH = 6  # as all chains of all tasks wait for the longest trajectory
TARGET_ACCEPT = 0.9  # steps are small, as nobody knows what a program's density is like


@dataclass(frozen=True)
class PyroProgram:
    """The prior of `priors.from_pyro`; see there for the arguments.

    Latents in `Tasks`: every site but "y" and "f" whose size does not depend on the number of
    points, by its name, (task,) if it is one number, (task, dim) if it is one per feature; others
    number by number, as name_0, name_1, ...
    """

    model: Model
    inputs: str | tuple[str, ...] = "uniform"

    def __post_init__(self) -> None:
        if not callable(self.model):
            raise ValueError(f"Expected a Pyro program, a function of x; got {self.model!r}.")
        read_designs(self.inputs)

    def posterior_is_quick(self, d: int) -> bool:
        """No: it takes NUTS."""
        return False

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` features, in float64 on the generator's device.

        Raises:
            ValueError: a program without a site "y" of shape (n,).
        """
        x = draw_inputs(self.inputs, max(1, batch), n, d, generator=generator)
        seed = int(torch.randint(2**62, (), device=generator.device, generator=generator))
        with private_draws(seed, generator.device):
            drawn = run_all(self.model, x)
            longer = run(self.model, x.new_full((n + 1, d), 0.5))
        latents: dict[str, Tensor] = {}
        for name, value in (drawn.latents | drawn.functions).items():
            other = (longer.latents | longer.functions).get(name)
            if other is not None and other.shape == value.shape[1:]:  # it is of no single point
                latents |= _by_name(name, value, d)
        latents = {name: value[:batch] for name, value in latents.items()}  # none where batch is 0
        return Tasks(x[:batch], drawn.y[:batch].double(), drawn.f[:batch].double(), latents)

    def posterior(
        self,
        context: tuple[Any, Any],
        x_query: Any,
        latent: bool = False,
        *,
        joint: bool = False,
        warmup: int = 300,
        draws: int = 300,
        seed: int = 0,
    ) -> Distribution:
        """The posterior predictive at `x_query` by NUTS: a mixture over the draws of 4 chains.

        A new observation has the program's own distribution of y given each draw. The noise-free
        function is known exactly given each draw; its draws are smoothed by a normal kernel that
        keeps their mean and variance, so that its density is approximate.

        Args:
            context: x (n, d) or (b, n, d), or (n,) where d = 1, and y (n,) or (b, n).
            x_query: (m, d), (b, m, d) or (m,).
            latent: the noise-free function instead of a new observation.
            joint: one joint distribution over all queries instead of one for each; of new
                observations only.
            warmup: iterations per chain that adapt step size and mass matrix.
            draws: iterations per chain that are kept, a multiple of 10.
            seed: of NUTS. All tasks are sampled together, so that a task's draws depend on the
                others in its batch.

        Returns:
            batch_shape (m,) or (b, m); with `joint`, event_shape (m,) and batch_shape () or (b,).
            Its `log_prob_error` is the Monte Carlo error of its log density.

        Raises:
            ValueError: arguments of other shapes, not finite; discrete latents; observations that
                are not independent given the latents; both `latent` and `joint`.

        Reference: the smoothing is that of West, Approximating posterior distributions by
        mixtures, JRSS B 55, 1993, section 2.
        """
        if latent and joint:
            raise ValueError(
                "Expected latent or joint, not both: draws of f have no joint density."
            )
        from priors import pyro_posterior  # on demand: it imports JAX

        x, y, query, batched = read_context(context, x_query)
        settings = _settings(warmup, draws)
        parts = pyro_posterior.predict(
            self.model, x, y, query, settings, seed, latent=latent, joint=joint
        )
        return StackOf(parts) if batched else parts[0]

    def log_evidence(
        self, context: tuple[Any, Any], *, warmup: int = 300, draws: int = 300, seed: int = 0
    ) -> Tensor:
        """log p(y | x) in nats, () or (b,), by bridge sampling from draws of NUTS.

        Args: see `posterior`.
        """
        from priors import pyro_posterior  # on demand: it imports JAX

        x, y, _, batched = read_context(context)
        evidence = pyro_posterior.log_evidence(self.model, x, y, _settings(warmup, draws), seed)
        return evidence if batched else evidence[0]

    def latent_posterior(
        self, context: tuple[Any, Any], *, warmup: int = 300, draws: int = 300, seed: int = 0
    ) -> dict[str, Marginal]:
        """The posterior marginal of each sampled latent of one task, by its name in `Tasks`.

        Args: see `posterior`; the context is one task.
        """
        from priors import pyro_posterior  # on demand: it imports JAX

        x, y, _, batched = read_context(context)
        if batched:
            raise ValueError("Expected one task, x of shape (n, d) or (n,); got a batch of tasks.")
        sites = pyro_posterior.draw_latents(self.model, x, y, _settings(warmup, draws), seed)
        marginals = {}
        for name, value in sites.items():
            for label, column in _by_name(name, value[0].double(), x.shape[-1]).items():
                weights = column.new_full((len(column),), 1 / len(column))
                marginals[label] = Marginal(column, weights, column, column)
        return marginals


def _settings(warmup: int, draws: int) -> Settings:
    from priors.nuts import Settings  # on demand: it imports JAX

    if draws <= 0 or draws % NutsPosterior.blocks:
        raise ValueError(f"Expected draws in multiples of {NutsPosterior.blocks}; got {draws}.")
    return Settings(CHAINS, warmup, draws, TARGET_ACCEPT, TREE_DEPTH)


def _by_name(name: str, value: Tensor, d: int) -> dict[str, Tensor]:
    """A latent (task, *shape) by the names it has in `Tasks`."""
    value = value.double() if value.is_floating_point() else value.long()
    if value.shape[1:] in ((), (d,)):
        return {name: value}
    return {f"{name}_{i}": column for i, column in enumerate(value.flatten(1).unbind(1))}
