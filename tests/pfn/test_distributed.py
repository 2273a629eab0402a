"""Two processes follow the loss curve of one process, also if one of them is killed on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pfn.pretrain import PretrainConfig, Progress, pretrain
from priors import GaussianProcess

CONFIG = PretrainConfig(
    max_features=2,
    max_context=12,
    width=16,
    layers=2,
    heads=2,
    expansion=1,
    fourier_octaves=2,
    components=3,
    tasks=500,
    queries=8,
    tokens=384,
    micro_batches=3,  # two for one process, one for the other
    bf16=False,
    save_every=0.0,  # seconds: after each step
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or who starts anew finds addresses of the dead
}
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
import pfn.pretrain
from pfn.pretrain import PretrainConfig, pretrain
from priors import GaussianProcess

torch.set_num_threads(1)
plan, lives = pfn.pretrain.plan, int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def die_at(config, step, part):
    if (step, os.environ["RANK"], lives) == (5, sys.argv[3], 0):
        os.kill(os.getpid(), signal.SIGKILL)
    return plan(config, step, part)

pfn.pretrain.plan = die_at
out = Path(sys.argv[2])
steps = []
model = pretrain(GaussianProcess(), PretrainConfig(**json.loads(sys.argv[1])), out, device="cpu",
                 report=steps.append)
rank = torch.distributed.get_rank()
curve = [[step.step, step.tasks, step.loss, step.excess] for step in steps]
(out / f"rank-{rank}.json").write_text(json.dumps(curve))
torch.save(model.state_dict(), out / f"rank-{rank}.pt")
torch.distributed.destroy_process_group()
"""


def run_two(out: Path, *, killed: str = "none") -> list[list[float]]:
    """The loss curve of two processes, started anew by the launcher if that of a rank is killed."""
    out.mkdir()
    script = out / "train.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", "1"]
    subprocess.run(
        [sys.executable, *launch, str(script), json.dumps(asdict(CONFIG)), str(out), killed],
        env=os.environ | ENVIRONMENT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert json.loads((out / "rank-1.json").read_text()) == []  # only the first one reports
    curve: list[list[float]] = json.loads((out / "rank-0.json").read_text())
    return curve


def weights_of(out: Path, rank: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(out / f"rank-{rank}.pt", weights_only=True)
    return weights


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    out = tmp_path_factory.mktemp("runs") / "two"
    return out, run_two(out)


def test_two_processes_follow_the_loss_curve_of_one(
    tmp_path: Path, two: tuple[Path, list[list[float]]]
) -> None:
    out, together = two
    steps: list[Progress] = []
    alone = pretrain(GaussianProcess(), CONFIG, tmp_path / "one", device="cpu", report=steps.append)
    assert [row[:2] for row in together] == [[step.step, step.tasks] for step in steps]
    # Gradients are summed in another order: float32 rounding, which a dozen steps enlarge.
    curve = torch.tensor([row[2:] for row in together])
    expected = torch.tensor([[step.loss, step.excess] for step in steps])
    torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-4)
    first, second = (weights_of(out, rank) for rank in (0, 1))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])  # the processes never drift apart
        # half a step of lr = 2e-3 at most, where a gradient near 0 gets another sign by rounding
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_worker_is_killed_goes_on_to_the_same_weights(
    tmp_path: Path, two: tuple[Path, list[list[float]]], rank: int
) -> None:
    out, whole = two
    broken = run_two(tmp_path / "broken", killed=str(rank))
    assert whole[0][0] == 1
    assert broken[0][0] in (5, 6)  # the first step after the last state that was whole
    assert broken == whole[-len(broken) :]
    for each in (0, 1):
        weights = weights_of(tmp_path / "broken", each)
        for name, value in weights_of(out, each).items():
            assert torch.equal(weights[name], value)
