"""Checkpoints come back as they were written, or are refused with a reason; none can run code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pfn
from pfn.card import FORMAT, ModelCard, load_checkpoint, read_card, save_checkpoint, write_card
from pfn.transformer import Latent, Transformer, TransformerConfig
from priors import GaussianProcess

CONFIG = TransformerConfig(
    max_features=2,
    width=8,
    layers=1,
    heads=2,
    expansion=1,
    fourier_octaves=1,
    components=2,
    y_mean=0.1,
    y_std=1 / 3,
    latents=(Latent("noise", positive=True, mean=-4.0, std=1.5), Latent("kernel", categories=3)),
)
CARD = ModelCard(
    name="tiny",
    architecture=CONFIG,
    prior=None,
    max_context=64,
    latent_units={"noise": "y^2"},
    latent_categories={"kernel": ["rbf", "matern32", "matern52"]},
    training={"tasks": 1000, "seconds": 12.5},
    certificate={"gap": {"nats": 0.01, "command": "pfn certify tiny"}},
    library="pfn 0.1",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("cards") / "tiny"
    torch.manual_seed(0)
    save_checkpoint(folder, Transformer(CONFIG), CARD)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Transformer(CONFIG)
    written = save_checkpoint(tmp_path / "new" / "tiny", network, CARD)
    loaded, card = load_checkpoint(tmp_path / "new" / "tiny")
    assert card == written
    digests = {"weights_sha256": card.weights_sha256, "card_sha256": card.card_sha256}
    assert card == dataclasses.replace(CARD, **digests)
    assert not loaded.training
    for (name, value), other in zip(network.named_parameters(), loaded.parameters(), strict=True):
        assert other.dtype == torch.float32 and not other.requires_grad
        assert torch.equal(other, value.half().float()), name


def test_a_folder_holds_two_files_and_half_precision_weights(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["card.json", "model.safetensors"]
    weights = safetensors.torch.load_file(saved / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


def test_a_certificate_is_added_to_a_card_by_writing_it_again(folder: Path) -> None:
    _, card = load_checkpoint(folder)
    write_card(folder, dataclasses.replace(card, certificate={"gap": 0.005}))
    assert load_checkpoint(folder)[1].certificate == {"gap": 0.005}


def test_a_card_says_what_it_was_trained_for(saved: Path) -> None:
    card = read_card(saved)
    assert card.d_range == (1, 2) and card.n_range == (0, 64)
    assert repr(card).startswith(f"ModelCard({card.name!r}, d = 1..2, n = 0..64, ")


@pytest.mark.parametrize("name", ["card.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_checkpoint(folder)


@settings(max_examples=40)
@given(data=st.data())
def test_any_altered_byte_and_any_truncation_is_noticed(saved: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["card.json", "model.safetensors"]))
    content = bytearray((saved / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 2))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        assume(name != "card.json" or not chr(content[place]).isspace())  # that would be layout
        content[place] ^= data.draw(st.integers(1, 255))
    with TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(saved, Path(temporary) / "tiny"))
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_checkpoint(folder)


@pytest.mark.parametrize(("offset", "remedy"), [(1, "Upgrade"), (-1, "Train")])
def test_another_format_is_refused_before_anything_else_is_read(
    folder: Path, offset: int, remedy: str
) -> None:
    content = {"format": FORMAT + offset, "shape": "unheard of"}
    (folder / "card.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"format {FORMAT + offset}.*{remedy}"):
        load_checkpoint(folder)


def test_a_card_from_before_a_field_was_added_is_read_with_its_default(folder: Path) -> None:
    card = read_card(folder)
    content = json.loads((folder / "card.json").read_text())
    del content["architecture"]["expansion"], content["certificate"]
    content["card_sha256"] = ""
    content["card_sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    (folder / "card.json").write_text(json.dumps(content))
    default = TransformerConfig(max_features=1).expansion
    assert card.architecture.expansion != default
    assert read_card(folder).architecture == replace(card.architecture, expansion=default)
    assert read_card(folder).certificate == {}


@pytest.mark.parametrize(
    "content",
    ["", "null", "[]", "3", '{"format": "1"}', '{"format": 2}', "{" * 9, "[" * 100_000, "\0"],
)
def test_what_is_no_card_is_refused(folder: Path, content: str) -> None:
    (folder / "card.json").write_text(content)
    with pytest.raises(ValueError, match=r"card\.json"):
        read_card(folder)


def test_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    (folder / "card.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"card\.json is not readable"):
        read_card(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_context": "64"}, "max_context of type int, got '64'"),
        ({"max_context": True}, "max_context of type int, got True"),
        ({"name": 3}, "name of type str, got 3"),
        ({"latent_units": []}, r"latent_units of type dict.*got \[\]"),
        ({"certificate": None}, "certificate of type dict.*got None"),
        ({"architecture": None}, "not a model card"),
        ({"architecture": {}}, "not a model card: 'latents'"),
        ({"architecture": asdict(CONFIG) | {"depth": 3}}, "unknown fields.*depth"),
        ({"architecture": asdict(CONFIG) | {"y_std": "1"}}, "y_std of type float, got '1'"),
        ({"architecture": asdict(CONFIG) | {"latents": [3]}}, "not a model card"),
        ({"architecture": asdict(CONFIG) | {"heads": 3}}, "width that heads divides"),
        ({"architecture": asdict(CONFIG) | {"layers": -1}}, "layers of at least 1"),
        ({"owner": "me"}, r"unknown fields \['owner'\]"),
        ({"max_context": 65}, "altered"),
        ({"prior": {"kind": "GaussianProcess"}}, "altered"),
    ],
)
def test_a_card_edited_by_hand_is_refused_with_the_reason(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=reason):
        read_card(folder)


def vouch_for(folder: Path, blob: bytes) -> None:
    """Puts `blob` in place of the weights, under a card that states its digest."""
    (folder / "model.safetensors").write_bytes(blob)
    digest = hashlib.sha256(blob).hexdigest()
    write_card(folder, dataclasses.replace(read_card(folder), weights_sha256=digest))


class Malice:
    """Unpickling this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_disguised_as_weights_is_refused_and_never_run(folder: Path) -> None:
    evidence = folder / "executed"
    blob = pickle.dumps(Malice(evidence))
    vouch_for(folder, blob)
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold"):
        load_checkpoint(folder)
    torch.save({"weights": Malice(evidence)}, folder / "model.safetensors")
    vouch_for(folder, (folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold"):
        load_checkpoint(folder)
    assert not evidence.exists()
    pickle.loads(blob)
    assert evidence.exists()  # it would have worked


def test_code_inside_a_card_stays_text(folder: Path) -> None:
    text = "__import__('os').abort()"
    write_card(folder, dataclasses.replace(read_card(folder), name=text, prior={"kind": text}))
    assert load_checkpoint(folder)[1].name == text


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"norm.weight": torch.ones(8)},
        {name: value.flatten()[:1] for name, value in Transformer(CONFIG).state_dict().items()},
        Transformer(CONFIG).state_dict() | {"extra": torch.ones(3)},
    ],
    ids=["none", "few", "shapes", "extra"],
)
def test_weights_of_another_network_are_refused(
    folder: Path, weights: dict[str, torch.Tensor]
) -> None:
    vouch_for(folder, safetensors.torch.save({k: v.contiguous() for k, v in weights.items()}))
    with pytest.raises(ValueError, match=r"model\.safetensors does not hold the network"):
        load_checkpoint(folder)


def test_saving_leaves_no_partial_file_and_replaces_the_old_ones(folder: Path) -> None:
    torch.manual_seed(1)
    network = Transformer(CONFIG)
    save_checkpoint(folder, network, dataclasses.replace(CARD, name="second"))
    loaded, card = load_checkpoint(folder)
    assert card.name == "second"
    assert torch.equal(loaded.embed_query, network.embed_query.half().float())
    assert not list(folder.glob("*.partial"))


def test_a_pfn_is_loaded_from_a_folder_with_a_prior_of_ones_own(folder: Path) -> None:
    mine = GaussianProcess()
    for path in (folder, str(folder)):
        assert pfn.load(path).card == read_card(folder)
    assert pfn.load(folder).prior is None
    assert pfn.load(folder, prior=mine).prior is mine
    with pytest.raises(ValueError, match="a prior with a method `sample`; got 3"):
        pfn.load(folder, prior=3)


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"Expected a model among \[.*\] or a folder.*'nowhere'"):
        pfn.load("nowhere")
