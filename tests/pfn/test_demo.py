"""The demo's scores on a predictive that is right, its tables, and its figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from pfn.demo import Score, draw_calibration, draw_terrain, load_tables, predict_by_gp, score


def score_of_the_truth(m: int) -> Score:
    """The score of Normal(0, 2^2) on m of its own draws."""
    y = 2 * np.random.default_rng(0).standard_normal(m)
    truth = Normal(torch.zeros(m).double(), torch.full((m,), 2.0).double())
    return score(lambda x, y, x_query: truth, np.zeros((1, 1)), np.zeros(1), np.zeros((m, 1)), y)


def test_scores_of_the_true_distribution_are_its_entropy_deviation_and_coverage() -> None:
    m = 20_000
    scores = score_of_the_truth(m)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 4)
    assert scores.nll == pytest.approx(entropy, abs=4 * math.sqrt(0.5 / m))
    assert scores.rmse == pytest.approx(2, abs=4 * math.sqrt(2 / m))
    lower, upper = scores.interval
    inside = (lower <= scores.truth) & (scores.truth <= upper)
    assert float(inside.double().mean()) == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / m))
    assert torch.equal((scores.pit - 0.5).abs() <= 0.45, inside)


def test_tables_are_finite_with_targets_of_unit_variance() -> None:
    for name, (x, y) in load_tables().items():
        assert x.ndim == 2 and len(x) == len(y) > 100, name
        assert np.isfinite(x).all() and y.std() == pytest.approx(1), name


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # by linear_operator
def test_the_rival_fits_a_line_and_its_noise() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(60, 1))
    y = 3 * x[:, 0] + 0.1 * rng.standard_normal(60)
    predictive = predict_by_gp(x, y, np.array([[0.25], [0.75]]))
    assert predictive.mean.tolist() == pytest.approx([0.75, 2.25], abs=0.1)  # one noise
    assert ((predictive.stddev > 0.07) & (predictive.stddev < 0.15)).all()  # 0.1, to a third


def test_figures_are_saved(tmp_path: Path) -> None:
    scores = {("diabetes", name): [score_of_the_truth(50)] for name in ("pfn", "SingleTaskGP")}
    draw_calibration(scores, tmp_path / "calibration.png")
    draw_terrain(tmp_path / "terrain.png")
    for name in ("calibration.png", "terrain.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
