"""The optimiser of pretraining: Muon for the matrices inside the blocks, AdamW for the rest.

Both live in one class whose state is a flat dictionary of tensors, so that a run is saved without
pickling. Muon: Jordan et al., 2024, "Muon: an optimizer for hidden layers in neural networks"; its
update is scaled as in Liu et al., 2025 (arXiv 2502.16982), so that both parts share a step size.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.98)
MOMENTUM = 0.95
# A quintic whose iteration drives singular values towards 1; coefficients of Jordan et al.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Optimizer:
    """Muon for the weight matrices of `model.blocks`, AdamW for all other parameters.

    Args:
        model: its parameters are updated in place by `step`.
        weight_decay: decoupled, applied to two-dimensional parameters only.
        muon: False takes AdamW for everything, to compare with.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float, muon: bool = True) -> None:
        self.weight_decay = weight_decay
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.by_shape: dict[torch.Size, list[str]] = defaultdict(list)
        self.state: dict[str, Tensor] = {"count": torch.zeros((), dtype=torch.int64)}
        for name, parameter in self.parameters.items():
            is_matrix = parameter.ndim == 2 and name.endswith("weight")
            if muon and is_matrix and name.startswith("blocks."):
                self.by_shape[parameter.shape].append(name)
                self.state[f"momentum.{name}"] = torch.zeros_like(parameter)
            else:
                self.state[f"first.{name}"] = torch.zeros_like(parameter)
                self.state[f"second.{name}"] = torch.zeros_like(parameter)
        self.by_adam = [name for name in self.parameters if f"first.{name}" in self.state]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients in place."""
        self.state["count"] += 1
        self._adamw(lr)
        for names in self.by_shape.values():
            self._muon(names, lr)

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state.items():
            value.copy_(state[name])

    def _adamw(self, lr: float) -> None:
        count = int(self.state["count"])
        parameters = [self.parameters[name] for name in self.by_adam]
        gradients = [_gradient(parameter) for parameter in parameters]
        first = [self.state[f"first.{name}"] for name in self.by_adam]
        second = [self.state[f"second.{name}"] for name in self.by_adam]
        torch._foreach_lerp_(first, gradients, 1 - BETAS[0])
        torch._foreach_mul_(second, BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - BETAS[1])
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, math.sqrt(1 - BETAS[1] ** count))
        torch._foreach_add_(denominator, 1e-8)
        named = [(name, self.parameters[name]) for name in self.by_adam]
        matrices = [value for name, value in named if name.endswith("weight") and value.ndim == 2]
        torch._foreach_mul_(matrices, 1 - lr * self.weight_decay)
        torch._foreach_addcdiv_(parameters, first, denominator, -lr / (1 - BETAS[0] ** count))

    def _muon(self, names: list[str], lr: float) -> None:
        """One orthogonalised momentum step for all matrices of one shape, stacked."""
        parameters = [self.parameters[name] for name in names]
        gradients = [_gradient(parameter) for parameter in parameters]
        momenta = [self.state[f"momentum.{name}"] for name in names]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        update = orthogonalize(torch.stack(nesterov))
        rows, columns = update.shape[-2:]
        scale = 0.2 * math.sqrt(max(rows, columns))  # an AdamW update has root mean square ~ 0.2
        torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
        torch._foreach_add_(parameters, list(update.unbind()), alpha=-lr * scale)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices (k, rows, columns), to about 30 %, by Newton-Schulz.

    In float32 on a CPU, as one without bfloat16 instructions emulates it, and by `_factor` where
    that takes fewer operations. In bfloat16 elsewhere: the iteration tolerates rounding, and matrix
    units are fastest there.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.float() if matrices.device.type == "cpu" else matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True).to(x.dtype) + 1e-7)
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        x = _factor(x @ x.mT, iterations) @ x
    else:
        for _ in range(iterations):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _factor(gram: Tensor, iterations: int) -> Tensor:
    """P (k, n, n) with P X what Newton-Schulz makes of X, from X X^T alone.

    Each step multiplies X by a polynomial Q of X X^T, which becomes Q X X^T Q: products of small
    matrices only, half the time where X is four times as wide as high. Squares lose digits of small
    singular values, to some 1e-4 of an answer in float32; bfloat16 lacks them altogether.
    """
    a, b, c = NEWTON_SCHULZ
    steps: list[Tensor] = []
    for _ in range(iterations):
        if steps:
            gram = steps[-1] @ gram @ steps[-1]
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        steps.append(step)
    return functools.reduce(torch.matmul, steps)  # they commute


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
