"""Which prior do data speak for? Bayes' rule over the priors of several checkpoints.

With equal prior probabilities, p(model | data) is proportional to the model's evidence. Evidences
come from the networks themselves (`evidence.py`), so that the answer takes no more than they do.
Read `library.py` for `model="best"`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pfn.model import Fitted
from pfn.predictive import Predictive


@dataclass(frozen=True, repr=False)
class Comparison:
    """Models beside each other on one context.

    Attributes:
        names: of the models.
        log_evidences: (model,) in nats; where `standardize`, only their differences mean something.
        errors: (model,) standard errors of these, by the spread over orders of the rows.
        probabilities: (model,) posterior probabilities, equal a priori.
        fitted: the models with the context, in the same order.
    """

    names: list[str]
    log_evidences: Tensor
    errors: Tensor
    probabilities: Tensor
    fitted: list[Fitted]

    def __repr__(self) -> str:
        pairs = zip(self.names, self.probabilities.tolist(), strict=True)
        return f"Comparison({', '.join(f'{name}: {p:.3g}' for name, p in pairs)})"

    @property
    def best(self) -> str:
        """The model of highest evidence."""
        return self.best_fitted.pfn.card.name

    @property
    def best_fitted(self) -> Fitted:
        """That model with the context."""
        return self.fitted[int(self.log_evidences.argmax())]

    def predict(self, x_query: Any, *, latent: bool = False) -> Predictive:
        """The models' predictives at `x_query`, averaged by their probabilities.

        Args and shapes: those of `Fitted.predict`.

        Reference: Hoeting, Madigan, Raftery and Volinsky, Bayesian model averaging: a tutorial,
        Statistical Science 14, 1999, equation 1.
        """
        answers = [fitted.predict(x_query, latent=latent) for fitted in self.fitted]
        log_weights = [
            answer.log_weights + math.log(max(float(p), torch.finfo(torch.float64).tiny))
            for answer, p in zip(answers, self.probabilities, strict=True)
        ]
        return Predictive(
            torch.cat(log_weights, -1),
            torch.cat([answer.means for answer in answers], -1),
            torch.cat([answer.stds for answer in answers], -1),
        )


def compare_fitted(fitted: list[Fitted], *, orders: int, seed: int) -> Comparison:
    """Models that were conditioned on the same context."""
    values = torch.stack([each.log_evidence(orders=orders, seed=seed).cpu() for each in fitted])
    errors = [each.log_evidence_error(orders=orders, seed=seed).cpu() for each in fitted]
    names = [each.pfn.card.name for each in fitted]
    return Comparison(names, values, torch.stack(errors), values.softmax(0), fitted)
