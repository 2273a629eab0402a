"""The shipped checkpoints and one call for each question: `models`, `load`, `predict`, `compare`.

Read `model.py` for what a checkpoint answers, `comparison.py` for what several do.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pfn.card import ModelCard, load_checkpoint, read_card
from pfn.comparison import Comparison, compare_fitted
from pfn.data import check_context
from pfn.model import PFN
from pfn.predictive import Predictive
from priors import Prior, from_config

AUTOMATIC = ("gp-1d", "gp")  # in this order, the first that was trained for the data's d


def models() -> list[ModelCard]:
    """The cards of the shipped checkpoints, by name."""
    paths = sorted(_pretrained().glob("*/card.json"))
    return [_card(path.parent, path.stat().st_mtime_ns) for path in paths]


def load(
    name: str | Path, device: str | torch.device | None = None, *, prior: Prior | None = None
) -> PFN:
    """A checkpoint, by shipped name or by the path of a folder that `pfn pretrain` wrote.

    Args:
        device: where the network runs; the CPU by default.
        prior: the prior it was trained on, for a prior of your own that no card can rebuild.

    Raises:
        ValueError: if there is no such checkpoint, its files are damaged or too new, or the prior
            cannot be sampled.
    """
    if prior is not None and not callable(getattr(prior, "sample", None)):
        raise ValueError(f"Expected a prior with a method `sample`; got {prior!r}.")
    transformer, card = load_checkpoint(find(name), device)
    if prior is None and card.prior is not None:
        prior = from_config(card.prior)
    return PFN(transformer, card, prior)


def find(name: str | Path) -> Path:
    """The folder of a checkpoint, by path or by shipped name.

    Raises:
        ValueError: if there is none.
    """
    for folder in (Path(name), _pretrained() / str(name)):
        if (folder / "card.json").is_file():
            return folder
    shipped = [card.name for card in models()]
    raise ValueError(
        f"Expected a model among {shipped} or a folder with a card.json; got {str(name)!r}."
    )


def choose(model: str | Path | PFN, d: int) -> PFN:
    """The PFN that `model` means for data of `d` features; see `predict`. Kept once loaded."""
    if isinstance(model, PFN):
        return model
    folder = find(_automatic(d) if model == "auto" else model)
    return _cached(folder, (folder / "card.json").stat().st_mtime_ns)


def choose_for(
    context: Any,
    model: str | Path | PFN = "auto",
    *,
    given: Mapping[str, Any] | None = None,
    standardize: bool = True,
    bounds: Any = None,
) -> PFN:
    """The PFN that `model` means for `context = (x, y)`, "best" included; see `predict`."""
    if model == "best":
        return compare(context, given=given, standardize=standardize, bounds=bounds).best_fitted.pfn
    if isinstance(model, PFN):
        return model
    return choose(model, check_context(context).x.shape[-1])


def predict(
    context: Any,
    x_query: Any,
    *,
    model: str | Path | PFN = "auto",
    latent: bool = False,
    given: Mapping[str, Any] | None = None,
    standardize: bool = True,
    bounds: Any = None,
    extrapolate_n: bool = False,
) -> Predictive:
    """The posterior predictive at `x_query` given `context = (x, y)`, in one forward pass.

    Args:
        model: a shipped name, a path, a PFN, "auto": "gp-1d" for one feature, "gp" for up to 12; or
            "best": of the shipped models that were trained for as many points and features, the one
            of highest evidence, for one task.
        latent, given, standardize, bounds, extrapolate_n: see `PFN.condition`, `Fitted.predict`.

    Returns:
        A `Predictive` with batch_shape (m,), or (b, m) for batched tasks.

    Raises:
        ValueError: on bad data or an unknown model.

    Example:
        >>> import torch, pfn
        >>> x = torch.linspace(0, 1, 20)
        >>> pfn.predict((x, torch.sin(6 * x)), torch.tensor([0.5])).mean.shape
        torch.Size([1])
    """
    chosen = choose_for(context, model, given=given, standardize=standardize, bounds=bounds)
    return chosen.predict(
        context,
        x_query,
        latent=latent,
        given=given,
        standardize=standardize,
        bounds=bounds,
        extrapolate_n=extrapolate_n,
    )


def compare(
    context: Any,
    models: Sequence[str | Path | PFN] | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    standardize: bool = True,
    bounds: Any = None,
    orders: int = 8,
    seed: int = 0,
) -> Comparison:
    """Posterior probabilities of several models' priors given `context = (x, y)`, one task.

    Args:
        models: names, paths or PFNs; None: all shipped ones for data in any order that were trained
            for as many features, points and given latents.
        given, standardize, bounds: see `PFN.condition`; the same for all models.
        orders: of the rows, over which each evidence is averaged.
        seed: of these orders.

    Returns:
        A `Comparison`: `.probabilities`, `.log_evidences`, `.best`, and `.predict`, their average.

    Raises:
        ValueError: on bad data, batched data, or no model that fits them.

    Example:
        >>> import torch, pfn
        >>> x = torch.linspace(0, 1, 20)
        >>> pfn.compare((x, torch.sin(6 * x)), models=["gp-1d", "bnn"]).probabilities.shape
        torch.Size([2])
    """
    checked = check_context(context)
    if checked.batched:
        raise ValueError(
            f"Expected one task to compare models on; got a batch of {len(checked.y)}. Compare task"
            " by task."
        )
    if isinstance(models, str):
        raise ValueError(f"Expected a list of models to compare; got {models!r}.")
    n, d = checked.x.shape[1:]
    chosen = _comparable(n, d, given or {}) if models is None else models
    if models is None and not chosen:
        raise ValueError(
            f"Expected as many points, features and given latents as a shipped model was trained"
            f" for, at most {_most_features()} features; got n = {n}, d = {d} and given"
            f" {sorted(given or {})}."
        )
    if not len(chosen):
        raise ValueError("Expected models to compare; got an empty list.")
    fitted = [
        choose(each, d).condition(context, given=given, standardize=standardize, bounds=bounds)
        for each in chosen
    ]
    return compare_fitted(fitted, orders=orders, seed=seed)


def _comparable(n: int, d: int, given: Mapping[str, Any]) -> list[str]:
    """Shipped models for points in any order that know data of this size."""
    return [
        card.name
        for card in models()
        if not card.architecture.causal
        and d <= card.architecture.max_features
        and n <= card.max_context
        and set(given) <= {latent.name for latent in card.architecture.latents}
    ]


def _automatic(d: int) -> str:
    cards = {card.name: card for card in models()}
    for name in AUTOMATIC:
        if name in cards and d <= cards[name].architecture.max_features:
            return name
    raise ValueError(
        f"Expected as many features as a shipped model has at most, {_most_features()}; got {d}."
    )


def _most_features() -> dict[str, int]:
    """Of each shipped model for points in any order."""
    cards = [card for card in models() if not card.architecture.causal]
    return {card.name: card.architecture.max_features for card in cards}


@functools.lru_cache(maxsize=64)
def _card(folder: Path, written: int) -> ModelCard:
    """A card, read once for each time it was written: "auto" looks at all of them."""
    return read_card(folder)


@functools.lru_cache(maxsize=8)
def _cached(folder: Path, written: int) -> PFN:
    """A loaded checkpoint, until its card is written anew."""
    return load(folder)


def _pretrained() -> Path:
    """The folder of shipped checkpoints: inside the installed package, or beside it in a clone."""
    installed = Path(__file__).parent / "pretrained"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "pretrained"
