"""Mixtures of priors: every task comes from one of them, which one is a latent.

Bayes' rule does the rest: the posterior is the mixture of the parts' posteriors with their
evidences as weights, and as exact as they are. Parts may be of any kind; read `distributions.py`
for the mixture of their predictives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from priors.bends import Bend
from priors.context import read_context
from priors.distributions import MixtureOf
from priors.tasks import ConditionalPrior, ConditionalTasks, Tasks, knows_posterior

if TYPE_CHECKING:
    from priors.reference import Marginal


@dataclass(frozen=True)
class Mixture:
    """A prior that draws each task from one of several priors.

    Args:
        priors: the parts; any objects with `sample`.
        weights: their prior probabilities, up to a constant; None: equal.

    Latents in `Tasks`: "component" (task,), the index of the part, and those that all parts have in
    one shape, unit and meaning.

    `sample_conditional` is there if all parts have it, `posterior` and `log_evidence` work if all
    parts have both.

    Example:
        >>> from priors import GaussianProcess
        >>> prior = Mixture([GaussianProcess(), GaussianProcess(kernel="linear")], (0.7, 0.3))
        >>> g = torch.Generator().manual_seed(0)
        >>> prior.sample(batch=64, n=100, d=3, generator=g).latents["component"].shape
        torch.Size([64])
    """

    priors: Sequence[Any]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "priors", tuple(self.priors))
        if not self.priors:
            raise ValueError("Expected at least one prior in the mixture; got none.")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            if len(self.weights) != len(self.priors) or not all(w > 0 for w in self.weights):
                raise ValueError(
                    f"Expected {len(self.priors)} positive weights, one for each prior; "
                    f"got {self.weights}."
                )
        if all(isinstance(prior, ConditionalPrior) for prior in self.priors):
            object.__setattr__(self, "sample_conditional", self._sample_conditional)

    @property
    def log_weights(self) -> Tensor:
        """Log prior probabilities (component,)."""
        weights = self.weights or [1.0] * len(self.priors)
        return torch.tensor(weights, dtype=torch.float64).log().log_softmax(0)

    @property
    def names(self) -> list[str]:
        """The parts' class names, numbered where several have the same."""
        names = [type(prior).__name__ for prior in self.priors]
        count, seen = Counter(names), Counter[str]()
        for index, name in enumerate(names):
            seen[name] += 1
            names[index] = f"{name} {seen[name]}" if count[name] > 1 else name
        return names

    @property
    def latent_units(self) -> dict[str, str]:
        """How each latent scales with the data: as "x", "y" or "y^2", or not at all ("")."""
        units: dict[str, str] = getattr(self.priors[0], "latent_units", {})
        return {name: unit for name, unit in units.items() if self._is_shared(name)} | {
            "component": ""
        }

    @property
    def latent_categories(self) -> dict[str, list[str]]:
        """The names behind latents that are indices."""
        known: dict[str, list[str]] = getattr(self.priors[0], "latent_categories", {})
        return {name: labels for name, labels in known.items() if self._is_shared(name)} | {
            "component": self.names
        }

    @property
    def has_posterior(self) -> bool:
        """Whether all parts know their posterior and evidence."""
        return all(
            knows_posterior(prior) and hasattr(prior, "log_evidence") for prior in self.priors
        )

    def posterior_is_quick(self, d: int) -> bool:
        """Whether all parts' posteriors are."""
        return all(
            hasattr(prior, "posterior_is_quick") and prior.posterior_is_quick(d)
            for prior in self.priors
        )

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` features, in float64 on the generator's device.

        Raises:
            ValueError: if parts differ in `num_context`.
        """
        if batch == 0:
            return _none_of(self.sample(1, n, d, generator=generator))
        component = self._draw_components(batch, generator=generator)
        parts = [
            prior.sample(max(1, int((component == index).sum())), n, d, generator=generator)
            for index, prior in enumerate(self.priors)
        ]
        if len({part.num_context for part in parts}) > 1:
            known = [part.num_context for part in parts]
            raise ValueError(f"Expected parts of one num_context; got {known}.")
        x, y, f = (
            _gather(component, [getattr(part, name) for part in parts]) for name in ("x", "y", "f")
        )
        latents = self._latents(component, [part.latents for part in parts])
        return Tasks(x, y, f, latents, parts[0].num_context)

    def _sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Tasks whose queries know their distribution given the latents and y_1 .. y_visible.

        Args:
            visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
        """
        component = self._draw_components(batch, generator=generator)
        parts = [
            prior.sample_conditional(
                max(1, int((component == index).sum())), n, d, visible, generator=generator
            )
            for index, prior in enumerate(self.priors)
        ]
        *fields, latents, bends = zip(*parts, strict=True)
        x, y, x_query, mean, variance, noise = (_gather(component, list(f)) for f in fields)
        shared = self._latents(component, list(latents))
        bend = None
        if any(part is not None for part in bends):
            filled = [part.bend or Bend.identity(part.noise) for part in parts]
            bend = Bend(*(_gather(component, list(values)) for values in zip(*filled, strict=True)))
        return ConditionalTasks(x, y, x_query, mean, variance, noise, shared, bend)

    def posterior(
        self,
        context: tuple[Any, Any],
        x_query: Any,
        latent: bool = False,
        *,
        joint: bool = False,
    ) -> MixtureOf:
        """The parts' posterior predictives, weighted by their posterior probabilities.

        Args:
            context: x (n, d) or (b, n, d), or (n,) where d = 1, and y (n,) or (b, n).
            x_query: (m, d), (b, m, d) or (m,).
            latent: the noise-free function instead of a new observation.
            joint: one joint distribution over all queries instead of one for each.

        Returns:
            A mixture, batch_shape (m,) or (b, m); with `joint`, event_shape (m,) and batch_shape ()
            or (b,). Its `log_prob_error` is made of the parts'.

        Raises:
            ValueError: arguments of other shapes, not finite, or a part without a posterior or
                evidence.

        Example:
            >>> from priors import GaussianProcess
            >>> prior = Mixture([GaussianProcess(), GaussianProcess(kernel="linear")])
            >>> posterior = prior.posterior(([0.1, 0.6], [0.3, -1.0]), [0.2, 0.4, 0.9])
            >>> posterior.mean.shape
            torch.Size([3])
        """
        log_weights = self._log_joint(context)  # (component,) or (component, b)
        parts = [prior.posterior(context, x_query, latent, joint=joint) for prior in self.priors]
        if not joint:
            log_weights = log_weights.unsqueeze(-1)
        return MixtureOf(log_weights, parts)

    def log_evidence(self, context: tuple[Any, Any]) -> Tensor:
        """log sum_k w_k p_k(y | x) in nats, () or (b,).

        Args: see `posterior`.
        """
        return self._log_joint(context).logsumexp(0)

    def latent_posterior(self, context: tuple[Any, Any]) -> dict[str, Marginal]:
        """The posterior of "component", for one task: `weights` are the parts' probabilities.

        Args: see `posterior`; the context is one task.
        """
        from priors.reference import Marginal  # on demand: reference.py is needed by few

        if read_context(context).batched:
            raise ValueError("Expected one task, x of shape (n, d) or (n,); got a batch of tasks.")
        index = torch.arange(len(self.priors), dtype=torch.float64)
        return {"component": Marginal(index, self._log_joint(context).softmax(0), index, index)}

    def _log_joint(self, context: tuple[Any, Any]) -> Tensor:
        """log p(component, y | x), (component,) or (component, b)."""
        for prior, name in zip(self.priors, self.names, strict=True):
            if not (hasattr(prior, "posterior") and hasattr(prior, "log_evidence")):
                raise ValueError(
                    f"Expected parts that know their posterior and log_evidence; {name} does not."
                )
        evidence = torch.stack([prior.log_evidence(context) for prior in self.priors])
        return evidence + self.log_weights.reshape(-1, *[1] * (evidence.dim() - 1))

    def _draw_components(self, batch: int, *, generator: torch.Generator) -> Tensor:
        """Index of the part (batch,) of each task."""
        probabilities = self.log_weights.exp().to(generator.device)
        return torch.multinomial(probabilities, batch, replacement=True, generator=generator)

    def _is_shared(self, latent: str) -> bool:
        """Whether all parts mean the same by a latent's name, as far as they say."""

        def meaning(prior: Any) -> tuple[Any, Any]:
            units = getattr(prior, "latent_units", {})
            return units.get(latent), getattr(prior, "latent_categories", {}).get(latent)

        return all(meaning(prior) == meaning(self.priors[0]) for prior in self.priors)

    def _latents(self, component: Tensor, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The component, and the latents that all parts have."""
        shared = {
            name
            for name, value in parts[0].items()
            if self._is_shared(name)
            and all(name in p and p[name].shape[1:] == value.shape[1:] for p in parts)
        }
        latents = {name: _gather(component, [part[name] for part in parts]) for name in shared}
        return dict(sorted(latents.items())) | {"component": component}


def _none_of(tasks: Tasks) -> Tasks:
    """No tasks, of the shapes of these."""
    x, y, f = tasks.x[:0], tasks.y[:0], tasks.f[:0]
    return Tasks(x, y, f, {k: v[:0] for k, v in tasks.latents.items()}, tasks.num_context)


def _gather(component: Tensor, parts: list[Tensor]) -> Tensor:
    """Tasks in the order of `component` from those of each part in turn."""
    whole = parts[0].new_empty(len(component), *parts[0].shape[1:])
    for index, part in enumerate(parts):
        chosen = component == index
        whole[chosen] = part[: int(chosen.sum())]
    return whole
