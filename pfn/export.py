"""Checkpoints as ONNX graphs, which other runtimes than torch execute.

One graph answers queries on a context in one pass. Two others keep the context: what the first
makes of it, the second takes beside queries. The numbers of tasks, points, queries and features
are free in all of them. Data go in as they are, and answers are in their units: the parameters of
normal mixtures, as of `Predictive`.

Read `transformer.py` first; `onnx_functions.py` has the linear algebra that ONNX lacks.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from pfn.experts import exporting
from pfn.model import PFN
from pfn.transformer import Encoded, Final, Mixture, Scaling, Transformer
from pfn.units import FromContext, Units, context_units, prior_units

OPSET = 18  # of torch's exporter
ANSWERS = tuple(
    f"{kind}{part}" for kind in ("", "latent_") for part in ("log_weights", "means", "stds")
)

AXES = {  # names of what is free in the data of a graph
    "x": ("batch", "points", "features"),
    "y": ("batch", "points"),
    "x_query": ("batch", "queries", "features"),
}


@torch.library.custom_op("pfn::spd_inverse", mutates_args=())
def spd_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse (g, n, n) and the logarithm of the determinant (g, 1), for graphs to contain."""
    factor = torch.linalg.cholesky(matrix)
    log_determinant = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(-1, keepdim=True)
    return torch.cholesky_inverse(factor), log_determinant


@spd_inverse.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(matrix), matrix.new_empty(matrix.shape[0], 1)


def export_onnx(pfn: PFN, path: str | Path, *, standardize: bool = True) -> list[Path]:
    """Writes a checkpoint as three graphs: PATH, and beside it the two that keep a context.

    - PATH.onnx takes x (b, n, d), y (b, n) and x_query (b, m, d), in float64, n >= 1, and gives
      log_weights, means and stds (b, m, components) of the predictive mixture of each query, and
      latent_log_weights, ... of the function without noise, in the units of y.
    - PATH-encode.onnx takes x and y and gives a cache, PATH-decode.onnx takes the cache, by the
      names of its parts, and x_query.

    Args:
        standardize: as of `PFN.predict`, built into the graphs.

    Returns:
        The paths that were written.

    Raises:
        ValueError: a model of curves.
        ImportError: without the extra `onnx`.
    """
    card = pfn.card
    if not isinstance(pfn.transformer, Transformer):
        raise ValueError(
            f"Expected a model of points in any order; {card.name!r} reads curves and has no ONNX"
            " form."
        )
    network = copy.deepcopy(pfn.transformer).cpu().float().eval()
    path = Path(path)
    base = path.with_suffix("") if path.suffix == ".onnx" else path
    most = network.config.max_features
    few, more = _example(2, 7, 5, min(2, most)), _example(3, 9, 8, 3 if most > 2 else 1)
    whole, encode = Whole(network, standardize).eval(), Encode(network, standardize).eval()
    with torch.no_grad():  # and the network keeps constants for later, which are to be real
        caches = [encode(*data[:2]) for data in (few, more)]
    parts = tuple(f"cache_{i}" for i in range(len(caches[0])))
    decode = Decode(network, encode.form).eval()
    paths = [base.with_name(base.name + end) for end in (".onnx", "-encode.onnx", "-decode.onnx")]
    _write(whole, (few, more), ("x", "y", "x_query"), ANSWERS, paths[0])
    _write(encode, (few[:2], more[:2]), ("x", "y"), parts, paths[1])
    asked = (*caches[0], few[2]), (*caches[1], more[2])
    _write(decode, asked, (*parts, "x_query"), ANSWERS, paths[2])
    return paths


class Whole(nn.Module):
    """Answers queries on a context, from data to mixtures in their units."""

    def __init__(self, network: Transformer, standardize: bool) -> None:
        super().__init__()
        self.network, self.standardize = network, standardize

    def forward(self, x: Tensor, y: Tensor, x_query: Tensor) -> tuple[Tensor, ...]:
        units, x, y, own = _read(x, y, self.standardize)
        query = units.map_x(x_query).float()
        final, inner = self.network.answer(x, y, None, own, query)
        return _mixtures(self.network, final, units, inner)


