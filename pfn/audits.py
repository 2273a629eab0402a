"""What a certificate measures of a network besides its gap, coverage and speed.

- `coherence`: do its predictives belong to one model? A martingale test, the spread of the evidence
  over orders of the same data, and what points lose that wait behind a context instead of in it.
- `conflict`: false alarms of the check against the prior, on the prior's own data.
- `latents`: simulation-based calibration of their posterior marginals.
- `joint`, `evidence`, `given`: joint draws, evidence and answers with known latents beside exact
  ones, of one feature, where the prior has these within seconds.

Tasks come from the prior, in its own units, and are functions of the seed; those of `conflict` are
standardised by their context. Read `certify.py` first, which calls these, and `reliability.py`
next, which draws what they found.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

from pfn.coherence import exchangeability, martingale_test
from pfn.conflict import LEVEL
from pfn.diagnostics import ecdf_test, randomized_pit
from pfn.evidence import DataSets, chain_rule, predict_points
from pfn.fresh_tasks import Progress, Report, draw_tasks, named_generator
from pfn.model import PFN, Fitted
from priors import Prior

POINTS = 12  # of a joint draw
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the quantiles that the martingale test probes
SIZES = (5, 20, 60)  # context points
ADDED = 20  # points behind a context, whose loss is measured
CHECKED = (8, 60)  # context points of the data sets on which `check` is calibrated
BINS = 50  # of values on [0, 1] that a figure shows


@dataclass(frozen=True)
class AuditSizes:
    """How many tasks and draws are behind each audit."""

    joint_tasks: int = 200
    joint_draws: int = 4096
    evidence_tasks: int = 100
    evidence_points: int = 50
    orders: int = 4
    martingale_tasks: int = 200
    martingale_draws: int = 64
    conflict_tasks: int = 2000
    conflict_draws: int = 39  # data sets of the prior behind each check
    latent_tasks: int = 1000
    given_tasks: int = 60  # of each context size


def default_sizes(max_features: int) -> AuditSizes:
    """More tasks for a network of one feature, whose exact posteriors are quick."""
    if max_features == 1:
        return AuditSizes()
    return AuditSizes(
        joint_tasks=30,
        evidence_tasks=50,
        martingale_tasks=100,
        conflict_tasks=500,
        latent_tasks=500,
        given_tasks=20,
    )


def audit(pfn: PFN, prior: Prior, sizes: AuditSizes, seed: int, report: Report) -> dict[str, Any]:
    """All audits that apply, by name, as numbers; None in place of those that do not.

    A network of curves has none: its rows have one order, and it knows no latents.
    """
    names = ("coherence", "conflict", "latents", "joint", "evidence", "given")
    if pfn.card.architecture.causal:
        return dict.fromkeys(names)
    known: Any = prior
    is_quick = hasattr(prior, "posterior_is_quick") and known.posterior_is_quick(1)
    found: dict[str, Any] = dict.fromkeys(names)
    found["coherence"] = coherence(pfn, prior, sizes, seed, report)
    found["conflict"] = conflict(pfn, prior, sizes, seed, report)
    if pfn.card.architecture.latents:
        found["latents"] = latents(pfn, prior, sizes, seed, report)
    if is_quick:
        takes = inspect.signature(known.posterior).parameters
        if "joint" in takes and _knows_joint(known, seed):
            found["joint"] = joint(pfn, known, sizes, seed, report)
        if hasattr(known, "log_evidence"):
            found["evidence"] = evidence(pfn, known, sizes, seed, report)
        if "given" in takes:
            found["given"] = given(pfn, known, sizes, seed, report)
    return found


def _knows_joint(prior: Any, seed: int) -> bool:
    """Whether joint posteriors are mixtures of normals."""
    task = draw_tasks(prior, 3, 1, tasks=1, queries=2, seed=seed, purpose="kind of posterior")
    return _Joint.fits(prior.posterior((task.x[0], task.y[0]), task.x_query[0], joint=True))


def coherence(
    pfn: PFN, prior: Prior, sizes: AuditSizes, seed: int, report: Report
) -> dict[str, Any]:
    """The martingale test, exchangeability, and the loss of a buffer, in nats per point."""
    return {
        "martingale": martingale(pfn, prior, sizes, seed, report),
        "exchangeability": order_spread(pfn, prior, sizes, seed, report),
        "buffer": buffer_loss(pfn, prior, sizes, seed, report),
    }


def martingale(
    pfn: PFN, prior: Prior, sizes: AuditSizes, seed: int, report: Report
) -> dict[str, Any]:
    """Does the predictive equal its average over what one simulated observation makes of it?"""
    before, after = [], []
    for i in range(sizes.martingale_tasks):
        n, d = _size(pfn, i)
        task = draw_tasks(prior, n, d, tasks=1, queries=2, seed=seed, first=i, purpose="martingale")
        fitted = pfn.condition((task.x[0], task.y[0]), standardize=False)
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        near = task.x_query[0, :1]
        probe = near + 0.1 * (task.x_query[0, 1:] - near)  # near, where an observation tells most
        thresholds = fitted.predict(probe).icdf(levels)
        y = fitted.predict(near).sample(
            (sizes.martingale_draws,), generator=_generator(seed, "martingale", i)
        )
        added = fitted.extend(near.expand(len(y), 1, d), y)
        updated = added.predict(probe.expand(len(y), 1, d))
        after.append(updated.cdf(thresholds.expand(len(y), -1)))
        before.append(levels)
        report(Progress("martingale", i + 1, sizes.martingale_tasks))
    test = martingale_test(torch.stack(before), torch.stack(after, 1))
    return {"tasks": len(before), "draws": sizes.martingale_draws, **test._asdict()}


def order_spread(
    pfn: PFN, prior: Prior, sizes: AuditSizes, seed: int, report: Report
) -> dict[str, Any]:
    """How much the log evidence depends on the order of the points, in nats per point."""
    n, d = min(sizes.evidence_points, pfn.card.max_context), min(5, pfn.card.d_range[1])
    task = _whole(pfn, prior, n, d, sizes.evidence_tasks, seed, "order")
    each = _chain(pfn, task, sizes.orders, seed)
    report(Progress("orders", 1, 1))
    test = exchangeability(each.T, n)
    return {"n": n, "d": d, "tasks": sizes.evidence_tasks, "orders": sizes.orders} | test._asdict()


def buffer_loss(
    pfn: PFN, prior: Prior, sizes: AuditSizes, seed: int, report: Report
) -> dict[str, Any]:
    """What predictives lose, in nats, where points wait behind a context instead of being in it."""
    n, d, added = min(20, pfn.card.max_context // 2), min(5, pfn.card.d_range[1]), ADDED
    data = _whole(pfn, prior, n + added, d, sizes.evidence_tasks, seed, "buffer")
    context, rest = (data.x[:, :n], data.y[:, :n], None), (data.x[:, n:], data.y[:, n:])
    with torch.inference_mode():
        behind = predict_points(pfn.transformer, *context, *rest, one_by_one=True)
        within = []
        for k in range(n, n + added):
            prefix, point = (
                (data.x[:, :k], data.y[:, :k]),
                (data.x[:, k : k + 1], data.y[:, k : k + 1]),
            )
            within.append(predict_points(pfn.transformer, *prefix, None, *point))
            report(Progress("buffer", k - n + 1, added))
    loss = (torch.cat(within, 1) - behind).mean(1).cpu()
    return {"n": n, "added": added, "d": d} | _mean_of(loss)


def conflict(
    pfn: PFN, prior: Prior, sizes: AuditSizes, seed: int, report: Report
) -> dict[str, Any]:
    """How often `check` says of the prior's own data sets that they conflict with it."""
    p_values = []
    for i in range(sizes.conflict_tasks):
        n, d = _size(pfn, i)
        n = min(max(n, CHECKED[0]), CHECKED[1])
        task = draw_tasks(prior, n, d, tasks=1, queries=0, seed=seed, first=i, purpose="conflict")
        fitted = pfn.condition((task.x[0], task.y[0]))
        p_values.append(fitted.check(draws=sizes.conflict_draws, seed=i).p_value)
        report(Progress("conflict", i + 1, sizes.conflict_tasks))
    values = torch.tensor(p_values, dtype=torch.float64)
    rate = _mean_of(values <= LEVEL)
    return {
        "level": LEVEL,
        "tasks": len(values),
        "draws": sizes.conflict_draws,
        "false_alarms": rate["mean"],
        "standard_error": rate["standard_error"],
        "histogram": histogram(values),
    }


