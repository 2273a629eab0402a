"""Does a context look like the prior's? Its check against data sets that the prior itself draws.

Six statistics look for what goes wrong in practice: the evidence, and of the residuals of each
observation given the others the largest, their tails, their size, how it changes from place to
place, and how alike neighbours are. Each is ranked among those of data sets of the prior at the
same inputs, standardised in the same way, and so is the smallest of the six p-values. What comes
out is uniform on the prior's own data, whatever the network's faults, as ranks among exchangeable
values are. Where a fifth of the data sets already leave no doubt, the others are not drawn.

Reference: Box, Sampling and Bayes' inference in scientific modelling and robustness, J. R. Stat.
Soc. A 143, 1980, for the evidence; Evans and Moshonov, Checking for prior-data conflict, Bayesian
Analysis 1, 2006; Besag and Clifford, Sequential Monte Carlo p-values, Biometrika 78, 1991.

Shapes: b tasks, n points, d features, s statistics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from pfn.evidence import DataSets, left_out, one_step_ahead
from pfn.network import Network
from pfn.transformer import Transformer
from pfn.units import FromContext, context_units, prior_units
from priors import Prior
from priors.kernel_prior import KernelPrior
from priors.tasks import PriorAtInputs

if TYPE_CHECKING:
    from pfn.model import PFN

LEAST_POINTS = 4  # below, no data set is unlike another
LEAST_DRAWS = 19  # that a p-value of 5 % can come from
LEVEL = 0.05  # of a verdict
CLEAR = 0.25  # p-value of a fifth of the draws, at least `LEAST_DRAWS`, above which it is final
GROWTH = 1.0  # as of `evidence.py`; coarser, as the same for all data sets
FAR = 0.25  # widths of the box outside it, beyond which no network was trained
CLIP = 4.0  # of a residual, so that one outlier is no pattern

TAIL = 0.1  # of a statistic's values, whose excess is taken as exponential

IN_WORDS = {
    "evidence": "as a whole they are less likely under the prior than its own data sets are",
    "outlier": "row {row} lies {z:.1f} standard deviations from where the other rows put it",
    "tails": "deviations from what the other rows say have heavier tails than the prior's, most of"
    " all row {row}, by {z:.1f} standard deviations",
    "spread": "they lie {spread} what the other rows say than the prior expects",
    "pattern": "their deviations are larger in one range of feature {feature} than in another",
    "structure": "neighbours deviate alike, as if the prior's functions could not follow them",
}


class PriorDataConflict(UserWarning):
    """The context does not look like a data set of the prior."""


class Statistics(NamedTuple):
    """What is compared, larger where less like the prior, and the residuals behind it."""

    values: Tensor  # (b, s) in the order of IN_WORDS
    z: Tensor  # (b, n) normal scores of observations given the others
    feature: Tensor  # (b,) the one that residuals' size depends on most


@dataclass(frozen=True, repr=False)
class Check:
    """Whether a context looks like the prior's data sets, and what speaks against it.

    Attributes:
        p_value: uniform on (0, 1] if the prior drew the context.
        verdict: "consistent", or "conflict" where p_value <= 0.05.
        reason: one sentence, and a second one on inputs far outside the prior's box.
        p_values: of each statistic, by name, small where it speaks against the prior.
        z: (n,) normal scores of each observation given the others.
        pit: (n,) their probability integral transforms, uniform on (0, 1).
        row: the most surprising observation.
        outside: (n,) how far rows lie outside the box of the prior's inputs, in widths of the box.
        query_outside: (m,) the same of the query, empty without one.
        query_distance: (m,) from each query to the nearest row, in widths of the box.
    """

    p_value: float
    verdict: str
    reason: str
    p_values: dict[str, float]
    z: Tensor
    pit: Tensor
    row: int
    outside: Tensor
    query_outside: Tensor
    query_distance: Tensor

    def __repr__(self) -> str:
        return f"Check({self.verdict!r}, p_value={self.p_value:.3g}, reason={self.reason!r})"


def draw_null(
    pfn: PFN,
    observed: DataSets,
    own: FromContext,
    first: int,
    draws: int,
    generator: torch.Generator,
) -> DataSets:
    """Data sets of the prior, mapped as the observed one was to the units of the network.

    A given latent is taken for one in the prior's units as the network sees it. Where the context
    sets the units of y, these are those of the data set, so that p-values are uniform about, not
    exactly.

    Their inputs are those observed where the prior has `sample_at`, and else its own.

    Args:
        own: which units the observed context set itself, by its points up to `first`.

    Raises:
        ValueError: a model of curves or without its prior, or a given latent that is no field of
            the prior's.
    """
    if pfn.card.architecture.causal:
        raise ValueError(
            f"Expected a model of points in any order; {pfn.card.name!r} reads curves, whose points"
            " have one."
        )
    if pfn.prior is None:
        raise ValueError(
            f"Expected a model that knows its prior; {pfn.card.name!r} does not. For a prior of"
            " your own, pfn.load(path, prior=my_prior)."
        )
    n, d = observed.x.shape[1:]
    known = {} if observed.known is None else pfn.read_known(observed.known[0], d)
    given = {name: value.squeeze().tolist() for name, value in known.items()}
    prior = with_latents(pfn.prior, given, d)
    if isinstance(prior, PriorAtInputs):
        x = observed.x.double().expand(draws, -1, -1)
        y = prior.sample_at(x, generator=generator)
    else:
        drawn = prior.sample(draws, n, d, generator=generator)
        x, y = drawn.x, drawn.y
    context = x[:, :first], y[:, :first]
    units = context_units(*context) if own.y else prior_units(*context)
    if not own.x:
        units = prior_units(*context)._replace(y_shift=units.y_shift, y_scale=units.y_scale)
    slots, dtype = pfn.read_given(given or None, units, d), observed.y.dtype
    slots = None if slots is None else slots.to(dtype)
    return DataSets(units.map_x(x).to(dtype), units.map_y(y).to(dtype), slots)


def with_latents(prior: Prior, given: Mapping[str, Any], d: int) -> Prior:
    """The prior of tasks of d features whose latents are given: numbers, or indices of choices."""
    if not given:
        return prior
    fields: Any = dataclasses.fields(cast(Any, prior)) if is_dataclass(prior) else ()
    own = [field.name for field in fields]
    varied = [
        name
        for name, value in given.items()
        if name not in own
        or isinstance(value, list)
        or (isinstance(value, int) and not isinstance(getattr(prior, name), tuple | list))
    ]
    if varied:
        raise ValueError(
            f"Expected given latents that are fields of the prior, one number each, to check a"
            f" context; got {varied} of {type(prior).__name__}."
        )
    scaled = prior.hyperparameters(d) if isinstance(prior, KernelPrior) else ()
    factors = {each.name: each.factor for each in scaled}
    values = {}
    for name, value in given.items():
        is_choice = isinstance(value, int)
        values[name] = getattr(prior, name)[value] if is_choice else value / factors.get(name, 1.0)
    return cast(Prior, dataclasses.replace(cast(Any, prior), **values))


def judge(
    network: Network,
    observed: DataSets,
    draw: Callable[[int], DataSets],
    draws: int,
    where: tuple[Tensor, Tensor],
    generator: torch.Generator,
    names: Sequence[str] | None = None,
) -> Check:
    """The check of one data set against those of the prior.

    Args:
        draw: gives as many data sets of the prior as it is told.
        draws: of these, at most.
        where: its rows (n, d) and queries (m, d), beyond the network's reach as well.
        names: of the features, for words; their numbers by default.
    """
    few = max(LEAST_DRAWS, draws // 5)
    null = draw(few)
    assert isinstance(network, Transformer)  # `draw_null` refuses others
    ours = statistics(network, observed, generator)
    values = torch.cat([ours.values, statistics(network, null, generator).values])
    p_value, each = rank(values)
    if p_value <= CLEAR and draws > few:
        more = statistics(network, draw(draws - few), generator).values
        p_value, each = rank(torch.cat([values, more]))
    z = ours.z[0].cpu()
    row = int(z.abs().argmax())
    words = list(IN_WORDS.values())[int(each.argmin())].format(
        row=row,
        z=float(z[row].abs()),
        feature=int(ours.feature[0]) if names is None else repr(names[int(ours.feature[0])]),
        spread="closer to" if z.square().mean() < 1 else "further from",
    )
    rows, queries = (part.detach().double().cpu() for part in where)
    outside, query_outside = outside_box(rows), outside_box(queries)
    is_conflict = p_value <= LEVEL
    reason = (
        f"These data do not look like the prior's (p = {p_value:.3g}): {words}."
        if is_conflict
        else f"These data look like the prior's (p = {p_value:.2g})."
    )
    far = int((torch.cat([outside, query_outside]) > FAR).sum())
    if far:
        noun = "input lies" if far == 1 else "inputs lie"
        reason += f" {far} {noun} more than {FAR} widths outside the box that the prior knows."
    return Check(
        p_value,
        "conflict" if is_conflict else "consistent",
        reason,
        dict(zip(IN_WORDS, each.tolist(), strict=True)),
        z,
        torch.special.ndtr(z),
        row,
        outside,
        query_outside,
        torch.cdist(queries, rows).amin(1),
    )


def statistics(network: Transformer, data: DataSets, generator: torch.Generator) -> Statistics:
    """What is compared, of data sets whose rows are first put in random order."""
    order = torch.rand(data.y.shape, generator=generator, device=data.y.device).argsort(1)
    x = data.x.gather(1, order.unsqueeze(-1).expand_as(data.x))
    y = data.y.gather(1, order)
    evidence = one_step_ahead(network, x, y, data.known, growth=GROWTH).sum(1)
    z = left_out(network, x, y, data.known)
    size, square = z.abs(), z.square().mean(1)
    drift = torch.stack([_drift(size, column) for column in x.unbind(-1)], 1)  # (b, d)
    pattern, feature = drift.max(1)
    values = [
        -evidence,
        size.amax(1),
        z.pow(4).mean(1) / square.square(),
        square.log().abs(),
        pattern,
        _likeness(z, x),
    ]
    return Statistics(torch.stack(values, 1), z.gather(1, order.argsort(1)), feature)


def rank(values: Tensor) -> tuple[float, Tensor]:
    """The p-value of the first of exchangeable rows (k, s), and those of its columns (s,)."""
    each = tail_probability(values)
    smallest = each.amin(1)
    return float((smallest <= smallest[0]).double().mean()), each[0]


def tail_probability(values: Tensor) -> Tensor:
    """Of each value of a column (k, s), about the share of values that are as large, (k, s).

    Ranks, but in the largest tenth an exponential law with their median excess, so that values far
    from all others count as further. The same function of all rows, so it keeps them exchangeable.
    """
    shares = (values.unsqueeze(0) >= values.unsqueeze(1)).double().mean(1)
    start = values.quantile(1 - TAIL, dim=0)
    excess = values - start
    typical = excess.where(excess > 0, torch.nan).nanmedian(0).values / math.log(2)
    typical = typical.nan_to_num(1.0).clamp_min(1e-12)
    return torch.where(excess > 0, TAIL * (-excess / typical).exp(), shares)


def _likeness(z: Tensor, x: Tensor) -> Tensor:
    """Mean product of residuals (b, n) with that of the nearest point, over their square, (b,)."""
    apart = torch.cdist(x, x)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    clipped = z.clamp(-CLIP, CLIP)
    return (clipped * clipped.gather(1, apart.argmin(2))).mean(1) / clipped.square().mean(1)


def _drift(size: Tensor, x: Tensor) -> Tensor:
    """How far sums of residuals' sizes (b, n), in order of x, stray from a straight line, (b,).

    Reference: Brown, Durbin and Evans, J. R. Stat. Soc. B 37, 1975, the CUSUM of squares.
    """
    size = size.clamp_max(CLIP).gather(1, x.argsort(1))
    centred = size - size.mean(1, keepdim=True)
    scale = centred.square().sum(1).sqrt().clamp_min(torch.finfo(size.dtype).tiny)
    return centred.cumsum(1).abs().amax(1) / scale


def outside_box(x: Tensor) -> Tensor:
    """How far x (n, d) lies outside the unit box, (n,), in its widths: 0 inside."""
    return torch.maximum(-x, x - 1).clamp_min(0).square().sum(-1).sqrt()
