"""Serving: ONNX graphs beside torch, the first answer of a process, and what large data take.

    python benchmarks/serving.py onnx     one pass and cached contexts, in float32 and in int8
    python benchmarks/serving.py start    the first answer of a process, after `import torch`
    python benchmarks/serving.py large    seconds and memory of many queries and of many points

On one thread, but for `large`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common  # before torch
import numpy as np
import onnx as onnx_format
import onnxruntime
import torch
import typer
from onnxruntime.quantization import QuantType, quantize_dynamic

import pfn
from pfn.export import ANSWERS, export_onnx
from pfn.library import find
from pfn.predictive import Predictive

app = typer.Typer(help=__doc__)
FIRST = """
import time
began = time.perf_counter()
import torch
torch.set_num_threads(1)
x = torch.rand(50, 3, dtype=torch.float64)
imported = time.perf_counter()
import pfn
pfn.predict((x, x.sum(1)), x[:5], model="gp").mean
print(imported - began, time.perf_counter() - imported)
"""
LARGE = """
import json, resource, time, torch, pfn
n, m, d = {n}, {m}, 5
x = torch.rand(n + m, d, generator=torch.Generator().manual_seed(0))
y = (3 * x[:n]).sin().sum(1) + 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(1))
pfn.predict((x[:9], y[:9]), x[:1], model="gp")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
mean = pfn.predict((x[:n], y), x[n:], model="gp", extrapolate_n=True).mean
seconds = time.perf_counter() - began
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
error = float((mean - (3 * x[n:]).sin().sum(1)).square().mean().sqrt())
print(json.dumps([seconds, (after - before) / 2**20, error]))
"""


@app.command()
def onnx(model: str = "gp", n: int = 100, m: int = 100, d: int = 3, tasks: int = 200) -> None:
    """Milliseconds of graphs and of torch, and what their log densities lose against torch's."""
    torch.set_num_threads(1)
    network = pfn.load(model)
    assert network.prior is not None
    drawn = network.prior.sample(tasks, n + m, d, generator=torch.Generator().manual_seed(0))
    x, y, query, truth = drawn.x[:, :n], drawn.y[:, :n], drawn.x[:, n:], drawn.y[:, n:]
    exact = network.predict((x, y), query)
    feed = {"x": x[:1].numpy(), "y": y[:1].numpy()}
    asked = {"x_query": query[:1].numpy()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = export_onnx(network, Path(folder) / "model.onnx")
        small = [path.with_suffix(".int8.onnx") for path in paths]
        for path, into in zip(paths, small, strict=True):
            graph = onnx_format.load(path)
            del graph.graph.value_info[:]  # shapes that the exporter has noted, some of them stale
            quantize_dynamic(graph, into, weight_type=QuantType.QInt8)
        fitted = network.condition((x[0], y[0]))
        contenders: dict[str, Callable[[], object]] = {
            "torch": lambda: network.predict((x[0], y[0]), query[0]),
            "torch, cached": lambda: fitted.predict(query[0]),
        }
        losses = {"torch": 0.0, "torch, cached": 0.0}
        weights = find(model) / "model.safetensors"
        sizes = dict.fromkeys(losses, weights.stat().st_size / 2**20)
        for label, files in (("onnxruntime", paths), ("onnxruntime, int8", small)):
            whole, encode, decode = map(_start, files)
            names = [part.name for part in encode.get_outputs()]
            taken = {part.name for part in decode.get_inputs()}
            made = dict(zip(names, encode.run(names, feed), strict=True))
            cache = {name: part for name, part in made.items() if name in taken}
            contenders[label] = _bound(whole, feed | asked)
            contenders[f"{label}, cached"] = _bound(decode, cache | asked)
            every = {"x": x.numpy(), "y": y.numpy(), "x_query": query.numpy()}
            parts = [torch.from_numpy(part) for part in whole.run(list(ANSWERS[:3]), every)]
            loss = exact.log_prob(truth) - Predictive(*parts).log_prob(truth)
            losses |= dict.fromkeys((label, f"{label}, cached"), float(loss.mean()))
            sizes[label] = files[0].stat().st_size / 2**20
            sizes[f"{label}, cached"] = files[2].stat().st_size / 2**20
        timings = common.measure(contenders, 9)
    for label, timing in timings.items():
        rows.append(
            {
                "answered by": label,
                "ms": 1000 * timing.wall,
                "lost, nats per query": losses[label],
                "file, MiB": sizes[label],
            }
        )
    common.save("serving-onnx", rows, model=model, n=n, queries=m, d=d, tasks=tasks)


@app.command()
def start(repeats: int = 9) -> None:
    """The first answer of a fresh process: seconds of `import torch`, and after it."""
    torch.set_num_threads(1)
    torchs, ours = zip(*(map(float, _run(FIRST).split()) for _ in range(repeats)), strict=True)
    row = {
        "import torch, s": statistics.median(torchs),
        "then import pfn and predict, s": statistics.median(ours),
        "the slowest, s": max(ours),
    }
    common.save("serving-start", [row], repeats=repeats)


@app.command()
def large() -> None:
    """A million queries, and contexts beyond what was trained, each in a fresh process."""
    rows = []
    for n, m in ((256, 1_000_000), (1000, 1000), (10_000, 1000)):
        seconds, gibibytes, error = json.loads(_run(LARGE.format(n=n, m=m)))
        rows.append(
            {
                "points": n,
                "queries": m,
                "seconds": seconds,
                "memory, GiB": gibibytes,
                "error, noise deviations": error / 0.1,
            }
        )
        print(rows[-1], flush=True)
    common.save("serving-large", rows, d=5)


def _start(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def _bound(
    graph: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]
) -> Callable[[], object]:
    return lambda: graph.run(list(ANSWERS[:3]), feed)


def _run(code: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    app()
