"""Points one after the other behind a frozen context: what joint draws of a posterior are made of.

By the chain rule, a joint draw asks for the predictive of one point, draws it, adds it, and asks
for the next. Many draws walk at once, each in an order of its own. What they share, the context and
what the experts make of it, is computed once; a step then costs each draw two tokens, the point
that was drawn last and the one that is asked for.

Read `transformer.py` first, whose `decode` says the same of added points that are all known, and
`paths.py` next, which draws.
Shapes: s draws, k points of a walk, m points of the grid, h heads, e experts, n context points, t
tokens, w width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pfn.experts import RIDGE, Forecast, Solved, cholesky, correlation, eye, inputs_of_each
from pfn.transformer import Encoded, EncodedLayer, Final, Transformer, attend, place

FEW = 2  # tokens of each walk, for which keys that all walks share are not worth copying
PIECE = 2**21  # numbers, 16 MiB: memory of larger tensors goes back to the system after each use


class Rollout:
    """Walks over points of a grid behind one context.

    Args:
        encoded: of one context.
        grid: (m, d), in the prior's units.
        order: (s, k) indices of the grid, as each draw visits them.
    """

    def __init__(self, network: Transformer, encoded: Encoded, grid: Tensor, order: Tensor) -> None:
        self._network, self._encoded, self._grid = network, encoded, grid
        self._x = grid[order]  # (s, k, d)
        self.experts = ExpertsWalk(encoded.solved, grid, order)
        (s, k), heads = order.shape, network.config.heads
        self._kept = [
            layer.key.new_zeros(2, s, heads, k, layer.key.shape[-1]) for layer in encoded.layers
        ]  # keys and values of the points that were told

    def step(self, y: Tensor | None = None) -> Final:
        """What becomes of the next point (s, 1) as a query.

        Args:
            y: (s,) values of the point before, in the network's normalised units; None at first.
        """
        told = None if y is None else self.experts.tell(y)
        j = self.experts.told
        return self._ask(self._x[:, j : j + 1], self.experts.expect_next(), y, told)

    def finish(self, y: Tensor) -> Iterator[Final]:
        """What becomes of the whole grid (s, m), once y (s,) was told of the last point.

        Returns:
            That of a few walks after the other, computed as they are asked for.
        """
        told = self.experts.tell(y)
        said = self.experts.expect_all()
        config = self._network.config
        return (
            self._ask(self._grid.expand(len(y[some]), -1, -1), said.of(some), y, told, some)
            for some in pieces(len(y), len(self._grid) * config.width * config.expansion)
        )

    def _ask(
        self,
        x_query: Tensor,
        said: Forecast,
        y: Tensor | None,
        told: tuple[Tensor, Tensor, Tensor] | None,
        some: slice = slice(None),
    ) -> Final:
        """Queries (s, t, d), and before them the point that was told last, through all layers."""
        network, j = self._network, self.experts.told
        tokens, where = network.embed_queries(x_query, latents=False)
        to_tokens = network.experts.tell_query(said)
        if y is not None and told is not None:
            x = self._x[some, j - 1 : j]
            point = network.embed_points(x, y[some].unsqueeze(-1)) + network.embed_buffer
            tokens, where = torch.cat([point, tokens], 1), place(torch.cat([x, x_query], 1))
            to_point = network.experts.tell_buffer(*told)[some]
            to_tokens = torch.cat([to_point, to_tokens], 1)
        count = (self._encoded.num_context + j).expand(1, tokens.shape[1])
        sharpness = network.sharpness(count)
        layers = zip(network.blocks, self._encoded.layers, self._kept, sharpness, strict=True)
        for block, layer, kept, sharp in layers:
            if block is network.blocks[-1]:
                tokens = tokens + to_tokens
            normed = block.norm_attention(tokens)
            near = where.near(layer.metric)
            if y is not None:
                own = block.keys_values(normed[:, :1].contiguous(), *near.rows(0, 1).of_key())
                for part, value in zip(kept, own, strict=True):
                    part[some, :, j - 1 : j] = value
            if block is network.blocks[-1] and y is not None:  # nothing reads the point after it
                tokens, normed, sharp = tokens[:, 1:], normed[:, 1:], sharp[..., 1:, :]
                near = near.rows(1, 1 + x_query.shape[1])
            query = block.queries(normed, sharp, *near.of_query())
            tokens = block.finish(tokens, _attend(query, layer, kept[:, some, :, :j]))
        return network.finish(tokens, said, self._encoded.logits)


class ExpertsWalk:
    """What the experts say along each walk.

    The values that are told do not change covariances. So the factor L of all points of a walk is
    known at the start, and its row j has what the points before say of mean and variance of point
    j. Covariances are relative to an expert's variance.

    Args: those of `Rollout`.
    """

    def __init__(self, solved: Solved, grid: Tensor, order: Tensor) -> None:
        theta = solved.theta
        place = theta.metric * inputs_of_each(theta.experts, grid.unsqueeze(0))
        cross = correlation(theta, solved.place, place).double()  # (e, n, m)
        left = correlation(theta, place, place).double()
        self._left = left - cross.mT @ (solved.precision @ cross)  # (e, m, m)
        self._mean = theta.mean + torch.bmm(solved.pull.unsqueeze(1), cross).squeeze(1)  # (e, m)
        self._noise = theta.noise.double().squeeze(-1)  # (e,)
        self._log_variance = solved.log_variance.squeeze(-1)  # (e,)
        self._order = order
        self._factor = cross.new_empty(
            len(order), len(cross), *[order.shape[1]] * 2
        )  # (s, e, k, k)
        for some in self._pieces(order.shape[1]):
            own = self._left[:, order[some].unsqueeze(-1), order[some].unsqueeze(-2)]
            own.diagonal(dim1=-2, dim2=-1).add_(self._noise[:, None, None])
            self._factor[some] = cholesky(own.flatten(0, 1)).view_as(own).transpose(0, 1)
        self._white = cross.new_zeros(self._factor.shape[:-1])  # (s, e, k), over deviations
        self._log_evidence = solved.log_evidence.squeeze(-1).expand(len(order), -1)
        self.told = 0

    def expect_next(self) -> Forecast:
        """What the experts say of the next point, (s, 1, e) each."""
        j = self.told
        row = self._factor[:, :, j]
        mean = self._mean[:, self._order[:, j]].mT
        self._expected = mean + (row[..., :j] * self._white[..., :j]).sum(-1)
        left = row[..., j].square() - self._noise
        return self._forecast(self._expected.unsqueeze(1), left.unsqueeze(1))

    def tell(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes values (s,) of the point asked for last, and gives what `tell_buffer` takes."""
        j = self.told
        deviation = self._factor[:, :, j, j]
        white = (y.double().unsqueeze(-1) - self._expected) / deviation
        self._white[..., j] = white
        square = white.square() * (-self._log_variance).exp()
        surprise = 0.5 * (square + self._log_variance + math.log(2 * math.pi)) + deviation.log()
        self._log_evidence = self._log_evidence - surprise
        self.told = j + 1
        log_variance, white, log_diagonal = (
            part.flatten().unsqueeze(-1)
            for part in (self._log_variance.expand_as(white), white, deviation.log())
        )
        return log_variance, white, log_diagonal

    def expect_all(self) -> Forecast:
        """What the experts say of the grid once all points of the walk were told, (s, m, e)."""
        m = self._left.shape[-1]
        mean = self._white.new_empty(len(self._order), len(self._left), m)
        left = torch.empty_like(mean)
        for some in self._pieces(m):
            rows = self._left[:, self._order[some]].transpose(0, 1)  # (s, e, k, m)
            weights = torch.linalg.solve_triangular(self._factor[some], rows, upper=False)
            mean[some] = self._mean + (self._white[some].unsqueeze(-2) @ weights).squeeze(-2)
            left[some] = self._left.diagonal(dim1=-2, dim2=-1) - weights.square_().sum(-2)
        return self._forecast(mean.mT, left.mT)

    def residuals(self, chosen: Tensor, *, noisy: bool, generator: torch.Generator) -> Tensor:
        """Draws (s, m) of what the walks leave open, by one expert for each, over its deviation.

        By Matheron's rule: a draw given the context alone, less what it says at the points of the
        walk, observed with noise.

        Args:
            chosen: (s,) experts.
            noisy: of a new observation, and not of the function.

        Reference: Wilson et al., Efficiently sampling functions from Gaussian process posteriors,
        ICML 2020, equation 9.
        """
        s, m = len(chosen), self._left.shape[-1]
        noise = self._noise[chosen].unsqueeze(-1)  # (s, 1)
        z, eps, new = (
            torch.randn(s, size, dtype=torch.float64, device=chosen.device, generator=generator)
            for size in (m, self._order.shape[1], m)
        )
        drawn = torch.empty_like(z)  # (s, m)
        for expert in chosen.unique():
            left = self._left[expert] + RIDGE * eye(self._left)
            mine = chosen == expert
            drawn[mine] = z[mine] @ cholesky(left.unsqueeze(0))[0].mT
        observed = drawn.gather(1, self._order) + noise.sqrt() * eps
        residual, left = torch.empty_like(z), self._left.diagonal(dim1=-2, dim2=-1)[chosen]
        walks = torch.arange(s, device=chosen.device)
        for some in self._pieces(m):
            factor = self._factor[walks[some], chosen[some]]  # (s, k, k)
            rows = self._left[chosen[some].unsqueeze(-1), self._order[some]]  # (s, k, m)
            sides = torch.cat([rows, observed[some].unsqueeze(-1)], -1)
            solved = torch.linalg.solve_triangular(factor, sides, upper=False)
            weights, white = solved[..., :-1], solved[..., -1:]
            residual[some] = drawn[some] - (weights.mT @ white).squeeze(-1)
            left[some] -= weights.square().sum(-2)
        if noisy:
            residual, left = residual + noise.sqrt() * new, left + noise
        return residual / left.clamp_min(RIDGE).sqrt()

    def _pieces(self, columns: int) -> Iterator[slice]:
        """Walks whose matrices, one for each expert, have so many columns."""
        return pieces(len(self._order), len(self._left) * self._order.shape[1] * columns)

    def _forecast(self, mean: Tensor, left: Tensor) -> Forecast:
        """From means (s, t, e) and the shares of variance left."""
        variance = self._log_variance.exp()
        noise = (variance * self._noise).expand(len(mean), 1, -1)
        log_evidence = self._log_evidence.unsqueeze(1)
        return Forecast(mean, variance * left.clamp_min(RIDGE), noise, log_evidence)


