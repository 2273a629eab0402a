"""Joint draws, evidence and the check against the prior, measured where the truth is known.

    python benchmarks/trust.py paths     seconds of joint draws, against encoding each context anew
    python benchmarks/trust.py choice    does the evidence choose priors as the exact one does?
    python benchmarks/trust.py power     how often the check catches purposeful misfits

How joint draws and evidences agree with exact ones is in the certificates (`pfn certify`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common  # before torch
import torch
import typer
from torch import Tensor
from torch.distributions import Chi2

import pfn
from pfn.conflict import IN_WORDS, LEVEL, draw_null, rank
from pfn.conflict import statistics as conflict_statistics
from pfn.evidence import DataSets
from pfn.units import FromContext, context_units, prior_units
from priors.draws import draw

SMALL = Path(__file__).parent.parent / "pretrained" / "small"
CHOICES: dict[str, str | Path] = {
    "GP": "gp-1d",
    "Student-t": "heavy-tails",
    "linear": SMALL / "linear",
}
DESIGNS, NULL = 20, 199
BATCH = 64  # contexts that are encoded at once

app = typer.Typer(help=__doc__)


@app.command()
def paths(draws: int = 512, points: int = 100, n: int = 50, repeats: int = 3) -> None:
    """Seconds of coherent draws, and of the same chain with each longer context encoded anew."""
    rows = []
    for name, d in (("gp-1d", 1), ("gp", 5), ("heavy-tails", 2), ("bnn", 2)):
        model = pfn.load(name)
        assert model.prior is not None
        tasks = model.prior.sample(1, n + points, d, generator=torch.Generator().manual_seed(0))
        x, y = tasks.x[0], tasks.y[0]
        fitted = model.condition((x[:n], y[:n]), standardize=False)
        walk = partial(fitted.sample_paths, x[n:], draws)
        seconds = [_median(partial(walk, latent=latent), repeats) for latent in (False, True)]
        anew = 0.0
        for k in range(points // 20, points, points // 10):  # each length stands for ten
            context = x[: n + k].expand(BATCH, -1, -1), y[: n + k].expand(BATCH, -1)
            query = x[n + k : n + k + 1].expand(BATCH, 1, d)
            one = _median(partial(model.predict, context, query, standardize=False), 1)
            anew += one * draws / BATCH * points / 10
        rows.append(
            {
                "model": name,
                "d": d,
                "observations, s": seconds[0],
                "functions, s": seconds[1],
                "encoded anew, s": anew,
                "ratio": anew / seconds[0],
            }
        )
        print(rows[-1], flush=True)
    common.save("trust-paths", rows, draws=draws, points=points, n=n)


@app.command()
def choice(tasks: int = 1000, n: int = 50, seed: int = 0) -> None:
    """Tasks of a random one of three priors: how often its evidence is the largest."""
    torch.set_num_threads(1)
    models = {name: pfn.load(path) for name, path in CHOICES.items()}
    generator = torch.Generator().manual_seed(seed)
    truths = torch.randint(len(models), (tasks,), generator=generator)
    ours, exact = [], []
    for i, truth in enumerate(truths.tolist()):
        drawn_by: Any = list(models.values())[truth].prior
        drawn = drawn_by.sample(1, n, 1, generator=generator)
        context = drawn.x[0], drawn.y[0]
        fitted = [model.condition(context, standardize=False) for model in models.values()]
        ours.append([float(each.log_evidence(seed=i)) for each in fitted])
        priors: list[Any] = [model.prior for model in models.values()]
        exact.append([float(prior.log_evidence(context)) for prior in priors])
        if i % 50 == 49:
            print(i + 1, _picks(ours, truths), _picks(exact, truths), flush=True)
    right = [_picked(values, truths) for values in (ours, exact)]
    error = torch.tensor(ours) - torch.tensor(exact)
    rows = []
    for j, name in enumerate((*models, "all")):
        some = truths == j if name != "all" else torch.ones_like(truths, dtype=torch.bool)
        network, true = (values[some].double() for values in right)
        difference = true - network
        row: dict[str, Any] = {
            "drawn by": name,
            "tasks": int(some.sum()),
            "network picks it": float(network.mean()),
            "exact evidence picks it": float(true.mean()),
            "difference": float(difference.mean()),
            "standard error": float(difference.std()) / math.sqrt(len(difference)),
        }
        if name != "all":
            row["error of its evidence, nats a point"] = float(error[some, j].mean()) / n
            row["root mean square"] = float(error[some, j].square().mean().sqrt()) / n
        rows.append(row)
    common.save("trust-choice", rows, n=n, seed=seed)


@app.command()
def power(tasks: int = 100, n: int = 50, model: str = "gp-1d", seed: int = 0) -> None:
    """How often smooth data with a misfit are said to conflict with the prior, at 5 %."""
    torch.set_num_threads(1)
    network = pfn.load(model)
    rows = []
    for name, (make, given) in MISFITS.items():
        generator = torch.Generator().manual_seed(seed)
        p_values: list[float] = []
        each: list[Tensor] = []
        for _ in range(DESIGNS):
            x = torch.rand(1, n, 1, dtype=torch.float64, generator=generator)
            f, e = smooth(x, tasks // DESIGNS, generator)
            y = make(x[0, :, 0], f, e)
            for p, columns in _check(network, x.expand(len(y), -1, -1), y, given, generator):
                p_values.append(p)
                each.append(columns)
        caught = torch.tensor(p_values) <= LEVEL
        alone = (torch.stack(each) <= LEVEL).double().mean(0)
        row = {
            "misfit": name,
            "tasks": len(caught),
            "caught": float(caught.double().mean()),
            **dict(zip(IN_WORDS, alone.tolist(), strict=True)),
        }
        rows.append(row)
        print(row, flush=True)
    common.save("trust-power", rows, n=n, model=model, seed=seed)


def smooth(x: Tensor, tasks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Smooth functions (task, n) at x (1, n, 1) with mean 0 and deviation 1, and normal noise."""
    shape = tasks, 1, 1
    lengthscale = 0.15 + 0.35 * torch.rand(shape, dtype=torch.float64, generator=generator)
    covariance = (-0.5 * ((x - x.mT) / lengthscale).square()).exp()
    covariance = covariance + 1e-6 * torch.eye(x.shape[1], dtype=torch.float64)
    z = torch.randn(tasks, x.shape[1], 1, dtype=torch.float64, generator=generator)
    f = (torch.linalg.cholesky(covariance) @ z).squeeze(-1)
    f = (f - f.mean(1, keepdim=True)) / f.std(1, keepdim=True)
    return f, torch.randn(f.shape, dtype=torch.float64, generator=generator)


