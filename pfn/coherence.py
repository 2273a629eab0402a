"""Do the predictives of different data sets belong to one Bayesian model?

They do if each is the average of what it would become after one more observation (a martingale) and
if the joint density of a data set does not depend on the order in which it is told (exchangeable).
Both compare a network with itself, which needs neither the truth nor a prior, so that they apply to
real data too. A network that returns the prior is coherent: whether it is right, `diagnostics.py`
asks.

Reference: Fong, Holmes and Walker, Martingale posterior distributions, JRSSB 2023; Falck, Wang and
Holmes, Is in-context learning in large language models Bayesian?, ICML 2024.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny  # a network that ignores observations changes by 0 / TINY


class Martingale(NamedTuple):
    """How far the average of updated predictives is from the predictive, in probability."""

    discrepancy: float  # mean over tasks and probes of |average after - before|
    null_level: float  # what it would be with the same number of draws and no violation
    p_value: float


class Exchangeability(NamedTuple):
    """How much the log joint density of a data set depends on its order, in nats per point."""

    spread: float  # standard deviation over orders, mean over tasks
    standard_error: float  # of that mean
    remaining: float  # standard deviation of an average over as many orders as were given


def martingale_test(before: Tensor, after: Tensor) -> Martingale:
    """A test that E[F(t | D, (x0, y))] = F(t | D) for y ~ P(. | D, x0), at probes t.

    Half of the draws choose for each task a direction v over its probes, in which the average of
    F(t | D, (x0, y)) departs from F(t | D). The other half give independent departures b, whose
    products v b have mean zero if there is no violation, whatever v is and however b is
    distributed. Their sum over tasks over the root of the sum of their squares is compared with a
    standard normal variable; large values reject. Departures that tasks share at a probe are found
    best, because v leans towards their mean over tasks.

    Valid if tasks are independent and the draws of a task are so given its D. Probes may depend on
    each other, several queries are fine; they and x0 may depend on D, not on y. The comparison
    with a normal variable needs some tasks and draws: from 10 tasks of 16 draws on, level 0.05 gave
    false alarms in 0.04 to 0.055 (0.065 with one probe in a tail, up to 0.1 with 8 draws).

    Args:
        before: (task, probe) predictive cdf F(t | D). Let a probe mean the same in each task: a
            level of the quantile that t is.
        after: (draw, task, probe) cdf at the same t, each draw given D and an own simulated y.

    Returns:
        The discrepancy uses all draws. Monte Carlo error alone makes it as large as `null_level`.

    Reference: the product of independent halves is that of Kim and Ramdas, Dimension-agnostic
    inference using cross U-statistics, Bernoulli 2024; the direction shrinks as in James and Stein.
    """
    if before.ndim != 2 or after.shape[1:] != before.shape or len(after) < 4 or not before.numel():
        raise ValueError(
            "Expected before (task, probe) and after (draw, task, probe) with at least 4 draws; got"
            f" {tuple(before.shape)} and {tuple(after.shape)}."
        )
    if not bool(before.isfinite().all() & after.isfinite().all()):
        raise ValueError("Expected finite values of cdfs before and after.")
    change = after.double() - before.double()
    error = change.std(0) / math.sqrt(len(change))
    guide, held_out = change.tensor_split(2)
    size = guide.square().mean((0, 2)).sqrt().clamp_min(TINY).unsqueeze(-1)  # (task, 1)
    products = (_direction(guide / size) * (held_out.mean(0) / size)).sum(-1)
    score = float(products.sum() / torch.linalg.vector_norm(products).clamp_min(TINY))
    return Martingale(
        discrepancy=float(change.mean(0).abs().mean()),
        null_level=math.sqrt(2 / math.pi) * float(error.mean()),  # E|Z| of a normal mean
        p_value=math.erfc(score / math.sqrt(2)) / 2,
    )


def _direction(change: Tensor) -> Tensor:
    """Average changes (task, probe) of (draw, task, probe), each of size 1, shrunk to their mean.

    Without violation, averages spread by 1 / draw around their mean over tasks; what part of their
    spread exceeds this belongs to the task.
    """
    average = change.mean(0)
    common = average.mean(0)
    spread = float((average - common).square().mean())
    own = max(0.0, 1 - 1 / (len(change) * max(spread, TINY)))
    return common + own * (average - common)


def exchangeability(log_joint: Tensor, points: int) -> Exchangeability:
    """How much of log q(y_1, ..., y_n), by the chain rule, is an accident of the order.

    An average of the log densities of K independent random orders has a standard deviation of
    spread / sqrt(K) around the average over all orders. Zero spread makes that average well
    defined, not exact: an error that all orders share is not seen.

    Args:
        log_joint: (task, order) log joint densities in nats, at least 2 tasks and 2 orders.
        points: n, observations in each data set.

    Returns:
        `spread` is corrected for the bias of a standard deviation of few normal values (c4), so
        that it does not depend on K.
    """
    if log_joint.ndim != 2 or min(log_joint.shape) < 2 or points < 1:
        raise ValueError(
            "Expected log_joint (task, order) of at least 2 tasks and 2 orders, and points >= 1;"
            f" got {tuple(log_joint.shape)} and points = {points}."
        )
    if not bool(log_joint.isfinite().all()):
        raise ValueError("Expected finite log joint densities.")
    tasks, orders = log_joint.shape
    bias = math.lgamma(orders / 2) - math.lgamma((orders - 1) / 2) + math.log(2 / (orders - 1)) / 2
    per_task = log_joint.double().std(1) / (points * math.exp(bias))
    spread = float(per_task.mean())
    error = float(per_task.std()) / math.sqrt(tasks)
    return Exchangeability(spread, error, spread / math.sqrt(orders))
