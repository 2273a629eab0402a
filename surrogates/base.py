"""What all surrogates that are no GPyTorch models share: a BoTorch `Model` with the usual seams.

A subclass says what its posterior is at inputs in the unit cube; transforms, output indices and
fantasies are here. Everything at the seam is float64, whatever a network computes in. Read
`fitting.py` for the names of surrogates, `prior_fitted.py` for the main one.
"""

from __future__ import annotations

import abc
from typing import Any, Self

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import FantasizeMixin, Model
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import Posterior
from torch import Tensor


class Surrogate(Model, FantasizeMixin, abc.ABC):
    """A model of one output, fitted to X (n, d) and Y (n, 1).

    Attributes:
        train_X: (..., n, d) as the user passed it, in float64.
        train_Y: (..., n, 1), as passed.
    """

    _is_ensemble = False  # draws are no batch dimension: acquisitions see their mixture

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        *,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
    ) -> None:
        super().__init__()
        self.likelihood = None  # what `FantasizeMixin` reads
        self.train_X, self.train_Y = train_X.double(), train_Y.double()
        if input_transform is not None:
            self.input_transform = input_transform.eval()
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform.eval()  # it has learned what it needs

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        return self.train_X.shape[:-2]

    def _set_transformed_inputs(self) -> None:
        """Nothing: training inputs stay as they were passed."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing."""

    @abc.abstractmethod
    def posterior_of(self, X: Tensor, observation_noise: bool | Tensor) -> Posterior:
        """The joint posterior over X (batch x q x d), transformed inputs: (batch x q x 1)."""

    @abc.abstractmethod
    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Self:
        """The model that has also seen Y (batch x n x 1) at X (batch x n x d)."""

    def posterior(  # type: ignore[override] # the mixin's takes anything
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """The joint posterior over the q points of X (batch x q x d), differentiable in X."""
        self.eval()
        if output_indices not in (None, [0]):
            raise ValueError(f"Expected output_indices [0] of one output; got {output_indices}.")
        answer = self.posterior_of(self.transform_inputs(X.double()), observation_noise)
        if hasattr(self, "outcome_transform"):
            answer = self.outcome_transform.untransform_posterior(answer, X=X)
        return answer if posterior_transform is None else posterior_transform(answer)

    def subset_output(self, idcs: list[int]) -> Self:
        """The model itself: there is one output."""
        if list(idcs) not in ([0], [-1]):
            raise ValueError(f"Expected idcs [0] of one output; got {idcs}.")
        return self
