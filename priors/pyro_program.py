"""Any Pyro program as a prior: `from_pyro(model)` samples its tasks and conditions it by NUTS.

The program is an ordinary one, of one data set: `model(x)` takes inputs x (n, d) in float64 and
samples the observations at the site "y" (n,), independent of each other given all else. A batch of
tasks is drawn site by site, each for all tasks at once, by mapping the program over tasks with
`torch.vmap`; a program that cannot be mapped (because Python branches on a draw, say) runs task by
task, with the same law. Read `nuts.py` for the sampler of priors that are not programs.

Needs the extra `reference`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

try:
    import pyro
    from pyro.infer import MCMC, NUTS
    from pyro.infer.mcmc.util import initialize_model
    from pyro.ops.stats import effective_sample_size, split_gelman_rubin
    from pyro.poutine.messenger import Messenger
    from pyro.poutine.util import site_is_subsample
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Programs need Pyro: pip install 'pfn[reference]'.") from error

from priors.context import read_context
from priors.distributions import MixtureOf, StackOf
from priors.inputs import draw_inputs, read_designs
from priors.reference import Marginal, NutsPosterior
from priors.tasks import Tasks

CHAINS = 4
BLOCKS = 10  # per chain, whose means are about independent

Model = Callable[[Tensor], Any]


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
        with _private_draws(seed, generator.device):
            run = _run_all(self.model, x)
            longer = _run(self.model, x.new_full((n + 1, d), 0.5))
        latents: dict[str, Tensor] = {}
        for name, value in (run.latents | run.functions).items():
            other = (longer.latents | longer.functions).get(name)
            if other is not None and other.shape == value.shape[1:]:  # it is of no single point
                latents |= _by_name(name, value, d)
        latents = {name: value[:batch] for name, value in latents.items()}  # none where batch is 0
        return Tasks(x[:batch], run.y[:batch].double(), run.f[:batch].double(), latents)

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
            seed: of NUTS.

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
        x, y, query, batched = read_context(context, x_query)
        seeds = np.random.SeedSequence(seed).generate_state(len(x)).tolist()
        parts: list[Distribution] = []
        for task in zip(x, y, query, seeds, strict=True):
            laws = _predict(self.model, *task, warmup=warmup, draws=draws)
            if latent:
                parts.append(_smoothed(torch.stack([law.f for law in laws])))
            else:
                each = [Independent(law.y, 1) if joint else law.y for law in laws]
                parts.append(DrawsPosterior(each))
        return StackOf(parts) if batched else parts[0]

    def log_evidence(
        self, context: tuple[Any, Any], *, warmup: int = 300, draws: int = 300, seed: int = 0
    ) -> Tensor:
        """log p(y | x) in nats, () or (b,), by bridge sampling from draws of NUTS.

        Args: see `posterior`.
        """
        from priors.nuts import bridge_log_evidence  # on demand: it imports JAX

        x, y, _, batched = read_context(context)
        seeds = np.random.SeedSequence(seed).generate_state(len(x)).tolist()
        values = []
        for inputs, targets, each in zip(x, y, seeds, strict=True):
            if len(targets) == 0:
                values.append(0.0)
                continue
            with _private_draws(each, inputs.device):
                density = _density(self.model, inputs, targets)
                t = density.draw(warmup, draws).t
                if t.shape[-1] == 0:
                    values.append(float(density.log_density(t[0, :1])))
                else:
                    values.append(bridge_log_evidence(density.log_density, t, seed=each).value)
        evidence = torch.tensor(values, dtype=torch.float64)
        return evidence if batched else evidence[0]

    def latent_posterior(
        self, context: tuple[Any, Any], *, warmup: int = 300, draws: int = 300, seed: int = 0
    ) -> dict[str, Marginal]:
        """The posterior marginal of each sampled latent of one task, by its name in `Tasks`.

        Args: see `posterior`; the context is one task.
        """
        x, y, _, batched = read_context(context)
        if batched:
            raise ValueError("Expected one task, x of shape (n, d) or (n,); got a batch of tasks.")
        (each,) = np.random.SeedSequence(seed).generate_state(1).tolist()
        sites = _draw_latents(self.model, x[0], y[0], each, warmup=warmup, draws=draws)
        marginals = {}
        for name, value in sites.items():
            for label, column in _by_name(name, value, x.shape[-1]).items():
                weights = column.new_full((len(column),), 1 / len(column))
                marginals[label] = Marginal(column, weights, column, column)
        return marginals


class DrawsPosterior(MixtureOf):
    """An even mixture over the draws of all chains, which knows its Monte Carlo error."""

    def __init__(self, components: list[Distribution]) -> None:
        axes = [1] * len(components[0].batch_shape)
        super().__init__(torch.zeros(len(components), *axes, dtype=torch.float64), components)

    def log_prob_error(self, value: Tensor) -> Tensor:
        """The standard error of `log_prob(value)` in nats, from batch means."""
        log_densities = torch.stack([part.log_prob(value) for part in self.components])
        ratio = (log_densities - self.log_prob(value)).exp()
        means = ratio.unflatten(0, (CHAINS * BLOCKS, -1)).mean(1)
        return means.std(0) / math.sqrt(len(means))


class _Run(NamedTuple):
    """The sites of one run of a program, or of one run per task, with a leading axis."""

    y: Tensor  # (n,)
    f: Tensor  # (n,)
    latents: dict[str, Tensor]  # sampled sites
    functions: dict[str, Tensor]  # deterministic sites


class _Law(NamedTuple):
    """What one draw of the latents says about the queries."""

    y: Distribution  # batch_shape (m,)
    f: Tensor  # (m,)


class _Undrawn(Exception):
    """Raised at the first site without a value, out of the program."""

    def __init__(self, name: str, law: Any) -> None:
        super().__init__(name)
        self.name, self.law = name, law


class _Recorder(Messenger):
    """Gives sites their values, draws the others or stops at the first, and records all."""

    def __init__(self, values: dict[str, Tensor], *, stop: bool = False) -> None:
        super().__init__()
        self.given, self.stop = values, stop
        self.laws: dict[str, Any] = {}
        self.latents: dict[str, Tensor] = {}
        self.functions: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        if msg["name"] in self.given:
            msg["value"] = self.given[msg["name"]]
        elif self.stop:
            raise _Undrawn(msg["name"], msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            values = self.functions if msg["is_observed"] else self.latents
            values[msg["name"]] = msg["value"]
            self.laws[msg["name"]] = msg["fn"]

    def run(self, model: Model, x: Tensor) -> _Run:
        """The sites of one run at x (n, d)."""
        with self:
            model(x)
        y = self.latents.pop("y", None)
        if y is None or y.shape != x.shape[:1]:
            got = "none" if y is None else f"one of shape {tuple(y.shape)}"
            raise ValueError(f'Expected a site "y" of shape ({len(x)},), not observed; got {got}.')
        f = self.functions.pop("f", None)
        f = self.laws["y"].mean if f is None else f
        return _Run(y, f.expand(y.shape), self.latents, self.functions)


def _run(model: Model, x: Tensor) -> _Run:
    return _Recorder({}).run(model, x)


def _run_all(model: Model, x: Tensor) -> _Run:
    """Independent runs at x (task, n, d), mapped if possible, else one by one."""
    try:
        return _run_mapped(model, x)
    except Exception:  # of many kinds, by what cannot be mapped; those of the program come again
        runs = [_run(model, inputs) for inputs in x]
        y, f = (torch.stack([getattr(run, name) for run in runs]) for name in ("y", "f"))
        latents, functions = (
            {name: torch.stack([getattr(run, kind)[name] for run in runs]) for name in first}
            for kind, first in (("latents", runs[0].latents), ("functions", runs[0].functions))
        )
        return _Run(y, f, latents, functions)


def _run_mapped(model: Model, x: Tensor) -> _Run:
    """The same site by site: mapped runs give the parameters of the next site to draw."""
    drawn: dict[str, Tensor] = {}
    while True:
        stopped: list[tuple[str, Callable[[dict[str, Tensor]], Distribution]]] = []

        def one(inputs: Tensor, values: dict[str, Tensor], stopped: Any = stopped) -> Any:
            recorder = _Recorder(values, stop=True)
            try:
                return recorder.run(model, inputs)
            except _Undrawn as site:
                parameters, rebuild = _parameters(site.law)
                stopped.append((site.name, rebuild))
                return parameters

        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "There is a performance drop"
            )  # of unmapped operators
            result = torch.vmap(one, randomness="error")(x, drawn)
        if not stopped:
            return result
        name, rebuild = stopped[0]
        drawn[name] = rebuild(result).sample()


def _parameters(
    law: Any,
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], Distribution]]:
    """The parameters of a distribution, and what makes one of the same shape of a batch of them."""
    base, events = law, 0
    while isinstance(base, Independent):
        events += base.reinterpreted_batch_ndims
        base = base.base_dist
    shapes = law.batch_shape, law.event_shape

    def is_own(name: str) -> bool:  # not derived from others on demand
        known = inspect.getattr_static(type(base), name, None)
        return name in vars(base) or isinstance(known, property)

    def rebuild(parameters: dict[str, Tensor]) -> Distribution:
        again: Any = type(base)(**parameters, validate_args=False)
        again = Independent(again, events) if events else again
        if (again.batch_shape[1:], again.event_shape) != shapes:
            raise ValueError(f"{type(base).__name__} has no batch of this shape.")
        return again

    return {name: getattr(base, name) for name in base.arg_constraints if is_own(name)}, rebuild


class _Observe(Messenger):
    """Observes the first points of "y"."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = y

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != "y":
            return
        msg["fn"] = _pointwise(msg["fn"])
        (points,) = msg["fn"].batch_shape
        with torch.no_grad():
            value = msg["fn"].sample()  # anything possible where there is no observation
        value[: len(self.y)] = self.y
        msg["value"], msg["is_observed"] = value, True
        seen = torch.arange(points) < len(self.y)
        msg["mask"] = seen if msg["mask"] is None else seen & msg["mask"]


