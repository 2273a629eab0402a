"""Checkpoints: a folder with `model.safetensors` (weights) and `card.json` (all there is to know).

The card carries the architecture, the prior with every constant, the recipe, and the certificate:
figures as numbers, each with the command that measured it. Nothing is ever unpickled or executed; a
file that was truncated or altered, or of another format, is refused with the reason. The
digests guard against accidents; they do not say who wrote a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pfn.network import Network, build
from pfn.transformer import Latent, TransformerConfig

FORMAT = 2


@dataclass(frozen=True, repr=False)
class ModelCard:
    """What a checkpoint says of itself; `card.json` holds exactly these fields.

    `prior` is the configuration that `priors.from_config` understands, or None for a user's own
    prior. `latent_units` says how each latent scales with the data: "x", "y", "y^2" or "".
    """

    name: str
    architecture: TransformerConfig
    prior: dict[str, Any] | None
    max_context: int
    latent_units: dict[str, str] = field(default_factory=dict)
    latent_categories: dict[str, list[str]] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""
    card_sha256: str = ""  # of this card as JSON, with this field empty
    library: str = ""
    format: int = FORMAT

    def __repr__(self) -> str:
        what = "certified" if self.certificate else "not certified"
        low, high = self.d_range
        return f"ModelCard({self.name!r}, d = {low}..{high}, n = 0..{self.max_context}, {what})"

    @property
    def d_range(self) -> tuple[int, int]:
        """Numbers of features the network was trained for."""
        return 1, self.architecture.max_features

    @property
    def n_range(self) -> tuple[int, int]:
        """Context sizes the network was trained for."""
        return 0, self.max_context


def save_checkpoint(folder: Path, model: Network, card: ModelCard) -> ModelCard:
    """Writes fp16 weights and card, each atomically; returns the card with the weights' digest."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().cpu().contiguous() for name, value in model.state_dict().items()}
    blob = safetensors.torch.save(weights)
    card = dataclasses.replace(card, weights_sha256=hashlib.sha256(blob).hexdigest(), format=FORMAT)
    write_atomically(folder / "model.safetensors", blob)
    return write_card(folder, card)


def write_card(folder: Path, card: ModelCard) -> ModelCard:
    """Writes `card.json`, atomically; returns the card with its own digest."""
    card = dataclasses.replace(card, card_sha256=_digest(asdict(card)))
    content = json.dumps(asdict(card), indent=1) + "\n"
    write_atomically(folder / "card.json", content.encode())
    return card


def load_checkpoint(
    folder: Path, device: str | torch.device | None = None
) -> tuple[Network, ModelCard]:
    """Returns the network, in float32 and evaluation mode, and its card.

    Raises:
        ValueError: if a file is missing, truncated, altered, or of another format.
    """
    card = read_card(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"Expected weights in {path}; there is no such file.")
    blob = path.read_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    if digest != card.weights_sha256:
        raise ValueError(
            f"{path} is truncated or altered: expected SHA-256 {card.weights_sha256} as in its"
            f" card; got {digest}. Fetch the checkpoint again."
        )
    try:
        weights = safetensors.torch.load(blob)
        model = build(card.architecture)
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (safetensors.SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold the network that its card describes: {error}"
        ) from error
    return model.requires_grad_(False).eval().to(device or "cpu"), card


def read_card(folder: Path) -> ModelCard:
    """The card of a checkpoint folder.

    Raises:
        ValueError: if there is none, or it is not a card, altered, or of another format.
    """
    path = folder / "card.json"
    if not path.is_file():
        raise ValueError(f"Expected a checkpoint folder with a card.json; found none in {folder}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not readable as JSON: {error}. Fetch the checkpoint again."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ValueError(f"{path} is not a model card: expected an object with an integer format.")
    if content["format"] != FORMAT:
        remedy = "Upgrade pfn." if content["format"] > FORMAT else "Train its recipe anew."
        raise ValueError(
            f"{path} has format {content['format']}; this library reads format {FORMAT}. {remedy}"
        )
    digest = _digest(content)
    try:
        architecture = dict(content["architecture"])
        architecture["latents"] = tuple(_build(Latent, item) for item in architecture["latents"])
        content["architecture"] = _build(TransformerConfig, architecture)
        card: ModelCard = _build(ModelCard, content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model card: {error}.") from error
    if card.card_sha256 != digest:
        raise ValueError(
            f"{path} was altered: its SHA-256 is not the one it states. Fetch the checkpoint again,"
            " or change a card with pfn.card.write_card."
        )
    return card


def _digest(card: dict[str, Any]) -> str:
    """Of a card as JSON, fields that it lacks left out: libraries to come may add some."""
    return hashlib.sha256(json.dumps(card | {"card_sha256": ""}).encode()).hexdigest()


def _build(kind: type, content: Mapping[str, Any]) -> Any:
    """A frozen dataclass from JSON, with the type of every number, string and object checked."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    unknown = sorted(set(content) - set(fields))
    if unknown:
        raise ValueError(f"unknown fields {unknown}")
    plain: dict[str, Any] = {"int": int, "str": str, "bool": bool, "dict": dict}
    plain["float"] = (int, float)  # JSON does not tell 1 from 1.0
    for name, value in content.items():
        declared = str(fields[name].type)
        if value is None and declared.endswith("None"):
            continue
        expected = plain.get(declared.partition("[")[0])
        is_bool = isinstance(value, bool)  # which Python counts among the integers
        if expected and (not isinstance(value, expected) or is_bool != (expected is bool)):
            raise ValueError(f"expected {name} of type {declared}, got {value!r}")
    return kind(**content)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that a kill at any moment leaves whole, the old one or the new one."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
