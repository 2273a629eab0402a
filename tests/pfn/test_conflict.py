"""The check against the prior: calibrated on its data, and with power where a person sees it."""

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import pfn
import pfn.model
from pfn.conflict import (
    PriorDataConflict,
    draw_null,
    outside_box,
    tail_probability,
    with_latents,
)
from pfn.diagnostics import ks_test
from pfn.evidence import DataSets
from priors import BNN, NNGP, GaussianProcess, Linear, Prior, Tasks


@pytest.fixture(scope="module")
def model() -> pfn.PFN:
    return pfn.load("gp-1d")


def test_p_values_are_uniform_on_the_priors_own_data(model: pfn.PFN) -> None:
    tasks = model.prior.sample(100, 8, 1, generator=torch.Generator().manual_seed(0))
    p_values = torch.tensor(
        [
            model.condition((x, y)).check(draws=19, seed=i).p_value
            for i, (x, y) in enumerate(zip(tasks.x, tasks.y, strict=True))
        ]
    )
    # a rank among 20, at random within its step
    jitter = torch.rand(100, generator=torch.Generator().manual_seed(1)) / 20
    assert ks_test((p_values - jitter).clamp(0, 1)).p_value > 1e-3


def smooth(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, a smooth function with spread 1, and standard normal noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, dtype=torch.float64, generator=generator)
    f = torch.sin(2 * torch.pi * (x + seed / 7)) * 1.4
    return x, f, torch.randn(n, dtype=torch.float64, generator=generator)


def an_outlier(x: Tensor, f: Tensor, e: Tensor) -> Tensor:
    y = f + 0.1 * e
    y[7] += 2.0
    return y


def noise_on_the_right(x: Tensor, f: Tensor, e: Tensor) -> Tensor:
    return f + torch.where(x > 0.5, 0.6, 0.03) * e


def a_jump(x: Tensor, f: Tensor, e: Tensor) -> Tensor:
    return f + 0.05 * e + 5.0 * (x > 0.5)


@pytest.mark.parametrize(
    ("misfit", "named"),
    [(an_outlier, "outlier"), (noise_on_the_right, "pattern"), (a_jump, "tails")],
)
def test_misfits_are_caught(model: pfn.PFN, misfit, named: str) -> None:
    x, f, e = smooth(50, 1)
    check = model.condition((x, misfit(x, f, e))).check()
    assert check.verdict == "conflict"
    assert check.p_values[named] <= 0.01


def test_a_tail_probability_is_a_rank_that_goes_on_beyond_the_largest() -> None:
    values = torch.linspace(0, 1, 1000).unsqueeze(1)
    shares = tail_probability(values).squeeze(1)
    torch.testing.assert_close(shares[:900], 1 - torch.arange(900) / 1000, check_dtype=False)
    assert bool((shares.diff() <= 0).all())
    far = tail_probability(torch.cat([values, torch.tensor([[9.0]])]))
    assert float(far[-1]) < 1e-6


def test_smooth_data_are_consistent(model: pfn.PFN) -> None:
    assert model.condition(smooth_data(1)).check().verdict == "consistent"


