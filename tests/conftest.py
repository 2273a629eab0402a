"""What every test starts from: one thread, and a small untrained checkpoint."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: xdist's processes share cores
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import hypothesis
import pytest
import torch

from pfn.card import ModelCard, save_checkpoint
from pfn.transformer import Transformer, TransformerConfig
from priors import GaussianProcess, to_config

torch.set_num_threads(1)
hypothesis.settings.register_profile("pfn", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("pfn")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights: shapes and units are right, answers are not."""
    config = TransformerConfig(max_features=12, width=16, layers=1, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Transformer(config)
    folder = tmp_path_factory.mktemp("untrained")
    prior = to_config(GaussianProcess())
    save_checkpoint(folder, model, ModelCard("untrained", config, prior, max_context=64))
    return folder
