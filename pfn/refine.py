"""The refined posterior: a network's answer turned into the exact one, where the prior allows it.

Where data have a likelihood given the prior's latents, the network's marginals of the latents are a
proposal that is about right, and weighted draws of it are the exact posterior: every answer is a
sum over them. `Fitted.refine` is the front door; read `importance.py` for the draws and their
diagnostic, `priors/latent_density.py` for the densities.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    LogNormal,
    MixtureSameFamily,
    Normal,
)

from pfn.data import check_count, check_query
from pfn.importance import Part, log_weights_of, thin, weigh
from pfn.model import Fitted
from pfn.predictive import Predictive
from pfn.units import Units, prior_units
from priors import Marginal, ReferencePrior
from priors.distributions import Transformed
from priors.tasks import LatentDensity, LatentPrior, knows_posterior

NODES = 1000  # draws that predictions are made of


@dataclass(frozen=True)
class Refined:
    """The exact posterior of a context, as weighted draws of the prior's latents.

    Attributes:
        method: "importance" for weighted draws of proposals; "smc" where their k is too large, for
            draws that sequential Monte Carlo has carried on; "exact" where nothing is unknown;
            "reference" for the posterior of the prior itself.
        pareto_k: the shape of the largest importance weights, the smaller the better: importance
            sampling is for up to 0.7 (`pfn.pareto.largest_trusted`). Where nothing is weighted,
            infinite: negative for "exact", positive for "reference".
        effective_draws: independent draws of the posterior that say as much; infinite for "exact",
            NaN for "reference".
        log_evidence: log p(y | x) in nats, in the units of the data; NaN for "reference". Where
            location and scale of y have flat priors it has an arbitrary constant: only differences
            between refined posteriors of the same data mean something.
        log_evidence_error: its standard error.
        evaluations: of log p(latents, y | x), for a Gaussian process one Cholesky factorisation
            each.
    """

    method: str
    pareto_k: float
    effective_draws: float
    log_evidence: float
    log_evidence_error: float
    evaluations: int
    fitted: Fitted = field(repr=False)
    source: Source = field(repr=False)

    def predict(self, x_query: Any, *, latent: bool = False) -> Distribution:
        """The exact posterior predictive at `x_query` (m, d), or (m,) for d = 1.

        Unlike the network's, it knows inputs far outside the prior's box for what they are.

        Args:
            x_query: some thousands at a time: each needs its own mixture of `NODES` normals.
            latent: the noise-free function instead of a new noisy observation.

        Returns:
            A `Predictive` of batch_shape (m,) in the query's floating dtype; where the prior's own
            reference is no mixture of normals, what it is, in float64.

        Raises:
            ValueError: if the query does not fit the context.
        """
        x, dtype = check_query(x_query, self.fitted.context)
        units = _on_cpu(self.fitted.units)
        posterior = self.source.predict(units.to_box(x.cpu()).squeeze(0), latent)
        return _in_units_of_data(posterior, units, x.device, dtype)

    def latents(self) -> dict[str, Marginal]:
        """Posterior marginals of the unknown latents, in the units of the data.

        Returns:
            By name, weighted values with `.mean`, `.variance`, `.cdf` and `.quantile`; an index
            for a choice.

        Raises:
            ValueError: for one lengthscale over features whose ranges differ: it has no unit.
        """
        units, marginals = _on_cpu(self.fitted.units), {}
        for name, marginal in self.source.latents().items():
            per_feature = marginal.values.dim() > 1
            shift, scale = self.fitted.pfn.latent_units(name, units, per_feature)
            if not per_feature:
                shift, scale = shift.squeeze(1), scale.squeeze(1)
            values, low, high = (
                shift + scale * part for part in (marginal.values, marginal.low, marginal.high)
            )
            marginals[name] = Marginal(values, marginal.weights, low, high)
        return marginals


class Source(Protocol):
    """What answers come from, in the units of the prior."""

    def predict(self, x_query: Tensor, latent: bool) -> Distribution:
        """The posterior predictive at x_query (m, d)."""
        ...

    def latents(self) -> dict[str, Marginal]:
        """Marginals of the unknown latents."""
        ...


class Draws(NamedTuple):
    """Weighted draws of the posterior, and the equally good but fewer ones that predict."""

    parts: tuple[Part, ...]
    nodes: tuple[Part, ...]
    seed: int

    def predict(self, x_query: Tensor, latent: bool) -> Predictive:
        """The mixture of what the nodes predict."""
        answers = [part.density.predict(part.t, x_query, latent=latent) for part in self.nodes]
        means, stds = (torch.cat(column).mT for column in zip(*answers, strict=True))
        return Predictive(log_weights_of(self.nodes), means, stds)  # (m, node)

    def latents(self) -> dict[str, Marginal]:
        """Marginals over all draws."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [part.density.latents(part.t, generator=generator) for part in self.parts]
        weights = log_weights_of(self.parts).softmax(0)
        marginals = {}
        for name in drawn[0]:
            values = torch.cat([part[name].double() for part in drawn])
            marginals[name] = Marginal(values, weights, values, values)
        return marginals


