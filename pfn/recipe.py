"""Recipes: a short Python file with a `prior`, and a `config` beside it, becomes a checkpoint.

`load_recipe` reads and checks the file; `run` pretrains and writes a folder for `pfn.load`.
The loop is in `pretrain.py`, its progress line in `monitor.py`, the card's fields in `card.py`. A
recipe is Python and is executed: run only files that you trust.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import safetensors
import torch
import torch.distributed as dist
from rich.console import Console

import pfn
from pfn.card import ModelCard, read_card, save_checkpoint
from pfn.monitor import Monitor
from pfn.network import Network
from pfn.pretrain import PretrainConfig, architecture, pretrain
from priors import Prior, Tasks, to_config

SECONDS = 600.0  # the budget where neither the recipe nor the command line gives one

T = TypeVar("T")


class Recipe(NamedTuple):
    """What a run needs: a name, a prior, and the settings."""

    name: str
    prior: Prior
    config: PretrainConfig


def load_recipe(source: str, **overrides: Any) -> Recipe:
    """The recipe of `FILE.py`, which has a `prior`, or of `FILE.py:NAME`, where NAME is the prior.

    A prior is an object with `sample(batch, n, d, *, generator)`, or a class or function that
    returns one without arguments. A `config` (a `PretrainConfig`) in the file is used if there.

    Args:
        overrides: fields of `PretrainConfig`; None leaves the recipe's. A budget in seconds
            replaces one in tasks, and the other way round.

    Raises:
        ValueError: if the file cannot be run, or what it offers is no prior.
    """
    path, attribute, module = _execute(source)
    prior = _make(module[attribute], f"Making {attribute!r} of {path} failed")
    settings = {name: value for name, value in overrides.items() if value is not None}
    config = module.get("config")
    config = None if isinstance(config, ModuleType) else config  # imported, not meant
    if config is not None and not isinstance(config, PretrainConfig):
        raise ValueError(f"Expected config in {path} to be a PretrainConfig; got {config!r}.")
    if config is None:
        config = PretrainConfig(seconds=SECONDS)
    if {"seconds", "tasks"} & set(settings):
        settings = {"seconds": None, "tasks": None, **settings}
    config = dataclasses.replace(config, **settings)
    check_prior(prior, config.max_features)
    return Recipe(path.stem if attribute == "prior" else attribute, prior, config)


def load_prior(source: str) -> Prior:
    """The prior of `FILE.py` or `FILE.py:NAME`, as in `load_recipe`."""
    path, attribute, module = _execute(source)
    prior = _make(module[attribute], f"Making {attribute!r} of {path} failed")
    check_prior(prior, 1)
    return prior


def check_prior(prior: Any, max_features: int) -> None:
    """Draws a few tasks and compares them with what the `Prior` protocol promises.

    Raises:
        ValueError: naming what came back and what was expected.
    """
    if not callable(getattr(prior, "sample", None)):
        raise ValueError(
            "Expected a prior with sample(batch, n, d, *, generator) -> Tasks; got"
            f" {type(prior).__name__} without it."
        )
    for d in sorted({1, max_features}):

        def draw(d: int = d) -> Tasks:
            generator = torch.Generator().manual_seed(0)
            drawn: Tasks = prior.sample(3, 7, d, generator=generator)
            return drawn

        tasks, again = (_attempt(draw, f"sample(3, 7, {d}, generator=g) failed") for _ in "ab")
        expected = {"x": (3, 7, d), "y": (3, 7), "f": (3, 7)}
        for name, shape in expected.items():
            value = getattr(tasks, name, None)
            if not isinstance(value, torch.Tensor) or value.shape != shape:
                got = getattr(value, "shape", type(value).__name__)
                raise ValueError(
                    f"Expected sample(3, 7, {d}, generator=g).{name} of shape {shape}; got {got}."
                )
            if not bool(value.isfinite().all()):
                raise ValueError(f"Expected finite {name} from sample(3, 7, {d}, generator=g).")
            if not torch.equal(value, getattr(again, name)):
                raise ValueError(
                    f"Expected equal {name} from equal generators; two calls of sample differ. Draw"
                    " from the generator that is passed, not from a global state."
                )


def run(
    recipe: Recipe,
    out: Path,
    *,
    device: str | None = None,
    console: Console | None = None,
) -> ModelCard | None:
    """Pretrains and writes `out`; returns the card, or None on all processes but the first.

    The same call continues a run that was stopped, and leaves one that has ended as it is.
    """
    network = architecture(recipe.prior, recipe.config)
    console = console or Console(stderr=True)
    with Monitor(*recipe, network, device=device, console=console) as monitor:
        model = pretrain(
            recipe.prior,
            recipe.config,
            out,
            device=device,
            report=monitor.report,
            probe=monitor.probe,
        )
    if dist.is_initialized() and dist.get_rank() > 0:
        return None
    if not monitor.recent and (out / "card.json").is_file():
        return read_card(out)
    return save_checkpoint(out, model, _card(recipe, model, out, monitor))


def _card(recipe: Recipe, model: Network, out: Path, monitor: Monitor) -> ModelCard:
    """All there is to say of a finished run."""
    prior, config = recipe.prior, recipe.config
    names = {latent.name for latent in model.config.latents}
    units = {k: v for k, v in getattr(prior, "latent_units", {}).items() if k in names}
    categories = {k: list(v) for k, v in getattr(prior, "latent_categories", {}).items()}
    with safetensors.safe_open(out / "state.safetensors", "pt") as state:
        spent = json.loads(state.metadata()["progress"])
    return ModelCard(
        name=recipe.name,
        architecture=model.config,
        prior=_describe(prior),
        max_context=config.max_context,
        latent_units=units,
        latent_categories={k: v for k, v in categories.items() if k in names},
        training={
            "seconds": round(spent["seconds"], 1),
            "tasks": spent["tasks"],
            "steps": spent["step"],
            "hardware": _hardware(next(model.parameters()).device),
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
            "seed": config.seed,
            "recipe": dataclasses.asdict(config),
            "versions": {"pfn": pfn.__version__, "torch": torch.__version__},
            **monitor.summary(model),
        },
        library=f"pfn {pfn.__version__}",
    )


def _describe(prior: Prior) -> dict[str, Any] | None:
    """The configuration of a built-in prior; None for a prior of your own."""
    try:
        config: dict[str, Any] = to_config(prior)
    except ValueError:
        return None
    return config


def _hardware(device: torch.device) -> str:
    """Such as "2 threads of AMD EPYC 7763"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {processor()}"


