import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pfn

ROOT = Path(__file__).parent.parent
PACKAGES = ("priors", "pfn", "surrogates")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_each_dependency_without_build_or_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    pinned = {normalised(pin.partition("==")[0]) for pin in pins}
    declared = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    names = {normalised(re.match(r"[A-Za-z0-9._-]+", one)[0]) for one in declared} - {"pfn"}  # type: ignore[index]
    assert names <= pinned


def test_extra_all_has_every_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    listed = re.search(r"\[(.*)\]", extras["all"][0])
    assert listed is not None
    assert set(listed[1].split(",")) == set(extras) - {"all"}


def test_wheel_works_without_the_repository(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    install = "-m pip install --quiet --no-deps --no-index --target".split()
    subprocess.run([sys.executable, *install, tmp_path / "installed", wheel], check=True)
    assert all(name.startswith((*PACKAGES, "pfn-")) for name in names)
    shipped = {path.parent.name for path in (ROOT / "pretrained").glob("*/card.json")}
    for name in shipped:
        inside = {Path(n).name for n in names if n.startswith(f"pfn/pretrained/{name}/")}
        assert inside == {"card.json", "model.safetensors"}

    code = (
        "import pfn, priors, surrogates\n"
        "print(pfn.__file__, priors.__file__, surrogates.__file__)\n"
        "print(sorted(card.name for card in pfn.models()), pfn.__version__)\n"
        "print([pfn.load(card.name).prior is not None for card in pfn.models()])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert all(path.startswith(str(tmp_path / "installed")) for path in printed[0].split())
    assert printed[1] == f"{sorted(shipped)} {pfn.__version__}"
    assert f"pfn-{pfn.__version__}-py3-none-any.whl" == wheel.name
    assert printed[2] == str([True] * len(shipped))