def _pointwise(law: Any) -> Any:
    """The distribution (n,) of independent observations.

    Raises:
        ValueError: if they are not independent.
    """
    while isinstance(law, Independent):
        law = law.base_dist
    if law.event_shape or len(law.batch_shape) != 1:
        raise ValueError(
            "Expected observations y (n,) that are independent given the latents; got a "
            f"{type(law).__name__} of batch_shape {tuple(law.batch_shape)} and event_shape "
            f"{tuple(law.event_shape)}."
        )
    return law


class _Draws(NamedTuple):
    """Draws of NUTS in unconstrained coordinates, and the latents they stand for."""

    t: Tensor  # (chain, draw, dim)
    latents: dict[str, Tensor]  # (chain * draw, *shape)


class _Density(NamedTuple):
    """The posterior density of one task in unconstrained coordinates."""

    model: Model
    x: Tensor  # (point, dim), the observed points first
    y: Tensor  # (observed,)
    potential: Callable[[dict[str, Tensor]], Tensor]
    transforms: dict[str, Any]  # to unconstrained coordinates
    start: dict[str, Tensor]

    def log_density(self, t: Tensor) -> Tensor:
        """log p(t, y) (node,) at t (node, dim)."""
        with torch.no_grad():
            return torch.stack([-self.potential(self._sites(point)) for point in t])

    def draw(self, warmup: int, draws: int) -> _Draws:
        """Draws of all chains, with a warning where they have not converged."""
        if draws % BLOCKS or draws <= 0:
            raise ValueError(f"Expected draws in multiples of {BLOCKS}; got {draws}.")
        if not self.start:
            return _Draws(self.y.new_zeros(CHAINS, draws, 0), {})
        chains, divergences = [], 0
        for _ in range(CHAINS):
            start = _start(self.model, self.x, self.y).start
            kernel = NUTS(potential_fn=self.potential, target_accept_prob=0.8)
            mcmc = MCMC(kernel, draws, warmup, initial_params=start, disable_progbar=True)
            mcmc.run()
            divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
            sites = mcmc.get_samples()
            chains.append(torch.cat([sites[name].reshape(draws, -1) for name in self.start], 1))
        t = torch.stack(chains)
        r_hat = float(split_gelman_rubin(t).max())
        if r_hat > 1.1 or divergences > 0.05 * CHAINS * draws:
            ess = float(effective_sample_size(t).min())
            warnings.warn(
                f"NUTS has not converged: R-hat {r_hat:.2f}, {ess:.0f} effective draws, "
                f"{divergences} divergences of {CHAINS * draws}.",
                stacklevel=4,
            )
        latents = [self.constrained(point) for point in t.flatten(0, 1)]
        return _Draws(t, {k: torch.stack([part[k] for part in latents]) for k in self.start})

    def constrained(self, t: Tensor) -> dict[str, Tensor]:
        """The latents at t (dim,)."""
        return {k: self.transforms[k].inv(v) for k, v in self._sites(t).items()}

    def _sites(self, t: Tensor) -> dict[str, Tensor]:
        sizes = [value.numel() for value in self.start.values()]
        pairs = zip(self.start.items(), t.split(sizes), strict=True)
        return {name: part.reshape(value.shape) for (name, value), part in pairs}


