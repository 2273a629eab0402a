"""Kernels against their formulas, GPyTorch, and what every covariance must satisfy."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from priors.kernels import KERNELS, Kernel

LENGTHSCALE = torch.tensor([0.4, 1.3, 0.7], dtype=torch.float64)


def inputs(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, dtype=torch.float64, generator=generator)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


@pytest.mark.parametrize(
    ("name", "smoothness"), [("rbf", None), ("matern12", 0.5), ("matern32", 1.5), ("matern52", 2.5)]
)
def test_stationary_kernels_match_gpytorch(name: str, smoothness: float | None) -> None:
    with warnings.catch_warnings():  # its dependencies use deprecated parts of torch
        warnings.simplefilter("ignore", DeprecationWarning)
        from gpytorch.kernels import MaternKernel, RBFKernel
    other = (
        RBFKernel(ard_num_dims=3)
        if smoothness is None
        else MaternKernel(smoothness, ard_num_dims=3)
    )
    other = other.double()
    other.lengthscale = LENGTHSCALE
    x, z = inputs(7, 0), inputs(5, 1)
    expected = other(x, z).to_dense().detach()
    torch.testing.assert_close(KERNELS[name](x, z, LENGTHSCALE), expected, atol=1e-12, rtol=0)


def test_periodic_and_linear_match_their_formulas() -> None:
    x, z = inputs(2, 0)
    sines = [math.sin(math.pi * float(delta) / 0.5) for delta in x - z]
    scales = LENGTHSCALE.tolist()
    periodic = math.exp(-2 * sum((s / scale) ** 2 for s, scale in zip(sines, scales, strict=True)))
    products = [(float(a) - 0.5) * (float(b) - 0.5) for a, b in zip(x, z, strict=True)]
    linear = sum(p / scale**2 for p, scale in zip(products, scales, strict=True))
    for name, expected in (("periodic", periodic), ("linear", linear)):
        value = float(KERNELS[name](x[None], z[None], LENGTHSCALE))
        assert value == pytest.approx(expected, rel=1e-13)


def test_covariances_are_positive_semidefinite(kernel: Kernel) -> None:
    x = inputs(40, 2)
    x[20:] = x[:20]  # repeated inputs: half of the eigenvalues are zero
    eigenvalues = torch.linalg.eigvalsh(kernel(x, x, LENGTHSCALE))
    # 40 points of Matern 1/2 at distance 1e-8 instead of 0 move an eigenvalue by 40e-8 at most
    assert eigenvalues.min() > -1e-6
    torch.testing.assert_close(kernel(x, x, LENGTHSCALE), kernel(x, x, LENGTHSCALE).T)


def test_stationary_kernels_are_one_on_the_diagonal(kernel: Kernel) -> None:
    if kernel is KERNELS["linear"]:
        center = torch.full((1, 3), 0.5, dtype=torch.float64)
        assert kernel(center, center, LENGTHSCALE) == 0
        return
    x = inputs(9, 3)
    # rounding of r^2 by 1e-15 is 3e-8 in r, and in exp(-r)
    diagonal = kernel(x, x, LENGTHSCALE).diagonal()
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), atol=1e-7, rtol=0)


def test_gradients_are_finite_where_points_coincide(kernel: Kernel) -> None:
    x = inputs(4, 4).requires_grad_()
    lengthscale = LENGTHSCALE.clone().requires_grad_()
    kernel(x, x, lengthscale).sum().backward()
    for gradient in (x.grad, lengthscale.grad):
        assert gradient is not None and gradient.isfinite().all()


def test_gradients_match_finite_differences(kernel: Kernel) -> None:
    x, z = inputs(3, 5), inputs(4, 6)
    arguments = (x.requires_grad_(), z.requires_grad_(), LENGTHSCALE.clone().requires_grad_())
    assert torch.autograd.gradcheck(kernel, arguments)


def test_tasks_have_their_own_lengthscales(kernel: Kernel) -> None:
    x, z = torch.stack([inputs(6, 0), inputs(6, 1)]), torch.stack([inputs(4, 2), inputs(4, 3)])
    lengthscale = torch.stack([LENGTHSCALE, 2 * LENGTHSCALE])
    batched = kernel(x, z, lengthscale)
    for i in range(2):
        single = kernel(x[i], z[i], lengthscale[i])
        torch.testing.assert_close(batched[i], single, atol=1e-14, rtol=1e-12)


def test_one_lengthscale_is_shared_by_all_features(kernel: Kernel) -> None:
    x, z = inputs(6, 0), inputs(4, 1)
    one = torch.tensor([0.6], dtype=torch.float64)
    torch.testing.assert_close(kernel(x, z, one), kernel(x, z, one.expand(3)))


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    x, z = inputs(6, 0), inputs(4, 1)
    shifted = KERNELS["rbf"](x + 1000, z + 1000, LENGTHSCALE)
    torch.testing.assert_close(shifted, KERNELS["rbf"](x, z, LENGTHSCALE), atol=1e-11, rtol=0)
