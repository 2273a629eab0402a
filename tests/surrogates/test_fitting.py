"""Surrogates by name, and what they are given."""

import subprocess
import sys

import pytest
import torch
from botorch.models.transforms import Standardize

import surrogates

X = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))


def test_all_names_are_told() -> None:
    models = ["pfn", "gp", "dkl", "hmc-bnn", "sghmc-bnn", "ensemble", "laplace-bnn", "ibnn", "stp"]
    assert surrogates.available() == [*models, "random", "sobol"]


def test_several_outputs_have_a_model_each() -> None:
    model = surrogates.fit("pfn", X, torch.stack([X[:, 0], X[:, 1]], -1), model="gp")
    posterior = model.posterior(X[:4].double())
    assert model.num_outputs == 2 and posterior.mean.shape == (4, 2)
    torch.testing.assert_close(posterior.mean, X[:4].double(), atol=0.3, rtol=0)
    assert posterior.rsample(torch.Size([3])).shape == (3, 4, 2)


def test_the_range_of_the_data_is_the_box_where_no_bounds_are_given() -> None:
    far = 100 + 7 * X
    ours = surrogates.fit("pfn", far, X[:, 0], model="gp").posterior(far[:2].double())
    low, high = far.amin(0), far.amax(0)
    told = surrogates.fit("pfn", far, X[:, 0], model="gp", bounds=torch.stack([low, high]))
    torch.testing.assert_close(ours.mean, told.posterior(far[:2].double()).mean)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "forest"}, "Expected a surrogate among"),
        ({"name": "sobol"}, "sobol only samples"),
        ({"Y": torch.ones(5)}, r"Expected X \(n, d\) and Y"),
        ({"X": torch.ones(6)}, r"Expected X \(n, d\) and Y"),
        ({"Y": torch.full((6,), torch.nan)}, "finite Y"),
        ({"Yvar": torch.zeros(6)}, "positive Yvar"),
        ({"bounds": [[0.0], [1.0]]}, r"bounds of shape \(2, 2\)"),
        ({"bounds": [[0.0, 0.0], [1.0, 0.0]]}, "lower ends below upper"),
        ({"bounds": [[0.0] * 2, [1.0] * 2], "input_transform": "any"}, "not both"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], said: str) -> None:
    every = {"name": "pfn", "X": X, "Y": X[:, 0]} | arguments
    with pytest.raises(ValueError, match=said):
        surrogates.fit(**every)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "library"), [("fit", "botorch"), ("PFNSampler", "optuna")])
def test_a_missing_extra_is_named_when_it_is_used(name: str, library: str) -> None:
    code = (
        f"import sys; sys.modules['{library}'] = None; import surrogates; surrogates.available()\n"
        f"try: surrogates.{name}\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs {library}: pip install 'pfn[bo]'" in run.stdout


def test_each_output_has_transforms_of_its_own() -> None:
    Y = torch.stack([X[:, 0], 1000 * X[:, 1]], -1)
    model = surrogates.fit("pfn", X, Y, model="gp", outcome_transform=Standardize(1))
    mean = model.posterior(X.double()).mean.detach()
    assert (mean[:, 0] - Y[:, 0]).abs().max() < 0.3 and (mean[:, 1] - Y[:, 1]).abs().max() < 300
