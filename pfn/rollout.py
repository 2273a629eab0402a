"""Points one after the other behind a frozen context: what joint draws of a posterior are made of.

By the chain rule, a joint draw asks for the predictive of one point, draws it, adds it, and asks
for the next. Many draws walk at once, each in an order of its own. What is known before any point
is drawn, the context and what the experts make of it, is computed once; a step then costs each draw
two tokens, the point that was drawn last and the one that is asked for. Draws walk behind one
context that all share, or each behind its own.

Read `transformer.py` first, whose `decode` says the same of added points that are all known, and
`paths.py` next, which draws.
Shapes: s draws, b contexts, 1 or s; t points of a walk, the first k of them visited; m points of
the grid; h heads, e experts, n context points, q tokens, w width.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from pfn.experts import RIDGE, Forecast, Solved, cholesky, correlation, eye, inputs_of_each
from pfn.transformer import Encoded, EncodedLayer, Final, Transformer, attend, place

JITTER = 1e-10  # on the diagonal of covariances to draw from; tenfold where it does not suffice
FEW = 2  # tokens of each walk, for which keys that all walks share are not worth copying
PIECE = 2**20  # numbers, 8 MiB: memory of larger tensors goes back to the system after each use


class Rollout:
    """Walks over points of a grid.

    Args:
        encoded: of b contexts.
        grid: (b, m, d), in the prior's units.
        order: (s, t) indices of the grid: what each draw walks over.
        visits: k of these, from the first on, are visited.
    """

    def __init__(
        self, network: Transformer, encoded: Encoded, grid: Tensor, order: Tensor, visits: int
    ) -> None:
        self._network, self._encoded = network, encoded
        self._x = _taken(grid, order)  # (s, t, d)
        self.experts = ExpertsWalk(encoded.solved, grid, order, visits)
        size = 2, len(order), network.config.heads, visits
        self._kept = [
            layer.key.new_zeros(*size, layer.key.shape[-1]) for layer in encoded.layers
        ]  # keys and values of the points that were told

    def step(self, count: int, y: Tensor | None = None) -> Final:
        """What becomes of the next points (s, count) as queries, none of which sees another.

        Args:
            y: (s, c) values of the points asked for before, in the network's normalised units;
                None at first.
        """
        told = None if y is None else self.experts.tell(y)
        j = self.experts.told
        return self._ask(self._x[:, j : j + count], self.experts.expect_next(count), y, told)

    def finish(self, y: Tensor) -> Iterator[Final]:
        """What becomes of all points (s, t), once y (s, c) was told of the last that are visited.

        Returns:
            That of a few walks after the other, computed as they are asked for.
        """
        told = self.experts.tell(y)
        said = self.experts.expect_all()
        config = self._network.config
        return (
            self._ask(self._x[some], said.of(some), y, told, some)
            for some in pieces(len(y), self._x.shape[1] * config.width * config.expansion)
        )

    def _ask(
        self,
        x_query: Tensor,
        said: Forecast,
        y: Tensor | None,
        told: tuple[Tensor, Tensor, Tensor] | None,
        some: slice = slice(None),
    ) -> Final:
        """Queries (s, q, d), and before them the c points told last, through all layers."""
        network, j = self._network, self.experts.told
        tokens, where = network.embed_queries(x_query, latents=False)
        to_tokens = network.experts.tell_query(said)
        sees = torch.full((x_query.shape[1],), j, device=x_query.device)
        c = 0
        if y is not None and told is not None:
            c = y.shape[1]
            x = self._x[some, j - c : j]
            points = network.embed_points(x, y[some]) + network.embed_buffer
            tokens, where = torch.cat([points, tokens], 1), place(torch.cat([x, x_query], 1))
            to_points = network.experts.tell_buffer(*told)[some]
            to_tokens = torch.cat([to_points, to_tokens], 1)
            sees = torch.cat([torch.arange(j - c + 1, j + 1, device=sees.device), sees])
        sharpness = network.sharpness(_of(self._encoded.num_context, some).unsqueeze(-1) + sees)
        mask = sees if c > 1 else None
        layers = zip(network.blocks, self._encoded.layers, self._kept, sharpness, strict=True)
        for block, layer, kept, sharp in layers:
            layer = EncodedLayer(*(_of(part, some) for part in layer))
            if block is network.blocks[-1]:
                tokens = tokens + to_tokens
            normed = block.norm_attention(tokens)
            near = where.near(layer.metric)
            if c:
                own = block.keys_values(normed[:, :c].contiguous(), *near.rows(0, c).of_key())
                for part, value in zip(kept, own, strict=True):
                    part[some, :, j - c : j] = value
            if block is network.blocks[-1] and c:  # nothing reads the points after it
                tokens, normed, sharp = tokens[:, c:], normed[:, c:], sharp[..., c:, :]
                near, mask = near.rows(c, c + x_query.shape[1]), None
            query = block.queries(normed, sharp, *near.of_query())
            tokens = block.finish(tokens, _attend(query, layer, kept[:, some, :, :j], mask))
        return network.finish(tokens, said, _of(self._encoded.logits, some))


class ExpertsWalk:
    """What the experts say along each walk.

    The values that are told do not change covariances. So the factor L of all points of a walk is
    known at the start, and its row j has what the points before say of mean and variance of point
    j. Covariances are relative to an expert's variance.

    Args: those of `Rollout`, of which the contexts' experts, solved.
    """

    def __init__(self, solved: Solved, grid: Tensor, order: Tensor, visits: int) -> None:
        self._order = order
        self._shared = len(grid) == 1
        (s, t), e, k = order.shape, solved.theta.experts, visits
        if self._shared:
            mean, left = _given_context(solved, grid)  # (1, e, m), (1, e, m, m)
            self._left, self._mean = left, mean[0][:, order].transpose(0, 1)  # (s, e, t)
        else:
            x = _taken(grid, order)
            self._left = x.new_empty(s, e, t, t, dtype=torch.float64)
            self._mean = self._left.new_empty(s, e, t)
            for some in self._pieces(t):
                of = slice(some.start * e, some.stop * e)
                part = solved.each(operator.itemgetter(of))
                self._mean[some], self._left[some] = _given_context(part, x[some])
        of_each = (solved.theta.noise.double(), solved.log_variance, solved.log_evidence)
        noise, log_variance, log_evidence = (part.view(-1, e) for part in of_each)
        self._noise, self._log_variance = noise, log_variance  # (b, e)
        self._log_evidence = log_evidence.expand(s, -1)
        self._factor = self._left.new_empty(s, e, k, k).mT  # by columns, as LAPACK has them
        for some in self._pieces(k):
            own = self._rows(some)[..., :k]
            own.diagonal(dim1=-2, dim2=-1).add_(_of(noise, some).unsqueeze(-1))
            self._factor[some] = cholesky(own.flatten(0, 1).mT).unflatten(0, (-1, e))
        self._white = self._left.new_zeros(s, e, k)  # over deviations
        self._values = self._left.new_empty(s, k)
        self.told = 0

    def expect_next(self, count: int) -> Forecast:
        """What the experts say of the next points, (s, count, e) each."""
        j = self.told
        rows = self._factor[:, :, j : j + count]  # (s, e, count, k)
        said = (rows[..., :j] @ self._white[..., :j].unsqueeze(-1)).squeeze(-1)
        self._expected = self._mean[..., j : j + count] + said
        left = rows[..., j : j + count].square().sum(-1) - self._noise.unsqueeze(-1)
        return self._forecast(self._expected.mT, left.mT)

    def tell(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Takes values (s, c) of the points asked for last, and gives what `tell_buffer` takes."""
        j, told = self.told, self.told + y.shape[1]
        factor = self._factor[:, :, j:told, j:told]
        self._values[:, j:told] = y
        residual = self._values[:, None, j:told] - self._expected
        white = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False)
        self._white[..., j:told] = white = white.squeeze(-1)
        log_variance = self._log_variance.unsqueeze(-1)
        log_diagonal = factor.diagonal(dim1=-2, dim2=-1).log()
        square = white.square() * (-log_variance).exp()
        surprise = 0.5 * (square + log_variance + math.log(2 * math.pi)) + log_diagonal
        self._log_evidence = self._log_evidence - surprise.sum(-1)
        self.told = told
        each = log_variance.expand(*white.shape[:2], 1), white, log_diagonal
        return each[0].flatten(0, 1), each[1].flatten(0, 1), each[2].flatten(0, 1)

    def noise_of_next(self, chosen: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draws (s, count) of what one expert for each walk leaves open of the next observations.

        Args:
            chosen: (s,) experts.
        """
        walks, j = torch.arange(len(chosen), device=chosen.device), self.told
        factor = self._factor[walks, chosen, j : j + count, j : j + count]
        size = *factor.shape[:2], 1
        z = torch.randn(size, dtype=factor.dtype, device=factor.device, generator=generator)
        return (factor @ z).squeeze(-1) / factor.square().sum(-1).sqrt()

    def expect_all(self) -> Forecast:
        """What the experts say of all points, once those of the walk were told, (s, t, e)."""
        k, mean = self._factor.shape[-1], torch.empty_like(self._mean)
        pull = torch.linalg.solve_triangular(
            self._factor.mT, self._white.unsqueeze(-1), upper=True
        ).squeeze(-1)
        mean[..., :k] = self._values.unsqueeze(1) - self._noise_of_factor * pull
        if k < mean.shape[-1]:
            for some in self._pieces(mean.shape[-1]):
                said = pull[some].unsqueeze(-2) @ self._rows(some)[..., k:]
                mean[some, :, k:] = self._mean[some, :, k:] + said.squeeze(-2)
        return self._forecast(mean.mT, self._share.mT)

    @functools.cached_property
    def _noise_of_factor(self) -> Tensor:
        """The noise (s, e, 1) that the factor has: more where it did not exist with less."""
        first = self._variances(slice(None))[..., :1]
        return (self._factor[..., :1, 0].square() - first).expand(len(self._order), -1, -1)

    @functools.cached_property
    def _share(self) -> Tensor:
        """Of the variance at all points, what a walk leaves (s, e, t).

        At its own points this follows from the factor alone.
        """
        k, noise = self._factor.shape[-1], self._noise_of_factor
        share = torch.empty_like(self._mean)
        for some in self._pieces(k):
            factor, own = self._factor[some], noise[some]
            inverse = torch.linalg.solve_triangular(factor, eye(factor), upper=False)
            share[some, :, :k] = own * (1 - own * inverse.square_().sum(-2))
        if k < share.shape[-1]:
            for some in self._pieces(share.shape[-1]):
                rows = self._rows(some)[..., k:]  # (s, e, k, t - k)
                weights = torch.linalg.solve_triangular(self._factor[some], rows, upper=False)
                share[some, :, k:] = self._variances(some)[..., k:] - weights.square_().sum(-2)
        return share

    def residuals(self, chosen: Tensor, *, noisy: bool, generator: torch.Generator) -> Tensor:
        """Draws (s, t) of what the walks leave open, by one expert for each, over its deviation.

        By Matheron's rule: a draw given the context alone, less what it says at the points of the
        walk, observed with noise.

        Args:
            chosen: (s,) experts.
            noisy: of a new observation, and not of the function.

        Reference: Wilson et al., Efficiently sampling functions from Gaussian process posteriors,
        ICML 2020, equation 9.
        """
        (s, t), k = self._order.shape, self._factor.shape[-1]
        walks = torch.arange(s, device=chosen.device)
        noise = self._noise_of_factor[walks, chosen]  # (s, 1)
        z, eps, new = (
            torch.randn(s, size, dtype=torch.float64, device=chosen.device, generator=generator)
            for size in (self._left.shape[-1], k, t)
        )
        drawn = self._draw_left(chosen, z)
        error = noise.sqrt() * eps
        factor = self._factor[walks, chosen]  # (s, k, k)
        observed = (drawn[:, :k] + error).unsqueeze(-1)
        white = torch.linalg.solve_triangular(factor, observed, upper=False)
        pull = torch.linalg.solve_triangular(factor.mT, white, upper=True).squeeze(-1)
        residual = torch.empty_like(drawn)
        residual[:, :k] = noise * pull - error
        if k < t:
            for some in self._pieces(t):
                rows = self._rows(some, chosen[some])[..., k:]  # (s, k, t - k)
                said = (pull[some].unsqueeze(-2) @ rows).squeeze(-2)
                residual[some, k:] = drawn[some, k:] - said
        left = self._share[walks, chosen]
        if noisy:
            residual, left = residual + noise.sqrt() * new, left + noise
        return residual / left.clamp_min(RIDGE).sqrt()

    def _draw_left(self, chosen: Tensor, z: Tensor) -> Tensor:
        """Draws (s, t) of one expert's function given the context, of normal z (s, m or t)."""
        ridge = JITTER * eye(self._left)
        if not self._shared:
            walks = torch.arange(len(chosen), device=chosen.device)
            factor = cholesky(self._left[walks, chosen] + ridge)
            return (factor @ z.unsqueeze(-1)).squeeze(-1)
        drawn = torch.empty_like(z)
        for expert in chosen.unique():
            factor = cholesky((self._left[0, expert] + ridge).unsqueeze(0))[0]
            mine = chosen == expert
            drawn[mine] = z[mine] @ factor.mT
        return drawn.gather(1, self._order)

    def _rows(self, some: slice, chosen: Tensor | None = None) -> Tensor:
        """Covariances (s, e, k, t) of the points that some walks visit with all of theirs.

        Args:
            chosen: (s,) the expert of each of these, for (s, k, t).
        """
        e, k, order = self._left.shape[1], self._factor.shape[-1], self._order[some]
        s = len(order)
        experts = torch.arange(e, device=order.device).expand(s, -1)
        if chosen is not None:
            experts = chosen.unsqueeze(-1)
        if self._shared:
            first = order[:, None, :k] + self._left.shape[-1] * experts.unsqueeze(-1)
            rows = self._left[0].flatten(0, 1).index_select(0, first.flatten())
            columns = order[:, None, None].expand(-1, experts.shape[1], k, -1)
            rows = rows.view(s, -1, k, rows.shape[-1]).gather(3, columns)
        else:
            walks = torch.arange(s, device=order.device).unsqueeze(-1)
            rows = self._left[some][walks, experts, :k]
        return rows if chosen is None else rows.squeeze(1)

    def _variances(self, some: slice) -> Tensor:
        """Variances (s, e, t) at points of some walks given the context."""
        variances = self._left.diagonal(dim1=-2, dim2=-1)  # (b, e, m or t)
        if self._shared:
            return variances[0][:, self._order[some]].transpose(0, 1)
        return variances[some]

    def _pieces(self, columns: int) -> Iterator[slice]:
        """Walks whose matrices, one for each expert, have so many columns."""
        return pieces(len(self._order), self._left.shape[1] * self._order.shape[1] * columns)

    def _forecast(self, mean: Tensor, left: Tensor) -> Forecast:
        """From means (s, q, e) and the shares of variance left."""
        variance = self._log_variance.exp()
        noise = (variance * self._noise).unsqueeze(1).expand(len(mean), -1, -1)
        log_evidence = self._log_evidence.unsqueeze(1)
        return Forecast(mean, variance.unsqueeze(1) * left.clamp_min(RIDGE), noise, log_evidence)


def _given_context(solved: Solved, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means (b, e, m) and relative covariances (b, e, m, m) of the experts at x (b, m, d).

    All in float64: from correlations in float32, draws on a fine grid would be ragged.
    """
    theta, place = solved.theta.each(torch.Tensor.double), solved.place
    where = theta.metric * inputs_of_each(theta.experts, x)
    noise = theta.noise.unsqueeze(-1) * eye(solved.precision)
    rounded = correlation(solved.theta, place, place).double()  # what `pull` was solved with
    centred = (rounded + noise) @ solved.pull.unsqueeze(-1)  # y less its mean
    factor = cholesky(correlation(theta, place, place) + noise)
    cross = correlation(theta, place, where)  # (g, n, m)
    sides = torch.cat([cross, centred], -1)
    white = torch.linalg.solve_triangular(factor, sides, upper=False)
    weights, white_y = white[..., :-1], white[..., -1:]
    left = correlation(theta, where, where) - weights.mT @ weights
    mean = theta.mean + (weights.mT @ white_y).squeeze(-1)
    return mean.unflatten(0, (len(x), -1)), left.unflatten(0, (len(x), -1))


def pieces(walks: int, entries: int) -> Iterator[slice]:
    """Some of the walks after the other, that many entries each: no tensor is above `PIECE`."""
    size = max(1, PIECE // entries)
    return (slice(i, min(i + size, walks)) for i in range(0, walks, size))


def _of(part: Tensor, some: slice) -> Tensor:
    """What some walks have of a part (b, ...) that all share or each has its own of."""
    return part if len(part) == 1 else part[some]


def _taken(grid: Tensor, order: Tensor) -> Tensor:
    """Points (s, t, d) of the grid (b, m, d) in order (s, t)."""
    if len(grid) == 1:
        return grid[0][order]
    return grid.gather(1, order.unsqueeze(-1).expand(-1, -1, grid.shape[-1]))


def _attend(query: Tensor, layer: EncodedLayer, own: Tensor, sees: Tensor | None) -> Tensor:
    """Attention of tokens (s, h, q, w/h) to contexts (b, h, n, w/h) and to points of their own.

    Args:
        own: (2, s, h, j, w/h) keys and values.
        sees: (q,) how many of these each token sees; all of them where None.
    """
    s, h, q, _ = query.shape
    n, j = layer.key.shape[2], own.shape[3]
    if q > FEW:
        mask = None
        if sees is not None:
            mask = torch.arange(n + j, device=sees.device) < n + sees.unsqueeze(-1)
        attended = torch.empty_like(query)
        for some in pieces(s, h * (n + j) * query.shape[-1]):
            context = (_of(part, some) for part in (layer.key, layer.value))
            key, value = (
                torch.cat([part.expand(len(behind), -1, -1, -1), behind], 2)
                for part, behind in zip(context, own[:, some], strict=True)
            )
            attended[some] = attend(query[some], key, value, mask)
        return attended
    if len(layer.key) > 1 or s == 1:
        weights = torch.cat([query @ layer.key.mT, query @ own[0].mT], -1).softmax(-1)
        return weights[..., :n] @ layer.value + weights[..., n:] @ own[1]
    shared = query.transpose(0, 1).flatten(1, 2)  # (h, s q, w/h)
    logits = (shared @ layer.key[0].mT).view(h, s, q, n).transpose(0, 1)
    weights = torch.cat([logits, query @ own[0].mT], -1).softmax(-1)
    of_context = weights[..., :n].transpose(0, 1).flatten(1, 2) @ layer.value[0]
    return of_context.view(h, s, q, -1).transpose(0, 1) + weights[..., n:] @ own[1]
