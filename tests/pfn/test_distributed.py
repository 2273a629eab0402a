"""Two processes on one machine follow the loss curve of one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from pfn.pretrain import PretrainConfig, pretrain
from priors import GaussianProcess

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from pfn.pretrain import PretrainConfig, pretrain
from priors import GaussianProcess

torch.set_num_threads(1)
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


def test_two_processes_follow_the_loss_curve_of_one(tmp_path: Path) -> None:
    config = PretrainConfig(
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
    )
    out = tmp_path / "two"
    out.mkdir()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *launch, str(script), json.dumps(asdict(config)), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        check=True,
        capture_output=True,
        timeout=300,
    )
    steps = []
    alone = pretrain(GaussianProcess(), config, tmp_path / "one", device="cpu", report=steps.append)
    together = json.loads((out / "rank-0.json").read_text())
    assert [row[:2] for row in together] == [[step.step, step.tasks] for step in steps]
    assert json.loads((out / "rank-1.json").read_text()) == []  # only the first one reports
    # Gradients are summed in another order: float32 rounding, which a dozen steps enlarge.
    curve = torch.tensor([row[2:] for row in together])
    expected = torch.tensor([[step.loss, step.excess] for step in steps])
    torch.testing.assert_close(curve, expected, rtol=1e-4, atol=1e-4)
    first, second = (torch.load(out / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])  # the processes never drift apart
        # half a step of lr = 2e-3 at most, where a gradient near 0 gets another sign by rounding
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-3)
