"""The front door behind `pfn.predict`: a checkpoint that answers in the units of the data.

`PFN.condition` standardises a context, runs it through the transformer once, and returns a `Fitted`
whose `predict` costs each query one attention over the cached context. `units.py` has the maps to
and from the network's numbers, `data.py` checks what people pass, `transformer.py` does the work.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Distribution, LogNormal, MixtureSameFamily, Normal

from pfn.card import ModelCard
from pfn.conflict import LEAST_DRAWS, LEAST_POINTS, Check, PriorDataConflict, draw_null, judge
from pfn.data import Context, check_context, check_count, check_query
from pfn.evidence import DataSets, Evidence, log_evidence
from pfn.network import Network
from pfn.paths import Walked, draw_paths
from pfn.predictive import Predictive
from pfn.transformer import Latent, Mixture, Scaling, Seen, Transformer
from pfn.units import FromContext, Units, context_units, prior_units
from priors import Prior
from priors.context import check_finite, order_columns, to_tensor

if TYPE_CHECKING:
    from pfn.refine import Refined

CHUNK = 2**20  # numbers that a pass keeps for each expert: bounds memory for a million queries
MATRICES = 2**22  # entries that a pass has in each expert's matrices: bounds memory for many tasks
CERTAIN = 1e-6  # standard deviation of what is known of a latent, relative to the prior's


class Ready(NamedTuple):
    """A checked context and its units, and the same in the prior's units for the network."""

    context: Context
    units: Units
    x: Tensor  # (b, n, d)
    y: Tensor  # (b, n)
    known: Tensor | None  # (b, latent_slots) standardised latents, NaN where unknown
    own: FromContext

    def groups(self, x_query: Tensor) -> Iterator[tuple[Seen, Tensor]]:
        """Contexts as the network takes them, and their queries (b, m, d), some tasks at a time."""
        b, n = self.y.shape
        size = max(1, MATRICES // (1 + n) ** 2)
        for start in range(0, max(1, b), size):
            some = slice(start, start + size)
            known = None if self.known is None else self.known[some]
            yield (self.x[some], self.y[some], known, self.own), x_query[some]


class Buffer(NamedTuple):
    """Observations after the context, in the units of the network and in those of the data."""

    x: Tensor  # (b, k, d)
    y: Tensor  # (b, k)
    data_x: Tensor  # (b, k, d)
    data_y: Tensor  # (b, k)


class PFN:
    """A prior-fitted network: a checkpoint's weights, its card and, where known, its prior."""

    def __init__(self, transformer: Network, card: ModelCard, prior: Prior | None = None):
        self.transformer = transformer
        self.card = card
        self.prior = prior

    def __repr__(self) -> str:
        low, high = self.card.d_range
        return f"PFN({self.card.name!r}, d = {low}..{high}, n = 0..{self.card.max_context})"

    def predict(
        self,
        context: Any,
        x_query: Any,
        *,
        latent: bool = False,
        given: Mapping[str, Any] | None = None,
        standardize: bool = True,
        bounds: Any = None,
        extrapolate_n: bool = False,
    ) -> Predictive:
        """The posterior predictive at `x_query`, in one forward pass.

        Args are those of `condition` and `Fitted.predict`.

        Returns:
            A `Predictive` with batch_shape (m,), or (b, m) for batched tasks.

        Raises:
            ValueError: as `condition`, or if the query does not fit the context.
        """
        ready = self._prepare(context, standardize, bounds, given, extrapolate_n)
        x, dtype = check_query(x_query, ready.context)
        mapped = ready.units.map_x(x.to(ready.x.device)).to(ready.x.dtype)
        with _recording(mapped, ready.x, ready.y, ready.known, keep=False):
            answers = [self._answer(seen, asked, latent) for seen, asked in ready.groups(mapped)]
            mixture = Mixture(*_joined([mixture for mixture, _ in answers], 0))
            inner = Scaling(*_joined([scaling for _, scaling in answers], 0))
        return _predictive(mixture, inner, ready, x.device, dtype)

    def _answer(self, seen: Seen, x_query: Tensor, latent: bool) -> tuple[Mixture, Scaling]:
        """Mixtures at queries (b, m, d): of few in one pass, of many chunk by chunk."""
        if x_query.shape[1] <= _chunk(seen[1]):
            final, scaling = self.transformer.answer(*seen, x_query)
            return _mixture(self.transformer, final, latent), scaling
        encoded = self.transformer.encode(*seen)
        return _decode(self.transformer, encoded, x_query, _chunk(seen[1]), latent), encoded.scaling

    def condition(
        self,
        context: Any,
        *,
        standardize: bool = True,
        bounds: Any = None,
        given: Mapping[str, Any] | None = None,
        extrapolate_n: bool = False,
    ) -> Fitted:
        """Encodes a context once; queries then cost one attention over its cache.

        Args:
            context: (x, y), x (n, d), (n,) for d = 1, or (b, n, d); y (n,), (n, 1) or (b, n).
            standardize: maps y by the context's mean and standard deviation (n - 1 in the
                denominator) and x by its range to the prior's units; shifts only where a spread is
                zero or n < 2, identity at n = 0.
            bounds: (2, d), lower and upper ends of x that replace the context's range.
            given: latents the user knows, by their names in the card, in the units of the data as
                passed (a noise is a variance); the rest stays integrated out.
            extrapolate_n: allows contexts of more than 4 times the trained size.

        Raises:
            ValueError: on bad data, too many features, or a context far beyond the trained size.
        """
        return self._encode(self._prepare(context, standardize, bounds, given, extrapolate_n))

    def _prepare(
        self,
        context: Any,
        standardize: bool,
        bounds: Any,
        given: Mapping[str, Any] | None,
        extrapolate_n: bool,
    ) -> Ready:
        """Checks what the user passed and maps it to the prior's units, on the network's device."""
        parameter = self.transformer.embed_query
        checked = check_context(context)
        checked = checked._replace(
            x=checked.x.to(parameter.device), y=checked.y.to(parameter.device)
        )
        n, d = checked.x.shape[1:]
        self._check_sizes(n, d, extrapolate_n)
        if bounds is not None and not standardize:
            raise ValueError("Expected no bounds with standardize=False, which leaves x as it is.")
        if self.card.architecture.causal:
            self._check_order(checked.x, standardize)
        in_units = context_units if standardize else prior_units
        units = in_units(checked.x, checked.y)
        if bounds is not None:
            low, high = (
                _check_bounds(bounds, d).to(checked.x).expand(len(checked.x), 2, d).unbind(1)
            )
            units = units._replace(x_shift=low, x_scale=high - low)
        mapped = units.map_x(checked.x)
        if bounds is not None:
            _warn_outside(mapped.detach())
        known = self.read_given(given, units, d)
        return Ready(
            checked,
            units,
            mapped.to(parameter.dtype),
            units.map_y(checked.y).to(parameter.dtype),
            None if known is None else known.to(parameter),
            FromContext(standardize and n > 0 and bounds is None, standardize and n > 0),
        )

    def _check_order(self, x: Tensor, standardize: bool) -> None:
        if standardize:
            raise ValueError(
                f"Expected standardize=False for model {self.card.name!r}, whose x and y have units"
                " of their own; surrogates.extrapolate maps a metric to them."
            )
        same = (x[:, 1:, 1:] == x[:, :-1, 1:]).all(-1)  # run of a sweep, if there are several
        if bool((same & (x[..., 0].diff(dim=1) < 0)).any()):
            raise ValueError(
                f"Expected context rows in order of time for model {self.card.name!r}; got x that"
                " decreases."
            )

    def _encode(self, ready: Ready) -> Fitted:
        with _recording(ready.x, ready.y, ready.known, keep=True):
            return Fitted(
                self, ready, self.transformer.encode(ready.x, ready.y, ready.known, ready.own)
            )

    def _check_sizes(self, n: int, d: int, extrapolate_n: bool) -> None:
        card = self.card
        if d > card.architecture.max_features:
            raise ValueError(
                f"Expected at most {card.architecture.max_features} features for model"
                f" {card.name!r}; got context x with d = {d}. pfn.models() lists what is shipped."
            )
        if n > 4 * card.max_context and not extrapolate_n:
            raise ValueError(
                f"Expected a context of at most {4 * card.max_context} points for model"
                f" {card.name!r}, trained up to n = {card.max_context}; got n = {n}. Pass"
                " extrapolate_n=True to go beyond, or a subset of the rows."
            )
        if n > card.max_context:
            warnings.warn(
                f"The context has n = {n} points; model {card.name!r} was trained up to"
                f" n = {card.max_context}. Check the answer, or pass fewer rows.",
                stacklevel=4,
            )

    def read_given(self, given: Mapping[str, Any] | None, units: Units, d: int) -> Tensor | None:
        """The latents of `given`, standardised, in slots (b, latent_slots); NaN where unknown."""
        if given is None:
            return None
        config = self.card.architecture
        names = [latent.name for latent in config.latents]
        if not isinstance(given, Mapping) or not set(given) <= set(names):
            raise ValueError(f"Expected given as a dict of latents among {names}; got {given!r}.")
        batch, columns = len(units.y_scale), []
        for latent in config.latents:
            column = units.y_scale.new_full((batch, config.slots(latent)), math.nan)
            if latent.name in given and latent.categories:
                column = torch.zeros_like(column)
                column[:, self._category(latent, given[latent.name])] = 1.0
            elif latent.name in given:
                value = self._standardised(latent, given[latent.name], units, d)
                column = F.pad(value, (0, column.shape[1] - value.shape[1]), value=math.nan)
            columns.append(column)
        return torch.cat(columns, dim=1)

    def _category(self, latent: Latent, value: Any) -> int:
        labels = self.card.latent_categories.get(latent.name, [])
        if isinstance(value, str) and value in labels:
            return labels.index(value)
        if isinstance(value, Integral) and 0 <= int(value) < latent.categories:
            return int(value)
        raise ValueError(
            f"Expected given {latent.name} among {labels} or as an index below {latent.categories};"
            f" got {value!r}."
        )

    def _standardised(self, latent: Latent, given: Any, units: Units, d: int) -> Tensor:
        """A known latent (b, 1 or d) as the network takes it: prior units, logarithm, z-score."""
        label, width = f"given {latent.name}", d if latent.per_feature else 1
        value = to_tensor(given, label).to(units.y_scale)
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"Expected finite {label}; got {given}. Leave out a latent that is not known."
            )
        shape = tuple(value.shape)
        try:
            value = value.reshape(-1, width) if value.ndim else value
            value = value.expand(len(units.y_scale), width)
        except RuntimeError:
            raise ValueError(
                f"Expected {label} as a number"
                + (f" or {d} numbers, one per feature" if latent.per_feature else "")
                + f"; got shape {shape}."
            ) from None
        shift, scale = self.latent_units(latent.name, units, latent.per_feature)
        value = (value - shift) / scale
        if latent.positive and not bool((value > 0).all()):
            raise ValueError(f"Expected a positive {label}; got {given}.")
        return ((value.log() if latent.positive else value) - latent.mean) / latent.std

    def read_known(self, known: Tensor, d: int) -> dict[str, Tensor]:
        """Known latents, () or (d,), in the prior's units, from the network's slots (slots,).

        The inverse of `read_given` on one task; of categories, their indices.
        """
        config, values, start = self.card.architecture, {}, 0
        for latent in config.latents:
            slots = known[start : start + config.slots(latent)].double().cpu()
            start += config.slots(latent)
            if bool(slots[0].isnan()):
                continue
            if latent.categories:
                values[latent.name] = slots.argmax()
                continue
            value = latent.mean + latent.std * (slots[:d] if latent.per_feature else slots[0])
            values[latent.name] = value.exp() if latent.positive else value
        return values

    def known_in(self, units: Units, known: Tensor) -> Tensor:
        """Known latents (b, latent_slots) of data whose y took other units, in these."""
        columns, start = [], 0
        for latent in self.card.architecture.latents:
            stop = start + self.card.architecture.slots(latent)
            column = known[:, start:stop]
            if not latent.categories:
                raw = latent.mean + latent.std * column
                shift, scale = units.of_latent(self.card.latent_units.get(latent.name, ""), False)
                raw = raw - scale.log() if latent.positive else (raw - shift) / scale
                column = (raw - latent.mean) / latent.std
            columns.append(column)
            start = stop
        return torch.cat(columns, 1)

    def latent_units(self, name: str, units: Units, per_feature: bool) -> tuple[Tensor, Tensor]:
        """Shift and scale (b, 1 or d) with data value = shift + scale * value in prior units.

        Raises:
            ValueError: for one lengthscale over features whose ranges differ: it has no unit.
        """
        of_prior = getattr(self.prior, "latent_units", {})  # of more than the network was taught
        unit = self.card.latent_units.get(name, of_prior.get(name, ""))
        shift, scale = units.of_latent(unit, per_feature)
        if bool(scale.isnan().any()):
            raise ValueError(
                f"Expected features of one range, as one {name} for all of them has no unit"
                f" otherwise; got ranges {units.x_scale.tolist()}. Pass equal bounds, or"
                " standardize=False."
            )
        return shift, scale


