"""Curves from files, and `pfn extrapolate` as a process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from surrogates.curve_files import extrapolate_command, read_curve, watch
from surrogates.stopping import Criterion, StopRule

GOOD = 0.9 - 0.6 / np.sqrt(np.arange(1.0, 21))
POOR = 0.5 - 0.3 * 0.6 ** np.arange(20)


def write(path: Path, values, steps=None, name: str = "val_acc") -> Path:
    rows = ["step," + name] + [
        f"{step},{value}" for step, value in zip(steps or range(1, 99), values, strict=False)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


def pfn(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pfn", "extrapolate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_tables_with_and_without_steps(tmp_path) -> None:
    path = write(tmp_path / "a.csv", [0.1, 0.2, 0.3], [10, 20, 30])
    seen = read_curve(path)
    assert seen.name == "val_acc"
    assert seen.steps.tolist() == [10, 20, 30] and seen.values.tolist() == [0.1, 0.2, 0.3]
    (tmp_path / "b.csv").write_text("loss\n1.0\n\nnan\n0.5\n")
    alone = read_curve(tmp_path / "b.csv")
    assert alone.steps is None and np.isnan(alone.values[1]) and len(alone.values) == 3


def test_rows_out_of_order_repeated_or_counted_from_nothing(tmp_path) -> None:
    path = write(tmp_path / "a.csv", [0.3, 0.1, 0.2, 0.25], [2, 0, 1, 1])
    seen = read_curve(path)
    assert seen.steps.tolist() == [1, 2, 3] and seen.values.tolist() == [0.1, 0.25, 0.3]


def test_the_metric_is_chosen_by_name_and_lightnings_gaps_are_kept_out(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,train,val\n0,2.0,\n0,,0.4\n1,1.5,\n1,,0.5\n")
    with pytest.raises(ValueError, match="--metric, one of the columns"):
        read_curve(path)
    with pytest.raises(ValueError, match="'test'"):
        read_curve(path, "test")
    assert read_curve(path, "val").values.tolist() == [0.4, 0.5]
    assert read_curve(path, "val").steps.tolist() == [1, 2]


def test_cells_that_are_empty_are_no_values_but_nan_is_one(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,train,val\n0,,0.4\n0,2.0,\n1,,nan\n1,1.5,\n2,,0.6\n2,1.4,\n")
    seen = read_curve(path, "val")
    assert seen.steps.tolist() == [1, 2, 3] and seen.values[[0, 2]].tolist() == [0.4, 0.6]
    assert np.isnan(seen.values[1])
    path.write_text("step,acc\n,0.5\n")
    with pytest.raises(ValueError, match="there are none"):
        read_curve(path)


def test_a_step_0_before_the_training_is_left_out(tmp_path) -> None:
    path = write(tmp_path / "a.csv", [0.1, 0.3, 0.4], [0, 500, 1000])
    seen = read_curve(path)
    assert seen.steps.tolist() == [500, 1000] and seen.values.tolist() == [0.3, 0.4]


def test_tensorboard_logs(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in enumerate(GOOD[:6]):
            writer.add_scalar("val/acc", value, step)
            writer.add_scalar("loss", 1.0, step)
    seen = read_curve(tmp_path, "val/acc")
    assert seen.steps.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(seen.values, GOOD[:6], rtol=1e-6)
    with pytest.raises(ValueError, match="one of the scalars"):
        read_curve(tmp_path)


def test_the_command_prints_json_and_draws(tmp_path) -> None:
    path = write(tmp_path / "c.csv", POOR)
    figure = tmp_path / "c.png"
    done = pfn(path, "--horizon", 40, "--best", 0.85, "--plot", figure, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["stop"] and answer["observed"] == 20 and len(answer["q50"]) == 20
    assert answer["q05"][-1] < answer["q50"][-1] < answer["q95"][-1]
    assert answer["probability"] < 0.05 and "0.85" in answer["reason"]
    assert figure.stat().st_size > 5000
    words = pfn(path, "--horizon", 40, "--best", 0.55)
    assert words.returncode == 0 and ("Stop." in words.stdout or "Go on." in words.stdout)
    assert "median" in words.stdout


def test_bad_input_ends_with_one_line_and_code_2(tmp_path) -> None:
    path = write(tmp_path / "c.csv", POOR)
    for arguments, words in (
        ((tmp_path / "none.csv", "--horizon", 40), "there is no file"),
        ((path, "--horizon", 5), "horizon of at least"),
        ((path, "--horizon", 40, "--mode", "up"), "mode among"),
        ((path, "--horizon", 40, "--low", 0.3), "within the bounds"),
        ((path, "--horizon", 40, "--plot", tmp_path / "x.abc"), "figure of a type"),
    ):
        done = pfn(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert words in done.stderr and done.stderr.count("\n") == 1


def test_watching_a_growing_table_ends_at_the_stop(tmp_path) -> None:
    path = tmp_path / "growing.csv"

    def grow() -> None:
        for count in range(4, 21, 4):
            write(path, POOR[:count])
            time.sleep(0.3)

    writer = threading.Thread(target=grow)
    writer.start()
    done = pfn(path, "--horizon", 40, "--best", 0.9, "--watch", "--every", 0.1, "--json")
    writer.join()
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[-1]["stop"] and not any(a["stop"] for a in answers[:-1])
    assert all(math.isfinite(q) for a in answers for q in a["q50"])


def test_watching_waits_for_a_file_and_for_what_is_being_written(tmp_path) -> None:
    path, looks, said = tmp_path / "slow.csv", iter(range(100)), []
    contents = ["", "step,accu", "step,accuracy\n1,0.5\n2", "step,accuracy\n1,0.5\n2,0."]

    def ask() -> dict:
        look = next(looks)
        if 1 <= look <= len(contents):
            path.write_text(contents[look - 1])
        elif look:
            write(path, POOR[:12])
        return extrapolate_command(path, Criterion(40), best=0.9, growing=True)

    answer = watch(ask, every=0.0, say=said.append)
    # of the row that was never whole nothing was seen
    assert answer["stop"] and [a["observed"] for a in said] == [1, 12]
    path.write_text("step,accuracy\n1,0.5\n2\n")
    with pytest.raises(ValueError, match="Expected 2 values as in the header"):
        watch(lambda: extrapolate_command(path, Criterion(40), best=0.9), every=0.0, say=print)


def test_a_file_is_judged_as_an_update_after_each_row_would_be(tmp_path) -> None:
    rule = StopRule(40, best=0.9)
    for count in range(1, 13):
        decision = rule.update(POOR[count - 1])
        answer = extrapolate_command(
            write(tmp_path / "c.csv", POOR[:count]), rule.criterion, best=0.9
        )
        assert answer["stop"] == decision.stop and answer["reason"] == decision.reason
        if decision.stop:
            break
    assert decision.stop and count > 6


def test_a_last_row_without_an_end_counts_once_the_file_has_rested(tmp_path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("acc\n0.5\n0.6")
    assert read_curve(path, growing=True).values.tolist() == [0.5]
    os.utime(path, (time.time() - 60,) * 2)
    assert read_curve(path, growing=True).values.tolist() == [0.5, 0.6]


def test_a_table_needs_a_header_and_one_column_of_steps(tmp_path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("0.31\n0.47\n")
    with pytest.raises(ValueError, match="Expected a header"):
        read_curve(path)
    path.write_text("epoch,step,acc\n0,100,0.3\n1,200,0.4\n1,300,0.5\n")
    with pytest.raises(ValueError, match="Expected --step, one of the columns"):
        read_curve(path, "acc")
    assert read_curve(path, "acc", "step").steps.tolist() == [100, 200, 300]
    assert read_curve(path, "acc", "epoch").values.tolist() == [0.3, 0.5]
    with pytest.raises(ValueError, match="Expected --step among"):
        read_curve(path, "acc", "time")
    path.write_text(",step,acc\n10,1,0.3\n20,2,0.4\n")
    assert read_curve(path, "acc", "").steps.tolist() == [10, 20]
    with pytest.raises(ValueError, match="for a table only"):
        read_curve(tmp_path, "acc", "step")


def test_a_loss_that_is_maximised_is_asked_about(tmp_path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("epoch,val_loss\n" + "".join(f"{i},{2 / i}\n" for i in range(1, 9)))
    assert "else pass --mode min" in pfn(path, "--horizon", 40).stderr
    assert pfn(path, "--horizon", 40, "--mode", "min").stderr == ""
