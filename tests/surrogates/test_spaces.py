"""Distributions become columns of the unit cube, and points become parameters again."""

from pathlib import Path

import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from surrogates.spaces import Space, read_space

MIXED = {
    "rate": FloatDistribution(1e-5, 1.0, log=True),
    "shift": FloatDistribution(-3.0, 4.0),
    "share": FloatDistribution(0.0, 0.9, step=0.3),
    "width": IntDistribution(1, 1000, log=True),
    "even": IntDistribution(0, 10, step=2),
    "kind": CategoricalDistribution(["a", None, 3]),
    "many": CategoricalDistribution(range(40)),
    "only": IntDistribution(3, 3),
}


def test_every_point_decodes_to_parameters_in_range_and_encodes_to_itself():
    space = Space(MIXED)
    X = space.sobol(300, seed=0)
    params = [space.decode(x) for x in X]
    for row in params:
        assert {type(row["rate"]), type(row["share"])} == {float}
        assert {type(row["width"]), type(row["even"])} == {int}
        assert row["only"] == 3
        for name, distribution in MIXED.items():
            assert distribution._contains(distribution.to_internal_repr(row[name]))
    again = torch.stack([space.encode(row) for row in params])
    assert torch.allclose(again, X, atol=1e-12)  # a logarithm and its inverse in float64
    assert torch.equal(space.snap(X), X)


def test_columns_are_those_of_the_pretraining():
    space = Space(MIXED)
    assert space.dim == 9 and space.continuous.tolist() == [True] * 2 + [False] * 7
    x = space.encode(
        {"rate": 1e-5, "shift": 0.5, "share": 0.3, "width": 1000, "even": 4, "kind": 3, "many": 39}
    )
    assert x.tolist() == pytest.approx([0.0, 0.5, 1 / 3, 1.0, 0.4, 0.0, 0.0, 1.0, 1.0])


def test_levels_and_choices_are_equally_likely_logarithms_uniform():
    space = Space(MIXED)
    X = space.sobol(4096, seed=1)
    even = torch.bincount((X[:, 4] * 5).round().long()).double() / len(X)
    assert torch.allclose(even, torch.full((6,), 1 / 6, dtype=torch.float64), atol=0.01)
    assert torch.allclose(X[:, 5:8].mean(0), torch.full((3,), 1 / 3).double(), atol=0.01)
    assert abs(float((X[:, 3] < 0.5).double().mean()) - 0.5) < 0.03  # 31 of 1000, half the log


def test_sobol_points_continue_where_they_stopped():
    space = Space(MIXED)
    assert torch.equal(space.sobol(8, seed=3)[5:], space.sobol(3, seed=3, skip=5))


def test_neighbours_differ_in_one_discrete_parameter():
    space = Space(MIXED)
    x = space.sobol(1, seed=0)[0]
    near = space.neighbours(x)
    assert torch.equal(space.snap(near), near)
    changed = [
        {name for name, value in space.decode(row).items() if value != space.decode(x)[name]}
        for row in near
    ]
    assert all(len(names) == 1 for names in changed)
    assert set.union(*changed) == {"share", "width", "even", "kind", "many"}
    assert sum(names == {"even"} for names in changed) == 5
    assert {*space.decode(near[0])} == {*MIXED}
    assert len(space.neighbours(x, {"kind"})) == 2


def test_perturbed_points_are_valid_and_near():
    space = Space(MIXED)
    X = space.sobol(500, seed=0)
    size = torch.full((500, 1), 0.02, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    moved = space.perturb(X, size, torch.full((500, 1), 0.2, dtype=torch.float64), generator=g)
    assert torch.equal(space.snap(moved), moved)
    steps = (moved - X)[:, :2].abs()
    assert 0 < float(steps.max()) < 0.02 * 5
    assert bool((moved != X).any(-1).float().mean() > 0.9)


def test_a_finite_space_lists_its_points():
    space = Space({name: MIXED[name] for name in ("share", "even", "kind")})
    points = space.enumerate()
    assert len(points) == space.size == 4 * 6 * 3
    assert len(points.unique(dim=0)) == len(points)


def test_values_go_evenly_from_end_to_end_and_are_no_more_than_asked():
    space = Space({**MIXED, "steps": IntDistribution(0, 1000)})
    thinned = space.values("steps", 5)
    assert thinned.flatten().tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert len(space.values("rate", 7)) == 7 and len(space.values("even", 200)) == 6
    log = Space({"width": MIXED["width"]})
    assert [log.decode(x)["width"] for x in log.values("width", 4)] == [1, 10, 100, 1000]


def test_space_file(tmp_path: Path):
    path = tmp_path / "space.toml"
    path.write_text(
        "[lr]\nlow = 1e-5\nhigh = 0.1\nlog = true\n[layers]\nlow = 1\nhigh = 8\n"
        '[optimizer]\nchoices = ["adam", "sgd"]\n[drop]\ntype = "float"\nlow = 0\nhigh = 1\n'
    )
    assert read_space(path) == {
        "lr": FloatDistribution(1e-5, 0.1, log=True),
        "layers": IntDistribution(1, 8),
        "optimizer": CategoricalDistribution(["adam", "sgd"]),
        "drop": FloatDistribution(0.0, 1.0),
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lr = 1",
        "[lr]\nlow = 1",
        "[lr]\nlow = 2\nhigh = 1",
        "[lr]\nmin = 1",
        "[lr",
        '[k]\nchoices = "adam"',
        "[k]\nchoices = []",
        "[k]\nchoices = [2020-01-01, 2021-01-01]",
        "[k]\nlow = 1\nhigh = 9\nlog = 1",
        '[k]\ntype = "int"\nlow = 1\nhigh = 2.5',
    ],
)
def test_a_bad_space_file_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match="Expected"):
        read_space(path)


def test_other_distributions_are_refused():
    with pytest.raises(ValueError, match="'x'"):
        Space({"x": torch.distributions.Normal(0.0, 1.0)})