class Encode(nn.Module):
    """What `Decode` needs of a context, as a flat list of tensors."""

    def __init__(self, network: Transformer, standardize: bool) -> None:
        super().__init__()
        self.network, self.standardize = network, standardize
        self.form: Form

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        units, x, y, own = _read(x, y, self.standardize)
        leaves, spec = pytree.tree_flatten((units, self.network.encode(x, y, None, own)))
        self.form = Form(spec, tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


class Form(NamedTuple):
    """How a flat list of tensors is a context's units and encoding."""

    spec: Any
    constants: tuple[Any, ...]  # None in the place of a tensor

    def restore(self, tensors: tuple[Tensor, ...]) -> tuple[Units, Encoded]:
        rest = iter(tensors)
        leaves = [next(rest) if part is None else part for part in self.constants]
        units, encoded = pytree.tree_unflatten(leaves, self.spec)
        return units, encoded


class Decode(nn.Module):
    """Answers queries on what `Encode` gave."""

    def __init__(self, network: Transformer, form: Form) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        units, encoded = self.form.restore(tensors[:-1])
        final = self.network.decode(encoded, units.map_x(tensors[-1]).float())
        return _mixtures(self.network, final, units, encoded.scaling)


def _read(x: Tensor, y: Tensor, standardize: bool) -> tuple[Units, Tensor, Tensor, FromContext]:
    """The units of a context, its points in them, and which it has set itself."""
    units = context_units(x, y) if standardize else prior_units(x, y)
    own = FromContext(standardize, standardize)
    return units, units.map_x(x).float(), units.map_y(y).float(), own


def _mixtures(
    network: Transformer, final: Final, units: Units, inner: Scaling
) -> tuple[Tensor, ...]:
    """Parameters of observations and of functions, in the units of the data."""
    scale = (units.y_scale * inner.scale.double())[:, None, None]
    shift = (units.y_shift + units.y_scale * inner.center.double())[:, None, None]

    def restored(mixture: Mixture) -> tuple[Tensor, Tensor, Tensor]:
        means, stds = mixture.means.double(), mixture.log_stds.double().exp()
        return mixture.log_weights.double(), shift + scale * means, scale * stds

    return *restored(network.mixture_y(final)), *restored(network.mixture_f(final))


def _example(b: int, n: int, m: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Data of some sizes: what depends on them in no other way is free in a graph."""
    generator = torch.Generator().manual_seed(0)
    sizes = (b, n, d), (b, n), (b, m, d)
    x, y, x_query = (torch.rand(size, dtype=torch.float64, generator=generator) for size in sizes)
    return x, y, x_query


def _write(
    module: nn.Module,
    examples: tuple[tuple[Tensor, ...], tuple[Tensor, ...]],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    path: Path,
) -> None:
    """One graph, whose sizes are free that differ between two examples."""
    try:
        from pfn import onnx_functions
    except ImportError as error:
        raise ImportError('Expected the extra `onnx`: pip install "pfn[onnx]".') from error
    free = tuple(
        {
            i: AXES[name][i] if name in AXES else Dim.AUTO
            for i, (a, b) in enumerate(zip(few.shape, more.shape, strict=True))
            if a != b
        }
        for name, few, more in zip(inputs, *examples, strict=True)
    )

    def inverse(matrix: Any) -> Any:
        return onnx_functions.spd_inverse(matrix)

    logger = logging.getLogger("torch.onnx")
    level, token = logger.level, exporting.set(True)
    try:
        logger.setLevel(logging.ERROR)  # it warns of torchvision, which nothing here uses
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                examples[0],
                dynamo=True,
                dynamic_shapes=(free,) if isinstance(module, Decode) else free,
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                custom_translation_table={torch.ops.pfn.spd_inverse.default: inverse},
                verbose=False,
            )
    finally:
        logger.setLevel(level)
        exporting.reset(token)
    assert program is not None
    program.save(path)
