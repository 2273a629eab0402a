"""What data say about a Pyro program: draws of its latents by NUTS, and what they predict.

The density of the latents is written in unconstrained coordinates, mapped over tasks and chains
with `torch.vmap`, and explored by the sampler in `nuts.py`, all chains of all tasks at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    biject_to,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from priors import nuts
from priors.distributions import MixtureOf
from priors.pyro_runs import (
    Model,
    Recorder,
    parameters_at,
    pointwise,
    private_draws,
    run,
    run_all,
)
from priors.reference import NutsPosterior


class Target(NamedTuple):
    """The posterior densities of tasks of one shape, in unconstrained coordinates t (dim,)."""

    model: Model
    x: Tensor  # (task, point, dim), the observed points first
    y: Tensor  # (task, observed)
    shapes: dict[str, torch.Size]  # of the coordinates of each latent
    is_mapped: bool

    @property
    def dim(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def density(self, task: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log p(t, y) (row,) of tasks (row,) at t (row, dim), and the gradient (row, dim)."""
        gradient = torch.func.grad_and_value(self._at, argnums=2, has_aux=True)
        gradients, (values, _) = self._each(gradient, task, t)
        return values, gradients

    def values(self, task: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(t, y) (row,) and the latents (row, ...) there."""
        return self._each(self._at, task, t)

    def draw(self, settings: nuts.Settings, seed: int) -> list[nuts.Draws]:
        """Draws of each task, with a warning where chains have not converged."""
        tasks, chains = len(self.y), settings.chains
        if self.dim == 0:
            nothing = self.y.new_zeros(chains, settings.draws)
            return tasks * [nuts.Draws(nothing.unsqueeze(-1)[..., :0], nothing > 0, nothing)]
        density = self._traced(tasks * chains) if self.is_mapped else self.density
        draws = nuts.sample_torch(density, tasks, self.dim, seed=seed, settings=settings)
        for each in draws:
            failed = int(each.divergent.sum())
            if not each.r_hat <= 1.1 or failed > 0.05 * chains * settings.draws:
                warnings.warn(
                    f"NUTS has not converged: R-hat {each.r_hat:.2f}, {each.ess:.0f} effective "
                    f"draws, {failed} divergences of {chains * settings.draws}.",
                    stacklevel=4,
                )
        return draws

    def _traced(self, rows: int) -> nuts.Density:
        """`density` of so many rows as a flat list of operations, without Pyro and vmap."""

        def density(task: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.density(task, t)

        start = self.x.new_zeros(rows, self.dim)
        traced: nuts.Density = make_fx(density)(torch.zeros(rows, dtype=torch.long), start)
        return traced

    def _each(self, function: Callable[..., Any], task: Tensor, t: Tensor) -> Any:
        rows = self.x[task], self.y[task], t
        with pyro.validation_enabled(False):
            if self.is_mapped:
                return torch.vmap(function)(*rows)
            answers = [function(*row) for row in zip(*rows, strict=True)]
        return pytree.tree_map(lambda *parts: torch.stack(parts), *answers)

    def _at(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(t, y | x) () and the latents, of one task."""
        parts = t.split([shape.numel() for shape in self.shapes.values()])
        coordinates = zip(self.shapes.items(), parts, strict=True)
        conditioned = _Conditioned({k: part.reshape(shape) for (k, shape), part in coordinates}, y)
        with conditioned:
            self.model(x)
        return conditioned.log_density, conditioned.latents


def target(model: Model, x: Tensor, y: Tensor) -> Target:
    """The densities given the first observations y (task, observed) at x (task, point, dim).

    Raises:
        ValueError: discrete latents; observations that are impossible, or not independent given the
            latents; randomness besides `pyro.sample`.
    """
    recorder = Recorder({})
    recorder.run(model, x[0])
    _check_observations(model, x[0], y, recorder)
    laws = {name: recorder.laws[name] for name in recorder.latents}
    discrete = [name for name, law in laws.items() if law.support.is_discrete]
    if discrete:
        raise ValueError(f"Expected continuous latents for a posterior; {discrete} are discrete.")
    pointwise(recorder.laws["y"])
    shapes = {
        name: biject_to(law.support).inv(recorder.latents[name]).shape for name, law in laws.items()
    }
    mapped = Target(model, x, y, shapes, is_mapped=True)
    start = x.new_zeros(len(y), mapped.dim)
    try:
        mapped.density(torch.arange(len(y)), start)
    except Exception as error:  # of many kinds, by what cannot be mapped
        warnings.warn(
            f"The density is computed task by task, because mapping it fails: {error}", stacklevel=5
        )
        return mapped._replace(is_mapped=False)  # errors of the program itself come again
    return mapped


def _check_observations(model: Model, x: Tensor, y: Tensor, first: Recorder) -> None:
    """Raises a ValueError if y cannot have been observed, or draws hide from `pyro.sample`."""
    again = Recorder(first.latents)
    again.run(model, x)
    laws = [pointwise(recorder.laws["y"]) for recorder in (first, again)]
    y_any = laws[0].sample()
    if not torch.equal(*(law.log_prob(y_any) for law in laws)):
        raise ValueError("Expected a program that draws by pyro.sample alone; y's law changed.")
    seen = slice(y.shape[1])
    law = laws[0]
    if law.batch_shape[0] > y.shape[1]:
        law = type(law)(**parameters_at(law, seen), validate_args=False)
    if not bool(law.support.check(y).all()):
        raise ValueError(
            f"Expected y in the support of {type(law).__name__}; "
            f"got values from {float(y.min()):g} to {float(y.max()):g}."
        )


def draw_latents(
    model: Model, x: Tensor, y: Tensor, settings: nuts.Settings, seed: int
) -> dict[str, Tensor]:
    """Posterior draws of all latents, (task, chain * draw, ...) each; of the prior without data."""
    tasks, count = len(x), settings.chains * settings.draws
    with private_draws(seed, x.device):
        if y.shape[1] == 0:
            x = x if x.shape[1] else x.new_full((tasks, 1, x.shape[2]), 0.5)
            latents = run_all(model, x.repeat_interleave(count, 0)).latents
        else:
            density = target(model, x, y)
            t = torch.cat([draws.t.flatten(0, 1) for draws in density.draw(settings, seed)])
            latents = density.values(torch.arange(tasks).repeat_interleave(count), t)[1]
    return {name: value.unflatten(0, (tasks, count)) for name, value in latents.items()}


def log_evidence(model: Model, x: Tensor, y: Tensor, settings: nuts.Settings, seed: int) -> Tensor:
    """log p(y | x) in nats (task,), by bridge sampling from draws of NUTS."""
    if y.shape[1] == 0:
        return x.new_zeros(len(x))
    with private_draws(seed, x.device):
        density = target(model, x, y)
        if density.dim == 0:
            return density.values(torch.arange(len(x)), x.new_zeros(len(x), 0))[0]
        values = []
        for task, draws in enumerate(density.draw(settings, seed)):

            def log_density(t: Tensor, task: int = task) -> Tensor:
                return density.values(torch.full((len(t),), task), t)[0]

            values.append(nuts.bridge_log_evidence(log_density, draws.t, seed=seed).value)
    return x.new_tensor(values)


def predict(
    model: Model,
    x: Tensor,
    y: Tensor,
    query: Tensor,
    settings: nuts.Settings,
    seed: int,
    *,
    latent: bool,
    joint: bool,
) -> list[Distribution]:
    """The posterior predictive of each task at its queries (task, m, dim)."""
    both, observed = torch.cat([x, query], 1), x.shape[1]
    with private_draws(seed, x.device):
        alone, joined = run(model, query[0]).latents, run(model, both[0]).latents
    is_local = any(joined[name].shape != value.shape for name, value in alone.items())
    if observed and is_local:  # latents of single points: those of queries are drawn along
        latents, at = draw_latents(model, both, y, settings, seed), both
    else:
        latents, at = draw_latents(model, x if observed else query, y, settings, seed), query
    first = at.shape[1] - query.shape[1]
    answers: list[Distribution] = []
    for task, points in enumerate(at):
        given = {name: value[task] for name, value in latents.items()}
        with private_draws(seed, x.device):
            y_law, f = _given_draws(model, points, given, first, settings, joint)
        answers.append(_smoothed(f, settings.chains) if latent else y_law)
    return answers


class ProgramPosterior(MixtureOf):
    """An even mixture over the draws of all chains, each of its own kind, that knows its error."""

    def __init__(self, components: list[Distribution], chains: int) -> None:
        axes = [1] * len(components[0].batch_shape)
        super().__init__(torch.zeros(len(components), *axes, dtype=torch.float64), components)
        self._blocks = chains * NutsPosterior.blocks

    def log_prob_error(self, value: Tensor) -> Tensor:
        """The standard error of `log_prob(value)` in nats, from batch means."""
        log_densities = torch.stack([part.log_prob(value) for part in self.components])
        ratio = (log_densities - self.log_prob(value)).exp()
        means = ratio.unflatten(0, (self._blocks, -1)).mean(1)
        return means.std(0) / math.sqrt(len(means))


class _Conditioned(Messenger):
    """Gives latents their values from coordinates, observes y, adds up the log density."""

    def __init__(self, coordinates: dict[str, Tensor], y: Tensor) -> None:
        super().__init__()
        self.coordinates, self.y = coordinates, y
        self.log_density = y.new_zeros(())
        self.latents: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, law = msg["name"], msg["fn"]
        if name == "y":
            unseen = pointwise(law).batch_shape[0] - len(self.y)
            msg["value"], msg["is_observed"] = torch.cat([self.y, self.y.new_zeros(unseen)]), True
        elif name in self.coordinates:
            bijection, free = biject_to(law.support), self.coordinates[name]
            msg["value"] = self.latents[name] = bijection(free)
            self.log_density = (
                self.log_density + bijection.log_abs_det_jacobian(free, msg["value"]).sum()
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        law, value, mask = msg["fn"], msg["value"], msg["mask"]
        if msg["name"] == "y":
            law, value, seen = pointwise(law), self.y, slice(len(self.y))
            if law.batch_shape[0] > len(value):
                law = type(law)(**parameters_at(law, seen), validate_args=False)
                mask = mask[seen] if isinstance(mask, Tensor) and mask.dim() else mask
        density = scale_and_mask(law.log_prob(value), msg["scale"], mask)
        self.log_density = self.log_density + density.sum()


def _given_draws(
    model: Model,
    x: Tensor,
    latents: dict[str, Tensor],
    first: int,
    settings: nuts.Settings,
    joint: bool,
) -> tuple[Distribution, Tensor]:
    """The law of y at the points after the first, and f (draw, m), given draws of the latents."""
    count, after = settings.chains * settings.draws, slice(first, None)
    kinds: list[Any] = []

    def one(values: dict[str, Tensor]) -> tuple[Any, Tensor]:
        recorder = Recorder(values | {"y": x.new_zeros(len(x))})  # which nobody looks at
        f = recorder.run(model, x).f
        return pointwise(recorder.laws["y"]), f[after].double()

    def mapped(draw: Tensor, values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        law, f = one(values)
        kinds.append(type(law))
        return parameters_at(law, after), f

    try:
        with pyro.validation_enabled(False):  # a program may have no latents: hence the numbers
            parameters, f = torch.vmap(mapped)(torch.arange(count), latents)
        if joint:
            law = Independent(kinds[0](**parameters, validate_args=False), 1)  # (draw,)
            return MixtureSameFamily(_even(count), law, validate_args=False), f
        swapped = {name: value.transpose(0, 1) for name, value in parameters.items()}
        law = kinds[0](**swapped, validate_args=False)  # (m, draw)
        return NutsPosterior(_even(f.shape[1], count), law, settings.chains, f.new_zeros(1)), f
    except Exception as error:  # as in `target`
        warnings.warn(
            f"Draws predict one by one, because mapping them fails: {error}", stacklevel=4
        )
        runs = [one({name: value[i] for name, value in latents.items()}) for i in range(count)]
        laws = [
            type(law)(**parameters_at(law, after), validate_args=False) if first else law
            for law, _ in runs
        ]
        laws = [Independent(law, 1) for law in laws] if joint else laws
        return ProgramPosterior(laws, settings.chains), torch.stack([f for _, f in runs])


def _smoothed(f: Tensor, chains: int) -> NutsPosterior:
    """Draws of f (draw, m) as an even mixture of normals of their mean and variance.

    Reference: West, Approximating posterior distributions by mixtures, JRSS B 55, 1993, section 2.
    """
    mean, variance = f.mean(0), f.var(0, correction=0)
    bandwidth = 1.06 * len(f) ** -0.2  # relative to the deviation: Silverman's rule
    centers = mean + math.sqrt(1 - bandwidth**2) * (f - mean)
    deviation = bandwidth * variance.sqrt().clamp_min(1e-10 * (1 + mean.abs()))
    component = Normal(centers.T, deviation.unsqueeze(-1).expand(centers.T.shape))
    return NutsPosterior(_even(*centers.T.shape), component, chains, f.new_zeros(1))


def _even(*shape: int) -> Categorical:
    return Categorical(logits=torch.zeros(shape, dtype=torch.float64))