def latents(
    pfn: PFN, prior: Prior, sizes: AuditSizes, seed: int, report: Report
) -> list[dict[str, Any]]:
    """Simulation-based calibration of each latent's marginal: is the truth's cdf uniform?"""
    found: dict[str, list[Tensor]] = {}
    for i in range(sizes.latent_tasks):
        n, d = _size(pfn, i)
        generator = _generator(seed, "latents", i)
        drawn = prior.sample(1, n, d, generator=generator)
        marginals = pfn.condition((drawn.x[0], drawn.y[0]), standardize=False).latents()
        for name, marginal in marginals.items():
            pit = _pit(marginal, drawn.latents[name][0], generator)
            one = pit.flatten()[torch.randint(pit.numel(), (), generator=generator)]
            found.setdefault(name, []).append(one)
        report(Progress("latents", i + 1, sizes.latent_tasks))
    rows: list[dict[str, Any]] = []
    for name, values in found.items():
        pit = torch.stack(values).clamp(0, 1)
        test = ecdf_test(pit)._asdict()
        rows.append({"latent": name, "tasks": len(pit), **test, "histogram": histogram(pit)})
    return rows


def joint(
    pfn: PFN, prior: Any, sizes: AuditSizes, seed: int, report: Report
) -> list[dict[str, Any]]:
    """Covariances of joint draws beside exact ones, and the log density of held-out pairs.

    "error" is the Frobenius norm of the difference of covariances over that of the exact one, and
    "exact_draws" the same of as many exact draws: what chance alone would give. "pair_gap" is in
    nats per pair: log p(y_1, y_2) less the network's, by the chain rule.
    """
    rows: dict[tuple[int, bool], list[tuple[float, ...]]] = {}
    within = _sizes_within(pfn)
    for i in range(sizes.joint_tasks):
        n = within[i % len(within)]
        task = draw_tasks(prior, n, 1, tasks=1, queries=POINTS, seed=seed, first=i, purpose="joint")
        x, y, x_query, y_query = (part[0] for part in task)
        fitted = pfn.condition((x, y), standardize=False)
        kinds = False, True
        every = fitted.draw(x_query, sizes.joint_draws, kinds, seed=i)
        for latent, paths in zip(kinds, every, strict=True):
            exact = _Joint.of(prior.posterior((x, y), x_query, latent=latent, joint=True))
            draws = exact.sample(sizes.joint_draws, _generator(seed, "joint", i))
            pair_gap = math.nan if latent else _pair_gap(fitted, exact, x_query, y_query)
            found = exact.error_of(paths), exact.error_of(draws), pair_gap
            rows.setdefault((n, latent), []).append(found)
        report(Progress("joint draws", i + 1, sizes.joint_tasks))
    table = []
    for (n, latent), values in sorted(rows.items()):
        error, chance, pair = torch.tensor(values).T
        row: dict[str, Any] = {"n": n, "latent": latent, "tasks": len(values)}
        row["draws"] = sizes.joint_draws
        row |= {f"error_{key}": value for key, value in _mean_of(error).items()}
        row["error_median"] = float(error.median())
        row["exact_draws"] = float(chance.mean())
        if not latent:
            row |= {f"pair_gap_{key}": value for key, value in _mean_of(pair).items()}
        table.append(row)
    return table


