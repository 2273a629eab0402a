"""The update rules, against `torch.optim`, linear algebra and a problem with a known answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pfn.optim import BETAS, NEWTON_SCHULZ, Optimizer, orthogonalize


class Net(nn.Module):
    """Parameters of every kind: inside and outside `blocks`, matrices and vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.blocks
        return third(torch.tanh(second(torch.tanh(first(self.embed(x))))))


def set_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_adamw_is_that_of_torch() -> None:
    ours, theirs = Net(), Net()
    optimizer = Optimizer(ours, weight_decay=0.1, muon=False)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=BETAS,
        eps=1e-8,
    )
    for step in range(10):
        lr = 0.01 * (step + 1)
        for group in reference.param_groups:
            group["lr"] = lr
        for net in (ours, theirs):
            set_gradients(net, step)
        optimizer.step(lr)
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)  # ten float32 updates


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    optimizer = Optimizer(Net(), weight_decay=0.0)
    by_muon = {name for names in optimizer.by_shape.values() for name in names}
    assert by_muon == {"blocks.0.weight", "blocks.1.weight", "blocks.2.weight"}
    biases = {"blocks.0.bias", "blocks.1.bias", "blocks.2.bias"}
    assert set(optimizer.by_adam) == {"embed.weight", "embed.bias"} | biases


def test_orthogonalize_brings_singular_values_to_one_within_a_third() -> None:
    a, b, c = NEWTON_SCHULZ
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((16, 16), (16, 48), (48, 16)):
        left, _, right = torch.linalg.svd(
            torch.randn(3, rows, columns, generator=generator), full_matrices=False
        )
        singular = torch.linspace(0.05, 1.0, 16)  # within what five iterations can lift
        matrices = left @ torch.diag(singular) @ right
        expected = singular / singular.norm()
        for _ in range(5):  # the iteration acts on each singular value by itself
            expected = a * expected + b * expected**3 + c * expected**5
        assert (expected - 1).abs().max() < 1 / 3
        values = torch.linalg.svdvals(orthogonalize(matrices))
        # float32 rounds two products to 2^-24 in each iteration; the quintic is at most 4 steep.
        # Of wide matrices squares are rounded, relative to the largest: as much, seen from 0.05 on
        expected = expected.sort(descending=True).values.expand(3, -1)
        torch.testing.assert_close(values, expected, rtol=0, atol=2 * 4**5 * 2**-24)


@pytest.mark.parametrize("columns", [20, 36])
def test_orthogonalize_keeps_the_singular_directions(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 12, columns, generator=generator)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    aligned = left.mT @ orthogonalize(matrices) @ right.mT
    off_diagonal = aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4  # float32


@pytest.mark.parametrize("columns", [12, 24])
def test_orthogonalize_ignores_the_scale_of_the_gradient(columns: int) -> None:
    matrices = torch.randn(2, 8, columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonalize(matrices * 2.0**20), orthogonalize(matrices))
    assert torch.equal(orthogonalize(0 * matrices), torch.zeros(2, 8, columns))


def test_a_muon_update_has_the_root_mean_square_of_an_adamw_update() -> None:
    net = Net()
    before = net.blocks[0].weight.detach().clone()
    set_gradients(net, 0)
    Optimizer(net, weight_decay=0.0).step(1.0)
    update = (net.blocks[0].weight - before).square().mean().sqrt()
    # 0.2 sqrt(max) times a semi-orthogonal matrix of `min` unit singular values, to 30 %
    assert 0.7 * 0.2 < update < 1.3 * 0.2


def test_weight_decay_shrinks_matrices_only() -> None:
    net = Net()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    Optimizer(net, weight_decay=0.5).step(0.1)  # without gradients
    for name, value in net.named_parameters():
        factor = 1 - 0.1 * 0.5 if value.ndim == 2 else 1.0
        torch.testing.assert_close(value, factor * before[name])


def test_muon_descends_a_quadratic() -> None:
    net, target = Net(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    curvature = torch.logspace(-1, 1, 4)  # condition number 100, along columns
    optimizer = Optimizer(net, weight_decay=0.0)
    losses = []
    for step in range(200):
        loss = (curvature * (net.blocks[0].weight - target).square()).sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(0.3 * (1 - step / 200))  # a path of 200 x 0.15 x 0.2 sqrt(6) suffices
        net.zero_grad()
    assert losses[-1] < 1e-3 * losses[0]


def test_the_state_resumes_an_optimizer_exactly() -> None:
    whole, first, second = Net(), Net(), Net()
    straight = Optimizer(whole, weight_decay=0.1)
    before, after = Optimizer(first, weight_decay=0.1), Optimizer(second, weight_decay=0.1)
    for step in range(3):
        for net, optimizer in ((whole, straight), (first, before)):
            set_gradients(net, step)
            optimizer.step(0.01)
    second.load_state_dict(first.state_dict())
    after.load({name: value.clone() for name, value in before.state.items()})
    for net, optimizer in ((whole, straight), (second, after)):
        set_gradients(net, 3)
        optimizer.step(0.01)
    assert int(after.state["count"]) == 4
    for mine, other in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