def pieces(walks: int, entries: int) -> Iterator[slice]:
    """Some of the walks after the other, that many entries each: no tensor is above `PIECE`."""
    size = max(1, PIECE // entries)
    return (slice(i, i + size) for i in range(0, walks, size))


def _attend(query: Tensor, layer: EncodedLayer, own: Tensor) -> Tensor:
    """Attention of tokens (s, h, t, w/h) to the context that all share and to points of their own.

    Args:
        own: (2, s, h, j, w/h) keys and values.
    """
    s, h, t, _ = query.shape
    n = layer.key.shape[2]
    if t > FEW:
        context = (part.expand(s, -1, -1, -1) for part in (layer.key, layer.value))
        key, value = (torch.cat(two, 2) for two in zip(context, own, strict=True))
        return attend(query, key, value)
    shared = query.transpose(0, 1).flatten(1, 2)  # (h, s t, w/h)
    logits = (shared @ layer.key[0].mT).view(h, s, t, n).transpose(0, 1)
    weights = torch.cat([logits, query @ own[0].mT], -1).softmax(-1)
    of_context = weights[..., :n].transpose(0, 1).flatten(1, 2) @ layer.value[0]
    return of_context.view(h, s, t, -1).transpose(0, 1) + weights[..., n:] @ own[1]