def _pair_gap(fitted: Fitted, exact: _Joint, x_query: Tensor, y_query: Tensor) -> float:
    """log p(y_1, y_2) less the network's, by the chain rule, of the first two queries."""
    first = fitted.predict(x_query[:1]).log_prob(y_query[:1])
    added = fitted.extend(x_query[:1], y_query[:1])
    second = added.predict(x_query[1:2]).log_prob(y_query[1:2])
    return float(exact.log_prob_of_pair(y_query[:2]) - first - second)


def evidence(pfn: PFN, prior: Any, sizes: AuditSizes, seed: int, report: Report) -> dict[str, Any]:
    """The log evidence less the exact one, in nats per point."""
    n = min(sizes.evidence_points, pfn.card.max_context)
    errors = []
    for i in range(sizes.evidence_tasks):
        task = draw_tasks(prior, n, 1, tasks=1, queries=0, seed=seed, first=i, purpose="evidence")
        fitted = pfn.condition((task.x[0], task.y[0]), standardize=False)
        ours = fitted.log_evidence(orders=sizes.orders, seed=i)
        exact = prior.log_evidence((task.x[0], task.y[0]))
        errors.append(float(ours - exact) / n)
        report(Progress("evidence", i + 1, sizes.evidence_tasks))
    error = torch.tensor(errors)
    summary = {"n": n, "tasks": len(errors), "orders": sizes.orders} | _mean_of(error)
    return summary | {
        "root_mean_square": float(error.square().mean().sqrt()),
        "worst": float(error.abs().max()),
    }


