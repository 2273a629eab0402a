"""Kernels of infinitely wide networks against nested quadrature, finite networks and BoTorch."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from priors.dual import ACTIVATIONS, abrelu
from priors.infinite_width import (
    CACHED,
    network_kernels,
    nngp,
    nngp_variance,
    ntk,
    ntk_variance,
)

NAMES = list(ACTIVATIONS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def network(activation: Any = "relu", depth: int = 3, weight: Any = 2.0, bias: Any = 0.3) -> Any:
    return {
        "activation": activation,
        "depth": depth,
        "weight_variance": weight,
        "bias_variance": bias,
    }


# against an independent computation


def slope(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    u = u.clone().requires_grad_()
    return torch.autograd.grad(function(u).sum(), u)[0]


def moments(name: str, q12: float, q11: float, q22: float) -> tuple[float, float]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)] by quadrature, no closed form.

    Gauss-Hermite over the plane for smooth activations, Gauss-Legendre between kinks in the polar
    angle for piecewise linear ones, of which the radius integrates to 2 or 1.
    """
    phi = ACTIVATIONS[name].function
    cosine = min(1.0, max(-1.0, q12 / math.sqrt(q11 * q22)))
    if name in ("erf", "gelu", "sine"):
        nodes, weights = np.polynomial.hermite_e.hermegauss(160)
        s, w = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
        u = math.sqrt(q11) * s.unsqueeze(-1)
        v = math.sqrt(q22) * (cosine * s.unsqueeze(-1) + math.sqrt(1 - cosine**2) * s)
        scales, weights = (1.0, 1.0), w.unsqueeze(-1) * w
    else:
        theta = math.acos(cosine)
        kinks = [w % (2 * math.pi) for w in (math.pi / 2, -math.pi / 2)]
        kinks = sorted(kinks + [(w + theta) % (2 * math.pi) for w in kinks])
        edges = torch.tensor([*kinks, kinks[0] + 2 * math.pi], dtype=torch.float64)
        nodes, legendre = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(30))
        half = edges.diff().unsqueeze(-1) / 2
        angle = edges[:-1].unsqueeze(-1) + half * (nodes + 1)
        u, v = math.sqrt(q11) * angle.cos(), math.sqrt(q22) * (angle - theta).cos()
        scales, weights = (2.0, 1.0), half * legendre / (2 * math.pi)
    value, derivative = phi(u) * phi(v), slope(phi, u) * slope(phi, v)
    return (
        scales[0] * float((weights * value).sum()),
        scales[1] * float((weights * derivative).sum()),
    )


@pytest.mark.parametrize("name", NAMES)
def test_three_layers_are_nested_quadratures(name: str) -> None:
    x, z, weight, bias = normal(3, 2, seed=1), normal(2, 2, seed=2), 1.4, 0.3
    x[0] = z[0]  # the correlation of one, too
    kernels = network_kernels(x, z, **network(name, 3, weight, bias))
    for i in range(3):
        for j in range(2):
            inner = [float(a @ b) / 2 for a, b in ((x[i], z[j]), (x[i], x[i]), (z[j], z[j]))]
            q12, q11, q22 = (bias + weight * value for value in inner)
            tangent = q12
            for _ in range(3):
                value, derivative = moments(name, q12, q11, q22)
                q11, q22 = (bias + weight * moments(name, q, q, q)[0] for q in (q11, q22))
                q12, tangent = bias + weight * value, weight * derivative * tangent
                tangent += q12
            assert float(kernels.nngp[i, j]) == pytest.approx(q12, rel=1e-12)
            # acos of a rounded cosine of one is off by 1e-8, in the quadrature
            tolerance = 1e-7 if (i, j) == (0, 0) else 1e-12
            assert float(kernels.ntk[i, j]) == pytest.approx(tangent, rel=tolerance)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_relu_networks_are_those_of_botorch(depth: int) -> None:
    kernels = pytest.importorskip("botorch.models.kernels.infinite_width_bnn")
    theirs = kernels.InfiniteWidthBNNKernel(depth=depth).double()
    theirs.weight_var, theirs.bias_var = 1.7, 0.4
    x, z = normal(6, 3), normal(5, 3, seed=1)
    expected = theirs(x, z).to_dense().detach()
    ours = nngp(x, z, **network("relu", depth, 1.7, 0.4))
    # it keeps cosines 1e-7 away from one
    torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-7)


