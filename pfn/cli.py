"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve others

import functools
import importlib
import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pfn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pfn.model import Fitted

    Array = NDArray[np.float64]

QUANTILES = (0.05, 0.5, 0.95)
SHOWN = 20  # rows of a printed table; --out and --json give all
# words in the names of metrics of which less is better
FALLING = {"loss", "logloss", "err", "error", "rmse", "mse", "mae", "nll", "perplexity"}

app = typer.Typer(
    help="Bayesian posteriors in one forward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Model = Annotated[str, typer.Option(help="A shipped name, a folder, auto, or best, by evidence.")]


def main() -> None:
    """Runs the command; bad input ends with exit code 2 and one line on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"Warning: {message}")
        try:
            app()
        except (ValueError, ImportError, OSError, FloatingPointError) as error:
            _say(f"Error: {' '.join(str(error).split())}")
            sys.exit(2)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Bayesian posteriors in one forward pass."""
    if show:
        typer.echo(pfn.__version__)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("demo"),
) -> None:
    """Predict real tables beside a fitted GP."""
    from pfn.demo import run

    run(out)


@app.command()
def models(as_json: Json = False) -> None:
    """List the shipped checkpoints."""
    from dataclasses import asdict

    cards = pfn.models()
    if as_json:
        typer.echo(json.dumps([asdict(card) for card in cards], indent=1))
        return
    rows = []
    for card in cards:
        gap = card.certificate.get("gap")
        unknown = "no reference" if card.certificate else "not certified"
        rows.append(
            [
                card.name,
                (card.prior or {}).get("prior", "your own"),
                "{} to {}".format(*card.d_range),
                "{} to {}".format(*card.n_range),
                f"{gap['mean']:.4f}" if gap else unknown,
            ]
        )
    _print_table(["name", "prior", "features", "context", "gap, nats per query"], rows)


