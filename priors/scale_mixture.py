"""Scale mixtures of Gaussian processes: one random variance multiplies a whole function.

With an inverse gamma scale that is a Student-t process, with others a process of other tails.
Evidence and predictions are the base's, integrated over one more hyperparameter; where it is the
only unknown, on a line of nodes, to the last digits. `scales.py` has scales that torch lacks,
`student_t.py` the closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, InverseGamma

from priors.context import Context, read_context
from priors.kernel_prior import JITTER, Hyperparameter, KernelPrior, cholesky, is_positive
from priors.reference import categories, read_given
from priors.student_t import MultivariateStudentT, StudentT, student_t_log_prob


@dataclass(frozen=True)
class ScaleMixture(KernelPrior):
    """f ~ GP(mean, s * covariance of the base) with s ~ `scale`, one s for each function.

    An inverse gamma s ~ InverseGamma(alpha, beta) makes f a Student-t process of 2 alpha degrees of
    freedom and scale matrix beta / alpha times the base's covariance; `student_t.py` has it in
    closed form. All inputs share s: values far apart are uncorrelated, but large together.

    Args:
        base: a prior that is a Gaussian process given its hyperparameters.
        scale: any distribution of positive numbers; it multiplies variances.
        scaled_noise: whether s multiplies the noise too, as in the Student-t process; otherwise the
            noise is what the base says, whatever the function's scale.

    Latents in `Tasks`: the base's, and "scale" (task,). With `scaled_noise` the base's noise is
    called "relative_noise": the variance of the observation noise is scale * relative_noise.

    Reference: Lee, Yun, Yang and Lee, Scale Mixtures of Neural Network Gaussian Processes, ICLR
    2022, arXiv 2107.01408, theorem 3.1; Shah, Wilson and Ghahramani, Student-t Processes as
    Alternatives to Gaussian Processes, AISTATS 2014.

    Example:
        >>> import torch
        >>> from priors import NNGP
        >>> g = torch.Generator().manual_seed(0)
        >>> ScaleMixture(NNGP()).sample(batch=64, n=100, d=3, generator=g).y.shape
        torch.Size([64, 100])
    """

    base: KernelPrior
    # made when asked for: torch imports a third of a second of symbolic mathematics to make one
    scale: Distribution = field(default_factory=lambda: InverseGamma(2.0, 2.0))
    scaled_noise: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.base, KernelPrior) or isinstance(self.base, ScaleMixture):
            raise ValueError(
                "Expected a base that is a Gaussian process given its hyperparameters, such as"
                f" GaussianProcess or NNGP; got {type(self.base).__name__}."
            )
        if not isinstance(self.scale, Distribution) or not is_positive(self.scale):
            raise ValueError(f"Expected one distribution of positive numbers; got {self.scale}.")

    @property
    def inputs(self) -> str | tuple[str, ...]:  # type: ignore[override]
        return self.base.inputs

    @property
    def shaping(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.base.shaping

    @property
    def choice(self) -> str:  # type: ignore[override]
        return self.base.choice

    @property
    def alternatives(self) -> tuple[str, ...]:
        return self.base.alternatives

    def hyperparameters(self, d: int) -> tuple[Hyperparameter, ...]:
        """The base's, those that are variances of y now relative to the scale, and the scale."""
        parts = []
        for h in self.base.hyperparameters(d):
            is_relative = h.unit == "y^2" and (h.name != "noise" or self.scaled_noise)
            parts.append(h._replace(name=self._name(h.name), unit="" if is_relative else h.unit))
        return (*parts, Hyperparameter("scale", self.scale, "y^2"))

    def variances(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Signal and noise of the base, the former and perhaps the latter times the scale."""
        signal, noise = self.base.variances({**theta, "noise": theta[self._name("noise")]})
        scale = theta["scale"]
        return scale * signal, scale * noise if self.scaled_noise else noise

    def _name(self, of_base: str) -> str:
        """What a hyperparameter of the base is called here."""
        return "relative_noise" if of_base == "noise" and self.scaled_noise else of_base

    def unit_covariance(self, x: Tensor, z: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The base's unit kernel (task, n, m)."""
        return self.base.unit_covariance(x, z, theta)

    def unit_variance(self, x: Tensor, theta: Mapping[str, Tensor]) -> Tensor:
        """The base's unit kernel (task, n) of each x with itself."""
        return self.base.unit_variance(x, theta)

    def posterior(
        self,
        context: tuple[Any, Any],
        x_query: Any,
        latent: bool = False,
        *,
        joint: bool = False,
        given: Mapping[str, Any] | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> Distribution:
        """The posterior predictive at `x_query`, as in `KernelPrior.posterior`.

        A Student-t distribution where the scale is inverse gamma, multiplies the noise too, and is
        all that is unknown: with q = (y - mean)' K^-1 (y - mean), it has 2 alpha + n degrees of
        freedom, the mean of the base, and (2 beta + q) / (2 alpha + n) times its variance.

        Reference: Shah, Wilson and Ghahramani, AISTATS 2014, lemma 3.
        """
        closed = None if method else self._in_closed_form(context, x_query, given)
        if closed is None:
            return super().posterior(
                context, x_query, latent, joint=joint, given=given, method=method, seed=seed
            )
        tasks, theta, alpha, beta = closed
        mean, spread = self.base.conditional(tasks.x, tasks.y, tasks.x_query, theta, joint=joint)
        signal, noise = self.base.variances(theta)
        noise = torch.zeros_like(noise) if latent else noise
        scale = (beta / alpha).unsqueeze(-1)
        df = 2 * alpha
        if joint:
            factor = cholesky(spread, noise + JITTER * signal) * scale.sqrt().unsqueeze(-1)
            joint_t = MultivariateStudentT(df, mean, factor)
            return joint_t if tasks.batched else MultivariateStudentT(df[0], mean[0], factor[0])
        deviation = (scale * (spread + noise.unsqueeze(-1))).sqrt()
        df = df.unsqueeze(-1).expand_as(mean)
        each = StudentT(df, mean, deviation)
        return each if tasks.batched else StudentT(df[0], mean[0], deviation[0])

    def log_evidence(
        self,
        context: tuple[Any, Any],
        *,
        given: Mapping[str, Any] | None = None,
        method: str | None = None,
        seed: int = 0,
    ) -> Tensor:
        """log p(y | x) in nats, () or (b,); in closed form where the posterior is."""
        closed = None if method else self._in_closed_form(context, None, given)
        if closed is None:
            return super().log_evidence(context, given=given, method=method, seed=seed)
        tasks, theta, _, _ = closed
        factor, z = self.base.whiten(tasks.x, tasks.y, theta, 0.0)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        assert isinstance(self.scale, InverseGamma)
        alpha, beta = self.scale.concentration.double(), self.scale.rate.double()
        n = tasks.y.shape[-1]
        value = student_t_log_prob(alpha, beta, z.square().sum(-1), log_determinant, n)
        return value if tasks.batched else value[0]

    def _in_closed_form(
        self, context: tuple[Any, Any], x_query: Any | None, given: Mapping[str, Any] | None
    ) -> tuple[Context, dict[str, Tensor], Tensor, Tensor] | None:
        """The tasks, what is known of the base, and the posterior's alpha and beta (task,)."""
        if not (isinstance(self.scale, InverseGamma) and self.scaled_noise):
            return None
        tasks = read_context(context, x_query)
        batch, _, d = tasks.x.shape
        known = read_given(self.hyperparameters(d), given or {}, batch, categories(self))
        theta = {}
        for h in self.hyperparameters(d)[:-1]:
            if h.name in known:
                theta[h.name] = known[h.name]
            elif isinstance(h.value, Distribution):
                return None
            else:
                number = torch.tensor(h.factor * h.value, dtype=torch.float64)
                theta[h.name] = number.expand(batch, *h.shape)
        if "scale" in known or (len(self.alternatives) > 1 and self.choice not in known):
            return None
        theta |= {key: value for key, value in known.items() if key == self.choice}
        theta["noise"] = theta.pop("relative_noise")
        z = self.base.whiten(tasks.x, tasks.y, theta, 0.0)[1]
        alpha = self.scale.concentration.double() + tasks.y.shape[-1] / 2
        beta = self.scale.rate.double() + z.square().sum(-1) / 2
        return tasks, theta, alpha.expand_as(beta), beta
