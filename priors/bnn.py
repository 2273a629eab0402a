"""Finite Bayesian neural networks as priors over functions: a random network per task.

Every task has its own weights, and its own variances of them where those are random too (a
hierarchical prior, whose functions have heavy tails). A layer of all tasks is one batched matrix
product. `BNN.draw_parameters` and `BNN.functions` are the two halves of `sample`, in coordinates
that make functions differentiable in the variances; `bnn_reference.py` has the posterior.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, LogNormal

from priors.draws import draw, draw_normal
from priors.flows import WeightFlow
from priors.inputs import draw_inputs, read_designs, standardise_inputs
from priors.kernel_prior import JITTER, Hyperparameter, Process, conditional_tasks, observe
from priors.tasks import ConditionalTasks, Tasks

if TYPE_CHECKING:
    from priors.reference import Marginal

CACHED = 2**17  # activations of a hidden layer at once, 512 KiB

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "erf": torch.erf,
    "relu": torch.relu,
    "gelu": F.gelu,  # x Phi(x), not its approximation by tanh
}

Variance = float | Distribution


class Parameters(NamedTuple):
    """Networks, one per task: standard normal weights, and the variances that scale them."""

    weights: tuple[Tensor, ...]  # of each layer (task, 1 + fan_in, fan_out), biases first
    weight_variance: Tensor  # (task, layer)
    bias_variance: Tensor  # (task, layer)
    noise: Tensor  # (task,)


@dataclass(frozen=True)
class BNN:
    """A prior of fully connected networks: f = b + W h_depth, y = f + noise.

    h_l = activation(b_l + W_l h_{l-1}) with h_0 = sqrt(12) (x - 1/2), which has variance 1 under
    uniform inputs; b_l ~ Normal(0, bias_variance_l) and W_l ~ Normal(0, weight_variance_l / fan_in)
    independently. Wide networks converge to the Gaussian process of `priors.infinite_width`.

    Args:
        width: units per hidden layer.
        depth: hidden layers, 1 to 4.
        activation: "tanh", "erf", "relu" or "gelu".
        weight_variance: of all weights; a number, or a distribution of which every task and layer
            draws its own; or a tuple with one of these per layer, depth + 1 of them, the readout's
            last.
        bias_variance: the same of all biases.
        noise: variance (not standard deviation) of the observation noise; a number or a
            distribution.
        flow: of each hidden layer, a distribution of the bias and weights of a unit in place of
            the standard normal one, before they are scaled; such a network takes the number of
            features that its first flow is for. The readout stays normal. `priors.match` fits them.
        inputs: a design in `priors.inputs.DESIGNS`, or several, one of them drawn per task.

    Latents in `Tasks`, all (task,): "noise", and "weight_variance_l" and "bias_variance_l" for
    layers l = 1 .. depth + 1, where they are not plain numbers.

    Reference: Neal, Bayesian Learning for Neural Networks, 1996, chapter 2; the hierarchical prior
    as in Tran, Rossi, Milios and Filippone, JMLR 23, 2022, section 4.2.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> BNN().sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    width: int = 50
    depth: int = 2
    activation: str = "tanh"
    weight_variance: Variance | tuple[Variance, ...] = 1.0
    bias_variance: Variance | tuple[Variance, ...] = 1.0
    noise: Variance = LogNormal(-4.0, 1.5)
    inputs: str | tuple[str, ...] = "uniform"
    flow: tuple[WeightFlow, ...] = ()

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"Expected an activation among {sorted(ACTIVATIONS)}; got {self.activation!r}."
            )
        if not (1 <= self.depth <= 4 and self.width >= 1):
            raise ValueError(
                f"Expected a depth from 1 to 4 and a positive width; got {self.depth} and "
                f"{self.width}."
            )
        for name in ("weight_variance", "bias_variance"):
            values = self.layer_variances(name)
            if len(values) != self.depth + 1:
                raise ValueError(
                    f"Expected one {name} for each of {self.depth + 1} layers; got {len(values)}."
                )
        for h in self.hyperparameters(1):
            if isinstance(h.value, Distribution) or h.value > 0:
                continue
            if not (h.name.startswith("bias") and h.value == 0):
                raise ValueError(f"Expected a positive {h.name}; got {h.value}.")
        if self.flow and [f.dim for f in self.flow[1:]] != [1 + self.width] * (self.depth - 1):
            raise ValueError(
                f"Expected a flow for each of {self.depth} hidden layers, of {1 + self.width} "
                f"dimensions but in the first; got dimensions {[f.dim for f in self.flow]}."
            )
        read_designs(self.inputs)

    def layer_variances(self, name: str) -> tuple[Variance, ...]:
        """The "weight_variance" or "bias_variance" of each layer, the readout's last."""
        value = getattr(self, name)
        return tuple(value) if isinstance(value, tuple | list) else (value,) * (self.depth + 1)

    def hyperparameters(self, d: int) -> tuple[Hyperparameter, ...]:
        """The variances of weights and biases by layer, and the noise; the same for any d."""
        layers = [
            Hyperparameter(f"{name}_{layer}", value, "y^2" if layer > self.depth else "")
            for name in ("weight_variance", "bias_variance")
            for layer, value in enumerate(self.layer_variances(name), 1)
        ]
        return (*layers, Hyperparameter("noise", self.noise, "y^2"))

    @property
    def latent_units(self) -> dict[str, str]:
        """How each latent scales with the data: as "y^2", or not at all ("")."""
        return {h.name: h.unit for h in self.hyperparameters(1)}

    def posterior_is_quick(self, d: int) -> bool:
        """No: it takes NUTS."""
        return False

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        """`batch` tasks of `n` points in `d` features, in float64 on the generator's device.

        Networks are evaluated in float32, which moves f by about 1e-6 of its size: far less than
        any noise hides, and three times as fast.
        """
        parameters = self.draw_parameters(batch, d, generator=generator)
        x = draw_inputs(self.inputs, batch, n, d, generator=generator)
        f = self._functions_in_single_precision(parameters, x)
        noise = draw_normal(batch, n, generator=generator)
        y = f + parameters.noise.sqrt().unsqueeze(-1) * noise
        return Tasks(x, y, f, self.report_latents(parameters))

    def sample_conditional(
        self, batch: int, n: int, d: int, visible: Tensor, *, generator: torch.Generator
    ) -> ConditionalTasks:
        """Tasks whose queries know their distribution given hidden weights and y_1 .. y_visible.

        The readout is integrated out: given the last hidden layer, f is a Gaussian process.

        Args:
            visible: (m,) integers in 0 .. n, the number of leading observations that query j sees.
        """
        process = self.draw_process(batch, d, generator=generator)
        x = draw_inputs(self.inputs, batch, n + len(visible), d, generator=generator)
        return conditional_tasks(process, x[:, :n], x[:, n:], visible, generator=generator)

    def sample_at(self, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Noisy observations (task, n) of networks of their own at x (task, n, d)."""
        return observe(self.draw_process(len(x), x.shape[-1], generator=generator), x, generator)

    def draw_process(self, batch: int, d: int, *, generator: torch.Generator) -> Process:
        """What networks with hidden weights of their own are over the readout: linear models."""
        parameters = self.draw_parameters(batch, d, generator=generator)
        readout = parameters.weight_variance[:, -1] + parameters.bias_variance[:, -1]

        def covariance(x: Tensor, z: Tensor) -> Tensor:
            basis = self.readout_basis(parameters, x)
            return basis @ (basis if z is x else self.readout_basis(parameters, z)).mT

        return Process(
            torch.zeros_like(readout),
            covariance,
            lambda x: self.readout_basis(parameters, x).square().sum(-1),
            parameters.noise,
            JITTER * readout,
            self.report_latents(parameters),
        )

    def posterior(
        self,
        context: tuple[Any, Any],
        x_query: Any,
        latent: bool = False,
        *,
        joint: bool = False,
        given: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> Distribution:
        """The posterior predictive at `x_query` by NUTS, which needs the extra `reference`.

        The readout is integrated out in closed form given every draw of the rest, so that the
        answer is a mixture of normals also for the noise-free function.

        Args:
            context: x (n, d) or (b, n, d), or (n,) where d = 1, and y (n,) or (b, n).
            x_query: (m, d), (b, m, d) or (m,).
            latent: the noise-free function instead of a new observation.
            joint: one joint distribution over all queries instead of one for each.
            given: latents that are known, by their names in `Tasks.latents`; noise is a variance.
            seed: of NUTS.

        Returns:
            A float64 mixture of normals, batch_shape (m,) or (b, m), which offers
            `log_prob_error`; with `joint`, event_shape (m,) and batch_shape () or (b,).

        Raises:
            ValueError: arguments of other shapes, not finite, or of unknown latents.
            ModuleNotFoundError: NumPyro is not installed.
        """
        from priors import bnn_reference  # on demand: it is built on this module

        return bnn_reference.posterior(
            self, context, x_query, latent, joint=joint, given=given, seed=seed
        )

    def latent_posterior(
        self, context: tuple[Any, Any], *, given: Mapping[str, Any] | None = None, seed: int = 0
    ) -> dict[str, Marginal]:
        """The posterior marginal of each latent of one task: `.mean`, `.variance`, `.quantile`.

        Args: see `posterior`; the context is one task.
        """
        from priors import bnn_reference

        return bnn_reference.latent_posterior(self, context, given=given, seed=seed)

    def draw_parameters(self, batch: int, d: int, *, generator: torch.Generator) -> Parameters:
        """`batch` networks of `d` inputs, in float64 on the generator's device.

        Weights are float32 numbers, so that `sample` loses none of their digits.
        """
        device = generator.device
        weights = tuple(
            torch.randn(batch, 1 + fan_in, fan_out, device=device, generator=generator).double()
            for fan_in, fan_out in self.shapes(d)
        )
        weight_variance, bias_variance = (
            torch.stack(
                [draw(v, (batch,), generator=generator) for v in self.layer_variances(name)], -1
            )
            for name in ("weight_variance", "bias_variance")
        )
        noise = draw(self.noise, (batch,), generator=generator)
        return Parameters(weights, weight_variance, bias_variance, noise)

    def shapes(self, d: int) -> list[tuple[int, int]]:
        """(fan_in, fan_out) of each layer, the readout's last."""
        if self.flow and self.flow[0].dim != 1 + d:
            raise ValueError(
                f"Expected {self.flow[0].dim - 1} features, which the flow is for; got {d}."
            )
        sizes = [d, *[self.width] * self.depth, 1]
        return list(itertools.pairwise(sizes))

    def functions(self, parameters: Parameters, x: Tensor) -> Tensor:
        """f (task, n) at x (task, n, d), differentiable in the parameters."""
        return self._readout(parameters, self.features(parameters, x))

    def features(self, parameters: Parameters, x: Tensor) -> Tensor:
        """The last hidden layer (task, n, width) at x (task, n, d), differentiable too."""
        return self._hidden(parameters, standardise_inputs(x))

    def readout_basis(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Psi (task, n, 1 + width), with f = Psi w for a standard normal readout w.

        Given all else, the covariance of f is Psi Psi'. `parameters` need not hold the readout.
        """
        hidden = self.features(parameters, x)
        bias_scale = parameters.bias_variance[:, -1:, None].sqrt().expand(*hidden.shape[:2], 1)
        weight_scale = (parameters.weight_variance[:, -1:, None] / self.width).sqrt()
        return torch.cat([bias_scale, weight_scale * hidden], -1)

    def all_latents(self, parameters: Parameters) -> dict[str, Tensor]:
        """All variances by name, each (task,)."""
        columns = [*parameters.weight_variance.mT, *parameters.bias_variance.mT, parameters.noise]
        return {h.name: v for h, v in zip(self.hyperparameters(1), columns, strict=True)}

    def report_latents(self, parameters: Parameters) -> dict[str, Tensor]:
        """The variances that differ between tasks."""
        random = {h.name for h in self.hyperparameters(1) if isinstance(h.value, Distribution)}
        return {name: v for name, v in self.all_latents(parameters).items() if name in random}

    @torch.no_grad()
    def _functions_in_single_precision(self, parameters: Parameters, x: Tensor) -> Tensor:
        """What `functions` returns, by float32; on a CPU as many tasks at once as its cache holds.

        Inputs are centred in float64, so that close ones stay apart.
        """
        batch, n = x.shape[:2]
        size = max(1, batch if x.device.type != "cpu" else CACHED // max(1, n * self.width))
        hidden = standardise_inputs(x).float()
        pieces = [
            self._readout(some, self._hidden(some, hidden[start : start + size]))
            for start, some in _pieces(parameters, size)
        ]
        return torch.cat(pieces).double() if pieces else x.new_zeros(batch, n)

    def _hidden(self, parameters: Parameters, inputs: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        layers = zip(self.flow, parameters.weights, strict=False)  # none, or all but the readout
        flowed = tuple(flow.forward(weights.mT).value.mT for flow, weights in layers)
        parameters = parameters._replace(weights=flowed + parameters.weights[len(flowed) :])
        for layer in range(self.depth):
            inputs = activation(_layer(parameters, layer, inputs))
        return inputs  # (task, n, width)

    def _readout(self, parameters: Parameters, hidden: Tensor) -> Tensor:
        return _layer(parameters, self.depth, hidden).squeeze(-1)


def _layer(parameters: Parameters, layer: int, hidden: Tensor) -> Tensor:
    """b + W h of one layer, (task, n, fan_out), at h (task, n, fan_in)."""
    weights = parameters.weights[layer]
    weight_scale = (parameters.weight_variance[:, layer] / (weights.shape[1] - 1)).sqrt()
    bias_scale = parameters.bias_variance[:, layer].sqrt()
    bias = bias_scale[:, None, None] * weights[:, :1]
    return torch.baddbmm(bias, hidden, weight_scale[:, None, None] * weights[:, 1:])


def _pieces(parameters: Parameters, size: int) -> Iterator[tuple[int, Parameters]]:
    """Float32 parameters of `size` tasks at a time, each with the index of its first task."""
    weights, *rest = parameters
    for start in range(0, len(parameters.noise), size):
        some = slice(start, start + size)
        single = tuple(w[some].float() for w in weights)
        yield start, Parameters(single, *(part[some].float() for part in rest))