# against finite networks


def finite_network(
    x: Tensor, name: str, depth: int, width: int, weight: float, bias: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Both kernels of one random network: over its readout's weights, and of all its gradients.

    The gradient in a layer's weights is the outer product of its inputs and of the output's
    gradient in its preactivations.
    """
    g, phi = generator(seed), ACTIVATIONS[name].function
    hidden, layers = x, []
    for _ in range(depth):
        fan_in = hidden.shape[-1]
        w = torch.randn(fan_in, width, dtype=torch.float64, generator=g)
        b = torch.randn(width, dtype=torch.float64, generator=g)
        before = math.sqrt(weight / fan_in) * hidden @ w + math.sqrt(bias) * b
        layers.append((w, bias + weight / fan_in * hidden @ hidden.mT, before))
        hidden = phi(before)
    covariance = bias + weight / width * hidden @ hidden.mT
    backward = torch.randn(width, dtype=torch.float64, generator=g).expand_as(hidden)
    tangent = covariance
    for w, inner, before in reversed(layers):
        backward = math.sqrt(weight / width) * backward * slope(phi, before)
        tangent = tangent + inner * (backward @ backward.mT)
        backward = backward @ w.mT
    return covariance, tangent


@pytest.mark.parametrize("name", ["relu", "erf", "gelu", "sine"])
def test_wide_networks_have_these_kernels(name: str) -> None:
    x, depth, width, nets, weight, bias = normal(6, 5, seed=3), 2, 768, 20, 2.0, 0.3
    drawn = [finite_network(x, name, depth, width, weight, bias, seed) for seed in range(nets)]
    covariance, tangent = (torch.stack(column).mean(0) for column in zip(*drawn, strict=True))

    def gap(drawn: Tensor, exact: Tensor) -> float:
        return float((drawn - exact).norm() / exact.norm())

    # squares of ReLU features have a relative variance of 5 per layer and unit, fewer elsewhere
    deviation = math.sqrt(5 * depth / (width * nets))
    exact = network_kernels(x, x, **network(name, depth, weight, bias))
    assert gap(covariance, exact.nngp) < 4 * deviation
    # one more layer fluctuates in the NTK: the readout's weights
    assert gap(tangent, exact.ntk) < 4 * math.sqrt(5 * (depth + 1) / (width * nets))
    # sharp enough to tell networks of another depth or weight variance, and the kernels apart
    for other in (
        nngp(x, x, **network(name, depth - 1, weight, bias)),
        nngp(x, x, **network(name, depth, 1.2 * weight, bias)),
        exact.ntk,
    ):
        assert gap(covariance, other) > 4 * deviation


# properties


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [0, 1, 4, 20])
def test_variances_are_the_diagonals(name: str, depth: int) -> None:
    x = normal(3, 20, 4)
    of = network(name, depth, torch.tensor([0.5, 1.3, 2.5]), torch.tensor([0.0, 0.1, 2.0]))
    kernels = network_kernels(x, x, **of)
    # each layer adds rounding, and magnifies that of the layers below
    tolerance = 1e-14 * max(4, depth) ** 2
    for kernel, variance in (
        (kernels.nngp, nngp_variance(x, **of)),
        (kernels.ntk, ntk_variance(x, **of)),
    ):
        diagonal = kernel.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, variance, atol=0, rtol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [1, 6])
def test_kernels_are_positive_semidefinite_with_duplicate_points(name: str, d: int) -> None:
    x = normal(40, d)
    x = torch.cat([x, x[:10], x[:5] * (1 + 1e-9), -x[:5]])
    for depth in (1, 3, 8):
        kernels = network_kernels(x, x, **network(name, depth))
        for kernel in kernels:
            lowest = torch.linalg.eigvalsh(kernel).min()
            assert lowest > -1e-12 * kernel.trace()


def test_nearly_equal_points_keep_the_ntk_positive_to_the_rounding_of_angles() -> None:
    # the NTK of a ReLU network has a kink at x = x', where angles are known to 1e-8 at best
    x = normal(20, 3)
    x = torch.cat([x, x + 1e-7 * normal(20, 3, seed=1)])
    tangent = ntk(x, x, **network("relu"))
    assert torch.linalg.eigvalsh(tangent).min() > -1e-7 * tangent.diagonal().mean()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_at_duplicates_and_at_the_origin(name: str) -> None:
    x = normal(3, 2)
    x[1], x[2] = x[0], 0
    x.requires_grad_()
    weight, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, 0.2))

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nngp(x, x, **network(name, 2, weight, bias))

    # where x = x' the third derivative jumps: a central difference of 1e-6 errs by about its square
    assert torch.autograd.gradcheck(kernel, (x, weight, bias), eps=1e-6, atol=1e-6)
    no_bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for function in (nngp, ntk):
        value = function(x, x, **network(name, 2, weight, no_bias))
        gradients = torch.autograd.grad(value.sum(), (x, weight, no_bias))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_the_ntk_is_a_sum_of_products_of_slopes(name: str) -> None:
    # unrolled recursion: sum over layers of q_l times the slopes of all layers above, where the
    # slope of a layer is the derivative of q_{l+1} in q_l at fixed variances (Price)
    x, z, weight, bias, depth = normal(4, 3), normal(5, 3, seed=1), 1.4, 0.3, 3
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for layer in range(depth + 1):
        of = network(name, layer, weight, bias)
        q = nngp(x, z, **of).requires_grad_()
        start, top = q, q
        q11, q22 = nngp_variance(x, **of).unsqueeze(-1), nngp_variance(z, **of).unsqueeze(-2)
        for _ in range(layer, depth):
            top = bias + weight * ACTIVATIONS[name].dual(top, q11, q22)
            q11, q22 = (bias + weight * ACTIVATIONS[name].square(v) for v in (q11, q22))
        (slopes,) = torch.autograd.grad(top.sum(), start)
        expected += start.detach() * slopes
    tangent = ntk(x, z, **network(name, depth, weight, bias))
    torch.testing.assert_close(tangent, expected, atol=1e-12, rtol=1e-12)


def test_every_task_has_its_own_network() -> None:
    n = 60
    batch = 3 * CACHED // n**2  # in several pieces
    x, z = normal(batch, n, 2), normal(batch, n, 2, seed=1)
    weight, bias = 0.5 + normal(batch, seed=2).square(), normal(batch, seed=3).square()
    together = nngp(x, z, **network("erf", 2, weight, bias))
    assert together.shape == (batch, n, n)
    for i in (0, 1, batch - 1):
        alone = nngp(x[i], z[i], **network("erf", 2, float(weight[i]), float(bias[i])))
        torch.testing.assert_close(together[i], alone, atol=1e-14, rtol=1e-14)


def test_leading_axes_broadcast() -> None:
    x, z = normal(2, 1, 150, 3), normal(120, 3, seed=1)
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    assert 2 * 5 * 150 * 120 > CACHED  # in pieces
    for function in (nngp, ntk):
        value = function(x, z, **network("gelu", 2, weight, 0.1))
        assert value.shape == (2, 5, 150, 120)
        alone = function(x[1, 0], z, **network("gelu", 2, weight[3], 0.1))
        torch.testing.assert_close(value[1, 3], alone, atol=1e-13, rtol=1e-13)
    assert nngp_variance(x, **network("gelu", 2, weight, 0.1)).shape == (2, 5, 150)


def test_gradients_flow_through_pieces() -> None:
    n = 150
    x = normal(9, n, 2)
    assert len(x) * n**2 > CACHED
    weight = torch.full((9,), 1.5, dtype=torch.float64, requires_grad=True)
    (together,) = torch.autograd.grad(nngp(x, x, **network("relu", 2, weight)).sum(), weight)
    (alone,) = torch.autograd.grad(nngp(x[4], x[4], **network("relu", 2, weight[4])).sum(), weight)
    torch.testing.assert_close(together[4], alone[4])


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_is_close(name: str) -> None:
    x, z = normal(20, 4), normal(15, 4, seed=1)
    single = nngp(x.float(), z.float(), **network(name))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), nngp(x, z, **network(name)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", [nngp, nngp_variance, network_kernels, ntk_variance])
def test_each_layer_is_computed_once(function: Callable[..., Any]) -> None:
    calls = {"dual": 0, "slope_dual": 0, "square": 0, "slope_square": 0}

    def counted(name: str) -> Callable[..., Tensor]:
        def call(*q: Tensor) -> Tensor:
            calls[name] += 1
            return getattr(ACTIVATIONS["relu"], name)(*q)

        return call

    phi = replace(ACTIVATIONS["relu"], **{name: counted(name) for name in calls})
    x = normal(4, 2)
    points = (x,) if function in (nngp_variance, ntk_variance) else (x, x)
    depth = 7
    function(*points, **network(phi, depth))
    assert max(calls.values()) <= 2 * depth and sum(calls.values()) <= 4 * depth


def test_deep_relu_networks_forget_angles_as_the_square_of_depth() -> None:
    # at the edge of chaos 1 - correlation -> 9 pi^2 / (2 depth^2), with corrections of log / depth
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    ratios = []
    for depth in (100, 1000, 4000):
        kernel = nngp(x, x, **network("relu", depth, 2.0, 0.0))
        torch.testing.assert_close(kernel[0, 0], kernel.new_tensor(1.0), atol=1e-11, rtol=0)
        correlation = float(kernel[0, 1] / kernel[0, 0])
        ratios.append((1 - correlation) * 2 * depth**2 / (9 * math.pi**2))
    assert ratios[0] < ratios[1] < ratios[2] < 1
    assert ratios[2] == pytest.approx(1, abs=math.log(4000) / 4000 * 9)


def test_no_hidden_layer_is_a_linear_model() -> None:
    x, z = normal(4, 3), normal(5, 3, seed=1)
    expected = 0.3 + 2.0 * (x @ z.mT) / 3
    torch.testing.assert_close(nngp(x, z, **network("erf", 0)), expected)
    torch.testing.assert_close(ntk(x, z, **network("erf", 0)), expected)


def test_an_identity_activation_is_a_linear_network() -> None:
    # depth d of variance products: q_d = bias (1 + w + ... + w^d) + w^(d + 1) <x, z> / d
    x, z, weight, bias = normal(4, 3), normal(5, 3, seed=1), 1.3, 0.2
    kernels = network_kernels(x, z, **network(abrelu(1.0, 1.0), 2, weight, bias))
    linear = [
        bias * sum(weight**k for k in range(layer + 1)) + weight ** (layer + 1) * (x @ z.mT) / 3
        for layer in range(3)
    ]
    torch.testing.assert_close(kernels.nngp, linear[2])
    torch.testing.assert_close(kernels.ntk, linear[2] + weight * linear[1] + weight**2 * linear[0])


def test_unknown_activations_are_named() -> None:
    with pytest.raises(ValueError, match=r"Expected an activation among .*'gelu'.*; got 'tanh'"):
        nngp(normal(2, 1), normal(2, 1), **network("tanh"))
