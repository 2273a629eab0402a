"""Runs of a Pyro program: one by one, or many at once.

A program is an ordinary one, of one data set: `model(x)` takes inputs x (n, d) in float64 and
samples the observations at the site "y" (n,). Many runs go site by site, each drawn for all runs at
once, by mapping the program over its inputs with `torch.vmap`; a program that cannot be mapped
(because Python branches on a draw, say) runs one by one, with the same law and a warning.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

try:
    import pyro
    from pyro.poutine.messenger import Messenger
    from pyro.poutine.util import site_is_subsample
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Programs need Pyro: pip install 'pfn[reference]'.") from error

Model = Callable[[Tensor], Any]


class Run(NamedTuple):
    """The sites of one run of a program, or of one run per task, with a leading axis."""

    y: Tensor  # (n,)
    f: Tensor  # (n,)
    latents: dict[str, Tensor]  # sampled sites
    functions: dict[str, Tensor]  # deterministic sites


class _Undrawn(Exception):
    """Raised at the first site without a value, out of the program."""

    def __init__(self, name: str, law: Any) -> None:
        super().__init__(name)
        self.name, self.law = name, law


class Recorder(Messenger):
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
            if msg["is_observed"] and not msg["infer"].get("_deterministic"):
                raise ValueError(
                    f"Expected no factors and no observed sites, as tasks are drawn from the "
                    f"program; {msg['name']!r} is one."
                )
            values = self.functions if msg["is_observed"] else self.latents
            values[msg["name"]] = msg["value"]
            self.laws[msg["name"]] = msg["fn"]

    def run(self, model: Model, x: Tensor) -> Run:
        """The sites of one run at x (n, d)."""
        with self:
            model(x)
        y = self.latents.pop("y", None)
        if y is None or y.shape != x.shape[:1]:
            got = "none" if y is None else f"one of shape {tuple(y.shape)}"
            raise ValueError(f'Expected a site "y" of shape ({len(x)},), not observed; got {got}.')
        f = self.functions.pop("f", None)
        f = self.laws["y"].mean if f is None else f
        return Run(y, f.expand(y.shape), self.latents, self.functions)


def run(model: Model, x: Tensor) -> Run:
    return Recorder({}).run(model, x)


def run_all(model: Model, x: Tensor) -> Run:
    """Independent runs at x (task, n, d), mapped if possible, else one by one."""
    try:
        return run_mapped(model, x)
    except Exception as error:  # of many kinds, by what cannot be mapped
        runs = [run(model, inputs) for inputs in x]  # its own errors come again
        names = [set(run.latents | run.functions) for run in runs]
        if any(each != names[0] for each in names):
            differ = sorted(names[0].union(*names) - names[0].intersection(*names))
            raise ValueError(
                f"Expected the same sites in every run; {differ} are in some alone."
            ) from error
        warnings.warn(
            f"The program runs task by task, because mapping it fails: {error}", stacklevel=3
        )
        y, f = (torch.stack([getattr(run, name) for run in runs]) for name in ("y", "f"))
        latents, functions = (
            {name: torch.stack([getattr(run, kind)[name] for run in runs]) for name in first}
            for kind, first in (("latents", runs[0].latents), ("functions", runs[0].functions))
        )
        return Run(y, f, latents, functions)


def run_mapped(model: Model, x: Tensor) -> Run:
    """The same site by site: mapped runs give the parameters of the next site to draw."""
    drawn: dict[str, Tensor] = {}
    while True:
        stopped: list[tuple[str, Callable[[dict[str, Tensor]], Distribution]]] = []

        def one(inputs: Tensor, values: dict[str, Tensor], stopped: Any = stopped) -> Any:
            recorder = Recorder(values, stop=True)
            try:
                return recorder.run(model, inputs)
            except _Undrawn as site:
                parameters, rebuild = parameters_of(site.law)
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


def parameters_of(
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


def pointwise(law: Any) -> Any:
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


def parameters_at(law: Any, points: slice) -> dict[str, Tensor]:
    """The parameters (point, ...) of some of the independent observations of `pointwise`."""
    (count,), parts = law.batch_shape, {}
    for name, value in parameters_of(law)[0].items():
        event = value.shape[value.dim() - law.arg_constraints[name].event_dim :]
        parts[name] = value.expand(count, *event)[points]
    return parts


@contextmanager
def private_draws(seed: int, device: torch.device) -> Iterator[None]:
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