class Fitted:
    """A PFN with an encoded context: the posterior over functions given the data."""

    def __init__(self, pfn: PFN, ready: Ready, encoded: Any, added: Buffer | None = None) -> None:
        self.pfn = pfn
        self.context = ready.context
        self.units = ready.units
        self._ready = ready
        self._encoded = encoded
        self._added = added
        self._evidences: dict[tuple[int, int], Evidence] = {}
        self._warning: str | None = None  # of a conflict, until it was said

    def __repr__(self) -> str:
        b, n, d = self.context.x.shape
        added = "" if self._added is None else f", added = {self._added.y.shape[1]}"
        tasks = f", tasks = {b}" if self.context.batched else ""
        return f"Fitted({self.pfn.card.name!r}, n = {n}, d = {d}{added}{tasks})"

    def predict(self, x_query: Any, *, latent: bool = False) -> Predictive:
        """The posterior predictive at `x_query` (m, d), (m,) for d = 1, or (b, m, d).

        Args:
            latent: the noise-free function instead of a new noisy observation.

        Returns:
            A `Predictive` of batch_shape (m,) or (b, m), in the query's floating dtype and on its
            device; it carries a gradient exactly where the query, the context or a given latent
            asks for one.

        Raises:
            ValueError: if the query does not fit the context.
        """
        if self._warning:
            warnings.warn(self._warning, PriorDataConflict, stacklevel=2)
            self._warning = None
        x, dtype = check_query(x_query, self.context)
        transformer, keys = self.pfn.transformer, self._encoded.layers[0].key
        mapped = self.units.map_x(x.to(keys.device)).to(keys.dtype)
        seen = () if self._added is None else self._added
        with _recording(mapped, keys, *seen, keep=False):
            if self._added is None:
                chunk = _chunk(self._ready.y)
                mixture = _decode(transformer, self._encoded, mapped, chunk, latent)
            else:
                mixture = self._decode_added(mapped, self._added, latent)
        return _predictive(mixture, self._encoded.scaling, self._ready, x.device, dtype)

    def extend(self, x: Any, y: Any) -> Fitted:
        """The posterior after more observations, in the units that the first context has set.

        The context is not encoded anew: added points attend to it and to those added before them,
        which costs each query one more key for each. A gradient flows through them. `latents` stays
        that of the first context.

        Args:
            x: (k, d), or (b, k, d) for b alternative continuations of one context.
            y: (k,) or (b, k).

        Raises:
            ValueError: data that do not fit the context.

        Example:
            >>> import pfn
            >>> fitted = pfn.load("gp-1d").condition(([0.1, 0.5, 0.9], [0.0, 1.0, 0.3]))
            >>> fitted.extend([0.7], [0.8]).predict([0.6, 0.8]).mean.shape
            torch.Size([2])
        """
        more = check_context((x, y))
        d, tasks = self.context.x.shape[-1], len(self.context.y)
        if more.x.shape[-1] != d or (self.context.batched and len(more.x) != tasks):
            wanted = f"({tasks}, k, {d})" if self.context.batched else f"(k, {d}) or (b, k, {d})"
            raise ValueError(f"Expected added x of shape {wanted}; got {tuple(more.x.shape)}.")
        ordered = order_columns(more.x.flatten(0, 1), more.columns, self.context.columns)
        more = more._replace(x=ordered.view_as(more.x))
        keys = self._encoded.layers[0].key
        mapped = Buffer(
            self.units.map_x(more.x.to(keys.device)).to(keys.dtype),
            self.units.map_y(more.y.to(keys.device)).to(keys.dtype),
            more.x.to(keys.device),
            more.y.to(keys.device),
        )
        if self._added is not None:
            both = [
                before.expand(len(new), *before.shape[1:])
                for before, new in zip(self._added, mapped, strict=True)
            ]
            mapped = Buffer(*(torch.cat(pair, 1) for pair in zip(both, mapped, strict=True)))
        batch = len(mapped.y)
        context = self.context._replace(
            x=self.context.x.expand(batch, -1, -1),
            y=self.context.y.expand(batch, -1),
            batched=self.context.batched or more.batched,
        )
        return Fitted(self.pfn, self._ready._replace(context=context), self._encoded, mapped)

    def _decode_added(self, x_query: Tensor, added: Buffer, latent: bool) -> Mixture:
        """Mixtures at queries (b, m, d) that see all added points, some tasks at a time."""
        transformer, (k, m) = self.pfn.transformer, (added.y.shape[1], x_query.shape[1])
        n, shared = self._ready.y.shape[1], len(self._ready.y) == 1
        visible = torch.full((m,), k, device=x_query.device)
        size = max(1, MATRICES // (1 + n + k) ** 2) if shared else len(x_query)
        parts = []
        for start in range(0, len(x_query), size):
            some = slice(start, start + size)
            queries = x_query[some]
            encoded = self._encoded.repeat(len(queries)) if shared else self._encoded
            buffer = added.x[some], added.y[some]
            final = transformer.decode(encoded, queries, buffer=buffer, visible=visible)
            parts.append(_mixture(transformer, final, latent))
        return Mixture(*_joined(parts, 0))

    def sample_paths(
        self, x_query: Any, draws: int = 256, *, latent: bool = False, seed: int = 0
    ) -> Tensor:
        """Coherent joint draws of the posterior at `x_query`: whole functions.

        Args:
            x_query: (m, d), (m,) for d = 1, or (b, m, d).
            latent: of the noise-free function instead of new noisy observations.
            seed: of all draws.

        Returns:
            (draws, m), or (draws, b, m), in the query's floating dtype and on its device.

        Raises:
            ValueError: if the query does not fit the context, fewer than one draw, or a model of
                curves.

        Example:
            >>> import pfn
            >>> fitted = pfn.load("gp-1d").condition(([0.1, 0.5, 0.9], [0.0, 1.0, 0.3]))
            >>> fitted.sample_paths([0.2, 0.4, 0.6], 8).shape
            torch.Size([8, 3])
        """
        return self.draw(x_query, draws, (latent,), seed)[0]

    def draw(self, x_query: Any, draws: int, kinds: tuple[bool, ...], seed: int) -> list[Tensor]:
        """Paths as of `sample_paths`: latent ones and the observations that go with them.

        At queries beyond those that a draw visits (`paths.MOST`) the two are drawn independently.
        """
        x, dtype = check_query(x_query, self.context)
        transformer, keys = self.pfn.transformer, self._encoded.layers[0].key
        if not isinstance(transformer, Transformer):
            raise ValueError(
                f"Expected a model of points in any order; {self.pfn.card.name!r} reads curves,"
                " whose joint draws are those of surrogates.extrapolate."
            )
        draws = check_count(draws, 1, "draw")
        mapped = self.units.map_x(x.to(keys.device)).to(keys.dtype)
        generator = torch.Generator(keys.device).manual_seed(seed)
        added, units = self._added, self.units
        y_scale, y_shift = (part.expand(len(mapped)) for part in (units.y_scale, units.y_shift))
        paths = []
        with torch.inference_mode():
            for task, grid in enumerate(mapped):
                told = grid[:0, 0] if added is None else added.y[task]
                points = grid if added is None else torch.cat([added.x[task], grid])
                seen = self._seen(task)
                every = draw_paths(
                    transformer,
                    self._walked(seen),
                    functools.partial(self._encode_anew, seen),
                    points,
                    draws,
                    told,
                    kinds=kinds,
                    generator=generator,
                )
                paths.append([path.double() * y_scale[task] + y_shift[task] for path in every])
        if not paths:
            return [x.new_empty(draws, 0, x.shape[1], dtype=dtype) for _ in kinds]
        return [
            self._unbatch(torch.stack(each, 1), dim=1).to(x.device, dtype)
            for each in zip(*paths, strict=True)
        ]

    def _seen(self, task: int) -> Seen:
        """The context of one task of the batch."""
        ready, some = self._ready, slice(None) if len(self._ready.y) == 1 else slice(task, task + 1)
        known = None if ready.known is None else ready.known[some]
        return ready.x[some], ready.y[some], known, ready.own

    def _walked(self, seen: Seen) -> Walked:
        alone = len(self._ready.y) == 1
        encoded = self._encoded if alone else self.pfn.transformer.encode(*seen)
        return Walked(*seen[:2], prior_units(*seen[:2]), encoded)

    def _encode_anew(self, seen: Seen, x: Tensor, y: Tensor) -> Walked:
        """Larger contexts (s, n, d), (s, n), in the units of the one that was seen.

        Where that set the units of y, these set their own, unless it had no spread to set them by;
        those of x stay, so that far queries do not change what is said of near ones.
        """
        _, first, known, own = seen
        units = prior_units(x, y)
        if own.y and bool((first == first[:, :1]).all()):
            own = own._replace(y=False)
        if own.y:
            fresh = context_units(x, y)
            units = units._replace(y_shift=fresh.y_shift, y_scale=fresh.y_scale)
        if known is not None:
            known = self.pfn.known_in(units, known.expand(len(y), -1))
        encoded = self.pfn.transformer.encode(units.map_x(x), units.map_y(y), known, own)
        return Walked(x, y, units, encoded)

    def log_evidence(self, *, orders: int = 4, seed: int = 0) -> Tensor:
        """log p(y | x) of the context under the prior, in nats, (): (b,) if batched.

        By the chain rule of predictives, averaged over a few orders of the rows. With
        `standardize`, it is of the prior in the units that the context sets, with their Jacobian:
        then only differences between models on the same data mean something. It carries no
        gradient.

        Raises:
            ValueError: fewer than one order.
        """
        return self._evidence(orders, seed).value.clone()

    def log_evidence_error(self, *, orders: int = 4, seed: int = 0) -> Tensor:
        """The standard error of `log_evidence`, by the spread over orders; NaN for one order."""
        return self._evidence(orders, seed).error.clone()

    def _evidence(self, orders: int, seed: int) -> Evidence:
        orders = check_count(orders, 1, "order")
        if (orders, seed) not in self._evidences:
            data = self._every_point()
            generator = torch.Generator(data.y.device).manual_seed(seed)
            with torch.inference_mode():
                found = log_evidence(self.pfn.transformer, data, orders, generator)
            value = found.value - data.y.shape[1] * self.units.y_scale.detach().log()
            found = found._replace(value=value)
            self._evidences[orders, seed] = Evidence(*(self._unbatch(p.clone()) for p in found))
        return self._evidences[orders, seed]

    def _every_point(self) -> DataSets:
        """The context and what was added to it, as the network is given them."""
        ready, added = self._ready, self._added
        if added is None:
            return DataSets(ready.x, ready.y, ready.known)
        b = len(added.y)
        known = None if ready.known is None else ready.known.expand(b, -1)
        x = torch.cat([ready.x.expand(b, -1, -1), added.x], 1)
        return DataSets(x, torch.cat([ready.y.expand(b, -1), added.y], 1), known)

    def check(self, x_query: Any = None, *, draws: int = 199, seed: int = 0) -> Check:
        """Prior-data conflict: does this context look like a data set of the prior?

        Where it does not, the next `predict` warns, once.

        Compares it with data sets that the prior draws at the same inputs, where it can, and else
        with as many inputs of its own.

        Args:
            x_query: (m, d) points whose distance from the context and the prior's box is told.
            draws: data sets of the prior, of which a p-value above 1/4 needs the first fifth only,
                at least 19; it is a multiple of 1 / (1 + those drawn).

        Raises:
            ValueError: a batched context, fewer than 4 points or 19 draws, a model without its
                prior or of curves, or a given latent that the prior cannot be told.
        """
        observed, first = self._every_point(), self._ready.y.shape[1]
        n = observed.y.shape[1]
        if self.context.batched or n < LEAST_POINTS:
            raise ValueError(
                f"Expected one context of at least {LEAST_POINTS} points to check; got a batch of"
                f" {len(observed.y)} of {n} points. Check batched tasks one by one."
                if self.context.batched
                else f"Expected a context of at least {LEAST_POINTS} points to check; got {n}."
            )
        draws = check_count(draws, LEAST_DRAWS, "draw")
        x_query = self.context.x[0, :0] if x_query is None else x_query
        x = check_query(x_query, self.context)[0].to(observed.x.device)
        generator = torch.Generator(observed.y.device).manual_seed(seed)

        def draw(count: int) -> DataSets:
            return draw_null(self.pfn, observed, self._ready.own, first, count, generator)

        where = self.units.to_box(self.rows()[0])[0], self.units.to_box(x)[0]
        with torch.no_grad():
            found = judge(
                self.pfn.transformer, observed, draw, draws, where, generator, self.context.columns
            )
        self._warning = found.reason if found.verdict == "conflict" else None
        return found

    def rows(self) -> tuple[Tensor, Tensor]:
        """x (b, n + k, d), y (b, n + k) of the context and what was added, in units of the data."""
        context, added = self.context, self._added
        if added is None:
            return context.x, context.y
        return torch.cat([context.x, added.data_x], 1), torch.cat([context.y, added.data_y], 1)

    def refine(self, *, draws: int = 1000, seed: int = 0) -> Refined:
        """The exact posterior, starting from the network's answer; see `pfn.refine.refine`."""
        from pfn.refine import refine  # on demand: it is built on this module

        return refine(self, draws=draws, seed=seed)

    def latents(self) -> dict[str, Distribution]:
        """Posterior marginals of the prior's latents, in the units of the data.

        Returns:
            By name: a log-normal mixture for a positive latent, a normal mixture for a real one, a
            Categorical for a choice. Batch_shape () or, for one per feature, (d,); after b if
            batched. In float64. Those that were given are as they were given.
        """
        transformer, config = self.pfn.transformer, self.pfn.card.architecture
        if not config.latents:
            return {}
        d = self.context.x.shape[-1]
        nothing = self._ready.x[:, :0]
        with torch.no_grad():
            final = transformer.decode(self._encoded, nothing, latents=True)
            mixture, logits = transformer.latent_head(final)
        if self._ready.known is not None:
            mixture, logits = _as_told(mixture, logits, self._ready.known)
        tasks = len(self.context.y)
        mixture = Mixture(*(part.expand(tasks, -1, -1) for part in mixture))
        logits = logits.expand(tasks, -1)
        marginals: dict[str, Distribution] = {}
        start = 0
        for latent in config.latents:
            stop = start + config.slots(latent)
            if latent.categories:
                choice = logits[:, start:stop].double()
                marginals[latent.name] = Categorical(logits=self._unbatch(choice))
            else:
                used = slice(start, start + d) if latent.per_feature else start
                part = Mixture(*(value[:, used].double() for value in mixture))
                marginals[latent.name] = self._marginal(latent, part)
            start = stop
        return marginals

    def _marginal(self, latent: Latent, mixture: Mixture) -> Distribution:
        """A latent's mixture, out of z-scores and prior units; a log-normal one where positive."""
        shift, scale = self.pfn.latent_units(latent.name, self.units, latent.per_feature)
        if not latent.per_feature:
            shift, scale = shift.squeeze(1), scale.squeeze(1)
        shift, scale = shift.detach().unsqueeze(-1), scale.detach().unsqueeze(-1)
        means = latent.mean + latent.std * mixture.means
        stds = latent.std * mixture.log_stds.exp()
        weights = Categorical(logits=self._unbatch(mixture.log_weights))
        if latent.positive:
            means, stds = self._unbatch(means + scale.log()), self._unbatch(stds)
            return MixtureSameFamily(weights, LogNormal(means, stds))
        means, stds = self._unbatch(shift + scale * means), self._unbatch(scale * stds)
        return MixtureSameFamily(weights, Normal(means, stds))

    def _unbatch(self, value: Tensor, dim: int = 0) -> Tensor:
        return value if self.context.batched else value.squeeze(dim)


def _recording(*inputs: Tensor | None, keep: bool) -> AbstractContextManager[object]:
    """Records gradients where an input asks for one, and the caller does not forbid it.

    Args:
        keep: whether what is computed stays, and meets inputs that ask for one later.
    """
    wanted = any(value is not None and value.requires_grad for value in inputs)
    records = wanted and torch.is_grad_enabled()
    return torch.set_grad_enabled(records) if keep or records else torch.inference_mode()


def _chunk(y: Tensor) -> int:
    """Queries in one pass on contexts y (b, n)."""
    return max(1, CHUNK // max(128, y.numel()))


def _decode(
    transformer: Network, encoded: Any, x_query: Tensor, chunk: int, latent: bool
) -> Mixture:
    parts = [
        _mixture(transformer, transformer.decode(encoded, part), latent)
        for part in x_query.split(chunk, dim=1)
    ]
    return Mixture(*_joined(parts, 1))


def _mixture(transformer: Network, final: Any, latent: bool) -> Mixture:
    return transformer.mixture_f(final) if latent else transformer.mixture_y(final)


def _joined(parts: Sequence[tuple[Tensor, ...]], dim: int) -> Iterable[Tensor]:
    """Tensors of the same place in each part, end to end."""
    return parts[0] if len(parts) == 1 else (torch.cat(s, dim) for s in zip(*parts, strict=True))


def _as_told(mixture: Mixture, logits: Tensor, known: Tensor) -> tuple[Mixture, Tensor]:
    """What `latent_head` says, but what is known, in slots (b, latent_slots), with certainty."""
    told = known.isfinite()
    means = torch.where(told.unsqueeze(-1), known.unsqueeze(-1), mixture.means)
    log_stds = mixture.log_stds.masked_fill(told.unsqueeze(-1), math.log(CERTAIN))
    return Mixture(mixture.log_weights, means, log_stds), torch.where(told, known.log(), logits)


def _predictive(
    mixture: Mixture, inner: Scaling, ready: Ready, device: torch.device, dtype: torch.dtype
) -> Predictive:
    """The network's mixture (b, m, components), mapped back to the units of the data."""
    units = ready.units
    scale = (units.y_scale * inner.scale.double())[:, None, None]
    shift = (units.y_shift + units.y_scale * inner.center.double())[:, None, None]
    means = shift + scale * mixture.means.double()
    stds = scale * mixture.log_stds.double().exp()
    # A copy, outside inference mode: what users get may meet gradients.
    log_weights = mixture.log_weights.to(device, dtype, copy=True)
    parameters = [log_weights, means.to(device, dtype), stds.to(device, dtype)]
    if not ready.context.batched:
        parameters = [value.squeeze(0) for value in parameters]
    return Predictive(*parameters)


def _check_bounds(bounds: Any, d: int) -> Tensor:
    tensor = to_tensor(bounds, "bounds").double()
    check_finite(tensor, "bounds")
    if tensor.shape != (2, d) or not bool((tensor[0] < tensor[1]).all()):
        raise ValueError(
            f"Expected bounds of shape (2, {d}), lower ends below upper ends, like context x with"
            f" d = {d}; got {tensor.tolist() if tensor.numel() <= 8 else tuple(tensor.shape)}."
        )
    return tensor


def _warn_outside(x: Tensor) -> None:
    """Warns of context rows x (b, n, d), in units of the bounds, that are beyond these."""
    outside = int(((x - x.clamp(0, 1)).abs() > 1e-6).any(-1).sum())
    if outside:
        warnings.warn(
            f"{outside} of {x.shape[:2].numel()} context rows are outside the bounds. Are both in"
            " the same units?",
            stacklevel=4,
        )
