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

import torch
from torch import Tensor

from pfn.experts import RIDGE, Forecast, Solved, cholesky, correlation, eye, inputs_of_each
from pfn.transformer import Encoded, EncodedLayer, Final, Transformer, place


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

    def finish(self, y: Tensor) -> Final:
        """What becomes of the whole grid (s, m), once y (s,) was told of the last point."""
        told = self.experts.tell(y)
        every = self._grid.expand(len(y), -1, -1)
        return self._ask(every, self.experts.expect_all(), y, told)

    def _ask(
        self,
        x_query: Tensor,
        said: Forecast,
        y: Tensor | None,
        told: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Final:
        """Queries (s, t, d), and before them the point that was told last, through all layers."""
        network, j = self._network, self.experts.told
        tokens, where = network.embed_queries(x_query, latents=False)
        to_tokens = network.experts.tell_query(said)
        if y is not None and told is not None:
            x = self._x[:, j - 1 : j]
            point = network.embed_points(x, y.unsqueeze(-1)) + network.embed_buffer
            tokens, where = torch.cat([point, tokens], 1), place(torch.cat([x, x_query], 1))
            to_tokens = torch.cat([network.experts.tell_buffer(*told), to_tokens], 1)
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
                kept[:, :, :, j - 1 : j] = torch.stack(own)
            query = block.queries(normed, sharp, *near.of_query())
            tokens = block.finish(tokens, _attend(query, layer, kept[:, :, :, :j]))
        return network.finish(tokens[:, -x_query.shape[1] :], said, self._encoded.logits)


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
        own = self._left[:, order.unsqueeze(-1), order.unsqueeze(-2)].transpose(0, 1)
        own.diagonal(dim1=-2, dim2=-1).add_(self._noise.unsqueeze(-1))
        self._factor = cholesky(own.flatten(0, 1)).view_as(own)  # (s, e, k, k)
        self._white = own.new_zeros(own.shape[:-1])  # (s, e, k) residuals over deviations
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
        rows = self._left[:, self._order].transpose(0, 1)  # (s, e, k, m)
        weights = torch.linalg.solve_triangular(self._factor, rows, upper=False)
        mean = self._mean + (self._white.unsqueeze(-2) @ weights).squeeze(-2)  # (s, e, m)
        left = self._left.diagonal(dim1=-2, dim2=-1) - weights.square().sum(-2)
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
        walks = torch.arange(s, device=chosen.device)
        noise = self._noise[chosen].unsqueeze(-1)  # (s, 1)
        factor = self._factor[walks, chosen]  # (s, k, k)
        rows = self._left[chosen.unsqueeze(-1), self._order]  # (s, k, m)
        z, eps, new = (
            torch.randn(s, size, 1, dtype=torch.float64, device=chosen.device, generator=generator)
            for size in (m, self._order.shape[1], m)
        )
        drawn = torch.empty_like(z.squeeze(-1))  # (s, m)
        for expert in chosen.unique():
            left = self._left[expert] + RIDGE * eye(self._left)
            some = chosen == expert
            drawn[some] = (z[some].squeeze(-1)) @ cholesky(left.unsqueeze(0))[0].mT
        observed = drawn.gather(1, self._order).unsqueeze(-1) + noise.sqrt().unsqueeze(-1) * eps
        said = rows.mT @ torch.cholesky_solve(observed, factor)
        weights = torch.linalg.solve_triangular(factor, rows, upper=False)
        left = self._left.diagonal(dim1=-2, dim2=-1)[chosen] - weights.square().sum(-2)
        residual = drawn - said.squeeze(-1)
        if noisy:
            residual, left = residual + noise.sqrt() * new.squeeze(-1), left + noise
        return residual / left.clamp_min(RIDGE).sqrt()

    def _forecast(self, mean: Tensor, left: Tensor) -> Forecast:
        """From means (s, t, e) and the shares of variance left."""
        variance = self._log_variance.exp()
        noise = (variance * self._noise).expand(len(mean), 1, -1)
        log_evidence = self._log_evidence.unsqueeze(1)
        return Forecast(mean, variance * left.clamp_min(RIDGE), noise, log_evidence)


def _attend(query: Tensor, layer: EncodedLayer, own: Tensor) -> Tensor:
    """Attention of tokens (s, h, t, w/h) to the context that all share and to points of their own.

    Args:
        own: (2, s, h, j, w/h) keys and values.
    """
    s, h, t, _ = query.shape
    n = layer.key.shape[2]
    shared = query.transpose(0, 1).flatten(1, 2)  # (h, s t, w/h)
    logits = (shared @ layer.key[0].mT).view(h, s, t, n).transpose(0, 1)
    weights = torch.cat([logits, query @ own[0].mT], -1).softmax(-1)
    of_context = weights[..., :n].transpose(0, 1).flatten(1, 2) @ layer.value[0]
    return of_context.view(h, s, t, -1).transpose(0, 1) + weights[..., n:] @ own[1]