def given(
    pfn: PFN, prior: Any, sizes: AuditSizes, seed: int, report: Report
) -> list[dict[str, Any]]:
    """The gap where the user knows a task's true noise, in nats per query, beside the whole gap."""
    if "noise" not in [latent.name for latent in pfn.card.architecture.latents]:
        return []
    table = []
    for n in _sizes_within(pfn):
        known: list[float] = []
        unknown: list[float] = []
        for i in range(sizes.given_tasks):
            drawn = prior.sample(1, n + 16, 1, generator=_generator(seed, f"given/{n}", i))
            x, y, x_query, y_query = drawn.x[0], drawn.y[0, :n], drawn.x[0, n:], drawn.y[0, n:]
            context = x[:n], y
            for options, gaps in (({"noise": drawn.latents["noise"][0]}, known), ({}, unknown)):
                exact = prior.posterior(context, x_query, given=options or None)
                ours = pfn.predict(context, x_query, given=options or None, standardize=False)
                gaps.append(float((exact.log_prob(y_query) - ours.log_prob(y_query)).mean()))
            report(Progress(f"known noise, n = {n}", i + 1, sizes.given_tasks))
        row: dict[str, Any] = {"n": n, "tasks": len(known), "given": "noise"}
        row |= _mean_of(torch.tensor(known))
        row |= {f"unknown_{key}": value for key, value in _mean_of(torch.tensor(unknown)).items()}
        table.append(row)
    return table


def histogram(values: Tensor) -> list[int]:
    """Counts of values on [0, 1], in `BINS` equal parts."""
    counts = torch.histc(values.double(), BINS, 0.0, 1.0)
    return [int(count) for count in counts]