def _density(model: Model, x: Tensor, y: Tensor) -> _Density:
    """The posterior given the first observations y at x, checked."""
    run = _Recorder({})
    run.run(model, x)
    discrete = [name for name in run.latents if run.laws[name].support.is_discrete]
    if discrete:
        raise ValueError(f"Expected continuous latents for a posterior; {discrete} are discrete.")
    return _start(model, x, y)


def _start(model: Model, x: Tensor, y: Tensor) -> _Density:
    """The density with a random starting point."""

    def observed(x: Tensor) -> None:
        with _Observe(y):
            model(x)

    start, potential, transforms, _ = initialize_model(observed, (x,))
    return _Density(model, x, y, potential, transforms, start)


def _draw_latents(
    model: Model, x: Tensor, y: Tensor, seed: int, *, warmup: int, draws: int
) -> dict[str, Tensor]:
    """Posterior draws of all latents, (chain * draw, *shape) each; of the prior without data."""
    with _private_draws(seed, x.device):
        if len(y) == 0:
            return _run_all(model, x.new_full((CHAINS * draws, 1, x.shape[1]), 0.5)).latents
        return _density(model, x, y).draw(warmup, draws).latents


def _predict(
    model: Model, x: Tensor, y: Tensor, query: Tensor, seed: int, *, warmup: int, draws: int
) -> list[_Law]:
    """What each posterior draw says about the queries."""
    both = torch.cat([x, query])
    with _private_draws(seed, x.device):
        alone, joined = _run(model, query).latents, _run(model, both).latents
        is_local = any(joined[name].shape != value.shape for name, value in alone.items())
        if len(y) == 0:
            latents, at = _run_all(model, query.expand(CHAINS * draws, *query.shape)).latents, query
        elif is_local:  # latents of single points: those of queries are drawn along
            latents, at = _density(model, both, y).draw(warmup, draws).latents, both
        else:
            latents, at = _density(model, x, y).draw(warmup, draws).latents, query
        rows = [{k: v[i] for k, v in latents.items()} for i in range(CHAINS * draws)]
        return [_law(model, at, values, len(at) - len(query)) for values in rows]


