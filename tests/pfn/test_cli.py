import ast
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pfn
from pfn.cli import main
from pfn.library import load
from pfn.recipe import load_recipe

MY_PRIOR = """
import torch
from priors import Tasks

class Lines:
    def sample(self, batch, n, d, *, generator):
        x = torch.rand(batch, n, d, generator=generator, dtype=torch.float64)
        slope = torch.randn(batch, d, generator=generator, dtype=torch.float64)
        f = (x * slope.unsqueeze(1)).sum(-1)
        noise = 0.1 * torch.randn(batch, n, generator=generator, dtype=torch.float64)
        return Tasks(x, f + noise, f, {"slope": slope})

my_prior = Lines
"""
TINY = "--width 16 --layers 1 --heads 2 --tasks 100 --max-context 16 --max-features 2".split()


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of `pfn words`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["pfn", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """A training and a query table, the second with other order and one more column."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 30))
    train, query = tmp_path / "train.csv", tmp_path / "query.csv"
    rows = [f"{u!r},{v!r},{u - v!r}" for u, v in zip(a.tolist(), b.tolist(), strict=True)]
    train.write_text("\n".join(["a,b,y", *rows]) + "\n")
    query.write_text("name;b;a\nfirst;0.25;0.5\nsecond;0.75;0.125\n")
    return train, query


def test_help_imports_nothing_slow() -> None:
    printed = run_python(
        "import sys\n"
        "from pfn.cli import main\n"
        "sys.argv = ['pfn', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'rich', 'priors', 'surrogates'} & sys.modules.keys()))"
    )
    assert "pretrain" in printed
    assert printed.splitlines()[-1] == "[]"


def test_importing_pfn_adds_only_itself_to_torch() -> None:
    printed = run_python(
        "import sys, torch, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import pfn; pfn.predict, pfn.load, pfn.PFN\n"
        "added = {name.split('.')[0] for name in sys.modules.keys() - before}\n"
        "print(sorted(added - sys.stdlib_module_names))"
    )
    assert set(ast.literal_eval(printed)) <= {"numpy", "pfn", "priors"}


def test_command_line_asks_for_passive_waiting_unless_told_otherwise() -> None:
    code = "import os; {} import pfn.cli; print(os.environ['OMP_WAIT_POLICY'])"
    assert run_python(code.format("os.environ.pop('OMP_WAIT_POLICY', None);")) == "PASSIVE\n"
    assert run_python(code.format("os.environ['OMP_WAIT_POLICY'] = 'ACTIVE';")) == "ACTIVE\n"


def test_predict_matches_columns_by_name_and_agrees_with_the_library(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: tuple[Path, Path],
    untrained: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.csv"
    words = ["predict", *data, "--target", "y", "--model", untrained, "--json", "--out", out]
    assert run(monkeypatch, *words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["features"] == ["a", "b"]
    table = np.loadtxt(data[0], delimiter=",", skiprows=1)
    expected = load(untrained).predict((table[:, :2], table[:, 2]), [[0.5, 0.25], [0.125, 0.75]])
    columns = {"mean": expected.mean, "std": expected.stddev}
    columns |= {name: expected.icdf(p) for name, p in (("q05", 0.05), ("q50", 0.5), ("q95", 0.95))}
    for name, values in columns.items():
        found = torch.tensor([row[name] for row in answer["predictions"]])
        torch.testing.assert_close(found, values.float(), rtol=1e-5, atol=1e-5)  # float32 network
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == answer["predictions"]


def test_predict_prints_a_table(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data: tuple[Path, Path],
    untrained: Path,
) -> None:
    assert run(monkeypatch, "predict", *data, "--target", "y", "--model", untrained) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("mean", "std", "q05", "q50", "q95"))


@pytest.mark.parametrize("features", ["a", "a,b"])
def test_predict_draws_one_feature_and_many(
    monkeypatch: pytest.MonkeyPatch,
    data: tuple[Path, Path],
    untrained: Path,
    tmp_path: Path,
    features: str,
) -> None:
    out = tmp_path / "out.png"
    words = ["--target", "y", "--features", features, "--model", untrained, "--plot", out]
    assert run(monkeypatch, "predict", *data, *words) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("train", "query", "options", "reason"),
    [
        (None, "a\n1\n", [], "no file"),
        ("", "a\n1\n", [], "header"),
        ("a,y\n", "a\n1\n", [], "rows below the header"),
        ("a,a,y\n1,2,3\n", "a\n1\n", [], "distinct names"),
        ("a,y\n1,2\n3\n", "a\n1\n", [], "line 3"),
        ("a,y\n1,red\n", "a\n1\n", [], "'red'"),
        ("a,y\n1,nan\n", "a\n1\n", [], "finite"),
        ("a,y\n1,2\n", "b\n1\n", [], "['a']"),
        ("a,z\n1,2\n", "a\n1\n", [], "'y'"),
        ("a,y\n1,2\n", "a\n1\n", ["--features", "c"], "'c'"),
        ("a,y\n1,2\n", "a\n1\n", ["--features", "a,y"], "other than the target 'y'"),
        ("y\n1\n", "y\n1\n", [], "feature"),
        ("a,y\n1,2\n", "a\n1\n", ["--model", "no-such-model"], "no-such-model"),
        ("a,y\n1,2\n", "a\n1\n", ["--out", "no-such-folder/out.csv"], "no-such-folder"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    untrained: Path,
    train: str | None,
    query: str,
    options: list[str],
    reason: str,
) -> None:
    if train is not None:
        (tmp_path / "train.csv").write_text(train)
    (tmp_path / "query.csv").write_text(query)
    files = tmp_path / "train.csv", tmp_path / "query.csv"
    words = ["predict", *files, "--target", "y", "--model", untrained, *options]
    assert run(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1
    assert reason in printed.err


def test_models_prints_cards_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "models", "--json") == 0
    cards = json.loads(capsys.readouterr().out)
    assert [card["name"] for card in cards] == [card.name for card in pfn.models()]


def test_a_prior_of_your_own_is_pretrained_kept_and_certified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MY_PRIOR)
    source, out = f"{tmp_path / 'mine.py'}:my_prior", tmp_path / "out"
    assert run(monkeypatch, "pretrain", source, *TINY, "--out", out) == 0
    card = load(out).card
    assert card.name == "my_prior" and card.prior is None
    assert card.training["tasks"] >= 100
    assert card.training["recipe"]["width"] == 16
    assert [latent.name for latent in card.architecture.latents] == ["slope"]
    assert load(out).predict(([0.0, 1.0], [0.0, 1.0]), [0.5]).mean.isfinite().all()

    written = (out / "card.json").read_bytes()
    capsys.readouterr()
    assert run(monkeypatch, "pretrain", source, *TINY, "--out", out) == 0
    assert f"The run in {out} has ended." in capsys.readouterr().err
    assert (out / "card.json").read_bytes() == written

    capsys.readouterr()
    assert run(monkeypatch, "pretrain", source, *TINY, "--lr", "1e-3", "--out", out) == 2
    assert "Choose another output folder" in capsys.readouterr().err

    page = tmp_path / "page.png"
    assert run(monkeypatch, "certify", out, "--prior", source, "--json", "--plot", page) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["gap"] is None  # the prior has no posterior
    assert load(out).card.certificate == certificate
    assert page.read_bytes()[1:4] == b"PNG"


def test_a_recipe_may_import_all_of_priors(tmp_path: Path) -> None:
    path = tmp_path / "lines.py"
    path.write_text("from priors import *\nmy_prior = Linear()\n")  # a module `config` among them
    assert load_recipe(f"{path}:my_prior").name == "my_prior"


@pytest.mark.parametrize(
    ("content", "attribute", "reason"),
    [
        ("prior = 1", "", "sample"),
        ("my_prior = 1", "", "'prior'"),
        ("1 / 0", "", "line 1"),
        ("prior = None\nconfig = 3", "", "PretrainConfig"),
        ("class prior:\n  def sample(self, b, n, d, *, generator): return n / 0", "", "line 2"),
        (MY_PRIOR.replace("f, {", "f[0], {"), ":my_prior", "shape (3, 7)"),
        (MY_PRIOR.replace("generator=generator, ", ""), ":my_prior", "generator"),
        (MY_PRIOR.replace("0.1 *", "1e400 *"), ":my_prior", "finite"),
    ],
)
def test_a_recipe_that_is_no_prior_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: str,
    attribute: str,
    reason: str,
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(content)
    assert run(monkeypatch, "pretrain", f"{path}{attribute}", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error