@app.command()
def predict(
    train: Annotated[Path, typer.Argument(help="CSV file with a header.")],
    query: Annotated[Path, typer.Argument(help="CSV file with the same feature columns.")],
    target: Annotated[str, typer.Option(help="The column of TRAIN to predict.")],
    features: Annotated[
        str | None, typer.Option(help="Columns to predict from, a,b,c; all others by default.")
    ] = None,
    model: Model = "auto",
    latent: Annotated[
        bool, typer.Option("--latent", help="The noise-free function, not a new observation.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Figure to write, such as out.png.")] = None,
    as_json: Json = False,
) -> None:
    """Predict a column of a CSV file.

    For each row of QUERY: mean, standard deviation and quantiles. Columns match by name, and QUERY
    may have more of them.
    """
    from pfn.library import choose_for
    from pfn.tables import read_csv, to_numbers, write_csv

    table = read_csv(train)
    names = features.split(",") if features else [name for name in table if name != target]
    if target in names:
        raise ValueError(f"Expected features other than the target {target!r}; got {names}.")
    y = to_numbers(table, [target], train)[:, 0]
    x = to_numbers(table, names, train)
    x_query = to_numbers(read_csv(query), names, query)
    network = choose_for((x, y), model)
    posterior = network.predict((x, y), x_query, latent=latent)
    columns = {"mean": posterior.mean.tolist(), "std": posterior.stddev.tolist()}
    columns |= {f"q{round(100 * p):02}": posterior.icdf(p).tolist() for p in QUANTILES}
    if out:
        write_csv(out, columns)
        _say(f"Wrote {out}: a row for each of {query}, in its order")
    if plot:
        _plot(plot, network.condition((x, y)), x_query, latent, [*names, target])
    rows = list(zip(*columns.values(), strict=True))
    if as_json:
        predictions = [dict(zip(columns, row, strict=True)) for row in rows]
        answer = {"model": network.card.name, "target": target, "features": names}
        typer.echo(json.dumps({**answer, "predictions": predictions}, indent=1))
    elif not out:
        _print_table(list(columns), [[f"{value:.5g}" for value in row] for row in rows[:SHOWN]])
        if len(rows) > SHOWN:
            typer.echo(f"{len(rows) - SHOWN} more rows; --out FILE.csv writes all.")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A file with `prior`, or FILE.py:PRIOR.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME by default.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Budget in seconds.")] = None,
    tasks: Annotated[int | None, typer.Option(help="Or the budget in tasks.")] = None,
    max_features: Annotated[int | None, typer.Option(help="Features, 1 to this.")] = None,
    max_context: Annotated[int | None, typer.Option(help="Context points, 0 to this.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the network.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the network.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; they divide width.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the whole run.")] = None,
    init: Annotated[
        str | None, typer.Option(help="Checkpoint to begin with, such as gp; else random weights.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Train a network on a prior.

    The same command continues a run that was stopped. Options replace the recipe's settings. The
    file is Python and is executed.
    """
    from pfn.recipe import load_recipe, run

    settings = {
        "seconds": seconds,
        "tasks": tasks,
        "max_features": max_features,
        "max_context": max_context,
        "width": width,
        "layers": layers,
        "heads": heads,
        "lr": lr,
        "seed": seed,
        "init": init,
    }
    loaded = load_recipe(recipe, **settings)
    folder = out or Path("runs") / loaded.name
    if (folder / "state.safetensors").exists():
        ended = (folder / "card.json").exists()
        typer.echo(f"The run in {folder} {'has ended' if ended else 'continues'}.", err=True)
    card = run(loaded, folder, device=device)
    if card:
        source = "" if card.prior else f" --prior {recipe}"
        typer.echo(f"Wrote {folder}; next: pfn certify {folder}{source}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A shipped name or a checkpoint's folder.")],
    onnx: Annotated[Path, typer.Option(help="Where to write, such as gp.onnx.")],
    standardize: Annotated[
        bool, typer.Option(help="Data set their own units; else they are in the prior's.")
    ] = True,
) -> None:
    """Write a checkpoint as ONNX graphs.

    One answers queries on a context; two beside it, -encode and -decode, keep the context.
    """
    from pfn.export import export_onnx
    from pfn.library import load

    _check_outputs(onnx, None)
    for path in export_onnx(load(model), onnx, standardize=standardize):
        typer.echo(str(path))


@app.command()
def certify(
    model: Annotated[str, typer.Argument(help="A shipped name or a checkpoint's folder.")],
    tasks: Annotated[int | None, typer.Option(help="Tasks per context size and features.")] = None,
    references: Annotated[
        Path | None, typer.Option(help="Folder that keeps the reference posteriors.")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="FILE.py:PRIOR, for a prior of your own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the tasks.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that compute references.")] = 1,
    keep_gap: Annotated[
        bool, typer.Option("--keep-gap", help="Keep the card's gap, measure all else anew.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the reliability page.")] = None,
    as_json: Json = False,
) -> None:
    """Measure gap, calibration, coherence and speed.

    The gap is to the exact posterior of the prior. All goes into the checkpoint's card.
    """
    from rich.console import Console
    from rich.progress import Progress

    from pfn.card import read_card
    from pfn.certify import certificate_table, certify_checkpoint
    from pfn.fresh_tasks import Progress as Done
    from pfn.library import find
    from pfn.recipe import load_prior
    from pfn.reliability import plot_certificate

    _check_outputs(None, plot)

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("certify")

        def report(done: Done) -> None:
            bar.update(row, description=done.stage, completed=done.done, total=done.total)

        certificate = certify_checkpoint(
            model,
            prior=load_prior(prior) if prior else None,
            keep_gap=keep_gap,
            tasks=tasks,
            seed=seed,
            references=references,
            workers=workers,
            command=_command(),
            report=report,
        )
    if plot:
        page = plot_certificate(read_card(find(model)))
        page.savefig(plot, dpi=110)
    if as_json:
        typer.echo(json.dumps(certificate, indent=1))
    else:
        Console().print(certificate_table(certificate))


@app.command()
def optimize(
    objective: Annotated[str, typer.Argument(help="module:function, or FILE.py:FUNCTION.")],
    space: Annotated[Path, typer.Option(help="TOML file, a table for each parameter.")],
    budget: Annotated[int, typer.Option(help="Evaluations, those in the storage included.")] = 50,
    surrogate: Annotated[str, typer.Option(help="pfn, gp, ..., random or sobol.")] = "pfn",
    seed: Annotated[int, typer.Option(help="Seed of the suggestions.")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="Such as sqlite:///tuning.db; the same command continues it.")
    ] = None,
    study: Annotated[str, typer.Option(help="Name of the study in the storage.")] = "pfn",
    maximize: Annotated[
        bool, typer.Option("--maximize", help="The largest value, not the smallest.")
    ] = False,
    objectives: Annotated[int, typer.Option(help="Numbers that the function returns.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes on one storage.")] = 1,
    trial_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which an evaluation has failed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file of all evaluations.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Figure to write, such as out.png.")] = None,
    as_json: Json = False,
) -> None:
    """Minimise a function of a dict of parameters.

    The function is imported and executed. Evaluations that raise, hang or return NaN are recorded
    and stepped over; if none succeeds and meets the constraints, the exit code is 1.

    A table of the TOML file has low and high, perhaps log = true or step, or it has choices, a
    list. Whole numbers are integers, unless type = "float".
    """
    _check_outputs(out, plot)
    # by its name: nothing in this package depends on that one
    loop = importlib.import_module("surrogates.optimize")
    with _printing_to_stderr() if as_json else nullcontext():
        result = loop.optimize_command(
            objective,
            space,
            largest=maximize,
            budget=budget,
            surrogate=surrogate,
            seed=seed,
            storage=storage,
            study_name=study,
            objectives=objectives,
            workers=workers,
            trial_timeout=trial_timeout,
        )
    typer.echo(json.dumps(result.summary(), indent=1) if as_json else str(result))
    if out:
        result.trace.to_csv(out, index=False)
    if plot:
        result.plot().savefig(plot, dpi=150)
    if result.interrupted:
        sys.exit(130)
    if result.x is None or len(result.x) == 0:
        sys.exit(1)


@app.command()
def extrapolate(
    curve: Annotated[Path, typer.Argument(help="CSV file, or TensorBoard log.")],
    horizon: Annotated[float, typer.Option(help="Planned number of steps.")],
    metric: Annotated[str | None, typer.Option(help="Column or scalar; the only one else.")] = None,
    step: Annotated[str | None, typer.Option(help="Column of steps.")] = None,
    mode: Annotated[str, typer.Option(help="max where higher is better, or min.")] = "max",
    low: Annotated[float | None, typer.Option(help="Lower bound of the metric.")] = None,
    high: Annotated[float | None, typer.Option(help="Upper bound of the metric.")] = None,
    best: Annotated[float | None, typer.Option(help="Value to beat, of earlier runs.")] = None,
    confidence: Annotated[float, typer.Option(help="Of a run that is stopped.")] = 0.95,
    min_delta: Annotated[float, typer.Option(help="What counts as beating.")] = 0.0,
    warmup: Annotated[int, typer.Option(help="Values before the model is asked.")] = 5,
    patience: Annotated[int, typer.Option(help="Values in a row that must speak for a stop.")] = 2,
    watch: Annotated[
        bool, typer.Option("--watch", help="Decide at each new value, until a stop or the end.")
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between looks, with --watch.")] = 5.0,
    plot: Annotated[Path | None, typer.Option(help="Figure to write, such as out.png.")] = None,
    as_json: Json = False,
) -> None:
    """The rest of a learning curve, and whether it is worth waiting for.

    A table has a header, a column of values and maybe one of steps, called step, epoch, iteration
    or n; steps 0, 1, 2 ... are counted from 1, and empty cells are skipped. Without bounds a metric
    within [0, 1] that is maximised is taken to be bounded by these, and one that is minimised and
    never negative by 0.
    """
    _check_outputs(None, plot)
    files = importlib.import_module("surrogates.curve_files")
    stopping = importlib.import_module("surrogates.stopping")
    told = set()

    def show(answer: dict[str, Any]) -> None:
        name = answer["metric"]
        words = set(re.split(r"[\W_]+", name.lower()))
        if mode == "max" and words & FALLING and "neg" not in words and name not in told:
            told.add(name)
            typer.echo(f"Taking {name} to be maximised; else pass --mode min.", err=True)
        if as_json:
            typer.echo(json.dumps(answer, indent=None if watch else 1))
            return
        if answer["steps"] and not watch:
            rows = list(zip(*(answer[key] for key in ("steps", "q05", "q50", "q95")), strict=True))
            stride = max(1, math.ceil(len(rows) / SHOWN))
            shown = rows[::-1][::stride][::-1]  # the last one among them
            _print_table(
                ["step", "5 %", "median", "95 %"], [[f"{v:.6g}" for v in row] for row in shown]
            )
        typer.echo(("Stop. " if answer["stop"] else "Go on. ") + answer["reason"])

    criterion = stopping.Criterion(
        horizon,
        mode,
        None if low is None and high is None else (low, high),
        confidence,
        min_delta,
        warmup=warmup,
        patience=patience,
    )
    ask = functools.partial(
        files.extrapolate_command,
        curve,
        criterion,
        best=best,
        metric=metric,
        step=step,
        plot=plot,
        growing=watch,
    )
    if watch:
        files.watch(ask, every=every, say=show)
    else:
        show(ask())


def _check_outputs(table: Path | None, figure: Path | None) -> None:
    """Raises a ValueError for files that could not be written, before what they are to hold."""
    for path in (table, figure):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"Expected a file in a folder that exists; got {path}.")
    if figure is not None:
        from pfn.plot import import_pyplot

        kinds = import_pyplot().Figure().canvas.get_supported_filetypes()
        if figure.suffix[1:].lower() not in kinds:
            raise ValueError(f"Expected a figure of a type among {sorted(kinds)}; got {figure}.")


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """All that this process and its children print in Python, so that stdout holds JSON alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _plot(path: Path, fitted: Fitted, x_query: Array, latent: bool, names: list[str]) -> None:
    """Saves the curve over one feature; for more, each row's interval, ordered by its mean."""
    import numpy as np

    from pfn.plot import import_pyplot, plot_rows

    plt = import_pyplot()
    plt.switch_backend("Agg")
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    x, y = fitted.context.x[0].numpy(), fitted.context.y[0].numpy()
    if x.shape[1] == 1:
        everything = np.concatenate([x, x_query])
        grid = np.linspace(everything.min(), everything.max(), 300)
        fitted.predict(grid, latent=latent).plot(grid, context=(x, y), ax=axes)
        axes.set_xlabel(names[0])
    else:
        plot_rows(fitted.predict(x_query, latent=latent), axes)
    axes.set_ylabel(f"{names[-1]}, without noise" if latent else names[-1])
    figure.savefig(path, dpi=150)


def _command() -> str:
    """The command as typed; absolute paths, which concern one machine only, left out."""
    return " ".join(["pfn", *("PATH" if os.path.isabs(word) else word for word in sys.argv[1:])])


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _say(line: str) -> None:
    typer.echo(line, err=True)