def in_words(certificate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What audits and latency found, where it is one number each: names and values."""
    lines = []
    if certificate["coherence"]:
        test = certificate["coherence"]["martingale"]
        value = f"{test['discrepancy']:.4f}, by chance {test['null_level']:.4f}"
        value += f"; p = {test['p_value']:.2g}"
        lines.append(("Martingale: change of the mean cdf", value))
        test = certificate["coherence"]["exchangeability"]
        value = f"{test['spread']:.4f} nats per point at n = {test['n']}"
        lines.append(("Order of points: spread of the log evidence", value))
        test = certificate["coherence"]["buffer"]
        value = f"{test['mean']:.4f} ± {test['standard_error']:.4f} nats per point"
        lines.append(("Loss of points behind the context", value))
    if certificate["joint"]:
        errors = {
            row["n"]: 100 * row["error_mean"] for row in certificate["joint"] if row["latent"]
        }
        value = ", ".join(f"{error:.0f} % at n = {n}" for n, error in errors.items())
        lines.append(("Covariance of drawn functions, Frobenius error", value))
    if certificate["evidence"]:
        test = certificate["evidence"]
        value = f"mean {test['mean']:.4f}, root mean square {test['root_mean_square']:.4f}"
        lines.append((f"Log evidence less exact, nats per point, n = {test['n']}", value))
    if certificate["conflict"]:
        test = certificate["conflict"]
        value = f"{100 * test['false_alarms']:.1f} ± {100 * test['standard_error']:.1f} %"
        lines.append((f"False alarms of check(), {test['tasks']} data sets", value))
    seconds = certificate["latency"]["predict_seconds"]
    words = "predict, n = {n}, {m} queries, {threads} thread(s)".format(**certificate["latency"])
    lines.append((words, f"{1000 * seconds:.1f} ms"))
    return lines


class _Joint(NamedTuple):
    """Joint normals, mixed. Torch can draw few values of such a mixture: it draws of all parts."""

    weights: Tensor  # (k,)
    means: Tensor  # (k, m)
    covariances: Tensor  # (k, m, m)

    @staticmethod
    def fits(posterior: Any) -> bool:
        """Whether a posterior is one."""
        return isinstance(
            getattr(posterior, "component_distribution", posterior), MultivariateNormal
        )

    @classmethod
    def of(cls, posterior: Any) -> _Joint:
        if isinstance(posterior, MultivariateNormal):
            parts = posterior.mean, posterior.covariance_matrix
            return cls(torch.ones_like(parts[0][:1]), *(part.unsqueeze(0) for part in parts))
        each = posterior.component_distribution
        weights = posterior.mixture_distribution.probs
        return cls(weights, each.mean, each.covariance_matrix)

    @property
    def covariance(self) -> Tensor:
        spread = self.means - (self.weights.unsqueeze(-1) * self.means).sum(0)
        within = (self.weights[:, None, None] * self.covariances).sum(0)
        return within + (self.weights.unsqueeze(-1) * spread).mT @ spread

    def sample(self, draws: int, generator: torch.Generator) -> Tensor:
        part = torch.multinomial(self.weights, draws, replacement=True, generator=generator)
        used, index = part.unique(return_inverse=True)
        ridge = 1e-12 * torch.eye(self.means.shape[1], dtype=self.means.dtype)
        factors = torch.linalg.cholesky(self.covariances[used] + ridge)[index]
        z = torch.randn(draws, self.means.shape[1], 1, dtype=self.means.dtype, generator=generator)
        return self.means[part] + (factors @ z).squeeze(-1)

    def error_of(self, draws: Tensor) -> float:
        """Frobenius norm of what the covariance of draws (s, m) is off, over that of the exact."""
        return float((torch.cov(draws.T) - self.covariance).norm() / self.covariance.norm())

    def log_prob_of_pair(self, y: Tensor) -> Tensor:
        """Of the first two points, y (2,)."""
        normal = MultivariateNormal(self.means[:, :2], self.covariances[:, :2, :2])
        return (self.weights.log() + normal.log_prob(y)).logsumexp(0)


def _pit(marginal: Any, truth: Tensor, generator: torch.Generator) -> Tensor:
    """The marginal's cdf at the truth, () or (d,); at random within the jump of a category's."""
    if not isinstance(marginal, Categorical):
        return cast(Tensor, marginal.cdf(truth.to(marginal.mean)))
    probs = marginal.probs.double().cpu()
    above = probs.cumsum(-1).clamp_max(1)[truth.long()]
    below = above - probs[truth.long()]
    return randomized_pit(above, below.clamp_min(0), generator=generator)


def _size(pfn: PFN, i: int) -> tuple[int, int]:
    """Context points, log-uniform over what was trained, and features, uniform, of task i."""
    place = (i * 0.6180339887) % 1  # spreads evenly, whatever the number of tasks
    n = round((pfn.card.max_context + 1) ** place) - 1
    return max(n, 1), 1 + i % pfn.card.d_range[1]


def _sizes_within(pfn: PFN) -> list[int]:
    """Of `SIZES`, those that the network was trained for."""
    return [n for n in SIZES if n <= pfn.card.max_context] or [pfn.card.max_context]


def _whole(pfn: PFN, prior: Prior, n: int, d: int, tasks: int, seed: int, name: str) -> DataSets:
    """Tasks all of whose points are context, in the network's dtype."""
    drawn = draw_tasks(prior, n, d, tasks=tasks, queries=0, seed=seed, purpose=name)
    like = pfn.transformer.embed_query
    return DataSets(drawn.x.to(like), drawn.y.to(like), None)


def _chain(pfn: PFN, data: DataSets, orders: int, seed: int) -> Tensor:
    generator = torch.Generator(data.y.device).manual_seed(seed)
    with torch.inference_mode():
        return chain_rule(pfn.transformer, data, orders, generator).clone().cpu()


def _generator(seed: int, name: str, i: int) -> torch.Generator:
    return named_generator(f"audit/{name}/{seed}/{i}")


def _mean_of(values: Tensor) -> dict[str, float]:
    values = values.double()
    return {
        "mean": float(values.mean()),
        "standard_error": float(values.std()) / math.sqrt(len(values)),
    }