def test_what_is_clear_after_a_fifth_of_the_draws_takes_no_more(
    model: pfn.PFN, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def counted(*args: Any) -> DataSets:
        drawn.append(args[4])
        return draw_null(*args)

    monkeypatch.setattr(pfn.model, "draw_null", counted)
    x, f, e = smooth(20, 5)
    assert model.condition((x, f + 0.1 * e)).check(draws=199).p_value > 0.25
    assert drawn == [39]
    drawn.clear()
    assert model.condition((x, an_outlier(x, f, e))).check(draws=199).p_value < 0.05
    assert drawn == [39, 160]


def smooth_data(seed: int) -> tuple[Tensor, Tensor]:
    x, f, e = smooth(50, seed)
    return x, f + 0.1 * e


def test_the_row_that_surprises_is_named(model: pfn.PFN) -> None:
    x, f, e = smooth(50, 0)
    check = model.condition((x, an_outlier(x, f, e))).check()
    assert check.row == 7
    assert "row 7" in check.reason
    assert check.z.shape == check.pit.shape == (50,)
    assert min(float(check.pit[7]), 1 - float(check.pit[7])) < 1e-3


def test_predict_warns_of_a_conflict_once(model: pfn.PFN) -> None:
    x, f, e = smooth(50, 0)
    fitted = model.condition((x, an_outlier(x, f, e)))
    fitted.predict([0.5])
    fitted.check(draws=59)
    with pytest.warns(PriorDataConflict, match="row 7"):
        fitted.predict([0.5])
    fitted.predict([0.5])  # warnings are errors here


def test_features_of_a_data_frame_are_named(model: pfn.PFN) -> None:
    x, f, e = smooth(50, 2)
    table = pd.DataFrame({"depth": x.numpy()})
    fitted = model.condition((table, noise_on_the_right(x, f, e)))
    check = fitted.check()
    assert repr(fitted) == "Fitted('gp-1d', n = 50, d = 1)"
    assert repr(check).startswith("Check('conflict', p_value=0.0")
    assert "range of feature 'depth'" in check.reason


def test_distances_of_the_query_are_told(model: pfn.PFN) -> None:
    x, f, e = smooth(30, 0)
    fitted = model.condition((10 + 5 * x, f + 0.1 * e), bounds=[[10.0], [15.0]])
    check = fitted.check([12.0, 17.5], draws=19)
    torch.testing.assert_close(check.query_outside, torch.tensor([0.0, 0.5]).double())
    assert check.query_distance[1] > 0.49
    assert "1 input lies more than 0.25 widths outside" in check.reason
    assert not check.outside.any()
    far = outside_box(torch.tensor([[0.5, 0.5], [-0.3, 1.4], [2.0, 0.0]]))
    torch.testing.assert_close(far, torch.tensor([0.0, 0.5, 1.0]))


def test_a_wrong_noise_that_is_given_is_caught(model: pfn.PFN) -> None:
    x, f, e = smooth(60, 1)
    y = f + 0.1 * e
    right = model.condition((x, y), standardize=False, given={"noise": 0.01}).check()
    wrong = model.condition((x, y), standardize=False, given={"noise": 1.0}).check()
    assert right.verdict == "consistent"
    assert wrong.verdict == "conflict"


class Lines:
    """A prior of someone's own: it cannot draw at given inputs."""

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        x = torch.rand(batch, n, d, generator=generator)
        f = torch.randn(batch, 1, generator=generator) * x.sum(-1)
        return Tasks(x, f + 0.1 * torch.randn(batch, n, generator=generator), f, {})


def test_a_check_can_meet_gradients(model: pfn.PFN) -> None:
    weight = torch.ones(12, requires_grad=True)
    check = model.condition(smooth_data(0)).check([0.5], draws=19)
    (check.z[:12] * weight).sum().backward()
    assert weight.grad is not None
    check.query_distance.mul_(2)


@pytest.mark.parametrize("added", [False, True])
def test_distances_go_on_beyond_the_networks_reach(model: pfn.PFN, added: bool) -> None:
    x, y = smooth_data(0)
    fitted = model.condition((x, y), bounds=[[0.0], [1.0]])
    if added:
        fitted = fitted.extend([31.0], [0.0])
    check = fitted.check([51.0, 1e6], draws=19)
    torch.testing.assert_close(check.query_outside, torch.tensor([50.0, 1e6 - 1]).double())
    assert float(check.query_distance[0]) == pytest.approx(20 if added else 51 - float(x.max()))
    assert len(check.outside) == len(x) + added


def test_given_latents_are_those_of_the_data_sets_they_are_checked_with() -> None:
    prior = GaussianProcess(ard=False, scale_with_dimension=True)
    same = with_latents(prior, {"lengthscale": 1.5, "noise": 0.2}, 9)
    fixed = same.draw_hyperparameters(2, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fixed["lengthscale"], torch.full((2,), 1.5).double())
    torch.testing.assert_close(fixed["noise"], torch.full((2,), 0.2).double())
    kernels = GaussianProcess(kernel=("rbf", "matern52"))
    assert with_latents(kernels, {"kernel": 1}, 2).kernel == "matern52"
    assert with_latents(NNGP(depth=(1, 3)), {"depth": 1}, 2).depth == 3


@pytest.mark.parametrize("kernel", ["matern52", 1])
def test_a_kernel_can_be_given_to_a_check(kernel: str | int) -> None:
    many, (x, y) = pfn.load("gp"), smooth_data(0)
    inputs = torch.stack([x, x.flip(0)], 1)
    check = many.condition((inputs, y), given={"kernel": kernel}).check(draws=19)
    assert 0 < check.p_value <= 1


def test_a_prior_that_only_samples_is_checked_at_its_own_inputs() -> None:
    loaded = pfn.load("pretrained/small/linear")
    model = pfn.PFN(loaded.transformer, loaded.card, Lines())
    x, generator = torch.linspace(0, 1, 30), torch.Generator().manual_seed(0)
    straight = model.condition((x, 2 * x + 0.1 * torch.randn(30, generator=generator))).check()
    bent = model.condition((x, torch.sin(20 * x))).check()
    assert straight.verdict == "consistent"
    assert bent.verdict == "conflict"
    assert bent.p_values["structure"] <= 0.01


@pytest.mark.parametrize("prior", [GaussianProcess(), BNN(), Linear(), NNGP()])
def test_priors_draw_at_given_inputs_as_they_sample(prior: Prior) -> None:
    """Products y_1 y_2 at pairs of inputs have the mean that those of samples there have."""
    count, generator = 4000, torch.Generator().manual_seed(0)
    tasks = prior.sample(count, 2, 1, generator=generator)
    again = prior.sample_at(tasks.x, generator=generator)
    for first, second in ((0, 0), (0, 1)):
        ours, theirs = (y[:, first] * y[:, second] for y in (again, tasks.y))
        limit = torch.cat([ours, theirs]).abs().quantile(0.99)  # a few huge tasks decide nothing
        ours, theirs = ours.clamp(-limit, limit), theirs.clamp(-limit, limit)
        error = float(((ours.var() + theirs.var()) / count).sqrt())
        assert abs(float(ours.mean() - theirs.mean())) < 4.5 * error
    apart = (again[:, 0] * again[:, 1]).clamp(-limit, limit).mean()
    assert float(apart) > 0  # the two are of one function


def test_a_check_after_points_were_added_keeps_the_units_of_the_context(model: pfn.PFN) -> None:
    tasks = model.prior.sample(80, 10, 1, generator=torch.Generator().manual_seed(2))
    p_values = []
    for i, (x, y) in enumerate(zip(tasks.x, tasks.y, strict=True)):
        fitted = model.condition((x[:5], y[:5])).extend(x[5:], y[5:])
        p_values.append(fitted.check(draws=19, seed=i).p_value)
    jitter = torch.rand(80, generator=torch.Generator().manual_seed(1)) / 20
    assert ks_test((torch.tensor(p_values) - jitter).clamp(0, 1)).p_value > 1e-3


def test_bad_requests(model: pfn.PFN) -> None:
    with pytest.raises(ValueError, match="at least 4 points to check; got 3"):
        model.condition(([0.1, 0.2, 0.3], [0.0, 1.0, 2.0])).check()
    for b in (1, 2):
        with pytest.raises(ValueError, match=f"got a batch of {b} of 5 points"):
            model.condition((torch.rand(b, 5, 1), torch.rand(b, 5))).check()
    fitted = model.condition((torch.rand(9), torch.rand(9)))
    with pytest.raises(ValueError, match="at least 19 draws"):
        fitted.check(draws=10)
    stranger = pfn.PFN(model.transformer, model.card, None)
    with pytest.raises(ValueError, match="knows its prior"):
        stranger.condition((torch.rand(9), torch.rand(9))).check()