class Reference(NamedTuple):
    """The prior's own posterior, asked anew for every answer."""

    prior: ReferencePrior
    context: tuple[Tensor, Tensor]
    options: dict[str, Any]

    def predict(self, x_query: Tensor, latent: bool) -> Distribution:
        """The prior's posterior."""
        return self.prior.posterior(self.context, x_query, latent, **self.options)

    def latents(self) -> dict[str, Marginal]:
        """The prior's, where it knows them."""
        if not hasattr(self.prior, "latent_posterior"):
            return {}
        marginals: dict[str, Marginal] = self.prior.latent_posterior(self.context, **self.options)
        return marginals


@torch.no_grad()
def refine(fitted: Fitted, *, draws: int = 1000, seed: int = 0) -> Refined:
    """The exact posterior of a context, starting from the network's answer.

    With standardize=True the units of y come from the context, and say nothing about those of the
    prior: the exact posterior, like the network, then does not know location and scale of y, which
    have flat priors (the scale unless it is constant). The range of x, or bounds, is taken for the
    prior's box.

    A prior without likelihood given the network's latents, such as a `BNN`, answers with its own
    posterior, which knows no free units.

    Args:
        fitted: one context, not a batch.
        draws: how many shall be effective. The divergence from the exact predictive to the refined
            one is some 0.5 / draws nats where data are few, less where they are many.
        seed: of the draws.

    Returns:
        A `Refined`, whose `predict` and `latents` take the place of those of `fitted`.

    Raises:
        ValueError: a batch of contexts, a network that does not know its prior, a prior without
            likelihood and posterior, or fewer than 100 draws.

    Reference: Li et al., Amortized Bayesian Workflow, TMLR 2026, for the way from amortised draws
    over Pareto-smoothed importance sampling to a sampler that starts from them.

    Example:
        >>> import pfn
        >>> fitted = pfn.load("gp-1d").condition(([0.1, 0.5, 0.9], [0.0, 1.0, 0.3]))
        >>> refined = refine(fitted)
        >>> refined.method, refined.predict([0.6, 0.8]).mean.shape
        ('importance', torch.Size([2]))
    """
    prior, name = fitted.pfn.prior, fitted.pfn.card.name
    if fitted.context.batched:
        raise ValueError("Expected one context, x (n, d); got a batch. Refine each by itself.")
    draws = check_count(draws, 100, "draw")
    if prior is None:
        raise ValueError(
            f"Expected a PFN that knows its prior; {name!r} was trained on a prior of your own."
            " Load it with pfn.load(path, prior=my_prior)."
        )
    task = _read(fitted)
    if isinstance(prior, LatentPrior):
        densities = prior.latent_densities(
            (task.x, task.y),
            given=task.given,
            free_location=task.free_location,
            free_scale=task.free_scale,
        )
        return _by_density(fitted, task, densities, draws, seed)
    if knows_posterior(prior):
        source = Reference(prior, (task.x, task.y), _options(prior, task.given, seed))
        return Refined("reference", math.inf, math.nan, math.nan, math.nan, 0, fitted, source)
    raise ValueError(
        f"Expected a prior with a likelihood of its latents or a posterior; {name!r} was trained on"
        f" a {type(prior).__name__}, which has neither."
    )