def _law(model: Model, x: Tensor, latents: dict[str, Tensor], skip: int) -> _Law:
    """y and f given latents, at all points but the first `skip`."""
    recorder = _Recorder(latents)
    run = recorder.run(model, x)
    law = _pointwise(recorder.laws["y"])
    if skip:
        parameters, _ = _parameters(law)
        law = type(law)(**{k: v.expand(len(x), *v.shape[1:])[skip:] for k, v in parameters.items()})
    return _Law(law, run.f[skip:].double())


def _smoothed(f: Tensor) -> NutsPosterior:
    """Draws of f (draw, m) as an even mixture of normals of their mean and variance."""
    mean, variance = f.mean(0), f.var(0, correction=0)
    bandwidth = 1.06 * len(f) ** -0.2  # relative to the deviation: Silverman's rule
    centers = mean + math.sqrt(1 - bandwidth**2) * (f - mean)
    deviation = bandwidth * variance.sqrt().clamp_min(1e-10 * (1 + mean.abs()))
    component = Normal(centers.T, deviation.unsqueeze(-1).expand(centers.T.shape))
    mixture = Categorical(logits=torch.zeros_like(centers.T))
    return NutsPosterior(mixture, component, CHAINS, f.new_zeros(1))


def _by_name(name: str, value: Tensor, d: int) -> dict[str, Tensor]:
    """A latent (task, *shape) by the names it has in `Tasks`."""
    value = value.double() if value.is_floating_point() else value.long()
    if value.shape[1:] in ((), (d,)):
        return {name: value}
    return {f"{name}_{i}": column for i, column in enumerate(value.flatten(1).unbind(1))}


@contextmanager
def _private_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Pyro's draws made reproducible, in float64 on a device, the global state left alone."""
    dtype, devices, generator = torch.get_default_dtype(), [], torch.default_generator
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
        generator = torch.cuda.default_generators[devices[0]]
    with torch.random.fork_rng(devices), device:
        torch.set_default_dtype(torch.float64)
        try:
            generator.manual_seed(seed)
            yield
        finally:
            torch.set_default_dtype(dtype)