def processor() -> str:
    """The CPU's name, such as "AMD EPYC 7763"; its architecture where no name is known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _execute(source: str) -> tuple[Path, str, dict[str, Any]]:
    """The file of a recipe, the name of its prior, and all that it defines.

    It may import files beside it.
    """
    file, _, attribute = source.partition(".py:")
    path = Path(file + ".py" if attribute else source)
    if not path.is_file():
        raise ValueError(f"Expected a recipe FILE.py or FILE.py:PRIOR; there is no file {path}.")
    name = "recipe_" + path.stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"Expected a recipe FILE.py or FILE.py:PRIOR; got {source}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    sys.path.insert(0, str(path.parent.resolve()))
    load = spec.loader.exec_module
    _attempt(lambda: load(module), f"Running {path} failed")
    attribute, defined = attribute or "prior", vars(module)
    if attribute not in defined:
        names = [name for name in defined if not name.startswith("_")]
        raise ValueError(f"Expected {attribute!r} in {path}; it defines {names}.")
    return path, attribute, defined


def _make(prior: Any, failure: str) -> Any:
    """The prior itself; one made by a class or function without arguments."""
    if isinstance(prior, type) or (callable(prior) and not hasattr(prior, "sample")):
        return _attempt(prior, failure)
    return prior


def _attempt(call: Callable[[], T], failure: str) -> T:
    """What `call` returns; whatever it raises becomes a ValueError that says where."""
    try:
        return call()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{failure}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