class _Task(NamedTuple):
    """What a fitted network knows, in the prior's units, in float64 on the CPU."""

    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    given: dict[str, Tensor]  # known latents
    marginals: dict[str, Distribution]  # the network's, of the others
    free_location: bool  # whether the context's moments are the units of y
    free_scale: bool


def _read(fitted: Fitted) -> _Task:
    """The context and what the network says of its latents, whatever the units of the data."""
    ready, units = fitted._ready, fitted.units
    x, y = fitted.rows()
    x, y = units.to_box(x), units.map_y(y)
    in_units_of_prior = ready._replace(units=prior_units(ready.context.x, ready.context.y))
    marginals = Fitted(fitted.pfn, in_units_of_prior, fitted._encoded).latents()
    given = {}
    if ready.known is not None:
        given = fitted.pfn.read_known(ready.known[0], x.shape[-1])
    set_by_context, n = ready.own.y, ready.y.shape[1]
    varies = n > 1 and bool(y[0, :n].std() > 0.5)  # then it is 1
    return _Task(
        x[0].cpu(),
        y[0].cpu(),
        given,
        {name: _to_cpu(law) for name, law in marginals.items() if name not in given},
        free_location=set_by_context,
        free_scale=set_by_context and varies,
    )


def _to_cpu(law: Distribution) -> Distribution:
    """A marginal of `Fitted.latents` where priors compute."""
    if isinstance(law, Categorical):
        return Categorical(logits=law.logits.cpu())
    assert isinstance(law, MixtureSameFamily)
    part = law.component_distribution
    assert isinstance(part, LogNormal | Normal)
    component = type(part)(part.loc.cpu(), part.scale.cpu())
    return MixtureSameFamily(Categorical(logits=law.mixture_distribution.logits.cpu()), component)


def _options(prior: ReferencePrior, given: Mapping[str, Tensor], seed: int) -> dict[str, Any]:
    """Keyword arguments of a prior's own posterior, as far as it takes them."""
    parameters = inspect.signature(prior.posterior).parameters
    passes_on = any(part.kind is part.VAR_KEYWORD for part in parameters.values())
    if given and not passes_on and "given" not in parameters:
        raise ValueError(
            f"Expected no given latents with a {type(prior).__name__}, whose posterior takes none;"
            f" got {sorted(given)}."
        )
    options: dict[str, Any] = {"given": dict(given)} if given else {}
    return options | ({"seed": seed} if "seed" in parameters else {})


def _by_density(
    fitted: Fitted, task: _Task, densities: Sequence[LatentDensity], draws: int, seed: int
) -> Refined:
    """Weighted draws of the densities."""
    generator = torch.Generator().manual_seed(seed)
    found = weigh(densities, task.marginals, draws, generator=generator)
    log_scale = float(fitted.units.y_scale[0].log())
    log_evidence = float(log_weights_of(found.parts).logsumexp(0)) - len(task.y) * log_scale
    return Refined(
        found.method,
        found.pareto_k,
        found.effective_draws,
        log_evidence,
        found.log_evidence_error,
        found.evaluations,
        fitted,
        Draws(found.parts, thin(found.parts, NODES, generator=generator), seed),
    )


def _on_cpu(units: Units) -> Units:
    """The units without gradients, where priors compute."""
    return Units(*(part.detach().cpu() for part in units))


def _in_units_of_data(
    posterior: Distribution, units: Units, device: torch.device, dtype: torch.dtype
) -> Distribution:
    """A posterior (m,) in the units of the prior, in those of the data."""
    shift, scale = units.y_shift[0], units.y_scale[0]
    if isinstance(posterior, Normal):
        loc, std = posterior.loc.unsqueeze(-1), posterior.scale.unsqueeze(-1)
        posterior = Predictive(torch.zeros_like(loc), loc, std)
    elif isinstance(posterior, MixtureSameFamily):
        normal = posterior.component_distribution
        if isinstance(normal, Normal):
            logits = posterior.mixture_distribution.logits
            posterior = Predictive(logits, normal.loc, normal.scale)
    if not isinstance(posterior, Predictive):
        return Transformed(posterior, AffineTransform(shift, scale))
    inner = posterior.affine(shift, scale)
    parts = inner.log_weights, inner.means, inner.stds
    return Predictive(*(part.to(device, dtype) for part in parts))
