"""Packages import only from their left: priors -> pfn -> surrogates; and only what they need."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("priors", "pfn", "surrogates")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: import by the full name"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_every_package_has_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_packages_to_its_left(path: Path) -> None:
    place = PACKAGES.index(path.relative_to(ROOT).parts[0])
    assert not imported(path) & {*PACKAGES[place + 1 :], "tests", "benchmarks", "notebooks"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_that_are_imported_are_this_repositorys(package: str) -> None:
    module = importlib.import_module(package)
    assert Path(str(module.__file__)).resolve() == ROOT / package / "__init__.py"


def test_folders_of_tests_are_no_packages_and_their_files_have_different_names() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    assert not [path for path in files if path.name == "__init__.py"]
    names = [path.name for path in files if path.name != "conftest.py"]
    assert len(names) == len(set(names))


def test_pretraining_and_predicting_need_only_the_core_dependencies() -> None:
    code = """
import sys, priors, pfn, pfn.pretrain
pfn.predict, pfn.load, pfn.PFN, pfn.Predictive  # each imported on first use
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"torch", "priors", "pfn"} <= loaded
    extras = {"jax", "numpyro", "pyro", "gpytorch", "botorch", "sklearn", "matplotlib", "pandas"}
    assert not loaded & extras
