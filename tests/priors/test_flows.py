"""Flows: their density is that of their draws, their inverse is exact, their numbers are data."""

import json
import math

import pytest
import torch
from torch.distributions import Normal

from priors import BNN, from_config, to_config
from priors.draws import draw_normal
from priors.flows import WeightFlow, flow_of, identity_flow, push


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bent_flow(dim: int, seed: int = 0, size: float = 0.5) -> WeightFlow:
    """A flow far from the identity."""
    source = generator(seed)
    pairs = [
        (inner, size * draw_normal(*outer.shape, generator=source))
        for _, _, inner, outer in identity_flow(dim, generator=source).tensors
    ]
    return flow_of(dim, pairs)


def test_density_integrates_to_one() -> None:
    flow = bent_flow(2, size=0.25)
    t = torch.linspace(-8, 8, 801).double()  # spacing 0.02: no structure is that fine
    axis, cell = t.sinh(), 0.02 * t.cosh()  # out to 1500: draws have long tails
    density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(801, 801)
    mass = cell * (density @ cell)
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    # ... and is not the density of the inverse map, the classical slip
    draws = flow.forward(draw_normal(50_000, 2, generator=generator(1))).value[:, 0]
    cdf = mass.cumsum(0) - mass / 2
    share = torch.searchsorted(draws.sort().values, axis).double() / len(draws)
    bound = math.sqrt(math.log(2e6) / (2 * len(draws)))  # DKW, at 1e-6
    assert float((share - cdf).abs().max()) < bound + 1e-3  # of the grid


def test_mean_log_density_is_minus_the_entropy_by_change_of_variables() -> None:
    flow = bent_flow(5)
    z = draw_normal(10_000, 5, generator=generator(2))
    value, log_determinant = flow.forward(z)
    # for each draw, log p(value) = log N(z) - log|det|; on average E log p = -entropy
    base = Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(flow.log_prob(value), base - log_determinant, rtol=0, atol=1e-9)
    entropy = 2.5 * math.log(2 * math.pi * math.e) + log_determinant
    gap = flow.log_prob(value) + entropy  # its mean is that of (5 - |z|^2) / 2: zero
    error = float(gap.std() / math.sqrt(len(gap)))
    assert abs(float(gap.mean())) < 4.9 * error


def test_log_determinant_is_that_of_the_jacobian() -> None:
    flow = bent_flow(4)
    z = draw_normal(4, generator=generator(3))
    jacobian = torch.autograd.functional.jacobian(lambda z: flow.forward(z).value, z)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.forward(z).log_determinant, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 51])
def test_inverse_is_exact(dim: int) -> None:
    flow = bent_flow(dim, size=0.2)
    z = draw_normal(6, 7, dim, generator=generator(4))
    value, forward = flow.forward(z)
    back, backward = flow.inverse(value)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(backward, -forward, rtol=0, atol=1e-10)


def test_an_unfitted_flow_is_the_identity_and_can_be_fitted() -> None:
    flow = identity_flow(3, generator=generator())
    z = draw_normal(10, 3, generator=generator(1))
    torch.testing.assert_close(flow.forward(z).value, z, rtol=0, atol=0)
    outer = flow.tensors[0].outer.requires_grad_()
    push(flow.tensors, z).value.square().sum().backward()
    assert outer.grad is not None and float(outer.grad.abs().sum()) > 0


def test_a_flow_is_plain_data() -> None:
    flow = bent_flow(3)
    again = WeightFlow(flow.dim, flow.couplings)
    assert again == flow and hash(again) == hash(flow)
    network = BNN(width=8, depth=1, flow=(flow,))
    assert from_config(json.loads(json.dumps(to_config(network)))).flow == network.flow
    z = draw_normal(4, 3, generator=generator())
    torch.testing.assert_close(again.forward(z).value, flow.forward(z).value, rtol=0, atol=0)


def test_networks_draw_their_units_from_the_flow() -> None:
    flow = bent_flow(2)
    network, plain = BNN(width=8, depth=1, flow=(flow,)), BNN(width=8, depth=1)
    drawn = network.draw_parameters(5, 1, generator=generator(6))
    x = torch.rand(5, 9, 1, generator=generator(7)).double()
    mapped = flow.forward(drawn.weights[0].mT).value.mT
    expected = plain.functions(drawn._replace(weights=(mapped, drawn.weights[1])), x)
    torch.testing.assert_close(network.functions(drawn, x), expected, rtol=0, atol=1e-13)


def test_complaints() -> None:
    flow = identity_flow(3, generator=generator())
    with pytest.raises(ValueError, match="2 dimensions or more; got 1"):
        WeightFlow(1)
    with pytest.raises(ValueError, match="matrices of shapes"):
        WeightFlow(4, flow.couplings)
    with pytest.raises(ValueError, match="2 features"):
        BNN(depth=1, flow=(flow,)).sample(1, 2, 5, generator=generator())
    with pytest.raises(ValueError, match="a flow for each of 2 hidden layers"):
        BNN(depth=2, flow=(flow,))
