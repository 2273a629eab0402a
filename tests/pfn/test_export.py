"""ONNX graphs in onnxruntime against torch: all sizes free, in the units of the data."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import pfn
import pfn.experts
from pfn.card import ModelCard
from pfn.export import ANSWERS, export_onnx
from pfn.predictive import Predictive
from pfn.transformer import Transformer, TransformerConfig

Graph = onnxruntime.InferenceSession


def start(path: Path) -> Graph:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those that the command writes."""
    out = tmp_path_factory.mktemp("onnx") / "gp.onnx"
    command = [sys.executable, "-m", "pfn", "export", "gp", "--onnx", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.split()]


@pytest.fixture(scope="module")
def graphs(paths: list[Path]) -> list[Graph]:
    return [start(path) for path in paths]


def data(b: int, n: int, m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tasks of the prior in other units."""
    generator = torch.Generator().manual_seed(n)
    model = pfn.load("gp")
    assert model.prior is not None
    tasks = model.prior.sample(b, n + m, d, generator=generator)
    x, y = 3 * tasks.x - 7, 10 * tasks.y + 3
    return x[:, :n], y[:, :n], x[:, n:]


def as_predictives(answers: list[Any]) -> list[Predictive]:
    """Of observations and of the function."""
    parts = [torch.from_numpy(part) for part in answers]
    return [Predictive(*parts[:3]), Predictive(*parts[3:])]


def assert_equal(answers: list[Any], context: tuple[Tensor, Tensor], query: Tensor) -> None:
    scale = context[1].std(1, keepdim=True) if context[1].shape[1] > 1 else 1.0
    for ours, latent in zip(as_predictives(answers), (False, True), strict=True):
        theirs = pfn.predict(context, query, model="gp", latent=latent)
        assert float(((ours.mean - theirs.mean) / scale).abs().max()) < 1e-4
        assert float(((ours.stddev - theirs.stddev) / scale).abs().max()) < 1e-4
        levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64).view(3, 1, 1)
        assert float((ours.cdf(theirs.icdf(levels)) - levels).abs().max()) < 1e-3


SIZES = [(1, 20, 7, 1), (3, 100, 50, 3), (2, 60, 5, 12), (1, 1, 1, 2), (1, 2, 5, 1), (1, 16, 1, 4)]


@pytest.mark.parametrize("sizes", SIZES)
def test_graphs_answer_as_torch_does_whatever_the_sizes(
    graphs: list[Graph], sizes: tuple[int, int, int, int]
) -> None:
    x, y, query = data(*sizes)
    whole, encode, decode = graphs
    feed = {"x": x.numpy(), "y": y.numpy()}
    asked = {"x_query": query.numpy()}
    assert_equal(whole.run(list(ANSWERS), feed | asked), (x, y), query)
    names = [part.name for part in encode.get_outputs()]
    cache = dict(zip(names, encode.run(names, feed), strict=True))
    taken = {part.name for part in decode.get_inputs()}
    assert taken <= {*cache, "x_query"}
    kept = {name: part for name, part in cache.items() if name in taken}
    assert_equal(decode.run(list(ANSWERS), kept | asked), (x, y), query)


def test_sizes_have_names(graphs: list[Graph]) -> None:
    whole, encode, decode = ({part.name: part.shape for part in g.get_inputs()} for g in graphs)
    assert whole["x"] == encode["x"] == ["batch", "points", "features"]
    assert whole["y"] == encode["y"] == ["batch", "points"]
    assert whole["x_query"] == decode["x_query"] == ["batch", "queries", "features"]
    assert graphs[0].get_outputs()[0].shape[:2] == ["batch", "queries"]


def test_one_context_is_encoded_once_for_all_queries(graphs: list[Graph]) -> None:
    x, y, query = data(1, 30, 40, 2)
    _, encode, decode = graphs
    names = [part.name for part in encode.get_outputs()]
    cache = dict(zip(names, encode.run(names, {"x": x.numpy(), "y": y.numpy()}), strict=True))
    taken = {part.name for part in decode.get_inputs()}
    cache = {name: part for name, part in cache.items() if name in taken}
    at_once = decode.run(["means"], cache | {"x_query": query.numpy()})[0]
    one = decode.run(["means"], cache | {"x_query": query[:, 7:8].numpy()})[0]
    np.testing.assert_allclose(one, at_once[:, 7:8], rtol=1e-5, atol=1e-5)


def test_the_command_names_what_it_writes(paths: list[Path]) -> None:
    assert [path.name for path in paths] == ["gp.onnx", "gp-encode.onnx", "gp-decode.onnx"]
    assert all(path.parent == paths[0].parent for path in paths)


@pytest.mark.slow
def test_graphs_of_two_features_also_take_one_in_the_units_of_the_prior(tmp_path: Path) -> None:
    config = TransformerConfig(
        max_features=2, width=16, layers=1, heads=2, components=2, refinements=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Transformer(config)
    model = pfn.PFN(network.train(), ModelCard("small", config, None, max_context=64))
    written = export_onnx(model, tmp_path / "small.onnx", standardize=False)
    assert model.transformer.training  # it is as it was
    assert not pfn.experts.exporting.get()
    model.transformer.eval()
    graph = start(written[0])
    for n, m, d in ((2, 1, 1), (9, 4, 2)):
        generator = torch.Generator().manual_seed(n)
        x, x_query, y = (
            torch.rand(shape, dtype=torch.float64, generator=generator)
            for shape in ((1, n, d), (1, m, d), (1, n))
        )
        feed = {"x": x.numpy(), "y": y.numpy(), "x_query": x_query.numpy()}
        ours = as_predictives(graph.run(list(ANSWERS), feed))[0]
        theirs = model.predict((x, y), x_query, standardize=False)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-4)  # float32


def test_curves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'curves' reads curves"):
        export_onnx(pfn.load("curves"), tmp_path / "curves.onnx")