Misfit = Callable[[Tensor, Tensor, Tensor], Tensor]


def _outlier(x: Tensor, f: Tensor, e: Tensor, *, size: float) -> Tensor:
    y = f + 0.1 * e
    y[:, 0] += 0.1 * size
    return y


def _heavy(x: Tensor, f: Tensor, e: Tensor, *, df: float) -> Tensor:
    return f + 0.1 * e / _root_gamma(e, df)


def _jump(x: Tensor, f: Tensor, e: Tensor, *, size: float) -> Tensor:
    return f + 0.05 * e + size * (x > 0.5)


def _root_gamma(e: Tensor, df: float) -> Tensor:
    """Square roots of chi-squared draws over their degrees of freedom, which follow from e."""
    generator = torch.Generator().manual_seed(int(e.abs().sum() * 1e6))
    law = Chi2(torch.tensor(df, dtype=e.dtype))
    return (draw(law, tuple(e.shape), generator=generator) / df).sqrt()


MISFITS: dict[str, tuple[Misfit, dict[str, float] | None]] = {
    "none: noise 0.1 of the function's deviation": (lambda x, f, e: f + 0.1 * e, None),
    "one outlier, 5 noise deviations": (partial(_outlier, size=5.0), None),
    "one outlier, 10 noise deviations": (partial(_outlier, size=10.0), None),
    "Student-t noise, 1.5 degrees of freedom": (partial(_heavy, df=1.5), None),
    "Student-t noise, 1 degree of freedom": (partial(_heavy, df=1.0), None),
    "a jump of 3 deviations, noise 0.05": (partial(_jump, size=3.0), None),
    "a jump of 4 deviations, noise 0.05": (partial(_jump, size=4.0), None),
    "noise 0.03 on the left, 0.6 on the right": (
        lambda x, f, e: f + torch.where(x > 0.5, 0.6, 0.03) * e,
        None,
    ),
    "noise that grows from 0.02 to 0.6": (lambda x, f, e: f + 0.02 * (3.4 * x).exp() * e, None),
    "noise 0.1, said to be 0.5": (lambda x, f, e: f + 0.1 * e, {"noise": 0.25}),
    "noise 0.1, said to be 1": (lambda x, f, e: f + 0.1 * e, {"noise": 1.0}),
    "noise 0.5, said to be 0.1": (lambda x, f, e: f + 0.5 * e, {"noise": 0.01}),
}


def _check(
    model: pfn.PFN,
    x: Tensor,
    y: Tensor,
    given: dict[str, float] | None,
    generator: torch.Generator,
) -> list[tuple[float, Tensor]]:
    """What `Fitted.check` says of data sets at one design, with the prior's in common."""
    network = model.transformer
    own = FromContext(given is None, given is None)  # a given noise is in the prior's units
    units = (context_units if own.y else prior_units)(x, y)
    known, dtype = model.read_given(given, units, 1), network.embed_query.dtype
    known = None if known is None else known.to(dtype)
    told = DataSets(units.map_x(x).to(dtype), units.map_y(y).to(dtype), known)
    with torch.inference_mode():
        first = DataSets(told.x[:1], told.y[:1], None if known is None else known[:1])
        null = draw_null(model, first, own, x.shape[1], NULL, generator)
        values, nulls = (
            conflict_statistics(network, data, generator).values for data in (told, null)
        )
    return [rank(torch.cat([row.unsqueeze(0), nulls])) for row in values]


def _picked(values: list[list[float]], truths: Tensor) -> Tensor:
    """Whether each task's largest value is the one of the prior that drew it."""
    return torch.tensor(values).argmax(1) == truths[: len(values)]


def _picks(values: list[list[float]], truths: Tensor) -> float:
    return round(float(_picked(values, truths).double().mean()), 3)


def _median(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    app()
