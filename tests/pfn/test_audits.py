"""Audits against what is known of them, few tasks each."""

import json
from pathlib import Path

import pytest
import torch
from torch.distributions import (
    Categorical,
    ExpTransform,
    MixtureSameFamily,
    MultivariateNormal,
)

import pfn
from pfn import audits
from pfn.audits import AuditSizes
from pfn.diagnostics import ks_test
from priors import GaussianProcess, Mixture, Prior, Warped

FEW = AuditSizes(
    joint_tasks=6,
    joint_draws=300,
    evidence_tasks=4,
    evidence_points=16,
    orders=3,
    martingale_tasks=30,
    martingale_draws=16,
    conflict_tasks=40,
    conflict_draws=19,
    latent_tasks=60,
    given_tasks=3,
)


@pytest.fixture(scope="module")
def model() -> pfn.PFN:
    return pfn.load("gp-1d")


def quiet(progress: object) -> None:
    pass


def test_all_audits_of_a_network_whose_posterior_is_known(model: pfn.PFN) -> None:
    found = audits.audit(model, model.prior, FEW, 0, quiet)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    coherence = found["coherence"]
    assert coherence["martingale"]["p_value"] > 1e-4
    assert coherence["exchangeability"]["spread"] < 0.05
    assert abs(coherence["buffer"]["mean"]) < 0.1
    assert found["conflict"]["false_alarms"] <= 0.05 + 4 * (0.05 / 40) ** 0.5
    assert sum(found["conflict"]["histogram"]) == 40
    assert [row["latent"] for row in found["latents"]] == ["lengthscale", "outputscale", "noise"]
    assert all(row["p_value"] > 1e-4 for row in found["latents"])
    assert [(row["n"], row["latent"]) for row in found["joint"]] == [
        (n, latent) for n in (5, 20, 60) for latent in (False, True)
    ]
    assert all(row["exact_draws"] < 0.5 for row in found["joint"])
    assert all(row["error_mean"] < 0.5 for row in found["joint"])
    assert all(abs(row["pair_gap_mean"]) < 0.2 for row in found["joint"] if not row["latent"])
    assert all(abs(row["mean"]) < 0.1 for row in found["given"])
    assert found["evidence"]["root_mean_square"] < 0.1
    assert [row["n"] for row in found["given"]] == [5, 20, 60]


LEAST = AuditSizes(
    joint_tasks=6,
    joint_draws=50,
    evidence_tasks=2,
    evidence_points=8,
    orders=2,
    martingale_tasks=2,
    martingale_draws=4,
    conflict_tasks=2,
    conflict_draws=19,
    latent_tasks=2,
    given_tasks=2,
)


@pytest.mark.parametrize(
    ("prior", "audited"),
    [
        (GaussianProcess(lengthscale=0.3, outputscale=1.0, noise=0.1), {"joint", "given"}),
        (Mixture([GaussianProcess(noise=0.1), GaussianProcess(noise=0.2)]), set()),
        (Warped(GaussianProcess(noise=0.1), input=None, output=ExpTransform()), set()),
    ],
)
def test_audits_that_a_prior_does_not_know_the_truth_of_are_left_out(
    untrained: Path, prior: Prior, audited: set[str]
) -> None:
    network = pfn.load(untrained, prior=prior)
    found = audits.audit(network, prior, LEAST, 0, quiet)
    assert {name for name in ("joint", "given") if found[name] is not None} == audited
    assert found["evidence"] is not None


def test_audits_of_curves_do_not_apply() -> None:
    curves = pfn.load("curves")
    assert set(audits.audit(curves, curves.prior, FEW, 0, quiet).values()) == {None}


def test_a_mixture_of_joint_normals_is_sampled_as_torch_would() -> None:
    mixture = MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)),
        MultivariateNormal(
            torch.tensor([[0.0, 1.0, 0.0], [2.0, -1.0, 0.5]], dtype=torch.float64),
            torch.tensor([[1.0, 0.5, 0], [0.5, 1.0, 0], [0, 0, 0.1]]).double().expand(2, 3, 3),
        ),
    )
    joint = audits._Joint.of(mixture)
    torch.testing.assert_close(joint.covariance.diagonal(), mixture.variance)
    generator = torch.Generator().manual_seed(0)
    draws = joint.sample(40_000, generator)
    # standard errors of covariances are about 1 / sqrt(draws) = 0.005
    torch.testing.assert_close(torch.cov(draws.T), joint.covariance, atol=0.05, rtol=0)
    torch.testing.assert_close(draws.mean(0), mixture.mean, atol=0.03, rtol=0)
    pair = MixtureSameFamily(
        mixture.mixture_distribution,
        MultivariateNormal(
            mixture.component_distribution.mean[:, :2],
            mixture.component_distribution.covariance_matrix[:, :2, :2],
        ),
    )
    y = torch.tensor([0.4, -0.3], dtype=torch.float64)
    torch.testing.assert_close(joint.log_prob_of_pair(y), pair.log_prob(y))


def test_the_cdf_of_a_category_is_uniform_at_its_own_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    marginal = Categorical(torch.tensor([0.2, 0.5, 0.3]))
    truths = torch.multinomial(marginal.probs, 2000, replacement=True, generator=generator)
    pit = torch.stack([audits._pit(marginal, truth, generator) for truth in truths])
    assert ks_test(pit).p_value > 1e-3


def test_sizes_cover_what_a_network_was_trained_for() -> None:
    model = pfn.load("gp")
    sizes = [audits._size(model, i) for i in range(300)]
    assert {d for _, d in sizes} == set(range(1, 13))
    n = torch.tensor([float(n) for n, _ in sizes])
    assert n.min() == 1
    assert 200 < n.max() <= 256
    assert 10 < n.median() < 24  # log-uniform: the square root of the largest
