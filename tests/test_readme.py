import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pfn.cli import app
from pfn.recipe import check_prior

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they save a figure
    torch.manual_seed(0)  # the blocks draw their data
    names: dict[str, Any] = {}
    assert len(blocks("python")) >= 5
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "posterior.png").read_bytes().startswith(b"\x89PNG")
    assert names["mean"].shape == (242,)
    assert (names["ours"].mean - names["exact"].mean).abs().max() < 0.5
    check_prior(names["my_prior"], max_features=3)


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    commands = {
        command.callback.__name__ for command in app.registered_commands if command.callback
    }
    shell = "\n".join(blocks("sh"))
    used = set(re.findall(r"(?:^|/)pfn ([a-z]+)", shell, flags=re.MULTILINE))
    known = {
        "demo",
        "models",
        "predict",
        "pretrain",
        "certify",
        "export",
        "optimize",
        "extrapolate",
    }
    assert known == used == commands
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


@pytest.mark.parametrize("path", ["README.md", "pretrained/README.md"])
def test_links_to_files_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert all(((ROOT / path).parent / link).exists() for link in links), links
